"""A real `petalnet node` that can be told to answer garbage: `python garbage_node.py node …`.

On SIGUSR1 it reads from the file that the environment variable GARBAGE_FILE names what sort of garbage, one of `KINDS`; from then on all
outputs that leave it, to clients and to other servers, are of that sort. Until then it is like any other.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from petalnet.cli import main
from petalnet.errors import ServerError
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.messages import Error, encode_message
from petalnet.p2p.session_messages import Step, StepDone
from petalnet.p2p.streams import Stream

KINDS = ("nan", "shape", "number", "frames", "error")
"""Numbers that are none; hidden states of another size; steps that nobody asked for; half a message; an error in place of every output."""

_kind = ""


def garbage_of(message: Step | StepDone, kind: str) -> Message:
    """What leaves in place of an output."""
    name = "hidden" if isinstance(message, Step) else "output"
    blob: Blob = getattr(message, name)
    if kind == "nan":
        data = np.full(blob.shape, np.nan, dtype=np.float32).tobytes()
        return replace(message, **{name: Blob("float32", blob.shape, "raw", data)})
    if kind == "shape":
        shape = (*blob.shape[:-1], blob.shape[-1] - 1)
        return replace(message, **{name: Blob("float32", shape, "raw", np.zeros(shape, dtype=np.float32).tobytes())})
    if kind == "number":
        return replace(message, step=message.step + 1000)
    if isinstance(message, Step):
        return message  # an error is for the client: a link has no way back for it
    return Error.of(ServerError("this server is made to fail"), message.step)


async def send(stream: Stream, message: Message) -> None:
    """`Stream.send` of such a server."""
    if not _kind or not isinstance(message, Step | StepDone):
        await _send(stream, message)
    elif _kind == "frames":
        whole = b"".join(bytes(part) for part in encode_message(message))
        raw: Any = stream._raw
        await raw.send([whole[: len(whole) // 2]], stream.protocol.frame_timeout_s, 0)
        await stream.close()
    else:
        await _send(stream, garbage_of(message, _kind))


def begin(number: int, frame: object) -> None:
    global _kind
    _kind = Path(os.environ["GARBAGE_FILE"]).read_text()


if __name__ == "__main__":
    _send, Stream.send = Stream.send, send  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, begin)
    main()
