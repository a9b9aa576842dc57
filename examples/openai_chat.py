"""Ask a server with the `openai` client: one answer, a stream of another, and what an error looks like.

tercet serve MODEL --port 8000
python examples/openai_chat.py --url http://127.0.0.1:8000/v1
"""

import argparse

from openai import BadRequestError, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL of the server")
    args = parser.parse_args()
    with OpenAI(base_url=args.url, api_key="none is asked for") as client:
        model = client.models.list().data[0].id

        question = "What is the capital of France? Answer in one word."
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=8
        )
        print(f"answer: {answer.choices[0].message.content!r} ({answer.choices[0].finish_reason})")

        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Count from one to five."}],
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces = []
        for chunk in stream:
            pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            if chunk.usage is not None:
                print(f"stream: {len(pieces)} pieces, {chunk.usage.completion_tokens} tokens")

        try:
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hi"}], temperature=9
            )
        except BadRequestError as error:
            print(f"refused: {error.param}")


if __name__ == "__main__":
    main()
