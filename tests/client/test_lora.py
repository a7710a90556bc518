"""LoRA parameters as one flat tensor: what is folded, where it lies, and by what it is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.client.lora import Adapted, Lora, Pair, fold
from petalnet.p2p.tensors import decode_tensor

FIRST, END = 3, 7
SHAPES = {"attention.query": (4, 6), "mlp.up": (4, 8), "mlp.down": (8, 4)}
"""(in, out) of the modules of a block."""


@st.composite
def adapted_modules(draw: st.DrawFn) -> list[Adapted]:
    """What some modules of some blocks get from one or two adapters, in any order."""
    places = [(block, path) for block in range(FIRST, END) for path in SHAPES]
    chosen = draw(st.lists(st.sampled_from(places), unique=True, max_size=len(places)))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16])
    entries = []
    for block, path in chosen:
        inputs, outputs = SHAPES[path]
        pairs = []
        for rank in draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)):
            generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
            dtype = draw(dtypes)
            a, b = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((rank, inputs), (outputs, rank)))
            pairs.append(Pair(a, b, draw(st.sampled_from([0.5, 1.0, 2.0]))))
        entries.append(Adapted(block, path, tuple(pairs)))
    return entries


def unfolded(lora: Lora, weights: torch.Tensor, first: int, end: int) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """A and B of the modules of some blocks, from their numbers as they stand in a message."""
    found, start = {}, 0
    for block in range(first, end):
        for path, rank in zip(lora.modules, lora.ranks[block - lora.first].tolist(), strict=True):
            if rank:
                inputs, outputs = SHAPES[path]
                middle, stop = start + rank * inputs, start + rank * (inputs + outputs)
                found[block, path] = weights[start:middle].view(rank, inputs), weights[middle:stop].view(outputs, rank)
                start = stop
    assert start == len(weights)
    return found


@given(adapted_modules(), st.integers(FIRST, END - 1), st.integers(1, END - FIRST))
@settings(max_examples=60, deadline=None)
def test_what_servers_get_is_what_adapters_add(entries: list[Adapted], first: int, blocks: int) -> None:
    end = min(first + blocks, END)
    lora, numbers = fold(entries, "m", FIRST, END)
    assert torch.equal(lora.weights, numbers) and not lora.weights.requires_grad
    message = lora.message(first, end)
    assert (message.model, message.first, message.end, message.version) == ("m", first, end, lora.version)
    assert decode_tensor(message.ranks).tolist() == lora.ranks[first - FIRST : end - FIRST].tolist()
    found = unfolded(lora, decode_tensor(message.weights), first, end)
    wanted = {(entry.block, entry.path): entry for entry in entries if first <= entry.block < end}
    assert found.keys() == wanted.keys() and lora.touches(first, end) == bool(wanted)
    for place, (a, b) in found.items():
        change = sum(scaling * (b.float() @ a.float()) for a, b, scaling in wanted[place].pairs)
        assert torch.allclose(b @ a, change, atol=1e-5)


@given(adapted_modules())
@settings(max_examples=30, deadline=None)
def test_gradients_reach_the_parameters(entries: list[Adapted]) -> None:
    """As they would with each module's B · A computed from the parameters themselves."""
    lora, numbers = fold(entries, "m", FIRST, END)
    parameters = [tensor for entry in entries for pair in entry.pairs for tensor in pair[:2]]
    folded = [(b @ a).square().sum() for a, b in unfolded(lora, numbers, FIRST, END).values()]
    plain = [sum(s * (b.float() @ a.float()) for a, b, s in entry.pairs).square().sum() for entry in entries]
    if parameters:
        found, expected = (torch.autograd.grad(sum(losses), parameters) for losses in (folded, plain))
        assert all(torch.allclose(one, other, rtol=2e-2, atol=1e-3) for one, other in zip(found, expected, strict=True))


@given(adapted_modules(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_a_version_stands_for_the_numbers_and_their_places(entries: list[Adapted], random: object) -> None:
    version = fold(entries, "m", FIRST, END)[0].version
    shuffled = list(entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fold(shuffled, "m", FIRST, END)[0].version == version
    assert fold(entries, "m", FIRST, END, dropout=0.5)[0].version == version  # that is said by each pass
    if entries:
        block, path, ((a, b, scaling), *others) = entries[0]
        changed = [Adapted(block, path, (Pair(a, b * 1.25, scaling), *others)), *entries[1:]]
        assert fold(changed, "m", FIRST, END)[0].version != version
        moved = [entry._replace(block=entry.block + 1) for entry in entries]
        assert fold(moved, "m", FIRST, END + 1)[0].version != fold(entries, "m", FIRST, END + 1)[0].version


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(torch.zeros(2, 4), torch.zeros(6, 3))], "have the shapes"),
        ([(torch.zeros(2, 4), torch.zeros(6, 2)), (torch.zeros(2, 5), torch.zeros(6, 2))], "do not fit together"),
        ([(torch.zeros(5000, 4), torch.zeros(6, 5000))], "have rank 5000; 4096 is possible"),
        ([(torch.full((2, 4), torch.inf), torch.zeros(6, 2))], "block 3, attention.query are not finite"),
    ],
)
def test_what_cannot_be(pairs: list[tuple[torch.Tensor, torch.Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold([Adapted(3, "attention.query", tuple(Pair(a, b, 1.0) for a, b in pairs))], "m", FIRST, END)


def test_too_many_kinds_of_modules() -> None:
    pair = Pair(torch.zeros(1, 4), torch.zeros(6, 1), 1.0)
    with pytest.raises(ValueError, match="65 kinds of modules"):
        fold([Adapted(3, f"experts.{number}", (pair,)) for number in range(65)], "m", FIRST, END)


def test_blocks_that_are_not_there() -> None:
    lora, _ = fold([], "m", FIRST, END)
    with pytest.raises(ValueError, match="for blocks 3:7, not for 2:4"):
        lora.part(2, 4)
