"""End an answer at a text of one's choice.

    python examples/stop_strings.py [--model MODEL]

A stop string is found wherever it falls, across token edges too, and no part of it is shown before it is
known whether the whole will come.
"""

import argparse

from tercet import LLM, SamplingParams

PROMPT = "One, two, three, four,"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    args = parser.parse_args()

    variants = {
        "no stop": SamplingParams(temperature=0, max_tokens=16),
        "stop": SamplingParams(temperature=0, max_tokens=16, stop=["seven", "\n\n"]),
        "stop, included": SamplingParams(
            temperature=0, max_tokens=16, stop="seven", include_stop_str_in_output=True
        ),
    }
    with LLM(model=args.model, max_model_len=1024, max_num_seqs=16) as llm:
        outputs = llm.generate([PROMPT] * len(variants), list(variants.values()), use_tqdm=False)
    for name, output in zip(variants, outputs, strict=True):
        completion = output.outputs[0]
        reason = f"{completion.finish_reason}, {completion.stop_reason!r}"
        print(f"{name} ({reason}): {completion.text!r}")


if __name__ == "__main__":
    main()
