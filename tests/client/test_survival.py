"""A session among servers that fail at any moment: what it computes is what an undisturbed one does, or the typed error; it never hangs."""

from __future__ import annotations

import struct
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from petalnet.client.inputs import Inputs
from petalnet.client.server_side import ServerSide
from petalnet.p2p.fields import Blob
from tests.client.simulated import Caches, Machine, Simulated, blob_of, rows_of

BLOCKS = 6
LAYOUTS = [[(0, 2), (2, 4), (4, 6)], [(0, 3), (3, 6)], [(0, 6)], [(0, 1), (1, 5), (5, 6)]]
PATIENT_S = 900.0
"""Virtual seconds within which anything has to have ended."""


def order_blob(order: list[int]) -> Blob:
    return Blob("int64", (len(order),), "raw", bytearray().join(struct.pack("<q", row) for row in order))


async def live(seed: int, faults: int, steps: int) -> None:
    random = Random(seed)
    async with trio.open_nursery() as nursery:
        machines = [Machine(f"peer {copy} {first}", first, end) for copy in range(2) for first, end in random.choice(LAYOUTS)]
        machines += [Machine(f"good {first}", first, end) for first, end in random.choice(LAYOUTS)]
        swarm = Simulated(BLOCKS, machines, random, nursery)
        side = ServerSide(swarm.target(), 4096, 1)
        nursery.start_soon(side.prepare)

        async def spoil() -> None:
            for _ in range(faults):
                await trio.sleep(random.random() * 4.0 / faults)
                machine = random.choice(machines)
                kind = random.choice(["kill", "kill", "hang", "wake", "cut", "drain"])
                if kind == "cut":
                    swarm.cut.add((machine.peer_id, random.choice(machines).peer_id))
                elif kind == "wake" and machine.state == "hung":
                    machine.set("well")
                elif kind in ("kill", "hang") and machine.state == "well" and not machine.peer_id.startswith("good"):
                    machine.set("dead" if kind == "kill" else "hung")

        nursery.start_soon(spoil)
        reference = Caches(0, BLOCKS)
        rows, position = 1, 0
        with trio.fail_after(PATIENT_S):
            for _ in range(steps):
                order = None
                if position and random.random() < 0.3:
                    order = [random.randrange(rows) for _ in range(random.randint(1, 3))]
                    rows = len(order)
                if position and random.random() < 0.2:
                    position = random.randint(1, position)
                new = random.choice([1, 1, 1, 2, 70, 200])
                hidden = [[random.randrange(100) for _ in range(new)] for _ in range(rows)]
                inputs = Inputs(keep=random.choice([0, 1]) if new > 1 else 0)
                outputs = await side.step(blob_of(hidden), position, None if order is None else order_blob(order), inputs)
                expected = reference.take(position, hidden, order)
                kept = inputs.keep or new
                assert rows_of(outputs[0]) == [row[-kept:] for row in expected]
                position += new
                await trio.sleep(random.random() * 0.3)
        await side.close()
        nursery.cancel_scope.cancel()


@given(seed=st.integers(0, 2**32), faults=st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_among_servers_that_fail(seed: int, faults: int) -> None:
    trio.run(live, seed, faults, 12, clock=MockClock(autojump_threshold=0))


@pytest.mark.long
@given(seed=st.integers(0, 2**32), faults=st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_among_servers_that_fail_for_long(seed: int, faults: int) -> None:
    trio.run(live, seed, faults, 20, clock=MockClock(autojump_threshold=0))
