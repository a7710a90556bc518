"""Trainable prompts: a model that has them gives what the local model gives with the same vectors before its tokens and in its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from petalnet import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petalnet.client.speculation import DraftPolicy, Lookup
from petalnet.errors import UsageError

LENGTH = 3
GREEDY = {"do_sample": False}


class Tuned:
    """A distributed model with random prompts beside the local one with the same: embeddings before the tokens, hooks in the layers.

    Attributes:
        shallow, deep: copies of the prompts, for the local side; `deep` None where there are none.
    """

    def __init__(self, pair: Any, remote: Any, local: Any) -> None:
        self.pair, self.remote, self.local = pair, remote, local
        generator = torch.Generator().manual_seed(11)
        self.parameters = [parameter for name, parameter in remote.named_parameters() if "prompt_embeddings" in name]
        for parameter in self.parameters:
            parameter.data.normal_(0, 0.3, generator=generator)
        self.shallow, self.deep = [*(parameter.detach().clone().requires_grad_() for parameter in self.parameters), None][:2]

    @property
    def layers(self) -> Any:
        return self.local.base_model.h if self.pair.family == "bloom" else self.local.base_model.layers

    def locally(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
        """The local model's `forward`."""
        mask = torch.ones_like(ids) if mask is None else mask
        with self.hooks():
            return self.local(inputs_embeds=self.embeds(ids), attention_mask=self.with_ones(mask), **options)

    def embeds(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.shallow.expand(len(ids), -1, -1), self.local.get_input_embeddings()(ids)], dim=1)

    @staticmethod
    def with_ones(mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([mask.new_ones(len(mask), LENGTH), mask], dim=1)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Inside, the local model's layers add the deep prompts to what they get at the first positions."""
        handles = []
        for index, layer in enumerate(self.layers if self.deep is not None else []):
            size = self.deep.shape[1] // len(self.layers)
            added = self.deep[:, index * size : (index + 1) * size]

            def add(_: Any, args: Any, kwargs: Any, added: torch.Tensor = added) -> Any:
                if args[0].shape[1] == 1:
                    return None  # a later step
                return (args[0] + torch.nn.functional.pad(added, (0, 0, 0, args[0].shape[1] - LENGTH)), *args[1:]), kwargs

            handles.append(layer.register_forward_pre_hook(add, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def generate(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """The local model's answer, as the distributed one gives it."""
        mask = torch.ones_like(ids) if mask is None else mask
        torch.manual_seed(7)
        with self.hooks():
            new = self.local.generate(inputs_embeds=self.embeds(ids), attention_mask=self.with_ones(mask), **options)
        return torch.cat([ids.repeat_interleave(len(new) // len(ids), dim=0), new], dim=1)

    def same(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Generate on both sides from the same seed, and compare."""
        expected = self.generate(ids, mask, **options)
        torch.manual_seed(7)
        answer = self.remote.generate(ids, **({} if mask is None else {"attention_mask": mask}), **options)
        assert torch.equal(answer, expected)
        return answer


@pytest.fixture(scope="module", params=["deep_ptune", pytest.param("ptune", marks=pytest.mark.long)])
def tuned(pair: Any, request: pytest.FixtureRequest, connect: Any) -> Iterator[Tuned]:
    with connect(pair.path, pair.servers.peers, tuning_mode=request.param, pre_seq_len=LENGTH) as remote:
        yield Tuned(pair, remote, pair.local)


def test_generate(tuned: Tuned) -> None:
    ids, mask = tuned.pair.padded("left")
    tuned.same(tuned.pair.ids(1, 5), max_new_tokens=12, **GREEDY)
    tuned.same(ids, mask, max_new_tokens=8, **GREEDY)
    tuned.same(ids, mask, max_new_tokens=6, num_beams=3, num_return_sequences=2, **GREEDY)
    tuned.same(ids, mask, max_new_tokens=8, do_sample=True, temperature=0.8, top_k=40, num_return_sequences=2)
    embeds = tuned.local.get_input_embeddings()(ids[:1]).detach()
    answer = tuned.remote.generate(inputs_embeds=embeds, max_new_tokens=4, **GREEDY)
    assert torch.equal(answer, tuned.generate(ids[:1], max_new_tokens=4, **GREEDY)[:, ids.shape[1] :])


def test_guesses_change_nothing(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tuned.pair.ids(1, 6).repeat(1, 2)
    expected = tuned.generate(ids, max_new_tokens=24, **GREEDY)
    text = [token ^ (place % 7 == 0) for place, token in enumerate(expected[0].tolist())]  # some of it is wrong
    monkeypatch.setattr(DraftPolicy, "choose", lambda _, length, most, draft_s=0.0: min(most, 4))
    monkeypatch.setattr(Lookup, "draft", lambda lookup, count: text[len(lookup) : len(lookup) + count])
    with tuned.remote.inference_session(max_length=LENGTH + 12 + 23) as session:  # with not one entry too many
        assert torch.equal(tuned.remote.generate(ids, max_new_tokens=24, **GREEDY), expected)
        assert session.drafted > session.accepted > 10 and session.position == session.max_length
    expected = expected[:, : 12 + 8]
    assert torch.equal(tuned.remote.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=3, **GREEDY), expected)
    assistant = AutoModelForCausalLM.from_pretrained(tuned.pair.path, dtype=torch.float32).eval()
    assert torch.equal(tuned.remote.generate(ids, max_new_tokens=8, assistant_model=assistant, **GREEDY), expected)


class Recorder:
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        return


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_session_over_several_calls(tuned: Tuned, side: str) -> None:
    remote = tuned.remote
    ids, mask = (tuned.pair.ids(1, 6), None) if side == "none" else tuned.pair.padded("left")
    length, more = ids.shape[1], tuned.pair.ids(len(ids), 3, seed=8)
    given = {} if mask is None else {"attention_mask": mask}
    whole = tuned.generate(ids, mask, max_new_tokens=9, **GREEDY)
    with remote.inference_session(max_length=LENGTH + 40) as session:
        recorder = Recorder() if side == "none" else None
        pieces = [remote.generate(ids, max_new_tokens=1, streamer=recorder, **given, **GREEDY)]
        assert (session.position, session.tokens) == (LENGTH + length, length)
        pieces.append(remote.generate(None, max_new_tokens=8, session=session, streamer=recorder, **GREEDY))
        assert torch.equal(torch.cat(pieces, dim=1), whole)
        assert recorder is None or torch.equal(torch.cat(recorder.pieces), whole[0])
        assert session.position == LENGTH + length + 8
        answer = remote.generate(more, max_new_tokens=4, num_beams=2, **GREEDY)
        both = torch.cat([whole, more], dim=1)
        both_mask = None if mask is None else torch.nn.functional.pad(mask, (0, both.shape[1] - length), value=1)
        assert torch.equal(answer, tuned.generate(both, both_mask, max_new_tokens=4, num_beams=2, **GREEDY)[:, whole.shape[1] :])

        session.position = LENGTH + length
        assert torch.equal(remote.generate(None, max_new_tokens=9, **GREEDY), whole[:, length:])
        for inside in range(1, LENGTH):
            with pytest.raises(ValueError, match="trained prompts"):
                session.position = inside
        session.position = LENGTH  # the prompts alone
        assert session.tokens == 0
        assert torch.equal(remote.generate(ids, max_new_tokens=9, **given, **GREEDY), whole)
        session.position = 0
        assert torch.equal(remote.generate(ids, max_new_tokens=9, **given, **GREEDY), whole)


def test_no_room_for_prompts(tuned: Tuned) -> None:
    remote, ids = tuned.remote, tuned.pair.ids(1, 4)
    for length in (1, LENGTH):
        with pytest.raises(ValueError, match=rf"{length} KV entries .* {LENGTH} trained prompts"):
            remote.inference_session(max_length=length)
    with remote.inference_session(max_length=LENGTH + 5) as session:
        with pytest.raises(ValueError, match=rf"{LENGTH} trained prompts takes {LENGTH + 6} KV entries, .* max_length of {LENGTH + 5}"):
            remote.generate(ids, max_new_tokens=3)
        assert session.position == 0
        tuned.same(ids, max_new_tokens=2, **GREEDY)
        assert session.position == session.max_length
    with remote.remote_blocks.inference_session(max_length=4) as session, torch.no_grad():
        with pytest.raises(ValueError, match=rf"{LENGTH} of them trained prompts\) exceed .* 4"):
            remote(ids)
        assert session.position == 0


def test_beams_send_equal_rows_once(tuned: Tuned, wire: Any) -> None:
    tuned.remote.generate(tuned.pair.ids(2, 5), max_new_tokens=3, num_beams=4, **GREEDY)
    first = wire.steps[0]
    assert first.hidden.shape[:2] == (2, LENGTH + 5)
    assert (first.prompts is not None) == (tuned.deep is not None)
    assert first.prompts is None or first.prompts.shape[1:3] == (2, LENGTH)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_hidden_states_are_of_the_tokens(tuned: Tuned, side: str) -> None:
    ids, mask = tuned.pair.padded(side)
    following, later = tuned.pair.ids(3, 2, seed=4), torch.nn.functional.pad(mask, (0, 2), value=1)
    with torch.no_grad():
        theirs = tuned.locally(ids, mask, output_hidden_states=True)
        check_outputs(tuned.remote(ids, attention_mask=mask, output_hidden_states=True), theirs, mask)
        with tuned.remote.inference_session(max_length=20) as session:
            ours = tuned.remote(ids, attention_mask=mask, output_hidden_states=True, use_cache=True)
            check_outputs(ours, theirs, mask)
            cache = ours.past_key_values
            assert cache.session is session and cache.get_seq_length() == ids.shape[1] and session.position == LENGTH + ids.shape[1]
            theirs = tuned.locally(torch.cat([ids, following], dim=1), later)
            for given in (later, later[:, -2:]):
                ours = tuned.remote(following, attention_mask=given, past_key_values=cache)
                assert torch.allclose(ours.logits, theirs.logits[:, -2:], atol=1e-4)
                cache.crop(-2)


def check_outputs(ours: Any, theirs: Any, mask: torch.Tensor) -> None:
    """Outputs of tokens, and those of the local model, whose first ones are of prompts."""
    assert ours.logits.shape[:2] == mask.shape
    assert torch.allclose(ours.logits[mask > 0], theirs.logits[:, LENGTH:][mask > 0], atol=1e-4)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for boundary, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.allclose(boundary[mask > 0], expected[:, LENGTH:][mask > 0], atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients(tuned: Tuned, side: str) -> None:
    check_gradients(tuned, side)


def test_prompts_before_the_tokens_alone(pair: Any, connect: Any) -> None:
    with connect(pair.path, pair.servers.peers, tuning_mode="ptune", pre_seq_len=LENGTH) as remote:
        tuned = Tuned(pair, remote, pair.local)
        assert tuned.deep is None
        tuned.same(*pair.padded("left"), max_new_tokens=4, **GREEDY)
        check_gradients(tuned, "right")


def check_gradients(tuned: Tuned, side: str) -> None:
    """Of prompts, embeddings and head, in training, whatever the call says of a cache."""
    ids, mask = tuned.pair.padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    remote, head = tuned.remote, tuned.remote.get_output_embeddings().weight
    words = remote.get_input_embeddings().weight
    try:
        remote.train()
        remote.gradient_checkpointing_enable()
        for parameter in (words, head):
            parameter.requires_grad = True
        out = remote(ids, attention_mask=mask, labels=labels, use_cache=True)
        assert out.past_key_values is None and tuned.pair.servers.open_sessions() == 0
        out.loss.backward()
        local_words, local_head = tuned.local.get_input_embeddings().weight, tuned.local.get_output_embeddings().weight
        for parameter in (local_words, local_head):
            parameter.requires_grad, parameter.grad = True, None  # others use this model as well, and may have frozen it
        # What comes of the prompts is no logit, so the first token is predicted by nothing.
        theirs = torch.nn.functional.pad(labels[:, 1:], (LENGTH + 1, 0), value=-100)
        tuned.locally(ids, mask, labels=theirs).loss.backward()
        leaves = [tuned.shallow, *([] if tuned.deep is None else [tuned.deep]), local_words, local_head]
        for ours, theirs in zip([*tuned.parameters, words, head], leaves, strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5 * float(theirs.grad.abs().max()))
            assert float(theirs.grad.abs().max()) > 0
    finally:
        remote.eval()
        remote.gradient_checkpointing_disable()
        remote.zero_grad()
        tuned.local.zero_grad()
        tuned.shallow.grad = None
        if tuned.deep is not None:
            tuned.deep.grad = None
        for parameter in (words, head):
            parameter.requires_grad = False


def test_classification_pools_the_last_token(tuned: Tuned) -> None:
    pair, mode = tuned.pair, tuned.remote.config.tuning_mode
    local = AutoModelForSequenceClassification.from_pretrained(pair.path, dtype=torch.float32, num_labels=3).eval()
    with AutoDistributedModelForSequenceClassification.from_pretrained(
        pair.path, initial_peers=pair.servers.peers, dtype=torch.float32, num_labels=3, tuning_mode=mode, pre_seq_len=LENGTH
    ) as remote:
        prompts = {name for name, _ in remote.named_parameters() if "prompt_embeddings" in name}
        assert {name for name, parameter in remote.named_parameters() if parameter.requires_grad} == {*prompts, "score.weight"}
        both = Tuned(pair, remote, local)
        local.score.load_state_dict(remote.score.state_dict())
        labels = torch.tensor([0, 2, 1])
        for side in ("left", "right"):
            ids, mask = pair.padded(side)
            last = LENGTH + (torch.arange(ids.shape[1]) * mask).argmax(-1)
            with both.hooks():
                hidden = local.base_model(inputs_embeds=both.embeds(ids), attention_mask=both.with_ones(mask)).last_hidden_state
            expected = local.score(hidden[torch.arange(3), last])
            out = remote(ids, attention_mask=mask, labels=labels)
            assert torch.allclose(out.logits, expected, atol=1e-4)
            gradients = torch.autograd.grad(out.loss, [*both.parameters, remote.score.weight])
            leaves = [both.shallow, *([] if both.deep is None else [both.deep]), local.score.weight]
            for ours, theirs in zip(
                gradients, torch.autograd.grad(torch.nn.functional.cross_entropy(expected, labels), leaves), strict=True
            ):
                assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_a_layer_of_one_s_own_between_remote_blocks(pair: Any) -> None:
    torch.manual_seed(2)
    layer = torch.nn.Linear(32, 32)
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    ours = pair.blocks[3:](layer(pair.blocks[:3](hidden))).square().mean()
    theirs = pair.local_blocks(layer(pair.local_blocks(hidden, 0, 3)), 3, 6).square().mean()
    leaves = [hidden, layer.weight, layer.bias]
    for mine, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-3, atol=1e-6)


def test_what_is_trainable_and_of_which_dtype(pair: Any) -> None:
    options = {"initial_peers": pair.servers.peers, "dtype": torch.bfloat16}
    torch.manual_seed(1)
    with AutoDistributedModelForCausalLM.from_pretrained(pair.path, tuning_mode="deep_ptune", pre_seq_len=5, **options) as model:
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        prefix = model.base_model_prefix
        shapes = {name: tuple(parameter.shape) for name, parameter in trainable.items()}
        assert shapes == {f"{prefix}.prompt_embeddings.weight": (5, 32), f"{prefix}.intermediate_prompt_embeddings.weight": (5, 6 * 32)}
        assert {parameter.dtype for parameter in trainable.values()} == {torch.float32} and model.dtype == torch.bfloat16
        model.train()
        model(pair.ids(1, 3), labels=pair.ids(1, 3)).loss.backward()
        assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in trainable.values())
        model.eval()
        answer = model.generate(pair.ids(1, 3), max_new_tokens=3, **GREEDY)
        assert torch.equal(copy.deepcopy(model).generate(pair.ids(1, 3), max_new_tokens=3, **GREEDY), answer)
        kinds = torch.zeros(1, 3, dtype=torch.int64)  # as many tokenizers give them: neither family looks at them
        assert model(pair.ids(1, 3), token_type_ids=kinds).logits.shape == (1, 3, 256)
    with AutoDistributedModelForCausalLM.from_pretrained(pair.path, pre_seq_len=5, **options) as model:
        assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.manual_seed(1)
    with AutoDistributedModelForCausalLM.from_pretrained(pair.path, tuning_mode="ptune", pre_seq_len=5, **options) as model:
        prompts = model.base_model.prompt_embeddings.weight  # of random tokens
        words = model.get_input_embeddings().weight.float()
        assert all((words == prompt).all(-1).any() for prompt in prompts)


def test_a_head_that_the_checkpoint_has_is_trainable(pair: Any, tmp_path: Path) -> None:
    local = AutoModelForSequenceClassification.from_pretrained(pair.path, dtype=torch.float32, num_labels=3)
    local.save_pretrained(tmp_path)
    with AutoDistributedModelForSequenceClassification.from_pretrained(tmp_path, initial_peers=pair.servers.peers) as model:
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["score.weight"]
        assert torch.equal(model.score.weight, local.score.weight)


def test_inputs_that_need_gradients_run_without_a_session(tuned: Tuned) -> None:
    embeds = tuned.local.get_input_embeddings()(tuned.pair.ids(1, 4)).detach().requires_grad_()
    with tuned.remote.inference_session(max_length=32) as session:
        for parameter in tuned.parameters:
            parameter.requires_grad = False
        try:
            tuned.remote(inputs_embeds=embeds, use_cache=True).logits.sum().backward()
        finally:
            for parameter in tuned.parameters:
                parameter.requires_grad = True
        assert embeds.grad is not None and session.position == 0


def test_masks_are_of_the_tokens(tuned: Tuned) -> None:
    ids = tuned.pair.ids(2, 4)
    with pytest.raises(ValueError, match="7 columns for 4 tokens"):
        tuned.remote(ids, attention_mask=torch.ones(2, 4 + LENGTH))
    with torch.no_grad(), tuned.remote.inference_session(max_length=32), pytest.raises(ValueError, match="3 columns for 4 tokens"):
        tuned.remote(ids, attention_mask=torch.ones(2, 3))


def test_prompts_longer_than_the_model(pair: Any) -> None:
    if pair.family != "llama":
        pytest.skip("BLOOM has no longest length")
    with pytest.raises(UsageError, match="pre_seq_len=256 .* 256"):
        AutoDistributedModelForCausalLM.from_pretrained(pair.path, initial_peers=pair.servers.peers, tuning_mode="ptune", pre_seq_len=256)


def test_prompts_of_peft(pair: Any) -> None:
    """PEFT puts them before the tokens in the midst of `generate`, which is not told how many they are."""
    peft = pytest.importorskip("peft")
    configuration = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    local, remote = (peft.get_peft_model(copy.deepcopy(model), configuration) for model in (pair.local, pair.remote))
    remote.prompt_encoder.load_state_dict(local.prompt_encoder.state_dict())
    ids, mask = pair.padded("left")
    for options in ({}, {"num_beams": 2}):
        expected = local.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, **GREEDY, **options)
        assert torch.equal(remote.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, **GREEDY, **options), expected)
    weights = []
    for model in (local, remote):
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        weights.append(model.prompt_encoder["default"].embedding.weight)
    assert torch.allclose(weights[1].grad, weights[0].grad, rtol=1e-3, atol=1e-6)


def test_servers_lost_in_mid_answer(bloom_path: Path, serving: Any, connect: Any) -> None:
    """What takes their place computes the prompts anew, for rows that beams have mixed as well."""
    ids = torch.randint(4, 256, (2, 5), generator=torch.Generator().manual_seed(1))
    with (
        serving(bloom_path, [(0, 3), (3, 6), (0, 6)]) as servers,
        connect(bloom_path, servers.peers, tuning_mode="deep_ptune", pre_seq_len=70) as remote,
    ):
        for name, parameter in remote.named_parameters():
            if "prompt_embeddings" in name:
                parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        answers = []
        for lost in (False, True):
            with remote.inference_session(max_length=100) as session:
                pieces = [remote.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY)]
                if lost:
                    used = {hop.peer_id for hop in session.hops}
                    for server in servers.servers:
                        if server.peer_id in used:
                            servers.stop(server)
                pieces.append(remote.generate(ids[:, :2], max_new_tokens=6, num_beams=2, **GREEDY))
                assert bool(session.recoveries) == lost and session.position == 70 + 5 + 6 + 2
                answers.append(torch.cat(pieces, dim=1))
        assert torch.equal(*answers)
