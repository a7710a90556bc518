"""Passes by rounds of some blocks, with a kept graph, computed anew and frugally: all held against autograd through the library's pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from petalnet.blocks.adapters import Adapter, LoraWeights
from petalnet.blocks.gradients import BackwardAnswer
from petalnet.blocks.graphs import Graph, GraphStore
from petalnet.blocks.passes import CHUNK_TOKENS, ForwardWork, FrugalBackwardWork, KeptBackwardWork, PassWork, RecordingWork, chunks_of
from petalnet.blocks.span import Span
from petalnet.errors import GraphGone
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.fields import Blob
from petalnet.p2p.pass_messages import Backward, Forward
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.spans import DEVICES

pytestmark = DEVICES

HIDDEN, FIRST, END, ROWS, LENGTH = 32, 1, 4, 4, 20
GENERATOR = torch.Generator().manual_seed(3)
X, GRADIENT = (torch.randn(ROWS, LENGTH, HIDDEN, generator=GENERATOR) for _ in range(2))
PROMPTS = torch.randn(END - FIRST, ROWS, 3, HIDDEN, generator=GENERATOR)
MASK = torch.ones(ROWS, LENGTH, dtype=torch.bool)
MASK[2, :7] = MASK[0, 15:] = False
GIVEN: dict[str, Any] = {"hidden": encode_tensor(X), "mask": encode_tensor(MASK), "prompts": encode_tensor(PROMPTS)}
PATHS = {"bloom": ("self_attention.query_key_value", "mlp.dense_h_to_4h"), "llama": ("self_attn.q_proj", "mlp.down_proj")}


def load(folder: Path) -> Span:
    return Span.load(ModelSource.open(folder), FIRST, END)


@pytest.fixture(params=["llama", "bloom", "mixtral"])
def span(request: pytest.FixtureRequest, saved: Callable[..., Path]) -> Span:
    return load(saved(request.param))


@pytest.fixture
def llama(saved: Callable[..., Path]) -> Span:
    return load(saved("llama"))


def close(found: Blob | None, expected: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(decode_tensor(found), expected, atol=1e-5, rtol=1e-4)


def forward(**options: Any) -> Forward:
    return Forward(model="m", first=FIRST, end=END, **GIVEN | options)


def backward(**options: Any) -> Backward:
    return Backward(model="m", first=FIRST, end=END, grad_output=encode_tensor(GRADIENT), **GIVEN | options)


def run(work: PassWork, at_once: int = 1) -> Any:
    """Run work in parts of so many units, or more where it cannot be cut there."""
    done = 0
    cuts: Sequence[int] = work.cuts if isinstance(work, KeptBackwardWork) else range(1, work.units + 1)
    while done < work.units:
        end = next(cut for cut in cuts if cut >= min(done + at_once, work.units))
        work.part(done, end)
        done = end
    return work.answer()


def store(span: Span, most_bytes: int = 1 << 30) -> GraphStore:
    return GraphStore(span.weights, most_bytes=most_bytes, free=Graph.free)


def new_graph(number: int = 1, **options: Any) -> Graph:
    return Graph("peer", number, FIRST, END, (ROWS, LENGTH, HIDDEN), "float32", "float32", **options)


def reference(span: Span, lora: Adapter | None = None, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the gradients of hidden states, prompts and LoRA."""
    inputs = [X.clone().requires_grad_(), PROMPTS.clone().requires_grad_()]
    adapters: list[Adapter] = []
    if lora is not None:
        adapter, leaves = lora.leaves(FIRST, END)
        adapters, inputs = [adapter], inputs + leaves
    (output,) = span.forward(inputs[0], attention_mask=MASK, prompts=inputs[1], adapters=adapters, **options)
    return output.detach(), list(torch.autograd.grad(output, inputs, GRADIENT))


def lora_for(span: Span, family: str) -> Adapter:
    """Parameters for two layers, of which one block has none and one has one."""
    wanted = {1: PATHS[family], 2: (), 3: PATHS[family][:1]}
    blocks = {}
    for block, paths in wanted.items():
        shapes = {path: span.linear_shapes[block][path] for path in paths}
        blocks[block] = {
            path: LoraWeights(torch.randn(4, inputs, generator=GENERATOR), torch.randn(outputs, 4, generator=GENERATOR) * 0.1)
            for path, (inputs, outputs) in shapes.items()
        }
    return Adapter(blocks)


@given(rows=st.integers(1, 40), length=st.integers(1, 700), at_once=st.integers(1, 50))
def test_chunks(rows: int, length: int, at_once: int) -> None:
    chunks = chunks_of(rows, length, at_once)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.end)] == list(range(rows))
    sizes = [chunk.end - chunk.start for chunk in chunks]
    assert min(sizes) >= 1 and max(sizes) <= min(sizes) + 1
    assert max(sizes) <= at_once and (max(sizes) == 1 or max(sizes) * length <= CHUNK_TOKENS)


@pytest.mark.parametrize("all_hidden", [False, True])
@pytest.mark.parametrize(("at_once", "rows_at_once"), [(1, 4), (2, 3), (100, 1)])
def test_a_forward_pass_in_parts(llama: Span, all_hidden: bool, at_once: int, rows_at_once: int) -> None:
    with torch.no_grad():
        expected = torch.stack(llama.forward(X, attention_mask=MASK, prompts=PROMPTS, all_hidden=True))
    found = decode_tensor(run(ForwardWork(llama, forward(all_hidden=all_hidden), rows_at_once=rows_at_once), at_once))
    torch.testing.assert_close(found[..., MASK, :], (expected if all_hidden else expected[-1])[..., MASK, :], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("at_once", "rows_at_once"), [(1, 4), (2, 3), (100, 1)])
def test_all_ways_to_gradients_agree(span: Span, at_once: int, rows_at_once: int) -> None:
    output, expected = reference(span)
    graphs, graph = store(span), new_graph()
    graphs.begin(graph)
    answer = run(ForwardWork(span, forward(), rows_at_once=rows_at_once, graph=graph, graphs=graphs), at_once)
    torch.testing.assert_close(decode_tensor(answer)[MASK], output[MASK], atol=1e-5, rtol=1e-4)
    assert graphs.keep(graph, 0.0) and graphs.take(graph)
    anew = new_graph(0)
    graphs.begin(anew)
    run(RecordingWork(span, backward(), rows_at_once=rows_at_once, graph=anew, graphs=graphs), at_once)
    for work in (
        KeptBackwardWork(span, backward(hidden=None, mask=None, prompts=None), graph),
        KeptBackwardWork(span, backward(), anew),
        FrugalBackwardWork(span, backward(), rows_at_once=rows_at_once),
    ):
        hidden, prompts, lora = run(work, at_once)
        close(hidden, expected[0])
        close(prompts, expected[1])
        assert lora is None


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_lora(saved: Callable[..., Path], family: str, dropout: float) -> None:
    """However rows and blocks are cut, dropout leaves out the same numbers."""
    span = load(saved(family))
    lora = lora_for(span, family)
    named: dict[str, Any] = {"lora": "v1", "dropout": dropout, "seed": 5, "row": 7}
    whole_graphs, whole = store(span), new_graph(has_lora=True)
    whole_graphs.begin(whole)
    output = decode_tensor(run(ForwardWork(span, forward(**named), [lora], graph=whole, graphs=whole_graphs), 100))
    expected: BackwardAnswer = run(KeptBackwardWork(span, backward(**named, lora_gradient=True), whole), 100)
    if not dropout:
        plain, gradients = reference(span, lora)
        torch.testing.assert_close(output[MASK], plain[MASK], atol=1e-5, rtol=1e-4)
        close(expected.hidden, gradients[0])
        close(expected.lora, torch.cat([gradient.reshape(-1) for gradient in gradients[2:]]))
    graphs, graph = store(span), new_graph(has_lora=True)
    graphs.begin(graph)
    again = decode_tensor(run(ForwardWork(span, forward(**named), [lora], rows_at_once=1, graph=graph, graphs=graphs), 2))
    torch.testing.assert_close(again[MASK], output[MASK], atol=1e-5, rtol=1e-4)
    request = backward(**named, lora_gradient=True)
    for work in (KeptBackwardWork(span, request, graph), FrugalBackwardWork(span, request, [lora], rows_at_once=3)):
        found: BackwardAnswer = run(work)
        for one, other in zip(found, expected, strict=True):
            assert other is not None
            close(one, decode_tensor(other))
    assert expected.lora is not None and expected.lora.dtype == "float32"


@pytest.mark.parametrize("wanted", ["hidden", "prompts", "lora", "nothing"])
def test_only_wanted_gradients_are_computed(llama: Span, wanted: str) -> None:
    lora = lora_for(llama, "llama")
    request = backward(lora="v1", input_gradient=wanted == "hidden", prompt_gradient=wanted == "prompts", lora_gradient=wanted == "lora")
    _, expected = reference(llama, lora)
    graphs, graph = store(llama), new_graph(has_lora=True)
    graphs.begin(graph)
    run(ForwardWork(llama, forward(lora="v1"), [lora], graph=graph, graphs=graphs))
    for work in (KeptBackwardWork(llama, request, graph), FrugalBackwardWork(llama, request, [lora])):
        found: BackwardAnswer = run(work)
        assert [name for name, value in found._asdict().items() if value is not None] == [wanted] * (wanted != "nothing")
        if wanted == "prompts":
            close(found.prompts, expected[1])
        if wanted == "lora":
            close(found.lora, torch.cat([gradient.reshape(-1) for gradient in expected[2:]]))


def test_a_graph_without_room_is_given_up_and_the_pass_goes_on(llama: Span) -> None:
    output, expected = reference(llama)
    graphs, graph = store(llama, 1 << 21), new_graph()
    assert graphs.begin(graph) is graph
    work = ForwardWork(llama, forward(), graph=graph, graphs=graphs)
    graphs._most_of_peer = graph.bytes + 300_000  # of 500 KB that the pass's blocks take
    answer = run(work)
    assert work.graph is None and not len(graphs) and not graphs.bytes and not graph.parts
    torch.testing.assert_close(decode_tensor(answer)[MASK], output[MASK], atol=1e-5, rtol=1e-4)
    assert graphs.begin(new_graph()) is None, "what did not fit is not tried again"
    smaller = Graph("peer", 1, FIRST, FIRST + 1, (1, LENGTH, HIDDEN), "float32")
    assert graphs.begin(smaller) is smaller
    with pytest.raises(GraphGone):
        run(RecordingWork(llama, backward(), graph=graph, graphs=graphs))


def test_a_graph_keeps_what_gradients_need_and_no_more(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not counted, each piece of memory once; all of it goes with the graph, and no cycle keeps it."""
    span = load(saved("bloom", hidden_size=64))
    hidden = torch.randn(ROWS, LENGTH, 64)
    graphs, graph = store(span), Graph("peer", 1, FIRST, END, (ROWS, LENGTH, 64), "float32")
    graphs.begin(graph)
    least, held = graph.bytes, list[weakref.ref[torch.Tensor]]()
    library = torch.autograd.graph.saved_tensors_hooks

    def noting(pack: Callable[[torch.Tensor], torch.Tensor], unpack: Callable[[Any], Any]) -> Any:
        def noted(tensor: torch.Tensor) -> torch.Tensor:
            kept = pack(tensor)
            held.append(weakref.ref(kept))
            return kept

        return library(noted, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", noting)
    run(ForwardWork(span, Forward("m", FIRST, END, encode_tensor(hidden)), graph=graph, graphs=graphs), 100)
    per_feature = (graph.bytes - least) / 4 / (ROWS * LENGTH * 64 * (END - FIRST))
    assert 10 < per_feature < 20, "the inputs of two norms; query, key and value; the activation's input, four times as wide; scores; nodes"
    gc.disable()
    try:
        assert sum(tensor() is not None for tensor in held) > 30
        graphs.done(graph)
        assert all(tensor() is None for tensor in held), "freed without the collector"
    finally:
        gc.enable()


def test_positions_of_the_whole_decide_however_rows_are_cut(saved: Callable[..., Path]) -> None:
    """Dynamic frequencies follow the longest position of all rows, and of what they belong to."""
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    span = load(saved("llama", max_position_embeddings=16, rope_parameters=scaling))
    positions = (MASK.long().cumsum(1) - 1).clamp(min=0).int()
    positions[1:] = positions[1:] // 2  # these rows alone would not reach beyond the table
    given = {"position_ids": encode_tensor(positions)}
    with torch.no_grad():
        for reach in (0, 33):
            (expected,) = span.forward(X, attention_mask=MASK, prompts=PROMPTS, position_ids=positions, position_end=reach or None)
            for rows_at_once in (4, 1):
                found = decode_tensor(run(ForwardWork(span, forward(**given, reach=reach), rows_at_once=rows_at_once)))
                torch.testing.assert_close(found[MASK], expected[MASK], atol=1e-5, rtol=1e-4)
        short = span.forward(X[1:2], attention_mask=MASK[1:2], position_ids=positions[1:2], prompts=PROMPTS[:, 1:2])[0]
        assert not torch.allclose(short, expected[1:2], atol=1e-3), "the test shows nothing where it does not matter"
