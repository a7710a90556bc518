"""A span over two devices against one that has all blocks: the very same numbers. A machine's processor stands in for both devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from petalnet.blocks.adapters import Adapter, Dropout, LoraWeights
from petalnet.blocks.backends import Backend
from petalnet.blocks.emulated import EmulatedBackend
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span, SpanStep
from petalnet.blocks.spread import AnySpan, SpreadSpan
from petalnet.errors import UsageError
from petalnet.models.checkpoint import ModelSource

Saved = Callable[..., Path]
GENERATOR = torch.Generator().manual_seed(11)
X = torch.randn(3, 12, 32, generator=GENERATOR)
PROMPTS = torch.randn(4, 3, 5, 32, generator=GENERATOR)
MASK = torch.ones(3, 12, dtype=torch.bool)
MASK[0, :4] = MASK[1, :1] = False


def pair(folder: Path, counts: Sequence[int] = (3, 1)) -> tuple[Span, SpreadSpan]:
    source = ModelSource.open(folder)
    whole = Span.load(source, 0, 4)
    spread = SpreadSpan.load(source, 0, 4, devices=["cpu"] * len(counts), counts=counts)
    assert isinstance(spread, SpreadSpan)
    return whole, spread


@pytest.fixture(params=["llama", "bloom", "mistral", "falcon", "mixtral"])
def both(request: pytest.FixtureRequest, saved: Saved) -> tuple[Span, SpreadSpan]:
    return pair(saved(request.param))


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def lora_of(span: AnySpan) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    blocks = {}
    for block, shapes in span.linear_shapes.items():
        path, (inputs, outputs) = next(iter(shapes.items()))
        a, b = torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator)
        blocks[block] = {path: LoraWeights(a, b * 0.1)}
    return Adapter(blocks)


def test_passes_and_their_gradients(both: tuple[Span, SpreadSpan]) -> None:
    found: list[list[torch.Tensor]] = []
    for span in both:
        lora, leaves = lora_of(span).leaves(0, 4)
        inputs = [X.clone().requires_grad_(), PROMPTS.clone().requires_grad_(), *leaves]
        outputs = span.forward(inputs[0], attention_mask=MASK, prompts=inputs[1], adapters=[lora], dropout=Dropout(0.2, 7), all_hidden=True)
        gradients = torch.autograd.grad(outputs[-1].square().sum(), inputs)
        (part,) = span.forward(X, first=1, end=3)
        (one,) = span.forward(X, first=3, end=4)
        found.append([*outputs, *gradients, part, one])
    same(found[1], found[0])


def test_sessions(both: tuple[Span, SpreadSpan]) -> None:
    """Rows with padding, prompts and an adapter beside another session; all blocks or some; every output or the last."""
    found: list[list[torch.Tensor]] = []
    for span in both:
        pool = PagePool(16, span.backend.page_tokens)
        span.attach(span.make_store(16))  # type: ignore[arg-type]
        one, other, part = (Rows(pool, 12) for _ in range(3))
        for rows, count in ((one, 3), (other, 1), (part, 2)):
            rows.resize(count)
        outputs: list[torch.Tensor] = []
        for start, end in ((0, 8), (8, 9), (9, 12)):
            for rows in (one, other, part):
                rows.prepare(end - start)
            steps = [
                SpanStep(one, X[:, start:end], mask=MASK[:, :end], prompts=PROMPTS, all_hidden=True, adapters=(lora_of(span),)),
                SpanStep(other, X[:1, start:end]),
            ]
            outputs += [output for step in span.step(steps) for output in step]
            outputs += span.step([SpanStep(part, X[:2, start:end])], 2, 4)[0]
            for rows in (one, other, part):
                rows.advance(end - start)
        found.append(outputs)
    same(found[1], found[0])


def test_what_is_told_of_it(saved: Saved) -> None:
    whole, spread = pair(saved("llama"), (1, 2, 1))
    assert [(stage.first, stage.end) for stage in spread.stages] == [(0, 1), (1, 3), (3, 4)] and whole.stages == [whole]
    for name in ("first", "end", "num_blocks", "hidden_size", "dtype", "device", "packs", "digests", "kv_shapes", "kv_bytes_per_token"):
        assert getattr(spread, name) == getattr(whole, name), name
    for name in ("weight_bytes", "linear_shapes", "max_positions", "score_heads", "takes_position_ids", "quantization"):
        assert getattr(spread, name) == getattr(whole, name), name
    assert len(spread) == len(whole) and len(spread.weights) == len(whole.weights)
    assert spread.batch_key(9, "a") == spread.batch_key(200, "b") and spread.computes_alike(1000)
    store, few = spread.make_store(5), spread.make_store(5, blocks=2)
    assert len(store) == 4 and len(few) == 2 and [len(part) for part in few.parts] == [1, 1, 0]
    assert store.bytes_per_token == spread.kv_bytes_per_token
    assert store.machine_bytes == store.slots * store.bytes_per_token
    for entries in (*store.keys, *store.values):
        entries.zero_()
        entries[store.page_tokens : 2 * store.page_tokens] = 1.0
    store.copy_pages([(1, 4), (0, 1)], 1, 4)
    pages = [entries.unflatten(0, (5, store.page_tokens)) for entries in store.values]
    assert [int(one[4].sum() > 0) for one in pages] == [0, 1, 1, 1] == [int(one[1].sum() == 0) for one in pages]


def test_what_cannot_be_spread(saved: Saved) -> None:
    source = ModelSource.open(saved("llama"))
    spread = SpreadSpan.load(source, 0, 2, devices=["cpu", "cpu"], counts=[1, 1])
    for blocks in ((0, 3), (1, 1), (-1, 1)):
        with pytest.raises(ValueError, match="not within 0:2"):
            spread.forward(X, first=blocks[0], end=blocks[1])
    assert isinstance(SpreadSpan.load(source, 0, 2, devices=["cpu", "cpu"], counts=[0, 2]), Span)
    with pytest.raises(ValueError, match="2 blocks for the devices, and 3 to load"):
        SpreadSpan.load(source, 0, 3, devices=["cpu", "cpu"], counts=[1, 1])
    with pytest.raises(ValueError, match="do not follow one another"):
        SpreadSpan([Span.load(source, 0, 1), Span.load(source, 2, 3)])
    with pytest.raises(UsageError, match="out of range"):
        SpreadSpan.load(source, 3, 5, devices=["cpu", "cpu"], counts=[1, 1])


def test_devices_of_which_only_some_have_the_kernel_for_pages(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two generations: pages are of one size on all of them."""
    backends = [EmulatedBackend(), Backend()]
    monkeypatch.setattr("petalnet.blocks.span.pick_backend", lambda *_: backends.pop())
    span = SpreadSpan.load(ModelSource.open(saved("llama")), 0, 4, devices=["cpu", "cpu"], counts=[2, 2])
    assert not backends and [type(stage.backend) for stage in span.stages] == [Backend, Backend]
    assert span.packs
