"""Makes `smollm2_logprobs.json`: log-probabilities of the default model, by transformers in float32.

    python -m tests.e2e.reference.make_logprobs

For each case of `smollm2.json`: those of the prompt's own tokens (all of a short prompt, every eighth of a long
one) and, for the first outputs, the ids and log-probabilities of the most likely tokens. One pass over prompt and
outputs gives them all; weights, model and arithmetic are transformers' own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from tercet.model_source import resolve_model

NUM_OUTPUTS = 8
TOP = 5
SHORT = 128  # tokens of a prompt that is kept whole
FOLDER = Path(__file__).parent
OUT = FOLDER / "smollm2_logprobs.json"


@torch.inference_mode()
def scores(model: torch.nn.Module, prompt: list[int], outputs: list[int]) -> dict[str, Any]:
    logits_LV = model(input_ids=torch.tensor([prompt + outputs])).logits[0].float()
    logprobs_LV = logits_LV.log_softmax(-1)
    positions = list(range(1, len(prompt), 1 if len(prompt) <= SHORT else 8))
    first = len(prompt) - 1
    top = logprobs_LV[first : first + len(outputs)].topk(TOP)
    return {
        "positions": positions,
        "prompt_scores": [rounded(logprobs_LV[place - 1, prompt[place]]) for place in positions],
        "top_ids": top.indices.tolist(),
        "top": [[rounded(value) for value in row] for row in top.values],
    }


def rounded(value: torch.Tensor) -> float:
    return round(float(value), 5)


def main() -> None:
    from transformers import AutoModelForCausalLM

    path = Path(resolve_model(None).path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    reference = json.loads((FOLDER / "smollm2.json").read_text())
    assert sha256 == reference["weights_sha256"]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cases = [scores(model, case["prompt"], case["tokens"][:NUM_OUTPUTS]) for case in reference["cases"]]
    data = {
        "weights_sha256": sha256,
        "made_by": "python -m tests.e2e.reference.make_logprobs",
        "cases": cases,
    }
    OUT.write_text(json.dumps(data, separators=(",", ":")).replace('{"positions"', '\n{"positions"') + "\n")


if __name__ == "__main__":
    main()
