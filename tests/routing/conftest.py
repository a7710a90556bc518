"""Records to test with. The clock of these tests stands at `NOW`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from petalnet.routing.records import ServerRecord

NOW = 1_800_000_000.0

# The first examples of a property pay for imports, on a machine that may be busy: no example has a time limit.
settings.register_profile("petalnet", deadline=None)
settings.load_profile("petalnet")


def build_record(peer: str = "P1", span: tuple[int, int] = (0, 4), **changes: Any) -> ServerRecord:
    values: dict[str, Any] = {
        "peer_id": peer,
        "addrs": (f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}",),
        "model": "ab" * 32,
        "model_name": "tiny",
        "span": span,
        "num_blocks": max(12, span[1]),
        "state": "online",
        "dtype": "float32",
        "sequence": 1,
        "issued": NOW,
        "expires": NOW + 90,
        "decode_tokens_s": 10.0,
        "prefill_tokens_s": 100.0,
        "forward_tokens_s": 200.0,
    }
    return ServerRecord(**(values | changes))


@pytest.fixture
def now() -> float:
    return NOW


@pytest.fixture(scope="session")
def record() -> Callable[..., ServerRecord]:
    return build_record
