"""Fair shares between peers: virtual time."""

from __future__ import annotations

from petalnet.blocks.shares import KNOWN_PEERS, Shares


def test_who_has_had_least_is_first_and_newcomers_start_where_the_least_is() -> None:
    shares = Shares()
    first, second = shares.enter("first", 0.0), shares.enter("second", 0.0)
    shares.charge(first, 3.0, 3.0)
    shares.charge(second, 2.0, 3.0)
    assert second.behind(3.0) < first.behind(3.0)
    shares.serve([first, second])
    newcomer = shares.enter("newcomer", 3.0)
    assert second.used == newcomer.used < first.used


def test_who_was_away_neither_saves_up_nor_is_forgiven_while_others_compete() -> None:
    shares = Shares()
    quiet, busy = shares.enter("quiet", 0.0), shares.enter("busy", 0.0)
    shares.leave(quiet, 0.0)
    shares.charge(busy, 50.0, 50.0)
    shares.serve([busy])
    assert shares.enter("quiet", 50.0).used == busy.used
    shares.charge(busy, 1.0, 51.0)
    shares.leave(busy, 51.0)
    shares.serve([quiet])
    assert shares.enter("busy", 51.5).used > quiet.used


def test_idle_time_forgives() -> None:
    shares = Shares()
    greedy = shares.enter("greedy", 0.0)
    shares.charge(greedy, 5.0, 5.0)
    shares.leave(greedy, 5.0)
    other = shares.enter("other", 7.0)
    assert shares.enter("greedy", 7.0).used == other.used + 3.0
    shares.leave(greedy, 7.0)
    shares.leave(other, 7.0)
    other = shares.enter("other", 60.0)
    assert shares.enter("greedy", 60.0).used == other.used


def test_time_without_service_counts_against_streams_of_newcomers() -> None:
    shares = Shares()
    waiting, other = shares.enter("waiting", 0.0), shares.enter("other", 0.0)
    shares.charge(waiting, 2.0, 2.0)
    shares.serve([other])
    assert shares.enter("newcomer", 3.0).behind(3.0) < waiting.behind(3.0)
    assert waiting.behind(5.0) < shares.enter("later newcomer", 5.0).behind(5.0)


def test_peers_that_are_gone_are_not_remembered_for_ever() -> None:
    shares = Shares()
    stays = shares.enter("stays", 0.0)
    for number in range(3 * KNOWN_PEERS):
        share = shares.enter(f"peer {number}", float(number))
        if number % 2:
            shares.charge(share, 1e6, float(number))
        shares.leave(share, float(number))
    assert len(shares) <= KNOWN_PEERS
    assert shares.enter("stays", 1e4) is stays
