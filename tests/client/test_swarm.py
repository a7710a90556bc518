"""A client's view of its swarm: when servers are looked for, and what keeps one in the routes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petalnet.client.swarm import LOOK_AGAIN_S, SETTLE_S, THERE_WITHIN_S, Membership
from petalnet.client.trace import HopTimes, StepTimes
from petalnet.errors import MissingBlocksError, PeerUnreachable, ServerError
from petalnet.p2p.access import Access
from petalnet.routing.precision import Precisions
from petalnet.routing.records import ServerRecord
from petalnet.routing.swarm import FIRST_LAST_RESORT, SwarmView

MODEL = "ab" * 32


class Peering:
    """What a membership needs of a swarm: look-ups that bring what is in `unheard_of`, and connections that fail."""

    def __init__(self) -> None:
        self.host = self
        self.view = SwarmView()
        self.unheard_of: list[ServerRecord] = []
        self.look_ups = 0
        self.failure: Exception | None = None
        self.trips = {"near": 0.001}
        self.ips: dict[str, str] = {}

    async def look_up(self, model: str, *, thorough: bool = False) -> None:
        await trio.sleep(0.01)
        self.look_ups += 1
        if self.failure is not None:
            raise self.failure
        while self.unheard_of:
            self.view.add(self.unheard_of.pop(), now=time.time())

    def connected_peers(self) -> list[str]:
        return []

    def is_connected(self, peer_id: str) -> bool:
        return peer_id in self.trips

    def round_trip_s(self, peer_id: str) -> float | None:
        return self.trips.get(peer_id)

    def remote_ip(self, peer_id: str) -> str | None:
        return self.ips.get(peer_id)

    async def connect(self, peer_id: str, addrs: Any, timeout_s: float) -> None:
        raise PeerUnreachable(f"peer {peer_id} did not answer within {timeout_s:g} s", peer_id)


def record(peer_id: str, span: tuple[int, int] = (0, 4)) -> ServerRecord:
    now = time.time()
    return ServerRecord(
        peer_id=peer_id, addrs=(f"/ip4/127.0.0.1/tcp/4001/p2p/{peer_id}",), model=MODEL, model_name="tiny", span=span, num_blocks=4,
        state="online", dtype="float32", sequence=1, issued=now, expires=now + 600,
    )  # fmt: skip


async def join(nursery: trio.Nursery, *known: ServerRecord, joined_s_ago: float = SETTLE_S + 1) -> tuple[Membership, Peering]:
    peering = Peering()
    for one in known:
        peering.view.add(one, now=time.time())
    membership = Membership([], Access())
    membership._peering, membership._nursery = peering, nursery  # type: ignore[assignment]
    membership._joined_at = trio.current_time() - joined_s_ago
    membership._over.set()
    return membership, peering


def test_a_connection_ahead_of_need_that_fails_takes_nobody_out_of_the_routes() -> None:
    """Under load a newcomer's first connections were late, and it saw blocks that nobody had."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, peering = await join(nursery)
            peering.unheard_of = [record("far"), record("near")]
            await membership.look_up(MODEL)
            await trio.testing.wait_all_tasks_blocked()
            assert not membership._warming
            assert [peering.view.on_probation(peer_id) for peer_id in ("far", "near")] == [False, False]
            # It counts as one that was never measured: behind whoever answers, and there where nobody else is.
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["near"]
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4, blocked={"near"})] == ["far"]

    trio.run(main)


def test_who_is_not_there_soon_is_not_waited_for_where_others_are() -> None:
    """Dead servers of which there are still records, all of which say more than is true; each address swallows what it is sent."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ghosts = [replace(record(f"ghost{letter}"), decode_tokens_s=1e6) for letter in "abc"]
            membership, peering = await join(nursery, replace(record("near"), decode_tokens_s=0.1), *ghosts)

            async def connect(peer_id: str, addrs: Any, timeout_s: float) -> None:
                await trio.sleep(timeout_s)
                raise PeerUnreachable("silence", peer_id)

            peering.connect = connect  # type: ignore[method-assign]
            await membership.look_up(MODEL)
            began = trio.current_time()
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["near"]
            assert trio.current_time() - began == pytest.approx(THERE_WITHIN_S)
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["near"]
            (ghost,) = await membership.route(MODEL, 0, 4, blocked={"near"})
            assert ghost.peer_id.startswith("ghost") and trio.current_time() - began == pytest.approx(THERE_WITHIN_S)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_server_that_failed_is_asked_again_soon_where_nobody_else_is_there() -> None:
    """And never where somebody is, late though that one may be."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, peering = await join(nursery, record("near"))
            membership.mark_failed("near")
            with pytest.raises(MissingBlocksError) as caught:
                await membership.route(MODEL, 0, 4)
            assert caught.value.answers.keys() == {"near"}
            peering.view.forget("near")
            peering.view.add(record("near"), now=time.time())
            peering.view.mark_failed("near", now=time.time() - FIRST_LAST_RESORT)
            assert peering.view.failed_until("near", now=time.time()) is not None
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["near"]
            peering.view.add(record("tardy"), now=time.time())
            membership.mark_late("tardy")
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["tardy"]

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("joined_s_ago", [0.1, SETTLE_S + 1])
def test_a_client_that_knows_only_a_full_server_looks_once_for_others(joined_s_ago: float) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, peering = await join(nursery, record("busy"), joined_s_ago=joined_s_ago)
            peering.unheard_of = [record("roomy")]
            hops = await membership.route(MODEL, 0, 4, blocked={"busy"}, look=False)
            assert [hop.peer_id for hop in hops] == ["roomy"]
            with pytest.raises(MissingBlocksError):
                await membership.route(MODEL, 0, 4, blocked={"busy", "roomy"}, look=False)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_full_servers_are_no_reason_to_look_all_the_time() -> None:
    """Whoever waits for room comes by again and again."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, peering = await join(nursery, record("busy"))
            for _ in range(10):
                with pytest.raises(MissingBlocksError):
                    await membership.route(MODEL, 0, 4, blocked={"busy"}, look=False)
            assert peering.look_ups == 1
            await trio.sleep(LOOK_AGAIN_S + 0.1)
            with pytest.raises(MissingBlocksError):
                await membership.route(MODEL, 0, 4, blocked={"busy"}, look=False)
            assert peering.look_ups == 2

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_look_up_that_fails_does_not_hide_that_servers_are_full() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, peering = await join(nursery, record("busy"))
            peering.failure = ServerError("nobody answered")
            with pytest.raises(MissingBlocksError):
                await membership.route(MODEL, 0, 4, blocked={"busy"}, look=False)
            with pytest.raises(ServerError):
                await membership.route(MODEL, 0, 4, blocked={"busy"})

    trio.run(main, clock=MockClock(autojump_threshold=0))


def other(peer_id: str, **changes: Any) -> ServerRecord:
    return replace(record(peer_id), decode_tokens_s=100.0, **changes)


def test_what_steps_took_changes_the_next_route() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, _ = await join(nursery, other("quick"), other("true"))
            membership.host.trips.update({"quick": 0.001, "true": 0.002})
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["quick"]
            for _ in range(20):
                membership.observe("quick", tokens=1, blocks=4, compute_s=0.2, queue_s=0.0)
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["true"]
            membership.observe("nobody", tokens=1, blocks=4, compute_s=0.2, queue_s=0.0)
            await trio.sleep(600)
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["quick"], "it is forgiven"

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_server_that_says_little_of_what_it_takes_is_found_out_by_the_clients_clock() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, _ = await join(nursery, other("fraud"), other("true"))
            membership.host.trips.update({"fraud": 0.001, "true": 0.002})
            times = HopTimes("fraud", 0, 4, 0.0, 0.001, 0.001, False)
            for _ in range(8):
                membership.observe_step(StepTimes(1, 1, 0.3, (times,)))
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["true"]
            # Of an honest chain nothing is left over.
            for _ in range(50):
                times = HopTimes("true", 0, 4, 0.0, 0.010, 0.0105, False)
                membership.observe_step(StepTimes(1, 1, 0.016, (times,)))
            membership.outlook([])  # counts what was noted so far
            speed = membership.observed.speed(other("true"), "decode", trio.current_time())
            assert speed.block_s == pytest.approx(0.0025) and speed.seen

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_session_is_led_to_servers_with_room_and_a_lost_one_is_replaced_by_its_like() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, _ = await join(nursery, other("crowded"), other("roomy", free_kv_tokens=4096), other("short", dtype="float16"))
            membership.host.trips.update({"crowded": 0.001, "roomy": 0.01, "short": 0.005})
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["crowded"]
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4, kv_tokens=2048)] == ["roomy"]
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4, like=[other("x", dtype="float16")])] == ["short"]
            with pytest.raises(MissingBlocksError):
                await membership.route(MODEL, 0, 4, like=[other("x", dtype="bfloat16")])

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_users_own_server_goes_first() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            membership, _ = await join(nursery, other("mine"), replace(record("theirs"), decode_tokens_s=150.0))
            membership.host.trips.update({"mine": 0.001, "theirs": 0.001})
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["theirs"]
            membership.host.ips["mine"] = "127.0.0.1"
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["mine"], "though it is a little slower"

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_servers_of_other_precisions_are_as_if_they_were_not_there() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            quantized = replace(record("near"), quantization="nf4", decode_tokens_s=100.0)
            membership, peering = await join(nursery, quantized, replace(record("exact"), decode_tokens_s=1.0))
            peering.trips["exact"] = 0.1
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4)] == ["near"]
            exact = Precisions(quantizations=frozenset({"none"}))
            assert [hop.peer_id for hop in await membership.route(MODEL, 0, 4, precisions=exact)] == ["exact"]
            with pytest.raises(MissingBlocksError, match="servers that compute in float32/nf4, which quantization=none leaves out"):
                await membership.route(MODEL, 0, 4, precisions=exact, blocked={"exact"})
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
