"""The quick import in processes of its own: what it leaves out, that it computes the same, and that it gives way where it does not work."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet.blocks.kv import KVStore
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span, SpanStep
from petalnet.models.checkpoint import ModelSource

Saved = Callable[[str], Path]

COMPUTE = """
def compute(folder):
    span = Span.load(ModelSource.open(folder), 0, 4)
    hidden = torch.linspace(-1, 1, 5 * 32).view(1, 5, 32).requires_grad_()
    (output,) = span.forward(hidden)
    output.square().sum().backward()
    span.attach(KVStore(span.kv_shapes, pages=1, page_tokens=span.backend.page_tokens, dtype=span.dtype, device=span.device))
    rows = Rows(PagePool(1, span.backend.page_tokens), 5)
    rows.resize(1)
    rows.prepare(5)
    (outputs,) = span.step([SpanStep(rows, hidden)])
    return [output.double().sum().item(), outputs[-1].double().sum().item(), hidden.grad.double().sum().item()]
"""
PROGRAM = f"""
import json, sys
from petalnet.models import lean
{{before}}
lean.import_transformers()
import torch
from petalnet.models.checkpoint import ModelSource
from petalnet.blocks.kv import KVStore
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span, SpanStep
{COMPUTE}
results = [compute(folder) for folder in sys.argv[1:]]
slow = [name for name in ("torch._dynamo", "sympy", "torch.distributed.tensor") if name in sys.modules]
{{after}}
print(json.dumps([results, slow]))
"""
AFTER = """
from transformers import masking_utils
from transformers.utils import is_torch_distributed_available
with masking_utils.TransformGetItemToIndex():
    pass
parameter = torch.nn.Parameter(torch.ones(2))
parameter.sum().backward()
torch.optim.SGD([parameter], lr=0.5).step()
assert parameter.tolist() == [0.5, 0.5]
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert is_torch_distributed_available()
"""


def run(folders: list[Path], *, before: str = "", after: str = "") -> tuple[list[list[float]], list[str]]:
    command = [sys.executable, "-c", PROGRAM.format(before=before, after=after), *map(str, folders)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    results, slow = json.loads(done.stdout.splitlines()[-1])
    return results, slow


@pytest.fixture
def expected(saved: Saved) -> list[list[float]]:
    scope: dict[str, Any] = {used.__name__: used for used in (torch, KVStore, ModelSource, PagePool, Rows, Span, SpanStep)}
    exec(COMPUTE, scope)
    return [pytest.approx(scope["compute"](saved(family)), rel=1e-5) for family in ("bloom", "llama")]


def test_the_compiler_is_not_imported_and_works_when_it_is_asked_for(saved: Saved, expected: list[list[float]]) -> None:
    results, slow = run([saved("bloom"), saved("llama")], after=AFTER)
    assert results == expected
    assert slow == []


def test_where_it_does_not_work_the_usual_way_is_taken(saved: Saved, expected: list[list[float]]) -> None:
    results, slow = run([saved("bloom"), saved("llama")], before="lean.DECORATORS = ()")
    assert results == expected
    assert "torch._dynamo" in slow


def test_quantized_layers_do_without_the_compiler() -> None:
    program = """
import sys, torch
compile_function, disable = torch.compile, torch._disable_dynamo
from torch import nn
from petalnet.blocks.quantization import Int8Linear, NF4Linear, require_quantization
require_quantization("nf4")
for kind in (Int8Linear, NF4Linear):
    layer = kind(nn.Linear(64, 64, device="meta"))
    layer.weight = layer.take_weight(torch.randn(64, 64))
    layer.bias = None
    layer(torch.randn(3, 64))
assert "torch._dynamo" not in sys.modules and "kernels" not in sys.modules
assert torch.compile is compile_function and torch._disable_dynamo is disable
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_clients_are_not_warned_of_a_program_that_bitsandbytes_lacks(caplog: pytest.LogCaptureFixture) -> None:
    importlib.import_module("petalnet.client.auto")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "none")
    log.warning("another warning")
    assert caplog.messages == ["another warning"]
