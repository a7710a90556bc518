"""Drafts change how many steps an answer takes and nothing else: whatever is guessed, all that can be seen is as it is without them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from petalnet.client.session import InferenceSession
from petalnet.client.speculation import DraftPolicy, Lookup

GREEDY = {"do_sample": False}
PROMPT, ANSWER = 9, 40


class Forced(DraftPolicy):
    """Drafts as many as it is told to, whatever that gains."""

    def __init__(self, counts: Callable[[], int]) -> None:
        super().__init__()
        self._counts = counts
        self.steps: list[int] = []  # tokens of each
        self.results: list[tuple[int, int]] = []  # drafted and accepted

    def for_answer(self) -> Forced:
        return self

    def choose(self, length: int, most: int, draft_s: float = 0.0) -> int:
        return max(min(self._counts(), most), 0)

    def note_step(self, tokens: int, seconds: float, network_s: float | None = None, queue_s: float = 0.0) -> None:
        assert seconds > 0 and queue_s >= 0 and (network_s is None or 0 < network_s <= seconds)
        self.steps.append(tokens)

    def note_draft(self, drafted: int, accepted: int, draft_s: float = 0.0) -> None:
        assert 0 <= accepted <= drafted
        self.results.append((drafted, accepted))


class Oracle(Lookup):
    """Knows the text that is to come, and is wrong at some places of it."""

    def __init__(self, text: list[int], wrong: set[int]) -> None:
        super().__init__()
        self._text = [token ^ 1 if place in wrong else token for place, token in enumerate(text)]

    @property
    def length(self) -> int:
        return 8

    def guess(self) -> int | None:
        return self._text[len(self)] if len(self) < len(self._text) else None

    def draft(self, count: int) -> list[int]:
        return self._text[len(self) : len(self) + count]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(position, new tokens) of each step of a session."""
    seen: list[tuple[int, int]] = []
    run = InferenceSession.run

    def spy(session: InferenceSession, hidden: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        seen.append((session.position, hidden.shape[1]))
        return run(session, hidden, **options)

    monkeypatch.setattr(InferenceSession, "run", spy)
    return seen


@pytest.fixture
def forced(pair: Any) -> Iterator[Callable[[Callable[[], int]], Forced]]:
    """`forced(lambda: 5)` has each step bring 5 guesses, where it may and there are as many."""
    blocks = pair.remote.remote_blocks
    before = blocks.draft_policy

    def force(counts: Callable[[], int]) -> Forced:
        blocks.draft_policy = Forced(counts)
        return blocks.draft_policy

    yield force
    blocks.draft_policy = before


@contextmanager
def session_of(pair: Any, lookup: Lookup | None = None, max_length: int = 192) -> Iterator[InferenceSession]:
    with pair.remote.inference_session(max_length=max_length) as session:
        if lookup is not None:
            session.lookup = lookup
        yield session


def answer_of(pair: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(7)
    return pair.local.generate(ids, **options)


def state_of(session: InferenceSession) -> tuple[Any, ...]:
    """What a session knows."""
    known = session.known_tokens(0)
    return session.position, session.ahead, None if known is None else known.tolist(), session._prefixes, session.rows


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95},
    "processors": {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_p": 0.01, "suppress_tokens": [5, 17]},
    "guided": {"guidance_scale": 1.5, **GREEDY},
}


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_guesses_give_the_same(pair: Any, forced: Any, steps: Any, options: dict[str, Any], seed: int) -> None:
    """Right and wrong ones in any order, as many as chance wants, in an answer over page borders."""
    ids = pair.ids(1, PROMPT, seed=seed)
    options = {"max_new_tokens": 130 if options is GREEDY and seed != 1 else ANSWER, **options}
    expected = answer_of(pair, ids, **options)
    draw = random.Random(seed)
    wrong = {place for place in range(expected.shape[1]) if draw.random() < (0.1, 0.3, 0.7)[seed]}
    states, counts = [], []
    for count in (lambda: 0, lambda: draw.choice((0, 1, 2, 3, 5, 15))):
        policy = forced(count)
        steps.clear()
        with session_of(pair, Oracle(expected[0].tolist(), wrong)) as session:
            torch.manual_seed(7)
            assert torch.equal(pair.remote.generate(ids, **options), expected)
            states.append(state_of(session))
            counts.append(len(steps))
            assert session.accepted == sum(accepted for _, accepted in policy.results) <= session.drafted
    assert states[0] == states[1] and session.accepted > 0
    if options.get("guidance_scale") is None:  # its other prompt takes steps of its own
        assert counts[0] - counts[1] == session.accepted


def test_all_right_saves_all_their_steps(pair: Any, forced: Any, steps: Any) -> None:
    ids = pair.ids(1, PROMPT)
    expected = answer_of(pair, ids, max_new_tokens=ANSWER, **GREEDY)
    forced(lambda: 15)
    with session_of(pair, Oracle(expected[0].tolist(), set())) as session:
        assert torch.equal(pair.remote.generate(ids, max_new_tokens=ANSWER, **GREEDY), expected)
        # The last token is only returned: 39 entries, which the prompt's step does not hold.
        assert steps == [(0, PROMPT), (PROMPT, 16), (PROMPT + 16, 16), (PROMPT + 32, 7)]
        assert session.position == PROMPT + ANSWER - 1
        assert session.drafted == session.accepted == 15 + 15 + 6
        assert pair.remote.last_trace.drafted == session.drafted and pair.remote.last_trace.accepted == session.accepted


def test_from_what_was_said_before(pair: Any, forced: Any, steps: Any) -> None:
    """Without any help: an answer that is said again in the same session is drafted from the first."""
    ids = pair.ids(1, PROMPT)
    expected = answer_of(pair, ids, max_new_tokens=ANSWER, **GREEDY)
    forced(lambda: 7)
    with session_of(pair) as session:
        assert torch.equal(pair.remote.generate(ids, max_new_tokens=ANSWER, **GREEDY), expected)
        said = torch.cat([expected, pair.ids(1, 5, seed=3)], dim=1)
        again = torch.cat([said, ids], dim=1)
        for number in range(2):  # the second time the text that is to come was said just so
            session.position = expected.shape[1] - 1
            session.note_tokens(expected, 0)
            steps.clear()
            answer = pair.remote.generate(again[:, expected.shape[1] :], max_new_tokens=ANSWER, **GREEDY)
            whole = answer_of(pair, again, max_new_tokens=ANSWER, **GREEDY)
            assert torch.equal(answer, whole[:, expected.shape[1] :]), number


class Watching:
    """A streamer that notes what it is given and where the session is, and may do something at one of the tokens."""

    def __init__(self, session: InferenceSession, at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.session, self.at, self.act = session, at, act
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append((value.tolist(), self.session.position))
        if len(self.seen) == self.at:
            self.act()

    def end(self) -> None:
        self.seen.append("end")


def both(pair: Any, forced: Any, text: list[int], run: Callable[[InferenceSession], Any], *, max_length: int = 192) -> Any:
    """`run` with and without drafts that are sometimes wrong: returns what it does without them, which has to be the same."""
    results = []
    for counts in ((0,), (0, 1, 4, 9, 15)):
        draw = random.Random(5)
        forced(lambda counts=counts, draw=draw: draw.choice(counts))
        with session_of(pair, Oracle(text, {14, 21, 22, 33}), max_length) as session:
            torch.manual_seed(7)
            results.append((run(session), state_of(session) if not session.closed else None))
    assert results[0] == results[1]
    assert session.drafted > 0
    return results[0][0]


@pytest.fixture
def text(pair: Any) -> list[int]:
    """A prompt and its greedy answer."""
    return answer_of(pair, pair.ids(1, PROMPT), max_new_tokens=120, **GREEDY)[0].tolist()


def test_a_streamer_sees_one_token_after_the_other(pair: Any, forced: Any, text: list[int]) -> None:
    def run(session: InferenceSession) -> Any:
        streamer = Watching(session)
        pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=ANSWER, streamer=streamer, **GREEDY)
        return streamer.seen

    seen = both(pair, forced, text, run)
    assert len(seen) == ANSWER + 2 and [position for _, position in seen[1:-1]] == list(range(PROMPT, PROMPT + ANSWER))


@pytest.mark.parametrize("at", [2, 3, 15, 24])
def test_an_exception_in_mid_answer(pair: Any, forced: Any, text: list[int], at: int) -> None:
    """The session is where it would be without drafts, and goes on from there."""

    def fail() -> None:
        raise LookupError("the streamer has no paper left")

    def run(session: InferenceSession) -> Any:
        streamer = Watching(session, at, fail)
        with pytest.raises(LookupError):
            pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=ANSWER, streamer=streamer, **GREEDY)
        state = state_of(session)
        return state, streamer.seen, pair.remote.generate(None, max_new_tokens=8, **GREEDY).tolist()

    (position, ahead, *_), _, rest = both(pair, forced, text, run)
    assert position == PROMPT + at - 2 and ahead == 0 and rest == [text[position : position + 8]]


def test_an_exception_behind_the_blocks(pair: Any, forced: Any, steps: Any, text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this machine's own part fails on what came back, guesses are no part of the session either."""
    norm = pair.remote.base_model.ln_f if pair.family == "bloom" else pair.remote.base_model.norm

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] == 8:
            raise MemoryError("there is none left")
        return type(norm).forward(norm, hidden)

    forced(lambda: 7)
    with session_of(pair, Oracle(text, set())) as session:
        with monkeypatch.context() as patches:
            patches.setattr(norm, "forward", fail)
            with pytest.raises(MemoryError):
                pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=ANSWER, **GREEDY)
        assert steps[-1] == (PROMPT, 8) and session.position == PROMPT + 1 and session.ahead == 0
        session.position = PROMPT
        session.note_tokens(torch.tensor([text[: PROMPT + 1]]), 0)
        assert pair.remote.generate(None, max_new_tokens=8, **GREEDY).tolist() == [text[PROMPT + 1 : PROMPT + 9]]


@pytest.mark.parametrize("at", [4, 16, 23])
def test_the_position_set_back_in_mid_answer(pair: Any, forced: Any, text: list[int], at: int) -> None:
    """What the library then makes of it is odd, and the same."""

    def run(session: InferenceSession) -> Any:
        def back() -> None:
            session.position -= 2

        streamer = Watching(session, at, back)
        return pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=20, streamer=streamer, **GREEDY).tolist(), streamer.seen

    both(pair, forced, text, run)


@pytest.mark.parametrize("at", [5, 12])
def test_a_session_closed_in_mid_answer(pair: Any, forced: Any, text: list[int], at: int) -> None:
    def run(session: InferenceSession) -> Any:
        streamer = Watching(session, at, session.close)
        with pytest.raises(RuntimeError, match="closed"):
            pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=20, streamer=streamer, **GREEDY)
        return streamer.seen

    both(pair, forced, text, run)


def test_an_interrupt_ends_the_session(pair: Any, forced: Any, text: list[int]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def run(session: InferenceSession) -> Any:
        with pytest.raises(KeyboardInterrupt):
            pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=20, streamer=Watching(session, 11, interrupt), **GREEDY)
        return session.closed, session.position

    assert both(pair, forced, text, run) == (True, PROMPT + 9)


@pytest.mark.parametrize("new", [1, 2, 17, 18])
def test_the_longest_answer_that_a_session_takes(pair: Any, forced: Any, steps: Any, text: list[int], new: int) -> None:
    forced(lambda: 15)
    for options in ({"max_new_tokens": new}, {"max_length": PROMPT + new}):
        with session_of(pair, Oracle(text, set()), PROMPT + new - 1) as session:
            answer = pair.remote.generate(pair.ids(1, PROMPT), **options, **GREEDY)
            assert answer.tolist() == [text[: PROMPT + new]] and session.position == session.max_length
    assert max(position + count for position, count in steps) == PROMPT + new - 1


@pytest.mark.parametrize("ending", [3, 8, 9, 20])
def test_an_end_token_inside_of_a_draft(pair: Any, forced: Any, steps: Any, text: list[int], ending: int) -> None:
    """Nothing is computed for it or behind it."""
    forced(lambda: 15)
    token = text[PROMPT + ending]
    first = text.index(token, PROMPT)
    options = {"max_new_tokens": ANSWER, "eos_token_id": [token, 251], "pad_token_id": 3, **GREEDY}
    with session_of(pair, Oracle(text, set())) as session:
        answer = pair.remote.generate(pair.ids(1, PROMPT), **options)
        assert answer.tolist() == [text[: first + 1]] and torch.equal(answer, answer_of(pair, pair.ids(1, PROMPT), **options))
        assert session.position == first == max(position + count for position, count in steps)


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Recorder(LogitsProcessor):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append((input_ids.tolist(), scores.shape))
        return scores


def test_criteria_and_processors_are_asked_for_each_token(pair: Any, forced: Any, text: list[int]) -> None:
    def run(session: InferenceSession) -> Any:
        stop, recorder = StopAt(PROMPT + 18), Recorder()
        answer = pair.remote.generate(
            pair.ids(1, PROMPT), max_new_tokens=ANSWER, stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([recorder]), **GREEDY,
        )  # fmt: skip
        return answer.tolist(), stop.lengths, recorder.calls

    answer, lengths, _ = both(pair, forced, text, run)
    assert answer == [text[: PROMPT + 18]] and lengths == list(range(PROMPT + 1, PROMPT + 19))


def test_turns_of_a_conversation(pair: Any, forced: Any, text: list[int]) -> None:
    """New inputs, none, one token at a time, back to an earlier place, and on from there."""

    def run(session: InferenceSession) -> Any:
        answers = [pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=12, **GREEDY)]
        answers += [pair.remote.generate(None, max_new_tokens=count, **GREEDY) for count in (1, 1, 9)]
        answers.append(pair.remote.generate(pair.ids(1, 4, seed=2), max_new_tokens=11, do_sample=True))
        session.position = 15
        answers.append(pair.remote.generate(None, max_new_tokens=20, **GREEDY))
        session.position = 0
        answers.append(pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=30, **GREEDY))
        return [answer.tolist() for answer in answers]

    answers = both(pair, forced, text, run)
    assert answers[-1] == [text[: PROMPT + 30]]


def test_a_cache_from_forward(pair: Any, forced: Any, text: list[int]) -> None:
    forced(lambda: 6)
    with torch.inference_mode():
        cache = pair.remote(torch.tensor([text[:20]]), use_cache=True).past_key_values
    cache.session.lookup = Oracle(text, {24})
    answer = pair.remote.generate(torch.tensor([text[:23]]), past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert answer.tolist() == [text[:43]] and cache.session.accepted > 8 and cache.session.position == 42
    cache.session.close()


def test_from_embeddings(pair: Any, forced: Any, text: list[int]) -> None:
    embeddings = pair.local.get_input_embeddings()(pair.ids(1, PROMPT)).detach()

    def run(session: InferenceSession) -> Any:
        return pair.remote.generate(inputs_embeds=embeddings, max_new_tokens=30, **GREEDY).tolist()

    assert both(pair, forced, text, run) == [text[PROMPT : PROMPT + 30]]


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_in_chunks(pair: Any, forced: Any, text: list[int], chunk: int) -> None:
    def run(session: InferenceSession) -> Any:
        return pair.remote.generate(pair.ids(1, PROMPT), max_new_tokens=30, prefill_chunk_size=chunk, **GREEDY).tolist()

    assert both(pair, forced, text, run) == [text[: PROMPT + 30]]


def test_logits_and_scores(pair: Any, forced: Any, text: list[int]) -> None:
    forced(lambda: 6)
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True, "output_scores": True, **GREEDY}
    expected = pair.local.generate(pair.ids(1, PROMPT), **options)
    with session_of(pair, Oracle(text, {14, 15})) as session:
        answer = pair.remote.generate(pair.ids(1, PROMPT), **options)
        assert session.accepted > 8 and answer.past_key_values.get_seq_length() == session.position
    assert torch.equal(answer.sequences, expected.sequences) and len(answer.logits) == len(answer.scores) == 20
    for ours, theirs in zip(answer.logits, expected.logits, strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)


def test_pages_of_wrong_guesses_are_found_by_nobody(pair: Any, forced: Any, text: list[int]) -> None:
    """Drafts over the borders of units are named as what they are; a later prompt finds what was said, and is answered as ever."""
    ids = pair.ids(1, PROMPT)
    said = answer_of(pair, ids, max_new_tokens=150, **GREEDY)
    for wrong in ({64}, {62, 65, 126, 129}):
        forced(lambda: 15)
        with session_of(pair, Oracle(said[0].tolist(), wrong), 256):
            assert torch.equal(pair.remote.generate(ids, max_new_tokens=150, **GREEDY), said)
        more = torch.cat([said, pair.ids(1, 3, seed=8)], dim=1)
        forced(lambda: 0)
        expected = answer_of(pair, more, max_new_tokens=6, **GREEDY)
        assert torch.equal(pair.remote.generate(more, max_new_tokens=6, **GREEDY), expected)


# ---- where nothing is drafted


def hooked(pair: Any) -> Any:
    norm = pair.remote.base_model.ln_f if pair.family == "bloom" else pair.remote.base_model.norm
    return norm.register_forward_hook(lambda *_: None)


def test_nothing_is_drafted_where_somebody_would_see_it(pair: Any, forced: Any, steps: Any, text: list[int]) -> None:
    forced(lambda: 6)
    ids = torch.tensor([text[:20]])
    padded = torch.cat([torch.full((1, 3), 3), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    runs: dict[str, Callable[[], Any]] = {
        "hidden states": lambda: pair.remote.generate(
            ids, output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=6, **GREEDY
        ),
        "rows": lambda: pair.remote.generate(ids.repeat(2, 1), max_new_tokens=6, **GREEDY),
        "beams": lambda: pair.remote.generate(ids, max_new_tokens=6, num_beams=2, **GREEDY),
        "several answers": lambda: pair.remote.generate(ids, max_new_tokens=6, num_return_sequences=2, do_sample=True),
        "padding": lambda: pair.remote.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY),
        "positions": lambda: pair.remote.generate(ids, position_ids=torch.arange(1, 21)[None], max_new_tokens=6, **GREEDY),
    }
    if pair.family == "bloom":
        del runs["positions"]  # it has none
    for name, run in runs.items():
        steps.clear()
        with session_of(pair, Oracle(text if name != "padding" else [3, 3, 3, *text], set())) as session:
            run()
        assert session.drafted == 0 and len(steps) == 6, name
    hook = hooked(pair)
    try:
        with session_of(pair, Oracle(text, set())) as session:
            pair.remote.generate(ids, max_new_tokens=6, **GREEDY)
        assert session.drafted == 0
    finally:
        hook.remove()


def test_nothing_is_drafted_outside_of_generate(pair: Any, forced: Any, steps: Any, text: list[int]) -> None:
    forced(lambda: 6)
    with torch.inference_mode(), session_of(pair, Oracle(text, set())) as session:
        for start in range(6):
            pair.remote(torch.tensor([text[start : start + 1]]), use_cache=True)
        assert session.position == 6 and session.drafted == 0 and len(steps) == 6


def test_not_where_it_is_turned_off(pair: Any, steps: Any, connect: Any) -> None:
    with connect(pair.path, pair.servers.peers, speculation=False) as model:
        model.remote_blocks.draft_policy = Forced(lambda: 6)
        ids = pair.ids(1, 6).repeat(1, 3)
        expected = pair.local.generate(ids, max_new_tokens=12, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=12, **GREEDY), expected) and len(steps) == 12


def test_what_was_learned_is_there_for_the_next_answer(pair: Any) -> None:
    blocks = pair.remote.remote_blocks
    before = blocks.draft_policy
    try:
        blocks.draft_policy = DraftPolicy()
        pair.remote.generate(pair.ids(1, 6).repeat(1, 4), max_new_tokens=30, **GREEDY)
        assert blocks.draft_policy.seconds.most_measured >= 1
    finally:
        blocks.draft_policy = before


# ---- draft models


@pytest.mark.parametrize(("seed", "noise"), [(0, 0.0), (1, 0.02), (2, 0.02), pytest.param(3, 0.5, marks=pytest.mark.long)])
def test_any_number_of_proposals_gives_the_same(pair: Any, noise: float, seed: int) -> None:
    """None at all for some rounds included."""
    assistant = AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * noise)
    assistant.generation_config.assistant_confidence_threshold = 0.0  # random weights are never sure
    blocks, draw = pair.remote.remote_blocks, random.Random(seed)
    before = blocks.assistant_policy
    blocks.assistant_policy = policy = Forced(lambda: draw.choice((0, 0, 1, 3, 8)))
    try:
        for ids in (pair.ids(1, 7, seed=seed), torch.full((1, 1), 9)):
            expected = pair.local.generate(ids, max_new_tokens=25, **GREEDY)
            assert torch.equal(pair.remote.generate(ids, max_new_tokens=25, assistant_model=assistant, **GREEDY), expected)
        assert any(drafted > 1 for drafted, _ in policy.results) and 1 in policy.steps
    finally:
        blocks.assistant_policy = before


def test_a_draft_model_with_a_schedule_of_its_own_keeps_it(pair: Any) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32).eval()
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    assistant.generation_config.num_assistant_tokens = 3
    ids = pair.ids(1, 7)
    expected = pair.local.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(pair.remote.generate(ids, max_new_tokens=20, assistant_model=assistant, **GREEDY), expected)
    assert assistant.generation_config.num_assistant_tokens > 3
