"""Servers come and go: they are found, lost, replaced, and the swarm outlives the node that everybody entered by."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalnet import AutoDistributedModelForCausalLM
from petalnet.errors import MissingBlocksError
from petalnet.models.checkpoint import DEMO_MODEL

MODEL = Path(DEMO_MODEL)
IDS = torch.tensor([[40, 50, 60, 70]])


def expected(count: int) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).generate(
        IDS, max_new_tokens=count, min_new_tokens=count, do_sample=False
    )


def connect(peers: list[str], **options: object) -> torch.nn.Module:
    return AutoDistributedModelForCausalLM.from_pretrained(str(MODEL), initial_peers=peers, dtype=torch.float32, **options)


def generate(model: torch.nn.Module, count: int) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def test_a_killed_server_leaves_the_routes_at_once(nodes) -> None:
    """Of two replicas one is killed with SIGKILL: the next answer comes from the other, without a wait for any refresh."""
    servers = nodes.serve(MODEL, [(0, 6), (6, 12), (6, 12)])
    model = connect(servers[0].addrs)
    try:
        assert torch.equal(generate(model, 6), expected(6))
        for victim in servers[1:]:
            others = [server for server in servers[1:] if server is not victim]
            victim.kill()
            began = time.monotonic()
            answer = generate(model, 6)
            assert torch.equal(answer, expected(6))
            assert time.monotonic() - began < 10  # the bound of a first failed try, far below any record's life
            assert victim.peer_id not in {hop.peer_id for hop in model.transformer.h.route()}
            nodes.serve(MODEL, [(6, 12)], peers=servers[0].addrs)
            assert others
    finally:
        model.close()


@pytest.mark.long
@pytest.mark.parametrize("place", [0, 1])
def test_an_answer_goes_on_when_a_server_is_killed(nodes, place: int) -> None:
    """Whichever part of the chain it held: another server takes over, and the text is the same."""
    spans = [(0, 6), (6, 12)]
    servers = nodes.serve(MODEL, [*spans, spans[place]])
    model = connect(servers[1 - place].addrs)

    class Killer:
        """A streamer that kills one of the two replicas, the one in use, after three tokens."""

        count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if self.count == 4:
                victim = session.hops[place].peer_id
                next(server for server in servers if server.peer_id == victim).kill()

        def end(self) -> None:
            pass

    try:
        with model.inference_session(max_length=64) as session:
            options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
            answer = model.generate(IDS, streamer=Killer(), session=session, **options)
            assert torch.equal(answer, expected(30))
            (recovery,) = session.recoveries
            assert [(hop.first, hop.end) for hop in recovery.lost] == [spans[place]]
            assert model.last_trace.recoveries == [recovery]
        assert torch.equal(generate(model, 6), expected(6))
    finally:
        model.close()


def test_blocks_without_a_server_are_named(nodes) -> None:
    servers = nodes.serve(MODEL, [(0, 5), (8, 12)])
    with pytest.raises(MissingBlocksError, match="5-7") as caught:
        model = connect(servers[0].addrs, request_timeout=5, max_retries=1)
        generate(model, 2)
    assert caught.value.blocks == [5, 6, 7]


def test_the_swarm_outlives_its_bootstrap_node(nodes) -> None:
    bootstrap = nodes.start("--bootstrap")
    servers = nodes.serve(MODEL, [(0, 6), (6, 12)], peers=bootstrap.addrs)
    old = connect(bootstrap.addrs)
    try:
        assert torch.equal(generate(old, 4), expected(4))
        bootstrap.kill()
        late = nodes.serve(MODEL, [(0, 12)], peers=servers[1].addrs)[0]
        new = connect(servers[1].addrs)
        try:
            assert torch.equal(generate(new, 4), expected(4))
            servers[0].kill()  # now only the late joiner holds blocks 0-5, and the old client has to find it
            assert torch.equal(generate(old, 4), expected(4))
            assert late.peer_id in {hop.peer_id for hop in old.transformer.h.route()}
        finally:
            new.close()
    finally:
        old.close()


def test_a_server_drains_on_sigterm_and_exits_0(nodes) -> None:
    server = nodes.serve(MODEL, [(0, 12)])[0]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert not server.ready_file.exists()


@pytest.mark.long
def test_serve_a_number_takes_what_the_swarm_lacks(nodes) -> None:
    servers = nodes.serve(MODEL, [(0, 5), (9, 12)])
    third = nodes.start(MODEL, "--serve", "4", "--dtype", "float32", "--throughput", "100", "--initial-peers", *servers[0].addrs)
    assert third.ready["span"] == [5, 9]
