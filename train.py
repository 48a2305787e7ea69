"""The two recipes, end to end: demonstrations, training, evaluation on unseen scenes, pictures.

    python train.py --backbone mlp --decoupled      stage 1, freeze, stage 2 (the paper's recipe)
    python train.py --backbone mlp                  normal: everything learns from demonstrations
    python train.py --help                          all that can be varied

Read two functions first: `train_policy` is the recipe, `fit` is the training loop. The data, the
evaluation, the settings and the folder of a run follow, in this order.
Paper: section IV-B, eq. 9 and 10 (arXiv 2511.12101v1).
"""
import argparse
import contextlib
import dataclasses
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
# A CPU thread that has to wait spins for a while before it sleeps. GNU OpenMP lets it spin for so
# long that two threads hold each other up on a busy machine. OMP_WAIT_POLICY=PASSIVE lets it sleep
# at once, and then two threads are hardly faster than one. This number lies between; it must be set
# before torch is imported.
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
from heads import BACKBONES, SIZES, count, make_backbone
from kinematics import MOTIONS, PlanarArm

HORIZON, OBS_STEPS, ACTION_DIM = 16, 2, 2      # T, To, A: the paper's, but for A = 10
EVALUATION_SEED = 100_000                      # scenes from this seed on are in no demonstration
# The displacement from the agent, in px, that counts as 1 at each horizon step. It grows by the
# 12 px that an agent makes in a step; 30 px is how far a target lies ahead of the agent.
ACTION_SCALE = [30 + 12 * step for step in range(HORIZON)]
# PushT's agent follows its target damping / stiffness = 0.2 s later, which is two control steps.
# In stage 1 the targets are the arm's path, so the present is the point of two steps before.
LEAD = 2


# The recipe --------------------------------------------------------------------------------------

def train_policy(config, run, demonstrations):
    """The paper's recipe and its controls; returns the trained policy in evaluation mode.

    Stage 1 trains a backbone on free kinematic data, with a conditioning on joint angles that is
    then thrown away. Stage 2 trains a fresh conditioning on demonstrations. What else stage 2
    trains is said by requires_grad alone: nothing ("decoupled"), or the backbone as well
    ("pretrained"). Without stage 1 these are "random-frozen" and "normal".
    """
    backbone, stage1 = new_backbone(config), None
    # A run that goes on in stage 2 skips stage 1, because its checkpoint holds all weights.
    if config.action_head:
        backbone = load_backbone(config.action_head, backbone.config)
    elif config.recipe in ("decoupled", "pretrained") and not run.is_past_stage1:
        conditioning = make_conditioning(backbone, config.pretrain_condition, horizon=HORIZON)
        policy = make_policy(conditioning, backbone, config)
        batches = stage1_batches(demonstrations, config)
        stage1 = fit("stage1", policy, batches, config, run)     # eq. 9
        stage1.save(run.folder / "action_head.pt")
        backbone = stage1.backbone

    if config.recipe in ("decoupled", "random-frozen"):
        freeze(backbone)
    conditioning = conditioning_on_observations(backbone, config)
    if config.keep_biases and stage1:
        copy_biases(stage1.conditioning, conditioning)
    policy = make_policy(conditioning, backbone, config)
    batches = demonstration_batches(demonstrations, config)
    return fit("stage2", policy, batches, config, run)     # eq. 10


def fit(stage, policy, batches, config, run):
    """Train what requires a gradient in `policy`; returns the average policy, in evaluation mode.

    The average is the exponential moving average (EMA) of the weights. That of a frozen weight is
    the weight itself. next(batches) gives the arguments of policy.loss. `run` keeps log and
    checkpoints; a run that goes on begins after the updates that are done.
    """
    steps = config.stage1_steps if stage == "stage1" else config.steps
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, betas=config.betas,
                                  weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.warmup, steps))
    average = AveragedModel(policy, multi_avg_fn=functools.partial(ema_update, config.ema_decay))
    policy.train()     # as in the paper, dropout stays on, also in a frozen backbone
    done = run.begin(stage, steps, policy, average, optimizer, schedule)

    for step in range(done, steps):
        batch = next(batches)     # not under autocast: the arm's kinematics would be 2 times slower
        with torch.autocast(config.device, torch.bfloat16, config.precision == "bf16"):
            loss = policy.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, config.clip_norm)
        optimizer.step()
        schedule.step()
        average.update_parameters(policy)
        run.after_update(step, loss)
    return average.module.eval()


def freeze(backbone):
    """Stage 2 trains no weight of the backbone, and all others: the cut is made by module.

    The official code freezes every tensor whose name and shape are those of one of stage 1. Where
    the two conditions have equal sizes, that would freeze FiLM as well.
    """
    backbone.requires_grad_(False)


def learning_rate_factor(step, warmup, steps):
    """The share of the highest learning rate in update `step`, counted from 0: warm-up, cosine."""
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def ema_decay(step, cap):
    """How much of the average is kept; it grows, so that the start is forgotten.

    step: 0 in the second update; in the first one AveragedModel copies the weights by itself. So
    the second one, whose decay is 0, copies them as well. (Official code: EMAModel, power 0.75.)
    """
    return min(cap, 1 - (1 + step) ** -0.75)


@torch.no_grad()
def ema_update(cap, averages, weights, num_averaged):
    """For AveragedModel: average = decay * average + (1 - decay) * weight, in place."""
    decay = ema_decay(int(num_averaged) - 1, cap)
    for average, weight in zip(averages, weights):
        average.lerp_(weight, 1 - decay)


# The parts of a policy ---------------------------------------------------------------------------

def new_backbone(config):
    """A backbone with random weights. Raises ValueError for an impossible one."""
    return make_backbone(config.backbone, config.scale, ACTION_DIM, HORIZON, config.conditioning,
                         config.width)


def load_backbone(path, asked):
    """The backbone of a policy file, which has to be of the configuration `asked` for.

    Raises ValueError, in one line, for a bad file or another backbone.
    """
    backbone = DiffusionPolicy.load(path).backbone
    other = [f"{key} {backbone.config.get(key)}, not {asked[key]}" for key in asked
             if backbone.config.get(key) != asked[key]]
    if other:
        raise ValueError(f"{path} holds another action head than asked for: {'; '.join(other)}")
    return backbone


def conditioning_on_observations(backbone, config):
    """A fresh pathway for what a policy of this task, or of these tasks, observes."""
    goals = [sim_pusht.TASKS[task][1].tolist() for task in config.task.split(",")]
    settings = dict(obs_steps=OBS_STEPS, corners=sim_pusht.KEYPOINTS.tolist(), goal=goals[0])
    if len(goals) > 1:
        return make_conditioning(backbone, "state-and-goal", **settings | {"goal": goals})
    if config.observation == "pixels":
        settings["corner_weight"] = config.corner_weight
    return make_conditioning(backbone, config.observation, **settings)


def copy_biases(stage1, conditioning):
    """A control, as in the official code: what does not depend on the observation is kept.

    That is the mean modulation of each layer, or of tokens the bias and the MLP behind them.
    """
    kept = "observation_part.bias", "embed.bias", "mlp."
    biases = {name: weight for name, weight in stage1.state_dict().items() if name.startswith(kept)}
    conditioning.load_state_dict(biases, strict=False)


def make_policy(conditioning, backbone, config):
    """The policy of these two parts, on the run's device."""
    noise_samples, loss_steps = config.noise_samples, config.loss_steps
    if backbone.mixes_time:     # then the loss needs all steps of a chunk, which is work enough
        noise_samples, loss_steps = 1, None
    policy = DiffusionPolicy(conditioning, backbone, ACTION_SCALE, (0.0, sim_pusht.BOARD),
                             OBS_STEPS, config.executed_actions, config.sampling_steps,
                             noise_samples=noise_samples, loss_steps=loss_steps,
                             temperature=config.temperature)
    return policy.to(config.device)


# The data ----------------------------------------------------------------------------------------

def stage1_batches(demonstrations, config):
    """The batches of stage 1: free ones, which need no demonstration, or those of the control."""
    if config.pretrain_data == "demonstrations":
        return own_path_batches(demonstrations, config)
    return kinematic_batches(config)


def kinematic_batches(config):
    """Stage 1: yields joint angles (B,T,N), positions (B,T,A) in px, the present position (B,A).

    Angles and end-effector positions are of the same instants, as in the paper: the denoiser
    learns forward kinematics. Each window is new, made on the device and never stored.
    """
    arm = PlanarArm(motion=MOTIONS[config.pretrain_data])
    while True:
        yield stage1_batch(*arm.sample_windows(config.batch_size, HORIZON + LEAD,
                                               device=config.device), config)


def own_path_batches(demonstrations, config):
    """A control: stage 1 on the agent's own paths in the demonstrations, as a hand's path."""
    agents = torch.as_tensor(demonstrations["state"][:, :2], dtype=torch.float32,
                             device=config.device)
    window, arm = windows(demonstrations, 0, HORIZON + LEAD, config.device), PlanarArm()
    while True:
        positions = agents[sample_rows(window, config.batch_size)]
        yield stage1_batch(arm.inverse(positions), positions, config)


def stage1_batch(angles, positions, config):
    """Windows of T + LEAD instants -> the condition, the positions to be denoised, the present.

        instant         0    1    2    3   ...  17        T + LEAD = 18
        present              p
        denoised                  t0   t1  ...  t15       T = 16 targets
        condition                 q0   q1  ...  q15       angles of the same instants

    The present p is where the agent is when it heads for t1, the first target to be executed: a
    target lies LEAD instants ahead. What is denoised are displacements from p, which the angles do
    not contain. So a displacement cannot be predicted better than to 1.8 px (RMS).
    """
    condition = angles if config.pretrain_condition == "joints" else positions
    return condition[:, LEAD:], positions[:, LEAD:], positions[:, OBS_STEPS - 1]


def demonstration_batches(demonstrations, config):
    """Stage 2: yields observations and actions (B,T,A) in px, random windows of demonstrations.

    A window starts one step before the present. At an episode's edges its first or last step is
    repeated, and repeated steps count in the loss. (So do the official code's, which leaves out
    windows with more than 7 of them.)
    """
    states, actions = (torch.as_tensor(demonstrations[name], dtype=torch.float32,
                                       device=config.device) for name in ("state", "action"))
    window = windows(demonstrations, 1 - OBS_STEPS, HORIZON, config.device)
    while True:
        chosen = sample_rows(window, config.batch_size)
        yield observations_of(states[chosen[:, :OBS_STEPS]], config), actions[chosen]


def observations_of(states, config):
    """What a policy observes of states (B,To,5), as tensors.

    Pictures are drawn anew for each batch: all of them together would take 6 GB. With a picture
    come the block's corners (B,8,2) in px, for the encoder's auxiliary loss.
    """
    if config.observation == "state":
        return states
    _, goal = sim_pusht.TASKS[config.task]
    past = states.cpu().numpy()
    seen = sim_pusht.observe(past, config.observation, goal)
    seen["corners"] = sim_pusht.keypoints(past[:, -1, 2:]).astype(np.float32)
    return {name: torch.as_tensor(values, device=states.device) for name, values in seen.items()}


def sample_rows(window, batch_size):
    """`batch_size` random rows of the frames' windows."""
    return window[torch.randint(len(window), (batch_size,), device=window.device)]


def windows(demonstrations, first, length, device):
    """For each frame, the indices of the frames frame + first, frame + first + 1, ...

    Returns (frames, length). At an episode's edges its first or last frame is repeated.
    """
    ends = torch.as_tensor(demonstrations["episode_ends"], device=device)
    frame = torch.arange(int(ends[-1]), device=device)
    episode = torch.searchsorted(ends, frame, right=True)
    starts = torch.cat([ends.new_zeros(1), ends])[episode]
    window = frame[:, None] + torch.arange(first, first + length, device=device)
    return window.clamp(starts[:, None], ends[episode, None] - 1)


def get_demonstrations(config):
    """The demonstrations of the task; of several, all of them, the goal in each state (N,8)."""
    if config.task in sim_pusht.TASKS:
        return demonstrations_of(config.task, config)
    parts, frames = [], 0
    for task in config.task.split(","):
        part, (_, goal) = demonstrations_of(task, config), sim_pusht.TASKS[task]
        part["state"] = sim_pusht.observe(part["state"], "state-and-goal", goal)
        part["episode_ends"] += frames     # those of the tasks before
        frames = part["episode_ends"][-1]
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def demonstrations_of(task, config):
    """The file of --demos, or the scripted expert's demonstrations, made once and kept in runs/."""
    path = config.demos
    if path is None:
        # The name holds a fingerprint of the simulator, so a changed one makes new demonstrations.
        fingerprint = hashlib.sha1(Path(sim_pusht.__file__).read_bytes()).hexdigest()[:8]
        path = Path(f"runs/demonstrations/{task}-{config.num_demos}-{fingerprint}.npz")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            demonstrations = sim_pusht.expert_demonstrations(config.num_demos, task, seed=0)
            with whole(path) as unfinished:
                np.savez_compressed(unfinished, **demonstrations)
    demonstrations = sim_pusht.load_demonstrations(path)
    ends = demonstrations["episode_ends"][:config.num_demos]
    if config.num_demos and len(ends) < config.num_demos:
        raise ValueError(f"--num-demos {config.num_demos}, but {path} holds {len(ends)}")
    demonstrations["episode_ends"] = ends     # frames beyond the last are not used
    _, goal = sim_pusht.TASKS[task]
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


def evaluate_all(policy, tasks, episodes):
    """`evaluate` on each of the tasks, such as "full,away": a dict of task -> its result."""
    return {task: evaluate(policy, task, episodes) for task in tasks.split(",")}


def scores(*results):
    """Score and success rate of all scenes, with standard errors, as the benchmark defines them."""
    coverage, final = (np.concatenate([result[name] for result in results])
                       for name in ("max_coverage", "final_coverage"))
    score = np.clip(coverage / 0.95, 0, 1)
    success = coverage > 0.95
    root = len(coverage) ** 0.5
    return dict(episodes=len(coverage),
                score=float(score.mean()), score_se=float(score.std() / root),
                success_rate=float(success.mean()), success_se=float(success.std() / root),
                max_coverage=float(coverage.mean()),
                final_coverage=float(final.mean()))


def scores_of(policy, results):
    """The entries of summary.json that every evaluation has; results: see `evaluate_all`."""
    found = dict(task=",".join(results), **scores(*results.values()),
                 executed_actions=policy.executed_actions,
                 device=policy.action_scale.device.type, threads=torch.get_num_threads(),
                 torch=torch.__version__, commit=code_version())
    if len(results) > 1:
        found["tasks"] = [dict(task=task, **scores(result)) for task, result in results.items()]
    return found


def summarise(policy, results, config, run):
    """What summary.json says about a run: how good the policy is, and what it cost."""
    frozen = sum(weight.numel() for weight in policy.parameters() if not weight.requires_grad)
    updates = dict(stage1=config.stage1_steps, stage2=config.steps)
    return dict(
        command=config.command, seed=config.seed, **scores_of(policy, results),
        backbone=config.backbone, conditioning=config.conditioning, recipe=config.recipe,
        scale=config.scale, precision=config.precision,
        parameters=dict(backbone=count(policy.backbone), conditioning=count(policy.conditioning),
                        trained=count(policy) - frozen, frozen=frozen),
        seconds=dict(run.seconds, total=sum(run.seconds.values())),
        iterations_per_second={stage: updates[stage] / run.seconds[stage]
                               for stage in updates if stage in run.seconds})


def save_summary(summary, folder):
    with whole(folder / "summary.json") as unfinished:
        unfinished.write_text(json.dumps(summary, indent=1), encoding="utf-8")


def draw_rollouts(results, folder):
    """rollouts.png, rollout.gif: the first eight scenes; of further tasks rollouts-TASK.png."""
    for number, (task, result) in enumerate(results.items()):
        _, goal = sim_pusht.TASKS[task]
        which = f"-{task}" if number else ""
        picture, animation = folder / f"rollouts{which}.png", folder / f"rollout{which}.gif"
        with whole(picture) as still, whole(animation) as moving:
            sim_pusht.draw_rollouts(result["states"], result["length"], still, moving, goal)


def report(summary, folder):
    """Say at the end how good the policy is, what it cost and where that is written."""
    print(f"\nscore    {summary['score']:.3f} +- {summary['score_se']:.3f}  mean of max coverage / "
          f"0.95, at most 1 ({summary['episodes']} unseen scenes, task {summary['task']})\n"
          f"success  {summary['success_rate']:.3f} +- {summary['success_se']:.3f}  coverage > 0.95 "
          f"within 300 steps, {summary['executed_actions']} actions executed of each chunk")
    for its in summary.get("tasks", []):     # where there are several
        print(f"  {its['task']}: score {its['score']:.3f}, success {its['success_rate']:.3f} +- "
              f"{its['success_se']:.3f} ({its['episodes']} scenes)")
    for key in [key for key, value in summary.items() if isinstance(value, dict)]:
        print(key, *(f"{name} {number:,.0f}" for name, number in summary[key].items()), sep="  ")
    print(f"see      summary.json, rollouts.png and rollout.gif in {folder}")


def draw_curves(rows, path):
    """Loss and success on the way over the updates, from the rows of metrics.csv."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    for stage in dict.fromkeys(row[0] for row in rows):
        for axis, column in zip(axes, (3, 5)):
            points = [(row[1], row[column]) for row in rows
                      if row[0] == stage and row[column] != ""]
            axis.plot(*np.reshape(points, (-1, 2)).T, ".-", label=stage)
    axes[0].set(title="What is learned", xlabel="update", yscale="log",
                ylabel="noise-prediction error (MSE)")
    axes[1].set(title="What it is good for", xlabel="update", ylim=(0, 1),
                ylabel="success (in 50 scenes; at the end: in all)")
    axes[0].legend()
    with whole(path) as unfinished:
        axes[0].figure.savefig(unfinished, dpi=110)


# The settings ------------------------------------------------------------------------------------

def flag(default, help, **about):
    """A field of Config that is a flag of the command line: choices or lowest and highest value."""
    return dataclasses.field(default=default, metadata=dict(help=help, **about))


@dataclasses.dataclass
class Config:
    """All that decides about a run. Each field with a help text is a flag of the command line.

    Fields that are None get the value that fits the others: see `settings`. In a notebook:
    train.experiment(train.settings(train.Config(task="near", recipe="decoupled"))).
    """
    backbone: str = flag("mlp", "DP-MLP, DP-T or DP-C; default mlp, which a laptop trains best",
                         choices=sorted(BACKBONES))
    conditioning: str = flag("film", "how the backbone takes its condition; default film, the "
                             "paper's", choices=MECHANISMS)
    recipe: str = flag("normal", None, choices={
        "normal": None,
        "decoupled": "--decoupled: pretrain the backbone on free data, freeze it, train the "
                     "conditioning; default: normal, everything at once on demonstrations",
        "random-frozen": "--random-backbone: a control, freeze a backbone that learned nothing; "
                         "default: normal",
        "pretrained": "--pretrained: a control, as --decoupled, but freeze nothing; "
                      "default: normal"})
    task: str = flag("full", "full, the benchmark; near, the quick lesson, where the block is "
                     "within 60 px and 0.75 rad of the goal; away or corner, other goals; or "
                     "several for one policy, such as full,away,corner; default full",
                     metavar="TASK")
    observation: str = flag("state", "the block's pose as numbers, or a picture; default state",
                            choices=sim_pusht.OBSERVATIONS)
    seed: int = flag(0, "of initialisation and batches; default 0", low=0, high=2 ** 32 - 1)
    smoke: bool = flag(False, "all of it once, in a minute; default: off")

    action_head: Path = flag(None, "take the backbone of this policy file, such as the "
                             "action_head.pt of another run; default: train one", metavar="FILE")
    keep_biases: bool = flag(False, "a control: stage 2 starts from the biases of stage 1's "
                             "conditioning (of tokens: from their MLP, too); default: afresh")
    pretrain_condition: str = flag("joints", "what the denoiser of stage 1 is conditioned on; "
                                   "default joints, the paper's",
                                   choices=["joints", "pose", "none"])
    pretrain_data: str = flag("arm", "the motion of stage 1: free, too fast, too smooth, or the "
                              "agent's own in the demonstrations; default arm",
                              choices=[*MOTIONS, "demonstrations"])

    scale: str = flag("laptop", "small and fast, or the paper's sizes and settings, which take "
                      "hours on a GPU; default laptop", choices=SIZES)
    width: int = flag(None, "of DP-MLP or DP-T; default 128 and 96, paper 256", metavar="D", low=1,
                      high=10_000)
    demos: Path = flag(None, "demonstrations from an .npz (state, action, episode_ends); default: "
                       "the scripted expert's", metavar="FILE")
    num_demos: int = flag(None, "how many demonstrations of each task; default 2000, near 1500, "
                          "of a file all", metavar="N", low=1, high=100_000)
    stage1_steps: int = flag(None, "updates in stage 1; default 1500, paper 45000", metavar="N",
                             low=1, high=10 ** 9)
    steps: int = flag(None, "updates in stage 2, or in normal training; default 12000, near 5000, "
                      "of a file 12000, from pixels 16000, near 7000; paper 83000", metavar="N",
                      low=1, high=10 ** 9)
    corner_weight: float = flag(0.2, "of the auxiliary loss, which tells a policy from pixels "
                                "where the block's corners are; default 0.2; 0: the paper's loss",
                                metavar="X", low=0, high=1e4)
    learning_rate: float = flag(None, "the highest; default 0.004, paper 0.0001", metavar="X",
                                low=1e-9, high=1e4)
    precision: str = flag("auto", "default auto: bf16 where it is faster (a GPU that has it; "
                          "DP-MLP and DP-C on a CPU with AVX512-BF16), else fp32",
                          choices=["auto", "fp32", "bf16"])
    device: str = flag("auto", "default auto: cuda if any", choices=["auto", "cpu", "cuda"])

    episodes: int = flag(None, "evaluation scenes of each task; default 200", metavar="N",
                         low=1, high=10_000)
    executed_actions: int = flag(8, "how many actions of each chunk of 16 are carried out; "
                                 "default 8", metavar="N", low=1, high=HORIZON - OBS_STEPS + 1)
    out: Path = flag(None, "the run's folder; default runs/<what distinguishes it>",
                     metavar="FOLDER")
    resume: bool = flag(False, "go on from the checkpoint in the run's folder; default: a new run")

    # Not on the command line: what `settings` chooses, and the command itself.
    batch_size: int = None           # observations in an update
    noise_samples: int = None        # noise draws for each of them
    loss_steps: int = None           # of the 16 horizon steps in the loss; None: all
    sampling_steps: int = None       # DDIM steps; None: all 100 of DDPM
    mirror: bool = None              # also learn from the mirror images of the demonstrations
    temperature: float = None        # of the noise in acting
    warmup: int = None               # updates until the learning rate is at its highest
    betas: tuple = None              # of AdamW
    clip_norm: float = None          # longer gradients are shortened to this length
    ema_decay: float = None          # the highest
    log_every: int = None            # updates
    checkpoint_every: int = None     # updates, a multiple of log_every
    play_every: int = None           # updates, a multiple of log_every
    command: str = ""


def settings(config):
    """The configuration with nothing left to choose. Raises ValueError, in one line, if it is bad.

    `laptop` trains a small network fast, `paper` has the paper's settings.
    """
    check(config)
    values = dict(num_demos=2000, episodes=200, mirror=False, temperature=1.0)
    if config.task == "near":
        values.update(num_demos=1500)
    if config.scale == "paper":
        values.update(batch_size=64, noise_samples=1, warmup=500, learning_rate=1e-4,
                      betas=(0.95, 0.999), clip_norm=math.inf, ema_decay=0.9999,
                      stage1_steps=45000, steps=83000,
                      log_every=100, checkpoint_every=2000, play_every=10000)
    else:
        # A high learning rate, for which the gradients are clipped and the second beta is small.
        # An observation is encoded once for four noise draws, and each draw is of a random 4 of
        # the 16 horizon steps. (Backbones that mix time steps take one draw of all 16.)
        values.update(batch_size=128, noise_samples=4, loss_steps=4, sampling_steps=10,
                      learning_rate=4e-3, warmup=100, betas=(0.9, 0.98), clip_norm=0.2,
                      ema_decay=0.999, stage1_steps=1500, steps=12000,
                      log_every=100, checkpoint_every=500, play_every=3000)
        if config.task == "near":
            values.update(steps=5000)
        if config.demos:
            # A file's demonstrations are few: their mirror images double them. People disagree
            # about the way, and a lower temperature keeps to what most of them do.
            values.update(steps=12000, batch_size=256, noise_samples=2, mirror=True,
                          temperature=0.5)
        if config.observation == "pixels":
            # Pictures are expensive: fewer observations in a batch.
            values.update(steps=7000 if config.task == "near" else 16000,
                          batch_size=64, noise_samples=4)
    if config.smoke:
        values.update(batch_size=64, steps=150, stage1_steps=100, num_demos=40, episodes=16,
                      log_every=25, checkpoint_every=50, play_every=50)
    if config.demos:
        values.update(num_demos=None)     # all of the file's

    if config.device == "auto":
        values.update(device="cuda" if torch.cuda.is_available() else "cpu")
    if config.precision == "auto":
        fast = has_fast_bf16(values.get("device", config.device), config.backbone)
        values.update(precision="bf16" if fast else "fp32")
    chosen = {name: value for name, value in values.items()
              if getattr(config, name) in (None, "auto")}
    return dataclasses.replace(config, **chosen)


def check(config):
    """Raise ValueError, in one line, for a value that is not allowed or means nothing."""
    tasks = config.task.split(",")
    for task in tasks:
        if task not in sim_pusht.TASKS:
            raise ValueError(f"--task {task!r} is unknown; allowed: {', '.join(sim_pusht.TASKS)}, "
                             "or several with commas between")
    if len({tuple(sim_pusht.TASKS[task][1]) for task in tasks}) < len(tasks):
        raise ValueError(f"--task {config.task} names one goal twice (near has that of full)")
    if len(tasks) > 1 and config.demos:
        raise ValueError(f"--demos holds one task; --task {config.task} are {len(tasks)}")
    if len(tasks) > 1 and config.observation == "pixels":
        raise ValueError(f"--observation pixels with --task {config.task}: a PixelEncoder would "
                         "have to find the goal in the picture as well; it finds only the block")
    for field in dataclasses.fields(config):
        value, about = getattr(config, field.name), field.metadata
        name = f"--{field.name.replace('_', '-')}" + f" {value}" * (value is not True)
        if value == field.default:
            continue
        if value not in about.get("choices", [value]):
            raise ValueError(f"{name} is unknown; allowed: {', '.join(about['choices'])}")
        if "low" in about and not about["low"] <= value <= about["high"]:
            raise ValueError(f"{name} is out of range; allowed: {about['low']} to {about['high']}")
        if value == Path():     # an empty name as well
            raise ValueError(f"{name} is no name of its own for a file or folder")
        if field.name == "corner_weight" and config.observation != "pixels":
            raise ValueError(f"{name} means nothing without --observation pixels")
        if field.name in ("pretrain_condition", "pretrain_data", "keep_biases", "action_head"):
            if config.recipe in ("normal", "random-frozen"):
                raise ValueError(f"{name} means nothing without --decoupled or --pretrained")
            if config.action_head and field.name != "action_head":
                raise ValueError(f"{name} means nothing with --action-head: stage 1 is over")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but this PyTorch sees no CUDA GPU; "
                         "allowed here: cpu, auto")


def has_fast_bf16(device, backbone):
    """Does bfloat16 make training faster? On a CPU it makes the transformer's attention slower."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch has no public name for it, an older one none at all: then bool(), which is False.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return backbone != "transformer" and supported()


def make_parser():
    """The command line: a flag for each field of Config that has a help text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # One line instead of the whole usage text.
    parser.error = lambda message: parser.exit(2, f"train.py: {message} (--help tells more)\n")
    for field in dataclasses.fields(Config):
        about = dict(field.metadata)
        name = f"--{field.name.replace('_', '-')}"
        rules = {key: about[key] for key in ("choices", "metavar", "help") if key in about}
        if field.name == "recipe":
            group = parser.add_mutually_exclusive_group()
            for recipe, text in about["choices"].items():
                if text:
                    name, _, text = text.partition(": ")
                    group.add_argument(name, dest="recipe", action="store_const", const=recipe,
                                       default="normal", help=text)
        elif field.type is bool and about:
            parser.add_argument(name, action="store_true", **rules)
        elif about:
            parser.add_argument(name, type=field.type, default=field.default, **rules)
    return parser


def parse(arguments=None):
    """The configuration that the command line asks for, and the function that reports bad input."""
    parser = make_parser()
    config = Config(**vars(parser.parse_args(arguments)))
    given = sys.argv[1:] if arguments is None else arguments
    config.command = shlex.join(["python", "train.py", *given])
    try:
        return settings(config), parser.error
    except ValueError as error:
        parser.error(error)


# A run and its folder ----------------------------------------------------------------------------

class Run:
    """A run's folder and what is kept there: its log, its checkpoint, the seconds of each phase.

    A folder belongs to the run whose config.json is in it, from its first moment on. Whatever ends
    the process, --resume goes on from the last checkpoint, to the same bits. Raises ValueError or
    OSError if it cannot, or if a new run cannot have the folder.
    """
    FORMAT = 4     # of config.json and checkpoint.pt
    MAY_DIFFER = "out", "resume", "device", "command"     # the work is the same

    def __init__(self, config):
        self.config, self.bar = config, None
        self.seconds, self.rows, self.saved = {}, [], {"stage": None}
        self.folder = config.out or default_folder(config)
        settings = {name: value for name, value in vars(config).items()
                    if name not in self.MAY_DIFFER}
        text = json.dumps(settings | {"format": self.FORMAT}, indent=1, default=str)
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
        if before.get("format") != self.FORMAT:
            raise ValueError(f"{path} is of another version of this code (format "
                             f"{before.get('format')}, here {self.FORMAT}): begin anew")
        changed = [f"{key} was {before.get(key)!r}, is {asked.get(key)!r}"
                   for key in before | asked if before.get(key) != asked.get(key)]
        if changed:
            raise ValueError(f"{path}: --resume needs the run's own flags: " + "; ".join(changed))
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            print(f"{self.folder} has no checkpoint yet: the run begins anew")
            return
        self.saved = load_file(path, "checkpoint")
        if "rows" not in self.saved:
            raise ValueError(f"{path} is another kind of file")
        self.rows, self.seconds = self.saved["rows"], self.saved["seconds"]
        print(f"{self.folder} goes on from {self.saved['stage']}, update {self.saved['step']}")

    @property
    def is_past_stage1(self):
        """Does this run go on in stage 2? Then all weights come from its checkpoint: `begin`."""
        return self.saved["stage"] == "stage2"

    def begin(self, stage, steps, policy, average, optimizer, schedule):
        """To be called before the first update; returns how many are done already."""
        self.stage, self.steps, self.losses = stage, steps, []
        self.parts = dict(policy=policy, average=average, optimizer=optimizer, schedule=schedule)
        done, self.has_told = 0, False
        if self.saved["stage"] == stage:
            done = self.restore()
        else:
            self.checkpoint(0)
        trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
        tqdm.write(f"{stage}: {steps:,} updates; trained {trained:,} parameters, "
                   f"frozen {count(policy) - trained:,}")
        self.bar = tqdm(desc=stage, initial=done, total=steps, mininterval=1)
        self.first, self.started = done, time.perf_counter()
        self.clock = self.started
        return done

    def after_update(self, step, loss):
        """All that is not the algorithm: log, curve, checkpoint, and playing on the way.

        Raises ArithmeticError if the loss or a weight becomes NaN; the last checkpoint stays good.
        """
        config, done = self.config, step + 1
        self.losses.append(loss.detach())
        self.bar.update()
        is_last = done == self.steps
        is_logged = done % config.log_every == 0 or is_last
        if is_logged:
            loss = self.mean_loss(done)     # waits for the GPU
        now = time.perf_counter()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0) + now - self.clock
        if is_logged:
            success = ""
            if self.stage == "stage2" and done % config.play_every == 0 and not is_last:
                success = self.success_on_the_way()
            self.log(done, loss, self.parts["schedule"].get_last_lr()[0], success)
        if done % config.checkpoint_every == 0 or is_last:
            self.checkpoint(done)
        if is_last:
            self.close()
        if now - self.started > 5 and not self.has_told:
            self.tell_how_long(done, (done - self.first) / (now - self.started))
        self.clock = time.perf_counter()

    def tell_how_long(self, done, rate):
        """Say, once in a stage, how long the updates that are left take at the measured rate."""
        self.has_told = True
        left = self.steps - done + (self.config.steps if self.stage == "stage1" else 0)
        minutes = left / rate / 60
        tqdm.write(f"{rate:.0f} updates a second on this machine: about {minutes:.0f} more minutes "
                   "of training, then the evaluation")

    def mean_loss(self, done):
        """The mean since the last call; ArithmeticError if it, or a weight, is no number."""
        loss = float(torch.stack(self.losses).mean())
        self.losses = []
        if not all(weight.isfinite().all() for weight in self.parts["average"].parameters()):
            loss = math.nan     # it will be, from the next update on
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss became {loss} in {self.stage}, update {done}; try a "
                                  f"lower --learning-rate than {self.config.learning_rate:g}")
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        return loss

    def success_on_the_way(self):
        """Of the average policy, in 50 scenes of each task. It is shown, and nothing is selected
        by it (the paper reports the best of 50 checkpoints)."""
        policy = self.parts["average"].module.eval()
        with timed(self.seconds, "evaluation"):
            results = evaluate_all(policy, self.config.task, min(50, self.config.episodes))
        return scores(*results.values())["success_rate"]

    def log(self, done, *values):
        """A row of metrics.csv, which is written anew: an interrupted run's may be ahead of it."""
        self.rows.append([self.stage, done, round(self.seconds[self.stage], 2), *values])
        header = ["stage", "step", "seconds", "loss", "learning_rate", "success"]
        lines = [",".join(map(str, row)) + "\n" for row in [header, *self.rows]]
        with contextlib.suppress(PermissionError):     # open in a spreadsheet: the next time, then
            with whole(self.folder / "metrics.csv") as unfinished:
                unfinished.write_text("".join(lines), encoding="utf-8")

    def checkpoint(self, done):
        """Keep all that `fit` needs to go on as if nothing had happened."""
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        saved.update(stage=self.stage, step=done, rows=self.rows, seconds=self.seconds,
                     cpu_random=torch.get_rng_state(), cuda_random=[])
        if torch.cuda.is_available():
            saved["cuda_random"] = torch.cuda.get_rng_state_all()
        with whole(self.folder / "checkpoint.pt") as unfinished:
            torch.save(saved, unfinished)

    def restore(self):
        """Load the checkpoint into the parts; returns how many updates are done."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.saved[name])
            torch.set_rng_state(self.saved["cpu_random"])
            if self.saved["cuda_random"]:
                torch.cuda.set_rng_state_all(self.saved["cuda_random"])
        except Exception as error:
            raise OSError(f"{self.folder / 'checkpoint.pt'} does not fit this code "
                          f"({error!r:.80}); move its folder away, begin anew") from None
        return self.saved["step"]

    def close(self):
        """End the progress bar's line."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def timed(seconds, phase):
    """Add what the block takes to seconds[phase]."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0) + time.perf_counter() - start


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


# The whole of it ---------------------------------------------------------------------------------

def prepare(config):
    """The run and its demonstrations; all bad input is found here. Raises ValueError or OSError."""
    torch.manual_seed(config.seed)
    with torch.device("meta"):     # shapes without memory: an impossible backbone is refused
        backbone = new_backbone(config)
    if config.action_head:
        load_backbone(config.action_head, backbone.config)
    run = Run(config)     # first: interrupted from here on, the run can be resumed
    try:
        with timed(run.seconds, "demonstrations"):
            demonstrations = get_demonstrations(config)
    except (ValueError, OSError):
        if not config.resume:
            (run.folder / "config.json").unlink()     # nothing has begun
        raise
    return run, demonstrations


def experiment(config, run=None, demonstrations=None):
    """Train and evaluate; returns the summary. For notebooks: experiment(settings(Config(...)))."""
    if run is None:
        run, demonstrations = prepare(config)
    print(f"{config.recipe} training of {config.backbone}, scale {config.scale}, on task "
          f"{config.task} with {len(demonstrations['episode_ends']):,} demonstrations; on "
          f"{config.device}, {torch.get_num_threads()} thread(s), in {config.precision}")
    with contextlib.closing(run):
        policy = train_policy(config, run, demonstrations)
    policy.save(run.folder / "policy.pt")

    with timed(run.seconds, "evaluation"):
        results = evaluate_all(policy, config.task, config.episodes)
    summary = summarise(policy, results, config, run)
    save_summary(summary, run.folder)     # before anything is drawn, which may fail
    report(summary, run.folder)
    print("next     python -m results.evaluate", shlex.quote(str(run.folder / "policy.pt")),
          "--executed-actions 4")
    with timed(run.seconds, "figures"):
        draw_rollouts(results, run.folder)
        run.rows[-1][-1] = summary["success_rate"]
        draw_curves(run.rows, run.folder / "curves.png")
    summary["seconds"] = dict(run.seconds, total=sum(run.seconds.values()))
    save_summary(summary, run.folder)
    return summary


def main(arguments=None):
    """The command line; returns the summary."""
    config, refuse = parse(arguments)
    try:
        try:
            run, demonstrations = prepare(config)
        except (ValueError, OSError) as error:
            refuse(error)
        return experiment(config, run, demonstrations)
    except KeyboardInterrupt:
        again = "" if config.resume else " --resume"
        sys.exit(f"\ninterrupted; go on with: {config.command}{again}")
    except Exception as error:
        sys.exit(f"train.py: {told(error)}")     # exit code 1


def told(error):
    """What went wrong on the way, in one line; an error of the code itself is raised again."""
    if isinstance(error, (ArithmeticError, OSError)):
        return error
    if isinstance(error, (MemoryError, RuntimeError)) and "allocate" in str(error):
        return f"out of memory ({error!r:.80}); try a smaller --width or --episodes"
    raise error


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"                           # pictures go to files
    if hasattr(sys.stdout, "reconfigure"):                     # a notebook's has no such method
        sys.stdout.reconfigure(errors="backslashreplace")      # a path may hold any letter
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's Ctrl-C
    main()
