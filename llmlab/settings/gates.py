"""Settings of gates: scores of answers to held-out prompts, with thresholds, after training or during it."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import BeforeValidator, JsonValue, model_validator

from llmlab.settings.base import Resume, Settings
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.files import read_layer
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.paths import Reads

GATE = "gate "  # before the name of a gate in metric_for_best_model


class GateSettings(Settings):
    """One gate, such as `json_valid` or `{name: json_valid, prompts: eval.jsonl, n: 200, min: 0.9}`."""

    name: Annotated[str, MinLen(1)]
    """A reward, perplexity (of texts), distinct_n, self_similarity or episode_success (of tasks)."""
    prompts: Annotated[DataSource | None, Reads("path")] = None
    """Held-out prompts."""
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
    """Loss that is to be found, as a share of the baseline's score; a certain loss of half of it fails the gate."""
    parameters: dict[str, JsonValue] = {}
    """Parameters of the score."""

    @model_validator(mode="before")
    @classmethod
    def parse(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def contradictions(self) -> Iterator[str]:
        if self.min is not None and self.max is not None and self.min >= self.max:
            yield f"min = {self.min:g} must be below max = {self.max:g}"
        if self.num_samples > 1 and self.temperature == 0:
            yield f"num_samples = {self.num_samples}: with temperature 0 all samples are the same"

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(temperature=self.temperature, top_p=1.0, max_new_tokens=self.max_new_tokens)


def read_gates(value: Any) -> list[Any]:
    """Returns gates as a list: entries, names with commas, or files that hold a list of them."""
    gates: list[Any] = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str) and entry.endswith((".yaml", ".yml", ".json")):
            values = read_layer(entry, "gates").values
            if others := sorted(values.keys() - {"gates"}):
                raise UserError(f"{entry}: unknown key '{others[0]}'; expected a list of gates, or gates: [...]")
            if not values.get("gates"):
                raise UserError(f"{entry}: there are no gates in it")
            gates += read_gates(values["gates"])
        else:
            gates += [name.strip() for name in entry.split(",")] if isinstance(entry, str) else [entry]
    return gates


Gates = Annotated[list[GateSettings], BeforeValidator(read_gates)]


class EvaluateSettings(Settings):
    """What `llmlab evaluate` measures."""

    gates: Gates


class GatesSettings(Settings, panel="Gates", resume=Resume.FREE):
    """Gates during training. Source: seed, RL guide, section 7, "Eval gates"."""

    writes_answers: ClassVar[bool] = True

    gates: Gates = []
    """Scores of answers to held-out prompts while training, one an entry (name, or a mapping), or a file of them. A
    gate without prompts takes validation_datasets, or the validation split of the first source."""
    gate_every: Annotated[int | None, Gt(0)] = None
    """Optimizer steps between measurements of the gates, which take at most a tenth of the run's time after the first
    eight prompts, unless metric_for_best_model is a gate."""
    metric_for_best_model: Annotated[str | None, Resume.FIXED] = None
    """`gate NAME`: the best checkpoint is the one with the best score of this gate; none is the one with the best
    validation loss or reward. Gates are then never skipped, always on the same prompts, and may take more time."""

    def contradictions(self) -> Iterator[str]:
        if self.gates and not self.writes_answers:
            yield "gates are not supported here: a reward model scores answers and writes none"
        if bool(self.gates) != (self.gate_every is not None):
            yield "gates and gate_every need each other: what is measured, and how often"
        best, names = self.metric_for_best_model, [GATE + gate.name for gate in self.gates]
        if best is not None and best not in names:
            choices = " or ".join(names) or "gates, and 'gate NAME' of one of them"
            yield f"metric_for_best_model = {best}: expected {choices}"
        if best is not None and self.gate_every and self.eval_every % self.gate_every:  # type: ignore[attr-defined]
            steps = f"eval_every must be a multiple of gate_every = {self.gate_every}"
            yield f"metric_for_best_model = {best}: {steps}, since evaluations choose the best checkpoint"
