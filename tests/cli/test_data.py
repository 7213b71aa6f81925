"""`llmlab data check` and `llmlab data preview` in a terminal's words."""

import json
import re

import pytest

from llmlab.cli.app import main
from llmlab.data.tokenizer import learn_bpe
from llmlab.settings.data import DataSource

ROWS = [
    {"question": "What does the cat say?", "answer": "The cat says meow."},
    {"question": "What does the dog say?", "answer": "The dog says woof."},
    {"question": "What does the cat say?", "answer": "The cat says meow."},
    {"question": "Why?", "answer": None},
    {"question": "", "answer": "Что это?"},
    {"question": "Tell me more. " * 30, "answer": "No."},
]


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main(["data", *(str(word) for word in words)])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    learn_bpe([DataSource(name="demo/stories", subset="50kB")], 300, folder, show_progress=False)
    return folder


def test_check_shows_what_was_found_within_80_columns(cli, rows_file, tokenizer):
    code, output, errors = cli("check", rows_file, "demo/chat | 20kB", "-t", tokenizer, "--max-seq-len", 256)
    assert (code, errors) == (0, "")
    assert "question/answer" in output and "messages" in output
    assert re.search(r"dropped: without 'answer' +1 +16\.7 % +4 *\n", output)
    assert re.search(r"same as an earlier row +1 +16\.7 % +3 *\n", output)
    assert re.search(r"empty turn of the user +1 +16\.7 % +5 *\n", output)
    assert re.search(r"no trained token left after truncation +1 +16\.7 % +6 *\n", output)
    assert "Cyrillic" in output
    assert max(map(len, output.splitlines())) <= 80


def test_check_as_json_is_one_object(cli, rows_file, tokenizer):
    code, output, _ = cli("check", rows_file, "--json", "--tokenizer", tokenizer, "--max-seq-len", 256)
    (report,) = json.loads(output)["sources"]
    assert code == 0
    assert (report["rows"], report["usable"], report["columns"]) == (6, 5, ["question", "answer"])
    assert report["dropped"] == {"without 'answer'": {"rows": 1, "first": [4]}}
    assert report["tokens"]["truncated"] == report["tokens"]["lost"] == {"rows": 1, "first": [6]}


def test_unpaired_preferences_are_recognized_and_their_labels_counted(cli, tmp_path):
    path = tmp_path / "kto.jsonl"
    rows = [{"prompt": "Who?", "completion": f"Me {k}.", "label": k % 3 == 0} for k in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, output, _ = cli("check", path)
    assert code == 0 and "prompt/completion, unpaired" in output
    assert "true 10, false 20" in output and "--only-label true" in output
    (report,) = json.loads(cli("check", path, "--json")[1])["sources"]
    assert report["labels"] == {"true": 10, "false": 20} and report["usable"] == 30


def test_limit_reads_no_further(cli, rows_file):
    _, output, _ = cli("check", rows_file, "--json", "--limit", 2)
    (report,) = json.loads(output)["sources"]
    assert report["rows"] == 2 and report["tokens"] is None


def test_plain_text_by_any_usual_column(cli, tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text('{"content": "One page.", "url": "a"}\n{"content": "Another page.", "url": "b"}')
    _, output, _ = cli("check", path, "{name: demo/stories, subset: 5kB}", "--json")
    pages, stories = json.loads(output)["sources"]
    assert pages["format"] == stories["format"] == "plain text"
    assert pages["usable"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["check", "a | b | c | d | e"], "expected 'name | subset (optional) | weight (optional) | split (optional)'"),
        (["check", "demo/chat", "demo/poems"], "there is no such demo corpus"),
        (["check", "demo/chat | 5kB", "--tokenizer", "nowhere/at/all"], "nowhere/at/all"),
        (["preview", "demo/chat | 5kB", "-t", "TOKENIZER", "--chat-template", "x.jinja"], "chat_template = x.jinja"),
        (["check", "COLUMNS"], "no format of instruction data has the columns a, b"),
        (["check", "DAMAGED"], "damaged.jsonl:151: this line is not valid JSON"),
        (["preview", "UNUSABLE", "-t", "TOKENIZER"], "(2 without 'answer')"),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(cli, tmp_path, tokenizer, words, message):
    files = {
        "COLUMNS": ("columns.jsonl", '{"a": 1, "b": 2}'),
        "DAMAGED": ("damaged.jsonl", "\n".join([*[json.dumps(ROWS[0])] * 150, "{"])),
        "UNUSABLE": ("unusable.jsonl", json.dumps(ROWS[3]) + "\n" + json.dumps(ROWS[3])),
    }
    for name, content in files.values():
        (tmp_path / name).write_text(content)
    paths = {key: tmp_path / name for key, (name, _) in files.items()} | {"TOKENIZER": tokenizer}
    code, output, errors = cli(*(paths.get(word, word) for word in words))
    assert code == 2 and output == ""
    assert message in errors and errors.count("error:") == 1 and "Traceback" not in errors


def test_preview_marks_what_is_trained_without_colors(cli, rows_file, tokenizer):
    code, output, errors = cli("preview", rows_file, "-t", tokenizer, "-n", 9)
    assert (code, errors) == (0, "")
    assert output.count("⟦") == 5 + 1  # five usable rows, and the legend
    assert "⟦The cat says meow.<|im_end|>⟧" in output
    assert "<|im_start|>user\nWhat does the cat say?<|im_end|>" in output
    assert "Tokens a row of 5; 0 longer than 1,024, 1 dropped" in output


def test_preview_cuts_and_samples_by_seed(cli, tokenizer):
    words = ["preview", "demo/chat | 20kB", "-t", tokenizer, "-n", 2, "--max-seq-len", 12]
    _, output, _ = cli(*words)
    assert output.count("✂ truncated here: max_seq_len = 12") == 2
    assert cli(*words)[1] == output
    assert cli(*words, "--seed", 1)[1] != output


def test_preview_in_colors(cli, rows_file, tokenizer, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, output, _ = cli("preview", rows_file, "-t", tokenizer, "-n", 9)
    assert "\x1b[30;42mThe cat says meow.\x1b[0m" in output and "⟦" not in output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦The cat says meow." in cli("preview", rows_file, "-t", tokenizer, "-n", 9)[1]


def test_preview_of_what_to_train_on(cli, rows_file, tokenizer):
    _, output, _ = cli("preview", rows_file, "-t", tokenizer, "-n", 9, "--loss-on", "all")
    assert "⟦<|im_start|>user\nWhat does the cat say?" in output


def test_data_cannot_control_the_terminal(cli, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "\x1b[31m[bold]\x07?", "answer": "a\rb"}))
    _, output, _ = cli("preview", path, "-t", tokenizer)
    assert "␛[31m[bold]␇?" in output and "a␍b" in output and "\x1b" not in output
