"""Servers that choose their blocks themselves: they spread, one goes where another died, and one that comes late fills what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalnet import AutoDistributedModelForCausalLM
from petalnet.errors import MissingBlocksError
from petalnet.models.checkpoint import DEMO_MODEL

from .conftest import NodeProcess

MODEL = Path(DEMO_MODEL)
IDS = torch.tensor([[40, 50, 60, 70]])


def log_says(node: NodeProcess, words: str, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while words not in node.log():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.long
def test_servers_spread_move_and_come_late(nodes) -> None:
    options = ("--serve", "4", "--dtype", "float32", "--throughput", "100")
    bootstrap = nodes.start("--bootstrap", "--new-swarm")

    def join() -> NodeProcess:
        return nodes.launch(MODEL, *options, "--initial-peers", *bootstrap.addrs)

    servers = [server.wait_ready() for server in [join(), join(), join()]]
    assert sorted(server.ready["span"] for server in servers) == [[0, 4], [4, 8], [8, 12]], "all three chose at the same moment"
    by_span: Callable[[int], NodeProcess] = lambda first: next(server for server in servers if server.ready["span"][0] == first)  # noqa: E731
    spare = join().wait_ready()
    assert spare.ready["span"] == [0, 4]

    model = AutoDistributedModelForCausalLM.from_pretrained(str(MODEL), initial_peers=bootstrap.addrs, dtype=torch.float32)
    local = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def answers() -> bool:
        expected = local.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        for _ in range(20):
            try:
                return torch.equal(model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False), expected)
            except MissingBlocksError:  # the client has not heard of it yet
                time.sleep(1)
        return False

    try:
        assert answers()
        by_span(8).kill()
        # The record of the dead runs out within 30 s; a hole has to last 10 s; then one of the two that hold blocks 0-3 goes.
        began = time.monotonic()
        movers = [spare, by_span(0)]
        while not any("online: blocks 8:12" in node.log() for node in movers):
            assert time.monotonic() - began < 120, [node.log() for node in movers]
            time.sleep(0.2)
        assert answers()
        mover = next(node for node in movers if "wanted at blocks 8:12: nobody serves some of them" in node.log())
        assert mover.process.poll() is None

        by_span(4).kill()
        late = join().wait_ready()
        assert log_says(late, "online: blocks 4:8", 120), late.log()
        assert answers()
    finally:
        model.close()
