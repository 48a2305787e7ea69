"""See the claim: exchange the conditioning in the middle of an episode; the frozen head stays.

    python -m results.swap A.pt B.pt      two policies with the same head: its table for this pair
    python -m results.swap G.pt           a policy for several goals: its goal moves, nothing else
    python -m results.swap                makes all runs that are missing, measures all seeds, and
                                          writes results/swap.json, .md, .png and .gif

Two decoupled policies that were made from one --action-head hold the same backbone, bit for bit.
All that differs between them is `policy.conditioning`. So the following is a test of the claim
that the task is in there.
1. The swap. Policy A plays until the block covers A's goal, or for 300 steps. There the
   conditioning of B takes A's place in the same head, and then A's comes back: three legs.
2. Controls: no swap; conditionings that were trained with another seed's head; a head frozen at
   random; normally trained policies, whose backbones differ (--different-heads); the moving goal.
3. Where is the task? Only some blocks, or only the last denoising steps, get B's modulations.
4. How much do gamma and beta depend on the observation, on the timestep, and on the task?
"""
import argparse
import json
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
from results import compare, report
from results.evaluate import bounded, goals_of, tasks_of

LEG = 300        # control steps that a leg may take
WHERE = 200      # control steps with the modulations of two conditionings
QUESTION = "Can one see it?"
RUNS = compare.Preset(QUESTION, """
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
        past = first.pop() if first else past
        seen = sim_pusht.observe(past, policy.conditioning.encoder.observation, env.goal)
        return policy.act(seen, generator).cpu().numpy()

    return sim_pusht.play(env, act, policy.obs_steps)


def new_scenes(policy, scenes):
    """The evaluation's first states as a history (B, To, 5), and a generator for the noise."""
    states = sim_pusht.PushT(scenes).reset(train.EVALUATION_SEED)
    generator = torch.Generator().manual_seed(train.EVALUATION_SEED)
    return np.repeat(states[:, None], policy.obs_steps, 1), generator


def play_legs(policies, tasks, scenes):
    """One policy and task after the other, each scene from where its last leg ended.

    Returns the result of each leg, see sim_pusht.play. All scenes go on, solved or not.
    """
    history, generator = new_scenes(policies[0], scenes)
    results = []
    for policy, task in zip(policies, tasks):
        result = play_leg(policy, task, history, LEG, generator)
        last = result["length"] + np.arange(1 - policy.obs_steps, 1)[:, None]     # (To, B)
        history = result["states"][np.maximum(last, 0), np.arange(scenes)].swapaxes(0, 1)
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
    for size in range(1, number + 1):
        if size in (1, number) or number <= 4:
            for first in range(number - size + 1):
                blocks = range(first, first + size)
                name = " ".join(str(block + 1) for block in blocks)
                parts.append((f"blocks {name}", blocks, timesteps))
    counts = sorted({max(1, len(timesteps) * tenth // 10) for tenth in range(1, 11)})
    return parts + [(f"last {count} denoising steps", range(number), timesteps[-count:])
                    for count in counts]


def where(policy, other, tasks, scenes):
    """Success and score at both goals, for each part that `other` modulates: a cell for each.

    All scenes are played for WHERE steps, whatever the block covers on the way.
    """
    cells = []
    for name, blocks, timesteps in tqdm(parts_of(policy), desc="where", leave=False):
        history, generator = new_scenes(policy, scenes)
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
    def explained(*axes):
        others = tuple({0, 1, 2} - set(axes))
        return values.mean(others).var(tuple(range(len(axes)))).sum()

    whole = values.var((0, 1, 2)).sum()
    task, timestep, observation = explained(0), explained(1), explained(2)
    found = {"observation": observation, "timestep": timestep, "task": task,
             "task x observation": explained(0, 2) - task - observation}
    found = {name: float(value / whole) for name, value in found.items()}
    return found | {"rest": 1 - sum(found.values())}


def observations_on_the_way(result, obs_steps, number=64):
    """Observations (number, To, 5) of `number` scenes, each at another part of its way."""
    number = min(number, len(result["length"]))
    every = np.arange(number)
    time = result["length"][:number] * every // number + np.arange(1 - obs_steps, 1)[:, None]
    return result["states"][np.maximum(time, 0), every].swapaxes(0, 1)


def modulations(policies, result):
    """Of both policies in the states of `result`: cells of shares, and arrays for the heat maps."""
    policy = policies[0]
    seen = observations_on_the_way(result, policy.obs_steps)
    timesteps = list(policy.ddpm.timesteps(policy.sampling_steps))
    both = zip(*(modulations_of(each, seen, timesteps) for each in policies))
    blocks = [np.stack(block) for block in both]     # each (task, timestep, S, V, D)
    names = {1: ["beta"], 2: ["gamma", "beta"], 3: ["gamma", "beta", "alpha"]}
    cells = [{"cell": f"block {r + 1}, {name}", "shares": shares(block[..., v, :])}
             for r, block in enumerate(blocks) for v, name in enumerate(names[block.shape[3]])]
    return cells, blocks


# Tables and pictures -----------------------------------------------------------------------------

def markdown(columns, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(lines) + "\n"


def mean_of(entries, key):
    """Mean ± standard error over the seeds, see report.spread."""
    return "{:.3f} ± {:.3f}".format(*report.spread(entries, key))


def tables(cells):
    """All tables in Markdown: legs, parts, shares; each mean is over the seeds in `cells`."""
    found, text = report.groups(cells), ""
    rows = [[label, *(mean_of(leg, "success_rate") for leg in zip(*(c["legs"] for c in group)))]
            for label, group in found.items() if "legs" in group[0]]
    text += markdown(["success", "first leg", "second leg", "third leg"], rows)
    rows = [[label, *(mean_of(goal, key) for goal in zip(*(c["goals"] for c in group))
                      for key in ("success_rate", "score"))]
            for label, group in found.items() if "goals" in group[0]]
    if rows:
        columns = ["from the second conditioning", "success, first goal", "score, first goal",
                   "success, second goal", "score, second goal"]
        text += "\n" + markdown(columns, rows)
    rows = [[label, *(f"{np.mean([c['shares'][name] for c in group]):.2f}"
                      for name in group[0]["shares"])]
            for label, group in found.items() if "shares" in group[0]]
    if rows:
        columns = ["share of the variance", *cells[-1]["shares"]]
        text += "\n" + markdown(columns, rows)
    seeds = len({cell["seed"] for cell in cells})
    return text + f"\n{seeds} seed(s), {cells[0]['scenes']} scenes each.\n"


def draw(cells, blocks, identity, path):
    """Bars of the legs, success by block and by denoising step, and a heat map for each block."""
    from matplotlib.figure import Figure
    found = report.groups(cells)
    figure = Figure(figsize=(15, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    legs_axis, blocks_axis, steps_axis = upper.subplots(1, 3)
    rows = {label: group for label, group in found.items() if "legs" in group[0]}
    for leg, name in enumerate(("first leg", "second leg", "third leg")):
        means = [report.spread([cell["legs"][leg] for cell in group], "success_rate")
                 for group in rows.values()]
        mean, error = np.array(means).T
        legs_axis.barh(np.arange(len(rows)) + 0.27 * (leg - 1), mean, 0.25, xerr=error, label=name)
    legs_axis.set_yticks(range(len(rows)), [label.replace(": ", ":\n") for label in rows])
    legs_axis.set(xlim=(0, 1), xlabel="success", title="Three legs: there, elsewhere, back")
    legs_axis.invert_yaxis()
    legs_axis.legend(fontsize="small")
    for axis, word, title in ((blocks_axis, "blocks", "Blocks that the second one modulates"),
                              (steps_axis, "last", "Last denoising steps that it modulates")):
        labels = [label for label in found if label == "nothing" or label.startswith(word)]
        for goal, name in enumerate(("first goal", "second goal")):
            means = [report.spread([cell["goals"][goal] for cell in found[label]], "success_rate")
                     for label in labels]
            axis.errorbar(range(len(labels)), *np.array(means).T, label=name, capsize=3,
                          fmt="o-" if word == "last" else "o")
        short = [label.removeprefix("blocks ").split(" denoising")[0].removeprefix("last ")
                 for label in labels]
        axis.set_xticks(range(len(labels)), short, rotation=60)
        axis.set(ylim=(0, 1), title=title, ylabel=f"success in {WHERE} steps")
        axis.legend()
    lower.suptitle("gamma - 1 of each block at the last denoising step. A row is a scene: above "
                   "with the first conditioning, below with the second. Features are sorted by "
                   "the difference", fontsize=10)
    for number, (axis, block) in enumerate(zip(lower.subplots(1, len(blocks), squeeze=False)[0],
                                               blocks)):
        last = block[:, -1, :16, 0] - identity                               # (task, S, D)
        order = np.argsort(last[1].mean(0) - last[0].mean(0))
        image = axis.imshow(np.concatenate(last)[:, order], cmap="coolwarm", aspect="auto",
                            vmin=-2, vmax=2)
        axis.axhline(len(last[0]) - 0.5, color="k")
        axis.set(title=f"block {number + 1}", xlabel="feature", ylabel="scene", yticks=[])
    lower.colorbar(image, ax=lower.axes, label="gamma - 1")
    figure.savefig(path, dpi=80)


def film(policies, tasks, results, path):
    """One scene through all legs as a GIF; beside it gamma and beta as they change on the way."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    lengths = np.stack([result["length"] for result in results])
    solved = np.stack([result["max_coverage"] > 0.95 for result in results]).sum(0)
    scene = np.lexsort([lengths.sum(0), -solved])[0]     # most legs solved, then the shortest
    identity = np.array(policies[0].backbone.mechanism.identity)[:, None]
    frames = []     # (picture, modulations, title)
    for number, (policy, task, result) in enumerate(zip(policies, tasks, results)):
        states, length = result["states"][:, scene], result["length"][scene]
        times = [*range(0, length, 5), *[length] * 4]
        past = states[np.maximum(np.array(times)[:, None] + np.arange(1 - policy.obs_steps, 1), 0)]
        seen = sim_pusht.observe(past, policy.conditioning.encoder.observation,
                                 sim_pusht.TASKS[task][1])
        strips = [(m[0] - identity)[..., ::4].reshape(len(times), -1)
                  for m in modulations_of(policy, seen, [0])]
        width = max(strip.shape[1] for strip in strips)
        strips = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]))) for strip in strips]
        pictures = sim_pusht.draw_states(states[times], 192, sim_pusht.TASKS[task][1])
        frames += zip(pictures, np.stack(strips, 1), [f"leg {number + 1}: the conditioning of "
                                                      f"task {task} is in the head"] * len(times))
    figure = Figure(figsize=(7, 3.6))
    figure.subplots_adjust(0.01, 0.15, 0.98, 0.9, 0.15)
    board, strip = figure.subplots(1, 2)
    board.set_axis_off()
    strip.set(xlabel="gamma - 1, then beta, of every fourth feature", ylabel="block")
    strip.set_yticks(range(len(strips)), range(1, len(strips) + 1))
    picture = board.imshow(frames[0][0])
    image = strip.imshow(frames[0][1], cmap="coolwarm", aspect="auto", vmin=-1.5, vmax=1.5,
                         interpolation="nearest")
    title = figure.suptitle(" ")

    def show(frame):
        picture.set_data(frame[0])
        image.set_data(frame[1])
        title.set_text(frame[2])

    FuncAnimation(figure, show, frames, cache_frame_data=False).save(path, PillowWriter(fps=10),
                                                                     dpi=60)


# The command line --------------------------------------------------------------------------------

def measure_pair(first, second, label, scenes):
    """Legs, parts and modulations of one pair: its cells; what is needed to draw it."""
    tasks = [tasks_of(first), tasks_of(second), tasks_of(first)]
    policies = there_and_back(first, second)
    cell, results = legs_of(label, policies, tasks, scenes)
    cells, blocks = [cell], None
    if first.backbone.mechanism.tokens:
        print("this head takes tokens: it has no modulations to look at", file=sys.stderr)
    elif first.conditioning.encoder.observation == "state":
        cells += where(first, second, tasks[:2], scenes)
        shares_of, blocks = modulations(policies[:2], results[0])
        cells += shares_of
    return cells, (blocks, policies, tasks, results)


def measure_seed(policies, other_seed, scenes):
    """All cells of one seed; policies, other_seed: label of RUNS -> policy, of two seeds."""
    pair = policies["full, decoupled"], policies["away, decoupled"]
    check_pair(*pair)
    check_pair(policies["full, random"], policies["away, random"])
    cells, drawn = measure_pair(*pair, SWAP, scenes)
    tasks = ["full", "away", "full"]
    strangers = [with_conditioning(pair[0], other_seed[f"{task}, decoupled"]) for task in tasks]
    several = policies["several goals"]
    controls = {STAYS: [pair[0]] * 3, OTHER_SEED: strangers,
                RANDOM: there_and_back(policies["full, random"], policies["away, random"]),
                NORMAL: there_and_back(policies["full, normal"], policies["away, normal"]),
                MOVES: [several] * 3}
    legs = [legs_of(label, three, tasks, scenes)[0] for label, three in controls.items()]
    return [cells[0], *legs, *cells[1:]], drawn


def measure_files(files, different_heads, scenes):
    """The cells of one or two policy files. Raises ValueError for those that do not fit."""
    policies = [DiffusionPolicy.load(file) for file in files]
    if len(policies) == 1:
        tasks = tasks_of(policies[0]).split(",")
        if len(tasks) < 2:
            raise ValueError(f"{files[0]} pursues one goal, {tasks[0]}: give a second policy")
        tasks = [*tasks[:2], tasks[0]]
        cell, results = legs_of(MOVES, policies * 3, tasks, scenes)
        return [cell], (None, policies * 3, tasks, results)
    check_pair(*policies, different_heads)
    return measure_pair(*policies, NORMAL if different_heads else SWAP, scenes)


def publish(cells, drawn, out):
    """Write swap.json and swap.md; where there are modulations, also swap.png and swap.gif."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell | {"command": "python -m results.swap"}) for cell in cells)
    (out / "swap.json").write_text('{"cells": [\n' + lines + "\n]}\n", encoding="utf-8")
    (out / "swap.md").write_text(tables(cells), encoding="utf-8")
    blocks, policies, tasks, results = drawn
    if blocks:
        draw(cells, blocks, policies[0].backbone.mechanism.identity[0], out / "swap.png")
        film(policies, tasks, results, out / "swap.gif")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m results.swap", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"swap: {message} (--help tells more)\n")
    flag = parser.add_argument
    flag("policies", nargs="*", type=Path, metavar="POLICY", help="none, one or two policy.pt")
    flag("--different-heads", action="store_true", help="a control: the heads need not be equal")
    flag("--scenes", type=bounded(1, 10_000), default=200, metavar="N", help="default 200")
    flag("--seeds", type=bounded(2, 100), default=RUNS.seeds, metavar="N",
         help="without POLICY: how many seeds; default 3")
    flag("--list", action="store_true", help="without POLICY: print the missing runs' commands")
    flag("--out", type=Path, metavar="FOLDER",
         help="where files go; default results/, for given policies: nothing is written")
    options = parser.parse_args(arguments)
    try:
        if len(options.policies) > 2:
            raise ValueError(f"{len(options.policies)} policies are given; allowed: 0 to 2")
        if options.out and (options.out == Path() or options.out.is_file()):
            raise ValueError(f"--out {options.out} is no name of its own for a folder")
        if options.policies:
            cells, drawn = measure_files(options.policies, options.different_heads, options.scenes)
            cells = [cell | {"seed": 0} for cell in cells]
        else:
            grid = list(compare.runs(RUNS, options.seeds))
            missing = [command + ["--resume"] * (folder / "config.json").exists()
                       for *_, folder, command in grid if not (folder / "summary.json").exists()]
            if options.list:
                print("\n".join(f"python {shlex.join(command)}" for command in missing))
                return
            for command in tqdm(missing, desc="swap", unit="run", disable=not missing):
                compare.execute(command)
            policies = [{} for _ in range(options.seeds)]
            for label, seed, folder, _ in grid:
                policies[seed][label] = DiffusionPolicy.load(folder / "policy.pt")
            cells = []
            for seed, its in enumerate(policies):
                found, seed_drawn = measure_seed(its, policies[seed - 1], options.scenes)
                cells += [cell | {"seed": seed} for cell in found]
                drawn = seed_drawn if seed == 0 else drawn     # the pictures show seed 0
            cells.sort(key=lambda cell: "goals" in cell or 2 * ("shares" in cell))
        if options.out or not options.policies:
            publish(cells, drawn, options.out or compare.HERE)
        if not (options.out or options.policies):
            readme = compare.HERE / "README.md"
            before, _, after = report.split_at_markers(readme.read_text(encoding="utf-8"), "swap")
            readme.write_text(before + tables(cells) + after, encoding="utf-8")
        print(tables(cells))
    except (ValueError, OSError, ArithmeticError) as error:
        parser.error(error)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # pictures go to files
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("swap: interrupted; finished runs stay, the measurement begins anew")
