"""How often a request is tried, with which pauses, and what its last error tells."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petalnet.client.attempts import LONGEST_PAUSE_S, MOST_BLAMELESS, Attempts, Busy
from petalnet.client.requests import blamed, retrying
from petalnet.client.settings import ClientSettings
from petalnet.errors import (
    LONGEST_ANSWER,
    BusyError,
    CallerError,
    MissingBlocksError,
    MovedError,
    PeerLate,
    PeerLost,
    PeerUnreachable,
    PetalnetError,
    ProtocolError,
    ServerError,
    TooLargeError,
    from_wire,
    to_wire,
)
from petalnet.routing.routes import Hop


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def peer(name: str) -> str:
    return f"12D3KooWlong{name:a>6}"


class FakeTarget:
    """What `retrying` and `blamed` need of a target; `marks` says what became of servers."""

    def __init__(self, **settings: Any) -> None:
        self.settings = ClientSettings(**settings)
        self.marks: list[tuple[str, str]] = []
        self.swarm = self.membership = self

    def mark_failed(self, peer_id: str, wrong: bool = False) -> None:
        self.marks.append(("wrong" if wrong else "lost", peer_id))

    def mark_late(self, peer_id: str) -> None:
        self.marks.append(("late", peer_id))


class Attempt:
    """Answers with what is given, one after another, the last one for ever; `times` says when it was tried, `without` without whom."""

    def __init__(self, *outcomes: Exception | str) -> None:
        self.outcomes = list(outcomes)
        self.times: list[float] = []
        self.without: list[frozenset[str]] = []

    async def __call__(self, full: frozenset[str]) -> str:
        self.times.append(trio.current_time())
        self.without.append(full)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def run(attempt: Callable[[frozenset[str]], Awaitable[str]], at_stake: bool = False, **settings: Any) -> Any:
    return await retrying(FakeTarget(**settings), attempt, at_stake=at_stake)  # type: ignore[arg-type]


async def test_what_everybody_answered_is_told_in_the_end(autojump_clock: MockClock) -> None:
    a, b, c = peer("a"), peer("b"), peer("c")
    lost_a = PeerLost(f"server {a} (blocks 4-7): peer {a} ended the stream", a, said=f"peer {a} ended the stream")

    async def ask(full: frozenset[str]) -> str:
        if trio.current_time() == 0:
            await trio.sleep(1)
            raise lost_a
        if b not in full:
            raise Busy(BusyError("no room\nat all"), b)
        raise Busy(TooLargeError("never"), c) if c not in full else MissingBlocksError([4, 5], [a, b])

    with pytest.raises(BusyError) as caught:
        await run(ask, max_retries=1, request_timeout=20)
    assert caught.value.answers == {a: "ended the stream", b: "no room at all", c: "never"}
    assert "\n" not in "".join(caught.value.answers.values())

    attempt = Attempt(PeerLost("gone", a), ServerError("internal error", b), MissingBlocksError([4, 5], [a, b, c]))
    with pytest.raises(MissingBlocksError) as missing:
        await run(attempt, max_retries=3)
    assert missing.value.blocks == [4, 5] and missing.value.peers_asked == [a, b, c]
    assert missing.value.answers == {a: "gone", b: "internal error"}
    assert str(missing.value) == "no server holds blocks 4-5 (asked 3 peers: …aaaaaa: gone; …aaaaab: internal error; …aaaaac)"

    with pytest.raises(PeerLost) as lost:
        await run(Attempt(ServerError("internal error", b), PeerLost("gone", a)), max_retries=1)
    assert lost.value.peer_id == a and lost.value.answers == {b: "internal error", a: "gone"}
    assert str(lost.value) == "gone; before that …aaaaab: internal error"


def test_a_peers_words_are_cut_and_on_one_line() -> None:
    attempts = Attempts()
    for number in range(1000):
        attempts.note(peer(str(number)), ServerError("x\n\x1b[31m" * 1000))
    assert len(attempts.answers) < 100
    assert all(len(answer) <= LONGEST_ANSWER and answer.isprintable() for answer in attempts.answers.values())
    error = attempts.told(MissingBlocksError([0]))
    assert len(str(error)) < 3000 and "and 56 more" in str(error) and len(error.answers) == 64
    assert attempts.told(CallerError("yours")).args == ("yours",)


async def test_servers_that_come_back_are_waited_for(autojump_clock: MockClock) -> None:
    attempt = Attempt(PeerLost("gone", "a"), *[MissingBlocksError([0], ["a"])] * 10, "done")
    assert await run(attempt, at_stake=True, max_retries=1) == "done"
    pauses = [after - before for before, after in zip(attempt.times, attempt.times[1:], strict=False)]
    assert pauses[0] == 0.0 and all(pause >= 0.5 for pause in pauses[1:])

    attempt = Attempt(PeerLost("gone", "a"), MissingBlocksError([0], ["a"]))
    with pytest.raises(MissingBlocksError, match="gone"):
        await run(attempt, at_stake=True, max_retries=2, request_timeout=40)
    assert attempt.times[-1] - attempt.times[0] == pytest.approx(40, abs=2), "the bound is the user's"

    attempt = Attempt(MissingBlocksError([0], answers={"a": "failed a moment ago"}), "done")
    assert await run(attempt, at_stake=True) == "done" and attempt.times[1] > attempt.times[0], "one that died before may be back as well"

    dead = [MissingBlocksError([0], ["a"]), PeerUnreachable("nobody there", "a")]
    attempt = Attempt(PeerLost("gone", "a"), *dead * 10, "done")
    assert await run(attempt, at_stake=True, max_retries=1, request_timeout=180) == "done", "to ask one that is dead again costs no retry"
    began = trio.current_time()
    with pytest.raises(MissingBlocksError, match="a: nobody there"):
        await run(Attempt(PeerLost("gone", "a"), *dead * 1000), at_stake=True, max_retries=1, request_timeout=180)
    assert trio.current_time() - began == pytest.approx(30, abs=2)

    lost = PeerLost("gone", "a")
    for attempt, at_stake, retries in (
        (Attempt(MissingBlocksError([0])), False, 3),
        (Attempt(lost, MissingBlocksError([0])), False, 3),
        (Attempt(lost, MissingBlocksError([0])), True, 0),
    ):
        began = trio.current_time()
        with pytest.raises(PetalnetError):
            await run(attempt, at_stake=at_stake, max_retries=retries)
        assert trio.current_time() == began, "nothing would be lost, or there is to be no retry"


async def test_several_that_go_at_once_in_mid_answer_cost_no_retry(autojump_clock: MockClock) -> None:
    losses = [PeerLost("gone", peer(name)) for name in "abcdef"]
    assert await run(Attempt(*losses, "done"), at_stake=True, max_retries=1) == "done"
    for repeated, at_stake in ((losses[:1] * 4, True), (losses, False)):
        with pytest.raises(PeerLost):
            await run(Attempt(*repeated, "done"), at_stake=at_stake, max_retries=1)


async def test_who_was_late_is_asked_again_only_where_nobody_else_is(autojump_clock: MockClock) -> None:
    attempt = Attempt(PeerLate("hangs", "a"), PeerLate("hangs", "b"), MissingBlocksError([0]), "done")
    assert await run(attempt, max_retries=2) == "done"
    assert attempt.without == [frozenset(), {"a"}, {"a", "b"}, frozenset()]


async def test_without_end_is_not_without_pause(autojump_clock: MockClock) -> None:
    attempt = Attempt(*[ServerError("wrong", "a")] * 2000, "done")
    assert await run(attempt, max_retries=None) == "done"
    pauses = [after - before for before, after in zip(attempt.times, attempt.times[1:], strict=False)]
    assert pauses[0] == 0 and all(
        0 < before <= after + 1e-6 <= LONGEST_PAUSE_S + 1e-5 for before, after in zip(pauses[1:], pauses[2:], strict=False)
    )


async def test_what_nobody_is_to_blame_for_ends_also_without_bound(autojump_clock: MockClock) -> None:
    attempt = Attempt(ServerError("a replay was refused"))
    with pytest.raises(ServerError, match="refused"):
        await run(attempt, max_retries=None)
    assert len(attempt.times) == MOST_BLAMELESS + 1
    attempt = Attempt(*[PeerUnreachable("none of the initial peers answered")] * 20, "done")
    assert await run(attempt, max_retries=None) == "done", "a swarm may be there later"


async def test_the_callers_fault_is_nobody_elses(autojump_clock: MockClock) -> None:
    attempt = Attempt(CallerError("too long"))
    with pytest.raises(CallerError, match="too long"):
        await run(attempt)
    assert len(attempt.times) == 1


async def test_who_serves_other_blocks_now_is_gone_round(autojump_clock: MockClock) -> None:
    attempt = Attempt(Busy(MovedError("blocks 0:4 are not served here"), "a"), "done")
    assert await run(attempt) == "done" and attempt.times == [0, 0] and attempt.without == [frozenset(), {"a"}]
    attempt = Attempt(Busy(MovedError("blocks 0:4 are not served here"), "a"), MissingBlocksError([0]), "done")
    assert await run(attempt, max_retries=1) == "done", "somebody else comes in its place"
    assert attempt.without == [frozenset(), {"a"}, frozenset()] and attempt.times[2] > 0
    attempt = Attempt(Busy(MovedError("blocks 0:4 are not served here"), "a"), MissingBlocksError([0], ["a"]))
    with pytest.raises(MissingBlocksError, match="not served here"):
        await run(attempt, max_retries=0)


@pytest.mark.parametrize(
    ("error", "marks"),
    [
        (PeerLost("gone", "p"), [("lost", "p")]),
        (PeerUnreachable("gone", "p"), [("lost", "p")]),
        (PeerLate("hangs", "p"), [("late", "p")]),
        (ServerError("internal error", "p"), [("wrong", "p")]),
        (ProtocolError("garbage", "p"), [("wrong", "p")]),
        (BusyError("full"), []),
        (MovedError("elsewhere"), []),
        (TooLargeError("never"), []),
        (CallerError("yours"), []),
    ],
)
def test_whose_fault_an_error_is(error: PetalnetError, marks: list[tuple[str, str]]) -> None:
    target = FakeTarget()
    hop, before = Hop("p", (), 4, 8), Hop("q", (), 0, 4)
    became = blamed(target, hop, error)  # type: ignore[arg-type]
    assert target.marks == marks
    assert isinstance(became, Busy) == isinstance(error, (BusyError, TooLargeError))
    if isinstance(error, ServerError):
        assert type(became) is type(error) and str(became) == f"server p (blocks 4-7): {error}" and became.said == str(error)
    target.marks.clear()
    blamed(target, hop, error, before)  # type: ignore[arg-type]
    either = [("late", "q"), ("late", "p")]
    assert target.marks == (either if marks == [("wrong", "p")] else marks), "whoever brought it may be the one that is wrong"


@pytest.mark.parametrize("error", [CallerError("a"), TooLargeError("a"), BusyError("a", 3.0, 7), MovedError("a", 2.0), ServerError("a")])
def test_classes_travel(error: PetalnetError) -> None:
    came = from_wire(*to_wire(error), "p")
    assert type(came) is type(error)
    if isinstance(error, BusyError):
        assert isinstance(came, BusyError) and (came.retry_after_s, came.fits_tokens) == (error.retry_after_s, error.fits_tokens)
    assert type(from_wire("unheard of", "a", 0.0, 0, "p")) is ServerError
