"""Servers are killed, stopped, cut off, slowed, spoilt and drained in the middle of answers: each answer is what the local model writes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .conftest import Families, NodeProcess, Nodes
from .faults import KINDS, PROGRAM, ROOT, WITHIN_S, Case, Event, FaultySwarm, Writing, faulty_swarm, random_case, within
from .models import SPANS, connected, load_local, save_model

LLAMA = SPANS["llama"]
LAST = LLAMA[2]
QUICKLY = {
    "stop": (Writing("beams", prompt=20, tokens=10), 5),
    "kill": (Writing("greedy", prompt=9, tokens=12), 5),
    "garbage": (Writing("steps", prompt=90, tokens=5), 2),
}
"""Of the tests that take little time; who was stopped goes on later."""
MOMENTS = {
    "prefill": (Writing("greedy", prompt=330, tokens=6), -1),
    "decode": (Writing("greedy", prompt=9, tokens=16), 8),
    "between": (Writing("sampled", prompt=70, tokens=12), 5),
    "speculation": (Writing("guesses", prompt=12, tokens=48), 20),
    "rollback": (Writing("steps", prompt=90, tokens=6), 3),
    "beams": (Writing("beams", prompt=20, tokens=12), 6),
}
"""What is written, and after how many tokens or steps something happens."""


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultySwarm]:
    path = save_model("llama", tmp_path_factory.mktemp("llama"))
    with faulty_swarm(tmp_path_factory.mktemp("faults"), path, LLAMA) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def local(swarm: FaultySwarm) -> Any:
    return load_local(swarm.path)


@pytest.fixture(scope="module")
def replicas(families: Families, module_nodes: Nodes) -> list[NodeProcess]:
    """Servers of the last blocks of a model whose other blocks others use as well: one is left where all is lost that is to be."""
    first, end = LAST
    served = (families.paths["llama"], "--serve", f"{first}:{end}", "--dtype", "float32", "--throughput", "100")
    started = []
    for number in range(len(QUICKLY)):
        more = {"GARBAGE_FILE": str(module_nodes.folder / f"garbage-{number}"), "PYTHONPATH": str(ROOT)}
        (module_nodes.folder / f"garbage-{number}").write_text("nan")
        started.append(module_nodes.launch(*served, "--initial-peers", *families.peers, program=PROGRAM, environment=more))
    return [node.wait_ready() for node in started]


@pytest.mark.parametrize("kind", QUICKLY)
def test_an_answer_goes_on_without_a_server(families: Families, replicas: list[NodeProcess], kind: str) -> None:
    writing, after = QUICKLY[kind]
    path, (first, middle, _) = families.paths["llama"], families.servers["llama"]
    usable = {node.peer_id: node for node in replicas if node.process.poll() is None}
    sessions: list[Any] = []
    lost: list[NodeProcess] = []

    def act() -> None:
        lost.append(usable[sessions[0].hops[2].peer_id])
        lost[0].process.send_signal({"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "garbage": signal.SIGUSR1}[kind])

    try:
        allowed = [first.peer_id, middle.peer_id, *usable]
        with connected(path, families.peers, allowed_servers=allowed, request_timeout=30.0) as model:
            answer = within(WITHIN_S, lambda: writing.remote(model, {after: act}, sessions.append))
        assert torch.equal(answer, writing.local(load_local(path)))
        assert len(sessions[0].recoveries) == 1
        assert [hop.peer_id for hop in sessions[0].recoveries[0].lost] == [lost[0].peer_id]
    finally:
        for node in lost:
            node.process.send_signal(signal.SIGCONT)
            if kind == "garbage":
                node.kill()


def happens(swarm: FaultySwarm, local: Any, kind: str, moment: str, hop: int) -> None:
    writing, after = MOMENTS[moment]
    event = Event(kind, hop, after, amid=moment != "between")
    try:
        outcome = Case(swarm, writing, [event]).run(local)
        print(f"{kind} at {moment}, hop {hop}: {outcome.seconds:.2f} s, {outcome.recoveries} recoveries")
    finally:
        swarm.heal()


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_happens_whenever(swarm: FaultySwarm, local: Any, kind: str, moment: str) -> None:
    number = list(KINDS).index(kind) * len(MOMENTS) + list(MOMENTS).index(moment)
    happens(swarm, local, kind, moment, hop=(number + number // len(MOMENTS)) % len(LLAMA))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_random_schedules(swarm: FaultySwarm, local: Any, seed: int) -> None:
    case = random_case(swarm, seed)
    try:
        outcome = case.run(local)
        print(f"seed {seed}: {case}: {outcome.seconds:.2f} s, {outcome.recoveries} recoveries")
    finally:
        swarm.heal()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_swarm_in_use_leaves_nothing_behind() -> None:
    """Three minutes of what `scripts/soak.py` does for thirty."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "soak.py"), "--minutes", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
