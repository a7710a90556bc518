"""The same training on this machine and over a swarm: what gradients and losses over the swarm are held against.

The local side is the library's model with nothing of petalnet in it: prompts are put before the inputs and added to the blocks' inputs by
hooks, LoRA is PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from .models import PADDING, VOCABULARY, padded

IGNORED = -100
"""The label of positions that do not count, in the library."""
PROJECTIONS = {
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
}
"""Of a block of each family, modules that get LoRA parameters in tests."""
MIXTRAL_BLOCKS = 3


def save_mixtral(folder: Path) -> Path:
    """As `models.save_model`, of a model whose blocks choose two of four experts for each token."""
    torch.manual_seed(8)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=MIXTRAL_BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.15, max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=PADDING, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Batch:
    """Token ids, their mask and labels, int64 [rows, length] each; padding has no label."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def loss(self, model: nn.Module) -> torch.Tensor:
        """Of predicting each next token; works for both sides."""
        return model(input_ids=self.ids, attention_mask=self.mask, labels=self.labels).loss


def padded_batch(side: str) -> Batch:
    """Rows of 11, 7 and 3 tokens, padded on one side."""
    ids, mask = padded(side)
    return Batch(ids, mask, ids.masked_fill(mask == 0, IGNORED))


class LocallyTuned(nn.Module):
    """A causal model of the library with trainable prompts.

    Args:
        prompts: [length, hidden], which stand before the embeddings of every row; None for none.
        deep: [length, blocks × hidden], added to the inputs of each block at these positions; None for none.
    """

    def __init__(self, model: Any, prompts: torch.Tensor | None, deep: torch.Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.prompts = None if prompts is None else nn.Parameter(prompts.detach().clone())
        self.deep = None if deep is None else nn.Parameter(deep.detach().clone())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        embeddings = self.model.get_input_embeddings()(input_ids)
        rows, length = input_ids.shape[0], 0 if self.prompts is None else self.prompts.shape[0]
        if self.prompts is not None:
            embeddings = torch.cat([self.prompts.expand(rows, -1, -1), embeddings], dim=1)
            attention_mask = torch.cat([attention_mask.new_ones(rows, length), attention_mask], dim=1)
            # Outputs begin at the first token, so it is nobody's next one, as it is in a model without prompts.
            labels = torch.cat([labels.new_full((rows, length + 1), IGNORED), labels[:, 1:]], dim=1)
        with self._deep_prompts():
            return self.model(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, use_cache=False)

    @contextmanager
    def _deep_prompts(self) -> Iterator[None]:
        layers = layers_of(self.model)

        def add(number: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                assert self.deep is not None
                prompts = self.deep.view(self.deep.shape[0], len(layers), -1)[:, number]
                return (args[0] + nn.functional.pad(prompts, (0, 0, 0, args[0].shape[1] - prompts.shape[0])), *args[1:])

            return hook

        hooks = []
        if self.deep is not None:
            hooks = [layer.register_forward_pre_hook(add(number)) for number, layer in enumerate(layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def layers_of(model: Any) -> nn.ModuleList:
    backbone = model.base_model
    return backbone.h if hasattr(backbone, "h") else backbone.layers


@dataclass
class Sides:
    """The same model twice, and of both the parameters that are trained, by the same names.

    Attributes:
        trained: for each name the local and the remote parameter.
    """

    local: LocallyTuned
    remote: Any
    trained: dict[str, tuple[nn.Parameter, nn.Parameter]]

    def gradients(self, batch: Batch, after_forward: Callable[[], None] = lambda: None) -> dict[str, float]:
        """One step of both without an update: how far the gradients of each parameter are apart (see `apart`), and the loss.

        Args:
            after_forward: called between the remote model's forward pass and its backward pass.
        """
        for pair in self.trained.values():
            for parameter in pair:
                parameter.grad = None
        losses = []
        for model in (self.local, self.remote):
            loss = batch.loss(model)
            if model is self.remote:
                after_forward()
            loss.backward()
            losses.append(loss.detach())
        return {"loss": apart(losses[1], losses[0])} | {
            name: apart(remote.grad, local.grad) for name, (local, remote) in self.trained.items()
        }

    def curves(self, batches: list[Batch], learning_rate: float) -> tuple[list[float], list[float]]:
        """The losses of both, one optimizer step a batch."""
        curves = []
        for side, model in enumerate((self.local, self.remote)):
            optimizer = torch.optim.AdamW([pair[side] for pair in self.trained.values()], lr=learning_rate)
            losses = []
            for batch in batches:
                optimizer.zero_grad()
                loss = batch.loss(model)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            curves.append(losses)
        return curves[0], curves[1]


def apart(value: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The largest difference, over the largest number that is expected."""
    assert value is not None and expected is not None and value.shape == expected.shape
    assert float(expected.abs().max()) > 0
    return float((value - expected).abs().max() / expected.abs().max())


def load_sides(
    path: Path,
    remote: Any,
    *,
    prompts: bool = False,
    deep: bool = False,
    lora: list[str] | None = None,
    embeddings: bool = False,
    head: bool = False,
) -> Sides:
    """A local model like a remote one, with what is named trainable on both sides, and nothing else.

    Args:
        remote: loaded with the fitting tuning mode, without an adapter.
        lora: names of modules.
    """
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.requires_grad_(False)
    backbone = remote.base_model
    trained: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    if lora is not None:
        for side in (model, remote):
            # Weights as after some training: B of an adapter that is new is 0, and so is then the gradient of A.
            torch.manual_seed(5)
            side.add_adapter(LoraConfig(target_modules=lora, r=4, lora_alpha=6, init_lora_weights=False))
        adapted = _lora_of(remote)
        for name, parameter in _lora_of(model).items():
            with torch.no_grad():
                adapted[name].copy_(parameter)
            trained[name] = (parameter, adapted[name])
        assert adapted.keys() == _lora_of(model).keys() and adapted
    shallow = backbone.prompt_embeddings.weight if prompts else None
    inner = backbone.intermediate_prompt_embeddings.weight if deep else None
    for number, weight in enumerate((shallow, inner)):
        if weight is not None:  # new ones may all be 0
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(6 + number))
    local = LocallyTuned(model, shallow, inner)
    for name, own, weight in (("prompts", local.prompts, shallow), ("deep prompts", local.deep, inner)):
        if own is not None:
            trained[name] = (own, weight)
    for wanted, name, get in ((embeddings, "embeddings", "get_input_embeddings"), (head, "head", "get_output_embeddings")):
        if wanted:
            trained[name] = (getattr(model, get)().weight, getattr(remote, get)().weight)
    for pair in trained.values():
        for parameter in pair:
            parameter.requires_grad_()
    return Sides(local, remote, trained)


def _lora_of(model: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
