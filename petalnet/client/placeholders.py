"""Modules in the place of remote ones, for PEFT to find: it puts its layers around linear modules by their names, whatever these compute.

For each remote block there is a tree of bare modules with the block's names, and in it a placeholder for each linear module: without
parameters, but with what a tuner asks of the module that it wraps. So `add_adapter`, `get_peft_model`, `save_pretrained` and all the rest
work on a distributed model as on a local one, and give parameters the same names. Nothing here is ever run: before a pass, what was put
around the placeholders is collected (`collect`), and goes to the servers as numbers.

The bare modules notice when something is put in a placeholder's place, so a model without adapters pays nothing per token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petalnet.client.lora import Adapted, Pair
from petalnet.errors import UsageError


class Notice:
    """How often something was put into a list's blocks; shared by all of their modules."""

    def __init__(self) -> None:
        self.count = 0


class NotLinear(UsageError, AttributeError):
    """A tuner asks for a parameter of a remote module that is no linear one."""


class BareModule(nn.Module):
    """A remote module that is no linear one: it has others in it, or parameters that a tuner may look for and is refused."""

    def __init__(self, path: str, notice: Notice, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.__dict__["_path"] = path
        self.__dict__["_notice"] = notice
        self.__dict__["_remote_parameters"] = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()}
        self._is_hf_initialized = True  # the library is not to initialise what is not there

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__["_notice"].count += 1

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_remote_parameters", ()):
            where = f"{self.__dict__['_path']}.{name}".removeprefix(".")
            raise NotLinear(f"{where} is no linear module, and only such can have LoRA in remote blocks: leave it out of the targets")
        return super().__getattr__(name)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are here; of this module alone also the names of remote ones, for who looks for targets."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if not recurse:
            for name, (shape, dtype) in self.__dict__["_remote_parameters"].items():
                elsewhere = torch.full((), torch.nan, dtype=dtype).expand(shape).as_subclass(_Elsewhere)
                yield f"{prefix}.{name}" if prefix else name, cast(nn.Parameter, elsewhere)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise _refusal()


_HARMLESS = frozenset(("__get__", "requires_grad", "size", "dim", "numel", "is_floating_point", "is_complex", "__repr__"))
"""What may be done with weights that are elsewhere."""


class _Elsewhere(torch.Tensor):
    """In place of the weights of a remote module: where and what they are may be asked, not their values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__set__" and func.__self__.__name__ == "requires_grad":  # asked and set by who freezes a model
            name = "requires_grad"
        if name in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise _refusal()


class _Remote:
    """What both kinds of linear placeholders have: weights that are elsewhere, of a dtype and on a device that follow `to`."""

    _like: torch.Tensor
    _shape: tuple[int, int]

    def _stand_in(self: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.__dict__["_like"] = torch.full((), torch.nan, dtype=dtype, device=device)
        self.__dict__["_shape"] = shape
        self.register_parameter("bias", None)  # as if there were none: a tuner that changed it would change nothing
        self._is_hf_initialized = True  # the library is not to initialise what is not there

    @property
    def weight(self) -> torch.Tensor:
        """NaN that takes no memory, of the remote module's shape."""
        return self._like.expand(self._shape).as_subclass(_Elsewhere)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise _refusal()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = fn(self._like)
        self.__dict__["_like"] = torch.full((), torch.nan, dtype=moved.dtype, device=moved.device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise _refusal()


class RemoteLinear(_Remote, nn.Linear):
    """In place of a linear module."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._stand_in((out_features, in_features), dtype, device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, remote"


class RemoteConv1D(_Remote, Conv1D):
    """In place of GPT-2's linear module, whose weights are transposed."""

    def __init__(self, nx: int, nf: int, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = nx, nf
        self._stand_in((nx, nf), dtype, device)


def placeholders(layers: Iterable[nn.Module], device: torch.device) -> list[nn.Module]:
    """Bare modules for the layers of a model.

    Args:
        layers: as the library made them, on the meta device.
        device: where a tuner is to put its parameters.
    """
    notice = Notice()
    return [_bare("", layer, notice, device) for layer in layers]


def notice_of(blocks: Iterable[nn.Module]) -> Notice:
    """That of blocks which `placeholders` made, or a copy of them."""
    return next((block.__dict__["_notice"] for block in blocks), Notice())


def _bare(path: str, module: nn.Module, notice: Notice, device: torch.device) -> nn.Module:
    if isinstance(module, nn.Linear):
        return RemoteLinear(module.in_features, module.out_features, module.weight.dtype, device)
    if isinstance(module, Conv1D):
        return RemoteConv1D(module.nx, module.nf, module.weight.dtype, device)
    bare = BareModule(path, notice, dict(module.named_parameters(recurse=False)))
    for name, child in module.named_children():
        bare._modules[name] = _bare(f"{path}.{name}" if path else name, child, notice, device)
    return bare.train(module.training)


class Injected(NamedTuple):
    """What was put in the place of something in a block.

    Attributes:
        block: the block's number among those that were asked for.
        path: in the block.
        module: of whatever tuner.
    """

    block: int
    path: str
    module: Any


def injected(blocks: Iterable[nn.Module]) -> list[Injected]:
    """All that is neither bare nor a placeholder, as far out as possible."""
    return [Injected(index, path, module) for index, block in enumerate(blocks) for path, module in _strangers(block, "")]


def _strangers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _Remote):
        return
    if not isinstance(module, BareModule):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _strangers(child, f"{path}.{name}" if path else name)


def collect(modules: Iterable[Injected], first: int) -> tuple[list[Adapted], float]:
    """What the active adapters of PEFT's layers add to remote modules, and the probability of dropout: 0 outside of training.

    Args:
        first: the number in the model of the first of the blocks that these modules are in.
    Raises:
        UsageError: something else than plain LoRA is active there, or adapters of different dropout are.
    """
    lora_class = _lora_class()
    adapted: list[Adapted] = []
    dropouts: set[float] = set()
    for index, path, module in modules:
        if getattr(module, "disable_adapters", False):
            continue
        where = f"block {first + index}, {path}"
        if type(module) is not lora_class or not isinstance(module.base_layer, _Remote):
            raise UsageError(f"{where} is wrapped by {_name(module)}: in remote blocks only LoRA of linear modules is possible")
        if module._forward_pre_hooks or module._forward_hooks:
            raise UsageError(f"{where} has hooks, which would not run: remote modules take no adapter_names, and nobody sees what they do")
        pairs = []
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            if name in module.lora_variant:
                raise UsageError(f"adapter {name!r} of {where} is {_name(module.lora_variant[name])}: remote blocks know plain LoRA only")
            if module.lora_bias[name]:
                raise UsageError(f"adapter {name!r} of {where} has a bias (lora_bias=True), which remote blocks do not know")
            a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
            pairs.append(Pair(a.weight, b.weight, module.scaling[name]))
            dropouts.add(dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0)
        if pairs:
            adapted.append(Adapted(first + index, path, tuple(pairs)))
    if len(dropouts) > 1:
        raise UsageError(f"active adapters of remote blocks must have the same lora_dropout; there are {sorted(dropouts)}")
    return adapted, dropouts.pop() if dropouts else 0.0


def fingerprint(modules: Iterable[Injected]) -> tuple[Any, ...]:
    """A value that changes with what `collect` gives, and is quicker to have: for each token of a session.

    Not noticed is what is written into a parameter behind torch's back, through `parameter.data`.
    """
    lora_class = _lora_class()
    marks: list[Any] = []
    for _, _, module in modules:
        if type(module) is not lora_class:
            marks += (id(module), getattr(module, "disable_adapters", False))
            continue
        own = module.__dict__
        active = own["_active_adapter"]
        marks += (own["_disable_adapters"], active if isinstance(active, str) else tuple(active), *own["scaling"].values())
        for name in ("lora_A", "lora_B"):
            for linear in own["_modules"][name].values():
                weight = linear._parameters["weight"]
                try:
                    version = weight._version
                except RuntimeError:  # made under `torch.inference_mode`: nobody counts its changes
                    version = 0
                marks += (id(weight), weight.data_ptr(), version)
    return tuple(marks)


def _lora_class() -> Any:
    """PEFT's layer around linear modules; None where PEFT is not in use. Not imported here: who has put such a layer somewhere has it."""
    module = sys.modules.get("peft.tuners.lora.layer")
    return None if module is None else module.Linear


def _name(value: object) -> str:
    return f"{type(value).__module__.partition('.')[0]}'s {type(value).__name__}"


def _refusal() -> UsageError:
    return UsageError(
        "the weights of remote blocks are on servers: they cannot be read, changed or merged with here, nor modules be run singly"
    )
