"""What a user notices of a server that goes away in mid-answer: the pause, beside the time that rebuilding what it held takes by itself.

    python benchmarks/recovery.py kill                 # SIGKILL
    python benchmarks/recovery.py hang --rounds 5      # SIGSTOP
    python benchmarks/recovery.py kill --lost first    # the first of the chain: what it held is rebuilt from this client's own record

Real node processes on loopback, one compute thread each: a third of the model each, one of the thirds twice. After a prompt of 500 tokens
and some more, the server in use of the two is killed (stopped) between two tokens. The stall is the time until the next token, less the
median of the others. "prefill alone" is a step of as many tokens through those blocks, on the same servers a moment before, in a session
that is open. A new server takes the place of the lost one for the next round, whose prompt is another. What the client uploads is counted
where it sends (all messages of sessions, arrays and headers), between the token before and the token after.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from swarm_processes import Bench, add_model_options, bench, local_addrs, machine, make_model, print_table

PARTS = {"first": 0, "middle": 1, "last": 2}


class Clock:
    """A streamer that notes when each token came, and does something once, when so many have; the first call brings the prompt."""

    def __init__(self, after: int, action: Any) -> None:
        self.times: list[float] = []
        self.sent: list[int] = []
        self._after, self._action = after, action

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        self.sent.append(Sent.bytes)
        if len(self.times) == self._after + 1:
            self._action()
            self.times[-1] = time.perf_counter()

    def end(self) -> None:
        pass


class Sent:
    """Bytes of all messages that this process sends on streams to servers."""

    bytes = 0

    @classmethod
    def count(cls) -> None:
        from petalnet.p2p.messages import encode_message
        from petalnet.p2p.protocols import INFERENCE
        from petalnet.p2p.streams import Stream

        send = Stream.send

        async def counting(stream: Stream, message: Any) -> None:
            if stream.protocol is INFERENCE:
                cls.bytes += sum(map(len, encode_message(message)))
            await send(stream, message)

        Stream.send = counting  # type: ignore[method-assign]


@dataclass
class Round:
    """Seconds, and bytes."""

    stall: float
    step: float
    alone: float
    noticed: float
    rebuilt: float
    uploaded: int
    usual_upload: int


class Place:
    """The servers: by part of the model, as processes and ready files."""

    def __init__(self, running: Bench, path: Any, options: argparse.Namespace) -> None:
        self._running, self._path = running, path
        cuts = [round(options.layers * part / 3) for part in range(4)]
        self.spans = list(zip(cuts, cuts[1:], strict=False))
        self.lost = PARTS[options.lost]
        entry = self._running.node(listen=("--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--bootstrap"))
        self.peers = local_addrs(entry[1])[:1]
        for part in range(3):
            if part != self.lost:
                self.start(part)
        self.replicas: dict[str, subprocess.Popen[bytes]] = dict(self.start(self.lost) for _ in range(2))

    def start(self, part: int) -> tuple[str, subprocess.Popen[bytes]]:
        first, end = self.spans[part]
        options = ("--dtype", "float32", "--throughput", "100")
        process, ready, _ = self._running.node(self._path, "--serve", f"{first}:{end}", *options, peers=self.peers)
        return str(ready["peer_id"]), process

    def replace(self, lost: str) -> None:
        process = self.replicas.pop(lost)
        process.kill()
        process.wait()
        self.replicas.update([self.start(self.lost)])


def prefill_alone(model: Any, span: tuple[int, int], entries: int, hidden: int) -> float:
    """Seconds of a step of so many tokens through these blocks, in a session that is open."""
    import torch

    with model.remote_blocks[span[0] : span[1]].inference_session(max_length=entries + 1) as session:
        session.step(torch.randn(1, 1, hidden))
        began = time.perf_counter()
        session.step(torch.randn(1, entries, hidden))
        return time.perf_counter() - began


def one_round(options: argparse.Namespace, place: Place, model: Any, local: Any, number: int) -> Round:
    import torch

    ids = torch.randint(10, options.vocabulary, (1, options.history), generator=torch.Generator().manual_seed(number))
    kind = signal.SIGKILL if options.what == "kill" else signal.SIGSTOP
    alone = prefill_alone(model, place.spans[place.lost], options.history + options.after, options.hidden)
    victim = ""

    with model.inference_session(max_length=options.history + options.tokens) as session:

        def strike() -> None:
            nonlocal victim
            (victim,) = (hop.peer_id for hop in session.hops if hop.peer_id in place.replicas)
            os.kill(place.replicas[victim].pid, kind)

        clock = Clock(options.after, strike)
        answer = model.generate(ids, max_new_tokens=options.tokens, do_sample=False, streamer=clock)
        recoveries = list(session.recoveries)
    if number < options.check and not torch.equal(answer, local.generate(ids, max_new_tokens=options.tokens, do_sample=False)):
        raise SystemExit("another answer than the local model's")
    place.replace(victim)
    steps = [later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:], strict=False)]
    sent = [later - earlier for earlier, later in zip(clock.sent[1:], clock.sent[2:], strict=False)]
    struck = options.after - 1
    usual = statistics.median(steps[:struck] + steps[struck + 1 :])
    noticed, rebuilt = sum(one.noticed_s for one in recoveries), sum(one.rebuilt_s for one in recoveries)
    usual_sent = round(statistics.median(sent[:struck]))
    return Round(steps[struck] - usual, usual, alone, noticed, rebuilt, sent[struck] - usual_sent, usual_sent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "hang"])
    add_model_options(parser)
    parser.add_argument("--lost", choices=list(PARTS), default="middle", help="which third is lost  [default: %(default)s]")
    parser.add_argument("--history", type=int, default=500, help="tokens of the prompt")
    parser.add_argument("--after", type=int, default=8, help="new tokens before it happens")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens in all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--check", type=int, default=2, help="rounds whose answer is compared with the local model's")
    parser.add_argument("--verbose", action="store_true", help="the client's log")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("libp2p").setLevel(logging.ERROR)
    with bench() as running:
        import torch
        from transformers import AutoModelForCausalLM

        import petalnet

        torch.set_num_threads(1)
        path = make_model(running.folder, options)
        local = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) if options.check else None
        place = Place(running, path, options)
        Sent.count()
        rounds: list[Round] = []
        with petalnet.AutoDistributedModelForCausalLM.from_pretrained(
            str(path), initial_peers=place.peers, dtype=torch.float32, show_route=False, speculation=False
        ) as model:
            for number in range(options.rounds):
                done = one_round(options, place, model, local, number)
                rounds.append(done)
                print(
                    f"{number + 1}: stall {done.stall:.2f} s (prefill alone {done.alone:.2f}), noticed {done.noticed:.3f}, rebuilt "
                    f"{done.rebuilt:.2f}, uploaded {done.uploaded:,} bytes",
                    flush=True,
                )
    print(machine())
    rows: list[list[object]] = []
    for name, values in (
        ("stall, s", [one.stall for one in rounds]),
        ("prefill of the lost span alone, s", [one.alone for one in rounds]),
        ("stall over prefill alone", [one.stall / one.alone for one in rounds]),
        ("noticed after, s", [one.noticed for one in rounds]),
        ("rebuilt in, s", [one.rebuilt for one in rounds]),
        ("a token otherwise, s", [one.step for one in rounds]),
        ("bytes uploaded for it", [float(one.uploaded) for one in rounds]),
        ("bytes uploaded for a token", [float(one.usual_upload) for one in rounds]),
    ):
        rows.append([name, statistics.median(values), min(values), max(values)])
    print_table([f"{options.what}, {options.lost} third, {len(rounds)} rounds", "p50", "best", "worst"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
