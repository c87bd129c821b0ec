"""What a converted directory says about its origin: settings, versions, time, and what `write` and `calibrate` add.

Training carries the file along, so that a trained checkpoint says it too.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pregate import __version__
from pregate.conversion.pregated_config import Target

MANIFEST = "pregate_manifest.json"


def provenance(target: Target, seed: int) -> dict[str, Any]:
    """The part that follows from the settings of a conversion, and when and with which versions it was made."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {
        **target.config.pregating.to_dict(),
        "seed": seed,
        "num_moe_blocks": target.num_blocks,
        "versions": {"pregate": __version__}
        | {name: installed(name) for name in ("torch", "transformers", "safetensors")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
