"""Which servers a client uses by the precision that they compute in."""

from __future__ import annotations

from collections.abc import Callable

from petalnet.routing.precision import ANY, Precisions, describe_precision
from petalnet.routing.records import ServerRecord


def test_servers_of_other_precisions_are_left_out(record: Callable[..., ServerRecord]) -> None:
    exact = record("A")
    half, small = record("B", dtype="bfloat16"), record("C", dtype="bfloat16", quantization="nf4")
    records = [exact, half, small]
    assert ANY.of(records) == records
    assert Precisions(quantizations=frozenset({"none"})).of(records) == [exact, half]
    assert Precisions(quantizations=frozenset({"int8", "nf4"})).of(records) == [small]
    assert Precisions(dtypes=frozenset({"bfloat16"})).of(records) == [half, small]
    assert Precisions(frozenset({"bfloat16"}), frozenset({"none"})).of(records) == [half]


def test_why_blocks_have_no_server(record: Callable[..., ServerRecord]) -> None:
    records = [record("A", (0, 4)), record("B", (4, 8), quantization="nf4"), record("C", (4, 12), dtype="bfloat16", quantization="int8")]
    wanted = Precisions(quantizations=frozenset({"none"}))
    assert wanted.hint(records, [4, 5]) == (
        "there are servers that compute in bfloat16/int8 or float32/nf4, which quantization=none leaves out"
    )
    assert wanted.hint(records, [2]) == ANY.hint(records, [4]) == ""
    both = Precisions(frozenset({"float16", "float32"}), frozenset({"none"}))
    assert both.hint(records, [11]).endswith("bfloat16/int8, which server_dtype=float16 or float32 and quantization=none leaves out")


def test_what_people_are_told() -> None:
    assert (describe_precision("float32", "none"), describe_precision("bfloat16", "nf4")) == ("float32", "bfloat16/nf4")
