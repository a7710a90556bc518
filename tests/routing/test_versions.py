from __future__ import annotations

from collections.abc import Callable

from petalnet.routing.records import ServerRecord
from petalnet.routing.versions import MAX_VERSIONS, versions

Build = Callable[..., ServerRecord]

X, Y, Z = "aa" * 16, "bb" * 16, "cc" * 16


def names(found: list[list[ServerRecord]]) -> list[str]:
    return ["".join(sorted(record.peer_id for record in version)) for version in found]


def holder(record: Build, peer: str, first: int, digests: str) -> ServerRecord:
    """A server of the blocks from `first`, one for each letter of `digests`."""
    listed = tuple({"X": X, "Y": Y, "Z": Z}[letter] for letter in digests)
    return record(peer, span=(first, first + len(digests)), block_digests=listed)


def test_all_belong_together_where_nobody_disagrees(record: Build) -> None:
    assert names(versions([holder(record, "A", 0, "XX"), holder(record, "B", 2, "YY"), record("C", span=(0, 4))])) == ["ABC"]
    assert names(versions([])) == [""]


def test_the_version_of_most_servers_comes_first(record: Build) -> None:
    servers = [holder(record, "A", 0, "YY"), holder(record, "B", 0, "XX"), holder(record, "C", 0, "XX")]
    assert names(versions(servers)) == ["BC", "A"]


def test_servers_that_do_not_say_what_they_hold_are_used_only_where_all_agree(record: Build) -> None:
    servers = [holder(record, "A", 0, "XX"), holder(record, "B", 0, "XY"), record("C", span=(0, 1)), record("D", span=(1, 2))]
    assert names(versions(servers)) == ["AC", "BC"]


def test_shared_blocks_serve_both_versions(record: Build) -> None:
    servers = [holder(record, "A", 0, "XXXX"), holder(record, "B", 0, "XXYY"), holder(record, "C", 0, "XX")]
    assert names(versions(servers)) == ["AC", "BC"]


def test_agreement_about_a_contested_block_chains_servers(record: Build) -> None:
    chained = [holder(record, "A", 0, "XX"), holder(record, "B", 1, "XX"), holder(record, "C", 2, "XX")]
    assert names(versions([*chained, holder(record, "D", 0, "YYYY")])) == ["ABC", "D"]


def test_halves_that_nothing_joins_stay_apart(record: Build) -> None:
    servers = [holder(record, "A", 0, "X"), holder(record, "B", 1, "X"), holder(record, "C", 0, "Y"), holder(record, "D", 1, "Y")]
    assert sorted(names(versions(servers))) == ["A", "B", "C", "D"]


def test_a_server_that_claims_half_of_each_cannot_join_what_disagrees(record: Build) -> None:
    servers = [holder(record, peer, 0, "XXX") for peer in "AB"] + [holder(record, peer, 0, "YYY") for peer in "CD"]
    found = versions([*servers, holder(record, "E", 0, "XYX")])
    assert names(found) == ["AB", "CD", "E"]


def test_what_was_asked_for_leaves_others_out(record: Build) -> None:
    servers = [holder(record, "A", 0, "XX"), holder(record, "B", 0, "YY"), holder(record, "C", 0, "Y"), record("D", span=(0, 2))]
    assert names(versions(servers, expected={0: Y + "00", 1: Y})) == ["BCD"]
    assert names(versions(servers, expected={1: X})) == ["A", "C"]


def test_made_up_digests_are_bounded(record: Build) -> None:
    servers = [record("P" + "x" * n, block_digests=(f"{n:032x}",) * 4) for n in range(3 * MAX_VERSIONS)]
    honest = [holder(record, peer, 0, "XXXX") for peer in "AB"]
    found = versions([*servers, *honest])
    assert len(found) == MAX_VERSIONS and names(found)[0] == "AB"
