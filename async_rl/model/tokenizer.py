"""Text to tokens and back, over the `tokenizers` library and jinja2 alone.

transformers does the same with the same two libraries. Its import takes seconds and brings torch, and every process of
a run needs a tokenizer, also those without torch; so it is not used here but compared with: the tests hold each step
(encode, decode, template, end tokens) against it on real tokenizers, and `doctor`, where it is installed, on the
user's own model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import tokenizers

from async_rl.errors import UserError
from async_rl.model.chat_template import CONTINUE, compile_template, left_open
from async_rl.model.data_text import Disguise, TextOnly, any_of, read_file, without_leading_space
from async_rl.model.messages import plain_lines, refuse, with_arguments, with_text, without_last_call

if TYPE_CHECKING:
    from async_rl.config.settings import ModelSettings

CONFIG = "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"
"""folder of named chat templates, in a model folder"""
SHORT, MOST_SHORT = 16, 4096
"""characters or tokens of a text that is remembered, and how many are"""
_PLAIN_CHAT = tuple({"role": role, "content": role[0]} for role in ("user", "assistant", "user"))


class Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Example: `t = Tokenizer("models/tiny"); t.decode(t.encode("12<")) == "12<"`.
    Raises UserError when the folder has no tokenizer.json or no end-of-text token.

    Args:
        time: the date and time that a chat template writes, ISO 8601; empty: when the tokenizer is made.
        control_tokens: what becomes of a control token in chat messages (see `control_tokens`).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        time: str = "",
        control_tokens: Literal["escape", "refuse", "allow"] = "escape",
    ) -> None:
        self._time = datetime.fromisoformat(time) if time else datetime.now()
        self.in_data = control_tokens
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{self.folder}: no tokenizer.json; save the tokenizer in the fast format "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            )
        try:
            self._tokenizer = read_file(file)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{file} cannot be read: {error}") from None
        self._settings = self._read(CONFIG)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """one more than the greatest token id"""
        self.embedded = self._embeddings()
        """tokens that the model has an embedding for, by config.json; 0: not known"""
        self._most_tokens = max(self.vocab_size, self.embedded)
        self.eos_id = self._end_of_text(vocabulary)
        """the token that ends a text"""
        self.end_ids = self._end_tokens(vocabulary)
        """every token that ends a turn: all that the folder names, `eos_id` among them"""
        self._first = self._written_first()
        # a vocabulary of single characters drops unknown characters silently
        self._alphabet = self._closed_alphabet(vocabulary)
        self._templates: dict[str, Any] = {}  # compiled, by name
        self._found: dict[str, str] | None = None  # templates' texts
        self._takes_parts: bool | None = None
        # short texts (and whether they are prompts) and turns (with their stop strings), which games say all the time
        self._encoded: dict[tuple[str, bool], list[int]] = {}
        self._turns: dict[tuple[tuple[int, ...], tuple[str, ...]], str] = {}

    @classmethod
    def of(cls, model: ModelSettings) -> Tokenizer:
        """The tokenizer as every process of a run uses it."""
        return cls(model.path, time=model.template_time, control_tokens=model.control_tokens)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Every token and its number, added ones included."""
        found: Mapping[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it; empty for a number without one."""
        return str(self._tokenizer.id_to_token(token) or "")

    def encode(self, text: str, *, behind: bool = False, first: bool = False) -> list[int]:
        """Tokens of `text`. What stands in it as a special token becomes one; none is added.

        Args:
            behind: the text stands behind other text. Some tokenizers (Llama 2's) write a space in front of a text,
                which does not belong there then.
            first: the text is a whole context that no chat template wrote: the tokens that the tokenizer puts first
                (begin of text, where the model expects it) are added, unless they are there.

        Raises ValueError for a character that the tokenizer has no token for (a character tokenizer would drop it
        silently), and for a token that the model has no embedding for.
        """
        if behind is not first and (known := self._encoded.get((text, first))) is not None:
            return known.copy()
        if self._alphabet is not None and not self._alphabet.issuperset(text):
            unknown = sorted(set(self._outside_special(text)) - self._alphabet)
            if unknown:
                raise ValueError(f"the tokenizer of {self.folder} has no token for {unknown[0]!r}")
        ids: list[int] = self._encode_behind(text) if behind else self._plain_ids(text)
        if first and self._first and ids[: len(self._first)] != self._first:
            ids = [*self._first, *ids]
        self._check_embedded(ids)
        if len(text) <= SHORT and behind is not first and len(self._encoded) < MOST_SHORT:
            self._encoded[text, first] = ids.copy()
        return ids

    def lengths(self, texts: Sequence[str], *, first: bool = False) -> list[int]:
        """Tokens of each text, by the library's threads, without the checks of `encode`. `first` and errors are
        those of `encode`."""
        if self._alphabet is not None:
            return [len(self.encode(text, first=first)) for text in texts]
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        before = self._first if first else []
        more = [len(before) if before and e.ids[: len(before)] != before else 0 for e in found]
        return [len(encoding) + added for encoding, added in zip(found, more, strict=True)]

    def decode(self, ids: Sequence[int], *, special: bool = False, behind: bool = False) -> str:
        """Text of tokens. Special tokens are part of it: a tag that a task reads may be one. Only end tokens are left
        out, unless `special`. `behind`: the tokens stand behind others, so that a space in front is text."""
        if not special:
            ids = [i for i in ids if i not in self.end_ids]
        text: str = (self._behind if behind else self._tokenizer).decode(list(map(int, ids)), skip_special_tokens=False)
        return text

    def ends_with(self, more: Sequence[int] = ()) -> tuple[int, ...]:
        """The end tokens and `more`, in order."""
        return tuple(sorted({*self.end_ids, *more})) if more else self._ends

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(sorted(self.end_ids))

    def turn_text(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Text of a sampled turn, up to the stop string that ended it and with it. The token that completes a stop
        string may go on behind it; that rest is not part of the text. The text of an end token is, when a stop string
        names it."""
        key = tuple(ids), tuple(stop)
        if (known := self._turns.get(key)) is not None:
            return known
        text = self.decode(ids, behind=True)
        if len(ids) and int(ids[-1]) in self.end_ids:
            end = self.decode(ids[-1:], special=True)
            if any(end in string for string in stop):
                text = self.decode(ids, special=True, behind=True)
        ends = [text.find(string) + len(string) for string in stop if string in text]
        text = text[: min(ends, default=len(text))]
        if len(ids) <= SHORT and len(self._turns) < MOST_SHORT:
            self._turns[key] = text
        return text

    def is_added(self, token: int) -> bool:
        """The token was added to the vocabulary: a mark (end of text, a tag), no piece of words."""
        return token in self._added

    def mark_at(self, text: str) -> int | None:
        """The added token that `text` begins with."""
        return max((i for i, token in self._added.items() if text.startswith(token.content)), default=None)

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """The tokens that steer a model, by their text: all special ones, and those that the chat template writes
        between messages (DeepSeek's are not marked as special). The setting of that name says what becomes of one that
        stands in a chat message: plain text (escape), a refusal, or the token itself (allow)."""
        found = {token.content: i for i, token in self._added.items() if token.special}
        try:
            between = self.render(_PLAIN_CHAT, add_generation_prompt=False) if self.has_chat_template else ""
        except UserError:  # it asks for other messages
            between = ""
        found |= {token.content: i for i, token in self._added.items() if token.content in between}
        return {content: i for content, i in found.items() if content.strip()}  # Gemma adds line breaks too

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the control tokens in a text."""
        return any_of(self.control_tokens)

    def encode_disguised(self, text: str, disguise: Disguise, *, first: bool = False) -> list[int]:
        """Tokens of a text in which control tokens that are data are disguised: these become plain text, all others
        tokens. Arguments and errors are those of `encode`."""
        ids = [*(self._first if first else ()), *self._text_only.encode(text, disguise)]
        self._check_embedded(ids)
        return ids

    @property
    def has_chat_template(self) -> bool:
        return bool(self._sources())

    @property
    def template_text(self) -> str:
        """The folder's chat templates, joined; empty where it has none."""
        return "\n".join(self._sources().values())

    @property
    def dated(self) -> bool:
        """The chat template asks for the date."""
        return any("strftime_now" in source for source in self._sources().values())

    @property
    def takes_parts(self) -> bool:
        """The chat template reads content that is a list of parts (`{"type": "text", "text": ...}`)."""
        if self._takes_parts is None:
            mark = "x1y2z3"
            parts = {"role": "user", "content": [{"type": "text", "text": mark}]}
            try:
                text = self.render([parts])
            except UserError:
                text = ""
            self._takes_parts = mark in text and f"'{mark}'" not in text and f'"{mark}"' not in text
        return self._takes_parts

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Chat messages through the folder's template, as transformers renders them.

        Args:
            tools: descriptions of tools, in the form that the template expects (usually JSON schemas).
            arguments: further variables of the template, e.g. `{"enable_thinking": False}`.

        Raises UserError when the folder has none or the template refuses the messages.
        """
        sources = self._sources()
        if not sources:
            raise UserError(f"{self.folder}: the tokenizer has no chat template; use prompts that are plain text")
        template = self._compiled("tool_use" if tools and "tool_use" in sources else "default")
        variables = self._special_tokens() | dict(arguments or {})
        try:
            text: str = template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                **variables,
            )
        except Exception as error:  # code of others
            raise UserError(f"{self.folder}: the chat template refused the messages: {error}") from None
        return text

    def shows(self, name: str) -> bool:
        """The chat template mentions a variable, or a field of a message."""
        return any(re.search(rf"\b{re.escape(name)}\b", source) for source in self._sources().values())

    @cached_property
    def takes_text_arguments(self) -> bool:
        """The chat template wants the arguments of a tool call as JSON text (DeepSeek V3's), not as an object."""
        name, value = "x1y2z3", "z3y2x1"
        for as_text, content in ((False, ""), (False, None), (True, ""), (True, None)):
            arguments = json.dumps({name: value}) if as_text else {name: value}
            call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
            try:
                text = self.render([_PLAIN_CHAT[0], {"role": "assistant", "content": content, "tool_calls": [call]}])
            except UserError:
                continue
            if name in text and f'\\"{name}' not in text and f"'{name}'" not in text:
                return as_text
        return False

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _added(self) -> Mapping[int, tokenizers.AddedToken]:
        """The added tokens by number. The library makes this mapping anew each time: 18 ms for the 6,415 of Gemma 3."""
        found: Mapping[int, tokenizers.AddedToken] = self._tokenizer.get_added_tokens_decoder()
        return found

    @cached_property
    def _behind(self) -> tokenizers.Tokenizer:
        """For text behind other text."""
        return without_leading_space(self._tokenizer, self.folder / "tokenizer.json")

    @cached_property
    def _text_only(self) -> TextOnly:
        """For text in which control tokens are text."""
        return TextOnly(self.folder / "tokenizer.json", self.control_tokens)

    def _encode_behind(self, text: str) -> list[int]:
        """Up to the first special token the text continues what stands before it; from there on it is as ever."""
        if self._behind is self._tokenizer:
            return self._plain_ids(text)
        whole = self._tokenizer.encode(text, add_special_tokens=False)
        mark = next((i for i, token in enumerate(whole.ids) if self.is_added(token)), len(whole.ids))
        begins = whole.offsets[mark][0] if mark < len(whole.ids) else len(text)
        before = self._behind.encode(text[:begins], add_special_tokens=False).ids if begins else []
        return [*before, *whole.ids[mark:]]

    def _written_first(self) -> list[int]:
        """What the tokenizer puts before a text: its file says so, as for transformers (which does not look at
        `add_bos_token` where there is a tokenizer.json)."""
        probe = self._tokenizer.id_to_token(self.eos_id) or ""  # a text that every tokenizer has a token for
        ids, plain = (self._tokenizer.encode(probe, add_special_tokens=added).ids for added in (True, False))
        count = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0) if plain else 0
        return list(ids[:count])

    def _check_embedded(self, ids: Sequence[int]) -> None:
        if self.embedded and ids and max(ids) >= self.embedded:
            token = next(i for i in ids if i >= self.embedded)
            raise ValueError(
                f"the tokenizer of {self.folder} writes token {token} ({self._tokenizer.id_to_token(token)!r}), and "
                f"the model has embeddings for {self.embedded} tokens only (vocab_size in config.json); use the "
                "tokenizer that belongs to the model, or a model with that token added"
            )

    def _compiled(self, name: str) -> Any:
        if name not in self._templates:
            sources = self._sources()
            if name not in sources:
                raise UserError(
                    f"{self.folder}: the tokenizer has chat templates named {', '.join(sorted(sources))}, none named "
                    f"{name}; put the one to be used into chat_template.jinja"
                )
            import jinja2

            try:
                self._templates[name] = compile_template(sources[name], self._time)
            except jinja2.TemplateError as error:
                raise UserError(f"{self.folder}: the chat template is not valid: {error}") from None
        return self._templates[name]

    def _read(self, name: str) -> dict[str, Any]:
        return read_values(self.folder, name)

    def _end_of_text(self, vocabulary: Mapping[str, int]) -> int:
        content = self._special_tokens().get("eos_token", "")
        if content in vocabulary:
            token = vocabulary[content]
            if self.embedded and token >= self.embedded:
                raise UserError(
                    f"{self.folder}: the end-of-text token {content!r} is token {token}, and the model has embeddings "
                    f"for {self.embedded} tokens only (vocab_size in config.json); use the tokenizer that belongs to "
                    "the model, or a model with that token added"
                )
            return token
        for named in (self._ends_in("generation_config.json"), self._ends_in("config.json")):
            if named:
                return named[0]
        raise UserError(
            f"{self.folder}: no end-of-text token; set eos_token in tokenizer_config.json "
            "or eos_token_id in config.json"
        )

    def _end_tokens(self, vocabulary: Mapping[str, int]) -> frozenset[int]:
        """A chat model ends a turn with another token than a text; files may name one each, or several."""
        generation, config = self._ends_in("generation_config.json"), self._ends_in("config.json")
        if generation:  # config.json may be older: a number there may be another tokenizer's, that of a word here
            config = [token for token in config if self.is_added(token)]
        return frozenset({self.eos_id, *generation, *config})

    def _ends_in(self, name: str) -> list[int]:
        """Tokens that a file names as `eos_token_id`: a number, several, or those of the text part of the model."""
        values = self._read(name)
        inner = values.get("text_config")
        found: list[int] = []
        for part in (values, inner if isinstance(inner, dict) else {}):
            named = part.get("eos_token_id")
            tokens = named if isinstance(named, list) else [named]
            found += [token for token in tokens if type(token) is int and 0 <= token < self._most_tokens]
        return list(dict.fromkeys(found))

    def _embeddings(self) -> int:
        """Tokens that the model has an embedding for, which may be more than the tokenizer has; 0: not known."""
        values = self._read("config.json")
        inner = values.get("text_config")
        size = (inner if isinstance(inner, dict) else values).get("vocab_size")
        return size if isinstance(size, int) else 0

    def _closed_alphabet(self, vocabulary: Mapping[str, int]) -> frozenset[str] | None:
        if not isinstance(self._tokenizer.model, tokenizers.models.WordLevel):
            return None
        special = {token.content for token in self._added.values()}
        plain = frozenset(token for token in vocabulary if token not in special)
        return plain if all(len(token) == 1 for token in plain) else None

    def _outside_special(self, text: str) -> str:
        for token in self._added.values():
            text = text.replace(token.content, "")
        return text

    def _special_tokens(self) -> dict[str, str]:
        older = self._read("special_tokens_map.json")  # where tokenizer_config.json names none
        found = {}
        for key in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            value = self._settings.get(key, older.get(key))
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[key] = content
        more = self._settings.get("extra_special_tokens")
        named = more.items() if isinstance(more, dict) else ()  # a list names none
        return found | {key: content for key, content in named if isinstance(content, str)}

    def _sources(self) -> Mapping[str, str]:
        """The chat templates of the folder, by name; the usual one is called default."""
        if self._found is None:
            self._found = read_templates(self.folder, self._settings)
        return self._found


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a model folder, by name; the usual one is called default. `settings`: what its
    tokenizer_config.json says."""
    source = settings.get("chat_template")
    found: dict[str, str] = {}
    if isinstance(source, list):  # several named templates
        found |= {entry["name"]: entry["template"] for entry in source}
    elif isinstance(source, str):
        found["default"] = source
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text()
    return found | {file.stem: file.read_text() for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}


def asks_for_date(folder: Path) -> bool:
    """Whether a chat template of a model folder writes the date. Raises UserError for a file that is not valid."""
    return any("strftime_now" in source for source in read_templates(folder, read_values(folder, CONFIG)).values())


def read_values(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a model folder; empty where there is none. Raises UserError."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


class HasPrompt(Protocol):
    """A problem, as far as its prompt goes."""

    @property
    def prompt(self) -> str | Sequence[Mapping[str, Any]]: ...
    @property
    def tools(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def template_args(self) -> Mapping[str, Any]: ...


Given = TypeVar("Given", bound=HasPrompt)


def adapted(problem: Given, tokenizer: Tokenizer) -> Given:
    """The problem as a model with this chat template is given it. Raises UserError where it cannot be."""
    adapt = getattr(problem, "adapt", None)
    made: Given = problem if adapt is None else adapt(problem, tokenizer.template_text)
    return made


def problem_text(problem: HasPrompt, tokenizer: Tokenizer) -> str:
    """The prompt of a problem as text. Raises UserError for what the chat template would leave out."""
    problem = adapted(problem, tokenizer)
    return prompt_text(problem.prompt, tokenizer, tools=problem.tools, arguments=problem.template_args)


def prompt_text(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """A prompt as text: chat messages through the template, or line by line where there is none.

    Args:
        arguments: of the chat template. `continue_final_message`: true: the last message is gone on with.

    Raises UserError for tools, tool calls, parts of a message and arguments that the text would not show.
    """
    if isinstance(prompt, str):
        refuse(tools, "a prompt that is text shows no tools; make it a chat message, or leave the tools out")
        refuse(arguments, "a prompt that is text goes through no chat template; leave its arguments out")
        return prompt
    given = {name: value for name, value in (arguments or {}).items() if name != CONTINUE}
    where = str(tokenizer.folder)
    if not tokenizer.has_chat_template:
        return "\n".join(plain_lines(prompt, tools, given, where))
    for name in given:
        if name in _RESERVED or not tokenizer.shows(name):
            raise UserError(f"{where}: the chat template takes no argument '{name}'; leave it out")
    messages = prompt if tokenizer.takes_parts else [with_text(message, where) for message in prompt]
    messages = [
        with_arguments(m, as_text=tokenizer.takes_text_arguments) if m.get("tool_calls") else m for m in messages
    ]
    go_on = bool((arguments or {}).get(CONTINUE))

    def render(chat: Sequence[Mapping[str, Any]], described: Sequence[Mapping[str, Any]]) -> str:
        rendered = partial(tokenizer.render, tools=described, arguments=given)
        return left_open(chat, rendered) if go_on else rendered(chat)

    def same(chat: Sequence[Mapping[str, Any]], described: Sequence[Mapping[str, Any]]) -> bool:
        try:
            return render(chat, described) == text
        except UserError:  # a template that minds what is left out
            return False

    text = render(messages, tools)
    fewer = [without_last_call(m) if m.get("tool_calls") else m for m in messages]
    hides_calls = fewer != messages and same(fewer, tools)
    if hides_calls:  # DeepSeek's shows calls of messages without content
        emptied = [{**m, "content": m.get("content") or None} if m.get("tool_calls") else m for m in messages]
        with suppress(UserError):
            text, messages = render(emptied, tools), emptied
            hides_calls = same(fewer, tools)
    hides_tools = bool(tools) and same(messages, ())
    if hides_tools or hides_calls:
        raise UserError(
            f"{where}: the chat template shows no {'tools' if hides_tools else 'tool_calls'}, or not all; use a model "
            "that is made for tools, or leave them out"
        )
    return text


def problem_tokens(problem: HasPrompt, tokenizer: Tokenizer) -> list[int]:
    """The prompt of a problem as tokens. Raises UserError for what the chat template would leave out and for control
    tokens where `model.control_tokens` refuses them, ValueError for what the tokenizer cannot write."""
    problem = adapted(problem, tokenizer)
    return prompt_tokens(problem.prompt, tokenizer, tools=problem.tools, arguments=problem.template_args)


def prompt_tokens(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """A prompt as tokens. Text is taken as it stands, with the tokens that the model expects first; what chat messages
    and tools hold is data (see `Tokenizer.control_tokens`), and what comes first is for the template to write.

    Raises UserError and ValueError as `problem_tokens`.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt_text(prompt, tokenizer, tools=tools, arguments=arguments), first=True)
    first = not tokenizer.has_chat_template
    disguise = disguise_of([*prompt, *tools], tokenizer)
    if disguise is None:
        return tokenizer.encode(prompt_text(prompt, tokenizer, tools=tools, arguments=arguments), first=first)
    text = prompt_text(disguise.hide(prompt), tokenizer, tools=disguise.hide(tools), arguments=arguments)
    return tokenizer.encode_disguised(text, disguise, first=first)


def disguise_of(data: Sequence[Any], tokenizer: Tokenizer) -> Disguise | None:
    """How the control tokens of chat messages are kept from steering the model; None where there are none, or where
    they may. Raises UserError where they are refused."""
    if tokenizer.in_data == "allow":
        return None
    disguise = Disguise(tokenizer.control_pattern, data)
    if not disguise.found:
        return None
    if tokenizer.in_data == "refuse":
        raise UserError(
            f"the messages hold {disguise.found[0]!r}, a control token of {tokenizer.folder}; take it out, or set "
            "model.control_tokens=escape (it is plain text then) or allow (it steers the model)"
        )
    return disguise


def control_in(problem: HasPrompt, tokenizer: Tokenizer) -> list[str]:
    """The control tokens that a problem's messages and tools hold."""
    problem = adapted(problem, tokenizer)
    if isinstance(problem.prompt, str):
        return []
    return Disguise(tokenizer.control_pattern, [*problem.prompt, *problem.tools]).found


_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
"""variables of a chat template that are no arguments"""
