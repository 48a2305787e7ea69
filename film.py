"""The conditioning pathway: everything that stage 2 TRAINS.

    observation --encoder--> o --\
                                  W [mish(o), mish(tau)] + b --> (gamma_1, beta_1), ..., (gamma_R, beta_R)
    timestep embedding ----- tau-/

The paper's claim is about this file: task knowledge can be confined to these weights while the
backbone (heads.py), which only *applies* gamma and beta, stays frozen. Nothing here knows how the
backbone looks inside; it gets the widths of the layers to be modulated and returns one (gamma, beta)
pair for each. Paper: section IV-A, eq. 2, 3 and 11 (arXiv 2511.12101v1).

Run alone:  python film.py       what FiLM does to a feature map, and which tensors a recipe trains
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class FiLM(nn.Module):
    """Feature-wise linear modulation, h' = gamma * h + beta  (paper eq. 3).

    As in the paper the factor is gamma, not 1 + gamma; `Conditioning` starts its bias at gamma = 1.
    """
    vectors = 2  # how many vectors of the layer's width it needs: gamma and beta

    def forward(self, hidden, modulation):
        """hidden (B, T, D), modulation (B, 2 D) -> (B, T, D)."""
        # The singleton axis broadcasts over time. Without it B == T would broadcast silently.
        gamma, beta = modulation.unsqueeze(-2).chunk(2, dim=-1)
        return gamma * hidden + beta


class StateEncoder(nn.Module):
    """The observation encoder Phi of stage 2: PushT states -> a feature vector.

    What it looks at, per observation step, is 16 vectors: the block's 8 corners seen from the agent,
    and the same corners seen from where they should be in the end. Each is given twice, coarse (a
    board's width is 1) and fine (saturating at some 20 px), because 2 px decide over success.
    That is 64 numbers a step; an MLP follows. `features="keypoints"` is the plain alternative:
    gym-pusht's 8 corners and the agent's position, 18 numbers a step.

    corners: (8, 2) px in the block's frame; goal: (x, y, angle) of the block's goal pose.
    """

    def __init__(self, obs_steps, corners, goal, features="relative", width=384, depth=3):
        super().__init__()
        if features not in ("relative", "keypoints"):
            raise ValueError(f"features is {features!r}; allowed: relative, keypoints")
        self.features = features
        corners = torch.as_tensor(corners, dtype=torch.float32)
        goal = torch.as_tensor(goal, dtype=torch.float32)
        self.register_buffer("corners", corners)
        self.register_buffer("goal_corners", self.place(corners, goal))
        per_step = (4 if features == "relative" else 1) * 2 * len(corners)
        per_step += 0 if features == "relative" else 2
        sizes = [obs_steps * per_step] + [width] * depth
        layers = [nn.Sequential(nn.Linear(a, b), nn.Mish()) for a, b in zip(sizes, sizes[1:-1])]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
        self.size = width

    @staticmethod
    def place(corners, pose):
        """Corners (K, 2) of a block at pose (..., 3) -> their positions (..., K, 2) in px."""
        cos, sin = pose[..., 2:3].cos(), pose[..., 2:3].sin()
        x, y = corners[:, 0], corners[:, 1]
        rotated = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
        return rotated + pose[..., None, :2]

    def inputs(self, observations):
        """observations (B, To, 5): agent x, y, block x, y (px), block angle (rad) -> (B, To, 64)."""
        agent, corners = observations[..., :2], self.place(self.corners, observations[..., 2:])
        if self.features == "keypoints":
            return torch.cat([corners, agent.unsqueeze(-2)], dim=-2).flatten(-2) / 256 - 1
        vectors = torch.cat([corners - agent.unsqueeze(-2), corners - self.goal_corners], dim=-2)
        return torch.cat([vectors / 256, torch.tanh(vectors / 20)], dim=-2).flatten(-2)

    def forward(self, observations):
        """observations (B, To, 5) -> (B, size)."""
        return self.mlp(self.inputs(observations).flatten(1))


class JointEncoder(nn.Module):
    """The condition of stage 1: joint angles (B, T, N) -> sin and cos, flattened, no weights.

    The paper feeds min-max scaled joint positions; sin and cos spare the network the seam at +-pi.
    """

    def __init__(self, horizon, num_joints):
        super().__init__()
        self.size = horizon * num_joints * 2

    def forward(self, angles):
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Conditioning(nn.Module):
    """Encoder Phi and modulation generators F_1..F_R (paper eq. 2, 11), all layers in one product.

    The paper concatenates c = [o, tau] and applies Mish and one Linear per layer. Mish acts on
    each number alone, so that product splits exactly into a part that depends on the observation
    and one that depends on the timestep. The sampler computes the first once per chunk and the
    second once per timestep, instead of both at each of the 100 steps.
    """

    def __init__(self, encoder, time_dim, widths, mechanism=FiLM):
        super().__init__()
        self.encoder = encoder
        self.sizes = [mechanism.vectors * width for width in widths]
        self.observation_part = nn.Linear(encoder.size, sum(self.sizes))
        self.time_part = nn.Linear(time_dim, sum(self.sizes), bias=False)
        # A fresh pathway starts near the identity: gamma = 1 and beta = 0 plus a small
        # observation-dependent part. (Official code: PyTorch's default, so gamma starts near 0,
        # and in stage 2 the bias of stage 1 stays in place unmentioned.)
        with torch.no_grad():
            for bias, width in zip(self.observation_part.bias.split(self.sizes), widths):
                bias.zero_()
                bias[:width] = 1

    def from_observation(self, observations):
        """Observations -> (B, M), the half of all modulations that is the same at every timestep."""
        return self.observation_part(F.mish(self.encoder(observations)))

    def from_time(self, time_embedding):
        """Time embedding (K, E) -> (K, M), the half that is the same for every observation."""
        return self.time_part(F.mish(time_embedding))

    def combine(self, observed, timed):
        """The two halves -> the modulation (B, vectors * width) of each layer, a list of R."""
        return (observed + timed).split(self.sizes, dim=-1)

    def forward(self, observations, repeats=1):
        """Observations (B, ...) -> the condition: a function of the time embedding that gives the
        modulations. The backbone calls it with its own, frozen encoding of B * repeats timesteps.
        """
        observed = self.from_observation(observations).repeat_interleave(repeats, dim=0)
        return lambda time_embedding: self.combine(observed, self.from_time(time_embedding))


def make_conditioning(backbone, observation="state", **encoder_settings):
    """A fresh conditioning pathway for `backbone`.

    observation: "state" (settings as for StateEncoder) or "joints" (as for JointEncoder).
    Raises ValueError for another observation.
    """
    encoders = {"state": StateEncoder, "joints": JointEncoder}
    if observation not in encoders:
        raise ValueError(f"observation is {observation!r}; allowed: {', '.join(encoders)}")
    encoder = encoders[observation](**encoder_settings)
    conditioning = Conditioning(encoder, backbone.time_encoder.dim, backbone.modulation_widths)
    conditioning.config = dict(observation=observation, **encoder_settings)  # saved with a policy
    return conditioning
