"""The settings of calibration (`pregate.conversion.calibrate`)."""

from __future__ import annotations

from dataclasses import dataclass

from pregate.config.choices import CalibrationData, Through
from pregate.config.validators import at_least, between, need, setting


@dataclass
class CalibrationConfig:
    """How `pregate.init: calibrated` fits gates, without training anything else (see `pregate.conversion.calibrate`).

    Examples of the training split are drawn until there are `examples` of them or `tokens` in their sources and targets
    together, and pass through the models `batch_size` at a time. The share `held_out` of them chooses between fits.
    `steps`: most iterations that refine a fit at each temperature; 0 leaves the closed form.

    `through`: `memory` holds the whole source; `engine` streams its experts, a layer at a time over all examples, with
    the `engine` settings that say where experts are. `memory`: how much that may take, in bytes ("4GB"), of the machine
    or of the GPU that computes; null is as much as two blocks of experts need. `data`: what the examples are; `text`:
    the file for `data: text`.
    """

    examples: int = setting(1024, at_least(2, ", one to fit on, one to judge by"))
    tokens: int = setting(24576, at_least(1))
    held_out: float = setting(0.2, between(0, 1, ", such as 0.2"))
    batch_size: int = setting(32, at_least(1))
    steps: int = setting(20, at_least(0, ", which is the closed form alone"))
    through: Through = Through.memory
    memory: str | None = None
    data: CalibrationData = CalibrationData.task
    text: str | None = None

    def check(self, prefix: str) -> None:
        need(
            self.memory is None or self.through is Through.engine,
            f"{prefix}memory={self.memory} is for {prefix}through=engine: set both, or leave it out.",
        )
        need(
            (self.data is CalibrationData.text) == (self.text is not None),
            f"{prefix}text=FILE and {prefix}data=text belong together: set both, or neither.",
        )
