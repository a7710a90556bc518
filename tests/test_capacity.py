"""What fits into memory, for a model whose sizes are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from petalnet import capacity
from petalnet.blocks.span import Span
from petalnet.blocks.spread import SpreadSpan
from petalnet.capacity import WEIGHTS_SHARE, block_sizes, blocks_that_fit, kv_tokens, left_for_blocks, require_room, too_large
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
    per_token = (2 * 2 + 1) * source.config.hidden_size * 4  # blocks, keys and values, and the output that is kept; float32

    def fitting(memory: int | None, wanted: int | None = None) -> int:
        return kv_tokens(span, source, device="cpu", max_memory=memory, wanted=wanted)

    assert fitting(weights + 1000 * per_token) == 1000
    assert fitting(None) > 1000
    assert fitting(None, 4711) == 4711 and fitting(weights + 1000 * per_token, 7) == 7, "what was asked for is what there is"
    with pytest.raises(UsageError, match="beside blocks 2:4 on cpu there is memory for 0 KV tokens, which is too little"):
        fitting(weights)
    with pytest.raises(UsageError, match="for 100 KV tokens, not for 101: give a smaller --attn-cache-tokens, or raise --max-memory"):
        fitting(weights + 100 * per_token, 101)
    with pytest.raises(UsageError, match="not for 1000000000000: give a smaller --attn-cache-tokens, or serve fewer blocks"):
        fitting(None, 10**12)


def test_the_machine_keeps_outputs_beside_the_kv_tokens_of_a_device(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    span = Span.load(source, 2, 4)
    per_token = source.config.hidden_size * 4
    free = {"cuda:0": 10000 * 4 * per_token, "cpu": 1000 * per_token}
    monkeypatch.setattr(capacity, "_free_memory", lambda device: free[device])

    def fitting(wanted: int | None = None) -> int:
        return kv_tokens(span, source, device="cuda:0", max_memory=None, wanted=wanted)

    assert (fitting(), fitting(1000)) == (500, 1000)
    with pytest.raises(UsageError, match="in the machine's memory, .* there is memory for 1000 KV tokens, not for 1001: give a smaller"):
        fitting(1001)
    free["cpu"] = 10**12
    assert (fitting(), fitting(10000)) == (9000, 10000)
    with pytest.raises(UsageError, match="on cuda:0 there is memory for 10000 KV tokens, not for 10001"):
        fitting(10001)


def test_blocks_that_do_not_fit(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(block_sizes(source, torch.float32))

    def require(first: int, end: int, memory: int | None = None) -> None:
        require_room(source, first, end, dtype=torch.float32, device="cpu", max_memory=memory)

    require(0, 12)
    require(0, 3, 3 * size)
    with pytest.raises(UsageError, match="blocks 0:4 of .* do not fit into the memory of cpu: .* 2 blocks would fit: --serve 2"):
        require(0, 4, 3 * size)
    with pytest.raises(UsageError, match="no block of .* fits"):
        require(0, 12, size // 2)
    monkeypatch.setattr(capacity, "_free_memory", lambda device: 6 * size)
    require(0, 6)
    with pytest.raises(UsageError, match="2 blocks would fit: --serve 2"):
        require(0, 7)
    assert "6 blocks" in str(too_large(source, 0, 7, dtype=torch.float32, device="cpu", max_memory=100 * size)), "fewer than were too many"


def test_graphs_take_of_what_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 16 << 30, "cuda:0": 80 << 30}
    monkeypatch.setattr(capacity, "_free_memory", lambda device: free[device])
    assert capacity.graph_bytes("cpu", None) == 2 << 30
    assert capacity.graph_bytes("cuda:0", None) == pytest.approx(2 << 30, rel=1e-6)
    assert capacity.graph_bytes("cpu", 4 << 30) == 1 << 29


def test_several_devices(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(block_sizes(source, torch.float32))
    free = {"cpu": 10**12, "cuda:0": 8 * size, "cuda:1": 4 * size}
    monkeypatch.setattr(capacity, "_free_memory", lambda device: free[device])
    both: dict[str, Any] = {"device": "cuda:0,cuda:1", "dtype": torch.float32}
    assert capacity.usable_memory("cuda:0,cuda:1", None) == pytest.approx(0.9 * 12 * size, abs=2)
    assert capacity.usable_memory("cpu,cpu", None) == capacity.usable_memory("cpu", None), "which are one memory"
    assert blocks_that_fit(source, **both, max_memory=None) == 5 + 2
    assert blocks_that_fit(source, **both, max_memory=int(3.01 * size / WEIGHTS_SHARE)) == 2 + 1
    assert capacity.spread(source, 0, 12, **both, quantization="none", max_memory=None) == [8, 4]
    assert capacity.spread(source, 0, 3, **both, quantization="none", max_memory=None) == [2, 1]
    require_room(source, 0, 12, **both, max_memory=None)
    free["cuda:1"] = size // 2
    require_room(source, 0, 8, **both, max_memory=None)
    with pytest.raises(UsageError, match=r"blocks 0:9 of .* do not fit into the memory of cuda:0,cuda:1: .* 5 blocks would fit: --serve 5"):
        require_room(source, 0, 9, **both, max_memory=None)
    assert capacity.graph_bytes("cuda:0,cuda:1", None) == pytest.approx(0.025 * 8.5 * size, rel=1e-3)


def test_kv_tokens_on_several_devices(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token has entries on each device: the fullest decides."""
    span = SpreadSpan.load(source, 0, 4, devices=["cpu", "cpu"], counts=[3, 1])
    kept = source.config.hidden_size * 4
    free = {"cpu": 10**12, "cuda:0": 100_000 * 3 * 2 * kept, "cuda:1": 20_000 * 2 * kept}
    monkeypatch.setattr(capacity, "_free_memory", lambda device: free[device])

    def fitting(device: str, memory: int | None = None, wanted: int | None = None) -> int:
        return kv_tokens(span, source, device=device, max_memory=memory, wanted=wanted)

    assert fitting("cuda:0,cuda:1") == 18_000
    assert fitting("cuda:0,cuda:1", wanted=20_000) == 20_000
    with pytest.raises(UsageError, match="on cuda:0,cuda:1 there is memory for 20000 KV tokens, not for 20001"):
        fitting("cuda:0,cuda:1", wanted=20_001)
    # Of a ceiling each gets its part, from which its blocks' weights go; outputs are kept beside them, half of each in either.
    weights = max(block_sizes(source, torch.float32)[:4])
    assert fitting("cpu,cpu", 2 * (3 * weights + 700 * (3 * 2 * kept + kept // 2))) == 700


def test_what_a_ceiling_leaves_for_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters and captured decoding on each device come off it, whether blocks are counted or loaded."""
    monkeypatch.setattr("petalnet.capacity._free_memory", lambda device: 80 * 10**9)
    assert left_for_blocks(None, "cuda:0", captures=True, adapter_bytes=5) is None
    assert left_for_blocks(10**9, "cpu,cpu", captures=True, adapter_bytes=10**8) == 9 * 10**8
    assert left_for_blocks(10**9, "cuda:0", captures=False) == 10**9
    assert left_for_blocks(8 * 10**9, "cuda:0,cuda:1", captures=True) == 6 * 10**9
    assert left_for_blocks(100, "cpu", captures=False, adapter_bytes=200) == 1
