"""`llmlab schema STAGE`: the JSON Schema of a stage's settings, so that editors complete and check recipes."""

import json
from typing import Annotated, Any

import typer

from llmlab.settings.base import fields_of, spellings_of
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.stages import STAGES


def stage_schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of a stage's recipe, every accepted spelling a property."""
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}': expected one of {', '.join(STAGES)}{did_you_mean(name, STAGES)}")
    stage = STAGES[name].settings_class
    schema = stage.model_json_schema()
    properties = schema["properties"]
    for setting in fields_of(stage):
        home = properties
        if len(setting.path) > 1:  # a field of a nested group is also accepted beside the group
            group = properties[setting.path[0]]
            reference = group["$ref"] if "$ref" in group else group["anyOf"][0]["$ref"]
            home = schema["$defs"][reference.rsplit("/", 1)[1]]["properties"]
            file = {"type": "string", "description": "A settings file."}
            properties[setting.path[0]] = {"anyOf": [{"$ref": reference}, file]}
        own = {key: value for key, value in home[setting.name].items() if key != "title"}
        if own.get("type") == "array":
            own = {"anyOf": [own, own["items"]]}
        own["description"] = setting.help
        for spelling in setting.spellings:
            if spellings_of(stage)[spelling] is setting:
                properties[spelling] = own
    properties["stage"] = {"const": name, "description": "The stage this recipe is for."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"llmlab {name}"}


def schema(stage: Annotated[str, typer.Argument(help=f"One of: {', '.join(STAGES)}.")]) -> None:
    """Print the JSON Schema of a stage's settings, for editors that complete recipes."""
    typer.echo(json.dumps(stage_schema(stage), indent=2))
