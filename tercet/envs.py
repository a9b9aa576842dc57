"""Environment variables that Tercet reads: all of them, in one place.

A variable is read when it is asked for, never at import, so that a test or a host program may set it late.
Tercet itself sets none.

    from tercet import envs
    envs.TERCET_CACHE_ROOT  # -> pathlib.Path
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.errors import ConfigError

LOGGING_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

if TYPE_CHECKING:
    TERCET_API_KEY: str | None
    TERCET_CACHE_ROOT: Path
    TERCET_LOGGING_LEVEL: str
    TERCET_OPS: str
    TERCET_TORCH_PROFILER_DIR: Path | None


def _api_key() -> str | None:
    """Key that requests to `tercet serve` must bear, where --api-key is not given; empty (default): none."""
    return os.environ.get("TERCET_API_KEY") or None


def _cache_root() -> Path:
    """Folder of fetched models and converted tokenizers; default $XDG_CACHE_HOME/tercet, ~/.cache/tercet."""
    if value := os.environ.get("TERCET_CACHE_ROOT"):
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tercet"


def _logging_level() -> str:
    """Least severe level that Tercet's processes log: DEBUG, INFO (default), WARNING, ERROR or CRITICAL."""
    value = os.environ.get("TERCET_LOGGING_LEVEL", "INFO").strip().upper()
    if value not in LOGGING_LEVELS:
        levels = ", ".join(LOGGING_LEVELS)
        raise ConfigError("TERCET_LOGGING_LEVEL", f"must be one of {levels}; got {value!r}")
    return value


def _ops() -> str:
    """Kernels to use: empty (the best), 'reference', or a list such as 'paged_attention=reference'."""
    return os.environ.get("TERCET_OPS", "").strip()


def _torch_profiler_dir() -> Path | None:
    """Folder for the traces of `start_profile`; empty (default): profiling is off."""
    value = os.environ.get("TERCET_TORCH_PROFILER_DIR", "").strip()
    return Path(value).expanduser() if value else None


_READERS: dict[str, Callable[[], Any]] = {
    "TERCET_API_KEY": _api_key,
    "TERCET_CACHE_ROOT": _cache_root,
    "TERCET_LOGGING_LEVEL": _logging_level,
    "TERCET_OPS": _ops,
    "TERCET_TORCH_PROFILER_DIR": _torch_profiler_dir,
}


_SECRET = frozenset({"TERCET_API_KEY"})


def __getattr__(name: str) -> Any:
    reader = _READERS.get(name)
    if reader is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return reader()


def __dir__() -> list[str]:
    return sorted(_READERS)


def describe() -> dict[str, tuple[str, str]]:
    """Every variable -> (current value as text, what it does); `tercet collect-env` prints it."""
    values = {name: reader() for name, reader in _READERS.items()}
    return {
        name: (
            "" if value is None else "(set)" if name in _SECRET else str(value),
            _READERS[name].__doc__ or "",
        )
        for name, value in values.items()
    }
