"""Private names of TRL's and Transformers' trainers that every stage or a preference stage needs, beside those that
`trainer.py` overrides (the contract test, `tests/runs/test_contract.py`, says of each why no public name serves); and
the operator that replaces TRL's loss head on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from llmlab.model.loss import _operator as linear_cross_entropy
from llmlab.settings.errors import reading
from llmlab.settings.files import read_json


class TokenLogProbs(torch.autograd.Function):
    """Log-probabilities of targets, (tokens,), and their statistics without gradient, (tokens, 4). Where the head is
    frozen, or `equal` says that all tokens will have the same gradient, gradients are computed with the logits; else
    the backward pass computes the logits again, knowing each token's."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, equal: bool, statistics: bool
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:2]
        ctx.dtype, ctx.at_once = dtype, equal or not needs[1]
        flags = needs if ctx.at_once else (False, False)
        _, grad_hidden, grad_weight, values = linear_cross_entropy(
            hidden, weight, targets, dtype, *flags, None, statistics
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(values)
        ctx.save_for_backward(hidden, weight, targets, grad_hidden, grad_weight)
        return -values[:, 0], values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, grad_hidden, grad_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if grad is None or not any(needs):
            return (None,) * 6
        if ctx.at_once and (not needs[1] or bool((grad == grad[:1]).all())):
            grad_hidden = grad_hidden * -grad[:, None].to(grad_hidden.dtype)
            grad_weight = grad_weight.mul_(-grad[:1].sum()) if needs[1] else None  # in place: it is large
        else:
            _, grad_hidden, grad_weight, _ = linear_cross_entropy(
                hidden, weight, targets, ctx.dtype, *needs, -grad, False
            )
        return grad_hidden if needs[0] else None, grad_weight if needs[1] else None, None, None, None, None


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keeps Trainer from wrapping the model in `nn.DataParallel` where one process sees several GPUs: it would train
    on batches of another size than the settings say."""
    arguments._n_gpu = min(arguments.n_gpu, 1)  # what Trainer itself does for a model spread over several GPUs


def expose_head_bias(model: PeftModel) -> None:
    """Gives PEFT's TrainableTokensWrapper around the output head the `bias` that TRL's chunked loss reads."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        object.__setattr__(head, "bias", head.original_module.bias)  # not a second parameter of the module


@contextmanager
def chunked_head(*, equal: bool, enabled: bool = True, entropy_bonus: bool = False) -> Iterator[None]:
    """Has `TokenLogProbs` compute TRL's loss head on CPUs, for scored tokens alone; `equal` as there. Heads with a
    bias or softcapping stay TRL's. The entropy has no gradient, so those with a bonus on it do too."""
    from trl.trainer import utils

    function, scores_alone = utils._ChunkedLogProbFunction, utils._use_triton

    def replaces(device: torch.device) -> bool:
        return enabled and device.type == "cpu"

    class Head:
        @staticmethod
        def apply(*arguments: Any) -> tuple[Tensor | None, ...]:
            hidden, weight, bias, targets, temperature, _, softcap, scale, outputs = arguments
            plain = bias is softcap is None and not entropy_bonus and "log_sum_sq_probs" not in outputs
            if not (replaces(hidden.device) and plain) or hasattr(weight, "ds_id"):  # ZeRO-3 gathers it once more
                return function.apply(*arguments)
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
            if scale != temperature:
                hidden = hidden * (scale / temperature)
            log_probs, values = TokenLogProbs.apply(hidden, weight, targets, dtype, equal, len(outputs) > 1)
            if len(outputs) == 1:
                return log_probs, None, None, None, None
            return log_probs, values[:, 1], None, values[:, 2], values[:, 3].bool()

    utils._ChunkedLogProbFunction = Head
    utils._use_triton = lambda device: replaces(device) or scores_alone(device)
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = function, scores_alone


class TokenizedPairs:
    """Mixin for a DPOTrainer whose datasets have token ids; logs `completion_length`, the mean tokens of an answer."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        lengths = self.accelerator.gather(inputs["completion_mask"].sum(1).float())  # type: ignore[attr-defined]
        metrics = self._metrics["train" if model.training else "eval"]  # type: ignore[attr-defined]
        metrics["completion_length"].append(lengths.mean().item())
        with chunked_head(equal=False, enabled=self.on_cpu):
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class TokenizedORPOPairs:
    """Mixin for an ORPOTrainer: the dataset has token ids already; `tokenize_row` renames them to TRL's columns."""

    def __init__(self, *args: Any, **kwargs: Any):
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                # ORPOTrainer requires these columns before tokenizing
                kwargs[name] = kwargs[name].map(lambda row: {"prompt": "", "chosen": "", "rejected": ""})
        super().__init__(*args, **kwargs)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        return row


class ResumableCheckpoint:
    """Mixin for a Trainer: checkpoints are whole also where FSDP2 shards the model; damaged ones raise UserError;
    resumes without optimizer state with `load_optimizer=False`."""

    load_optimizer: bool = True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves tied weights once, of which gathering made copies."""
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})  # type: ignore[attr-defined]
        state_dict = state_dict and {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes under FSDP the files of one process, from which any number can go on."""
        if not self.is_fsdp_enabled:  # type: ignore[attr-defined]
            return super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        state, saves = self.optimizer.state_dict(), self.args.should_save  # type: ignore[attr-defined]
        state = gather(state, keep=saves)
        if saves:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")  # type: ignore[attr-defined]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.load_optimizer or checkpoint is None:
            return
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]  # it has loaded them
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        groups, rates = self.optimizer.param_groups, self.lr_scheduler.base_lrs  # type: ignore[attr-defined]
        chosen = [{name: group[name] for name in ("initial_lr", "weight_decay")} for group in groups]
        with reading(checkpoint, "a checkpoint's optimizer"):
            if not self.is_fsdp_enabled:  # type: ignore[attr-defined]
                super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            else:
                files = (Path(checkpoint) / name for name in ("optimizer.pt", "scheduler.pt"))
                optimizer, scheduler = (torch.load(file, map_location="cpu", mmap=True) for file in files)
                self.optimizer.load_state_dict(scatter_state(optimizer, self.optimizer))  # type: ignore[attr-defined]
                self.lr_scheduler.load_state_dict(scheduler)  # type: ignore[attr-defined]
        # a rollback changes these, and the loaded state has those from before
        for group, values in zip(self.optimizer.param_groups, chosen, strict=True):  # type: ignore[attr-defined]
            group.update(values)
        self.lr_scheduler.base_lrs = rates  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint, "a checkpoint"):
            if self.is_fsdp_enabled:  # type: ignore[attr-defined]
                return load_weights(self.model, Path(resume_from_checkpoint))  # type: ignore[attr-defined]
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            return load_weights(self.model, Path(self.state.best_model_checkpoint))  # type: ignore[attr-defined]
        super()._load_best_model()  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or "", "a checkpoint's random state"):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


def gather(tree: Any, *, keep: bool) -> Any:
    """Returns nested values with sharded tensors whole on the CPU, or None on processes that do not `keep` them."""

    def whole(shards: DTensor) -> Tensor | None:
        tensor = shards.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map_only(DTensor, whole, tree)


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor, or this process's shards of it where `like` is sharded."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def scatter_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an optimizer's whole state dict with this process's shards of what has its parameter's shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {}
    for index, values in state["state"].items():
        like = parameters[index]
        shards[index] = {
            name: scatter(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for name, value in values.items()
        }
    return {**state, "state": shards}


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copies the weights or adapters in a folder into a model, of which each process may have its shards."""
    if isinstance(model, PeftModel):
        whole, mine = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(model)
    else:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        whole = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
        mine = model.state_dict()
    for name in mine.keys() & whole.keys():  # the other names of tied weights are not saved
        mine[name].copy_(scatter(whole[name], mine[name]))
