"""What fits into memory, for a model whose sizes are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from petalnet.blocks.span import Span
from petalnet.capacity import WEIGHTS_SHARE, block_sizes, blocks_that_fit, kv_tokens_that_fit
from petalnet.errors import UsageError
from petalnet.models.checkpoint import DEMO_MODEL, ModelSource


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource.open(None)


def stored_bytes(block: int) -> int:
    """Bytes of a block in the demo model's file, which holds bfloat16."""
    with safe_open(Path(DEMO_MODEL) / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys() if f".{block}." in name or name.startswith(f"h.{block}."))  # noqa: SIM118


def test_block_sizes(source: ModelSource) -> None:
    sizes = block_sizes(source, torch.bfloat16)
    assert len(sizes) == 12
    assert sizes[5] == stored_bytes(5)
    assert block_sizes(source, torch.float32) == [2 * size for size in sizes]


def test_as_many_blocks_as_memory_holds(source: ModelSource) -> None:
    size = max(block_sizes(source, torch.float32))

    def fitting(memory: float) -> int:
        return blocks_that_fit(source, dtype=torch.float32, device="cpu", max_memory=int(memory))

    assert fitting(5.5 * size / WEIGHTS_SHARE) == 5
    assert fitting(1e15) == 12
    with pytest.raises(UsageError, match="--max-memory"):
        fitting(0.5 * size / WEIGHTS_SHARE)


def test_kv_tokens_beside_the_weights(source: ModelSource) -> None:
    span = Span.load(source, 2, 4)
    weights = sum(block_sizes(source, torch.float32)[2:4])
    per_token = 2 * 2 * source.config.hidden_size * 4  # blocks, keys and values, float32
    assert kv_tokens_that_fit(span, source, device="cpu", max_memory=weights + 1000 * per_token) == 1000
    assert kv_tokens_that_fit(span, source, device="cpu", max_memory=None) > 1000
    with pytest.raises(UsageError, match="2:4"):
        kv_tokens_that_fit(span, source, device="cpu", max_memory=weights)
