"""PyTorch's own files: their tensors are found and mapped, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from petalnet.errors import ModelError
from petalnet.models import pickled
from petalnet.models.anatomy import partition
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import block_digests, empty_model, model_key
from petalnet.models.mapped import torch_dtypes

Saved = Callable[[str], Path]


def stored(path: Path, tensor: pickled.StoredTensor) -> torch.Tensor:
    raw = bytearray(path.read_bytes()[tensor.start : tensor.end])
    return torch.frombuffer(raw, dtype=torch_dtypes()[tensor.dtype]).view(tensor.shape)


def test_tensors_are_found_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    shared = torch.randn(100)
    tensors = {
        "matrix": torch.randn(5, 7), "shared": shared[10:30].view(4, 5), "again": shared, "half": torch.randn(3).bfloat16(),
        "numbers": torch.arange(9), "flag": torch.tensor([True]), "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    torch.save(tensors, path)
    found = pickled.read(path, "it")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored(path, found[name]), tensor.detach()), name


@pytest.mark.parametrize("family", ["bloom", "mixtral"])
def test_the_format_does_not_change_the_model(family: str, saved: Saved, tmp_path: Path) -> None:
    """In one file without prefixes and with the tied head beside the embeddings, as models were saved once."""
    folder = tmp_path / "legacy"
    folder.mkdir()
    shutil.copy(saved(family) / "config.json", folder)
    tensors = load_file(saved(family) / "model.safetensors")
    if family == "bloom":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors["lm_head.weight"] = tensors["word_embeddings.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    sources = [ModelSource.open(saved(family)), ModelSource.open(folder)]
    keys = [model_key(source) for source in sources]
    digests = [block_digests(source, partition(empty_model(source), source.tensor_names()), 0, 4) for source in sources]
    assert keys[0] == keys[1] and digests[0] == digests[1]
    names = [name for name in sources[1].tensor_names() if "2" in name]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in sources[1].read(names).items())


class _Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was_run",)


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1), "b": _Runs()}, path)
    with pytest.raises(ModelError, match="^it is damaged, or holds more than tensors and could run code: convert it to safetensors where"):
        pickled.read(path, "it")
    path.write_bytes(pickle.dumps({"b": _Runs()}))
    with pytest.raises(ModelError, match="^it is damaged, or was saved by PyTorch before 1.6: convert it to safetensors$"):
        pickled.read(path, "it")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.zeros(3, 4).t()}, "has the tensor a, whose numbers do not lie in order"),
        ({"a": torch.zeros(3).to_sparse()}, "has a, which is no plain tensor"),
        ({"a": torch.zeros(3, dtype=torch.complex128)}, "has the tensor a of dtype torch.complex128, which cannot be read"),
        ({"state_dict": {"a": torch.zeros(3)}}, "has state_dict, which is no plain tensor"),
        ([torch.zeros(3)], "holds no table of tensors"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(content: Any, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"^it {reason}: convert it to safetensors$"):
        pickled.read(tmp_path / "pytorch_model.bin", "it")


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other content; entries that become None are left out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            if content is not None:
                archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name, content: b"big" if name.endswith("byteorder") else content, "was saved on a machine with another order of bytes"),
        (lambda name, content: b"\x80\x02]." if name.endswith("data.pkl") else content, "holds no table of tensors"),
        (
            lambda name, content: content[: len(content) // 2] if name.endswith("data.pkl") else content,
            "is damaged, or holds more than tensors",
        ),
        (lambda name, content: b"" if name.endswith("data.pkl") else content, "cannot be read: "),
        (lambda name, content: None if name.endswith("data.pkl") else content, "cannot be read: "),
        (lambda name, content: None if name.endswith("data/0") else content, "cannot be read: "),
        (lambda name, content: None, "cannot be read: "),
    ],
)
def test_damaged_archives_are_one_line(change: Callable[[str, bytes], bytes | None], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(300)}, path)
    with pytest.raises(ModelError, match=f"^it {reason}") as caught:
        pickled.read(rewritten(path, change), "it")
    assert "\n" not in str(caught.value)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(300)}, path)
    with pytest.raises(ModelError, match="^it is compressed: convert it to safetensors$"):
        pickled.read(rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED), "it")


def test_sharded_folders_say_which_file_is_meant(saved: Saved, tmp_path: Path) -> None:
    shutil.copy(saved("bloom") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"h.0.a": "one.bin", "h.1.a": "two.bin"}}))
    torch.save({"h.0.a": torch.ones(2)}, tmp_path / "one.bin")
    (tmp_path / "two.bin").write_bytes(b"junk")
    source = ModelSource.open(tmp_path)
    assert torch.equal(source.read(["h.0.a"])["h.0.a"], torch.ones(2))
    with pytest.raises(ModelError, match=f"^two.bin of {tmp_path.name} is damaged, or was saved by PyTorch before 1.6"):
        source.read(["h.1.a"])
