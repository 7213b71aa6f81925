"""What sends data off this machine is said on the command line, never in a file."""

import json

import pytest
import yaml

from llmlab.settings.errors import SettingsError
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.rl import GRPOSettings
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings
from llmlab.settings.trust import destinations

SENDING = [
    {"push_to_hub": True},
    {"hub_model_id": "me/model"},
    {"hub_token": "hf_secret"},
    {"trackio_space_id": "me/space"},
    {"log_completions_hub_repo": "me/completions"},
    {"vllm_server_base_url": "http://elsewhere"},
]


def written(path, values):
    text = json.dumps(values, indent=1) if path.suffix == ".json" else yaml.safe_dump(values)
    path.write_text(text)
    return read_layer(path)


@pytest.mark.parametrize("arguments", SENDING, ids=lambda arguments: next(iter(arguments)))
@pytest.mark.parametrize("name", ["r.yaml", "r.json"])
def test_a_file_may_not_send(tmp_path, name, arguments):
    layer = written(tmp_path / name, {"trainer_args": arguments})
    key = next(iter(arguments))
    line = 2 if name == "r.yaml" else 3
    beside = Layer("command line", {"trainer_args": {"neftune_noise_alpha": 5}})  # hides nothing of the file
    for layers in ([layer], [layer, beside]):
        with pytest.raises(SettingsError) as caught:
            resolve(GRPOSettings, *layers, Layer("command line", {"rewards": ["length"]}))
        (problem,) = caught.value.problems
        assert problem.startswith(f"{tmp_path / name}:{line}: trainer_args.{key} sends data off this machine")


def test_a_file_may_not_report_elsewhere(tmp_path):
    layer = written(tmp_path / "r.yaml", {"report_to": ["tensorboard", "wandb"]})
    with pytest.raises(SettingsError, match="r.yaml:1: report_to sends data off this machine, which no file decides"):
        resolve(SFTSettings, layer)
    settings = resolve(SFTSettings, written(tmp_path / "r.yaml", {"report_to": ["tensorboard", "trackio"]})).settings
    assert settings.report_to == ["tensorboard", "trackio"]
    settings = resolve(SFTSettings, Layer("command line", {"report_to": ["tensorboard", "wandb"]})).settings
    assert settings.report_to == ["tensorboard", "wandb"] and settings.recorded()["report_to"] == ["tensorboard"]


def test_dotted_keys_and_presets_of_pipelines_are_files_too(tmp_path):
    layer = written(tmp_path / "p.yaml", {"stages": {"sft": {"trainer_args.push_to_hub": True}}})
    with pytest.raises(SettingsError, match="p.yaml:3: trainer_args.push_to_hub sends"):
        resolve(SFTSettings, layer.section("stages").section("sft"))


@pytest.mark.parametrize(
    "arguments",
    [{"push_to_hub": False}, {"hub_token": None}],
)
def test_what_stays_here_may_stand_in_a_file(tmp_path, arguments):
    resolved = resolve(SFTSettings, written(tmp_path / "r.yaml", {"trainer_args": arguments}))
    assert resolved.settings.trainer_args == arguments and destinations(arguments, "run") == []


def test_the_command_line_may_and_the_record_forgets_it():
    arguments = {"push_to_hub": True, "hub_token": "hf_secret", "neftune_noise_alpha": 5}
    settings = resolve(SFTSettings, Layer("command line", {"trainer_args": arguments})).settings
    assert settings.trainer_args == arguments
    assert settings.recorded()["trainer_args"] == {"neftune_noise_alpha": 5}


def test_the_plan_names_every_destination():
    (row,) = destinations({"push_to_hub": True}, "runs/sft/", ["wandb", "tensorboard"])
    assert row[1].startswith("the run folder to the Hugging Face hub, as <your account>/sft (")
    assert row[1].endswith("; metrics to wandb")
    (row,) = destinations({"push_to_hub": True, "hub_model_id": "me/x", "hub_private_repo": True}, "run")
    assert row == ("publishes", "the run folder to the Hugging Face hub, as me/x (private)")
    (row,) = destinations({"trackio_space_id": "me/space", "log_completions_hub_repo": "me/c"}, "run")
    assert row[1] == "completions to the Hugging Face hub, as me/c; trackio_space_id me/space"
