"""Episodes in a terminal: prompt, turns token by token in the colour of their log-prob, what the environment said, the
reward part by part. A file gets the same as plain text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Console
from rich.style import Style
from rich.text import Text

from async_rl.buffer.failures import Failures, sentence
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.samples import pieces_of_contexts
from async_rl.trajectory import Trajectory
from async_rl.trajectory.parts import PREFIX, part_means, parts_in

WORST = -5.0
"""log-prob, nats, from which on a token has the colour of the most unlikely"""
COLOURS = ((0.0, (60, 170, 90)), (0.35, (200, 170, 40)), (1.0, (215, 60, 60)))
"""share of the way from certain to WORST -> colour"""
MOST_TOKENS = 1200
"""of an episode that are shown; of a longer one the first and the last ones"""
LEGEND = (0.0, -0.5, -1.0, -2.0, -3.5, WORST)


@dataclass(slots=True, kw_only=True)
class EpisodePrinter:
    """Prints episodes one below the other."""

    out: Console
    tokenizer: Tokenizer
    total: int
    """episodes there will be"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """task.reward_weights"""
    whole: bool = False
    """long episodes are not cut"""
    shown: int = 0

    def legend(self) -> None:
        """Print what the colours mean; nothing where the output has none."""
        if not self.out.is_terminal or self.out.no_color:
            return
        scale = [(f" {value:g} ", colour_of(value)) for value in LEGEND]
        self.print(Text.assemble("log-prob of a token when it was sampled: ", *scale))

    def print(self, text: Text) -> None:
        self.out.print(text, soft_wrap=True, highlight=False)

    def show(self, episodes: Sequence[Trajectory]) -> None:
        """Print these episodes."""
        for episode in episodes:
            self.shown += 1
            self.print(Text())
            self.print(self._head(episode))
            for line in self._body(episode):
                self.print(line)

    def _head(self, t: Trajectory) -> Text:
        took = t.finished_at - t.started_at
        place = f"episode {self.shown} of {self.total}  problem {t.problem} ({t.split})"
        if t.sample:
            place += f", sample {t.sample}"
        judged = ("FAILED", "bold red") if t.failed else (reward_told(t, self.weights), "bold green")
        size = f"{len(t.turns)} turn{'s' * (len(t.turns) != 1)}, {t.num_policy_tokens} tokens, {took:.1f} s"
        head = Text.assemble((place, "bold"), "  ", judged, f"  {t.ended}, {size}")
        if t.reason:
            head.append(f"\n{plain(t.reason)}", "red")
        notes = [f"{name} {_short(v)}" for name, v in t.info.items() if not name.startswith(PREFIX)]
        if notes:
            head.append(f"\nnotes: {plain(', '.join(notes))}", "dim")
        return head

    def _body(self, t: Trajectory) -> Iterator[Text]:
        """The episode's text, stretch by stretch."""
        n = len(t.tokens)
        texts = pieces_of_contexts(self.tokenizer, t)
        context_at = {0: "prompt", **{start: f"context {number}" for number, start in enumerate(t.contexts, start=2)}}
        turn_at = {turn.start: turn for turn in t.turns}
        ends = {turn.start + turn.length for turn in t.turns}
        cuts = sorted({0, n, *turn_at, *ends, *t.contexts})
        hidden = range(0) if self.whole or n <= MOST_TOKENS else range(2 * MOST_TOKENS // 3, n - MOST_TOKENS // 3)
        number = 0
        for begin, end in pairwise(cuts):
            turn = turn_at.get(begin)
            if turn is not None and turn.length:
                number += 1
                title = f"turn {number}{f' ({turn.agent})' * bool(turn.agent)}"
                if turn.reward:
                    title += f", turn reward {turn.reward:.3g}"
            else:
                title = context_at.get(begin, "environment")
            yield Text(title, "cyan")
            text = Text()
            for at in range(begin, end):
                if at in hidden:
                    if at == max(hidden.start, begin):
                        text.append(f"\n… {len(hidden)} tokens are not shown (--whole shows them) …\n", "dim")
                    continue
                style = colour_of(float(t.log_behaviour[at])) if turn is not None else Style(dim=True)
                text.append(plain(texts[at]), style)
            yield text

    def end(self, episodes: Sequence[Trajectory]) -> None:
        """Print the summary of all episodes."""
        self.print(Text())
        for line in conclusion(episodes, self.weights):
            self.print(Text(line))


def reward_told(t: Trajectory, weights: Mapping[str, float]) -> str:
    """`reward 1.25 (0.5 x format 0.5, correct 1)`."""
    told = f"reward {_short(t.reward)}"
    parts = parts_in(t.info)
    if not parts:
        return told
    summed = [f"{f'{weights[name]:g} x ' if name in weights else ''}{name} {_short(v)}" for name, v in parts.items()]
    return f"{told} ({', '.join(summed)})"


def conclusion(episodes: Sequence[Trajectory], weights: Mapping[str, float]) -> list[str]:
    """Sentences about all episodes."""
    judged = [t for t in episodes if not t.failed]
    rewards = [t.reward for t in judged]
    said = f"{len(episodes)} episodes"
    if rewards:
        low, high = min(rewards), max(rewards)
        spread = f"{_short(low)} to {_short(high)}" if low < high else "all equal" if len(rewards) > 1 else ""
        said += f": mean reward {sum(rewards) / len(rewards):.3g}{f' ({spread})' * bool(spread)}"
    lines = [said]
    if means := part_means(parts_in(t.info) for t in judged):
        lines.append("parts, unweighted: " + ", ".join(f"{name} {value:.3g}" for name, value in means.items()))
    ended = Counter(t.ended for t in judged)
    if ended:
        tokens = sum(t.num_policy_tokens for t in judged) / len(judged)
        how = ", ".join(f"{count} {name}" for name, count in ended.most_common())
        lines.append(f"ended: {how}; {tokens:.0f} tokens on average")
    failures = Failures()
    for t in episodes:
        if t.failed:
            failures.add(t.reason)
    if failures.counts:
        lines.append(f"failed: {sentence(failures.told())}")
    return lines


def colour_of(log_prob: float) -> Style:
    """From green (certain) to red (unlikely)."""
    share = min(1.0, max(0.0, log_prob / WORST))
    for (low, first), (high, last) in pairwise(COLOURS):
        if share <= high:
            between = (share - low) / (high - low)
            red, green, blue = (round(a + (b - a) * between) for a, b in zip(first, last, strict=True))
            return Style(color=f"rgb({red},{green},{blue})")
    raise AssertionError(share)


def plain(text: str) -> str:
    """`text` with its control characters as symbols, so that it cannot command a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else _symbol(c) for c in text)


def _symbol(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
