"""What the local web side answers: `GET /health` and `GET /status`, both JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

Report = Callable[[], dict[str, Any]]


def make_app(health: Report, status: Report, *, hosts: list[str]) -> Starlette:
    """The application.

    Args:
        health: what /health answers; its "usable" decides between the status codes 200 and 503.
        status: what /status answers.
        hosts: names by which the node may be called. A page in a browser that had its own host name resolve to this machine cannot
            read the answers, because its requests carry that name.
    """

    async def get_health(request: Request) -> JSONResponse:
        report = health()
        return JSONResponse(report, status_code=200 if report["usable"] else 503)

    async def get_status(request: Request) -> JSONResponse:
        return JSONResponse(status())

    return Starlette(
        routes=[Route("/health", get_health), Route("/status", get_status)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
    )
