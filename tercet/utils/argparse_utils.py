"""`FlexibleArgumentParser`, under the name and in the place that programs written for vLLM look for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that takes --some_flag and --some-flag alike, whichever of them was added.

    Options are not to be abbreviated, for a later one could make them ambiguous. What is no option of this
    parser stays as it is, and so does everything after `--`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    # argparse declares overloads over the namespace's type.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(self._as_added(given)), namespace)

    def _as_added(self, args: Sequence[str]) -> Iterator[str]:
        """The arguments, with the names of options as they were added."""
        added = {name.replace("_", "-"): name for name in self._option_string_actions}
        literal = False
        for arg in args:
            literal = literal or arg == "--"
            name, equals, value = arg.partition("=")
            if literal or not name.startswith("--") or name in self._option_string_actions:
                yield arg
            else:
                yield added.get(name.replace("_", "-"), name) + equals + value
