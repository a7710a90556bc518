"""A peer that sends whatever comes to its mind, and one that never fetches what is kept for it: others train as before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trio

from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.host import Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error
from petalnet.p2p.pass_messages import Backward, BackwardDone, DropGraphs, Forward, ForwardDone, LoraPut, PutLora
from petalnet.p2p.protocols import FORWARD
from petalnet.p2p.tensors import decode_tensor, encode_tensor

from .conftest import Families, NodeProcess, Nodes
from .models import SPANS, connected, save_model
from .training import load_sides, padded_batch

ROWS, LENGTH, HIDDEN, BLOCKS = 2, 6, 64, 2
WITHIN = 1e-3
WITHIN_S = 20.0
KEPT_PASSES = 150
MOST_MEMORY = 150 * 2**20
"""By which a server may grow while graphs of `KEPT_PASSES` are left with it: all of them would take several times as much."""


def floats(*shape: int, value: float = 0.1) -> Blob:
    return encode_tensor(torch.full(shape, value))


@asynccontextmanager
async def stranger(node: NodeProcess, find_record: Any) -> AsyncIterator[tuple[Stream, str]]:
    """A stream of somebody who is no client to a server, and the key of its model."""
    async with open_host(Identity.generate()) as host:
        record = await find_record(host, node.peer_id, node.addrs)
        async with await host.open_stream(node.peer_id, FORWARD, addrs=node.addrs) as stream:
            yield stream, record.model


async def ask(stream: Stream, request: Message) -> Message:
    with trio.fail_after(WITHIN_S):
        await stream.send(request)
        answer = await stream.receive()
    assert answer is not None
    return answer


def train_elsewhere(path: Path, peers: list[str]) -> float:
    """The largest difference that a client sees of its gradients to the local ones."""
    with connected(path, peers, tuning_mode="deep_ptune", pre_seq_len=4) as remote:
        sides = load_sides(path, remote, prompts=True, deep=True, embeddings=True)
        return max(max(sides.gradients(padded_batch(side)).values()) for side in ("left", "right"))


async def test_requests_that_make_no_sense(families: Families, find_record: Any) -> None:
    node = families.servers["llama"][0]
    async with stranger(node, find_record) as (stream, model):
        forward = Forward(model, 0, BLOCKS, floats(ROWS, LENGTH, HIDDEN))
        backward = Backward(model=model, first=0, end=BLOCKS, hidden=forward.hidden, grad_output=forward.hidden)
        put = PutLora(
            model, 0, BLOCKS, "a" * 64, ("self_attn.q_proj",), encode_tensor(torch.full((BLOCKS, 1), 2, dtype=torch.int32)),
            floats(BLOCKS * 2 * (HIDDEN + HIDDEN)),
        )  # fmt: skip
        refused: list[Message] = [
            *(
                replace(forward, prompts=floats(*shape))
                for shape in ((3, ROWS, 4, HIDDEN), (BLOCKS, 3, 4, HIDDEN), (BLOCKS, ROWS, 7, HIDDEN))
            ),
            *(replace(forward, prompts=floats(*shape)) for shape in ((BLOCKS, ROWS, 4, HIDDEN - 1), (BLOCKS, ROWS, HIDDEN), (1,))),
            *(replace(backward, grad_output=floats(*shape)) for shape in ((ROWS, LENGTH, 1), (ROWS, LENGTH + 1, HIDDEN), (ROWS,), (0,))),
            replace(backward, prompts=floats(BLOCKS, ROWS + 1, 4, HIDDEN)),
            replace(backward, hidden=None, graph=77),
            replace(forward, lora="nobody has put this"),
            replace(forward, adapter="nobody@0123456789abcdef"),
            replace(put, modules=("no.such.module",)),
            replace(put, weights=floats(7)),
            replace(put, ranks=encode_tensor(torch.full((BLOCKS, 1), -1, dtype=torch.int32))),
            replace(put, ranks=encode_tensor(torch.full((BLOCKS, 1), 2**31 - 1, dtype=torch.int32))),
            replace(put, weights=floats(BLOCKS * 2 * (HIDDEN + HIDDEN), value=float("nan"))),
        ]
        for request in refused:
            answer = await ask(stream, request)
            assert isinstance(answer, Error), (request, answer)
            assert answer.code in ("caller", "graph_gone", "lora_gone"), answer
        assert isinstance(await ask(stream, put), LoraPut)
        await stream.send(DropGraphs((1, 2, 2**53)))
        # Numbers that are none, or too large to compute with: an error, or as much nonsense in return.
        for value in (float("nan"), float("inf"), 3e38):
            nonsense = floats(ROWS, LENGTH, HIDDEN, value=value)
            for request in (
                replace(forward, hidden=nonsense, graph=5),
                replace(forward, prompts=floats(BLOCKS, ROWS, 4, HIDDEN, value=value), lora=put.version),
                replace(backward, grad_output=nonsense),
                replace(backward, hidden=None, grad_output=nonsense, graph=5),
                replace(backward, hidden=nonsense, grad_output=nonsense, lora=put.version, lora_gradient=True),
            ):
                assert isinstance(await ask(stream, request), ForwardDone | BackwardDone | Error)
        assert await trio.to_thread.run_sync(train_elsewhere, families.paths["llama"], families.peers) < WITHIN
        answer = await ask(stream, forward)
        assert isinstance(answer, ForwardDone) and bool(decode_tensor(answer.output).isfinite().all())
    assert node.process.poll() is None and "Traceback" not in node.log()


@pytest.mark.long
async def test_a_peer_that_never_comes_back_for_what_is_kept(nodes: Nodes, tmp_path: Path, find_record: Any) -> None:
    path = save_model("llama", tmp_path / "model")
    options = ("--dtype", "float32", "--throughput", "100", "--new-swarm", "--max-memory", "512MB")
    node = await trio.to_thread.run_sync(nodes.start, path, "--serve", f"0:{SPANS['llama'][-1][1]}", *options)
    held: list[int] = []
    async with stranger(node, find_record) as (stream, model):
        request = Forward(model, 0, BLOCKS, floats(8, 128, HIDDEN), graph=1)
        for number in range(1, KEPT_PASSES + 1):
            answer = await ask(stream, replace(request, graph=number))
            assert isinstance(answer, ForwardDone) and answer.kept
            held.append(psutil.Process(node.process.pid).memory_info().rss)
        assert held[-1] - held[0] < MOST_MEMORY, f"{(held[-1] - held[0]) / 2**20:.0f} MiB"
        assert await trio.to_thread.run_sync(train_elsewhere, path, node.addrs) < WITHIN
