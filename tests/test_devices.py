"""Which blocks go to which device."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from petalnet.devices import device_names, memory_of, split_blocks


def test_names() -> None:
    assert device_names("cuda") == ["cuda"] and device_names("cuda:0, cuda:3") == ["cuda:0", "cuda:3"]
    assert device_names("cpu,cpu") == ["cpu", "cpu"]
    for wrong, match in (("tpu", "needs cpu"), ("cuda:0,", "needs cpu"), ("cuda,cpu", "of one kind"), ("mps,mps", "only once")):
        with pytest.raises(ValueError, match=match):
            device_names(wrong)
    with pytest.raises(ValueError, match="each device only once"):
        device_names("cuda,cuda:0")


def test_memory_is_shared_by_a_device_that_is_named_twice() -> None:
    assert memory_of(["cpu", "cpu"], {"cpu": 100}) == [50, 50]
    assert memory_of(["cuda:0", "cuda:1"], {"cuda:0": 30, "cuda:1": 10}) == [30, 10]
    assert memory_of(["cuda:0", "cuda:1"], {"cuda:0": 30, "cuda:1": 10}, 20) == [15, 5]
    assert memory_of(["cpu"], {"cpu": 7}, 20) == [20]


@pytest.mark.parametrize(
    ("sizes", "memory", "counts"),
    [
        ([1] * 12, [10, 10], [6, 6]),
        ([1] * 12, [30, 10], [9, 3]),
        ([1] * 10, [10, 20, 30, 40], [1, 2, 3, 4]),
        ([5, 1, 1, 1, 1, 1], [9, 9], [1, 5]),
        ([1], [10, 10], [1, 0]),
        ([1, 1, 1], [100, 1], [3, 0]),
        ([1, 1], [0, 0], [1, 1]),
    ],
)
def test_blocks_go_where_memory_is(sizes: list[int], memory: list[int], counts: list[int]) -> None:
    assert split_blocks(sizes, memory) == counts


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.lists(st.integers(1, 200), min_size=1, max_size=3))
def test_no_other_way_leaves_the_fullest_less_full(sizes: list[int], memory: list[int]) -> None:
    def fullest(counts: list[int]) -> float:
        shares, start = [], 0
        for count, there in zip(counts, memory, strict=True):
            shares.append(sum(sizes[start : start + count]) / there)
            start += count
        return max(shares)

    def ways(left: int, devices: int) -> list[list[int]]:
        if devices == 1:
            return [[left]]
        return [[count, *rest] for count in range(left + 1) for rest in ways(left - count, devices - 1)]

    counts = split_blocks(sizes, memory)
    assert sum(counts) == len(sizes)
    assert fullest(counts) == pytest.approx(min(map(fullest, ways(len(sizes), len(memory)))))
