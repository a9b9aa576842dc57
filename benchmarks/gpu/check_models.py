"""Greedy tokens of six architectures on a GPU, against transformers on the same random checkpoints.

    PYTHONPATH=. python benchmarks/gpu/check_models.py --out DIR

Small checkpoints are made by transformers (initializer_range 0.2, so that logit gaps are not noise) and served
by `LLM` in float32 and bfloat16, overlapped and plain, with a budget that cuts prompts into chunks and a pool
that forces preemption. The reference runs in float32 on the same device. Per run: how many of the sequences are
equal, and for the others the reference's gap between its two best logits where they first differ.
Then decode speed of two shapes with random weights, for orientation only: no graphs, no tuned kernels yet.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tercet import LLM, SamplingParams, TokensPrompt

VOCAB = 512
NUM_PROMPTS = 24
NUM_OUTPUTS = 48
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "plain": {"async_scheduling": False},
    "chunked": {"max_num_batched_tokens": 40, "max_num_seqs": 32},
    "preempted": {"num_gpu_blocks_override": 40},
}


def checkpoints(root: Path) -> dict[str, Path]:
    """Random checkpoints by name."""
    import transformers as hf

    torch.manual_seed(0)
    configs = {
        "llama": hf.LlamaConfig(**BASE),
        "mistral": hf.MistralConfig(**BASE, sliding_window=40),
        "qwen2": hf.Qwen2Config(**BASE),
        "qwen3": hf.Qwen3Config(**BASE, head_dim=16),
        "gemma3": hf.Gemma3TextConfig(**BASE, head_dim=16, sliding_window=40, query_pre_attn_scalar=16),
        "phi3": hf.Phi3Config(**BASE),
    }
    paths = {}
    for name, config in configs.items():
        paths[name] = root / name
        hf.AutoModelForCausalLM.from_config(config).float().save_pretrained(paths[name])
    return paths


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 150))] for _ in range(NUM_PROMPTS)]


@torch.inference_mode()
def reference(path: Path, given: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and top-2 logit gaps in float32."""
    import transformers as hf

    torch.backends.cuda.matmul.allow_tf32 = False
    model = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda().eval()
    found = []
    for prompt in given:
        ids, cache, tokens, gaps = torch.tensor([prompt], device="cuda"), None, [], []
        for _ in range(NUM_OUTPUTS):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            top = output.logits[0, -1].float().topk(2)
            tokens.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
            ids = top.indices[:1][None]
        found.append((tokens, gaps))
    return found


def compare(ours: list[list[int]], theirs: list[tuple[list[int], list[float]]]) -> dict[str, Any]:
    gaps = []
    for mine, (tokens, top2) in zip(ours, theirs, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(mine, tokens, strict=True)) if a != b), None)
        if first is not None:
            gaps.append(round(top2[first], 5))
    return {"sequences": len(ours), "equal": len(ours) - len(gaps), "gaps_at_first_difference": sorted(gaps)}


def generate(path: Path, given: list[list[int]], dtype: str, settings: dict[str, Any]) -> list[list[int]]:
    llm = LLM(
        model=str(path),
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=512,
        gpu_memory_utilization=0.3,
        audit=True,
        **settings,
    )
    try:
        params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True, detokenize=False)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in given], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.shutdown()


def check(out: dict[str, Any]) -> None:
    given = prompts()
    with tempfile.TemporaryDirectory() as folder:
        for name, path in checkpoints(Path(folder)).items():
            theirs = reference(path, given)
            torch.cuda.empty_cache()
            for label, settings in SETTINGS.items():
                for dtype in ("float32", "bfloat16") if label == "overlapped" else ("float32",):
                    row = compare(generate(path, given, dtype, settings), theirs)
                    out["models"].append({"model": name, "dtype": dtype, "setting": label, **row})
                    print(json.dumps(out["models"][-1]), flush=True)


def speed(out: dict[str, Any]) -> None:
    """Decode of Qwen3-0.6B's shape with random weights, as it is now."""
    import transformers as hf

    config = hf.Qwen3Config(
        vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, tie_word_embeddings=True, max_position_embeddings=8192,
        architectures=["Qwen3ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        started = time.perf_counter()
        llm = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=256)
        out["speed"].append({"what": "start to ready, s", "value": round(time.perf_counter() - started, 1)})
        rng = random.Random(0)
        for batch in (1, 64, 256):
            given = [
                TokensPrompt(prompt_token_ids=[rng.randrange(10000) for _ in range(128)])
                for _ in range(batch)
            ]
            params = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True, detokenize=False)
            llm.generate(given, params, use_tqdm=False)  # warm-up
            started = time.perf_counter()
            llm.generate(given, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            row = {"what": f"{batch} x 128/256 greedy", "ms per step": round(seconds / 256 * 1e3, 2)}
            out["speed"].append({**row, "output tok/s": round(batch * 256 / seconds)})
            print(json.dumps(out["speed"][-1]), flush=True)
        llm.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "models": [],
        "speed": [],
    }
    try:
        check(out)
        speed(out)
    finally:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "check_models.json").write_text(json.dumps(out, indent=1) + "\n")
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
