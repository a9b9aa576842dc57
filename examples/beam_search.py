"""Search for the likeliest continuation as a whole, rather than token by token.

python examples/beam_search.py [--model MODEL]
"""

import argparse

from tercet import LLM, BeamSearchParams, SamplingParams

PROMPT = "The best thing about Paris is"
LENGTH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    args = parser.parse_args()

    with LLM(model=args.model, max_model_len=1024, max_num_seqs=16) as llm:
        params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
        greedy = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
        print(f"greedy {greedy.cumulative_logprob:.3f}: {PROMPT}{greedy.text!r}")
        search = BeamSearchParams(beam_width=4, max_tokens=LENGTH, ignore_eos=True)
        for beam in llm.beam_search(PROMPT, search)[0].sequences:
            print(f"beam {beam.cum_logprob:.3f}: {beam.text!r}")


if __name__ == "__main__":
    main()
