"""Who a model is: names are labels, bytes decide.

A tensor's digest is BLAKE3 over its dtype, shape and bytes as the checkpoint stores them; a set's digest is BLAKE3 over the sorted pairs
of canonical name and tensor digest. Canonical names do not depend on whether a checkpoint was saved with or without a head, or how it
was cut into files. The key of a model, under which its servers are found, is made of its configuration and its client part: both sides
know these before they meet. Of the client part, which servers do not need, samples are digested in place of all bytes: they tell models
apart that have nothing to do with each other, or whose embeddings were trained, and a server reads some 100 KB of a hub for it in place of
gigabytes. Blocks are always digested as a whole. Digests of tensors are remembered for each file by path, size and time of change, or by
what the hub says of its content.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from petalnet.models.anatomy import Partition, partition
from petalnet.models.cachedir import load_facts, store_facts
from petalnet.models.files import file_fingerprint

if TYPE_CHECKING:
    from io import FileIO

    from transformers import PreTrainedConfig, PreTrainedModel

    from petalnet.models.checkpoint import ModelSource
    from petalnet.models.files import LocalTensor

WHOLE_SAMPLE_BYTES, WINDOW_BYTES = 64 * 1024, 16 * 1024
"""Tensors up to the first size are their own samples; of larger ones four windows of the second are."""
VOLATILE_FIELDS = frozenset(
    (
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
        *("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
        *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
    )
)
"""Fields of a configuration that do not change what a model computes: versions, paths, how it is run, labels of a task."""
READ_BYTES = 2**22
"""Bytes of a file that are read at a time."""


def config_hash(config: PreTrainedConfig) -> str:
    """BLAKE3 of a configuration without its volatile fields, in hex. Fields at their default do not count, written out or not."""
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in VOLATILE_FIELDS}
    return blake3(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def model_key(source: ModelSource) -> str:
    """The key under which a model's servers are found: config hash and client part's digest, hashed to 64 hex digits.

    Raises:
        ModelError: the model cannot be split, or its files cannot be read.
    """
    return key_of(config_hash(source.config), client_digest(source))


def key_of(config: str, client: str) -> str:
    """The key of a model, of its configuration's hash and its client part's digest."""
    return blake3(f"{config}:{client}".encode()).hexdigest()


def client_digest(source: ModelSource) -> str:
    """The digest of samples of what belongs to no layer: embeddings, final norm, head (where it is not the embeddings again)."""
    model = empty_model(source)
    parts = partition(model, source.tensor_names())
    prefix = model.base_model_prefix + "."
    tied = {name.removeprefix(prefix) for name in model.all_tied_weights_keys}
    names = {name: name.removeprefix(prefix) for name in parts.client}
    wanted = {name: short for name, short in names.items() if short not in tied}
    digests = _sample_digests(source, wanted)
    return digest_of_set({short: digests[name] for name, short in wanted.items()})


def block_digests(source: ModelSource, parts: Partition, first: int, end: int) -> list[str]:
    """The digests of blocks [first, end)."""
    digests = []
    for index in range(first, end):
        prefix = parts.prefixes[index]
        found = _tensor_digests(source, parts.blocks[index])
        digests.append(digest_of_set({name.removeprefix(prefix): digest for name, digest in found.items()}))
    return digests


def sample_windows(nbytes: int) -> tuple[tuple[int, int], ...]:
    """Which bytes [start, end) of a tensor of this many are its sample: all where they are few, else at its start, thirds and end."""
    if nbytes <= WHOLE_SAMPLE_BYTES:
        return ((0, nbytes),)
    last = nbytes - WINDOW_BYTES
    return tuple((start, start + WINDOW_BYTES) for start in (0, last // 3, last * 2 // 3, last))


def empty_model(source: ModelSource) -> PreTrainedModel:
    """The model with its head, on meta."""
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    from petalnet.models.loading import checkpoint_dtype, construct, resolve_class

    config = deepcopy(source.config)
    return construct(resolve_class(AutoModelForCausalLM, config), config, checkpoint_dtype(source))


def digest_of_set(digests: Mapping[str, str]) -> str:
    """The digest of a set of tensors, of theirs by canonical name."""
    whole = blake3()
    for canonical, digest in sorted(digests.items()):
        whole.update(f"{canonical}\0{digest}\n".encode())
    return whole.hexdigest()


def digest_of_tensor(tensor: LocalTensor) -> str:
    """The digest of a tensor in a file of this machine. Blocks: reads all of it. Raises OSError."""
    with tensor.path.open("rb", buffering=0) as stream:
        return _digest_in(stream, tensor, memoryview(bytearray(min(READ_BYTES, tensor.end - tensor.start))))


def _sample_digests(source: ModelSource, names: Collection[str]) -> dict[str, str]:
    digests: dict[str, str] = {}
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(source.files.fingerprint(name), []).append(name)
    for fingerprint, inside in by_file.items():
        key = blake3(fingerprint.encode()).hexdigest()
        known: dict[str, Any] = load_facts("sample-digests", key)
        lacking = [name for name in inside if not isinstance(known.get(name), str)]
        if lacking:
            infos = {name: source.info(name) for name in lacking}
            samples = source.files.sample({name: sample_windows(info.nbytes) for name, info in infos.items()})
            for name, info in infos.items():
                known[name] = blake3(_described(info.dtype, info.shape) + samples[name]).hexdigest()
            store_facts("sample-digests", key, known)
        digests.update({name: known[name] for name in inside})
    return digests


def _described(dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{dtype}\0{list(shape)}\0".encode()


def _tensor_digests(source: ModelSource, names: Collection[str]) -> dict[str, str]:
    by_file: dict[Path, dict[str, LocalTensor]] = {}
    for name, tensor in source.local(names).items():
        by_file.setdefault(tensor.path, {})[name] = tensor
    digests: dict[str, str] = {}
    for file, tensors in by_file.items():
        digests.update(_digests_in_file(file, tensors))
    return digests


def _digests_in_file(file: Path, tensors: dict[str, LocalTensor]) -> dict[str, str]:
    key = blake3(file_fingerprint(file).encode()).hexdigest()
    known: dict[str, Any] = load_facts("tensor-digests", key)
    lacking = [name for name in tensors if not isinstance(known.get(name), str)]
    if lacking:
        # Read, not mapped: what is mapped counts as memory of this process while it is looked at.
        with file.open("rb", buffering=0) as stream:
            buffer = memoryview(bytearray(READ_BYTES))
            for name in lacking:
                known[name] = _digest_in(stream, tensors[name], buffer)
        store_facts("tensor-digests", key, known)
    return {name: known[name] for name in tensors}


def _digest_in(stream: FileIO, tensor: LocalTensor, buffer: memoryview) -> str:
    digest = blake3(_described(tensor.dtype, tensor.shape), max_threads=blake3.AUTO)
    stream.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        read = stream.readinto(buffer[:left])
        if not read:
            raise OSError(f"{tensor.path} has become shorter")
        digest.update(buffer[:read])
        left -= read
    return digest.hexdigest()
