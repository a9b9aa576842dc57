"""Several answers to one prompt, repeatable by their seed.

    python examples/parallel_sampling.py [--model MODEL]

`n` completions share the prompt, which is computed once. Noise depends on the seed and the position in the
answer alone, so the same seed gives the same answers whatever else the engine is doing.
"""

import argparse

from tercet import LLM, SamplingParams

PROMPT = "My favourite animal is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    args = parser.parse_args()

    with LLM(model=args.model, max_model_len=1024, max_num_seqs=16) as llm:

        def sample(seed: int) -> list[str]:
            params = SamplingParams(n=3, seed=seed, temperature=1.0, top_p=0.95, max_tokens=12)
            # Beside it runs a neighbour that must make no difference.
            output, _ = llm.generate([PROMPT, "Hello"], [params, SamplingParams()], use_tqdm=False)
            return [completion.text for completion in output.outputs]

        first = sample(seed=7)
        for index, text in enumerate(first):
            print(f"{index}: {PROMPT}{text!r}")
        print("all different:", len(set(first)) == 3)
        print("same seed, same answers:", sample(seed=7) == first)
        print("other seed, other answers:", sample(seed=8) != first)


if __name__ == "__main__":
    main()
