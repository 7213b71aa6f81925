"""Runs that cannot be: adapters, templates, checkpoints, arguments and sizes that do not fit; nothing stays behind."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmlab.data.chat.conversations import UnusableRow
from llmlab.data.chat.rendering import Renderer
from llmlab.data.tokenizer import load_tokenizer
from llmlab.inference import encode_prompt, load_for_inference
from llmlab.model import load_config, load_model
from llmlab.runs.arguments import build_arguments
from llmlab.runs.failures import check_memory
from llmlab.runs.start import check_undamaged
from llmlab.settings.errors import SettingsError, UserError
from llmlab.training.pretrain import pretrain
from llmlab.training.sft import sft


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def base(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    load_tokenizer(str(base)).save_pretrained(tmp_path / "adapter")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(str(base)), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 4}, "cannot be read as an adapter of .*size mismatch"),
        ({"r": "x"}, "r = 'x': expected a valid integer"),
        ({"target_modules": ["nowhere"]}, "Target modules .*nowhere.* not found"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "Found missing adapter keys"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path = None: expected the model it adapts"),
        ({"base_model_name_or_path": "runs/x/y"}, "which does not load: runs/x/y: there is no such folder"),
        ({"bias": "sometimes"}, "bias = 'sometimes': "),
        ({"peft_type": "NEVER"}, "cannot be read as an adapter's configuration"),
    ],
)
def test_an_adapter_that_does_not_fit(adapter, values, message):
    edit(adapter / "adapter_config.json", **values)
    with pytest.raises(UserError, match=message) as caught:
        load_for_inference(adapter, dtype="fp32", device="cpu")
    assert str(adapter) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 64, "head_dim": None}, "other shapes than its config.json says"),
        ({"num_hidden_layers": 3, "layer_types": None}, "no complete language model"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps = \[1\]: expected a valid number"),
        ({"rope_parameters": 5}, "rope_parameters = 5"),
        ({"model_type": ["llama"]}, "no architecture of that name"),
        ({"pad_token_id": "x"}, "pad_token_id = 'x'"),
        (
            {"architectures": ["LLMLabForSequenceClassification"]},
            "a sequence-classification model; expected a language",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(base, values, message):
    edit(base / "config.json", **values)
    with pytest.raises(UserError, match=message):
        load_model(str(base))


def test_generation_settings_that_name_no_tokens(base):
    edit(base / "generation_config.json", eos_token_id=["end"])
    with pytest.raises(UserError, match="generation_config.json: eos_token_id = .*: expected a valid integer"):
        load_model(str(base))
    edit(base / "generation_config.json", eos_token_id=0, num_beams=-1)
    with pytest.raises(UserError, match="num_beams = -1: expected greater than 0"):
        load_model(str(base))


def test_pickles_are_never_loaded_unsafely(base, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").mkdir, ())

    (base / "model.safetensors").unlink()
    torch.save({"weight": Harm()}, base / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_model(str(base))
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    state = {"global_step": 1, "train_batch_size": 1, "stateful_callbacks": {}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    check_undamaged(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": Harm()}, checkpoint / name)
        with pytest.raises(UserError, match=f"{name}: cannot be read as a file of torch"):
            check_undamaged(checkpoint)
        (checkpoint / name).unlink()
    assert not (tmp_path / "harm").exists()


def test_a_model_that_is_nowhere_says_how_it_was_looked_for():
    with pytest.raises(UserError, match="there is no such folder, and the hub gave none: HF_HUB_OFFLINE is set"):
        load_config("nobody/nothing")


TEMPLATES = {
    "{{ 1 / 0 }}": "division",
    "{{ nowhere.x.y }}": "undefined",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "nested too deeply",
    "{{ messages[99].content }}": "",
    "{% for": "",
    "{{ messages + 5 }}": "",
}


@pytest.mark.parametrize(("template", "reason"), TEMPLATES.items(), ids=range(len(TEMPLATES)))
def test_a_template_that_fails(base, template, reason):
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=f"the model's chat template .*{reason}"):
        encode_prompt(tokenizer, messages[:1])
    with pytest.raises(UnusableRow, match=f"the chat template.*{reason}"):
        Renderer(tokenizer).render({"messages": messages, "tools": None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neftune_noise_alpha": "many"}, "trainer_args: neftune_noise_alpha = 'many': expected a valid number"),
        ({"dataloader_persistent_workers": 7}, "dataloader_persistent_workers = 7: expected a valid boolean"),
        ({"report_to": "trackio"}, "trainer_args.report_to: set 'report_to' instead"),
        ({"deepspeed": "nowhere.json"}, "trainer_args.deepspeed: it needs deepspeed, which is not installed"),
        ({"use_liger_kernel": True}, "trainer_args.use_liger_kernel: set 'use_liger_kernel' instead"),
        (
            {"log_level": "loud"},
            "trainer_args = {log_level: loud}: cannot be read as arguments of the trainer: .*loud",
        ),
        ({"hub_strategy": "never"}, "trainer_args = {hub_strategy: never}: cannot be read as SFTConfig: "),
        ({"dataloader_prefetch_factor": -1}, "dataloader_num_workers > 0"),
        ({"lr_scheduler_kwargs": {"nope": 1}}, "cannot be read as arguments of the trainer: .*nope"),
    ],
)
def test_arguments_of_the_trainer_that_it_does_not_take(
    sft_settings, quiet, tmp_path, arguments, message, monkeypatch
):
    monkeypatch.setattr("llmlab.runs.arguments.find_spec", lambda package: None)  # some have DeepSpeed
    settings = sft_settings(trainer_args=arguments, max_steps=1)
    with pytest.raises(UserError, match=message) as caught:
        sft(settings, console=quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_arguments_without_mistakes_pass(sft_settings):
    from trl import SFTConfig

    from llmlab.hardware import probe

    settings = sft_settings(trainer_args={"neftune_noise_alpha": 5, "data_seed": 3})
    built = build_arguments(SFTConfig, settings, probe("cpu", "fp32"))
    assert (built.neftune_noise_alpha, built.data_seed) == (5, 3)
    with pytest.raises(SettingsError, match="has no such field"):
        build_arguments(SFTConfig, sft_settings(trainer_args={"neftune": 5}), probe("cpu", "fp32"))


def test_a_damaged_checkpoint_changes_nothing(sft_settings, quiet, tmp_path):
    settings = sft_settings(max_steps=2, save_every=1, save_best_only=False)
    sft(settings, console=quiet)
    run = tmp_path / "run"
    state = run / "checkpoint-2" / "trainer_state.json"
    whole, longer = state.read_text(), settings.model_copy(update={"max_steps": 4})

    def before():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    for text in ("[]", "{}", json.dumps({**json.loads(whole), "best_metric": []}), "[" * 100_000):
        state.write_text(text)
        seen = before()
        with pytest.raises(UserError, match="trainer_state.json: "):
            sft(longer, resume=run, console=quiet)
        assert before() == seen
    state.write_text(whole)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"):
        path = run / "checkpoint-2" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        seen = before()
        with pytest.raises(UserError, match=f"{name}: cannot be read as"):
            sft(longer, resume=run, console=quiet)
        assert before() == seen
        path.write_bytes(content)
    sft(longer, resume=run, console=quiet)


def test_what_does_not_fit_into_memory_is_refused_beforehand(settings, quiet, tmp_path):
    check_memory(10**6, batch_tokens=10**3, width=10)
    with pytest.raises(UserError, match="this model needs at least 4.0 PB|this model needs at least"):
        check_memory(10**15)
    with pytest.raises(UserError, match="one batch needs at least .* of memory"):
        pretrain(settings(batch_size=10**10), console=quiet)
    assert not (tmp_path / "run").exists()


def test_a_run_that_a_mistake_ends_before_its_first_step_leaves_no_folder(sft_settings, quiet, tmp_path, monkeypatch):
    from llmlab.training.sft import LLMLabSFTTrainer

    def fail(self, *args, **kwargs):
        raise UserError("not like this")

    monkeypatch.setattr(LLMLabSFTTrainer, "train", fail)
    with pytest.raises(UserError, match="not like this"):
        sft(sft_settings(max_steps=1), console=quiet)
    assert not (tmp_path / "run").exists()
