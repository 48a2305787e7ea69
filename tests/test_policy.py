"""diffusion.DiffusionPolicy: what it denoises, how it acts, its files; and the same numbers, on any
device, of every backbone with every mechanism.

    python -m tests.test_policy      record tests/data/network_goldens.npz anew: read
                                     test_the_networks_give_the_recorded_numbers before you do
"""
import ast
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import film
from diffusion import DDPM, DiffusionPolicy
from heads import BACKBONES, MLP, Transformer, UNet, make_backbone

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "data" / "network_goldens.npz"
CORNERS = [(-60, 0), (60, 0), (60, 30), (-60, 30), (-15, 30), (15, 30), (15, 120), (-15, 120)]
GOAL = (256, 256, 0.785)
SCALE = [30 + 12 * step for step in range(16)]
PAIRS = [(name, mechanism) for name, kind in BACKBONES.items() for mechanism in kind.mechanisms]


def make_policy(name="mlp", mechanism="film", action_range=(0, 512), **settings):
    torch.manual_seed(0)
    backbone = make_backbone(name, conditioning=mechanism)
    conditioning = film.make_conditioning(backbone, "state", obs_steps=2, corners=CORNERS,
                                          goal=GOAL)
    return DiffusionPolicy(conditioning, backbone, SCALE, action_range, **settings).eval()


def observations(batch):
    return torch.rand(batch, 2, 5, generator=torch.Generator().manual_seed(1)) * 300 + 100


# What is denoised --------------------------------------------------------------------------------

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


def test_absolute_actions_are_places_in_the_action_range():
    """Wherever the agent is; nothing is clipped, as the range holds all actions."""
    policy = make_policy(relative=False, action_range=(-10, 30))
    actions = torch.tensor([[[-10.0, 0.0], [10.0, 30.0]]])
    expected = torch.tensor([[[-1.0, -0.5], [0.0, 1.0]]])
    for agent in torch.tensor([[[0.0, 0.0]], [[20.0, -5.0]]]):
        assert torch.equal(policy.normalise(actions, agent), expected)
        assert torch.equal(policy.denormalise(expected, agent), actions)


def test_executed_actions_lie_in_the_action_range():
    """And where the network asks for more, at its ends: (150, 250) px is less than it asks for."""
    actions = make_policy(action_range=(150, 250)).act(observations(20))
    assert actions.min() == 150 and actions.max() == 250


# The loss -----------------------------------------------------------------------------------------

@torch.no_grad()
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
        policy = make_policy(**settings).requires_grad_(False)
        bias = policy.backbone.output.bias.requires_grad_()     # the only gradient that is needed
        policy.loss(seen, actions).backward()
        gradients[name] = bias.grad
    size = gradients["whole"].norm()
    assert (gradients["subset"] - gradients["whole"]).norm() < 0.1 * size


@pytest.mark.parametrize("name, mechanism", [("mlp", "film"), ("transformer", "prefix")])
def test_an_observation_is_encoded_once(name, mechanism):
    """For all its noise draws in the loss, and for all denoising steps in acting: with pictures
    for observations this will be most of the cost."""
    policy, encoded = make_policy(name, mechanism, noise_samples=8), []
    policy.conditioning.encoder.register_forward_hook(
        lambda module, given, o: encoded.append(len(o)))
    policy.loss(observations(3), torch.rand(3, 16, 2) * 512)
    assert encoded == [3]
    policy.act(observations(5))
    assert encoded == [3, 5]


# Acting -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampling_steps", [None, 10])
def test_act_equals_sampling_with_the_whole_network_at_every_step(sampling_steps):
    """Encoding the observation only once changes nothing."""
    policy, seen = make_policy(sampling_steps=sampling_steps, temperature=0.7), observations(4)
    given = policy.act(seen, torch.Generator().manual_seed(2))

    def denoiser(noisy_actions, timestep):
        o = policy.conditioning.encode(seen)
        tau = policy.backbone.time_encoder(timestep)
        return policy.backbone(noisy_actions, policy.conditioning(o, tau))

    with torch.no_grad():
        chunk = policy.ddpm.sample(denoiser, (4, 16, 2), sampling_steps,
                                   torch.Generator().manual_seed(2), temperature=0.7)
    scale = torch.tensor(SCALE)[:, None]
    expected = (chunk * scale + seen[:, -1:, :2])[:, 1:9].clamp(0, 512)
    assert given.shape == (4, 8, 2)
    torch.testing.assert_close(given, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_steps", [None, 10])
def test_all_drawn_noise_is_multiplied_by_the_temperature(num_steps):
    """In the start and in every step, and by nothing else; the temperature that a file asks for."""
    ddpm, temperature, shape = DDPM(), 0.3, (3, 16, 2)

    def draw(generator=torch.Generator().manual_seed(5)):
        return temperature * torch.randn(shape, generator=generator)

    def denoiser(noisy_actions, timestep):
        return 0.5 * noisy_actions.cos()

    actions = draw()
    visited = list(range(99, -1, -1) if num_steps is None else range(90, -1, -10))
    for timestep, previous in zip(visited, [*visited[1:], -1]):
        predicted = denoiser(actions, timestep)
        actions = ddpm.step(predicted, timestep, actions, draw()) if num_steps is None else \
            ddpm.ddim_step(predicted, timestep, previous, actions)
    given = ddpm.sample(denoiser, shape, num_steps, torch.Generator().manual_seed(5), temperature)
    torch.testing.assert_close(given, actions)


def test_act_takes_arrays_and_is_repeatable():
    policy, seen = make_policy(), observations(3)
    first = policy.act(seen, torch.Generator().manual_seed(3))
    assert torch.equal(first, policy.act(seen.numpy(), torch.Generator().manual_seed(3)))
    assert not torch.equal(first, policy.act(seen, torch.Generator().manual_seed(4)))


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
    with pytest.raises(ValueError, match="loss_steps=4.*UNet does"):
        make_policy("unet", loss_steps=4)


# Files --------------------------------------------------------------------------------------------

def assert_same_actions(policy, other, seen):
    assert torch.equal(policy.act(seen, torch.Generator().manual_seed(0)),
                       other.act(seen, torch.Generator().manual_seed(0)))


def test_save_and_load_give_the_same_actions(tmp_path):
    policy, seen = make_policy(executed_actions=4, sampling_steps=5), observations(2)
    policy.save(tmp_path / "policy.pt")
    loaded = DiffusionPolicy.load(tmp_path / "policy.pt")
    assert not loaded.training and loaded.executed_actions == 4
    assert_same_actions(policy, loaded, seen)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    """Loading builds networks, which draw their weights: what is drawn next must not change."""
    make_policy().save(tmp_path / "policy.pt")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    DiffusionPolicy.load(tmp_path / "policy.pt")
    assert torch.equal(torch.rand(3), expected)


def test_a_policy_that_was_given_arrays_can_be_loaded(tmp_path):
    """numpy in a file's configuration is refused on loading: noticed only after training."""
    backbone = make_backbone("mlp")
    conditioning = film.make_conditioning(backbone, obs_steps=2, corners=np.array(CORNERS),
                                          goal=np.array(GOAL))
    policy = DiffusionPolicy(conditioning, backbone, np.array(SCALE), np.array([0.0, 512.0])).eval()
    policy.save(tmp_path / "policy.pt")
    given, loaded = (one.act(observations(2), torch.Generator().manual_seed(0))
                     for one in (policy, DiffusionPolicy.load(tmp_path / "policy.pt")))
    assert torch.equal(given, loaded)


def test_absolute_actions_survive_the_file(tmp_path):
    """Neither the kind of actions nor the board that they lie on is assumed by the loader."""
    policy = make_policy(relative=False, action_range=(100, 300))
    policy.save(tmp_path / "policy.pt")
    loaded = DiffusionPolicy.load(tmp_path / "policy.pt")
    assert not loaded.relative and (loaded.low, loaded.high) == (100, 300)
    assert_same_actions(policy, loaded, observations(2))


SMALL = [(MLP, dict(width=32, hidden=48, depth=2, dropout=0.2)),
         (UNet, dict(time_dim=16, widths=(8, 16), kernel=3)),
         (Transformer, dict(width=32, hidden=48, heads=2, depth=2, dropout=0.2))]


@pytest.mark.parametrize("kind, size", SMALL)
def test_what_the_classes_were_built_with_is_in_the_file(kind, size, tmp_path):
    """No function that built them has to pin it on: any sizes, of no scale and with no default."""
    backbone = kind(2, 12, "additive", **size)
    encoder = film.StateEncoder(3, CORNERS, GOAL, width=24, depth=2)
    conditioning = film.Conditioning(encoder, backbone.time_encoder.dim,
                                     backbone.modulation_widths, backbone.mechanism)
    settings = dict(obs_steps=3, executed_actions=5, sampling_steps=7, noise_samples=2,
                    temperature=0.5)
    policy = DiffusionPolicy(conditioning, backbone, SCALE[:12], (0, 512), **settings).eval()
    policy.save(tmp_path / "policy.pt")
    loaded = DiffusionPolicy.load(tmp_path / "policy.pt")
    assert type(loaded.backbone) is kind and loaded.backbone.config == backbone.config
    assert backbone.config == dict(size, name=kind.name, action_dim=2, horizon=12,
                                   conditioning="additive")
    assert loaded.config == policy.config and policy.config.items() >= settings.items()
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.conditioning.encoder.config == encoder.config
    assert_same_actions(policy, loaded, torch.rand(2, 3, 5) * 400)


def test_a_file_of_another_format_gets_one_clear_line(tmp_path):
    policy, path = make_policy(), tmp_path / "policy.pt"
    policy.save(path)
    saved = torch.load(path, weights_only=True)
    assert saved["format"] == 3
    torch.save(dict(saved, format=1), path)
    with pytest.raises(ValueError) as refused:
        DiffusionPolicy.load(path)
    assert str(refused.value) == f"{path} has policy format 1, this code reads 3"
    for other, found in (([1, 2], "list"), ({"weights": 3}, None), (dict(saved, format=4), 4)):
        torch.save(other, path)
        with pytest.raises(ValueError, match=f"has policy format {found}, this code reads 3$"):
            DiffusionPolicy.load(path)


def test_missing_and_damaged_files_get_one_clear_line(tmp_path):
    path = tmp_path / "policy.pt"
    with pytest.raises(ValueError, match="^no policy file at .*policy.pt$"):
        DiffusionPolicy.load(path)
    path.write_bytes(b"not a policy")
    with pytest.raises(ValueError, match="^.* is not a readable policy file .*$"):
        DiffusionPolicy.load(path)
    make_policy().save(path)
    saved = torch.load(path, weights_only=True)
    del saved["weights"]["backbone.norm.weight"]
    torch.save(saved, path)
    with pytest.raises(ValueError, match="^.* does not fit this code .*$"):
        DiffusionPolicy.load(path)


# The same numbers as before -----------------------------------------------------------------------

def random(seed, *shape):
    """Standard normal numbers that no version of numpy or torch will change."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def network_numbers(name, mechanism):
    """What a policy of laptop size computes, in float64, with weights that their names decide."""
    settings = dict(noise_samples=2, loss_steps=4) if name == "mlp" else {}
    policy = make_policy(name, mechanism, **settings).double()
    with torch.no_grad():
        for tensor_name, tensor in policy.named_parameters():
            tensor.copy_(0.15 * random(zlib.crc32(tensor_name.encode()), *tensor.shape))
    seen = 250 + 50 * random(1, 3, 2, 5)
    actions = 250 + 80 * random(2, 3, 16, 2)
    torch.manual_seed(7)
    loss = policy.train().loss(seen, actions)
    loss.backward()
    gradients = [tensor.grad for tensor in policy.parameters() if tensor.grad is not None]
    policy.eval()
    with torch.no_grad():
        o = policy.conditioning.encode(seen)
        predicted = policy.predict_noise(random(3, 3, 16, 2), torch.tensor([0, 40, 99]), o)
    return dict(predicted=predicted.numpy(),
                act=policy.act(seen, torch.Generator().manual_seed(3)).numpy(), loss=loss.item(),
                gradient=torch.cat([gradient.flatten() for gradient in gradients]).norm().item())


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name, mechanism", PAIRS)
def test_the_networks_give_the_recorded_numbers(name, mechanism, float64):
    """Predicted noise, actions (px), loss and size of its gradient, as commit 3bdb908 had them.

    If it fails: you changed what is computed, and committed results are of other networks. Where
    that is meant, record anew (see the top of this file) and say so in the commit and in
    results/README.md. Where only a tensor was renamed, its weights here are others: give it its old
    name in network_numbers. Where predicted noise and actions are right, look first whether the
    loss draws its random numbers in another order: that is no mistake, and recorded anew.
    In float64 no other processor's rounding gets in the way; in float32 it is up to 2e-6.
    """
    with np.load(GOLDENS) as goldens:
        for key, given in network_numbers(name, mechanism).items():
            np.testing.assert_allclose(given, goldens[f"{name}/{mechanism}/{key}"],
                                       rtol=1e-9, atol=1e-9, err_msg=key)


# Devices ------------------------------------------------------------------------------------------

class OnlyMeta(TorchDispatchMode):
    """Refuses every tensor that is made elsewhere, single numbers apart: the meta device itself
    lets an index of another device pass, which a GPU's `gather` does not."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and not tensor.is_meta:
                raise RuntimeError(f"{operation} made a tensor on {tensor.device}")
        return made


@pytest.mark.parametrize("name, mechanism, observation", [
    *[(*pair, "state") for pair in PAIRS],
    *[(*pair, observation) for pair in (("mlp", "film"), ("transformer", "prefix"))
      for observation in ("joints", "pose", "none")]])
def test_no_tensor_is_made_on_the_wrong_device(name, mechanism, observation):
    """torch's `meta` device has shapes but no numbers, and refuses tensors of another device as a
    GPU would. Few timesteps, because it is slow."""
    policy = make_policy(name, mechanism, noise_samples=2)
    if observation != "state":
        policy.conditioning = film.make_conditioning(policy.backbone, observation, horizon=16)
    policy.loss_steps = None if policy.backbone.mixes_time else 4
    policy.ddpm = DDPM(2)
    policy.to("meta").train()
    shape = {"state": (3, 2, 5), "joints": (3, 16, 3)}.get(observation, (3, 16, 2))
    seen, actions = torch.empty(shape, device="meta"), torch.empty(3, 16, 2, device="meta")
    agent = None if observation == "state" else torch.empty(3, 2, device="meta")
    with OnlyMeta():
        loss = policy.loss(seen, actions, agent)
        loss.backward()
        for policy.sampling_steps in (None, 2):
            assert policy.eval().sample(seen).shape == (3, 16, 2)
    assert loss.is_meta and all(tensor.grad.is_meta for tensor in policy.parameters())


# Rooms --------------------------------------------------------------------------------------------

PROJECT = {"film", "heads", "diffusion", "kinematics", "train", "sim_pusht"}
KNOWS = {"film": set(), "heads": {"film"}, "diffusion": set(), "kinematics": set(),
         "sim_pusht": set(), "train": PROJECT - {"train"}}
ONLY_INSIDE_A_FUNCTION = {"diffusion": {"film", "heads"},     # a policy's file names its networks
                          "film": {"sim_pusht"},              # the lesson draws scenes
                          "kinematics": {"sim_pusht"}}        # the lesson compares the two motions


def imported(node):
    """The project's modules that a piece of code imports, functions in it left out, then within."""
    outside, inside = set(), set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            outside.add((child.module or "").split(".")[0])
        found, deeper = imported(child)
        inside |= deeper
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside |= found
        else:
            outside |= found
    return outside & PROJECT, inside & PROJECT


@pytest.mark.parametrize("name", sorted(PROJECT))
def test_no_import_runs_in_a_circle(name):
    outside, inside = imported(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
    assert outside == KNOWS[name]
    assert inside <= ONLY_INSIDE_A_FUNCTION.get(name, set())


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    np.savez_compressed(GOLDENS, **{f"{name}/{mechanism}/{key}": value for name, mechanism in PAIRS
                                    for key, value in network_numbers(name, mechanism).items()})
