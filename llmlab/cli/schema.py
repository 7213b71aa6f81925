"""`llmlab schema STAGE`: the JSON Schema of a stage's settings, so that editors complete and check recipes."""

import json
from typing import Annotated, Any

import typer

from llmlab.settings.base import Settings, fields_of, spellings_of
from llmlab.stages import STAGES, find_stage


def stage_schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of a stage: its own names, and each accepted spelling as another property."""
    stage: type[Settings] = find_stage(name).settings_class
    schema = stage.model_json_schema()
    properties = schema["properties"]
    for setting in fields_of(stage):
        home = properties
        if len(setting.path) > 1:
            home = (
                schema["$defs"][schema["properties"][setting.path[0]]["$ref"].rsplit("/", 1)[1]]["properties"]
                if ("$ref" in schema["properties"][setting.path[0]])
                else properties
            )
        own = home.get(setting.name, {})
        for spelling in setting.spellings:
            if spellings_of(stage)[spelling] is setting:
                properties.setdefault(
                    spelling, {**own, "description": f"{setting.help} Another spelling of {setting.key}."}
                )
    properties["stage"] = {"const": name, "description": "The stage this recipe is for."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"llmlab {name}"}


def schema(
    stage: Annotated[str, typer.Argument(help=f"One of: {', '.join(STAGES)}.")],
) -> None:
    """Print the JSON Schema of a stage's settings, for editors that complete recipes."""
    typer.echo(json.dumps(stage_schema(stage), indent=2))
