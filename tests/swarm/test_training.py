"""Training over a swarm of real server processes is training on this machine: the same gradients, and the same losses on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from .conftest import Families, NodeProcess, Nodes
from .models import connected, ids
from .training import IGNORED, MIXTRAL_BLOCKS, PROJECTIONS, Batch, Sides, apart, load_sides, padded_batch, save_mixtral

WITHIN = 1e-3
"""How far gradients and losses may be apart, relative to the largest."""
PRE_SEQ_LEN = 4
STEPS = 30
MEMORY_STEPS = 200
MOST_GROWTH = 0.02
"""Of the memory of a process, after a third of the steps until their end: what is cached has been filled by then."""


@dataclass(frozen=True)
class Place:
    """A model and the swarm that serves it."""

    family: str
    path: Path
    peers: list[str]
    servers: list[NodeProcess]

    @contextmanager
    def sides(self, tuning_mode: str | None = None, *, lora: bool = False, **options: bool) -> Iterator[Sides]:
        """See `training.load_sides`."""
        tuning = {"tuning_mode": tuning_mode, "pre_seq_len": PRE_SEQ_LEN} if tuning_mode else {}
        with connected(self.path, self.peers, **tuning) as remote:
            projections = PROJECTIONS[self.family] if lora else None
            prompts, deep = tuning_mode is not None, tuning_mode == "deep_ptune"
            yield load_sides(self.path, remote, prompts=prompts, deep=deep, lora=projections, **options)


@pytest.fixture(scope="module")
def places(families: Families, module_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    mixtral = save_mixtral(tmp_path_factory.mktemp("mixtral"))
    options = ("--dtype", "float32", "--throughput", "100", "--initial-peers", *families.peers)
    node = module_nodes.start(mixtral, "--serve", f"0:{MIXTRAL_BLOCKS}", *options)
    paths, servers = families.paths | {"mixtral": mixtral}, families.servers | {"mixtral": [node]}
    return {name: Place(name, paths[name], families.peers, servers[name]) for name in paths}


@pytest.fixture(params=["bloom", "llama", "mixtral"])
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    return places[request.param]


def check(sides: Sides) -> None:
    for side in ("left", "right"):
        found = sides.gradients(padded_batch(side))
        assert max(found.values()) < WITHIN, (side, found)


def test_gradients_of_all_that_can_be_trained(place: Place) -> None:
    with place.sides("deep_ptune", lora=True, embeddings=True, head=True) as sides:
        assert {"prompts", "deep prompts", "embeddings", "head"} < sides.trained.keys()
        check(sides)


# Each alone: nothing before the first block needs gradients then, or nothing in the blocks.
ALONE: list[dict[str, Any]] = [
    {"tuning_mode": "ptune"}, {"tuning_mode": "deep_ptune"}, {"lora": True}, {"embeddings": True}, {"head": True},
]  # fmt: skip


@pytest.mark.parametrize("alone", ALONE[2:4], ids=str)
def test_gradients_of_one_thing_alone(places: dict[str, Place], alone: dict[str, Any]) -> None:
    with places["llama"].sides(**alone) as sides:
        check(sides)


@pytest.mark.long
@pytest.mark.parametrize("alone", ALONE, ids=str)
def test_gradients_of_each_thing_alone(place: Place, alone: dict[str, Any]) -> None:
    with place.sides(**alone) as sides:
        check(sides)


def test_gradients_of_inputs(places: dict[str, Place]) -> None:
    """Of other families, those of the embeddings tell the same."""
    with places["llama"].sides() as sides:
        for side in ("left", "right"):
            batch = padded_batch(side)
            found = []
            for model in (sides.local.model, sides.remote):
                inputs = model.get_input_embeddings()(batch.ids).detach().requires_grad_()
                loss = model(inputs_embeds=inputs, attention_mask=batch.mask, labels=batch.labels, use_cache=False).loss
                loss.backward()
                found.append(inputs.grad)
            assert apart(found[1], found[0]) < WITHIN


def curves(place: Place, tuning_mode: str | None, **options: bool) -> None:
    batches = []
    for step in range(STEPS):
        tokens = ids(3, 12, seed=step % 3)  # few enough to be learnt
        mask = torch.ones_like(tokens)
        mask[1, 8:] = mask[2, :5] = 0
        batches.append(Batch(tokens, mask, tokens.masked_fill(mask == 0, IGNORED)))
    with place.sides(tuning_mode, **options) as sides:
        local, remote = sides.curves(batches, learning_rate=1e-2)
    # Each batch once at the beginning and once at the end; prompts alone move a frozen BLOOM the least, by 6 %.
    assert sum(local[-3:]) < 0.97 * sum(local[:3])
    assert max(abs(one - other) / other for one, other in zip(remote, local, strict=True)) < WITHIN, (local, remote)


def test_losses_of_30_steps(places: dict[str, Place]) -> None:
    curves(places["mixtral"], "deep_ptune", lora=True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ptune", "deep_ptune", "lora", "embeddings and head"])
def test_losses_of_30_steps_of_each_kind(place: Place, kind: str) -> None:
    if kind == "lora":
        curves(place, None, lora=True)
    elif kind == "embeddings and head":
        curves(place, None, embeddings=True, head=True)
    else:
        curves(place, kind)


@pytest.mark.long
def test_memory_is_steady_over_200_steps(places: dict[str, Place]) -> None:
    place = places["llama"]
    processes = [psutil.Process(), *(psutil.Process(node.process.pid) for node in place.servers)]
    held: list[list[int]] = []
    with place.sides("deep_ptune", lora=True, embeddings=True) as sides:
        optimizer = torch.optim.AdamW([remote for _, remote in sides.trained.values()], lr=1e-4)
        for step in range(MEMORY_STEPS):
            tokens = ids(4, 32, seed=step)
            optimizer.zero_grad()
            Batch(tokens, torch.ones_like(tokens), tokens).loss(sides.remote).backward()
            optimizer.step()
            held.append([process.memory_info().rss for process in processes])
    later = torch.tensor(held[len(held) // 3 :], dtype=torch.float64)
    steps = torch.arange(len(later), dtype=torch.float64) - (len(later) - 1) / 2
    growth = (steps[:, None] * later).sum(0) / steps.square().sum() * len(later) / later.mean(0)  # of the straight line through it
    print("memory grew by", [f"{part:.2%}" for part in growth.tolist()])
    assert float(growth.max()) < MOST_GROWTH
