"""Command-line options made from the table of settings, so that no flag is written down twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from petalnet.config import TABLE, Settings, load_settings


class SettingsCommand(click.Command):
    """A command whose flags are rows of the table of settings; the callback gets the merged `settings`.

    As in Petals, underscores in flags are as good as dashes, and a flag that takes a list takes all that follows up to the next flag.
    """

    def __init__(self, name: str, *, settings: Iterable[str], params: Sequence[click.Parameter] = (), **options: Any) -> None:
        self.rows = list(settings)
        super().__init__(name, params=[*_parameters(self.rows), *params], **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags_of_lists = {flag for param in self.params if param.multiple for flag in param.opts}
        switches = {flag: values for name in self.rows for flag, values in TABLE[name].metadata["switches"].items()}
        return super().parse_args(ctx, list(_expand(_switch(args, switches), flags_of_lists)))

    def invoke(self, ctx: click.Context) -> Any:
        typed = {name: ctx.params.pop(name) for name in self.rows}
        for name in list(ctx.params):
            if name.startswith("alias_"):
                value, row = ctx.params.pop(name), name.rsplit("__", 1)[1]
                if value is not None:
                    if typed[row] is not None:
                        raise click.UsageError(f"--{TABLE[row].name.replace('_', '-')} is given twice, once by another name: leave one out")
                    typed[row] = value
        ctx.params["settings"] = load_settings(typed)
        return super().invoke(ctx)


def _parameters(rows: Iterable[str]) -> Iterator[click.Parameter]:
    for name in rows:
        row = TABLE[name].metadata
        flags = [f"--{name.replace('_', '-')}", *row["aliases"]]
        if name == "model":
            yield click.Argument(["model"], required=False)
            for number, alias in enumerate(row["aliases"]):
                yield click.Option([f"alias_{number}__model", alias], hidden=True)
        elif TABLE[name].type in ("bool", bool):
            yield click.Option([name, *flags], is_flag=True, default=None, help=row["help"])
        elif row["many"]:
            yield click.Option([name, *flags], multiple=True, metavar=row["metavar"], help=row["help"])
        else:
            yield click.Option([name, *flags[:1]], metavar=row["metavar"], help=row["help"])
            for number, alias in enumerate(flags[1:]):
                yield click.Option([f"alias_{number}__{name}", alias], hidden=True)


def _switch(args: Sequence[str], switches: Mapping[str, tuple[str, str]]) -> list[str]:
    """`--a` and `--a true` as `--a=x`, `--a false` as `--a=y`, where `--a` stands for x or y."""
    expanded: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-")
        if name in switches and (not equals or value.lower() in ("true", "false")):
            expanded.append(f"{name}={switches[name][value.lower() == 'false']}")
        elif arg.lower() in ("true", "false") and expanded and (before := expanded[-1].partition("=")[0]) in switches:
            expanded[-1] = f"{before}={switches[before][arg.lower() == 'false']}"
        else:
            expanded.append(arg)
    return expanded


def _expand(args: Sequence[str], flags_of_lists: set[str]) -> Iterator[str]:
    """`--a_b x y` as `--a-b x --a-b y` where --a-b takes a list."""
    flag = None  # the list flag that the next values belong to
    for arg in args:
        if arg.startswith("-") and len(arg) > 1:
            name, equals, value = arg.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            flag = name if name in flags_of_lists and not equals else None
            first = flag is not None
            yield name + equals + value
        elif flag is not None and not first:
            yield flag
            yield arg
        else:
            first = False
            yield arg


__all__ = ["Settings", "SettingsCommand"]
