"""LoRA in spans against PEFT: the same hidden states and gradients, whoever shares the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from petalnet.blocks.adapters import Adapter, Dropout, LoraWeights, Share, apply_adapters, shares_of
from petalnet.blocks.hooks import with_hidden
from petalnet.blocks.kv import KVStore
from petalnet.blocks.packed import SpanStep
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span
from petalnet.models.adapters import AdapterSource
from petalnet.models.anatomy import find_layers
from petalnet.models.checkpoint import ModelSource
from tests.peft_adapters import load_with_peft, save_adapter

Saved = Callable[..., Path]
FAMILIES = ["bloom", "llama", "gpt2"]
IDS = torch.randint(5, 99, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 9, dtype=torch.bool)
MASK[0, :4] = MASK[1, :1] = False
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


class Case:
    """A model with three adapters, as a span and as PEFT has it."""

    def __init__(self, model: Path, family: str, folder: Path) -> None:
        self.model = model
        source = ModelSource.open(model)
        self.span = Span.load(source, 0, 4)
        self.folders = [
            save_adapter(model, folder / "a", family, seed=1),
            save_adapter(model, folder / "b", family, seed=2, use_rslora=True, rank_pattern={"c_attn|q_proj|dense": 2}),
            save_adapter(model, folder / "c", family, seed=3, layers_to_transform=[0, 3]),
        ]
        self.adapters = [
            Adapter({block: {path: LoraWeights(*pair) for path, pair in layers.items()} for block, layers in opened.load(0, 4).items()})
            for opened in (AdapterSource.open(one, source) for one in self.folders)
        ]

    def states(self, number: int | None) -> list[torch.Tensor]:
        """What enters each layer and what leaves the last, with an adapter or none, as the library computes it."""
        loaded = load_with_peft(self.model, self.folders[number or 0])
        states: list[torch.Tensor] = []
        layers = find_layers(loaded.get_base_model()).layers
        for layer in layers:
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: states.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
            )
        layers[-1].register_forward_hook(lambda _, args, output: states.append(output[0] if isinstance(output, tuple) else output))
        with torch.no_grad():
            if number is None:
                with loaded.disable_adapter():
                    loaded(input_ids=IDS)
            else:
                loaded(input_ids=IDS)
        return states


@pytest.fixture(scope="module")
def cases(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    known: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in known:
            known[family] = Case(saved(family), family, tmp_path_factory.mktemp("adapters"))
        return known[family]

    return case


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Iterator[Case]:
    case = cases(str(request.param))
    yield case
    assert not any(module._forward_hooks for block in case.span._blocks[:-1] for module in block.modules()), "hooks are left"


def run(span: Span, hidden: torch.Tensor, *adapters: Adapter, first: int = 0, end: int = 4, **options: object) -> torch.Tensor:
    with torch.inference_mode():
        (output,) = span.forward(hidden, adapters=adapters, first=first, end=end, **options)
    return output


def test_a_pass_has_the_hidden_states_that_peft_computes(case: Case) -> None:
    for number, adapter in enumerate(case.adapters):
        states = case.states(number)
        torch.testing.assert_close(run(case.span, states[0], adapter), states[4], **CLOSE)
        torch.testing.assert_close(run(case.span, states[1], adapter, first=1, end=3), states[3], **CLOSE)
    plain = case.states(None)
    torch.testing.assert_close(run(case.span, plain[0]), plain[4], **CLOSE)
    assert not torch.allclose(case.states(0)[4], plain[4], atol=0.1)


@pytest.mark.parametrize("packs", [True, False])
def test_sessions_of_one_pass_have_an_adapter_each_or_none(case: Case, packs: bool) -> None:
    span = Span.load(ModelSource.open(case.model), 0, 4, may_pack=packs)
    store = KVStore(span.kv_shapes, pages=64, page_tokens=span.backend.page_tokens, dtype=torch.float32, device=span.device)
    pool = PagePool(64, span.backend.page_tokens)
    span.attach(store)
    assert span.packs == packs
    own = Adapter({2: {path: LoraWeights(a * 2, b) for path, (a, b) in case.adapters[1].blocks[2].items()}})
    sets: list[tuple[Adapter, ...]] = [(case.adapters[0],), (), (case.adapters[1],), (case.adapters[0],), (case.adapters[2], own)]
    hidden = case.states(None)[0]
    expected = [run(span, hidden[:2], *adapters) for adapters in sets]
    sessions = []
    for _ in sets:
        rows = Rows(pool, 16)
        rows.resize(2)
        sessions.append(rows)
    for start, end in ((0, 5), (5, 6), (6, 9)):
        steps = []
        for rows, adapters in zip(sessions, sets, strict=True):
            rows.prepare(end - start)
            steps.append(SpanStep(rows, hidden[:2, start:end], adapters=adapters))
        outputs = span.step(steps)
        for rows, (output,), whole in zip(sessions, outputs, expected, strict=True):
            torch.testing.assert_close(output, whole[:, start:end], **CLOSE)
            rows.advance(end - start)


def test_gradients_of_parameters_and_inputs_are_those_that_peft_computes(case: Case) -> None:
    adapter = case.adapters[1]
    loaded = load_with_peft(case.model, case.folders[1], is_trainable=True)
    layers = find_layers(loaded.get_base_model()).layers
    hidden = case.states(1)[0].requires_grad_()
    ends: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(lambda *given: with_hidden(hidden, *given[1:]), with_kwargs=True)
    layers[3].register_forward_hook(lambda *given: ends.append(given[-1][0] if isinstance(given[-1], tuple) else given[-1]))
    loaded(input_ids=IDS)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    modules = [layers[block].get_submodule(path) for block, paths in adapter.blocks.items() for path in paths]
    parameters = [weight for module in modules for weight in (module.lora_A["default"].weight, module.lora_B["default"].weight)]
    *expected, expected_hidden = torch.autograd.grad(ends[0], [*parameters, hidden], direction)
    for number, module in enumerate(modules):  # the wire's B includes the scaling
        expected[2 * number + 1] /= module.scaling["default"]

    applied, leaves = adapter.leaves(0, 4)
    (output,) = case.span.forward(hidden, adapters=[applied])
    *found, found_hidden = torch.autograd.grad(output, [*leaves, hidden], direction)
    for mine, theirs in zip([*found, found_hidden], [*expected, expected_hidden], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_leaves_are_in_the_order_of_the_wire_and_share_memory() -> None:
    blocks = {block: {path: LoraWeights(torch.ones(1, 2), torch.ones(3, 1)) for path in ("z", "a")} for block in (5, 4, 3)}
    applied, leaves = Adapter(blocks).leaves(4, 6)
    assert list(applied.blocks) == [4, 5] and list(applied.blocks[4]) == ["z", "a"]
    assert [leaf.data_ptr() for leaf in leaves] == [
        weight.data_ptr() for block in (4, 5) for pair in blocks[block].values() for weight in pair
    ]
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    assert Adapter(blocks).nbytes == 3 * 2 * 4 * (2 + 3)


def test_dropout_leaves_out_the_same_numbers_however_the_rows_are_cut(case: Case) -> None:
    span, hidden, adapter = case.span, case.states(0)[0], case.adapters[0]
    whole = run(span, hidden, adapter, dropout=Dropout(0.5, seed=7), attention_mask=MASK)
    cut = [
        run(span, hidden[rows], adapter, dropout=Dropout(0.5, seed=7, row=rows.start), attention_mask=MASK[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(torch.cat(cut)[MASK], whole[MASK], **CLOSE)
    through = run(span, run(span, hidden, adapter, end=2, dropout=Dropout(0.5, 7)), adapter, first=2, dropout=Dropout(0.5, 7))
    torch.testing.assert_close(through, run(span, hidden, adapter, dropout=Dropout(0.5, 7)), **CLOSE)
    assert not torch.allclose(run(span, hidden, adapter, dropout=Dropout(0.5, seed=8), attention_mask=MASK)[MASK], whole[MASK], atol=1e-2)


def test_dropout_keeps_the_expected_value_and_the_rate() -> None:
    inputs = torch.ones(4, 100, 50)
    given = Dropout(0.25, seed=1).apply(inputs, 4, 0, "x")
    assert set(given.unique().tolist()) == {0.0, float(torch.ones(()) / 0.75)}
    assert abs(float(given.mean()) - 1) < 0.02
    assert not torch.equal(given[0], given[1])
    assert not torch.equal(given, Dropout(0.25, seed=1).apply(inputs, 4, 1, "x"))
    flat = Dropout(0.25, seed=1).apply(inputs.view(400, 50), 4, 0, "x")  # as some layers see it
    assert torch.equal(flat.view(4, 100, 50), given)


def test_only_the_last_adapter_has_dropout(case: Case) -> None:
    span, hidden = case.span, case.states(0)[0]
    nothing = Adapter({block: {} for block in range(4)})
    with_host_alone = run(span, hidden, case.adapters[0], nothing, dropout=Dropout(0.9, seed=1))
    assert torch.equal(with_host_alone, run(span, hidden, case.adapters[0]))


def test_a_span_in_half_precision_adds_in_float32(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    span = Span.load(ModelSource.open(case.model), 0, 4, dtype=torch.bfloat16)
    states = case.states(0)
    output = run(span, states[0], case.adapters[0])
    assert output.dtype == torch.bfloat16
    plain = run(span, states[0])
    assert float((output - states[4]).norm() / states[4].norm()) < 0.03 < float((plain - states[4]).norm() / states[4].norm())


def test_a_layer_that_sees_tokens_more_or_less_than_once_cannot_have_shares_or_dropout() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adapter = Adapter({0: {"0": LoraWeights(torch.ones(1, 2), torch.ones(2, 1))}})
    for shares, dropout in (([Share([adapter], slice(0, 1))], None), ([Share([adapter])], Dropout(0.5, 1))):
        handles = apply_adapters([(0, layer)], shares, (1, 3), dropout)
        assert layer(torch.ones(1, 3, 2)).shape == (1, 3, 2)
        with pytest.raises(ValueError, match="0 of block 0 does not see each token once"):
            layer(torch.ones(2, 2))
        for handle in handles:
            handle.remove()


def test_shares_of_a_row_are_joined_by_what_they_have() -> None:
    one, other = Adapter({}), Adapter({})
    columns = [(slice(0, 2), (one,)), (slice(2, 3), (one,)), (slice(3, 4), ()), (slice(4, 6), (other,)), (slice(6, 7), (one, other))]
    shares = shares_of(columns, torch.device("cpu"))
    assert [(share.adapters, share.tokens) for share in shares] == [
        ((one,), slice(0, 3)),
        ((other,), slice(4, 6)),
        ((one, other), slice(6, 7)),
    ]
    (share,) = shares_of([(slice(0, 1), (one,)), (slice(3, 5), (one,))], torch.device("cpu"))
    assert isinstance(share.tokens, torch.Tensor) and share.tokens.tolist() == [0, 3, 4]
    assert shares_of([(slice(0, 1), ())], torch.device("cpu")) == []
