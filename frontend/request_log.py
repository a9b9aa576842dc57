"""One record for each request that has ended, for `enable_log_requests`: a line of JSON, without its text."""

from __future__ import annotations

import time

import msgspec

from tercet.frontend.output_processor import REASONS, RequestState
from tercet.log import get_logger

logger = get_logger(__name__)


class RequestRecord(msgspec.Struct, omit_defaults=True):
    """
    Attributes:
        outcome: 'finished', 'aborted' or the name of the error.
        finish_reasons: of its completions, by index.
        arrival_s: time.time().
        queue_s, prefill_s, first_token_s, e2e_s: as in RequestStateStats; absent where it did not come so far.
    """

    request_id: str
    outcome: str
    arrival_s: float
    n: int
    prompt_tokens: int
    output_tokens: int
    e2e_s: float
    finish_reasons: list[str] = []
    cached_tokens: int | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    first_token_s: float | None = None
    params: str = ""


def record_of(request: RequestState, params: str = "") -> RequestRecord:
    """What there is to say of a request that has ended."""
    stats = request.stats
    reasons = [REASONS.get(child.finish, "error") for child in request.children]
    outcome = "aborted" if "abort" in reasons else "finished"
    record = RequestRecord(
        request_id=request.request_id,
        outcome=type(request.error).__name__ if request.error is not None else outcome,
        arrival_s=round(stats.arrival_time, 6),
        n=len(request.children),
        prompt_tokens=len(request.prompt_token_ids),
        output_tokens=sum(len(child.token_ids) for child in request.children),
        e2e_s=round(stats.e2e_latency or time.time() - stats.arrival_time, 6),
        finish_reasons=list(reasons),
        cached_tokens=request.num_cached_tokens,
        params=params,
    )
    if stats.first_token_latency:
        record.queue_s, record.prefill_s = round(stats.queue_s, 6), round(stats.prefill_s, 6)
        record.first_token_s = round(stats.first_token_latency, 6)
    return record


def log_request(request: RequestState, params: str) -> None:
    """Write the record of a request that has ended."""
    logger.info("request %s", msgspec.json.encode(record_of(request, params)).decode())
