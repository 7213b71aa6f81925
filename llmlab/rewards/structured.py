"""Rewards for JSON: whether the answer is JSON, and whether it is what a JSON Schema asks for.

The answer is the last message, or the whole text; one block fenced as `json` counts as its content. JSON inside
prose does not count.
"""

import json
from pathlib import Path
from typing import Any

from llmlab.rewards.completions import Completion, answer, column_of, read_json
from llmlab.settings.errors import UserError, reading


def json_valid(completions: list[Completion], **columns: Any) -> list[float | None]:
    """Scores whether the answer is valid JSON (RFC 8259: no NaN, no trailing comma; at most 100 levels).

    Args:
        completions: texts or messages of the batch.
        columns: not used.

    Returns:
        1 for valid JSON, else 0.

    Source: seed, RL guide, section 3.
    """
    return [float(_parsed(completion)[0]) for completion in completions]


def schema_pass(
    completions: list[Completion],
    *,
    json_schema: dict[str, Any] | str | None = None,
    column: str = "schema",
    **columns: Any,
) -> list[float | None]:
    """Scores whether the answer is JSON that a JSON Schema accepts.

    A `pattern` in the schema runs without a time limit: write it so that it cannot backtrack without end.

    Args:
        completions: texts or messages of the batch.
        json_schema: the schema, or the path of a JSON file that holds it; none takes each row's from a column.
        column: the column of schemas: mappings (as data sets store them, nulls beside keys are ignored) or JSON texts.
        columns: the column that is named.

    Returns:
        1 where the schema accepts the answer, else 0; None where the row has no schema.

    Raises:
        UserError: a schema is missing, is not valid, or refers to another one that is not inside it.

    Source: seed, RL guide, section 3; JSON Schema 2020-12 unless the schema names another draft.
    """
    if json_schema is not None:
        schemas: list[Any] = [_read(json_schema)] * len(completions)
    else:
        schemas = column_of(columns, column, "without json_schema, column")
    validators: dict[str, Any] = {}
    scores: list[float | None] = []
    for row, (completion, given) in enumerate(zip(completions, schemas, strict=True)):
        if given is None:
            scores.append(None)
            continue
        key = given if isinstance(given, str) else json.dumps(given)
        if key not in validators:
            validators[key] = _validator(given, f"row {row}: {column}" if json_schema is None else "json_schema")
        valid, value = _parsed(completion)
        scores.append(float(valid and _accepts(validators[key], value)))
    return scores


def _parsed(completion: Completion) -> tuple[bool, Any]:
    text = answer(completion)
    try:
        return True, read_json(text)
    except ValueError:
        return False, None


def _read(schema: dict[str, Any] | str) -> Any:
    if not isinstance(schema, str):
        return schema
    with reading(f"json_schema = {schema}", "JSON"):
        return json.loads(Path(schema).read_text(encoding="utf-8"))


def _validator(schema: Any, where: str) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    try:
        schema = json.loads(schema) if isinstance(schema, str) else _without_nulls(schema)
        if not isinstance(schema, (dict, bool)):
            raise UserError(f"{where}: expected a JSON Schema, found {type(schema).__name__}")
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: this is not valid JSON: {error}") from None
    except SchemaError as error:
        raise UserError(f"{where}: this is not a valid JSON Schema: {error.message}") from None
    return kind(schema, registry=Registry())  # nothing is fetched


def _accepts(validator: Any, value: Any) -> bool:
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise UserError(f"the schema: '{error.ref}' is not in it, and nothing is fetched") from None
    except (RecursionError, OverflowError):  # a number or nesting that the validator cannot handle
        return False


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
