"""The messages of inference sessions: between a client and the servers of its chain, and from server to server."""

from __future__ import annotations

from dataclasses import dataclass

from petalnet.p2p.fields import Blob, Message, array, flag, integer, many, message_type, number, scalar, text

MAX_BLOCKS = 4096
MAX_TOKENS = 1 << 24
UNIT_TOKENS = 64
"""Positions of a unit. A name stands for one unit of a row and all units before it, whose KV entries a server may keep for later."""
NAME_BYTES = 16
"""Bytes of a unit's name; the client's hash of what entered the session's blocks."""
KEEP_NONE = -1
"""`Step.keep` of a step whose outputs nobody wants: a prompt's chunks before the last."""
MAX_LABEL = 160
"""Characters of an adapter's label: its name, "@" and the beginning of its digest."""
MAX_HOPS = 256
"""Servers of a chain whose times a step may carry."""


@message_type("open_session")
@dataclass(frozen=True)
class OpenSession(Message):
    """Begin an inference session on blocks [first, end) of a model; answered by `SessionOpened`.

    Attributes:
        session: a random id that the client gives to all servers of a chain.
        max_length: the most KV entries that a row will take.
        promise_rows: set aside KV room for so many rows at once, which may be answered by *busy*; 0: the first step asks for it.
        takes_from: the peer, if any, whose `OpenLink` may bring steps for this session; nobody else's may, the client aside.
        pushes_to: the server, if any, that runs the blocks from `end` on: the outputs of steps go there as the inputs of its steps, and
            only to the client where it cannot be reached. A session that pushes keeps its outputs (see `Replay`).
        adapter: the LoRA adapter that the server is to apply, as its record names it; "" for none.
        lora: the version of what this peer has put there (see `PutLora`) and wants applied as well; "" for none.
    """

    session: str = scalar(text(64))
    model: str = scalar(text(128))
    first: int = scalar(integer(0, MAX_BLOCKS))
    end: int = scalar(integer(1, MAX_BLOCKS))
    max_length: int = scalar(integer(1, MAX_TOKENS))
    promise_rows: int = scalar(integer(0, MAX_TOKENS), 0)
    takes_from: str = scalar(text(128), "")
    pushes_to: str = scalar(text(128), "")
    adapter: str = scalar(text(MAX_LABEL), "")
    lora: str = scalar(text(64), "")


@message_type("session_opened")
@dataclass(frozen=True)
class SessionOpened(Message):
    """A session is open.

    Attributes:
        free_kv_tokens: KV tokens that no session has been promised.
        shares_prefixes: whether `Attach` finds what other peers' sessions have named; otherwise only what the same peer's have.
        dtype: what the server computes in: hidden states lose nothing on the way to and from it in a codec of that name.
        codecs: the codecs that the server reads and writes.
    """

    free_kv_tokens: int = scalar(integer(0, 2**53))
    shares_prefixes: bool = scalar(flag, False)
    dtype: str = scalar(text(20), "")
    codecs: tuple[str, ...] = scalar(many(text(20), 16), ("raw",))


@message_type("open_link")
@dataclass(frozen=True)
class OpenLink(Message):
    """From server to server: what follows are `Step`s of the session of this id whose blocks begin at `first`. Answered by `LinkOpened`
    once the receiver knows the session, and it names the sender in `takes_from`. The steps themselves are answered to the client."""

    session: str = scalar(text(64))
    first: int = scalar(integer(0, MAX_BLOCKS))


@message_type("link_opened")
@dataclass(frozen=True)
class LinkOpened(Message):
    """Steps may follow."""


@message_type("link_down")
@dataclass(frozen=True)
class LinkDown(Message):
    """To a session's client: the server that the outputs were to go to cannot be reached from here. From now on they come to the client.

    Attributes:
        reason: one line for a person.
        pushed: the last step whose output went to that server, which may have got it or not; 0 for none.
    """

    reason: str = scalar(text(1000))
    pushed: int = scalar(integer(0, 2**53), 0)


@message_type("reserve")
@dataclass(frozen=True)
class Reserve(Message):
    """Set aside KV room for at least so many rows of the session; answered by `Reserved`, or *busy*."""

    rows: int = scalar(integer(1, MAX_TOKENS))


@message_type("reserved")
@dataclass(frozen=True)
class Reserved(Message):
    """The room is there; KV tokens that no session has been promised."""

    free_kv_tokens: int = scalar(integer(0, 2**53))


@message_type("replay")
@dataclass(frozen=True)
class Replay(Message):
    """The outputs for KV entries [position, position + tokens) of all rows once more, of a session that pushes.

    Attributes:
        step: a number. Where they go to the client, their step's: the answer is a `StepDone` of that number, as soon as
            the step has been computed there and the session has come that far. Otherwise a new number, above that of all steps before.
        codec: as of a step.
        until: 0: they go to the client. Otherwise they go on as a `Step` of this number and this `until` to the server that the session
            pushes to, in the place of what a server before it has lost; to the client as a `StepDone` where that cannot be reached.
        mask, position_ids, prompts, reach: for that step.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    tokens: int = scalar(integer(1, MAX_TOKENS))
    codec: str = scalar(text(20), "raw")
    until: int = scalar(integer(0, MAX_BLOCKS), 0)
    reach: int = scalar(integer(0, MAX_TOKENS), 0)
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)


@message_type("resume")
@dataclass(frozen=True)
class Resume(Message):
    """A server of the chain was lost, and others take its place: what is under way is given up, and the session goes on from `position`
    between these neighbours. Answered by `Resumed`, or an error. May come at any time, also while a step is computed or waits.

    Attributes:
        step: the highest number that any step has been given: all of these are dropped from now on, whoever brings them.
        position: KV entries that stay.
        order: int64 [rows], and `order_step`, the number of the step that it came with: rows are put into this order unless that step has
            been computed here.
        takes_from, pushes_to: as in `OpenSession`, from now on. A link to the same server that is up stays; any other is closed.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    takes_from: str = scalar(text(128), "")
    pushes_to: str = scalar(text(128), "")
    order_step: int = scalar(integer(0, 2**53), 0)
    order: Blob | None = array(optional=True)


@message_type("resumed")
@dataclass(frozen=True)
class Resumed(Message):
    """The session stands between its new neighbours, at `position`, with so many rows."""

    position: int = scalar(integer(0, MAX_TOKENS))
    rows: int = scalar(integer(0, MAX_TOKENS))


@message_type("ask_progress")
@dataclass(frozen=True)
class AskProgress(Message):
    """How far is this session? Answered at once by `Progress` of the same nonce, also while a long step is computed."""

    nonce: int = scalar(integer(0, 2**53))


@message_type("progress")
@dataclass(frozen=True)
class Progress(Message):
    """The numbers of the last step that came, of the last one that was computed, and of the last one whose output was sent on."""

    nonce: int = scalar(integer(0, 2**53))
    taken: int = scalar(integer(0, 2**53))
    done: int = scalar(integer(0, 2**53))
    sent: int = scalar(integer(0, 2**53))


@message_type("draining")
@dataclass(frozen=True)
class Draining(Message):
    """To a session's client, unasked: this server takes no new sessions, and ends this one in so many seconds. It may go elsewhere."""

    grace_s: float = scalar(number(0, 1e6))


@message_type("attach")
@dataclass(frozen=True)
class Attach(Message):
    """Before a session's first step: its rows begin with the KV entries of named units, as far as they are known. Answered by `Attached`.

    Attributes:
        names: uint8 [rows, units, NAME_BYTES], each row's units in their order from position 0 on.
    """

    names: Blob = array()


@message_type("attached")
@dataclass(frozen=True)
class Attached(Message):
    """KV entries that each row of the session has now: whole units, the same for all rows; 0 where nothing was known.

    The first step may be at this position or, where other servers of the route know less, at a lower one.
    """

    position: int = scalar(integer(0, MAX_TOKENS))


@message_type("step")
@dataclass(frozen=True)
class Step(Message):
    """Run new tokens through the session's blocks. The answer is a `StepDone` to the client; in a session that pushes, the step goes on
    to the next server instead, with the output in place of `hidden` and `prompts` for the blocks that are left.

    Attributes:
        step: a number above that of all steps before, which the answer repeats. A step whose number has been taken is dropped: it came both
            from the server before and from the client.
        position: KV entries before this step; lower than what the server has means: roll back to it first.
        hidden: [rows, new, hidden], a float dtype; new may be 0.
        mask: bool [rows, position + new], False where a token is padding; absent when nothing is.
        position_ids: int32 [rows, new]; absent when they are position … position + new - 1 in every row.
        reach: where the step is only a part of what belongs together, one past the last position of the whole; 0 where it is all of it.
            Some models turn keys by angles that depend on it.
        prompts: [blocks, rows, prompt length, hidden], added to each block's input at its first positions; for the session's blocks and,
            where it pushes, all that follow in the chain.
        order: int64 [rows], which of the session's rows each row continues (beams); absent for each its own.
        all_hidden: answer with the outputs of every block instead of the last one's.
        keep: answer with the outputs of the last `keep` new tokens only; 0 for all of them, `KEEP_NONE` for none. A session that pushes
            passes on all of them, whatever this says.
        promise_rows: set aside KV room for at least so many rows: a client may send rows that are alike as one and have it repeated by a
            later step's `order`.
        names: uint8 [rows, units, NAME_BYTES], names of the units that this step completes, in their order. Where a step completes units
            and names none, the session's later units cannot be named any more.
        until: 0, or the end of the last blocks that the step goes through: the server whose blocks end there answers the client and sends
            nothing on. It rebuilds the KV entries of servers that have taken the place of lost ones.
        codec: what the outputs may be rounded to on their way, from server to server as well; "raw": nothing may be lost. A server that
            computes in less than the client's dtype sends what it has, which loses nothing.
        spent: for each server that the step has gone through on its way, in order: seconds in its queue, seconds of computation, and
            seconds from the step's arrival there until it was sent on.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    hidden: Blob = array()
    mask: Blob | None = array(optional=True)
    position_ids: Blob | None = array(optional=True)
    prompts: Blob | None = array(optional=True)
    order: Blob | None = array(optional=True)
    all_hidden: bool = scalar(flag, False)
    keep: int = scalar(integer(KEEP_NONE, MAX_TOKENS), 0)
    promise_rows: int = scalar(integer(0, MAX_TOKENS), 0)
    names: Blob | None = array(optional=True)
    codec: str = scalar(text(20), "raw")
    reach: int = scalar(integer(0, MAX_TOKENS), 0)
    until: int = scalar(integer(0, MAX_BLOCKS), 0)
    spent: tuple[float, ...] = scalar(many(number(0, 1e6), 3 * MAX_HOPS), ())


@message_type("step_done")
@dataclass(frozen=True)
class StepDone(Message):
    """The output of a step, [rows, kept, hidden], or [blocks, rows, kept, hidden] with all_hidden, which each server of a chain answers.

    Attributes:
        position: KV entries after the step.
        compute_s, queue_s, held_s: seconds of computation, in the queue, and from the step's arrival until this answer.
        spent: of the servers before, as the step brought it.
    """

    step: int = scalar(integer(0, 2**53))
    position: int = scalar(integer(0, MAX_TOKENS))
    output: Blob = array()
    compute_s: float = scalar(number(0, 1e6), 0.0)
    queue_s: float = scalar(number(0, 1e6), 0.0)
    held_s: float = scalar(number(0, 1e6), 0.0)
    spent: tuple[float, ...] = scalar(many(number(0, 1e6), 3 * MAX_HOPS), ())
