"""Any decoder of `transformers`, with its layers in a swarm.

`distributed_class(BloomForCausalLM)` is a subclass of the library's class, made once for each. Its models are the library's, with two
changes: the list of layers is a `RemoteSequential`, and the class of the module that runs that list (the backbone) is the distributed
version of its own, whose `forward` tells the list what the library does not tell its layers: the padding mask, positions, the session,
and how many of the last positions the head around the backbone is asked for.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petalnet.client.cache import SessionCache
from petalnet.client.drafting import Drafting, current_drafting, extended
from petalnet.client.generation import IMPLICIT_MAX_LENGTH, DistributedGeneration, longest_of, refuse_attentions
from petalnet.client.remote import RemoteSequential, local_modules
from petalnet.client.session import InferenceSession, as_mask, unusual_positions
from petalnet.client.tuning import backbone_of, prompt_length, put_before, without
from petalnet.errors import ModelError, UsageError
from petalnet.models.frequencies import Frequencies

_kept: ContextVar[int] = ContextVar("petalnet_kept", default=0)
"""Inside of the `forward` of a model with a head: of how many of the last positions it uses the hidden states; 0 for all of them."""

_given_mask: ContextVar[Any] = ContextVar("petalnet_given_mask", default=None)
"""Inside of the `forward` of a model around the decoder: the padding mask that it was given, of which it may make the library's masks."""

_OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
"""Arguments of models of text and more that are no text. What becomes of them is often attended to in both directions."""


class DistributedModel(DistributedGeneration):
    """What every distributed model has beside what the library's class gives it."""

    layers_name: str | None = None
    """Name of the attribute that holds the remote list, in the module whose `forward` runs it; None in all others."""
    library_class: type[PreTrainedModel]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the embeddings, the norm and the head of a model, and join the swarm that serves its blocks.

        Args:
            pretrained_model_name_or_path: a hub id, or a folder in Hugging Face format; or one that `save_pretrained` has written, to go on
                with what was trained.
            config: a configuration to use in place of the model's; it may carry the settings below as attributes.
            initial_peers: bootstrap multiaddrs; without them the environment, the configuration file, a client daemon on this machine.
            dtype: of the local part (`torch_dtype` means the same); None or "auto" for the checkpoint's.
            allowed_servers, blocked_servers, request_timeout, connect_timeout, max_retries, show_route, …: see `ClientSettings`.
            revision, token, cache_dir: as `huggingface_hub` understands them.
            max_disk_space: bytes that weights fetched from the hub may take on this machine's disk; None for no bound.
            base_model: of a folder with a trained part, where its base model is, if no longer where it was.
            others: attributes of the configuration to change, e.g. num_labels.
        Raises:
            NoSwarmError: no bootstrap peers were given or found.
            ModelError: the model cannot be read, or is not of this class's family.
        """
        from petalnet.client.loading import load_model

        return load_model(cls.library_class, pretrained_model_name_or_path, config=config, **kwargs)

    @property
    def remote_blocks(self) -> RemoteSequential | None:
        """The list of remote blocks; None in a model that was not loaded by `from_pretrained`."""
        return next((module for module in self.modules() if isinstance(module, RemoteSequential)), None)  # type: ignore[attr-defined]

    @property
    def prompt_length(self) -> int:
        """KV entries that trained prompts take before each row's tokens; 0 where there are none."""
        return prompt_length(backbone_of(self))

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """A KV cache on the servers, for several calls of `generate`; see `InferenceSession`.

        Args:
            max_length: the most KV entries of a row, all calls together: its tokens, and trained prompts where the model has them.
        """
        blocks = self.remote_blocks
        if blocks is None:
            raise ValueError("this model has no remote blocks: load it with from_pretrained")
        prompts = self.prompt_length
        if prompts and isinstance(max_length, int) and max_length <= prompts:
            raise ValueError(f"a max_length of {max_length} KV entries leaves no room for tokens after the {prompts} trained prompts")
        return blocks.inference_session(max_length=max_length)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save what was trained: prompts, adapters, new heads, and whatever else requires gradients. `from_pretrained` goes on with it.

        Args:
            save_directory: a folder, which is made where it is not there; see `client.saving` for what it holds.
            is_main_process: False does nothing.
            state_dict: where values are taken from in place of the model's own; what was not trained is left out.
            kwargs: what the library's own method takes beside that, which is about large models and means nothing here.
        Raises:
            UsageError: nothing of the model was trained.
            OSError: the folder cannot be written; what was there is unharmed.
        """
        if self.remote_blocks is None:
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            raise UsageError("push_to_hub=True is not possible while saving: call model.push_to_hub(name) instead")
        from petalnet.client.saving import save

        if is_main_process:
            save(self, save_directory, state_dict)
        return None

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """What `save_pretrained` leaves out: `Trainer`, which resumes from such a checkpoint, does not warn that it is missing there."""
        if self.remote_blocks is None:
            return self.__dict__.get("_keys_to_ignore_on_save")
        from petalnet.client.saving import trained_parameters

        return set(self.state_dict()) - set(trained_parameters(self))  # type: ignore[attr-defined]

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, names: Any) -> None:
        self.__dict__["_keys_to_ignore_on_save"] = names

    def close(self) -> None:
        """Leave the swarm. Copies of the model share the connection and cannot be used any more either."""
        blocks = self.remote_blocks
        if blocks is not None:
            blocks.target.swarm.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def distributed_class(library_class: Any) -> Any:
    """The distributed version of a model class of the library; of a distributed class, itself."""
    return library_class if issubclass(library_class, DistributedModel) else _make_class(library_class)


@functools.cache
def _make_class(library_class: Any) -> Any:
    name = f"Distributed{library_class.__name__}"
    attributes = {
        "library_class": library_class,
        "forward": _wrap_forward(library_class.forward),
        "__doc__": f"`transformers.{library_class.__name__}` whose blocks run on the servers of a swarm.",
        "__module__": "petalnet.client.families",  # where such a name is found again
    }
    return type(name, (DistributedModel, library_class), attributes)


def distribute(model: PreTrainedModel) -> None:
    """Make a model of the library, whose list of layers is a `RemoteSequential` by now, a distributed one.

    Raises:
        ModelError: the model runs its layers in a way that a remote list cannot follow.
    """
    owner, name = next(
        (module, name) for module in model.modules() for name, child in module.named_children() if isinstance(child, RemoteSequential)
    )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = distributed_class(type(module))
    owner.layers_name = name
    getattr(owner, name).frequencies = Frequencies.of(model)._replace(growing=())
    _settle_layer_form(owner, getattr(owner, name))


def _settle_layer_form(owner: Any, blocks: RemoteSequential) -> None:
    """Find out whether the library's `forward` expects a tensor of a layer, or (in old families) a tuple.

    It is run once over two tokens and a list that gives back what it gets.
    """
    ids = torch.zeros(2, 1, dtype=torch.int64, device=next(owner.parameters()).device)
    seen = ""
    for returns_tuple in (False, True):
        blocks.__dict__["returns_tuple"] = returns_tuple
        try:
            with torch.no_grad(), blocks.as_one_layer(lambda hidden: [hidden]) as opened:
                output = type(owner).library_class.forward(owner, input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        except (TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            seen = f"{type(error).__name__}: {error}"
            continue
        # The width may be another one: some project what comes out of their layers to the width of their embeddings.
        if opened.outputs and output.shape[:-1] == opened.outputs[-1].shape[:-1]:
            return
        seen = f"its output has the shape {list(output.shape)}"
    raise ModelError(f"{type(owner).__name__} does not run its layers as a plain list ({seen})")


def _wrap_forward(library_forward: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(library_forward).parameters)[1:]

    # The library looks at the signature to decide what it may pass; `wraps` shows it the original one.
    @functools.wraps(library_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
        if self.layers_name is not None:
            return _run_backbone(self, self._modules[self.layers_name], library_forward, call)
        kept = call.get("logits_to_keep") if "logits_to_keep" in names else None
        for name in _OTHER_INPUTS:
            if call.get(name) is not None:
                raise ValueError(f"{name} is not possible: of a {self.config.model_type} model, the swarm runs the text part alone")
        token = _kept.set(kept if type(kept) is int and kept > 0 else 0)
        mask = call.get("attention_mask")
        given = _given_mask.set(_given_mask.get() if isinstance(mask, dict) else mask)
        try:
            return library_forward(self, *args, **kwargs)
        finally:
            _given_mask.reset(given)
            _kept.reset(token)

    return forward


def _run_backbone(model: Any, blocks: RemoteSequential, library_forward: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The library's `forward` around remote blocks."""
    config = model.config
    refuse_attentions(call.get("output_attentions"), config)
    return_dict = call.get("return_dict")
    return_dict = config.return_dict if return_dict is None else return_dict
    drafting = current_drafting()
    if drafting is not None:
        held = drafting.held_output(call)
        if held is not None:
            return held if return_dict else held.to_tuple()
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("give one of input_ids and inputs_embeds")
    given: torch.Tensor = embeds if ids is None else ids  # type: ignore[assignment]
    (check_embeds if ids is None else check_ids)(given, model.get_input_embeddings())
    rows, new = given.shape[:2]
    session = _session_of(model, blocks, call)
    mask = call.get("attention_mask")
    if isinstance(mask, dict):
        mask = call["attention_mask"] = _given_mask.get()
    start = 0 if session is None else session.tokens
    if session is not None:
        entries = (session.position or prompt_length(model)) + new
        if entries >= session.trace.input_entries:
            session.trace.token_begins(time.perf_counter())
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            raise ValueError("attention_mask must be a tensor of the shape [rows, length]")
        if session is not None and start and mask.shape[1] == new:
            # Only the new tokens' mask: the library wants it to cover what is cached as well.
            earlier = session.known_mask(start)
            earlier = torch.ones(rows, start, dtype=torch.bool) if earlier is None else earlier
            mask = call["attention_mask"] = torch.cat([earlier, as_mask(mask, rows)], dim=1).to(mask.device)
    wanted = call.get("output_hidden_states")
    wanted = config.output_hidden_states if wanted is None else wanted
    all_hidden = wanted is not False and wanted is not None
    drafted: list[int] = []
    if drafting is not None and (session is not drafting.session or ids is None or rows != 1 or new != 1 or all_hidden):
        drafting = None
    if drafting is not None:
        drafted, call = _with_draft(drafting, model, call, start)
        drafting.step_begins()
    cache = None if session is None else call.get("past_key_values") or session.cache
    prompted = put_before(model, {**call, "past_key_values": cache}, session)
    call, added = prompted.call, prompted.added
    mask, position_ids = call.get("attention_mask"), call.get("position_ids")
    kept = 0 if all_hidden or drafted else _kept.get() or (new if added else 0)  # nobody asks for what comes of the prompts
    if 0 < kept < added + new and _is_watched(model):
        kept = 0

    def run(hidden: torch.Tensor) -> list[torch.Tensor]:
        if session is not None:
            outputs = session.run(
                hidden,
                mask=mask,
                position_ids=position_ids,
                prompts=prompted.deep,
                all_hidden=all_hidden,
                keep=kept,
                prompt_entries=added,
            )
            if drafted:  # now: what the library does with them may fail
                session.set_aside(len(drafted))
            return outputs
        return blocks.run(hidden, mask=mask, position_ids=position_ids, prompts=prompted.deep, all_hidden=all_hidden)

    call.update(use_cache=session is not None, output_hidden_states=False, return_dict=True)
    with blocks.as_one_layer(run) as opened:
        outputs = library_forward(model, **call)
    outputs.last_hidden_state = without(added, outputs.last_hidden_state)
    if cache is not None:
        outputs.past_key_values = cache
    if drafting is not None:
        outputs = drafting.step_ends(outputs, drafted, start)
    if session is not None and ids is not None:
        session.note_tokens(ids, start)
    if all_hidden:
        boundaries = [without(added, boundary) for boundary in opened.outputs]
        outputs.hidden_states = _boundaries(boundaries, outputs.last_hidden_state, wanted, config)
    return outputs if return_dict else outputs.to_tuple()


def _with_draft(drafting: Drafting, model: Any, call: dict[str, Any], start: int) -> tuple[list[int], dict[str, Any]]:
    """Guesses of what follows the one token of a call of `forward`, and the call for it and them; none where they could change it."""
    drafted = drafting.draft(int(call["input_ids"]), start, getattr(model.get_input_embeddings(), "num_embeddings", None))
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if (
        drafted
        and not model.training
        and drafting.session.known_mask(start) is None
        and (mask is None or (mask.shape[1] == start + 1 and bool(mask.all())))
        and (positions is None or (positions.ndim == 2 and unusual_positions(positions, start, 1, 1) is None))
        and not _is_watched(model)
    ):
        longer = extended(call, drafted)
        if longer is not None:
            return drafted, longer
    return [], call


def _is_watched(model: nn.Module) -> bool:
    """Whether somebody's hooks see more of a backbone's hidden states than the head that asks for a few of them."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in local_modules(model))


def _session_of(model: nn.Module, blocks: RemoteSequential, call: Mapping[str, Any]) -> InferenceSession | None:
    """The session in which a call of `forward` runs: that of its cache, the one that is open around it, or one of its own.

    A call that needs gradients has none unless it was given one: of inputs, of parameters of the backbone, or of a head in training.
    """
    cache = call.get("past_key_values")
    if isinstance(cache, SessionCache):
        return cache.session
    if cache is not None:
        raise ValueError(
            "past_key_values must be what this model returned, since its KV cache lies on servers: use forward(use_cache=True) or a session"
        )
    if torch.is_grad_enabled():
        embeds = call.get("inputs_embeds")
        wanted = model.training or (embeds is not None and embeds.requires_grad)
        if wanted or any(parameter.requires_grad for parameter in model.parameters()):
            return None
    ambient = blocks.active_session()
    if ambient is not None or not call.get("use_cache"):
        return ambient
    longest = longest_of(model.config) or IMPLICIT_MAX_LENGTH
    return blocks.inference_session(max_length=min(longest, IMPLICIT_MAX_LENGTH))


def _boundaries(
    outputs: list[torch.Tensor], last: torch.Tensor, wanted: bool | int | list[int], config: Any
) -> tuple[torch.Tensor | None, ...]:
    """Hidden states as the library returns them: before each block and after the last, that one with the final norm applied."""
    boundaries = [*outputs[:-1], outputs[-1] if getattr(config, "tie_last_hidden_states", None) is False else last]
    if isinstance(wanted, bool):
        return tuple(boundaries)
    count = len(boundaries)
    chosen = {index % count for index in ([wanted] if isinstance(wanted, int) else wanted) if -count <= index < count}
    return tuple(boundary if index in chosen else None for index, boundary in enumerate(boundaries))


def check_ids(ids: torch.Tensor, embeddings: nn.Module) -> None:
    """Raises ValueError where ids are not int [rows, length] or one is outside of the vocabulary."""
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids must be integers of the shape [rows, length]; got {ids.dtype} {list(ids.shape)}")
    size = getattr(embeddings, "num_embeddings", None)
    if size is None or ids.numel() == 0:
        return
    if ids.numel() == 1:  # as in each step of an answer: one operation instead of three
        low = high = int(ids)
    else:
        low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise ValueError(f"token id {low if low < 0 else high} is outside of the vocabulary of {size} tokens")


def check_embeds(embeds: torch.Tensor, embeddings: nn.Module) -> None:
    """Raises ValueError where embeddings are not [rows, length, size]."""
    size = getattr(embeddings, "embedding_dim", None)
    if embeds.ndim != 3 or (size is not None and embeds.shape[-1] != size):
        raise ValueError(f"inputs_embeds must have the shape [rows, length, {size}]; got {list(embeds.shape)}")
