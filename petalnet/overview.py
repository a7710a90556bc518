"""A swarm as a person sees it: who serves which blocks of which model, and what is missing. As plain data, and as text.

The data is what `petalnet status --json` prints and what the client daemon answers to `GET /status`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from petalnet.errors import describe_blocks
from petalnet.routing.precision import describe_precision
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import SwarmView

RATES = ("decode_tokens_s", "prefill_tokens_s", "forward_tokens_s")


def describe_swarm(view: SwarmView, *, now: float, model: str | None = None) -> dict[str, Any]:
    """The models of a swarm with their servers, ready for JSON.

    Args:
        now: unix seconds.
        model: only models of this name or key; None for all.

    Returns:
        `{"models": [{"model", "name", "num_blocks", "missing": [block, …], "servers": [{"peer_id", "span", "state", …}, …]}, …]}`;
        servers are ordered by their first block; one that failed lately has `failed_for_s`, the seconds for which it is avoided, and one
        with `relayed` is reached through relays.
    """
    models = []
    for summary in view.models(now=now):
        if model is not None and model not in (summary.model, summary.model_name):
            continue
        records = view.servers(summary.model, now=now, states=("joining", "online", "draining"), include_failed=True)
        models.append(
            {
                "model": summary.model,
                "name": summary.model_name,
                "num_blocks": summary.num_blocks,
                "missing": list(summary.missing),
                "servers": [_server(record, view, now) for record in sorted(records, key=lambda record: (record.span, record.peer_id))],
            }
        )
    return {"models": models}


def _server(record: ServerRecord, view: SwarmView, now: float) -> dict[str, Any]:
    avoided_until = view.failed_until(record.peer_id, now=now)
    return {
        "peer_id": record.peer_id,
        "public_name": record.public_name,
        "addrs": list(record.addrs),
        "relayed": any(addr.endswith("/p2p-circuit") for addr in record.addrs),
        "span": list(record.span),
        "state": record.state,
        "dtype": record.dtype,
        "quantization": record.quantization,
        "adapters": list(record.adapters),
        "shares": record.shares,
        "version": record.version,
        **{rate: round(getattr(record, rate), 1) for rate in RATES},
        "free_kv_tokens": record.free_kv_tokens,
        "queue": record.queue,
        "age_s": round(max(now - record.issued, 0.0), 1),
        **({"failed_for_s": round(avoided_until - now, 1)} if avoided_until is not None else {}),
    }


def render(overview: dict[str, Any], *, width: int | None = None) -> str:
    """The overview as text of at most `width` columns (default: the terminal's)."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    parts = [line for model in overview["models"] for line in _render_model(model, width)]
    return "\n".join(parts) if parts else "no servers"


def _render_model(model: dict[str, Any], width: int) -> Iterator[str]:
    servers = model["servers"]
    missing = describe_blocks(model["missing"]) + " missing" if model["missing"] else "complete"
    yield f"{model['name']}: {model['num_blocks']} blocks, {len(servers)} server{'s' if len(servers) != 1 else ''}, {missing}"
    rows = [("blocks", "", "server", "state", "dtype", "decode/s", "prefill/s", "free KV", "queue")]
    for server in servers:
        first, end = server["span"]
        state = server["state"] + (", relayed" if server["relayed"] else "")
        if "failed_for_s" in server:
            state = f"failed, avoided for {server['failed_for_s']:.0f} s"
        name = f"{server['public_name']} " if server["public_name"] else ""
        rows.append(
            (
                f"{first}:{end}",
                span_bar(first, end, model["num_blocks"]),
                f"{name}…{server['peer_id'][-6:]}",
                state,
                describe_precision(server["dtype"], server["quantization"]),
                f"{server['decode_tokens_s']:,.0f}",
                f"{server['prefill_tokens_s']:,.0f}",
                f"{server['free_kv_tokens']:,}",
                str(server["queue"]),
            )
        )
    yield from (line[:width] for line in _columns(rows))
    for label in sorted({label for server in servers for label in server["adapters"]}):
        spans = [server["span"] for server in servers if label in server["adapters"] and server["state"] == "online"]
        without = [block for block in range(model["num_blocks"]) if not any(first <= block < end for first, end in spans)]
        yield f"  adapter {label}: {describe_blocks(without) + ' missing' if without else 'complete'}"[:width]


def span_bar(first: int, end: int, num_blocks: int, *, cells: int = 24) -> str:
    """Where [first, end) lies in the model, as a bar of at most `cells` characters; a span is never drawn empty."""
    cells = min(cells, num_blocks)
    left = first * cells // num_blocks
    right = max(-(-end * cells // num_blocks), left + 1)
    return "·" * left + "█" * (right - left) + "·" * (cells - right)


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines of aligned columns; numbers (all but the heading) to the right."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        cells = [cell.rjust(size) if column > 4 else cell.ljust(size) for column, (cell, size) in enumerate(zip(row, widths, strict=True))]
        yield "  " + "  ".join(cells).rstrip()
