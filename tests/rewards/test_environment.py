"""The environment's own reward, normalized to [0, 1] by the range of the episode."""

import pytest

from llmlab.rewards.compose import environment_reward


class Game:
    reward_range = (-15.0, 5.0)

    def __init__(self, reward):
        self.reward = reward

    def get_reward(self):
        return self.reward


@pytest.mark.parametrize(("reward", "score"), [(-15, 0.0), (-40, 0.0), (0, 15 / 20), (5, 1.0), (9, 1.0)])
def test_normalized_rewards_stay_in_their_range(reward, score):
    assert environment_reward(normalize=True)(completions=[""], environments=[Game(reward)]) == [score]
    assert environment_reward(normalize=False)(completions=[""], environments=[Game(reward)]) == [reward]
