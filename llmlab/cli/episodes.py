"""`llmlab episodes run`: a model, the scripted expert or a random policy acts by calling tools. Playing is in
`llmlab/episodes.py`; here are only options, figures and replays."""

import json
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated, Any

from rich.rule import Rule
from rich.table import Column
from rich.text import Text
from typer import Argument, Context, Option, Typer

from llmlab.cli import chat
from llmlab.cli.arguments import Seed, TrustRemoteCode
from llmlab.cli.options import resolve_options, setting_option
from llmlab.cli.rewards import parse_source
from llmlab.settings.environment import EnvironmentSettings
from llmlab.settings.errors import UserError, shorten
from llmlab.settings.generation import SamplingSettings
from llmlab.terminal import Terminal, numeric, percent, safe, say, say_json

app = Typer(no_args_is_help=True)

SIMULATOR, SCRIPTED = "simulator", ("expert", "random")
SHARES = ("success", "ended")  # figures in percent; the others are means
BATCH = 16  # turns that are sampled at the same time
ENDS = {"done": "the environment", "answer": "an answer"}
ENDS |= {"calls": "the limit of calls", "length": "the limit of tokens"}
LONGEST = 800  # characters of a text in a replay


@app.command("run")
def run_episodes(
    context: Context,
    run: Annotated[str, Argument(metavar="RUN", help="Run folder, adapter or hub id; or expert, or random.")],
    tasks: Annotated[str, Option(help="Source of prompts, such as demo/tasks.", metavar="SOURCE")],
    count: Annotated[int, Option("--count", "-n", help="Episodes to play.", min=1, metavar="INT")] = 20,
    environment: Annotated[str, Option(help="As in settings: simulator, gymnasium:ID, ...")] = SIMULATOR,
    allow_code: Annotated[bool, Option("--allow-code", help="Run files, and use other machines.")] = False,
    max_episode_length: setting_option(EnvironmentSettings, "max_episode_length") = 20,  # type: ignore[valid-type]
    temperature: chat.Temperature = 0.7,
    max_new_tokens: chat.MaxNewTokens = 256,
    seed: Seed = 42,
    show: Annotated[int, Option(help="Replays to print.", min=0, metavar="INT")] = 2,
    as_json: Annotated[bool, Option("--json", help="Print figures and all replays as JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Play a model: its success, reward and length, beside the expert's and a random policy's, and replays."""
    sampling = resolve_options(SamplingSettings, locals())
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
        play = partial(_play_scripted, name) if name in SCRIPTED else partial(_play_model, name, sampling)
        played[name] = play(fresh, max_episode_length, seed)
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
