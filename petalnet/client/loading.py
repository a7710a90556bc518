"""From a model's name to a distributed model: the swarm is joined while the local part is read."""

from __future__ import annotations

import logging
import sys
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from petalnet.client.distributed import distribute
from petalnet.client.generation import longest_of
from petalnet.client.placeholders import placeholders
from petalnet.client.remote import RemoteSequential, make_target
from petalnet.client.saving import Origin, TrainedPart, as_fields, trained_names
from petalnet.client.settings import ClientSettings, take_settings
from petalnet.client.swarm import Swarm
from petalnet.client.tuning import add_prompts, backbone_of
from petalnet.config import resolve_access, resolve_initial_peers
from petalnet.errors import ModelError, UsageError
from petalnet.models.checkpoint import ModelSource

if TYPE_CHECKING:
    from petalnet.models.anatomy import LayerList

logger = logging.getLogger(__name__)

SOURCE_ARGUMENTS = ("revision", "token", "cache_dir", "max_disk_space")
IGNORED_ARGUMENTS = {
    "low_cpu_mem_usage": (True, False, None),
    "trust_remote_code": (False, None),
    "use_safetensors": (True, None),
    "local_files_only": (False, None),
    "force_download": (False, None),
    "_from_auto": (True, False),
}
"""Arguments of the library's `from_pretrained` that say what is done here anyway, and the values for which that is so."""


class _Console(logging.Handler):
    """Lines on standard error, for as long as the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(f"petalnet: {self.format(record)}", file=sys.stderr)


def show_log() -> None:
    """Let routes, retries and warnings reach the terminal of a program that has set up no logging of its own."""
    package = logging.getLogger("petalnet")
    if not package.handlers and package.level == logging.NOTSET:
        package.addHandler(_Console())
        package.setLevel(logging.INFO)


def join(settings: ClientSettings) -> Swarm:
    """The swarm that the settings name, or that is found without; see `resolve_initial_peers` and `resolve_access`."""
    access = resolve_access(settings.swarm_key, daemon=settings.initial_peers is None)
    return Swarm(resolve_initial_peers(settings.initial_peers), access)


def load_model(model_class: Any, name_or_path: Any, *, config: Any = None, **kwargs: Any) -> Any:
    """A distributed model; arguments as `DistributedModel.from_pretrained`.

    Args:
        model_class: a class or an Auto class of the library.
    """
    trained = TrainedPart.open(name_or_path)
    settings = take_settings(kwargs, config, None if trained is None else trained.settings)
    if settings.show_route:
        show_log()
    swarm = join(settings)
    try:
        return _load(swarm, settings, model_class, name_or_path, trained, config, kwargs)
    except BaseException:  # whatever it is goes on, and leaves no membership behind
        swarm.close()
        raise


def _load(
    swarm: Swarm,
    settings: ClientSettings,
    model_class: Any,
    name_or_path: Any,
    trained: TrainedPart | None,
    config: Any,
    kwargs: dict[str, Any],
) -> Any:
    from petalnet.client.auto import carry, model_key, plain_config
    from petalnet.models.anatomy import find_layers, text_config
    from petalnet.models.loading import build, checkpoint_dtype, config_for, pick_dtype, resolve_class

    origin = {name: kwargs.pop(name) for name in SOURCE_ARGUMENTS if name in kwargs}
    name_or_path, source, plain = open_base(name_or_path, origin, trained, kwargs.pop("base_model", None))
    if trained is not None and kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
        kwargs["dtype"] = trained.dtype
    dtype = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs.pop("dtype")
    kwargs.pop("dtype", None)
    kwargs.pop("torch_dtype", None)
    dtype = checkpoint_dtype(source) if dtype in (None, "auto") else pick_dtype(str(dtype).removeprefix("torch."), source)
    device = _device(kwargs.pop("device_map", None))
    plain = plain if config is None else plain_config(config)
    _apply(plain, kwargs)
    library_class = resolve_class(model_class, plain)
    plain = config_for(library_class, plain)
    expected = getattr(library_class, "config_class", None)
    if expected is not None and not isinstance(plain, expected):
        raise ModelError(f"{source.name} is a {plain.model_type} model, which Distributed{library_class.__name__} is not for")
    longest = longest_of(text_config(plain))
    if settings.tuning_mode is not None and longest is not None and settings.pre_seq_len >= longest:
        raise UsageError(f"pre_seq_len={settings.pre_seq_len} leaves no room for tokens: {source.name} was made for {longest} positions")
    num_blocks, key = text_config(plain).num_hidden_layers, model_key(source)
    vocabulary, base_vocabulary = text_config(plain).vocab_size, text_config(source.config).vocab_size
    if trained is not None:
        trained.check_base(source.name, key)
        text_config(plain).vocab_size = base_vocabulary
    blocks = RemoteSequential(make_target(swarm, key, num_blocks, settings), text_config(plain).hidden_size)
    built = build(
        library_class,
        source,
        config=plain,
        dtype=dtype,
        device=device,
        prepare=lambda model: _replace_layers(find_layers(model), blocks, device),
    )
    model = built.model
    heads = _head_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in built.missing or name in heads)
    distribute(model)
    if text_config(plain).vocab_size != vocabulary:  # as `resize_token_embeddings` left it before what was trained was saved
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    backbone, new = backbone_of(model), set(built.missing)
    if settings.tuning_mode is not None:
        add_prompts(backbone, settings.tuning_mode, settings.pre_seq_len, num_blocks, blocks.hidden_size)
    if trained is not None:
        strange = trained.load_into(model)
        new -= trained.parameters.keys()
        if strange:
            logger.warning("not used, since a %s has no place for them: %s", type(model).__name__, ", ".join(sorted(strange)))
    if new:
        logger.warning("newly initialised, since %s does not have them: %s", source.name, ", ".join(sorted(new)))
    name = str(source.folder or source.name)
    always = trained_names(model, () if trained is None else trained.parameters)
    backbone.origin = Origin(name, origin.get("revision"), key, base_vocabulary, as_fields(source.config), always)
    if model.can_generate():
        model.generation_config = _generation_config(source, model.generation_config)
    carry(plain, settings, name_or_path)
    model.name_or_path = str(name_or_path)
    return model


def open_base(name_or_path: Any, origin: dict[str, Any], trained: TrainedPart | None, base_model: Any) -> tuple[Any, ModelSource, Any]:
    """The model of a name or, where a trained part has that name, the one that it was trained with.

    Args:
        origin: arguments of `ModelSource.open`; gets the revision that the trained part names.
        base_model: where the base model is, in place of what the trained part says.
    Returns:
        its name or path, its source, and a copy of its configuration, with what the trained part has changed in it.
    """
    if trained is None:
        if base_model is not None:
            raise UsageError(f"base_model is for folders with a trained part, which {name_or_path} is not")
        _refuse_adapter(name_or_path)
        source = ModelSource.open(name_or_path, **origin)
        return name_or_path, source, deepcopy(source.config)
    if base_model is None:
        origin.setdefault("revision", trained.revision)
    base = trained.base if base_model is None else base_model
    try:
        source = ModelSource.open(base, **origin)
    except ModelError as error:
        raise ModelError(f"{trained.folder} is the trained part of a model that is not there (give base_model=): {error}") from error
    return base, source, trained.changed(source.config)


def _refuse_adapter(name_or_path: Any) -> None:
    """Raises ModelError where a folder is an adapter as a `PeftModel` saves it, which does not say of which bytes its base model is."""
    folder = Path(name_or_path).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{name_or_path} is an adapter alone, as a PeftModel saves it: load its base model, "
            f"and then put it on that with PeftModel.from_pretrained(model, {str(folder)!r})"
        )


def _head_parameters(model: Any) -> set[str]:
    """Names of the parameters on top of the backbone that make a classifier or the like of it; a language model has none such."""
    if model.get_output_embeddings() is not None or model.base_model is model:
        return set()
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}


def _replace_layers(layers: LayerList, blocks: RemoteSequential, device: torch.device) -> None:
    blocks.__dict__["template"] = layers.layers[0]
    blocks.hold(placeholders(layers.layers, device))
    layers.replace(blocks)


def _apply(config: Any, kwargs: dict[str, Any]) -> None:
    """What is left of the arguments: attributes of the configuration to change. Raises TypeError for anything else."""
    for name, value in kwargs.items():
        if name in IGNORED_ARGUMENTS:
            if value not in IGNORED_ARGUMENTS[name]:
                raise ValueError(f"{name}={value!r} is not possible for a distributed model")
        elif name == "attn_implementation":
            config._attn_implementation = value
        elif hasattr(config, name):
            setattr(config, name, value)
        else:
            raise TypeError(f"from_pretrained has no argument {name!r}, and the model's configuration no such attribute")


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cpu" if device_map is None else device_map)


def _generation_config(source: ModelSource, default: Any) -> Any:
    """The generation settings that lie beside the model; `default` where there are none."""
    from transformers import GenerationConfig

    file = source.file("generation_config.json")
    return default if file is None else GenerationConfig.from_pretrained(file.parent)
