"""Predictions that need no model: what a score has to beat before it says anything.

Knows texts and examples; knows nothing about models. Each kind of task chooses from here in `Task.trivial`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
CAPITALISED = re.compile(r"[A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)*")
OPENERS = re.compile(
    r"the|a|an|in|on|at|of|by|for|from|to|with|it|its|he|she|they|his|her|their|this|that|these|those|as|and|"
    r"but|when|while|after|before|since|there|we|i|you|one|some|many|most|all|both|each|although|however"
)
"""Words that begin a sentence with a capital and are no name."""


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
