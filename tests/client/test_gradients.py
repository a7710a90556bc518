"""Gradients through remote blocks, as torch's own: kept graphs, several uses, checkpoints, threads, cut batches, servers that go."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import trio
from torch.utils.checkpoint import checkpoint

from petalnet.blocks import passes as blocks_passes
from petalnet.client import autograd, micro_batches
from petalnet.client import passes as passes_module
from petalnet.client.inputs import Inputs
from petalnet.client.lora import Adapted, Pair, fold
from petalnet.p2p.fields import Message
from petalnet.p2p.pass_messages import Backward, DropGraphs, Forward, ForwardDone, PutLora
from petalnet.p2p.protocols import FORWARD
from petalnet.p2p.streams import Stream

SIZE = 32


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(seed))


def assert_close(answer: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert answer is not None and expected is not None and answer.dtype == expected.dtype
    assert expected.abs().max() > 0
    assert torch.allclose(answer, expected, atol=1e-3 * float(expected.abs().max()))


class Passes:
    """What the client's passes sent and received, in order."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.received: list[Message] = []

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Listens to the client's end of all passes."""
    heard = Passes()
    send, receive = Stream.send, Stream.receive

    async def listening_send(stream: Stream, message: Message) -> None:
        if not stream.served and stream.protocol is FORWARD:
            heard.sent.append(message)
        await send(stream, message)

    async def listening_receive(stream: Stream, **options: Any) -> Message | None:
        message = await receive(stream, **options)
        if message is not None and not stream.served and stream.protocol is FORWARD:
            heard.received.append(message)
        return message

    monkeypatch.setattr(Stream, "send", listening_send)
    monkeypatch.setattr(Stream, "receive", listening_receive)
    return heard


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more micro-batches than limits demand: these servers announce no rates, so they count as slow ones."""
    monkeypatch.setattr(micro_batches, "MOST_TRIED", 1)


def expected_gradient(pair: Any, inputs: torch.Tensor, weights: torch.Tensor, first: int = 0, end: int = 6) -> torch.Tensor:
    local = inputs.detach().clone().requires_grad_()
    (pair.local_blocks(local, first, end) * weights).sum().backward()
    assert local.grad is not None
    return local.grad


def test_kept_graphs_are_used_once(pair: Any, passes: Passes, uncut: None) -> None:
    inputs, weights = numbers(2, 5).requires_grad_(), numbers(2, 5, seed=1)
    loss = (pair.blocks(inputs) * weights).sum()
    assert all(message.kept for message in passes.received if isinstance(message, ForwardDone))
    loss.backward(retain_graph=True)
    expected = expected_gradient(pair, inputs, weights)
    assert_close(inputs.grad, expected)
    assert [message.hidden for message in passes.of(Backward)] == [None] * 3
    passes.sent.clear()
    inputs.grad = None
    loss.backward()
    assert_close(inputs.grad, expected)
    assert all(message.hidden is not None and not message.graph for message in passes.of(Backward))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_twice_in_one_graph(pair: Any) -> None:
    inputs, weights = numbers(1, 4).requires_grad_(), numbers(1, 4, seed=1)
    gradients = []
    for run in (lambda hidden: pair.blocks[1:4](hidden), lambda hidden: pair.local_blocks(hidden, 1, 4)):
        inputs.grad = None
        (run(run(inputs) * 0.5 + run(inputs * 2)) * weights).sum().backward()
        gradients.append(inputs.grad)
    assert_close(*gradients)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(pair: Any, use_reentrant: bool) -> None:
    inputs, weights = numbers(2, 5).requires_grad_(), numbers(2, 5, seed=1)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return pair.blocks[3:](torch.tanh(pair.blocks[:3](hidden)))

    gradients = []
    for output in (checkpoint(run, inputs, use_reentrant=use_reentrant), run(inputs)):
        inputs.grad = None
        (output * weights).sum().backward()
        gradients.append(inputs.grad)
    assert_close(*gradients)


def test_autocast_and_half_precision(pair: Any) -> None:
    weights = numbers(2, 5, seed=1)
    expected = expected_gradient(pair, numbers(2, 5), weights)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = numbers(2, 5).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = pair.blocks(inputs)
            assert output.dtype == dtype
            loss = (torch.nn.functional.linear(output, torch.eye(SIZE)).float() * weights).sum()
        loss.backward()
        assert inputs.grad is not None and inputs.grad.dtype == dtype
        assert torch.allclose(inputs.grad.float(), expected, atol=0.1 * float(expected.abs().max()))


def test_only_what_is_wanted_is_asked_for(pair: Any, passes: Passes, uncut: None) -> None:
    inputs, weights = numbers(2, 5), numbers(2, 5, seed=1)
    with torch.no_grad():
        assert not pair.blocks(inputs.clone().requires_grad_()).requires_grad
    assert [message.graph for message in passes.of(Forward)] == [0] * 3
    prompts = torch.zeros(6, 2, 3, SIZE, requires_grad=True)
    (pair.blocks(inputs, prompts) * weights).sum().backward()
    asked = sorted(passes.of(Backward), key=lambda message: message.first)
    assert [(message.input_gradient, message.prompt_gradient) for message in asked] == [(False, True), (True, True), (True, True)]
    assert prompts.grad is not None and prompts.grad.abs().max() > 0
    passes.sent.clear()
    both = inputs.clone().requires_grad_()
    (pair.blocks(both, prompts.detach()) * weights).sum().backward()
    assert not any(message.prompt_gradient for message in passes.of(Backward))
    assert_close(both.grad, expected_gradient(pair, inputs, weights))
    unused = pair.blocks(both)
    (both * 2 + unused.detach()).sum().backward()


def test_writing_into_what_was_sent_is_noticed(pair: Any) -> None:
    leaf = numbers(1, 4).requires_grad_()
    inputs = leaf * 1
    loss = pair.blocks(inputs).sum()
    with torch.no_grad():
        inputs.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_forgotten_graphs_are_given_up(pair: Any, passes: Passes) -> None:
    inputs = numbers(1, 4).requires_grad_()
    output = pair.blocks[0:2](inputs)
    (graph,) = [message.graph for message in passes.of(Forward)]
    del output
    gc.collect()
    pair.blocks[0:2](inputs).sum().backward()
    (told,) = [at for at, message in enumerate(passes.sent) if isinstance(message, DropGraphs) and graph in message.graphs]
    assert any(isinstance(message, Forward) for message in passes.sent[told:]), "told before the next request"


def test_what_backward_has_used_is_let_go_while_the_loss_lives(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    forward = passes_module.forward

    async def noting(*given: Any, **options: Any) -> Any:
        passed = await forward(*given, **options)
        made.append(weakref.ref(passed))
        return passed

    monkeypatch.setattr(passes_module, "forward", noting)
    loss = pair.blocks(numbers(1, 4).requires_grad_()).sum()
    loss.backward(retain_graph=True)
    gc.collect()
    assert made[0]() is not None
    loss.backward()
    gc.collect()
    assert made[0]() is None


def test_backward_in_several_threads(pair: Any) -> None:
    weights = numbers(1, 4, seed=1)
    answers: dict[int, torch.Tensor | None] = {}

    def train(number: int) -> None:
        inputs = numbers(1, 4, seed=number).requires_grad_()
        (pair.blocks(inputs) * weights).sum().backward()
        answers[number] = inputs.grad

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert_close(answers[number], expected_gradient(pair, numbers(1, 4, seed=number), weights))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_beyond_what_a_server_takes(pair: Any, passes: Passes, uncut: None, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    ids, mask = pair.padded(side)
    gradients = []
    monkeypatch.setattr(micro_batches, "MOST_TOKENS", 2 * ids.shape[1])
    for model in (pair.remote, pair.local):
        weight = model.get_input_embeddings().weight
        weight.requires_grad_(True)
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append(weight.grad.clone())
        weight.grad = None
        weight.requires_grad_(False)
    assert_close(*gradients)
    assert sorted(message.hidden.shape[0] for message in passes.of(Forward)) == [1, 1, 1, 2, 2, 2]
    assert {message.reach for message in passes.of(Forward)} == {ids.shape[1]}
    assert len(passes.of(Backward)) == 6


def test_prompts_of_cut_batches(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights = numbers(3, 5), numbers(3, 5, seed=1)
    prompts = (numbers(6, 3, 2, seed=2) * 0.3).requires_grad_()
    gradients = []
    for most in (5, 10**6):
        monkeypatch.setattr(micro_batches, "MOST_TOKENS", most)
        prompts.grad = None
        (pair.blocks(inputs, prompts) * weights).sum().backward()
        gradients.append(prompts.grad)
    assert_close(*gradients)
    with torch.no_grad():
        singly = pair.blocks.run(inputs, all_hidden=True)
        monkeypatch.setattr(micro_batches, "MOST_TOKENS", 5)
        cut = pair.blocks.run(inputs, all_hidden=True)
    assert len(cut) == 6 and all(torch.allclose(one, other, atol=1e-5) for one, other in zip(cut, singly, strict=True))


@pytest.fixture
def changing(pair: Any, serving: Any, connect: Any) -> Iterator[tuple[Any, Any]]:
    """A swarm of its own whose servers may be stopped, and the list of its blocks."""
    with serving(pair.path, [(0, 3), (3, 6), (0, 6)]) as servers:
        remote = connect(pair.path, servers.peers)
        yield servers, remote.base_model.h if pair.family == "bloom" else remote.base_model.layers
        remote.close()


def test_a_server_that_goes_between_forward_and_backward(pair: Any, changing: Any, passes: Passes) -> None:
    servers, blocks = changing
    inputs, weights = numbers(2, 5), numbers(2, 5, seed=1)
    prompts = (numbers(6, 2, 2, seed=2) * 0.3).requires_grad_()
    hidden = inputs.clone().requires_grad_()
    (pair.blocks(hidden, prompts) * weights).sum().backward()
    expected, prompts.grad, hidden.grad = (hidden.grad, prompts.grad), None, None
    loss = (blocks(hidden, prompts) * weights).sum()
    spans = [(message.first, message.end) for message in passes.of(Forward)][-2:]
    servers.stop(servers.servers[2] if (0, 6) in spans else servers.servers[1])
    passes.sent.clear()
    loss.backward()
    assert_close(hidden.grad, expected[0])
    assert_close(prompts.grad, expected[1])


def lora_of(
    pair: Any, path: str, sizes: tuple[int, int], dropout: float = 0.0
) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], Any, Any]:
    """Parameters for a module of every block but the third, the description of what is folded of them, and the flat tensor."""
    into, out = sizes
    draws = torch.Generator().manual_seed(7)
    pairs = {
        block: tuple((torch.randn(*shape, generator=draws) * 0.1).requires_grad_() for shape in ((2, into), (out, 2)))
        for block in range(6)
        if block != 2
    }
    adapted = [Adapted(block, path, (Pair(a, b, 1.5),)) for block, (a, b) in pairs.items()]
    return pairs, *fold(adapted, pair.blocks.target.model, 0, 6, dropout)


MODULES = {"bloom": ("self_attention.query_key_value", (32, 96)), "llama": ("mlp.down_proj", (80, 32))}


@pytest.mark.parametrize("most", [10**6, 5])
def test_gradients_of_lora(pair: Any, passes: Passes, uncut: None, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(micro_batches, "MOST_TOKENS", most)
    path, sizes = MODULES[pair.family]
    pairs, lora, flat = lora_of(pair, path, sizes)
    inputs, weights = numbers(2, 5), numbers(2, 5, seed=1)
    gradients = []
    layers = pair.local.base_model.h if pair.family == "bloom" else pair.local.base_model.layers
    for remote in (True, False):
        hooks = []
        if remote:
            output = autograd.apply(pair.blocks.target, inputs, None, Inputs(lora=lora), flat)
        else:
            for block, (a, b) in pairs.items():
                module = layers[block].get_submodule(path)
                hooks.append(module.register_forward_hook(lambda _, given, made, a=a, b=b: made + given[0] @ a.T @ b.T * 1.5))
            output = pair.local_blocks(inputs, 0, 6)
        (output * weights).sum().backward()
        gradients.append((output.detach(), [part.grad.clone() for ab in pairs.values() for part in ab]))
        for hook in hooks:
            hook.remove()
        for ab in pairs.values():
            for part in ab:
                part.grad = None
    assert torch.allclose(gradients[0][0], gradients[1][0], atol=1e-4)
    for answer, expected in zip(gradients[0][1], gradients[1][1], strict=True):
        assert_close(answer, expected)
    assert not passes.of(Backward)[-1].input_gradient, "nobody wants the gradient of what entered"
    assert len(passes.of(PutLora)) <= 3, "each server is given the parameters once"


def test_dropout_does_not_depend_on_how_rows_are_cut(pair: Any, uncut: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes = MODULES[pair.family]
    _, lora, flat = lora_of(pair, path, sizes, dropout=0.5)
    inputs = numbers(3, 5)
    outputs = []
    for most in (10**6, 5, 10):
        monkeypatch.setattr(micro_batches, "MOST_TOKENS", most)
        torch.manual_seed(3)
        outputs.append(autograd.apply(pair.blocks.target, inputs, None, Inputs(lora=lora), flat).detach())
    assert all(torch.allclose(output, outputs[0], atol=1e-4) for output in outputs)
    other = autograd.apply(pair.blocks.target, inputs, None, Inputs(lora=lora), flat).detach()
    assert not torch.allclose(other, outputs[0], atol=1e-2)


@pytest.mark.parametrize("kind", [Forward, Backward])
def test_an_interrupt_ends_a_pass_at_once(pair: Any, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    ask, pressed = passes_module.ask_server, []

    async def never(target: Any, hop: Any, request: Message, *given: Any) -> Any:
        if not isinstance(request, kind):
            return await ask(target, hop, request, *given)
        pressed.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return await trio.sleep_forever()

    inputs = numbers(1, 4).requires_grad_()
    with monkeypatch.context() as patched:
        patched.setattr(passes_module, "ask_server", never)
        with pytest.raises(KeyboardInterrupt):
            pair.blocks(inputs).sum().backward()
    assert time.monotonic() - pressed[0] < 0.2
    (pair.blocks(inputs) * numbers(1, 4, seed=1)).sum().backward()
    assert_close(inputs.grad, expected_gradient(pair, inputs, numbers(1, 4, seed=1)))
    assert not pair.blocks.target.swarm.membership.under_way.work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_that_rows_share_travel_once(pair: Any, passes: Passes, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    inputs, weights = numbers(4, 5).to(dtype), numbers(4, 5, seed=1)
    prompts = (numbers(6, 1, 2, seed=2) * 0.3).requires_grad_()
    gradients = []
    for most, at_once, rows in ((10**6, 512, None), (10**6, 512, 1), (10, 5, 1)):
        monkeypatch.setattr(micro_batches, "MOST_TOKENS", most)
        monkeypatch.setattr(blocks_passes, "CHUNK_TOKENS", at_once)
        prompts.grad = None
        passes.sent.clear()
        given = prompts.expand(-1, 4, -1, -1) if rows else prompts.repeat(1, 4, 1, 1)
        (pair.blocks(inputs, given) * weights).sum().backward()
        gradients.append(prompts.grad)
        assert not rows or {message.prompts.shape[1] for message in passes.of(Forward)} == {rows}
    for answer in gradients[1:]:
        assert torch.allclose(answer, gradients[0], atol=(1e-3 if dtype == torch.float32 else 3e-2) * float(gradients[0].abs().max()))
