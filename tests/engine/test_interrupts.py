"""Ctrl-C and errors in the middle of a generation: no hang, no wrong token after it, nothing left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import CacheRule, Policy, Tier
from pregate.engine.engine import OffloadEngine
from pregate.engine.io.uring import UringMover
from pregate.engine.opening import open_store
from tests.engine.hostile import HostileStore, Streamer, interrupted_expert
from tests.engine.serving import (
    OFFLOADED,
    SLAB,
    Served,
    assert_same,
    assert_serves,
    generated,
    needs_io_uring,
    request,
    serve,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("nothing_left_behind")]


@pytest.mark.parametrize(("policy", "slots"), [*((policy, 9) for policy in OFFLOADED), (Policy.pre_gated, 1)])
@pytest.mark.parametrize("where", ["expert", "read", "streamer", "arrival"])
def test_an_interrupt_in_the_middle(
    served: Served, expected: tuple[Tensor, Tensor], policy: Policy, where: str, slots: int
) -> None:
    """While slow reads are under way, which go on for a while after it."""
    armed = [where == "read"]

    def interrupt(*_: Any) -> None:
        if armed[0]:
            armed[0] = False
            raise KeyboardInterrupt

    slow = HostileStore(open_store(served.directory), most_s=0.003)
    slow.before_read = lambda number, _: interrupt() if number == 7 else None
    with OffloadEngine.open(
        served.directory, store=slow, policy=policy, device_budget=str(slots * SLAB), cache=CacheRule.lru
    ) as engine:
        options = request(2) if where != "streamer" else request(1)
        with pytest.raises(KeyboardInterrupt):
            if where == "expert":
                with interrupted_expert(engine, KeyboardInterrupt()):
                    engine.generate(**options)
            elif where == "streamer":
                armed[0] = True
                engine.generate(**options, streamer=Streamer(interrupt))
            elif where == "arrival":
                with pytest.MonkeyPatch.context() as patch:
                    armed[0] = True
                    patch.setattr(engine.host.scheduler, "_arrive", interrupt)
                    engine.generate(**options)
            else:
                engine.generate(**options)
        assert_serves(engine, expected)
    slow.close()


def test_a_second_interrupt_while_the_first_is_cleaned_up(
    served: Served, expected: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds Ctrl-C down: slots that were promised to slabs which never came are not believed."""
    slow = HostileStore(open_store(served.directory), most_s=0.003)
    with OffloadEngine.open(served.directory, store=slow, device_budget="30%", cache=CacheRule.lru) as engine:
        serve(engine)

        def interrupt() -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, interrupted_expert(engine, KeyboardInterrupt()):
            patch.setattr(engine.host.mover, "drain", interrupt)
            # as if it had come between giving a slot away and starting the transfer
            with pytest.raises(KeyboardInterrupt):
                serve(engine)
            engine.host.scheduler._table.clear()
            for key in engine.family.keys()[: engine.num_slots]:
                engine.host.scheduler._table.place(key)
        assert_serves(engine, expected)
    slow.close()


@pytest.mark.parametrize("host_budget", ["20%", pytest.param(None, marks=needs_io_uring)])
def test_many_interrupts_at_any_moment(
    served: Served, expected: tuple[Tensor, Tensor], host_budget: str | None
) -> None:
    """Reads by threads with a host budget, by the kernel without.

    Real signals, as short after the call as they may come; some arrive twice.
    """
    armed = [0]

    def handler(*_: Any) -> None:
        if armed[0]:
            armed[0] -= 1
            raise KeyboardInterrupt

    def generate(engine: OffloadEngine, after_s: float, again_s: float) -> bool:
        armed[0] = 2 if again_s else 1
        gc.disable()  # an exception within a callback of the collector, as hypothesis has one, reaches no caller
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, after_s, again_s)
                serve(engine)
            except KeyboardInterrupt:
                time.sleep(2 * again_s)
                return True
            finally:
                armed[0] = 0
                gc.enable()
        except KeyboardInterrupt:
            return True
        return False

    before = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        with OffloadEngine.open(
            served.directory,
            tier=Tier.disk,
            device_budget="20%",
            host_budget=host_budget,
            cache=CacheRule.lru,
            io_threads=3,
        ) as engine:
            assert isinstance(engine.host.mover, UringMover) == (host_budget is None)
            whole_s = float("inf")
            for number in range(41):
                if number:
                    interrupted += generate(engine, max(1e-5, whole_s * (number - 1) / 40), 1e-4 * (number % 3))
                    signal.setitimer(signal.ITIMER_REAL, 0)
                begun = time.perf_counter()
                assert_same(serve(engine), expected)
                # the shortest so far, or on a busy machine most would be over before the signal
                whole_s = min(whole_s, time.perf_counter() - begun)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10


@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_generates_for_ever(served: Served) -> None:
    program = """
        import sys
        from pregate.engine.engine import OffloadEngine
        from pregate.engine.opening import open_store
        from tests.engine.hostile import HostileStore
        from tests.engine.serving import request
        store = HostileStore(open_store(sys.argv[1]), most_s=0.002)
        with OffloadEngine.open(sys.argv[1], store=store, device_budget="30%", cache="lru") as engine:
            options = request(2)
            print("begun", flush=True)
            while True:
                engine.generate(**options)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(served.directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=200)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode not in (0, -signal.SIGKILL), told
    assert told.rstrip().endswith("KeyboardInterrupt"), told


@pytest.mark.gpu
@pytest.mark.parametrize("tier", [Tier.dram, Tier.disk])
def test_a_gpu_engine_serves_on_after_errors_and_interrupts(served: Served, tier: Tier) -> None:
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in request(2).items()}
    with OffloadEngine.open(
        served.directory, tier=tier, device="cuda", device_budget="30%", cache=CacheRule.lru, host_budget="30%"
    ) as engine:
        wanted = generated(engine.generate, options)
        for error in (KeyboardInterrupt(), torch.OutOfMemoryError("no")):
            with interrupted_expert(engine, error), pytest.raises(type(error)):
                engine.generate(**options)
            assert_same(generated(engine.generate, options), wanted)


def test_wrong_arguments_leave_the_engine_as_it_was(served: Served, expected: tuple[Tensor, Tensor]) -> None:
    with OffloadEngine.open(served.directory, policy=Policy.gpu_only) as engine:
        with pytest.raises(ValueError, match="model_kwargs"):
            engine.generate(**request(1), no_such_argument=1)
        assert_serves(engine, expected)


def test_out_of_memory_in_the_middle(served: Served, expected: tuple[Tensor, Tensor]) -> None:
    with OffloadEngine.open(served.directory, device_budget="30%", cache=CacheRule.lru) as engine:
        with interrupted_expert(engine, torch.OutOfMemoryError("no")), pytest.raises(torch.OutOfMemoryError):
            serve(engine)
        assert_serves(engine, expected)
