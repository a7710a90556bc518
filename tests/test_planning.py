"""What a model takes of a machine: the arithmetic by itself, and for models whose sizes are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalnet.blocks.span import Span
from petalnet.capacity import blocks_that_fit, kv_shapes
from petalnet.cli import run
from petalnet.fitting import MOST_KV_TOKENS, WEIGHTS_SHARE, Room
from petalnet.models.checkpoint import ModelSource
from petalnet.planning import make_plan, quantized_share


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource.open(None)


@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=4), st.integers(1, 10**10), st.integers(1, 10**6), st.integers(0, 10**5),
    st.one_of(st.none(), st.integers(1, 10**6)),
)  # fmt: skip
def test_what_fits_takes_no_more_than_there_is(devices: list[int], block: int, kv: int, kept: int, tokens: int | None) -> None:
    room = Room(tuple(devices), block, kv, kept)
    blocks = room.blocks(tokens)
    if tokens is None:
        assert blocks * block <= WEIGHTS_SHARE * sum(devices) + 1
    else:
        assert blocks * (block + tokens * kv) + (tokens * kept if blocks else 0) <= sum(devices)
    beside = room.tokens(blocks) if blocks else 0
    assert 0 <= beside <= MOST_KV_TOKENS
    assert blocks * (block + beside * kv) <= sum(devices)


def test_blocks_beside_tokens() -> None:
    room = Room((1000,), block=100, kv=1, kept=2)
    assert (room.blocks(), room.tokens(7)) == (7, 300 // 9)
    assert (room.blocks(33), room.blocks(100), room.blocks(300)) == (7, 4, 1)
    assert room.blocks(600) == 0


def test_kv_shapes_are_found_without_numbers(source: ModelSource) -> None:
    assert kv_shapes(source) == Span.load(source, 0, 12).kv_shapes


def test_a_plan(source: ModelSource) -> None:
    memory = 10 * 2**20
    plan = make_plan(source, dtype=torch.float32, quantization="nf4", device="cpu", max_memory=memory)
    names = [(one.dtype, one.quantization) for one in plan.precisions]
    assert names == [("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float32", "nf4")]
    assert [one.chosen for one in plan.precisions] == [False, False, False, True]
    exact, half, byte, small = plan.precisions
    assert exact.block_bytes == 2 * half.block_bytes and exact.kv_bytes == 2 * 160 * 4 == 2 * half.kv_bytes
    assert exact.block_bytes / 3.9 < byte.block_bytes < exact.block_bytes / 3.6
    assert exact.block_bytes / 7 < small.block_bytes < exact.block_bytes / 6
    assert exact.blocks == int(memory * WEIGHTS_SHARE) // exact.block_bytes == 5
    assert (exact.machines, small.blocks, small.machines) == (3, 12, 1)
    for quantization, planned in (("int8", byte), ("nf4", small)):
        assert Span.load(source, 3, 4, quantization=quantization).weight_bytes == planned.block_bytes


def test_a_plan_for_many_tokens_and_for_too_little_memory(source: ModelSource) -> None:
    plan = make_plan(source, dtype=torch.float32, quantization="none", device="cpu", max_memory=10 * 2**20, kv_tokens=3000)
    exact = plan.precisions[0]
    assert exact.blocks == (10 * 2**20 - 3000 * 640) // (exact.block_bytes + 3000 * 1280) < 5
    assert exact.kv_tokens >= 3000
    fit = blocks_that_fit(source, dtype=torch.float32, device="cpu", max_memory=10 * 2**20, kv_tokens=3000)
    assert fit == exact.blocks, "which is what `--serve auto` goes by"
    many = make_plan(source, dtype=torch.float32, quantization="none", device="cpu", max_memory=10**11, kv_tokens=5_000_000).precisions[0]
    assert (many.blocks, many.kv_tokens) == (12, 5_000_000), "more than a node takes by itself, and it has room for them"
    none = make_plan(source, dtype=torch.float32, quantization="none", device="cpu", max_memory=1000).precisions
    assert all((one.blocks, one.kv_tokens, one.machines) == (0, 0, None) for one in none)


def test_experts_are_left_alone_and_that_is_told(tiny_mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = quantized_share(ModelSource.open(tiny_mixtral))
    assert 0 < share < 0.5
    assert run(["plan", str(tiny_mixtral), "--max-memory", "1MB", "--device", "cpu"]) == 0
    assert f"rounds only {share:.0%} of this model" in capsys.readouterr().out


@pytest.fixture
def tiny_mixtral(tmp_path: Path) -> Path:
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    MixtralConfig(**sizes, vocab_size=99, num_local_experts=4, dtype="float32").save_pretrained(tmp_path)
    return tmp_path


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PETALNET_CONFIG", str(tmp_path / "none.toml"))
    options = ["--dtype", "float32", "--device", "cpu", "--max-memory", "10MiB", "--quantization", "int8"]
    assert run(["plan", *options]) == 0
    text = capsys.readouterr().out
    assert "12 blocks" in text and "float32/int8 *" in text and "machines like this" in text
    assert "`petalnet node --serve auto --dtype float32 --quantization int8 --device cpu --max-memory 0.01048576GB`" in text
    assert run(["plan", *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_blocks"] == 12 and [one["blocks"] for one in plan["precisions"]] == [5, 11, 12, 12]
    assert run(["plan", "--device", "cpu", "--max-memory", "1kB"]) == 0
    assert "0.000001GB` cannot hold a single block" in capsys.readouterr().out
    assert run(["plan", "--device", "cpu,cpu"]) == 0, "several devices, as a node takes them"
    assert "cpu,cpu memory" in capsys.readouterr().out
