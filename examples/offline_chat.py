"""Hold a conversation of two turns, in a script.

    python examples/offline_chat.py [--model MODEL]

The model's chat template turns the messages into a prompt. The second turn finds the first one in the prefix
cache, so only what is new is computed.
"""

import argparse

from tercet import LLM, SamplingParams

QUESTIONS = ["What is the capital of France?", "And of Italy?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or hub id (default: the default model)")
    args = parser.parse_args()

    params = SamplingParams(temperature=0, max_tokens=32)
    messages = [{"role": "system", "content": "You answer in one short sentence."}]
    with LLM(model=args.model, max_model_len=1024, max_num_seqs=16) as llm:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            output = llm.chat(messages, params, use_tqdm=False)[0]
            answer = output.outputs[0].text
            messages.append({"role": "assistant", "content": answer})
            print(f"user: {question}\nassistant: {answer}")
            print(f"({output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were cached)")


if __name__ == "__main__":
    main()
