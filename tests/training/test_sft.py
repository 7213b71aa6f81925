"""Fine-tuning: the losses of TRL's trainer, what learns and what stays, stopping, resuming, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llmlab.data.tokenizer import load_tokenizer
from llmlab.hardware import probe
from llmlab.inference import generate_text, load_for_inference
from llmlab.model import load_model
from llmlab.runs.policy import load_policy, load_reference
from llmlab.runs.record import read_metrics, read_record
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.preference import DPOSettings
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings
from llmlab.training.sft import LLMLabSFTTrainer, sft

GREEDY = SamplingSettings(temperature=0, max_new_tokens=24)


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_losses_are_those_of_trls_own_trainer(
    use_lora, packing, sft_settings, chat_file, base_folder, tmp_path, quiet
):
    dropout = 0.0 if packing else 0.1  # packed rows have another shape here than in TRL's one long row
    lora = {"use_lora": True, "lora_preset": "all", "lora_dropout": dropout} if use_lora else {}
    ours = sft(sft_settings(max_steps=8, validation_fraction=0, packing=packing, **lora), console=quiet)

    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    messages = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    peft_config = None
    if use_lora:
        from peft import LoraConfig

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=dropout, target_modules=names)
    theirs = SFTTrainer(
        model=load_model(base_folder),
        args=SFTConfig(
            output_dir=str(tmp_path / "theirs"),
            max_steps=8,
            warmup_steps=2,
            learning_rate=3e-3,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_length=96,
            packing=packing,
            assistant_only_loss=True,
            logging_steps=1,
            seed=3,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=load_tokenizer(str(base_folder)),
        peft_config=peft_config,
    )
    theirs.train()
    expected = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert len(expected) == 8
    # decay differs: ours spares norms and embeddings, which eight steps at 0.01 do not show
    assert losses(ours.folder) == pytest.approx(expected, abs=1e-4)


def test_eight_rows_are_learned_by_heart_and_generation_stops_by_itself(sft_settings, tmp_path, quiet):
    answers = ["The cat meows.", "A dog barks loudly.", "Cows moo.", "Ducks quack softly.", "Pigs grunt.", "The hen."]
    rows = [
        {"prompt": f"What about number {k}?", "completion": text} for k, text in enumerate([*answers, "No.", "Yes."])
    ]
    settings = sft_settings(
        datasets=[write_rows(tmp_path / "eight.jsonl", rows)],
        validation_fraction=0,
        max_steps=150,
        batch_size=8,
        learning_rate=1e-2,
        log_every=50,
    )
    result = sft(settings, console=quiet)
    model, tokenizer = load_for_inference(result.folder, dtype="fp32", device="cpu")
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    written = [samples[0] for samples in generate_text(model, tokenizer, prompts, GREEDY)]
    assert written == [row["completion"] for row in rows]

    # and with nothing but what the folder says, in plain Transformers
    plain = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    assert plain.config.use_cache and tokenizer.model_max_length == plain.config.max_position_embeddings
    inputs = tokenizer.apply_chat_template(
        prompts[0], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = plain.generate(**inputs, do_sample=False, max_new_tokens=50)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == rows[0]["completion"] + "<|im_end|>"


def test_lora_trains_adapters_alone_and_loads_with_plain_peft(sft_settings, base_folder, quiet):
    result = sft(sft_settings(use_lora=True, lora_preset="all", validation_fraction=0.1, eval_every=5), console=quiet)
    assert losses(result.folder)[-1] < losses(result.folder)[0] - 0.3
    base = load_model(base_folder)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    for folder in (result.folder, result.folder / "best_lora_adapters"):
        assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()
        model = PeftModel.from_pretrained(load_model(base_folder), folder)
        wrapped = model.get_base_model().state_dict()
        for name, weight in before.items():
            inside = name if name in wrapped else name.replace(".weight", ".base_layer.weight")
            assert torch.equal(wrapped[inside], weight), name
        moved = [bool((w != 0).any()) for n, w in model.named_parameters() if "lora_B" in n]
        assert len(moved) == 2 * 7 and all(moved)
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer.chat_template and tokenizer.model_max_length == base.config.max_position_embeddings
    assert read_record(result.folder)["parents"] == [str(base_folder)]
    checkpoint = result.folder / "checkpoint-20"
    assert (checkpoint / "optimizer.pt").is_file() and (checkpoint / "adapter_model.safetensors").is_file()


def test_an_adapter_folder_is_trained_further(sft_settings, base_folder, tmp_path, quiet):
    first = sft(sft_settings(use_lora=True, lora_r=4, output_dir=str(tmp_path / "first")), console=quiet)
    second = sft(
        sft_settings(policy_checkpoint=str(first.folder), warmup_steps=0, output_dir=str(tmp_path / "second")),
        console=quiet,
    )
    assert losses(second.folder)[0] < losses(first.folder)[0] - 0.2  # it goes on, rather than starting over
    assert json.loads((second.folder / "adapter_config.json").read_text())["r"] == 4
    assert read_record(second.folder)["parents"] == [str(first.folder), str(base_folder)]
    with pytest.raises(UserError, match="lora_r = 16: .* trained further, whose adapter has 4; .* llmlab merge"):
        sft(
            sft_settings(
                policy_checkpoint=str(first.folder), use_lora=True, lora_r=16, output_dir=str(tmp_path / "x")
            ),
            console=quiet,
        )


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tokenizer_without_template_gets_chatml_and_its_new_rows_are_trained(
    use_lora, tied, sft_settings, tmp_path, corpus_file, quiet
):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([corpus_file.read_text()[:20000]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    base = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = {"use_lora": True, "lora_preset": "minimal"} if use_lora else {}
    result = sft(sft_settings(policy_checkpoint=str(base), validation_fraction=0, **lora), console=quiet)

    model, tokenizer = load_for_inference(result.folder, dtype="fp32", device="cpu")
    new = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert new == [300, 301] and tokenizer.chat_template
    assert model.generation_config.eos_token_id == [0, 301]
    whole = model.merge_and_unload() if use_lora else model
    inputs, outputs = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    assert inputs.shape[0] == outputs.shape[0] == 302
    for weight in (inputs, outputs):
        trained = (weight[300] - weight[301]).norm()  # both began near the mean of the others
        assert trained > 5 * 3e-3
    old = load_model(base)
    if use_lora:
        assert torch.equal(inputs[:300], old.get_input_embeddings().weight)
        assert torch.equal(outputs[:300], old.get_output_embeddings().weight)


@pytest.mark.parametrize("use_lora", [False, True])
def test_interrupted_is_as_if_never(use_lora, sft_settings, tmp_path, cut_off, quiet):
    lora = {"use_lora": True, "lora_preset": "all", "lora_dropout": 0.1} if use_lora else {}
    make = lambda name: sft_settings(output_dir=str(tmp_path / name), max_steps=12, **lora)  # noqa: E731
    whole = sft(make("whole"), console=quiet)
    with cut_off(7):
        sft(make("part"), console=quiet)
    resumed = sft(make("part"), resume=tmp_path / "part", console=quiet)
    assert losses(resumed.folder) == pytest.approx(losses(whole.folder), abs=1e-6)
    one, other = ([line["tokens"] for line in read_metrics(run.folder) if "loss" in line] for run in (whole, resumed))
    assert one == other


def test_extending_a_run_replaces_what_it_wrote(sft_settings, quiet):
    first = sft(sft_settings(use_lora=True, max_steps=3), console=quiet)
    before = (first.folder / "best_lora_adapters" / "adapter_model.safetensors").read_bytes()
    second = sft(sft_settings(use_lora=True, max_steps=6), resume=first.folder, console=quiet)
    assert (second.folder / "best_lora_adapters" / "adapter_model.safetensors").read_bytes() != before


def test_epochs_count_steps_and_exclude_max_steps(sft_settings, quiet):
    result = sft(sft_settings(epochs=0.5, validation_fraction=0, log_every=10), console=quiet)
    record = read_record(result.folder)
    assert record["step"] == 30  # half of 240 rows in batches of 4
    assert record["data"]["sources"][0]["epochs"] == 0.5
    with pytest.raises(UserError, match="already is at step 30; train longer"):
        sft(sft_settings(epochs=0.5, validation_fraction=0), resume=result.folder, console=quiet)
    with pytest.raises(SettingsError, match="max_steps and epochs set one quantity in two units; keep one"):
        resolve(SFTSettings, Layer("file", {"epochs": 2, "max_steps": 10}))


@pytest.mark.parametrize("save_best_only", [False, True])
def test_save_every_counts_beside_the_best(save_best_only, sft_settings, quiet):
    chosen = sft_settings(max_steps=10, save_every=3, eval_every=5, save_total_limit=None)
    result = sft(chosen.model_copy(update={"save_best_only": save_best_only}), console=quiet)
    assert {path.name for path in result.folder.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (3, 6, 9, 5, 10)
    }


@pytest.mark.parametrize("save_best_only", [False, True])
def test_the_best_adapters_are_written_with_each_new_best(save_best_only, sft_settings, quiet, cut_off):
    # the rate rises until the loss gets worse: the best adapters are not the last ones
    chosen = sft_settings(
        max_steps=12, eval_every=3, use_lora=True, lora_preset="all", learning_rate=0.13, warmup_steps=12,
        scheduler="none", save_best_only=save_best_only, save_total_limit=None,
    )  # fmt: skip
    with cut_off(5):
        sft(chosen, console=quiet)
    folder = Path(chosen.output_dir)
    assert adapters(folder / "best_lora_adapters") == adapters(folder / "checkpoint-3")
    result = sft(chosen, resume=folder, console=quiet)
    evaluations = {line["step"]: line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line}
    best = min(evaluations, key=evaluations.get)
    assert 3 < best < 12, evaluations
    assert adapters(folder / "best_lora_adapters") == adapters(folder / f"checkpoint-{best}")
    assert adapters(folder) == adapters(folder / f"checkpoint-{best if save_best_only else 12}")
    kept = evaluations[best if save_best_only else 12]
    assert result.metrics["eval_loss"] == kept
    assert result.metrics["eval_perplexity"] == pytest.approx(math.exp(kept))


def adapters(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_sources_of_different_formats_mix_by_weight(sft_settings, wide_base_folder, tmp_path, quiet):
    chat = write_rows(tmp_path / "a.jsonl", [{"instruction": f"Say {k}.", "output": "Yes."} for k in range(60)])
    calls = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": '{"sun": true}'},
        {"from": "gpt", "value": "Sunny."},
    ]
    rows = [
        {"conversations": calls, "tools": '[{"name": "weather", "parameters": {}}]', "system": f"S{k}"}
        for k in range(30)
    ]
    tools = write_rows(tmp_path / "b.jsonl", rows)
    result = sft(
        sft_settings(
            policy_checkpoint=str(wide_base_folder),
            datasets=[f"{chat} | | 2", f"{tools} | | 1"],
            validation_fraction=0,
            max_steps=2,
            max_seq_len=512,
        ),
        console=quiet,
    )
    first, second = read_record(result.folder)["data"]["sources"]
    assert (first["form"], second["form"]) == ("Alpaca", "ShareGPT conversations")
    assert (first["trained_rows"], second["trained_rows"]) == (60, 30)
    assert first["share"] == pytest.approx(2 / 3)
    # 8 rows of training, two thirds of them of 60 and one third of 30
    assert (first["epochs"], second["epochs"]) == pytest.approx((8 * 2 / 3 / 60, 8 / 3 / 30), abs=1e-3)


@pytest.mark.parametrize("optimizer", ["sophia", "muon", "lion", "adafactor"])
def test_every_optimizer_learns(optimizer, sft_settings, quiet):
    rate = {"sophia": 3e-3, "muon": 2e-2, "lion": 1e-3, "adafactor": 3e-3}[optimizer]
    result = sft(sft_settings(optimizer=optimizer, learning_rate=rate, max_steps=25), console=quiet)
    assert losses(result.folder)[-1] < losses(result.folder)[0] - 0.5


def test_rows_are_shuffled_beforehand_only_if_asked(sft_settings, tmp_path, quiet, monkeypatch):
    orders = []

    def stop(trainer, **options):
        orders.append(trainer.train_dataset["input_ids"][:])
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "train", stop)
    for number, changes in enumerate(({}, {"trainer_args": {"shuffle_dataset": True}})):
        with pytest.raises(KeyboardInterrupt):
            sft(sft_settings(output_dir=str(tmp_path / str(number)), max_steps=2, **changes), console=quiet)
    plain, shuffled = orders
    assert shuffled != plain and sorted(shuffled) == sorted(plain)


def test_neftune_reaches_the_trainer(sft_settings, tmp_path, quiet):
    plain = sft(sft_settings(output_dir=str(tmp_path / "a"), max_steps=2), console=quiet)
    noisy = sft(
        sft_settings(output_dir=str(tmp_path / "b"), max_steps=2, trainer_args={"neftune_noise_alpha": 50.0}),
        console=quiet,
    )
    assert abs(losses(plain.folder)[0] - losses(noisy.folder)[0]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_checkpoint": "./nowhere"}, "nowhere: there is no such folder"),
        ({"use_lora": True, "lora_preset": "custom", "lora_target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"use_lora": True, "modules_to_save": ["lm_hed"]}, "modules_to_save: no module is called 'lm_hed'.*lm_head"),
        ({"trainer_args": {"assistant_only_loss": True}}, "trainer_args.assistant_only_loss: set 'loss_on' instead"),
        ({"trainer_args": {"optim": "adamw_torch"}}, "set 'optimizer' instead"),
        ({"max_seq_len": 8}, "rows have nothing left to train after truncation to max_seq_len = 8"),
        ({"datasets": ["demo/stori"]}, "did you mean 'stories'"),
    ],
)
def test_mistakes_are_sentences_and_leave_nothing(changes, message, sft_settings, tmp_path, quiet):
    with pytest.raises(UserError, match=message):
        sft(sft_settings(**changes), console=quiet)
    assert not (tmp_path / "run").exists()


def test_adapters_find_their_base_from_any_folder(sft_settings, base_folder, tmp_path, monkeypatch, quiet):
    monkeypatch.chdir(base_folder.parent)
    result = sft(sft_settings(policy_checkpoint=base_folder.name, use_lora=True, max_steps=1), console=quiet)
    monkeypatch.chdir(tmp_path)
    for folder in (result.folder, result.folder / "best_lora_adapters", result.folder / "checkpoint-1"):
        assert PeftConfig.from_pretrained(folder).base_model_name_or_path == str(base_folder)
        assert AutoPeftModelForCausalLM.from_pretrained(folder).get_base_model().config.hidden_size == 32
    monkeypatch.chdir(base_folder.parent)
    on_top = DPOSettings(policy_checkpoint=str(result.folder), reference_checkpoint=base_folder.name)
    policy = load_policy(str(result.folder), on_top, probe("cpu", "fp32"), chat_template=None)
    with pytest.raises(UserError, match="not supported with the adapters of"):  # their base, however it is spelled
        load_reference(on_top, policy)


def test_qlora_learns_on_four_bit_weights(sft_settings, wide_base_folder, chat_file, tmp_path, quiet):
    pytest.importorskip("bitsandbytes")
    qlora = {"policy_checkpoint": str(wide_base_folder), "use_qlora": True, "lora_preset": "all", "lora_dropout": 0}
    named = {"validation_datasets": [{"name": str(chat_file)}], **qlora}
    plain = sft(sft_settings(output_dir=str(tmp_path / "plain"), **named), console=quiet)
    # evaluation on a CPU repacks 4-bit weights for inference: training must go on as if it had not
    result = sft(sft_settings(eval_every=5, **named), console=quiet)
    assert losses(result.folder) == pytest.approx(losses(plain.folder), abs=1e-5)
    assert losses(result.folder)[-1] < losses(result.folder)[0] - 0.3
    assert (result.folder / "best_lora_adapters" / "adapter_model.safetensors").is_file()


def test_packed_conversations_never_see_each_other(sft_settings, chat_file, quiet, monkeypatch):
    """A conversation's loss is the same whatever it is packed with, and rows of a batch stay rows."""
    seen = []
    original = LLMLabSFTTrainer.compute_loss

    def watch(self, model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LLMLabSFTTrainer, "compute_loss", watch)
    result = sft(sft_settings(packing=True, max_steps=1, max_seq_len=96, validation_fraction=0), console=quiet)
    batch = seen[0]
    assert batch["input_ids"].shape[0] == 4 and "attention_mask" not in batch
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    model, _ = load_for_inference(result.folder, dtype="fp32", device="cpu")
    whole = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    begin, end = starts[1], (starts + [batch["input_ids"].shape[1]])[2]
    alone = model(input_ids=batch["input_ids"][:1, begin:end], use_cache=False).logits[0]
    assert torch.allclose(whole[begin:end], alone, atol=1e-4)
    assert (batch["labels"][0, starts] == -100).all()
    assert read_metrics(result.folder)[0]["tokens"] == pytest.approx(batch["input_ids"].numel(), rel=0.15)


def test_a_run_killed_before_its_final_save_goes_on_from_the_checkpoint_before(sft_settings, quiet):
    settings = sft_settings(max_steps=6, save_best_only=False, save_every=3)
    whole = sft(settings, console=quiet)
    expected = losses(whole.folder)
    record = read_record(whole.folder)
    (whole.folder / "llmlab.json").write_text(json.dumps({**record, "status": "running"}))
    again = sft(settings, resume=whole.folder, console=quiet)
    assert losses(again.folder) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match="it already is at step 6"):
        sft(settings, resume=whole.folder, console=quiet)


def test_rows_fit_into_the_models_context(sft_settings, tmp_path, quiet):
    rows = [{"prompt": f"{k}?", "completion": "word " * 300} for k in range(4)]
    settings = sft_settings(
        datasets=[write_rows(tmp_path / "long.jsonl", rows)], max_seq_len=1024, validation_fraction=0, max_steps=1
    )
    source = read_record(sft(settings, console=quiet).folder)["data"]["sources"][0]
    assert source["counts"]["cut"] == 4 and source["counts"]["tokens"] == 4 * 128


def test_an_extended_run_keeps_to_the_rows_it_read(sft_settings, quiet, chat_file, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlab.data.chat.rows.READ_AT_LEAST", 30)
    first = sft(sft_settings(max_steps=5, validation_fraction=0), console=quiet)
    before = read_record(first.folder)["data"]["sources"][0]
    assert (before["rows"], before["whole"]) == (30, False)  # more than 5 steps of 4, and a tenth
    sft(sft_settings(max_steps=40, validation_fraction=0), resume=first.folder, console=quiet)
    after = read_record(first.folder)["data"]["sources"][0]
    assert after["rows"] == 30
    assert after["epochs"] == pytest.approx(40 * 4 / 30, abs=1e-3)
    straight = sft(sft_settings(max_steps=40, output_dir=str(tmp_path / "straight")), console=quiet)
    assert read_record(straight.folder)["data"]["sources"][0]["rows"] > 160
