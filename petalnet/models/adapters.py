"""LoRA adapters in PEFT's format (adapter_config.json and adapter_model.safetensors), from a folder or a hub repository.

Only what the servers of a swarm can apply is taken: plain LoRA for linear layers within the model's blocks. Whatever else an adapter may
be made of is refused when it is opened, in one line, rather than left out. The format's own library is not needed for it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from petalnet.errors import ModelError
from petalnet.models.anatomy import find_layers, linear_shapes
from petalnet.models.checkpoint import ModelSource, open_files
from petalnet.models.files import read_header

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DIGEST_CHARS = 16
"""Characters of an adapter's digest in its label: 64 bits, by which servers with different adapters of one name are told apart."""
MOST_NAME = 128 - 1 - DIGEST_CHARS
"""Characters of an adapter's name: a record carries labels of at most 128."""
POSSIBLE = "servers apply plain LoRA for linear layers in the model's blocks (rslora, rank_pattern and alpha_pattern included)"

_HARMLESS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"),
        *("corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config", "lora_dropout", "runtime_config"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "megatron_config", "megatron_core"),
        *("alpha_pattern", "ensure_weight_tying", "fan_in_fan_out", "lora_alpha", "qalora_group_size", "r", "rank_pattern", "use_rslora"),
    )
)
"""Settings that are read here, or do not change what a trained adapter computes. Any other one may, unless it is off."""
_CHANGES_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise that change the model's own weights, on which the adapter then rests."""
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True)
class _Layer:
    """Where the two matrices for a layer are in the file, the memory that they take in float32, and by what the product is multiplied."""

    a: str
    b: str
    nbytes: int
    scaling: float


class AdapterSource:
    """A LoRA adapter that fits a model.

    Attributes:
        name: the hub repository's id, or the name of the folder.
        digest: BLAKE3 of what decides what it computes, in hex.
        num_blocks: of the model.
        layers: by the number of a block and a layer's path in it, in order.
    """

    def __init__(self, name: str, file: Path, digest: str, num_blocks: int, layers: Mapping[int, Mapping[str, _Layer]]) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self.digest = digest
        self.layers = layers
        self._file = file

    @classmethod
    def open(
        cls, name_or_path: str | Path, model: ModelSource, *, token: str | bool | None = None, cache_dir: str | Path | None = None
    ) -> AdapterSource:
        """Find an adapter and check that it can be applied to a model, as far as its configuration and the shapes of its tensors show.

        Raises:
            ModelError: there is none, or servers cannot apply it; the message is one line.
        """
        name, files = open_files(name_or_path, token=token, cache_dir=cache_dir)
        if not name.isprintable() or not name.strip() or len(name) > MOST_NAME:
            raise ModelError(f"an adapter's name has 1 to {MOST_NAME} printable characters, not {name!r}: rename the folder")
        config_file, file = files.file(CONFIG_FILE), files.file(WEIGHTS_FILE)
        if config_file is None:
            raise ModelError(f"{name} has no {CONFIG_FILE}: not an adapter in PEFT's format")
        config = _read_config(name, config_file)
        if file is None:
            only_pickle = f"has only {PICKLE_FILE}, which is a pickle and can run code: save it with safetensors"
            raise ModelError(f"adapter {name} {only_pickle if files.file(PICKLE_FILE) else f'has no {WEIGHTS_FILE}'}")
        try:
            header = read_header(file)
            shapes = {key: info.shape for key, info in header.items()}
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ModelError(f"{WEIGHTS_FILE} of adapter {name} is not a safetensors file: {error}") from error
        anatomy = _Anatomy(model)
        layers = _sorted_layers(name, config, shapes, anatomy)
        return cls(name, file, _digest(config, file), len(anatomy.shapes), layers)

    def nbytes(self, first: int, end: int) -> int:
        """Memory that the matrices for blocks [first, end) take."""
        return sum(layer.nbytes for block in range(first, end) for layer in self.layers.get(block, {}).values())

    @cached_property
    def label(self) -> str:
        """What servers announce and requests name: the name, "@" and the beginning of the digest."""
        return f"{self.name}@{self.digest[:DIGEST_CHARS]}"

    def load(self, first: int, end: int) -> dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """A [r, in] and B [out, r] for the layers of blocks [first, end), in float32 on the CPU; scaling is part of B.

        Raises:
            ModelError: the file cannot be read, or has numbers that are not finite.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        blocks: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        try:
            with safe_open(self._file, framework="pt") as opened:
                for block in range(first, end):
                    blocks[block] = {
                        path: (opened.get_tensor(layer.a).float(), opened.get_tensor(layer.b).float() * layer.scaling)
                        for path, layer in self.layers.get(block, {}).items()
                    }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{WEIGHTS_FILE} of adapter {self.name} cannot be read: {error}") from error
        if not all(bool(torch.isfinite(matrix).all()) for layers in blocks.values() for pair in layers.values() for matrix in pair):
            raise ModelError(f"{WEIGHTS_FILE} of adapter {self.name} has numbers that are not finite")
        return blocks


class _Anatomy:
    """What names of modules mean in a model."""

    def __init__(self, source: ModelSource) -> None:
        from transformers import AutoModelForCausalLM

        from petalnet.models.loading import checkpoint_dtype, construct, resolve_class

        config = deepcopy(source.config)
        model = construct(resolve_class(AutoModelForCausalLM, config), config, checkpoint_dtype(source))
        found = find_layers(model)
        without_head = found.path.removeprefix(f"{model.base_model_prefix}.")
        self.model_name = source.name
        self._paths = (found.path, without_head)
        self.shapes = [linear_shapes(block) for block in found.layers]

    def block_of(self, module: str) -> tuple[int, str] | None:
        """A block's number and the path of a module in it; None for a module that is in no block."""
        for path in self._paths:
            match = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.+)", module)
            if match and int(match[1]) < len(self.shapes):
                return int(match[1]), match[2]
        return None


def _read_config(name: str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{CONFIG_FILE} of adapter {name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{CONFIG_FILE} of adapter {name} is not a table of settings")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"adapter {name} is of type {kind}: {POSSIBLE}")
    if config.get("bias") not in (None, "none"):
        raise ModelError(f"adapter {name} has trained biases (bias={config['bias']!r}): {POSSIBLE}")
    changing = [key for key, value in config.items() if key not in _HARMLESS and key != "bias" and value]
    if changing:
        raise ModelError(f"adapter {name} uses {', '.join(sorted(changing))}: {POSSIBLE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_MODEL):
        raise ModelError(
            f"adapter {name} was begun with {start}, which changes the model's own weights: save it again with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    return config


def _sorted_layers(
    name: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], anatomy: _Anatomy
) -> dict[int, dict[str, _Layer]]:
    """The tensors of a file by the layers that they are for, all checked."""
    pairs: dict[str, dict[str, str]] = {}
    others = []
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
        else:
            pairs.setdefault(match["module"].removeprefix(_PREFIX), {})[match["matrix"]] = key
    layers: dict[int, dict[str, _Layer]] = {}
    for module, pair in pairs.items():
        place = anatomy.block_of(module)
        if place is None:
            raise ModelError(f"adapter {name} changes {module}, which is not in a block of {anatomy.model_name}: {POSSIBLE}")
        block, path = place
        if path not in anatomy.shapes[block]:
            raise ModelError(f"adapter {name} changes {module}, which is no linear layer of {anatomy.model_name}: {POSSIBLE}")
        if pair.keys() != {"A", "B"}:
            raise ModelError(f"adapter {name} lacks one of the two matrices for {module}")
        inputs, outputs = anatomy.shapes[block][path]
        a, b = shapes[pair["A"]], shapes[pair["B"]]
        if len(a) != 2 or len(b) != 2 or not a[0] or a != (a[0], inputs) or b != (outputs, a[0]):
            raise ModelError(
                f"adapter {name} is not for {anatomy.model_name}: {module} maps {inputs} numbers to {outputs} there, its matrices "
                f"are {list(a)} and {list(b)}"
            )
        layers.setdefault(block, {})[path] = _Layer(
            pair["A"], pair["B"], 4 * a[0] * (inputs + outputs), _scaling(name, config, module, a[0])
        )
    if others:
        key = min(others, key=lambda key: "lora_" not in key)  # beside those for an embedding the embedding itself is saved
        raise ModelError(f"adapter {name} has the tensor {key}, which is no part of plain LoRA: {POSSIBLE}")
    if not layers:
        raise ModelError(f"adapter {name} has no tensors")
    order = {path: index for block in anatomy.shapes for index, path in enumerate(block)}
    return {block: dict(sorted(found.items(), key=lambda one: order[one[0]])) for block, found in sorted(layers.items())}


def _scaling(name: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """What the product of a layer's matrices is multiplied by: alpha / r, or alpha / √r with rslora (arXiv:2312.03732).

    A pattern is for the modules whose whole name, or the end of it from a dot on, it matches; the first that does so counts."""
    alpha: Any = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    try:
        alpha = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), alpha)
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ModelError(f"lora_alpha or alpha_pattern of adapter {name} makes no sense: {error}") from error


def _digest(config: Mapping[str, Any], file: Path) -> str:
    settings = {key: config.get(key) for key in ("lora_alpha", "alpha_pattern", "use_rslora")}
    digest = blake3(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(b"\0")
    digest.update_mmap(file)
    return digest.hexdigest()
