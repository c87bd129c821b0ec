"""The settings of a task: where its records are, what a model reads of them, and what it learns."""

from __future__ import annotations

from dataclasses import dataclass, field

from pregate.config.choices import Learn, TaskKind
from pregate.config.validators import at_least, between, need, setting

OWN_TEMPLATE = "own"
"""The chat template that a tokenizer brings along."""


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
    """What is learned and scored. `columns` maps a record field to a column, with dots into structs.

    `header`: the names of the columns of csv and tsv files that have none in their first line.
    `noise_density` (share of tokens that are hidden) and `mean_span_tokens` are those of span corruption.

    These are of decoder-only models. `learn`: the answers (the target, and every turn of the assistant in a
    conversation), the last answer alone, or everything, the prompt included. `chat_template`: own (that of the
    tokenizer, if it has one), a file, or null for plain prompts. `separator` ends a plain prompt.
    """

    name: str = "squad"
    kind: TaskKind = TaskKind.qa
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    files: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(("train", "validation", "test")))
    header: list[str] = field(default_factory=list)
    generated: GeneratedConfig | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    columns: dict[str, str | None] = field(default_factory=dict)
    group_by: str | None = None
    prompt: str = "question: {question} context: {context}"
    chat_template: str | None = OWN_TEMPLATE
    separator: str = "answer:"
    learn: Learn = Learn.answers
    labels: list[str] = field(default_factory=list)
    primary_metric: str = "em"
    max_source_tokens: int = setting(256, at_least(2))
    max_target_tokens: int = setting(32, at_least(2))
    noise_density: float = setting(0.15, between(0, 1))
    mean_span_tokens: float = setting(3.0, at_least(1))

    def check(self, prefix: str) -> None:
        need(
            self.kind is not TaskKind.classification or len(self.labels) >= 2,
            f"task {self.name!r} is a classification and needs {prefix}labels=[first,second,…], one word a class.",
        )
        for key, names, what in (("header", self.header, "column of the file"), ("labels", self.labels, "class")):
            twice = [name for place, name in enumerate(names) if name in names[:place]]
            need(not twice, f"{prefix}{key} names {', '.join(twice[:1])} twice: give each {what} a name of its own.")
            need(all(name.strip() for name in names), f"{prefix}{key} has an empty name: give each {what} one.")
