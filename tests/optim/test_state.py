"""An optimizer's state survives saving: what follows is bitwise what would have followed."""

import copy
import pickle

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llmlab.optim.sophia import Sophia, estimate_hessian_if_due


def step(model, optimizer, set_gradients, seeds):
    for seed in seeds:
        if isinstance(optimizer, Sophia) and seed % 2:
            set_gradients(model, seed + 100)
            optimizer.update_hessian()
        set_gradients(model, seed)
        optimizer.step()


ALL = ["adamw", "adafactor", "lion", "sophia", "muon"]
# torch casts a loaded state to its parameter's dtype, and Adafactor's is always fp32: bf16 weights round it.
CASES = [(name, torch.float32) for name in ALL] + [(name, torch.bfloat16) for name in ALL if name != "adafactor"]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_loaded_optimizer_continues_bitwise(name, dtype, tiny_llama, build, set_gradients, tmp_path):
    model = tiny_llama().to(dtype)
    optimizer = build(model, name)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    step(model, optimizer, set_gradients, [1, 2, 3])
    schedule.step()
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
    twin = copy.deepcopy(model)

    step(model, optimizer, set_gradients, [4, 5])
    loaded = build(twin, name, lr=0.5)
    loaded_schedule = torch.optim.lr_scheduler.LambdaLR(loaded, lambda step: 0.5**step)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded.load_state_dict(states[0])
    loaded_schedule.load_state_dict(states[1])
    assert [g["lr"] for g in loaded.param_groups] == [g["lr"] for g in optimizer.param_groups]
    step(twin, loaded, set_gradients, [4, 5])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

    schedule.step()
    loaded_schedule.step()
    step(model, optimizer, set_gradients, [6])
    step(twin, loaded, set_gradients, [6])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_pickled_optimizer_continues_bitwise(tiny_llama, build, set_gradients):
    model = tiny_llama()
    optimizer = build(model, "sophia")
    step(model, optimizer, set_gradients, [1, 2])
    twin, twins_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    step(model, optimizer, set_gradients, [3, 4])
    step(twin, twins_optimizer, set_gradients, [3, 4])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


class LoggingTrainer(Trainer):
    """The Trainer with Sophia's estimates, and with its losses in a list."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = {}

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        estimate_hessian_if_due(self.model_wrapped, self._prepare_inputs(batches[0]), self.optimizer, self.args.seed)
        return batches, items

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            self.losses[self.state.global_step] = logs["loss"]
        super().log(logs, *args, **kwargs)


def test_the_trainer_resumes_with_the_same_losses(optimizer_name, tiny_llama, build, tmp_path):
    rows = torch.randint(0, 24, (64, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trainer(seed):
        model = tiny_llama(seed, attention_dropout=0.1)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        return LoggingTrainer(
            model,
            arguments,
            train_dataset=data,
            optimizers=(build(model, optimizer_name, sophia_update_every=3), None),
        )

    whole = trainer(seed=0)
    whole.train()
    resumed = trainer(seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(whole.losses) == list(range(1, 9))
    assert resumed.losses == {step: whole.losses[step] for step in range(5, 9)}
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
