"""The conditioning pathway: everything that stage 2 TRAINS.

    observation --encoder Phi--> o --\
                                      F: c = [o, tau] --> (gamma_1, beta_1) ... (gamma_R, beta_R)
    timestep -----time encoder-> tau -/

The paper's claim is about this file. It says that these weights alone can hold all knowledge of
the task, while the backbone (heads.py) stays frozen and only *applies* gamma and beta. This file
does not know how the backbone looks inside. It gets the widths of the R layers to be modulated,
and returns one modulation for each. Two mechanisms, cross-attention and prefix, are different:
they give the backbone tokens instead, that is, a sequence of vectors.

In order: the mechanisms (what gamma and beta do to a feature), the pathways (F, which makes gamma
and beta), the encoders (Phi, which makes o), and the lesson. The encoder of pixels comes last.
Paper: section IV-A, eq. 2, 3 and 11 (arXiv 2511.12101v1); the mechanisms are compared in section
IV-E of its second version.

Run alone:  python film.py       what each mechanism does to features, how an encoder learns to see
"""
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# The mechanisms: what a condition does to a block -------------------------------------------------

class Mechanism:
    """How a condition acts on a residual block, x' = x + branch(norm(x)). The base: not at all.
    (DP-MLP normalises after the sum: x' = norm(x + branch(x)).)

    A block calls three methods. A mechanism overrides those that it needs:
      after_norm(h, m)   h is what the block's normalisation puts out
      modulate(h, m)     h are features inside the branch (heads.py says where in the branch)
      gate(h, m)         h is the branch's output, before it is added to x
    Each takes features h (B,T,D) and a modulation m (B,V,1,D), and returns new features (B,T,D).
    A modulation is V vectors of width D: for FiLM V = 2, first gamma, then beta.
    The U-Net has its channels first: there h is (B,D,T) and m is (B,V,D,1).
    TRAP: the axis of size 1 in m is needed, it broadcasts over the horizon. Without it, and where
    B == T, each time step would get the modulation of another sample, and no error would tell.

    identity: V numbers, one for each vector. At these values the block is as if it had no
    condition (adaln-zero: as if it had no branch). A fresh pathway starts there, see Conditioning.
    """
    identity = ()
    tokens = False         # does the backbone take tokens instead of modulations?
    prepends = False       # do the tokens stand in front of the actions, in one sequence?
    adaptive = False       # does it replace the normalisation's own scale and shift?
    starts_at_identity = False  # does it start exactly at its identity, whatever is observed?

    def after_norm(self, h, m):
        return h

    def modulate(self, h, m):
        return h

    def gate(self, h, m):
        return h

    def norm(self, width):
        """The normalisation that the block shall use."""
        return nn.LayerNorm(width, elementwise_affine=not self.adaptive)


class FiLM(Mechanism):
    """Feature-wise linear modulation: h' = gamma * h + beta  (paper eq. 3).

    As in the paper the factor is gamma, not 1 + gamma. It starts near gamma = 1.
    """
    identity = (1, 0)

    def modulate(self, h, m):
        gamma, beta = m.unbind(1)
        return gamma * h + beta


class Additive(Mechanism):
    """h' = h + beta: FiLM without its factor. It starts at beta = 0, as in the official code."""
    identity = (0,)
    starts_at_identity = True

    def modulate(self, h, m):
        return h + m[:, 0]


class AdaLN(Mechanism):
    """Adaptive normalisation: (1 + gamma) * LayerNorm(x) + beta  (Peebles & Xie 2023, adaLN).

    after_norm gets h = LayerNorm(x), which the block has computed.

    The U-Net normalises with GroupNorm. There this is AdaGN (Dhariwal & Nichol 2021).
    """
    identity = (0, 0)
    adaptive = True

    def after_norm(self, h, m):
        gamma, beta = m[:, 0], m[:, 1]
        return (1 + gamma) * h + beta


class AdaRMS(AdaLN):
    """h' = (1 + gamma) * RMSNorm(h) + beta: like AdaLN, but the mean is not subtracted."""

    def norm(self, width):
        return nn.RMSNorm(width, elementwise_affine=False)


class AdaLNZero(AdaLN):
    """AdaLN and a gate: x' = x + alpha * branch(AdaLN(x))  (Peebles & Xie 2023, DiT).

    gamma, beta and alpha start at exactly zero for every observation. So a fresh pathway closes
    every branch, and training has to open the gates. This is also so at the start of stage 2,
    although the frozen branches have already learned something. (The official code keeps the
    biases of stage 1 in stage 2, and so its gates are open.)
    """
    identity = (0, 0, 0)
    starts_at_identity = True

    def gate(self, h, m):
        alpha = m[:, 2]
        return alpha * h


class CrossAttention(Mechanism):
    """x' = x + Attention(query W_q x, keys W_k c, values W_v c), c the condition's tokens.

    W_k and W_v, which read the tokens, belong to the backbone. Stage 1 trains them on tokens of
    joint angles, stage 2 freezes them. The tokens of stage 2 have to be understood by the same
    matrices. This is how the paper explains that the token mechanisms fail when the backbone is
    frozen; our own measurements leave the cause open (results/appendix.md).
    """
    tokens = True


class Prefix(Mechanism):
    """The tokens stand in front of the actions, [c, x], and self-attention sees both."""
    tokens = True
    prepends = True


MECHANISMS = {"film": FiLM, "additive": Additive, "adaln": AdaLN, "adarms": AdaRMS,
              "adaln-zero": AdaLNZero, "cross-attention": CrossAttention, "prefix": Prefix}


# The pathways: F, which makes modulations or tokens of the encoded observation --------------------

class Conditioning(nn.Module):
    """Encoder Phi and the generators F_1 ... F_R of the modulations (paper eq. 2 and 11).

    encoder: an Encoder, see below. time_dim: E, the size of tau. widths: D_1 ... D_R of the layers
    to be modulated. mechanism: a Mechanism that takes modulations, not tokens.
    """

    def __init__(self, encoder, time_dim, widths, mechanism):
        super().__init__()
        self.encoder = encoder
        self.vectors = len(mechanism.identity)
        self.sizes = [self.vectors * width for width in widths]
        # One matrix product makes the modulations of all R layers.
        self.observation_part = nn.Linear(encoder.steps * encoder.size, sum(self.sizes))
        self.time_part = nn.Linear(time_dim, sum(self.sizes), bias=False)
        # A fresh pathway starts around the identity: this is its bias. The weights are PyTorch's.
        # (Official code: FiLM's gamma starts near 0, not 1. And stage 2 keeps the biases of
        # stage 1, which the paper does not mention: train.py's --keep-biases.)
        values = torch.tensor(mechanism.identity).float()
        with torch.no_grad():
            for bias, width in zip(self.observation_part.bias.split(self.sizes), widths):
                bias.copy_(values.repeat_interleave(width))
            if mechanism.starts_at_identity:
                self.observation_part.weight.zero_()
                self.time_part.weight.zero_()

    def encode(self, perceived):
        """Phi: what the encoder has perceived of observations (B, ...) -> o (B, O)."""
        return self.encoder(perceived).flatten(1)

    def forward(self, o, tau):
        """F: o (B, O), tau (B * K, E) -> R modulations (B * K, V, 1, D_r).

        Each observation has K noise draws, whose rows stand next to each other.
        The paper applies Mish and one Linear layer to the concatenation c = [o, tau]. Here the
        same product is computed in two halves: the half of o once for all K draws.
        """
        draws = len(tau) // len(o)
        observed = self.observation_part(F.mish(o)).repeat_interleave(draws, dim=0)
        modulations = observed + self.time_part(F.mish(tau))
        return [modulation.unflatten(1, (self.vectors, 1, -1))
                for modulation in modulations.split(self.sizes, dim=1)]


class TokenConditioning(nn.Module):
    """Tokens for cross-attention and prefix: one for the timestep, one for each observation step.

    c_s = MLP(W o_s + p_s), c_0 = MLP(tau + p_0). p is a learned position, tau the plain sinusoid.
    Stage 1 has T tokens of joint angles, each of the same instant as one action. Stage 2 has To
    tokens of observations. So, as in the paper, not only what the tokens say changes between the
    stages, but also how many there are and which instants they belong to.
    A fresh pathway's tokens are small (weights from N(0, 0.02^2)): cross-attention reads values
    near 0. For prefix this is no identity, because the backbone's LayerNorm makes them large again.

    encoder: an Encoder with a step for each token. width: D, the size of tokens and of tau.
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

    def encode(self, perceived):
        """Phi: what the encoder has perceived of observations (B, ...) -> o (B, steps, size)."""
        return self.encoder(perceived)

    def forward(self, o, tau):
        """F: o (B, steps, size), tau (B * K, D) -> tokens (B * K, 1 + steps, D), K noise draws."""
        draws = len(tau) // len(o)
        observed = self.embed(o).repeat_interleave(draws, dim=0)
        tokens = torch.cat([tau.unsqueeze(1), observed], dim=1)
        return self.mlp(tokens + self.position)


def make_conditioning(backbone, observation="state", **encoder_settings):
    """A fresh conditioning pathway for `backbone`, with the mechanism that it was built for.

    observation: a name in ENCODERS; encoder_settings: the arguments of that encoder.
    Raises ValueError for another name.
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


# The encoders Phi: observations (B, ...) -> features (B, steps, size) -----------------------------

COARSE = 256.0     # px that become 1 at the coarse scale: half the board
FINE = 20.0        # px that become tanh(1) at the fine one: about what decides over success


class Encoder(nn.Module):
    """What all encoders have in common. In this order a policy calls them:

        observations = read(observations)      only in acting: checks them, makes tensors
        agent = agent_position(observations)   where actions are counted from
        perceived = perceive(observations)     a PixelEncoder finds the block's corners
        o = forward(perceived)                 features, then an MLP
        auxiliary_loss(perceived)              only in training

    Each encoder sets three attributes:
    steps, size: forward(perceived) returns (B, steps, size); a token mechanism makes steps tokens.
    config: the arguments with which make_conditioning builds the encoder again, for policy files.
    The encoders that a policy acts with, of state and pixels, also have `read`, `agent_position`.
    """

    def perceive(self, observations):
        """What `forward` and `auxiliary_loss` take. Here: the observations as they are."""
        return observations

    def auxiliary_loss(self, perceived):
        """A second term of the loss, beside the error of the noise. The paper has no such term."""
        return 0.0


class StateEncoder(Encoder):
    """The observation encoder of stage 2: states of PushT -> features.

    It looks at the block's 8 corners from two origins: from the agent, and from where each corner
    should be in the end. Each vector is given in two frames: in the board's, in which the actions
    are; and in the block's, in which the same push looks the same however the block lies. And each
    is given at two scales: coarse, because the board is 512 px wide; and fine (through tanh),
    because 2 px decide over success. An MLP follows.
    (The paper's encoders take each observation step alone, as per_step does.)

    obs_steps: To. corners: (8, 2) px in the block's own frame. goal: the pose at which the block
    should end (x, y in px, angle in rad). width, depth: of the MLP. per_step: encode each
    observation step alone, for tokens; otherwise all To steps together.
    """
    observation = "state"
    numbers = 5     # of an observation: agent x, y, block x, y, angle
    # 8 corners x 2 coordinates x 2 origins x 2 frames x 2 scales = 128 numbers a step
    seen = 8 * 2 * 2 * 2 * 2

    def __init__(self, obs_steps, corners, goal, width=384, depth=3, per_step=False):
        super().__init__()
        corners, goal = (torch.tensor(numbers, dtype=torch.float64, device="cpu").tolist()
                         for numbers in (corners, goal))     # a file must not hold arrays
        self.config = dict(observation=self.observation, obs_steps=obs_steps, corners=corners,
                           goal=goal, width=width, depth=depth)
        self.obs_steps = obs_steps
        self.steps, self.size = obs_steps if per_step else 1, width
        corners, goal = torch.tensor(corners).float(), torch.tensor(goal).float()
        self.register_buffer("corners", corners)
        self.register_buffer("goal_corners", place(corners, goal))
        inputs = self.seen if per_step else self.seen * obs_steps
        layers = []
        for _ in range(depth - 1):
            # The LayerNorm is needed: without it, training is unstable at high learning rates.
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
        """observations (B, To, 5): agent x, y, block x, y (px), angle (rad) -> (B, To, 128)."""
        corners = place(self.corners, observations[..., 2:])            # (B, To, 8, 2)
        return self.look(corners, observations[..., :2], self.goal_corners)

    def look(self, corners, agent, goal_corners):
        """Corners (B, To, 8, 2) seen from agent (B, To, 2) and from the goal's: (B, To, 128).

        The block's frame has its x axis along the block's longest edge, from corner 0 to corner 1.
        """
        vectors = torch.cat([corners - agent[..., None, :], corners - goal_corners], dim=-2)
        x_axis = F.normalize(corners[..., 1:2, :] - corners[..., 0:1, :], dim=-1)  # (B, To, 1, 2)
        vectors = torch.cat([vectors, in_frame(x_axis, vectors)], dim=-2)
        scaled = torch.cat([vectors / COARSE, torch.tanh(vectors / FINE)], dim=-2)
        return scaled.flatten(-2)

    def forward(self, observations):
        """observations (B, To, 5) -> (B, steps, size). steps: To with per_step, otherwise 1."""
        features = self.features(observations)
        return self.mlp(features.reshape(len(features), self.steps, -1))


class GoalEncoder(StateEncoder):
    """A StateEncoder for several goals: each observation says, behind the state, which one counts.

    observations (B, To, 8): the state, then x and y (px) and angle (rad) of the goal. goal: a list
    of the poses that the policy learns; a policy file holds them, but no output depends on them.
    """
    observation = "state-and-goal"
    numbers = 8

    def features(self, observations):
        """observations (B, To, 8) -> (B, To, 128)."""
        agent, block, goal = observations.split([2, 3, 3], dim=-1)
        return self.look(place(self.corners, block), agent, place(self.corners, goal))


def checked(values, name, shape, device, kind=torch.float32):
    """values as a tensor; ValueError if they are not (B, *shape), or hold NaN or infinity."""
    try:
        values = torch.as_tensor(values, device=device)
    except (TypeError, RuntimeError):     # torch raises RuntimeError for a dict
        raise ValueError(f"{name} must be an array, got {type(values).__name__}") from None
    if values.dim() == 0 or values.shape[1:] != shape:
        raise ValueError(f"{name} must have shape (B, {str(shape)[1:]}, got {tuple(values.shape)}")
    if kind == torch.uint8 and values.dtype != kind:
        raise ValueError(f"{name} must be {kind}, got {values.dtype}")
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return values.to(kind)


def place(corners, pose):
    """Where corners (K, 2) of a block are when the block has a pose (..., 3): (..., K, 2) px."""
    cos, sin = pose[..., 2:].cos(), pose[..., 2:].sin()                 # (..., 1)
    x, y = corners.unbind(-1)
    rotated = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    return rotated + pose[..., None, :2]


def in_frame(x_axis, vectors):
    """The coordinates of vectors (..., K, 2) in a frame with the unit vector x_axis (..., 1, 2)."""
    axis_x, axis_y = x_axis.unbind(-1)
    x, y = vectors.unbind(-1)
    return torch.stack([axis_x * x + axis_y * y, axis_x * y - axis_y * x], dim=-1)


class JointEncoder(Encoder):
    """The condition of stage 1: joint angles (B, T, N) in rad -> their sin and cos. No weights.

    The paper feeds angles scaled to [-1, 1]. sin and cos have no jump between +pi and -pi.
    """

    def __init__(self, horizon, num_joints=3):     # 3: the links of kinematics.PlanarArm()
        super().__init__()
        self.config = dict(observation="joints", horizon=horizon, num_joints=num_joints)
        self.steps, self.size = horizon, 2 * num_joints

    def forward(self, angles):
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PoseEncoder(Encoder):
    """An alternative for stage 1: the end effector's positions (B, T, 2) in px, scaled.

    Then the condition nearly contains the actions (section IV-D of the paper's second version).
    """

    def __init__(self, horizon):
        super().__init__()
        self.config = dict(observation="pose", horizon=horizon)
        self.steps, self.size = horizon, 2

    def forward(self, positions):
        return positions / COARSE - 1


class NoEncoder(Encoder):
    """An alternative for stage 1: zeros, whatever is observed (B, ...). No condition at all."""

    def __init__(self, horizon, size=1):
        super().__init__()
        self.config = dict(observation="none", horizon=horizon, size=size)
        self.steps, self.size = horizon, size

    def forward(self, observations):
        return torch.zeros(len(observations), self.steps, self.size, device=observations.device)


class PixelEncoder(StateEncoder):
    """Pictures instead of states: find the block's corners in the picture, go on as StateEncoder.

    observations: a dict, as gym-pusht's `pixels_agent_pos` (where the batches of training add
    "corners", the true corners (B, 8, 2) px, which auxiliary_loss compares with):
      pixels     (B, 96, 96, 3) uint8, the newest picture
      agent_pos  (B, To, 2) px
    Convolutions turn the picture into 16 maps of 24 x 24 places. A softmax over the places makes
    one point of each map: the mean of its places, weighted by the map (Levine et al. 2016). The
    corners are computed from the 16 points. Nothing is pretrained. (The paper uses two ResNet-18.)

    corner_weight: how much auxiliary_loss counts; 0 is the paper's loss, which has no such term.
    """
    observation = "pixels"

    def __init__(self, obs_steps, corners, goal, corner_weight=0.0, **mlp):
        super().__init__(obs_steps, corners, goal, **mlp)
        self.corner_weight = corner_weight
        self.config["corner_weight"] = corner_weight
        self.maps = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=4), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.sharpness = nn.Parameter(torch.tensor(4.0))     # the larger, the fewer places count
        self.linear = nn.Linear(32, 16)
        self.correction = nn.Sequential(nn.Linear(32, 128), nn.Mish(), nn.Linear(128, 16))
        line = torch.linspace(-1, 1, 24)
        self.register_buffer("places", torch.cartesian_prod(line, line).flip(1), persistent=False)

    def read(self, observations, device):
        """The dict with tensors; ValueError if it is not as the class says, or not finite."""
        if not isinstance(observations, dict) or not {"pixels", "agent_pos"} <= observations.keys():
            raise ValueError("observations must be a dict of pixels and agent_pos")
        pixels, agent = observations["pixels"], observations["agent_pos"]
        return {"pixels": checked(pixels, "pixels", (96, 96, 3), device, torch.uint8),
                "agent_pos": checked(agent, "agent_pos", (self.obs_steps, 2), device)}

    def agent_position(self, observations):
        return observations["agent_pos"][:, -1]

    def locate(self, pixels):
        """Pictures (B, 96, 96, 3) -> 16 points (B, 16, 2) from -1 to 1; corners (B, 8, 2) px."""
        maps = self.maps(pixels.permute(0, 3, 1, 2) / 127.5 - 1).flatten(2)
        with torch.autocast(maps.device.type, enabled=False):     # TRAP: bf16 would round to 2 px
            # Standardise each map. Otherwise half of them stay uniform: points in the middle.
            maps = F.layer_norm(maps.float(), maps.shape[-1:])
            share = (self.sharpness * maps).softmax(-1)
            points = share @ self.places
            flat = points.flatten(1)
            corners = self.linear(flat) + self.correction(flat)
        return points, COARSE * (1 + corners.unflatten(1, (8, 2)))

    def perceive(self, observations):
        """The observations, and in them "located" (B, 8, 2) px: where the corners seem to be.

        So a picture is looked at only once, for `forward` and for `auxiliary_loss`.
        """
        _, located = self.locate(observations["pixels"])
        return {**observations, "located": located}

    def features(self, perceived):
        """(B, To, 128). There is one picture, so the corners are the same in all To steps."""
        corners = perceived["located"][:, None].expand(-1, self.obs_steps, -1, -1)
        return self.look(corners, perceived["agent_pos"], self.goal_corners)

    def auxiliary_loss(self, perceived):
        """corner_weight times how far the corners are from the true ones, in units of 20 px."""
        if self.corner_weight == 0:
            return 0.0     # acting and the paper's loss do not know the true corners
        distance = F.l1_loss(perceived["located"], perceived["corners"])
        return self.corner_weight * (distance / FINE)


ENCODERS = {"state": StateEncoder, "state-and-goal": GoalEncoder, "pixels": PixelEncoder,
            "joints": JointEncoder, "pose": PoseEncoder, "none": NoEncoder}


# The lesson ---------------------------------------------------------------------------------------

def apply_all(mechanism, h, m):
    """What the three methods of a mechanism together do to features h (B,T,D)."""
    if mechanism.adaptive:
        h = mechanism.norm(h.shape[-1])(h)
    h = mechanism.after_norm(h, m)
    h = mechanism.modulate(h, m)
    return mechanism.gate(h, m)


def lesson(out):
    """Print what FiLM does to a few features; save out/film.png: each mechanism, same features."""
    import matplotlib.pyplot as plt

    step = torch.arange(16)[:, None] / 16
    feature = torch.arange(24) / 24
    h = 0.5 + torch.sin(6 * step + 9 * feature)[None]                        # (B=1,T=16,D=24)
    vectors = torch.stack([1.5 * torch.cos(torch.pi * feature), feature, feature.round()])
    m = vectors[None, :, None]                                               # (B=1,V=3,1,D=24)

    print("Features h", tuple(h.shape), "and modulation m", tuple(m[:, :2].shape))
    print("FiLM has one gamma and one beta for each feature, the same for all 16 steps.\n"
          "Here are every fourth feature's numbers. The last row is gamma * h + beta:")
    after = FiLM().modulate(h, m[:, :2])
    for name, values in {"gamma": vectors[0], "beta": vectors[1], "h, step 8": h[0, 8],
                         "FiLM(h), step 8": after[0, 8]}.items():
        print(f"{name:16}", *(f"{value:6.2f}" for value in values[::4]))

    maps = {"features h": h, "LayerNorm(h)": F.layer_norm(h, [24])}
    equations = {"film": "gamma h + beta", "additive": "h + beta",
                 "adaln": "(1 + gamma) LayerNorm(h) + beta",
                 "adarms": "(1 + gamma) RMSNorm(h) + beta",
                 "adaln-zero": "alpha (adaln): 0 where alpha is 0"}
    for name, equation in equations.items():
        mechanism = MECHANISMS[name]()
        maps[f"{name}\n{equation}"] = apply_all(mechanism, h, m[:, :len(mechanism.identity)])
    figure, axes = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
    figure.suptitle("Each feature (column) has its own modulation, the same for all steps (rows)")
    first, *others = axes.flat
    for name, vector in zip(("gamma", "beta", "alpha"), vectors):
        first.plot(vector.numpy(), ".-", label=name)
    first.set(title="the modulation", xlabel="feature")
    first.legend()
    for axis, title in zip(others, maps):
        image = axis.imshow(maps[title][0].numpy(), cmap="coolwarm", vmin=-3, vmax=3,
                            aspect="auto")
        axis.set(title=title, xlabel="feature", ylabel="step")
    figure.colorbar(image, ax=axes, label="value of a feature")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "film.png", dpi=110)
    print(f"Picture: {out / 'film.png'}\n")


def lesson_of_seeing(out, updates=800, scenes=4000):
    """Teach a PixelEncoder where the corners are; save out/eye.png: what it finds in new pictures.

    Prints how far off it is on pictures that it was not trained on. A minute on a slow computer.
    """
    import matplotlib.pyplot as plt
    import sim_pusht

    torch.manual_seed(0)
    env = sim_pusht.PushT(scenes + 64)     # the last 64 are for the test
    pixels = torch.as_tensor(env.render())
    corners = torch.as_tensor(sim_pusht.keypoints(env.block_pose())).float()
    new_pixels, new_corners = pixels[scenes:], corners[scenes:]
    encoder = PixelEncoder(2, sim_pusht.KEYPOINTS, sim_pusht.GOAL)
    optimizer = torch.optim.AdamW(encoder.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, updates + 1, pct_start=0.1)
    print(f"A PixelEncoder learns from {scenes} pictures where the corners of the block are.\n"
          "Mean distance from the true corners in 64 other pictures (the board is 512 px wide):")
    found = {}
    for update in range(updates + 1):
        if update % (updates // 8) == 0:
            with torch.no_grad():
                _, found[update] = encoder.locate(new_pixels)
            error = (found[update] - new_corners).norm(dim=-1).mean()
            print(f"after {update:3d} updates {error:6.1f} px")
        batch = torch.randint(scenes, (16,))
        _, located = encoder.locate(pixels[batch])
        loss = F.l1_loss(located, corners[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.7), layout="constrained")
    figure.suptitle("The corners in pictures that the encoder was not trained on")
    for axis, update, scene in zip(axes, (0, updates, updates), (0, 0, 1)):
        axis.imshow(new_pixels[scene].numpy(), extent=(0, 512, 512, 0))
        axis.plot(*new_corners[scene].T.numpy(), "ko", fillstyle="none", label="true corners")
        axis.plot(*found[update][scene].T.numpy(), "r.", label="corners found")
        error = (found[update][scene] - new_corners[scene]).norm(dim=-1).mean()
        axis.set(title=f"after {update} updates: {error:.1f} px off", xlabel="px")
    axes[0].legend(loc="lower left")
    figure.savefig(out / "eye.png", dpi=110)
    print(f"Picture: {out / 'eye.png'}. What each recipe trains: python heads.py")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # needs no display
    torch.set_num_threads(1)             # quick even while other programs use the computer
    lesson(Path("runs/lessons"))
    lesson_of_seeing(Path("runs/lessons"))
