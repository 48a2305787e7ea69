"""The conditioning pathway: everything that stage 2 TRAINS.

    observation --encoder--> o --\
                                  W [mish(o), mish(tau)] + b --> (gamma_1, beta_1) ... _R
    timestep embedding ----- tau-/

The paper's claim is about this file: task knowledge can be confined to these weights while the
backbone (heads.py), which only *applies* gamma and beta, stays frozen. Nothing here knows how the
backbone looks inside; it gets the widths of the layers to be modulated and returns one modulation
for each. Two mechanisms, cross-attention and prefix, hand the backbone tokens instead.
Paper: section IV-A, eq. 2, 3 and 11 (arXiv 2511.12101v1); the comparison of mechanisms is
section IV-E of its second version.

Run alone:  python film.py       what FiLM does to a feature map, and which tensors a recipe trains
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# The mechanisms: what a condition does to a block -------------------------------------------------

class Mechanism:
    """How a condition acts on a residual block, x' = x + branch(norm(x)). The base: not at all.

    A block offers three places; a mechanism overrides those that it uses:
      normalised   the output of the block's normalisation
      features     the features inside the branch (where: see the block in heads.py)
      gated        the branch's output, about to be added to x
    Each maps h (B,T,D) and m (B, vectors * D), the modulation, to (B,T,D). The equations below are
    for one step h (D,) of one sample.

    identity: the value of each of the modulation's vectors at which a block is as if it had no
    condition (adaln-zero: as if it had no branch). A fresh pathway starts there, see Conditioning.
    """
    identity = ()
    tokens = False         # does the backbone take tokens instead of modulations?
    prepends = False       # are the tokens put in front of the actions?
    adaptive = False       # does it replace the normalisation's own scale and shift?
    starts_closed = False  # does it start exactly at its identity, whatever is observed?
    normalised = features = gated = lambda self, h, m: h

    def norm(self, width):
        """The block's normalisation."""
        return nn.LayerNorm(width, elementwise_affine=not self.adaptive)

    def vectors(self, modulation):
        """(B, vectors * D) -> its vectors, each (B,1,D)."""
        # The singleton axis broadcasts over time. Without it B == T would broadcast silently.
        return modulation.unsqueeze(-2).chunk(len(self.identity), dim=-1)

    def __call__(self, h, m):
        """What all three places together do to one feature map."""
        return self.gated(self.features(self.normalised(h, m), m), m)


class FiLM(Mechanism):
    """Feature-wise linear modulation: h' = gamma * h + beta  (paper eq. 3).

    As in the paper the factor is gamma, not 1 + gamma; it starts at gamma = 1.
    """
    identity = (1, 0)

    def features(self, h, m):
        gamma, beta = self.vectors(m)
        return torch.addcmul(beta, gamma, h)     # gamma * h + beta in one pass over memory


class Additive(Mechanism):
    """h' = h + beta: FiLM without its factor."""
    identity = (0,)

    def features(self, h, m):
        return h + m.unsqueeze(-2)


class AdaLN(Mechanism):
    """Adaptive normalisation: h' = (1 + gamma) * LayerNorm(h) + beta  (Perez et al. 2018).

    The U-Net's normalisation is a GroupNorm: there it is AdaGN (Dhariwal & Nichol 2021).
    """
    identity = (0, 0)
    adaptive = True

    def normalised(self, h, m):
        gamma, beta, *_ = self.vectors(m)
        return torch.addcmul(beta, 1 + gamma, h)


class AdaRMS(AdaLN):
    """h' = (1 + gamma) * RMSNorm(h) + beta: AdaLN that does not subtract the mean."""

    def norm(self, width):
        return nn.RMSNorm(width, elementwise_affine=False)


class AdaLNZero(AdaLN):
    """AdaLN and a gate: x' = x + alpha * branch(AdaLN(x))  (Peebles & Xie 2023, DiT).

    gamma, beta and alpha start at exactly zero for every observation, so a fresh pathway closes
    every branch. That holds in stage 2 as well, on a backbone whose branches learned something:
    the gates have to reopen. (The official code keeps the biases of stage 1, and so open gates.)
    """
    identity = (0, 0, 0)
    starts_closed = True

    def gated(self, h, m):
        return self.vectors(m)[2] * h


class CrossAttention(Mechanism):
    """x' = x + Attention(query W_q x, keys W_k c, values W_v c), c the condition's tokens.

    W_k and W_v belong to the backbone, they are the way in that stage 1 learned. So stage 2
    freezes them, and new tokens must look like stage 1's joint tokens to be understood. This is
    why the paper sees the token mechanisms collapse when frozen.
    """
    tokens = True


class Prefix(CrossAttention):
    """The tokens stand in front of the actions, [c, x], in the backbone's self-attention."""
    prepends = True


MECHANISMS = {"film": FiLM, "additive": Additive, "adaln": AdaLN, "adarms": AdaRMS,
              "adaln-zero": AdaLNZero, "cross-attention": CrossAttention, "prefix": Prefix}


# The encoders: observation (B, ...) -> (B, steps, size) -------------------------------------------

class StateEncoder(nn.Module):
    """The observation encoder Phi of stage 2: PushT states -> features.

    What it looks at, per observation step, is 16 vectors: the block's 8 corners seen from the
    agent, and the same corners seen from where they should be in the end. Each is given twice,
    coarse (a board's width is 1) and fine (saturating at some 20 px), because 2 px decide over
    success. That is 64 numbers a step; an MLP follows. `features="keypoints"` is the plain
    alternative: gym-pusht's 8 corners and the agent's position, 18 numbers a step.

    corners: (8, 2) px in the block's frame; goal: (x, y, angle) of the block's goal pose.
    per_step: encode each observation step alone (for tokens), not the window of To as one.
    """

    def __init__(self, obs_steps, corners, goal, features="relative", width=384, depth=3,
                 per_step=False):
        super().__init__()
        if features not in ("relative", "keypoints"):
            raise ValueError(f"features is {features!r}; allowed: relative, keypoints")
        self.features = features
        corners = torch.as_tensor(corners, dtype=torch.float32)
        goal = torch.as_tensor(goal, dtype=torch.float32)
        self.register_buffer("corners", corners)
        self.register_buffer("goal_corners", self.place(corners, goal))
        numbers = (4 if features == "relative" else 1) * 2 * len(corners)
        numbers += 0 if features == "relative" else 2
        self.steps, self.size = obs_steps if per_step else 1, width
        sizes = [numbers * obs_steps // self.steps] + [width] * depth
        # Without the LayerNorms the loss jumped up in three of six runs at learning rate 6e-3.
        layers = [nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.Mish())
                  for a, b in zip(sizes, sizes[1:-1])]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-2], width), nn.LayerNorm(width))

    @staticmethod
    def place(corners, pose):
        """Corners (K, 2) of a block at pose (..., 3) -> their positions (..., K, 2) in px."""
        cos, sin = pose[..., 2:3].cos(), pose[..., 2:3].sin()
        x, y = corners[:, 0], corners[:, 1]
        rotated = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
        return rotated + pose[..., None, :2]

    def inputs(self, observations):
        """observations (B, To, 5): agent x, y, block x, y (px), angle (rad) -> (B, To, 64)."""
        agent, corners = observations[..., :2], self.place(self.corners, observations[..., 2:])
        if self.features == "keypoints":
            return torch.cat([corners, agent.unsqueeze(-2)], dim=-2).flatten(-2) / 256 - 1
        vectors = torch.cat([corners - agent.unsqueeze(-2), corners - self.goal_corners], dim=-2)
        return torch.cat([vectors / 256, torch.tanh(vectors / 20)], dim=-2).flatten(-2)

    def forward(self, observations):
        """observations (B, To, 5) -> (B, steps, size), steps = To with per_step, otherwise 1."""
        return self.mlp(self.inputs(observations).reshape(len(observations), self.steps, -1))


class JointEncoder(nn.Module):
    """The condition of stage 1: joint angles (B, T, N) -> their sin and cos, no weights.

    The paper feeds min-max scaled joint positions; sin and cos spare the network the seam at +-pi.
    """

    def __init__(self, horizon, num_joints=3):     # 3: the links of kinematics.PlanarArm()
        super().__init__()
        self.steps, self.size = horizon, 2 * num_joints

    def forward(self, angles):
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PoseEncoder(nn.Module):
    """Alternative in stage 1: the end effector's positions (B, T, 2) in px, scaled.

    The condition then all but contains the target (section IV-D of the paper's second version).
    """

    def __init__(self, horizon):
        super().__init__()
        self.steps, self.size = horizon, 2

    def forward(self, positions):
        return positions / 256 - 1


class NoEncoder(nn.Module):
    """Alternative in stage 1: zeros, whatever is observed (B, ...): an unconditional backbone."""

    def __init__(self, horizon, size=1):
        super().__init__()
        self.steps, self.size = horizon, size

    def forward(self, observations):
        return torch.zeros(len(observations), self.steps, self.size, device=observations.device)


ENCODERS = {"state": StateEncoder, "joints": JointEncoder, "pose": PoseEncoder, "none": NoEncoder}


# The pathways: encoder and what makes modulations or tokens of it ---------------------------------

class Pathway(nn.Module):
    """What both pathways share: a condition is the combination of two halves.

    from_observation(observations (B, ...)): the half that is the same at every timestep
    from_time(time embedding (K, E)):        the half that is the same for every observation
    combine(observed, timed):                the condition; `timed` has B rows, or one for all
    The sampler computes the first once per chunk and the second once per timestep, instead of
    both at each of the 100 steps.
    """

    def forward(self, observations, repeats=1):
        """Observations (B, ...) -> the condition: a function of the time embedding that gives the
        modulations. The backbone calls it with its own, frozen encoding of B * repeats timesteps.
        """
        observed = self.from_observation(observations).repeat_interleave(repeats, dim=0)
        return lambda time_embedding: self.combine(observed, self.from_time(time_embedding))


class Conditioning(Pathway):
    """Encoder Phi and modulation generators F_1..F_R (paper eq. 2, 11), all layers in one product.

    The paper concatenates c = [o, tau] and applies Mish and one Linear per layer. Mish acts on
    each number alone, so that product splits exactly into a part that depends on the observation
    and one that depends on the timestep.
    """

    def __init__(self, encoder, time_dim, widths, mechanism=FiLM()):
        super().__init__()
        self.encoder = encoder
        self.sizes = [len(mechanism.identity) * width for width in widths]
        self.observation_part = nn.Linear(encoder.steps * encoder.size, sum(self.sizes))
        self.time_part = nn.Linear(time_dim, sum(self.sizes), bias=False)
        # A fresh pathway starts near the identity: the identity's values as bias plus a small
        # observation-dependent part. (Official code: FiLM's gamma starts near 0, not 1, and in
        # stage 2 the biases of stage 1 stay in place unmentioned.)
        with torch.no_grad():
            for bias, width in zip(self.observation_part.bias.split(self.sizes), widths):
                for vector, value in zip(bias.split(width), mechanism.identity):
                    vector.fill_(value)
            if mechanism.starts_closed:
                self.observation_part.weight.zero_()
                self.time_part.weight.zero_()

    def from_observation(self, observations):
        """Observations -> (B, M), M the sum of all modulations' sizes."""
        return self.observation_part(F.mish(self.encoder(observations).flatten(1)))

    def from_time(self, time_embedding):
        """Time embedding (K, E) -> (K, M)."""
        return self.time_part(F.mish(time_embedding))

    def combine(self, observed, timed):
        """The two halves -> the modulation (B, vectors * width) of each layer, a list of R."""
        return (observed + timed).split(self.sizes, dim=-1)


class TokenConditioning(Pathway):
    """Tokens for cross-attention and prefix: one for the timestep, one per observation step.

    c_s = MLP(W o_s + p_s) and c_0 = MLP(tau + p_0), p a learned position, tau the plain sinusoid.
    The MLP treats each token alone, so the halves are exact here too. In stage 1 there are T joint
    tokens, each of the same instant as one action; in stage 2 there are To observation tokens: as
    in the paper, not only the tokens' content changes, but also their number and alignment.
    A fresh pathway's tokens are small (weights N(0, 0.02^2)): cross-attention reads values near 0.
    For `prefix` that is no identity, because the backbone's LayerNorm enlarges them again.
    """

    def __init__(self, encoder, width):
        super().__init__()
        self.encoder = encoder
        self.embed = nn.Linear(encoder.size, width)
        self.position = nn.Parameter(torch.randn(1 + encoder.steps, width) * 0.02)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(),
                                 nn.Linear(4 * width, width))
        for linear in (self.embed, self.mlp[0], self.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def from_observation(self, observations):
        """Observations -> tokens (B, steps, width)."""
        return self.mlp(self.embed(self.encoder(observations)) + self.position[1:])

    def from_time(self, time_embedding):
        """Time embedding (K, E) -> tokens (K, width)."""
        return self.mlp(time_embedding + self.position[0])

    def combine(self, observed, timed):
        """The two halves -> all tokens (B, 1 + steps, width)."""
        timed = timed.unsqueeze(1).expand(len(observed), -1, -1)
        return torch.cat([timed, observed], dim=1)


def make_conditioning(backbone, observation="state", **encoder_settings):
    """A fresh conditioning pathway for `backbone`, of the mechanism that it was built for.

    observation: "state", "joints", "pose" or "none"; settings as for StateEncoder, JointEncoder,
    PoseEncoder, NoEncoder. Raises ValueError for another observation.
    """
    if observation not in ENCODERS:
        raise ValueError(f"observation is {observation!r}; allowed: {', '.join(ENCODERS)}")
    config = dict(observation=observation, **encoder_settings)
    mechanism, time_dim = backbone.mechanism, backbone.time_encoder.dim
    if observation == "state":
        encoder_settings["per_step"] = mechanism.tokens
    encoder = ENCODERS[observation](**encoder_settings)
    if mechanism.tokens:
        conditioning = TokenConditioning(encoder, time_dim)
    else:
        conditioning = Conditioning(encoder, time_dim, backbone.modulation_widths, mechanism)
    conditioning.config = config     # saved with a policy
    return conditioning


# The lesson ---------------------------------------------------------------------------------------

def lesson(out):
    """Print what each recipe trains, save out/film.png: each mechanism on one feature map."""
    import matplotlib.pyplot as plt
    from heads import make_backbone     # the one look up: a pathway needs something to condition

    T, D = 16, 24
    step, feature = torch.arange(T)[:, None] / T, torch.arange(D)[None] / D
    h = torch.sin(6 * step + 9 * feature)[None]                                  # (1,T,D)
    gamma, beta, alpha = 1.5 * torch.cos(torch.pi * feature), feature, feature.round()     # (1,D)
    after = FiLM()(h, torch.cat([gamma, beta], dim=-1))
    print("1. One gamma and one beta per feature, the same for all steps of the chunk.\n"
          "   feature    gamma    beta   h at step 0, 8   FiLM(h) at step 0, 8")
    for d in (0, 8, 16, 23):
        print(f"   {d:7d} {gamma[0, d]:8.2f}{beta[0, d]:8.2f} {h[0, 0, d]:8.2f},{h[0, 8, d]:5.2f}"
              f" {after[0, 0, d]:12.2f},{after[0, 8, d]:5.2f}")
    pictures = {"h: 16 steps, 24 features": h}
    for name, vectors in {"film": [gamma, beta], "additive": [beta], "adaln": [gamma, beta],
                          "adarms": [gamma, beta], "adaln-zero": [gamma, beta, alpha]}.items():
        mechanism = MECHANISMS[name]()
        normalised = mechanism.norm(D)(h) if mechanism.adaptive else h
        pictures[name] = mechanism(normalised, torch.cat(vectors, dim=-1))
    figure, axes = plt.subplots(1, len(pictures), figsize=(14, 3.4), sharey=True)
    for axis, (name, picture) in zip(axes, pictures.items()):
        axis.imshow(picture[0], cmap="coolwarm", vmin=-2.5, vmax=2.5, aspect="auto")
        axis.set(title=name, xlabel="feature")
    axes[0].set_ylabel("step of the chunk")
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "film.png", dpi=110)

    backbone = make_backbone("mlp", "laptop")
    joints = make_conditioning(backbone, "joints", horizon=T, num_joints=3)
    state = make_conditioning(backbone, obs_steps=2, corners=torch.zeros(8, 2), goal=torch.zeros(3))
    print("\n2. The numbers that each recipe trains, laptop DP-MLP with FiLM\n"
          f"   {'':40}{'normal':>11}{'stage 1':>11}{'stage 2':>11}")
    for part, module, recipes in [("backbone", backbone, (True, True, False)),
                                  ("conditioning (joints)", joints, (None, True, None)),
                                  ("conditioning (state)", state, (True, None, True))]:
        for name, child in [*module.named_children(), *module.named_parameters(recurse=False)]:
            tensors = [child] if isinstance(child, nn.Parameter) else [*child.parameters()]
            line = f"   {part + '.' + name:40}"
            for trains in recipes:     # None: not part of the policy then
                module.requires_grad_(bool(trains))
                count = sum(p.numel() for p in tensors if p.requires_grad)
                line += f"{'-' if trains is None else f'{count:,}' if count else 'frozen':>11}"
            print(line if tensors else f"   {part + '.' + name:40}{'(no weights)':>33}")
    print(f"\nPicture: {out / 'film.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The lesson on conditioning.")
    parser.add_argument("--out", type=Path, default=Path("runs/lessons"), help="picture folder")
    lesson(parser.parse_args().out)
