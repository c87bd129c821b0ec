"""Calibration through the engine: the gates of a calibration in memory, experts read once, and no step done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, OlmoeConfig, OlmoeForCausalLM

from pregate.config import (
    CalibrationConfig,
    CalibrationData,
    Entry,
    GateKind,
    Init,
    PreGateConfig,
    Run,
    SlabDtype,
    Through,
    Tier,
    UsageError,
    Weights,
)
from pregate.conversion.calibrate import memory_budget, streamed, through_engine
from pregate.conversion.calibrate.examples import Batches, answered_rows, text_rows
from pregate.conversion.calibrate.flow import calibrate, calibrate_source
from pregate.conversion.calibrate.outcome import Calibration
from pregate.conversion.calibrate.through_engine import work_of
from pregate.conversion.calibrate.work_dir import WorkDir
from pregate.conversion.manifest import MANIFEST
from pregate.engine.opening import Opened
from pregate.models.checkpoint import open_checkpoint
from pregate.models.families.olmoe import FAMILY
from pregate.models.family import config_of
from pregate.models.loading import load_resident, mark_conventional, open_model
from pregate.system.stopping import GOES_ON, Terminated, stoppable
from pregate.tasks.base import Example
from pregate.tasks.tokens import Collator
from tests import test_made_up_family as made_up
from tests.tiny import SEQ2SEQ, upstream_model
from tests.training.copying import WORDS, FirstWords, short_run, word_tokenizer

DEPTH = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 4}
CASES = {
    "paper": {},
    "two ahead": {"lookahead": 2, "entry": Entry.embedding},
    "embedding": {"entry": Entry.embedding},
    "late": {"lookahead": 2, "entry": Entry.embedding, "weights": Weights.late},
    "start": {"weights": Weights.late, "start": 1},
    "mlp": {"entry": Entry.embedding, "gate": GateKind.mlp, "gate_width": 6},
}


def switch(directory: Path) -> None:
    upstream_model(0, router_bias=True, **DEPTH).save_pretrained(directory)


def olmoe(directory: Path) -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=7,
        num_experts_per_tok=3,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
    )
    OlmoeForCausalLM(config).save_pretrained(directory)


def granite(directory: Path) -> None:
    """With embeddings so small that the norm of an entry gate tells scaled ones from those of the table."""
    torch.manual_seed(0)
    config = GraniteMoeConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=7,
        num_experts_per_tok=3,
        initializer_range=0.3,
        embedding_multiplier=12.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = GraniteMoeForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.001)
    model.save_pretrained(directory)


def with_dense_layers(directory: Path) -> None:
    made_up.model().save_pretrained(directory)
    made_up.take_apart(directory)
    mark_conventional(directory)


MAKERS = {"switch": switch, "olmoe": olmoe, "granite": granite, "dense layers between": with_dense_layers}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    for name, make in MAKERS.items():
        make(root / name)
    return {name: root / name for name in MAKERS}


def settings(pregate: dict[str, Any] | None = None, **changes: Any) -> Run:
    run = short_run()
    run.pregate = PreGateConfig(**{"init": Init.calibrated, **(pregate or {})})
    run.calibration = CalibrationConfig(**{"steps": 2, "batch_size": 14, "through": Through.engine, **changes})
    return run


def calibrated(run: Run, source: Path, output: Path) -> Calibration:
    return calibrate(run, str(source), output, FirstWords(), word_tokenizer())[1]  # type: ignore[arg-type]


def tensors(directory: Path) -> dict[str, Tensor]:
    opened = open_checkpoint(str(directory))
    return {name: tensor.clone() for name, tensor in opened.read(opened.names()).items()}


def expert_bytes(source: Path) -> int:
    opened = Opened(open_model(str(source)))
    return len(opened.family.keys()) * opened.layout(SlabDtype.source).slab_bytes


def in_memory(run: Run) -> Run:
    return replace(run, calibration=replace(run.calibration, through=Through.memory, memory=None))


def assert_same_gates(one: Path, other: Path, tolerance: float = 2e-3) -> None:
    """Where L-BFGS stops depends on rounding, so refined gates differ more than ridge fits do."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("model", "case", "steps"),
    [
        *(("switch", "paper", 2), ("olmoe", "two ahead", 0), ("dense layers between", "embedding", 2)),
        *(("switch", "late", 0), ("olmoe", "start", 0), ("olmoe", "mlp", 0), ("granite", "embedding", 0)),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in product(MAKERS, CASES, (0, 2))
            if each[:2] != ("dense layers between", "start")  # of its blocks there are two
        ),
    ],
)
def test_the_gates_are_those_of_a_calibration_in_memory(
    model: str, case: str, steps: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Examples are of many lengths, so that batches have padding. Each expert is read once for all of them."""
    run, source = settings(CASES[case], steps=steps), sources[model]
    run.seed = 1  # with the examples of seed 0, rounding decides between two fits of one gate
    resident = calibrated(in_memory(run), source, tmp_path / "resident")
    found = calibrated(run, source, tmp_path / "streamed")
    assert_same_gates(tmp_path / "resident", tmp_path / "streamed", tolerance=2e-3 if steps else 1e-5)
    for told, expected in ((found.before, resident.before), (found.after, resident.after)):
        assert told.keys() == expected.keys()
        for stack, shares in expected.items():
            assert told[stack] == pytest.approx(shares, abs=1e-9)
    assert [(g.stack, g.block, g.fit.chosen) for g in found.gates] == [
        (g.stack, g.block, g.fit.chosen) for g in resident.gates
    ]
    assert any(gate.fit.chosen != "copy" for gate in found.gates)
    assert found.tokens == resident.tokens and found.num_examples == 40
    assert found.bytes_read == expert_bytes(source) > 0 and resident.bytes_read is None
    assert not work_of(tmp_path / "streamed").exists()
    account = json.loads((tmp_path / "streamed" / MANIFEST).read_text())["calibration"]
    assert account["bytes_read"] == found.bytes_read and account["settings"]["through"] == "engine"
    assert "of experts read" in found.table()


@pytest.mark.parametrize("through", Through)
def test_routers_that_weigh_stay_the_sources(through: Through, sources: dict[str, Path], tmp_path: Path) -> None:
    """The fitted gates are others than those copies, and the calibration sees the model as it is written."""
    run = settings({"weights": Weights.late, "lookahead": 2}, through=through, steps=0)
    found = calibrated(run, sources["olmoe"], tmp_path / "out")
    written, source = tensors(tmp_path / "out"), tensors(sources["olmoe"])
    for name, tensor in source.items():
        assert torch.equal(written[name], tensor), name
    ahead = {name: tensor for name, tensor in written.items() if name not in source}
    assert len(ahead) == 2 and all("pre_gate" in name for name in ahead)
    for layer, chosen in enumerate(gate.fit.chosen for gate in found.gates):
        fitted = ahead[f"model.layers.{layer}.mlp.gate.pre_gate.router.weight"]
        assert torch.equal(fitted, source[f"model.layers.{layer + 2}.mlp.gate.weight"]) == (chosen == "copy")
    assert any(gate.fit.chosen != "copy" for gate in found.gates)


class KilledError(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the pass end abruptly in the middle of its `number`-th layer; returns the layers that were begun."""

    def prepare(number: int, error: type[BaseException] = KilledError) -> list[Any]:
        monkeypatch.undo()
        begun: list[Any] = []
        run_one, run_layer = streamed.StreamedFit._run, streamed.run_layer

        def run(self: Any, place: Any) -> None:
            begun.append(place)
            run_one(self, place)

        def one(*arguments: Any) -> Any:
            result = run_layer(*arguments)
            if len(begun) == number:
                raise error
            return result

        monkeypatch.setattr(streamed.StreamedFit, "_run", run)
        monkeypatch.setattr(streamed, "run_layer", one)
        return begun

    return prepare


@pytest.mark.parametrize(("model", "at"), [("olmoe", 3), pytest.param("switch", 8, marks=pytest.mark.slow)])
def test_a_killed_calibration_goes_on_and_finds_the_same_gates(
    model: str, at: int, sources: dict[str, Path], tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source = settings({"lookahead": 2}), sources[model]
    whole = calibrated(run, source, tmp_path / "whole")
    begun = killed_at(at)
    with pytest.raises(KilledError):
        calibrated(run, source, tmp_path / "again")
    assert not (tmp_path / "again").exists() and work_of(tmp_path / "again").is_dir() and len(begun) == at
    progress = max(work_of(tmp_path / "again").glob("step-?")) / "progress.pt"
    told = torch.load(progress)
    assert whole.peak_bytes is None or 10**8 < told["peak_bytes"] < 10**12
    torch.save({**told, "peak_bytes": told["peak_bytes"] and told["peak_bytes"] + 10**12}, progress)
    rest = killed_at(0)
    found = calibrated(run, source, tmp_path / "again")
    assert rest[0] == begun[-1] and not set(rest[1:]) & set(begun)
    assert_same_gates(tmp_path / "whole", tmp_path / "again", tolerance=0)
    assert (found.before, found.after) == (whole.before, whole.after) and found.seconds > 0
    # of whichever process had more
    assert found.peak_bytes is None or found.peak_bytes > 10**12
    # what was read for the layer that was cut short is read again
    assert whole.bytes_read is not None and found.bytes_read is not None and whole.bytes_read <= found.bytes_read
    assert not work_of(tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("stop", "status", "word"), [(KeyboardInterrupt, 130, "stopped"), (Terminated, 143, "terminated")]
)
def test_a_stopped_calibration_says_how_it_goes_on(
    stop: Any, status: int, word: str, sources: dict[str, Path], tmp_path: Path, killed_at: Any, capsys: Any
) -> None:
    def stopped(at: int) -> str:
        killed_at(at, stop)
        with pytest.raises(SystemExit) as ended, stoppable():
            calibrated(settings(), sources["olmoe"], tmp_path / "out")
        assert ended.value.code == status
        return capsys.readouterr().err.splitlines()[-1]

    # nothing is done yet
    assert stopped(1) == f"pregate: {word}; {GOES_ON}" and not work_of(tmp_path / "out").exists()
    told = f"the calibration in {work_of(tmp_path / 'out')} goes on with the same command"
    assert stopped(3).startswith(f"pregate: {word}; {told}")
    assert stopped(1).startswith(f"pregate: {word}; {told}")  # the third layer of all: it went on


def test_other_settings_begin_anew(
    sources: dict[str, Path], tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = killed_at(3)
    with pytest.raises(KilledError):
        calibrated(settings(), sources["olmoe"], tmp_path / "out")
    run, first = settings(steps=0), begun[0]
    monkeypatch.undo()
    begun = killed_at(0)
    calibrated(run, sources["olmoe"], tmp_path / "out")
    assert begun[0] == first
    calibrated(in_memory(run), sources["olmoe"], tmp_path / "resident")
    assert_same_gates(tmp_path / "resident", tmp_path / "out")


def test_a_work_directory_belongs_to_one_process(sources: dict[str, Path], tmp_path: Path) -> None:
    work = WorkDir(work_of(tmp_path / "out"), {"made": "from"}, batch_size=2)
    with pytest.raises(UsageError, match="Another process calibrates in"):
        calibrated(settings(), sources["olmoe"], tmp_path / "out")
    work.close()
    assert not work_of(tmp_path / "out").exists()


@pytest.mark.parametrize(("batch_size", "goes_on"), [(4, True), (9, True), (3, False)])
def test_batches_that_no_longer_fit_begin_anew(batch_size: int, goes_on: bool, tmp_path: Path, capsys: Any) -> None:
    """What is finished lies in files of whole batches, and the slots are counted for batches that fit."""
    first = WorkDir(tmp_path / "work", {"made": "from"}, batch_size=4)
    first.finish_step({})
    first.close()
    capsys.readouterr()
    again = WorkDir(tmp_path / "work", {"made": "from"}, batch_size)
    assert (again.num_done, again.batch_size) == ((1, 4) if goes_on else (0, 3))
    assert ("too large for the memory" in capsys.readouterr().err) is not goes_on
    again.close()


def test_little_memory_is_few_slots(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer slots than a block has experts these are read several times, and the gates stay the same."""
    few, source = {"tokens": 1000}, sources["olmoe"]
    calibrated(in_memory(settings(**few)), source, tmp_path / "resident")
    plenty = calibrated(settings(**few, memory="64GB"), source, tmp_path / "plenty")
    assert plenty.bytes_read == expert_bytes(source)
    assert plenty.peak_bytes is None or plenty.peak_bytes > 0
    # the memory of the process, which differs from run to run, would hide the few bytes of this model
    monkeypatch.setattr(memory_budget, "bytes_in_use", lambda _: 0)
    with pytest.raises(UsageError, match=r"calibration.memory=1kB is too little: .* give at least") as error:
        calibrated(settings(**few, memory="1kB"), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    least = str(error.value).split("at least ")[1].split(",")[0]
    small = calibrated(settings(**few, memory=least), source, tmp_path / "small")
    assert small.bytes_read is not None and small.bytes_read > 2 * expert_bytes(source)
    for name in ("plenty", "small"):
        assert_same_gates(tmp_path / "resident", tmp_path / name)


def test_fewer_slots_than_a_block_has_experts(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source = settings(), sources["olmoe"]
    run.engine.tier = Tier.dram
    monkeypatch.setattr(through_engine, "room_for", lambda *_: memory_budget.Room(2, 5))
    found = calibrated(run, source, tmp_path / "streamed")
    assert found.bytes_read is not None and found.bytes_read > 2 * expert_bytes(source)
    calibrated(in_memory(run), source, tmp_path / "resident")
    assert_same_gates(tmp_path / "resident", tmp_path / "streamed")


@pytest.mark.parametrize("model", ["switch", "olmoe"])
def test_the_models_own_answers(model: str, sources: dict[str, Path], tmp_path: Path) -> None:
    run, source = settings(data=CalibrationData.generations, examples=9), sources[model]
    resident = calibrated(in_memory(run), source, tmp_path / "resident")
    found = calibrated(run, source, tmp_path / "streamed")
    assert_same_gates(tmp_path / "resident", tmp_path / "streamed")
    assert found.num_examples == resident.num_examples == 9 and found.bytes_read

    whole, objective = load_resident(source), SEQ2SEQ if model == "switch" else FAMILY.objective
    collate = Collator(word_tokenizer(), 10, 4, objective)
    prompts = collate.rows([Example(str(i), f"w{i} w3 w{i + 9}", "w1", ("w1",)) for i in range(3)])
    [rows] = answered_rows(prompts, whole, whole.generate, collate, run.calibration)
    for source_ids, answer, _ in rows:
        ids = torch.tensor([list(source_ids)])
        logits = [whole(**forced(model, ids, list(answer[:n]))).logits[0, -1] for n in range(len(answer))]
        assert [int(row.argmax()) for row in logits] == list(answer) and 1 <= len(answer) <= 4


def forced(model: str, ids: Tensor, answer: list[int]) -> dict[str, Tensor]:
    if model == "switch":
        return {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, *answer]])}
    return {"input_ids": torch.cat([ids, torch.tensor([answer], dtype=torch.long)], dim=1)}


def test_a_text_file(sources: dict[str, Path], tmp_path: Path) -> None:
    tokenizer, objective = word_tokenizer(), FAMILY.objective
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[i * i % 60] for i in range(300)))
    run = settings(data=CalibrationData.text, text=str(file), tokens=140)
    rows = text_rows(file, Collator(tokenizer, 10, 4, objective), run.calibration, 0)
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + 14] for start in range(0, 294, 14)]
    assert len(rows) == 10 and all([*row.source, *row.target] in windows for row in rows)
    assert len({tuple(row.source) for row in rows}) > 3
    closed = text_rows(file, Collator(tokenizer, 10, 4, SEQ2SEQ), run.calibration, 0)
    assert all(len(row.source) == 10 and row.source[-1] == 1 and len(row.target) == 4 for row in closed)

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run.model.tokenizer = str(tmp_path / "tokenizer")
    _, found = calibrate_source(run, str(sources["olmoe"]), tmp_path / "out")
    assert found.num_examples == 10 and found.tokens["decoder"] == (112, 28) and found.bytes_read
    account = json.loads((tmp_path / "out" / MANIFEST).read_text())["calibration"]
    assert account["task"] is None and account["settings"]["text"] == str(file)
    file.write_text(" ".join(WORDS[:27]))
    with pytest.raises(UsageError, match=r"text.txt has 27 tokens, too few for 2 examples of 14: name a longer text"):
        text_rows(file, Collator(tokenizer, 10, 4, objective), run.calibration, 0)
    run.calibration.text = str(tmp_path)
    with pytest.raises(UsageError, match="cannot be read as UTF-8 text"):
        calibrate_source(run, str(sources["olmoe"]), tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_stays_as_it_is_served(
    dtype: torch.dtype, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the engine, states are those of the source's own dtype, or of float32 on a CPU that is slow in it."""
    monkeypatch.setattr(through_engine, "fast_dtype", lambda *_: dtype)
    model = OlmoeForCausalLM.from_pretrained(sources["olmoe"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    found = calibrated(settings(), tmp_path / "source", tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert found.bytes_read == expert_bytes(tmp_path / "source") > 0
    run = settings()
    ahead, source = (load_resident(tmp_path / name, dtype=dtype) for name in ("out", "source"))
    collate = Collator.for_task(run.task, word_tokenizer(), FAMILY.objective)
    batches = Batches.of(FirstWords().examples("train"), collate, run.calibration, run.seed)
    shares, tolerance = list(_agreement(ahead, source, batches)), 0.05 if dtype is torch.bfloat16 else 1e-6
    assert found.after["decoder"] == pytest.approx([sum(s) / len(s) for s in zip(*shares, strict=True)], abs=tolerance)


@torch.no_grad()
def _agreement(one: Any, other: Any, batches: Batches) -> Iterator[list[float]]:
    K = one.config.num_experts_per_tok
    for batch in batches.held_out:
        mask = batch.counted["decoder"]
        pair = [m(**batch.inputs, output_router_logits=True, use_cache=False).router_logits for m in (one, other)]
        for row, t in mask.nonzero().tolist():
            chosen = [[set(block[row, t].topk(K).indices.tolist()) for block in blocks] for blocks in pair]
            yield [len(a & b) / K for a, b in zip(*chosen, strict=True)]


def test_a_changed_config_begins_anew(tmp_path: Path) -> None:
    """The states that an interrupted calibration keeps were computed by the config as it was."""
    olmoe(tmp_path)

    def made_from(**settings: Any) -> dict[str, Any]:
        source = open_model(str(tmp_path))
        run = Run(calibration=CalibrationConfig(through=Through.engine, **settings))
        return through_engine._made_from(run, source, config_of(source.config), [], torch.float32)

    before = made_from()
    assert made_from() == before
    assert made_from(memory="4GB", batch_size=7) == before, "another speed alone"
    assert made_from(steps=3) != before
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts_per_tok": 2}))
    assert made_from() != before
