"""`petalnet route`: which servers a session would take now, and why these."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petalnet.cli.options import SettingsCommand
from petalnet.config import Settings, access_of, resolve_initial_peers
from petalnet.p2p.access import Access

if TYPE_CHECKING:
    from petalnet.client.swarm import Membership
    from petalnet.routing.records import ServerRecord
    from petalnet.routing.swarm import ModelSummary

MEASURE_WITHIN_S = 6.0
"""For connections to the servers and the round trips to each."""
PARTS = (("way_s", "on the way"), ("compute_s", "computing"), ("queue_s", "waiting"), ("handling_s", "handling"))
AT_ONCE = 32
PINGS = 3


def _run(settings: Settings, as_json: bool, tokens: int) -> int:
    from petalnet.cli.logs import set_up

    set_up("warning", "pretty")
    peers = resolve_initial_peers(settings.initial_peers or None)
    access = access_of(settings, daemon=True)

    import trio

    model = settings.model
    if model is not None and Path(model).is_dir():
        model = Path(model).resolve().name  # as its servers call it
    found = trio.run(_look, peers, access, model, tokens)
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(render(found, shutil.get_terminal_size((140, 24)).columns)))
    return 0


async def _look(peers: list[str], access: Access, name: str | None, tokens: int) -> dict[str, Any]:
    import trio

    from petalnet.client.swarm import Membership
    from petalnet.errors import MissingBlocksError
    from petalnet.routing.explained import explain

    membership = Membership(peers, access)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(membership.run)
        await membership.joined()
        await membership.look_up()
        summary = _pick(membership.view.models(now=time.time()), name)
        trips = await _measure(membership, membership.view.servers(summary.model, now=time.time()))
        now = time.time()
        records = membership.view.servers(summary.model, now=now)
        outlook = replace(membership.outlook(records), round_trip=trips.get)
        try:
            found = explain(records, 0, summary.num_blocks, outlook, now=now, kv_tokens=tokens)
        except MissingBlocksError as error:
            known = membership.view.servers(summary.model, now=now, include_failed=True)
            raise MissingBlocksError(error.blocks, (record.peer_id for record in known), hint=error.hint) from None
        others = membership.view.servers(summary.model, now=now, states=("joining", "online", "draining"), include_failed=True)
        for record in others:
            if record.peer_id not in {known.peer_id for known in records}:
                until = membership.view.failed_until(record.peer_id, now=now)
                why = record.state if until is None else f"failed, avoided for {until - now:.0f} s"
                found["left_out"].append(
                    {"peer_id": record.peer_id, "public_name": record.public_name, "blocks": list(record.span), "why": why}
                )
        nursery.cancel_scope.cancel()
    return {"model": summary.model, "name": summary.model_name, "num_blocks": summary.num_blocks, "kv_tokens": tokens, **found}


async def _measure(membership: Membership, records: Sequence[ServerRecord]) -> dict[str, float]:
    """Seconds to servers and back, of those that answer within `MEASURE_WITHIN_S`; the least of some round trips each."""
    import trio

    from petalnet.errors import PeerUnreachable

    host, limit = membership.host, trio.CapacityLimiter(AT_ONCE)
    trips: dict[str, float] = {}

    async def measure(record: ServerRecord) -> None:
        async with limit:
            try:
                await host.connect(record.peer_id, record.addrs, timeout_s=MEASURE_WITHIN_S)
                for _ in range(PINGS):
                    taken = await host.ping(record.peer_id, MEASURE_WITHIN_S)
                    trips[record.peer_id] = min(taken, trips.get(record.peer_id, taken))
            except PeerUnreachable:
                return  # it counts as one that was never measured, as for every client

    with trio.move_on_after(MEASURE_WITHIN_S):
        async with trio.open_nursery() as nursery:
            for record in records:
                nursery.start_soon(measure, record)
    return trips


def _pick(models: Sequence[ModelSummary], name: str | None) -> ModelSummary:
    """The model that is meant. Raises UsageError where none is, or several are."""
    from petalnet.errors import UsageError

    served = [summary for summary in models if summary.servers]
    meant = [summary for summary in served if name is None or name in (summary.model, summary.model_name)]
    if len(meant) == 1:
        return meant[0]
    if name is None and not served:
        raise UsageError("nobody in this swarm serves a model")
    if not meant:
        raise UsageError(f"nobody in this swarm serves {name}; `petalnet status` without a model lists what is served")
    several = ", ".join(f"{summary.model_name} (key {summary.model})" if name else summary.model_name for summary in meant)
    raise UsageError(f"this swarm serves several models{f' called {name}' if name else ''}; say which one: {several}")


def render(found: dict[str, Any], width: int) -> Iterator[str]:
    """The route as lines of text of at most `width` columns."""
    seconds = found["seconds"]
    parts = ", ".join(f"{milliseconds(found[part])} {what}" for part, what in PARTS if found[part])
    pace = f"{milliseconds(seconds)} a token expected ({1 / seconds:,.1f} tokens/s)"
    yield f"{found['name']}: {found['num_blocks']} blocks, {pace}"[:width]
    yield f"  {parts}"
    rows: list[tuple[str, ...]] = [("blocks", "server", "way to it", "", "computing", "", "waiting", "free KV")]
    for hop in found["hops"]:
        rate = hop["rate"]
        if rate == "corrected":
            rate += f", {milliseconds(hop['announced_compute_s'])} announced"
        here = " (this machine)" if hop["own"] else ""
        rows.append(
            (
                "{}:{}".format(*hop["blocks"]),
                f"{_server(hop)}{here}",
                milliseconds(hop["way_s"]),
                hop["way"],
                milliseconds(hop["compute_s"]),
                rate,
                milliseconds(hop["queue_s"]) if hop["queue_s"] >= 5e-5 or hop["queue"] else "-",
                f"{hop['free_kv_tokens']:,}",
            )
        )
    rows.append(("", "and back", milliseconds(found["way_back_s"]), "", "", "", "", ""))
    lines = list(_columns(rows, right=(2, 4, 6, 7)))
    for line, hop in zip(lines, [None, *found["hops"], None], strict=True):
        yield line[:width]
        yield from (f"      {note}"[:width] for note in (hop["notes"] if hop else ()))
    if found["runners_up"]:
        yield "next best:"
        for other in found["runners_up"]:
            chain = " → ".join("{} {}:{}".format(_server(hop), *hop["blocks"]) for hop in other["hops"])
            yield f"  {milliseconds(other['seconds'])}  {chain}"[:width]
            yield f"      {other['loses']}"[:width]
    else:
        yield "no other route: each of these servers alone holds some block"[:width]
    if found["left_out"]:
        yield "left out:"
        yield from (f"  {_server(server)} {{}}:{{}}  {server['why']}".format(*server["blocks"])[:width] for server in found["left_out"])


def milliseconds(seconds: float) -> str:
    """`12.3 ms` of 0.0123, `1.2 s` of 1.23."""
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _server(server: dict[str, Any]) -> str:
    short = f"…{server['peer_id'][-6:]}"
    return f"{server['public_name']} {short}" if server["public_name"] else short


def _columns(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(size) if column in right else cell.ljust(size) for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


command = SettingsCommand(
    "route",
    settings=["model", "initial_peers", "swarm_key", "allow_peers", "block_peers"],
    params=[
        click.Option(
            ["tokens", "--tokens"],
            type=click.IntRange(min=0),
            default=0,
            metavar="N",
            help="KV tokens that the session will take, prompt and answer of all rows: servers with less room are left out",
        ),
        click.Option(["as_json", "--json"], is_flag=True, help="as JSON"),
    ],
    callback=_run,
    help="""Which servers a session would take now, and why: what each hop is expected to take, the next best routes and what they lose by,
    and who was left out.

    Connects to the servers to measure how far they are, as every client does. What a client has seen of servers' speed while it used
    them is its own; here their announcements count. The swarm is found as by `petalnet status`; MODEL is a name or key as that shows
    them, or may be left out where there is only one.""",
)
