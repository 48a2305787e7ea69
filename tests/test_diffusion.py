"""The noise process against diffusers' recorded numbers, closed forms and its own invariants.

tests/data/diffusers_goldens.npz holds numbers recorded from diffusers 0.42 with the paper's
settings (100 steps, squared-cosine, epsilon, clip 1, fixed_small). Its trajectories used the
stand-in network predicted_noise = 0.3 x + 0.1 sin(t), which drives many values into the clip.
"""
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import DDPM, closed_form_denoiser, lesson


@pytest.fixture(scope="module")
def goldens():
    with np.load(Path(__file__).parent / "data" / "diffusers_goldens.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def stand_in(noisy_actions, timestep):
    return 0.3 * noisy_actions + 0.1 * np.sin(timestep)


def largest_difference(a, b):
    return (a - b).abs().max().item()


# Recorded reference data -----------------------------------------------------------------------

def test_schedule_equals_diffusers(goldens):
    ddpm = DDPM(100)
    assert ddpm.betas.dtype == ddpm.alphas_cumprod.dtype == torch.float32
    assert ddpm.betas.shape == ddpm.alphas_cumprod.shape == (100,)
    assert largest_difference(ddpm.betas, goldens["betas"]) < 1e-6
    assert largest_difference(ddpm.alphas_cumprod, goldens["alphas_cumprod"]) < 1e-6


def test_add_noise_equals_diffusers(goldens):
    noisy = DDPM(100).add_noise(goldens["x0"], goldens["noise"], goldens["timesteps"])
    assert largest_difference(noisy, goldens["noisy"]) < 1e-5


def test_ddpm_trajectory_equals_diffusers(goldens):
    """The whole run stays within 1e-5; most of that is diffusers' own float32 rounding."""
    ddpm, actions = DDPM(100), goldens["ddpm_start"]
    clipped = 0
    for timestep, expected in zip(range(99, -1, -1), goldens["ddpm_trajectory"]):
        noise, predicted = goldens["ddpm_noise_by_timestep"][timestep], stand_in(actions, timestep)
        clean = ddpm.predict_clean(predicted, timestep, actions)
        clipped += (clean.abs() == 1).sum().item()
        actions = ddpm.step(predicted, timestep, actions, noise)
        assert largest_difference(actions, expected) < 1e-5, f"timestep {timestep}"
    assert clipped > 1000    # otherwise the recording would not test the clip


def test_ddim_trajectory_equals_diffusers(goldens):
    ddpm, actions = DDPM(100), goldens["ddpm_start"]
    timesteps = goldens["ddim_timesteps"].tolist()
    assert list(ddpm.timesteps(10)) == timesteps
    for timestep, previous, expected in zip(timesteps, timesteps[1:] + [-1],
                                            goldens["ddim_trajectory"]):
        actions = ddpm.ddim_step(stand_in(actions, timestep), timestep, previous, actions)
        assert largest_difference(actions, expected) < 1e-5, f"timestep {timestep}"


@pytest.mark.parametrize("num_timesteps", [10, 100])
@pytest.mark.parametrize("num_steps", [None, 1, 3, 10])
def test_samplers_equal_diffusers_live(num_timesteps, num_steps):
    """Where diffusers is installed: other lengths, and step counts that do not divide evenly."""
    diffusers = pytest.importorskip("diffusers")
    settings = dict(num_train_timesteps=num_timesteps, beta_schedule="squaredcos_cap_v2",
                    clip_sample=True, prediction_type="epsilon")
    ddpm, shape = DDPM(num_timesteps), (3, 16, 2)
    ours = ddpm.sample(lambda x, t: stand_in(x, t[0].item()), shape, num_steps,
                       torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)    # they draw in the same order
    theirs = torch.randn(shape, generator=generator)
    if num_steps is None:
        scheduler = diffusers.DDPMScheduler(variance_type="fixed_small", **settings)
        scheduler.set_timesteps(num_timesteps)
    else:
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, **settings)
        scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == list(ddpm.timesteps(num_steps))
    for t in scheduler.timesteps:
        theirs = scheduler.step(stand_in(theirs, t.item()), t, theirs,
                                generator=generator).prev_sample
    assert largest_difference(ours, theirs) < 1e-5


# Closed form: for Gaussian data the best denoiser is known, and so is what a sampler makes of it --

MEAN, STD = 0.1, 0.2    # the clip at +-1 is 4.5 standard deviations away


def schedule64(num_timesteps):
    """alphas_cumprod in numpy float64, straight from Nichol & Dhariwal section 3.2."""
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


def best_denoiser(abar):
    """E[noise | noisy] for data N(MEAN, STD^2): elementwise and affine in the noisy actions."""
    abar = torch.from_numpy(abar).float()

    def denoiser(noisy_actions, timestep):
        a = abar[timestep][:, None, None]
        return ((1 - a).sqrt() * (noisy_actions - a.sqrt() * MEAN)
                / (a * STD ** 2 + 1 - a))
    return denoiser


def exact_mean_and_std(num_timesteps, num_steps=None):
    """Mean and standard deviation of a correct sampler's output, by recursion.

    With the best denoiser every step is x <- slope x + offset + sigma z. The predicted clean
    value is the data's posterior mean, m + k (x - sqrt(abar) m), k = sqrt(abar) s^2 / var(x).
    """
    abar = schedule64(num_timesteps)
    mean, variance = 0.0, 1.0
    steps = num_timesteps if num_steps is None else num_steps
    stride = num_timesteps // steps
    for t in [i * stride for i in range(steps)][::-1]:
        previous = abar[t - stride] if t >= stride else 1.0
        k = np.sqrt(abar[t]) * STD ** 2 / (abar[t] * STD ** 2 + 1 - abar[t])
        clean_slope, clean_offset = k, MEAN * (1 - k * np.sqrt(abar[t]))
        if num_steps is None:     # the product of two Gaussians gives the posterior
            alpha = abar[t] / previous
            sigma2 = 0.0 if t == 0 else 1 / (alpha / (1 - alpha) + 1 / (1 - previous))
            from_clean = 1.0 if t == 0 else sigma2 * np.sqrt(previous) / (1 - previous)
            from_noisy = 0.0 if t == 0 else sigma2 * np.sqrt(alpha) / (1 - alpha)
        else:                     # the same noise again, at the previous level
            from_noisy, sigma2 = np.sqrt((1 - previous) / (1 - abar[t])), 0.0
            from_clean = np.sqrt(previous) - from_noisy * np.sqrt(abar[t])
        slope, offset = from_clean * clean_slope + from_noisy, from_clean * clean_offset
        mean, variance = slope * mean + offset, slope ** 2 * variance + sigma2
    return mean, np.sqrt(variance)


def assert_sampler_follows_recursion(ddpm, denoiser, num_steps=None):
    """Mean and deviation of 400,000 values within 5 standard errors of the exact recursion."""
    samples = ddpm.sample(denoiser, (50_000, 4, 2), num_steps, torch.Generator().manual_seed(1))
    mean, std = exact_mean_and_std(ddpm.num_timesteps, num_steps)
    error = std / np.sqrt(samples.numel())
    assert abs(samples.mean().item() - mean) < 5 * error
    assert abs(samples.std().item() - std) < 5 * error / np.sqrt(2)


@pytest.mark.parametrize("num_timesteps, num_steps", [(100, None), (10, None), (1, None),
                                                      (100, 100), (100, 10), (100, 7)])
def test_gaussian_data_follows_the_exact_recursion(num_timesteps, num_steps):
    ddpm = DDPM(num_timesteps)
    assert_sampler_follows_recursion(ddpm, best_denoiser(schedule64(num_timesteps)), num_steps)


def test_a_correct_sampler_narrows_the_data():
    """Known values, so that nobody "repairs" the sampler towards the data's 0.200."""
    assert exact_mean_and_std(100)[1] == pytest.approx(0.1854, abs=1e-4)
    assert exact_mean_and_std(10)[1] == pytest.approx(0.1292, abs=1e-4)
    assert exact_mean_and_std(1000)[1] == pytest.approx(0.1981, abs=1e-4)


def test_the_recursion_catches_noise_at_the_last_step():
    ddpm = DDPM(100)
    ddpm.posterior_std[0] = ddpm.betas[0].sqrt()
    with pytest.raises(AssertionError):
        assert_sampler_follows_recursion(ddpm, best_denoiser(schedule64(100)))


def test_the_recursion_catches_a_timestep_off_by_one():
    denoiser = best_denoiser(schedule64(100))
    with pytest.raises(AssertionError):
        assert_sampler_follows_recursion(DDPM(100), lambda x, t: denoiser(x, (t - 1).clamp(min=0)))


def test_lesson_denoiser_with_one_gaussian_is_the_closed_form():
    ddpm, x = DDPM(100), torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0))
    denoiser = closed_form_denoiser(ddpm, torch.full((1, 4, 2), MEAN), STD)
    t = torch.tensor([0, 20, 50, 80, 99])
    assert largest_difference(denoiser(x, t), best_denoiser(schedule64(100))(x, t)) < 1e-5


def test_the_lesson_prints_what_the_recursion_says(tmp_path, capsys):
    """For data of the same mean and deviation as here; 0.0012 is 3.6 standard errors."""
    lesson(tmp_path)
    rows = re.findall(r"(\d+) timesteps\D+([\d.]+)", capsys.readouterr().out)
    assert rows
    for num_timesteps, std in rows:
        assert float(std) == pytest.approx(exact_mean_and_std(int(num_timesteps))[1], abs=1.2e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["diffusion.png"]


# Invariants ------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_timesteps", [1, 2, 100, 1000])
def test_alphas_cumprod_falls_inside_0_1(num_timesteps):
    abar = DDPM(num_timesteps).alphas_cumprod
    assert (abar > 0).all() and (abar <= 1).all() and (abar.diff() < 0).all()


def test_add_noise_mean_and_variance():
    """200,000 draws per timestep: mean and variance of Ho et al., Eq. (4), within 5 sigma."""
    ddpm, draws, abar = DDPM(100), 200_000, schedule64(100)
    noise = torch.randn(draws, 1, 1, generator=torch.Generator().manual_seed(2))
    for t in [0, 30, 60, 99]:
        noisy = ddpm.add_noise(torch.full_like(noise, 0.7), noise, torch.full((draws,), t)).double()
        variance = 1 - abar[t]
        assert abs(noisy.mean() - 0.7 * np.sqrt(abar[t])) < 5 * np.sqrt(variance / draws)
        assert abs(noisy.var() - variance) < 5 * variance * np.sqrt(2 / draws)


def test_predict_clean_undoes_add_noise_and_clips():
    ddpm, generator = DDPM(100), torch.Generator().manual_seed(3)
    clean = torch.rand(90, 16, 2, generator=generator) * 2 - 1
    noise, t = torch.randn(clean.shape, generator=generator), torch.arange(90)
    noisy = ddpm.add_noise(clean, noise, t)
    assert largest_difference(ddpm.predict_clean(noise, t, noisy), clean) < 1e-5
    outside = ddpm.predict_clean(noise, t, ddpm.add_noise(3 * clean, noise, t))
    assert largest_difference(outside, (3 * clean).clamp(-1, 1)) < 1e-5


@pytest.mark.parametrize("num_timesteps", [1, 7, 100])
def test_sampled_timesteps_are_the_trained_ones(num_timesteps):
    seen = []
    DDPM(num_timesteps).sample(lambda x, t: (seen.append(t), torch.zeros_like(x))[1], (3, 4, 2))
    assert all(t.shape == (3,) and t.dtype == torch.int64 and len(t.unique()) == 1 for t in seen)
    assert [t[0].item() for t in seen] == list(range(num_timesteps))[::-1]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 30, 99, 100])
def test_timesteps_descend_evenly_to_zero(num_steps):
    timesteps = list(DDPM(100).timesteps(num_steps))
    assert len(timesteps) == num_steps and timesteps[-1] == 0 and timesteps[0] < 100
    assert len(set(np.diff(timesteps))) <= 1


def test_last_step_is_deterministic_and_returns_the_clean_actions():
    ddpm, generator = DDPM(100), torch.Generator().manual_seed(4)
    noisy, predicted, noise = torch.randn(3, 5, 16, 2, generator=generator)
    last = ddpm.step(predicted, 0, noisy, noise)
    assert torch.equal(last, ddpm.step(predicted, 0, noisy, -100 * noise))
    assert largest_difference(last, ddpm.predict_clean(predicted, 0, noisy)) < 1e-6
    assert torch.equal(ddpm.ddim_step(predicted, 0, -1, noisy),
                       ddpm.predict_clean(predicted, 0, noisy))
    # and every earlier step does draw
    assert largest_difference(ddpm.step(predicted, 1, noisy, noise),
                              ddpm.step(predicted, 1, noisy, -noise)) > 0.01


def test_step_takes_one_timestep_for_all_or_one_for_each():
    ddpm, generator = DDPM(100), torch.Generator().manual_seed(4)
    predicted, noisy, noise = torch.randn(3, 4, 16, 2, generator=generator)
    together = ddpm.step(predicted, torch.tensor([3, 40, 0, 99]), noisy, noise)
    for i, timestep in enumerate([3, 40, 0, 99]):
        alone = ddpm.step(predicted[i:i + 1], timestep, noisy[i:i + 1], noise[i:i + 1])
        assert largest_difference(together[i:i + 1], alone) < 1e-6


def test_samplers_are_reproducible_and_ddim_draws_only_once():
    ddpm, denoiser = DDPM(100), best_denoiser(schedule64(100))
    for num_steps in [None, 10, 100]:
        first, again, other = (
            ddpm.sample(denoiser, (4, 16, 2), num_steps, torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert not first.requires_grad
    generator, reference = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    ddpm.sample(denoiser, (4, 16, 2), 100, generator)
    torch.randn(4, 16, 2, generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_nothing_to_save_and_nothing_to_train():
    assert not DDPM(100).state_dict() and not list(DDPM(100).parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_on_the_gpu_stays_there_and_follows_the_recursion():
    ddpm = DDPM(100).cuda()
    samples = ddpm.sample(closed_form_denoiser(ddpm, torch.full((1, 4, 2), MEAN).cuda(), STD),
                          (50_000, 4, 2), generator=torch.Generator("cuda").manual_seed(1))
    assert samples.is_cuda
    assert samples.std().item() == pytest.approx(exact_mean_and_std(100)[1], abs=0.001)


@pytest.mark.parametrize("num_timesteps", [0, -5])
def test_too_few_timesteps_is_an_error(num_timesteps):
    with pytest.raises(ValueError, match=f"at least 1, got {num_timesteps}"):
        DDPM(num_timesteps)


@pytest.mark.parametrize("num_steps", [0, -1, 101])
def test_number_of_steps_out_of_range_is_an_error(num_steps):
    ddpm = DDPM(100)
    with pytest.raises(ValueError, match=f"1..100, got {num_steps}"):
        ddpm.timesteps(num_steps)
    with pytest.raises(ValueError, match=f"1..100, got {num_steps}"):
        ddpm.sample(lambda x, t: x, (2, 4, 2), num_steps)
