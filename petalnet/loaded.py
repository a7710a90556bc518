"""Blocks in memory: a span with room for its KV tokens, measured and ready to answer, and how all of that goes away again."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petalnet.errors import UsageError

if TYPE_CHECKING:
    from petalnet.blocks.adapters import Adapter
    from petalnet.blocks.links import OpenStream
    from petalnet.blocks.service import BlockService
    from petalnet.blocks.spread import AnySpan
    from petalnet.blocks.throughput import Rates
    from petalnet.config import Settings
    from petalnet.models.adapters import AdapterSource
    from petalnet.serving import Model


@dataclass(frozen=True)
class Loaded:
    """The service of the loaded span, and the rates to announce."""

    service: BlockService
    rates: Rates


def load(settings: Settings, model: Model, span: tuple[int, int], open_link: OpenStream) -> Loaded:
    """Load blocks [a, b) of a model. Blocks: reads files, measures.

    Raises:
        UsageError: they do not fit into memory; the message says what would.
    """
    import torch

    from petalnet.blocks.capture_trial import choose
    from petalnet.blocks.service import USUAL_RATES, BlockService
    from petalnet.blocks.spread import SpreadSpan
    from petalnet.blocks.throughput import Rates, measure
    from petalnet.capacity import graph_bytes, kv_tokens, left_for_blocks, recording_bytes, require_room, spread, too_large
    from petalnet.devices import device_names
    from petalnet.models.manifest import require_listed

    # Adapters take little beside the blocks, and what is left for KV tokens is counted after both: a ceiling has to count them itself.
    adapter_bytes = sum(adapter.nbytes(*span) for adapter in model.adapters)
    captures_wanted = settings.cuda_graphs != "off"
    most = left_for_blocks(settings.max_memory, model.device, captures=captures_wanted, adapter_bytes=adapter_bytes)
    devices = device_names(model.device)
    precision: dict[str, Any] = {"dtype": model.dtype, "quantization": model.quantization}
    require_room(model.source, *span, **precision, device=model.device, max_memory=most)
    try:
        counts = spread(model.source, *span, **precision, device=model.device, max_memory=most)
        blocks = SpreadSpan.load(model.source, *span, **precision, devices=devices, counts=counts, may_pack=model.packs)
        adapters = {adapter.label: _on_device(adapter, blocks) for adapter in model.adapters}
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise too_large(model.source, *span, **precision, device=model.device, max_memory=most) from error
    tokens = kv_tokens(blocks, model.source, device=model.device, max_memory=most, wanted=settings.attn_cache_tokens)
    blocks.speed_up()
    captures = [
        choose(stage, settings.cuda_graphs, most_bytes=recording_bytes(str(stage.device), settings.max_memory)) for stage in blocks.stages
    ]
    captured = any(choice.captured for choice in captures)
    rate = settings.throughput
    rates = measure(blocks, model=model.key, captured=captured) if rate is None else Rates(rate, rate, rate)
    require_listed(model.source, model.key, blocks.first, blocks.digests)  # computed here, on this thread, and kept by the span
    try:
        service = BlockService(
            blocks,
            model=model.key,
            kv_tokens=tokens,
            rates=rates if rate is None else USUAL_RATES,  # what somebody chose to announce says little of how fast this machine is
            share_prefixes=settings.share_prefixes,
            open_link=open_link,
            adapters=adapters,
            graph_bytes=graph_bytes(model.device, settings.max_memory),
            captures=captures,
        )
        for stage in blocks.stages:
            if stage.captured is not None:
                stage.captured.prepare(stage.first, stage.end)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UsageError(
            f"blocks {blocks.first}:{blocks.end} are loaded, but there is no memory left for {tokens} KV tokens on {model.device}: give a "
            "smaller --attn-cache-tokens, or serve fewer blocks"
        ) from error
    return Loaded(service, rates)


def _on_device(source: AdapterSource, blocks: AnySpan) -> Adapter:
    """An adapter's part for blocks that are loaded."""
    from petalnet.blocks.adapters import Adapter, LoraWeights

    loaded = source.load(blocks.first, blocks.end)
    return Adapter(
        {
            block: {path: LoraWeights(a.to(device), b.to(device)) for path, (a, b) in layers.items()}
            for block, layers in loaded.items()
            for device in [blocks.device_of(block)]
        }
    )


def release_memory() -> None:
    """Give back the memory of blocks that nobody refers to any more. Blocks for up to a second."""
    import torch

    # The node froze what was there when it had started, the first blocks among it: the collector would not look at that.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
