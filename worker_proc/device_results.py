"""The host's side of steps on a GPU: pinned buffers that travel there and back, and a thread that waits for them.

A landing holds what one step sends and gets. There are as many as steps can be under way, and a landing is used
again only when its result has been read, so neither copy is ever overwritten while it runs.
"""

from __future__ import annotations

import queue
import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.worker_proc.results import PendingResult, read_result
from tercet.worker_proc.sampler import LogprobTensors, SampleResult
from tercet.worker_proc.worker import Deliver

# Two steps are in flight, one may be read, one written; the rest is slack for a results thread that comes late.
_NUM_LANDINGS = 8


class Landing:
    """Pinned memory of one step.

    Attributes:
        buffer, buffer_tensor: int32, the step's buffer as it will be on the device.
        out_tensor: int32 [4, S], what came of it: token, finish, bad, frozen.
    """

    def __init__(self, buffer_size: int, num_rows: int, device: torch.device) -> None:
        pin = device.type == "cuda"
        self.buffer_tensor = torch.zeros(buffer_size, dtype=torch.int32, pin_memory=pin)
        self.buffer: npt.NDArray[np.int32] = self.buffer_tensor.numpy()
        self.out_tensor = torch.zeros((4, num_rows), dtype=torch.int32, pin_memory=pin)
        self.done = torch.cuda.Event() if pin else None

    def sampled(self, count: int, logprobs: LogprobTensors | None) -> SampleResult:
        """The outcome of `count` lines, to be read when the step is done."""
        token_S, finish_S, bad_S, _ = self.out_tensor[:, :count].unbind(0)
        return SampleResult(token_S, finish_S, bad_S, logprobs)

    def frozen(self, count: int) -> Tensor:
        """Nonzero for lines whose row had finished before."""
        return self.out_tensor[3, :count]


class DeviceResults:
    """Landings, and their delivery in order. On a CPU a step is done when it returns, and delivered at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: queue.SimpleQueue[Landing] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[tuple[Landing, PendingResult, Deliver] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._run, name="results", daemon=True)
            self._thread.start()

    def prepare(self, buffer_size: int, num_rows: int) -> None:
        """Make the landings, once their sizes are known."""
        for _ in range(_NUM_LANDINGS):
            self._free.put(Landing(buffer_size, num_rows, self._device))

    def next_landing(self) -> Landing:
        """A free one. Waits only when as many results are unread as there are landings.

        Raises:
            BaseException: what ended the delivery of an earlier result, a device fault most likely.
        """
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._free.get(timeout=1.0)
            except queue.Empty:
                continue

    def put(self, landing: Landing, pending: PendingResult, deliver: Deliver) -> None:
        """The step is launched, copies included: deliver its result when it is done."""
        if landing.done is None:
            deliver(read_result(pending))
            self._free.put(landing)
            return
        landing.done.record()
        self._pending.put((landing, pending, deliver))

    def close(self) -> None:
        """Deliver what was put, then stop."""
        if self._thread is not None:
            self._pending.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            while (item := self._pending.get()) is not None:
                landing, pending, deliver = item
                assert landing.done is not None
                landing.done.synchronize()
                deliver(read_result(pending))
                self._free.put(landing)
        except BaseException as error:  # surfaces at the next step, on the launching thread
            self._error = error
