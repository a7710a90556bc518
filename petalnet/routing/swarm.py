"""The merged view of a swarm: the newest record of every server, whichever way it came, and who failed lately.

A failed server leaves the routes in the same instant (`mark_failed`) and for a growing while, but its record stays for the overview. Being
there again makes up for having been away, nothing but good work for having answered wrongly; a server that may only be late (`mark_late`)
is just the last to be chosen for some seconds. What a server has failed at fades with time only, so one that fails now and then between
good answers is avoided for longer each time. Penalties empty no swarm: where nobody else holds some block, a failed server may be asked
again much sooner (`servers` with `last_resort`).

The view never trusts its memory to a stranger: expired records go, and the number of records is bounded. Where there are too many,
those give way first that failed lately, then those that nobody here has anything to do with: a newcomer is always heard, and a crowd of
made-up servers replaces one another before it replaces a server that was ever connected to or that serves a model in use here.

Times in records are by this machine's clock (see `ServerRecord.received`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from petalnet.routing.records import ServerRecord
from petalnet.routing.sequences import Sequences

FIRST_PENALTY = 5.0
LONGEST_PENALTY = 300.0
"""Seconds that a failed server stays out of routes: the first, doubled with each failure that follows, up to the longest."""
FORGIVEN_AFTER = 600.0
"""Seconds after the end of its last penalty when a server's earlier failures no longer count."""
FADES_AFTER = 120.0
"""Seconds after the end of its last penalty for which one failure less counts: a server that fails once in some minutes does not come to
the longest penalty, one that fails with every second answer does."""
FIRST_LAST_RESORT, LONGEST_LAST_RESORT = 2.0, 30.0
"""Seconds after a failure when a server that nobody can stand in for is asked again: the first, doubled as penalties are, up to the
longest."""
FIRST_LATE = 15.0
"""Seconds for which a server that was late is avoided where others hold its blocks (a machine that swaps, a line that is full); doubled,
up to the longest penalty, with each further time that it is doubted before it has worked."""
MAX_SERVERS = 10_000
"""At up to 4 KB a record: 40 MB. A swarm of strangers must not be able to fill our memory by making up peers."""
MAX_REMEMBERED = 4 * MAX_SERVERS
"""Servers whose last sequence number is remembered, 200 bytes each, and those that were connected to."""
SET_BACK_S = 1.0
"""Seconds by which a record is from the future, from which on our clock was set back since it came."""
_SAMPLE = 32
"""Records among which the one that gives way is chosen; to look at all of them for each newcomer would be the next attack."""

T = TypeVar("T", int, str)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One model of a swarm: its key, its most common name, its number of blocks, who is online, and the blocks that nobody holds."""

    model: str
    model_name: str
    num_blocks: int
    servers: tuple[ServerRecord, ...]
    missing: tuple[int, ...]


@dataclass(slots=True)
class _Failure:
    """The last failure of a server, or the last time that it was late.

    Attributes:
        count: how many there were, this one included.
        at, until: when, and the end of its penalty.
        wrong: whether it answered wrongly, which no connection disproves.
        is_over: whether it has been seen to work since.
    """

    count: int
    at: float
    until: float
    wrong: bool
    is_over: bool = False

    @property
    def last_resort_at(self) -> float:
        return min(self.at + min(FIRST_LAST_RESORT * 2.0 ** min(self.count - 1, 16), LONGEST_LAST_RESORT), self.until)

    def is_active(self, now: float) -> bool:
        """Whether its penalty lasts; a clock that was set back makes none longer."""
        return not self.is_over and self.at - SET_BACK_S <= now < self.until

    def faded(self, now: float) -> int:
        """How many still count."""
        return max(0, self.count - int(max(now - self.until, 0.0) / FADES_AFTER)) if now < self.until + FORGIVEN_AFTER else 0


class SwarmView:
    """Everything that is known of a swarm's servers. Times are unix seconds, as in the records.

    Args:
        own: the peer id of the server whose view it is, which never gives way; "" where there is none.

    Attributes:
        version: grows whenever something changed that may change a route.
    """

    def __init__(self, own: str = "") -> None:
        self.version = 0
        self._own = own
        self._records: dict[str, ServerRecord] = {}
        self._failures: dict[str, _Failure] = {}
        self._late: dict[str, _Failure] = {}
        self._sequences = Sequences(MAX_REMEMBERED)
        self._met: dict[str, None] = {}
        self._models: set[str] = set()
        self._random = random.Random()

    def __len__(self) -> int:
        return len(self._records)

    def follow(self, model: str) -> None:
        """A model, by its key, is in use here: its servers are the last to give way."""
        self._models.add(model)

    @property
    def followed(self) -> tuple[str, ...]:
        """The models that are in use here, by their keys."""
        return tuple(self._models)

    def is_news(self, peer_id: str, sequence: int) -> bool:
        """Whether a record of this number would be taken in, if it holds: cheaper to ask before its signature is checked."""
        return self._sequences.is_news(peer_id, sequence)

    def add(self, record: ServerRecord, *, now: float) -> bool:
        """Takes a record in (its signature is the caller's to check) and says whether it was news.

        Of two records of one server the one of the higher sequence stays, and after it has gone no older one is taken in. A record that
        says "left" stays until it expires like any other. A server that says that it joins or leaves is another process than the one
        that failed, or will be: its penalty ends, while its failures still count.
        """
        if record.expires <= now or not self._sequences.note(record.peer_id, record.sequence, now):
            return False
        if record.peer_id not in self._records and len(self._records) >= MAX_SERVERS:
            self.expire(now)
            while len(self._records) >= MAX_SERVERS:
                self._give_way(now)
        self._records[record.peer_id] = record
        failure = self._failures.get(record.peer_id)
        if failure is not None and record.state in ("joining", "left"):
            failure.until = min(failure.until, now)
        self.version += 1
        return True

    def forget(self, peer_id: str) -> None:
        """Drops all that is known of a server."""
        self._failures.pop(peer_id, None)
        self._late.pop(peer_id, None)
        self._met.pop(peer_id, None)
        self._sequences.forget(peer_id)
        if self._records.pop(peer_id, None) is not None:
            self.version += 1

    def expire(self, now: float) -> None:
        """Drops records that have expired and failures that are long past."""
        for peer_id, record in self._records.items():
            if record.issued > now + SET_BACK_S:  # our clock was set back: what is remembered counts from now on
                self._records[peer_id] = record.received(now)
        for failure in self._failures.values():
            if failure.at > now + SET_BACK_S:
                failure.at, failure.until = now, now + failure.until - failure.at
        gone = [peer_id for peer_id, record in self._records.items() if record.expires <= now]
        for peer_id in gone:
            del self._records[peer_id]
        if gone:
            self.version += 1
        for failures in (self._failures, self._late):
            for peer_id in [peer_id for peer_id, failure in failures.items() if failure.until + FORGIVEN_AFTER <= now]:
                del failures[peer_id]
        self._sequences.expire(now)

    def _give_way(self, now: float) -> None:
        """Drops the record that is worth the least, of a few that are drawn by chance."""

        def worth(peer_id: str) -> tuple[bool, ...]:
            in_use = self._records[peer_id].model in self._models
            return peer_id == self._own, self.failed_until(peer_id, now=now) is None, peer_id in self._met, in_use

        del self._records[min(self._random.sample(list(self._records), min(_SAMPLE, len(self._records))), key=worth)]

    def mark_failed(self, peer_id: str, *, now: float, wrong: bool = False) -> float:
        """Takes a server out of the routes at once, and returns until when.

        Several users of the view may report one and the same failure, so reports that follow soon do not lengthen the penalty.

        Args:
            wrong: it is there, and answered wrongly; otherwise it is away, silent or has closed what it should not have.
        """
        failure = self._failures.get(peer_id)
        if failure is not None and failure.is_active(now) and now < failure.last_resort_at:
            failure.wrong |= wrong
            return failure.until
        count = 1 + (0 if failure is None else failure.faded(now))
        until = now + min(FIRST_PENALTY * 2.0 ** min(count - 1, 16), LONGEST_PENALTY)
        self._failures[peer_id] = _Failure(count, now, until, wrong)
        self.version += 1
        return until

    def mark_late(self, peer_id: str, *, now: float) -> None:
        """A server, or the way to it, may hang, or may have spoilt something: avoided where others hold its blocks, for some seconds or
        until it works."""
        late = self._late.get(peer_id)
        if late is None or not late.is_active(now):
            count = 1 + (0 if late is None else late.faded(now))
            until = now + min(FIRST_LATE * 2.0 ** min(count - 1, 16), LONGEST_PENALTY)
            self._late[peer_id] = _Failure(count, now, until, wrong=False)
            self.version += 1

    def mark_ok(self, peer_id: str) -> None:
        """The server did its work: its penalty is over, though its failures fade only with time."""
        self._meet(peer_id)
        failure = self._failures.get(peer_id)
        if self._late.pop(peer_id, None) is not None or (failure is not None and not failure.is_over):
            self.version += 1
        if failure is not None:
            failure.is_over = True

    def mark_connected(self, peer_id: str) -> None:
        """The server is there: known to exist, and forgiven for having been away."""
        self._meet(peer_id)
        failure = self._failures.get(peer_id)
        if failure is not None and not failure.wrong and not failure.is_over:
            failure.is_over = True
            self.version += 1

    def _meet(self, peer_id: str) -> None:
        self._met.pop(peer_id, None)
        self._met[peer_id] = None
        if len(self._met) > MAX_REMEMBERED:
            del self._met[next(iter(self._met))]

    def failed_until(self, peer_id: str, *, now: float) -> float | None:
        """Until when the server is kept out of routes; None where it is not."""
        failure = self._failures.get(peer_id)
        return failure.until if failure is not None and failure.is_active(now) else None

    def on_probation(self, peer_id: str) -> bool:
        """Whether the server has failed and not been seen to work since: its penalty may be over, but it may as well still be dead."""
        failure = self._failures.get(peer_id)
        return failure is not None and not failure.is_over

    def is_doubtful(self, peer_id: str, *, now: float) -> bool:
        """Whether others are to be preferred: it is on probation, or was late a moment ago."""
        late = self._late.get(peer_id)
        return self.on_probation(peer_id) or (late is not None and late.is_active(now))

    def record(self, peer_id: str) -> ServerRecord | None:
        """The newest record of a server, expired or not."""
        return self._records.get(peer_id)

    def servers(
        self,
        model: str | None = None,
        *,
        now: float,
        states: Collection[str] = ("online",),
        allowed: Collection[str] | None = None,
        blocked: Collection[str] = (),
        include_failed: bool = False,
        last_resort: bool = False,
    ) -> list[ServerRecord]:
        """Servers of a model (None: of all), in the order of their peer ids.

        Args:
            states: only servers that say that they are in one of these.
            allowed: only these peer ids; None for any.
            blocked: none of these peer ids.
            include_failed: also those that failed lately.
            last_resort: also those of them that may be asked again where nobody else holds their blocks.
        """

        def is_usable(peer_id: str) -> bool:
            if include_failed or self.failed_until(peer_id, now=now) is None:
                return True
            return last_resort and now >= self._failures[peer_id].last_resort_at

        return [
            record
            for peer_id, record in sorted(self._records.items())
            if (model is None or record.model == model)
            and record.expires > now
            and record.state in states
            and (allowed is None or peer_id in allowed)
            and peer_id not in blocked
            and is_usable(peer_id)
        ]

    def models(self, *, now: float) -> list[ModelSummary]:
        """The models that somebody serves or is about to serve, in the order of their keys."""
        by_model: dict[str, list[ServerRecord]] = {}
        for record in self.servers(now=now, states=("joining", "online", "draining"), include_failed=True):
            by_model.setdefault(record.model, []).append(record)
        summaries = []
        for model, records in sorted(by_model.items()):
            num_blocks = _most_common(record.num_blocks for record in records)
            online = tuple(record for record in records if record.state == "online")
            # Not by `self.missing_blocks`: a look at all records for each of as many models as strangers care to name.
            usable = [record for record in online if self.failed_until(record.peer_id, now=now) is None]
            missing = tuple(missing_blocks(usable, 0, num_blocks))
            summaries.append(ModelSummary(model, _most_common(record.model_name for record in records), num_blocks, online, missing))
        return summaries

    def missing_blocks(self, model: str, num_blocks: int, *, now: float) -> list[int]:
        """Blocks of a model of `num_blocks` blocks that no server, online and not failed lately, holds; ascending."""
        return missing_blocks(self.servers(model, now=now), 0, num_blocks)


def missing_blocks(records: Iterable[ServerRecord], first: int, end: int) -> list[int]:
    """Blocks of [first, end) that none of the records holds; ascending."""
    held = [False] * (end - first)
    for record in records:
        for block in range(max(first, record.span[0]), min(end, record.span[1])):
            held[block - first] = True
    return [first + index for index, is_held in enumerate(held) if not is_held]


def _most_common(values: Iterable[T]) -> T:
    """The value that most give; of equals, the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
