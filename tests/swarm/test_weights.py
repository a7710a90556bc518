"""A model that one node has on its disk: others get its blocks from that node and from each other, whoever lies or dies meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import LlamaConfig, LlamaForCausalLM

from petalnet.errors import PetalnetError
from petalnet.models.anatomy import partition
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import empty_model
from petalnet.models.manifest import CHUNK_BYTES, Manifest, describe_block, make_manifest
from petalnet.p2p.host import Host, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import WEIGHTS
from petalnet.p2p.weight_messages import ChunksHeld, WhichChunks, indices_of
from petalnet.peering import Peering, open_peering
from petalnet.routing.records import ServerRecord
from petalnet.sharing import Sharing

from .conftest import NodeProcess, Nodes
from .models import VOCABULARY, connected, ids, load_local

pytestmark = pytest.mark.long

BLOCKS = 6
OPTIONS = ("--dtype", "float32", "--throughput", "100", "--attn-cache-tokens", "4096")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 6 blocks of 11 MiB, three chunks each."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=4,
        num_hidden_layers=BLOCKS, max_position_embeddings=512, initializer_range=0.05, tie_word_embeddings=False, pad_token_id=3,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    made.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("spread-model")
    made.save_pretrained(folder)
    return folder


def home(nodes: Nodes, name: str) -> dict[str, str]:
    """The environment of a node on a machine of its own."""
    return {"PETALNET_STATE_DIR": str(nodes.folder / name / "state"), "PETALNET_CACHE_DIR": str(nodes.folder / name / "cache")}


def weights_of(nodes: Nodes, name: str) -> dict[str, Any]:
    """What `petalnet peers --json` says of the weights of the node there."""
    command = [sys.executable, "-m", "petalnet", "peers", "--json"]
    done = subprocess.run(command, env=nodes.environment() | home(nodes, name), capture_output=True, text=True, check=True)
    (node,) = json.loads(done.stdout)["nodes"]
    return dict(node["weights"])


class Liar(Sharing):
    """Says that it has what it has not."""

    async def _chunk(self, shared, index, digest):  # type: ignore[no-untyped-def]
        start, end = shared.entry.chunk_range(index)
        return bytes(end - start)


@asynccontextmanager
async def lying_server(folder: Path, key: str, peers: list[str]) -> AsyncIterator[Peering]:
    """A server that announces all blocks and sends zeros."""
    source = ModelSource.open(folder)
    parts = partition(empty_model(source), source.tensor_names())
    async with open_peering(Identity.generate(), initial_peers=peers, listen=["/ip4/127.0.0.1/tcp/0"], server=True) as peering:
        sharing = Liar(peering.host)
        sharing.open()
        entries = []
        for index in range(BLOCKS):
            entry, payload = describe_block(source, parts, index)
            sharing.share(replace(entry, chunks=payload.chunks(CHUNK_BYTES)), payload)
            entries.append(entry)
        now = time.time()
        record = ServerRecord(
            peer_id=peering.host.peer_id, addrs=tuple(peering.host.plain_addrs), model=key, model_name=folder.name, span=(0, BLOCKS),
            num_blocks=BLOCKS, state="joining", dtype="float32", sequence=int(now * 1000), issued=now, expires=now + 300, shares=True,
            block_digests=tuple(entry.digest for entry in entries),
        )  # fmt: skip
        await peering.announce(record)
        yield peering


async def held_by(host: Host, node: Mapping[str, Any], manifest: Manifest) -> set[tuple[int, int]]:
    """(block, chunk) that a node gives to others now."""
    names = tuple(bytes.fromhex(block.digest)[:16] for block in manifest.blocks)
    try:
        async with await host.open_stream(node["peer_id"], WEIGHTS, addrs=node["addrs"], timeout_s=2) as stream:
            await stream.send(WhichChunks(names))
            answer = await stream.receive()
    except PetalnetError:
        return set()  # it is not there yet
    if not isinstance(answer, ChunksHeld):
        return set()
    found = set()
    for number, (block, digest, bits) in enumerate(zip(manifest.blocks, answer.lists, answer.held, strict=True)):
        if digest:
            found |= {(number, index) for index in (indices_of(bits) if bits else range(block.num_chunks))}
    return found


def newcomer(nodes: Nodes, name: str, *arguments: object) -> tuple[NodeProcess, dict[str, Any]]:
    """A node without a model on a machine of its own, and where it is reached while it loads."""
    key, port = nodes.folder / f"{name}.key", free_port()
    addr = f"/ip4/127.0.0.1/tcp/{port}"
    peer_id = Identity.load_or_create(key).peer_id
    options = ("--identity-path", key, "--host-maddrs", addr, *OPTIONS, *arguments)
    return nodes.launch("--serve", BLOCKS, *options, environment=home(nodes, name)), {"peer_id": peer_id, "addrs": [addr]}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_two_get_the_model_of_one_from_it_and_from_each_other_past_a_liar_and_its_death(nodes: Nodes, model: Path) -> None:
    manifest = make_manifest(ModelSource.open(model))
    sharing = ("--share-weights", "yes", "--max-upload-rate", "10MB")
    seeder = nodes.launch(model, "--serve", "0:1", "--new-swarm", *OPTIONS, *sharing, environment=home(nodes, "seeder"))
    await trio.to_thread.run_sync(seeder.wait_ready)
    async with lying_server(model, manifest.model_key, seeder.addrs), open_host(Identity.generate()) as watcher:
        started = [newcomer(nodes, name, "--initial-peers", *seeder.addrs) for name in ("left", "right")]
        chunks = {(number, index) for number, block in enumerate(manifest.blocks) for index in range(block.num_chunks)}
        with trio.fail_after(90):
            while True:
                held = [await held_by(watcher, place, manifest) for _, place in started]
                if held[0] | held[1] == chunks:
                    break
                await trio.sleep(0.1)
        served = await trio.to_thread.run_sync(weights_of, nodes, "seeder")
        seeder.kill()
        lacking = [len(chunks - one) for one in held]
        assert max(lacking) > 0, "the only source dies in the middle"
        for node, _ in started:
            await trio.to_thread.run_sync(node.wait_ready)
        reports = [await trio.to_thread.run_sync(weights_of, nodes, name) for name in ("left", "right")]

    size = sum(block.nbytes for block in manifest.blocks)
    print(f"{size=} seeder {served['bytes_served']}; left, right: {reports}; lacked chunks when it died: {lacking}")
    assert served["bytes_served"] < 1.9 * size, "it gave less than the two of them took"
    assert sum(report["bytes_served"] for report in reports) >= sum(lacking) * CHUNK_BYTES / 2
    assert sum("is not asked for weights any more" in node.log() for node, _ in started) == 2
    tokens = ids(1, 8, seed=1)
    expected = load_local(model).generate(tokens, max_new_tokens=12, do_sample=False)

    def generate() -> torch.Tensor:
        with connected(model, started[0][0].addrs) as remote:
            return remote.generate(tokens, max_new_tokens=12, do_sample=False)

    assert torch.equal(await trio.to_thread.run_sync(generate), expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 30 MB; None where none can be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_told_in_one_line_and_nothing_is_left(nodes: Nodes, model: Path, small_disk: Path | None) -> None:
    seeder = nodes.launch(model, "--serve", "0:1", "--new-swarm", *OPTIONS, "--share-weights", "yes", environment=home(nodes, "seeder"))
    peers = ("--initial-peers", *seeder.wait_ready().addrs)
    places = {"--max-disk-space": home(nodes, "bound")}
    if small_disk is not None:
        places["is full"] = home(nodes, "disk") | {"PETALNET_CACHE_DIR": str(small_disk)}
    started = {}
    for reason, place in places.items():
        limits = () if reason == "is full" else ("--max-disk-space", "30MB")
        started[reason] = nodes.launch("--serve", BLOCKS, *peers, *OPTIONS, *limits, environment=place)
    for reason, node in started.items():
        assert node.process.wait(60) == 2
        errors = [line for line in node.log().splitlines() if line.startswith("petalnet: ")]
        assert len(errors) == 1 and reason in errors[0] and "Traceback" not in node.log(), node.log()
        cache = Path(places[reason]["PETALNET_CACHE_DIR"])
        assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]
