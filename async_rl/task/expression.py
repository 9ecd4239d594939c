"""Arithmetic expressions read without `eval`: exact rational values, every size bounded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MOST_CHARACTERS = 256
MOST_DIGITS = 18
MOST_NESTING = 32
"""An expression is at most MOST_CHARACTERS long, so its value has at most about that many digits above and
below the line: nothing a policy writes can cost more than microseconds or overflow the stack."""

TOKEN = re.compile(r"[ ]*(?:([0-9]+)|([-+*/()]))")


class ExpressionError(ValueError):
    """The text is not an expression; the message says why and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """Example: `parse("(3+5)*2")` has value 16, numbers (3, 5, 2) and 2 operators."""

    value: Fraction | None
    """exact; None where something is divided by zero"""
    numbers: tuple[int, ...]
    """as they occur, left to right"""
    num_operators: int
    """binary ones: a sign is none"""


def parse(text: str) -> Expression:
    """Read `+ - * /`, signs, parentheses and whole numbers, with Python's precedence.

    Raises ExpressionError for anything else, and for more than the limits above.
    """
    if len(text) > MOST_CHARACTERS:
        raise ExpressionError(f"longer than {MOST_CHARACTERS} characters")
    return _Parser(_tokens(text)).parse()


def _tokens(text: str) -> list[str]:
    tokens = []
    position, end = 0, len(text.rstrip(" "))
    while position < end:
        match = TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected {text[position:].lstrip(' ')[0]!r}")
        number, symbol = match.groups()
        if number and len(number) > MOST_DIGITS:
            raise ExpressionError(f"a number has more than {MOST_DIGITS} digits")
        if number and number[0] == "0" and len(number) > 1:
            raise ExpressionError("a number begins with 0")
        tokens.append(number or symbol)
        position = match.end()
    return tokens


class _Parser:
    """sum := product (('+'|'-') product)* ; product := signed (('*'|'/') signed)* ;
    signed := '-' signed | number | '(' sum ')'"""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0
        self._numbers: list[int] = []
        self._num_operators = 0

    def parse(self) -> Expression:
        value = self._sum()
        if self._position < len(self._tokens):
            raise ExpressionError(f"unexpected {self._tokens[self._position]!r} after the expression")
        return Expression(value=value, numbers=tuple(self._numbers), num_operators=self._num_operators)

    def _next(self, *wanted: str) -> str | None:
        """The next token when it is one of `wanted`, which is then used up."""
        if self._position < len(self._tokens) and self._tokens[self._position] in wanted:
            self._position += 1
            return self._tokens[self._position - 1]
        return None

    def _sum(self) -> Fraction | None:
        value = self._product()
        while symbol := self._next("+", "-"):
            self._num_operators += 1
            right = self._product()
            if value is None or right is None:
                value = None
            else:
                value = value + right if symbol == "+" else value - right
        return value

    def _product(self) -> Fraction | None:
        value = self._signed()
        while symbol := self._next("*", "/"):
            self._num_operators += 1
            right = self._signed()
            if value is None or right is None or (symbol == "/" and right == 0):
                value = None
            else:
                value = value * right if symbol == "*" else value / right
        return value

    def _signed(self) -> Fraction | None:
        self._depth += 1
        if self._depth > MOST_NESTING:
            raise ExpressionError(f"more than {MOST_NESTING} signs and parentheses inside each other")
        value: Fraction | None
        if self._next("-"):
            inner = self._signed()
            value = None if inner is None else -inner
        elif self._next("("):
            value = self._sum()
            if not self._next(")"):
                raise ExpressionError("a parenthesis is not closed")
        else:
            value = self._number()
        self._depth -= 1
        return value

    def _number(self) -> Fraction:
        if self._position == len(self._tokens):
            raise ExpressionError("ends where a number should be")
        token = self._tokens[self._position]
        if not token[0].isdigit():
            raise ExpressionError(f"{token!r} where a number should be")
        self._position += 1
        self._numbers.append(int(token))
        return Fraction(int(token))
