"""Tokenizer and chat template on the task's own prompts: there and back, and histories that only grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from async_rl.doctor.finding import Finding, error, ok, warning
from async_rl.model.tokenizer import Tokenizer, prompt_text
from async_rl.task.protocol import Segment, Task
from async_rl.trajectory import Split

MOST_PROMPTS = 64
MOST_EPISODES = 16
SHOWN = 40
SPLITS: tuple[Split, ...] = ("train", "eval")


def prompts_of(task: Task, tokenizer: Tokenizer) -> list[str]:
    """Some prompts of both splits as the model gets them."""
    found = []
    for split in SPLITS:
        problems = task.problems(split)
        for number in range(0, len(problems), max(1, -(-len(problems) // MOST_PROMPTS))):
            found.append(prompt_text(problems[number].prompt, tokenizer))
    return found


def episodes_of(task: Task) -> list[list[Segment]]:
    """Some demonstrations, where the task has any."""
    if not hasattr(task, "demonstration"):
        return []
    problems = task.problems("train")
    shown = range(min(MOST_EPISODES, len(problems)))
    return [task.demonstration(problems[number], Random(number)) for number in shown]


def judge_round_trip(texts: Sequence[str], tokenizer: Tokenizer) -> Finding:
    """decode(encode(text)) is the text, special tokens included."""
    check = "tokenizer"
    for text in texts:
        try:
            back = tokenizer.decode(tokenizer.encode(text), special=True)
        except ValueError as failure:
            return error(check, str(failure), "use a tokenizer that knows the task's characters, or another task")
        if back != text:
            differs = (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b)
            start = max(0, next(differs, min(len(text), len(back))) - SHOWN // 2)
            shown = slice(start, start + SHOWN)
            return warning(
                check,
                f"a prompt comes back changed: ...{text[shown]!r} as ...{back[shown]!r}",
                "what the model reads is not what the task wrote; use prompts the tokenizer keeps (white space and "
                "normalisation are the usual causes)",
            )
    return ok(check, f"{len(texts)} prompts and episodes come back as they were ({tokenizer.vocab_size} tokens)")


def judge_growth(episodes: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> Finding:
    """A history is appended to piece by piece and never tokenised again: the pieces' tokens must read as the whole."""
    check = "history"
    if not episodes:
        return ok(check, "the task shows no episodes; turns are appended as tokens, nothing is tokenised twice")
    for episode in episodes:
        tokens = [token for segment in episode for token in tokenizer.encode(segment.text)]
        whole = "".join(segment.text for segment in episode)
        back = tokenizer.decode(tokens, special=True)
        if back != whole:
            return warning(
                check, f"{whole[:SHOWN]!r} put together from its turns reads {back[:SHOWN]!r}",
                "the tokenizer adds or drops characters at the ends of a text (a leading space?); end and begin turns "
                "with characters it keeps",
            )  # fmt: skip
    return ok(check, f"{len(episodes)} episodes put together turn by turn read as the whole")


def judge_template(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Another turn must only append to the rendered chat."""
    check = "chat template"
    if not tokenizer.has_chat_template:
        yield ok(check, "none; prompts are used as they are written")
        return
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    more = [*chat, {"role": "assistant", "content": "It is 5."}, {"role": "user", "content": "And 4 + 4?"}]
    short = tokenizer.render(chat)
    if not tokenizer.render(more).startswith(short):
        yield warning(
            check, "it rewrites earlier messages when more follow (thinking that is taken out, a changed header)",
            "async_rl renders the first prompt only and appends tokens from there; a task that renders a whole chat "
            "anew for each turn would train on other tokens than were sampled",
        )  # fmt: skip
        return
    yield ok(check, "further messages only append to what was rendered")
