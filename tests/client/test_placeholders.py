"""What PEFT finds in remote blocks, without servers: names, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from petalnet.client.placeholders import placeholders
from petalnet.client.remote import RemoteSequential, local_modules
from petalnet.client.requests import Target
from petalnet.client.settings import ClientSettings
from petalnet.models.anatomy import find_layers
from petalnet.models.loading import construct

peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Any, Callable[[], Any], list[str]]] = {
    "bloom": (BloomForCausalLM, lambda: BloomConfig(vocab_size=40, hidden_size=32, n_layer=3, n_head=4), ["query_key_value"]),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SIZES, num_key_value_heads=2), ["q_proj", "down_proj"]),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4), ["c_attn", "c_proj"]),
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2), ["q_proj", "v_proj"]),
}


def distributed(family: str) -> tuple[Any, RemoteSequential]:
    """A model whose blocks are nowhere, and these."""
    model_class, config, _ = FAMILIES[family]
    model = construct(model_class, config(), torch.float32)
    layers = find_layers(model)
    target = Target(swarm=None, model="m", first=0, end=len(layers.layers), settings=ClientSettings())  # type: ignore[arg-type]
    blocks = RemoteSequential(target, 32)
    blocks.hold(placeholders(layers.layers, torch.device("cpu")))
    layers.replace(blocks)
    return model.to_empty(device="cpu"), blocks


def with_adapter(family: str, **options: Any) -> tuple[Any, RemoteSequential]:
    model, blocks = distributed(family)
    targets = options.pop("target_modules", FAMILIES[family][2])
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options)), blocks


def own_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("family", "targets"),
    [(family, targets) for family in FAMILIES for targets in ("some", "all-linear") if (family, targets) != ("mixtral", "all-linear")],
)
def test_parameters_are_those_of_the_local_model(family: str, targets: str) -> None:
    """By name, shape and, from one seed, by value."""
    model_class, config, some = FAMILIES[family]
    found = []
    for model in (distributed(family)[0], model_class(config())):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=some if targets == "some" else targets))
        found.append(own_parameters(adapted))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(parameter, found[1][name]) for name, parameter in found[0].items())


def test_the_library_and_peft_give_the_same_names() -> None:
    model, blocks = distributed("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), model)
    assert set(own_parameters(model)) == {
        f"model.layers.{block}.self_attn.q_proj.lora_{part}.default.weight" for block in range(3) for part in "AB"
    }
    assert own_parameters(model).keys() == {f"model.layers.{name}" for name in own_parameters(blocks)}


def test_what_is_not_here_takes_no_part() -> None:
    model, blocks = distributed("bloom")
    assert blocks.lora() is None and blocks.lora_fingerprint() is None
    assert not list(blocks.parameters()) and not list(blocks.buffers()) and not blocks.state_dict()
    assert not [name for name in model.state_dict() if ".h." in name]
    assert len(list(local_modules(model))) < 10 < len(list(model.modules()))
    linear = blocks[1].get_submodule("0.self_attention.query_key_value")
    assert (linear.in_features, linear.out_features, linear.weight.shape, linear.weight.device.type) == (32, 96, (96, 32), "cpu")
    model.half()
    assert linear.weight.dtype == torch.float16
    uses: list[Callable[[], object]] = [
        lambda: linear(torch.zeros(1, 32)), lambda: linear.weight + 1, lambda: linear.weight.data.add_(1),
        lambda: setattr(linear.weight, "data", torch.zeros(96, 32)), lambda: setattr(linear, "weight", torch.zeros(96, 32)),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match="are on servers"):
            use()


def test_blocks_share_what_stands_for_them() -> None:
    model, blocks = with_adapter("llama")
    whole, numbers = blocks.lora() or pytest.fail("nothing was found")
    part, of_part = blocks[1:][1:3].lora() or pytest.fail("nothing was found")
    assert torch.equal(part.weights, whole.part(2, 3)) and (part.first, part.end) == (2, 3)
    of_part.sum().backward()
    names = [name for name, parameter in blocks.named_parameters() if parameter.grad is not None]
    assert names and all(name.startswith("2.") for name in names)
    copied = copy.deepcopy(blocks)
    with torch.no_grad():
        next(iter(blocks.parameters())).add_(1)
    assert (copied.lora() or pytest.fail())[0].version == whole.version != (blocks.lora() or pytest.fail())[0].version
    assert model.training == blocks.training and not numbers.isnan().any()


def test_copies_for_other_processes() -> None:
    _, blocks = with_adapter("llama")
    bare = list(blocks.children())
    again = pickle.loads(pickle.dumps(bare))
    other = RemoteSequential(blocks.target, 32, bare=again)
    assert (other.lora() or pytest.fail())[0].version == (blocks.lora() or pytest.fail())[0].version


def test_only_active_adapters_count() -> None:
    model, blocks = with_adapter("llama")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    first, marks = blocks.lora(), {blocks.lora_fingerprint()}
    model.set_adapter("other")
    second = blocks.lora()
    marks.add(blocks.lora_fingerprint())
    model.base_model.set_adapter(["default", "other"])
    both = blocks.lora()
    marks.add(blocks.lora_fingerprint())
    with model.disable_adapter():
        assert blocks.lora() is None
        marks.add(blocks.lora_fingerprint())
    assert first is not None and second is not None and both is not None
    assert [found[0].ranks[0].tolist() for found in (first, second, both)] == [[4, 4], [2], [4, 6]]
    assert len(marks) == 4 and blocks.lora_fingerprint() in marks
    model.unload()
    assert blocks.lora() is None


def test_a_changed_parameter_is_noticed() -> None:
    _, blocks = with_adapter("llama")
    parameter = next(iter(blocks.parameters()))
    before = blocks.lora_fingerprint()
    assert blocks.lora_fingerprint() == before
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert blocks.lora_fingerprint() != before


def test_dropout_is_for_training() -> None:
    model, blocks = with_adapter("llama", lora_dropout=0.25)
    assert (blocks.lora() or pytest.fail())[0].dropout == 0.25
    model.eval()
    assert (blocks.lora() or pytest.fail())[0].dropout == 0.0
    model.train()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="must have the same lora_dropout"):
        blocks.lora()


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"target_modules": "all-linear", "family": "mixtral"},
        {"target_modules": ["input_layernorm"]},
    ],
    ids=str,
)
def test_what_needs_the_weights_is_refused_at_once(options: dict[str, Any]) -> None:
    options = dict(options)
    with pytest.raises(ValueError, match="are on servers|mlp.gate.weight is no linear module|is not supported") as raised:
        with_adapter(options.pop("family", "llama"), **options)
    assert "\n" not in str(raised.value)


def test_merging_is_refused() -> None:
    model, _ = with_adapter("llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="are on servers"):
            merge()


def test_what_servers_do_not_know_is_refused_before_a_pass() -> None:
    model, blocks = distributed("llama")
    tuned = peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="block 0, self_attn.k_proj is wrapped by peft's Linear"):
        blocks.lora()
    with tuned.disable_adapter():
        assert blocks.lora() is None
    _, blocks = with_adapter("llama", modules_to_save=["input_layernorm"])
    with pytest.raises(ValueError, match="ModulesToSaveWrapper"):
        blocks.lora()
    with pytest.warns(UserWarning, match="lora_bias"):
        _, blocks = with_adapter("llama", lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True"):
        blocks.lora()
    _, blocks = with_adapter("llama")
    blocks[0].get_submodule("0.self_attn.q_proj").register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="take no adapter_names"):
        blocks.lora()


def test_parameters_that_are_no_numbers_are_refused() -> None:
    _, blocks = with_adapter("llama")
    with torch.no_grad():
        blocks.get_submodule("1.mlp.down_proj.lora_B.default").weight[3, 1] = torch.nan
    with pytest.raises(ValueError, match="block 1, mlp.down_proj are not finite"):
        blocks.lora()
