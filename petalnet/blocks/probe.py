"""Can a model family be cut into spans? Tried, not believed.

The real configuration, with only its sizes made small, gets random weights, and the model as a whole is held against the same model cut
in two: sessions of unequal length that share passes, with prompts in pieces, tokens one by one, several rows and left padding; a pass
without a past, and its gradient. What cannot be cut (keys and values shared between layers, inputs of its own for each layer, a state
other than keys and values) shows here, before anybody's answer depends on it. Where only sharing a pass goes wrong, because layers want
more than an attention function is told, sessions of the family run one after the other.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, DynamicCache, PreTrainedConfig

from petalnet.blocks.cache import windows_of
from petalnet.blocks.kv import KVStore
from petalnet.blocks.pages import PagePool, Rows
from petalnet.blocks.span import Span, SpanStep
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
"""Tokens of a prompt, and those that come one by one after it."""
WINDOW = 5
"""Sliding windows, and distances by which queries are scaled, are made this long, so that the few tokens of a probe go past them."""
TOLERANCE = 1e-3
"""Relative to the outputs' size, in float32. Correct splits differ by 1e-6 (1e-4 where scores are large), wrong ones by 1e-2 and more."""
SMALL_SIZES = {
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 16),
    "vocab_size": 64,
}
"""Sizes that have nothing to do with how layers are put together. Lengths of contexts stay: rotary scaling depends on them."""
SESSIONS = ((0,), (1, 2), (0,))
"""Which rows of the batch each session has; row 0 has no padding."""
ROUNDS = (
    ((0, 0, 4), (1, 0, 9)),
    ((0, 4, 9), (1, 9, 10), (2, 0, 7)),
    ((0, 9, 10), (1, 10, 11), (2, 7, 9)),
    ((0, 10, 11), (2, 9, 11)),
)
"""The passes: parts (session, start, end)."""
REVISION = 4
"""Of what is tried here; a result of another one is not believed."""


@dataclass(frozen=True)
class ProbeResult:
    """What has been found out about a model.

    Attributes:
        ok: it can be split.
        reason: why not, in one line.
        packs: steps of several sessions can share a pass.
    """

    ok: bool
    reason: str = ""
    packs: bool = False


def require_splittable(config: PreTrainedConfig) -> ProbeResult:
    """Raises ModelError with the reason where models of this configuration cannot be served in spans."""
    result = probe(config)
    if not result.ok:
        raise ModelError(f"a {config.model_type} model cannot be split into blocks: {result.reason}")
    return result


def probe(config: PreTrainedConfig) -> ProbeResult:
    """Try to split a model of this configuration; the outcome is remembered for this version of the libraries. Takes under a second."""
    key = f"{config_hash(config)[:32]}-{transformers.__version__}-{torch.__version__}-{__version__}-{REVISION}"
    known = load_facts("probe", key)
    if isinstance(known.get("ok"), bool) and isinstance(known.get("reason"), str) and isinstance(known.get("packs"), bool):
        return ProbeResult(known["ok"], known["reason"], known["packs"])
    result = _probe(config)
    store_facts("probe", key, asdict(result))
    return result


def _probe(config: PreTrainedConfig) -> ProbeResult:
    try:
        windows_of(text_config(config))
        model = _small_model(config)
        return _compare(model)
    except ModelError as error:
        return ProbeResult(False, str(error).partition(": ")[2] or str(error))  # what stands before is said by whoever tells of it
    except Exception as error:
        # The family's own code ran on a cut model: whatever it raises means that it cannot be cut this way.
        log.debug("the probe of %s failed", config.model_type, exc_info=True)
        return ProbeResult(False, f"its layers do not run without the rest of the model ({type(error).__name__}: {_first_line(error)})")


def _small_model(config: PreTrainedConfig) -> Any:
    """A model of the configuration's family and shape, small, with random weights."""
    small = copy.deepcopy(text_config(config))
    shrink(small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resolve_class(AutoModel, small)._from_config(small, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            # Initialised weights are so small that layers hardly differ from the identity. Much larger ones than these would make
            # attention choose single keys, so that a difference in the last bit becomes one that is seen.
            if parameter.dim() > 1:
                bound = min(0.2, (3 / max(parameter.shape[-2:])) ** 0.5)
                nn.init.uniform_(parameter, -bound, bound)
            elif name.endswith("bias"):
                nn.init.uniform_(parameter, -0.5, 0.5)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)
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
    for name in ("sliding_window", "attention_chunk_size", "floor_scale"):
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
    spans = _cut(model, may_pack=True)
    batch = _Batch.of(model, positions=spans[0].takes_position_ids)
    wrong = _wrong_pass(spans, batch)
    if wrong is not None:
        return ProbeResult(False, wrong)
    if all(span.packs for span in spans):
        wrong = _wrong_session(spans, batch)
        if wrong is None:
            return ProbeResult(True, packs=True)
        log.debug("%s models cannot share a pass among sessions: %s", model.config.model_type, wrong)
    wrong = _wrong_session(_cut(model, may_pack=False), batch)
    return ProbeResult(True) if wrong is None else ProbeResult(False, wrong)


def _cut(model: Any, *, may_pack: bool) -> list[Span]:
    count = len(find_layers(model).layers)
    half = max(1, count // 2)
    ranges = [(0, half), (half, count)] if half < count else [(0, count)]
    cpu = torch.device("cpu")
    return [Span(_twin(model), first, end, dtype=torch.float32, device=cpu, may_pack=may_pack) for first, end in ranges]


@dataclass(frozen=True)
class _Batch:
    """What the whole model computes.

    Attributes:
        mask: bool [rows, tokens], left padding.
        positions: [rows, tokens].
        entered, left: [rows, tokens, hidden] before the first and after the last layer, with a prompt and then tokens one by one.
        entered_at_once, left_at_once: the same of one pass without padding.
    """

    mask: torch.Tensor
    positions: torch.Tensor
    entered: torch.Tensor
    left: torch.Tensor
    entered_at_once: torch.Tensor
    left_at_once: torch.Tensor

    @classmethod
    def of(cls, model: Any, *, positions: bool) -> _Batch:
        rows, tokens = 3, TOKENS + STEPS
        ids = torch.arange(rows * tokens).view(rows, -1) * 7 % (text_config(model.config).vocab_size - 4) + 2
        mask = torch.ones(ids.shape, dtype=torch.bool)
        mask[1, :2] = mask[2, :5] = False
        places = (mask.long().cumsum(1) - 1).clamp(min=0)
        whole = _Whole(_twin(model))
        cache = DynamicCache(config=model.config)
        entered, left = [], []
        start = 0
        for end in range(TOKENS, tokens + 1):
            kwargs: dict[str, Any] = {"position_ids": places[:, start:end]} if positions else {}
            states = whole.run(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end].long(), past_key_values=cache, use_cache=True, **kwargs
            )
            entered.append(states[0])
            left.append(states[1])
            start = end
        at_once = whole.run(input_ids=ids, use_cache=False)
        return cls(mask, places, torch.cat(entered, dim=1), torch.cat(left, dim=1), *at_once)


def _wrong_pass(spans: list[Span], batch: _Batch) -> str | None:
    """What is wrong with a pass without a past and its gradient, in one line; None where they are right."""
    hidden = inputs = batch.entered_at_once.clone().requires_grad_()
    for span in spans:
        (hidden,) = span.forward(hidden)
    error = _error(hidden.detach(), batch.left_at_once)
    if not error < TOLERANCE:
        return f"split, it computes a pass without a cache differently (relative difference {error:.1e})"
    (gradient,) = torch.autograd.grad(hidden.square().mean(), [inputs])
    if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        return "no gradient comes back through its layers"
    return None


def _wrong_session(spans: list[Span], batch: _Batch) -> str | None:
    """What is wrong with steps of sessions, in one line; None where they are right."""
    tokens = TOKENS + STEPS
    held: list[list[Rows]] = []
    for span in spans:
        page_tokens = span.backend.page_tokens
        pages = sum(len(chosen) for chosen in SESSIONS) * -(-tokens // page_tokens)
        span.attach(KVStore(span.kv_shapes, pages=pages, page_tokens=page_tokens, dtype=span.dtype, device=span.device))
        pool = PagePool(pages, page_tokens)
        held.append([Rows(pool, tokens) for _ in SESSIONS])
        for rows, chosen in zip(held[-1], SESSIONS, strict=True):
            rows.resize(len(chosen))
    for parts in ROUNDS:
        hidden = [batch.entered[SESSIONS[session], start:end] for session, start, end in parts]
        for span, sessions in zip(spans, held, strict=True):
            steps = []
            for (session, start, end), entering in zip(parts, hidden, strict=True):
                rows, chosen = sessions[session], SESSIONS[session]
                rows.prepare(end - start)
                mask = batch.mask[chosen, :end]
                padded = not bool(mask.all())
                steps.append(SpanStep(rows, entering, mask if padded else None, batch.positions[chosen, start:end] if padded else None))
            hidden = [output for (output,) in span.step(steps)]
            for session, start, end in parts:
                sessions[session].advance(end - start)
        for (session, start, end), found in zip(parts, hidden, strict=True):
            kept = batch.mask[SESSIONS[session], start:end]
            error = _error(found[kept], batch.left[SESSIONS[session], start:end][kept])
            if not error < TOLERANCE:
                what = "a prompt" if start == 0 else "a token with a cache"
                return f"split, it computes {what} differently (relative difference {error:.1e})"
    return None


def _twin(model: Any) -> Any:
    """A copy of a model that shares its weights, whose modules can be cut and hooked."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


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


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the outputs' spread."""
    return float((found - expected).abs().max() / expected.std())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
