"""Where results of benchmarks go: file names and JSON, as vLLM writes them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tercet.errors import TercetError


def timestamp() -> str:
    """Local time, as in result files and their names."""
    return time.strftime("%Y%m%d-%H%M%S")


def result_path(
    result: Mapping[str, Any], *, directory: Path | None, filename: str | None, is_one_of_several: bool
) -> Path:
    """Where a run's result is saved.

    Args:
        result: complete, with label, traffic, model and date.
        filename: chosen by the user; of several runs each gets its traffic added.
        is_one_of_several: the run is part of a sweep.
    """
    label = result["label"] or result["backend"]
    model = str(result["model_id"]).rstrip("/").rpartition("/")[2]
    if "ramp_up_strategy" in result:
        start, end = f"{result['ramp_up_start_rps']:g}", f"{result['ramp_up_end_rps']:g}"
        rate = f"ramp-up-{result['ramp_up_strategy']}-{start}qps-{end}qps"
    else:
        rate = f"{result['request_rate']}qps"
    concurrency = result["max_concurrency"]
    traffic = rate + (f"-concurrency{concurrency}" if concurrency is not None else "")
    name = f"{label}-{traffic}-{model}-{result['date']}.json"
    if filename is not None:
        given = Path(filename)
        name = (
            str(given.with_name(f"{given.stem}-{traffic}{given.suffix}")) if is_one_of_several else filename
        )
    return (directory or Path()) / name


def save_json(
    path: Path, value: Mapping[str, Any], *, append: bool = False, indent: int | None = None
) -> None:
    """Write a result; with `append` as one more line of the file.

    Raises:
        TercetError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(("\n" if append and file.tell() else "") + json.dumps(value, indent=indent))
    except OSError as error:
        raise TercetError(f"cannot write {path}: {error.strerror}") from None


def sweep_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run of a sweep."""
    columns = (
        ("rate", "request_rate", ""),
        ("concurrency", "max_concurrency", ""),
        ("req/s", "request_throughput", ".2f"),
        ("out tok/s", "output_throughput", ".1f"),
        ("TTFT p50 ms", "median_ttft_ms", ".2f"),
        ("TPOT p50 ms", "median_tpot_ms", ".2f"),
        ("E2EL p50 ms", "median_e2el_ms", ".1f"),
        ("failed", "failed", ""),
    )
    shown = [column for column in columns if all(column[1] in result for result in results)]
    rows = [[title for title, _, _ in shown]]
    for result in results:
        rows.append(
            ["-" if (value := result[key]) is None else format(value, form) for _, key, form in shown]
        )
    return "\n".join("".join(f"{cell:>13}" for cell in row) for row in rows)
