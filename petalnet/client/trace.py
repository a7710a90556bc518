"""Where the time of an answer went: what each server says of each step, and what this machine saw. Pure: moments are passed in, in seconds.

An answer takes steps through a chain of servers. Its time is parted without rest into waiting for servers (until they are found and have
room, other tries included), the servers' own time, the network, and what this machine does between steps (embeddings, head, sampling, the
library's loop). What a server says is believed as far as it fits into the time that the step took.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from petalnet.client.trace_text import counted, describe_seconds, lines_of

if TYPE_CHECKING:
    from petalnet.client.recovery import Recovery

MOST_PAUSES = 16384
"""Tokens whose times are remembered, the latest of an answer: enough for any, and a bound for a session that is stepped without end."""
ONE_OF_ALL = 2 / 3
"""A server that took so much of what all took is the one to name."""
LEAST_WAIT_S = 0.001
"""What is shorter is no waiting for servers, but this machine's work around a step."""


class HopTimes(NamedTuple):
    """What one step took at one server, in seconds, as the server says; of a step in chunks the sums over its chunks.

    Attributes:
        peer_id: the server.
        first, end: its blocks [first, end).
        queue_s: waiting for the device.
        compute_s: computation.
        held_s: from the arrival of the step until its output was sent on.
        direct: whether its output went to the next server without the client. The last hop's goes to the client: False.
    """

    peer_id: str
    first: int
    end: int
    queue_s: float
    compute_s: float
    held_s: float
    direct: bool


class StepTimes(NamedTuple):
    """What one step of a session took.

    Attributes:
        tokens: new tokens of a row.
        chunks: the pieces in which it was sent, one behind the other; 1 where it was not cut.
        wall_s: seconds from when it was sent until its output was there.
        hops: first block to last.
    """

    tokens: int
    chunks: int
    wall_s: float
    hops: tuple[HopTimes, ...]


@dataclass(slots=True)
class HopTotals:
    """What one server had of an answer, in seconds.

    Where the chunks of a prompt were under way at several servers at once, only the time counts during which the answer waited for this
    server: all of the slowest one's, one chunk of each other's.

    Attributes:
        peer_id: the server.
        first, end: its blocks [first, end).
        steps: how many went through it.
        relayed_steps: of these, those whose output went to the next server through the client.
        relayed: whether the last one's did.
        queue_s: waiting for the device.
        compute_s: computation.
        overhead_s: the rest of the time that it held the steps: reading, checks, encoding.
    """

    peer_id: str
    first: int
    end: int
    steps: int = 0
    relayed_steps: int = 0
    relayed: bool = False
    queue_s: float = 0.0
    compute_s: float = 0.0
    overhead_s: float = 0.0

    @property
    def held_s(self) -> float:
        """All of its time."""
        return self.queue_s + self.compute_s + self.overhead_s

    @property
    def name(self) -> str:
        """The end of its id, by which people tell servers apart."""
        return f"…{self.peer_id[-6:]}"


class Trace:
    """Where the time of one answer went; of a session that is stepped by hand, the time of its steps.

    `print(trace)` shows it as a table, `trace.slowest` says in a sentence what most of the time went to, and `to_dict` is for programs.

    Attributes:
        steps: visits to the swarm.
        tokens: new tokens of a row; 0 until the answer is complete.
        rows: rows of the answer; 0 until it is complete.
        input_entries: KV entries that the inputs take; a step that does not reach their end computes no token.
        prompt_tokens, prompt_chunks: of the first step, and in how many pieces it was sent.
        drafted, accepted: tokens that were guessed and computed along with others, and those of them that were right.
        waiting_s: until there were servers with room, other tries included.
        network_s: on the way between this machine and servers and from server to server.
        chain: the servers of the last step, first block to last.
        recoveries: what was done to go on without servers that were lost.
        error: what cut the answer short; None where nothing did.
    """

    def __init__(self, started: float) -> None:
        self.steps = 0
        self.tokens = 0
        self.rows = 0
        self.input_entries = 0
        self.prompt_tokens = 0
        self.prompt_chunks = 0
        self.drafted = 0
        self.accepted = 0
        self.waiting_s = 0.0
        self.network_s = 0.0
        self.chain: tuple[HopTotals, ...] = ()
        self.recoveries: list[Recovery] = []
        self.error: str | None = None
        self._started = self._last = started
        self._ended: float | None = None
        self._steps_s = 0.0
        self._visit_began = started
        self._steps_before_s = 0.0
        self._visiting = False
        self._tokens = 0  # that are there so far
        self._first_token_s: float | None = None
        self._worst_s = 0.0
        self._pauses: deque[float] = deque(maxlen=MOST_PAUSES)  # from token to token
        self._began = False  # whether a token is being computed
        self._hops: dict[tuple[str, int, int], HopTotals] = {}

    # ---- what happens

    def add(self, step: StepTimes) -> None:
        """A step is complete."""
        if self.complete:  # of an answer that was interrupted: it has been told of
            return
        if not self.steps:
            self.prompt_tokens, self.prompt_chunks = step.tokens, step.chunks
        self.steps += 1
        self._steps_s += step.wall_s
        chunked = step.chunks > 1
        if chunked:
            taken = [hop.queue_s + hop.compute_s for hop in step.hops]
            shares = [1 / step.chunks] * len(taken)
            shares[taken.index(max(taken))] = 1.0
            held = sum(seconds * share for seconds, share in zip(taken, shares, strict=True))
        else:
            shares = [1.0] * len(step.hops)
            held = sum([max(hop.held_s, hop.queue_s + hop.compute_s) for hop in step.hops])
        believed = 1.0
        if held > step.wall_s:
            believed, held = step.wall_s / held, step.wall_s
        self.network_s += step.wall_s - held
        route = []
        for hop, share in zip(step.hops, shares, strict=True):
            key = hop.peer_id, hop.first, hop.end
            totals = self._hops.get(key)
            if totals is None:
                totals = self._hops[key] = HopTotals(*key)
            share *= believed
            totals.steps += 1
            totals.queue_s += hop.queue_s * share
            totals.compute_s += hop.compute_s * share
            if not chunked:
                totals.overhead_s += max(hop.held_s - hop.queue_s - hop.compute_s, 0.0) * share
            totals.relayed = not hop.direct and hop is not step.hops[-1]
            totals.relayed_steps += totals.relayed
            route.append(totals)
        self.chain = tuple(route)

    def recovered(self, recovery: Recovery) -> None:
        """The session goes on without servers that it had lost; what that took is waiting for servers."""
        if not self.complete:
            self.recoveries.append(recovery)

    def visit_begins(self, now: float) -> None:
        """A step is asked for, which may have to wait for servers first."""
        self._visit_began, self._steps_before_s, self._visiting = now, self._steps_s, True

    def visit_ends(self, now: float) -> None:
        """It is complete, or has failed; what it took beside the steps that were complete was waiting."""
        if self.complete or not self._visiting:
            return
        self._visiting = False
        waited = now - self._visit_began - (self._steps_s - self._steps_before_s)
        if waited >= LEAST_WAIT_S:
            self.waiting_s += waited
            self._steps_s += waited

    def token_begins(self, now: float) -> None:
        """The computation of another token begins, so the one before is there."""
        if self.complete:
            return
        if self._began:
            self._token_ends(now)
        self._began = True

    def _token_ends(self, now: float) -> None:
        self._tokens += 1
        if self._first_token_s is None:
            self._first_token_s = now - self._started
        else:
            self._pauses.append(now - self._last)
            self._worst_s = max(self._worst_s, now - self._last)
        self._last = now

    def end(self, now: float, error: str | None = None) -> None:
        """The answer is complete, or cut short by an error, maybe in the middle of a step."""
        self.visit_ends(now)
        if error is not None:
            self.tokens = self._tokens
        elif self._began:
            self._token_ends(now)
        self._began = False
        self._ended = now
        self.error = error

    # ---- what it comes to

    @property
    def complete(self) -> bool:
        """Whether the answer is over; what is stepped by hand never is."""
        return self._ended is not None

    @property
    def hops(self) -> list[HopTotals]:
        """The servers of the answer: those of its last step in their order, then those that it went on without."""
        if len(self.chain) == len(self._hops):
            return list(self.chain)
        in_use = set(map(id, self.chain))
        return [*self.chain, *(totals for totals in self._hops.values() if id(totals) not in in_use)]

    @property
    def wall_s(self) -> float:
        """Seconds from the call until its answer; of an answer that is not complete, those of its steps."""
        return self._steps_s if self._ended is None else max(self._ended - self._started, self._steps_s)

    @property
    def local_s(self) -> float:
        """Seconds of this machine between steps: embeddings, head, sampling, the library's loop."""
        return self.wall_s - self._steps_s

    @property
    def first_token_s(self) -> float | None:
        """Seconds until the first token; None where there was none."""
        return self._first_token_s

    @property
    def token_s(self) -> float | None:
        """Mean seconds from token to token after the first; None where there was no other."""
        if self._first_token_s is None or self._ended is None or self.tokens < 2:
            return None
        return (self.wall_s - self._first_token_s) / (self.tokens - 1)

    @property
    def median_token_s(self) -> float | None:
        """Median seconds from one pass of the library's loop to the next; a guess that was right takes next to nothing."""
        return statistics.median(self._pauses) if self._pauses else None

    @property
    def worst_token_s(self) -> float | None:
        """The longest of these."""
        return self._worst_s if self._pauses else None

    @property
    def route(self) -> str:
        """The chain of the last step; `→` where outputs went from server to server, `⇢` where they came through this machine."""
        parts = []
        for totals in self.chain:
            arrow = " ⇢ " if totals.relayed else " → "
            parts.append(f"{totals.first}:{totals.end} at {totals.name}{arrow if totals is not self.chain[-1] else ''}")
        return "".join(parts)

    @property
    def slowest(self) -> str:
        """What most of the time went to, in a sentence; a server is named where most of that is its."""
        parts = [
            (self.network_s, "network", self.network_s),
            (self.local_s, "this machine, between steps", self.local_s),
            (self.waiting_s, "waiting for servers with room", self.waiting_s),
            self._of_servers([hop.compute_s for hop in self.hops], "server {} computes", "servers compute"),
            self._of_servers([hop.queue_s for hop in self.hops], "queue at {}", "queues of servers"),
            self._of_servers([hop.overhead_s for hop in self.hops], "server {}, beside computation", "servers, beside computation"),
        ]
        _, name, seconds = max(parts)
        if seconds <= 0:
            return "nothing was asked of servers"
        details = describe_seconds(seconds) if name.startswith("waiting") else f"{describe_seconds(seconds / max(self.steps, 1))} a step"
        if name == "network":
            relayed = sum(hop.relayed for hop in self.chain)
            details = f"{counted(len(self.chain), 'hop')}, {f'{relayed} of them through this machine, ' if relayed else ''}{details}"
        return f"{name}: {seconds / self.wall_s * 100:.0f} % ({details})"

    def _of_servers(self, seconds: list[float], one: str, several: str) -> tuple[float, str, float]:
        """What servers took in all, and what is said of it: of the server that took most of it by far, or of all."""
        total, most = sum(seconds), max(seconds, default=0.0)
        if most > total * ONE_OF_ALL:
            return total, one.format(self.hops[seconds.index(most)].name), most
        return total, several, total

    @property
    def summary(self) -> str:
        """How long the answer took, in a line."""
        what = counted(self.tokens, "token") if self.complete else counted(self.steps, "step")
        parts = [f"{what} in {describe_seconds(self.wall_s)}"]
        if self._first_token_s is not None and self.tokens:
            parts.append(f"the first after {describe_seconds(self._first_token_s)}")
        if self.token_s is not None:
            parts.append(f"then {describe_seconds(self.token_s)} each")
        if self.error is not None:
            parts.append(f"cut short: {self.error}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON; seconds, and None where there is nothing to say."""
        return {
            "tokens": self.tokens,
            "rows": self.rows,
            "steps": self.steps,
            "prompt_tokens": self.prompt_tokens,
            "prompt_chunks": self.prompt_chunks,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "wall_s": self.wall_s,
            "first_token_s": self.first_token_s,
            "token_s": self.token_s,
            "median_token_s": self.median_token_s,
            "worst_token_s": self.worst_token_s,
            "network_s": self.network_s,
            "local_s": self.local_s,
            "waiting_s": self.waiting_s,
            "hops": [
                {
                    "peer_id": hop.peer_id,
                    "first": hop.first,
                    "end": hop.end,
                    "steps": hop.steps,
                    "relayed_steps": hop.relayed_steps,
                    "queue_s": hop.queue_s,
                    "compute_s": hop.compute_s,
                    "overhead_s": hop.overhead_s,
                }
                for hop in self.hops
            ],
            "recoveries": [recovery.to_dict() for recovery in self.recoveries],
            "slowest": self.slowest,
            "error": self.error,
        }

    def __str__(self) -> str:
        return "\n".join(lines_of(self))

    def __repr__(self) -> str:
        return f"<Trace: {self.summary}; {self.slowest}>"
