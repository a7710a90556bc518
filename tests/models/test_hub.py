"""Models from a hub repository: the real huggingface_hub and a small hub on loopback. No more bytes are fetched than are needed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from petalnet.models.files import FolderFiles, Place
from petalnet.models.hub import segments
from tests.models.hub_server import COMMIT, Hub, serving
from tests.peft_adapters import save_adapter

BLOCKS = 6


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 5 MB in one file, of which a block takes 0.6 MB and the embeddings, like the head, 0.8 MB."""
    folder = tmp_path_factory.mktemp("repository")
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=1600, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=BLOCKS, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with serving(repository) as server:
        yield server


@pytest.fixture
def sharded_hub(saved: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    transformers.AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(folder, max_shard_size="20KB")
    with serving(folder) as server:
        yield server


def block_bytes(folder: Path, first: int, end: int) -> int:
    """What the tensors of blocks [first, end) take."""
    tensors = FolderFiles(folder).tensors()
    return sum(info.nbytes for name, info in tensors.items() if any(f"layers.{block}." in name for block in range(first, end)))


LOAD = """
from petalnet.models.checkpoint import ModelSource
from petalnet.errors import PetalnetError
try:
    source = ModelSource.open("org/tiny"{arguments})
    names = [name for name in source.tensor_names() if any(f"layers.{{block}}." in name for block in range({first}, {end}))]
    tensors = source.read(names)
    print("read", len(tensors), float(sum(tensor.double().sum() for tensor in tensors.values())))
except PetalnetError as error:
    print(error)
"""


def load(first: int, end: int, arguments: str = "") -> str:
    """A light program that reads the tensors of blocks [first, end) and prints how many, and their sum; or the error."""
    return LOAD.format(first=first, end=end, arguments=f", {arguments}" if arguments else "")


def expected(folder: Path, first: int, end: int) -> str:
    from petalnet.models.checkpoint import ModelSource

    source = ModelSource.open(folder)
    tensors = source.read(name for name in source.tensor_names() if any(f"layers.{block}." in name for block in range(first, end)))
    return f"read {len(tensors)} {float(sum(tensor.double().sum() for tensor in tensors.values()))}"


DOWNLOAD = """
from huggingface_hub import hf_hub_download
hf_hub_download("org/tiny", {file!r})
"""

SPAN = """
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import model_key
source = ModelSource.open({model!r})
print(model_key(source), *Span.load(source, 1, 5).digests)
"""


def test_a_span_costs_hardly_more_bytes_than_its_own(hub: Hub, tmp_path: Path) -> None:
    done = hub.run(tmp_path / "home", SPAN.format(model="org/tiny"))
    assert done.returncode == 0, done.stderr
    own, read = block_bytes(hub.folder, 1, 5), hub.weights_sent
    samples = 2 * 65536 + 128 * 4  # of the embeddings, of the head, and the final norm
    header = int.from_bytes((hub.folder / "model.safetensors").read_bytes()[:8], "little") + 8
    print(f"bytes read from the hub over the span's own: {read / own:.3f}")
    assert read == own + samples + header
    assert (read - samples) / own <= 1.01, "of a model that is not tiny, samples are nothing"
    hub.forget()
    assert hub.run(tmp_path / "home", SPAN.format(model="org/tiny")).stdout == done.stdout
    assert hub.weights_sent == 0 and not hub.fetched, "all of it is in the cache by now"
    assert hub.run(tmp_path / "home", SPAN.format(model=str(hub.folder))).stdout == done.stdout, "it is the same model as in a folder"


def test_of_several_files_only_those_are_opened_that_hold_something(sharded_hub: Hub, tmp_path: Path) -> None:
    done = sharded_hub.run(tmp_path / "home", load(1, 2))
    assert done.stdout.split()[:2] == ["read", "9"], done.stderr
    shards = sorted(file.name for file in sharded_hub.folder.glob("*.safetensors"))
    index = json.loads((sharded_hub.folder / "model.safetensors.index.json").read_text())
    needed = sorted({file for name, file in index["weight_map"].items() if "model.layers.1." in name})
    assert sorted(name for name in sharded_hub.sent if name.endswith(".safetensors")) == needed and 0 < len(needed) < len(shards)


def test_a_connection_that_breaks_is_opened_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.manners.break_after = 300_000
    done = hub.run(tmp_path / "home", load(1, 3))
    assert done.stdout.strip() == expected(hub.folder, 1, 3), done.stderr
    assert hub.weights_sent < block_bytes(hub.folder, 1, 3) * 1.02, "nothing was sent twice"


def test_what_a_killed_process_fetched_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    code = f"""
import os, signal
from petalnet.models import filling
filling.NOTE_BYTES = 1
note = filling.Filling.note
def note_and_die(self, start, end):
    note(self, start, end)
    if end >= 400_000:
        os.kill(os.getpid(), signal.SIGKILL)
filling.Filling.note = note_and_die
{load(1, 3)}
"""
    assert hub.run(tmp_path / "home", code).returncode == -signal.SIGKILL
    hub.forget()
    done = hub.run(tmp_path / "home", load(1, 3))
    assert done.stdout.strip() == expected(hub.folder, 1, 3), done.stderr
    assert block_bytes(hub.folder, 1, 3) - 500_000 <= hub.weights_sent <= block_bytes(hub.folder, 1, 3) - 400_000


def test_two_processes_at_once_fetch_everything_once(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-c", load(0, 4)]
    environment = hub.environment(tmp_path / "home")
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert answers == {expected(hub.folder, 0, 4)}
    assert hub.weights_sent <= block_bytes(hub.folder, 0, 4) * 1.02


def test_the_bound_on_the_disk_holds_while_blocks_come_and_go(hub: Hub, tmp_path: Path, cache_folder: Path) -> None:
    block = block_bytes(hub.folder, 0, 1)
    most = int(2.5 * block)
    for first in (0, 2, 4):
        done = hub.run(tmp_path / "home", load(first, first + 2, f"max_disk_space={most}"))
        assert done.stdout.strip() == expected(hub.folder, first, first + 2), done.stderr
        assert sum(file.stat().st_size for file in (cache_folder / "weights").iterdir()) <= most
    hub.forget()
    assert hub.run(tmp_path / "home", load(4, 6, f"max_disk_space={most}")).stdout.startswith("read")
    assert hub.weights_sent == 0
    refused = hub.run(tmp_path / "home", load(0, 3, f"max_disk_space={most}")).stdout
    assert "--max-disk-space: what is to be loaded takes" in refused and refused.count("\n") == 1
    assert hub.weights_sent == 0


def test_without_the_hub_what_was_fetched_still_loads(hub: Hub, tmp_path: Path) -> None:
    before = hub.run(tmp_path / "home", SPAN.format(model="org/tiny"))
    assert before.returncode == 0, before.stderr
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": hub.url, "http_proxy": "http://127.0.0.1:9", "NO_PROXY": ""}):
        assert hub.run(tmp_path / "home", SPAN.format(model="org/tiny"), **more).stdout == before.stdout
    done = hub.run(tmp_path / "home", load(0, 1), HF_HUB_OFFLINE="1")
    line = "the hub cannot be reached to fetch model.safetensors of org/tiny, and not all of it is on this machine: this machine is set to "
    assert done.stdout == f"{line}stay offline (HF_HUB_OFFLINE)\n"


def test_a_file_that_the_hubs_own_cache_has_whole_is_used(hub: Hub, tmp_path: Path) -> None:
    fetch = (
        'from huggingface_hub import hf_hub_download; [hf_hub_download("org/tiny", name) for name in ("config.json", "model.safetensors")]'
    )
    assert hub.run(tmp_path / "home", fetch).returncode == 0
    hub.forget()
    assert hub.run(tmp_path / "home", load(2, 4)).stdout.strip() == expected(hub.folder, 2, 4)
    assert hub.weights_sent == 0


@pytest.mark.parametrize("manners", [{"shift": 8}, {"leave_out": frozenset(["Content-Range"])}, {"longer": 5}])
def test_a_hub_that_answers_with_another_range_is_named(manners: dict[str, object], hub: Hub, tmp_path: Path) -> None:
    for name, value in manners.items():
        setattr(hub.manners, name, value)
    done = hub.run(tmp_path / "home", load(1, 3))
    assert "the hub was asked for bytes 0 to 7 of" in done.stdout or "the hub sends more of model.safetensors" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_of_a_hub_that_knows_no_ranges_the_whole_file_is_taken(hub: Hub, tmp_path: Path) -> None:
    hub.manners.ignore_ranges = True
    done = hub.run(tmp_path / "home", load(1, 3))
    assert done.stdout.strip() == expected(hub.folder, 1, 3), done.stderr
    assert "the hub does not send parts of files" in done.stderr
    hub.forget()
    assert hub.run(tmp_path / "home", load(3, 5)).stdout.strip() == expected(hub.folder, 3, 5)
    assert hub.weights_sent == 0


@pytest.mark.parametrize("header", ["ETag", "Content-Length"])
def test_a_hub_that_does_not_tell_what_a_file_is(header: str, hub: Hub, tmp_path: Path) -> None:
    assert (
        hub.run(tmp_path / "home", 'from huggingface_hub import hf_hub_download; hf_hub_download("org/tiny", "config.json")').returncode
        == 0
    )
    hub.manners.leave_out = frozenset([header])
    done = hub.run(tmp_path / "home", load(1, 3).replace('"org/tiny"', f'"org/tiny", revision="{COMMIT}"'))
    assert done.stdout == "the hub does not tell how large model.safetensors of org/tiny is, or which version of it this is\n", done.stderr


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\xff" * 8, "its header is longer than the file"),
        ((62).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "lies outside of the file"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a table"),
    ],
)
def test_damaged_files_on_the_hub_are_named(header: bytes, reason: str, hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.folder = tmp_path / "damaged"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_bytes((repository / "config.json").read_bytes())
    (hub.folder / "model.safetensors").write_bytes(header)
    done = hub.run(tmp_path / "home", load(1, 3))
    assert done.stdout.startswith("model.safetensors of org/tiny is not a safetensors file: ") and reason in done.stdout, done.stderr


def test_gated_private_and_missing_repositories_are_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    hub.manners.gated = True
    done = hub.run(tmp_path / "gated", load(1, 3))
    assert done.stdout == "org/tiny is gated: accept its terms on the hub and log in, or pass a token\n", done.stderr
    hub.manners.gated, hub.manners.token = False, "hf_secret"
    private = "there is no folder org/tiny and no such hub repository (or it is private: pass a token)\n"
    assert hub.run(tmp_path / "private", load(1, 3)).stdout == private
    assert hub.run(tmp_path / "private", load(1, 3, "token='hf_secret'")).stdout.startswith("read")
    assert hub.run(tmp_path / "other", load(1, 3).replace("org/tiny", "org/other")).stdout == private.replace("org/tiny", "org/other")
    revision = hub.run(tmp_path / "revision", load(1, 3, "revision='nowhere', token='hf_secret'")).stdout
    assert revision == "org/tiny has no revision nowhere\n"


def test_a_busy_hub_and_one_that_sends_elsewhere(hub: Hub, tmp_path: Path) -> None:
    hub.manners.redirect, hub.manners.token = True, "hf_secret"
    hub.manners.statuses = [503, 429]
    environment = {"NO_PROXY": "127.0.0.1,localhost"}
    done = hub.run(tmp_path / "home", load(1, 3, "token='hf_secret'"), **environment)
    assert done.stdout.strip() == expected(hub.folder, 1, 3), done.stderr


def test_progress_is_shown_on_terminals_only(hub: Hub, tmp_path: Path) -> None:
    done = hub.run(tmp_path / "quiet", load(1, 3))
    assert done.stderr == ""
    for silenced, home in (("0", "shown"), ("1", "silenced")):
        more = {"HF_HUB_DISABLE_PROGRESS_BARS": silenced, "PETALNET_CACHE_DIR": str(tmp_path / home)}
        shown = on_terminal(hub.environment(tmp_path / home) | more, load(1, 3))
        assert (b"org/tiny: 100%" in shown) == (silenced == "0"), shown


def on_terminal(environment: dict[str, str], code: str) -> bytes:
    """What a program writes to a standard error that is a terminal."""
    main, side = os.openpty()
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=side) as process:
        os.close(side)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody is at the other side any more
            while part := os.read(main, 65536):
                shown += part
        os.close(main)
    assert process.returncode == 0, shown
    return shown


def test_a_legacy_checkpoint_is_the_same_model(hub: Hub, repository: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(repository / "model.safetensors")
    hub.folder = tmp_path / "legacy"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_bytes((repository / "config.json").read_bytes())
    halves = [{name: tensor for name, tensor in tensors.items() if ("layers.1." in name) == inside} for inside in (True, False)]
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for half, name in zip(halves, names, strict=True):
        torch.save(half, hub.folder / name)
    weight_map = {tensor: name for half, name in zip(halves, names, strict=True) for tensor in half}
    (hub.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert hub.run(tmp_path / "home", load(1, 2)).stdout.strip() == expected(repository, 1, 2) == expected(hub.folder, 1, 2)
    assert set(hub.sent) - {"config.json", "pytorch_model.bin.index.json"} == {names[0]}
    spans = [hub.run(tmp_path / "home", SPAN.format(model=model)).stdout for model in ("org/tiny", str(hub.folder), str(repository))]
    assert len(set(spans)) == 1 and spans[0], "digests do not depend on the format"


def test_files_are_cut_by_layer(tmp_path: Path) -> None:
    names = [
        "model.layers.0.a",
        "model.layers.0.b.1.c",
        "model.layers.10.a",
        "model.embed",
        "model.norm",
        "model.layers.0.late",
        "lm_head.w",
    ]
    places = {name: Place("F32", (2,), 100 + 8 * place, 108 + 8 * place) for place, name in enumerate(names)}
    found = segments(dict(reversed(places.items())), "k")
    assert [(found[name].start, found[name].end) for name in names] == [
        *((100, 116), (100, 116), (116, 124), (124, 132), (132, 140), (140, 148), (148, 156)),
    ]  # fmt: skip
    assert found["model.layers.10.a"].key == "k-116-124"


@pytest.mark.long
def test_an_adapter_from_the_hub(sharded_hub: Hub, saved: Callable[[str], Path], tmp_path: Path) -> None:
    save_adapter(saved("llama"), sharded_hub.folder, "llama")
    code = f"""
import sys
from petalnet.models.adapters import AdapterSource
from petalnet.models.checkpoint import ModelSource
adapter = AdapterSource.open("org/tiny", ModelSource.open({str(saved("llama"))!r}))
print(adapter.label.partition("@")[0], len(adapter.load(1, 2)[1]), "peft" in sys.modules)
"""
    done = sharded_hub.run(tmp_path / "home", code)
    assert done.stdout.split() == ["org/tiny", "4", "False"], done.stderr
    assert sharded_hub.fetched == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.long
def test_a_model_of_size_costs_five_percent_at_most(tmp_path: Path) -> None:
    """Half of the blocks of a model of 96 MB, all of it counted: headers, samples, small files."""
    folder = tmp_path / "repository"
    config = transformers.AutoConfig.for_model("llama", vocab_size=4000, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with serving(folder) as hub:
        started = time.monotonic()
        done = hub.run(tmp_path / "home", SPAN.format(model="org/tiny"))
        assert done.returncode == 0, done.stderr
        ratio = sum(hub.sent.values()) / block_bytes(folder, 1, 5)
        print(f"bytes read over the span's own: {ratio:.4f}, in {time.monotonic() - started:.1f} s")
        assert ratio <= 1.05
