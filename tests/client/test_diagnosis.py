"""Which server of a chain is gone and which link is cut, told from who answers what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petalnet.client.diagnosis import SLOW_LINK_BYTES_S, Diagnosis, diagnose
from petalnet.client.links import Link
from petalnet.client.pipeline import Pending
from petalnet.errors import PeerLost, PeerUnreachable
from petalnet.p2p.fields import Blob
from petalnet.p2p.session_messages import AskProgress, Progress, SessionOpened, Step
from petalnet.routing.routes import Hop

WITHIN_S = 0.6
STEP = 7


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Chain:
    """Servers that answer as they are told to; `reads` says what each session is at, None for one that does not answer.

    Attributes:
        silent: peers whose hosts do not answer.
        asked: the hops whose sessions were asked, in order.
    """

    def __init__(self, reads: list[tuple[int, int, int] | None], *, others: int = 1, direct: bool = True) -> None:
        self.reads = reads
        self.silent: set[str] = set()
        self.asked: list[int] = []
        self.pinged: list[str] = []
        self.links = [
            Link(Hop(f"peer {i}", (), i, i + 1), SimpleNamespace(send=self._sender(i)), SessionOpened(0))  # type: ignore[arg-type]
            for i in range(len(reads))
        ]
        self.others = [f"other {i}" for i in range(others)]
        host = SimpleNamespace(ping=self._ping, connected_peers=lambda: [*(link.hop.peer_id for link in self.links), *self.others])
        settings = SimpleNamespace(direct_chains=direct)
        self.target: Any = SimpleNamespace(settings=settings, swarm=SimpleNamespace(membership=SimpleNamespace(host=host)))

    async def _ping(self, peer_id: str, timeout_s: float) -> float:
        self.pinged.append(peer_id)
        if peer_id in self.silent:
            await trio.sleep(timeout_s)
            raise PeerUnreachable("nothing came", peer_id)
        await trio.sleep(0.01)
        return 0.01

    def _sender(self, index: int) -> Any:
        async def send(message: Any) -> None:
            assert isinstance(message, AskProgress)
            self.asked.append(index)
            read, link = self.reads[index], self.links[index]
            await trio.sleep(0.01)
            if read is not None and link.has_progress is not None:
                link.progress = Progress(message.nonce, *read)
                link.has_progress.set()

        return send

    async def diagnose(self, tokens: int = 1, reached: int = -1, carried: tuple[int, ...] = ()) -> Diagnosis:
        hidden = Blob("float32", (1, tokens, 1), "raw", bytes(4 * tokens))
        pending = Pending(Step(STEP, 0, hidden), reached=reached, carried=set(carried))
        return await diagnose(self.target, self.links, pending, WITHIN_S)


DONE, RUNNING, WAITING = (STEP, STEP, STEP), (STEP, STEP - 1, STEP - 1), (STEP - 1, STEP - 1, STEP - 1)


async def test_a_step_that_is_computed_is_waited_for(autojump_clock: MockClock) -> None:
    chain = Chain([DONE, RUNNING, WAITING])
    began = trio.current_time()
    assert (await chain.diagnose()).is_well
    assert trio.current_time() - began < WITHIN_S / 2, "nobody was silent"
    assert all(link.has_progress is None for link in chain.links)


@pytest.mark.parametrize("silent", [[0], [1], [2], [0, 2], [0, 1, 2]])
async def test_who_does_not_answer_is_gone(autojump_clock: MockClock, silent: list[int]) -> None:
    chain = Chain([None if i in silent else DONE for i in range(3)])
    chain.silent = {f"peer {i}" for i in silent}
    began = trio.current_time()
    assert await chain.diagnose() == Diagnosis(frozenset(silent))
    assert trio.current_time() - began == pytest.approx(WITHIN_S)


async def test_where_nobody_answers_at_all_it_is_this_machine(autojump_clock: MockClock) -> None:
    chain = Chain([None, None], others=5)
    chain.silent = {"peer 0", "peer 1", *chain.others}
    assert (await chain.diagnose()).is_well
    chain.silent -= set(chain.others)
    assert await chain.diagnose() == Diagnosis(frozenset({0, 1}))
    alone = Chain([None], others=0)
    alone.silent = {"peer 0"}
    assert await alone.diagnose() == Diagnosis(frozenset({0})), "nobody else could tell"


async def test_a_hop_that_has_answered_is_no_suspect(autojump_clock: MockClock) -> None:
    chain = Chain([None, RUNNING])
    chain.silent = {"peer 0"}
    assert (await chain.diagnose(reached=0, carried=(0,))).is_well


async def test_a_link_over_which_nothing_comes_is_cut(autojump_clock: MockClock) -> None:
    chain = Chain([DONE, DONE, WAITING])
    began = trio.current_time()
    assert await chain.diagnose() == Diagnosis(cut=1)
    assert trio.current_time() - began < WITHIN_S
    assert chain.asked.count(2) == 2, "it was asked again, since the step might have been on its way"
    stuck = Chain([(STEP, STEP, STEP - 1), WAITING])
    assert await stuck.diagnose() == Diagnosis(cut=0), "what cannot be sent as a whole either"


async def test_a_step_on_its_way_is_no_cut(autojump_clock: MockClock) -> None:
    chain = Chain([DONE, WAITING])
    async with trio.open_nursery() as nursery:

        async def arrive() -> None:
            await trio.sleep(0.1)
            chain.reads[1] = RUNNING

        nursery.start_soon(arrive)
        assert (await chain.diagnose()).is_well


async def test_long_outputs_take_their_time(autojump_clock: MockClock) -> None:
    chain = Chain([DONE, WAITING])
    tokens = int(SLOW_LINK_BYTES_S) // 2
    async with trio.open_nursery() as nursery:

        async def arrive() -> None:
            await trio.sleep(2.0)
            chain.reads[1] = RUNNING

        nursery.start_soon(arrive)
        assert (await chain.diagnose(tokens)).is_well


async def test_what_this_client_carries_is_no_cut(autojump_clock: MockClock) -> None:
    assert (await Chain([DONE, WAITING]).diagnose(reached=0, carried=(0,))).is_well
    assert (await Chain([DONE, WAITING], direct=False).diagnose()).is_well
    assert await Chain([DONE, WAITING]).diagnose(reached=0) == Diagnosis(cut=0), "it answered as all do where all outputs are wanted"


async def test_sessions_that_say_nothing_are_nobodys_fault(autojump_clock: MockClock) -> None:
    """Servers of an older version do not know the question."""
    chain = Chain([DONE, None, WAITING])
    assert (await chain.diagnose()).is_well


async def test_an_answer_to_an_earlier_question_is_not_taken(autojump_clock: MockClock) -> None:
    chain = Chain([None])
    async with trio.open_nursery() as nursery:

        async def answer_old() -> None:
            await trio.sleep(0.1)
            link = chain.links[0]
            assert link.has_progress is not None
            link.progress = Progress(1, STEP, STEP, STEP)
            link.has_progress.set()

        nursery.start_soon(answer_old)
        began = trio.current_time()
        assert (await chain.diagnose()).is_well
        assert trio.current_time() - began == pytest.approx(WITHIN_S)


async def test_a_stream_that_broke_meanwhile_is_left_to_its_reader(autojump_clock: MockClock) -> None:
    chain = Chain([DONE, DONE])

    async def broken(message: Any) -> None:
        raise PeerLost("gone", "peer 1")

    chain.links[1].stream = SimpleNamespace(send=broken)  # type: ignore[assignment]
    assert (await chain.diagnose()).is_well
