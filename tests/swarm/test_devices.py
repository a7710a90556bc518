"""Nodes whose blocks go over several devices, for which a processor stands in twice: users do not notice."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import petalnet
from petalnet.models.checkpoint import DEMO_MODEL

MODEL = Path(DEMO_MODEL)


@pytest.mark.long
def test_a_server_over_two_devices(nodes) -> None:
    """Several sessions at a time, beams, gradients; another server takes over when it is told to stop in mid-answer."""
    first = nodes.start(MODEL, "--serve", "0:12", "--new-swarm", "--device", "cpu,cpu", "--dtype", "float32")
    assert re.search(r"loaded in .* on cpu,cpu: ", first.log())
    local = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with petalnet.AutoDistributedModelForCausalLM.from_pretrained(str(MODEL), initial_peers=first.addrs, dtype=torch.float32) as model:
        prompts = [torch.randint(5, 500, (1, length), generator=torch.Generator().manual_seed(length)) for length in (3, 90, 200, 17)]
        answers: dict[int, torch.Tensor] = {}

        def ask(number: int) -> None:
            answers[number] = model.generate(prompts[number], max_new_tokens=24, do_sample=False)

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        for number, prompt in enumerate(prompts):
            assert torch.equal(answers[number], local.generate(prompt, max_new_tokens=24, do_sample=False))
        beams = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
        assert torch.equal(model.generate(prompts[0], **beams), local.generate(prompts[0], **beams))

        gradients = []
        for one in (model, local):
            inputs = one.get_input_embeddings()(prompts[1]).detach().requires_grad_()
            one(inputs_embeds=inputs, labels=prompts[1]).loss.backward()
            gradients.append(inputs.grad)
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)

        second = nodes.start(MODEL, "--serve", "0:12", "--initial-peers", *first.addrs, "--device", "cpu,cpu", "--dtype", "float32")
        with model.inference_session(max_length=64) as session:
            begun = model.generate(prompts[0], max_new_tokens=8, do_sample=False, session=session)
            assert first.stop() == 0
            more = model.generate(None, max_new_tokens=8, do_sample=False, session=session)
        assert torch.equal(torch.cat([begun, more[:, -8:]], dim=1), local.generate(prompts[0], max_new_tokens=16, do_sample=False))
    assert second.stop() == 0


@pytest.mark.long
def test_devices_that_are_not_there(nodes) -> None:
    command = [
        sys.executable,
        "-m",
        "petalnet",
        "node",
        "--serve",
        "0:2",
        "--new-swarm",
        "--device",
        "cuda:7,cuda:99",
        "--log-level",
        "error",
    ]
    done = subprocess.run(command, env=nodes.environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 2 and "--device cuda:7 is not to be had" in done.stderr and done.stderr.count("\n") == 1, done.stderr
