"""Forward and backward passes through remote blocks, as one operation of torch's autograd.

The client keeps the hidden states at the boundaries between the servers of the forward pass. Servers may keep the graphs of what they did;
where one has not, or is gone, its part of the backward pass is computed anew from what went into it, there or elsewhere. Either way the
gradients are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from petalnet.client import passes
from petalnet.client.inputs import Inputs
from petalnet.client.lora import Lora
from petalnet.client.passes import Gradients, Passed, Path, Wanted
from petalnet.client.requests import Target
from petalnet.p2p.tensors import decode_tensor, encode_tensor

SEEDS = 2**53
"""As many seeds of dropout as fit a message."""


def run(target: Target, hidden: torch.Tensor, prompts: torch.Tensor | None, inputs: Inputs) -> list[torch.Tensor]:
    """A forward pass without gradients: the output, or with `inputs.all_hidden` the outputs of all blocks."""
    passed = target.swarm.portal.run(passes.forward, target, encode_tensor(hidden), _complete(inputs, _once(prompts)))
    if not inputs.all_hidden:
        return [_output(passed.paths, hidden)]
    outputs = [[boundary for output in path.outputs for boundary in decode_tensor(output)] for path in passed.paths]
    return [_joined(boundaries, 0).to(hidden.device) for boundaries in zip(*outputs, strict=True)]


def apply(
    target: Target, hidden: torch.Tensor, prompts: torch.Tensor | None, inputs: Inputs, lora: torch.Tensor | None = None
) -> torch.Tensor:
    """A forward pass whose gradients reach `hidden`, `prompts` and `lora`.

    Args:
        lora: the numbers of `inputs.lora`, float32 [numbers], as they follow from the parameters.
    """
    output: torch.Tensor = _RemoteBlocks.apply(hidden, _once(prompts), lora, target, replace(inputs, all_hidden=False))
    return output


class _Held:
    """A forward pass, as long as a backward pass may need it."""

    def __init__(self, passed: Passed) -> None:
        self._passed: Passed | None = passed
        self._is_used = False

    def use(self) -> Passed:
        assert self._passed is not None  # what torch has saved is gone as well then, and asked for first
        self._is_used = True
        return self._passed

    def release(self) -> None:
        """Torch has let go of what it saved: after the last backward pass, or under `torch.utils.checkpoint` before there was any."""
        if self._is_used:
            self._passed = None


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, prompts: torch.Tensor | None, lora: torch.Tensor | None, target: Target, inputs: Inputs
    ) -> torch.Tensor:
        sent, inputs = encode_tensor(hidden), _complete(inputs, prompts)
        passed = target.swarm.portal.run(partial(passes.forward, for_gradients=True), target, sent, inputs)
        output = _output(passed.paths, hidden)
        for path in passed.paths:
            path.outputs.clear()
        ctx.target, ctx.held, ctx.lora = target, _Held(passed), inputs.lora
        # What was sent may be the memory of these tensors: saved, so that torch notices when somebody writes into it in between. The last
        # one tells when torch lets go of what is saved, which is after the last backward pass, and maybe long before this context ends.
        token = torch.empty(0)
        weakref.finalize(token, ctx.held.release).atexit = False
        ctx.save_for_backward(hidden, prompts, token)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad_output is None:  # nobody has used the output
            return None, None, None, None, None
        hidden, prompts, _ = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:3])
        gradient = encode_tensor(grad_output.to(hidden.dtype))
        gradients = ctx.target.swarm.portal.run(passes.backward, ctx.target, ctx.held.use(), gradient, wanted)
        grad_hidden = _joined([decode_tensor(own.hidden) for own in gradients], 0).to(hidden.device) if wanted.hidden else None
        grad_prompts = grad_lora = None
        if wanted.prompts:
            of_rows = [torch.cat([decode_tensor(part) for part in own.prompts]) for own in gradients]
            shared = prompts.shape[1] != hidden.shape[0]
            grad_prompts = (sum(of_rows[1:], of_rows[0]) if shared else _joined(of_rows, 1)).to(prompts.device)
        if wanted.lora:
            grad_lora = _grad_lora(ctx.lora, gradients)
        return grad_hidden, grad_prompts, grad_lora, None, None


def _once(prompts: torch.Tensor | None) -> torch.Tensor | None:
    """Prompts that are the same memory for all rows, as those that `expand` makes of one row's: they travel once, and so do gradients."""
    return prompts[:, :1] if prompts is not None and prompts.stride(1) == 0 else prompts


def _complete(inputs: Inputs, prompts: torch.Tensor | None) -> Inputs:
    """With prompts, and with what decides what dropout leaves out: torch's own random numbers, so that a pass that is run again under
    `torch.utils.checkpoint` leaves out the same."""
    seed = int(torch.randint(SEEDS, ())) if inputs.lora is not None and inputs.lora.dropout else inputs.seed
    return replace(inputs, prompts=None if prompts is None else encode_tensor(prompts), seed=seed)


def _output(paths: Sequence[Path], hidden: torch.Tensor) -> torch.Tensor:
    return _joined([decode_tensor(path.outputs[-1]) for path in paths], 0).to(hidden.device)


def _joined(tensors: Sequence[torch.Tensor], dimension: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dimension)


def _grad_lora(lora: Lora, gradients: Sequence[Gradients]) -> torch.Tensor:
    """float32 [numbers]: the sum of what all micro-batches say."""
    total = torch.zeros_like(lora.weights)
    for own in gradients:
        for first, end, numbers in own.lora:
            total[lora.numbers(first, end)] += decode_tensor(numbers)
    return total
