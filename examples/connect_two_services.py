"""Two services, each a process of its own, share one engine.

    python examples/connect_two_services.py [--model MODEL | --connect ADDRESS]

A service needs only the engine's address. It may leave, or be killed, at any time: its requests are freed and
the other service notices nothing.
"""

import argparse
import asyncio
import subprocess
import sys
import time

from tercet import AsyncEngineArgs, AsyncLLM, SamplingParams

SERVICES = {"geographer": "The capital of France is", "storyteller": "Once upon a time, there was"}


async def serve(name: str, address: str) -> None:
    """What each of the two processes does."""
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    async with AsyncLLM.connect(address) as engine:
        print(name, "began", time.monotonic(), flush=True)
        text = ""
        async for output in engine.generate(SERVICES[name], params):
            text = output.outputs[0].text
        print(name, "ended", time.monotonic(), flush=True)
        print(name, "says", repr(SERVICES[name] + text), flush=True)


def run_services(address: str) -> None:
    commands = [[sys.executable, __file__, "--service", name, "--connect", address] for name in SERVICES]
    services = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    lines = [line for service in services for line in service.communicate()[0].splitlines()]
    times = {tuple(line.split()[:2]): line.split()[2] for line in lines if " says " not in line}
    began = max(float(times[name, "began"]) for name in SERVICES)
    ended = min(float(times[name, "ended"]) for name in SERVICES)
    print("\n".join(line for line in lines if " says " in line))
    print("served at the same time:", began < ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    parser.add_argument("--connect", metavar="ADDRESS", help="use the engine that listens there")
    parser.add_argument("--service", choices=SERVICES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.service:
        asyncio.run(serve(args.service, args.connect))
    elif args.connect:
        run_services(args.connect)
    else:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=args.model, max_model_len=1024, max_num_seqs=16)
        )
        run_services(engine.address)
        engine.shutdown()


if __name__ == "__main__":
    main()
