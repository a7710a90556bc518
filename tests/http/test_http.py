"""The local web side over a real socket."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio

from petalnet.errors import AddressInUse, UsageError
from petalnet.http.app import make_app
from petalnet.http.server import bind, run_http, url_of


@asynccontextmanager
async def serving(health: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    opened = bind("127.0.0.1", [0])
    url = url_of(opened)
    app = make_app(lambda: health, lambda: {"models": []}, hosts=["127.0.0.1", "localhost"])
    async with trio.open_nursery() as nursery:
        await nursery.start(run_http, app, opened)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            yield client
        nursery.cancel_scope.cancel()


async def test_health_and_status() -> None:
    async with serving({"usable": True, "peer_id": "x"}) as client:
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"usable": True, "peer_id": "x"})
        answer = await client.get("/status")
        assert (answer.status_code, answer.json()) == (200, {"models": []})


async def test_a_node_that_is_not_usable_answers_503() -> None:
    async with serving({"usable": False}) as client:
        assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize(("path", "method", "status"), [("/", "GET", 404), ("/status", "POST", 405), ("/status/x", "GET", 404)])
async def test_what_is_not_there(path: str, method: str, status: int) -> None:
    async with serving({"usable": True}) as client:
        assert (await client.request(method, path)).status_code == status


async def test_a_request_under_a_strange_host_name_is_refused() -> None:
    async with serving({"usable": True}) as client:
        assert (await client.get("/status", headers={"host": "rebound.example.com"})).status_code == 400


async def test_garbage_ends_only_its_own_connection() -> None:
    async with serving({"usable": True}) as client:
        stream = await trio.open_tcp_stream(client.base_url.host, client.base_url.port)
        async with stream:
            await stream.send_all(b"\x00\xff" * 40_000)
            with trio.fail_after(5):
                while await stream.receive_some():
                    pass
        assert (await client.get("/health")).status_code == 200


def test_the_next_free_port_is_taken() -> None:
    with bind("127.0.0.1", [0]) as first:
        port = first.getsockname()[1]
        with pytest.raises(AddressInUse, match=str(port)):
            bind("127.0.0.1", [port])
        with bind("127.0.0.1", [port, 0]) as second:
            assert second.getsockname()[1] != port


def test_an_address_of_nobody() -> None:
    with pytest.raises(UsageError, match="no-such-host"):
        bind("no-such-host.invalid", [1])
    with pytest.raises(UsageError, match="192.0.2.1"):
        bind("192.0.2.1", [31331])


def test_urls() -> None:
    with bind("127.0.0.1", [0]) as opened:
        assert url_of(opened) == f"http://127.0.0.1:{opened.getsockname()[1]}"
    if socket.has_ipv6:
        try:
            opened = bind("::1", [0])
        except UsageError:
            pytest.skip("no IPv6 on this machine")
        with opened:
            assert url_of(opened) == f"http://[::1]:{opened.getsockname()[1]}"
