"""Settings of gates: scores of a model's answers to held-out prompts, with thresholds, after training or during it.

What the scores are is `llmlab.rewards` and `llmlab.evaluation`.
"""

from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import BeforeValidator, GetJsonSchemaHandler, JsonValue, model_validator

from llmlab.settings.base import Resume, Settings
from llmlab.settings.data import DataSource
from llmlab.settings.files import read_layer
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.rewards import with_parameters

GATE = "gate "  # before the name of a gate in metric_for_best_model


class GateSettings(Settings):
    """One gate: `json_valid`, or `{name: json_valid, prompts: eval.jsonl, n: 200, min: 0.9}`.

    Every key that is none of these fields is a parameter of the score.
    """

    type_name: ClassVar[str] = "name"

    name: Annotated[str, MinLen(1)]
    """A reward, perplexity, distinct_n, self_similarity or episode_success."""
    prompts: DataSource | None = None
    """Held-out prompts (texts for perplexity, tasks for episode_success)."""
    n: Annotated[int, Gt(0)] = 100
    """Prompts, the first ones of the source."""
    num_samples: Annotated[int, Gt(0)] = 1
    """Completions of each prompt."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    max_new_tokens: Annotated[int, Gt(0)] = 256
    """Longest completion in tokens."""
    min: float | None = None
    """The gate fails below this score."""
    max: float | None = None
    """The gate fails above this score."""
    regression: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Loss against the baseline that is to be found, as a share of its score."""
    parameters: dict[str, JsonValue] = {}
    """The score's own parameters."""

    @model_validator(mode="before")
    @classmethod
    def parse(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else with_parameters(cls, value)

    @model_validator(mode="after")
    def check(self) -> "GateSettings":
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(f"min = {self.min:g} must be below max = {self.max:g}")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples = {self.num_samples}: with temperature 0 all samples are the same")
        return self

    @property
    def sampling(self) -> SamplingSettings:
        """How its completions are sampled: from the whole distribution."""
        return SamplingSettings(temperature=self.temperature, top_p=1.0, max_new_tokens=self.max_new_tokens)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        mapping = {**handler(core_schema), "additionalProperties": True}  # the parameters
        return {"anyOf": [{"type": "string", "description": cls.type_name}, mapping]}

    def __str__(self) -> str:
        return self.name


def read_gates(value: Any) -> Any:
    """Returns gates as a list: of a file that holds them (at its top, or under `gates`), or of names and commas."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
        value = read_layer(value, "gates").values
        if value.keys() != {"gates"}:
            raise ValueError(f"expected a file with a list of gates, found {', '.join(map(str, value)) or 'nothing'}")
        return value["gates"]
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Gates = Annotated[list[GateSettings], BeforeValidator(read_gates)]


class EvaluateSettings(Settings):
    """What `llmlab evaluate` measures."""

    gates: Annotated[Gates, MinLen(1)]
    """Gates, one an entry, or a file of them."""


class GatesSettings(Settings):
    """Gates during training, on generated answers. Source: seed, RL guide, section 7, "Eval gates"."""

    panel: ClassVar[str] = "Gates"
    resume: ClassVar[Resume] = Resume.FREE

    gates: Gates = []
    """Scores of answers to held-out prompts while training, one an entry (name, or a mapping), or a file of them. A
    gate without prompts takes validation_datasets, or the validation split of the first source."""
    gate_every: Annotated[int | None, Gt(0)] = None
    """Optimizer steps between measurements of the gates, at no more than a tenth of the run's time."""
    metric_for_best_model: str | None = None
    """`gate NAME`: the best checkpoint is the one with the best score of this gate; none is the one with the best
    validation loss or reward."""

    @model_validator(mode="after")
    def check_gates(self) -> "GatesSettings":
        if bool(self.gates) != (self.gate_every is not None):
            raise ValueError("gates and gate_every need each other: what is measured, and how often")
        if (best := self.metric_for_best_model) is None:
            return self
        names = [gate.name for gate in self.gates]
        if not best.startswith(GATE) or best.removeprefix(GATE) not in names:
            choices = ", ".join(f"'{GATE}{name}'" for name in names) or "gates first"
            raise ValueError(f"metric_for_best_model = {best}: expected {choices}")
        if self.eval_every % self.gate_every:  # type: ignore[attr-defined]
            raise ValueError(
                f"eval_every = {self.eval_every} must be a multiple of gate_every = {self.gate_every} "  # type: ignore[attr-defined]
                "where metric_for_best_model is a gate: it is known only where gates are measured"
            )
        return self
