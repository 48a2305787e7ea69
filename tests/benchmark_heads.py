"""How fast the heads train and act: the sections step, freeze and sampling of tests/benchmark.py.

Everything is at the paper's size. The paper's code is no part of this repository:
the Reference classes below are equally sized modules written in its manner, from the libraries'
parts alone: nn.Conv1d, nn.MultiheadAttention, nn.Dropout, the condition concatenated and projected
anew in each block; AdamW tensor by tensor, and an EMA that runs over all tensors, frozen ones
copied. They compute the same functions as heads.py (tests/test_heads.py compares the numbers).
"""
import functools
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import film
import train
from diffusion import DDPM, DiffusionPolicy
from heads import BACKBONES, SIZES, make_backbone

ACTION_DIM, OBSERVATION = 10, (2, 137)      # MimicGen: To = 2 observations of 137 numbers
HEADS = {"DP-C": ("unet", "film", 16), "DP-MLP": ("mlp", "film", 16),
         "DP-T": ("transformer", "cross-attention", 10),
         "DP-T-FiLM": ("transformer", "film", 10)}     # name: backbone, mechanism, horizon
BF16 = torch.cuda.is_available() or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
CLOCK = time.perf_counter
NO_BF16 = "bf16: not measured, this machine has no units for it\n"


# The official manner ------------------------------------------------------------------------------

class ReferenceTime(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.rates = torch.tensor([10_000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)])
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def sinusoid(self, timestep):
        angles = timestep.float().unsqueeze(1) * self.rates.unsqueeze(0)
        return torch.cat((angles.sin(), angles.cos()), 1)

    def forward(self, timestep):
        return self.mlp(self.sinusoid(timestep))


def reference_projection(condition_dim, width):
    return nn.Sequential(nn.Mish(), nn.Linear(condition_dim, 2 * width))


class ReferenceMLP(nn.Module):
    def __init__(self, action_dim, horizon, condition_dim, width, hidden, depth, dropout):
        super().__init__()
        self.time = ReferenceTime(width)
        self.weight = nn.Parameter(torch.randn(horizon, action_dim, width))
        self.bias = nn.Parameter(torch.randn(horizon, width))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            up=nn.Linear(width, hidden), down=nn.Linear(hidden, width), norm=nn.LayerNorm(width)))
            for _ in range(depth))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, action_dim)
        self.dropout, self.gelu = nn.Dropout(dropout), nn.GELU()
        self.film = nn.ModuleList(reference_projection(width + condition_dim, hidden)
                                  for _ in range(depth))

    def forward(self, noisy_actions, timestep, observations):
        c = torch.cat([self.time(timestep), observations.flatten(1)], -1)
        x = torch.einsum("bta,tad->btd", noisy_actions, self.weight) + self.bias
        for block, projection in zip(self.blocks, self.film):
            gamma, beta = projection(c).unsqueeze(1).chunk(2, -1)
            h = self.dropout(self.gelu(block["up"](x)))
            h = h * gamma + beta
            x = block["norm"](x + self.dropout(block["down"](h)))
        return self.output(self.norm(x))


class ReferenceUNet(nn.Module):
    def __init__(self, action_dim, horizon, condition_dim, time_dim, widths, kernel):
        super().__init__()
        self.time = ReferenceTime(time_dim)
        blocks, condition_dim = [], condition_dim + time_dim
        self.film = nn.ModuleList()

        def conv_block(a, b):
            return nn.Sequential(nn.Conv1d(a, b, kernel, padding=kernel // 2),
                                 nn.GroupNorm(8, b), nn.Mish())

        def block(a, b):
            self.film.append(reference_projection(condition_dim, b))
            return nn.ModuleList([conv_block(a, b), conv_block(b, b),
                                  nn.Conv1d(a, b, 1) if a != b else nn.Identity()])

        a, b, c = widths
        blocks += [block(action_dim, a), block(a, a), nn.Conv1d(a, a, 3, 2, 1)]
        blocks += [block(a, b), block(b, b), nn.Conv1d(b, b, 3, 2, 1)]
        blocks += [block(b, c), block(c, c)]
        blocks += [block(c, c), block(c, c)]
        blocks += [block(2 * c, b), block(b, b), nn.ConvTranspose1d(b, b, 4, 2, 1)]
        blocks += [block(2 * b, a), block(a, a), nn.ConvTranspose1d(a, a, 4, 2, 1)]
        self.blocks = nn.ModuleList(blocks)
        self.output = nn.Sequential(conv_block(a, a), nn.Conv1d(a, action_dim, 1))

    def forward(self, noisy_actions, timestep, observations):
        c = torch.cat([self.time(timestep), observations.flatten(1)], -1)
        x, skips, films = noisy_actions.transpose(1, 2), [], iter(self.film)
        for i, block in enumerate(self.blocks):
            if not isinstance(block, nn.ModuleList):     # halves or doubles the horizon
                x = block(x)
                continue
            if i in (10, 13):                            # the first block of an upward level
                x = torch.cat([x, skips.pop()], 1)
            gamma, beta = next(films)(c).unsqueeze(2).chunk(2, 1)
            first, second, shortcut = block
            x = second(gamma * first(x) + beta) + shortcut(x)
            if i in (1, 4, 7):                           # the last block of a downward level
                skips.append(x)
        return self.output(x).transpose(1, 2)


class ReferenceTransformer(nn.Module):
    """FiLM on both branches, or cross-attention: then the layers are nn.TransformerDecoderLayer."""

    def __init__(self, action_dim, horizon, condition_dim, width, hidden, heads, depth, dropout,
                 cross_attention):
        super().__init__()
        self.input, self.position = nn.Linear(action_dim, width), \
            nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(
            width, heads, hidden, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, action_dim)
        self.time, self.cross_attention = ReferenceTime(width), cross_attention
        if cross_attention:
            self.time.mlp = nn.Identity()
            self.embed = nn.Linear(condition_dim // 2, width)
            self.token_position = nn.Parameter(torch.randn(3, width) * 0.02)
            self.token_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(),
                                           nn.Linear(4 * width, width))
        else:
            for layer in self.layers:
                del layer.multihead_attn, layer.norm2
            self.film = nn.ModuleList(reference_projection(width + condition_dim, width)
                                      for _ in range(2 * depth))

    def forward(self, noisy_actions, timestep, observations):
        x, T = self.input(noisy_actions) + self.position, noisy_actions.shape[1]
        later = torch.full((T, T), -math.inf, device=x.device).triu(1)
        if self.cross_attention:
            tokens = torch.cat([self.time(timestep).unsqueeze(1), self.embed(observations)], 1)
            tokens = self.token_mlp(tokens + self.token_position)
            s = torch.arange(tokens.shape[1], device=x.device)
            unseen = s - 1 > torch.arange(T, device=x.device).unsqueeze(1)
            unseen = torch.zeros(unseen.shape, device=x.device).masked_fill(unseen, -math.inf)
            for layer in self.layers:
                x = layer(x, tokens, tgt_mask=later, memory_mask=unseen)
            return self.output(self.norm(x))
        c = torch.cat([self.time(timestep), observations.flatten(1)], -1)
        for i, layer in enumerate(self.layers):
            gamma, beta = self.film[2 * i](c).unsqueeze(1).chunk(2, -1)
            x = x + (gamma * layer._sa_block(layer.norm1(x), later, None) + beta)
            gamma, beta = self.film[2 * i + 1](c).unsqueeze(1).chunk(2, -1)
            x = x + (gamma * layer._ff_block(layer.norm3(x)) + beta)
        return self.output(self.norm(x))


def make_reference(head, **size):
    """The official-manner module of a head; `size` overrides the paper's."""
    name, conditioning, horizon = HEADS[head]
    size = {**SIZES["paper"][name], **size}
    kind = {"unet": ReferenceUNet, "mlp": ReferenceMLP, "transformer": ReferenceTransformer}[name]
    if name == "transformer":
        size["cross_attention"] = conditioning == "cross-attention"
    return kind(ACTION_DIM, horizon, math.prod(OBSERVATION), **size)


# One training step each way -----------------------------------------------------------------------

class Given(nn.Module):
    """An encoder that hands on the observation: the heads alone are measured."""
    steps, size = OBSERVATION

    def forward(self, observations):
        return observations


class Head(nn.Module):
    """Backbone and conditioning of this repository, called like a reference module.

    `size` overrides the paper's.
    """

    def __init__(self, head, **size):
        super().__init__()
        name, conditioning, horizon = HEADS[head]
        size = {**SIZES["paper"][name], **size}
        self.backbone = BACKBONES[name](ACTION_DIM, horizon, conditioning, **size)
        time_dim, mechanism = self.backbone.time_encoder.dim, self.backbone.mechanism
        self.conditioning = (
            film.TokenConditioning(Given(), time_dim) if mechanism.tokens else
            film.Conditioning(Given(), time_dim, self.backbone.modulation_widths, mechanism))

    def forward(self, noisy_actions, timestep, observations, steps=None):
        o = self.conditioning.encode(observations)
        tau = self.backbone.time_encoder(timestep)
        return self.backbone(noisy_actions, self.conditioning(o, tau), steps)


def batch_of(head, batch):
    horizon = HEADS[head][2]
    return (torch.randn(batch, horizon, ACTION_DIM), torch.randint(100, (batch,)),
            torch.randn(batch, *OBSERVATION), torch.randn(batch, horizon, ACTION_DIM))


def our_step(head, frozen, bf16=False, subset=None):
    """A function that does one training step as train.py does it."""
    model = Head(head)
    model.backbone.requires_grad_(not frozen)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    average = AveragedModel(model, multi_avg_fn=functools.partial(train.ema_update, 0.9999))

    def step(noisy, timestep, observations, noise):
        steps = None
        if subset:
            steps = torch.rand(noisy.shape[:2]).topk(subset).indices
            index = steps[..., None].expand(-1, -1, ACTION_DIM)
            noisy, noise = noisy.gather(1, index), noise.gather(1, index)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(model(noisy, timestep, observations, steps), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, math.inf)
        optimizer.step()
        average.update_parameters(model)
    return step


def reference_step(head, frozen):
    """One training step in the official manner, in fp32 as there."""
    model = make_reference(head)
    if frozen:     # all but what makes conditions
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in
                                     ("film", "embed", "token_position", "token_mlp"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5,
                                  foreach=False, fused=False)
    averages = [p.detach().clone() for p in model.parameters()]

    def step(noisy, timestep, observations, noise):
        loss = F.mse_loss(model(noisy, timestep, observations), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(averages, model.parameters()):
                if parameter.requires_grad:
                    average.mul_(0.999).add_(parameter, alpha=0.001)
                else:
                    average.copy_(parameter)
    return step


def interleaved(steps, arguments, repeats, warmup=1):
    """Median seconds of each function in `steps` (a dict), called in turn."""
    seconds = {name: [] for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            start = CLOCK()
            step(*arguments)
            seconds[name].append(CLOCK() - start)
    return {name: statistics.median(values[warmup:]) for name, values in seconds.items()}


def benchmark_step(heads, threads, repeats, batch=64):
    """Seconds of one training step, ours over the official manner's."""
    print(f"A training step: forward, backward, AdamW, EMA; batch {batch}, paper's size. Seconds, "
          "and the\nratio ours / official manner (fp32, all horizon steps)")
    print("" if BF16 else NO_BF16, end="")
    for head in heads:
        for frozen in (False, True):
            steps = {"official manner": reference_step(head, frozen),
                     "fp32": our_step(head, frozen)}
            if head == "DP-MLP":
                steps["fp32, 4 of 16 steps"] = our_step(head, frozen, subset=4)
            if BF16:
                steps["bf16"] = our_step(head, frozen, bf16=True)
            if BF16 and head == "DP-MLP":
                steps["bf16, 4 of 16 steps"] = our_step(head, frozen, bf16=True, subset=4)
            for count in threads:
                torch.set_num_threads(count)
                few = 3 if head == "DP-C" else repeats
                seconds = interleaved(steps, batch_of(head, batch), few)
                base = seconds["official manner"]
                print(f"{head:10} {'decoupled' if frozen else 'normal':9} {count} thread(s): " +
                      ", ".join(f"{name} {s:.3f} s" + (f" ({s / base:.2f})" if s != base else "")
                                for name, s in seconds.items()), flush=True)
            del steps


def benchmark_freeze(heads, threads, repeats, batch=64):
    """What freezing the backbone buys, in one run."""
    paper = {"DP-C": "+41 %", "DP-MLP": "+3 to 8 %", "DP-T": "+7 to 10 %",
             "DP-T-FiLM": "+7 to 10 %"}
    print(f"Freezing: training steps a second; batch {batch}, paper's size, heads alone (no image "
          "encoder).\nThe ideal counts multiplications: normal / decoupled. The paper's +83.9 % "
          "and +89.1 % are another\ncomparison: DP-MLP (normal, decoupled) with DP-C in normal "
          "training, RTX 4090, with encoders.")
    rates = {}
    for head in heads:
        operations = {}
        for frozen in (False, True):
            model = Head(head).to("meta")
            model.backbone.requires_grad_(not frozen)
            noisy, timestep, observations, _ = (a.to("meta") for a in batch_of(head, batch))
            with FlopCounterMode(display=False) as counter:
                model(noisy, timestep, observations).sum().backward()
            operations[frozen] = counter.get_total_flops()
        ideal = operations[False] / operations[True]
        steps = {frozen: our_step(head, frozen) for frozen in (False, True)}
        for count in threads:
            torch.set_num_threads(count)
            seconds = interleaved(steps, batch_of(head, batch), 2 if head == "DP-C" else repeats)
            rates[head, count] = [1 / s for s in seconds.values()]
            gain = seconds[False] / seconds[True]
            print(f"{head:10} {count} thread(s): normal {1 / seconds[False]:.3f}, decoupled "
                  f"{1 / seconds[True]:.3f} steps/s: {100 * (gain - 1):+.0f} % steps/s, "
                  f"{100 * (1 - 1 / gain):.0f} % less time; ideal {100 * (ideal - 1):+.0f} % and "
                  f"{100 * (1 - 1 / ideal):.0f} %; paper {paper[head]} steps/s", flush=True)
        del steps
    for count in threads:
        if ("DP-C", count) in rates and ("DP-MLP", count) in rates:
            base = rates["DP-C", count][0]
            print(f"DP-MLP over DP-C normal, {count} thread(s): normal "
                  f"{rates['DP-MLP', count][0] / base:.1f} times, decoupled "
                  f"{rates['DP-MLP', count][1] / base:.1f} times the steps/s")


# Sampling -----------------------------------------------------------------------------------------

CORNERS = [(-60, 0), (60, 0), (60, 30), (-60, 30), (-15, 30), (15, 30), (15, 120), (-15, 120)]


def make_policy(head, sampling_steps):
    """A policy of the paper's size for PushT; untrained, which is as fast."""
    name, conditioning, horizon = HEADS[head]
    backbone = make_backbone(name, "paper", 2, horizon, conditioning)
    pathway = film.make_conditioning(backbone, "state", obs_steps=2, corners=CORNERS,
                                     goal=(256, 256, math.pi / 4))
    return DiffusionPolicy(pathway, backbone, [100.0] * horizon, (0.0, 512.0),
                           sampling_steps=sampling_steps).eval()


def reference_scheduler(sampling_steps):
    """diffusers' scheduler with the paper's settings, None if diffusers is not installed."""
    try:
        from diffusers import DDIMScheduler, DDPMScheduler
    except ImportError:
        return None
    shared = dict(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True,
                  prediction_type="epsilon")
    scheduler = DDIMScheduler(set_alpha_to_one=True, **shared) if sampling_steps else \
        DDPMScheduler(variance_type="fixed_small", **shared)
    scheduler.set_timesteps(sampling_steps or 100)
    return scheduler


@torch.no_grad()
def reference_act(policy, observations, generator):
    """policy.act in the official manner: the encoder runs once, then the library's scheduler
    drives the rest of the network.
    """
    scheduler = reference_scheduler(policy.sampling_steps)
    shape = (len(observations), len(policy.action_scale), 2)
    o = policy.conditioning.encode(observations)

    def network(noisy, timestep):
        tau = policy.backbone.time_encoder(timestep.reshape(-1)[:1].expand(len(observations)))
        return policy.backbone(noisy, policy.conditioning(o, tau))

    if scheduler is None:
        actions = DDPM().sample(network, shape, policy.sampling_steps, generator)
    else:
        actions = torch.randn(shape, generator=generator)
        for timestep in scheduler.timesteps:
            noise = network(actions, timestep)
            actions = scheduler.step(noise, timestep, actions, generator=generator).prev_sample
    first, agent = policy.obs_steps - 1, observations[:, -1, :2]
    actions = policy.denormalise(actions, agent)[:, first:first + policy.executed_actions]
    return actions.clamp(0, 512)


def benchmark_sampling(heads, threads, repeats):
    """Milliseconds from observations to a chunk of actions."""
    torch.set_num_threads(threads[0])
    other = "diffusers" if reference_scheduler(10) else "(no diffusers here: our scheduler)"
    print(f"One chunk of actions, milliseconds, {threads[0]} thread(s), paper's size, fp32. Beside "
          f"it: {other} driving\nthe same network; the actions' largest difference, both in "
          "[-1, 1]")
    for head in heads:
        for sampling_steps in (None, 10):
            policy = make_policy(head, sampling_steps)
            for batch in (1, 64):
                if head == "DP-C" and batch == 64 and sampling_steps is None:
                    continue     # minutes; ten steps of it are in the DDIM line
                observations = torch.rand(batch, 2, 5) * 400
                ours, theirs = (lambda: policy.act(observations, torch.Generator().manual_seed(0)),
                                lambda: reference_act(policy, observations,
                                                      torch.Generator().manual_seed(0)))
                difference = (ours() - theirs()).abs().max() / 100     # px over the action scale
                few = 1 if head == "DP-C" else repeats
                seconds = interleaved(dict(ours=ours, theirs=theirs), (), few, warmup=0)
                print(f"{head:10} {'DDIM 10' if sampling_steps else 'DDPM 100'}, batch {batch:2}: "
                      f"{1e3 * seconds['ours']:8.1f} against {1e3 * seconds['theirs']:8.1f}, "
                      f"{seconds['theirs'] / seconds['ours']:.2f} times faster, difference "
                      f"{difference:.0e}", flush=True)


BENCHMARKS = {"step": benchmark_step, "freeze": benchmark_freeze, "sampling": benchmark_sampling}
