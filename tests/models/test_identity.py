"""Names are labels; bytes decide."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from petalnet.models.anatomy import partition
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import block_digests, client_digest, config_hash, model_key, sample_windows

Saved = Callable[[str], Path]


def copy(saved: Path, folder: Path, *, tensors: dict[str, torch.Tensor] | None = None, **fields: object) -> ModelSource:
    folder.mkdir()
    config = json.loads((saved / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(saved / "model.safetensors") if tensors is None else tensors, folder / "model.safetensors")
    return ModelSource.open(folder)


def digests(source: ModelSource) -> list[str]:
    with torch.device("meta"):
        parts = partition(AutoModel.from_config(source.config), source.tensor_names())
    return block_digests(source, parts, 0, len(parts.blocks))


def test_volatile_fields_do_not_count(saved: Saved) -> None:
    config = AutoConfig.from_pretrained(saved("llama"))
    before = config_hash(config)
    config.dtype, config.name_or_path, config.use_cache, config.architectures = torch.bfloat16, "elsewhere", False, ["Other"]
    assert config_hash(config) == before
    config.rms_norm_eps = 1e-3
    assert config_hash(config) != before


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_a_copy_has_the_same_identity(family: str, saved: Saved, tmp_path: Path) -> None:
    source, other = ModelSource.open(saved(family)), copy(saved(family), tmp_path / "copy", transformers_version="4.0")
    assert model_key(source) == model_key(other)
    assert digests(source) == digests(other)
    assert len(set(digests(source))) == 4, "blocks with different weights differ"


def test_a_changed_block_changes_only_its_digest(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    tensors["model.layers.2.input_layernorm.weight"][7] += 1e-3
    source, other = ModelSource.open(saved("llama")), copy(saved("llama"), tmp_path / "tuned", tensors=tensors)
    assert [a == b for a, b in zip(digests(source), digests(other), strict=True)] == [True, True, False, True]
    assert model_key(source) == model_key(other), "servers of both meet, and tell each other apart by their blocks"


def test_a_changed_embedding_is_another_model(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] += 1
    assert model_key(copy(saved("llama"), tmp_path / "other", tensors=tensors)) != model_key(ModelSource.open(saved("llama")))


def test_prefix_shards_and_a_stored_tied_head_do_not_count(saved: Saved, tmp_path: Path) -> None:
    """The same weights as an older tool wrote them: no prefix, two files, the head stored beside the embeddings."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(saved("bloom") / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["word_embeddings.weight"].clone()
    folder = tmp_path / "old"
    copy(saved("bloom"), folder, tensors={"unused": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    halves = [{name: tensor for name, tensor in tensors.items() if (hash(name) % 2 == 0) == even} for even in (True, False)]
    for half, file in zip(halves, ("a.safetensors", "b.safetensors"), strict=True):
        save_file(half, folder / file)
    weight_map = {name: file for half, file in zip(halves, ("a.safetensors", "b.safetensors"), strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source, old = ModelSource.open(saved("bloom")), ModelSource.open(folder)
    assert client_digest(source) == client_digest(old)
    assert digests(source) == digests(old)


def test_digests_are_remembered_until_the_file_changes(saved: Saved, tmp_path: Path, cache_folder: Path) -> None:
    source = copy(saved("llama"), tmp_path / "copy")
    before = client_digest(source)
    file = tmp_path / "copy" / "model.safetensors"
    status = file.stat()
    (tensor,) = source.local(["model.embed_tokens.weight"]).values()
    with file.open("r+b") as stream:
        stream.seek(tensor.start)
        stream.write(b"\xff\xff")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert client_digest(source) == before, "same size and time: taken from the cache"
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert client_digest(source) != before
    for remembered in (cache_folder / "sample-digests").iterdir():
        remembered.write_text("{ damaged")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert client_digest(source) != before, "a damaged cache is no cache"


def test_blocks_are_digested_as_a_whole_and_the_client_part_by_samples(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(99 * 64, 32)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64 * 64, 32)
    before = copy(saved("llama"), tmp_path / "before", tensors=tensors)
    tensors["model.embed_tokens.weight"][99 * 64 // 6, 5] = 1  # between two windows
    tensors["model.layers.1.mlp.up_proj.weight"][64 * 64 // 6, 5] = 1
    after = copy(saved("llama"), tmp_path / "after", tensors=tensors)
    assert model_key(before) == model_key(after)
    assert [a == b for a, b in zip(digests(before), digests(after), strict=True)] == [True, False, True, True]


@pytest.mark.parametrize(("nbytes", "starts"), [(0, [0]), (65536, [0]), (65537, [0, 16384, 32768, 49153]), (10**9, None)])
def test_samples_are_of_bounded_size_and_reach_both_ends(nbytes: int, starts: list[int] | None) -> None:
    windows = sample_windows(nbytes)
    assert windows[0][0] == 0 and windows[-1][1] == nbytes
    assert sum(end - start for start, end in windows) <= 65536
    assert all(left[1] <= right[0] for left, right in zip(windows, windows[1:], strict=False))
    assert starts is None or [start for start, _ in windows] == starts
