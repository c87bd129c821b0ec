"""What a calibration did, for the manifest of a converted directory and for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pregate.config import CalibrationConfig
from pregate.conversion.calibrate.examples import Batches
from pregate.conversion.calibrate.gate_fit import GateFit
from pregate.conversion.calibrate.states import (
    Agreement,
)
from pregate.system.byte_sizes import human_bytes


@dataclass(frozen=True)
class FittedGate:
    """One gate: where it decides, and its agreement on held-out tokens as a copy, after ridge, and refined."""

    stack: str
    block: int
    fit: GateFit

    def account(self) -> dict[str, Any]:
        fit = self.fit
        return {
            "stack": self.stack,
            "block": self.block,
            "chosen": fit.chosen,
            "agreement": {"copy": fit.copy, "ridge": fit.ridge, "refined": fit.refined},
        }


def outcome(
    stacks: Sequence[str],
    fitted: Sequence[FittedGate],
    batches: Batches,
    before: Agreement,
    after: Agreement,
    kept: bool,
) -> dict[str, Any]:
    """What makes a `Calibration`, but the seconds. Without `kept` the copies stay: each fitted gate is no worse than
    a copy on the states that it met, but the model as a whole was."""
    if not kept:
        after = before
        fitted = [replace(gate, fit=replace(gate.fit, chosen="copy")) for gate in fitted]
    return {
        "gates": tuple(sorted(fitted, key=lambda gate: (stacks.index(gate.stack), gate.block))),
        "before": before,
        "after": after,
        "tokens": {stack: batches.num_tokens(stack) for stack in stacks},
        "num_examples": batches.num_examples,
    }


@dataclass(frozen=True)
class Calibration:
    """What a calibration did. `before` and `after`: agreement of the model with copied and with fitted gates, each on
    its own states, over held-out tokens. `tokens`: stack -> how many were fitted on and held out."""

    gates: tuple[FittedGate, ...]
    before: Agreement
    after: Agreement
    tokens: dict[str, tuple[int, int]]
    num_examples: int
    seconds: float
    bytes_read: int | None = None
    peak_bytes: int | None = None
    """Of experts, and the most memory that the process, or torch on a GPU, had; where experts were streamed."""

    def account(self, settings: CalibrationConfig, task: str | None) -> dict[str, Any]:
        """For the manifest of the converted directory."""
        return {
            "task": task,
            "settings": asdict(settings),
            "num_examples": self.num_examples,
            "num_tokens": {stack: {"fit": fit, "held_out": held} for stack, (fit, held) in self.tokens.items()},
            "agreement": {"before": self.before, "after": self.after},
            "gates": [gate.account() for gate in self.gates],
            "seconds": round(self.seconds, 2),
            **{name: size for name, size in self._streamed().items() if size is not None},
        }

    def _streamed(self) -> dict[str, int | None]:
        return {"bytes_read": self.bytes_read, "peak_bytes": self.peak_bytes}

    def table(self) -> str:
        """Agreement before and after, a line a stack."""
        words = {"bytes_read": "of experts read", "peak_bytes": "of memory at most"}
        sizes = {words[name]: size for name, size in self._streamed().items() if size is not None}
        read = "".join(f", {human_bytes(size)} {what}" for what, size in sizes.items())
        lines = [
            f"calibrated on {self.num_examples:,} examples in {self.seconds:.1f} s{read}; routing agreement, held out:"
        ]
        for stack, before in self.before.items():
            pairs = zip(before, self.after[stack], strict=True)
            shown = "  ".join(f"{block}: {b:.1%} -> {a:.1%}" for block, (b, a) in enumerate(pairs))
            lines.append(f"  {stack} block {shown}")
        return "\n".join(lines)
