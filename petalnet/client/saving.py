"""The trained part of a distributed model as a folder: what was trained, and of which model it is a part.

    model.safetensors           trained parameters by their names; `Trainer` resumes from it
    petalnet.json               the base model (name and digest), settings, what was changed in its configuration, which of the parameters
                                are to be trained on
    adapter_config.json, …      PEFT's own files of an adapter, for whoever reads such; where there are several, all but "default" in
                                folders of their names

There is no config.json: the folder is no model by itself, and nobody should take it for one. All files are written aside and then renamed,
so that a disk that is full or a process that ends leaves the folder as it was.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from petalnet.client.tuning import backbone_of
from petalnet.errors import ModelError, UsageError
from petalnet.models.anatomy import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "petalnet.json"
KEPT_SETTINGS = ("tuning_mode", "pre_seq_len", "active_adapter")
"""Settings that are about what was trained; all others are about this machine and its swarm."""
_PASSING_FIELDS = frozenset(("_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"))
"""Fields of a configuration that are not saved as changes of it: others say them, or nobody asks."""
_ADAPTER_NAME = re.compile(r"\w[\w-]*")


@dataclass(frozen=True)
class Origin:
    """What a distributed model was made of; its backbone has it as `origin`.

    Attributes:
        name: of the base model: a hub id, or a whole path.
        revision: of the repository; None where none was asked for.
        key: the base model's key (`identity.model_key`), which serves as its digest.
        vocabulary: size of the base model's vocabulary.
        config: the base model's configuration, as a dictionary.
        trained: names of parameters that are trained ones whether they require gradients or not, without the backbone's own name in front.
    """

    name: str
    revision: str | None
    key: str
    vocabulary: int
    config: Mapping[str, Any] = field(repr=False)
    trained: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TrainedPart:
    """A folder that `save` has written, or another process half of.

    Attributes:
        folder: where it is.
        base, revision, key: as of its model's origin.
        dtype: name of the dtype of the model's local part.
        settings: those of `KEPT_SETTINGS` that it had.
        config: fields of the configuration that differ from the base model's.
        parameters: names of the trained parameters, and whether they are to be trained on.
        adapters: names of PEFT adapters, and where beneath the folder each one is.
        active: those of them that are in use.
    """

    folder: Path
    base: str
    revision: str | None
    key: str
    dtype: str
    settings: dict[str, Any]
    config: dict[str, Any]
    parameters: dict[str, bool]
    adapters: dict[str, str]
    active: list[str]

    @classmethod
    def open(cls, path: Any) -> TrainedPart | None:
        """What a path or name leads to; None where that is no trained part.

        Raises:
            ModelError: it is a damaged one, or one of a newer format.
        """
        folder = Path(path).expanduser() if isinstance(path, str | os.PathLike) else None
        if folder is None or not (folder / DESCRIPTION_FILE).is_file():
            return None
        try:
            said = json.loads((folder / DESCRIPTION_FILE).read_text())
            if said["format"] != FORMAT:
                raise ModelError(f"{folder} was saved in format {said['format']} by another version of petalnet; this one reads {FORMAT}")
            base = said["base"]
            part = cls(
                folder,
                _is(str, base["name"]),
                _is((str, type(None)), base["revision"]),
                _is(str, base["key"]),
                _is(str, said["dtype"]),
                {name: value for name, value in said["settings"].items() if name in KEPT_SETTINGS},
                _is(dict, said["configuration"]),
                {name: bool(trainable) for name, trainable in said["parameters"].items()},
                _places([_is(str, name) for name in _is(list, said["adapters"])]),
                [name for name in said["active_adapters"] if name in said["adapters"]],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{folder / DESCRIPTION_FILE} is damaged: {type(error).__name__}: {error}") from error
        for name in part.adapters:
            _check_adapter_name(name)
        return part

    def changed(self, config: Any) -> Any:
        """A copy of the base model's configuration, with what was changed in it. Raises ModelError where it is none any more."""
        try:
            return type(config).from_dict({**config.to_dict(), **self.config})
        except Exception as error:  # the library checks fields by classes of errors of its own
            raise ModelError(f"{self.folder / DESCRIPTION_FILE} is damaged: {_one_line(error)}") from error

    def check_base(self, name: str, key: str) -> None:
        """Raises ModelError where the model of this name has another digest than the one that was trained."""
        if key != self.key:
            raise ModelError(
                f"{self.folder} was trained with the model {self.base} of digest {self.key[:16]}, and {name} is another one ({key[:16]})"
            )

    def load_into(self, model: PreTrainedModel) -> list[str]:
        """Put the trained parameters, and the adapters that they belong to, into a model.

        Returns:
            names in the file that the model has no place for.
        Raises:
            ModelError: the file is damaged, or a parameter has another shape.
        """
        self._inject_adapters(model)
        try:
            tensors = load_file(self.folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.folder / WEIGHTS_FILE} cannot be read: {_one_line(error)}") from error
        lacking = self.parameters.keys() - tensors.keys()
        if lacking:
            raise ModelError(f"{self.folder / WEIGHTS_FILE} lacks {min(lacking)}")
        present = {_canonical(model, name): parameter for name, parameter in model.named_parameters()}
        strange = []
        for name, tensor in tensors.items():
            parameter = present.get(_canonical(model, name))
            if parameter is None:
                strange.append(name)
                continue
            if parameter.shape != tensor.shape:
                raise ModelError(f"{name} of {self.folder} has the shape {list(tensor.shape)}, and {list(parameter.shape)} in the model")
            with torch.no_grad():
                parameter.copy_(tensor)
            parameter.requires_grad_(self.parameters.get(name, True))
        return strange

    def _inject_adapters(self, model: Any) -> None:
        if not self.adapters:
            return
        try:
            from peft import PeftConfig, inject_adapter_in_model
        except ImportError as error:
            raise UsageError(f"{self.folder} holds a PEFT adapter, which needs the package peft: pip install 'petalnet[train]'") from error

        for name, place in self.adapters.items():
            folder = self.folder / place
            if not (folder / "adapter_config.json").is_file():
                raise ModelError(f"{folder} lacks adapter_config.json")
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = False
            inject_adapter_in_model(config, model, name)
        model._hf_peft_config_loaded = True
        if self.active:
            model.set_adapter(self.active)


def trained_names(model: PreTrainedModel, before: Iterable[str]) -> frozenset[str]:
    """Of a model that was just loaded, the names that are always saved, as in `Origin.trained`: those that require gradients now, and those
    that were trained `before`."""
    now = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return frozenset(_canonical(model, name) for name in (*before, *now))


def trained_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of a distributed model that are saved: all that require gradients, those of PEFT adapters, those that were trained
    before, and those of another size than the base model's."""
    known = backbone_of(model).origin.trained
    adapters, resized = _adapter_parameters(model), _resized_parameters(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in adapters or id(parameter) in resized or _canonical(model, name) in known
    }


def save(model: Any, folder: str | os.PathLike[str], state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the trained part of a distributed model into a folder, which is made where it is not there.

    Args:
        state_dict: where values are to be taken from in place of the model's own; what is not trained is left out.
    Raises:
        UsageError: nothing of the model was trained, or the folder is something else.
        OSError: it cannot be written; what was in the folder is still there.
    """
    folder, origin, settings = Path(folder), backbone_of(model).origin, model.remote_blocks.target.settings
    parameters = trained_parameters(model)
    if not parameters:
        raise UsageError(
            "nothing of this model was trained, so there is nothing to save: set requires_grad, add an adapter or load it with tuning_mode="
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; a trained part is saved as a folder")
    adapters = _adapters_of(model)
    description = {
        "format": FORMAT,
        "base": {"name": origin.name, "revision": origin.revision, "key": origin.key},
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": {name: getattr(settings, name) for name in KEPT_SETTINGS},
        "configuration": _changes(origin.config, as_fields(model.config)),
        "parameters": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "adapters": sorted(adapters),
        "active_adapters": next((list(module.active_adapters) for module in _adapter_modules(model).values()), []),
    }
    values = _values(parameters, state_dict or {})
    folder.mkdir(parents=True, exist_ok=True)
    with _aside(folder) as aside:
        _write_tensors(values, aside / WEIGHTS_FILE)
        for name, place in _places(adapters).items():
            _write_adapter(model, name, values, aside / place)
        (aside / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder for files, which are put in their places once all of them are there and on the disk."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
        yield Path(aside)
        files = [path for path in Path(aside).rglob("*") if path.is_file()]
        for path in files:
            with path.open("rb") as written:
                os.fsync(written.fileno())
        for path in files:
            place = folder / path.relative_to(aside)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _write_adapter(model: Any, name: str, values: Mapping[str, torch.Tensor], folder: Path) -> None:
    """An adapter as PEFT itself writes it."""
    from peft import get_peft_model_state_dict

    folder.mkdir(exist_ok=True)
    state = get_peft_model_state_dict(model, state_dict=dict(values), adapter_name=name, save_embedding_layers=False)
    _write_tensors({f"base_model.model.{key}": value for key, value in state.items()}, folder / "adapter_model.safetensors")
    model.peft_config[name].save_pretrained(str(folder))


def _values(parameters: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters' values, on the CPU, each with memory of its own."""
    values: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in parameters.items():
        value = given.get(name, parameter)
        if value.shape != parameter.shape:
            raise UsageError(f"the state_dict has {name} of shape {list(value.shape)}, and the model of {list(parameter.shape)}")
        value = value.detach().to("cpu").contiguous()
        memory = value.untyped_storage().data_ptr()
        values[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return values


def _adapters_of(model: Any) -> dict[str, Any]:
    """PEFT's configurations of the adapters that a model has, by their names."""
    adapters: dict[str, Any] = dict(getattr(model, "peft_config", None) or {})
    for name in adapters:
        _check_adapter_name(name)
    return adapters


def _adapter_modules(model: Any) -> dict[str, Any]:
    """The modules that PEFT has put into a model, by their paths."""
    if not _adapters_of(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)}


def _adapter_parameters(model: Any) -> set[str]:
    """Names of all parameters that adapters have brought into a model."""
    return {
        f"{path}.{name}"
        for path, module in _adapter_modules(model).items()
        for name, _ in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }


def _resized_parameters(model: Any) -> set[int]:
    """Ids of the embeddings' and the head's parameters where tokens were added to the vocabulary, or taken from it."""
    if text_config(model.config).vocab_size == backbone_of(model).origin.vocabulary:
        return set()
    modules = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _check_adapter_name(name: str) -> None:
    if not _ADAPTER_NAME.fullmatch(name):
        raise UsageError(f"an adapter called {name!r} cannot be saved: names are of letters, digits, _ and -")


def _places(adapters: Iterable[str]) -> dict[str, str]:
    """Where beneath the folder each adapter is: one of them in the folder itself, as PEFT has it."""
    names = list(adapters)
    return {name: "" if name == "default" or len(names) == 1 else name for name in names}


def as_fields(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it."""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return fields


def _changes(base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _PASSING_FIELDS and (name not in base or base[name] != value)}


def _canonical(model: Any, name: str) -> str:
    """A parameter's name as it is in the backbone alone."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of the kind that is expected there")
    return value
