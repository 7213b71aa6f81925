"""Every command and every program that README and docs/tour.md print runs, in its order, after a quickstart.

The other pages' commands are parsed in `test_docs.py`, and the notebooks' cells run here.

They are run as printed but for `SHORTER` and `SMALL`: fewer steps, smaller batches and less data of the same kinds.
"""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmlab.cli.app import main

ROOT = Path(__file__).parents[1]
README = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tour.md"))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

QUICKSTART = [
    "tokenizer.datasets=demo/stories",
    "pretrain.datasets=demo/stories",
    "pretrain.max_steps=10",
    "pretrain.eval_every=10",
    "sft.datasets=demo/chat",
    "sft.max_steps=4",
    "sft.eval_every=4",
    "chat.max_new_tokens=8",
    "dpo.datasets=demo/preferences",
    "dpo.max_steps=2",
    "dpo.eval_batches=1",
    "grpo.datasets=demo/arithmetic",
    "grpo.max_steps=1",
    "grpo.batch_size=4",
    "grpo.group_size=2",
    "grpo.mini_batch_size=8",
    "grpo.gradient_accumulation_steps=1",
    "grpo.max_new_tokens=4",
    "grpo.eval_batches=1",
]
ROLLOUTS = ["batch_size=4", "mini_batch_size=4", "max_new_tokens=4", "eval_batches=1", "stop_patience=none"]
SMALL = {"stories": "600kB", "chat": "200kB", "preferences": "200kB", "arithmetic": "50kB"}  # the quickstart's here
SHORTER = {  # how a command begins: further words, which win
    "llmlab pretrain --config examples/pretrain.yaml": ["datasets=demo/stories", "max_steps=6", "eval_every=3"],
    "llmlab pretrain --resume runs/stories --max-steps 400": ["max_steps=8"],
    "llmlab pretrain --resume runs/stories --max-steps 500": ["max_steps=10"],
    "llmlab plan pretrain": ["n_layers=2", "d_model=64", "n_heads=2", "n_kv_heads=1", "d_ff=128", "vocab_size=1000"],
    "llmlab sft": ["max_steps=4"],
    "llmlab dpo": ["max_steps=2", "batch_size=4", "mini_batch_size=4", "eval_batches=1"],
    "llmlab grpo": [
        "datasets=demo/arithmetic",
        "max_steps=2",
        "group_size=2",
        "gradient_accumulation_steps=2",
        *ROLLOUTS,
    ],
    "llmlab reward ": ["max_steps=2", "batch_size=4", "mini_batch_size=4", "eval_batches=1"],
    "llmlab ppo": ["max_steps=2", *ROLLOUTS],
    # an untrained model has no right sum to learn from
    "llmlab awr": ["max_prompts=4", "num_samples_per_prompt=4", "max_new_tokens=8", "rewards=length"],
}
FEWER = {  # in the notebooks
    "max_steps|eval_every|group_size": 2,
    "batch_size|mini_batch_size": 4,
    "max_new_tokens": 8,
    "warmup_steps|eval_steps|eval_batches": 1,
}


def commands():
    """Returns the commands of the blocks, in order, comments off and continued lines joined."""
    lines = "".join(text for language, text in BLOCKS if not language).replace("\\\n", " ").splitlines()
    words = [line.removeprefix(".venv/bin/") for line in lines]
    return [re.split(r"\s+#", line)[0] for line in words if line.startswith(("llmlab ", "make "))]


def shortened(command):
    """Returns a command's words, with the further ones in place of those of the same key."""
    extra = next((words for start, words in SHORTER.items() if command.startswith(start)), [])
    keys = {word.partition("=")[0] for word in extra}
    kept, given = [], shlex.split(command)[1:]
    while given:
        word = given.pop(0)
        key = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if key in keys and "=" not in word:
            given.pop(0)
        elif key not in keys:
            kept.append(word)
    return [small(word) for word in [*kept, *extra]] if "--show-config" not in kept else kept


def small(text):
    """Returns a word or a program with less of each demo corpus that it trains on."""
    pattern = r"""(?<=["=])demo/(\w+)( \| \w+)?(?="|$)"""
    return re.sub(pattern, lambda found: f"demo/{found[1]} | {SMALL[found[1]]}", text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with README's recipes and examples, in which a tiny quickstart has run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLMLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        run(["run", "recipes/quickstart.yaml", *map(small, QUICKSTART)])
        yield folder


def run(words):
    """Runs a command in this process, and expects it to end well."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code, (words, end.value.code)


def test_the_targets_of_make_are_there():
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.slow
def test_every_command_runs_in_its_order(checkout, monkeypatch):
    ran = [command for command in commands() if command.startswith("llmlab ")]
    assert len(ran) > 12
    monkeypatch.setattr("llmlab.cli.doctor.compile_in_child", lambda device: "tried in test_doctor.py")
    for command in ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))  # what is said to a chat
        run(shortened(command))
    unused = [start for start in SHORTER if not any(command.startswith(start) for command in ran)]
    assert not unused


@pytest.mark.slow
def test_every_python_program_runs(checkout):
    programs = [text for language, text in BLOCKS if language == "python"]
    assert programs
    for text in programs:
        assert "max_steps=200" in text
        exec(compile(small(text.replace("max_steps=200", "max_steps=2")), "README", "exec"), {})  # as a reader would


@pytest.mark.slow
def test_the_command_for_several_processes_runs(checkout):
    command = next(text for text in re.findall(r"`(accelerate launch [^`]+)`", README))
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(command)[1:]]
    words += [small("datasets=demo/stories"), "max_steps=2", "output_dir=runs/launched", "device=cpu"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (Path("runs/launched") / "llmlab.json").is_file()


@pytest.mark.slow
def test_the_examples_run(checkout, monkeypatch):
    for name, steps in (("pretrain.py", "max_steps=200"), ("own_reward.py", "max_steps=40")):
        text = Path("examples", name).read_text()
        assert steps in text
        text = text.replace(steps, "max_steps=2").replace("batch_size=32", "batch_size=4").replace("=128", "=16")
        exec(compile(small(text), name, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_to_chat", "sft_dpo", "tools_grpo"])
def test_the_notebooks_run(checkout, name, monkeypatch):
    monkeypatch.syspath_prepend(checkout)  # as Jupyter does with the folder it starts in
    cells = json.loads(Path("examples", f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for keys, value in FEWER.items():
        program = re.sub(rf'\b({keys})(=|": )\d+', rf"\g<1>\g<2>{value}", program)
    program = small(program).replace("range(4000)", "range(80)")
    exec(compile(program, name, "exec"), {"__name__": "__main__"})
    assert len(list(Path("runs/notebooks").rglob("metrics.jsonl"))) >= 2
