from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.task.expression import MOST_CHARACTERS, MOST_NESTING, ExpressionError, parse

NUMBER = st.integers(0, 10**6)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 4) -> tuple[str, str, list[int]]:
    """(text, the same in Fractions for Python, its numbers)"""
    if depth == 0 or draw(st.booleans()):
        number = draw(NUMBER)
        return str(number), f"Fraction({number})", [number]
    left, python_left, numbers_left = draw(expressions(depth=depth - 1))
    kind = draw(st.sampled_from(["+", "-", "*", "/", "sign", "parentheses"]))
    if kind == "sign":
        return f"-{left}", f"-{python_left}", numbers_left
    if kind == "parentheses":
        return f"({left})", f"({python_left})", numbers_left
    right, python_right, numbers_right = draw(expressions(depth=depth - 1))
    space = draw(st.sampled_from(["", " "]))
    return (
        f"{left}{space}{kind}{space}{right}",
        f"{python_left}{kind}{python_right}",
        numbers_left + numbers_right,
    )


@given(expressions())
def test_values_and_numbers_are_those_of_python(made: tuple[str, str, list[int]]) -> None:
    text, python, numbers = made
    if len(text) > MOST_CHARACTERS:
        return
    try:
        value = eval(python, {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    expression = parse(text)
    assert expression.value == value
    assert list(expression.numbers) == numbers


@given(st.text("0123456789+-*/() .,xe_", max_size=30) | st.text(max_size=30))
def test_any_text_is_read_as_python_reads_it_or_refused(text: str) -> None:
    try:
        expression = parse(text)
    except ExpressionError:
        return
    assert set(text) <= set("0123456789+-*/() ")
    try:
        value = eval(text.strip(" "), {})
    except ZeroDivisionError:
        assert expression.value is None
    else:
        assert expression.value is not None
        assert float(expression.value) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "(", ")", "()", "1+", "*1", "1 2", "(1", "1)", "1**2", "2//3", "1.5", "1e3", "0x10", "1_000", "007",
        "a", "__import__('os')", "1+\n2", "１+２", "٣", "+1", "(1)(2)", "2(3)", "1\x00",
    ],
)  # fmt: skip
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)


def test_division_by_zero_has_no_value_but_is_an_expression() -> None:
    assert parse("1/(2-2)*0+1").value is None
    assert parse("1/(2-2)").numbers == (1, 2, 2)


def test_operators_are_counted_without_signs() -> None:
    assert parse("-(3--4)*-2").num_operators == 2


def test_sizes_are_bounded() -> None:
    nested = MOST_NESTING - 1
    assert parse("(" * nested + "1" + ")" * nested).value == 1
    for text in ("(" * 100 + "1" + ")" * 100, "-" * 100 + "1", "9" * 19, "1+" * 200 + "1"):
        with pytest.raises(ExpressionError):
            parse(text)
    longest = "*".join(["999999999999999999"] * 13)
    assert len(longest) <= MOST_CHARACTERS
    assert parse(longest).value == 999999999999999999**13
