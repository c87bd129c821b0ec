"""What a conversion did, and how the command line says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pregate.config import Init, Weights
from pregate.conversion.made_tensors import MadeTensor
from pregate.conversion.tensor_plan import GateMove
from pregate.models.pregating import PreGating
from pregate.system.byte_sizes import human_bytes

STARTS = {Init.source: "as copies", Init.random: "at random", Init.calibrated: "as fitted"}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. `made` are tensors that no source has. `dropped` are source tensors that repeat another or
    that the architecture never reads. `tokenizer_is_code`: so the source's was left out."""

    output: Path
    gating: PreGating
    num_blocks: dict[str, int]
    moves: tuple[GateMove, ...]
    made: Mapping[str, MadeTensor]
    dropped: tuple[str, ...]
    shards: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    has_tokenizer: bool
    tokenizer_is_code: bool
    seconds: float

    def told(self, source: str) -> str:
        """What moved, sizes, time, where, and the next command; one line each."""
        gating = self.gating
        lines = [f"{source} -> {self.output}"]
        for stack, blocks in self.num_blocks.items():
            ahead = gating.lookahead_of(stack)
            moved = sum(move.stack == stack and not move.copied for move in self.moves)
            entries = "read the input embeddings" if gating.entry == "embedding" else "stay where they are"
            what = (
                f"{moved} gates moved {ahead} ahead, {ahead} entry gates {entries}" if ahead else "gates stay in place"
            )
            what += f", the first {gating.start} blocks conventional" if ahead and gating.start else ""
            lines.append(f"  {stack}: {blocks} MoE blocks, {what}")
        if gating.lookahead:
            lines.append("  moved gates start " + STARTS[Init(gating.init)])
        if gating.lookahead and gating.weights == Weights.late:
            lines.append("  the block's own routers stay and weigh the experts that moved gates choose")
        if self.made:
            count = sum(math.prod(made.shape) for made in self.made.values())
            size = human_bytes(sum(made.num_bytes for made in self.made.values()))
            lines.append(
                f"  {len(self.made) // 2} gates have {gating.gate_width} hidden numbers beside their linear map: "
                f"{count:,} parameters more, {size}"
            )
        lines.append(
            f"  {human_bytes(self.output_bytes)} in {len(self.shards)} safetensors file(s), "
            f"from {human_bytes(self.source_bytes)}, in {self.seconds:.1f} s"
        )
        if self.tokenizer_is_code:
            lines.append(
                "  the tokenizer of the source is code (auto_map in tokenizer_config.json), which is not taken along: "
                "add model.tokenizer=DIRECTORY_OR_HUB_ID with a tokenizer.json"
            )
        elif not self.has_tokenizer:
            lines.append("  no tokenizer in the source: add model.tokenizer=DIRECTORY_OR_HUB_ID to include one")
        lines.append(f"next: python -m pregate.eval checkpoint={self.output} reference={source}")
        return "\n".join(lines)
