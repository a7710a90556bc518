"""What goes through blocks beside the hidden states, and cutting it along the tokens. Pure: arrays as they lie on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from petalnet.client.lora import Lora
from petalnet.errors import ProtocolError
from petalnet.p2p.fields import Blob, blob_size
from petalnet.p2p.session_messages import KEEP_NONE, NAME_BYTES, UNIT_TOKENS, Step
from petalnet.p2p.tensors import decode_tensor

Names = tuple[tuple[bytes, ...], ...]
"""For each row the names of its units, in their order."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What goes through blocks beside the hidden states; see `session_messages.Step` for shapes. `prompts` is for all blocks of the target.

    `keep`, `promise_rows` and `names` are for sessions only; `names` are those of the units that the step completes, None where these have
    none. The last four are for passes only: see `pass_messages.Forward`.
    """

    mask: Blob | None = None
    position_ids: Blob | None = None
    prompts: Blob | None = None
    all_hidden: bool = False
    keep: int = 0
    promise_rows: int = 0
    names: Names | None = None
    lora: Lora | None = None
    seed: int = 0
    row: int = 0
    reach: int = 0


def steps_of(
    hidden: Blob, position: int, order: Blob | None, inputs: Inputs, *, number: int, ends: Sequence[int], reach: int = 0
) -> list[Step]:
    """The steps, one after another, that are the same as one step over all tokens.

    Args:
        hidden: [rows, new, hidden].
        position: KV entries before the first of these tokens; `inputs.names` begin with the unit that it lies in.
        number: of the first step; the others count on.
        ends: for each step one past its last new token, ascending; the last one is `new`.
        reach: as in `Step`, where these tokens are themselves only the rest of what belongs together.
    Returns:
        each with the prompts for all blocks of the target, which only the first one has.
    """
    new = hidden.shape[1]
    if len(ends) == 1:
        names = None if inputs.names is None else encode_names(inputs.names)
        return [
            Step(
                step=number,
                position=position,
                hidden=hidden,
                mask=inputs.mask,
                position_ids=inputs.position_ids,
                prompts=inputs.prompts,
                order=order,
                all_hidden=inputs.all_hidden,
                keep=inputs.keep,
                promise_rows=inputs.promise_rows,
                names=names,
                reach=reach,
            )
        ]
    reach = reach or reach_of(position, new, inputs)
    steps: list[Step] = []
    start = 0
    for end in ends:
        is_first = not steps
        steps.append(
            Step(
                step=number + len(steps),
                position=position + start,
                hidden=columns(hidden, start, end),
                mask=None if inputs.mask is None else columns(inputs.mask, 0, position + end),
                position_ids=None if inputs.position_ids is None else columns(inputs.position_ids, start, end),
                prompts=inputs.prompts if is_first else None,
                order=order if is_first else None,
                all_hidden=inputs.all_hidden,
                keep=_kept(inputs.keep, start, end, new),
                promise_rows=inputs.promise_rows if is_first else 0,
                names=_names_of(inputs.names, position, position + start, position + end),
                reach=reach,
            )
        )
        start = end
    return steps


def reach_of(position: int, new: int, inputs: Inputs) -> int:
    """One past the last position of new tokens: less than their KV entries where rows are padded."""
    return position + new if inputs.position_ids is None else int(decode_tensor(inputs.position_ids).max()) + 1


def wanted_tokens(request: Step) -> int:
    """Of how many tokens a step's outputs are wanted of the last server."""
    return 0 if request.keep == KEEP_NONE else request.keep or request.hidden.shape[1]


def columns(blob: Blob, start: int, end: int) -> Blob:
    """Entries [start, end) along the second dimension; without a copy where the array has one row. Not for codec int8."""
    rows, length = blob.shape[:2]
    if (start, end) == (0, length):
        return blob
    if blob.codec == "int8":
        raise ProtocolError("an array of codec int8 cannot be cut")
    size = blob_size(blob.dtype, blob.shape[2:], blob.codec)
    data = memoryview(blob.data)
    parts = [data[(row * length + start) * size : (row * length + end) * size] for row in range(rows)]
    return replace(blob, shape=(rows, end - start, *blob.shape[2:]), data=parts[0] if rows == 1 else bytearray().join(parts))


def encode_names(names: Names) -> Blob:
    """uint8 [rows, units, NAME_BYTES]."""
    return Blob("uint8", (len(names), len(names[0]), NAME_BYTES), "raw", b"".join(name for row in names for name in row))


def _kept(keep: int, start: int, end: int, new: int) -> int:
    """`Step.keep` of new tokens [start, end), where the last `keep` of all `new` ones are wanted (0: all)."""
    wanted = end - max(start, new - keep) if keep else end - start
    return KEEP_NONE if wanted <= 0 else wanted if wanted < end - start else 0


def _names_of(names: Names | None, position: int, start: int, end: int) -> Blob | None:
    """Names of the units that KV entries [start, end) complete, where `names` begin with the unit that `position` lies in."""
    begin, stop = start // UNIT_TOKENS, end // UNIT_TOKENS
    if names is None or begin == stop:
        return None
    base = position // UNIT_TOKENS
    return encode_names(tuple(row[begin - base : stop - base] for row in names))


def is_finite(output: Blob, mask: Blob | None) -> bool:
    """Whether an answer [blocks if all of them, rows, kept, hidden] holds numbers, padding aside.

    Args:
        mask: [rows, entries], False for padding, whose last columns are those of the tokens that are kept; None where nothing is.
    """
    values = decode_tensor(output)
    if bool(values.sum().isfinite()):  # a sum is finite only where all its terms are, and quicker than asking each
        return True
    if mask is not None and values.shape[-2]:
        values = values[..., decode_tensor(mask)[:, -values.shape[-2] :], :]
    return bool(values.isfinite().all())
