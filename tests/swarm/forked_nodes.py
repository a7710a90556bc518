"""Many nodes, quickly: what nodes import is imported once, and each node is a process that parts from this one.

It reads lines of JSON, {"arguments": ["node", …], "log": file}, and answers each with the process's number. A node that ends writes its
exit status into a file beside its log. When the input ends, those that are left are ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def become(task: dict[str, Any]) -> None:
    """Be `petalnet` with these arguments, and end."""
    status = 1
    try:
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for stream in (1, 2):
            os.dup2(log, stream)
        from petalnet.cli import run

        status = run(task["arguments"])
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        Path(f"{task['log']}.status").write_text(str(status))
        os._exit(status)


def main() -> None:
    from petalnet.models.lean import import_transformers

    import_transformers()
    import petalnet.blocks.probe
    import petalnet.blocks.service
    import petalnet.blocks.throughput
    import petalnet.cli.node
    import petalnet.loaded
    import petalnet.node
    import petalnet.p2p.libp2p_host
    import petalnet.serving  # noqa: F401

    print("ready", flush=True)
    started = []
    for line in sys.stdin:
        task = json.loads(line)
        process = os.fork()
        if process == 0:
            become(task)
        started.append(process)
        print(process, flush=True)
    for process in started:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main()
