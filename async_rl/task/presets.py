"""Known forms of data sets: `task.args.format` stands for the settings below, which explicit ones override."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Format = Literal["plain", "verl", "dapo", "gsm8k", "openai", "sharegpt"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    # what verl's examples/data_preprocess write; `compute_score` gets data_source and extra_info of the row
    "verl": {"prompt_field": "prompt", "answer_field": "reward_model.ground_truth", "reward": "math"},
    # the Parquet of DAPO-Math-17k: verl's form, whole-number answers, every prompt a hundred times over
    "dapo": {"prompt_field": "prompt", "answer_field": "reward_model.ground_truth", "reward": "numeric"},
    # a worked solution whose last line is `#### 72`
    "gsm8k": {"prompt_field": "question", "answer_field": "answer", "answer_after": "####", "reward": "numeric"},
    # fine-tuning files: the assistant's last message is the answer
    "openai": {"prompt_field": "messages", "answer_field": "", "answer_in_prompt": True},
    "sharegpt": {
        "prompt_field": "conversations",
        "answer_field": "",
        "answer_in_prompt": True,
        "messages": "from_value",
        "system_field": "system",
    },
}


def with_preset(args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` laid over what their `format` stands for. An `answer_field` of one's own leaves the chat whole."""
    chosen = PRESETS.get(args["format"], {}) if isinstance(args.get("format"), str) else {}
    found = {**chosen, **args}
    if chosen.get("answer_in_prompt") and args.get("answer_field") and "answer_in_prompt" not in args:
        found["answer_in_prompt"] = False
    return found
