"""Urgent requests first: the priority policy.

    python examples/priorities.py

Who runs when does not depend on the model, so this runs on the simulated worker. It takes one request at a
time; while a first one runs, others queue up, and the one with the lowest number goes next.
"""

import asyncio

from tercet import AsyncEngineArgs, AsyncLLM, SamplingParams, TokensPrompt
from tercet.config import SimulationConfig

ARRIVALS = {"report": 5, "backup": 9, "alarm": 0, "chat": 1, "alarm 2": 0}


async def main() -> None:
    engine_args = AsyncEngineArgs(
        device="simulated",
        simulation=SimulationConfig(step_us=5000),  # a step takes 5 ms
        scheduling_policy="priority",
        max_num_seqs=1,
        max_model_len=256,
    )
    finished = []

    async def request(engine: AsyncLLM, name: str, priority: int, max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        prompt = TokensPrompt(prompt_token_ids=[1, 2, 3])
        async for _ in engine.generate(prompt, params, request_id=name, priority=priority):
            pass
        finished.append(name)

    async with await asyncio.to_thread(AsyncLLM.from_engine_args, engine_args) as engine:
        first = asyncio.create_task(request(engine, "first", -1, max_tokens=100))
        await asyncio.sleep(0.1)  # it runs
        await asyncio.gather(*(request(engine, name, n, 5) for name, n in ARRIVALS.items()), first)
    print("arrived: ", ", ".join(["first", *ARRIVALS]))
    print("finished:", ", ".join(finished))


if __name__ == "__main__":
    asyncio.run(main())
