"""Steps of many sessions in one pass: each gets what the library's whole model, or a pass by itself, gives for it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnet.blocks.kv import KVStore
from petalnet.blocks.packed import PackedRow
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span, SpanStep
from tests.blocks.test_span import CLOSE, IDS, LEFT, Reference, load

Saved = Callable[..., Path]
PACKING = ["bloom", "llama", "mistral", "qwen2", "gemma2", "mixtral", "granite", "gpt_oss", "opt"]
PACKING += ["falcon", "mpt", "llama4_text", "deepseek_v3"]  # made to
FAMILIES = [*PACKING, "gptj"]
PAGES = 32


class Served:
    """A span with a store, and the sessions on it."""

    def __init__(self, span: Span) -> None:
        page_tokens = span.backend.page_tokens
        self.span = span
        self.store = KVStore(span.kv_shapes, pages=PAGES, page_tokens=page_tokens, dtype=span.dtype, device=span.device)
        self.pool = PagePool(PAGES, page_tokens)
        span.attach(self.store)

    def session(self, rows: int = 1, max_length: int = 64) -> Rows:
        session = Rows(self.pool, max_length)
        session.resize(rows)
        return session

    def run(self, *parts: tuple[Rows, torch.Tensor] | tuple[Rows, torch.Tensor, dict[str, Any]], **kwargs: Any) -> list[list[torch.Tensor]]:
        """Steps (rows, hidden, what else there is to say) in one pass, for each its outputs."""
        steps = []
        for rows, hidden, *more in parts:
            self.store.copy_pages(rows.prepare(hidden.shape[1]), 0, len(self.span))
            steps.append(SpanStep(rows, hidden, **(more[0] if more else {})))  # type: ignore[arg-type]
        outputs = self.span.step(steps, **kwargs)
        for step in steps:
            step.rows.advance(step.hidden.shape[1])
        return outputs

    def last(self, *parts: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The last block's outputs of each step."""
        return [outputs[-1] for outputs in self.run(*parts, **kwargs)]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def served(folder: Path, *ranges: tuple[int, int]) -> list[Served]:
    return [Served(span) for span in load(folder, *ranges)]


def test_which_families_share_a_pass(family: str, saved: Saved) -> None:
    (span,) = load(saved(family), (1, 3))
    assert span.packs == (family in PACKING)
    assert (span.batch_key(10, "a") == span.batch_key(20, "b")) == span.packs


def test_sessions_of_unequal_length_share_passes(family: str, saved: Saved) -> None:
    states, _ = Reference(saved(family)).run(IDS)
    spans = served(saved(family), (0, 1), (1, 4))
    sessions = [[one.session() for _ in range(3)] for one in spans]
    found: list[list[torch.Tensor]] = [[], [], []]
    reached = [0, 0, 0]
    for news in ((5, 0, 0), (1, 7, 0), (1, 1, 12), (3, 1, 0), (1, 0, 0), (1, 3, 0)):
        parts = [(row, reached[row], reached[row] + new) for row, new in enumerate(news) if new]
        hidden = [states[0][row : row + 1, start:end] for row, start, end in parts]
        for one, rows in zip(spans, sessions, strict=True):
            hidden = one.last(*((rows[row], entering) for (row, _, _), entering in zip(parts, hidden, strict=True)))
        for (row, _, end), output in zip(parts, hidden, strict=True):
            found[row].append(output)
            reached[row] = end
    torch.testing.assert_close(torch.cat([torch.cat(outputs, dim=1) for outputs in found]), states[4], **CLOSE)


def test_rows_with_left_padding_beside_another_session(family: str, saved: Saved) -> None:
    reference, (one,) = Reference(saved(family)), served(saved(family), (0, 4))
    alone, _ = Reference(saved(family)).run(IDS[:1])
    positions = (LEFT.long().cumsum(1) - 1).clamp(min=0)
    padded, other = one.session(rows=3), one.session()
    past, start = None, 0
    for end in (3, 8, 9, 10, 12):
        mask, new = LEFT[:, :end], positions[:, start:end]
        states, output = reference.run(IDS[:, start:end], attention_mask=mask.long(), positions=new, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found, beside = one.last(
            (padded, states[0], {"mask": mask, "position_ids": new}),
            (other, alone[0][:, start:end]),
        )
        kept = LEFT[:, start:end]
        assert found.isfinite().all()
        torch.testing.assert_close(found[kept], states[4][kept], **CLOSE)
        torch.testing.assert_close(beside, alone[4][:, start:end], **CLOSE)
        start = end


def test_masks_with_holes(family: str, saved: Saved) -> None:
    """As a session's rows have that were padded on the right and then went on."""
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 5:8] = mask[1, 7] = mask[2, 0] = mask[2, 4:6] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    reference, (one,) = Reference(saved(family)), served(saved(family), (0, 4))
    rows = one.session(rows=3)
    past, start = None, 0
    for end in (8, 9, 12):
        new = positions[:, start:end]
        states, output = reference.run(
            IDS[:, start:end], attention_mask=mask[:, :end].long(), positions=new, past_key_values=past, use_cache=True
        )
        past = output.past_key_values
        (found,) = one.last((rows, states[0], {"mask": mask[:, :end], "position_ids": new}))
        kept = mask[:, start:end]
        assert found.isfinite().all()
        torch.testing.assert_close(found[kept], states[4][kept], **CLOSE)
        start = end


def test_prompts_outputs_of_all_blocks_and_parts_of_a_span(family: str, saved: Saved) -> None:
    (one,) = served(saved(family), (0, 4))
    hidden, prompts = torch.randn(2, 9, 32), torch.randn(2, 2, 6, 32)
    plain = torch.randn(1, 9, 32)
    with torch.no_grad():
        prompted = one.span.forward(hidden, prompts=prompts, first=1, end=3, all_hidden=True)
        (expected,) = one.span.forward(plain, first=1, end=3)
    rows, other = one.session(rows=2), one.session()
    found: list[list[torch.Tensor]] = [[], [], []]
    for start, end in ((0, 4), (4, 5), (5, 9)):
        with_prompts, without = one.run(
            (rows, hidden[:, start:end], {"prompts": prompts, "all_hidden": True}), (other, plain[:, start:end]), first=1, end=3
        )
        assert (len(with_prompts), len(without)) == (2, 1)
        for pieces, piece in zip(found, (*with_prompts, *without), strict=True):
            pieces.append(piece)
    for pieces, whole in zip(found, (*prompted, expected), strict=True):
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)
    torch.testing.assert_close(one.last((one.session(), plain))[0], one.span.forward(plain)[0], **CLOSE)


def test_rows_that_go_back_and_are_reordered(family: str, saved: Saved) -> None:
    order = [2, 0, 2, 1]
    states, _ = Reference(saved(family)).run(IDS[torch.tensor(order)])
    before, _ = Reference(saved(family)).run(IDS)
    (one,) = served(saved(family), (0, 4))
    rows = one.session(rows=3)
    one.run((rows, before[0][:, :7]))
    one.run((rows, torch.randn(3, 4, 32)))  # a draft that is thrown away
    rows.truncate(6)
    one.run((rows, before[0][:, 6:9]))
    rows.reorder(order)
    found = [one.last((rows, states[0][:, start:end]))[0] for start, end in ((9, 10), (10, 12))]
    torch.testing.assert_close(torch.cat(found, dim=1), states[4][:, 9:], **CLOSE)


def test_passes_without_a_past_go_on_beside_steps(family: str, saved: Saved) -> None:
    (one,) = served(saved(family), (0, 4))
    hidden = torch.randn(1, 8, 32)
    rows = one.session()
    first = one.last((rows, hidden[:, :5]))[0]
    inputs = hidden.clone().requires_grad_()
    (whole,) = one.span.forward(inputs)
    (gradient,) = torch.autograd.grad(whole.square().sum(), [inputs])
    assert gradient.abs().sum() > 0
    second = one.last((rows, hidden[:, 5:]))[0]
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole.detach(), **CLOSE)


def test_what_is_not_finite_in_a_session_stays_there(saved: Saved) -> None:
    for family in ("bloom", "llama", "gemma2"):
        (one,) = served(saved(family), (0, 4))
        good, bad = torch.randn(1, 9, 32), torch.full((1, 9, 32), torch.nan)
        sessions = [one.session() for _ in range(3)]
        outputs = one.last((sessions[0], good[:, :8]), (sessions[1], bad[:, :8]), (sessions[2], good[:, :8]))
        more = one.last((sessions[0], good[:, 8:]), (sessions[1], bad[:, 8:]), (sessions[2], good[:, 8:]))
        (expected,) = one.span.forward(good)
        for before, after in ((outputs[0], more[0]), (outputs[2], more[2])):
            torch.testing.assert_close(torch.cat([before, after], dim=1), expected, **CLOSE)


def test_other_dtypes(saved: Saved) -> None:
    for family in ("bloom", "llama"):
        (whole,) = load(saved(family), (0, 4))
        one = Served(Span.load(_source(saved(family)), 0, 4, dtype=torch.bfloat16))
        hidden = torch.randn(1, 9, 32)
        rows = one.session()
        found = [one.last((rows, hidden[:, start:end]))[0] for start, end in ((0, 8), (8, 9))]
        assert found[0].dtype == torch.bfloat16
        torch.testing.assert_close(torch.cat(found, dim=1).float(), whole.forward(hidden)[0], atol=0.15, rtol=0.1)


SCALINGS = {
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 8},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_prompt_in_pieces_gets_the_frequencies_of_all_of_it(kind: str, saved: Saved) -> None:
    scaling = {**SCALINGS[kind], "rope_theta": 10000.0}
    folder = saved("llama", max_position_embeddings=8, rope_parameters=scaling)
    reference = Reference(folder)
    states, output = reference.run(IDS[:1, :11], use_cache=True)
    more, _ = reference.run(IDS[:1, 11:], past_key_values=output.past_key_values, use_cache=True)
    (one,) = served(folder, (0, 4))
    rows = one.session()
    found = [one.last((rows, states[0][:, start:end], {"position_end": 11}))[0] for start, end in ((0, 4), (4, 11))]
    torch.testing.assert_close(torch.cat(found, dim=1), states[4], **CLOSE)
    torch.testing.assert_close(one.last((rows, more[0]))[0], more[4], **CLOSE)
    short, _ = reference.run(IDS[:1, :6])
    torch.testing.assert_close(one.last((one.session(), short[0]))[0], short[4], **CLOSE)


def test_only_sessions_of_one_regime_share_a_pass(saved: Saved) -> None:
    def key(kind: str) -> Callable[[int, str], Any]:
        scaling = {**SCALINGS[kind], "rope_theta": 10000.0}
        (span,) = load(saved("llama", max_position_embeddings=8, rope_parameters=scaling), (0, 4))
        assert span.packs
        return span.batch_key

    longrope, dynamic = key("longrope"), key("dynamic")
    assert longrope(8, "a") == longrope(3, "b") != longrope(9, "a") == longrope(20, "b")
    assert dynamic(8, "a") == dynamic(3, "b")
    assert len({dynamic(8, "a"), dynamic(9, "a"), dynamic(9, "b")}) == 3
    assert dynamic(9, "a") == dynamic(10, "a")


def test_a_span_without_a_store_runs_no_steps(saved: Saved) -> None:
    (span,) = load(saved("llama"), (0, 2))
    rows = Rows(PagePool(2, span.backend.page_tokens), 8)
    rows.resize(1)
    rows.prepare(1)
    step = SpanStep(rows, torch.zeros(1, 1, 32))
    with pytest.raises(RuntimeError, match="no store"):
        span.step([step])
    with pytest.raises(ValueError, match="not within 0:2"):
        Served(span).span.step([step], first=1, end=3)


def _source(folder: Path) -> Any:
    from petalnet.models.checkpoint import ModelSource

    return ModelSource.open(folder)


ROUND = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), min_size=1, max_size=6, unique_by=lambda part: part[0])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(ROUND, min_size=1, max_size=6), rows=st.lists(st.integers(1, 3), min_size=5, max_size=5))
def test_any_schedule_gives_what_passes_by_themselves_give(rounds: list[list[tuple[int, int]]], rows: list[int], saved: Saved) -> None:
    for family in ("bloom", "mistral"):
        (one,) = served(saved(family), (0, 4))
        sessions = [one.session(rows=count, max_length=64) for count in rows]
        inputs = [torch.randn(count, 64, 32) for count in rows]
        found: list[list[torch.Tensor]] = [[] for _ in rows]
        for parts in rounds:
            fitting = [(index, min(new, 64 - sessions[index].length)) for index, new in parts if sessions[index].length < 64]
            starts = {index: sessions[index].length for index, _ in fitting}
            if not fitting:
                continue
            outputs = one.last(*((sessions[i], inputs[i][:, starts[i] : starts[i] + new]) for i, new in fitting))
            for (index, _), output in zip(fitting, outputs, strict=True):
                found[index].append(output)
        for index, pieces in enumerate(found):
            if pieces:
                (expected,) = one.span.forward(inputs[index][:, : sessions[index].length])
                torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)


def _step(pool: PagePool, past: int, hidden: torch.Tensor, **more: Any) -> SpanStep:
    rows = Rows(pool, 64)
    rows.resize(hidden.shape[0])
    rows.prepare(past + hidden.shape[1])
    rows.advance(past)
    return SpanStep(rows, hidden, **more)


def pack(steps: Sequence[SpanStep]) -> PackedRow:
    return PackedRow.of(steps, dtype=torch.float32, device=torch.device("cpu"), positions=True)


def test_how_steps_lie_side_by_side() -> None:
    pool = PagePool(PAGES, 4)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :2] = mask[1, 3] = mask[2, :] = False
    prompts = torch.arange(3 * 6 * 2.0).view(1, 3, 6, 2)
    steps = [
        _step(pool, 9, torch.randn(1, 2, 2)),
        _step(pool, 5, torch.randn(3, 2, 2), mask=mask, prompts=prompts),
        _step(pool, 0, torch.randn(1, 1, 2, dtype=torch.float64), position_ids=torch.tensor([[7]])),
    ]
    row = pack(steps)
    assert row.hidden.shape == (1, 9, 2)
    torch.testing.assert_close(row.hidden[0, row.columns[1]].view(3, 2, 2), steps[1].hidden)
    assert row.position_ids is not None
    assert row.position_ids.tolist() == [[9, 10, 5, 6, 5, 6, 5, 6, 7]]
    assert pack(steps[:2]).position_ids.tolist() == [[9, 10, 5, 6, 5, 6, 5, 6]]  # type: ignore[union-attr]
    assert pack(steps[:1]).position_ids.tolist() == [[9, 10]]  # type: ignore[union-attr]
    assert [(s.start, s.end, s.past, s.first, s.mask is not None) for s in row.segments] == [
        (0, 2, 9, 0, False),
        (2, 4, 5, 2, False),
        (4, 6, 5, 0, True),
        (6, 8, 5, 7, False),
        (8, 9, 0, 0, False),
    ]
    assert row.prompted is not None
    columns, added = row.prompted
    assert columns.tolist() == [2, 4, 6]
    torch.testing.assert_close(added, prompts[:, :, 5])
