"""Code that a folder brings along runs only by the user's own word, and nobody is asked on standard input."""

import io
import json
import shlex
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from llmlab.cli.app import main

CODE = """
from pathlib import Path
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers import PreTrainedTokenizerFast
with Path({mark!r}).open("a") as file:
    file.write("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaModel):
    config_class = OwnConfig
AutoModel.register(OwnConfig, OwnModel)  # of which the model that scores is made
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from llmlab.data.tokenizer import learn_bpe
    from llmlab.settings.data import DataSource

    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The cat meows. The dog barks. " * 40)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return learn_bpe([DataSource(name=str(text))], 270, folder, show_progress=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer):
    """Folders whose Auto classes are Python files beside the weights: a language model and a model that scores."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    root = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **SHAPE, num_labels=1, pad_token_id=3)
    for kind, name in ((LlamaForCausalLM, "own"), (LlamaForSequenceClassification, "scorer")):
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        (root / name / "own.py").write_text(CODE.format(mark=str(root / "mark")))
        names = ("OwnForCausalLM", "OwnForSequenceClassification")
        auto = {f"AutoModel{each[3:]}": f"own.{each}" for each in names}
        auto_map = {"AutoConfig": "own.OwnConfig", **auto}
        edit(
            root / name / "config.json", model_type="own", auto_map=auto_map, architectures=[f"Own{kind.__name__[5:]}"]
        )
        own_tokenizer = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        edit(root / name / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own_tokenizer)
    adapter = root / "adapter"
    adapter.mkdir()
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM(config), lora).save_pretrained(adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(root / "own"))
    return root


@pytest.fixture
def own(built, tmp_path, monkeypatch):
    """The same, with a cache of modules that is this test's, and small files of data beside the test."""
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    (built / "mark").unlink(missing_ok=True)
    chats = [{"question": "Which?", "answer": "The cat."}, {"question": "Who?", "answer": "The dog."}] * 4
    pairs = [{"prompt": "Which?", "chosen": "The cat.", "rejected": "The dog."}] * 8
    done = [{"prompt": "Which?", "completion": "The cat."}]
    for name, rows in (("chats", chats), ("pairs", pairs), ("done", done)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("text.txt").write_text("The cat meows. The dog barks. " * 40)
    stages = {"sft": {"policy_checkpoint": str(built / "own"), "datasets": ["chats.jsonl"]}}
    Path("pipeline.yaml").write_text(yaml.safe_dump({"output_dir": "runs", "stages": stages}))
    return built


@pytest.fixture
def cli(capsys, monkeypatch):
    def run(*words, stdin=""):
        stream = io.StringIO(stdin or "")
        if stdin is None:
            stream.close()
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


TRAIN = "--output-dir run --device cpu --dtype fp32 --cache-dir cache"
STEP = "--max-steps 1 --batch-size 2 --num-proc 1 --eval-every 5 --eval-steps 1"
COMMANDS = {
    "pretrain": f"pretrain --datasets text.txt --init-from OWN {TRAIN}",
    "pretrain, its tokenizer": f"pretrain --datasets text.txt tokenizer_name=OWN d_model=16 n_heads=2 {TRAIN}",
    "sft": f"sft --datasets chats.jsonl --policy-checkpoint OWN {TRAIN} {STEP}",
    "sft, an adapter": f"sft --datasets chats.jsonl --policy-checkpoint ADAPTER --use-lora {TRAIN}",
    "dpo": f"dpo --datasets pairs.jsonl --policy-checkpoint OWN {TRAIN}",
    "orpo": f"orpo --datasets pairs.jsonl --policy-checkpoint OWN {TRAIN}",
    "reward": f"reward --datasets pairs.jsonl --policy-checkpoint OWN {TRAIN}",
    "grpo": f"grpo --datasets chats.jsonl --policy-checkpoint OWN --rewards length {TRAIN}",
    "ppo": f"ppo --datasets chats.jsonl --policy-checkpoint OWN --rewards length {TRAIN}",
    "merge": "merge ADAPTER -o merged",
    "run": "run pipeline.yaml",
    "chat": "chat OWN --device cpu",
    "chat, an adapter": "chat ADAPTER --device cpu",
    "generate": "generate OWN --prompt The --max-new-tokens 2 --device cpu --complete",
    "model info": "model info OWN",
    "model init": "model init tokenizer_name=OWN d_model=16 n_heads=2 n_kv_heads=1 d_ff=16 n_layers=1 -o made",
    "model convert": "model convert OWN -o made",
    "data check": "data check chats.jsonl -t OWN",
    "data preview": "data preview chats.jsonl -t OWN",
    "data pairs": "data pairs OWN --prompts done.jsonl --rewards length",
    "reward-check": "reward-check done.jsonl --rewards '[{name: reward_model, model: SCORER}]'",
}


def words_of(command, own):
    places = {"OWN": own / "own", "ADAPTER": own / "adapter", "SCORER": own / "scorer"}
    for name, place in places.items():
        command = command.replace(name, str(place))
    return shlex.split(command)


@pytest.mark.parametrize("stdin", [None, "y\n"], ids=["closed", "yes"])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_code_of_a_folder_or_asks(cli, own, name, stdin):
    code, output, errors = cli(*words_of(COMMANDS[name], own), stdin=stdin)
    assert not (own / "mark").exists()
    assert code == 2 and errors.count("error:") == 1 and "[y/N]" not in output + errors
    assert "it requires its own Python code, which runs only with --trust-remote-code" in errors


@pytest.mark.parametrize("name", ["sft", "generate", "model info", "data check", "reward-check"])
def test_with_the_flag_it_loads(cli, own, name):
    code, _, errors = cli(*words_of(COMMANDS[name], own), "--trust-remote-code", stdin=None)
    assert code == 0, errors
    assert (own / "mark").exists()


def test_a_call_allows_it_for_itself_alone(own):
    from llmlab import load_for_inference
    from llmlab.settings.errors import UserError
    from llmlab.settings.trust import remote_code_allowed

    model, _ = load_for_inference(own / "own", device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and not remote_code_allowed()
    with pytest.raises(UserError, match="trust_remote_code=True"):
        load_for_inference(own / "own", device="cpu")


def test_a_folder_of_ours_never_runs_its_copy_of_the_code(cli, own, tokenizer, tmp_path):
    shape = ["d_model=16", "n_heads=2", "n_kv_heads=1", "d_ff=16", "n_layers=1", "max_seq_len=256"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert cli("model", "init", *shape, f"tokenizer_name={tmp_path / 'tokenizer'}", "-o", "ours")[0] == 0
    for file in Path("ours").glob("*.py"):
        file.write_text(CODE.format(mark=str(own / "mark")) + file.read_text())
    for flag in ([], ["--trust-remote-code"]):
        code, output, errors = cli("data", "preview", "chats.jsonl", "-t", "ours", *flag, stdin="y\n")
        assert code == 0 and "The cat." in output and errors == ""
        assert cli("generate", "ours", "-p", "The", "--max-new-tokens", 1, *flag)[0] == 0
    assert not (own / "mark").exists()


def test_generation_code_of_a_folder_stays_off(cli, own, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    Path("plain/custom_generate").mkdir()
    Path("plain/custom_generate/generate.py").write_text(CODE.format(mark=str(own / "mark")) + "\ndef generate(): 1")
    assert cli("generate", "plain", "-p", "The", "--max-new-tokens", 1, stdin="y\n")[0] == 0
    assert not (own / "mark").exists()


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"trust_remote_code": True}, "r.yaml:1: trust_remote_code"),
        ({"trainer_args": {"trust_remote_code": True}}, "r.yaml:2: trainer_args.trust_remote_code"),
        ({"datasets": [{"name": "x", "trust_remote_code": True}]}, "trust_remote_code"),
    ],
)
def test_no_file_allows_it(cli, own, values, where):
    Path("r.yaml").write_text(yaml.safe_dump(values))
    code, _, errors = cli("sft", "-c", "r.yaml", "--show-config")
    assert code == 2 and where in errors and "is no setting: only --trust-remote-code" in errors
    Path("p.yaml").write_text(yaml.safe_dump({"stages": {"sft": values}}))
    code, _, errors = cli("run", "p.yaml", "--dry-run")
    assert code == 2 and "is no setting: only --trust-remote-code" in errors


def test_neither_a_pipeline_nor_a_record_nor_a_trailing_word_allows_it(cli, own):
    Path("p.yaml").write_text(yaml.safe_dump({"trust_remote_code": True, "stages": {"sft": {}}}))
    Path("run").mkdir()
    Path("run/llmlab.json").write_text(json.dumps({"stage": "sft", "settings": {"trust_remote_code": True}}))
    for words in (["run", "p.yaml"], ["sft", "--resume", "run"], ["sft", "trust_remote_code=true"]):
        code, _, errors = cli(*words)
        assert code == 2 and "trust_remote_code is no setting: only --trust-remote-code" in errors


def test_trainers_are_told(own):
    from trl import SFTConfig

    from llmlab.hardware import probe
    from llmlab.runs.arguments import build_arguments
    from llmlab.settings.training import SFTSettings
    from llmlab.settings.trust import remote_code

    for allowed in (False, True):
        with remote_code(allowed):
            made = build_arguments(SFTConfig, SFTSettings(), probe("cpu", "fp32"))
        assert isinstance(made, SFTConfig) and made.trust_remote_code is allowed


def test_auto_classes_are_called_in_one_place():
    package = Path(main.__code__.co_filename).parents[1]
    callers = {str(path.relative_to(package)) for path in package.rglob("*.py") if "import Auto" in path.read_text()}
    assert callers <= {"model/modeling.py"}  # which registers llmlab's own


def test_publishing_from_the_command_line_is_in_the_plan(cli, tokenizer, own, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM, trainer

    hub = {}  # there is no network here

    def create_repo(name, **kwargs):
        return SimpleNamespace(repo_id=name)

    def upload_folder(repo_id, folder_path, **kwargs):
        hub[repo_id] = {path.name for path in Path(folder_path).iterdir()}
        done = Future()
        done.set_result(None)
        return done

    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(trainer, "hf_api", lambda: api)
    monkeypatch.setenv("COLUMNS", "160")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    words = shlex.split(COMMANDS["sft"].replace("OWN", "plain"))
    code, output, errors = cli(*words, "trainer_args.push_to_hub=true", "trainer_args.hub_model_id=me/cats")
    assert code == 0, errors
    plan, _, after = output.partition("step 1/1")
    assert "publishes" in plan and "the Hugging Face hub, as me/cats (public" in plan and after
    assert list(hub) == ["me/cats"] and {"model.safetensors", "tokenizer.json", "config.json"} <= hub["me/cats"]
    assert json.loads(Path("run/llmlab.json").read_text())["settings"]["trainer_args"] == {}
