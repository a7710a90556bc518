"""`petalnet status`: who serves which blocks, and what is missing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from petalnet.cli.options import SettingsCommand
from petalnet.config import Settings, access_of, resolve_initial_peers
from petalnet.p2p.access import Access


def _run(settings: Settings, as_json: bool) -> int:
    from petalnet.cli.logs import set_up

    set_up("warning", "pretty")
    peers = resolve_initial_peers(settings.initial_peers or None)
    access = access_of(settings, daemon=True)

    import trio

    from petalnet.errors import UsageError
    from petalnet.overview import render

    model = settings.model
    if model is not None and Path(model).is_dir():
        model = Path(model).resolve().name  # as its servers call it
    overview = trio.run(_look, peers, access, model)
    if model is not None and not overview["models"]:
        raise UsageError(f"nobody in this swarm serves {model}; `petalnet status` without a model lists what is served")
    click.echo(json.dumps(overview, indent=1) if as_json else render(overview))
    return 0


async def _look(peers: list[str], access: Access, model: str | None) -> dict[str, Any]:
    from petalnet.overview import describe_swarm
    from petalnet.p2p.identity import Identity
    from petalnet.peering import open_peering

    async with open_peering(Identity.generate(), initial_peers=peers, listen=(), server=False, access=access) as peering:
        await peering.look_up()
        return describe_swarm(peering.view, now=time.time(), model=model)


command = SettingsCommand(
    "status",
    settings=["model", "initial_peers", "swarm_key", "allow_peers", "block_peers"],
    params=[click.Option(["as_json", "--json"], is_flag=True, help="as JSON")],
    callback=_run,
    help="""Who serves which blocks of which model, and what is missing.

    The swarm is found as by every client: --initial-peers, PETALNET_INITIAL_PEERS, the configuration file, or this machine's client
    daemon; the key of a private one likewise. MODEL is a name or key as the overview shows them.""",
)
