"""Which form outputs have when they leave a server."""

from __future__ import annotations

import pytest
import torch

from petalnet.blocks.outputs import SMALL_BYTES, encode_output, output_codec
from petalnet.p2p.session_messages import Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor

HIDDEN = 64
MANY = SMALL_BYTES // (4 * HIDDEN) + 1
"""Tokens whose outputs are not small in float32."""


def step(tokens: int, codec: str = "raw", *, dtype: torch.dtype = torch.float32, sent: str = "raw") -> Step:
    return Step(step=1, position=0, hidden=encode_tensor(torch.zeros(1, tokens, HIDDEN, dtype=dtype), sent), codec=codec)


@pytest.mark.parametrize(
    ("dtype", "computed", "codec"),
    [
        (torch.float32, torch.float32, "raw"),
        (torch.float32, torch.bfloat16, "bfloat16"),
        (torch.float32, torch.float16, "float16"),
        (torch.bfloat16, torch.float32, "raw"),
        (torch.bfloat16, torch.float16, "raw"),
        (torch.float16, torch.float16, "raw"),
    ],
)
@pytest.mark.parametrize("tokens", [0, 1, MANY])
def test_outputs_are_exact_unless_less_was_allowed(dtype: torch.dtype, computed: torch.dtype, codec: str, tokens: int) -> None:
    output = torch.randn(1, tokens, HIDDEN).to(computed)
    blob = encode_output(step(tokens, dtype=dtype), output)
    assert blob.codec == codec and blob.dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(decode_tensor(blob), output.to(dtype))


@pytest.mark.parametrize("sent", ["bfloat16", "float16", "int8"])
def test_how_the_inputs_came_gives_no_leave_to_round_the_outputs(sent: str) -> None:
    # They may come from a server that computes in bfloat16, and nothing was lost; this one computes in float32.
    output = torch.randn(1, MANY, HIDDEN)
    assert torch.equal(decode_tensor(encode_output(step(MANY, sent=sent), output)), output)


@pytest.mark.parametrize("codec", ["bfloat16", "float16", "int8"])
def test_large_outputs_are_rounded_where_that_is_allowed_and_small_ones_never(codec: str) -> None:
    assert encode_output(step(MANY, codec), torch.randn(1, MANY, HIDDEN)).codec == codec
    assert encode_output(step(MANY - 1, codec), torch.randn(1, MANY - 1, HIDDEN)).codec == "raw"
    assert encode_output(step(MANY, codec), torch.randn(1, 1, HIDDEN)).codec == "raw"  # the last of many is wanted


def test_nothing_is_rounded_to_no_avail() -> None:
    shape = (1, 4 * MANY, HIDDEN)
    assert output_codec(step(MANY, "float16"), shape, torch.bfloat16) == "bfloat16"
    assert output_codec(step(MANY, "int8"), shape, torch.bfloat16) == "int8"
    assert output_codec(step(MANY, "bfloat16", dtype=torch.float16), shape, torch.float32) == "raw"
