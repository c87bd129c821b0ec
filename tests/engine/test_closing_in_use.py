"""An engine that is closed or called again while it serves: from another thread that waits, from within a request it is
one clear error; no crash, and the next request is right."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from pregate.config import CacheRule
from pregate.engine.engine import OffloadEngine
from tests.engine.hostile import Streamer
from tests.engine.serving import ClosedBehind, Served, assert_same, assert_serves, request, serve

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("nothing_left_behind")]


def test_closing_waits_for_another_threads_request(served: Served, expected: tuple[Tensor, Tensor]) -> None:
    engine = OffloadEngine.open(served.directory, device_budget="20%", cache=CacheRule.lru)
    behind, got = ClosedBehind(), []
    hook = engine.model.decoder.block[1].register_forward_hook(behind.wait)
    behind.run(lambda: got.append(serve(engine)), engine.close)
    hook.remove()
    assert_same(got[0], expected)
    with pytest.raises(RuntimeError, match="closed: open it again"):
        serve(engine)


@pytest.mark.parametrize("where", ["layer", "streamer"])
@pytest.mark.parametrize("what", ["close", "generate", "forward"])
def test_a_request_cannot_be_served_or_closed_from_within_another(
    served: Served, expected: tuple[Tensor, Tensor], where: str, what: str
) -> None:
    """In the middle of a layer, where slabs are under way, and between two steps."""

    def call(*_: Any) -> None:
        if what == "close":
            engine.close()
        elif what == "generate":
            serve(engine)
        else:
            getattr(engine, what)(input_ids=request(1)["input_ids"], attention_mask=request(1)["attention_mask"])

    with OffloadEngine.open(served.directory, device_budget="20%", cache=CacheRule.lru) as engine:
        options = request(1)
        layer = engine.model.decoder.block[3].layer[0]
        hook = layer.register_forward_hook(call) if where == "layer" else None
        with pytest.raises(RuntimeError, match="is serving a request: call it again, or close it, when that request"):
            engine.generate(**options, **({"streamer": Streamer(call)} if hook is None else {}))
        if hook is not None:
            hook.remove()
        assert_serves(engine, expected)
        assert engine.counters.bytes_moved > 0
