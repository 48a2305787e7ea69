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
    flag("--task", metavar="TASK", help="which scenes, and which goal; several with commas "
         "between; default: for each goal of the policy the first task that has it")
    flag("--episodes", type=bounded(1, 10_000), default=200, metavar="N",
         help="how many scenes of each task; default 200")
    flag("--executed-actions", type=bounded(1, train.HORIZON - train.OBS_STEPS + 1), metavar="N",
         help="how many actions of each chunk are carried out; default: as trained")
    flag("--device", choices=["cpu", "cuda"], help="default: cuda if any")
    flag("--out", type=Path, metavar="FOLDER", help="default: a folder beside the policy")
    return parser


def goals_of(policy):
    """The poses that the policy has learned to reach, a list. ValueError for one of stage 1."""
    encoder = policy.conditioning.encoder.config
    if "goal" not in encoder:
        raise ValueError(f"the policy observes {encoder['observation']}, not the scenes of a task")
    return encoder["goal"] if encoder["observation"] == "state-and-goal" else [encoder["goal"]]


def tasks_of(policy, asked=None):
    """The tasks to be played, with commas between: those `asked` for, or one for each goal.

    Raises ValueError if the policy does not know the goal of a task, or if a task is asked twice.
    """
    goals = goals_of(policy)
    tasks = {name: goal.tolist() for name, (_, goal) in sim_pusht.TASKS.items()
             if goal.tolist() in goals}
    first = {str(goal): name for name, goal in reversed(tasks.items())}     # of each goal
    chosen = asked.split(",") if asked is not None else [first.get(str(goal)) for goal in goals]
    if not set(chosen) <= set(tasks):
        listed = goals[0] if len(goals) == 1 else goals
        raise ValueError(f"the policy pursues the goal {listed}, which tasks "
                         f"{', '.join(tasks) or '(none)'} have; --task is {asked}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--task {asked} names a task twice")
    return ",".join(chosen)


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
        tasks = tasks_of(policy, options.task)
        policy.executed_actions = options.executed_actions or policy.executed_actions
        name = f"{options.policy.stem}-{tasks}-executing-{policy.executed_actions}"
        folder = options.out or options.policy.with_name(name)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(error)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        summary = dict(command=shlex.join(["python", "-m", "results.evaluate", *map(str, given)]))
        results = train.evaluate_all(policy, tasks, options.episodes)
        summary |= train.scores_of(policy, results)
        train.save_summary(summary, folder)     # before anything is drawn, which may fail
        train.report(summary, folder)
        train.draw_rollouts(results, folder)
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
