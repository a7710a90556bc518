"""`petalnet key`: the key of a private swarm."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from petalnet.p2p.swarm_key import SwarmKey


@click.group("key", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """The key of a private swarm: who has it can join, nobody else can even talk to its nodes."""
    if ctx.invoked_subcommand is None:
        raise click.UsageError("say what to do: `petalnet key new FILE` makes the key of a private swarm")


@command.command("new", short_help="make a new key in FILE")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("as_json", "--json", is_flag=True, help="as JSON")
def new(file: Path, as_json: bool) -> None:
    """Make a new key in FILE, which only you can read; a file that exists is left alone.

    Bring it to each machine of the swarm by a way that you trust, such as scp, and start every node with --swarm-key FILE.
    """
    key = SwarmKey.generate()
    key.save_new(file.expanduser())
    if as_json:
        click.echo(json.dumps({"path": str(file.expanduser().absolute()), "fingerprint": key.fingerprint}))
        return
    click.echo(f"{file}: a new swarm key; its fingerprint is {key.fingerprint}")
    click.echo("Copy the file to each machine of the swarm by a way that you trust. Every node needs it:")
    click.echo(f"  petalnet node --serve 0:12 --swarm-key {shlex.quote(str(file))}")
