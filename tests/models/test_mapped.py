"""Tensors that are mapped from files, and files that are added to a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnet.errors import ModelError
from petalnet.models import mapped
from petalnet.models.checkpoint import ModelSource
from petalnet.models.files import LocalTensor, read_header
from petalnet.models.mapped import map_tensors

Saved = Callable[[str], Path]


@pytest.mark.parametrize("most", [1, 100, 10**6])
def test_bytes_are_those_of_the_file_however_they_are_put_together(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "RUN_BYTES", most)
    tensors = {str(number): torch.randn(number, 9) for number in (0, 1, 5, 900, 2)} | {"scalar": torch.tensor(3, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"other": torch.ones(4)}, tmp_path / "b.safetensors")
    places = read_header(tmp_path / "a.safetensors") | read_header(tmp_path / "b.safetensors")
    found = map_tensors(places)
    assert list(found) == list(places)
    assert all(torch.equal(found[name], tensor) for name, tensor in {**tensors, "other": torch.ones(4)}.items())


def test_what_is_written_to_a_mapped_tensor_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    before = path.read_bytes()
    tensor = map_tensors(read_header(path))["a"]
    tensor += 1
    assert path.read_bytes() == before and float(map_tensors(read_header(path))["a"].sum()) == 0
    path.unlink()
    assert float(tensor.sum()) == 1000, "what is mapped stays when a cache removes the file"


def test_files_that_are_too_short_and_dtypes_that_are_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="^a is too short to hold the tensor b: was it downloaded whole"):
        map_tensors({"b": LocalTensor(path, "F32", (30,), 0, 120)})
    with pytest.raises(ModelError, match="^a has the tensor b of dtype F4, which cannot be computed with$"):
        map_tensors({"b": LocalTensor(path, "F4", (30,), 0, 15)})


def test_tensors_are_read_from_files_that_were_added_while_they_are_there(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    name, other = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    save_file({"mlp.up_proj.weight": tensors[name] + 1}, tmp_path / "block")
    source = ModelSource.open(saved("llama"))
    source.add_file(tmp_path / "block", {name: "mlp.up_proj.weight"})
    found = source.read([name, other])
    assert torch.equal(found[name], tensors[name] + 1) and torch.equal(found[other], tensors[other])
    assert source.info(name).shape == tuple(tensors[name].shape)
    (tmp_path / "block").unlink()
    assert torch.equal(source.read([name])[name], tensors[name]), "another node's cache made room"
    assert torch.equal(source.read_copy(name), tensors[name])
    save_file({"a": torch.zeros(1)}, tmp_path / "block")
    with pytest.raises(ModelError, match="^block of .* lacks the tensor b$"):
        source.add_file(tmp_path / "block", {name: "b"})
    (tmp_path / "block").write_bytes(b"junk")
    with pytest.raises(ModelError, match="^block of .* is not a safetensors file"):
        source.add_file(tmp_path / "block", {name: "a"})
