"""A prompt that begins like an earlier one of the same client is not computed again, answers stay the same, and no other peer notices.

What was computed is seen in the messages that the client sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import INFERENCE
from petalnet.p2p.session_messages import NAME_BYTES, UNIT_TOKENS, Attach, Attached, OpenSession, SessionOpened, Step, StepDone
from petalnet.p2p.streams import Stream

from .light_clients import ask, hidden_states
from .models import SPANS, Pair, connected, ids, load_local

GREEDY = {"do_sample": False}
PROMPT = 3 * UNIT_TOKENS + 20


@pytest.fixture(params=["llama", "mistral", "falcon"])
def pair(request: pytest.FixtureRequest, families) -> Iterator[Pair]:
    """A client that the servers have not heard of."""
    path = families.paths[request.param]
    with connected(path, families.peers, speculation=False) as remote:
        yield Pair(request.param, path, load_local(path), remote)


class Sent:
    """The messages of a client about sessions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[Message] = []
        send = Stream.send

        async def spy(stream: Stream, message: Message) -> None:
            self.messages.append(message)
            await send(stream, message)

        monkeypatch.setattr(Stream, "send", spy)

    def take(self) -> tuple[int, list[Attach]]:
        """How many tokens a row were given to the servers of the answer since the last look, and what was asked for by name."""
        steps = {message.step: message.hidden.shape[1] for message in self.messages if isinstance(message, Step)}
        attached = [message for message in self.messages if isinstance(message, Attach)]
        self.messages.clear()
        return sum(steps.values()), attached


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def test_the_same_prompt_again(pair: Pair, sent: Sent) -> None:
    prompt = ids(1, PROMPT, seed=1)
    answer = pair.same(prompt, max_new_tokens=10, **GREEDY)
    assert sent.take() == (PROMPT + 9, [])
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        again = pair.same(prompt, max_new_tokens=10, **{**GREEDY, **options})
        assert options or torch.equal(again, answer)
        tokens, attached = sent.take()
        assert tokens == 20 + 9 and len(attached) == len(SPANS[pair.family])


def test_a_prompt_that_begins_alike(pair: Pair, sent: Sent) -> None:
    """What follows differs: in its second unit, in its fourth, or it is a conversation that goes on."""
    prompt = ids(1, PROMPT, seed=2)
    answer = pair.same(prompt, max_new_tokens=60, **GREEDY)
    sent.take()
    for shared, expected in ((2 * UNIT_TOKENS + 5, 2 * UNIT_TOKENS), (PROMPT - 3, 3 * UNIT_TOKENS)):
        other = torch.cat([prompt[:, :shared], ids(1, 40, seed=shared)], dim=1)
        pair.same(other, max_new_tokens=5, **GREEDY)
        assert sent.take()[0] == other.shape[1] - expected + 4
    conversation = torch.cat(
        [answer, ids(1, 10, seed=3)], dim=1
    )  # four whole units of it were computed, the last ones of it as they were said
    pair.same(conversation, max_new_tokens=5, **GREEDY)
    assert sent.take()[0] == conversation.shape[1] - 4 * UNIT_TOKENS + 4
    pair.same(ids(1, PROMPT, seed=4), max_new_tokens=2, **GREEDY)
    assert sent.take() == (PROMPT + 1, [])


def test_rows_share_what_all_of_them_know(pair: Pair, sent: Sent) -> None:
    known, other = ids(1, PROMPT, seed=5), ids(1, PROMPT, seed=6)
    for prompt in (known, other[:, : 2 * UNIT_TOKENS + 1]):
        pair.same(prompt, max_new_tokens=2, **GREEDY)
    sent.take()
    pair.same(torch.cat([known, other]), max_new_tokens=6, **GREEDY)
    assert sent.take()[0] == PROMPT - 2 * UNIT_TOKENS + 5


def test_whoever_needs_all_outputs_gets_them(pair: Pair) -> None:
    prompt = ids(1, PROMPT, seed=7)
    pair.same(prompt, max_new_tokens=2, **GREEDY)
    with torch.inference_mode():
        expected, answer = (model(prompt, output_hidden_states=True, use_cache=True) for model in (pair.local, pair.remote))
    assert (answer.logits - expected.logits).abs().max() <= 1e-3
    assert all((ours - theirs).abs().max() <= 1e-3 for ours, theirs in zip(answer.hidden_states, expected.hidden_states, strict=True))
    answer.past_key_values.session.close()


def test_padded_rows_have_no_names(pair: Pair, sent: Sent) -> None:
    """A padded prompt's positions differ from those of the same ids without padding: neither is taken for the other."""
    prompt = ids(2, PROMPT, seed=8)
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    for given in (None, mask, None, mask):
        pair.same(prompt, attention_mask=given, max_new_tokens=5, **GREEDY)
    pair.same(prompt[1:], max_new_tokens=5, **GREEDY)


async def test_no_other_peer_sees_it(families, find_record) -> None:
    """The very names that make one peer's prompt short tell another peer nothing, even while the first one's session is open."""
    server, blocks = families.servers["llama"][0], SPANS["llama"][0]
    names = Blob("uint8", (1, 2, NAME_BYTES), "raw", bytes(range(2 * NAME_BYTES)))
    async with open_host(Identity.generate()) as owner, open_host(Identity.generate()) as other:
        record = await find_record(owner, server.peer_id, server.addrs)
        opening = OpenSession("s", record.model, *blocks, 256)

        async def known_to(host: Any) -> int:
            async with await host.open_stream(server.peer_id, INFERENCE, addrs=server.addrs) as stream:
                assert not (await ask(stream, opening, SessionOpened)).shares_prefixes
                return (await ask(stream, Attach(names), Attached)).position

        async with await owner.open_stream(server.peer_id, INFERENCE, addrs=server.addrs) as stream:
            await ask(stream, opening, SessionOpened)
            await ask(stream, Step(1, 0, hidden_states(1, 2 * UNIT_TOKENS + 3, 64), names=names), StepDone)
            assert await known_to(other) == 0
        assert await known_to(owner) == 2 * UNIT_TOKENS
        assert await known_to(other) == 0
