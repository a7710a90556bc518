"""Where a decoder can be cut: its list of layers, and which tensors of a checkpoint belong to which layer.

A decoder is embeddings, a list of layers, and a final norm with a head. The list is found by its shape, not by its name: the
`ModuleList` of `num_hidden_layers` entries under the model's decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from petalnet.errors import ModelError
from petalnet.models.prequantized import weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LayerList:
    """The list of layers inside a model.

    Attributes:
        path: dotted path from the model to the list, e.g. "transformer.h" or "model.layers".
        owner: the module that holds the list and whose `forward` runs it.
        name: the list's attribute name in its owner.
        layers: the list itself.
    """

    path: str
    owner: nn.Module
    name: str
    layers: nn.ModuleList

    def replace(self, layers: nn.Module) -> None:
        """Put `layers` where the list is."""
        setattr(self.owner, self.name, layers)


@dataclass(frozen=True)
class Partition:
    """The tensor names of a checkpoint, as they stand in its files, by who needs them.

    Attributes:
        client: embeddings, final norm, head: all that is in no layer. Layers beyond the model's number of them are nobody's.
        blocks: for each layer its tensors.
        prefixes: for each layer what its tensors' names begin with, the layer's number included ("transformer.h.3.").
    """

    client: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    prefixes: tuple[str, ...]


def find_layers(model: PreTrainedModel) -> LayerList:
    """The list of layers of a model, with or without a head.

    Raises:
        ModelError: there is no such list, or several that could be it.
    """
    config = text_config(model.config)
    count = config.num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = model if decoder is None else decoder
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    found = [
        (f"{prefix}.{name}" if prefix else name)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not _inside_list(name)
    ]
    shortest = min((path.count(".") for path in found), default=0)
    found = [path for path in found if path.count(".") == shortest]
    if len(found) != 1:
        what = f"several lists of {count} layers ({', '.join(found)})" if found else f"no list of {count} layers"
        raise ModelError(f"a {config.model_type} model cannot be split into blocks: it has {what}")
    parent, _, name = found[0].rpartition(".")
    owner = model.get_submodule(parent)
    return LayerList(found[0], owner, name, getattr(owner, name))


def linear_shapes(block: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer within a block, by its path there."""
    from transformers.pytorch_utils import Conv1D

    return {
        path: (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (module.weight.shape[0], module.nf)
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the decoder: the model's own, or that of its text part where the model has several parts."""
    return config.get_text_config(decoder=True)


def partition(model: PreTrainedModel, names: Iterable[str]) -> Partition:
    """Sort the tensor names of a checkpoint by who needs them.

    Args:
        model: any model of the checkpoint's family, with or without a head, on any device (meta will do).
        names: names as they stand in the checkpoint: with or without the base model's prefix, and in the layout of the files, which for
            some families (mixture of experts) is not that of the modules.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    layers = find_layers(model)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    in_model = re.compile(re.escape(layers.path) + r"\.(\d+)\.")
    in_file = re.compile(r"(?:.*?\.)??" + re.escape(layers.name) + r"\.(\d+)\.")
    client: list[str] = []
    blocks: list[list[str]] = [[] for _ in layers.layers]
    prefixes = [""] * len(blocks)
    for name in sorted(names):
        renamed, _ = rename_source_key(weight_of(name, model.config), renamings, converters, model.base_model_prefix, known)
        match = in_model.match(renamed)
        if match is None or int(match[1]) >= len(blocks):
            client.append(name)
            continue
        index = int(match[1])
        blocks[index].append(name)
        written = in_file.match(name)
        prefixes[index] = written[0] if written and written[1] == match[1] else ""
    # Layers for guessing further tokens (multi-token prediction), which the library does not run.
    beyond = {prefix.removesuffix(f"{index}.") for index, prefix in enumerate(prefixes) if prefix}
    client = [name for name in client if not any(re.match(re.escape(prefix) + r"\d+\.", name) for prefix in beyond)]
    return Partition(tuple(client), tuple(map(tuple, blocks)), tuple(prefixes))


def _inside_list(name: str) -> bool:
    """Whether a module's path runs through an entry of some list: such a list is part of a layer, not the list of layers."""
    return any(part.isdigit() for part in name.split("."))
