"""Three ways to end a request early. Each frees its memory at once.

python examples/cancel.py [--model MODEL | --connect ADDRESS]
"""

import argparse
import asyncio
from contextlib import aclosing

from tercet import AsyncEngineArgs, AsyncLLM, SamplingParams
from tercet.frontend.metrics import Gauge

PARAMS = SamplingParams(temperature=0, max_tokens=800, ignore_eos=True)


async def free_blocks(engine: AsyncLLM) -> int:
    gauges = {metric.name: metric.value for metric in await engine.get_metrics() if isinstance(metric, Gauge)}
    return int(gauges["tercet:num_free_blocks"])


async def read(engine: AsyncLLM, request_id: str, stop_after: int | None = None) -> None:
    num_tokens, reason = 0, None
    outputs = engine.generate("Once upon a time", PARAMS, request_id=request_id)
    async with aclosing(outputs):  # whoever leaves the loop early closes the generator
        async for output in outputs:
            num_tokens, reason = len(output.outputs[0].token_ids), output.outputs[0].finish_reason
            if stop_after is not None and num_tokens >= stop_after:
                break
    print(f"{request_id}: ended after {num_tokens} tokens, {reason}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    parser.add_argument("--connect", metavar="ADDRESS", help="use the engine that listens there")
    args = parser.parse_args()
    if args.connect:
        engine = await AsyncLLM.connect(args.connect)
    else:
        engine_args = AsyncEngineArgs(model=args.model, max_model_len=1024, max_num_seqs=16)
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, engine_args)
    async with engine:
        before = await free_blocks(engine)

        await read(engine, "left", stop_after=3)

        task = asyncio.create_task(read(engine, "cancelled"))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.wait([task])
        print("cancelled:", task.cancelled())

        task = asyncio.create_task(read(engine, "aborted"))
        await asyncio.sleep(0.5)
        await engine.abort("aborted")  # from anywhere; the stream ends with what there is
        await task

        print("unfinished requests:", engine.get_num_unfinished_requests())
        print("all memory free again:", await free_blocks(engine) == before)


if __name__ == "__main__":
    asyncio.run(main())
