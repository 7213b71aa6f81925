"""A stage's run up to its first optimizer step, on synthetic rows: what its plan is computed from. The stage's own
function makes model, reference, adapters, critic and trainer, and the trainer takes a real step; only weights and rows
come from here. With a `Ledger` nothing is computed, so that a model of any size takes seconds."""

import copy
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models
from torch import nn
from transformers import DefaultFlowCallback, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.trainer_utils import SaveStrategy

from llmlab.adapters import lora_config
from llmlab.data.chat.rows import Rows, RowsReport
from llmlab.hardware import Hardware
from llmlab.model import Adapter, measure
from llmlab.runs.failures import random_states
from llmlab.runs.ledger import Ledger
from llmlab.runs.policy import Policy, check_head
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.start import batch_of
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import leaves_machine, remote_code_allowed
from llmlab.terminal import Terminal

# bitsandbytes' kernels take addresses; the states of their kinds differ in size alone
REHEARSED = {
    **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "paged_lion_32bit"), "lion"),
}
FEW_LAYERS = (2, 4)  # even: the halves of `Ledger.peaks` then end at the same place of a layer
# of trainer_args: what opens connections, files or processes, besides what leaves this machine
APART = ("log_completions", "deepspeed", "fsdp", "fsdp_config", "vllm_server_base_url", "hub_model_id")
PROMPT = '[{"role": "user", "content": ""}]'


@dataclass(frozen=True)
class Scene:
    """What a rehearsal is about: the model's configuration and adapter, and the longest row in tokens. `prompt` is the
    longest prompt where completions are sampled."""

    config: PreTrainedConfig
    adapter: Adapter | None
    length: int
    prompt: int = 0


class Rehearsal:
    """Mixin of a stage's run: its model has the scene's shape, and its rows the scene's length."""

    scene: Scene
    ledger: Ledger | None
    samples_elsewhere: bool  # by vLLM
    trainer: Any

    def load_policy(self, *, attach: bool = True, task: str = "CAUSAL_LM") -> Policy:
        settings, adapter, tokenizer = self.settings, self.scene.adapter, make_tokenizer()  # type: ignore[has-type]
        frozen = adapter is not None or settings.use_lora
        model = self._make_model(task, self.hardware.torch_dtype if frozen else torch.float32)  # type: ignore[attr-defined]
        if settings.use_qlora:
            pack_linear_layers(model)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if adapter is not None:
            adapter.config.inference_mode = False
            model = get_peft_model(model, adapter.config)
            check_head(model, adapter.source)
        elif settings.use_lora and attach:
            model = get_peft_model(model, lora_config(model, settings, task=task))
        parents = ["model"] if adapter is None else ["adapter", "model"]
        return Policy(model, tokenizer, parents, (tokenizer.eos_token_id,), [])

    def load_model(self) -> tuple[PreTrainedTokenizerBase, Any]:
        return make_tokenizer(), self._make_model("CAUSAL_LM", torch.float32)

    def _make_model(self, task: str, dtype: torch.dtype) -> Any:
        config = copy.deepcopy(self.scene.config)
        if task == "SEQ_CLS":
            config.num_labels, config.pad_token_id = 1, 2
        auto = getattr(transformers, f"AutoModelFor{'SequenceClassification' if task == 'SEQ_CLS' else 'CausalLM'}")
        with no_init_weights() if self.ledger is not None else nullcontext():
            model = auto.from_config(config, dtype=dtype, trust_remote_code=remote_code_allowed())
        model.tie_weights()
        return model

    def build_rows(self, maker: Any, *, rows_per_step: float) -> Rows:
        length, count = self.scene.length, max(int(rows_per_step), 2) * 4
        prompt, half = self.scene.prompt or length // 2, length - length // 2
        row = {"input_ids": [3] * length, "labels": [3] * length, "weight": 1.0, "prompt": PROMPT, "columns": "{}"}
        row |= {"prompt_ids": [3] * prompt, "chosen_ids": [3] * half, "rejected_ids": [4] * half}
        rows = Dataset.from_dict({name: [row[name]] * count for name in maker.columns})
        report = RowsReport("rows", "", 1.0, count, count, dict.fromkeys(maker.counts, length * count))
        return Rows(rows, None, [report])

    def build_corpus(self, tokenizer: PreTrainedTokenizerBase, sequence: int) -> Any:
        count = 4 * self.settings.batch_size * self.settings.gradient_accumulation_steps  # type: ignore[has-type]
        rows = Dataset.from_dict({name: [[3] * sequence] * count for name in ("input_ids", "labels")})
        return SimpleNamespace(train=rows, validation=None, unigram_entropy=None, record=dict, summary=str)

    def compose_rewards(self, rewards: Any) -> Any:
        from llmlab.rewards.compose import compose

        return compose([lambda completions, **columns: [0.0] * len(completions)], normalize=False, allow_code=True)

    def load_environments(self) -> dict[str | None, Any]:
        return {}  # a rollout of completions as long as episodes stands in for episodes

    def train(self, trainer: Any, **plan: Any) -> Any:
        """Takes one optimizer step, with the optimizer's states already there."""
        self.trainer = trainer
        trainer.callback_handler.callbacks = [DefaultFlowCallback()]
        trainer.args.save_strategy = SaveStrategy.NO
        if hasattr(trainer, "_tokenize_prompts"):
            ids = [3] * self.scene.prompt
            trainer._tokenize_prompts = lambda prompts: ([ids] * len(prompts), None, {})
        if self.ledger is not None:
            self._follow_step(trainer, self.ledger)
        trainer.train()

    def _follow_step(self, trainer: Any, ledger: Ledger) -> None:
        model = trainer.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ledger.assign("weights", *model.parameters(), *model.buffers())
        if (reference := getattr(trainer, "ref_model", None)) is not None:
            ledger.assign("reference", *reference.parameters(), *reference.buffers())
        if (critic := getattr(trainer, "critic", None)) is not None:
            ledger.assign("value model", *(p for p in critic.parameters() if p.requires_grad))
        optimizer = trainer.create_optimizer()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            ledger.assign("gradients", parameter.grad)
        ledger.phase = "optimizer step"
        optimizer.step()
        optimizer.zero_grad()
        for state in optimizer.state.values():
            ledger.assign("optimizer", *(value for value in state.values() if isinstance(value, torch.Tensor)))
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.assign("gradients", p.grad))
        ledger.flops.clear()

        def enter(name: str, owner: Any, method: str) -> None:
            function = getattr(owner, method)

            def call(*args: Any, **kwargs: Any) -> Any:
                before, ledger.phase = ledger.phase, name
                try:
                    return function(*args, **kwargs)
                finally:
                    ledger.phase = before

            setattr(owner, method, call)

        ledger.phase = "scoring"
        enter("forward", trainer, "compute_loss")
        enter("backward", trainer.accelerator, "backward")
        optimizer.register_step_pre_hook(lambda *_: setattr(ledger, "phase", "optimizer step"))
        if hasattr(trainer, "_generate_single_turn"):
            trainer.compacts = False  # rows are equal, and have no values
            trainer._generate_single_turn = self._sample
            enter("sampling", trainer, "_generate_single_turn")

    @torch.no_grad()
    def _sample(self, prompt_ids: Any, *_: Any) -> Any:
        """Follows the prompts' forward pass and one token's, the last, of the whole rollout."""
        new, model = self.settings.max_new_tokens, self.trainer.model
        rows, prompt = self.sampled_rows, self.scene.prompt
        if not self.samples_elsewhere:
            training, model.training = model.training, False
            model.eval()
            mask = torch.ones(rows, prompt + new, dtype=torch.int64)
            ids = torch.ones(rows, prompt, dtype=torch.int64)
            cache = model(input_ids=ids[:, :1], use_cache=True).past_key_values
            for layer in cache.layers:
                shape = (*layer.keys.shape[:2], prompt + new - 1, layer.keys.shape[3])
                layer.keys, layer.values = layer.keys.new_empty(shape), layer.values.new_empty(shape)
                self.ledger.assign("KV cache", layer.keys, layer.values)
            logits = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True).logits
            for layer in cache.layers:
                self.ledger.assign("KV cache", layer.keys, layer.values)
            scores = logits[:, -1].float().clone()
            scores.softmax(-1)
            del cache, layer, logits, scores
            model(input_ids=ids, attention_mask=mask[:, :prompt], use_cache=True, logits_to_keep=1)
            model.train(training)
        return [[3] * new] * len(prompt_ids), None


class FourBitProduct(torch.autograd.Function):
    """A product with 4-bit weights, which both passes unpack to the dtype of the product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad @ grad.new_empty(ctx.shape), None, None


class FourBitLinear(nn.Linear):
    """Stands in for bitsandbytes' layer: the same memory, and no values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return FourBitProduct.apply(x.to(dtype), self.weight, (self.out_features, self.in_features))


def pack_linear_layers(model: Any) -> None:
    """Gives the decoder's linear layers weights of 4.13 bits, with bitsandbytes' double quantization."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings() and name != "score":
            module.__class__ = FourBitLinear
            size = math.ceil(module.weight.numel() * 4.13 / 8)
            module.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
    model.is_loaded_in_4bit = True


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of three words, which encodes nothing."""
    words = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    model = models.WordLevel({word: number for number, word in enumerate(words.values())}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **words)


def shorten(settings: Any, folder: str, steps: int) -> tuple[Any, int]:
    """Returns settings of so many steps, of few forward passes, and the completions of a whole rollout."""
    changes: dict[str, Any] = {"output_dir": folder, "max_steps": steps, "warmup_steps": 1, "compile": False}
    rollout = 0
    if hasattr(settings, "rollout"):
        rollout, passes = settings.rollout(1).completions, min(settings.gradient_accumulation_steps, 2)
        per_pass, group = settings.mini_batch_size * passes, settings.completions_per_prompt
        prompts = math.lcm(per_pass, group) // group
        changes["batch_size"] = min(settings.batch_size, 2 * prompts)
    elif settings.rows_per_pass == "mini_batch_size":
        passes = min(settings.accumulation(1), 2)
        changes["batch_size"] = passes * settings.mini_batch_size
    else:
        passes = min(settings.gradient_accumulation_steps, 2)
    kept = settings.trainer_args.items()
    changes |= {
        "gradient_accumulation_steps": passes,
        "report_to": [],
        "dataloader_num_workers": 0,  # tensors without memory cannot be sent
        "gradient_checkpointing": settings.gradient_checkpointing is True,
        "optimizer": REHEARSED.get(settings.optimizer, settings.optimizer),
        "trainer_args": {name: value for name, value in kept if not (name in APART or leaves_machine(name, value))},
        "use_vllm": False,
        # a copy of the policy stands in for a named reference or critic
        **dict.fromkeys(("epochs", "num_episodes", "value_checkpoint", "reference_checkpoint")),
    }
    names = type(settings).model_fields.keys()
    return settings.model_copy(update={name: changes[name] for name in changes.keys() & names}), rollout


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Keeps what a trainer sets for the whole process from one that is about to train; and warnings off the screen."""
    states = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    level, restore_random_states = logging.root.manager.disable, random_states(device)
    logging.disable(logging.WARNING)
    for state, _ in states:
        state._shared_state.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for state, before in states:
            state._shared_state.clear()
            state._shared_state.update(before)
        restore_random_states()


def rehearse(
    stage: Any, settings: Any, hardware: Hardware, scene: Scene, *, processes: int = 1, follow: bool = True
) -> Any:
    """Runs a stage's function to its first step on rows of the scene's length and returns the run, a rollout shared by
    so many processes. `follow` takes the step on tensors without memory, in the run's `ledger`; else it is real."""
    real, ledger = hardware, None
    following: AbstractContextManager[Any] = nullcontext()
    if follow:
        ledger = Ledger({scene.config.get_text_config().vocab_size}, lazy=hardware.device == "cpu")
        following = ledger.follow()
        hardware = replace(hardware, device="cpu", dtype="bf16" if hardware.dtype == "fp16" else hardware.dtype)
    own = {"scene": scene, "ledger": ledger, "samples_elsewhere": getattr(settings, "use_vllm", False)}
    own["on_cpu"] = real.device == "cpu"
    run_class = type("Rehearsal", (Rehearsal, stage.run_class), own)
    here = torch.device(real.device if getattr(torch, real.device).is_available() else "cpu")
    with apart(here), quiet_libraries(), tempfile.TemporaryDirectory() as folder, following:
        # without a ledger a second step, which has the optimizer's states
        settings, completions = shorten(settings, folder, 1 if follow else 2)
        process = PartialState(cpu=hardware.device == "cpu")
        resolved = Resolved(settings, {}, ())
        start = (stage.__name__, True, resolved, hardware, process, Terminal(quiet=True), Path(folder), None, None, {})
        run: Any = run_class(*start, batch_of(settings, 1))
        run.sampled_rows = completions // processes
        stage.function(run)
    return run


@dataclass(frozen=True)
class Rehearsals:
    """Followed runs of a model with all its layers, or with two and with four, from which the whole follows."""

    runs: tuple[Any, ...]
    steps: float = 0.0  # from the first run's number of layers to the model's, in differences of the two runs

    def total(self, count: Callable[[Any], float]) -> float:
        """Returns for the whole model what a function counts of a run."""
        first, *more = map(count, self.runs)
        return first + self.steps * (more[0] - first) if more else first

    def peak(self, shares: dict[str, float]) -> tuple[str, dict[str, int]]:
        """Returns the phase with the most live bytes, and these by part; see `Ledger.peaks`."""
        first, *more = (run.ledger.peaks(shares) for run in self.runs)
        for each in more:
            for (_, parts), (_, others) in zip(first, each, strict=True):
                for part in {*parts, *others}:
                    parts[part] = parts.get(part, 0) + self.steps * (others.get(part, 0) - parts.get(part, 0))
        if "weights" in shares:  # sharded weights are loaded on the host
            first = [found for found in first if found[0] != "loading"]
        phase, parts = max(first, key=lambda found: sum(found[1].values()))
        return phase, {part: round(size) for part, size in parts.items() if size >= 1}


_rehearsals: dict[str, Rehearsals] = {}  # the last ones: plans of other machines or numbers of processes need them too


def rehearse_layers(stage: Any, settings: Any, hardware: Hardware, scene: Scene, processes: int = 1) -> Rehearsals:
    """Follows a stage's first step as `rehearse`, with few layers where the model's are alike."""
    shared = processes if hasattr(settings, "rollout") else 1
    short = shorten(settings, "", 1)
    elsewhere = getattr(settings, "use_vllm", False)
    key = f"{stage.__name__} {short} {elsewhere} {hardware.device} {hardware.dtype} {scene} {shared}"
    if key in _rehearsals:
        return _rehearsals[key]
    if len(_rehearsals) > 8:
        _rehearsals.clear()
    layers, found = getattr(scene.config.get_text_config(), "num_hidden_layers", 0), None
    if layers > FEW_LAYERS[1]:
        few = [replace(scene, config=cut_layers(scene.config, count)) for count in FEW_LAYERS]
        steps = (layers - FEW_LAYERS[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
        if are_alike(scene, settings, [each.config for each in few], steps):
            runs = [rehearse(stage, settings, hardware, each, processes=processes) for each in few]
            found = Rehearsals(tuple(runs), steps) if len({len(run.ledger.peaks()) for run in runs}) == 1 else None
    _rehearsals[key] = found or Rehearsals((rehearse(stage, settings, hardware, scene, processes=processes),))
    return _rehearsals[key]


def _of_layers(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Returns the values of a configuration that have one for each layer."""
    lists = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    return {name: value for name, value in lists.items() if len(value) == config.num_hidden_layers}


def cut_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """Returns the configuration of a model's first layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in _of_layers(text).items():
        setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return config


def are_alike(scene: Scene, settings: Any, few: list[PreTrainedConfig], steps: float) -> bool:
    """Returns whether a model's layers are alike: kinds, parameters and what an adapter changes of them."""
    if any(len(set(map(str, value))) > 1 for value in _of_layers(scene.config.get_text_config()).values()):
        return False
    adapter = scene.adapter and scene.adapter.config
    targets = getattr(settings, "lora_target_modules", None) or ()
    if adapter is not None:
        if adapter.layers_to_transform or adapter.rank_pattern or isinstance(adapter.target_modules, str):
            return False
        targets = [*targets, *(adapter.target_modules or ())]
    if any(char.isdigit() for char in "".join(targets).replace("_", "")):  # of one layer, it may be
        return False
    first, second = (measure(config).total for config in few)
    return measure(scene.config).total == round(first + steps * (second - first))
