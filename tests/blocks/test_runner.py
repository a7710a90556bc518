"""Rounds over pages, held against the library's own pass through the same blocks: however steps are cut, shared, rolled back and failed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outcome
import pytest
import torch

from petalnet.blocks.kv import KVStore
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.prefixes import PrefixCache
from petalnet.blocks.promises import Promise
from petalnet.blocks.runner import Runner
from petalnet.blocks.scheduler import Part, Task
from petalnet.blocks.sessions import Session
from petalnet.blocks.span import Span
from petalnet.blocks.work import StepWork
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.session_messages import UNIT_TOKENS, Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor
from tests.blocks.spans import DEVICES

pytestmark = DEVICES

HIDDEN, FIRST, END = 32, 1, 3
X = torch.randn(4, 150, HIDDEN, generator=torch.Generator().manual_seed(3))


class Rounds:
    """A runner over its own store, and the same blocks to compare with."""

    def __init__(self, folder: Path, *, pages: int = 64, share_prefixes: bool = False) -> None:
        self.span, self.twin = (Span.load(ModelSource.open(folder), FIRST, END) for _ in range(2))
        page_tokens = self.span.backend.page_tokens
        self.span.attach(self.span.make_store(pages))
        self.pool = PagePool(pages, page_tokens)
        self.prefixes = PrefixCache(self.pool)
        self.runner = Runner(self.span, self.pool, self.prefixes, share_prefixes=share_prefixes)
        self.sessions: list[Session] = []

    def session(self, peer_id: str = "peer", first: int = FIRST, end: int = END, max_length: int = 160) -> Session:
        session = Session(peer_id, first, end, max_length, Promise(peer_id), Rows(self.pool, max_length))
        self.sessions.append(session)
        return session

    def close(self, session: Session) -> None:
        self.sessions.remove(session)
        self.runner.release(session)

    def task(self, session: Session, hidden: torch.Tensor, position: int, **options: Any) -> Task:
        order, names = options.pop("order", None), options.pop("names", None)
        flags = {name: options.pop(name) for name in ("keep", "all_hidden") if name in options}
        request = Step(
            step=0,
            position=position,
            hidden=encode_tensor(hidden),
            **flags,
            **{name: encode_tensor(tensor) for name, tensor in options.items()},
        )
        rows, new, _ = hidden.shape
        key = (session.first, session.end, self.span.batch_key(position + new, session))
        return Task("peer", session, key, new, rows, "step", 10**9, StepWork(session, request, order, names))

    def run(self, *parts: Part) -> list[Any]:
        outcomes = self.runner.run(parts)
        self.check()
        return [None if result is None else result.unwrap() for result in outcomes]

    def step(self, session: Session, hidden: torch.Tensor, position: int, cuts: tuple[int, ...] = (), **options: Any) -> torch.Tensor:
        task = self.task(session, hidden, position, **options)
        edges = [0, *cuts, task.units]
        answers = [self.run(Part(task, start, end))[0] for start, end in zip(edges, edges[1:], strict=False)]
        assert all(answer is None for answer in answers[:-1])
        return decode_tensor(answers[-1])

    def check(self) -> None:
        self.runner.check(self.sessions)

    def whole(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack(self.twin.forward(hidden, **options))


@pytest.fixture(params=["llama", "bloom", "mistral", "gptj"])
def rounds(request: pytest.FixtureRequest, saved: Callable[..., Path]) -> Rounds:
    options = {"n_positions": 256} if request.param == "gptj" else {}
    return Rounds(saved(request.param, **options))


@pytest.fixture
def llama(saved: Callable[..., Path]) -> Rounds:
    return Rounds(saved("llama"))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_prompt_in_one_part_or_several(rounds: Rounds) -> None:
    expected = rounds.whole(X[:3], all_hidden=True)
    close(rounds.step(rounds.session(), X[:3], 0), expected[-1])
    close(rounds.step(rounds.session(), X[:3], 0, cuts=(1, 40, 149)), expected[-1])
    close(rounds.step(rounds.session(), X[:3], 0, cuts=(33,), all_hidden=True), expected)
    prompts = torch.randn(2, 3, 40, HIDDEN)
    close(rounds.step(rounds.session(), X[:3], 0, cuts=(33, 36), prompts=prompts), rounds.whole(X[:3], prompts=prompts)[-1])


def test_only_wanted_outputs_come_back(rounds: Rounds) -> None:
    expected = rounds.whole(X[:2], all_hidden=True)
    for keep in (1, 50, 150):
        close(rounds.step(rounds.session(), X[:2], 0, cuts=(70, 120), keep=keep), expected[-1][:, -keep:])
        close(rounds.step(rounds.session(), X[:2], 0, cuts=(70, 120), keep=keep, all_hidden=True), expected[:, :, -keep:])


def test_sessions_share_a_round(rounds: Rounds) -> None:
    """A chunk of a prompt, a token of one session, rows with padding of another, and a step without tokens."""
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :3] = False
    expected = [rounds.whole(X[:1])[-1], rounds.whole(X[1:2])[-1], rounds.whole(X[2:4, :8], attention_mask=mask)[-1]]
    prompt, token, padded, empty = (rounds.session() for _ in range(4))
    rounds.step(token, X[1:2, :99], 0)
    rounds.step(padded, X[2:4, :7], 0, mask=mask[:, :7])
    rounds.step(empty, X[:2, :5], 0)
    tasks = [rounds.task(prompt, X[:1], 0), rounds.task(token, X[1:2, 99:100], 99), rounds.task(padded, X[2:4, 7:8], 7, mask=mask)]
    reordered = rounds.task(empty, X[:3, :0], 5, order=[1, 1, 0])
    packs = rounds.span.packs
    first, second, third, nothing = rounds.run(Part(tasks[0], 0, 70), *(Part(task, 0, 1) for task in tasks[1:]), Part(reordered, 0, 0))
    assert first is None and rounds.span.packs == packs
    close(decode_tensor(second), expected[1][:, 99:100])
    close(decode_tensor(third), expected[2][:, 7:])
    assert nothing.shape == (3, 0, HIDDEN)
    close(decode_tensor(rounds.run(Part(tasks[0], 70, 150))[0]), expected[0])
    close(rounds.step(empty, X[[1, 1, 0], 5:9], 5), rounds.whole(X[[1, 1, 0], :9])[-1][:, 5:])


def test_back_and_forth(rounds: Rounds) -> None:
    expected = rounds.whole(X[:2])[-1]
    session = rounds.session()
    rounds.step(session, X[:2, :100], 0)
    rounds.step(session, -X[:2, 40:140], 40)
    close(rounds.step(session, X[:2, 40:], 40, cuts=(7,)), expected[:, 40:])
    order = [1, 0, 1, 1]
    close(rounds.step(session, X[order, 101:], 101, order=order), expected[order][:, 101:])
    close(rounds.step(session, X[:1, :5], 0), expected[:1, :5])
    close(rounds.step(session, X[:3, :5], 0), rounds.whole(X[:3, :5])[-1])


def test_blocks_in_part(llama: Rounds) -> None:
    session, other = llama.session(first=2), llama.session(end=2)
    close(llama.step(session, X[:2, :40], 0), llama.whole(X[:2, :40], first=2)[-1])
    close(llama.step(other, X[:2, :40], 0), llama.whole(X[:2, :40], end=2)[-1])
    close(llama.step(session, X[[0, 0], 40:], 40, order=[0, 0]), llama.whole(X[[0, 0]], first=2)[-1][:, 40:])


def test_a_failed_pass_is_the_fault_of_one(llama: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, large = llama.session(), llama.session(), llama.session()
    tasks = [llama.task(session, X[:1, :10], 0) for session in (good, bad, large)]
    step = llama.span.stages[0].step

    def failing(steps: Any, *blocks: int) -> Any:
        if any(one.rows.tables == bad.kv.tables for one in steps):
            raise ZeroDivisionError("defect")
        if any(one.rows.tables == large.kv.tables for one in steps):
            raise torch.OutOfMemoryError("too much")
        return step(steps, *blocks)

    monkeypatch.setattr(llama.span.stages[0], "step", failing)
    outcomes = llama.runner.run([Part(task, 0, 10) for task in tasks])
    close(decode_tensor(outcomes[0].unwrap()), llama.whole(X[:1, :10])[-1])  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        outcomes[1].unwrap()  # type: ignore[union-attr]
    with pytest.raises(torch.OutOfMemoryError):
        outcomes[2].unwrap()  # type: ignore[union-attr]
    for session in (good, bad, large):
        llama.close(session)
    llama.check()
    assert llama.pool.free == llama.pool.pages


def test_a_pass_that_ran_out_of_memory_leaves_it_to_the_next(llama: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [llama.task(llama.session(), X[:1, :10], 0) for _ in range(3)]
    step, held = llama.span.stages[0].step, []

    def failing(steps: Any, *blocks: int) -> Any:
        assert [one() for one in held] == [None] * len(held)
        activations = torch.empty(1000)
        held.append(weakref.ref(activations))
        if len(steps) > 1 or len(held) == 2:
            raise torch.OutOfMemoryError("too much")
        return step(steps, *blocks)

    monkeypatch.setattr(llama.span.stages[0], "step", failing)
    outcomes = llama.runner.run([Part(task, 0, 10) for task in tasks])
    assert [isinstance(one, outcome.Value) for one in outcomes] == [False, True, True] and len(held) == 4


def test_a_step_that_cannot_begin_harms_no_other(llama: Rounds) -> None:
    good, bad = llama.session(), llama.session(max_length=5)
    outcomes = llama.runner.run([Part(llama.task(bad, X[:1, :10], 0), 0, 10), Part(llama.task(good, X[:1, :10], 0), 0, 10)])
    with pytest.raises(ValueError, match="more than the 5"):
        outcomes[0].unwrap()  # type: ignore[union-attr]
    close(decode_tensor(outcomes[1].unwrap()), llama.whole(X[:1, :10])[-1])  # type: ignore[union-attr]


# Prefixes

NAMES = [[bytes([row, unit]) * 8 for unit in range(3)] for row in range(4)]


def test_a_session_goes_on_where_an_earlier_one_was(rounds: Rounds) -> None:
    expected = rounds.whole(X[:2])[-1]
    first = rounds.session()
    rounds.step(first, X[:2], 0, cuts=(90,), names=[NAMES[0][:2], NAMES[1][:2]])
    for opened in (True, False):
        second = rounds.session()
        assert rounds.runner.attach(second, [NAMES[1], NAMES[0]]) == 2 * UNIT_TOKENS == second.kv.length
        close(rounds.step(second, X[[1, 0], 128:], 128), expected[[1, 0], 128:])
        third = rounds.session()
        assert rounds.runner.attach(third, [NAMES[1][:2]]) == 128
        close(rounds.step(third, X[1:2, 100:], 100), expected[1:2, 100:])  # other servers of its route knew less
        close(rounds.step(second, -X[:2, 60:70], 60), rounds.whole(torch.cat([X[[1, 0], :60], -X[:2, 60:70]], 1))[-1][:, 60:])
        fourth = rounds.session()
        assert rounds.runner.attach(fourth, [NAMES[0]]) == 128
        close(rounds.step(fourth, X[:1, 128:], 128), expected[:1, 128:])  # what others wrote went to pages of their own
        for session in (second, third, fourth):
            rounds.close(session)
        if opened:
            rounds.close(first)
    rounds.check()
    assert rounds.runner.kept_tokens == 4 * UNIT_TOKENS
    rounds.prefixes.evict(rounds.pool.pages)
    assert rounds.pool.free == rounds.pool.pages and rounds.runner.kept_tokens == 0


def test_only_what_all_rows_know_is_attached(llama: Rounds) -> None:
    llama.step(llama.session(), X[:2, :140], 0, names=[NAMES[0][:2], NAMES[1][:2]])
    other = llama.session()
    assert llama.runner.attach(other, [NAMES[0], [NAMES[1][0], NAMES[2][1]]]) == UNIT_TOKENS
    assert llama.runner.attach(llama.session(), [NAMES[0], NAMES[2]]) == 0
    assert other.names == [NAMES[0][:1], NAMES[1][:1]]


def test_names_belong_to_a_peer_and_to_blocks(llama: Rounds) -> None:
    llama.step(llama.session("alice"), X[:1, :70], 0, names=[NAMES[0][:1]])
    assert llama.runner.attach(llama.session("bob"), [NAMES[0]]) == 0
    assert llama.runner.attach(llama.session("alice", first=2), [NAMES[0]]) == 0
    assert llama.runner.attach(llama.session("alice"), [NAMES[0]]) == UNIT_TOKENS


def test_a_host_may_share_prefixes(saved: Callable[..., Path]) -> None:
    rounds = Rounds(saved("llama"), share_prefixes=True)
    rounds.step(rounds.session("alice"), X[:1, :70], 0, names=[NAMES[0][:1]])
    bob = rounds.session("bob")
    assert rounds.runner.attach(bob, [NAMES[0]]) == UNIT_TOKENS
    close(rounds.step(bob, X[:1, 64:], 64), rounds.whole(X[:1])[-1][:, 64:])
    assert rounds.runner.attach(rounds.session("bob", first=2), [NAMES[0]]) == 0, "other blocks have no entries in these pages"


def test_naming_ends_with_a_unit_that_has_no_name(llama: Rounds) -> None:
    session = llama.session()
    llama.step(session, X[:1, :70], 0)
    llama.step(session, X[:1, 70:140], 70, names=[NAMES[0][:1]])
    assert session.names == [[]] and llama.runner.kept_tokens == 0
    llama.step(session, X[:1, 30:70], 30, names=[NAMES[0][:1]])  # gone back, its first unit is named after all
    assert llama.runner.attach(llama.session(), [NAMES[0]]) == UNIT_TOKENS


def test_names_follow_rows(llama: Rounds) -> None:
    session = llama.session()
    llama.step(session, X[:2, :70], 0, names=[NAMES[0][:1], NAMES[1][:1]])
    order = [1, 0, 0]
    named = [[NAMES[1][1]], [NAMES[0][1]], [NAMES[2][1]]]
    llama.step(session, X[[1, 0, 2], 70:], 70, order=order, names=named)
    found = llama.session()
    assert llama.runner.attach(found, [[NAMES[0][0], NAMES[2][1]]]) == 128
    expected = llama.whole(torch.cat([X[:1, :70], X[2:3, 70:]], 1))[-1]
    close(llama.step(found, X[2:3, 128:], 128), expected[:, 128:])


SCALINGS: dict[str, Any] = {
    "phi3": {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
        "original_max_position_embeddings": 100,
        "max_position_embeddings": 400,
    },
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": 100},
}


@pytest.mark.parametrize("family", SCALINGS)
def test_keys_are_shared_only_where_all_lengths_have_the_same_angles(saved: Callable[..., Path], family: str) -> None:
    rounds = Rounds(saved(family, **SCALINGS[family]))
    short, long = rounds.session(max_length=100), rounds.session()
    rounds.step(long, X[:1], 0, names=[NAMES[0][:2]])
    assert rounds.runner.attach(rounds.session(max_length=100), [NAMES[0]]) == 0, "a long prompt's angles are others"
    rounds.step(short, X[:1, :80], 0, names=[NAMES[0][:1]])
    again, longer = rounds.session(max_length=100), rounds.session()
    assert rounds.runner.attach(again, [NAMES[0]]) == UNIT_TOKENS
    close(rounds.step(again, X[:1, 64:100], 64), rounds.whole(X[:1, :100])[-1][:, 64:])
    assert rounds.runner.attach(longer, [NAMES[0]]) == 0
    close(rounds.step(longer, X[:1], 0), rounds.whole(X[:1])[-1])


def test_pages_that_were_not_copied_are_not_found(llama: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie scattered are brought together, which may fail where memory ends; the names of what was there must not stand for it."""
    session = llama.session()
    hidden = X[[0, 0]]
    llama.step(session, hidden[:1, :70], 0, names=[NAMES[0][:1]])
    llama.step(session, hidden[:, 70:71], 70, order=[0, 0])
    llama.prefixes.forget(session.kv.tables[1][0])
    assert llama.runner.kept_tokens == 0
    for page in range(llama.pool.pages):
        if not llama.pool.holders(page):
            for tensor in (*llama.span.store.keys, *llama.span.store.values):  # type: ignore[union-attr]
                tensor[page * llama.pool.page_tokens : (page + 1) * llama.pool.page_tokens] = 9.0

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(KVStore, "copy_pages", fail)
        for position in range(71, 80):
            llama.step(session, hidden[:, position : position + 1], position)
    assert session.kv.tables[0][:2] != session.kv.tables[1][:2]
    llama.close(session)
    assert llama.runner.attach(llama.session(), [NAMES[0]]) == 0


def test_what_was_copied_for_a_pass_that_failed_is_found(llama: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    session = llama.session()
    hidden = X[[0, 0]]
    llama.step(session, hidden[:1, :70], 0, names=[NAMES[0][:1]])
    llama.step(session, hidden[:, 70:71], 70, order=[0, 0])
    llama.prefixes.forget(session.kv.tables[1][0])
    copy, step = KVStore.copy_pages, llama.span.stages[0].step
    copied: list[Any] = []

    def noting(store: KVStore, *args: Any) -> None:
        copied.append(args)
        copy(store, *args)

    def failing(*args: Any) -> Any:
        return 1 // 0 if copied else step(*args)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(KVStore, "copy_pages", noting)
        patch.setattr(llama.span.stages[0], "step", failing)
        for position in range(71, 80):
            llama.step(session, hidden[:, position : position + 1], position)
    llama.close(session)
    other = llama.session()
    assert llama.runner.attach(other, [NAMES[0]]) == UNIT_TOKENS
    close(llama.step(other, X[:1, 64:], 64), llama.whole(X[:1])[-1][:, 64:])


def test_a_part_that_cannot_begin_ends_its_step_whatever_becomes_of_those_before(llama: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on several devices: the part before is still under way when the session hears of it and goes on with something else."""
    session = llama.session()
    llama.step(session, X[:1, :8], 0)
    session.pushes = True  # so that it hears of inputs that are not finite
    spoilt = llama.task(session, X[:1, 8:60].log(), 8)
    before = llama.runner.begin([Part(spoilt, 0, 30)])
    with monkeypatch.context() as patch:
        patch.setattr(session.kv, "prepare", lambda new: 1 // 0)
        (failed,) = llama.runner.finish(llama.runner.begin([Part(spoilt, 30, 52)]))
    assert isinstance(failed, outcome.Error) and session.kv.length == 8
    after = llama.runner.begin([Part(llama.task(session, X[:1, 8:60], 8), 0, 52)])
    answers = []
    for begun in (before, after):
        for visit in range(len(begun.devices)):
            begun.run(visit)
        answers += llama.runner.finish(begun)
    assert answers[0] is None and session.kv.length == 60
    close(decode_tensor(answers[1].unwrap()), llama.whole(X[:1, :60])[-1][:, 8:])


def test_what_is_kept_makes_room_for_sessions(saved: Callable[..., Path]) -> None:
    rounds = Rounds(saved("llama"), pages=160 // 32 + 4)
    assert rounds.span.backend.page_tokens == 32
    for number in range(6):
        session = rounds.session()
        rounds.step(session, X[number % 4 : number % 4 + 1], 0, names=[[bytes([9, number, unit, 0]) * 4 for unit in range(2)]])
        rounds.close(session)
        rounds.check()
    assert 0 < rounds.runner.kept_tokens <= 9 * 32


def test_a_session_that_ends_in_mid_prompt_leaves_nothing(llama: Rounds) -> None:
    session = llama.session()
    llama.run(Part(llama.task(session, X[:2], 0, names=[NAMES[0][:2], NAMES[1][:2]]), 0, 100))
    llama.close(session)
    llama.check()
    assert llama.pool.free == llama.pool.pages
