"""vLLM's figures on one H100 and our goals, beside which ours are printed.

vLLM 0.26.0 as it sets itself up (FlashAttention 3, torch.compile, CUDA graphs, async scheduling), bfloat16, random
weights, one NVIDIA H100 80GB HBM3, torch 2.11.0, 2026-11-23. The workloads are those of `workloads.py`. An H100 is an
H100: compare figures of the same kind of machine only.
"""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT, INPUT, STEP, TOKEN = "output tok/s", "input tok/s", "ms per step", "ms per token"
TTFT, TTFT50, TTFT99 = "TTFT ms", "TTFT p50 ms", "TTFT p99 ms"
ITL50, ITL99, READY = "ITL p50 ms", "ITL p99 ms", "start to ready s"


@dataclass(frozen=True)
class Peer:
    """vLLM's figure as it was written down, and our goal: at least for a throughput, at most for a time."""

    vllm: str
    goal: float


PEERS: dict[tuple[str, str, str], dict[str, Peer]] = {
    # workload, case, metric -> shape -> peer
    ("start", "LLM", READY): {"A": Peer("104", 15), "B": Peer("76", 20)},
    ("start", "AsyncLLM", READY): {"A": Peer("117", 15), "B": Peer("111", 20)},
    ("W1", "", OUTPUT): {"A": Peer("18.1k, 18.4k", 21_000), "B": Peer("8.07k, 8.00k", 8_500)},
    ("W2", "", TOKEN): {"A": Peer("1.92", 1.1), "B": Peer("6.62", 5.9)},
    ("W2", "", TTFT): {"A": Peer("8.8", 4), "B": Peer("19.0", 10)},
    ("W3", "64", STEP): {"A": Peer("2.99–3.33", 1.9), "B": Peer("7.9–8.1", 7.1)},
    ("W3", "256", OUTPUT): {"A": Peer("29.7k", 52_000), "B": Peer("16.2k", 18_000)},
    ("W3", "256", STEP): {"A": Peer("8.2", 4.5), "B": Peer("12.8", 11.0)},
    ("W4", "", INPUT): {"A": Peer("296k–315k", 330_000), "B": Peer("40.7k", 41_000)},
    ("W5", "256", OUTPUT): {"A": Peer("22.9k, 24.5k", 36_000), "B": Peer("13.1k", 13_700)},
    ("W5", "256", TTFT50): {"A": Peer("174–214", 130), "B": Peer("566–575", 575)},
    ("W5", "256", TTFT99): {"A": Peer("377–412", 260), "B": Peer("1526–1543", 1543)},
    ("W5", "256", ITL50): {"A": Peer("9.0–9.4", 5.5), "B": Peer("13.6", 13)},
    ("W5", "256", ITL99): {"A": Peer("45–48", 25), "B": Peer("187", 60)},
    ("W5", "16", OUTPUT): {"A": Peer("5,330", 10_000), "B": Peer("2,200", 2_400)},
    ("W5", "1", TOKEN): {"A": Peer("2.42", 1.15), "B": Peer("6.44", 5.95)},
}


def find(workload: str, case: str, metric: str, shape: str) -> Peer | None:
    """The peer of a measurement, if there is one."""
    return PEERS.get((workload, case, metric), {}).get(shape)


def more_is_better(metric: str) -> bool:
    """Throughputs; every other metric is a time."""
    return metric.endswith("tok/s")


def is_met(metric: str, value: float, goal: float) -> bool:
    """Whether a figure reaches the goal."""
    return value >= goal if more_is_better(metric) else value <= goal
