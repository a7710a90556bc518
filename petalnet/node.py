"""A node: the one place that knows all parts and puts them together for the role that was asked for.

A server is a peering and a `Server`; a client daemon is a peering, the local web side and the state file by which programs on this
machine find the swarm; a bootstrap node is a peering alone. The first SIGINT or SIGTERM drains, a second one ends at once; `petalnet drain`
is as good as a first one.
"""

from __future__ import annotations

import gc
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterable, Iterable
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from petalnet.config import DEFAULT_HTTP_PORT, Settings, access_of, client_state_path, config_path, read_client_state
from petalnet.errors import NoSwarmError, UsageError
from petalnet.inspection import serve_inspection
from petalnet.overview import describe_swarm
from petalnet.p2p.access import Access
from petalnet.state import KeptFile, claim_identity_path, remove_own_json, require_writable, write_json
from petalnet.threads import in_thread
from petalnet.version import __version__

if TYPE_CHECKING:
    from petalnet.models.manifest import Manifest
    from petalnet.peering import Peering
    from petalnet.remembering import PeerFile
    from petalnet.serving import Model, Server

logger = logging.getLogger(__name__)

HTTP_PORTS_TRIED = 20
MOST_STATE_PEERS = 8
"""How many servers' addresses the client daemon leaves in its state file, beside the bootstrap peers."""
MODEL_WITHIN_S = 5.0
"""How long a newcomer looks for the model of its swarm: on a busy machine the first look-up may go unanswered."""
STATE_EVERY_S = 5.0
DEMO_NAME = "petalnet-demo"
"""What the model that ships in the package is announced as where nobody named it."""


async def run_node(settings: Settings, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Run a node until a signal ends it; started once it is usable.

    Raises:
        PetalnetError: it could not start; the message is one line for the person who started it.
    """
    await Node(settings).run(task_status=task_status)


class Node:
    """See the module's docstring.

    Attributes:
        role: "server", "client" or "bootstrap".
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.role = "server" if settings.serve is not None else "client" if settings.client else "bootstrap"
        self._initial_peers: list[str] = []
        self._access = Access()
        self._files: list[Path] = []
        self._http_url: str | None = None
        self._usable = False
        self._stopping = trio.Event()
        self._role = trio.CancelScope()
        self._waits = {"sessions": 0, "within_s": 0.0}
        self._peering: Peering
        self._peer_file: PeerFile
        self._server: Server | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start, be usable, and leave in good order at the first signal."""
        try:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async with trio.open_nursery() as nursery:
                    # Only the role is cancelled by a first signal that comes early: the watcher has to live on to see a second one.
                    nursery.start_soon(self._watch_signals, signals)
                    with self._role:
                        await self._run_role(task_status)
                    nursery.cancel_scope.cancel()
        finally:
            self._remove_files()
        logger.info("stopped")

    async def _watch_signals(self, signals: AsyncIterable[int]) -> None:
        async for number in signals:
            if self._stopping.is_set():
                self._remove_files()
                _print(())
                os._exit(128 + number)
            self._stop("told to stop")

    def _stop(self, why: str) -> None:
        """Begin to leave in good order."""
        if self._usable and self._server is not None:
            sessions, within_s = self._server.sessions, self._settings.drain_time
            self._waits = {"sessions": sessions, "within_s": within_s}
            plural = "s have" if sessions != 1 else " has"
            waits = f": no new sessions; {sessions} running one{plural} up to {within_s:g} s to move to other servers or to end"
        else:
            waits = ""
        logger.info("%s%s (a signal, such as Ctrl-C, from now on ends this node at once)", why, waits)
        self._stopping.set()
        if not self._usable:  # there is nothing to drain yet
            self._role.cancel()

    def _drain_on_request(self) -> dict[str, Any]:
        """What `petalnet drain` does to this node, and what it is told: how many sessions are waited for, and for how many seconds."""
        if not self._stopping.is_set():
            self._stop("told to stop by `petalnet drain`")
        return self._waits

    async def _run_role(self, task_status: trio.TaskStatus[None]) -> None:
        from petalnet.p2p.addresses import read_peer_list

        settings = self._settings
        if settings.ready_file is not None:
            require_writable(settings.ready_file)
        self._initial_peers = read_peer_list(settings.initial_peers)
        self._access = access_of(settings)
        if self.role == "client" and not self._initial_peers:
            raise NoSwarmError(
                "a client daemon needs a swarm to join: say --initial-peers MADDR (or @FILE), set PETALNET_INITIAL_PEERS, or put "
                f"initial_peers into {config_path()}"
            )
        async with AsyncExitStack() as stack:
            opening = await stack.enter_async_context(trio.open_nursery())
            stack.callback(opening.cancel_scope.cancel)
            model = _Opening(settings)
            if self.role == "server":  # beside the joining: the imports alone take seconds
                opening.start_soon(model.import_libraries)
                if settings.model is not None or not self._initial_peers:
                    opening.start_soon(model.open, settings.model)
            await self._join(stack)
            services = await stack.enter_async_context(trio.open_nursery())
            stack.callback(services.cancel_scope.cancel)
            await services.start(partial(serve_inspection, drain=self._drain_on_request), self._describe_peers)
            if self.role == "server":
                await self._serve(services, opening, model)
            else:
                await self._peering.look_up()
                services.start_soon(self._peering.keep_fresh)
            services.start_soon(self._peer_file.keep)
            await self._start_http(services)
            if self.role == "client":
                await services.start(self._keep_state)
                logger.info("joined the swarm; Python programs and `petalnet status` of this user find it without being told its peers")
            # Off since the program began, see `petalnet.cli.main`. What was imported and loaded stays: it need not be looked at again.
            gc.freeze()
            gc.enable()
            self._tell_ready()
            self._usable = True
            task_status.started()
            await self._stopping.wait()
            self._usable = False
            self._remove_files()
            if self._server is not None:
                await self._server.drain(self._settings.drain_time)
            self._peer_file.store()

    async def _join(self, stack: AsyncExitStack) -> None:
        from petalnet.p2p.identity import Identity
        from petalnet.p2p.protocols import Limits
        from petalnet.peering import open_peering
        from petalnet.remembering import PeerFile

        settings = self._settings
        if self._access.swarm_key is not None:
            logger.info("private swarm, key %s: only nodes with the same key can connect", self._access.swarm_key.fingerprint)
        path = settings.identity_path or stack.enter_context(claim_identity_path(settings.public_name or self.role))
        identity = Identity.load_or_create(path)
        key = self._access.swarm_key
        self._peer_file = peer_file = PeerFile(path, self._initial_peers, None if key is None else key.fingerprint)
        if not settings.new_swarm:
            peer_file.load()
        self._peering = await stack.enter_async_context(
            open_peering(
                identity,
                initial_peers=self._initial_peers,
                listen=settings.host_maddrs or None,
                announce=settings.announce_maddrs,
                server=self.role != "client",
                relay=self._settings.relay,
                must_join=self.role != "bootstrap",
                access=self._access,
                limits=Limits() if settings.max_connections is None else Limits(max_connections=settings.max_connections),
                known=peer_file.known,
            )
        )

    async def _serve(self, services: trio.Nursery, opening: trio.Nursery, model: _Opening) -> None:
        from petalnet.serving import Server

        if self._settings.model is None and self._initial_peers:
            key, name = await self._model_of_swarm()
            manifest = None if name is None else await model.find_manifest(self._peering, key)
            if name is not None and manifest is None:
                logger.info("no server here shares all of %s (--share-weights yes would): looking for it on the hub", name)
            opening.start_soon(model.open, name, manifest)
            if (await model.wait()).key != key:
                raise UsageError(f"this swarm serves {name or 'the demo model'}, but with other weights than are here: name the MODEL")
        self._server = Server(self._settings, self._peering, await model.wait())
        await services.start(self._server.run)

    async def _model_of_swarm(self) -> tuple[str, str | None]:
        """Key and name of the only model that the swarm serves; the name is None for the model that ships in the package."""
        from petalnet.models.checkpoint import DEMO_MODEL

        until = trio.current_time() + MODEL_WITHIN_S
        while True:
            await self._peering.look_up()
            models = self._peering.view.models(now=time.time())
            if models or trio.current_time() > until:
                break
            await trio.sleep(0.5)
        if len(models) != 1:
            served = ", ".join(sorted(summary.model_name for summary in models))
            raise UsageError(f"this swarm serves {'several models, name one: ' + served if models else 'no model yet: name the MODEL'}")
        name = models[0].model_name
        logger.info("the swarm serves %s", name)
        return models[0].model, None if name in (DEMO_NAME, DEMO_MODEL.name) else name

    async def _start_http(self, services: trio.Nursery) -> None:
        wanted = self._settings.http
        if wanted == "none" or (wanted is None and self.role != "client"):
            return
        from petalnet.http.app import make_app
        from petalnet.http.server import bind, run_http, url_of

        if wanted is None:
            opened = bind("127.0.0.1", range(DEFAULT_HTTP_PORT, DEFAULT_HTTP_PORT + HTTP_PORTS_TRIED))
            if opened.getsockname()[1] != DEFAULT_HTTP_PORT:
                logger.info("HTTP port %d is taken; using %d", DEFAULT_HTTP_PORT, opened.getsockname()[1])
        else:
            opened = bind(wanted[0], [wanted[1]])
        self._http_url = url_of(opened)
        host = opened.getsockname()[0]
        names = ["127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host] if host not in ("0.0.0.0", "::") else ["*"]
        await services.start(run_http, make_app(self._health, self._status, hosts=names), opened)

    def _health(self) -> dict[str, Any]:
        return {"usable": self._usable, "role": self.role, "peer_id": self._peering.host.peer_id, "version": __version__}

    def _status(self) -> dict[str, Any]:
        host, reachability = self._peering.host, self._peering.reachability
        node = self._health() | {
            "addrs": host.addrs,
            "connected_peers": len(host.connected_peers()),
            "reachability": None if reachability is None else reachability.verdict.state,
            "relays": [] if reachability is None else reachability.relays,
        }
        return {"node": node, **describe_swarm(self._peering.view, now=time.time())}

    def _describe_peers(self) -> dict[str, Any]:
        """What `petalnet peers` shows of this node."""
        peers = []
        for status in self._peering.host.peers():
            record = self._peering.view.record(status.peer_id)
            serves = {} if record is None else {"public_name": record.public_name, "model": record.model_name, "span": list(record.span)}
            peers.append({"public_name": None, "model": None, "span": None, **serves, **asdict(status)})
        key = self._access.swarm_key
        return {
            **self._health(),
            "pid": os.getpid(),
            "public_name": self._settings.public_name,
            "addrs": self._peering.host.addrs,
            "swarm_key": None if key is None else key.fingerprint,
            "engine": None if self._server is None or not self._usable else self._server.describe(),
            "weights": None if self._server is None else self._server.supply.describe(),
            "peers": peers,
        }

    async def _keep_state(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the state file true by which clients on this machine find the swarm, until cancelled."""
        path = client_state_path()
        self._files.append(path)
        other = read_client_state()
        if other is not None and other["pid"] != os.getpid():
            logger.warning("another client daemon runs on this machine (pid %s); programs here will use this one's swarm", other["pid"])
        file = KeptFile(path, "programs on this machine may not find the swarm through this daemon")
        written: dict[str, Any] = {}
        key = self._access.swarm_key
        while True:
            host, view = self._peering.host, self._peering.view
            servers = [f"{addr}/p2p/{record.peer_id}" for record in view.servers(now=time.time()) for addr in record.addrs[:1]]
            state = {
                "pid": os.getpid(),
                "peer_id": host.peer_id,
                "addrs": host.addrs,
                "initial_peers": list(dict.fromkeys([*self._initial_peers, *servers[:MOST_STATE_PEERS]])),
                "swarm_key": None if key is None or key.path is None else str(key.path),  # never the key itself
                "http": self._http_url,
            }
            # A daemon that was started later took the file over, and took it away when it ended: then it is ours again.
            if (state != written or read_client_state() is None) and file.write(state):
                written = state
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await trio.sleep(STATE_EVERY_S)

    def _tell_ready(self) -> None:
        """The lines on standard output and then the ready file: whoever waits for that finds them there."""
        settings, host, server = self._settings, self._peering.host, self._server
        span = None if server is None else list(server.span)
        lines = [*host.addrs, *filter(None, [self._http_url])]
        if self.role != "client" and host.addrs:
            serve = "auto" if span is None else str(span[1] - span[0])
            model = [settings.model] if settings.model is not None else ["MODEL"] if server is None else []
            if model and server is not None and settings.share_weights == "yes" and len(self._peering.view.models(now=time.time())) == 1:
                model = []  # which has it from here: the next machine need not have it, least of all in a folder of the same name
            key = [] if self._access.swarm_key is None else ["--swarm-key", str(self._access.swarm_key.path or "FILE")]
            lines.append("join with: " + shlex.join(["petalnet", "node", *model, "--serve", serve, *key, "--initial-peers", host.addrs[0]]))
        _print(lines)
        if settings.ready_file is not None:
            write_json(
                settings.ready_file,
                {
                    "peer_id": host.peer_id,
                    "addrs": host.addrs,
                    "model": settings.model if server is None else server.model_name,
                    "span": span,
                    "http": self._http_url,
                    "pid": os.getpid(),
                },
            )
            self._files.append(settings.ready_file)

    def _remove_files(self) -> None:
        while self._files:
            remove_own_json(self._files.pop())


def _print(lines: Iterable[str]) -> None:
    """Lines on standard output, at once. Where that leads to a full disk or to nobody, the node goes on."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:
        logger.warning("standard output cannot be written: %s", error.strerror or error)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # else Python fails at its end, over what is still to be written
        os.close(nowhere)


def _import_libraries() -> None:
    """What a server needs of the model's libraries, whichever model it will be."""
    from petalnet.models.lean import import_transformers

    import_transformers()
    import petalnet.blocks.probe
    import petalnet.blocks.service
    import petalnet.blocks.throughput  # noqa: F401


class _Opening:
    """A model that is being opened on a thread, while the node joins its swarm."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._model: Model | None = None
        self._imported = trio.Event()
        self._done = trio.Event()

    async def import_libraries(self) -> None:
        # On one thread before any other needs them: transformers cannot be imported by two threads at once.
        await in_thread(_import_libraries)
        self._imported.set()

    async def find_manifest(self, peering: Peering, key: str) -> Manifest | None:
        """What the servers of a swarm say that their model is made of; None where none of them shares it."""
        from petalnet.manifests import find_manifest

        await self._imported.wait()
        return await find_manifest(peering, key)

    async def open(self, name: str | None, manifest: Manifest | None = None) -> None:
        from petalnet.serving import open_model

        await self._imported.wait()
        self._model = await in_thread(open_model, self._settings, name, manifest)
        self._done.set()

    async def wait(self) -> Model:
        await self._done.wait()
        if self._model is None:
            raise RuntimeError("the model was not opened")
        return self._model
