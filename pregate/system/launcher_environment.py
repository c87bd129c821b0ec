"""What launchers ask of a process through its environment, and what of it cannot be honoured.

Knows the variables of torchrun, mpirun and `accelerate launch`. Imports no torch: a command line is checked without it.
"""

from __future__ import annotations

import os

from pregate.config import UsageError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""As torchrun and mpirun set them, in the order in which Accelerate looks."""
PLUGINS = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "A parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
ONE = "`python -m pregate.{command} …`"
SEVERAL = "`torchrun --nproc_per_node N -m pregate.train …`"
TRUE = ("1", "true", "yes", "on", "t", "y")


def rank() -> int:
    """The rank of this process, before the processes have met and after."""
    return _first_number(RANKS, 0)[1]


def asked() -> tuple[str, int]:
    """How many processes were asked for, and the variable that says so."""
    return _first_number(SIZES, 1)


def _first_number(names: tuple[str, ...], otherwise: int) -> tuple[str, int]:
    for name in names:
        value = os.environ.get(name, "")
        if value:
            try:
                return name, int(value)
            except ValueError as error:
                raise UsageError(f"The environment variable {name}={value} must be a whole number.") from error
    return names[0], otherwise


def asked_for(variable: str) -> bool:
    """Whether an environment variable is set to one of the words that Accelerate takes for yes."""
    return os.environ.get(variable, "").lower() in TRUE


def check_alone(command: str) -> None:
    """Refuse several processes for a command that works as one. Raises `UsageError`."""
    variable, size = asked()
    if size > 1:
        raise UsageError(
            f"pregate.{command} runs as one process, but {variable}={size} asks for {size}: start it without a "
            f"launcher and without {variable}, as {ONE.format(command=command)}."
        )
    _check_launcher(command)


def check_launch() -> None:
    """Refuse what a launcher was asked for and training cannot honour. Raises `UsageError`."""
    _check_launcher("train")
    for name, variable in PLUGINS.items():
        if asked_for(variable):
            instead = (
                "train.sharding=full is how a model is split over processes (FSDP2)"
                if name == "FSDP"
                else "training is data parallel"
            )
            raise UsageError(
                f"{name} was asked for ({variable}={os.environ[variable]}), but {instead}: leave it out of the "
                f"launcher's options and configuration, or start {SEVERAL}."
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UsageError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} does not apply: train.batch_sequences and "
            "train.micro_batch_tokens decide; leave it out of the launcher's options and configuration."
        )


def _check_launcher(command: str) -> None:
    """Refuse the one process that `accelerate launch --num_processes N` starts where it sees no GPUs.

    Its traces: ACCELERATE_USE_CPU and an address to meet at are set, and no rank is. Raises `UsageError`.
    """
    given = os.environ
    launched = "ACCELERATE_USE_CPU" in given and "MASTER_ADDR" in given
    if launched and not any(name in given for name in (*SIZES, *RANKS, "LOCAL_RANK")):
        several = f"start {SEVERAL} for N of them, or " if command == "train" else ""
        raise UsageError(
            "`accelerate launch` was asked for several processes (it set MASTER_ADDR) and has started one, as it "
            f"does on CPUs and on one GPU: {several}start {ONE.format(command=command)} for one."
        )


def check_mixed_precision(resolved: str) -> None:
    """Refuse a mixed precision that was asked of a launcher and is not what training uses. Raises `UsageError`."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted not in ("no", resolved):
        raise UsageError(
            f"Mixed precision {wanted} was asked of the launcher, but train.precision decides, and gives {resolved} "
            "here: set train.precision, and start with --mixed_precision no."
        )
