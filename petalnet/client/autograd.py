"""Forward and backward passes through remote blocks, as one operation of torch's autograd.

The client keeps the hidden states at the boundaries between the servers of the forward pass; the backward pass gives each server its
input and the gradient of its output. So a server that failed in between is replaced by others without changing the gradients.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from petalnet.client import passes
from petalnet.client.inputs import Inputs
from petalnet.client.requests import Target, prompts_of
from petalnet.p2p.fields import Blob
from petalnet.p2p.tensors import decode_tensor, encode_tensor


def run(target: Target, hidden: torch.Tensor, prompts: torch.Tensor | None, inputs: Inputs) -> list[torch.Tensor]:
    """A forward pass without gradients: the output, or with `inputs.all_hidden` the outputs of all blocks."""
    inputs = replace(inputs, prompts=None if prompts is None else encode_tensor(prompts))
    _, outputs = target.swarm.portal.run(passes.forward, target, encode_tensor(hidden), inputs)
    if inputs.all_hidden:
        return [boundary for output in outputs for boundary in decode_tensor(output).to(hidden.device)]
    return [decode_tensor(outputs[-1]).to(hidden.device)]


def apply(target: Target, hidden: torch.Tensor, prompts: torch.Tensor | None, inputs: Inputs) -> torch.Tensor:
    """A forward pass whose gradients reach `hidden` and `prompts`."""
    output: torch.Tensor = _RemoteBlocks.apply(hidden, prompts, target, inputs)
    return output


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, prompts: torch.Tensor | None, target: Target, inputs: Inputs) -> torch.Tensor:
        sent = encode_tensor(hidden)
        inputs = replace(inputs, prompts=None if prompts is None else encode_tensor(prompts))
        ctx.hops, outputs = target.swarm.portal.run(partial(passes.forward, for_gradients=True), target, sent, inputs)
        ctx.target, ctx.inputs = target, inputs
        ctx.boundaries = [sent, *outputs[:-1]]
        # What was sent may be the memory of `hidden` itself: saved, so that torch notices when somebody writes into it in between.
        ctx.save_for_backward(hidden)
        return decode_tensor(outputs[-1]).to(hidden.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        target: Target = ctx.target
        gradient = encode_tensor(grad_output.to(hidden.dtype))
        prompt_gradients: list[torch.Tensor] = []
        for hop, entered in zip(reversed(ctx.hops), reversed(ctx.boundaries), strict=True):
            part = replace(target, first=hop.first, end=hop.end)
            inputs = replace(ctx.inputs, prompts=prompts_of(ctx.inputs.prompts, target, hop))
            gradient, prompt_gradient = _backward(part, entered, gradient, inputs)
            if prompt_gradient is not None:
                prompt_gradients.append(decode_tensor(prompt_gradient))
        grad_hidden = decode_tensor(gradient).to(hidden.device)
        grad_prompts = torch.cat(prompt_gradients[::-1]).to(hidden.device) if prompt_gradients else None
        return grad_hidden, grad_prompts, None, None


def _backward(target: Target, entered: Blob, gradient: Blob, inputs: Inputs) -> tuple[Blob, Blob | None]:
    return target.swarm.portal.run(passes.backward, target, entered, gradient, inputs)
