"""What a person does with nodes: join by the printed line, look at the swarm, run a client daemon, stop, watch the demo."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import trio
from transformers import AutoModelForCausalLM, AutoTokenizer

from petalnet.cli.demo import PROMPT
from petalnet.models.checkpoint import DEMO_MODEL

MODEL = Path(DEMO_MODEL)


def petalnet(nodes, *arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "petalnet", *map(str, arguments)]
    return subprocess.run(command, env=nodes.environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout_s)


def test_join_by_the_printed_line_without_naming_the_model(nodes) -> None:
    """`petalnet node --serve 0:5`, then the line that it prints, then `petalnet status`."""
    first = nodes.start("--serve", "0:5", "--new-swarm", "--throughput", "50", "--public-name", "first one")
    assert first.ready["model"] == "petalnet-demo" and first.ready["span"] == [0, 5] and first.ready["pid"] == first.process.pid
    line = next(line for line in first.log().splitlines() if line.startswith("join with: "))
    words = shlex.split(line.removeprefix("join with: "))
    assert words[:4] == ["petalnet", "node", "--serve", "5"]
    assert words[-1] == first.addrs[0] and first.addrs[0] in first.log().splitlines()
    second = nodes.start(*words[2:])
    assert second.ready["span"] == [5, 10]

    done = petalnet(nodes, "status", "--initial-peers", *first.addrs)
    assert done.returncode == 0 and not done.stderr
    assert "petalnet-demo: 12 blocks, 2 servers, blocks 10-11 missing" in done.stdout
    assert re.search(r"0:5 .*first one …\w{6} +online +\w+ +50 ", done.stdout), done.stdout
    done = petalnet(nodes, "status", "petalnet-demo", "--json", "--initial-peers", *second.addrs)
    (model,) = json.loads(done.stdout)["models"]
    assert model["missing"] == [10, 11] and [server["span"] for server in model["servers"]] == [[0, 5], [5, 10]]
    assert model["servers"][0]["peer_id"] == first.peer_id and model["servers"][0]["free_kv_tokens"] > 0

    done = petalnet(nodes, "status", "other", "--initial-peers", *first.addrs)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "other" in done.stderr


def test_serve_auto_and_a_log_for_machines(nodes) -> None:
    node = nodes.start(MODEL, "--serve", "auto", "--new-swarm", "--max-memory", "6MB", "--dtype", "float32", "--log-format", "json")
    first, end = node.ready["span"]
    assert first == 0 and 1 <= end < 12
    entries = [json.loads(line) for line in node.log().splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= entries[0].keys()
    assert any(entry["message"].startswith("online: ") for entry in entries)


def test_several_models_in_a_swarm(nodes, tmp_path: Path) -> None:
    """A node without MODEL cannot know which one is meant."""
    from transformers import BloomConfig, BloomForCausalLM

    other = tmp_path / "other-model"
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_head=2, n_layer=4)).save_pretrained(other)
    first = nodes.start(MODEL, "--serve", "0:2", "--new-swarm")
    nodes.start(other, "--serve", "0:2", "--initial-peers", *first.addrs)
    options = ["--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--log-level", "error"]
    done = petalnet(nodes, "node", "--serve", "2", "--initial-peers", *first.addrs, *options)
    assert done.returncode == 2 and "demo_model" in done.stderr and "other-model" in done.stderr and done.stderr.count("\n") == 1


def test_client_daemon(nodes) -> None:
    """Its web side, and the state file by which other programs find the swarm; both end with it."""
    server = nodes.start("--serve", "0:12", "--new-swarm", "--throughput", "50")
    client = nodes.start("--client", "--http", "127.0.0.1:0", "--initial-peers", *server.addrs)
    assert client.ready["span"] is None
    state_file = nodes.folder / "home" / "state" / "client.json"
    assert json.loads(state_file.read_text())["pid"] == client.process.pid

    with httpx.Client(base_url=str(client.ready["http"]), trust_env=False) as http:
        health = http.get("/health")
        assert health.status_code == 200 and health.json()["role"] == "client" and health.json()["peer_id"] == client.peer_id
        deadline = time.monotonic() + 10
        while not (models := http.get("/status").json()["models"]):
            assert time.monotonic() < deadline
        assert models[0]["servers"][0]["peer_id"] == server.peer_id and models[0]["missing"] == []

    done = petalnet(nodes, "status")  # finds the swarm through the daemon
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr

    later = nodes.start("--client", "--http", "none", "--initial-peers", *server.addrs)
    assert json.loads(state_file.read_text())["pid"] == later.process.pid
    assert later.stop() == 0
    deadline = time.monotonic() + 15
    while not state_file.exists():  # the first one takes it up again
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(state_file.read_text())["pid"] == client.process.pid
    assert client.stop() == 0
    assert not state_file.exists()
    done = petalnet(nodes, "status")
    assert done.returncode == 2 and "--initial-peers" in done.stderr


def test_a_python_program_finds_the_swarm_through_the_daemon(nodes) -> None:
    server = nodes.start("--serve", "0:12", "--new-swarm", "--throughput", "50")
    nodes.start("--client", "--http", "none", "--initial-peers", *server.addrs)
    program = f"""
import torch, petalnet
model = petalnet.AutoDistributedModelForCausalLM.from_pretrained({str(MODEL)!r})
print(model.generate(torch.tensor([[40, 50, 60]]), max_new_tokens=4, min_new_tokens=4).shape[1])
"""
    done = subprocess.run([sys.executable, "-c", program], env=nodes.environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "7", done.stderr


async def test_a_second_signal_ends_a_draining_node_at_once(nodes, find_record) -> None:
    """The first waits for a session that is open, the second does not."""
    from petalnet.p2p.host import open_host
    from petalnet.p2p.identity import Identity
    from petalnet.p2p.protocols import INFERENCE
    from petalnet.p2p.session_messages import OpenSession, SessionOpened

    node = await trio.to_thread.run_sync(nodes.start, "--serve", "0:2", "--new-swarm", "--throughput", "9")
    async with open_host(Identity.generate()) as host:
        record = await find_record(host, node.peer_id, node.addrs)
        async with await host.open_stream(node.peer_id, INFERENCE, addrs=node.addrs) as stream:
            await stream.send(OpenSession("s", record.model, 0, 2, 10))
            assert isinstance(await stream.receive(), SessionOpened)
            node.process.send_signal(signal.SIGINT)
            while "1 running one has up to 10 s to move" not in node.log():
                assert node.process.poll() is None
                await trio.sleep(0.02)
            assert not node.ready_file.exists()
            node.process.send_signal(signal.SIGINT)
            began = trio.current_time()
            assert await trio.to_thread.run_sync(node.process.wait, 20) == 128 + signal.SIGINT
            assert trio.current_time() - began < 2


def children_of(process: subprocess.Popen[bytes]) -> Sequence[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_demo(nodes) -> None:
    done = petalnet(nodes, "demo", "--max-new-tokens", "20", timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "ROMEO:" in done.stdout and "20 tokens, " in done.stdout and "tokens/s" in done.stdout
    # One of the two that hold the middle was killed, the other wrote the rest, and nobody could tell from the text.
    lost, other = re.search(r"── server (\d), which holds blocks 4-7, is killed now; server (\d) holds them, too ──", done.stdout).groups()
    assert {lost, other} == {"2", "4"}
    assert re.search(rf"a pause of \d+\.\d+ s, in which server {other} computed", done.stdout)
    assert f"server 1 (blocks 0-3) → server {other} (blocks 4-7) → server 3 (blocks 8-11)" in done.stdout
    written = re.sub("──.*──", "", done.stdout.partition("bold):")[2].partition("20 tokens, ")[0])
    assert "".join(written.split()) == "".join(local_text(PROMPT, tokens=20).split())


def local_text(prompt: str, tokens: int) -> str:
    """What the demonstration's model writes by itself, from the demonstration's seed."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    torch.manual_seed(7)
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=40)[0])


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["[1/", "[4/4]"])
def test_demo_leaves_no_process_behind(nodes, number: signal.Signals, moment: str) -> None:
    """Interrupted while servers start, and while text is written."""
    command = [sys.executable, "-u", "-m", "petalnet", "demo", "--max-new-tokens", "800"]
    with subprocess.Popen(command, env=nodes.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if moment in line:
                break
        servers = children_of(demo)  # type: ignore[arg-type]
        assert servers
        demo.send_signal(number)
        _, said = demo.communicate(timeout=30)
        assert demo.returncode == 130 and "Traceback" not in said
    _, alive = psutil.wait_procs(servers, timeout=1)
    assert not alive


def test_nodes_of_one_machine_keep_their_identities(nodes) -> None:
    """Without --identity-path each node has a key in the state folder, the same after a restart, and another for a second node."""
    first, second = nodes.start("--bootstrap", own_identity=True), nodes.start("--bootstrap", own_identity=True)
    assert first.peer_id != second.peer_id
    assert first.stop() == 0
    assert nodes.start("--bootstrap", own_identity=True).peer_id == first.peer_id


async def test_an_operator_drains_a_node(nodes, find_record) -> None:
    """`petalnet drain` returns when the node has ended, which waits for a session that is open, but no longer than it is set to."""
    from petalnet.p2p.host import open_host
    from petalnet.p2p.identity import Identity
    from petalnet.p2p.protocols import INFERENCE
    from petalnet.p2p.session_messages import OpenSession, SessionOpened

    arguments = ("--serve", "0:2", "--new-swarm", "--throughput", "9", "--drain-time", "2", "--public-name", "attic")
    node = await trio.to_thread.run_sync(nodes.start, *arguments)
    async with open_host(Identity.generate()) as host:
        record = await find_record(host, node.peer_id, node.addrs)
        async with await host.open_stream(node.peer_id, INFERENCE, addrs=node.addrs) as stream:
            await stream.send(OpenSession("s", record.model, 0, 2, 10))
            assert isinstance(await stream.receive(), SessionOpened)
            began = trio.current_time()
            done = await trio.to_thread.run_sync(petalnet, nodes, "drain", "--node", "attic")
    assert done.stdout == f"server attic (pid {node.process.pid}) drains: 1 session may take up to 2 s to leave\nit has left\n", done.stderr
    assert 2 < trio.current_time() - began < 15
    assert node.process.wait(5) == 0
    assert "told to stop by `petalnet drain`: no new sessions; 1 running one has up to 2 s to move" in node.log()
    done = await trio.to_thread.run_sync(petalnet, nodes, "drain")
    assert done.returncode == 1 and done.stderr == "petalnet: you run no node on this machine\n"
