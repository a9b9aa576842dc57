"""Batch-invariant mode on a GPU: the same bits alone, in a batch, in chunks, from the cache and after preemption.

    python -m benchmarks.gpu.check_invariance --out DIR

Tokens and log-probabilities of every request are compared as bits with those of the request run alone. What the mode
costs, and whether the same requests differ without it, is printed beside.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import environment
from benchmarks.gpu.shapes import SHAPES
from tercet import LLM, SamplingParams, TokensPrompt

NUM_REQUESTS, NUM_OUTPUTS = 48, 40
Row = tuple[tuple[int, ...], tuple[float, ...]]
# A request needs up to 34 blocks: with 200 of them a few run at a time, and some are preempted.
TIGHT = {"max_num_batched_tokens": 96, "max_num_seqs": 24, "num_gpu_blocks_override": 200}


def requests() -> tuple[list[TokensPrompt], list[SamplingParams]]:
    """Prompts of 1 to 500 tokens, half of them sampled."""
    rng = random.Random(0)
    prompts, params = [], []
    for i in range(NUM_REQUESTS):
        ids = [rng.randrange(10_000) for _ in range(rng.choice((1, 17, 64, 130, 250, 500)))]
        prompts.append(TokensPrompt(prompt_token_ids=ids))
        params.append(
            SamplingParams(
                temperature=float(i % 2),
                seed=i,
                max_tokens=NUM_OUTPUTS,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
        )
    return prompts, params


def run(llm: LLM, prompts: list[TokensPrompt], params: list[SamplingParams]) -> list[Row]:
    """Tokens and the log-probability of each."""
    rows = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        tokens = tuple(output.outputs[0].token_ids)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        rows.append(
            (tokens, tuple(place[token].logprob for token, place in zip(tokens, logprobs, strict=True)))
        )
    return rows


def check(folder: str, *, batch_invariant: bool) -> dict[str, Any]:
    """How many requests have the bits that they have alone, for each way of running them."""
    prompts, params = requests()
    common: dict[str, Any] = {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True}
    common |= {"max_model_len": 1024, "batch_invariant": batch_invariant, "disable_log_stats": True}
    found: dict[str, Any] = {"batch_invariant": batch_invariant}
    llm = LLM(**common, enable_prefix_caching=False, gpu_memory_utilization=0.4)
    alone = [run(llm, [prompt], [param])[0] for prompt, param in zip(prompts, params, strict=True)]
    begin = time.perf_counter()
    ways = {"all at once": run(llm, prompts, params)}
    found["all at once, s"] = round(time.perf_counter() - begin, 3)
    llm.shutdown()
    llm = LLM(**common, **TIGHT)
    ways["small chunks, few blocks"] = run(llm, prompts, params)
    ways["again, from the cache"] = run(llm, prompts[:8], params[:8])
    llm.shutdown()
    for way, rows in ways.items():
        equal = sum(row == expected for row, expected in zip(rows, alone, strict=False))
        found[way] = f"{equal} of {len(rows)}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="store_true", help="leave out the run without the mode")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    args = parser.parse_args()
    out: dict[str, Any] = {"environment": environment.describe(args.commit), "shape": "A", "results": []}
    with tempfile.TemporaryDirectory() as folder:
        path = SHAPES["A"].write(Path(folder))
        for batch_invariant in (True,) if args.only else (True, False):
            out["results"].append(check(str(path), batch_invariant=batch_invariant))
            print(out["results"][-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "check_invariance.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
