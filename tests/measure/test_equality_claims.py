"""What is claimed of equality: logits finite, those of the resident model, and something moved. Equal tokens are not
enough."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate import bench as bench_command
from pregate import eval as eval_command
from pregate.config import GeneratedConfig, Policy, Run, UsageError
from pregate.engine.engine import OffloadEngine
from pregate.measure import evaluation, servers
from pregate.measure.bench import engines, transfer_speed
from pregate.measure.bench import run as bench
from pregate.measure.bench.table import bench_tables
from pregate.measure.equality import check_moved, compare_logits, tolerance
from pregate.measure.equality_words import equality, equality_statement
from pregate.measure.policy_latency import BenchRequest, resident_answers
from pregate.measure.report.evaluation_tables import engine_statement
from pregate.models.finite import FiniteLogits
from pregate.models.loading import load_resident
from pregate.tasks.generated import generated_tokenizer
from tests.measure.bench.conftest import quick_collections
from tests.measure.bench.test_bench_run import rows_of, tiny_run
from tests.measure.test_eval_device import ROWS, run_of
from tests.tiny import batch, pregated_model

__all__ = ["quick_collections"]
POLICIES = [str(policy) for policy in Policy]
DRIVES = ["host", "device"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short probes and no plots."""
    monkeypatch.setattr(transfer_speed, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(bench, "plot_bench", lambda *_: {})
    monkeypatch.setattr(engines, "is_predictable", lambda _: False)
    for name in ("plot_engine", "plot_agreement", "plot_timeline"):
        monkeypatch.setattr(evaluation, name, lambda *_: False)


# --- numbers worked out by hand -------------------------------------------------------------------------------------


def test_logits_are_compared_by_norm_and_told_by_their_largest_difference() -> None:
    expected = [torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 12.0]]])]  # norm 13
    logits = [expected[0] + torch.tensor([0.0, 0.13]), expected[1].clone()]
    found = compare_logits(logits, expected, 0.0101)
    assert found == {
        "logits_finite": True,
        "logits_max_diff": pytest.approx(0.13, rel=1e-5),
        "logits_equal_resident": True,
    }
    assert compare_logits(logits, expected, 0.0099)["logits_equal_resident"] is False
    assert "logits_equal_resident" not in compare_logits(logits, expected, None)
    assert compare_logits(expected, None) == {"logits_finite": True}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_equals_nothing(bad: float) -> None:
    """Not even the same NaN of the resident model."""
    broken = [torch.tensor([[[1.0, bad]]])]
    for expected in ([torch.ones(1, 1, 2)], broken):
        assert compare_logits(broken, expected, 1.0) == {"logits_finite": False, "logits_equal_resident": False}
    assert compare_logits([torch.ones(1, 1, 2)], broken, 1.0) == {
        "logits_finite": True,
        "logits_equal_resident": False,
    }
    noted = FiniteLogits()
    for step in range(3):
        logits = torch.full((3, 1, 4), 3e38)  # sums that overflow float32 are no infinity
        logits[1, 0, step] = bad if step == 1 else 0.0
        noted.note(logits)
    assert noted.rows_not_finite() == [1]
    assert noted.rows_not_finite() == []


def test_the_tolerance_is_the_coarsest_dtypes() -> None:
    assert tolerance({torch.float32, torch.bfloat16}) == tolerance([torch.bfloat16]) > tolerance([torch.float16])
    assert tolerance([torch.float16]) > tolerance([torch.float32]) > 0


def test_where_experts_should_move_some_must() -> None:
    for policy in ("on_demand", "prefetch_all", "pre_gated"):
        check_moved(policy, 8192)
        with pytest.raises(RuntimeError, match=f"No expert has moved with policy {policy}"):
            check_moved(policy, 0)
    check_moved("gpu_only", 0)


def test_an_evaluation_in_which_nothing_moved_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything in the cache the last pass moves nothing, and that is right: the first one did."""
    model = pregated_model(2, 1)
    model.save_pretrained(tmp_path)
    request = BenchRequest([batch(1, size=1, padded=False)["input_ids"]], new_tokens=3, repeats=2)

    def measured() -> dict[str, Any]:
        def opened() -> OffloadEngine:
            return OffloadEngine.open(tmp_path, device_budget="100%", cache="lru")  # type: ignore[arg-type]

        return evaluation.measure_policy(opened, request, torch.device("cpu"), resident_answers(model, request))[0]

    assert measured()["bytes_moved"] == 0 and measured()["tokens_equal_resident"] is True
    count = OffloadEngine.reset_counters
    monkeypatch.setattr(OffloadEngine, "generate", lambda self, **o: (model.generate(**o), count(self))[0])
    with pytest.raises(RuntimeError, match="No expert has moved"):
        measured()


# --- models that give no numbers ------------------------------------------------------------------------------------


def all_nan(model: Any) -> None:
    model.decoder.final_layer_norm.weight.data.fill_(torch.nan)


def one_expert(model: Any) -> None:
    """Of a block of the decoder: most examples meet it, in some step."""
    experts = next(b.module.experts for b in model.moe_blocks() if b.stack == "decoder" and b.index == 1)
    experts["expert_2"].wo.weight.data[3, 5] = torch.nan


def overflow(model: Any) -> None:
    """In float16: weights that it holds, and products of them that it does not."""
    for block in model.moe_blocks():
        for expert in block.module.experts.values():
            expert.wi.weight.data.sign_().mul_(6e4)


@pytest.fixture(scope="module", params=[all_nan, one_expert, overflow], ids=lambda damage: damage.__name__)
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("damaged")
    model = pregated_model(0, 1, vocab_size=512)
    if request.param is overflow:
        model = model.half()
    request.param(model)
    assert all(p.isfinite().all() for p in model.parameters()) == (request.param is overflow)
    model.save_pretrained(directory)
    generated_tokenizer(GeneratedConfig(train=200, validation=20)).save_pretrained(directory)
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return directory, model


def evaluation_run(directory: Path, output: Path, *overrides: str) -> Run:
    overrides = ("reference=null", "engine.bench_prompts=1", "engine.bench_repeats=1", "eval.report=false", *overrides)
    return run_of(directory, output, *overrides)


@pytest.mark.parametrize(
    "options", [["engine.drive=host"], ["engine.drive=host", "eval.num_beams=2"], ["engine.drive=device"]]
)
def test_an_evaluation_names_the_example(damaged: tuple[Path, Any], tmp_path: Path, options: list[str]) -> None:
    directory, model = damaged
    run = evaluation_run(directory, tmp_path / "out", *options)
    said = (
        rf"^{directory} cannot be scored: its logits for example '(\d)' are NaN or infinite \(policy pre_gated\): check"
    )
    with pytest.raises(UsageError, match=said) as refused:
        eval_command.main(run)
    assert "\n" not in str(refused.value) and "float16" in str(refused.value)
    assert not (tmp_path / "out" / "eval.json").exists()
    if "eval.num_beams=2" in options:
        return
    # that example it is: the resident model generates from it what is not finite
    number = int(str(refused.value).partition("example '")[2][0])
    prepared = evaluation.prepare(run, str(directory))
    inputs = prepared.collate([prepared.examples[number]])
    found = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert not torch.stack(found.logits).isfinite().all()


def test_an_evaluation_refuses_a_policy_that_gives_no_numbers(
    damaged: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the predictions had passed; also where the whole model does not fit to be compared with."""
    directory, _ = damaged
    fine = evaluation.Subject(str(directory), [""] * len(ROWS), None, {})  # type: ignore[arg-type]
    monkeypatch.setattr(evaluation, "assess", lambda *_: fine)
    for drive, resident in [("host", True), ("host", False), ("device", False)]:
        if not resident:
            monkeypatch.setattr(evaluation, "_expected", lambda *_: None)
        options = [f"engine.drive={drive}", "engine.policies=[on_demand]", "engine.bench_prompts=6"]
        run = evaluation_run(directory, tmp_path / "out", *options)
        how = "as a whole in memory" if resident else "served with policy on_demand"
        with pytest.raises(
            UsageError, match=rf"^The logits of {directory}, {how}, are NaN or infinite: check its weig"
        ):
            eval_command.main(run)


@pytest.mark.parametrize(("drive", "baselines"), [("host", "resident"), ("host", ""), ("device", "")])
def test_a_benchmark_says_so_in_the_row_and_fails(
    damaged: tuple[Path, Any], tmp_path: Path, drive: str, baselines: str
) -> None:
    directory, _ = damaged
    run = tiny_run(
        tmp_path / "out",
        f"checkpoint={directory}",
        f"bench.drives=[{drive}]",
        "bench.tiers=[dram]",
        f"bench.baselines=[{baselines}]",
        "engine.policies=[on_demand,pre_gated]",
        "bench.batches=[4]",
        "bench.new_tokens=6",
        dtype="auto",
    )
    said = (
        "the logits of the whole model in memory are NaN" if baselines else r"The logits of 2 of 2 rows are NaN or inf"
    )
    for overrides in ((), ("resume=true",)):  # and never a success afterwards
        with pytest.raises(UsageError, match=said) as refused:
            bench_command.main(tiny_run(tmp_path / "out", *run.overrides[7:], *overrides))
        assert "\n" not in str(refused.value)
    rows = rows_of(tmp_path / "out")
    assert [row["policy"] for row in rows] == (["resident"] if baselines else ["on_demand", "pre_gated"])
    for row in rows:
        assert row["logits_finite"] is False and "tokens_equal_resident" not in row
    shown = (tmp_path / "out" / "bench.md").read_text()
    assert f"Logits are NaN or infinite in {len(rows)} of {len(rows)} rows" in shown and "**NaN**" in shown
    assert "equal the whole model's in" not in shown


@pytest.mark.parametrize("drive", DRIVES)
def test_a_row_whose_logits_break_is_not_equal(tmp_path: Path, drive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model's are fine, and so are the tokens: the engine's own logits are not. Other rows are measured."""
    name = "forced_logits" if drive == "host" else "stepped_logits"
    whole = getattr(servers, name)
    broken = [True, False] if drive == "device" else [False, True, False]  # the whole model comes first

    def logits(*args: Any, **kwargs: Any) -> Tensor:
        found = whole(*args, **kwargs)
        return found.masked_fill(torch.arange(found.shape[-1]) == 3, torch.nan) if broken.pop(0) else found

    monkeypatch.setattr(servers, name, logits)
    run = tiny_run(tmp_path, f"bench.drives=[{drive}]", "bench.tiers=[dram]", "engine.policies=[on_demand,pre_gated]")
    with pytest.raises(
        UsageError, match=r"The logits of 1 of 3 rows are NaN or infinite, first of tiny dram on_demand"
    ):
        bench_command.main(run)
    resident, first, second = rows_of(tmp_path)
    assert resident["logits_finite"] is second["logits_finite"] is second["tokens_equal_resident"] is True
    assert second["logits_equal_resident"] is True and second["logits_max_diff"] < 1e-4
    assert first["logits_finite"] is first["tokens_equal_resident"] is first["logits_equal_resident"] is False
    assert "logits_max_diff" not in first
    assert second["bytes_moved"] > 0


# --- wrong experts, right tokens ------------------------------------------------------------------------------------


def stale(model: Any) -> Any:
    """As if a pack of earlier weights were served: other experts in one block of the decoder, so little other that the
    tokens stay."""
    other = copy.deepcopy(model)
    experts = next(b.module.experts for b in other.moe_blocks() if b.stack == "decoder" and b.index == 2)
    for expert in experts.values():
        expert.wo.weight.data.mul_(1.15)
    return other


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same with experts that went stale."""
    root = tmp_path_factory.mktemp("two")
    model = pregated_model(3, 1, vocab_size=512)
    for name, each in (("now", model), ("stale", stale(model))):
        each.save_pretrained(root / name)
        generated_tokenizer(GeneratedConfig(train=200, validation=20)).save_pretrained(root / name)
    (root / "now" / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return root / "now", root / "stale"


@pytest.mark.slow
@pytest.mark.parametrize("drive", DRIVES)
def test_an_evaluation_notices_stale_experts_by_their_logits(
    two: tuple[Path, Path], tmp_path: Path, drive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, old = two
    run = evaluation_run(now, tmp_path / "fine", f"engine.drive={drive}")
    eval_command.main(run)
    fine = json.loads((tmp_path / "fine" / "eval.json").read_text())
    assert list(fine["engine"]) == POLICIES
    for record in fine["engine"].values():
        assert record["logits_finite"] is record["logits_equal_resident"] is record["tokens_equal_resident"] is True
        assert record["logits_max_diff"] < 1e-4 and equality(record) == "yes"
    told = engine_statement(fine)
    assert told.startswith("Tokens equal the whole model's in 4 of 4 policies compared. Logits differ by at most ")

    opened = evaluation.open_engine
    monkeypatch.setattr(evaluation, "open_engine", lambda of, _, *rest, **k: opened(of, str(old), *rest, **k))
    run = evaluation_run(now, tmp_path / "out", f"engine.drive={drive}", "eval.report=true")
    eval_command.main(run)
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    by_hand = largest_difference(run, load_resident(now), load_resident(old))
    assert by_hand > 0.01
    for policy, record in found["engine"].items():
        assert record["tokens_equal_resident"] is True, "the tokens tell something, so the test says nothing"
        assert record["logits_equal_resident"] is False and record["logits_finite"] is True
        assert record["logits_max_diff"] == pytest.approx(by_hand, rel=1e-3), policy
        assert equality(record) == "**logits NO**"
    assert engine_statement(found) == (
        "**Logits differ from the whole model's in 4 of 4 policies: GPU only, On demand, Prefetch all, Pre-gated.** "
        f"Logits differ by at most {by_hand:.2g}."
    )
    assert "logits NO" in (tmp_path / "out" / "report.html").read_text()


def largest_difference(run: Run, now: Any, old: Any) -> float:
    """Of logits for the tokens that `now` generates from the first example."""
    prepared = evaluation.prepare(run, str(run.checkpoint))
    prompt = prepared.collate([prepared.examples[0]])["input_ids"]
    with torch.inference_mode():
        tokens = now.generate(input_ids=prompt, min_new_tokens=5, max_new_tokens=5, do_sample=False)
        both = [model(input_ids=prompt, decoder_input_ids=tokens[:, :-1]).logits for model in (now, old)]
    return float((both[0] - both[1]).abs().max())


@pytest.mark.parametrize("drive", DRIVES)
def test_a_benchmark_notices_stale_experts_by_their_logits(
    two: tuple[Path, Path], tmp_path: Path, drive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, old = two
    opened = servers.OffloadEngine.open if drive == "host" else servers.DeviceEngine.open
    weights = load_resident(old).state_dict()

    def open_stale(source: Any, **options: Any) -> Any:
        engine = opened(source, **options)
        store = options["store"]
        for key in engine.family.keys():  # noqa: SIM118 - not a mapping
            store.layout.encode([weights[name] for name in engine.family.tensor_names(key)], store.slab(key))
        return engine

    module = servers.OffloadEngine if drive == "host" else servers.DeviceEngine
    monkeypatch.setattr(module, "open", staticmethod(open_stale))
    run = tiny_run(
        tmp_path,
        f"checkpoint={now}",
        f"bench.drives=[{drive}]",
        "bench.tiers=[dram]",
        "bench.new_tokens=2",
        "bench.slow_new_tokens=2",
        "bench.repeats=1",
        "engine.policies=[on_demand,pre_gated]",
    )
    bench_command.main(run)
    rows = rows_of(tmp_path)
    for row in rows[1:]:
        assert row["tokens_equal_resident"] is True, "the tokens tell something, so the test says nothing"
        assert row["logits_equal_resident"] is False and row["logits_finite"] is True
        assert row["logits_max_diff"] > 0.01 and row["bytes_moved"] > 0
    assert equality_statement(rows) == "**Logits differ from the whole model's in 2 of 2 rows: on_demand, pre_gated.**"
    (table,) = bench_tables(rows)
    column = table.headers.index("tokens equal")
    assert sorted(cells[column] for cells in table.rows) == ["**logits NO**", "**logits NO**", "–"]
