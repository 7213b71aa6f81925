"""`json_valid` and `schema_pass`."""

import json

import pytest

from llmlab.rewards import json_valid, schema_pass
from llmlab.rewards.completions import MAX_DEPTH
from llmlab.settings.errors import UserError

AGE = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": [1, 2.5, null, true, "é漢🎨"]}', 1),
        ("  42 \n", 1),
        ('"only text"', 1),
        ('```json\n{"a": 1}\n```', 1),
        ("```\n[1]\n```", 1),
        ("9" * 10_000, 1),  # JSON sets no limit; Python's int does
        ("-" + "9" * 10_000, 1),
        ("1e999999", 1),
        ("", 0),
        ("{'a': 1}", 0),
        ('{"a": 1,}', 0),
        ("NaN", 0),
        ("[Infinity]", 0),
        ('Here you are: {"a": 1}', 0),
        ("```json\n{}\n```\nand\n```json\n{}\n```", 0),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, 1),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 0),
        ("[" * 200_000 + "]" * 200_000, 0),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, 0),
        ("[" * 200_000, 0),
    ],
)
def test_json_valid(text, score):
    assert json_valid([text, [{"role": "assistant", "content": text}]]) == [score, score]


def test_depth_does_not_depend_on_the_caller():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH

    def deeper(levels):
        return json_valid([text]) if levels == 0 else deeper(levels - 1)

    assert deeper(0) == deeper(500) == [1]


def test_messages_count_the_last_reply():
    episode = [
        {"role": "assistant", "content": "[1]"},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "done"},
    ]
    assert json_valid([episode, episode[:1], episode[1:2], []]) == [0, 1, 0, 0]


def test_schema_as_a_parameter_a_file_and_a_column(tmp_path):
    texts = ['{"age": 3}', '{"age": -1}', '{"age": "3"}', "{}", "no JSON", '{"age": ' + "9" * 6000 + "}"]
    expected = [1, 0, 0, 0, 0, 0]  # the last is read as infinity, which is no integer
    path = tmp_path / "age.json"
    path.write_text(json.dumps(AGE))
    assert schema_pass(texts, json_schema=AGE) == expected
    assert schema_pass(texts, json_schema=str(path)) == expected
    assert schema_pass(texts, schema=[AGE] * 6) == expected
    assert schema_pass(texts, schema=[json.dumps(AGE)] * 6) == expected
    assert schema_pass(texts, form=[AGE] * 6, column="form") == expected
    assert schema_pass(texts[:2], schema=[None, AGE]) == [None, 0]


def test_schemas_that_arrow_filled_with_nulls():
    from datasets import Dataset

    rows = Dataset.from_list([{"schema": AGE}, {"schema": {"type": "array", "maxItems": 2}}])
    assert rows[0]["schema"]["maxItems"] is None  # what the reward has to undo
    assert schema_pass(['{"age": 1}', "[1, 2, 3]"], schema=list(rows["schema"])) == [1, 0]


def test_null_in_const_and_enum_is_meant():
    assert schema_pass(["null", "1"], json_schema={"const": None}) == [1, 0]
    assert schema_pass(["null", "2"], json_schema={"enum": [None, 1]}) == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "there is no such column"),
        ({"shema": [AGE]}, "did you mean 'shema'"),
        ({"schema": [{"type": "wrong"}]}, "row 0: schema: this is not a valid JSON Schema"),
        ({"schema": ["{"]}, "row 0: schema: this is not valid JSON"),
        ({"schema": [3]}, "found int"),
        ({"json_schema": "/nowhere.json"}, "/nowhere.json: cannot be read"),
        ({"json_schema": {"$ref": "https://example.com/schema.json"}}, "nothing is fetched"),
    ],
)
def test_wrong_schemas(arguments, words):
    with pytest.raises(UserError, match=words.replace("/", "/")):
        schema_pass(["{}"], **arguments)


def test_a_schema_that_refers_to_itself_reads_nested_answers():
    tree = {"type": "array", "items": {"$ref": "#"}}
    assert schema_pass(["[[[]], []]", "[[1]]", "[" * 90 + "]" * 90], json_schema=tree) == [1, 0, 1]
