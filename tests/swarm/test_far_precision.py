"""`wire_precision="auto"` over an uplink that is slow, to a server that is quicker and to one that is slower still."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from ..nat.conftest import LabNodes
from ..nat.distance import Distance, why_not
from ..nat.lab import Lab

pytestmark = [pytest.mark.long, pytest.mark.nat, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

HIDDEN, LAYERS, PROMPT = 320, 2, 768
EXACT_BYTES = PROMPT * HIDDEN * 4
UPLINK_MBIT = 4
"""A token takes 2.6 ms."""

_CLIENT = """
import json, sys
import torch
from petalnet import AutoDistributedModelForCausalLM

async def sent(swarm):
    return sum(peer.bytes_out for peer in swarm.membership.host.peers())

path, peers, prompt = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
counts = []
with AutoDistributedModelForCausalLM.from_pretrained(
    path, initial_peers=peers, dtype=torch.float32, show_route=False, wire_precision="auto"
) as model:
    swarm = model.base_model.h.target.swarm
    model.generate(torch.arange(10, 18)[None], max_new_tokens=1, do_sample=False)
    for seed in range(3):
        before = swarm.portal.run(sent, swarm)
        ids = torch.randint(10, 200, (1, prompt), generator=torch.Generator().manual_seed(seed))
        model.generate(ids, max_new_tokens=1, do_sample=False)
        counts.append(swarm.portal.run(sent, swarm) - before)
print(json.dumps(counts))
"""


@pytest.mark.parametrize(("tokens_s", "rounds"), [(2000, True), (100, False)], ids=["quick server", "slow server"])
def test_auto_rounds_where_the_uplink_is_known_to_be_slower_than_the_server(tokens_s: int, rounds: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=HIDDEN, n_head=5, n_layer=LAYERS)).save_pretrained(tmp_path / "model")
    with Lab(Distance(rtt_ms=20, mbit=UPLINK_MBIT)) as lab:
        for host in ("client", "server"):
            lab.add_public(host)
        nodes = LabNodes(lab, tmp_path)
        listening = ("--host-maddrs", f"/ip4/{lab.ip('server')}/tcp/4001", "--new-swarm")
        options = ("--serve", f"0:{LAYERS}", "--dtype", "float32", "--throughput", tokens_s)
        server = nodes.launch("server", tmp_path / "model", *options, *listening).wait_ready()
        told = nodes.run_python("client", _CLIENT, tmp_path / "model", json.dumps(server.addrs), PROMPT)
    first, *_, last = counts = json.loads(told.splitlines()[-1])
    if rounds:
        assert first > 0.5 * EXACT_BYTES  # half a megabyte had to go before anything was known
        assert last < 0.35 * EXACT_BYTES
    else:
        assert min(counts) >= EXACT_BYTES
