"""petalnet: large language models run and fine-tuned by many small machines together.

The public Python API is here, and is imported when it is first used: `import petalnet` alone loads none of torch, transformers, libp2p.

A map of the package: `client` makes models whose layers are remote, `blocks` serves layers, `p2p` is the network (the only importer of
libp2p), `routing` decides who serves and which way to go, `models` knows Hugging Face models, `http` is a daemon's local web side, `node`
composes them, `cli` is the command line, `config` every setting, `errors` what can go wrong.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

from petalnet.version import __version__ as __version__

_FAMILIES = ("Bloom", "Falcon", "Llama", "Mixtral")
"""Those whose classes are listed; `Distributed…` of any other class of transformers is made when it is asked for."""
_PARTS = ("Config", "ForCausalLM", "ForSequenceClassification", "Model")
_HOMES = {
    "AutoDistributedConfig": "petalnet.client.auto",
    "AutoDistributedModel": "petalnet.client.auto",
    "AutoDistributedModelForCausalLM": "petalnet.client.auto",
    "AutoDistributedModelForSequenceClassification": "petalnet.client.auto",
    **{f"Distributed{family}{part}": "petalnet.client.families" for family in _FAMILIES for part in _PARTS},
    "InferenceSession": "petalnet.client.session",
    "RemoteSequential": "petalnet.client.remote",
    "get_remote_module": "petalnet.client.remote",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from petalnet.client.auto import (
        AutoDistributedConfig as AutoDistributedConfig,
    )
    from petalnet.client.auto import (
        AutoDistributedModel as AutoDistributedModel,
    )
    from petalnet.client.auto import (
        AutoDistributedModelForCausalLM as AutoDistributedModelForCausalLM,
    )
    from petalnet.client.auto import (
        AutoDistributedModelForSequenceClassification as AutoDistributedModelForSequenceClassification,
    )
    from petalnet.client.remote import RemoteSequential as RemoteSequential
    from petalnet.client.remote import get_remote_module as get_remote_module
    from petalnet.client.session import InferenceSession as InferenceSession


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name, "petalnet.client.families" if name.startswith("Distributed") else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Looking for garbage takes a seventh of the time of importing torch and transformers, which leave none.
    collecting = gc.isenabled()
    gc.disable()
    try:
        value = globals()[name] = getattr(importlib.import_module(home), name)
    finally:
        if collecting:
            gc.enable()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
