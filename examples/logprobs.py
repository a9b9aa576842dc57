"""How sure the model is: log-probabilities of what it says, and of what it is given.

python examples/logprobs.py [--model MODEL]
"""

import argparse
import math

from tercet import LLM, RequestOutput, SamplingParams

SENTENCES = ["The capital of France is Paris.", "The France of is capital Paris."]


def perplexity(output: RequestOutput) -> float:
    """exp of the mean negative log-probability of the prompt's tokens, the first of which has none."""
    assert output.prompt_logprobs is not None
    entries = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    values = [entry[token].logprob for token, entry in entries if entry is not None]
    return math.exp(-sum(values) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    args = parser.parse_args()

    with LLM(model=args.model, max_model_len=1024, max_num_seqs=16) as llm:
        params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
        completion = llm.generate("The capital of France is", params, use_tqdm=False)[0].outputs[0]
        assert completion.logprobs is not None
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            others = (
                f"{other.decoded_token!r} {math.exp(other.logprob):.1%}"
                for other_id, other in entry.items()
                if other_id != token
            )
            chosen = entry[token]
            print(
                f"{chosen.decoded_token!r} {math.exp(chosen.logprob):.1%} rank {chosen.rank};",
                ", ".join(others),
            )
        scored = llm.generate(SENTENCES, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        for sentence, output in zip(SENTENCES, scored, strict=True):
            print(f"perplexity {perplexity(output):.1f}: {sentence}")


if __name__ == "__main__":
    main()
