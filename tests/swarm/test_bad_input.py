"""Wrong use of real node processes: one clear line, the right exit status, and a running node that bears whatever strangers send."""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from petalnet.models.checkpoint import DEMO_MODEL
from petalnet.p2p.identity import Identity

MODEL = Path(DEMO_MODEL)
PEER_ID = "12D3KooWRyoDGGEaWkXLRD5VMkEaMrxCqNQw9fbWxwVa9R3oWBVy"
LISTEN = ["--host-maddrs", "/ip4/127.0.0.1/tcp/0"]


def fails(nodes, *arguments: object, status: int) -> str:
    """What `petalnet node …` says on standard error where it must end with this status."""
    done = subprocess.run(
        [sys.executable, "-m", "petalnet", "node", *map(str, arguments), "--log-level", "error"],
        env=nodes.environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("petalnet: "), done.stderr
    assert not done.stdout
    return done.stderr


def unreachable_peer() -> str:
    """A multiaddr at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}/p2p/{Identity.generate().peer_id}"


def test_a_folder_without_a_config(nodes, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in fails(nodes, empty, "--serve", "0:1", "--new-swarm", *LISTEN, status=2)
    assert str(tmp_path / "nowhere") in fails(nodes, tmp_path / "nowhere", "--serve", "0:1", "--new-swarm", *LISTEN, status=2)


def test_a_span_out_of_range(nodes) -> None:
    said = fails(nodes, MODEL, "--serve", "8:13", "--new-swarm", *LISTEN, status=2)
    assert "8:13" in said and "12 blocks" in said
    assert "12 blocks" in fails(nodes, MODEL, "--serve", "13", "--new-swarm", *LISTEN, status=2)


def test_missing_weights(nodes, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(MODEL, damaged)
    (damaged / "model.safetensors").unlink()
    assert "weights" in fails(nodes, damaged, "--serve", "0:2", "--new-swarm", *LISTEN, status=2)
    (damaged / "model.safetensors").write_bytes(b"\xff" * 1000)
    assert "safetensors" in fails(nodes, damaged, "--serve", "0:2", "--new-swarm", *LISTEN, status=2)


def test_a_busy_port(nodes) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in fails(nodes, "--bootstrap", "--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}", status=2)
        said = fails(nodes, "--bootstrap", "--http", f"127.0.0.1:{port}", *LISTEN, status=2)
        assert "--http" in said and str(port) in said


@pytest.mark.parametrize("rubbish", ["rubbish", "/ip4/127.0.0.1/tcp/1", f"/ip4/300.0.0.1/tcp/1/p2p/{PEER_ID}", "@/no/such/file"])
def test_a_peer_list_of_rubbish(nodes, rubbish: str) -> None:
    said = fails(nodes, "--bootstrap", *LISTEN, "--initial-peers", rubbish, status=2)
    assert rubbish.removeprefix("@") in said


def test_an_unreachable_bootstrap(nodes) -> None:
    peer = unreachable_peer()
    assert peer in fails(nodes, MODEL, "--serve", "0:3", "--initial-peers", peer, *LISTEN, status=1)
    assert peer in fails(nodes, "--client", "--initial-peers", peer, *LISTEN, status=1)


def test_a_client_without_a_swarm(nodes) -> None:
    assert "--initial-peers" in fails(nodes, "--client", *LISTEN, status=2)


def test_a_spoilt_identity(nodes, tmp_path: Path) -> None:
    key = tmp_path / "spoilt.key"
    key.write_text("rubbish")
    assert str(key) in fails(nodes, "--bootstrap", *LISTEN, "--identity-path", key, status=2)


def test_a_ready_file_that_cannot_be_written(nodes, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "ready.json" in fails(nodes, "--bootstrap", *LISTEN, "--ready-file", tmp_path / "file" / "ready.json", status=2)


def test_a_swarm_without_a_model(nodes) -> None:
    bootstrap = nodes.start("--bootstrap")
    assert "MODEL" in fails(nodes, "--serve", "0:3", "--initial-peers", *bootstrap.addrs, *LISTEN, status=2)


def test_a_second_signal_ends_at_once(nodes) -> None:
    node = nodes.launch(MODEL, "--serve", "0:2", "--new-swarm")
    node.process.send_signal(signal.SIGTERM)  # in the middle of the start
    assert node.process.wait(20) in (0, -signal.SIGTERM)
    assert not node.ready_file.exists()


async def test_random_bytes_on_every_protocol(nodes, find_record) -> None:
    """A node that serves blocks gets garbage on the raw socket and on each of its protocols; it lives on and serves others."""
    from petalnet.p2p.host import open_host
    from petalnet.p2p.pass_messages import Forward, ForwardDone
    from petalnet.p2p.protocols import FORWARD
    from petalnet.p2p.tensors import encode_tensor

    options = ["--serve", "0:2", "--new-swarm", "--dtype", "float32", "--throughput", "9"]
    node = await trio.to_thread.run_sync(nodes.start, MODEL, *options)
    port = int(node.addrs[0].split("/")[4])
    for size in (1, 100, 100_000):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            try:
                await stream.send_all(secrets.token_bytes(size))
            except trio.BrokenResourceError:
                continue

    async with open_host(Identity.generate()) as stranger:
        await stranger.connect(node.peer_id, node.addrs)
        await send_garbage(stranger, node.peer_id)

    assert node.process.poll() is None, node.log()
    import torch

    async with open_host(Identity.generate()) as friend:
        record = await find_record(friend, node.peer_id, node.addrs)
        async with await friend.open_stream(node.peer_id, FORWARD, addrs=node.addrs) as stream:
            await stream.send(Forward(record.model, 0, 2, encode_tensor(torch.randn(1, 3, 160))))
            answer = await stream.receive()
            assert isinstance(answer, ForwardDone) and answer.output.shape == (1, 3, 160)
    assert "Traceback" not in node.log()


async def send_garbage(stranger, peer_id: str) -> None:
    """Random bytes, and a valid frame prefix with random contents, on each protocol that a node may know."""
    from libp2p.custom_types import TProtocol
    from libp2p.exceptions import BaseLibp2pError
    from libp2p.peer.id import ID

    from petalnet.errors import PetalnetError
    from petalnet.p2p.frames import encode_frame
    from petalnet.p2p.protocols import PROTOCOLS

    names = [protocol.id for protocol in PROTOCOLS]
    names += ["/ipfs/kad/1.0.0", "/meshsub/1.0.0"]
    names += ["/meshsub/1.1.0", "/meshsub/1.2.0", "/floodsub/1.0.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"]
    refused = 0
    for name in names:
        frame = b"".join(encode_frame(secrets.token_bytes(200)))
        for garbage in (secrets.token_bytes(5), secrets.token_bytes(60_000), frame, b"\xff" * 300):
            with trio.fail_after(10):
                try:
                    raw = await stranger.libp2p.new_stream(ID.from_string(peer_id), [TProtocol(name)])
                    await raw.write(garbage)
                    await raw.close()
                except (BaseLibp2pError, PetalnetError, OSError):
                    refused += 1
    assert refused < 4 * len(names)  # some of it arrived
