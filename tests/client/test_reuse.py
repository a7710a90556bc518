"""A prompt that begins like an earlier one is computed from where all servers of the route know it, and the answer stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from petalnet.p2p.session_messages import UNIT_TOKENS, Attached

GREEDY = {"do_sample": False}
PROMPT = 3 * UNIT_TOKENS + 8


def computed(wire: Any) -> int:
    """The tokens that were computed for the prompt of the latest answer, whose messages are forgotten."""
    tokens = 0
    for step, answer in zip(wire.steps, wire.answers, strict=True):
        tokens += step.hidden.shape[1]
        if answer.output.shape[1]:  # of chunks before the last no output is wanted
            break
    wire.clear()
    return tokens


def attached(wire: Any) -> list[int]:
    """The servers' answers to being asked for a beginning."""
    return [message.position for message in wire.received if isinstance(message, Attached)]


def random_ids(seed: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(4, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def test_only_what_is_new_is_computed(pair: Any, wire: Any) -> None:
    ids = random_ids(1)
    expected = pair.local.generate(ids, max_new_tokens=6, **GREEDY)
    for prefilled, known in ((PROMPT, []), (8, [3 * UNIT_TOKENS] * 3), (8, [3 * UNIT_TOKENS] * 3)):
        assert torch.equal(pair.remote.generate(ids, max_new_tokens=6, **GREEDY), expected)
        assert attached(wire) == known
        assert computed(wire) == prefilled
    whole_units = ids[:, : 3 * UNIT_TOKENS]  # at least the last token is computed: its output is wanted
    assert torch.equal(
        pair.remote.generate(whole_units, max_new_tokens=2, **GREEDY), pair.local.generate(whole_units, max_new_tokens=2, **GREEDY)
    )
    assert computed(wire) == UNIT_TOKENS


def test_all_logits_are_computed(pair: Any, wire: Any) -> None:
    ids = random_ids(2)
    pair.remote.generate(ids, max_new_tokens=2, **GREEDY)
    wire.clear()
    with torch.inference_mode(), pair.remote.inference_session(max_length=PROMPT):
        answer = pair.remote(ids).logits
        assert torch.allclose(answer, pair.local(ids).logits, atol=1e-4)
    assert not attached(wire)
    assert sum(step.hidden.shape[1] for step in wire.steps) == PROMPT


def test_other_embeddings_of_the_same_ids_are_another_prompt(pair: Any, wire: Any) -> None:
    ids = random_ids(3)
    pair.remote.generate(ids, max_new_tokens=2, **GREEDY)
    wire.clear()
    embeddings = [model.get_input_embeddings().weight for model in (pair.remote, pair.local)]
    before = embeddings[0].detach().clone()
    with torch.no_grad():
        for weight in embeddings:
            weight[ids[0, 10]] += 0.5  # as training would
    try:
        assert torch.equal(pair.remote.generate(ids, max_new_tokens=4, **GREEDY), pair.local.generate(ids, max_new_tokens=4, **GREEDY))
        assert computed(wire) == PROMPT
    finally:
        with torch.no_grad():
            for weight in embeddings:
                weight.copy_(before)


def test_a_conversation_goes_on_in_new_sessions(pair: Any, wire: Any) -> None:
    """Also after rollback: what was said is known, what was taken back is not."""
    ids = random_ids(4, 2 * UNIT_TOKENS)
    with pair.remote.inference_session(max_length=250) as session:
        answer = pair.remote.generate(ids, max_new_tokens=UNIT_TOKENS + 20, session=session, **GREEDY)
        session.position -= 30
        kept = answer[:, : session.position]
        other = pair.remote.generate(random_ids(5, 20), max_new_tokens=12, session=session, **GREEDY)
    said = torch.cat([kept, other], dim=1)
    wire.clear()
    ours, theirs = (model.generate(said, max_new_tokens=5, **GREEDY) for model in (pair.remote, pair.local))
    assert torch.equal(ours, theirs)
    assert computed(wire) == said.shape[1] - 3 * UNIT_TOKENS
    assert torch.equal(pair.remote.generate(answer, max_new_tokens=5, **GREEDY), pair.local.generate(answer, max_new_tokens=5, **GREEDY))


def test_the_server_that_knows_least_counts(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], wire: Any) -> None:
    with serving(bloom_path, []) as servers:
        servers.start(0, 3)
        servers.start(3, 6, pool_tokens=9 * 32)
        with connect(bloom_path, servers.peers) as model:
            first, second = random_ids(6), random_ids(7)
            expected = model.generate(first, max_new_tokens=4, **GREEDY)
            model.generate(second, max_new_tokens=4, **GREEDY)  # takes the second server's room: it forgets most of the first one
            for forgot in (True, False):
                wire.clear()
                assert torch.equal(model.generate(first, max_new_tokens=4, **GREEDY), expected)
                least, most = sorted(attached(wire))
                assert most == 3 * UNIT_TOKENS and (least < most) == forgot
                assert computed(wire) == PROMPT - least
