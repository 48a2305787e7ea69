"""A net under the rewriting: silent mistakes, with which everything still runs and even learns.

Each test names the mistake that it catches. The loss and acting are tested with a network that
cannot err (`Solver`), the training loop against the same loop written out by hand in numpy, and
the recipe by watching `train_policy` itself at work.
"""
import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import film
import sim_pusht
import train
from diffusion import DDPM, DiffusionPolicy
from heads import Attention, MLPBlock, TimeEncoder, causal_mask, make_backbone
from kinematics import BOARD, MOTIONS, Motion, PlanarArm

SCALE = [30 + 12 * step for step in range(16)]     # px


def observe(batch):
    """Random observations (B,2,5): the agent moves far between the two."""
    return torch.rand(batch, 2, 5, generator=torch.Generator().manual_seed(batch)) * 300 + 100


def plan(observations):
    """The actions (B,16,2) in px that these observations call for: no two steps or rows alike.

    Far from the agent and beyond the board, so that scale and board clip some of them.
    """
    start, speed = observations[:, -1, None, 2:4], observations[:, :1, 3:5] / 10 - 25
    return start + speed * torch.arange(16.0)[:, None]


class Knowing(nn.Module):
    """A conditioning that knows the plan, as the policy should denoise it."""

    def __init__(self):
        super().__init__()
        self.encoder = film.StateEncoder(2, sim_pusht.KEYPOINTS.tolist(), (256, 256, 0.8), width=1)

    def encode(self, observations):
        displacement = plan(observations) - observations[:, -1:, :2]
        return (displacement / torch.tensor(SCALE)[:, None]).clamp(-1, 1)

    def forward(self, o, tau):
        """K noise draws for each observation stand next to each other."""
        return [o.repeat_interleave(len(tau) // len(o), dim=0), tau]


class Solver(nn.Module):
    """A backbone that solves Ho, Eq. (4) for the noise, because it is told the clean actions."""
    mixes_time = False
    config = dict(action_dim=2)

    def __init__(self):
        super().__init__()
        self.ddpm, self.seen = DDPM(), []

    def time_encoder(self, timestep):
        return timestep

    def forward(self, noisy_actions, modulations, steps=None):
        clean, timestep = modulations
        every = torch.arange(16).expand(len(clean), -1)
        steps = every if steps is None else steps
        clean = clean.gather(1, steps[..., None].expand(-1, -1, 2))
        signal, noise = (scale[timestep][:, None, None]
                         for scale in (self.ddpm.signal_scale, self.ddpm.noise_scale))
        predicted = (noisy_actions - signal * clean) / noise
        self.seen.append(SimpleNamespace(timestep=timestep, steps=steps, noise=predicted,
                                         noisy_actions=noisy_actions))
        return predicted


def solving_policy(**settings):
    return DiffusionPolicy(Knowing(), Solver(), SCALE, action_range=(0, 512), **settings).eval()


# The loss ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(), dict(noise_samples=3), dict(loss_steps=4),
                                      dict(noise_samples=3, loss_steps=4)],
                         ids=["plain", "draws", "subset", "both"])
def test_a_network_that_solves_for_the_noise_has_no_loss(settings):
    """Agent of the first observation; horizon steps told in another order than gathered; noise of
    other steps as target; draws tiled instead of next to each other; the target's clip forgotten.
    """
    torch.manual_seed(0)
    observations = observe(16)
    clean = Knowing().encode(observations)
    assert 0.1 < (clean.abs() == 1).float().mean() < 0.9     # the clip has something to do
    assert solving_policy(**settings).loss(observations, plan(observations)) < 1e-8


def test_the_present_position_can_be_given():
    """Stage 1 gives the agent's position: its observations are angles, and hold none."""
    torch.manual_seed(0)
    observations, policy = observe(16), solving_policy(noise_samples=2)
    policy.conditioning.encode = lambda angles: Knowing().encode(observations)
    elsewhere = torch.zeros(16, 16, 3)
    assert policy.loss(elsewhere, plan(observations), observations[:, -1, :2]) < 1e-8
    assert policy.loss(elsewhere, plan(observations), observations[:, 0, :2]) > 1e-3


def test_what_the_encoder_adds_to_the_loss_is_added():
    """Left out; or given the observations as they came, not what the encoder has perceived."""
    torch.manual_seed(0)
    policy, observations, given = solving_policy(noise_samples=3), observe(8), []
    encoder = policy.conditioning.encoder
    encoder.perceive = lambda observations: observations + 0
    encoder.auxiliary_loss = lambda perceived: given.append(perceived) or 0.25
    policy.conditioning.encode = lambda perceived: given.append(perceived) or Knowing().encode(
        perceived)
    loss = policy.loss(observations, plan(observations))
    assert loss.item() == pytest.approx(0.25, abs=1e-6)
    encoded, minded = given
    assert encoded is minded and encoded is not observations


def test_every_noise_draw_has_its_own_timestep_and_all_timesteps_are_trained():
    """Timestep 0 or 99 never drawn; one timestep for the batch, or for all draws of a sample."""
    torch.manual_seed(0)
    policy, observations = solving_policy(noise_samples=4), observe(64)
    for _ in range(20):
        policy.loss(observations, plan(observations))
    timesteps = torch.stack([seen.timestep for seen in policy.backbone.seen])     # (20, 64 * 4)
    counts = timesteps.flatten().bincount(minlength=100)          # of each 51, on average
    assert len(counts) == 100 and (abs(counts - 51) < 40).all()
    draws = timesteps.view(-1, 4)
    assert (draws[:, 0] == draws[:, 1]).float().mean() < 0.03     # by chance: 1 in 100


def test_every_number_has_its_own_noise():
    """One noise for a whole batch, for all draws of a sample, for all steps or coordinates."""
    torch.manual_seed(0)
    policy, observations = solving_policy(noise_samples=4), observe(64)
    policy.loss(observations, plan(observations))
    noise = policy.backbone.seen[0].noise.view(64, 4, 16, 2)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    for dim, size in enumerate(noise.shape):     # neighbours along each axis are independent
        together = noise.narrow(dim, 0, size - 1) * noise.narrow(dim, 1, size - 1)
        assert abs(together.mean()) < 0.1


def test_every_noise_draw_has_its_own_subset_of_steps():
    """A step twice in a subset; the same subset for the whole batch; some steps never."""
    torch.manual_seed(0)
    policy, observations = solving_policy(noise_samples=4, loss_steps=4), observe(64)
    policy.loss(observations, plan(observations))
    steps = policy.backbone.seen[0].steps                         # (64 * 4, 4)
    assert all(len(set(row)) == 4 for row in steps.tolist())
    counts = steps.flatten().bincount(minlength=16)               # of each 64, on average
    assert len(counts) == 16 and (abs(counts - 64) < 40).all()


@pytest.mark.parametrize("tokens", [False, True])
def test_all_noise_draws_of_an_observation_get_its_own_condition(tokens):
    """The pathway tiles its observations where the loss keeps draws next to each other."""
    torch.manual_seed(0)
    backbone = make_backbone("transformer", conditioning="prefix" if tokens else "film")
    pathway = film.make_conditioning(backbone, "pose", horizon=16)
    positions, timestep = torch.rand(3, 16, 2) * 512, torch.randint(100, (6,))
    tau = backbone.time_encoder(timestep)
    together = numbers(pathway(pathway.encode(positions), tau))
    for row in range(6):
        o = pathway.encode(positions[row // 2][None])
        alone = numbers(pathway(o, tau[row:row + 1]))
        torch.testing.assert_close(alone[0], together[row])


def numbers(condition):
    """Modulations or tokens -> (B, all the numbers of a sample)."""
    parts = condition if isinstance(condition, (list, tuple)) else [condition]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


# Acting ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampling_steps", [10, None])
@pytest.mark.parametrize("executed", [1, 8, 15])
def test_the_first_executed_action_is_that_of_the_present(executed, sampling_steps):
    """Execution starts one step early or late; not Ta actions; relative to another position or
    scale; beyond the board; sampling_steps or the generator not handed on."""
    policy = solving_policy(executed_actions=executed, sampling_steps=sampling_steps)
    observations = observe(5)
    agent = observations[:, -1:, :2]
    reach = torch.tensor(SCALE)[:, None]
    expected = (agent + (plan(observations) - agent).clamp(-reach, reach)).clamp(0, 512)
    given = policy.act(observations, torch.Generator().manual_seed(0))
    torch.testing.assert_close(given, expected[:, 1:1 + executed], atol=0.01, rtol=0)
    denoised = policy.backbone.seen
    assert len(denoised) == (sampling_steps or 100)
    first_noise = torch.randn(5, 16, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoised[0].noisy_actions, first_noise)


@pytest.mark.parametrize("relative", [True, False])
def test_what_is_denoised_lies_in_the_clip_and_comes_back(relative):
    """Absolute actions in [0, 1], or off the middle; an inverse with another factor."""
    policy, agent = solving_policy(relative=relative), torch.tensor([[100.0, 200.0]])
    ends = policy.denormalise(torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 16, 2), agent)
    reach = torch.tensor(SCALE)[:, None]
    expected = torch.stack([agent - reach, agent + reach]) if relative else \
        torch.tensor([0.0, 512.0])[:, None, None].expand(2, 16, 2)
    torch.testing.assert_close(ends, expected)
    inside = torch.rand(3, 16, 2) * 2 - 1
    torch.testing.assert_close(policy.normalise(policy.denormalise(inside, agent), agent), inside)


# The training loop -------------------------------------------------------------------------------

class TwoNumbers(nn.Module):
    """A stand-in for a policy: its loss is a parabola in two numbers, steeper in the second."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.double))
        self.learned_in = []
        self.eval()     # fit has to switch it

    def loss(self, target):
        self.learned_in.append("train" if self.training else "eval")
        self.bf16 = torch.is_autocast_enabled("cpu")
        return ((self.weight - target).square() * target.new_tensor([1, 5])).sum()


TARGETS = np.random.default_rng(0).normal(size=(12, 2)) * np.linspace(0.2, 3, 12)[:, None]


def decay(step):
    """Of the average with cap 0.8 in an update, counted from 0: official code, EMAModel."""
    return min(0.8, 1 - (1 + max(0, step - 1)) ** -0.75)


def by_hand():
    """12 updates: AdamW (Loshchilov & Hutter 2019, Alg. 2) with clipping, warm-up, cosine, EMA.

    Returns the loss and the average of each update, (12,) and (12, 2), and the last weights (2,).
    """
    weight, mean, square, average = np.array([1.0, -2.0]), 0, 0, 0
    losses, averages = [], []
    for step, target in enumerate(TARGETS):
        losses.append(((weight - target) ** 2 * [1, 5]).sum())
        gradient = 2 * (weight - target) * [1, 5]
        gradient = gradient * min(1, 4 / (np.linalg.norm(gradient) + 1e-6))
        rate = 0.1 * min(1, (step + 1) / 4) * (1 + math.cos(math.pi * step / 12)) / 2
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.98 * square + 0.02 * gradient ** 2
        weight = weight * (1 - rate * 1e-6)
        weight = weight - rate * (mean / (1 - 0.9 ** (step + 1))
                                  / (np.sqrt(square / (1 - 0.98 ** (step + 1))) + 1e-8))
        average = decay(step) * average + (1 - decay(step)) * weight
        averages.append(average)
    return np.array(losses), np.array(averages), weight


def fitted(tmp_path, policy, targets=TARGETS, stage="stage2", **changes):
    """Let train.fit make the 12 updates of `by_hand`; returns the average and the run."""
    config, _ = train.parse(["--smoke", "--precision", "fp32", "--device", "cpu", "--steps", "12",
                             "--learning-rate", "0.1", "--out", str(tmp_path / "run")])
    vars(config).update(warmup=4, betas=(0.9, 0.98), clip_norm=4.0, ema_decay=0.8, log_every=3,
                        checkpoint_every=5, play_every=1000)
    vars(config).update(changes)
    def batches():
        for target in torch.tensor(targets):
            assert not torch.is_autocast_enabled("cpu")     # or the arm moves in bf16, and slowly
            yield target,

    run = train.Run(config)
    return train.fit(stage, policy, batches(), config, run), run


def numbers_of(policy):
    return policy.weight.detach().numpy()


def test_fit_is_the_loop_written_out_by_hand(tmp_path):
    """The average never returned, a plain mean, or with a constant decay; the schedule not stepped
    in every update; no warm-up; no clipping; zero_grad forgotten; a wrong weight decay."""
    policy = TwoNumbers()
    average, _ = fitted(tmp_path, policy)
    _, averages, weight = by_hand()
    np.testing.assert_allclose(numbers_of(average), averages[-1], atol=1e-9)
    np.testing.assert_allclose(numbers_of(policy), weight, atol=1e-9)     # and not the average
    assert abs(weight - averages[-1]).min() > 0.01
    assert policy.learned_in == ["train"] * 12 and not average.training


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_each_stage_is_this_loop_of_its_own_length(stage, tmp_path):
    """The schedule of the other stage's length; a stage without warm-up, clipping or average."""
    lengths = dict(stage1_steps=12, steps=40) if stage == "stage1" else \
        dict(stage1_steps=40, steps=12)
    policy = TwoNumbers()
    average, run = fitted(tmp_path, policy, stage=stage, **lengths)
    _, averages, weight = by_hand()
    np.testing.assert_allclose(numbers_of(average), averages[-1], atol=1e-9)
    np.testing.assert_allclose(numbers_of(policy), weight, atol=1e-9)
    assert [row[:2] for row in run.rows] == [[stage, step] for step in (3, 6, 9, 12)]


def test_a_resumed_run_counts_the_seconds_from_before(tmp_path, monkeypatch):
    class Slow(TwoNumbers):
        def loss(self, target):
            clock[0] += 10     # seconds
            return super().loss(target)

    clock = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    with pytest.raises(StopIteration):     # stopped in update 9; the checkpoint is of update 5
        fitted(tmp_path, Slow(), TARGETS[:8])
    clock[0] = 7000.0
    _, run = fitted(tmp_path, Slow(), TARGETS[5:], resume=True)
    assert run.seconds == dict(stage2=120)
    assert [row[2] for row in run.rows] == [30, 60, 90, 120]


def test_the_logged_loss_is_the_mean_since_the_last_row(tmp_path):
    """The losses of all updates averaged again in every row, or only the last one logged."""
    policy = TwoNumbers()
    _, run = fitted(tmp_path, policy, log_every=5)
    losses, _, _ = by_hand()
    expected = [losses[:5].mean(), losses[5:10].mean(), losses[10:].mean()]
    assert [row[1] for row in run.rows] == [5, 10, 12]
    assert [row[3] for row in run.rows] == pytest.approx(expected)


def test_a_run_resumed_in_the_middle_ends_as_if_it_had_not_been_stopped(tmp_path):
    """Average, optimizer or schedule begun anew; an update made twice; a row twice in the log."""
    policy = TwoNumbers()
    with pytest.raises(StopIteration):     # stopped in update 9; the checkpoint is of update 5
        fitted(tmp_path, policy, TARGETS[:8])
    resumed = TwoNumbers()
    average, run = fitted(tmp_path, resumed, TARGETS[5:], resume=True)
    _, averages, weight = by_hand()
    np.testing.assert_allclose(numbers_of(average), averages[-1], atol=1e-9)
    np.testing.assert_allclose(numbers_of(resumed), weight, atol=1e-9)
    assert [row[1] for row in run.rows] == [3, 6, 9, 12]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_computed_in_the_precision_asked_for(precision, tmp_path):
    """--precision without effect."""
    policy = TwoNumbers()
    fitted(tmp_path, policy, precision=precision)
    assert policy.bf16 == (precision == "bf16")


def test_playing_on_the_way_is_done_by_the_average_and_leaves_no_trace(tmp_path, monkeypatch):
    """Played with the present weights or in train mode; training goes on in eval mode, or from the
    average, because the present weights were kept by reference; its time counted as training."""
    policy, played, clock = TwoNumbers().train(), [], [0.0]

    def evaluate(policy, *_):
        clock[0] += 1000
        played.append((policy.training, numbers_of(policy).copy()))
        return dict(max_coverage=np.ones(2), final_coverage=np.zeros(2))

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    average, run = fitted(tmp_path, policy, play_every=6)
    _, averages, weight = by_hand()
    (training, then), = played     # in the middle, not at the end
    assert not training
    np.testing.assert_allclose(then, averages[5], atol=1e-9)
    np.testing.assert_allclose(numbers_of(average), averages[-1], atol=1e-9)
    np.testing.assert_allclose(numbers_of(policy), weight, atol=1e-9)
    assert policy.learned_in == ["train"] * 12
    assert run.seconds == dict(stage2=0, evaluation=1000)


@pytest.mark.parametrize("stage, minutes", [("stage1", 6 + 24), ("stage2", 10)])
def test_how_long_it_will_take_is_measured(stage, minutes, tmp_path, monkeypatch):
    """Said once, from this run's own updates; in stage 1 those of stage 2 are still to come."""
    class Slow(TwoNumbers):
        def loss(self, target):
            clock[0] += 120     # seconds
            return super().loss(target)

    clock, said = [0.0], []
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train.tqdm, "write", said.append)
    fitted(tmp_path, Slow(), TARGETS[:6], stage=stage, stage1_steps=4, steps=12 if stage == "stage1"
           else 6)
    told = [line for line in said if "minutes" in line]
    assert len(told) == 1 and f"about {minutes} more minutes of training" in told[0]


def test_fit_optimizes_the_trained_part_alone(tmp_path, monkeypatch):
    """The frozen part in the optimizer. It is in train mode as well, for its dropout."""
    class WithFrozenPart(nn.Module):
        def __init__(self):
            super().__init__()
            self.conditioning, self.backbone = TwoNumbers(), TwoNumbers().requires_grad_(False)

        def loss(self, target):
            self.backbone.learned_in.append("train" if self.backbone.training else "eval")
            return self.conditioning.loss(target) + self.backbone.weight.sum()

    given, original = [], torch.optim.AdamW

    def adamw(parameters, **settings):
        given.extend(parameters)
        return original(given, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    policy = WithFrozenPart()
    average, _ = fitted(tmp_path, policy)
    assert [id(parameter) for parameter in given] == [id(policy.conditioning.weight)]
    _, averages, _ = by_hand()
    np.testing.assert_allclose(numbers_of(average.conditioning), averages[-1], atol=1e-9)
    assert policy.backbone.weight.tolist() == average.backbone.weight.tolist() == [1, -2]
    assert policy.backbone.learned_in == ["train"] * 12


# The recipe --------------------------------------------------------------------------------------

def demonstrations():
    """Two short episodes, written by hand."""
    state = np.random.default_rng(0).uniform(100, 400, (60, 5)) * [1, 1, 1, 1, 0.01]
    return dict(state=state, action=state[:, :2] + 5, episode_ends=np.array([25, 60]))


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Run train_policy with some flags -> the policy, and for each stage: the policy that fit was
    given, a copy of it from before, what fit returned and a copy of it, what the optimizer was
    given, and of each loss the batch and the modes that the policy's modules were in."""
    def run(*flags):
        config, _ = train.parse(["--smoke", "--stage1-steps", "3", "--steps", "4", *flags,
                                 "--device", "cpu", "--out", str(tmp_path / "run")])
        stages, original, loss, adamw = {}, train.fit, DiffusionPolicy.loss, torch.optim.AdamW

        def fit(stage, policy, *rest):
            seen = SimpleNamespace(policy=policy, modes=[], batches=[])
            stages[stage] = seen
            seen.before = copy.deepcopy(policy)
            seen.returned = original(stage, policy, *rest)
            seen.after = copy.deepcopy(seen.returned)     # stage 2 may train it further
            return seen.returned

        def watched_loss(policy, *batch):
            *_, seen = stages.values()     # the stage that runs
            seen.modes.append({module.training for module in policy.modules()})
            seen.batches.append(batch)
            return loss(policy, *batch)

        def watched_adamw(parameters, **settings):
            *_, seen = stages.values()
            seen.optimized = list(parameters)
            return adamw(seen.optimized, **settings)

        monkeypatch.setattr(train, "fit", fit)
        monkeypatch.setattr(DiffusionPolicy, "loss", watched_loss)
        monkeypatch.setattr(torch.optim, "AdamW", watched_adamw)
        torch.manual_seed(0)
        policy = train.train_policy(config, train.Run(config), demonstrations())
        return policy, stages
    return run


def same(module, other):
    """The names of the tensors that are equal in both, and of those that both have."""
    ours, theirs = module.state_dict(), other.state_dict()
    both = {name for name in ours if name in theirs and ours[name].shape == theirs[name].shape}
    return {name for name in both if torch.equal(ours[name], theirs[name])}, both


def trainable(module):
    return {parameter.requires_grad for parameter in module.parameters()}


@pytest.mark.parametrize("flag", ["--decoupled", "--pretrained"])
def test_stage_2_goes_on_with_the_backbone_that_stage_1_left(flag, watch):
    """Stage 2 on a fresh backbone, or on the one from before stage 1: stage 1 thrown away. On the
    raw weights in place of their average."""
    _, stages = watch(flag)
    stage1, stage2 = stages["stage1"], stages["stage2"]
    equal, both = same(stage1.after.backbone, stage2.before.backbone)
    assert equal == both == set(stage1.after.backbone.state_dict())
    equal, both = same(stage1.before.backbone, stage1.after.backbone)
    assert not equal and both                             # stage 1 trained all of it
    assert not same(stage1.policy.backbone, stage1.after.backbone)[0]     # and averaged it


@pytest.mark.parametrize("flag", ["--decoupled", "--pretrained"])
def test_stage_2_begins_with_a_fresh_conditioning(flag, watch):
    """Stage 1's generators, or the part of them that takes the timestep, kept in stage 2."""
    _, stages = watch(flag)
    kept, fresh = stages["stage1"].after.conditioning, stages["stage2"].before.conditioning
    equal, both = same(kept, fresh)
    assert not equal and "time_part.weight" in both
    assert not same(stages["stage1"].before.conditioning, fresh)[0] - {"observation_part.bias"}
    expected = film.make_conditioning(stages["stage2"].policy.backbone, "none", horizon=2)
    assert torch.equal(fresh.observation_part.bias, expected.observation_part.bias)


@pytest.mark.parametrize("conditioning", ["film", "cross-attention"])
def test_keep_biases_keeps_what_does_not_depend_on_the_observation(conditioning, watch):
    """Of modulations the bias, of tokens all but their embedding and position; all go on learning."""
    _, stages = watch("--decoupled", "--keep-biases", "--conditioning", conditioning,
                      "--backbone", "mlp" if conditioning == "film" else "transformer")
    stage1, stage2 = stages["stage1"].after.conditioning, stages["stage2"]
    equal, _ = same(stage1, stage2.before.conditioning)
    assert equal == ({"observation_part.bias"} if conditioning == "film" else
                     {"embed.bias", *(f"mlp.{layer}" for layer in stage1.mlp.state_dict())})
    assert trainable(stage2.before.conditioning) == {True}
    assert not same(stage2.before.conditioning, stage2.after.conditioning)[0] & equal


@pytest.mark.parametrize("task", sim_pusht.TASKS)
def test_a_policy_knows_the_goal_of_its_task(task, watch):
    policy, _ = watch("--task", task)
    goal = torch.tensor(sim_pusht.TASKS[task][1]).float()
    corners = torch.tensor(sim_pusht.keypoints(goal)).float()
    torch.testing.assert_close(policy.conditioning.encoder.goal_corners, corners)


@pytest.mark.parametrize("flag, frozen", [("--decoupled", True), ("--random-backbone", True),
                                          ("--pretrained", False), (None, False)])
def test_what_is_trained_in_stage_2(flag, frozen, watch):
    """Freezing by shape or name; nothing frozen; the frozen backbone left in the optimizer.

    At width 96 some tensors of the backbone are of the same shape as some of the conditioning.
    """
    _, stages = watch("--width", "96", *[flag] if flag else [])
    stage2 = stages["stage2"]
    trained = stage2.policy.conditioning if frozen else stage2.policy
    assert {*map(id, stage2.optimized)} == {*map(id, trained.parameters())}
    shapes = [{parameter.shape for parameter in module.parameters()}
              for module in (stage2.policy.conditioning, stage2.policy.backbone)]
    assert shapes[0] & shapes[1]
    assert trainable(stage2.before.conditioning) == {True}
    assert trainable(stage2.before.backbone) == {not frozen}
    assert not same(stage2.before.conditioning, stage2.after.conditioning)[0] & set(
        dict(stage2.policy.conditioning.named_parameters()))     # all of it learns
    equal, both = same(stage2.before.backbone, stage2.after.backbone)
    assert equal == (both if frozen else set())


@pytest.mark.parametrize("flag", ["--decoupled", "--pretrained", "--random-backbone", None])
def test_which_stages_there_are_and_in_which_mode(flag, watch):
    """Stage 1 in eval mode, or a frozen backbone in eval mode: its dropout would be off. One
    stage's number of updates in the other. A policy that is evaluated in train mode."""
    policy, stages = watch(*[flag] if flag else [])
    pretrains = flag in ("--decoupled", "--pretrained")
    assert list(stages) == (["stage1", "stage2"] if pretrains else ["stage2"])
    assert stages["stage2"].modes == [{True}] * 4
    assert policy is stages["stage2"].returned
    assert not any(module.training for module in policy.modules())
    if pretrains:
        stage1 = stages["stage1"]
        assert stage1.modes == [{True}] * 3
        assert trainable(stage1.before) == {True}
        assert {*map(id, stage1.optimized)} == {*map(id, stage1.policy.parameters())}


@pytest.mark.parametrize("name, mechanism, deviations", [
    ("mlp", "film", {"backbone.input_weight": 1, "backbone.input_bias": 1}),
    ("transformer", "film", {"backbone.position": 0.02, "backbone.input.weight": 0.02,
                             "backbone.input.bias": 0, "backbone.output.weight": 0.02,
                             "backbone.blocks.0.attention.query.weight": 0.02,
                             "backbone.blocks.3.mlp.3.bias": 0}),
    ("transformer", "cross-attention", {"conditioning.position": 0.02,
                                        "conditioning.embed.weight": 0.02,
                                        "conditioning.mlp.2.weight": 0.02,
                                        "conditioning.embed.bias": 0}),
    ("transformer", "additive", {"conditioning.observation_part.weight": 0,
                                 "conditioning.observation_part.bias": 0,
                                 "conditioning.time_part.weight": 0}),
    ("mlp", "adaln-zero", {"conditioning.observation_part.weight": 0,
                           "conditioning.time_part.weight": 0})])
def test_what_weights_are_before_the_first_update(name, mechanism, deviations):
    """Standard deviations, as in the official code. All are parameters, which training moves."""
    torch.manual_seed(0)
    backbone = make_backbone(name, conditioning=mechanism)
    conditioning = film.make_conditioning(backbone, "joints", horizon=16)
    weights = dict(nn.ModuleDict(dict(backbone=backbone, conditioning=conditioning))
                   .named_parameters())
    for weight, deviation in deviations.items():
        found = weights[weight].std().item() if weights[weight].any() else 0
        assert found == pytest.approx(deviation, rel=0.15), weight




@pytest.mark.parametrize("backbone", ["mlp", "transformer"])
def test_the_policies_have_the_settings_asked_for(backbone, watch):
    """A setting that train_policy does not hand on; a part of the horizon where steps mix."""
    _, stages = watch("--decoupled", "--backbone", backbone, "--executed-actions", "3")
    expected = dict(action_scale=SCALE, action_range=[0, 512], obs_steps=2, executed_actions=3,
                    sampling_steps=10, relative=True, noise_samples=1, loss_steps=None,
                    temperature=1.0)
    if backbone == "mlp":
        expected |= dict(noise_samples=4, loss_steps=4)
    for stage in stages.values():
        assert stage.policy.config == expected


# The data ----------------------------------------------------------------------------------------

def test_every_batch_is_drawn_anew():
    """The same batch in every update; a generator that begins again in every stage or run."""
    config, _ = train.parse([])
    own, _ = train.parse(["--decoupled", "--pretrain-data", "demonstrations"])
    drawn = []
    for make, settings in ((train.demonstration_batches, config), (train.stage1_batches, own),
                           (train.stage1_batches, config)):
        for batches in (make(demonstrations(), settings) for _ in range(2)):
            drawn += [next(batches)[1], next(batches)[1]]
    same = [[torch.equal(one, other) for one in drawn] for other in drawn]
    assert same == np.eye(len(drawn)).tolist()


@pytest.mark.parametrize("data", ["arm", "demonstrations"])
def test_stage_1_moves_freely_or_as_the_demonstrations_do(data, watch):
    """The control in place of the free motion, or the free motion in place of the control. Angles
    are a part of each batch, and the same arm's."""
    _, stages = watch("--decoupled", "--pretrain-data", data)
    agents = torch.tensor(demonstrations()["state"][:, :2]).float()
    for angles, positions, present in stages["stage1"].batches:
        own = (present[:, None] == agents).all(-1).any(-1)
        assert own.tolist() == [data == "demonstrations"] * len(present)
        torch.testing.assert_close(PlanarArm().forward(angles), positions, atol=1e-2, rtol=0)
        assert len(positions) == 64     # that of --smoke


@pytest.mark.parametrize("motion", ["arm", "fast"])
def test_stage_1_pairs_angles_and_positions_of_the_same_instants(motion, monkeypatch):
    """Angles and positions of different instants; the lead of two steps over the present forgotten,
    or present and first executed step confused; another motion than --pretrain-data asks for."""
    moved_by = []

    def sample_windows(arm, batch, horizon, **where):
        moved_by.append(arm.motion)
        instants = torch.arange(horizon).expand(batch, -1)[..., None]
        return instants.expand(-1, -1, 3), instants.expand(-1, -1, 2)

    monkeypatch.setattr(PlanarArm, "sample_windows", sample_windows)
    config, _ = train.parse(["--decoupled", "--pretrain-data", motion])
    angles, positions, present = next(train.stage1_batches(None, config))
    assert angles.shape == (128, 16, 3) and positions.shape == (128, 16, 2)
    assert torch.equal(angles[0, :, 0], positions[0, :, 0])
    # The step that is executed first, index To - 1, leads the present by two.
    assert present.shape == (128, 2) and (positions[:, 1] == present + 2).all()
    assert moved_by == [MOTIONS[motion]]


def test_num_demos_takes_the_first_episodes_of_a_file(tmp_path):
    """--num-demos without effect on a file; frames of other episodes drawn all the same."""
    np.savez(tmp_path / "demos.npz", **demonstrations())
    config, _ = train.parse(["--demos", str(tmp_path / "demos.npz"), "--num-demos", "1"])
    assert train.get_demonstrations(config)["episode_ends"].tolist() == [25, 50]    # and mirrored
    config.mirror = False
    taken = train.get_demonstrations(config)
    states, _ = next(train.demonstration_batches(taken, config))
    first = torch.tensor(demonstrations()["state"][:25]).float()
    assert taken["episode_ends"].tolist() == [25]
    assert (states[:, 1, None] == first).all(-1).any(-1).all()     # the present, of each sample


@pytest.fixture
def two_threads():
    """For the time of a test: the others run with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("observation", ["state", "pixels"])
@pytest.mark.parametrize("backbone", ["mlp", "unet", "transformer"])
def test_two_threads_compute_the_same_gradients_each_time(backbone, observation, two_threads):
    """Sums in no fixed order: the same command with the same seed gives other numbers each time."""
    config = train.settings(train.Config(backbone=backbone, observation=observation))
    torch.manual_seed(0)
    backbone = train.new_backbone(config)
    policy = train.make_policy(train.conditioning_on_observations(backbone, config), backbone,
                               config)
    states = observe(32)
    seen = states
    if observation == "pixels":
        seen = sim_pusht.observe(states.numpy(), "pixels") | {"corners": np.zeros((32, 8, 2))}
        seen = {name: torch.as_tensor(values) for name, values in seen.items()}
    found = []
    for _ in range(8):
        torch.manual_seed(1)
        loss = policy.loss(seen, plan(states))
        found.append(torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True))
    for gradients in found:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, found[0]))


# The command line --------------------------------------------------------------------------------

def test_the_seed_decides_over_everything_that_follows(monkeypatch):
    """--seed without effect, on the command line or in a notebook."""
    seeds = []

    def new_backbone(config):     # the first that draws
        seeds.append(torch.initial_seed())
        raise ValueError("seen enough")

    monkeypatch.setattr(train, "new_backbone", new_backbone)
    with pytest.raises(SystemExit):
        train.main(["--seed", "7"])
    with pytest.raises(ValueError, match="seen enough"):
        train.experiment(train.settings(train.Config(seed=8)))
    assert seeds == [7, 8]


# Evaluation --------------------------------------------------------------------------------------

class Standing:
    """A policy that stays where it is and writes down what it is given."""
    action_scale, obs_steps = torch.ones(16, 1), 3
    conditioning = SimpleNamespace(encoder=film.StateEncoder)

    def __init__(self):
        self.seen, self.drawn = [], []

    def act(self, observations, generator):
        self.seen.append(np.array(observations))
        self.drawn.append(torch.rand(1, generator=generator).item())
        return torch.as_tensor(observations)[:, -1:, :2].repeat(1, 4, 1)


@pytest.mark.parametrize("task", ["full", "near"])
def test_evaluation_plays_the_same_scenes_with_new_noise_in_every_chunk(task):
    """Another evaluation seed or task; the generator made anew in every chunk, or not used; fewer
    observations than the policy's."""
    policies = [Standing(), Standing()]
    for policy in policies:
        result = train.evaluate(policy, task, 2, max_steps=12)
    assert policies[0].drawn == policies[1].drawn and len(set(policies[0].drawn)) == 3
    scenes = sim_pusht.PushT(2, task)
    scenes.reset(100_000)
    np.testing.assert_array_equal(policies[0].seen[0], np.stack([scenes.state()] * 3, axis=1))
    np.testing.assert_array_equal(result["states"][0], scenes.state())
    assert len(result["states"]) == 1 + 12


def test_scores_by_hand():
    """Final instead of largest coverage; success at exactly 0.95; a standard error over n."""
    given = train.scores(dict(max_coverage=np.array([0.95, 0.96, 0.19, 0.0]),
                              final_coverage=np.array([0.5, 0.3, 0.1, 0.0])))
    assert given["episodes"] == 4
    assert given["score"] == pytest.approx((1 + 1 + 0.2 + 0) / 4)
    assert given["success_rate"] == 1 / 4                              # more than 0.95, not 0.95
    assert given["score_se"] == pytest.approx(np.std([1, 1, 0.2, 0]) / 2)
    assert given["success_se"] == pytest.approx(np.sqrt(1 / 4 * 3 / 4) / 2)
    assert given["max_coverage"] == pytest.approx(0.525)
    assert given["final_coverage"] == pytest.approx(0.225)


# Kinematics --------------------------------------------------------------------------------------

def test_the_elbow_is_on_the_same_side_everywhere():
    """The other solution of the law of cosines, everywhere or in parts of the board.

    The elbow's turn (x right, y down) is negative: the forearm turns back from the upper arm.
    """
    across = torch.linspace(0, BOARD, 30, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(across, across, indexing="ij"), dim=-1)
    arm = PlanarArm()
    base, elbow, _, hand = arm.joints(arm.inverse(points)).unbind(-2)
    upper, forearm = elbow - base, hand - elbow
    assert (upper[..., 0] * forearm[..., 1] - upper[..., 1] * forearm[..., 0] < 0).all()


def test_half_of_the_pushing_is_slower_than_the_geometric_mean():
    """Speeds drawn uniformly, not log-uniformly: the slow strokes that need precision are rare."""
    pushing = Motion(stand_share=0, push_share=1, push_speed=(1, 9), stroke_steps=1e9, bend=0)
    generator = torch.Generator().manual_seed(0)
    _, positions = PlanarArm(motion=pushing).sample_windows(1000, 4, generator)
    speed = positions.diff(dim=1).norm(dim=-1)
    assert speed.median().item() == pytest.approx(3, abs=0.3)     # uniformly it would be 5


def test_strokes_are_as_the_motion_says():
    """Strokes that stand or push too seldom, that do not bend or bend to one side, that start in
    one half of all directions, that do not turn or turn back too often."""
    motion, shape = Motion(), (4000, 60)
    generator = torch.Generator().manual_seed(0)
    velocity = PlanarArm()._strokes(shape, generator, torch.device("cpu")).double()
    speed = velocity.norm(dim=-1)
    push, travel = ((low <= speed) & (speed <= high) for low, high in
                    (motion.push_speed, motion.travel_speed))
    for kind, share in ((speed == 0, 0.1), (push, 0.45), (travel, 0.45)):
        assert kind.double().mean().item() == pytest.approx(share, abs=0.01)
    heading = torch.atan2(velocity[..., 1], velocity[..., 0])
    first = heading[:, 0][speed[:, 0] > 0]
    assert torch.histc(first, 8, -math.pi, math.pi).div(len(first) / 8).sub(1).abs().max() < 0.2
    moves = (speed[:, 1:] > 0) & (speed[:, :-1] > 0)
    change = (heading.diff(dim=1) + math.pi).remainder(math.tau) - math.pi
    same = moves & (speed.diff(dim=1).abs() < 1e-4)     # the stroke of the step before goes on
    bend, turn = change[same], change[moves & ~same]
    goes_on = same[:, 1:] & same[:, :-1]     # one bend for a whole stroke
    assert (change.diff(dim=1)[goes_on].abs() < 1e-4).double().mean() > 0.99
    assert bend.mean().abs() < 0.005 and bend.std().item() == pytest.approx(0.1, rel=0.05)
    back = turn.abs() > 3.13
    assert back.double().mean().item() == pytest.approx(0.15, abs=0.015)
    assert turn[~back].mean().abs() < 0.03
    assert turn[~back].std().item() == pytest.approx(0.9, rel=0.05)


# One function at a time, as tests/assignments asks for them ---------------------------------------

def test_the_schedule_s_scales_and_posterior_follow_from_its_betas():
    """A variance for a deviation, alpha for alpha-bar, the present alpha-bar for the previous one.

    The posterior is the product of two Gaussians in the clean actions' timestep before: precisions
    add up, and each mean counts by its precision.
    """
    ddpm = DDPM(50)
    assert ddpm.num_timesteps == 50
    assert {(buffer.dtype, *buffer.shape) for buffer in ddpm.buffers()} == {(torch.float32, 50)}
    beta = ddpm.betas.double()
    left = (1 - beta).cumprod(0)
    squares = {"signal_scale": left, "noise_scale": 1 - left}
    for name, values in squares.items():
        torch.testing.assert_close(getattr(ddpm, name).double() ** 2, values, rtol=1e-4, atol=1e-6)
    before, alpha = left[:-1], 1 - beta[1:]
    from_clean, from_noisy = 1 / (1 - before), alpha / beta[1:]
    precision = from_clean + from_noisy
    expected = {"posterior_std": precision.rsqrt(),
                "posterior_clean": from_clean / precision * before.sqrt(),
                "posterior_noisy": from_noisy / precision / alpha.sqrt()}
    for name, values in expected.items():
        torch.testing.assert_close(getattr(ddpm, name)[1:].double(), values, rtol=1e-4, atol=1e-6)
    first = ddpm.posterior_clean[0], ddpm.posterior_noisy[0], ddpm.posterior_std[0]
    assert first == (1, 0, 0)     # the last step back draws nothing


def test_add_noise_takes_one_timestep_for_all_or_one_for_each():
    """B == T == A on purpose: a timestep on the wrong axis would broadcast silently."""
    ddpm, (actions, noise) = DDPM(), torch.randn(2, 4, 4, 4)
    each = ddpm.add_noise(actions, noise, torch.tensor([3, 40, 0, 99]))
    for sample, timestep in enumerate([3, 40, 0, 99]):
        alone = ddpm.add_noise(actions, noise, timestep)[sample]
        torch.testing.assert_close(each[sample], alone)


def test_the_clean_actions_of_one_timestep_for_all_are_clipped():
    """At the last timestep an error of 0.01 in the noise is multiplied by 2,000."""
    ddpm, (clean, noise) = DDPM(), torch.rand(2, 3, 16, 2) * 1.8 - 0.9
    for timestep in (0, 50, 90):
        noisy = ddpm.add_noise(clean, noise, timestep)
        given = ddpm.predict_clean(noise, timestep, noisy)
        torch.testing.assert_close(given, clean, atol=1e-4, rtol=0)
    noisy = ddpm.add_noise(clean, noise, 99)
    assert (ddpm.predict_clean(noise - 0.01, 99, noisy) == 1).all()
    assert (ddpm.predict_clean(noise + 0.01, 99, noisy) == -1).all()


def test_the_sinusoid_turns_at_rates_from_1_to_a_ten_thousandth():
    """One rate less; another base; cosines first; the layers on the sinusoid forgotten."""
    plain, learned = TimeEncoder(12, learned=False), TimeEncoder(12)
    timestep = torch.tensor([0, 1, 3])
    sine, cosine = plain(timestep).chunk(2, dim=-1)
    assert sine.shape == (3, 6) and sine[0].tolist() == [0] * 6 and cosine[0].tolist() == [1] * 6
    angle = torch.atan2(sine, cosine)
    torch.testing.assert_close(angle[2], 3 * angle[1])
    assert angle[1].tolist() == pytest.approx([1, 0.1585, 0.02512, 0.003981, 0.000631, 0.0001],
                                              rel=1e-3)
    torch.testing.assert_close(learned(timestep), learned.mlp(plain(timestep)))
    assert plain(timestep.to("meta")).is_meta     # torch refuses it if a part is made elsewhere


def wave(*shape, start=0):
    """sin(start), sin(start + 1), ...: numbers without a pattern, the same everywhere."""
    return torch.arange(start, start + math.prod(shape)).double().sin().view(shape)


class Marking(film.Mechanism):
    """Each hook does what no other does, so that their places show."""

    def modulate(self, h, m):
        return h ** 2 + m

    def gate(self, h, m):
        return m * h ** 3

    def after_norm(self, h, m):
        return h.exp() - m


def test_an_mlp_block_gives_the_recorded_numbers():
    """FiLM before the nonlinearity; no shortcut; the normalisation inside it; a hook not called."""
    block = MLPBlock(Marking(), 3, 4, dropout=0.9).double().eval()
    starts = [10, 30, 40, 60, 70, 80]     # W1, b1, W2, b2, and LayerNorm's scale and shift
    for parameter, start in zip(block.parameters(), starts, strict=True):
        parameter.data = wave(*parameter.shape, start=start)
    given = block(wave(2, 1, 3), torch.tensor(2.0))
    recorded = [[-1.8751, -0.8064, -0.4250], [-1.8336, -0.0715, -0.7387]]     # in numpy, float64
    torch.testing.assert_close(given[:, 0], torch.tensor(recorded).double(), atol=1e-4, rtol=0)


def test_an_mlp_block_drops_features_in_its_hidden_layer_and_in_its_branch():
    """Half of what FiLM and half of what the gate is given is zero, in train mode alone."""
    class Counting(film.Mechanism):
        def modulate(self, h, m):
            self.hidden = (h == 0).double().mean()
            return h

        def gate(self, h, m):
            self.branch = (h == 0).double().mean()
            return h

    block = MLPBlock(Counting(), 64, 128, dropout=0.5)
    for mode, share in ((True, 0.5), (False, 0)):
        block.train(mode)(torch.randn(8, 16, 64), None)
        assert block.mechanism.hidden == pytest.approx(share, abs=0.05)
        assert block.mechanism.branch == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("in_front, expected", [
    (0, ["1000", "1100", "1110", "1111"]), (1, ["1000", "1100", "1110", "1111"]),
    (2, ["1100", "1100", "1110", "1111"]), (3, ["1110", "1110", "1110", "1111"])])
def test_which_steps_a_step_may_look_at(in_front, expected):
    """Later actions seen; an action that does not see itself; the condition's tokens causal."""
    mask = causal_mask(4, in_front, "cpu")
    assert mask.dtype == torch.bool and causal_mask(4, in_front, "meta").is_meta
    assert ["".join(str(int(seen)) for seen in row) for row in mask] == expected


def test_attention_is_that_of_torch():
    """Heads mixed up with steps; keys taken for values; the mask upside down; dropout in eval mode.
    B == heads and T == D / heads on purpose."""
    torch.manual_seed(0)
    ours, theirs = Attention(12, 3, dropout=0.5), nn.MultiheadAttention(12, 3, batch_first=True)
    for name in ("weight", "bias"):
        joined = torch.cat([getattr(ours.query, name), getattr(ours.key_value, name)])
        getattr(theirs, f"in_proj_{name}").data.copy_(joined)
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    x, source, mask = torch.randn(3, 4, 12), torch.randn(3, 6, 12), torch.ones(4, 6).tril(1).bool()
    expected, _ = theirs(x, source, source, attn_mask=~mask)     # True: may not see
    torch.testing.assert_close(ours.eval()(x, source, mask), expected)
    assert not torch.allclose(ours.train()(x, source, mask), expected, atol=0.01)


@pytest.mark.parametrize("shape", [(2,), (5, 4), (3, 1)])
def test_joints_refuse_another_number_of_angles(shape):
    """A single angle would broadcast over all links."""
    with pytest.raises(ValueError, match="must end in 3 joints"):
        PlanarArm().joints(torch.zeros(shape))


def test_the_joints_of_many_poses_are_those_of_each():
    """Angles or links added up over the batch or over time. T == N on purpose."""
    arm, angles = PlanarArm(), torch.rand(4, 3, 3, dtype=torch.double) * 6 - 3
    together = arm.joints(angles)
    for pose, joints in zip(angles.flatten(0, 1), together.flatten(0, 1), strict=True):
        torch.testing.assert_close(joints, arm.joints(pose))
    assert arm.joints(angles.to("meta")).is_meta     # torch refuses it if a part is made elsewhere


def test_a_joint_step_has_the_dtype_and_the_device_of_its_angles():
    """The damping made as float32, or on the CPU."""
    arm, angles, displacement = PlanarArm(), torch.rand(5, 3).double(), torch.ones(5, 2).double()
    step = arm.joint_step(angles, displacement)
    assert step.shape == (5, 3) and step.dtype == torch.double
    assert arm.joint_step(angles.to("meta"), displacement.to("meta")).is_meta


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_freezing_stops_at_the_module_s_edge(name):
    """A tensor of the conditioning frozen because it has the shape of one of the backbone's; the
    timestep encoder or the position embedding left out."""
    backbone = make_backbone(name)
    pathway = film.make_conditioning(backbone, "pose", horizon=16)
    train.freeze(backbone)
    assert trainable(backbone) == {False} and trainable(pathway) == {True}


def test_the_average_by_hand():
    """decay and 1 - decay swapped, or of another update; the average not changed in place.

    Decays from 0 on, with a cap of 0.5: 0, 0.4054, 0.5, 0.5. torch itself makes the first copy.
    """
    weight = nn.Linear(1, 1, bias=False)
    average = AveragedModel(weight, multi_avg_fn=functools.partial(train.ema_update, 0.5))
    expected = [8, 4, 2.8108, 1.9054, 5.9527]
    for new, kept in zip([8.0, 4.0, 2.0, 1.0, 10.0], expected):
        nn.init.constant_(weight.weight, new)
        average.update_parameters(weight)
        assert average.module.weight.item() == pytest.approx(kept, abs=1e-4)
        assert weight.weight.item() == new


def test_the_loss_encodes_an_observation_once_for_all_its_draws():
    """With pictures the encoder is most of the work."""
    policy, observations, encoded = solving_policy(noise_samples=3), observe(8), []
    policy.conditioning.encode = lambda seen: encoded.append(seen) or Knowing().encode(seen)
    assert policy.loss(observations, plan(observations)) < 1e-8
    assert [len(seen) for seen in encoded] == [8]
    assert len(policy.backbone.seen[0].timestep) == 24


def test_the_loss_of_a_silent_network_is_one():
    """The mean square of standard normal numbers: 5 standard errors for 8,192 of them are 0.08."""
    torch.manual_seed(0)
    policy, observations = solving_policy(noise_samples=4), observe(64)
    policy.backbone.forward = lambda noisy_actions, *_: torch.zeros_like(noisy_actions)
    assert policy.loss(observations, plan(observations)).item() == pytest.approx(1, abs=0.08)


def test_act_takes_arrays_and_refuses_what_is_no_observation():
    """Another shape, numbers that are not finite, and a network whose actions are none."""
    policy, good = solving_policy(), observe(3)
    policy.sample = lambda observations, generator: torch.zeros(len(observations), 16, 2)
    standing = policy.act(good.double().numpy())
    torch.testing.assert_close(standing, good[:, -1:, :2].expand(3, 8, 2))
    for bad in (good[0], good[:, :1], good[..., :4], good * math.nan, good * math.inf):
        with pytest.raises(ValueError, match="observations must"):
            policy.act(bad)
    policy.sample = lambda observations, generator: torch.full((3, 16, 2), math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        policy.act(good)


# The mistakes themselves -------------------------------------------------------------------------

def test_every_planted_mistake_still_finds_its_place():
    """tests/mutants.py plants some 350 mistakes; a changed line must be changed there as well."""
    from tests.mutants import ELSEWHERE, MUTANTS, ROOT
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name, file, old, new, test, _, *more in MUTANTS + ELSEWHERE:
        assert not test or f"def {test}(" in tests, name
        text = (ROOT / file).read_text(encoding="utf-8")
        for before, after in [(old, new), *more]:
            assert text.count(before) == 1 and before != after, name
