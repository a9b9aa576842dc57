"""Start and end of the core process: sockets, the worker's Hello, readiness, orderly leave."""

from __future__ import annotations

import gc
import os
import signal

import msgspec

from tercet import log
from tercet.config import ProcessConfig
from tercet.core_proc.core import Core, WorkerDiedError
from tercet.core_proc.outbox import UNREAD_MESSAGES
from tercet.core_proc.results import ResultError
from tercet.core_proc.scheduler import Scheduler
from tercet.errors import ConfigError
from tercet.gc_pauses import GcPauses
from tercet.ipc.address import AddressClaim
from tercet.ipc.channel import RouterEnd, Waiter
from tercet.ipc.child import ChildProcess, Failed, Ready
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    FrontendToCore,
    WorkerFailed,
    WorkerHello,
    WorkerToCore,
    WorkerWelcome,
)

logger = log.get_logger(__name__)


class StartError(Exception):
    """The core cannot start; starting again would not help. `field` is the engine argument that is the cause."""

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(problem)
        self.field = field


def main(child: ChildProcess) -> int:
    """Run the core; returns the exit code."""
    log.configure("core")
    config = msgspec.msgpack.decode(child.config, type=ProcessConfig)
    try:
        return _serve(config, child, _stop_fd())
    except StartError as error:  # told by whoever started us
        child.report(Failed(str(error), error.field))
        return 1
    except (ConfigError, WorkerDiedError, ResultError) as error:
        logger.error("%s", error)
        child.report(Failed(str(error)))
        return 1
    except Exception as error:
        logger.exception("the core cannot go on")
        child.report(Failed(f"{type(error).__name__}: {error}"))
        return 1


def _stop_fd() -> int:
    """A descriptor that becomes readable at SIGTERM.

    The wake-up descriptor is written by the signal itself. A handler in Python would only run after the poll
    that the loop may just be entering, and so perhaps never.
    """
    stop_r, stop_w = os.pipe()
    os.set_blocking(stop_w, False)
    signal.set_wakeup_fd(stop_w)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return stop_r


def _serve(config: ProcessConfig, child: ChildProcess, stop_fd: int) -> int:
    # Claimed first: of two engines started for one address, one shall learn it before it has loaded a model.
    claim = AddressClaim(config.frontend_address)
    try:
        return _serve_at(claim, config, child, stop_fd)
    finally:
        claim.release()


def _serve_at(claim: AddressClaim, config: ProcessConfig, child: ChildProcess, stop_fd: int) -> int:
    with RouterEnd[WorkerToCore](config.worker_address, WorkerToCore) as workers:
        found = _await_worker(config, workers, stop_fd)
        if found is None:
            return 0
        peer, hello = found
        scheduler = _make_scheduler(config, hello)
        workers.send(peer, WorkerWelcome(epoch=config.epoch, protocol_version=PROTOCOL_VERSION))
        # Bound last: the socket's existence says that the engine is ready.
        with RouterEnd[FrontendToCore](
            config.frontend_address, FrontendToCore, send_queue=UNREAD_MESSAGES, claim=claim
        ) as frontends:
            pauses = GcPauses()
            core = Core(config.engine, scheduler, peer, workers, frontends, stop_fd, pauses)
            gc.collect()
            gc.freeze()  # what lives now lives to the end: later collections need not walk it
            pauses.install()
            child.report(Ready())
            logger.info("ready at %s: %d blocks of %d tokens", config.frontend_address, *_size(scheduler))
            try:
                core.run()
            finally:
                fault = not core.stopping or child.is_fault()
                core.close("the engine has died" if fault else "the engine was shut down", fault=fault)
    return 0


def _await_worker(
    config: ProcessConfig, workers: RouterEnd[WorkerToCore], stop_fd: int
) -> tuple[bytes, WorkerHello] | None:
    """The worker's Hello, however long it loads (its parent watches it); None where told to stop."""
    waiter = Waiter()
    waiter.add(workers)
    waiter.add(stop_fd)
    while True:
        if stop_fd in waiter.wait(None):
            return None
        while (received := workers.recv_nowait()) is not None:
            peer, message = received
            match message:
                case WorkerHello():
                    _check_hello(config, message)
                    return peer, message
                case WorkerFailed(message=problem):
                    raise StartError(problem)


def _check_hello(config: ProcessConfig, hello: WorkerHello) -> None:
    if hello.protocol_version != PROTOCOL_VERSION:
        raise StartError(f"the worker speaks protocol {hello.protocol_version}, this core {PROTOCOL_VERSION}")
    if hello.fingerprint != config.engine.fingerprint():
        raise StartError("the worker was started with another configuration than this core")
    tokens = (hello.num_blocks - 1) * config.engine.cache.block_size
    needed = config.engine.model.max_model_len
    if tokens < needed:
        fix = f"give more kv_cache_memory_bytes, or set max_model_len to at most {max(tokens, 0)}"
        field = "kv_cache_memory_bytes"
        raise StartError(
            f"the KV cache holds {max(tokens, 0)} tokens, a request may need {needed}: {fix}", field
        )


def _make_scheduler(config: ProcessConfig, hello: WorkerHello) -> Scheduler:
    return Scheduler(
        config.engine.scheduler,
        num_blocks=hello.num_blocks,
        block_size=config.engine.cache.block_size,
        enable_prefix_caching=config.engine.cache.enable_prefix_caching,
        epoch=config.epoch,
    )


def _size(scheduler: Scheduler) -> tuple[int, int]:
    return scheduler.pool.num_blocks - 1, scheduler.block_size
