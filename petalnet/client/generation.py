"""`generate` over a session.

The library's own `generate` does the work; what is decided here is which session holds the keys and values, and what the library is told
about a session that goes on. It is given all ids and masks so far, for the logits processors and its length rules, and skips what the
cache has. It gives them back; the caller gets only the new inputs and the new tokens.

Entries: n new tokens take n - 1 entries beside those of the inputs, since the last token is only returned. It is computed first when the
session goes on. Trained prompts take entries before the first token (`prompt_length`), of which the library is not told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from petalnet.client.assistants import adapt_assistant
from petalnet.client.cache import SessionCache
from petalnet.client.drafting import Drafting, drafting_with
from petalnet.client.session import InferenceSession, as_mask
from petalnet.client.trace import Trace
from petalnet.client.tracing import last_trace, tracing
from petalnet.models.frequencies import Frequencies

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

DEFAULT_NEW_TOKENS = 20
"""What the library generates when no length is given."""
IMPLICIT_MAX_LENGTH = 2048
"""KV entries of a session of which nobody has said how long it will be, where the model allows as many."""
_WITHOUT_DRAFTS = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
    "custom_generate",
    "dola_layers",
    "output_hidden_states",
)
"""Arguments of `generate` that bring guesses of their own, or look at more than the output of the newest token."""
_ASSISTANT_PLACE = 4
"""Place of `assistant_model` among the positional arguments of the library's `generate` after the configuration."""


class DistributedGeneration:
    """The part of a distributed model that generates; before the library's class in the order of bases."""

    # The library evaluates the annotations of its models' classes, so these may name nothing that is imported for type checkers only.
    config: Any
    remote_blocks: Any
    generation_config: Any
    prompt_length: Any

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        session: InferenceSession | None = None,
        **kwargs: Any,
    ) -> Any:
        """`transformers`' generate, through the swarm.

        Args:
            inputs: int64 [rows, length]; in a session that has tokens already, only the new ones, or None to go on from the last token.
            session: the session to go on in; without it the one whose `with` block is open in this thread, else one for this call alone.

        A `past_key_values` that a model returned is meant as in the library: `inputs` and the returned rows hold all tokens so far.

        `max_length`, where it is given instead of `max_new_tokens`, counts all tokens of the session. An interrupt (Ctrl-C) ends the
        session, since a step may be half-way through the servers.

        Returns:
            as the library; the rows hold `inputs` and the new tokens.
        Raises:
            ValueError: the session's max_length is too small for what was asked, and other wrong arguments; nothing was sent.
            MissingBlocksError, ServerError: the swarm has no server for a block, or lost one in mid-answer.
        """
        blocks = self.remote_blocks
        if blocks is None:
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]
        refuse_attentions(kwargs.get("output_attentions"), generation_config, self.generation_config)
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        elif kwargs.get("input_ids") is not None:
            raise ValueError("give the input ids once: as inputs or as input_ids")
        kwargs.pop("input_ids", None)
        if getattr(generation_config, "is_assistant", None):
            return self._propose(inputs, generation_config, args, kwargs)
        cache = kwargs.pop("past_key_values", None)
        has_all = cache is not None and session is None
        session = self._named_session(session, cache) or blocks.active_session()
        plan = _Plan(self, inputs, generation_config, kwargs)
        if session is not None:
            session.require_open()
            if has_all and plan.input_length < session.tokens:
                raise ValueError(
                    f"with past_key_values the inputs are all tokens so far: {plan.input_length} were given, and its cache holds "
                    f"{session.tokens}; to give only new ones, pass session="
                )
            return self._generate_in(session, plan, generation_config, args, kwargs, has_all=has_all)
        entries = self.prompt_length + _virtual_tokens(self) + max(plan.total_length(0) - 1, 1)
        session = InferenceSession(blocks, entries, promise_rows=plan.rows * plan.copies)
        try:
            return self._generate_in(session, plan, generation_config, args, kwargs)
        finally:
            session.close("its answer is complete (answers that go on need `with model.inference_session(max_length=…)`)")

    @property
    def last_trace(self) -> Trace | None:
        """Where the time of the last answer of this thread went that is over; None before the first."""
        return last_trace(self)

    def _propose(self, inputs: Any, generation_config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`generate` for the library, which uses this model as another one's assistant: it gives all ids in each call, and takes care of
        the cache from call to call. The session ends when the library forgets that."""
        cache = kwargs.pop("past_key_values", None)
        if cache is None:
            longest = self.prompt_length + inputs.shape[1] + IMPLICIT_MAX_LENGTH
            cache = self.remote_blocks.inference_session(max_length=min(longest, longest_of(self.config) or longest)).cache
        kwargs["use_cache"] = True
        with self.remote_blocks.no_active_session():
            return super().generate(inputs, generation_config, *args, past_key_values=cache, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """The library's source of candidates (assisted generation), which proposes no more of them than the session has room for."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        cache = kwargs["model_kwargs"].get("past_key_values")
        if isinstance(cache, SessionCache):
            propose, longest = generator.get_candidates, cache.session.max_length - self._prompt_entries(cache.session)

            def get_candidates(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
                ids, logits = propose(*args, **kwargs)
                excess = ids.shape[1] - longest
                return (ids, logits) if excess <= 0 else (ids[:, :-excess], None if logits is None else logits[:, :-excess])

            generator.get_candidates = get_candidates
            if self.remote_blocks.target.settings.speculation and kwargs["generation_config"].do_sample is False:
                adapt_assistant(generator, cache.session, self.remote_blocks)
        return generator

    def _drafting(
        self, session: InferenceSession, plan: _Plan, inputs: torch.Tensor | None, args: tuple[Any, ...], total: int
    ) -> Drafting | None:
        """What drafts in this answer; None where nothing may."""
        blocks = self.remote_blocks
        if (
            not blocks.target.settings.speculation
            or plan.copies > 1
            or plan.rows != 1
            or session.rows not in (None, 1)
            or len(args) > _ASSISTANT_PLACE
            or any(plan.value(name) for name in _WITHOUT_DRAFTS)
        ):
            return None
        # Of embeddings nobody knows which ids they are: none is like another.
        ids = list(range(-1, -1 - plan.input_length, -1)) if inputs is None or not inputs.shape[1] else inputs[0].tolist()
        return Drafting(session, blocks.draft_policy.for_answer(), ids, total - 1, plan.ends, Frequencies.of(self))  # type: ignore[arg-type]

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The library's, which refuses a cache that was given beside a wish of how to hold one on this machine: here is none to hold."""
        if isinstance(model_kwargs.get("past_key_values"), SessionCache):
            generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _prompt_entries(self, session: InferenceSession) -> int:
        """KV entries that trained prompts take in a session, or will take once it begins."""
        entries: int = session.prompt_entries if session.position else self.prompt_length
        return entries

    def _named_session(self, session: InferenceSession | None, cache: Any) -> InferenceSession | None:
        if cache is None:
            return session
        if not isinstance(cache, SessionCache) or (session is not None and cache.session is not session):
            raise ValueError("past_key_values must be what a distributed model returned; to keep a KV cache between calls, pass session=")
        return cache.session

    def _generate_in(
        self,
        session: InferenceSession,
        plan: _Plan,
        generation_config: GenerationConfig | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        has_all: bool = False,
    ) -> Any:
        before = None if has_all else session.known_tokens(plan.filler)
        length_before = 0 if before is None else before.shape[1]
        inputs = plan.inputs
        if before is not None:
            before = before.to(plan.device)
            if plan.has_embeds:
                raise ValueError("inputs_embeds can only begin a session; give its next tokens as ids")
            if inputs is not None and inputs.shape[0] != before.shape[0]:
                raise ValueError(f"the session holds {before.shape[0]} rows and was given {inputs.shape[0]}")
            kwargs["attention_mask"] = plan.whole_mask(session, before)
            inputs = before if inputs is None else torch.cat([before, inputs], dim=1)
        total = plan.total_length(length_before)
        prompts = self._prompt_entries(session)
        if prompts + total - 1 > session.max_length:
            with_prompts = f" after {prompts} trained prompts" if prompts else ""
            raise ValueError(
                f"an answer of {total} tokens{with_prompts} takes {prompts + total - 1} KV entries, more than the session's max_length of "
                f"{session.max_length}"
            )
        if inputs is not None and inputs.shape[1] == session.tokens > 0:
            session.position -= 1  # its last token's logits are needed again
        if session.position and plan.copies > 1:
            session.reorder(torch.arange(session.rows or 1).repeat_interleave(plan.copies))
        if kwargs.get("streamer") is not None and length_before:
            kwargs["streamer"] = _TailStreamer(kwargs["streamer"], length_before)
        # Without its cache every step would run all tokens again; the results are the same.
        kwargs["use_cache"] = True
        length = inputs.shape[1] if inputs is not None else plan.input_length or 1
        shows_route = bool(self.remote_blocks.target.settings.show_route)
        drafting = self._drafting(session, plan, inputs, args, total)
        try:
            # What logits processors run beside the answer (guidance by another prompt) is not part of the session.
            with (
                self.remote_blocks.no_active_session(),
                tracing(self, session, show_route=shows_route) as trace,
                drafting_with(drafting, self.remote_blocks),
            ):
                trace.input_entries = prompts + length
                result = super().generate(inputs, generation_config, *args, past_key_values=session.cache, **kwargs)  # type: ignore[misc]
                sequences = result.sequences if isinstance(result, ModelOutput) else result
                trace.rows, trace.tokens = sequences.shape[0], sequences.shape[1] - (0 if inputs is None and plan.has_embeds else length)
        except KeyboardInterrupt:
            session.close("its answer was interrupted")
            raise
        except Exception:  # the library's, a processor's or ours: it goes on, and the session is what it was before
            if not session.closed:
                _take_back(session, plan.copies, prompts + length, before)
            raise
        if plan.beams > 1 and not session.closed:
            # The winners' keys and values are scattered over the rows, or gone. Back to what all beams of an answer have in common.
            session.position = min(session.position, prompts + length)
            session.reorder(torch.arange(len(sequences)) // plan.returned * plan.beams)
        if not plan.has_embeds:
            session.note_tokens(sequences, 0)
        fresh = sequences[:, length_before:]
        if isinstance(result, ModelOutput):
            result.sequences = fresh
            return result
        return fresh


class _Plan:
    """What the arguments of a `generate` call come to."""

    def __init__(
        self, model: PreTrainedModel, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> None:
        self._defaults: GenerationConfig = model.generation_config
        self._config = generation_config
        self._kwargs = kwargs
        self.inputs = inputs
        self.has_embeds = kwargs.get("inputs_embeds") is not None
        self.device = model.device if inputs is None else inputs.device
        self.beams = self.value("num_beams") or 1
        self.returned = self.value("num_return_sequences") or 1
        self.copies = max(self.beams, self.returned)
        pad, end = self.value("pad_token_id"), self.value("eos_token_id")
        ends = set(end) if isinstance(end, list | tuple) else {end}
        self.ends = {token for token in ends if isinstance(token, int)}
        self._padding = pad if isinstance(pad, int) and pad not in ends else None
        self.filler = next((int(token) for token in (pad, *ends) if isinstance(token, int) and token >= 0), 0)
        if inputs is not None and (inputs.ndim != 2 or inputs.shape[0] == 0):
            raise ValueError(f"inputs must have the shape [rows, length]; got {list(inputs.shape)}")
        embeds = kwargs.get("inputs_embeds")
        self.input_length = inputs.shape[1] if inputs is not None and inputs.shape[1] else embeds.shape[1] if embeds is not None else 0
        self.rows = next((given.shape[0] for given in (inputs, embeds) if given is not None), 1)

    def value(self, name: str) -> Any:
        """A generation setting, by the library's order: argument, given configuration, the model's own."""
        for source in (self._kwargs.get(name), getattr(self._config, name, None), getattr(self._defaults, name, None)):
            if source is not None:
                return source
        return None

    def total_length(self, before: int) -> int:
        """Tokens of the longest sequence that this call can end with, after `before` earlier ones."""
        # Without any input the library begins with one token of its own.
        inputs = self.input_length or (0 if before else 1)
        if self.value("max_new_tokens") is not None:
            return before + inputs + int(self.value("max_new_tokens"))
        if self.value("max_length") is not None:
            return int(self.value("max_length"))
        return before + inputs + DEFAULT_NEW_TOKENS

    def whole_mask(self, session: InferenceSession, before: torch.Tensor) -> torch.Tensor:
        """The attention mask of earlier tokens and inputs, int64 [rows, all]."""
        rows, length = before.shape
        new = self.input_length
        given = self._kwargs.get("attention_mask")
        if given is not None and given.shape[1] == length + new:
            return given
        known = session.known_mask(length)
        earlier = torch.ones(rows, length, dtype=torch.int64) if known is None else known.to(torch.int64)
        if given is not None:
            if given.shape[1] != new:
                raise ValueError(f"attention_mask has {given.shape[1]} columns; {new} (the new tokens) or {length + new} (all) are needed")
            later = as_mask(given, rows).to(torch.int64)
        elif self.inputs is not None and self._padding is not None:
            later = self.inputs.ne(self._padding).to("cpu", torch.int64)  # as the library infers it
        else:
            later = torch.ones(rows, new, dtype=torch.int64)
        return torch.cat([earlier, later], dim=1).to(before.device)


class _TailStreamer:
    """Keeps from a streamer the tokens that an earlier call has given already."""

    def __init__(self, streamer: Any, known: int) -> None:
        self._streamer = streamer
        self._known = known

    def put(self, value: torch.Tensor) -> None:
        if self._known:
            value, self._known = value[..., self._known :], 0
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def _virtual_tokens(model: Any) -> int:
    """KV entries that prompts of PEFT take, which it puts before the tokens by a method of its own in the place of the model's."""
    owner = getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", None)
    return getattr(getattr(owner, "active_peft_config", None), "num_virtual_tokens", None) or 0


def _take_back(session: InferenceSession, copies: int, entries: int, before: torch.Tensor | None) -> None:
    """Of an answer that failed keep what leaves the rows that there were: all of it, or the inputs' entries where each row had copies."""
    if copies > 1:
        session.position = min(session.position, entries)
        if session.position:
            session.reorder(torch.arange(0, session.rows or copies, copies))
    known = session.known_tokens(0)
    if before is not None and (known is None or known.shape[1] < before.shape[1]):
        session.note_tokens(before, 0)  # the last of them is yet to be computed


def longest_of(config: Any) -> int | None:
    """The most tokens that a model was made for; None where it does not say."""
    return getattr(config, "max_position_embeddings", None)


def refuse_attentions(*askers: Any) -> None:
    """Attention weights stay on the servers. Raises ValueError where some were asked for."""
    if any(asker is True or getattr(asker, "output_attentions", None) for asker in askers):
        raise ValueError("output_attentions is not possible: attention is computed on the servers, which send only hidden states")
