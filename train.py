"""The two recipes, end to end: demonstrations, training, evaluation on unseen scenes, pictures.

    python train.py --backbone mlp --decoupled      stage 1, freeze, stage 2 (the paper's recipe)
    python train.py --backbone mlp                  normal: everything learns from demonstrations
    python train.py --help                          all that can be varied

The recipe is `train_policy`, the training loop is `fit`: read these two first, the rest is
plumbing. Paper: section IV-B, eq. 9 and 10 (arXiv 2511.12101v1).
"""
import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# How long a CPU thread spins before it sleeps. With GNU OpenMP's default, two threads stall each
# other on a busy machine; with OMP_WAIT_POLICY=PASSIVE, which never spins, they are hardly
# faster than one. It must be set before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import sim_pusht
from diffusion import DiffusionPolicy
from film import MECHANISMS, make_conditioning
from heads import SIZES, make_backbone
from kinematics import MOTIONS, Motion, PlanarArm

HORIZON, OBS_STEPS, ACTION_DIM = 16, 2, 2      # T, To, A: the paper's, but for A = 10
EVALUATION_SEED = 100_000                      # scenes from this seed on are in no demonstration
# The displacement from the agent, in px, that counts as 1 at each horizon step: how far a target
# runs ahead of the agent, plus the way that the agent makes in the meantime.
ACTION_SCALE = [30 + 12 * step for step in range(HORIZON)]
# PushT's agent trails its target by damping / stiffness = 0.2 s, two control steps. Stage 1 gives
# the arm's path the same lead over the present position.
LEAD = 2

# `paper` is section 2 of the paper's configuration; `laptop` trains a small network fast: a high
# learning rate, two noise draws for each encoded observation, a random 4 of the 16 horizon steps.
# (Where time steps mix, all 16 and one draw: still twice the work.) At such rates training is on
# the edge: hence the clipped gradients and the small betas[1].
SETTINGS = {
    "laptop": dict(batch_size=128, noise_samples=2, loss_steps=4, learning_rate=4e-3, warmup=100,
                   betas=(0.9, 0.98), clip_norm=0.2, ema_decay=0.995, sampling_steps=10,
                   stage1_steps=2500, steps={"full": 10000, "near": 8000},
                   num_demos={"full": 2000, "near": 1500}, log_every=100, checkpoint_every=2000,
                   play_every=1000,     # a multiple of log_every
                   minutes={"full": "7 minutes on 2 cores", "near": "5 minutes on 2 cores"}),
    "paper": dict(batch_size=64, noise_samples=1, loss_steps=None, learning_rate=1e-4, warmup=500,
                  betas=(0.95, 0.999), clip_norm=math.inf, ema_decay=0.9999, sampling_steps=None,
                  stage1_steps=45000, steps=83000, num_demos={"full": 2000, "near": 1500},
                  log_every=100, checkpoint_every=2000, play_every=10000,
                  minutes="hours on a GPU"),
}
SMOKE = dict(steps=150, stage1_steps=100, num_demos=40, log_every=25, play_every=100,
             minutes="under a minute")


# The recipe --------------------------------------------------------------------------------------

def train_policy(config, run, demonstrations, device):
    """Normal and decoupled training, and their controls; returns the policy in evaluation mode."""
    backbone = make_backbone(config.backbone, config.scale, ACTION_DIM, HORIZON,
                             config.conditioning, config.width, config.depth)

    def new_policy(observation, **settings):
        conditioning = make_conditioning(backbone, observation, **settings)
        noise_samples, loss_steps = ((1, None) if backbone.mixes_time else
                                     (config.noise_samples, config.loss_steps))
        return DiffusionPolicy(conditioning, backbone, ACTION_SCALE, OBS_STEPS,
                               config.executed_actions, config.sampling_steps,
                               not config.absolute_actions, noise_samples, loss_steps).to(device)

    if config.recipe in ("decoupled", "pretrained") and not run.is_past("stage1"):
        # Stage 1: backbone and a conditioning on joint angles, on free kinematic data.
        policy = new_policy(config.pretrain_condition, horizon=config.pretrain_tokens)
        next_batch = kinematic_batches(demonstrations, config, device)
        fit("stage1", policy, policy, next_batch, config, run)

    # Stage 2, with a fresh conditioning on observations. Normal training is this alone.
    policy = new_policy("state", obs_steps=OBS_STEPS, corners=sim_pusht.KEYPOINTS.tolist(),
                        goal=sim_pusht.GOAL.tolist(), features=config.features)
    trained = policy
    if config.recipe in ("decoupled", "random-frozen"):
        backbone.requires_grad_(False)     # by module: all of it, and nothing else
        trained = policy.conditioning
        if config.train_key_values:        # not in the paper, see --help
            thawed = [block.cross_attention.key_value for block in backbone.blocks]
            trained = nn.ModuleList([policy.conditioning, *thawed]).requires_grad_(True)
    fit("stage2", policy, trained, demonstration_batches(demonstrations, config, device),
        config, run)
    return policy.eval()


def fit(stage, policy, trained, next_batch, config, run):
    """Train the module `trained` (the policy, or a part of it) to lower policy.loss.

    AdamW, warm-up then cosine to zero, and an exponential moving average (EMA) of the weights,
    which is what is left in `trained` at the end. `next_batch()` gives the arguments of
    policy.loss. Ctrl-C saves a checkpoint after the present update and raises KeyboardInterrupt;
    a loss that becomes NaN raises ArithmeticError and leaves the last checkpoint as it is.
    """
    steps = config.stage1_steps if stage == "stage1" else config.steps
    tqdm.write(f"{stage}: {steps:,} updates; trained {count(trained):,} parameters, "
               f"frozen {count(policy) - count(trained):,}")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.learning_rate,
                                  betas=config.betas, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (
        min(1, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))))
    # Frozen weights need no average: only the trained part is copied.
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    parts = dict(policy=policy, average=average, optimizer=optimizer, schedule=schedule)
    done, total, logged = run.restore(stage, parts), 0.0, 0
    start, interrupts = time.perf_counter() - run.seconds.get(stage, 0), []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    policy.train()
    try:
        bar = tqdm(range(done + 1, steps + 1), stage, initial=done, total=steps, mininterval=1)
        for step in bar:
            with torch.autocast(config.device, torch.bfloat16, config.precision == "bf16"):
                loss = policy.loss(*next_batch())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), config.clip_norm)
            optimizer.step()
            schedule.step()
            average.update_parameters(trained)
            total, logged = total + loss.detach(), logged + 1
            if step % config.log_every == 0 or step == steps or interrupts:
                mean, total, logged = float(total) / logged, 0.0, 0   # a read waits for the GPU
                if not math.isfinite(mean):
                    raise ArithmeticError(f"the loss became {mean} in {stage}, update {step}; try "
                                          "a lower --learning-rate than "
                                          f"{config.learning_rate:g}")
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                run.seconds[stage] = time.perf_counter() - start
                success = ""
                if stage == "stage2" and step % config.play_every == 0 and step < steps:
                    success = try_out(policy, trained, average, config)
                    pause = time.perf_counter() - start - run.seconds[stage]
                    run.seconds["evaluation"] = run.seconds.get("evaluation", 0) + pause
                    start += pause
                run.log(stage, step, mean, schedule.get_last_lr()[0], success)
            if step % config.checkpoint_every == 0 or step == steps or interrupts:
                run.checkpoint(stage, step, parts)
            if interrupts:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, handler)
    trained.load_state_dict(average.module.state_dict())


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The data ----------------------------------------------------------------------------------------

def kinematic_batches(demonstrations, config, device):
    """Stage 1: () -> joint angles (B,T,N), end-effector positions (B,T,A), present position (B,A).

    Angles and positions are of the same instants, as in the paper: what the denoiser learns is
    forward kinematics. Each window is new, made on the device and never stored.
    --pretrain-condition takes the positions themselves or nothing instead of the angles (section
    IV-D of v2), --pretrain-data another motion, or the agent's own in the demonstrations.
    """
    length, arm = HORIZON + LEAD, PlanarArm(motion=MOTIONS.get(config.pretrain_data, Motion()))
    generator = (torch.default_generator if device.type == "cpu"
                 else torch.cuda.default_generators[torch.cuda.current_device()])
    if config.pretrain_data == "demonstrations":
        agents = torch.as_tensor(demonstrations["state"][:, :2], dtype=torch.float32, device=device)
        joints, window = arm.inverse(agents), windows(demonstrations, 0, length, device)

    def next_batch():
        if config.pretrain_data == "demonstrations":
            chosen = window[torch.randint(len(window), (config.batch_size,), device=device)]
            angles, positions = joints[chosen], agents[chosen]
        else:
            angles, positions = arm.sample_windows(config.batch_size, length, generator)
        condition = angles if config.pretrain_condition == "joints" else positions
        return (condition[:, LEAD:LEAD + config.pretrain_tokens], positions[:, LEAD:],
                positions[:, OBS_STEPS - 1])
    return next_batch


def windows(demonstrations, first, length, device):
    """For each frame, the indices of those from frame + first on, `length` of them: (frames, length).

    At an episode's edges its first or last frame is repeated.
    """
    ends = torch.as_tensor(demonstrations["episode_ends"], device=device)
    frame = torch.arange(len(demonstrations["state"]), device=device)
    episode = torch.searchsorted(ends, frame, right=True)
    starts = torch.cat([ends.new_zeros(1), ends])[episode]
    window = frame[:, None] + torch.arange(first, first + length, device=device)
    return window.clamp(starts[:, None], ends[episode, None] - 1)


def demonstration_batches(demonstrations, config, device):
    """Stage 2: () -> states (B,To,5), actions (B,T,A), random windows of the demonstrations.

    A window starts one step before the present. Steps that are repeated at an episode's edges
    count in the loss, as in the official code.
    """
    states, actions = (torch.as_tensor(demonstrations[key], dtype=torch.float32, device=device)
                       for key in ("state", "action"))
    window = windows(demonstrations, 1 - OBS_STEPS, HORIZON, device)

    def next_batch():
        chosen = window[torch.randint(len(window), (config.batch_size,), device=device)]
        return states[chosen[:, :OBS_STEPS]], actions[chosen]
    return next_batch


def get_demonstrations(config):
    """The file of --demos, or the scripted expert's demonstrations, made once and kept in runs/."""
    path = config.demos
    if path is None:
        # The fingerprint makes sure that no kept file outlives a change of the simulator.
        fingerprint = hashlib.sha1(Path(sim_pusht.__file__).read_bytes()).hexdigest()[:8]
        path = Path(f"runs/demonstrations/{config.task}-{config.num_demos}-{fingerprint}.npz")
        if not path.exists():
            demonstrations = sim_pusht.expert_demonstrations(config.num_demos, config.task, seed=0)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, lambda unfinished: np.savez_compressed(unfinished, **demonstrations))
    demonstrations = sim_pusht.load_demonstrations(path)
    ends = demonstrations["episode_ends"][:config.num_demos]
    if config.num_demos and len(ends) < config.num_demos:
        raise ValueError(f"--num-demos {config.num_demos}, but {path} holds {len(ends)}")
    return {key: demonstrations[key][:ends[-1]] for key in ("state", "action")} | {
        "episode_ends": ends}


# Evaluation --------------------------------------------------------------------------------------

def evaluate(policy, task, episodes, max_steps=300):
    """Play unseen scenes, each until coverage > 0.95 or for max_steps: see sim_pusht.play."""
    env = sim_pusht.PushT(episodes, task, max_steps=max_steps)
    env.reset(EVALUATION_SEED)
    generator = torch.Generator(policy.action_scale.device).manual_seed(EVALUATION_SEED)
    return sim_pusht.play(env, lambda past: policy.act(past, generator).cpu().numpy(),
                          policy.obs_steps)


def try_out(policy, trained, average, config):
    """Success on the way: the averaged weights in 50 of the scenes. Training goes on as if nothing
    had happened, and nothing is selected by it (the paper reports the best of 50 checkpoints)."""
    present = {name: weight.clone() for name, weight in trained.state_dict().items()}
    trained.load_state_dict(average.module.state_dict())
    result = evaluate(policy.eval(), config.task, min(50, config.episodes))
    trained.load_state_dict(present)
    policy.train()
    return scores(result)["success_rate"]


def scores(result):
    """Score and success rate with standard errors; the definitions are the benchmark's."""
    score = np.clip(result["max_coverage"] / 0.95, 0, 1)
    success = result["max_coverage"] > 0.95
    n = len(score)
    return dict(episodes=n, score=score.mean(), score_se=score.std() / n ** 0.5,
                success_rate=success.mean(), success_se=success.std() / n ** 0.5,
                max_coverage=result["max_coverage"].mean(),
                final_coverage=result["final_coverage"].mean())


def draw_curves(rows, summary, path):
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for stage in dict.fromkeys(row[0] for row in rows):
        steps, losses = zip(*[(row[1], row[3]) for row in rows if row[0] == stage])
        left.plot(steps, losses, label=stage)
    left.set(xlabel="update", ylabel="noise-prediction error (MSE)", yscale="log")
    left.legend()
    played = [(row[1], row[5]) for row in rows if row[5] != ""]
    right.plot(*zip(*played, (rows[-1][1], summary["success_rate"])), "C1o-")
    right.set(xlabel="update of stage 2", ylabel="success (50 scenes; the last: all)", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    write(path, lambda unfinished: figure.savefig(unfinished, dpi=110))
    plt.close(figure)


# A run and its folder ----------------------------------------------------------------------------

def write(path, content):
    """Write a file that appears under its name only when it is complete.

    content: text, or a function that writes to the path that it is given.
    """
    unfinished = path.with_name(f"unfinished-{os.getpid()}-{path.name}")
    unfinished.write_text(content) if isinstance(content, str) else content(unfinished)
    unfinished.replace(path)


class Run:
    """What a run keeps: seconds per phase, the rows of metrics.csv, its checkpoint.

    With --resume it goes on from checkpoint.pt. Raises ValueError if there is none or if it is
    another configuration's, if the folder holds a run that would be lost; OSError if the folder
    cannot be written.
    """
    MAY_DIFFER = "out", "resume", "evaluate", "device", "threads", "command"     # the same work

    def __init__(self, config):
        self.folder, self.seconds, self.rows, self.saved = config.out, {}, [], None
        checkpoint, kept = self.folder / "checkpoint.pt", self.folder / "config.json"
        text = json.dumps({key: value for key, value in vars(config).items()
                           if key not in self.MAY_DIFFER}, indent=1, default=str)
        if config.resume:
            try:
                before, asked = json.loads(kept.read_text()), json.loads(text)
                self.saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
                self.rows, self.seconds = self.saved["rows"], self.saved["seconds"]
            except FileNotFoundError:
                raise ValueError(f"nothing to resume: no checkpoint in {self.folder}") from None
            except Exception as error:     # torch raises many kinds for a damaged file
                raise ValueError(f"{checkpoint} is damaged: {type(error).__name__}") from None
            changed = [f"{key} was {before.get(key)!r}, is {asked.get(key)!r}"
                       for key in before | asked if before.get(key) != asked.get(key)]
            if changed:
                raise ValueError("--resume needs the run's own flags: " + "; ".join(changed))
        elif checkpoint.exists():
            raise ValueError(f"{self.folder} holds a run: --resume it, or choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        write(kept, text)

    def log(self, stage, step, loss, learning_rate, success):
        self.rows.append([stage, step, round(self.seconds[stage], 2), loss, learning_rate, success])
        lines = [["stage", "step", "seconds", "loss", "learning_rate", "success"], *self.rows]
        write(self.folder / "metrics.csv", "".join(",".join(map(str, row)) + "\n" for row in lines))

    def checkpoint(self, stage, step, parts):
        """Keep all that `fit` needs to go on as if nothing had happened."""
        saved = {name: part.state_dict() for name, part in parts.items()}
        saved.update(stage=stage, step=step, rows=self.rows, seconds=self.seconds,
                     cpu_random=torch.get_rng_state(),
                     cuda_random=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        write(self.folder / "checkpoint.pt", lambda unfinished: torch.save(saved, unfinished))

    def is_past(self, stage):
        return self.saved is not None and self.saved["stage"] > stage

    def restore(self, stage, parts):
        """Load the checkpoint if it is of this stage; returns how many updates are done."""
        if self.saved is None or self.saved["stage"] != stage:
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.saved[name])
        torch.set_rng_state(self.saved["cpu_random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.saved["cuda_random"])
        return self.saved["step"]


def code_version():
    """The commit of this code, if it is a checkout and git is installed."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], text=True,
                              cwd=Path(__file__).parent, capture_output=True).stdout.strip()
    except OSError:
        return ""


def summarise(policy, config, folder, seconds):
    """Evaluate the policy, draw it into `folder`, write and return summary.json."""
    clock = time.perf_counter()
    result = evaluate(policy, config.task, config.episodes)
    seconds["evaluation"] = seconds.get("evaluation", 0) + time.perf_counter() - clock
    clock = time.perf_counter()
    sim_pusht.draw_rollouts(result["states"], result["length"], folder)
    seconds["figures"] = time.perf_counter() - clock
    summary = dict(command=config.command, task=config.task, seed=config.seed, **scores(result),
                   executed_actions=config.executed_actions, device=config.device,
                   threads=torch.get_num_threads(), torch=torch.__version__, commit=code_version())
    if not config.evaluate:
        updates = dict(stage1=config.stage1_steps, stage2=config.steps)
        frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
        summary |= dict(
            backbone=config.backbone, conditioning=config.conditioning, recipe=config.recipe,
            scale=config.scale, parameters=dict(
                backbone=count(policy.backbone), conditioning=count(policy.conditioning),
                trained=count(policy) - frozen, frozen=frozen),
            seconds=seconds | dict(total=sum(seconds.values())),
            iterations_per_second={stage: updates[stage] / seconds[stage]
                                   for stage in updates if stage in seconds})
    write(folder / "summary.json", json.dumps(summary, indent=1, default=float))
    return summary


# The command line --------------------------------------------------------------------------------

def positive(kind):
    """An argparse type: an int or a float above 0."""
    def number(text):
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return kind(text)
    return number


def parse(arguments):
    """The configuration, every default filled in, and the function that reports bad input."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # One line instead of the whole usage text.
    parser.error = lambda message: parser.exit(2, f"train.py: {message} (--help tells more)\n")

    group = parser.add_argument_group("the recipe")
    flag, recipe = group.add_argument, group.add_mutually_exclusive_group().add_argument
    flag("--backbone", default="mlp", choices=sorted({name for name, _ in SIZES}))
    flag("--conditioning", default="film", choices=MECHANISMS, help="how the backbone takes its "
         "condition; default film")
    recipe("--decoupled", dest="recipe", action="store_const", const="decoupled", default="normal",
           help="pretrain the backbone on free kinematic data, freeze it, train the conditioning; "
           "default: train everything at once, on demonstrations")
    recipe("--random-backbone", dest="recipe", action="store_const", const="random-frozen",
           help="control: freeze a backbone that learned nothing")
    recipe("--pretrained", dest="recipe", action="store_const", const="pretrained",
           help="control: as --decoupled, but freeze nothing")
    flag("--task", default="full", choices=["full", "near"], help="the benchmark's start scenes, or "
         "the quick lesson: block within 60 px and 0.75 rad of the goal; default full")
    flag("--seed", type=int, default=0, help="of initialisation and batches; default 0")
    flag("--smoke", action="store_true", help="all of it once in under a minute, without success")

    flag = parser.add_argument_group("stage 1").add_argument
    flag("--pretrain-condition", default="joints", choices=["joints", "pose", "none"], help="what "
         "the denoiser is conditioned on; default joints")
    flag("--pretrain-data", default="arm", choices=[*MOTIONS, "demonstrations"], help="the motion: "
         "of kinematics.py, with too fast or too smooth statistics, or the agent's own in the "
         "demonstrations; default arm")
    flag("--pretrain-tokens", type=int, choices=range(1, HORIZON + 1), default=HORIZON, metavar="N",
         help="condition on the first N of the 16 steps; default all, as in the paper")
    flag("--train-key-values", action="store_true", help="with cross-attention and a frozen "
         "backbone: leave what projects the condition's tokens trainable")

    flag = parser.add_argument_group("size and training; * is set by --scale").add_argument
    flag("--scale", choices=SETTINGS, help="default laptop on a CPU, paper on a GPU")
    flag("--width", type=positive(int), help="of DP-MLP or DP-T instead of the scale's")
    flag("--depth", type=positive(int), help="blocks of DP-MLP or DP-T instead of the scale's")
    flag("--demos", metavar="FILE", type=Path, help="demonstrations from an .npz (state, action, "
         "episode_ends) instead of the scripted expert's")
    flag("--num-demos", type=positive(int), help="* how many demonstrations; of a file, all")
    flag("--stage1-steps", type=positive(int), help="* updates in stage 1")
    flag("--steps", type=positive(int), help="* updates in stage 2, or in normal training")
    flag("--batch-size", type=positive(int), help="* observations in an update")
    flag("--learning-rate", type=positive(float), help="* the highest, after warm-up")
    flag("--features", default="relative", choices=["relative", "keypoints"], help="what the "
         "observation encoder looks at (film.StateEncoder); default relative")
    flag("--absolute-actions", action="store_true", help="denoise positions on the board, as the "
         "paper does, not displacements from the agent")
    flag("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16 is faster on a GPU or a "
         "CPU with AVX512-BF16; default fp32")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    flag("--threads", type=positive(int), help="CPU threads; default all cores")

    flag = parser.add_argument_group("evaluation and files").add_argument
    flag("--episodes", type=positive(int), default=200, help="evaluation scenes; default 200")
    flag("--executed-actions", type=int, choices=range(1, HORIZON - OBS_STEPS + 2), default=8,
         metavar="N", help="how many actions of each chunk of 16 are carried out; default 8, the "
         "paper's")
    flag("--evaluate", metavar="POLICY", type=Path, help="train nothing, score this policy.pt (see "
         "--task, --episodes, --executed-actions)")
    flag("--out", type=Path, help="the run's folder; default runs/<what distinguishes it>")
    flag("--resume", action="store_true", help="go on from the checkpoint in the run's folder")

    config = parser.parse_args(arguments)
    config.command = " ".join(["python train.py",
                               *(sys.argv[1:] if arguments is None else arguments)])
    if config.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this PyTorch sees no CUDA GPU; allowed here: cpu, auto")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.train_key_values and (config.conditioning != "cross-attention" or
                                    config.recipe not in ("decoupled", "random-frozen")):
        parser.error("--train-key-values needs --conditioning cross-attention and a frozen backbone")
    config.scale = config.scale or ("paper" if config.device == "cuda" else "laptop")
    for key, value in (SETTINGS[config.scale] | (SMOKE if config.smoke else {})).items():
        if getattr(config, key, None) is None and not (key == "num_demos" and config.demos):
            setattr(config, key, value[config.task] if isinstance(value, dict) else value)
    if config.smoke:
        config.episodes = min(config.episodes, 16)
    if config.out is None:
        name = "-".join([config.backbone, *([config.conditioning] if config.conditioning != "film"
                                            else []), config.recipe, config.task, config.scale,
                         f"seed{config.seed}", *(["smoke"] if config.smoke else [])])
        folders = [Path("runs") / (f"{name}-{i}" if i > 1 else name) for i in range(1, 1000)]
        # A new run never writes over an older one; --resume means the latest.
        free = next(i for i, folder in enumerate(folders) if not (folder / "checkpoint.pt").exists())
        config.out = folders[max(free - 1, 0) if config.resume else free]
    return config, parser.error


def main(arguments=None):
    """The command line; returns the summary, for notebooks and tests."""
    config, refuse = parse(arguments)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    try:
        if config.evaluate:
            policy, seconds = DiffusionPolicy.load(config.evaluate, config.device), {}
            policy.executed_actions = config.executed_actions
            folder = config.evaluate.with_name(
                f"{config.evaluate.stem}-{config.task}-executing-{config.executed_actions}")
            folder.mkdir(exist_ok=True)
        else:
            with torch.device("meta"):     # refuses an impossible pair before anything is written
                make_backbone(config.backbone, config.scale, conditioning=config.conditioning,
                              width=config.width, depth=config.depth)
            run, clock = Run(config), time.perf_counter()
            demonstrations = get_demonstrations(config)
            folder, seconds = run.folder, run.seconds
            seconds.setdefault("demonstrations", time.perf_counter() - clock)
    except (ValueError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted before training")
    if not config.evaluate:
        longer = config.scale == "laptop" and config.backbone != "mlp" and not config.smoke
        print(f"{config.recipe} training of {config.backbone} on task {config.task}, with "
              f"{len(demonstrations['episode_ends']):,} demonstrations of "
              f"{len(demonstrations['state']):,} steps. {config.scale.capitalize()} scale, on "
              f"{config.device} with {torch.get_num_threads()} thread(s): about "
              f"{'twice ' * longer}{config.minutes}.")
    try:
        if not config.evaluate:
            policy = train_policy(config, run, demonstrations, torch.device(config.device))
            policy.save(folder / "policy.pt")
        summary = summarise(policy, config, folder, seconds)
        if not config.evaluate:
            draw_curves(run.rows, summary, folder / "curves.png")
    except ArithmeticError as error:
        sys.exit(f"train.py: {error}")     # exit code 1
    except KeyboardInterrupt:
        again = "" if config.resume or config.evaluate else " --resume"
        sys.exit(f"\ninterrupted; go on with: {config.command}{again}")

    line = lambda values, form: ", ".join(f"{key} {value:{form}}" for key, value in values.items())
    print(f"\nscore    {summary['score']:.3f} +- {summary['score_se']:.3f}  mean of max coverage / "
          f"0.95, at most 1 ({summary['episodes']} unseen scenes, task {summary['task']})\n"
          f"success  {summary['success_rate']:.3f} +- {summary['success_se']:.3f}  coverage > 0.95 "
          f"within 300 steps, {summary['executed_actions']} actions executed of each chunk")
    if not config.evaluate:
        print(f"seconds  {line(summary['seconds'], '.0f')}\n"
              f"updates  a second: {line(summary['iterations_per_second'], '.1f')}\n"
              f"weights  {line(summary['parameters'], ',')}\n"
              f"next     python train.py --evaluate {folder / 'policy.pt'} --executed-actions 4")
    print(f"see      rollouts.png, rollout.gif and summary.json in {folder}")
    return summary


if __name__ == "__main__":
    main()
