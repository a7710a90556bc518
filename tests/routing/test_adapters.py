"""Which adapter is meant by a name."""

from __future__ import annotations

from typing import Any

import pytest

from petalnet.errors import CallerError
from petalnet.routing.adapters import adapter_label, having, labels_of, unknown_adapter
from petalnet.routing.records import ServerRecord


def record(number: int, *adapters: str) -> ServerRecord:
    values: dict[str, Any] = {"peer_id": "S" + "x" * number, "addrs": (), "model": "m", "model_name": "m", "span": (0, 4), "num_blocks": 4}
    return ServerRecord(**values, state="online", dtype="float32", sequence=1, issued=1.0, expires=2.0, adapters=adapters)


RECORDS = [record(1, "org/poet@0011", "tiny@aa"), record(2, "org/poet@0011"), record(3, "tiny@bb"), record(4)]


def test_a_name_and_a_label() -> None:
    assert adapter_label(RECORDS, "org/poet") == adapter_label(RECORDS, "org/poet@0011") == "org/poet@0011"
    assert adapter_label(RECORDS, "tiny@bb") == "tiny@bb"
    assert adapter_label(RECORDS, "poet") == adapter_label(RECORDS, "tiny@cc") == adapter_label([], "tiny") == ""


def test_two_adapters_of_one_name() -> None:
    with pytest.raises(CallerError, match="2 different adapters named 'tiny'; ask for one of tiny@aa, tiny@bb"):
        adapter_label(RECORDS, "tiny")


def test_who_has_it() -> None:
    assert having(RECORDS, "org/poet", "org/poet@0011") == RECORDS[:2]
    assert having(RECORDS, "poet", "") == []
    assert having(RECORDS, None, "") == RECORDS


def test_nobody_has_it() -> None:
    assert str(unknown_adapter(RECORDS, "x")) == ("no server of this model has the adapter 'x'; there are org/poet@0011, tiny@aa, tiny@bb")
    assert str(unknown_adapter(RECORDS[3:], "x")) == "no server of this model has the adapter 'x'; none has any"
    many = [record(number, f"adapter{number:02}@1") for number in range(20)]
    assert len(labels_of(many)) == 20 and str(unknown_adapter(many, "x")).endswith("adapter15@1, and 4 more")
