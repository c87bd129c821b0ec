"""What a run says when its numbers are no longer finite: the step, the examples, and the state to go back to.

Knows where the examples of a step are named; knows nothing about how losses are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pregate.config import UsageError
from pregate.system.console import first_of
from pregate.training.run_dir_lock import CHECKPOINT, LAST
from pregate.training.saved_state import steps_done
from pregate.training.session import Session
from pregate.training.sharding import local

MOST_NAMED = 8
REMEDY = "lower its learning_rate, set clip_norm or use precision=fp32"


def check_finite(session: Session, loss: float, norm: float, totals: Sequence[Tensor]) -> None:
    """Raises `UsageError`, in every process, if the loss of a step or the norm of its gradients is not finite.

    `totals`: the loss of each of this process's micro batches. Those that are not finite are named, or all of them
    where the losses are finite and their gradients are not.
    """
    for what, value in (("loss", loss), ("gradient norm", norm)):
        if not abs(value) < float("inf"):
            spoilt = [number for number, total in enumerate(totals) if not total.isfinite()]
            everywhere = gather_object([spoilt])
            wanted = spoilt if any(everywhere) else range(len(totals))
            named = gather_object(session.feed.named(session.state, wanted))
            raise UsageError(
                f"The {what} of {session.stage} became {value} at step {session.state.step + 1}, in a micro batch of "
                f"{first_of(list(dict.fromkeys(named)), MOST_NAMED)}: {REMEDY} ({last_good(session)})."
            )


def check_weights(session: Session) -> None:
    """Raises `UsageError` for weights of this process that are not finite: no state is good that holds them."""
    spoilt = [name for name, value in session.model.named_parameters() if not torch.isfinite(local(value)).all()]
    if spoilt:
        raise UsageError(
            f"Weights of {session.stage} became NaN or infinite by step {session.state.step} ({first_of(spoilt, 2)}), "
            f"and are not saved: {REMEDY} ({last_good(session)})."
        )


def last_good(session: Session) -> str:
    """Where the latest saved state lies, and the best model."""
    last, checkpoint, state = session.out_dir / LAST, session.out_dir / CHECKPOINT, session.state
    if not last.is_dir():
        return "no state has been saved yet"
    best = f"; the best model so far, of step {state.best_step}, lies in {checkpoint}" if checkpoint.is_dir() else ""
    return f"the last good state is that of step {steps_done(last)} in {last}{best}"
