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
    encoded = film.JointEncoder(horizon=16, num_joints=3)(angles).view(5, 16, 6)
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
    concatenated = torch.cat([embedding, pathway.encoder(observations)], dim=1)
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


def test_a_fresh_pathway_starts_near_the_identity():
    backbone, pathway = conditioning()
    observations, embedding = torch.rand(200, 2, 5) * 400, torch.randn(200, 128)
    for modulation in pathway(observations)(embedding):
        gamma, beta = modulation.chunk(2, dim=-1)
        assert abs(gamma.mean().item() - 1) < 0.1 and abs(beta.mean().item()) < 0.1
        assert gamma.std() < 0.5 and beta.std() < 0.5


def test_unknown_names_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="'smell'.*relative, keypoints"):
        state_encoder(features="smell")
    with pytest.raises(ValueError, match="'smell'.*state, joints"):
        film.make_conditioning(make_backbone("mlp"), "smell")
