"""Each trainer makes its tensors where its model is: on `meta`, which refuses to mix with the CPU, as a GPU does."""

import pytest
import torch
import torch.fx.experimental._config
from rich.console import Console
from transformers import Trainer, TrainingArguments

from llmlab.model import LLMLabForCausalLM, load_config
from llmlab.optim.build import build_optimizer
from llmlab.optim.sophia import Sophia
from llmlab.stages import STAGES

META = torch.device("meta")
TRAINING = ["pretrain", "sft", "dpo", "orpo", "reward", "grpo", "ppo"]


class Seen(Exception):
    """Ends a run where its trainer would begin."""


def to_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if isinstance(value, dict):
        return {name: to_meta(part) for name, part in value.items()}
    return [to_meta(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
def numbers(monkeypatch):
    """Lets metrics read numbers from tensors that have none."""

    def ones(shape):
        return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0

    for name, made in (
        ("item", lambda tensor: 1.0),
        ("tolist", lambda tensor: ones(tensor.shape)),
        ("__bool__", lambda tensor: True),
        ("__int__", lambda tensor: 1),
        ("__float__", lambda tensor: 1.0),
    ):
        original = getattr(torch.Tensor, name)

        def read(tensor, original=original, made=made):
            return made(tensor) if tensor.is_meta else original(tensor)

        monkeypatch.setattr(torch.Tensor, name, read)
    enabled, autocast, adamw = torch.is_autocast_enabled, torch.autocast, torch.optim.AdamW.__init__
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **options: autocast("cpu" if kind == "meta" else kind, **options)
    )
    monkeypatch.setitem(vars(torch.fx.experimental._config), "meta_nonzero_assume_all_nonzero", True)
    # torch fuses on real devices alone
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda self, *a, **k: adamw(self, *a, **{**k, "fused": False}))


@pytest.fixture
def trainer_of(tiny_settings, tmp_path, monkeypatch):
    """Returns a function that runs a stage as far as its trainer."""

    def stop(trainer, **kwargs):
        raise Seen(trainer)

    def make(stage, **changes):
        with monkeypatch.context() as patch, pytest.raises(Seen) as seen:
            patch.setattr(Trainer, "train", stop)
            STAGES[stage].function(tiny_settings(stage, tmp_path / "run", **changes), console=Console(quiet=True))
        return seen.value.args[0]

    return make


def test_mixing_is_refused():
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(2, device=META) + torch.ones(2)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", TRAINING)
def test_steps_of_trainers(stage, adapters, trainer_of, numbers, monkeypatch):
    """The batch is collated, and rollouts are sampled, on the CPU, where a data loader has them."""
    if stage == "pretrain" and adapters:
        return
    changes = {"validation_fraction": 0.1, "ppo_epochs": 2} if stage in ("grpo", "ppo") else {}
    trainer = trainer_of(stage, **changes, **({} if stage == "pretrain" else {"use_lora": adapters}))
    batch = next(iter(trainer.get_train_dataloader()))
    if stage in ("grpo", "ppo"):
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._prepare_inputs(batch)
    trainer.model.to(META)
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model.to(META)
    monkeypatch.setattr(TrainingArguments, "device", META)
    trainer.accelerator.state.device = META
    batch = to_meta(batch)
    if stage in ("grpo", "ppo"):
        trainer.scores, trainer.reward_weights = to_meta(trainer.scores), to_meta(trainer.reward_weights)
        trainer.values = to_meta(trainer.values)
        trainer.compacts = False  # prompts have no values here
        with torch.no_grad():
            batch = trainer.finish_rollout(batch)
    if hasattr(trainer, "count_pairs"):
        trainer.sizes = torch.tensor(trainer.count_pairs(batch), dtype=torch.float32, device=META)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(8, device=META))
    assert loss.device == META
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients and all(gradient.device == META for gradient in gradients)


@pytest.mark.parametrize("encoding", ["rope", "sinusoidal", "alibi", "yarn"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_positions_and_masks(base_folder, encoding, implementation, numbers):
    shape = type(load_config(str(base_folder)))(
        **{**load_config(str(base_folder)).to_dict(), "positional_encoding": encoding, "rope_parameters": None}
    )
    with META:
        model = LLMLabForCausalLM(shape)
    model.set_attn_implementation(implementation)
    ids, mask = (torch.ones(2, 16, dtype=torch.int64, device=META) for _ in range(2))
    assert model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.device == META
    assert model(ids, use_cache=True).logits.device == META


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "sophia", "muon"])
def test_steps_of_optimizers(optimizer, base_folder, tiny_settings, tmp_path, numbers):
    with META:
        model = LLMLabForCausalLM(load_config(str(base_folder)))
    settings = tiny_settings("pretrain", tmp_path, optimizer=optimizer)
    made = build_optimizer(model, settings, learning_rate=1e-3, weight_decay=0.1)
    for group in made.param_groups:
        group["fused"] = False
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(made, Sophia):
            made.update_hessian()
        made.step()
    states = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert states and all(value.device == META or value.ndim == 0 for value in states)
