"""The list of blocks that are elsewhere.

To a user a `RemoteSequential` is a list of n blocks: sliced, iterated, called, given sessions. To the library's own `forward`, which runs
`for layer in self.layers`, it must look like a list of **one** layer, or there would be n round trips. So the distributed backbone's
`forward` opens a `Pass` for its list (a context variable, so that threads do not meet), and while that is open the list presents itself
as one layer that runs all blocks and leaves in the pass what a layer has no way to return.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from petalnet.client import autograd
from petalnet.client.inputs import Inputs
from petalnet.client.lora import Lora, fold
from petalnet.client.placeholders import Injected, collect, fingerprint, injected, notice_of
from petalnet.client.requests import Target, find_hops
from petalnet.client.session import InferenceSession, as_mask, unusual_positions
from petalnet.client.settings import ClientSettings, take_settings
from petalnet.client.speculation import DraftPolicy
from petalnet.client.swarm import Swarm
from petalnet.errors import MissingBlocksError
from petalnet.models.frequencies import Frequencies
from petalnet.p2p.tensors import encode_tensor
from petalnet.routing.routes import Hop


@dataclass
class Pass:
    """One run of a backbone's `forward`: what its layers are not told, and what they cannot return.

    Attributes:
        blocks: the list that presents itself as one layer.
        run: what that layer does with its hidden states.
        outputs: filled by the layer: the input of the first block, then the outputs of the blocks (all, or only the last one's).
    """

    blocks: RemoteSequential
    run: Callable[[torch.Tensor], list[torch.Tensor]]
    outputs: list[torch.Tensor] = field(default_factory=list)


_pass: ContextVar[Pass | None] = ContextVar("petalnet_pass", default=None)
_sessions: ContextVar[tuple[tuple[object, InferenceSession], ...]] = ContextVar("petalnet_sessions", default=())


class RemoteSequential(nn.Module):
    """Blocks [first, end) of a model, which run on servers of a swarm. Made by distributed models, slicing, and `get_remote_module`.

    Attributes:
        target: which blocks of which model in which swarm.
        hidden_size: size of the last dimension of what goes in and comes out.
        draft_policy, assistant_policy: what answers have taught about drafts, their own and a draft model's; another answer goes on from
            there.
        frequencies: of the model's rotary embeddings, without their modules.
    """

    def __init__(
        self,
        target: Target,
        hidden_size: int,
        template: nn.Module | None = None,
        frequencies: Frequencies = Frequencies(),  # noqa: B008  # a value that never changes
        bare: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.target = target
        self.hidden_size = hidden_size
        self.frequencies = frequencies
        self.gradient_checkpointing = False
        self.draft_policy = DraftPolicy()
        self.assistant_policy = DraftPolicy(steady=True)
        # A layer of the model as the library made it, without weights: the library reads attributes of layers (which kind of attention …).
        # Kept out of the module tree.
        self.__dict__["template"] = template
        self.__dict__["returns_tuple"] = False
        self.hold(bare)

    def hold(self, bare: Sequence[nn.Module]) -> None:
        """Have these modules, one a block, stand for the blocks (see `placeholders`); none where there is nothing to be put around them."""
        self._modules.update({str(index): module for index, module in enumerate(bare)})
        self.__dict__["notice"] = notice_of(bare)
        self.__dict__["injected"] = (0, [])

    def __repr__(self) -> str:
        return f"RemoteSequential(blocks {self.target.first}:{self.target.end})"

    def __len__(self) -> int:
        return 1 if self._current_pass() is not None else self.target.end - self.target.first

    def __getitem__(self, index: int | slice) -> Any:
        """A block by number, or a slice of blocks (step 1), as a `RemoteSequential`; numbers count from the first block of this list."""
        if self._current_pass() is not None:
            return [_OneLayer(self)][index]
        count = self.target.end - self.target.first
        if isinstance(index, slice):
            start, stop, stride = index.indices(count)
            if stride != 1 or start >= stop:
                raise ValueError(f"a slice of blocks must hold at least one and have step 1; got {index} of {count} blocks")
        else:
            if not -count <= index < count:
                raise IndexError(f"there is no block {index} among {count}")
            start = index % count
            stop = start + 1
        return self.part(start, stop)

    def part(self, start: int, stop: int) -> RemoteSequential:
        """Blocks [start, stop) of this list, whatever it presents itself as."""
        target = replace(self.target, first=self.target.first + start, end=self.target.first + stop)
        bare = [module for module in self._modules.values() if module is not None][start:stop]
        return RemoteSequential(target, self.hidden_size, self.__dict__["template"], self.frequencies, bare)

    def __iter__(self) -> Iterator[Any]:
        if self._current_pass() is not None:
            return iter([_OneLayer(self)])
        return (self.part(index, index + 1) for index in range(self.target.end - self.target.first))

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSequential:
        bare = [copy.deepcopy(module, memo) for module in self.children()]
        same = RemoteSequential(self.target, self.hidden_size, self.__dict__["template"], self.frequencies, bare)
        same.__dict__["returns_tuple"] = self.__dict__["returns_tuple"]
        same.training = self.training
        memo[id(self)] = same
        return same

    def forward(
        self,
        hidden_states: torch.Tensor,
        prompts: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the blocks, in the session that is open for them (`with blocks.inference_session(…)`) or else without a cache.

        Args:
            hidden_states: [rows, length, hidden].
            prompts: [blocks, rows, prompt length, hidden], added to each block's input at its first positions.
            attention_mask: [rows, length], 0 where a token is padding.
            position_ids: [rows or 1, length].
        Returns:
            [rows, length, hidden], of the same dtype and on the same device. Without a session gradients reach `hidden_states`, `prompts`
            and the parameters of adapters that PEFT has put into these blocks.
        Raises:
            ValueError: wrong shape or dtype; nothing was sent.
            MissingBlocksError: a block has no server.
        """
        session = self.active_session()
        if session is not None:
            return session.run(hidden_states, mask=attention_mask, position_ids=position_ids, prompts=prompts)[-1]
        return self.run(hidden_states, mask=attention_mask, position_ids=position_ids, prompts=prompts)[-1]

    def run(
        self,
        hidden_states: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        all_hidden: bool = False,
        lora: tuple[Lora, torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """`forward` without a session; with `all_hidden` the outputs of all blocks, first to last.

        Args:
            lora: what `lora()` gives of these blocks and maybe others, where the caller has it already.
        """
        self.check_hidden(hidden_states)
        rows, length = hidden_states.shape[:2]
        if prompts is not None:
            prompts = self.check_prompts(prompts, hidden_states)
        lora = lora or self.lora()
        parameters, numbers = lora or (None, None)
        sources = [tensor for tensor in (hidden_states, prompts, numbers) if tensor is not None]
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources)
        if differentiable and all_hidden and self.target.end - self.target.first > 1:
            return self._run_singly(hidden_states, mask, position_ids, prompts, lora)
        if mask is not None:
            mask = as_mask(mask, rows)
            if mask.shape[1] != length:
                raise ValueError(f"attention_mask has {mask.shape[1]} columns for {length} tokens")
        positions = unusual_positions(position_ids, 0, rows, length)
        inputs = Inputs(
            mask=None if mask is None or bool(mask.all()) else encode_tensor(mask),
            position_ids=None if positions is None else encode_tensor(positions),
            all_hidden=all_hidden,
            lora=parameters,
        )
        if differentiable:
            return [autograd.apply(self.target, hidden_states, prompts, inputs, numbers)]
        return autograd.run(self.target, hidden_states, prompts, inputs)

    def _run_singly(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        prompts: torch.Tensor | None,
        lora: tuple[Lora, torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """Block by block: slower, and every boundary is part of the graph."""
        outputs = []
        for index in range(self.target.end - self.target.first):
            part = None if prompts is None else prompts[index : index + 1]
            hidden = self.part(index, index + 1).run(hidden, mask=mask, position_ids=position_ids, prompts=part, lora=lora)[-1]
            outputs.append(hidden)
        return outputs

    def lora(self) -> tuple[Lora, torch.Tensor] | None:
        """What PEFT's active adapters add to these blocks, and the same numbers as a tensor, float32 [numbers] on the CPU, through which
        gradients reach the adapters' parameters; None where there are none.

        Raises ValueError where something else than plain LoRA was put there, or its parameters are not finite.
        """
        if not self.__dict__["notice"].count:
            return None
        target = self.target
        adapted, dropout = collect(self._injected(), target.first)
        return fold(adapted, target.model, target.first, target.end, dropout) if adapted else None

    def lora_fingerprint(self) -> object:
        """Equal as long as `lora` gives the same, as far as that can be told quickly; see `fingerprint`."""
        return fingerprint(self._injected()) if self.__dict__["notice"].count else None

    def _injected(self) -> list[Injected]:
        count = self.__dict__["notice"].count
        if self.__dict__["injected"][0] != count:
            self.__dict__["injected"] = count, injected(self.children())
        found: list[Injected] = self.__dict__["injected"][1]
        return found

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """A KV cache of at most `max_length` entries a row for these blocks; see `InferenceSession`.

        Servers are found and asked in the background; what they answer is met by the first step.
        """
        return InferenceSession(self, max_length)

    def active_session(self) -> InferenceSession | None:
        """The session of these blocks whose `with` block is open in this thread; the innermost."""
        for blocks, session in reversed(_sessions.get()):
            if blocks is self and not session.closed:
                return session
        return None

    def activate(self, session: InferenceSession) -> None:
        """From now on calls in this context use the session."""
        _sessions.set((*_sessions.get(), (self, session)))

    def deactivate(self, session: InferenceSession) -> None:
        _sessions.set(tuple(entry for entry in _sessions.get() if entry[1] is not session))

    @contextmanager
    def no_active_session(self) -> Iterator[None]:
        """Calls inside do not use the sessions that are open around them."""
        token = _sessions.set(())
        try:
            yield
        finally:
            _sessions.reset(token)

    def route(self) -> list[Hop]:
        """The servers that a session would use now, in order. Raises MissingBlocksError, ServerError."""
        return self.target.swarm.portal.run(find_hops, self.target)

    def check_hidden(self, hidden_states: torch.Tensor) -> None:
        """Raises ValueError unless `hidden_states` can go through these blocks."""
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden states must have the shape [rows, tokens, {self.hidden_size}]; got {list(hidden_states.shape)}")
        if not hidden_states.is_floating_point():
            raise ValueError(f"hidden states must be of a floating-point dtype; got {hidden_states.dtype}")
        if hidden_states.shape[0] == 0:
            raise ValueError("hidden states have no rows")

    def check_prompts(self, prompts: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The prompts in the dtype of the hidden states. Raises ValueError unless they are for these blocks and rows."""
        (rows, new), blocks = hidden_states.shape[:2], self.target.end - self.target.first
        length = prompts.shape[2] if prompts.ndim == 4 else 0
        if tuple(prompts.shape) != (blocks, rows, length, self.hidden_size) or length > new:
            raise ValueError(f"prompts must have the shape [{blocks}, {rows}, up to {new}, {self.hidden_size}]; got {list(prompts.shape)}")
        if prompts.dtype == hidden_states.dtype or prompts.stride(1):
            return prompts.to(hidden_states.dtype)
        return prompts[:, :1].to(hidden_states.dtype).expand_as(prompts)  # all rows stay the same memory

    @contextmanager
    def as_one_layer(self, run: Callable[[torch.Tensor], list[torch.Tensor]]) -> Iterator[Pass]:
        """While this is open the list is one layer that does `run`: hidden states to a list whose last is the layer's output."""
        token = _pass.set(opened := Pass(self, run))
        try:
            yield opened
        finally:
            _pass.reset(token)

    def _current_pass(self) -> Pass | None:
        current = _pass.get()
        return current if current is not None and current.blocks is self else None


class _OneLayer:
    """All blocks of a list as a single layer of the library."""

    def __init__(self, blocks: RemoteSequential) -> None:
        self._blocks = blocks

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        current = self._blocks._current_pass()
        if current is None:
            raise RuntimeError("the layers of a distributed model were called outside of its forward")
        outputs = current.run(hidden_states)
        current.outputs = [hidden_states, *outputs]
        return (outputs[-1], None, None) if self._blocks.__dict__["returns_tuple"] else outputs[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks.__dict__["template"], name)


def get_remote_module(
    node_or_initial_peers: Any, uids: str | Sequence[str], config: Any, **settings: Any
) -> RemoteSequential | None | list[RemoteSequential | None]:
    """Single remote blocks by name.

    Args:
        node_or_initial_peers: bootstrap multiaddrs, a distributed model or `RemoteSequential` whose swarm is to be used, or None to find
            the swarm as `from_pretrained` does.
        uids: names like "model.3": whatever stands before the last dot is a label, the number after it counts. One name or several.
        config: from `AutoDistributedConfig.from_pretrained(name)`, which says what model it is.
        settings: as for `from_pretrained`.
    Returns:
        for each name its block, None where it has no server now; for a single name just that.
    Raises:
        ValueError: a name that is none, or a block number that the model does not have.
    """
    from petalnet.client.auto import open_target

    names = [uids] if isinstance(uids, str) else list(uids)
    matches = [re.fullmatch(r"(?:.*\.)?(\d+)", name) for name in names]
    if not all(matches):
        raise ValueError(f"block names end in a dot and a number, like model.3; got {names}")
    numbers = [int(match[1]) for match in matches if match is not None]
    shared = find_blocks(node_or_initial_peers)
    if shared is not None:
        settings["initial_peers"] = shared.target.swarm.initial_peers
    elif node_or_initial_peers is not None:
        settings["initial_peers"] = node_or_initial_peers
    chosen = take_settings(settings, config)
    if settings:
        raise TypeError(f"get_remote_module has no argument {sorted(settings)[0]!r}")
    target, hidden_size = open_target(config, chosen)
    blocks = RemoteSequential(target, hidden_size)
    if any(number >= len(blocks) for number in numbers):
        raise ValueError(f"the model has blocks 0 to {len(blocks) - 1}; got {numbers}")
    served = set(_served(blocks, numbers))
    modules = [blocks[number] if number in served else None for number in numbers]
    return modules[0] if isinstance(uids, str) else modules


def _served(blocks: RemoteSequential, numbers: Collection[int]) -> Iterator[int]:
    for number in sorted(set(numbers)):
        try:
            blocks[number].route()
        except MissingBlocksError:
            continue
        yield number


def find_blocks(module: Any) -> RemoteSequential | None:
    """The remote list inside a module, or the module itself where it is one."""
    if isinstance(module, RemoteSequential):
        return module
    if not isinstance(module, nn.Module):
        return None
    return next((part for part in module.modules() if isinstance(part, RemoteSequential)), None)


def local_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a tree that run here: what stands for remote ones is left out."""
    waiting = [module]
    while waiting:
        module = waiting.pop()
        yield module
        if not isinstance(module, RemoteSequential):
            waiting += [child for child in module._modules.values() if child is not None]


def make_target(swarm: Swarm, model: str, num_blocks: int, settings: ClientSettings) -> Target:
    """All blocks of a model; its servers are looked for from now on."""
    swarm.portal.call_soon(swarm.membership.watch, model)
    return Target(swarm=swarm, model=model, first=0, end=num_blocks, settings=copy.copy(settings))
