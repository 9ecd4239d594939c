"""An agent of any kind plays the episodes: it speaks to an OpenAI-compatible endpoint.

    pip install 'aiohttp>=3.10' openai
    python 07_agent_endpoint.py        # 60 steps, about two minutes on a laptop
    python 07_agent_endpoint.py 3      # a look at it

The agent asks for a sum with OpenAI's own client, and asks once more when the answer is wrong. It knows nothing of this
library: instead of it, any framework that takes a base URL and a key will do, in this process, in a thread or in a
program of its own. What it sends is matched to what was sampled; every turn is trained on as it was sampled.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import openai

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60


async def agent(client: openai.AsyncOpenAI, question: str, answer: str) -> float:
    """Asks at most twice. Returns 1 when the first answer is right, a half when the second one is."""
    messages = [{"role": "user", "content": question}]
    for credit in (1.0, 0.5):
        reply = await client.chat.completions.create(model="policy", messages=messages, max_tokens=4, stop=["."])
        said = reply.choices[0].message.content or ""
        if said == answer:
            return credit
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": question}]
    return 0.0


def sums(pairs: Iterable[tuple[int, int]]) -> list[ar.Problem]:
    return [ar.Problem(index=i, prompt=f"{a}+{b}=", data={"answer": a + b}) for i, (a, b) in enumerate(pairs)]


PAIRS = [(a, b) for a in range(10) for b in range(10)]
TRAIN = sums(pair for i, pair in enumerate(PAIRS) if i % 7)
HELD_OUT = sums(PAIRS[::7])


class Sums(ar.Task):
    """Sums of two numbers below 10."""

    name = "sums"

    def problems(self, split: str) -> Sequence[ar.Problem]:
        return TRAIN if split == "train" else HELD_OUT

    async def setup(self) -> None:
        """Once a process: all episodes share one client with its connections."""
        self.client = openai.AsyncOpenAI(base_url="http://127.0.0.1", api_key="of the episode")

    async def teardown(self) -> None:
        await self.client.close()

    async def rollout(self, problem: ar.Problem, session: ar.Session) -> float:
        reached = session.openai()
        client = self.client.with_options(base_url=reached.base_url, api_key=reached.api_key)
        return await agent(client, str(problem.prompt), str(problem.data["answer"]))

    alphabet = "0123456789+=.\n"

    def demonstration(self, problem: ar.Problem, random: Random) -> list[ar.Segment]:
        """For `ar.init_model`: a wrong answer now and then, and the question again behind it."""
        asked, right = str(problem.prompt), problem.data["answer"]
        said = [right] if random.random() < 0.8 else [right + random.choice((1, 2, 10)), right]
        told = [ar.Segment(text=asked, policy=False)]
        for number, answer in enumerate(said):
            if number:
                told.append(ar.Segment(text=f"\n{asked}", policy=False))
            told.append(ar.Segment(text=f"{answer}.", policy=True))
        return told


if __name__ == "__main__":
    if not Path("models/sums").exists():
        ar.init_model("models/sums", Sums, until=0.3, max_steps=20 * STEPS)
    run = ar.train(
        {"name": "agent", "model": {"path": "models/sums"}, "recipe": "grpo"},
        task=Sums,
        batch={"groups_per_step": 8, "group_size": 16},
        trainer={"steps": STEPS},
        optimizer={"learning_rate": 6e-4, "warmup_steps": 5, "schedule": "linear"},
        evaluation={"problems": 15, "samples": 8},
    )
    print(f"reward: {run.summary['reward_eval_first']:.2f} -> {run.summary['reward_eval_last']:.2f}")
