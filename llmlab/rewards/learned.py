"""The reward of a reward model: a sequence-classification folder with its own tokenizer and its own template.

A plain callable and deliberately no `nn.Module`: TRL feeds modules with the policy's text run together, without the
special tokens or the question-answer pair that such models were trained on. Here text is encoded as the model's own
tokenizer says.
"""

from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge

from llmlab.rewards.completions import Completion, answer, read_messages
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.settings.paths import check_model, expand, is_local
from llmlab.settings.trust import remote_code, remote_code_allowed


class RewardModel:
    """Scores completions with a sequence-classification model.

    Text goes through the model's chat template where its tokenizer has one, else as the pair
    `tokenizer(question, answer)`. Weights are loaded at the first call.

    Args:
        model: a folder or hub id with one output, or several of which `label` names one.
        label: the output of a model that has several; the reward is its probability.
        squash: map a single output to [0, 1] by the logistic function; false gives the bare number.
        batch_size: completions in one forward pass.
        max_length: longest input in tokens; none is what the model can read. Longer ones lose their beginning with a
            chat template, the end of the longer part in a pair; `log_metric` is told the share.
        device: where to compute; none is the current GPU where there is one.

    Raises:
        UserError: there is no such model, it is of another kind, or its label is not clear.

    Source: Ouyang et al. 2022 (arXiv:2203.02155); seed, LLM-Lab document, "PPO", reward model.
    """

    __name__ = "reward_model"

    def __init__(
        self,
        *,
        model: str,
        label: str | None = None,
        squash: bool = True,
        batch_size: Annotated[int, Ge(1)] = 8,
        max_length: Annotated[int, Ge(1)] | None = None,
        device: str | None = None,
    ):
        from llmlab.model.auto import load_auto

        self.path, self.squash, self.batch_size, self.device = model, squash, batch_size, device
        from llmlab.model import opening

        self._trusted = remote_code_allowed()  # weights are loaded later, perhaps in another process
        self.path = str(expand(model)) if is_local(model) else model
        try:
            check_model(model)
            with opening(self.path, "a model with its tokenizer"):
                self.config = self._configuration()
                self.tokenizer = load_auto("AutoTokenizer", self._tokenizer_home)
        except UserError as error:
            raise UserError(f"model = {str(error).removeprefix('model = ')}") from None
        self.index = self._index_of(label)
        self.bounds = (0.0, 1.0) if squash or self.index is not None else None
        self.max_length = max_length or self._longest()
        self._model: Any = None

    def __call__(
        self, completions: list[Completion], prompts: list[Completion], log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        """Scores each completion as the reply to its prompt.

        Args:
            completions: texts or messages of the batch.
            prompts: texts or messages that they reply to.
            log_metric: TRL's, given by its trainers.
            columns: not used.

        Returns:
            The model's scores, in order.
        """
        import torch

        if self._model is None:
            self._model = self._load()
        encoded = [self._encode(*pair) for pair in zip(prompts, completions, strict=True)]
        if log_metric is not None and encoded:
            log_metric("reward_model/truncated", sum(cut for _, cut in encoded) / len(encoded))
        scores: list[float | None] = [None] * len(encoded)
        for rows in self._batches([len(inputs["input_ids"]) for inputs, _ in encoded]):
            batch = self._pad([encoded[row][0] for row in rows])
            with torch.inference_mode():
                logits = self._model(**batch).logits.float()  # (batch, labels)
            if self.index is not None:
                values = logits.softmax(-1)[:, self.index]
            else:
                values = logits[:, 0].sigmoid() if self.squash else logits[:, 0]
            for row, value in zip(rows, values.tolist(), strict=True):
                scores[row] = value
        return scores

    def _configuration(self) -> Any:
        """Returns the model's configuration; that of its base, with one output, where it is a folder of adapters."""
        from llmlab.model import read_adapter
        from llmlab.model.auto import load_auto

        adapter = read_adapter(self.path)
        self._adapts = adapter is not None
        self._tokenizer_home = self.path if adapter is None else adapter.tokenizer_home
        if adapter is None:
            config = load_auto("AutoConfig", self.path)
            kinds = config.architectures or []
            if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
                found = ", ".join(kinds) or "nothing"
                raise UserError(f"model = {self.path}: expected a sequence-classification model, found {found}")
            return config
        if adapter.config.task_type != "SEQ_CLS":
            kind = f"an adapter for {adapter.config.task_type}"
            raise UserError(f"model = {self.path}: expected a sequence-classification model, found {kind}")
        config = load_auto("AutoConfig", adapter.base)
        config.num_labels = 1
        return config

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Yields rows of about equal length together, so that little is padding."""
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _encode(self, prompt: Completion, completion: Completion) -> tuple[dict[str, Any], bool]:
        """Returns the inputs of one row, and whether they were cut."""
        if self.tokenizer.chat_template is not None:
            messages = _messages(prompt, "user") + _messages(completion, "assistant")
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            whole = self.tokenizer(text, add_special_tokens=False)  # the template writes them
            cut = len(whole["input_ids"]) > self.max_length
            return {key: value[-self.max_length :] for key, value in whole.items()}, cut
        pair = ([_question(prompt)], [answer(completion)])  # lists: of single texts an empty answer makes no pair
        whole = self.tokenizer(*pair)
        if cut := len(whole["input_ids"][0]) > self.max_length:
            whole = self.tokenizer(*pair, truncation="longest_first", max_length=self.max_length)
        return {key: value[0] for key, value in whole.items()}, cut

    def _pad(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns tensors (batch, time), padded on the right.

        Decoders read the score at the last token that is no padding. Where the model names no padding token, one that
        does not occur is used, so that an end-of-text token at the end is read as the end.
        """
        import torch

        pad = self.config.pad_token_id
        if pad is None:
            used = {token for row in inputs for token in row["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
        self._model.config.pad_token_id = pad
        longest = max(len(row["input_ids"]) for row in inputs)
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in inputs]
        fill = {"input_ids": pad}
        return {
            key: torch.tensor(
                [[*row[key], *[fill.get(key, 0)] * (longest - len(row[key]))] for row in rows],
                device=self._model.device,
            )
            for key in rows[0]
        }

    def _load(self) -> Any:
        import torch

        from llmlab.model.auto import load_auto

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else "auto"
        if self._adapts:
            from llmlab.model import load_classifier

            with remote_code(self._trusted):
                model = load_classifier(self.path, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
            self.config.pad_token_id = model.config.pad_token_id
            return model.to(device).eval().requires_grad_(False)
        with reading(f"model = {self.path}", "a sequence-classification model"), remote_code(self._trusted):
            model = load_auto("AutoModelForSequenceClassification", self.path, dtype=dtype)
        return model.to(device).eval().requires_grad_(False)

    def _longest(self) -> int:
        limits = [self.tokenizer.model_max_length, getattr(self.config, "max_position_embeddings", None)]
        return int(min(limit for limit in limits if limit))

    def _index_of(self, label: str | None) -> int | None:
        labels = {str(name): index for index, name in self.config.id2label.items()}
        if label is None and len(labels) == 1:
            return None
        if label not in labels:
            near = did_you_mean(label, labels) if label else ""
            raise UserError(f"label = {label or 'none'}: {self.path} has {', '.join(labels)}; expected one{near}")
        return None if len(labels) == 1 else labels[label]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a child process loads its own


def _messages(side: Completion, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": side}] if isinstance(side, str) else read_messages(side)


def _question(prompt: Completion) -> str:
    """Returns a prompt as the text of a pair: that of its messages, one a paragraph."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in read_messages(prompt) if message["content"])
