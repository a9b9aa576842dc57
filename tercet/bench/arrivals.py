"""When requests are sent: a Poisson process, burstier or more even ones, or a rate that grows."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from tercet.errors import ConfigError


class RampUp(msgspec.Struct, frozen=True):
    """A request rate that grows from `start_rps` to `end_rps` over the run."""

    strategy: Literal["linear", "exponential"]
    start_rps: float
    end_rps: float

    def rate(self, progress: float) -> float:
        """Requests per second at a share of the run, 0 to 1."""
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return self.start_rps * float((self.end_rps / self.start_rps) ** progress)

    def __post_init__(self) -> None:
        if not 0 <= self.start_rps <= self.end_rps or self.end_rps == 0:
            raise ConfigError("ramp_up_start_rps", "must be at least 0 and at most ramp_up_end_rps, above 0")
        if self.strategy == "exponential" and self.start_rps == 0:
            raise ConfigError("ramp_up_start_rps", "must be above 0 for an exponential ramp-up")


def arrival_offsets(
    num_requests: int, request_rate: float, burstiness: float, seed: int, ramp_up: RampUp | None = None
) -> list[float]:
    """Seconds from the start of the run at which each request is sent, ascending.

    Gaps follow a gamma distribution with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, less
    is burstier, more is more even. At a constant rate all are then stretched, so that the last request goes
    out at num_requests / request_rate and short runs too have the rate they were asked for.

    Args:
        request_rate: requests per second; inf sends all at once. Not looked at with `ramp_up`.

    Raises:
        ConfigError: rate or burstiness is not above 0.
    """
    if not request_rate > 0:
        raise ConfigError("request_rate", f"must be above 0, or inf; got {request_rate}")
    if not 0 < burstiness < math.inf:
        raise ConfigError("burstiness", f"must be above 0; got {burstiness}")
    if ramp_up is None and math.isinf(request_rate):
        return [0.0] * num_requests
    rng = np.random.default_rng([seed, 1])
    gaps = rng.gamma(burstiness, 1.0 / burstiness, num_requests)
    if ramp_up is None:
        offsets = np.cumsum(gaps)
        if num_requests:
            offsets *= num_requests / request_rate / offsets[-1]
        return [float(offset) for offset in offsets]
    # From 0 requests per second there is no first gap: the rate is taken in the middle of each request's share.
    rates = np.array([ramp_up.rate((index + 0.5) / num_requests) for index in range(num_requests)])
    return [float(offset) for offset in np.cumsum(gaps / rates)]
