"""Tensors on the wire: raw is exact, the other codecs round as far as they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.errors import ProtocolError
from petalnet.p2p.frames import FrameDecoder, FrameLimits
from petalnet.p2p.messages import Blob, StepDone, blob_size, decode_message, encode_message
from petalnet.p2p.tensors import decode_tensor, encode_tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def over_the_wire(blob: Blob) -> Blob:
    decoder = FrameDecoder(FrameLimits())
    decoder.feed(b"".join(encode_message(StepDone(0, 0, blob))))
    frame = decoder.next_frame()
    assert frame is not None
    back = decode_message(frame)
    assert isinstance(back, StepDone)
    return back.output


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)


@given(st.sampled_from(DTYPES), SHAPES, st.integers(0, 2**31))
@settings(deadline=None)
def test_raw_is_exact_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        tensor = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    else:  # any bits at all: infinities, NaNs of all kinds, negative zeros
        tensor = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)
    blob = over_the_wire(encode_tensor(tensor))
    back = decode_tensor(blob)
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(bits(back), bits(tensor))
    assert len(blob.data) == blob_size(blob.dtype, shape, "raw")


@pytest.mark.parametrize("codec", ["raw", "bfloat16", "float16", "int8"])
def test_any_layout_is_sent_in_its_logical_order(codec: str) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    for tensor in (base.transpose(0, 2), base[:, 1:, ::2], base.expand(5, 2, 3, 4), base[0, 0, 0], base[:0]):
        back = decode_tensor(over_the_wire(encode_tensor(tensor, codec)))
        assert torch.allclose(back, tensor, atol=0.1) and back.shape == tensor.shape


@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_int8_errs_by_no_more_than_half_a_step_of_its_block(count: int, seed: int, dtype: torch.dtype, scale: float) -> None:
    tensor = (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    back = decode_tensor(over_the_wire(encode_tensor(tensor, "int8")))
    assert back.dtype == dtype
    for start in range(0, count, 64):
        block = tensor[start : start + 64].float()
        step = block.abs().max() / 127
        rounding = block.abs().max() * torch.finfo(dtype).eps
        assert ((back[start : start + 64].float() - block).abs() <= step / 2 * 1.001 + rounding).all()


@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
def test_rounding_codecs_round_and_keep_the_dtype(codec: str) -> None:
    tensor = torch.randn(3, 70)
    back = decode_tensor(over_the_wire(encode_tensor(tensor, codec)))
    assert back.dtype == torch.float32
    assert torch.equal(back, tensor.to(getattr(torch, codec)).float())


def test_zeros_survive_int8() -> None:
    assert torch.equal(decode_tensor(over_the_wire(encode_tensor(torch.zeros(130), "int8"))), torch.zeros(130))


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(ValueError, match="complex64"):
        encode_tensor(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="floating-point"):
        encode_tensor(torch.zeros(1, dtype=torch.int64), "int8")
    with pytest.raises(ValueError, match="unknown codec"):
        encode_tensor(torch.zeros(1), "zip")


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_tensor(Blob("float32", (4,), "raw", bytearray(15)))
    with pytest.raises(ProtocolError):
        decode_tensor(Blob("float32", (70,), "int8", bytearray(70)))


def test_a_bool_is_one_whatever_its_byte() -> None:
    back = decode_tensor(Blob("bool", (3,), "raw", bytearray([0, 1, 200])))
    assert torch.equal(back, torch.tensor([False, True, True]))
    assert back.view(torch.uint8).tolist() == [0, 1, 1]


def test_raw_shares_memory_with_what_arrived() -> None:
    blob = over_the_wire(encode_tensor(torch.zeros(4)))
    decode_tensor(blob)[0] = 1
    assert bytes(blob.data[:4]) != bytes(4)
