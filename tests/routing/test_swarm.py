from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from petalnet.routing import swarm
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import (
    FADES_AFTER,
    FIRST_LATE,
    FIRST_PENALTY,
    FORGIVEN_AFTER,
    LONGEST_LAST_RESORT,
    LONGEST_PENALTY,
    SwarmView,
    missing_blocks,
)

Build = Callable[..., ServerRecord]
MODEL = "ab" * 32


def peers(records: list[ServerRecord]) -> list[str]:
    return [record.peer_id for record in records]


def test_the_newest_record_of_a_server_stays_whichever_comes_last(record: Build, now: float) -> None:
    view = SwarmView()
    assert view.add(record("A", sequence=5, queue=1), now=now)
    version = view.version
    assert not view.add(record("A", sequence=5, queue=2), now=now)
    assert not view.add(record("A", sequence=4, queue=3), now=now)
    assert view.version == version
    assert view.add(record("A", sequence=6, queue=4), now=now)
    assert view.version > version
    assert [found.queue for found in view.servers(MODEL, now=now)] == [4]


def test_expired_records_do_not_count_and_go(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A", expires=now + 10), now=now)
    assert not view.add(record("B", expires=now + 10), now=now + 10)
    assert peers(view.servers(MODEL, now=now + 9.9)) == ["A"]
    assert view.servers(MODEL, now=now + 10) == []
    version = view.version
    view.expire(now + 10)
    assert view.record("A") is None and view.version > version


def test_a_server_that_left_is_not_brought_back_by_an_older_record(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A", sequence=2, state="left"), now=now)
    assert not view.add(record("A", sequence=1), now=now)
    assert view.servers(MODEL, now=now) == [] and view.models(now=now) == []


def test_servers_are_chosen_by_model_state_and_lists(record: Build, now: float) -> None:
    view = SwarmView()
    for peer, state in (("D", "online"), ("A", "online"), ("B", "joining"), ("C", "draining")):
        view.add(record(peer, state=state), now=now)
    view.add(record("E", model="other"), now=now)
    assert peers(view.servers(MODEL, now=now)) == ["A", "D"]
    assert peers(view.servers(now=now)) == ["A", "D", "E"]
    assert peers(view.servers(MODEL, now=now, states=("joining", "draining"))) == ["B", "C"]
    assert peers(view.servers(MODEL, now=now, allowed=["D", "E"])) == ["D"]
    assert peers(view.servers(MODEL, now=now, blocked=["D"])) == ["A"]


def test_a_failed_server_leaves_at_once_and_for_longer_each_time(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A", expires=now + 3000), now=now)
    penalties = []
    for _ in range(9):
        until = view.mark_failed("A", now=now)
        assert view.servers(MODEL, now=now) == []
        assert peers(view.servers(MODEL, now=now, include_failed=True)) == ["A"]
        assert view.mark_failed("A", now=now + 1) == until, "the same failure, reported by somebody else"
        penalties.append(until - now)
        now = until
        assert peers(view.servers(MODEL, now=now)) == ["A"]
    assert penalties[:3] == [FIRST_PENALTY, 2 * FIRST_PENALTY, 4 * FIRST_PENALTY]
    assert penalties == sorted(penalties) and penalties[-1] == LONGEST_PENALTY


def test_good_work_ends_a_penalty_and_time_alone_forgets_it(record: Build, now: float) -> None:
    """A server that fails with every second answer is not as good as new after each of the others."""
    view = SwarmView()
    view.add(record("A", expires=now + 3000), now=now)
    penalties = []
    for _ in range(4):
        penalties.append(view.mark_failed("A", now=now) - now)
        view.mark_ok("A")
        assert peers(view.servers(MODEL, now=now)) == ["A"] and not view.on_probation("A") and view.failed_until("A", now=now) is None
        now += 1
    assert penalties == [FIRST_PENALTY * 2**time for time in range(4)]
    now += penalties[-1] + 2 * FADES_AFTER
    assert view.mark_failed("A", now=now) - now == 4 * FIRST_PENALTY, "two of four have faded"
    later = now + 4 * FIRST_PENALTY + FORGIVEN_AFTER
    assert view.mark_failed("A", now=later) - later == FIRST_PENALTY
    view.expire(later + FIRST_PENALTY + FORGIVEN_AFTER)
    assert view.failed_until("A", now=later) is None


def test_being_there_again_makes_up_for_having_been_away_and_for_nothing_else(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A"), now=now)
    view.mark_failed("A", now=now)
    view.mark_connected("A")
    assert peers(view.servers(MODEL, now=now)) == ["A"] and not view.on_probation("A")
    until = view.mark_failed("A", now=now, wrong=True)
    assert until - now == 2 * FIRST_PENALTY
    view.mark_connected("A")
    assert view.servers(MODEL, now=now) == [] and view.failed_until("A", now=now) == until
    view.mark_ok("A")
    assert peers(view.servers(MODEL, now=now)) == ["A"]
    view.mark_failed("A", now=now)
    view.mark_failed("A", now=now + 1, wrong=True)
    view.mark_connected("A")
    assert view.on_probation("A"), "of two reports of a failure the worse one counts"


def test_a_late_server_is_doubtful_for_a_moment_and_never_out(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A", expires=now + 3000), now=now)
    version = view.version
    view.mark_late("A", now=now)
    assert view.version > version and view.is_doubtful("A", now=now) and not view.on_probation("A")
    assert peers(view.servers(MODEL, now=now)) == ["A"]
    assert not view.is_doubtful("A", now=now + FIRST_LATE)
    view.mark_ok("A")
    assert not view.is_doubtful("A", now=now), "forgotten at the first good answer"
    view.mark_late("A", now=now)
    view.expire(now + FIRST_LATE + FORGIVEN_AFTER)
    assert not view.is_doubtful("A", now=now)
    view.mark_late("A", now=now)
    assert view.mark_failed("A", now=now) - now == FIRST_PENALTY, "to be late counts as no failure"


def test_who_is_doubted_again_and_again_is_doubted_for_longer(record: Build, now: float) -> None:
    """Of two that may have spoilt something the one that did is there each time."""
    view = SwarmView()
    view.add(record("A", expires=now + 3000), now=now)
    for time in range(10):
        view.mark_late("A", now=now)
        view.mark_late("A", now=now + 1)
        lasts = min(FIRST_LATE * 2**time, LONGEST_PENALTY)
        assert view.is_doubtful("A", now=now + lasts - 0.1) and not view.is_doubtful("A", now=now + lasts)
        now += lasts
    view.mark_ok("A")
    view.mark_late("A", now=now)
    assert not view.is_doubtful("A", now=now + FIRST_LATE)


def test_a_clock_that_is_set_back_makes_no_penalty_longer(record: Build, now: float) -> None:
    view = SwarmView()
    view.mark_failed("A", now=now)
    view.mark_late("A", now=now)
    assert view.failed_until("A", now=now - 3600) is None
    assert view.mark_failed("A", now=now - 3600) - (now - 3600) <= LONGEST_PENALTY


def test_where_nobody_else_is_there_a_failed_server_is_asked_again_soon(record: Build, now: float) -> None:
    """And less and less often, within bounds."""
    view = SwarmView()
    view.add(record("A", expires=now + 3000), now=now)
    pauses = []
    for _ in range(9):
        until, failed_at = view.mark_failed("A", now=now), now
        assert view.servers(MODEL, now=now, last_resort=True) == []
        while not view.servers(MODEL, now=now, last_resort=True):
            now += 0.5
        assert now <= until and peers(view.servers(MODEL, now=now, include_failed=True)) == ["A"]
        pauses.append(now - failed_at)
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0] and max(pauses) == LONGEST_LAST_RESORT
    assert view.failed_until("A", now=now) is not None, "where others are, it stays out"


@given(st.lists(st.tuples(st.sampled_from(["fails", "is wrong", "is late", "works", "comes back"]), st.floats(0.0, 400.0)), max_size=60))
def test_penalties_are_bounded_and_nobody_is_exiled(record: Build, events: list[tuple[str, float]]) -> None:
    """Whatever happens, it is out for the longest penalty at most, where nobody else is there for less, and forgiven in the end."""
    now = 1_800_000_000.0
    view = SwarmView()
    for sequence, (what, pause) in enumerate(events):
        now += pause
        view.add(record("A", sequence=sequence, issued=now, expires=now + 3000), now=now)
        if what in ("fails", "is wrong"):
            before = view.failed_until("A", now=now)
            until = view.mark_failed("A", now=now, wrong=what == "is wrong")
            assert FIRST_PENALTY <= until - now <= LONGEST_PENALTY or until == before
            assert view.servers(MODEL, now=now) == []
        elif what == "is late":
            view.mark_late("A", now=now)
        elif what == "works":
            view.mark_ok("A")
            assert not view.is_doubtful("A", now=now)
        else:
            view.mark_connected("A")
        view.expire(now)
        assert (view.failed_until("A", now=now) or now) - now <= LONGEST_PENALTY
        assert peers(view.servers(MODEL, now=now + LONGEST_LAST_RESORT, last_resort=True)) == ["A"]
        assert peers(view.servers(MODEL, now=now + LONGEST_PENALTY)) == ["A"]
    now += LONGEST_PENALTY + FORGIVEN_AFTER
    view.expire(now)
    assert not view.is_doubtful("A", now=now) and view.mark_failed("A", now=now) - now == FIRST_PENALTY


def test_a_server_that_starts_anew_is_used_again_but_its_failures_count(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A", sequence=1), now=now)
    view.mark_failed("A", now=now)
    view.add(record("A", sequence=2), now=now)
    assert view.servers(MODEL, now=now) == [], "an announcement does not make up for a failure"
    view.add(record("A", sequence=3, state="joining"), now=now + 1)
    view.add(record("A", sequence=4), now=now + 2)
    assert peers(view.servers(MODEL, now=now + 2)) == ["A"]
    assert view.mark_failed("A", now=now + 2) - (now + 2) == 2 * FIRST_PENALTY


def test_a_server_whose_penalty_is_over_is_on_probation_until_it_works(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A"), now=now)
    assert not view.on_probation("A")
    until = view.mark_failed("A", now=now)
    assert peers(view.servers(MODEL, now=until)) == ["A"] and view.on_probation("A")
    view.mark_ok("A")
    assert not view.on_probation("A")


def test_forget_drops_the_record_and_the_failures(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A"), now=now)
    view.mark_failed("A", now=now)
    view.forget("A")
    assert view.record("A") is None and view.failed_until("A", now=now) is None
    view.forget("A")


def test_models_are_summed_up(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A", span=(0, 4)), now=now)
    view.add(record("B", span=(6, 12)), now=now)
    view.add(record("C", span=(3, 7), state="joining", model_name="misnamed"), now=now)
    view.add(record("D", model="other", model_name="big", num_blocks=4), now=now)
    tiny, big = view.models(now=now)
    assert (tiny.model, tiny.model_name, tiny.num_blocks, peers(list(tiny.servers))) == (MODEL, "tiny", 12, ["A", "B"])
    assert tiny.missing == (4, 5) and big.missing == () and big.model_name == "big"
    view.mark_failed("B", now=now)
    assert view.missing_blocks(MODEL, 12, now=now) == [4, *range(5, 12)]
    assert view.missing_blocks("unknown", 3, now=now) == [0, 1, 2]


def test_made_up_peers_do_not_fill_the_memory(record: Build, now: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "MAX_SERVERS", 2)
    view = SwarmView()
    assert view.add(record("A", expires=now + 10), now=now) and view.add(record("B"), now=now)
    assert view.add(record("B", sequence=2), now=now) and len(view) == 2
    assert view.add(record("C"), now=now + 10) and peers(view.servers(now=now + 10)) == ["B", "C"], "the expired one made room"


@pytest.mark.parametrize("first", [True, False])
def test_a_crowd_of_made_up_servers_replaces_one_another(record: Build, now: float, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """Whether the crowd or the honest ones come first: newcomers are heard, and what this node has to do with stays."""
    monkeypatch.setattr(swarm, "MAX_SERVERS", 200)
    view = SwarmView("own")
    view.follow("used")

    def crowd(batch: str) -> None:
        for number in range(1000):
            view.add(record(f"{batch}{number + 1}".replace("0", "x"), model="made-up"), now=now)
            assert len(view) <= 200

    if first:
        crowd("S")
    used, met = ([f"{letter}{number}" for number in range(111, 140) if number % 10] for letter in "UM")
    honest = [*used, *met, "own"]
    for peer in honest:
        assert view.add(record(peer, model="used" if peer.startswith("U") else "another"), now=now)
        if peer.startswith("M"):
            view.mark_ok(peer)
    crowd("T")
    assert set(honest) <= set(peers(view.servers(now=now)))
    for peer in used:
        view.mark_failed(peer, now=now)
    crowd("V")
    assert not set(used) & set(peers(view.servers(now=now, include_failed=True)))


def test_a_copy_of_an_old_record_does_not_bring_a_server_back(record: Build, now: float) -> None:
    view = SwarmView()
    view.add(record("A", sequence=2, state="left", expires=now + 60), now=now)
    view.expire(now + 60)
    assert view.record("A") is None and not view.is_news("A", 1)
    assert not view.add(record("A", sequence=1, issued=now + 50, expires=now + 500), now=now + 100)
    assert view.add(record("A", sequence=3, issued=now + 50, expires=now + 500), now=now + 100)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda span: span[0] < span[1]), max_size=5), st.integers(0, 11))
def test_missing_blocks_agrees_with_counting(record: Build, spans: list[tuple[int, int]], first: int) -> None:
    held = {block for a, b in spans for block in range(a, b)}
    records = [record(f"P{index + 1}", span=span) for index, span in enumerate(spans)]
    assert missing_blocks(records, first, 12) == [block for block in range(first, 12) if block not in held]


class ViewMachine(RuleBasedStateMachine):
    """Whatever is told to a view in whatever order, its answer is that of going through everything that was ever told."""

    build: Build

    def __init__(self) -> None:
        super().__init__()
        self.view = SwarmView()
        self.now = 1_800_000_000.0
        self.told: list[ServerRecord] = []
        self.failed: dict[str, float] = {}

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tidy(self) -> None:
        self.view.expire(self.now)

    @rule(peer=st.sampled_from("ABC"), sequence=st.integers(0, 6), state=st.sampled_from(["online", "draining"]), life=st.integers(1, 60))
    def announce(self, peer: str, sequence: int, state: str, life: int) -> None:
        record = ViewMachine.build(peer, sequence=sequence, state=state, issued=self.now, expires=self.now + life)
        known = [known for known in self.told if known.peer_id == peer]
        if self.view.add(record, now=self.now):
            assert all(other.sequence < sequence for other in known)
            self.told = [other for other in self.told if other.peer_id != peer] + [record]
        else:
            assert any(other.sequence >= sequence for other in known)

    @rule(peer=st.sampled_from("ABC"))
    def fails(self, peer: str) -> None:
        until = self.view.mark_failed(peer, now=self.now)
        assert FIRST_PENALTY <= until - self.now <= LONGEST_PENALTY or until == self.failed[peer]
        self.failed[peer] = until

    @rule(peer=st.sampled_from("ABC"))
    def works(self, peer: str) -> None:
        self.view.mark_ok(peer)
        self.failed.pop(peer, None)

    @invariant()
    def servers_are_those_that_live_and_did_not_fail(self) -> None:
        living = sorted(record.peer_id for record in self.told if record.state == "online" and record.expires > self.now)
        assert peers(self.view.servers(now=self.now, include_failed=True)) == living
        assert peers(self.view.servers(now=self.now)) == [peer for peer in living if self.failed.get(peer, 0) <= self.now]


def test_a_view_agrees_with_its_history(record: Build) -> None:
    ViewMachine.build = staticmethod(record)
    run_state_machine_as_test(ViewMachine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


def test_a_clock_that_is_set_back_keeps_nobody_for_longer(record: Build, now: float) -> None:
    """Neither the record of a server that is gone, nor its penalty, lasts for the hours by which the clock was ahead."""
    view = SwarmView()
    view.add(record("A"), now=now)
    until = view.mark_failed("A", now=now)
    back = now - 7200.0
    view.expire(back)
    assert view.failed_until("A", now=back + (until - now) - 0.1) is not None
    assert view.failed_until("A", now=back + (until - now) + 0.1) is None
    view.expire(back + 91.0)
    assert view.record("A") is None
