"""Episodes: which tokens are trained, what ends an episode, tools side by side, calls that cannot be made."""

import asyncio
import json
import random
import threading

import pytest

from llmlab.data.chat.rendering import add_chat_template
from llmlab.data.tokenizer import load_tokenizer
from llmlab.episodes import Task, play, run_side_by_side, suffix_ids
from llmlab.settings.errors import UserError
from llmlab.simulator.environment import Environment, schemas_of

PROMPT = [{"role": "user", "content": "The cat? "}]


class Counter(Environment):
    """Counts presses; three of them end an episode."""

    stop_tools = ("give_up",)
    time_limits = {"wait": 0.05}

    def reset(self, **row):
        self.row, self.presses, self.done = row, [], False
        return row.get("hint")

    def press(self, times: int) -> str:
        """Presses the button.

        Args:
            times: how often.
        """
        self.presses.append(times)
        self.done = sum(self.presses) >= 3
        return f"pressed {sum(self.presses)} times"

    async def press_later(self, times: int) -> dict:
        """Presses the button after a while.

        Args:
            times: how often.
        """
        await asyncio.sleep(0)
        return {"text": self.press(times)}

    def give_up(self) -> str:
        """Ends the episode."""
        return "bye"

    def wait(self) -> str:
        """Waits for longer than it may."""
        threading.Event().wait(20)
        return "never"

    def fail(self) -> str:
        """Fails."""
        raise ValueError("the button is gone")

    def get_reward(self) -> float:
        return float(sum(self.presses))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    made = load_tokenizer(tokenizer_folder)
    add_chat_template(made, "chatml")
    return made


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def script(tokenizer, *turns, ends=True):
    """Returns a sampler that writes these turns, and the rows of tokens that it was asked to continue."""
    rest, seen = iter(turns), []

    def sample(rows):
        seen.append(rows)
        ids = tokenizer(next(rest), add_special_tokens=False)["input_ids"]
        return [ids + [tokenizer.convert_tokens_to_ids("<|im_end|>")] * ends for _ in rows]

    return sample, seen


def play_script(tokenizer, *turns, columns=None, **options):
    sample, seen = script(tokenizer, *turns)
    limits = {"max_new_tokens": 64, "max_length": None, **options}
    (episode,) = play([Task(Counter(), PROMPT, columns or {})], sample, tokenizer, **limits)
    return episode, seen


def test_an_episode_is_the_conversation_that_the_template_renders(tokenizer):
    turns = call("press", times=1), "ok " + call("press_later", times=1), "done"
    episode, seen = play_script(tokenizer, *turns, columns={"hint": "Press."})
    assert episode.prompt[-1]["content"] == "The cat? Press." and PROMPT[-1]["content"] == "The cat? "
    assert episode.end == "answer" and episode.calls == 2 and episode.environment.presses == [1, 1]
    roles = [message["role"] for message in episode.completion]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert episode.completion[2]["content"] == "ok"
    assert json.loads(episode.completion[3]["content"]) == {"text": "pressed 2 times"}
    messages = [*episode.prompt, {"role": "assistant", "content": turns[0]}, episode.completion[1]]
    messages += [{"role": "assistant", "content": turns[1]}, episode.completion[3]]
    messages += [{"role": "assistant", "content": "done"}]
    tools = schemas_of(type(episode.environment))
    assert {tool["function"]["name"] for tool in tools} == {"press", "press_later", "give_up", "wait", "fail"}
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert tokenizer.decode(episode.tokens) == text.removesuffix("\n")  # which follows the last end of a turn
    assert [len(rows[0]) for rows in seen] == sorted(len(rows[0]) for rows in seen)


@pytest.mark.parametrize(
    ("turns", "end", "calls"),
    [
        ([call("press", times=5)], "done", 1),
        ([call("press", times=3) + call("press", times=1)], "done", 1),  # the second call is not run
        ([call("give_up")], "done", 1),
        ([call("fail")] * 4, "calls", 4),
        ([call("fail") * 9], "calls", 4),
        (["no call at all"], "answer", 0),
    ],
)
def test_what_ends_an_episode(turns, end, calls, tokenizer):
    episode, seen = play_script(tokenizer, *turns, max_episode_length=4)
    assert (episode.end, episode.calls, len(seen)) == (end, calls, len(turns))
    assert episode.mask[-1] == 1 and sum(message["role"] == "tool" for message in episode.completion) == calls


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>\n{broken\n</tool_call>", "this is no call"),
        (call("pres", times=1), "there is no tool 'pres'"),
        (call("press"), "missing a required argument: 'times'"),
        (call("press", times=1, hard=True), "unexpected keyword argument 'hard'"),
        ('<tool_call>\n{"name": "press", "arguments": 3}\n</tool_call>', "this is no call"),
        (call("fail"), "ValueError: the button is gone"),
        (call("wait"), "wait took over 0.05 s"),
        (call("press", times="x"), "TypeError"),
    ],
)
def test_bad_calls_are_observations(text, problem, tokenizer):
    episode, _ = play_script(tokenizer, text, "well")
    assert problem in episode.completion[1]["content"] and episode.end == "answer" and episode.calls == 1
    assert episode.abandoned is ("wait" in text)


def test_an_environment_sees_calls_that_cannot_be_made(tokenizer):
    class Strict(Counter):
        def _reject(self, name, arguments, problem):
            self.rejected = name, arguments
            self.done = True
            return "no"

    sample, _ = script(tokenizer, call("pres", times=1))
    (episode,) = play([Task(Strict(), PROMPT, {})], sample, tokenizer, max_new_tokens=8, max_length=None)
    assert episode.environment.rejected == ("pres", {"times": 1}) and episode.end == "done"


def test_tools_of_all_episodes_run_at_the_same_time(tokenizer):
    barrier, later = threading.Barrier(64), asyncio.Barrier(64)

    class Meeting(Environment):
        def reset(self, **row):
            barrier.wait(20)

        def meet(self) -> str:
            """Waits for all others."""
            barrier.wait(20)
            return "met"

        async def meet_later(self) -> str:
            """Waits for all others, too."""
            await asyncio.wait_for(later.wait(), 20)
            return "met"

    sample, _ = script(tokenizer, call("meet"), call("meet_later"), "well")
    tasks = [Task(Meeting(), PROMPT, {}) for _ in range(64)]
    episodes = play(tasks, sample, tokenizer, max_new_tokens=8, max_length=None)
    assert {episode.completion[k]["content"] for episode in episodes for k in (1, 3)} == {"met"}


def test_exits_and_interrupts_of_a_tool_end_nothing():
    def leave():
        raise SystemExit(3)

    assert "SystemExit" in str(run_side_by_side([leave], [1.0])[0])


def test_a_turn_that_might_not_fit_is_not_sampled(tokenizer):
    whole, _ = play_script(tokenizer, call("press", times=1), "well")
    first = whole.mask.index(0)
    limit = len(whole.prompt_ids) + 64
    episode, seen = play_script(tokenizer, call("press", times=1), "well", max_length=limit)
    assert episode.end == "length" and len(seen) == 1 and episode.completion_ids == whole.completion_ids[:first]
    episode, seen = play_script(tokenizer, max_length=limit - 1)
    assert episode.end == "length" and not seen and not episode.mask


def test_a_turn_that_was_cut_off_calls_nothing(tokenizer):
    sample, _ = script(tokenizer, call("press", times=1), ends=False)
    (episode,) = play([Task(Counter(), PROMPT, {})], sample, tokenizer, max_new_tokens=64, max_length=None)
    assert episode.end == "length" and episode.calls == 0 and all(episode.mask)


def test_exactly_the_sampled_tokens_are_trained(tokenizer):
    """10,000 episodes of random turns: text, calls, broken calls, special tokens, cut or ended."""
    draw = random.Random(0)
    turns = [call("press", times=1), call("fail") * 2, "x <tool_call> y", "", "done", call("give_up"), call("no")]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in turns]
    sampled, count = {}, 0

    def sample(rows):
        made = []
        for row in rows:
            noise = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(4))]
            ids = (noise + draw.choice(encoded) + [tokenizer.eos_token_id] * (draw.random() < 0.9))[:40]
            sampled.setdefault(id_of(row), []).append((len(row), ids))
            made.append(ids)
        return made

    def id_of(row):
        return tuple(row[:prompt])

    for _ in range(50):
        numbers = range(count, count + 200)
        prompts = [[{"role": "user", "content": f"{number:06}"}] for number in numbers]
        prompt = len(
            play([Task(Counter(), prompts[0], {})], lambda rows: [[0]], tokenizer, max_new_tokens=1, max_length=None)[
                0
            ].prompt_ids
        )
        tasks = [Task(Counter(), each, {}) for each in prompts]
        sampled.clear()
        for episode in play(
            tasks, sample, tokenizer, max_new_tokens=40, max_length=prompt + 300, max_episode_length=6
        ):
            assert len(episode.mask) == len(episode.completion_ids) and len(episode.tokens) <= prompt + 300
            expected = [0] * len(episode.mask)
            for begin, ids in sampled[id_of(episode.prompt_ids)]:
                assert episode.tokens[begin : begin + len(ids)] == ids
                expected[begin - prompt : begin - prompt + len(ids)] = [1] * len(ids)
            assert episode.mask == expected
        count += 200
    assert count == 10_000


def test_a_template_without_results_is_refused(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    sample, _ = script(tokenizer, "x")
    with pytest.raises(UserError, match="does not show the results of tools; set chat_template=chatml"):
        play([Task(Counter(), PROMPT, {})], sample, tokenizer, max_new_tokens=8, max_length=None)


def test_a_reset_that_fails_names_the_environment(tokenizer):
    class Broken(Counter):
        def reset(self, **row):
            raise ConnectionError("nobody there")

    with pytest.raises(UserError, match="environment Broken: reset failed: ConnectionError: nobody there"):
        play([Task(Broken(), PROMPT, {})], lambda rows: [], tokenizer, max_new_tokens=8, max_length=None)


def test_results_follow_the_token_that_ended_the_turn(tokenizer):
    results = [{"role": "tool", "name": "press", "content": 'a <b> "c"'}]
    text = '\n<|im_start|>tool\n<tool_response>\na <b> "c"\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    for end in ("<|im_end|>", tokenizer.eos_token):  # models end turns with either
        assert tokenizer.decode(suffix_ids(tokenizer, results, tokenizer.convert_tokens_to_ids(end))) == text


def test_the_models_own_end_tokens_end_a_turn(tokenizer):
    stop = tokenizer("duck", add_special_tokens=False)["input_ids"][0]
    ids = [*tokenizer(call("press", times=3), add_special_tokens=False)["input_ids"], stop]
    options = {"max_new_tokens": 64, "max_length": None}
    for ends, calls in (((), 0), ((stop,), 1)):
        (episode,) = play([Task(Counter(), PROMPT, {})], lambda rows: [ids], tokenizer, ends=ends, **options)
        assert episode.calls == calls and episode.completion_ids == ids


def test_half_characters_reach_the_environment_and_no_message(tokenizer):
    class Strict(Counter):
        def press(self, times: str) -> str:
            """Presses.

            Args:
                times: how often.
            """
            self.seen = times
            return times

    sample, _ = script(tokenizer, call("press", times="\ud800"), "well")
    (episode,) = play([Task(Strict(), PROMPT, {})], sample, tokenizer, max_new_tokens=8, max_length=None)
    assert episode.environment.seen == "\ud800"
    json.dumps(episode.completion, ensure_ascii=False).encode()  # no UnicodeEncodeError


def test_async_tools_share_one_loop(tokenizer):
    async def which():
        return asyncio.get_running_loop()

    assert len({id(loop) for loop in run_side_by_side([which] * 64, [20.0] * 64)}) == 1


def test_seeds_reach_environments_before_reset(tokenizer):
    class Random(Counter):
        def reset(self, prompt, **row):
            self.drawn = random.Random(self.seed).random()

    sample, _ = script(tokenizer, "well")
    tasks = [Task(Random(), PROMPT, {}, seed) for seed in (1, 1, 2)]
    drawn = [each.environment.drawn for each in play(tasks, sample, tokenizer, max_new_tokens=8, max_length=None)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("value", "message"), [({"a": 1}, "reset returned dict; expected text"), (None, "")])
def test_what_reset_returns(value, message, tokenizer):
    class Odd(Counter):
        def reset(self, **row):
            return value

    sample, _ = script(tokenizer, "well")
    task = Task(Odd(), PROMPT if message else [], {})
    with pytest.raises(UserError, match=message or "has no message to add its text to"):
        play([task], sample, tokenizer, max_new_tokens=8, max_length=None)
