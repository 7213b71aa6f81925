"""`llmlab evaluate`: its table, report and exit codes."""

import json
import shutil
import sys
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM

from llmlab.cli.app import main


@pytest.fixture
def texts(tmp_path):
    rows = [{"prompt": f"How {k}: the cow?", "text": f"The cow moos loudly {k}."} for k in range(20)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate(capsys):
    """Returns a function that runs the command and returns its exit code and what it printed."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", *map(str, words), "--device", "cpu", "--dtype", "fp32"])
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out + printed.err

    return run


@pytest.fixture
def gates_file(texts, tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text(
        f"- {{name: perplexity, prompts: {texts}}}\n"
        f"- {{name: length, prompts: {texts}, max_new_tokens: 4, parameters: {{target: 4}}}}\n"
    )
    return path


def test_the_same_model_passes_and_a_damaged_one_fails(evaluate, gates_file, base_folder, tmp_path):
    code, text = evaluate(base_folder, "--gates", gates_file, "--baseline", base_folder)
    assert code == 0 and text.count("passes") == 2
    damaged = tmp_path / "damaged"
    shutil.copytree(base_folder, damaged)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    for parameter in model.parameters():
        parameter.data *= 2.5
    model.save_pretrained(damaged)
    words = ("--gates", gates_file, "--baseline", base_folder)
    code, text = evaluate(damaged, *words)
    assert code == 3 and "perplexity fails: regressed by" in text
    report = json.loads(evaluate(damaged, *words, "--json")[1])
    assert not report["passed"] and report["gates"][0]["failures"] and report["gates"][0]["high"] > 0
    assert report["gates"][0]["settings"]["n"] == 100 and report["gates"][0]["prompts"] == 20
    code, text = evaluate(damaged, "--gates", gates_file, "--json")
    assert code == 0 and json.loads(text)["gates"][0]["baseline"] is None


def test_thresholds_and_names(evaluate, texts, base_folder, tmp_path):
    words = ("--gates", "json_valid,distinct_n", "--prompts", texts, "--n", 6, "--max-new-tokens", 4)
    code, text = evaluate(base_folder, *words)
    assert code == 0 and "json_valid" in text and "needs" in text and "it has 6" in text
    strict = tmp_path / "strict.yaml"
    strict.write_text("gates:\n- {name: json_valid, min: 0.9}\n")
    code, text = evaluate(base_folder, "--gates", strict, *words[2:])
    assert code == 3 and "json_valid fails: 0 is below min = 0.9" in text


def test_the_command_line_wins_over_the_file(evaluate, texts, base_folder, tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text(f"- {{name: perplexity, n: 3, prompts: {texts}}}\n")
    for words, count in (((), 3), (("-n", 6), 6), (("--n", 100), 20)):
        _, text = evaluate(base_folder, "--gates", path, "--json", *words)
        assert json.loads(text)["gates"][0]["prompts"] == count


def test_a_perplexity_that_is_not_finite_fails(evaluate, gates_file, base_folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(base_folder, damaged)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    next(model.parameters()).data[:] = float("nan")
    model.save_pretrained(damaged)
    code, text = evaluate(damaged, "--gates", "perplexity", "--prompts", gates_file.parent / "texts.jsonl")
    assert code == 3 and "perplexity fails: the score is not finite" in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "gates.yaml: there are no gates in it"),
        ("gates: []", "gates.yaml: there are no gates in it"),
        ("gate: [json_valid]", "gates.yaml: unknown key 'gate'"),
        ("gates: [json_valid]\nn: 5", "gates.yaml: unknown key 'n'"),
    ],
)
def test_files_without_gates(text, problem, evaluate, base_folder, tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    code, printed = evaluate(base_folder, "--gates", path)
    assert code == 2 and problem in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--gates", "json_vald", "-p", "TEXTS"), "did you mean 'json_valid'"),
        (("--gates", "json_valid", "-p", "nowhere.jsonl"), "nowhere.jsonl: there is no such file"),
        (("--gates", "json_valid", "-p", "TEXTS", "--baseline", "./no/run"), "./no/run: there is no such folder"),
    ],
)
def test_mistakes_come_before_the_model_is_loaded(words, problem, evaluate, texts, base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmlab.inference.load_for_inference", None)
    code, text = evaluate(base_folder, *(texts if word == "TEXTS" else word for word in words))
    assert code == 2 and problem in text and len(text.splitlines()) == 1
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "--gates is missing"),
        (("--gates", "nowhere.yaml"), "nowhere.yaml: there is no such file"),
        (("--gates", "json_vald", "--prompts", "TEXTS"), "there is no such score; did you mean 'json_valid'"),
        (("--gates", "json_valid"), "it has no prompts"),
        (("--gates", "json_valid", "--prompts", "TEXTS", "--num-samples", "2"), "all samples are the same"),
        (("--lm-eval", "piqa"), "lm-evaluation-harness is not installed"),
    ],
)
def test_mistakes_end_with_one_sentence(words, problem, evaluate, texts, base_folder):
    code, text = evaluate(base_folder, *(texts if word == "TEXTS" else word for word in words))
    assert code == 2 and problem in text and len(text.splitlines()) == 1


def test_a_file_with_mistakes(evaluate, texts, base_folder, tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text("- {name: json_valid, mim: 1}\n- {name: length, min: 2, max: 1}\n")
    code, text = evaluate(base_folder, "--gates", path, "--prompts", texts)
    assert code == 2 and "gates[0].mim" in text and "gates.yaml" in text and "must be below max" in text


def test_the_harness_where_it_is_installed(evaluate, base_folder, monkeypatch):
    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    harness, models, wrapper = map(ModuleType, names)
    harness.__spec__ = object()
    wrapper.HFLM = lambda pretrained, tokenizer, batch_size: (pretrained, tokenizer)

    def simple_evaluate(model, tasks):
        assert tasks == ["piqa", "arc_easy"] and hasattr(model[0], "generate")
        return {"results": {task: {"alias": task, "acc,none": 0.5} for task in tasks}}

    harness.simple_evaluate = simple_evaluate
    for module in (harness, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    code, text = evaluate(base_folder, "--lm-eval", "piqa,arc_easy")
    assert code == 0 and text.count("acc,none") == 2 and "0.5" in text
