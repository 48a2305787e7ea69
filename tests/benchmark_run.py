"""The parts of `python train.py --backbone mlp --decoupled`: the section `command` of benchmark.py.

What is measured is train.train_policy and train.evaluate themselves, for a few dozen updates.
"""
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

import sim_pusht
import train

PLAYS = 50, 200     # scenes: on the way and at the end


class Stopwatch(train.Run):
    """In the place of a train.Run: takes the time of an update in each stage.

    It keeps no log, and makes no checkpoint unless it is asked to. folder: for action_head.pt.
    device: the one that has to be waited for. update_seconds: by stage, in seconds.
    """
    WARMUP = 5     # updates that do not count
    is_past_stage1 = False

    def __init__(self, folder, device="cpu"):
        self.folder, self.device = folder, device
        self.rows, self.seconds, self.update_seconds = [], {}, {}

    def begin(self, stage, steps, policy, average, optimizer, schedule):
        self.stage, self.steps = stage, steps
        self.parts = dict(policy=policy, average=average, optimizer=optimizer, schedule=schedule)
        return 0

    def after_update(self, step, loss):
        if step == self.WARMUP - 1:
            self.begun = self.now()
        if step == self.steps - 1:
            updates = self.steps - self.WARMUP
            self.update_seconds[self.stage] = (self.now() - self.begun) / updates

    def now(self):
        """The time when the device has done all that it was told to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()     # TRAP: a GPU works on while Python goes ahead
        return time.perf_counter()


def train_briefly(demonstrations, updates, kind=Stopwatch, **settings):
    """Train for a few `updates` in each stage, as `settings` of a train.Config say.

    Returns the policy and the Stopwatch (or another `kind` of it), which knows the seconds.
    """
    steps = updates + Stopwatch.WARMUP
    config = train.settings(train.Config(steps=steps, stage1_steps=steps, **settings))
    with tempfile.TemporaryDirectory() as folder:
        stopwatch = kind(Path(folder), config.device)
        policy = train.train_policy(config, stopwatch, demonstrations)
    return policy, stopwatch


def few_demonstrations(count=20):
    """Enough of them for an update, which draws windows from all that there are."""
    return sim_pusht.expert_demonstrations(count, "near", seed=0)


def processor():
    """The processor's name, for a report."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown(header, rows):
    """A table as text; the first column is on the left, the numbers are on the right."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * width if i == 0 else "-" * (width - 1) + ":"
                    for i, width in enumerate(widths)])
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_of(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def made_demonstrations(count):
    """Seconds for the command's demonstrations, from `count` of them."""
    config = train.settings(train.Config())
    seconds = seconds_of(sim_pusht.expert_demonstrations, count, config.task)
    return seconds * config.num_demos / count


def measure_parts(demonstrations, updates):
    """Seconds of each part of a run but for its demonstrations, on a CPU, by name."""
    parts, policies = {}, {}
    for observation in ("state", "pixels"):
        for recipe in ("decoupled", "normal"):
            policies[observation], stopwatch = train_briefly(
                demonstrations, updates, observation=observation, recipe=recipe, device="cpu")
            if (observation, recipe) == ("state", "decoupled"):
                parts["stage 1"] = stopwatch.update_seconds["stage1"]
                with tempfile.TemporaryDirectory() as folder:
                    stopwatch.folder = Path(folder)
                    parts["checkpoint"] = seconds_of(stopwatch.checkpoint, 0)
            parts[recipe, observation] = stopwatch.update_seconds["stage2"]

    for scenes in PLAYS:
        start = time.perf_counter()
        result = train.evaluate(policies["state"], "full", scenes)
        parts["play", scenes] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        rows = [["stage2", 100 * i, i, 0.1, 0.001, 0.5] for i in range(1, 181)]
        parts["figures"] = seconds_of(train.draw_rollouts, {"full": result}, Path(folder))
        parts["figures"] += seconds_of(train.draw_curves, rows, Path(folder) / "curves.png")
    return parts


def how_often():
    """How often each part happens in the README's command, by its name in measure_parts."""
    config = train.settings(train.Config(recipe="decoupled"))
    stages = config.stage1_steps, config.steps
    few, all_scenes = PLAYS
    return {"stage 1": config.stage1_steps, ("decoupled", "state"): config.steps,
            # One at the beginning of a stage, one after every `checkpoint_every` updates or less.
            "checkpoint": sum(1 + -(-steps // config.checkpoint_every) for steps in stages),
            ("play", few): (config.steps - 1) // config.play_every, ("play", all_scenes): 1,
            "figures": 1}


def command(threads, repeats, updates, count):
    """Measure all parts `repeats` times, print their medians and the sum that they predict.

    count: the demonstrations that are made to see how long the command's take.
    """
    config = train.settings(train.Config(recipe="decoupled", device="cpu"))
    print("`python train.py --backbone mlp --decoupled` on this machine, in parts; the sum does "
          f"not hold the log.\n{processor()}, torch {torch.__version__}, {config.precision}, "
          f"commit {train.code_version()}; {updates} updates of each kind, medians of {repeats}.\n"
          f"The demonstrations' time is scaled from {count:,} of them, measured once.", flush=True)
    making, demonstrations = made_demonstrations(count), few_demonstrations()
    columns = {}
    for number in threads:
        torch.set_num_threads(number)
        measured = [measure_parts(demonstrations, updates) for _ in range(repeats)]
        columns[number] = {part: statistics.median(parts[part] for parts in measured)
                           for part in measured[0]}

    often = how_often()
    names = {"stage 1": "stage 1, update, ms",
             ("decoupled", "state"): "stage 2, frozen, update, ms",
             "checkpoint": "checkpoint, ms", "figures": "figures, ms"}
    names |= {("play", scenes): f"playing {scenes} scenes, ms" for scenes in PLAYS}
    others = {("normal", "state"): "normal training, update, ms",
              ("decoupled", "pixels"): "from pixels: stage 2, frozen, update, ms",
              ("normal", "pixels"): "from pixels: normal training, update, ms"}
    sums = [making + sum(often[part] * column[part] for part in often)
            for column in columns.values()]
    rows = [[f"{config.num_demos:,} demonstrations, s", "1", *[f"{making:.1f}"] * len(columns)]]
    for part, name in (names | others).items():
        times = f"{often[part]:,}" if part in often else "-"
        rows.append([name, times, *(f"{1000 * column[part]:.1f}" for column in columns.values())])
    rows.insert(1 + len(names), ["the whole command, s", "", *(f"{total:.0f}" for total in sums)])
    print(markdown(["part", "times", *(f"{number} thread(s)" for number in columns)], rows))
    for observation in ("state", "pixels"):
        gains = [100 * (column["normal", observation] / column["decoupled", observation] - 1)
                 for column in columns.values()]
        print(f"What freezing buys, {observation}: " + ", ".join(f"{gain:+.0f} %" for gain in gains)
              + " updates/s")
    print("(The paper's, with image encoders: +3 to 8 % for DP-MLP, +41 % for DP-C.)", flush=True)
