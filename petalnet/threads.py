"""Blocking work beside a trio loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run blocking work on a thread of its own; cancellation does not wait for it."""
    return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)
