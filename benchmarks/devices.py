"""What two devices in one box gain: sessions and prompts on one device, and on two that work at a time.

Run: python benchmarks/devices.py [--tokens-s 20] [--sessions 1 2 4 8] [--fixed]

The blocks are tiny, and each sleeps for as long as a block of a real model would compute: so long a token, or with `--fixed` so long a
pass, however many tokens share it, as where reading the weights takes the time. Whatever else there is, the compute thread, threads of
the devices, page tables and all, is what serves. Clients come back at once. Figures are over those of one device in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
import trio

from petalnet.blocks.scheduler import Task
from petalnet.blocks.service import BlockService
from petalnet.blocks.sessions import Session
from petalnet.blocks.spread import SpreadSpan
from petalnet.blocks.throughput import Rates
from petalnet.blocks.work import StepWork
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.session_messages import Step
from petalnet.p2p.tensors import encode_tensor

HIDDEN, BLOCKS, PROMPT = 32, 8, 128
SECONDS = 6.0
"""For which sessions decode."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-s", type=float, default=20.0, help="what all blocks do one token after another, tokens/s")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--fixed", action="store_true", help="a pass takes the same time, however many tokens are in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=HIDDEN, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=BLOCKS
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        source = ModelSource.open(Path(folder))
        block_s = 1 / options.tokens_s / BLOCKS
        print(f"{BLOCKS} blocks, {1000 * block_s:.2f} ms {'a pass' if options.fixed else 'a token'} each")
        one, two = (trio.run(measure, source, counts, block_s, options.fixed, options.sessions) for counts in ([BLOCKS], [BLOCKS // 2] * 2))
    print(f"{'':28}{'one device':>14}{'two devices':>14}{'ratio':>8}")
    for what, before in one.items():
        print(f"{what:28}{before:14.1f}{two[what]:14.1f}{two[what] / before:8.2f}")


async def measure(source: ModelSource, counts: Sequence[int], block_s: float, fixed: bool, numbers: Sequence[int]) -> dict[str, float]:
    """Tokens/s by what was done, with so many blocks on each device."""
    span = SpreadSpan.load(source, 0, BLOCKS, devices=["cpu"] * len(counts), counts=counts)
    for stage in span.stages:
        _ = stage.packs, stage.kv_shapes  # tried before the blocks are slow
        for block in stage._blocks:
            block.register_forward_pre_hook(lambda module, args: time.sleep(block_s * (1 if fixed else args[0].shape[1])))
    pass_s = [BLOCKS * block_s * (1 if fixed else tokens) for tokens in (1, 4, 16, 32)]  # what a server measures at its start
    rates = Rates(1 / pass_s[0], 32 / pass_s[3], 32 / pass_s[3], rounds=((4, pass_s[1]), (16, pass_s[2])))
    service = BlockService(span, model="benchmark", kv_tokens=8192, rates=rates)
    found: dict[str, float] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(service.engine.run)
        for number in numbers:
            for _ in range(2):  # the first time costs are learned
                done = await decode(service, number)
            found[f"{number} session{'s' * (number > 1)}, tokens/s"] = done
        for _ in range(2):
            began = time.perf_counter()
            await run(service, open_session(service, 0), torch.zeros(1, PROMPT, HIDDEN), 0)
            found["a prompt alone, tokens/s"] = PROMPT / (time.perf_counter() - began)
        nursery.cancel_scope.cancel()
    return found


async def decode(service: BlockService, number: int) -> float:
    """Tokens/s of so many sessions together."""
    tokens = 0
    ends = time.perf_counter() + SECONDS

    async def client(session: Session) -> None:
        nonlocal tokens
        position = 0
        while time.perf_counter() < ends and position < session.max_length:
            await run(service, session, torch.zeros(1, 1, HIDDEN), position)
            position += 1
            tokens += 1
        service.sessions.close(session)

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for index in range(number):
            nursery.start_soon(client, open_session(service, index))
    return tokens / (time.perf_counter() - began)


def open_session(service: BlockService, number: int) -> Session:
    session = service.sessions.open(f"peer {number}", 0, BLOCKS, 512)
    service.sessions.admit(session, 1)
    return session


async def run(service: BlockService, session: Session, hidden: torch.Tensor, position: int) -> None:
    """A step of a session."""
    rows, new, _ = hidden.shape
    work = StepWork(session, Step(step=0, position=position, hidden=encode_tensor(hidden), keep=1))
    key = (0, BLOCKS, service.span.batch_key(position + new, session))
    await service.engine.submit(Task(session.peer_id, session, key, new, rows, "step", 1 << 30, work))


if __name__ == "__main__":
    main()
