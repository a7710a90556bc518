"""`petalnet plan`: what each precision of a model costs on this machine, and how many such machines a swarm needs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from typing import TYPE_CHECKING

import click

from petalnet.cli.options import SettingsCommand
from petalnet.config import Settings

if TYPE_CHECKING:
    from petalnet.planning import Plan

WIDTH_OF_FILES = 160
"""Columns where the output goes to no terminal."""
HALF = 0.5
"""Of a model's weights that quantization should at least round, or it is not worth while."""


def _run(settings: Settings, as_json: bool) -> int:
    from petalnet.cli.logs import set_up

    set_up("warning", "pretty")
    plan = _make(settings)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(plan), indent=1))
    else:
        _show(plan, node_command(settings))
    return 0


def _make(settings: Settings) -> Plan:
    from petalnet.models.lean import import_transformers

    import_transformers()
    from petalnet.capacity import best_device, left_for_blocks, require_device
    from petalnet.devices import device_names
    from petalnet.models.checkpoint import ModelSource
    from petalnet.models.loading import pick_dtype
    from petalnet.planning import make_plan

    device = settings.device or best_device()
    require_device(device)
    source = ModelSource.open(settings.model, revision=settings.revision, token=settings.token, cache_dir=settings.cache_dir)
    return make_plan(
        source,
        dtype=pick_dtype(settings.dtype, source, device_names(device)[0]),
        quantization=settings.quantization,
        device=device,
        max_memory=left_for_blocks(settings.max_memory, device, captures=settings.cuda_graphs != "off"),
        kv_tokens=settings.attn_cache_tokens,
    )


def node_command(settings: Settings) -> str:
    """The command with which a node takes what was planned for."""
    words = ["petalnet", "node", *([settings.model] if settings.model else []), "--serve", "auto"]
    if settings.dtype != "auto":
        words += ["--dtype", settings.dtype]
    if settings.quantization != "none":
        words += ["--quantization", settings.quantization]
    if settings.device:
        words += ["--device", settings.device]
    if settings.max_memory is not None:
        words += ["--max-memory", f"{settings.max_memory / 1e9:.9f}".rstrip("0").rstrip(".") + "GB"]
    if settings.attn_cache_tokens is not None:
        words += ["--attn-cache-tokens", str(settings.attn_cache_tokens)]
    return shlex.join(words)


def _show(plan: Plan, command: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from petalnet.routing.precision import describe_precision

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    beside = "what is left for KV tokens" if plan.kv_tokens is None else f"room for {plan.kv_tokens:,} KV tokens"
    click.echo(
        f"{plan.model}: {plan.num_blocks} blocks; {size(plan.memory_bytes)} of {plan.device} memory for some of them, beside {beside}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("precision")
    for heading in ("a block", "all blocks", "a KV token", "blocks here", "KV tokens", "machines like this"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in plan.precisions:
        fits: tuple[str, ...] = ("none", "", "")
        if one.machines is not None:
            fits = (f"{one.blocks}", f"{one.kv_tokens:,}", f"{one.machines}")
        name = describe_precision(one.dtype, one.quantization) + (" *" if one.chosen else "")
        table.add_row(Text(name), size(one.block_bytes), size(one.model_bytes), size(one.kv_bytes), *fits)
    console.print(table)
    for line in notes(plan, command):
        click.echo(line)


def notes(plan: Plan, command: str) -> list[str]:
    """What is to be said below the table; `command` starts a node as planned."""
    lines = []
    chosen = next((one for one in plan.precisions if one.chosen), None)
    if chosen is not None and chosen.machines is not None:
        lines.append(f"* what `{command}` takes here; a KV token takes its bytes in each block")
    elif chosen is not None:
        fewer = "" if plan.kv_tokens is None else ", a smaller --attn-cache-tokens"
        lines.append(
            f"* `{command}` cannot hold a single block: it takes another precision, more memory (--max-memory){fewer}, or another machine"
        )
    little = [one for one in plan.precisions if one.quantization != "none" and one.quantized < HALF]
    if little:
        lines.append(
            f"quantization rounds only {little[0].quantized:.0%} of this model's weights: its experts are kept together in parameters that "
            "it leaves alone"
        )
    return lines


def size(count: float) -> str:
    """`12.3 MB` of 12,345,678."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


command = SettingsCommand(
    "plan",
    settings=[
        *("model", "dtype", "quantization", "device", "max_memory", "attn_cache_tokens"),
        *("revision", "token", "cache_dir"),
    ],
    params=[click.Option(["as_json", "--json"], is_flag=True, help="as JSON")],
    callback=_run,
    help="""What each precision of MODEL costs on this machine: what a block takes, how many fit beside their KV tokens, and how many
    machines like this one a swarm needs that has every block once.

    Reads the model's configuration only. With --attn-cache-tokens N there is to be room for N KV tokens beside the blocks, with
    --max-memory 8GB the plan is for a machine that gives so much. `petalnet node --serve auto` counts in the same way.""",
)
