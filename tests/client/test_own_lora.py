"""LoRA of the user's own in remote blocks: PEFT on a distributed model, over real servers, against the local `PeftModel`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

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
