"""Capacity planning: how many requests at a time fit a latency, without a model or a GPU.

    python examples/simulated_engine.py [--step-us 2000] [--token-us 20]

The engine is the real one; only the worker is simulated. It takes step_us + token_us × tokens for a step:
measure both on your hardware once, and try limits, prompts and arrival patterns here.
"""

import argparse
import statistics
import time

from tercet import LLM, SamplingParams, TokensPrompt
from tercet.config import SimulationConfig

NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64, 16


def measure(max_num_seqs: int, simulation: SimulationConfig) -> tuple[float, float]:
    """Output tokens per second, and median seconds from arrival to end, of a burst of requests."""
    prompts = [
        TokensPrompt(prompt_token_ids=[1 + index, *range(1, PROMPT_TOKENS)]) for index in range(NUM_REQUESTS)
    ]
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    with LLM(device="simulated", simulation=simulation, max_num_seqs=max_num_seqs, max_model_len=1024) as llm:
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
    latencies = [output.metrics.e2e_latency for output in outputs if output.metrics is not None]
    return NUM_REQUESTS * OUTPUT_TOKENS / seconds, statistics.median(latencies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-us", type=float, default=2000, help="fixed cost of a step, microseconds")
    parser.add_argument("--token-us", type=float, default=20, help="cost of a token, microseconds")
    args = parser.parse_args()
    simulation = SimulationConfig(step_us=args.step_us, token_us=args.token_us)
    print("at a time  output tok/s  median latency")
    for max_num_seqs in (1, 4, 16):
        rate, latency = measure(max_num_seqs, simulation)
        print(f"{max_num_seqs:9}  {rate:12.0f}  {latency:12.2f} s")


if __name__ == "__main__":
    main()
