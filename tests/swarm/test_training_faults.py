"""Servers are killed, stopped, cut off, slowed, spoilt and drained in forward and backward passes and between them: the same gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from petalnet.client import passes
from petalnet.errors import short_id

from .conftest import Families, NodeProcess, Nodes
from .faults import KINDS, WITHIN_S, FaultySwarm, faulty_swarm, within
from .models import SPANS, connected, save_model
from .training import PROJECTIONS, Sides, load_sides, padded_batch
from .training_faults import MOMENTS, TUNING, WITHIN, TrainingCase, TrainingEvent, random_training

LLAMA = SPANS["llama"]
CASES = [(kind, moment) for kind in ("kill", "stop") for moment in MOMENTS] + [
    ("cut", "backward out"), ("late", "forward out"), ("drain", "forward in"), ("drain", "between"), ("drain", "backward in"),
    ("garbage:shape", "forward out"), ("garbage:shape", "backward in"), ("garbage:frames", "between"), ("garbage:error", "backward in"),
]  # fmt: skip
MOST_TRIES = 20
"""Passes until one of two servers has done one."""


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultySwarm]:
    path = save_model("llama", tmp_path_factory.mktemp("llama"))
    with faulty_swarm(tmp_path_factory.mktemp("faults"), path, LLAMA) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def sides(swarm: FaultySwarm) -> Iterator[Sides]:
    with connected(swarm.path, swarm.peers, **TUNING) as remote:
        yield load_sides(swarm.path, remote, prompts=True, deep=True, lora=PROJECTIONS["llama"], embeddings=True)


@contextmanager
def routes() -> Iterator[list[str]]:
    """The routes of passes, as the client logs them, while this is open."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    found: list[str] = []
    handler, logger = Collect(), logging.getLogger(passes.__name__)
    level, disabled = logger.level, logger.disabled
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # whatever an earlier test has set further up
    logger.disabled = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.disabled = disabled


@pytest.fixture(scope="module")
def doomed(families: Families, module_nodes: Nodes) -> NodeProcess:
    """A second server of the last blocks of a model, which says that it is quicker than the first: so it is asked."""
    first, end = LLAMA[-1]
    served = (families.paths["llama"], "--serve", f"{first}:{end}", "--dtype", "float32", "--throughput", "10000")
    return module_nodes.start(*served, "--initial-peers", *families.peers)


def test_gradients_without_the_server_that_did_the_forward_pass(families: Families, doomed: NodeProcess) -> None:
    """It is killed between forward and backward: others hold its blocks, and compute again what they need."""
    path, batch = families.paths["llama"], padded_batch("left")
    with connected(path, families.peers, **TUNING, show_route=True) as remote, routes() as passed:
        sides = load_sides(path, remote, prompts=True, deep=True, embeddings=True)

        def after_forward() -> None:
            if any(short_id(doomed.peer_id) in route for route in passed):
                doomed.kill()

        for _ in range(MOST_TRIES):
            found = within(WITHIN_S, lambda: sides.gradients(batch, after_forward))
            assert max(found.values()) < WITHIN, found
            if doomed.process.poll() is not None:
                break
        else:
            pytest.fail("the server that was to be lost was never asked")


def happens(swarm: FaultySwarm, sides: Sides, case: TrainingCase) -> None:
    try:
        case.run(sides)
        print(case, case.outcome)
    finally:
        swarm.heal()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "moment"), CASES)
def test_whatever_happens_whenever(swarm: FaultySwarm, sides: Sides, kind: str, moment: str) -> None:
    number = CASES.index((kind, moment))
    happens(swarm, sides, TrainingCase(swarm, [TrainingEvent(kind, number % len(LLAMA), 0, moment)], seed=number))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_random_schedules(swarm: FaultySwarm, sides: Sides, seed: int) -> None:
    happens(swarm, sides, random_training(swarm, seed, KINDS))
