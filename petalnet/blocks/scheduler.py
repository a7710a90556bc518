"""What the compute thread runs next. Pure: tasks, measured seconds and `now` in, the parts of the next round out.

A **round** is one pass through the span, shared by tasks of one key (steps of the same blocks, see `Span.batch_key`):

- *decodes* (steps of a few new tokens; verifying speculated ones is of that kind) go into the next round: all of them, unless one peer
  or many ask for so much that the others' tokens would take long;
- *prefills* (longer steps) add a chunk to it, so long that the round keeps its time budget: those who decode meanwhile get a token a
  round, and a prompt that comes in waits for one round, not for another's whole prompt;
- *passes* (without a session: training) run when no step could, some blocks a round.

**Turns.** The three are in this order of rank, but work that could not join the rounds of higher rank (another key, rows too wide for the
budget, a pass) leads a round of its own when as much time has gone to others as its round takes (passes: `PASS_TURN` times as much).
Within a rank, the network that has had least of it is first, and of its peers the one that has (`shares.Shares`). Within a peer, what is
soonest done is first, less the time for which it has been there. What has got nothing for some seconds leads a round now and then, so
nothing starves.

**Waiting for stragglers.** A pass of eight tokens costs little more than one of four. Were a round started as soon as the first of eight
clients is back, the others would miss it and wait for its end, and from then on the clients would go in groups, each at the pace of all.
So the device stays idle for the moment that others are expected to take, if that costs those who are here less time than it saves those
who come.

**Several devices.** Where the span goes over several devices, as many rounds are under way, each on another one. A session's step waits for
its turn on all of them, so rounds gain nothing by being many if each takes as long as one for all would; where it takes less, decodes are
divided among as many rounds as there are devices, and a prompt that is alone goes in pieces that follow each other closely.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from petalnet.blocks.arrivals import Arrivals
from petalnet.blocks.costs import OUTLIER, SEED_TOKENS, Costs
from petalnet.blocks.shares import Claim, Level, Shares
from petalnet.blocks.tasks import DECODE_TOKENS as DECODE_TOKENS
from petalnet.blocks.tasks import Done as Done
from petalnet.blocks.tasks import Kind as Kind
from petalnet.blocks.tasks import Part as Part
from petalnet.blocks.tasks import Rank
from petalnet.blocks.tasks import Task as Task

ROUND_S = 0.15
"""Seconds that a round with a chunk of a prefill may take, at the most, ..."""
ROUND_PASSES = 2.5
"""... and in passes of a single token: where those are quick, a longer chunk gains little, and others would wait for many of them."""
LEAST_PASSES = 1.5
"""But on a slow device no less than so many of these, or a prompt would go through in chunks that take hardly less than longer ones."""
LEAST_ROUND_S = 0.02
"""However quick passes are, a round may take so long."""
ALONE_ROUNDS = 2.0
"""The budget, in rounds, of a chunk that nobody waits for or that is the last of its prompt: larger ones run faster, and somebody may
come in at any time."""
ALONE_S = 1.0
"""Seconds within which a prompt that is alone goes through in one piece, which is a third faster than in chunks on a slow device: once,
whoever comes in then waits for that long."""
DECODE_ROUNDS = 1.5
"""A chunk may make a round at least so much longer than its decodes take."""
LEAST_PREFILL = 16
"""Tokens by which a prefill gets on in a round, whatever the budget says."""
PASS_TURN = 4.0
"""Steps that come all the time leave passes one part of the time in so many and one."""
OVERDUE_S = 5.0
"""A task that has got nothing for so long leads a round, whatever its peer has had meanwhile, ..."""
OVERDUE_TURN = 4
"""... but only one round in so many, so that a peer with a long queue of its own does not get more than its share by it."""
WAIT_SHARE = 0.5
"""Seconds that a round may wait for stragglers, as a share of what it will take with them. Also what makes a session one that is far
away: that it usually stays away for longer."""
SPLIT_GAIN = 0.9
"""Decodes are divided among the devices if each round then takes at most such a share of what one for all would. Less is not worth the work
that rounds make beside the devices."""
MOST_PIECES = 16
"""Into so many a prompt is cut at the most that is alone on several devices."""
TELLING_WEIGHT = 0.5
"""Rounds through less of the span tell nothing of how fast all of it is: a round has costs of its own, whatever it goes through."""
RANKS: tuple[Rank, ...] = ("decode", "prefill", "pass")
TURNS: dict[Rank, float] = {"pass": PASS_TURN, "prefill": 1.0}
"""Whose turn comes when others have had so many times as long as its round takes."""


@dataclass(eq=False)
class _Waiting:
    task: Task
    rank: Rank
    claim: Claim
    since: float
    """When it came."""
    served: float
    """When it came, or last got a part."""
    under_way: int = 0
    """In how many rounds that are not finished."""
    tokens: int = 0
    """In the last of these, if they are a decode."""
    queued: bool = True
    """Whether more of it could be in the next round."""


@dataclass
class _Plan:
    """A round that could be run."""

    parts: list[Part]
    seconds: float

    def serves(self, waiting: _Waiting) -> bool:
        return any(part.task is waiting.task for part in self.parts)


class Scheduler:
    """Decides the rounds of one compute thread, which is the only one to call it."""

    def __init__(self, costs: Costs, *, round_s: float = ROUND_S, most_tokens: int = 2048, devices: int = 1) -> None:
        """
        Args:
            costs: of steps through the whole span; from now on the scheduler's own. Passes begin with the same and are measured apart.
            round_s: the most seconds that a round with prefills or passes may take, decodes aside.
            most_tokens: the most tokens of a round, unless a single decode or a single unit of a task has more.
            devices: over how many the span goes: so many rounds may be under way.
        """
        self._devices = devices
        self._costs = {"step": costs, "pass": copy.deepcopy(costs)}
        self._longest_s = round_s
        self._most_tokens = most_tokens
        self._waiting: dict[Task, _Waiting] = {}  # whoever has got nothing for the longest time first
        self._queues: dict[Rank, dict[Task, _Waiting]] = {"empty": {}, "decode": {}, "prefill": {}, "pass": {}}
        self._shares: dict[Rank, Shares] = {rank: Shares() for rank in self._queues}
        self._held_since: float | None = None  # since when a round has been held back for stragglers
        self._announced = copy.deepcopy(costs)
        self._done: dict[Kind, Done] = dict.fromkeys(("decode", "prefill", "forward"), Done(0.0, 0.0))
        self._now = 0.0  # the latest time that was told
        self._empty_last = False  # steps without tokens go at once, but an endless stream of them holds nothing up
        self._arrivals = Arrivals()
        self._owed = dict.fromkeys(TURNS, 0.0)  # seconds that went to others while the first of its rank waited
        self._passed_over: dict[Part, list[Rank]] = {}  # by the first part of a round: who was first in rank and is not in it
        self._since_overdue = 0  # rounds since one was led by an overdue task

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, task: Task, now: float) -> None:
        """A task was submitted at `now`, which may be a little ago: before the end of a round that was already accounted for."""
        self._enter(task, now, now)
        if task.session is not None:
            self._arrivals.came(task.session, now)

    def drop(self, task: Task) -> None:
        """Forget a task whose asker is gone, or that failed; harmless where it is not known."""
        if task in self._waiting:
            self._remove(task, self._now)
            self._arrivals.forget(task.session)

    def forget(self, session: Hashable) -> None:
        """A session has ended: nobody waits for it any more."""
        self._arrivals.forget(session)

    def next(self, now: float) -> list[Part] | float | None:
        """The parts of the next round, all for one pass; or the time until which to wait for stragglers, unless something comes in; or
        None: there is nothing to do. What is in it counts as under way until `finished`; rounds finish in the order in which they began,
        except that those of passes may be sooner or later."""
        self._now = now
        empty = [Part(task, 0, 0) for task in self._queues["empty"]]
        queued = sum(map(len, self._queues.values()))
        if empty and (not self._empty_last or len(empty) == queued):
            self._empty_last = True
            return self._begun(empty, now)
        if not queued:
            self._held_since = None
            return None
        ranked = {rank: self._ranked(rank, now) for rank in RANKS}
        plan, in_turn = self._choose(ranked, now)
        if not in_turn:
            until = self._stragglers(plan, now)
            if until is not None:
                return until
        self._held_since = None
        passed_over = self._passed_over[plan.parts[0]] = list[Rank]()
        for rank in self._owed:
            if ranked[rank] and not plan.serves(ranked[rank][0]):
                passed_over.append(rank)
            else:
                self._owed[rank] = 0.0
        for rank, queue in ranked.items():
            self._shares[rank].serve([waiting.claim for waiting in queue])
        self._since_overdue += 1
        self._empty_last = False
        return self._begun(plan.parts + empty, now)

    def finished(self, parts: Sequence[Part], seconds: float, now: float) -> list[Task]:
        """Account for a round that took `seconds` and ended at `now`; returns the tasks that are complete. The others stay queued."""
        tokens = sum(part.tokens for part in parts)
        for rank in self._passed_over.pop(parts[0], ()) if parts else ():
            self._owed[rank] += seconds
        if tokens:
            weight = parts[0].weight
            self._note_done(parts[0], tokens, seconds / weight)
            self._costs[parts[0].task.kind].measured(tokens, seconds / weight)
        complete = []
        for part in parts:
            task = part.task
            waiting = self._waiting.get(task)
            if waiting is None:
                continue
            if tokens:
                Shares.charge(waiting.claim, seconds * part.tokens / tokens, now)
            waiting.under_way -= 1
            if part.end < task.units:
                if not waiting.queued and task.done < task.units:
                    self._enter_again(waiting, now)
                continue
            self._remove(task, now)
            complete.append(task)
            if task.session is not None:
                self._arrivals.left(task.session, task.key, task.width, now)
        return complete

    def expected_wait(self) -> float:
        """Seconds that the computation of all that waits is expected to take. Whoever comes anew waits no longer, and mostly much less."""
        decodes: dict[Hashable, list[Task]] = {}
        seconds = 0.0
        for task in self._waiting:
            if task.done == task.units:
                continue  # what is left of it is under way
            if task.kind == "pass":
                seconds += self._seconds_left(task)
            elif task.rank == "decode":
                decodes.setdefault(task.key if task.key is not None else task, []).append(task)
            elif task.units:
                chunk = max(LEAST_PREFILL, self._costs[task.kind].fitting(self._round_s()))
                seconds += task.tokens_left * self._seconds(task, chunk) / chunk
        return seconds + sum(self._seconds(tasks[0], sum(task.tokens_left for task in tasks)) for tasks in decodes.values())

    def done(self) -> Mapping[Kind, Done]:
        """The work so far that went through half of the span or more, by its kind, as if all of it had gone through the whole span."""
        return self._done.copy()

    def _note_done(self, part: Part, tokens: int, seconds: float) -> None:
        """A round with this part took so long for each unit of weight. What its tokens count for follows from how long they should have
        taken: steps of several sessions side by side take little longer than one alone, and a pass of one token little less than one
        of 32."""
        task, share = part.task, part.weight if part.task.kind == "pass" else 1.0
        if task.weight * (task.units if task.kind == "pass" else 1) < TELLING_WEIGHT:
            return
        bounded = min(seconds, OUTLIER * self._costs[task.kind].seconds(tokens))
        kind: Kind = "forward" if task.kind == "pass" else "prefill" if tokens >= SEED_TOKENS else "decode"
        unit = 1 if kind == "decode" else SEED_TOKENS
        count = unit * self._announced.seconds(tokens) / self._announced.seconds(unit)
        before = self._done[kind]
        self._done[kind] = Done(before.tokens + share * count, before.seconds + share * bounded)

    # Which round

    def _choose(self, ranked: dict[Rank, list[_Waiting]], now: float) -> tuple[_Plan, bool]:
        """The next round, and whether it is that of somebody whose turn has come, whatever else there is."""
        longest = next(waiting for waiting in self._waiting.values() if waiting.queued and waiting.rank != "empty")
        if self._since_overdue >= OVERDUE_TURN and now - longest.served > OVERDUE_S:
            self._since_overdue = 0
            return self._plan(longest, ranked), True
        for rank, turn in TURNS.items():
            if ranked[rank] and self._owed[rank]:
                plan = self._plan(ranked[rank][0], ranked)
                if self._owed[rank] >= turn * plan.seconds:
                    return plan, True
        first = next(queue[0] for queue in ranked.values() if queue)
        return self._plan(first, ranked), False

    def _ranked(self, rank: Rank, now: float) -> list[_Waiting]:
        """The tasks of a rank, who is first in turn first."""
        queue = list(self._queues[rank].values())
        if len(queue) < 2:
            return queue

        # Those within the shortest pass of each other count as equal, so that between them, too, what is soonest done is first.
        shortest = self._costs["step"].seconds(1)
        least: dict[Level, float] = {}  # times of different networks' peers tell nothing about each other
        for waiting in queue:
            behind, level = waiting.claim.peer.behind(now), waiting.claim.peers
            least[level] = min(least.get(level, behind), behind)

        def order(waiting: _Waiting) -> tuple[int, int, float]:
            claim = waiting.claim
            network = int(claim.network.behind(now) // shortest)
            peer = int((claim.peer.behind(now) - least[claim.peers]) // shortest)
            return network, peer, self._seconds_left(waiting.task) - (now - waiting.since)

        return sorted(queue, key=order)

    def _plan(self, first: _Waiting, ranked: dict[Rank, list[_Waiting]]) -> _Plan:
        """The round that `first` leads."""
        task = first.task
        if task.kind == "pass":
            unit = self._seconds(task, task.width)
            parts = [self._part(task, max(1, int(self._round_s() * (ALONE_ROUNDS if self._is_alone else 1.0) / unit)))]
            return _Plan(parts, unit * (parts[0].end - parts[0].start))
        if task.key is None:
            parts = [self._part(task, task.units if task.rank == "decode" else max(1, self._chunk(task, 0) // task.width))]
        else:
            parts = self._shared(first, ranked)
        return _Plan(parts, self._seconds(task, sum(part.tokens for part in parts)))

    def _shared(self, first: _Waiting, ranked: dict[Rank, list[_Waiting]]) -> list[Part]:
        """A pass of steps: decodes with the key of the first, and chunks of prefills."""
        key, tokens = first.task.key, 0
        parts: list[Part] = []
        room = self._most_tokens - (first.task.width if first.task.rank == "prefill" else 0)
        room = min(room, self._decode_room(first.task))
        for waiting in ranked["decode"]:
            task = waiting.task
            if task.key == key and (waiting is first or tokens + task.tokens_left <= room):
                parts.append(self._part(task, task.units))
                tokens += parts[-1].tokens
        prefills = [waiting.task for waiting in ranked["prefill"] if waiting.task.key == key and waiting is not first]
        if first.task.rank == "prefill":
            prefills.insert(0, first.task)
        if not prefills:
            return parts
        room = self._chunk(prefills[0], tokens)
        if self._devices > 1 and self._is_alone:
            room = min(room, self._piece(prefills[0]))
        elif self._may_exceed(prefills[0], tokens, prefills[0].tokens_left):
            room = max(room, prefills[0].tokens_left)  # the rest of it in one round is less to wait for than in two
        for number, task in enumerate(prefills):
            units = room // task.width
            if not units and number == 0 and (task is first.task or self._may_exceed(task, tokens, task.width)):
                units = 1
            # A few tokens more of a long prompt are not worth what they cost beside the others; the end of one is.
            if units and (number == 0 or units * task.width >= LEAST_PREFILL or units * task.width >= task.tokens_left):
                parts.append(self._part(task, units))
                room -= parts[-1].tokens
        return parts

    def _decode_room(self, task: Task) -> int:
        """The tokens that the decodes of a round with this task may have together; a single one may have more."""
        fitting = self._costs["step"].fitting(ALONE_ROUNDS * self._round_s() / task.weight)
        room = max(fitting, DECODE_TOKENS)
        return room if self._devices == 1 else min(room, self._decode_share(task))

    def _decode_share(self, task: Task) -> int:
        """Of all tokens of decodes that are around, those that a round with this task may have so that there are others for the other
        devices; all of them where that would gain nothing."""
        around = sum(waiting.task.tokens_left for waiting in self._queues["decode"].values() if waiting.task.key == task.key)
        around += sum(waiting.tokens for waiting in self._waiting.values() if not waiting.queued and waiting.task.key == task.key)
        around += sum(arrival.tokens for arrival in self._arrivals.expected(self._now) if arrival.key == task.key)
        share = -(-around // self._devices)
        whole = self._seconds(task, around)
        return share if self._seconds(task, share) <= SPLIT_GAIN * whole else around

    def _piece(self, task: Task) -> int:
        """The tokens of a round's chunk with which the rest of a prompt that is alone is soonest through all devices."""
        left, devices = task.tokens_left, self._devices

        def seconds(pieces: int) -> float:
            return (pieces + devices - 1) / devices * self._seconds(task, -(-left // pieces))

        return -(-left // min(range(1, MOST_PIECES + 1), key=seconds))

    def _chunk(self, task: Task, tokens: int) -> int:
        """The tokens of this task, and of others after it, that may be added to a round of so many."""
        alone = self._is_alone
        budget = self._round_s() * (ALONE_ROUNDS if alone else 1.0)
        if tokens:
            budget = max(budget, DECODE_ROUNDS * self._seconds(task, tokens))
        costs = self._costs[task.kind]
        fitting = costs.fitting(budget / task.weight)
        if alone and fitting >= costs.longest:
            # Nobody loses by a try: some kernels are slow for a dozen rows, from which longer passes look slower than they are.
            fitting = max(fitting, 2 * costs.longest)
        return min(max(fitting - tokens, LEAST_PREFILL), max(self._most_tokens - tokens, 0))

    def _round_s(self) -> float:
        """The time budget of a round with prefills or passes."""
        single = self._costs["step"].seconds(1)
        return max(min(self._longest_s, max(LEAST_ROUND_S, ROUND_PASSES * single)), LEAST_PASSES * single)

    def _may_exceed(self, task: Task, tokens: int, more: int) -> bool:
        """Whether so many tokens of a prefill may be added to a round of `tokens` though they do not fit its budget."""
        budget = ALONE_ROUNDS * self._round_s()
        if self._is_alone and not task.done:
            budget = max(budget, ALONE_S)
        return tokens + more <= self._most_tokens and self._seconds(task, tokens + more) <= budget

    @property
    def _is_alone(self) -> bool:
        """Whether no other session is there."""
        return len(self._waiting) == 1 and not len(self._arrivals)

    @staticmethod
    def _part(task: Task, units: int) -> Part:
        end = min(task.units, task.done + min(units, task.max_units))
        if task.cuts:
            # The last cut within these units; the next one where there is none, since something has to be done.
            end = task.cuts[max(bisect_right(task.cuts, end) - 1, bisect_right(task.cuts, task.done))]
        return Part(task, task.done, end)

    def _seconds(self, task: Task, tokens: int) -> float:
        return self._costs[task.kind].seconds(tokens) * task.weight

    def _seconds_left(self, task: Task) -> float:
        if task.kind == "pass":
            return (task.units - task.done) * self._seconds(task, task.width)
        return self._seconds(task, task.tokens_left)

    # Stragglers

    def _stragglers(self, plan: _Plan, now: float) -> float | None:
        """Until when to hold a round back for sessions that are about to come; None to start it."""
        expected = self._arrivals.expected(now)
        first, tokens = plan.parts[0].task, sum(part.tokens for part in plan.parts)
        decodes = sum(part.tokens for part in plan.parts if part.task.rank == "decode")
        gathered = decodes + (LEAST_PREFILL if tokens > decodes else 0)  # of a chunk, so much stays if others come
        here = len(self._queues["decode"]) + len(self._queues["prefill"])  # all of them lose what is waited; passes have time
        held_since = now if self._held_since is None else self._held_since
        room = self._decode_room(first)
        until, best, saved, late = None, 0.0, 0.0, math.inf
        for arrival in expected:
            # Beside decodes, those count that could join their pass; but whoever comes while a mere chunk runs waits for its end.
            if decodes and (arrival.key != first.key or gathered + arrival.tokens > room):
                continue
            more = gathered + arrival.tokens
            seconds = max(plan.seconds, self._seconds(first, more)) if first.kind == "step" else plan.seconds
            latest = held_since + WAIT_SHARE * seconds
            if arrival.usual > WAIT_SHARE * seconds or now + arrival.wait > latest:
                continue
            gathered = more
            saved += max(0.0, plan.seconds / self._devices - arrival.wait)  # the next round begins on the first device once it is free
            lost = here * (arrival.wait + seconds - plan.seconds)
            late = min(late, arrival.late)
            if saved - lost > best:
                until, best = min(late, latest), saved - lost
        if until is not None:
            self._held_since = held_since
        return until

    # Keeping account

    def _enter(self, task: Task, since: float, now: float) -> None:
        rank = task.rank
        waiting = _Waiting(task, rank, self._shares[rank].enter(task.peer, now, task.network), since, now)
        self._waiting[task] = self._queues[rank][task] = waiting

    def _enter_again(self, waiting: _Waiting, now: float) -> None:
        """More of a task could be in the next round; what is left may be of another rank."""
        task, under_way = waiting.task, waiting.under_way
        self._remove(task, now)
        self._enter(task, waiting.since, now)
        self._waiting[task].under_way = under_way

    def _remove(self, task: Task, now: float) -> None:
        waiting = self._waiting.pop(task)
        self._queues[waiting.rank].pop(task, None)
        self._shares[waiting.rank].leave(waiting.claim, now)

    def _begun(self, parts: list[Part], now: float) -> list[Part]:
        """A round with these parts is under way. With several devices, the next part of a prompt may follow on the heels of this one."""
        for part in parts:
            task = part.task
            waiting = self._waiting[task]
            task.done = part.end
            del self._queues[waiting.rank][task]
            waiting.queued = False
            waiting.under_way += 1
            waiting.tokens = part.tokens if waiting.rank == "decode" else 0
            if self._devices > 1 and task.kind == "step" and task.done < task.units:
                self._enter_again(waiting, now)
        return parts
