"""`llmlab episodes run`: a model, the scripted expert or a random policy acts by calling tools; figures and replays.

Playing is `llmlab/episodes.py`, environments are `llmlab/simulator`.
"""

import json
from math import sqrt
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.rule import Rule
from rich.table import Column
from rich.text import Text

from llmlab.cli.options import TrustRemoteCode, setting_option
from llmlab.cli.pairs import MaxNewTokens, Temperature, parse_source
from llmlab.settings.environment import EnvironmentSettings
from llmlab.settings.errors import UserError, shorten
from llmlab.settings.files import Layer
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.sources import resolve
from llmlab.settings.vocabulary import LARGEST_SEED
from llmlab.terminal import Terminal, make_table, numeric, percent, safe, say_json

if TYPE_CHECKING:
    from llmlab.episodes import Episode, Task

app = typer.Typer(no_args_is_help=True)

SIMULATOR, SCRIPTED = "simulator", ("expert", "random")
GROUPS = ("category", "difficulty")  # columns by which success is shown
BATCH = 16  # turns that are sampled at the same time
LONGEST = 800  # characters of a text in a replay


class Outcome(NamedTuple):
    """An episode, the columns of its row, and the reward after each turn."""

    episode: "Episode"
    columns: dict[str, Any]
    rewards: list[float]


@app.callback()
def episodes() -> None:
    """Play episodes with tools."""


@app.command("run")
def run_episodes(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, adapter or hub id; or expert, or random.")],
    tasks: Annotated[str, typer.Option(help="Source of prompts, such as demo/tasks.", metavar="SOURCE")],
    count: Annotated[int, typer.Option("--count", "-n", help="Episodes to play.", min=1, metavar="INT")] = 20,
    environment: Annotated[
        str, typer.Option(help="simulator, gymnasium:ID, openenv:URL or file.py:Class.", metavar="NAME")
    ] = SIMULATOR,
    allow_code: Annotated[bool, typer.Option(help="Run environments from files, or on other machines.")] = False,
    max_episode_length: setting_option(EnvironmentSettings, "max_episode_length") = 20,  # type: ignore[valid-type]
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=LARGEST_SEED, metavar="INT")] = 42,
    show: Annotated[int, typer.Option(help="Replays to print.", min=0, metavar="INT")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures and all replays as JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Play a model: its success, reward and length, beside the expert's and a random policy's, and replays."""
    options = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    sampling = resolve(SamplingSettings, Layer("command line", options)).settings
    source = parse_source(tasks, "--tasks ")
    if run in SCRIPTED and environment != SIMULATOR:
        raise UserError(f"{run}: only the simulator has scripted policies; expected a model to play {environment}")

    from llmlab.episodes import Task
    from llmlab.simulator.loading import load_environment
    from llmlab.training.preference.pairs import load_prompts

    make = load_environment(environment, allow_code=allow_code)
    prompts, _ = load_prompts(source, limit=count)
    played = {}
    for name in dict.fromkeys([run, *(SCRIPTED if environment == SIMULATOR else ())]):
        fresh = [Task(make(), prompt.messages, prompt.columns) for prompt in prompts]
        if name in SCRIPTED:
            random = Random(seed)
            played[name] = [
                _play_scripted(task, None if name == "expert" else random, max_episode_length) for task in fresh
            ]
        else:
            played[name] = _play_model(name, fresh, sampling, max_episode_length, seed)
    results = {name: figures(outcomes) for name, outcomes in played.items()}
    if as_json:
        replays = [{"messages": e.prompt + e.completion, "end": e.end, "rewards": r} for e, _, r in played[run]]
        return say_json({"figures": results, "replays": replays}, indent=2)
    console = Terminal()
    for number, outcome in enumerate(played[run][:show], start=1):
        _print_replay(console, number, outcome)
    table = make_table(Column(overflow="fold"), *(numeric(safe(Path(name).name)) for name in results))
    for name in dict.fromkeys(name for each in results.values() for name in each):
        values = [each.get(name, 0.0) for each in results.values()]
        table.add_row(safe(name), *(percent(value) if "success" in name else f"{value:.2f}" for value in values))
    console.print(table)


def _play_model(
    run: str, tasks: "list[Task]", sampling: SamplingSettings, max_episode_length: int, seed: int
) -> list[Outcome]:
    """Plays a model; rewards after a turn are those before the next one is sampled, or those of the end."""
    from transformers import set_seed

    from llmlab.episodes import play
    from llmlab.inference import context_length, generate_tokens, load_for_inference
    from llmlab.runs.progress import quiet_libraries

    before: list[list[float]] = []  # rewards of all episodes before each turn

    def sample(rows: list[list[int]]) -> list[list[int]]:
        before.append([task.environment.get_reward() for task in tasks])
        batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
        return [ids for batch in batches for ids in generate_tokens(model, tokenizer, batch, sampling)]

    with quiet_libraries(), Terminal(stderr=True).status("Playing"):
        model, tokenizer = load_for_inference(run)
        set_seed(seed)
        limits = {"max_new_tokens": sampling.max_new_tokens, "max_length": context_length(model)}
        played = play(tasks, sample, tokenizer, max_episode_length=max_episode_length, **limits)
    after = [*before[1:], [task.environment.get_reward() for task in tasks]]
    return [
        Outcome(episode, task.columns, [turn[number] for turn in after])
        for number, (task, episode) in enumerate(zip(tasks, played, strict=True))
    ]


def _play_scripted(task: "Task", random: Random | None, max_episode_length: int) -> Outcome:
    """Plays the simulator's expert, or with `random` the random policy."""
    from llmlab.episodes import Episode
    from llmlab.simulator.policies import expert_calls, play_scripted, random_calls
    from llmlab.simulator.tasks import read_task

    environment, (*before, last), columns = task
    last = {**last, "content": last["content"] + environment.reset(**columns)}
    goal = read_task(columns["task"], columns.get("difficulty"))
    outcome = Outcome(Episode(environment, [*before, last], [], end="calls"), columns, [])
    calls = random_calls(goal, random) if random else expert_calls(goal)
    for name, arguments in calls[:max_episode_length]:
        results = play_scripted(environment, [(name, arguments)])
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        outcome.episode.completion += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        outcome.episode.completion += [{"role": "tool", "name": name, "content": result} for result in results]
        outcome.rewards.append(environment.get_reward())
        outcome.episode.calls += 1
        if environment.done:
            outcome.episode.end = "done"
            break
    return outcome


def figures(outcomes: list[Outcome]) -> dict[str, float]:
    """Returns shares of success, with Wilson's interval of 95 % (1927) and by the rows' groups, and means."""
    environments = [each.episode.environment for each in outcomes]
    success, count, z = [float(bool(each.success)) for each in environments], len(outcomes), 1.96
    share, scale = fmean(success), 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    spread = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    table = {"success": share, "success, lowest (95 %)": middle - spread, "success, highest (95 %)": middle + spread}
    for column in GROUPS:
        values = [each.columns.get(column) for each in outcomes]
        for value in sorted({*values} - {None}):
            chosen = [each for each, own in zip(success, values, strict=True) if own == value]
            table[f"success, {column} {value}"] = fmean(chosen)
    table["calls"] = fmean(each.episode.calls for each in outcomes)
    table["reward"] = fmean(each.get_reward() for each in environments)
    for name in environments[0].rewards:
        table[f"reward, {name}"] = fmean(each.rewards[name] for each in environments)
    return table


def _print_replay(console: Terminal, number: int, outcome: Outcome) -> None:
    """Prints an episode turn by turn, with the reward after each."""
    episode, rewards = outcome.episode, iter(outcome.rewards)
    ending = "[green]success[/]" if episode.environment.success else "[red]no success[/]"
    title = f"[bold]episode {number}[/]  {ending}, {episode.calls} calls, end: {episode.end}"
    console.print(Rule(title, align="left", style="dim"))
    table = make_table(Column(style="dim"), Column(overflow="fold", ratio=1), numeric(""), show_header=False)
    rows = [("prompt", episode.prompt[-1]["content"], "")]
    for message in episode.completion:
        if message["role"] == "tool":
            rows.append(("result", message["content"], ""))
            continue
        rows += [("model", message["content"], "")] if message["content"] else []
        calls = [call["function"] for call in message.get("tool_calls", ())]
        rows += [("call", f"{call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}", "") for call in calls]
        rows[-1] = (*rows[-1][:2], f"{next(rewards):.1f}")
    for label, text, reward in rows:
        table.add_row(label, Text(shorten(text.strip(), LONGEST)), reward)
    console.print(table)
    console.print()
