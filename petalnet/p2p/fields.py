"""What messages are made of: checked fields, arrays as they lie on the wire, and the registry of message types. Sans-IO, free of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from petalnet.errors import ProtocolError
from petalnet.p2p.frames import Buffer

MAX_DIMENSIONS = 6
MAX_DIMENSION = 1 << 31
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
FLOATS = ("float32", "float16", "bfloat16")
CODECS = ("raw", "bfloat16", "float16", "int8")
INT8_BLOCK = 64
"""Elements that share one scale in the blockwise int8 codec (64 as in QLoRA's smallest block, arXiv:2305.14314)."""


@dataclass(frozen=True, slots=True)
class Blob:
    """An array as it lies on the wire.

    Attributes:
        dtype: what the receiver gets, one of `ITEM_SIZES`.
        shape: its dimensions.
        codec: "raw" (the bytes of dtype, little-endian, C order), "bfloat16" or "float16" (rounded), or "int8" (blockwise: one float32
            scale for each `INT8_BLOCK` elements of the flattened array, all scales first, then the int8 values).
        data: the bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    codec: str
    data: Buffer


def blob_size(dtype: str, shape: Sequence[int], codec: str) -> int:
    """Bytes that an array of this description takes on the wire. Raises ProtocolError where the description makes no sense."""
    if dtype not in ITEM_SIZES or codec not in CODECS:
        raise ProtocolError(f"unknown array type {dtype!r} or codec {codec!r}")
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < MAX_DIMENSION for n in shape):
        raise ProtocolError("an array has too many or impossible dimensions")
    count = math.prod(shape)
    if codec == "raw":
        return count * ITEM_SIZES[dtype]
    if dtype not in FLOATS:
        raise ProtocolError(f"codec {codec} is for floating-point arrays, not {dtype}")
    return count + 4 * -(-count // INT8_BLOCK) if codec == "int8" else 2 * count


Check = Callable[[Any], Any]


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high} is needed")
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            raise ValueError(f"a number from {low} to {high} is needed")
        return float(value)

    return check


def text(longest: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > longest:
            raise ValueError(f"a text of at most {longest} characters is needed")
        return value

    return check


def octets(longest: int) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) > longest:
            raise ValueError(f"at most {longest} bytes are needed")
        return value

    return check


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false is needed")
    return value


def many(check: Check, most: int) -> Check:
    def check_all(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) > most:
            raise ValueError(f"a list of at most {most} entries is needed")
        return tuple(check(entry) for entry in value)

    return check_all


def scalar(check: Check, default: Any = MISSING) -> Any:
    return field(metadata={"check": check}) if default is MISSING else field(default=default, metadata={"check": check})


def array(optional: bool = False) -> Any:
    metadata = {"blob": True}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


MESSAGE_TYPES: dict[str, type[Message]] = {}
M = TypeVar("M", bound="type[Message]")


class Message:
    """Base of all messages.

    Attributes:
        name: the type's name on the wire.
        layout: its fields in their order: the name, the check of a scalar (None for an array), and whether it may not be missing.
    """

    name: ClassVar[str]
    layout: ClassVar[tuple[tuple[str, Callable[[Any], Any] | None, bool], ...]]
    __slots__ = ()


def message_type(name: str) -> Callable[[M], M]:
    def register(cls: M) -> M:
        cls.name = name
        cls.layout = tuple(
            (item.name, None if "blob" in item.metadata else item.metadata["check"], item.default is MISSING)
            for item in fields(cls)  # type: ignore[arg-type]
        )
        MESSAGE_TYPES[name] = cls
        return cls

    return register


def size_of(message: Message) -> int:
    """Bytes of a message's arrays."""
    blobs = [getattr(message, name) for name, check, _ in message.layout if check is None]
    return sum([len(blob.data) for blob in blobs if blob is not None])


def decode_blob(description: Any, payload: memoryview, offset: int) -> tuple[Blob, int]:
    if (
        type(description) is not list
        or len(description) != 3
        or type(description[0]) is not str
        or type(description[1]) is not list
        or type(description[2]) is not str
    ):
        raise ProtocolError("the description of an array is malformed")
    dtype, shape, codec = description
    size = blob_size(dtype, shape, codec)
    if offset + size > len(payload):
        raise ProtocolError("an array is larger than the payload that should hold it")
    data = payload[offset : offset + size]
    if offset % 16:  # the payload itself is aligned; what does not begin at a multiple of 16 is moved to where tensors may lie
        data = memoryview(bytearray(data))
    return Blob(dtype, tuple(shape), codec, data), offset + size
