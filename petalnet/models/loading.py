"""Build a Hugging Face model with only some of its weights.

The model is constructed on the meta device (no memory, no initialisation), then exactly the wanted tensors are put in, through the
library's own conversion of checkpoint layouts. What is not wanted is left as the caller says: on meta, initialised as the library
initialises what a checkpoint lacks (new heads), or zeros that take no memory. Buffers (rotary frequencies and the like) are always
computed.

A tensor that stays as the checkpoint has it is mapped from its file. What is converted is read when its turn comes and let go at once: a
server that converts what it loads would else hold its blocks twice. A module that keeps weights in a form of its own (see `TakesWeight`)
is handed its weight the moment that it is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from petalnet.errors import ModelError
from petalnet.models.anatomy import Partition, partition
from petalnet.models.mapped import give_back_freed, torch_dtypes
from petalnet.models.prequantized import rounded_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from petalnet.models.checkpoint import ModelSource

Model = TypeVar("Model", bound="PreTrainedModel")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Built:
    """A model and what became of its weights.

    Attributes:
        model: the model, in evaluation mode; loaded parameters do not require gradients, newly initialised ones do.
        partition: the checkpoint's tensor names, by who needs them.
        loaded: parameters (and persistent buffers) that were filled from the checkpoint, by their names in the model.
        missing: parameters that got nothing from it, either not wanted or not there; tied ones are not among them.
    """

    model: Any
    partition: Partition
    loaded: frozenset[str]
    missing: frozenset[str]


def resolve_class(auto_or_model_class: type, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class for a configuration: an Auto class is looked up (which imports that family's module only).

    Raises:
        ModelError: the family has no such class.
    """
    mapping = getattr(auto_or_model_class, "_model_mapping", None)
    if mapping is None:
        return auto_or_model_class
    try:
        found = mapping[type(config)]
    except KeyError as error:
        raise ModelError(f"{config.model_type} models have no {auto_or_model_class.__name__} class") from error
    return found[0] if isinstance(found, (tuple, list)) else found


def config_for(model_class: type, config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration to make a class's models with: that of the text part where the class is of text alone and the model of more."""
    expected = getattr(model_class, "config_class", None)
    text = config.get_text_config(decoder=True)
    return text if expected is not None and not isinstance(config, expected) and isinstance(text, expected) else config


def pick_dtype(asked: str | torch.dtype | None, source: ModelSource, device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype to run a model in.

    Args:
        asked: a dtype or its name; "auto" or None means the checkpoint's, but float32 where the device has no fast arithmetic for it.
        source: the model.
        device: where it will run.
    """
    if isinstance(asked, torch.dtype):
        return asked
    if asked not in (None, "auto"):
        if asked not in DTYPES:
            raise ModelError(f"unknown dtype {asked!r}: use auto, {', '.join(DTYPES)}")
        return DTYPES[asked]
    dtype = checkpoint_dtype(source)
    if torch.device(device).type == "cpu" and not (dtype == torch.bfloat16 and _cpu_has_bfloat16()):
        return torch.float32
    return dtype


def checkpoint_dtype(source: ModelSource) -> torch.dtype:
    """The dtype of a checkpoint's weights, as its configuration says or else as its first floating-point tensor has."""
    named = source.config.dtype
    if isinstance(named, str):
        named = DTYPES.get(named.removeprefix("torch."))
    if isinstance(named, torch.dtype):
        return named
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    kinds = (source.info(name).dtype for name in source.tensor_names())
    return next((stored[kind] for kind in kinds if kind in stored), torch.float32)


_LIBRARY_PATCHED = threading.Lock()
"""While a model is constructed, the library's classes have no `tie_weights`; of two threads that do it at once, one would put back what the
other one took away."""


def construct(model_class: type[Model], config: PreTrainedConfig, dtype: torch.dtype) -> Model:
    """A model on the meta device: all of its modules, no weights, nothing initialised, nothing tied yet."""
    config = config_for(model_class, config)
    try:
        model = _construct(model_class, config, dtype, _Sparing())
    except RuntimeError:
        model = _construct(model_class, config, dtype, nullcontext())  # a family that mixes ranges with tensors on meta
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    config.dtype = dtype
    return model.eval()


def _construct(model_class: type[Model], config: PreTrainedConfig, dtype: torch.dtype, mode: AbstractContextManager[Any]) -> Model:
    with _LIBRARY_PATCHED, ExitStack() as stack:
        for context in (*model_class.get_init_context(dtype, False, False, None), mode):
            stack.enter_context(context)
        return model_class(config)


def build(
    model_class: type[Model],
    source: ModelSource,
    *,
    config: PreTrainedConfig | None = None,
    names: Iterable[str] | Callable[[Partition], Iterable[str]] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prepare: Callable[[Model], None] | None = None,
    others: Literal["meta", "initialise", "zeros"] = "initialise",
) -> Built:
    """Build a model and load only some of its tensors.

    Args:
        model_class: a model class or an Auto class of the library; a subclass of one will do.
        source: where configuration and tensors come from.
        config: used in place of the source's (a copy of that is made otherwise).
        names: the wanted tensors by their names in the checkpoint, or a function that picks them; None means the client's part, which is
            all that belongs to no layer.
        dtype, device: of the loaded parameters.
        prepare: called with the model while it is on meta and before anything is loaded, e.g. to replace its list of layers.
        others: what becomes of the parameters that are not loaded: left on "meta", "initialise" as the library does for those that a
            checkpoint lacks, or expanded "zeros" that take no memory.
    Raises:
        ModelError: the tensors do not fit the model.
    """
    from copy import deepcopy

    config = deepcopy(source.config) if config is None else config
    model = construct(resolve_class(model_class, config), config, dtype)
    parts = partition(model, source.tensor_names())
    wanted = parts.client if names is None else names(parts) if callable(names) else names
    if prepare is not None:
        prepare(model)
    missing = load_tensors(model, _tensors(model, source, tuple(wanted), dtype, torch.device(device)), dtype=dtype, device=device)
    give_back_freed()
    state = model.state_dict(keep_vars=True)
    loaded = frozenset(name for name in state if name not in missing)
    with _LIBRARY_PATCHED:
        model.tie_weights(missing_keys=set(missing))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    finish(model, device=device, others=others)
    tied = frozenset(model.all_tied_weights_keys)
    return Built(model, parts, loaded, frozenset(missing) - tied)


def _tensors(model: nn.Module, source: ModelSource, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Tensors of a checkpoint, for `load_tensors`: mapped where they stay as they are, else to be read, or to be made."""
    from transformers.pytorch_utils import Conv1D

    source.local(names)  # all at once, where they have to be fetched
    rounded = rounded_weights(source, names, transposed=any(isinstance(module, Conv1D) for module in model.modules()))
    parts = {part for one in rounded.values() for part in one.parts.values()}
    stays = device.type == "cpu" and not _takers(model)
    plain = [name for name in names if name not in parts]
    kept = [name for name in plain if stays and torch_dtypes().get(source.info(name).dtype) == dtype]
    mapped = source.read(kept)
    read = {name: mapped[name] if name in mapped else _Unread(partial(source.read_copy, name)) for name in plain}
    return read | {name: _Unread(partial(one.read, source, dtype)) for name, one in rounded.items()}


class _Unread:
    """A tensor of a checkpoint that is read where the library slices it, which is when its turn comes."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read()[index]


class TakesWeight(Protocol):
    """A module of a model that makes something else of the tensor of its `weight`."""

    def take_weight(self, weight: torch.Tensor) -> nn.Parameter:
        """What becomes the parameter: made of what the checkpoint has, in the dtype that it has there, on the module's device."""


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Any], *, dtype: torch.dtype, device: str | torch.device = "cpu") -> set[str]:
    """Put checkpoint tensors into a model, renamed and converted as the library does it for the family.

    Args:
        tensors: by their names in the checkpoint; or what becomes one where it is sliced by `[...]`.
    Returns:
        names of the model's parameters and persistent buffers that got nothing.
    Raises:
        ModelError: a tensor has another shape than the model, or a conversion failed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    takers = _takers(model)
    load_config = LoadStateDictConfig(
        hf_quantizer=_HandOver() if takers else None,
        dtype=None if takers else dtype,  # without one, what is not handed over is converted to the dtype that its parameter has on meta
        device_map={"": torch.device(device)},
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    with _NoProgressBar():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), load_config)
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys)[0]
        raise ModelError(f"the tensor {name} has the shape {tuple(found)} where the configuration says {tuple(expected)}")
    if info.conversion_errors or info.error_msgs:
        raise ModelError(f"tensors cannot be converted: {[*info.conversion_errors.values(), *info.error_msgs][0]}")
    return set(info.missing_keys)


def _takers(model: nn.Module) -> bool:
    """Whether there are modules that make something else of their weights."""
    return any(hasattr(module, "take_weight") for module in model.modules())


class _HandOver:
    """Where the library would have weights quantized: hands them to the modules that take them.

    What it is asked is the library's protocol of a quantizer. Where there is one, the library reads tensors one after the other, else some
    at a time.
    """

    pre_quantized = False

    def param_needs_quantization(self, model: nn.Module, name: str, **_: Any) -> bool:
        owner, leaf = _owner(model, name)
        return leaf == "weight" and hasattr(owner, "take_weight")

    def get_quantize_ops(self) -> _HandOver:
        return self

    def convert(self, tensors: dict[str, Any], *, model: nn.Module, **_: Any) -> dict[str, torch.Tensor]:
        """From parameters' names and tensors, each perhaps in a list, to what becomes these parameters."""
        converted = {}
        for name in list(tensors):
            value = tensors.pop(name)
            value = value[0] if isinstance(value, list) else value
            owner = _owner(model, name)[0]
            converted[name] = owner.take_weight(value) if self.param_needs_quantization(model, name) else value  # type: ignore[operator]
        return converted


def finish(model: PreTrainedModel, *, device: str | torch.device, others: Literal["meta", "initialise", "zeros"]) -> None:
    """Give every parameter that is still on meta what `others` says (see `build`), and compute the buffers that no checkpoint holds."""
    persistent = model.state_dict().keys()
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        if others == "meta":
            parameter._is_hf_initialized = True
            continue
        if id(parameter) not in made:  # tied parameters are one object and stay one
            made[id(parameter)] = _stand_in(parameter, device, zeros=others == "zeros")
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, made[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and (name not in persistent or others != "meta"):
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    # The library computes buffers where it initialises weights; what was loaded is marked as initialised and left alone.
    model.initialize_weights()


def _stand_in(parameter: nn.Parameter, device: str | torch.device, *, zeros: bool) -> nn.Parameter:
    """In place of a parameter on meta: an expanded zero, or memory that the library is still to initialise."""
    if zeros:
        filled = nn.Parameter(torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape), requires_grad=False)
        filled._is_hf_initialized = True  # type: ignore[attr-defined]
        return filled
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), requires_grad=parameter.is_floating_point())


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX; Arm's BF16 extension is not told by torch)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _Sparing(TorchFunctionMode):
    """On meta, for this thread: skip torch's own initialisation of new modules, and make ranges on the CPU.

    What is computed from ranges when a model is made are tables of positions, a few KB that are computed again in the end. On meta, torch
    does both by way of its compiler, whose import takes longer than all the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.arange:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _NoProgressBar:
    """Silence the library's "Loading weights" bar, which would be drawn for every part that is loaded."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.was_active = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging

        if self.was_active:
            logging.enable_progress_bar()
