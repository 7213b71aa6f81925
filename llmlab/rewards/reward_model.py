"""The reward of a reward model: a sequence-classification folder with its own tokenizer and its own template. A plain
callable and deliberately no `nn.Module`: TRL feeds modules with the policy's text run together, without the special
tokens or the question-answer pair that such models were trained on."""

from typing import Annotated, Any

from annotated_types import Ge

from llmlab.rewards.completions import Completion, RowError, answer, read_messages
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.paths import check_model, expand, is_local
from llmlab.settings.trust import remote_code, remote_code_allowed


class RewardModel:
    """Scores completions with a sequence-classification model.

    Text goes through the model's chat template where its tokenizer has one, else as the pair
    `tokenizer(question, answer)`. Weights are loaded at the first call.

    Args:
        model: a folder or hub id with one output, or several of which `label` names one.
        label: the output of a model that has several; the reward is its probability.
        squash: map a single output to [0, 1] by the logistic function; False gives the logit.
        batch_size: completions in one forward pass.
        max_length: longest input in tokens; None is what the model can read. Longer ones lose their beginning with a
            chat template, the end of the longer part in a pair; their share is logged as `reward_model/truncated`.
        device: where to compute; None is the current GPU where there is one.

    Source: Ouyang et al. 2022 (arXiv:2203.02155); seed, LLM-Lab document, "PPO", reward model.
    """

    __name__ = "reward_model"
    weight = 1.0

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
        from llmlab.model import opening, read_adapter
        from llmlab.model.auto import load_auto

        self.path = str(expand(model)) if is_local(model) else model
        self.squash, self.batch_size, self.device = squash, batch_size, device
        self._trusted = remote_code_allowed()  # weights are loaded later, perhaps in another process
        self._model: Any = None
        try:
            check_model(model)
            with opening(self.path, "a model with its tokenizer"):
                adapter = read_adapter(self.path)
                self.config = load_auto("AutoConfig", adapter.base if adapter else self.path)
                self.tokenizer = load_auto("AutoTokenizer", adapter.tokenizer_source if adapter else self.path)
            self._is_adapter = adapter is not None
            if adapter is None:
                found = ", ".join(self.config.architectures or ["nothing"])
                scores = "ForSequenceClassification" in found
            else:
                found, scores = f"an adapter for {adapter.config.task_type}", adapter.config.task_type == "SEQ_CLS"
                self.config.num_labels = 1
            if not scores:
                raise UserError(f"{self.path}: expected a sequence-classification model, found {found}")
        except UserError as error:
            raise UserError(f"model = {error}") from None
        labels = {str(name): index for index, name in self.config.id2label.items()}
        if label not in labels and not (label is None and len(labels) == 1):
            near = did_you_mean(label or "", labels)
            raise UserError(f"label = {label or 'none'}: {self.path} has {', '.join(labels)}; expected one{near}")
        self.index = None if len(labels) == 1 else labels[str(label)]  # the output to read, of several
        self.bounds = (0.0, 1.0) if squash or self.index is not None else None
        limits = (max_length, self.tokenizer.model_max_length, getattr(self.config, "max_position_embeddings", None))
        self.max_length = int(min(limit for limit in limits if limit)) if max_length is None else max_length

    def __call__(
        self, completions: list[Completion], prompts: list[Completion], log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        """Returns the scores of completions as replies to their prompts; both are texts or messages."""
        import torch

        if self._model is None:
            self._model = self._load()
        encoded = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                encoded.append(self._encode(prompt, completion))
            except RowError as error:
                raise UserError(f"row {row}: {error}") from None
        if log_metric is not None and encoded:
            log_metric("reward_model/truncated", sum(truncated for _, truncated in encoded) / len(encoded))
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row][0]["input_ids"]))  # little padding
        scores: dict[int, float] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            with torch.inference_mode():
                inputs = self._collate([encoded[row][0] for row in rows])
                logits = self._model(**inputs).logits.float()  # (batch, labels)
            if self.index is not None:
                values = logits.softmax(-1)[:, self.index]
            else:
                values = logits[:, 0].sigmoid() if self.squash else logits[:, 0]
            scores |= zip(rows, values.tolist(), strict=True)
        return [scores[row] for row in range(len(encoded))]

    def _encode(self, prompt: Completion, completion: Completion) -> tuple[dict[str, Any], bool]:
        """Returns the inputs of one row, and whether they were truncated."""
        if self.tokenizer.chat_template is not None:
            question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_messages(prompt)
            text = self.tokenizer.apply_chat_template(question + read_messages(completion), tokenize=False)
            inputs = self.tokenizer(text, add_special_tokens=False)  # the template writes them
            truncated = len(inputs["input_ids"]) > self.max_length
            return {name: values[-self.max_length :] for name, values in inputs.items()}, truncated
        question = "\n\n".join(message["content"] for message in read_messages(prompt) if message["content"])
        pair = ([question], [answer(completion)])  # lists: of single texts an empty answer makes no pair
        inputs = self.tokenizer(*pair)
        if truncated := len(inputs["input_ids"][0]) > self.max_length:
            inputs = self.tokenizer(*pair, truncation="longest_first", max_length=self.max_length)
        return {name: values[0] for name, values in inputs.items()}, truncated

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns tensors (batch, time), padded on the right: decoders read the score at the last unpadded token."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        pad = self._pad_token_id
        if pad is None:  # a token that does not occur, so that an end-of-text token at the end counts
            used = {token for row in rows for token in row["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
        self._model.config.pad_token_id = pad  # it need not be a token of the tokenizer, whose `pad` cannot serve
        columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        padding = {"input_ids": pad}
        return {
            name: pad_sequence(column, batch_first=True, padding_value=padding.get(name, 0)).to(self._model.device)
            for name, column in columns.items()
        }

    def _load(self) -> Any:
        import torch

        from llmlab.model import load_classifier, opening
        from llmlab.model.auto import load_auto

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16 if self._is_adapter else "auto"
        try:
            with remote_code(self._trusted), opening(self.path, "a sequence-classification model"):
                if self._is_adapter:
                    model = load_classifier(self.path, dtype=dtype)
                else:
                    model = load_auto("AutoModelForSequenceClassification", self.path, dtype=dtype)
        except UserError as error:
            raise UserError(f"model = {error}") from None
        self._pad_token_id = model.config.pad_token_id
        return model.to(device).eval().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a child process loads its own
