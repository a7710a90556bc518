"""A record that outlives its server, and looks better than all others, costs a client next to nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petalnet.p2p.identity import Identity
from petalnet.peering import open_peering
from petalnet.routing.records import ServerRecord

from .conftest import LAYERS, POOL_TOKENS, Servers


async def live_and_die(model: str, peers: list[str], addr: str, *, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
    """Announce a server of all blocks that is quicker than any, and vanish; its address takes connections and never says a word."""
    async with open_peering(Identity.generate(), initial_peers=peers, listen=(), server=True) as peering:
        now = time.time()
        record = ServerRecord(
            peer_id=peering.host.peer_id, addrs=(addr,), model=model, model_name="test", span=(0, LAYERS), num_blocks=LAYERS,
            state="online", dtype="float32", sequence=int(now * 1000), issued=now, expires=now + 600, free_kv_tokens=10**6,
            decode_tokens_s=1e6, prefill_tokens_s=1e6, forward_tokens_s=1e6,
        )  # fmt: skip
        stored = await peering.announce(record)
    task_status.started((peering.host.peer_id, stored))


def test_a_dead_servers_record_does_not_stall_a_client(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that says that it has no room would be no better than one that may be dead.
    monkeypatch.setitem(serving.__wrapped__.__globals__, "ServerRecord", partial(ServerRecord, free_kv_tokens=POOL_TOKENS))  # type: ignore[attr-defined]
    servers: Servers
    with serving(bloom_path, [(0, 3), (3, 6)]) as servers, socket.create_server(("127.0.0.1", 0)) as silent:
        addr = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        run = servers._nursery.start
        ghost, stored = trio.from_thread.run(run, live_and_die, servers.key, servers.peers, addr, trio_token=servers._token)
        assert stored == 3
        with connect(bloom_path, servers.peers, request_timeout=60) as model:
            began = time.monotonic()
            assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, min_new_tokens=4).shape == (1, 7)
            assert time.monotonic() - began < 4
            assert ghost not in {hop.peer_id for hop in model.transformer.h.route()}
            began = time.monotonic()
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, min_new_tokens=4)
            assert time.monotonic() - began < 1.5
