"""Rewards for JSON: whether the answer is JSON, and whether a JSON Schema accepts it. The answer is the last message,
or the whole text; one block fenced as `json` counts as its content. JSON inside prose does not count."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmlab.rewards.completions import Completion, answer, read_json
from llmlab.rewards.function import Row, RowError, Score, column_value, reward_function
from llmlab.settings.errors import UserError, reading


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
