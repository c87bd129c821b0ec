"""Predictions that need no model: what a score has to beat before it says anything.

Knows the examples and metrics of tasks; knows nothing about models.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from pregate.config import TaskKind
from pregate.tasks.base import Example, Task

SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
CAPITALISED = re.compile(r"[A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)*")
OPENERS = re.compile(
    r"the|a|an|in|on|at|of|by|for|from|to|with|it|its|he|she|they|his|her|their|this|that|these|those|as|and|"
    r"but|when|while|after|before|since|there|we|i|you|one|some|many|most|all|both|each|although|however"
)
"""Words that begin a sentence with a capital and are no name."""


def trivial_scores(task: Task, split: str, limit: int | None = None) -> dict[str, dict[str, float]]:
    """The metrics of each trivial prediction on the first `limit` examples of `split`, in percent."""
    examples = task.examples(split, limit)
    predictions = trivial_predictions(task, task.examples(task.config.train_split), examples)
    right = [example.references for example in examples]
    return {name: task.score(texts, right).overall for name, texts in predictions.items()}


def trivial_predictions(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, list[str]]:
    """Predictions for `examples`, by name; they may look at `train` but at no reference."""
    targets, prompt = [example.target for example in train], task.config.prompt
    if task.config.kind is TaskKind.classification:
        return {"most frequent label": [most_frequent(targets)] * len(examples)}
    if task.config.kind is TaskKind.summarization:
        documents = [max(prompt_values(prompt, example.source).values(), key=len) for example in examples]
        metric = task.metric(keep_in_memory=True)
        summary = medoid(targets, lambda text, reference: metric.best(text, [reference])[task.primary_metric])
        return {"first line": list(map(lead, documents)), "one training summary": [summary] * len(examples)}
    found = {"most frequent answer": [most_frequent(targets)] * len(examples)}
    if {"context", "question"} <= set(task.prompt_fields):
        shown = [prompt_values(prompt, example.source) for example in examples]
        found["first name not asked for"] = [first_new_name(v["context"], v["question"]) for v in shown]
    return found


def prompt_values(prompt: str, text: str) -> dict[str, str]:
    """The fields of a `text` that `prompt` has formatted; where that is ambiguous, the earlier fields are the shorter.

    Raises `ValueError` for a text of another prompt.
    """
    pattern, seen = "", set()
    for literal, field, _, _ in string.Formatter().parse(prompt):
        pattern += re.escape(literal)
        if field is not None:
            pattern += f"(?P={field})" if field in seen else f"(?P<{field}>.*?)"
            seen.add(field)
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError(f"{text[:80]!r} was not made with the prompt {prompt!r}.")
    return found.groupdict()


def most_frequent(texts: Sequence[str]) -> str:
    """The text that occurs most often, the first such where several do."""
    return Counter(texts).most_common(1)[0][0]


def lead(text: str) -> str:
    """The first line of a text, such as the first utterance of a dialogue; of a single line the first sentence."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        return lines[0] if lines else ""
    sentence = SENTENCE.match(lines[0])
    return sentence.group() if sentence else lines[0]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the positions 0 to `count` - 1, evenly spaced."""
    return [i * count // most for i in range(most)] if count > most else list(range(count))


def medoid(texts: Sequence[str], score: Callable[[str, str], float], candidates: int = 64, judges: int = 128) -> str:
    """Of evenly spaced candidates among `texts` the one that scores best on average against evenly spaced others."""
    judging = spread(len(texts), judges)

    def worth(candidate: int) -> float:
        others = [judge for judge in judging if judge != candidate]
        return sum(score(texts[candidate], texts[judge]) for judge in others) / max(1, len(others))

    return texts[max(spread(len(texts), candidates), key=worth)]


def first_new_name(context: str, question: str) -> str:
    """The first capitalised span of `context` whose words are not in `question`, else the first word; "" for none."""
    asked = set(_words(question))
    for found in CAPITALISED.finditer(context):
        words = [word for word in _words(found.group()) if not OPENERS.fullmatch(word)]
        if words and not asked & set(words):
            return found.group()
    return (context.split() or [""])[0]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
