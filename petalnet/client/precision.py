"""What hidden states are rounded to on their way to servers and back: the setting `wire_precision`, and what it means for one message.

- "exact": nothing is lost. Hidden states travel as they are or, where a server computes in less than that, in what it computes in.
- "bfloat16", "float16", "int8": prompts and passes without a session travel in that codec, as far as both ends know it and it is shorter;
  `p2p.tensors` says what each loses. A few tokens at a time, as in decoding, stay exact: they are on their way in no time.
- "auto": exact, unless this machine's own link is so slow that sending takes longer than the servers compute; then the codec that loses
  least of those that mend it. Nothing is rounded between servers, whose links this machine does not know, nor where gradients are wanted.

Gradients are never rounded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from petalnet.p2p.fields import CODECS, Blob, blob_size
from petalnet.p2p.pass_messages import Forward
from petalnet.p2p.session_messages import Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor, lossless_codec

EXACT_TOKENS = 16
"""Messages of so many tokens (rows × new) or fewer are always exact."""
UNNOTICED_S = 0.01
"""A message that takes no longer to be sent is not worth rounding anything."""
UNKNOWN_COMPUTE_S = 0.001
"""For a token of a prompt, of servers that announce no rate."""


def choose_codec(wire_precision: str, dtype: str, server_dtype: str, codecs: Collection[str], tokens: int) -> str:
    """The codec of hidden states between this machine and a server.

    Args:
        wire_precision: one of `settings.PRECISIONS`; "auto" counts as "exact" (see `settle`).
        dtype: of the hidden states.
        server_dtype: what the server computes in, as it says; any text.
        codecs: that the server knows, as it says; any texts.
        tokens: rows × new tokens.
    """
    exact = lossless_codec(dtype, server_dtype)
    if exact not in codecs:
        exact = "raw"
    if wire_precision not in CODECS or wire_precision not in codecs or tokens <= EXACT_TOKENS:
        return exact
    return wire_precision if _size(dtype, wire_precision) < _size(dtype, exact) else exact


def settle(dtype: str, server_dtype: str, codecs: Collection[str], shape: tuple[int, ...], bytes_s: float | None, compute_s: float) -> str:
    """What "auto" is for one message: "exact", "float16" or "int8".

    A prompt goes through a chain as through a pipe, so sending costs hardly anything as long as a token is sent in less time than the
    slowest server computes it. Of the codecs with which it is, the one that loses least is taken; where there is none, the shortest. Of
    the two that are as short as each other float16 loses less than bfloat16, and still cannot overflow (see `p2p.tensors`).

    Args:
        dtype, server_dtype, codecs: as for `choose_codec`.
        shape: of the hidden states, [rows, new, hidden].
        bytes_s: bytes a second that the link to the server has been seen to carry; None where that is not known: then nothing is rounded.
        compute_s: seconds in which the slowest server of the chain computes a token of a prompt; 0 where it is not known.
    """
    if bytes_s is None:
        return "exact"
    tokens = shape[0] * shape[1]
    allowed_s = max(UNNOTICED_S, tokens * (compute_s or UNKNOWN_COMPUTE_S))
    precision = "exact"
    for candidate in ("exact", "float16", "int8"):
        codec = choose_codec(candidate, dtype, server_dtype, codecs, tokens)
        if candidate == "exact" or codec == candidate:
            precision = candidate
            if blob_size(dtype, shape, codec) <= allowed_s * bytes_s:
                break
    return precision


def encoded(hidden: Blob, codec: str, server_dtype: str) -> Blob:
    """A raw array in a codec that `choose_codec` chose; any other array as it is.

    Values that are too large for a server of dtype float16 go raw: what it makes of them is its business.
    """
    if codec == "raw" or hidden.codec != "raw" or not hidden.data:
        return hidden
    if memoryview(hidden.data).readonly:
        hidden = replace(hidden, data=bytearray(hidden.data))  # torch warns of tensors whose memory must not be written to
    blob = encode_tensor(decode_tensor(hidden), codec)
    return hidden if blob.codec != codec == server_dtype else blob


def step_on_the_wire(
    step: Step, wire_precision: str, server_dtype: str, codecs: Collection[str], bytes_s: float | None = None, compute_s: float = 0.0
) -> Step:
    """A session's step with its hidden states in the codec in which the server gets them, and leave to round its outputs alike.

    Args:
        step: with hidden states in whatever codec; only raw ones are changed.
        codecs: that all servers know to which the outputs go on.
        bytes_s, compute_s: as for `settle`.
    """
    hidden, tokens = step.hidden, step.hidden.shape[0] * step.hidden.shape[1]
    precision = "exact" if step.all_hidden else wire_precision
    if precision == "auto":
        precision = settle(hidden.dtype, server_dtype, codecs, hidden.shape, bytes_s, compute_s)
    codec = choose_codec(precision, hidden.dtype, server_dtype, codecs, tokens)
    sent = encoded(hidden, codec, server_dtype)
    allowed = "raw" if wire_precision == "auto" or precision == "exact" or tokens <= EXACT_TOKENS else precision
    return step if sent is hidden and allowed == step.codec else replace(step, hidden=sent, codec=allowed)


def step_once_more(step: Step, server_dtype: str, codecs: Collection[str]) -> Step:
    """A step that was computed before, elsewhere: its hidden states are what had arrived there, and lose nothing more; its outputs may be
    rounded as they were then."""
    codec = choose_codec("exact", step.hidden.dtype, server_dtype, codecs, 0)
    return replace(step, hidden=encoded(step.hidden, codec, server_dtype), codec=step.codec if step.codec in codecs else "raw")


def pass_on_the_wire(
    request: Forward, wire_precision: str, server_dtype: str, bytes_s: float | None = None, compute_s: float = 0.0
) -> Forward:
    """The same for a pass without a session, whose server knows all codecs.

    Its outputs come back over the link that was measured, so "auto" is for these as well. Whoever wants gradients of the pass gives no
    `bytes_s`.
    """
    hidden, tokens = request.hidden, request.hidden.shape[0] * request.hidden.shape[1]
    precision = "exact" if request.all_hidden else wire_precision
    if precision == "auto":
        precision = settle(hidden.dtype, server_dtype, CODECS, hidden.shape, bytes_s, compute_s)
    codec = choose_codec(precision, hidden.dtype, server_dtype, CODECS, tokens)
    allowed = "raw" if precision == "exact" or tokens <= EXACT_TOKENS else precision
    return replace(request, hidden=encoded(hidden, codec, server_dtype), codec=allowed)


def as_entered(hidden: Blob, wire_precision: str, server_dtype: str) -> Blob:
    """What a server got in a pass whose gradients were to be wanted, in the form in which it got it."""
    codec = choose_codec(wire_precision, hidden.dtype, server_dtype, CODECS, hidden.shape[0] * hidden.shape[1])
    return encoded(hidden, codec, server_dtype)


def _size(dtype: str, codec: str) -> int:
    """Bytes of some values."""
    return blob_size(dtype, (1024,), codec)
