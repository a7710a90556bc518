"""Blocks in int8 and nf4: against the same blocks with the weights that those stand for, in every way that blocks are used."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from petalnet.blocks.adapters import Adapter, LoraWeights
from petalnet.blocks.graphs import Graph, GraphStore
from petalnet.blocks.quantization import GROUP, Int8Linear, NF4Linear, QuantizedLinear, require_quantization, stored_bytes
from petalnet.blocks.span import Span
from petalnet.errors import UsageError
from petalnet.models.checkpoint import ModelSource
from tests.blocks.conftest import LAYERS

KINDS = {"int8": Int8Linear, "nf4": NF4Linear}
NF4_STEPS = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)
"""The numbers of the data type NF4, of appendix E of QLoRA (arXiv:2305.14314)."""


@pytest.fixture(scope="module", autouse=True)
def _bitsandbytes() -> None:
    require_quantization("nf4")


def rounded(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> QuantizedLinear:
    """A layer with this weight, [out, in]."""
    layer = KINDS[kind](nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"))
    layer.weight = layer.take_weight(weight)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def with_plain_layers(span: Span) -> Span:
    """The same span with ordinary layers of the weights that its layers stand for."""
    plain = copy.deepcopy(span)
    for block in plain._blocks:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, QuantizedLinear):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                linear.weight, linear.bias = nn.Parameter(layer.dequantized(span.dtype)), layer.bias
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, linear)
    return plain


shapes = st.tuples(st.integers(1, 150), st.integers(1, 150))


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_int8_is_within_half_a_step(shape: tuple[int, int], seed: int, name: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, name))
    weight[0] = 0
    error = (rounded("int8", weight).dequantized(torch.float32) - weight).abs()
    largest = weight.float().abs().amax(1, keepdim=True)
    assert bool((error <= largest * (0.5 / 127 + 2e-3)).all()) and not error[0].any()


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_nf4_is_the_nearest_step_of_its_group(shape: tuple[int, int], seed: int, name: str) -> None:
    """Also where groups go on over the ends of rows, for which a kernel has to be told of other rows."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, name))
    flat = F.pad(weight.float().flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
    largest = flat.abs().amax(1, keepdim=True)
    nearest = (flat / largest.clamp(min=1e-30))[..., None].sub(NF4_STEPS).abs().argmin(-1)
    expected = (NF4_STEPS[nearest] * largest).flatten()[: weight.numel()].view(shape)
    whole = rounded("nf4", weight).dequantized(torch.float32)
    steps_off = (whole - expected).abs() > 1e-5
    assert steps_off.float().mean() < 0.01, "but for what lies between two"
    torch.testing.assert_close(whole[~steps_off], expected[~steps_off], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_weight_are_rounded_as_the_whole_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(200, 96, dtype=torch.bfloat16)
    whole = rounded(kind, weight)
    monkeypatch.setattr("petalnet.blocks.quantization.PIECE", 1)
    pieces = rounded(kind, weight)
    assert torch.equal(whole.weight, pieces.weight) and torch.equal(whole.scales, pieces.scales)
    assert torch.equal(whole.dequantized(torch.float32)[128:192], whole.dequantized(torch.float32, 128, 192))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_multiplies_by_what_its_weight_stands_for(kind: str, rows: int, dtype: torch.dtype) -> None:
    """The same numbers whether a graph is made or not, and whatever else is in the pass."""
    weight, bias = torch.randn(130, 96), torch.randn(130).to(dtype)
    layer = rounded(kind, weight, bias)
    hidden = torch.randn(2, rows, 96).to(dtype)
    exact = F.linear(hidden.double(), layer.dequantized(torch.float32).double(), bias.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    with torch.inference_mode():
        output = layer(hidden)
    assert output.dtype == dtype and output.shape == (2, rows, 130)
    assert float((output - exact).norm() / exact.norm()) < tolerance
    leaf = hidden.clone().requires_grad_()
    graphed = layer(leaf)
    torch.testing.assert_close(graphed.detach(), output)
    gradient = torch.randn(2, rows, 130).to(dtype)
    (found,) = torch.autograd.grad(graphed, leaf, gradient)
    expected = gradient.double() @ layer.dequantized(torch.float32).double()
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [40, 64, 100])
def test_a_layer_takes_rows_of_any_length_wherever_they_lie_in_memory(kind: str, size: int) -> None:
    """Kernels that want neither must not be given them: they read past the end, or end the process."""
    layer = rounded(kind, torch.randn(33, size))
    wide = torch.randn(2, 3, 2 * size + 8, dtype=torch.bfloat16)
    for hidden in (wide[..., 8 : size + 8], wide[:, :1, 4 : size + 4], wide[0, :, :size].t().contiguous().t(), wide[0, :0, :size]):
        with torch.inference_mode():
            output = layer(hidden).float()
        exact = F.linear(hidden.float(), layer.dequantized(torch.float32))
        torch.testing.assert_close(output, exact, atol=3e-2 * size**0.5, rtol=3e-2)


@pytest.mark.parametrize("bias", [None, torch.randn(70)])
def test_the_kernel_of_gpus_is_told_the_same(bias: torch.Tensor | None) -> None:
    layer = rounded("nf4", torch.randn(70, 2 * GROUP), bias)
    for shape in ((1, 1, 2 * GROUP), (1, 5, 2 * GROUP)):
        input = torch.randn(shape)
        torch.testing.assert_close(layer.multiply_rounded(input), layer.multiply(input), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transposed_weight(kind: str) -> None:
    library = Conv1D(48, 32)
    layer = KINDS[kind](library.to("meta"))
    weight = torch.randn(32, 48)
    layer.weight = layer.take_weight(weight)
    assert torch.equal(layer.dequantized(torch.float32), rounded(kind, weight.t().contiguous()).dequantized(torch.float32))
    assert (layer.in_features, layer.out_features) == (32, 48)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "falcon", "gemma2", "mixtral", "gpt_oss", "phi3"])
def test_a_span(saved: Callable[..., Path], family: str, kind: str) -> None:
    source = ModelSource.open(saved(family))
    span = Span.load(source, 1, 3, quantization=kind)
    exact = Span.load(source, 1, 3)
    layers = {path: layer for path, layer in span._blocks[0].named_modules() if isinstance(layer, QuantizedLinear)}
    others = [path for path, layer in span._blocks[0].named_modules() if type(layer) in (nn.Linear, Conv1D)]
    assert layers and not others, "none is left"
    assert not any("gate" in path.split(".") or "router" in path for path in layers)
    assert span.quantization == kind and span.weight_bytes < exact.weight_bytes
    assert span.linear_shapes == exact.linear_shapes, "which is what LoRA goes by"
    assert sum(stored_bytes(block, torch.float32) for block in span._blocks) == sum(
        weight.nbytes for block in span._blocks for weight in (*block.parameters(), *(b for n, b in block.named_buffers() if "scales" in n))
    )
    plain = with_plain_layers(span)
    hidden = torch.randn(2, 6, span.hidden_size)
    with torch.inference_mode():
        (output,), (expected,), (unrounded,) = span.forward(hidden), plain.forward(hidden), exact.forward(hidden)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    off = float((output - unrounded).norm() / (unrounded - hidden).norm())
    assert 1e-4 < off < {"int8": 0.1, "nf4": 0.6}[kind], off


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_inputs_and_of_lora(saved: Callable[..., Path], kind: str) -> None:
    source = ModelSource.open(saved("llama"))
    span = Span.load(source, 0, LAYERS, quantization=kind)
    plain = with_plain_layers(span)
    torch.manual_seed(1)
    path = "self_attn.q_proj"
    lora = Adapter({number: {path: LoraWeights(torch.randn(3, 32) / 6, torch.randn(32, 3) / 6)} for number in range(LAYERS)})
    found = []
    for one in (span, plain):
        hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        adapter, leaves = lora.leaves(0, LAYERS)
        (output,) = one.forward(hidden, adapters=[adapter])
        found.append(torch.autograd.grad(output.square().mean(), [hidden, *leaves]))
    for mine, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, atol=1e-6 + 1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_a_kept_graph_holds_no_weights(saved: Callable[..., Path]) -> None:
    span = Span.load(ModelSource.open(saved("llama")), 0, LAYERS, quantization="nf4")
    plain = with_plain_layers(span)
    taken = []
    for one in (span, plain):
        for weight in one.weights:
            weight.requires_grad_(False)
        store = GraphStore(one.weights, free=Graph.free)
        graph = store.begin(Graph("peer", 1, 0, LAYERS, (2, 5, 32), "float32"))
        assert graph is not None
        with store.recording(graph):
            one.forward(torch.randn(2, 5, 32).requires_grad_())
        taken.append(graph.bytes)
    assert taken[0] <= taken[1]


def test_each_weight_is_rounded_before_the_next_is_read(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, tuple[int, ...]]] = []
    read, take = ModelSource.read_copy, QuantizedLinear.take_weight

    def noted_read(source: ModelSource, name: str) -> torch.Tensor:
        tensor = read(source, name)
        if tensor.ndim == 2:
            events.append(("read", tuple(tensor.shape)))
        return tensor

    def noted_take(layer: QuantizedLinear, weight: torch.Tensor) -> nn.Parameter:
        events.append(("rounded", tuple(weight.shape)))
        return take(layer, weight)

    monkeypatch.setattr(ModelSource, "read_copy", noted_read)
    monkeypatch.setattr(QuantizedLinear, "take_weight", noted_take)
    span = Span.load(ModelSource.open(saved("llama")), 1, 3, dtype=torch.bfloat16, quantization="int8")
    assert len(events) == 2 * 2 * 7 and events[::2] == [("read", shape) for _, shape in events[1::2]]
    kinds = {weight.dtype for block in span._blocks for weight in block.parameters()}
    assert kinds == {torch.int8, torch.bfloat16}, "the rest is in the dtype that was asked for"


def test_what_speeds_up_linear_layers_leaves_these_alone(saved: Callable[..., Path]) -> None:
    span = Span.load(ModelSource.open(saved("llama")), 0, 1, quantization="int8")
    span.speed_up()
    assert {type(layer) for layer in span._blocks[0].modules() if isinstance(layer, nn.Linear)} == {Int8Linear}


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    require_quantization("none")
    with pytest.raises(UsageError, match="--quantization nf4 needs bitsandbytes, which cannot be imported .*leave --quantization out"):
        require_quantization("nf4")
    with pytest.raises(UsageError, match="unknown quantization 'int4'"):
        require_quantization("int4")
