"""The protocol handlers over real hosts on loopback: right answers, typed refusals, and nobody harmed by somebody else's fault."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petalnet.blocks.checks import Limits
from petalnet.blocks.promises import SHORTEST_WAIT_S
from petalnet.blocks.service import BlockService
from petalnet.blocks.span import Span
from petalnet.errors import PeerLost
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.host import Host, Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error, Ping
from petalnet.p2p.pass_messages import Backward, Forward
from petalnet.p2p.protocols import FORWARD, INFERENCE, Protocol
from petalnet.p2p.session_messages import NAME_BYTES, Attach, Attached, OpenSession, SessionOpened, Step, StepDone
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.spans import DEVICES

pytestmark = DEVICES

HIDDEN, MODEL, FIRST, END = 32, "key", 1, 3
LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
X = torch.randn(3, 10, HIDDEN, generator=torch.Generator().manual_seed(3))
MASK = torch.ones(3, 10, dtype=torch.bool)
MASK[0, :4] = MASK[1, :1] = False


OPEN = OpenSession("s", MODEL, FIRST, END, 40)


@dataclass
class Served:
    """A server of blocks 1:3 of a four-block model, a client of it, and the same span to compare with."""

    service: BlockService
    server: Host
    client: Host
    span: Span

    async def stream(self, protocol: Protocol) -> Stream:
        return await self.client.open_stream(self.server.peer_id, protocol, addrs=self.server.addrs)

    @asynccontextmanager
    async def session(self, first: int = FIRST, end: int = END, max_length: int = 40) -> AsyncIterator[Stream]:
        async with await self.stream(INFERENCE) as stream:
            opened = await ask(stream, OpenSession("s", MODEL, first, end, max_length))
            assert isinstance(opened, SessionOpened), opened
            yield stream

    async def closed(self) -> None:
        """Wait until the server has no session left; then it holds no page but those that are kept of prompts."""
        await eventually(lambda: not len(self.service.sessions))
        await self.service.check()
        assert self.service.sessions.free_tokens == self.service.sessions.max_tokens


@asynccontextmanager
async def serving(folder: Path, *, limits: Limits | None = None, pool: int = 1024, **options: Any) -> AsyncIterator[Served]:
    span, twin = (Span.load(ModelSource.open(folder), FIRST, END) for _ in range(2))
    service = BlockService(span, model=MODEL, kv_tokens=pool, limits=limits, **options)
    async with (
        open_host(Identity.generate(), listen=LOOPBACK) as server,
        open_host(Identity.generate(), listen=[]) as client,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(service.run)
        server.serve(INFERENCE, service.handle_inference)
        server.serve(FORWARD, service.handle_forward)
        server.on_peer_lost(service.peer_lost)
        yield Served(service, server, client, twin)
        await service.check()
        nursery.cancel_scope.cancel()


@pytest.fixture
async def served(saved: Callable[..., Path]) -> AsyncIterator[Served]:
    async with serving(saved("llama")) as running:
        yield running


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition of the server's state holds; the test fails where it does not in time."""
    with trio.fail_after(5):
        while True:
            if condition():
                return
            await trio.sleep(0.005)


async def ask(stream: Stream, message: Message) -> Message:
    with trio.fail_after(10):
        await stream.send(message)
        answer = await stream.receive()
    assert answer is not None
    return answer


def step(hidden: torch.Tensor, position: int, *, codec: str = "raw", **extras: Any) -> Step:
    flags = {name: extras.pop(name) for name in ("all_hidden", "step", "keep", "promise_rows") if name in extras}
    blobs = {name: encode_tensor(tensor) for name, tensor in extras.items()}
    return Step(**{"step": 0, **flags}, position=position, hidden=encode_tensor(hidden, codec), **blobs)


async def run_step(stream: Stream, *args: Any, **kwargs: Any) -> torch.Tensor:
    request = step(*args, **kwargs)
    answer = await ask(stream, request)
    assert isinstance(answer, StepDone), answer
    assert (answer.step, answer.position) == (request.step, request.position + request.hidden.shape[1])
    return decode_tensor(answer.output)


def names(rows: int, units: int) -> Blob:
    """Names of units, all different."""
    return encode_tensor(torch.arange(rows * units * NAME_BYTES).view(rows, units, NAME_BYTES).to(torch.uint8))


async def refused(stream: Stream, message: Message, code: str, match: str) -> None:
    answer = await ask(stream, message)
    assert isinstance(answer, Error), answer
    assert answer.code == code, answer
    assert match in answer.message


def whole(span: Span, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(span.forward(hidden, **options))


async def test_a_session_equals_the_span(served: Served) -> None:
    positions = (MASK.long().cumsum(1) - 1).clamp(min=0).int()
    expected = whole(served.span, X, attention_mask=MASK, position_ids=positions, all_hidden=True)
    async with served.session() as stream:
        pieces = []
        for number, (a, b) in enumerate([(0, 6), (6, 7), (7, 10)]):
            pieces.append(await run_step(stream, X[:, a:b], a, mask=MASK[:, :b], position_ids=positions[:, a:b], step=number))
        torch.testing.assert_close(torch.cat(pieces, dim=1)[MASK], expected[-1][MASK], atol=1e-5, rtol=1e-4)
        again = await run_step(stream, X[:, 5:], 5, mask=MASK, position_ids=positions[:, 5:], all_hidden=True)
        torch.testing.assert_close(again[:, MASK[:, 5:]], expected[:, :, 5:][:, MASK[:, 5:]], atol=1e-5, rtol=1e-4)
    await served.closed()


async def test_part_of_the_span_rows_in_another_order_and_prompts(served: Served) -> None:
    order = torch.tensor([2, 0, 2, 1])
    prompts = torch.randn(1, 3, 4, HIDDEN)
    expected = whole(served.span, X[order], prompts=prompts[:, order], first=2)[0]
    async with served.session(first=2) as stream:
        await run_step(stream, X[:, :7], 0, prompts=prompts)
        found = await run_step(stream, X[order, 7:], 7, order=order)
        torch.testing.assert_close(found, expected[:, 7:], atol=1e-5, rtol=1e-4)
        await run_step(stream, X[:1, :1].expand(4, 1, HIDDEN), 7, order=torch.tensor([3, 1, 2, 0]))
        found = await run_step(stream, X[order[[3, 1, 2, 0]], 7:], 7)
        torch.testing.assert_close(found, expected[[3, 1, 2, 0], 7:], atol=1e-5, rtol=1e-4)
        empty = await run_step(stream, X[:, :0], 7, order=torch.tensor([1, 2, 0]))
        assert empty.shape == (3, 0, HIDDEN)
        found = await run_step(stream, X[[0, 2, 1], 7:], 7)
        torch.testing.assert_close(found, expected[[1, 2, 3], 7:], atol=1e-5, rtol=1e-4)


async def test_a_session_may_begin_anew_with_other_rows(served: Served) -> None:
    async with served.session() as stream:
        await run_step(stream, X, 0)
        found = await run_step(stream, X[:1, :5], 0)
        torch.testing.assert_close(found, whole(served.span, X[:1, :5])[0], atol=1e-5, rtol=1e-4)


async def test_only_the_outputs_that_are_wanted_come_back(served: Served) -> None:
    expected = whole(served.span, X, all_hidden=True)
    async with served.session() as stream:
        for all_hidden, wanted in ((False, expected[-1]), (True, expected)):
            for keep in (0, 1, 3, 10):
                found = await run_step(stream, X, 0, keep=keep, all_hidden=all_hidden)
                torch.testing.assert_close(found, wanted[..., -keep:, :], atol=1e-5, rtol=1e-4)


async def test_room_is_promised_for_rows_to_come(served: Served) -> None:
    async with served.session() as stream:
        await run_step(stream, ROW, 0, promise_rows=4)
        assert served.service.sessions.free_tokens <= 1024 - 4 * 40
        found = await run_step(stream, X[:1, :2].expand(4, 2, HIDDEN), 10, order=torch.zeros(4, dtype=torch.int64))
        torch.testing.assert_close(found[3], found[0])


async def test_a_session_is_attached_before_its_first_step(served: Served) -> None:
    async with served.session(max_length=200) as stream:
        await refused(stream, Attach(names(2, 4)), "caller", "4 units of 64 tokens do not fit a session of max_length 200")
        await refused(stream, Attach(names(2, 0)), "caller", "0 units of 64 tokens do not fit")
        await refused(stream, Attach(names(1025, 1)), "caller", "a batch has 1 to 1024 rows, not 1025")
        await refused(stream, Attach(encode_tensor(torch.zeros(2, 3, 15, dtype=torch.uint8))), "caller", "must be uint8 [2, 3, 16]")
        await refused(stream, Attach(encode_tensor(torch.zeros(2, 3, 16))), "caller", "must be uint8 [2, 3, 16], not float32")
        await refused(stream, Attach(encode_tensor(torch.zeros(16))), "caller", "a batch has 1 to 1024 rows, not 0")
        assert await ask(stream, Attach(names(2, 3))) == Attached(0)
        await run_step(stream, X, 0)
        await refused(stream, Attach(names(2, 3)), "caller", "before its first step")


async def test_a_prompt_that_begins_like_an_earlier_one(served: Served) -> None:
    long = torch.randn(1, 200, HIDDEN, generator=torch.Generator().manual_seed(5))
    expected = whole(served.span, long)[0]
    named = names(1, 3)
    async with served.session(max_length=250) as stream:
        await run_step(stream, long[:, :130], 0, names=decode_tensor(named)[:, :2])
        async with served.session(max_length=250) as meanwhile:
            assert await ask(meanwhile, Attach(named)) == Attached(128)
        found = await run_step(stream, long[:, 130:], 130, names=decode_tensor(named)[:, 2:], keep=1)
        torch.testing.assert_close(found, expected[:, -1:], atol=1e-5, rtol=1e-4)
    await served.closed()
    async with served.session(max_length=250) as stream:
        assert await ask(stream, Attach(named)) == Attached(192)
        await refused(stream, step(long[:, 193:], 193), "caller", "at position 193, but the session holds only 192")
        await refused(stream, step(long.expand(2, 200, HIDDEN)[:, 192:], 192), "caller", "the step has 2 rows, the session 1")
        torch.testing.assert_close(await run_step(stream, long[:, 192:], 192), expected[:, 192:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(await run_step(stream, long[:, 64:], 64), expected[:, 64:], atol=1e-5, rtol=1e-4)
    async with served.session(max_length=250) as stream:
        assert await ask(stream, Attach(names(2, 3))) == Attached(0), "the second row's names are not known"
        await run_step(stream, X, 0)
    await served.closed()


@pytest.mark.parametrize("shared", [False, True])
async def test_what_another_peer_named_is_found_only_where_the_host_shares_it(saved: Callable[..., Path], shared: bool) -> None:
    long = torch.randn(1, 130, HIDDEN, generator=torch.Generator().manual_seed(5))
    async with serving(saved("llama"), share_prefixes=shared) as served:
        async with served.session(max_length=250) as stream:
            await run_step(stream, long, 0, names=decode_tensor(names(1, 2)))
            async with (
                open_host(Identity.generate(), listen=[]) as other,
                await other.open_stream(served.server.peer_id, INFERENCE, addrs=served.server.addrs) as theirs,
            ):
                opened = await ask(theirs, replace(OPEN, max_length=250))
                assert isinstance(opened, SessionOpened) and opened.shares_prefixes == shared
                assert await ask(theirs, Attach(names(1, 2))) == Attached(128 if shared else 0)
                found = await run_step(theirs, long[:, 128 * shared :], 128 * shared)
                torch.testing.assert_close(found, whole(served.span, long)[0][:, 128 * shared :], atol=1e-5, rtol=1e-4)
        await served.closed()


async def test_attaching_is_promised_its_room_first(served: Served) -> None:
    async with served.session(max_length=900) as first, served.session(max_length=100) as second:
        await run_step(first, ROW, 0)
        await refused(second, Attach(names(2, 1)), "busy", "no room for 2 rows of 100 tokens")
        await refused(second, Attach(names(17, 1)), "too_large", "17 rows of max_length 100 exceed")
        assert served.service.sessions.free_tokens == 96
        await first.close()
        await eventually(lambda: served.service.sessions.free_tokens == 1024)
        assert await ask(second, Attach(names(2, 1))) == Attached(0)
        assert served.service.sessions.free_tokens == 1024 - 2 * 128


async def test_one_peer_does_not_take_all_that_is_free(served: Served) -> None:
    async with served.session(max_length=320) as first, served.session(max_length=640) as second, served.session(max_length=480) as third:
        await run_step(first, ROW, 0)
        await refused(
            second, step(ROW, 0), "busy", "no room for 1 rows of 640 tokens: 448 tokens of KV cache are free for a peer with other"
        )
        async with open_host(Identity.generate(), listen=[]) as other:
            stream = await other.open_stream(served.server.peer_id, INFERENCE, addrs=served.server.addrs)
            await ask(stream, replace(OPEN, max_length=700))
            await run_step(stream, ROW, 0)
        await eventually(lambda: served.service.sessions.free_tokens == 1024 - 320)
        await refused(third, step(ROW, 0), "busy", "no room for 1 rows of 480 tokens: 448 tokens")
    await served.closed()


async def test_a_client_that_dies_in_mid_prompt_leaves_nothing(saved: Callable[..., Path]) -> None:
    async with serving(saved("llama"), limits=Limits(chunk_tokens=1)) as served:
        for _ in range(3):
            async with open_host(Identity.generate(), listen=[]) as other:
                stream = await other.open_stream(served.server.peer_id, INFERENCE, addrs=served.server.addrs)
                await ask(stream, replace(OPEN, max_length=500))
                before = served.service.engine.rounds.count
                await stream.send(step(torch.randn(1, 450, HIDDEN), 0, names=decode_tensor(names(1, 7))))
                await eventually(lambda before=before: served.service.engine.rounds.count > before + 3)
            await served.closed()
            assert served.service.runner.kept_tokens == 0
            assert served.service.engine.queue_length == 0


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_is_interrupted_in_mid_prompt_is_not_computed_for(saved: Callable[..., Path], how: str) -> None:
    async with serving(saved("llama"), limits=Limits(chunk_tokens=1)) as served, await served.stream(INFERENCE) as stream:
        await ask(stream, replace(OPEN, max_length=500))
        await stream.send(step(torch.randn(1, 450, HIDDEN), 0))
        await eventually(lambda: served.service.engine.rounds.count > 3)
        await getattr(stream, how)()
        await served.closed()
        assert served.service.engine.rounds.count < 400


async def test_a_pass_whose_asker_is_gone_is_dropped(saved: Callable[..., Path]) -> None:
    async with serving(saved("llama"), limits=Limits(scores=100)) as served, await served.stream(FORWARD) as stream:
        await stream.send(Forward(MODEL, FIRST, END, encode_tensor(torch.randn(900, 10, HIDDEN))))  # a row a round
        await eventually(lambda: served.service.engine.rounds.count > 3)
        await stream.close()
        await eventually(lambda: not served.service.engine.queue_length)
        assert served.service.engine.rounds.count < 800


async def test_a_long_step_runs_in_pieces_and_lets_others_in_between(saved: Callable[..., Path]) -> None:
    async with serving(saved("llama"), limits=Limits(chunk_tokens=6)) as served:
        prompts = torch.randn(2, 3, 5, HIDDEN)
        expected = whole(served.span, X, attention_mask=MASK, prompts=prompts, all_hidden=True)
        async with served.session() as stream:
            before = served.service.engine.rounds.count
            found = await run_step(stream, X, 0, mask=MASK, prompts=prompts, all_hidden=True)
            assert served.service.engine.rounds.count == before + 5, "five pieces of two tokens for each of three rows"
            torch.testing.assert_close(found[:, MASK], expected[:, MASK], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "bfloat16"), ("bfloat16", "raw"), ("float16", "raw"), ("float32", "int8")])
async def test_small_answers_come_exact_and_in_the_dtype_of_the_question(served: Served, dtype: str, codec: str) -> None:
    async with served.session() as stream:
        answer = await ask(stream, step(X.to(getattr(torch, dtype)), 0, codec=codec))
    assert isinstance(answer, StepDone)
    assert (answer.output.dtype, answer.output.codec) == (dtype, "raw")
    expected = whole(served.span, X)[0]
    assert (decode_tensor(answer.output).float() - expected).abs().max() < 0.1 * expected.abs().max()


async def test_stateless_passes(served: Served) -> None:
    prompts = torch.randn(2, 3, 4, HIDDEN)
    async with await served.stream(FORWARD) as stream:
        for all_hidden in (False, True):
            request = Forward(
                MODEL, FIRST, END, encode_tensor(X), mask=encode_tensor(MASK), prompts=encode_tensor(prompts), all_hidden=all_hidden
            )
            answer = await ask(stream, request)
            expected = whole(served.span, X, attention_mask=MASK, prompts=prompts, all_hidden=True)
            found, expected = decode_tensor(answer.output), expected if all_hidden else expected[-1]  # type: ignore[attr-defined]
            torch.testing.assert_close(found[..., MASK, :], expected[..., MASK, :], atol=1e-5, rtol=1e-4)


def _noting_rows(forward: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    def run(hidden: torch.Tensor, **options: Any) -> Any:
        seen.append(hidden.shape[0])
        return forward(hidden, **options)

    return run


async def test_what_needs_too_much_memory(saved: Callable[..., Path]) -> None:
    """BLOOM's scores are in memory for every head: 3 rows × 4 heads × 10 × 10 of them in a pass of ten tokens."""
    expected = None
    for scores, rows in ((1200, 3), (1199, 2), (400, 1)):
        async with serving(saved("bloom"), limits=Limits(scores=scores)) as served:
            expected = whole(served.span, X)[0]
            async with await served.stream(FORWARD) as stream:
                seen: list[int] = []
                served.service.span.__dict__["forward"] = _noting_rows(served.service.span.forward, seen)
                answer: Any = await ask(stream, Forward(MODEL, FIRST, END, encode_tensor(X)))
                assert max(seen) == rows
                torch.testing.assert_close(decode_tensor(answer.output), expected, atol=1e-5, rtol=1e-4)
    async with serving(saved("bloom"), limits=Limits(scores=399)) as served, await served.stream(FORWARD) as stream:
        await refused(stream, Forward(MODEL, FIRST, END, encode_tensor(X)), "caller", "need too much memory for attention")
    async with serving(saved("bloom"), limits=Limits(scores=1199)) as served, served.session() as stream:
        before = served.service.engine.rounds.count
        found = await run_step(stream, X, 0)
        assert served.service.engine.rounds.count == before + 2, "nine tokens, then one"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("with_prompts", [False, True])
async def test_gradients(served: Served, with_prompts: bool) -> None:
    inputs = [X.clone().requires_grad_(), torch.randn(2, 3, 4, HIDDEN, requires_grad=True)]
    weights = torch.randn(X.shape)
    (output,) = served.span.forward(inputs[0], prompts=inputs[1] if with_prompts else None)
    expected = torch.autograd.grad(output, inputs[: 1 + with_prompts], weights)
    prompts = encode_tensor(inputs[1]) if with_prompts else None
    async with await served.stream(FORWARD) as stream:
        answer: Any = await ask(
            stream,
            Backward(model=MODEL, first=FIRST, end=END, hidden=encode_tensor(X), grad_output=encode_tensor(weights), prompts=prompts),
        )
    torch.testing.assert_close(decode_tensor(answer.grad_hidden), expected[0], atol=1e-5, rtol=1e-4)
    assert (answer.grad_prompts is not None) == with_prompts
    if with_prompts:
        torch.testing.assert_close(decode_tensor(answer.grad_prompts), expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("request_", "code", "match"),
    [
        (replace(OPEN, model="other"), "moved", "another model is served here"),
        (replace(OPEN, first=0), "moved", "blocks 0:3 are not served here, only 1:3"),
        (replace(OPEN, first=2, end=2), "caller", "blocks 2:2 are not served here"),
        (replace(OPEN, max_length=1025), "too_large", "exceed the 1024 tokens of KV cache"),
        (step(X, 0), "unsupported", "a session begins with open_session, not step"),
        (Ping(3), "unsupported", "a session begins with open_session, not ping"),
    ],
)
async def test_sessions_that_are_refused(served: Served, request_: Message, code: str, match: str) -> None:
    async with await served.stream(INFERENCE) as stream:
        await refused(stream, request_, code, match)
        assert await stream.receive() is None
    assert len(served.service.sessions) == 0


ROW = X[:1]


@pytest.mark.parametrize(
    ("request_", "code", "match"),
    [
        (step(X, 5), "caller", "the step is at position 5, but the session holds only 4"),
        (step(torch.zeros(3, 37, HIDDEN), 4), "caller", "4 + 37 tokens exceed the session's max_length 40"),
        (step(ROW, 4), "caller", "the step has 1 rows, the session 3"),
        (step(X[:, :, :31], 4), "caller", "hidden states must be floats [rows, tokens, 32], not float32 [3, 10, 31]"),
        (step(X[0], 4), "caller", "hidden states must be floats"),
        (step(X.int(), 4), "caller", "not int32 [3, 10, 32]"),
        (step(X[:0], 0), "caller", "a batch has 1 to 1024 rows, not 0"),
        (step(torch.zeros(1025, 1, HIDDEN), 0), "caller", "a batch has 1 to 1024 rows, not 1025"),
        (step(torch.zeros(26, 1, HIDDEN), 0), "too_large", "26 rows of max_length 40 exceed the 1024 tokens"),
        (step(X, 4, mask=MASK), "caller", "the mask must be bool [3, 14], not bool [3, 10]"),
        (step(X, 0, mask=MASK.int()), "caller", "the mask must be bool [3, 10], not int32"),
        (step(X, 4, position_ids=torch.zeros(3, 9, dtype=torch.int32)), "caller", "position ids must be int32 [3, 10]"),
        (step(X, 4, position_ids=torch.zeros(3, 10)), "caller", "position ids must be int32"),
        (step(X, 4, position_ids=torch.full((3, 10), -1)), "caller", "position ids must be from 0 to"),
        (step(X, 4, position_ids=torch.full((3, 10), 1 << 40)), "caller", "position ids must be from 0 to"),
        (step(X, 4, order=torch.tensor([0, 1, 3])), "caller", "the order must name rows 0 to 2"),
        (step(X, 4, order=torch.tensor([0, 1])), "caller", "the order must be int64 [3], not int64 [2]"),
        (step(X, 4, order=torch.tensor([0, 1, 2], dtype=torch.int32)), "caller", "the order must be int64 [3], not int32 [3]"),
        (
            step(X, 4, prompts=torch.zeros(3, 3, 2, HIDDEN)),
            "caller",
            "prompts must be floats [2, 3, length, 32], not float32 [3,",
        ),
        (step(X, 4, prompts=torch.zeros(2, 3, HIDDEN)), "caller", "prompts must be floats"),
        (step(X, 4, prompts=torch.zeros(2, 3, 41, HIDDEN)), "caller", "prompts of 41 tokens are longer than 40"),
        (step(X, 4, keep=11), "caller", "outputs of 11 tokens are wanted of a step of 10"),
        (step(X, 4, promise_rows=1025), "caller", "a batch has 1 to 1024 rows, not 1025"),
        (step(X, 4, promise_rows=26), "too_large", "26 rows of max_length 40 exceed the 1024 tokens"),
        (step(X, 4, names=torch.zeros(3, 1, 16, dtype=torch.uint8)), "caller", "names of units must be uint8 [3, 0, 16], not uint8 [3, 1"),
        (Ping(1), "unsupported", "a session takes step, not ping"),
        (OPEN, "unsupported", "a session takes step, not open_session"),
    ],
)
async def test_a_wrong_step_is_refused_and_the_session_goes_on(served: Served, request_: Message, code: str, match: str) -> None:
    async with served.session() as stream:
        await run_step(stream, X[:, :4], 0)
        await refused(stream, request_, code, match)
        torch.testing.assert_close(await run_step(stream, X[:, 4:], 4), whole(served.span, X)[0][:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("request_", "code", "match"),
    [
        (Forward("other", FIRST, END, encode_tensor(X)), "moved", "another model is served here"),
        (Forward(MODEL, 0, 2, encode_tensor(X)), "moved", "blocks 0:2 are not served here"),
        (Forward(MODEL, FIRST, END, encode_tensor(X[:, :0])), "caller", "a pass has 1 to 32768 tokens, not 3 × 0"),
        (Forward(MODEL, FIRST, END, encode_tensor(torch.zeros(8, 4097, HIDDEN))), "caller", "a pass has 1 to 32768 tokens"),
        (Forward(MODEL, FIRST, END, encode_tensor(X), mask=encode_tensor(MASK[:, 1:])), "caller", "the mask must be bool [3, 10]"),
        (
            Backward(model=MODEL, first=FIRST, end=END, hidden=encode_tensor(X), grad_output=encode_tensor(X[:2])),
            "caller",
            "the gradient must be floats [3, 10, 32] as the outputs, not float32 [2, 10, 32]",
        ),
        (
            Backward(model=MODEL, first=FIRST, end=END, hidden=encode_tensor(X), grad_output=encode_tensor(X.int())),
            "caller",
            "as the outputs, not int32 [3, 10, 32]",
        ),
        (Ping(1), "unsupported", "this protocol takes forward and backward, not ping"),
    ],
)
async def test_a_wrong_pass_is_refused_and_the_stream_goes_on(served: Served, request_: Message, code: str, match: str) -> None:
    async with await served.stream(FORWARD) as stream:
        await refused(stream, request_, code, match)
        answer: Any = await ask(stream, Forward(MODEL, FIRST, END, encode_tensor(X)))
        torch.testing.assert_close(decode_tensor(answer.output), whole(served.span, X)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gptj", "xglm"])
async def test_positions_beyond_a_table_are_refused(saved: Callable[..., Path], family: str) -> None:
    async with serving(saved(family)) as served, await served.stream(FORWARD) as stream:
        long = torch.zeros(1, 41, HIDDEN)
        await refused(stream, Forward(MODEL, FIRST, END, encode_tensor(long)), "caller", "41 tokens are more than the 40 positions")
        positions = encode_tensor(torch.full((1, 5), 40, dtype=torch.int32))
        await refused(stream, Forward(MODEL, FIRST, END, encode_tensor(long[:, :5]), position_ids=positions), "caller", "from 0 to 39")


async def test_a_full_pool_is_busy_and_frees_up(served: Served) -> None:
    async with served.session(max_length=900) as first:
        await run_step(first, ROW, 0)
        async with (
            open_host(Identity.generate(), listen=[]) as other,
            await other.open_stream(served.server.peer_id, INFERENCE, addrs=served.server.addrs) as second,
        ):
            assert isinstance(await ask(second, replace(OPEN, max_length=200)), SessionOpened)
            answer = await ask(second, step(ROW, 0))
            assert isinstance(answer, Error) and answer.code == "busy", answer
            assert "no room for 1 rows of 200 tokens: 96 tokens of KV cache are free" in answer.message
            assert answer.fits_tokens == 96 and 0 < answer.retry_after_s <= 30
            await first.close()
            await eventually(lambda: served.service.sessions.free_tokens == 1024)
            await run_step(second, ROW, 0)


async def test_a_vanished_client_frees_its_room(saved: Callable[..., Path]) -> None:
    async with serving(saved("llama")) as served:
        release, began = threading.Event(), threading.Event()

        def occupy() -> None:
            began.set()
            release.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.service.engine.ask, occupy)
            await trio.to_thread.run_sync(began.wait)
            async with open_host(Identity.generate(), listen=[]) as other:
                stream = await other.open_stream(served.server.peer_id, INFERENCE, addrs=served.server.addrs)
                assert isinstance(await ask(stream, OPEN), SessionOpened)
                await stream.send(step(X, 0))
                await eventually(lambda: served.service.sessions.free_tokens < 1024)
            await eventually(lambda: not len(served.service.sessions))  # while its step still waits for the compute thread
            assert served.service.sessions.free_tokens == 1024
            release.set()
        await served.closed()
        async with served.session() as stream:
            await run_step(stream, X, 0)


async def test_a_failed_computation_ends_only_its_session(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served.session() as good, served.session() as bad:
        await run_step(good, X[:, :4], 0)
        with monkeypatch.context() as broken:
            broken.setattr(served.service.span.stages[-1], "step", lambda *args, **kwargs: 1 // 0)
            await refused(bad, step(X, 0), "server", "computation failed: ZeroDivisionError")
            assert await bad.receive() is None
        torch.testing.assert_close(await run_step(good, X[:, 4:], 4), whole(served.span, X)[0][:, 4:], atol=1e-5, rtol=1e-4)
        assert len(served.service.sessions) == 1


async def test_an_idle_session_is_closed(saved: Callable[..., Path]) -> None:
    async with serving(saved("llama"), limits=Limits(idle_s=0.2)) as served, served.session() as stream:
        with trio.fail_after(5):
            answer = await stream.receive()
            assert isinstance(answer, Error)
            assert "nothing came for 0.2 s" in answer.message
            assert await stream.receive() is None
        await served.closed()


async def test_an_idle_session_gives_way_when_others_are_refused(saved: Callable[..., Path]) -> None:
    """Else a peer that opens a session for all of the pool and does nothing would keep everybody out for half an hour."""
    async with (
        serving(saved("llama"), limits=Limits(idle_when_full_s=0.0)) as served,
        served.session(max_length=1024) as idle,
        served.session(max_length=512) as other,
    ):
        await run_step(idle, ROW, 0)
        await eventually(lambda: all(session.waiting is not None for session in served.service.sessions))
        answer = await ask(other, step(ROW, 0))
        assert isinstance(answer, Error) and answer.code == "busy" and answer.retry_after_s == SHORTEST_WAIT_S
        gone = await idle.receive()
        assert isinstance(gone, Error) and "idle for long" in gone.message and await idle.receive() is None
        await eventually(lambda: len(served.service.sessions) == 1)
        await run_step(other, ROW, 0)


async def test_a_session_that_was_used_lately_stays_though_others_are_refused(served: Served) -> None:
    async with served.session(max_length=1024) as lately, served.session(max_length=512) as other:
        await run_step(lately, ROW, 0)
        await refused(other, step(ROW, 0), "busy", "no room")
        await run_step(lately, ROW, 10)


async def test_draining_refuses_new_work_only(served: Served) -> None:
    async with served.session() as stream:
        await run_step(stream, X[:, :4], 0)
        served.service.drain()
        async with await served.stream(INFERENCE) as other:
            await refused(other, OPEN, "busy", "shutting down")
        async with await served.stream(FORWARD) as other:
            await refused(other, Forward(MODEL, FIRST, END, encode_tensor(X)), "busy", "shutting down")
        await run_step(stream, X[:, 4:], 4)


async def test_an_answer_that_no_message_holds_is_refused(served: Served) -> None:
    from petalnet.p2p.frames import FrameLimits

    tight = replace(INFERENCE, limits=FrameLimits(header=16384, payload=2 * X.numel() * 4 - 1))
    served.server.serve(replace(tight, id="/petalnet/tight/1.0.0"), served.service.handle_inference)
    async with await served.stream(replace(INFERENCE, id="/petalnet/tight/1.0.0")) as stream:
        await ask(stream, OPEN)
        await refused(stream, step(X, 0, all_hidden=True), "caller", "more than one message holds")
        await run_step(stream, X, 0)


async def test_many_sessions_at_once_stay_apart(served: Served) -> None:
    expected = whole(served.span, X)[0]

    async def one(row: int) -> None:
        async with served.session() as stream:
            for position in range(10):
                found = await run_step(stream, X[row : row + 1, position : position + 1], position)
                torch.testing.assert_close(found, expected[row : row + 1, position : position + 1], atol=1e-5, rtol=1e-4)

    async with trio.open_nursery() as nursery:
        for number in range(9):
            nursery.start_soon(one, number % 3)
    await served.closed()


async def test_the_client_sees_a_lost_server(served: Served) -> None:
    async with served.session() as stream:
        await served.server.disconnect(served.client.peer_id)
        with pytest.raises(PeerLost), trio.fail_after(10):
            await ask(stream, step(X, 0))
    await served.closed()
