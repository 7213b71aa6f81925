"""Plays episodes: a model writes, the tools that it calls run, their results are appended, until the episode ends.
Tokens that the model sampled are kept as they were sampled and never encoded again. What samples is the caller's: GRPO
and PPO give their trainer's sampling, RS-SFT, AWR, gates and `llmlab episodes` that of `inference.py`."""

import asyncio
import inspect
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from threading import Thread
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.messages import Message, UnusableRow, result_text
from llmlab.data.chat.rendering import encode_prompt
from llmlab.data.tokenizer import stop_token_ids
from llmlab.rewards.completions import ToolCall, read_turn
from llmlab.settings.errors import UserError, reading, reason_of
from llmlab.simulator.environment import schemas_of, tools_of

Sampler = Callable[[list[list[int]]], list[list[int]]]
"""Returns the tokens that follow each prompt, up to and with the token that ends the turn."""

NO_TURN = {"role": "assistant", "content": ""}
"""Stands for the completion of an episode whose prompt left no room for a turn."""


class Task(NamedTuple):
    """What an episode begins with: an environment, the prompt's messages, and the columns that `reset` gets beside.
    `seed` is that of environments that draw random numbers: equal for episodes that are compared with each other."""

    environment: Any
    prompt: list[Message]
    columns: dict[str, Any]
    seed: int = 0


@dataclass
class Episode:
    """An episode as it was played: all tokens after the prompt, a mask that is 1 for those that the model sampled and
    0 for results of tools, both (time,), and the same as messages of the assistant and of tools."""

    environment: Any
    prompt: list[Message]  # with the text of `reset`
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)
    calls: int = 0
    end: Literal["done", "answer", "calls", "length"] = "answer"
    """The environment's or a stop tool's, a turn without a call, `max_episode_length`, or the room for tokens."""
    abandoned: bool = False
    """Whether a call ran into its time limit and may still change the environment, which is not to be used again."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt_ids + self.completion_ids


def play(
    tasks: Sequence[Task],
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_episode_length: int = 20,
    max_new_tokens: int,
    max_length: int | None,
    tool_timeout: float = 30.0,
    ends: Collection[int] = (),
) -> list[Episode]:
    """Plays one episode of each task side by side, turn by turn, each in an environment of its own, until a turn of
    `max_new_tokens` might not fit into `max_length` or a limit is reached; `ends` are further tokens that end a
    turn."""
    check_template(tokenizer)
    for task in tasks:
        if hasattr(task.environment, "seed"):
            task.environment.seed = task.seed
    resets = [partial(task.environment.reset, **{**task.columns, "prompt": task.prompt}) for task in tasks]
    texts = run_side_by_side(resets, [tool_timeout] * len(tasks))
    stops = {*stop_token_ids(tokenizer), tokenizer.eos_token_id, *ends}
    episodes = []
    for task, text in zip(tasks, texts, strict=True):
        where = f"environment {type(task.environment).__name__}: reset"
        if isinstance(text, Abandoned):
            raise UserError(f"{where} took over tool_timeout = {tool_timeout:g} s")
        if isinstance(text, Exception):
            raise UserError(f"{where} failed: {type(text).__name__}: {reason_of(text)}") from text
        if not isinstance(text, str | None) or not task.prompt:
            found = f"returned {type(text).__name__}" if task.prompt else "has no message to add its text to"
            raise UserError(f"{where} {found}; expected text or None, for the end of a prompt's last message")
        *before, last = task.prompt
        prompt = [*before, {**last, "content": last["content"] + (text or "")}]
        try:
            ids, prompt = encode_prompt(tokenizer, prompt, schemas_of(type(task.environment)))
        except UnusableRow as reason:
            raise UserError(f"environment {type(task.environment).__name__}: {reason}") from None
        episodes.append(Episode(task.environment, prompt, ids))
    playing = episodes
    while playing := [episode for episode in playing if _has_room(episode, max_new_tokens, max_length)]:
        turns = zip(playing, sample([episode.tokens for episode in playing]), strict=True)
        calls = [(episode, _add_turn(episode, ids, tokenizer, stops)) for episode, ids in turns]
        _run_calls(calls, max_episode_length, tool_timeout)
        calls = [(episode, own) for episode, own in calls if own and episode.end == "answer"]  # no other end yet
        for episode, own in calls:
            suffix = suffix_ids(tokenizer, episode.completion[-len(own) :], episode.completion_ids[-1])
            episode.completion_ids += suffix
            episode.mask += [0] * len(suffix)
        playing = [episode for episode, _ in calls]
    for episode in episodes:
        if episode.mask and not episode.mask[-1]:  # results after which no turn had room are no part of it
            sampled = len(episode.mask) - episode.mask[::-1].index(1)
            del episode.completion_ids[sampled:], episode.mask[sampled:]
    return episodes


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer whose chat template does not show the results of tools."""
    if tokenizer.chat_template is None:
        problem = "this model's tokenizer has no chat template"
        raise UserError(f"{problem}; episodes need one that shows the results of tools")
    ids = suffix_ids(tokenizer, [{"role": "tool", "name": "look", "content": "seen"}], tokenizer.eos_token_id)
    if "seen" not in tokenizer.decode(ids):
        raise UserError("the chat template does not show the results of tools; set chat_template=chatml")


def _has_room(episode: Episode, max_new_tokens: int, max_length: int | None) -> bool:
    """Whether a whole turn fits; what is sampled is never cut."""
    if max_length is None or len(episode.tokens) + max_new_tokens <= max_length:
        return True
    episode.end = "length"
    return False


def _add_turn(
    episode: Episode, ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int | None]
) -> list[ToolCall]:
    """Adds sampled tokens, and returns the calls in them; a turn that was cut off ends the episode."""
    episode.completion_ids += ids
    episode.mask += [1] * len(ids)
    ended = bool(ids) and ids[-1] in stops
    message = read_turn(tokenizer.decode(ids[:-1] if ended else ids))
    episode.completion.append(_valid_text(message))
    if not ended:
        episode.end = "length"
        return []
    return [ToolCall(**call["function"]) for call in message.get("tool_calls", ())]


def _run_calls(calls: list[tuple[Episode, list[ToolCall]]], max_episode_length: int, tool_timeout: float) -> None:
    """Runs the calls of a turn, those of one episode in order, and adds the messages with their results."""
    for number in range(max(len(own) for _, own in calls)):
        now = [(each, own[number]) for each, own in calls if number < len(own) and each.end == "answer"]
        jobs = [_prepare_call(episode.environment, call) for episode, call in now]
        limits = [getattr(each.environment, "time_limits", {}).get(call.name, tool_timeout) for each, call in now]
        for (episode, call), limit, value in zip(now, limits, run_side_by_side(jobs, limits), strict=True):
            environment = episode.environment
            if isinstance(value, Abandoned):
                episode.abandoned = True
                value = {"error": f"{call.name} took over {limit:g} s and was abandoned"}
            elif isinstance(value, Exception):
                value = {"error": f"{type(value).__name__}: {reason_of(value)}"}
            message = _valid_text({"role": "tool", "name": call.name or "unknown", "content": _as_text(value)})
            episode.completion.append(message)
            episode.calls += 1
            if getattr(environment, "done", False) or call.name in getattr(environment, "stop_tools", ()):
                episode.end = "done"
            elif episode.calls >= max_episode_length:
                episode.end = "calls"


def _prepare_call(environment: Any, call: ToolCall) -> Callable[[], Any]:
    """Returns the call of a tool, or that of the environment's answer to a call that cannot be made."""
    tools = tools_of(environment)
    if call.name is None:
        problem = 'this is no call; expected {"name": ..., "arguments": {...}}'
    elif call.name not in tools:
        problem = f"there is no tool {call.name!r:.80}; there are {', '.join(tools)}"
    elif not isinstance(call.arguments, dict):
        problem = f"{call.name}: expected arguments as an object"
    else:
        try:
            inspect.signature(tools[call.name]).bind(**call.arguments)
            return partial(tools[call.name], **call.arguments)
        except TypeError as error:
            problem = f"{call.name}: {reason_of(error)}"
    reject = getattr(environment, "_reject", lambda name, arguments, problem: {"error": problem})
    return partial(reject, call.name, call.arguments, problem)


def _as_text(value: Any) -> str:
    try:
        return result_text(value)
    except (UnusableRow, TypeError, ValueError, RecursionError):  # not JSON
        return str(value)


def _valid_text(value: Any) -> Any:
    """Returns a message without the halves of characters that JSON can spell and no file can hold."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_valid_text(name): _valid_text(part) for name, part in value.items()}
    return [_valid_text(part) for part in value] if isinstance(value, list) else value


class Abandoned(Exception):
    """A call that took longer than its time limit."""


def run_side_by_side(calls: Sequence[Callable[[], Any]], limits: Sequence[float]) -> list[Any]:
    """Returns what each call returns, or the exception it raises; `Abandoned` after its limit in seconds. Python
    cannot stop a thread: an abandoned call goes on in the background, and is not waited for at exit."""
    _event_loop()  # in this thread: made by several at once, it would be several
    outcomes: dict[int, Any] = {}

    def run(number: int) -> None:
        try:
            value = calls[number]()
            if inspect.isawaitable(value):
                value = asyncio.run_coroutine_threadsafe(asyncio.wait_for(value, None), _event_loop()).result()
        except Exception as error:
            value = error
        except BaseException as error:  # `sys.exit()` in a tool ends no run
            value = RuntimeError(f"{type(error).__name__}: {error}")
        outcomes[number] = value

    threads = [Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    start, results = time.monotonic(), []
    for number, (thread, limit) in enumerate(zip(threads, limits, strict=True)):
        thread.join(max(start + limit - time.monotonic(), 0))
        results.append(outcomes.get(number, Abandoned()))
    return results


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Returns the loop on which all async tools run, since their clients belong to one loop."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop


def suffix_ids(tokenizer: PreTrainedTokenizerBase, results: list[Message], last: int) -> list[int]:
    """Returns the tokens of tool results and of the beginning of the next turn, which follow the token `last`. The
    template renders them after a stand-in for the conversation, whose own text is left away."""
    calls = [{"type": "function", "function": {"name": result["name"], "arguments": {}}} for result in results]
    start = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    with reading("the chat template (set chat_template=chatml)", "one with tool results"):
        before = tokenizer.apply_chat_template(start, tokenize=False)
        text = tokenizer.apply_chat_template(start + results, tokenize=False, add_generation_prompt=True)
    if not text.startswith(before):
        raise UserError("the chat template changes earlier turns when results follow them; set chat_template=chatml")
    ends = (tokenizer.decode([token]) for token in (last, *stop_token_ids(tokenizer)))
    begin = next((before.rindex(end) + len(end) for end in ends if end in before), len(before))
    return tokenizer(text[begin:], add_special_tokens=False)["input_ids"]
