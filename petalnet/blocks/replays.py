"""The outputs of one session once more, from what is kept of them: to its client, or on to a server that has taken another's place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from petalnet.blocks.outputs import encode_output
from petalnet.blocks.sessions import Session
from petalnet.errors import CallerError, PeerLost, PetalnetError
from petalnet.p2p.fields import Blob
from petalnet.p2p.messages import Error
from petalnet.p2p.session_messages import KEEP_NONE, Replay, Step, StepDone

if TYPE_CHECKING:
    from petalnet.blocks.service import BlockService
    from petalnet.p2p.streams import Stream

MOST_REPLAYS = 16
"""Replays to its client that a session may wait for at a time."""


class Replays:
    """Those of one session.

    Attributes:
        done_step: the number of the last step that was computed.
    """

    def __init__(self, service: BlockService, session: Session, client: Stream) -> None:
        self.done_step = 0
        self._service = service
        self._session = session
        self._client = client
        self._dtype = service.dtype  # of the hidden states that come
        self._given_up = -1  # all of these numbers and below are
        self._changed = trio.lowlevel.ParkingLot()
        self._count = 0
        self._sending = trio.Lock()  # one is made and sent at a time: it may be as long as a message can be

    def computed(self, step: Step) -> None:
        """A step has been computed."""
        self._dtype, self.done_step = step.hidden.dtype, step.step
        if self._count:
            self._changed.unpark_all()

    def give_up(self, step: int) -> None:
        """Drop what was asked for with numbers up to this one."""
        self._given_up = step
        self.done_step = min(self.done_step, step)
        self._changed.unpark_all()

    def start(self, request: Replay, arrived: float, nursery: trio.Nursery, lost: Callable[[], object]) -> None:
        """Answer the client when its request can be answered, in a task of its own.

        Args:
            arrived: when the request was here.
            lost: is called where the client's stream has ended.
        Raises:
            CallerError: it never can be, or too many wait.
        """
        self._service.checks.replay(self._session, request)
        if self._count >= MOST_REPLAYS:
            raise CallerError(f"a session answers {MOST_REPLAYS} replays at a time")
        self._count += 1
        nursery.start_soon(self._answer, request, arrived, lost)

    async def step(self, request: Replay) -> Step:
        """What goes on to the next server for a request with `until`, while no step of the session is computed.

        Raises:
            CallerError: the outputs are not there, or too long for one message.
        """
        self._service.checks.replay(self._session, request)
        form = self._form(request)
        output = await self._read(request, form)
        if output is None:
            raise CallerError("the session has other rows, or fewer KV entries")
        self._service.recovery.replayed_tokens += output.shape[0] * request.tokens
        return replace(form, hidden=output, keep=KEEP_NONE, reach=request.reach, until=request.until)

    async def _answer(self, request: Replay, arrived: float, lost: Callable[[], object]) -> None:
        end = request.position + request.tokens
        try:
            while request.step > self._given_up:
                done = self.done_step
                if done >= request.step and self._session.position >= end:
                    async with self._sending:
                        if request.step <= self._given_up:
                            return
                        output = await self._read(request, self._form(request))
                        if request.step <= self._given_up:
                            return
                        if output is not None:
                            self._service.recovery.replayed_tokens += output.shape[0] * request.tokens
                            await self._client.send(StepDone(request.step, end, output, held_s=trio.current_time() - arrived))
                            return
                while self.done_step == done and request.step > self._given_up:
                    await self._changed.park()
        except PeerLost:
            lost()
        except PetalnetError as error:
            with suppress(PeerLost):
                await self._client.send(Error.of(error, request.step))
        finally:
            self._count -= 1

    def _form(self, request: Replay) -> Step:
        """A step of the form that the outputs have."""
        shape = (self._session.rows, request.tokens, self._service.span.hidden_size)
        form = Step(request.step, request.position, Blob(self._dtype, shape, "raw", b""), codec=request.codec)
        if not request.until:
            return form
        return replace(form, mask=request.mask, position_ids=request.position_ids, prompts=request.prompts)

    def _read(self, request: Replay, form: Step) -> Awaitable[Blob | None]:
        """The outputs; None where the session has gone back meanwhile. Raises as `Replays.step`."""
        runner, session = self._service.runner, self._session

        def encoded() -> Blob | None:
            found = runner.outputs(session, request.position, request.position + request.tokens)
            return None if found is None or len(found) != form.hidden.shape[0] else encode_output(form, found)

        self._service.checks.replayed(form, self._client.protocol.limits.payload)
        return self._service.engine.ask(encoded)
