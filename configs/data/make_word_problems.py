"""Writes word_problems.jsonl: short arithmetic word problems with their answers.

    python configs/data/make_word_problems.py [FILE]

The same file every time. Each row: `prompt`, `answer` (a whole number), `kind` (the template), `steps`
(operations needed). The texts, names and numbers were made for this project; nothing is taken from another
data set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

SEED = 20
ROWS_PER_KIND = 20

NAMES = (
    "Ada", "Amir", "Anna", "Bao", "Boris", "Carla", "Chidi", "Dana", "Deniz", "Elif", "Emil", "Farid", "Femi",
    "Grace", "Hana", "Hugo", "Ines", "Ivan", "Jonas", "Kofi", "Lea", "Lin", "Maja", "Marco", "Mei", "Nadia",
    "Nils", "Noor", "Olga", "Omar", "Paula", "Pia", "Quinn", "Rafael", "Rosa", "Sami", "Sofia", "Tariq",
    "Uma", "Vera", "Yuki", "Zoe",
)  # fmt: skip
THINGS = (
    "apples",
    "marbles",
    "stickers",
    "postcards",
    "pencils",
    "shells",
    "buttons",
    "stamps",
    "walnuts",
    "beads",
    "plums",
    "cards",
)
BOXED = ("eggs", "tiles", "candles", "bottles", "cups", "tomatoes", "light bulbs", "batteries", "oranges", "screws")
GOODS = ("notebook", "ticket", "lamp", "scarf", "kite", "puzzle", "mug", "plant")
PLACES = ("library", "bakery", "museum", "school", "workshop", "garden centre", "post office")
VEHICLES = ("bus", "tram", "ferry", "train")


@dataclass(frozen=True, slots=True)
class Made:
    prompt: str
    answer: int
    steps: int


class Draw:
    """The random choices of one problem."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.one, self.other, self.third = random.sample(NAMES, 3)
        self.things = random.choice(THINGS)
        self.boxed = random.choice(BOXED)
        self.goods, self.more_goods = random.sample(GOODS, 2)
        self.place = random.choice(PLACES)
        self.vehicle = random.choice(VEHICLES)

    def n(self, low: int, high: int) -> int:
        return self.random.randint(low, high)


def gift(d: Draw) -> Made:
    has, given = d.n(12, 95), d.n(5, 60)
    return Made(
        f"{d.one} has {has} {d.things}. {d.other} gives {d.one} {given} more. "
        f"How many {d.things} does {d.one} have now?",
        has + given,
        1,
    )


def given_away(d: Draw) -> Made:
    has = d.n(40, 120)
    first, second = d.n(5, 18), d.n(5, 18)
    return Made(
        f"{d.one} had {has} {d.things}, gave {first} to {d.other} and lost {second}. How many {d.things} are left?",
        has - first - second,
        2,
    )


def boxes(d: Draw) -> Made:
    num, each = d.n(3, 15), d.n(4, 24)
    return Made(f"A crate holds {each} {d.boxed}. How many {d.boxed} are in {num} full crates?", num * each, 1)


def boxes_broken(d: Draw) -> Made:
    num, each, broken = d.n(3, 12), d.n(6, 20), d.n(2, 15)
    return Made(
        f"{num} boxes with {each} {d.boxed} each arrive at the {d.place}. {broken} of the {d.boxed} are broken. "
        f"How many {d.boxed} are not broken?",
        num * each - broken,
        2,
    )


def shared(d: Draw) -> Made:
    friends, each = d.n(3, 9), d.n(4, 25)
    return Made(
        f"{friends} friends share {friends * each} {d.things} equally. How many {d.things} does each of them get?",
        each,
        1,
    )


def shared_rest(d: Draw) -> Made:
    friends, each = d.n(3, 9), d.n(4, 15)
    rest = d.n(1, friends - 1)
    return Made(
        f"{d.one} shares {friends * each + rest} {d.things} equally among {friends} children, each getting as many as "
        "possible. How many are left over?",
        rest,
        2,
    )


def shopping(d: Draw) -> Made:
    num, price, more = d.n(2, 8), d.n(3, 19), d.n(5, 40)
    return Made(
        f"A {d.goods} costs {price} euros and a {d.more_goods} costs {more} euros. {d.one} buys {num} of the first and "
        "one of the second. How many euros does that cost?",
        num * price + more,
        2,
    )


def change(d: Draw) -> Made:
    num, price = d.n(2, 6), d.n(3, 16)
    paid = (num * price // 50 + 1) * 50
    return Made(
        f"{d.one} buys {num} tickets at {price} euros each and pays with {paid} euros. "
        "How many euros does the cashier give back?",
        paid - num * price,
        2,
    )


def saving(d: Draw) -> Made:
    start, weekly, weeks = d.n(5, 60), d.n(3, 15), d.n(3, 12)
    return Made(
        f"{d.one} has {start} euros and saves {weekly} euros every week. "
        f"How many euros does {d.one} have after {weeks} weeks?",
        start + weekly * weeks,
        2,
    )


def passengers(d: Draw) -> Made:
    start, off, on = d.n(25, 70), d.n(4, 20), d.n(4, 30)
    return Made(
        f"There are {start} people on a {d.vehicle}. At the next stop {off} get off and {on} get on. "
        f"How many people are on the {d.vehicle} then?",
        start - off + on,
        2,
    )


def distance(d: Draw) -> Made:
    speed, hours = d.n(12, 95), d.n(2, 9)
    return Made(
        f"A {d.vehicle} travels at {speed} kilometres an hour. How many kilometres does it travel in {hours} hours?",
        speed * hours,
        1,
    )


def older(d: Draw) -> Made:
    age, apart, later = d.n(6, 40), d.n(2, 25), d.n(2, 15)
    return Made(
        f"{d.one} is {age} years old and {d.other} is {apart} years older. How old will {d.other} be in {later} years?",
        age + apart + later,
        2,
    )


def times_as_many(d: Draw) -> Made:
    has, factor = d.n(6, 30), d.n(2, 6)
    times = "twice" if factor == 2 else f"{factor} times"
    return Made(
        f"{d.one} has {has} {d.things}. {d.other} has {times} as many. How many {d.things} do they have together?",
        has + factor * has,
        2,
    )


def seats(d: Draw) -> Made:
    rows, seats_each, taken = d.n(6, 20), d.n(8, 20), d.n(10, 45)
    return Made(
        f"A hall has {rows} rows of {seats_each} seats. {taken} seats are taken. How many seats are free?",
        rows * seats_each - taken,
        2,
    )


def area(d: Draw) -> Made:
    width = d.n(3, 25)
    length = width + d.n(2, 15)
    return Made(
        f"The yard of the {d.place} is a rectangle {length} metres long and {width} metres wide. "
        "How many square metres does it cover?",
        length * width,
        1,
    )


def fence(d: Draw) -> Made:
    width = d.n(5, 40)
    length = width + d.n(3, 20)
    return Made(
        f"{d.one} puts a fence around a rectangular field that is {length} metres long and {width} metres wide. "
        "How many metres of fence does that take?",
        2 * (length + width),
        2,
    )


def pages(d: Draw) -> Made:
    daily, days, rest = d.n(8, 40), d.n(3, 10), d.n(10, 120)
    return Made(
        f"{d.one} reads {daily} pages of a book every day. After {days} days {rest} pages remain. "
        "How many pages does the book have?",
        daily * days + rest,
        2,
    )


def baking(d: Draw) -> Made:
    trays, each, bags = d.n(3, 9), d.n(2, 8), d.n(2, 6)
    return Made(
        f"{d.one} bakes {trays} trays of {each * bags} rolls and packs all the rolls into bags of {bags}. "
        "How many bags does that fill?",
        trays * each,
        2,
    )


def wages(d: Draw) -> Made:
    hourly, hours, days, spent = d.n(11, 25), d.n(3, 8), d.n(2, 5), d.n(15, 60)
    return Made(
        f"{d.one} works at the {d.place} for {hours} hours a day and earns {hourly} euros an hour. After {days} days "
        f"{d.one} spends {spent} euros. How many euros are left?",
        hourly * hours * days - spent,
        3,
    )


def three_people(d: Draw) -> Made:
    first, more, fewer = d.n(20, 60), d.n(3, 20), d.n(3, 15)
    return Made(
        f"{d.one} collected {first} {d.things}. {d.other} collected {more} more than {d.one}, and {d.third} "
        f"{fewer} fewer than {d.one}. How many {d.things} did the three of them collect altogether?",
        3 * first + more - fewer,
        4,
    )


KINDS: tuple[Callable[[Draw], Made], ...] = (
    gift, given_away, boxes, boxes_broken, shared, shared_rest, shopping, change, saving, passengers, distance, older,
    times_as_many, seats, area, fence, pages, baking, wages, three_people,
)  # fmt: skip


def main(path: Path) -> None:
    random = Random(SEED)
    rows: list[dict[str, str | int]] = []
    for kind in KINDS:
        prompts: dict[str, Made] = {}
        while len(prompts) < ROWS_PER_KIND:
            made = kind(Draw(random))
            assert made.answer > 0
            prompts.setdefault(made.prompt, made)
        for made in prompts.values():
            rows.append({"prompt": made.prompt, "answer": str(made.answer), "kind": kind.__name__, "steps": made.steps})
    random.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).with_name("word_problems.jsonl")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
