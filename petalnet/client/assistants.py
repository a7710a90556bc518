"""Draft models: how many tokens the library lets an `assistant_model` propose for each step.

The library proposes a fixed number, or one that goes up and down with what was right. Over a network the best number follows from what a
step takes, what a proposal takes, and how often it is right, which is what a `DraftPolicy` weighs. Only greedy answers are adapted: they
are the same whatever is proposed. In sampled ones the number of proposals decides which random numbers are drawn, so there the library's
schedule stands, and a seed gives what it gives without a swarm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from petalnet.client.speculation import MOST_DRAFTED, DraftPolicy

if TYPE_CHECKING:
    from petalnet.client.remote import RemoteSequential
    from petalnet.client.session import InferenceSession

_RECENT_WEIGHT = 0.2


def adapt_assistant(
    generator: Any, session: InferenceSession, blocks: RemoteSequential, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Have a policy choose how many tokens the library's candidate generator proposes.

    Other kinds of generators stay as they are, and so do those whose model says itself how their number is to change.
    """
    if type(generator) is not AssistedCandidateGenerator:
        return
    given = generator.assistant_model.generation_config
    if given.num_assistant_tokens_schedule is not None:
        return
    most = min(given.num_assistant_tokens or MOST_DRAFTED, MOST_DRAFTED)
    blocks.assistant_policy = policy = blocks.assistant_policy.for_answer()
    adapted = _Adapted(generator, session, policy, most, clock)
    generator.get_candidates, generator.update_candidate_strategy = adapted.get_candidates, adapted.update_candidate_strategy


class _Adapted:
    """The two calls by which the library uses a candidate generator, with a policy around them."""

    def __init__(
        self, generator: AssistedCandidateGenerator, session: InferenceSession, policy: DraftPolicy, most: int, clock: Callable[[], float]
    ) -> None:
        self._generator, self._session, self._policy, self._most, self._clock = generator, session, policy, most, clock
        self._propose, self._update = generator.get_candidates, generator.update_candidate_strategy
        self._token_s = 0.0  # of the draft model, for a token that it proposes
        self._proposed_at = 0.0
        self._proposed = 0
        self._is_first = True  # the step that also computes the prompt

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the library's: the ids with proposals behind them, [1, length + proposed], and their logits."""
        chosen = self._policy.choose(0, self._most, self._token_s)
        # The library prepares the draft model's inputs for the very first proposal as if that came with the prompt.
        self._generator.num_assistant_tokens = max(chosen, 1) if self._is_first else chosen
        began = self._clock()
        ids, logits = self._propose(input_ids, **kwargs)
        self._proposed_at = self._clock()
        self._proposed = ids.shape[1] - input_ids.shape[1]
        if self._proposed:
            token_s = (self._proposed_at - began) / self._proposed
            self._token_s += (token_s - self._token_s) * (_RECENT_WEIGHT if self._token_s else 1.0)
        return ids, logits

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """As the library's, once it is known how many of the proposals were right."""
        seconds, proposed, accepted = self._clock() - self._proposed_at, self._proposed, int(num_matches)
        if not self._is_first:
            self._policy.note_step(1 + proposed, seconds)
        self._is_first = False
        for place in range(min(accepted + 1, proposed)):
            self._policy.note_guess(0, place < accepted)
        self._policy.note_draft(proposed, accepted, proposed * self._token_s)
        self._session.drafted += proposed
        self._session.accepted += accepted
        self._update(input_ids, scores, num_matches)
