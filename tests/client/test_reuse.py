"""A prompt that begins like an earlier one is computed from where all servers of the route know it, and the answer stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet.client import chain
from petalnet.p2p.messages import UNIT_TOKENS, Attach, Attached, Message, Step

GREEDY = {"do_sample": False}
PROMPT = 3 * UNIT_TOKENS + 8


class Requests:
    """What servers were asked."""

    def __init__(self) -> None:
        self.computed: list[int] = []  # tokens of each step
        self.attached: list[int] = []  # the servers' answers to being asked for a beginning

    def first_steps(self, hops: int) -> list[int]:
        """The tokens that each hop computed for the prompt of the latest answer."""
        found, self.computed = self.computed[:hops], []
        return found


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    seen = Requests()
    ask = chain.ask

    async def spy(stream: Any, request: Message, expected: Any) -> Any:
        answer = await ask(stream, request, expected)
        if isinstance(request, Step):
            seen.computed.append(request.hidden.shape[1])
        elif isinstance(request, Attach):
            assert isinstance(answer, Attached)
            seen.attached.append(answer.position)
        return answer

    monkeypatch.setattr(chain, "ask", spy)
    yield seen


def random_ids(seed: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(4, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def test_only_what_is_new_is_computed(pair: Any, requests: Requests) -> None:
    ids = random_ids(1)
    expected = pair.local.generate(ids, max_new_tokens=6, **GREEDY)
    for prefilled in (PROMPT, 8, 8):
        assert torch.equal(pair.remote.generate(ids, max_new_tokens=6, **GREEDY), expected)
        assert requests.first_steps(3) == [prefilled] * 3
    assert requests.attached == [3 * UNIT_TOKENS] * 6
    whole_units = ids[:, : 3 * UNIT_TOKENS]  # at least the last token is computed: its output is wanted
    assert torch.equal(
        pair.remote.generate(whole_units, max_new_tokens=2, **GREEDY), pair.local.generate(whole_units, max_new_tokens=2, **GREEDY)
    )
    assert requests.first_steps(3) == [UNIT_TOKENS] * 3


def test_all_logits_are_computed(pair: Any, requests: Requests) -> None:
    ids = random_ids(2)
    pair.remote.generate(ids, max_new_tokens=2, **GREEDY)
    requests.first_steps(3)
    with torch.inference_mode(), pair.remote.inference_session(max_length=PROMPT):
        answer = pair.remote(ids).logits
        assert torch.allclose(answer, pair.local(ids).logits, atol=1e-4)
    assert requests.first_steps(3) == [PROMPT] * 3
    assert not requests.attached


def test_other_embeddings_of_the_same_ids_are_another_prompt(pair: Any, requests: Requests) -> None:
    ids = random_ids(3)
    pair.remote.generate(ids, max_new_tokens=2, **GREEDY)
    requests.first_steps(3)
    embeddings = [model.get_input_embeddings().weight for model in (pair.remote, pair.local)]
    before = embeddings[0].detach().clone()
    with torch.no_grad():
        for weight in embeddings:
            weight[ids[0, 10]] += 0.5  # as training would
    try:
        assert torch.equal(pair.remote.generate(ids, max_new_tokens=4, **GREEDY), pair.local.generate(ids, max_new_tokens=4, **GREEDY))
        assert requests.first_steps(3) == [PROMPT] * 3
    finally:
        with torch.no_grad():
            for weight in embeddings:
                weight.copy_(before)


def test_a_conversation_goes_on_in_new_sessions(pair: Any, requests: Requests) -> None:
    """Also after rollback: what was said is known, what was taken back is not."""
    ids = random_ids(4, 2 * UNIT_TOKENS)
    with pair.remote.inference_session(max_length=250) as session:
        answer = pair.remote.generate(ids, max_new_tokens=UNIT_TOKENS + 20, session=session, **GREEDY)
        session.position -= 30
        kept = answer[:, : session.position]
        other = pair.remote.generate(random_ids(5, 20), max_new_tokens=12, session=session, **GREEDY)
    said = torch.cat([kept, other], dim=1)
    requests.first_steps(0)
    ours, theirs = (model.generate(said, max_new_tokens=5, **GREEDY) for model in (pair.remote, pair.local))
    assert torch.equal(ours, theirs)
    assert requests.first_steps(3) == [said.shape[1] - 3 * UNIT_TOKENS] * 3
    assert torch.equal(pair.remote.generate(answer, max_new_tokens=5, **GREEDY), pair.local.generate(answer, max_new_tokens=5, **GREEDY))


def test_the_server_that_knows_least_counts(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], requests: Requests
) -> None:
    with serving(bloom_path, []) as servers:
        servers.start(0, 3)
        servers.start(3, 6, pool_tokens=9 * 32)
        with connect(bloom_path, servers.peers) as model:
            first, second = random_ids(6), random_ids(7)
            expected = model.generate(first, max_new_tokens=4, **GREEDY)
            model.generate(second, max_new_tokens=4, **GREEDY)  # takes the second server's room: it forgets all but the first unit
            for attached, prefilled in (({3 * UNIT_TOKENS, UNIT_TOKENS}, PROMPT - UNIT_TOKENS), ({3 * UNIT_TOKENS}, 8)):
                requests.first_steps(0)
                requests.attached.clear()
                assert torch.equal(model.generate(first, max_new_tokens=4, **GREEDY), expected)
                assert requests.first_steps(2) == [prefilled] * 2
                assert set(requests.attached) == attached
