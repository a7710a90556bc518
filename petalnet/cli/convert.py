"""`petalnet convert`: a model written anew, block by block, for a swarm and for everybody else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from petalnet.cli.options import SettingsCommand
from petalnet.config import Settings
from petalnet.errors import UsageError

if TYPE_CHECKING:
    from petalnet.models.convert import Progress

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _run(settings: Settings, output: Path, dtype: str, force: bool, push_to_hub: str | None, private: bool, as_json: bool) -> int:
    from petalnet.cli.logs import set_up

    set_up("warning", "pretty")
    if settings.model is None:
        raise UsageError("say which model: petalnet convert MODEL --output DIR, where MODEL is a hub id or a folder")
    if private and push_to_hub is None:
        raise UsageError("--private is about a repository on the hub: say which one with --push-to-hub OWNER/NAME")
    from petalnet.models.lean import import_transformers

    import_transformers()
    from rich.filesize import decimal

    from petalnet.models.checkpoint import ModelSource
    from petalnet.models.convert import convert
    from petalnet.models.loading import DTYPES as TORCH_DTYPES
    from petalnet.models.publishing import Repository

    repository = None
    if push_to_hub is not None:
        repository = Repository(push_to_hub, token=settings.token, private=private, replace=force)
        repository.check()
    source = ModelSource.open(
        settings.model,
        revision=settings.revision,
        token=settings.token,
        cache_dir=settings.cache_dir,
        max_disk_space=settings.max_disk_space,
    )
    with _bar(as_json) as progress:
        made = convert(
            source, output.expanduser().absolute(), dtype=TORCH_DTYPES.get(dtype), name=push_to_hub, replace_model=force, progress=progress
        )
    url = None if repository is None else repository.put(made.folder)
    blocks = len(made.manifest.blocks)
    if as_json:
        told = {"folder": str(made.folder), "model": made.manifest.name, "key": made.key, "num_blocks": blocks, "nbytes": made.nbytes}
        click.echo(json.dumps({**told, "url": url}, indent=1))
    else:
        click.echo(f"{made.folder}: {made.manifest.name}, {blocks} blocks, {decimal(made.nbytes)}; its key is {made.key}")
        click.echo(f"on the hub: {url}" if url else f"serve it with: petalnet node {shlex.quote(str(output))} --serve auto")
    return 0


@contextmanager
def _bar(silent: bool) -> Iterator[Progress]:
    """What draws how far it is on standard error, where that is a terminal. What is fetched from a hub is drawn as part of it."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    disable_progress_bars("petalnet.fetch")
    try:
        with Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal) as drawn:
            task = drawn.add_task("writing", total=None)
            yield lambda done, total: drawn.update(task, completed=done, total=total)
    finally:
        enable_progress_bars("petalnet.fetch")


command = SettingsCommand(
    "convert",
    settings=["model", "revision", "token", "cache_dir", "max_disk_space"],
    params=[
        click.Option(
            ["output", "--output"],
            required=True,
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="the folder to write, which must be empty or not there yet",
        ),
        click.Option(
            ["dtype", "--dtype", "--torch-dtype"],
            type=click.Choice(DTYPES),
            default="auto",
            help="of the weights that are written; another one than the model's makes another model of it  [auto: the model's]",
        ),
        click.Option(["force", "--force"], is_flag=True, help="replace the model that DIR, or the repository, holds"),
        click.Option(["push_to_hub", "--push-to-hub"], metavar="OWNER/NAME", help="put it into this repository on the hub as well"),
        click.Option(["private", "--private"], is_flag=True, help="make that repository a private one"),
        click.Option(["as_json", "--json"], is_flag=True, help="say what was made as JSON"),
    ],
    callback=_run,
    help="""Write a model anew, block by block: one safetensors file for each block, one for all that belongs to no block, and a manifest
    with the digests of every part.

    Servers that get it from the hub fetch nothing but the files of their blocks, and peers check what they get from each other. It stays a
    model in Hugging Face format that every program reads, and unless --dtype is given the same model: servers of the one and of the other
    work together.

    Nothing is left where it is interrupted. It takes as much room as the model, and little memory; what is fetched from the hub stays in
    the cache beside that, within --max-disk-space.""",
)
