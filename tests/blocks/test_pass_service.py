"""Passes without a session over real hosts: gradients are the same from kept graphs and without, and graphs are bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet.blocks.checks import Limits
from petalnet.p2p.host import Stream
from petalnet.p2p.pass_messages import Backward, BackwardDone, Forward, ForwardDone
from petalnet.p2p.protocols import FORWARD
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.test_service import END, FIRST, HIDDEN, MASK, MODEL, Served, ask, refused, serving

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
    """With room for the scores of a single row, the pass is run a row a round, and its graph has three parts."""
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
