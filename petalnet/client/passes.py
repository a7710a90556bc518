"""Passes that belong to no session: forward without a cache, and backward. On the portal's thread.

A hop whose server fails is run on another one, with what went into it. A server that hangs breaks no stream: one that takes longer than
expected by a wide margin is asked whether it is there at all, and where it is not, and others hold its blocks, these are tried.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import trio

from petalnet.client.inputs import Inputs
from petalnet.client.lateness import Lateness
from petalnet.client.precision import as_entered, pass_on_the_wire
from petalnet.client.requests import (
    Answer,
    Target,
    ask,
    blaming,
    checked,
    describe_route,
    find_hops,
    joined,
    last_of,
    open_stream,
    prompts_of,
    retrying,
)
from petalnet.errors import BusyError, CallerError, MissingBlocksError, PeerLate, PeerLost, PetalnetError, ProtocolError, ServerError
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.pass_messages import Backward, BackwardDone, Forward, ForwardDone
from petalnet.routing.routes import Hop

logger = logging.getLogger(__name__)

BACKWARD_WEIGHT = 3.0
"""A backward pass computes the forward pass again, and twice as much for the gradients."""


async def forward(target: Target, hidden: Blob, inputs: Inputs, *, for_gradients: bool = False) -> tuple[list[Hop], list[Blob]]:
    """A stateless forward pass through the target's blocks, each hop retried on another route when its server fails.

    Args:
        for_gradients: whether gradients of it will be wanted; then a slow link is no reason to round anything.
    Returns:
        the hops that did it and the output of each ([blocks, rows, length, hidden] each with `inputs.all_hidden`).
    """
    hops: list[Hop] = []
    outputs: list[Blob] = []
    rest = target
    while rest.first < rest.end:

        async def attempt(full: frozenset[str], rest: Target = rest, hidden: Blob = hidden) -> tuple[Hop, Blob]:
            tokens = math.prod(hidden.shape[:-1])
            hop = (await find_hops(rest, full, "forward", tokens))[0]
            request = Forward(
                model=target.model,
                first=hop.first,
                end=hop.end,
                hidden=hidden,
                mask=inputs.mask,
                position_ids=inputs.position_ids,
                prompts=prompts_of(inputs.prompts, target, hop),
                all_hidden=inputs.all_hidden,
            )
            precision = target.settings.wire_precision
            bytes_s = target.swarm.membership.host.bytes_s(hop.peer_id) if precision == "auto" and not for_gradients else None
            request = pass_on_the_wire(request, precision, hop.dtype, bytes_s, hop.prefill_s)
            async with blaming(target, hop):
                answer = await _ask(target, hop, request, ForwardDone, token_s=hop.prefill_s)
                checked(answer.output, hidden, hop, inputs.all_hidden)
            membership = target.swarm.membership
            membership.mark_ok(hop.peer_id)
            blocks, compute_s, queue_s = hop.end - hop.first, answer.compute_s, answer.queue_s
            membership.observe(hop.peer_id, tokens=tokens, blocks=blocks, compute_s=compute_s, queue_s=queue_s, work="forward")
            return hop, answer.output

        hop, output = await retrying(rest, attempt, at_stake=bool(hops))
        hops.append(hop)
        outputs.append(output)
        hidden = last_of(output) if inputs.all_hidden else output
        rest = replace(rest, first=hop.end)
    if target.settings.show_route is True:
        logger.info("route of a pass: %s", describe_route(hops))
    return hops, outputs


async def backward(target: Target, hidden: Blob, grad_output: Blob, inputs: Inputs) -> tuple[Blob, Blob | None]:
    """Gradients of a stateless forward pass through the target's blocks: of its hidden states, and of its prompts where there are some.

    The target is one hop of an earlier `forward`; where its server is gone, others do it, which need not cut it at the same blocks.
    """

    async def attempt(full: frozenset[str]) -> tuple[Blob, Blob | None]:
        hops = await find_hops(target, full, "forward", math.prod(hidden.shape[:-1]))
        entering = [hidden]
        for hop in hops[:-1]:
            part = replace(target, first=hop.first, end=hop.end)
            prompts = prompts_of(inputs.prompts, target, hop)
            _, outputs = await forward(part, entering[-1], replace(inputs, prompts=prompts), for_gradients=True)
            entering.append(outputs[-1])
        gradient, prompt_gradients = grad_output, []
        for hop, entered in zip(reversed(hops), reversed(entering), strict=True):
            request = Backward(
                model=target.model,
                first=hop.first,
                end=hop.end,
                hidden=as_entered(entered, target.settings.wire_precision, hop.dtype),
                grad_output=gradient,
                mask=inputs.mask,
                position_ids=inputs.position_ids,
                prompts=prompts_of(inputs.prompts, target, hop),
            )
            async with blaming(target, hop):
                answer = await _ask(target, hop, request, BackwardDone, token_s=BACKWARD_WEIGHT * hop.prefill_s)
                if answer.grad_hidden is None:
                    raise ProtocolError("the gradient of the hidden states is missing", hop.peer_id)
                _same(answer.grad_hidden, entered, "gradient")
                if request.prompts is not None:
                    if answer.grad_prompts is None:
                        raise ProtocolError("the gradient of the prompts is missing", hop.peer_id)
                    _same(answer.grad_prompts, request.prompts, "gradient of the prompts")
                    prompt_gradients.append(answer.grad_prompts)
            target.swarm.membership.mark_ok(hop.peer_id)
            gradient = answer.grad_hidden
        return gradient, joined(prompt_gradients[::-1]) if prompt_gradients else None

    return await retrying(target, attempt, at_stake=True)


async def _ask(target: Target, hop: Hop, request: Forward | Backward, expected: type[Answer], token_s: float) -> Answer:
    """`_ask_once`, given up where the server turns out not to be there any more and others are.

    Args:
        token_s: seconds that each token is expected to take; 0 where that is not known.
    """
    answer: Answer | None = None
    failure: PetalnetError | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            given = request.hidden if isinstance(request, Forward) else request.grad_output
            await _is_gone(target, hop, math.prod(given.shape[:-1]), token_s)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            answer = await _ask_once(target, hop, request, expected)
        except PetalnetError as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if answer is None:
        raise PeerLate("it does not answer any more, not even pings", hop.peer_id)
    return answer


async def _is_gone(target: Target, hop: Hop, tokens: int, token_s: float) -> None:
    """Wait until a hop's server does not answer pings and others hold its blocks; it is asked when the pass takes long, and less and less
    often."""
    host, lateness = target.swarm.membership.host, Lateness(token_s)
    began, asked = trio.current_time(), 0
    while True:
        round_trip_s = host.round_trip_s(hop.peer_id) or 0.0
        await trio.sleep_until(began + lateness.suspect_after_s(tokens, round_trip_s, asked))
        asked += 1
        try:
            await host.ping(hop.peer_id, lateness.answer_within_s(tokens, round_trip_s))
        except PetalnetError as error:
            logger.info("a pass is late: %s", error)
            try:
                await find_hops(replace(target, first=hop.first, end=hop.end), frozenset({hop.peer_id}), "forward", tokens)
                return
            except (MissingBlocksError, ServerError) as nobody:
                logger.info("the pass is waited for: %s", nobody)


async def _ask_once(target: Target, hop: Hop, request: Message, expected: type[Answer]) -> Answer:
    """One request that belongs to no session, on a stream that was used before or a new one."""
    from petalnet.p2p.protocols import FORWARD

    idle = target.swarm.membership.idle_streams
    while True:
        stream = idle.take(hop.peer_id)
        used_before = stream is not None
        if stream is None:
            stream = await open_stream(target, hop, FORWARD)
        try:
            answer = await ask(stream, request, expected)
        except (CallerError, BusyError):
            await idle.keep(stream)
            raise
        except BaseException as error:
            await stream.reset()
            if used_before and isinstance(error, PeerLost):
                continue  # the server has closed it while it was idle, or is gone: a new stream will tell
            raise
        await idle.keep(stream)
        return answer


def _same(answered: Blob, sent: Blob, what: str) -> None:
    if answered.shape != sent.shape or answered.dtype != sent.dtype:
        raise ProtocolError(f"the {what} is {answered.dtype} {list(answered.shape)} instead of {sent.dtype} {list(sent.shape)}")
