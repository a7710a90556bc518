"""Spans against the library's whole model: the same hidden states at every boundary."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from petalnet.blocks.kv import KVStore
from petalnet.blocks.span import Span
from petalnet.errors import ModelError, UsageError
from petalnet.models.anatomy import find_layers
from petalnet.models.checkpoint import ModelSource

Saved = Callable[..., Path]
FAMILIES = ["bloom", "llama", "mistral", "qwen2", "gemma2", "mixtral", "falcon", "granite", "opt"]
IDS = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(3, 12, dtype=torch.bool)
LEFT[0, :4] = LEFT[1, :1] = False
RIGHT = LEFT.flip(1)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class Reference:
    """The library's model; `run` returns what enters each layer and what leaves the last: [layers + 1] tensors."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self.states: list[torch.Tensor] = []
        layers = find_layers(self.model).layers
        for layer in layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)

    def _enter(self, module: Any, args: Any, kwargs: Any) -> None:
        self.states.append(args[0] if args else kwargs["hidden_states"])

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def run(self, ids: torch.Tensor, *, positions: torch.Tensor | None = None, **kwargs: Any) -> tuple[list[torch.Tensor], Any]:
        self.states = []
        if positions is not None and self.takes_positions:
            kwargs["position_ids"] = positions
        with torch.no_grad():
            output = self.model(ids, **kwargs)
        return self.states, output


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(folder: Path, *ranges: tuple[int, int]) -> list[Span]:
    return [Span.load(ModelSource.open(folder), first, end) for first, end in ranges]


def run(spans: list[Span], hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        for span in spans:
            (hidden,) = span.forward(hidden, **kwargs)
    return hidden


def test_a_pass_without_a_past(family: str, saved: Saved) -> None:
    states, _ = Reference(saved(family)).run(IDS)
    spans = load(saved(family), (0, 1), (1, 4))
    torch.testing.assert_close(run(spans, states[0]), states[4], **CLOSE)


def test_all_boundaries_and_parts_of_a_span(family: str, saved: Saved) -> None:
    states, _ = Reference(saved(family)).run(IDS)
    (span,) = load(saved(family), (1, 4))
    with torch.no_grad():
        for first, end in [(1, 4), (2, 3), (2, 4), (1, 2), (1, 4)]:
            outputs = span.forward(states[first], first=first, end=end, all_hidden=True)
            for found, expected in zip(outputs, states[first + 1 : end + 1], strict=True):
                torch.testing.assert_close(found, expected, **CLOSE)


def test_right_padding(family: str, saved: Saved) -> None:
    states, _ = Reference(saved(family)).run(IDS, attention_mask=RIGHT.long())
    found = run(load(saved(family), (0, 2), (2, 4)), states[0], attention_mask=RIGHT)
    torch.testing.assert_close(found[RIGHT], states[4][RIGHT], **CLOSE)


def test_gradients(family: str, saved: Saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(family)).eval()
    layers = find_layers(model).layers
    edges: list[torch.Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> Any:
        edges.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((edges[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edges[0]})

    layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    layers[-1].register_forward_hook(lambda m, args, output: edges.append(output[0] if isinstance(output, tuple) else output))
    model(IDS, use_cache=False)
    weights = torch.randn(edges[1].shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad((edges[1] * weights).sum(), [edges[0]])
    hidden = start = edges[0].detach().clone().requires_grad_()
    for span in load(saved(family), (0, 2), (2, 4)):
        (hidden,) = span.forward(hidden)
    (found,) = torch.autograd.grad((hidden * weights).sum(), [start])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_prompts_reach_the_first_positions_of_every_block(saved: Saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama")).eval()
    prompts = torch.randn(4, 3, 5, 32)
    states: list[torch.Tensor] = []
    layers = find_layers(model).layers
    for layer, prompt in zip(layers, prompts, strict=True):

        def enter(module: Any, args: Any, prompt: torch.Tensor = prompt) -> Any:
            states.append(args[0])
            changed = args[0].clone()
            changed[:, :5] += prompt
            return (changed, *args[1:])

        layer.register_forward_pre_hook(enter)
    layers[-1].register_forward_hook(lambda m, args, output: states.append(output))
    with torch.no_grad():
        model(IDS)
    spans = load(saved("llama"), (0, 4))
    assert isinstance(spans[0], Span)
    torch.testing.assert_close(run(spans, states[0], prompts=prompts), states[4], **CLOSE)


def test_rotary_tables_follow_each_session(saved: Saved) -> None:
    """Dynamic scaling picks its table by the longest position so far: a long session must not change a short one's."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = saved("llama", max_position_embeddings=8, rope_parameters=scaling)
    spans = load(folder, (0, 4))
    long_states, _ = Reference(folder).run(IDS[:1])
    short_states, _ = Reference(folder).run(IDS[:1, :9])
    torch.testing.assert_close(run(spans, long_states[0]), long_states[4], **CLOSE)
    torch.testing.assert_close(run(spans, short_states[0]), short_states[4], **CLOSE)
    torch.testing.assert_close(run(spans, long_states[0]), long_states[4], **CLOSE)


def test_other_dtypes(saved: Saved) -> None:
    states, _ = Reference(saved("llama")).run(IDS)
    span = Span.load(ModelSource.open(saved("llama")), 0, 4, dtype=torch.bfloat16)
    (found,) = span.forward(states[0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), states[4], atol=0.15, rtol=0.1)


def test_only_the_spans_tensors_are_read(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    tensors = load_file(saved("llama") / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.2." in name}, tmp_path / "model.safetensors")
    states, _ = Reference(saved("llama")).run(IDS)
    (span,) = load(tmp_path, (2, 3))
    torch.testing.assert_close(run([span], states[2]), states[3], **CLOSE)
    assert span.weight_bytes == sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.2." in name)
    with pytest.raises(ModelError, match=r"lacks the tensor layers.1.input_layernorm.weight and 8 more"):
        load(tmp_path, (1, 3))


def test_what_a_position_takes_is_what_a_store_takes(family: str, saved: Saved) -> None:
    (span,) = load(saved(family), (1, 4))
    store = KVStore(span.kv_shapes, pages=2, page_tokens=8, dtype=span.dtype, device=span.device)
    assert len(store) == 3
    assert store.bytes_per_token == span.kv_bytes_per_token > 0


@pytest.mark.parametrize("blocks", [(0, 5), (2, 2), (3, 1), (-1, 2), (7, 9)])
def test_blocks_out_of_range(saved: Saved, blocks: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"blocks {blocks[0]}:{blocks[1]} are out of range: .* has 4 blocks, 0:4"):
        load(saved("bloom"), blocks)
    (span,) = load(saved("bloom"), (1, 3))
    with pytest.raises(ValueError, match="not within 1:3"):
        span.forward(torch.zeros(1, 1, 32), first=0, end=2)


def test_digests_name_the_blocks(saved: Saved) -> None:
    whole, part = load(saved("llama"), (0, 4), (1, 3))
    assert part.digests == whole.digests[1:3]
    assert len(set(whole.digests)) == 4
