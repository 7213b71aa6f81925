"""`pipeline.json`: which stages of a pipeline were started, how they ended, and from what they were made."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic's, before Python 3.12

from llmlab.settings.errors import UserError
from llmlab.settings.files import read_json, write_atomically

STATE = "pipeline.json"
Inputs = dict[str, dict[str, Any]]


class StageState(TypedDict):
    """What `pipeline.json` holds of a stage that was started."""

    status: str
    owner: str  # in the mark of its run folder
    run: str  # a new id for each run; a resumed run keeps its own
    needed_runs: dict[str, str]  # stage -> the id of its run that this one started from
    inputs: Inputs


State = dict[str, StageState]


def read_state(output_dir: Path) -> State:
    """Returns the stages of a pipeline's folder that were started, in the order of their first start."""
    path = output_dir / STATE
    if not path.is_file():
        return {}
    try:
        return TypeAdapter(State).validate_python(read_json(path), strict=True)
    except (UserError, ValidationError):
        again = "remove it and the stages' folders to run every stage again"
        raise UserError(f"{path}: this record is damaged, or of another version of llmlab; {again}") from None


def write_state(output_dir: Path, state: State) -> None:
    """Writes `pipeline.json`."""
    write_atomically(output_dir / STATE, json.dumps(state, indent=2) + "\n")
