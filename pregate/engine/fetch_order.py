"""In which order the experts that a block uses are fetched: those that serve most tokens first.

They keep the computation busy for longest while the others arrive. `fetch_policy` decides when fetching begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from pregate.models.expert_math import Grouping
from pregate.models.routing import DROPPED, Routing


def by_use(grouping: Grouping) -> list[tuple[int, int, int]]:
    """The runs of a grouping, those of most tokens first."""
    return sorted(grouping.groups, key=lambda group: group[1] - group[2])


def routed_experts(routing: Routing) -> Sequence[int]:
    """The ids a route uses, by how many tokens they serve, most first."""
    if routing.expert_ids_BTK.shape[:2].numel() == 1:
        return [expert for expert in routing.expert_ids_BTK.flatten().tolist() if expert != DROPPED]
    ids, counts = routing.expert_ids_BTK[routing.expert_ids_BTK != DROPPED].unique(return_counts=True)
    return ids[counts.argsort(descending=True, stable=True)].tolist()
