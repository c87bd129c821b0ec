"""Exact match, F1, ROUGE and accuracy as local `evaluate.Metric` modules that need no network.

Knows texts only; knows nothing about tasks or data. Every metric takes `predictions: [str]` and
`references: [[str]]`, scores a prediction against its best reference and answers in percent;
`compute(..., per_example=True)` adds `per_example`, the list behind each mean.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and surplus white space (SQuAD v1.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """100 where both texts are the same after SQuAD v1.1 normalisation, else 0."""
    return 100.0 * (normalize_answer(prediction) == normalize_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of words in percent, after SQuAD v1.1 normalisation (Rajpurkar et al. 2016).

    0 where no word is shared, hence also for two texts that are both empty after normalisation, as in the
    official v1.1 script.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 200.0 * shared / (len(predicted) + len(expected)) if shared else 0.0


def same_label(prediction: str, reference: str) -> float:
    """100 where both texts are the same but for case and white space, else 0."""
    return 100.0 * (" ".join(prediction.casefold().split()) == " ".join(reference.casefold().split()))


class TextMetric(evaluate.Metric):
    """A mean over examples of the best score over references."""

    about: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.about,
            citation="",
            inputs_description="predictions: list of texts; references: list of lists of texts, none of them empty.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(  # type: ignore[override]
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], per_example: bool = False
    ) -> dict[str, Any]:
        scored = [self.best(p, r) for p, r in zip(predictions, references, strict=True)]
        lists = {name: [scores[name] for scores in scored] for name in scored[0]}
        means: dict[str, Any] = {name: sum(values) / len(values) for name, values in lists.items()}
        return means | ({"per_example": lists} if per_example else {})

    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """Each score of `prediction` against the reference that suits it best, in percent."""
        raise NotImplementedError


def _exact_match_and_f1(prediction: str, references: Sequence[str]) -> dict[str, float]:
    return {
        "em": max(exact_match(prediction, reference) for reference in references),
        "f1": max(token_f1(prediction, reference) for reference in references),
    }


class ExactMatchF1(TextMetric):
    """`em` and `f1` of SQuAD v1.1."""

    names = ("em", "f1")
    about = "Exact match and token F1 as in SQuAD v1.1 (Rajpurkar et al. 2016), best of several answers."

    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        return _exact_match_and_f1(prediction, references)


class Rouge(TextMetric):
    """`rouge1`, `rouge2` and `rougeL`: f-measures with Porter stemming."""

    names = ("rouge1", "rouge2", "rougeL")
    about = "ROUGE-1, ROUGE-2 and ROUGE-L f-measures with stemming, best of several references (Lin 2004)."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        scores = self._scorer.score_multi(list(references), prediction)
        return {name: 100.0 * float(score.fmeasure) for name, score in scores.items()}


class Overlap(Rouge):
    """The scores of `Rouge` and of `ExactMatchF1`."""

    names = ("rougeL", "rouge1", "rouge2", "em", "f1")
    about = "ROUGE f-measures, and exact match and token F1 as in SQuAD v1.1, best of several references."

    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        return super().best(prediction, references) | _exact_match_and_f1(prediction, references)


class Accuracy(TextMetric):
    """`accuracy`: the share of predictions that are the label's word."""

    names = ("accuracy",)
    about = "Share of predictions equal to the label, apart from case and white space."

    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        return {"accuracy": max(same_label(prediction, reference) for reference in references)}
