"""The messages of passes that belong to no session: forward, backward, and the parameters that a client brings for them.

Requests of one stream are answered in their order, `DropGraphs` aside, which is not answered.
"""

from __future__ import annotations

from dataclasses import dataclass

from petalnet.p2p.fields import Blob, Message, array, flag, integer, many, message_type, number, scalar, text
from petalnet.p2p.session_messages import MAX_BLOCKS, MAX_LABEL, MAX_TOKENS

MAX_GRAPHS = 1024
"""Graphs that one message may name."""
MAX_MODULES = 64
"""Kinds of modules in a block that parameters may be for."""
MAX_RANK = 4096


@message_type("forward")
@dataclass(frozen=True)
class Forward(Message):
    """A forward pass over blocks [first, end) that belongs to no session. Answered by `ForwardDone`.

    Attributes:
        hidden: [rows, length, hidden], a float dtype.
        mask: bool [rows, length], False where a token is padding; absent when nothing is.
        position_ids: int32 [rows, length]; absent when they are 0 … length - 1 in every row.
        prompts: [blocks, rows, prompt length, hidden], added to each block's input at its first positions; [blocks, 1, …] where all rows
            have the same.
        all_hidden: answer with the outputs of every block instead of the last one's.
        codec: what the output may be rounded to on its way; "raw": nothing may be lost.
        reach: where the rows are only some of what belongs together, one past the last position of the whole; 0 where they are all.
        graph: a number, unique for the client, under which the server may keep what a `Backward` of this pass needs; 0 for nothing.
        adapter: the LoRA adapter that the server is to apply, as its record names it; "" for none.
        lora: the version of what this peer has put there (see `PutLora`) and wants applied as well; "" for none.
        dropout, seed: of the input of `lora`, the probability with which a number is left out, and what decides which ones: the same ones
            wherever, and however often, the pass is run.
        row: where the rows are only some of what belongs together, the number of the first of them there; it decides that as well.
    """

    model: str = scalar(text(128))
    first: int = scalar(integer(0, MAX_BLOCKS))
    end: int = scalar(integer(1, MAX_BLOCKS))
    hidden: Blob = array()
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)
    all_hidden: bool = scalar(flag, False)
    codec: str = scalar(text(20), "raw")
    reach: int = scalar(integer(0, MAX_TOKENS), 0)
    graph: int = scalar(integer(0, 2**53), 0)
    adapter: str = scalar(text(MAX_LABEL), "")
    lora: str = scalar(text(64), "")
    dropout: float = scalar(number(0, 0.999), 0.0)
    seed: int = scalar(integer(0, 2**53), 0)
    row: int = scalar(integer(0, 2**31), 0)


@message_type("forward_done")
@dataclass(frozen=True)
class ForwardDone(Message):
    """The output, [rows, length, hidden] or [blocks, rows, length, hidden].

    Attributes:
        kept: whether the server keeps the pass's graph; it may drop it at any time.
        compute_s, queue_s: seconds of computation, and in the queue.
    """

    output: Blob = array()
    compute_s: float = scalar(number(0, 1e6), 0.0)
    queue_s: float = scalar(number(0, 1e6), 0.0)
    kept: bool = scalar(flag, False)


@message_type("backward")
@dataclass(frozen=True, kw_only=True)
class Backward(Message):
    """Gradients of a forward pass that belongs to no session. Answered by `BackwardDone`.

    Attributes:
        grad_output: [rows, length, hidden], the gradient of the last block's output.
        graph: the number of the pass's kept graph, which is used up; 0 where there is none.
        hidden, mask, position_ids, prompts, reach, adapter, lora, dropout, seed, row: what the forward pass was given, by which it is
            computed again. May all be left out where a graph was kept; where that is gone the answer is *graph_gone*.
        input_gradient: whether the gradient of `hidden` is wanted.
        prompt_gradient: whether that of the prompts is.
        lora_gradient: whether that of `lora` is.
    """

    model: str = scalar(text(128))
    first: int = scalar(integer(0, MAX_BLOCKS))
    end: int = scalar(integer(1, MAX_BLOCKS))
    hidden: Blob | None = array(optional=True)
    grad_output: Blob = array()
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)
    reach: int = scalar(integer(0, MAX_TOKENS), 0)
    graph: int = scalar(integer(0, 2**53), 0)
    adapter: str = scalar(text(MAX_LABEL), "")
    lora: str = scalar(text(64), "")
    dropout: float = scalar(number(0, 0.999), 0.0)
    seed: int = scalar(integer(0, 2**53), 0)
    row: int = scalar(integer(0, 2**31), 0)
    input_gradient: bool = scalar(flag, True)
    prompt_gradient: bool = scalar(flag, True)
    lora_gradient: bool = scalar(flag, False)


@message_type("backward_done")
@dataclass(frozen=True)
class BackwardDone(Message):
    """Gradients, as far as they are wanted and there is something that they are of.

    Attributes:
        grad_hidden: [rows, length, hidden].
        grad_prompts: [blocks, rows, prompt length, hidden], or their sum, [blocks, 1, …], where the prompts are of that shape.
        grad_lora: float32 [numbers], of the parameters in `lora` that lie in the blocks of the request, in the order of `PutLora.weights`.
        compute_s, queue_s: seconds of computation, and in the queue.
    """

    grad_hidden: Blob | None = array(optional=True)
    grad_prompts: Blob | None = array(optional=True)
    grad_lora: Blob | None = array(optional=True)
    compute_s: float = scalar(number(0, 1e6), 0.0)
    queue_s: float = scalar(number(0, 1e6), 0.0)


@message_type("drop_graphs")
@dataclass(frozen=True)
class DropGraphs(Message):
    """No `Backward` will come for these kept graphs. Not answered."""

    graphs: tuple[int, ...] = scalar(many(integer(1, 2**53), MAX_GRAPHS))


@message_type("put_lora")
@dataclass(frozen=True)
class PutLora(Message):
    """LoRA parameters (arXiv:2106.09685) for modules of blocks [first, end), which this peer's passes and sessions may name by `version`.
    Answered by `LoraPut`. A server keeps some versions of each peer, the latest used.

    A module with rank r, that maps x [in] to y [out], then yields y + B · A · x, with A [r, in] and B [out, r].

    Attributes:
        version: the client's hash of all of it.
        modules: paths of modules in a block ("self_attention.query_key_value"), in the order of the columns of `ranks`.
        ranks: int32 [blocks, modules], 0 where a block's module gets nothing.
        weights: float32 [numbers]: block by block, module by module, A and then B, each row by row. Scaling is part of B.
    """

    model: str = scalar(text(128))
    first: int = scalar(integer(0, MAX_BLOCKS))
    end: int = scalar(integer(1, MAX_BLOCKS))
    version: str = scalar(text(64))
    modules: tuple[str, ...] = scalar(many(text(128), MAX_MODULES))
    ranks: Blob = array()
    weights: Blob = array()


@message_type("lora_put")
@dataclass(frozen=True)
class LoraPut(Message):
    """The parameters are there."""

    version: str = scalar(text(64))
