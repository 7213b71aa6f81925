"""The loop that decodes for chat, sampling, gates and rollouts, with any Transformers causal language model.

How tokens are chosen is Transformers' `GenerationConfig`; where the loop cannot be right, `generate` does the work.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria
from transformers.utils import logging

from llmlab.model.step import DecodeStep, state_of, suits

ATTENTION = ("sdpa", "eager", "causal_blocks")  # the last is sdpa once there are tokens in a cache
CHUNK = 32  # columns by which a cache grows
CHECK = 8  # tokens between looks at what an accelerator sampled, which wait for it
PATIENCE = 4  # tokens of a reply before weights are copied for the fused step, so that its first word does not wait
SHORT = 16  # tokens for which copying weights costs more than it saves
# the last fused step of a model whose weights are frozen, and their state when it was made
STEPS: WeakKeyDictionary[Any, tuple[list[Any], DecodeStep]] = WeakKeyDictionary()
READ = 2048  # tokens of prompts, padding included, that are read at the same time, the shorter ones first
ROUNDS = 8  # draws for top-p before the whole vocabulary is sorted
# processors that look at a row's scores alone, whatever is beside it and however it is padded
CHOICE = ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta", "RepetitionPenalty", "SuppressTokens")
ROWWISE = {f"{name}Logits{part}" for name in CHOICE for part in ("Warper", "Processor")}
LAYERS = {"StaticLayer", "StaticSlidingWindowLayer"}  # of static caches that hold keys and values of all tokens


class Decoded(NamedTuple):
    """Completions, up to and with the end token, and the log-probabilities of their tokens, where they were asked for.

    Log-probabilities are those of `log_softmax(logits / temperature)` in fp32, as TRL scores tokens: before top-k,
    top-p and penalties. They are None where `generate` did the work.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]] | None = None


def decode(
    model: Any,
    rows: Sequence[list[int]],
    config: GenerationConfig,
    *,
    max_length: int | None = None,
    batch_size: int | None = None,
    log_probs: bool = False,
) -> Decoded:
    """Continues prompts of token ids, without padding, in their order, within `max_length` of both together.

    The model samples in evaluation mode, in its own precision or that of the autocast around, and is left as it was.
    Identical prompts are read once; of `batch_size` rows (None: all) those that end make room for those that wait.
    """
    sampler = Sampler(*model.generate(torch.tensor([[0]], device=model.device), config, custom_generate=_prepared))
    most = sampler.config.max_length - 1  # of a completion: the prompt that was prepared has one token
    limits = [min(most, (max_length or math.inf) - len(row)) for row in rows]
    size = batch_size or len(rows)
    if sampler.criteria:
        sampler.obstacle = type(sampler.criteria[0]).__name__
    if _falls_back(model, sampler):
        parts = (slice(start, start + size) for start in range(0, len(rows), size))
        return Decoded([ids for part in parts for ids in _generate(model, rows[part], config, limits[part], sampler)])
    order = sorted(range(len(rows)), key=lambda k: (-len(rows[k]), rows[k]))  # identical ones beside each other
    loop = Loop(model, sampler, [rows[k] for k in order], [limits[k] for k in order], size)
    loop.scored = log_probs
    for _ in loop:
        pass
    place = sorted(range(len(rows)), key=order.__getitem__)
    return Decoded([loop.tokens[k] for k in place], [loop.log_probs[k] for k in place] if log_probs else None)


def decode_batch(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **inputs: Any,
) -> Tensor:
    """Decodes for `model.generate(..., custom_generate=decode_batch)`, Transformers' hook for loops of one's own;
    returns prompts and completions, (rows, time), with its padding.

    `generate` hands no streamer on, so use `custom_generate=partial(decode_batch, streamer=...)`.
    """
    sampler, mask = Sampler(logits_processor, stopping_criteria, generation_config), inputs.get("attention_mask")
    own = StoppingCriteriaList(sampler.criteria)
    if generation_config.return_dict_in_generate or (own and len(input_ids) > 1):
        sampler.obstacle = "outputs beside tokens, or criteria of one's own for a batch, were asked for"
    if _falls_back(model, sampler):
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)  # made already
        input_ids, mask = input_ids[::copies], None if mask is None else mask[::copies]
        options = {"attention_mask": mask, "streamer": streamer, "stopping_criteria": own}
        others = [each for each in logits_processor if type(each).__name__ not in ROWWISE]
        return model.generate(input_ids, generation_config, logits_processor=LogitsProcessorList(others), **options)
    mask = torch.ones_like(input_ids) if mask is None else mask
    rows = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
    loop = Loop(model, sampler, rows, [generation_config.max_length - input_ids.shape[1]] * len(rows), len(rows))
    loop.check = 1 if own else loop.check
    if streamer is not None:
        loop.patience = max(loop.patience, PATIENCE)
        streamer.put(input_ids.cpu())
    for token in loop:
        if streamer is not None:
            streamer.put(token.cpu())
        if own and own(torch.tensor([rows[0] + loop.tokens[0]]), None).any():
            break
    if streamer is not None:
        streamer.end()
    completions = [torch.tensor(ids, dtype=torch.long, device=input_ids.device) for ids in loop.tokens]
    padded = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=sampler.pad)
    return torch.cat((input_ids, padded), 1)


def why_not(model: Any) -> str | None:
    """Returns why the loop does not suit a model; None where it does."""
    base, adapter = _base(model), getattr(model, "active_peft_config", None)
    config, attention = base.config.get_text_config(decoder=True), base.config._attn_implementation
    others = {type(layer).__name__ for layer in StaticCache(config, 1).layers} - LAYERS
    sharded = (type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in base.parameters())
    reasons = {
        "its adapter is a learned prompt": getattr(adapter, "is_prompt_learning", False),
        "it has an encoder": base.config.is_encoder_decoder,
        "its weights are sharded": any(sharded),
        f"{attention} reads no cache with free columns": attention not in ATTENTION,
        f"it remembers more than keys and values ({', '.join(sorted(others))})": others,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _falls_back(model: Any, sampler: "Sampler") -> bool:
    reason = sampler.obstacle or why_not(model)
    if reason:
        logging.get_logger(__name__).warning_once(f"Transformers' generate samples, more slowly: {reason}.")
    return reason is not None


def _base(model: Any) -> Any:
    """Returns the model that adapters are part of."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _prepared(
    model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
) -> tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig]:
    """Stands for a decoding loop, and returns what `generate` made of its configuration."""
    return logits_processor, stopping_criteria, generation_config


def _generate(
    model: Any, rows: Sequence[list[int]], config: GenerationConfig, limits: Sequence[float], sampler: "Sampler"
) -> list[list[int]]:
    """Returns the completions by `generate`."""
    width = max(map(len, rows))
    ids = torch.tensor([[sampler.pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)

    def is_full(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        full = torch.tensor([ids.shape[1] - width >= limit for limit in limits], device=ids.device)
        return full.repeat_interleave(len(ids) // len(full))  # beams

    output = model.generate(ids, config, attention_mask=mask, stopping_criteria=StoppingCriteriaList([is_full]))
    new = output[:, width:].tolist()
    stops = [next((k + 1 for k, token in enumerate(ids) if token in sampler.ends), len(ids)) for ids in new]
    return [ids[: int(min(stop, limit))] for ids, stop, limit in zip(new, stops, limits, strict=True)]


class Sampler:
    """Chooses tokens as a generation configuration says, from processors that Transformers prepared for it."""

    def __init__(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig):
        self.processors, self.config = processors, config
        self.criteria = [each for each in criteria if not isinstance(each, MaxLengthCriteria | EosTokenCriteria)]
        ends = config.eos_token_id
        self.ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.pad = config.pad_token_id if config.pad_token_id is not None else (self.ends or [0])[0]
        self.temperature = config.temperature if config.do_sample and config.temperature else 1.0
        for each in processors:
            if isinstance(each, transformers.RepetitionPenaltyLogitsProcessor):
                each.prompt_ignore_length = None  # padding, which here repeats a row's own token
        mode, cache = config.get_generation_mode(), config.cache_implementation
        self.obstacle = next((name for each in processors if (name := type(each).__name__) not in ROWWISE), None)
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            self.obstacle = f"decoding by {mode.value}"
        elif cache not in (None, "dynamic", "static"):
            self.obstacle = f"cache_implementation = {cache}"

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Returns a token a row, (rows,), from the sequences so far, (rows, time), and logits, (rows, vocabulary)."""
        if not self.config.do_sample:
            return self.processors(ids, logits).argmax(-1)
        *first, last = self.processors or [None]
        if logits.device.type != "cpu":  # where these wait for no result
            return torch.multinomial(self.processors(ids, logits).softmax(-1), 1)[:, 0]
        if not isinstance(last, transformers.TopPLogitsWarper):
            return _draw(self.processors(ids, logits))
        scores = LogitsProcessorList(first)(ids, logits)
        tokens = torch.full((len(scores),), -1)
        for _ in range(ROUNDS):  # a draw outside of the most likely tokens is made again: no sorting
            rows = (tokens < 0).nonzero()[:, 0]
            if not len(rows):
                return tokens
            some = scores[rows] if len(rows) < len(scores) else scores
            drawn = _draw(some)
            own = some.gather(1, drawn[:, None])
            # of equals, Transformers' stable sort leaves out the first
            likelier = (some > own) | ((some == own) & (torch.arange(some.shape[1]) > drawn[:, None]))
            mass = (some.softmax(-1) * likelier).sum(-1)
            tokens[rows] = torch.where(mass < last.top_p, drawn, -1)
        rows = (tokens < 0).nonzero()[:, 0]
        tokens[rows] = _draw(last(ids[rows], scores[rows]))
        return tokens


def _draw(scores: Tensor) -> Tensor:
    """Draws from the softmax of each row by its distribution function: `multinomial` draws a number for each token."""
    edges = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    if not edges[:, -1].isfinite().all():
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")  # as `multinomial`
    points = torch.rand(len(edges), 1, dtype=torch.float64) * edges[:, -1:]
    return torch.searchsorted(edges, points, right=True)[:, 0].clamp(max=scores.shape[1] - 1)


class _Columns(DynamicLayer):
    """A layer's keys and values, (rows, heads, room, dim), of which the loop says how many columns are in use."""

    is_compileable = True  # so that Transformers leaves out no mask: free columns are to be masked

    def __init__(self, loop: "Loop"):
        super().__init__()
        self.loop = loop

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.keys, self.values = (x.new_zeros(*x.shape[:2], self.loop.room, x.shape[3]) for x in new)
        self.keys[:, :, self.loop.time], self.values[:, :, self.loop.time] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.loop.time

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.loop.room, 0


class Loop:
    """Decodes rows, some at a time; iterating gives the tokens of each step, (rows in the batch,).

    Sequences of a batch end in the same column: those on their left are padding, those from `time` on are free.
    """

    def __init__(self, model: Any, sampler: Sampler, rows: Sequence[list[int]], limits: Sequence[float], size: int):
        self.model, self.sampler, self.rows, self.limits, self.size = _base(model), sampler, rows, limits, size
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.log_probs: list[list[float]] = [[] for _ in rows]
        self.frozen, self.scored = not any(weight.requires_grad for weight in self.model.parameters()), False
        self.check = 1 if self.model.device.type == "cpu" else CHECK
        self.waiting = [n for n, limit in enumerate(limits) if limit > 0]
        self.numbers: list[int] = []  # of the batch's rows
        self.time = self.room = self.steps = 0
        layers = StaticCache(self.model.config.get_text_config(decoder=True), 1).layers
        self.cache = Cache(layers=[_Columns(self) for _ in layers])
        self.fused = None if suits(self.model) else False
        self.patience, self.state = 0 if max(limits, default=0) >= SHORT else math.inf, None
        self.accepted = inspect.signature(self.model.forward).parameters

    def __iter__(self) -> Iterator[Tensor]:
        with torch.no_grad(), _evaluating(self.model):
            while self.waiting or any(map(self._is_going, self.numbers)):
                self._fill_batch()
                yield from self._decode_some()

    def _is_going(self, number: int) -> bool:
        made = self.tokens[number]
        return len(made) < self.limits[number] and not (made and made[-1] in self.sampler.ends)

    def _decode_some(self) -> Iterator[Tensor]:
        """Decodes until rows should leave or join the batch."""
        pending: list[tuple[Tensor, ...]] = []
        while True:
            left = min(self.limits[n] - len(self.tokens[n]) for n in self.numbers if self._is_going(n))
            pending.append(self._advance())
            if len(pending) >= min(self.check, left):
                self._record(pending)
                pending = []
            yield self.ids[:, self.time]
            done = 0 if pending else sum(not self._is_going(n) for n in self.numbers)
            if done == len(self.numbers) or done >= max(1, len(self.numbers) // 4):
                return

    def _record(self, pending: list[tuple[Tensor, ...]]) -> None:
        """Appends tokens and log-probabilities, (rows,) each of some steps, to the rows that are not done."""
        for step in pending:
            columns = [part.tolist() for part in step]
            for number, *values in zip(self.numbers, *columns, strict=True):
                if self._is_going(number):
                    self.tokens[number].append(values[0])
                    self.log_probs[number].extend(values[1:])

    def _advance(self) -> tuple[Tensor, ...]:
        """Decodes one token a row; returns them, and their log-probabilities where these were asked for."""
        if self.time == self.room:
            self._grow()
        self.mask[:, self.time] = 1
        last, self.steps = self.ids[:, self.time], self.steps + 1
        if self.fused is None and self.cache.layers[0].is_initialized:
            self.fused = self._fuse()
        if self.fused and self.cache.layers[0].is_initialized:
            self.fused.pack_some()
            bias = self._attention_bias()
            cos, sin = self.rotary
            logits = self.fused(last, (cos[self.time], sin[self.time]), self.cache, self.time, bias)
        else:
            logits = self._forward(last[:, None], self.mask, (self.time - self.starts)[:, None], self.cache)
        self.time += 1
        logits = logits.float()
        tokens = self.sampler.choose(self.ids[:, : self.time], logits)
        if self.time < self.room:
            self.ids[:, self.time] = tokens
        else:
            self.ids = torch.cat((self.ids, tokens[:, None]), 1)
        if not self.scored:
            return (tokens,)
        scores = (logits / self.sampler.temperature).log_softmax(-1)
        return tokens, scores.gather(1, tokens[:, None])[:, 0]

    def _fuse(self) -> DecodeStep | None:
        """Returns the fused step of the weights as they are, from an earlier call or once copying them pays."""
        dtype = self.cache.layers[0].keys.dtype
        if self.state is None and self.frozen and (self.model in STEPS or self.steps > self.patience):
            self.state = [dtype, *state_of(self.model)]
        state, step = STEPS.get(self.model, (None, None))
        if step is not None and state == self.state:
            return step
        if self.steps <= self.patience:
            return None
        STEPS.clear()
        step = DecodeStep(self.model, dtype)
        if self.frozen:  # else the next ones differ, and memory is scarce
            STEPS[self.model] = self.state, step
        return step

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """Returns the last logits of the model's own forward pass, (rows, vocabulary)."""
        options = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self.accepted}
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        return output.logits[:, -1]

    def _attention_bias(self) -> dict[int | None, Tensor]:
        """Returns, by window, 0 where the last token looks and minus infinity elsewhere, (rows, 1, room)."""
        if not self.bias:
            self.fused.convert_cache(self.cache)
            columns = torch.arange(self.room, device=self.mask.device)
            self.rotary = self.fused.rotate(self.ids[:, 0], (columns - self.starts[:, None]).clamp(min=0))
            for window in {layer.window for layer in self.fused.layers}:
                seen = self.mask.bool() if window is None else self.mask.bool() & (columns > self.time - window)
                zeros = torch.zeros((), dtype=self.fused.dtype, device=seen.device)
                self.bias[window] = torch.where(seen, zeros, -torch.inf)[:, None]
        for window, bias in self.bias.items():
            bias[:, :, self.time] = 0
            if window is not None and self.time >= window:
                bias[:, :, self.time - window] = -torch.inf
        return self.bias

    def _grow(self) -> None:
        """Adds free columns."""
        self.room += CHUNK
        self.ids, self.mask = (F.pad(x, (0, self.room - x.shape[1])) for x in (self.ids, self.mask))
        self.bias = {}
        for layer in self.cache.layers:
            layer.keys, layer.values = (F.pad(x, (0, 0, 0, CHUNK)) for x in (layer.keys, layer.values))

    def _fill_batch(self) -> None:
        """Lets rows that are done leave the batch, and those that wait join it."""
        going = [k for k, number in enumerate(self.numbers) if self._is_going(number)]
        count = self.size - len(going)
        new, self.waiting = self.waiting[:count], self.waiting[count:]
        width = max((len(self.rows[n]) - 1 for n in new), default=0)  # the last token is the next one in
        left = min((int(self.starts[k]) for k in going), default=self.time)
        columns = max(self.time - left, width)
        self.room = (columns // CHUNK + 1) * CHUNK
        old = torch.tensor(going, dtype=torch.long, device=self.model.device)
        read, copies = self._read_prompts([tuple(self.rows[n][:-1]) for n in new], width)
        for index, layer in enumerate(self.cache.layers):
            parts = []
            for which, name in enumerate(("keys", "values") if columns else ()):
                past = [getattr(layer, name)[old, :, left : self.time]] if going else []
                fresh = [read[index][which][copies]] if width else []
                if new and not width:
                    fresh = [past[0].new_zeros(len(new), *past[0].shape[1:])]
                aligned = [F.pad(x, (0, 0, columns - x.shape[2], self.room - columns)) for x in past + fresh]
                parts.append(torch.cat(aligned))
            layer.is_initialized = bool(parts)
            layer.keys, layer.values = parts or (None, None)
            layer.dtype, layer.device = (parts[0].dtype, parts[0].device) if parts else (None, None)
        self.numbers = [self.numbers[k] for k in going] + new
        sequences = [[*self.rows[n], *self.tokens[n]] for n in self.numbers]
        starts = [columns + 1 - len(ids) for ids in sequences]
        filled = [[ids[0]] * start + ids for ids, start in zip(sequences, starts, strict=True)]
        self.ids = F.pad(torch.tensor(filled, device=self.model.device), (0, self.room - columns - 1))
        self.starts = torch.tensor(starts, device=self.model.device)
        places = torch.arange(self.room, device=self.model.device)
        self.mask = ((places >= self.starts[:, None]) & (places < columns)).long()
        self.time, self.bias = columns, {}

    def _read_prompts(self, prompts: list[tuple[int, ...]], width: int) -> tuple[list[list[Tensor]], Tensor]:
        """Returns each layer's keys and values of the different prompts, (prompts, heads, width, dim), with a prompt's
        end in the last column, and the row of each prompt in them."""
        unique, parts, device = sorted(set(prompts), key=len), [], self.model.device
        numbers = {prompt: k for k, prompt in enumerate(unique)}
        while width and unique:
            count = max(1, sum(k * len(prompt) <= READ for k, prompt in enumerate(unique, 1)))
            some, unique = unique[:count], unique[count:]
            length, cache = max(1, len(some[-1])), DynamicCache()
            # padding after a prompt needs no mask, with which attention is slower
            ids = torch.tensor([[*prompt] + [0] * (length - len(prompt)) for prompt in some], device=device)
            self._forward(ids, None, None, cache)
            places = [[(column + len(prompt)) % length for column in range(length)] for prompt in some]
            index = torch.arange(count, device=device)[:, None], slice(None), torch.tensor(places, device=device)
            # (prompts, length, heads, dim)
            pairs = ([layer.keys[index], layer.values[index]] for layer in cache.layers)
            parts.append([[F.pad(x.transpose(1, 2), (0, 0, width - length, 0)) for x in pair] for pair in pairs])
        read = [[torch.cat(each) for each in zip(*pairs, strict=True)] for pairs in zip(*parts, strict=True)]
        return read, torch.tensor([numbers[prompt] for prompt in prompts], dtype=torch.long, device=device)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Samples without dropout and gradient checkpointing, which reads no cache; leaves the model as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
