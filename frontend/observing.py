"""What an AsyncLLM tells of itself: figures of its engine, records and traces of its requests."""

from __future__ import annotations

from collections.abc import Mapping

from tercet.errors import EngineError
from tercet.frontend.client import CoreClient
from tercet.frontend.metrics import Metric, StatsLogger, metrics_of, stats_line
from tercet.frontend.output_processor import RequestState
from tercet.frontend.request_log import log_request
from tercet.frontend.sampling_params import SamplingParams
from tercet.frontend.tracing import RequestTracer
from tercet.ipc.messages import GetMetrics, GetStats, Stats
from tercet.ipc.telemetry import Metrics
from tercet.log import get_logger

logger = get_logger(__name__)


class Observer:
    """Watches one connection and its requests.

    Attributes:
        reporter: counts what the core is told of this frontend.
        log_requests: log a record of each request when it has ended.
        tracer: makes spans of requests.
    """

    def __init__(
        self, client: CoreClient, *, log_requests: bool, log_stats: bool, tracer: RequestTracer | None
    ) -> None:
        """
        Args:
            log_stats: log the engine's state every 10 s while it works.
        """
        self.reporter = client.reporter
        self.log_requests = log_requests
        self.tracer: RequestTracer | None = None
        self._client = client
        self._logged_stats: Stats | None = None
        if log_stats:
            client.on_stats = StatsLogger().observe
        if tracer is not None:
            self.trace(tracer)

    def trace(self, tracer: RequestTracer) -> None:
        """Trace requests from now on. The tracer is closed with this object."""
        self.tracer = tracer
        self._client.on_spans = tracer.export

    def opened(
        self, request: RequestState, params: SamplingParams, headers: Mapping[str, str] | None
    ) -> None:
        """A request has come, with these headers of its caller."""
        if self.log_requests:
            request.on_finish = (lambda ended: log_request(ended, repr(params)),)
        if self.tracer is not None:
            self.tracer.begin(request, params, self._model_name, headers)

    @property
    def _model_name(self) -> str:
        assert self._client.welcome is not None
        return self._client.welcome.model.served_names[0]

    async def stats(self) -> Stats:
        """Gauges and counters of the core, as of now."""
        stats = (await self._client.call(GetStats())).stats
        if stats is None:
            raise EngineError("the engine gave no figures")
        return stats

    async def telemetry(self, steps_after: int | None) -> tuple[Stats, Metrics]:
        """Figures of the core and of every frontend; of this one as of now, of others within a heartbeat."""
        self._client.report()
        reply = await self._client.call(GetMetrics(steps_after=steps_after))
        if reply.stats is None or reply.metrics is None:
            raise EngineError("the engine gave no figures")
        return reply.stats, reply.metrics

    async def metrics(self) -> list[Metric]:
        """The same, without steps, under the names that they are exported with."""
        stats, metrics = await self.telemetry(None)
        assert self._client.welcome is not None
        return metrics_of(stats, metrics, self._client.welcome.limits, self._model_name)

    async def log_stats(self) -> None:
        """Log one line with the engine's state; throughputs are since the last one."""
        stats = await self.stats()
        logger.info("%s", stats_line(stats, self._logged_stats))
        self._logged_stats = stats

    def close(self) -> None:
        """Export what is left of traces. Blocks."""
        if self.tracer is not None:
            self.tracer.close()
