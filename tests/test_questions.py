"""Tests that questions of the course need beside those of the project.

How such a test is written: it takes every right answer, however it is computed, so it allows for
another rounding, and it asks for the kind of an error, not for its wording. Its docstring names the
mistakes that it catches, in the first 240 letters, because students see them below a failure. Its
messages say what was expected and what was found. It draws numbers from `draws`, so that grading
asks with other numbers than the starter; and it needs little memory, whatever the mistake.

For each question there is a test of values, at other sizes than the default ones. It also looks at
the gradients and at what the function was given: see `is_close`, `same_gradients`, `unchanged`.
`OtherDevice` tells what is made on the wrong device where there is only a CPU.
"""
import contextlib
import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import film
import heads
import sim_pusht
import train
from diffusion import DDPM, DiffusionPolicy
from kinematics import DAMPING, PlanarArm

DATA = Path(__file__).parent / "data"
SEED = int(os.environ.get("QUESTION_SEED", "0"))


@pytest.fixture
def draws():
    """Random numbers: the same ones in each run of a starter, other ones in each grading."""
    return torch.Generator().manual_seed(SEED)


def is_close(given, expected, within, what):
    """Fails, and says what was expected and what was found, if two tensors are not nearly equal.

    within: a number, or a tensor with one for each place.
    """
    if given.shape != expected.shape:
        pytest.fail(f"{what}: expected the shape {tuple(expected.shape)}, got {tuple(given.shape)}")
    beyond = (given.detach().double() - expected.detach().double()).abs() - within
    worst = int(beyond.nan_to_num(nan=math.inf).argmax())
    where = tuple(int(i) for i in np.unravel_index(worst, beyond.shape))
    if not beyond.max() <= 0:     # also for NaN
        right, found = expected[where].item(), given[where].item()
        pytest.fail(f"{what}: at {where} expected {right:.7g}, got {found:.7g}, which differs by "
                    f"{found - right:.1g}")


def same_gradients(given, expected, what, **leaves):
    """Fails unless two tensors have nearly equal gradients with respect to each of the leaves.

    given: what the answer computed. expected: the same, computed here. leaves: {name: tensor}.
    """
    weights = torch.linspace(1, 2, expected.numel()).reshape(expected.shape)
    expected = torch.autograd.grad((expected * weights).sum(), leaves.values(), retain_graph=True)
    found = [None] * len(leaves)
    if given.requires_grad:
        found = torch.autograd.grad((given * weights).sum(), leaves.values(), retain_graph=True,
                                    allow_unused=True)
    for name, right, gradient in zip(leaves, expected, found):
        if gradient is None:
            pytest.fail(f"expected a gradient of {what} with respect to {name}, found none: is "
                        "there a detach, no_grad or item()?")
        is_close(gradient, right, 1e-3 * right.abs().max().item(),
                 f"the gradient of {what} with respect to {name}")


@contextlib.contextmanager
def unchanged(**given):
    """Fails if something that the answer was given {name: value} is changed at the end."""
    before = copy.deepcopy(given)
    yield
    for name, value in given.items():
        for old, new in zip(tree_leaves(before[name]), tree_leaves(value), strict=True):
            old, new = np.asarray(old), np.asarray(new)
            for where in np.argwhere(old != new)[:1]:
                where = tuple(where.tolist())
                pytest.fail(f"{name} was changed: at {where} expected {float(old[where]):.5g} as "
                            f"it was given, found {float(new[where]):.5g}")


def leaf(*shape, draws, dtype=torch.float64):
    """Random numbers of which gradients can be asked."""
    return torch.randn(*shape, generator=draws, dtype=dtype).requires_grad_()


class OtherDevice(TorchFunctionMode):
    """Pretends that there is a second device, OTHER. What is on it is in truth on the CPU.

    A tensor is there if it is made there, moved there, or computed from one that is there. As on a
    GPU, an operation on tensors of two devices is an error, but for indices and single numbers.
    """
    OTHER = torch.device("cuda", 7)

    def move(self, *things):
        """Mark tensors, or all tensors of modules, as there."""
        for thing in things:
            tensors = [thing]
            if isinstance(thing, nn.Module):
                tensors = [*thing.parameters(), *thing.buffers()]
            for tensor in tensors:
                tensor.is_there = True

    def is_there(self, tensor):
        return getattr(tensor, "is_there", False)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        devices = [torch.device(value) for value in given if isinstance(value, torch.device)
                   or isinstance(value, str) and value in ("cpu", str(self.OTHER))]
        if function == torch.Tensor.device.__get__ and self.is_there(args[0]):
            return self.OTHER
        if function == torch.device:
            return function(*args, **(kwargs or {}))
        known = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_)
        if function in (torch.Tensor.to, torch.Tensor.type_as) and len(tensors) == 2:
            result = function(*args, **(kwargs or {})).clone()     # goes to where the second one is
            result.is_there = self.is_there(tensors[1])
            return result
        there = {self.is_there(tensor) for tensor in tensors if tensor.dim()}
        if len(there) == 2 and function not in known:
            raise RuntimeError("expected all tensors on the given device, found one on another: "
                               f"{getattr(function, '__name__', function)}")
        args, kwargs = tree_map(lambda value: "cpu" if isinstance(value, (torch.device, str))
                                and str(value) == str(self.OTHER) else value, (args, kwargs or {}))
        result = function(*args, **kwargs)
        goes = function == torch.Tensor.cpu or devices == [torch.device("cpu")]
        if goes and tensors and isinstance(result, torch.Tensor):
            return result.clone()
        first = tensors[:1] if function in known else tensors
        if self.OTHER in devices or any(map(self.is_there, first)):
            self.move(*(value for value in tree_leaves(result) if isinstance(value, torch.Tensor)))
        return result


def is_on_the_other_device(mode, *tensors):
    """Fails if a tensor that an answer made is on the CPU, and not where its arguments are."""
    for tensor in tensors:
        assert mode.is_there(tensor), "expected the result on the given device, found it on the CPU"


def stays_on_its_device(method, h, m):
    """Fails if a mechanism's method puts its result on the CPU, and not where h and m are."""
    with OtherDevice() as mode:
        h, m = h.detach(), m.detach()
        mode.move(h, m)
        result = method(h, m)
    is_on_the_other_device(mode, result)


def other_schedule(num_timesteps=40):
    """A noise process that question 1.1 has not made: its betas grow by equal steps."""
    ddpm = DDPM()
    betas = torch.linspace(0.01, 0.3, num_timesteps, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    ddpm.num_timesteps = num_timesteps
    ddpm.betas, ddpm.alphas_cumprod = betas.float(), abar.float()
    ddpm.signal_scale, ddpm.noise_scale = abar.sqrt().float(), (1 - abar).sqrt().float()
    ddpm.posterior_clean = (before.sqrt() * betas / (1 - abar)).float()
    ddpm.posterior_noisy = ((1 - betas).sqrt() * (1 - before) / (1 - abar)).float()
    ddpm.posterior_std = ((1 - before) / (1 - abar) * betas).sqrt().float()
    return ddpm


# Part 1: the noise process -----------------------------------------------------------------------

def test_a_schedule_of_no_timesteps_is_refused():
    """No check of num_timesteps; a check that lets 0 or negative numbers pass."""
    for num_timesteps in (0, -5):
        with pytest.raises(ValueError):
            DDPM(num_timesteps)
    DDPM(1)


@pytest.mark.parametrize("num_timesteps", [1, 7, 1000])
def test_a_schedule_is_its_equations(num_timesteps):
    """The last beta without the clip at 0.999; f without its offset of 0.008, or not squared;
    float32 all along, which rounds 1 - f / f; alpha for abar; a variance for a deviation
    (posterior_std)."""
    u = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos(np.pi / 2 * (u + 0.008) / 1.008) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    abar = np.cumprod(1 - beta)
    before = np.append(1, abar[:-1])
    expected = dict(
        betas=beta, alphas_cumprod=abar, signal_scale=abar ** 0.5, noise_scale=(1 - abar) ** 0.5,
        posterior_clean=before ** 0.5 * beta / (1 - abar),
        posterior_noisy=(1 - beta) ** 0.5 * (1 - before) / (1 - abar),
        posterior_std=((1 - before) / (1 - abar) * beta) ** 0.5)
    ddpm = DDPM(num_timesteps)
    assert ddpm.num_timesteps == num_timesteps
    for name, values in expected.items():
        given, values = getattr(ddpm, name), torch.from_numpy(values)
        is_close(given, values, 1e-4 * values + 1e-9, f"{name}, {num_timesteps} timesteps")
        assert given.dtype == torch.float32, f"{name}: expected torch.float32, got {given.dtype}"


def test_a_schedule_is_in_no_file_and_moves_with_its_module():
    """Buffers that a policy's file would hold; tensors that are no buffers, and stay on the CPU
    when the policy moves; parameters, which would be trained."""
    ddpm = DDPM()
    saved = list(ddpm.state_dict())
    assert not saved, f"expected nothing to be saved to a file, found {saved}"
    trained = [name for name, _ in ddpm.named_parameters()]
    assert not trained, f"expected buffers, found the parameters {trained}"
    found = sorted(name for name, _ in ddpm.named_buffers())
    expected = sorted(["betas", "alphas_cumprod", "signal_scale", "noise_scale", "posterior_clean",
                       "posterior_noisy", "posterior_std"])
    assert set(expected) <= set(found), f"expected the buffers {expected}, found {found}"


def test_noise_is_added_by_any_schedule(draws):
    """The caller's actions or noise changed; a part of the result detached; abar without its root;
    100 timesteps, or their scales, where there is another schedule; one timestep for all
    samples."""
    ddpm, actions = other_schedule(), leaf(3, 5, 4, draws=draws, dtype=torch.float32)
    noise = leaf(3, 5, 4, draws=draws, dtype=torch.float32)
    for timesteps in (torch.tensor([39, 0, 17]), 23):
        which = torch.as_tensor(timesteps).expand(3)
        abar = ddpm.alphas_cumprod[which][:, None, None]
        expected = abar.sqrt() * actions + (1 - abar).sqrt() * noise
        with unchanged(actions=actions.detach(), noise=noise.detach(), timesteps=timesteps):
            ddpm.add_noise(actions.detach(), noise.detach(), timesteps)
        given = ddpm.add_noise(actions, noise, timesteps)
        is_close(given, expected, 1e-5, f"noisy actions, timesteps {timesteps}")
        same_gradients(given, expected, "the noisy actions", actions=actions, noise=noise)


def test_clean_actions_by_any_schedule(draws):
    """No clip, or of something else than the result; abar for its root; noise_scale and
    signal_scale swapped; what was given changed; a part detached; the scales of another
    schedule."""
    ddpm, predicted = other_schedule(), leaf(3, 5, 4, draws=draws, dtype=torch.float32)
    noisy = leaf(3, 5, 4, draws=draws, dtype=torch.float32)
    for timestep in (torch.tensor([30, 0, 9]), 5):
        which = torch.as_tensor(timestep).expand(3)
        abar = ddpm.alphas_cumprod[which][:, None, None]
        expected = ((noisy - (1 - abar).sqrt() * predicted) / abar.sqrt()).clamp(-1, 1)
        with unchanged(predicted_noise=predicted.detach(), noisy_actions=noisy.detach()):
            ddpm.predict_clean(predicted.detach(), timestep, noisy.detach())
        given = ddpm.predict_clean(predicted, timestep, noisy)
        is_close(given, expected, 1e-4, f"clean actions, timesteps {timestep}")
        same_gradients(given, expected, "the clean actions", predicted_noise=predicted,
                       noisy_actions=noisy)


def test_one_step_back_by_any_schedule(draws):
    """The weights of the posterior swapped; its variance for its deviation; noise in the last
    step; one timestep for the batch; no clip; what was given changed; a part detached; another
    schedule."""
    ddpm, tensors = other_schedule(), leaf(3, 4, 5, 3, draws=draws, dtype=torch.float32)
    predicted, noisy, noise = tensors.unbind(0)
    for timestep in (torch.tensor([0, 39, 20, 3]), 11):
        which = torch.as_tensor(timestep).expand(4)
        a, b, s, abar = (buffer[which][:, None, None] for buffer in
                         (ddpm.posterior_clean, ddpm.posterior_noisy, ddpm.posterior_std,
                          ddpm.alphas_cumprod))
        clean = ((noisy - (1 - abar).sqrt() * predicted) / abar.sqrt()).clamp(-1, 1)
        expected = a * clean + b * noisy + s * noise
        with unchanged(predicted_noise_noisy_actions_and_noise=tensors.detach()):
            ddpm.step(predicted.detach(), timestep, noisy.detach(), noise.detach())
        given = ddpm.step(predicted, timestep, noisy, noise)
        is_close(given, expected, 1e-4, f"actions after the step back from {timestep}")
        same_gradients(given, expected, "the actions", predicted_noise_noisy_and_noise=tensors)


def test_each_sample_has_the_noise_of_its_own_timestep(draws):
    """The scales without the two axes that (B,T,A) needs: they meet the wrong axis, or none. A
    scale for its square; signal and noise swapped."""
    # B == T == A: then a missing axis is no error
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
    with np.load(DATA / "diffusers_goldens.npz") as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file}
    ddpm, actions = DDPM(100), recorded["ddpm_start"]
    for timestep, expected in zip(range(99, -1, -1), recorded["ddpm_trajectory"]):
        predicted = 0.3 * actions + 0.1 * np.sin(timestep)
        noise = recorded["ddpm_noise_by_timestep"][timestep]
        actions = ddpm.step(predicted, timestep, actions, noise)
        is_close(actions, expected, 1e-4, f"actions after the step from timestep {timestep}")


def test_each_sample_steps_back_from_its_own_timestep(draws):
    """One timestep for the whole batch; scales on the wrong axis; an `if` that takes a tensor of
    timesteps for one number."""
    # B == T == A: then a missing axis is no error
    ddpm, timesteps = DDPM(), [3, 40, 0, 99]
    predicted, noisy, noise = torch.randn(3, 4, 4, 4, generator=draws)
    together = ddpm.step(predicted, torch.tensor(timesteps), noisy, noise)
    for i, timestep in enumerate(timesteps):
        alone = ddpm.step(predicted[i:i + 1], timestep, noisy[i:i + 1], noise[i:i + 1])
        is_close(together[i:i + 1], alone, 1e-4, f"sample {i}, timestep {timestep}")


def test_a_long_step_back_by_any_schedule(draws):
    """-1 taken for an index; clean actions for the step to 0 too; the noise derived again from
    clipped actions; the scales of the timestep for those of the previous one; no clip; what was
    given changed; a part detached."""
    ddpm, predicted = other_schedule(), leaf(3, 5, 4, draws=draws, dtype=torch.float32)
    noisy = leaf(3, 5, 4, draws=draws, dtype=torch.float32)
    for timestep, previous in ((39, 30), (30, 7), (7, 0), (4, -1)):
        abar = ddpm.alphas_cumprod[timestep]
        clean = ((noisy - (1 - abar).sqrt() * predicted) / abar.sqrt()).clamp(-1, 1)
        before = ddpm.alphas_cumprod[previous] if previous >= 0 else torch.tensor(1.0)
        expected = before.sqrt() * clean + (1 - before).sqrt() * predicted
        with unchanged(predicted_noise=predicted.detach(), noisy_actions=noisy.detach()):
            ddpm.ddim_step(predicted.detach(), timestep, previous, noisy.detach())
        given = ddpm.ddim_step(predicted, timestep, previous, noisy)
        is_close(given, expected, 1e-4, f"the step from {timestep} to {previous}")
        leaves = dict(predicted_noise=predicted, noisy_actions=noisy)
        if previous < 0:     # where nothing but the clipped actions counts
            leaves.pop("predicted_noise")
        same_gradients(given, expected, "the actions", **leaves)


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
    another sample; gamma and beta taken from one vector's halves."""
    # B == T == D: then a missing axis is no error.
    h, m = torch.randn(4, 4, 4, generator=draws), torch.randn(4, 2, 1, 4, generator=draws)
    expected = torch.stack([m[b, 0] * h[b] + m[b, 1] for b in range(4)])
    if layout == "steps_first":
        given = film.FiLM().modulate(h.clone(), m.clone())
    else:
        given = film.FiLM().modulate(h.mT.clone(), m.mT.clone()).mT
    is_close(given, expected, 1e-5, "features")
    stays_on_its_device(film.FiLM().modulate, h, m)


@pytest.mark.parametrize("layout", ["steps_first", "channels_first"])
def test_film_hands_on_gradients_and_leaves_its_modulation(layout, draws):
    """gamma, beta or h detached, or all under no_grad: then nothing behind FiLM learns. The
    modulation changed, which is the caller's; a size that only fits B == T == D."""
    h, m = leaf(2, 5, 3, draws=draws), leaf(2, 2, 1, 3, draws=draws)
    expected = m[:, 0] * h + m[:, 1]
    if layout == "channels_first":
        def modulate(h, m):
            return film.FiLM().modulate(h.mT.clone(), m.mT).mT
    else:
        def modulate(h, m):
            return film.FiLM().modulate(h.clone(), m)
    with unchanged(modulation=m.detach()):
        modulate(h.detach(), m.detach())
    given = modulate(h, m)
    is_close(given, expected, 1e-5, "features")
    same_gradients(given, expected, "FiLM's features", h=h, m=m)


@pytest.mark.parametrize("layout", ["steps_first", "channels_first"])
def test_a_gate_is_its_equation(layout, draws):
    """1 + alpha, or x added, which the block does; gamma for alpha; a sigmoid; a missing axis,
    where B == T == D; alpha or h detached, or all under no_grad; the modulation changed."""
    for B, T, D in ((4, 4, 4), (2, 5, 3)):
        h, m = leaf(B, T, D, draws=draws), leaf(B, 3, 1, D, draws=draws)
        expected = torch.stack([m[b, 2] * h[b] for b in range(B)])
        if layout == "channels_first":
            def gate(h, m):
                return film.AdaLNZero().gate(h.mT.clone(), m.mT).mT
        else:
            def gate(h, m):
                return film.AdaLNZero().gate(h.clone(), m)
        with unchanged(modulation=m.detach()):
            gate(h.detach(), m.detach())
        given = gate(h, m)
        is_close(given, expected, 1e-5, "the gated branch")
        same_gradients(given, expected, "the gated branch", h=h, m=m)
    stays_on_its_device(film.AdaLNZero().gate, h, m)


@pytest.mark.parametrize("dim", [4, 12, 30])
def test_a_sinusoid_of_any_size_and_any_timestep(dim):
    """Right for small timesteps alone: angles cut at pi, or timesteps at 3; one rate less or more;
    rates of another size; cosines first; another base than 10,000; what was given changed."""
    timestep = torch.tensor([0, 1, 2, 4, 17, 99, 100, 999])
    n = dim // 2
    w = 10_000.0 ** (-torch.arange(n).double() / (n - 1))
    angles = timestep[:, None] * w
    expected = torch.cat([angles.sin(), angles.cos()], 1)
    with unchanged(timestep=timestep):
        given = heads.TimeEncoder(dim, learned=False)(timestep)
    for k, row, right in zip(timestep.tolist(), given, expected, strict=True):
        is_close(row, right, 1e-3, f"sines, then cosines, of timestep {k}")


def test_the_layers_on_the_sinusoid_learn(draws):
    """The layers (self.mlp) forgotten; detached, or under no_grad, so that they get no gradient in
    stage 1; a tensor made on another device than the timestep's."""
    timestep, encoder = torch.randint(100, (7,), generator=draws), heads.TimeEncoder(12)
    w = 10_000.0 ** (-torch.arange(6).double() / 5)
    angles = timestep[:, None] * w
    expected = encoder.mlp(torch.cat([angles.sin(), angles.cos()], 1).float())
    given = encoder(timestep)
    is_close(given, expected, 1e-3, "tau, with the layers")
    same_gradients(given, expected, "tau", **{name.replace(".", "_"): weight for name, weight
                                              in encoder.named_parameters()})
    with OtherDevice() as mode:
        mode.move(encoder, timestep)
        given = encoder(timestep)
    is_on_the_other_device(mode, given)


class Four(film.Encoder):
    """An encoder of which the generators need the sizes."""
    steps, size = 2, 2


@pytest.mark.parametrize("B, K", [(3, 1), (4, 2), (2, 5)])
@pytest.mark.parametrize("mechanism", [film.Additive, film.FiLM, film.AdaLNZero])
def test_generators_of_any_sizes(mechanism, B, K, draws):
    """K (draws) taken from anything but len(tau) and len(o); draws tiled, not next to each other;
    vectors interleaved, not one after the other; equal widths assumed; Mish forgotten, or
    written into o or tau; o, tau or a product detached."""
    V, widths = len(mechanism.identity), [3, 5, 2]
    pathway = film.Conditioning(Four(), 6, widths, mechanism).double()
    W, b, U = (nn.Parameter(torch.randn(weight.shape, generator=draws, dtype=torch.double))
               for weight in (pathway.observation_part.weight, pathway.observation_part.bias,
                              pathway.time_part.weight))
    pathway.observation_part.weight, pathway.observation_part.bias = W, b
    pathway.time_part.weight = U
    o, tau = leaf(B, 4, draws=draws), leaf(B * K, 6, draws=draws)
    mish = [x * torch.tanh(F.softplus(x)) for x in (o, tau)]
    rows = torch.stack([W @ mish[0][row // K] + b + U @ mish[1][row] for row in range(B * K)])
    with unchanged(o=o.detach(), tau=tau.detach()):
        pathway(o.detach(), tau.detach())
    modulations, start = pathway(o, tau), 0
    assert len(modulations) == 3, f"expected 3 modulations, got {len(modulations)}"
    for r, (given, width) in enumerate(zip(modulations, widths)):
        expected = rows[:, start:start + V * width].reshape(B * K, V, 1, width)
        is_close(given, expected, 1e-5, f"modulation {r}, for K = {K} draws of each observation")
        same_gradients(given, expected, f"modulation {r}", o=o, tau=tau, observation_part_weight=W,
                       observation_part_bias=b, time_part_weight=U)
        start += V * width
    with OtherDevice() as mode:
        o, tau = o.detach(), tau.detach()
        mode.move(pathway, o, tau)
        modulations = pathway(o, tau)
    is_on_the_other_device(mode, *modulations)


# Part 3: heads -----------------------------------------------------------------------------------

class Hooks(film.Mechanism):
    """Three methods that can be told from each other, and that keep what they are given."""

    def after_norm(self, h, m):
        self.normed = h
        return 5 - h * m

    def modulate(self, h, m):
        self.hidden, self.modulated = h, 2 * h + m
        return self.modulated

    def gate(self, h, m):
        self.branch, self.gated = h, m - 3 * h
        return self.gated


def test_a_block_is_its_equation(draws):
    """The tanh form of GELU, or ReLU; no shortcut; the norm before the sum; a method of the
    mechanism at another place; x changed; x, the branch or the modulation detached, so that
    weights get no gradient."""
    block = heads.MLPBlock(Hooks(), 6, 11, dropout=0.5).double().eval()
    x, m = leaf(2, 3, 6, draws=draws), leaf(2, 1, 1, draws=draws)
    with torch.no_grad():     # so large that the two forms of GELU differ
        for weight in block.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draws) * 1.5)
    a = block.up(x)
    hidden = 2 * (a * (1 + torch.erf(a / math.sqrt(2))) / 2) + m
    gated = m - 3 * block.down(hidden)
    expected = 5 - block.norm(x + gated) * m
    with unchanged(x=x.detach(), modulation=m.detach()):
        block(x.detach(), m.detach())
    given = block(x, m)
    is_close(block.mechanism.hidden, a * (1 + torch.erf(a / math.sqrt(2))) / 2, 1e-6,
             "what is modulated, GELU (the exact one, not the tanh form)")
    is_close(given, expected, 1e-6, "what the block puts out")
    weights = {name.replace(".", "_"): weight for name, weight in block.named_parameters()}
    same_gradients(given, expected, "what the block puts out", x=x, modulation=m, **weights)


def is_dropped(given, plain, rate, what):
    """Fails unless each number is 0, in a share of `rate` of them, or as it was, over 1 - rate."""
    kept = given != 0
    share = 1 - kept.double().mean().item()
    if abs(share - rate) > 0.05:
        pytest.fail(f"{what}: expected dropout of rate {rate}, found {share:.2f} of the numbers at "
                    "zero; is it at another place?")
    is_close(given, torch.where(kept, plain / (1 - rate), 0.0), 1e-4,
             f"{what}: dropout rescales what it keeps by 1 / (1 - rate)")


@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_a_block_drops_its_wide_layer_and_its_branch(rate):
    """Dropout after FiLM, on what goes in, or on the sum; of another rate; without rescaling; in
    eval mode too."""
    torch.manual_seed(SEED)
    block, x = heads.MLPBlock(Hooks(), 64, 128, dropout=rate), torch.randn(8, 16, 64)
    hooks, m = block.mechanism, torch.tensor(0.5)
    with torch.no_grad():
        for training in (True, False):
            given = block.train(training)(x, m)
            rate = rate if training else 0
            where = "in train mode" if training else "in eval mode"
            is_dropped(hooks.hidden, F.gelu(block.up(x)), rate, f"what is modulated, {where}")
            is_dropped(hooks.branch, block.down(hooks.modulated), rate, f"what is gated, {where}")
            is_close(given, 5 - block.norm(x + hooks.gated) * m, 1e-4,
                     f"norm of the sum, {where}, where dropout acts before the gate alone")


def test_a_mask_of_any_size():
    """Later steps seen; a step that does not see itself; the condition's tokens causal, or seeing
    actions; a number of tokens that is assumed; numbers in place of bool; not on the given
    device."""
    for steps, in_front in ((1, 0), (1, 1), (7, 0), (7, 4), (7, 7), (20, 5)):
        given = heads.causal_mask(steps, in_front, "cpu")
        assert given.dtype == torch.bool, f"expected torch.bool, got {given.dtype}"
        assert given.shape == (steps, steps), f"expected {steps} x {steps}, got {given.shape}"
        for i, row in enumerate(given.tolist()):
            expected = [j <= i or i < in_front and j < in_front for j in range(steps)]
            assert row == expected, (
                f"{steps} steps, {in_front} of them tokens of the condition, step {i}: expected "
                f"{expected}, got {row}")
    with OtherDevice() as mode:
        given = heads.causal_mask(4, 2, OtherDevice.OTHER)
    is_on_the_other_device(mode, given)


@pytest.mark.parametrize("heads_each, D", [(1, 6), (3, 6), (2, 16)])
def test_attention_is_its_equation(heads_each, D, draws):
    """The root of D, or no root (sqrt), where that of D / heads is meant; keys for values; heads
    mixed up with steps; the mask upside down; dropout in eval mode; what was given changed; a
    part detached."""
    layer = heads.Attention(D, heads_each, dropout=0.5).double().eval()
    x, source = leaf(2, 3, D, draws=draws), leaf(2, 5, D, draws=draws)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draws))
    mask = torch.ones(3, 5, dtype=torch.bool).tril(1)
    d, mixed = D // heads_each, []
    all_of_them = layer.query(x), *layer.key_value(source).split(D, -1)
    for head in range(heads_each):
        query, key, value = (part[..., head * d:head * d + d] for part in all_of_them)
        scores = (query @ key.mT / math.sqrt(d)).masked_fill(~mask, -math.inf)
        mixed.append(scores.softmax(-1) @ value)
    expected = layer.output(torch.cat(mixed, -1))
    with unchanged(x=x.detach(), source=source.detach(), mask=mask):
        layer(x.detach(), source.detach(), mask)
    given = layer(x, source, mask)
    is_close(given, expected, 1e-6, f"attention with {heads_each} heads, in eval mode")
    weights = {name.replace(".", "_"): weight for name, weight in layer.named_parameters()}
    same_gradients(given, expected, "attention", x=x, source=source, **weights)


@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_attention_drops_its_weights(rate):
    """Dropout on values, or on what comes out, where the softmax's weights are meant; of another
    rate; without rescaling.

    Features j and j + 8 of a head's values are 1 in step j of the source, 0 in the others: so
    both show the weight of step j.
    """
    torch.manual_seed(SEED)
    layer, source = heads.Attention(32, 2, rate), torch.randn(4, 8, 32)
    source[..., :8] = torch.eye(8)
    with torch.no_grad():
        weight, bias = layer.key_value.weight, layer.key_value.bias
        weight[32:], bias[32:] = torch.eye(8, 32).repeat(4, 1), 0
        layer.output.weight.copy_(torch.eye(32))
        layer.output.bias.zero_()
        x, mask = torch.randn(4, 40, 32), torch.ones(40, 8, dtype=torch.bool)
        query, keys_and_values = layer.query(x), layer.key_value(source)
        query, key = query.unflatten(-1, (2, 16)), keys_and_values[..., :32].unflatten(-1, (2, 16))
        plain = (torch.einsum("bthd,bshd->bths", query, key) / 4).softmax(-1)     # (4,40,2,8)
        given = layer.train()(x, source, mask).unflatten(-1, (2, 2, 8))
    one, other = given.unbind(-2)
    is_dropped(one, plain, rate, "the weights, in train mode")
    is_close(other, one, 1e-4, "two features with the same values, as dropout acts on the weights")


# Part 4: kinematics ------------------------------------------------------------------------------

def test_joints_need_an_angle_for_each_link():
    """No ValueError for too few or too many angles: more than N would be cut, a single one would
    be used for all links."""
    for shape in ((2,), (5, 4), (3, 1), (0,)):
        with pytest.raises(ValueError):
            PlanarArm().joints(torch.zeros(shape))


ARMS = [((300.0, 250.0, 120.0), (256.0, -60.0)), ((400.5, 400.5), (0.0, 0.0)),
        ((201.3, 350.7, 90.1, 120.9), (250.5, -50.25))]


def links_of(angles, lengths):
    """Vectors (...,N,2) of the links, and the directions (...,N) in which they point."""
    heading = torch.stack([angles[..., :n + 1].sum(-1) for n in range(len(lengths))], -1)
    length = torch.tensor(lengths, dtype=angles.dtype)
    return torch.stack([length * heading.cos(), length * heading.sin()], -1)


def jacobian_of(angles, lengths):
    """The Jacobian (...,2,N): what joint n moves are link n and the links after it."""
    links = links_of(angles, lengths)
    x, y = (torch.stack([links[..., n:, axis].sum(-1) for n in range(len(lengths))], -1)
            for axis in (0, 1))
    return torch.stack([-y, x], -2)


@pytest.mark.parametrize("lengths, base", ARMS)
def test_joints_of_any_arm_in_any_shape(lengths, base, draws):
    """Another arm or base assumed; absolute angles, where each counts from the link before it;
    float32 for float64; the angles changed; detached, or under no_grad; a part made on the CPU
    alone."""
    arm, N = PlanarArm(lengths, base), len(lengths)
    for shape in ((), (4,), (3, 2), (0,)):
        angles = leaf(*shape, N, draws=draws)
        start = torch.tensor(base).double().expand(*shape, 1, 2)
        expected = torch.cat([start, start + links_of(angles, lengths).cumsum(-2)], -2)
        with unchanged(angles=angles.detach()):
            arm.joints(angles.detach())
        given = arm.joints(angles)
        assert given.dtype == torch.float64, f"expected float64 for float64, got {given.dtype}"
        if angles.numel():
            is_close(given, expected, 1e-9, f"joints of angles {tuple(angles.shape)}, float64")
            same_gradients(given, expected, "the joints", angles=angles)
    with OtherDevice() as mode:
        angles = angles.detach()
        mode.move(angles)
        given = arm.joints(angles)
    is_on_the_other_device(mode, given)


@pytest.mark.parametrize("lengths, base", ARMS)
def test_a_jacobian_is_its_equation(lengths, base, draws):
    """The other sign (turned the other way round); the arrow from the next joint; joints before x
    and y, or reshaped where they should be turned; a number of links that is assumed; float32;
    detached."""
    arm, N = PlanarArm(lengths, base), len(lengths)
    for shape in ((), (4,), (3, 2)):
        angles = leaf(*shape, N, draws=draws)
        expected = jacobian_of(angles, lengths)
        with unchanged(angles=angles.detach()):
            arm.jacobian(angles.detach())
        given = arm.jacobian(angles)
        is_close(given, expected, 1e-9, f"the Jacobian, float64, of angles {tuple(angles.shape)}")
        same_gradients(given, expected, "the Jacobian", angles=angles)


@pytest.mark.parametrize("lengths, base", ARMS)
def test_a_joint_step_of_any_arm(lengths, base, draws):
    """Damping left out, or not squared; the transpose for the inverse; the Jacobian of one pose
    for all; what was given changed; a part detached; a part made on another device than the
    angles'."""
    arm, N = PlanarArm(lengths, base), len(lengths)
    angles, displacement = leaf(6, N, draws=draws), leaf(6, 2, draws=draws)
    with torch.no_grad():
        displacement *= 5
        angles[0, 1:] = 0     # stretched out: where only the damping helps
    J = jacobian_of(angles, lengths)
    inner = torch.linalg.inv(J @ J.mT + DAMPING ** 2 * torch.eye(2).double())
    expected = (J.mT @ inner @ displacement[..., None])[..., 0]
    with unchanged(angles=angles.detach(), displacement=displacement.detach()):
        arm.joint_step(angles.detach(), displacement.detach())
    given = arm.joint_step(angles, displacement)
    is_close(given, expected, 1e-7, f"the joint motion in rad of an arm of {N} links")
    same_gradients(given, expected, "the joint motion", angles=angles, displacement=displacement)
    with OtherDevice() as mode:
        angles, displacement = angles.detach(), displacement.detach()
        mode.move(angles, displacement)
        given = arm.joint_step(angles, displacement)
    is_on_the_other_device(mode, given)


def test_a_joint_step_is_the_damped_inverse(draws):
    """The damping left out, not squared, or added to J^T J where J J^T is meant; the transpose
    taken for the inverse."""
    arm, angles = PlanarArm(), torch.rand(20, 3, generator=draws, dtype=torch.double) * 2 - 1
    displacement = torch.randn(20, 2, generator=draws, dtype=torch.double) * 5
    given = arm.joint_step(angles, displacement)
    assert given.shape == (20, 3), f"expected the shape (20, 3), got {tuple(given.shape)}"
    for pose, moved, step in zip(angles, displacement, given):
        J = arm.jacobian(pose).numpy()
        expected = J.T @ np.linalg.inv(J @ J.T + DAMPING ** 2 * np.eye(2)) @ moved.numpy()
        is_close(step, torch.from_numpy(expected), 1e-6, "the joint motion in rad")


def test_a_joint_step_keeps_the_dtype_of_its_angles():
    """A result of another dtype than the angles, as where the damping's float32 decides it."""
    for dtype in (torch.float32, torch.float64):
        step = PlanarArm().joint_step(torch.ones(5, 3, dtype=dtype), torch.ones(5, 2, dtype=dtype))
        assert step.dtype == dtype, f"expected {dtype}, got {step.dtype}"


# Part 5: the recipe ------------------------------------------------------------------------------

class SmallBackbone(nn.Module):
    """Weights of all kinds: its own, of children and of their children, matrices and biases."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.ones(3))
        self.time_encoder = nn.Sequential(nn.Linear(3, 3), nn.Mish(), nn.Linear(3, 3))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(up=nn.Linear(3, 3), norm=nn.LayerNorm(3)))
                                    for _ in range(2))

    def forward(self, x, m):
        x = self.own * x + self.time_encoder(x)
        for block in self.blocks:
            x = block["norm"](x + m * block["up"](x))
        return x


def test_freezing_stops_every_weight_and_no_gradient(draws):
    """The time encoder, biases, or weights that are in no child left out; eval alone; values of
    weights changed; weights of the conditioning frozen; no gradient through the backbone to the
    conditioning."""
    backbone, conditioning = SmallBackbone(), nn.Linear(3, 3)
    with unchanged(values_of_the_weights=dict(backbone.state_dict())):
        train.freeze(backbone)
    left = [name for name, weight in backbone.named_parameters() if weight.requires_grad]
    assert not left, f"expected no weight with requires_grad, found {left}"
    frozen = [name for name, weight in conditioning.named_parameters() if not weight.requires_grad]
    assert not frozen, f"expected the conditioning to be trained, found frozen: {frozen}"
    x, seen = torch.randn(2, 4, 3, generator=draws)
    moved = backbone(x, conditioning(seen))
    assert moved.requires_grad, "expected gradients to go through the backbone, found none"
    moved.square().sum().backward()
    assert conditioning.weight.grad is not None and conditioning.weight.grad.abs().max() > 0, (
        "expected a gradient of the conditioning, through the frozen backbone, found none")


@pytest.mark.parametrize("first, length", [(-1, 16), (-3, 2), (0, 1), (2, 5)])
def test_windows_of_any_length_from_any_first_frame(first, length):
    """Frames of the episode before, or after; an end that counts as its last frame; all frames of
    the file, where those of the episodes count; first or length assumed; the demonstrations
    changed."""
    ends = [4, 5, 11]
    demonstrations = dict(state=np.zeros((15, 5)), action=np.zeros((15, 2)),
                          episode_ends=np.array(ends))
    with unchanged(demonstrations=demonstrations):
        given = train.windows(demonstrations, first, length, "cpu")
    assert given.shape == (11, length), (
        f"expected the shape (11, {length}) for 11 frames that count, got {tuple(given.shape)}")
    assert not given.is_floating_point(), f"expected whole numbers, got {given.dtype}"
    for frame, window in enumerate(given.tolist()):
        start, end = next((s, e) for s, e in zip([0, *ends], ends) if frame < e)
        expected = [min(max(frame + first + j, start), end - 1) for j in range(length)]
        assert window == expected, (
            f"frame {frame} of an episode from {start} to {end - 1}, first = {first}: expected the "
            f"window {expected}, got {window}")


def test_windows_are_on_the_device():
    """The device ignored; a part made on another device, which fails on a GPU."""
    demonstrations = dict(state=np.zeros((5, 5)), action=np.zeros((5, 2)),
                          episode_ends=np.array([2, 5]))
    with OtherDevice() as mode:
        given = train.windows(demonstrations, -1, 3, OtherDevice.OTHER)
    is_on_the_other_device(mode, given)


@pytest.mark.parametrize("cap", [0.4, 0.999])
def test_the_average_of_all_tensors(cap, draws):
    """The first tensor alone; num_averaged counted up in the loop; the decay of update n, or
    without its cap, or swapped with 1 - decay; no change in place; weights changed; no_grad
    forgotten, so that the average holds a graph."""
    for num_averaged in (1, torch.tensor(2), torch.tensor([7]), 500):
        averages = [torch.randn(shape, generator=draws) for shape in ((2, 3), (4,), (), (1, 5))]
        weights = [nn.Parameter(torch.randn(mean.shape, generator=draws)) for mean in averages]
        n = int(num_averaged) - 1
        d = min(cap, 1 - (1 + n) ** -0.75)
        expected = [d * mean + (1 - d) * weight.detach() for mean, weight in zip(averages, weights)]
        with unchanged(weights=[weight.detach() for weight in weights], num_averaged=num_averaged):
            train.ema_update(cap, averages, weights, num_averaged)
        for i, (mean, right) in enumerate(zip(averages, expected, strict=True)):
            is_close(mean, right, 1e-5, f"average of tensor {i}, in place, update {n}, cap {cap}")
            assert not mean.requires_grad, "expected an average without a graph: where is no_grad?"


class LearningEncoder(film.Encoder):
    """An encoder with a weight that both terms of the loss depend on."""

    def __init__(self, A, draws):
        super().__init__()
        self.eye = nn.Parameter(torch.randn(A, generator=draws) / 3)

    def agent_position(self, observations):
        return observations[:, -1]

    def perceive(self, observations):
        return observations * self.eye

    def auxiliary_loss(self, perceived):
        return perceived.square().mean() / 3


class LearningConditioning(nn.Module):
    """o is made once for each observation; its K copies stand next to each other."""

    def __init__(self, A, draws):
        super().__init__()
        self.encoder = LearningEncoder(A, draws)
        self.generator = nn.Parameter(torch.randn(2 * A, A, generator=draws) / 3)

    def encode(self, perceived):
        return perceived.flatten(1) @ self.generator

    def forward(self, o, tau):
        return (o.repeat_interleave(len(tau) // len(o), dim=0) + tau)[:, None]


class LearningBackbone(nn.Module):
    """Keeps what it is given, and predicts something that depends on all of it."""
    mixes_time = False
    config = dict(action_dim=3)

    def __init__(self, draws):
        super().__init__()
        self.time, self.mix = (nn.Parameter(torch.rand(1, generator=draws) / 2 + 0.1)
                               for _ in range(2))

    def time_encoder(self, timestep):
        self.timestep = timestep
        return (timestep[:, None] * self.time / 20).sin() / 3

    def forward(self, noisy_actions, condition, steps=None):
        self.noisy, self.steps = noisy_actions, steps
        return self.mix * noisy_actions + condition


def learning_policy(draws, **settings):
    """A small policy of which every part learns: T = 5, A = 3, a schedule of 40 timesteps."""
    policy = DiffusionPolicy(LearningConditioning(3, draws), LearningBackbone(draws),
                             [20, 30, 40, 50, 60], (0, 512), executed_actions=2, **settings)
    policy.ddpm = other_schedule()
    return policy


@pytest.mark.parametrize("agent_given", [False, True])
@pytest.mark.parametrize("K, loss_steps", [(1, None), (3, None), (2, 2)])
def test_the_loss_and_its_gradients(K, loss_steps, agent_given, draws):
    """o, the prediction or the second term detached: then the encoder never learns. The absolute
    error; clean actions for the target, which is noise; draws tiled, not next to each other;
    the agent that is given forgotten; actions changed."""
    torch.manual_seed(SEED)
    policy = learning_policy(draws, noise_samples=K, loss_steps=loss_steps)
    observations = torch.randn(6, 2, 3, generator=draws) * 2
    actions = observations[:, -1:] + torch.randn(6, 5, 3, generator=draws) * 30
    agent = observations[:, 0] + 9 if agent_given else observations[:, -1]
    with unchanged(observations=observations, actions=actions, agent=agent):
        given = policy.loss(observations, actions, *([agent] if agent_given else []))
    assert given.shape == (), f"expected a single number, got the shape {tuple(given.shape)}"
    clean = policy.normalise(actions, agent).repeat_interleave(K, dim=0)
    backbone, conditioning = policy.backbone, policy.conditioning
    timestep, noisy, steps = backbone.timestep, backbone.noisy.detach(), backbone.steps
    assert len(timestep) == 6 * K, f"expected {6 * K} draws for 6 observations, got {len(timestep)}"
    if steps is not None:
        clean = clean.gather(1, steps[..., None].expand(-1, -1, 3))
    abar = policy.ddpm.alphas_cumprod[timestep][:, None, None]
    noise = (noisy - abar.sqrt() * clean) / (1 - abar).sqrt()
    perceived = conditioning.encoder.perceive(observations)
    o = conditioning.encode(perceived).repeat_interleave(K, dim=0)
    predicted = backbone(noisy, (o + backbone.time_encoder(timestep))[:, None], steps)
    expected = (predicted - noise).square().mean() + conditioning.encoder.auxiliary_loss(perceived)
    is_close(given, expected, 1e-4 * expected.item(),
             "the loss, mean square of predicted - drawn noise, and the encoder's term")
    same_gradients(given, expected, "the loss", **{
        name.replace(".", "_"): weight for name, weight in policy.named_parameters()})


def test_the_loss_draws_every_timestep_there_is(draws):
    """100 timesteps, where there are num_timesteps; timestep 0, or the last one, never drawn; one
    timestep for a batch."""
    torch.manual_seed(SEED)
    policy, found = learning_policy(draws, noise_samples=4), []
    for _ in range(50):
        policy.loss(torch.zeros(8, 2, 3), torch.randn(8, 5, 3, generator=draws))
        found.append(policy.backbone.timestep)
    counts = torch.cat(found).bincount(minlength=40)     # of each 40, on average
    assert len(counts) == 40, f"expected timesteps 0 to 39, found {len(counts) - 1}"
    for timestep, count in enumerate(counts.tolist()):
        assert 5 < count < 100, f"timestep {timestep}: expected about 40 draws, got {count}"
    assert all(len(set(drawn.tolist())) > 1 for drawn in found), (
        "expected a timestep for each draw, found one for a whole batch")


def test_the_loss_draws_on_the_policy_s_device(draws):
    """Noise or timesteps made on the CPU, which fails on a GPU."""
    policy, observations = learning_policy(draws, noise_samples=2), torch.randn(4, 2, 3)
    actions = torch.randn(4, 5, 3)
    with OtherDevice() as mode:
        mode.move(policy, observations, actions)
        given = policy.loss(observations, actions)
    is_on_the_other_device(mode, given)


class Seeing(nn.Module):
    """A conditioning of which no more than the encoder is asked."""

    def __init__(self, obs_steps=2):
        super().__init__()
        self.encoder = film.StateEncoder(obs_steps, sim_pusht.KEYPOINTS.tolist(), (256, 256, 0.8),
                                         width=1)


class Silent(nn.Module):
    """A backbone that is never asked."""
    mixes_time = False
    config = dict(action_dim=2)


@pytest.mark.parametrize("obs_steps, executed", [(3, 4), (1, 10), (2, 1)])
def test_acting_by_other_settings(obs_steps, executed, draws):
    """The first executed step hard-coded, or one step early; a fixed number Ta of actions; the
    ends of the board (low, high) hard-coded, or actions beyond it; the generator dropped; the
    observations changed; no_grad forgotten."""
    policy = DiffusionPolicy(Seeing(obs_steps), Silent(), [30 + 12 * step for step in range(10)],
                             (150, 300), obs_steps, executed)
    observations = torch.rand(3, obs_steps, 5, generator=draws) * 300 + 100
    chunk, asked = torch.randn(3, 10, 2, generator=draws).requires_grad_(), []

    def sample(observations, generator=None):
        asked.append(generator)
        return chunk * 1

    policy.sample = sample
    with unchanged(observations=observations):
        given = policy.act(observations, draws)
    assert asked == [draws], "expected one call of sample, with the generator, found another"
    targets = chunk.detach() * policy.action_scale + observations[:, -1:, :2]
    expected = targets[:, obs_steps - 1:obs_steps - 1 + executed].clamp(150, 300)
    is_close(given, expected, 1e-3, f"targets on a board from 150 to 300 px, with {obs_steps} "
             f"observed steps and Ta = {executed} executed ones")
    assert not given.requires_grad, "expected actions without a graph: where is no_grad?"


@pytest.mark.parametrize("row, step, axis", [(0, 1, 0), (1, 8, 1), (3, 4, 0)])
def test_acting_refuses_actions_that_are_no_numbers(row, step, axis, draws):
    """NaN looked for in the first row alone, in the first action alone, or where all must be NaN:
    nobody raises FloatingPointError."""
    policy = DiffusionPolicy(Seeing(), Silent(), [30] * 16, action_range=(0, 512))
    spoiled = torch.zeros(4, 16, 2)
    spoiled[row, step, axis] = math.nan
    policy.sample = lambda observations, generator=None: spoiled
    with pytest.raises(FloatingPointError):
        policy.act(torch.rand(4, 2, 5, generator=draws) * 300 + 100)


def test_acting_takes_arrays_and_refuses_what_is_no_number(draws):
    """Observations used without `read`: then arrays fail, and NaN and wrong shapes pass. No look
    at the actions, or only at the first of them, before they are returned."""
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


def test_coverage_of_another_goal(draws):
    """This goal alone; the shift not turned; the centre of mass forgotten; an edge not clipped;
    the absolute value of each edge (its sign counts); counted points, which are not exact;
    another area; another shape.

    A block and its goal that turn and move together keep the coverage that was recorded.
    """
    with np.load(DATA / "gym_pusht_pushes.npz") as file:
        poses, recorded = file["states"][:, 1:, 2:].reshape(-1, 3), file["coverage"].reshape(-1)
    some = np.flatnonzero((recorded > 0.05) & (recorded < 0.999))[::40]
    poses, recorded = poses[some], recorded[some]
    assert len(poses) > 20
    x, y, turn = (torch.rand(3, generator=draws) * 2 - 1).numpy() * [100, 100, 3]
    cos, sin = np.cos(turn), np.sin(turn)

    def moved(pose):
        local = pose[..., :2] - 256
        turned = np.stack([cos * local[..., 0] - sin * local[..., 1] + x,
                           sin * local[..., 0] + cos * local[..., 1] + y], -1)
        return np.concatenate([turned, pose[..., 2:] + turn], -1)

    goal = moved(np.array([256, 256, np.pi / 4]))
    block = moved(poses)
    with unchanged(pose=block, goal=goal):
        given = sim_pusht.block_coverage(block, goal)
    is_close(torch.as_tensor(given), torch.as_tensor(recorded), 1e-6, "coverage of a moved goal")
    square = block[:20].reshape(2, 10, 3)
    is_close(torch.as_tensor(sim_pusht.block_coverage(square, goal)),
             torch.as_tensor(recorded[:20].reshape(2, 10)), 1e-6, "coverage of (2, 10, 3) poses")
    one = sim_pusht.block_coverage(block[0], goal)
    assert np.shape(one) == (), f"expected a number for one pose, got the shape {np.shape(one)}"
    assert abs(one - recorded[0]) < 1e-6, f"one pose: expected {recorded[0]:.6f}, got {one:.6f}"
