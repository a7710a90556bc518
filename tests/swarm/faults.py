"""Swarms whose servers are killed, stopped, cut off, slowed, set to answer garbage, or drained at a chosen moment of an answer.

A `FaultySwarm` is real node processes behind `wires`, several for each span of a model. A `Moment` is an answer that a client asks for and
the point of it at which something happens: after so many tokens, or when so many bytes of a prompt have come to a server, never after some
time. `Case.run` lets it happen and compares with what the local model writes by itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .conftest import NodeProcess, Nodes
from .garbage_node import KINDS as GARBAGE
from .models import connected, ids
from .test_speculation import Always, repetitive
from .wires import Wires

KINDS = ("kill", "stop", "cut", "late", "garbage", "drain")
LATE_S = 0.1
"""What each message to and from a late server takes longer: many times what it takes otherwise, and no more than a far server's."""
WITHIN_S = 60.0
"""For an answer, whatever happens in it: well above all bounds on noticing and rebuilding, on a machine that does much else."""
HIDDEN_BYTES = 64 * 4
OPTIONS = {"request_timeout": 30.0}
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (str(Path(__file__).with_name("garbage_node.py")),)


class Hung(AssertionError):
    """An answer did not come."""


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises. Raises Hung, with what all threads do on standard error, where it takes longer."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        faulthandler.dump_traceback(sys.__stderr__)
        raise Hung(f"there was no answer within {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]


class FaultySwarm:
    """Servers of one model behind wires, `replicas` for each span; those that were lost are replaced when somebody asks for that span."""

    def __init__(self, nodes: Nodes, wires: Wires, path: Path, spans: Sequence[tuple[int, int]], replicas: int = 2) -> None:
        self.nodes, self.wires, self.path, self.spans, self.replicas = nodes, wires, path, spans, replicas
        self.spoilt: set[int] = set()
        """Processes that something was done to that cannot be taken back."""
        self._ports: dict[int, int] = {}
        self.servers: list[list[NodeProcess]] = [[] for _ in spans]
        self.entry = self._launch("--bootstrap").wait_ready()
        for span in range(len(spans)):
            self.fill(span)
        for span in range(len(spans)):
            self.healthy(span)

    def _launch(self, *arguments: object) -> NodeProcess:
        port = self.wires.open_port()
        garbage_file = self.nodes.folder / f"garbage-{len(self.nodes.started)}"
        announced = ("--announce-maddrs", f"/ip4/127.0.0.1/tcp/{port}")
        node = self.nodes.launch(
            *arguments, *announced, program=PROGRAM, environment={"GARBAGE_FILE": str(garbage_file), "PYTHONPATH": str(ROOT)}
        )
        self.wires.lead(port, node.process.pid)
        return node

    @property
    def peers(self) -> list[str]:
        return self.entry.addrs

    def fill(self, span: int) -> None:
        """Have as many servers of a span as there should be, without waiting for new ones."""
        alive = self.servers[span] = [node for node in self.servers[span] if self.is_well(node)]
        first, end = self.spans[span]
        while len(alive) < self.replicas:
            where = ("--serve", f"{first}:{end}", "--dtype", "float32", "--throughput", "100", "--initial-peers", *self.peers)
            alive.append(self._launch(self.path, *where))

    def is_well(self, node: NodeProcess) -> bool:
        return node.process.poll() is None and node.process.pid not in self.spoilt

    def healthy(self, span: int) -> list[NodeProcess]:
        """All servers of a span, ready, once there are as many as there should be."""
        self.fill(span)
        return [node if node.ready else node.wait_ready() for node in self.servers[span]]

    def pids(self, span: int) -> list[int]:
        return [node.process.pid for node in self.servers[span]]

    def node_of(self, peer_id: str) -> tuple[int, NodeProcess]:
        """The server of this id, and the number of its span."""
        return next((number, node) for number, span in enumerate(self.servers) for node in span if node.ready and node.peer_id == peer_id)

    def do(self, kind: str, pid: int) -> None:
        """Let one of `KINDS` happen to a server, or "garbage:" with one of `GARBAGE`. Does not wait."""
        name, _, how = kind.partition(":")
        if name in ("kill", "drain", "garbage"):
            self.spoilt.add(pid)
        if name == "kill":
            os.kill(pid, signal.SIGKILL)
        elif name == "stop":
            os.kill(pid, signal.SIGSTOP)
        elif name == "cut":
            self.wires.cut(pid)
        elif name == "late":
            self.wires.delay(pid, LATE_S)
        elif name == "drain":
            os.kill(pid, signal.SIGTERM)
        elif name == "garbage":
            node = next(node for node in self.nodes.started if node.process.pid == pid)
            number = self.nodes.started.index(node)
            (self.nodes.folder / f"garbage-{number}").write_text(how or GARBAGE[0])
            os.kill(pid, signal.SIGUSR1)
        else:
            raise ValueError(f"no such fault: {kind}")

    def undo(self, pid: int) -> None:
        """Take back what can be."""
        self.wires.mend(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def heal(self) -> None:
        """Undo whatever was done, and begin to replace whom that does not help."""
        self.wires.disarm()
        self.wires.mend()
        for span, servers in enumerate(self.servers):
            for node in servers:
                if node.process.poll() is None:
                    node.process.send_signal(signal.SIGCONT)
                    if node.process.pid in self.spoilt:
                        node.kill()
            self.fill(span)


@contextmanager
def faulty_swarm(folder: Path, path: Path, spans: Sequence[tuple[int, int]], replicas: int = 2) -> Iterator[FaultySwarm]:
    nodes = Nodes(folder)
    try:
        with Wires() as wires:
            try:
                yield FaultySwarm(nodes, wires, path, spans, replicas)
            finally:
                for node in nodes.started:
                    if node.process.poll() is None:
                        node.kill()
    finally:
        nodes.stop_all()


class Progress(StoppingCriteria):
    """Carries out what is to be done when an answer has so many new tokens; never ends it."""

    def __init__(self, length: int, actions: dict[int, Callable[[], None]]) -> None:
        self._length = length
        self._actions = dict(actions)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        for count in [count for count in self._actions if input_ids.shape[1] - self._length >= count]:
            self._actions.pop(count)()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class DictatedBeginning(LogitsProcessor):
    """Has the library choose the tokens of a text that is easy to guess, and leaves the choice to the model from its end on."""

    def __init__(self, text: list[int], start: int) -> None:
        self._text, self._start = text, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = input_ids.shape[1] - self._start
        if done >= len(self._text):
            return scores
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._text[done]] = 0.0
        return chosen


Actions = dict[int, Callable[[], None]]


@dataclass(frozen=True)
class Writing:
    """A way to have something written, the same by the local model and over the swarm.

    Attributes:
        name: "greedy", "sampled", "beams", "guesses" (with drafts), or "steps" (by hand, going back in between).
        prompt: tokens of it.
        tokens: new ones.
    """

    name: str
    prompt: int
    tokens: int
    seed: int = 0

    def inputs(self) -> torch.Tensor:
        return ids(1, self.prompt, seed=1000 + self.seed)

    def local(self, model: Any) -> torch.Tensor:
        """What it comes to undisturbed: ids [rows, all], or where steps are made by hand the best next id after each position."""
        torch.manual_seed(self.seed)
        if self.name == "steps":
            with torch.inference_mode():
                logits = model(self.inputs()).logits
            return logits[0].argmax(-1)
        return model.generate(self.inputs(), **self._options())

    def remote(self, model: Any, actions: Actions, opened: Callable[[Any], None]) -> torch.Tensor:
        """The same over the swarm, with something happening in between; `opened` is told the session before anything is sent."""
        torch.manual_seed(self.seed)
        if self.name == "guesses":
            model.remote_blocks.draft_policy = Always(7)
        with model.inference_session(max_length=self.prompt + self.tokens + 8) as session:
            opened(session)
            if self.name == "steps":
                return self._by_hand(model, session, dict(actions))
            stopping = StoppingCriteriaList([Progress(self.prompt, actions)])
            return model.generate(self.inputs(), stopping_criteria=stopping, **self._options())

    def _by_hand(self, model: Any, session: Any, actions: Actions) -> torch.Tensor:
        """Four fifths of the tokens at once, then back and on, again and again, from places and over lengths that follow from the seed."""
        tokens, chance = self.inputs(), random.Random(self.seed)
        best = torch.zeros(self.prompt, dtype=torch.int64)
        done = end = self.prompt * 4 // 5
        with torch.inference_mode():
            best[:end] = model(tokens[:, :end]).logits[0].argmax(-1)
            for number in range(self.tokens):
                session.position = start = chance.randrange(done // 2, min(done, self.prompt - 1) + 1)
                if number in actions:
                    actions.pop(number)()
                end = self.prompt if number == self.tokens - 1 else chance.randrange(start + 1, self.prompt + 1)
                best[start:end] = model(tokens[:, start:end]).logits[0].argmax(-1)
                done = end
        return best

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens, "do_sample": False}
        if self.name == "sampled":
            options |= {"do_sample": True, "temperature": 0.9, "top_k": 50}
        elif self.name == "beams":
            options |= {"num_beams": 4}
        elif self.name == "guesses":
            options |= {"logits_processor": LogitsProcessorList([DictatedBeginning(repetitive(self.tokens * 3 // 4), self.prompt)])}
        return options


@dataclass(frozen=True)
class Event:
    """Something happens to a server of an answer.

    Attributes:
        kind: see `FaultySwarm.do`; "undo" takes back what happened to servers of this span.
        hop: the number of its span.
        after: new tokens, or steps by hand; -1: in the middle of the prompt.
        amid: whether just when the next bytes come to it, rather than between two steps.
    """

    kind: str
    hop: int
    after: int
    amid: bool = True


def random_case(swarm: FaultySwarm, seed: int, kinds: Sequence[str] = KINDS) -> Case:
    """A way of writing and up to four events in it, drawn from a seed, such that there always is a server that nothing has happened to, for
    each span."""
    chance = random.Random(seed)
    name = chance.choice(("greedy", "sampled", "beams", "guesses", "steps"))
    prompt, tokens = chance.choice((5, 40, 130, 260)), chance.choice((12, 24))
    if name == "steps":
        prompt, tokens = max(prompt, 40), 8
    events: list[Event] = []
    left = {span: swarm.replicas - 1 for span in range(len(swarm.spans))}
    after = chance.choice((-1, 1, 2, 5)) if prompt > 100 else chance.choice((1, 2, 5))
    for _ in range(chance.randint(1, 4)):
        free = [span for span, count in left.items() if count]
        if not free or after >= tokens - 1:
            break
        span = chance.choice(free)
        kind = chance.choice(kinds)
        kind = f"garbage:{chance.choice(GARBAGE)}" if kind == "garbage" else kind
        left[span] -= 1
        events.append(Event(kind, span, after, amid=after < 0 or chance.random() < 0.7))
        after = max(after, 0) + chance.choice((0, 1, 1, 3)) if after >= 0 else chance.choice((-1, 1, 3))
    return Case(swarm, Writing(name, prompt, tokens, seed), events)


@dataclass
class Outcome:
    """What became of an answer: see `Case.run`."""

    seconds: float = 0.0
    happened: list[str] = field(default_factory=list)
    recoveries: int = 0


class Case:
    """An answer, and what happens in it."""

    def __init__(self, swarm: FaultySwarm, writing: Writing, events: Sequence[Event]) -> None:
        self.swarm, self.writing, self.events = swarm, writing, events
        self.outcome = Outcome()
        self._session: Any = None
        self._hit: dict[int, list[int]] = {}

    def run(self, local: Any, **options: Any) -> Outcome:
        """Raises AssertionError where the answer is wrong or does not come, and whatever the answer raises."""
        swarm, writing = self.swarm, self.writing
        for span in sorted({event.hop for event in self.events}):
            swarm.healthy(span)
        expected = writing.local(local)
        with connected(swarm.path, swarm.peers, **(OPTIONS | options)) as model:
            within(WITHIN_S, model.remote_blocks.route)
            actions: Actions = {}
            for count in sorted({event.after for event in self.events}):
                now = [event for event in self.events if event.after == count]
                if count < 0:
                    for event in now:
                        self._in_prompt(event)
                else:
                    actions[count] = lambda now=now: [self._happen(event) for event in now]  # type: ignore[misc]
            began = time.monotonic()
            answer = within(WITHIN_S, lambda: writing.remote(model, actions, self._opened))
            self.outcome.seconds = time.monotonic() - began
            self.outcome.recoveries = len(getattr(self._session, "recoveries", ()))
        assert torch.equal(answer, expected), f"another answer from token {_first_difference(answer, expected)} on; {self.outcome}"
        assert len(self.outcome.happened) == len(self.events), f"not all of it happened: {self.outcome}"
        return self.outcome

    def __str__(self) -> str:
        what = ", ".join(f"{event.kind} hop {event.hop} after {event.after}{' amid' if event.amid else ''}" for event in self.events)
        return f"{self.writing.name} {self.writing.prompt}+{self.writing.tokens}: {what}"

    def _opened(self, session: Any) -> None:
        self._session = session

    def _in_prompt(self, event: Event) -> None:
        half = self.writing.prompt * HIDDEN_BYTES // 2
        self.swarm.wires.when(self.swarm.pids(event.hop), half, lambda pid: self._do(event, pid))

    def _happen(self, event: Event) -> None:
        """On the thread of whoever asked for the answer, between two steps."""
        if event.kind == "undo":
            for pid in self._hit.pop(event.hop, ()):
                self.swarm.undo(pid)
            self.outcome.happened.append(f"undo {event.hop}")
            return
        first, _ = self.swarm.spans[event.hop]
        hop = next(hop for hop in self._session.hops if hop.first <= first < hop.end)
        pid = self.swarm.node_of(hop.peer_id)[1].process.pid
        if event.amid:
            self.swarm.wires.when([pid], 1, lambda pid: self._do(event, pid))
        else:
            self._do(event, pid)

    def _do(self, event: Event, pid: int) -> None:
        self._hit.setdefault(event.hop, []).append(pid)
        self.swarm.do(event.kind, pid)
        self.outcome.happened.append(f"{event.kind} {event.hop}")


def _first_difference(answer: torch.Tensor, expected: torch.Tensor) -> str:
    if answer.shape != expected.shape:
        return f"0, of the shape {list(answer.shape)} in place of {list(expected.shape)},"
    return str(int((answer != expected).reshape(-1).int().argmax()))
