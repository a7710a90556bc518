"""Where a server's weights come from and to whom they go: the hub and peers of one model, real connections, no blocks loaded."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import trio

from petalnet import fetching, sharing, supply
from petalnet.config import Settings
from petalnet.errors import ModelError
from petalnet.manifests import best_manifest, find_manifest
from petalnet.models.anatomy import partition
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import block_digests, empty_model, model_key
from petalnet.models.manifest import MANIFEST_FILE, Manifest, make_manifest
from petalnet.models.swarm_files import SwarmFiles
from petalnet.p2p.host import Host, open_host
from petalnet.p2p.identity import Identity
from petalnet.routing.records import ServerRecord
from petalnet.supply import Supply
from tests.models.hub_server import REPOSITORY, Hub, serving
from tests.weights import Membership

BLOCKS = 4


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("repository"), seed=0)


def save(folder: Path, seed: int) -> Path:
    """A model; its client part is the same for all seeds, its blocks are not."""
    sizes: dict[str, Any] = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("llama", **sizes, num_hidden_layers=BLOCKS, num_key_value_heads=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(seed)
    for parameter in model.model.layers.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("PETALNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(supply, "HUB_INSTEAD_S", 4.0)  # for a machine that does much else
    monkeypatch.setattr(supply, "HUB_INSTEAD_BYTES_S", 1e3)
    monkeypatch.setattr(fetching, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(sharing, "MANIFEST_RETRY_S", 0.1)
    with serving(repository) as server:
        server.be_the_hub(monkeypatch, tmp_path / "home")
        yield server
    huggingface_hub.close_session()


async def run_host(*, task_status: trio.TaskStatus[Host]) -> None:
    async with open_host(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as host:
        task_status.started(host)
        await trio.sleep_forever()


class Swarm:
    """Servers that know each other, without the rest of a node."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._records: list[ServerRecord] = []
        self._memberships: list[Membership] = []

    async def start(self, source: ModelSource, *, key: str | None = None, **options: Any) -> Supply:
        """A server of a model that has not loaded anything yet."""
        membership = Membership(await self._nursery.start(run_host))
        made = Supply(Settings(**options), membership, source, key or model_key(source))  # type: ignore[arg-type]
        await made.open()
        self._memberships.append(membership)
        for record in self._records:
            membership.view.add(record, now=time.time())
        return made

    def online(self, made: Supply, digests: list[str]) -> None:
        """A server has its blocks, all of them."""
        host, now = made._peering.host, time.time()
        record = ServerRecord(
            peer_id=host.peer_id, addrs=tuple(host.plain_addrs), model=made._model, model_name="tiny", span=(0, BLOCKS), num_blocks=BLOCKS,
            state="online", dtype="float32", sequence=int(now * 1000), issued=now, expires=now + 600, shares=made.shares,
            block_digests=tuple(digests),
        )  # fmt: skip
        self._records.append(record)
        for membership in self._memberships:
            membership.view.add(record, now=now)


@asynccontextmanager
async def swarm() -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery)
        nursery.cancel_scope.cancel()


def digests_of(source: ModelSource) -> list[str]:
    parts = partition(empty_model(source), source.tensor_names())
    return block_digests(source, parts, 0, len(parts.blocks))


async def test_blocks_of_a_hub_model_come_from_peers_and_are_compared(hub: Hub, repository: Path) -> None:
    async with swarm() as others:
        seeder = await others.start(ModelSource.open(repository), share_weights="yes")
        await seeder.offer(0, 1)
        others.online(seeder, expected := digests_of(ModelSource.open(repository)))
        new = await others.start(source := ModelSource.open(REPOSITORY))
        assert new.shares
        hub.forget()
        with trio.fail_after(20):
            await new.bring(1, 3)
        assert hub.weights_sent < 2 * supply.WINDOWS * supply.WINDOW_BYTES + 4096, "samples alone come from the hub"
        assert digests_of(source)[1:3] == expected[1:3]
        assert new.describe()["bytes_fetched"] > 500_000 and new.describe()["blocks_shared"] == 2


async def test_blocks_that_are_not_the_hubs_come_from_the_hub(
    hub: Hub, repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = ModelSource.open(save(tmp_path / "other", seed=1))
    source = ModelSource.open(REPOSITORY)
    assert model_key(other) == model_key(source)
    async with swarm() as others:
        seeder = await others.start(other, share_weights="yes")
        await seeder.offer(0, 1)
        others.online(seeder, wrong := digests_of(other))
        new = await others.start(source)
        with trio.fail_after(20):
            await new.bring(0, 2)
        assert "is not the hub's" in caplog.text
        assert new.describe()["blocks_shared"] == 0
        found = digests_of(source)
        assert found == digests_of(ModelSource.open(repository)) and found != wrong


async def test_a_manifest_in_the_repository_holds_whatever_peers_announce(
    hub: Hub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ModelSource.open(repository)
    shutil.copytree(repository, tmp_path / "with")
    (tmp_path / "with" / MANIFEST_FILE).write_bytes(make_manifest(right).to_json())
    monkeypatch.setattr(hub, "folder", tmp_path / "with")
    other = ModelSource.open(save(tmp_path / "other", seed=1))
    async with swarm() as others:
        for source in (other, other, right):
            made = await others.start(source, share_weights="yes")
            await made.offer(0, 1)
            others.online(made, digests_of(source))
        new = await others.start(source := ModelSource.open(REPOSITORY))
        hub.forget()
        with trio.fail_after(20):
            await new.bring(0, BLOCKS)
        assert not hub.weights_sent
        assert digests_of(source) == digests_of(right)


async def test_what_is_here_from_the_hub_does_not_come_again_from_peers(hub: Hub, repository: Path) -> None:
    async with swarm() as others:
        seeder = await others.start(ModelSource.open(repository), share_weights="yes")
        await seeder.offer(0, 1)
        others.online(seeder, digests_of(ModelSource.open(repository)))
        source = ModelSource.open(REPOSITORY)
        source.local([name for name in source.tensor_names() if "layers.1." in name])
        new = await others.start(source)
        with trio.fail_after(20):
            await new.bring(1, 3)
        size = sum(source.info(name).nbytes for name in source.tensor_names() if "layers.2." in name)
        assert new.describe()["bytes_fetched"] == size, "block 2 alone comes from the peer"


async def test_what_once_came_from_peers_is_used_where_none_shares_any_more(hub: Hub, repository: Path) -> None:
    async with swarm() as others:
        seeder = await others.start(ModelSource.open(repository), share_weights="yes")
        await seeder.offer(0, 1)
        others.online(seeder, digests_of(ModelSource.open(repository)))
        await (await others.start(ModelSource.open(REPOSITORY))).bring(1, 3)
    async with swarm() as others:
        alone = await others.start(ModelSource.open(repository), share_weights="no")
        others.online(alone, digests_of(ModelSource.open(repository)))
        new = await others.start(source := ModelSource.open(REPOSITORY))
        hub.forget()
        with trio.fail_after(20):
            await new.bring(1, 3)
        source.local([name for name in source.tensor_names() if "layers.1." in name])
        assert hub.weights_sent < 2 * supply.WINDOWS * supply.WINDOW_BYTES + 4096


async def test_without_peers_that_share_nothing_is_waited_for(hub: Hub, repository: Path) -> None:
    async with swarm() as others:
        alone = await others.start(ModelSource.open(repository), share_weights="no")
        others.online(alone, digests_of(ModelSource.open(repository)))
        new = await others.start(ModelSource.open(REPOSITORY))
        with trio.fail_after(0.9 * supply.HUB_INSTEAD_S):
            await new.bring(0, 2)


@pytest.mark.parametrize(
    ("setting", "model", "expected"),
    [("auto", "folder", False), ("yes", "folder", True), ("no", "folder", False), ("auto", "hub", True), ("auto", "gated", False)],
)
async def test_what_is_shared_is_the_hosts_choice(hub: Hub, repository: Path, setting: str, model: str, expected: bool) -> None:
    source = ModelSource.open(repository if model == "folder" else REPOSITORY)
    hub.manners.gated = model == "gated"
    async with swarm() as others:
        assert (await others.start(source, key="k" * 64, share_weights=setting)).shares is expected


async def test_a_node_without_a_model_learns_what_it_is_made_of(hub: Hub, repository: Path, tmp_path: Path) -> None:
    right = ModelSource.open(repository)
    async with swarm() as others:
        seeder = await others.start(right, share_weights="yes")
        others.online(seeder, digests_of(right))
        asker = await others.start(right, share_weights="no")
        found: list[Manifest | None] = []

        async def ask() -> None:
            found.append(await find_manifest(asker._peering, model_key(right)))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)  # it is told to wait until the manifest is there
                nursery.start_soon(seeder.offer, 0, 1)
        (manifest,) = found
        assert manifest == make_manifest(right).without_chunks()
        files = SwarmFiles(manifest, tmp_path / "small")
        new = await others.start(source := ModelSource(manifest.name, files), key=manifest.model_key)
        assert new.shares, "what came from others is passed on"
        with trio.fail_after(20):
            await new.bring(1, 3)
        source.read(name for name in source.tensor_names() if "layers.1." in name)
        with trio.fail_after(20):
            await new.bring(3, 4, patience_s=0.0)  # as where nobody gives it
        with pytest.raises(ModelError, match="is not here"):
            source.read(name for name in source.tensor_names() if "layers.3." in name)
        assert await find_manifest(asker._peering, "n" * 64) is None


def test_of_several_manifests_the_one_that_fewest_servers_contradict(repository: Path, tmp_path: Path) -> None:
    made = make_manifest(ModelSource.open(repository))
    other = make_manifest(ModelSource.open(save(tmp_path / "other", seed=1)))
    now = time.time()
    records = [
        ServerRecord(
            peer_id=f"Peer{number}", addrs=(), model=made.model_key, model_name="tiny", span=(0, BLOCKS), num_blocks=BLOCKS, state="online",
            dtype="float32", sequence=1, issued=now, expires=now + 60, block_digests=tuple(block.digest for block in of.blocks),
        )
        for number, of in enumerate((made, made, other), 1)
    ]  # fmt: skip
    assert best_manifest([other, other, made], records) == made
    assert best_manifest([other], records) == other
    lying = replace(other, blocks=made.blocks[:2] + other.blocks[2:])
    assert best_manifest([lying, made], records) == made
    assert best_manifest([], records) is None
