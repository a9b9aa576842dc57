"""Starting the processes of an engine from the process that wants one: a core and its worker.

The caller becomes their parent; they end with it, whatever ends it. Library code: no signal handler is
installed and nothing of the host process is changed.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

import msgspec

from tercet.config import EngineConfig, ProcessConfig
from tercet.errors import StartupError
from tercet.frontend.bundle_files import prepare_files
from tercet.ipc.address import check_address, is_serving, remove_dead_socket
from tercet.ipc.child import Progress
from tercet.ipc.errors import CannotStartError
from tercet.ipc.process import ProcessSpec
from tercet.ipc.runtime_dir import RuntimeDir
from tercet.ipc.supervisor import Supervisor

WORKER_MODULES = {"simulated": "tercet.worker_proc.simulated"}
DEFAULT_WORKER_MODULE = "tercet.worker_proc"


class EngineProcesses:
    """A core and a worker. `start`, then `stop`; both may be called from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        address: str | None = None,
        progress: Callable[[str], None] | None = None,
        log_level: str | None = None,
    ) -> None:
        """
        Args:
            address: where frontends shall connect; a socket in a private directory where None.
            progress: told what happens while starting, from another thread.
            log_level: of the engine's processes; None leaves it to TERCET_LOGGING_LEVEL.

        Raises:
            ConfigError: the address is not one that Tercet opens, or an engine is there already.
        """
        if address is not None:
            check_address(address)
            if is_serving(address):
                raise StartupError(f"{address} is in use: another engine serves there")
        self.on_death: Callable[[str], None] | None = None
        self._config = config
        self._progress = progress
        self._env = (("TERCET_LOGGING_LEVEL", log_level),) if log_level is not None else ()
        self._directory = RuntimeDir()
        self.address = address or self._directory.address("core")
        self._supervisor: Supervisor | None = None
        self._stopped = False
        self._lock = threading.Lock()  # of the two above
        self._started = False  # so that the address is ours to clean up

    @property
    def config(self) -> EngineConfig:
        """What the processes are started with."""
        return self._config

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: 'core', 'worker 0'."""
        return self._supervisor.pids if self._supervisor else {}

    def start(self) -> None:
        """Start both and wait until the engine takes requests.

        Raises:
            StartupError: it cannot start, or `stop` was called; nothing is left running.
        """
        if self._config.model.kind != "simulated" and not self._config.frontend.files:
            self._tell("preparing tokenizer files")
        try:
            files = prepare_files(self._config)
            engine = msgspec.structs.replace(
                self._config, frontend=msgspec.structs.replace(self._config.frontend, files=files)
            )
            supervisor = Supervisor(
                self._specs(engine), on_progress=self._on_progress, on_death=self._on_death
            )
            with self._lock:
                self._supervisor = supervisor
                if self._stopped:
                    supervisor.stop()
            supervisor.start()
            self._started = True
        except CannotStartError as error:
            self._directory.close()
            raise StartupError(str(error), error.field) from None
        except BaseException:
            self._directory.close()
            raise

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the engine: requests in flight are aborted, their frontends told. Idempotent.

        A `start` in another thread ends early, whatever it has come to.
        """
        self.on_death = None
        with self._lock:
            self._stopped = True
            supervisor = self._supervisor
        if supervisor is not None:
            supervisor.stop(timeout_s)
        if self._started:
            self._started = False
            remove_dead_socket(self.address)  # left by a core that was killed
        self._directory.close()

    def _specs(self, engine: EngineConfig) -> list[ProcessSpec]:
        config = ProcessConfig(
            engine=engine,
            worker_address=self._directory.address("worker"),
            frontend_address=self.address,
            runtime_dir=str(self._directory.path),
            epoch=secrets.randbits(53),
        )
        data = msgspec.msgpack.encode(config)
        module = WORKER_MODULES.get(engine.worker.device, DEFAULT_WORKER_MODULE)
        threads = str(engine.worker.num_threads)
        # Threads that wait must not spin: core and frontends share the processors with a worker on the CPU.
        omp = (("OMP_NUM_THREADS", threads), ("MKL_NUM_THREADS", threads), ("OMP_WAIT_POLICY", "PASSIVE"))
        worker_env = (*omp, *self._env)
        return [
            ProcessSpec("core", "tercet.core_proc", data, self._env),
            ProcessSpec("worker 0", module, data, worker_env),
        ]

    def _on_progress(self, name: str, progress: Progress) -> None:
        share = f" {progress.done}/{progress.total}" if progress.total else ""
        self._tell(f"{name}: {progress.phase}{share}")

    def _on_death(self, problem: str) -> None:
        if self.on_death is not None:
            self.on_death(problem)

    def _tell(self, words: str) -> None:
        if self._progress is not None:
            self._progress(words)
