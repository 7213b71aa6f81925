"""Damaged copies of every file that is read: each is read all the same, or is one sentence; nothing is written."""

import contextlib
import gzip
import json
import os
import random
import shutil
import stat

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from llmlab.cli.chat import _read_prompts
from llmlab.data.sources import Tally, load_text
from llmlab.data.tokenizer import load_tokenizer
from llmlab.inference import encode_prompt, is_chat_model, load_for_inference
from llmlab.model import load_model
from llmlab.pipeline import plan, read_pipeline
from llmlab.rewards.compose import compose
from llmlab.runs.history import ancestors, changed_settings, curve_metric, find_runs, summary
from llmlab.runs.record import RunRecord
from llmlab.runs.start import check_undamaged
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.files import read_layer
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings
from llmlab.simulator.guardrails import SHIPPED, read_guardrails

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
HARSH = [
    b"",
    b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
    bytes(range(256)),
    b"null",
    b"\xff\xfe\x00",
    b"\x00" * 99,
]


def chats(folder):
    model, tokenizer = load_for_inference(folder, dtype="fp32", device="cpu")
    if is_chat_model(folder, tokenizer):
        encode_prompt(tokenizer, [{"role": "user", "content": "How?"}])


def lists(folder):
    runs = find_runs(folder)
    assert len(runs) == 1  # a damaged record is listed too
    json.dumps(summary(runs[0]), default=str)
    ancestors(runs[0])
    changed_settings(runs[0])
    curve_metric(runs[0])


def texts(path):
    found = load_text(DataSource(name=str(path)))
    return list(found.texts(Tally(), 1.0))


def schema(path):
    reward = compose([{"name": "schema_pass", "json_schema": str(path)}])
    reward.score(['{"a": 1}'], prompts=["?"])


def resolves(path):
    resolve(SFTSettings, read_layer(path))


READERS = {  # file: what reads it, and how
    "model/config.json": ("model", chats),
    "model/generation_config.json": ("model", chats),
    "model/model.safetensors": ("model", chats),
    "model/tokenizer.json": ("model", chats),
    "model/tokenizer_config.json": ("model", chats),
    "model/chat_template.jinja": ("model", chats),
    "model/llmlab.json": ("model", chats),
    "adapter/adapter_config.json": ("adapter", chats),
    "adapter/adapter_model.safetensors": ("adapter", chats),
    "run/llmlab.json": ("run", lists),
    "run/metrics.jsonl": ("run", lists),
    "checkpoint-2/trainer_state.json": ("checkpoint-2", check_undamaged),
    "checkpoint-2/optimizer.pt": ("checkpoint-2", check_undamaged),
    "checkpoint-2/scheduler.pt": ("checkpoint-2", check_undamaged),
    "checkpoint-2/rng_state.pth": ("checkpoint-2", check_undamaged),
    "checkpoint-2/critic.safetensors": ("checkpoint-2", check_undamaged),
    "checkpoint-2/0-rollout.pt": ("checkpoint-2", check_undamaged),
    "checkpoint-2/0-stream.pt": ("checkpoint-2", check_undamaged),
    "settings.yaml": ("settings.yaml", resolves),
    "settings.json": ("settings.json", resolves),
    "settings.py": ("settings.py", resolves),
    "pipeline.yaml": ("pipeline.yaml", lambda path: plan(read_pipeline(path))),
    "runs/pipeline.json": ("pipeline.yaml", lambda path: plan(read_pipeline(path))),
    "text.txt": ("text.txt", texts),
    "text.json": ("text.json", texts),
    "text.jsonl": ("text.jsonl", texts),
    "text.jsonl.gz": ("text.jsonl.gz", texts),
    "text.csv": ("text.csv", texts),
    "text.parquet": ("text.parquet", texts),
    "prompts.jsonl": ("prompts.jsonl", lambda path: list(_read_prompts(path))),
    "schema.json": ("schema.json", schema),
    "guardrails.yaml": ("guardrails.yaml", read_guardrails),
}


@pytest.fixture(scope="module")
def home(base_folder, tmp_path_factory):
    """A folder with one whole copy of everything."""
    import pyarrow
    import pyarrow.parquet

    home = tmp_path_factory.mktemp("files")
    shutil.copytree(base_folder, home / "model")
    (home / "model" / "llmlab.json").write_text('{"stage": "sft"}')
    load_tokenizer(str(base_folder)).save_pretrained(home / "adapter")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(str(base_folder)), lora)
    adapted.save_pretrained(home / "adapter")

    record = RunRecord(
        home / "run", stage="sft", settings={"learning_rate": 0.1}, sources={}, parents=["x"], hardware={"memory": 1}
    )
    record.start()
    for step in (1, 2, 3):
        record.log(step, step, {"loss": 1 / step})
    record.finish("finished", step=3, metrics={"loss": 0.1})

    checkpoint = home / "checkpoint-2"
    checkpoint.mkdir()
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), checkpoint / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, checkpoint / "rng_state.pth")
    torch.save({"step": 1, "rollout": None, "metrics": {}}, checkpoint / "0-rollout.pt")
    shutil.copy(home / "adapter" / "adapter_model.safetensors", checkpoint / "critic.safetensors")
    state = {"global_step": 2, "train_batch_size": 2, "log_history": [{"step": 1, "loss": 1.0}]}
    state |= {"best_metric": 0.5, "stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}}}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    torch.save({"rows": 3}, checkpoint / "0-stream.pt")

    (home / "settings.yaml").write_text("learning_rate: 1e-4\ntrainer_args: {max_grad_norm: 1}\n")
    (home / "settings.json").write_text('{"learning_rate": 1e-4, "datasets": ["a | | 2"]}')
    (home / "settings.py").write_text("config = {'learning_rate': 1e-4, 'use_lora': True}")
    documents = ["The cat meows.", "The dog barks.", "The cow moos."] * 5
    rows = [{"text": document} for document in documents]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (home / "text.txt").write_text("<|endoftext|>".join(documents))
    (home / "text.json").write_text(json.dumps(rows))
    (home / "text.jsonl").write_text(lines)
    (home / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (home / "text.csv").write_text("text\n" + "\n".join(documents))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), home / "text.parquet")
    (home / "pipeline.yaml").write_text(
        f"output_dir: {home / 'runs'}\nstages:\n  tokenizer: {{datasets: [{home / 'model' / 'config.json'}]}}\n"
        '  pretrain: {tokenizer_name: "${tokenizer}", datasets: [demo/stories]}\n'
    )
    steps = plan(read_pipeline(home / "pipeline.yaml"))
    same = {"status": "finished", "owner": "x", "run": "1", "needed_runs": {}}
    known = {step.stage.name: {**same, "inputs": step.inputs} for step in steps}
    (home / "runs").mkdir()
    (home / "runs" / "pipeline.json").write_text(json.dumps(known))
    (home / "prompts.jsonl").write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    (home / "schema.json").write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    shutil.copy(SHIPPED, home / "guardrails.yaml")
    return home


def damaged(content, data):
    """Returns the content cut off, with flipped bits, replaced, or of another shape."""
    kind = data.draw(st.sampled_from(["cut", "flip", "replace", "value", "field"]), label="damage")
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    if kind == "flip":
        changed = bytearray(content)
        places = st.integers(0, min(len(content), 400) - 1) | st.integers(0, len(content) - 1)
        for place in data.draw(st.lists(places, min_size=1, max_size=8), label="places"):
            changed[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        return bytes(changed)
    if kind == "replace":
        return data.draw(st.sampled_from(HARSH), label="content")
    value = data.draw(JSON, label="value")
    if kind == "field":
        with contextlib.suppress(ValueError):
            whole = json.loads(content)
            if isinstance(whole, dict) and whole:
                name = data.draw(st.sampled_from(sorted(whole)), label="field")
                value = {**whole, name: value}
    return json.dumps(value).encode()


def tree(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def read(home, file):
    """Reads what holds the file; any error but one sentence of the user's fails the test."""
    subject, reader = READERS[file]
    before = tree(home)
    try:
        reader(home / subject)
    except UserError as error:
        assert str(error) and "Traceback" not in str(error)
    finally:
        assert tree(home) == before


@pytest.mark.parametrize("file", READERS)
def test_a_whole_file_is_read(home, file):
    subject, reader = READERS[file]
    reader(home / subject)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", READERS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_read_or_is_a_sentence(home, file, data):
    path = home / file
    content = path.read_bytes()
    try:
        path.write_bytes(damaged(content, data))
        read(home, file)
    finally:
        path.write_bytes(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", READERS)
def test_a_folder_or_nothing_in_its_place(home, file):
    path = home / file
    content = path.read_bytes()
    try:
        path.unlink()
        if not (file.endswith("llmlab.json") and "run" in file):  # without it there is no run to list
            read(home, file)
        path.mkdir()
        read(home, file)
        path.rmdir()
        path.symlink_to(path.name)  # a loop
        read(home, file)
    finally:
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            path.rmdir()
        path.write_bytes(content)


@pytest.mark.parametrize("file", READERS)
def test_a_file_that_may_not_be_read(home, file):
    path = home / file
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    try:
        if os.access(path, os.R_OK):
            pytest.skip("permissions do not bind this user")
        read(home, file)
    finally:
        path.chmod(mode)
