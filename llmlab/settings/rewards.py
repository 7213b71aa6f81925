"""What a completion is rewarded for: rewards in the form `name | weight`, or a mapping with their parameters.
`llmlab.rewards` knows which rewards and parameters there are, and computes them. Of episodes with tools: which
environment, how long, what the simulator rewards. Source: seed, RL guide, section 4, "PPO Configuration" and "Reward
Function (Simulator)"."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from annotated_types import Gt, MinLen
from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, JsonValue, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Resume, Settings, When, settings_of_table
from llmlab.settings.paths import PathName, Reads


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


SEED_REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"
SPELLINGS = Alias("reward_funcs", "reward_functions", "reward_weights")


class RewardsSettings(Settings, panel="Rewards"):
    """The rewards of a stage, and how they become one number. Source: seed, RL guide, section 3."""

    rewards: Annotated[list[RewardSettings], BeforeValidator(as_list), MinLen(1), SPELLINGS]
    """Rewards, one an entry: name | weight (optional), or a mapping {name: weight}."""
    normalize_rewards: bool = True
    """Map the weighted sum to [0, 1] by its smallest and largest possible value."""


IN_EPISODES = When("environment")
SIMULATOR = "simulator"

REWARD_CONFIG = "What the simulator rewards: per episode, and per call of a tool. Source: seed, RL guide, section 4."
RewardConfig = settings_of_table("RewardConfig", __name__, REWARD_CONFIG, "points", float, panel="Simulator")


class EnvironmentSettings(Settings, panel="Episodes"):
    """Where a policy acts."""

    environment: str | dict[str, str] | None = None
    """Play episodes with tools in it: simulator, gymnasium:ID, openenv:URL, path/to/file.py:Class, or a mapping of
    names to these for data with a column `environment`; none samples one completion a prompt."""
    max_episode_length: Annotated[int, Gt(0), Alias("max_tool_calling_iterations"), IN_EPISODES] = 20
    """Tool calls after which an episode ends."""
    tool_timeout: Annotated[float, Gt(0), Resume.FREE, IN_EPISODES] = 30.0
    """Seconds after which a tool call is abandoned, and the policy reads an error."""
    reward_config: RewardConfig = RewardConfig()

    @property
    def environments(self) -> dict[str | None, str]:
        """The environments by the name in a row's column `environment`; the one of all rows has the name None."""
        return {None: self.environment} if isinstance(self.environment, str) else dict(self.environment or {})

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Reads the guide's `kl_weight` among the simulator's rewards as the KL coefficient."""
        points = values.get("reward_config")
        if isinstance(points, dict) and "kl_weight" in points:
            values["reward_config"] = {name: value for name, value in points.items() if name != "kl_weight"}
            values.setdefault("kl_weight", points["kl_weight"])
        super().translate(values, warn)

    def contradictions(self) -> Iterator[str]:
        if self.environment == {}:
            yield "environment: expected at least one"
        if self.reward_config != RewardConfig() and SIMULATOR not in self.environments.values():
            yield "reward_config applies only when environment is simulator"


class CompletionSettings(EnvironmentSettings, RewardsSettings, panel="Training"):
    """Prompts, and the rewards of their completions or episodes: also of RS-SFT and AWR."""

    max_new_tokens: v.MaxNewTokens = 256
    max_prompt_length: Annotated[int | None, Gt(0)] = 1024
    """Longest prompt in tokens; rows with longer ones are dropped, counted and reported."""
    max_seq_len: Annotated[int | None, Gt(1), Alias("max_seq_length", "max_length")] = None
    """Longest prompt and completion or episode together, in tokens: limits prompts to what max_new_tokens leaves."""

    rewards: Annotated[list[RewardSettings] | None, BeforeValidator(as_list), SPELLINGS] = None  # type: ignore[assignment]
    """Rewards, one an entry: name | weight (optional), or a mapping {name: weight}. None uses the reward model alone,
    or the environment's."""
    reward_model: Annotated[PathName | None, Reads("model"), Alias("reward_model_name", "reward_model_path")] = None
    """Reward model, in addition to the other rewards: a run folder of llmlab reward, or a hub id. None without other
    rewards is OpenAssistant/reward-model-deberta-v3-large-v2."""
    allow_code: Annotated[bool, Resume.FREE, Field(exclude=True)] = False
    """Run reward functions from Python files (path/to/file.py:function); never set in a file."""

    def contradictions(self) -> Iterator[str]:
        if self.max_seq_len is not None and self.max_seq_len <= self.max_new_tokens:
            no_room = f"leaves no room for a prompt in max_seq_len = {self.max_seq_len}"
            yield f"max_new_tokens = {self.max_new_tokens} {no_room}"
        if self.rewards == [] and self.reward_model is None and self.environment is None:
            yield "rewards: expected at least one"

    @property
    def prompt_limit(self) -> int | None:
        """The longest prompt in tokens, by either of the limits; None where there is none."""
        room = self.max_seq_len and self.max_seq_len - self.max_new_tokens
        return min((limit for limit in (self.max_prompt_length, room) if limit is not None), default=None)

    def all_rewards(self) -> list[RewardSettings]:
        """Returns the rewards with the reward model among them."""
        rewards = list(self.rewards or [])
        model = self.reward_model or (None if rewards or self.environment else SEED_REWARD_MODEL)
        if model is not None:
            rewards.append(RewardSettings(name="reward_model", parameters={"model": model}))
        return rewards
