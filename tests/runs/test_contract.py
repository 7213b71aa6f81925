"""The names of Transformers' and TRL's trainers that we hang on: this fails loudly when they change."""

import inspect
from importlib import import_module

import pytest
import trl
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer
from trl.experimental.orpo import ORPOTrainer

from llmlab.runs import _trl, trainer
from llmlab.runs.ledger import LOGPROB_CHUNK
from llmlab.training.online import _trl as online
from llmlab.training.online import passes, ppo, rollouts

PRIVATE_NAMES = {  # of `llmlab.runs._trl` and `trainer`: where it is, why no public name serves, its parameters
    # DPOTrainer tokenizes by itself, without a limit for prompts and without saying what it drops
    "trl.DPOTrainer._prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    # restoring only weights and step count when a run switches its optimizer
    "transformers.Trainer._load_optimizer_and_scheduler": ("self", "checkpoint"),
    # stop before a step with non-finite gradients: no callback gets their norm
    "transformers.Trainer._get_grad_norm": ("self", "model", "grad_norm"),
    # take no step when the checkpoint already has them all; the first value is the number of epochs
    "transformers.Trainer.set_initial_training_values": ("self", "args", "dataloader"),
    # rows that fill up an epoch's last batch are left out of the loss before its tokens are counted
    "transformers.Trainer._get_num_items_in_batch": ("self", "batch_samples", "device"),
    # checkpoints of sharded runs are laid out as those of one process
    "transformers.Trainer._save": ("self", "output_dir", "state_dict"),
    "transformers.Trainer._save_optimizer_and_scheduler": ("self", "output_dir"),
    # the same for the best one at the end
    "transformers.Trainer._load_best_model": ("self",),
    # damaged checkpoints become a UserError
    "transformers.Trainer._load_rng_state": ("self", "checkpoint"),
    # the same for its weights
    "transformers.Trainer._load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    # on CPUs TRL's loss head is slower and larger than full logits, and scores prompts and padding too
    "trl.trainer.utils._ChunkedLogProbFunction.forward": ("ctx", "hidden", "weight", "bias", "targets", "..."),
    "trl.trainer.utils._use_triton": ("device",),
    # Muon's own AdamW goes over memory eight times
    "pytorch_optimizer.Muon._step_foreach": ("self", "group", "params", "grads", "state_dict", "..."),
    # parameters without memory cannot be replaced in place
    "torch.nn.Module._apply": ("self", "fn", "recurse"),
}
ONLINE = (online, passes, rollouts, ppo)
TABLES = {_trl: PRIVATE_NAMES, trainer: PRIVATE_NAMES, **dict.fromkeys(ONLINE, online.PRIVATE_NAMES)}


@pytest.mark.parametrize(("place", "expected"), [*PRIVATE_NAMES.items(), *online.PRIVATE_NAMES.items()])
def test_private_names_are_still_there(place, expected):
    """A table that ends in `...` lists the first parameters, which are those used."""
    library, owner, name = place.rsplit(".", 2)
    method = getattr(getattr(import_module(library), owner), name)
    parameters = tuple(inspect.signature(method).parameters)
    used = tuple(name for name in expected if name != "...")
    assert parameters == used or (expected[-1] == "..." and parameters[: len(used)] == used)


def test_every_override_is_listed():
    trainers = (Trainer, trl.DPOTrainer, trl.GRPOTrainer)
    for module, table in TABLES.items():
        mixins = [x for x in vars(module).values() if inspect.isclass(x) and x.__module__ == module.__name__]
        private = {name for mixin in mixins for name in vars(mixin) if name[0] == "_" and name[:2] != "__"}
        overrides = {name for name in private if any(hasattr(trainer, name) for trainer in trainers)}
        assert overrides and overrides <= {place.rpartition(".")[2] for place in table}


def test_processes_states_are_shared_dictionaries():
    """Plans put these aside and back."""
    assert all(isinstance(state._shared_state, dict) for state in (PartialState, AcceleratorState, GradientState))


def test_chunked_losses_have_a_buffer_of_this_width():
    assert trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE == LOGPROB_CHUNK


def test_epochs_come_first_of_the_initial_values():
    source = inspect.getsource(Trainer._inner_training_loop)
    values = source.partition(" = self.set_initial_training_values(args, train_dataloader)")[0]
    assert values.rpartition("(\n")[2].split()[0] == "num_train_epochs,"
    assert "for epoch in range(epochs_trained, num_train_epochs):" in source


def test_resuming_calls_it_with_the_checkpoint():
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in inspect.getsource(Trainer)


def test_preference_trainers_take_pairs_as_tokens():
    """The columns that our rows have are those that TRL's loss reads."""
    source = inspect.getsource(trl.DPOTrainer)
    assert all(f'"{name}"' in source for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert 'is_processed = "chosen_ids" in column_names' in inspect.getsource(trl.RewardTrainer)
    orpo = inspect.getsource(ORPOTrainer)
    assert "train_dataset.map(self.tokenize_row" in orpo
    assert all(f'{side}_tokens["labels"]' in orpo for side in ("chosen_sequence", "rejected_sequence"))


def test_fine_tuning_leaves_labels_alone():
    source = inspect.getsource(trl.SFTTrainer)
    assert 'is_processed = "input_ids" in column_names' in source and 'if "labels" not in column_names' in source


def test_references_are_made_in_one_place():
    """`RolloutSteps` stands in for what GRPOTrainer reads from disk: its policy is given, so nothing else is read."""
    source = inspect.getsource(trl.GRPOTrainer.__init__)
    assert "if isinstance(model, str):" in source and source.count("create_model_from_path(") == 2
    assert "self.ref_model = create_model_from_path(get_config_model_id(self.model.config)" in source


def test_rollouts_are_kept_under_these_names():
    source = inspect.getsource(trl.GRPOTrainer)
    assert "if self._step % generate_every == 0 or self._buffered_inputs is None:" in source
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in source
    assert 'self._logs["advantages"].extend(' in source and "self._metrics[mode][" in source
    assert all(f'self._logs["{name}"].extend(' in source for name in ("prompt", "completion"))
    assert 'self._logs["rewards"][name].extend(' in source
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
    assert all(f'"{name}": {name},' in source for name in names)
    assert all(f'output["{name}"] =' in source for name in ("old_per_token_logps", "ref_per_token_logps"))
