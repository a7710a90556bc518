"""LoRA parameters that peers bring: what is refused, what is kept and for how long, over the wire and without it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petalnet.blocks.adapters import Adapter, Dropout, LoraWeights
from petalnet.blocks.lora_store import KEPT_S, LEAST_BYTES, LEAST_PEER_BYTES, MOST_VERSIONS, LoraStore, check_parameters
from petalnet.blocks.span import Span
from petalnet.errors import BusyError, CallerError, LoraGone, MovedError, PetalnetError, TooLargeError
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.pass_messages import Backward, BackwardDone, Forward, ForwardDone, LoraPut, PutLora
from petalnet.p2p.protocols import FORWARD, INFERENCE
from petalnet.p2p.session_messages import Attach, Attached, OpenSession, SessionOpened
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.test_service import END, FIRST, HIDDEN, MODEL, ROW, Served, X, ask, refused, run_step, serving, step, whole

SHAPES = {block: {"x": (3, 5), "y": (5, 3)} for block in (1, 2)}
MODULES = ("self_attn.q_proj", "mlp.down_proj")


def put(ranks: Sequence[Sequence[int]], weights: torch.Tensor | None = None, **fields: object) -> PutLora:
    given = torch.ones(8 * sum(map(sum, ranks))) if weights is None else weights
    usual = {"model": MODEL, "first": 1, "end": 3, "version": "v", "ranks": encode_tensor(torch.tensor(ranks, dtype=torch.int32))}
    return PutLora(**{**usual, "modules": ("x", "y"), "weights": encode_tensor(given), **fields})  # type: ignore[arg-type]


def test_parameters_become_matrices() -> None:
    numbers = torch.arange(8.0 * 6)
    request = put([[2, 1], [0, 3]], numbers)
    check_parameters(request, SHAPES)
    adapter = Adapter.of(request, SHAPES, lambda block: torch.device("cpu"))
    assert {block: list(modules) for block, modules in adapter.blocks.items()} == {1: ["x", "y"], 2: ["y"]}
    a, b = adapter.blocks[1]["x"]
    assert torch.equal(a, numbers[:6].view(2, 3)) and torch.equal(b, numbers[6:16].view(5, 2))
    _, leaves = adapter.leaves(1, 3)
    assert torch.equal(torch.cat([leaf.detach().reshape(-1) for leaf in leaves]), numbers)
    assert adapter.nbytes == numbers.nbytes
    assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in leaves), "what is dropped is held by what is not"


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (put([[1, 1], [1, 1]], first=2, end=2), CallerError, "2:2 are no blocks"),
        (put([[1, 1], [1, 1]], first=2, end=4), MovedError, "blocks 2:4 are not served here, only 1:3"),
        (put([[1, 1], [1, 1]], version=""), CallerError, "need a version"),
        (put([[1, 1], [1, 1]], modules=("x", "x")), CallerError, "named once"),
        (put([[1, 1], [1, 1]], modules=("x", "lm_head")), CallerError, "block 1 has no linear layer 'lm_head'; LoRA can be for x, y"),
        (put([[1, 1]]), CallerError, r"ranks must be int32 \[2, 2\], not int32 \[1, 2\]"),
        (replace(put([[1, 1], [1, 1]]), ranks=encode_tensor(torch.ones(2, 2))), CallerError, r"ranks must be int32 \[2, 2\], not float32"),
        (put([[1, -1], [1, 1]]), CallerError, "ranks are from 0 to 4096, not -1"),
        (put([[1, 4097], [1, 1]], torch.ones(1)), CallerError, "ranks are from 0 to 4096, not 4097"),
        (put([[1, 1], [1, 1]], torch.ones(31)), CallerError, r"need \[32\] parameters, not float32 \[31\]"),
        (put([[1, 1], [1, 1]], torch.ones(4, 8)), CallerError, r"need \[32\] parameters, not float32 \[4, 8\]"),
        (put([[1, 1], [1, 1]], torch.ones(32, dtype=torch.int32)), CallerError, r"need \[32\] parameters, not int32 \[32\]"),
    ],
)
def test_what_does_not_fit_is_refused(request_: PutLora, error: type[PetalnetError], match: str) -> None:
    with pytest.raises(error, match=match):
        check_parameters(request_, SHAPES)


def adapter_of(numbers: int, *blocks: int) -> Adapter:
    """Parameters of so many bytes × 4 for each block."""
    return Adapter({block: {"x": LoraWeights(torch.zeros(1, numbers - 1), torch.zeros(1, 1))} for block in blocks or (0,)})


def test_a_peer_has_its_own_versions() -> None:
    store = LoraStore()
    mine, theirs = adapter_of(10, 0, 1), adapter_of(10, 0, 1)
    store.put("a", "v", mine)
    store.put("b", "v", theirs)
    assert store.get("a", "v", 0, 2) is mine and store.get("b", "v", 1, 2) is theirs
    for peer, version, first, end in (("c", "v", 0, 1), ("a", "w", 0, 1), ("a", "v", 1, 3)):
        with pytest.raises(LoraGone, match=f"LoRA parameters '{version}' for blocks {first}:{end} are not here"):
            store.get(peer, version, first, end)


def test_parts_of_one_version_come_together() -> None:
    store = LoraStore()
    store.put("a", "v", adapter_of(10, 0, 1))
    store.put("a", "v", adapter_of(10, 2))
    assert store.get("a", "v", 0, 3).nbytes == 120 and (len(store), store.nbytes) == (1, 120)
    store.put("a", "v", adapter_of(20, 1))
    assert store.get("a", "v", 0, 3).nbytes == 160 == store.nbytes


def test_what_was_named_longest_ago_goes_first() -> None:
    store = LoraStore()
    for version in range(MOST_VERSIONS):
        store.put("a", f"{version}", adapter_of(10))
    store.get("a", "0", 0, 1)
    store.put("a", "new", adapter_of(10))
    store.get("a", "0", 0, 1)
    with pytest.raises(LoraGone):
        store.get("a", "1", 0, 1)
    assert len(store) == MOST_VERSIONS


def test_a_peer_makes_room_for_itself_before_others_do() -> None:
    store = LoraStore(peer_bytes=100, all_bytes=150)
    store.put("b", "other", adapter_of(10))
    store.put("a", "1", adapter_of(15))
    store.put("a", "2", adapter_of(15))
    assert store.nbytes == 100
    store.get("b", "other", 0, 1)
    with pytest.raises(LoraGone):
        store.get("a", "1", 0, 1)
    store.put("a", "3", adapter_of(10))
    store.put("c", "1", adapter_of(15))  # all together are too much: of all, a's older one goes
    assert store.get("b", "other", 0, 1) and store.get("a", "3", 0, 1) and store.get("c", "1", 0, 1)
    with pytest.raises(LoraGone):
        store.get("a", "2", 0, 1)


def test_what_sessions_hold_counts_until_they_end() -> None:
    store = LoraStore(peer_bytes=100, all_bytes=150)
    store.put("a", "1", adapter_of(20))
    held = store.get("a", "1", 0, 1)
    with pytest.raises(BusyError, match="open sessions take up the memory"):
        store.put("a", "2", adapter_of(20))
    assert store.nbytes == held.nbytes and len(store) == 0
    store.put("b", "1", adapter_of(10))
    del held
    store.put("a", "2", adapter_of(20))
    assert store.nbytes == 120
    with pytest.raises(TooLargeError, match="104 bytes exceed the 100 that this server keeps for a peer"):
        store.put("a", "3", adapter_of(26))


async def test_memory_of_a_device_is_not_filled() -> None:
    """Whatever the bounds are: what is left there is what everybody's passes run in."""
    store = LoraStore(free_bytes=lambda: 1000 - store.nbytes)

    async def take(peer_id: str, version: str, rank: int = 10) -> None:
        await store.take(peer_id, put([[rank, 0], [0, 0]], version=version), SHAPES, lambda block: torch.device("cpu"))

    await take("a", "1")
    await take("b", "1")
    assert store.nbytes == 640
    await take("b", "2")
    assert store.nbytes == 640
    with pytest.raises(LoraGone):
        store.get("a", "1", 1, 3)
    with pytest.raises(BusyError, match="there is no memory for LoRA parameters"):
        await take("a", "1", rank=17)
    held = [store.get("b", version, 1, 3) for version in ("1", "2")]
    with pytest.raises(BusyError, match="open sessions take up the memory"):
        await take("a", "1", rank=12)
    held.clear()
    await take("a", "1", rank=12)


def test_the_peers_of_a_network_leave_room_for_others() -> None:
    """However many they are, and though their sessions hold what they have put."""
    store = LoraStore(peer_bytes=100, all_bytes=200)
    store.put("a", "1", adapter_of(20), "near")
    store.put("b", "1", adapter_of(15), "near")
    held = [store.get("b", "1", 0, 1)]
    store.put("c", "1", adapter_of(15), "near")  # for which a's goes, named longer ago
    assert store.nbytes == 120
    held.append(store.get("c", "1", 0, 1))
    with pytest.raises(BusyError, match="open sessions take up the memory"):
        store.put("d", "1", adapter_of(10), "near")
    store.put("e", "1", adapter_of(10), "far")
    store.put("f", "1", adapter_of(10))
    assert store.nbytes == 200
    held.clear()
    store.put("d", "1", adapter_of(10), "near")


def test_what_nobody_names_is_dropped_in_the_end() -> None:
    now = 0.0
    store = LoraStore(clock=lambda: now)
    store.put("a", "1", adapter_of(10))
    now = KEPT_S + 1
    store.put("b", "1", adapter_of(10))
    assert len(store) == 1 and store.nbytes == 40


def test_bounds_follow_the_size_of_the_blocks() -> None:
    assert (LoraStore.beside(10).peer_bytes, LoraStore.beside(10).all_bytes) == (LEAST_PEER_BYTES, LEAST_BYTES)
    assert (LoraStore.beside(10**9).peer_bytes, LoraStore.beside(10**9).all_bytes) == (5 * 10**8, 10**9)


# ---- over the wire


@pytest.fixture
async def served(saved: Callable[..., Path]) -> AsyncIterator[Served]:
    async with serving(saved("llama")) as running:
        yield running


def lora_of(span: Span, seed: int, version: str) -> tuple[PutLora, Adapter]:
    """Parameters for two layers of each block, as they are sent and as a span takes them."""
    shapes = span.linear_shapes
    ranks = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    count = sum(
        rank * sum(shapes[block][path])
        for block, row in zip((FIRST, FIRST + 1), ranks.tolist(), strict=True)
        for path, rank in zip(MODULES, row, strict=True)
    )
    weights = torch.randn(count, generator=torch.Generator().manual_seed(seed)) / 4
    request = PutLora(MODEL, FIRST, END, version, MODULES, encode_tensor(ranks), encode_tensor(weights))
    return request, Adapter.of(request, shapes, lambda block: torch.device("cpu"))


async def test_passes_and_sessions_with_what_a_peer_has_put(saved: Callable[..., Path]) -> None:
    _, hosted = lora_of(Span.load(ModelSource.open(saved("llama")), FIRST, END), 3, "h")
    async with serving(saved("llama"), adapters={"poet@0123": hosted}) as served:
        request, own = lora_of(served.span, 1, "one")
        async with await served.stream(FORWARD) as passes, await served.stream(INFERENCE) as session, served.session() as plain:
            forward = Forward(MODEL, FIRST, END, encode_tensor(X), adapter="poet@0123", lora="one")
            await refused(passes, forward, "lora_gone", "LoRA parameters 'one' for blocks 1:3 are not here")
            answer = await ask(passes, request)
            assert answer == LoraPut("one")
            expected = whole(served.span, X, adapters=[hosted, own])[0]
            done = await ask(passes, forward)
            assert isinstance(done, ForwardDone)
            torch.testing.assert_close(decode_tensor(done.output), expected, atol=1e-5, rtol=1e-4)
            opened = await ask(session, OpenSession("t", MODEL, FIRST, END, 40, adapter="poet@0123", lora="one"))
            assert isinstance(opened, SessionOpened), opened
            for version in range(MOST_VERSIONS + 1):  # what a session has, it keeps
                assert await ask(passes, lora_of(served.span, version, f"{version}")[0]) == LoraPut(f"{version}")
            await refused(passes, forward, "lora_gone", "'one'")
            torch.testing.assert_close(await run_step(session, X, 0), expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(await run_step(plain, X, 0), whole(served.span, X)[0], atol=1e-5, rtol=1e-4)
            assert served.service.describe()["loras"]["bytes"] == (MOST_VERSIONS + 1) * own.nbytes
        await served.closed()


async def test_gradients_of_what_a_peer_has_put_beside_an_adapter_of_the_host(saved: Callable[..., Path]) -> None:
    direction = torch.randn(X.shape, generator=torch.Generator().manual_seed(4))
    _, hosted = lora_of(Span.load(ModelSource.open(saved("llama")), FIRST, END), 3, "h")
    async with serving(saved("llama"), adapters={"poet@0123": hosted}) as served:
        request, own = lora_of(served.span, 1, "one")
        applied, leaves = own.leaves(FIRST, END)
        hidden = X.clone().requires_grad_()
        (output,) = served.span.forward(hidden, adapters=[hosted, applied], dropout=Dropout(0.3, seed=5, row=2))
        *expected, of_hidden = torch.autograd.grad(output, [*leaves, hidden], direction)
        named = {"adapter": "poet@0123", "lora": "one", "dropout": 0.3, "seed": 5, "row": 2}
        asked = Backward(model=MODEL, first=FIRST, end=END, grad_output=encode_tensor(direction), lora_gradient=True, graph=1)
        async with await served.stream(FORWARD) as passes:
            await ask(passes, request)
            done = await ask(passes, Forward(MODEL, FIRST, END, encode_tensor(X), graph=1, **named))
            assert isinstance(done, ForwardDone) and done.kept
            torch.testing.assert_close(decode_tensor(done.output), output.detach(), atol=1e-5, rtol=1e-4)
            for backward in (asked, replace(asked, graph=0, hidden=encode_tensor(X), **named)):
                found = await ask(passes, backward)
                assert isinstance(found, BackwardDone) and found.grad_hidden is not None and found.grad_lora is not None
                flat = torch.cat([gradient.reshape(-1) for gradient in expected])
                torch.testing.assert_close(decode_tensor(found.grad_lora), flat, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(decode_tensor(found.grad_hidden), of_hidden, atol=1e-4, rtol=1e-4)


async def test_an_adapter_that_is_not_there_and_parameters_that_make_no_sense(served: Served) -> None:
    request, own = lora_of(served.span, 1, "one")
    weights = decode_tensor(request.weights).clone()
    async with await served.stream(FORWARD) as passes, served.session() as session:
        forward = Forward(MODEL, FIRST, END, encode_tensor(X), adapter="poet@0123")
        await refused(passes, forward, "caller", "no adapter 'poet@0123' here; adapters that this server has: none")
        for number in (torch.nan, torch.inf):
            weights[7] = number
            bad = PutLora(MODEL, FIRST, END, "one", MODULES, request.ranks, encode_tensor(weights))
            await refused(passes, bad, "caller", "LoRA parameters must be finite numbers")
        await refused(passes, PutLora("other", FIRST, END, "one", MODULES, request.ranks, request.weights), "moved", "another model")
        served.service.loras.peer_bytes = own.nbytes - 1
        await refused(passes, request, "too_large", "exceed the")
        async with await served.stream(INFERENCE) as other:
            await refused(other, OpenSession("t", MODEL, FIRST, END, 40, lora="one"), "lora_gone", "are not here")
        assert served.service.loras.nbytes == 0 and len(served.service.loras) == 0
        torch.testing.assert_close(await run_step(session, ROW, 0), whole(served.span, ROW)[0], atol=1e-5, rtol=1e-4)


async def test_parameters_with_which_outputs_are_not_finite_are_the_clients_fault(served: Served) -> None:
    request, _ = lora_of(served.span, 1, "one")
    huge = torch.full(request.weights.shape, 3e38)
    async with await served.stream(FORWARD) as passes, await served.stream(INFERENCE) as session:
        await ask(passes, PutLora(MODEL, FIRST, END, "huge", MODULES, request.ranks, encode_tensor(huge)))
        await ask(session, OpenSession("t", MODEL, FIRST, END, 40, lora="huge"))
        await refused(session, step(ROW, 0), "caller", "with the adapter of this session the outputs of step 0 are not finite")


@pytest.mark.parametrize("share", [False, True])
async def test_beginnings_are_found_by_those_with_the_same_adapter_only(saved: Callable[..., Path], share: bool) -> None:
    hidden = torch.randn(1, 65, HIDDEN, generator=torch.Generator().manual_seed(1))
    names = torch.arange(16, dtype=torch.uint8).view(1, 1, 16)
    async with serving(saved("llama"), share_prefixes=share, adapters={"poet@0123": Adapter({})}) as served:
        async with await served.stream(FORWARD) as passes:
            for seed in (1, 2):
                await ask(passes, lora_of(served.span, seed, f"{seed}")[0])
        kinds = [{}, {"adapter": "poet@0123"}, {"lora": "1"}, {"lora": "2"}, {"adapter": "poet@0123", "lora": "1"}]
        for found, known in ((0, "not there yet"), (64, "there")):
            for kind in kinds:
                async with await served.stream(INFERENCE) as session:
                    await ask(session, OpenSession("s", MODEL, FIRST, END, 100, **kind))  # type: ignore[arg-type]
                    assert await ask(session, Attach(encode_tensor(names))) == Attached(found), f"{kind} is {known}"
                    if not found:
                        await run_step(session, hidden, 0, names=names)
                await served.closed()
