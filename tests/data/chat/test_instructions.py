"""Instruction rows: formats mixed by weight, held out, proven, cut, cached, and what stops a run before it starts."""

import json
import os
import time

import pytest
from datasets import Dataset

from llmlab.data import workers as workers_module
from llmlab.data.chat import rows as rows_module
from llmlab.data.chat.makers import InstructionEncoder
from llmlab.data.chat.rows import build_rows
from llmlab.data.tokenizer import load_tokenizer
from llmlab.settings.data import DataSettings
from llmlab.settings.errors import UserError

OPTIONS = ("allow_truncated", "seed", "validation_rows", "max_samples", "rows_needed", "rows_before")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count, word="Yes"):
    return [{"prompt": f"Question {k}?", "completion": f"{word} {k}."} for k in range(count)]


@pytest.fixture
def tokenizer(tokenizer_folder):
    """One of our own: its template is changed here."""
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def build(tokenizer, tmp_path):
    def make(*sources, max_seq_len=128, loss_on="assistant", **changes):
        options = {"seed": 3} | {k: changes.pop(k) for k in list(changes) if k in OPTIONS}
        only_label = changes.pop("only_label", None)
        values = {"validation_fraction": 0, "cache_dir": str(tmp_path / "cache"), "num_proc": 1, **changes}
        maker = InstructionEncoder(tokenizer, max_seq_len=max_seq_len, loss_on=loss_on, only_label=only_label)
        return build_rows(DataSettings(datasets=list(sources), **values), maker, **options)

    return make


def texts(rows, tokenizer):
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows["input_ids"]]


def test_sources_of_any_formats_mix_in_the_proportions_of_their_weights(build, tokenizer, tmp_path):
    one = write(tmp_path / "a.jsonl", pairs(300, "First"))
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Second"}]
    two = write(tmp_path / "b.jsonl", [{"conversations": turns, "id": k} for k in range(50)])
    data = build(f"{one} | | 2", f"{two} | | 1")
    found = texts(data.train, tokenizer)
    first = sum("First" in text for text in found)
    assert first / len(found) == pytest.approx(2 / 3, abs=0.06)  # drawn: three standard deviations of 450 draws
    assert len({text for text in found if "First" in text}) == 300  # the larger source is used whole
    assert [report.form for report in data.reports] == ["prompt/completion", "ShareGPT conversations"]
    assert [report.share for report in data.reports] == pytest.approx([2 / 3, 1 / 3])


def test_held_out_rows_are_the_same_every_time_and_equal_rows_stay_together(build, tokenizer, tmp_path):
    rows = pairs(100) + pairs(100)  # every row twice
    source = write(tmp_path / "a.jsonl", rows)
    data, again = build(source, validation_fraction=0.1), build(source, validation_fraction=0.1)
    train, held = texts(data.train, tokenizer), texts(data.validation, tokenizer)
    assert held == texts(again.validation, tokenizer)
    assert len(held) == 20 and len(train) == 180
    assert not set(train) & set(held)
    assert texts(build(source, validation_fraction=0.1, seed=4).validation, tokenizer) != held
    few = build(source, validation_fraction=0.5, validation_rows=6)
    assert len(few.validation) == 6 and len(few.train) == 100  # what trains does not hang on how many validate
    with pytest.raises(UserError, match="too few to hold out validation_fraction = 0.5"):
        build(write(tmp_path / "one.jsonl", pairs(1)), validation_fraction=0.5)


def test_max_samples_draws_a_subset(build, tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", pairs(50))
    few, other = build(source, max_samples=10), build(source, max_samples=10, seed=4)
    assert len(set(texts(few.train, tokenizer))) == 10
    assert texts(few.train, tokenizer) == texts(build(source, max_samples=10).train, tokenizer)
    assert texts(few.train, tokenizer) != texts(other.train, tokenizer)
    assert len(build(source, max_samples=99).train) == 50


def test_max_samples_stops_the_reading(build, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlab.data.sources.LOOK_AT", 5)
    monkeypatch.setattr(rows_module, "SAMPLED_FROM", 5)
    source = write(tmp_path / "a.jsonl", pairs(20))
    with open(source, "a") as file:
        file.write("no JSON\n")
    data = build(source, max_samples=10)
    assert (len(data.train), data.reports[0].rows, data.reports[0].whole) == (10, 11, False)
    with pytest.raises(UserError, match="a.jsonl:21: this line is not valid JSON"):
        build(source)


def test_max_samples_are_drawn_from_more_rows(build, tmp_path, tokenizer):
    """A file in an order of its own gives a sample of all of it, and as many validation rows as without a limit."""
    source = write(tmp_path / "a.jsonl", pairs(400))
    data = build(source, max_samples=40, validation_fraction=0.1, validation_rows=100)
    assert (len(data.train), len(data.validation), data.reports[0].rows) == (40, 40, 400)
    beginning = set(texts(build(write(tmp_path / "b.jsonl", pairs(44))).train, tokenizer))
    assert len(beginning & set(texts(data.train, tokenizer))) < 20


def test_a_named_validation_source_replaces_the_share(build, tokenizer, tmp_path):
    one, two = write(tmp_path / "a.jsonl", pairs(20)), write(tmp_path / "b.jsonl", pairs(7, "Held"))
    data = build(one, validation_fraction=0.5, validation_datasets=[two])
    assert len(data.train) == 20 and len(data.validation) == 7
    assert all("Held" in text for text in texts(data.validation, tokenizer))


def test_long_rows_are_cut_and_counted_and_those_that_lose_everything_left_out(build, tmp_path):
    long_answer = [{"prompt": "Q?", "completion": "word " * 100}]
    long_question = [{"prompt": "word " * 100, "completion": "A."}]
    source = write(tmp_path / "a.jsonl", pairs(97) + long_answer + long_question)
    data = build(source, max_seq_len=64)
    report = data.reports[0]
    assert (report.rows, report.counts["cut"], report.lost, report.trained_rows) == (99, 1, 1, 98)
    assert max(map(len, data.train["input_ids"])) == 64
    assert "98 rows" in report.summary() and "1 truncated, 1 left out: no trained" in report.summary()
    source = write(tmp_path / "b.jsonl", pairs(9) + long_question)
    with pytest.raises(UserError, match=r"1 of 10 rows have nothing left .* first is row 10 with \d+ tokens; 95 %"):
        build(source, max_seq_len=64)
    assert len(build(source, max_seq_len=64, allow_truncated=0.1).train) == 9


def test_unusable_rows_are_counted_and_too_many_stop_the_run(build, tmp_path):
    bad = [{"prompt": "Q", "completion": None}]
    data = build(write(tmp_path / "a.jsonl", pairs(39) + bad))
    assert data.reports[0].dropped == {"without 'completion'": 1}
    assert data.record()["sources"][0]["dropped"] == {"without 'completion'": 1}
    source = write(tmp_path / "b.jsonl", pairs(4) + bad)
    with pytest.raises(UserError, match="1 of 5 rows cannot be used, the first is row 5: 1 x without 'comp"):
        build(source)
    assert len(build(source, allow_dropped=0.5).train) == 4


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # nothing marked as the assistant's
        (
            "{% for m in messages %}{% if m.role == 'model' %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "row 1 .* nothing in it is trained",
        ),
        # the end of the turn outside of the marks: a model trained so never stops
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
            "row 1 .* end of its last turn is not trained.*expected .*<.im_end.>.*set chat_template=chatml",
        ),
        (
            "<|im_start|><|im_start|>{% for m in messages %}"
            "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
            "row 1 .* begins with <.im_start.> twice",
        ),
        (
            "{% for m in messages %}{% generation %}<|pad|>{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
            "row 1 .* padding token <.pad.> is trained",
        ),
    ],
)
def test_wrong_masks_are_refused_with_row_and_fix(build, tokenizer, tmp_path, template, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        build(write(tmp_path / "a.jsonl", pairs(3)))


def test_rendered_rows_are_cached_by_everything_that_decides_them(build, tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", pairs(5))
    rendered = []
    original = rows_module._MakeRows.__call__
    monkeypatch.setattr(
        rows_module._MakeRows, "__call__", lambda self, rows: rendered.append(1) or original(self, rows)
    )

    def renders(**changes):
        before = len(rendered)
        build(source, **changes)
        return len(rendered) > before

    assert renders() and not renders() and not renders(seed=9)
    assert renders(loss_on="all") and renders(max_seq_len=64)
    tokenizer.chat_template = tokenizer.chat_template + "\n"
    assert renders() and not renders()
    write(tmp_path / "a.jsonl", pairs(6))
    assert renders() and not renders()


def test_what_no_format_has_is_explained(build, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "Q", "complétion": "A"}])
    with pytest.raises(UserError, match="closest is prompt/completion, which lacks completion; did you mean"):
        build(source)


def test_unpaired_preferences_are_refused_until_a_label_is_chosen(build, tokenizer, tmp_path):
    rows = [{**row, "label": k % 4 != 0} for k, row in enumerate(pairs(40))]
    source = write(tmp_path / "kto.jsonl", rows)
    with pytest.raises(UserError, match=r"kto.jsonl: its column 'label' marks unpaired .*--only-label true"):
        build(source)
    good, bad = build(source, only_label=True), build(source, only_label=False)
    assert (len(good.train), len(bad.train)) == (30, 10)
    assert {text.split()[-1] for text in texts(bad.train, tokenizer)} == {f"{k}." for k in range(0, 40, 4)}
    (report,) = good.reports
    assert (report.left_out, report.dropped.total()) == (10, 0)  # they do not count as dropped
    assert "10 with the other label left out" in report.summary()


def test_rows_without_a_label_are_dropped_and_a_label_must_be_there(build, tmp_path):
    rows = [{**row, "label": True} for row in pairs(40)]
    rows[7]["label"] = None
    report = build(write(tmp_path / "a.jsonl", rows), only_label=True).reports[0]
    assert dict(report.dropped) == {"without a 'label' that is true or false": 1}
    with pytest.raises(UserError, match="all of its 40 rows have another label|39 rows"):
        build(write(tmp_path / "b.jsonl", [row for row in rows if row["label"]]), only_label=False)
    with pytest.raises(UserError, match="only_label = true: .*c.jsonl has no column 'label'"):
        build(write(tmp_path / "c.jsonl", pairs(4)), only_label=True)


def test_empty_conversations_are_dropped_and_counted(build, tmp_path):
    rows = [*pairs(40), {"prompt": "Question?", "completion": " "}]
    report = build(write(tmp_path / "a.jsonl", rows)).reports[0]
    assert dict(report.dropped) == {"every assistant turn is empty": 1}
    with pytest.raises(UserError, match="3 of 43 rows cannot be used, .*3 x every assistant turn is empty"):
        build(write(tmp_path / "b.jsonl", rows + rows[-1:] * 2))


@pytest.mark.parametrize(("num_proc", "workers"), [(None, 3), (2, 2), (1, 1)])
def test_rows_are_rendered_by_so_many_processes(num_proc, workers, build, tmp_path, monkeypatch):
    """`num_proc` unset is every core."""
    monkeypatch.setattr(rows_module, "BATCH", 2)
    monkeypatch.setattr(workers_module, "SERIAL_BATCHES", 0)
    monkeypatch.setattr(workers_module, "cores", lambda: 3)
    make = InstructionEncoder.make

    def slow_make(self, row):
        time.sleep(0.02)  # so that every process gets some
        return {**make(self, row), "cut": os.getpid()}

    monkeypatch.setattr(InstructionEncoder, "make", slow_make)
    rows = build(write(tmp_path / "a.jsonl", pairs(30)), num_proc=num_proc)
    [folder] = [path for path in tmp_path.rglob("rows-*") if path.is_dir()]
    assert len(set(Dataset.from_file(str(folder / "rows.arrow"))["cut"])) == workers
    monkeypatch.setattr(InstructionEncoder, "make", make)
    assert (
        rows.train["input_ids"][:]
        == build(str(tmp_path / "a.jsonl"), num_proc=1, max_seq_len=1023).train["input_ids"][:]
    )


def test_a_source_is_read_only_as_far_as_the_run_needs(build, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "READ_AT_LEAST", 40)
    source = write(tmp_path / "a.jsonl", pairs(200))
    data = build(source, rows_needed=70, validation_rows=10, validation_fraction=0.1)
    recorded = data.record()["sources"][0]
    assert (recorded["rows"], recorded["whole"]) == (86, False)  # 70 / 0.9, and a tenth
    assert (len(data.train), len(data.validation)) == (77, 9)
    assert "reads 86 of more" in data.summary()
    assert build(source, rows_needed=3).reports[0].rows == 40  # a short run draws from as many
    monkeypatch.setattr(rows_module, "SAMPLED_FROM", 5)
    assert build(source, rows_needed=1000, max_samples=50).reports[0].rows == 55
    whole = build(source, rows_needed=1000)
    assert (whole.reports[0].rows, whole.reports[0].whole) == (200, True)
    assert build(source).reports[0].rows == 200
    resumed = build(source, rows_needed=1000, rows_before=[86], validation_rows=10, validation_fraction=0.1)
    assert texts(resumed.train, tokenizer) == texts(data.train, tokenizer)
