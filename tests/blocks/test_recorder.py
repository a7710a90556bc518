"""What is asked of CUDA around a capture, and in which order. There is no GPU here: what torch has for it is replaced by what notes calls,
with the signatures that torch has."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from petalnet.blocks.recorder import CudaRecorder

GRAPH = inspect.signature(torch.cuda.graph.__init__)


class Cuda:
    """In place of `torch.cuda`.

    Attributes:
        events: what was done.
        fails_at: the run, of all, that raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.runs = 0
        self.fails_at: int | None = None
        self.mode = 0
        self.free = 10_000
        self.current = "usual"
        cuda = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                pass

            def wait_stream(self, stream: object) -> None:
                cuda.events.append("wait for the usual stream")

        @contextlib.contextmanager
        def stream(one: object) -> Iterator[None]:
            before, cuda.current = cuda.current, "side"
            try:
                yield
            finally:
                cuda.current = before

        @contextlib.contextmanager
        def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
            given = GRAPH.bind(None, *args, **kwargs).arguments
            assert given["pool"] == "pool"
            assert given["capture_error_mode"] == "thread_local"
            cuda.events.append("begin")
            yield
            cuda.free -= 1_000
            cuda.events.append("end")

        class Graph:
            def replay(self) -> None:
                cuda.events.append("replay")

        def set_mode(mode: Any) -> None:
            cuda.mode = mode

        for name, replacement in {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": Stream,
            "stream": stream,
            "graph": graph,
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda: "usual",
            "synchronize": lambda: cuda.events.append("synchronize"),
            "empty_cache": lambda: cuda.events.append("empty"),
            "mem_get_info": lambda: (cuda.free, 100_000),
            "get_sync_debug_mode": lambda: cuda.mode,
            "set_sync_debug_mode": set_mode,
        }.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, replacement)

    def run(self) -> None:
        self.runs += 1
        assert self.current == "side"
        if self.runs == self.fails_at:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.events.append("run" if self.mode == 0 else "rehearse")


def test_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda:1"))
    recording = recorder.record(cuda.run)
    assert cuda.events == [
        *["wait for the usual stream", "run", "run", "rehearse", "synchronize", "empty", "begin", "run", "end", "synchronize"]
    ]
    assert recording.nbytes == 1_000
    assert (cuda.current, cuda.mode) == ("usual", 0)
    recording.replay()
    assert cuda.events[-1] == "replay"
    cuda.events.clear()
    recorder.record(cuda.run)  # which is rehearsed no more: others may use CUDA by then
    assert cuda.events == ["wait for the usual stream", "run", "run", "synchronize", "empty", "begin", "run", "end", "synchronize"]


@pytest.mark.parametrize("run", [1, 3, 4])
def test_a_capture_that_fails_leaves_everything_as_it_was(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    cuda.fails_at = run
    recorder = CudaRecorder(torch.device("cuda:1"))
    with pytest.raises(RuntimeError, match="synchronizing"):
        recorder.record(cuda.run)
    assert (cuda.current, cuda.mode) == ("usual", 0)
    assert ("begin" in cuda.events) == (run == 4)
    recorder.record(cuda.run)
