"""The layout holds: imports go downward and in no circle, stand at the top of a file, and files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "pregate"
MOST_LINES = 400

LEVELS = {
    **dict.fromkeys(("config", "overrides", "cli", "system", "tracking"), 0),
    "models": 1,
    **dict.fromkeys(("conversion", "tasks", "engine"), 2),
    **dict.fromkeys(("training", "measure"), 3),
    **dict.fromkeys(("train", "eval", "convert", "bench", "harness"), 4),
}
"""Of each package and each module beside the packages: it imports from its own level and from those below."""
PEERS = {"training", "measure"}
"""Of one level, and still neither imports the other."""

ENTRY_POINTS = {"train.py", "eval.py", "convert.py", "bench.py", "harness.py", "cli.py"}
"""They import inside functions, so that a typo in a setting is told before torch is loaded."""
HEAVY = {"wandb", "matplotlib", "triton", "peft", "submitit", "bitsandbytes"}
"""Optional packages, or slow ones that few commands need: imported where they are used."""
ENCODER_FILES = ("models/families/", "engine/device/steps/", "models/objectives.py")
"""Where the word may stand: what is particular to a family, or to models with two stacks."""


@cache
def trees() -> dict[str, ast.Module]:
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in sorted(ROOT.rglob("*.py"))}


def imported(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import below `node`; `from package import module` names the module."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from ((found.lineno, name.name) for name in found.names)
        elif isinstance(found, ast.ImportFrom) and found.module:
            for name in found.names:
                inner = f"{found.module}.{name.name}"
                yield found.lineno, inner if file_of(inner) else found.module


@cache
def file_of(module: str) -> str | None:
    """The file of one of our modules."""
    if module.partition(".")[0] != "pregate":
        return None
    path = "/".join(module.split(".")[1:])
    return next((name for name in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if (ROOT / name).is_file()), None)


def test_imports_go_downward() -> None:
    for file, tree in trees().items():
        here = file.partition("/")[0].removesuffix(".py")
        for line, module in imported(tree):
            there = module.split(".")[1] if "." in module and file_of(module) else here
            if here != "__init__":
                assert LEVELS[there] <= LEVELS[here], f"{file}:{line} imports {module} of a level above"
                assert {here, there} != PEERS, f"{file}:{line} imports {module} of a package beside it"


def test_imports_make_no_circle() -> None:
    """Those inside functions count as well: without that they could not stand at the top."""
    edges = {(file, target) for file, tree in trees().items() for _, m in imported(tree) if (target := file_of(m))}
    # the package's own __init__ gives what it exports by name, once it is asked for
    edges = {(file, target) for file, target in edges if "__init__.py" not in (file, target)}
    graph: dict[str, set[str]] = {}
    for file, target in edges:
        graph.setdefault(file, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"an import circle: {' <- '.join(error.args[1])}") from None


def test_imports_stand_at_the_top() -> None:
    found = {
        (file, package)
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if file not in ENTRY_POINTS and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for _, module in imported(node)
        if (package := module if file_of(module) else module.partition(".")[0]) not in HEAVY
    }
    assert not found


def test_files_stay_short() -> None:
    found = {file for file in trees() if (ROOT / file).read_text().count("\n") > MOST_LINES}
    assert not found


def test_only_a_familys_own_files_speak_of_encoders() -> None:
    found = {
        file
        for file in trees()
        if not file.startswith(ENCODER_FILES) and "encoder" in (ROOT / file).read_text().lower()
    }
    assert not found
