"""Chains over long ways: what they take is less than any way through the client could take. Bounds of physics, not of a machine's speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..nat.conftest import LabNodes
from ..nat.distance import Distance, why_not
from ..nat.lab import Lab
from .models import BLOCKS, save_model

pytestmark = [pytest.mark.long, pytest.mark.nat, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SERVERS = {"first": "0:2", "second": "2:4", "third": f"4:{BLOCKS['bloom']}"}
HIDDEN = 64
PORT = 4001

_CLIENT = """
import json, statistics, sys, time
import torch
from petalnet import AutoDistributedModelForCausalLM

path, peers, prompt, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

class Clock:
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass

with AutoDistributedModelForCausalLM.from_pretrained(
    path, initial_peers=peers, dtype=torch.float32, show_route=False, speculation=False
) as model:
    model.generate(torch.arange(10, 18)[None], max_new_tokens=2, do_sample=False)
    clock, began = Clock(), time.perf_counter()
    ids = torch.randint(10, 500, (1, prompt), generator=torch.Generator().manual_seed(1))
    answer = model.generate(ids, max_new_tokens=tokens, do_sample=False, streamer=clock)
    steps = [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:])]
    trace = model.last_trace
    print(json.dumps({
        "first_s": clock.times[1] - began, "step_s": statistics.median(steps) if steps else None, "chunks": trace.prompt_chunks,
        "relayed": [hop.relayed_steps for hop in trace.hops], "answer": answer.tolist(),
    }))
"""


@contextmanager
def far_servers(folder: Path, rtt_ms: float) -> Iterator[tuple[Lab, Callable[[int, int], dict[str, Any]]]]:
    """A model on three hosts; called with the tokens of a prompt and of its answer, a client on a fourth one has it written."""
    path = save_model("bloom", folder / "model")
    with Lab(Distance(rtt_ms)) as lab:
        nodes = LabNodes(lab, folder)
        for host in ("client", *SERVERS):
            lab.add_public(host)
        started = []
        for host, span in SERVERS.items():
            joining = ("--initial-peers", *started[0].addrs) if started else ("--new-swarm",)
            listening = ("--host-maddrs", f"/ip4/{lab.ip(host)}/tcp/{PORT}")
            node = nodes.launch(host, path, "--serve", span, "--dtype", "float32", "--throughput", "100", *joining, *listening)
            started.append(node.wait_ready())

        def ask(prompt: int, tokens: int) -> dict[str, Any]:
            told = nodes.run_python("client", _CLIENT, path, json.dumps(started[0].addrs), prompt, tokens)
            return dict(json.loads(told.splitlines()[-1]))

        yield lab, ask


def test_a_token_takes_two_round_trips_where_the_client_would_take_three(tmp_path: Path) -> None:
    rtt_s = 0.1
    with far_servers(tmp_path, rtt_s * 1e3) as (_, ask):
        told = ask(8, 16)
    assert told["relayed"] == [0, 0, 0]
    assert 2 * rtt_s <= told["step_s"] < 3 * rtt_s


def test_uplinks_carry_a_prompt_at_the_same_time(tmp_path: Path) -> None:
    """Whole, it would take each uplink's time one after another, however quick the servers were."""
    mbit, prompt = 2, 1024
    with far_servers(tmp_path, 40) as (lab, ask):
        assert lab.distance is not None
        for host in ("client", *SERVERS):
            lab.distance.set_uplink(lab.ip(host), mbit)
        told = ask(prompt, 1)
    assert told["chunks"] > 1 and told["relayed"] == [0, 0, 0]
    of_one_uplink_s = prompt * HIDDEN * 4 * 8 / (mbit * 1e6)
    assert of_one_uplink_s < told["first_s"] < 3 * of_one_uplink_s
