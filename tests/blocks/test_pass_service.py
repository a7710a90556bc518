"""Passes without a session over real hosts: gradients are the same from kept graphs and without, and graphs are bounded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from petalnet.blocks import pass_service
from petalnet.blocks.checks import Limits
from petalnet.blocks.graphs import GRAPH_AGE_S
from petalnet.blocks.passes import RecordingWork
from petalnet.errors import CallerError, GraphGone
from petalnet.p2p.fields import Message
from petalnet.p2p.frames import FrameLimits
from petalnet.p2p.host import Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error
from petalnet.p2p.pass_messages import Backward, BackwardDone, DropGraphs, Forward, ForwardDone
from petalnet.p2p.protocols import FORWARD
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.spans import DEVICES
from tests.blocks.test_service import END, FIRST, HIDDEN, MASK, MODEL, Served, ask, eventually, refused, run_step, serving, whole

pytestmark = DEVICES

GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(3, 10, HIDDEN, generator=GENERATOR)
PROMPTS = torch.randn(2, 3, 4, HIDDEN, generator=GENERATOR)
GRADIENT = torch.randn(3, 10, HIDDEN, generator=GENERATOR)
FORWARD_PASS = Forward(MODEL, FIRST, END, encode_tensor(X), mask=encode_tensor(MASK), prompts=encode_tensor(PROMPTS))
FROM_GRAPH = Backward(model=MODEL, first=FIRST, end=END, grad_output=encode_tensor(GRADIENT), graph=1)
ANEW = replace(FROM_GRAPH, graph=0, hidden=FORWARD_PASS.hidden, mask=FORWARD_PASS.mask, prompts=FORWARD_PASS.prompts)


@pytest.fixture
async def served(saved: Callable[..., Path]) -> AsyncIterator[Served]:
    async with serving(saved("llama")) as running:
        yield running


def expected(served: Served) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of hidden states and prompts."""
    inputs = [X.clone().requires_grad_(), PROMPTS.clone().requires_grad_()]
    (output,) = served.span.forward(inputs[0], attention_mask=MASK, prompts=inputs[1])
    return (output.detach(), *torch.autograd.grad(output, inputs, GRADIENT))


async def forward(stream: Stream, graph: int) -> ForwardDone:
    answer = await ask(stream, replace(FORWARD_PASS, graph=graph))
    assert isinstance(answer, ForwardDone), answer
    return answer


async def backward(stream: Stream, request: Backward) -> BackwardDone:
    answer = await ask(stream, request)
    assert isinstance(answer, BackwardDone), answer
    return answer


def close(found: Any, wanted: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(decode_tensor(found), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scores", [Limits.scores, 100])
async def test_gradients_from_a_kept_graph_and_anew(saved: Callable[..., Path], scores: int) -> None:
    """With room for the scores of a single row, the rows go through the blocks one after another, and the graph has a part for each."""
    async with serving(saved("llama"), limits=Limits(scores=scores)) as served, await served.stream(FORWARD) as stream:
        output, hidden, prompts = expected(served)
        done = await forward(stream, 1)
        assert done.kept
        torch.testing.assert_close(decode_tensor(done.output)[MASK], output[MASK], atol=1e-5, rtol=1e-4)
        graphs = served.service.passes.graphs
        assert len(graphs) == 1 and graphs.bytes > 0
        for request in (FROM_GRAPH, ANEW):
            found = await backward(stream, request)
            close(found.grad_hidden, hidden)
            close(found.grad_prompts, prompts)
            assert found.grad_lora is None
        assert not len(graphs) and not graphs.bytes
        await refused(stream, FROM_GRAPH, "graph_gone", "not kept here")


async def test_a_graph_is_its_peers_own_and_fits_its_pass(served: Served) -> None:
    output, hidden, prompts = expected(served)
    async with (
        await served.stream(FORWARD) as stream,
        open_host(Identity.generate(), listen=[]) as other,
        await other.open_stream(served.server.peer_id, FORWARD, addrs=served.server.addrs) as others,
    ):
        await forward(stream, 1)
        await refused(others, FROM_GRAPH, "graph_gone", "not kept here")
        for request, match in (
            (replace(FROM_GRAPH, end=END - 1), "graph 1 is of blocks 1:3, not 1:2"),
            (replace(FROM_GRAPH, grad_output=encode_tensor(GRADIENT[:2])), "the gradient must be floats [3, 10, 32]"),
            (replace(FROM_GRAPH, grad_output=encode_tensor(GRADIENT[None])), "the gradient must be floats [3, 10, 32]"),
            (replace(FROM_GRAPH, grad_output=encode_tensor(GRADIENT.int())), "not int32"),
        ):
            await refused(stream, request, "caller", match)
        await refused(stream, replace(FROM_GRAPH, model="other"), "moved", "another model")
        found = await backward(stream, replace(FROM_GRAPH, input_gradient=False))
        assert found.grad_hidden is None
        close(found.grad_prompts, prompts)


async def test_graphs_go_when_they_are_dropped_and_with_their_peer(served: Served) -> None:
    graphs = served.service.passes.graphs
    async with await served.stream(FORWARD) as stream:
        for number in (1, 2, 3):
            await forward(stream, number)
        await stream.send(DropGraphs((1, 3, 99)))
        await refused(stream, FROM_GRAPH, "graph_gone", "not kept here")
        assert len(graphs) == 1
        async with (
            open_host(Identity.generate(), listen=[]) as other,
            await other.open_stream(served.server.peer_id, FORWARD, addrs=served.server.addrs) as others,
        ):
            await forward(others, 1)
            assert len(graphs) == 2
        await eventually(lambda: len(graphs) == 1)
        assert graphs.find(served.client.peer_id, 2) is not None


async def test_a_peer_that_keeps_and_never_comes_back_is_bounded(saved: Callable[..., Path]) -> None:
    """Its older graphs go for its newer ones, and those of others stay."""
    async with serving(saved("llama"), graph_bytes=8 << 20) as served, await served.stream(FORWARD) as stream:
        output, hidden, _ = expected(served)
        graphs = served.service.passes.graphs
        async with (
            open_host(Identity.generate(), listen=[]) as other,
            await other.open_stream(served.server.peer_id, FORWARD, addrs=served.server.addrs) as others,
        ):
            await forward(others, 1)
            for number in range(1, 30):
                assert (await forward(stream, number)).kept
                assert graphs.bytes <= 8 << 20
            close((await backward(others, FROM_GRAPH)).grad_hidden, hidden)
        await refused(stream, FROM_GRAPH, "graph_gone", "not kept here")
        close((await backward(stream, replace(FROM_GRAPH, graph=29))).grad_hidden, hidden)


async def test_without_room_nothing_is_kept_and_gradients_are_the_same(saved: Callable[..., Path]) -> None:
    async with serving(saved("llama"), graph_bytes=1 << 19) as served, await served.stream(FORWARD) as stream:
        output, hidden, prompts = expected(served)
        done = await forward(stream, 1)
        assert not done.kept and not len(served.service.passes.graphs)
        torch.testing.assert_close(decode_tensor(done.output)[MASK], output[MASK], atol=1e-5, rtol=1e-4)
        found = await backward(stream, ANEW)
        close(found.grad_hidden, hidden)
        close(found.grad_prompts, prompts)


async def test_a_pass_that_its_peer_gives_up_keeps_nothing(saved: Callable[..., Path]) -> None:
    async with serving(saved("llama"), limits=Limits(scores=100)) as served, await served.stream(FORWARD) as stream:
        await stream.send(Forward(MODEL, FIRST, END, encode_tensor(torch.randn(900, 10, HIDDEN)), graph=1))
        await eventually(lambda: served.service.engine.rounds.count > 3)
        await stream.close()
        await eventually(lambda: not len(served.service.passes.graphs))
        assert not served.service.passes.graphs.bytes


async def test_a_backward_pass_that_has_begun_is_served_while_draining(served: Served) -> None:
    _, hidden, _ = expected(served)
    async with await served.stream(FORWARD) as stream:
        await forward(stream, 1)
        served.service.drain()
        await refused(stream, ANEW, "busy", "shutting down")
        close((await backward(stream, FROM_GRAPH)).grad_hidden, hidden)
        await refused(stream, FROM_GRAPH, "busy", "shutting down")


async def test_no_gradients_of_more_than_there_is(served: Served) -> None:
    async with await served.stream(FORWARD) as stream:
        answer = await ask(stream, replace(FORWARD_PASS, graph=1, prompts=None))
        assert isinstance(answer, ForwardDone)
        found = await backward(stream, replace(FROM_GRAPH, lora="v1", lora_gradient=True))
        assert found.grad_hidden is not None and found.grad_prompts is None and found.grad_lora is None


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
async def test_numbers_that_are_not_finite_or_huge_harm_nobody(saved: Callable[..., Path], family: str) -> None:
    """Whoever sends them gets what they come to; the next pass, and a session meanwhile, are as ever."""
    async with serving(saved(family)) as served, await served.stream(FORWARD) as stream, served.session() as session:
        output, hidden, prompts = expected(served)
        plain = whole(served.span, X)[0]
        for number in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-42):
            bad = encode_tensor(torch.full_like(X, number))
            bad_prompts = encode_tensor(torch.full_like(PROMPTS, number))
            for request in (
                replace(FORWARD_PASS, hidden=bad, graph=1),
                replace(FORWARD_PASS, prompts=bad_prompts, graph=2),
                replace(FROM_GRAPH, graph=1),
                replace(FROM_GRAPH, graph=2, grad_output=bad),
                replace(ANEW, grad_output=bad),
                replace(ANEW, prompts=bad_prompts),
                replace(ANEW, hidden=bad),
            ):
                answer = await ask(stream, request)
                assert not isinstance(answer, Error), answer
            torch.testing.assert_close(await run_step(session, X, 0), plain, atol=1e-5, rtol=1e-4)
            found = await backward(stream, ANEW)
            close(found.grad_hidden, hidden)
            close(found.grad_prompts, prompts)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompts": encode_tensor(PROMPTS[:1])}, "prompts must be floats [2, 3, length, 32]"),
        ({"prompts": encode_tensor(PROMPTS[:, :2])}, "prompts must be floats [2, 3, length, 32]"),
        ({"prompts": encode_tensor(PROMPTS.int())}, "prompts must be floats"),
        ({"prompts": encode_tensor(torch.zeros(2, 3, 11, HIDDEN))}, "prompts of 11 tokens are longer than 10"),
        ({"adapter": "nobody's"}, 'there is no adapter "nobody\'s" here'),
        ({"position_ids": encode_tensor(torch.full((3, 10), -1))}, "position ids must be from 0"),
    ],
)
async def test_what_does_not_fit_is_refused_before_anything_is_computed(served: Served, changes: dict[str, Any], match: str) -> None:
    async with await served.stream(FORWARD) as stream:
        await refused(stream, replace(FORWARD_PASS, graph=1, **changes), "caller", match)
        await refused(stream, replace(ANEW, **changes), "caller", match)
        await refused(stream, replace(ANEW, lora="v1"), "lora_gone", "v1")
        assert not served.service.engine.rounds.count and not len(served.service.passes.graphs)


async def test_old_graphs_expire_with_time(served: Served) -> None:
    async with await served.stream(FORWARD) as stream:
        await forward(stream, 1)
        served.service.passes.graphs.expire(trio.current_time() + GRAPH_AGE_S + 1)
        await refused(stream, FROM_GRAPH, "graph_gone", "not kept here")


async def test_a_graph_that_goes_while_it_is_looked_at(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compute thread may drop it, for the room of another, between two looks of the network thread."""
    _, hidden, _ = expected(served)
    async with await served.stream(FORWARD) as stream:
        await forward(stream, 1)
        monkeypatch.setattr(served.service.passes.graphs, "take", lambda graph: False)
        await refused(stream, FROM_GRAPH, "graph_gone", "not kept here")
        close((await backward(stream, replace(ANEW, graph=1))).grad_hidden, hidden)


async def test_an_idle_stream_holds_no_messages(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be of hundreds of megabytes, which a peer with many streams could have a server keep beside all budgets."""
    seen: list[weakref.ref[Message]] = []
    answer_of = served.service.passes.answer

    async def answer(stream: Stream, request: Message) -> Message | None:
        done = await answer_of(stream, request)
        seen.extend(weakref.ref(message) for message in (request, done) if message is not None)
        return done

    monkeypatch.setattr(served.service.passes, "answer", answer)
    async with await served.stream(FORWARD) as stream:
        await forward(stream, 1)
        await backward(stream, FROM_GRAPH)
        assert len(seen) == 4
        await eventually(lambda: all(message() is None for message in seen))


@pytest.mark.parametrize("kept", [True, False])
async def test_gradients_that_no_message_holds_are_the_callers_fault(served: Served, kept: bool) -> None:
    """What they are of may have come in fewer bytes, being rounded or in parts."""
    protocol = replace(FORWARD, limits=FrameLimits(header=1024, payload=X.nbytes + 100))
    stream: Any = SimpleNamespace(peer_id="a", network="", protocol=protocol)
    passes = served.service.passes
    small = {"hidden": encode_tensor(X, "int8"), "prompts": encode_tensor(PROMPTS, "int8")}
    if kept:
        done = await passes.answer(stream, replace(FORWARD_PASS, graph=1, **small))
        assert isinstance(done, ForwardDone) and done.kept
    with pytest.raises(CallerError, match="the gradients take .* bytes, one message holds"):
        await passes.answer(stream, FROM_GRAPH if kept else replace(ANEW, **small))
    assert not len(passes.graphs)
    done = await passes.answer(stream, replace(ANEW, **small, prompt_gradient=False))
    assert isinstance(done, BackwardDone)


async def test_what_failed_is_freed_without_the_collector(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[RecordingWork]] = []

    class Watched(RecordingWork):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(weakref.ref(self))

        def part(self, start: int, end: int) -> None:
            raise GraphGone("there is no room for this graph")

    monkeypatch.setattr(pass_service, "RecordingWork", Watched)
    monkeypatch.setattr(pass_service, "WATCHED_TOKENS", 0)  # as if it were a long one
    _, hidden, _ = expected(served)
    async with await served.stream(FORWARD) as stream:
        gc.collect()
        gc.disable()
        try:
            close((await backward(stream, ANEW)).grad_hidden, hidden)
            assert len(made) == 1
            await eventually(lambda: made[0]() is None)
        finally:
            gc.enable()
