"""Captured decoding, held against the usual way through the same blocks. There is no GPU here: a capture is the function itself, run again
over the same buffers, which shows whether everything that changes from pass to pass is in them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from petalnet.blocks import captured as captured_module
from petalnet.blocks.adapters import Adapter, LoraWeights
from petalnet.blocks.emulated import EmulatedBackend, Rerun, Rerunner
from petalnet.blocks.kv import KVStore
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span, SpanStep
from petalnet.blocks.spread import SpreadSpan
from petalnet.models.checkpoint import ModelSource
from tests.swarm.family_rows import ROWS, Row, save

Saved = Callable[..., Path]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
FIRST, END = 1, 3
MOST_BYTES = 1 << 30
NOT_CAPTURED = (
    *(
        "bloom",
        "mpt",
        "falcon, ALiBi",
        "gemma2",
        "gpt_oss",
        "deepseek_v3",
        "llama4_text",
        "llama4, text part",
    ),  # the kernel does not take it
    "llama, dynamic RoPE",  # the longest position is looked at
)
"""Of the table of families."""


def load(folder: Path, recorder: Any = None, *, pages: int = 48, most_bytes: int = MOST_BYTES, **options: Any) -> tuple[Span, PagePool]:
    """Blocks over a store that holds nothing but NaN, so that whatever is read by mistake is seen."""
    span = Span.load(ModelSource.open(folder), FIRST, END, **options)
    span.backend = EmulatedBackend()
    store = span.make_store(pages)
    for entries in (*store.keys, *store.values):
        entries.fill_(torch.nan)
    span.attach(store)
    if recorder is not None:
        span.capture(recorder, most_bytes)
        assert span.captured is not None
    return span, PagePool(pages, store.page_tokens)


class Watcher:
    """A recorder that a GPU's would be like: it captures nothing that waits for the device. The operations that do are known."""

    def record(self, run: Callable[[], None]) -> Rerun:
        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
                    raise RuntimeError(f"{func} waits for the device")
                return func(*args, **(kwargs or {}))

        with Watching():
            run()
        return Rerun(run)


@dataclass(eq=False)
class Session:
    """One session's rows in each of the two stores."""

    rows: list[Rows]
    options: dict[str, Any] = field(default_factory=dict)


class Twins:
    """The same blocks twice, one of which captures. All steps go through both, and their outputs are compared."""

    def __init__(self, folder: Path, recorder: Any = None, **options: Any) -> None:
        made = [load(folder, recorder or Watcher(), **options), load(folder, **options)]
        self.spans, self.pools = zip(*made, strict=True)
        self.span = self.spans[0]
        self.generator = torch.Generator().manual_seed(5)
        self.close = CLOSE

    @property
    def captured(self) -> Any:
        return self.span.captured

    def hidden(self, rows: int, new: int) -> torch.Tensor:
        return torch.randn(rows, new, self.span.hidden_size, generator=self.generator)

    def session(self, rows: int = 1, prompt: int = 0, max_length: int = 60) -> Session:
        session = Session([Rows(pool, max_length) for pool in self.pools])
        for one in session.rows:
            one.resize(rows)
        if prompt:
            self.step((session, self.hidden(rows, prompt)))
        return session

    def step(
        self, *steps: tuple[Session, torch.Tensor], first: int | None = None, end: int | None = None, **options: Any
    ) -> list[torch.Tensor]:
        """Run one pass through both, with the same options for each of its steps."""
        outputs = []
        for number, span in enumerate(self.spans):
            for session, hidden in steps:
                copies = session.rows[number].prepare(hidden.shape[1])
                span.store.copy_pages(copies, 0, len(span))
            made = [SpanStep(session.rows[number], hidden, **options) for session, hidden in steps]
            outputs.append(span.step(made, first, end))
            for session, hidden in steps:
                session.rows[number].advance(hidden.shape[1])
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other, **self.close)
        return [output[-1] for output in outputs[0]]

    def decode(self, *sessions: Session, **options: Any) -> list[torch.Tensor]:
        return self.step(*((session, self.hidden(len(session.rows[0]), 1)) for session in sessions), **options)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "granite", "mixtral"])
def test_whatever_sessions_do_it_is_the_same_as_the_usual_way(family: str, saved: Saved) -> None:
    twins = Twins(saved(family))
    choice = random.Random(1)
    sessions: list[Session] = []
    decodes = 0
    for _ in range(60):
        what = choice.choice(["open", "decode", "decode", "decode", "prompt", "back", "reorder", "close"])
        some = choice.sample(sessions, choice.randint(1, len(sessions))) if sessions else []
        growing = [session for session in some if session.rows[0].length < 50]
        if what == "open" and len(sessions) < 4:
            sessions.append(twins.session(choice.randint(1, 3), choice.randint(1, 20)))
        elif what == "decode" and growing:
            twins.decode(*growing)
            decodes += 1
        elif what == "prompt" and growing:  # beside the others' decodes, in one pass
            new = [choice.randint(2, 9), *[1] * (len(growing) - 1)]
            twins.step(*((session, twins.hidden(len(session.rows[0]), count)) for session, count in zip(growing, new, strict=True)))
        elif some and what in ("back", "reorder", "close"):
            session = some[0]
            length, order = choice.randint(1, session.rows[0].length), [choice.randrange(len(session.rows[0])) for _ in range(3)]
            for rows in session.rows:
                if what == "back":
                    rows.truncate(length)
                elif what == "reorder":
                    rows.reorder(order)
                else:
                    rows.release()
            if what == "close":
                sessions.remove(session)
    assert twins.captured.failure is None
    assert twins.captured.replayed == decodes > 10
    for pool in twins.pools:
        pool.check(table for session in sessions for rows in session.rows if rows.pool is pool for table in rows.tables)


def test_passes_of_a_shape_share_a_recording(saved: Saved) -> None:
    twins = Twins(saved("llama"))
    one, three, long = twins.session(1, 3), twins.session(3, 5), twins.session(1, 26)
    sizes = []
    for sessions in ([one], [one], [three], [one, three], [three], [long], [long, one], [one, long], [long, three]):
        twins.decode(*sessions)
        sizes.append(len(twins.captured))
    # 1 row; 3 are padded to 4; a longer row has a wider table (4 pages); 2 rows with it, and 4.
    assert sizes == [1, 1, 2, 2, 2, 3, 4, 4, 5]
    twins.decode(one, first=FIRST, end=FIRST + 1)
    assert len(twins.captured) == 6
    assert twins.captured.describe() == {"recordings": 6, "bytes": 0, "replayed": 10, "failure": None}


def test_padding_touches_nothing_of_anybodys(saved: Saved) -> None:
    twins = Twins(saved("llama"))
    session = twins.session(3, 7)
    store = twins.span.store
    spare = store.spare_page * store.page_tokens
    before = [entries.clone() for entries in (*store.keys, *store.values)]
    assert all(bool(entries[spare:].isnan().all()) for entries in before)
    twins.decode(session)
    written = {table[0] * store.page_tokens + 7 for table in session.rows[0].tables} | {spare}
    for entries, earlier in zip((*store.keys, *store.values), before, strict=True):
        changed = (entries != earlier) & ~(entries.isnan() & earlier.isnan())
        assert set(changed.flatten(1).any(1).nonzero().flatten().tolist()) == written
        assert not bool(entries[spare].isnan().any())


def test_usual_shapes_are_captured_beforehand(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "USUAL_ROWS", (2, 1))
    monkeypatch.setattr(captured_module, "USUAL_PAGES", (64, 2, 1))
    twins = Twins(saved("llama"))
    one, two = twins.session(1, 12), twins.session(2, 3)
    store = twins.span.store
    held = slice(0, store.spare_page * store.page_tokens)
    before = [entries[held].clone() for entries in (*store.keys, *store.values)]
    twins.captured.prepare(FIRST, END)
    assert len(twins.captured) == 4  # the store has no 64 pages
    for entries, earlier in zip((*store.keys, *store.values), before, strict=True):
        torch.testing.assert_close(entries[held], earlier, rtol=0, atol=0, equal_nan=True)
    twins.decode(one)
    twins.decode(two)
    assert (len(twins.captured), twins.captured.replayed) == (4, 2)


def test_what_is_not_finite_stays_in_its_row(saved: Saved) -> None:
    twins = Twins(saved("llama"))
    twins.close = CLOSE | {"equal_nan": True}
    one, other = twins.session(2, 3), twins.session(3, 3)
    first, second = twins.step((one, torch.full((2, 1, 32), torch.inf)), (other, twins.hidden(3, 1)))
    assert bool(first.isnan().all())
    assert bool(second.isfinite().all())
    (third,) = twins.decode(other)
    assert bool(third.isfinite().all())


def test_positions_that_are_given(saved: Saved) -> None:
    twins = Twins(saved("llama"))
    session = twins.session(2, 6)
    for position in (40, 3):
        twins.decode(session, position_ids=torch.tensor([[position], [position + 1]]))
    twins.decode(session, mask=torch.ones(2, 9, dtype=torch.bool))
    assert twins.captured.replayed == 3


def test_what_goes_the_usual_way(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(saved("llama"))
    session, other = twins.session(2, 6), twins.session(1, 2)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    generator = torch.Generator().manual_seed(0)
    lora = {"self_attn.q_proj": LoraWeights(*(torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2))))}
    twins.decode(session, mask=mask)
    twins.decode(session, all_hidden=True)
    twins.decode(session, prompts=twins.hidden(2 * 2, 12).view(2, 2, 12, 32))
    twins.decode(session, adapters=(Adapter({FIRST: lora}),))
    twins.step((session, twins.hidden(2, 2)), (other, twins.hidden(1, 1)))
    assert twins.captured.replayed == 0
    twins.decode(session, prompts=twins.hidden(2 * 2, 4).view(2, 2, 4, 32))  # which the session has gone past
    assert twins.captured.replayed == 1
    monkeypatch.setattr(captured_module, "MOST_ROWS", 2)
    twins.decode(session, other)
    assert twins.captured.replayed == 1


@pytest.mark.long
@pytest.mark.parametrize("row", [row for row in ROWS if not row.refused], ids=lambda row: row.name)
def test_families(row: Row, tmp_path: Path) -> None:
    twins = Twins(save(row, tmp_path / "model"), Watcher())
    one, three, long = twins.session(1, 13), twins.session(3, 3), twins.session(1, 30)
    for sessions in ([one], [three, one], [long, three], [three], [one, three, long], [long]):
        twins.decode(*sessions)
    assert twins.captured.replayed == (0 if row.name in NOT_CAPTURED else 6), twins.captured.failure


@pytest.mark.parametrize("family", ["gemma2", "bloom", "gpt_oss"])
def test_attention_that_the_kernel_does_not_take(family: str, saved: Saved) -> None:
    twins = Twins(saved(family))
    session = twins.session(2, 5)
    twins.decode(session)
    assert "does not take such attention" in twins.captured.failure
    twins.decode(session)
    assert twins.captured.replayed == 0


def test_a_recorder_that_fails_is_not_asked_again(saved: Saved) -> None:
    asked = []

    class Failing:
        def record(self, run: Callable[[], None]) -> Rerun:
            asked.append(run)
            run()
            if len(asked) > 1:
                raise RuntimeError("operation not permitted when stream is capturing\nSearch for ...")
            return Rerun(run)

    twins = Twins(saved("llama"), Failing())
    one, two = twins.session(1, 5), twins.session(2, 5)
    for sessions in ([one], [two], [one], [one, two]):
        twins.decode(*sessions)
    assert len(asked) == 2
    assert (twins.captured.replayed, len(twins.captured)) == (1, 0)
    assert twins.captured.failure == "RuntimeError: operation not permitted when stream is capturing"


def test_recordings_are_bounded(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        made = 0

        def record(self, run: Callable[[], None]) -> Rerun:
            self.made += 1
            return Rerun(run, nbytes=10_000_000)

    recorder = Large()
    twins = Twins(saved("llama"), recorder, most_bytes=25_000_000)
    sessions = [twins.session(rows, 3) for rows in (1, 2, 3)]

    def decode(*order: int) -> tuple[int, int, int]:
        for index in order:
            twins.decode(sessions[index])
        return recorder.made, len(twins.captured), twins.captured.nbytes // 1_000_000

    assert decode(0, 1) == (2, 2, 20)
    assert decode(0, 2) == (3, 2, 20)  # in place of that of 2 rows
    assert decode(0) == (3, 2, 20)
    assert decode(1) == (4, 2, 20)
    monkeypatch.setattr(captured_module, "MOST_RECORDINGS", 1)
    assert decode(2) == (5, 1, 10)
    assert twins.captured.failure is None
    twins.span.capture(recorder, 9_000_000)
    assert decode(0) == (6, 0, 0)
    assert "takes 10 MB of the 9 MB" in twins.captured.failure


def test_without_a_spare_page_nothing_is_captured(saved: Saved) -> None:
    span, _ = load(saved("llama"), Rerunner())
    shapes = span.kv_shapes
    span.attach(KVStore(shapes, pages=4, page_tokens=span.backend.page_tokens, dtype=span.dtype, device="cpu"))
    assert span.captured is None


def test_bfloat16(saved: Saved) -> None:
    twins = Twins(saved("llama"), dtype=torch.bfloat16)
    twins.close = {"atol": 0.05, "rtol": 0.05}
    sessions = [twins.session(2, 6), twins.session(1, 20)]
    for _ in range(4):
        twins.decode(*sessions)
    assert twins.captured.replayed == 4


def test_a_span_over_several_devices(saved: Saved) -> None:
    stages = [Span.load(ModelSource.open(saved("llama")), first, first + 1) for first in range(FIRST, END)]
    for stage in stages:
        stage.backend = EmulatedBackend()
    spread = SpreadSpan(stages)
    store = spread.make_store(16)
    spread.attach(store)
    for stage in stages:
        stage.capture(Rerunner(), MOST_BYTES)
    usual, pool = load(saved("llama"))
    both = []
    for one, other in ((spread, PagePool(16, 8)), (usual, pool)):
        rows = Rows(other, 40)
        rows.resize(3)
        generator = torch.Generator().manual_seed(1)
        for new in (7, 1, 1, 1):
            rows.prepare(new)
            ((output,),) = one.step([SpanStep(rows, torch.randn(3, new, 32, generator=generator))])
            rows.advance(new)
        both.append(output)
    torch.testing.assert_close(*both, **CLOSE)
    assert [stage.captured.replayed for stage in stages] == [3, 3]


def test_spans_on_several_threads(saved: Saved) -> None:
    """Stages of a spread span are run by a thread each, and not always by the same one."""
    pairs = [Twins(saved(family)) for family in ("llama", "mistral")]
    errors: list[BaseException] = []

    def work(turns: Sequence[int]) -> None:
        try:
            for turn in turns:
                with locks[turn]:
                    twins = pairs[turn]
                    session = twins.session(2, 4)
                    for _ in range(5):
                        twins.decode(session)
        except BaseException as error:
            errors.append(error)

    locks = [threading.Lock() for _ in pairs]
    threads = [threading.Thread(target=work, args=(turns,)) for turns in ([0, 1, 0], [1, 0, 1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [twins.captured.replayed for twins in pairs] == [15, 15]
