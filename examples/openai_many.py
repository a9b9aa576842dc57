"""Many requests at once with the asynchronous `openai` client: the server batches them.

tercet serve MODEL --port 8000
python examples/openai_many.py --url http://127.0.0.1:8000/v1
"""

import argparse
import asyncio
import time

from openai import AsyncOpenAI

COUNTRIES = ("France", "Italy", "Spain", "Japan", "Egypt", "Norway", "Greece", "Peru")


async def capital(client: AsyncOpenAI, model: str, country: str) -> str:
    answer = await client.completions.create(
        model=model, prompt=f"The capital of {country} is", temperature=0, max_tokens=4
    )
    return answer.choices[0].text


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL of the server")
    args = parser.parse_args()
    async with AsyncOpenAI(base_url=args.url, api_key="none is asked for") as client:
        model = (await client.models.list()).data[0].id
        started_s = time.perf_counter()
        for country in COUNTRIES:
            await capital(client, model, country)
        alone_s = time.perf_counter() - started_s

        started_s = time.perf_counter()
        answers = await asyncio.gather(*(capital(client, model, country) for country in COUNTRIES))
        together_s = time.perf_counter() - started_s
    for country, answer in zip(COUNTRIES, answers, strict=True):
        print(f"{country}:{answer!r}")
    print(f"one by one {alone_s:.2f} s, together {together_s:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
