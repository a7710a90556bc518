"""What a swarm of small hosts costs and how fast news travel in it: real hosts on loopback, in several processes, without torch.

    python benchmarks/swarm.py                      # 20 nodes, a minute of traffic, one newcomer, one server and the bootstrap killed

Prints the time from a new server's announcement until each node knows it, from a server's death until each node has it off its list, and
the traffic of a node in a minute: bytes on its connections, and bytes and messages by protocol where the protocol is known.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

NODES, HOSTS_PER_PROCESS = 20, 5
MODEL, BLOCKS = "ab" * 32, 24
LISTEN = ["/ip4/127.0.0.1/tcp/0"]
LOOK_EVERY_S = 0.02


class Nodes:
    """Processes of one or more nodes each, and what they say.

    Every line that a process prints is a JSON object with a "kind": "ready", "sees", "misses" or "traffic".
    """

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()

    def start(self, count: int, peers: Sequence[str], within_s: float = 60.0) -> tuple[subprocess.Popen[str], list[dict[str, Any]]]:
        """A process of `count` nodes that join through `peers`: the process, and for each node its "peer_id", "addrs" and "announced"."""
        command = [sys.executable, __file__, "--hosts", str(count), "--peers", *peers]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._processes.append(process)
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        self.wait(lambda: len(self.of("ready", process.pid)) == count or process.poll() is not None, within_s)
        ready = self.of("ready", process.pid)
        if len(ready) < count:
            raise SystemExit(f"a process of nodes did not become ready (exit status {process.poll()})")
        return process, ready

    def of(self, kind: str, pid: int | None = None) -> list[dict[str, Any]]:
        """What was said of one kind, by one process or all."""
        with self._lock:
            return [line for line in self.said if line["kind"] == kind and pid in (None, line["pid"])]

    def wait(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Wait until a condition holds; False where it does not in time."""
        until = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > until:
                return False
            time.sleep(LOOK_EVERY_S)
        return True

    def ask_traffic(self, among: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
        """The counts of all nodes of these processes, since they started."""
        before = len(self.of("traffic"))
        for process in among:
            assert process.stdin is not None
            process.stdin.write("traffic\n")
            process.stdin.flush()
        self.wait(lambda: len(self.of("traffic")) >= before + len(among), 10.0)
        return self.of("traffic")[before:]

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            with self._lock:
                self.said.append(said | {"pid": process.pid})


def first_times(nodes: Nodes, kind: str, peer_id: str, since: float) -> dict[str, float]:
    """For each node the first time after `since` at which it said `kind` of a server, in seconds after that."""
    times: dict[str, float] = {}
    for line in nodes.of(kind):
        if line["of"] == peer_id and line["at"] >= since:
            times.setdefault(line["node"], line["at"] - since)
    return times


def run_swarm(nodes: Nodes, *, count: int, traffic_s: float) -> dict[str, Any]:
    """The whole show: `count` nodes, all of them servers; what was measured, in seconds, bytes and messages.

    Three nodes have processes of their own: the bootstrap node, the server that is to be killed, and the newcomer.
    """
    boot, (entry,) = nodes.start(1, [])
    victim, (doomed,) = nodes.start(1, entry["addrs"])
    crowd: list[subprocess.Popen[str]] = []
    everybody = [entry, doomed]
    while len(everybody) < count - 1:
        process, ready = nodes.start(min(HOSTS_PER_PROCESS, count - 1 - len(everybody)), entry["addrs"])
        crowd.append(process)
        everybody += ready

    def know_one_another() -> bool:
        seen = Counter(line["node"] for line in nodes.of("sees"))
        return all(seen[node["peer_id"]] >= len(everybody) - 1 for node in everybody)

    if not nodes.wait(know_one_another, 30.0):
        raise SystemExit("the nodes did not find one another")
    time.sleep(5.0)  # what joining costs is not what staying costs
    began = time.monotonic()
    before = nodes.ask_traffic(crowd)
    time.sleep(traffic_s)
    traffic = _difference(before, nodes.ask_traffic(crowd), (time.monotonic() - began) / 60)

    # The newcomer joins through one of the others; the node through which they all came dies as it does.
    os.kill(boot.pid, signal.SIGKILL)
    alive = [node for node in everybody if node is not entry]
    _, (newcomer,) = nodes.start(1, [*entry["addrs"], *alive[-1]["addrs"]])
    others = {node["peer_id"] for node in alive}
    nodes.wait(lambda: set(first_times(nodes, "sees", newcomer["peer_id"], 0.0)) >= others, 30.0)
    found = first_times(nodes, "sees", newcomer["peer_id"], newcomer["announced"])
    known_before = {line["node"] for line in nodes.of("sees") if line["of"] == newcomer["peer_id"] and line["at"] < newcomer["announced"]}
    found |= {node: 0.0 for node in known_before}

    killed = time.time()
    os.kill(victim.pid, signal.SIGKILL)
    left = (others | {newcomer["peer_id"]}) - {doomed["peer_id"]}
    nodes.wait(lambda: set(first_times(nodes, "misses", doomed["peer_id"], killed)) >= left, 60.0)
    gone = first_times(nodes, "misses", doomed["peer_id"], killed)
    unrouted = first_times(nodes, "avoids", doomed["peer_id"], killed)
    return {
        "nodes": count,
        "found": found,
        "not found": len(others - set(found)),
        "gone": gone,
        "not gone": len(left - set(gone)),
        "out of routes": {node: min(unrouted.get(node, at), at) for node, at in gone.items()},
        "traffic": traffic,
    }


def _difference(before: list[dict[str, Any]], after: list[dict[str, Any]], minutes: float) -> dict[str, Any]:
    """Per node and minute: bytes on the connections, and by protocol messages (or writes) and bytes that were sent."""
    hosts = sum(entry["hosts"] for entry in after)
    total = Counter[str]()
    for sign, entries in ((1, after), (-1, before)):
        for entry in entries:
            for name in ("bytes_in", "bytes_out"):
                total[name] += sign * entry[name]
            for name, (messages, size) in entry["sent"].items():
                total[f"messages {name}"] += sign * messages
                total[f"bytes {name}"] += sign * size
    return {name: value / hosts / minutes for name, value in total.items()}


# ---- the process of the nodes


def serve(hosts: int, peers: Sequence[str]) -> None:
    """Runs nodes until killed, and says what they see."""
    import trio

    from petalnet.announcing import Announcer, Load
    from petalnet.p2p.identity import Identity
    from petalnet.peering import Peering, open_peering
    from petalnet.routing.records import ServerRecord

    sent = count_sent()

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    async def watch(peering: Peering) -> None:
        """Say which servers come into the view and which go out of it, and which are avoided though they are listed."""
        listed: set[str] = set()
        avoided: set[str] = set()
        own = peering.host.peer_id
        while True:
            now = time.time()
            records = peering.view.servers(now=now, include_failed=True)
            present = {record.peer_id for record in records} - {own}
            failed = {peer_id for peer_id in present if peering.view.failed_until(peer_id, now=now) is not None}
            for kind, changed in (("sees", present - listed), ("misses", listed - present), ("avoids", failed - avoided)):
                for peer_id in changed:
                    say(kind=kind, node=own, of=peer_id, at=now)
            listed, avoided = present, failed
            await trio.sleep(LOOK_EVERY_S)

    async def node(started: list[Peering], number: int) -> None:
        async with (
            open_peering(Identity.generate(), initial_peers=peers, listen=LISTEN, server=True) as peering,
            trio.open_nursery() as nursery,
        ):
            started.append(peering)
            now = time.time()
            first = number * 4 % BLOCKS
            record = ServerRecord(
                peer_id=peering.host.peer_id, addrs=tuple(addr.partition("/p2p/")[0] for addr in peering.host.addrs), model=MODEL,
                model_name="benchmark", span=(first, first + 4), num_blocks=BLOCKS, state="online", dtype="float32", sequence=0, issued=now,
                expires=now + 30, block_digests=tuple(f"{block:032x}" for block in range(4)),
            )  # fmt: skip
            announcer = Announcer(peering, record, lambda: Load(1000, 0), peering.host.round_trip_s)
            nursery.start_soon(watch, peering)
            nursery.start_soon(peering.keep_fresh)
            announced = time.time()
            await announcer.tell()
            say(kind="ready", peer_id=peering.host.peer_id, addrs=list(peering.host.addrs), announced=announced)
            await announcer.run()

    async def answer(started: list[Peering]) -> None:
        while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            connections = [peer for peering in started for peer in peering.host.peers()]
            total = {name: sum(getattr(peer, name) for peer in connections) for name in ("bytes_in", "bytes_out")}
            say(kind="traffic", hosts=len(started), sent=dict(sent), **total)

    async def main() -> None:
        started: list[Peering] = []
        async with trio.open_nursery() as nursery:
            for number in range(hosts):
                nursery.start_soon(node, started, number)
            nursery.start_soon(answer, started)

    trio.run(main)


def count_sent() -> dict[str, list[int]]:
    """From now on counts what this process writes to streams, by protocol: how often, and how many bytes."""
    from libp2p.network.stream.net_stream import NetStream

    from petalnet.p2p.mux import MuxStream

    sent: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    send, write = MuxStream.send, NetStream.write

    def count(protocol: str, size: int) -> None:
        sent[protocol][0] += 1
        sent[protocol][1] += size

    async def counted_send(self: MuxStream, parts: Any, *args: Any) -> None:
        if self.protocol:
            count(self.protocol, sum(map(len, parts)))
        await send(self, parts, *args)

    async def counted_write(self: NetStream, data: bytes) -> None:
        count(self.get_protocol() or "negotiation", len(data))
        await write(self, data)

    MuxStream.send, NetStream.write = counted_send, counted_write  # type: ignore[method-assign]
    return sent


def _report(result: dict[str, Any]) -> None:
    def spread(times: dict[str, float]) -> str:
        values = sorted(times.values())
        return f"median {statistics.median(values):.2f} s, last {values[-1]:.2f} s" if values else "never"

    print(f"{result['nodes']} nodes, the bootstrap node killed\n")
    print(f"a new server is known to all but {result['not found']}: {spread(result['found'])}")
    print(f"a killed server is out of the routes: {spread(result['out of routes'])}")
    print(f"a killed server is off the list of all but {result['not gone']}: {spread(result['gone'])}\n")
    traffic = result["traffic"]
    print(f"a node in a minute: {traffic['bytes_in'] / 1024:,.0f} KiB in, {traffic['bytes_out'] / 1024:,.0f} KiB out, on its connections")
    for name in sorted(name.removeprefix("bytes ") for name in traffic if name.startswith("bytes ")):
        print(f"  {name:34} {traffic[f'messages {name}']:7,.0f} writes {traffic[f'bytes {name}'] / 1024:9,.1f} KiB sent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--seconds", type=float, default=60.0, help="for which traffic is counted")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hosts", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hosts is not None:
        serve(options.hosts, options.peers)
        return
    nodes = Nodes()
    try:
        result = run_swarm(nodes, count=options.nodes, traffic_s=options.seconds)
    finally:
        nodes.close()
    print(json.dumps(result)) if options.json else _report(result)


if __name__ == "__main__":
    main()
