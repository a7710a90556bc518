"""Traces of real answers: one a `generate`, in the thread that asked, with a line in the log."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from petalnet.client import tracing
from petalnet.client.settings import ClientSettings
from petalnet.client.trace import Trace
from petalnet.errors import MissingBlocksError, UsageError

GREEDY: dict[str, Any] = {"do_sample": False}
LOGGER = "petalnet.client.tracing"


def parts(trace: Trace) -> float:
    return trace.network_s + trace.local_s + trace.waiting_s + sum(hop.held_s for hop in trace.hops)


def test_an_answer_leaves_its_trace(pair) -> None:
    ids = pair.ids(1, 20)
    pair.remote.generate(ids, max_new_tokens=6, **GREEDY)
    trace = pair.remote.last_trace
    assert (trace.tokens, trace.rows, trace.error, trace.complete) == (6, 1, None, True)
    assert 1 <= trace.steps <= 6 and (trace.prompt_tokens, trace.prompt_chunks) == (20, 1)
    assert [(hop.first, hop.end) for hop in trace.hops] == [(0, 2), (2, 5), (5, 6)]
    assert {hop.peer_id for hop in trace.hops} == {server.peer_id for server in pair.servers.servers if server.alive}
    assert all(hop.steps == trace.steps and hop.compute_s > 0 for hop in trace.hops)
    assert parts(trace) == pytest.approx(trace.wall_s)
    assert 0 < trace.first_token_s < trace.wall_s
    assert trace.slowest in str(trace)


def test_answers_of_one_session_have_a_trace_each(pair) -> None:
    ids = pair.ids(2, 8)
    with pair.remote.inference_session(max_length=64) as session:
        assert session.trace.steps == 0
        pair.remote.generate(ids, max_new_tokens=4, session=session, **GREEDY)
        first = session.trace
        assert first is pair.remote.last_trace and (first.tokens, first.rows, first.prompt_tokens) == (4, 2, 8)
        pair.remote.generate(None, max_new_tokens=3, session=session, **GREEDY)
        second = session.trace
        assert second is pair.remote.last_trace is not first
        assert (first.tokens, second.tokens, second.prompt_tokens) == (4, 3, 1)


def test_steps_by_hand_are_no_part_of_an_answer_before(pair) -> None:
    with pair.remote.inference_session(max_length=64) as session:
        pair.remote.generate(pair.ids(1, 8), max_new_tokens=3, session=session, **GREEDY)
        trace, steps = session.trace, session.trace.steps
        session.position = 0
        hidden = torch.randn(1, 4, pair.remote.config.hidden_size)
        session.step(hidden)
        session.step(hidden)
        assert trace.steps == steps and pair.remote.last_trace is trace
        assert session.trace.steps == 2 and not session.trace.complete
        assert str(session.trace).startswith("2 steps in ")


def test_tokens_are_counted_without_the_prompt(pair) -> None:
    """Beams end with the rows that are returned; embeddings are no ids, so the library returns the new tokens only."""
    pair.remote.generate(pair.ids(1, 8), max_new_tokens=5, num_beams=3, num_return_sequences=2, **GREEDY)
    assert (pair.remote.last_trace.tokens, pair.remote.last_trace.rows) == (5, 2)
    embeds = pair.remote.get_input_embeddings()(pair.ids(1, 8))
    pair.remote.generate(inputs_embeds=embeds, max_new_tokens=5, **GREEDY)
    assert pair.remote.last_trace.tokens == 5


def test_chunks_of_a_prompt_are_no_tokens(pair) -> None:
    pair.remote.generate(pair.ids(1, 20), max_new_tokens=6, prefill_chunk_size=4, **GREEDY)
    trace = pair.remote.last_trace
    assert (trace.tokens, trace.input_entries) == (6, 20) and len(trace._pauses) == 5


def test_each_thread_has_its_own_last_trace(pair) -> None:
    ids = pair.ids(1, 8)
    pair.remote.generate(ids, max_new_tokens=2, **GREEDY)
    own = pair.remote.last_trace

    def elsewhere() -> tuple[Trace | None, Trace | None]:
        before = pair.remote.last_trace
        pair.remote.generate(ids, max_new_tokens=3, **GREEDY)
        return before, pair.remote.last_trace

    with ThreadPoolExecutor(1) as pool:
        before, after = pool.submit(elsewhere).result()
    assert before is None and after is not None and after.tokens == 3
    assert pair.remote.last_trace is own
    assert copy.deepcopy(pair.remote).last_trace is None


def test_an_answer_that_fails_says_so_in_its_trace_and_in_the_log(pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)

    class Stop(Exception):
        pass

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 10:
            raise Stop("somebody's processor\nfailed")
        return scores

    with pytest.raises(Stop):
        pair.remote.generate(pair.ids(1, 8), max_new_tokens=5, logits_processor=[stop], **GREEDY)
    trace = pair.remote.last_trace
    assert trace.error == "somebody's processor failed" and trace.tokens == 2
    assert "cut short: somebody's processor failed" in caplog.text


def test_an_answer_that_was_interrupted(pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)

    def interrupt(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.remote.generate(pair.ids(1, 8), max_new_tokens=5, logits_processor=[interrupt], **GREEDY)
    assert pair.remote.last_trace.error == "interrupted" and "cut short: interrupted" in caplog.text


def test_an_answer_that_found_no_servers_waited(pair) -> None:
    blocked = [server.peer_id for server in pair.servers.servers if server.span[0] == 0]
    options = {"initial_peers": pair.servers.peers, "dtype": torch.float32, "blocked_servers": blocked, "show_route": False}
    with type(pair.remote).from_pretrained(str(pair.path), **options) as model:
        with pytest.raises(MissingBlocksError):
            model.generate(pair.ids(1, 8), max_new_tokens=5, **GREEDY)
        assert model.last_trace.steps == 0 and model.last_trace.tokens == 0
        assert model.last_trace.slowest.startswith(("waiting for servers", "this machine"))


@pytest.mark.parametrize("show_route", ["inference", True, False])
def test_a_slow_answer_is_told_of_and_its_route_where_that_is_wanted(
    pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, show_route: Any
) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    options = {"initial_peers": pair.servers.peers, "dtype": torch.float32, "show_route": show_route}
    with type(pair.remote).from_pretrained(str(pair.path), **options) as model:
        for slow_s, level in ((0.0, logging.INFO), (60.0, logging.DEBUG)):
            monkeypatch.setattr(tracing, "SLOW_S", slow_s)
            caplog.clear()
            model.generate(pair.ids(1, 8), max_new_tokens=2, **GREEDY)
            (line,) = (record for record in caplog.records if record.name == LOGGER)
            assert line.levelno == level
            assert line.getMessage().startswith("2 tokens in ") and model.last_trace.slowest in line.getMessage()
            assert ("; route: 0:2 at …" in line.getMessage()) == bool(show_route)


@pytest.mark.parametrize("show_route, lines", [("inference", 0), (True, 1), (False, 0), (None, 0)])
def test_routes_of_passes_are_shown_on_demand(pair, caplog: pytest.LogCaptureFixture, show_route: Any, lines: int) -> None:
    caplog.set_level(logging.INFO, "petalnet")
    options = {"initial_peers": pair.servers.peers, "dtype": torch.float32, "show_route": show_route}
    with type(pair.remote).from_pretrained(str(pair.path), **options) as model:
        model(pair.ids(1, 8), use_cache=False)
    assert caplog.text.count("route of a pass: 0:2 at …") == lines


def test_a_wish_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="show_route needs \"inference\", True or False; got 'training'"):
        ClientSettings(show_route="training")


def test_a_trace_does_not_keep_its_model() -> None:
    class Session:
        drafted = accepted = 0

        def begin_trace(self) -> Trace:
            return Trace(0.0)

    model = torch.nn.Linear(1, 1)
    with tracing.tracing(model, Session(), show_route=True) as trace:  # type: ignore[arg-type]
        pass
    assert tracing.last_trace(model) is trace
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
