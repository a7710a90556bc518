"""The steps of a session that are under way in a chain of servers. Sans-IO: what servers say comes in, what is to be sent comes out.

A step is given to the first server. Each server runs its blocks and sends the output on to the next one as a step of the same number,
over a **link** of its own, and the last server answers the client. So the client hears of a step once, when it is done.

A link that two servers cannot have is **down**, for the rest of the session: the server before it answers the client, which carries the
output to the server behind it. Servers take the steps of a session in the order of their numbers and drop one that they have had, so
nothing is to be carried before everything older has been, and whatever is carried twice does no harm. When a link breaks, outputs that were
on their way over it may have been lost. The client cannot know, so it asks the server before the link for each of those that is not
answered yet once more (`Replay`), and carries that.

A step that wants every block's outputs is answered by each server, beside being sent on: there is nothing to ask for again.

What servers that have taken the place of lost ones compute anew are steps as well, which go only as far as these (`Step.until`): the last
of them answers. They begin at the first of these, which gets them from the client, or at the server before it, which is asked for outputs
that it has kept (`Replay.until`) and sends them on as its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from petalnet.client.inputs import is_finite, wanted_tokens
from petalnet.client.requests import last_of, part_of
from petalnet.errors import ProtocolError
from petalnet.p2p.fields import Blob
from petalnet.p2p.session_messages import Replay, Step, StepDone
from petalnet.routing.routes import Hop

REPLAYS_AT_ONCE = 4
"""Outputs that a server is asked for once more at a time: it needs the line for the newer ones, too, and refuses too many."""

SHORT_BYTES = 64 * 1024
"""Size from which on hidden states take time to be sent."""


class Send(NamedTuple):
    """A message for a hop, by its number in the chain."""

    hop: int
    message: Step | Replay

    @property
    def is_short(self) -> bool:
        """Whether it takes no time to send."""
        message = self.message
        return isinstance(message, Replay) or len(message.hidden.data) < SHORT_BYTES


@dataclass(eq=False, slots=True)
class Pending:
    """One step that is under way.

    Attributes:
        request: as given, with the prompts for all blocks of the chain.
        sent: what the first hop got, where that is in another form.
        answers: what each hop has answered, for whoever gave the step: the last hop's output, and all other hops' where they are wanted.
        onward: what waits to be carried from a hop to the next one.
        spent: for each hop what it and those before have taken, as in `Step.spent`.
        reached: the last hop that has said anything about the step; -1 for none.
        carried: the hops from which the client carried it on.
        replayed: the hops that were asked for it once more.
        first, last: the hops that it goes through.
        from_kept: whether the first of them has computed it before, and is asked to send on what it has kept.
    """

    request: Step
    sent: Step | None = None
    answers: dict[int, Blob] = field(default_factory=dict)
    onward: dict[int, Blob] = field(default_factory=dict)
    spent: dict[int, tuple[float, ...]] = field(default_factory=dict)
    reached: int = -1
    carried: set[int] = field(default_factory=set)
    replayed: set[int] = field(default_factory=set)
    first: int = 0
    last: int = 0
    from_kept: bool = False


class Pipeline:
    """The steps under way in one chain.

    Attributes:
        hops: the chain.
        relayed_steps: for each hop how many of its outputs the client has carried to the next one.
        replays: outputs that were asked for once more.
        finished: the steps of the latest `begin` that are done, in their order.
    """

    def __init__(self, hops: Sequence[Hop], direct: bool, carried: Collection[int] = ()) -> None:
        """
        Args:
            hops: the chain, first block to last.
            direct: whether servers were told to send outputs on to the next one; otherwise all of them answer the client.
            carried: hops that were told to answer the client all the same.
        """
        self.hops = self._hops = tuple(hops)
        self._last = len(hops) - 1
        self._direct = direct
        self._pushed = [0] * len(hops)  # of links that broke, the last step that may have been lost
        self._is_up = [direct and index < self._last and index not in carried for index in range(len(hops))]
        self._newest = 0  # the last step that was given
        self._pending: dict[int, Pending] = {}
        self.finished: list[Pending] = []
        self.relayed_steps = [0] * len(hops)
        self.replays = 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is under way."""
        return not self._pending

    def is_up(self, hop: int) -> bool:
        """Whether a hop's outputs go to the next one without the client."""
        return self._is_up[hop]

    def is_pending(self, step: int) -> bool:
        return step in self._pending

    def is_expected(self, hop: int, step: int) -> bool:
        """Whether a step is under way that the hop has not answered yet."""
        return step in self._pending and hop not in self._pending[step].spent

    def was_replayed(self, step: int, hop: int) -> bool:
        """Whether a step is under way that the hop was asked for once more."""
        return step in self._pending and hop in self._pending[step].replayed

    @property
    def oldest(self) -> Pending:
        """The first of the steps under way, of which there are some."""
        return next(iter(self._pending.values()))

    def begin(self, requests: Iterable[Step]) -> list[Send]:
        """Steps in the order of their numbers, which are above those of all before; prompts are for all blocks of the chain."""
        self.finished = []
        sends = []
        for request in requests:
            self._newest = request.step
            self._pending[request.step] = pending = Pending(request, last=self._last)
            sends.append(Send(0, self._request_to(0, pending)))
        return sends

    def rebuild(self, requests: Iterable[Step], first: int, last: int, *, from_kept: bool) -> list[Send]:
        """Steps that some hops compute anew, beside others of other hops; numbers as for `begin`.

        Args:
            requests: where they come from what is kept, their hidden states only tell shape and dtype.
            first, last: the hops that they go through, the one that has kept its outputs included.
        """
        sends = []
        for request in requests:
            self._newest = request.step
            request = replace(request, until=self._hops[last].end)
            self._pending[request.step] = pending = Pending(request, reached=first - 1, first=first, last=last, from_kept=from_kept)
            sends.append(Send(first, self._replay_of(pending) if from_kept else self._request_to(first, pending)))
        return sends

    def sent(self, step: Step) -> None:
        """A step under way went to the first hop in another form than it was given."""
        pending = self._pending.get(step.step)
        if pending is not None:
            pending.sent = step

    def abandon(self) -> None:
        """Forget what is under way: what comes of it is ignored from now on. What was done after a step that was not counts as not done."""
        if self._pending:
            oldest = self.oldest.request.step
            self.finished = [pending for pending in self.finished if pending.request.step < oldest]
            self._pending.clear()

    def answered(self, hop: int, done: StepDone) -> list[Send]:
        """A hop has answered a step; answers of steps that are not under way (any more) are ignored.

        Raises:
            ProtocolError: the answer is not what was asked for.
        """
        pending = self._pending.get(done.step)
        if pending is None:
            if self._pending and done.step > self._newest:
                raise ProtocolError(f"answered step {done.step}, which nobody gave", self._hops[hop].peer_id)
            return []
        request = pending.request
        if not pending.first <= hop <= pending.last:
            raise ProtocolError(f"answered step {done.step}, which does not go through it", self._hops[hop].peer_id)
        if hop != pending.last and self._is_up[hop] and not request.all_hidden:
            raise ProtocolError(f"answered step {done.step} instead of passing it on", self._hops[hop].peer_id)
        self._check(hop, pending, done.output)
        if hop in pending.spent:
            return []
        before = done.spent if len(done.spent) == 3 * hop else (0.0,) * (3 * hop)
        pending.spent[hop] = (*before, done.queue_s, done.compute_s, done.held_s)
        pending.reached = max(pending.reached, hop)
        if hop == pending.last or request.all_hidden:
            pending.answers[hop] = done.output
        if len(pending.answers) == (self._last + 1 if request.all_hidden else 1):
            del self._pending[done.step]
            self._finish(pending)
        elif hop != pending.last:
            pending.onward[hop] = last_of(done.output) if request.all_hidden else done.output
        return self._advance()

    def link_down(self, hop: int, pushed: int) -> list[Send]:
        """From now on a hop answers the client, since it cannot send outputs to the next hop; those up to `pushed` may have been lost.

        Raises:
            ProtocolError: the hop was not told to send outputs to anybody.
        """
        if not self._direct or hop == self._last:
            raise ProtocolError("reported a link that it was not asked for", self._hops[hop].peer_id)
        if not self._is_up[hop]:
            return []
        self._is_up[hop] = False
        for number, pending in self._pending.items():
            if number > pushed:
                break
            if not pending.first <= hop < pending.last:
                continue
            if not pending.request.hidden.shape[1] and not pending.request.all_hidden:  # nothing in it that could be lost
                pending.onward[hop] = pending.request.hidden
                pending.spent[hop] = (0.0,) * (3 * (hop + 1))
        self._pushed[hop] = pushed
        return self._advance()

    def _advance(self) -> list[Send]:
        """What can be done for links that are down."""
        sends: list[Send] = []
        if self._pending:
            for hop in range(self._last):
                if not self._is_up[hop]:
                    sends += self._ask_again(hop) + self._carry(hop)
        return sends

    def _ask_again(self, hop: int) -> list[Send]:
        """The oldest outputs of a hop that may have been lost, a few at a time."""
        sends: list[Send] = []
        under_way = 0
        for number, pending in self._pending.items():
            request = pending.request
            if number > self._pushed[hop] or under_way == REPLAYS_AT_ONCE:
                break
            if not pending.first <= hop < pending.last or pending.reached > hop or hop in pending.spent or request.all_hidden:
                continue
            under_way += 1
            if hop not in pending.replayed:
                pending.replayed.add(hop)
                self.replays += 1
                again = hop == pending.first and pending.from_kept
                replay = self._replay_of(pending) if again else Replay(number, request.position, request.hidden.shape[1])
                sends.append(Send(hop, replay))
        return sends

    def _carry(self, hop: int) -> list[Send]:
        """Outputs of a hop that can be carried to the next one now."""
        sends: list[Send] = []
        for pending in self._pending.values():
            if not pending.first <= hop < pending.last or pending.reached > hop or hop in pending.carried:
                continue
            output = pending.onward.pop(hop, None)
            if output is None:
                break  # were a later one carried first, this one would be dropped
            pending.carried.add(hop)
            self.relayed_steps[hop] += 1
            sends.append(Send(hop + 1, self._request_to(hop + 1, pending, output, pending.spent[hop])))
        return sends

    def _request_to(self, hop: int, pending: Pending, hidden: Blob | None = None, spent: tuple[float, ...] = ()) -> Step:
        """A step as a hop gets it."""
        request = pending.request
        prompts = self._prompts(hop, pending)
        keep = request.keep if self._direct or hop == self._last else 0  # the next server needs all of them
        if hidden is None and prompts is None and keep == request.keep:
            return request
        return replace(request, hidden=hidden or request.hidden, prompts=prompts, keep=keep, spent=spent)

    def _replay_of(self, pending: Pending) -> Replay:
        """What makes the first hop of a step send it on as the next one gets it."""
        request = pending.request
        return Replay(
            request.step,
            request.position,
            request.hidden.shape[1],
            request.codec,
            request.until,
            request.reach,
            request.mask,
            request.position_ids,
            self._prompts(pending.first + 1, pending),
        )

    def _prompts(self, hop: int, pending: Pending) -> Blob | None:
        """Those that a hop gets: for its own blocks, and for all that follow in the step's way where it sends it on."""
        prompts = pending.request.prompts
        if prompts is None:
            return None
        start = self._hops[0].first
        return part_of(prompts, self._hops[hop].first - start, self._hops[pending.last if self._direct else hop].end - start)

    def _check(self, hop: int, pending: Pending, output: Blob) -> None:
        request = pending.request
        rows, new, size = request.hidden.shape
        shape: tuple[int, ...] = (rows, wanted_tokens(request) if hop == pending.last else new, size)
        if request.all_hidden:
            shape = (self._hops[hop].end - self._hops[hop].first, *shape)
        if output.shape != shape or output.dtype != request.hidden.dtype:
            raise ProtocolError(
                f"answered {output.dtype} {list(output.shape)} instead of {request.hidden.dtype} {list(shape)}", self._hops[hop].peer_id
            )
        if not is_finite(output, request.mask):
            raise ProtocolError(f"answered step {request.step} with numbers that are not finite", self._hops[hop].peer_id)

    def _finish(self, pending: Pending) -> None:
        """Steps end in the order in which they began, unless servers do not keep to it."""
        at = len(self.finished)
        while at and self.finished[at - 1].request.step > pending.request.step:
            at -= 1
        self.finished.insert(at, pending)
