"""The action head's backbones: everything that stage 2 FREEZES.

A backbone turns noisy actions into the noise in them. It owns no weight that depends on the
observation: it names the layers to be modulated (`modulation_widths`) and applies the gamma and
beta that film.py makes for them. Paper: section IV-B, G and f_tau of eq. 10 (arXiv 2511.12101v1).

All follow one template, so that two of them can be read side by side:
  1. embed the noisy actions (B,T,A) -> (B,T,D)
  2. blocks, each modulated
  3. normalise and project back -> predicted noise (B,T,A)

Run alone:  python heads.py       the table of parameters, next to the paper's figures
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from film import FiLM


class TimeEncoder(nn.Module):
    """f_tau, the encoder of the diffusion timestep: sinusoid, Linear, Mish, Linear.

    It belongs to the backbone and is frozen with it (paper eq. 10). timestep (B,) -> (B, dim).
    """

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, timestep):
        half = self.dim // 2
        rates = torch.exp(torch.arange(half, device=timestep.device) * -math.log(1e4) / (half - 1))
        angles = timestep[:, None] * rates
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Backbone(nn.Module):
    """What all backbones share. A subclass sets `time_encoder` and `modulation_widths`."""
    mixes_time = True     # does an action of the chunk see the others?

    def forward(self, noisy_actions, timestep, condition, **subset):
        """noisy_actions (B,T,A), timestep (B,) long -> predicted noise (B,T,A).

        condition: function from this backbone's time embedding (B,E) to one modulation for each
        of `modulation_widths`; `film.Conditioning` makes it from an observation.
        """
        return self.denoise(noisy_actions, condition(self.time_encoder(timestep)), **subset)


class MLP(Backbone):
    """DP-MLP: the 4M-parameter head that does the job of a 244M U-Net (paper section IV-D).

    Every horizon step has its own input matrix, which is also the only positional information; the
    blocks are shared by all steps. NO operation mixes time steps: given the observation, the
    actions of a chunk are denoised independently of each other. The paper does not mention it;
    its code does it, and so do we.
    """
    mixes_time = False

    def __init__(self, action_dim, horizon, width, hidden, depth, dropout):
        super().__init__()
        self.time_encoder = TimeEncoder(width)
        self.modulation_widths = [hidden] * depth
        # Standard deviation 1 without 1/sqrt(fan-in), as in the official MLP_FiLM.py.
        self.input_weight = nn.Parameter(torch.randn(horizon, action_dim, width))
        self.input_bias = nn.Parameter(torch.randn(horizon, width))
        self.blocks = nn.ModuleList(MLPBlock(width, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_dim)

    def denoise(self, noisy_actions, modulations, steps=None):
        """steps (B,S) long: which horizon steps the S actions of each sample are, None for all."""
        steps = slice(None) if steps is None else steps
        weight, bias = self.input_weight[steps], self.input_bias[steps]
        hidden = (noisy_actions.unsqueeze(-2) @ weight).squeeze(-2) + bias
        for block, modulation in zip(self.blocks, modulations):
            hidden = block(hidden, modulation)
        return self.output(self.norm(hidden))


class MLPBlock(nn.Module):
    """x -> LayerNorm(x + W2 FiLM(gelu(W1 x))): FiLM acts on the wide hidden layer, post-norm."""

    def __init__(self, width, hidden, dropout):
        super().__init__()
        self.up, self.film, self.down = nn.Linear(width, hidden), FiLM(), nn.Linear(hidden, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x, modulation):
        hidden = self.film(self.dropout(F.gelu(self.up(x))), modulation)
        return self.norm(x + self.dropout(self.down(hidden)))


SIZES = {
    ("mlp", "paper"): (MLP, dict(width=256, hidden=1024, depth=8, dropout=0.1)),
    ("mlp", "laptop"): (MLP, dict(width=128, hidden=256, depth=4, dropout=0.0)),
}


def make_backbone(name, scale="laptop", action_dim=2, horizon=16):
    """A new backbone, randomly initialised. Raises ValueError for an unknown name or scale."""
    if (name, scale) not in SIZES:
        raise ValueError(f"no backbone {name!r} of scale {scale!r}; there are: "
                         + ", ".join(" ".join(key) for key in SIZES))
    backbone_class, size = SIZES[name, scale]
    backbone = backbone_class(action_dim, horizon, **size)
    backbone.config = dict(name=name, scale=scale, action_dim=action_dim, horizon=horizon)
    return backbone
