"""PPO: TRL's loss with values against a plain loop, who moves, what is kept, and whether it learns."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOTrainer

from llmlab.settings.rl import PPOSettings
from llmlab.training.online.advantages import gae, per_turn, token_rewards
from llmlab.training.online.critic import FILE
from llmlab.training.online.ppo import PPOConfig, PPOTrainer

WORDS, PAD, EOS, TARGET = 14, 14, 15, 7
SHAPE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
KINDS = ("separate", "shared")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model whose weights are large enough for adapters to steer, in a folder, and its tokenizer."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).save_pretrained(folder)
    words = {**{f"w{i}": i for i in range(WORDS)}, "<pad>": PAD, "<eos>": EOS}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def share(completion_ids, **columns):
    return [sum(token == TARGET for token in ids) / max(len(ids), 1) for ids in completion_ids]


@pytest.fixture
def trainer(toy, tmp_path):
    """Returns a function that makes a trainer of a second or two."""

    def make(kind=PPOTrainer, *, lora=False, reward=share, scorer=None, callbacks=(), rollout_func=None, **changes):
        values = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "generation_batch_size": 16,
            "num_iterations": 2,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "max_completion_length": 6,
            "beta": 0.05,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 1,
        }
        adapters = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3, target_modules="all-linear")
        prompts = [{"prompt": " ".join(f"w{(i + j) % WORDS}" for j in range(1 + i % 3))} for i in range(64)]
        return kind(
            settings=PPOSettings(policy_checkpoint=str(toy), rewards=["length"]),  # arguments are those below
            model=LlamaForCausalLM.from_pretrained(toy),
            processing_class=PreTrainedTokenizerFast.from_pretrained(toy),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(prompts),
            args=PPOConfig(**{**values, **changes}),
            peft_config=adapters if lora else None,
            scorer=scorer,
            callbacks=list(callbacks),
            rollout_func=rollout_func,
        )

    return make


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if line.get(name) is not None]


class Watched(PPOTrainer):
    """Keeps how far ratios were from 1 at each forward pass of an update, and counts rollouts."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.off_by, self.rollouts = [], []

    def finish_rollout(self, rollout):
        self.rollouts.append(super().finish_rollout(rollout))
        return self.rollouts[-1]

    def total_loss(self, policy_loss, inputs):
        loss = super().total_loss(policy_loss, inputs)
        ratio = (self.log_probs - inputs["old_per_token_logps"]).exp()
        self.off_by.append(((ratio - 1) * inputs["completion_mask"]).abs().max().item())
        return loss


def batch_of(trainer, rows=4, time=6):
    """A batch as a rollout leaves it, with what a tool wrote in the middle of two rows and padding at two ends."""
    draw = torch.Generator().manual_seed(7)
    mask, tool = torch.ones(rows, time, dtype=torch.long), torch.ones(rows, time, dtype=torch.long)
    mask[1, 4:] = mask[3, 5:] = 0
    tool[0, 2:4] = tool[3, 1] = 0
    prompt_mask = torch.ones(rows, 3, dtype=torch.long)
    prompt_mask[2, :2] = 0
    batch = {
        "prompt_ids": torch.randint(0, WORDS, (rows, 3), generator=draw),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(0, WORDS, (rows, time), generator=draw),
        "completion_mask": mask,
        "tool_mask": tool,
        "num_items_in_batch": (mask * tool).sum(),
        **{name: torch.randn(rows, time, generator=draw) for name in ("advantages", "old_values", "returns")},
    }
    with torch.no_grad():
        now = trainer.score_tokens(batch)
    batch["old_per_token_logps"] = now + 0.3 * torch.randn(rows, time, generator=draw)
    return batch


def one_update(trainer):
    """Readies a trainer for a single loss of a whole rollout, its critic with something to say."""
    torch.manual_seed(3)
    torch.nn.init.normal_(trainer.critic.head.weight)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


ONE = {"per_device_train_batch_size": 4, "generation_batch_size": 4, "temperature": 0.7}


@pytest.mark.parametrize("value_model", KINDS)
def test_the_loss_is_the_papers(value_model, trainer):
    ppo = one_update(
        trainer(value_model=value_model, vf_coef=0.3, cliprange_value=0.4, entropy_coef=0.02, epsilon=0.2, **ONE)
    )
    batch = batch_of(ppo)
    loss = ppo.compute_loss(ppo.model, batch).item()

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = ppo.model(input_ids=ids, attention_mask=attention).logits.double() / 0.7
        backbone = ppo.critic.backbone if value_model == "separate" else ppo.model.model
        hidden = backbone(input_ids=ids, attention_mask=attention).last_hidden_state.double()
        values = hidden @ ppo.critic.head.weight[0].double() + ppo.critic.head.bias.double()
    policy = value = entropy = count = 0
    written = batch["completion_mask"] * batch["tool_mask"]
    for row in range(4):
        for t in range(6):
            if not written[row, t]:
                continue
            chances = logits[row, 3 + t - 1].softmax(0).tolist()  # the state before the token was chosen
            old = batch["old_per_token_logps"][row, t].item()
            ratio = math.exp(math.log(chances[batch["completion_ids"][row, t]]) - old)
            advantage = batch["advantages"][row, t].item()
            policy -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            v, o, r = (
                values[row, 3 + t - 1].item(),
                batch["old_values"][row, t].item(),
                batch["returns"][row, t].item(),
            )
            value += 0.5 * max((v - r) ** 2, (min(max(v, o - 0.4), o + 0.4) - r) ** 2)
            entropy -= sum(p * math.log(p) for p in chances)
            count += 1
    assert loss == pytest.approx((policy + 0.3 * value - 0.02 * entropy) / count, rel=1e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared prompts"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_scores_and_gradients_without_padding_are_trls(lora, shared, trainer, monkeypatch):
    ppo = one_update(trainer(lora=lora, **ONE))
    batch, found, sizes = batch_of(ppo), [], []
    if shared:  # by rows 0 and 3, and by 1 and 2, of two tokens
        batch["prompt_ids"][3] = batch["prompt_ids"][0]
        batch["prompt_ids"][1:3] = torch.tensor([[0, 5, 6], [PAD, 5, 6]])
        batch["prompt_mask"][1:3, 0] = 0
        batch["prompt_mask"][1:3, 1:] = 1
    ppo.model.register_forward_pre_hook(
        lambda *args: sizes.append(tuple(args[2]["input_ids"].shape)), with_kwargs=True
    )
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for score in (PPOTrainer, GRPOTrainer):  # ours, and TRL's
        ppo.model.zero_grad()
        log_probs, entropies, _ = score._get_per_token_logps_and_entropies(
            ppo, ppo.model, ids, mask, 6, compute_entropy=True
        )
        (log_probs * weights).sum().backward()
        gradients = [p.grad for p in ppo.model.parameters() if p.grad is not None]
        found.append((log_probs, entropies * batch["completion_mask"], *gradients))
    # in place of prompts and completions: 2 prompts without their last tokens, and 7 + 6 or 5 + 7 more
    assert sizes == [(2, 15) if shared else (4, 9), (4, 9)]
    assert len(found[0]) == len(found[1]) > 4
    largest = max(values.abs().max().item() for values in found[1])  # rounding in fp32 is 6e-8 of what is summed
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=5e-7 * largest, rtol=1e-6)
    values, ppo.compacts = ppo.values.clone(), False
    ppo.score_tokens(batch)
    assert values.abs().max() > 0.1
    assert torch.allclose(values * batch["completion_mask"], ppo.values * batch["completion_mask"], atol=1e-5)


@pytest.mark.parametrize("value_model", KINDS)
def test_what_tools_wrote_gives_no_gradient(value_model, trainer):
    ppo = one_update(trainer(value_model=value_model, **ONE))
    batch = batch_of(ppo)
    other = 1 - batch["completion_mask"] * batch["tool_mask"]

    def gradients():
        ppo.model.zero_grad()
        ppo.compute_loss(ppo.model, batch).backward()
        return [p.grad.clone() for p in ppo.model.parameters() if p.grad is not None]

    before = gradients()
    assert any(g.abs().sum() > 0 for g in before)
    for name in ("advantages", "returns", "old_values", "old_per_token_logps"):
        batch[name] = torch.where(other.bool(), 5.0, batch[name])
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_the_kl_is_in_the_reward_and_not_in_the_loss(trainer):
    ppo = one_update(trainer(beta=0.5, **ONE))
    batch = batch_of(ppo)
    loss = ppo.compute_loss(ppo.model, batch).item()  # without any ref_per_token_logps
    assert math.isfinite(loss) and ppo.beta == 0.5

    written = batch["completion_mask"] * batch["tool_mask"]
    scores = torch.tensor([1.0, 2.0, float("nan"), 3.0])
    ppo.scores = scores
    values = torch.randn(4, 6)
    ppo.values = values
    ppo.args.whiten_advantages, ppo.args.gamma, ppo.args.gae_lambda = False, 0.9, 0.8
    batch["ref_per_token_logps"] = batch["old_per_token_logps"] - 0.25
    done = ppo.finish_rollout(batch)
    rewards = token_rewards(scores.nan_to_num(), torch.full((4, 6), 0.5 * 0.25), written)
    expected, returns = gae(rewards, values, written, per_turn(written, 0.9), per_turn(written, 0.8))
    rows = [0, 1, 3]
    assert torch.allclose(done["advantages"][rows], expected[rows])
    assert torch.allclose((done["returns"] * written)[rows], returns[rows])
    # no reward applied to the third: it teaches nothing
    assert not done["advantages"][2].any() and torch.equal(done["returns"][2], done["old_values"][2])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("lora", [False, True])
def test_a_rollout_begins_with_a_ratio_of_one_and_no_kl(lora, temperature, trainer):
    ppo = trainer(Watched, lora=lora, temperature=temperature, learning_rate=1e-2, max_steps=5)
    ppo.train()
    assert ppo.off_by[0] < 1e-5  # dropout or not, the policy of the first update is the one that sampled
    assert max(ppo.off_by[1:4]) > 1e-3
    assert ppo.off_by[4] < 1e-5  # and so is that of the next rollout
    assert logged(ppo, "kl")[0] == pytest.approx(0, abs=1e-9)
    assert logged(ppo, "kl")[-1] > 1e-5
    assert logged(ppo, "policy_kl")[0] == pytest.approx(0, abs=1e-9)


def test_a_single_pass_knows_its_old_policy_too(trainer):
    ppo = trainer(Watched, num_iterations=1, generation_batch_size=8, beta=0.0)  # TRL scores nothing here by itself
    ppo.train()
    assert max(ppo.off_by) < 1e-5
    assert "kl" not in ppo.state.log_history[0] and ppo.ref_model is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("value_model", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_trained_moves_and_the_rest_does_not(lora, value_model, checkpointing, trainer):
    ppo = trainer(lora=lora, value_model=value_model, learning_rate=1e-2, gradient_checkpointing=checkpointing)
    before = {name: p.detach().clone() for name, p in ppo.model.named_parameters()}
    trainable = {name for name, p in ppo.model.named_parameters() if p.requires_grad}
    ppo.train()
    moved = {name for name, p in ppo.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable
    critics = {name for name in trainable if name.startswith("critic.")}
    assert {"critic.head.weight", "critic.head.bias"} <= critics
    if value_model == "shared":
        assert len(critics) == 2
    elif lora:
        assert all("lora_" in name for name in critics if ".backbone." in name)
        # a second set of adapters, and not a second model
        policy = sum(p.numel() for name, p in ppo.model.named_parameters() if "lora_" in name and name not in critics)
        assert sum(p.numel() for p in ppo.critic.parameters() if p.requires_grad) == policy + SHAPE["hidden_size"] + 1
        frozen = {id(p) for p in ppo.model.get_base_model().parameters()}
        assert all(id(p) in frozen for p in ppo.critic.parameters() if not p.requires_grad)


def test_checkpointed_gradients_of_adapters_are_the_same(trainer):
    """The critic's forward is computed again in the backward pass, with its own adapters and not the policy's."""
    runs = []
    for checkpointing in (False, True):
        ppo = trainer(lora=True, gradient_checkpointing=checkpointing)
        ppo.train()
        runs.append({name: p.detach().clone() for name, p in ppo.model.named_parameters()})
    assert all(torch.allclose(p, runs[1][name], atol=1e-5) for name, p in runs[0].items())


@pytest.mark.parametrize("lora", [False, True])
def test_a_separate_critic_starts_as_the_policy(lora, trainer):
    ppo = trainer(lora=lora)
    ids = torch.arange(6)[None]
    base = ppo.model.get_base_model() if lora else ppo.model
    with torch.no_grad():
        assert torch.equal(ppo.critic.backbone(ids).last_hidden_state, base.base_model(ids).last_hidden_state)
        assert not ppo.critic.head(base.base_model(ids).last_hidden_state).any()


def test_a_critic_starts_from_a_reward_model(trainer):
    torch.manual_seed(5)
    scorer = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)).eval()
    ids = torch.arange(6)[None]
    score = scorer(ids).logits[0, 0].item()
    ppo = trainer(scorer=scorer)
    with ppo.critic.collect_values() as heard:
        ppo.model.eval()(ids)
    assert heard[0][0, -1].item() == pytest.approx(score, abs=1e-6)
    ppo.train()
    assert "critic.backbone.layers.0.mlp.up_proj.weight" in dict(ppo.model.named_parameters())


@pytest.mark.parametrize("value_model", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_exports_have_no_critic(lora, value_model, trainer, toy, tmp_path):
    ppo = trainer(lora=lora, value_model=value_model, max_steps=2)
    ppo.train()
    ppo.save_model(str(tmp_path / "export"))
    ppo.model.save_pretrained(tmp_path / "plain")
    for folder in (tmp_path / "export", tmp_path / "plain"):
        (weights,) = folder.glob("*.safetensors")
        names = set(load_file(weights))
        assert names and not any("critic" in name for name in names)
        if not lora:
            assert names == set(load_file(toy / "model.safetensors"))
    fresh = LlamaForCausalLM.from_pretrained(toy if lora else tmp_path / "export")
    policy = PeftModel.from_pretrained(fresh, tmp_path / "export") if lora else fresh
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.allclose(policy.eval()(ids).logits, ppo.model.eval()(ids).logits, atol=1e-6)


class AtBegin(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states.append({name: tensor.clone() for name, tensor in model.critic.trained().items()})


@pytest.mark.parametrize("value_model", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_resuming_restores_the_critic_and_the_course(lora, value_model, trainer, tmp_path):
    rhythm = {"lora": lora, "value_model": value_model, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(**rhythm, max_steps=8)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    saved, seen = load_file(checkpoint / FILE), AtBegin()
    resumed = trainer(**rhythm, max_steps=8, callbacks=[seen])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    (state,) = seen.states
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    # the checkpoint is between two rollouts, so that the resumed run goes the same way to the last bit
    assert logged(resumed, "reward")[-1] == logged(whole, "reward")[-1]
    end, expected = resumed.critic.trained(), whole.critic.trained()
    assert all(torch.equal(end[name], expected[name]) for name in expected)


def test_a_critic_of_another_kind_is_refused(trainer, tmp_path):
    trainer(value_model="shared", save_strategy="steps", save_steps=4).train()
    with pytest.raises(ValueError, match="a critic with other parameters"):
        trainer(max_steps=8).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_passes_end_early_when_the_policy_has_moved(trainer):
    patient = trainer(Watched, num_iterations=4, max_steps=16)
    patient.train()
    assert len(patient.rollouts) == 2  # 16 completions in minibatches of 8, four times: 8 updates each
    hasty = trainer(Watched, num_iterations=4, max_steps=16, stop_kl=1e-9)
    hasty.train()
    assert len(hasty.rollouts) == 8  # the second update of each finds that the first has moved it
    assert logged(hasty, "early_stop") == [0, 1] * 8
    loose = trainer(Watched, num_iterations=4, max_steps=16, stop_kl=1e9)
    loose.train()
    assert len(loose.rollouts) == 2 and not any(logged(loose, "early_stop"))


def test_accumulating_is_the_same_update(trainer):
    """Two forward passes an update, or one of both: the same gradient, weighted by tokens and not by passes."""
    runs = []
    for size, accumulation in ((16, 1), (8, 2)):
        ppo = trainer(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_iterations=1, max_steps=2
        )
        ppo.train()
        runs.append({name: p.detach().clone() for name, p in ppo.model.named_parameters()})
    assert all(torch.allclose(p, runs[1][name], atol=1e-4) for name, p in runs[0].items())


@pytest.mark.parametrize("sizes", [(1, 8), (4, 4), (16, 16)])
def test_one_completion_a_prompt(sizes, trainer):
    per_device, rollout = sizes
    ppo = trainer(Watched, per_device_train_batch_size=per_device, generation_batch_size=rollout, max_steps=2)
    ppo.train()
    assert ppo.num_generations == ppo.args.num_generations == 1
    assert len(ppo.rollouts[0]["completion_ids"]) == rollout
    prompts = {tuple(ids) for ids in ppo.rollouts[0]["prompt_ids"].tolist()}
    assert len(prompts) > rollout / 2  # no groups: (nearly) every prompt is another one


def test_several_rewards_are_weighted(trainer):
    def length(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    ppo = trainer(Watched, reward=[share, length], reward_weights=[2.0, -0.5], max_steps=1, beta=0.0, vf_coef=0.0)
    ppo.train()
    completions, mask = (ppo.rollouts[0][name] for name in ("completion_ids", "completion_mask"))
    lengths = mask.sum(1)
    scores = 2 * ((completions == TARGET) * mask).sum(1) / lengths - 0.5 * lengths
    assert torch.allclose(ppo.scores, scores)
    # with values of 0, gamma 1 and nothing charged, a return is at most the score away from 0
    first = ppo.rollouts[0]["returns"]
    assert torch.allclose(first[torch.arange(16), lengths - 1], scores)


LEARN = {
    "max_steps": 80,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "generation_batch_size": 32,
    "vf_coef": 0.5,
    "beta": 0.01,
}


@pytest.mark.parametrize("value_model", KINDS)
def test_it_learns(value_model, trainer):
    ppo = trainer(value_model=value_model, **LEARN)
    ppo.train()
    rewards = logged(ppo, "reward")
    first, last = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert first < 0.25 and last > 0.7
    assert sum(logged(ppo, "value_loss")[-8:]) < sum(logged(ppo, "value_loss")[16:24])  # it foresees what it earns


def test_adapters_learn(trainer):
    ppo = trainer(lora=True, **{**LEARN, "learning_rate": 1e-2})
    ppo.train()
    rewards = logged(ppo, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.4


def test_evaluation_changes_nothing(trainer):
    ppo = trainer(max_steps=4)
    ppo.train()
    ppo.eval_dataset = Dataset.from_list([{"prompt": f"w{i}"} for i in range(8)])
    metrics = ppo.evaluate()
    assert 0 <= metrics["eval_reward"] <= 1 and math.isfinite(metrics["eval_loss"])
    assert ppo.divergences == []


TOOL_SAYS = [3, TARGET, 4]


def episodes(prompts, trainer):
    """Two turns of three tokens each, and what a tool answers in between."""
    done = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for prompt in prompts:
        start = trainer.processing_class(prompt)["input_ids"]
        completion, mask = [], []
        for turn in range(2):
            for _ in range(3):
                with torch.no_grad():
                    logits = trainer.model(torch.tensor([start + completion])).logits[0, -1]
                completion.append(torch.multinomial(logits.softmax(0), 1).item())
                mask.append(1)
            if turn == 0:
                completion += TOOL_SAYS
                mask += [0] * len(TOOL_SAYS)
        for name, value in (("prompt_ids", start), ("completion_ids", completion), ("env_mask", mask)):
            done[name].append(value)
        done["logprobs"].append([0.0] * len(completion))
    return done


def test_episodes_with_a_tool(trainer, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def by_the_policy(completion_ids, **columns):
        return [sum(token == TARGET for token in ids[:3] + ids[6:]) / 6 for ids in completion_ids]

    course = {**LEARN, "beta": 0.0, "max_completion_length": 9, "max_steps": 60, "whiten_advantages": False}
    ppo = trainer(Watched, reward=by_the_policy, rollout_func=episodes, gamma=0.5, gae_lambda=1.0, **course)
    ppo.train()
    first = ppo.rollouts[0]
    assert not first["advantages"][:, 3:6].any() and first["advantages"][:, [0, 1, 2, 6, 7, 8]].any()
    # values are 0 at first: a return is the score, and half of it before the tool spoke; nothing else is discounted
    assert torch.allclose(first["returns"][:, 6:], first["returns"][:, -1:].expand(-1, 3))
    assert torch.allclose(first["returns"][:, :3], 0.5 * first["returns"][:, -1:].expand(-1, 3))
    rewards = logged(ppo, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
