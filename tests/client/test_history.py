"""The record of what a session was given, against a model of a cache that keeps every entry's whole past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnet.client import history as history_module
from petalnet.client.history import History
from petalnet.client.inputs import Inputs, steps_of
from petalnet.models.frequencies import Frequencies
from petalnet.p2p.session_messages import KEEP_NONE, Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor

Entry = tuple[Any, ...]
"""All that shapes one KV entry: token, position, mask of the past, prompt, regime of frequencies, what it may be rounded to."""


class Cache:
    """Rows of entries, as servers compute them."""

    def __init__(self, frequencies: Frequencies) -> None:
        self.frequencies = frequencies
        self.rows: list[list[Entry]] = []

    def take(self, step: Step) -> None:
        hidden = decode_tensor(step.hidden)
        rows, new, _ = hidden.shape
        if step.position == 0:
            self.rows = [[] for _ in range(rows)]
        self.rows = [row[: step.position] for row in self.rows]
        if step.order is not None and step.position:
            self.rows = [list(self.rows[row]) for row in decode_tensor(step.order).tolist()]
        assert len(self.rows) == rows and all(len(row) == step.position for row in self.rows)
        usual = torch.arange(step.position, step.position + new).expand(rows, new)
        positions = usual if step.position_ids is None else decode_tensor(step.position_ids)
        reach = max(int(positions.max()) + 1 if new else 0, step.reach)
        mask = torch.ones(rows, step.position + new, dtype=torch.bool) if step.mask is None else decode_tensor(step.mask)
        assert mask.shape == (rows, step.position + new)
        for row in range(rows):
            for token in range(new):
                at = step.position + token
                prompt = None
                if step.prompts is not None and at < step.prompts.shape[2]:
                    prompt = tuple(decode_tensor(step.prompts)[:, row, at, 0].tolist())
                past = tuple(mask[row, : at + 1].tolist())
                regime = self.frequencies.regime(reach)
                self.rows[row].append((hidden[row, token, 0].item(), positions[row, token].item(), past, prompt, regime, step.codec))


@st.composite
def scripts(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """What a user does, as instructions that fit whatever the session holds."""
    kinds = st.sampled_from(["step", "step", "step", "token", "token", "back", "order", "mask", "prompts", "undo", "empty"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 2**30)), min_size=1, max_size=30))


FREQUENCIES = [Frequencies(), Frequencies(switches=(12,)), Frequencies(unlike=10)]


@pytest.mark.parametrize("frequencies", FREQUENCIES, ids=["usual", "longrope", "dynamic"])
@given(script=scripts(), chunk=st.integers(1, 9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_computes_the_same_entries(
    frequencies: Frequencies, script: list[tuple[str, int]], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "SMALL_TOKENS", 4)
    history, cache = History(frequencies), Cache(frequencies)
    mask: torch.Tensor | None = None
    number = 0
    for kind, seed in script:
        random = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, random: torch.Generator = random) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=random))

        position, before = history.position, len(cache.rows)
        order = None
        if kind == "back":
            position = draw(0, position)
        rows = before if position else draw(1, 3)
        if kind == "order" and position:
            rows = draw(1, 4)
            order = torch.randint(0, before, (rows,), generator=random)
        new = {"token": 1, "order": 1, "back": 1, "empty": 0}.get(kind, draw(1, 7))
        if not position:
            mask = None
        if mask is not None:
            mask = mask[:, :position] if order is None else mask[order, :position]
        if mask is None and kind == "mask":
            mask = torch.ones(rows, position, dtype=torch.bool)
        positions = None
        if mask is not None:
            mask = torch.cat([mask, torch.randint(0, 3, (rows, new), generator=random) > 0], dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, position:].to(torch.int32)
        number += 1
        prompts = torch.rand(2, rows, draw(1, new), 1, generator=random) if kind == "prompts" and not position else None
        step = Step(
            step=number,
            position=position,
            hidden=encode_tensor(torch.rand(rows, new, 1, generator=random)),
            mask=None if mask is None else encode_tensor(mask),
            position_ids=None if positions is None or not new else encode_tensor(positions),
            prompts=None if prompts is None else encode_tensor(prompts),
            order=None if order is None else encode_tensor(order),
            codec="int8" if new > 5 else "raw",
        )
        history.cut(position)
        mark = history.mark()
        if kind == "undo":
            history.note(step, step.hidden, step.codec)
            history.restore(mark)
            if mask is not None:
                mask = mask[:, :position]
            continue
        history.note(step, step.hidden, step.codec)
        cache.take(step)
        if mask is not None and not mask.shape[1]:
            mask = None

    def cut(rows: int, new: int, position: int) -> list[int]:
        return [*range(chunk, new, chunk), new]

    assert history.position == (len(cache.rows[0]) if cache.rows else 0)
    rebuilt = Cache(frequencies)
    steps = history.steps(cut, 7)
    for at, step in enumerate(steps):
        assert step.step == 7 + at and step.keep == KEEP_NONE
        rebuilt.take(step)
    if history.position:
        assert rebuilt.rows == cache.rows
        parts = history.parts(cut, 7)
        assert all(part.order is None and part.hidden.shape[0] == history.rows for part in parts)
        ends = [part.position + part.hidden.shape[1] for part in parts]
        assert [part.position for part in parts] == [0, *ends[:-1]] and ends[-1] == history.position
    else:
        assert not steps


def test_rows_that_are_alike_are_computed_once() -> None:
    history = History()
    history.note(Step(1, 0, encode_tensor(torch.rand(1, 200, 1))), encode_tensor(torch.rand(1, 200, 1)), "raw")
    for number in range(4):
        order = torch.zeros(5, dtype=torch.int64) if not number else torch.tensor([0, 0, 1, 2, 3])
        hidden = encode_tensor(torch.rand(5, 1, 1))
        history.note(Step(2 + number, 200 + number, hidden, order=encode_tensor(order)), hidden, "raw")
    steps = history.steps(lambda rows, new, position: [new], 1)
    assert [step.hidden.shape[:2] for step in steps] == [(1, 200), (5, 4)]
    assert decode_tensor(steps[1].order).tolist() == [0] * 5


def test_memory_of_the_caller_is_not_kept() -> None:
    history, hidden, mask = History(), torch.rand(1, 3, 2), torch.tensor([[False, True, True]])
    positions, prompts = torch.tensor([[0, 0, 1]], dtype=torch.int32), torch.rand(2, 1, 1, 2)
    given = [hidden, mask, positions, prompts]
    expected = [tensor.clone() for tensor in given]
    sent, *others = [encode_tensor(tensor) for tensor in given]
    history.note(Step(1, 0, sent, others[0], others[1], others[2]), sent, "raw")
    for tensor in given:
        tensor.zero_()
    (step,) = history.steps(lambda rows, new, position: [new], 1)
    for blob, tensor in zip((step.hidden, step.mask, step.position_ids, step.prompts), expected, strict=True):
        assert blob is not None and torch.equal(decode_tensor(blob), tensor)


def test_padded_chunks_reach_as_far_as_the_first_time() -> None:
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, :6] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0).to(torch.int32)
    inputs = Inputs(mask=encode_tensor(mask), position_ids=encode_tensor(positions))
    chunks = steps_of(encode_tensor(torch.rand(2, 20, 1)), 0, None, inputs, number=1, ends=[8, 16, 20])
    frequencies = Frequencies(unlike=10)
    history, cache, rebuilt = History(frequencies), Cache(frequencies), Cache(frequencies)
    for step in chunks:  # the second one ends at entry 16, beyond position 14, up to which all of them reach
        history.note(step, step.hidden, step.codec)
        cache.take(step)
    for step in history.steps(lambda rows, new, position: [new], 1):
        rebuilt.take(step)
    assert rebuilt.rows == cache.rows


def test_an_order_that_the_caller_writes_over_stays_what_it_was() -> None:
    history, order, sent = History(), torch.tensor([1, 0]), encode_tensor(torch.tensor([[[1.0]], [[2.0]]]))
    history.note(Step(1, 0, sent), sent, "raw")
    history.note(Step(2, 1, sent, order=encode_tensor(order)), sent, "raw")
    order.zero_()
    cache = Cache(Frequencies())
    for step in history.steps(lambda rows, new, position: [new], 1):
        cache.take(step)
    assert [[entry[0] for entry in row] for row in cache.rows] == [[2.0, 1.0], [1.0, 2.0]]
