"""The library's backbone of a model, of which only some layers are run.

It keeps its `forward`. Only its list of layers is cut, and two hooks replace what reaches the first layer by what was received and take
what the last layer puts out, so that whatever the backbone does before (embedding scales, norms) or after (the final norm) does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from petalnet.blocks.adapters import Dropout, Share, apply_adapters
from petalnet.blocks.configurations import configurations_of, quiet, slice_config
from petalnet.blocks.hooks import Hook, with_hidden
from petalnet.blocks.rotary import RotaryRegimes
from petalnet.models.anatomy import LayerList


class Backbone:
    """A backbone with layers [first, end) of its model.

    Attributes:
        blocks: these layers.
        library_attention: the attention function that the library chose for it, by its name.
        rotary: its rotary embeddings whose frequencies depend on lengths.
    """

    def __init__(self, layers: LayerList, config: PreTrainedConfig, first: int, end: int, *, embedding_size: int) -> None:
        """
        Args:
            layers: all of the model's; those of the span are loaded.
            config: the model's.
            embedding_size: width of what the backbone takes for embeddings.
        """
        self.blocks = list(layers.layers)[first:end]
        self.rotary = RotaryRegimes(layers.owner)
        self.library_attention: str | None = config._attn_implementation
        self._list = layers
        self._first = first
        self._hidden_size: int = config.hidden_size
        self._embedding_size = embedding_size
        self._config = quiet(config)
        # Attention modules and the backbone look into the configuration for the attention function, at every pass anew.
        self._configs = configurations_of(self.blocks)
        self._attention = self.library_attention
        self._active: tuple[int, int] | None = None
        self._shown: list[nn.Module] = []
        self._edges: list[torch.utils.hooks.RemovableHandle] = []
        self._entering: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []
        self._activate(first, end)

    def run(
        self,
        first: int,
        end: int,
        hidden: torch.Tensor,
        arguments: dict[str, Any],
        *,
        attention: str | None,
        adding: Sequence[Hook] = (),
        all_hidden: bool = False,
        position_end: int | None = None,
        shares: Sequence[Share] = (),
        dropout: Dropout | None = None,
    ) -> list[torch.Tensor]:
        """Run layers [first, end).

        Args:
            hidden: [rows, length, hidden], what enters the first of them.
            arguments: of the backbone's `forward`.
            attention: the name of the attention function.
            adding: a hook for each layer, or none.
            all_hidden: whether the outputs of all layers are wanted, not only of the last.
            position_end: see `RotaryRegimes.begin`.
            shares, dropout: see `adapters.apply_adapters`.
        Returns:
            outputs [rows, length, hidden].
        """
        self._activate(first, end)
        self._attend_with(attention)
        self.rotary.begin(position_end)
        if self._embedding_size == self._hidden_size:
            arguments["inputs_embeds"] = hidden.detach()
        else:
            arguments["inputs_embeds"] = hidden.new_zeros(()).expand(*hidden.shape[:2], self._embedding_size)
        handles: list[torch.utils.hooks.RemovableHandle] = []
        if adding or all_hidden:
            handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block, hook in zip(self._shown, adding, strict=False)]
            if all_hidden:
                handles += [block.register_forward_hook(self._leave) for block in self._shown[:-1]]
        self._entering, self._outputs = hidden, []
        try:
            if shares:
                handles += apply_adapters(enumerate(self._shown, first), shares, (hidden.shape[0], hidden.shape[1]), dropout)
            self._list.owner(**arguments)
            return self._outputs
        finally:
            self._entering, self._outputs = None, []
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What reaches the first layer becomes what was received."""
        return with_hidden(self._entering, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._outputs.append(output[0] if isinstance(output, tuple) else output)

    def _activate(self, first: int, end: int) -> None:
        """Show the backbone only layers [first, end), and a configuration that fits them."""
        if self._active == (first, end):
            return
        self._shown = self.blocks[first - self._first : end - self._first]
        self._list.replace(nn.ModuleList(self._shown))
        self._shown_config = slice_config(self._config, first, end)
        self._shown_config._attn_implementation = self._attention
        self._list.owner.config = self._shown_config
        for handle in self._edges:
            handle.remove()
        self._edges = [
            self._shown[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            self._shown[-1].register_forward_hook(self._leave),
        ]
        self._active = (first, end)

    def _attend_with(self, name: str | None) -> None:
        """Choose the attention function for the passes that follow."""
        if name == self._attention:
            return
        for config in (*self._configs, self._shown_config):
            config._attn_implementation = name
        self._attention = name
