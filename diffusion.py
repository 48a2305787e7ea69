"""The noise process of a diffusion policy, its two samplers, and the policy that uses them.

Implements the settings of the decoupled action head paper (arXiv 2511.12101): 100 timesteps on
the squared-cosine schedule, noise (epsilon) prediction, clean actions clipped to [-1, 1], and
the fixed-small variance. Sources of the equations at the lines:
  Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239 (DDPM)
  Nichol & Dhariwal 2021, Improved DDPM, arXiv 2102.09672 (the schedule)
  Song et al. 2021, Denoising Diffusion Implicit Models, arXiv 2010.02502 (DDIM)
The numbers are those of the library `diffusers`, which the paper's code uses.

Run alone, `python diffusion.py` prints the schedule and what the samplers make of data whose
perfect denoiser is known in closed form, and saves a picture.
"""
import contextlib
import math
import os
import secrets
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def at_timestep(buffer, timestep):
    """buffer (num_timesteps,), timestep int or (B,) -> entries that broadcast over (B,T,A)."""
    return buffer[timestep][..., None, None]


class DDPM(nn.Module):
    """The noise process: `add_noise` goes forward, `step` (DDPM) and `ddim_step` go back.

    Timesteps count from 0 (almost clean) to num_timesteps - 1 (almost pure noise); Ho et al.
    write 1..T. No weights, only float32 buffers (num_timesteps,), which no policy file needs to
    hold, because num_timesteps gives them. Raises ValueError if num_timesteps < 1.
    """

    def __init__(self, num_timesteps=100):
        super().__init__()
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
        self.num_timesteps = num_timesteps
        # float64, then rounded once: a cumulative product of 1,000 float32 factors drifts.
        progress = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2  # Nichol & Dhariwal, Eq. (17)
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)    # f ends at 0, so the last would be 1
        alphas_cumprod = (1 - betas).cumprod(0)          # Ho, Eq. (4)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        buffers = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "signal_scale": alphas_cumprod.sqrt(),
            "noise_scale": (1 - alphas_cumprod).sqrt(),
            # The posterior q(previous | noisy, clean), Ho, Eq. (6)-(7): mean and deviation.
            "posterior_clean": previous.sqrt() * betas / (1 - alphas_cumprod),
            "posterior_noisy": (1 - betas).sqrt() * (1 - previous) / (1 - alphas_cumprod),
            "posterior_std": ((1 - previous) / (1 - alphas_cumprod) * betas).sqrt(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.float(), persistent=False)

    def add_noise(self, actions, noise, timesteps):
        """Ho, Eq. (4): from clean to the given timesteps in one jump, no loop.

        actions in [-1, 1] and noise (standard normal): (B,T,A); timesteps: (B,) long, one for
        each sample, or an int for all. Returns the noisy actions (B,T,A).
        """
        return (at_timestep(self.signal_scale, timesteps) * actions
                + at_timestep(self.noise_scale, timesteps) * noise)

    def predict_clean(self, predicted_noise, timestep, noisy_actions):
        """Ho, Eq. (15): `add_noise` solved for the clean actions (B,T,A), clipped to [-1, 1].

        Without the clip the samplers fall apart: at the last timestep signal_scale is 5e-4, so
        an error in the predicted noise is multiplied by 2,000.
        """
        signal = noisy_actions - at_timestep(self.noise_scale, timestep) * predicted_noise
        clean = signal / at_timestep(self.signal_scale, timestep)
        return clean.clamp(-1, 1)

    def step(self, predicted_noise, timestep, noisy_actions, noise):
        """One step back, timestep -> timestep - 1, drawing from the posterior (Ho, Alg. 2).

        predicted_noise, noisy_actions, noise (standard normal): (B,T,A); timestep: int or (B,)
        long. Returns the less noisy actions (B,T,A).
        """
        clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
        # TRAP: the last step (timestep 0) must add no noise. Here it needs no `if`: the fixed-small
        # posterior_std[0] is exactly 0; sqrt(betas), the other choice of Ho, section 3.2, is not.
        return (at_timestep(self.posterior_clean, timestep) * clean
                + at_timestep(self.posterior_noisy, timestep) * noisy_actions
                + at_timestep(self.posterior_std, timestep) * noise)

    def ddim_step(self, predicted_noise, timestep, previous_timestep, noisy_actions):
        """One deterministic step back, timestep -> previous_timestep (Song, Eq. (12), eta 0).

        predicted_noise, noisy_actions: (B,T,A); timestep, previous_timestep: int, where
        previous_timestep = -1 means clean. Returns the less noisy actions (B,T,A).
        """
        clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
        if previous_timestep < 0:
            return clean
        # As in diffusers, the noise is not re-derived from the clipped clean actions.
        return self.add_noise(clean, predicted_noise, previous_timestep)

    def timesteps(self, num_steps=None) -> range:
        """The timesteps that `sample` visits, in that order (descending, the last one is 0).

        None: all of them. Otherwise num_steps evenly spaced ones ("leading" spacing in diffusers):
        they end at 0 but do not start at the last timestep (100 timesteps, 10 steps: 90, 80, ...,
        0). So the first call gets pure noise, although at timestep 90 about 14 % of the signal
        should be left.

        Raises ValueError if num_steps is not in 1..num_timesteps.
        """
        num_steps = self.num_timesteps if num_steps is None else num_steps
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"num_steps must be in 1..{self.num_timesteps}, got {num_steps}")
        stride = self.num_timesteps // num_steps
        return range((num_steps - 1) * stride, -1, -stride)

    @torch.no_grad()
    def sample(self, denoiser, shape, num_steps=None, generator=None, temperature=1.0):
        """Draw clean actions of `shape` (B,T,A), starting from pure noise.

        denoiser(noisy_actions (B,T,A), timestep (B,) long) -> predicted noise (B,T,A).
        num_steps None: all timesteps with fresh noise in each (Ho, Alg. 2). An int: DDIM with
        that many steps, deterministic after the first draw. `generator` must live on the
        module's device. temperature: what the drawn noise is multiplied by; below 1, samples stay
        near the middle of what was learned. Raises ValueError as `timesteps` does.
        """
        device = self.betas.device
        timesteps = self.timesteps(num_steps)
        actions = temperature * torch.randn(shape, generator=generator, device=device)
        for timestep, previous in zip(timesteps, [*timesteps[1:], -1]):
            predicted = denoiser(actions, torch.full(shape[:1], timestep, device=device))
            if num_steps is None:
                noise = temperature * torch.randn(shape, generator=generator, device=device)
                actions = self.step(predicted, timestep, actions, noise)
            else:
                actions = self.ddim_step(predicted, timestep, previous, actions)
        return actions


class DiffusionPolicy(nn.Module):
    """A denoiser of action chunks, conditioned on observations, and how to act with it.

    It has exactly two trainable children, and the paper's claim is about this cut:
      conditioning   observation encoder Phi and modulation generators F (film.py): stage 2 trains
      backbone       the rest G and the timestep encoder f_tau (heads.py): stage 2 freezes

        observed            o-1  o0                          To = 2
        predicted           a-1  a0  a1 ... a7 ... a14       T  = 16
        executed                 a0  a1 ... a7               Ta = 8, starting at index To - 1

    Outside, actions are absolute targets of the agent in px. Inside, what is denoised is their
    displacement from the agent's present position, divided by a fixed scale for each horizon step.
    (The paper denoises absolute poses: `relative=False`. On PushT that learns far more slowly.)

    action_scale: T numbers, px, the displacement that becomes 1; larger ones are clipped.
    action_range: (low, high) px, the ends of the board, for each coordinate of an action.
    sampling_steps: DDIM steps of `act`, or None for the paper's full DDPM sampling.
    noise_samples: K, noise draws for each observation in `loss`, which is encoded only once.
    loss_steps: how many horizon steps of each noise draw count in `loss`, None for all T. A random
    part of them is allowed where the backbone does not mix time steps: its gradient is right on
    average.
    temperature: of the noise in `act`, see DDPM.sample; the paper's is 1.
    Raises ValueError for settings that do not fit each other.
    """
    FILE_FORMAT = 3

    def __init__(self, conditioning, backbone, action_scale, action_range, obs_steps=2,
                 executed_actions=8, sampling_steps=10, relative=True, noise_samples=1,
                 loss_steps=None, temperature=1.0):
        super().__init__()
        action_scale = list(map(float, action_scale))     # a file must not hold arrays
        self.config = dict(action_scale=action_scale, action_range=list(map(float, action_range)),
                           obs_steps=obs_steps, executed_actions=executed_actions,
                           sampling_steps=sampling_steps, relative=relative,
                           noise_samples=noise_samples, loss_steps=loss_steps,
                           temperature=temperature)
        horizon = len(action_scale)
        if not 1 <= executed_actions <= horizon - obs_steps + 1:
            raise ValueError(f"executed_actions must be in 1..{horizon - obs_steps + 1} (horizon "
                             f"{horizon}, {obs_steps} observed), got {executed_actions}")
        if loss_steps is not None and backbone.mixes_time:
            raise ValueError(f"loss_steps={loss_steps} needs a backbone that does not mix time "
                             f"steps; {type(backbone).__name__} does: leave it None")
        self.conditioning, self.backbone = conditioning, backbone
        self.ddpm = DDPM()
        self.obs_steps, self.executed_actions = obs_steps, executed_actions
        self.sampling_steps, self.relative = sampling_steps, relative
        self.noise_samples, self.loss_steps = noise_samples, loss_steps
        self.temperature = temperature
        self.low, self.high = action_range
        self.register_buffer("action_scale", torch.tensor(action_scale)[:, None])

    def normalise(self, actions, agent):
        """Actions (B,T,A) and the agent's position (B,A), px -> what is denoised, in [-1, 1]."""
        if self.relative:
            return ((actions - agent[:, None]) / self.action_scale).clamp(-1, 1)
        return 2 * (actions - self.low) / (self.high - self.low) - 1

    def denormalise(self, actions, agent):
        """The inverse of `normalise`."""
        if self.relative:
            return actions * self.action_scale + agent[:, None]
        return self.low + (actions + 1) / 2 * (self.high - self.low)

    def predict_noise(self, noisy_actions, timestep, o, steps=None):
        """The whole network: noisy_actions (B,T,A), timestep (B,), encoded observation o -> noise.

        Paper eq. 10: Phi has made o. The three lines below are f_tau, F and G. Stage 2 trains Phi
        and the middle line, F; the first and the last line are frozen.
        steps: see `choose_steps`; None for all T.
        """
        tau = self.backbone.time_encoder(timestep)
        modulations = self.conditioning(o, tau)
        return self.backbone(noisy_actions, modulations, steps)

    def loss(self, observations, actions, agent=None):
        """The noise-prediction error, a scalar (Ho, Eq. (14); decoupled action head, eq. 9).

        observations: what the encoder takes, such as states (B,To,5); actions (B,T,A) px;
        agent (B,A) px, by default the agent's position in the last observation.
        """
        encoder = self.conditioning.encoder
        if agent is None:
            agent = encoder.agent_position(observations)
        clean = self.normalise(actions, agent).repeat_interleave(self.noise_samples, dim=0)
        perceived = encoder.perceive(observations)
        o = self.conditioning.encode(perceived)

        timestep = torch.randint(self.ddpm.num_timesteps, clean.shape[:1], device=clean.device)
        noise = torch.randn_like(clean)
        clean, noise, steps = self.choose_steps(clean, noise)
        noisy_actions = self.ddpm.add_noise(clean, noise, timestep)
        predicted_noise = self.predict_noise(noisy_actions, timestep, o, steps)
        # The paper has the first term alone; the second is 0 but for a policy from pixels.
        return F.mse_loss(predicted_noise, noise) + encoder.auxiliary_loss(perceived)

    def choose_steps(self, clean, noise):
        """`loss_steps` random ones of the T steps of each chunk: clean, noise (B,S,A), steps (B,S).

        A speed-up for DP-MLP, which denoises each step alone: 4 of 16 steps are a quarter of the
        work. With loss_steps None, everything stays as it is, and steps is None.
        """
        if self.loss_steps is None:
            return clean, noise, None
        B, T, A = clean.shape
        steps = torch.rand(B, T, device=clean.device).topk(self.loss_steps).indices
        index = steps[..., None].expand(-1, -1, A)
        return clean.gather(1, index), noise.gather(1, index), steps

    def sample(self, observations, generator=None):
        """Draw normalised chunks (B,T,A) for observations (B, ...), encoded only once."""
        perceived = self.conditioning.encoder.perceive(observations)
        o = self.conditioning.encode(perceived)
        shape = (len(o), len(self.action_scale), self.backbone.config["action_dim"])

        def denoiser(noisy_actions, timestep):
            return self.predict_noise(noisy_actions, timestep, o)

        return self.ddpm.sample(denoiser, shape, self.sampling_steps, generator, self.temperature)

    @torch.no_grad()
    def act(self, observations, generator=None):
        """The next actions: observations, such as (B,To,5) -> agent targets (B,Ta,2) in px.

        Takes tensors or arrays. Raises ValueError for another shape or numbers that are not
        finite, FloatingPointError for actions that are none.
        """
        observations = self.conditioning.encoder.read(observations, self.action_scale.device)
        agent = self.conditioning.encoder.agent_position(observations)
        actions = self.denormalise(self.sample(observations, generator), agent)
        first = self.first_executed()
        executed = actions[:, first:first + self.executed_actions]
        if executed.isnan().any():
            raise FloatingPointError("the policy's actions are NaN; try a lower learning rate")
        return executed.clamp(self.low, self.high)

    def first_executed(self):
        """The index in a chunk of the action for the present step: earlier ones are past."""
        return self.obs_steps - 1

    def save(self, path):
        """Write weights and configuration, all that is needed to act, to one file: see `whole`."""
        saved = {"format": self.FILE_FORMAT, "policy": self.config,
                 "backbone": self.backbone.config,
                 "conditioning": self.conditioning.encoder.config, "weights": self.state_dict()}
        with whole(Path(path)) as unfinished:
            torch.save(saved, unfinished)

    @classmethod
    def load(cls, path, device="cpu"):
        """A policy from the file of `save`, in evaluation mode.

        Raises ValueError, in one line, for a file that is missing, damaged or of another format.
        """
        from film import make_conditioning     # only the loader needs to know which networks
        from heads import BACKBONES            # there are
        saved = load_file(path, "policy", device)
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        if found != cls.FILE_FORMAT:
            raise ValueError(f"{path} has policy format {found}, this code reads {cls.FILE_FORMAT}")
        try:
            size = dict(saved["backbone"])
            with torch.random.fork_rng(devices=[]):     # loading must not change what is drawn next
                backbone = BACKBONES[size.pop("name")](**size)
                conditioning = make_conditioning(backbone, **saved["conditioning"])
            policy = cls(conditioning, backbone, **saved["policy"]).to(device)
            policy.load_state_dict(saved["weights"])
        except Exception as error:     # anything can be wrong in a file
            raise ValueError(f"{path} does not fit this code ({error!r:.80})") from None
        return policy.eval()


# Files -----------------------------------------------------------------------------------------

@contextlib.contextmanager
def whole(path):
    """The name under which to write a file: it appears as `path` only when it is complete."""
    unfinished = path.with_name(f"unfinished-{secrets.token_hex(4)}-{path.name}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())     # a power cut must not leave an empty file of this name
        unfinished.replace(path)
    except RuntimeError as error:     # so torch.save says that the disk is full
        raise OSError(f"{path} cannot be written: {error!r:.80}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def load_file(path, kind, device="cpu"):
    """What torch.save wrote to the `kind` file at `path`; runs no code from it (weights_only).

    ValueError, in one line, if there is none or it is damaged: zipfile tells, torch may not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile("wrong checksum")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no {kind} file at {path}") from None
    except Exception as error:     # both raise many kinds for a damaged file
        raise ValueError(f"{path} is not a readable {kind} file (damaged, or another: "
                         f"{error!r:.80}); take a copy, or make it anew") from None


# The lesson ------------------------------------------------------------------------------------

def closed_form_denoiser(ddpm, means, std):
    """What a perfect network would learn from data drawn from K equally likely Gaussians.

    means (K,T,A), one `std` for all -> denoiser(noisy_actions, timestep) as `sample` needs it.
    """
    def denoiser(noisy_actions, timestep):
        signal = at_timestep(ddpm.signal_scale, timestep)[..., None]             # (B,1,1,1)
        noise = at_timestep(ddpm.noise_scale, timestep)[..., None]
        variance = signal ** 2 * std ** 2 + noise ** 2
        residual = noisy_actions[:, None] - signal * means                       # (B,K,T,A)
        distance = (residual ** 2).sum((2, 3), keepdim=True)
        which = (-distance / (2 * variance)).softmax(1)                          # Bayes, (B,K,1,1)
        return (which * residual * noise / variance).sum(1)
    return denoiser


def lesson(out):
    """Print the schedule and two demonstrations, save out/diffusion.png."""
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(0)
    ddpm, shown = DDPM(), [0, 10, 25, 45, 70, 99]
    print("1. The schedule: noisy_actions = signal * actions + noise * N(0, 1)\n"
          "   timestep    beta  alphas_cumprod  signal   noise")
    for t in shown:
        print(f"   {t:8d} {ddpm.betas[t]:7.4f} {ddpm.alphas_cumprod[t]:15.2e}"
              f" {ddpm.signal_scale[t]:7.4f} {ddpm.noise_scale[t]:7.4f}")

    print("2. Data N(0.1, 0.2^2), 160,000 samples with the perfect denoiser. Even a correct\n"
          "   sampler narrows the data, and more so in fewer steps:")
    for num_timesteps in (1000, 100, 10):
        process = DDPM(num_timesteps)
        denoiser = closed_form_denoiser(process, torch.full((1, 4, 2), 0.1), std=0.2)
        samples = process.sample(denoiser, (20_000, 4, 2), generator=generator)
        print(f"   {num_timesteps:4d} timesteps: standard deviation {samples.std():.4f}")

    # A smooth path (T=16, A=2) around an obstacle, and its mirror image: two equally good answers.
    angle = torch.linspace(0, math.pi, 16)
    path = torch.stack([0.6 * angle.sin(), 0.8 * angle.cos()], dim=1)
    paths = torch.stack([path, path * torch.tensor([-1, 1])])                    # (K=2,T,A)
    denoiser, visited = closed_form_denoiser(ddpm, paths, std=0.02), {}

    def watched(noisy_actions, timestep):
        visited[int(timestep[0])] = noisy_actions
        return denoiser(noisy_actions, timestep)

    samples = ddpm.sample(watched, (400, 16, 2), generator=generator)
    right = samples[..., 0].mean(1) > 0
    distance = (samples[:, None] - paths).norm(dim=-1).mean(-1).min(1).values
    print(f"3. Two ways around an obstacle, 400 samples: {right.sum()} on the right, none in\n"
          f"   between: at most {distance.max():.3f} from the nearer way")

    figure, axes = plt.subplots(2, len(shown), figsize=(14, 5.4), sharex=True, sharey=True,
                                layout="constrained")
    figure.suptitle("Upper row, left to right: add_noise drowns two paths in noise. Lower row, "
                    "right to left: sample draws six paths out of noise,\neach of which takes one "
                    "of the two ways around the obstacle (axes: normalised positions)")
    noise = torch.randn(2, 16, 2, generator=generator)
    for t, (forward, back) in zip(shown, axes.T):
        noisy_actions = ddpm.add_noise(paths, noise, t)
        for way, color in enumerate(("C0", "C1")):
            label = ("the way on the right", "the way on the left")[way]
            forward.plot(*noisy_actions[way].T.numpy(), ".-", lw=0.5, color=color, label=label)
            taken = visited[t][:6][right[:6] == (way == 0)]
            back.plot(*taken.permute(2, 1, 0).numpy(), ".-", lw=0.5, color=color)
        for axis in (forward, back):
            axis.add_patch(plt.Circle((0, 0), 0.35, color="0.8", label="obstacle"))
        forward.set_title(f"timestep {t}")
    axes[0, 0].set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), ylabel="add_noise  →")
    axes[1, 0].set_ylabel("←  sample")
    axes[0, 0].legend(loc="lower left", fontsize="x-small")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "diffusion.png", dpi=110)
    print(f"Picture: {out / 'diffusion.png'}")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # needs no display
    lesson(Path("runs/lessons"))
