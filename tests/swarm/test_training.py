"""Training over a swarm of real server processes is training on this machine: the same gradients, and the same losses on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import Families, Nodes
from .models import connected, ids
from .training import MIXTRAL_BLOCKS, PROJECTIONS, Batch, apart, layers_of, load_sides, padded_batch, save_mixtral

WITHIN = 1e-3
"""How far gradients may be apart, relative to the largest."""
PRE_SEQ_LEN = 4
STEPS = 30


@dataclass(frozen=True)
class Place:
    """A model and the swarm that serves it."""

    family: str
    path: Path
    peers: list[str]

    @contextmanager
    def sides(self, tuning_mode: str | None = None, **options: Any) -> Iterator[Any]:
        """See `training.load_sides`."""
        tuning = {"tuning_mode": tuning_mode, "pre_seq_len": PRE_SEQ_LEN} if tuning_mode else {}
        with connected(self.path, self.peers, **tuning) as remote:
            yield load_sides(self.path, remote, prompts=tuning_mode is not None, deep=tuning_mode == "deep_ptune", **options)


@pytest.fixture(scope="module")
def places(families: Families, module_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    mixtral = save_mixtral(tmp_path_factory.mktemp("mixtral"))
    options = ("--dtype", "float32", "--throughput", "100", "--initial-peers", *families.peers)
    module_nodes.start(mixtral, "--serve", f"0:{MIXTRAL_BLOCKS}", *options)
    return {name: Place(name, path, families.peers) for name, path in [*families.paths.items(), ("mixtral", mixtral)]}


@pytest.fixture(params=["bloom", "llama", "mixtral"])
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    return places[request.param]


def test_gradients_of_embeddings_and_head(place: Place) -> None:
    with place.sides(embeddings=True, head=True) as sides:
        for side in ("left", "right"):
            found = sides.gradients(padded_batch(side))
            assert max(found.values()) < WITHIN, found
