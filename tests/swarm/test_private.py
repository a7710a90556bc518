"""A private swarm of real node processes: who has the key uses it, everybody else reads one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from petalnet.models.checkpoint import DEMO_MODEL

PROGRAM = """
import json, sys
import torch
from petalnet import AutoDistributedModelForCausalLM
from petalnet.errors import PetalnetError

for arguments in json.loads(sys.argv[2]):
    try:
        model = AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, show_route=False, **arguments)
        print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3).shape[1])
    except PetalnetError as error:
        print(error)
"""


class Machine:
    """The command line and programs of the user whose nodes run."""

    def __init__(self, nodes) -> None:
        self._nodes = nodes

    def petalnet(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "petalnet", *map(str, arguments)]
        return subprocess.run(command, env=self._nodes.environment(), capture_output=True, text=True, timeout=60)

    def program(self, *models: dict[str, object]) -> list[str]:
        """One line for each model that is loaded and used: how many tokens it wrote, or why it did not."""
        command = [sys.executable, "-c", PROGRAM, str(DEMO_MODEL), json.dumps(models)]
        done = subprocess.run(command, env=self._nodes.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def machine(nodes) -> Machine:
    return Machine(nodes)


def new_key(machine: Machine, path: Path) -> str:
    done = machine.petalnet("key", "new", path)
    assert done.returncode == 0, done.stderr
    return str(path)


@pytest.mark.long
def test_a_private_swarm(nodes, machine: Machine, tmp_path: Path) -> None:
    key, other = new_key(machine, tmp_path / "swarm.key"), new_key(machine, tmp_path / "other.key")
    server = nodes.start("--serve", "0:6", "--new-swarm", "--throughput", "50", "--swarm-key", key)
    assert f"--swarm-key {key} --initial-peers {server.addrs[0]}" in server.log()
    second = nodes.start("--serve", "6:12", "--throughput", "50", "--swarm-key", key, "--initial-peers", *server.addrs)

    # With the key, as a path and as text, everything goes on as ever; without, or with another one, a person reads why.
    text, missing = Path(key).read_text(), str(tmp_path / "none.key")
    says, wrong = f"peer {server.peer_id} is in a private swarm: give its key with --swarm-key FILE", "another swarm key"
    lines = machine.program(*({"initial_peers": server.addrs, "swarm_key": form} for form in (key, text, None, other, missing)))
    assert len(lines) == 5 and lines[:2] == ["6", "6"]
    assert says in lines[2] and wrong in lines[3] and f"cannot read the swarm key {missing}" in lines[4]
    status = machine.petalnet("status", "--json", "--swarm-key", key, "--initial-peers", *server.addrs)
    assert json.loads(status.stdout)["models"][0]["missing"] == []
    for verb, line in ((["status"], says), (["status", "--swarm-key", other], wrong), (["node", "--client"], says)):
        done = machine.petalnet(*verb, "--initial-peers", *server.addrs)
        assert done.returncode == 1 and line in done.stderr and "Traceback" not in done.stderr
        assert len([told for told in done.stderr.splitlines() if told.startswith("petalnet: ")]) == 1

    # A client daemon tells the programs of its user where the key lies, and not what it is.
    daemon = nodes.start("--client", "--http", "none", "--swarm-key", key, "--initial-peers", *server.addrs)
    (state,) = nodes.folder.rglob("client.json")
    assert json.loads(state.read_text())["swarm_key"] == key and text.splitlines()[1] not in state.read_text()
    assert machine.program({}) == ["6"]
    assert machine.petalnet("status").returncode == 0

    # Who is connected to whom.
    reports = {report["peer_id"]: report for report in json.loads(machine.petalnet("peers", "--json").stdout)["nodes"]}
    assert reports.keys() == {server.peer_id, second.peer_id, daemon.peer_id}
    peers = {peer["peer_id"]: peer for peer in reports[second.peer_id]["peers"]}
    assert peers[server.peer_id]["span"] == [0, 6] and peers[server.peer_id]["path"] == "direct"
    assert peers[server.peer_id]["bytes_in"] > 0 and peers[server.peer_id]["bytes_out"] > 0
    assert peers[server.peer_id]["direction"] == "out" and peers[server.peer_id]["round_trip_s"] < 5
    table = machine.petalnet("peers")
    assert table.returncode == 0 and "private swarm" in table.stdout and "0:6 of petalnet-demo" in table.stdout

    # Nothing that was written shows the key.
    logs = server.log() + second.log() + daemon.log() + table.stdout + status.stdout
    assert text.splitlines()[1] not in logs and "Traceback" not in logs


def test_a_key_where_the_swarm_is_open(nodes, machine: Machine, tmp_path: Path) -> None:
    key = new_key(machine, tmp_path / "swarm.key")
    server = nodes.start("--bootstrap", "--new-swarm")
    done = machine.petalnet("status", "--swarm-key", key, "--initial-peers", *server.addrs)
    assert done.returncode in (1, 2) and "is in no private swarm: leave out the swarm key" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_blocked_node_reads_that_it_is_not_admitted(nodes, machine: Machine, tmp_path: Path) -> None:
    first = nodes.start("--bootstrap", "--new-swarm")
    blocked = tmp_path / "blocked.txt"
    blocked.write_text(f"{first.peer_id}  # tested\n")
    done = machine.petalnet("status", "--initial-peers", *first.addrs, "--block-peers", f"@{blocked}")
    assert done.returncode == 1 and f"peer {first.peer_id} is blocked by this node's --block-peers" in done.stderr
    strict = nodes.start("--bootstrap", "--new-swarm", "--allow-peers", first.peer_id)
    done = machine.petalnet("status", "--initial-peers", *strict.addrs)
    assert done.returncode == 1 and "it does not admit this node" in done.stderr and done.stderr.count("\n") == 1
