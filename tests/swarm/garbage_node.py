"""A real `petalnet node` that can be told to answer garbage: `python garbage_node.py node …`.

On SIGUSR1 it reads from the file that the environment variable GARBAGE_FILE names what sort of garbage, one of `KINDS`; from then on all
outputs that leave it, to clients and to other servers, and all gradients, are of that sort. Until then it is like any other.
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
from petalnet.p2p.pass_messages import BackwardDone, ForwardDone
from petalnet.p2p.session_messages import Step, StepDone
from petalnet.p2p.streams import Stream

KINDS = ("nan", "shape", "number", "frames", "error")
"""Numbers that are none; hidden states of another size; steps that nobody asked for; half a message; an error in place of every output."""
PASS_KINDS = ("shape", "frames", "error")
"""Of the answers of passes that belong to no session: of numbers that are none, a client cannot tell whose fault they are."""
Answer = Step | StepDone | ForwardDone | BackwardDone

_kind = ""


def garbage_of(message: Answer, kind: str) -> Message:
    """What leaves in place of an output."""
    name = {Step: "hidden", BackwardDone: "grad_hidden"}.get(type(message), "output")
    blob: Blob | None = getattr(message, name)
    if kind == "error" and not isinstance(message, Step):
        return Error.of(ServerError("this server is made to fail"), getattr(message, "step", 0))
    if blob is None:
        return message  # a gradient that was not wanted
    if kind == "nan":
        data = np.full(blob.shape, np.nan, dtype=np.float32).tobytes()
        return replace(message, **{name: Blob("float32", blob.shape, "raw", data)})
    if kind == "shape":
        shape = (*blob.shape[:-1], blob.shape[-1] - 1)
        return replace(message, **{name: Blob("float32", shape, "raw", np.zeros(shape, dtype=np.float32).tobytes())})
    if kind == "number" and isinstance(message, Step | StepDone):
        return replace(message, step=message.step + 1000)
    return message  # an error is for the client: a link has no way back for it


async def send(stream: Stream, message: Message) -> None:
    """`Stream.send` of such a server."""
    if not _kind or not isinstance(message, Answer):
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
