"""`llmlab model ...`, `llmlab tokenizer ...` and `llmlab run` in a terminal's words."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlab.cli.app import main

PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")
TINY = ["d_model=32", "n_heads=2", "n_kv_heads=1", "d_ff=64", "n_layers=2", "max_seq_len=32"]


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def tokenizer(cli, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat meows. The dog barks. The cat and the dog play in the garden all day. " * 40)
    code, output, errors = cli("tokenizer", "train", text, "--vocab-size", 290, "--output-dir", tmp_path / "tokenizer")
    assert code == 0 and "290 entries" in output, errors
    return tmp_path / "tokenizer"


def test_default_model_info(cli):
    code, output, _ = cli("model", "info")
    assert code == 0
    assert "494,005,120" in output and "136,134,656" in output  # Qwen2.5-0.5B without its attention biases
    assert "12,288 bytes in bf16" in output  # 2 x 24 layers x 2 heads x 64 wide x 2 bytes
    for optimizer in ("adamw", "adafactor", "lion", "sophia", "muon"):
        assert optimizer in output


def test_info_of_a_file_with_changes(cli, tmp_path):
    path = tmp_path / "model_config.json"
    path.write_text(json.dumps({"d_model": 64, "n_heads": 4, "vocab_size": 100, "n_layers": 1, "d_ff": 10}))
    _, output, _ = cli("model", "info", path, "tie_word_embeddings=false")
    # embedding, head, q and o, k and v of two heads, three feed-forward matrices, three norms
    total = 2 * 100 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 10 + 3 * 64
    assert f"{total:,}" in output


def test_init_info_and_convert(cli, tokenizer, tmp_path):
    code, _, errors = cli("model", "init", *TINY, f"tokenizer_name={tokenizer}", "--output-dir", tmp_path / "model")
    assert code == 0, errors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == 290 == len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    code, output, _ = cli("model", "info", tmp_path / "model")
    assert code == 0 and f"{model.num_parameters():,}" in output
    code, output, errors = cli("model", "convert", tmp_path / "model", "--to", "llama", "-o", tmp_path / "llama")
    assert code == 0 and "the same logits" in output, errors
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").config.model_type == "llama"
    code, _, errors = cli("model", "convert", tmp_path / "llama", "-o", tmp_path / "back")
    assert code == 0, errors
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.model_type == "llmlab"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "info", "d_model=65"], "d_model = 65 is not divisible by n_heads = 14"),
        (["model", "info", "heads=3"], "unknown key 'heads'"),
        (["model", "info", "nowhere.json"], "there is no such file"),
        (["model", "convert", "nowhere", "-o", "x"], "nowhere"),
        (["tokenizer", "train", "nowhere.txt", "--vocab-size", "300"], "nowhere.txt"),
        (["tokenizer", "train", "demo/stories", "--vocab-size", "100"], "vocab_size = 100: expected at least"),
    ],
)
def test_mistakes(cli, words, message):
    code, _, errors = cli(*words)
    assert code == 2 and message in errors and "Traceback" not in errors


def test_nothing_of_other_packages_is_printed_into_pipes(cli, tokenizer, tmp_path):
    assert cli("model", "init", *TINY, f"tokenizer_name={tokenizer}", "-o", tmp_path / "model")[0] == 0
    code = f"from llmlab.cli.app import main; main(['model', 'convert', {str(tmp_path / 'model')!r}, '--to', 'llama'"
    code += f", '-o', {str(tmp_path / 'llama')!r}])"
    clean = {name: value for name, value in os.environ.items() if "DISABLE" not in name and "VERBOSITY" not in name}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert result.returncode == 0 and "the same logits" in result.stdout and result.stderr == ""


def other_models():
    from transformers import (
        DebertaV2Config,
        DebertaV2ForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
    )

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100, **ends)),
        "mixtral": MixtralForCausalLM(MixtralConfig(vocab_size=100, num_key_value_heads=1, **small)),
        "deberta-v2": DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=100, num_labels=1, **small)),
    }


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "deberta-v2"])
def test_info_of_any_models_folder(cli, tmp_path, kind):
    model = other_models()[kind]
    model.save_pretrained(tmp_path / kind)
    code, output, _ = cli("model", "info", tmp_path / kind)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert code == 0 and f"{kind}\n" in output
    rows = {line.split()[0]: line.split()[1].replace(",", "") for line in output.splitlines() if len(line.split()) > 1}
    assert int(rows["total"]) == total == sum(int(rows.get(part, 0)) for part in PARTS)
    if kind == "mixtral":  # eight experts of three matrices, and what chooses among them
        assert int(rows["mlp"]) == 8 * 3 * 16 * 16 + 8 * 16
    code, _, errors = cli("model", "info", tmp_path / kind, "--sequence", 8)
    assert code == 2 and "--sequence: FLOPs are counted for llmlab's own decoder" in errors


def test_info_of_adapters_and_of_folders_without_a_model(cli, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = other_models()["mixtral"]
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    code, output, errors = cli("model", "info", tmp_path / "adapter")
    assert code == 0 and f"adapters (LORA): {2 * (16 + 16)} parameters" in output, errors
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    for name, message in (("empty", "this folder holds no model"), ("damaged", "cannot be read as a model")):
        code, _, errors = cli("model", "info", tmp_path / name)
        assert code == 2 and message in errors and errors.count("error:") == 1


def test_an_option_that_a_family_cannot_express_is_refused_by_name(cli, tokenizer, tmp_path):
    words = [*TINY, "positional_encoding=alibi", f"tokenizer_name={tokenizer}", "--output-dir", tmp_path / "model"]
    assert cli("model", "init", *words)[0] == 0
    code, _, errors = cli("model", "convert", tmp_path / "model", "--to", "llama", "-o", tmp_path / "llama")
    assert code == 2 and "positional_encoding = alibi, which llama cannot express" in errors
    assert not (tmp_path / "llama").exists()


def test_a_pipeline_from_text_to_samples(cli, tmp_path):
    """Trains for real, then shows that a rerun skips everything."""
    overrides = ["pretrain.max_steps=3", "pretrain.eval_every=3", "pretrain.n_layers=1", "pretrain.d_ff=32"]
    overrides += ["pretrain.batch_size=2", "pretrain.max_seq_len=256", "chat.max_new_tokens=4"]
    overrides += ["sft.datasets=demo/chat | 60kB", "sft.max_steps=2", "sft.batch_size=2", "sft.eval_steps=1"]
    overrides += ["dpo.max_steps=1", "dpo.batch_size=2", "dpo.mini_batch_size=2", "dpo.eval_batches=1"]
    overrides += ["dpo.datasets=demo/preferences | 60kB", "grpo.datasets=demo/arithmetic | 20kB"]
    overrides += ["grpo.max_steps=2", "grpo.batch_size=2", "grpo.group_size=2", "grpo.mini_batch_size=2"]
    overrides += ["grpo.max_new_tokens=4", "grpo.eval_batches=1"]
    words = ["run", "quickstart", f"output_dir={tmp_path / 'runs'}", f"pretrain.cache_dir={tmp_path / 'cache'}"]
    code, output, errors = cli(*words, *overrides)
    assert code == 0, errors
    assert "Write a story about Lily" in output and "validation loss" in output
    assert "before the first step" in output and "validation reward 0.0000 -> 0.0000" in output
    assert len((tmp_path / "runs" / "chat" / "samples.jsonl").read_text().splitlines()) == 3
    _, output, _ = cli(*words, *overrides)
    assert output.count("skip") == 7 and "Write a story" not in output
    _, output, errors = cli(*words, *overrides, "chat.seed=2", "--dry-run")
    assert output.count("skip") == 6, errors
