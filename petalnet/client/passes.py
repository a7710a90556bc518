"""Passes that belong to no session: forward without a cache, and backward. On the portal's thread.

A pass goes hop by hop through this client, cut by rows into micro-batches that are under way at once. What went into each hop stays here,
so a hop whose server fails is run on another one. Servers may keep the graph of a hop's forward pass, which makes its backward pass
shorter; where a graph is gone, the backward pass is given with its inputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import trio

from petalnet.client.attempts import Busy
from petalnet.client.inputs import Inputs
from petalnet.client.kept_graphs import Graphs, KeptGraphs
from petalnet.client.lora_uploads import lora_version
from petalnet.client.micro_batches import MicroBatch
from petalnet.client.pass_requests import ask_server
from petalnet.client.precision import as_entered, pass_on_the_wire
from petalnet.client.requests import Target, blaming, checked, describe_route, find_hops, last_of, part_of, prompts_of, retrying
from petalnet.client.spreading import cut_for, next_hop
from petalnet.errors import GraphGone, ProtocolError
from petalnet.p2p.fields import Blob
from petalnet.p2p.pass_messages import Backward, BackwardDone, Forward, ForwardDone
from petalnet.routing.routes import Hop

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACKWARD_WEIGHT = 3.0
"""A backward pass computes the forward pass again, where its graph was not kept, and twice as much for the gradients."""


@dataclass(eq=False)
class Part:
    """What one server did of a micro-batch.

    Attributes:
        entered: the hidden states that went in, [rows, length, hidden].
        graph: the number of the graph that the server keeps; 0 where it keeps none.
    """

    hop: Hop
    entered: Blob
    graph: int = 0


@dataclass(eq=False)
class Path:
    """What became of a micro-batch.

    Attributes:
        parts: first to last.
        outputs: of the parts, [rows, length, hidden], or [blocks, rows, length, hidden] with `inputs.all_hidden`. Taken away by `forward`'s
            caller where gradients will be wanted.
    """

    batch: MicroBatch
    parts: list[Part]
    outputs: list[Blob]


@dataclass(eq=False)
class Passed:
    """A forward pass, as its backward pass needs it.

    Attributes:
        graphs: that servers keep of it, as far as is known; who forgets this object needs none of them.
        kept_by: where the numbers of the graphs hold: of this client as it was then.
    """

    paths: list[Path]
    kept_by: KeptGraphs
    graphs: Graphs = field(default_factory=set)


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted."""

    hidden: bool = True
    prompts: bool = True
    lora: bool = False


@dataclass(eq=False)
class Gradients:
    """Of a micro-batch: None where they are not wanted, or there is nothing that they are of.

    Attributes:
        hidden: [rows, length, hidden].
        prompts: [blocks, rows, prompt length, hidden] of each part, first to last.
        lora: the first block of each part that has LoRA parameters, one past its last, and float32 [numbers] of them.
    """

    hidden: Blob | None = None
    prompts: list[Blob] = field(default_factory=list)
    lora: list[tuple[int, int, Blob]] = field(default_factory=list)


async def forward(target: Target, hidden: Blob, inputs: Inputs, *, for_gradients: bool = False) -> Passed:
    """A stateless forward pass through the target's blocks, each hop retried on another route when its server fails.

    Args:
        hidden: raw, [rows, length, hidden].
        for_gradients: whether gradients of it will be wanted; then a slow link is no reason to round anything.
    """
    kept_graphs = target.swarm.membership.kept_graphs
    passed = Passed([], kept_graphs)
    if for_gradients:
        kept_graphs.drop_with(passed, passed.graphs, target.swarm.portal)
    graphs = passed.graphs if for_gradients else None
    passed.paths = await all_of([partial(_forward, target, batch, graphs) for batch in await cut_for(target, hidden, inputs)])
    return passed


async def _forward(target: Target, batch: MicroBatch, graphs: Graphs | None) -> Path:
    """A micro-batch through all blocks of the target.

    Args:
        graphs: servers' graphs are to be kept, and noted here; None where no gradients will be wanted.
    """
    path = Path(batch, [], [])
    rest, hidden, inputs = target, batch.hidden, batch.inputs
    while rest.first < rest.end:

        async def attempt(full: frozenset[str], rest: Target = rest, hidden: Blob = hidden) -> tuple[Part, Blob]:
            async with next_hop(rest, full, math.prod(hidden.shape[:-1])) as hop:
                own = replace(target, first=hop.first, end=hop.end)
                return await _forward_hop(own, hop, hidden, replace(inputs, prompts=prompts_of(inputs.prompts, target, hop)), graphs)

        part, output = await retrying(rest, attempt, at_stake=bool(path.parts))
        path.parts.append(part)
        path.outputs.append(output)
        hidden = last_of(output) if inputs.all_hidden else output
        rest = replace(_of_same_adapter(rest, part.hop), first=part.hop.end)
    if target.settings.show_route is True:
        logger.info("route of a pass: %s", describe_route([part.hop for part in path.parts]))
    return path


async def _forward_hop(target: Target, hop: Hop, hidden: Blob, inputs: Inputs, graphs: Graphs | None) -> tuple[Part, Blob]:
    """What one server does of a micro-batch, and its output.

    Args:
        target: the hop's blocks.
        inputs: with prompts for these.
    """
    membership, settings = target.swarm.membership, target.settings
    graph = membership.kept_graphs.new_number() if graphs is not None and settings.kept_graphs else 0
    request = Forward(
        model=target.model,
        first=hop.first,
        end=hop.end,
        hidden=hidden,
        mask=inputs.mask,
        position_ids=inputs.position_ids,
        prompts=inputs.prompts,
        all_hidden=inputs.all_hidden,
        reach=inputs.reach,
        graph=graph,
        adapter=hop.adapter,
        lora=lora_version(inputs.lora, hop),
        dropout=0.0 if inputs.lora is None else inputs.lora.dropout,
        seed=inputs.seed,
        row=inputs.row,
    )
    bytes_s = membership.host.bytes_s(hop.peer_id) if settings.wire_precision == "auto" and graphs is None else None
    request = pass_on_the_wire(request, settings.wire_precision, hop.dtype, bytes_s, hop.prefill_s)
    if graphs is not None and graph:
        graphs.add((hop.peer_id, graph))  # from here on it may be kept, whatever becomes of the answer
    async with blaming(target, hop):
        answer = await ask_server(target, hop, request, ForwardDone, hop.prefill_s, inputs.lora)
        checked(answer.output, hidden, hop, inputs.all_hidden)
    if graphs is not None and not answer.kept:
        graphs.discard((hop.peer_id, graph))
        graph = 0
    membership.mark_ok(hop.peer_id)
    membership.observe(
        hop.peer_id,
        tokens=math.prod(hidden.shape[:-1]),
        blocks=hop.end - hop.first,
        compute_s=answer.compute_s,
        queue_s=answer.queue_s,
        work="forward",
    )
    return Part(hop, hidden, graph), answer.output


async def backward(target: Target, passed: Passed, gradient: Blob, wanted: Wanted) -> list[Gradients]:
    """Gradients of a forward pass, for each of its micro-batches.

    Each hop is done by the server that did it before, where that keeps its graph, and otherwise by any that hold its blocks, which need
    not be cut at the same ones.

    Args:
        target: of the forward pass.
        gradient: raw, [rows, length, hidden], of its output.
    """
    if passed.kept_by is not target.swarm.membership.kept_graphs:  # this client has joined anew since, under another id
        for path in passed.paths:
            for part in path.parts:
                part.graph = 0
        passed.graphs.clear()
    works = [
        partial(_backward, target, path, passed.graphs, part_of(gradient, path.batch.start, path.batch.stop), wanted)
        for path in passed.paths
    ]
    return await all_of(works)


async def _backward(target: Target, path: Path, graphs: Graphs, gradient: Blob, wanted: Wanted) -> Gradients:
    """Those of one micro-batch; `gradient` is of its rows."""
    batch, parts, gradients = path.batch, list(path.parts), Gradients()
    while parts:
        part = parts.pop()
        hop = part.hop
        trains = _trains(batch.inputs, hop.first, hop.end, wanted)
        upstream = wanted.hidden or _trains(batch.inputs, target.first, hop.first, wanted)
        if not (trains or upstream):
            break
        own = replace(_of_same_adapter(target, hop), first=hop.first, end=hop.end)
        inputs = replace(batch.inputs, prompts=prompts_of(batch.inputs.prompts, target, hop))
        answer = await _backward_part(own, part, graphs, gradient, inputs, replace(wanted, hidden=upstream))
        if isinstance(answer, Hop):  # others have the blocks from this one's first one on; what goes into it is computed anew
            before = replace(own, end=answer.first)
            inputs = replace(inputs, prompts=prompts_of(inputs.prompts, own, replace(hop, end=before.end)))
            again = await _forward(before, replace(batch, hidden=part.entered, inputs=inputs), graphs)
            parts += [*again.parts, Part(replace(hop, first=before.end), again.outputs[-1])]
            continue
        if answer.grad_prompts is not None:
            gradients.prompts.insert(0, answer.grad_prompts)
        if answer.grad_lora is not None:
            gradients.lora.append((hop.first, hop.end, answer.grad_lora))
        if answer.grad_hidden is None:
            break
        gradient = answer.grad_hidden
    if wanted.hidden:
        gradients.hidden = gradient
    return gradients


async def _backward_part(target: Target, part: Part, graphs: Graphs, gradient: Blob, inputs: Inputs, wanted: Wanted) -> BackwardDone | Hop:
    """The gradients of one hop, or the last of the hops that it takes now, where these are several.

    Args:
        target: the hop's blocks.
        inputs: with prompts for these.
    """
    tokens = math.prod(part.entered.shape[:-1])
    lora = inputs.lora if wanted.lora and inputs.lora is not None and inputs.lora.touches(target.first, target.end) else None
    common = Backward(
        model=target.model,
        first=target.first,
        end=target.end,
        grad_output=gradient,
        input_gradient=wanted.hidden,
        prompt_gradient=wanted.prompts and inputs.prompts is not None,
        lora_gradient=lora is not None,
    )

    async def ask(hop: Hop, request: Backward) -> BackwardDone:
        weight = BACKWARD_WEIGHT - bool(request.graph)
        async with blaming(target, hop):
            with target.swarm.membership.under_way.at(hop, tokens, weight):
                answer = await ask_server(target, hop, request, BackwardDone, weight * hop.prefill_s, inputs.lora)
            if request.input_gradient:
                _same(answer.grad_hidden, part.entered.dtype, part.entered.shape, "the hidden states", hop)
            if request.prompt_gradient and inputs.prompts is not None:
                _same(answer.grad_prompts, inputs.prompts.dtype, inputs.prompts.shape, "the prompts", hop)
            if lora is not None:
                numbers = lora.numbers(target.first, target.end)
                _same(answer.grad_lora, "float32", (numbers.stop - numbers.start,), "the LoRA parameters", hop)
        target.swarm.membership.mark_ok(hop.peer_id)
        return answer

    async def attempt(full: frozenset[str]) -> BackwardDone | Hop:
        hop, graph = part.hop, part.graph
        if graph and hop.peer_id not in full:
            part.graph = 0  # it is used up, or else gone with its server, or not there
            graphs.discard((hop.peer_id, graph))
            try:
                return await ask(hop, replace(common, graph=graph))
            except GraphGone as error:
                logger.debug("a backward pass is computed anew: %s", error)
            except Busy:
                part.graph = graph
                graphs.add((hop.peer_id, graph))
                raise
        hops = await find_hops(target, full, "forward", tokens)
        if len(hops) > 1:
            return hops[-1]
        request = replace(
            common,
            hidden=as_entered(part.entered, target.settings.wire_precision, hops[0].dtype),
            mask=inputs.mask,
            position_ids=inputs.position_ids,
            prompts=inputs.prompts,
            reach=inputs.reach,
            adapter=hops[0].adapter,
            lora=lora_version(inputs.lora, hops[0]),
            dropout=0.0 if inputs.lora is None else inputs.lora.dropout,
            seed=inputs.seed,
            row=inputs.row,
        )
        return await ask(hops[0], request)

    return await retrying(target, attempt, at_stake=True)


def _of_same_adapter(target: Target, hop: Hop) -> Target:
    """The target with the very adapter that a hop's server has applied, whatever others of its name turn up."""
    settings = target.settings
    return target if settings.active_adapter is None else replace(target, settings=replace(settings, active_adapter=hop.adapter))


def _trains(inputs: Inputs, first: int, end: int, wanted: Wanted) -> bool:
    """Whether gradients are wanted of something that belongs to blocks [first, end)."""
    prompts = wanted.prompts and inputs.prompts is not None
    return first < end and (prompts or (wanted.lora and inputs.lora is not None and inputs.lora.touches(first, end)))


def _same(answered: Blob | None, dtype: str, shape: tuple[int, ...], what: str, hop: Hop) -> None:
    if answered is None:
        raise ProtocolError(f"the gradient of {what} is missing", hop.peer_id)
    if answered.shape != shape or answered.dtype != dtype:
        raise ProtocolError(
            f"the gradient of {what} is {answered.dtype} {list(answered.shape)} instead of {dtype} {list(shape)}", hop.peer_id
        )


async def all_of(functions: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """What they return, all of them under way at once; the first error ends the others."""
    if len(functions) == 1:
        return [await functions[0]()]
    results: dict[int, T] = {}
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(number: int, function: Callable[[], Awaitable[T]]) -> None:
            try:
                results[number] = await function()
            except Exception as error:  # not swallowed: raised below, bare, where leaving the nursery by it would wrap it into a group
                failures.append(error)
                nursery.cancel_scope.cancel()

        for number, function in enumerate(functions):
            nursery.start_soon(run, number, function)
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(functions))]
