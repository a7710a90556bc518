"""How often a request is tried again, after which pauses, and what is told of it in the end. On the portal's thread.

The bounds are the user's: `max_retries` for servers that fail, and for each of these half a minute of waiting where servers are full, or
where nobody holds some blocks any more; `request_timeout` at most. With `max_retries=None` there is no end, but there are pauses, and an
error that blames nobody ends it all the same: whoever is asked would answer it again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from petalnet.errors import (
    LONGEST_ANSWER,
    BusyError,
    MissingBlocksError,
    MovedError,
    PeerUnreachable,
    PetalnetError,
    ServerError,
    TooLargeError,
    describe_peers,
    one_line,
    short_id,
)

if TYPE_CHECKING:
    from petalnet.client.settings import ClientSettings

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
"""Pause before the second retry, doubled with each further one; the first retry comes at once, since it goes to other servers."""
BUSY_S_PER_RETRY = 30.0
"""How long full servers are waited for, for each retry that the settings allow."""
MISSING_PAUSE_S = 1.0
"""Between two looks for somebody who holds blocks that nobody holds any more: servers that start take seconds."""
MOST_BLAMELESS = 3
"""Failures in a row that blame nobody, after which a request is given up: nothing would be done otherwise the next time."""
MOST_LOST = 16
"""Servers that may fail at one request, each for the first time, without costing a retry where something is at stake: when a house loses
its power, several go at once."""
MOST_ANSWERS = 64
"""Peers whose answers are remembered for one request."""


class Busy(Exception):
    """A server had no room, or never will have (TooLargeError), or does not serve the blocks (MovedError); internal to the choice of a
    route."""

    def __init__(self, error: BusyError | TooLargeError, peer_id: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.peer_id = peer_id


class Attempts:
    """Who was tried for one request, and what each answered last.

    Attributes:
        answers: by peer id, in the order in which they were first asked.
    """

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}

    def note(self, peer_id: str | None, error: Exception) -> None:
        """A server, where one is to blame or is full, has answered."""
        if peer_id is not None and (peer_id in self.answers or len(self.answers) < MOST_ANSWERS):
            said = error.said if isinstance(error, ServerError) and error.said else str(error)
            line = one_line(said).removeprefix(f"peer {peer_id} ").replace(peer_id, short_id(peer_id))
            self.answers[peer_id] = line if len(line) <= LONGEST_ANSWER else line[: LONGEST_ANSWER - 1] + "…"

    def told(self, error: PetalnetError) -> PetalnetError:
        """An error that ends the request, with what everybody answered."""
        answers = {**error.answers, **self.answers}
        others = {peer_id: answer for peer_id, answer in answers.items() if peer_id != getattr(error, "peer_id", None)}
        told = error
        if isinstance(error, MissingBlocksError):
            told = MissingBlocksError(error.blocks, error.peers_asked, hint=error.hint, answers=answers)
        elif others and isinstance(error, ServerError):
            told = type(error)(f"{error}; before that {describe_peers(others)}", error.peer_id, said=error.said)
        elif len(others) > 1 and isinstance(error, BusyError):
            told = type(error)(f"{error} ({describe_peers(others)})", error.retry_after_s, error.fits_tokens)
        if told is not error:
            told.__cause__ = error
        told.answers = answers
        return told


class Patience:
    """How long full servers are waited for: `BUSY_S_PER_RETRY` for each retry that the settings allow, `request_timeout` at most."""

    def __init__(self, settings: ClientSettings) -> None:
        retries = settings.max_retries
        self._longest = settings.request_timeout if retries is None else min(settings.request_timeout, retries * BUSY_S_PER_RETRY)
        self._until: float | None = None

    async def wait(self, busy: BusyError) -> None:
        """Sleep for as long as the server said. Raises its error when that would be in vain: patience is at its end."""
        if await self.sleep(busy.retry_after_s, busy):
            return
        if not self._longest:
            raise busy
        message = f"{busy}; waited for {self._longest:g} s, which is what request_timeout and max_retries allow"
        raise type(busy)(message, busy.retry_after_s, busy.fits_tokens) from busy

    async def sleep(self, pause_s: float, why: Exception, *, is_news: bool = True) -> bool:
        """Sleep for about so long; False, at once, when patience is at its end."""
        now = trio.current_time()
        if self._until is None:
            self._until = now + self._longest
        if now >= self._until:
            return False
        pause_s = min(max(pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S, self._until - now)
        logger.log(logging.INFO if is_news else logging.DEBUG, "waiting %.1f s: %s", pause_s, why)
        await trio.sleep(pause_s)
        return True


class Full:
    """Servers that had no room, and how long they are waited for: see `Patience`."""

    def __init__(self, settings: ClientSettings) -> None:
        self._patience = Patience(settings)
        self._busy: dict[str, BusyError] = {}
        self._useless: dict[str, TooLargeError | MovedError] = {}  # those for which no waiting would help

    @property
    def peers(self) -> frozenset[str]:
        """What to do without for now."""
        return frozenset(self._busy.keys() | self._useless.keys())

    def add(self, busy: Busy) -> None:
        """One more."""
        if isinstance(busy.error, (TooLargeError, MovedError)):
            self._useless[busy.peer_id] = busy.error
        else:
            self._busy[busy.peer_id] = busy.error

    @property
    def have_moved(self) -> bool:
        """Whether all of them serve other blocks now: they are not full, and whoever comes in their place is not known yet."""
        return bool(self._useless) and not self._busy and all(isinstance(error, MovedError) for error in self._useless.values())

    def clear(self) -> None:
        """All are worth asking again."""
        self._busy.clear()
        self._useless.clear()

    async def wait(self) -> None:
        """Wait until those that may have room later are worth asking again. Raises an error of `peers` where that would be in vain."""
        if not self._busy:
            raise max(self._useless.values(), key=lambda error: isinstance(error, TooLargeError))
        await self._patience.wait(next(reversed(self._busy.values())))
        self._busy.clear()


class Retries:
    """The tries of one request to servers that fail.

    Attributes:
        attempts: who was tried.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.attempts = Attempts()
        self._settings = settings
        self._patience = Patience(settings)
        self._count = 0
        self._blameless = 0
        self._lost: set[str] = set()  # servers whose first failure cost nothing
        self._missing: MissingBlocksError | None = None  # what is waited for

    def progressed(self) -> None:
        """A part of the request is done: what follows has all its tries."""
        self._patience = Patience(self._settings)
        self._count = self._blameless = 0
        self._lost.clear()
        self._missing = None

    async def after(self, error: ServerError, *, at_stake: bool = False) -> None:
        """A server has failed: pause before the next try. Raises the error, which tells what everybody answered, where there is none.

        Args:
            at_stake: whether something was computed that would be lost: then servers that fail for the first time cost no retry.
        """
        self.attempts.note(error.peer_id, error)
        if self._missing is not None and error.peer_id is not None:  # it was asked because nobody else is there
            await self._wait_for_holder(self._missing)
            return
        # A swarm that cannot be joined may be there later; anything else that nobody is to blame for would come again.
        self._blameless = self._blameless + 1 if error.peer_id is None and not isinstance(error, PeerUnreachable) else 0
        limit = self._settings.max_retries
        if at_stake and limit and error.peer_id is not None and error.peer_id not in self._lost and len(self._lost) < MOST_LOST:
            self._lost.add(error.peer_id)
            logger.info("going on without a server: %s", error)
            return
        if (limit is not None and self._count >= limit) or self._blameless > MOST_BLAMELESS:
            raise self.attempts.told(error)
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self._count - 1, 16), LONGEST_PAUSE_S) if self._count else 0.0
        self._count += 1
        logger.info("trying again (%d): %s", self._count, error)
        await trio.sleep(pause_s)

    async def missing(self, error: MissingBlocksError, full: Full, *, at_stake: bool) -> None:
        """Nobody holds some blocks any more, or nobody who has room: wait for somebody who does.

        Args:
            full: servers that were left out.
            at_stake: whether something was computed that would be lost: then somebody who may come back is waited for.
        Raises: an error, which tells what everybody answered, where waiting would be in vain, or patience is at its end.
        """
        if full.peers and not full.have_moved:
            try:
                await full.wait()
            except (BusyError, TooLargeError) as refused:
                raise self.attempts.told(refused)  # noqa: B904  # it has its cause
            return
        if not at_stake and not full.have_moved:
            raise self.attempts.told(error)
        await self._wait_for_holder(error)
        full.clear()

    async def _wait_for_holder(self, error: MissingBlocksError) -> None:
        """Wait a moment for somebody to come back. Raises the error, which tells what everybody answered, when patience is at its end."""
        is_news, self._missing = self._missing is None, error
        if not await self._patience.sleep(MISSING_PAUSE_S, error, is_news=is_news):
            raise self.attempts.told(error)
