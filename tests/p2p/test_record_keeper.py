"""What a node answers about records, and how its streams are shared: in virtual time, on streams of the test's own."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from petalnet.errors import BusyError, ProtocolError, RecordRejected, UnsupportedError
from petalnet.p2p import record_keeper as module
from petalnet.p2p.fields import Message
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Find, Ping, Records, Store, Stored
from petalnet.p2p.protocols import Limits
from petalnet.p2p.record_keeper import MAX_ANSWER_BYTES, MAX_ANSWER_RECORDS, SHORT_ANSWER_RECORDS, RecordKeeper, RecordService
from petalnet.p2p.record_store import RecordStore
from petalnet.p2p.signed import sign
from petalnet.routing.records import SWARM_KEY, ServerRecord, discovery_key

NOW = 1_800_000_000.0
KEY = discovery_key("m")


def record(server: Identity, sequence: int = 1, **changes: object) -> bytes:
    values = {
        "peer_id": server.peer_id, "addrs": (), "model": "m", "model_name": "", "span": (0, 100), "num_blocks": 100, "state": "online",
        "dtype": "float32", "sequence": sequence, "issued": NOW, "expires": NOW + 30,
    }  # fmt: skip
    return sign(server, ServerRecord(**(values | changes)).encode())  # type: ignore[arg-type]


@pytest.fixture
def news() -> list[bytes]:
    return []


@pytest.fixture
def keeper(news: list[bytes]) -> RecordKeeper:
    return RecordKeeper(RecordStore(), on_record=news.append, limits=Limits())


def fill(keeper: RecordKeeper, count: int, **changes: object) -> None:
    for number in range(count):
        server = Identity(number.to_bytes(32, "big"))
        stored = keeper.answer(Store((KEY,), record(server, **changes)), peer_id=server.peer_id, source=str(number), now=NOW)
        assert isinstance(stored, Stored)


def test_records_are_kept_and_told_with_their_age(keeper: RecordKeeper, news: list[bytes]) -> None:
    server = Identity.generate()
    data = record(server)
    ask = {"peer_id": server.peer_id, "source": "s", "now": NOW}
    assert keeper.answer(Store((KEY, SWARM_KEY), data), **ask) == Stored(newest=1, counts=(1, 1))
    assert keeper.answer(Store((KEY, SWARM_KEY), data), **ask) == Stored(newest=1, counts=(1, 1))
    assert news == [data]
    later = ask | {"now": NOW + 12}
    assert keeper.answer(Find(KEY), **later) == Records((data,), (12.0,), 1)
    assert keeper.answer(Find(discovery_key("other")), **later) == Records(())
    keeper.answer(Store((KEY,), record(server, 2)), **later)
    assert keeper.answer(Store((KEY,), data), **later) == Stored(newest=2, counts=(1,))


def test_what_is_not_right_is_refused(keeper: RecordKeeper) -> None:
    server, other = Identity.generate(), Identity.generate()
    for request, kind in (
        (Store((KEY,), record(other)), RecordRejected),
        (Store((discovery_key("other"),), record(server)), RecordRejected),
        (Store((), record(server)), ProtocolError),
        (Store((KEY,) * 3, record(server)), ProtocolError),
        (Store((b"short",), record(server)), ProtocolError),
        (Ping(1), UnsupportedError),
    ):
        with pytest.raises(kind):
            keeper.answer(request, peer_id=server.peer_id, source="s", now=NOW)
    assert len(keeper.store) == 0


def test_answers_are_bounded_in_number_and_bytes(keeper: RecordKeeper) -> None:
    fill(keeper, MAX_ANSWER_RECORDS + 44)
    answer = keeper.answer(Find(KEY), peer_id="p", source="s", now=NOW)
    assert isinstance(answer, Records) and len(answer.records) == MAX_ANSWER_RECORDS and answer.count == MAX_ANSWER_RECORDS + 44
    large = RecordKeeper(RecordStore(), on_record=lambda data: None, limits=Limits())
    fill(large, 250, block_digests=tuple(f"{number:032x}" for number in range(100)), adapters=("a" * 100,) * 10)
    answer = large.answer(Find(KEY), peer_id="p", source="s", now=NOW)
    assert isinstance(answer, Records) and len(answer.records) < answer.count == 250
    assert sum(map(len, answer.records)) <= MAX_ANSWER_BYTES


def test_who_asks_too_much_waits_and_the_others_do_not(keeper: RecordKeeper) -> None:
    fill(keeper, 256)
    served = 0
    with pytest.raises(BusyError) as busy:
        for _ in range(1000):
            keeper.answer(Find(KEY), peer_id="greedy", source="s", now=NOW)
            served += 1
    assert 8 <= served < 100 and busy.value.retry_after_s > 0
    keeper.answer(Find(KEY), peer_id="modest", source="s", now=NOW)
    with pytest.raises(BusyError):  # new identities from the same place help only so far
        for number in range(1000):
            keeper.answer(Find(KEY), peer_id=f"sybil {number}", source="s", now=NOW)
    keeper.answer(Find(KEY), peer_id="modest", source="elsewhere", now=NOW)
    keeper.answer(Find(KEY), peer_id="greedy", source="s", now=NOW + 60)


def test_where_all_together_ask_too_much_everybody_gets_a_little(keeper: RecordKeeper) -> None:
    fill(keeper, 256)
    for number in range(2000):
        answer = keeper.answer(Find(KEY), peer_id=str(number), source=str(number), now=NOW)
        assert isinstance(answer, Records)
        if len(answer.records) < 256:
            break
    assert len(answer.records) == SHORT_ANSWER_RECORDS and answer.count == 256


# ---- streams


class FakeStream:
    """A stream on which requests come when the test puts them in."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.put, self._requests = trio.open_memory_channel[Message](10)
        self.answers: list[Message] = []
        self.over = trio.Event()

    async def receive(self) -> Message | None:
        return await self._requests.receive()

    async def send(self, message: Message) -> None:
        self.answers.append(message)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_streams_that_wait_give_way_to_new_ones_from_elsewhere(
    keeper: RecordKeeper, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(module, "STREAMS_SHARED_FROM", 10)
    offences: list[str] = []
    service = RecordService(
        keeper,
        source=lambda peer_id: peer_id.partition(" ")[0],
        clock=lambda: NOW,
        on_offence=lambda peer_id, reason: offences.append(peer_id),
    )

    async def open_one(peer_id: str) -> FakeStream:
        stream = FakeStream(peer_id)

        async def serve() -> None:
            await service.serve(stream)  # type: ignore[arg-type]
            stream.over.set()

        nursery.start_soon(serve)
        await wait_all_tasks_blocked()
        await trio.sleep(1)
        return stream

    honest = await open_one("home alice")
    crowd = [await open_one(f"crowd {number}") for number in range(9)]
    others = [await open_one(f"office {number}") for number in range(5)]
    assert not honest.over.is_set() and not any(stream.over.is_set() for stream in others)
    assert [stream.over.is_set() for stream in crowd] == [True] * 5 + [False] * 4
    for stream in (honest, *others, crowd[-1]):
        stream.put.send_nowait(Find(KEY))
    server = Identity.generate()
    honest.put.send_nowait(Store((KEY,), record(server)))
    await wait_all_tasks_blocked()
    assert all(stream.answers[0] == Records(()) for stream in (honest, *others, crowd[-1]))
    assert isinstance(honest.answers[1], Error) and offences == ["home alice"], "a record of somebody else"
    nursery.cancel_scope.cancel()
