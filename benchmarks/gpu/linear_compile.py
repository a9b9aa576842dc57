"""Compiles kernels of linear layers into Triton's cache, several processes at a time.

Run as a program it takes jobs as JSON lines on standard input and answers each with a line: the error, or ''. A
variant that breaks the device's context ends its process only; what was left is compiled when it is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch

from benchmarks.gpu.linear_cases import Inputs, Layer, random
from tercet.ops.linear_configs import LinearConfig
from tercet.ops.triton_support import set_programmatic_launch

MAX_PROCESSES = 16


@dataclass(frozen=True)
class Job:
    """A kernel to compile."""

    layer: Layer
    rows: int
    config: str
    programmatic: bool

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for jobs that compile to the same kernel."""
        is_gemv = self.config.startswith("gemv")
        rows = self.rows if is_gemv else 0
        sizes = self.layer.in_size, self.layer.out_size % 32
        return self.layer.kind, sizes, rows, self.config, self.programmatic

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Job:
        fields = json.loads(line)
        return cls(**{**fields, "layer": Layer(**fields["layer"])})

    def run(self) -> str:
        set_programmatic_launch(self.programmatic)
        try:
            weight = random(self.layer.out_size, self.layer.in_size)
            Inputs.make(self.layer, self.rows, weight).call(LinearConfig.parse(self.config))()
            torch.cuda.synchronize()
        except Exception as error:  # any failure disqualifies a variant, whatever it is
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return ""


def compile_all(jobs: list[Job], deadline: float) -> dict[Job, str]:
    """Errors of the jobs that failed. Stops waiting at `deadline` (time.monotonic())."""
    unique = list({job.signature: job for job in jobs}.values())
    count = max(1, min(MAX_PROCESSES, os.cpu_count() or 1, len(unique) // 4))
    shares = [unique[i::count] for i in range(count)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.linear_compile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in shares
    ]
    for process, share in zip(running, shares, strict=True):
        assert process.stdin is not None
        process.stdin.write("".join(job.encode() + "\n" for job in share))
        process.stdin.close()
    failures = {}
    for process, share in zip(running, shares, strict=True):
        assert process.stdout is not None
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # leaves the return code unset
        answers = process.stdout.read().splitlines()
        failures.update({job: answer for job, answer in zip(share, answers, strict=False) if answer})
        if process.returncode and len(answers) < len(share):  # the compiler itself has crashed
            failures[share[len(answers)]] = f"ended its process with {process.returncode}"
    by_signature = {job.signature: error for job, error in failures.items()}
    return {job: by_signature[job.signature] for job in jobs if job.signature in by_signature}


def main() -> None:
    for line in sys.stdin:
        error = Job.decode(line).run()
        print(error.replace("\n", " "), flush=True)
        if "CUDA error" in error:
            return  # the device's context is lost


if __name__ == "__main__":
    main()
