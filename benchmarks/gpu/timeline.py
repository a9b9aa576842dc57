"""What the GPU and the launching thread do in steady decode, step by step.

    python -m benchmarks.gpu.timeline --shapes A --batches 1,32,256
    python -m benchmarks.gpu.timeline --trace FILE.json.gz

For each batch size: so many requests decode; the time of a step is measured without a profiler; then the worker is
traced (`AsyncLLM.start_profile`) for some steps and the trace read. Printed per step, as medians: the period from
step to step, how much of it the GPU was busy, idle between steps and idle between the kernels of a step; kernels;
launches, copies and waiting calls of the launching thread; the host's time by part. The goal is an idle time between
decode steps of at most 2 % of a step, one copy to the device, and no call that waits.

The profiler slows the launching thread and, less, the kernels of a graph, so a gap that it shows is an upper bound:
`untraced ms` beside it is the step without the profiler, and `idle in all, untraced` what the traced busy time leaves
of it, gaps between kernels of one step included. Traces are kept beside the results; Perfetto opens them.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import engines, options, trace
from benchmarks.gpu.clock import Clock, OutOfTimeError
from benchmarks.gpu.engines import Plan
from benchmarks.gpu.environment import headline
from benchmarks.gpu.results import Measurement, Results, number
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.suite import NO_TIME, settings_of, sizes_of
from benchmarks.gpu.trace import Trace
from benchmarks.gpu.workloads import random_prompts
from tercet import AsyncLLM, RequestOutputKind, SamplingParams

GOAL_IDLE_PERCENT = 2.0
EDGE_STEPS = 3  # left out at either end of a trace: the profiler's own start and end disturb them
PROMPT = 128
Figures = dict[str, float]


def summarize(found: Trace) -> Figures:
    """Medians over the decode steps of a trace, without those at its edges. Times in µs unless named otherwise."""
    first, last = found.steps[0].number + EDGE_STEPS, found.steps[-1].number - EDGE_STEPS
    steps = [step for step in found.steps if step.kind == "decode" and first <= step.number <= last]
    gaps = [gap for gap in found.gaps() if first <= gap.number < last]
    if not steps:
        raise ValueError(f"a trace of {len(found.steps)} steps: none is a decode step away from its edges")
    figures: Figures = {"decode steps": len(steps)}
    if gaps:
        total = sum(gap.period_us for gap in gaps)
        figures |= {
            "period": _median(gap.period_us for gap in gaps),
            "GPU busy": _median(gap.busy_us for gap in gaps),
            "idle between steps": _median(gap.between_us for gap in gaps),
            "idle between steps %": 100 * sum(gap.between_us for gap in gaps) / total,
            "longest idle between steps": max(gap.between_us for gap in gaps),
            "idle within step %": 100 * sum(gap.within_us for gap in gaps) / total,
            "kernels": _median(step.kernels for step in steps),
        }
    figures |= {
        "launches": _median(step.launches for step in steps),
        "graph launches": _median(step.graph_launches for step in steps),
        "copies to GPU": _mean(step.copies("HtoD") for step in steps),
        "copies to host": _mean(step.copies("DtoH") for step in steps),
        "waiting calls": _mean(len(step.syncs) for step in steps),
        "host": _median(step.host_us for step in steps),
        "host outside CUDA": _median(step.host_us - sum(c.duration for c in step.calls) for step in steps),
    }
    return figures | _parts(steps) | _calls(steps)


def _parts(steps: list[trace.Step]) -> Figures:
    """Time of the host by annotation."""
    names = sorted({name for step in steps for name in step.parts})
    return {f"host: {name}": _median(step.parts.get(name, 0.0) for step in steps) for name in names}


def _calls(steps: list[trace.Step]) -> Figures:
    """Time of the launching thread in each kind of call into CUDA, the longest ones."""
    names = {call.name for step in steps for call in step.calls}
    times = {
        f"in {name}": _mean(sum(c.duration for c in step.calls if c.name == name) for step in steps)
        for name in names
    }
    longest = sorted(times.items(), key=lambda item: -item[1])
    return dict(longest[:6])


def waiting_calls(found: Trace) -> list[str]:
    """Names of the calls in decode steps that waited for the device."""
    return sorted({name for step in found.steps if step.kind == "decode" for name in step.syncs})


def _median(values: Any) -> float:
    return float(statistics.median(values))


def _mean(values: Any) -> float:
    return float(statistics.fmean(values))


async def profile_decode(engine: AsyncLLM, batch: int, num_steps: int, prefix: str) -> float:
    """Let `batch` requests decode, and trace the worker meanwhile.

    Args:
        num_steps: decode steps to time, and then to trace.
        prefix: of the trace's file.

    Returns:
        Seconds of a decode step, measured before the trace began.
    """
    length = 2 * num_steps + 200  # enough that all still decode when the trace ends
    length = min(length, engine.model_info.max_model_len - PROMPT // 4 - 1)
    prompt = min(PROMPT, engine.model_info.max_model_len - length - 1)
    prompts = random_prompts([prompt] * batch, engine.model_info.vocab_size, prefix, batch)
    params = SamplingParams(
        temperature=0,
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    progress = _Progress(batch)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(progress.consume(engine, one, params)) for one in prompts]
        await progress.reach(8)  # every request decodes
        begun, began = progress.least, asyncio.get_running_loop().time()
        await progress.reach(begun + num_steps)
        step_s = (asyncio.get_running_loop().time() - began) / (progress.least - begun)
        await engine.start_profile(prefix)
        await progress.reach(progress.least + num_steps)
        await engine.stop_profile()
        for task in tasks:
            task.cancel()
    return step_s


class _Progress:
    """Counts the tokens of several streams."""

    def __init__(self, count: int) -> None:
        self._counts = [0] * count
        self._next = 0
        self._changed = asyncio.Event()

    @property
    def least(self) -> int:
        return min(self._counts)

    async def consume(self, engine: AsyncLLM, prompt: Any, params: SamplingParams) -> None:
        index, self._next = self._next, self._next + 1
        async for output in engine.generate(prompt, params):
            self._counts[index] += len(output.outputs[0].token_ids)
            self._changed.set()

    async def reach(self, count: int) -> None:
        """Wait until every stream has so many tokens."""
        while self.least < count:
            self._changed.clear()
            await self._changed.wait()


class Timelines:
    """Profiles shapes at batch sizes; figures go into `results`, traces beside its file."""

    def __init__(self, plan: Plan, results: Results, clock: Clock, num_steps: int) -> None:
        self.plan = plan
        self.results = results
        self.clock = clock
        self.num_steps = num_steps

    def shape(self, name: str, batches: Sequence[int]) -> None:
        """One engine, every batch size."""
        arguments = self.plan.arguments(SHAPES[name], engines.SERVING_LIMITS)
        folder = self.results.path.parent
        # What torch sets itself for programs that replay CUDA graphs under its profiler more than once.
        env = {
            "TERCET_TORCH_PROFILER_DIR": str(folder),
            "DISABLE_CUPTI_LAZY_REINIT": "1",
            "TEARDOWN_CUPTI": "0",
        }
        with (
            engines.variables(env),
            asyncio.Runner() as runner,
            engines.serving(arguments, runner) as (engine, _),
        ):
            self.results.engines.append({"shape": name, "arguments": arguments, "env": env})
            for batch in batches:
                if self.clock.left_s <= 0:
                    self.results.skip(f"{name}, batch {batch}", NO_TIME)
                    continue
                runner.run(self._batch(engine, name, batch))

    async def _batch(self, engine: AsyncLLM, shape: str, batch: int) -> None:
        prefix = f"timeline-{shape}-{batch}"
        try:
            async with asyncio.timeout(self.clock.left_s):
                await profile_decode(engine, batch, self.num_steps, f"warmup-{prefix}")
                step_s = await profile_decode(engine, batch, self.num_steps, prefix)
        except TimeoutError:
            raise OutOfTimeError from None
        folder = self.results.path.parent
        for path in folder.glob(f"warmup-{prefix}_*"):
            path.unlink()
        path = max(folder.glob(f"{prefix}_*.json.gz"))
        found = trace.read(path)
        figures = {"untraced ms": step_s * 1e3, **summarize(found)}
        if "GPU busy" in figures:
            figures["idle in all, untraced %"] = 100 * (1 - figures["GPU busy"] / (step_s * 1e6))
        measurement = Measurement(shape, "timeline", str(batch), f"steady decode of {batch}", batch=batch)
        measurement.runs.append(figures)
        self.results.add(measurement)
        self.results.settings.setdefault("traces", {})[f"{shape} {batch}"] = path.name
        self.results.settings.setdefault("waiting calls", {})[f"{shape} {batch}"] = waiting_calls(found)
        self.results.save()
        print(f"  {shape} batch {batch}: {path.name}", flush=True)


def table(measurements: Sequence[Measurement]) -> str:
    """A column for each shape and batch size, a line for each figure, as Markdown."""
    columns = [(f"{m.shape} {m.case}".strip(), m.runs[0]) for m in measurements if m.runs]
    names = list(dict.fromkeys(name for _, figures in columns for name in figures))
    lines = [
        "| per step (µs, counts) | " + " | ".join(title for title, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name in names:
        cells = [number(figures[name]) if name in figures else "" for _, figures in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    idle = [figures.get("idle between steps %") for _, figures in columns]
    verdicts = ["no GPU" if i is None else "yes" if i <= GOAL_IDLE_PERCENT else "**no**" for i in idle]
    lines.append(f"| idle between steps ≤ {GOAL_IDLE_PERCENT:g} % | " + " | ".join(verdicts) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Measurement]:
    """Run the program; returns its figures."""
    parser = options.parser(__doc__, "A")
    parser.add_argument("--batches", type=options.numbers, default=[1, 32, 256], help="default 1,32,256")
    parser.add_argument("--steps", type=int, default=40, help="decode steps in a trace, default 40")
    parser.add_argument("--trace", type=Path, help="read this trace instead of making some")
    args = parser.parse_args(argv)
    if args.trace is not None:
        one = Measurement("", "timeline", "", str(args.trace), runs=[summarize(trace.read(args.trace))])
        print(table([one]))
        return [one]
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as folder:
        plan = options.plan(args, Path(folder))
        settings = settings_of(plan, sizes_of(args.scale), batches=args.batches, steps=args.steps)
        results = options.results(args, "timeline", settings)
        results.save()
        timelines = Timelines(plan, results, Clock(args.time_limit), args.steps)
        for shape in args.shapes:
            try:
                timelines.shape(shape, args.batches)
            except OutOfTimeError:
                results.skip(shape, f"{NO_TIME}, in the middle")
    print(headline(results.environment))
    print(table(results.measurements))
    print(f"figures in {results.path}, traces beside it")
    return results.measurements


if __name__ == "__main__":
    main()
