"""Loads any run folder, adapter or hub model, and generates text with it, batched or streamed.

The interactive chat is `cli/chat.py`; serving many users is the work of other engines, which load the same folders.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Union

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteriaList, TextIteratorStreamer

from llmlab.data.tokenizer import TEMPLATE_FAILURES, load_tokenizer, stop_token_ids
from llmlab.decoding import decode, decode_batch
from llmlab.hardware import probe
from llmlab.model import LLMLabForCausalLM, fit_vocabulary, load_model, read_adapter
from llmlab.model.causal_blocks import use_blocks
from llmlab.settings.errors import UserError, reading, reason_of
from llmlab.settings.files import read_json
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.trust import takes_trust

if TYPE_CHECKING:
    from peft import PeftModel

Model = Union[PreTrainedModel, "PeftModel"]
Message = dict[str, str]
Prompt = str | list[Message]  # a text to continue, or a conversation to answer


@takes_trust
def load_for_inference(
    source: str | Path, *, dtype: str = "auto", device: str = "auto"
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Returns a model in evaluation mode, its weights frozen, and its tokenizer.

    Args:
        source: a run folder, any Transformers or PEFT adapter folder, or a hub id of either.
        dtype: `auto`, `bf16`, `fp16` or `fp32`; auto is bf16 where the device computes it.
        device: `auto`, `cpu`, `cuda` or `mps`.
    """
    hardware = probe(device, dtype)
    source = str(source)
    if (adapter := read_adapter(source)) is not None:
        model = adapter.load_base(load_model, dtype=hardware.torch_dtype)
        tokenizer = load_tokenizer(adapter.tokenizer_source)
        fit_vocabulary(model, tokenizer)  # tokens added in training; the adapter holds their rows
        if (adapter.folder / "generation_config.json").is_file():  # else the base's are kept
            with reading(adapter.folder / "generation_config.json", "generation settings"):
                model.generation_config = GenerationConfig.from_pretrained(adapter.folder)
        model = adapter.attach(model)
    else:
        model = load_model(source, dtype=hardware.torch_dtype)
        tokenizer = load_tokenizer(source)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        problem = f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}"
        raise UserError(f"{source}: {problem}; expected the tokenizer that the model was trained with")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if hardware.device == "cpu" and not isinstance(model, LLMLabForCausalLM):  # which knows them itself
        use_blocks(model.get_base_model() if adapter is not None else model)
    return model.to(hardware.device).eval().requires_grad_(False), tokenizer


def is_chat_model(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model answers messages: it has a chat template and was not merely pretrained."""
    folder = Path(source)
    for record in (folder / "llmlab.json", folder.parent / "llmlab.json"):  # a checkpoint lies in its run folder
        with suppress(UserError):  # a missing or damaged record is no reason not to chat
            if read_json(record).get("stage") == "pretrain":
                return False
    return tokenizer.chat_template is not None


def context_length(model: Any) -> int | None:
    """Returns the longest sequence, prompt and completion together, or None where the architecture has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: list[Any] | None = None) -> list[int]:
    """Returns the token ids of a text, or of a conversation up to where the assistant answers."""
    if isinstance(prompt, str):
        # With nothing to continue, a document starts where the one before it ended.
        return tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template: it can complete text only")
    try:
        output = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, return_dict=True)
    except (TemplateError, *TEMPLATE_FAILURES) as error:
        raise UserError(f"the model's chat template refuses this conversation: {reason_of(error)}") from None
    if not output["input_ids"]:
        raise UserError("the model's chat template makes nothing of this conversation")
    return output["input_ids"]


def drop_oldest_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], room: int
) -> tuple[list[Message], int]:
    """Returns a conversation that fits into `room` tokens, and the number of messages dropped from its start.

    A user's message goes with the answers to it; the system prompt and the last turn stay.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while (length := len(encode_prompt(tokenizer, system + turns))) > room:
        later = [k for k, message in enumerate(turns) if k > 0 and message["role"] == "user"]
        if not later:
            raise UserError(f"this message makes {length} tokens, and the model has room for {room}")
        turns = turns[later[0] :]
    return system + turns, len(messages) - len(system) - len(turns)


def prompt_room(model: Model, max_new_tokens: int) -> int | None:
    """Returns the longest prompt: the context less the completion, but at least half of the context."""
    context = context_length(model)
    return None if context is None else max(context - max_new_tokens, context // 2)


def generate_text(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    *,
    num_samples: int = 1,
    seed: int | None = None,
    batch_size: int = 16,
) -> Iterator[list[str]]:
    """Yields the completions of each prompt, in order, as batches are done.

    A completion ends at an end token, after `max_new_tokens`, or where the model's context is full.

    Args:
        model: from `load_for_inference`.
        tokenizer: from `load_for_inference`.
        prompts: texts to continue or conversations to answer.
        sampling: temperature, top-p and the like.
        num_samples: completions of each prompt.
        seed: of the random state; None leaves it as it is.
        batch_size: completions generated at the same time.
    """
    if num_samples > 1 and sampling.temperature == 0:
        raise UserError(f"num_samples = {num_samples}: with temperature 0 all samples are the same")
    encoded = _encode_all(model, tokenizer, prompts)
    if seed is not None:
        torch.manual_seed(seed)
    rows = [ids for ids in encoded for _ in range(num_samples)]
    done: list[str] = []
    for start in range(0, len(rows), 4 * batch_size):  # rows that are done make room for others of these
        new = generate_tokens(model, tokenizer, rows[start : start + 4 * batch_size], sampling, batch_size=batch_size)
        done += tokenizer.batch_decode(new, skip_special_tokens=True)
        while len(done) >= num_samples:
            yield done[:num_samples]
            del done[:num_samples]


def generate_tokens(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    sampling: SamplingSettings,
    *,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Returns the tokens that follow each row of token ids, up to and with the end token where there is one;
    `batch_size` rows at the same time, None is all."""
    config, limit = _generation_config(model, tokenizer, sampling), context_length(model)
    return decode(model, rows, config, max_length=limit, batch_size=batch_size).tokens


def end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of the tokens that end a completion."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), *stop_token_ids(tokenizer)} - {None}


def stream_reply(
    model: Model, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sampling: SamplingSettings
) -> Iterator[str]:
    """Yields one completion in pieces of whole words, as they are generated.

    Generation runs in a thread; closing the iterator, or an exception such as Ctrl+C while it waits, stops it at the
    next token.
    """
    ids = _encode_all(model, tokenizer, [prompt])[0]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    room = (context_length(model) or math.inf) - len(ids)
    config = _generation_config(model, tokenizer, sampling)
    config.max_new_tokens = int(min(config.max_new_tokens, room))
    stop = Event()
    criteria = StoppingCriteriaList([lambda ids, *_, **__: torch.full((len(ids),), stop.is_set(), device=ids.device)])
    loop = partial(decode_batch, streamer=streamer)
    options = {"generation_config": config, "stopping_criteria": criteria, "custom_generate": loop}
    inputs = torch.tensor([ids], device=model.device)  # (1, time)

    failures: list[Exception] = []

    def generate() -> None:
        try:
            model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)  # a second Ctrl+C need not wait for its forward pass
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def _encode_all(model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    encoded, context = [encode_prompt(tokenizer, prompt) for prompt in prompts], context_length(model)
    for number, ids in enumerate(encoded, start=1):
        if context is not None and len(ids) >= context:
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise UserError(f"{name} has {len(ids)} tokens; the model's context is {context}")
    return encoded


def _generation_config(
    model: Model, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings
) -> GenerationConfig:
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        do_sample=sampling.temperature > 0,
        **(sampled if sampling.temperature > 0 else {}),
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
