"""Numbers that are no numbers are refused in one place, for every float of every settings class."""

import math

import pytest

from llmlab.settings.base import fields_of
from llmlab.settings.errors import SettingsError
from llmlab.settings.files import Layer
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings
from llmlab.stages import STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_every_float_setting_is_finite(stage):
    kind = STAGES[stage].settings_class
    for key in [setting.key for setting in fields_of(kind) if "float" in setting.type_name.split()]:
        for value in (math.inf, -math.inf, math.nan, "inf", "nan"):
            with pytest.raises(SettingsError) as caught:
                resolve(kind, Layer("command line", {key: value}))
            assert f"command line: {key} = {value}: expected a finite number" in caught.value.problems


def test_so_are_numbers_inside_of_mappings():
    values = {"trainer_args": {"label_smoothing_factor": math.inf}, "datasets": [{"name": "x", "weight": "inf"}]}
    with pytest.raises(SettingsError) as caught:
        resolve(SFTSettings, Layer("x.yaml", values))
    assert caught.value.problems == [
        "x.yaml: datasets[0].weight = inf: expected a finite number",
        "x.yaml: trainer_args.label_smoothing_factor = inf: expected a finite number",
    ]
