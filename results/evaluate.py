"""Score a saved policy on unseen scenes, and draw what it does.

    python -m results.evaluate runs/mlp-decoupled-full-laptop-seed0/policy.pt --executed-actions 4

The results go into a folder of their own beside the policy: summary.json and the pictures.
"""
import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

import torch

import sim_pusht
import train
from diffusion import DiffusionPolicy


def bounded(low, high):
    """For argparse: a whole number from low to high."""
    def number(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: {low} to {high}")
        return int(text)
    return number


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m results.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"evaluate: {message} (--help tells more)\n")
    flag = parser.add_argument
    flag("policy", type=Path, metavar="POLICY", help="a policy.pt of train.py")
    flag("--task", choices=sim_pusht.TASKS, help="which scenes, and which goal; default: the first "
         "task that has the policy's goal")
    flag("--episodes", type=bounded(1, 10_000), default=200, metavar="N",
         help="how many scenes; default 200")
    flag("--executed-actions", type=bounded(1, train.HORIZON - train.OBS_STEPS + 1), metavar="N",
         help="how many actions of each chunk are carried out; default: as trained")
    flag("--device", choices=["cpu", "cuda"], help="default: cuda if any")
    flag("--out", type=Path, metavar="FOLDER", help="default: a folder beside the policy")
    return parser


def task_of(policy, asked):
    """The task to be played. Raises ValueError if the policy pursues another goal than `asked`, or
    none, as that of stage 1."""
    encoder = policy.conditioning.encoder.config
    if "goal" not in encoder:
        raise ValueError(f"the policy observes {encoder['observation']}, not the scenes of a task")
    goal = encoder["goal"]
    tasks = [name for name, (_, its_goal) in sim_pusht.TASKS.items() if its_goal.tolist() == goal]
    if asked or not tasks:
        if asked not in tasks:
            raise ValueError(f"the policy pursues the goal {goal}, which tasks "
                             f"{', '.join(tasks) or '(none)'} have; --task is {asked}")
        return asked
    return tasks[0]


def main(arguments=None):
    """The command line; returns the summary."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this PyTorch sees no CUDA GPU; allowed here: cpu")
    if options.out == Path():     # an empty name as well
        parser.error(f"--out {options.out} is no name of its own for a folder")
    try:
        policy = DiffusionPolicy.load(options.policy, device)
        task = task_of(policy, options.task)
        policy.executed_actions = options.executed_actions or policy.executed_actions
        name = f"{options.policy.stem}-{task}-executing-{policy.executed_actions}"
        folder = options.out or options.policy.with_name(name)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(error)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        summary = dict(command=shlex.join(["python", "-m", "results.evaluate", *map(str, given)]))
        result = train.evaluate(policy, task, options.episodes)
        summary |= train.scores_of(policy, task, result)
        train.save_summary(summary, folder)     # before anything is drawn, which may fail
        train.report(summary, folder)
        train.draw_rollouts(result, task, folder)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; nothing was changed but the folder with the results")
    except Exception as error:
        sys.exit(f"evaluate: {train.told(error)}")     # exit code 1
    return summary


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"                           # pictures go to files
    if hasattr(sys.stdout, "reconfigure"):                     # a notebook's has no such method
        sys.stdout.reconfigure(errors="backslashreplace")      # a path may hold any letter
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
