r"""Problems whose answer stands in the \boxed{} of a worked solution (MATH and its like), as the task `dataset` reads
them.

    python configs/data/boxed_answers.py FILE_OR_FOLDER ... OUT.jsonl

Reads JSONL and Parquet files (folders are searched for them) with the fields `problem` and `solution`, writes one
JSON line a problem: `prompt`, `answer` (what the last \boxed{} holds). Rows without one are left out and counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOXES = ("\\boxed{", "\\fbox{")


def boxed(solution: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces matched; None when there is none."""
    start = max((solution.rfind(box) + len(box) for box in BOXES if box in solution), default=-1)
    if start < 0:
        return None
    depth = 1
    for position in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[position], 0)
        if depth == 0:
            return solution[start:position].strip() or None
    return None


def files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet"))
    if not found:
        sys.exit(f"{path}: no .jsonl or .parquet file there")
    return found


def rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet  # pip install pyarrow

        yield from parquet.read_table(path).to_pylist()
        return
    with path.open() as lines:
        yield from map(json.loads, lines)


def main(words: list[str]) -> None:
    if len(words) < 2:
        sys.exit(__doc__)
    *sources, out = map(Path, words)
    written = without = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for row in (row for source in sources for path in files(source) for row in rows(path)):
            answer = boxed(row["solution"])
            without += answer is None
            if answer is not None:
                file.write(json.dumps({"prompt": row["problem"], "answer": answer}, ensure_ascii=False) + "\n")
                written += 1
    print(f"{out}: {written} problems; {without} without a boxed answer left out")


if __name__ == "__main__":
    main(sys.argv[1:])
