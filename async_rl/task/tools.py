"""The user's own prompts, answered in several turns with tools between them, called in the model's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from async_rl.config.schema import setting
from async_rl.errors import UserError
from async_rl.task.dataset import Dataset, DatasetSettings
from async_rl.task.generated import require_range, stable_hash
from async_rl.task.protocol import Problem, Reward, Sample, Session
from async_rl.task.tool_formats import FORMATS, ToolCall, ToolFormat, call_id, detect
from async_rl.task.tool_functions import MOST_RESULT, ToolFunction, load_tools

TAGS = "tags"
CALL_OPEN, CALL_CLOSE = "<tool>", "</tool>"
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>\n"
CALL = re.compile(f"{CALL_OPEN}((?:(?!{CALL_OPEN}).)*?){CALL_CLOSE}", re.DOTALL)
SYSTEM = (
    "Think step by step. To compute something, write an arithmetic expression as <tool>(12 + 7) * 35</tool>; its value "
    "then follows as <result>665</result>. Use the tool as often as you need, then end with the answer alone on the "
    "last line."
)
UNNAMED = "unknown"
"""the tool that answers a call whose name cannot be read"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolsSettings(DatasetSettings):
    """Example: `task: {name: tools, args: {path: math.jsonl, reward: math, tool: calculator, max_turns: 6}}`."""

    system: str = setting(
        SYSTEM,
        "system message put before every chat prompt that has none; says how to call. As it stands here it is for "
        "tool_format=tags and left out for others, which describe the tools themselves",
    )
    max_tokens: int = setting(512, "longest turn", unit="tokens")
    max_turns: int = setting(6, "calls and the answer together", unit="turns")
    tool: Any = setting(
        "calculator",
        "calculator, or module:function or file.py:function, or a list of these; what the model is told of a function "
        "are its parameters, their types and its docstring (a parameter named `problem` is given the problem)",
    )
    tool_format: Literal["auto", "tags", "hermes", "qwen_xml", "llama", "mistral", "deepseek", "harmony"] = setting(
        "auto",
        "how calls are written: as the model's chat template teaches it (auto; where it teaches nothing, tags for one "
        "tool that takes a text, else hermes), or <tool>...</tool> with the call as text (tags), or one of the formats "
        "that models are trained on",
    )
    call_reward: float = setting(
        0.0, "turn reward of a turn with calls that could all be done; only recipes with turn-level credit see it"
    )


class Tools(Dataset):
    """A turn with calls is answered by the tools; a turn without one is the answer, which the named reward judges.

    In the format `tags` a turn ends at `</tool>` and its result follows as `<result>...</result>`; in the others it
    ends as the model ends it, and results follow as chat messages. A call that cannot be read, or
    whose tool raises, is answered with the error and counted. An episode whose turns are used up earns 0, unless the
    reward is a function that looks at how it `ended`. Notes: `tool_calls`, `tool_errors` (of these) and, but for
    `tags`, `tool_malformed` (of these again, those that could not be read).
    """

    name = "tools"
    single_turn = False
    example_call = f"{CALL_OPEN}1+2{CALL_CLOSE}"
    Settings = ToolsSettings

    def __init__(self, settings: ToolsSettings) -> None:
        require_range("max_turns", settings.max_turns, 1, 1000)
        self.tools = load_tools(settings.tool)
        self.described = [tool.describe() for tool in self.tools.values()]
        super().__init__(settings)
        self._train.adapt = self._eval.adapt = self.adapted
        self.max_turns, self.call_reward = settings.max_turns, settings.call_reward
        self._chosen: str = settings.tool_format
        self.tool_format: str = settings.tool_format
        """once a problem was made for a chat template: a name in FORMATS, or tags"""
        if settings.tool_format == TAGS:
            self._only_tool()

    # -------------------------------------------- prompts

    def format_for(self, template: str, *, chat: bool = True) -> str:
        """The format for a model with this chat template (empty: none): a name in FORMATS, or tags. `chat`: the prompt
        is chat messages. Raises UserError where there is none."""
        chosen = self._chosen
        if chosen == "auto":
            chosen = (detect(template) if chat else "") or (TAGS if self._takes_tags or not chat else "hermes")
            if chat and not detect(template) and _describes_tools(template):
                raise UserError(
                    "the chat template describes tools, but in no format that is known here; set task.args.tool_format "
                    f"to one that the model knows ({', '.join(FORMATS)}), or to {TAGS}"
                )
        elif chosen != TAGS and not chat:
            raise UserError(
                f"task.args.tool_format is {chosen}, which is for chat messages, and the prompt is text; set "
                f"task.args.as_chat=true, or tool_format={TAGS}"
            )
        if chosen == TAGS:
            self._only_tool()
        self.tool_format = chosen
        self.example_call = self._example(chosen)
        return chosen

    def adapted(self, problem: Problem, template: str) -> Problem:
        """`problem` for a model with this chat template: the tools described as its format wants it."""
        prompt = problem.prompt
        chosen = self.format_for(template, chat=not isinstance(prompt, str))
        if chosen == TAGS or isinstance(prompt, str):
            return replace(problem, adapt=None)
        messages = [m for m in prompt if m.get("content") != SYSTEM or m.get("role") != "system"]
        tools = [*self.described, *problem.tools]
        if _describes_tools(template):
            return replace(problem, prompt=messages, tools=tools, adapt=None)
        return replace(problem, prompt=_told(messages, tools, FORMATS[chosen]), tools=(), adapt=None)

    @property
    def _takes_tags(self) -> bool:
        return len(self.tools) == 1 and next(iter(self.tools.values())).takes_text

    def _only_tool(self) -> ToolFunction:
        """The tool of the format `tags`."""
        if len(self.tools) > 1:
            raise UserError(
                f"task.args.tool names {len(self.tools)} tools ({', '.join(self.tools)}), and a call in the format "
                f"'{TAGS}' names none; name one, or use a model whose chat template describes tools"
            )
        (tool,) = self.tools.values()
        tool.check_takes_text()
        return tool

    def _example(self, chosen: str) -> str:
        tool = next(iter(self.tools.values()))
        return Tools.example_call if chosen == TAGS else FORMATS[chosen].write(tool.name, tool.example())

    # -------------------------------------------- episodes

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        chosen = self.format_for(session.template, chat=not isinstance(problem.prompt, str))
        talk = _Talk(self, problem, session)
        self.note_values(problem, session)
        answer = await (talk.with_tags() if chosen == TAGS else talk.with_calls(FORMATS[chosen]))
        session.note("tool_calls", float(talk.calls))
        session.note("tool_errors", float(talk.errors))
        if chosen != TAGS:
            session.note("tool_malformed", float(talk.malformed))
        transcript = "".join(talk.written)
        if answer is not None:
            return await self.judge(answer, problem, session, transcript=transcript)
        return await self.unanswered(problem, session, transcript=transcript)

    def with_calls(self, sample: Sample) -> Sample:
        calls: list[str] = []
        for turn in sample.said:
            if self.tool_format in FORMATS:
                parsed = FORMATS[self.tool_format].parse(turn.text, self.described)
                calls += [f"{call.name}({call.arguments})" for call in parsed.calls]
            elif (call := read_call(turn.text)) is not None:
                calls.append(call)
        return replace(sample, tool_calls=calls)


class _Talk:
    """One episode: turns of the policy, and what the tools say between them."""

    def __init__(self, task: Tools, problem: Problem, session: Session) -> None:
        self._task, self._problem, self._session = task, problem, session
        self.written: list[str] = []
        self.calls = self.errors = self.malformed = 0

    async def with_tags(self) -> str | None:
        """The answer; None without one."""
        session, tool = self._session, next(iter(self._task.tools.values()))
        for _ in range(self._task.max_turns):
            text = await self._turn(CALL_CLOSE)
            call = read_call(text)
            if call is None:
                return text
            if session.truncated:
                return None  # the context is full: no further turn can be taken
            result, failed = await self._asked(tool.call_with_text(call, self._problem))
            self._reward(failed)
            self.written.append(RESULT_OPEN + result + RESULT_CLOSE)
            session.append(self.written[-1])
        session.end_at_turn_limit()
        return None

    async def with_calls(self, chosen: ToolFormat) -> str | None:
        """The same in a format of a model."""
        session, tools = self._session, self._task.described
        for _ in range(self._task.max_turns):
            parsed = chosen.parse(await self._turn(*chosen.stop), tools)
            if not parsed.calls:
                return parsed.content
            if session.truncated:
                return None
            results = [await self._done(call) for call in parsed.calls]
            self._reward(any(failed for _, failed in results))
            session.append_messages(
                _answers(parsed.calls, [result for result, _ in results], session.template),
                as_sampled=True,  # a template that takes thoughts out of earlier turns does not see these turns
            )
            self.written += [RESULT_OPEN + result + RESULT_CLOSE for result, _ in results]
        session.end_at_turn_limit()
        return None

    async def _turn(self, *stop: str) -> str:
        settings = self._task.settings
        text = await self._session.generate(
            max_tokens=settings.max_tokens,
            stop=(*stop, *settings.stop),
            state_key=stable_hash("".join(self.written)),
        )
        self.written.append(text)
        return text

    async def _done(self, call: ToolCall) -> tuple[str, bool]:
        """(result, whether the call failed)"""
        if call.error:
            self.malformed += 1
        tool = self._task.tools.get(call.name)
        return await self._asked(_answer(call, tool, self._problem, list(self._task.tools)))

    async def _asked(self, result: Any) -> tuple[str, bool]:
        """(the tool's text, whether it failed)"""
        self.calls += 1
        try:
            return await result, False
        except Exception as error:  # code of others, on text that the policy wrote: the policy gets the error
            self.errors += 1
            return f"error: {error}"[:MOST_RESULT], True

    def _reward(self, failed: bool) -> None:
        if self._task.call_reward and not failed:
            self._session.reward_turn(self._task.call_reward)


async def _answer(call: ToolCall, tool: ToolFunction | None, problem: Problem, known: Sequence[str]) -> str:
    if call.error:
        raise ValueError(call.error)
    if tool is None:
        raise ValueError(f"there is no tool '{call.name}'; there is: {', '.join(known)}")
    return await tool.call(call.values(), problem)


def _answers(calls: Sequence[ToolCall], results: Sequence[str], template: str) -> list[dict[str, Any]]:
    """Results as chat messages: of the role `tool`, or of the user where the template knows no such role."""
    if re.search(r"""["']tool["']""", template):
        return [
            {"role": "tool", "name": call.name or UNNAMED, "tool_call_id": call_id(i), "content": result}
            for i, (call, result) in enumerate(zip(calls, results, strict=True))
        ]
    text = "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    return [{"role": "user", "content": text}]


def _describes_tools(template: str) -> bool:
    return re.search(r"\btools\b", template) is not None


def _told(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], chosen: ToolFormat
) -> list[Mapping[str, Any]]:
    """The messages, the tools described in the system message, for a template that describes none."""
    text = "You may call these tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text += "\nA call is written so:\n" + chosen.write("name", '{"argument": "value"}')
    first, *rest = messages
    if first.get("role") == "system" and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


def read_call(text: str) -> str | None:
    """The text in the first pair of tags; None without one. What stands behind it belongs to the token that closed it:
    the turn ended there."""
    found = CALL.search(text)
    return found[1].strip() if found else None
