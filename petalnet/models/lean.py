"""Import transformers, and bitsandbytes, without what only compilers and training clusters need.

The library's model classes pull in torch's graph compiler (with a computer algebra system behind it) and torch's distributed tensors:
more than half of the time that importing them takes, and a server of blocks uses neither. For the moment of the import, the library is
told that there are no distributed tensors and no flex attention, and finds a stand-in for the compiler whose decorators do nothing.
Afterwards everything is as before: the real compiler is imported where something asks for it.

This is for a process that is petalnet's own, a node; a program of a user's that imports petalnet gets the library as it is.

bitsandbytes hands functions to the compiler as it is imported, or hides them from it, which imports it: three seconds, and 80 MB. Where the
package `kernels` is installed, it fetches a program for some processors from the hub and runs it. It goes on without these. In a user's
program, where PEFT imports it, it only keeps quiet about the program that it lacks.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

MODULES = ("transformers.models.auto.modeling_auto", "transformers.modeling_layers", "transformers.generation.utils")
"""What every model class needs, and what is slow about it."""
COMPILER, INDEX_MODE = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"

KERNELS_LOG, KERNELS_WARNING = "bitsandbytes.backends.cpu.ops", "from kernels-community"
"""Where bitsandbytes warns that it could not fetch a program, and what is in the warning."""

DECORATORS = ("allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph")
"""What modules of the library, or of torch that they import, use of the compiler while they are imported."""


def import_transformers() -> None:
    """Import what every model class of transformers needs, the quick way where that works, else the usual way."""
    if COMPILER in sys.modules or "transformers.modeling_utils" in sys.modules:
        return
    before = set(sys.modules)
    try:
        with _without_compilers():
            for name in MODULES:
                importlib.import_module(name)
    except (ImportError, AttributeError, TypeError, NameError) as error:
        # Another version of the libraries, which uses more than is stood in for. Nothing may stay that was imported half.
        log.debug("transformers cannot be imported the quick way: %s", error)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "transformers":
                del sys.modules[name]


def import_bitsandbytes() -> types.ModuleType:
    """Import bitsandbytes, uncompiled and with only what is installed of it. Raises ImportError."""
    import torch

    if (known := sys.modules.get("bitsandbytes")) is not None:
        return known
    library_log = logging.getLogger("bitsandbytes")
    level, kernels = library_log.level, sys.modules.get("kernels")
    compile_function, disable = torch.compile, torch._disable_dynamo
    try:
        sys.modules["kernels"] = None  # type: ignore[assignment]
        torch.compile = _no_compiler
        torch._disable_dynamo = _unchanged  # type: ignore[assignment]
        library_log.setLevel(logging.ERROR)  # it warns that it lacks the program from the hub
        return importlib.import_module("bitsandbytes")
    finally:
        library_log.setLevel(level)
        torch.compile, torch._disable_dynamo = compile_function, disable
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def quiet_bitsandbytes() -> None:
    """From now on, bitsandbytes does not warn as it is imported that it lacks the program from the hub, which nobody here needs.

    It is installed for petalnet's servers, and PEFT imports it in clients as well.
    """
    logging.getLogger(KERNELS_LOG).addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return KERNELS_WARNING not in str(record.msg)


def _no_compiler(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("not compiled")


class TransformGetItemToIndex:
    """The library's masks use the compiler's mode of this name only for patterns of their own: it is fetched when it is entered."""

    def __enter__(self) -> Any:
        self._mode = importlib.import_module(INDEX_MODE).TransformGetItemToIndex()
        return self._mode.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._mode.__exit__(*error)


def _unchanged(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """A decorator, with or without arguments, that changes nothing."""
    return function if function is not None else lambda decorated: decorated


def _no() -> bool:
    return False


@contextmanager
def _without_compilers() -> Iterator[None]:
    import torch
    import torch.compiler
    import transformers.utils
    from transformers.utils import import_utils

    compiler, index_mode = types.ModuleType(COMPILER), types.ModuleType(INDEX_MODE)
    for decorator in DECORATORS:
        setattr(compiler, decorator, _unchanged)
    index_mode.TransformGetItemToIndex = TransformGetItemToIndex  # type: ignore[attr-defined]
    questions = ("is_torch_distributed_available", "is_torch_flex_attn_available")
    saved = [(module, name, getattr(module, name)) for module in (import_utils, transformers.utils) for name in questions]
    saved.append((torch.compiler, "disable", torch.compiler.disable))
    sys.modules[COMPILER], sys.modules[INDEX_MODE] = compiler, index_mode
    try:
        torch._dynamo = compiler
        for module, name, _ in saved:
            setattr(module, name, _unchanged if module is torch.compiler else _no)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
        del torch._dynamo, sys.modules[COMPILER], sys.modules[INDEX_MODE]
