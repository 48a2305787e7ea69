"""film.py: modulation, observation features, and the split into two halves."""
import math

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


def test_film_is_gamma_times_h_plus_beta_of_each_sample():
    hidden = torch.randn(3, 3, 4)             # B == T on purpose: a missing axis would broadcast
    modulation = torch.randn(3, 8)
    out = film.FiLM()(hidden, modulation)
    for b in range(3):
        for t in range(3):
            for d in range(4):
                expected = modulation[b, d] * hidden[b, t, d] + modulation[b, 4 + d]
                assert out[b, t, d].item() == pytest.approx(expected.item(), abs=1e-6)


def test_corners_of_a_turned_block():
    quarter_turn = torch.tensor([100.0, 50.0, math.pi / 2])    # y points down: (x, y) -> (-y, x)
    placed = film.StateEncoder.place(torch.tensor(CORNERS).float(), quarter_turn)
    expected = torch.tensor([(100 - y, 50 + x) for x, y in CORNERS]).float()
    torch.testing.assert_close(placed, expected, atol=1e-4, rtol=0)


def test_keypoints_are_gym_pusht_s_corners_then_the_agent():
    state = torch.tensor([[[200.0, 300.0, 100.0, 50.0, 0.0]] * 2])
    expected = torch.tensor([(100 + x, 50 + y) for x, y in CORNERS] + [(200, 300)]) / 256 - 1
    given = state_encoder(features="keypoints").inputs(state)
    torch.testing.assert_close(given, expected.flatten().expand(1, 2, 18), atol=1e-5, rtol=0)


def test_relative_features_by_hand():
    """At the goal with the agent on corner 0, then with the block 2 px to the right of the goal."""
    cos = sin = math.sqrt(0.5)
    corners = torch.tensor([(256 + cos * x - sin * y, 256 + sin * x + cos * y) for x, y in CORNERS])
    state = torch.tensor([[*corners[0].tolist(), *GOAL]])
    from_agent, from_goal = state_encoder().inputs(state[None]).view(4, 8, 2)[:2]
    torch.testing.assert_close(from_agent, (corners - corners[0]) / 256, atol=1e-4, rtol=0)
    torch.testing.assert_close(from_goal, torch.zeros(8, 2), atol=1e-6, rtol=0)
    state[0, 2] += 2
    fine = state_encoder().inputs(state[None]).view(4, 8, 2)[3]
    torch.testing.assert_close(fine[:, 0], torch.full((8,), math.tanh(0.1)), atol=1e-4, rtol=0)


def test_joint_encoder_is_sin_and_cos():
    angles = torch.randn(5, 16, 3)
    encoded = film.JointEncoder(horizon=16, num_joints=3)(angles)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((5, 16), math.sqrt(3)))
    torch.testing.assert_close(torch.atan2(encoded[..., :3].double(), encoded[..., 3:].double()),
                               torch.atan2(angles.sin(), angles.cos()).double())


def conditioning():
    torch.manual_seed(0)
    backbone = make_backbone("mlp")
    pathway = film.make_conditioning(backbone, "state", obs_steps=2, corners=CORNERS, goal=GOAL)
    return backbone, pathway


def test_two_halves_equal_one_product_on_the_concatenation():
    """The paper's form: one Linear on Mish([tau, o]) with the two weights side by side."""
    backbone, pathway = conditioning()
    observations, embedding = torch.rand(6, 2, 5) * 400, torch.randn(6, backbone.time_encoder.dim)
    weight = torch.cat([pathway.time_part.weight, pathway.observation_part.weight], dim=1)
    concatenated = torch.cat([embedding, pathway.encoder(observations).flatten(1)], dim=1)
    expected = F.linear(F.mish(concatenated), weight, pathway.observation_part.bias)
    given = torch.cat(pathway(observations)(embedding), dim=-1)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_one_modulation_per_layer_and_repeats_follow_their_observation():
    backbone, pathway = conditioning()
    observations = torch.rand(3, 2, 5) * 400
    modulations = pathway(observations, 2)(torch.zeros(6, backbone.time_encoder.dim))
    assert [m.shape for m in modulations] == [(6, 2 * w) for w in backbone.modulation_widths]
    for modulation in modulations:
        assert torch.equal(modulation[0::2], modulation[1::2])
        assert not torch.equal(modulation[0], modulation[2])


def test_unknown_names_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="'smell'.*relative, keypoints"):
        state_encoder(features="smell")
    with pytest.raises(ValueError, match="'smell'.*state, joints"):
        film.make_conditioning(make_backbone("mlp"), "smell")


# The mechanisms, each against its equation written out for every number --------------------------

EQUATIONS = {     # h, its row's mean, deviation and root mean square, then the modulation's vectors
    "film": lambda h, mean, sd, rms, gamma, beta: gamma * h + beta,
    "additive": lambda h, mean, sd, rms, beta: h + beta,
    "adaln": lambda h, mean, sd, rms, gamma, beta: (1 + gamma) * (h - mean) / sd + beta,
    "adarms": lambda h, mean, sd, rms, gamma, beta: (1 + gamma) * h / rms + beta,
    "adaln-zero": lambda h, mean, sd, rms, gamma, beta, alpha:
        alpha * ((1 + gamma) * (h - mean) / sd + beta),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_mechanism_is_its_equation(name):
    mechanism, D = film.MECHANISMS[name](), 6
    hidden = torch.randn(3, 3, D) * 2 + 1                      # B == T on purpose
    vectors = torch.randn(3, len(mechanism.identity), D)
    normed = mechanism.norm(D)(hidden) if mechanism.adaptive else hidden
    out = mechanism(normed, vectors.flatten(1))
    for b in range(3):
        for t in range(3):
            row = hidden[b, t].tolist()
            mean = sum(row) / D
            sd = math.sqrt(sum((x - mean) ** 2 for x in row) / D)
            rms = math.sqrt(sum(x * x for x in row) / D)
            for d in range(D):
                expected = EQUATIONS[name](row[d], mean, sd, rms, *vectors[b, :, d].tolist())
                assert out[b, t, d].item() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_identity_of_a_mechanism_changes_nothing(name):
    """At its identity a mechanism returns what it was given; adaln-zero removes it."""
    mechanism, hidden = film.MECHANISMS[name](), torch.randn(2, 5, 4)
    identity = torch.tensor(mechanism.identity).float().repeat_interleave(4).expand(2, -1)
    expected = torch.zeros_like(hidden) if name == "adaln-zero" else hidden
    torch.testing.assert_close(mechanism(hidden, identity), expected, atol=0, rtol=0)


@pytest.mark.parametrize("backbone_name, name", [
    (backbone_name, name) for backbone_name in ("mlp", "unet", "transformer")
    for name in ("film", "additive", "adaln", "adarms", "adaln-zero")
    if (backbone_name, name) != ("unet", "adarms")])
def test_a_fresh_pathway_starts_at_the_identity_on_average(backbone_name, name):
    torch.manual_seed(0)
    backbone = make_backbone(backbone_name, conditioning=name)
    pathway = film.make_conditioning(backbone, "state", obs_steps=2, corners=CORNERS, goal=GOAL)
    modulations = pathway(torch.rand(100, 2, 5) * 400)(backbone.time_encoder(torch.arange(100)))
    identity = {"film": (1, 0), "additive": (0,), "adaln-zero": (0, 0, 0)}.get(name, (0, 0))
    vectors = zip(*[modulation.chunk(len(identity), dim=-1) for modulation in modulations])
    for layers, value in zip(vectors, identity, strict=True):     # a layer alone is a small sample
        vector = torch.cat(layers, dim=-1)
        if name == "adaln-zero":
            assert (vector == 0).all()
        else:
            assert abs(vector.mean().item() - value) < 0.1 and 0.01 < vector.std() < 0.5


# Tokens, and the conditions of stage 1 ------------------------------------------------------------

def token_pathway(observation="state", conditioning="cross-attention", **settings):
    torch.manual_seed(0)
    backbone = make_backbone("transformer", conditioning=conditioning)
    return backbone, film.make_conditioning(backbone, observation, **settings)


def test_tokens_are_one_for_the_timestep_then_one_for_each_observation():
    """Each depends on its own observation step alone, and repeats follow their observation."""
    backbone, pathway = token_pathway(obs_steps=2, corners=CORNERS, goal=GOAL)
    observations = torch.rand(3, 2, 5) * 400
    changed = observations.clone()
    changed[:, 1] += 30
    embedding = torch.randn(6, backbone.time_encoder.dim)
    tokens = pathway(observations, 2)(embedding)
    assert tokens.shape == (6, 3, backbone.time_encoder.dim)
    same = (tokens == pathway(changed, 2)(embedding)).all(-1)
    assert same[:, :2].all() and not same[:, 2].any()
    same = (tokens == pathway(observations, 2)(embedding + 1)).all(-1)
    assert same[:, 1:].all() and not same[:, 0].any()
    assert torch.equal(tokens[0::2, 1:], tokens[1::2, 1:])


def test_one_row_of_time_serves_a_whole_batch():
    tokens = token_pathway(obs_steps=2, corners=CORNERS, goal=GOAL)
    for backbone, pathway in (conditioning(), tokens):
        observed = pathway.from_observation(torch.rand(4, 2, 5) * 400)
        timed = pathway.from_time(torch.randn(1, backbone.time_encoder.dim))
        for one, four in zip(pathway.combine(observed, timed),
                             pathway.combine(observed, timed.expand(4, -1))):
            torch.testing.assert_close(one, four)


def test_stage_1_gives_one_token_for_each_joint_configuration():
    backbone, pathway = token_pathway("joints", horizon=16, num_joints=3)
    condition = pathway(torch.randn(5, 16, 3))
    assert condition(torch.randn(5, backbone.time_encoder.dim)).shape[:2] == (5, 17)


def test_pose_and_none():
    positions = torch.tensor([[[0.0, 512.0], [256.0, 384.0]]])
    assert film.PoseEncoder(horizon=2)(positions).tolist() == [[[-1, 1], [0, 0.5]]]
    assert film.NoEncoder(horizon=2)(positions).tolist() == [[[0], [0]]]
    for observation in ("pose", "none"):
        for kind in ("film", "prefix"):
            backbone, pathway = token_pathway(observation, kind, horizon=16)
            poses = torch.rand(2, 16, 2) * 512
            embedding = torch.randn(2, backbone.time_encoder.dim)
            one, other = (torch.cat([m.flatten() for m in pathway(p)(embedding)])
                          for p in (poses, poses.flip(0)))
            assert torch.equal(one, other) == (observation == "none")
