"""diffusion.DiffusionPolicy: what it denoises, and that acting equals the plain way to sample."""
import pytest
import torch

import film
from diffusion import DiffusionPolicy
from heads import make_backbone

CORNERS = [(-60, 0), (60, 0), (60, 30), (-60, 30), (-15, 30), (15, 30), (15, 120), (-15, 120)]
SCALE = [30 + 12 * step for step in range(16)]


def make_policy(**settings):
    torch.manual_seed(0)
    backbone = make_backbone("mlp")
    conditioning = film.make_conditioning(backbone, "state", obs_steps=2, corners=CORNERS,
                                          goal=(256, 256, 0.785))
    return DiffusionPolicy(conditioning, backbone, SCALE, **settings).eval()


def observations(batch):
    return torch.rand(batch, 2, 5, generator=torch.Generator().manual_seed(1)) * 300 + 100


def test_normalised_actions_are_displacements_over_the_scale_of_their_step():
    policy, agent = make_policy(), torch.tensor([[100.0, 200.0]])
    actions = agent[:, None].repeat(1, 16, 1)
    actions[0, 3] += torch.tensor([33.0, -66.0])        # the scale of step 3 is 66 px
    expected = torch.zeros(1, 16, 2)
    expected[0, 3] = torch.tensor([0.5, -1.0])
    torch.testing.assert_close(policy.normalise(actions, agent), expected)
    torch.testing.assert_close(policy.denormalise(expected, agent), actions)
    absolute = make_policy(relative=False)
    assert absolute.normalise(torch.tensor([[[0.0, 512.0]]]), agent).tolist() == [[[-1, 1]]]


@pytest.mark.parametrize("sampling_steps", [None, 10])
def test_act_equals_sampling_with_the_whole_network_at_every_step(sampling_steps):
    """The two halves of the modulation, computed once each, change nothing."""
    policy, seen = make_policy(sampling_steps=sampling_steps), observations(4)
    fast = policy.act(seen, torch.Generator().manual_seed(2))
    with torch.no_grad():
        chunk = policy.ddpm.sample(
            lambda noisy, timestep: policy.backbone(noisy, timestep, policy.conditioning(seen)),
            (4, 16, 2), sampling_steps, torch.Generator().manual_seed(2))
    scale = torch.tensor(SCALE)[:, None]
    slow = (chunk * scale + seen[:, -1:, :2])[:, 1:9].clamp(0, 512)
    assert fast.shape == (4, 8, 2)
    torch.testing.assert_close(fast, slow, atol=1e-3, rtol=0)


def test_act_takes_arrays_and_is_repeatable():
    policy, seen = make_policy(), observations(3)
    first = policy.act(seen, torch.Generator().manual_seed(3))
    assert torch.equal(first, policy.act(seen.numpy(), torch.Generator().manual_seed(3)))
    assert not torch.equal(first, policy.act(seen, torch.Generator().manual_seed(4)))


def test_loss_is_one_for_a_network_that_predicts_no_noise():
    """E |eps - 0|^2 = 1 whatever the actions: with 8 x 4 x 2 x 1,000 draws within 5 sigma of 1."""
    policy = make_policy(noise_samples=8, loss_steps=4)
    torch.nn.init.zeros_(policy.backbone.output.weight)
    torch.nn.init.zeros_(policy.backbone.output.bias)
    loss = policy.loss(observations(1000), torch.rand(1000, 16, 2) * 512)
    assert abs(loss.item() - 1) < 5 * (2 / 64_000) ** 0.5


def test_the_subset_of_steps_has_the_whole_chunk_s_gradient_in_expectation():
    seen, actions = observations(2), torch.rand(2, 16, 2) * 512
    gradients = {}
    for name, settings in {"whole": dict(noise_samples=3000),
                           "subset": dict(noise_samples=3000, loss_steps=4)}.items():
        policy = make_policy(**settings)
        policy.loss(seen, actions).backward()
        gradients[name] = policy.backbone.output.bias.grad
    size = gradients["whole"].norm()
    assert (gradients["subset"] - gradients["whole"]).norm() < 0.1 * size


def test_save_and_load_give_the_same_actions(tmp_path):
    policy, seen = make_policy(executed_actions=4, sampling_steps=5), observations(2)
    policy.save(tmp_path / "policy.pt")
    loaded = DiffusionPolicy.load(tmp_path / "policy.pt")
    assert not loaded.training and loaded.executed_actions == 4
    assert torch.equal(policy.act(seen, torch.Generator().manual_seed(0)),
                       loaded.act(seen, torch.Generator().manual_seed(0)))
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]


def test_bad_observations_and_settings_are_refused():
    policy = make_policy()
    with pytest.raises(ValueError, match=r"\(B, 2, 5\), got \(1, 3, 5\)"):
        policy.act(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match=r"\(B, 2, 5\), got \(1, 2, 4\)"):
        policy.act(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="finite"):
        policy.act(torch.full((1, 2, 5), float("nan")))
    with pytest.raises(ValueError, match="1..15.*got 16"):
        make_policy(executed_actions=16)
