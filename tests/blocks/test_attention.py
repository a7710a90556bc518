"""Attention over pages against attention written out, over everything that a pass can consist of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface

from petalnet.blocks import backends, pieces
from petalnet.blocks.attention import NAME, STATE, Batch, PagedState, Segment, paged_attention
from petalnet.blocks.backends import Backend, CudaBackend, PagedCall, is_right, pick_backend, takes
from petalnet.blocks.kv import KVShape, KVStore

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}
"""In bfloat16 scores themselves are rounded where the library has no fused kernel; float32 shows whether the arithmetic is right."""


class Row:
    """A row of a session, with all its keys and values from the first position on, and the pages that its past is in."""

    def __init__(self, past, new, pages, consecutive, first=0, mask=None):
        self.past, self.new, self.pages, self.consecutive, self.first, self.mask = past, new, pages, consecutive, first, mask

    def seen(self, query, window, chunked):
        """bool [past + new]: which keys the query at a position may attend to."""
        keys = torch.arange(self.past + self.new)
        visible = keys <= query
        if chunked:
            visible &= (keys - self.first) // window == (query - self.first) // window
        elif window is not None:
            visible &= keys > query - window
        visible &= keys >= self.first if self.mask is None else self.mask
        return visible if self.mask is None or bool(visible.any()) else keys == query


def expected(row, query, key, value, *, scale, window=None, chunked=False, softcap=None, sinks=None, slopes=None, over_padding=False):
    """Attention of a row's new tokens, in float64: query [new, heads, size], key and value [past + new, KV heads, size]."""
    heads, kv_heads = query.shape[1], key.shape[1]
    query, key, value = (tensor.double() for tensor in (query, key, value))
    output = torch.zeros(row.new, heads, value.shape[2], dtype=torch.float64)
    counted = torch.arange(row.past + row.new)
    if not over_padding:
        counted = counted - row.first if row.mask is None else (row.mask.cumsum(0) - 1) * row.mask
    for at in range(row.new):
        visible = row.seen(row.past + at, window, chunked)
        if not visible.any():
            continue
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = key[visible, kv_head] @ query[at, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                scores = scores + (slopes[head] * counted[visible]).to(value.dtype)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].double()[None]])
            weights = torch.softmax(scores, 0)[: int(visible.sum())]
            output[at, head] = weights @ value[visible, kv_head]
    return output


def run(backend, rows, *, heads, kv_heads, key_size, value_size, dtype=torch.float32, seed=0, **options):
    """Attend as a backend does; returns (rows' outputs, rows' expected outputs)."""
    torch.manual_seed(seed)
    shape = KVShape(kv_heads, key_size, value_size)
    pages = 1 + max(page for row in rows for page in row.pages)
    store = KVStore(
        [shape, shape], pages=pages, page_tokens=backend.page_tokens, dtype=dtype, device=CPU, heads_together=backend.heads_together
    )
    for tensor in store.keys + store.values:
        tensor.fill_(torch.nan)  # what nobody has written must not matter
    segments, queries, keys, values, column = [], [], [], [], 0
    for row in rows:
        total = row.past + row.new
        key, value = torch.randn(total, kv_heads, key_size).to(dtype), torch.randn(total, kv_heads, value_size).to(dtype)
        slots = torch.tensor([row.pages[at // store.page_tokens] * store.page_tokens + at % store.page_tokens for at in range(total)])
        store.write(1, slots[: row.past], key[: row.past], value[: row.past])
        run_at = row.pages[0] * store.page_tokens if row.consecutive else None
        segments.append(Segment(column, column + row.new, row.past, row.pages, run_at, row.first, row.mask))
        queries.append(torch.randn(row.new, heads, key_size).to(dtype))
        keys.append(key)
        values.append(value)
        column += row.new
    packed = [
        torch.cat(parts).transpose(0, 1)[None]
        for parts in (
            queries,
            [k[r.past :] for k, r in zip(keys, rows, strict=True)],
            [v[r.past :] for v, r in zip(values, rows, strict=True)],
        )
    ]
    batch = Batch(segments, store.page_tokens, CPU)
    with torch.inference_mode():
        output = backend.attend(batch, store, 1, *packed, **options)
    assert output.shape == (1, column, heads, value_size)
    assert output.dtype == dtype
    pieces = [output[0, segment.start : segment.end] for segment in segments]
    return pieces, [expected(*each, **options) for each in zip(rows, queries, keys, values, strict=True)]


def check(outputs, references, dtype=torch.float32):
    for output, reference in zip(outputs, references, strict=True):
        assert torch.isfinite(output).all()
        torch.testing.assert_close(output.double(), reference, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@st.composite
def rows_of_a_pass(draw, page_tokens, largest=40):
    """Some rows whose pages do not overlap, some consecutive, some scattered."""
    free = list(range(48))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        new = draw(st.one_of(st.just(1), st.integers(1, largest)))
        past = draw(st.integers(0, largest * 2))
        count = -(-(past + new) // page_tokens)
        starts = [at for at in range(48 - count) if all(page in free for page in range(at, at + count))]
        consecutive = draw(st.booleans()) and bool(starts)
        if consecutive:
            start = draw(st.sampled_from(starts))
            pages = list(range(start, start + count))
        else:
            pages = draw(st.permutations(free))[:count]
        if len(pages) < count:
            break
        free = [page for page in free if page not in pages]
        first, mask = 0, None
        padding = draw(st.sampled_from(["none", "none", "left", "holes"]))
        if padding == "left":
            first = draw(st.integers(0, past + new))
        elif padding == "holes":
            mask = torch.tensor(draw(st.lists(st.booleans(), min_size=past + new, max_size=past + new)))
            first = int(mask.int().argmax()) if mask.any() else past + new
        rows.append(Row(past, new, pages, consecutive, first, mask))
    return rows


@pytest.mark.parametrize("heads_together", [False, True])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_equals_attention_written_out(heads_together, data):
    backend = Backend()
    backend.page_tokens, backend.heads_together = data.draw(st.sampled_from([4, 16])), heads_together
    rows = data.draw(rows_of_a_pass(backend.page_tokens))
    if not rows:
        return
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * data.draw(st.integers(1, 3))
    key_size = data.draw(st.sampled_from([4, 8, 16]))
    value_size = data.draw(st.sampled_from([key_size, key_size, 8]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    slopes = 2.0 ** -torch.arange(1.0, heads + 1) if data.draw(st.booleans()) else None
    if dtype == torch.bfloat16 and slopes is not None:
        slopes = 2.0 ** -torch.arange(1.0, heads + 1).clamp(max=3)  # products that bfloat16 holds exactly
    options = {
        "scale": data.draw(st.sampled_from([key_size**-0.5, 1.0 / 16])),
        "window": (window := data.draw(st.sampled_from([None, None, 1, 5, 30]))),
        "chunked": window is not None and data.draw(st.booleans()),
        "softcap": data.draw(st.sampled_from([None, None, 5.0])),
        "sinks": torch.randn(heads).to(dtype) if data.draw(st.booleans()) else None,
        "slopes": slopes,
    }
    options["over_padding"] = options["sinks"] is None and data.draw(st.booleans())  # a sink's score does not move with the others'
    shape = {"heads": heads, "kv_heads": kv_heads, "key_size": key_size, "value_size": value_size, "dtype": dtype}
    check(*run(backend, rows, seed=data.draw(st.integers(0, 99)), **shape, **options), dtype)


@pytest.mark.parametrize(
    "option",
    [{}, {"window": 300}, {"window": 90, "chunked": True}, {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.1])}, {"softcap": 4.0}],
)
def test_long_prefill_over_a_past_is_cut_into_pieces(option, monkeypatch):
    monkeypatch.setattr(pieces, "MOST_QUERIES", 64)
    monkeypatch.setattr(pieces, "MOST_SCORES", 4 * 500 * 20)
    rows = [Row(300, 150, list(range(20)), True, 40), Row(0, 100, [30, 21, 25, 22], False)]
    check(*run(Backend(), rows, heads=4, kv_heads=2, key_size=8, value_size=8, scale=0.3, **option))


def test_what_is_not_finite_stays_in_its_session():
    torch.manual_seed(0)
    store = KVStore([KVShape(2, 8, 8)], pages=8, page_tokens=32, dtype=torch.float32, device=CPU)
    segments = [Segment(0, 1, 3, [0], 0), Segment(1, 6, 3, [5, 2], None), Segment(6, 7, 3, [3], 96)]
    for tensor in store.keys + store.values:
        tensor.copy_(torch.randn(tensor.shape))
    query, key, value = (torch.randn(1, heads, 7, 8) for heads in (4, 2, 2))
    whole = Backend().attend(Batch(segments, 32, CPU), store, 0, query, key, value, scale=0.3)
    for tensor in (query, key, value):
        tensor[:, :, 1:6] = torch.nan
    ill = Backend().attend(Batch(segments, 32, CPU), store, 0, query, key, value, scale=0.3)
    assert ill[:, 1:6].isnan().all()
    assert torch.equal(ill[:, 0], whole[:, 0])
    assert torch.equal(ill[:, 6], whole[:, 6])


def test_the_function_finds_its_state_and_block():
    backend = Backend()
    store = KVStore([KVShape(2, 8, 8)] * 3, pages=4, page_tokens=32, dtype=torch.float32, device=CPU)
    store.keys[0].fill_(0)
    state = PagedState(store, backend, [None, None, 2], [False] * 3, first_block=1)
    module = torch.nn.Module()
    module.layer_idx = 1
    setattr(module, STATE, state)
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    with pytest.raises(RuntimeError, match="outside"):
        paged_attention(module, query, key, value, None)
    state.batch = Batch([Segment(0, 5, 0, [1], 32)], 32, CPU)
    output, weights = paged_attention(module, query, key, value, None, dropout=0.0, sliding_window=77, is_causal=True)
    assert weights is None
    row = Row(0, 5, [1], True)
    reference = expected(row, *(tensor[0].transpose(0, 1) for tensor in (query, key, value)), scale=8**-0.5, window=2)
    torch.testing.assert_close(output[0].double(), reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(store.keys[2][32:37], key[0].transpose(0, 1))
    assert not store.keys[0].any()


def test_it_is_registered():
    assert AttentionInterface()[NAME] is paged_attention
    assert NAME not in AttentionMaskInterface()  # so that the library makes no mask for it


def test_batch_checks_its_segments():
    with pytest.raises(ValueError, match="columns 2:3"):
        Batch([Segment(0, 1, 0, [0], 0), Segment(2, 3, 0, [1], 32)], 32, CPU)
    with pytest.raises(ValueError, match="columns 0:0"):
        Batch([Segment(0, 0, 0, [0], 0)], 32, CPU)
    with pytest.raises(ValueError, match="65 entries do not fit into 2 pages"):
        Batch([Segment(0, 3, 62, [0, 1], 0)], 32, CPU)


def test_slots():
    assert Batch([Segment(0, 3, 30, [4, 5], 128)], 32, CPU).slots == slice(158, 161)
    assert Batch([Segment(0, 3, 30, [4, 9], None)], 32, CPU).slots.tolist() == [158, 159, 288]
    two = Batch([Segment(0, 1, 0, [4], 128), Segment(1, 3, 31, [7, 1], None)], 32, CPU)
    assert two.slots.tolist() == [128, 255, 32]


def test_what_is_the_same_for_all_blocks_is_computed_once(monkeypatch):
    made = []
    make = pieces._Biases._make
    monkeypatch.setattr(pieces._Biases, "_make", lambda *args: made.append(1) or make(*args))
    store = KVStore([KVShape(2, 8, 8)] * 4, pages=4, page_tokens=32, dtype=torch.float32, device=CPU)
    batch = Batch([Segment(0, 5, 9, [1], 32), Segment(5, 10, 9, [2], 64)], 32, CPU)
    store.keys[0].fill_(0)
    for block in range(4):
        Backend().attend(batch, store, block, *(torch.randn(1, heads, 10, 8) for heads in (4, 2, 2)), scale=0.3)
    assert len(made) == 1  # for both segments and all blocks


# Sharing: rows of one session, or of sessions with a prompt in common, whose first pages are the same.


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_rows_that_share_pages(data):
    draw = data.draw
    heads, kv_heads, size, page_tokens = 4, 2, 8, 4
    torch.manual_seed(draw(st.integers(0, 99)))
    free = iter(draw(st.permutations(range(60))))
    shared = [next(free) for _ in range(draw(st.integers(0, 5)))] if draw(st.booleans()) else list(range(60, 60 + draw(st.integers(1, 6))))
    store = KVStore([KVShape(kv_heads, size, size)], pages=70, page_tokens=page_tokens, dtype=torch.float32, device=CPU)
    for tensor in store.keys + store.values:
        tensor.copy_(torch.randn(tensor.shape))
    window = draw(st.sampled_from([None, 3, 10]))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.1]) if draw(st.booleans()) else None
    first = draw(st.sampled_from([0, 0, 2]))
    segments = []
    for row in range(draw(st.integers(1, 5))):
        past = len(shared) * page_tokens + draw(st.integers(0, 12))
        pages = [*shared, *(next(free) for _ in range(1 + past // page_tokens - len(shared)))]
        segments.append(Segment(row, row + 1, past, pages, None, min(first, past)))
    query, key, value = (torch.randn(1, count, len(segments), size) for count in (heads, kv_heads, kv_heads))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LEAST_EXTENT", draw(st.sampled_from([0, 0, 1 << 19])))
        output = Backend().attend(Batch(segments, page_tokens, CPU), store, 0, query, key, value, scale=0.3, window=window, slopes=slopes)
    for at, segment in enumerate(segments):
        slots = torch.tensor([segment.pages[at // page_tokens] * page_tokens + at % page_tokens for at in range(segment.total)])
        row = Row(segment.past, 1, segment.pages, False, segment.first)
        reference = expected(
            row, query[0, :, at][None], store.keys[0][slots], store.values[0][slots], scale=0.3, window=window, slopes=slopes
        )
        torch.testing.assert_close(output[0, at][None].double(), reference, atol=2e-5, rtol=2e-5)


def test_a_shared_beginning_is_read_once(monkeypatch):
    monkeypatch.setattr(pieces, "LEAST_EXTENT", 0)
    calls = []
    kernel = pieces._with_sums
    monkeypatch.setattr(pieces, "_with_sums", lambda query, key, *rest: calls.append(key.shape[2]) or kernel(query, key, *rest))
    store = KVStore([KVShape(2, 8, 8)], pages=20, page_tokens=32, dtype=torch.float32, device=CPU)
    segments = [Segment(row, row + 1, 100, [0, 1, 2, 10 + row], None) for row in range(3)]
    Backend().attend(Batch(segments, 32, CPU), store, 0, *(torch.randn(1, heads, 3, 8) for heads in (4, 2, 2)), scale=0.3)
    assert sorted(calls) == [5, 5, 5, 96]


# The kernel for paged attention needs a GPU; one that keeps its contract, written out, stands for it here.


def paged_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
):  # the parameters of torch.nn.attention.varlen.varlen_attn
    assert query.shape[1] == key.shape[2] or enable_gqa
    assert cu_seq_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    outputs = []
    for row, total in enumerate(seqused_k.tolist()):
        start, end = cu_seq_q[row : row + 2].tolist()
        assert end - start <= max_q
        assert total <= max_k
        assert cu_seq_k is None or total == cu_seq_k[row + 1] - cu_seq_k[row]
        pages = block_table[row, : -(-total // key.shape[1])].long()
        keys, values = key[pages].flatten(0, 1)[:total], value[pages].flatten(0, 1)[:total]
        left, right = window_size
        assert right == 0 or (left, right, max_q) == (-1, -1, 1)
        window = None if left < 0 else left + 1
        reference = expected(Row(total - (end - start), end - start, [], False), query[start:end], keys, values, scale=scale, window=window)
        outputs.append(reference.to(query.dtype))
    return torch.cat(outputs)


@pytest.mark.parametrize("sums_of_keys", [True, False])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_the_paged_kernel_is_told(sums_of_keys, data):
    backend = CudaBackend(paged_kernel, sums_of_keys=sums_of_keys)
    backend.page_tokens = 4
    rows = data.draw(rows_of_a_pass(4, largest=12))
    if not rows:
        return
    options = {"scale": 0.3, "window": data.draw(st.sampled_from([None, 1, 5]))}
    options["softcap"] = data.draw(st.sampled_from([None, None, 5.0]))
    shape = {"heads": 4, "kv_heads": data.draw(st.sampled_from([2, 4])), "key_size": 8, "value_size": 8, "dtype": torch.bfloat16}
    check(*run(backend, rows, **shape, **options), torch.bfloat16)


def test_the_call_is_what_torch_takes():
    from torch.nn.attention.varlen import varlen_attn

    given = []

    def kernel(*args, **kwargs):
        given.append((args, kwargs))
        return paged_kernel(*args, **kwargs)

    rows = [Row(3, 2, [1, 0], False), Row(300, 1, [3, 2], False)]
    shape = {"heads": 4, "kv_heads": 2, "key_size": 8, "value_size": 8, "dtype": torch.bfloat16}
    run(CudaBackend(kernel, sums_of_keys=True), rows, **shape, scale=0.3, window=7)
    args, kwargs = given[0]
    on_meta = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in args]
    on_meta_too = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    assert varlen_attn(*on_meta, **on_meta_too).shape == (3, 4, 8)
    assert kwargs["window_size"] == (6, 0)


def test_tables_of_the_paged_kernel():
    segments = [
        Segment(0, 3, 254, [7, 2, 9], None),
        Segment(3, 4, 20, [5], 1280, first=3),
        Segment(4, 5, 0, [1], 256),
        Segment(5, 7, 3, [0], 0, mask=torch.tensor([True, False, True, True, True])),
    ]
    call = PagedCall.of(Batch(segments, 256, CPU), [0, 2])
    assert call.columns.tolist() == [0, 1, 2, 4]
    assert call.others == (1, 3)
    assert call.other_columns.tolist() == [3, 5, 6]
    assert call.queries.tolist() == [0, 3, 4]
    assert call.keys.tolist() == [0, 257, 258]
    assert call.used.tolist() == [257, 1]
    assert call.table.tolist() == [[7, 2], [1, 0]]
    assert (call.most_queries, call.most_keys) == (3, 257)


def test_what_the_paged_kernel_takes():
    def query(size, dtype=torch.bfloat16):
        return torch.zeros(1, 4, 1, size, dtype=dtype)

    ones = torch.ones(4)
    assert takes(query(64), query(64), None, None, None)
    assert takes(query(256, torch.float16), query(256, torch.float16), None, None, None)
    assert not takes(query(64, torch.float32), query(64, torch.float32), None, None, None)
    assert not takes(query(264), query(264), None, None, None)
    assert not takes(query(12), query(12), None, None, None)
    assert not takes(query(64), query(32), None, None, None)
    assert not takes(query(64), query(64), 5.0, None, None)
    assert not takes(query(64), query(64), None, ones, None)
    assert not takes(query(64), query(64), None, None, ones)


def test_a_kernel_is_tried_before_it_is_used():
    def far_off(*args, **kwargs):
        return paged_kernel(*args, **kwargs) + 0.2

    def missing(*args, **kwargs):
        raise RuntimeError("paged attention is not supported")

    assert is_right(CudaBackend(paged_kernel, sums_of_keys=True), CPU, torch.bfloat16)
    assert not is_right(CudaBackend(far_off, sums_of_keys=True), CPU, torch.bfloat16)
    assert not is_right(CudaBackend(missing, sums_of_keys=True), CPU, torch.bfloat16)


def test_the_backend_of_a_device(monkeypatch):
    assert type(pick_backend("cpu", torch.bfloat16)) is Backend
    monkeypatch.setattr(backends.torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert type(pick_backend("cuda", torch.float16)) is Backend
    monkeypatch.setattr(backends.torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert type(pick_backend("cuda", torch.float32)) is Backend
    monkeypatch.setattr(backends, "is_right", lambda backend, device, dtype: not backend._sums_of_keys)
    picked = pick_backend("cuda:0", torch.bfloat16)
    assert type(picked) is CudaBackend
    assert picked._says_alone and not picked._sums_of_keys
    monkeypatch.setattr(backends, "is_right", lambda backend, device, dtype: False)
    assert type(pick_backend("cuda:0", torch.bfloat16)) is Backend
