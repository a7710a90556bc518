"""Hosts that have LoRA adapters, as real processes: users choose one by its name, and get what PEFT computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalnet import AutoDistributedModelForCausalLM
from petalnet.errors import MissingBlocksError
from petalnet.models.checkpoint import DEMO_MODEL
from tests.peft_adapters import load_with_peft, save_adapter

pytestmark = pytest.mark.long

IDS = torch.tensor([[40, 50, 60, 70, 80], [3, 3, 41, 51, 61]])
OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture
def connect() -> Any:
    """A function from peers and an adapter's name to a client's model, closed in the end."""
    models = []

    def connected(peers: list[str], adapter: str | None) -> Any:
        models.append(
            AutoDistributedModelForCausalLM.from_pretrained(
                str(DEMO_MODEL), initial_peers=peers, active_adapter=adapter, dtype=torch.float32, max_retries=1
            )
        )
        return models[-1]

    yield connected
    for model in models:
        model.close()


def test_users_choose_an_adapter_of_the_hosts(nodes: Any, tmp_path: Path, connect: Callable[..., Any]) -> None:
    poet, lawyer = (
        save_adapter(DEMO_MODEL, tmp_path / name, "bloom", target_modules="all-linear", task_type="CAUSAL_LM", seed=seed)
        for seed, name in enumerate(("poet", "lawyer"))
    )
    usual = ("--dtype", "float32", "--attn-cache-tokens", "2048")
    plain = nodes.start("--serve", "0:12", "--new-swarm", "--throughput", "1000", *usual)  # the quickest, of no use to whoever wants one
    joining = ("--initial-peers", *plain.addrs, *usual, "--throughput", "100")
    first = nodes.launch("--serve", "0:6", "--adapters", poet, lawyer, *joining)
    last = nodes.launch("--serve", "6:12", *joining, "--adapters", poet)
    assert "adapter poet@" in first.wait_ready().log() and "changes 12 of the 12 blocks" in last.wait_ready().log()

    expected = {None: AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32), "poet": load_with_peft(DEMO_MODEL, poet)}
    answers = {}
    for name, local in expected.items():
        model = connect(plain.addrs, name)
        answers[name] = model.generate(IDS, **OPTIONS)
        assert torch.equal(answers[name], local.generate(input_ids=IDS, **OPTIONS))
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, local(input_ids=IDS).logits.float(), atol=1e-2, rtol=1e-3)
    assert not torch.equal(answers[None], answers["poet"])

    with pytest.raises(MissingBlocksError, match="blocks 6-11"):
        connect(plain.addrs, "lawyer").generate(IDS, **OPTIONS)
    with pytest.raises(ValueError, match="no server of this model has the adapter 'doctor'; there are lawyer@.*, poet@"):
        connect(plain.addrs, "doctor").generate(IDS, **OPTIONS)


def test_an_adapter_that_cannot_be_applied_ends_a_node_in_one_line(nodes: Any, tmp_path: Path) -> None:
    folder = save_adapter(DEMO_MODEL, tmp_path / "poet", "bloom", use_dora=True)
    node = nodes.launch("--serve", "0:12", "--new-swarm", "--adapters", folder)
    assert node.process.wait(60) == 2
    assert node.log().count("\n") == 1 and node.log().startswith("petalnet: adapter poet uses use_dora: servers apply plain LoRA")
