"""What the library's attention is shown of the pages, against a plain list of what was put in."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from petalnet.blocks.cache import PagedCache, ShapeCache, windows_of
from petalnet.blocks.kv import KVShape, KVStore
from petalnet.blocks.pages import PagePool, Rows
from petalnet.errors import ModelError

HEADS, SIZE = 2, 3
PAGES, PAGE_TOKENS, OTHERS = 64, 8, 6


STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("rollback"), st.floats(0, 1)),
    st.tuples(st.just("reorder"), st.lists(st.floats(0, 0.999), min_size=1, max_size=4)),
)


@given(steps=st.lists(STEP, max_size=8), window=st.sampled_from([None, 4, 70]), scattered=st.booleans())
def test_pages_hold_what_was_put_in(steps: list[tuple[str, object]], window: int | None, scattered: bool) -> None:
    """Values are wider than the keys."""
    store = KVStore([KVShape(HEADS, SIZE, SIZE + 1)] * 2, pages=PAGES, page_tokens=PAGE_TOKENS, dtype=torch.float32, device="cpu")
    pool = PagePool(PAGES, PAGE_TOKENS)
    if scattered:  # every other page is somebody else's
        taken = [pool.take() for _ in range(OTHERS)]
        for page in taken[::2]:
            pool.release(page)
    cache = PagedCache(store, [window, None])
    session = Rows(pool, 90)
    session.resize(2)
    held = [torch.empty(2, HEADS, 0, SIZE + value) for _ in range(2) for value in range(2)]
    for kind, argument in steps:
        length = session.length
        if kind == "append":
            new = int(argument)  # type: ignore[call-overload]
            if length + new > 90:
                continue
            store.copy_pages(session.prepare(new), 0, 2)
            cache.begin(session, new)
            held = [torch.cat([past, torch.randn(*past.shape[:2], new, past.shape[3])], dim=2) for past in held]
            for layer, width in enumerate([window, None]):
                found = cache.update(held[2 * layer][:, :, length:], held[2 * layer + 1][:, :, length:], layer)
                first = 0 if width is None else max(0, length - width + 1)
                assert cache.get_mask_sizes(new, layer) == (length + new - first, first)
                assert torch.equal(found[0], held[2 * layer][:, :, first:])
                assert torch.equal(found[1], held[2 * layer + 1][:, :, first:])
            session.advance(new)
        elif kind == "rollback":
            length = int(argument * length)  # type: ignore[operator]
            held = [past[:, :, :length] for past in held]
            session.truncate(length)
        elif length:
            order = [int(part * len(session)) for part in argument]  # type: ignore[attr-defined]
            held = [past[torch.tensor(order)] for past in held]
            session.reorder(order)


def test_shapes_are_noted() -> None:
    cache = ShapeCache([None, 7])
    keys, values = torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 6)
    assert cache.update(keys, values, 1) == (keys, values)
    assert cache.shapes == [None, KVShape(5, 8, 6)]


def test_windows_of_configurations() -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
    assert windows_of(transformers.LlamaConfig(**sizes)) == [None] * 4
    assert windows_of(transformers.MistralConfig(**sizes, sliding_window=7)) == [7] * 4
    assert windows_of(transformers.Gemma2Config(**sizes, sliding_window=7)) == [7, None, 7, None]
    with pytest.raises(ModelError, match="linear_attention layers keep a state that cannot be split yet"):
        windows_of(transformers.AutoConfig.for_model("mamba", num_hidden_layers=2))
