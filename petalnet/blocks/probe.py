"""Can a model family be cut into spans? Tried, not believed.

The real configuration, with only its sizes made small, gets random weights, and the model as a whole is held against the same model cut
in two: a batch with left padding, a prefill and then tokens one by one, and a gradient. What cannot be cut (keys and values shared
between layers, inputs of its own for each layer, a state other than keys and values) shows here, before anybody's answer depends on it.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, DynamicCache, PreTrainedConfig

from petalnet.blocks.cache import windows_of
from petalnet.blocks.span import Span
from petalnet.errors import ModelError
from petalnet.models.anatomy import find_layers, text_config
from petalnet.models.cachedir import load_facts, store_facts
from petalnet.models.identity import config_hash
from petalnet.models.loading import resolve_class
from petalnet.version import __version__

log = logging.getLogger(__name__)

FEWEST_LAYERS, MOST_LAYERS = 4, 12
"""Layers of the small model: two for each half, and more where that is needed to have every kind of layer."""
HEADS = 4
TOKENS, STEPS = 9, 2
WINDOW = 5
"""Sliding windows are made this wide, so that the few tokens of a probe go past them."""
TOLERANCE = 1e-4
"""Relative to the outputs' size, in float32. Correct splits differ by 1e-6, wrong ones by 1e-2 and more."""
SMALL_SIZES = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 16),
    "vocab_size": 64,
}
"""Sizes that have nothing to do with how layers are put together. Lengths of contexts stay: rotary scaling depends on them."""


@dataclass(frozen=True)
class ProbeResult:
    """Whether a model can be split, and if not, why (one line)."""

    ok: bool
    reason: str = ""


def require_splittable(config: PreTrainedConfig) -> None:
    """Raises ModelError with the reason where models of this configuration cannot be served in spans."""
    result = probe(config)
    if not result.ok:
        raise ModelError(f"a {config.model_type} model cannot be split into blocks: {result.reason}")


def probe(config: PreTrainedConfig) -> ProbeResult:
    """Try to split a model of this configuration; the outcome is remembered for this version of the libraries. Takes under a second."""
    key = f"{config_hash(config)[:32]}-{transformers.__version__}-{__version__}"
    known = load_facts("probe", key)
    if isinstance(known.get("ok"), bool) and isinstance(known.get("reason"), str):
        return ProbeResult(known["ok"], known["reason"])
    result = _probe(config)
    store_facts("probe", key, {"ok": result.ok, "reason": result.reason})
    return result


def _probe(config: PreTrainedConfig) -> ProbeResult:
    try:
        windows_of(text_config(config))
        model = _small_model(config)
        return _compare(model)
    except ModelError as error:
        return ProbeResult(False, str(error))
    except Exception as error:
        # The family's own code ran on a cut model: whatever it raises means that it cannot be cut this way.
        log.debug("the probe of %s failed", config.model_type, exc_info=True)
        return ProbeResult(False, f"its layers do not run without the rest of the model ({type(error).__name__}: {_first_line(error)})")


def _small_model(config: PreTrainedConfig) -> Any:
    """A model of the configuration's family and shape, small, with random weights."""
    small = copy.deepcopy(config)
    shrink(text_config(small))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resolve_class(AutoModel, small)._from_config(small, dtype=torch.float32).eval()
        for parameter in model.parameters():
            # Initialised weights are so small that layers hardly differ from the identity.
            nn.init.uniform_(parameter, -0.2, 0.2) if parameter.dim() > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def shrink(config: PreTrainedConfig) -> None:
    """Make a decoder's configuration small in place: fewer layers and heads, narrow; head size and everything else as they are."""
    fields = config.__dict__
    names = config.attribute_map
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads

    def put(name: str, value: Any) -> None:
        name = names.get(name, name)
        if fields.get(name) is not None:
            fields[name] = value

    kv = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    few = HEADS if kv == heads else 1 if kv == 1 else 2
    put("num_key_value_heads", few)
    put("num_kv_heads", few)
    put("num_attention_heads", HEADS)
    put("hidden_size", HEADS * size)
    if getattr(config, "word_embed_proj_dim", None) == hidden:
        put("word_embed_proj_dim", HEADS * size)
    for name, value in SMALL_SIZES.items():
        if isinstance(fields.get(names.get(name, name)), int):
            put(name, min(value, fields[names.get(name, name)]))
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(fields.get(name), int):
            put(name, min(WINDOW, fields[name]))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if name in fields:
            fields[name] = 0 if name == "pad_token_id" and fields[name] is not None else None
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or []
    layers = next((n for n in range(FEWEST_LAYERS, MOST_LAYERS) if set(kinds[:n]) == set(kinds)), MOST_LAYERS)
    layers = min(layers, count)
    for name, entries in list(fields.items()):
        if isinstance(entries, (list, tuple)) and len(entries) == count and not name.endswith("_token_id"):
            fields[name] = entries[:layers]
    put("num_hidden_layers", layers)


def _compare(model: Any) -> ProbeResult:
    """Hold a model against itself cut in two."""
    count = len(find_layers(model).layers)
    half = max(1, count // 2)
    spans = [_span(model, 0, half), *([_span(model, half, count)] if half < count else [])]
    rows = 3
    ids = torch.arange(rows * (TOKENS + STEPS)).view(rows, -1) * 7 % (text_config(model.config).vocab_size - 4) + 2
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[1, :2] = mask[2, :5] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    whole = _Whole(model)

    whole_cache, caches = DynamicCache(config=model.config), [span.new_cache(64) for span in spans]
    start = 0
    for end in (TOKENS, *range(TOKENS + 1, TOKENS + STEPS + 1)):
        kwargs: dict[str, Any] = {"position_ids": positions[:, start:end]} if spans[0].takes_position_ids else {}
        first, expected = whole.run(
            input_ids=ids[:, start:end], attention_mask=mask[:, :end].long(), past_key_values=whole_cache, use_cache=True, **kwargs
        )
        hidden = first
        with torch.inference_mode():
            for span, cache in zip(spans, caches, strict=True):
                (hidden,) = span.forward(hidden, attention_mask=mask[:, :end], position_ids=positions[:, start:end], cache=cache)
        error = _error(hidden, expected, mask[:, start:end])
        if not error < TOLERANCE:
            what = "a prompt" if start == 0 else "a token with a cache"
            return ProbeResult(False, f"split, it computes {what} differently (relative difference {error:.1e})")
        start = end

    first, expected = whole.run(input_ids=ids, use_cache=False)
    hidden = inputs = first.clone().requires_grad_()
    for span in spans:
        (hidden,) = span.forward(hidden)
    error = _error(hidden.detach(), expected, mask.new_ones(mask.shape))
    if not error < TOLERANCE:
        return ProbeResult(False, f"split, it computes a pass without a cache differently (relative difference {error:.1e})")
    (gradient,) = torch.autograd.grad(hidden.square().mean(), [inputs])
    if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        return ProbeResult(False, "no gradient comes back through its layers")
    return ProbeResult(True)


class _Whole:
    """The whole model, with what enters its first layer and what leaves its last."""

    def __init__(self, model: Any) -> None:
        self._model = model
        layers = find_layers(model).layers
        layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)
        self._entered: torch.Tensor
        self._left: torch.Tensor

    def run(self, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            self._model(**kwargs)
        return self._entered, self._left

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = args[0] if args else kwargs["hidden_states"]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._left = output[0] if isinstance(output, tuple) else output


def _span(model: Any, first: int, end: int) -> Span:
    return Span(copy.deepcopy(model), first, end, dtype=torch.float32, device=torch.device("cpu"))


def _error(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest difference where the mask is set, relative to the outputs' spread."""
    return float((found - expected)[mask].abs().max() / expected[mask].std())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
