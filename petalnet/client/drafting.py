"""Drafts beneath the library's loop: what makes one step of a session bring several tokens of an answer.

The library's `generate` asks a model's `forward` for one token after another. In an answer of one row, `forward` sends guesses of the next
tokens along with the token that it was given (`speculation`), returns the output of that token, and holds the others. Where the library
then chooses a token that was guessed, its output is there already; where it chooses another, the session goes on from there, since servers
roll back with the step that comes. So everything that decides about tokens stays the library's: it sees the same outputs in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from petalnet.client.cache import SessionCache
from petalnet.client.speculation import MOST_DRAFTED, DraftPolicy
from petalnet.models.frequencies import Frequencies

if TYPE_CHECKING:
    from petalnet.client.remote import RemoteSequential
    from petalnet.client.session import InferenceSession

_EXTENDED = frozenset({"input_ids", "attention_mask", "position_ids"})
"""Arguments of a backbone's `forward` that have a column for each token and that are understood here."""


class Drafting:
    """The drafts of one answer.

    Attributes:
        session: whose `tokens` count what the library has asked for, without guesses that it has not come to.
    """

    def __init__(
        self,
        session: InferenceSession,
        policy: DraftPolicy,
        ids: list[int],
        last_entry: int,
        ends: Collection[int],
        frequencies: Frequencies,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            policy: what decides; it learns.
            ids: all of the row so far; numbers below 0 for what is not known.
            last_entry: the most KV entries that the row's tokens may take in the end.
            ends: ids after which nothing is computed.
            frequencies: of the model's rotary embeddings: a guess must not give the token that it is sent along with other ones.
        """
        self.session = session
        self._policy = policy
        self._lookup = session.lookup
        self._lookup.set(ids)
        self._last_entry = last_entry
        self._ends = frozenset(ends)
        self._frequencies = frequencies
        self._clock = clock
        self._held: list[int] = []  # the guesses of the last step
        self._outputs: Any = None  # the library's output of that step
        self._accepted = 0
        self._spent: tuple[float, float] | None = None  # network and queues, before the step under way
        self._began = 0.0

    def end(self) -> DraftPolicy:
        """The answer is complete, or has failed. Returns what was learned."""
        self._settle()
        self.session.set_aside(0)
        return self._policy

    # ---- a token whose output is there

    def held_output(self, call: Mapping[str, Any]) -> Any:
        """The library's output for a call of `forward`, where it was guessed and computed before; else None."""
        session = self.session
        if not self._held or not session.ahead:
            return None
        ids, cache = call.get("input_ids"), call.get("past_key_values")
        if ids is None or tuple(ids.shape) != (1, 1) or not isinstance(cache, SessionCache) or cache.session is not session:
            return None
        token, place = int(ids), len(self._held) - session.ahead
        if self._held[place] != token or call.get("output_hidden_states"):
            return None
        session.trace.token_begins(self._clock())
        start = session.tokens
        self._learn(token, start)
        session.confirm()
        session.note_tokens(ids, start)
        self._accepted += 1
        session.accepted += 1
        return self._row(place + 1)

    def _row(self, index: int) -> Any:
        """The output of one token of the last step, as the library returns it."""
        outputs = self._outputs
        fields = {**outputs, "last_hidden_state": outputs.last_hidden_state[:, index : index + 1]}
        return type(outputs)(**fields)

    # ---- a token that takes a step

    def draft(self, token: int, start: int, vocabulary: int | None) -> list[int]:
        """Guesses to send along with token `start` of the row; may be none. What the last step held is dropped."""
        self._settle()
        self._learn(token, start)
        lookup = self._lookup
        prompts = self.session.prompt_entries
        alike = self._frequencies.room(prompts + start + 1)
        last = min(self._last_entry, self.session.max_length - prompts)
        room = min(last - start - 1, MOST_DRAFTED if alike is None else alike)
        if start == 0 or len(lookup) != start + 1 or lookup.last != token:
            return []
        drafted = lookup.draft(self._policy.choose(lookup.length, min(room, MOST_DRAFTED)))
        for place, guess in enumerate(drafted):
            if guess in self._ends or guess < 0 or (vocabulary is not None and guess >= vocabulary):
                return drafted[:place]
        return drafted

    def _learn(self, token: int, start: int) -> None:
        """The row goes on with this token."""
        lookup = self._lookup
        if len(lookup) > start + 1 or (len(lookup) == start + 1 and lookup.last != token):
            lookup.cut(start)  # somebody has set the session back
        if len(lookup) == start:
            guess = lookup.guess()
            if guess is not None:
                self._policy.note_guess(lookup.length, guess == token)
            lookup.append(token)

    def step_begins(self) -> None:
        """A step of one token, with or without guesses, is about to be computed."""
        if self._spent is None:
            self._spent = self._spending()
        self._began = self._clock()

    def step_ends(self, outputs: Any, drafted: list[int], start: int) -> Any:
        """It was computed; returns what the library is to see of its outputs."""
        seconds, (network_before, queue_before) = self._clock() - self._began, self._spent or (0.0, 0.0)
        network, queue = self._spent = self._spending()
        if start:  # the first step of a session also waits for its servers
            network_s = network - network_before if network > network_before else None
            self._policy.note_step(1 + len(drafted), seconds, network_s, queue - queue_before)
        if not drafted:
            return outputs
        self.session.drafted += len(drafted)
        self._held, self._outputs, self._accepted = drafted, outputs, 0
        return self._row(0)

    def _spending(self) -> tuple[float, float]:
        """Seconds of the answer so far that went to the network and to queues of servers."""
        trace = self.session.trace
        return trace.network_s, sum([hop.queue_s for hop in trace.hops])

    def _settle(self) -> None:
        """Nothing more of the last draft will be asked for."""
        if self._held:
            self._policy.note_draft(len(self._held), self._accepted)
            self._drop()

    def _drop(self) -> None:
        self._held, self._outputs, self._accepted = [], None, 0


_drafting: ContextVar[Drafting | None] = ContextVar("petalnet_drafting", default=None)


def current_drafting() -> Drafting | None:
    """Of the answer under way in this context; None where it is not to draft."""
    return _drafting.get()


@contextmanager
def drafting_with(drafting: Drafting | None, blocks: RemoteSequential) -> Iterator[None]:
    """Calls of the session's model inside are one answer, which drafts; `blocks` keep what it has learned."""
    token = _drafting.set(drafting)
    try:
        yield
    finally:
        _drafting.reset(token)
        if drafting is not None:
            blocks.draft_policy = drafting.end()


def extended(call: Mapping[str, Any], drafted: list[int]) -> dict[str, Any] | None:
    """The call of a backbone's `forward` for one token with guesses behind it; None where it has arguments that cannot be extended."""
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and (name not in _EXTENDED or value.ndim != 2 or value.shape[0] != 1):
            return None
    ids, mask, positions = call["input_ids"], call.get("attention_mask"), call.get("position_ids")
    count = len(drafted)
    longer = dict(call, input_ids=torch.cat([ids, ids.new_tensor([drafted])], dim=1))
    if mask is not None:
        longer["attention_mask"] = torch.cat([mask, mask.new_ones(1, count)], dim=1)
    if positions is not None:
        after = torch.arange(1, count + 1, dtype=positions.dtype, device=positions.device)
        longer["position_ids"] = torch.cat([positions, positions[:, -1:] + after], dim=1)
    return longer
