"""What each `wire_precision` does to a chain of three real server processes: bytes, and how far the answers are from the exact ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from petalnet.client import precision
from petalnet.p2p.host import Host

from .conftest import NodeProcess, Nodes
from .models import connected, load_local
from .test_chains import Counted, Links

HIDDEN, LAYERS, VOCABULARY = 320, 3, 256
ROWS, PROMPT = 8, 8
"""Few enough columns for servers to compute them in one go, so that answers can be compared to the bit; in all, outputs are not small."""
EXACT_BYTES = ROWS * PROMPT * HIDDEN * 4
SPANS = [(0, 1), (1, 2), (2, 3)]
SHARES = {"exact": 1.0, "auto": 1.0, "bfloat16": 0.5, "float16": 0.5, "int8": 0.2656}
"""Of the exact bytes."""
ERRORS = {"bfloat16": 1e-2, "float16": 1e-3, "int8": 3e-2}
"""Of the logits (rms), over their spread: what docs/wire-precision.md says, with room for another model."""


@dataclass
class Swarm:
    """Three servers of a model, and the same model on this machine."""

    path: Path
    local: Any
    links: Links

    @property
    def peers(self) -> list[str]:
        return self.links.servers[0].addrs


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bloom")
    torch.manual_seed(4)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_head=5, n_layer=LAYERS, initializer_range=0.08, pad_token_id=3)
    model = BloomForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swarm(module_nodes: Nodes, path: Path) -> Swarm:
    return Swarm(path, load_local(path), Links(module_nodes, module_nodes.serve(path, SPANS)))


@pytest.fixture(scope="module")
def mixed(module_nodes: Nodes, path: Path) -> Swarm:
    """The first server in bfloat16, the others in float32."""
    first = module_nodes.serve(path, SPANS[:1], dtype="bfloat16")
    others: list[NodeProcess] = module_nodes.serve(path, SPANS[1:], peers=first[0].addrs)
    return Swarm(path, None, Links(module_nodes, [*first, *others]))


def prompt(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))


class Sent:
    """Bytes that this process has sent to servers, all connections together, while in its `with`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.bytes = 0

    async def _count(self) -> int:
        membership = self._model.base_model.h.target.swarm.membership
        await membership.joined()
        return sum(peer.bytes_out for peer in membership.host.peers())

    def _now(self) -> int:
        count: int = self._model.base_model.h.target.swarm.portal.run(self._count)
        return count

    def __enter__(self) -> Sent:
        self._before = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bytes = self._now() - self._before


def logits_in_session(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), model.inference_session(max_length=PROMPT + 8):
        return model(ids, logits_to_keep=1).logits  # type: ignore[no-any-return]


def check_error(wire_precision: str, answer: torch.Tensor, exact: torch.Tensor) -> None:
    """Whether logits are as far from the exact ones as their precision says."""
    error = float((answer - exact).square().mean().sqrt() / exact.std())
    if wire_precision in ERRORS:
        assert 0 < error < ERRORS[wire_precision]
    else:
        assert error < 1e-4


@dataclass
class Rounding:
    """The model over the swarm with some `wire_precision`."""

    wire_precision: str
    model: Any

    @property
    def share(self) -> float:
        """Of the exact bytes."""
        return SHARES[self.wire_precision]


@pytest.fixture(scope="module", params=SHARES)
def rounding(request: pytest.FixtureRequest, swarm: Swarm) -> Iterator[Rounding]:
    with connected(swarm.path, swarm.peers, wire_precision=request.param, direct_chains=True) as model:
        logits_in_session(model, prompt(rows=1))  # connections and routes are there from here on
        yield Rounding(request.param, model)


def test_a_prompt_takes_fewer_bytes_on_every_link(swarm: Swarm, rounding: Rounding) -> None:
    with Counted(swarm.links) as counted, Sent(rounding.model) as sent:
        answer = logits_in_session(rounding.model, prompt())
    with torch.inference_mode():
        check_error(rounding.wire_precision, answer, swarm.local(prompt(), logits_to_keep=1).logits)
    share = rounding.share
    assert [count / EXACT_BYTES for count in counted("pushed_bytes")] == pytest.approx([share, share, 0], rel=0.02)
    assert share * EXACT_BYTES <= sent.bytes < share * EXACT_BYTES + 30_000  # messages, gossip and pings have their bytes, too


def test_through_the_client_it_is_the_same(swarm: Swarm, rounding: Rounding) -> None:
    directly = logits_in_session(rounding.model, prompt())
    with connected(swarm.path, swarm.peers, wire_precision=rounding.wire_precision, direct_chains=False) as model, Sent(model) as sent:
        assert torch.equal(logits_in_session(model, prompt()), directly)
    share = 3 * rounding.share
    assert share * EXACT_BYTES <= sent.bytes < share * EXACT_BYTES + 50_000


def test_tokens_that_are_written_one_by_one_are_exact(swarm: Swarm) -> None:
    """Rounding is for prompts: what comes after a prompt that was not rounded is what the exact answer is, to the bit."""
    ids, options = prompt(rows=1), {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answers = []
    for wire_precision in ("exact", "int8"):
        with connected(swarm.path, swarm.peers, wire_precision=wire_precision, speculation=False) as model:
            answers.append(torch.cat(model.generate(ids, **options).logits))
    assert torch.equal(*answers)


def test_a_pass_without_a_session_is_rounded_as_well(swarm: Swarm, rounding: Rounding) -> None:
    with torch.inference_mode(), Sent(rounding.model) as sent:
        answer = rounding.model(prompt(), use_cache=False).logits
        check_error(rounding.wire_precision, answer, swarm.local(prompt(), use_cache=False).logits)
    share = 3 * rounding.share
    assert share * EXACT_BYTES <= sent.bytes < share * EXACT_BYTES + 50_000


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the links of this process carry: they are taken to be as slow as can be."""
    monkeypatch.setattr(Host, "bytes_s", lambda self, peer_id: 1000.0)
    yield


@pytest.mark.usefixtures("slow")
def test_auto_rounds_on_a_slow_link_what_this_machine_sends(swarm: Swarm) -> None:
    with connected(swarm.path, swarm.peers, wire_precision="auto", direct_chains=True) as model:
        logits_in_session(model, prompt(rows=1))
        with Counted(swarm.links) as counted, Sent(model) as sent:
            answer = logits_in_session(model, prompt())
    with torch.inference_mode():
        check_error("int8", answer, swarm.local(prompt(), logits_to_keep=1).logits)
    assert [count / EXACT_BYTES for count in counted("pushed_bytes")] == [1, 1, 0]
    assert SHARES["int8"] * EXACT_BYTES <= sent.bytes < SHARES["int8"] * EXACT_BYTES + 30_000


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("wire_precision", ["auto", "int8"])
def test_training_is_exact_unless_rounding_was_asked_for(swarm: Swarm, wire_precision: str) -> None:
    embedded = swarm.local.get_input_embeddings()(prompt()).detach()

    def gradient_of(model: Any) -> torch.Tensor:
        inputs = embedded.clone().requires_grad_()
        model(inputs_embeds=inputs, use_cache=False).logits.float().square().mean().backward()
        assert inputs.grad is not None
        return inputs.grad

    wanted = gradient_of(swarm.local)
    with connected(swarm.path, swarm.peers, wire_precision=wire_precision) as model, Sent(model) as sent:
        gradient = gradient_of(model)
    error = float((gradient - wanted).abs().max() / wanted.std())
    if wire_precision == "auto":
        assert error < 1e-3
        assert 6 * EXACT_BYTES <= sent.bytes < 6.5 * EXACT_BYTES  # each server: inputs, then a gradient of what its graph is kept of
    else:
        assert 1e-3 < error < 1
        assert 3.5 * EXACT_BYTES < sent.bytes < 5 * EXACT_BYTES  # inputs rounded, and exact gradients


def test_exact_sends_to_a_server_what_it_computes_in(mixed: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first server computes in bfloat16: both what it gets and what it gives takes half of the bytes, and nothing is lost by that.

    The second computes in float32, though its inputs came in bfloat16: its outputs are whole."""
    answers = []
    for raw in (False, True):
        if raw:
            monkeypatch.setattr(precision, "lossless_codec", lambda dtype, computed: "raw")
        for direct in (True, False):
            with connected(mixed.path, mixed.peers, direct_chains=direct) as model:
                logits_in_session(model, prompt(rows=1))
                with Counted(mixed.links) as counted, Sent(model) as sent:
                    answers.append(logits_in_session(model, prompt()))
            first, second = (1 if raw else 0.5), 0.5
            if direct:
                assert [count / EXACT_BYTES for count in counted("pushed_bytes")] == [second, 1, 0]
            share = first if direct else first + second + 1
            assert share * EXACT_BYTES <= sent.bytes < share * EXACT_BYTES + 50_000
    assert all(torch.equal(answer, answers[0]) for answer in answers)
