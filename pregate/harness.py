"""`python -m pregate.harness --model pregate --model_args pretrained=DIR --tasks NAME`: lm-evaluation-harness with the
model `pregate`.

The arguments are those of the harness's own command, to which it gives them.
"""

from __future__ import annotations

from importlib.util import find_spec

from pregate.cli import ending_in_one_sentence
from pregate.config import UsageError
from pregate.system.launcher_environment import check_alone


def main() -> None:
    """Register the model and pre-gated checkpoints, then run the harness. Raises `UsageError`."""
    check_alone("harness")
    if find_spec("lm_eval") is None:
        raise UsageError(
            "The package lm_eval is missing: pip install '.[harness]' in the directory of pregate, or "
            "pip install lm_eval."
        )
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval._cli import HarnessCLI  # pyright: ignore[reportMissingImports]

    from pregate.measure.lm_eval_model import checked
    from pregate.models.family import families

    given = HarnessCLI().parse_args()
    if getattr(given, "model", None) == "pregate":
        # the harness lists thousands of tasks before it opens a model
        checked(getattr(given, "model_args", None) or {})
    families()
    cli_evaluate()


if __name__ == "__main__":
    ending_in_one_sentence(main)
