"""Where the rows of a split lie: the generated set, named files, a directory of parquet files, or the hub.

The first source that is set wins: `task.generated`, `task.files`, `data.root`, `task.hub`. Knows paths and settings;
reads no row.
"""

from __future__ import annotations

import glob
from pathlib import Path

from pregate.config import TaskConfig, UsageError
from pregate.tasks.generated import check_generated

TABLES = (".csv", ".tsv")
SUFFIXES = (".parquet", *TABLES, ".json", ".jsonl")
OTHER_SPLIT = "choose another split with task.train_split or task.eval_split"


def key_of(task: TaskConfig, section: str, name: str) -> str:
    """The setting `name` of `task.files` or `task.columns` as the command line takes it: a new one needs a plus."""
    return f"{'' if name in getattr(task, section) else '+'}task.{section}.{name}"


def check_source(task: TaskConfig, data_root: str | None) -> None:
    """Refuse a task whose rows cannot come from anywhere, without reading one. Raises `UsageError`."""
    tables = False
    if task.generated is not None:
        check_generated(task.generated)
    elif named_files(task):
        found = [path for split, pattern in named_files(task).items() for path in _matches(task, split, pattern)]
        tables = any(path.suffix in TABLES for path in found)
    elif data_root is not None:
        _task_directory(task, data_root)
    elif not task.hub:
        raise UsageError(
            f"Task {task.name!r} has no source of data: set task.files.train=FILE and task.files.validation=FILE, "
            "data.root=DIR, or task.hub=ID."
        )
    if task.header and not tables:
        raise UsageError(
            f"task.header names the columns of csv and tsv files, of which task {task.name!r} reads none: leave it out."
        )


def named_files(task: TaskConfig) -> dict[str, str]:
    """`task.files` without the splits that are left null."""
    return {split: path for split, path in task.files.items() if path}


def files_of(task: TaskConfig, data_root: str | None, split: str) -> list[Path] | None:
    """The files of a split in order; None where the rows come from the hub. Raises `UsageError` for missing ones."""
    named = named_files(task)
    if named and split not in named:
        raise UsageError(
            f"Task {task.name!r} has no file for split {split!r} (task.files names {', '.join(sorted(named))}): "
            f"set {key_of(task, 'files', split)}=FILE, or {OTHER_SPLIT}."
        )
    if named:
        return _matches(task, split, named[split])
    return None if data_root is None else _shards(task, _task_directory(task, data_root), split)


def _matches(task: TaskConfig, split: str, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())  # noqa: PTH207
    if not found:
        raise UsageError(
            f"task.files.{split}={pattern} does not exist: give task {task.name!r} the path of a file "
            f"({', '.join(SUFFIXES)}), or a pattern such as 'DIR/{split}-*.parquet'."
        )
    wrong = [p for p in found if p.suffix not in SUFFIXES]
    if wrong:
        raise UsageError(f"{wrong[0]} cannot be read as data: use a file ending in {', '.join(SUFFIXES)}.")
    return found


def _shards(task: TaskConfig, directory: Path, split: str) -> list[Path]:
    single = directory / f"{split}.parquet"
    shards = [single] if single.is_file() else sorted(directory.glob(f"{glob.escape(split)}-*.parquet"))
    if not shards:
        there = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise UsageError(
            f"Task {task.name!r} finds no {split}.parquet or {split}-*.parquet in {directory}, which holds {there}: "
            f"add the file, or {OTHER_SPLIT}."
        )
    return shards


def _task_directory(task: TaskConfig, data_root: str) -> Path:
    root = Path(data_root).expanduser()
    splits = dict.fromkeys((task.train_split, task.eval_split))
    elsewhere = "set " + " and ".join(f"{key_of(task, 'files', split)}=FILE" for split in splits)
    elsewhere += f", or data.root=null to load {task.hub} from the hub" if task.hub else ""
    if not root.is_dir():
        raise UsageError(
            f"data.root={data_root} is not a directory: point data.root (or PREGATE_DATA) at the directory that "
            f"holds {task.name}/, or {elsewhere}."
        )
    if not (root / task.name).is_dir():
        names = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise UsageError(
            f"data.root={data_root} holds no directory {task.name!r} (directories there: {names}): "
            f"add it, or {elsewhere}."
        )
    return root / task.name
