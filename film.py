"""The conditioning pathway: everything that stage 2 TRAINS.

    observation --encoder Phi--> o --\
                                      F: c = [o, tau] --> (gamma_1, beta_1) ... (gamma_R, beta_R)
    timestep -----time encoder-> tau -/

The paper's claim is about this file: task knowledge can be confined to these weights while the
backbone (heads.py), which only *applies* gamma and beta, stays frozen. Nothing here knows how the
backbone looks inside; it gets the widths of the layers to be modulated and returns one modulation
for each. Two mechanisms, cross-attention and prefix, hand the backbone tokens instead.
Paper: section IV-A, eq. 2, 3 and 11 (arXiv 2511.12101v1); the comparison of mechanisms is
section IV-E of its second version.

Run alone:  python film.py       what each mechanism does to a feature map, what an eye looks at
"""
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# The mechanisms: what a condition does to a block -------------------------------------------------

class Mechanism:
    """How a condition acts on a residual block, x' = x + branch(norm(x)). The base: not at all.

    A block calls three hooks; a mechanism overrides those that it uses:
      after_norm(h, m)   what the block's normalisation puts out
      modulate(h, m)     the features inside the branch (where: see the block in heads.py)
      gate(h, m)         the branch's output, about to be added to x
    Each maps features h (B,T,D) and the modulation m (B,V,1,D), V vectors of width D, to (B,T,D).
    The U-Net works channels first: there h is (B,D,T) and m (B,V,D,1).
    TRAP: the singleton axis of m broadcasts over the horizon. Without it B == T would broadcast
    silently, and each time step would get another sample's modulation.

    identity: the value of each of the V vectors at which a block is as if it had no condition
    (adaln-zero: as if it had no branch). A fresh pathway starts there, see Conditioning.
    """
    identity = ()
    tokens = False         # does the backbone take tokens instead of modulations?
    prepends = False       # are the tokens put in front of the actions?
    adaptive = False       # does it replace the normalisation's own scale and shift?
    starts_closed = False  # does it start exactly at its identity, whatever is observed?

    def after_norm(self, h, m):
        return h

    def modulate(self, h, m):
        return h

    def gate(self, h, m):
        return h

    def norm(self, width):
        """The block's normalisation."""
        return nn.LayerNorm(width, elementwise_affine=not self.adaptive)


class FiLM(Mechanism):
    """Feature-wise linear modulation: h' = gamma * h + beta  (paper eq. 3).

    As in the paper the factor is gamma, not 1 + gamma; it starts at gamma = 1.
    """
    identity = (1, 0)

    def modulate(self, h, m):
        gamma, beta = m.unbind(1)
        return gamma * h + beta


class Additive(Mechanism):
    """h' = h + beta: FiLM without its factor. Starts at beta = 0, as in the official code."""
    identity = (0,)
    starts_closed = True

    def modulate(self, h, m):
        return h + m[:, 0]


class AdaLN(Mechanism):
    """Adaptive normalisation: h' = (1 + gamma) * LayerNorm(h) + beta  (Perez et al. 2018).

    The U-Net's normalisation is a GroupNorm: there it is AdaGN (Dhariwal & Nichol 2021).
    """
    identity = (0, 0)
    adaptive = True

    def after_norm(self, h, m):
        gamma, beta = m[:, 0], m[:, 1]
        return (1 + gamma) * h + beta


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

    def gate(self, h, m):
        alpha = m[:, 2]
        return alpha * h


class CrossAttention(Mechanism):
    """x' = x + Attention(query W_q x, keys W_k c, values W_v c), c the condition's tokens.

    W_k and W_v belong to the backbone, they are the way in that stage 1 learned. So stage 2
    freezes them, and new tokens must look like stage 1's joint tokens to be understood. This is
    why the paper sees the token mechanisms collapse when frozen.
    """
    tokens = True


class Prefix(Mechanism):
    """The tokens stand in front of the actions, [c, x], in the backbone's self-attention."""
    tokens = True
    prepends = True


MECHANISMS = {"film": FiLM, "additive": Additive, "adaln": AdaLN, "adarms": AdaRMS,
              "adaln-zero": AdaLNZero, "cross-attention": CrossAttention, "prefix": Prefix}


# The encoders Phi: observation (B, ...) -> (B, steps, size) ---------------------------------------

COARSE, FINE = 256.0, 20.0     # px that become 1: half a board, and what decides over success


class StateEncoder(nn.Module):
    """The observation encoder of stage 2: PushT states -> features.

    What it looks at, per observation step, is 16 vectors: the block's 8 corners seen from the
    agent, and the same corners seen from where they should be in the end. Each is given twice,
    coarse and, through tanh, fine: because 2 px decide over success. That is 64 numbers a step;
    an MLP follows. (The paper's encoders take each observation step alone, as per_step does.)

    obs_steps: To. corners: (8, 2) px in the block's frame; goal: its pose (x, y px, angle rad) in
    the end. width, depth: of the MLP. per_step: encode each observation step alone (for tokens),
    not the window of To as one.
    """
    observation = "state"
    numbers, seen = 5, 2 * 2 * 16     # a step: observed; looked at, from agent and goal, twice

    def __init__(self, obs_steps, corners, goal, width=384, depth=3, per_step=False):
        super().__init__()
        corners = [[float(x), float(y)] for x, y in corners]     # a file must not hold arrays
        goal = [float(number) for number in goal]
        self.config = dict(observation=self.observation, obs_steps=obs_steps, corners=corners,
                           goal=goal, width=width, depth=depth)
        self.obs_steps = obs_steps
        self.steps, self.size = obs_steps if per_step else 1, width
        corners, goal = torch.tensor(corners).float(), torch.tensor(goal).float()
        self.register_buffer("corners", corners)
        self.register_buffer("goal_corners", place(corners, goal))
        inputs = self.seen * obs_steps // self.steps
        layers = []
        for _ in range(depth - 1):
            # Without the LayerNorms the loss jumped up in three of six runs at learning rate 6e-3.
            layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.Mish()]
            inputs = width
        self.mlp = nn.Sequential(*layers, nn.Linear(inputs, width), nn.LayerNorm(width))

    def read(self, observations, device):
        """Observations as a tensor; ValueError if they are not (B, To, 5), or not finite."""
        return checked(observations, "observations", (self.obs_steps, self.numbers), device)

    def agent_position(self, observations):
        """Where the agent is at present, in the last observation: (B, 2) px."""
        return observations[:, -1, :2]

    def features(self, observations):
        """observations (B, To, 5): agent x, y, block x, y (px), angle (rad) -> (B, To, 64)."""
        corners = place(self.corners, observations[..., 2:])            # (B, To, 8, 2)
        return self.look(corners, observations[..., :2])

    def look(self, corners, agent):
        """Where corners (B, To, 8, 2) are, seen from agent (B, To, 2) and goal: (B, To, 64)."""
        vectors = torch.cat([corners - agent[..., None, :], corners - self.goal_corners], dim=-2)
        scaled = torch.cat([vectors / COARSE, torch.tanh(vectors / FINE)], dim=-2)
        return scaled.flatten(-2)

    def forward(self, observations):
        """observations (B, To, 5) -> (B, steps, size), steps = To with per_step, otherwise 1."""
        features = self.features(observations)
        return self.mlp(features.reshape(len(features), self.steps, -1))


class KeypointEncoder(StateEncoder):
    """For comparison: gym-pusht's keypoints (B, To, 18), 8 corners and the agent, as they are."""
    observation = "keypoints"
    numbers = seen = 18

    def agent_position(self, observations):
        return observations[:, -1, 16:]

    def features(self, observations):
        return observations / COARSE - 1


class PixelEncoder(StateEncoder):
    """The same from pictures: find the block's corners in the newest, go on as StateEncoder.

    Observed is gym-pusht's `pixels_agent_pos`, a dict: pixels (B, 96, 96, 3) uint8, the newest
    picture; agent_pos (B, To, 2) px. Convolutions make 16 maps of 24 x 24 places, a softmax over
    the places makes a point of each map (Levine et al. 2016), and the corners are a function of
    the points. Nothing is pretrained. (The paper's encoders are two ResNet-18.)
    """
    observation = "pixels"

    def __init__(self, obs_steps, corners, goal, **mlp):
        super().__init__(obs_steps, corners, goal, **mlp)
        self.maps = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=4), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.sharpness = nn.Parameter(torch.tensor(4.0))
        self.linear = nn.Linear(32, 16)
        self.correction = nn.Sequential(nn.Linear(32, 128), nn.Mish(), nn.Linear(128, 16))
        line = torch.linspace(-1, 1, 24)
        self.register_buffer("places", torch.cartesian_prod(line, line).flip(1), persistent=False)

    def read(self, observations, device):
        if not isinstance(observations, dict) or not {"pixels", "agent_pos"} <= observations.keys():
            raise ValueError("observations must be a dict of pixels and agent_pos")
        pixels, agent = observations["pixels"], observations["agent_pos"]
        return {"pixels": checked(pixels, "pixels", (96, 96, 3), device, torch.uint8),
                "agent_pos": checked(agent, "agent_pos", (self.obs_steps, 2), device)}

    def agent_position(self, observations):
        return observations["agent_pos"][:, -1]

    def locate(self, pixels):
        """Pictures (B, 96, 96, 3) -> the points (B, 16, 2), -1 to 1; the corners (B, 8, 2), px."""
        maps = self.maps(pixels.permute(0, 3, 1, 2) / 127.5 - 1).flatten(2)
        with torch.autocast(maps.device.type, enabled=False):     # TRAP: bf16 would round to 2 px
            # Standardised: otherwise half of the maps stay uniform, their points in the middle.
            maps = F.layer_norm(maps.float(), maps.shape[-1:])
            share = (self.sharpness * maps).softmax(-1)
            points = share @ self.places
            seen = points.flatten(1)
            corners = self.linear(seen) + self.correction(seen)
        return points, COARSE * (1 + corners.unflatten(1, (8, 2)))

    def features(self, observations):
        """As of a block that has not moved: (B, To, 64)."""
        _, self.located = self.locate(observations["pixels"])
        corners = self.located[:, None].expand(-1, self.obs_steps, -1, -1)
        return self.look(corners, observations["agent_pos"])

    def corner_error(self, corners):
        """How far from corners (B, 8, 2) were those of the last `features`? In units of 20 px."""
        return F.l1_loss(self.located, corners) / FINE


def checked(values, name, shape, device, kind=torch.float32):
    """values as a tensor; ValueError if they are not (B, *shape), or hold NaN or infinity."""
    try:
        values = torch.as_tensor(values, device=device)
    except (TypeError, RuntimeError):     # the latter of a dict
        raise ValueError(f"{name} must be an array, got {type(values).__name__}") from None
    if values.dim() == 0 or values.shape[1:] != shape:
        raise ValueError(f"{name} must have shape (B, {str(shape)[1:]}, got {tuple(values.shape)}")
    if kind == torch.uint8 and values.dtype != kind:
        raise ValueError(f"{name} must be {kind}, got {values.dtype}")
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return values.to(kind)


def place(corners, pose):
    """Corners (K, 2) of a block that is set down at pose (..., 3) -> (..., K, 2) in px."""
    cos, sin = pose[..., 2:].cos(), pose[..., 2:].sin()                 # (..., 1)
    x, y = corners.unbind(-1)
    rotated = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    return rotated + pose[..., None, :2]


class JointEncoder(nn.Module):
    """The condition of stage 1: joint angles (B, T, N) -> their sin and cos, no weights.

    The paper feeds min-max scaled joint positions; sin and cos spare the network the seam at +-pi.
    """

    def __init__(self, horizon, num_joints=3):     # 3: the links of kinematics.PlanarArm()
        super().__init__()
        self.config = dict(observation="joints", horizon=horizon, num_joints=num_joints)
        self.steps, self.size = horizon, 2 * num_joints

    def forward(self, angles):
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PoseEncoder(nn.Module):
    """Alternative in stage 1: the end effector's positions (B, T, 2) in px, scaled.

    The condition then all but contains the target (section IV-D of the paper's second version).
    """

    def __init__(self, horizon):
        super().__init__()
        self.config = dict(observation="pose", horizon=horizon)
        self.steps, self.size = horizon, 2

    def forward(self, positions):
        return positions / COARSE - 1


class NoEncoder(nn.Module):
    """Alternative in stage 1: zeros, whatever is observed (B, ...): an unconditional backbone."""

    def __init__(self, horizon, size=1):
        super().__init__()
        self.config = dict(observation="none", horizon=horizon, size=size)
        self.steps, self.size = horizon, size

    def forward(self, observations):
        return torch.zeros(len(observations), self.steps, self.size, device=observations.device)


ENCODERS = {"state": StateEncoder, "keypoints": KeypointEncoder, "pixels": PixelEncoder,
            "joints": JointEncoder, "pose": PoseEncoder, "none": NoEncoder}


# The pathways: encoder Phi, and F that makes modulations or tokens of what it puts out ------------

class Conditioning(nn.Module):
    """Encoder Phi and modulation generators F_1..F_R (paper eq. 2, 11), all layers in one product.

    encoder: one of the above; time_dim: E, size of tau; widths: D_r of the R layers to be
    modulated; mechanism: a Mechanism that is no token mechanism.
    """

    def __init__(self, encoder, time_dim, widths, mechanism):
        super().__init__()
        self.encoder = encoder
        self.vectors = len(mechanism.identity)
        self.sizes = [self.vectors * width for width in widths]
        self.observation_part = nn.Linear(encoder.steps * encoder.size, sum(self.sizes))
        self.time_part = nn.Linear(time_dim, sum(self.sizes), bias=False)
        # A fresh pathway starts near the identity: the identity's values as bias plus a small
        # observation-dependent part. (Official code: FiLM's gamma starts near 0, not 1, and in
        # stage 2 the biases of stage 1 stay in place unmentioned: train.py's --keep-biases.)
        values = torch.tensor(mechanism.identity).float()
        with torch.no_grad():
            for bias, width in zip(self.observation_part.bias.split(self.sizes), widths):
                bias.copy_(values.repeat_interleave(width))
            if mechanism.starts_closed:
                self.observation_part.weight.zero_()
                self.time_part.weight.zero_()

    def encode(self, observations):
        """Phi: observations (B, ...) -> o (B, O)."""
        return self.encoder(observations).flatten(1)

    def forward(self, o, tau):
        """F: o (B, O), tau (B * K, E) -> R modulations (B * K, V, 1, D_r).

        K noise draws of one observation stand next to each other. The paper applies Mish and one
        Linear to the concatenation c = [o, tau]. The same product in two halves, because o's half
        is then computed once for all K draws.
        """
        draws = len(tau) // len(o)
        observed = self.observation_part(F.mish(o)).repeat_interleave(draws, dim=0)
        modulations = observed + self.time_part(F.mish(tau))
        return [modulation.unflatten(1, (self.vectors, 1, -1))
                for modulation in modulations.split(self.sizes, dim=1)]


class TokenConditioning(nn.Module):
    """Tokens for cross-attention and prefix: one for the timestep, one per observation step.

    c_s = MLP(W o_s + p_s) and c_0 = MLP(tau + p_0), p a learned position, tau the plain sinusoid.
    In stage 1 there are T joint tokens, each of the same instant as one action; in stage 2 there
    are To observation tokens: as in the paper, not only the tokens' content changes, but also their
    number and alignment.
    A fresh pathway's tokens are small (weights N(0, 0.02^2)): cross-attention reads values near 0.
    For `prefix` that is no identity, because the backbone's LayerNorm enlarges them again.

    encoder: one of the above, with a step for each token; width: D, size of tokens and of tau.
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

    def encode(self, observations):
        """Phi: observations (B, ...) -> o (B, steps, size)."""
        return self.encoder(observations)

    def forward(self, o, tau):
        """F: o (B, steps, size), tau (B * K, D) -> tokens (B * K, 1 + steps, D), K noise draws."""
        draws = len(tau) // len(o)
        observed = self.embed(o).repeat_interleave(draws, dim=0)
        tokens = torch.cat([tau.unsqueeze(1), observed], dim=1)
        return self.mlp(tokens + self.position)


def make_conditioning(backbone, observation="state", **encoder_settings):
    """A fresh conditioning pathway for `backbone`, of the mechanism that it was built for.

    observation: of ENCODERS, with the encoder's settings. Raises ValueError for another.
    """
    if observation not in ENCODERS:
        raise ValueError(f"observation is {observation!r}; allowed: {', '.join(ENCODERS)}")
    mechanism = backbone.mechanism
    time_dim = backbone.time_encoder.dim
    if issubclass(ENCODERS[observation], StateEncoder):
        encoder_settings["per_step"] = mechanism.tokens
    encoder = ENCODERS[observation](**encoder_settings)
    if mechanism.tokens:
        return TokenConditioning(encoder, time_dim)
    return Conditioning(encoder, time_dim, backbone.modulation_widths, mechanism)


# The lesson ---------------------------------------------------------------------------------------

def apply_all(mechanism, h, m):
    """What the hooks of a mechanism together do to a feature map h (B,T,D)."""
    if mechanism.adaptive:
        h = mechanism.norm(h.shape[-1])(h)
    h = mechanism.after_norm(h, m)
    h = mechanism.modulate(h, m)
    return mechanism.gate(h, m)


def lesson(out):
    """Print what FiLM does to a few features, save out/film.png: each mechanism on one map."""
    import matplotlib.pyplot as plt

    step = torch.arange(16)[:, None] / 16
    feature = torch.arange(24) / 24
    h = torch.sin(6 * step + 9 * feature)[None]                              # (B=1,T=16,D=24)
    vectors = torch.stack([1.5 * torch.cos(torch.pi * feature), feature, feature.round()])
    m = vectors[None, :, None]                                               # (B=1,V=3,1,D=24)

    print("Features", h.shape, "and modulation", m[:, :2].shape)
    print("One gamma and one beta for each feature, the same for all steps of the chunk.")
    after = FiLM().modulate(h, m[:, :2])
    for name, values in {"gamma": vectors[0], "beta": vectors[1], "h, step 8": h[0, 8],
                         "FiLM(h), step 8": after[0, 8]}.items():
        print(f"{name:16}", *(f"{value:6.2f}" for value in values[::4]))

    maps = {"h: 16 steps, 24 features": h}
    for name in ("film", "additive", "adaln", "adarms", "adaln-zero"):
        mechanism = MECHANISMS[name]()
        maps[name] = apply_all(mechanism, h, m[:, :len(mechanism.identity)])
    figure, axes = plt.subplots(1, len(maps), figsize=(14, 2.4), layout="constrained")
    for axis, name in zip(axes, maps):
        axis.imshow(maps[name][0].numpy(), cmap="coolwarm", vmin=-2.5, vmax=2.5)
        axis.set(title=name, xlabel="feature", ylabel="step")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "film.png", dpi=110)
    print(f"Pictures: film.png, eye.png in {out}. What each recipe trains: python heads.py")


def lesson_of_seeing(out, updates=401):
    """Train the eye of a PixelEncoder alone; save out/eye.png: where it looks, what it finds."""
    import matplotlib.pyplot as plt
    import sim_pusht

    env = sim_pusht.PushT(64)
    eye = PixelEncoder(2, sim_pusht.KEYPOINTS, sim_pusht.GOAL)
    optimizer = torch.optim.AdamW(eye.parameters(), lr=3e-3)
    for update in range(updates):
        env.reset(64 * update)     # no scene twice
        points, located = eye.locate(torch.as_tensor(env.render()))
        error = F.l1_loss(located, torch.as_tensor(sim_pusht.keypoints(env.block_pose())))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if update % 100 == 0:
            print(f"An eye that saw {64 * update:6d} pictures: corners {error:5.1f} px off")
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), layout="constrained")
    for axis, picture, looks, finds in zip(axes, env.render(), COARSE * (1 + points), located):
        axis.imshow(picture, extent=(0, 512, 512, 0))
        axis.plot(*looks.detach().T, "k+", *finds.detach().T, "r.")
    axes[0].set_title("+ where 16 maps are large, . the corners")
    figure.savefig(out / "eye.png", dpi=110)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # needs no display
    lesson(Path("runs/lessons"))
    lesson_of_seeing(Path("runs/lessons"))
