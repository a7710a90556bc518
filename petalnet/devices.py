"""Which devices of this machine a node computes on, and which of its blocks go to which. Pure.

A node is given one device ("cuda:1") or several of one kind ("cuda:0,cuda:1"), on which the blocks of its span follow one another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate


def device_names(device: str) -> list[str]:
    """The devices of a setting, in order.

    Raises:
        ValueError: with what is needed, where the text names none, devices of several kinds, or an accelerator twice.
    """
    names = [name.strip() for name in device.split(",")]
    if not all(re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) for name in names):
        raise ValueError("needs cpu, cuda, cuda:N or mps, or several such as cuda:0,cuda:1")
    if len({name.partition(":")[0] for name in names}) > 1:
        raise ValueError("needs devices of one kind")
    accelerators = ["cuda:0" if name == "cuda" else name for name in names if name != "cpu"]
    if len(set(accelerators)) < len(accelerators):
        raise ValueError("needs each device only once")
    return names


def is_several(device: str) -> bool:
    """Whether a setting names several devices."""
    return "," in device


def memory_of(devices: Sequence[str], free: Mapping[str, int], most: int | None = None) -> list[int]:
    """Bytes that each of these devices may take.

    Args:
        free: what each may take by itself, by its name; one that is named several times (a processor, in tests) is shared.
        most: a ceiling for all of them together, which is divided as what is free.
    """
    times = Counter(devices)
    each = [free[device] // times[device] for device in devices]
    if most is None:
        return each
    total = sum(each)
    return [most * one // total if total else most // len(each) for one in each]


def split_blocks(sizes: Sequence[int], memory: Sequence[int]) -> list[int]:
    """How many of consecutive blocks each device gets, in order, so that the fullest is as little filled by weights as can be: what is left
    is for the KV entries of its blocks.

    Args:
        sizes: bytes of each block's weights.
        memory: bytes that each device has for them.
    Returns:
        as many numbers as there are devices, whose sum is the number of blocks; 0 for a device that is not needed.
    """
    count, before = len(sizes), [0, *accumulate(sizes)]
    # fullest[end]: how full the fullest of the devices so far is where they have blocks [0, end); cuts: where the last one's begin.
    fullest = [0.0] + [float("inf")] * count
    cuts: list[list[int]] = []
    for bytes_there in memory:
        found, begins = fullest.copy(), list(range(count + 1))
        for end in range(count + 1):
            for begin in range(end - 1, -1, -1):
                share = (before[end] - before[begin]) / max(bytes_there, 1)
                if share >= found[end]:
                    break
                if max(share, fullest[begin]) < found[end]:
                    found[end], begins[end] = max(share, fullest[begin]), begin
        fullest = found
        cuts.append(begins)
    counts, end = [0] * len(memory), count
    for device in range(len(memory) - 1, -1, -1):
        begin = cuts[device][end]
        counts[device], end = end - begin, begin
    return counts
