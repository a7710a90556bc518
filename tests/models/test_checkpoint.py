"""Finding a model and reading only what is asked for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnet.errors import ModelError
from petalnet.models.checkpoint import ModelSource
from petalnet.models.files import TensorInfo

Saved = Callable[[str], Path]


def make_folder(folder: Path, saved: Path, **files: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_names_and_tensors_of_a_single_file(saved: Saved) -> None:
    source = ModelSource.open(saved("llama"))
    expected = load_file(saved("llama") / "model.safetensors")
    assert set(source.tensor_names()) == set(expected)
    name = "model.layers.2.mlp.up_proj.weight"
    read = source.read([name])
    assert list(read) == [name]
    assert torch.equal(read[name], expected[name])
    (tensor,) = source.local([name]).values()
    raw = tensor.path.read_bytes()[tensor.start : tensor.end]
    assert source.info(name) == TensorInfo("F32", tuple(expected[name].shape), len(raw)) == tensor.info
    assert raw == expected[name].numpy().tobytes()


def test_only_the_files_of_wanted_tensors_are_opened(saved: Saved, tmp_path: Path) -> None:
    tensors = load_file(saved("bloom") / "model.safetensors")
    folder = make_folder(tmp_path / "sharded", saved("bloom"))
    first = {name: tensor for name, tensor in tensors.items() if ".h.0." in name}
    save_file(first, folder / "one.safetensors")
    weight_map = {name: "one.safetensors" if name in first else "two.safetensors" for name in tensors}  # two is not there
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    source = ModelSource.open(folder)
    assert set(source.tensor_names()) == set(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in source.read(first).items())
    with pytest.raises(ModelError, match="lacks the file two.safetensors"):
        source.read(["transformer.h.1.input_layernorm.weight"])


def test_the_demo_model_is_found_without_a_name(tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalnet.models.checkpoint.DEMO_MODEL", saved("bloom"))
    source = ModelSource.open(None)
    assert source.config.model_type == "bloom"
    assert source.name == "petalnet-demo"


def test_other_files_of_the_model(saved: Saved) -> None:
    source = ModelSource.open(saved("bloom"))
    assert source.file("generation_config.json") == saved("bloom") / "generation_config.json"
    assert source.file("no_such.json") is None


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor the id of a hub repository"):
        ModelSource.open(name)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json: not a model in Hugging Face format"):
        ModelSource.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no_such_family"}', "{}"])
def test_a_configuration_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        ModelSource.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights(tmp_path: Path, saved: Saved) -> None:
    source = ModelSource.open(make_folder(tmp_path / "empty", saved("bloom")))
    with pytest.raises(ModelError, match="has no weights"):
        source.tensor_names()


def test_pickles_that_are_no_archives_are_refused(tmp_path: Path, saved: Saved) -> None:
    source = ModelSource.open(make_folder(tmp_path / "pickle", saved("bloom"), pytorch_model__bin=b"\x80\x04"))
    with pytest.raises(ModelError, match="pytorch_model.bin of pickle is damaged, or was saved by PyTorch before 1.6: convert it"):
        source.tensor_names()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 5) + b"{nope",
        struct.pack("<Q", 62) + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'.ljust(62),
        struct.pack("<Q", 9) + b'{"a": 12}',
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, saved: Saved, content: bytes) -> None:
    source = ModelSource.open(make_folder(tmp_path / "damaged", saved("bloom"), model__safetensors=content))
    with pytest.raises(ModelError, match="model.safetensors of damaged is not a safetensors file"):
        source.tensor_names()


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(tmp_path: Path, saved: Saved, index: str) -> None:
    folder = make_folder(tmp_path / "damaged", saved("bloom"))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="the index of the tensors of damaged is damaged"):
        ModelSource.open(folder).tensor_names()
