"""Trainable prompts: a model that has them gives what the local model gives with the same vectors before its tokens and in its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

LENGTH = 3
GREEDY = {"do_sample": False}


class Tuned:
    """A distributed model with random prompts beside the local one with the same: embeddings before the tokens, hooks in the layers."""

    def __init__(self, pair: Any, remote: Any, local: Any) -> None:
        self.pair, self.remote, self.local = pair, remote, local
        backbone = remote.base_model
        generator = torch.Generator().manual_seed(11)
        self.prompts = backbone.prompt_embeddings.weight
        self.deep = backbone.intermediate_prompt_embeddings.weight if "intermediate_prompt_embeddings" in backbone._modules else None
        for parameter in remote.parameters():
            if parameter is self.prompts or parameter is self.deep:
                parameter.data.normal_(0, 0.3, generator=generator)

    def embeds(self, ids: torch.Tensor) -> torch.Tensor:
        embeds = self.local.get_input_embeddings()(ids)
        return torch.cat([self.prompts.detach().expand(len(ids), -1, -1), embeds], dim=1)

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([mask.new_ones(len(mask), LENGTH), mask], dim=1)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Inside, the local model's layers add the deep prompts to what they get at the first positions."""
        layers = self.local.base_model.h if self.pair.family == "bloom" else self.local.base_model.layers
        handles = []
        for index, layer in enumerate(layers if self.deep is not None else []):
            size = self.deep.shape[1] // len(layers)
            added = self.deep.detach()[:, index * size : (index + 1) * size]

            def add(_: Any, args: Any, kwargs: Any, added: torch.Tensor = added) -> Any:
                hidden = args[0]
                if hidden.shape[1] == 1:
                    return None  # a later step
                whole = torch.nn.functional.pad(added, (0, 0, 0, hidden.shape[1] - LENGTH))
                return (hidden + whole, *args[1:]), kwargs

            handles.append(layer.register_forward_pre_hook(add, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module", params=["ptune", "deep_ptune"])
def tuned(pair: Any, request: pytest.FixtureRequest, connect: Any) -> Iterator[Tuned]:
    torch.manual_seed(3)
    with connect(pair.path, pair.servers.peers, tuning_mode=request.param, pre_seq_len=LENGTH) as remote:
        yield Tuned(pair, remote, pair.local)


def generate_locally(tuned: Tuned, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    with tuned.hooks():
        new = tuned.local.generate(inputs_embeds=tuned.embeds(ids), attention_mask=tuned.mask(mask), **options)
    return torch.cat([ids.repeat_interleave(len(new) // len(ids), dim=0), new], dim=1)


def same(tuned: Tuned, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(7)
    expected = generate_locally(tuned, ids, mask, **options)
    torch.manual_seed(7)
    answer = tuned.remote.generate(ids, **({} if mask is None else {"attention_mask": mask}), **options)
    assert torch.equal(answer, expected)
    return answer


def test_generate(tuned: Tuned) -> None:
    ids, mask = tuned.pair.padded("left")
    same(tuned, tuned.pair.ids(1, 5), max_new_tokens=12, **GREEDY)
    same(tuned, ids, mask, max_new_tokens=8, **GREEDY)
    same(tuned, ids, mask, max_new_tokens=6, num_beams=3, num_return_sequences=2, **GREEDY)
    same(tuned, ids, mask, max_new_tokens=8, do_sample=True, temperature=0.8, top_k=40, num_return_sequences=2)
