"""Manifests: what a model is made of, and what strangers may make of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from petalnet.errors import ModelError
from petalnet.models import block_file
from petalnet.models import manifest as module
from petalnet.models.anatomy import partition
from petalnet.models.block_file import filling_block, find_block
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import block_digests, empty_model, model_key
from petalnet.models.manifest import BlockEntry, Manifest, describe_block, make_manifest
from petalnet.models.swarm_files import SwarmFiles
from petalnet.models.weight_cache import WeightCache

CHUNK = 4096


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(block_file, "CHUNK_BYTES", CHUNK)


@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "mixtral", "gpt2"])
def test_a_manifest_says_what_the_model_is(saved: Callable[[str], Path], family: str) -> None:
    source = ModelSource.open(saved(family))
    made = make_manifest(source)
    parts = partition(empty_model(source), source.tensor_names())
    assert made.model_key == model_key(source)
    assert [block.digest for block in made.blocks] == block_digests(source, parts, 0, len(made.blocks))
    assert all(len(block.chunks) == block.num_chunks > 1 for block in made.blocks)
    assert Manifest.parse(made.to_json()) == made
    short = Manifest.parse(made.without_chunks().to_json())
    assert short.model_key == made.model_key and not any(block.chunks for block in short.blocks)


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_blocks_that_come_in_chunks_are_the_model_again(saved: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """A model that is known by its manifest, whose blocks come chunk by chunk, gives the same tensors and the same digests."""
    source = ModelSource.open(saved(family))
    parts = partition(empty_model(source), source.tensor_names())
    made = make_manifest(source)
    known = ModelSource(made.name, SwarmFiles(made.without_chunks(), tmp_path / "small"))
    there = partition(empty_model(known), known.tensor_names())
    assert there.blocks == parts.blocks and there.prefixes == parts.prefixes
    with pytest.raises(ModelError, match="is not here"):
        known.read(there.blocks[0])
    cache = WeightCache(tmp_path / "cache", None)
    for index, entry in enumerate(made.blocks):
        _, payload = describe_block(source, parts, index)
        with filling_block(cache, entry) as file:
            for chunk in reversed(range(entry.num_chunks)):
                file.write(chunk, payload.read(*entry.chunk_range(chunk)))
            assert file.held() == set(range(entry.num_chunks)) and file.digest() == entry.digest
            path = file.commit()
        known.add_file(path, {entry.prefix + name: name for name, _, _ in entry.tensors})
        expected = source.read(parts.blocks[index])
        assert all(tensor.equal(expected[entry.prefix + name]) for name, tensor in load_file(path).items())
        found = find_block(cache, entry.digest[:32])
        assert found is not None and found[0] == path and found[1] == replace(entry, prefix="")
    assert block_digests(known, there, 0, len(made.blocks)) == [block.digest for block in made.blocks]


def test_a_block_in_the_cache_that_is_damaged_is_not_found(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = ModelSource.open(saved("llama"))
    entry, payload = describe_block(source, partition(empty_model(source), source.tensor_names()), 0)
    entry = replace(entry, chunks=payload.chunks(CHUNK))
    cache = WeightCache(tmp_path / "cache", None)
    with filling_block(cache, entry) as file:
        for chunk in range(entry.num_chunks):
            file.write(chunk, payload.read(*entry.chunk_range(chunk)))
        path = file.commit()
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert find_block(cache, entry.digest) is None and not path.exists()


def test_chunks_of_before_count_only_where_they_are_right(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = ModelSource.open(saved("llama"))
    entry, payload = describe_block(source, partition(empty_model(source), source.tensor_names()), 0)
    entry = replace(entry, chunks=payload.chunks(CHUNK))
    cache = WeightCache(tmp_path / "cache", None)
    with filling_block(cache, entry) as file:
        file.write(0, payload.read(*entry.chunk_range(0)))
        file.write(1, bytes(CHUNK))
    with filling_block(cache, entry) as file:
        assert file.held() == {0}


def manifest_fields() -> dict[str, Any]:
    entry = BlockEntry("a" * 64, (("x", "BF16", (3, 700)), ("y", "U8", (5,))), 4205, ("b" * 64, "c" * 64), "model.layers.0.")
    made = Manifest("name", {"model_type": "llama"}, "d" * 64, (entry,))
    fields: dict[str, Any] = json.loads(made.to_json())
    return fields


WRONG: list[tuple[tuple[str | int, ...], Any]] = [
    (("name",), 7),
    (("name",), "n" * 200),
    (("name",), "new\nline"),
    (("config",), []),
    (("config", "num_hidden_layers"), 10**10),
    (("config", "text_config"), {"n_layer": 5000}),
    (("config", "max_position_embeddings"), 1 << 31),
    (("config", "layers"), [1, -5000]),
    (("config", "num_labels"), 10**9),
    (("config", "head_dim"), 10**12),
    (("config", "rope_theta"), float("nan")),
    (("config", "text_config"), json.loads("[" * 100 + "]" * 100)),
    (("client_digest",), "A" * 64),
    (("blocks",), {}),
    (("blocks",), []),
    (("blocks", 0), None),
    (("blocks", 0, "digest"), "a" * 63),
    (("blocks", 0, "nbytes"), 4204),
    (("blocks", 0, "nbytes"), -1),
    (("blocks", 0, "nbytes"), 4205.0),
    (("blocks", 0, "chunks"), ["b" * 64]),
    (("blocks", 0, "chunks", 1), 5),
    (("blocks", 0, "prefix"), "../x"),
    (("blocks", 0, "prefix"), None),
    (("blocks", 0, "tensors"), []),
    (("blocks", 0, "tensors", 0), ["x", "BF16"]),
    (("blocks", 0, "tensors", 0, 0), "y"),
    (("blocks", 0, "tensors", 0, 0), "x/y"),
    (("blocks", 0, "tensors", 0, 0), "__metadata__"),
    (("blocks", 0, "tensors", 0, 1), "F7"),
    (("blocks", 0, "tensors", 0, 1), ["BF16"]),
    (("blocks", 0, "tensors", 0, 2), [3, True]),
    (("blocks", 0, "tensors", 0, 2), [1] * 9),
    (("blocks", 0, "tensors", 0, 2), [1 << 60, 1 << 60]),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda part: str(part)[:40])
def test_what_makes_no_sense_in_a_manifest_is_refused(path: tuple[str | int, ...], value: Any) -> None:
    fields: Any = manifest_fields()
    Manifest.parse(json.dumps(fields).encode())
    place = fields
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ModelError):
        Manifest.parse(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "data", [b"", b"null", b"\xff", b"[" * 100_000, b'{"name": ' + b"9" * 5000, b" " * (module.MAX_MANIFEST_BYTES + 1)]
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        Manifest.parse(data)


def test_a_manifest_of_more_tensors_than_any_model_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = manifest_fields()
    fields["blocks"] *= 3
    assert len(Manifest.parse(json.dumps(fields).encode()).blocks) == 3
    monkeypatch.setattr(module, "MAX_TENSORS_IN_ALL", 5)
    with pytest.raises(ModelError, match="more than 5 tensors"):
        Manifest.parse(json.dumps(fields).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(JSON, st.sampled_from([path for path, _ in WRONG]))
@settings(deadline=None)
def test_whatever_stands_in_a_field_a_manifest_is_read_or_refused(value: Any, path: tuple[str | int, ...]) -> None:
    fields: Any = manifest_fields()
    place = fields
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    try:
        made = Manifest.parse(json.dumps(fields).encode())
    except ModelError:
        return
    assert Manifest.parse(made.to_json()) == made


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "nothing"}, {"model_type": 3}, {"model_type": "llama", "hidden_size": "x"}, {"model_type": []}]
)
def test_a_manifest_with_a_configuration_that_is_none_has_no_key(config: dict[str, Any]) -> None:
    fields = manifest_fields() | {"config": config}
    with pytest.raises(ModelError, match="configuration"):
        _ = Manifest.parse(json.dumps(fields).encode()).model_key


def test_what_the_key_does_not_cover_is_not_believed(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A peer may add to a manifest what leaves its key as it is: which code runs the model, or what it gives beside its states."""
    made = make_manifest(ModelSource.open(saved("llama")))
    more = {"_attn_implementation": "stranger/kernel", "experts_implementation": "stranger", "num_labels": 60_000, "dtype": "hub"}
    more |= {"auto_map": {"AutoConfig": "stranger/code--config.Config"}, "output_hidden_states": True}
    theirs = Manifest.parse(replace(made, config=made.config | more).to_json())
    assert theirs.model_key == made.model_key
    config = ModelSource(theirs.name, SwarmFiles(theirs, tmp_path)).config
    assert (config._attn_implementation, config.num_labels, config.dtype, config.output_hidden_states) == (None, 2, None, False)
    assert "stranger" not in (tmp_path / "config.json").read_text() and not list(tmp_path.glob(".*"))
