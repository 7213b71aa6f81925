"""Conversations rendered with chat templates: token ids, a loss mask, and checks of the mask. The template decides the
text; this module only finds the assistant's tokens in it. Templates without `generation` marks are rendered once for
each turn, if append-only. Two turns of the assistant in a row are joined by a blank line, and reasoning put as
`<think>...</think>` before the answer, where the template has no place for them."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import common_prefix_length
from llmlab.data.chat.messages import Message, UnusableRow, join_turns
from llmlab.data.tokenizer import BOS, END_OF_TURN, TEMPLATE, TEMPLATE_FAILURES, stop_token_ids
from llmlab.settings.errors import UserError, reason_of

LossOn = Literal["assistant", "completion", "all"]
COMPACT = "chatml_compact"
TOOL_LISTING = {  # of chatml: of its compact form
    ", given as JSON schemas:": ":",
    "(tool | tojson)": "(tool.function or tool).name + '('"
    " + (((tool.function or tool).parameters or {}).properties or {}) | join(', ') + ')'",
}
GENERATION_MARK = "generation -%}", "generation %}"


@dataclass(frozen=True)
class RenderedRow:
    """Token ids, and the loss mask: whether each is trained; both (time,)."""

    input_ids: list[int]
    trained: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids, -100 where they are not trained, (time,)."""
        return [token if on else -100 for token, on in zip(self.input_ids, self.trained, strict=True)]


class Renderer:
    """Renders conversations with a tokenizer's chat template; `stops` are further ids at which generation stops."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn = "assistant", stops: tuple[int, ...] = ()):
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.stops = tuple(dict.fromkeys([*stop_token_ids(tokenizer), *stops]))

    def render(self, conversation: dict[str, Any]) -> RenderedRow:
        """Returns a conversation (`messages` and `tools`, or plain `text`) as tokens with a loss mask."""
        if "text" in conversation:
            ids = self.tokenizer(conversation["text"])["input_ids"]
            ids = ids if ids and ids[-1] in self.stops else [*ids, self.tokenizer.eos_token_id]
            return RenderedRow(ids, [True] * len(ids))
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.tokenizer.name_or_path}: this tokenizer has no chat template")
        messages, tools = self._inline_reasoning(conversation["messages"]), conversation["tools"]
        try:
            row = self._render(messages, tools)
        except UnusableRow:
            if len(joined := join_turns(messages)) == len(messages):
                raise
            row = self._render(joined, tools)
        return RenderedRow(row.input_ids, _last_span(row.trained)) if self.loss_on == "completion" else row

    def _render(self, messages: list[Message], tools: list[Any] | None) -> RenderedRow:
        try:
            if self._marked_template is not None or self.loss_on == "all":
                return self._render_marked(messages, tools)
            return self._render_by_turns(messages, tools)
        except UnusableRow:
            raise
        except TemplateError as error:
            raise UnusableRow(f"the chat template refuses it: {error}") from None
        except TEMPLATE_FAILURES as error:
            raise UnusableRow(f"error in the chat template: {reason_of(error)}") from None

    def _inline_reasoning(self, messages: list[Message]) -> list[Message]:
        """Puts reasoning before the answer where the template would leave it out."""
        if "reasoning_content" in str(self.tokenizer.chat_template):
            return messages
        return [
            {key: value for key, value in message.items() if key != "reasoning_content"}
            | {"content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"}
            if "reasoning_content" in message
            else message
            for message in messages
        ]

    def render_pair(self, pair: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
        """Returns the ids of a pair's prompt and of its chosen and rejected completions."""
        prompt, tools = pair["prompt"], pair["tools"]
        whole = [self.render({"messages": prompt + pair[side], "tools": tools}) for side in ("chosen", "rejected")]
        ids, _ = encode_prompt(self.tokenizer, self._inline_reasoning(prompt), tools)
        shared = min(common_prefix_length(ids, row.input_ids) for row in whole)
        if shared < len(ids):  # a token merged across the boundary is fine, other text is not
            text = self.tokenizer.decode(ids)
            if not all(self.tokenizer.decode(row.input_ids).startswith(text.rstrip()) for row in whole):
                raise UnusableRow("the chat template renders the prompt differently once an answer follows")
        return ids[:shared], whole[0].input_ids[shared:], whole[1].input_ids[shared:]

    @cached_property
    def _marked_template(self) -> str | None:
        """The tokenizer's template where it marks what the assistant wrote, or TRL's marked form of it."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template["default"]
        if any(mark in template for mark in GENERATION_MARK):
            return template
        from trl.chat_template_utils import get_training_chat_template  # seconds, for those who need it

        try:
            return get_training_chat_template(self.tokenizer)
        except ValueError:  # a template that TRL does not know
            return None

    def _render_marked(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> RenderedRow:
        template = self._marked_template
        if tools or any("tool_calls" in message for message in messages):
            check_tools(self._text(messages, tools, chat_template=template), messages, tools)
        options = {"chat_template": template, "return_assistant_tokens_mask": template is not None}
        output = self.tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **options)
        ids = output["input_ids"]
        if self.loss_on == "all":
            return RenderedRow(ids, [True] * len(ids))
        return RenderedRow(ids, [bool(mark) for mark in output["assistant_masks"]])

    def _render_by_turns(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> RenderedRow:
        text = self._text(messages, tools)
        check_tools(text, messages, tools)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        trained = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], tools, add_generation_prompt=True)
            through = self._text(messages[: number + 1], tools)
            if not (text.startswith(through) and through.startswith(before)):
                raise UnusableRow("the chat template changes earlier turns when later ones are added")
            turn = [k for k, (begin, end) in enumerate(offsets) if len(before) <= begin < end <= len(through)]
            stop = next((k for k in turn if ids[k] in self.stops), turn[-1] if turn else -1)
            for k in turn:
                trained[k] = k <= stop  # what follows the end of the turn is the template's, not the assistant's
        return RenderedRow(ids, trained)

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    def find_problem(self, row: RenderedRow) -> str:
        """Returns what is wrong with a loss mask before truncation, or "": TRL issues 1623, 3091, 5988 and 1400."""
        ids, trained, tokenizer, stops = row.input_ids, row.trained, self.tokenizer, self.stops
        if not any(trained):
            return "nothing in it is trained: the chat template marks no token as the assistant's"
        last = max(k for k, on in enumerate(trained) if on)
        end = next((k for k in range(last, -1, -1) if trained[k] and ids[k] in stops), None)
        # with everything trained, the template's line break may follow the end of the last turn
        if end is None or tokenizer.decode(ids[end + 1 : last + 1]).strip():
            expected = " or ".join(tokenizer.convert_ids_to_tokens(list(stops))) or "an eos token"
            found = f"it ends with {tokenizer.decode(ids[last])!r}, expected {expected}"
            return f"the end of its last turn is not trained, so the model would never stop: {found}"
        bos = tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            return f"it begins with {tokenizer.bos_token} twice: the text or the template adds a second one"
        pad = tokenizer.pad_token_id
        if pad is not None and pad not in stops and (pad, True) in zip(ids, trained, strict=True):
            return f"the padding token {tokenizer.pad_token} is trained"
        return ""


def check_tools(text: str, messages: list[Message], tools: list[Any] | None) -> None:
    """Raises UnusableRow for a template that leaves tools or calls out, as most without tool support silently do."""
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, dict)]
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    if any(str(function.get("name", "")) not in text for function in functions + calls):
        raise UnusableRow("the chat template does not show its tools; set chat_template=chatml")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], tools: list[Any] | None = None
) -> tuple[list[int], list[Message]]:
    """Returns a prompt's ids, up to where the answer begins, and the messages in the form that the template takes."""
    try:
        output = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, return_dict=True)
    except (TemplateError, *TEMPLATE_FAILURES) as error:
        if len(joined := join_turns(prompt)) < len(prompt):
            return encode_prompt(tokenizer, joined, tools)
        raise UnusableRow(f"the chat template refuses the prompt alone: {reason_of(error)}") from None
    return output["input_ids"], prompt


def add_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str]:
    """Sets a template of ours (where None: unless there is one) or a Jinja file, and returns the tokens added for it.
    `chatml_compact` shows tools as `name(argument, ...)`: a tenth of the tokens of JSON schemas."""
    if template is None and tokenizer.chat_template is not None:
        return []
    if template not in (None, "chatml", COMPACT):
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "this is not UTF-8 text"
            expected = f"expected chatml, {COMPACT} or a Jinja file"
            raise UserError(f"chat_template = {template}: {reason}; {expected}") from None
        return []
    missing = [token for token in (BOS, END_OF_TURN) if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    text = TEMPLATE.read_text(encoding="utf-8")
    for full, short in TOOL_LISTING.items() if template == COMPACT else ():
        text = text.replace(full, short)
    tokenizer.chat_template = text
    return missing


def _last_span(trained: list[bool]) -> list[bool]:
    """Keeps only the last contiguous span of trained tokens."""
    runs = [(on, len(list(run))) for on, run in itertools.groupby(trained)]
    last = max((k for k, (on, _) in enumerate(runs) if on), default=None)
    return [k == last for k, (_, length) in enumerate(runs) for _ in range(length)]
