"""LoRA of the user's own in remote blocks: PEFT on a distributed model, over real servers, against the local `PeftModel`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")

TARGETS = {"bloom": ["query_key_value", "dense_h_to_4h"], "llama": ["q_proj", "v_proj", "down_proj"]}


def configuration(family: str, **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], **options})


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """LoRA parameters that change something: B begins with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(pair: Any, **options: Any) -> tuple[Any, Any]:
    """The local and the distributed model with the same adapter."""
    models = []
    for model in (pair.local, pair.remote):
        models.append(peft.get_peft_model(copy.deepcopy(model), configuration(pair.family, **options)))
        fill(models[-1])
    return models[0], models[1]


def own_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-3 of the greatest value."""
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_generate(pair: Any) -> None:
    local, remote = adapted(pair)
    ids = pair.ids(2, 7)
    expected = local.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(remote.generate(ids, max_new_tokens=8, do_sample=False), expected)
    with local.disable_adapter(), remote.disable_adapter():
        plain = local.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(remote.generate(ids, max_new_tokens=8, do_sample=False), plain)
    assert not torch.equal(plain, expected)


def test_made_in_inference_mode(pair: Any) -> None:
    """Such parameters do not say whether they were changed."""
    with torch.inference_mode():
        local, remote = adapted(pair)
        ids = pair.ids(2, 5)
        expected = local.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(remote.generate(ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_and_gradients(pair: Any, side: str) -> None:
    local, remote = adapted(pair)
    ids, mask = pair.padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    outputs = [model(input_ids=ids, attention_mask=mask, labels=labels) for model in (local, remote)]
    assert_close(outputs[1].loss, outputs[0].loss)
    for output in outputs:
        output.loss.backward()
    expected, found = own_parameters(local), own_parameters(remote)
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert_close(parameter.grad, expected[name].grad)


def test_several_adapters(pair: Any) -> None:
    """They are joined where they are active together, and each has its own scaling."""
    models = adapted(pair)
    for model in models:
        model.add_adapter("other", configuration(pair.family, r=2, lora_alpha=3, target_modules=TARGETS[pair.family][:1], use_rslora=True))
        fill(model, 1)
    ids = pair.ids(2, 6)
    results = []
    with torch.no_grad():
        for active in ("default", "other", ["default", "other"]):
            for model in models:
                model.base_model.set_adapter(active)
            expected, found = (model(input_ids=ids).logits for model in models)
            assert_close(found, expected)
            results.append(expected)
    assert not torch.allclose(results[0], results[1], atol=1e-2) and not torch.allclose(results[0], results[2], atol=1e-2)


@pytest.mark.long
def test_training_steps(pair: Any) -> None:
    local, remote = adapted(pair)
    ids = pair.ids(3, 8)
    losses = []
    for model in (local, remote):
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]


def test_a_session_keeps_what_it_began_with(pair: Any) -> None:
    _, remote = adapted(pair)
    ids = pair.ids(1, 6)
    with remote.inference_session(max_length=32) as session, torch.no_grad():
        remote.generate(ids, max_new_tokens=3, session=session)
        with remote.disable_adapter(), pytest.raises(ValueError, match="have changed since this session began"):
            remote.generate(ids, max_new_tokens=3, session=session)
        remote.generate(ids, max_new_tokens=3, session=session)
        next(iter(own_parameters(remote).values())).mul_(2)
        with pytest.raises(ValueError, match="have changed since this session began"):
            remote.generate(ids, max_new_tokens=3, session=session)


def test_saved_and_loaded_as_peft_does(pair: Any, tmp_path: Path) -> None:
    local, remote = adapted(pair)
    remote.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    elsewhere = peft.PeftModel.from_pretrained(copy.deepcopy(pair.local), tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(pair.remote), tmp_path)
    by_library = copy.deepcopy(pair.remote)
    by_library.load_adapter(str(tmp_path))
    ids = pair.ids(2, 6)
    with torch.no_grad():
        expected = local(input_ids=ids).logits
        for model in (elsewhere, again, by_library):
            assert_close(model(input_ids=ids).logits, expected)


def test_slices_and_single_blocks(pair: Any) -> None:
    """Each has just its own blocks' parameters, and gradients reach these from whatever part was run."""
    local, remote = adapted(pair)
    ids = pair.ids(2, 6)
    blocks = next(module for module in remote.modules() if type(module).__name__ == "RemoteSequential")
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    middle = blocks[1:4]
    assert {id(parameter) for parameter in middle.parameters()} < {id(parameter) for parameter in blocks.parameters()}
    middle(hidden).sum().backward()
    reached = [parameter.grad is not None for parameter in blocks.parameters()]
    assert reached.count(True) == len(list(middle.parameters()))
    for parameter in blocks.parameters():
        parameter.grad = None
    outputs = [model(input_ids=ids, labels=ids, output_hidden_states=True) for model in (local, remote)]
    weights = torch.randn(7, 2, 6, 32, generator=torch.Generator().manual_seed(4))
    for output in outputs:
        sum((boundary * weight).sum() for boundary, weight in zip(output.hidden_states, weights, strict=True)).backward()
    expected, found = own_parameters(local), own_parameters(remote)
    for name, parameter in found.items():
        assert_close(parameter.grad, expected[name].grad)


def test_dropout_is_drawn_from_torchs_random_numbers(pair: Any) -> None:
    """One seed, one result, whose gradient is that of what was computed; a pass that is run again by a checkpoint leaves out the same."""
    _, remote = adapted(pair, lora_dropout=0.5)
    ids = pair.ids(3, 8)
    remote.train()
    parameters = list(own_parameters(remote).values())
    direction = [torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)) for parameter in parameters]

    def loss(seed: int, distance: float = 0.0) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=distance)
        found = remote(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.sub_(way, alpha=distance)
        return found

    first = loss(0)
    first.backward()
    slope = sum((parameter.grad * way).sum() for parameter, way in zip(parameters, direction, strict=True))
    with torch.no_grad():
        assert loss(0).item() == pytest.approx(first.item(), rel=1e-5)
        assert abs(loss(1).item() - first.item()) > 1e-3
        assert slope.item() == pytest.approx((loss(0, 1e-4) - loss(0, -1e-4)).item() / 2e-4, rel=2e-2)
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(0)
    again = torch.utils.checkpoint.checkpoint(lambda: remote(input_ids=ids, labels=ids).loss, use_reentrant=False)
    again.backward()
    assert all(torch.allclose(parameter.grad, gradient, atol=1e-5) for parameter, gradient in zip(parameters, gradients, strict=True))
    remote.eval()
    with torch.no_grad():
        assert loss(0).item() == loss(1).item() != first.item()


def test_servers_that_have_dropped_it_get_it_again(pair: Any) -> None:
    local, remote = adapted(pair)
    ids = pair.ids(2, 6)

    def drop() -> None:
        for server in pair.servers.servers:
            server.service.loras._entries.clear()

    losses = [model(input_ids=ids, labels=ids).loss for model in (local, remote)]
    pair.servers.call(drop)
    for loss in losses:
        loss.backward()
    for name, parameter in own_parameters(remote).items():
        assert_close(parameter.grad, own_parameters(local)[name].grad)
    pair.servers.call(drop)
    assert torch.equal(remote.generate(ids, max_new_tokens=4), local.generate(ids, max_new_tokens=4))


@pytest.mark.long
def test_beginnings_of_prompts_are_of_one_version(pair: Any) -> None:
    """Servers keep what they have computed of a long prompt, for the same parameters only."""
    local, remote = adapted(pair)
    ids = pair.ids(1, 140)
    for change in (0.0, 0.0, 0.2):
        with torch.no_grad():
            for model in (local, remote):
                for _, parameter in sorted(own_parameters(model).items()):
                    parameter.add_(change)
        assert torch.equal(remote.generate(ids, max_new_tokens=3), local.generate(ids, max_new_tokens=3))


@pytest.mark.long
def test_a_server_is_lost_in_mid_answer(bloom_path: Path, serving: Any, connect: Any) -> None:
    """Whoever takes its place runs with the same parameters."""
    ids = torch.randint(4, 256, (2, 6), generator=torch.Generator().manual_seed(7))
    local = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bloom_path, dtype=torch.float32).eval(), configuration("bloom"))
    fill(local)
    expected = local.generate(ids, max_new_tokens=10)
    with serving(bloom_path, [(0, 2), (2, 4), (4, 6), (2, 4), (4, 6)]) as servers, connect(bloom_path, servers.peers) as model:
        remote = peft.get_peft_model(model, configuration("bloom"))
        fill(remote)
        with remote.inference_session(max_length=32) as session:
            first = remote.generate(ids, max_new_tokens=5, session=session)
            for hop in session.hops[1:]:
                servers.stop(next(server for server in servers.servers if server.peer_id == hop.peer_id))
            rest = remote.generate(None, max_new_tokens=5, session=session)
            assert len(session.recoveries) >= 1
        assert torch.equal(torch.cat([first, rest[:, -5:]], dim=1), expected)
