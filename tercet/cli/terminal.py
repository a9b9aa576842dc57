"""What commands show beside their output, on stderr: figures of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tercet.frontend.outputs import RequestStateStats


def figures(stats: RequestStateStats, num_prompt_tokens: int, num_cached_tokens: int | None) -> str:
    """A finished answer in figures: its lengths, time to first token, and rate of the tokens after it."""
    cached = f" ({num_cached_tokens} cached)" if num_cached_tokens else ""
    parts = [
        f"{num_prompt_tokens} prompt tokens{cached}",
        f"{stats.num_generation_tokens} generated",
        f"TTFT {stats.first_token_latency:.2f} s",
    ]
    decoding_s = stats.e2e_latency - stats.first_token_latency
    if stats.num_generation_tokens > 1 and decoding_s > 0:
        parts.append(f"{(stats.num_generation_tokens - 1) / decoding_s:.1f} tok/s")
    return ", ".join(parts)
