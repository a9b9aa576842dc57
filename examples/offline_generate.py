"""Complete several prompts at once, in a script.

    python examples/offline_generate.py [--model MODEL]

The prompts are computed together; outputs come in the order of the prompts.
"""

import argparse

from tercet import LLM, SamplingParams

PROMPTS = ["The capital of France is", "The opposite of hot is", "One, two, three, four,"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    args = parser.parse_args()

    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(model=args.model, max_model_len=1024, max_num_seqs=16) as llm:
        for output in llm.generate(PROMPTS, params):
            completion = output.outputs[0]
            print(f"{output.prompt!r} -> {completion.text!r} ({completion.finish_reason})")


if __name__ == "__main__":
    main()
