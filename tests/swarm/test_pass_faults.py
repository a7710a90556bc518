"""Passes without a session, forward and backward, while servers are killed, stopped and run again: the gradients are the same."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from petalnet import AutoDistributedModelForCausalLM
from petalnet.errors import MissingBlocksError
from petalnet.models.checkpoint import DEMO_MODEL

MODEL = Path(DEMO_MODEL)


@pytest.mark.long
def test_gradients_do_not_change_by_servers_that_hang_or_die(nodes) -> None:
    servers = nodes.serve(MODEL, [(0, 6), (6, 12), (6, 12)])
    replicas = {server.peer_id: server for server in servers[1:]}
    torch.manual_seed(0)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(MODEL), initial_peers=servers[0].addrs, dtype=torch.float32, request_timeout=20
    )
    blocks = model.transformer.h
    hidden = torch.randn(2, 5, model.config.hidden_size)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = hidden.clone().requires_grad_()
        outputs = blocks(inputs)
        outputs.square().sum().backward()
        return outputs.detach(), inputs.grad

    def check() -> float:
        began = time.monotonic()
        for answered, wanted in zip(gradient(), expected, strict=True):
            torch.testing.assert_close(answered, wanted, atol=1e-4, rtol=1e-4)
        return time.monotonic() - began

    try:
        expected = gradient()
        for server in replicas.values():
            server.process.send_signal(signal.SIGSTOP)
            # Some of these come upon the stopped server, forward or backward; the others are as quick as ever.
            assert max(check() for _ in range(6)) < 30
            server.process.send_signal(signal.SIGCONT)
            assert check() < 30
        first, second = replicas.values()
        first.kill()
        assert max(check() for _ in range(4)) < 10
        second.kill()
        with pytest.raises(MissingBlocksError) as caught:
            gradient()
        assert caught.value.blocks == list(range(6, 12))
        assert caught.value.answers.keys() <= replicas.keys() and second.peer_id in caught.value.answers
        assert f"…{second.peer_id[-6:]}: " in str(caught.value)
    finally:
        model.close()
