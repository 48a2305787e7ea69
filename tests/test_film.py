"""film.py: the mechanisms against their equations, observation features, F, tokens, the lesson."""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import film
from heads import make_backbone

# Corners and goal are typed in here, not imported: the T of gym-pusht, 120 x 30 on 30 x 90 px.
CORNERS = [(-60, 0), (60, 0), (60, 30), (-60, 30), (-15, 30), (15, 30), (15, 120), (-15, 120)]
GOAL = (256.0, 256.0, math.pi / 4)


def state_encoder(**settings):
    torch.manual_seed(0)
    return film.StateEncoder(obs_steps=2, corners=CORNERS, goal=GOAL, **settings)


# The mechanisms, each against its equation written out for every number --------------------------

EQUATIONS = {     # h, its row's mean, deviation and root mean square, then the modulation's vectors
    "film": lambda h, mean, sd, rms, gamma, beta: gamma * h + beta,
    "additive": lambda h, mean, sd, rms, beta: h + beta,
    "adaln": lambda h, mean, sd, rms, gamma, beta: (1 + gamma) * (h - mean) / sd + beta,
    "adarms": lambda h, mean, sd, rms, gamma, beta: (1 + gamma) * h / rms + beta,
    "adaln-zero": lambda h, mean, sd, rms, gamma, beta, alpha:
        alpha * ((1 + gamma) * (h - mean) / sd + beta),
}
HOOKS = {"film": {"modulate"}, "additive": {"modulate"}, "adaln": {"after_norm"},
         "adarms": {"after_norm"}, "adaln-zero": {"after_norm", "gate"},
         "cross-attention": set(), "prefix": set()}


def test_film_is_gamma_times_h_plus_beta_of_each_sample():
    h = torch.randn(3, 3, 3)             # B == T == D on purpose: a missing axis would broadcast
    m = torch.randn(3, 2, 1, 3)
    out = film.FiLM().modulate(h, m)
    for b in range(3):
        for t in range(3):
            for d in range(3):
                expected = m[b, 0, 0, d] * h[b, t, d] + m[b, 1, 0, d]
                assert out[b, t, d].item() == pytest.approx(expected.item(), abs=1e-6)


def channels_first(mechanism, h, m):
    """The three methods as the U-Net calls them: on h (B,D,T) and m (B,V,D,1)."""
    h = mechanism.norm(h.shape[-1])(h) if mechanism.adaptive else h
    h, m = h.mT, m.mT
    return mechanism.gate(mechanism.modulate(mechanism.after_norm(h, m), m), m).mT


@pytest.mark.parametrize("apply", [film.apply_all, channels_first])
@pytest.mark.parametrize("name", EQUATIONS)
def test_a_mechanism_is_its_equation(name, apply):
    mechanism, D = film.MECHANISMS[name](), 6
    h = torch.randn(D, D, D) * 2 + 1                           # B == T == D on purpose
    m = torch.randn(D, len(mechanism.identity), 1, D)
    out = apply(mechanism, h, m)
    for b in range(D):
        for t in range(D):
            row = h[b, t].tolist()
            mean = sum(row) / D
            sd = math.sqrt(sum((x - mean) ** 2 for x in row) / D + 1e-5)     # LayerNorm's epsilon
            rms = math.sqrt(sum(x * x for x in row) / D)
            for d in range(D):
                expected = EQUATIONS[name](row[d], mean, sd, rms, *m[b, :, 0, d].tolist())
                assert out[b, t, d].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_identity_of_a_mechanism_changes_nothing(name):
    """At its identity a mechanism returns what it was given; adaln-zero removes it."""
    mechanism, h = film.MECHANISMS[name](), torch.randn(2, 5, 4)
    identity = torch.tensor(mechanism.identity).float()[None, :, None, None].expand(2, -1, 1, 4)
    given = film.apply_all(mechanism, h, identity)
    expected = mechanism.norm(4)(h) if mechanism.adaptive else h
    expected = torch.zeros_like(h) if name == "adaln-zero" else expected
    torch.testing.assert_close(given, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", film.MECHANISMS)
def test_a_mechanism_acts_in_the_hooks_that_it_names_and_nowhere_else(name):
    mechanism, h = film.MECHANISMS[name](), torch.randn(2, 5, 4)
    m = torch.randn(2, len(mechanism.identity), 1, 4)
    acting = {hook for hook in ("after_norm", "modulate", "gate")
              if getattr(mechanism, hook)(h, m) is not h}
    assert acting == HOOKS[name]


def test_the_gate_scales_the_branch_alone():
    """alpha multiplies, once and without the 1 that gamma has; gamma and beta leave it alone."""
    mechanism, h = film.AdaLNZero(), torch.randn(3, 3, 3)
    m = torch.randn(3, 3, 1, 3)
    expected = torch.stack([m[b, 2, 0] * h[b] for b in range(3)])
    assert torch.equal(mechanism.gate(h, m), expected)
    assert torch.equal(mechanism.after_norm(h, m), film.AdaLN().after_norm(h, m[:, :2]))


@pytest.mark.parametrize("name, norm, affine", [
    ("film", torch.nn.LayerNorm, True), ("additive", torch.nn.LayerNorm, True),
    ("cross-attention", torch.nn.LayerNorm, True), ("prefix", torch.nn.LayerNorm, True),
    ("adaln", torch.nn.LayerNorm, False), ("adaln-zero", torch.nn.LayerNorm, False),
    ("adarms", torch.nn.RMSNorm, False)])
def test_adaptive_mechanisms_take_the_place_of_the_norm_s_own_scale_and_shift(name, norm, affine):
    made = film.MECHANISMS[name]().norm(4)
    assert type(made) is norm and bool(list(made.parameters())) == affine


# Observations ------------------------------------------------------------------------------------

def test_corners_of_a_turned_block():
    quarter_turn = torch.tensor([100.0, 50.0, math.pi / 2])    # y points down: (x, y) -> (-y, x)
    placed = film.place(torch.tensor(CORNERS).float(), quarter_turn)
    expected = torch.tensor([(100 - y, 50 + x) for x, y in CORNERS]).float()
    torch.testing.assert_close(placed, expected, atol=1e-4, rtol=0)


def test_relative_features_by_hand():
    """At the goal with the agent on corner 0, then with the block 2 px to the right of the goal."""
    cos = sin = math.sqrt(0.5)
    corners = torch.tensor([(256 + cos * x - sin * y, 256 + sin * x + cos * y) for x, y in CORNERS])
    state = torch.tensor([[*corners[0].tolist(), *GOAL]])
    own = torch.tensor(CORNERS).float()     # in the block's frame
    coarse, _ = state_encoder().features(state[None]).view(2, 4, 8, 2)
    from_agent, from_goal, from_agent_turned, from_goal_turned = coarse
    torch.testing.assert_close(from_agent, (corners - corners[0]) / 256, atol=1e-4, rtol=0)
    torch.testing.assert_close(from_agent_turned, (own - own[0]) / 256, atol=1e-4, rtol=0)
    for vectors in from_goal, from_goal_turned:
        torch.testing.assert_close(vectors, torch.zeros(8, 2), atol=1e-6, rtol=0)
    state[0, 2] += 2
    _, (_, from_goal, _, from_goal_turned) = state_encoder().features(state[None]).view(2, 4, 8, 2)
    expected = torch.tensor([math.tanh(0.1), 0]).expand(8, 2)
    torch.testing.assert_close(from_goal, expected, atol=1e-4, rtol=0)
    expected = torch.tensor([1, -1]).expand(8, 2) * math.tanh(0.1 * cos)
    torch.testing.assert_close(from_goal_turned, expected, atol=1e-4, rtol=0)


def test_the_agent_is_where_the_last_observation_has_it():
    observations = torch.arange(20.0).view(2, 2, 5)
    assert state_encoder().agent_position(observations).tolist() == [[5, 6], [15, 16]]


def test_joint_encoder_is_sin_and_cos():
    angles = torch.randn(5, 16, 3)
    encoded = film.JointEncoder(horizon=16, num_joints=3)(angles)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((5, 16), math.sqrt(3)))
    torch.testing.assert_close(torch.atan2(encoded[..., :3].double(), encoded[..., 3:].double()),
                               torch.atan2(angles.sin(), angles.cos()).double())


@pytest.mark.parametrize("observation", ["state", "joints", "pose", "none"])
def test_an_encoder_takes_the_observations_as_they_are_and_adds_nothing_to_the_loss(observation):
    """Only the one of pixels does more (tests/test_pixels.py)."""
    settings = {"state": dict(obs_steps=2, corners=CORNERS, goal=GOAL)}.get(
        observation, dict(horizon=2))
    encoder, observations = film.ENCODERS[observation](**settings), torch.rand(3, 2, 5)
    assert encoder.perceive(observations) is observations
    assert encoder.auxiliary_loss(observations) == 0
    assert encoder(observations).shape[:2] == (3, encoder.steps)


# F: o and tau to modulations ----------------------------------------------------------------------

def conditioning(backbone_name="mlp", mechanism="film"):
    torch.manual_seed(0)
    backbone = make_backbone(backbone_name, conditioning=mechanism)
    pathway = film.make_conditioning(backbone, "state", obs_steps=2, corners=CORNERS, goal=GOAL)
    return backbone, pathway


def test_two_halves_equal_one_product_on_the_concatenation():
    """The paper's form: one Linear on Mish([tau, o]) with the two weights side by side."""
    backbone, pathway = conditioning()
    observations, tau = torch.rand(6, 2, 5) * 400, torch.randn(6, backbone.time_encoder.dim)
    weight = torch.cat([pathway.time_part.weight, pathway.observation_part.weight], dim=1)
    concatenated = torch.cat([tau, pathway.encoder(observations).flatten(1)], dim=1)
    expected = F.linear(F.mish(concatenated), weight, pathway.observation_part.bias)
    modulations = pathway(pathway.encode(observations), tau)
    given = torch.cat([modulation.flatten(1) for modulation in modulations], dim=-1)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mechanism", EQUATIONS)
def test_one_modulation_per_layer_and_noise_draws_follow_their_observation(mechanism):
    backbone, pathway = conditioning(mechanism=mechanism)
    if backbone.mechanism.starts_at_identity:     # at zero, where all are equal
        torch.nn.init.normal_(pathway.observation_part.weight)
    o = pathway.encode(torch.rand(3, 2, 5) * 400)
    modulations = pathway(o, torch.zeros(6, backbone.time_encoder.dim))
    V = len(backbone.mechanism.identity)
    assert [m.shape for m in modulations] == [(6, V, 1, w) for w in backbone.modulation_widths]
    for modulation in modulations:
        assert torch.equal(modulation[0::2], modulation[1::2])
        assert not torch.equal(modulation[0], modulation[2])


def test_every_noise_draw_has_its_own_timestep():
    """Two draws of one observation differ by tau alone, and as two observations of it would."""
    backbone, pathway = conditioning()
    o, tau = pathway.encode(torch.rand(3, 2, 5) * 400), torch.randn(6, backbone.time_encoder.dim)
    for several, each in zip(pathway(o, tau), pathway(o.repeat_interleave(2, dim=0), tau)):
        torch.testing.assert_close(several, each)
        assert not torch.allclose(several[0::2], several[1::2])


def test_unknown_names_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="'smell'.*state, state-and-goal, pixels, joints, pose, none"):
        film.make_conditioning(make_backbone("mlp"), "smell")


@pytest.mark.parametrize("backbone_name, name", [
    (backbone_name, name) for backbone_name in ("mlp", "unet", "transformer")
    for name in ("film", "additive", "adaln", "adarms", "adaln-zero")
    if (backbone_name, name) != ("unet", "adarms")])
def test_a_fresh_pathway_starts_at_the_identity_on_average(backbone_name, name):
    backbone, pathway = conditioning(backbone_name, name)
    o = pathway.encode(torch.rand(100, 2, 5) * 400)
    modulations = pathway(o, backbone.time_encoder(torch.arange(100)))
    identity = {"film": (1, 0), "additive": (0,), "adaln-zero": (0, 0, 0)}.get(name, (0, 0))
    vectors = zip(*[modulation.unbind(1) for modulation in modulations])
    for layers, value in zip(vectors, identity, strict=True):     # a layer alone is a small sample
        vector = torch.cat(layers, dim=-1)
        if backbone.mechanism.starts_at_identity:
            assert (vector == 0).all()
        else:
            assert abs(vector.mean().item() - value) < 0.1 and 0.01 < vector.std() < 0.5


# Tokens, and the conditions of stage 1 ------------------------------------------------------------

def token_pathway(observation="state", conditioning="cross-attention", **settings):
    torch.manual_seed(0)
    backbone = make_backbone("transformer", conditioning=conditioning)
    return backbone, film.make_conditioning(backbone, observation, **settings)


def test_tokens_are_one_for_the_timestep_then_one_for_each_observation():
    """Each depends on its own observation step alone, and draws follow their observation."""
    backbone, pathway = token_pathway(obs_steps=2, corners=CORNERS, goal=GOAL)
    observations = torch.rand(3, 2, 5) * 400
    changed = observations.clone()
    changed[:, 1] += 30
    o, tau = pathway.encode(observations), torch.randn(6, backbone.time_encoder.dim)
    tokens = pathway(o, tau)
    assert tokens.shape == (6, 3, backbone.time_encoder.dim)
    same = (tokens == pathway(pathway.encode(changed), tau)).all(-1)
    assert same[:, :2].all() and not same[:, 2].any()
    same = (tokens == pathway(o, tau + 1)).all(-1)
    assert same[:, 1:].all() and not same[:, 0].any()
    assert torch.equal(tokens[0::2, 1:], tokens[1::2, 1:])
    assert not torch.equal(tokens[0, 1:], tokens[2, 1:])


def test_a_token_is_the_mlp_of_its_content_and_position():
    """c_0 = MLP(tau + p_0) and c_s = MLP(W o_s + p_s), each token on its own."""
    backbone, pathway = token_pathway(obs_steps=2, corners=CORNERS, goal=GOAL)
    o, tau = torch.randn(4, 2, pathway.encoder.size), torch.randn(4, backbone.time_encoder.dim)
    tokens = pathway(o, tau)
    for b in range(4):
        expected = [pathway.mlp(tau[b] + pathway.position[0])]
        expected += [pathway.mlp(pathway.embed(o[b, s]) + pathway.position[1 + s]) for s in (0, 1)]
        torch.testing.assert_close(tokens[b], torch.stack(expected))


def test_stage_1_gives_one_token_for_each_joint_configuration():
    backbone, pathway = token_pathway("joints", horizon=16, num_joints=3)
    o = pathway.encode(torch.randn(5, 16, 3))
    assert pathway(o, torch.randn(5, backbone.time_encoder.dim)).shape[:2] == (5, 17)


def test_pose_and_none():
    positions = torch.tensor([[[0.0, 512.0], [256.0, 384.0]]])
    assert film.PoseEncoder(horizon=2)(positions).tolist() == [[[-1, 1], [0, 0.5]]]
    assert film.NoEncoder(horizon=2)(positions).tolist() == [[[0], [0]]]
    for observation in ("pose", "none"):
        for kind in ("film", "prefix"):
            backbone, pathway = token_pathway(observation, kind, horizon=16)
            poses = torch.rand(2, 16, 2) * 512
            tau = torch.randn(2, backbone.time_encoder.dim)
            one, other = (torch.cat([m.flatten() for m in pathway(pathway.encode(p), tau)])
                          for p in (poses, poses.flip(0)))
            assert torch.equal(one, other) == (observation == "none")


# The lesson ---------------------------------------------------------------------------------------

def test_the_numbers_of_the_lesson_are_gamma_times_h_plus_beta(tmp_path, capsys):
    film.lesson(tmp_path)
    rows = [[float(number) for number in re.findall(r"-?\d+\.\d+", line)]
            for line in capsys.readouterr().out.splitlines() if re.search(r"\d\.\d\d ", line)]
    gamma, beta, before, after = np.array(rows)
    assert len(gamma) == 6
    np.testing.assert_allclose(after, gamma * before + beta, atol=0.02)     # rounded to 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["film.png"]
