"""See the claim: exchange the conditioning in the middle of an episode; the frozen head stays.

    python -m results.swap A.pt B.pt      two policies with the same head: the tables of this pair
    python -m results.swap G.pt           a policy for several goals: its goal moves, nothing else
    python -m results.swap                makes all runs that are missing, measures all seeds, and
                                          writes results/swap.json, .md, .png and .gif

Two decoupled policies that were made from one --action-head, or with one seed, hold the same
backbone, bit for bit. All that differs between them is `policy.conditioning`: by construction the
task is in there. What can fail, and is measured, is the exchange in the middle of an episode.
1. The swap. Policy A plays until the block covers A's goal, or for 300 steps. There the
   conditioning of B takes A's place in the same head, and then A's comes back: three legs.
2. Controls: no swap; conditionings that were trained with another seed's head; a head frozen at
   random; normally trained policies, whose backbones differ (--different-heads); the moving goal.
3. Where is the task? Only some blocks, or only the last denoising steps, get B's modulations.
4. How much do gamma and beta depend on the observation, on the timestep, and on the task?
"""
import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import sim_pusht
import train
from diffusion import DiffusionPolicy
from results import compare, report, swap_report
from results.evaluate import bounded, goals_of, tasks_of

LEG = 300        # control steps that a leg may take
WHERE = 200      # control steps with the modulations of two conditionings
# Stage 1 knows no task: of one seed, the decoupled policies of `full` and `away` hold the same
# head, bit for bit, and their two policies with a random head share that. (check_pair looks.)
# A row, as in compare.py: label | flags of train.py | what the paper has, which is nothing here.
RUNS = compare.Preset("Can one see it?", """
    full, decoupled | --task full MLP --decoupled            | -
    away, decoupled | --task away MLP --decoupled            | -
    full, random    | --task full MLP --random-backbone      | -
    away, random    | --task away MLP --random-backbone      | -
    full, normal    | --task full MLP                        | -
    away, normal    | --task away MLP                        | -
    several goals   | --task full,away,corner MLP --decoupled | -
    """, task="", seeds=3)
# The rows of the table. The first is the claim.
SWAP = "the conditioning is swapped"
STAYS = "control: the conditioning stays"
OTHER_SEED = "control: conditionings of another seed's head"
RANDOM = "control: in a head of random weights, frozen"
NORMAL = "control: in a normally trained backbone"
MOVES = "one policy for several goals: the goal moves"
DIFFER = "the conditioning is swapped, the heads differ"     # of two files
EVERYTHING = "all blocks, all denoising steps"


# The pair ----------------------------------------------------------------------------------------

def check_pair(first, second, different_heads=False):
    """Raise ValueError, in one line, for two policies between which nothing can be exchanged."""
    for policy in (first, second):
        if len(goals_of(policy)) > 1:
            raise ValueError("a policy for several goals is given alone: its goal moves")
    if goals_of(first) == goals_of(second):
        raise ValueError(f"both policies pursue one goal, that of task {tasks_of(first)}")
    for part in ("observation", "obs_steps"):
        ours, theirs = (policy.conditioning.encoder.config[part] for policy in (first, second))
        if ours != theirs:
            raise ValueError(f"the policies observe differently: {part} {ours} and {theirs}")
    ours, theirs = first.backbone, second.backbone
    sizes = [f"{key} {ours.config.get(key)} and {theirs.config.get(key)}"
             for key in ours.config | theirs.config
             if ours.config.get(key) != theirs.config.get(key)]
    if sizes:
        raise ValueError(f"the policies hold heads of different kinds: {'; '.join(sizes)}")
    equal = map(torch.equal, ours.state_dict().values(), theirs.state_dict().values())
    if not different_heads and not all(equal):
        raise ValueError("the policies hold different heads; make the second with --decoupled "
                         "--action-head and the action_head.pt of the first, or, for a control, "
                         "add --different-heads")


def with_conditioning(policy, other):
    """The backbone of `policy` with the conditioning of `other`: all that a swap is."""
    return DiffusionPolicy(other.conditioning, policy.backbone, **policy.config).eval()


class Mixture(DiffusionPolicy):
    """A policy that takes some of its modulations from the conditioning of another one.

    blocks: numbers of the blocks, from 0, that the other one modulates; timesteps: in which
    denoising steps it does so. Both conditionings encode the observation, each with its own Phi.
    """

    def __init__(self, policy, other, blocks, timesteps):
        super().__init__(policy.conditioning, policy.backbone, **policy.config)
        self.other, self.blocks, self.timesteps = other.conditioning, set(blocks), set(timesteps)
        self.eval()

    def sample(self, observations, generator=None):
        perceived = self.other.encoder.perceive(observations)
        self.their_o = self.other.encode(perceived)
        return super().sample(observations, generator)

    def predict_noise(self, noisy_actions, timestep, o, steps=None):
        tau = self.backbone.time_encoder(timestep)
        modulations = self.conditioning(o, tau)
        if int(timestep[0]) in self.timesteps:
            theirs = self.other(self.their_o, tau)
            modulations = [theirs[block] if block in self.blocks else modulation
                           for block, modulation in enumerate(modulations)]
        return self.backbone(noisy_actions, modulations, steps)


# Playing -----------------------------------------------------------------------------------------

def play_leg(policy, task, history, steps, generator, stops=True):
    """Go on from the last states (B, To, 5) to the goal of `task`: what sim_pusht.play returns.

    stops: a scene ends where the block covers this goal. The agent begins at rest.
    """
    env = sim_pusht.PushT(len(history), task, max_steps=steps,
                          success_threshold=0.95 if stops else 2.0)     # 2: never
    env.set_state(history[:, -1])
    first = [history]

    def act(past):
        # At first `past` is one state twice: sim_pusht.play does not know what was before.
        past = first.pop() if first else past
        seen = sim_pusht.observe(past, policy.conditioning.encoder.observation, env.goal)
        return policy.act(seen, generator).cpu().numpy()

    return sim_pusht.play(env, act, policy.obs_steps)


def new_scenes(policy, task, scenes):
    """The evaluation's first states as a history (B, To, 5), and a generator for the noise."""
    states = sim_pusht.PushT(scenes, task).reset(train.EVALUATION_SEED)
    generator = torch.Generator().manual_seed(train.EVALUATION_SEED)
    return np.repeat(states[:, None], policy.obs_steps, 1), generator


def last_states(states, times, obs_steps):
    """What is observed (n, To, 5) of n scenes, each at its own of `times`; states (steps, n, 5)."""
    steps = np.array(times) + np.arange(1 - obs_steps, 1)[:, None]     # (To, n)
    return states[np.maximum(steps, 0), np.arange(len(times))].swapaxes(0, 1)


def play_legs(policies, tasks, scenes):
    """One policy and task after the other, each scene from where its last leg ended.

    Returns the result of each leg, see sim_pusht.play. All scenes go on, solved or not.
    """
    history, generator = new_scenes(policies[0], tasks[0], scenes)
    results = []
    for policy, task in zip(policies, tasks):
        result = play_leg(policy, task, history, LEG, generator)
        history = last_states(result["states"], result["length"], policy.obs_steps)
        results.append(result)
    return results


def legs_of(label, policies, tasks, scenes):
    """The row `label` of the table, and what was played."""
    results = play_legs(policies, tasks, scenes)
    legs = [{key: train.scores(result)[key] for key in ("success_rate", "success_se")}
            for result in results]
    return {"cell": label, "tasks": tasks, "scenes": scenes, "legs": legs}, results


def there_and_back(policy, other):
    """The policies of the three legs: the head of `policy` with its own conditioning or other's."""
    return [policy, with_conditioning(policy, other), policy]


# Where is the task? ------------------------------------------------------------------------------

def parts_of(policy):
    """What can be exchanged: (name, blocks, timesteps) of blocks, neighbours and last steps."""
    number = len(policy.backbone.modulation_widths)
    timesteps = list(policy.ddpm.timesteps(policy.sampling_steps))
    parts = [("nothing", [], [])]
    for size in range(1, number):     # all blocks: the last part below
        for first in range(number - size + 1):
            blocks = range(first, first + size)
            numbers = " ".join(str(block + 1) for block in blocks)
            parts.append((f"block{'s' * (size > 1)} {numbers}", blocks, timesteps))
    counts = sorted({max(1, len(timesteps) * tenth // 10) for tenth in range(1, 11)})
    parts += [(f"last {count} denoising step{'s' * (count > 1)}", range(number),
               timesteps[-count:]) for count in counts[:-1]]
    return parts + [(EVERYTHING, range(number), timesteps)]


def where(policy, other, tasks, scenes):
    """Success and score at both goals, for each part that `other` modulates: a cell for each.

    All scenes are played for WHERE steps, whatever the block covers on the way.
    """
    cells = []
    for name, blocks, timesteps in tqdm(parts_of(policy), desc="where", leave=False):
        history, generator = new_scenes(policy, tasks[0], scenes)
        mixture = Mixture(policy, other, blocks, timesteps)
        states = play_leg(mixture, tasks[0], history, WHERE, generator, stops=False)["states"]
        cell = {"cell": name, "goals": []}
        for task in tasks:
            covered = sim_pusht.block_coverage(states[..., 2:], sim_pusht.TASKS[task][1]).max(0)
            found = train.scores(dict(max_coverage=covered, final_coverage=covered))
            cell["goals"].append({"task": task} | {
                key: found[key] for key in ("success_rate", "success_se", "score", "score_se")})
        cells.append(cell)
    return cells


# The modulations ---------------------------------------------------------------------------------

@torch.no_grad()
def modulations_of(policy, observations, timesteps):
    """One array (timesteps, S, V, D_r) for each block; observations (S, To, 5)."""
    encoder = policy.conditioning.encoder
    o = policy.conditioning.encode(encoder.perceive(encoder.read(observations, "cpu")))
    found = []
    for timestep in timesteps:
        tau = policy.backbone.time_encoder(torch.full((len(o),), timestep))
        found.append([m[:, :, 0].numpy() for m in policy.conditioning(o, tau)])
    return [np.stack(block) for block in zip(*found)]


def shares(values):
    """Of the variance of values (task, timestep, observation, D): the share that is due to what.

    A share is the variance of the means over all else, as in an analysis of variance. "task x
    observation": what the task makes of the observation, beyond the sum of both.
    """
    def variance_of_means(*kept):     # of the means over all axes but those kept
        others = tuple({0, 1, 2} - set(kept))
        return values.mean(others).var(tuple(range(len(kept)))).sum()

    whole = values.var((0, 1, 2)).sum()
    task, timestep, observation = map(variance_of_means, range(3))
    found = {"observation": observation, "timestep": timestep, "task": task,
             "task x observation": variance_of_means(0, 2) - task - observation}
    found = {name: float(value / whole) for name, value in found.items()}
    return found | {"rest": 1 - sum(found.values())}


def observations_on_the_way(result, obs_steps, number=64):
    """Observations (number, To, 5) of `number` scenes, each at another part of its way."""
    number = min(number, len(result["length"]))
    times = result["length"][:number] * np.arange(number) // number
    return last_states(result["states"], times, obs_steps)


def modulations(policies, result):
    """Of both policies in the states of `result`: cells of shares, and gammas for the heat maps."""
    policy = policies[0]
    seen = observations_on_the_way(result, policy.obs_steps)
    timesteps = list(policy.ddpm.timesteps(policy.sampling_steps))
    both = zip(*(modulations_of(each, seen, timesteps) for each in policies))
    blocks = [np.stack(block) for block in both]     # each (task, timestep, S, V, D)
    names = {1: ["beta"], 2: ["gamma", "beta"], 3: ["gamma", "beta", "alpha"]}
    cells = [{"cell": f"block {r + 1}, {name}", "shares": shares(block[..., v, :])}
             for r, block in enumerate(blocks) for v, name in enumerate(names[block.shape[3]])]
    identity = policy.backbone.mechanism.identity[0]
    # Gamma in the last denoising step, in 16 scenes.
    return cells, [block[:, -1, :16, 0] - identity for block in blocks]


def frames_of(policies, tasks, results):
    """One scene through all legs: [(picture, modulations (R, numbers), title), ...].

    Of all scenes that solve the most legs it is the quickest. Modulations: gamma - 1 and beta of
    every fourth feature at the last denoising step, a row for each block.
    """
    lengths = np.stack([result["length"] for result in results])
    solved = np.stack([result["max_coverage"] > 0.95 for result in results]).sum(0)
    scene = np.lexsort([lengths.sum(0), -solved])[0]
    identity = np.array(policies[0].backbone.mechanism.identity)[:, None]
    frames = []
    for number, (policy, task, result) in enumerate(zip(policies, tasks, results)):
        states, length = result["states"][:, scene], result["length"][scene]
        times = [*range(0, length, 5), *[length] * 4]     # the last one stays for a while
        past = last_states(result["states"][:, [scene] * len(times)], times, policy.obs_steps)
        _, goal = sim_pusht.TASKS[task]
        seen = sim_pusht.observe(past, policy.conditioning.encoder.observation, goal)
        strips = [(m[0] - identity)[..., ::4].reshape(len(times), -1)
                  for m in modulations_of(policy, seen, [0])]
        width = max(strip.shape[1] for strip in strips)
        strips = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]))) for strip in strips]
        title = f"leg {number + 1}: the conditioning of task {task} is in the head"
        frames += zip(sim_pusht.draw_states(states[times], 192, goal), np.stack(strips, 1),
                      [title] * len(times))
    return frames


# Measuring ---------------------------------------------------------------------------------------

def measure_pair(first, second, label, scenes):
    """Legs, parts and modulations of one pair: cells, and what swap_report.publish draws."""
    tasks = [tasks_of(first), tasks_of(second), tasks_of(first)]
    policies = there_and_back(first, second)
    cell, results = legs_of(label, policies, tasks, scenes)
    if first.backbone.mechanism.tokens:
        print("this head takes tokens: it has no modulations to look at", file=sys.stderr)
        return [cell], None, None
    if first.conditioning.encoder.observation != "state":
        print("from pixels the legs alone are played, not parts of a swap", file=sys.stderr)
        return [cell], None, None
    of_shares, blocks = modulations(policies[:2], results[0])
    cells = [cell, *where(first, second, tasks[:2], scenes), *of_shares]
    return cells, blocks, frames_of(policies, tasks, results)


def measure_seed(policies, other_seed, scenes):
    """All cells of one seed; policies, other_seed: label of RUNS -> policy, of two seeds."""
    pair = policies["full, decoupled"], policies["away, decoupled"]
    check_pair(*pair)
    check_pair(policies["full, random"], policies["away, random"])
    cells, *drawn = measure_pair(*pair, SWAP, scenes)
    tasks = ["full", "away", "full"]
    strangers = [with_conditioning(pair[0], other_seed[f"{task}, decoupled"]) for task in tasks]
    controls = {STAYS: [pair[0]] * 3, OTHER_SEED: strangers,
                RANDOM: there_and_back(policies["full, random"], policies["away, random"]),
                NORMAL: there_and_back(policies["full, normal"], policies["away, normal"]),
                MOVES: [policies["several goals"]] * 3}
    legs = [legs_of(label, three, tasks, scenes)[0] for label, three in controls.items()]
    return [cells[0], *legs, *cells[1:]], *drawn


def measure_seeds(seeds, scenes):
    """Make all runs that are missing, and measure them; the pictures show seed 0."""
    compare.make(RUNS, seeds)
    policies, commits = [{} for _ in range(seeds)], set()
    for label, seed, folder, _ in compare.runs(RUNS, seeds):
        policies[seed][label] = DiffusionPolicy.load(folder / "policy.pt")
        commits.add(report.read(folder / "summary.json")["commit"])
    measured = [measure_seed(policies[seed], policies[seed - 1], scenes)     # of 0: the last one
                for seed in range(seeds)]
    cells = [cell | {"seed": seed, "commit": ", ".join(sorted(commits))}
             for seed, (found, *_) in enumerate(measured) for cell in found]
    cells = [cell for kind in ("legs", "goals", "shares") for cell in cells if kind in cell]
    return cells, *measured[0][1:]


def measure_files(files, different_heads, scenes):
    """The cells of one or two policy files. Raises ValueError for those that do not fit."""
    policies = [DiffusionPolicy.load(file) for file in files]
    if len(policies) > 1:
        check_pair(*policies, different_heads)
        return measure_pair(*policies, DIFFER if different_heads else SWAP, scenes)
    tasks = tasks_of(policies[0]).split(",")
    if len(tasks) < 2:
        raise ValueError(f"{files[0]} pursues one goal, {tasks[0]}: give a second policy")
    cell, _ = legs_of(MOVES, policies * 3, [*tasks[:2], tasks[0]], scenes)
    return [cell], None, None


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m results.swap", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"swap: {message} (--help tells more)\n")
    flag = parser.add_argument
    flag("policies", nargs="*", type=Path, metavar="POLICY", help="none, one or two policy.pt")
    flag("--different-heads", action="store_true",
         help="of two policies, as a control: their heads need not be equal")
    flag("--scenes", type=bounded(1, 10_000), default=200, metavar="N", help="default 200")
    flag("--seeds", type=bounded(2, 100), metavar="N",
         help="without POLICY: how many seeds; default 3")
    flag("--list", action="store_true", help="without POLICY: print the missing runs' commands")
    flag("--out", type=Path, metavar="FOLDER",
         help="where files go; default results/, for given policies: nothing is written")
    options = parser.parse_args(arguments)
    files, out = options.policies, options.out
    seeds = options.seeds or RUNS.seeds
    try:
        if files and (options.list or options.seeds):
            raise ValueError("--list and --seeds mean nothing beside a policy")
        if options.list:
            return compare.make(RUNS, seeds, only_list=True)
        if len(files) > 2:
            raise ValueError(f"{len(files)} policies are given; allowed: 0 to 2")
        if options.different_heads and len(files) < 2:
            raise ValueError("--different-heads means nothing without two policies")
        if out and (out == Path() or out.is_file()):
            raise ValueError(f"--out {out} is no name of its own for a folder")
        if files:
            cells, *drawn = measure_files(files, options.different_heads, options.scenes)
            cells = [cell | {"seed": 0} for cell in cells]
        else:
            cells, *drawn = measure_seeds(seeds, options.scenes)
        if out or not files:
            words = sys.argv[1:] if arguments is None else arguments
            command = shlex.join(["python", "-m", "results.swap", *words])
            cells = [cell | {"command": command} for cell in cells]
            swap_report.publish(cells, *drawn, out or compare.HERE)
        if not (out or files):
            report.insert(swap_report.tables(cells), "swap")
        print(swap_report.tables(cells))
    except (ValueError, OSError, ArithmeticError) as error:
        parser.error(error)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # pictures go to files
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("swap: interrupted; finished runs stay, the measurement begins anew")
