"""Metrics as Prometheus reads them: text, format 0.0.4.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from tercet.frontend.metrics import Counter, Gauge, Histogram, Metric, by_name, family_of

if TYPE_CHECKING:
    from tercet.frontend.observing import Observer
    from tercet.frontend.reporting import Reporter
    from tercet.frontend.server.context import ServerContext

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def watch(observer: Observer, context: ServerContext) -> None:
    """Have the engine told of this server: its HTTP requests, its refusals, its pauses; and trace, if it shall."""
    refused = 0

    def collect(reporter: Reporter) -> None:
        nonlocal refused
        if fresh := context.admission.num_refused - refused:
            refused += fresh
            reporter.count("admission_rejections", fresh, reason="overloaded")
        reporter.paused(context.gc_pauses.take())

    observer.reporter.serves_http = True
    observer.reporter.num_http_requests = lambda: len(context.guards)
    observer.reporter.collect = collect
    observer.log_requests |= context.settings.log_requests
    if context.tracer is not None:
        observer.trace(context.tracer)


def render(metrics: Iterable[Metric]) -> str:
    """All metrics as one text, those of one family together."""
    lines: list[str] = []
    for group in by_name(metrics).values():
        name, family = family_of(group[0])
        lines.append(f"# HELP {name} {family.help}")
        lines.append(f"# TYPE {name} {family.kind}")
        for metric in group:
            lines += _samples(name, metric)
    return "\n".join(lines) + "\n"


def _samples(name: str, metric: Metric) -> Iterator[str]:
    labels = ",".join(f'{key}="{value.translate(_ESCAPES)}"' for key, value in metric.labels.items())
    match metric:
        case Histogram():
            for bound, count in metric.buckets.items():
                yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
            yield f"{name}_sum{{{labels}}} {metric.sum!r}"
            yield f"{name}_count{{{labels}}} {metric.count}"
        case Counter() | Gauge():
            yield f"{name}{{{labels}}} {metric.value!r}"
