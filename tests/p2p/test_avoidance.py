from __future__ import annotations

from petalnet.p2p.avoidance import FORGIVEN_AFTER, Avoidance, Reason


def test_a_peer_is_avoided_for_longer_each_time() -> None:
    avoidance, now, penalties = Avoidance(), 0.0, []
    for _ in range(12):
        until = avoidance.add("a", Reason.SILENT, now)
        assert avoidance.add("a", Reason.SILENT, now + 1) == until, "asked before, by somebody else"
        assert avoidance.is_avoided("a", now) and not avoidance.is_avoided("b", now)
        penalties.append(until - now)
        now = until
        assert not avoidance.is_avoided("a", now)
    assert penalties[:3] == [30, 60, 120] and penalties[-1] == 3600 and penalties == sorted(penalties)


def test_failures_are_forgotten_after_as_long_again() -> None:
    avoidance = Avoidance()
    until = avoidance.add("a", Reason.SILENT, 0.0)
    later = until + FORGIVEN_AFTER
    avoidance.expire(later - 1)
    assert avoidance.add("a", Reason.SILENT, later - 1) - (later - 1) == 60
    assert avoidance.add("b", Reason.LYING, 0.0) == 600
    avoidance.expire(1e6)
    assert avoidance.add("a", Reason.SILENT, 1e6) - 1e6 == 30


def test_connecting_disproves_only_that_it_cannot_be_reached() -> None:
    avoidance = Avoidance()
    for peer, reason in {"a": Reason.UNREACHABLE, "b": Reason.UNSERVED, "c": Reason.SILENT, "d": Reason.LYING}.items():
        avoidance.add(peer, reason, 0.0)
        avoidance.connected(peer, 1.0)
    assert [avoidance.is_avoided(peer, 1.0) for peer in "abcd"] == [False, False, True, True]
    assert avoidance.add("a", Reason.UNREACHABLE, 2.0) == 32.0, "lifted, not forgotten"


def test_a_worse_reason_replaces_a_better_one_and_never_shortens_it() -> None:
    avoidance = Avoidance()
    avoidance.add("a", Reason.LYING, 0.0)
    assert avoidance.add("a", Reason.UNREACHABLE, 10.0) == 600.0
    assert avoidance.is_avoided("a", 599.0)


def test_what_is_remembered_is_bounded() -> None:
    avoidance = Avoidance(capacity=3)
    avoidance.add("liar", Reason.LYING, 0.0)
    for number in range(10):
        avoidance.add(str(number), Reason.UNREACHABLE, float(number))
    assert avoidance.is_avoided("liar", 100.0) and avoidance.is_avoided("9", 10.0) and not avoidance.is_avoided("2", 10.0)
