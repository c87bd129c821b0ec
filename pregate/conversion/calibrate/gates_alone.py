"""The gates of a pre-gated model without the rest of it, each starting as a copy of the source's.

Knows where a conversion takes the tensors of gates from; knows nothing about fitting.
"""

from __future__ import annotations

from typing import Any

import torch

from pregate.conversion.calibrate.states import GateToFit, gates_to_fit
from pregate.conversion.tensor_plan import TensorPlan
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.family import family_named
from pregate.models.pregated_models import compute_buffers, place, without_experts


class GatesAlone:
    """`model`: the pre-gated model of `config`, of which the gates alone have weights. `to_fit`: those that may decide
    otherwise than in the source, by stack and block. `weighing`: the blocks whose own gate, the source's, weighs."""

    def __init__(
        self, source: SourceCheckpoint, config: Any, plan: TensorPlan, device: torch.device, dtype: torch.dtype
    ) -> None:
        with without_experts(), torch.device("meta"):
            self.model = family_named(config.model_type).model_class(config)
        names = _gate_tensors(self.model)
        stored = plan.with_made(source).read({plan.origins[name] for name in names})
        for name in names:
            place(self.model, name, stored[plan.origins[name]], device, dtype)
        compute_buffers(self.model, device)
        self.model.eval()
        self.to_fit: dict[tuple[str, int], GateToFit] = {
            (gate.stack, gate.block): gate for gate in gates_to_fit(self.model)
        }
        self.weighing = {(block.stack, block.index) for block in self.model.moe_blocks() if block.gates.weighs}

    def sitting_in(self, stack: str, block: int) -> list[GateToFit]:
        """The gates in an MoE block that decide for a later one."""
        return [
            gate
            for gate in self.to_fit.values()
            if (gate.stack, gate.after) == (stack, block) and gate.block > block and not gate.reads_embeddings
        ]


def _gate_tensors(model: Any) -> list[str]:
    """The names of all tensors of gates, norms of entry gates included."""
    places = {id(module): f"{name}." for name, module in model.named_modules()}
    within = tuple({places[id(part)] for gate in model.gates() for part in (gate, gate.linear) if id(part) in places})
    return [name for name in model.state_dict() if name.startswith(within)]
