"""DPO, ORPO and reward models: the losses of TRL's trainers, what is learned, what moves, and what is refused."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import load_classifier, load_model
from llmlab.optim.sophia import Sophia, estimate_hessian
from llmlab.rewards import RewardModel
from llmlab.runs.record import read_metrics, read_record
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer
from llmlab.settings.lora import MergeSettings
from llmlab.settings.preference import DPOSettings, ORPOSettings, RewardModelSettings
from llmlab.settings.sources import resolve
from llmlab.training.merge import merge
from llmlab.training.preference.dpo import dpo
from llmlab.training.preference.orpo import LLMLabORPOTrainer, orpo
from llmlab.training.preference.reward import LLMLabRewardTrainer, reward
from llmlab.training.preference.run import PreferenceMetrics
from llmlab.training.sft import sft

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRL = {
    "max_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "seed": 3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "max_length": 96,
}
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # where TRL averages over all tokens
SHORT = {"max_steps": 8, "validation_fraction": 0}


def logged(folder, name="loss"):
    return [line[name] for line in read_metrics(folder) if name in line]


def messages(pairs_file):
    """The pairs in the conversational form that TRL takes."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    side = lambda row, name: [{"role": "assistant", "content": row[name]}]  # noqa: E731
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": side(row, "chosen"),
                "rejected": side(row, "rejected"),
            }
            for row in rows
        ]
    )


@pytest.mark.parametrize("use_lora", [False, True])
def test_dpo_losses_are_trls(use_lora, preference_settings, pairs_file, base_folder, tmp_path, quiet):
    lora = {"use_lora": True, "lora_preset": "all", "lora_dropout": 0.0} if use_lora else {}
    ours = dpo(preference_settings(DPOSettings, beta=0.3, label_smoothing=0.1, **SHORT, **lora), console=quiet)
    theirs = DPOTrainer(
        model=load_model(base_folder),
        ref_model=None if use_lora else load_model(base_folder),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, label_smoothing=0.1, **TRL),
        train_dataset=messages(pairs_file),
        processing_class=load_tokenizer(str(base_folder)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=PROJECTIONS)
        if use_lora
        else None,
    )
    theirs.train()
    expected = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert logged(ours.folder) == pytest.approx(expected, abs=1e-4)
    # before the first step policy and reference are one: -log(sigmoid(0)) whatever the smoothing
    assert logged(ours.folder)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(ours.folder, "kl")[0] == pytest.approx(0, abs=1e-5)
    assert logged(ours.folder, "margin")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("use_lora", [False, True])
def test_orpo_losses_are_trls(use_lora, preference_settings, pairs_file, base_folder, tmp_path, quiet, monkeypatch):
    scored = LLMLabORPOTrainer.concatenated_forward

    def score_beside_trl(self, model, batch):
        """Log-probabilities, NLL and gradients are those of all logits in fp32, up to the order of sums."""
        ours, theirs = scored(self, model, batch), ORPOTrainer.concatenated_forward(self, model, batch)
        (pairs, tokens), (mean_pairs, mean_tokens) = self.count_pairs(batch), self.sizes
        parts = (*ours[:2], ours[4]), (*theirs[:2], theirs[4] * tokens / pairs * mean_pairs / mean_tokens)
        losses = [nll + (chosen * rejected).sum() for chosen, rejected, nll in parts]
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        gradients = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
        torch.testing.assert_close([*parts[0], *gradients[0]], [*parts[1], *gradients[1]], rtol=1e-4, atol=1e-5)
        return ours

    monkeypatch.setattr(LLMLabORPOTrainer, "concatenated_forward", score_beside_trl)
    lora = {"use_lora": True, "lora_preset": "all", "lora_dropout": 0.0} if use_lora else {}
    ours = orpo(preference_settings(ORPOSettings, beta=0.2, **SHORT, **lora), console=quiet)
    tokenizer = load_tokenizer(str(base_folder))
    tokenizer.eos_token = "<|im_end|>"  # else it would add a second end to every answer
    rows = []
    for row in messages(pairs_file):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        texts = {
            name: tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=False).removeprefix(prompt)
            for name in ("chosen", "rejected")
        }
        # and it is given the line break that the template puts after the end
        rows.append({"prompt": prompt, **{name: text.rstrip() for name, text in texts.items()}})

    class WithLineBreak(ORPOTrainer):
        def tokenize_row(self, feature, model=None):
            row = super().tokenize_row(feature)
            newline = tokenizer.encode("\n", add_special_tokens=False)
            for side in ("chosen", "rejected"):
                row[f"{side}_input_ids"] += newline
                row[f"{side}_labels"] += newline
                row[f"{side}_attention_mask"] += [1] * len(newline)
            return row

    theirs = WithLineBreak(
        model=load_model(base_folder),
        args=ORPOConfig(output_dir=str(tmp_path / "trl"), beta=0.2, remove_unused_columns=False, **TRL | WHOLE),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=PROJECTIONS)
        if use_lora
        else None,
    )
    theirs.train()
    expected = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert logged(ours.folder) == pytest.approx(expected, abs=1e-4)


def test_reward_losses_are_trls(preference_settings, pairs_file, base_folder, tmp_path, quiet):
    ours = reward(preference_settings(RewardModelSettings, **SHORT), console=quiet)
    torch.manual_seed(3)
    from transformers import set_seed

    set_seed(3)
    theirs = RewardTrainer(
        model=load_classifier(base_folder),
        args=RewardConfig(output_dir=str(tmp_path / "trl"), **TRL),
        train_dataset=messages(pairs_file),
        processing_class=load_tokenizer(str(base_folder)),
    )
    theirs.train()
    expected = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert logged(ours.folder) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("stage", "kind"), [(dpo, DPOSettings), (orpo, ORPOSettings)])
def test_held_out_pairs_are_won(stage, kind, preference_settings, quiet):
    result = stage(preference_settings(kind, max_steps=60, learning_rate=3e-3, beta=0.3), console=quiet)
    margins = logged(result.folder, "margin")
    assert result.metrics["eval_win_rate"] > 0.8 and margins[-1] > margins[0] + 0.3
    names = {"win_rate", "margin", "chosen_logp", "rejected_logp", "eval_win_rate", "eval_margin"}
    assert names <= set(result.metrics)
    assert not any(name.startswith(("rewards/accuracies", "logps/")) for name in result.metrics)


def test_a_reward_model_ranks_held_out_pairs_and_scores_as_it_was_trained(preference_settings, base_folder, quiet):
    result = reward(preference_settings(RewardModelSettings, max_steps=60, learning_rate=3e-3), console=quiet)
    assert result.metrics["eval_win_rate"] > 0.8
    model = AutoModelForSequenceClassification.from_pretrained(result.folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(result.folder))
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    score = lambda answer: model(  # noqa: E731
        **tokenizer.apply_chat_template(
            [{"role": "user", "content": "How 7: the cat?"}, {"role": "assistant", "content": answer}],
            return_dict=True,
            return_tensors="pt",
        )
    ).logits.item()
    assert score("The cat meows.") > score("The cat barks.")


def adapter_weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


@pytest.mark.parametrize(("stage", "kind"), [(dpo, DPOSettings), (orpo, ORPOSettings)])
def test_scenario_1_adapters_of_fine_tuning_are_trained_further(
    stage, kind, preference_settings, sft_settings, base_folder, tmp_path, quiet
):
    first = sft(sft_settings(use_lora=True, lora_preset="all", output_dir=str(tmp_path / "sft")), console=quiet)
    base = {name: weight.clone() for name, weight in load_model(base_folder).state_dict().items()}
    second = stage(preference_settings(kind, policy_checkpoint=str(first.folder)), console=quiet)
    before, after = adapter_weights(first.folder), adapter_weights(second.folder)
    assert before.keys() == after.keys()  # no copy of the reference beside them
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (second.folder / "ref").exists()
    assert read_record(second.folder)["parents"] == [str(first.folder), str(base_folder)]
    assert all(torch.equal(weight, load_model(base_folder).state_dict()[name]) for name, weight in base.items())
    if stage is dpo:  # the reference is where the adapters began, not the base under them
        assert logged(second.folder)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_scenario_2_merged_adapters_are_trained_whole(preference_settings, sft_settings, tmp_path, quiet):
    first = sft(sft_settings(use_lora=True, output_dir=str(tmp_path / "sft")), console=quiet)
    merged = merge(MergeSettings(adapter=str(first.folder), output_dir=str(tmp_path / "merged")), console=quiet)
    result = dpo(preference_settings(DPOSettings, policy_checkpoint=str(merged.folder)), console=quiet)
    before, after = load_model(merged.folder).state_dict(), load_model(result.folder).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (result.folder / "adapter_config.json").exists()
    assert logged(result.folder)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_scenario_3_a_whole_model_gets_adapters(preference_settings, sft_settings, tmp_path, quiet):
    first = sft(sft_settings(output_dir=str(tmp_path / "sft")), console=quiet)
    lora = {"use_lora": True, "lora_preset": "attention_only"}
    result = dpo(preference_settings(DPOSettings, policy_checkpoint=str(first.folder), **lora), console=quiet)
    model = PeftModel.from_pretrained(load_model(first.folder), result.folder)
    moved = [bool((weight != 0).any()) for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 2 * 4 and all(moved)
    assert (result.folder / "best_lora_adapters" / "adapter_config.json").is_file()


@pytest.mark.parametrize("adapters", [False, True])
def test_interrupted_dpo_is_as_if_never(adapters, preference_settings, tmp_path, cut_off, quiet):
    lora = {"use_lora": True, "lora_preset": "all", "lora_dropout": 0.0} if adapters else {}
    make = lambda name: preference_settings(DPOSettings, output_dir=str(tmp_path / name), max_steps=10, **lora)  # noqa: E731
    whole = dpo(make("whole"), console=quiet)
    with cut_off(5):
        dpo(make("part"), console=quiet)
    resumed = dpo(make("part"), resume=tmp_path / "part", console=quiet)
    assert logged(resumed.folder) == pytest.approx(logged(whole.folder), abs=1e-6)
    assert logged(resumed.folder, "kl") == pytest.approx(logged(whole.folder, "kl"), abs=1e-4)


def test_a_named_reference_is_used_and_must_share_the_vocabulary(
    preference_settings, sft_settings, base_folder, tmp_path, quiet
):
    tuned = sft(sft_settings(output_dir=str(tmp_path / "sft")), console=quiet)
    few = tmp_path / "few.jsonl"  # one batch, of answers of different lengths
    answers = ["Meows.", "The cat meows and meows.", "It", "The dog barks and the duck quacks."] * 2
    pairs = [{"prompt": f"Q{n}", "chosen": text, "rejected": f"Not {n}: {text}"} for n, text in enumerate(answers)]
    few.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    named = {"policy_checkpoint": str(tuned.folder), "reference_checkpoint": str(base_folder), "max_steps": 1}
    named |= {"datasets": [str(few)], "validation_fraction": 0, "mini_batch_size": 8}
    result = dpo(preference_settings(DPOSettings, **named), console=quiet)
    rows = [json.loads(line) for line in Path(named["datasets"][0]).read_text().splitlines()]
    policy, reference = load_model(tuned.folder).eval(), load_model(base_folder).eval()
    tokenizer = load_tokenizer(str(base_folder))
    ratio = tokens = 0
    for row in rows:
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])
            with torch.no_grad():
                logps = [
                    m(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]) for m in (policy, reference)
                ]
            ratio += (logps[0] - logps[1])[:, len(prompt) - 1 :].sum().item()
            tokens += ids.shape[1] - len(prompt)
    assert logged(result.folder, "kl")[0] == pytest.approx(ratio / tokens, abs=1e-5)  # nats a token
    assert logged(result.folder, "completion_length")[0] == pytest.approx(tokens / 16)
    from llmlab.data.tokenizer import learn_bpe
    from llmlab.settings.data import DataSource

    other = tmp_path / "other"
    load_model(base_folder).save_pretrained(other)
    learn_bpe([DataSource(name="demo/stories", subset="50kB")], 300, tmp_path / "tok", show_progress=False)
    load_tokenizer(str(tmp_path / "tok")).save_pretrained(other)
    settings = preference_settings(DPOSettings, reference_checkpoint=str(other), output_dir=str(tmp_path / "x"))
    with pytest.raises(UserError, match="reference_checkpoint = .*other: it has another vocabulary"):
        dpo(settings, console=quiet)
    assert not (tmp_path / "x").exists()


def test_batches_follow_from_each_other(preference_settings):
    make = lambda **changes: preference_settings(DPOSettings, **changes)  # noqa: E731
    assert make(batch_size=32, mini_batch_size=4).accumulation(2) == 4
    assert DPOSettings(mini_batch_size=1, gradient_accumulation_steps=16).accumulation(4) == 16
    with pytest.raises(UserError, match="is not a multiple of mini_batch_size = 4 on 3 processes; the nearest is 36"):
        make(batch_size=32).accumulation(3)
    wrong = Layer("command line", {"batch_size": 20, "mini_batch_size": 8})
    with pytest.raises(SettingsError, match="is not a multiple of mini_batch_size = 8; the nearest is"):
        resolve(DPOSettings, wrong)
    assert "batch_size" not in DPOSettings(mini_batch_size=1, gradient_accumulation_steps=16).recorded()
    assert resolve(ORPOSettings, Layer("x", {"max_steps": 5})).settings.epochs is None
    with pytest.raises(SettingsError, match="max_prompt_length = 64 leaves no room for an answer in max_length = 64"):
        resolve(DPOSettings, Layer("x", {"max_length": 64, "max_prompt_length": 64}))


def test_falling_together_warns_once_with_advice():
    said = []

    class Line:
        def say(self, text):
            said.append(text)

    metrics = PreferenceMetrics(Line(), beta=0.1, patience=3)
    state = SimpleNamespace(log_history=[{}], global_step=0)
    for step, value in enumerate([-10, -10.2, -12, -13, -14, -15, -16]):
        logs = {"logps/chosen": float(value), "logps/rejected": value - 1.0}
        logs |= {"rewards/chosen": 0.2, "rewards/rejected": 0.1, "completion_length": 5.0}
        metrics.on_log(None, state, None, logs)
        assert logs["kl"] == pytest.approx((0.2 + 0.1) / 2 / 0.1 / 5)
        assert len(said) == (step >= 4)
    assert "lower learning_rate, raise beta" in said[0]
    steady = PreferenceMetrics(Line(), beta=0.1, patience=3)
    for value in (-10, -20, -30, -40, -50):  # only the worse side falls: what DPO is for
        steady.on_log(None, state, None, {"logps/chosen": -10.0, "logps/rejected": float(value)})
    assert len(said) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "Same.", "rejected": "Same."}, "chosen and rejected are the same"),
        ({"prompt": "Q", "chosen": "", "rejected": "Bad."}, "an empty completion"),
        ({"prompt": "Q", "chosen": "Good.", "rejected": None}, "without 'rejected'"),
    ],
)
def test_unusable_pairs_are_counted_and_many_stop_the_run(
    row, reason, preference_settings, pairs_file, tmp_path, quiet
):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(pairs_file.read_text() + json.dumps(row) + "\n")
    result = dpo(preference_settings(DPOSettings, datasets=[str(mixed)], max_steps=1), console=quiet)
    assert read_record(result.folder)["data"]["sources"][0]["dropped"] == {reason: 1}
    mixed.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    with pytest.raises(UserError, match=f"3 of 3 rows cannot be used, the first is row 1: 3 x {reason}"):
        dpo(preference_settings(DPOSettings, datasets=[str(mixed)], output_dir=str(tmp_path / "x")), console=quiet)


def test_missing_columns_are_explained(preference_settings, tmp_path, quiet):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "Q", "completion": "A"}\n')
    with pytest.raises(UserError, match="no format of preference data has the columns completion, prompt; .*closest"):
        dpo(preference_settings(DPOSettings, datasets=[str(path)]), console=quiet)


def test_an_adapter_cannot_become_a_reward_model(preference_settings, sft_settings, tmp_path, quiet):
    first = sft(sft_settings(use_lora=True, max_steps=1, output_dir=str(tmp_path / "sft")), console=quiet)
    with pytest.raises(UserError, match="starts from a whole model; merge it: llmlab merge"):
        reward(preference_settings(RewardModelSettings, policy_checkpoint=str(first.folder)), console=quiet)


def test_the_win_rate_before_training_is_that_of_ties(preference_settings, quiet):
    result = dpo(
        preference_settings(DPOSettings, max_steps=4, use_lora=True, eval_every=2, save_best_only=True), console=quiet
    )
    lines = [line for line in read_metrics(result.folder) if "eval_win_rate" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["eval_win_rate"] == 0.5 and lines[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not (result.folder / "checkpoint-0").exists()


def test_a_reward_model_may_be_adapters_with_a_head_of_their_own(preference_settings, base_folder, tmp_path, quiet):
    settings = preference_settings(
        RewardModelSettings, max_steps=60, learning_rate=1e-2, lora_preset="all", use_lora=True
    )
    result = reward(settings, console=quiet)
    assert result.metrics["eval_win_rate"] > 0.8
    model = PeftModel.from_pretrained(load_classifier(base_folder), result.folder)
    head = [name for name, _ in model.named_parameters() if "score.modules_to_save" in name]
    assert head and not (result.folder / "generation_config.json").exists()
    # what scores with it, and what merges it, make the same numbers of it
    prompts, answers = ["How does a cat sound?"] * 3, ["It meows.", "Red.", "meow meow meow"]
    adapted = RewardModel(model=str(result.folder), squash=False)
    scores = adapted(answers, prompts)
    ids = torch.tensor([adapted._encode(prompts[2], answers[2])[0]["input_ids"]])
    model.config.get_text_config().pad_token_id = load_tokenizer(str(result.folder)).pad_token_id
    with torch.no_grad():
        assert model.eval()(input_ids=ids).logits.item() == pytest.approx(scores[2], abs=1e-5)
    merged = merge(MergeSettings(adapter=str(result.folder), output_dir=str(tmp_path / "merged")), console=quiet)
    assert merged.metrics["max_difference"] < 1e-4 and (merged.folder / "config.json").is_file()
    assert RewardModel(model=str(merged.folder), squash=False)(answers, prompts) == pytest.approx(scores, abs=1e-4)
    assert len(set(scores)) == 3


def test_a_reward_model_learns_on_four_bit_weights(
    preference_settings, wide_base_folder, tmp_path, monkeypatch, quiet
):
    nn = pytest.importorskip("bitsandbytes.nn")
    seen = []
    original = LLMLabRewardTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(LLMLabRewardTrainer, "__init__", init)
    four_bits = {
        "policy_checkpoint": str(wide_base_folder),
        "use_qlora": True,
        "lora_preset": "all",
        "lora_dropout": 0,
    }
    make = lambda name, **changes: preference_settings(  # noqa: E731
        RewardModelSettings, **four_bits, **changes, learning_rate=5e-3, output_dir=str(tmp_path / name)
    )
    plain, often = reward(make("plain"), console=quiet), reward(make("often", eval_every=5), console=quiet)
    packed = [module for module in seen[0].model.modules() if isinstance(module, nn.Linear4bit)]
    assert len(packed) == 2 * 7 and not any(module.support_avx512bf16_for_cpu for module in packed)
    trained = {name: p.dtype for name, p in seen[0].model.named_parameters() if p.requires_grad}
    assert trained.pop("base_model.model.score.modules_to_save.default.weight") == torch.float32 and trained
    frozen = {p.dtype for p in seen[0].model.parameters() if not p.requires_grad}
    assert frozen == {torch.uint8, torch.float32}
    # evaluation on a CPU repacks 4-bit weights for inference: training must go on as if it had not
    assert logged(often.folder) == logged(plain.folder)
    assert logged(often.folder)[-1] < 0.5 * logged(often.folder)[0]


def test_sophia_estimates_the_curvature_of_comparisons():
    """Scores that are linear in fixed features x: the Gauss-Newton diagonal of a pair is p (1 - p) (x1 - x2)^2."""
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))  # three better answers, three worse
    model = torch.nn.Linear(4, 1, bias=False)
    forward = lambda input_ids, use_cache: SimpleNamespace(logits=model(features[input_ids]))  # noqa: E731
    optimizer = Sophia(model.parameters(), lr=1e-3, betas=(0.9, 0.0))
    generator, total = torch.Generator().manual_seed(1), 0
    for _ in range(2000):
        estimate_hessian(forward, {"input_ids": torch.arange(6)}, optimizer, generator, LLMLabRewardTrainer.predict)
        total = total + optimizer.state[model.weight]["hessian"] / 2000
    difference = features[:3] - features[3:]
    p = (difference @ model.weight.T).sigmoid()
    assert torch.allclose(total, (p * (1 - p) * difference**2).mean(0), rtol=0.15)


def test_adapters_that_speak_do_not_score(preference_settings, sft_settings, tmp_path, quiet):
    first = sft(sft_settings(use_lora=True, max_steps=1, output_dir=str(tmp_path / "sft")), console=quiet)
    with pytest.raises(UserError, match="expected a sequence-classification model, found an adapter for CAUSAL_LM"):
        RewardModel(model=str(first.folder))
    with pytest.raises(UserError, match="an adapter for CAUSAL_LM; expected one of llmlab reward"):
        load_classifier(first.folder)


def test_the_best_is_kept_beside_the_last(preference_settings, quiet):
    # the rate rises until the loss gets worse
    chosen = preference_settings(
        DPOSettings, max_steps=12, eval_every=3, learning_rate=1.0, warmup_steps=12, scheduler="none"
    )
    assert chosen.save_best_only is False
    result = dpo(chosen, console=quiet)
    evaluations = {line["step"]: line["eval_loss"] for line in read_metrics(result.folder) if "eval_loss" in line}
    best = min(list(evaluations)[1:], key=evaluations.get)
    assert best < 12, evaluations
    two = sorted(list(evaluations)[1:], key=evaluations.get)[: chosen.save_total_limit]
    kept = {f"checkpoint-{step}" for step in (*two, 12)}
    assert {path.name for path in result.folder.glob("checkpoint-*")} == kept
    assert result.metrics["eval_loss"] == evaluations[12]  # the result is the last, as save_best_only=false says
