"""Greedy tokens of six architectures on a GPU, against transformers on the same random checkpoints.

    python -m benchmarks.gpu.check_models --out DIR

Small checkpoints are made by transformers (initializer_range 0.2, so that logit gaps are not noise) and served
by `LLM` in float32 and bfloat16, overlapped and plain, with a budget that cuts prompts into chunks and a pool
that forces preemption, with CUDA graphs and without. What a KV cache in fp8 does to prompts' log-probabilities
stands beside what bfloat16 alone does. The reference runs in float32 on the same device. A first difference is
explained where the reference's two best logits are closer than rounding: 1e-4 in float32, and in bfloat16 twice
the largest error that transformers' own bfloat16 run makes on the same tokens. `run.py` measures speed.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import environment
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
# name -> (dtype, engine arguments); of these models only, the others of all
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain loop, no graphs": ("float32", {"async_scheduling": False, "enforce_eager": True}),
    "overlapped, chunked, preempted": (
        "float32",
        {"max_num_batched_tokens": 40, "max_num_seqs": 32, "num_gpu_blocks_override": 40},
    ),
    "overlapped": ("bfloat16", {}),
    "batch-invariant": ("bfloat16", {"batch_invariant": True}),
}
ONLY = {"plain loop, no graphs": ("qwen3", "gemma3"), "batch-invariant": ("qwen3", "gemma3")}


@dataclass(frozen=True)
class Reference:
    """One sequence of the reference; per token the gap of the two best logits and bfloat16's largest error."""

    tokens: list[int]
    gaps: list[float]
    bf16_noise: list[float]


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
def reference(path: Path, given: list[list[int]]) -> list[Reference]:
    """Greedy tokens and top-2 gaps in float32, and what bfloat16 does to those logits in transformers itself."""
    import transformers as hf

    torch.backends.cuda.matmul.allow_tf32 = False
    exact = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda().eval()
    rounded = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda().eval()
    found = []
    for prompt in given:
        ids, cache = torch.tensor([prompt], device="cuda"), None
        tokens: list[int] = []
        rows = []
        for _ in range(NUM_OUTPUTS):
            output = exact(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1].float())
            ids = rows[-1].argmax()[None, None]
            tokens.append(int(ids))
        logits = torch.stack(rows)
        top = logits.topk(2).values
        again = rounded(input_ids=torch.tensor([prompt + tokens[:-1]], device="cuda")).logits[0].float()
        noise = (again[len(prompt) - 1 :] - logits).abs().amax(-1)
        found.append(Reference(tokens, (top[:, 0] - top[:, 1]).tolist(), noise.tolist()))
    return found


def compare(ours: list[list[int]], theirs: list[Reference], dtype: str) -> dict[str, Any]:
    """A first difference is explained if the gap is within twice the rounding seen up to there."""
    differences = []
    explained = 0
    for mine, case in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(mine, case.tokens, strict=True))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is not None:
            allowed = 2 * max(case.bf16_noise[: first + 1]) if dtype == "bfloat16" else 1e-4
            explained += case.gaps[first] <= allowed
            differences.append({"at": first, "gap": round(case.gaps[first], 5), "allowed": round(allowed, 5)})
    return {
        "sequences": len(ours),
        "equal": len(ours) - len(differences),
        "explained": explained,
        "unexplained": len(differences) - explained,
        "first_differences": differences,
    }


def start(path: Path, dtype: str, settings: dict[str, Any]) -> LLM:
    return LLM(
        model=str(path),
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=512,
        gpu_memory_utilization=0.3,
        audit=True,
        disable_log_stats=True,
        **{"max_num_seqs": 32, **settings},
    )


def generate(path: Path, given: list[list[int]], dtype: str, settings: dict[str, Any]) -> list[list[int]]:
    llm = start(path, dtype, settings)
    try:
        params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True, detokenize=False)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in given], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.shutdown()


def fp8_error(path: Path, given: list[list[int]]) -> dict[str, float]:
    """Mean and largest error of the prompts' log-probabilities against float32."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    runs: dict[str, list[float]] = {}
    for name, dtype, cache in (
        ("exact", "float32", "auto"),
        ("bf16", "bfloat16", "auto"),
        ("fp8", "bfloat16", "fp8"),
    ):
        llm = start(path, dtype, {"kv_cache_dtype": cache, "enable_prefix_caching": False})
        prompts = [TokensPrompt(prompt_token_ids=p) for p in given]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.shutdown()
        runs[name] = [
            place[token].logprob
            for output, prompt in zip(outputs, given, strict=True)
            for token, place in list(zip(prompt, output.prompt_logprobs or [], strict=True))[1:]
            if place
        ]
    exact = torch.tensor(runs["exact"])
    errors = {name: (torch.tensor(runs[name]) - exact).abs() for name in ("bf16", "fp8")}
    return {
        f"{name} {what}": round(float(value), 5)
        for name, error in errors.items()
        for what, value in (("mean", error.mean()), ("largest", error.max()))
    }


def check(out: dict[str, Any], save: Callable[[], None]) -> None:
    given = prompts()
    with tempfile.TemporaryDirectory() as folder:
        for name, path in checkpoints(Path(folder)).items():
            theirs = reference(path, given)
            torch.cuda.empty_cache()
            for label, (dtype, settings) in SETTINGS.items():
                if name not in ONLY.get(label, (name,)):
                    continue
                row = compare(generate(path, given, dtype, settings), theirs, dtype)
                out["models"].append({"model": name, "dtype": dtype, "setting": label, **row})
                print(name, dtype, label, {k: v for k, v in row.items() if isinstance(v, int)}, flush=True)
                save()
            if name == "qwen3":
                out["errors of prompt log-probabilities"] = fp8_error(path, given)
                print(out["errors of prompt log-probabilities"], flush=True)
                save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    args = parser.parse_args()
    out: dict[str, Any] = {"environment": environment.describe(args.commit), "models": []}

    def save() -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "check_models.json").write_text(json.dumps(out, indent=1) + "\n")

    check(out, save)


if __name__ == "__main__":
    main()
