"""Captures passes as CUDA graphs.

A graph is a list of kernels with their arguments, addresses among them. What it replays must not have waited for the device, nor have taken
memory that others get later: graphs take theirs from a pool of their own, which those of one span share, since they run one after the
other and leave their results in buffers outside of it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UPS = 2
"""Runs before a capture, in which libraries load kernels and take the memory that they keep."""

_RECORDING = threading.Lock()
"""A process may capture one graph at a time; spans on several devices run on several threads."""


@dataclass(frozen=True)
class CudaRecording:
    """A CUDA graph. It may be replayed on any stream, though not while it runs on another."""

    graph: torch.cuda.CUDAGraph
    nbytes: int

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Captures what runs on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rehearsed = False
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> CudaRecording:
        """Capture a function. The first that this recorder is given is rehearsed, and nothing else may use CUDA meanwhile.

        Raises:
            RuntimeError, torch.OutOfMemoryError: it waits for the device or does other things that cannot be captured, or memory is short.
        """
        with _RECORDING, torch.cuda.device(self._device):
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            # Graphs cannot be captured on the usual stream. Torch does not go back to that where capturing fails; this context does.
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    run()
                if not self._rehearsed:
                    self._rehearse(run)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                free, _ = torch.cuda.mem_get_info()
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on with what they do, which capturing in the default mode would take for errors of its own.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    run()
                torch.cuda.synchronize()
                left, _ = torch.cuda.mem_get_info()
            return CudaRecording(graph, max(free - left, 0))

    def _rehearse(self, run: Callable[[], None]) -> None:
        """Run a function, so that waiting for the device is an error: one that fails in the midst of a capture leaves torch's allocator
        with memory that it never gives back."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        self._rehearsed = True
