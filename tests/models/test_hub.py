"""Models from a hub repository: the real huggingface_hub and a small hub on loopback. No more bytes are fetched than are needed."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file

from petalnet.errors import ModelError, UsageError
from petalnet.models.anatomy import partition
from petalnet.models.checkpoint import ModelSource
from petalnet.models.files import FolderFiles, LocalTensor, Place
from petalnet.models.filling import Filling
from petalnet.models.hub import HubFiles, segments
from petalnet.models.identity import block_digests, empty_model, model_key
from petalnet.models.manifest import MANIFEST_FILE, make_manifest, require_listed
from tests.models.hub_server import COMMIT, REPOSITORY, Hub, is_weights, serving
from tests.peft_adapters import save_adapter

BLOCKS = 6


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 MB in one file, of which a block takes 0.9 MB and the embeddings, like the head, 1 MB."""
    folder = tmp_path_factory.mktemp("repository")
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=1600, hidden_size=160, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=BLOCKS, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(repository) as server:
        server.be_the_hub(monkeypatch, tmp_path / "home")
        yield server
    huggingface_hub.close_session()


def block_bytes(folder: Path, first: int, end: int) -> int:
    """What the tensors of blocks [first, end) take."""
    return sum(info.nbytes for name, info in FolderFiles(folder).tensors().items() if in_blocks(name, first, end))


def in_blocks(name: str, first: int, end: int) -> bool:
    return any(f"layers.{block}." in name for block in range(first, end))


def load(model: str | Path, first: int, end: int, **arguments: Any) -> dict[str, bytes]:
    """The bytes of the tensors of blocks [first, end), as a program reads them that has just started."""
    source = ModelSource.open(model, **arguments)
    tensors = source.read(name for name in source.tensor_names() if in_blocks(name, first, end))
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def identity(model: str | Path, first: int, end: int) -> tuple[str, ...]:
    """The key of a model, and the digests of blocks [first, end)."""
    source = ModelSource.open(model)
    parts = partition(empty_model(source), source.tensor_names())
    return model_key(source), *block_digests(source, parts, first, end)


def test_blocks_cost_hardly_more_bytes_than_their_own(hub: Hub) -> None:
    found = identity(REPOSITORY, 1, 5)
    own, read = block_bytes(hub.folder, 1, 5), hub.weights_sent
    samples = 2 * 65536 + 160 * 4  # of the embeddings, of the head, and the final norm
    header = int.from_bytes((hub.folder / "model.safetensors").read_bytes()[:8], "little") + 8
    print(f"bytes read from the hub over the blocks' own: {read / own:.3f}")
    assert read == own + samples + header
    assert read / own <= 1.05
    hub.forget()
    assert identity(REPOSITORY, 1, 5) == found
    assert hub.weights_sent == 0 and not hub.fetched, "all of it is in the cache by now"
    assert identity(hub.folder, 1, 5) == found, "it is the same model as in a folder"


def test_of_several_files_only_those_are_opened_that_hold_something(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.folder = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(repository).save_pretrained(hub.folder, max_shard_size="1100KB")
    assert load(REPOSITORY, 1, 2) == load(repository, 1, 2)
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())
    needed = {file for name, file in index["weight_map"].items() if in_blocks(name, 1, 2)}
    assert {name for name in hub.sent if is_weights(name)} == needed and 0 < len(needed) < len(list(hub.folder.glob("*.safetensors")))


def test_a_connection_that_breaks_is_opened_where_it_broke(hub: Hub) -> None:
    hub.manners.break_after = 300_000
    assert load(REPOSITORY, 1, 3) == load(hub.folder, 1, 3)
    assert hub.weights_sent < block_bytes(hub.folder, 1, 3) * 1.02, "nothing was sent twice"


def test_a_connection_that_always_breaks_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    ModelSource.open(REPOSITORY).tensor_names()
    hub.manners.break_after = 0
    with pytest.raises(ModelError, match="^model.safetensors of org/tiny cannot be fetched: .*$"):
        load(REPOSITORY, 1, 3)
    assert len(hub.fetched) < 20


def test_what_a_killed_process_fetched_is_not_fetched_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Filling.note

    def note_and_die(filling: Filling, start: int, end: int) -> None:
        note(filling, start, end)
        if end >= 400_000:
            raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr("petalnet.models.filling.NOTE_BYTES", 1)
        dying.setattr(Filling, "note", note_and_die)
        dying.setattr(Filling, "close", lambda filling: None)
        with pytest.raises(KeyboardInterrupt):
            load(REPOSITORY, 1, 3)
    hub.forget()
    assert load(REPOSITORY, 1, 3) == load(hub.folder, 1, 3)
    assert block_bytes(hub.folder, 1, 3) - 500_000 <= hub.weights_sent <= block_bytes(hub.folder, 1, 3) - 400_000


def test_several_at_once_fetch_everything_once(hub: Hub) -> None:
    wanted = load(hub.folder, 0, 5)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda first: load(REPOSITORY, first, first + 3), (0, 1, 2)))
    assert {name: content for part in found for name, content in part.items()} == wanted
    blocks = block_bytes(hub.folder, 0, 5)
    assert blocks <= hub.weights_sent <= blocks * 1.02


def test_the_bound_on_the_disk_holds_while_blocks_come_and_go(hub: Hub, cache_folder: Path) -> None:
    most = int(2.5 * block_bytes(hub.folder, 0, 1))
    for first in (0, 2, 4):
        assert load(REPOSITORY, first, first + 2, max_disk_space=most) == load(hub.folder, first, first + 2)
        assert sum(file.stat().st_size for file in (cache_folder / "petalnet-weights").iterdir()) <= most
    hub.forget()
    load(REPOSITORY, 4, 6, max_disk_space=most)
    assert hub.weights_sent == 0
    with pytest.raises(UsageError, match=r"^--max-disk-space: what is to be loaded takes .* raise it, or serve fewer blocks$"):
        load(REPOSITORY, 0, 3, max_disk_space=most)
    assert hub.weights_sent == 0, "nothing is fetched that has no room in the end"


def test_a_disk_that_is_full_in_the_middle_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Filling.note

    def no_space(filling: Filling, start: int, end: int) -> None:
        if hub.weights_sent > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        note(filling, start, end)

    monkeypatch.setattr(Filling, "note", no_space)
    with pytest.raises(
        UsageError, match="^the disk that .* is on is full. Free some, or set PETALNET_CACHE_DIR to a folder on another disk$"
    ):
        load(REPOSITORY, 1, 3)


def test_a_disk_that_takes_only_a_part_of_what_is_written(hub: Hub, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NearlyFull(io.FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(memoryview(data)[:1000])

    whole = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return NearlyFull(path, "r+") if mode == "r+b" else whole(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert load(REPOSITORY, 1, 2) == load(repository, 1, 2)


def test_what_other_nodes_remove_meanwhile_is_fetched_again(hub: Hub, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource.open(REPOSITORY)
    names = [name for name in source.tensor_names() if in_blocks(name, 1, 2)]
    local, calls = HubFiles.local, []

    def local_and_gone(files: HubFiles, wanted: Collection[str]) -> Mapping[str, LocalTensor]:
        found = local(files, wanted)
        if not calls:
            calls.append(found)
            next(iter(found.values())).path.unlink()
        return found

    monkeypatch.setattr(HubFiles, "local", local_and_gone)
    assert {name: tensor.numpy().tobytes() for name, tensor in source.read(names).items()} == load(hub.folder, 1, 2)


def test_without_the_hub_what_was_fetched_still_loads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = identity(REPOSITORY, 1, 5)
    hub.manners.down = True
    assert identity(REPOSITORY, 1, 5) == found
    assert ModelSource.open(REPOSITORY).file("generation_config.json") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert identity(REPOSITORY, 1, 5) == found
    line = "the hub cannot be reached to fetch model.safetensors of org/tiny, and not all of it is on this machine: .*offline"
    with pytest.raises(ModelError, match=line):
        load(REPOSITORY, 0, 1)


def test_a_file_that_the_hubs_own_cache_has_whole_is_used(hub: Hub) -> None:
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download(REPOSITORY, name)
    hub.forget()
    assert load(REPOSITORY, 2, 4) == load(hub.folder, 2, 4)
    assert identity(REPOSITORY, 1, 2) == identity(hub.folder, 1, 2)
    assert hub.weights_sent == 0


@pytest.mark.parametrize("manners", [{"shift": 8}, {"leave_out": frozenset(["Content-Range"])}, {"longer": 5}])
def test_a_hub_that_answers_with_another_range_is_named(manners: dict[str, Any], hub: Hub) -> None:
    for name, value in manners.items():
        setattr(hub.manners, name, value)
    with pytest.raises(ModelError, match="^(the hub was asked for bytes 0 to 7 of|the hub sends more of model.safetensors).*$"):
        load(REPOSITORY, 1, 3)


def test_of_a_hub_that_knows_no_ranges_the_whole_file_is_taken(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.manners.ignore_ranges = True
    assert load(REPOSITORY, 1, 3) == load(hub.folder, 1, 3)
    assert "the hub does not send parts of files" in caplog.text
    hub.forget()
    assert load(REPOSITORY, 3, 5) == load(hub.folder, 3, 5)
    assert hub.weights_sent == 0


def test_a_hub_that_stops_sending_ranges_in_the_middle(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    source = ModelSource.open(REPOSITORY)
    names = [name for name in source.tensor_names() if in_blocks(name, 1, 3)]
    hub.manners.ignore_ranges = True
    assert (
        source.files.sample({"lm_head.weight": [(8, 16)]})["lm_head.weight"]
        == load_file(hub.folder / "model.safetensors")["lm_head.weight"].numpy().tobytes()[8:16]
    )
    assert {name: tensor.numpy().tobytes() for name, tensor in source.read(names).items()} == load(hub.folder, 1, 3)
    assert caplog.text.count("the hub does not send parts of files") == 1


@pytest.mark.parametrize("header", ["ETag", "Content-Length"])
def test_a_hub_that_does_not_tell_what_a_file_is(header: str, hub: Hub) -> None:
    huggingface_hub.hf_hub_download(REPOSITORY, "config.json")
    hub.manners.leave_out = frozenset([header])
    with pytest.raises(ModelError, match="^the hub does not tell how large model.safetensors of org/tiny is, or which version"):
        load(REPOSITORY, 1, 3, revision=COMMIT)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\xff" * 8, "its header is longer than the file"),
        ((62).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "lies outside of the file"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a table"),
        (b"", "unpack requires a buffer of 8 bytes"),
    ],
)
def test_damaged_files_on_the_hub_are_named(header: bytes, reason: str, hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.folder = copy_of_config(repository, tmp_path / "damaged")
    (hub.folder / "model.safetensors").write_bytes(header)
    with pytest.raises(ModelError, match=rf"^model.safetensors of org/tiny is not a safetensors file: .*{reason}"):
        load(REPOSITORY, 1, 3)


def copy_of_config(repository: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((repository / "config.json").read_bytes())
    return folder


def test_gated_private_and_missing_repositories_are_one_clear_line(hub: Hub) -> None:
    hub.manners.gated = True
    with pytest.raises(ModelError, match="^org/tiny is gated: accept its terms on the hub and log in, or pass a token$"):
        load(REPOSITORY, 1, 3)
    hub.manners.gated, hub.manners.token = False, "hf_secret"
    for name, arguments in (("tiny", {}), ("other", {"token": "hf_secret"})):
        private = rf"^there is no folder org/{name} and no such hub repository \(or it is private: pass a token\)$"
        with pytest.raises(ModelError, match=private):
            load(f"org/{name}", 1, 3, **arguments)
    with pytest.raises(ModelError, match="^org/tiny has no revision nowhere$"):
        load(REPOSITORY, 1, 3, revision="nowhere", token="hf_secret")
    assert load(REPOSITORY, 1, 3, token="hf_secret")


def test_weights_that_are_gated_though_the_configuration_is_not(hub: Hub) -> None:
    huggingface_hub.hf_hub_download(REPOSITORY, "config.json")
    hub.manners.gated = True
    with pytest.raises(ModelError, match="^org/tiny is gated"):
        load(REPOSITORY, 1, 3)


def test_a_busy_hub_and_one_that_sends_elsewhere(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.manners.redirect, hub.manners.token, hub.manners.statuses = True, "hf_secret", [503, 429]
    assert load(REPOSITORY, 1, 3, token="hf_secret") == load(hub.folder, 1, 3)


def test_a_file_that_is_not_there(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.folder = copy_of_config(repository, tmp_path / "empty")
    with pytest.raises(ModelError, match=r"^org/tiny has no weights \(model.safetensors or model.safetensors.index.json\)$"):
        load(REPOSITORY, 1, 3)
    hub.folder = copy_of_config(repository, tmp_path / "lacking")
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.layers.1.a": "one.safetensors"}}))
    with pytest.raises(ModelError, match=r"^org/tiny lacks the file one.safetensors, which should hold some of its tensors$"):
        load(REPOSITORY, 1, 3, revision=COMMIT)


def test_a_file_that_disappears(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.folder = shutil.copytree(repository, tmp_path / "moved")
    source = ModelSource.open(REPOSITORY)
    assert "lm_head.weight" in source.tensor_names()
    (hub.folder / "model.safetensors").unlink()
    for use in (lambda: source.read(["lm_head.weight"]), lambda: model_key(source)):
        with pytest.raises(ModelError, match="^org/tiny lacks the file model.safetensors$"):
            use()


def test_what_turns_out_damaged_is_fetched_anew(hub: Hub) -> None:
    source = ModelSource.open(REPOSITORY)
    names = [name for name in source.tensor_names() if in_blocks(name, 1, 2)]
    place = next(iter(source.local(names).values()))
    place.path.write_bytes(b"x" * place.path.stat().st_size)
    assert load(REPOSITORY, 1, 2) != load(hub.folder, 1, 2)
    source.files.forget(names)
    assert load(REPOSITORY, 1, 2) == load(hub.folder, 1, 2)


def test_blocks_have_to_be_those_of_the_manifest(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.folder = shutil.copytree(repository, tmp_path / "listed")
    require_listed(ModelSource.open(hub.folder), model_key(ModelSource.open(hub.folder)), 0, ["no manifest, no rules"])
    (hub.folder / MANIFEST_FILE).write_bytes(make_manifest(ModelSource.open(repository)).to_json())
    key, *digests = identity(REPOSITORY, 2, 4)
    require_listed(ModelSource.open(REPOSITORY), key, 2, digests)
    source = ModelSource.open(REPOSITORY)
    with pytest.raises(ModelError, match="^block 3 of org/tiny is not what its manifest .* says: start again to fetch it anew$"):
        require_listed(source, key, 2, [digests[0], "0" * 64])
    hub.forget()
    load(REPOSITORY, 2, 4)
    assert hub.weights_sent == block_bytes(hub.folder, 3, 4), "what was fetched of it is gone"
    with pytest.raises(
        ModelError, match="^block 2 of listed is not what its manifest .* says: the files are damaged, or were changed since"
    ):
        require_listed(ModelSource.open(hub.folder), key, 2, ["0" * 64])
    with pytest.raises(ModelError, match="is that of another model: remove it, or make it anew"):
        require_listed(ModelSource.open(hub.folder), "0" * 64, 2, digests)


def test_a_legacy_checkpoint_is_the_same_model(hub: Hub, repository: Path, tmp_path: Path) -> None:
    tensors = load_file(repository / "model.safetensors")
    hub.folder = copy_of_config(repository, tmp_path / "legacy")
    halves = [{name: tensor for name, tensor in tensors.items() if in_blocks(name, 1, 2) == inside} for inside in (True, False)]
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for half, name in zip(halves, names, strict=True):
        torch.save(half, hub.folder / name)
    weight_map = {tensor: name for half, name in zip(halves, names, strict=True) for tensor in half}
    (hub.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load(REPOSITORY, 1, 2) == load(hub.folder, 1, 2) == load(repository, 1, 2)
    assert {name for name in hub.sent if is_weights(name)} == {names[0]}
    assert identity(REPOSITORY, 0, 6) == identity(hub.folder, 0, 6) == identity(repository, 0, 6), "whatever the format"
    hub.forget()
    load(REPOSITORY, 0, 6)
    assert hub.weights_sent == 0


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


class Terminal(io.StringIO):
    """A standard error that somebody looks at, or nobody."""

    def __init__(self, looked_at: bool) -> None:
        super().__init__()
        self.looked_at = looked_at

    def isatty(self) -> bool:
        return self.looked_at


@pytest.mark.parametrize(("looked_at", "silenced"), [(True, False), (True, True), (False, False)])
def test_progress_is_shown_on_terminals_only(hub: Hub, monkeypatch: pytest.MonkeyPatch, looked_at: bool, silenced: bool) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(looked_at))
    huggingface_hub.utils.enable_progress_bars()
    with huggingface_hub.utils.disable_progress_bars() if silenced else nullcontext():
        load(REPOSITORY, 1, 3)
    shown = sys.stderr.getvalue()
    assert ("org/tiny: 100%" in shown) == (looked_at and not silenced), shown
    assert looked_at or not shown


@pytest.mark.long
def test_an_adapter_from_the_hub(hub: Hub, saved: Callable[[str], Path], tmp_path: Path) -> None:
    hub.folder = tmp_path / "adapter"
    save_adapter(saved("llama"), hub.folder, "llama")
    code = f"""
import sys
from petalnet.models.adapters import AdapterSource
from petalnet.models.checkpoint import ModelSource
adapter = AdapterSource.open("org/tiny", ModelSource.open({str(saved("llama"))!r}))
print(adapter.label.partition("@")[0], len(adapter.load(1, 2)[1]), "peft" in sys.modules)
"""
    done = hub.run(tmp_path / "home", code)
    assert done.stdout.split() == ["org/tiny", "4", "False"], done.stderr
    assert hub.fetched == ["adapter_config.json", "adapter_model.safetensors"]


SPAN = """
import sys
from petalnet.blocks.span import Span
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import model_key
source = ModelSource.open(sys.argv[1])
print(model_key(source), *Span.load(source, 1, 5).digests)
"""


@pytest.mark.long
def test_processes_at_once_and_all_that_they_read(hub: Hub, tmp_path: Path) -> None:
    """Two servers of four blocks of a model of 83 MB start together: all that the hub sent, small files too, over the blocks' own bytes."""
    config = transformers.AutoConfig.for_model("llama", vocab_size=4000, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    hub.folder = tmp_path / "larger"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(hub.folder)
    command, environment = [sys.executable, "-c", SPAN, REPOSITORY], hub.environment(tmp_path / "other_home")
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    ratio = sum(hub.sent.values()) / block_bytes(hub.folder, 1, 5)
    print(f"bytes that the hub sent over the blocks' own: {ratio:.4f}")
    assert answers == {" ".join(identity(hub.folder, 1, 5)) + "\n"}
    assert ratio <= 1.05
