"""The two recipes, end to end: demonstrations, training, evaluation on unseen scenes, pictures.

    python train.py --backbone mlp --decoupled      stage 1, freeze, stage 2 (the paper's recipe)
    python train.py --backbone mlp                  normal: everything learns from demonstrations
    python train.py --help                          all that can be varied

The recipe is `train_policy`, the training loop is `fit`: read these two first, the rest is
plumbing. Paper: section IV-B, eq. 9 and 10 (arXiv 2511.12101v1).
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(f"train.py needs Python 3.10 or newer; this is {sys.version.split()[0]}")
# How long a CPU thread spins before it sleeps. With GNU OpenMP's default, two threads stall each
# other on a busy machine; with OMP_WAIT_POLICY=PASSIVE, which never spins, they are hardly
# faster than one. It must be set before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import sim_pusht
from diffusion import DiffusionPolicy, load_file, whole
from film import MECHANISMS, make_conditioning
from heads import BACKBONES, count, make_backbone
from kinematics import MOTIONS, PlanarArm

HORIZON, OBS_STEPS, ACTION_DIM = 16, 2, 2      # T, To, A: the paper's, but for A = 10
EVALUATION_SEED = 100_000                      # scenes from this seed on are in no demonstration
# The displacement from the agent, in px, that counts as 1 at each horizon step: how far a target
# runs ahead of the agent, plus the way that the agent makes in the meantime.
ACTION_SCALE = [30 + 12 * step for step in range(HORIZON)]
# PushT's agent trails its target by damping / stiffness = 0.2 s, two control steps. Stage 1 gives
# the arm's path the same lead over the present position.
LEAD = 2
FORMAT = {"format": DiffusionPolicy.FILE_FORMAT}     # of config.json and action_head.pt

# `paper` is the paper's configuration; `laptop` trains a small network fast: a high
# learning rate, two noise draws for each encoded observation, a random 4 of the 16 horizon steps.
# (Where time steps mix, all 16 and one draw: still twice the work.) At such rates training is on
# the edge: hence the clipped gradients and the small betas[1]. Demonstrations of a file are few,
# and people disagree: mirror images double them, and the policy acts at a lower temperature.
# Pictures are dear: fewer observations, more draws. Of the keys that fit a run the last is taken.
SETTINGS = {
    "laptop": dict(
        batch_size={"full": 128, "demos": 256, "pixels": 64},
        noise_samples={"full": 2, "pixels": 4}, loss_steps=4, sampling_steps=10,
        mirror={"full": False, "demos": True}, temperature={"full": 1.0, "demos": 0.5},
        learning_rate=4e-3, warmup=100, betas=(0.9, 0.98), clip_norm=0.2, ema_decay=0.995,
        stage1_steps=2500, steps={"full": 18000, "near": 8000, "demos": 12000, "pixels": 20000,
                                  "near pixels": 9000},
        num_demos={"full": 2000, "near": 1500}, episodes=200,
        log_every=100, checkpoint_every=500, play_every=3000,     # multiples of log_every
        time={"full": "8 minutes on 2 cores in bf16, 10 in fp32, for DP-MLP; the others: twice",
              "near": "4 minutes on 2 cores in bf16, 5 in fp32, for DP-MLP; the others: twice",
              "pixels": "16 minutes on 2 cores in bf16, 21 in fp32, for DP-MLP; task near: half"}),
    "paper": dict(
        batch_size=64, noise_samples=1, loss_steps=None, sampling_steps=None,
        mirror=False, temperature=1.0,
        learning_rate=1e-4, warmup=500, betas=(0.95, 0.999), clip_norm=math.inf, ema_decay=0.9999,
        stage1_steps=45000, steps=83000,
        num_demos={"full": 2000, "near": 1500}, episodes=200,
        log_every=100, checkpoint_every=2000, play_every=10000,
        time="hours on a GPU"),
}
SMOKE = dict(batch_size=64, steps=150, stage1_steps=100, num_demos=40, episodes=16, log_every=25,
             checkpoint_every=50, play_every=50, time="a minute")


# The recipe --------------------------------------------------------------------------------------

def train_policy(config, run, demonstrations, device):
    """Normal and decoupled training, and their controls; returns the policy in evaluation mode."""
    backbone, stage1 = make_action_head(config), None
    pretrains = config.recipe in ("decoupled", "pretrained") and not config.action_head
    if pretrains and run.saved["stage"] <= "stage1":     # not past it
        # Stage 1: backbone and a conditioning on joint angles, on free kinematic data.
        stage1 = make_conditioning(backbone, config.pretrain_condition, horizon=HORIZON)
        policy = make_policy(stage1, backbone, config).to(device)
        fit("stage1", policy, policy, kinematic_batches(demonstrations, config, device), config, run)
        save_action_head(backbone, config, run.folder / "action_head.pt")

    # Stage 2, with a fresh conditioning on observations. Normal training is this alone.
    _, goal = sim_pusht.TASKS[config.task]
    settings = {"corner_weight": config.corner_weight} if config.observation == "pixels" else {}
    conditioning = make_conditioning(backbone, config.observation, **settings, obs_steps=OBS_STEPS,
                                     corners=sim_pusht.KEYPOINTS.tolist(), goal=goal.tolist())
    if config.keep_biases and stage1:
        # A control, as in the official code: the mean modulation stays, and of tokens the MLP.
        kept = "observation_part.bias", "embed.bias", "mlp."
        conditioning.load_state_dict({name: weight for name, weight in stage1.state_dict().items()
                                      if name.startswith(kept)}, strict=False)
    policy = make_policy(conditioning, backbone, config).to(device)
    trained = policy
    if config.recipe in ("decoupled", "random-frozen"):
        freeze(backbone)
        trained = policy.conditioning
    fit("stage2", policy, trained, demonstration_batches(demonstrations, config, device), config, run)
    return policy.eval()


def make_policy(conditioning, backbone, config):
    noise_samples, loss_steps = config.noise_samples, config.loss_steps
    if backbone.mixes_time:     # all 16 steps of a chunk are needed, and work enough
        noise_samples, loss_steps = 1, None
    return DiffusionPolicy(conditioning, backbone, ACTION_SCALE, (0.0, sim_pusht.BOARD), OBS_STEPS,
                           config.executed_actions, config.sampling_steps,
                           noise_samples=noise_samples, loss_steps=loss_steps,
                           temperature=config.temperature)


def make_action_head(config):
    """The backbone that the flags ask for, random or from the file of --action-head.

    Raises ValueError, in one line, for an impossible one, a bad file, or a file of another one.
    """
    backbone = make_backbone(config.backbone, config.scale, ACTION_DIM, HORIZON,
                             config.conditioning, config.width)
    path = config.action_head
    if path is None:
        return backbone
    saved, asked = load_file(path, "action head"), backbone.config | FORMAT
    try:
        holds = saved["action_head"]
        other = [f"{key} {holds.get(key)}, not {asked[key]}" for key in asked
                 if holds.get(key) != asked[key]]
        if not other:
            backbone.load_state_dict(saved["weights"], assign=True)
    except Exception as error:     # anything can be wrong in a file
        raise ValueError(f"{path} is no action_head.pt of this code ({error!r:.80})") from None
    if other:
        raise ValueError(f"{path} holds another action head than asked for: {'; '.join(other)}")
    return backbone


def save_action_head(backbone, config, path):
    """Write what stage 1 has made, and by which command, for runs of any task: --action-head."""
    with whole(path) as unfinished:
        torch.save(dict(action_head=backbone.config | FORMAT, weights=backbone.state_dict(),
                        command=config.command, commit=code_version()), unfinished)


def freeze(backbone):
    """Stage 2 trains no weight of the backbone, and all others: the cut is made by module.

    The official code freezes every tensor whose name and shape match one of stage 1, so equal
    sizes of two conditions would freeze FiLM as well.
    """
    backbone.requires_grad_(False)


def fit(stage, policy, trained, batches, config, run):
    """Train the module `trained` (the policy, or a part of it) to lower policy.loss.

    AdamW, warm-up then cosine to zero, and an exponential moving average (EMA) of the weights,
    which is what is left in `trained` at the end. next(batches): the arguments of policy.loss.
    `run` keeps log and checkpoints between the updates, and may end them (see Run.updates).
    """
    steps = config.stage1_steps if stage == "stage1" else config.steps
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.learning_rate,
                                  betas=config.betas, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.warmup, steps))
    # Frozen weights need no average: only the trained part is copied.
    average = AveragedModel(trained, multi_avg_fn=functools.partial(ema_update, config.ema_decay))
    policy.train()     # frozen or not: as in the paper, dropout stays on in a frozen backbone
    for _ in run.updates(stage, steps, policy, trained, average, optimizer, schedule):
        with torch.autocast(config.device, torch.bfloat16, config.precision == "bf16"):
            loss = policy.loss(*next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        average.update_parameters(trained)
        run.losses.append(loss.detach())
    trained.load_state_dict(average.module.state_dict())


def learning_rate_factor(step, warmup, steps):
    """The share of the highest learning rate in update `step`, which counts from 0."""
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def ema_decay(step, cap):
    """How much of the average is kept in update `step`: it grows, so that the start is forgotten.

    As in the official code (EMAModel with power 0.75), which copies twice before it averages.
    """
    return min(cap, 1 - (1 + step) ** -0.75)


@torch.no_grad()
def ema_update(cap, averages, weights, num_averaged):
    """For AveragedModel: average = decay * average + (1 - decay) * weight, in place."""
    decay = ema_decay(int(num_averaged) - 1, cap)
    for average, weight in zip(averages, weights):
        average.lerp_(weight, 1 - decay)


# The data ----------------------------------------------------------------------------------------

def kinematic_batches(demonstrations, config, device):
    """Stage 1: yields joint angles (B,T,N), end-effector positions (B,T,A), present position (B,A).

    Angles and positions are of the same instants, as in the paper: what the denoiser learns is
    forward kinematics. Each window is new, made on the device and never stored. The present lies
    one frame before the first angles, so 1.8 px (RMS) of the target cannot be known.
    --pretrain-condition takes the positions themselves or nothing instead of the angles (section
    IV-D of v2), --pretrain-data another motion, or the agent's own in the demonstrations.
    """
    own_motion = config.pretrain_data == "demonstrations"
    arm = PlanarArm(motion=MOTIONS["arm" if own_motion else config.pretrain_data])
    if own_motion:
        agents = torch.as_tensor(demonstrations["state"][:, :2], dtype=torch.float32, device=device)
        window = windows(demonstrations, 0, HORIZON + LEAD, device)
    while True:
        if own_motion:
            positions = agents[draw(window, config.batch_size)]
            angles = arm.inverse(positions)
        else:
            angles, positions = arm.sample_windows(config.batch_size, HORIZON + LEAD, device=device)
        condition = angles if config.pretrain_condition == "joints" else positions
        yield condition[:, LEAD:], positions[:, LEAD:], positions[:, OBS_STEPS - 1]


def demonstration_batches(demonstrations, config, device):
    """Stage 2: yields observations, actions (B,T,A), random windows of the demonstrations.

    Pictures are drawn anew for each batch, 0.15 ms each: all of them would take 6 GB.

    A window starts one step before the present. Steps that are repeated at an episode's edges
    count in the loss, as in the official code; that drops windows with more than 7 of them.
    """
    states, actions = (torch.as_tensor(demonstrations[name], dtype=torch.float32, device=device)
                       for name in ("state", "action"))
    window = windows(demonstrations, 1 - OBS_STEPS, HORIZON, device)
    while True:
        chosen = draw(window, config.batch_size)
        yield observations_of(states[chosen[:, :OBS_STEPS]], config), actions[chosen]


def observations_of(states, config):
    """What is observed of states (B,To,5), as tensors; of pixels also what they show: corners."""
    if config.observation == "state":
        return states
    _, goal = sim_pusht.TASKS[config.task]
    past = states.cpu().numpy()
    seen = sim_pusht.observe(past, config.observation, goal)
    seen["corners"] = sim_pusht.keypoints(past[:, -1, 2:]).astype(np.float32)
    return {name: torch.as_tensor(values, device=states.device) for name, values in seen.items()}


def draw(window, batch_size):
    """`batch_size` random rows of the frames' windows."""
    return window[torch.randint(len(window), (batch_size,), device=window.device)]


def windows(demonstrations, first, length, device):
    """For each frame, the indices of those from frame + first on, `length` of them: (frames, length).

    At an episode's edges its first or last frame is repeated.
    """
    ends = torch.as_tensor(demonstrations["episode_ends"], device=device)
    frame = torch.arange(int(ends[-1]), device=device)
    episode = torch.searchsorted(ends, frame, right=True)
    starts = torch.cat([ends.new_zeros(1), ends])[episode]
    window = frame[:, None] + torch.arange(first, first + length, device=device)
    return window.clamp(starts[:, None], ends[episode, None] - 1)


def get_demonstrations(config):
    """The file of --demos, or the scripted expert's demonstrations, made once and kept in runs/."""
    path = config.demos
    if path is None:
        # The fingerprint makes sure that no kept file outlives a change of the simulator.
        fingerprint = hashlib.sha1(Path(sim_pusht.__file__).read_bytes()).hexdigest()[:8]
        path = Path(f"runs/demonstrations/{config.task}-{config.num_demos}-{fingerprint}.npz")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            demonstrations = sim_pusht.expert_demonstrations(config.num_demos, config.task, seed=0)
            with whole(path) as unfinished:
                np.savez_compressed(unfinished, **demonstrations)
    demonstrations = sim_pusht.load_demonstrations(path)
    ends = demonstrations["episode_ends"][:config.num_demos]
    if config.num_demos and len(ends) < config.num_demos:
        raise ValueError(f"--num-demos {config.num_demos}, but {path} holds {len(ends)}")
    demonstrations["episode_ends"] = ends     # frames beyond the last are not used
    _, goal = sim_pusht.TASKS[config.task]
    return sim_pusht.mirror(demonstrations, goal) if config.mirror else demonstrations


# Evaluation --------------------------------------------------------------------------------------

def evaluate(policy, task, episodes, max_steps=300):
    """Play unseen scenes, each until coverage > 0.95 or for max_steps: see sim_pusht.play."""
    env = sim_pusht.PushT(episodes, task, max_steps=max_steps)
    env.reset(EVALUATION_SEED)
    generator = torch.Generator(policy.action_scale.device).manual_seed(EVALUATION_SEED)

    def act(past):
        seen = sim_pusht.observe(past, policy.conditioning.encoder.observation, env.goal)
        return policy.act(seen, generator).cpu().numpy()

    return sim_pusht.play(env, act, policy.obs_steps)


def scores(result):
    """Score and success rate with standard errors; the definitions are the benchmark's."""
    coverage = result["max_coverage"]
    score = np.clip(coverage / 0.95, 0, 1)
    success = coverage > 0.95
    root = len(coverage) ** 0.5
    return dict(episodes=len(coverage),
                score=float(score.mean()), score_se=float(score.std() / root),
                success_rate=float(success.mean()), success_se=float(success.std() / root),
                max_coverage=float(coverage.mean()),
                final_coverage=float(result["final_coverage"].mean()))


def success_on_the_way(policy, trained, average, config):
    """The averaged weights in 50 of the scenes. Training goes on as if nothing had happened, and
    nothing is selected by it (the paper reports the best of 50 checkpoints)."""
    present = {name: weight.clone() for name, weight in trained.state_dict().items()}
    trained.load_state_dict(average.module.state_dict())
    result = evaluate(policy.eval(), config.task, min(50, config.episodes))
    trained.load_state_dict(present)
    policy.train()
    return scores(result)["success_rate"]


def draw_curves(rows, path):
    """Loss and success on the way over the updates, from the rows of metrics.csv."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    for stage in dict.fromkeys(row[0] for row in rows):
        for axis, column in zip(axes, (3, 5)):
            points = [(row[1], row[column]) for row in rows if row[0] == stage and row[column] != ""]
            axis.plot(*np.reshape(points, (-1, 2)).T, ".-", label=stage)
    axes[0].set(xlabel="update", ylabel="noise-prediction error (MSE)", yscale="log")
    axes[1].set(xlabel="update", ylabel="success (50 scenes; the last: all)", ylim=(0, 1))
    axes[0].legend()
    with whole(path) as unfinished:
        axes[0].figure.savefig(unfinished, dpi=110)


# A run and its folder ----------------------------------------------------------------------------

@contextlib.contextmanager
def timed(seconds, phase):
    """Add what the block takes to seconds[phase]."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0) + time.perf_counter() - start


class Run:
    """What a run keeps: its folder, seconds per phase, the rows of metrics.csv, its checkpoint.

    A folder belongs to the run whose config.json is in it, from its first moment on. With --resume
    the run goes on from checkpoint.pt (two that do so at once write the same bits). Raises
    ValueError or OSError if it cannot, or if a new run cannot have the folder.
    """
    MAY_DIFFER = "out", "resume", "device", "command"     # the work is the same

    def __init__(self, config):
        self.config = config
        self.saved = {"stage": ""}     # before any stage
        self.seconds, self.rows, self.losses = {}, [], []
        self.folder = config.out or default_folder(config)
        settings = {key: value for key, value in vars(config).items() if key not in self.MAY_DIFFER}
        text = json.dumps(settings | FORMAT, indent=1, default=str)
        if config.resume:
            self.load(json.loads(text))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.folder / "config.json", "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ValueError(f"{self.folder} holds a run: --resume it, or choose another --out") \
                from None

    def load(self, asked):
        """Read the checkpoint, and make sure that it is of the configuration `asked` for."""
        path = self.folder / "config.json"
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"nothing to resume: there is no {path}; leave out --resume") from None
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path} is damaged; move its folder away, begin anew") from None
        changed = [f"{key} was {before.get(key)!r}, is {asked.get(key)!r}"
                   for key in before | asked if before.get(key) != asked.get(key)]
        if changed:
            raise ValueError(f"{path}: --resume needs the run's own flags: " + "; ".join(changed))
        if not (self.folder / "checkpoint.pt").exists():
            print(f"{self.folder} has no checkpoint yet: the run begins anew")
            return
        self.saved = load_file(self.folder / "checkpoint.pt", "checkpoint")
        if "rows" not in self.saved:
            raise ValueError(f"{self.folder / 'checkpoint.pt'} is another kind of file")
        self.rows, self.seconds = self.saved["rows"], self.saved["seconds"]
        print(f"{self.folder} goes on from {self.saved['stage']}, update {self.saved['step']}")

    def updates(self, stage, steps, policy, trained, average, optimizer, schedule):
        """Yield the numbers of the updates that are left to do; do the book-keeping in between.

        Whatever ends the process, --resume goes on from the last checkpoint, bit for bit. A loss
        that becomes NaN raises ArithmeticError and leaves that checkpoint as it is.
        """
        tqdm.write(f"{stage}: {steps:,} updates; trained {count(trained):,} parameters, "
                   f"frozen {count(policy) - count(trained):,}")
        config = self.config
        parts = dict(policy=policy, average=average, optimizer=optimizer, schedule=schedule)
        done = self.restore(stage, parts)
        bar = tqdm(range(done + 1, steps + 1), stage, initial=done, total=steps, mininterval=1)
        for step in bar:
            with timed(self.seconds, stage):
                yield step
            if step % config.log_every == 0 or step == steps:
                loss = self.mean_loss(stage, step, average)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                success = ""
                if stage == "stage2" and step % config.play_every == 0 and step < steps:
                    with timed(self.seconds, "evaluation"):
                        success = success_on_the_way(policy, trained, average, config)
                self.log(stage, step, loss, schedule.get_last_lr()[0], success)
            if step % config.checkpoint_every == 0 or step == steps:
                self.checkpoint(stage, step, parts)

    def mean_loss(self, stage, step, average):
        """The mean since the last call; ArithmeticError if it, or a weight, is no number."""
        with timed(self.seconds, stage):
            loss = float(torch.stack(self.losses).mean())     # waits for the GPU
        self.losses = []
        if not all(weight.isfinite().all() for weight in average.parameters()):
            loss = math.nan     # it will be, from the next update on
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss became {loss} in {stage}, update {step}; try a lower "
                                  f"--learning-rate than {self.config.learning_rate:g}")
        return loss

    def log(self, stage, step, *values):
        """A row of metrics.csv, which is written anew: an interrupted run's may be ahead of it."""
        self.rows.append([stage, step, round(self.seconds[stage], 2), *values])
        header = ["stage", "step", "seconds", "loss", "learning_rate", "success"]
        lines = [",".join(map(str, row)) + "\n" for row in [header, *self.rows]]
        with contextlib.suppress(PermissionError):     # open in a spreadsheet: the next time, then
            with whole(self.folder / "metrics.csv") as unfinished:
                unfinished.write_text("".join(lines), encoding="utf-8")

    def checkpoint(self, stage, step, parts):
        """Keep all that `fit` needs to go on as if nothing had happened."""
        saved = {name: part.state_dict() for name, part in parts.items()}
        saved.update(stage=stage, step=step, rows=self.rows, seconds=self.seconds,
                     cpu_random=torch.get_rng_state(), cuda_random=[])
        if torch.cuda.is_available():
            saved["cuda_random"] = torch.cuda.get_rng_state_all()
        with whole(self.folder / "checkpoint.pt") as unfinished:
            torch.save(saved, unfinished)

    def restore(self, stage, parts):
        """Load the checkpoint if it is of this stage; returns how many updates are done."""
        if self.saved["stage"] != stage:
            self.checkpoint(stage, 0, parts)
            return 0
        try:
            for name, part in parts.items():
                part.load_state_dict(self.saved[name])
            torch.set_rng_state(self.saved["cpu_random"])
            if self.saved["cuda_random"]:
                torch.cuda.set_rng_state_all(self.saved["cuda_random"])
        except Exception as error:
            raise OSError(f"{self.folder / 'checkpoint.pt'} does not fit this code "
                          f"({error!r:.80}); move its folder away, begin anew") from None
        return self.saved["step"]


def default_folder(config):
    """The first free one of runs/<what distinguishes the run>, ...-2, ...; to resume: the last."""
    name = (f"{config.backbone}-{config.conditioning}-{config.recipe}-{config.task}-"
            f"{config.observation}-{config.scale}-seed{config.seed}{'-smoke' * config.smoke}"
            ).replace("-film", "").replace("-state", "")
    before = folder = Path("runs", name)
    for number in itertools.count(2):
        if not (folder / "config.json").exists():
            return before if config.resume else folder
        before, folder = folder, Path("runs", f"{name}-{number}")


def code_version():
    """The commit of this code, if it is a checkout and git is installed."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], text=True,
                              cwd=Path(__file__).parent, capture_output=True).stdout.strip()
    except OSError:
        return ""


def summarise(policy, config, folder, seconds):
    """Evaluate the policy, draw it into `folder`, write and return summary.json."""
    with timed(seconds, "evaluation"):
        result = evaluate(policy, config.task, config.episodes)
    picture, animation = folder / "rollouts.png", folder / "rollout.gif"
    with timed(seconds, "figures"), whole(picture) as still, whole(animation) as moving:
        _, goal = sim_pusht.TASKS[config.task]
        sim_pusht.draw_rollouts(result["states"], result["length"], still, moving, goal)
    summary = dict(command=config.command, task=config.task, seed=config.seed, **scores(result),
                   executed_actions=config.executed_actions, device=config.device,
                   threads=torch.get_num_threads(), torch=torch.__version__, commit=code_version())
    if not config.evaluate:
        frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
        updates = dict(stage1=config.stage1_steps, stage2=config.steps)
        summary.update(
            backbone=config.backbone, conditioning=config.conditioning, recipe=config.recipe,
            scale=config.scale, precision=config.precision,
            parameters=dict(backbone=count(policy.backbone),
                            conditioning=count(policy.conditioning),
                            trained=count(policy) - frozen, frozen=frozen),
            seconds=dict(seconds, total=sum(seconds.values())),
            iterations_per_second={stage: updates[stage] / seconds[stage]
                                   for stage in updates if stage in seconds})
    with whole(folder / "summary.json") as unfinished:
        unfinished.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


# The command line --------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # One line instead of the whole usage text.
    parser.error = lambda message: parser.exit(2, f"train.py: {message} (--help tells more)\n")

    group = parser.add_argument_group("the recipe")
    flag, recipe = group.add_argument, group.add_mutually_exclusive_group().add_argument
    flag("--backbone", default="mlp", choices=sorted(BACKBONES), help="DP-MLP, DP-T or DP-C; "
         "default mlp, which a laptop trains best")
    flag("--conditioning", default="film", choices=MECHANISMS, help="how the backbone takes its "
         "condition; default film, the paper's")
    recipe("--decoupled", dest="recipe", action="store_const", const="decoupled", default="normal",
           help="pretrain the backbone on free data, freeze it, train the conditioning; "
           "default: normal, everything at once on demonstrations")
    recipe("--random-backbone", dest="recipe", action="store_const", const="random-frozen",
           help="control: freeze a backbone that learned nothing; default: normal")
    recipe("--pretrained", dest="recipe", action="store_const", const="pretrained",
           help="control: as --decoupled, but freeze nothing; default: normal")
    flag("--task", default="full", choices=sim_pusht.TASKS, help="the benchmark; the quick lesson, "
         "block within 60 px and 0.75 rad of the goal; or another goal, far away; default full")
    flag("--observation", default="state", choices=sim_pusht.OBSERVATIONS, help="the block's pose; "
         "its corners, as gym-pusht gives them; or a picture; default state")
    flag("--seed", type=int, default=0, help="of initialisation and batches; default 0")
    flag("--smoke", action="store_true", help="all of it once, in a minute; default: off")

    flag = parser.add_argument_group("stage 1").add_argument
    flag("--action-head", type=Path, metavar="FILE", help="take the backbone from the "
         "action_head.pt of another run; default: make one")
    flag("--keep-biases", action="store_true", help="control: stage 2 starts from the biases of "
         "stage 1's conditioning, of tokens from their MLP; default: from nothing")
    flag("--pretrain-condition", default="joints", choices=["joints", "pose", "none"], help="what "
         "the denoiser is conditioned on; default joints, the paper's")
    flag("--pretrain-data", default="arm", choices=[*MOTIONS, "demonstrations"], help="the motion: "
         "free, too fast, too smooth, or the agent's own in the demonstrations; default arm")

    flag = parser.add_argument_group("size and training (paper: with --scale paper)").add_argument
    flag("--scale", default="laptop", choices=SETTINGS, help="small and fast, or the paper's sizes "
         "and settings, hours on a GPU; default laptop")
    flag("--width", type=int, metavar="D", help="of DP-MLP or DP-T; default 128 and 96, paper 256")
    flag("--demos", metavar="FILE", type=Path, help="demonstrations from an .npz (state, action, "
         "episode_ends); default: the scripted expert's")
    flag("--num-demos", type=int, metavar="N", help="how many demonstrations; default 2000, near "
         "1500, of a file all")
    flag("--stage1-steps", type=int, metavar="N", help="updates; default 2500, paper 45000")
    flag("--steps", type=int, metavar="N", help="updates in stage 2, or in normal training; "
         "default 18000, near 8000, of a file 12000, from pixels 20000, near 9000; paper 83000")
    flag("--corner-weight", type=float, metavar="X", default=0.2, help="how much the loss minds where "
         "a policy from pixels sees the block's corners; default 0.2; 0: the paper's loss")
    flag("--learning-rate", type=float, metavar="X", help="highest; default 0.004, paper 0.0001")
    flag("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="default auto: bf16 "
         "where it is faster (a GPU that has it; DP-MLP, DP-C on a CPU with AVX512-BF16), else fp32")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default auto: cuda if any")

    flag = parser.add_argument_group("evaluation and files").add_argument
    flag("--episodes", type=int, metavar="N", help="evaluation scenes; default 200")
    flag("--executed-actions", type=int, choices=range(1, HORIZON - OBS_STEPS + 2), default=8,
         metavar="N", help="how many actions of each chunk of 16 are carried out; default 8")
    flag("--evaluate", metavar="POLICY", type=Path, help="train nothing, score this policy.pt (see "
         "--task, --episodes, --executed-actions); default: train")
    flag("--out", type=Path, metavar="FOLDER", help="the run's folder; default runs/<what "
         "distinguishes it>, with --evaluate one beside the policy")
    flag("--resume", action="store_true", help="go on from the checkpoint in the run's folder; "
         "default: a new run")
    return parser


# What a flag may be, both ends included; beyond lies what no machine or number type holds.
ALLOWED = {"seed": (0, 2 ** 32 - 1), "width": (1, 10_000), "num_demos": (1, 100_000),
           "stage1_steps": (1, 10 ** 9), "steps": (1, 10 ** 9), "learning_rate": (1e-9, 1e4),
           "corner_weight": (0, 1e4), "episodes": (1, 10_000)}


def parse(arguments=None):
    """The configuration, every default filled in, and the function that reports bad input."""
    parser = make_parser()
    config = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    for key, value in vars(config).items():
        name = f"--{key.replace('_', '-')}" + f" {value}" * (value is not True)
        if value == parser.get_default(key):
            continue
        if value == Path():     # an empty name as well
            parser.error(f"{name} is no name of its own for a file or folder")
        low, high = ALLOWED.get(key, (value, value))
        if not low <= value <= high:
            parser.error(f"{name} is out of range; allowed: {low} to {high}")
        if key == "corner_weight" and config.observation != "pixels":
            parser.error(f"{name} means nothing without --observation pixels")
        if config.evaluate and key not in ("evaluate", "task", "episodes", "executed_actions",
                                           "device", "out", "smoke"):
            parser.error(f"{name} means nothing with --evaluate, which trains nothing")
        if key.startswith(("pretrain_", "keep_", "action_head")):
            if config.recipe in ("normal", "random-frozen"):
                parser.error(f"{name} means nothing without --decoupled or --pretrained")
            if config.action_head and key != "action_head":
                parser.error(f"{name} means nothing with --action-head: stage 1 is over")
    config.command = shlex.join(["python", "train.py", *given])
    if config.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this PyTorch sees no CUDA GPU; allowed here: cpu, auto")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "auto":
        config.precision = "bf16" if has_fast_bf16(config.device, config.backbone) else "fp32"
    for key, value in (SETTINGS[config.scale] | (SMOKE if config.smoke else {})).items():
        file_decides = key == "num_demos" and config.demos
        if getattr(config, key, None) is None and not file_decides:
            if isinstance(value, dict):
                kinds = ("full", config.task, "demos" if config.demos else "", config.observation,
                         f"{config.task} {config.observation}")
                value = [value[kind] for kind in kinds if kind in value][-1]
            setattr(config, key, value)
    return config, parser.error


def has_fast_bf16(device, backbone):
    """Does bfloat16 make training faster? On a CPU the transformer's attention gets slower by it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    # PyTorch has no public name for it, an older one none at all: then bool(), which is False.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return backbone != "transformer" and supported()


def announce(config, demonstrations):
    """Say at the start what will be done, on what, and how long it takes."""
    print(f"{config.recipe} training of {config.backbone}, scale {config.scale}, on task "
          f"{config.task} with {len(demonstrations['episode_ends']):,} demonstrations; on "
          f"{config.device}, {torch.get_num_threads()} thread(s), in {config.precision}: about "
          f"{config.time}.")


def report(summary, folder):
    """Say at the end how good it is, what it cost, where the results are, what to try next."""
    print(f"\nscore    {summary['score']:.3f} +- {summary['score_se']:.3f}  mean of max coverage / "
          f"0.95, at most 1 ({summary['episodes']} unseen scenes, task {summary['task']})\n"
          f"success  {summary['success_rate']:.3f} +- {summary['success_se']:.3f}  coverage > 0.95 "
          f"within 300 steps, {summary['executed_actions']} actions executed of each chunk")
    for key in [key for key, value in summary.items() if isinstance(value, dict)]:
        print(key, *(f"{name} {number:,.0f}" for name, number in summary[key].items()), sep="  ")
    print(f"see      rollouts.png, rollout.gif and summary.json in {folder}")
    if "recipe" in summary:
        policy = shlex.quote(str(folder / "policy.pt"))
        print(f"next     python train.py --evaluate {policy} --executed-actions 4")


def evaluate_file(config, policy):
    """--evaluate: score a saved policy; the results go into a folder beside it."""
    policy.executed_actions = config.executed_actions
    name = f"{config.evaluate.stem}-{config.task}-executing-{config.executed_actions}"
    folder = config.out or config.evaluate.with_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(policy, config, folder, {})
    report(summary, folder)
    return summary


def set_up(config):
    """The run and its demonstrations, or --evaluate's policy: here all bad input is found."""
    if config.evaluate:
        policy = DiffusionPolicy.load(config.evaluate, config.device)
        _, goal = sim_pusht.TASKS[config.task]
        own = policy.conditioning.encoder.config.get("goal", goal.tolist())
        if own != goal.tolist():
            raise ValueError(f"{config.evaluate} pursues the goal {own}; --task {config.task} has "
                             f"{goal.tolist()}")
        return [policy]
    with torch.device("meta"):     # refuses an impossible one
        make_action_head(config)
    run = Run(config)     # first: interrupted from here on, the run can be resumed
    try:
        with timed(run.seconds, "demonstrations"):
            demonstrations = get_demonstrations(config)
    except (ValueError, OSError):
        if not config.resume:
            (run.folder / "config.json").unlink()     # nothing has begun
        raise
    return run, demonstrations


def train_and_evaluate(config, run, demonstrations):
    announce(config, demonstrations)
    policy = train_policy(config, run, demonstrations, torch.device(config.device))
    policy.save(run.folder / "policy.pt")
    summary = summarise(policy, config, run.folder, run.seconds)
    run.rows[-1][-1] = summary["success_rate"]
    draw_curves(run.rows, run.folder / "curves.png")
    report(summary, run.folder)
    return summary


def main(arguments=None):
    """The command line; returns the summary, for notebooks and tests."""
    config, refuse = parse(arguments)
    torch.manual_seed(config.seed)
    try:
        try:
            needed = set_up(config)
        except (ValueError, OSError) as error:
            refuse(error)
        return (evaluate_file if config.evaluate else train_and_evaluate)(config, *needed)
    except (ArithmeticError, OSError) as error:
        sys.exit(f"train.py: {error}")     # exit code 1
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):
            raise
        sys.exit(f"train.py: out of memory ({error!r:.80}); try a smaller --width or --episodes")
    except KeyboardInterrupt:
        again = "" if config.resume or config.evaluate else " --resume"
        sys.exit(f"\ninterrupted; go on with: {config.command}{again}")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"                           # pictures go to files
    sys.stdout.reconfigure(errors="backslashreplace")          # a path may hold any letter
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's Ctrl-C
    main()
