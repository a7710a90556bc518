"""Linear layers take the quickest kernel for few rows, and give what the library's give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from petalnet.blocks import linear
from petalnet.blocks.linear import MEASURED_ROWS, FewRowsLinear, quickest_kernels, speed_up_linears
from petalnet.models.cachedir import load_facts

LIBRARY = [1.0] * len(MEASURED_ROWS)
HALF, LITTLE_LESS = [0.5] * len(MEASURED_ROWS), [0.97] * len(MEASURED_ROWS)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[float]]], list[tuple[int, int]]]:
    """`measured(seconds)` sets what measurements find; the list has the shape of each from then on."""

    def set_seconds(seconds: dict[str, list[float]]) -> list[tuple[int, int]]:
        shapes: list[tuple[int, int]] = []

        def measure(shape: tuple[int, int], weights: object) -> dict[str, list[float]]:
            shapes.append(shape)
            return seconds

        monkeypatch.setattr(linear, "_measure", measure)
        return shapes

    return set_seconds


@pytest.fixture(params=["oneDNN", "transposed"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of each kernel that this torch has."""
    name: str = request.param
    if not linear._is_exact(linear._KERNELS[name], torch.randn(8, 8)):
        pytest.skip(f"this torch has no {name} kernel")
    return name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 33), (256, 100), (1024, 512)])
@pytest.mark.parametrize("shape", [(1,), (3,), (8,), (1, 12), (2, 5), (1, 64), (2, 3, 4)])
def test_kernels_are_as_exact_as_the_library(kernel: str, shape: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    hidden = torch.randn(*shape, inputs)
    with torch.inference_mode():
        output = linear._KERNELS[kernel](hidden, layer.weight, layer.bias)
        exact = F.linear(hidden.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert output.shape == (*shape, outputs) and output.is_contiguous() and output.dtype is torch.float32
    assert (output - exact).abs().max() <= 2e-6 * exact.abs().max()
    strided = torch.randn(*shape, 2 * inputs)[..., ::2]
    with torch.inference_mode():
        torch.testing.assert_close(linear._KERNELS[kernel](strided, layer.weight, layer.bias), layer(strided), rtol=1e-4, atol=1e-5)


def test_a_kernel_that_rounds_to_fewer_bits_is_not_taken() -> None:
    def rounded(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(input.bfloat16(), weight.bfloat16()).float()

    def missing(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._no_such_kernel(input, weight, bias)

    weight = torch.randn(64, 256)
    assert linear._is_exact(F.linear, weight)
    assert not linear._is_exact(rounded, weight)
    assert not linear._is_exact(missing, weight)


@given(data=st.data())
def test_no_kernel_is_taken_that_is_not_quicker_at_both_neighbours(data: st.DataObject) -> None:
    times = st.lists(st.floats(0.01, 10.0), min_size=len(MEASURED_ROWS), max_size=len(MEASURED_ROWS))
    seconds = {"library": data.draw(times)} | {
        name: data.draw(times) for name in data.draw(st.sets(st.sampled_from(["oneDNN", "transposed"])))
    }
    chosen = quickest_kernels(seconds)
    assert chosen[0] is None and chosen[1] is None
    for rows, taken in enumerate(chosen):
        near = [index for index in range(len(MEASURED_ROWS)) if MEASURED_ROWS[index] == rows]
        near = near or [sum(measured < rows for measured in MEASURED_ROWS) + offset for offset in (-1, 0)]
        quicker = {
            name
            for name in seconds
            if name != "library" and min(near) >= 0 and all(seconds["library"][i] >= 1.05 * seconds[name][i] for i in near)
        }
        assert (taken is not None) == bool(quicker)
        if taken is not None:
            (name,) = [name for name, kernel in linear._KERNELS.items() if kernel is taken]
            assert name in quicker
            assert sum(seconds[name][i] for i in near) == min(sum(seconds[other][i] for i in near) for other in quicker)


def test_only_plain_layers_change(measured: Callable[..., list[tuple[int, int]]]) -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    measured({"library": LIBRARY, "transposed": HALF})
    plain = nn.Linear(4, 4)
    others = [Own(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, device="meta"), nn.LayerNorm(4)]
    kinds = [type(other) for other in others]
    whole = nn.ModuleList([plain, nn.ModuleList([plain]), *others])
    speed_up_linears(whole)
    assert isinstance(plain, FewRowsLinear)
    assert [type(other) for other in others] == kinds
    speed_up_linears(whole)  # a second time changes nothing
    assert isinstance(plain, FewRowsLinear)


def test_nothing_changes_where_nothing_is_quicker(measured: Callable[..., list[tuple[int, int]]]) -> None:
    measured({"library": LIBRARY, "oneDNN": LITTLE_LESS})
    layer = nn.Linear(4, 4)
    speed_up_linears(nn.Sequential(layer))
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 48, 49, 100])
def test_the_kernel_is_taken_for_few_rows_in_inference_mode(
    rows: int, measured: Callable[..., list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def noted(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(input))
        return F.linear(input, weight, bias)

    monkeypatch.setitem(linear._KERNELS, "oneDNN", noted)
    measured({"library": LIBRARY, "oneDNN": HALF})
    layer, plain = nn.Linear(6, 5), nn.Linear(6, 5)
    plain.load_state_dict(layer.state_dict())
    speed_up_linears(nn.Sequential(layer))
    hidden = torch.randn(rows, 6)
    with torch.inference_mode():
        assert torch.equal(layer(hidden), plain(hidden))
    assert calls == ([rows] if 4 <= rows <= 48 else [])

    calls.clear()
    with_gradient = hidden.clone().requires_grad_()
    layer(with_gradient).sum().backward()
    assert not calls and with_gradient.grad is not None and layer.weight.grad is not None


def test_copies_moves_and_tied_weights_keep_their_meaning(measured: Callable[..., list[tuple[int, int]]], kernel: str) -> None:
    measured({"library": LIBRARY, kernel: HALF})
    first, tied = nn.Linear(6, 6), nn.Linear(6, 6)
    tied.weight = first.weight
    speed_up_linears(nn.ModuleList([first, tied]))
    assert tied.weight is first.weight
    other = copy.deepcopy(first)
    with torch.no_grad():
        other.weight.fill_(0.0)
        other.bias.fill_(3.0)
    hidden = torch.randn(8, 6)
    with torch.inference_mode():
        assert torch.equal(other(hidden), torch.full((8, 6), 3.0))
        before = first(hidden)
        assert before.abs().max() > 0
        half = copy.deepcopy(first).to(torch.bfloat16)
        torch.testing.assert_close(half(hidden.bfloat16()).float(), before, rtol=0.05, atol=0.05)
    assert set(first.state_dict()) == {"weight", "bias"}
    with pytest.raises(RuntimeError), torch.inference_mode():
        first(torch.randn(8, 5))


def test_one_measurement_serves_all_layers_of_a_shape_and_is_remembered(
    measured: Callable[..., list[tuple[int, int]]], cache_folder: Path
) -> None:
    shapes = measured({"library": LIBRARY, "transposed": HALF})

    def block() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32, bias=False))

    speed_up_linears(nn.ModuleList([block(), block()]))
    assert sorted(shapes) == [(8, 32), (32, 8)]
    again = block()
    speed_up_linears(again)
    assert len(shapes) == 2 and all(isinstance(layer, FewRowsLinear) for layer in again)

    for spoilt in ("{}", "[]", '{"library": [1]}', '{"library": [0.1, 0.1, 0.1, 0.1, 0.1], "other": [0.1, 0.1, 0.1, 0.1, 0.1]}'):
        shapes.clear()
        for path in (cache_folder / "linear").iterdir():
            path.write_text(spoilt)
        speed_up_linears(block())
        assert len(shapes) == 2


def test_measurement(cache_folder: Path) -> None:
    layers = nn.ModuleList(nn.Linear(96, 64) for _ in range(3))
    speed_up_linears(layers)
    (path,) = (cache_folder / "linear").iterdir()
    facts = load_facts("linear", path.stem)
    assert linear._is_complete(facts)
    assert {"library", "transposed"} <= set(facts)


@settings(max_examples=20, deadline=None)
@given(threads=st.integers(1, 64), outputs=st.integers(1, 100_000), inputs=st.integers(1, 100_000))
def test_a_bounded_part_of_a_weight_is_measured(threads: int, outputs: int, inputs: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        measured_outputs, measured_inputs = linear._measured_shape(torch.empty(outputs, inputs, device="meta"))
    assert measured_inputs == inputs and 1 <= measured_outputs <= outputs
    assert measured_outputs == 1 or measured_outputs * inputs <= linear.MEASURED_WEIGHTS * threads
