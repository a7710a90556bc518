"""Imports point one way (docs/architecture.md), and what must start quickly imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import petalnet

PACKAGE = Path(petalnet.__file__).parent
BASE = {"errors", "version", "threads"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "threads": set(),
    "routing": {"errors", "version"},
    "p2p": {"errors", "routing", "version"},
    "models": BASE,
    "config": {"devices", "errors", "p2p"},
    "devices": set(),
    "blocks": BASE | {"p2p", "models"},
    "client": BASE | {"config", "models", "p2p", "peering", "routing"},
    "http": {"errors"},
    "state": {"config", "errors"},
    "inspection": {"config", "errors"},
    "overview": {"errors", "routing"},
    "remembering": {"errors", "p2p", "state"},
    "waking": set(),
    "peering": BASE | {"config", "p2p", "routing", "waking"},
    "announcing": {"errors", "routing", "version"},
    "fitting": set(),
    "capacity": {"blocks", "devices", "errors", "fitting", "models", "routing"},
    "planning": {"blocks", "capacity", "fitting", "models"},
    "linking": {"errors", "p2p", "peering", "routing"},
    "answering": {"blocks", "errors", "p2p"},
    "placing": BASE | {"routing"},
    "sharing": BASE | {"models", "p2p"},
    "incoming": BASE | {"models", "sharing"},
    "fetching": BASE | {"incoming", "models", "p2p", "peering", "routing", "sharing"},
    "manifests": BASE | {"models", "p2p", "peering", "routing"},
    "supply": BASE | {"config", "fetching", "models", "peering", "routing", "sharing"},
    "loaded": {"blocks", "capacity", "config", "devices", "errors", "models", "serving"},
    "serving": BASE
    | {
        "announcing",
        "answering",
        "blocks",
        "capacity",
        "config",
        "devices",
        "linking",
        "loaded",
        "models",
        "p2p",
        "peering",
        "placing",
        "routing",
    }
    | {"supply"},
    "node": BASE
    | {"blocks", "client", "config", "http", "inspection", "manifests", "models", "overview", "p2p", "peering", "remembering", "serving"}
    | {"state"},
    "demo": {"errors"},
}
"""What each part may import of the others. `cli` may import everything, and nothing imports `cli`."""


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if part_of(path) not in ("__init__", "__main__", "cli"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_part_may(path: Path) -> None:
    part = part_of(path)
    for name in imports(path):
        if name.startswith("petalnet."):
            other = name.split(".")[1]
            assert (
                other == part or other in MAY_IMPORT[part] or not (PACKAGE / other).exists() and not (PACKAGE / f"{other}.py").exists()
            ), name
        top = name.split(".")[0]
        assert top != "libp2p" or part == "p2p", "only p2p imports libp2p"
        assert part != "routing" or top not in ("torch", "trio", "socket"), "routing is pure"
        assert top != "torch" or part != "p2p" or path.name == "tensors.py", "of p2p only tensors imports torch"
        if (path.name, name) not in (("pickled.py", "pickle"), ("pickled.py", "pickle.UnpicklingError")):
            assert top != "pickle", "no pickle anywhere, but for the name of an error"


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("petalnet", {"torch", "transformers", "libp2p", "trio"}),
        ("petalnet.config", {"torch", "transformers", "libp2p", "trio", "multiaddr"}),
        ("petalnet.routing.routes", {"torch", "transformers", "libp2p", "trio"}),
        ("petalnet.peering", {"torch", "transformers", "starlette"}),
        ("petalnet.node", {"torch", "transformers", "libp2p", "starlette"}),
        ("petalnet.demo", {"torch", "transformers", "libp2p", "trio"}),
    ],
)
def test_little_is_imported_at_the_start(module: str, without: set[str]) -> None:
    code = f"import sys, {module}; print(*({without!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
