"""A tiny checkpoint of every decoder-only family in every form, as the hub has them where their weights are encoded."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from pregate.config import PreGateConfig
from pregate.conversion.write import convert
from pregate.models.loading import load_resident
from tests.engine.serving import Served
from tests.models import quantised
from tests.models.families.test_decoder_only import FAMILIES, Row, upstream_model
from tests.models.families.test_mlp_gates import stirred

WIDTH = 16
"""Upstream multiplies grouped experts in bfloat16 by multiples of eight alone."""
LOOKAHEAD = {"float32": 2, "bfloat16": 1}
"""Encoded weights are served as the hub has them, conventional."""
GATES: dict[str, dict[str, Any]] = {
    "early": {},
    "late": {"weights": "late", "entry": "embedding"},
    "start": {"weights": "late", "lookahead": 1, "start": 1},
    "mlp": {"gate": "mlp", "gate_width": 6, "lookahead": 1, "entry": "embedding"},
}
"""What is asked for beside the lookahead, or instead of it."""
ENCODED = {"gpt_oss": "mxfp4", "deepseek_v3": "fp8"}


class Source(NamedTuple):
    family: str
    form: str

    def __str__(self) -> str:
        return f"{self.family}-{self.form}"


SOURCES = [Source(name, form) for name in FAMILIES for form in (*LOOKAHEAD, *filter(None, [ENCODED.get(name)]))]


def shallow(row: Row) -> Row:
    """The family with few layers, widths that upstream can multiply, and all else as random."""

    def settings(draw: random.Random) -> dict[str, Any]:
        found = {"num_hidden_layers": 3, "intermediate_size": WIDTH, **row.settings(draw)}
        return found | {name: WIDTH for name in found if name.endswith("intermediate_size")}

    return row._replace(settings=settings)


@lru_cache(maxsize=len(SOURCES) * len(GATES))
def checkpoint(root: Path, source: Source, gates: str) -> Served:
    """In a directory under `root`, made once; and the resident model."""
    directory = root / f"{source}-{gates}"
    if source.form == "mxfp4":
        quantised.write(directory, *quantised.gpt_oss())
        return Served(directory, load_resident(directory))
    dtype = torch.float32 if source.form == "float32" else torch.bfloat16
    plain = root / f"{source}-{gates}-source"
    upstream_model(shallow(FAMILIES[source.family]), 50).to(dtype).save_pretrained(plain)
    if source.form in LOOKAHEAD:
        asked = PreGateConfig(**{"lookahead": LOOKAHEAD[source.form], **GATES[gates]})
        written = plain.with_name(f"{directory.name}-untrained") if gates == "mlp" else directory
        convert(str(plain), written, asked)
        if gates == "mlp":  # what is beside linear maps adds nothing before any training
            stirred(load_resident(written), seed=10).save_pretrained(directory)
    else:
        config = json.loads((plain / "config.json").read_text())
        stored = quantised.in_block_fp8(load_file(plain / "model.safetensors"))
        quantised.write(directory, {**config, "quantization_config": quantised.FP8}, stored)
    return Served(directory, load_resident(directory))
