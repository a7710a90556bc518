"""Chains of real services that lose servers at moments drawn by chance: what comes out is what one span of all blocks computes.

The client is the simplest that can be: whatever was under way when a server is lost, it resumes the others, has what is lost rebuilt, and
gives the steps that were not answered once more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import trio

from petalnet.p2p.host import Stream
from petalnet.p2p.messages import Error
from petalnet.p2p.session_messages import KEEP_NONE, LinkDown, Replay, Resume, Resumed, SessionOpened, StepDone
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.chained import HIDDEN, Chain, ClientSession, Server, chain_of, receive
from tests.blocks.spans import DEVICES

pytestmark = DEVICES

ROWS, LONGEST = 2, 150
CUTS = (1, 3)
SPANS = ((0, 1), (1, 3), (3, 4))


@dataclass
class Pending:
    """A step that was given."""

    position: int
    hidden: torch.Tensor
    order: list[int] | None
    number: int = 0


@dataclass
class Client:
    """The client of one session.

    Attributes:
        inputs: what went in, [rows, KV entries that all servers have, hidden].
    """

    chain: Chain
    session: ClientSession
    hops: list[Server]
    chance: random.Random
    inputs: torch.Tensor = field(default_factory=lambda: torch.zeros(ROWS, 0, HIDDEN))
    lost: int = 0

    def draw(self) -> list[Pending]:
        """A token, a chunk, or several; maybe after going back, or with rows in another order."""
        chance, length = self.chance, self.inputs.shape[1]
        order: list[int] | None = None
        if length and chance.random() < 0.3:
            length = chance.randrange(max(1, length - 20), length + 1)
        if length and chance.random() < 0.3:
            order = [chance.randrange(ROWS) for _ in range(ROWS)]
        steps = []
        for _ in range(chance.choice((1, 1, 1, 3))):
            tokens = min(chance.choice((1, 1, 4, 40)), LONGEST - length)
            if tokens > 0:
                hidden = torch.randn(ROWS, tokens, HIDDEN, generator=torch.Generator().manual_seed(chance.randrange(1 << 30)))
                steps.append(Pending(length, hidden, order))
                length, order = length + tokens, None
        return steps

    def done(self, steps: list[Pending]) -> None:
        """These have been answered."""
        for step in steps:
            kept = self.inputs[:, : step.position]
            self.inputs = torch.cat([kept if step.order is None else kept[step.order], step.hidden], 1)

    async def give(self, steps: list[Pending]) -> None:
        for step in steps:
            extras = {} if step.order is None else {"order": torch.tensor(step.order)}
            request = self.session.step(step.hidden, step.position, **extras)
            step.number = request.step
            await self.session.streams[0].send(request)

    async def answers(self, steps: list[Pending]) -> None:
        """Take the answers of steps, and see that they are right."""
        for step in steps:
            answer = await self.hear(-1, StepDone)
            assert (answer.step, answer.position) == (step.number, step.position + step.hidden.shape[1])
            self.done([step])
            expected = self.chain.whole(self.inputs)[-1][:, step.position :]
            torch.testing.assert_close(decode_tensor(answer.output), expected, atol=1e-5, rtol=1e-4)

    async def hear(self, hop: int, kind: type) -> StepDone:
        """The next message of its kind; what is of former times is passed over."""
        while True:
            message = await receive(self.session.streams[hop])
            if isinstance(message, kind):
                return message  # type: ignore[no-any-return]
            assert isinstance(message, (LinkDown, StepDone)) or (isinstance(message, Error) and message.step), message

    async def begin(self, hop: int) -> Stream:
        peers = self.peers
        return await self.chain.begin(self.hops[hop], self.session.id, takes_from=peers[hop], pushes_to=peers[hop + 2], promise_rows=ROWS)

    @property
    def peers(self) -> list[str]:
        return ["", *(server.peer_id for server in self.hops), ""]

    async def mend(self, gone: list[int], steps: list[Pending]) -> None:
        """Have others take the place of servers, and bring all to where the first of these steps begins."""
        session, position = self.session, min(self.inputs.shape[1], steps[0].position if steps else LONGEST)
        order, order_step = (steps[0].order, steps[0].number) if steps else (None, 0)
        others = [server for server in (*self.chain.servers, *self.chain.spares) if server not in self.hops]
        for hop in gone:
            await session.streams[hop].reset()
            span = self.hops[hop].service.span
            self.hops[hop] = next(
                server for server in others if (server.service.span.first, server.service.span.end) == (span.first, span.end)
            )
        survivors = [hop for hop in range(len(self.hops)) if hop not in gone]
        peers = self.peers
        for hop in survivors:
            blob = None if order is None else encode_tensor(torch.tensor(order))
            await session.streams[hop].send(Resume(session.steps, position, peers[hop], peers[hop + 2], order_step, blob))
        for hop in gone:
            session.streams[hop] = await self.begin(hop)
            assert isinstance(await receive(session.streams[hop]), SessionOpened)
        for hop in survivors:
            assert await self.hear(hop, Resumed) == Resumed(position, ROWS)
        self.inputs = self.inputs[:, :position] if order is None else self.inputs[order, :position]
        for run in runs(gone):
            await self.rebuild(run[0], run[-1], position)
        for step in steps:
            step.order = None

    async def rebuild(self, first: int, last: int, position: int) -> None:
        session, end = self.session, self.hops[last].service.span.end
        starts = range(0, position, 64)
        for start in starts:
            stop = min(start + 64, position)
            if first:
                session.steps += 1
                await session.streams[first - 1].send(Replay(session.steps, start, stop - start, until=end))
            else:
                await session.streams[0].send(session.step(self.inputs[:, start:stop], start, keep=KEEP_NONE, until=end))
        for start in starts:
            done = await self.hear(last, StepDone)
            assert (done.position, done.output.shape[1]) == (min(start + 64, position), 0)


def runs(hops: list[int]) -> list[list[int]]:
    """Hops that follow each other, together."""
    found: list[list[int]] = []
    for hop in sorted(hops):
        if found and found[-1][-1] == hop - 1:
            found[-1].append(hop)
        else:
            found.append([hop])
    return found


async def play(folder: Path, seed: int, visits: int) -> None:
    chance = random.Random(seed)
    async with chain_of(folder, CUTS, spares=SPANS, pool=4096) as chain, chain.session() as session:
        client = Client(chain, session, list(chain.servers), chance)
        for _ in range(visits):
            steps = client.draw()
            if not steps:
                client.inputs = client.inputs[:, :20]
                continue
            await client.give(steps)
            if client.inputs.shape[1] and chance.random() < 0.5:
                answered = chance.randrange(len(steps) + 1)
                await client.answers(steps[:answered])
                if chance.random() < 0.5:
                    await trio.sleep(chance.random() * 0.02)  # so that it is lost at any moment
                gone = sorted(chance.sample(range(3), chance.choice((0, 1, 1, 1, 2))))
                rest = steps[answered:]
                await client.mend(gone, rest)
                client.lost += len(gone)
                await client.give(rest)
                await client.answers(rest)
            else:
                await client.answers(steps)
        assert client.lost


async def test_servers_are_lost_at_any_moment(saved: Callable[..., Path]) -> None:
    await play(saved("llama"), 0, 12)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 12))
async def test_servers_are_lost_at_many_moments(saved: Callable[..., Path], seed: int) -> None:
    await play(saved("llama"), seed, 60)
