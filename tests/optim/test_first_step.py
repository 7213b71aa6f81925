"""What each optimizer does in its first steps, against the formulas of the papers."""

import pytest
import torch

from llmlab.optim.build import check_supported
from llmlab.optim.sophia import Sophia
from llmlab.settings.base import When, fields_of
from llmlab.settings.errors import UserError
from llmlab.settings.optimizer import OptimizerSettings

LR, DECAY = 1e-2, 0.1


@pytest.fixture
def step_once(tiny_llama, build, set_gradients):
    """A function that takes a first step: (before, gradient, after) of a hidden matrix, a norm and the embedding."""

    def step(name: str, **settings):
        model = tiny_llama()
        chosen = {
            "matrix": model.model.layers[0].mlp.up_proj.weight,
            "norm": model.model.norm.weight,
            "embedding": model.model.embed_tokens.weight,
        }
        optimizer = build(model, name, LR, DECAY, **settings)
        set_gradients(model, seed=1)
        before = {key: (p.detach().clone(), p.grad.clone()) for key, p in chosen.items()}
        optimizer.step()
        return {key: (*before[key], p.detach().clone()) for key, p in chosen.items()}

    return step


def test_adamw_moves_each_entry_by_the_rate(step_once):
    # first moment and root of the second are both |g| after bias correction
    for key, (before, gradient, after) in step_once("adamw", adamw_eps=1e-3).items():
        kept = before * (1 - LR * DECAY) if key == "matrix" else before
        torch.testing.assert_close(after, kept - LR * gradient / (gradient.abs() + 1e-3))


def test_lion_moves_by_the_sign(step_once):
    for key, (before, gradient, after) in step_once("lion").items():
        kept = before * (1 - LR * DECAY) if key == "matrix" else before
        torch.testing.assert_close(after, kept - LR * gradient.sign())


def test_lion_betas_have_their_roles(tiny_llama, build, set_gradients):
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    optimizer = build(model, "lion", LR, 0.0)
    set_gradients(model, seed=1)
    optimizer.step()
    first, between = weight.grad.clone(), weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad.neg_()
    optimizer.step()
    # 0.9 * (0.01 g) + 0.1 * (-g) < 0; with the betas exchanged, 0.99 * (0.1 g) + 0.01 * (-g) > 0
    torch.testing.assert_close(weight.detach(), between + LR * first.sign())


def test_adafactor_divides_by_factored_second_moments(step_once):
    for key, (before, gradient, after) in step_once("adafactor").items():
        if key == "norm":
            update = gradient.sign()
        else:
            square = gradient**2
            update = gradient / (square.mean(1, keepdim=True) * square.mean(0) / square.mean()).sqrt()
        update = update / max(1.0, update.square().mean().sqrt())
        kept = before * (1 - LR * DECAY) if key == "matrix" else before
        torch.testing.assert_close(after, kept - LR * update)


OPTIONS = {s.name: s for s in fields_of(OptimizerSettings) if s.marker(When) and s.name != "decay_share"}


@pytest.mark.parametrize(
    ("option", "name"), [(option, name) for option, s in OPTIONS.items() for name in s.marker(When).values]
)
def test_every_option_reaches_its_optimizer(option, name, tiny_llama, build):
    setting = OPTIONS[option]
    changed = not setting.default if isinstance(setting.default, bool) else setting.default / 2 or 3

    def numbers(**settings):
        groups = build(tiny_llama(), name, **settings).param_groups
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    assert numbers(**{option: type(setting.default)(changed)}) != numbers()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw(nesterov, step_once):
    steps = step_once("muon", muon_nesterov=nesterov)
    before, gradient, after = steps.pop("matrix")
    update = (before * (1 - LR * DECAY) - after) / (LR * 0.2 * max(before.shape) ** 0.5)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    rotated = left.T @ update @ right.T  # diagonal where the singular vectors are the gradient's
    assert torch.linalg.svdvals(gradient).std() > 0.5
    # five Newton-Schulz steps in bf16 bring singular values into about 0.7 .. 1.2
    assert (rotated.diagonal() - 1).abs().max() < 0.35
    assert (rotated - rotated.diagonal().diag()).abs().max() < 0.05
    for before, gradient, after in steps.values():
        torch.testing.assert_close(after, before - 0.1 * LR * gradient.sign())


def test_muons_adamw_is_that_of_its_library(tiny_llama, build, set_gradients, monkeypatch):
    from pytorch_optimizer import Muon

    from llmlab.optim import muon

    weights, fused = {}, muon.adamw
    for own in (False, True):
        model = tiny_llama()
        optimizer = build(model, "muon", LR, DECAY, adamw_beta1=0.8, adamw_eps=1e-4)
        calls = []
        monkeypatch.setattr(muon, "adamw", lambda *args, calls=calls, **kw: (calls.append(args), fused(*args, **kw)))
        for seed in range(3):
            set_gradients(model, seed=seed)
            _step_as(type(optimizer) if own else Muon, optimizer)
        weights[own] = [parameter.detach().clone() for parameter in model.parameters()]
        assert bool(calls) == own
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-5, atol=1e-6)


def _step_as(kind, optimizer):
    """Takes a step of an optimizer as one of its base classes."""
    own, optimizer.__class__ = optimizer.__class__, kind
    optimizer.step()
    optimizer.__class__ = own


def test_batched_products_are_those_of_each_matrix(tiny_llama, build, set_gradients, monkeypatch):
    """Sums in bf16 are in another order: of entries near 1 / 4, some multiples of 2^-8 / 4, times lr."""
    models = [tiny_llama(), tiny_llama()]
    for model, size in zip(models, (2**19, 0), strict=True):
        monkeypatch.setattr("llmlab.optim.build.BATCHED_SIZE", size)
        optimizer = build(model, "muon", LR)
        for seed in (1, 2):
            set_gradients(model, seed)
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=8 * LR * 2**-10, rtol=0)


def test_muon_treats_a_transposed_weight_alike(tiny_llama, build, set_gradients):
    """GPT-2 stores its linear weights transposed; the step must be the transpose of the other's."""
    model = tiny_llama()
    wide, tall = model.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.up_proj.weight
    tall.data.copy_(wide.data.T)
    optimizer = build(model, "muon", lr=0.1)
    set_gradients(model, seed=1)
    tall.grad.copy_(wide.grad.T)
    optimizer.step()
    torch.testing.assert_close(tall.detach().T, wide.detach(), atol=1e-3, rtol=0)


def test_sophia_clips_where_the_curvature_is_small():
    torch.manual_seed(0)
    start = torch.randn(6)
    hessian = torch.tensor([0.0, 1e-9, 1.0, 10.0, 100.0, 1000.0])
    gradient = torch.tensor([0.5, -0.5, 2.0, -2.0, 2.0, 2.0])
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Sophia([parameter], lr=LR, betas=(0.965, 0.99), rho=0.04, weight_decay=DECAY)
    parameter.grad = hessian.sqrt()
    optimizer.update_hessian()
    parameter.grad = gradient
    optimizer.step()
    momentum, diagonal = 0.035 * gradient, 0.01 * hessian
    expected = []
    for m, h in zip(momentum.tolist(), diagonal.tolist(), strict=True):
        expected.append(max(-1.0, min(1.0, m / max(0.04 * h, 1e-12))))
    assert expected[:4] == [1, -1, 1, -1]
    assert expected[4] == 1 and expected[5] == pytest.approx(0.07 / 0.4)
    torch.testing.assert_close(parameter.detach(), start * (1 - LR * DECAY) - LR * torch.tensor(expected))


def test_sophia_averages_its_estimates():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = Sophia([parameter], lr=LR, betas=(0.9, 0.75))
    for gradient in ([1.0, 2.0], [3.0, 0.0]):
        parameter.grad = torch.tensor(gradient)
        optimizer.update_hessian()
    expected = torch.tensor([0.75 * 0.25 * 1 + 0.25 * 9, 0.75 * 0.25 * 4])
    torch.testing.assert_close(optimizer.state[parameter]["hessian"], expected)


def test_the_schedule_scales_every_group(optimizer_name, tiny_llama, build, set_gradients):
    model = tiny_llama()
    optimizer = build(model, optimizer_name, LR)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    set_gradients(model, seed=1)
    optimizer.step()
    schedule.step()
    assert peaks[0] == LR == optimizer.defaults["lr"]
    assert [group["lr"] for group in optimizer.param_groups] == [peak / 2 for peak in peaks]
    frozen = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), frozen, strict=True))


def test_gradient_scaling_changes_nothing_and_skips_infinities(optimizer_name, tiny_llama, build, set_gradients):
    plain, scaled = tiny_llama(), tiny_llama()
    set_gradients(plain, seed=1)
    build(plain, optimizer_name).step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = build(scaled, optimizer_name)
    scaler.scale(torch.zeros(()))
    set_gradients(scaled, seed=1, scale=1024.0)
    scaler.step(optimizer)
    scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(p, q)
    scaler.scale(torch.zeros(()))
    set_gradients(scaled, seed=2)
    scaled.model.norm.weight.grad[0] = torch.inf
    before = [p.detach().clone() for p in scaled.parameters()]
    scaler.step(optimizer)
    assert all(torch.equal(p, was) for p, was in zip(scaled.parameters(), before, strict=True))


def test_zero_refuses_what_needs_whole_matrices():
    for name in ("sophia", "muon"):
        with pytest.raises(UserError, match=f"optimizer = {name}: DeepSpeed ZeRO"):
            check_supported(name, "DEEPSPEED")
        check_supported(name, "FSDP")
    for name in ("adamw", "adafactor", "lion"):
        check_supported(name, "DEEPSPEED")


def test_fsdp_refuses_adafactor():
    with pytest.raises(UserError, match="optimizer = adafactor: it cannot update weights that FSDP shards"):
        check_supported("adafactor", "FSDP")
    check_supported("adafactor", "MULTI_GPU")
