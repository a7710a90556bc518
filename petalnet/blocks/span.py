"""Some consecutive layers of a model, run by the model's own backbone.

Masks, rotary tables, ALiBi and sliding windows stay the library's business (see `backbone`).

A pass without a past (`forward`) is the library's, its attention included. Steps of sessions (`step`) keep their keys and values in pages.
Where the family's layers take an attention function, all steps of a pass lie side by side in one packed row, and that function, ours,
attends over the pages; other families run one session after the other, with the library's attention over what is gathered from the pages.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from petalnet.blocks.adapted import adapt
from petalnet.blocks.adapters import Adapter, Dropout, Share, shares_of
from petalnet.blocks.attention import NAME, STATE, Batch, PagedState
from petalnet.blocks.backbone import Backbone
from petalnet.blocks.backends import Backend, NotingBackend, pick_backend
from petalnet.blocks.cache import PagedCache, ShapeCache, chunked_layers, windows_of
from petalnet.blocks.captured import CapturedDecode, Recorder
from petalnet.blocks.configurations import known_positions
from petalnet.blocks.hooks import Hook, add_at, add_at_start
from petalnet.blocks.kv import KVShape, KVStore
from petalnet.blocks.linear import speed_up_linears
from petalnet.blocks.packed import PackedRow
from petalnet.blocks.packed import SpanStep as SpanStep
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.quantization import quantize_layers, require_quantization
from petalnet.errors import ModelError, UsageError
from petalnet.models import loading
from petalnet.models.anatomy import find_layers, linear_shapes, text_config
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import block_digests

log = logging.getLogger(__name__)

_LAYER_NUMBERS = ("layer_idx", "layer_id")
"""Under which a module knows its layer's number, by which it finds its share of a cache, and our attention function its pages."""

MOST_BESIDE_CACHED = 2
"""How many times what the library caches pages may take: where that is a latent, keys and values take up to 70 times as much."""


class Span:
    """Blocks [first, end) of a model, loaded. Not thread-safe: one thread runs it.

    Attributes:
        first, end: which blocks of the model these are.
        num_blocks: how many the whole model has.
        hidden_size: width of the hidden states.
        dtype, device: of the weights and of what `forward` and `step` return.
        quantization: what the weights of linear layers are rounded to: "none", "int8" or "nf4".
        backend: how attention over pages is computed on this device, and in pages of which size.
        takes_position_ids: whether the backbone is told positions (families with ALiBi are not).
        score_heads: attention scores (or a mask) of rows × score_heads × new × total entries are in memory at once: the heads where the
            library computes scores one after the other, 1 where a fused kernel does it all.
        max_positions: positions that the model has a table for; None for a family that computes them (rotary, ALiBi).
        captured: passes of one token a row that are captured; None where none are.
    """

    def __init__(self, model: Any, first: int, end: int, *, dtype: torch.dtype, device: torch.device, may_pack: bool = True) -> None:
        """Cut a model, whose layers [first, end) are loaded, to these layers. `load` is the usual way.

        Args:
            may_pack: False where packed passes are known to be wrong for the family (see `probe`).
        """
        layers = find_layers(model)
        config = text_config(model.config)
        self.num_blocks = len(layers.layers)
        self.first, self.end = first, end
        self.hidden_size: int = config.hidden_size
        self.dtype, self.device = dtype, device
        self.quantization = "none"
        self.backend: Backend = pick_backend(device, dtype)
        self._compute_digests: Callable[[], list[str]] = list
        tokens = model.get_input_embeddings()
        embedding_size = getattr(tokens, "embedding_dim", None) or self.hidden_size
        self._backbone = Backbone(layers, config, first, end, embedding_size=embedding_size)
        self._blocks = self._backbone.blocks
        self._model_type: str = config.model_type
        self.score_heads: int = config.num_attention_heads if config._attn_implementation == "eager" else 1
        self._windows = windows_of(config)[first:end]
        self._chunked = chunked_layers(config)[first:end]
        self.takes_position_ids = "position_ids" in inspect.signature(layers.owner.forward).parameters
        self.max_positions = known_positions(layers.owner, tokens)
        self._numbered = [m for block in self._blocks for m in block.modules() if any(name in m.__dict__ for name in _LAYER_NUMBERS)]
        for index, block in enumerate(self._blocks):
            for module in block.modules():
                for name in _LAYER_NUMBERS:
                    if name in module.__dict__:
                        module.__dict__[name] = index
        self._packed_arguments = adapt(config.model_type, self._blocks)
        self._may_pack = may_pack
        self._store: KVStore | None = None
        self._paged: PagedState | None = None
        self._paged_cache: PagedCache | None = None
        self._recorder: Recorder | None = None
        self._recorded_bytes = 0
        self.captured: CapturedDecode | None = None

    @classmethod
    def load(
        cls,
        source: ModelSource,
        first: int,
        end: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        may_pack: bool = True,
        quantization: str = "none",
    ) -> Span:
        """Load blocks [first, end), reading only their tensors. `may_pack`: see `Span`; `quantization`: see `blocks.quantization`.

        Raises:
            UsageError: the model has no such blocks, or weights cannot be quantized here.
            ModelError: the model cannot be split into blocks, or tensors are missing.
        """
        count = text_config(source.config).num_hidden_layers
        if not 0 <= first < end <= count:
            raise UsageError(f"blocks {first}:{end} are out of range: {source.name} has {count} blocks, 0:{count}")
        require_quantization(quantization)
        built = loading.build(
            AutoModel,
            source,
            names=lambda parts: [name for block in parts.blocks[first:end] for name in block],
            dtype=dtype,
            device=device,
            prepare=lambda model: quantize_layers(find_layers(model).layers[first:end], quantization),
            others="zeros",
        )
        path = find_layers(built.model).path
        wanted = tuple(f"{path}.{index}." for index in range(first, end))
        lacking = sorted(name for name in built.missing if name.startswith(wanted))
        if lacking:
            raise ModelError(f"{source.name} lacks the tensor {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else ""))
        span = cls(built.model, first, end, dtype=dtype, device=torch.device(device), may_pack=may_pack)
        span.quantization = quantization
        span._compute_digests = lambda: block_digests(source, built.partition, first, end)
        return span

    @cached_property
    def digests(self) -> list[str]:
        """The identity of each block (see `models.identity`), in hex. The first look reads all of the weights, unless they are known."""
        return self._compute_digests()

    def __len__(self) -> int:
        return self.end - self.first

    def speed_up(self) -> None:
        """Let linear layers take the quickest kernels for a few rows that there are on this machine; takes up to half a second once."""
        speed_up_linears(nn.ModuleList(self._blocks))

    @cached_property
    def linear_shapes(self) -> dict[int, dict[str, tuple[int, int]]]:
        """(in, out) of each layer that LoRA can be for, by the model's number of its block and its path in the block."""
        return {number: linear_shapes(block) for number, block in enumerate(self._blocks, self.first)}

    @property
    def weights(self) -> list[torch.Tensor]:
        """All parameters and buffers."""
        return [weight for block in self._blocks for weight in (*block.parameters(), *block.buffers())]

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that one position of one row takes, over all blocks."""
        return sum(shape.heads * (shape.key_size + shape.value_size) for shape in self.kv_shapes) * self.dtype.itemsize

    @property
    def kv_shapes(self) -> list[KVShape]:
        """What a position takes in each block."""
        return self._packed_shapes if self.packs else self._library_shapes

    @cached_property
    def _library_shapes(self) -> list[KVShape]:
        """What the library caches of a position in each block. Found by running a token through one block of each kind."""
        found: dict[int, KVShape] = {}
        token = torch.zeros(1, 1, self.hidden_size)
        for index in set(self._kinds):
            cache = ShapeCache(self._windows)
            with torch.inference_mode():
                self._library_pass(token, self.first + index, self.first + index + 1, cache=cache)
            shape = cache.shapes[index]
            if shape is None:
                raise ModelError(f"a {self._model_type} model cannot be served: its layers put nothing into a cache")
            found[index] = shape
        return [found[index] for index in self._kinds]

    @cached_property
    def packs(self) -> bool:
        """Whether steps of several sessions can share a pass; where not, `step` runs them one after the other.

        Tried with a token through one block of each kind: its keys have to arrive in the pages. Whether the results are right is for the
        probe of the family to say. Families that cache something smaller, from which they compute keys and values at every step, are left
        to it where these would take much more."""
        if not self._may_pack:
            return False
        try:
            shapes = self._packed_shapes
            cached, paged = (sum(shape.bytes(self.dtype) for shape in each) for each in (self._library_shapes, shapes))
            if paged > MOST_BESIDE_CACHED * cached:
                return False
            store = KVStore(shapes, pages=1, page_tokens=self.backend.page_tokens, dtype=self.dtype, device=self.device)
            self._try_packed(store)
            return True
        except Exception:
            # The family's own code, told to use an attention function it may know nothing of, raises whatever it raises.
            log.debug("%s models do not run with an attention function of ours", self._model_type, exc_info=True)
            return False

    @cached_property
    def _packed_shapes(self) -> list[KVShape]:
        """What our attention function is given of a position in each block; raises what the family's code does where it is not called."""
        noting = NotingBackend()
        self._try_packed(KVStore([], pages=1, page_tokens=noting.page_tokens, dtype=self.dtype, device=self.device), noting)
        return [noting.shapes[index] for index in self._kinds]

    def _try_packed(self, store: KVStore, backend: Backend | None = None) -> None:
        """Run a token through one block of each kind, in packed passes over a store of one page."""
        rows = Rows(PagePool(1, store.page_tokens), 1)
        rows.resize(1)
        rows.prepare(1)
        step = SpanStep(rows, torch.zeros(1, 1, self.hidden_size))
        before = self._paged
        try:
            self._paged = self._state_over(store, backend)
            for index in set(self._kinds):
                with torch.inference_mode():
                    self._packed_pass([step], self.first + index, self.first + index + 1)
        finally:
            self._paged = before
            self._show(before)

    @property
    def stages(self) -> list[Span]:
        """The parts that run one after the other, each on a device of its own (see `spread`): this alone."""
        return [self]

    def device_of(self, block: int) -> torch.device:
        """Where a block of the model is, by its number."""
        return self.device

    @property
    def store(self) -> KVStore | None:
        """Where keys and values are kept."""
        return self._store

    def make_store(self, pages: int, blocks: int | None = None) -> KVStore:
        """A store of so many pages, for all blocks or only for the first ones; `attach` takes it. Raises as `KVStore` does."""
        backend = self.backend
        shapes = self.kv_shapes[:blocks]
        return KVStore(shapes, pages=pages, page_tokens=backend.page_tokens, dtype=self.dtype, device=self.device, spare=backend.pads)

    def attach(self, store: KVStore | None) -> None:
        """Keep keys and values in a store from now on, so that `step` works; None: in none.

        Args:
            store: has an entry a block (or for the first blocks, if only these will be run) and pages of the backend's size.
        """
        self._store = store
        self._paged = self._paged_cache = None
        if store is not None and self.packs:
            self._paged = self._state_over(store)
        elif store is not None:
            self._paged_cache = PagedCache(store, self._windows)
        self._begin_capturing()

    def capture(self, recorder: Recorder | None, most_bytes: int = 0) -> None:
        """Capture decoding from now on, where that is possible, in so much of the device's memory (see `captured`); None: no longer."""
        self._recorder, self._recorded_bytes = recorder, most_bytes
        self._begin_capturing()

    def _begin_capturing(self) -> None:
        store = self._store
        self.captured = None
        if self._recorder is not None and self._paged is not None and store is not None and store.spare_page is not None:
            self.captured = CapturedDecode(
                self._run_packed,
                self._recorder,
                store,
                hidden_size=self.hidden_size,
                takes_positions=self.takes_position_ids,
                most_bytes=self._recorded_bytes,
            )

    def step(self, steps: Sequence[SpanStep], first: int | None = None, end: int | None = None) -> list[list[torch.Tensor]]:
        """Run steps of several sessions through blocks [first, end) of the model, by default all of the span.

        Steps share a pass: their `batch_key`s have to be equal. Their keys and values are written to the pages; the rows are not advanced.

        Returns:
            for each step its outputs [rows, new, hidden] in the span's dtype on its device: one, or with `all_hidden` one a block.
        Raises:
            ValueError: the span has no such blocks.
            RuntimeError: no store is attached.
        """
        first, end = self._range(first, end)
        with torch.inference_mode():
            outputs = self.captured.run(steps, first, end) if self.captured is not None else None
            if outputs is not None:
                return outputs
            if self._paged is not None:
                return self._packed_pass(steps, first, end)
            return [self._alone(step, first, end) for step in steps]

    def batch_key(self, position_end: int, session: Hashable) -> Hashable:
        """Steps that have equal keys, and run through the same blocks, may share a pass.

        Args:
            position_end: one past the last position that the whole of the step reaches.
            session: whose step it is.
        """
        return self._backbone.rotary.key(position_end, session) if self.packs else ("alone", session)

    def computes_alike(self, positions: int) -> bool:
        """Whether the keys of equal beginnings are equal in any two sequences of at most so many positions, however long each becomes."""
        return self._backbone.rotary.alike(positions)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        first: int | None = None,
        end: int | None = None,
        all_hidden: bool = False,
        position_end: int | None = None,
        adapters: Sequence[Adapter] = (),
        dropout: Dropout | None = None,
    ) -> list[torch.Tensor]:
        """Run rows without a past through blocks [first, end) of the model, by default all of the span. Gradients flow back.

        Args:
            hidden: [rows, length, hidden], the input of block `first`; any float dtype, any device.
            attention_mask: bool [rows, length], False where a token is padding; None when nothing is.
            position_ids: [rows, length]; None when they are 0 … length - 1 in every row.
            prompts: [end - first, rows, prompt length, hidden], added to each block's input at positions 0 … prompt length - 1.
            all_hidden: return the outputs of every block, not only of the last.
            position_end: one past the last position of all rows that belong together, where these are only some of them; see `SpanStep`.
            adapters: are applied to all of it, as far as they are for these blocks.
            dropout: of what enters the last of them.
        Returns:
            outputs [rows, length, hidden] in the span's dtype on its device: one, or with `all_hidden` one a block.
        Raises:
            ValueError: the span has no such blocks.
        """
        first, end = self._range(first, end)
        return self._library_pass(
            hidden,
            first,
            end,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_end=position_end,
            prompts=prompts,
            all_hidden=all_hidden,
            adapters=adapters,
            dropout=dropout,
        )

    def _alone(self, step: SpanStep, first: int, end: int) -> list[torch.Tensor]:
        """A step by itself, with the library's own attention."""
        cache = self._paged_cache
        if cache is None:
            raise RuntimeError("the span has no store of keys and values")
        cache.begin(step.rows, step.hidden.shape[1])
        return self._library_pass(
            step.hidden,
            first,
            end,
            cache=cache,
            attention_mask=step.mask,
            position_ids=step.position_ids,
            position_end=step.position_end,
            prompts=step.prompts,
            all_hidden=step.all_hidden,
            adapters=step.adapters,
        )

    def _library_pass(
        self,
        hidden: torch.Tensor,
        first: int,
        end: int,
        *,
        cache: PagedCache | ShapeCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        position_end: int | None = None,
        prompts: torch.Tensor | None = None,
        all_hidden: bool = False,
        adapters: Sequence[Adapter] = (),
        dropout: Dropout | None = None,
    ) -> list[torch.Tensor]:
        hidden = hidden.to(self.device, self.dtype)
        kwargs: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask.to(self.device, torch.long)
        if position_ids is not None and self.takes_position_ids:
            kwargs["position_ids"] = position_ids.to(self.device, torch.long)
        adding: list[Hook] = []
        past = 0 if cache is None else cache.length
        if prompts is not None and past < prompts.shape[2]:
            reaching = prompts[:, :, past : past + hidden.shape[1]].to(self.device, self.dtype)
            adding = [add_at_start(prompt) for prompt in reaching]
        shares = [Share(adapters)] if adapters else []
        return self._backbone.run(
            first,
            end,
            hidden,
            kwargs,
            attention=self._backbone.library_attention,
            adding=adding,
            all_hidden=all_hidden,
            position_end=position_end,
            shares=shares,
            dropout=dropout,
        )

    def _packed_pass(self, steps: Sequence[SpanStep], first: int, end: int) -> list[list[torch.Tensor]]:
        row = PackedRow.of(steps, dtype=self.dtype, device=self.device, positions=self.takes_position_ids)
        adding: list[Hook] = []
        if row.prompted is not None:
            columns, added = row.prompted
            adding = [add_at(columns, prompt) for prompt in added]
        outputs = self._run_packed(
            Batch(row.segments, self.backend.page_tokens, self.device),
            row.hidden,
            row.position_ids,
            first,
            end,
            adding=adding,
            all_hidden=any(step.all_hidden for step in steps),
            position_end=max((step.position_end for step in steps if step.position_end is not None), default=None),
            shares=shares_of(zip(row.columns, (step.adapters for step in steps), strict=True), self.device),
        )
        return [
            [output[0, columns].view(step.hidden.shape) for output in (outputs if step.all_hidden else outputs[-1:])]
            for step, columns in zip(steps, row.columns, strict=True)
        ]

    def _run_packed(
        self, batch: Batch, hidden: torch.Tensor, position_ids: torch.Tensor | None, first: int, end: int, **options: Any
    ) -> list[torch.Tensor]:
        """Run a packed row through blocks [first, end); options and outputs as of `Backbone.run`."""
        state = self._paged
        if state is None:
            raise RuntimeError("the span has no store of keys and values")
        kwargs: dict[str, Any] = {"use_cache": False, **self._packed_arguments}
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        state.batch = batch
        try:
            return self._backbone.run(first, end, hidden, kwargs, attention=NAME, **options)
        finally:
            state.batch = None  # which is how adapted modules know that a pass is the library's

    def _range(self, first: int | None, end: int | None) -> tuple[int, int]:
        first, end = self.first if first is None else first, self.end if end is None else end
        if not self.first <= first < end <= self.end:
            raise ValueError(f"blocks {first}:{end} are not within {self.first}:{self.end}")
        return first, end

    def _state_over(self, store: KVStore, backend: Backend | None = None) -> PagedState:
        """A state for our attention function, which finds it in the modules that call it; `backend` in place of the span's own."""
        state = PagedState(store, backend or self.backend, self._windows, self._chunked)
        self._show(state)
        return state

    def _show(self, state: PagedState | None) -> None:
        for module in self._numbered:
            module.__dict__[STATE] = state

    @cached_property
    def _kinds(self) -> list[int]:
        """For each block the first one that is like it: of the same layout, shapes and attention window."""
        kinds: dict[Hashable, int] = {}
        described = (
            (tuple((name, weight.shape) for name, weight in block.named_parameters()), window)
            for block, window in zip(self._blocks, self._windows, strict=True)
        )
        return [kinds.setdefault(kind, index) for index, kind in enumerate(described)]
