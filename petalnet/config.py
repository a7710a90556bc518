"""Every setting of petalnet, once: its name, type, default and help, and where its value comes from.

The fields of `Settings` are the table. A value is taken from the command line, else from the environment (`PETALNET_` and the name in
capitals), else from the configuration file (TOML, keys named like the fields), else it is the default. Paths of petalnet's own folders
are decided here as well. Light on purpose: this module is imported before anything else runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import platformdirs

from petalnet.devices import device_names
from petalnet.errors import NoSwarmError, UsageError
from petalnet.p2p.access import Access, read_peer_ids
from petalnet.p2p.swarm_key import SwarmKey

DEFAULT_PORT = 31330
DEFAULT_HTTP_PORT = 31331
DEFAULT_DRAIN_S = 30.0
"""Seconds for running sessions when a server is told to stop: moving one takes a few, an answer that nobody else can go on with may end."""
MOST_SECONDS = 86_400

Serve = tuple[int, int] | int | Literal["auto"]
"""What to host: blocks [a, b), any n blocks, or as many as memory holds."""


# Parsers: the text of a value, as typed or as it stands in the environment, to the value; ValueError says what is needed.


def _serve(text: str) -> Serve:
    if text == "auto":
        return "auto"
    match = re.fullmatch(r"(\d+):(\d+)|(\d+)", text)
    if match and match[3] and int(match[3]) > 0:
        return int(match[3])
    if match and match[1] and int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise ValueError("needs blocks A:B (A to B-1, A < B), a number of blocks, or auto")


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("needs true or false")


def _choice(*options: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(f"needs one of {', '.join(options)}")
        return text

    return parse


def _device(text: str) -> str:
    return ",".join(device_names(text))


def _rate(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e9:
        raise ValueError("needs auto or a number of tokens/s above 0")
    return rate


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text) or int(text) == 0:
        raise ValueError("needs a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MOST_SECONDS:
        raise ValueError(f"needs a number of seconds from 0 to {MOST_SECONDS}")
    return seconds


def _size(text: str) -> int:
    """Bytes, from "8GB", "512MiB", "24G" (decimal without the i) or a bare number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise ValueError("needs a size such as 8GB or 512MiB")
    power = " kmgt".index(match[2]) if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _http(text: str) -> tuple[str, int] | Literal["none"]:
    if text == "none":
        return "none"
    address, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError("needs ADDR:PORT, such as 127.0.0.1:31331, or none")
    return address.strip("[]") or "127.0.0.1", int(port)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _swarm_key(text: str) -> Path | SwarmKey | Literal["none"]:
    """A key's text is taken as well, since that is how containers are handed secrets; from here on nothing shows it."""
    if text == "none":
        return "none"
    try:
        return SwarmKey.parse(text.strip())
    except UsageError:
        return Path(text).expanduser()


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("needs a text that is not empty")
    return text


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > 64:
        raise ValueError("needs a printable text of at most 64 characters")
    return text


def _setting(
    help_text: str,
    parse: Callable[[str], Any] = _text,
    *,
    default: Any = None,
    metavar: str | None = None,
    aliases: Sequence[str] = (),
    switches: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    many: bool = False,
    only_typed: bool = False,
) -> Any:
    """One row of the table.

    `aliases` are further flags for the same setting, `switches` flags that stand for one value alone or before "true", and for another
    before "false"; `many` makes it a list, and with `only_typed` it has no meaning in the environment or the file (it belongs to one
    invocation).
    """
    metadata = {
        "help": help_text,
        "parse": parse,
        "metavar": metavar,
        "aliases": (*aliases, *switches),
        "switches": switches,
        "many": many,
        "only_typed": only_typed,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a node and of the inspection verbs; the flag of each is its name with dashes."""

    model: str | None = _setting("a hub id, or a local folder in Hugging Face format", aliases=("--converted-model-name-or-path",))
    serve: Serve | None = _setting(
        "host blocks A..B-1, any N blocks that the swarm lacks, or as many as memory holds (auto)",
        _serve, metavar="A:B|N|auto", aliases=("--block-indices", "--num-blocks"), only_typed=True,
    )  # fmt: skip
    client: bool = _setting("a client daemon for this machine", _flag, default=False, only_typed=True)
    bootstrap: bool = _setting("an entry point of a swarm: no model", _flag, default=False, only_typed=True)
    initial_peers: tuple[str, ...] = _setting(
        "bootstrap multiaddrs, or @FILE with one a line  [none: a new swarm]", default=(), metavar="MADDR...", many=True
    )
    new_swarm: bool = _setting("start a new swarm, even where the configuration names peers", _flag, default=False, only_typed=True)
    host_maddrs: tuple[str, ...] = _setting(
        f"where to listen  [every interface, port {DEFAULT_PORT} or the next free one]", default=(), metavar="MADDR...", many=True
    )
    announce_maddrs: tuple[str, ...] = _setting(
        "addresses to tell others instead of those listened on", default=(), metavar="MADDR...", many=True
    )
    identity_path: Path | None = _setting("the node's key; made there if absent  [in the state folder]", _path, metavar="FILE")
    swarm_key: Path | SwarmKey | Literal["none"] | None = _setting(
        "a private swarm's key, made by `petalnet key new FILE`, or none  [none: an open swarm]", _swarm_key, metavar="FILE"
    )
    allow_peers: tuple[str, ...] = _setting(
        "connect with these peer ids only; @FILE with one a line  [no restriction]", default=(), metavar="PEER_ID...", many=True
    )
    block_peers: tuple[str, ...] = _setting(
        "never connect with these peer ids; @FILE with one a line", default=(), metavar="PEER_ID...", many=True
    )
    max_connections: int | None = _setting("connections with other peers at once  [1000]", _count, metavar="N")
    relay: bool = _setting("relay connections for servers that cannot be reached", _flag, default=False)
    dtype: str = _setting(
        "auto, float32, bfloat16 or float16; auto: the checkpoint's, float32 where a CPU has no fast bfloat16  [auto]",
        _choice("auto", "float32", "bfloat16", "float16"), default="auto", metavar="DTYPE", aliases=("--torch-dtype",),
    )  # fmt: skip
    quantization: str = _setting(
        "none, int8 or nf4: what the weights of linear layers are rounded to as they are loaded  [none]",
        _choice("none", "int8", "nf4"), default="none", metavar="KIND",
        aliases=("--quant-type",), switches={"--load-in-8bit": ("int8", "none")},
    )  # fmt: skip
    device: str | None = _setting(
        "cpu, cuda, cuda:N or mps, or several over which the blocks go, such as cuda:0,cuda:1  [the best there is]",
        _device,
        metavar="DEVICE",
    )
    cuda_graphs: str = _setting(
        "decode by captured CUDA graphs: on, off, or auto: where that is quicker, as tried at the start  [auto]",
        _choice("auto", "on", "off"), default="auto", metavar="auto|on|off",
    )  # fmt: skip
    throughput: float | None = _setting("auto (measured, then cached), or tokens/s to announce  [auto]", _rate, metavar="auto|RATE")
    attn_cache_tokens: int | None = _setting("KV tokens held per block  [from free memory]", _count, metavar="N")
    share_prefixes: bool = _setting("reuse what one peer's prompt computed for other peers' prompts that begin alike", _flag, default=False)
    adapters: tuple[str, ...] = _setting(
        "LoRA adapters that users may choose: hub ids or folders, PEFT's safetensors only",
        default=(),
        metavar="NAME...",
        many=True,
    )
    max_memory: int | None = _setting("most memory for weights and KV, such as 8GB  [most of what is free]", _size, metavar="SIZE")
    public_name: str | None = _setting("shown in the swarm's overview", _name, metavar="NAME")
    drain_time: float = _setting(
        f"when told to stop, how long running sessions may take to move to other servers or to end  [{DEFAULT_DRAIN_S:g}]",
        _seconds, default=DEFAULT_DRAIN_S, metavar="SECONDS",
    )  # fmt: skip
    revision: str | None = _setting("of the model on the hub  [main]", metavar="REV")
    token: str | None = _setting("for the hub  [the stored login]", metavar="TOKEN")
    cache_dir: Path | None = _setting("where hub files are kept  [the hub's own cache]", _path, metavar="DIR")
    max_disk_space: int | None = _setting(
        "most disk space for weights that were fetched, such as 100GB; what was used least recently goes first  [no bound]",
        _size, metavar="SIZE",
    )  # fmt: skip
    share_weights: str = _setting(
        "give other servers the weights that this one has: yes, no, or auto, which leaves out local folders and gated models  [auto]",
        _choice("yes", "no", "auto"), default="auto", metavar="yes|no|auto",
    )  # fmt: skip
    max_upload_rate: int | None = _setting("bytes a second for weights that others get, such as 5MB  [no bound]", _size, metavar="SIZE")
    max_download_rate: int | None = _setting("bytes a second for weights that come from others  [no bound]", _size, metavar="SIZE")
    http: tuple[str, int] | Literal["none"] | None = _setting(
        f"the node's local web side, or none  [client: 127.0.0.1:{DEFAULT_HTTP_PORT}, server: none]", _http, metavar="ADDR:PORT"
    )
    ready_file: Path | None = _setting("written as JSON once the node is usable, removed at exit", _path, metavar="FILE", only_typed=True)
    log_level: str = _setting(
        "debug, info, warning or error  [info]", _choice("debug", "info", "warning", "error"), default="info", metavar="LEVEL"
    )
    log_format: str = _setting("pretty or json  [pretty]", _choice("pretty", "json"), default="pretty", metavar="FORMAT")


TABLE: Mapping[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}


def load_settings(typed: Mapping[str, Any], *, environ: Mapping[str, str] = os.environ, file: Path | None = None) -> Settings:
    """The settings for what was typed (by field name: texts, lists of texts, True for a flag; absent or None where nothing was typed).

    Raises:
        UsageError: a value, the file or a key in it is wrong; the message names the source.
    """
    path = file or config_path(environ)
    from_file = read_config_file(path)
    values: dict[str, Any] = {}
    for name, field in TABLE.items():
        variable = f"PETALNET_{name.upper()}"
        if typed.get(name) not in (None, (), []):
            values[name] = _parse(field, typed[name], f"--{name.replace('_', '-')}" if name != "model" else "MODEL")
        elif field.metadata["only_typed"]:
            continue
        elif environ.get(variable):
            text = environ[variable]
            values[name] = _parse(field, re.split(r"[\s,]+", text.strip()) if field.metadata["many"] else text, variable)
        elif name in from_file:
            values[name] = _parse(field, from_file[name], f"{path}: {name}")
    if values.get("new_swarm"):
        if typed.get("initial_peers"):
            raise UsageError("--new-swarm and --initial-peers exclude each other")
        values["initial_peers"] = ()
    return Settings(**values)


def _parse(field: dataclasses.Field[Any], value: Any, source: str) -> Any:
    parse, many = field.metadata["parse"], field.metadata["many"]
    if many != isinstance(value, list | tuple):
        raise UsageError(f"{source}: needs {'a list' if many else 'a single value'}")
    try:
        return tuple(parse(str(entry)) for entry in value) if many else parse(str(value))
    except ValueError as error:
        raise UsageError(f"{source} {error}; got {value!r}") from None


def read_config_file(path: Path) -> dict[str, Any]:
    """The configuration file's values by field name; empty where there is no file. Dashes in keys are as good as underscores."""
    try:
        parsed = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}") from None
    values = {key.replace("-", "_"): value for key, value in parsed.items()}
    for key in values:
        if key not in TABLE or TABLE[key].metadata["only_typed"]:
            known = ", ".join(name for name, field in TABLE.items() if not field.metadata["only_typed"])
            raise UsageError(f"{path}: unknown setting {key!r}; known are {known}")
    return values


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The configuration file: `PETALNET_CONFIG`, else config.toml in the user's configuration folder. It need not exist."""
    given = environ.get("PETALNET_CONFIG")
    return Path(given).expanduser() if given else Path(platformdirs.user_config_dir("petalnet")) / "config.toml"


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of keys and of what runs on this machine: `PETALNET_STATE_DIR`, else the user's state folder. It need not exist."""
    given = environ.get("PETALNET_STATE_DIR")
    return Path(given).expanduser() if given else Path(platformdirs.user_state_dir("petalnet"))


def client_state_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where a running client daemon leaves how to reach its swarm, as JSON: pid, peer_id, addrs, initial_peers, swarm_key, http."""
    return state_dir(environ) / "client.json"


def read_client_state(environ: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """What the client daemon of this machine left, or None where none runs (a file whose process is gone counts as none)."""
    try:
        state = json.loads(client_state_path(environ).read_text(encoding="utf-8"))
        pid = int(state["pid"])
        if not isinstance(state["initial_peers"], list):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(state) if process_lives(pid) else None


def process_lives(pid: int) -> bool:
    """Whether a process of this number runs on this machine, ours or another user's."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def resolve_initial_peers(given: str | Sequence[str] | None, *, environ: Mapping[str, str] = os.environ, daemon: bool = True) -> list[str]:
    """The bootstrap multiaddrs to use: what was given, else the environment's, else the configuration file's, else the client daemon's.

    Entries may be `@file`, one multiaddr a line. Nothing is connected to.

    Args:
        given: multiaddrs, or None to look elsewhere.
        daemon: whether a client daemon on this machine counts.

    Raises:
        NoSwarmError: there are none; the message says how to give some.
        UsageError: an entry is not a multiaddr with a /p2p/ peer id.
    """
    from petalnet.p2p.addresses import read_peer_list

    if given is not None:
        peers = read_peer_list([given] if isinstance(given, str) else given)
    else:
        peers = read_peer_list(load_settings({}, environ=environ).initial_peers)
        if not peers and daemon and (state := read_client_state(environ)) is not None:
            peers = read_peer_list(state["initial_peers"])
    if not peers:
        raise NoSwarmError(
            "no swarm to join: pass initial_peers=[...] (--initial-peers), or set PETALNET_INITIAL_PEERS or initial_peers in "
            f"{config_path(environ)}, or run `petalnet node --client` on this machine"
        )
    return peers


def access_of(settings: Settings, *, environ: Mapping[str, str] = os.environ, daemon: bool = False) -> Access:
    """How the settings let a node into its swarm, and whom they let in. Key files and lists of peers are read here.

    Args:
        daemon: whether the key of this machine's client daemon counts where the settings name neither a key nor peers.

    Raises:
        UsageError: a file cannot be read or is none of its kind, or an entry is not a peer id.
    """
    key: str | Path | SwarmKey | None = settings.swarm_key
    if key is None and daemon and not settings.initial_peers:
        key = (read_client_state(environ) or {}).get("swarm_key")
    return Access(
        swarm_key=None if key in (None, "none") else SwarmKey.of(key),
        allowed=read_peer_ids(settings.allow_peers) if settings.allow_peers else None,
        blocked=read_peer_ids(settings.block_peers),
    )


def resolve_access(
    swarm_key: str | os.PathLike[str] | SwarmKey | None = None, *, environ: Mapping[str, str] = os.environ, daemon: bool = True
) -> Access:
    """How a client on this machine gets into its swarm: by the key that was given, else the environment's, else the file's, else the
    client daemon's.

    Args:
        swarm_key: a key, its text, the path of its file, or "none" for an open swarm whatever the configuration says; None to look
            elsewhere.
        daemon: whether the daemon's key counts; as for `resolve_initial_peers`, it does where its peers are used.

    Raises:
        UsageError: the key cannot be read.
    """
    settings = load_settings({}, environ=environ)
    if swarm_key is not None:
        settings = dataclasses.replace(settings, swarm_key="none" if swarm_key == "none" else SwarmKey.of(swarm_key))
    return access_of(settings, environ=environ, daemon=daemon)
