"""What the setting `wire_precision` makes of a message: which codec, and what may be rounded on the way back."""

from __future__ import annotations

import itertools

import pytest
import torch

from petalnet.client.precision import EXACT_TOKENS, as_entered, choose_codec, encoded, pass_on_the_wire, settle, step_on_the_wire
from petalnet.client.settings import PRECISIONS, ClientSettings
from petalnet.errors import UsageError
from petalnet.p2p.fields import CODECS
from petalnet.p2p.pass_messages import Forward
from petalnet.p2p.session_messages import Step
from petalnet.p2p.tensors import decode_tensor, encode_tensor

DTYPES = ("float32", "float16", "bfloat16")
MEGABIT = 1e6 / 8


def step_of(hidden: torch.Tensor, **options: object) -> Step:
    return Step(step=1, position=0, hidden=encode_tensor(hidden), **options)


def values(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("precision", ["exact", "auto"])
@pytest.mark.parametrize(("dtype", "server_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_exact_is_raw_or_what_the_server_computes_in_where_that_is_less(precision: str, dtype: str, server_dtype: str) -> None:
    wanted = server_dtype if (dtype, server_dtype) in [("float32", "float16"), ("float32", "bfloat16")] else "raw"
    assert choose_codec(precision, dtype, server_dtype, CODECS, 1000) == wanted


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8"])
def test_a_lossy_codec_is_for_many_tokens_and_servers_that_know_it(precision: str) -> None:
    assert choose_codec(precision, "float32", "float32", CODECS, EXACT_TOKENS + 1) == precision
    assert choose_codec(precision, "float32", "float32", CODECS, EXACT_TOKENS) == "raw"
    assert choose_codec(precision, "float32", "bfloat16", CODECS, EXACT_TOKENS) == "bfloat16"  # which loses nothing
    assert choose_codec(precision, "float32", "float32", ("raw",), 1000) == "raw"
    assert choose_codec(precision, "float32", "float32", (), 1000) == "raw"


def test_a_codec_that_saves_nothing_rounds_nothing() -> None:
    assert choose_codec("float16", "float32", "bfloat16", CODECS, 1000) == "bfloat16"  # exact, and as short
    assert choose_codec("float16", "bfloat16", "bfloat16", CODECS, 1000) == "raw"
    assert choose_codec("int8", "bfloat16", "bfloat16", CODECS, 1000) == "int8"


@pytest.mark.parametrize("said", ["", "int4", "torch.bfloat16x", "raw", "exact", "auto", "🌸"])
def test_a_server_may_say_what_it_likes_of_itself(said: str) -> None:
    for precision in PRECISIONS:
        assert choose_codec(precision, "float32", said, ("zip", said), 1000) == "raw"


@pytest.mark.parametrize(
    ("bytes_s", "compute_s", "wanted"),
    [
        (None, 0.01, "exact"),  # not measured
        (1000 * MEGABIT, 0.001, "exact"),  # 4 KiB a token in 33 µs
        (100 * MEGABIT, 0.001, "exact"),  # in 0.33 ms
        (20 * MEGABIT, 0.001, "float16"),  # in 1.6 ms, or 0.8 ms
        (10 * MEGABIT, 0.001, "int8"),  # in 3.3 ms, 1.6 ms, or 0.9 ms
        (1 * MEGABIT, 0.001, "int8"),  # nothing suffices
        (20 * MEGABIT, 0.05, "exact"),  # the servers take longer anyway
        (20 * MEGABIT, 0.0, "float16"),  # rates that nobody announced count as usual ones
        (0.0, 0.001, "int8"),
    ],
)
def test_auto_takes_the_mildest_codec_with_which_sending_does_not_dominate(bytes_s: float | None, compute_s: float, wanted: str) -> None:
    assert settle("float32", "float32", CODECS, (1, 512, 1024), bytes_s, compute_s) == wanted


def test_auto_leaves_alone_what_is_sent_in_no_time() -> None:
    assert settle("float32", "float32", CODECS, (1, 64, 1024), 20 * MEGABIT, 1e-5) == "int8"
    assert settle("float32", "float32", CODECS, (1, 20, 64), 20 * MEGABIT, 1e-5) == "exact"  # 5 KiB


def test_auto_knows_what_costs_nothing_and_what_servers_know() -> None:
    assert settle("float32", "bfloat16", CODECS, (1, 512, 1024), 20 * MEGABIT, 0.001) == "exact"  # two bytes a value already
    assert settle("float32", "bfloat16", CODECS, (1, 512, 1024), 10 * MEGABIT, 0.001) == "int8"
    assert settle("float32", "float32", ("raw", "int8"), (1, 512, 1024), 20 * MEGABIT, 0.001) == "int8"
    assert settle("float32", "float32", ("raw",), (1, 512, 1024), 1 * MEGABIT, 0.001) == "exact"


def test_a_step_is_as_it_was_where_nothing_is_to_be_done() -> None:
    step = step_of(values(200))
    assert step_on_the_wire(step, "exact", "float32", CODECS) is step
    short = step_of(values(EXACT_TOKENS))
    assert step_on_the_wire(short, "int8", "float32", CODECS) is short


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8"])
def test_a_lossy_step_is_encoded_and_gives_leave_to_round_its_outputs(precision: str) -> None:
    sent = step_on_the_wire(step_of(values(200)), precision, "float32", CODECS)
    assert sent.hidden.codec == sent.codec == precision
    assert (decode_tensor(sent.hidden) - values(200)).abs().max() < 0.05
    # All blocks' outputs are for somebody to look at.
    assert step_on_the_wire(step_of(values(200), all_hidden=True), precision, "float32", CODECS).codec == "raw"


def test_what_a_server_computed_is_carried_on_as_it_came() -> None:
    step = step_of(values(200))
    carried = step_on_the_wire(step_on_the_wire(step, "exact", "bfloat16", CODECS), "exact", "float32", CODECS)
    assert (carried.hidden.codec, carried.codec) == ("bfloat16", "raw")


def test_auto_rounds_what_this_machine_sends_and_nothing_between_servers() -> None:
    sent = step_on_the_wire(step_of(values(2000)), "auto", "float32", CODECS, bytes_s=MEGABIT, compute_s=1e-4)
    assert (sent.hidden.codec, sent.codec) == ("int8", "raw")
    assert step_on_the_wire(step_of(values(2000)), "auto", "float32", CODECS).hidden.codec == "raw"


def test_the_exact_form_for_a_bfloat16_server_is_what_it_would_make_of_the_raw_one() -> None:
    hidden = torch.randint(-(2**31), 2**31 - 1, (1, 3, 64), dtype=torch.int32).view(torch.float32)  # any bits at all
    for server_dtype in ("bfloat16", "float16"):
        sent = encoded(encode_tensor(hidden), choose_codec("exact", "float32", server_dtype, CODECS, 3), server_dtype)
        dtype = getattr(torch, server_dtype)
        made, raw = decode_tensor(sent).to(dtype), hidden.to(dtype)
        assert torch.equal(made.isnan(), raw.isnan())
        assert torch.equal(made.nan_to_num(7), raw.nan_to_num(7))


def test_values_beyond_float16_go_raw_to_its_servers_and_as_bfloat16_to_others() -> None:
    large = encode_tensor(torch.full((1, 20, 4), 1e6))
    assert encoded(large, "float16", "float16").codec == "raw"
    assert encoded(large, "float16", "float32").codec == "bfloat16"


@pytest.mark.filterwarnings("error")
def test_memory_that_must_not_be_written_to_is_encoded_as_well() -> None:
    step = step_of(values(200))
    read_only = Step(step=1, position=0, hidden=type(step.hidden)("float32", (1, 200, 64), "raw", bytes(step.hidden.data)))
    assert bytes(step_on_the_wire(read_only, "int8", "float32", CODECS).hidden.data) == bytes(
        step_on_the_wire(step, "int8", "float32", CODECS).hidden.data
    )


def test_a_pass_for_gradients_is_rounded_only_where_that_was_asked_for_and_again_in_the_same_way() -> None:
    hidden = encode_tensor(values(200))
    request = Forward(model="m", first=0, end=2, hidden=hidden)
    assert pass_on_the_wire(request, "auto", "float32").hidden.codec == "raw"
    assert pass_on_the_wire(request, "auto", "float32", bytes_s=1000.0).codec == "int8"
    for precision in PRECISIONS:
        sent = pass_on_the_wire(request, precision, "float32").hidden
        again = as_entered(hidden, precision, "float32")
        assert (sent.codec, bytes(sent.data)) == (again.codec, bytes(again.data))


def test_a_precision_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="wire_precision needs one of exact, bfloat16, float16, int8, auto; got 'int4'"):
        ClientSettings(wire_precision="int4")
