"""Rewards for the answer, the last message or the whole text: the expected one word for word, as a number (GSM8K) or
as a regular expression; JSON (one block fenced as `json` counts as its content, JSON inside prose does not), and JSON
that a schema accepts. Numbers are compared as decimals, never evaluated; patterns run with a time limit."""

import json
import re
from decimal import Context, Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from llmlab.rewards.completions import Completion, answer, read_json
from llmlab.rewards.function import Row, RowError, Score, column_value, reward_function
from llmlab.settings.errors import UserError, reading
from llmlab.simulator.guardrails import compile_pattern, time_limit

MARK = "####"
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?:(?<![\w.)])(?P<sign>[-+\u2212])[ ]?)?(?:[$\u20ac\u00a3][ ]?)?(?P<over>{_UNSIGNED})"
    rf"(?:[ ]?/[ ]?(?P<under>{_UNSIGNED}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_EXACT = Context(prec=60, Emax=10**6, Emin=-(10**6), traps=[])
_MAX_CHARACTERS = 20_000  # in which the number is looked for


@reward_function()
def exact_match(completion: Completion, row: Row, *, column: str = "answer", ignore_case: bool = False) -> Score:
    """Scores whether the answer equals the expected one; whitespace is normalized.

    Args:
        column: the column of expected answers; a list means several accepted answers.
        ignore_case: compare without case.

    Returns:
        1 or 0; None where the row has no expected answer.
    """
    expected = column_value(row, column)
    if expected is None:
        return None

    def plain(text: Any) -> str:
        text = " ".join(str(text).split())
        return text.casefold() if ignore_case else text

    return float(plain(answer(completion)) in map(plain, expected if isinstance(expected, list) else [expected]))


@reward_function()
def regex_match(
    completion: Completion, row: Row, *, pattern: str | None = None, column: str = "regex", full: bool = False
) -> Score:
    """Scores whether a regular expression matches the answer.

    Args:
        pattern: of the `regex` module (Python's `re` and more), with DOTALL; None takes each row's from a column.
        column: the column of patterns.
        full: match the whole answer, not a part of it.

    Returns:
        1 or 0; None where the row has no pattern.
    """
    import regex

    if pattern is not None:
        compiled = compile_pattern(pattern, "pattern", regex.DOTALL)
    elif (pattern := column_value(row, column, "without a pattern, ")) is not None:
        compiled = compile_pattern(pattern, column, regex.DOTALL, RowError)
    else:
        return None
    with time_limit(pattern) as timeout:
        match = compiled.fullmatch if full else compiled.search
        return float(match(answer(completion), timeout=timeout) is not None)


@reward_function()
def numeric_match(
    completion: Completion, row: Row, *, column: str = "answer", tolerance: Annotated[float, Ge(0)] = 1e-6
) -> Score:
    """Scores whether the answer's number is the expected one.

    Reads `1,234.50`, `-3`, `$18`, `.5` and `2e3`, fractions such as `1/2` and `\\frac{1}{2}` as decimals, `50%` as 50.

    Args:
        column: the column of expected answers: numbers, or texts read in the same way (a GSM8K solution with `####`).
        tolerance: largest relative difference; whole numbers must be equal.

    Returns:
        1 or 0; None where the row has no expected answer.

    Source: Cobbe et al. 2021 (arXiv:2110.14168) for the form of the answer.
    """
    expected = column_value(row, column)
    if expected is None:
        return None
    target = number_in(str(expected))
    if target is None:
        raise RowError(f"{column} = {str(expected)[-60:]!r}: there is no number in it")
    number = number_in(answer(completion))
    if number is None or all(value == value.to_integral_value() for value in (number, target)):
        return float(number == target)
    difference = _EXACT.abs(_EXACT.subtract(number, target))
    return float(difference <= _EXACT.multiply(Decimal(tolerance), _EXACT.abs(target)))


def number_in(text: str) -> Decimal | None:
    """Returns the number after the last `####`, else the last number; None where there is none."""
    _, mark, after = text.rpartition(MARK)
    text = _FRACTION.sub(r"\1/\2", after[:_MAX_CHARACTERS] if mark else after[-_MAX_CHARACTERS:])
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[0] if mark else matches[-1]
    value = Decimal(match["over"].replace(",", ""))
    if match["under"]:
        value = _EXACT.divide(value, Decimal(match["under"].replace(",", "")))
    if not value.is_finite():
        return None
    return value.copy_negate() if match["sign"] in ("-", "\u2212") else value


@reward_function()
def json_valid(completion: Completion, row: Row) -> float:
    """Scores 1 for valid JSON (RFC 8259: no NaN, no trailing comma; at most 100 levels), else 0.

    Source: seed, RL guide, section 3.
    """
    text = answer(completion)
    try:
        read_json(text)
    except ValueError:
        return 0.0
    return 1.0


@reward_function()
def schema_pass(
    completion: Completion, row: Row, *, json_schema: dict[str, Any] | str | None = None, column: str = "schema"
) -> Score:
    """Scores whether the answer is JSON that a JSON Schema accepts; nothing that a schema refers to is fetched.

    A `pattern` in the schema runs without a time limit: write it so that it cannot backtrack without end.

    Args:
        json_schema: the schema, or the path of a JSON file that holds it; None takes each row's from a column.
        column: the column of schemas: mappings (as datasets store them, nulls beside keys are ignored) or JSON texts.

    Returns:
        1 where the schema accepts the answer, else 0; None where the row has no schema.

    Source: seed, RL guide, section 3; JSON Schema 2020-12 unless the schema names another draft.
    """
    from referencing.exceptions import Unresolvable

    schema, where, error_type = json_schema, "json_schema", UserError
    if json_schema is None:
        schema, where, error_type = column_value(row, column, "without json_schema, "), column, RowError
        if schema is None:
            return None
    elif isinstance(json_schema, str):
        where = f"json_schema = {json_schema}"
        with reading(where, "JSON"):
            schema = Path(json_schema).read_text(encoding="utf-8")
    text = schema if isinstance(schema, str) else json.dumps(_without_nulls(schema))
    validator, text = _validator(text, where, error_type), answer(completion)
    try:
        return float(validator.is_valid(read_json(text)))
    except Unresolvable as error:
        raise UserError(f"the schema: '{error.ref}' is not in it, and nothing is fetched") from None
    except (ValueError, RecursionError, OverflowError):  # no JSON, or more than the validator can handle
        return 0.0


@lru_cache(maxsize=256)
def _validator(schema: str, where: str, error_type: type[UserError]) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    try:
        value = json.loads(schema)
        if not isinstance(value, (dict, bool)):
            raise error_type(f"{where}: expected a JSON Schema, found {type(value).__name__}")
        kind = validator_for(value, default=Draft202012Validator)
        kind.check_schema(value)
    except json.JSONDecodeError as error:
        raise error_type(f"{where}: this is not valid JSON: {error}") from None
    except SchemaError as error:
        raise error_type(f"{where}: this is not a valid JSON Schema: {error.message}") from None
    return kind(value, registry=Registry())


def _without_nulls(schema: Any) -> Any:
    """Undoes what Arrow does to mappings of different keys: it gives every row every key, as null."""
    if isinstance(schema, list):
        return [_without_nulls(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: part if key in ("enum", "const", "default") else _without_nulls(part)
        for key, part in schema.items()
        if part is not None or key in ("const", "default")
    }
