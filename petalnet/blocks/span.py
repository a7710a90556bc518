"""Some consecutive layers of a model, run by the model's own backbone.

The backbone keeps its `forward`: masks, rotary tables, ALiBi, sliding windows stay the library's business. Only its list of layers is
cut to the span, and two hooks replace what reaches the first layer by what was received and take what the last layer puts out, so
that whatever the backbone does before (embedding scales, norms) or after (the final norm) does not matter.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from petalnet.blocks.cache import SpanCache, windows_of
from petalnet.errors import ModelError, UsageError
from petalnet.models import loading
from petalnet.models.anatomy import find_layers, text_config
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import block_digests


class Span:
    """Blocks [first, end) of a model, loaded. Not thread-safe: one thread runs it.

    Attributes:
        first, end: which blocks of the model these are.
        num_blocks: how many the whole model has.
        hidden_size: width of the hidden states.
        dtype, device: of the weights and of what `forward` returns.
        takes_position_ids: whether the backbone is told positions (families with ALiBi are not).
        score_heads: attention scores (or a mask) of rows × score_heads × new × total entries are in memory at once: the heads where the
            library computes scores one after the other, 1 where a fused kernel does it all.
        max_positions: positions that the model has a table for; None for a family that computes them (rotary, ALiBi).
    """

    def __init__(self, model: Any, first: int, end: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Cut a model, whose layers [first, end) are loaded, to these layers. `load` is the usual way."""
        layers = find_layers(model)
        config = text_config(model.config)
        self.num_blocks = len(layers.layers)
        self.first, self.end = first, end
        self.hidden_size: int = config.hidden_size
        self.dtype, self.device = dtype, device
        self._compute_digests: Callable[[], list[str]] = list
        self._list = layers
        self._blocks = list(layers.layers)[first:end]
        self._config = _quiet(config)
        self.score_heads: int = config.num_attention_heads if config._attn_implementation == "eager" else 1
        self._windows = windows_of(config)[first:end]
        self._active: tuple[int, int] | None = None
        self.takes_position_ids = "position_ids" in inspect.signature(layers.owner.forward).parameters
        tokens = model.get_input_embeddings()
        self._embedding_size: int = getattr(tokens, "embedding_dim", None) or self.hidden_size
        self.max_positions = _learned_positions(layers.owner, tokens)
        self._growing_rotary = [m for m in layers.owner.modules() if "dynamic" in str(getattr(m, "rope_type", ""))]
        for index, block in enumerate(self._blocks):
            for module in block.modules():
                for name in ("layer_idx", "layer_id"):  # under which a layer finds its share of the cache
                    if name in module.__dict__:
                        module.__dict__[name] = index
        self._activate(first, end)

    @classmethod
    def load(
        cls, source: ModelSource, first: int, end: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Span:
        """Load blocks [first, end), reading only their tensors.

        Raises:
            UsageError: the model has no such blocks.
            ModelError: the model cannot be split into blocks, or tensors are missing.
        """
        count = text_config(source.config).num_hidden_layers
        if not 0 <= first < end <= count:
            raise UsageError(f"blocks {first}:{end} are out of range: {source.name} has {count} blocks, 0:{count}")
        built = loading.build(
            AutoModel,
            source,
            names=lambda parts: [name for block in parts.blocks[first:end] for name in block],
            dtype=dtype,
            device=device,
            others="zeros",
        )
        path = find_layers(built.model).path
        wanted = tuple(f"{path}.{index}." for index in range(first, end))
        lacking = sorted(name for name in built.missing if name.startswith(wanted))
        if lacking:
            raise ModelError(f"{source.name} lacks the tensor {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else ""))
        span = cls(built.model, first, end, dtype=dtype, device=torch.device(device))
        span._compute_digests = lambda: block_digests(source, built.partition, first, end)
        return span

    @cached_property
    def digests(self) -> list[str]:
        """The identity of each block (see `models.identity`), in hex. The first look reads all of the weights, unless they are known."""
        return self._compute_digests()

    def __len__(self) -> int:
        return self.end - self.first

    def new_cache(self, max_length: int) -> SpanCache:
        """An empty cache for one session on this span."""
        return SpanCache(self._windows, max_length)

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        return sum(weight.nbytes for block in self._blocks for weight in (*block.parameters(), *block.buffers()))

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Memory that one position of one row takes in a cache, over all blocks. Found by running a token through the first block."""
        cache = self.new_cache(1)
        with torch.inference_mode():
            self.forward(torch.zeros(1, 1, self.hidden_size), cache=cache, end=self.first + 1)
        return cache.bytes * len(self)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: SpanCache | None = None,
        prompts: torch.Tensor | None = None,
        first: int | None = None,
        end: int | None = None,
        all_hidden: bool = False,
    ) -> list[torch.Tensor]:
        """Run new tokens through blocks [first, end) of the model, by default all of the span.

        Args:
            hidden: [rows, new, hidden], the input of block `first`; any float dtype, any device.
            attention_mask: bool [rows, past + new], False where a token is padding; None when nothing is.
            position_ids: [rows, new]; None when they are past … past + new - 1 in every row.
            cache: the session's; its length (past) moves on by `new`. None for a pass without a past.
            prompts: [end - first, rows, prompt length, hidden], added to each block's input at positions 0 … prompt length - 1.
            all_hidden: return the outputs of every block, not only of the last.
        Returns:
            outputs [rows, new, hidden] in the span's dtype on its device: one, or with `all_hidden` one a block.
        """
        first, end = self.first if first is None else first, self.end if end is None else end
        if not self.first <= first < end <= self.end:
            raise ValueError(f"blocks {first}:{end} are not within {self.first}:{self.end}")
        self._activate(first, end)
        for module in self._growing_rotary:
            module.__dict__["max_seq_len_cached"] = 0  # tables are chosen for this session's length, not for the longest seen so far
        hidden = hidden.to(self.device, self.dtype)
        rows, new, _ = hidden.shape
        past = cache.length if cache is not None else 0
        kwargs: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask.to(self.device, torch.long)
        if position_ids is not None and self.takes_position_ids:
            kwargs["position_ids"] = position_ids.to(self.device, torch.long)
        if self._embedding_size == self.hidden_size:
            kwargs["inputs_embeds"] = hidden.detach()
        else:
            kwargs["inputs_embeds"] = hidden.new_zeros(()).expand(rows, new, self._embedding_size)

        blocks = self._blocks[first - self.first : end - self.first]
        outputs: list[torch.Tensor] = []
        handles = [blocks[0].register_forward_pre_hook(_replace_input(hidden), with_kwargs=True)]
        if prompts is not None and past < prompts.shape[2]:
            reaching = prompts[:, :, past : past + new].to(self.device, self.dtype)
            handles += [
                block.register_forward_pre_hook(_add_prompt(prompt), with_kwargs=True)
                for block, prompt in zip(blocks, reaching, strict=True)
            ]
        handles += [block.register_forward_hook(_take_output(outputs)) for block in (blocks if all_hidden else blocks[-1:])]
        try:
            self._list.owner(**kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if cache is not None:
            cache.advance(new)
        return outputs

    def _activate(self, first: int, end: int) -> None:
        """Show the backbone only blocks [first, end), and a configuration that fits them."""
        if self._active == (first, end):
            return
        a, b = first - self.first, end - self.first
        self._list.replace(nn.ModuleList(self._blocks[a:b]))
        self._list.owner.config = slice_config(self._config, first, end)
        self._active = (first, end)


def slice_config(config: PreTrainedConfig, first: int, end: int) -> PreTrainedConfig:
    """The configuration of a model that has only layers [first, end): lists with one entry a layer are cut as well."""
    count = config.num_hidden_layers
    sliced = copy.copy(config)
    sliced.__dict__ = dict(config.__dict__)
    for name, value in config.__dict__.items():
        if isinstance(value, (list, tuple)) and len(value) == count and not name.endswith("_token_id"):
            sliced.__dict__[name] = value[first:end]
        elif name == config.attribute_map.get("num_hidden_layers", "num_hidden_layers"):
            sliced.__dict__[name] = end - first
    return sliced


def _quiet(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a configuration with which a backbone computes nothing but hidden states."""
    config = copy.copy(config)
    config.__dict__ = dict(config.__dict__)
    for name in ("output_hidden_states", "output_attentions", "_output_attentions", "output_router_logits"):
        if name in config.__dict__:
            config.__dict__[name] = False
    return config


def _learned_positions(owner: nn.Module, tokens: nn.Module) -> int | None:
    """Entries of the backbone's table of positions, which looking up a later one would overrun."""
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in owner.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and not any(part.isdigit() for part in name.split("."))
    ]
    return min(tables, default=None)


Hook = Callable[..., Any]


def _replace_input(hidden: torch.Tensor) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    return hook


def _add_prompt(prompt: torch.Tensor) -> Hook:
    """Add a prompt [rows, n, hidden] to the first n positions of a layer's input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        count = prompt.shape[1]
        hidden = torch.cat([hidden[:, :count] + prompt, hidden[:, count:]], dim=1)
        return _replace_input(hidden)(module, args, kwargs)

    return hook


def _take_output(outputs: list[torch.Tensor]) -> Hook:
    def hook(module: nn.Module, args: Sequence[Any], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    return hook
