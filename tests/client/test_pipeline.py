"""The steps under way in a chain, against servers as the protocol describes them: every step is answered, whatever links do meanwhile."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.client.inputs import Inputs, steps_of, wanted_tokens
from petalnet.client.pipeline import Pipeline, Send
from petalnet.errors import ProtocolError
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.session_messages import KEEP_NONE, LinkDown, Replay, Step, StepDone
from petalnet.routing.routes import Hop

BLOCKS = 2  # of each hop


def hidden_of(values: list[int]) -> Blob:
    """One row of tokens with one feature each."""
    return Blob("float32", (1, len(values), 1), "raw", struct.pack(f"<{len(values)}i", *values))


def values_of(blob: Blob) -> list[int]:
    return list(struct.unpack(f"<{len(blob.data) // 4}i", blob.data))


def hops_of(count: int) -> list[Hop]:
    return [Hop(f"peer {index}", (), index * BLOCKS, (index + 1) * BLOCKS) for index in range(count)]


class Server:
    """One hop: adds 1 to every token in each of its blocks, and keeps to the protocol."""

    def __init__(self, index: int, count: int, pushes: bool) -> None:
        self.index = index
        self.is_last = index == count - 1
        self.is_up = pushes
        self.pushes = pushes
        self.taken = self.pushed = self.position = 0
        self.from_client: deque[Message] = deque()
        self.link: deque[Step] = deque()  # from here to the next one
        self.to_client: deque[Message] = deque()
        self.kept: dict[int, Blob] = {}
        self.asked: list[Replay] = []

    def take(self, message: Message) -> None:
        if isinstance(message, Replay):
            assert self.pushes
            self.asked.append(message)
        else:
            assert isinstance(message, Step)
            if message.step <= self.taken:
                return
            assert message.position <= self.position, "a step was left out"
            self.taken, self.position = message.step, message.position + message.hidden.shape[1]
            self.answer(message)
        for replay in [replay for replay in self.asked if replay.step <= self.taken]:
            self.asked.remove(replay)
            assert replay.tokens == self.kept[replay.step].shape[1]
            self.to_client.append(StepDone(replay.step, 0, self.kept[replay.step]))

    def answer(self, step: Step) -> None:
        values = values_of(step.hidden)
        if self.pushes and step.prompts is not None:
            assert step.prompts.shape[0] % BLOCKS == 0
        elif step.prompts is not None:
            assert step.prompts.shape[0] == BLOCKS
        output = hidden_of([value + BLOCKS for value in values])
        new = step.hidden.shape[1]
        wanted = wanted_tokens(step) if not self.pushes else new
        shown = hidden_of([value + BLOCKS for value in values[new - wanted :]])
        if step.all_hidden:
            parts = [[value + block + 1 for value in values[new - wanted :]] for block in range(BLOCKS)]
            data = b"".join(bytes(hidden_of(part).data) for part in parts)
            shown = Blob("float32", (BLOCKS, 1, wanted, 1), "raw", data)
        done = StepDone(step.step, self.position, shown, 0.1, 0.2, 0.4, step.spent)
        if self.is_last or step.all_hidden or not self.is_up:
            self.to_client.append(done)
        if self.pushes:
            self.kept[step.step] = output
            if self.is_up:
                self.pushed = step.step
                self.link.append(replace(step, hidden=output, prompts=None, spent=(*step.spent, 0.2, 0.1, 0.4)))


class Swarm:
    """The servers of a chain and the client's state machine, between which messages are delivered in any order that streams allow."""

    def __init__(self, count: int, direct: bool) -> None:
        self.pipeline = Pipeline(hops_of(count), direct)
        self.servers = [Server(index, count, direct and index < count - 1) for index in range(count)]

    def send(self, sends: list[Send]) -> None:
        for send in sends:
            self.servers[send.hop].from_client.append(send.message)

    def events(self) -> list[tuple[str, int]]:
        found = []
        for index, server in enumerate(self.servers):
            if server.from_client:
                found.append(("client to", index))
            if server.to_client:
                found.append(("to client", index))
            if server.link:
                found.append(("link", index))
            if server.is_up:
                found.append(("break", index))
        return found

    def happen(self, event: tuple[str, int], lost: int = 0) -> None:
        what, index = event
        server = self.servers[index]
        if what == "client to":
            server.take(server.from_client.popleft())
        elif what == "link":
            self.servers[index + 1].take(server.link.popleft())
        elif what == "break":
            server.is_up = False
            for _ in range(min(lost, len(server.link))):
                server.link.pop()
            server.to_client.append(LinkDown("it broke", server.pushed))
        else:
            message = server.to_client.popleft()
            if isinstance(message, LinkDown):
                self.send(self.pipeline.link_down(index, message.pushed))
            else:
                assert isinstance(message, StepDone)
                self.send(self.pipeline.answered(index, message))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_step_is_answered_whatever_links_do(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), "hops")
    swarm = Swarm(count, direct=data.draw(st.sampled_from((True, True, False)), "direct"))
    number = position = 0
    for _ in range(data.draw(st.integers(1, 3), "rounds")):
        position = data.draw(st.integers(0, position), "position")
        lengths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=7), "chunks")
        ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
        values = list(range(100, 100 + ends[-1]))
        all_hidden = data.draw(st.booleans(), "all hidden")
        keep = 0 if all_hidden else data.draw(st.integers(0, max(ends[-1] - 1, 0)), "keep")
        inputs = Inputs(all_hidden=all_hidden, keep=keep)
        requests = steps_of(hidden_of(values), position, None, inputs, number=number + 1, ends=ends)
        number, position = requests[-1].step, position + ends[-1]
        swarm.send(swarm.pipeline.begin(requests))
        while not swarm.pipeline.is_complete:
            events = swarm.events()
            assert any(what != "break" for what, _ in events), "nothing is under way, and steps are not answered"
            swarm.happen(data.draw(st.sampled_from(events), "event"), data.draw(st.integers(0, 3), "lost"))
        finished = swarm.pipeline.finished
        assert [pending.request.step for pending in finished] == [request.step for request in requests]
        for pending in finished:
            assert len(pending.spent[count - 1]) == 3 * count
            assert sorted(pending.answers) == (list(range(count)) if all_hidden else [count - 1])
        if all_hidden:
            for hop in range(count):
                parts = [pending.answers[hop] for pending in finished]
                for block in range(BLOCKS):
                    shown = [value for part in parts for value in values_of(part)[block * part.shape[2] : (block + 1) * part.shape[2]]]
                    assert shown == [value + hop * BLOCKS + block + 1 for value in values]
        else:
            answer = [value for pending in finished for value in values_of(pending.answers[count - 1])]
            assert answer == [value + count * BLOCKS for value in values[-keep:]]
    for server, relayed in zip(swarm.servers, swarm.pipeline.relayed_steps, strict=True):
        assert not (server.is_up and relayed)


def begun(*, direct: bool = True, **inputs: object) -> Pipeline:
    """A chain of three servers with steps 1 and 2 under way, of 3 and 2 tokens."""
    pipeline = Pipeline(hops_of(3), direct)
    pipeline.begin(steps_of(hidden_of([1, 2, 3, 4, 5]), 0, None, Inputs(**inputs), number=1, ends=[3, 5]))  # type: ignore[arg-type]
    return pipeline


def test_what_may_be_lost_is_asked_for_again_and_carried_in_order() -> None:
    pipeline = begun()
    assert pipeline.link_down(1, pushed=1) == [Send(1, Replay(1, 0, 3))]
    assert pipeline.answered(1, StepDone(2, 5, hidden_of([9, 9]))) == []  # not before the first one
    sends = pipeline.answered(1, StepDone(1, 3, hidden_of([8, 8, 8])))
    assert [(send.hop, send.message.step, values_of(send.message.hidden)) for send in sends] == [(2, 1, [8, 8, 8]), (2, 2, [9, 9])]
    assert pipeline.answered(1, StepDone(1, 3, hidden_of([8, 8, 8]))) == []
    assert pipeline.relayed_steps == [0, 2, 0] and pipeline.replays == 1
    assert pipeline.link_down(1, pushed=2) == []


def test_what_the_last_server_has_is_not_asked_for() -> None:
    pipeline = begun()
    pipeline.answered(2, StepDone(1, 3, hidden_of([7, 7, 7])))
    assert pipeline.link_down(0, pushed=2) == [Send(0, Replay(2, 3, 2))]
    pipeline.answered(2, StepDone(2, 5, hidden_of([7, 7])))
    assert pipeline.is_complete
    assert pipeline.answered(0, StepDone(2, 5, hidden_of([7, 7]))) == []


def test_prompts_and_outputs_are_what_each_server_needs() -> None:
    prompts = Blob("float32", (6, 1, 1, 1), "raw", bytes(24))
    for direct in (True, False):
        pipeline = Pipeline(hops_of(3), direct)
        inputs = Inputs(prompts=prompts, keep=1)
        ((_, first),) = pipeline.begin(steps_of(hidden_of([1, 2]), 0, None, inputs, number=1, ends=[2]))
        assert isinstance(first, Step) and first.prompts is not None
        assert (first.prompts.shape[0], first.keep) == ((6, 1) if direct else (2, 0))
        if direct:
            pipeline.link_down(0, 0)
        ((_, second),) = pipeline.answered(0, StepDone(1, 2, hidden_of([3, 4])))
        assert isinstance(second, Step) and second.prompts is not None
        assert (second.prompts.shape[0], second.keep) == ((4, 1) if direct else (2, 0))
        if direct:
            pipeline.link_down(1, 0)
        ((_, third),) = pipeline.answered(1, StepDone(1, 2, hidden_of([3, 4])))
        assert isinstance(third, Step) and third.prompts is not None
        assert (third.prompts.shape[0], third.keep) == (2, 1)


@pytest.mark.parametrize(
    ("hop", "done"),
    [
        (0, StepDone(1, 3, hidden_of([1, 2, 3]))),  # a link that is up
        (2, StepDone(1, 3, hidden_of([1, 2]))),
        (2, StepDone(1, 3, Blob("float16", (1, 3, 1), "raw", bytes(6)))),
        (2, StepDone(1, 3, Blob("float32", (2, 1, 3, 1), "raw", bytes(24)))),
    ],
)
def test_wrong_answers(hop: int, done: StepDone) -> None:
    pipeline = begun()
    with pytest.raises(ProtocolError) as caught:
        pipeline.answered(hop, done)
    assert caught.value.peer_id == f"peer {hop}"


def test_links_that_nobody_asked_for() -> None:
    with pytest.raises(ProtocolError):
        begun(direct=False).link_down(0, 0)
    with pytest.raises(ProtocolError):
        begun().link_down(2, 0)


def test_stale_answers_are_ignored() -> None:
    pipeline = begun()
    pipeline.abandon()
    assert pipeline.is_complete
    assert pipeline.answered(2, StepDone(1, 3, hidden_of([1]))) == []
    assert pipeline.link_down(0, 2) == []
    pipeline.begin(steps_of(hidden_of([1]), 0, None, Inputs(), number=3, ends=[1]))
    assert pipeline.answered(0, StepDone(2, 3, hidden_of([1]))) == []
    assert not pipeline.is_complete


def test_outputs_that_nobody_wants() -> None:
    pipeline = begun(keep=1)
    assert [pending.keep for pending in steps_of(hidden_of([1, 2]), 0, None, Inputs(keep=1), number=1, ends=[1, 2])] == [KEEP_NONE, 0]
    pipeline.answered(2, StepDone(1, 3, hidden_of([])))
    pipeline.answered(2, StepDone(2, 5, hidden_of([4])))
    assert [values_of(pending.answers[2]) for pending in pipeline.finished] == [[], [4]]


def test_an_answer_that_comes_twice_is_no_answer_to_a_step_that_nobody_gave() -> None:
    pipeline = Pipeline(hops_of(5), True)
    given = steps_of(hidden_of([1, 2]), 0, None, Inputs(), number=1, ends=[1, 2])
    pipeline.rebuild(given[:1], 0, 1, from_kept=True)
    pipeline.rebuild(given[1:], 2, 4, from_kept=True)
    pipeline.link_down(2, pushed=2)  # asks for it once more
    pipeline.answered(4, StepDone(2, 2, hidden_of([1])))  # it was not lost
    assert not pipeline.is_complete
    assert pipeline.answered(2, StepDone(2, 2, hidden_of([1]))) == []
    with pytest.raises(ProtocolError):
        pipeline.answered(2, StepDone(3, 2, hidden_of([1])))
