"""What a user can say about how a model reaches its swarm: keyword arguments of `from_pretrained`, or attributes of a configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from petalnet.errors import UsageError
from petalnet.p2p.swarm_key import SwarmKey
from petalnet.routing.precision import DTYPES, QUANTIZATIONS, Precisions

PTUNE, DEEP_PTUNE = "ptune", "deep_ptune"
"""What `tuning_mode` may be beside None; `client.tuning` says what each does."""
PRECISIONS = ("exact", "bfloat16", "float16", "int8", "auto")
"""What `wire_precision` may be; `client.precision` says what each does."""


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """How a model reaches its swarm.

    Attributes:
        initial_peers: bootstrap multiaddrs; None to look into the environment, the configuration file and for a client daemon.
        allowed_servers, blocked_servers: peer ids; only, respectively none, of these are used. None for no restriction.
        server_dtype: only servers that compute in this dtype, or in one of these, are used: torch's, or their names. None for any.
        quantization: only servers whose weights are rounded so are used: "none" (not at all), "int8" or "nf4", or several of them. None
            for any (docs/precision.md).
        request_timeout: seconds that one request to one server may take, and the most that full servers are waited for.
        connect_timeout: seconds that a connection to a server may take.
        max_retries: how often a failed request is tried again on another route before its error is raised; None for without end. In
            mid-answer, a server that fails for the first time does not count. Where all servers are full, each retry stands for half a
            minute of waiting.
        show_route: which routes are logged (on standard error, where the program has set up no logging): "inference" for those of sessions
            and answers, True for those of passes without a session as well, False for none.
        speculation: whether answers of one row may bring guesses of further tokens along, where that saves time; the tokens are the same
            (docs/speculation.md).
        direct_chains: whether servers of a session send their outputs on to the next server themselves, wherever they reach it; otherwise
            everything goes through this client.
        wire_precision: what hidden states of prompts and of passes without a session may be rounded to on their way: "exact", "bfloat16",
            "float16", "int8", or "auto", by the speed of the link (docs/wire-precision.md).
        kept_graphs: whether servers may keep what a pass leaves for its backward pass, as far as they have memory; otherwise each backward
            pass computes the forward pass again.
        active_adapter: the name of a LoRA adapter that servers have and are to apply, or its whole label ("name@digest", as they announce
            it) where there are several of the name; None for none.
        tuning_mode: "ptune" for trainable prompts before the tokens, "deep_ptune" for such in front of every block as well, None for none.
        pre_seq_len: positions that they take.
        swarm_key: a private swarm's key: the path of its file, the file's text or a `SwarmKey`; "none" for an open swarm whatever the
            configuration says; None to look for one where `initial_peers` are looked for.
    """

    initial_peers: tuple[str, ...] | None = None
    allowed_servers: frozenset[str] | None = None
    blocked_servers: frozenset[str] = frozenset()
    server_dtype: frozenset[str] | None = None
    quantization: frozenset[str] | None = None
    request_timeout: float = 180.0
    connect_timeout: float = 5.0
    max_retries: int | None = 3
    show_route: str | bool = "inference"
    speculation: bool = True
    direct_chains: bool = True
    wire_precision: str = "exact"
    kept_graphs: bool = True
    active_adapter: str | None = None
    tuning_mode: str | None = None
    pre_seq_len: int = 0
    swarm_key: SwarmKey | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial_peers", _strings("initial_peers", self.initial_peers, tuple))
        object.__setattr__(self, "allowed_servers", _strings("allowed_servers", self.allowed_servers, frozenset))
        object.__setattr__(self, "blocked_servers", _strings("blocked_servers", self.blocked_servers, frozenset) or frozenset())
        for name, known in (("server_dtype", DTYPES), ("quantization", QUANTIZATIONS)):
            object.__setattr__(self, name, _choices(name, getattr(self, name), known))
        for name in ("request_timeout", "connect_timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise UsageError(f"{name} needs a number of seconds above 0; got {value!r}")
        if self.max_retries is not None and (not isinstance(self.max_retries, int) or self.max_retries < 0):
            raise UsageError(f"max_retries needs a number from 0, or None; got {self.max_retries!r}")
        if self.show_route not in ("inference", True, False, None):
            raise UsageError(f'show_route needs "inference", True or False; got {self.show_route!r}')
        if not isinstance(self.speculation, bool):
            raise UsageError(f"speculation needs True or False; got {self.speculation!r}")
        if not isinstance(self.direct_chains, bool):
            raise UsageError(f"direct_chains needs True or False; got {self.direct_chains!r}")
        if not isinstance(self.kept_graphs, bool):
            raise UsageError(f"kept_graphs needs True or False; got {self.kept_graphs!r}")
        if self.wire_precision not in PRECISIONS:
            raise UsageError(f"wire_precision needs one of {', '.join(PRECISIONS)}; got {self.wire_precision!r}")
        if self.swarm_key not in (None, "none"):  # read now: from here on nothing shows a key that was given as text
            object.__setattr__(self, "swarm_key", SwarmKey.of(self.swarm_key))
        self._check_tuning()
        if self.active_adapter is not None and (not isinstance(self.active_adapter, str) or not self.active_adapter):
            raise UsageError(f"active_adapter needs an adapter's name or None; got {self.active_adapter!r}")

    @property
    def precisions(self) -> Precisions:
        """What servers may compute in."""
        return Precisions(self.server_dtype, self.quantization)

    def _check_tuning(self) -> None:
        if self.tuning_mode not in (None, PTUNE, DEEP_PTUNE):
            raise UsageError(f'tuning_mode needs "{PTUNE}", "{DEEP_PTUNE}" or None; got {self.tuning_mode!r}')
        length = self.pre_seq_len
        if isinstance(length, bool) or not isinstance(length, int) or length < 0 or (self.tuning_mode is not None and not length):
            what = f"tuning_mode={self.tuning_mode!r} needs pre_seq_len, a number of prompt positions above 0"
            raise UsageError(f"{what if self.tuning_mode else 'pre_seq_len needs a number of prompt positions'}; got {length!r}")


SETTING_NAMES = frozenset(field.name for field in fields(ClientSettings))


def take_settings(arguments: dict[str, Any], config: object | None = None, defaults: Mapping[str, Any] | None = None) -> ClientSettings:
    """The settings among `arguments`, which are taken out of it, otherwise those that `config` carries as attributes, or `defaults`."""
    carried = {**(defaults or {}), **(attributes_of(config) if config is not None else {})}
    given = {name: arguments.pop(name) for name in SETTING_NAMES & arguments.keys()}
    return ClientSettings(**{**carried, **{name: value for name, value in given.items() if value is not None or name not in carried}})


def attributes_of(config: object) -> Mapping[str, Any]:
    """The settings that an object carries as attributes of its own."""
    own = vars(config)
    return {name: own[name] for name in SETTING_NAMES if own.get(name) is not None}


def _choices(name: str, value: Any, known: tuple[str, ...]) -> frozenset[str] | None:
    """One of some names or several, or dtypes of torch, as a set of names."""
    if value is None:
        return None
    given = value if isinstance(value, (list, tuple, set, frozenset)) else (value,)
    names = frozenset(str(one).removeprefix("torch.") for one in given)
    if not names or not names <= set(known):
        raise UsageError(f"{name} needs one of {', '.join(known)}, a list of them, or None; got {value!r}")
    return names


def _strings(name: str, value: Any, kind: type) -> Any:
    if value is None:
        return None
    entries = (value,) if isinstance(value, str) else tuple(str(entry) for entry in value)
    if name == "initial_peers" and not entries:
        raise UsageError("initial_peers is an empty list: leave it out, or give at least one multiaddr of the swarm")
    return kind(entries)
