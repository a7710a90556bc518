"""A server whose decoding is captured, from its settings to its answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petalnet.blocks import capture_trial
from petalnet.blocks.emulated import EmulatedBackend, Rerunner
from petalnet.blocks.span import Span
from petalnet.config import Settings
from petalnet.loaded import load
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.host import open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import INFERENCE
from petalnet.serving import Model
from tests.blocks.test_service import LOOPBACK, Served, run_step, whole

FIRST, END, KEY = 1, 3, "key"


@pytest.fixture
def load_with(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr("petalnet.blocks.throughput.WORTH_S", 0.0)
    folder = saved("llama")

    def load_blocks(**settings: Any) -> Any:
        source = ModelSource.open(folder)
        model = Model(source, KEY, 4, torch.float32, "cpu", True, (), "none")
        return load(Settings(attn_cache_tokens=1024, **settings), model, (FIRST, END), None).service

    return load_blocks


def test_a_cpu_has_no_graphs(load_with: Callable[..., Any]) -> None:
    service = load_with()
    assert service.describe()["cuda_graphs"] == [{"device": "cpu", "captured": False, "why": "there are no CUDA graphs on cpu"}]


async def test_sessions_of_a_server_that_captures(
    load_with: Callable[..., Any], saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalnet.blocks.span.pick_backend", lambda device, dtype: EmulatedBackend())
    monkeypatch.setattr(capture_trial, "choose", partial(capture_trial.choose, recorder=Rerunner()))
    service = load_with(cuda_graphs="on")
    twin = Span.load(ModelSource.open(saved("llama")), FIRST, END)
    (described,) = service.describe()["cuda_graphs"]
    assert described["captured"]
    assert (described["recordings"], described["replayed"]) == (20, 0)

    async def client(served: Served, rows: int, prompt: int) -> None:
        hidden = torch.randn(rows, prompt + 8, 32, generator=torch.Generator().manual_seed(prompt))
        async with served.session() as stream:
            outputs = [await run_step(stream, hidden[:, :prompt], 0)]
            outputs += [await run_step(stream, hidden[:, at : at + 1], at) for at in range(prompt, prompt + 8)]
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole(twin, hidden)[0], atol=1e-4, rtol=1e-4)

    async with (
        open_host(Identity.generate(), listen=LOOPBACK) as server,
        open_host(Identity.generate(), listen=[]) as other,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(service.run)
        server.serve(INFERENCE, service.handle_inference)
        served = Served(service, server, other, twin)
        async with trio.open_nursery() as clients:
            for rows, prompt in ((1, 3), (2, 20), (3, 9)):
                clients.start_soon(client, served, rows, prompt)
        await service.check()
        nursery.cancel_scope.cancel()
    (described,) = service.describe()["cuda_graphs"]
    assert described["failure"] is None
    assert described["replayed"] >= 8
