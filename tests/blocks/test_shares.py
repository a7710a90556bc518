"""Fair shares between networks and their peers: virtual time."""

from __future__ import annotations

from petalnet.blocks.shares import KNOWN_NETWORKS, KNOWN_PEERS, PEERS_OF_A_NETWORK, Claim, Level, Shares


def test_who_has_had_least_is_first_and_newcomers_start_where_the_least_is() -> None:
    shares = Level(10)
    first, second = shares.enter("first", 0.0), shares.enter("second", 0.0)
    first.charge(3.0, 3.0)
    second.charge(2.0, 3.0)
    assert second.behind(3.0) < first.behind(3.0)
    shares.serve([first, second])
    newcomer = shares.enter("newcomer", 3.0)
    assert second.used == newcomer.used < first.used


def test_who_was_away_neither_saves_up_nor_is_forgiven_while_others_compete() -> None:
    shares = Level(10)
    quiet, busy = shares.enter("quiet", 0.0), shares.enter("busy", 0.0)
    shares.leave(quiet, 0.0)
    busy.charge(50.0, 50.0)
    shares.serve([busy])
    assert shares.enter("quiet", 50.0).used == busy.used
    busy.charge(1.0, 51.0)
    shares.leave(busy, 51.0)
    shares.serve([quiet])
    assert shares.enter("busy", 51.5).used > quiet.used


def test_idle_time_forgives() -> None:
    shares = Level(10)
    greedy = shares.enter("greedy", 0.0)
    greedy.charge(5.0, 5.0)
    shares.leave(greedy, 5.0)
    other = shares.enter("other", 7.0)
    assert shares.enter("greedy", 7.0).used == other.used + 3.0
    shares.leave(greedy, 7.0)
    shares.leave(other, 7.0)
    other = shares.enter("other", 60.0)
    assert shares.enter("greedy", 60.0).used == other.used


def test_time_without_service_counts_against_streams_of_newcomers() -> None:
    shares = Level(10)
    waiting, other = shares.enter("waiting", 0.0), shares.enter("other", 0.0)
    waiting.charge(2.0, 2.0)
    shares.serve([other])
    assert shares.enter("newcomer", 3.0).behind(3.0) < waiting.behind(3.0)
    assert waiting.behind(5.0) < shares.enter("later newcomer", 5.0).behind(5.0)


def test_those_that_are_gone_are_not_remembered_for_ever() -> None:
    shares = Level(100)
    stays = shares.enter("stays", 0.0)
    for number in range(300):
        share = shares.enter(f"peer {number}", float(number))
        if number % 2:
            share.charge(1e6, float(number))
        shares.leave(share, float(number))
    assert len(shares) <= 100
    assert shares.enter("stays", 1e4) is stays


def served(shares: Shares, claims: list[Claim], rounds: int) -> dict[int, int]:
    """How many of so many rounds of a second each went to which of the claims, all of which always want more."""
    counts = dict.fromkeys(range(len(claims)), 0)
    for now in range(rounds):
        shares.serve(claims)
        first = min(counts, key=lambda number: (claims[number].network.behind(now), claims[number].peer.behind(now)))
        counts[first] += 1
        shares.charge(claims[first], 1.0, now + 1.0)
    return counts


def test_names_that_cost_nothing_get_nobody_more() -> None:
    """One peer of its own network beside forty of another: those get as much as a few would."""
    shares = Shares()
    alone = shares.enter("alone", 0.0, "192.0.2.0/24")
    crowd = [shares.enter(f"peer {number}", 0.0, "198.51.100.0/24") for number in range(40)]
    counts = served(shares, [alone, *crowd], 1000)
    assert counts[0] >= 1000 // (1 + PEERS_OF_A_NETWORK) - 10
    assert max(list(counts.values())[1:]) - min(list(counts.values())[1:]) <= 2, "between them the crowd is served alike"


def test_a_few_people_at_one_address_are_served_as_if_each_had_their_own() -> None:
    shares = Shares()
    alone = shares.enter("alone", 0.0, "192.0.2.0/24")
    house = [shares.enter(f"peer {number}", 0.0, "198.51.100.0/24") for number in range(3)]
    counts = served(shares, [alone, *house], 1000)
    assert all(abs(count - 250) <= 5 for count in counts.values())


def test_peers_of_unknown_origin_count_by_themselves() -> None:
    shares = Shares()
    counts = served(shares, [shares.enter(f"peer {number}", 0.0) for number in range(10)], 1000)
    assert all(abs(count - 100) <= 2 for count in counts.values())


def test_what_is_remembered_of_strangers_is_bounded() -> None:
    shares = Shares()
    for number in range(3 * KNOWN_PEERS):
        shares.leave(shares.enter(f"peer {number}", 0.0, "192.0.2.0/24"), 0.0)
    assert len(shares) <= KNOWN_PEERS
    for number in range(4 * KNOWN_NETWORKS):
        shares.leave(shares.enter("peer", 0.0, f"network {number}"), 0.0)
    assert len(shares._peers) <= 2 * KNOWN_NETWORKS
