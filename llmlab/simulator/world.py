"""The simulator: a world of files in memory with tools, tasks, guardrails and the RL guide's rewards. It never touches
disk, network or processes, and the same task and calls give the same observations and rewards. Scripted policies are
the two ends of the scale for a model's: the expert, who solves every task, and chance."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from posixpath import normpath
from random import Random
from typing import Any

from llmlab.settings.errors import is_unicode
from llmlab.settings.paths import expand
from llmlab.settings.rewards import RewardConfig
from llmlab.simulator.commands import MAX_TEXT, FileSystem, ToolError, lines_of, run, searcher, unquote
from llmlab.simulator.environment import Environment, tools_of
from llmlab.simulator.guardrails import SHIPPED, SHIPPED_FOR_TOOLS, SlowPattern, read_guardrails
from llmlab.simulator.tasks import Call, ToolTask, has_style, pick, read_task

MAX_OBSERVATION = 4_000  # characters
SCRIPTS, SHEBANG = (".sh", ".bash", ".zsh"), re.compile(r"#!.*sh\b")  # a shell script by its path, by its first line


def tool(method: Callable[..., str]) -> Callable[..., str]:
    """Makes a method, whose arguments are texts, a tool that accounts for each call and never raises an exception."""
    signature = inspect.signature(method)

    @wraps(method)
    def call(self: "Simulator", /, *args: Any, **kwargs: Any) -> str:
        try:
            arguments = dict([*signature.bind(self, *args, **kwargs).arguments.items()][1:])
        except TypeError as error:
            return self._act(method.__name__, kwargs, str(error))
        wrong = [
            f"{name}: expected text of at most {MAX_TEXT:,} characters"
            for name, value in arguments.items()
            if not isinstance(value, str) or len(value) > MAX_TEXT or not is_unicode(value)
        ]
        return self._act(method.__name__, arguments, "; ".join(wrong), lambda: method(self, **arguments))

    del call.__annotations__["return"]  # a schema without it is shorter in every prompt
    return call


class Simulator(Environment):
    """A world of files with tools, in which a task is to be solved.

    An episode ends when its task is solved, when an answer is submitted, or when a call breaks a guardrail.

    Args:
        reward_config: the rewards of calls and of the end.
        guardrails: a YAML file that is watched beside the shipped ones, of the form of `guardrails.yaml` here.

    Source: seed, RL guide, section 4, "Reward Function (Simulator)".
    """

    stop_tools = ("submit",)

    def __init__(self, reward_config: RewardConfig | None = None, guardrails: str | Path | None = None):
        self.reward_config = reward_config or RewardConfig()
        paths = [SHIPPED, SHIPPED_FOR_TOOLS, *([expand(str(guardrails))] if guardrails else [])]
        self._guardrails = [read_guardrails(path) for path in paths]
        self._start(None)

    def reset(self, task: str | Mapping[str, Any], difficulty: int | None = None, **row: Any) -> str:
        """Begins a task and returns its goal.

        Args:
            task: an id such as `search_and_edit/2/train/1234`, or a mapping or JSON text like `ToolTask`.
            difficulty: replaces that of the id.
            row: other columns of the data, which have no effect.
        """
        return self._start(read_task(task, difficulty))

    def _start(self, task: ToolTask | None) -> str:
        self.task, self.done, self.success, self.calls = task, task is None, False, 0
        self._files, self._answer = FileSystem(task.files if task else {}), None
        self._open = [_key(*call) for call in (task.expected if task else ())]
        self._rewards = dict.fromkeys(RewardConfig.model_fields, 0.0)
        self._trace: list[dict[str, Any]] = []
        return task.goal if task else ""

    def get_reward(self) -> float:
        """Returns the sum of the rewards of all calls, and of the end: an episode that is not solved has failed."""
        return float(sum(self.rewards.values()))

    @property
    def rewards(self) -> dict[str, float]:  # type: ignore[override]
        """The components of the reward so far, by name."""
        failed = self.reward_config.task_failed if self.task and not self.success else 0.0
        return {**self._rewards, "task_failed": failed}

    @property
    def reward_range(self) -> tuple[float, float]:  # type: ignore[override]
        """The reward of an episode that a guardrail ends, and that of the expert, or of one correct call if higher."""
        expert = Simulator(self.reward_config)
        expert._guardrails = self._guardrails
        assert self.task is not None, "reset comes first"
        expert._start(self.task)
        play_scripted(expert, self.task.expected)
        config = self.reward_config
        one_call = config.task_complete + config.correct_tool + config.schema_pass + config.step_penalty
        return config.task_failed + config.guardrail_violation, max(expert.get_reward(), one_call)

    @tool
    def read_file(self, path: str) -> str:
        """Reads a file.

        Args:
            path: The file.
        """
        return self._files.read(path)

    @tool
    def write_file(self, path: str, content: str) -> str:
        """Writes a file.

        Args:
            path: The file.
            content: Its text.
        """
        return self._write(path, content, "ok")

    @tool
    def search_replace(self, path: str, search: str, replace: str) -> str:
        """Replaces a text wherever it is in a file.

        Args:
            path: The file.
            search: The old text.
            replace: The new text.
        """
        text = self._files.read(path)
        if not search or not (count := text.count(search)):
            raise ToolError(f"{path}: {search!r:.60} is not in it")
        if len(text) + count * (len(replace) - len(search)) > MAX_TEXT:
            raise ToolError(f"{path}: no space left")
        return self._write(path, text.replace(search, replace), f"ok: {count} replaced")

    @tool
    def list_dir(self, path: str) -> str:
        """Lists a folder.

        Args:
            path: The folder.
        """
        return "\n".join(self._files.entries(path))

    @tool
    def glob(self, pattern: str) -> str:
        """Finds files by name.

        Args:
            pattern: Such as src/*.py.
        """
        return "\n".join(self._files.glob(pattern)) or "no file"

    @tool
    def grep(self, pattern: str, path: str) -> str:
        """Finds lines in files.

        Args:
            pattern: A regular expression.
            path: A file or folder.
        """
        search = searcher(pattern)
        texts = {name: lines_of(self._files.texts[name]) for name in self._files.under(path)}
        found = [f"{name}: {line}" for name, lines in texts.items() for line in lines if search(line)]
        return "\n".join(found) or "none"

    @tool
    def run_command(self, command: str) -> str:
        """Runs ls, cat, head, tail, wc, sort, uniq, grep, find, echo, pwd and pipes of them.

        Args:
            command: The command.
        """
        return run(command, self._files) or "no output"

    @tool
    def submit(self, answer: str) -> str:
        """Gives the answer and ends.

        Args:
            answer: The answer.
        """
        self._answer = answer
        return "ok"

    def _write(self, path: str, text: str, observation: str) -> str:
        self._files.write(path, text)
        if path.endswith(".py") and has_style(text):
            self._add("style_pass")
        return observation

    def _add(self, component: str) -> None:
        self._rewards[component] += getattr(self.reward_config, component)

    def _act(self, name: str | None, arguments: Any, problem: str, act: Callable[[], str] = str) -> str:
        """Accounts for a call, makes it unless it has a problem, and returns the observation."""
        if self.done or self.task is None:
            return "error: the episode is over"
        named = arguments if isinstance(arguments, dict) else {"arguments": arguments}
        texts = {_text(key)[:100]: _text(value) for key, value in named.items()}
        before, call = self.get_reward(), {"tool": name, "arguments": texts}
        self.calls += 1
        self._add("step_penalty")
        try:
            broken = self._broken_by(texts)
        except SlowPattern as error:
            broken, problem = [], str(error)
        if broken:
            self._add("guardrail_violation")
            self.done, observation = True, f"error: guardrails: {', '.join(broken)}"
        else:
            self._add("schema_fail" if problem else "schema_pass")
            key = None if problem else _key(str(name), arguments)
            self._add("correct_tool" if key in self._open else "wrong_tool")
            if key in self._open:
                self._open.remove(key)
            if self._trace and call.items() <= self._trace[-1].items():
                self._add("redundant_action")
            try:
                observation = f"error: {problem}" if problem else act()
            except ToolError as error:
                observation = f"error: {error}"
            self.success = self.task.success.holds(self._files.texts, self._answer)
            self.done = self.success or self._answer is not None
            if self.success:
                self._add("task_complete")
        observation = observation.encode(errors="replace").decode()  # a wrong name may be half a character
        if (more := len(observation) - MAX_OBSERVATION) > 0:
            observation = f"{observation[:MAX_OBSERVATION]}\n... {more:,} characters more"
        self._trace.append({**call, "observation": observation, "reward": self.get_reward() - before})
        return observation

    _reject = _act  # a call that cannot be made counts too

    def _broken_by(self, arguments: dict[str, str]) -> list[str]:
        """Returns the names of the guardrails that arguments break, on lines that begin with their names."""
        lines = [f"{name}={value}" for name, value in arguments.items()]
        for name, value in arguments.items():
            if name == "command":
                lines += unquote(value, self._files)
            elif arguments.get("path", "").endswith(SCRIPTS) or SHEBANG.match(value):
                lines += [each for line in value.split("\n") for each in unquote(line, FileSystem({}))]
        return [name for rules in self._guardrails for name in rules.broken_by("\n".join(dict.fromkeys(lines)))]


def _key(name: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what makes a call the expected one: its tool, and the path or the first word of a command."""
    command = str(arguments.get("command", "")).split()
    return name, normpath(f"./{arguments['path']}") if "path" in arguments else "".join(command[:1])


def _text(value: Any) -> str:
    """Returns what a model wrote as a text, megabytes cut off."""
    try:
        return str(value)[:MAX_TEXT]
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        return "..."


def random_calls(environment: Simulator, random: Random, count: int = 20) -> list[Call]:
    """Returns calls of random tools, one of which does not exist, with random arguments, some of which are wrong."""
    tools = {name: [*inspect.signature(tool).parameters] for name, tool in tools_of(environment).items()}
    words = [*environment.task.files, *environment.task.goal.split(), "ls", "*", ".", None, 7, {"path": 1}, "x" * 50]
    names = [pick(random, [*tools, "open"]) for _ in range(count)]
    return [Call(name, {key: pick(random, words) for key in tools.get(name, ["path"])}) for name in names]


def play_scripted(environment: Environment, calls: Sequence[Call]) -> list[str]:
    """Makes calls until the episode is done, and returns their observations."""
    tools, observations = tools_of(environment), []
    for name, arguments in calls:
        if environment.done:
            break
        call = tools.get(name)
        found = call(**arguments) if call else environment._reject(name, arguments, f"there is no tool {name}")
        observations.append(found)
    return observations
