"""The harness's `pregate` model against the harness's own `hf` model: the same scores and texts, from memory and
through the engine."""

from __future__ import annotations

import gc
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM, T5Tokenizer

from pregate.config import PreGateConfig, UsageError
from pregate.conversion.write import convert
from pregate.engine.engine import OffloadEngine
from pregate.models.loading import load_resident
from tests.models.families.test_decoder_only import FAMILIES, upstream_model
from tests.tasks.corpora import sentinel_tokenizer
from tests.tasks.test_chat import chat_tokenizer
from tests.tiny import pregated_model

pytest.importorskip("lm_eval")  # an optional package, which the development environment does not hold

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pregate.measure.lm_eval_model import OF_ENGINE, OF_HARNESS, PregateLM

MOST = 48
"""Tokens that the models take: less than some of the requests have."""
LONG = "A short book that goes on, and on, and does not end where a short book ends. " * 2
PAIRS = [
    ("What is it?", " A short book."),
    ("What is it?", " A"),
    ("What is it?", " B"),
    ("Who wrote it, and when was that?", " Ada wrote it in the year 1843."),
    ("", "Ada"),
    (LONG, " It ends."),
]
"""Contexts that are shared, one that is empty, and one that is cut."""
TEXTS = [(LONG,), ("A short book.",), ("In the year 1843 Ada wrote it.",)]
PROMPTS = ["What is it?", "Ada", "In the year 1843", LONG]


def upstream(vocabulary: int, **changes: Any) -> Any:
    torch.manual_seed(0)
    geometry: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": MOST,
    }
    return OlmoeForCausalLM(OlmoeConfig(**geometry | changes)).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's checkpoint, the same converted, and others; each with a tokenizer."""
    root = tmp_path_factory.mktemp("harness")
    tokenizer = chat_tokenizer(None)
    upstream(len(tokenizer)).save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")
    convert(str(root / "plain"), root / "ahead", PreGateConfig(lookahead=1))
    upstream(len(tokenizer)).save_pretrained(root / "without_tokenizer")
    upstream(len(tokenizer) - 1).save_pretrained(root / "small")
    pregated_model(0, vocab_size=512).save_pretrained(root / "switch")
    for name in ("small", "switch"):
        tokenizer.save_pretrained(root / name)
    return root


def asked(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


def scored(model: Any) -> list[float]:
    return [total for total, _ in with_greedy(model)]


def with_greedy(model: Any) -> list[tuple[float, bool]]:
    return model.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)


def rolled(model: Any) -> list[float]:
    return model.loglikelihood_rolling(asked("loglikelihood_rolling", TEXTS), disable_tqdm=True)


def written(model: Any, until: str = "never") -> list[str]:
    options = {"until": [until], "max_gen_toks": 6}
    return model.generate_until(asked("generate_until", [(text, dict(options)) for text in PROMPTS]), disable_tqdm=True)


def assert_close(found: list[float], expected: list[float]) -> None:
    assert all(math.isfinite(total) and total < 0 for total in found)
    assert len(set(found)) == len(found)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def assert_same(models: list[Any], own: Any) -> None:
    """Scores and texts are those of the harness's own model, and an engine has moved experts for each of them."""
    texts = written(own)
    stop = texts[0][len(texts[0]) // 2]
    asks: list[Any] = [scored, rolled, written, lambda model: written(model, stop), with_greedy]
    answers = [ask(own) for ask in asks]
    for model in models:
        seen = 0
        for ask, expected in zip(asks, answers, strict=True):
            found = ask(model)
            if ask in (scored, rolled):
                assert_close(found, expected)
            elif ask is with_greedy:
                assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            else:
                assert found == expected and len(set(found)) == len(found)
            if model.offloading:
                assert model.offloading.counters.bytes_moved > seen
                seen = model.offloading.counters.bytes_moved
    assert answers[3][0] == texts[0][: texts[0].index(stop)] != texts[0]


def opened(directory: Path, **options: Any) -> PregateLM:
    return PregateLM(pretrained=str(directory), device="cpu", **options)


ENGINE = {"engine": "offloaded", "policy": "pre_gated", "device_budget": "25%"}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ["plain", "ahead"])
def test_scores_and_texts_are_those_of_the_harness(root: Path, name: str, batch_size: int) -> None:
    own = HFLM(pretrained=str(root / name), device="cpu", batch_size=batch_size)
    assert_same([opened(root / name, batch_size=batch_size, **options) for options in ({}, ENGINE)], own)


def test_routes_ahead_change_the_scores(root: Path) -> None:
    """So that the test above compares two different models."""
    plain, ahead = (scored(opened(root / name)) for name in ("plain", "ahead"))
    assert max(abs(one - other) for one, other in zip(plain, ahead, strict=True)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_as_by_the_harness(family: str, tmp_path: Path) -> None:
    upstream_model(FAMILIES[family], 50).save_pretrained(tmp_path / "plain")
    convert(str(tmp_path / "plain"), tmp_path / "ahead", PreGateConfig(lookahead=1))
    # in a directory of its own: beside a config transformers makes the tokenizer of some families of other classes
    sentinel_tokenizer().save_pretrained(tmp_path / "words")
    shared: dict[str, Any] = {"tokenizer": str(tmp_path / "words"), "batch_size": 2, "max_length": 32}
    pairs = [("w1 w2 w3", " w4 w5"), ("w7", " w1 w9 w30 w4"), ("w3 w2 w1 w9 w9 w8 w7", " w6")]
    prompts = [(prompt, {"until": ["never"], "max_gen_toks": 4}) for prompt, _ in pairs]

    def answers(model: Any) -> tuple[list[float], list[str]]:
        scores = model.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
        texts = model.generate_until(asked("generate_until", prompts), disable_tqdm=True)
        return [total for total, _ in scores], texts

    for name in ("plain", "ahead"):
        totals, texts = answers(HFLM(pretrained=str(tmp_path / name), device="cpu", **shared))
        for options in ({}, ENGINE):
            model = opened(tmp_path / name, **shared, **options)
            found = answers(model)
            assert_close(found[0], totals)
            assert found[1] == texts and len(set(texts)) == len(texts)
            assert not options or model.offloading.counters.bytes_moved > 0


def test_what_is_evaluated_is_told(root: Path) -> None:
    told = {name: opened(root / "ahead", **options).get_model_info() for name, options in TOLD.items()}
    offloaded = told["offloaded"]
    assert offloaded["model_num_parameters"] == told["resident"]["model_num_parameters"]
    assert offloaded["model_num_parameters"] == load_resident(root / "ahead").num_parameters()
    assert (told["resident"]["engine"], offloaded["engine"], offloaded["policy"]) == (
        "resident",
        "offloaded",
        "on_demand",
    )
    assert told["resident"]["model_dtype"] == torch.float32 and offloaded["model_dtype"] == torch.bfloat16
    assert offloaded["num_slots"] == 12 and offloaded["bytes_moved"] == 0


TOLD = {
    "resident": {},
    "offloaded": {
        "engine": "offloaded",
        "policy": "on_demand",
        "device_budget": "50%",
        "cache": None,
        "dtype": "bfloat16",
    },
}
"""`cache=none` on the harness's command line becomes None."""


def test_a_dropped_model_closes_its_engine(root: Path) -> None:
    model = opened(root / "ahead", **ENGINE)
    engine = model.offloading
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="closed"):
        engine.forward(input_ids=torch.tensor([[3, 4]]))


def test_tables_that_differ_stay_apart(root: Path, tmp_path: Path) -> None:
    """The harness ties the tables of a torch module again."""
    tokenizer = chat_tokenizer(None)
    upstream(len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    resident, offloaded = scored(opened(tmp_path)), scored(opened(tmp_path, **ENGINE))
    assert_close(resident, offloaded)
    prompt = tokenizer("What is it?", return_tensors="pt")["input_ids"]
    answer = tokenizer(" B", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = load_resident(tmp_path)(input_ids=torch.cat([prompt, torch.tensor([answer])], 1)[:, :-1]).logits
    behind = logits[0, prompt.shape[1] - 1 :].log_softmax(-1)
    expected = sum(float(row[token]) for row, token in zip(behind, answer, strict=True))
    assert resident[2] == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_that_closes_texts_does_not_close_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -9.0) for letter in sorted(set("".join(a + b for a, b in PAIRS)) - {" "})]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    upstream(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    model = opened(tmp_path)
    assert "puts </s> behind every text" in capsys.readouterr().err
    assert_close(scored(model), scored(HFLM(pretrained=str(tmp_path), device="cpu", add_bos_token=False)))
    closed = scored(HFLM(pretrained=str(tmp_path), device="cpu"))
    assert abs(scored(model)[0] - closed[0]) > 0.01
    with pytest.raises(UsageError, match=r"puts </s> behind every text.*leave out add_bos_token"):
        opened(tmp_path, add_bos_token=True)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("plain", {"engine": "fast"}, "engine=fast is not known: write resident or offloaded."),
        (
            "plain",
            {"engine": "offloaded", "policy": "clever"},
            "policy=clever is not known: write gpu_only, on_demand, prefetch_all or pre_gated.",
        ),
        (
            "plain",
            {"policy": "pre_gated"},
            "policy is an option of the engine: add engine=offloaded, or leave it out.",
        ),
        ("plain", {"dtype": "int7"}, "dtype=int7 is not known: write auto, float32, bfloat16, float16 or float64."),
        (
            "plain",
            {"engine": "offloaded", "io_threads": "two"},
            "io_threads=two is not a whole number: write one of at least 1.",
        ),
        ("plain", {"engine": "offloaded", "io_uring": 3}, "io_uring=3 is not known: write true or false."),
        (
            "switch",
            {},
            "The harness scores decoder-only models, and .*switch is a switch_transformers model, which reads its "
            "prompt in another stack: evaluate it with python -m pregate.eval.",
        ),
        (
            "small",
            {},
            r"The tokenizer has \d+ ids but .*small has \d+ embeddings: set tokenizer to the one that the model was "
            "trained with.",
        ),
        (
            "nowhere",
            {},
            "There is no directory .*nowhere' and it cannot be a hub id either: give the path of a directory .*",
        ),
        (
            "without_tokenizer",
            {},
            "pretrained=.*without_tokenizer gives no tokenizer.*: set tokenizer to a directory or hub id that holds "
            "one.",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(root: Path, name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        opened(root / name, **options)
    assert re.fullmatch(sentence, str(refused.value)), str(refused.value)


def test_an_option_that_is_not_known_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match=r"has no option parallelize: it has pretrained, .*, and of those of its hf"):
        opened(root / "plain", parallelize=True)
    with pytest.raises(UsageError, match="There is no model: write --model_args pretrained=DIR_OR_ID"):
        PregateLM(device="cpu")


def test_options_of_the_harness_exist() -> None:
    assert set(OF_HARNESS) <= set(inspect.signature(HFLM.__init__).parameters)
    assert set(OF_ENGINE) <= set(inspect.signature(OffloadEngine.open).parameters)
