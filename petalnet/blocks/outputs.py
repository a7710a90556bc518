"""In which form outputs leave a server: exact, unless whoever wants them allowed a codec that loses something.

A server that computes in less than the client's dtype has no more than that to send, so sending just that loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from petalnet.p2p.fields import Blob, blob_size
from petalnet.p2p.pass_messages import Forward
from petalnet.p2p.session_messages import KEEP_NONE, Step
from petalnet.p2p.tensors import encode_tensor, lossless_codec

SMALL_BYTES = 64 * 1024
"""Outputs up to this size, in their exact form, are never rounded: they are on their way in no time."""


def wanted_tokens(request: Step) -> int:
    """New tokens of which the client wants the outputs: the last so many."""
    return 0 if request.keep == KEEP_NONE else request.keep or request.hidden.shape[1]


def output_codec(request: Step | Forward, shape: Sequence[int], computed: torch.dtype) -> str:
    """The codec of an output of `request` that has this shape and was computed in that dtype."""
    dtype = request.hidden.dtype
    exact = lossless_codec(dtype, computed)
    size = blob_size(dtype, shape, exact)
    return request.codec if size > SMALL_BYTES and blob_size(dtype, shape, request.codec) < size else exact


def encode_output(request: Step | Forward, output: torch.Tensor) -> Blob:
    """An output of `request`, in the dtype of its hidden states."""
    codec = output_codec(request, output.shape, output.dtype)
    return encode_tensor(output, codec, getattr(torch, request.hidden.dtype))


def is_finite(values: torch.Tensor) -> bool:
    """Whether all of some numbers are finite.

    A sum is finite only where all its terms are, and takes 3 µs for one token, where asking each number takes 15 to 50; that is done where
    the sum is not, which may only have become too large.
    """
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())
