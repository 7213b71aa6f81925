"""`llmlab chat` and `llmlab generate`, piped, typed and interrupted, with models whose words are known beforehand."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from llmlab.cli import chat as command
from llmlab.cli.app import main
from llmlab.cli.chat import Session, Writer
from llmlab.settings.generation import SamplingSettings


@pytest.fixture
def save(tmp_path, tokenizer):
    """A function that saves a model as a run folder."""

    def save(model, stage: str = "sft"):
        model.save_pretrained(tmp_path / "run")
        tokenizer.save_pretrained(tmp_path / "run")
        (tmp_path / "run" / "llmlab.json").write_text(json.dumps({"stage": stage}))
        return tmp_path / "run"

    return save


@pytest.fixture
def cli(capsys, monkeypatch):
    """A function that runs a command with text piped into it: (exit code, output, errors)."""

    def run(*words, stdin: str = ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            main([*map(str, words), "--device", "cpu", "--dtype", "fp32"])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


def session(model, tokenizer, chats: bool = True, **sampling) -> Session:
    settings = SamplingSettings(**{"temperature": 0, "max_new_tokens": 20, **sampling})
    return Session(model, tokenizer, settings, chats)


# Chat -------------------------------------------------------------------------------------------------------------


def test_piped_messages_are_answered_one_a_line(cli, save, chain):
    run = save(chain({":": "H", "H": "i"}))
    code, output, _ = cli("chat", run, "--temperature", 0, stdin="hello\n\nagain\n")
    assert (code, output) == (0, "Hi\nHi\n")


def test_pretraining_runs_continue_text(cli, save, chain):
    run = save(chain({"c": "d", "d": "e"}), stage="pretrain")
    assert cli("chat", run, "--temperature", 0, stdin="abc\n")[1] == "abcde\n"
    code, _, errors = cli("chat", run, "--system", "Be brief")
    assert code == 2 and "takes no system prompt" in errors
    assert cli("chat", run, "--chat", "--temperature", 0, stdin="abc\n")[1] == "\n"  # after the template's "a:"


def test_commands_steer_the_conversation(tokenizer, chain, capsys):
    talk = session(chain({":": "H", "H": "i"}), tokenizer)
    talk.reply("one")
    talk.reply("two")
    assert [m["content"] for m in talk.turns] == ["one", "Hi", "two", "Hi"]
    assert talk.command("/reset") and talk.turns == []
    talk.reply("three")
    assert talk.command("/system Be brief.") and (talk.system, talk.turns) == ("Be brief.", [])
    talk.reply("four")
    assert talk._prompt("five")[0] == {"role": "system", "content": "Be brief."}
    assert talk.command("/system") and talk.system is None
    capsys.readouterr()
    assert talk.command("/rest")
    assert "no command /rest; did you mean '/reset'?" in capsys.readouterr().err
    assert talk.command("/help")
    listed = capsys.readouterr().err
    assert all(name in listed for name in command.COMMANDS)
    assert not talk.command("/usr/bin is a folder") and not talk.command("what is /reset?")
    talk.reply("//reset")
    assert talk.turns[0]["content"] == "/reset"


def test_old_turns_are_forgotten_with_a_notice(tokenizer, chain, capsys):
    talk = session(chain({":": "H", "H": "i"}, max_position_embeddings=40), tokenizer)
    for number in range(4):
        talk.reply(f"message {number}")
    # "u:message 0\n" + "a:Hi\n" are 17 tokens and the open "a:" two: one turn fits into half of the context
    assert "the 2 oldest messages were dropped" in capsys.readouterr().err
    assert [m["content"] for m in talk.turns] == ["message 3", "Hi"]


def test_an_interrupted_reply_stays_in_the_conversation(tokenizer, chain, monkeypatch):
    talk = session(chain({":": "H", "H": " ", " ": "H"}), tokenizer, max_new_tokens=10_000)
    written = []

    def write(self, text):
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(KeyboardInterrupt):
        talk.reply("go")
    assert talk.turns == [{"role": "user", "content": "go"}, {"role": "assistant", "content": "H H H "}]


def test_a_terminal_gets_whole_words_and_no_control_characters(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "16")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    writer = Writer()
    for piece in ("The quick ", "brown ", "fox\x1b[2J ", "\n", "jumps over ", "it"):
        writer.write(piece)
    lines = capsys.readouterr().out.split("\n")
    assert [line.rstrip() for line in lines] == ["The quick brown", "fox\\x1b[2J", "jumps over it"]


class Terminal:
    """A command on a pseudo-terminal: what it printed so far, and keys to type."""

    def __init__(self, *words):
        leader, follower = pty.openpty()
        words = [sys.executable, "-m", "llmlab", *map(str, words)]
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
            # where tests run in the background, Ctrl+C is ignored by all that they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(follower)
        self.leader, self.text = leader, ""

    def expect(self, words: str) -> None:
        """Waits until the words were printed, and forgets all up to them."""
        deadline = time.monotonic() + 240
        while words not in self.text:
            left = max(deadline - time.monotonic(), 0)
            assert select.select([self.leader], [], [], left)[0], f"waited for {words!r} after {self.text[-500:]!r}"
            self.text += os.read(self.leader, 4096).decode()
        self.text = self.text.partition(words)[2]

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.leader)


def test_control_c_stops_a_reply_and_leaves_at_the_prompt(save, chain):
    run = save(chain({":": "H", "H": " ", " ": "H"}, max_position_embeddings=10**6))
    words = ("--temperature", 0, "--max-new-tokens", 10**5, "--device", "cpu", "--dtype", "fp32")
    with closing(Terminal("chat", run, *words)) as terminal:
        terminal.expect("it answers messages. /help for help.")
        terminal.expect(">>> ")
        terminal.type("go\n")
        terminal.expect("H H H")
        terminal.process.send_signal(signal.SIGINT)
        terminal.expect("(stopped)")
        terminal.expect(">>> ")
        terminal.type("/reset\n")
        terminal.expect("a new conversation")
        terminal.expect(">>> ")
        time.sleep(1)  # the prompt is printed before input() waits
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(timeout=240) == 0
        assert "Traceback" not in terminal.text


# Generate ---------------------------------------------------------------------------------------------------------


def test_prompts_come_from_options_files_and_pipes(cli, save, chain, tmp_path):
    run = save(chain({":": "H", "H": "i", "c": "d"}))
    (tmp_path / "prompts.txt").write_text("abc\n\nxyz\n")
    rows = [{"prompt": "abc"}, {"messages": [{"role": "user", "content": "hello"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy = ("--temperature", 0, "--complete")
    assert cli("generate", run, "--prompt", "abc", *greedy)[:2] == (0, "abcd\n")
    assert cli("generate", run, "-p", "abc", "-f", tmp_path / "prompts.txt", *greedy)[1] == "abcd\nabcd\nxyz\n"
    assert cli("generate", run, *greedy, stdin="abc\nc\n")[1] == "abcd\ncd\n"
    assert cli("generate", run, "-f", tmp_path / "prompts.jsonl", *greedy)[1] == "abcd\nHi\n"
    assert cli("generate", run, "-p", "abc", "--temperature", 0)[1] == "Hi\n"


def test_output_holds_prompts_and_completions(cli, save, random_llama, tmp_path):
    run, output = save(random_llama()), tmp_path / "out" / "samples.jsonl"
    words = ("generate", run, "--complete", "-p", "abc", "-p", "x", "--num-samples", 2, "--max-new-tokens", 5)
    assert cli(*words, "--output", output)[:2] == (0, "")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["abc", "abc", "x", "x"]
    assert rows[0]["completion"] != rows[1]["completion"]
    first = output.read_text()
    cli(*words, "--output", output)
    assert output.read_text() == first
    cli(*words, "--output", output, "--seed", 1)
    assert output.read_text() != first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat", "RUN", "--temperature", -1, "--top-p", 2], "command line: temperature = -1: expected"),
        (["chat", "RUN", "--temperature", -1, "--top-p", 2], "command line: top_p = 2: expected"),
        (["chat", "RUM"], "there is no such folder; did you mean 'run'?"),
        (["generate", "RUN"], "there is no prompt: expected --prompt, --file"),
        (["generate", "RUN", "-f", "RUN/none.txt"], "none.txt: cannot be read as text: No such file"),
        (["generate", "RUN", "-f", "RUN/model.safetensors"], "it is not UTF-8 text"),
        (["generate", "RUN", "-f", "RUN/bad.jsonl"], "bad.jsonl:2: expected a mapping with `prompt` or `messages`"),
        (["generate", "RUN", "-f", "RUN/empty.txt"], "empty.txt: there is no prompt in it"),
        (["generate", "RUN", "-p", "a", "-o", "RUN/config.json/x"], "cannot be written"),
        (["generate", "RUN", "-p", "a", "--num-samples", 2, "--temperature", 0], "all samples are the same"),
    ],
)
def test_mistakes_end_with_one_sentence(cli, save, random_llama, words, message):
    run = save(random_llama())
    (run / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (run / "empty.txt").write_text("\n")
    words = [str(word).replace("RUN", str(run)).replace("RUM", str(run.with_name("rum"))) for word in words]
    code, output, errors = cli(*words, "--max-new-tokens", 3)
    assert code == 2 and output == ""
    assert message in errors and "Traceback" not in errors


def test_a_model_without_a_template_cannot_be_made_to_chat(cli, save, random_llama, monkeypatch):
    run = save(random_llama())
    (run / "chat_template.jinja").unlink()
    code, _, errors = cli("chat", run, "--chat")
    assert code == 2 and "has no chat template; leave --chat out" in errors
