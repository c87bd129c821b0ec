"""The figures published in "Pre-gated MoE" (ISCA 2024, arXiv:2308.12066), and measured rows beside them.

Theirs: NVIDIA A100 80 GB, PCIe 4, float32, batch 1, 256 tokens in and 256 out; peak memory computed, of decoder experts
only. Knows rows of a benchmark as dictionaries; measures nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pregate.measure.table_format import Row, Table, short_number

POLICIES = ("gpu_only", "pre_gated", "on_demand", "prefetch_all")
LARGE = "switch-large-128"
"""Which no GPU of the paper's holds whole."""
MODELS = ("switch-base-8", "switch-base-64", "switch-base-128", "switch-base-256", LARGE)
BLOCK_MS = {
    "switch-base-8": (0.946, 1.128, 1.887, 6.73),
    "switch-base-64": (0.947, 1.129, 1.778, 51.0),
    "switch-base-128": (0.946, 1.127, 1.790, 101.6),
    "switch-base-256": (0.962, 1.157, 1.818, 199.7),
    "switch-large-128": (None, 1.388, 2.631, 173.5),
}
"""Figure 10: a decoder layer that holds an MoE block, in the order of `POLICIES`; None is out of memory."""
TOKENS_PER_S = {
    "switch-base-8": (129, 112, 79, 24),
    "switch-base-64": (142, 113, 78, 3),
    "switch-base-128": (142, 109, 76, 2),
    "switch-base-256": (140, 103, 73, 1),
    "switch-large-128": (None, 42, 26, None),
}
"""Figure 11. Large-128 with prefetch_all is below 1."""
PEAK_GB = {
    "switch-base-8": (2.48, 1.62, 1.60, 1.88),
    "switch-base-64": (9.40, 2.20, 2.18, 4.57),
    "switch-base-128": (17.3, 2.85, 2.83, 7.64),
    "switch-base-256": (33.1, 4.19, 4.17, 13.8),
    "switch-large-128": (None, 5.47, 5.44, 14.0),
}
"""Figure 12."""

FIGURES: dict[str, tuple[str, dict[str, tuple[float | None, ...]], float]] = {
    "Block latency, ms (Figure 10)": ("block_ms", BLOCK_MS, 1.0),
    "Tokens/s (Figure 11)": ("tokens_per_s", TOKENS_PER_S, 1.0),
    "Peak memory of the GPU, GB (Figure 12)": ("peak_device_bytes", PEAK_GB, 1e9),
}
"""By title: the field of a row, the paper's values, and the unit these are in."""
Kind = tuple[str, str, str]
"""Compute dtype, drive and slab dtype of measured rows."""


def beside_the_paper(rows: Sequence[Row]) -> str:
    """Markdown: for each figure of the paper its values, and those of `rows` at batch 1 without a cache, a line for
    each model and kind of row. A figure without measured rows is left out."""
    found = []
    for title, (field, published, unit) in FIGURES.items():
        lines = []
        for model in MODELS:
            measured = _by_kind(rows, model, field)
            if measured:
                lines.append([model, "the paper", *map(short_number, published[model])])
            for kind, values in measured.items():
                ours = [values[policy] / unit if policy in values else None for policy in POLICIES]
                lines.append(["", ", ".join(kind), *map(short_number, ours)])
        if lines:
            found.append(f"### {title}\n\n{Table(['model', 'measured', *POLICIES], lines, left=2).markdown()}")
    return "\n\n".join(found)


def _by_kind(rows: Sequence[Row], model: str, field: str) -> dict[Kind, dict[str, float]]:
    """`field` by policy for each kind of row in the paper's setting; of several such rows the one that decoded the most
    tokens."""
    found: dict[Kind, dict[str, Row]] = {}
    for row in rows:
        if row["model"] == model and row.get(field) is not None and _as_the_paper(row):
            kind = row["dtype"], f"{row.get('drive', 'host')}-driven", f"slabs {row.get('slab_dtype', 'source')}"
            same = found.setdefault(kind, {})
            other = same.setdefault(row["policy"], row)
            same[row["policy"]] = max(other, row, key=lambda row: row.get("new_tokens", 0))
    return {kind: {policy: row[field] for policy, row in same.items()} for kind, same in found.items()}


def _as_the_paper(row: Row) -> bool:
    """Whether a policy of the paper decoded at batch 1, with experts in host memory, no cache and its own budget,
    all of the model, and at most one block ahead."""
    plain = row.get("cache") in (None, "none") and row.get("budget") is None and row.get("forced_experts") is None
    plain = plain and row.get("blocks") is None and row.get("lookahead") in (None, 0, 1)
    return plain and row["policy"] in POLICIES and row["batch"] == 1 and row.get("tier") in (None, "dram")


def share_of_gpu_only(
    rows: Sequence[Row], field: str, policy: str = "pre_gated"
) -> dict[Kind, tuple[float, list[str]]]:
    """The geometric mean of `field` under `policy` ÷ under gpu_only over the Switch-Base models that have both, as
    the paper averages, and which these are."""
    ratios: dict[Kind, dict[str, float]] = {}
    for model in MODELS:
        for kind, values in _by_kind(rows, model, field).items():
            if model != LARGE and policy in values and "gpu_only" in values:
                ratios.setdefault(kind, {})[model] = values[policy] / values["gpu_only"]
    return {kind: (statistics.geometric_mean(found.values()), list(found)) for kind, found in ratios.items()}
