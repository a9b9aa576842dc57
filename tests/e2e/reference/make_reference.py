"""Makes `smollm2.json`: greedy tokens of the default model for real prompts, by transformers in float32.

    python -m tests.e2e.reference.make_reference

The weights are read by transformers' own GGUF loader, the model is its own, the prompts' token ids are stored:
nothing of Tercet takes part but its tokenizer, whose ids are input here. For each output token the gap between
the two highest logits is kept: where it is below the rounding of float32, either choice is right.
Texts: written for this file, and the Apache License 2.0 that the project ships.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch

from tercet.frontend.tokenizer import Tokenizer, load_bundle
from tercet.model_source import resolve_model

NUM_OUTPUTS = 32
OUT = Path(__file__).parent / "smollm2.json"
LICENSE = Path(__file__).parents[3] / "LICENSE"

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Explain photosynthesis to a child in two sentences.",
    "What is 17 plus 25?",
    "Write a haiku about the sea.",
    "Who wrote the Divine Comedy?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "List the days of the week.",
    "What does a scheduler in an operating system do?",
    "Give me a recipe for pancakes.",
    "How many legs does a spider have?",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that reverses a string.",
    "Summarise the plot of Romeo and Juliet.",
    "What is the boiling point of water at sea level?",
]
TEXTS = [
    "Hello",
    "The",
    "1",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "In 1969, Apollo 11 landed on the Moon. The first person to walk on it was",
    'import numpy as np\n\ndef softmax(x):\n    """Numerically stable softmax."""\n',
    "| city | country |\n|---|---|\n| Paris | France |\n| Rome |",
    "Der schnelle braune Fuchs springt über den faulen Hund. Am nächsten Tag",
    "El perro corre por el parque y",
    "Здравствуйте! Как",
    "今日は良い天気ですね。",
    "🙂 Emoji are fun 🎉 and so",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "A tercet is a stanza of three lines. In terza rima, the middle line of one tercet rhymes with",
    "Dear Sir or Madam,\n\nI am writing to apply for the position of",
    "SELECT name, age FROM people WHERE",
    "<html>\n<head><title>Example</title></head>\n<body>\n",
    "Q: What is the largest planet?\nA: Jupiter.\nQ: What is the smallest planet?\nA:",
]
LICENSE_LENGTHS = [17, 31, 32, 33, 48, 64, 65, 96, 127, 128, 129, 160, 200, 255, 256, 257, 300, 350, 400, 450]
LICENSE_LENGTHS += [512, 600, 700, 800, 900, 1000, 1200, 1500]


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """64 prompts of 1 to 1,500 tokens."""
    found = [
        list(tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True))
        for q in QUESTIONS
    ]
    found += [tokenizer.encode(text) for text in TEXTS]
    license_ids = tokenizer.encode(LICENSE.read_text())
    found += [license_ids[7 * i : 7 * i + length] for i, length in enumerate(LICENSE_LENGTHS)]
    return found


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and top-2 logit gaps."""
    ids, cache = torch.tensor([prompt]), None
    tokens: list[int] = []
    gaps: list[float] = []
    for _ in range(NUM_OUTPUTS):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        top = output.logits[0, -1].float().topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(round(float(top.values[0] - top.values[1]), 6))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, gaps


def main() -> None:
    from transformers import AutoModelForCausalLM

    path = Path(resolve_model(None).path)
    tokenizer = Tokenizer(load_bundle(path))
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cases = []
    for i, prompt in enumerate(prompts(tokenizer)):
        started = time.perf_counter()
        tokens, gaps = greedy(model, prompt)
        cases.append({"prompt": prompt, "tokens": tokens, "gaps": gaps})
        print(f"{i + 1}: {len(prompt)} tokens, {time.perf_counter() - started:.1f} s")
    data = {
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "made_by": "python -m tests.e2e.reference.make_reference",
        "cases": cases,
    }
    OUT.write_text(json.dumps(data, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"') + "\n")


if __name__ == "__main__":
    main()
