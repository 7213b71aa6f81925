"""Optimizers of bitsandbytes: the steps of AdamW and Lion, with states in 8 bits or in paged memory."""

import pytest
import torch

from llmlab.model import LLMLabConfig, LLMLabForCausalLM, measure
from llmlab.optim.build import build_optimizer, check_supported
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings

NAMES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit")
WIDE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}  # smaller weights keep 32-bit states

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("error:Paged optimizers are not supported on CPU")


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_plain_optimizer(name, tiny_llama, build, set_gradients):
    rule = "adamw" if "adamw" in name else "lion"
    models = [tiny_llama(**WIDE), tiny_llama(**WIDE)]
    for model, optimizer in zip(models, [rule, name], strict=True):
        stepping = build(model, optimizer, 1e-2, 0.1)
        for seed in (1, 1, 1):
            set_gradients(model, seed=seed)
            stepping.step()
    start = tiny_llama(**WIDE)
    for (key, plain), narrow, before in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        moved, other = ((model - before).detach().flatten() for model in (plain, narrow))
        # the same direction and length: 8-bit states are right to a few percent
        assert torch.nn.functional.cosine_similarity(moved, other, dim=0) > 0.999, key
        assert other.norm() / moved.norm() == pytest.approx(1, abs=0.02), key
    matrix, embedding = models[1].model.layers[0].mlp.up_proj.weight, models[1].model.embed_tokens.weight
    assert stepping.state[matrix]["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)
    assert stepping.state[embedding]["state1"].dtype == torch.float32
    assert not stepping.is_paged  # which a CPU has no use for


@pytest.mark.parametrize("name", NAMES)
def test_their_settings_and_states_are_counted(name):
    settings = resolve(OptimizerSettings, Layer("x", {"optimizer": name})).settings
    assert settings.optimizer == name
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LLMLabForCausalLM(LLMLabConfig(**WIDE, **shape))
    stepping = build_optimizer(model, settings, learning_rate=1e-3, weight_decay=0.1)
    tokens = torch.arange(3, 12)[None]
    model(tokens, labels=tokens).loss.backward()
    stepping.step()
    tables = ("qmap1", "qmap2")  # one for all weights
    kept = sum(
        value.nbytes
        for state in stepping.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in tables
    )
    assert measure(model.config).optimizer_bytes(name) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    ("optim", "name"),
    [
        *(
            ("paged_adamw_8bit", "paged_adamw_8bit"),
            ("paged_adamw", "paged_adamw_32bit"),
            ("adamw_8bit", "adamw_8bit"),
        ),
        *(("adamw_bnb_8bit", "adamw_8bit"), ("paged_lion", "paged_lion_32bit"), ("lion_32bit", "lion")),
    ],
)
def test_transformers_names(optim, name):
    assert resolve(SFTSettings, Layer("file", {"optim": optim})).settings.optimizer == name


def test_where_it_cannot_work():
    with pytest.raises(UserError, match="optimizer = lion_8bit: it cannot update weights that FSDP shards"):
        check_supported("lion_8bit", "FSDP")
