"""heads.py: sizes against the paper's, structure, gradients."""
import math

import pytest
import torch

import film
from heads import TimeEncoder, make_backbone


def count(module):
    return sum(p.numel() for p in module.parameters())


def paper_mlp():
    """DP-MLP at the paper's dimensions: A = 10, T = 16, 274 observation numbers."""
    backbone = make_backbone("mlp", "paper", action_dim=10, horizon=16)
    return backbone, film.make_conditioning(backbone, "joints", horizon=1, num_joints=137)


def test_paper_size_has_the_paper_s_parameter_counts():
    backbone, pathway = paper_mlp()
    assert count(backbone) == 4_782_346      # counted on the official MLP_FiLM.py
    assert count(pathway) == 8_699_904


def test_time_encoder_matches_a_double_precision_sinusoid():
    encoder = TimeEncoder(8)
    encoder.mlp = torch.nn.Identity()
    given = encoder(torch.tensor([0, 7, 99]))
    for row, k in zip(given, (0, 7, 99)):
        rates = [10_000 ** (-i / 3) for i in range(4)]
        expected = [math.sin(k * r) for r in rates] + [math.cos(k * r) for r in rates]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-5, rtol=0)


def mlp_and_condition(batch):
    torch.manual_seed(0)
    backbone = make_backbone("mlp")
    pathway = film.make_conditioning(backbone, "joints", horizon=16, num_joints=3)
    return backbone, pathway, pathway(torch.randn(batch, 16, 3))


def test_mlp_never_mixes_time_steps():
    backbone, _, condition = mlp_and_condition(1)
    run = lambda actions: backbone(actions, torch.tensor([40]), condition)
    jacobian = torch.autograd.functional.jacobian(run, torch.randn(1, 16, 2))[0, :, :, 0]
    size = jacobian.abs().sum(dim=(1, 3))                        # (T out, T in)
    assert torch.equal(size, size.diag().diag())                 # exactly zero off the diagonal
    assert (size.diag() > 0).all()


def test_mlp_on_a_subset_of_steps_equals_those_steps_of_the_whole():
    backbone, _, condition = mlp_and_condition(5)
    actions, timestep = torch.randn(5, 16, 2), torch.randint(100, (5,))
    steps = torch.stack([torch.randperm(16)[:4] for _ in range(5)])
    index = steps[..., None].expand(-1, -1, 2)
    whole = backbone(actions, timestep, condition)
    part = backbone(actions.gather(1, index), timestep, condition, steps=steps)
    torch.testing.assert_close(part, whole.gather(1, index), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_every_trainable_tensor_and_no_frozen_one(frozen):
    backbone, pathway, _ = mlp_and_condition(4)
    backbone.requires_grad_(not frozen)
    condition = pathway(torch.randn(4, 16, 3))
    backbone(torch.randn(4, 16, 2), torch.randint(100, (4,)), condition).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pathway.parameters())
    for parameter in backbone.parameters():
        assert (parameter.grad is None) if frozen else (parameter.grad.abs().sum() > 0)


def test_unknown_backbone_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="'vae'.*mlp paper"):
        make_backbone("vae")
