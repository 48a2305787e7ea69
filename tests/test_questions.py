"""Tests that questions of the course need beside those of the project.

How such a test is written: it takes every right answer, however it is computed, so it allows for
another rounding, and it asks for the kind of an error, not for its wording. Its docstring names the
mistakes that it catches, because students see it below a failure. Its messages say what was expected
and what was found. It draws numbers from `draws`, so that grading asks with other numbers than the
starter; and it needs little memory, whatever the mistake.
"""
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import film
import sim_pusht
from diffusion import DDPM, DiffusionPolicy
from kinematics import DAMPING, PlanarArm

SEED = int(os.environ.get("QUESTION_SEED", "0"))


@pytest.fixture
def draws():
    """Random numbers: the same ones in each run of a starter, other ones in each grading."""
    return torch.Generator().manual_seed(SEED)


def is_close(given, expected, within, what):
    """Fails, and says what was expected and what was found, if two tensors are not nearly equal."""
    assert given.shape == expected.shape, (
        f"{what}: expected the shape {tuple(expected.shape)}, got {tuple(given.shape)}")
    difference = (given.detach().double() - expected.double()).abs()
    worst = int(difference.nan_to_num(nan=math.inf).argmax())
    where = tuple(int(i) for i in np.unravel_index(worst, difference.shape))
    assert difference.max() <= within, (
        f"{what}: at {where} expected {expected[where].item():.5g}, got {given[where].item():.5g}")


# Part 1: the noise process -----------------------------------------------------------------------

def test_a_schedule_of_no_timesteps_is_refused():
    """No check of num_timesteps; a check that lets 0 or negative numbers pass."""
    for num_timesteps in (0, -5):
        with pytest.raises(ValueError):
            DDPM(num_timesteps)
    DDPM(1)


def test_each_sample_has_the_noise_of_its_own_timestep(draws):
    """The scales without the two axes that (B,T,A) needs: they meet the wrong axis, or none. A scale
    for its square; signal and noise swapped. B == T == A on purpose."""
    ddpm, timesteps = DDPM(), torch.tensor([3, 40, 0, 99])
    actions, noise = torch.randn(2, 4, 4, 4, generator=draws)
    abar = ddpm.alphas_cumprod[timesteps].double()[:, None, None]
    expected = abar.sqrt() * actions + (1 - abar).sqrt() * noise
    is_close(ddpm.add_noise(actions, noise, timesteps), expected, 1e-5, "noisy actions")


def test_a_run_of_steps_equals_diffusers():
    """The two weights of the posterior swapped; its variance used as its deviation; the noise left
    out, or added in the last step too; the predicted clean actions not clipped.

    The numbers are recorded from the library diffusers. A run of 100 steps may be 1e-4 from them:
    float32 and another order of the same operations need less.
    """
    with np.load(Path(__file__).parent / "data" / "diffusers_goldens.npz") as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file}
    ddpm, actions = DDPM(100), recorded["ddpm_start"]
    for timestep, expected in zip(range(99, -1, -1), recorded["ddpm_trajectory"]):
        predicted = 0.3 * actions + 0.1 * np.sin(timestep)
        noise = recorded["ddpm_noise_by_timestep"][timestep]
        actions = ddpm.step(predicted, timestep, actions, noise)
        is_close(actions, expected, 1e-4, f"actions after the step from timestep {timestep}")


def test_each_sample_steps_back_from_its_own_timestep(draws):
    """One timestep for the whole batch; scales on the wrong axis; an `if` that takes a tensor of
    timesteps for one number. B == T == A on purpose."""
    ddpm, timesteps = DDPM(), [3, 40, 0, 99]
    predicted, noisy, noise = torch.randn(3, 4, 4, 4, generator=draws)
    together = ddpm.step(predicted, torch.tensor(timesteps), noisy, noise)
    for i, timestep in enumerate(timesteps):
        alone = ddpm.step(predicted[i:i + 1], timestep, noisy[i:i + 1], noise[i:i + 1])
        is_close(together[i:i + 1], alone, 1e-4, f"sample {i}, timestep {timestep}")


def test_a_long_step_back_with_other_numbers(draws):
    """The noise derived again from the clipped actions; the step to -1 taken for the index -1; the
    scales of the timestep in place of those of the previous one."""
    ddpm = DDPM()
    noisy, predicted = 2 * torch.randn(2, 3, 16, 2, generator=draws)
    for timestep, previous in ((90, 80), (55, 20), (10, 0)):
        abar, before = ddpm.alphas_cumprod[[timestep, previous]].double()
        clean = ((noisy - (1 - abar).sqrt() * predicted) / abar.sqrt()).clamp(-1, 1)
        expected = before.sqrt() * clean + (1 - before).sqrt() * predicted
        given = ddpm.ddim_step(predicted, timestep, previous, noisy)
        is_close(given, expected, 1e-4, f"the step from {timestep} to {previous}")
        is_close(ddpm.ddim_step(predicted, timestep, -1, noisy), clean, 1e-4,
                 f"the step from {timestep} to clean actions")


# Part 2: FiLM and its siblings -------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["steps_first", "channels_first"])
def test_film_is_its_equation(layout, draws):
    """gamma and beta swapped; 1 + gamma; a missing axis, so that a time step gets the modulation of
    another sample; gamma and beta taken from one vector's halves. B == T == D on purpose."""
    h, m = torch.randn(4, 4, 4, generator=draws), torch.randn(4, 2, 1, 4, generator=draws)
    expected = torch.stack([m[b, 0] * h[b] + m[b, 1] for b in range(4)])
    if layout == "steps_first":
        given = film.FiLM().modulate(h.clone(), m.clone())
    else:
        given = film.FiLM().modulate(h.mT.clone(), m.mT.clone()).mT
    is_close(given, expected, 1e-5, "features")


# Part 4: kinematics ------------------------------------------------------------------------------

def test_joints_need_an_angle_for_each_link():
    """No check of the last dimension: a single angle would be used for all links."""
    for shape in ((2,), (5, 4), (3, 1)):
        with pytest.raises(ValueError):
            PlanarArm().joints(torch.zeros(shape))


def test_a_joint_step_is_the_damped_inverse(draws):
    """The damping left out, not squared, or added to J^T J where J J^T is meant; the transpose taken
    for the inverse."""
    arm, angles = PlanarArm(), torch.rand(20, 3, generator=draws, dtype=torch.double) * 2 - 1
    displacement = torch.randn(20, 2, generator=draws, dtype=torch.double) * 5
    given = arm.joint_step(angles, displacement)
    assert given.shape == (20, 3), f"expected the shape (20, 3), got {tuple(given.shape)}"
    for pose, moved, step in zip(angles, displacement, given):
        J = arm.jacobian(pose).numpy()
        expected = J.T @ np.linalg.inv(J @ J.T + DAMPING ** 2 * np.eye(2)) @ moved.numpy()
        is_close(step, torch.from_numpy(expected), 1e-6, "the joint motion in rad")


def test_a_joint_step_keeps_the_dtype_of_its_angles():
    """The damping made as float32, which torch refuses to add to float64 or solves in float32."""
    for dtype in (torch.float32, torch.float64):
        step = PlanarArm().joint_step(torch.ones(5, 3, dtype=dtype), torch.ones(5, 2, dtype=dtype))
        assert step.dtype == dtype, f"expected {dtype}, got {step.dtype}"


# Part 5: the recipe ------------------------------------------------------------------------------

class Seeing(torch.nn.Module):
    """A conditioning of which no more than the encoder is asked."""

    def __init__(self):
        super().__init__()
        self.encoder = film.StateEncoder(2, sim_pusht.KEYPOINTS.tolist(), (256, 256, 0.8), width=1)


class Silent(torch.nn.Module):
    """A backbone that is never asked."""
    mixes_time = False
    config = dict(action_dim=2)


def test_acting_takes_arrays_and_refuses_what_is_no_number(draws):
    """Observations used without `read`, so arrays fail and NaN passes; no look at the actions, or
    only at the first of them, before they are returned."""
    scale = [30 + 12 * step for step in range(16)]
    policy = DiffusionPolicy(Seeing(), Silent(), scale, action_range=(0, 512)).eval()
    good = torch.rand(3, 2, 5, generator=draws) * 300 + 100
    policy.sample = lambda observations, generator=None: torch.zeros(len(observations), 16, 2)
    standing = policy.act(good.double().numpy())
    is_close(standing, good[:, -1:, :2].expand(3, 8, 2), 1e-3, "actions of a policy that stands")
    for bad in (good[0], good[:, :1], good[..., :4], good * math.nan, good * math.inf):
        with pytest.raises(ValueError):
            policy.act(bad)
    spoiled = torch.zeros(3, 16, 2)
    spoiled[2, 5, 1] = math.nan
    policy.sample = lambda observations, generator=None: spoiled
    with pytest.raises(FloatingPointError):
        policy.act(good)
