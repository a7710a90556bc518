"""How often a server speaks of itself: at a steady beat in small swarms, less often where so many speak that listening is work. Pure."""

from __future__ import annotations

BEAT_S = 15.0
"""Seconds between two announcements, as long as there are few servers."""
LONGEST_BEAT_S = 300.0
LIFETIME_BEATS = 2
"""Beats for which a record is valid: it outlives one that is lost, and a server that vanished is listed no longer than this."""
STORES_PER_SECOND = 20.0
"""Announcements a second that those who keep a key should have to take: each costs 0.2 ms and up to 4 KB."""
GOSSIP_PER_SECOND = 4.0
"""Announcements a second that the whole swarm gossips: everybody gets each of them, several times over. Changes of state come on top."""
SHORTEST_GOSSIP_S, LONGEST_GOSSIP_S = 3.0, 900.0
REFRESH_S, LONGEST_REFRESH_S = 10.0, 900.0
RECORDS_PER_SECOND = 4.0
"""Records a second that a node which only wants to stay in the picture looks up, from each of the few keepers that it asks."""
LEFT_LIFETIME_S = 1500.0
"""Seconds for which a record that says that its server has left is valid: as long as any copy of an earlier one might pass for valid by
a clock that is ten minutes slow, were it signed by one that is ten minutes fast."""


def beat_s(crowd: int) -> float:
    """Seconds between two announcements where there are `crowd` records under the most crowded of a record's keys."""
    return min(max(BEAT_S, crowd / STORES_PER_SECOND), LONGEST_BEAT_S)


def list_every_s(crowd: int, every_s: float, lifetime_s: float) -> float:
    """Seconds between two announcements of a server under the key that all servers share, which is the most crowded one.

    They may be further apart than its record is valid, so that of a very large swarm only a sample is listed there at any time.

    Args:
        crowd: records that are listed there now.
        every_s: how far apart these announcements have been so far.
        lifetime_s: for which records are valid.
    """
    return beat_s(int(crowd * max(every_s / lifetime_s, 1.0)))


def gossip_every_s(servers: int) -> float:
    """Seconds between two announcements of a server that are gossiped and tell of no change, in a swarm of so many."""
    return min(max(SHORTEST_GOSSIP_S, servers / GOSSIP_PER_SECOND), LONGEST_GOSSIP_S)


def refresh_every_s(servers: int) -> float:
    """Seconds between two look-ups of a node that knows of so many servers and wants to stay in the picture."""
    return min(max(REFRESH_S, servers / RECORDS_PER_SECOND), LONGEST_REFRESH_S)
