"""`petalnet drain`: a node of this machine leaves its swarm in good order."""

from __future__ import annotations

from typing import Any

import click


@click.command("drain")
@click.option("--node", "named", metavar="NAME|PID", help="which one, where you run several: its --public-name, or its process's number")
@click.option("--no-wait", is_flag=True, help="do not wait until it has ended")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def command(named: str | None, no_wait: bool, as_json: bool) -> int:
    """Tell a node that you run on this machine to leave: it takes no new sessions, the running ones move to other servers or end, for as
    long as its --drain-time allows, and then it ends. SIGTERM and Ctrl-C do the same.

    Returns when the node has ended.
    """
    import json

    from petalnet.errors import PetalnetError
    from petalnet.inspection import ENDS_WITHIN_S, ask_nodes, ask_to_drain, await_end

    node = _choose(ask_nodes(), named)
    pid = node["pid"]
    waits = ask_to_drain(pid)
    sessions, within_s = waits["sessions"], waits["within_s"]
    if not as_json:
        count = f": {sessions} session{'s' * (sessions != 1)} may take up to {within_s:g} s to leave" if sessions else ""
        click.echo(f"{describe(node)} drains{count}")
    if not no_wait and not await_end(pid, within_s + ENDS_WITHIN_S):
        raise PetalnetError(f"{describe(node)} has not ended after {within_s + ENDS_WITHIN_S:g} s; its log says why, `kill {pid}` ends it")
    if as_json:
        click.echo(json.dumps({"pid": pid, "ended": not no_wait, **waits}))
    elif not no_wait:
        click.echo("it has left")
    return 0


def describe(node: dict[str, Any]) -> str:
    """`server box in the cellar (pid 4711)`."""
    return f"{node['role']}{' ' + node['public_name'] if node['public_name'] else ''} (pid {node['pid']})"


def _choose(nodes: list[dict[str, Any]], named: str | None) -> dict[str, Any]:
    """The node that is meant. Raises UsageError, and PetalnetError where there is none."""
    from petalnet.errors import PetalnetError, UsageError

    if not nodes:
        raise PetalnetError("you run no node on this machine")
    found = [node for node in nodes if named is None or named in (str(node["pid"]), node["public_name"])]
    if len(found) == 1:
        return found[0]
    running = ", ".join(map(describe, nodes))
    if not found:
        raise UsageError(f"you run no node {named!r} on this machine; there is {running}")
    raise UsageError(f"say which one with --node NAME or PID: {', '.join(map(describe, found))}")
