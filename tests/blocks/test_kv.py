"""The store of keys and values: what is written to slots is what is gathered from pages, in either layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnet.blocks import kv
from petalnet.blocks.kv import KVShape, KVStore

SHAPES = [KVShape(2, 8, 8), KVShape(1, 8, 4), KVShape(3, 4, 4)]
PAGES, PAGE_TOKENS = 6, 16


def make_store(heads_together: bool, dtype: torch.dtype = torch.float32) -> KVStore:
    return KVStore(SHAPES, pages=PAGES, page_tokens=PAGE_TOKENS, dtype=dtype, device="cpu", heads_together=heads_together)


def filled_store(heads_together: bool) -> KVStore:
    store = make_store(heads_together)
    for block, tensors in enumerate((store.keys, store.values)):
        for tensor in tensors:
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 0.5 * block)
    return store


@pytest.mark.parametrize("heads_together", [False, True])
def test_shapes_and_layout(heads_together):
    store = make_store(heads_together, torch.bfloat16)
    assert len(store) == 3
    for block, shape in enumerate(SHAPES):
        assert store.keys[block].shape == (PAGES * PAGE_TOKENS, shape.heads, shape.key_size)
        assert store.head_values[block].shape == (1, shape.heads, PAGES * PAGE_TOKENS, shape.value_size)
    assert store.keys[0].is_contiguous() == heads_together
    assert store.bytes_per_token == 2 * (2 * 16 + 12 + 3 * 8)
    memory = {tensor.untyped_storage().data_ptr() for tensor in store.keys + store.values}
    assert len(memory) == 1


@pytest.mark.parametrize("heads_together", [False, True])
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_what_is_written_is_gathered(heads_together, data):
    store = make_store(heads_together)
    block = data.draw(st.integers(0, 2))
    shape = SHAPES[block]
    pages = data.draw(st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=PAGES, unique=True))
    length = data.draw(st.integers(1, len(pages) * PAGE_TOKENS))
    start = data.draw(st.integers(0, length - 1))
    key, value = torch.randn(length, shape.heads, shape.key_size), torch.randn(length, shape.heads, shape.value_size)
    slots = torch.tensor([pages[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS for at in range(length)])
    store.write(block, slots, key, value)
    keys, values = store.gather(block, torch.tensor(pages), start, length)
    assert torch.equal(keys, key[start:].transpose(0, 1)[None])
    assert torch.equal(values, value[start:].transpose(0, 1)[None])


@pytest.mark.parametrize("heads_together", [False, True])
def test_a_slice_of_slots(heads_together):
    store = filled_store(heads_together)
    before = store.keys[0].clone()
    key, value = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    store.write(0, slice(30, 35), key, value)
    assert torch.equal(store.keys[0][30:35], key)
    assert torch.equal(store.values[0][30:35], value)
    assert torch.equal(store.keys[0][:30], before[:30])
    assert torch.equal(store.keys[0][35:], before[35:])


@pytest.mark.parametrize("heads_together", [False, True])
def test_pages_are_copied_in_the_blocks_asked_for(heads_together):
    store = filled_store(heads_together)
    before = [tensor.clone() for tensor in store.keys]
    values = [tensor.clone() for tensor in store.values]
    store.copy_pages([(1, 4), (4, 0), (2, 5)], 1, 3)  # 4 is read before it is written
    assert torch.equal(store.keys[0], before[0])
    for block in (1, 2):
        for now, then in ((store.keys[block], before[block]), (store.values[block], values[block])):
            now, then = now.unflatten(0, (PAGES, PAGE_TOKENS)), then.unflatten(0, (PAGES, PAGE_TOKENS))
            assert torch.equal(now[4], then[1])
            assert torch.equal(now[0], then[4])
            assert torch.equal(now[5], then[2])
            assert torch.equal(now[1:4], then[1:4])
    store.copy_pages([], 0, 3)


def test_too_much_is_said_at_once(monkeypatch):
    with pytest.raises(MemoryError, match="GB are needed"):
        KVStore(SHAPES, pages=1 << 40, page_tokens=16, dtype=torch.float32, device="cpu")
    monkeypatch.setattr(kv.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 100}))
    with pytest.raises(MemoryError):  # what the allocator says where the system has claimed more than it has
        KVStore(SHAPES, pages=1 << 50, page_tokens=16, dtype=torch.float32, device="cpu")
