"""Models written anew: the same model for petalnet and for the library, all of it or nothing, and little memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from petalnet.errors import ModelError, PetalnetError, UsageError
from petalnet.models import convert as converting
from petalnet.models.anatomy import partition
from petalnet.models.checkpoint import ModelSource
from petalnet.models.convert import convert
from petalnet.models.files import INDEX_FILE
from petalnet.models.identity import block_digests, empty_model, model_key
from petalnet.models.manifest import CHUNK_BYTES, MANIFEST_FILE, Manifest
from petalnet.models.unfinished import UNFINISHED
from tests.models.hub_server import REPOSITORY, serving
from tests.swarm.family_rows import ROWS, Row, save

from .conftest import LAYERS


def digests(source: ModelSource) -> list[str]:
    return block_digests(source, partition(empty_model(source), source.tensor_names()), 0, LAYERS)


@pytest.mark.parametrize("family", ("bloom", "llama", "opt", "mixtral", "gpt2"))
def test_it_stays_the_same_model(family: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = ModelSource.open(saved(family))
    told: list[tuple[int, int]] = []
    made = convert(source, tmp_path / "new", progress=lambda done, total: told.append((done, total)))
    new = ModelSource.open(tmp_path / "new")
    assert model_key(new) == model_key(source) == made.key == made.manifest.model_key
    assert digests(new) == digests(source) == [block.digest for block in made.manifest.blocks]
    files = {path.name for path in made.folder.glob("*.safetensors")}
    assert files == {"client.safetensors", *(f"block-00{index}.safetensors" for index in range(LAYERS))}
    assert told[-1] == (made.nbytes, made.nbytes) and [done for done, _ in told] == sorted(done for done, _ in told)
    same_weights(saved(family), made.folder, torch.float32)


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_family_stays_the_same_model(row: Row, tmp_path: Path) -> None:
    """Whatever layout its files have. Where the library keeps some tensors in float32, they are kept so as well."""
    source = ModelSource.open(save(row, tmp_path / "old"))
    made = convert(source, tmp_path / "new")
    assert made.key == model_key(source) == model_key(ModelSource.open(made.folder))
    same_weights(tmp_path / "old", made.folder, torch.float32)
    if empty_model(source)._get_dtype_plan(torch.bfloat16):
        same_weights(tmp_path / "old", convert(source, tmp_path / "rounded", dtype=torch.bfloat16).folder, torch.bfloat16)


def same_weights(before: Path, after: Path, dtype: torch.dtype) -> None:
    """Whether the library loads the same from two folders, in a dtype."""
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict() for folder in (before, after))
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]) for name in old)


def test_a_server_reads_only_the_files_of_its_blocks(saved: Callable[[str], Path], tmp_path: Path) -> None:
    made = convert(ModelSource.open(saved("llama")), tmp_path / "new")
    weight_map = json.loads((made.folder / INDEX_FILE).read_text())["weight_map"]
    for name, file in weight_map.items():
        assert file == (f"block-00{name.split('.')[2]}.safetensors" if ".layers." in name else "client.safetensors")
    assert weight_map.keys() == load_file(saved("llama") / "model.safetensors").keys()


def test_the_manifest_tells_every_chunk(saved: Callable[[str], Path], tmp_path: Path) -> None:
    made = convert(ModelSource.open(saved("llama")), tmp_path / "new", name="me/tiny")
    read = Manifest.parse((made.folder / MANIFEST_FILE).read_bytes())
    assert read == made.manifest and read.name == "me/tiny"
    assert all(len(block.chunks) == -(-block.nbytes // CHUNK_BYTES) > 0 for block in read.blocks)


def test_a_manifest_that_would_be_too_long_leaves_out_the_chunks(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converting, "MAX_MANIFEST_BYTES", 1000)
    made = convert(ModelSource.open(saved("llama")), tmp_path / "new")
    read = Manifest.parse((made.folder / MANIFEST_FILE).read_bytes())
    assert read == made.manifest.without_chunks() and read.model_key == made.key


def test_from_several_files_and_from_pytorchs_own(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copytree(saved("llama"), tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(load_file(saved("llama") / "model.safetensors"), tmp_path / "pickled/pytorch_model.bin")
    key = model_key(ModelSource.open(saved("llama")))
    for origin in ("sharded", "pickled"):
        made = convert(ModelSource.open(tmp_path / origin), tmp_path / f"{origin}-new")
        assert made.key == key and not list(made.folder.glob("*.bin"))


def test_from_a_hub_with_little_room_in_the_cache(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block: what was written makes room for what comes next, and no byte is fetched twice."""
    with serving(saved("llama")) as hub:
        hub.be_the_hub(monkeypatch, tmp_path / "home")
        source = ModelSource.open(REPOSITORY, max_disk_space=60_000)
        made = convert(source, tmp_path / "new")
        assert made.key == model_key(ModelSource.open(saved("llama"))) and made.manifest.name == REPOSITORY
        assert made.nbytes > 2 * 60_000 and hub.weights_sent < 1.1 * made.nbytes
    huggingface_hub.close_session()


def test_another_dtype_is_another_model(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = ModelSource.open(saved("llama"))
    made = convert(source, tmp_path / "new", dtype=torch.bfloat16)
    assert made.key != model_key(source)
    config = json.loads((made.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    same_weights(saved("llama"), made.folder, torch.bfloat16)
    stored = {name: tensor for file in made.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_what_is_quantized_already_keeps_its_dtypes(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "quantized/config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="quantized in its files already"):
        convert(ModelSource.open(tmp_path / "quantized"), tmp_path / "new", dtype=torch.bfloat16)
    assert not (tmp_path / "new").exists()


def test_tensors_of_odd_sizes_lie_where_they_can_be_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """What has longer elements comes first, or a single byte would put all that follows at odd addresses."""
    shutil.copytree(saved("llama"), tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed/model.safetensors")
    tensors["model.layers.1.a"] = torch.arange(3, dtype=torch.int8)
    tensors["model.layers.1.b"] = torch.arange(5, dtype=torch.float64)
    tensors["model.layers.1.c"] = torch.zeros(0)
    tensors["model.layers.1.d"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "mixed/model.safetensors", metadata={"format": "pt"})
    made = convert(ModelSource.open(tmp_path / "mixed"), tmp_path / "new")
    again = load_file(made.folder / "block-001.safetensors")
    assert again and all(torch.equal(tensors[name], tensor) for name, tensor in again.items())
    assert [block.digest for block in made.manifest.blocks] == digests(ModelSource.open(tmp_path / "mixed"))


@pytest.mark.parametrize("there", (False, True))
def test_an_error_leaves_nothing(there: bool, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new"
    if there:
        folder.mkdir()

    def interrupt(done: int, total: int) -> None:
        with pytest.raises(ModelError, match="no config.json"):
            ModelSource.open(folder)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ModelSource.open(saved("llama")), folder, progress=interrupt)
    assert folder.exists() == there and not (there and list(folder.iterdir()))
    monkeypatch.setattr(converting, "_settle", lambda stream: full())
    with pytest.raises(PetalnetError, match=r"the disk of .*new is full") as raised:
        convert(ModelSource.open(saved("llama")), folder)
    assert "\n" not in str(raised.value) and folder.exists() == there and not (there and list(folder.iterdir()))


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_does_not_fit_is_refused_before_it_is_written(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 0))
    with pytest.raises(PetalnetError, match=r"needs 17\.0 MB of room, and the disk of .*new has 0 bytes left"):
        convert(ModelSource.open(saved("llama")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_killed_conversion_left_is_no_model_and_cleared_away(saved: Callable[[str], Path], tmp_path: Path) -> None:
    left = tmp_path / "new" / UNFINISHED
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no config.json"):
        ModelSource.open(tmp_path / "new")
    made = convert(ModelSource.open(saved("llama")), tmp_path / "new")
    assert not left.exists() and digests(ModelSource.open(made.folder))


def test_a_folder_whose_files_are_moved_is_no_model_until_all_are(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, move = tmp_path / "new", Path.replace
    shutil.copytree(saved("bloom"), folder)

    def moved(path: Path, target: Path) -> None:
        if target.parent == folder:
            with pytest.raises(ModelError, match="no config.json"):
                ModelSource.open(folder)
        move(path, target)

    monkeypatch.setattr(Path, "replace", moved)
    made = convert(ModelSource.open(saved("llama")), folder, replace_model=True)
    assert model_key(ModelSource.open(folder)) == made.key


def test_a_folder_that_holds_something_is_replaced_only_on_demand(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    shutil.copytree(saved("bloom"), folder)
    (folder / "notes.txt").write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UsageError, match="holds something .* --force"):
        convert(ModelSource.open(saved("llama")), folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    convert(ModelSource.open(saved("llama")), folder, replace_model=True)
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "model.safetensors").exists()
    same_weights(saved("llama"), folder, torch.float32)


def test_folders_that_cannot_be_written_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = ModelSource.open(saved("llama"))
    with pytest.raises(UsageError, match="is the model itself"):
        convert(source, saved("llama"), replace_model=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is no folder"):
        convert(source, tmp_path / "file")
    (tmp_path / "busy").mkdir()
    handle = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another process is writing"):
        convert(source, tmp_path / "busy")
    os.close(handle)
    assert convert(source, tmp_path / "busy").key == model_key(source)


def test_a_source_that_became_shorter_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path / "old")
    source = ModelSource.open(tmp_path / "old")
    for name in source.tensor_names():
        source.info(name)
    with (tmp_path / "old/model.safetensors").open("r+b") as stream:
        stream.truncate((tmp_path / "old/model.safetensors").stat().st_size // 2)
    with pytest.raises(ModelError, match="model.safetensors of old"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


MEMORY = """
import sys, threading
from pathlib import Path

import torch

from petalnet.models.checkpoint import ModelSource
from petalnet.models.convert import convert
from petalnet.models.identity import empty_model

source, dtype, stopped, peak = ModelSource.open(sys.argv[1]), getattr(torch, sys.argv[3], None), threading.Event(), 0
empty_model(source)


def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))


def watch():
    global peak
    while not stopped.wait(0.002):
        peak = max(peak, anonymous())


before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
convert(source, Path(sys.argv[2]), dtype=dtype)
stopped.set()
thread.join()
print(peak - before)
"""


@pytest.mark.long
def test_little_memory(tmp_path: Path) -> None:
    """Of a model of 150 MB whose largest tensor takes 16 MB: a few megabytes, or some copies of a tensor where its dtype changes."""
    config = LlamaConfig(vocab_size=8000, hidden_size=512, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "old")
    assert (tmp_path / "old/model.safetensors").stat().st_size > 140e6
    for dtype, most in (("as it is", 20e6), ("bfloat16", 40e6)):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "old"), str(tmp_path / dtype), dtype]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < most
