"""Writes products.jsonl: products of two numbers, each asked behind one example of how to call the calculator.

python configs/data/make_products.py [FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

SEED = 1
ROWS = 400
EXAMPLE = [
    {"role": "system", "content": "Use the calculator."},
    {"role": "user", "content": "What is 12 * 7?"},
    {"role": "assistant", "content": "<tool>12*7</tool><result>84</result>\n84"},
]


def main(path: Path) -> None:
    random = Random(SEED)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < ROWS:
        pairs[random.randint(12, 99), random.randint(12, 99)] = None
    rows = [
        {"prompt": [*EXAMPLE, {"role": "user", "content": f"What is {a} * {b}?"}], "answer": str(a * b)}
        for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).with_name("products.jsonl")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
