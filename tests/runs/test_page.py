"""Pages of runs: what they show, that nothing in a record can change them, and that no run ends for its page."""

import json
import signal
from html.parser import HTMLParser
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from llmlab.runs import gates
from llmlab.runs import page as pages
from llmlab.runs.gates import CompletionLog
from llmlab.runs.history import open_run
from llmlab.runs.page import write_comparison_page, write_run_page
from llmlab.runs.record import RunRecord, read_completions
from llmlab.training.online.grpo import grpo
from llmlab.training.sft import sft

HOSTILE = "</pre><script>alert(1)</script><img src='http://x'>\x1b[31m\ud800\u202e"


class Page(HTMLParser):
    """A page's elements and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)

    def says(self, text):
        return text in " ".join(" ".join(self.words).split())

    def all(self, name):
        return [value for key, value in self.attributes if key == name]


@pytest.fixture
def folder(tmp_path):
    """Returns a function that makes a run folder of a record, metrics, events and samples."""

    def make(name="run", lines=(), events=(), completions=(), **record):
        place = tmp_path / name
        place.mkdir()
        (place / "llmlab.json").write_text(json.dumps({"stage": "sft", "status": "finished", **record}))
        files = {"metrics.jsonl": lines, "health.jsonl": events, "completions.jsonl": completions}
        for file, rows in files.items():
            if rows:
                (place / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place

    return make


def lines(count=5, **metrics):
    return [{"step": k, "tokens": 10 * k, "seconds": k / 2, "loss": 4 / k, **metrics} for k in range(1, count + 1)]


def show(place):
    return Page(write_run_page(open_run(place)))


def test_a_page_shows_the_run(folder):
    folder("base", stage="pretrain")
    write_run_page(open_run(folder("known", stage="pretrain", metrics={"eval_loss": 3.5})))
    event = {"step": 3, "symptom": "kl_high", "metric": "kl", "value": 0.25, "message": "KL 0.25 is over 0.2"}
    place = folder(
        lines=lines(eval_loss=2.0, learning_rate=1e-3, kl=0.25, **{"loss/a": 1, "loss/b": 2}),
        events=[{**event, "action": "learning_rate 0.001 -> 0.0005"}],
        completions=[{"step": 2, "prompt": "2+2?", "completion": [{"role": "assistant", "content": "It is 4"}]}],
        parents=[str(folder("older", parents=["some/model"])), str(place_of(folder, "known"))],
        settings={"learning_rate": 0.001, "seed": 42, "output_dir": "x"},
        sources={"learning_rate": "a.yaml:3", "seed": "default"},
        data={"sources": [{"name": "demo/chat", "rows": 7, "dropped": {}}], "validation_rows": 9},
        hardware={"device": "cpu", "memory": 16e9},
        versions={"torch": "2.13"},
        git={"revision": "a" * 40},
        metrics={"eval_loss": 2.0},
        started="2026-01-02T03:04:05+00:00",
    )
    page = show(place)
    assert page.tags.count("svg") == 4 and page.tags.count("h1") == 1  # loss, by source, KL, learning rate
    assert "Loss: loss from 4 at step 1 to 0.8 at step 5; eval_loss from 2 at step 1 to 2 at step 5; " in "".join(
        label for label in page.all("aria-label") if label.startswith("Loss: ")
    )
    for text in (
        *("eval_loss 2", "tokens 50", "time 2.5s", "health events 1", "started 2026-01-02 03:04 UTC"),
        *("KL 0.25 is over 0.2", "learning_rate 0.001 -> 0.0005", "step 2 2+2? assistant: It is 4"),
        *("learning_rate 0.001 a.yaml:3", "All 3 settings", "seed 42 default"),
        *("demo/chat 7", "validation rows 9", "memory 16.0 GB", "torch 2.13", "git revision aaaa"),
        *("some/model not a run folder here", "pretrain · eval_loss 3.5"),
    ):
        assert page.says(text), text
    assert page.all("href") == ["../known/report.html"] * 2  # above and in the lineage; the other parent has no page


def place_of(folder, name):
    return folder("elsewhere").parent / name


def test_nothing_in_a_record_becomes_part_of_the_page(folder):
    metric = {HOSTILE: 1.0, f"reward/{HOSTILE}": 2.0}
    event = {"step": 1, "symptom": HOSTILE, "metric": "loss", "value": 1.0, "message": HOSTILE, "action": HOSTILE}
    page = show(
        folder(
            stage=HOSTILE,
            status="diverged",
            reason=HOSTILE,
            lines=lines(**metric),
            events=[event],
            completions=[{"step": 1, "prompt": HOSTILE, "completion": HOSTILE, "rewards": {HOSTILE: 1}}],
            parents=[HOSTILE],
            settings={HOSTILE: {HOSTILE: [HOSTILE]}},
            sources={HOSTILE: HOSTILE},
            data={"sources": [{HOSTILE: HOSTILE, "name": HOSTILE}, 3], HOSTILE: HOSTILE},
            hardware={"device": HOSTILE},
            versions={HOSTILE: HOSTILE},
            git={"revision": HOSTILE},
            resumed=[{"step": 1, "at": HOSTILE}],
        )
    )
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(page.tags)
    assert "\x1b" not in page.text and "\u202e" not in page.text and page.says("<script>alert(1)</script>")
    assert page.says(r"\x1b[31m\ud800\u202e")
    assert all(not name.startswith("on") for name, _ in page.attributes)
    policy = next(value for value in page.all("content") if "default-src" in value)
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert page.all("src") == page.all("href") == []


def test_equal_runs_have_equal_pages(folder):
    place = folder(lines=lines(grad_norm=1.5, reward=2))
    assert show(place).text == show(place).text


def test_a_long_run_of_many_metrics_stays_small(folder):
    draw = [{f"reward/{k}": (step * (k + 7)) % 101 / 7 for k in range(12)} for step in range(3000)]
    names = ("grad_norm", "kl", "entropy", "learning_rate", "success_rate", "completion_length", "value_loss")
    rows = [
        {"step": step, "tokens": step, "seconds": step, "loss": (step * 7919) % 997, **values}
        | {name: (step * 31 + len(name)) % 89 for name in names}
        for step, values in enumerate(draw, 1)
    ]
    assert len(show(folder(lines=rows)).text) < 500_000


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_run_without_a_step_has_a_page(folder, status):
    page = show(folder(status=status))
    assert page.says(f"run {status}") or page.says("run died")
    assert page.says("No curves: this run logged no metrics.") and page.says("All settings are defaults.")


def test_one_step_and_values_that_are_no_numbers(folder):
    place = folder(lines=[{"step": 1, "tokens": 5, "seconds": 1, "loss": 2.5, "grad_norm": None, "kl": "x"}])
    with (place / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 2, "lo')
    page = show(place)
    assert page.tags.count("svg") == 1 and page.says("loss 2.5")


@pytest.mark.parametrize(
    ("lines", "record"),
    [
        (['{"step": 1, "loss": 1%s}' % ("0" * 400), '{"step": 1%s, "loss": 1}' % ("0" * 400)], {}),  # noqa: UP031
        ([{"step": 1, "loss": 1.7e308}, {"step": 2, "loss": -1.7e308}], {}),
        ([{"step": 1}], {"data": {"sources": 3}}),
        ([{"step": 1}], {"data": {"sources": None}}),
    ],
)
def test_numbers_beyond_floats_and_data_of_another_kind_are_left_out(folder, lines, record):
    place = folder(**record)
    (place / "metrics.jsonl").write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    )
    assert show(place).says("No curves: this run logged no metrics.")


def test_samples_are_shown_as_they_were_written(folder):
    call = {"name": "say", "arguments": {"text": "it's <日本>"}}
    messages = [{"role": "assistant", "reasoning_content": "Hm.", "content": None, "tool_calls": [call]}]
    prompts = [{"role": "user", "content": "<" * 3000}]  # without a space at which to cut it
    odd = [3, None, {"role": "tool", "content": {"a": 1}, "tool_calls": 5}]
    rows = [{"step": 1, "prompt": prompts, "completion": messages}, {"step": 2, "completion": odd}]
    page = show(folder(completions=rows))
    assert page.says('assistant: Hm. {"name": "say", "arguments": {"text": "it\'s <日本>"}}')
    assert page.says("user: " + "<" * (1500 - len("user: ...")) + "...") and not page.says("None")
    assert page.says('3 tool: {"a": 1} 5')


def test_references_hold_where_the_folder_of_the_runs_is_a_link(folder, tmp_path):
    deep = folder("deep")
    write_run_page(open_run(folder("deep/base")))
    folder("deep/tuned", parents=[str(deep / "base")])
    link = tmp_path / "link"
    link.symlink_to(deep)
    assert show(link / "tuned").all("href") == ["../base/report.html"] * 2


def test_samples_of_offline_stages_are_the_first_of_each_prompt(folder):
    place = folder(stage="awr")
    sample = {
        "completion": [{"role": "assistant", "content": "", "tool_calls": [{"name": "ls", "arguments": {}}]}],
        "rewards": {"a": 0.5},
    }
    rows = [{"prompt_id": k // 4, "prompt": [{"role": "user", "content": f"task {k}"}], **sample} for k in range(8)]
    (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = show(place)
    assert (
        page.says('a 0.5 user: task 0 assistant: {"name": "ls", "arguments": {}}')
        and page.says("task 4")
        and not page.says("task 1")
    )


def test_a_comparison_has_each_run_in_each_chart(folder, tmp_path):
    a = folder("a", lines=lines(), settings={"lr": 0.1}, sources={"lr": "x"}, metrics={"eval_loss": 2.0})
    b = folder(
        "b",
        lines=lines(kl=0.5),
        settings={"lr": 0.2},
        sources={"lr": "x"},
        metrics={"eval_loss": 1.0, "win_rate": 0.5},
    )
    page = Page(write_comparison_page([open_run(a), open_run(b)], tmp_path / "both.html"))
    labels = [label for label in page.all("aria-label") if " at step " in label]
    assert [label.split(":")[0] for label in labels] == ["loss", "kl"]
    assert "a from 4 at step 1" in labels[0] and "b from 4 at step 1" in labels[0] and "a from" not in labels[1]
    assert page.says("lr 0.1 0.2") and page.says("eval_loss 2 1")
    assert (
        '<b class="best">1</b>' in page.text and page.text.count('class="best"') == 1
    )  # win_rate is of one run alone


def test_a_finished_run_has_a_page_and_samples_and_trains_as_without(sft_settings, quiet, tmp_path):
    changes = {"max_steps": 2, "eval_every": 1, "log_every": 1, "eval_steps": 1}
    plain = sft(sft_settings(report=False, output_dir=tmp_path / "plain", **changes), console=quiet)
    assert not {"report.html", "completions.jsonl"} & {path.name for path in plain.folder.iterdir()}
    result = sft(sft_settings(report=True, **changes), console=quiet)
    assert all(result.metrics[name] == plain.metrics[name] for name in ("loss", "grad_norm", "eval_loss"))
    answers = read_completions(result.folder)
    assert [each["step"] for each in answers] == [1, 1, 2, 2]  # the first and the last evaluation
    assert all("How " in each["prompt"] and isinstance(each["completion"], str) for each in answers)
    page = Page(result.folder / "report.html")
    assert page.says("run finished") and page.says("max_steps 2") and page.says("step 2")
    assert any(label.startswith("Loss: loss from ") and "; eval_loss " in label for label in page.all("aria-label"))


def test_rollouts_are_recorded_as_they_are_sampled(tiny_settings, quiet, tmp_path):
    changes = {"max_steps": 2, "group_size": 2, "mini_batch_size": 8, "gradient_accumulation_steps": 1}
    result = grpo(tiny_settings("grpo", tmp_path / "run", report=True, **changes), console=quiet)
    answers = read_completions(result.folder)
    assert [each["step"] for each in answers] == [1, 1, 2, 2]
    first, second = answers[:2]  # of one group
    assert first["prompt"] == second["prompt"] and first["prompt"][0]["role"] == "user"
    assert all(0 <= each["rewards"]["reward"] <= 1 for each in answers)


def test_what_a_resumed_run_undoes_is_not_shown(folder):
    place = folder(completions=[{"step": step, "prompt": "a", "completion": f"b{step}"} for step in (0, 1, 5, 9)])
    RunRecord(place, stage="sft").start(resumed_step=5)
    assert [each["step"] for each in read_completions(place)] == [0, 1, 5]
    RunRecord(place, stage="sft").start(resumed_step=0)  # which begins again
    assert read_completions(place) == []


def test_the_last_completions_are_recorded_however_near(tmp_path):
    recorded = []
    log = CompletionLog(SimpleNamespace(log_completion=lambda step, **_: recorded.append(step)), None, print)
    for step in (0, 1, 2, 99, 100):  # a fiftieth of the run is two steps
        log.write(SimpleNamespace(global_step=step, max_steps=100), [{"completion": step}])
    assert recorded == [0, 2, 99, 100]


def test_a_model_that_cannot_sample_ends_no_run(sft_settings, monkeypatch):
    calls, console = [], Console(record=True, file=StringIO(), width=200)

    def fail(*args):
        calls.append(args)
        raise AttributeError("the cache has no such method")

    monkeypatch.setattr(gates, "generate_tokens", fail)
    result = sft(sft_settings(report=True, max_steps=3, eval_every=1, eval_steps=1), console=console)
    assert len(calls) == 1 and read_completions(result.folder) == []
    assert "note: no more completions for the report: the cache has no such method" in console.export_text()


def test_an_interrupted_run_has_a_page(sft_settings, quiet, tmp_path, cut_off):
    with cut_off(step=2, how=signal.SIGINT):
        sft(sft_settings(report=True, max_steps=3), console=quiet)
    assert Page(tmp_path / "run" / "report.html").says("run interrupted")


def test_a_page_that_cannot_be_written_ends_no_run(sft_settings, quiet, tmp_path, monkeypatch, capsys):
    def fail(run):
        raise RuntimeError("the figure is too wide")

    monkeypatch.setattr(pages, "write_run_page", fail)
    result = sft(sft_settings(report=True, max_steps=1), console=quiet)
    assert result.metrics["loss"] > 0 and not (tmp_path / "run" / "report.html").exists()
    assert capsys.readouterr().err == "note: no report.html was written: the figure is too wide\n"


def test_the_hardest_validation_rows_are_shown(folder):
    run = folder(lines=lines())
    rows = [{"loss": 5.5, "row": 7, "source": "b.jsonl", "tokens": 12, "text": HOSTILE}, {"loss": 4, "row": 1}]
    (run / "hardest_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[]\n")
    page = Page(write_run_page(open_run(run)))
    assert page.says("Validation rows with the highest loss") and page.says("b.jsonl") and page.says("5.5")
    assert "script" not in page.tags and not page.all("src")
