"""How a long step is cut: into how long chunks, and that these say the same as the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.client.chunks import MOST_CHUNK_BYTES, MOST_CHUNKS, Stage, chunk_ends, stages_of
from petalnet.client.inputs import Inputs, columns, steps_of, wanted_tokens
from petalnet.errors import ProtocolError
from petalnet.p2p.fields import Blob
from petalnet.p2p.session_messages import NAME_BYTES, UNIT_TOKENS
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from petalnet.routing.routes import Hop

TOKEN_BYTES = 4096


def seconds(stages: list[Stage], rows: int, ends: list[int]) -> float:
    """When the last chunk leaves the last stage, chunk by chunk."""
    free = [0.0] * len(stages)
    start = 0
    for end in ends:
        at = 0.0
        for index, stage in enumerate(stages):
            at = free[index] = max(at, free[index]) + stage.fixed_s + stage.token_s * rows * (end - start)
        start = end
    return free[-1]


stage = st.builds(Stage, st.floats(0, 0.1), st.floats(0, 0.01))


@settings(deadline=None)
@given(
    new=st.integers(1, 5000),
    rows=st.integers(1, 8),
    stages=st.lists(stage, max_size=8),
    position=st.integers(0, 300),
    token_bytes=st.sampled_from((TOKEN_BYTES, MOST_CHUNK_BYTES // 100, 2 * MOST_CHUNK_BYTES)),
    first=st.integers(0, 200),
)
def test_cuts_are_where_units_end(new: int, rows: int, stages: list[Stage], position: int, token_bytes: int, first: int) -> None:
    ends = chunk_ends(new, rows, stages, token_bytes=token_bytes, position=position, first=min(first, new))
    assert ends == sorted(set(ends)) and ends[0] > 0 and ends[-1] == new
    assert all((position + end) % UNIT_TOKENS == 0 for end in ends[:-1])
    assert ends[0] >= min(first, new)
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    fits = max(MOST_CHUNK_BYTES // (rows * token_bytes), UNIT_TOKENS, first + 2 * UNIT_TOKENS)
    assert max(lengths) <= fits
    if rows * token_bytes * (new + 2 * UNIT_TOKENS) < MOST_CHUNK_BYTES:  # whole units, a begun one at either end
        assert len(ends) <= MOST_CHUNKS + 1
        assert seconds(stages, rows, ends) <= seconds(stages, rows, [new]) * 1.5 if stages else ends == [new]


@pytest.mark.parametrize(
    ("hops", "round_trip_s", "least", "most"),
    [
        (3, 0.0005, 0.4, 0.75),  # three servers in the house: nearly three at work at once
        (3, 0.04, 0.3, 0.75),  # at 100 Mbit/s the way to each is a stage of its own
        (1, 0.04, 0.5, 0.95),  # what is on its way while the server computes
    ],
)
def test_chunks_save_time(hops: int, round_trip_s: float, least: float, most: float) -> None:
    chain = [Hop(f"peer {index}", (), index, index + 1, decode_s=0.01, prefill_s=0.0005) for index in range(hops)]
    stages = stages_of(chain, [round_trip_s] * hops, TOKEN_BYTES)
    ends = chunk_ends(1024, 1, stages, token_bytes=TOKEN_BYTES)
    whole = seconds(stages, 1, [1024])
    assert least * whole < seconds(stages, 1, ends) < most * whole
    best = min(seconds(stages, 1, [*range(length, 1024, length), 1024]) for length in range(UNIT_TOKENS, 1025, UNIT_TOKENS))
    assert seconds(stages, 1, ends) < 1.1 * best


def test_one_server_in_the_house_gets_all_at_once() -> None:
    hop = Hop("peer", (), 0, 1, decode_s=0.01, prefill_s=0.0005)
    assert stages_of([hop], [0.001], TOKEN_BYTES) == []
    assert chunk_ends(4000, 1, [], token_bytes=TOKEN_BYTES) == [4000]
    assert max(chunk_ends(100_000, 1, [], token_bytes=TOKEN_BYTES)) == 100_000  # more than a message holds
    assert len(chunk_ends(100_000, 1, [], token_bytes=TOKEN_BYTES)) == 7
    assert len(stages_of([hop], [None], TOKEN_BYTES)) == len(stages_of([hop], [0.05], TOKEN_BYTES)) == 2


def test_what_would_save_next_to_nothing_is_not_cut() -> None:
    assert chunk_ends(2 * UNIT_TOKENS, 1, [Stage(1.0, 0.001), Stage(1.0, 0.001)], token_bytes=TOKEN_BYTES) == [2 * UNIT_TOKENS]
    assert chunk_ends(UNIT_TOKENS, 1, [Stage(0.0, 1.0)] * 4, token_bytes=TOKEN_BYTES) == [UNIT_TOKENS]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_chunks_say_the_same_as_the_whole(data: st.DataObject) -> None:
    rows, new, position = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 200)), data.draw(st.integers(0, 130))
    cuts = data.draw(st.sets(st.integers(1, new - 1), max_size=5))
    keep = data.draw(st.integers(0, new - 1))
    total = position + new
    hidden, mask, positions = torch.randn(rows, new, 3), torch.rand(rows, total) > 0.3, torch.arange(rows * new).view(rows, new).int()
    begin, stop = position // UNIT_TOKENS, total // UNIT_TOKENS
    names = tuple(tuple(bytes([row, unit] + [0] * (NAME_BYTES - 2)) for unit in range(begin, stop)) for row in range(rows))
    inputs = Inputs(
        mask=encode_tensor(mask),
        position_ids=encode_tensor(positions),
        prompts=encode_tensor(torch.zeros(2, rows, 1, 3)),
        keep=keep,
        promise_rows=5,
        names=names if begin < stop else None,
    )
    order = encode_tensor(torch.arange(rows))
    steps = steps_of(encode_tensor(hidden), position, order, inputs, number=7, ends=[*sorted(cuts), new])
    assert [step.step for step in steps] == list(range(7, 8 + len(cuts)))
    assert torch.equal(torch.cat([decode_tensor(step.hidden) for step in steps], dim=1), hidden)
    at, named, wanted = position, 0, 0
    for index, step in enumerate(steps):
        assert step.position == at
        at += step.hidden.shape[1]
        assert step.mask is not None and torch.equal(decode_tensor(step.mask), mask[:, :at])
        assert (step.order is None, step.prompts is None, step.promise_rows == 0) == ((index > 0,) * 3)
        wanted += wanted_tokens(step)
        if step.names is not None:
            assert step.names.shape[1] == at // UNIT_TOKENS - step.position // UNIT_TOKENS > 0
            named += step.names.shape[1]
            assert bytes(step.names.data[:2]) == bytes([0, step.position // UNIT_TOKENS])
        else:
            assert at // UNIT_TOKENS == step.position // UNIT_TOKENS
    assert at == total and named == stop - begin
    assert {step.reach for step in steps} == {rows * new if cuts else 0}, "the greatest position of all"
    assert wanted == (keep or new)
    assert all(
        wanted_tokens(later) == later.hidden.shape[1] for earlier, later in zip(steps, steps[1:], strict=False) if wanted_tokens(earlier)
    )
    assert torch.equal(torch.cat([decode_tensor(step.position_ids) for step in steps if step.position_ids is not None], dim=1), positions)


def test_what_a_server_has_seen_its_link_carry_counts_instead_of_a_guess() -> None:
    first = Hop("A", (), 0, 1, decode_s=0.01, prefill_s=0.0005, next_bytes_s=1e6)
    stages = stages_of([first, Hop("B", (), 1, 2, decode_s=0.01, prefill_s=0.0005)], [0.05, 0.05], token_bytes=4000)
    assert [stage.token_s for stage in stages[::2]] == pytest.approx([4000 / 12.5e6, 4000 / 1e6])
    slow = replace(first, next_bytes_s=1e-9)
    assert stages_of([slow, first], [0.05, 0.05], token_bytes=4000)[2].token_s <= 0.4, "nobody makes it endless"


def test_an_array_in_blocks_cannot_be_cut() -> None:
    blob = encode_tensor(torch.randn(1, 128, 4), "int8")
    assert columns(blob, 0, 128) is blob
    with pytest.raises(ProtocolError):
        columns(blob, 0, 64)
    half: Blob = columns(encode_tensor(torch.ones(2, 4, 4), "bfloat16"), 1, 3)
    assert torch.equal(decode_tensor(half), torch.ones(2, 2, 4))
