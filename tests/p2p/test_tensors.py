"""Tensors on the wire: raw is exact, the other codecs round as far as they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.errors import ProtocolError
from petalnet.p2p.fields import CODECS, Blob, blob_size
from petalnet.p2p.frames import FrameDecoder, FrameLimits
from petalnet.p2p.messages import decode_message, encode_message
from petalnet.p2p.session_messages import StepDone
from petalnet.p2p.tensors import decode_tensor, encode_tensor, joined_tokens, lossless_codec

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
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


def check_int8(tensor: torch.Tensor) -> None:
    """Whether a flat tensor comes back from int8 within half a step of each block."""
    back = decode_tensor(over_the_wire(encode_tensor(tensor, "int8")))
    assert back.dtype == tensor.dtype
    assert back.isfinite().all()
    for given_block, block in zip(tensor.double().split(64), back.double().split(64), strict=True):
        most = given_block.abs().max()
        step = torch.clamp(most / 127, min=torch.finfo(torch.float32).tiny)
        dtype = torch.finfo(tensor.dtype)  # what comes back is rounded to it
        rounding = most * max(dtype.eps, 2**-22) + dtype.smallest_normal * dtype.eps
        assert ((block - given_block).abs() <= step / 2 + rounding).all()


@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(FLOATS), st.integers(-20, 15))
@settings(deadline=None)
def test_int8_errs_by_no_more_than_half_a_step_of_its_block(count: int, seed: int, dtype: torch.dtype, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, generator=generator) * 4  # values of very different sizes in a block
    tensor = (torch.randn(count, generator=generator).clamp(-1.9, 1.9) * 10**-spread * 2.0**exponent).to(dtype)
    check_int8(tensor)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 3.4028234e38, -3.4028234e38])
def test_int8_at_the_ends_of_the_range(value: float) -> None:
    check_int8(torch.full((130,), value))
    check_int8(torch.cat([torch.tensor([value]), torch.linspace(-1, 1, 90) * abs(value)]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_of_more_blocks_than_are_done_at_once(dtype: torch.dtype) -> None:
    check_int8(torch.randn(3 * 65536 + 37, generator=torch.Generator().manual_seed(1)).to(dtype))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_block_nan_in_int8_and_harms_no_other(odd: float) -> None:
    tensor = torch.randn(200)
    tensor[70] = odd
    back = decode_tensor(over_the_wire(encode_tensor(tensor, "int8")))
    assert back[64:128].isnan().all()
    assert back[:64].isfinite().all() and back[128:].isfinite().all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=100))
@settings(deadline=None)
def test_bfloat16_errs_by_a_256th(values: list[float]) -> None:
    tensor = torch.tensor(values)
    back = decode_tensor(over_the_wire(encode_tensor(tensor, "bfloat16"))).double()
    wanted = tensor.double()
    largest = torch.finfo(torch.bfloat16).max  # beyond it is hardly anything, which rounds to infinity
    assert (((back - wanted).abs() <= wanted.abs() / 256 + 1e-40) | (wanted.abs() > largest)).all()


@given(st.lists(st.floats(width=32, min_value=-65504, max_value=65504), min_size=1, max_size=100))
@settings(deadline=None)
def test_float16_errs_by_a_2048th(values: list[float]) -> None:
    blob = over_the_wire(encode_tensor(torch.tensor(values), "float16"))
    wanted = torch.tensor(values).double()
    assert blob.codec == "float16"
    assert ((decode_tensor(blob).double() - wanted).abs() <= torch.clamp(wanted.abs() / 2048, min=3e-8)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_float16_cannot_hold_travels_as_bfloat16(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.0, 70000.0, -1e30]).to(dtype)
    blob = over_the_wire(encode_tensor(tensor, "float16"))
    assert blob.codec == "bfloat16" and len(blob.data) == blob_size(blob.dtype, (3,), "float16")
    assert decode_tensor(blob).isfinite().all()
    assert encode_tensor(torch.tensor([1.0, 65519.0]), "float16").codec == "float16"  # it rounds to 65504


@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nans_stay_what_they_are(codec: str, dtype: torch.dtype) -> None:
    tensor = torch.tensor([float("inf"), 1.0, -float("inf"), float("nan")]).to(dtype)
    blob = over_the_wire(encode_tensor(tensor, codec))
    assert blob.codec == codec
    assert torch.equal(decode_tensor(blob).nan_to_num(5.0), tensor.nan_to_num(5.0))


@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
def test_rounding_codecs_round_and_keep_the_dtype(codec: str) -> None:
    tensor = torch.randn(3, 70)
    back = decode_tensor(over_the_wire(encode_tensor(tensor, codec)))
    assert back.dtype == torch.float32
    assert torch.equal(back, tensor.to(getattr(torch, codec)).float())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (1,), (63,), (64,), (65,), (3, 43)])
def test_every_codec_takes_every_size(codec: str, shape: tuple[int, ...]) -> None:
    for dtype in FLOATS:
        blob = encode_tensor(torch.zeros(shape, dtype=dtype), codec)
        assert len(blob.data) == blob_size(blob.dtype, shape, codec)
        assert torch.equal(decode_tensor(over_the_wire(blob)), torch.zeros(shape, dtype=dtype))


@given(st.sampled_from(CODECS), st.sampled_from(FLOATS), st.integers(1, 200), st.integers(0, 2**31))
@settings(deadline=None)
def test_any_bytes_are_decoded_to_something(codec: str, dtype: torch.dtype, count: int, seed: int) -> None:
    name = str(dtype).removeprefix("torch.")
    size = blob_size(name, (count,), codec)
    data = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).numpy().tobytes()
    assert decode_tensor(Blob(name, (count,), codec, bytearray(data))).shape == (count,)


def test_what_was_computed_in_less_loses_nothing_in_just_that() -> None:
    tensor = torch.randn(5, 66).to(torch.bfloat16)
    blob = over_the_wire(encode_tensor(tensor, "bfloat16", torch.float32))
    assert (blob.dtype, blob.codec) == ("float32", "bfloat16")
    assert torch.equal(decode_tensor(blob), tensor.float())
    assert torch.equal(decode_tensor(encode_tensor(tensor, "raw", torch.float32)), tensor.float())
    assert lossless_codec("float32", "bfloat16") == "bfloat16" and lossless_codec("float32", torch.float16) == "float16"
    for dtype, computed in [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "float16"), ("float32", ""), ("float32", "x")]:
        assert lossless_codec(dtype, computed) == "raw"


def test_pieces_in_different_codecs_are_joined_along_the_tokens() -> None:
    pieces = [torch.randn(2, 3, tokens, 8).to(torch.bfloat16).float() for tokens in (4, 1, 2)]
    joined = joined_tokens([encode_tensor(piece, codec) for piece, codec in zip(pieces, ("raw", "bfloat16", "raw"), strict=True)])
    assert torch.equal(decode_tensor(joined), torch.cat(pieces, dim=2))


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
