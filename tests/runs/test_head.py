"""TRL's loss head computed by llmlab's operator: the same numbers and gradients, of scored tokens alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM
from trl.trainer.utils import add_fused_lm_head

from llmlab.model import loss as loss_module
from llmlab.runs import _trl
from llmlab.runs._trl import TokenLogProbs, chunked_head

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("weights", ["equal", "unequal"])
@pytest.mark.parametrize(("frozen", "equal"), [(True, False), (False, True), (False, False)])
def test_each_token_has_its_own_gradient(frozen, equal, weights, monkeypatch):
    """Against log-softmax in float64; a promise of equal weights that does not hold costs time alone."""
    monkeypatch.setattr(loss_module, "CPU_CHUNK_TOKENS", 4)
    monkeypatch.setattr(loss_module, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_module, "MULTIPLE", 1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6).double().requires_grad_(), torch.randn(20, 6).double()
    weight.requires_grad_(not frozen)
    targets = torch.randint(0, 20, (11,))
    scales = torch.rand(11).double() if weights == "unequal" else torch.full((11,), 0.3).double()
    inputs = [hidden] if frozen else [hidden, weight]

    found, values = TokenLogProbs.apply(hidden, weight, targets, torch.float64, equal, True)
    gradients = torch.autograd.grad((found * scales).sum(), inputs)
    logits = hidden @ weight.T
    log_probs = logits.log_softmax(-1)
    expected = log_probs.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(values[:, 1], -(log_probs.exp() * log_probs).sum(-1))
    torch.testing.assert_close(values[:, 2], logits.mean(-1))
    assert values[:, 3].bool().equal(logits.argmax(-1) == targets)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * scales).sum(), inputs))


def test_of_equal_logits_the_first_is_the_likeliest():
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    _, values = TokenLogProbs.apply(torch.ones(3, 1), weight, torch.arange(3), torch.float32, True, True)
    assert values[:, 3].tolist() == [0, 1, 0]


def make_model(kind):
    torch.manual_seed(0)
    if kind == "bias":
        return PhiForCausalLM(PhiConfig(**SHAPE))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=kind == "tied"))
    return (
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)) if kind == "lora" else model
    )


@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "bias"])
def test_loss_and_gradients_are_trls(kind, monkeypatch):
    model = make_model(kind).eval()
    add_fused_lm_head(model.get_base_model() if kind == "lora" else model, outputs=OUTPUTS)
    ids = torch.randint(0, 50, (3, 12))
    labels = ids.clone()
    labels[0, :7] = labels[1, 9:] = labels[2] = -100  # a prompt, padding, and a row with nothing to score
    scored, operator = [], _trl.linear_cross_entropy
    monkeypatch.setattr(_trl, "linear_cross_entropy", lambda *args: (scored.append(len(args[0])), operator(*args))[1])

    def step():
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [getattr(output, name) for name in OUTPUTS], torch.autograd.grad(output.loss, trained)

    expected, gradients = step()
    assert not scored
    with chunked_head(equal=True):
        found, own = step()
    # rounding in fp32: sums of 50 terms in another order
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(own, gradients, atol=2e-6, rtol=1e-5)
    assert scored == ([] if kind == "bias" else [5 + 8])  # a bias is left to TRL
    step()
    assert len(scored) <= 1  # outside, TRL's own trainers are as they were


def test_a_batch_without_a_scored_token_has_a_loss_of_zero():
    model = make_model("untied")
    add_fused_lm_head(model)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with chunked_head(equal=True):
        loss = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss
    loss.backward()
    assert loss == 0 and not model.lm_head.weight.grad.any()
