"""Servers of quantized blocks, as real processes: what they compute, what they announce, and which of them a client takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalnet import AutoDistributedModelForCausalLM
from petalnet.blocks.quantization import QuantizedLinear
from petalnet.blocks.span import Span
from petalnet.errors import MissingBlocksError
from petalnet.models.checkpoint import DEMO_MODEL, ModelSource

from .conftest import NodeProcess, Nodes

pytestmark = pytest.mark.long

IDS = torch.tensor([[40, 50, 60, 70, 80], [90, 31, 41, 51, 61]])
OPTIONS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
PARTS = ((0, 6, "nf4"), (6, 12, "int8"))


@pytest.fixture(scope="module")
def servers(module_nodes: Nodes) -> list[NodeProcess]:
    """One of the whole model as it is, then one for each of `PARTS`; the last speaks as Petals' users do."""
    usual = ("--dtype", "float32", "--attn-cache-tokens", "2048", "--throughput")
    exact = module_nodes.start("--serve", "0:12", "--new-swarm", *usual, "10")
    joining = ("--initial-peers", *exact.addrs, *usual, "1000")
    started = [module_nodes.launch("--serve", "0:6", "--quantization", "nf4", *joining)]
    started.append(module_nodes.launch("--block_indices", "6:12", "--load_in_8bit", *joining))
    return [exact, *(server.wait_ready() for server in started)]


@pytest.fixture(scope="module")
def rounded() -> Any:
    """The model on this machine, with the weights that the servers' stand for."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    for first, end, quantization in PARTS:
        span = Span.load(ModelSource.open(None), first, end, quantization=quantization)
        for number, block in enumerate(span._blocks, first):
            for path, layer in block.named_modules():
                if isinstance(layer, QuantizedLinear):
                    model.transformer.h[number].get_submodule(path).weight.data = layer.dequantized(torch.float32)
    return model


@contextmanager
def connected(servers: list[NodeProcess], **settings: Any) -> Iterator[Any]:
    options = {"dtype": torch.float32, "show_route": False, "max_retries": 1, **settings}
    with AutoDistributedModelForCausalLM.from_pretrained(str(DEMO_MODEL), initial_peers=servers[0].addrs, **options) as model:
        yield model


def test_quantized_servers_compute_what_their_weights_stand_for(servers: list[NodeProcess], rounded: Any) -> None:
    with connected(servers, quantization=["int8", "nf4"]) as model:
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, rounded(IDS).logits, atol=2e-3, rtol=1e-3)
        assert torch.equal(model.generate(IDS, **OPTIONS), rounded.generate(IDS, **OPTIONS))
        losses = []
        for one in (model, rounded):
            weight = one.transformer.word_embeddings.weight.requires_grad_()
            one.lm_head.weight.requires_grad_()
            losses.append(torch.autograd.grad(one(IDS, labels=IDS).loss, weight)[0])
            weight.requires_grad_(False)
        torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-3)


def test_a_client_that_wants_weights_as_they_are(servers: list[NodeProcess]) -> None:
    local = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    with connected(servers, quantization="none", server_dtype=torch.float32) as model:
        assert torch.equal(model.generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS)), (
            "though those of others are a hundred times faster"
        )


def test_what_is_left_out_is_told(servers: list[NodeProcess]) -> None:
    told = "blocks 0-5 .*compute in float32 or float32/nf4, which quantization=int8 leaves out"
    with connected(servers, quantization="int8") as model, pytest.raises(MissingBlocksError, match=told):
        model.generate(IDS, **OPTIONS)
    with connected(servers, server_dtype="bfloat16") as model, pytest.raises(MissingBlocksError, match="server_dtype=bfloat16 leaves out"):
        model(IDS)


def test_it_is_announced(servers: list[NodeProcess], module_nodes: Nodes) -> None:
    assert "in float32/nf4 on cpu" in servers[1].log() and "in float32/int8 on cpu" in servers[2].log()
    command = [sys.executable, "-m", "petalnet", "status", "--initial-peers", *servers[0].addrs]
    shown, data = (
        subprocess.run([*command, *more], env=module_nodes.environment(), capture_output=True, text=True, check=True).stdout
        for more in ([], ["--json"])
    )
    assert "float32/nf4" in shown and "float32/int8" in shown
    found = {(*server["span"], server["quantization"]) for server in json.loads(data)["models"][0]["servers"]}
    assert found == {(0, 12, "none"), *PARTS}
