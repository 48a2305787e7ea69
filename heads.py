"""The action head's backbones: everything that stage 2 FREEZES.

A backbone takes noisy actions and predicts the noise in them. It owns no weight that depends on
the observation. It says which widths its modulated layers have (`modulation_widths`), and applies
the gamma and beta that film.py makes for them. The one exception: with cross-attention and prefix
it reads tokens of the observation by weights of its own.
Paper: section IV-B, G and f_tau of eq. 10 (arXiv 2511.12101v1).

All three backbones have the same three parts, so that two of them can be read side by side:
  1. embed the noisy actions (B,T,A) -> (B,T,D)
  2. blocks, each modulated by the three methods of film.Mechanism
  3. normalise and project back -> predicted noise (B,T,A)

Run alone:  python heads.py       which parameters each stage trains, and the paper's numbers
"""
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from film import MECHANISMS, make_conditioning


class TimeEncoder(nn.Module):
    """f_tau, the encoder of the diffusion timestep: timestep (B,) -> tau (B, dim).

    A sinusoid, then Linear, Mish, Linear. It belongs to the backbone and is frozen with it (paper
    eq. 10). learned=False: the sinusoid alone. The token mechanisms need no more, because film.py
    puts an MLP on all tokens.
    """

    def __init__(self, dim, learned=True):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Identity()
        if learned:
            self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, timestep):
        half = self.dim // 2
        exponents = torch.arange(half, device=timestep.device) * -math.log(1e4) / (half - 1)
        angles = timestep[:, None] * exponents.exp()
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Backbone(nn.Module):
    """What all backbones have in common.

    A subclass sets `time_encoder` and `modulation_widths` [D_1 ... D_R], and has a method
      forward(noisy_actions (B,T,A), condition, steps=None) -> predicted noise (B,T,A)
    condition: R modulations (B,V,1,D_r), or for the token mechanisms tokens (B,S,D).
    steps: the horizon steps to work on, only for a backbone that does not mix time steps.
    Dropout stays on while the pathway of a frozen backbone is trained, as in the paper: the
    pathway meets the same noise as the backbone met in stage 1. The laptop sizes have no dropout.
    """
    mixes_time = True                  # does an action of the chunk depend on the other actions?
    mechanisms = tuple(MECHANISMS)     # those that it can be built for

    def __init__(self, **config):
        super().__init__()
        self.config = dict(config, name=self.name)     # what a policy file needs to build it again
        self.mechanism = MECHANISMS[config["conditioning"]]()


# DP-MLP -------------------------------------------------------------------------------------------

class MLP(Backbone):
    """DP-MLP: 4M parameters that do the work of the U-Net's 244M (paper section IV-D).

    Every horizon step has its own input matrix. Only this tells the network which step it sees:
    all steps go through the same blocks. NO operation mixes time steps: given the observation,
    each action of a chunk is denoised independently of the others. The paper does not mention
    this, but its code does it, and so do we.
    """
    name = "mlp"
    mixes_time = False
    mechanisms = ("film", "additive", "adaln", "adarms", "adaln-zero")

    def __init__(self, action_dim, horizon, conditioning, width, hidden, depth, dropout):
        super().__init__(action_dim=action_dim, horizon=horizon, conditioning=conditioning,
                         width=width, hidden=hidden, depth=depth, dropout=dropout)
        self.time_encoder = TimeEncoder(width)
        # An adaptive mechanism acts after the block's norm, the others on its wide hidden layer.
        self.modulation_widths = [width if self.mechanism.adaptive else hidden] * depth
        # Standard deviation 1, not 1 / sqrt(number of inputs): as in the official MLP_FiLM.py.
        self.input_weight = nn.Parameter(torch.randn(horizon, action_dim, width))
        self.input_bias = nn.Parameter(torch.randn(horizon, width))
        self.blocks = nn.ModuleList(
            MLPBlock(self.mechanism, width, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_dim)

    def forward(self, noisy_actions, modulations, steps=None):
        """steps (B,S) int64: which horizon steps the S actions of each sample are. None: all T."""
        weight, bias = self.input_weight, self.input_bias
        if steps is not None:
            weight, bias = rows(weight, steps), rows(bias, steps)    # (B,S,A,D), (B,S,D)
        # hidden_t = action_t W_t + b_t
        hidden = (noisy_actions.unsqueeze(-1) * weight).sum(-2) + bias
        for block, modulation in zip(self.blocks, modulations):
            hidden = block(hidden, modulation)
        return self.output(self.norm(hidden))


def rows(table, numbers):
    """The same as table[numbers], whose gradient two threads add up in no fixed order."""
    return table.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)


class MLPBlock(nn.Module):
    """x -> LayerNorm(x + W2 FiLM(gelu(W1 x))). FiLM acts on the wide hidden layer.

    The norm comes after the sum (post-norm).
    """

    def __init__(self, mechanism, width, hidden, dropout):
        super().__init__()
        self.mechanism = mechanism
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = mechanism.norm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, modulation):
        hidden = self.dropout(F.gelu(self.up(x)))
        hidden = self.mechanism.modulate(hidden, modulation)
        branch = self.dropout(self.down(hidden))
        branch = self.mechanism.gate(branch, modulation)
        return self.mechanism.after_norm(self.norm(x + branch), modulation)


# DP-C ---------------------------------------------------------------------------------------------

class UNet(Backbone):
    """DP-C: the 1-D convolutional U-Net of Diffusion Policy, 244M parameters (paper section IV-B).

    Its convolutions mix time steps. Halving the horizon twice lets each convolution see four
    times as far.
    As in the official code there is one upward level less than downward levels. So the first skip
    connection (the features at the full horizon) is stored, but nothing uses it: features reach
    the output only through the levels below. The official code also has branches that can never
    run (`is_last` upward); they are left out.

    Raises ValueError for a horizon that cannot be halved as often as the levels need.
    """
    name = "unet"
    mechanisms = ("film", "additive", "adaln", "adaln-zero")     # GroupNorm has no RMS form

    def __init__(self, action_dim, horizon, conditioning, time_dim, widths, kernel):
        super().__init__(action_dim=action_dim, horizon=horizon, conditioning=conditioning,
                         time_dim=time_dim, widths=widths, kernel=kernel)
        halvings = len(widths) - 1
        if horizon % 2 ** halvings:
            raise ValueError(f"horizon is {horizon}; a U-Net of {len(widths)} levels halves it "
                             f"{halvings} times, so it must be a multiple of {2 ** halvings}")
        self.time_encoder = TimeEncoder(time_dim)
        self.modulation_widths = []     # one for each block; each level has two blocks
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inputs = action_dim
        for level, outputs in enumerate(widths):
            blocks = self.make_blocks(inputs, outputs, kernel)
            halve = nn.Identity()       # the lowest level does not halve
            if level < halvings:
                halve = nn.Conv1d(outputs, outputs, 3, stride=2, padding=1)
            self.down.append(nn.ModuleList([*blocks, halve]))
            inputs = outputs
        self.middle = nn.ModuleList(self.make_blocks(inputs, inputs, kernel))
        for outputs in reversed(widths[:-1]):
            blocks = self.make_blocks(2 * inputs, outputs, kernel)     # 2: with the skip connection
            double = nn.ConvTranspose1d(outputs, outputs, 4, stride=2, padding=1)
            self.up.append(nn.ModuleList([*blocks, double]))
            inputs = outputs
        self.output = nn.Sequential(
            nn.Conv1d(inputs, inputs, kernel, padding=kernel // 2), nn.GroupNorm(8, inputs),
            nn.Mish(), nn.Conv1d(inputs, action_dim, 1))

    def make_blocks(self, inputs, outputs, kernel):
        self.modulation_widths += [outputs, outputs]
        return [UNetBlock(self.mechanism, inputs, outputs, kernel),
                UNetBlock(self.mechanism, outputs, outputs, kernel)]

    def forward(self, noisy_actions, modulations, steps=None):
        """steps: always None. The U-Net mixes time steps, so it needs all of them."""
        modulations = iter([modulation.mT for modulation in modulations])
        hidden, skips = noisy_actions.mT, []                       # (B,A,T): channels first
        for first, second, halve in self.down:
            hidden = first(hidden, next(modulations))
            hidden = second(hidden, next(modulations))
            skips.append(hidden)
            hidden = halve(hidden)
        for block in self.middle:
            hidden = block(hidden, next(modulations))
        for first, second, double in self.up:
            hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = first(hidden, next(modulations))
            hidden = second(hidden, next(modulations))
            hidden = double(hidden)
        return self.output(hidden).mT


class UNetBlock(nn.Module):
    """x -> shortcut(x) + mish(GN(conv(FiLM(mish(GN(conv(x))))))). FiLM between two convolutions.

    GN: GroupNorm. x (B,D,T) has the channels first.
    """

    def __init__(self, mechanism, inputs, outputs, kernel):
        super().__init__()
        self.mechanism = mechanism
        self.conv1 = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv1d(outputs, outputs, kernel, padding=kernel // 2)
        self.norm1 = nn.GroupNorm(8, outputs, affine=not mechanism.adaptive)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x, modulation):
        hidden = self.mechanism.after_norm(self.norm1(self.conv1(x)), modulation)
        hidden = self.mechanism.modulate(F.mish(hidden), modulation)
        branch = F.mish(self.norm2(self.conv2(hidden)))
        return self.shortcut(x) + self.mechanism.gate(branch, modulation)


# DP-T ---------------------------------------------------------------------------------------------

class Transformer(Backbone):
    """DP-T (cross-attention) and its modulated forms, first of all DP-T-FiLM (paper IV-C, IV-E).

    It is causal: an action sees itself and earlier actions. Each block has two branches, attention
    and MLP, and each branch gets its own modulation, as in the second version of the paper. (In
    the first version FiLM acts on the MLP branch alone.)
    The position embeddings belong to the backbone and are frozen with it. The official code loads
    them from stage 1, but then trains them in stage 2. Its modulated class also keeps the
    cross-attention, 2.1M parameters that nothing calls; they are left out here. The official
    horizon of DP-T is 10, ours is 16. Dropout also acts on the attention weights.
    """
    name = "transformer"

    def __init__(self, action_dim, horizon, conditioning, width, hidden, heads, depth, dropout):
        super().__init__(action_dim=action_dim, horizon=horizon, conditioning=conditioning,
                         width=width, hidden=hidden, heads=heads, depth=depth, dropout=dropout)
        tokens = self.mechanism.tokens
        self.time_encoder = TimeEncoder(width, learned=not tokens)
        self.modulation_widths = [] if tokens else [width] * 2 * depth
        self.input = nn.Linear(action_dim, width)
        self.position = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(self.mechanism, width, hidden, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_dim)
        for module in self.modules():     # GPT-2's initialisation, as in the official code
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, noisy_actions, condition, steps=None):
        """condition: modulations, two for each block, or for the token mechanisms tokens.

        steps: always None. The Transformer mixes time steps, so it needs all of them.
        """
        hidden = self.input(noisy_actions) + self.position
        modulations, tokens, in_front = condition, None, 0
        if self.mechanism.tokens:
            modulations, tokens = [None] * 2 * len(self.blocks), condition
        if self.mechanism.prepends:
            hidden = torch.cat([tokens, hidden], dim=1)
            in_front = tokens.shape[1]
        mask = causal_mask(hidden.shape[1], in_front, hidden.device)
        for block, first, second in zip(self.blocks, modulations[0::2], modulations[1::2]):
            hidden = block(hidden, first, second, mask, tokens)
        return self.output(self.norm(hidden[:, in_front:]))


def causal_mask(steps, in_front, device):
    """(steps, steps) bool: True where the row's step may see the column's step.

    A step sees itself and the steps before it. The first `in_front` steps are the tokens of the
    condition: these all see each other.
    """
    mask = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
    mask[:in_front, :in_front] = True
    return mask


class TransformerBlock(nn.Module):
    """x -> x + FiLM(SelfAttention(LN x)), then x -> x + FiLM(MLP(LN x)). LN: LayerNorm (pre-norm).

    With cross-attention, x -> x + CrossAttention(LN x, tokens) comes between the two.
    """

    def __init__(self, mechanism, width, hidden, heads, dropout):
        super().__init__()
        self.mechanism = mechanism
        self.dropout = nn.Dropout(dropout)
        self.norm1 = mechanism.norm(width)
        self.norm2 = mechanism.norm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, width))
        self.crosses = mechanism.tokens and not mechanism.prepends
        if self.crosses:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads, dropout)

    def forward(self, x, first, second, mask, tokens=None):
        """x (B,T,D); first, second: the modulations of the two branches; mask as of causal_mask."""
        hidden = self.mechanism.after_norm(self.norm1(x), first)
        branch = self.dropout(self.attention(hidden, hidden, mask))
        branch = self.mechanism.modulate(branch, first)
        x = x + self.mechanism.gate(branch, first)
        if self.crosses:
            # Token 0 is the timestep's, token s + 1 is observation s. Action t sees tokens 0..t+1.
            # Stage 2 has To + 1 tokens only, so action To - 1 and all after it see them all.
            seen = torch.ones(x.shape[1], tokens.shape[1], dtype=torch.bool, device=x.device)
            branch = self.cross_attention(self.cross_norm(x), tokens, seen.tril(1))
            x = x + self.dropout(branch)
        hidden = self.mechanism.after_norm(self.norm2(x), second)
        branch = self.dropout(self.mlp(hidden))
        branch = self.mechanism.modulate(branch, second)
        return x + self.mechanism.gate(branch, second)


class Attention(nn.Module):
    """Each step of x (B,T,D) takes a weighted mean of the source's steps (B,S,D), in each head.

    mask (T,S) bool: True where a step of x may see a step of the source.
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x, source, mask):
        key, value = self.key_value(source).chunk(2, dim=-1)
        query, key, value = (features.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for features in (self.query(x), key, value))    # (B,heads,T,D/heads)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


# Sizes --------------------------------------------------------------------------------------------

BACKBONES = {kind.name: kind for kind in (MLP, UNet, Transformer)}
SIZES = {
    "paper": {
        "mlp": dict(width=256, hidden=1024, depth=8, dropout=0.1),
        "unet": dict(time_dim=128, widths=(512, 1024, 2048), kernel=5),
        "transformer": dict(width=256, hidden=1024, heads=4, depth=8, dropout=0.3),
    },
    "laptop": {
        "mlp": dict(width=128, hidden=256, depth=2, dropout=0.0),
        "unet": dict(time_dim=128, widths=(24, 48, 96), kernel=5),
        "transformer": dict(width=96, hidden=192, heads=4, depth=4, dropout=0.0),
    },
}


def make_backbone(name, scale="laptop", action_dim=2, horizon=16, conditioning="film", width=None):
    """A new backbone, randomly initialised.

    name: of BACKBONES. scale: of SIZES. conditioning: the mechanism, a name in film.MECHANISMS.
    width: D, if it shall not be the scale's (DP-MLP and DP-T); hidden layers grow in proportion.
    Raises ValueError for an unknown name or scale, for a mechanism or a width that this backbone
    cannot take, and for a horizon that it cannot halve.
    """
    if name not in BACKBONES or scale not in SIZES:
        raise ValueError(f"no backbone {name!r} of scale {scale!r}; allowed: "
                         f"{', '.join(BACKBONES)}, of scale {' or '.join(SIZES)}")
    possible = BACKBONES[name].mechanisms
    if conditioning not in possible:
        raise ValueError(f"backbone {name!r} cannot take conditioning {conditioning!r}; "
                         f"possible: {', '.join(possible)}")
    size = dict(SIZES[scale][name])
    if width is not None:
        if "width" not in size:
            raise ValueError(f"backbone {name!r} takes no width; mlp and transformer take one")
        multiple = 2 * size.get("heads", 1)
        if width < multiple or width % multiple:
            raise ValueError(f"width is {width}; it must be a multiple of {multiple}")
        size["hidden"] = width * size["hidden"] // size["width"]
        size["width"] = width
    return BACKBONES[name](action_dim, horizon, conditioning, **size)


# The lesson ---------------------------------------------------------------------------------------

# Millions of parameters, (backbone, conditioning), of the modules that the official code calls.
# Tokens are counted without their positions. The official DP-T has 10 steps and ours has 16: this
# makes small differences.
PAPER = {"unet film": (244.06, 11.56), "mlp film": (4.78, 8.70),
         "transformer film": (6.85, 4.35), "transformer additive": (6.85, 2.18),
         "transformer adaln": (6.84, 4.35), "transformer adarms": (6.84, 4.35),
         "transformer adaln-zero": (6.84, 6.53), "transformer prefix": (6.32, 0.56),
         "transformer cross-attention": (8.43, 0.56)}
# The paper's actions have 10 numbers, its observations 137 (after the image encoders, which are
# not counted). PushT's actions have 2 numbers, and its state goes through a StateEncoder.
ACTION_DIM = {"paper": 10, "laptop": 2}
OBSERVATION = {"paper": dict(observation="none", horizon=2, size=137),
               "laptop": dict(obs_steps=2, corners=[[0, 0]] * 8, goal=[0, 0, 0])}


def count(module):
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def lesson(out):
    """Print the parameters of every backbone with every mechanism; save out/heads.png."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    figure.suptitle("Which share of a policy's parameters does stage 2 train? "
                    "(numbers: millions of parameters)")
    for axis, scale in zip(axes, SIZES):
        print(f"\nScale {scale}, millions of parameters. Normal training and stage 1 train all of "
              "them.\nStage 2 freezes the backbone and trains a new conditioning.\n"
              f"{'':28}  backbone  conditioning   the paper's")
        for name, kind in BACKBONES.items():
            for conditioning in kind.mechanisms:
                with torch.device("meta"):     # tensors with a shape, but without memory
                    backbone = make_backbone(name, scale, ACTION_DIM[scale], 16, conditioning)
                    pathway = make_conditioning(backbone, **OBSERVATION[scale])
                frozen, trained = count(backbone) / 1e6, count(pathway) / 1e6
                label = f"{name} {conditioning}"
                paper = PAPER.get(label) if scale == "paper" else None
                print(f"{label:28}{frozen:10.3f}{trained:14.3f}   {paper or '-'}")
                share = 100 * trained / (frozen + trained)
                axis.barh(label, share, color="C1")
                axis.barh(label, 100 - share, left=share, color="lightsteelblue")
                axis.text(1, label, f"{trained:.2f}", va="center")
                axis.text(99, label, f"{frozen:.2f}", va="center", ha="right")
        axis.legend(["trained in stage 2: conditioning", "frozen: backbone"], ncols=2,
                    loc="lower center", bbox_to_anchor=(0.5, 1))
        axis.set(xlabel=f"share of the parameters at scale {scale}, in percent", xlim=(0, 100))
        axis.invert_yaxis()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "heads.png", dpi=110)
    print("Picture:", out / "heads.png")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # needs no display
    lesson(Path("runs/lessons"))
