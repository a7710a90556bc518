"""Models whose rotary frequencies depend on how long the sequence is: neither chunks of a prompt nor guesses give a token other ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import petalnet.client.chain
from petalnet.client.session import InferenceSession
from petalnet.client.speculation import DraftPolicy, Lookup

BORDER = 96
SCALINGS = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        "original_max_position_embeddings": BORDER,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}  # fmt: skip


class Eager(DraftPolicy):
    """Drafts as many as there is room for, up to six."""

    def for_answer(self) -> Eager:
        return self

    def choose(self, length: int, most: int, draft_s: float = 0.0) -> int:
        return min(6, most)


class Knowing(Lookup):
    """Knows the text that is to come."""

    def __init__(self, text: list[int]) -> None:
        super().__init__()
        self._text = text

    def draft(self, count: int) -> list[int]:
        return self._text[len(self) : len(self) + count]


@pytest.fixture(params=SCALINGS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=6,
        initializer_range=0.2, max_position_embeddings=BORDER if request.param == "dynamic" else 256,
        rope_parameters=SCALINGS[request.param], tie_word_embeddings=False, pad_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    return tmp_path


def test_chunks_and_guesses_across_the_border(path: Path, serving: Any, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    run = InferenceSession.run

    def spy(session: InferenceSession, hidden: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        steps.append((session.position, hidden.shape[1]))
        return run(session, hidden, **options)

    monkeypatch.setattr(InferenceSession, "run", spy)
    monkeypatch.setattr(petalnet.client.chain, "chunk_ends", lambda new, *_, **__: [*range(64, new, 64), new])
    local = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(4, 256, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with serving(path, [(0, 3), (3, 6)]) as servers, connect(path, servers.peers) as model:
        for length in (150, 90):
            expected = local(ids[:1, :length]).logits
            with torch.inference_mode(), model.inference_session(max_length=200):
                assert torch.allclose(model(ids[:1, :length]).logits, expected, atol=1e-4)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        expected = local(**inputs).logits
        with torch.inference_mode(), model.inference_session(max_length=200):
            assert torch.allclose(model(**inputs).logits[mask.bool()], expected[mask.bool()], atol=1e-4)
        options = {"max_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
        answer = local.generate(ids[:1, :80], **options)
        model.remote_blocks.draft_policy = Eager()
        with model.inference_session(max_length=200) as session:
            session.lookup = Knowing(answer.sequences[0].tolist())
            steps.clear()
            drafted = model.generate(ids[:1, :80], **options)
        assert torch.equal(drafted.sequences, answer.sequences) and session.accepted > 6
        assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(drafted.logits, answer.logits, strict=True))
        assert not any(position < BORDER < position + count for position, count in steps if position)
