"""`active_adapter`: LoRA adapters that servers have, chosen by the client, against the local `PeftModel`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalnet.blocks.adapters import Adapter, LoraWeights
from petalnet.errors import MissingBlocksError

peft = pytest.importorskip("peft")

POET, OTHER_POET, CLERK = "poet@00112233", "poet@44556677", "clerk@8899aabb"


@dataclass
class Hosts:
    """A swarm whose servers have adapters, and what is local."""

    path: Path
    local: torch.nn.Module
    adapted: Any
    servers: Any
    poets: list[str]
    connect: Callable[..., Any]

    def model(self, **options: Any) -> Any:
        return self.connect(self.path, self.servers.peers, **options)


def adapter_of(adapted: Any) -> Adapter:
    """What hosts load of a local PEFT model."""
    blocks: dict[int, dict[str, LoraWeights]] = {index: {} for index in range(6)}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.layer.Linear):
            block, _, path = name.partition(".h.")[2].partition(".")
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            blocks[int(block)][path] = LoraWeights(a, b * module.scaling["default"])
    return Adapter(blocks)


def adapt(model: torch.nn.Module, seed: int = 0) -> Any:
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query_key_value", "dense"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.fixture(scope="module")
def hosts(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> Iterator[Hosts]:
    local = AutoModelForCausalLM.from_pretrained(bloom_path, dtype=torch.float32).eval()
    adapted = adapt(local)
    adapter = adapter_of(adapted)
    with serving(bloom_path, [(0, 6)]) as servers:
        poets = [servers.start(*span, adapters={POET: adapter}).peer_id for span in ((0, 3), (3, 6))]
        servers.start(0, 2, adapters={CLERK: adapter})
        yield Hosts(bloom_path, local, adapted, servers, poets, connect)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(4, 256, (rows, length), generator=torch.Generator().manual_seed(5))


def test_equality_with_the_local_model(hosts: Hosts) -> None:
    prompt = ids(2, 7)
    for active in ("poet", POET):
        with hosts.model(active_adapter=active) as model, torch.no_grad():
            assert torch.equal(model.generate(prompt, max_new_tokens=6), hosts.adapted.generate(prompt, max_new_tokens=6))
            assert torch.allclose(model(prompt).logits, hosts.adapted(prompt).logits, atol=1e-3)
            assert [hop.peer_id for hop in model.remote_blocks.route()] == hosts.poets
    with hosts.model() as model:
        assert torch.equal(model.generate(prompt, max_new_tokens=6), hosts.local.generate(prompt, max_new_tokens=6))


def test_own_parameters_beside_a_hosts_adapter(hosts: Hosts) -> None:
    prompt = ids(2, 6)
    with hosts.model(active_adapter="poet") as model:
        own = adapt(model, seed=1)
        local = copy.deepcopy(hosts.adapted)
        local.load_state_dict({name: value.clone() for name, value in hosts.adapted.state_dict().items()})
        local.add_adapter("own", own.peft_config["default"])
        values = {name.replace(".default.", ".own."): value for name, value in own.state_dict().items() if "lora_" in name}
        local.load_state_dict(values, strict=False)
        local.base_model.set_adapter(["default", "own"])
        losses = [adapted(input_ids=prompt, labels=prompt).loss for adapted in (local, own)]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
        for loss in losses:
            loss.backward()
        expected = {name.replace(".own.", ".default."): value.grad for name, value in local.named_parameters() if ".own." in name}
        for name, value in own.named_parameters():
            if "lora_" in name:
                assert (value.grad - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max()


def test_what_there_is_not(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalnet.client.swarm.SETTLE_S", 0.5)
    with hosts.model(active_adapter="painter") as model:
        with pytest.raises(ValueError, match="no server of this model has the adapter 'painter'; there are clerk@8899aabb, poet@00112233"):
            model(ids(1, 3))
        with pytest.raises(ValueError, match="no server of this model has the adapter 'painter'"):
            model.generate(ids(1, 3), max_new_tokens=2)
    with hosts.model(active_adapter="clerk") as model, pytest.raises(MissingBlocksError, match="blocks 2-5 .*clerk@8899aabb is needed"):
        model(ids(1, 3))


def test_two_adapters_of_one_name(hosts: Hosts) -> None:
    """A session goes on with the one that it began with; who begins has to say which."""
    prompt = ids(1, 4)
    with hosts.model(active_adapter="poet") as model, torch.no_grad():
        expected = hosts.adapted.generate(prompt, max_new_tokens=8)
        with model.inference_session(max_length=20) as session:
            first = model.generate(prompt, max_new_tokens=4, session=session)
            other = hosts.servers.start(0, 6, adapters={OTHER_POET: adapter_of(adapt(hosts.local, seed=9))})
            spare = hosts.servers.start(3, 6, adapters={POET: adapter_of(hosts.adapted)})
            used = next(server for server in hosts.servers.servers if server.peer_id == session.hops[1].peer_id)
            assert sees(model, other.peer_id) and sees(model, spare.peer_id)
            hosts.servers.stop(used)
            rest = model.generate(None, max_new_tokens=4, session=session)
        assert torch.equal(torch.cat([first, rest[:, -4:]], dim=1), expected)
        with pytest.raises(ValueError, match="2 different adapters named 'poet'; ask for one of poet@00112233, poet@44556677"):
            model(prompt)
    hosts.servers.stop(other)


def sees(model: Any, peer_id: str) -> bool:
    """Whether the client knows of a server, which it has asked for if need be."""
    target = model.remote_blocks.target
    membership = target.swarm.membership
    for _ in range(20):
        if membership.record(peer_id) is not None:
            return True
        target.swarm.portal.run(membership.look_up, target.model)
    return False
