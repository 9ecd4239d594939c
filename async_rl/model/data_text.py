"""Text that is data: what it holds must not steer the model, and what it begins with must not change.

Two things that the `tokenizers` library does to every text are right for a whole prompt and wrong for a piece of one:
it turns the text of a control token into the token, and some tokenizers put a space in front.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

PRIVATE = (0xF0000, 0x100000, 0xE000)
"""where Unicode's private areas begin: characters that a chat template passes on as they are"""


class Disguise:
    """Writes control tokens in data as private characters, so that they can be told from those of the template.

    Example: `d = Disguise(any_of(["<|im_end|>"]), messages); text = render(d.hide(messages)); d.show(text)`.

    Args:
        control: matches the control tokens.
        data: what will be hidden; its characters are not used as a disguise.
    """

    def __init__(self, control: re.Pattern[str], data: Any) -> None:
        self._pattern = control
        self.found = sorted({match for text in texts_of(data) for match in control.findall(text)})
        """the control tokens that the data holds"""
        there = {character for text in texts_of(data) for character in text} if self.found else set()
        free = (chr(base + i) for base in PRIVATE for i in range(0x1000) if chr(base + i) not in there)
        self._hidden = dict(zip(self.found, free, strict=False))
        self._shown = {hidden: content for content, hidden in self._hidden.items()}

    def hide(self, data: Any) -> Any:
        """The data (texts, lists and objects in any depth) with its control tokens disguised."""
        if isinstance(data, str):
            return self._pattern.sub(lambda match: self._hidden[match[0]], data)
        if isinstance(data, Mapping):
            return {key: value if key == "role" else self.hide(value) for key, value in data.items()}
        return [self.hide(value) for value in data] if isinstance(data, list | tuple) else data

    def show(self, text: str) -> str:
        """The text with its control tokens as they were."""
        return "".join(self._shown.get(character, character) for character in text)


class TextOnly:
    """A tokenizer that takes control tokens for plain text.

    Args:
        file: tokenizer.json
        control: the control tokens by their text.
    """

    def __init__(self, file: Path, control: Mapping[str, int]) -> None:
        self._tokenizer = read_file(file)
        self._added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._control = control
        self._pattern = re.compile(f"({any_of(control).pattern})")
        # the library reads a token as text only when it is marked as special
        self._tokenizer.add_special_tokens([self._added[content] for content in control if content in self._added])
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str, disguise: Disguise) -> list[int]:
        """Tokens of `text`: its control tokens are tokens, those in disguise are text."""
        ids: list[int] = []
        strip = False
        parts = self._pattern.split(text)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._control[part])
                strip = self._added[part].rstrip
                continue
            part = part.lstrip() if strip else part
            if i + 1 < len(parts) and self._added[parts[i + 1]].lstrip:
                part = part.rstrip()
            if part:
                ids += self._tokenizer.encode(disguise.show(part), add_special_tokens=False).ids
        return ids


def read_file(file: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json that reads every text whole and always alike: truncation, padding and dropout, which a file may
    keep from its training, are off."""
    made = tokenizers.Tokenizer.from_file(str(file))
    made.no_truncation()
    made.no_padding()
    if isinstance(made.model, tokenizers.models.BPE) and made.model.dropout:
        made.model.dropout = None
    return made


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts that stands at a place; without texts it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def texts_of(data: Any) -> Iterator[str]:
    """Every text in lists and objects in any depth, but for the roles of messages."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            if key != "role":
                yield from texts_of(value)
    elif isinstance(data, Sequence):
        for value in data:
            yield from texts_of(value)


def without_leading_space(made: tokenizers.Tokenizer, file: Path) -> tokenizers.Tokenizer:
    """The tokenizer for text that stands behind other text: without the space that it puts in front of a text, and
    that it takes away from in front when it decodes. `made` itself where it does neither."""
    changed: dict[str, Any] = {}
    for part in _PARTS:
        present = getattr(made, part)
        if present is None:
            continue
        state = json.loads(present.__getstate__())
        bare = _bare(state, part)
        if bare != state:
            changed[part] = bare
    if not changed:
        return made
    behind = read_file(file)
    for part, state in changed.items():
        setattr(behind, part, _from_state(part, state))
    return behind


def _bare(state: Any, part: str) -> Any:
    """A part of a tokenizer, as its file describes it, without what it does at the start of a text."""
    match state.get("type"):
        case "Prepend":
            return None
        case "Metaspace":
            return {**state, "prepend_scheme": "never"}
        case "ByteLevel" if part == "pre_tokenizer":
            return {**state, "add_prefix_space": False}
        case "Strip" if part == "decoder":
            return {**state, "start": 0}
        case "Sequence":
            name = _PARTS[part]
            kept = [_bare(inner, part) for inner in state[name]]
            return {**state, name: [inner for inner in kept if inner is not None]}
    return state


_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
"""part of a tokenizer -> the key of its own parts in the state of a sequence"""


def _from_state(part: str, state: Any) -> Any:
    """The part of a tokenizer that `state` describes; None for none."""
    if state is None:
        return None
    made = getattr(tokenizers, f"{part}s").Sequence([])
    whole = state if state.get("type") == "Sequence" else {"type": "Sequence", _PARTS[part]: [state]}
    made.__setstate__(json.dumps(whole).encode())
    return made
