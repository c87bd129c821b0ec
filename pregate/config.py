"""The one typed schema of every entry point, and how a command line becomes a `Run`.

Knows Hydra and OmegaConf; knows nothing about torch, models or data. YAML is merged into these dataclasses
before any work starts, so a typo, a wrong type or an impossible combination ends in one sentence within the
first second. A `Run` is read-only by convention: nothing downstream writes to it.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UsageError(ValueError):
    """The user's input cannot work; the message is one sentence that says what to do instead."""


class Entry(StrEnum):
    own = "own"
    embedding = "embedding"


class Init(StrEnum):
    source = "source"
    random = "random"


class TaskKind(StrEnum):
    qa = "qa"
    summarization = "summarization"
    classification = "classification"


class Optimizer(StrEnum):
    adamw = "adamw"
    adafactor = "adafactor"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class ExpertPath(StrEnum):
    reference = "reference"
    grouped = "grouped"


class Policy(StrEnum):
    gpu_only = "gpu_only"
    on_demand = "on_demand"
    prefetch_all = "prefetch_all"
    pre_gated = "pre_gated"


class Tier(StrEnum):
    auto = "auto"
    dram = "dram"
    disk = "disk"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Tracker(StrEnum):
    wandb = "wandb"
    jsonl = "jsonl"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"


@dataclass
class ModelConfig:
    """Where the conventional model comes from: `source` (directory or hub id), or `geometry` trained from scratch."""

    name: str = "switch-base-8"
    source: str | None = None
    revision: str | None = None
    geometry: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


@dataclass
class PreGateConfig:
    """How routers are re-attached; `lookahead: 0` is the conventional model."""

    lookahead: int = 1
    stacks: list[str] = field(default_factory=lambda: ["encoder", "decoder"])
    entry: Entry = Entry.own
    init: Init = Init.source


@dataclass
class GeneratedConfig:
    """The generated reading-comprehension set of the quickstart (see `pregate.tasks.generated`)."""

    seed: int = 0
    train: int = 20000
    validation: int = 500
    facts: int = 5
    vocab_size: int = 512


@dataclass
class TaskConfig:
    """What is learned and scored. `columns` maps a record field to a column, with dots into structs."""

    name: str = "squad"
    kind: TaskKind = TaskKind.qa
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    files: dict[str, str | None] = field(default_factory=dict)
    generated: GeneratedConfig | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    columns: dict[str, str | None] = field(default_factory=dict)
    group_by: str | None = None
    prompt: str = "question: {question} context: {context}"
    labels: list[str] = field(default_factory=list)
    primary_metric: str = "em"
    max_source_tokens: int = 256
    max_target_tokens: int = 32


@dataclass
class DataConfig:
    root: str | None = None
    max_train_examples: int | None = None
    num_workers: int = 0


@dataclass
class TrainConfig:
    """One fine-tuning (or from-scratch) run. Batch sizes count sequences over all devices per optimizer step."""

    steps: int = 2048
    batch_sequences: int = 256
    micro_batch_tokens: int = 4096
    optimizer: Optimizer = Optimizer.adamw
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    precision: Precision = Precision.auto
    balance_loss: float = 1e-2
    z_loss: float = 1e-3
    dropout: float | None = None
    expert_path: ExpertPath = ExpertPath.grouped
    gradient_checkpointing: bool = False
    eval_every: int = 256
    eval_examples: int = 256
    save_every: int = 256
    log_every: int = 10


@dataclass
class EngineConfig:
    """How the offloaded engine serves. `device_budget` is bytes ("4GB"), a share of all experts ("25%") or null.

    `tier: auto` is page-locked host memory for a GPU, and the disk where the compute device is host memory itself.
    `cache`: leave used experts in their slots, least recently used first out; off, as in the paper.
    """

    policy: Policy = Policy.pre_gated
    policies: list[Policy] = field(default_factory=lambda: list(Policy))
    tier: Tier = Tier.auto
    device: Device = Device.auto
    device_budget: str | None = None
    pack_dir: str | None = None
    cache: bool = False
    io_threads: int = 2
    bench_prompts: int = 4
    bench_new_tokens: int = 16
    bench_repeats: int = 3


@dataclass
class EvalConfig:
    split: str | None = None
    examples: int | None = None
    batch_size: int = 16
    num_beams: int = 1
    max_new_tokens: int | None = None
    agreement_examples: int = 64
    bootstrap_samples: int = 2000
    report: bool = True


@dataclass
class TrackingConfig:
    kind: Tracker = Tracker.wandb
    mode: WandbMode = WandbMode.auto
    project: str = "pregate"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False


@dataclass
class Run:
    """Everything one command needs; built once by `entry_point`, never changed. `overrides`: the command line."""

    name: str = "run"
    run_dir: str = "runs/run"
    seed: int = 0
    resume: bool = False
    then_eval: bool = True
    source: str | None = None
    output: str | None = None
    checkpoint: str | None = None
    reference: str | None = None
    overrides: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    pregate: PreGateConfig = field(default_factory=PreGateConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    source_train: TrainConfig | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def config_dir() -> Path:
    """The directory of the YAML groups: inside the installed package, or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "configs", here.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UsageError("pregate finds no configs/ directory: reinstall the package.")


def register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run_schema", node=Run)


def compose_run(overrides: list[str]) -> Run:
    """Build a `Run` from `configs/` and command-line `overrides`, without Hydra's run directory or logging.

    Raises `UsageError` with one sentence for a misspelt key, a wrong type, an unknown group member or an
    impossible combination.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            cfg = compose("config", overrides=overrides)
            return validated(cfg, overrides)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(explain(error, overrides)) from error


def validated(cfg: Any, overrides: Sequence[str] = ()) -> Run:
    """Turn a composed OmegaConf node into a checked `Run`. Raises `UsageError`."""
    unknown = sorted(set(cfg) - {f.name for f in fields(Run)})
    if unknown:
        raise UsageError(f"There is no setting {unknown[0]!r}{_closest(unknown[0], _known_keys())}.")
    OmegaConf.update(cfg, "overrides", list(overrides))
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, Run), type(run)
    check_run(run)
    return run


def check_run(run: Run) -> None:
    """Refuse combinations that cannot work, before any work starts. Raises `UsageError`."""

    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise UsageError(sentence)

    gate = run.pregate
    need(
        0 <= gate.lookahead <= 3,
        f"pregate.lookahead={gate.lookahead} is outside 0 to 3: 0 is conventional, 1 the paper's choice.",
    )
    need(
        bool(gate.stacks) and set(gate.stacks) <= {"encoder", "decoder"} and len(set(gate.stacks)) == len(gate.stacks),
        f"pregate.stacks={list(gate.stacks)} must name encoder, decoder or both, each once.",
    )
    for label, train in (("train", run.train), ("source_train", run.source_train)):
        if train is None:
            continue
        for key in (
            "steps",
            "batch_sequences",
            "micro_batch_tokens",
            "eval_every",
            "save_every",
            "log_every",
        ):
            need(getattr(train, key) > 0, f"{label}.{key}={getattr(train, key)} must be at least 1.")
        need(train.learning_rate > 0, f"{label}.learning_rate={train.learning_rate} must be above 0.")
        need(
            0 <= train.warmup_steps <= train.steps,
            f"{label}.warmup_steps={train.warmup_steps} must lie between 0 and {label}.steps={train.steps}.",
        )
        need(
            train.dropout is None or 0 <= train.dropout < 1,
            f"{label}.dropout={train.dropout} must lie in [0, 1), or be null to keep the model's own.",
        )
    task = run.task
    need(task.max_source_tokens > 1, f"task.max_source_tokens={task.max_source_tokens} must be at least 2.")
    need(task.max_target_tokens > 1, f"task.max_target_tokens={task.max_target_tokens} must be at least 2.")
    need(
        task.kind is not TaskKind.classification or len(task.labels) >= 2,
        f"task {task.name!r} is a classification and needs task.labels=[first,second,…], one word a class.",
    )
    need(bool(run.engine.policies), "engine.policies is empty: name at least one of " + ", ".join(Policy) + ".")
    need(
        run.eval.examples is None or run.eval.examples > 0,
        f"eval.examples={run.eval.examples} must be at least 1, or null for the whole split.",
    )
    for key in ("batch_size", "num_beams"):
        need(getattr(run.eval, key) > 0, f"eval.{key}={getattr(run.eval, key)} must be at least 1.")


def to_dict(run: Run) -> dict[str, Any]:
    """The `Run` as plain JSON-able values, as written to `config.yaml` and sent to trackers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, StrEnum) else value

    return plain(asdict(run))


def save_run(run: Run, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(run))))


def _known_keys() -> list[str]:
    flat: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            flat.append(f"{prefix}{key}")
            child = OmegaConf.select(node, key) if not OmegaConf.is_missing(node, key) else None
            if OmegaConf.is_dict(child):
                walk(child, f"{prefix}{key}.")

    schema = OmegaConf.structured(Run(source_train=TrainConfig(), task=TaskConfig(generated=GeneratedConfig())))
    walk(schema, "")
    return flat


def _closest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def explain(error: BaseException, overrides: list[str]) -> str:
    """One sentence for whatever Hydra or OmegaConf raised, naming the key and the nearest right spelling."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException):
        text = " ".join(str(error).split())
        found = re.search(r"Could not find '([^']+)'", text)
        group, _, wanted = (found.group(1) if found else "").rpartition("/")
        folder = config_dir() / group
        names = sorted(p.stem for p in folder.glob("*.yaml")) if group and folder.is_dir() else []
        if names:
            return f"There is no {group} named {wanted!r}: choose one of {', '.join(names)}."
        groups = sorted(p.name for p in config_dir().iterdir() if p.is_dir())
        return f"There is no config {wanted!r}: the groups are {', '.join(groups)}."
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = " ".join(str(error).split())
    missing = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    full_key = getattr(cause, "full_key", None)
    if "not in" in text or "Could not override" in text or "not found" in text.lower():
        key = missing.group(1) if missing else str(full_key)
        key = key.lstrip("+")
        return f"There is no setting {key!r}{_closest(key, _known_keys())}."
    if cause is not None:
        reason = re.split(r"\s*full_key:", " ".join(str(cause).split()))[0]
        where = f"{full_key}: " if full_key else ""
        return f"{where}{reason}"
    return f"The command line {' '.join(overrides)!r} cannot be read: {text}"


def fail(message: str) -> None:
    """Print `message` as the last word of the command and exit with status 2."""
    print(f"pregate: {message}", file=sys.stderr)
    sys.exit(2)


HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--multirun", "-m")


def entry_point(work: Callable[[Run], None]) -> None:
    """Run `work` under Hydra: compose, validate, execute; a `UsageError` ends in one sentence and status 2.

    The plain case is composed once ahead of Hydra's own start so that its multi-line errors never reach the
    user; `--multirun`, `--help` and the like go straight to Hydra.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        arguments = sys.argv[1:]
        if not any(a.split("=")[0] in HYDRA_FLAGS for a in arguments):
            compose_run([a for a in arguments if not a.startswith("-")])
    except UsageError as error:
        fail(str(error))
    register_schema()

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def run_under_hydra(cfg: Any) -> None:
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                OmegaConf.update(cfg, "run_dir", HydraConfig.get().runtime.output_dir)
            work(validated(cfg, HydraConfig.get().overrides.task))
        except UsageError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            fail(str(error))

    run_under_hydra()
