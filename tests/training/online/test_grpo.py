"""GRPO: TRL's losses, what is learned, baselines and penalties by hand, resuming, when a run ends, what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer

from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import load_model
from llmlab.rewards import Reward
from llmlab.runs.record import read_metrics, read_record
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.preference import RewardModelSettings
from llmlab.settings.rl import GRPOSettings
from llmlab.settings.sources import resolve
from llmlab.training.online import grpo as stage
from llmlab.training.online._trl import RolloutSteps
from llmlab.training.online.callbacks import AdaptiveKL
from llmlab.training.online.grpo import LLMLabGRPOTrainer, global_advantages, group_metrics, grpo
from llmlab.training.online.layout import sort_updates
from llmlab.training.preference.reward import reward

SHARE = '''
def wanted_share(completions, completion_ids, **columns):
    """The share of tokens that are in the first third of the vocabulary."""
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


def constant(completions, **columns):
    return [0.5] * len(completions)


def broken(completions, question, **columns):
    return [1 / len(text[:0]) for text in question]


def not_a_number(completions, **columns):
    return [float("nan")] * len(completions)


def of_animal(completions, question, answer, **columns):
    assert all(text.startswith("How") for text in question) and len(answer) == len(completions)
    return [float(len(completion[-1]["content"])) for completion in completions]
'''


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(SHARE)
    return path


@pytest.fixture
def grpo_settings(base_folder, chat_file, rewards_file, tmp_path):
    """Returns a function that makes settings of a short run on the tiny model, rewarded for tokens of a set."""

    def make(reward="wanted_share", **changes):
        values = {
            "policy_checkpoint": str(base_folder),
            "datasets": [{"name": str(chat_file)}],
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path.parent / "cache"),
            "num_proc": 1,
            "validation_fraction": 0,
            "rewards": [{"name": f"{rewards_file}:{reward}", "min": 0, "max": 1}],
            "allow_code": True,
            "max_steps": 8,
            "warmup_steps": 2,
            "learning_rate": 3e-3,
            "batch_size": 4,
            "group_size": 4,
            "mini_batch_size": 8,
            "ppo_epochs": 2,
            "max_new_tokens": 8,
            "log_every": 1,
            "eval_every": 1000,
            "dtype": "fp32",
            "stop_patience": None,
            "seed": 3,
            "report": False,
        }
        return GRPOSettings(**{**values, **changes})

    return make


def logged(folder, name="loss"):
    return [line[name] for line in read_metrics(folder) if name in line]


def wanted_share(completions, completion_ids, **columns):
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    ("init_kl_coef", "ent_coef", "passes"), [(0.0, 0.01, 1), (0.3, 0.0, 1), (0.3, 0.0, 4)], ids=str
)
def test_rewards_and_losses_are_trls(
    init_kl_coef, ent_coef, passes, grpo_settings, chat_file, base_folder, tmp_path, quiet, monkeypatch
):
    """Over two rollouts with TRL's samples, of two updates a pass over it, or of one in several forward passes."""
    monkeypatch.delattr(RolloutSteps, "_generate_single_turn")  # which has the same distribution, not the same draws
    sizes = {"mini_batch_size": 8 if passes == 1 else 4, "gradient_accumulation_steps": passes}
    steps = 8 if passes == 1 else 4
    ours = grpo(grpo_settings(init_kl_coef=init_kl_coef, ent_coef=ent_coef, max_steps=steps, **sizes), console=quiet)
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    tokenizer = load_tokenizer(str(base_folder))
    from transformers import set_seed

    set_seed(3)
    theirs = GRPOTrainer(
        model=load_model(base_folder),
        reward_funcs=wanted_share,
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=init_kl_coef,
            entropy_coef=ent_coef,
            epsilon=0.2,
            num_generations=4,
            generation_batch_size=16,
            num_iterations=2,
            per_device_train_batch_size=sizes["mini_batch_size"],
            gradient_accumulation_steps=passes,
            max_completion_length=8,
            max_steps=steps,
            warmup_steps=2,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            logging_steps=1,
            seed=3,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows]),
        processing_class=tokenizer,
    )
    theirs.train()
    # of several forward passes TRL logs the mean of their kl, llmlab that of their tokens
    for name in ("loss", "reward", *(["kl"] if init_kl_coef and passes == 1 else [])):
        expected = [line[name] for line in theirs.state.log_history if name in line]
        assert logged(ours.folder, name) == pytest.approx(expected, abs=1e-4), name
    assert len(logged(ours.folder)) == steps


@pytest.mark.parametrize(("updates", "lora_dropout"), [(1, 0.0), (2, 0.0), (2, 0.3)], ids=str)
def test_old_log_probabilities_are_of_the_policy_that_sampled(
    updates, lora_dropout, grpo_settings, quiet, monkeypatch
):
    """In a rollout's second pass: what the policy said before its first update, in evaluation mode."""
    expected, used = {}, []
    sample, loss = LLMLabGRPOTrainer._generate_and_score_completions, LLMLabGRPOTrainer._compute_loss

    def watch_sampling(self, inputs):
        rollout = sample(self, inputs)
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        self.model.eval()
        with torch.no_grad():
            log_probs = self.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
        self.model.train()
        log_probs = log_probs.gather(2, ids[:, 1:, None])[:, -rollout["completion_ids"].shape[1] :, 0]
        rows = zip(ids.tolist(), log_probs * rollout["completion_mask"], strict=True)
        expected.update({tuple(row): values for row, values in rows})
        return rollout

    def watch_loss(self, model, inputs):
        if "old_per_token_logps" in inputs:
            rows = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1).tolist()
            old = inputs["old_per_token_logps"] * inputs["completion_mask"]
            used.extend((old[k] - expected[tuple(row)]).abs().max().item() for k, row in enumerate(rows))
        return loss(self, model, inputs)

    monkeypatch.setattr(LLMLabGRPOTrainer, "_generate_and_score_completions", watch_sampling)
    monkeypatch.setattr(LLMLabGRPOTrainer, "_compute_loss", watch_loss)
    sizes = {"mini_batch_size": 4, "gradient_accumulation_steps": 4 // updates, "max_steps": 2 * updates}
    grpo(grpo_settings(use_lora=True, lora_dropout=lora_dropout, learning_rate=0.1, **sizes), console=quiet)
    # known before its loss but for those of the first update in the first pass
    assert len(used) == (32 if lora_dropout else 32 - 16 // updates)
    assert max(used) < 1e-5


def test_an_update_is_sorted_by_length():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (6,), generator=draw)
    mask = (torch.arange(8) < lengths[:, None]).long()
    whole = {
        "prompt_ids": torch.arange(12).view(6, 2),
        "prompt_mask": torch.ones(6, 2),
        "completion_mask": mask,
        "advantages": lengths.float(),
    }
    parts = [{**{k: v[i : i + 2] for k, v in whole.items()}, "num_items_in_batch": mask.sum()} for i in (0, 2, 4)]
    alone = [part["advantages"].tolist() for part in sort_updates(parts, 1)]
    assert alone == [sorted(part["advantages"].tolist()) for part in parts]  # an update of each part
    parts = sort_updates(parts, 3)
    rows = [part["advantages"].tolist() for part in parts]
    assert [len(row) for row in rows] == [2, 2, 2] and sum(rows, []) == sorted(lengths.tolist())
    assert all((part["completion_mask"].sum(1) == part["advantages"]).all() for part in parts)
    assert all(part["num_items_in_batch"] == mask.sum() for part in parts)


@pytest.mark.parametrize("baseline_mode", ["group_mean", "global_mean"])
def test_the_reward_rises(baseline_mode, grpo_settings, quiet):
    result = grpo(
        grpo_settings(
            max_steps=30,
            baseline_mode=baseline_mode,
            learning_rate=5e-3,
            init_kl_coef=0.0,
            batch_size=8,
            ppo_epochs=1,
            mini_batch_size=32,
            seed=5,
        ),
        console=quiet,
    )
    rewards = logged(result.folder, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards
    expected = {
        *("reward", "reward/wanted_share", "best_of_group", "group_variance", "zero_variance_share", "clipped_share"),
        *("completion_length", "entropy", "reward_std", "ratio_clipped_share"),
    }
    assert expected <= set(result.metrics)
    assert not any(name.startswith(("rewards/", "completions/clipped")) for name in result.metrics)


def test_advantages_and_group_metrics_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    numbers = group_metrics(rewards)
    assert numbers["best_of_group"] == pytest.approx((1 + 3) / 2)
    assert numbers["group_variance"] == pytest.approx((4 * 0.25 / 3 + 0) / 2)
    assert numbers["zero_variance_share"] == 0.5
    # over the mean of all, 14 / 8, the second group is good, although nothing differs in it
    plain = global_advantages(rewards.flatten(), scale=False)
    assert plain.tolist() == pytest.approx([-0.75, -1.75, -1.75, -0.75, 1.25, 1.25, 1.25, 1.25])
    deviation = ((2 * 0.75**2 + 2 * 1.75**2 + 4 * 1.25**2) / 7) ** 0.5
    scaled = global_advantages(rewards.flatten(), scale=True)
    assert scaled.tolist() == pytest.approx([value / (deviation + 1e-4) for value in plain.tolist()], rel=1e-5)
    # without a reward there is no advantage, and no say in the mean
    some = torch.tensor([1.0, torch.nan, 3.0])
    assert global_advantages(some, scale=False).tolist() == [-1, 0, 1]
    assert group_metrics(some[None])["best_of_group"] == 3


def test_the_baseline_reaches_the_trainer(grpo_settings, quiet, monkeypatch):
    seen = {}
    original = LLMLabGRPOTrainer.finish_rollout

    def watch(self, rollout):
        rollout = original(self, rollout)
        seen[self.settings.baseline_mode] = (self.scores.clone(), rollout["advantages"].clone())
        return rollout

    monkeypatch.setattr(LLMLabGRPOTrainer, "finish_rollout", watch)
    for mode in ("group_mean", "global_mean"):
        settings = grpo_settings(max_steps=1, baseline_mode=mode)
        grpo(settings.model_copy(update={"output_dir": settings.output_dir + mode}), console=quiet)
    rewards, by_group = seen["group_mean"]
    groups = rewards.view(-1, 4)
    by_hand = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert by_group.tolist() == pytest.approx(by_hand.flatten().tolist(), abs=1e-5)
    rewards, over_all = seen["global_mean"]
    by_hand = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert over_all.tolist() == pytest.approx(by_hand.tolist(), abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_bias_correction_kl": False}], ids=str)
def test_a_penalty_is_averaged_as_trl_averages_its_own(more, grpo_settings, quiet, monkeypatch):
    """With TRL's estimate in place of the size, our way gives TRL's loss and gradients."""
    total = LLMLabGRPOTrainer.total_loss
    compared = []

    def both(self, loss, batch):
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        theirs, ours = loss(), total(self, loss, batch)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
        for one, other in zip(*(torch.autograd.grad(value, weights) for value in (ours, theirs)), strict=True):
            assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)
        compared.append(self._metrics["train"]["kl"][-2:])
        return loss()

    monkeypatch.setattr(LLMLabGRPOTrainer, "penalty", staticmethod(lambda ratio: torch.exp(-ratio) + ratio - 1))
    monkeypatch.setattr(LLMLabGRPOTrainer, "total_loss", both)
    more = {"trainer_args": more, "mini_batch_size": 4, "gradient_accumulation_steps": 2}
    grpo(grpo_settings(kl_penalty="abs", init_kl_coef=0.5, max_steps=4, **more), console=quiet)
    assert compared[-1][0] == pytest.approx(compared[-1][1], rel=1e-5) and compared[-1][0] > 0.001


@pytest.mark.parametrize("more", [{}, {"importance_sampling_level": "sequence"}], ids=str)
def test_the_absolute_penalty_is_for_the_default_loss(more, grpo_settings, quiet):
    with pytest.raises(ValueError, match="kl_penalty = abs: not supported with trainer_args loss_type = grpo"):
        grpo(grpo_settings(kl_penalty="abs", trainer_args={"loss_type": "grpo", **more}), console=quiet)


def test_the_absolute_penalty_is_another_one(grpo_settings, quiet):
    losses = []
    for penalty in ("kl", "abs"):
        settings = grpo_settings(kl_penalty=penalty, init_kl_coef=0.5, max_steps=4)
        result = grpo(settings.model_copy(update={"output_dir": settings.output_dir + penalty}), console=quiet)
        losses.append(logged(result.folder))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)  # the policy is its reference at first
    assert losses[0][-1] != pytest.approx(losses[1][-1], abs=1e-4)


def test_the_controller_by_hand():
    trainer = SimpleNamespace(beta=0.1)
    controller = AdaptiveKL(trainer, target=0.5, horizon=1000, samples_per_step=100)
    for step, kl, factor in (
        (1, 0.55, 1 + 0.1 * 100 / 1000),  # 10 % above the target
        (2, 50.0, 1 + 0.2 * 0.1),  # the error is clipped
        (7, 0.0, 1 - 0.2 * 0.5),
        (32, 0.0, 0.8**2 * 0.9),  # 2,500 completions, as if updated in between
    ):
        before = trainer.beta
        controller.update(step, kl)
        assert trainer.beta == pytest.approx(before * factor)


def test_adaptive_kl_follows_the_controller(grpo_settings, quiet):
    settings = grpo_settings(adaptive_kl=True, init_kl_coef=0.2, target_kl=0.01, kl_horizon=100, max_steps=12)
    result = grpo(settings, console=quiet)
    kl, charged = logged(result.folder, "kl"), logged(result.folder, "kl_coef")
    by_hand = SimpleNamespace(beta=0.2)
    controller = AdaptiveKL(by_hand, target=0.01, horizon=100, samples_per_step=16 / 4)
    for step, coefficient in enumerate(charged):
        assert coefficient == pytest.approx(by_hand.beta)
        controller.update(step + 1, kl[step])  # 16 completions for each 4 updates
    assert charged[-1] > charged[3] and kl[0] < 0.01 and charged[1] == pytest.approx(0.2 * (1 - 0.2 * 4 / 100))


@pytest.mark.parametrize("killed_at", [6, 9])
def test_a_resumed_run_goes_on_as_if_never_stopped(killed_at, grpo_settings, quiet, tmp_path, cut_off):
    """At 6 the run stands in the middle of a rollout of four steps; at 9 one step after the saved 8, between two."""
    changes = {"adaptive_kl": True, "target_kl": 0.01, "kl_horizon": 50, "max_steps": 12, "save_every": 2}
    whole = grpo(grpo_settings(**changes, output_dir=str(tmp_path / "whole")), console=quiet)
    with cut_off.kill(killed_at + 1):
        grpo(grpo_settings(**changes), console=quiet)
    part = tmp_path / "run"
    resumed = grpo(grpo_settings(**changes), resume=part, console=quiet)
    for name in ("loss", "reward", "kl", "kl_coef"):
        assert logged(resumed.folder, name) == pytest.approx(logged(whole.folder, name), abs=1e-6), name
    assert read_record(part)["resumed"][0]["step"] == killed_at // 2 * 2


def test_an_interrupted_run_goes_on_in_the_middle_of_a_rollout(grpo_settings, quiet, tmp_path, cut_off):
    whole = grpo(grpo_settings(max_steps=12, output_dir=str(tmp_path / "whole")), console=quiet)
    with cut_off(7):
        grpo(grpo_settings(max_steps=12), console=quiet)
    assert read_record(tmp_path / "run")["status"] == "interrupted"
    resumed = grpo(grpo_settings(max_steps=12), resume=tmp_path / "run", console=quiet)
    assert logged(resumed.folder) == pytest.approx(logged(whole.folder), abs=1e-6)
    lines = [line["tokens"] for folder in (resumed.folder, whole.folder) for line in read_metrics(folder)[-1:]]
    assert lines[0] == lines[1]


def test_paths_of_rewards_start_at_the_file_that_names_them(grpo_settings, rewards_file, tmp_path, quiet):
    given = grpo_settings(max_steps=4)
    values = {name: getattr(given, name) for name in given.model_fields_set - {"allow_code", "rewards"}}
    recipe = rewards_file.parent / "recipe.yaml"
    recipe.write_text("rewards: [{name: 'mine.py:wanted_share', min: 0, max: 1}]")

    def with_recipe(**changes):
        arguments = Layer("arguments", {**values, "allow_code": True, **changes})
        return resolve(GRPOSettings, read_layer(recipe), arguments)

    first = grpo(with_recipe(), console=quiet)
    recorded = read_record(first.folder)["settings"]
    assert recorded["rewards"][0]["name"] == f"{rewards_file}:wanted_share" and "allow_code" not in recorded
    grpo(with_recipe(max_steps=6), resume=first.folder, console=quiet)  # with the recipe, and with the record alone
    again = resolve(GRPOSettings, Layer("record", recorded), Layer("arguments", {"allow_code": True, "max_steps": 8}))
    assert grpo(again, resume=first.folder, console=quiet).metrics["reward/wanted_share"] > 0


def test_only_adapters_move(grpo_settings, base_folder, quiet):
    settings = grpo_settings(use_lora=True, lora_preset="all", init_kl_coef=0.1, learning_rate=2e-2)
    result = grpo(settings, console=quiet)
    before, after = load_model(base_folder), load_model(base_folder)
    model = PeftModel.from_pretrained(after, result.folder)
    for name, weight in before.named_parameters():
        path = name.replace(".weight", ".base_layer.weight")
        kept = dict(model.get_base_model().named_parameters())
        assert torch.equal(kept.get(path, kept.get(name)), weight)
    moved = [p.abs().max() for name, p in model.named_parameters() if "lora_B" in name]
    assert moved and all(value > 0 for value in moved)
    assert logged(result.folder, "kl")[0] == pytest.approx(0, abs=1e-6)  # adapters off are the reference
    assert logged(result.folder, "kl")[-1] > 0


def test_every_weight_moves_and_the_reference_does_not(grpo_settings, base_folder, quiet):
    result = grpo(grpo_settings(init_kl_coef=0.1), console=quiet)
    before = dict(load_model(base_folder).named_parameters())
    after = dict(load_model(result.folder).named_parameters())
    assert not [name for name in before if torch.equal(before[name], after[name])]
    kl = logged(result.folder, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4


def test_another_reference(grpo_settings, base_folder, tmp_path, quiet):
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    model = load_model(other)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.2 * torch.randn(model.get_output_embeddings().weight.shape))
    model.save_pretrained(other)
    result = grpo(grpo_settings(reference_checkpoint=str(other), max_steps=1), console=quiet)
    assert logged(result.folder, "kl")[0] > 0.01
    settings = grpo_settings(reference_checkpoint=str(other), use_lora=True, output_dir=str(tmp_path / "x"))
    with pytest.raises(UserError, match="not supported with LoRA"):
        grpo(settings, console=quiet)


def test_columns_reach_the_reward(grpo_settings, rewards_file, quiet):
    rewards = [{"name": f"{rewards_file}:of_animal", "min": 0, "max": 100}, "length | 0.5"]
    result = grpo(grpo_settings(rewards=rewards, max_steps=1), console=quiet)
    assert {"reward/of_animal", "reward/length"} <= set(result.metrics)


@pytest.mark.parametrize("save_best_only", [False, True])
def test_validation_prompts_and_the_best_reward(save_best_only, grpo_settings, quiet):
    chosen = {"eval_every": 4, "eval_batches": 1, "max_steps": 12, "init_kl_coef": 0, "save_total_limit": 2}
    result = grpo(grpo_settings(validation_fraction=0.1, save_best_only=save_best_only, **chosen), console=quiet)
    rewards = logged(result.folder, "eval_reward")
    assert len(rewards) == 4  # the first before training
    assert result.metrics["eval_reward"] == pytest.approx(max(rewards[1:]) if save_best_only else rewards[3])
    names = {path.name for path in result.folder.glob("checkpoint-*")}
    assert names >= {f"checkpoint-{4 * max(range(1, 4), key=rewards.__getitem__)}", "checkpoint-12"}
    assert "eval_best_of_group" not in result.metrics and "eval_clipped_share" in result.metrics


def test_evaluation_changes_nothing(grpo_settings, chat_file, tmp_path, quiet):
    """Bit for bit: when it evaluates, on how many prompts, and whether the run was extended on the way."""
    steady = {"warmup_steps": 0, "scheduler": "none", "validation_fraction": 0.1, "adaptive_kl": True}
    make = lambda name, **changes: grpo_settings(**{**steady, **changes}, output_dir=str(tmp_path / name))  # noqa: E731
    runs = [
        grpo(make("whole", eval_every=1000, eval_batches=1), console=quiet),
        grpo(make("often", eval_every=1, eval_batches=3), console=quiet),
    ]
    first = grpo(make("part", eval_every=3, eval_batches=3, max_steps=5), console=quiet)
    runs.append(grpo(make("part", eval_every=2, eval_batches=3), resume=first.folder, console=quiet))
    weights = [load_model(run.folder).state_dict() for run in runs]
    assert len(logged(runs[1].folder, "eval_reward")) == 9
    for run, other in zip(runs[1:], weights[1:], strict=True):
        for name in ("loss", "reward", "kl", "kl_coef", "grad_norm"):
            assert logged(run.folder, name) == logged(runs[0].folder, name), name
        assert all(torch.equal(weight, other[name]) for name, weight in weights[0].items())
    often, part = (logged(run.folder, "eval_reward") for run in (runs[1], first))
    assert part[:3] == [often[0], often[3], often[5]]  # the same weights are scored alike


def test_the_split_of_an_update_changes_nothing(grpo_settings, tmp_path, quiet):
    """Four completions an update, in one forward pass or in four, with the terms that each is a mean of its own."""
    changes = {"ent_coef": 0.3, "adaptive_kl": True, "kl_horizon": 8, "target_kl": 0.001}
    runs = [
        grpo(
            grpo_settings(
                mini_batch_size=size,
                gradient_accumulation_steps=8 // size,
                eval_batches=8 // size,
                validation_fraction=0.1,
                output_dir=str(tmp_path / str(size)),
                **changes,
            ),
            console=quiet,
        ).folder
        for size in (8, 2)
    ]
    for name in ("loss", "grad_norm", "reward", "kl", "kl_coef", "entropy"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), abs=1e-5), name


@pytest.mark.parametrize("optimizer", ["sophia", "muon"])
def test_other_optimizers_sample_once(optimizer, grpo_settings, quiet, monkeypatch):
    sampled = []
    original = LLMLabGRPOTrainer.finish_rollout
    monkeypatch.setattr(
        LLMLabGRPOTrainer, "finish_rollout", lambda self, rollout: sampled.append(1) or original(self, rollout)
    )
    result = grpo(grpo_settings(optimizer=optimizer, learning_rate=1e-3, max_steps=12), console=quiet)
    assert len(sampled) == 3 and len(logged(result.folder)) == 12


def test_an_extended_run_estimates_and_samples_alike(grpo_settings, tmp_path, quiet):
    """At the sixth step a resumed run samples for Sophia's estimate: with the random state of the run before it."""
    changes = {
        "optimizer": "sophia",
        "sophia_update_every": 5,
        "learning_rate": 1e-3,
        "ppo_epochs": 1,
        "batch_size": 2,
    }
    changes |= {"scheduler": "none", "warmup_steps": 0}
    make = lambda name, steps: grpo_settings(**changes, max_steps=steps, output_dir=str(tmp_path / name))  # noqa: E731
    whole = grpo(make("whole", 7), console=quiet).folder
    first = grpo(make("part", 5), console=quiet).folder
    part = grpo(make("part", 7), resume=first, console=quiet).folder
    for name in ("loss", "reward"):
        assert logged(part, name) == logged(whole, name), name


def test_a_run_without_variance_ends_with_advice(grpo_settings, tmp_path, quiet):
    settings = grpo_settings("constant", stop_patience=2, max_steps=40)
    with pytest.raises(UserError, match=r"step 5: .* last 2 logged lines all completions .*0\.5.*reward-check"):
        grpo(settings, console=quiet)
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed" and "nothing can be learned" in record["reason"]


def test_a_run_of_cut_completions_ends_with_advice(grpo_settings, quiet):
    with pytest.raises(UserError, match="over 90% of the completions were cut off at max_new_tokens = 2"):
        grpo(grpo_settings(max_new_tokens=2, stop_patience=3, max_steps=40), console=quiet)


def test_patience_may_be_endless(grpo_settings, quiet):
    grpo(grpo_settings("constant", max_steps=12), console=quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ["jsonvalid"]}, "jsonvalid.*json_valid"),
        ({"reward_model": "./nowhere"}, "nowhere: there is no such folder"),
        ({"reward": "broken"}, "reward 'broken' failed at row 0 of 16 .*ZeroDivisionError"),
        ({"reward": "not_a_number"}, "reward 'not_a_number' gave nan at row 0"),
        ({"allow_code": False}, "--allow-code"),
        ({"max_samples": 3}, "only 3 prompts"),
        ({"max_prompt_length": 5}, "240 x longer than max_prompt_length = 5 tokens"),
        ({"use_vllm": True}, "vLLM is not installed"),
        ({"trainer_args": {"num_generations": 2}}, "set 'group_size' instead"),
        ({"trainer_args": {"generation_batch_size": 2}}, "set 'batch_size' instead"),
    ],
)
def test_what_cannot_be_trained(changes, message, grpo_settings, quiet):
    with pytest.raises(UserError, match=message):
        grpo(grpo_settings(**changes), console=quiet)


def test_a_file_cannot_allow_code(grpo_settings, tmp_path, quiet):
    given = grpo_settings()
    values = {name: getattr(given, name) for name in given.model_fields_set if name != "allow_code"}
    resolved = resolve(GRPOSettings, Layer("recipe.yaml", {**values, "allow_code": True}, path=tmp_path))
    with pytest.raises(UserError, match="recipe.yaml.*allow_code cannot be set in a file"):
        grpo(resolved, console=quiet)


def test_the_stage_is_public():
    import llmlab

    assert llmlab.grpo is stage.grpo and llmlab.GRPOSettings is GRPOSettings
    with pytest.raises(SettingsError):
        resolve(GRPOSettings, Layer("x", {"group_size": 1}))


def test_functions_in_a_notebook(grpo_settings, quiet):
    def of_length(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    own = Reward(of_length, low=0, high=8, weight=0.5)
    alone = grpo(grpo_settings(rewards=None, max_steps=2), rewards=[own], console=quiet)  # no reward model beside it
    lines = read_metrics(alone.folder)
    assert lines[0]["reward"] == pytest.approx(lines[0]["completion_length"] / 8)
    assert read_record(alone.folder)["data"]["rewards"] == {"of_length": 0.5}
    both = grpo_settings(max_steps=2, output_dir=str(alone.folder.with_name("both")))
    result = grpo(both, rewards=[own], console=quiet)
    assert {"reward/of_length", "reward/wanted_share"} <= result.metrics.keys()
    with pytest.raises(UserError, match="reward 'of_length': its range is not known"):
        grpo(grpo_settings(rewards=None, output_dir=str(alone.folder.with_name("x"))), rewards=[of_length])


def test_adapters_of_an_earlier_run_are_trained_further(grpo_settings, tmp_path, quiet):
    # without dropout, in which policy and reference would differ at once
    lora = {"use_lora": True, "lora_dropout": 0.0}
    first = grpo(grpo_settings(**lora, max_steps=4, output_dir=str(tmp_path / "first")), console=quiet)
    settings = {"policy_checkpoint": str(first.folder), "max_steps": 6, "save_every": 3}
    second = grpo(grpo_settings(**settings), console=quiet)
    assert logged(second.folder, "kl")[0] == pytest.approx(0, abs=1e-6)  # the adapters as they began
    assert logged(second.folder, "kl")[-1] > 0
    shutil.rmtree(second.folder / "checkpoint-6")
    resumed = grpo(grpo_settings(**settings), resume=second.folder, console=quiet)
    assert logged(resumed.folder) == pytest.approx(logged(second.folder), abs=1e-6)
    assert json.loads((resumed.folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_reward_model_of_ours_beside_another_reward(grpo_settings, preference_settings, tmp_path, quiet):
    scorer = reward(
        preference_settings(RewardModelSettings, max_steps=2, output_dir=str(tmp_path / "scorer")), console=quiet
    )
    both = grpo_settings(rewards=["length | 0.5"], reward_model=str(scorer.folder), max_steps=2, allow_code=False)
    result = grpo(both, console=quiet)
    assert 0 < result.metrics["reward/reward_model"] < 1 and "reward/length" in result.metrics
    lines = read_metrics(result.folder)
    parts = lines[0]["reward/length"] * 0.5 + lines[0]["reward/reward_model"]
    assert lines[0]["reward"] == pytest.approx(parts / 1.5, abs=1e-5)  # the range of the sum is 0 to 1.5


def test_epochs_and_the_context_count_prompts(grpo_settings, quiet):
    """Two passes over so many prompts, of those that leave room for a completion in the context."""
    changes = {"epochs": 2, "max_samples": 24, "batch_size": 8, "mini_batch_size": 32, "ppo_epochs": 1}
    changes["allow_code"] = True  # is given anew each time
    given = {**grpo_settings().model_dump(exclude_unset=True), **changes}
    given.pop("max_steps")
    result = grpo(GRPOSettings(**given), console=quiet)
    record = read_record(result.folder)
    assert record["step"] == 2 * 24 // 8 and "max_steps" not in record["settings"]


def test_a_gate_chooses_the_best_checkpoint_of_a_run_counted_in_episodes(grpo_settings, chat_file, tmp_path, quiet):
    prompts = shutil.copy(chat_file, tmp_path / "held_out.jsonl")
    gate = {"name": "distinct_n", "prompts": str(prompts), "n": 4, "max_new_tokens": 4}
    changes = {"num_episodes": 16, "eval_every": 4, "gate_every": 4, "validation_fraction": 0.1, "eval_batches": 1}
    changes |= {"gates": [gate], "metric_for_best_model": "gate distinct_n", "allow_code": True}
    values = {**grpo_settings().model_dump(exclude_unset=True), **changes}
    values.pop("max_steps")
    result = grpo(GRPOSettings(**values), console=quiet)
    assert read_record(result.folder)["step"] == 4  # a rollout of 4 x 4, twice in updates of 8
    assert 0 <= result.metrics["gate/distinct_n"] <= 1


def test_tools_of_a_row_are_shown_to_the_policy_and_known_to_rewards(
    grpo_settings, base_folder, tmp_path, quiet, monkeypatch
):
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "now")]
    rows = [{"prompt": f"How {k}?", "tools": json.dumps([tools[k % 2]]) if k % 3 else None} for k in range(12)]
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def watch(self, prompt_ids, *args, **kwargs):
        seen.extend(self.processing_class.batch_decode(prompt_ids))
        return generate(self, prompt_ids, *args, **kwargs)

    generate = RolloutSteps._generate_single_turn
    monkeypatch.setattr(RolloutSteps, "_generate_single_turn", watch)
    offered = []

    def watched(completions, prompts, tools, **columns):
        offered.extend(zip(prompts, tools, strict=True))
        return [0.5] * len(completions)

    settings = grpo_settings(
        datasets=[{"name": str(path)}], rewards=["tool_success"], normalize_rewards=False, max_steps=2
    )
    grpo(settings, rewards=[watched], console=quiet)
    tokenizer = load_tokenizer(str(base_folder))
    assert len(seen) == len(offered) >= 16 and any(named is None for _, named in offered)
    for text, (prompt, named) in zip(seen, offered, strict=True):
        assert text == tokenizer.apply_chat_template(prompt, tools=named, add_generation_prompt=True, tokenize=False)
