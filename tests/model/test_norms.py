import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmlab.model.norms import RMSNorm, use_fast_norms

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def gradients(norm, x, grad, autocast):
    """Returns a norm's output and gradients by input and weight, of those that are trained."""
    x = x.detach().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = norm(x)
    trained = [tensor for tensor in (x, norm.weight) if tensor.requires_grad]
    return output, *torch.autograd.grad(output, trained, grad.to(output.dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trains", ["both", "input", "weight"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_output_is_llamas_and_gradients_are_up_to_rounding(dtypes, trains, autocast):
    torch.manual_seed(0)
    of_input, of_weight = (getattr(torch, name) for name in dtypes)
    ours, llamas = (kind(24, eps=1e-3).to(of_weight) for kind in (RMSNorm, LlamaRMSNorm))
    x, grad = torch.randn(3, 5, 4, 24).to(of_input), torch.randn(3, 5, 4, 24)
    x.requires_grad_(trains != "weight")
    for norm in (ours, llamas):
        norm.weight.data = torch.linspace(0.5, 2, 24).to(of_weight)
        norm.weight.requires_grad_(trains != "input")
    output, *found = gradients(ours, x, grad, autocast)
    expected_output, *expected = gradients(llamas, x, grad, autocast)
    assert output.dtype == expected_output.dtype and torch.equal(output, expected_output)
    assert len(found) == len(expected) == (2 if trains == "both" else 1)
    # the lower precision rounds each of the formula's steps; a weight's gradient sums 60 rows
    steps = 8 * torch.finfo(torch.promote_types(of_input, of_input)).eps
    for ours_grad, llamas_grad in zip(found, expected, strict=True):
        assert ours_grad.dtype == llamas_grad.dtype
        torch.testing.assert_close(ours_grad.float(), llamas_grad.float(), rtol=steps, atol=steps * 8)


def test_gradients_are_those_of_float64():
    torch.manual_seed(0)
    norm, x, grad = RMSNorm(64), torch.randn(50, 64, requires_grad=True), torch.randn(50, 64)
    norm.weight.data.uniform_(0.5, 2)
    _, grad_x, grad_weight = gradients(norm, x, grad, autocast=False)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    output = weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    expected = torch.autograd.grad(output, [wide, weight], grad.double())
    torch.testing.assert_close(grad_x.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_weight.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_norms_of_other_models_are_replaced_where_they_compute_the_same():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES))
    ids = torch.randint(32, (2, 7))
    model(ids, labels=ids).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    weights = model.state_dict()
    use_fast_norms(model)
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 2 * 4 + 1
    assert all(model.state_dict()[name].data_ptr() == weight.data_ptr() for name, weight in weights.items())
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_norms_with_another_formula_stay():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES))
    use_fast_norms(model)
    assert not any(isinstance(module, RMSNorm) for module in model.modules())
