"""Trainable prompts: vectors that stand before every row's tokens, and vectors that are added to what each remote block gets there.

The first are prompt tuning (Lester et al., 2021, arXiv:2104.08691), `tuning_mode="ptune"`; with the second as well it is `"deep_ptune"`,
after P-Tuning v2 (Liu et al., 2021, arXiv:2110.07602), whose prefixes of keys and values are here sums of hidden states, so that they
travel as inputs. Both are ordinary parameters of the backbone, float32 whatever the model's dtype is, by the names that Petals gave them.

Callers of a model, the library's `generate` and heads among them, deal in tokens and never see the prompts. `put_before` turns a call of a
backbone's `forward` about tokens into one about KV entries; `without` takes the prompts' positions out of what came of it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from petalnet.client.cache import SessionCache
from petalnet.client.settings import DEEP_PTUNE

if TYPE_CHECKING:
    from petalnet.client.session import InferenceSession


@dataclass(frozen=True)
class Prompted:
    """A call of a backbone's `forward` in KV entries.

    Attributes:
        call: its arguments.
        added: how many entries before the tokens are prompts that this call computes; 0 where the session has them, or there are none.
        deep: [blocks, rows, added, hidden], of the dtype of the embeddings: what is added to each block's input; None where there are none.
    """

    call: dict[str, Any]
    added: int = 0
    deep: torch.Tensor | None = None


def add_prompts(backbone: Any, mode: str, length: int, blocks: int, hidden_size: int) -> list[str]:
    """Give a backbone trainable prompts. Returns their names in it.

    Those before the tokens begin as the embeddings of random tokens, from which short prompts learn better than from noise (Lester et al.,
    figure 3b); those of the blocks as zeros, so that training begins with what the model says without them.

    Args:
        mode: "ptune" or "deep_ptune".
        length: positions that they take.
        blocks, hidden_size: of the remote list.
    """
    embeddings = backbone.get_input_embeddings()
    weight = embeddings.weight
    with torch.no_grad():
        tokens = torch.randint(embeddings.num_embeddings, (length,))  # on the CPU, whatever the device: a seed gives the same everywhere
        begun = embeddings(tokens.to(weight.device)).float()
    backbone.prompt_embeddings = nn.Embedding.from_pretrained(begun, freeze=False)
    names = ["prompt_embeddings"]
    if mode == DEEP_PTUNE:
        zeros = torch.zeros(length, blocks * hidden_size, device=weight.device)
        backbone.intermediate_prompt_embeddings = nn.Embedding.from_pretrained(zeros, freeze=False)
        names.append("intermediate_prompt_embeddings")
    backbone.pre_seq_len = length
    return [f"{name}.weight" for name in names]


def backbone_of(model: Any) -> Any:
    """The module of a distributed model whose `forward` runs the remote blocks; the model itself where it has none."""
    return next((module for module in model.modules() if getattr(module, "layers_name", None) is not None), model)


def prompt_length(backbone: Any) -> int:
    """KV entries that a backbone's trained prompts take; 0 where it has none."""
    length: int = getattr(backbone, "pre_seq_len", 0)
    return length


def put_before(backbone: Any, call: dict[str, Any], session: InferenceSession | None) -> Prompted:
    """A call about tokens as one about KV entries: prompts before the tokens of a pass or of a session that begins, or told of those that
    the session has.

    Args:
        call: with `input_ids` or `inputs_embeds` of the new tokens, and an `attention_mask` of all tokens where there is one.
    Raises:
        ValueError: token_type_ids, to a model that uses them: the prompts have none; a mask that is not of the tokens.
    """
    begins = session is None or session.position == 0
    length = prompt_length(backbone) if begins or session is None else session.prompt_entries
    if not length:
        return Prompted(call)
    if call.get("token_type_ids") is not None and "token_type_ids" in inspect.signature(backbone.forward).parameters:
        raise ValueError("token_type_ids cannot be given to a model with trained prompts, of which they say nothing")
    call = dict(call)
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None:
        given = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        tokens = given.shape[1] + (0 if session is None else session.tokens)
        if mask.shape[1] != tokens:  # said here, where tokens are what is counted
            raise ValueError(f"attention_mask has {mask.shape[1]} columns for {tokens} tokens; trained prompts have none in it")
        call["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)
    if positions is not None:
        call["position_ids"] = positions + length
    if session is not None:
        call["past_key_values"] = SessionCache(session, with_prompts=True)
    if not begins:
        return Prompted(call)
    embeds = call.pop("input_ids", None)
    embeds = call["inputs_embeds"] if embeds is None else backbone.get_input_embeddings()(embeds)
    rows = embeds.shape[0]
    if positions is not None:
        first = torch.arange(length, dtype=positions.dtype, device=positions.device)
        positions = call["position_ids"]
        call["position_ids"] = torch.cat([first.expand(*positions.shape[:-1], length), positions], dim=-1)
    numbers = torch.arange(length, device=embeds.device)
    shallow = backbone.prompt_embeddings(numbers).to(embeds.dtype)
    call["inputs_embeds"] = torch.cat([shallow.expand(rows, *shallow.shape), embeds], dim=1)
    deep = None
    if "intermediate_prompt_embeddings" in backbone._modules:
        hidden_size = getattr(backbone, backbone.layers_name).hidden_size
        deep = backbone.intermediate_prompt_embeddings(numbers).to(embeds.dtype).view(length, -1, hidden_size)
        deep = deep.transpose(0, 1)[:, None].expand(-1, rows, -1, -1)
    return Prompted(call, length, deep)


def without(added: int, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [rows, entries, hidden] without those of the `added` prompts before the tokens."""
    return hidden[:, added:] if added else hidden
