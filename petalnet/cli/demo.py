"""`petalnet demo`: what petalnet is about, on one machine and in under a minute."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from petalnet.demo import LocalSwarm

BLOCKS = 12
PROMPT = "ROMEO:\nWhat light is"


@click.command("demo")
@click.option("--prompt", default=PROMPT, help=f"how the text begins  [default: {PROMPT!r}]")
@click.option("--servers", default=3, show_default=True, type=click.IntRange(1, BLOCKS), help="processes that share the model's 12 blocks")
@click.option("--max-new-tokens", default=80, show_default=True, type=click.IntRange(1, 1000))
@click.option("--seed", default=7, show_default=True, help="of the sampling")
@click.option("--kill/--no-kill", default=True, show_default=True, help="start a server more, and kill one in the middle of the text")
def command(prompt: str, servers: int, max_new_tokens: int, seed: int, kill: bool) -> None:
    """Start a whole swarm on this machine and write text through it.

    The model (12 blocks, a few MB) ships in the package. Each server is a process of its own that holds some of the blocks; this process
    holds only the embeddings and the head. In the middle of the text a server is killed: another one that holds the same blocks goes on,
    and the text is the same. Everything is stopped and removed at the end.
    """
    from petalnet.demo import local_swarm

    # The libraries of the model take seconds to import: meanwhile the servers start.
    importing = threading.Thread(target=_import_libraries, daemon=True)
    importing.start()
    with local_swarm() as swarm:

        def stop(number: int, frame: FrameType | None) -> None:
            swarm.interrupt()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        _start(swarm, servers, spare=kill)
        _show_spans(swarm)
        importing.join()
        gc.enable()
        _generate(swarm, prompt, max_new_tokens, seed, kill=kill)
        click.echo("\nThe servers stop now. A swarm of your own, one line a machine:")
        click.echo("  petalnet node --serve 0:6        prints the command with which the next machine joins")


def _import_libraries() -> None:
    from petalnet.models.lean import import_transformers

    import_transformers()
    import petalnet.client.auto  # noqa: F401


def _start(swarm: LocalSwarm, count: int, *, spare: bool) -> None:
    """Start a server for each part of the model, and with `spare` another one for the part in the middle."""
    from petalnet.demo import READY_WITHIN_S

    cuts = [BLOCKS * number // count for number in range(count + 1)]
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    plural = "es, each with a part" if count > 1 else " with all"
    more = f", and one more with {'the middle part' if count > 2 else 'a part' if count > 1 else 'all of it'}" if spare else ""
    click.echo(f"Starting {count} server process{plural} of a model of {BLOCKS} blocks{more}:")
    if spare:
        spans.append(spans[count // 2])
    began = time.monotonic()
    first = swarm.launch(spans[0], [])
    first.wait_ready(began + READY_WITHIN_S)
    _show_ready(1, len(spans), first.span, began)
    for span in spans[1:]:
        swarm.launch(span, first.loopback_addrs())
    for number, server in enumerate(swarm.servers[1:], 2):
        server.wait_ready(began + READY_WITHIN_S)
        _show_ready(number, len(spans), server.span, began)


def _show_ready(number: int, count: int, span: tuple[int, int], began: float) -> None:
    click.echo(f"  [{number}/{count}] blocks {span[0]}-{span[1] - 1} are online after {time.monotonic() - began:.1f} s")


def _show_spans(swarm: LocalSwarm) -> None:
    from petalnet.overview import span_bar

    click.echo("\nWho holds what:")
    for number, server in enumerate(swarm.servers, 1):
        first, end = server.span
        where = f"pid {server.process.pid}, peer …{server.ready['peer_id'][-6:]}"
        click.echo(f"  server {number}   {span_bar(first, end, BLOCKS)}   blocks {first:>2}-{end - 1:<2}   {where}")
    click.echo("  this one   embeddings and head only: it turns text into activations and activations into text")


def _generate(swarm: LocalSwarm, prompt: str, max_new_tokens: int, seed: int, *, kill: bool) -> None:
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from petalnet import AutoDistributedModelForCausalLM
    from petalnet.models.checkpoint import DEMO_MODEL

    transformers_logging.set_verbosity_error()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    peers = swarm.servers[0].loopback_addrs()
    names = {server.ready["peer_id"]: f"server {number}" for number, server in enumerate(swarm.servers, 1)}
    model = AutoDistributedModelForCausalLM.from_pretrained(str(DEMO_MODEL), initial_peers=peers, show_route=False)
    try:
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": 0.7, "top_k": 40}
        click.echo("\nThe text, token by token through all servers (what you gave in bold):\n")
        with model.inference_session(max_length=inputs.shape[1] + max_new_tokens) as session:

            def strike() -> str:
                """Kill the one in use of the two servers that hold the same blocks; what is to be said of it."""
                twins = [server for server in swarm.servers if server.span == swarm.servers[-1].span]
                used = {hop.peer_id for hop in session.hops}
                victim = next(server for server in twins if server.ready["peer_id"] in used)
                other = next(server for server in twins if server is not victim)
                first, end = victim.span
                victim.kill()
                return (
                    f"── {names[victim.ready['peer_id']]}, which holds blocks {first}-{end - 1}, is killed now;"
                    f" {names[other.ready['peer_id']]} holds them, too ──"
                )

            writer = _Writer(tokenizer, max_new_tokens, strike if kill else None)
            model.generate(inputs, streamer=writer, **options)
        click.echo(f"\n{writer.tokens} tokens, {writer.rate():.0f} tokens/s")
        for recovery in session.recoveries:
            others = " and ".join(names[hop.peer_id] for hop in recovery.replacements)
            pause_s = recovery.noticed_s + recovery.rebuilt_s
            click.echo(f"a pause of {pause_s:.2f} s, in which {others} computed the killed server's part of {recovery.tokens} tokens")
        trace = model.last_trace
        hops = [f"{names[hop.peer_id]} (blocks {hop.first}-{hop.end - 1}){' ⇢' if hop.relayed else ' →'}" for hop in trace.chain]
        click.echo(f"route of {'the last' if kill else 'each'} token: embeddings here → {' '.join(hops)} head here")
        if any(hop.relayed for hop in trace.chain):
            click.echo("(⇢: the output came back here on its way to the next server)")
        click.echo(f"most of the time: {trace.slowest}")
    finally:
        model.close()


class _Writer:
    """A streamer, as `generate` calls it: writes tokens as they come and takes the time.

    Args:
        expected: tokens that there will be.
        strike: is called once, and what it returns is written on a line of its own: where a line of the text ends in the third quarter of
            the tokens, or else after it.
    """

    def __init__(self, tokenizer: Any, expected: int, strike: Callable[[], str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._expected = expected
        self._strike = strike
        self._ids: list[int] = []
        self._shown = 0
        self._prompt_is_next = True
        self._first_at = self._last_at = 0.0
        self.tokens = 0

    def put(self, value: Any) -> None:
        self._ids += value.reshape(-1).tolist()
        # A character may need a second token: what is not whole yet waits for it.
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).rstrip("\ufffd")
        new, self._shown = text[self._shown :], len(text)
        if self._prompt_is_next:
            self._prompt_is_next = False
            click.secho(new, bold=True, nl=False)
        else:
            self.tokens += 1
            self._last_at = time.monotonic()
            self._first_at = self._first_at or self._last_at
            click.echo(new, nl=False)
            ends_line = text.endswith("\n")
            if self._strike is not None and self.tokens >= self._expected * (0.5 if ends_line else 0.75):
                strike, self._strike = self._strike, None
                click.secho(f"{'' if ends_line else chr(10)}{strike()}", dim=True)
        sys.stdout.flush()

    def end(self) -> None:
        click.echo()

    def rate(self) -> float:
        """Tokens a second after the first one."""
        return (self.tokens - 1) / max(self._last_at - self._first_at, 1e-9)
