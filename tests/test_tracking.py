import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pregate import tracking
from pregate.config import Run, TrackingConfig, UsageError, WandbMode
from pregate.config import Tracker as TrackerKind


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def jsonl_run() -> Run:
    return Run(tracking=TrackingConfig(kind=TrackerKind.jsonl))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class FakeRun:
    """Stands in for a W&B run: remembers what it was sent, and fails from the `fail_at`-th log on."""

    def __init__(self, folder, fail_at=None):
        self.id, self.name, self.offline, self.dir = "abc", "a", False, str(folder / "wandb" / "r" / "files")
        self.logged, self.defined, self.exit_code, self.summary = [], {}, None, {}
        self.fail_at = fail_at

    def log(self, values):
        if self.fail_at is not None and len(self.logged) >= self.fail_at:
            raise ConnectionError("the server\nwent away")
        self.logged.append(values)

    def define_metric(self, name, step_metric=None, hidden=None):
        self.defined[name] = step_metric

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake_wandb(monkeypatch):
    """A wandb module whose `init` returns what the test puts into `starts`, an exception being raised."""
    calls, starts = [], []

    def init(**kwargs):
        calls.append(kwargs)
        start = starts.pop(0)
        if isinstance(start, Exception):
            raise start
        return start

    module = SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs, calls=calls, starts=starts)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_jsonl_has_step_time_and_metrics(tmp_path):
    with tracking.open_tracker(jsonl_run(), tmp_path) as tracker:
        tracker.log({"train/loss": 2.5, "train/bad": math.nan}, 3)
        assert records(tmp_path)[0]["train/loss"] == 2.5, "a line must be on disk before the next one"
        tracker.log({"eval/f1": 50.0}, 4)
        tracker.image("eval/plot", tmp_path / "absent.png")
    first, second = records(tmp_path)
    assert (first["step"], first["train/bad"]) == (3, None)
    assert second["eval/f1"] == 50.0
    assert 0 <= first["time"] <= second["time"] < 1e6, "since the start, not since 1970"
    assert not (tmp_path / "wandb").exists()


def test_resume_mends_a_torn_line_and_continues_the_clock(tmp_path):
    whole = '{"step": 1, "time": 100.0, "train/loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "ti')
    with tracking.open_tracker(jsonl_run(), tmp_path) as tracker:
        tracker.log({"train/loss": 0.5}, 2)
    first, second = records(tmp_path)
    assert first == json.loads(whole)
    assert second["step"] == 2
    assert 100.0 <= second["time"] < 1e6


def test_what_is_logged_again_is_taken_back_first(tmp_path):
    logged = [("source", 4), ("train", 2), ("train", 3), ("train/eval", 3), ("train", 4), ("eval", 0)]
    run = jsonl_run()
    with tracking.open_tracker(run, tmp_path) as tracker:
        for name, step in logged:
            tracker.log({f"{name}/loss": 1.0}, step)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + bytes(64) + b'{"step": 5}\n')  # zeros that a power cut left
    with tracking.open_tracker(run, tmp_path) as tracker:
        tracker.rewind(2, "train")
        tracker.log({"train/loss": 0.5}, 3)
        tracker.rewind(-1, "eval")
        tracker.log({"eval/loss": 0.5}, 0)
    found = [(*[key for key in record if "loss" in key], record["step"]) for record in records(tmp_path)]
    assert found == [("source/loss", 4), ("train/loss", 2), ("train/loss", 3), ("eval/loss", 0)]
    assert records(tmp_path)[2]["train/loss"] == records(tmp_path)[3]["eval/loss"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_told(fake_wandb, tmp_path):
    run = FakeRun(tmp_path)
    tracker = tracking.Tracker(Path("/dev/full").open("w"), run)  # noqa: SIM115
    with (
        pytest.raises(UsageError, match=r"/dev/full cannot be written \(No space left on device\): make room"),
        tracker,
    ):
        tracker.log({"train/loss": 0.5}, 2)
    assert run.exit_code == 1 and run.logged == []


@pytest.mark.parametrize("content", ["", "{torn", "not json\n", '{"step": 1}\n'])
def test_a_strange_file_does_not_stop_a_run(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with tracking.open_tracker(jsonl_run(), tmp_path) as tracker:
        tracker.log({"train/loss": 0.5}, 2)
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 2


def test_only_the_main_process_records(tmp_path, fake_wandb):
    with tracking.open_tracker(Run(), tmp_path / "run", is_main=False) as tracker:
        tracker.log({"train/loss": 1.0}, 0)
        tracker.table("eval/t", ["a"], [[1]])
    assert not (tmp_path / "run").exists()
    assert fake_wandb.calls == []


def test_offline_run_holds_what_was_logged_and_resumes_as_the_same_run(tmp_path, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my runs"
    run = Run(name="r 1", tracking=TrackingConfig(project="p", group="g", tags=["t"]))
    Image.new("RGB", (2, 2)).save(tmp_path / "plot.png")
    (tmp_path / "report.html").write_text("<!doctype html><p>report</p>")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "checkpoint" / "experts").mkdir()
    (tmp_path / "checkpoint" / "experts" / "slabs.bin").write_text("packed again by an engine")
    with tracking.open_tracker(run, folder) as tracker:
        tracker.log({"train/loss": 1.0, "source/loss": 2.0}, 7)
        tracker.table("eval/engine_table", ["policy", "tpot_ms"], [["pre_gated", 1.5], ["gpu_only", None]])
        tracker.image("eval/plot", tmp_path / "plot.png")
        tracker.html("eval/report", tmp_path / "report.html")
        tracker.summary({"scores": {"pre_gated": {"em": 91.25}}})
        tracker.artifact(tmp_path / "checkpoint")
    wandb.teardown()  # as at the end of a process: its writer runs beside us and is waited for here
    (recording,) = (folder / "wandb").glob("offline-run-*")
    (binary,) = recording.glob("*.wandb")
    data = binary.read_bytes()
    for expected in ("train/loss", "train/step", "source/*", "source/step", "scores/pre_gated/em", "lookahead", "r-1-"):
        assert expected.encode() in data, expected
    assert b"slabs.bin" not in data
    media = {path.suffix for path in (recording / "files" / "media").rglob("*") if path.is_file()}
    assert media == {".png", ".html", ".json"}
    notices = capsys.readouterr().err
    assert f"wandb sync 'my runs/wandb/{recording.name}'" in notices
    assert wandb.run is None

    stored = json.loads((folder / "tracking.json").read_text())["wandb_run_id"]
    assert recording.name.endswith(stored)
    assert tracking._run_id(folder) == stored


def test_every_group_gets_its_own_step_axis_once(tmp_path, fake_wandb):
    run = FakeRun(tmp_path)
    tracker = tracking.Tracker((tmp_path / "m").open("w"), run)
    tracker.log({"source/loss": 1.0, "source/eval/em": 2.0}, 5)
    run.defined.clear()
    tracker.log({"source/loss": 0.5, "train/loss": 3.0}, 6)
    tracker.close()
    assert run.defined == {"train/step": None, "train/*": "train/step"}
    assert run.logged[0] == {"source/loss": 1.0, "source/eval/em": 2.0, "source/step": 5}
    assert run.logged[1] == {"source/loss": 0.5, "train/loss": 3.0, "source/step": 6, "train/step": 6}


def test_a_failing_mirror_is_said_once_and_jsonl_goes_on(tmp_path, fake_wandb, capsys):
    run = FakeRun(tmp_path, fail_at=1)
    fake_wandb.starts.append(run)
    with tracking.open_tracker(Run(), tmp_path) as tracker:
        for step in range(4):
            tracker.log({"train/loss": float(step)}, step)
    assert [r["step"] for r in records(tmp_path)] == [0, 1, 2, 3]
    assert run.exit_code == 1
    err = capsys.readouterr().err
    assert err.count("pregate:") == 1
    assert "the server went away" in err


def test_a_failed_run_is_marked_failed(tmp_path, fake_wandb):
    run = FakeRun(tmp_path)
    fake_wandb.starts.append(run)
    with pytest.raises(RuntimeError), tracking.open_tracker(Run(), tmp_path) as tracker:
        tracker.log({"train/loss": 1.0}, 0)
        raise RuntimeError("out of memory")
    assert run.exit_code == 1
    tracker.close()


def test_online_that_cannot_start_falls_back_to_offline(tmp_path, fake_wandb, capsys):
    fake_wandb.starts += [ConnectionError("no route"), FakeRun(tmp_path)]
    run = Run(tracking=TrackingConfig(mode=WandbMode.online))
    tracking.open_tracker(run, tmp_path).close()
    assert [call["mode"] for call in fake_wandb.calls] == ["online", "offline"]
    assert fake_wandb.calls[0]["id"] == fake_wandb.calls[1]["id"]
    assert "no route" in capsys.readouterr().err


def test_wandb_that_never_starts_leaves_jsonl(tmp_path, fake_wandb, capsys):
    fake_wandb.starts += [OSError("disk full")]
    with tracking.open_tracker(Run(), tmp_path) as tracker:
        tracker.log({"train/loss": 1.0}, 0)
    assert len(records(tmp_path)) == 1
    assert capsys.readouterr().err.count("pregate:") == 1


@pytest.mark.parametrize(
    ("asked", "environment", "login", "mode"),
    [
        (WandbMode.auto, None, False, "offline"),
        (WandbMode.auto, None, True, "online"),
        (WandbMode.online, None, False, "online"),
        (WandbMode.offline, None, True, "offline"),
        (WandbMode.online, "offline", True, "offline"),
        (WandbMode.offline, "online", False, "online"),
        (WandbMode.online, "dryrun", True, "offline"),
    ],
)
def test_mode(tmp_path, fake_wandb, monkeypatch, asked, environment, login, mode):
    fake_wandb.starts.append(FakeRun(tmp_path))
    monkeypatch.setattr(tracking, "has_login", lambda wandb: login)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    tracking.open_tracker(Run(tracking=TrackingConfig(mode=asked)), tmp_path).close()
    assert [call["mode"] for call in fake_wandb.calls] == [mode]


def test_wandb_disabled_by_the_user(tmp_path, fake_wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking.open_tracker(Run(), tmp_path).close()
    assert fake_wandb.calls == []
    assert capsys.readouterr().err == ""


def test_login_is_found_in_environment_and_netrc(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    assert not tracking.has_login(wandb)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert tracking.has_login(wandb)
    netrc.write_text("machine elsewhere.example\n  login user\n  password x\n")
    assert not tracking.has_login(wandb)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking.has_login(wandb)


def test_without_the_package_one_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tracking.open_tracker(Run(), tmp_path) as tracker:
        tracker.log({"train/loss": 1.0}, 0)
        tracker.summary({"em": 1.0})
    assert len(records(tmp_path)) == 1
    err = capsys.readouterr().err
    assert err.count("pregate:") == 1
    assert "pip install wandb" in err


def test_flatten():
    assert tracking.flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
