"""`llmlab evaluate`: gates of a model, against thresholds and another model's scores, or public benchmarks; `llmlab
episodes run`: a model, the scripted expert or a random policy acts by calling tools. Measuring and judging are in
`llmlab.evaluation`, playing in `llmlab/episodes.py`; here are only options, figures, tables and replays."""

import json
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated, Any

from rich.rule import Rule
from rich.table import Column
from rich.text import Text
from typer import Argument, Context, Exit, Option, Typer

from llmlab.cli.arguments import AllowCode, AsJson, Run, Seed, TrustRemoteCode
from llmlab.cli.options import setting_option, with_settings
from llmlab.cli.rewards import parse_source
from llmlab.settings.errors import UserError, reading, shorten
from llmlab.settings.files import Layer, finite
from llmlab.settings.gates import EvaluateSettings, GateSettings, read_gates
from llmlab.settings.generation import DeviceSettings, SamplingSettings
from llmlab.settings.paths import check_model
from llmlab.settings.rewards import SIMULATOR, EnvironmentSettings
from llmlab.settings.sources import resolve
from llmlab.stages import import_heavy
from llmlab.terminal import Terminal, numeric, percent, safe, say, say_json, short_number

episodes_app = Typer(no_args_is_help=True)

FAILED = 3  # exit code
BATCH = 16  # rows that lm-evaluation-harness scores, or turns that are sampled, at the same time
OPTIONS = ("n", "num_samples", "temperature", "max_new_tokens")  # of all gates
NumSamples, Temperature, MaxNewTokens = (setting_option(GateSettings, name) for name in OPTIONS[1:])
N = Annotated[int, Option("--n", "-n", help="Prompts, the first ones of the source.", metavar="INT")]
SCRIPTED = ("expert", "random")  # policies
SHARES = ("success", "ended")  # figures in percent; the others are means
ENDS = {"done": "the environment", "answer": "an answer"}
ENDS |= {"calls": "the limit of calls", "length": "the limit of tokens"}
LONGEST = 800  # characters of a text in a replay
Gates = Option(metavar="FILE|NAMES", help="List of gates (YAML), or their names.")
Prompts = Option("--prompts", "-p", metavar="SOURCE", help="Held-out prompts of gates that name none.")


@with_settings(DeviceSettings)
def evaluate(
    context: Context,
    run: Run,
    settings: DeviceSettings,
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
    measured = resolve(EvaluateSettings, Layer(gates or "command line", {"gates": complete})).settings.gates
    check_model(baseline or run)  # loading checks the run

    import_heavy("llmlab.inference")
    from llmlab.evaluation.gates import find_gates, judge, load_gates, measure
    from llmlab.inference import context_length, is_chat_model, load_for_inference
    from llmlab.runs.progress import quiet_libraries

    gates_found = find_gates(measured, allow_code=allow_code)

    def measure_run(name: str) -> tuple[Any, Any, dict[str, Any]]:
        with quiet_libraries():
            model, tokenizer = load_for_inference(name, dtype=settings.dtype, device=settings.device)
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
    report["gates"] = [v._asdict() | {"settings": s.recorded()} for v, s in zip(verdicts, measured, strict=True)]
    report = finite(report | ({"lm_eval": tasks, "lm_eval_baseline": tasks_before} if lm_eval else {}))
    if as_json:
        say_json(report, indent=2)
    else:
        _print(verdicts, measured, tasks, tasks_before)
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


@episodes_app.command("run")
@with_settings(SamplingSettings, "temperature", "max_new_tokens")
def run_episodes(
    context: Context,
    settings: SamplingSettings,
    run: Annotated[str, Argument(metavar="RUN", help="Run folder, adapter or hub id; or expert, or random.")],
    tasks: Annotated[str, Option(help="Source of prompts, such as demo/tasks.", metavar="SOURCE")],
    count: Annotated[int, Option("--count", "-n", help="Episodes to play.", min=1, metavar="INT")] = 20,
    environment: Annotated[str, Option(help="As in settings: simulator, gymnasium:ID, ...")] = SIMULATOR,
    allow_code: Annotated[bool, Option("--allow-code", help="Run files, and use other machines.")] = False,
    max_episode_length: setting_option(EnvironmentSettings, "max_episode_length") = 20,  # type: ignore[valid-type]
    seed: Seed = 42,
    show: Annotated[int, Option(help="Replays to print.", min=0, metavar="INT")] = 2,
    as_json: Annotated[bool, Option("--json", help="Print figures and all replays as JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Play a model: its success, reward and length, beside the expert's and a random policy's, and replays."""
    source = parse_source(tasks, "--tasks ")
    if run in SCRIPTED and environment != SIMULATOR:
        raise UserError(f"{run}: only the simulator has scripted policies; expected a model to play {environment}")
    sources = (context.get_parameter_source(key).name for key in ("temperature", "max_new_tokens"))
    if run in SCRIPTED and "COMMANDLINE" in sources:
        raise UserError(f"{run}: --temperature and --max-new-tokens have no effect on a scripted policy")

    from llmlab.episodes import Task
    from llmlab.simulator.environment import load_environment
    from llmlab.training.preference.pairs import load_prompts

    make = load_environment(environment, allow_code=allow_code)
    prompts, _ = load_prompts(source, limit=count)
    if environment == SIMULATOR and any("task" not in prompt.columns for prompt in prompts):
        raise UserError(f"--tasks {tasks}: a row has no column task, as the rows of demo/tasks have")
    played = {}
    for name in dict.fromkeys([run, *(SCRIPTED if environment == SIMULATOR else ())]):
        fresh = [Task(make(), prompt.messages, prompt.columns) for prompt in prompts]
        if name in SCRIPTED:
            played[name] = _play_scripted(name, fresh, max_episode_length, seed)
        else:
            played[name] = _play_model(name, settings, fresh, max_episode_length, seed)
    results = {name: figures(episodes) for name, episodes in played.items()}
    if as_json:
        replays = [
            {"messages": each.prompt + each.completion, "end": each.end, "reward": reward_of(each.environment)}
            for each in played[run]
        ]
        return say_json({"figures": results, "replays": replays}, indent=2)
    console = Terminal()
    for number, episode in enumerate(played[run][:show], start=1):
        _print_replay(console, number, episode)
    rows = []
    for name in dict.fromkeys(name for each in results.values() for name in each):
        values, share = [each.get(name, 0.0) for each in results.values()], name.startswith(SHARES)
        rows.append((safe(name), *(percent(value) if share else f"{value:.2f}" for value in values)))
    console.table([Column(overflow="fold"), *(numeric(safe(Path(name).name)) for name in results)], rows)


def _play_model(
    run: str, sampling: SamplingSettings, tasks: list[Any], max_episode_length: int, seed: int
) -> list[Any]:
    """Plays a model."""
    from transformers import set_seed

    from llmlab.episodes import play
    from llmlab.inference import context_length, end_tokens, generate_tokens, load_for_inference
    from llmlab.runs.progress import quiet_libraries

    def sample(rows: list[list[int]]) -> list[list[int]]:
        return generate_tokens(model, tokenizer, rows, sampling, batch_size=BATCH)

    with quiet_libraries(), Terminal(stderr=True).status("Playing"):
        model, tokenizer = load_for_inference(run)
        set_seed(seed)
        limits = {"max_episode_length": max_episode_length, "max_new_tokens": sampling.max_new_tokens}
        limits |= {"max_length": context_length(model), "ends": end_tokens(model, tokenizer)}
        return play(tasks, sample, tokenizer, **limits)


def _play_scripted(policy: str, tasks: list[Any], max_episode_length: int, seed: int) -> list[Any]:
    """Plays the simulator's expert or its random policy."""
    from llmlab.episodes import Episode
    from llmlab.simulator.world import play_scripted, random_calls

    episodes, random, unknown = [], Random(seed), 0
    for environment, (*before, last), columns, _ in tasks:
        prompt = [*before, {**last, "content": last["content"] + environment.reset(**columns)}]
        episode = Episode(environment, prompt, [])
        calls = environment.task.expected if policy == "expert" else random_calls(environment, random)
        unknown += not calls
        for name, arguments in calls[:max_episode_length]:
            if environment.done:
                break
            (result,) = play_scripted(environment, [(name, arguments)])
            call = {"type": "function", "function": {"name": name, "arguments": arguments}}
            episode.completion.append({"role": "assistant", "content": "", "tool_calls": [call]})
            episode.completion.append({"role": "tool", "name": name, "content": result})
            episode.calls += 1
        episode.end = "done" if environment.done else "calls"
        episodes.append(episode)
    if unknown:
        say(f"{policy}: {unknown} of {len(tasks)} tasks name no expected calls, so that it makes none", error=True)
    return episodes


def reward_of(environment: Any) -> float:
    """Returns the reward so far of an environment that may leave rewards to others, as TRL's may."""
    return float(environment.get_reward()) if hasattr(environment, "get_reward") else 0.0


def figures(episodes: list[Any]) -> dict[str, float]:
    """Returns shares of success and of ends, and means."""
    environments = [each.environment for each in episodes]
    table = {"success": fmean(bool(getattr(each, "success", None)) for each in environments)}
    for end, name in ENDS.items():
        table[f"ended by {name}"] = fmean(each.end == end for each in episodes)
    table["calls"] = fmean(each.calls for each in episodes)
    table["reward"] = fmean(map(reward_of, environments))
    parts = [getattr(each, "rewards", {}) for each in environments]
    for name in dict.fromkeys(name for each in parts for name in each):
        table[f"reward, {name}"] = fmean(each.get(name, 0.0) for each in parts)
    return table


def _print_replay(console: Terminal, number: int, episode: Any) -> None:
    """Prints an episode turn by turn."""
    ending = "[green]success[/]" if getattr(episode.environment, "success", None) else "[red]no success[/]"
    reward = f"reward {reward_of(episode.environment):.1f}"
    title = f"[bold]episode {number}[/]  {ending}, {reward}, {episode.calls} calls, ended by {ENDS[episode.end]}"
    console.print(Rule(title, align="left", style="dim"))
    rows: list[tuple[Any, ...]] = [("prompt", Text(shorten(episode.prompt[-1]["content"].strip(), LONGEST)))]
    for message in episode.completion:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        lines = [f"{call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}" for call in calls]
        text = Text(shorten("\n".join([message["content"], *lines]).strip(), LONGEST))
        is_tool = message["role"] == "tool"
        rows.append(("result", text) if is_tool else ("[bold]model[/]", text))
    console.table((Column(style="dim"), Column(overflow="fold", ratio=1)), rows, show_header=False)
    console.print()
