"""Text to tokens and back, over the `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from async_rl.errors import UserError


class Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Example: `t = Tokenizer("models/tiny"); t.decode(t.encode("12<")) == "12<"`.
    Raises UserError when the folder has no tokenizer.json or no end-of-text token.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{self.folder}: no tokenizer.json; save the tokenizer in the fast format "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{file} cannot be read: {error}") from None
        # what a caller before us asked for and the file kept: none of it is meant for a text that is read as it stands
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, tokenizers.models.BPE) and self._tokenizer.model.dropout:
            self._tokenizer.model.dropout = None  # it would split a text in another way in each process
        self._settings = self._read("tokenizer_config.json")
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """one more than the greatest token id"""
        self._most_tokens = max(self.vocab_size, self._embeddings())
        self.eos_id = self._end_of_text(vocabulary)
        """the token that ends a text"""
        self.end_ids = self._end_tokens(vocabulary)
        """every token that ends a turn: all that the folder names, `eos_id` among them"""
        # a vocabulary of single characters drops unknown characters silently
        self._alphabet = self._closed_alphabet(vocabulary)
        self._template: Any = None

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without special tokens. Raises ValueError for a character that the tokenizer has no token
        for (a character tokenizer would drop it silently)."""
        if self._alphabet is not None:
            unknown = sorted(set(self._outside_special(text)) - self._alphabet)
            if unknown:
                raise ValueError(f"the tokenizer of {self.folder} has no token for {unknown[0]!r}")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens. Special tokens are part of it: a tag that a task reads may be one. Only end tokens are left
        out, unless `special`."""
        kept = [int(i) for i in ids if special or int(i) not in self.end_ids]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def turn_text(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Text of a sampled turn, up to the stop string that ended it and with it. The token that completes a stop
        string may go on behind it; that rest is not part of the text. The text of an end token is, when a stop string
        names it."""
        text = self.decode(ids)
        if len(ids) and int(ids[-1]) in self.end_ids:
            end = self.decode(ids[-1:], special=True)
            if any(end in string for string in stop):
                text = self.decode(ids, special=True)
        ends = [text.find(string) + len(string) for string in stop if string in text]
        return text[: min(ends, default=len(text))]

    @property
    def has_chat_template(self) -> bool:
        return self._template_source() is not None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Chat messages through the folder's template, as transformers renders them.

        Raises UserError when the folder has none or the template refuses the messages.
        """
        import jinja2

        if self._template is None:
            source = self._template_source()
            if source is None:
                raise UserError(f"{self.folder}: the tokenizer has no chat template; use prompts that are plain text")
            try:
                self._template = compile_template(source)
            except jinja2.TemplateError as error:
                raise UserError(f"{self.folder}: the chat template is not valid: {error}") from None
        try:
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens(),
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self.folder}: the chat template refused the messages: {error}") from None
        return text

    def _read(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.is_file():
            return {}
        try:
            values = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is not valid JSON: {error}") from None
        return values if isinstance(values, dict) else {}

    def _end_of_text(self, vocabulary: Mapping[str, int]) -> int:
        content = self._special_tokens().get("eos_token", "")
        if content in vocabulary:
            return vocabulary[content]
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
            added = self._tokenizer.get_added_tokens_decoder()
            config = [token for token in config if token in added]
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
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        plain = frozenset(token for token in vocabulary if token not in special)
        return plain if all(len(token) == 1 for token in plain) else None

    def _outside_special(self, text: str) -> str:
        for token in self._tokenizer.get_added_tokens_decoder().values():
            text = text.replace(token.content, "")
        return text

    def _special_tokens(self) -> dict[str, str]:
        older = self._read("special_tokens_map.json")  # where tokenizer_config.json names none
        found = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = self._settings.get(key, older.get(key))
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[key] = content
        return found

    def _template_source(self) -> str | None:
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text()
        source = self._settings.get("chat_template")
        if isinstance(source, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        return source if isinstance(source, str) else None


def prompt_text(prompt: str | Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """A prompt as text: chat messages through the template, or line by line where there is none."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer.has_chat_template:
        return tokenizer.render(prompt)
    return "\n".join(message["content"] for message in prompt)


def compile_template(source: str) -> Any:
    """A chat template in the environment transformers uses: sandboxed, immutable, with `tojson`,
    `raise_exception`, `strftime_now` and `{% generation %}` blocks."""
    import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training masks; here it only passes them."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
