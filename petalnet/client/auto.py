"""The Auto classes: from a model's name to the distributed class, or configuration, of its family."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from petalnet.client.loading import SOURCE_ARGUMENTS, join, load_model, open_base
from petalnet.client.remote import make_target
from petalnet.client.requests import Target
from petalnet.client.saving import TrainedPart
from petalnet.client.settings import SETTING_NAMES, ClientSettings, attributes_of, take_settings
from petalnet.errors import ModelError
from petalnet.models.anatomy import text_config
from petalnet.models.checkpoint import ModelSource
from petalnet.models.lean import quiet_bitsandbytes

quiet_bitsandbytes()


class _AutoDistributed:
    """Base of the Auto classes for models, which are never instantiated."""

    library_class: Any

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(name)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `DistributedModel.from_pretrained`, for whatever family the model is of."""
        return load_model(cls.library_class, pretrained_model_name_or_path, config=config, **kwargs)


class AutoDistributedModel(_AutoDistributed):
    """A model without a head: hidden states in the end."""

    library_class = AutoModel


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """A language model."""

    library_class = AutoModelForCausalLM


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """A classifier on top of a model; its head is trainable, and new where the checkpoint has none."""

    library_class = AutoModelForSequenceClassification


class AutoDistributedConfig:
    """Configurations that carry what `from_pretrained` of a model may be told about its swarm, as attributes."""

    def __init__(self) -> None:
        raise TypeError("AutoDistributedConfig is made by AutoDistributedConfig.from_pretrained(name)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A model's configuration, of the distributed class of its family.

        Args:
            kwargs: `revision`, `token`, `cache_dir`, `max_disk_space`, settings of `ClientSettings`, and attributes of the configuration to
                change.
        """
        origin = {name: kwargs.pop(name) for name in SOURCE_ARGUMENTS if name in kwargs}
        trained = TrainedPart.open(pretrained_model_name_or_path)
        name_or_path, _, config = open_base(pretrained_model_name_or_path, origin, trained, kwargs.pop("base_model", None))
        carry(config, take_settings(kwargs, defaults=None if trained is None else trained.settings), name_or_path)
        for name, value in kwargs.items():
            setattr(config, name, value)
        return config


class DistributedConfig:
    """What the distributed configuration classes add: the settings as attributes, which are about this machine and not saved."""

    initial_peers: Any = None
    allowed_servers: Any = None
    blocked_servers: Any = None
    server_dtype: Any = None
    quantization: Any = None
    request_timeout: Any = None
    connect_timeout: Any = None
    max_retries: Any = None
    show_route: Any = None
    speculation: Any = None
    direct_chains: Any = None
    wire_precision: Any = None
    kept_graphs: Any = None
    active_adapter: Any = None
    tuning_mode: Any = None
    pre_seq_len: Any = None
    swarm_key: Any = None
    dht_prefix: Any = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {name: value for name, value in values.items() if name not in SETTING_NAMES and name != "dht_prefix"}


def distributed_config_class(library_class: Any) -> Any:
    """The distributed version of a configuration class of the library; of a distributed class, itself."""
    return library_class if issubclass(library_class, DistributedConfig) else _make_config_class(library_class)


@functools.cache
def _make_config_class(library_class: Any) -> Any:
    attributes = {"library_class": library_class, "__module__": "petalnet.client.families"}
    return type(f"Distributed{library_class.__name__}", (DistributedConfig, library_class), attributes)


def carry(config: Any, settings: ClientSettings, name_or_path: Any) -> None:
    """Make a configuration of the library a distributed one that carries the settings."""
    config.__class__ = distributed_config_class(type(config))
    for name in SETTING_NAMES:
        value = getattr(settings, name)
        setattr(config, name, sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value)
    config.name_or_path = str(name_or_path)
    if config.dht_prefix is None:
        config.dht_prefix = str(name_or_path).rstrip("/").rpartition("/")[2]


def plain_config(config: Any) -> Any:
    """A copy of a configuration as one of the library's own class, without settings."""
    config = deepcopy(config)
    for name in [*attributes_of(config), "dht_prefix"]:
        vars(config).pop(name, None)
    if isinstance(config, DistributedConfig):
        config.__class__ = type(config).library_class  # type: ignore[attr-defined]
    return config


def open_target(config: Any, settings: ClientSettings) -> tuple[Target, int]:
    """All blocks of the model that a configuration is of, and its hidden size."""
    name = getattr(config, "name_or_path", None)
    if not name:
        raise ModelError("the configuration does not say which model it is of: make it with AutoDistributedConfig.from_pretrained(name)")
    swarm = join(settings)
    source = ModelSource.open(name)
    decoder = text_config(source.config)
    return make_target(swarm, model_key(source), decoder.num_hidden_layers, settings), decoder.hidden_size


def model_key(source: ModelSource) -> str:
    """The key under which the servers of a model are found."""
    from petalnet.models.identity import model_key as key

    return key(source)
