"""`--accelerate`: what is launched, what is refused before, and how signals and exit codes come through."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from llmlab.cli.app import main
from llmlab.cli.launch import NAMES, Launch, without_launch_options
from llmlab.pipeline import execute, plan, read_pipeline
from llmlab.runs.record import read_metrics, read_record
from llmlab.settings.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SFT = ["sft", "policy_checkpoint=org/model", "datasets=demo/chat"]
TWO = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True}


@pytest.fixture
def two(tmp_path):
    """A configuration file of two processes on the CPU."""
    path = tmp_path / "two processes.yaml"
    path.write_text(yaml.safe_dump({**TWO, "main_process_port": 0}))
    return path


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Returns a function that runs the command line in an empty folder: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        return left.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that makes so many GPUs visible."""

    def show(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return show


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path):
    """By its own classes, and by its own check of what `accelerate launch` would start."""
    opening = path.read_text().partition("compute_environment")[0]
    assert opening.startswith("# ") and "Choose it" in opening
    config = load_config_from_file(str(path))
    args, defaults, mixed_precision = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "-m", "llmlab", "sft"])
    )
    assert not mixed_precision  # the setting dtype decides
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    expected = next((value for name, value in kind.items() if name in path.stem), "NO")
    assert config.distributed_type.value == expected
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(expected == each for each in kind.values())
    assert config.use_cpu == (path.stem == "cpu")
    assert config.num_machines == (2 if path.stem.startswith("multi_node") else 1)
    assert config.num_processes == (1 if expected == "NO" else 4 * config.num_machines)
    if expected == "FSDP":
        assert int(args.fsdp_version) == 2 and args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
        assert args.fsdp_transformer_layer_cls_to_wrap is None  # what the model itself names
        assert str(args.fsdp_activation_checkpointing).lower() == "false"  # a setting of llmlab's
        assert str(args.fsdp_offload_params).lower() == str("offload" in path.stem).lower()


def test_all_configurations_are_shipped():
    wanted = "single_gpu cpu mps ddp fsdp2 fsdp2_offload deepspeed_zero2 deepspeed_zero3 deepspeed_zero3_offload"
    assert sorted(f"{wanted} multi_node_ddp multi_node_fsdp2".split()) == NAMES
    assert '"accelerate_configs" = "llmlab/accelerate_configs"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("deepspeed")])
def test_deepspeed_reads_what_accelerate_makes_of_it(name, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed's own class reads its configurations")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from accelerate.utils import DeepSpeedPlugin, patch_environment, prepare_deepspeed_cmd_env
    from deepspeed.runtime.config import DeepSpeedConfig

    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(
            ["--config_file", str(ROOT / f"accelerate_configs/{name}.yaml"), "-m", "llmlab", "sft"]
        )
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(args)
    with patch_environment(**environment):
        values = DeepSpeedPlugin().hf_ds_config.config
    assert values["gradient_accumulation_steps"] == values["gradient_clipping"] == "auto"  # the Trainer's
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "train_batch_size": 8}
    config = DeepSpeedConfig({**values, **sizes, "gradient_clipping": 1.0})
    zero, offload = config.zero_config, "cpu" if "offload" in name else "none"
    assert zero.stage == int(re.findall(r"zero(\d)", name)[0])
    device = zero.offload_optimizer.device if zero.offload_optimizer else "none"
    assert str(getattr(device, "value", device)) == offload
    assert zero.gather_16bit_weights_on_model_save == (zero.stage == 3)


def test_the_command_has_the_users_own_words(cli, tmp_path, gpus):
    gpus(2)
    words = [*SFT, "--output-dir", "a run", "--accelerate", "ddp", "lr=1e-3", "--num-processes=2"]
    code, output, errors = cli(*words, "--print-launch")
    assert code == 0 and errors == ""
    file = str(ROOT / "accelerate_configs" / "ddp.yaml")
    left = [*SFT, "--output-dir", "a run", "lr=1e-3"]
    expected = ["accelerate", "launch", "--config_file", file, "--num_processes", "2", "-m", "llmlab", *left]
    assert shlex.split(output) == expected
    assert not (tmp_path / "a run").exists()


def test_only_the_launch_is_left_out():
    words = ["sft", "--accelerate", "ddp", "-c", "x.yaml", "--launch-args=--debug", "--num-processes", "2", "lr=1"]
    assert without_launch_options([*words, "--print-launch"]) == ["sft", "-c", "x.yaml", "lr=1"]


def test_a_machines_batch_is_split_for_the_processes_of_the_launch(cli, two, gpus):
    """Where nothing is launched yet, and without --num-processes too."""
    gpus(0)
    for launch, processes in (([], 1), (["--accelerate", two], 2), (["--accelerate", two, "--num-processes", 4], 4)):
        code, output, _ = cli(*SFT, "--hardware", "rtx_4090", *launch, "--show-config")
        splits = re.findall(r"\n *(?:batch_size|gradient_accumulation_steps) +(\d+) +hardware rtx_4090(.*)", output)
        of = f", {processes} processes" if processes > 1 else ""
        assert code == 0 and [(rows, label.strip()) for rows, label in splits] == [
            ("4", of), (str(4 // processes), of)
        ]  # fmt: skip


def command_of(name, words=(), *, processes=None, device="auto", here=True):
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    return Launch(name, path, processes, tuple(words)).command(["sft"], device, here=here)


def test_every_visible_gpu_gets_a_process(gpus):
    gpus(3)
    assert command_of("fsdp2")[1].num_processes == 3
    assert command_of("ddp", processes=2)[1].num_processes == 2
    machines = ["--num_machines", "4", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    parsed = command_of("multi_node_ddp", machines)[1]
    assert (parsed.num_processes, parsed.num_machines, int(parsed.machine_rank)) == (12, 4, 1)
    with pytest.raises(UserError, match="num_processes = 4: this machine has 3 visible GPUs"):
        command_of("ddp", processes=4)
    with pytest.raises(UserError, match="2 machines need the first one"):
        command_of("multi_node_ddp")
    with pytest.raises(UserError, match="num_processes = 2: it starts one process; expected ddp"):
        command_of("single_gpu", processes=2)


def test_several_cpu_processes_are_several():
    """Accelerate starts one process for a CPU, whatever num_processes says, unless it is told --multi_gpu."""
    assert "--multi_gpu" in command_of("cpu", processes=2)[0]
    assert "--multi_gpu" not in command_of("cpu")[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cpu"])
def test_gpus_are_asked_for_before_anything_starts(name, gpus):
    gpus(0)
    machines = ["--main_process_ip", "10.0.0.1"] if "node" in name else []
    with pytest.raises(UserError, match=f"--accelerate {name}: this machine has no (CUDA|Apple) GPU"):
        command_of(name, machines)
    assert command_of(name, machines, here=False)[0]  # printed for another machine


def test_deepspeed_that_is_missing_is_named(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setattr("llmlab.cli.launch.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"DeepSpeed is not installed; pip install 'llmlab\[deepspeed\]'"):
        command_of("deepspeed_zero3")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--accelerate", "dpp"], "--accelerate dpp: expected a file or one of .*; did you mean 'ddp'"),
        (["--num-processes", "2"], "--num-processes: it needs --accelerate"),
        (["--print-launch"], "--print-launch: it needs --accelerate"),
        (["--accelerate", "cpu", "lrr=1"], "unknown key 'lrr'"),
        (["--accelerate", "cpu", "device=cuda"], "use_cpu = true there contradicts device = cuda"),
        (["--accelerate", "fsdp2", "device=cpu"], "FSDP needs GPUs"),
        (["--accelerate", "cpu", "--launch-args", "--wat 1"], "--launch-args: unrecognized arguments: --wat"),
        (["--accelerate", "cpu", "--launch-args", "--debug 'a"], "--launch-args: cannot be read as words of a shell"),
        (["--accelerate", "cpu", "--launch-args", "--debug a.py"], "--launch-args: expected options of accelerate"),
        (["--accelerate", "cpu", "--launch-args", "--config_file a"], "--launch-args: expected options of accelerate"),
        (["--accelerate", "list.yaml"], "list.yaml: cannot be read as an Accelerate configuration"),
        (["--accelerate", "tpu.yaml"], "distributed_type = XLA: expected one of NO"),
    ],
)
def test_mistakes_are_one_sentence_before_the_launch(words, expected, cli, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "tpu.yaml").write_text("distributed_type: XLA\nnum_processes: 2\n")
    code, output, errors = cli(*SFT, "-o", "run", *words)
    assert code == 2 and output == "" and re.match(rf"error: .*{expected}", errors), errors
    assert errors.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"])
def test_no_launch_inside_a_launch(variable, cli, monkeypatch):
    monkeypatch.setenv(variable, "1")
    code, _, errors = cli(*SFT, "--accelerate", "cpu")
    assert code == 2 and f"this is a process of a launch already ({variable} is set)" in errors


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(folder, *words):
    command = [sys.executable, "-m", "llmlab", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, preexec_fn=restore, **pipes)


def wait_for_steps(folder, process):
    until = time.monotonic() + 400
    while not (folder / "metrics.jsonl").is_file() or len(read_metrics(folder)) < 3:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.1)


PIPELINE = """
output_dir: out
stages:
  tokenizer: {datasets: [CORPUS], vocab_size: 300}
  pretrain:
    model: {tokenizer_name: "${tokenizer}", d_model: 32, n_heads: 2, n_layers: 2, d_ff: 64, max_seq_len: 32}
    datasets: [CORPUS]
    max_steps: 3
    batch_size: 2
    gradient_accumulation_steps: 1
    compile: false
    dtype: fp32
    num_proc: 1
"""


def test_ctrl_c_saves_and_a_killed_process_is_named(settings, corpus_file, two, cli, tmp_path):
    """Of a pipeline that launches its training stage, and of a stage that is launched by itself."""
    steps = {"max_steps": 50_000, "eval_every": 10_000}  # take minutes
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("CORPUS", str(corpus_file)))
    pipeline = ["run", "p.yaml", "--accelerate", two, *(f"pretrain.{name}={value}" for name, value in steps.items())]
    made = settings(output_dir=str(tmp_path / "killed"), **steps)
    (tmp_path / "settings.json").write_text(made.model_dump_json(exclude_unset=True))
    stopped = start(tmp_path, *pipeline)
    killed = start(tmp_path, "pretrain", "--config", "settings.json", "--accelerate", two)
    folder = tmp_path / "out" / "pretrain"
    wait_for_steps(tmp_path / "killed", killed)
    ranks = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
    os.kill(max(map(int, ranks)), signal.SIGKILL)
    wait_for_steps(folder, stopped)
    stopped.send_signal(signal.SIGINT)
    output, errors = stopped.communicate(timeout=240)
    assert stopped.returncode == 130 and "Traceback" not in errors, (output, errors)
    record = read_record(folder)
    assert record["status"] == "interrupted" and list(folder.glob("checkpoint-*"))
    assert output.count("stopped; continue with") == 1
    assert record["hardware"]["processes"] == 2 and record["settings"]["max_steps"] == 50_000
    assert record["sources"]["max_steps"] == "command line" and record["sources"]["batch_size"] == "p.yaml:9"
    assert "processes" not in read_record(tmp_path / "out" / "tokenizer").get("hardware", {})
    assert [line.split()[1] for line in cli(*pipeline, "--dry-run")[1].splitlines()[-2:]] == ["skip", "resume"]
    _, errors = killed.communicate(timeout=240)
    assert killed.returncode == 128 + signal.SIGKILL
    lines = [line for line in errors.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: process 1 of 2 was killed by SIGKILL"), lines


def test_a_stage_that_diverged_in_its_own_process_is_known(corpus_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(PIPELINE.replace("CORPUS", str(corpus_file)))
    pipeline = read_pipeline("p.yaml")

    def run(stage, resolved, options):
        folder = Path(resolved.settings.output_dir)
        ended = "finished" if stage.name == "tokenizer" else "diverged"
        (folder / "llmlab.json").write_text(json.dumps({"stage": stage.name, "status": ended}))
        if ended == "diverged":
            raise SystemExit(4)

    with pytest.raises(SystemExit, match="4"):
        list(execute(pipeline, plan(pipeline), run))
    assert [(step.action, step.reason) for step in plan(pipeline)] == [("skip", "finished"), ("resume", "it diverged")]


def test_accelerate_launch_runs_the_script(tmp_path):
    """From a checkout that is not installed: the folder of recipes alone is on the path of its script."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", ROOT / "recipes" / "train.py", "sft"]
    done = subprocess.run(
        [*command, "lr=3e-4", "--show-config"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and re.search(r"learning_rate\s+0.0003\s+command line", done.stdout), done


STUB = '#!/bin/bash\nfor word in "$@"; do printf "%s\\0" "$word"; done\n'


@pytest.mark.parametrize("template", ["slurm.sh", "skypilot.yaml"])
def test_cluster_templates_fill_in_what_accelerate_knows(template, tmp_path):
    """Run on stand-ins of `srun`, `scontrol` and `llmlab`, as the second of two machines with eight GPUs each."""
    text = (ROOT / "recipes" / "cluster" / template).read_text()
    assert text.count("CHANGE") >= 5
    script = text if template == "slurm.sh" else yaml.safe_load(text)["run"]
    stubs = {"llmlab": STUB, "srun": '#!/bin/bash\nexec "$@"\n', "scontrol": "#!/bin/bash\nprintf 'a\\nb\\n'\n"}
    for name, body in stubs.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_NNODES": 2, "SLURM_NODEID": 1, "SLURM_JOB_ID": 7, "SLURM_GPUS_ON_NODE": 8}
    variables |= {"SLURM_JOB_NODELIST": "a,b", "SKYPILOT_NODE_IPS": "a\nb", "SKYPILOT_NUM_NODES": 2}
    variables |= {"SKYPILOT_NODE_RANK": 1, "SKYPILOT_NUM_GPUS_PER_NODE": 8}
    if template == "skypilot.yaml":
        variables |= yaml.safe_load(text)["envs"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | {
        name: str(value) for name, value in variables.items()
    }
    script = script.replace("source .venv/bin/activate", ":")
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    words = done.stdout.split("\0")[:-1]
    assert done.returncode == 0 and words[:3] == ["sft", "--config", "sft.yaml"], done
    assert words[words.index("--accelerate") + 1] in NAMES
    parsed = launch_command_parser().parse_args([*shlex.split(words[words.index("--launch-args") + 1]), "llmlab"])
    assert (parsed.num_machines, int(parsed.machine_rank), parsed.num_processes) == (2, 1, 16)
    assert parsed.main_process_ip == "a" and parsed.main_process_port > 1024


def test_the_notebook_example_trains_in_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    example = ROOT / "examples" / "several_gpus.py"
    monkeypatch.setattr(sys, "argv", [str(example), "run"])
    runpy.run_path(str(example), run_name="__main__")
    assert read_record(tmp_path / "run")["status"] == "finished"


def test_a_pipeline_that_cannot_be_launched_starts_no_stage(cli, corpus_file, gpus, tmp_path, monkeypatch):
    gpus(2)
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("CORPUS", str(corpus_file)))
    machines = ["--launch-args", "--main_process_ip 10.0.0.1"]
    code, _, errors = cli("run", "p.yaml", "--accelerate", "multi_node_ddp", *machines)
    assert code == 2 and "a pipeline runs on one machine" in errors
    gpus(0)
    code, _, errors = cli("run", "p.yaml", "--accelerate", "ddp")
    assert code == 2 and "this machine has no CUDA GPU" in errors and not (tmp_path / "out").exists()
    monkeypatch.setattr("llmlab.pipeline.execute", lambda pipeline, steps, run: steps)
    assert cli("run", "p.yaml", "--accelerate", "ddp", "--only", "tokenizer")[0] == 0  # which is not launched
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = cli("run", "p.yaml")
    assert code == 2 and errors.endswith("--accelerate NAME, not accelerate launch\n")
