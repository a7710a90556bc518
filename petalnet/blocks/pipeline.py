"""A thread for each device of a span, so that all of them compute at a time, each on another round.

Rounds go from thread to thread; each thread takes what comes in that order.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from petalnet.blocks.rounds import Round

log = logging.getLogger(__name__)

WAITING = 1
"""Rounds that may be under way beyond one a device. Rounds are not alike: a short one is soon done on the first device, and the first would
be idle while that one waits for the second. More would only wait before the slowest."""


class Pipeline:
    """The threads. All methods are for the thread that began it.

    Attributes:
        under_way: rounds that were started and not taken back by `finished`.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.under_way = 0
        self._devices = list(devices)
        self._queues: list[queue.SimpleQueue[tuple[Round, int] | None]] = [queue.SimpleQueue() for _ in devices]
        self._at_first = 0  # rounds that wait for the first device, or are there; changed under the lock
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._moved: Callable[[], None]
        self._done: Callable[[Round], None]

    def begin(self, moved: Callable[[], None], done: Callable[[Round], None]) -> None:
        """Start the threads.

        Args:
            moved: called on one of them when the first device has become free.
            done: called likewise with a round whose visits were all run.
        """
        self._moved, self._done = moved, done
        self._threads = [
            threading.Thread(target=self._compute, args=(number,), name=f"petalnet-engine-{number}", daemon=True)
            for number in range(len(self._devices))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_room(self) -> bool:
        """Whether a round that begins now would run at once: those that come in meanwhile may still join a later one."""
        return self.under_way < len(self._devices) + WAITING and not self._at_first

    def start(self, begun: Round) -> None:
        """Have a round's visits run; where it has none, it is done."""
        self.under_way += 1
        if begun.devices:
            self._put(begun, 0)
        else:
            self._done(begun)

    def finished(self) -> None:
        """A round that was done has been accounted for."""
        self.under_way -= 1

    def end(self) -> None:
        """End the threads, once they have run what was started."""
        for waiting in self._queues:
            waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _put(self, begun: Round, visit: int) -> None:
        device = begun.devices[visit]
        if device == 0:
            with self._lock:
                self._at_first += 1
        self._queues[device].put((begun, visit))

    def _compute(self, number: int) -> None:
        device = self._devices[number]
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # "cuda" has no index, which is an error there
        while True:
            entry = self._queues[number].get()
            if entry is None:
                return
            begun, visit = entry
            del entry
            try:
                begun.run(visit)
                if device.type == "cuda":
                    # What was ordered has to be done: else a device would be taken to be free while it computes, and no time be true.
                    torch.cuda.current_stream(device).synchronize()
            except Exception as error:
                # A defect, or a device that has failed: it is for those to hear whose round it was, and must not end the thread.
                log.exception("a round failed on %s", device)
                begun.fail(error)
            is_done = visit + 1 == len(begun.devices)
            if not is_done:
                self._put(begun, visit + 1)
            if number == 0:
                with self._lock:
                    self._at_first -= 1
                self._moved()
            if is_done:
                self._done(begun)
            del begun  # which would otherwise stay in memory until the next one comes
