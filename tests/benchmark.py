"""Speed, measured side by side in one process: what else the machine does hits all alike.

    python -m tests.benchmark                all of it but for the last
    python -m tests.benchmark simulator      environment steps a second, beside gym-pusht's
    python -m tests.benchmark step           a training step, against the official manner
    python -m tests.benchmark freeze         what freezing buys, against the arithmetic
    python -m tests.benchmark sampling       a chunk of actions, against diffusers' scheduler
    python -m tests.benchmark command        the parts of the README's command, and their sum
    python -m tests.benchmark gpu            ten minutes on a GPU; writes results/gpu.md
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch

from tests import benchmark_gpu, benchmark_heads, benchmark_run

DATA = Path(__file__).parent / "data"


def best_rate(prepare, work, amount, repeats=5):
    """amount per second of this process's CPU time in the fastest of several repeats of work()."""
    seconds = []
    for _ in range(repeats):
        prepare()
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return amount / min(seconds)


def table(header, rows):
    """Print rows of text in aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def simulator(options):
    """The recorded pushes of tests/data (the block moves in 55 % of the steps), coverage included.

    Both simulators play the same pushes from the same states; resets are not counted. "free": the
    89 pushes that touch no wall; "all": with the 11 that squeeze the block against a wall. One
    environment plays every few pushes; larger batches play each about equally often.
    """
    from sim_pusht import PushT, from_legacy
    pushes = dict(np.load(DATA / "gym_pusht_pushes.npz"))
    everything = np.arange(len(pushes["init"]))
    free = np.flatnonzero(~pushes["wall"].any(1))

    def ours(which, num_envs, observation="state", steps=40):
        env, rates = PushT(num_envs, observation=observation), []
        rounds = len(which) if num_envs == 1 else -(-3 * len(which) // num_envs)
        for batch in np.resize(which, (rounds, num_envs)):
            actions = pushes["actions"][batch].swapaxes(0, 1)[:steps]
            rates.append(best_rate(lambda: env.set_state(pushes["init"][batch]),
                                   lambda: [env.step(action) for action in actions],
                                   num_envs * steps, options.repeats))
        return len(rates) / np.sum(1 / np.array(rates))

    try:
        import gymnasium
        import gym_pusht  # noqa: F401  (registers the environment)
    except ImportError:
        gymnasium = None
        print("gym-pusht is not installed: its columns stay empty (pip install gym-pusht)")

    def theirs(which, observation="state", steps=40):
        env = gymnasium.make("gym_pusht/PushT-v0", obs_type=observation, disable_env_checker=True)
        env, rates = env.unwrapped, []
        for push in which:
            state = pushes["init"][push].copy()
            state[2:] = 2 * state[2:] - from_legacy(state[2:])     # leads to this state
            actions = pushes["actions"][push, :steps]
            rates.append(best_rate(lambda: env.reset(options={"reset_to_state": state}),
                                   lambda: [env.step(action) for action in actions],
                                   steps, options.repeats))
        return len(rates) / np.sum(1 / np.array(rates))

    rows = []
    for observation, name, which, sizes, steps in (
            ("state", "free", free, (1, 64, 1024), 40),
            ("state", "all", everything, (1, 64, 1024), 40),
            ("pixels", "all", everything, (1, 256), 10)):
        sample = which[::max(1, len(which) // options.pushes)]
        reference = theirs(sample, observation, steps) if gymnasium else None
        for size in sizes:
            rate = ours(sample if size == 1 else which, size, observation, steps)
            rows.append([observation, name, f"{size:,}", f"{rate:,.0f}",
                         f"{reference:,.0f}" if reference else "-",
                         f"{rate / reference:.1f}" if reference else "-"])
    table(["observation", "pushes", "environments", "steps/s", "gym-pusht", "ratio"], rows)


def positive(text):
    """A whole number of the command line that has to be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: 1 and more")
    return int(text)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # One line instead of the whole usage text.
    parser.error = lambda message: parser.exit(2, f"tests.benchmark: {message} "
                                               "(--help tells more)\n")
    flag = parser.add_argument
    flag("section", nargs="*", metavar="SECTION", help="default: all but gpu")
    flag("--repeats", type=positive, default=5, help="measurements of each kind")
    flag("--pushes", type=positive, default=25, help="simulator: those played one at a time")
    flag("--heads", nargs="+", default=list(benchmark_heads.HEADS),
         choices=list(benchmark_heads.HEADS), help="not for command")
    flag("--threads", nargs="+", type=positive, default=[1, 2])
    flag("--cpu-time", action="store_true", help="heads: seconds of processor time, for a machine "
         "that is busy with other work (with one thread only)")
    flag("--updates", type=positive, default=40, help="command, gpu: updates that one number is "
         "measured with (gpu, laptop size: five times as many); default 40")
    flag("--demonstrations", type=positive, default=2000, help="command: how many are made to "
         "measure their time; default 2000, all of them")
    flag("--device", choices=["cpu", "cuda"], default="cuda", help="gpu: cpu tries it out without "
         "a GPU; default cuda")
    flag("--seconds", type=positive, default=570, help="gpu: about the longest time of all of it; "
         "default 570")
    flag("--out", type=Path, help="gpu: the report's file; default results/gpu.md, with --device "
         "cpu runs/gpu.md")
    return parser


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    sections = ["simulator", *benchmark_heads.BENCHMARKS, "command"]
    for section in options.section:
        if section not in [*sections, "gpu"]:
            parser.error(f"no section {section!r}; there are: {', '.join(sections)}, gpu")
    if "gpu" in options.section and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("gpu: this PyTorch sees no CUDA GPU; --device cpu tries it out without one")
    if options.cpu_time:
        benchmark_heads.CLOCK = time.process_time
    for section in options.section or sections:
        if section == "simulator":
            simulator(options)
        elif section == "command":
            benchmark_run.command(options.threads, options.repeats, options.updates,
                                  options.demonstrations)
        elif section == "gpu":
            folder = "results" if options.device == "cuda" else "runs"
            failed = benchmark_gpu.gpu(options.heads, options.device, options.updates,
                                       options.seconds, options.out or Path(folder, "gpu.md"))
            if failed:
                parser.exit(1, "tests.benchmark: a part of gpu failed; the report says which\n")
        else:
            benchmark_heads.BENCHMARKS[section](options.heads, options.threads, options.repeats)


if __name__ == "__main__":
    main()
