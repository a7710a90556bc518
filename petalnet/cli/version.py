"""`petalnet version`: what is installed, as a report of a defect needs it."""

from __future__ import annotations

import json
import platform
from importlib import metadata

import click

from petalnet.version import __version__

PACKAGES = ("torch", "transformers", "libp2p", "trio")


@click.command("version")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def command(as_json: bool) -> None:
    """The versions of petalnet and of what it stands on."""
    versions = {"petalnet": __version__, "python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    if as_json:
        click.echo(json.dumps(versions))
    else:
        for name, version in versions.items():
            click.echo(f"{name} {version}")
