"""Policies that see pictures: their encoder, batches, files and runs."""
import copy
import re

import numpy as np
import pytest
import torch

import film
import sim_pusht
import train
from diffusion import DiffusionPolicy
from heads import make_backbone

CORNERS, GOAL = sim_pusht.KEYPOINTS.tolist(), sim_pusht.GOAL.tolist()
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("short_episodes")


def make_policy(observation="pixels", name="mlp", mechanism="film", encoder={}, **settings):
    torch.manual_seed(0)
    backbone = make_backbone(name, conditioning=mechanism)
    conditioning = film.make_conditioning(backbone, observation, obs_steps=2, corners=CORNERS,
                                          goal=GOAL, **encoder)
    return DiffusionPolicy(conditioning, backbone, train.ACTION_SCALE, (0, 512), **settings)


def scenes(number, seed=0):
    """Pasts (number, 2, 5): the agent moves 3 px, the block stands still."""
    state = sim_pusht.PushT(number).reset(seed)
    return np.stack([state, state + [3, -3, 0, 0, 0]], 1)


def batch(number=4):
    """Observations and actions as `train.demonstration_batches` yields them."""
    config, _ = train.parse(["--observation", "pixels", "--device", "cpu"])
    past = torch.as_tensor(scenes(number), dtype=torch.float32)
    return train.observations_of(past, config), torch.rand(number, 16, 2) * 400


# The encoders ------------------------------------------------------------------------------------

def test_a_point_is_where_its_map_is_large():
    """x is the column, y the row, -1 and 1 the outermost of 24 places; a sharp map, a sharp point."""
    eye = film.PixelEncoder(2, CORNERS, GOAL)
    maps = torch.zeros(1, 16, 24, 24)
    maps[0, :, 12, 12] = 1                    # the others
    maps[0, 5] = 0
    maps[0, 5, 3, 20] = 1
    eye.maps.forward = lambda pictures: maps
    points, corners = eye.locate(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))
    assert points.shape == (1, 16, 2) and corners.shape == (1, 8, 2)
    expected = torch.tensor([20, 3]) / 23 * 2 - 1
    torch.testing.assert_close(points[0, 5], expected, atol=1e-4, rtol=0)
    assert (points[0, 4] - points[0, 5]).abs().min() > 0.5


def test_an_eye_sees_row_and_column_of_a_picture():
    """What it sees depends on each of the three colours, and a moved picture moves the points."""
    torch.manual_seed(0)
    eye = film.PixelEncoder(2, CORNERS, GOAL)
    picture = torch.full((1, 96, 96, 3), 255, dtype=torch.uint8)
    for color in range(3):
        changed = picture.clone()
        changed[0, 40:60, 20:40, color] = 0
        assert not torch.allclose(eye.locate(picture)[0], eye.locate(changed)[0], atol=1e-3)
    moved = changed.roll(16, 2)               # to the right: 4 places of 24
    x, y = (eye.locate(moved)[0] - eye.locate(changed)[0])[0].abs().sum(0)
    assert x > 5 * y


@pytest.mark.parametrize("training", [True, False])
def test_what_an_eye_computes_of_a_picture(training):
    """Pictures that are not scaled to -1 and 1; a softmax of another sharpness in evaluation; a
    part of the corners that is left out, or that no gradient reaches."""
    torch.manual_seed(0)
    eye = film.PixelEncoder(2, CORNERS, GOAL).train(training)
    pixels = torch.as_tensor(sim_pusht.draw_states(scenes(3)[:, -1]))
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    seen = []
    eye.maps.register_forward_hook(lambda maps, given, made: seen.append((given[0], made)))
    points, corners = eye.locate(pixels)
    pictures, maps = seen[0]
    assert pictures.min() == -1 and pictures.max() == 1
    torch.testing.assert_close(pictures, pixels.permute(0, 3, 1, 2).float() * 2 / 255 - 1)
    maps = maps.flatten(2).double()
    deviation = (maps.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()     # as in layer_norm
    weight = torch.exp(4 * (maps - maps.mean(-1, keepdim=True)) / deviation)
    row, column = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    places = torch.stack([column, row], -1).reshape(-1, 2) / 11.5 - 1
    expected = (weight / weight.sum(-1, keepdim=True)) @ places.double()
    torch.testing.assert_close(points.double(), expected, atol=1e-3, rtol=0)
    flat = points.flatten(1)
    expected = 256 + 256 * (eye.linear(flat) + eye.correction(flat))
    torch.testing.assert_close(corners.flatten(1), expected, atol=1e-3, rtol=0)
    corners.sum().backward()
    for part in (eye.linear, eye.correction, eye.maps):
        assert all(weight.grad.abs().sum() > 0 for weight in part.parameters())
    assert eye.sharpness.grad.abs() > 0


@pytest.mark.parametrize("observation", ["state", "pixels"])
@pytest.mark.parametrize("mechanism", ["cross-attention", "prefix"])
def test_each_observation_step_has_its_own_token(observation, mechanism):
    """Whatever is observed: all steps as one token, or each token of the newest step."""
    policy = make_policy(observation, "transformer", mechanism)
    past = torch.as_tensor(scenes(3), dtype=torch.float32)
    moved = past.clone()
    moved[:, 0, :2] += 50     # the agent's earlier position
    config, _ = train.parse(["--observation", observation, "--device", "cpu"])
    one, other = (policy.conditioning.encode(policy.conditioning.encoder.perceive(
        train.observations_of(states, config))) for states in (past, moved))
    assert one.shape == (3, 2, policy.conditioning.encoder.size)
    assert not torch.allclose(one[:, 0], other[:, 0]) and torch.equal(one[:, 1], other[:, 1])


def test_seen_corners_are_looked_at_as_those_of_a_state():
    past = torch.as_tensor(scenes(5), dtype=torch.float32)
    eye, pose = film.PixelEncoder(2, CORNERS, GOAL), film.StateEncoder(2, CORNERS, GOAL)
    eye.locate = lambda pixels: (None, film.place(pose.corners, past[:, -1, 2:]))
    perceived = eye.perceive({"pixels": None, "agent_pos": past[..., :2]})
    torch.testing.assert_close(eye.features(perceived), pose.features(past))


def test_the_newest_agent_position_is_the_present_one():
    past = torch.as_tensor(scenes(3), dtype=torch.float32)
    for observation in ("state", "pixels"):
        encoder = make_policy(observation).conditioning.encoder
        seen = encoder.read(sim_pusht.observe(past.numpy(), observation), CPU)
        torch.testing.assert_close(encoder.agent_position(seen), past[:, -1, :2])


def test_corners_are_found_in_full_precision_under_autocast():
    pixels = torch.as_tensor(sim_pusht.draw_states(scenes(3)[:, -1]))
    with torch.autocast("cpu", torch.bfloat16):
        points, corners = film.PixelEncoder(2, CORNERS, GOAL).locate(pixels)
    assert points.dtype == corners.dtype == torch.float32
    assert (corners != corners.bfloat16().float()).float().mean() > 0.9


def test_an_eye_learns_to_see(tmp_path, capsys):
    torch.manual_seed(0)
    film.lesson_of_seeing(tmp_path, updates=160, scenes=400)
    printed = capsys.readouterr().out
    wrong = [float(number) for number in re.findall(r"updates +([\d.]+) px", printed)]
    assert len(wrong) == 9 and wrong[-1] < 0.5 * wrong[0]
    assert (tmp_path / "eye.png").stat().st_size > 0


# The policy --------------------------------------------------------------------------------------

def test_the_loss_minds_the_corners_as_much_as_asked():
    observations, actions = batch()
    losses = []
    for weight in (0.0, 0.3):
        policy = make_policy(encoder={"corner_weight": weight}, noise_samples=4, loss_steps=4)
        torch.manual_seed(1)
        losses.append(policy.loss(observations, actions))
    off = policy.conditioning.encoder.locate(observations["pixels"])[1] - observations["corners"]
    torch.testing.assert_close(losses[1] - losses[0], 0.3 * off.abs().mean() / 20)


def test_the_corner_term_trains_what_finds_the_corners_and_nothing_else():
    observations, _ = batch()
    encoder = make_policy(encoder={"corner_weight": 0.3}).conditioning.encoder
    encoder.auxiliary_loss(encoder.perceive(observations)).backward()
    trained = {name.split(".")[0] for name, weight in encoder.named_parameters()
               if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert trained == {"maps", "sharpness", "linear", "correction"}


def test_a_policy_can_be_copied_after_its_loss():
    """Nothing of the graph stays on a module, and the observations are left as they were."""
    policy = make_policy(encoder={"corner_weight": 0.3})
    observations, actions = batch()
    given = dict(observations)
    policy.loss(observations, actions).backward()
    assert observations.keys() == given.keys()
    assert all(observations[name] is given[name] for name in given)
    twin = copy.deepcopy(policy)
    losses = []
    for one in (policy, twin):
        torch.manual_seed(2)
        losses.append(one.loss(observations, actions))
    assert torch.equal(*losses)


def test_the_weight_of_the_corners_is_in_the_file(tmp_path):
    policy = make_policy(encoder={"corner_weight": 0.3})
    policy.save(tmp_path / "policy.pt")
    assert DiffusionPolicy.load(tmp_path / "policy.pt").conditioning.encoder.corner_weight == 0.3
    saved = torch.load(tmp_path / "policy.pt", weights_only=True)
    del saved["conditioning"]["corner_weight"]     # a file may lack it
    torch.save(saved, tmp_path / "without.pt")
    assert DiffusionPolicy.load(tmp_path / "without.pt").conditioning.encoder.corner_weight == 0


@pytest.mark.parametrize("name, mechanism", [("mlp", "film"), ("transformer", "cross-attention")])
def test_only_the_loss_needs_to_know_the_corners(name, mechanism):
    """And the error of the noise alone trains the eye as well."""
    observations, actions = batch()
    policy = make_policy(name=name, mechanism=mechanism)
    corners = observations.pop("corners")
    for weight in policy.conditioning.parameters():
        torch.nn.init.normal_(weight, std=0.1) if weight.dim() > 1 else None
    losses = []
    for seen in (observations | {"corners": corners + 50}, observations):
        torch.manual_seed(0)
        policy.zero_grad()
        losses.append(policy.loss(seen, actions))
    losses[1].backward()
    assert torch.equal(*losses)
    assert all(weight.grad.abs().sum() > 0 for weight in policy.conditioning.encoder.parameters())
    policy.eval()
    acted = [policy.act(seen, torch.Generator().manual_seed(0))
             for seen in (observations, observations | {"corners": corners + 50})]
    assert torch.equal(*acted)


def test_a_picture_is_looked_at_once(monkeypatch):
    looks, locate = [], film.PixelEncoder.locate
    monkeypatch.setattr(film.PixelEncoder, "locate",
                        lambda eye, pixels: looks.append(len(pixels)) or locate(eye, pixels))
    policy = make_policy(noise_samples=4, loss_steps=4)
    observations, actions = batch()
    policy.loss(observations, actions)
    assert looks == [4]
    policy.act(observations)
    assert looks == [4, 4]


@pytest.mark.parametrize("change, told", [
    ({"pixels": np.zeros((1, 96, 96, 3))}, "uint8"),
    ({"pixels": np.zeros((1, 64, 96, 3), np.uint8)}, r"96, 96, 3\), got \(1, 64, 96, 3\)"),
    ({"pixels": np.zeros((1, 3, 96, 96), np.uint8)}, r"got \(1, 3, 96, 96\)"),
    ({"pixels": None}, "NoneType"), ({"pixels": "a"}, "str"),
    ({"agent_pos": np.zeros((1, 3, 2))}, r"got \(1, 3, 2\)"),
    ({"agent_pos": np.full((1, 2, 2), np.nan)}, "agent_pos must be finite")])
def test_what_is_no_observation_is_one_line(change, told):
    observation = {"pixels": np.zeros((1, 96, 96, 3), np.uint8), "agent_pos": np.zeros((1, 2, 2))}
    policy = make_policy()
    policy.act(observation)
    with pytest.raises(ValueError, match=told):
        policy.act(observation | change)


def test_an_observation_of_another_kind_is_one_line():
    past = scenes(2)
    for observation, other in (("state", "pixels"), ("pixels", "state")):
        with pytest.raises(ValueError, match="observations must"):
            make_policy(observation).act(sim_pusht.observe(past, other))


# Runs --------------------------------------------------------------------------------------------

def test_batches_show_what_the_demonstrations_are_in():
    config, _ = train.parse(["--observation", "pixels", "--task", "away", "--device", "cpu"])
    config.batch_size = 20
    state = scenes(12)[:, 0]
    demonstrations = dict(state=state, action=state[:, :2], episode_ends=np.array([5, 12]))
    seen, _ = next(train.demonstration_batches(demonstrations, config))
    assert seen["pixels"].shape == (20, 96, 96, 3) and seen["pixels"].dtype == torch.uint8
    for i in range(20):
        (frame,) = np.flatnonzero(np.isclose(state[:, :2], seen["agent_pos"][i, 1]).all(1))
        before = max(frame - 1, 0 if frame < 5 else 5)
        np.testing.assert_allclose(seen["agent_pos"][i, 0], state[before, :2], rtol=1e-6)
        shown = sim_pusht.draw_states(np.float32(state[frame]), goal=sim_pusht.AWAY)
        np.testing.assert_array_equal(seen["pixels"][i], shown)
        np.testing.assert_allclose(seen["corners"][i], sim_pusht.keypoints(state[frame, 2:]),
                                   rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_stage_2_alone_minds_the_corners(weight, tmp_path, monkeypatch):
    """Whatever an encoder perceives: 0 in stage 1, in stage 2 the mean error of the corners, in
    units of 20 px, times the weight."""
    added = {}

    def fit(stage, policy, *_):
        corners = torch.zeros(4, 8, 2)
        perceived = {"located": corners + 30.0, "corners": corners}
        added[stage] = float(policy.conditioning.encoder.auxiliary_loss(perceived))
        return policy

    monkeypatch.setattr(train, "fit", fit)
    config, _ = train.parse(["--observation", "pixels", "--corner-weight", str(weight),
                             "--decoupled", "--device", "cpu", "--out", str(tmp_path / "run")])
    state = scenes(3)[:, 0]
    demonstrations = dict(state=state, action=state[:, :2], episode_ends=np.array([3]))
    policy = train.train_policy(config, train.Run(config), demonstrations)
    assert added == {"stage1": 0, "stage2": pytest.approx(1.5 * weight)}
    assert policy.conditioning.encoder.config["corner_weight"] == weight     # as in its file


def test_a_policy_plays_with_pictures_of_its_task():
    """In front of it are the scenes of the task, with the task's own goal."""
    policy, seen = make_policy(), []
    act = policy.act
    policy.act = lambda past, generator: seen.append(past) or act(past, generator)
    train.evaluate(policy, "away", 2, max_steps=1)
    states = sim_pusht.PushT(2, "away").reset(train.EVALUATION_SEED)
    np.testing.assert_array_equal(seen[0]["pixels"],
                                  sim_pusht.draw_states(states, goal=sim_pusht.AWAY))
    np.testing.assert_array_equal(seen[0]["agent_pos"], np.stack([states[:, :2]] * 2, 1))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """An action head that never saw a picture."""
    folder = tmp_path_factory.mktemp("head") / "run"
    run(folder, "--decoupled", observation="state")
    return folder / "action_head.pt"


def run(folder, *more, observation="pixels"):
    demos = folder.parent / "demos.npz"
    if not demos.exists():
        np.savez(demos, **sim_pusht.expert_demonstrations(2, "near", seed=0))
    return train.main([str(word) for word in (
        "--smoke", "--demos", demos, "--stage1-steps", 4, "--steps", 6, "--episodes", 2,
        "--device", "cpu", "--observation", observation, "--out", folder, *more)])


def weights(folder):
    return torch.load(folder / "policy.pt", weights_only=True)["weights"]


def test_all_recipes_run_resume_and_play(head, tmp_path, monkeypatch, set_intervals):
    from_head = ["--decoupled", "--action-head", head]
    recipes = dict(normal=[], random=["--random-backbone"], pretrained=["--pretrained"],
                   decoupled=from_head)
    for name, flags in recipes.items():
        run(tmp_path / name, *flags)
    made = DiffusionPolicy.load(head).backbone.state_dict()
    kept = weights(tmp_path / "decoupled")
    assert all(torch.equal(kept[f"backbone.{name}"], value) for name, value in made.items())
    loaded = DiffusionPolicy.load(tmp_path / "decoupled" / "policy.pt")
    assert loaded.conditioning.encoder.observation == "pixels"
    assert loaded.act(sim_pusht.observe(scenes(3), "pixels")).shape == (3, 8, 2)

    set_intervals(monkeypatch, log_every=2, checkpoint_every=2)
    original, calls = DiffusionPolicy.loss, []

    def loss(policy, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(policy, *arguments)

    monkeypatch.setattr(DiffusionPolicy, "loss", loss)
    with pytest.raises(SystemExit):
        run(tmp_path / "resumed", *from_head)
    monkeypatch.setattr(DiffusionPolicy, "loss", original)
    run(tmp_path / "resumed", *from_head, "--resume")
    resumed = weights(tmp_path / "resumed")
    assert all(torch.equal(value, resumed[name]) for name, value in kept.items())
