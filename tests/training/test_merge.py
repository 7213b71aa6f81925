"""Merging gives the logits that base and adapter give in PEFT alone, and every mistake has its sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llmlab.adapters import find_targets
from llmlab.cli.app import main
from llmlab.data.tokenizer import load_tokenizer, stop_token_ids
from llmlab.model import LLMLabConfig, LLMLabForCausalLM
from llmlab.pipeline import execute, plan, read_pipeline
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer
from llmlab.settings.lora import MergeSettings
from llmlab.settings.sources import resolve
from llmlab.training import merge as stage
from llmlab.training.merge import merge

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.3}
KINDS = ("llmlab-tied", "llmlab-untied", "llama", "gpt2")
VARIANTS = ("lora", "dora", "rslora", "biases", "head", "embedding", "lora-embedding", "lora-head", "new-tokens")


def new_base(kind, folder, tokenizer_folder, dtype=torch.float32, **changes):
    """Saves a random model with its tokenizer."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
        model = GPT2LMHeadModel(GPT2Config(**{"vocab_size": len(tokenizer), **shape, **changes}))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(tokenizer), **SHAPE, **changes}))
    else:
        tied = kind == "llmlab-tied"
        values = {"vocab_size": len(tokenizer), **SHAPE, "tie_word_embeddings": tied, **changes}
        model = LLMLabForCausalLM(LLMLabConfig(**values))
    model.generation_config.eos_token_id = 7
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def new_adapter(base, folder, variant="lora", size=0.2, config=None):
    """Saves an adapter with random weights, and its tokenizer, as training with PEFT does."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    leaf = "wte" if model.config.model_type == "gpt2" else "embed_tokens"
    values = {"r": 4, "lora_alpha": 8, "target_modules": find_targets(model, "all"), "task_type": "CAUSAL_LM"}
    if variant == "new-tokens":
        tokenizer.add_tokens(["<one>", "<two>", "<three>"])
        model.resize_token_embeddings(len(tokenizer))
        rows = [5, *range(len(tokenizer) - 3, len(tokenizer))]
        tied = model.config.tie_word_embeddings
        values["trainable_token_indices"] = {leaf: rows} | ({} if tied else {"lm_head": rows})
    values |= {
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "biases": {"bias": "all"},
        "head": {"modules_to_save": ["lm_head"]},
        "embedding": {"modules_to_save": [leaf]},
        "lora-embedding": {"target_modules": [*values["target_modules"], leaf]},
        "lora-head": {"target_modules": [*values["target_modules"], "lm_head"]},
    }.get(variant, {})
    wrapped = get_peft_model(model, config or LoraConfig(**values))
    torch.manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad and ("lora_" not in name or "lora_B" in name or "embedding_A" in name):
            weight.data.add_(torch.randn(weight.shape) * size)
    wrapped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_peft(base, adapter, dtype=torch.float32):
    """Returns base and adapter in fp32, as PEFT alone loads them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=dtype), AutoTokenizer.from_pretrained(adapter)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def every_token(rows):
    """Returns each token of the vocabulary once, in rows of 20."""
    return torch.arange(rows + -rows % 20).remainder(rows).view(-1, 20)


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits.float()


def quietly(**values):
    return merge(MergeSettings(**{key: str(value) for key, value in values.items()}), console=Console(quiet=True))


@pytest.fixture
def base(tmp_path, tokenizer_folder):
    return new_base("llmlab-tied", tmp_path / "base", tokenizer_folder)


@pytest.fixture
def adapter(base, tmp_path):
    return new_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_computes_what_base_and_adapter_compute(kind, variant, tmp_path, tokenizer_folder):
    base = new_base(kind, tmp_path / "base", tokenizer_folder)
    adapter = new_adapter(base, tmp_path / "adapter", variant)
    result = quietly(adapter=adapter, output_dir=tmp_path / "merged")
    merged, reference = AutoModelForCausalLM.from_pretrained(result.folder).eval(), with_peft(base, adapter)

    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    rows = merged.get_input_embeddings().num_embeddings
    assert rows == len(tokenizer) == (303 if variant == "new-tokens" else 300)
    ids = every_token(rows)
    expected = logits_of(reference, ids)
    torch.testing.assert_close(logits_of(merged, ids), expected, atol=1e-4, rtol=0)
    assert (expected[..., :300] - logits_of(AutoModelForCausalLM.from_pretrained(base), ids % 300)).abs().max() > 0.1
    assert result.metrics["max_difference"] < 1e-6 < result.metrics["difference_to_base"]
    config = json.loads((result.folder / "config.json").read_text())
    assert config["use_cache"] is True and tokenizer.model_max_length == merged.config.max_position_embeddings

    ends = merged.generation_config.eos_token_id
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=ends)
    prompt = ids[:3, :6]
    written = [model.generate(input_ids=prompt, generation_config=greedy) for model in (merged, reference)]
    assert torch.equal(*written)
    assert not any("lora" in name for name in load_file(result.folder / "model.safetensors"))
    # one of two tied weights changed: from then on there are two
    alone = variant in ("head", "embedding", "lora-embedding", "lora-head")
    assert merged.config.tie_word_embeddings == (kind in ("llmlab-tied", "gpt2") and not alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.parametrize("kind", ("llmlab-tied", "llama"))
def test_precision_stop_tokens_and_template_are_kept(kind, tmp_path, tokenizer_folder):
    base = new_base(kind, tmp_path / "base", tokenizer_folder, torch.bfloat16)
    adapter = new_adapter(base, tmp_path / "adapter")
    result = quietly(adapter=adapter, output_dir=tmp_path / "merged")
    assert {weight.dtype for weight in load_file(result.folder / "model.safetensors").values()} == {torch.bfloat16}
    merged = AutoModelForCausalLM.from_pretrained(result.folder)
    assert merged.dtype == torch.bfloat16
    expected = with_peft(base, adapter).merge_and_unload().state_dict()  # rounded once, at the end
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    assert 1e-4 < result.metrics["rounding_difference"] < result.metrics["difference_to_base"]
    tokenizer = load_tokenizer(str(result.folder))
    assert merged.generation_config.eos_token_id == [*stop_token_ids(tokenizer), 7]
    assert tokenizer.chat_template == load_tokenizer(str(tokenizer_folder)).chat_template
    kept = quietly(adapter=adapter, output_dir=tmp_path / "whole", dtype="fp32")
    assert AutoModelForCausalLM.from_pretrained(kept.folder).dtype == torch.float32
    assert 0 < kept.metrics["rounding_difference"] < 1e-5  # to fp32, of what was merged in float64


def test_a_base_that_does_not_say_its_precision(tmp_path, tokenizer_folder):
    base = new_base("gpt2", tmp_path / "base", tokenizer_folder, torch.float16)
    values = json.loads((base / "config.json").read_text())
    del values["dtype"]
    (base / "config.json").write_text(json.dumps(values))
    folder = quietly(adapter=new_adapter(base, tmp_path / "adapter"), output_dir=tmp_path / "merged").folder
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16


def test_record_and_what_is_printed(base, adapter, tmp_path):
    (adapter / "trainer_state.json").write_text('{"global_step": 120}')  # a checkpoint of the Trainer
    (adapter / "llmlab.json").write_text('{"stage": "sft", "settings": {"use_qlora": true}}')
    shutil.copytree(adapter, adapter / "ref")  # TRL's frozen copy
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "log").open("w"))
    folder = tmp_path / "deep" / "merged"
    result = merge(MergeSettings(adapter=str(adapter), output_dir=str(folder)), console=console)
    record = json.loads((folder / "llmlab.json").read_text())
    assert record["stage"] == "merge" and record["status"] == "finished" and record["metrics"] == result.metrics
    assert record["parents"] == [str(adapter), str(base)]
    assert record["adapter"]["step"] == 120 and record["adapter"]["r"] == 4
    assert result.metrics["merged_modules"] == 2 * 7  # q, k, v, o, gate, up, down in two layers
    printed = console.export_text()
    for words in (
        "type LORA, r 4, alpha 8",
        "in float32",
        "in float64 (1e-05 is allowed)",
        "4 bits (QLoRA)",
        str(folder),
    ):
        assert words in printed


def test_run_folders_and_moved_bases(base, adapter, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.move(adapter, run / "best_lora_adapters")
    for path in (run / "best_lora_adapters").glob("*token*"):
        shutil.move(path, run)  # the tokenizer lies in the run folder
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(UserError, match="does not load; give it with --base"):
        quietly(adapter=run, output_dir=tmp_path / "merged")
    folder = quietly(adapter=run, base=tmp_path / "moved", output_dir=tmp_path / "merged").folder
    ids = every_token(300)
    for path in run.glob("*token*"):
        shutil.copy(path, run / "best_lora_adapters")
    expected = logits_of(with_peft(tmp_path / "moved", run / "best_lora_adapters"), ids)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(merged, ids), expected, atol=1e-4, rtol=0)


def test_other_kinds_of_adapters_that_change_weights(base, tmp_path):
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    adapter = new_adapter(base, tmp_path / "adapter", config=config)
    folder = quietly(adapter=adapter, output_dir=tmp_path / "merged").folder
    ids = every_token(300)
    expected = logits_of(with_peft(base, adapter), ids)
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(folder), ids), expected, atol=1e-4, rtol=0
    )


# Mistakes ---------------------------------------------------------------------------------------------------------


def remove(*names):
    def change(adapter):
        for name in names:
            (adapter / name).unlink()

    return change


def configure(**changes):
    def change(adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def reweigh(change_one):
    def change(adapter):
        path = adapter / "adapter_model.safetensors"
        save_file({name: change_one(name, weight) for name, weight in load_file(path).items()}, path)

    return change


def drop_a_weight(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(iter(weights)))
    save_file(weights, path)


def split(adapter):
    (adapter / "one").mkdir()
    for path in [path for path in adapter.iterdir() if path.is_file()]:
        path.rename(adapter / "one" / path.name)
    shutil.copytree(adapter / "one", adapter / "two")


def unfinished(adapter):
    shutil.copytree(adapter, adapter / "checkpoint-9")
    shutil.copytree(adapter / "checkpoint-9", adapter / "checkpoint-10")
    remove("adapter_config.json", "adapter_model.safetensors")(adapter)


def cut_off(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


ADAPTER_MISTAKES = {
    "no config": (remove("adapter_config.json"), "Could not load LoRA config: .* has no adapter_config.json; check"),
    "no JSON": (lambda a: (a / "adapter_config.json").write_text("{"), "Could not load LoRA config"),
    "unknown type": (configure(peft_type="LORAX"), "Could not load LoRA config: cannot be read as"),
    "no weights": (remove("adapter_model.safetensors"), "Adapter folder not found: .* no adapter_model.safetensors"),
    "empty": (remove("adapter_config.json", "adapter_model.safetensors"), "Adapter folder not found: this folder has"),
    "unfinished": (unfinished, "Adapter folder not found: .*did you mean .*checkpoint-10"),
    "several": (split, r"several adapters \(one, two\).*can't merge multiple adapters .* \(they'd interfere\)"),
    "cut off": (cut_off, "cannot be read as an adapter's weights"),
    "no base": (configure(base_model_name_or_path=None), "names no base model; give it with --base"),
    "other task": (configure(task_type="TOKEN_CLS"), "this adapter is for TOKEN_CLS"),
    "unreachable base": (configure(base_model_name_or_path="nobody/nothing"), "nobody/nothing, which does not load"),
    "weights missing": (drop_a_weight, "does not fit base = .* not in the adapter"),
    "other targets": (configure(target_modules=["query"]), "does not fit base = .*Target modules"),
    "untrained": (reweigh(lambda name, w: w * 0 if "lora_B" in name else w), "changes nothing: every lora_B is zero"),
    "alpha 0": (configure(lora_alpha=0), "the adapter changes nothing: its weights do not reach the logits"),
    "broken": (reweigh(lambda name, w: w * float("nan")), "logits are not finite"),
    "tokens": (configure(trainable_token_indices=[5, 400]), "it trains token 400, and .* have 300 tokens"),
}


def everything_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("mistake", ADAPTER_MISTAKES)
def test_mistakes_of_the_adapter(mistake, adapter, tmp_path):
    change, message = ADAPTER_MISTAKES[mistake]
    change(adapter)
    before = everything_below(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        quietly(adapter=adapter, output_dir=tmp_path / "new" / "merged")
    assert "\n" not in str(caught.value)
    assert everything_below(tmp_path) == before


def test_mistakes_of_the_path(base, adapter, tmp_path):
    merged = quietly(adapter=adapter, output_dir=tmp_path / "merged").folder
    before = everything_below(tmp_path)
    for source, message in {
        tmp_path / "adaptor": "Adapter folder not found: there is no such folder; .*completed.*did you mean 'adapter'",
        adapter / "adapter_config.json": f"Adapter folder not found: this is a file; .*did you mean {adapter}",
        base: "Checkpoint doesn't have LoRA parameters: it is a whole model",
        merged: r"Checkpoint doesn't have LoRA parameters: .*merged already \(it was",
    }.items():
        with pytest.raises(UserError, match=message):
            quietly(adapter=source, output_dir=tmp_path / "again")
    with pytest.raises(UserError, match="already holds a run"):
        quietly(adapter=adapter, output_dir=merged)
    assert everything_below(tmp_path) == before


def test_mistakes_of_the_base(base, adapter, tmp_path, tokenizer_folder):
    def other(name, kind="llmlab-tied", **changes):
        return new_base(kind, tmp_path / name, tokenizer_folder, **changes)

    def quantized():
        folder = shutil.copytree(base, tmp_path / "quantized")
        values = json.loads((folder / "config.json").read_text())
        values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    bases = {
        other("wide", hidden_size=32): "does not fit base = .*size mismatch",
        other("deep", num_hidden_layers=3): "does not fit base = .* not in the adapter",
        other("flat", num_hidden_layers=1): "does not fit base = .* has no place there",
        other("gpt2", "gpt2"): "does not fit base = .*Target modules",
        quantized(): r"stored quantized \(bitsandbytes\).*give --base with the unquantized model",
        adapter: r"this is an adapter too, .*\(they'd interfere\)",
        tmp_path / "bose": "base = .*there is no such folder.*did you mean 'base'",
    }
    before = everything_below(tmp_path)
    for place, message in bases.items():
        with pytest.raises(UserError, match=message) as caught:
            quietly(adapter=adapter, base=place, output_dir=tmp_path / "merged")
        assert "\n" not in str(caught.value)
    assert everything_below(tmp_path) == before


def test_adapters_that_change_no_weights_are_refused(base, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapter = new_adapter(base, tmp_path / "adapter", config=config)
    with pytest.raises(UserError, match="type PROMPT_TUNING adds to a model's inputs, not to its weights"):
        quietly(adapter=adapter, output_dir=tmp_path / "merged")


def test_an_untrained_dora_changes_nothing(base, tmp_path):
    adapter = new_adapter(base, tmp_path / "adapter", "dora", size=0)  # its norms round, so logits move a little
    with pytest.raises(UserError, match="every lora_B is zero"):
        quietly(adapter=adapter, output_dir=tmp_path / "merged")


def test_what_rounding_loses(tmp_path, tokenizer_folder):
    base = new_base("llama", tmp_path / "base", tokenizer_folder, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base)
    for layer in model.model.layers:  # the step of bf16 at 0.25 is 2^-10: less than half of it vanishes
        layer.self_attn.q_proj.weight.data.sign_().mul_(0.25)
    model.save_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    adapter = new_adapter(base, tmp_path / "adapter", config=config, size=1e-4)
    before = everything_below(tmp_path)
    with pytest.raises(UserError, match="vanish when rounded to bfloat16: expected dtype=fp32"):
        quietly(adapter=adapter, output_dir=tmp_path / "merged")
    assert everything_below(tmp_path) == before
    quietly(adapter=adapter, output_dir=tmp_path / "merged", dtype="fp32")

    small = new_adapter(base, tmp_path / "small", size=2e-4)
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    merge(MergeSettings(adapter=str(small), output_dir=str(tmp_path / "other")), console=console)
    assert "rounding moves logits almost as much as the adapter does; dtype=fp32" in console.export_text()


def test_weights_too_large_for_fp16_are_refused(base, tmp_path):
    adapter = new_adapter(base, tmp_path / "adapter", size=1e6)
    with pytest.raises(UserError, match="do not fit into float16"):
        quietly(adapter=adapter, output_dir=tmp_path / "merged", dtype="fp16")
    assert not (tmp_path / "merged").exists()


def test_a_model_that_is_not_what_was_merged_is_never_published(adapter, tmp_path, monkeypatch):
    write = stage.save_model

    def write_another(model, tokenizer, folder):
        write(model, tokenizer, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] += 0.001
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    before = everything_below(tmp_path)
    monkeypatch.setattr(stage, "save_model", write_another)
    with pytest.raises(RuntimeError, match="after reading it back: 1 weights, such as model.norm.weight"):
        quietly(adapter=adapter, output_dir=tmp_path / "merged")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(RuntimeError, match="differ by .* from those of base and adapter"):
        quietly(adapter=adapter, output_dir=tmp_path / "merged")
    assert everything_below(tmp_path) == before


def test_writing_that_stops_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = everything_below(tmp_path)
    monkeypatch.setattr(LLMLabForCausalLM, "save_pretrained", full)
    with pytest.raises(UserError, match=f"output_dir = {tmp_path / 'merged'}: writing stopped: .*No space left"):
        quietly(adapter=adapter, output_dir=tmp_path / "merged")
    assert everything_below(tmp_path) == before


def test_two_adapters_in_settings(tmp_path):
    layer = Layer("r.yaml", {"adapter": ["a", "b"]})
    with pytest.raises(
        UserError, match=r"r.yaml: adapter = \[a, b\]: can't merge multiple adapters .*they'd interfere"
    ):
        resolve(MergeSettings, layer)
    assert resolve(MergeSettings, Layer("r.yaml", {"adapter": ["a"]})).settings.adapter == "a"


# In use -----------------------------------------------------------------------------------------------------------


def test_as_a_stage_of_a_pipeline(adapter, tmp_path):
    path = tmp_path / "p.yaml"
    prompts = "{model: '${merge}', prompts: [The cat], max_new_tokens: 4}"
    path.write_text(f"output_dir: {tmp_path / 'out'}\nstages:\n  merge: {{adapter: {adapter}}}\n  sample: {prompts}\n")
    pipeline = read_pipeline(path)
    assert [step.stage.name for step in execute(pipeline, plan(pipeline))] == ["merge", "sample"]
    assert len((tmp_path / "out" / "sample" / "samples.jsonl").read_text().splitlines()) == 1
    assert [step.action for step in plan(pipeline)] == ["skip", "skip"]


def cli(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


def test_the_command(adapter, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, output, errors = cli(capsys, "merge", adapter, "-o", tmp_path / "merged")
    assert code == 0, errors
    assert f"saved {tmp_path / 'merged'}" in output and "merged modules" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0
    code, _, errors = cli(capsys, "merge", adapter, "--base", base, "--output", tmp_path / "second", "dtype=bf16")
    assert code == 0, errors
    assert Path(tmp_path / "second" / "model.safetensors").is_file()
    for words, message in {
        (tmp_path / "nothing",): "error: command line: adapter = .*",
        (adapter, adapter): "can't merge multiple adapters into one model (they'd interfere)",
        (base,): "Checkpoint doesn't have LoRA parameters",
        (adapter, "--dtype", "int8"): "expected one of auto, bf16, fp16, fp32",
        (): "adapter",
    }.items():
        code, _, errors = cli(capsys, "merge", *words, "-o", tmp_path / "third")
        assert code == 2 and message.removesuffix(".*") in errors and "Traceback" not in errors
        assert not (tmp_path / "third").exists()
