"""`llmlab evaluate`: gates of a model, against thresholds and another model's scores, or public benchmarks. Measuring
and judging are in `llmlab.evaluation`; here are only options and tables."""

from importlib.util import find_spec
from typing import Annotated, Any

from rich.table import Column
from typer import Context, Exit, Option

from llmlab.cli import chat
from llmlab.cli.arguments import AllowCode, AsJson, Seed, TrustRemoteCode
from llmlab.cli.options import setting_option
from llmlab.cli.rewards import parse_source
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import Layer, finite
from llmlab.settings.gates import EvaluateSettings, GateSettings, read_gates
from llmlab.settings.paths import check_model
from llmlab.settings.sources import resolve
from llmlab.stages import import_heavy
from llmlab.terminal import Terminal, numeric, safe, say, say_json, short_number

FAILED = 3  # exit code
BATCH = 16  # rows that lm-evaluation-harness scores at the same time
OPTIONS = ("n", "num_samples", "temperature", "max_new_tokens")  # of all gates
NumSamples, Temperature, MaxNewTokens = (setting_option(GateSettings, name) for name in OPTIONS[1:])
N = Annotated[int, Option("--n", "-n", help="Prompts, the first ones of the source.", metavar="INT")]
Gates = Option(metavar="FILE|NAMES", help="List of gates (YAML), or their names.")
Prompts = Option("--prompts", "-p", metavar="SOURCE", help="Held-out prompts of gates that name none.")


def evaluate(
    context: Context,
    run: chat.Run,
    gates: Annotated[str | None, Gates] = None,
    baseline: Annotated[str | None, Option(metavar="RUN", help="Model that must not be better.")] = None,
    prompts: Annotated[str | None, Prompts] = None,
    n: N = 100,
    num_samples: NumSamples = 1,
    temperature: Temperature = 0.0,
    max_new_tokens: MaxNewTokens = 256,
    lm_eval: Annotated[str | None, Option(metavar="A,B", help="Tasks of lm-evaluation-harness.")] = None,
    seed: Seed = 42,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
    device: chat.Device = chat.DEFAULT.device,
    dtype: chat.Dtype = chat.DEFAULT.dtype,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score answers to held-out prompts; exit code 3 where a gate fails or certainly lost 2.5 % to the baseline."""
    if lm_eval is not None and find_spec("lm_eval") is None:
        raise UserError("--lm-eval: lm-evaluation-harness is not installed: pip install 'llmlab[eval]'")
    arguments, entries = locals(), read_gates(gates) if gates else []
    if not entries and lm_eval is None:
        raise UserError("--gates is missing: expected a file of gates, or names such as --gates json_valid,distinct_n")
    options = {key: arguments[key] for key in OPTIONS if context.get_parameter_source(key).name == "COMMANDLINE"}
    default = {"prompts": parse_source(prompts, "--prompts ")} if prompts else {}
    named = ({"name": entry} if isinstance(entry, str) else entry for entry in entries)
    complete = [default | entry | options if isinstance(entry, dict) else entry for entry in named]
    settings = resolve(EvaluateSettings, Layer(gates or "command line", {"gates": complete})).settings.gates
    check_model(baseline or run)  # loading checks the run

    import_heavy("llmlab.inference")
    from llmlab.evaluation.gates import find_gates, judge, load_gates, measure
    from llmlab.inference import context_length, is_chat_model, load_for_inference
    from llmlab.runs.progress import quiet_libraries

    gates_found = find_gates(settings, allow_code=allow_code)

    def measure_run(name: str) -> tuple[Any, Any, dict[str, Any]]:
        with quiet_libraries():
            model, tokenizer = load_for_inference(name, dtype=dtype, device=device)
            chats, context = is_chat_model(name, tokenizer), context_length(model)
            loaded = load_gates(gates_found, tokenizer, chats=chats, context=context)
            scores = measure(loaded, model, tokenizer, seed=seed)
        return loaded, scores, _benchmark(model, tokenizer, lm_eval) if lm_eval else {}

    loaded, scores, tasks = measure_run(run)
    same, before, tasks_before = (loaded, {}, {}) if baseline is None else measure_run(baseline)
    for gate, other in zip(loaded, same, strict=True):
        if [example.prompt for example in gate.examples] != [example.prompt for example in other.examples]:
            why = "another context length, chat template or tokenizer"
            raise UserError(f"--baseline {baseline}: it reads other prompts of gate '{gate.label}' ({why})")
    once = {"tests": len(loaded), "seed": seed}
    verdicts = [judge(gate, scores[gate.label], before.get(gate.label), **once) for gate in loaded]
    passed = not any(verdict.failures for verdict in verdicts)
    report = {"run": run, "baseline": baseline, "seed": seed, "passed": passed}
    report["gates"] = [v._asdict() | {"settings": s.recorded()} for v, s in zip(verdicts, settings, strict=True)]
    report = finite(report | ({"lm_eval": tasks, "lm_eval_baseline": tasks_before} if lm_eval else {}))
    if as_json:
        say_json(report, indent=2)
    else:
        _print(verdicts, settings, tasks, tasks_before)
    if not passed:
        raise Exit(FAILED)


def _benchmark(model: Any, tokenizer: Any, tasks: str) -> dict[str, dict[str, float]]:
    """Returns the metrics of tasks of lm-evaluation-harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with reading(f"--lm-eval {tasks}", "tasks"):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        found = simple_evaluate(model=harness, tasks=tasks.split(","))["results"]
    return {task: {k: v for k, v in row.items() if isinstance(v, float)} for task, row in found.items()}


def _print(verdicts: list[Any], settings: list[GateSettings], tasks: dict[str, Any], before: dict[str, Any]) -> None:
    compared = bool(before) or any(verdict.baseline is not None for verdict in verdicts)
    columns = [numeric(name) for name in ("n", "score", *(("baseline", "change") if compared else ()))]
    rows: list[tuple[str, ...]] = []
    notes = []
    for v, entry in zip(verdicts, settings, strict=True):
        cells = [short_number(v.baseline), f"{v.change:+.3g}"] if v.baseline is not None else [""] * (len(columns) - 2)
        verdict = "[red]fails[/red]" if v.failures else "[green]passes[/green]"
        interval = f"{v.low:.3g} to {v.high:.3g}"
        rows.append((safe(v.gate), f"{v.prompts:,}", short_number(v.score), *cells, interval, verdict))
        notes += [f"{v.gate} fails: {failure}" for failure in v.failures]
        if not v.failures and v.needed is not None and v.needed > v.prompts:
            notes.append(f"{v.gate} needs {v.needed:,} prompts to detect {entry.regression:.0%}; it has {v.prompts:,}")
    for task, metrics in tasks.items():
        for name, value in metrics.items():
            cells = [short_number(before[task][name]), ""] if before else [""] * (len(columns) - 2)
            rows.append((safe(f"{task} {name}"), "", short_number(value), *cells))
    headings = (Column("gate", overflow="fold"), *columns, Column("95 % interval", no_wrap=True), "verdict")
    Terminal().table(headings, rows)
    for note in notes:
        say(note, fg="yellow")
