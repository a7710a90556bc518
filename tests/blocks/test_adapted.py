"""Families whose attention modules are made to attend over pages: what their own tests of sessions (test_packed) do not come by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from petalnet.blocks.adapters import Adapter, LoraWeights
from petalnet.blocks.kv import KVShape
from petalnet.blocks.packed import SpanStep
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.probe import ProbeResult, probe
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource

Saved = Callable[..., Path]
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


def load(folder: Path, **options: Any) -> Span:
    span = Span.load(ModelSource.open(folder), 0, 4, **options)
    span.attach(span.make_store(32))
    return span


def in_sessions(span: Span, hidden: torch.Tensor, adapters: Sequence[tuple[Adapter, ...]]) -> list[torch.Tensor]:
    """What comes out for the same rows in sessions that share passes, with adapters of their own, as a prompt and token by token."""
    pool = PagePool(32, span.backend.page_tokens)
    sessions = [Rows(pool, hidden.shape[1]) for _ in adapters]
    found: list[list[torch.Tensor]] = [[] for _ in adapters]
    for rows in sessions:
        rows.resize(hidden.shape[0])
    for start, end in ((0, 6), (6, 7), (7, hidden.shape[1])):
        steps = []
        for rows, own in zip(sessions, adapters, strict=True):
            rows.prepare(end - start)
            steps.append(SpanStep(rows, hidden[:, start:end], adapters=own))
        for rows, outputs, (output,) in zip(sessions, found, span.step(steps), strict=True):
            outputs.append(output)
            rows.advance(end - start)
    return [torch.cat(outputs, dim=1) for outputs in found]


def test_lora_of_what_makes_keys_and_values_of_latents(saved: Saved) -> None:
    """It is multiplied with in another order than the library does, and so is what is added to it."""
    span = load(saved("deepseek_v3"))
    torch.manual_seed(1)
    path = next(path for path in span.linear_shapes[1] if path.endswith("kv_b_proj"))
    inputs, outputs = span.linear_shapes[1][path]
    ours, others = (
        (Adapter({block: {path: LoraWeights(torch.randn(2, inputs), torch.randn(outputs, 2) / 5)} for block in (1, 3)}),) for _ in range(2)
    )
    hidden = torch.randn(2, 9, 32)
    adapters = [ours, (), others, ours, (*ours, *others)]
    with torch.inference_mode():
        expected = [span.forward(hidden, adapters=own)[0] for own in adapters]
        assert not torch.allclose(expected[0], expected[1], atol=0.1)
        for found, right in zip(in_sessions(span, hidden, adapters), expected, strict=True):
            torch.testing.assert_close(found, right, **CLOSE)


@pytest.mark.parametrize(("family", "error"), [("deepseek_v3", 0.03), ("llama4_text", 0.03), ("falcon", 0.03)])
def test_in_half_precision(family: str, error: float, saved: Saved) -> None:
    span, exact = load(saved(family), dtype=torch.bfloat16), load(saved(family))
    torch.manual_seed(2)
    hidden = torch.randn(2, 9, 32)
    with torch.inference_mode():
        (expected,) = exact.forward(hidden)
        (found,) = in_sessions(span, hidden, [()])
        (usual,) = span.forward(hidden)
    assert span.packs and found.dtype == torch.bfloat16
    usual_error, own_error = (float((one.float() - expected).norm() / expected.norm()) for one in (usual, found))
    assert own_error < max(1.5 * usual_error, error)


def test_what_a_position_takes(saved: Saved) -> None:
    """Keys and values that heads share are kept once, latents as they are."""
    falcon = load(saved("falcon", new_decoder_architecture=True, num_kv_heads=2, multi_query=False))
    assert falcon.kv_shapes == [KVShape(2, 8, 8)] * 4
    assert load(saved("deepseek_v3")).kv_shapes == [KVShape(1, 24, 16)] * 4


@pytest.mark.parametrize(
    ("family", "options", "packs"),
    [
        ("falcon", {"hidden_size": 2048, "num_attention_heads": 32, "multi_query": False, "alibi": True, "parallel_attn": False}, True),
        ("falcon", {"hidden_size": 2048, "num_attention_heads": 16, "multi_query": False, "alibi": True}, False),
        ("falcon", {"num_kv_heads": 8, "new_decoder_architecture": True, "num_attention_heads": 64, "hidden_size": 4096}, True),
        ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}, True),
        ("llama4_text", {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_hidden_layers": 4}, True),
    ],
)
def test_variants(family: str, options: dict[str, Any], packs: bool) -> None:
    assert probe(AutoConfig.for_model(family, **options)) == ProbeResult(True, packs=packs)


def test_mpt_in_half_precision_keeps_the_librarys_attention(saved: Saved) -> None:
    span = load(saved("mpt"), dtype=torch.bfloat16)
    assert not span.packs
    torch.manual_seed(3)
    hidden = torch.randn(2, 9, 32)
    with torch.inference_mode():
        (expected,) = span.forward(hidden)
        (found,) = in_sessions(span, hidden, [()])
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 0.01
