"""How fast slabs cross the link: the gather kernel beside the copy engine, over slab sizes, kinds of memory and grids.

    python -m studies.profiles.gather_probe --out DIR

On CUDA each figure is the time between two events around a replayed graph of fetches, one slab after the other from
changing places, so that nothing is read from a cache and no launch is counted. Every arrangement is checked for what
it copied before it is timed. Without a GPU the same code times the reference implementation and a plain copy, which
says nothing about a link: it is there so that the code is tested. GB are powers of 1000.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.config import Device, UsageError
from pregate.engine.device.device_addresses import device_addresses, host_allocated
from pregate.engine.device.ops.gather_slabs import gather_slabs
from pregate.engine.device.ops.language import require_triton
from pregate.engine.device.slots import Fetch
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes, page_lock, page_unlock, round_up
from pregate.system.byte_sizes import human_bytes
from pregate.system.durable import append_line
from pregate.system.machine import environment, pick_device

ROWS = "gather_probe.jsonl"
TABLE = "gather_probe.md"
MEMORIES = ("registered", "allocated", "write_combined")
"""Page-locked in place, as the engine's store is; by the driver; by the driver with write-combined pages."""
NUM_SLOTS = 4


@dataclass(frozen=True)
class ProbeSettings:
    """sizes: bytes of a slab, rounded up to whole pages. pool: bytes of host memory that slabs are read from.
    moved: bytes of one measurement, at least four slabs and at most 64. repeats: the median of so many is a row."""

    sizes: tuple[int, ...] = tuple(size * 1_000_000 for size in (1, 2, 5, 10, 20))
    grids: tuple[int, ...] = (4, 8, 16, 32, 64)
    unrolls: tuple[int, ...] = (1, 2, 4, 8)
    pool: int = 512 << 20
    moved: int = 64 << 20
    repeats: int = 9


def probe(device: torch.device, out_dir: Path, settings: ProbeSettings) -> list[dict[str, Any]]:
    """Measure everything, appending a row to `gather_probe.jsonl` in `out_dir` as soon as it is known, then write
    the table. A row has `memory`, `method` ("copy" or "gather"), `slab_bytes`, `num_fetches`, `ms_per_slab`,
    `gb_per_s`, for the gather kernel `num_programs` and `unroll`, and `environment`. Returns the rows.

    Raises `UsageError` where memory cannot be page-locked, `RuntimeError` if something else was copied than asked.
    """
    if device.type == "cuda":
        require_triton()
    out_dir.mkdir(parents=True, exist_ok=True)
    found, rows = environment(), []
    for row in _measured(device, settings):
        rows.append(row)
        append_line(out_dir / ROWS, {**row, "environment": found})
    (out_dir / TABLE).write_text(table(rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of memory and size: the copy engine, the fastest gather with its grid and unroll, and the
    smallest grid that comes within 3 % of it."""
    lines = [
        "| memory | slab | copy GB/s | gather GB/s | programs | unroll | gather/copy | programs within 3 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for memory, size in dict.fromkeys((row["memory"], row["slab_bytes"]) for row in rows):
        here = [row for row in rows if (row["memory"], row["slab_bytes"]) == (memory, size)]
        copies, gathers = ([row for row in here if row["method"] == method] for method in ("copy", "gather"))
        if not copies or not gathers:
            continue
        copy, best = copies[-1], max(gathers, key=lambda row: row["gb_per_s"])
        near = [row for row in gathers if row["gb_per_s"] >= 0.97 * best["gb_per_s"] and "num_programs" in row]
        fewest = min((row["num_programs"] for row in near), default="")
        lines.append(
            f"| {memory} | {human_bytes(size)} | {copy['gb_per_s']:.2f} | {best['gb_per_s']:.2f} | "
            f"{best.get('num_programs', '')} | {best.get('unroll', '')} | {best['gb_per_s'] / copy['gb_per_s']:.2f} | "
            f"{fewest} |"
        )
    return "\n".join(lines) + "\n"


def _measured(device: torch.device, settings: ProbeSettings) -> Iterator[dict[str, Any]]:
    sizes = [round_up(size, PAGE) for size in settings.sizes]
    pool_bytes = max(settings.pool // PAGE * PAGE, NUM_SLOTS * max(sizes))
    for memory in MEMORIES if device.type == "cuda" else ("pageable",):
        with _pool(memory, pool_bytes) as pool:
            # written once, in order, because write-combined pages are read at a crawl
            torch.arange(pool_bytes // 8, out=pool.view(torch.int64))
            for size in sizes:
                yield from _of_one_size(device, settings, memory, pool[: pool_bytes // size * size].view(-1, size))


@contextmanager
def _pool(memory: str, num_bytes: int) -> Iterator[Tensor]:
    if memory in ("allocated", "write_combined"):
        with host_allocated(num_bytes, write_combined=memory == "write_combined") as pool:
            yield pool
        return
    pool = aligned_bytes(num_bytes)
    if memory == "registered":
        page_lock(pool)
    try:
        yield pool
    finally:
        if memory == "registered":
            torch.cuda.synchronize()
            page_unlock(pool)


def _of_one_size(
    device: torch.device, settings: ProbeSettings, memory: str, store_GB: Tensor
) -> Iterator[dict[str, Any]]:
    num_slabs, size = store_GB.shape
    num_fetches = min(64, max(NUM_SLOTS, settings.moved // size))
    # far apart, so that no two neighbours are fetched one after the other
    slabs = [number * 7 % num_slabs for number in range(num_fetches)]
    slots_SB = torch.empty(NUM_SLOTS, size, dtype=torch.uint8, device=device)
    addresses_G = device_addresses(store_GB, device)
    fetches = [_fetch(slab, number % NUM_SLOTS, device) for number, slab in enumerate(slabs)]

    def copy_all() -> None:
        for number, slab in enumerate(slabs):
            slots_SB[number % NUM_SLOTS].copy_(store_GB[slab], non_blocking=True)

    def gather_all(num_programs: int, unroll: int) -> None:
        for fetch in fetches:
            gather_slabs(addresses_G, fetch.copy_slab_N, fetch.copy_slot_N, slots_SB, num_programs, unroll)

    def row(method: str, work: Callable[[], None], **arrangement: int) -> dict[str, Any]:
        slots_SB.zero_()
        work()
        _check(slots_SB, slabs, f"{method} {memory} {arrangement}")
        ms = _median_ms(work, device, settings.repeats) / num_fetches
        figures = {"num_fetches": num_fetches, "ms_per_slab": ms, "gb_per_s": size / ms / 1e6}
        return {"device": device.type, "memory": memory, "method": method, "slab_bytes": size, **arrangement, **figures}

    yield row("copy", copy_all)
    if device.type != "cuda":
        yield row("gather", lambda: gather_all(1, 1))
        return
    for num_programs in settings.grids:
        for unroll in settings.unrolls:
            work = lambda p=num_programs, u=unroll: gather_all(p, u)  # noqa: E731
            yield row("gather", work, num_programs=num_programs, unroll=unroll)


def _fetch(slab: int, slot: int, device: torch.device) -> Fetch:
    fetch = Fetch.empty(1, device)
    fetch.copy_slab_N.fill_(slab)
    fetch.copy_slot_N.fill_(slot)
    return fetch


def _check(slots_SB: Tensor, slabs: list[int], what: str) -> None:
    """Each slot holds the slab that was fetched into it last; the pool's words count up from zero."""
    words = slots_SB.shape[1] // 8
    for slot, words_W in enumerate(slots_SB.view(torch.int64)):
        last = slabs[max(number for number in range(len(slabs)) if number % NUM_SLOTS == slot)]
        expected_W = torch.arange(last * words, (last + 1) * words, device=slots_SB.device)
        if not torch.equal(words_W, expected_W):
            raise RuntimeError(f"{what} left other bytes in slot {slot} than those of slab {last}")


def _median_ms(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Milliseconds of `work`, which has run before (so that kernels are compiled)."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            work()
            times.append((time.perf_counter() - begun) * 1e3)
        return statistics.median(times)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.profiles.gather_probe",
        description="How fast slabs cross the link: the gather kernel beside the copy engine.",
    )
    parser.add_argument("--out", type=Path, required=True, help=f"directory for {ROWS} and {TABLE}")
    parser.add_argument("--device", choices=[str(device) for device in Device], default=str(Device.auto))
    defaults = ProbeSettings()
    parser.add_argument("--sizes", type=int, nargs="+", default=defaults.sizes, help="bytes of a slab")
    parser.add_argument("--grids", type=int, nargs="+", default=defaults.grids, help="programs of the kernel")
    parser.add_argument("--unrolls", type=int, nargs="+", default=defaults.unrolls, help="loads in flight a thread")
    parser.add_argument("--pool", type=int, default=defaults.pool, help="bytes of host memory to read from")
    parser.add_argument("--repeats", type=int, default=defaults.repeats, help="measurements of which a row is median")
    given = parser.parse_args(arguments)
    settings = ProbeSettings(
        tuple(given.sizes), tuple(given.grids), tuple(given.unrolls), given.pool, repeats=given.repeats
    )
    try:
        rows = probe(pick_device(Device(given.device)), given.out, settings)
    except UsageError as error:
        parser.exit(2, f"pregate: {error}\n")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
