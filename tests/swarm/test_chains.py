"""Chains of three real server processes: outputs go from server to server, which the servers count themselves, and answers are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet.inspection import ask_nodes

from .conftest import Families, NodeProcess, Nodes
from .models import BLOCKS, SPANS, Pair, connected, ids, load_local, padded, save_model

GREEDY = {"do_sample": False}
THIRDS = [(0, 2), (2, 4), (4, BLOCKS["bloom"])]


@dataclass
class Links:
    """What the servers of a chain count, first to last."""

    nodes: Nodes
    servers: list[NodeProcess]

    def count(self) -> list[dict[str, int]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PETALNET_STATE_DIR", self.nodes.environment()["PETALNET_STATE_DIR"])
            reports = {report["peer_id"]: report["engine"]["links"] for report in ask_nodes() if report["engine"]}
        return [reports[server.peer_id] for server in self.servers]


class Counted:
    """What changed at the servers, and the steps that the client took, while in its `with`."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def __enter__(self) -> Counted:
        self._before = self._links.count()
        return self

    def __exit__(self, *exc: object) -> None:
        self._after = self._links.count()

    def __call__(self, what: str) -> list[int]:
        """A counter's change at each server, first to last."""
        return [after[what] - before[what] for before, after in zip(self._before, self._after, strict=True)]


@pytest.fixture(scope="module", params=["bloom", "llama"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, Links]]:
    """A model that three servers share, and the same on this machine."""
    family = request.param
    if len(SPANS[family]) == 3:
        families: Families = request.getfixturevalue("families")
        path, peers, links = families.paths[family], families.peers, Links(families.nodes, families.servers[family])
    else:
        nodes: Nodes = request.getfixturevalue("module_nodes")
        path = save_model(family, tmp_path_factory.mktemp(family))
        servers = nodes.serve(path, THIRDS)
        peers, links = servers[0].addrs, Links(nodes, servers)
    with connected(path, peers) as remote:
        yield Pair(family, path, load_local(path), remote), links


def relayed(model: Any) -> list[int]:
    """Of the last answer, how many of each server's outputs came through this process, by its trace."""
    return [hop.relayed_steps for hop in model.last_trace.hops]


def test_every_output_of_an_answer_goes_to_the_next_server(chain: tuple[Pair, Links]) -> None:
    pair, links = chain
    with Counted(links) as counted:
        pair.same(ids(1, 9, seed=1), max_new_tokens=24, **GREEDY)
    steps = pair.remote.last_trace.steps
    assert 2 < steps <= 24 and relayed(pair.remote) == [0, 0, 0]
    assert counted("pushed_steps") == [steps, steps, 0]
    assert counted("relayed_steps") == [0, 0, 0]
    # Each token's hidden states, at least: 64 features in float32.
    assert all(count >= (9 + 23) * 64 * 4 for count in counted("pushed_bytes")[:2])


def test_all_ways_to_write_go_directly(chain: tuple[Pair, Links]) -> None:
    pair, links = chain
    steps = 0
    tokens, mask = padded("left")
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": 50}
    with Counted(links) as counted:
        for inputs, options in (
            (ids(2, 9, seed=2), {"num_beams": 5, **GREEDY}),
            (ids(1, 8, seed=3), sampled),
            (ids(2, 5, seed=4), {"num_return_sequences": 3, **sampled}),
            (tokens, {"attention_mask": mask, **GREEDY}),
        ):
            pair.same(inputs, max_new_tokens=12, **options)
            steps += pair.remote.last_trace.steps
            assert relayed(pair.remote) == [0, 0, 0]
    assert counted("pushed_steps") == [steps, steps, 0] and counted("relayed_steps") == [0, 0, 0]


def test_a_session_that_goes_back_goes_directly(chain: tuple[Pair, Links]) -> None:
    pair, links = chain
    tokens = ids(1, 20, seed=5)
    with Counted(links) as counted, pair.remote.inference_session(max_length=64) as session, torch.inference_mode():
        pair.remote(tokens)
        for position in (12, 3, 19):
            session.position = position
            answer = pair.remote(tokens[:, position:]).logits
            expected = pair.local(tokens).logits[:, position:]
            assert (answer - expected).abs().max() < 1e-3
        session.position = 10
        options = {"max_new_tokens": 8, **GREEDY}
        assert torch.equal(pair.remote.generate(tokens[:, 10:], **options), pair.local.generate(tokens, **options)[:, 10:])
        assert session.trace.steps > 1
    first, second, last = counted("pushed_steps")
    assert first == second > 4 and last == 0 and counted("relayed_steps") == [0, 0, 0]


def test_all_hidden_states_come_from_every_server(chain: tuple[Pair, Links]) -> None:
    """Each server answers with its blocks' outputs, and the last block's go on directly all the same."""
    pair, links = chain
    tokens = ids(2, 11, seed=6)
    with Counted(links) as counted, torch.inference_mode(), pair.remote.inference_session(max_length=16):
        answer = pair.remote(tokens, output_hidden_states=True)
    with torch.inference_mode():
        expected = pair.local(tokens, output_hidden_states=True)
    assert len(answer.hidden_states) == len(expected.hidden_states)
    assert all((one - other).abs().max() < 1e-3 for one, other in zip(answer.hidden_states, expected.hidden_states, strict=True))
    assert counted("pushed_steps") == [1, 1, 0] and counted("relayed_steps") == [0, 0, 0]


def test_only_the_link_that_cannot_be_is_carried_by_the_client(nodes: Nodes, tmp_path: Path) -> None:
    path = save_model("bloom", tmp_path / "model")
    options = ("--dtype", "float32", "--throughput", "100")
    third = nodes.start(path, "--serve", "4:5", *options, "--new-swarm")
    first = nodes.start(path, "--serve", "0:2", *options, "--initial-peers", *third.addrs)
    second = nodes.start(path, "--serve", "2:4", *options, "--initial-peers", *third.addrs, "--block-peers", first.peer_id)
    links = Links(nodes, [first, second, third])
    with connected(path, third.addrs) as remote:
        pair = Pair("bloom", path, load_local(path), remote)
        with Counted(links) as counted:
            pair.same(ids(1, 7, seed=7), max_new_tokens=12, **GREEDY)
            steps = remote.last_trace.steps
            assert relayed(remote) == [steps, 0, 0]
            pair.same(ids(2, 7, seed=8), max_new_tokens=12, num_beams=3, **GREEDY)
            steps += remote.last_trace.steps
    assert counted("pushed_steps") == [0, steps, 0]
    assert counted("relayed_steps") == [steps, 0, 0]
    assert counted("failed")[0] == 2  # one a session


def test_a_client_may_ask_for_all_outputs(chain: tuple[Pair, Links]) -> None:
    """With `direct_chains=False` everything goes through the client, and nothing from server to server."""
    pair, links = chain
    with connected(pair.path, links.servers[0].addrs, direct_chains=False) as remote, Counted(links) as counted:
        Pair(pair.family, pair.path, pair.local, remote).same(ids(1, 9, seed=9), max_new_tokens=8, **GREEDY)
    assert counted("pushed_steps") == [0, 0, 0] and relayed(remote) == [remote.last_trace.steps] * 2 + [0]
