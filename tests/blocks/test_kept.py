"""Kept outputs against a plain model: each row's outputs are those that were written at its positions, however rows share pages."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from petalnet.blocks.kept import KeptOutputs
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.prefixes import PrefixCache
from petalnet.p2p.session_messages import UNIT_TOKENS

PAGES, PAGE_TOKENS, HIDDEN, MAX_LENGTH, MOST_ROWS, SESSIONS = 120, 16, 3, 200, 4, 2


class KeptMachine(RuleBasedStateMachine):
    """Sessions that step, go back, reorder their rows and begin like others, with beginnings kept."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, PAGE_TOKENS)
        self.prefixes = PrefixCache(self.pool)
        self.kept = KeptOutputs(pages=PAGES, page_tokens=PAGE_TOKENS, hidden_size=HIDDEN, dtype=torch.float32)
        self.written = 0
        self.rows: list[Rows] = []
        self.expected: list[list[list[float]]] = []
        """For each session and row the first number of each output."""

    @initialize(rows=st.tuples(*(st.integers(1, 2) for _ in range(SESSIONS))))
    def begin(self, rows: tuple[int, ...]) -> None:
        for count in rows:
            self.rows.append(Rows(self.pool, MAX_LENGTH))
            self.rows[-1].resize(count)
            self.expected.append([[] for _ in range(count)])

    @rule(session=st.integers(0, SESSIONS - 1), new=st.integers(1, 90), alike=st.booleans(), several_parts=st.booleans())
    def step(self, session: int, new: int, alike: bool, several_parts: bool) -> None:
        rows, expected = self.rows[session], self.expected[session]
        new = min(new, MAX_LENGTH - rows.length)
        for part in (new // 2, new - new // 2) if several_parts else (new,):
            outputs = torch.zeros(len(rows), part, HIDDEN)
            for row, output in enumerate(outputs):
                if row == 0 or not alike:
                    self.written += part
                output[:, 0] = torch.arange(self.written, self.written + part)
                output[:, 1] = -output[:, 0]
                expected[row].extend(output[:, 0].tolist())
            self.kept.copy_pages(rows.prepare(part))
            self.kept.write(rows, rows.length, outputs)
            rows.advance(part)
        self.check(session)

    @rule(session=st.integers(0, SESSIONS - 1), share=st.floats(0, 1))
    def go_back(self, session: int, share: float) -> None:
        rows = self.rows[session]
        length = int(rows.length * share)
        rows.truncate(length)
        for row in self.expected[session]:
            del row[length:]
        self.check(session)

    @rule(session=st.integers(0, SESSIONS - 1), order=st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=MOST_ROWS))
    def reorder(self, session: int, order: list[int]) -> None:
        rows, expected = self.rows[session], self.expected[session]
        order = [row % len(rows) for row in order]
        rows.reorder(order)
        self.expected[session] = [expected[row].copy() for row in order]
        self.check(session)

    @rule(session=st.integers(0, SESSIONS - 1))
    def keep_the_beginning(self, session: int) -> None:
        rows = self.rows[session]
        for table, row in zip(rows.tables, self.expected[session], strict=True):
            names = names_of(row)
            if names:
                self.prefixes.keep("owner", names, table[: len(names) * UNIT_TOKENS // PAGE_TOKENS])

    @rule(session=st.integers(0, SESSIONS - 1), like=st.integers(0, SESSIONS - 1))
    @precondition(lambda self: len(self.prefixes) > 0)
    def begin_like(self, session: int, like: int) -> None:
        beginning = self.expected[like][0].copy()
        rows = self.rows[session]
        rows.truncate(0)
        rows.resize(1)
        self.expected[session] = [[]]
        pages = self.prefixes.find("owner", names_of(beginning))
        rows.attach([pages])
        self.expected[session] = [beginning[: rows.length]]
        self.check(session)

    def check(self, session: int) -> None:
        rows, expected = self.rows[session], self.expected[session]
        found = self.kept.read(rows, 0, rows.length)
        assert found[:, :, 0].tolist() == expected
        start, end = rows.length // 3, rows.length - rows.length // 4
        part = self.kept.read(rows, start, end)
        assert torch.equal(part, found[:, start:end]) and torch.equal(part[:, :, 1], -part[:, :, 0])
        self.pool.check([*(table for one in self.rows for table in one.tables), *self.prefixes.held()])


def names_of(row: list[float]) -> list[bytes]:
    """Names of the whole units of a row, by what is in it."""
    ends = range(UNIT_TOKENS, len(row) + 1, UNIT_TOKENS)
    return [hashlib.blake2b(repr(row[:end]).encode(), digest_size=16).digest() for end in ends]


TestKept = KeptMachine.TestCase
TestKept.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_what_was_read_stays_as_it_was() -> None:
    pool = PagePool(4, PAGE_TOKENS)
    kept = KeptOutputs(pages=4, page_tokens=PAGE_TOKENS, hidden_size=HIDDEN, dtype=torch.bfloat16)
    assert kept.bytes == 4 * PAGE_TOKENS * HIDDEN * 2
    rows = Rows(pool, 30)
    rows.resize(1)
    rows.prepare(5)
    kept.write(rows, 0, torch.ones(1, 5, HIDDEN, dtype=torch.bfloat16))
    found = kept.read(rows, 0, 5)
    kept.write(rows, 0, torch.zeros(1, 5, HIDDEN, dtype=torch.bfloat16))
    assert torch.equal(found, torch.ones(1, 5, HIDDEN, dtype=torch.bfloat16))


def test_more_than_the_machine_has() -> None:
    with pytest.raises(MemoryError, match="GB are needed for kept outputs"):
        KeptOutputs(pages=1 << 40, page_tokens=PAGE_TOKENS, hidden_size=4096, dtype=torch.float32)
    with pytest.raises(MemoryError, match=r"kept outputs, 0\.00 GB are free"):
        KeptOutputs(pages=1, page_tokens=PAGE_TOKENS, hidden_size=4096, dtype=torch.float32, beside=1 << 60)
