"""The lowest loss in the same seconds: `llmlab pretrain --preset speedrun` against nanochat, LitGPT and plain AdamW.

    python benchmarks/speedrun.py tinyshakespeare.txt [--minutes 5] [--seeds 3] [--folder runs] [--record]

Each contestant trains in a process of its own on the same text, and is scored on the same held-out text in bits per
byte.  All models are compiled, as in the peers' own scripts (`--eager`: none).  Its seconds are those that making and
compiling the model takes, from an empty cache, and its steps times the median step of short trials, which take turns
on the idle machine; as many steps are planned as fit into the minutes, and rates decay over them.  So long runs may
share the machine.  `--folder` keeps trials and finished runs, so that a comparison can be continued.  `--only` runs a
part of it, `--switches` the preset with one of its choices changed.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

SHAPE = {"d_model": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 4, "d_ff": 704, "max_seq_len": 256}
PEERS = {"nanochat": [None], "litgpt": [1e-3, 2e-3, 4e-3]}
OURS = {"adamw": [1e-3, 2e-3, 4e-3], "speedrun": [None]}  # adamw: the recipe of pretraining's defaults
NAMES = {
    "nanochat": "nanochat",
    "litgpt": "LitGPT",
    "adamw": "llmlab, AdamW",
    "speedrun": "llmlab, `--preset speedrun`",
}
SWITCHES = {  # the preset with one of its choices changed; a step of those in RECIPE takes as long as the preset's
    "vocabulary 1024": {},
    "value_embeddings: false": {"model": {"value_embeddings": False}},
    "activation: swiglu": {"model": {"activation": "swiglu", "d_ff": 688}},  # as many weights
    "6 layers of 256": {"model": {"n_layers": 6}},
    "4 layers of 192": {"model": {"d_model": 192, "n_heads": 3, "n_kv_heads": 3, "d_ff": 768}},
    "qk_norm: false": {"model": {"qk_norm": False}},
    "initialization: zero_outputs": {"model": {"initialization": "zero_outputs"}},
    "optimizer: adamw": {"optimizer": "adamw", "lr": 2e-3, "adamw_beta1": 0.9, "adamw_beta2": 0.95},
    "muon_momentum: 0.95": {"muon_momentum": 0.95},
    "one rate for all": {"embedding_lr": None, "head_lr": None},
    "scheduler: linear": {"scheduler": "linear"},
    "scheduler: cosine": {"scheduler": "cosine"},
    "weight_decay: 0": {"weight_decay": 0.0},
    "4 x 256 tokens a step": {"batch_size": 4},
    "16 x 256 tokens a step": {"batch_size": 16},
}
RECIPE = {
    name
    for name in SWITCHES
    if name.split(":")[0] in ("initialization", "muon_momentum", "one rate for all", "scheduler", "weight_decay")
}
MIXTURE = {  # a larger text: the columns of data sets in one folder
    "c4_demo.jsonl": ("text",),
    "gsm8k_train.jsonl": ("question", "answer"),
    "alpaca_en_demo.json": ("instruction", "input", "output"),
    "dpo_en_demo.json": ("conversations", "chosen"),
}
BATCH, EVALUATIONS, TRIAL = 16, 10, 10  # rows of a step, evaluations, seconds of a trial after its first step
EARLY = 5  # steps, among them those that compile; a trial takes more


def read_text(path):
    """Returns a file's text, or the documents of a folder's data sets, in a random order."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines()) if path.suffix == ".jsonl" else text
    documents = []
    for name, columns in MIXTURE.items():
        text = (path / name).read_text(encoding="utf-8")
        rows = map(json.loads, text.splitlines()) if name.endswith("l") else json.loads(text)
        documents += ["\n".join(part for column in columns for part in strings(row.get(column))) for row in rows]
    random.Random(0).shuffle(documents)
    return "\n\n".join(documents)


def strings(value):
    """Yields the texts of a column: a string, a turn with its `value`, or a list of them."""
    if isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif text := value.get("value") if isinstance(value, dict) else value:
        yield text


def prepare(options, folder):
    """Writes the tokenizer, the text of both sides of the split, and their tokens."""
    import numpy as np

    from llmlab.data.tokenizer import learn_bpe, load_tokenizer
    from llmlab.settings.data import DataSource

    text = read_text(Path(options.text))
    cut = int(0.9 * len(text))
    for name, part in (("train", text[:cut]), ("held_out", text[cut:])):
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    for size in {options.vocab_size, options.own_vocab_size}:
        tokens = folder / f"tokens-{size}"
        learn_bpe([DataSource(name=str(folder / "train.txt"))], size, tokens, show_progress=False)
        tokenizer = load_tokenizer(str(tokens))
        for name in ("train", "held_out"):
            text = (folder / f"{name}.txt").read_text(encoding="utf-8")
            np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.uint16).tofile(tokens / f"{name}.bin")
        special = set(tokenizer.all_special_ids)
        words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))  # byte-level: a character is a byte
        sizes = [0 if i in special else len(word) for i, word in enumerate(words)]
        (tokens / "bytes.json").write_text(json.dumps(sizes))


def tokens_of(options, name):
    """Returns the folder of a contestant's tokenizer and tokens."""
    own = name == "speedrun" or name in SWITCHES and name != "vocabulary 1024"
    return options.folder / f"tokens-{options.own_vocab_size if own else options.vocab_size}"


def settings_of(options, name, rate, seed, steps, output):
    """Returns the settings of one of llmlab's contestants."""
    from llmlab import PretrainSettings
    from llmlab.settings.presets import read_preset

    if name == "adamw":
        values = {"model": dict(SHAPE), "lr": rate, "warmup_steps": 50, "batch_size": BATCH}
        values["gradient_accumulation_steps"] = 1
    else:
        values = {key: value for key, value in read_preset("pretrain", "speedrun").values.items() if key != "stage"}
        change = SWITCHES.get(name, {})
        values |= change | {"model": values["model"] | change.get("model", {})}
    values["model"] = values["model"] | {"tokenizer_name": str(tokens_of(options, name))}
    folder = options.folder
    sources = {"datasets": [str(folder / "train.txt")], "validation_datasets": [str(folder / "held_out.txt")]}
    return PretrainSettings(
        **values | sources,
        max_steps=steps,
        seed=seed,
        output_dir=output,
        cache_dir=str(folder / "cache"),
        eval_every=steps,
        eval_steps=1,
        log_every=100,
        report=False,
        num_proc=1,
        compile=not options.eager,
    )


def run_llmlab(options, name, rate, seed, steps, output, limit=None):
    """Returns the curve of an llmlab run, or what it did until `limit` seconds after its first step."""
    import numpy as np
    import torch
    from speedrun_peers import bits_per_byte
    from transformers import TrainerCallback

    import llmlab
    from llmlab.training import pretrain

    settings = settings_of(options, name, rate, seed, steps, output)
    folder = tokens_of(options, name)
    held_out = np.fromfile(folder / "held_out.bin", np.uint16)
    sizes, times, curve = torch.tensor(json.loads((folder / "bytes.json").read_text())), [], []
    began, parameters = time.perf_counter(), 0

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            nonlocal began, parameters
            parameters = sum(parameter.numel() for parameter in model.parameters())
            times.append(time.perf_counter() - began)
            if limit is not None:
                control.should_training_stop = len(times) > EARLY and times[-1] - times[0] > limit
            elif state.global_step * EVALUATIONS // steps > (state.global_step - 1) * EVALUATIONS // steps:
                model.eval()

                def logits(ids):
                    with torch.autocast("cpu", torch.bfloat16):
                        return model(ids, use_cache=False).logits.float()

                loss = bits_per_byte(logits, held_out, sizes, settings.model.max_seq_len)
                curve.append((state.global_step, loss))
                print(f"step {state.global_step}: {loss:.4f}", flush=True)
                model.train()
                began = time.perf_counter() - times[-1]  # an evaluation takes no time

    class Watched(pretrain.PretrainTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Stopwatch())

    build = pretrain.build_model

    def start(*args):
        nonlocal began
        began = time.perf_counter()
        return build(*args)

    pretrain.PretrainTrainer, pretrain.build_model = Watched, start
    llmlab.pretrain(settings)
    rows = settings.batch_size * settings.gradient_accumulation_steps
    tokens = len(times) * rows * settings.model.max_seq_len
    return {"curve": curve, "times": times, "tokens": tokens, "parameters": parameters}


def plan(options):
    """Yields the runs to come: a name, a rate and a seed; after the first seed only the best rate goes on."""
    for seed in range(1, options.seeds + 1):
        for name in options.only:
            rates = (PEERS | OURS).get(name, [None])
            if seed > 1 and len(rates) > 1:
                rates = [min(rates, key=lambda rate: load(options, name, rate, 1)["curve"][-1][1])]
            yield from ((name, rate, seed) for rate in rates)


def path_of(options, name, rate, seed):
    parts = [name.replace(": ", "=").replace(" ", "_"), rate, seed]
    return options.folder / ("-".join(str(part) for part in parts if part is not None) + ".json")


def load(options, name, rate, seed):
    """Returns a finished run, its curve in seconds."""
    run = json.loads(path_of(options, name, rate, seed).read_text())
    start, step = seconds_of(options, name)
    return run | {"curve": [(start + step * steps, loss) for steps, loss in run["curve"]]}


def seconds_of(options, name):
    """Returns what making and compiling the model takes beside the steps themselves, and a step, by the trials."""
    name = "speedrun" if name in RECIPE else name
    trials = [
        json.loads(path.read_text())["times"]
        for path in options.folder.glob(path_of(options, name, "trial", "*").name)
    ]
    later = [[after - before for before, after in itertools.pairwise(times[EARLY - 1 :])] for times in trials]
    step = statistics.median(statistics.median(steps) for steps in later)
    return max(statistics.median(times[EARLY - 1] for times in trials) - EARLY * step, 0.0), step


def start(words, cache):
    return subprocess.run(words, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})


def train(options, name, rate, seed, steps, out, limit=None):
    """Runs one contestant in a process of its own, unless the folder has it; a trial ends after `limit` seconds."""
    if out.exists():
        return
    parts = [NAMES.get(name, name), *([] if rate is None else [f"rate {rate:g}"]), f"{steps} steps, seed {seed}"]
    print(*parts, sep=", ", flush=True)
    if name in PEERS:
        python = options.litgpt_python if name == "litgpt" else sys.executable
        words = [python, Path(__file__).with_name("speedrun_peers.py"), name, tokens_of(options, name), out]
        words += ["--steps", steps, "--seed", seed, "--evaluations", EVALUATIONS, "--batch", BATCH]
        words += [] if rate is None else ["--rate", rate]
        words += [] if limit is None else ["--limit", limit]
        words += ["--layers", SHAPE["n_layers"], "--width", SHAPE["d_model"], "--sequence", SHAPE["max_seq_len"]]
    else:
        words = [sys.executable, __file__, options.text, "--folder", options.folder]
        words += ["--vocab-size", options.vocab_size]
        words += ["--own-vocab-size", options.own_vocab_size, "--run", name, rate, seed, steps, out, limit]
    words += ["--eager"] if options.eager else []
    with tempfile.TemporaryDirectory() as empty:
        start([str(word) for word in words], empty)


def seconds_until(curve, target):
    """Returns when a curve reaches a loss, between evaluations by a straight line; None where it does not."""
    before = None
    for point in curve:
        if point[1] <= target:
            if before is None:
                return point[0]
            return before[0] + (point[0] - before[0]) * (before[1] - target) / (before[1] - point[1])
        before = point
    return None


def best_runs(options):
    """Returns the finished runs of each contestant at its best rate, seed by seed."""
    found = {}
    for name in options.only:
        rates = (PEERS | OURS).get(name, [None])
        if finished := [rate for rate in rates if path_of(options, name, rate, 1).exists()]:
            rate = min(finished, key=lambda rate: load(options, name, rate, 1)["curve"][-1][1])
            seeds = [s for s in range(1, options.seeds + 1) if path_of(options, name, rate, s).exists()]
            found[name] = rate, [load(options, name, rate, seed) for seed in seeds]
    return found


def spread(values, form):
    """Returns a mean, and the range of several values."""
    text = form.format(statistics.mean(values))
    return text + (f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else "")


def table(options):
    found = best_runs(options)
    finals = {name: statistics.mean(run["curve"][-1][1] for run in runs) for name, (_, runs) in found.items()}
    peers = [name for name in PEERS if name in finals]
    best = min(peers, key=finals.get) if peers else None
    text, cores = Path(options.text).name, len(os.sched_getaffinity(0))
    lines = [
        f"## The lowest loss in the same seconds, {date.today()}",
        "",
        f"{text}, {options.minutes:g} minutes on {cores} cores each, its last tenth held out; seeds: "
        f"{max(len(runs) for _, runs in found.values())}, mean (lowest to highest). `python benchmarks/speedrun.py`",
        "",
        "| contestant | rate | parameters | a step | tokens | its seconds | bits per byte at the end | "
        f"seconds to the loss of {NAMES.get(best, 'a peer')} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (rate, runs) in found.items():
        reached = [seconds_until(run["curve"], finals[best]) for run in runs] if best else []
        until = "not reached by all" if None in reached else spread(reached, "{:.0f}") if reached else ""
        lines.append(
            f"| {NAMES.get(name, name)} | {'its own' if rate is None else f'{rate:g}'} "
            f"| {runs[0]['parameters'] / 1e6:.1f} M | {1000 * seconds_of(options, name)[1]:.0f} ms "
            f"| {statistics.mean(run['tokens'] for run in runs) / 1e6:.2f} M | {runs[0]['curve'][-1][0]:.0f} "
            f"| {spread([run['curve'][-1][1] for run in runs], '{:.3f}')} "
            f"| {until} |"
        )
    ours = found.get("speedrun", (None, []))[1]
    for name in [*([best] if best else []), *(["adamw"] if "adamw" in found else [])]:
        theirs = found[name][1][0]["curve"][-1][0]
        reached = [seconds_until(run["curve"], finals[name]) for run in ours]
        if reached and None not in reached:
            share = spread([100 * seconds / theirs for seconds in reached], "{:.0f} %")
            lines += [
                "",
                f"The final loss of {NAMES[name]} ({finals[name]:.3f}) is reached in {share} of its seconds.",
            ]
        elif reached:
            lines += ["", f"The final loss of {NAMES[name]} ({finals[name]:.3f}) is not reached by every seed."]
    return "\n".join(lines) + "\n"


def draw(options, path):
    """Draws loss over seconds, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, (name, (_, runs)) in enumerate(best_runs(options).items()):
        for run in runs:
            label = NAMES.get(name, name) if run is runs[0] else None
            axes.plot(*zip(*run["curve"], strict=True), color=f"C{number}", label=label)
    axes.set(xlabel="seconds of training", ylabel="held-out loss, bits per byte")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text file, a .jsonl file with 'text', or a folder with MIXTURE's files")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1, help="of the minutes for the preset, whose decay ends there")
    parser.add_argument("--only", nargs="+", choices=NAMES | SWITCHES, default=list(NAMES))
    parser.add_argument("--switches", action="store_true", help="the preset's switches too")
    parser.add_argument("--trials", type=int, default=3, help="short runs of each contestant, which take turns")
    parser.add_argument("--trials-only", action="store_true", help="stop after them: the rest may share the machine")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--own-vocab-size", type=int, default=2048, help="of the preset; losses are a byte's")
    parser.add_argument("--litgpt-python", default=sys.executable, help="an interpreter that has LitGPT")
    parser.add_argument("--eager", action="store_true", help="compile none")
    parser.add_argument("--folder", type=Path, help="where this version's runs are kept, to be continued")
    parser.add_argument("--plot", type=Path, help="write a plot of loss over seconds")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--run", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, rate, seed, steps, out, limit = (None if word == "None" else word for word in options.run)
        rate, limit = (None if value is None else float(value) for value in (rate, limit))
        with tempfile.TemporaryDirectory() as output:
            result = run_llmlab(options, name, rate, int(seed), int(steps), output, limit)
        Path(out).write_text(json.dumps(result))
        return
    options.only += SWITCHES if options.switches else []
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        if not all((tokens_of(options, name) / "bytes.json").exists() for name in options.only):
            prepare(options, options.folder)
        for number in range(options.trials):
            for name in dict.fromkeys("speedrun" if name in RECIPE else name for name in options.only):
                out = path_of(options, name, "trial", number)
                train(options, name, (PEERS | OURS).get(name, [None])[0], 1, 10**5, out, TRIAL)
        if options.trials_only:
            return
        for name, rate, seed in plan(options):
            first, step = seconds_of(options, name)
            seconds = 60 * options.minutes * (1 if name in PEERS or name == "adamw" else options.share)
            steps = max(round((seconds - first) / step), EVALUATIONS)
            train(options, name, rate, seed, steps, path_of(options, name, rate, seed))
        printed = table(options)
        print(printed)
        if options.plot:
            draw(options, options.plot)
    if options.record:
        with Path(__file__).with_name("RESULTS.md").open("a", encoding="utf-8") as file:
            file.write("\n" + printed)


if __name__ == "__main__":
    main()
