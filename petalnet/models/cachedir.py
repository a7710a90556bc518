"""Small facts that are slow to find out, kept between runs: one JSON file each, in the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs


def cache_dir() -> Path:
    """Where petalnet keeps what it can find out again: $PETALNET_CACHE_DIR, or the platform's place for caches."""
    return Path(os.environ.get("PETALNET_CACHE_DIR") or platformdirs.user_cache_dir("petalnet"))


def load_facts(kind: str, key: str) -> dict[str, Any]:
    """What was stored under this key; empty where nothing was, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(_path(kind, key).read_text())
        if isinstance(facts, dict):
            return facts
    return {}


def store_facts(kind: str, key: str, facts: dict[str, Any]) -> None:
    """Keep facts under a key, replacing what was there. Where the folder cannot be written to, nothing is kept."""
    path = _path(kind, key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump(facts, stream)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def _path(kind: str, key: str) -> Path:
    return cache_dir() / kind / f"{key}.json"
