"""The action head's backbones: everything that stage 2 FREEZES.

A backbone turns noisy actions into the noise in them. It owns no weight that depends on the
observation: it names the layers to be modulated (`modulation_widths`) and applies the gamma and
beta that film.py makes for them. Paper: section IV-B, G and f_tau of eq. 10 (arXiv 2511.12101v1).

All three follow one template, so that two of them can be read side by side:
  1. embed the noisy actions (B,T,A) -> (B,T,D)
  2. blocks, each modulated at the places that film.Mechanism names
  3. normalise and project back -> predicted noise (B,T,A)

Run alone:  python heads.py       the table of parameters, next to the paper's figures
"""
import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from film import MECHANISMS, make_conditioning


class TimeEncoder(nn.Module):
    """f_tau, the encoder of the diffusion timestep: sinusoid, Linear, Mish, Linear.

    It belongs to the backbone and is frozen with it (paper eq. 10). timestep (B,) -> (B, dim).
    learned=False: the sinusoid alone, for the token mechanisms; their MLP is the tokens' own.
    """

    def __init__(self, dim, learned=True):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Identity() if not learned else nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, timestep):
        half = self.dim // 2
        rates = torch.exp(torch.arange(half, device=timestep.device) * -math.log(1e4) / (half - 1))
        angles = timestep[:, None] * rates
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Dropout(nn.Dropout):
    """nn.Dropout with cheaper random numbers: on a CPU, drawing them is a fifth of a step.

    A number takes 16 bits instead of a float, so p is rounded to 1/65536. As in the paper, dropout
    stays on in a frozen backbone (the mode is `train`, frozen or not): the pathway learns with the
    noise that the backbone was trained with. `eval` switches it off. The laptop sizes have none.
    """

    def forward(self, x):
        if not (self.training and self.p and x.is_cpu):
            return super().forward(x)
        dropped = round(self.p * 2**16)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        bits = bits.view(torch.int16)[:x.numel()].view(x.shape)
        keep = torch.ge(bits, dropped - 2**15, out=torch.empty(x.shape, dtype=x.dtype))
        return x * keep.mul_(1 / (1 - dropped / 2**16))


class Backbone(nn.Module):
    """What all backbones share. A subclass sets `time_encoder` and `modulation_widths`."""
    mixes_time = True     # does an action of the chunk see the others?
    mechanisms = tuple(MECHANISMS)     # those it can be built for

    def forward(self, noisy_actions, timestep, condition, **subset):
        """noisy_actions (B,T,A), timestep (B,) long -> predicted noise (B,T,A).

        condition: function from this backbone's time embedding (B,E) to one modulation for each
        of `modulation_widths`, or to tokens; film.py makes it from an observation.
        """
        return self.denoise(noisy_actions, condition(self.time_encoder(timestep)), **subset)


# DP-MLP -------------------------------------------------------------------------------------------

class MLP(Backbone):
    """DP-MLP: the 4M-parameter head that does the job of a 244M U-Net (paper section IV-D).

    Every horizon step has its own input matrix, which is also the only positional information; the
    blocks are shared by all steps. NO operation mixes time steps: given the observation, the
    actions of a chunk are denoised independently of each other. The paper does not mention it;
    its code does it, and so do we. Not taken over: arguments for attention that nothing reads.
    """
    mixes_time = False
    mechanisms = ("film", "additive", "adaln", "adarms", "adaln-zero")

    def __init__(self, action_dim, horizon, mechanism, width, hidden, depth, dropout):
        super().__init__()
        self.mechanism = mechanism
        self.time_encoder = TimeEncoder(width)
        self.modulation_widths = [width if mechanism.adaptive else hidden] * depth
        # Standard deviation 1 without 1/sqrt(fan-in), as in the official MLP_FiLM.py.
        self.input_weight = nn.Parameter(torch.randn(horizon, action_dim, width))
        self.input_bias = nn.Parameter(torch.randn(horizon, width))
        self.blocks = nn.ModuleList(
            MLPBlock(mechanism, width, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_dim)

    def denoise(self, noisy_actions, modulations, steps=None):
        """steps (B,S) long: which horizon steps the S actions of each sample are, None for all."""
        T = len(self.input_bias)
        steps = torch.arange(T, device=noisy_actions.device)[None] if steps is None else steps
        # hidden_t = action_t W_t + b_t: one product, with each action in its own step's columns.
        # (Indexing W by `steps` copies it for every sample: slower, its gradient most of all.)
        step = F.one_hot(steps, T).to(noisy_actions.dtype)                  # (B,S,T), or (1,T,T)
        spread = step.unsqueeze(-1) * noisy_actions.unsqueeze(-2)           # (B,S,T,A)
        hidden = spread.flatten(2) @ self.input_weight.flatten(0, 1) + step @ self.input_bias
        for block, modulation in zip(self.blocks, modulations):
            hidden = block(hidden, modulation)
        return self.output(self.norm(hidden))


class MLPBlock(nn.Module):
    """x -> LayerNorm(x + W2 FiLM(gelu(W1 x))): FiLM acts on the wide hidden layer, post-norm."""

    def __init__(self, mechanism, width, hidden, dropout):
        super().__init__()
        self.mechanism = mechanism
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm, self.dropout = mechanism.norm(width), Dropout(dropout)

    def forward(self, x, modulation):
        place = self.mechanism
        hidden = place.features(self.dropout(F.gelu(self.up(x))), modulation)
        branch = place.gated(self.dropout(self.down(hidden)), modulation)
        return place.normalised(self.norm(x + branch), modulation)


# DP-C ---------------------------------------------------------------------------------------------

class UNet(Backbone):
    """DP-C: the 1-D convolutional U-Net of Diffusion Policy, 244M parameters (paper section IV-B).

    Time steps mix through the convolutions, whose reach the two halvings of the horizon multiply.
    As in the official code, features of the full horizon reach the output only through the bottom:
    the upward level whose skip connection would carry them is not built, so the first skip is
    stored for nothing. The official branches that can never run (`is_last` upward) are left out.
    """
    mechanisms = ("film", "additive", "adaln", "adaln-zero")     # GroupNorm has no RMS form

    def __init__(self, action_dim, horizon, mechanism, time_dim, widths, kernel):
        super().__init__()
        factor = 2 ** (len(widths) - 1)
        if horizon % factor:
            raise ValueError(f"horizon is {horizon}; a U-Net of {len(widths)} levels halves it "
                             f"{len(widths) - 1} times and needs a multiple of {factor}")
        self.time_encoder = TimeEncoder(time_dim)
        self.modulation_widths = []

        def pair(inputs, outputs):     # two blocks, the second one keeps the width
            self.modulation_widths += [outputs, outputs]
            return [UNetBlock(mechanism, inputs, outputs, kernel),
                    UNetBlock(mechanism, outputs, outputs, kernel)]

        self.mechanism = mechanism
        self.down = nn.ModuleList(
            nn.ModuleList([*pair(inputs, outputs), Conv(outputs, outputs, 3, stride=2)
                           if outputs < widths[-1] else nn.Identity()])
            for inputs, outputs in zip([action_dim, *widths], widths))
        self.middle = nn.ModuleList(pair(widths[-1], widths[-1]))
        self.up = nn.ModuleList(
            nn.ModuleList([*pair(2 * inputs, outputs),
                           ConvTranspose(outputs, outputs, 4, stride=2, padding=1)])
            for inputs, outputs in zip(widths[:0:-1], widths[-2::-1]))
        self.output = nn.Sequential(
            Conv(widths[0], widths[0], kernel), GroupNorm(8, widths[0]),
            nn.Mish(), Conv(widths[0], action_dim, 1))

    def denoise(self, noisy_actions, modulations):
        hidden, skips, modulations = noisy_actions, [], iter(modulations)
        for first, second, halve in self.down:
            hidden = second(first(hidden, next(modulations)), next(modulations))
            skips.append(hidden)
            hidden = halve(hidden)
        for block in self.middle:
            hidden = block(hidden, next(modulations))
        for first, second, double in self.up:
            hidden = torch.cat([hidden, skips.pop()], dim=-1)
            hidden = double(second(first(hidden, next(modulations)), next(modulations)))
        return self.output(hidden)


class UNetBlock(nn.Module):
    """x -> shortcut(x) + mish(GN(conv(FiLM(mish(GN(conv(x))))))): FiLM between two convolutions."""

    def __init__(self, mechanism, inputs, outputs, kernel):
        super().__init__()
        self.mechanism = mechanism
        self.conv1 = Conv(inputs, outputs, kernel)
        self.conv2 = Conv(outputs, outputs, kernel)
        self.norm1 = GroupNorm(8, outputs, affine=not mechanism.adaptive)
        self.norm2 = GroupNorm(8, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else Conv(inputs, outputs, 1)

    def forward(self, x, modulation):
        place = self.mechanism
        hidden = place.features(
            F.mish(place.normalised(self.norm1(self.conv1(x)), modulation)), modulation)
        branch = F.mish(self.norm2(self.conv2(hidden)))
        return self.shortcut(x) + place.gated(branch, modulation)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm for (B,T,C). TRAP: without `contiguous` the gradient of mish takes 5 times as
    long, for its two factors lie in memory in different orders."""

    def forward(self, x):
        return super().forward(x.mT).mT.contiguous()


class ConvTranspose(nn.ConvTranspose1d):
    """nn.ConvTranspose1d for (B,T,C) -> (B,2T,C')."""

    def forward(self, x):
        return super().forward(x.mT).mT


class Conv(nn.Module):
    """nn.Conv1d for (B,T,C) -> (B,T / stride,C'), padded by half the kernel; T a multiple of stride.

    On a CPU one matrix product for each of the kernel's taps, see SumOfTaps.
    """

    def __init__(self, inputs, outputs, kernel, stride=1):
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel)     # for its initialisation
        self.taps = nn.ParameterList(tap.clone() for tap in conv.weight.detach().unbind(-1))
        self.bias, self.stride = conv.bias, stride

    def forward(self, x):
        if not x.is_cpu:
            weight = torch.stack([*self.taps], dim=-1)
            return F.conv1d(x.mT, weight, self.bias, self.stride, padding=len(self.taps) // 2).mT
        return SumOfTaps.apply(x, self.bias, self.stride, *self.taps)


class SumOfTaps(torch.autograd.Function):
    """out_t = bias + sum over taps k of tap_k x[stride t + k - kernel / 2]: conv1d, but faster.

    Skip it when you read this file for DP-C. One product of whole matrices for each tap, over the
    steps that it sees, leaves out the products with padding, 30 % of them at T = 4, where conv1d is
    slow besides, most of all for gradients. Plain autograd would not add them up in place.

    x (B,T,C), bias (C'), stride, then each tap (C',C) -> (B,T / stride,C').
    """

    @staticmethod
    def rows(x, out, taps):
        """Each tap (C',C) with the rows of x (S,T,B,C) that it sees and those of out (T,B,C') that
        they add to: views (n B,C) and (n B,C'). S is the stride: x[s] holds every S-th step."""
        S, T = x.shape[:2]
        for shift, tap in enumerate(taps, start=-(len(taps) // 2)):
            ahead, n = shift // S, max(T - abs(shift // S), 0)
            seen, to = x[shift % S, max(ahead, 0):][:n], out[max(-ahead, 0):][:n]
            yield tap, seen.flatten(0, 1), to.flatten(0, 1)

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)     # only under autocast
    def forward(ctx, x, bias, stride, *taps):
        x = x.unflatten(1, (-1, stride)).permute(2, 1, 0, 3).contiguous()
        ctx.save_for_backward(x, *taps)
        out = bias.repeat(*x.shape[1:3], 1)
        for tap, seen, to in SumOfTaps.rows(x, out, taps):
            to.addmm_(seen, tap.T)
        return out.transpose(0, 1).contiguous()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, *taps = ctx.saved_tensors
        grad, grad_x = grad.transpose(0, 1).contiguous(), torch.zeros_like(x)
        for tap, seen, to in SumOfTaps.rows(grad_x, grad, taps):
            seen.addmm_(to, tap)
        grad_x = grad_x.permute(2, 1, 0, 3).flatten(1, 2).contiguous()
        if not ctx.needs_input_grad[1]:     # frozen
            return grad_x, *[None] * (2 + len(taps))
        return (grad_x, grad.sum((0, 1)), None,
                *(to.T @ seen for _, seen, to in SumOfTaps.rows(x, grad, taps)))


# DP-T ---------------------------------------------------------------------------------------------

class Transformer(Backbone):
    """DP-T (cross-attention) and its modulated forms, DP-T-FiLM the first (paper section IV-C, E).

    Causal: an action sees itself and earlier ones. Modulations act on both branches of each layer,
    as in the second version of the paper; in the first, FiLM acted on the MLP branch alone. The
    official class keeps its cross-attention where nothing calls it (2.1M parameters): not here.
    Position embeddings belong to the backbone and are frozen with it; the official code loads and
    then trains them. Dropout also acts on the attention weights.
    """

    def __init__(self, action_dim, horizon, mechanism, width, hidden, heads, depth, dropout):
        super().__init__()
        self.mechanism = mechanism
        self.time_encoder = TimeEncoder(width, learned=not mechanism.tokens)
        self.modulation_widths = [] if mechanism.tokens else [width] * 2 * depth
        self.input = nn.Linear(action_dim, width)
        self.position = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(mechanism, width, hidden, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_dim)
        for module in self.modules():     # GPT-2's initialisation, as in the official code
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def denoise(self, noisy_actions, condition):
        T = noisy_actions.shape[1]
        hidden = self.input(noisy_actions) + self.position
        tokens, modulations, S = None, [None] * 2 * len(self.blocks), 0
        if not self.mechanism.tokens:
            modulations = condition
        elif self.mechanism.prepends:
            hidden, S = torch.cat([condition, hidden], dim=1), condition.shape[1]
        else:
            tokens = condition
        # Causal, but for the S tokens in front: they see each other, and every action sees them.
        mask = torch.ones(S + T, S + T, dtype=torch.bool, device=hidden.device).tril()
        mask[:S, :S] = True
        for block, *modulation in zip(self.blocks, modulations[0::2], modulations[1::2]):
            hidden = block(hidden, modulation, mask, tokens)
        return self.output(self.norm(hidden[:, S:]))


class TransformerBlock(nn.Module):
    """x -> x + FiLM(SelfAttention(LN x)), then x -> x + FiLM(MLP(LN x)): pre-norm.

    With cross-attention x -> x + CrossAttention(LN x, tokens) comes between the two.
    """

    def __init__(self, mechanism, width, hidden, heads, dropout):
        super().__init__()
        self.mechanism, self.dropout = mechanism, Dropout(dropout)
        self.norm1, self.norm2 = mechanism.norm(width), mechanism.norm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), Dropout(dropout),
                                 nn.Linear(hidden, width))
        if mechanism.tokens and not mechanism.prepends:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads, dropout)

    def forward(self, x, modulation, mask, tokens=None):
        place, (first, second) = self.mechanism, modulation
        hidden = place.normalised(self.norm1(x), first)
        branch = self.dropout(self.attention(hidden, hidden, mask))
        x = x + place.gated(place.features(branch, first), first)
        if tokens is not None:
            # Action t sees the timestep's token and observations 0..t: tokens 0..t+1.
            seen = torch.ones(x.shape[1], tokens.shape[1], dtype=torch.bool, device=x.device)
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), tokens, seen.tril(1)))
        hidden = place.normalised(self.norm2(x), second)
        branch = self.dropout(self.mlp(hidden))
        return x + place.gated(place.features(branch, second), second)


class Attention(nn.Module):
    """Each step of x (B,T,D) takes a mixture of the source's steps (B,S,D); mask (T,S): may see."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x, source, mask):
        key_value = self.key_value(source).chunk(2, dim=-1)
        query, key, value = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B,heads,T,D/h)
                             for h in (self.query(x), *key_value))
        mixed = F.scaled_dot_product_attention(query, key, value, mask,
                                               self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).flatten(2))


# Sizes --------------------------------------------------------------------------------------------

SIZES = {
    ("mlp", "paper"): (MLP, dict(width=256, hidden=1024, depth=8, dropout=0.1)),
    ("mlp", "laptop"): (MLP, dict(width=128, hidden=256, depth=4, dropout=0.0)),
    ("unet", "paper"): (UNet, dict(time_dim=128, widths=(512, 1024, 2048), kernel=5)),
    ("unet", "laptop"): (UNet, dict(time_dim=128, widths=(24, 48, 96), kernel=5)),
    ("transformer", "paper"): (Transformer, dict(width=256, hidden=1024, heads=4, depth=8,
                                                 dropout=0.3)),
    ("transformer", "laptop"): (Transformer, dict(width=96, hidden=192, heads=4, depth=4,
                                                  dropout=0.0)),
}


def make_backbone(name, scale="laptop", action_dim=2, horizon=16, conditioning="film",
                  width=None, depth=None):
    """A new backbone, randomly initialised, that takes its condition by the given mechanism.

    width, depth: other than the scale's, for DP-MLP and DP-T; the hidden layers grow in proportion.
    Raises ValueError for an unknown name or scale, a mechanism or size that this backbone cannot
    take, or a horizon that it cannot halve.
    """
    if (name, scale) not in SIZES:
        raise ValueError(f"no backbone {name!r} of scale {scale!r}; there are: "
                         + ", ".join(" ".join(key) for key in SIZES))
    backbone_class, size = SIZES[name, scale]
    if conditioning not in backbone_class.mechanisms:
        raise ValueError(f"backbone {name!r} cannot take conditioning {conditioning!r}; "
                         f"possible: {', '.join(backbone_class.mechanisms)}")
    if width or depth:
        if "depth" not in size:
            raise ValueError(f"backbone {name!r} has no width and depth to choose, mlp and "
                             "transformer have")
        width = width or size["width"]
        if width % (2 * size.get("heads", 1)):
            raise ValueError(f"width is {width}, but has to be a multiple of "
                             f"{2 * size.get('heads', 1)}")
        size = size | dict(width=width, hidden=width * size["hidden"] // size["width"],
                           depth=depth or size["depth"])
    backbone = backbone_class(action_dim, horizon, MECHANISMS[conditioning](), **size)
    backbone.config = dict(name=name, scale=scale, action_dim=action_dim, horizon=horizon,
                           conditioning=conditioning, width=width, depth=depth)
    return backbone


# The lesson ---------------------------------------------------------------------------------------

# Millions of parameters, backbone and conditioning, of the official modules that are ever called.
PAPER = {("unet", "film"): (244.06, 11.56), ("mlp", "film"): (4.78, 8.70),
         ("transformer", "film"): (6.85, 4.35), ("transformer", "additive"): (6.85, 2.18),
         ("transformer", "adaln"): (6.84, 4.35), ("transformer", "adarms"): (6.84, 4.35),
         ("transformer", "adaln-zero"): (6.84, 6.53), ("transformer", "prefix"): (6.32, 0.56),
         ("transformer", "cross-attention"): (8.43, 0.56)}


def lesson(out):
    """Print the parameters of every backbone with every mechanism, save out/heads.png.

    Scale paper: the paper's actions and observations, without its image encoders. Laptop: PushT.
    """
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, scale in zip(axes, ("paper", "laptop")):
        print(f"\nScale {scale}, millions of parameters. Normal training and stage 1 train all, "
              f"stage 2 freezes the backbone.\n{'':28}{'backbone':>10}{'condit.':>9}{'encoder':>9}"
              f" | {'normal':>8} | stage 2: {'trained':>8}{'frozen':>9} | paper: backbone, condit.")
        for name, conditioning in [(name, conditioning) for name in ("unet", "transformer", "mlp")
                                   for conditioning in SIZES[name, scale][0].mechanisms]:
            with torch.device("meta"):     # shapes without memory
                if scale == "paper":
                    horizon = 10 if name == "transformer" else 16
                    backbone = make_backbone(name, scale, 10, horizon, conditioning)
                    pathway = make_conditioning(backbone, "none", horizon=2, size=137)
                else:
                    backbone = make_backbone(name, scale, conditioning=conditioning)
                    pathway = make_conditioning(backbone, obs_steps=2, corners=[[0, 0]] * 8,
                                                goal=[0, 0, 0])
            frozen, trained, encoder = (sum(p.numel() for p in module.parameters()) / 1e6
                                        for module in (backbone, pathway, pathway.encoder))
            paper = PAPER.get((name, conditioning)) if scale == "paper" else None
            print(f"{name:12}{conditioning:16}{frozen:10.3f}{trained - encoder:9.3f}{encoder:9.3f}"
                  f" | {frozen + trained:8.3f} |          {trained:8.3f}{frozen:9.3f} |"
                  + (f" {paper[0]:14.2f}{paper[1]:9.2f}" if paper else ""))
            for millions, height, color in ((frozen, 0.8, "lightsteelblue"), (trained, 0.4, "C1")):
                axis.barh(f"{name}, {conditioning}", millions, height, color=color)
        axis.set(xscale="log", xlim=(0.1, 500), title=f"scale {scale}",
                 xlabel="millions of parameters. Stage 2 freezes blue, trains orange")
        axis.invert_yaxis()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "heads.png", dpi=110)
    print(f"\nPicture: {out / 'heads.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The table of parameters.")
    parser.add_argument("--out", type=Path, default=Path("runs/lessons"), help="picture folder")
    lesson(parser.parse_args().out)
