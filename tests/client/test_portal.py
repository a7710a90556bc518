"""The trio thread behind the synchronous API."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import trio

from petalnet.client.portal import Portal, PortalClosed, get_portal


async def double(value: int) -> int:
    await trio.lowlevel.checkpoint()
    return 2 * value


async def fail() -> None:
    raise KeyError("as expected")


def test_values_and_errors() -> None:
    portal = get_portal()
    assert portal is get_portal()
    assert portal.run(double, 4) == 8
    with pytest.raises(KeyError, match="as expected"):
        portal.run(fail)
    assert portal.run(double, 5) == 10


def test_it_cannot_wait_for_itself() -> None:
    portal = get_portal()

    async def ask() -> int:
        return portal.run(double, 4)

    with pytest.raises(RuntimeError, match="own network thread"):
        portal.run(ask)


def test_an_interrupted_wait_cancels_the_coroutine() -> None:
    portal = get_portal()
    began, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        try:
            began.set()
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.set()
            raise

    threading.Thread(target=lambda: began.wait(5) and os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        portal.run(wait)
    assert cancelled.wait(5)
    assert time.monotonic() - started < 5
    assert portal.run(double, 1) == 2


def test_after_close() -> None:
    portal = Portal()
    waiting = portal.start(trio.sleep_forever)
    portal.close()
    with pytest.raises(PortalClosed):
        waiting.result()
    with pytest.raises(PortalClosed):
        portal.run(double, 1)
    portal.close()
