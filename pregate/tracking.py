"""What a run reports: `metrics.jsonl` in the run directory, always, and Weights & Biases as a mirror of it.

Knows the JSONL file and the wandb client; knows nothing about models or tasks. A metric's name is a path whose
first part is its group: `train/loss`, `eval/f1`, `engine/pre_gated/tpot_ms`. Each group has its own step axis,
`train/step` and so on. A failure of wandb never ends a run: the first one is reported, and JSONL goes on.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pregate.config import Run, UsageError, WandbMode, to_dict
from pregate.config import Tracker as TrackerKind
from pregate.system.console import say
from pregate.system.durable import flush, flush_file, make_directory, read_object, to_jsonable, write_json, write_text
from pregate.system.machine import environment

METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "tracking.json"


class Tracker:
    """Receives what a run reports; a context manager that closes with the run, failed or not.

    `file` None discards everything (the processes that are not the main one). `wandb_run` None is JSONL alone.
    `log` writes to both; tables, images, pages, summaries and artifacts have no place in a JSONL file of metrics
    (the run directory holds them as files) and go to W&B only.
    """

    def __init__(self, file: TextIO | None = None, wandb_run: Any = None, started_s: float = 0.0) -> None:
        self._file = file
        self._wandb_run = wandb_run
        self._clock_zero = time.monotonic() - started_s
        self._groups: set[str] = set()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` (grouped names, numbers) at `step` of their groups' axes. NaN becomes null in JSONL."""
        if self._file is None:
            return
        seconds = round(time.monotonic() - self._clock_zero, 3)
        record = to_jsonable({"step": step, "time": seconds, **metrics})
        try:
            self._file.write(json.dumps(record) + "\n")  # one write a line: an interruption tears at most the last
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"{self._file.name} cannot be written ({error.strerror}): make room or mend the disk, and go on with "
                "the same command and resume=true."
            ) from error
        self._mirror(lambda run, wandb: run.log(self._with_axes(run, metrics, step)))

    def sync(self) -> None:
        """Return once what was logged is on the disk: a run that resumes from a later state does not log it again."""
        if self._file is not None:
            flush(self._file.fileno())

    def rewind(self, step: int, *groups: str) -> None:
        """Take back what the file holds of `groups` behind `step`, as it is about to be logged again, and lines that a
        power cut has spoilt. W&B keeps what it has: its repeated steps have equal values.
        """
        if self._file is None:
            return
        path = Path(self._file.name)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _stays(line, step, groups)]
        if len(kept) < len(lines):
            self._file.close()
            write_text(path, "".join(kept))
            self._file = path.open("a", encoding="utf-8")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table such as the engine's policies, one row a list in the order of `columns`; None is an empty cell."""
        self._mirror(
            lambda run, wandb: run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
        )

    def image(self, name: str, path: Path) -> None:
        """A PNG file."""
        self._mirror(lambda run, wandb: run.log({name: wandb.Image(str(path))}))

    def html(self, name: str, path: Path) -> None:
        """A self-contained page such as `report.html`."""
        self._mirror(lambda run, wandb: run.log({name: wandb.Html(str(path), inject=False)}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's final figures; nested dicts become paths, `{"scores": {"em": 1}}` is `scores/em`."""
        self._mirror(lambda run, wandb: run.summary.update(flatten(to_jsonable(dict(values)))))

    def artifact(self, directory: Path) -> None:
        """Upload a checkpoint directory as a model artifact named after the run. The caller asks `log_checkpoint`.

        Its files only: the folder of experts that an engine packs into a checkpoint repeats their weights.
        """

        def upload(run: Any, wandb: Any) -> None:
            name = re.sub(r"[^\w.-]+", "-", run.name or run.id)
            artifact = wandb.Artifact(f"{name}-checkpoint", type="model")
            for file in sorted(directory.iterdir()):
                if file.is_file():
                    artifact.add_file(str(file))
            run.log_artifact(artifact)

        self._mirror(upload)

    def close(self, failed: bool = False) -> None:
        """Finish both; an offline W&B run says where it lies and how to send it. Closing again does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                flush(file.fileno())
            finally:
                with suppress(OSError):  # the rest of a line that found no room, which `log` has reported
                    file.close()

        def finish(run: Any, wandb: Any) -> None:
            offline, folder = run.offline, Path(run.dir).parents[1]
            run.finish(exit_code=int(failed))
            if offline:
                parts = sorted(folder.glob(f"offline-run-*-{run.id}"))  # one more for each time the run was resumed
                where = " ".join(_shell_path(part) for part in parts)
                say(f"W&B recorded offline; to send the run: wandb sync {where}")

        self._mirror(finish)
        self._wandb_run = None

    def _with_axes(self, run: Any, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        groups = {name.partition("/")[0] for name in metrics if "/" in name}
        for group in sorted(groups - self._groups):
            run.define_metric(f"{group}/step", hidden=True)
            run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._groups |= groups
        return {**metrics, **{f"{group}/step": step for group in groups}}

    def _mirror(self, send: Callable[[Any, Any], Any]) -> None:
        """Do one thing at W&B; if it fails, say so once and go on without W&B."""
        if self._wandb_run is None:
            return
        import wandb

        try:
            send(self._wandb_run, wandb)
        except Exception as error:
            run, self._wandb_run = self._wandb_run, None
            say(f"W&B stopped ({_one_line(error)}); {METRICS_FILE} goes on.")
            try:
                run.finish(exit_code=1)
            except Exception:  # it has failed once and was reported
                return


def open_tracker(run: Run, run_dir: Path, is_main: bool = True) -> Tracker:
    """The tracker of `run`, writing to `run_dir`; only the main process records.

    Lines are appended, so that a resumed run, or its evaluation, continues the file, and its clock goes on from
    the last line. What a run logs again, `Tracker.rewind` takes back first, so that each step occurs once.
    """
    if not is_main:
        return Tracker()
    make_directory(run_dir)
    path = run_dir / METRICS_FILE
    started_s = _mend(path)
    wandb_run = _start_wandb(run, run_dir) if run.tracking.kind is TrackerKind.wandb else None
    file = path.open("a", encoding="utf-8")
    flush_file(run_dir)
    return Tracker(file, wandb_run, started_s)


def _mend(path: Path) -> float:
    """Drop a last line that an interruption tore, and return the last recorded time in seconds (0 if none)."""
    if not path.exists():
        return 0.0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return float(json.loads(whole.splitlines()[-1])["time"])
    except (IndexError, KeyError, TypeError, ValueError):  # empty, or a last line that is not ours
        return 0.0


def _stays(line: str, step: int, groups: Sequence[str]) -> bool:
    try:
        record = json.loads(line)
        behind = record["step"] > step and any(name.partition("/")[0] in groups for name in record)
    except (KeyError, TypeError, ValueError):  # zeros, where a power cut came ahead of the text
        return False
    return not behind


def _start_wandb(run: Run, run_dir: Path) -> Any:
    """A W&B run, or None if it is off, missing or refuses to start. Online falls back to offline."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in ("disabled", "false"):
        return None
    try:
        import wandb
    except ImportError:
        say(f"wandb is not installed, so metrics go to {METRICS_FILE} alone (pip install wandb, or tracking=jsonl).")
        return None
    if not mode:
        asked = run.tracking.mode
        mode = str(asked) if asked is not WandbMode.auto else ("online" if has_login(wandb) else "offline")
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    run_id, reason = _run_id(run_dir), ""
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            wandb_run = _init(wandb, run, run_dir, run_id, attempt)
        except Exception as error:
            reason = _one_line(error)
            continue
        if reason:
            say(f"W&B cannot start {mode} ({reason}), so it records offline.")
        return wandb_run
    say(f"W&B cannot start ({reason}), so metrics go to {METRICS_FILE} alone.")
    return None


def _init(wandb: Any, run: Run, run_dir: Path, run_id: str, mode: str) -> Any:
    tracking = run.tracking
    return wandb.init(
        mode=mode,
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=list(tracking.tags),
        name=run.name,
        dir=str(run_dir),
        id=run_id,
        resume="allow",
        config={**to_dict(run), "environment": environment()},
        # The progress bar redraws its line, which console capture would store thousands of times.
        settings=wandb.Settings(silent=True, console="off"),
    )


def has_login(wandb: Any) -> bool:
    """Whether wandb has credentials (environment or netrc) without asking the user or the network for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        try:
            from wandb.sdk.lib.wbauth import read_netrc_auth
        except ImportError:  # releases before 0.22 keep the same question elsewhere
            return bool(wandb.api.api_key)
        return bool(read_netrc_auth(host=wandb.setup().settings.base_url))
    except Exception:  # a netrc that cannot be used is no login
        return False


def _run_id(run_dir: Path) -> str:
    """The W&B id of this run directory: the stored one, so that a resumed run goes on, or a new one."""
    stored = (read_object(run_dir / RUN_ID_FILE) or {}).get("wandb_run_id")
    if isinstance(stored, str) and stored:
        return stored
    run_id = secrets.token_hex(4)
    write_json(run_dir / RUN_ID_FILE, {"wandb_run_id": run_id})
    return run_id


def flatten(values: Mapping[str, Any], prefix: str = "", separator: str = "/") -> dict[str, Any]:
    """Nested dicts as one dict whose keys are paths joined with `separator`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}{separator}", separator) if isinstance(value, Mapping) else {name: value}
    return flat


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:159]}…"


def _shell_path(path: Path) -> str:
    """`path` as the user types it: relative to the working directory if it lies below, quoted if need be."""
    path = path.resolve()
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
