"""What a completion is rewarded for: rewards in the form `name | weight`, or a mapping with their parameters.
`llmlab.rewards` knows which rewards and parameters there are, and computes them."""

from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Gt, MinLen
from pydantic import BeforeValidator, GetJsonSchemaHandler, JsonValue, model_validator

from llmlab.settings.base import Alias, Settings


class RewardSettings(Settings, type_name="name | weight"):
    """One reward: `json_valid`, `length | 0.5`, or `{name: length, weight: 0.5, target: 200}`; other keys are its
    parameters. Source: seed, RL guide, section 3, "Reward Function Weights"."""

    name: Annotated[str, MinLen(1)]
    """A reward of llmlab, or a function of your own: path/to/file.py:name."""
    weight: float | None = None
    """Factor of the value; none is the guide's weight of that reward, or 1."""
    min: float | None = None
    """Lower clip of the value."""
    max: float | None = None
    """Upper clip of the value."""
    cap: Annotated[float, Gt(0)] | None = None
    """Largest magnitude of weight x value."""
    parameters: dict[str, JsonValue] = {}
    """The reward's own parameters."""

    @model_validator(mode="before")
    @classmethod
    def parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            name, _, weight = (part.strip() for part in value.partition("|"))
            if not name or "|" in weight:
                raise ValueError("expected 'name | weight (optional)'")
            return {"name": name, **({"weight": weight} if weight else {})}
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise ValueError("expected 'name | weight' or a mapping with a name")
        fields = {key: part for key, part in value.items() if key in cls.model_fields}
        inline = {key: part for key, part in value.items() if key not in cls.model_fields}
        parameters = fields.get("parameters", {})
        if not inline or not isinstance(parameters, dict):
            return value
        if twice := sorted(inline.keys() & parameters.keys()):
            raise ValueError(f"'{twice[0]}' is set both beside and inside of `parameters`; keep one")
        return {**fields, "parameters": {**parameters, **inline}}

    def contradictions(self) -> Iterator[str]:
        if self.min is not None and self.max is not None and self.min >= self.max:
            yield f"min = {self.min:g} must be below max = {self.max:g}"

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        mapping = {**handler(core_schema), "additionalProperties": True}  # the parameters
        return {"anyOf": [{"type": "string", "description": cls.type_name}, mapping]}

    def __str__(self) -> str:
        return self.name if self.weight is None else f"{self.name} | {self.weight:g}"


def as_list(value: Any) -> Any:
    """Returns rewards as a list: of one entry, or of the guide's mapping, `{json_valid: 1.0, length: {target: 9}}`."""
    if isinstance(value, dict) and "name" not in value:
        entries = {name: part if isinstance(part, dict) else {"weight": part} for name, part in value.items()}
        return [{"name": name, **entry} for name, entry in entries.items()]
    return [value] if isinstance(value, (str, dict)) else value


SPELLINGS = Alias("reward_funcs", "reward_functions", "reward_weights")


class RewardsSettings(Settings, panel="Rewards"):
    """The rewards of a stage, and how they become one number. Source: seed, RL guide, section 3."""

    rewards: Annotated[list[RewardSettings], BeforeValidator(as_list), MinLen(1), SPELLINGS]
    """Rewards, one an entry: name | weight (optional), or a mapping {name: weight}."""
    normalize_rewards: bool = True
    """Map the weighted sum to [0, 1] by its smallest and largest possible value."""
