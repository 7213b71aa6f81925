"""Two processes on this machine: they learn what one does, one of them writes and prints, and none outlives the other.

`ranks.py` is what they run; one pair of them does everything that ends well, since starting them takes longer.
"""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmlab.runs.checkpoints import checkpoints
from llmlab.runs.record import read_metrics, read_record
from tests.conftest import make_base

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).with_name("ranks.py")
RANKS_HERE = runpy.run_path(str(RANKS))

LORA = {"use_lora": True, "lora_preset": "all", "lora_dropout": 0.0}  # dropout would differ between processes
GROUPS = {"group_size": 4, "batch_size": 4}
FAMILIES = {  # name: stage, what is not as in `values_for`
    "pretrain": ("pretrain", {}),
    "sft": (
        "sft",
        {"save_best_only": True, "learning_rate": 0.1, "eval_every": 1},
    ),  # a rate that spoils it after a few steps
    "sft with LoRA, packed": ("sft", {"packing": True, **LORA}),
    "dpo": ("dpo", {}),
    "orpo": ("orpo", {}),
    "reward": ("reward", {}),
    "grpo": ("grpo", GROUPS),
    "grpo with LoRA and a global mean": ("grpo", {"baseline_mode": "global_mean", **GROUPS, **LORA}),
    "ppo": ("ppo", {"batch_size": 16}),
    "ppo with LoRA": ("ppo", {"batch_size": 16, **LORA}),
    "ppo with a shared critic": ("ppo", {"batch_size": 16, "value_model": "shared", "early_stop": False}),
    "awr": ("awr", {"sampling_batch_size": 8}),
    "grpo in episodes": ("grpo", GROUPS),
    "ppo in episodes": ("ppo", {"batch_size": 16}),
}
LEVERS = '''
class Levers:
    done, success, reward_range = False, None, (0.0, 2.0)

    def reset(self, **row):
        self.done, self.success, self.rewards = False, False, {"prize": 0.0}

    def pull(self, name: str) -> str:
        """Pulls a lever.

        Args:
            name: its name.
        """
        self.rewards["prize"] += float(name == "dog")
        self.done = self.success = name == "dog"
        return "ok"

    def get_reward(self) -> float:
        return self.rewards["prize"]
'''
RESUMED_ALONE = {  # what two processes read or sample by other random numbers than one
    "pretrain streaming": ("pretrain", {"streaming": True}),
    "grpo sampling freely": ("grpo", {"ppo_epochs": 1, **GROUPS}),
    "ppo sampling freely": ("ppo", {"ppo_epochs": 1, "batch_size": 16}),
}
SHARDED = {  # families that FSDP2 and DeepSpeed shard
    "FSDP": ["pretrain", "sft", "sft with LoRA, packed", "dpo", "grpo", "ppo"],
    "ZeRO-2": ["sft with LoRA, packed", "dpo", "grpo"],
    "ZeRO-3": ["dpo", "grpo"],
}
if find_spec("deepspeed") is None or shutil.which("g++") is None:  # it compiles how CPU processes share memory
    del SHARDED["ZeRO-2"], SHARDED["ZeRO-3"]
TYPES = {"FSDP": "FSDP", "ZeRO-2": "DEEPSPEED", "ZeRO-3": "DEEPSPEED"}  # what Accelerate makes of the processes
DEEPSPEED = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled first
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
}
IN_EPISODES = ("episode_length", "success_rate", "reward/prize")
OVERHEAD = 60_000  # bytes of names and random states in a file
EVERYWHERE = ("loss", "grad_norm", "learning_rate", "tokens")
COMPARED = {  # metrics that are means over rows or tokens, not over forward passes
    "pretrain": ("eval_loss", "eval_perplexity"),
    "sft": ("eval_loss", "eval_perplexity"),
    "dpo": ("eval_loss", "win_rate", "margin", "kl", "chosen_logp", "eval_win_rate", "eval_margin", "eval_kl"),
    "orpo": ("eval_loss", "win_rate", "margin", "nll_loss", "log_odds_ratio", "eval_win_rate", "gate/distinct_n"),
    "reward": ("eval_loss", "win_rate", "margin", "eval_win_rate", "eval_margin"),
    "grpo": ("reward", "reward_std", "kl", "kl_coef", "entropy", "group_variance", "best_of_group", "eval_reward"),
    "ppo": ("reward", "kl", "kl_coef", "entropy", "value_loss", "policy_kl", "explained_variance", "eval_reward"),
    "awr": ("eval_loss", "effective_sample_size"),
}


def values_for(stage, changes, processes):
    """Settings of four updates of the same rows on one process and on two, saved and resumable at the third."""
    values = {"max_steps": 4, "warmup_steps": 0, "scheduler": "none", "eval_every": 2, "save_total_limit": None}
    values |= {"validation_fraction": 0.1}
    values |= {"save_best_only": False, "eval_every": 3} if stage == "pretrain" else {"save_every": 3}
    if stage in ("pretrain", "sft"):
        values |= {"batch_size": 2, "gradient_accumulation_steps": 4 // processes, "eval_steps": 4 // processes}
    elif stage == "awr":
        values |= {"batch_size": 2, "gradient_accumulation_steps": 4 // processes, "eval_batches": 4 // processes}
    elif stage in ("grpo", "ppo"):
        values |= {"mini_batch_size": 4, "gradient_accumulation_steps": 4 // processes, "eval_batches": 2 // processes}
        values |= {"ppo_epochs": 2, "ent_coef": 0.1, "adaptive_kl": True, "target_kl": 0.01, "kl_horizon": 50}
    else:
        values |= {"batch_size": 8, "mini_batch_size": 2, "eval_batches": 4 // processes}
    return {**values, **changes}


def start(folder, jobs):
    """Starts two processes of `ranks.py`; what each prints goes to `RANK/stdout.log` and `RANK/stderr.log`."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "--redirects", "3", "--log-dir", folder / "log", RANKS, folder]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja's, which DeepSpeed needs
    environment = {
        **os.environ,
        "PATH": tools,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def printed(folder, rank, stream="stdout"):
    (path,) = folder.glob(f"log/*/attempt_0/{rank}/{stream}.log")
    return path.read_text()


def plain(settings):
    values = settings.model_dump(mode="json", exclude_unset=True)
    return values | ({"allow_code": True} if "rewards" in values else {})  # no file may say so


@pytest.fixture(scope="module")
def with_files(tmp_path_factory, tokenizer_folder, chat_file):
    """Settings of families that name files: an environment, a policy with room for its tools, a gate."""
    folder = tmp_path_factory.mktemp("levers")
    (folder / "levers.py").write_text(LEVERS)
    base = make_base(tokenizer_folder, folder / "base", max_seq_len=1024)
    episodes = {
        "policy_checkpoint": str(base),
        "environment": f"{folder / 'levers.py'}:Levers",
        "max_episode_length": 3,
        "max_new_tokens": 64,
        "max_seq_len": 1024,
    }
    gate = {"name": "distinct_n", "prompts": str(chat_file), "n": 8, "max_new_tokens": 8}
    gates = {"gates": [gate], "gate_every": 2, "metric_for_best_model": "gate distinct_n"}
    return {"grpo in episodes": episodes, "ppo in episodes": episodes, "orpo": gates}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_settings, with_files):
    """The folder in which two processes ran each family, resumed it at its third step, and did the other jobs."""
    folder = tmp_path_factory.mktemp("pair")
    jobs = []

    def add(name, place, sharded=False, **more):
        """Adds the jobs of a run of a family, and of its second part alone."""
        stage, changes = {**FAMILIES, **RESUMED_ALONE}[name]
        changes = {**changes, **with_files.get(name, {})}
        whole, again = (
            plain(tiny_settings(stage, folder / each, **values_for(stage, changes, 2), **more))
            for each in (place, f"{place} resumed")
        )
        job = {"stage": stage, "free": name in RESUMED_ALONE, "sharded": sharded}
        jobs.append({"do": "train", "settings": whole, **job})
        jobs.append({"do": "resume", "settings": again, "whole": str(folder / place), "step": 3, **job})

    for name in (*FAMILIES, *RESUMED_ALONE):
        add(name, name)
    for name in SHARDED["FSDP"]:
        add(name, f"{name} FSDP", sharded=True)
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    for place, more, resumed in (
        ("taken", {}, None),
        ("deep/nothing", {}, "deep/nothing"),
        ("deep/large", {"batch_size": 10**15}, None),
    ):
        settings = plain(tiny_settings("pretrain", folder / place, **more))
        resumed = resumed and str(folder / resumed)
        jobs.append({"do": "refuse", "stage": "pretrain", "settings": settings, "resume": resumed})
    settings = plain(tiny_settings("pretrain", folder / "interrupted"))
    signalled = {"rank": 1, "step": 4, "number": signal.SIGTERM}
    jobs.append({"do": "interrupt", "stage": "pretrain", "settings": settings, **signalled})
    settings = plain(tiny_settings("sft", folder / "sharded", max_steps=1, validation_fraction=0, **LORA))
    jobs.append({"do": "mark", "stage": "sft", "settings": settings})
    for kind in SHARDED.keys() - {"FSDP"}:  # last: it changes what a process is to Accelerate
        zero = {"stage": int(kind[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        (folder / f"{kind}.json").write_text(json.dumps({"zero_optimization": zero, **DEEPSPEED}))
        for name in SHARDED[kind]:
            add(name, f"{name} {kind}", trainer_args={"deepspeed": str(folder / f"{kind}.json")})
    if "ZeRO-3" in SHARDED:
        more = {**values_for(*FAMILIES["ppo"], 2), "trainer_args": {"deepspeed": str(folder / "ZeRO-3.json")}}
        settings = plain(tiny_settings("ppo", folder / "deep/ppo", **more))
        jobs.append({"do": "refuse", "stage": "ppo", "settings": settings})
    process = start(folder, jobs)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, (output, printed(folder, 0, "stderr"), printed(folder, 1, "stderr"))
    return folder


@pytest.fixture(scope="module")
def said(pair):
    """What the refused and interrupted jobs of each process returned."""
    answers = [json.loads((pair / f"said-{rank}.json").read_text())["said"] for rank in (0, 1)]
    kept = [[answer for answer in each if isinstance(answer, (str, int))] for each in answers]
    assert kept[0] == kept[1]
    return kept[0]


@pytest.fixture(scope="module")
def seen(pair):
    """What was seen in the runs and their second parts, by the names of their folders."""
    jobs = json.loads((pair / "jobs.json").read_text())
    answers = json.loads((pair / "said-0.json").read_text())["said"]
    places = [Path(job["settings"]["output_dir"]).name for job in jobs]
    return {place: answer for place, answer in zip(places, answers, strict=True) if isinstance(answer, dict)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_settings, with_files):
    """Returns a function that runs a family on one process, once."""
    folder = tmp_path_factory.mktemp("alone")

    def run(name):
        stage, changes = FAMILIES[name]
        changes = {**changes, **with_files.get(name, {})}
        if not (folder / name).exists():
            RANKS_HERE["train"](stage, plain(tiny_settings(stage, folder / name, **values_for(stage, changes, 1))))
        return folder / name

    return run


def weights_of(folder):
    return load_file(next(folder.glob("*.safetensors")))


PLACES = [  # name, what Accelerate makes of the processes, folder
    *((name, "MULTI_CPU", name) for name in FAMILIES),
    *((name, TYPES[kind], f"{name} {kind}") for kind, names in SHARDED.items() for name in names),
]


@pytest.mark.parametrize(("name", "kind", "place"), PLACES, ids=[place for *_, place in PLACES])
def test_two_processes_learn_what_one_does(name, kind, place, pair, seen, alone):
    """Equal but for the order in which 32-bit floats are added up: 1e-5 after four updates."""
    stage, changes = FAMILIES[name]
    assert (seen[place]["type"], seen[place]["processes"]) == (kind, 2)
    one, two = alone(name), pair / place
    for key in (*EVERYWHERE, *COMPARED[stage], *(IN_EPISODES if "episodes" in name else ())):
        ours, theirs = ([line[key] for line in read_metrics(run) if key in line] for run in (two, one))
        assert len(ours) >= 2 and ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), key
    states = [json.loads((run / "checkpoint-4" / "trainer_state.json").read_text()) for run in (two, one)]
    assert states[0]["best_global_step"] == states[1]["best_global_step"] is not None
    assert [path.name for path in checkpoints(two)] == [path.name for path in checkpoints(one)]
    record = read_record(two)
    assert record["status"] == "finished" and record["hardware"]["processes"] == 2
    ours, theirs = weights_of(two), weights_of(one)
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        assert ours[key].flatten() == pytest.approx(weight.flatten(), abs=1e-4), key
    if "save_best_only" in changes:
        best = f"checkpoint-{states[0]['best_global_step']}"
        assert best != "checkpoint-4"
        assert all((weight == ours[key]).all() for key, weight in weights_of(two / best).items())


@pytest.mark.parametrize("place", [place for _, kind, place in PLACES if kind != "MULTI_CPU"])
def test_the_run_folder_of_shards_loads_as_any_other(place, pair, seen):
    """The logits of the folder's model are those that the shards had at the end of the run."""
    model = AutoModelForCausalLM.from_pretrained(pair / place)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([RANKS_HERE["TOKENS"]])).logits
    assert logits.flatten() == pytest.approx(torch.tensor(seen[place]["logits"]).flatten(), abs=1e-5)


@pytest.mark.parametrize("place", [place for *_, place in PLACES if "LoRA" in place])
def test_checkpoints_of_adapters_hold_no_base_model(place, pair):
    """No file but the tokenizer is larger than what is trained takes, with its gradient and two states of AdamW."""
    weights = weights_of(pair / place)
    assert weights and all("lora_" in name for name in weights)
    trained = sum(weight.numel() for weight in weights.values())
    for path in (pair / place).rglob("*"):
        if path.suffix in (".pt", ".pth", ".bin", ".safetensors") and "training_args" not in path.name:
            assert path.stat().st_size < OVERHEAD + 4 * 4 * trained, path
            for name, shape in tensors_in(path):
                frozen = "weight" in name and not any(part in name for part in ("lora_", "head.weight"))
                assert not frozen or math.prod(shape) == 0, (path, name)


def tensors_in(path):
    """Returns the name and shape of each tensor in a file."""
    if path.suffix == ".safetensors":
        return [(name, weight.shape) for name, weight in load_file(path).items()]
    found, rest = [], [("", torch.load(path, weights_only=False))]
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += [(f"{name}.{key}", each) for key, each in value.items()]
        elif isinstance(value, torch.Tensor):
            found.append((name, value.shape))
    return found


@pytest.mark.parametrize("place", [*(place for *_, place in PLACES), *RESUMED_ALONE])
def test_a_resumed_pair_goes_on_as_if_never_stopped(place, pair):
    whole, again = pair / place, pair / f"{place} resumed"
    assert read_record(again)["resumed"][0]["step"] == 3
    ours, theirs = (
        [
            line[key]
            for line in read_metrics(run)
            for key in ("loss", "grad_norm", "tokens", "eval_loss")
            if key in line
        ]
        for run in (again, whole)
    )
    assert len(ours) >= 13 and ours == pytest.approx(theirs, abs=1e-6)
    before, after = weights_of(whole), weights_of(again)
    assert all(after[key].flatten() == pytest.approx(weight.flatten(), abs=1e-6) for key, weight in before.items())


def test_the_main_process_alone_writes_and_prints(pair):
    written = json.loads((pair / "said-1.json").read_text())["written"]
    names = {Path(path).name for path in written if Path(path).is_relative_to(os.path.realpath(pair))}
    own = ("1-", "__1_", "rng_state_1", "zero_pp_rank_1")  # its part of a checkpoint
    assert all(name.startswith(own) for name in names), names
    lines = [
        line for line in printed(pair, 1).splitlines() if not line.startswith("DeepSpeed ")
    ]  # of what it compiles
    assert "pretrain" in printed(pair, 0) and lines == []


def test_both_agree_on_what_is_refused(pair, said):
    assert [text.rpartition(": ")[2] for text in said[:2]] == [
        "it already holds other files; choose another folder",
        "there is no such run folder",
    ]
    assert "one batch needs at least" in said[2]
    assert not (pair / "deep").exists()  # a run that writes nothing leaves nothing
    assert [path.name for path in (pair / "taken").iterdir()] == ["notes.txt"]


def test_a_signal_to_one_stops_both_after_the_same_step(pair, said):
    folder = pair / "interrupted"
    assert said[3] == 143 and read_record(folder)["status"] == "interrupted"
    assert max(line["step"] for line in read_metrics(folder)) == 4
    assert checkpoints(folder)[-1].name == "checkpoint-4"
    assert (folder / "checkpoint-4" / "rng_state_1.pth").is_file()


@pytest.mark.skipif("ZeRO-3" not in SHARDED, reason="needs DeepSpeed and a C++ compiler")
def test_what_zero3_cannot_split_is_refused(said):
    assert said[-1].startswith("ppo: not supported under DeepSpeed ZeRO-3")


def test_sharded_adapters_are_gathered_from_both(pair):
    """Each process filled its half of every adapter with a number of its own: the saved tensors hold both."""
    for place in (pair / "sharded", pair / "sharded" / "best_lora_adapters"):
        weights = weights_of(place)
        assert len(weights) == 2 * 7 * 2
        for name, weight in weights.items():
            first, second = weight.chunk(2)
            assert (first == 1).all() and (second == 2).all(), name


def command(settings, folder, step=0, sharded=False):
    """Runs a stage's command on two processes, of which the second is killed at a step; returns how it ended."""
    (folder / "settings.json").write_text(settings.model_dump_json(exclude_unset=True))
    words = ["sft", "--config", str(folder / "settings.json")]
    process = start(folder, [{"do": "command", "words": words, "rank": 1, "step": step, "sharded": sharded}])
    process.communicate(timeout=300)
    errors = [[line for line in printed(folder, rank, "stderr").splitlines() if "error" in line] for rank in (0, 1)]
    return process.returncode, errors, time.time()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_killed_process_ends_the_run_with_one_sentence(sharded, tiny_settings, tmp_path):
    settings = tiny_settings("sft", tmp_path / "run", max_steps=4000, validation_fraction=0, save_every=2)
    code, errors, ended = command(settings, tmp_path, step=5, sharded=sharded)
    assert code != 0 and len(errors[0]) == 1 and not errors[1], printed(tmp_path, 0, "stderr")
    assert errors[0][0].startswith("error: another process of this run ended")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 4 and read_record(tmp_path / "run")["status"] == "failed"
    assert ended - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime < 60
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-4"


def test_what_the_main_process_finds_is_said_once(tiny_settings, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "answer": ""}\n')
    settings = tiny_settings("sft", tmp_path / "run", datasets=[str(tmp_path / "rows.jsonl")])
    code, errors, _ = command(settings, tmp_path)
    assert code != 0 and len(errors[0]) == 1 and not errors[1]
    assert "1 of 1 rows cannot be used" in errors[0][0]
    assert not (tmp_path / "run").exists()
