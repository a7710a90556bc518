"""The command line, `petalnet`: one module per verb, imported when its verb runs, so that `petalnet --help` is instant.

Wrong use ends with status 2 and one line that says what to do, a failure at run time with status 1 and one line.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import sys
from collections.abc import Iterable, Sequence

import click

from petalnet.version import __version__

VERBS = {
    "node": "run a node: host blocks, be this machine's client daemon, or be a swarm's entry point",
    "peers": "who this machine's nodes are connected to, through what and how fast",
    "status": "who serves which blocks of which model, and what is missing",
    "drain": "end a node of this machine in good order: its users are moved to other servers first",
    "route": "which servers a session would take now, and why",
    "convert": "write a model anew, block by block, and put it on the hub if you like",
    "plan": "what each precision of a model costs on this machine, and how many such machines a swarm needs",
    "demo": "a whole swarm on this machine: starts servers and generates text through them",
    "key": "make the key of a private swarm",
    "version": "the versions of petalnet and of what it stands on",
}

class _Verbs(click.Group):
    """A group that knows its verbs by name and loads `petalnet.cli.<verb>` for the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            near = difflib.get_close_matches(cmd_name, VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}; see petalnet --help"
            raise click.UsageError(f"no such verb: {cmd_name}; {hint}")
        command: click.Command = importlib.import_module(f"petalnet.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="petalnet %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run and fine-tune large language models together: every machine of a swarm holds a few transformer blocks."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; returns the exit status."""
    from petalnet.errors import PetalnetError, UsageError

    try:
        status = cli.main(list(arguments), prog_name="petalnet", standalone_mode=False)
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader of a pipe went away, as in `petalnet status | head`
        sys.stdout = None
        return 1
    except UsageError as error:
        return _fail(str(error), 2)
    except PetalnetError as error:
        return _fail(str(error), 1)
    except BaseExceptionGroup as group:
        errors = list(_leaves(group))
        if any(isinstance(error, KeyboardInterrupt) for error in errors):
            return 130
        if not all(isinstance(error, PetalnetError) for error in errors):
            raise  # a defect of ours: the traceback is what a report needs
        return _fail(str(errors[0]), 2 if isinstance(errors[0], UsageError) else 1)
    return status if isinstance(status, int) else 0


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterable[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _fail(message: str, status: int) -> int:
    click.echo(f"petalnet: {' '.join(message.split())}", err=True)
    return status


def main() -> None:
    # Looking for garbage takes a fifth of the time of importing torch and transformers, which leave none. Who lives on turns it on again.
    gc.disable()
    sys.exit(run(sys.argv[1:]))
