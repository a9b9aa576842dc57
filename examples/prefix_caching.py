"""Many questions about one text: the text is computed once.

    python examples/prefix_caching.py [--model MODEL]

Cached blocks are found by the tokens they hold, and by the salt: requests with different salts share nothing,
so that one tenant cannot learn from timing what another has asked.
"""

import argparse

from tercet import LLM, SamplingParams, TextPrompt

TEXT = "Lisbon, Madrid, Paris, Rome, Vienna, Warsaw and Athens are capitals of countries in Europe. " * 8
QUESTIONS = ["Paris is the capital of", "Rome is the capital of"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    args = parser.parse_args()

    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(model=args.model, max_model_len=1024, max_num_seqs=16) as llm:

        def ask(title: str, prompt: TextPrompt) -> None:
            output = llm.generate(prompt, params, use_tqdm=False)[0]
            seconds = output.metrics.first_token_latency if output.metrics else 0.0
            share = f"{output.num_cached_tokens} of {len(output.prompt_token_ids)}"
            print(f"{title}: {share} cached, TTFT {seconds:.2f} s: {output.outputs[0].text!r}")

        ask("first", {"prompt": TEXT + QUESTIONS[0]})
        ask("second", {"prompt": TEXT + QUESTIONS[1]})
        ask("salted", {"prompt": TEXT + QUESTIONS[1], "cache_salt": "another tenant"})
        llm.reset_prefix_cache()
        ask("reset", {"prompt": TEXT + QUESTIONS[1]})


if __name__ == "__main__":
    main()
