"""Every benchmark runs, at toy sizes: its tables have the rows that RESULTS.md shows, and no figure is judged."""

import importlib
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Returns a function that runs a benchmark with these words and constants, and returns what it printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *words, **constants):
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    draw = random.Random(0)
    sums = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(60)]
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def chat_model(questions, tmp_path_factory):
    """An untrained chat model in Llama's form, whose tokenizer has ChatML's tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmlab.data.tokenizer import learn_bpe, stop_token_ids
    from llmlab.settings.data import DataSource

    folder = tmp_path_factory.mktemp("model") / "chat"
    tokenizer = learn_bpe([DataSource(name="demo/arithmetic", subset="100kB")], 300, folder, show_progress=False)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=512))
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder


def rows_of(table):
    """Returns the cells of a Markdown table's body."""
    lines = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_train_step(benchmark):
    words = ["--steps", 4, "--batch", 1, "--sequence", 16, "--layers", 1, "--contenders", "llmlab-eager", "trainer"]
    shape = {"vocab": 64, "hidden": 16, "inner": 32, "heads": 2, "kv_heads": 1}
    words += ["sft", "sft-plain"]
    memory = {}

    def here(name, options):
        module = sys.modules["train_step"]
        memory[name] = module.peak_memory(name, options) or 1  # of a process that has been larger before
        return memory[name]

    printed = benchmark("train_step", *words, SHAPE=shape, _memory_in_child=here)
    rows = rows_of(printed)[1:]
    assert [row[0] for row in rows] == [sys.modules["train_step"].CONTENDERS[name] for name in memory]
    assert rows[0][2] == "1.00" and all(float(cell) > 0 for row in rows for cell in (row[1], row[2]))


def test_ceiling(benchmark, monkeypatch):
    for name, size in {"vocab": 64, "hidden": 16, "inner": 32, "heads": 2, "kv_heads": 1}.items():
        monkeypatch.setitem(importlib.import_module("train_step").SHAPE, name, size)
    printed = benchmark("ceiling", "--steps", 4, "--batch", 1, "--sequence", 64, "--layers", 1, "--eager")
    assert re.search(r"\d+% of the ceiling", printed)


def test_tokenize_corpus(benchmark, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Line {i} of a short text. " * 40}) + "\n" for i in range(200)))
    printed = benchmark("tokenize_corpus", text, "--rounds", 1)
    assert "text.jsonl" in printed and re.search(r"\d x", printed)


def test_learning(benchmark, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The cat number {i} sits on mat {i % 7}. " * 4 for i in range(300)))
    sizes = {"BATCH": 2, "SEQUENCE": 32, "WARMUP": 2, "EVALUATIONS": 2}
    words = [text, "--steps", "4", "--vocab-size", "270"]

    def start(words):
        benchmark("learning", *words, **sizes)
        return SimpleNamespace(wait=lambda: 0)

    rows = rows_of(benchmark("learning", *words, **sizes, start=start))[1:]
    assert [row[:2] for row in rows] == [["2", "128"], ["4", "256"]]
    assert all(0 < float(cell) < 10 for row in rows for cell in row[2:])


def test_speedrun(benchmark, tmp_path, monkeypatch):
    text, folder = tmp_path / "text.txt", tmp_path / "runs"
    text.write_text("\n\n".join(f"The cat number {i} sits on mat {i % 7}. " * 4 for i in range(300)))
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 1, "n_kv_heads": 1, "d_ff": 64, "max_seq_len": 32}
    small = {"SHAPE": shape, "PEERS": {"nanochat": [None]}, "OURS": {"adamw": [1e-3, 4e-3]}, "EVALUATIONS": 2}
    words = [text, "--minutes", 0.01, "--seeds", 1, "--folder", folder, "--plot", tmp_path / "plot.png"]
    words += ["--only", "nanochat", "adamw", "--vocab-size", 270, "--own-vocab-size", 270, "--eager"]

    def start(words, cache):
        name = Path(words[1]).stem
        pretrain = importlib.import_module("llmlab.training.pretrain")
        with monkeypatch.context() as patch:  # the runs are in processes of their own, which end
            for attribute in ("PretrainTrainer", "build_model"):
                patch.setattr(pretrain, attribute, getattr(pretrain, attribute))
            benchmark(name, *words[2:], **(small | {"BATCH": 2, "TRIAL": 0} if name == "speedrun" else {}))

    rows = rows_of(benchmark("speedrun", *words, "--trials", 1, **small, BATCH=2, TRIAL=0, start=start))[1:]
    runs = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert [row[0] for row in rows] == ["nanochat", "llmlab, AdamW"] and (tmp_path / "plot.png").is_file()
    best = min(("adamw-0.001-1", "adamw-0.004-1"), key=lambda name: runs[name]["curve"][-1][1])
    assert rows[1][1] == best.split("-")[1] and float(rows[1][6]) == round(runs[best]["curve"][-1][1], 3)
    seconds_until = sys.modules["speedrun"].seconds_until
    assert seconds_until([(1, 4.0), (2, 3.0), (4, 2.0)], 2.5) == 3 and seconds_until([(1, 4.0)], 2.5) is None


def test_speedrun_reads_a_mixture(benchmark, tmp_path):
    """Each row of each data set is a document; replies that were rejected are left out."""
    turn = {"from": "human", "value": "dpo question"}
    rows = {
        "c4_demo.jsonl": [{"text": "web page"}, {"text": "other page"}],
        "gsm8k_train.jsonl": [{"question": "sum", "answer": "four"}],
        "alpaca_en_demo.json": [{"instruction": "task", "input": "", "output": "reply"}],
        "dpo_en_demo.json": [{"conversations": [turn], "chosen": {"value": "good"}, "rejected": {"value": "bad"}}],
    }
    for name, found in rows.items():
        text = "\n".join(map(json.dumps, found)) if name.endswith("l") else json.dumps(found)
        (tmp_path / name).write_text(text)
    documents = importlib.import_module("speedrun").read_text(tmp_path).split("\n\n")
    assert sorted(documents) == ["dpo question\ngood", "other page", "sum\nfour", "task\nreply", "web page"]


@pytest.mark.slow
def test_finetune_learns_as_trl(benchmark, chat_model, questions):
    words = [chat_model, questions, "--rows", 40, "--held-out", 2, "--steps", 6]
    printed = benchmark("finetune", *words)
    assert float(re.search(r"Largest difference (\S+)\. ", printed)[1]) < 1e-4
    assert "gives the same answer to 2 of 2" in printed


def test_finetune_step(benchmark, chat_model, questions):
    words = [chat_model, questions, "sft", "--batch", 2, "--steps", 4, "--only", "time"]
    rows = rows_of(benchmark("finetune_step", *words))[1:]
    assert [row[0] for row in rows] == [
        name.format("sft") for name in sys.modules["finetune_step"].CONTENDERS.values()
    ]
    # of equal weights and rows; in bf16 the mean loss of a few dozen tokens is off by rounding alone
    assert rows[0][2] == "1.00" and all(float(row[5]) < 2e-2 for row in rows)


def test_grpo(benchmark, chat_model, questions):
    words = [chat_model, questions, "--rollouts", 2, "--compared", 1, "--max-new-tokens", 4]
    printed = benchmark("grpo", *words, PROMPTS=2, GROUP=2)
    step, *figures = rows_of(printed)[-1]
    assert step == "1" and figures[0] == figures[1]  # the reward here and TRL's own


def test_rl_step(benchmark, chat_model, questions):
    words = [chat_model, questions, "--rollouts", 2, "--prompts", 2, "--group", 2, "--micro", 2, "--accumulation", 1]
    words += ["--passes", 1, "--max-new-tokens", 4, "--no-memory", "--contenders", "trl", "grpo", "ppo-shared"]
    rows = rows_of(benchmark("rl_step", *words))[1:]
    assert [row[0] for row in rows] == [sys.modules["rl_step"].CONTENDERS[name] for name in words[-3:]]
    assert rows[0][5] == "1.00" and all(float(row[1]) > 0 and float(row[5]) > 0 for row in rows)


def test_ppo_learning(benchmark, tmp_path):
    plot = tmp_path / "plot.png"
    printed = benchmark("ppo_learning", "--samples", 64, "--seeds", 1, "--plot", plot)
    assert "seed 0, GRPO (TRL)" in printed and plot.is_file()


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_preferences(benchmark, chat_model, tmp_path, stage):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = benchmark("preferences", chat_model, pairs, stage, "--rows", 40, "--steps", 3, "--max-length", 64)
    assert re.search(r"\d\.\d{3} \+- \d\.\d{3} of the held-out pairs", printed)


def test_plan_accuracy(benchmark):
    def cells():
        return [sys.modules["plan_accuracy"].cell("sft", "tiny", 2, 16, "fp32")]

    def here(cells):
        cell = sys.modules["plan_accuracy"].measure_cell(cells[0])
        yield {**cell, "measured": max(cell["measured"], 1), "step": None}  # of a process that has been larger before

    printed = benchmark("plan_accuracy", make_cells=cells, run_cells=here)
    row = rows_of(printed)[1]
    assert row[:4] == ["sft", "tiny", "2 x 16", "fp32"] and float(row[6]) > 0
    assert "1 cells: the plan is within 15 %" in printed


def test_gates(benchmark):
    rows = rows_of(benchmark("gates", "--repeats", 2))[1:]
    assert len(rows) == 8 and all(int(row[3].replace(",", "")) > 20 for row in rows)


def test_health(benchmark):
    rows = rows_of(benchmark("health", "--steps", 20, "--width", 32, "--layers", 1))[1:]
    assert [row[0] for row in rows] == ["guard", "checks", "whole steps, watched over others"]


def test_decode(benchmark):
    printed = benchmark("decode", "--layers", 1, "--batches", 2, "--tokens", 6, "--turns", 1)
    assert printed.count("x generate") == 9  # three contenders, three ways of choosing tokens


def test_simulator(benchmark):
    printed = benchmark("simulator", "--episodes", 20)
    assert "100.0%" in printed and printed.count("expert") == printed.count("random") == 5


def test_muon_step(benchmark):
    rows = rows_of(benchmark("muon_step", "--models", "7.7 M", MODELS={"7.7 M": (16, 8, 24, 1)}, TURNS=1))
    assert [row[0] for row in rows] == ["matrices of", "7.7 M"] and len(rows[1]) == 4


def test_scaling(benchmark, tmp_path):
    def here(axis, amounts):
        module = sys.modules["scaling"]
        for amount in amounts:
            shown, seconds, peak = module.measure_point(axis, amount)
            yield shown, seconds, max(peak, 1)  # of a process that has been larger before

    tiny = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    axes = {"sequence": ((16, 32), "tokens", 2, 2), "runs": ((1, 2), "folders", 1, 1)}
    plot = tmp_path / "plot.png"
    printed = benchmark("scaling", "--only", "sequence,runs", "--plot", plot, run_axis=here, SMALL=tiny, AXES=axes)
    rows = rows_of(printed)[1:]
    assert [row[:2] for row in rows] == [["sequence, tokens", "16"], ["sequence, tokens", "32"]] + [
        ["runs, folders", "1"],
        ["runs, folders", "2"],
    ]
    assert rows[0][3] == "" and float(rows[1][3]) < 20 and plot.stat().st_size < 60_000


def test_startup(benchmark, chat_model, questions):
    imports = {"chat": "print('word')"}
    printed = benchmark(
        "startup", chat_model, questions, "--rounds", 1, "--only", "chat,help", IMPORTS=imports, HELP=[[]]
    )
    rows = rows_of(printed)[1:]
    assert [row[0] for row in rows] == ["the first word of `llmlab chat`", "help", "`llmlab --help`"]
    assert float(rows[0][1]) > float(rows[0][2]) and float(rows[2][1]) > 0
