"""Which implementation of an operation runs: by device and dtype, or as TERCET_OPS says.

Each operation lives in a file of its own: the plain-torch reference, the kernels beside it, and one
`Operation` that callers call. A kernel is registered with the devices and dtypes it serves:

    paged_attention.kernel("triton", "tercet.ops.triton_attention", supports=on_cuda)

Implementations registered later come first. TERCET_OPS overrides the choice: `reference` for every operation,
or a list such as `paged_attention=reference,rms_norm=triton`. The choice is made at the first call for a
device and dtype and kept, so that a step pays one dictionary look-up for an operation.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

from tercet import envs
from tercet.errors import ConfigError

REFERENCE = "reference"

P = ParamSpec("P")
R = TypeVar("R")
Supports = Callable[[torch.device, torch.dtype], bool]

_operations: dict[str, Operation[..., Any]] = {}


class Operation(Generic[P, R]):
    """A named operation with a reference and perhaps kernels; calling it runs the chosen one.

    The first positional argument must be a tensor: its device and dtype decide.
    """

    def __init__(self, name: str, reference: Callable[P, R]) -> None:
        self.name = name
        self.__doc__ = reference.__doc__
        self._implementations: dict[str, tuple[Callable[P, R], Supports]] = {
            REFERENCE: (reference, lambda _device, _dtype: True)
        }
        self._chosen: dict[tuple[torch.device, torch.dtype], Callable[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        tensor = args[0]
        assert isinstance(tensor, torch.Tensor)
        key = (tensor.device, tensor.dtype)
        function = self._chosen.get(key)
        if function is None:
            function = self._chosen[key] = self.select(*key)
        return function(*args, **kwargs)

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names, most preferred first."""
        return tuple(reversed(self._implementations))

    def implementation(self, name: str, *, supports: Supports) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorator that registers a further implementation, preferred to the earlier ones."""

        def add(function: Callable[P, R]) -> Callable[P, R]:
            if name in self._implementations:
                raise ValueError(f"{self.name} already has an implementation {name!r}")
            self._implementations[name] = (function, supports)
            self._chosen.clear()
            return function

        return add

    def kernel(self, name: str, module: str, *, supports: Supports) -> None:
        """Register the function of this operation's name in `module`, which is imported at the first call."""

        @functools.cache
        def load() -> Callable[P, R]:
            return cast("Callable[P, R]", getattr(importlib.import_module(module), self.name))

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return load()(*args, **kwargs)

        self.implementation(name, supports=supports)(run)

    @property
    def reference(self) -> Callable[P, R]:
        """The plain-torch implementation."""
        return self._implementations[REFERENCE][0]

    def select(self, device: torch.device, dtype: torch.dtype) -> Callable[P, R]:
        """The implementation for a device and dtype.

        Raises:
            ConfigError: TERCET_OPS names an implementation that does not exist or does not serve them.
        """
        overrides = _overrides()
        wanted = overrides.get(self.name, overrides.get(""))
        if wanted is not None:
            return self._forced(wanted, device, dtype)
        for function, supports in reversed(self._implementations.values()):
            if supports(device, dtype):
                return function
        raise AssertionError("the reference serves every device and dtype")

    def forget_choices(self) -> None:
        """Choose anew at the next call (TERCET_OPS has changed)."""
        self._chosen.clear()

    def _forced(self, name: str, device: torch.device, dtype: torch.dtype) -> Callable[P, R]:
        if name not in self._implementations:
            known = ", ".join(self.implementations)
            raise ConfigError("TERCET_OPS", f"{self.name} has no implementation {name!r}; it has: {known}")
        function, supports = self._implementations[name]
        if not supports(device, dtype):
            raise ConfigError("TERCET_OPS", f"{self.name}={name} does not serve {device.type} with {dtype}")
        return function


def operation(name: str) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Decorator that makes a reference function the operation `name`."""

    def make(reference: Callable[P, R]) -> Operation[P, R]:
        if name in _operations:
            raise ValueError(f"operation {name!r} exists already")
        made = Operation(name, reference)
        _operations[name] = cast("Operation[..., Any]", made)
        return made

    return make


def operations() -> dict[str, tuple[str, ...]]:
    """Every operation and its implementations, most preferred first."""
    return {name: item.implementations for name, item in sorted(_operations.items())}


def _overrides() -> dict[str, str]:
    """TERCET_OPS as operation -> implementation; the key '' stands for every operation."""
    chosen: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in envs.TERCET_OPS.split(","))):
        name, separator, implementation = item.partition("=")
        if not separator:
            name, implementation = "", item
            if implementation != REFERENCE:
                raise ConfigError(
                    "TERCET_OPS", f"{item!r}: expected 'reference' or 'operation=implementation'"
                )
        elif name not in _operations:
            raise ConfigError("TERCET_OPS", f"no operation {name!r}; there are: {', '.join(_operations)}")
        chosen[name] = implementation
    return chosen
