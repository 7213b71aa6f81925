"""`llmlab ppo`: what a run leaves, that each option reaches the trainer, resuming, critics, and what is refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import load_classifier, load_model
from llmlab.runs.record import read_metrics, read_record
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer
from llmlab.settings.preference import RewardModelSettings
from llmlab.settings.rl import OnlineSettings, PPOSettings
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings
from llmlab.training.online.critic import FILE
from llmlab.training.online.ppo import PPOTrainer, ppo
from llmlab.training.preference.reward import reward
from llmlab.training.sft import sft


@pytest.fixture
def ppo_settings(base_folder, chat_file, share_file, tmp_path):
    """Returns a function that makes settings of a short run on the tiny model, rewarded for tokens of a set."""

    def make(**changes):
        values = {
            "policy_checkpoint": str(base_folder),
            "datasets": [{"name": str(chat_file)}],
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path.parent / "cache"),
            "num_proc": 1,
            "validation_fraction": 0,
            "rewards": [{"name": f"{share_file}:wanted_share", "min": 0, "max": 1}],
            "allow_code": True,
            "max_steps": 8,
            "scheduler": "none",
            "warmup_steps": 0,
            "learning_rate": 3e-3,
            "batch_size": 16,
            "mini_batch_size": 8,
            "ppo_epochs": 2,
            "max_new_tokens": 8,
            "log_every": 1,
            "eval_every": 1000,
            "dtype": "fp32",
            "seed": 3,
            "report": False,
        }
        return PPOSettings(**{**values, **changes})

    return make


def logged(folder, name="loss"):
    return [line[name] for line in read_metrics(folder) if name in line]


@pytest.mark.parametrize("value_model", ["separate", "shared"])
def test_a_run_learns_and_leaves_a_model(value_model, ppo_settings, base_folder, quiet):
    settings = ppo_settings(
        value_model=value_model,
        max_steps=100,
        validation_fraction=0.1,
        vf_coef=0.5,
        early_stop=False,
        init_kl_coef=0.01,
    )
    result = ppo(settings, console=quiet)
    rewards = logged(result.folder, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    names = {"reward", "kl", "kl_coef", "policy_kl", "value_loss", "explained_variance", "entropy", "clipped_share"}
    assert names <= result.metrics.keys() and "eval_reward" in result.metrics
    assert logged(result.folder, "kl")[0] == pytest.approx(0, abs=1e-7)
    assert set(load_file(result.folder / "model.safetensors")) == set(load_file(base_folder / "model.safetensors"))
    assert (result.folder / "checkpoint-100" / FILE).is_file() and not (result.folder / FILE).exists()
    moved, before = load_model(result.folder), load_model(base_folder)
    assert not any(
        torch.equal(a, b) for a, b in zip(moved.state_dict().values(), before.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("killed_at", [6, 8])
def test_a_resumed_run_goes_on_as_if_never_stopped(killed_at, use_lora, ppo_settings, quiet, tmp_path, cut_off):
    """At 6 the run stands in the middle of a rollout of four steps, at 8 between two."""
    lora = {"use_lora": True, "lora_preset": "all"} if use_lora else {}
    changes = {"adaptive_kl": True, "target_kl": 0.05, "kl_horizon": 50, "max_steps": 12, "save_every": 2, **lora}
    whole = ppo(ppo_settings(**changes, output_dir=str(tmp_path / "whole")), console=quiet)
    with cut_off.kill(killed_at + 2):  # a step after what was saved
        ppo(ppo_settings(**changes), console=quiet)
    resumed = ppo(ppo_settings(**changes), resume=tmp_path / "run", console=quiet)
    assert read_record(resumed.folder)["resumed"][0]["step"] == killed_at
    for name in ("loss", "value_loss", "reward", "kl", "kl_coef"):
        assert logged(resumed.folder, name) == pytest.approx(logged(whole.folder, name), abs=1e-6), name
    assert logged(whole.folder, "kl_coef")[-1] != 0.05
    first, second = (load_file(folder / "checkpoint-12" / FILE) for folder in (whole.folder, resumed.folder))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_evaluation_changes_nothing(ppo_settings, tmp_path, quiet):
    """Bit for bit: when it evaluates, on how many prompts, and whether the run was extended on the way."""
    make = lambda name, **changes: ppo_settings(  # noqa: E731
        **{"validation_fraction": 0.1, "adaptive_kl": True, **changes}, output_dir=str(tmp_path / name)
    )
    runs = [
        ppo(make("whole", eval_every=1000, eval_batches=1), console=quiet),
        ppo(make("often", eval_every=1, eval_batches=3), console=quiet),
    ]
    first = ppo(make("part", eval_every=3, max_steps=5), console=quiet)
    runs.append(ppo(make("part", eval_every=2), resume=first.folder, console=quiet))
    weights = [load_model(run.folder).state_dict() for run in runs]
    critics = [load_file(run.folder / "checkpoint-8" / FILE) for run in runs]
    assert len(logged(runs[1].folder, "eval_reward")) == 9
    for run, other, critic in zip(runs[1:], weights[1:], critics[1:], strict=True):
        for name in ("loss", "reward", "kl", "kl_coef", "value_loss", "grad_norm"):
            assert logged(run.folder, name) == logged(runs[0].folder, name), name
        assert all(torch.equal(weight, other[name]) for name, weight in weights[0].items())
        assert all(torch.equal(weight, critic[name]) for name, weight in critics[0].items())


def test_the_split_of_an_update_changes_nothing(ppo_settings, tmp_path, quiet):
    """Eight completions an update, in one forward pass or in four, with the terms that each is a mean of its own."""
    runs = [
        ppo(
            ppo_settings(
                mini_batch_size=size,
                gradient_accumulation_steps=8 // size,
                eval_batches=8 // size,
                validation_fraction=0.1,
                ent_coef=0.3,
                early_stop=True,
                output_dir=str(tmp_path / str(size)),
            ),
            console=quiet,
        ).folder
        for size in (8, 2)
    ]
    for name in ("loss", "grad_norm", "reward", "kl", "value_loss", "policy_kl", "entropy"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), abs=1e-5), name


def test_the_early_stop_is_at_one_and_a_half_targets(ppo_settings, monkeypatch, quiet):
    seen = []
    original = PPOTrainer.__init__

    def init(self, *args, **kwargs):
        seen.append(kwargs["args"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(PPOTrainer, "__init__", init)
    result = ppo(ppo_settings(target_kl=1e-6, max_steps=8), console=quiet)
    assert seen[0].stop_kl == pytest.approx(1.5e-6)
    assert logged(result.folder, "early_stop") == [0, 1] * 4
    assert len(logged(result.folder, "reward")) == 4  # rollouts


def test_options_reach_the_trainer(ppo_settings, monkeypatch, quiet):
    class Seen(Exception):
        pass

    def init(self, *, args, **kwargs):
        raise Seen(args)

    monkeypatch.setattr(PPOTrainer, "__init__", init)
    options = {
        "temperature": 0.6,
        "value_model": "shared",
        "vf_coef": 0.7,
        "cliprange_value": None,
        "gamma": 0.9,
        "gae_lambda": 0.8,
        "whiten_advantages": False,
        "kl_penalty": "abs",
        "early_stop": False,
        "clip_range": 0.3,
        "ent_coef": 0.04,
        "ppo_epochs": 3,
        "init_kl_coef": 0.02,
        "max_new_tokens": 5,
        "top_k": 4,
        "top_p": 0.9,
    }
    own = PPOSettings.model_fields.keys() - OnlineSettings.model_fields.keys()
    assert own - {"value_checkpoint", "output_dir"} <= options.keys()  # other tests show what these do
    with pytest.raises(Seen) as caught:
        ppo(ppo_settings(**options), console=quiet)
    args = caught.value.args[0]
    theirs = {
        "early_stop": ("stop_kl", None),
        "clip_range": ("epsilon", 0.3),
        "ent_coef": ("entropy_coef", 0.04),
        "ppo_epochs": ("num_iterations", 3),
        "init_kl_coef": ("beta", 0.02),
        "max_new_tokens": ("max_completion_length", 5),
    }
    for name, value in options.items():
        field, expected = theirs.get(name, (name, value))
        assert getattr(args, field) == expected, name
    assert args.generation_batch_size == 16 and args.per_device_train_batch_size == 8 and args.num_generations == 1


GUIDE = {
    "learning_rate": 1e-6,
    "batch_size": 16,
    "mini_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "ppo_epochs": 4,
    "clip_range": 0.2,
    "vf_coef": 0.5,
    "ent_coef": 0.01,
    "max_grad_norm": 1.0,
    "kl_penalty": "kl",
    "init_kl_coef": 0.05,
    "target_kl": 0.1,
    "adaptive_kl": True,
    "max_episode_length": 20,
    "gamma": 0.99,
    "lam": 0.95,
    "num_episodes": 50000,
    "log_interval": 100,
    "eval_interval": 1000,
    "save_interval": 2000,
    "optim": "adamw_torch",
    "weight_decay": 0.01,
}
SEED = {
    "policy_checkpoint": "sft",
    "reward_model_name": "OpenAssistant/reward-model-deberta-v3-large-v2",
    "ppo_epochs": 4,
    "clip_range": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "batch_size": 128,
    "mini_batch_size": 32,
    "max_new_tokens": 128,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}


@pytest.mark.parametrize("source", [GUIDE, SEED], ids=["guide", "seed"])
def test_the_seeds_configurations_are_read(source):
    settings = resolve(PPOSettings, Layer("ppo.yaml", source, path=Path("ppo.yaml"))).settings
    renamed = {"lam": "gae_lambda", "reward_model_name": "reward_model"}
    for name, value in source.items():
        if name not in ("max_episode_length", "optim"):
            assert getattr(settings, renamed.get(name, name)) == value
    if source is SEED:
        values = PPOSettings().model_dump()
        assert all(
            values[name] == value for name, value in SEED.items() if name in values and name != "policy_checkpoint"
        )
        return
    assert settings.optimizer == "adamw"
    told = settings.in_steps(1)
    # 16 episodes in updates of 4 x 4, four passes: four updates a rollout, 3,125 rollouts
    assert told.max_steps == 3125 * 4 and told.log_every == 25 and told.save_every == 500


def test_adapters_and_those_of_an_earlier_run(ppo_settings, base_folder, chat_file, tmp_path, quiet):
    lora = {"use_lora": True, "lora_preset": "all"}
    first = ppo(ppo_settings(**lora, output_dir=str(tmp_path / "first"), learning_rate=1e-2), console=quiet)
    names = set(load_file(first.folder / "adapter_model.safetensors"))
    assert names and not any("critic" in name for name in names)
    again = ppo(
        ppo_settings(**lora, policy_checkpoint=str(first.folder), output_dir=str(tmp_path / "again")), console=quiet
    )
    assert set(load_file(again.folder / "adapter_model.safetensors")) == names
    # the reference is the adapter as it began, and the critic has adapters of its own
    assert logged(again.folder, "kl")[0] == pytest.approx(0, abs=1e-7) and logged(again.folder, "kl")[-1] > 0
    saved = load_file(again.folder / "checkpoint-8" / FILE)
    assert {"head.weight", "head.bias"} < saved.keys() and all("ref" not in name for name in saved)
    before = load_file(first.folder / "adapter_model.safetensors")
    backbone = {name: value for name, value in saved.items() if "lora_B" in name}
    assert backbone and all(value.abs().max() > 0 for value in backbone.values())
    policy = PeftModel.from_pretrained(load_model(base_folder), again.folder)
    assert len(backbone) == sum("lora_B" in name for name, _ in policy.named_parameters()) == len(before) // 2


def test_a_reward_model_with_a_tokenizer_of_its_own(ppo_settings, deberta, quiet):
    """As the seed's recommended one: a DeBERTa, which reads question and answer as a pair of its own tokens."""
    settings = ppo_settings(rewards=None, reward_model=str(deberta), allow_code=False, max_steps=4, early_stop=False)
    result = ppo(settings, console=quiet)
    scores = logged(result.folder, "reward/reward_model")
    assert len(scores) == 1 and 0 < scores[0] < 1 and logged(result.folder, "reward") == pytest.approx(scores)
    assert all(value >= 0 for value in logged(result.folder, "reward_std"))
    assert read_record(result.folder)["settings"]["reward_model"] == str(deberta)


@pytest.mark.parametrize(("use_lora", "adapted"), [(False, False), (True, False), (True, True)])
def test_a_critic_from_a_reward_model(use_lora, adapted, ppo_settings, preference_settings, tmp_path, quiet):
    """`adapted`: the reward model itself is a folder of adapters."""
    lora = {"use_lora": True, "lora_preset": "all"}
    scorer = preference_settings(
        RewardModelSettings, output_dir=str(tmp_path / "scorer"), max_steps=4, **(lora if adapted else {})
    )
    scores = reward(scorer, console=quiet)
    lora = lora if use_lora else {}
    settings = ppo_settings(value_checkpoint=str(scores.folder), reward_model=str(scores.folder), **lora)
    result = ppo(settings, console=quiet)
    assert read_record(result.folder)["parents"][-1] == str(scores.folder)
    assert any(logged(result.folder, "value"))
    assert "reward/reward_model" in result.metrics
    learned = load_file(result.folder / "checkpoint-8" / FILE)
    assert all(("lora_" in name) == use_lora for name in learned if name.startswith("backbone."))


def test_a_critic_of_another_vocabulary_is_refused(ppo_settings, base_folder, tmp_path, quiet):
    other = tmp_path / "other"
    load_classifier(base_folder).save_pretrained(other)
    tokenizer = load_tokenizer(str(base_folder))
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=f"value_checkpoint = {other}: it has another vocabulary"):
        ppo(ppo_settings(value_checkpoint=str(other)), console=quiet)


def test_a_critic_does_not_start_from_what_cannot_score(ppo_settings, sft_settings, base_folder, tmp_path, quiet):
    adapters = sft(sft_settings(use_lora=True, max_steps=1, output_dir=str(tmp_path / "sft")), console=quiet).folder
    for source, found in ((base_folder, "LLMLabForCausalLM"), (adapters, "CAUSAL_LM")):
        with pytest.raises(UserError, match=f"value_checkpoint = {source}: .*found {found}.* folder of llmlab reward"):
            ppo(ppo_settings(value_checkpoint=str(source)), console=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"value_model": "shared", "value_checkpoint": "x"}, "value_model"),
        ({"gamma": 1.1}, "gamma"),
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"cliprange_value": 0}, "cliprange_value"),
        ({"batch_size": 10, "mini_batch_size": 4}, "not a multiple"),
    ],
)
def test_what_cannot_be_is_said(values, message):
    with pytest.raises(SettingsError, match=message):
        resolve(PPOSettings, Layer("ppo.yaml", values))


def test_it_starts_where_fine_tuning_ended(ppo_settings, sft_settings, tmp_path, quiet):
    tuned = sft(sft_settings(output_dir=str(tmp_path / "tuned"), max_steps=2), console=quiet)
    assert isinstance(sft_settings(), SFTSettings)
    result = ppo(ppo_settings(policy_checkpoint=str(tuned.folder), max_steps=2), console=quiet)
    assert read_record(result.folder)["parents"] == [str(tuned.folder)]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sophia", "learning_rate": 1e-4, "sophia_update_every": 3},
        {"optimizer": "muon"},
        {"dtype": "bf16", "use_lora": True, "lora_preset": "all", "gradient_checkpointing": True},
        {"use_lora": True, "lora_preset": "all", "modules_to_save": ["embed_tokens"]},
        {"save_best_only": True, "eval_every": 2, "validation_fraction": 0.1},
        {"kl_penalty": "abs", "normalize_rewards": False, "init_kl_coef": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_runs_of_other_kinds(changes, ppo_settings, base_folder, quiet):
    result = ppo(ppo_settings(early_stop=False, **changes), console=quiet)
    moved = logged(result.folder, "policy_kl")
    assert moved[0] == pytest.approx(0, abs=1e-6) and max(moved[1:]) > 1e-6
    model = load_model(base_folder)
    if "use_lora" in changes:
        PeftModel.from_pretrained(model, result.folder)
        again = ppo(
            ppo_settings(early_stop=False, **{**changes, "max_steps": 10}), resume=result.folder, console=quiet
        )
        assert logged(again.folder, "loss")[-1] != logged(again.folder, "loss")[-2]


def test_dropout_of_the_model_is_off(ppo_settings, base_folder, tmp_path, quiet):
    model = load_model(base_folder)
    model.config.dropout = model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "dropping")
    load_tokenizer(str(base_folder)).save_pretrained(tmp_path / "dropping")
    result = ppo(ppo_settings(policy_checkpoint=str(tmp_path / "dropping"), max_steps=2), console=quiet)
    assert logged(result.folder, "policy_kl")[0] == pytest.approx(0, abs=1e-9)
    assert load_model(result.folder).config.attention_dropout == 0.3  # later stages may want it


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_chat_template_that_adds_tokens(use_lora, ppo_settings, base_folder, tmp_path, quiet):
    """PEFT trains rows of the embeddings through wrappers of its own, which the critic has copies of."""
    base = tmp_path / "plain"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["the cat meows"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(base)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": fast.eos_token_id, "bos_token_id": None, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **shape, **ends)).save_pretrained(base)
    lora = {"use_lora": True, "lora_preset": "all"} if use_lora else {}
    settings = ppo_settings(policy_checkpoint=str(base), **lora)
    result = ppo(settings, console=quiet)
    assert logged(result.folder, "kl")[0] == pytest.approx(0, abs=1e-7)
    again = ppo(ppo_settings(**{**settings.model_dump(), "max_steps": 10}), resume=result.folder, console=quiet)
    saved = load_file(again.folder / "checkpoint-10" / FILE)
    assert any("embed_tokens" in name for name in saved)  # the critic learns the new rows too, in a copy of its own
    files = list(again.folder.glob("*.safetensors"))
    assert files and not any("critic" in name for path in files for name in load_file(path))


def test_frozen_weights_in_four_bits_are_held_once(ppo_settings, wide_base_folder, monkeypatch, quiet):
    pytest.importorskip("bitsandbytes")
    seen = []
    original = PPOTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(PPOTrainer, "__init__", init)
    settings = ppo_settings(policy_checkpoint=str(wide_base_folder), use_qlora=True, lora_preset="all")
    result = ppo(settings, console=quiet)
    (trainer,) = seen
    packed = [p for p in trainer.critic.parameters() if p.dtype == torch.uint8]
    held = {id(p) for p in trainer.model.get_base_model().parameters()}
    assert packed and all(id(p) in held for p in packed)
    assert logged(result.folder, "policy_kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(result.folder, "value")[-1] != 0
