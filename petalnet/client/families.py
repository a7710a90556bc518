"""The named classes: `DistributedBloomForCausalLM` and so on, for every class of `transformers`, made when they are asked for."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from petalnet.client.auto import distributed_config_class
from petalnet.client.distributed import distributed_class

PREFIX = "Distributed"


def __getattr__(name: str) -> Any:
    library_class = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(library_class, type) and issubclass(library_class, PreTrainedModel):
        return distributed_class(library_class)
    if isinstance(library_class, type) and issubclass(library_class, PreTrainedConfig):
        return distributed_config_class(library_class)
    raise AttributeError(f"transformers has no model or configuration class of which {name!r} would be the distributed one")
