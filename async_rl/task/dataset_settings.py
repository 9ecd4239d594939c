"""What can be set of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from async_rl.config.schema import setting
from async_rl.task.presets import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """Example: `task: {name: dataset, args: {path: configs/data/word_problems.jsonl, reward: numeric}}`."""

    path: str = setting(
        "",
        "JSONL, JSON, CSV, TSV, Parquet or Arrow file, a folder of them, a pattern (data/train-*.parquet), or what "
        "`datasets` saved to disk; relative paths start at the working directory",
    )
    format: Format = setting(
        "plain", "a known form of rows, which stands for other settings; those that are given override it"
    )
    eval_path: str = setting(
        "", "the held-out problems; empty: the test or validation split of a `path` that has splits, else eval_share"
    )
    eval_share: float = setting(
        0.1, "share of `path` held out; the hash of a prompt decides, so more rows move none from split to split"
    )
    prompt_field: str = setting(
        "prompt",
        "field with the prompt: text, or chat messages (role, content, tool_calls and what else they have). Here as "
        "for other fields a.b.0 is a field within a field",
    )
    answer_field: str = setting(
        "answer",
        "field with the answer: text, a number, or a list of them, of which any counts; empty: the rows have none "
        "(reward of your own)",
    )
    answer_after: str = setting("", "the answer is what follows the last of these strings in it, e.g. '####'")
    answer_in_prompt: bool = setting(
        False, "the last message of the chat, the assistant's, is the answer and no part of the prompt"
    )
    messages: Literal["role_content", "from_value"] = setting(
        "role_content", "names of the two fields of a chat message: OpenAI's, or ShareGPT's"
    )
    as_chat: bool = setting(True, "make a text prompt the user's message of a chat; no: give it as it is")
    system: str = setting("", "system message put before every chat prompt that has none")
    system_field: str = setting("", "field with such a message of a row, which comes before `system`; empty: none")
    continue_assistant: bool = setting(
        False, "a chat that ends with a message of the assistant is gone on with; no: a new turn begins behind it"
    )
    tools_field: str = setting("tools", "field with the tools that the chat template describes, where a row has one")
    template_args: dict[str, Any] = setting({}, "further arguments of the chat template, e.g. {enable_thinking: false}")
    template_args_field: str = setting(
        "chat_template_kwargs", "field with such arguments of a row, which come before `template_args`"
    )
    reward: str = setting(
        "exact", "exact, numeric, math, or module:function or file.py:function; none: the group reward alone decides"
    )
    group_reward: str = setting(
        "", "module:function or file.py:function that sees all samples of a problem; added to `reward`; empty: none"
    )
    note_fields: list[str] = setting(
        [],
        "fields with a number of each row that recipes read by name, e.g. [v_star] as `async-rl values` writes it "
        "(recipe a_star_po); a row without one is noted without it",
    )
    max_tokens: int = setting(512, "longest answer", unit="tokens")
    stop: list[str] = setting([], "strings that end the answer, beside the tokenizer's end of text")
    duplicates: Literal["keep_first", "keep_all", "error"] = setting(
        "keep_first", "what to do with a prompt that occurs twice; one in both splits is never trained on"
    )
    bad_rows: Literal["refuse", "drop"] = setting(
        "refuse", "what to do with rows that cannot be used: refuse the data, all of them counted, or leave them out"
    )
    overlong: Literal["refuse", "drop", "truncate_left"] = setting(
        "refuse",
        "what to do with prompts behind which the context has no room for an answer of max_tokens: refuse the data, "
        "leave them out, or take away the beginning of their longest message",
    )
    overlong_rows: str = setting(
        "", "which prompts `overlong` is about, as the run found when it began (it writes this itself)"
    )
