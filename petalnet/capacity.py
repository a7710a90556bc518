"""What fits into this machine's memory: how many blocks of a model, and how many KV tokens beside them.

A device here is what `--device` names: one, or several over which the blocks go (see `devices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import psutil
import torch

from petalnet.devices import device_names, memory_of, split_blocks
from petalnet.errors import UsageError
from petalnet.fitting import MOST_KV_TOKENS, WEIGHTS_SHARE, Room
from petalnet.routing.precision import describe_precision

if TYPE_CHECKING:
    from petalnet.blocks.kv import KVShape
    from petalnet.blocks.spread import AnySpan
    from petalnet.models.checkpoint import ModelSource

DEVICE_SHARE = 0.9
"""Of an accelerator's free memory that a node takes by itself: the rest is for the library's own buffers."""
MACHINE_SHARE = 0.5
"""Of a machine's free memory that a node takes by itself: it is shared with everything else that runs there."""
GRAPHS_SHARE = 0.25
"""Of the memory that a node leaves free, what graphs of training passes may take that wait for their backward passes; those of passes that
are computed anew may take as much, and so may captured decoding on a CUDA device."""
FEWEST_KV_TOKENS = 256
"""A server that has no room for a short question and its answer is of no use to anybody."""


def best_device() -> str:
    """The device to compute on where none was asked for."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def require_device(device: str) -> None:
    """Raises UsageError unless this machine, with this build of torch, has the device, or each of several."""
    for name in device_names(device):
        _require_one(name)


def _require_one(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) < count:
            return
        has = f"there are {count} CUDA devices" if count else "there is no CUDA device, or this build of torch cannot use it"
    elif kind == "mps":
        if torch.backends.mps.is_available():
            return
        has = "there is no Metal device"
    else:
        return
    raise UsageError(f"--device {device} is not to be had: {has}; leave --device out for the best there is")


def usable_memory(device: str, most: int | None) -> int:
    """Bytes on a device that a node may take: `most` where it is given, else its share of what is free."""
    return sum(_usable_each(device_names(device), None)) if most is None else most


def _usable_each(devices: Sequence[str], most: int | None) -> list[int]:
    """The same of each of several devices."""
    return memory_of(
        devices, {one: int(_free_memory(one) * (DEVICE_SHARE if one.startswith("cuda") else MACHINE_SHARE)) for one in devices}, most
    )


def _free_each(devices: Sequence[str], most: int | None) -> list[int]:
    """What is free on each, or of `most` its part."""
    return memory_of(devices, {one: _free_memory(one) for one in devices}, most)


def graph_bytes(device: str, most: int | None) -> int:
    """Bytes for graphs of training passes, beside weights and KV tokens; to be asked before memory for the latter is taken.

    Args:
        most: a ceiling that somebody gave for these, of which graphs may take no more than an eighth; None where nobody did.
    """
    left = 1 - (DEVICE_SHARE if device.startswith("cuda") else MACHINE_SHARE)
    wanted = int(sum(_free_each(device_names(device), None)) * left * GRAPHS_SHARE)
    return wanted if most is None else min(wanted, most // 8)


def recording_bytes(device: str, most: int | None) -> int:
    """Bytes on a device for decoding that is captured (see `blocks.captured`), beside all the rest; arguments as of `graph_bytes`."""
    return graph_bytes(device, most) if device.startswith("cuda") else 0


def left_for_blocks(most: int | None, device: str, *, captures: bool, adapter_bytes: int = 0) -> int | None:
    """Of a ceiling that somebody gave, what is for weights and KV tokens; None where nobody did: what is free is looked at then.

    Args:
        device: one, or several as `--device` names them.
        captures: whether decoding may be captured.
        adapter_bytes: what adapters beside the blocks take.
    """
    if most is None:
        return None
    recorded = sum(recording_bytes(one, most) for one in device_names(device)) if captures else 0
    return max(most - adapter_bytes - recorded, 1)


def _free_memory(device: str) -> int:
    """Bytes that nobody uses: of a CUDA device, else of the machine."""
    return int(torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available)


def block_sizes(source: ModelSource, dtype: torch.dtype, quantization: str = "none") -> list[int]:
    """Bytes that the weights of each block of a model take in a dtype, with linear layers quantized. Reads no weights."""
    from transformers import AutoModel

    from petalnet.blocks.quantization import quantize_layers, stored_bytes
    from petalnet.models.anatomy import find_layers
    from petalnet.models.loading import construct, resolve_class

    config = deepcopy(source.config)
    layers = find_layers(construct(resolve_class(AutoModel, config), config, dtype)).layers
    quantize_layers(layers, quantization)
    return [stored_bytes(layer, dtype) for layer in layers]


def blocks_that_fit(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: str,
    max_memory: int | None,
    quantization: str = "none",
    kv_tokens: int | None = None,
) -> int:
    """How many consecutive blocks of a model fit, wherever they lie in it, beside so many KV tokens (see `Room.blocks`); at most all.

    Raises:
        UsageError: not even one does.
    """
    sizes = block_sizes(source, dtype, quantization)
    room = room_for(source, max(sizes), dtype=dtype, device=device, max_memory=max_memory)
    count = min(room.blocks(kv_tokens), len(sizes))
    if count == 0:
        there = max(room.devices) * (WEIGHTS_SHARE if kv_tokens is None else 1)
        what = "weights" if kv_tokens is None else f"it and {kv_tokens} KV tokens"
        flags = "--max-memory, --dtype, --quantization" + ("" if kv_tokens is None else ", --attn-cache-tokens")
        raise UsageError(
            f"no block of {source.name} fits: one takes {room.block / 1e9:.2f} GB in {describe(dtype, quantization)}, and "
            f"{there / 1e9:.2f} GB of {device} memory are there for {what} ({flags})"
        )
    return count


def room_for(source: ModelSource, block_bytes: int, *, dtype: torch.dtype, device: str, max_memory: int | None) -> Room:
    """What the memory of a node's devices has to hold where a block's weights take so much."""
    from petalnet.models.anatomy import text_config

    kept = 0 if device.startswith("cuda") else text_config(source.config).hidden_size * dtype.itemsize
    kv = max(shape.bytes(dtype) for shape in kv_shapes(source))
    return Room(tuple(_usable_each(device_names(device), max_memory)), block_bytes, kv, kept)


def kv_shapes(source: ModelSource) -> list[KVShape]:
    """What a position takes in each block of a model. Reads no weights."""
    from transformers import AutoModel

    from petalnet.blocks.kv import KVShape
    from petalnet.blocks.span import Span
    from petalnet.models.anatomy import text_config
    from petalnet.models.loading import construct, resolve_class

    config = deepcopy(source.config)
    text = text_config(config)
    try:  # without numbers, in the dtype for which all layers have a way to compute; shapes do not depend on it
        model = construct(resolve_class(AutoModel, config), config, torch.bfloat16)
        return Span(model, 0, text.num_hidden_layers, dtype=torch.bfloat16, device=torch.device("meta")).kv_shapes
    except Exception:
        # The family's own code raises whatever it raises where it looks at numbers that are not there. Most have these fields.
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return [KVShape(heads, size, size)] * text.num_hidden_layers


def describe(dtype: torch.dtype, quantization: str) -> str:
    """A precision as people are told: "float32", "bfloat16/nf4"."""
    return describe_precision(str(dtype).removeprefix("torch."), quantization)


def require_room(
    source: ModelSource, first: int, end: int, *, dtype: torch.dtype, device: str, max_memory: int | None, quantization: str = "none"
) -> None:
    """Raises UsageError, with how many blocks would fit, where blocks [first, end) are larger than the memory that is free.

    Looked at before anything is loaded: a CPU's memory is not refused when it is asked for, the machine ends the process later.
    """
    devices = device_names(device)
    sizes = block_sizes(source, dtype, quantization)[first:end]
    for count, free in zip(split_blocks(sizes, _usable_each(devices, max_memory)), _free_each(devices, max_memory), strict=True):
        if sum(sizes[:count]) <= free:
            sizes = sizes[count:]
            continue
        raise too_large(source, first, end, dtype=dtype, device=device, max_memory=max_memory, quantization=quantization)


def too_large(
    source: ModelSource, first: int, end: int, *, dtype: torch.dtype, device: str, max_memory: int | None, quantization: str = "none"
) -> UsageError:
    """What to tell the person who asked for blocks [first, end), which do not fit; it names a number of blocks that would.

    Raises:
        UsageError: not even one does.
    """
    sizes = block_sizes(source, dtype, quantization)[first:end]
    fitting = blocks_that_fit(source, dtype=dtype, device=device, max_memory=max_memory, quantization=quantization)
    fit = min(fitting, max(len(sizes) - 1, 1))
    return UsageError(
        f"blocks {first}:{end} of {source.name} do not fit into the memory of {device}: their weights take {sum(sizes) / 1e9:.2f} GB in "
        f"{describe(dtype, quantization)}; {fit} block{'s' * (fit != 1)} would fit: --serve {fit}"
    )


def spread(
    source: ModelSource, first: int, end: int, *, dtype: torch.dtype, quantization: str, device: str, max_memory: int | None
) -> list[int]:
    """How many of blocks [first, end) go to each of the devices, by the memory that there is on each (`devices.split_blocks`)."""
    devices = device_names(device)
    if len(devices) == 1:
        return [end - first]
    return split_blocks(block_sizes(source, dtype, quantization)[first:end], _usable_each(devices, max_memory))


def kv_tokens(span: AnySpan, source: ModelSource, *, device: str, max_memory: int | None, wanted: int | None) -> int:
    """Positions of KV cache to make room for beside a loaded span: `wanted`, or as many as fit. Each has an output beside it that the
    machine's memory keeps, whatever the device.

    Raises:
        UsageError: there is no room for them; the message says what would fit.
    """
    kept_bytes = span.hidden_size * span.dtype.itemsize
    own_memory = device.startswith("cuda")  # apart from the machine's
    stages, devices = span.stages, device_names(device)
    if len(stages) < len(devices):  # some are not needed
        devices = [str(stage.device) for stage in stages]
    each = (_usable_each if wanted is None or max_memory is not None else _free_each)(devices, max_memory)
    if max_memory is not None:  # what is free on the device was counted with the weights in it, a ceiling was not
        sizes = block_sizes(source, span.dtype, span.quantization)
        each = [memory - sum(sizes[stage.first : stage.end]) for memory, stage in zip(each, stages, strict=True)]
    # A row has as many positions on each device.
    beside_kv = 0 if own_memory else -(-kept_bytes // len(stages))
    fit = min(max(memory, 0) // max(stage.kv_bytes_per_token + beside_kv, 1) for memory, stage in zip(each, stages, strict=True))
    where = f"on {device}"
    fewer = "raise --max-memory or serve fewer blocks" if max_memory is not None else "serve fewer blocks"
    if own_memory:
        kept = int(_free_memory("cpu") * (MACHINE_SHARE if wanted is None else 1)) // kept_bytes
        if kept < fit:
            fit, where = kept, "in the machine's memory, which keeps the outputs that sessions push,"
            fewer = "leave more of the machine's memory free"
    if wanted is None and fit >= FEWEST_KV_TOKENS:
        return min(fit, MOST_KV_TOKENS)
    if wanted is not None and fit >= wanted:
        return wanted
    beside = f"beside blocks {span.first}:{span.end} {where} there is memory for {fit} KV tokens"
    if wanted is None:
        raise UsageError(f"{beside}, which is too little to serve anybody: {fewer}")
    raise UsageError(f"{beside}, not for {wanted}: give a smaller --attn-cache-tokens, or {fewer}")
