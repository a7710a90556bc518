"""`petalnet peers`: who the nodes on this machine are connected to."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

WIDTH_OF_FILES = 160
"""Columns where the output goes to no terminal."""


@click.command("peers")
@click.option("as_json", "--json", is_flag=True, help="as JSON")
def command(as_json: bool) -> int:
    """Who this machine's nodes are connected to: from where or to where, round trip, bytes in and out, streams, since when. And what those
    that are servers compute: sessions, KV memory, rounds of the last minute, and what they sent straight to the next server of a chain.

    Asks the nodes that you run on this machine; nothing is sent over the network.
    """
    from petalnet.errors import PetalnetError
    from petalnet.inspection import ask_nodes

    nodes = ask_nodes()
    if not nodes:
        raise PetalnetError(
            "you run no node on this machine: start one with `petalnet node` (`petalnet status` looks at a swarm from outside)"
        )
    if as_json:
        click.echo(json.dumps({"nodes": nodes}, indent=1))
    else:
        _show(nodes, time.time())
    return 0


def _show(nodes: list[dict[str, Any]], now: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    for node in nodes:
        peers = node["peers"]
        name = f" {node['public_name']}" if node["public_name"] else ""
        swarm = f", private swarm (key {node['swarm_key']})" if node["swarm_key"] else ""
        count = f"{len(peers)} peer{'s' if len(peers) != 1 else ''}"
        click.echo(f"{node['role']}{name} {node['peer_id']}, pid {node['pid']}{swarm}: {count}")
        if node.get("engine"):
            click.echo(describe_engine(node["engine"]))
            for line in (describe_links(node["engine"]), describe_recovery(node["engine"])):
                if line:
                    click.echo(line)
        if line := describe_weights(node.get("weights") or {}):
            click.echo(line)
        if not peers:
            continue
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("peer", "serves", "connected"):
            table.add_column(heading, overflow="fold")
        for heading in ("round trip", "in", "out", "streams", "since"):
            table.add_column(heading, justify="right", no_wrap=True)
        for peer in sorted(peers, key=lambda peer: peer["since"]):
            table.add_row(
                # As Text: a name that a stranger chose is no markup.
                Text(f"{peer['public_name']} …{peer['peer_id'][-6:]}" if peer["public_name"] else f"…{peer['peer_id'][-6:]}"),
                Text("{}:{} of {}".format(*peer["span"], peer["model"]) if peer["span"] else ""),
                Text(describe_path(peer)),
                "" if peer["round_trip_s"] is None else f"{peer['round_trip_s'] * 1000:.1f} ms",
                describe_bytes(peer["bytes_in"]),
                describe_bytes(peer["bytes_out"]),
                str(peer["streams"]),
                describe_age(now - peer["since"]),
            )
        console.print(table)


def describe_engine(engine: dict[str, Any]) -> str:
    """What a server computes, in a line."""
    sessions, kv, minute, delay = engine["sessions"], engine["kv_tokens"], engine["last_minute"], engine["loop_delay_s"]
    rounds = max(minute["rounds"], 1)
    return "; ".join(
        (
            f"{sessions} session{'s' * (sessions != 1)}, {engine['waiting']} waiting",
            f"{kv['free']} of {kv['all']} KV tokens free, {kv['kept']} kept of earlier prompts",
            f"in the last minute {minute['rounds']} rounds of {minute['tokens'] / rounds:.1f} tokens and "
            f"{minute['seconds'] / rounds * 1000:.0f} ms",
            f"network loop late by {delay['median'] * 1000:.1f} ms, {delay['worst'] * 1000:.1f} at most",
        )
    )


def describe_links(engine: dict[str, Any]) -> str:
    """What went from a server straight to the next ones of its users' chains, in a line; "" where nothing ever did."""
    links: dict[str, int] = engine.get("links") or {}
    if not any(links.values()):
        return ""
    up, failed, size = links["open"], links["failed"], describe_bytes(links["pushed_bytes"])
    parts = [
        f"{links['pushed_steps']} outputs ({size}) went straight to next servers, {links['relayed_steps']} through clients",
        f"{up} link{'s' * (up != 1)} open" + (f", {failed} failed so far" if failed else ""),
    ]
    if engine.get("kept_outputs_bytes"):
        parts.append(f"room of {describe_bytes(engine['kept_outputs_bytes'])} for outputs that were sent")
    return "; ".join(parts)


def describe_recovery(engine: dict[str, Any]) -> str:
    """What a server did for sessions that had lost another one, in a line; "" where there were none."""
    recovery: dict[str, int] = engine.get("recovery") or {}
    if not any(recovery.values()):
        return ""
    return (
        f"of chains that lost a server: {recovery['resumed']} times between other neighbours, "
        f"{recovery['replayed_tokens']} tokens sent once more, {recovery['rebuilt_tokens']} rebuilt"
    )


def describe_weights(weights: dict[str, Any]) -> str:
    """Which weights a server gives to others and what it got from them, in a line; "" where there is neither."""
    parts = []
    if weights.get("shares"):
        blocks = weights["blocks_shared"]
        parts.append(f"shares weights of {blocks} block{'s' * (blocks != 1)}, {describe_bytes(weights['bytes_served'])} given so far")
    if weights.get("bytes_fetched"):
        givers = len(weights["fetched_from"])
        parts.append(f"{describe_bytes(weights['bytes_fetched'])} of weights came from {givers} server{'s' * (givers != 1)}")
    return "; ".join(parts)


def describe_path(peer: dict[str, Any]) -> str:
    """`from` who dialled us or `to` whom we dialled: an address, or the relay in between."""
    side = "from" if peer["direction"] == "in" else "to"
    if peer["path"] == "relay":
        return f"{side} relay …{(peer['relay'] or '?')[-6:]}"
    kind, host, _, port = (peer["addr"].split("/") + [""] * 4)[1:5]
    return f"{side} [{host}]:{port}" if kind == "ip6" else f"{side} {host}:{port}"


def describe_bytes(count: int) -> str:
    """`12.3 MB` of 12,345,678."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000  # type: ignore[assignment]
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def describe_age(seconds: float) -> str:
    """`3 min` of 200 s."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
