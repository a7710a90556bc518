"""Write docs/api.md, the reference of the Python API, the command line and the settings, from docstrings and the table of settings.

    python scripts/make_api_reference.py

The package is read, not imported, as far as its Python API goes (griffe); the command line is asked what it knows. What is listed here is
what users may rely on: other methods that a class happens to have belong to petalnet.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

AUTO_CLASSES = (
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedModel",
    "AutoDistributedConfig",
)
CLASSES: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("client.distributed", "DistributedModel", ("from_pretrained", "inference_session", "save_pretrained", "prompt_length", "close")),
    ("client.generation", "DistributedGeneration", ("generate", "last_trace")),
    ("client.settings", "ClientSettings", ()),
    ("client.session", "InferenceSession", ("step", "position", "rows", "tokens", "hops", "recoveries", "trace", "closed", "close")),
    ("client.remote", "RemoteSequential", ("__getitem__", "forward", "inference_session", "route")),
    (
        *("client.trace", "Trace"),
        ("hops", "wall_s", "local_s", "first_token_s", "token_s", "median_token_s", "worst_token_s", "slowest", "to_dict"),
    ),
    ("client.trace", "HopTotals", ("held_s",)),
    ("client.recovery", "Recovery", ("to_dict",)),
    ("routing.routes", "Hop", ()),
)
"""Module, class and members of what is described, in this order."""
PEERS_ONLY = frozenset(("GraphGone", "LoraGone", "MovedError", "RecordRejected"))
"""Errors that peers tell each other, and that are dealt with before a user meets them."""

_SECTION = re.compile(r"(?<=[^\n])\n(?=(?:Args|Attributes|Raises|Returns|Yields):\n)")


def make_reference() -> str:
    """The page, as text."""
    package = griffe.load("petalnet", search_paths=[ROOT])
    assert isinstance(package, griffe.Module)
    return "\n".join([*_python(package), *_errors(package), *_command_line(), *_settings()]).rstrip() + "\n"


def _python(package: griffe.Module) -> Iterator[str]:
    import petalnet

    yield "# Reference"
    yield ""
    yield "The Python API, its errors, the command line and the settings. This page is made of the docstrings and of the table of settings"
    yield "(`scripts/make_api_reference.py`): change those, not the page. How to use it all is told in the other pages."
    yield ""
    yield "## Python"
    yield ""
    yield "```python"
    yield f"from petalnet import {', '.join(AUTO_CLASSES[:1])}, RemoteSequential, get_remote_module"
    yield "```"
    yield ""
    yield "### Classes of models"
    yield ""
    for name in AUTO_CLASSES:
        yield f"- `{name}`: {_first_line(package[f'client.auto.{name}'])}"
    named = [name for name in petalnet.__all__ if name.startswith("Distributed")]
    families = sorted({re.sub(r"(For\w+|Model|Config)$", "", name) for name in named})
    parts = sorted({name.removeprefix(family) for family in families for name in named if name.startswith(family)})
    yield f"- {', '.join(f'`{family}…`' for family in families)} with {', '.join(f'`{part}`' for part in parts)}:"
    yield "  the same for one family, by name. Each is a subclass of the library's class of that name without `Distributed`;"
    yield "  `petalnet.client.families` has one for every class of `transformers`."
    yield ""
    yield "Every one of them has `from_pretrained`, and a model that it returns has the methods of `DistributedModel` and"
    yield "`DistributedGeneration`."
    for module, name, members in CLASSES:
        found = package[f"{module}.{name}"]
        yield from ("", f"### {name}", "")
        yield from _described(found)
        for member in members:
            yield from ("", f"#### `{_signature(found[member], name)}`")
            described = list(_described(found[member]))
            yield from ["", *described] if described else []
    function = package["client.remote.get_remote_module"]
    yield from ("", "### get_remote_module", "", f"`{_signature(function, '')}`", "")
    yield from _described(function)


def _errors(package: griffe.Module) -> Iterator[str]:
    yield from ("", "## Errors", "", "All in `petalnet.errors`.", "")
    for name, found in package["errors"].classes.items():
        if name not in PEERS_ONLY:
            bases = ", ".join(f"`{base}`" for base in found.bases)
            yield f"- **{name}** ({bases}): {_first_line(found)}"


def _command_line() -> Iterator[str]:
    from petalnet.cli import VERBS, cli

    yield from ("", "## Command line", "", "`petalnet VERB --help` says the same. Underscores in flags are as good as dashes.")
    with click.Context(cli, info_name="petalnet") as outer:
        for verb in VERBS:
            command = cli.get_command(outer, verb)
            assert command is not None
            for path, leaf in _leaves(f"petalnet {verb}", command):
                with click.Context(leaf, parent=outer, info_name=path.removeprefix("petalnet ")) as context:
                    usage = " ".join(leaf.collect_usage_pieces(context))
                    yield from ("", f"### `{path} {usage}`", "")
                    yield from _paragraphs(leaf.help or VERBS[verb])
                    yield from _flags(leaf, context)


def _leaves(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _leaves(f"{path} {name}", inner)
    else:
        yield path, command


def _flags(command: click.Command, context: click.Context) -> Iterator[str]:
    from petalnet.config import TABLE

    settings = [param.name for param in command.params if param.name in TABLE and getattr(command, "rows", ())]
    own = [param for param in command.params if isinstance(param, click.Option) and param.name not in settings and not param.hidden]
    if settings:
        flags = ", ".join("MODEL" if name == "model" else f"`--{str(name).replace('_', '-')}`" for name in settings)
        yield from ("", f"[Settings](#settings): {'all of them' if len(settings) == len(TABLE) else flags}.")
    if own:
        yield ""
    for param in own:
        told = param.get_help_record(context)
        if told is not None:
            yield f"- `{told[0]}`: {' '.join(told[1].split())}"


def _settings() -> Iterator[str]:
    from petalnet.config import TABLE

    yield from ("", "## Settings", "")
    yield "What the command line says counts before the environment, that before the configuration file, that before the default (in"
    yield "brackets). In the file, keys are named like the variables without `PETALNET_`, in small letters."
    yield from ("", "| flag | variable | meaning |", "|---|---|---|")
    for name, field in TABLE.items():
        row = field.metadata
        flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        shown = f"{flag} {row['metavar']}".replace("|", "\\|") if row["metavar"] else flag
        also = "".join(f", `{alias}`" for alias in row["aliases"])
        variable = "" if row["only_typed"] else f"`PETALNET_{name.upper()}`"
        yield f"| `{shown}`{also} | {variable} | {row['help']} |".replace("A:B|N|auto", "A:B\\|N\\|auto").replace(
            "auto|RATE", "auto\\|RATE"
        )


def _described(found: Any) -> Iterator[str]:
    """A docstring as Markdown: its text, and a list for each of its sections."""
    if found.docstring is None:
        return
    docstring = griffe.Docstring(_SECTION.sub("\n\n", found.docstring.value), parent=found)
    for number, section in enumerate(docstring.parse("google", warnings=False, returns_named_value=False, returns_multiple_items=False)):
        if number:
            yield ""
        if section.kind is griffe.DocstringSectionKind.text:
            yield from section.value.splitlines()
            continue
        yield f"*{'Arguments' if section.kind is griffe.DocstringSectionKind.parameters else section.kind.value.capitalize()}*"
        yield ""
        for item in section.value:
            yield f"- {_item_name(item)}{' '.join(item.description.split())}"


def _item_name(item: Any) -> str:
    if isinstance(item, griffe.DocstringReturn):
        return ""
    if isinstance(item, griffe.DocstringRaise):
        return f"`{item.annotation}`: "
    # Several names in front of one colon are taken for a name and its type.
    names = f"{item.name} {item.annotation}" if item.name.endswith(",") else item.name
    return ", ".join(f"`{name}`" if name.isidentifier() else name for name in names.split(", ")) + ": "


def _signature(found: Any, owner: str) -> str:
    """How a function is called, or a property read, on one line."""
    name = f"{owner}.{found.name}" if owner else found.name
    if not isinstance(found, griffe.Function):
        return f"{name}: {found.annotation}" if found.annotation is not None else name
    signature = re.sub(r"\((?:self|cls)(?:, )?", "(", str(found.signature()), count=1)
    return f"{owner}.{signature}" if owner else signature


def _first_line(found: Any) -> str:
    return "" if found.docstring is None else " ".join(found.docstring.value.split("\n\n")[0].split())


def _paragraphs(text: str) -> Iterator[str]:
    """A help text; click leaves alone the lines of a paragraph that begins with a backspace."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ""
        if paragraph.startswith("\b\n"):
            yield from (f"    {line.strip()}" for line in paragraph.splitlines()[1:])
        else:
            yield " ".join(paragraph.split())


def main() -> int:
    logging.getLogger("griffe").setLevel(logging.ERROR)
    page = make_reference()
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(page.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
