"""Two servers and a client, each behind a router of its own, that meet through a relay on the public segment."""

from __future__ import annotations

import json

import pytest

from petalnet.models.checkpoint import DEMO_MODEL

from .conftest import LabNodes
from .lab import Lab

pytestmark = pytest.mark.nat

GENERATE = """
import json, sys, time
import torch
import petalnet
from petalnet.models.checkpoint import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
inputs = tokenizer("The river", return_tensors="pt")
local = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
remote = petalnet.AutoDistributedModelForCausalLM.from_pretrained(DEMO_MODEL, initial_peers=[sys.argv[1]], dtype=torch.float32)
options = dict(max_new_tokens=32, do_sample=False)
found = remote.generate(**inputs, **options)
began = time.perf_counter()
again = remote.generate(**inputs, **options)
seconds = time.perf_counter() - began
expected = local.generate(**inputs, **options)
print(json.dumps({
    "equal": bool(torch.equal(found, expected) and torch.equal(again, expected)),
    "text": tokenizer.decode(found[0]), "tokens_s": 32 / seconds,
}))
"""


@pytest.mark.long
@pytest.mark.parametrize("keeps_ports", [False, True], ids=["through-the-relay", "after-hole-punching"])
def test_text_is_generated_behind_three_routers(lab: Lab, nodes: LabNodes, keeps_ports: bool) -> None:
    lab.add_public("relay")
    for name in ("alice", "bob", "carol"):
        lab.add_nated(name, keeps_ports=keeps_ports)
    relay = nodes.launch("relay", "--bootstrap", "--relay").wait_ready()
    entry = f"/ip4/{lab.ip('relay')}/tcp/31330/p2p/{relay.peer_id}"
    assert entry in relay.addrs
    servers = [
        nodes.launch(host, DEMO_MODEL, "--serve", span, "--dtype", "float32", "--initial-peers", entry)
        for host, span in (("alice", "0:6"), ("bob", "6:12"))
    ]
    for server in servers:
        server.wait_ready()
        server.wait_for_log(f"reachable through relay {relay.peer_id}")
        assert server.log().count("open TCP port 31330") == 1
    answer = json.loads(nodes.run_python("carol", GENERATE, entry).splitlines()[-1])
    assert answer["equal"], answer
    for server in servers:
        assert ("connected directly" in server.log()) == keeps_ports
    way = "after hole punching" if keeps_ports else "through the relay"
    print(f"\n{answer['tokens_s']:.1f} tokens/s {way}: {answer['text']!r}")
