"""Weights, bounds, caps and the sum; values that are wrong; what is logged."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.rewards import REWARDS, length
from llmlab.rewards.compose import ComposedReward, compose
from llmlab.rewards.function import Reward
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.rewards import RewardSettings

GUIDE = {
    "json_valid": 1.0, "schema_pass": 1.0, "tool_success": 1.0, "lint_pass": 1.0, "ast_correct": 0.5,
    "guardrail_pass": 2.0, "verbosity_penalty": -0.1, "off_policy_penalty": -0.5,
}  # fmt: skip


def calls(count, name="search"):
    return f'<tool_call>{{"name": "{name}"}}</tool_call>' * count


def fixed(values, **arguments):
    return Reward(lambda completions, **columns: list(values), name=arguments.pop("name", "fixed"), **arguments)


def test_the_guides_weights_and_bounds():
    assert {name: REWARDS[name].weight for name in GUIDE} == GUIDE
    composed = compose(list(GUIDE))
    low, high = composed.bounds
    assert high == pytest.approx(6.5)
    assert low == pytest.approx(-2.5)


def test_the_guides_sum_by_hand():
    columns = {
        "schema": [{"type": "object"}] * 4,
        "allowed_tools": [["search"]] * 4,
        "tools": [["search", "fly"]] * 4,
    }
    texts = [
        '{"a": 1}',  # json, schema, guardrail: 1 + 1 + 2 = 4
        calls(21, "fly") + " rm -rf /",  # tools 1; 20 extra steps, off policy: 1 - 2 - 0.5 = -1.5
        f"{calls(1)}\n```python\nx = 1\n```",  # tools, lint, ast, guardrail: 1 + 1 + 0.5 + 2 = 4.5
        "<tool_call>?</tool_call>" * 30 + "rm -rf /",  # -2 - 0.5
    ]
    # (r + 2.5) / 9
    assert compose(list(GUIDE))(texts, **columns) == pytest.approx([6.5 / 9, 1 / 9, 7 / 9, 0])
    assert compose(list(GUIDE), normalize=False)(texts, **columns) == pytest.approx([4, -1.5, 4.5, -2.5])


def test_bounds_follow_the_weights_ranges_and_caps():
    assert compose(["json_valid | 3", "length"]).bounds == (0, 4)
    assert compose([{"name": "verbosity_penalty", "most": 5}, "json_valid"]).bounds == pytest.approx((-0.5, 1))
    assert compose([{"name": "verbosity_penalty", "cap": 1}, "json_valid"]).bounds == pytest.approx((-1, 1))
    assert compose([{"name": "guardrail_pass", "violation": -1}, "json_valid"]).bounds == (-2, 3)
    assert compose([{"name": "length", "min": 0.2, "max": 0.5, "weight": 2}]).bounds == (0.4, 1)
    assert compose(["json_valid | -1", "length"]).bounds == (-1, 1)


def test_caps_and_clips():
    values = [-30, -1, 0.5, 4, 30]
    assert fixed(values, low=-2, high=5)(["x"] * 5) == [-2, -1, 0.5, 4, 5]
    capped = ComposedReward([fixed(values, weight=2, cap=3)], normalize=False)
    assert capped(["x"] * 5) == [-3, -2, 1, 3, 3]
    # a cap alone makes the range known: (w v + 3) / 6
    assert ComposedReward([fixed(values, weight=2, cap=3)])(["x"] * 5) == pytest.approx([0, 1 / 6, 4 / 6, 1, 1])


def test_what_does_not_apply_is_left_out_of_sum_and_bounds():
    a = fixed([1, None, 0, None], name="a", low=0, high=1, weight=3)
    b = fixed([0, 0.5, None, None], name="b", low=0, high=1, weight=-1)
    # both: (3 - 0 + 1) / 4; b alone: (-0.5 + 1) / 1; a alone: 0 / 3; none
    assert ComposedReward([a, b])(["x"] * 4) == [1, 0.5, 0, None]
    assert ComposedReward([a, b], normalize=False)(["x"] * 4) == [3, -0.5, 0, None]


def test_weight_0_only_watches():
    watched = fixed([5, 1e9], name="watched", weight=0)
    composed = ComposedReward([fixed([0, 1], name="a", low=0, high=1), watched])
    assert composed.score(["x", "y"]) == ([0, 1], {"a": [0, 1], "watched": [5, 1e9]})
    assert ComposedReward([watched, fixed([None, 1], name="a", low=0, high=1)])(["x", "y"]) == [None, 1]


def test_components_are_logged():
    metrics, extras = {}, {}
    a = fixed([1, None, 0.5], name="a", low=0, high=1)
    b = fixed([None] * 3, name="b", low=0, high=1)
    ComposedReward([a, a, b])(["x"] * 3, log_metric=metrics.__setitem__, log_extra=extras.__setitem__)
    assert metrics == {"reward_components/a/mean": 0.75, "reward_components/a_2/mean": 0.75}
    assert extras == {"a": [1, None, 0.5], "a_2": [1, None, 0.5], "b": [None] * 3}


def test_ranges_that_nobody_knows():
    with pytest.raises(SettingsError, match="'first': its range is not known.*\n.*'second'"):
        ComposedReward([fixed([1], name="first"), fixed([1], name="second", low=0)])
    assert ComposedReward([fixed([7])], normalize=False)(["x"]) == [7]


def test_nothing_to_compose():
    with pytest.raises(UserError, match="at least one"):
        compose([])
    with pytest.raises(UserError, match="every weight is 0"):
        compose(["length | 0"])


def test_functions_and_rewards_beside_names():
    def half(completions):  # takes no columns at all
        return [0.5 for _ in completions]

    composed = compose(["json_valid", half, Reward(half, name="other", low=0, high=1)], normalize=False)
    assert composed(["1"], prompts=["p"], answer=["a"], trainer_state=object()) == [2]
    assert list(composed.components) == ["json_valid", "half", "other"]


def test_a_parameter_is_not_overwritten_by_a_column_of_its_name():
    assert compose([{"name": "length", "target": 2}])(["a b"], target=["never seen"], unit=["tokens"]) == [1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, math.nan, 1], "'fixed' gave nan at row 1 of 3 .*finite number"),
        ([1, 1, math.inf], "gave inf at row 2 of 3"),
        ([1, "2", 1], "gave '2' at row 1"),
        ([1, [2], 1], r"gave \[2\] at row 1"),
        ([1, 1], "gave 2 values for 3 completions"),
        (0.5, "gave float; expected a list"),
        (None, "gave NoneType; expected a list"),
    ],
)
def test_wrong_values_name_the_reward_and_the_row(values, words):
    reward = Reward(lambda completions: values, name="fixed", low=0, high=1)
    with pytest.raises(UserError, match=words):
        reward(["a", "b", "c"])


def test_numbers_of_other_libraries():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    assert Reward(lambda completions: numpy.array([1, 0.5], dtype="float32"))(["a", "b"]) == [1, 0.5]
    assert Reward(lambda completions: torch.tensor([True, False]))(["a", "b"]) == [1, 0]
    with pytest.raises(UserError, match="nan"):
        Reward(lambda completions: torch.tensor([1, math.nan]), name="x")(["a", "b"])


def test_a_failing_reward_names_itself_the_row_and_the_exception():
    def inverse(completions, answer, **columns):
        return [1 / value for value in answer]

    with pytest.raises(
        UserError, match=r"'inverse' failed at row 2 of 3 \('c'\): ZeroDivisionError: division by zero"
    ) as e:
        compose([inverse], normalize=False)(["a", "b", "c"], answer=[1, 2, 0])
    assert isinstance(e.value.__cause__, ZeroDivisionError)  # a notebook shows where

    def only_together(completions):
        raise RuntimeError("too many") if len(completions) > 1 else KeyError()

    with pytest.raises(UserError, match="at row 0 of 2.*KeyError"):
        Reward(only_together)(["a", "b"])

    def batch(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [1]

    with pytest.raises(UserError, match="'batch' failed in a batch of 2: RuntimeError: too many"):
        Reward(batch)(["a", "b"])


def test_a_completion_that_is_not_understood_names_the_row():
    image = [{"role": "assistant", "content": [{"type": "image_url"}]}]
    for reward in ("json_valid", "tool_success", "length", "guardrail_pass"):
        with pytest.raises(UserError, match=f"reward '{reward}': row 1: these messages .* part 'image_url'"):
            compose([reward]).score(["x", image])
    with pytest.raises(UserError, match="failed at row 1 of 2 .*image_url.*ZeroDivisionError"):
        Reward(lambda completions: [1 / isinstance(each, str) for each in completions])(["x", image])


def test_async_functions_are_refused():
    async def judge(completions):
        return [1]

    class Judge:
        async def __call__(self, completions):
            return [1]

    for function in (judge, Judge()):
        with pytest.raises(UserError, match="async"):
            Reward(function)


ROW = st.one_of(
    st.text(max_size=30), st.sampled_from(["{}", "1", "```python\nx = 1\n```", calls(3), "rm -rf /", "#### 4"])
)
NAMES = ["json_valid", "tool_success", "ast_correct", "guardrail_pass", "verbosity_penalty", "numeric_match", "length",
         "repetition_penalty", {"name": "off_policy_penalty", "only_tools": ["search"]}]  # fmt: skip
WEIGHTED = st.lists(
    st.tuples(st.sampled_from(NAMES[:4]), st.floats(-5, 5).filter(lambda w: abs(w) > 1e-3)), min_size=1
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), WEIGHTED)
def test_bounds_hold(rows, weighted):
    chosen = [{"name": name, "weight": weight} for name, weight in weighted]
    plain = compose(chosen, normalize=False)
    low, high = plain.bounds
    for total, share in zip(plain(rows), compose(chosen)(rows), strict=True):
        assert low - 1e-9 <= total <= high + 1e-9
        assert 0 <= share <= 1
        assert share == pytest.approx((total - low) / (high - low))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(ROW, st.integers(0, 9)), min_size=1, max_size=6), st.randoms())
def test_a_rows_reward_does_not_depend_on_its_neighbours(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    composed = compose(NAMES)

    def score(rows):
        return composed([text for text, _ in rows], answer=[answer for _, answer in rows])

    scores = score(rows)
    assert score([rows[place] for place in order]) == [scores[place] for place in order]
    assert [score([row])[0] for row in rows] == scores


@given(st.text(max_size=60), st.integers(1, 50))
def test_length_is_a_share(text, target):
    (score,) = length([text], target=target)
    assert 0 <= score <= 1


def test_settings_read_each_form():
    assert RewardSettings.model_validate("length") == RewardSettings(name="length")
    assert RewardSettings.model_validate("length | 0.5") == RewardSettings(name="length", weight=0.5)
    mapping = {"name": "length", "weight": 0.5, "cap": 2, "target": 100}
    read = RewardSettings.model_validate(mapping)
    assert read == RewardSettings(name="length", weight=0.5, cap=2, parameters={"target": 100})
    assert RewardSettings.model_validate(read.model_dump()) == read
    assert str(read) == "length | 0.5"
    twice = {"name": "a", "x": 1, "parameters": {"x": 2}}
    nan = {"name": "a", "weight": math.nan}
    for wrong in ("", "a | b", "a | 1 | 2", {"weight": 1}, {"name": "a", "cap": 0}, nan, 3, twice):
        with pytest.raises(ValueError):
            RewardSettings.model_validate(wrong)
