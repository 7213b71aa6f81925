"""`llmlab chat` and `llmlab generate`: a model in the terminal, turn by turn or prompt by prompt. Loading and sampling
are in `inference`; here are only reading, printing and the conversation's bookkeeping."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from rich.cells import cell_len
from typer import Option

from llmlab.cli.arguments import Run, Seed, TrustRemoteCode
from llmlab.cli.options import with_settings
from llmlab.settings.errors import UserError, did_you_mean, is_unicode, printable, reading
from llmlab.settings.files import write_atomically
from llmlab.settings.generation import InferenceSettings, SamplingSettings
from llmlab.settings.vocabulary import LARGEST_SEED
from llmlab.stages import import_heavy
from llmlab.terminal import human, say, track

System = Annotated[str | None, Option(help="System prompt, for models that answer messages.")]
FILE_HELP = "Prompts: one a line, or .jsonl with `prompt` or `messages` in each line."
CHATS_HELP = "Answer messages or continue text; by default, what was only pretrained or has no template continues."
Chats = Annotated[bool | None, Option("--chat/--complete", help=CHATS_HELP)]


@with_settings(InferenceSettings)
def chat(
    run: Run,
    settings: InferenceSettings,
    seed: Annotated[int | None, Option(help="Sampling seed.", min=0, max=LARGEST_SEED, metavar="INT")] = None,
    system: System = None,
    chats: Chats = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model, reply by reply; /help lists the commands, Ctrl+C stops a reply and Ctrl+D leaves."""
    model, tokenizer, chats = _load(run, settings, chats, system)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    session = Session(model, tokenizer, settings, chats, system)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - gives input() line editing and a history

        size = human(sum(parameter.numel() for parameter in model.parameters()))
        kind = f"{size} parameters, {str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        notice(f"{run}: {kind}; it {'answers messages' if chats else 'continues text'}. /help for help.")
    while (line := _read_line(interactive)) is not None:
        if not line.strip():
            continue
        try:
            if line.strip() in ("/exit", "/quit"):
                break
            if not session.command(line.strip()):
                session.reply(line)
        except (UserError, KeyboardInterrupt) as stop:
            if not interactive:
                raise
            notice(str(stop) or "\n(stopped)")


@with_settings(InferenceSettings)
def generate(
    run: Run,
    settings: InferenceSettings,
    prompt: Annotated[list[str] | None, Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    file: Annotated[Path | None, Option("--file", "-f", help=FILE_HELP)] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Write prompts and completions (.jsonl).")] = None,
    num_samples: Annotated[int, Option(help="Completions of each prompt.", min=1, metavar="INT")] = 1,
    batch_size: Annotated[int, Option(help="Batch size of generation.", min=1, metavar="INT")] = 16,
    seed: Seed = 42,
    system: System = None,
    chats: Chats = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Complete prompts from the command line, a file or standard input."""
    prompts = [*(prompt or ()), *(_read_prompts(file) if file else ())]
    if not prompts and sys.stdin is not None and not sys.stdin.isatty():
        with reading("standard input", "UTF-8 text"):
            prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("there is no prompt: expected --prompt, --file, or prompts on standard input")
    model, tokenizer, chats = _load(run, settings, chats, system)

    from llmlab.inference import generate_text

    head = [{"role": "system", "content": system}] if system else []
    messages = ([{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts)
    continued = [isinstance(text, str) and not chats for text in prompts]
    inputs = [text if alone else head + turns for text, alone, turns in zip(prompts, continued, messages, strict=True)]
    options = {"num_samples": num_samples, "seed": seed, "batch_size": batch_size}
    results = generate_text(model, tokenizer, inputs, settings, **options)
    rows = []
    for number, completions in enumerate(results if output is None else track(results, len(inputs), "Generating")):
        for sample, completion in enumerate(completions, start=1):
            rows.append({"prompt": prompts[number], "completion": completion})
            if output is None:
                if len(prompts) * num_samples > 1:
                    notice(f"prompt {number + 1}, sample {sample}")
                Writer().write((prompts[number] if continued[number] else "") + completion + "\n")
    if output is not None:
        write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        notice(f"{len(rows)} completions in {output}")


@dataclass
class Session:
    """A conversation with a model, or a series of texts that it continues."""

    model: Any
    tokenizer: Any
    settings: SamplingSettings
    chats: bool
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def command(self, line: str) -> bool:
        """Executes a line such as `/system Be brief`; returns whether it was a command."""
        matched = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", line, re.DOTALL)
        if matched is None:
            return False
        word, rest = matched.groups()
        if word == "help":
            notice(HELP)
        elif word == "reset":
            self.turns = []
            notice("Started a new conversation.")
        elif word == "system" and not self.chats:
            notice("This model continues text: it takes no system prompt.")
        elif word == "system":
            self.system, self.turns = rest, []
            notice(f"Started a new conversation, {'with this' if rest else 'without a'} system prompt.")
        else:
            notice(f"There is no command /{word}{did_you_mean(f'/{word}', COMMANDS)} (/help lists them)")
        return True

    def reply(self, text: str) -> None:
        """Streams the model's answer to a message, or its continuation of a text; what is cut off counts as said."""
        from llmlab.inference import stream_reply

        text = text.removeprefix("/") if text.startswith("//") else text
        writer = Writer()
        if not self.chats:
            writer.write(text)
        prompt = self._prompt(text) if self.chats else text
        pieces: list[str] = []
        try:
            with closing(stream_reply(self.model, self.tokenizer, prompt, self.settings)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    writer.write(piece)
            writer.write("\n")
        finally:
            if self.chats and pieces:
                self.turns = [message for message in prompt if message["role"] != "system"]
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
        if not pieces:
            notice("(no reply)")

    def _prompt(self, text: str) -> list[dict[str, str]]:
        """Returns the messages to answer: the latest of the conversation that fit, and the new one."""
        from llmlab.inference import drop_oldest_turns, prompt_room

        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*head, *self.turns, {"role": "user", "content": text}]
        if (room := prompt_room(self.model, self.settings.max_new_tokens)) is not None:
            messages, dropped = drop_oldest_turns(self.tokenizer, messages, room)
            if dropped:
                notice(f"(the context is full: the {dropped} oldest messages were dropped)")
        return messages


COMMANDS = ("/reset", "/system", "/help", "/exit")
HELP = """\
/reset           start a new conversation
/system [TEXT]   start a new conversation with this system prompt, or without one
/help            this list
/exit            leave; so do Ctrl+D and Ctrl+C at the prompt
Ctrl+C           during a reply: stop it
//...            send a line that starts with a slash"""


def notice(text: str) -> None:
    """Prints a dimmed line on standard error, where it does not mix with what the model writes."""
    say(text, error=True, dim=True)


class Writer:
    """Prints streamed text, wrapped between words on a terminal."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.column = 0

    def write(self, text: str) -> None:
        text = printable(text)
        if self.terminal:
            text = "".join(map(self._wrap, re.findall(r"\s*\S+|\s+", text)))
        sys.stdout.write(text)
        sys.stdout.flush()

    def _wrap(self, word: str) -> str:
        """Returns a word with the space before it, on a new line where it does not fit."""
        if "\n" in word:
            self.column = 0
        elif self.column and self.column + cell_len(word) > shutil.get_terminal_size().columns:
            word, self.column = "\n" + word.lstrip(), 0
        self.column += cell_len(word.rpartition("\n")[2])
        return word


def _read_line(interactive: bool) -> str | None:
    """Returns the next line of input, or None at its end or after Ctrl+C."""
    if sys.stdin is None:
        raise UserError("standard input is closed: expected messages there, one a line")
    try:
        return input(">>> " if interactive else "")
    except UnicodeDecodeError:
        raise UserError("standard input: this is not UTF-8 text") from None
    except (EOFError, KeyboardInterrupt) as end:
        if interactive:
            print()
        elif isinstance(end, KeyboardInterrupt):
            raise
    return None


def _load(run: str, settings: InferenceSettings, chats: bool | None, system: str | None) -> tuple[Any, Any, bool]:
    if sys.argv[1:2] in (["chat"], ["generate"]):  # this process does nothing else
        import_model_classes()
    import_heavy("llmlab.inference")
    from transformers.utils import logging

    from llmlab.inference import is_chat_model, load_for_inference

    logging.disable_progress_bar()  # it has no place in a conversation
    model, tokenizer = load_for_inference(run, dtype=settings.dtype, device=settings.device)
    chats = is_chat_model(run, tokenizer) if chats is None else chats
    if chats and tokenizer.chat_template is None:
        raise UserError(f"--chat: the tokenizer of {run} has no chat template; leave --chat out to continue text")
    if system and not chats:
        raise UserError(f"--system: {run} continues text and takes no system prompt; --chat makes it answer messages")
    return model, tokenizer, chats


def _read_prompts(path: Path) -> Iterator[str | list[dict[str, str]]]:
    with reading(f"--file {path}", "text"):
        lines = path.read_text(encoding="utf-8").splitlines()
    if not any(line.strip() for line in lines):
        raise UserError(f"--file {path}: there is no prompt in it")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        where = f"{path}:{number}"
        with reading(where, "JSON"):
            row = json.loads(line)
        if not isinstance(row, dict) or not {"prompt", "messages"} & set(row):
            raise UserError(f"{where}: expected a mapping with `prompt` or `messages`")
        prompt = row.get("prompt", row.get("messages"))
        is_chat = isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)
        if not isinstance(prompt, str) and not (is_chat and prompt):
            raise UserError(f"{where}: expected a prompt of text or of messages, found {json.dumps(prompt)[:60]}")
        if not is_unicode(str(prompt)):
            raise UserError(f"{where}: expected valid Unicode, found a lone surrogate")
        yield prompt


# A fast start -----------------------------------------------------------------------------------------------------

COMPILER = "torch._dynamo"
TRACED_MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"


def import_model_classes() -> None:
    """Imports Transformers' model classes 0.8 s faster, in a process that only samples and has not imported them.

    They import torch's sharded tensors (for sharded weights), its compiler (for compiled kernels) and SciPy (for
    losses of object detection). Sharded tensors and SciPy are left out, as on machines that lack them; the compiler is
    imported once something asks for more than its decorators.
    """
    if "transformers.modeling_utils" in sys.modules or COMPILER in sys.modules:
        return
    import_heavy("torch")
    from unittest.mock import patch  # torch has imported it

    utils = import_heavy("transformers.utils")
    masks = ModuleType(TRACED_MASKS)
    # traces masks of several conditions, by the compiler itself
    masks.TransformGetItemToIndex = lambda: (  # type: ignore[attr-defined]
        sys.modules[COMPILER]._trace_wrapped_higher_order_op.TransformGetItemToIndex()
    )
    sys.modules |= {COMPILER: _Compiler(COMPILER), TRACED_MASKS: masks}
    absent = dict.fromkeys(("is_torch_distributed_available", "is_scipy_available"), lambda: False)
    with patch.multiple(utils, **absent), patch.multiple(utils.import_utils, **absent):
        import_heavy("transformers.modeling_utils")
        import_heavy("transformers.generation.utils")


class _Compiler(ModuleType):
    """torch's compiler as long as only its decorators are used; what else is asked for imports it."""

    @staticmethod
    def disable(function: Any = None, *_: Any, **options: Any) -> Any:
        """Stands for the compiler's decorators, with and without arguments."""
        return (lambda each: each) if function is None else function

    allow_in_graph = assume_constant_result = disable

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # of its modules
            raise AttributeError(name)
        for module in (COMPILER, TRACED_MASKS):
            sys.modules.pop(module, None)
        return getattr(import_module(COMPILER), name)
