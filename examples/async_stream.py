"""Stream answers on an event loop: two requests at once, each printed as it comes.

    python examples/async_stream.py [--model MODEL | --connect ADDRESS]

With --connect it uses an engine that runs already (`tercet engine`) and starts none.
"""

import argparse
import asyncio

from tercet import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams

PROMPTS = {"geography": "The capital of France is", "counting": "One, two, three, four,"}


async def stream(engine: AsyncLLM, name: str, prompt: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, output_kind=RequestOutputKind.DELTA)
    pieces = []
    async for output in engine.generate(prompt, params, request_id=name):
        pieces.append(output.outputs[0].text)
        print(f"{name}: +{pieces[-1]!r}")
    print(f"{name}: {len(pieces)} pieces: {prompt}{''.join(pieces)!r}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    parser.add_argument("--connect", metavar="ADDRESS", help="use the engine that listens there")
    args = parser.parse_args()

    if args.connect:
        engine = await AsyncLLM.connect(args.connect)
    else:
        engine_args = AsyncEngineArgs(model=args.model, max_model_len=1024, max_num_seqs=16)
        # Loading takes seconds, which an event loop with other work should not wait for.
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, engine_args)
    async with engine:
        await asyncio.gather(*(stream(engine, name, prompt) for name, prompt in PROMPTS.items()))


if __name__ == "__main__":
    asyncio.run(main())
