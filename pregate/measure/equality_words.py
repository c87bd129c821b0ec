"""Whether measured rows gave the whole model's tokens and logits: as a cell, and as a sentence.

Knows rows of `bench.jsonl` and records of `eval.json` as plain dicts. Compares nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from pregate.measure.table_format import Row

EQUAL = "yes"


def equality(row: Row) -> str | None:
    """`yes`, or in bold what differs; None where nothing was compared."""
    if row.get("logits_finite") is False:
        return "**NaN**"
    same, until = row.get("tokens_equal_resident"), row.get("tokens_equal_until")
    if same is None:
        return None
    if same:
        return "**logits NO**" if row.get("logits_equal_resident") is False else EQUAL
    return "**NO**" if until is None else f"**NO**, first {until:,}"


def equality_statement(rows: Sequence[Row], noun: str = "rows") -> str:
    """Whether all rows decoded the whole model's tokens with its logits, as a sentence, in bold if not; empty if
    nothing was compared."""
    broken = [row for row in rows if row.get("logits_finite") is False]
    if broken:
        return f"**Logits are NaN or infinite in {len(broken)} of {len(rows)} {noun}: {_policies(broken)}.**"
    found = []
    for what in ("Tokens", "Logits"):
        key = f"{what.lower()}_equal_resident"
        compared = [row for row in rows if row.get(key) is not None]
        if wrong := [row for row in compared if not row[key]]:
            where = f"{len(wrong)} of {len(compared)} {noun}: {_policies(wrong)}"
            found.append(f"**{what} differ from the whole model's in {where}.**")
    if found:
        return " ".join(found)
    compared = sum(row.get("tokens_equal_resident") is not None for row in rows)
    return f"Tokens equal the whole model's in {compared} of {compared} {noun} compared." if compared else ""


def _policies(rows: Sequence[Row]) -> str:
    return ", ".join(str(row.get("policy")) for row in rows)
