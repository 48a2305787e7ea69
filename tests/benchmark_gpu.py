"""Everything to be measured on a GPU, in ten minutes: the section `gpu` of tests/benchmark.py.

It prints its report and writes it to a file, which is written anew after each part: what was
measured stays, whatever ends the process. With --device cpu it runs without a GPU, to see that it
works.
"""
import csv
import gc
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

import train
from tests.benchmark_heads import HEADS
from tests.benchmark_run import Stopwatch, few_demonstrations, markdown, processor, train_briefly

ROOT = Path(__file__).parent.parent
# Updates a second in the paper's table V, image encoders included: normal and decoupled on an RTX
# 3090, the same on an RTX 4090.
PAPER = {"DP-C": ("5.21", "7.35", "10.67", "15.06"), "DP-T": ("7.45", "8.01", "17.41", "19.19"),
         "DP-T-FiLM": ("7.93", "8.70", "18.28", "19.60"),
         "DP-MLP": ("9.11", "9.82", "19.62", "20.18")}
PAPER_SECONDS = 120     # for training with --scale paper
SIZES = {"laptop": 5, "paper": 1}     # at the laptop's size an update is short: five times as many


class Report:
    """Text that is printed and, all of it, written to `path`."""

    def __init__(self, path):
        self.path, self.parts = path, []

    def add(self, text):
        print(text, "\n", flush=True)
        self.parts.append(text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")


class Profile(Stopwatch):
    """Also lists what the device did in the updates that count; that makes them slower.

    operations, busy_seconds: in an update, on average. On a GPU an operation is a kernel or a copy,
    and they run one after the other. On a CPU it is an operator of PyTorch.
    """

    def after_update(self, step, loss):
        super().after_update(step, loss)
        on_gpu = self.device == "cuda"
        if step == self.WARMUP - 1:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
            self.profile = profile(activities=kinds)
            self.profile.start()
        if step == self.steps - 1:
            self.profile.stop()
            where = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
            # TRAP: the optimizer's step is listed as a whole, too, and would count twice.
            events = [event for event in self.profile.key_averages()
                      if event.device_type == where and not event.is_user_annotation]
            microseconds = sum(event.self_device_time_total if on_gpu else event.self_cpu_time_total
                               for event in events)
            updates = self.steps - self.WARMUP
            self.operations = sum(event.count for event in events) / updates
            self.busy_seconds = microseconds / 1e6 / updates


def head_settings(head):
    """The fields of a train.Config that make this head."""
    backbone, conditioning, _ = HEADS[head]
    return dict(backbone=backbone, conditioning=conditioning)


def rate(demonstrations, updates, device, **settings):
    """Updates a second, and the GPU's memory at its fullest in MiB ("-" on a CPU)."""
    on_gpu = device == "cuda"
    gc.collect()     # what was measured before must not count as this one's memory
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    _, stopwatch = train_briefly(demonstrations, updates, device=device, **settings)
    memory = f"{torch.cuda.max_memory_allocated() / 2 ** 20:,.0f}" if on_gpu else "-"
    return 1 / stopwatch.update_seconds["stage2"], memory


def rates(report, heads, device, updates, end):
    """Normal and frozen training, of each head at both sizes.

    end: the time after which nothing more is measured.
    """
    demonstrations = few_demonstrations()
    for scale, times in SIZES.items():
        header = ["head", "precision", "normal", "frozen", "freezing buys", "normal, MiB",
                  "frozen, MiB"]
        header += ["RTX 3090, normal", "decoupled", "RTX 4090, normal", "decoupled"] * \
            (scale == "paper")
        rows = []
        for head in heads:
            for precision in ("fp32", "bf16"):
                if time.perf_counter() > end:
                    continue
                (normal, memory), (frozen, less) = (
                    rate(demonstrations, times * updates, device, recipe=recipe, scale=scale,
                         precision=precision, **head_settings(head))
                    for recipe in ("normal", "random-frozen"))
                rows.append([head, precision, f"{normal:.1f}", f"{frozen:.1f}",
                             f"{100 * (frozen / normal - 1):+.0f} %", memory, less])
                rows[-1] += PAPER[head] if scale == "paper" else []
        batch = train.settings(train.Config(scale=scale, device=device)).batch_size
        text = (f"## Updates a second, {scale} size\n\nBatch {batch}, from the state, "
                f"{times * updates} updates of train.py for each number.")
        if scale == "paper":
            text += (" The paper's figures, on the right, include two image encoders; they are in "
                     "fp32. Our DP-T predicts 16 actions, the paper's 10.")
        report.add(text + told_missing(2 * len(heads) - len(rows)))
        report.add(markdown(header, rows))


def told_missing(count):
    """A sentence about the rows that are missing, "" if there are none."""
    return f" **{count} rows are missing: the time was up.**" * bool(count)


def launches(report, heads, device, updates, end):
    """Does the device wait for Python? The device's busy time, and a batch that is 8 times larger.

    end: the time after which nothing more is measured.
    """
    demonstrations, rows = few_demonstrations(), []
    for scale, times in SIZES.items():
        for head in heads:
            if time.perf_counter() > end:
                continue
            settings = dict(recipe="random-frozen", scale=scale, device=device,
                            **head_settings(head))
            batch = train.settings(train.Config(**settings)).batch_size
            seconds = []
            for size in (batch, 8 * batch):
                _, stopwatch = train_briefly(demonstrations, times * updates, batch_size=size,
                                             **settings)
                seconds.append(stopwatch.update_seconds["stage2"])
            _, seen = train_briefly(demonstrations, updates, Profile, **settings)
            rows.append([head, scale, f"{batch}", f"{1000 * seconds[0]:.2f}",
                         f"{1000 * seconds[1]:.2f}", f"{seconds[1] / seconds[0]:.2f}",
                         f"{seen.operations:,.0f}", f"{1000 * seen.busy_seconds:.2f}",
                         f"{100 * seen.busy_seconds / seconds[0]:.0f} %"])
    report.add("## What an update loses to launches\n\nA frozen update, in the precision that "
               "train.py chooses. `busy` is how long the device works in an update, by "
               "torch.profiler; the rest of the time it waits for Python. Where the share of busy "
               "time is small, and a batch that is 8 times larger takes hardly longer, CUDA graphs "
               "or torch.compile can gain: an update would take `busy` at least."
               + told_missing(2 * len(heads) - len(rows)))
    report.add(markdown(["head", "size", "batch B", "ms, B", "ms, 8 B", "ratio", "operations",
                         "busy, ms, B", "share"], rows))


def run_train(folder, name, limit, *arguments):
    """Run train.py in `folder` for at most `limit` seconds, and see how far it came.

    Returns its seconds, the last row of its metrics.csv (a dict; None if there is none), its
    summary (None if it did not end), and the last line that it printed if it failed (or "").
    """
    words = [sys.executable, ROOT / "train.py", *arguments, "--out", name]
    start, failure = time.perf_counter(), ""
    with open(folder / f"{name}.log", "w+", encoding="utf-8", errors="replace") as log:
        try:
            ended = subprocess.run(words, cwd=folder, stdout=log, stderr=log, timeout=limit)
        except subprocess.TimeoutExpired:
            ended = None     # it was killed; its files are whole, as after every kill
        seconds = time.perf_counter() - start
        if ended and ended.returncode:
            log.seek(0)
            failure = (log.read().strip().splitlines() or ["it printed nothing"])[-1]
    return seconds, last_row(folder / name / "metrics.csv"), \
        read_summary(folder / name / "summary.json"), failure


def last_row(path):
    """The last row of a metrics.csv as a dict, None if there is none."""
    if not path.exists():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return (list(csv.DictReader(file)) or [None])[-1]


def read_summary(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def describe(seconds, row, summary, failure):
    """What became of a run, from the results of run_train, in a few words."""
    if failure:
        return f"**It failed**: {failure}"
    if summary:
        parts = ", ".join(f"{name} {number:.1f}" for name, number in summary["seconds"].items())
        rates = ", ".join(f"{stage} {number:.1f}"
                          for stage, number in summary["iterations_per_second"].items())
        return (f"It took {seconds:.0f} s, the start of Python included ({parts}). Updates a "
                f"second: {rates}. Success {summary['success_rate']:.3f} +- "
                f"{summary['success_se']:.3f}, score {summary['score']:.3f}.")
    if row is None:
        return f"It was ended after {seconds:.0f} s, before the first line of its log."
    done, training = int(row["step"]), float(row["seconds"])
    return (f"It was ended after {seconds:.0f} s, at update {done:,} of {row['stage']} "
            f"({done / training:.1f} updates a second of training there).")


def commands(report, device, end):
    """The README's command, then --scale paper for two minutes.

    end: the time by which both have to be done.
    """
    with TemporaryDirectory() as folder:
        folder, words = Path(folder), ["--backbone", "mlp", "--decoupled", "--device", device]
        limit = max(0, end - time.perf_counter() - PAPER_SECONDS)
        result = run_train(folder, "command", limit, *words)
        report.add("## The README's command\n\n`python train.py --backbone mlp --decoupled`, its "
                   f"demonstrations included, for at most {limit:.0f} s. " + describe(*result))

        # It finds the demonstrations of the run above, so all its time is for training.
        limit = max(0, min(PAPER_SECONDS, end - time.perf_counter()))
        result = run_train(folder, "paper", limit, *words, "--scale", "paper")
        config = train.settings(train.Config(scale="paper", device=device))
        report.add("## The paper's settings\n\nThe same command with `--scale paper`, for at most "
                   f"{limit:.0f} s. {describe(*result)} The whole of it is {config.stage1_steps:,} "
                   f"updates of stage 1 and {config.steps:,} of stage 2.")


def gpu(heads, device, updates, seconds, path):
    """All of it, in at most about `seconds`; the report is written to `path`.

    Returns how many of its three parts failed: the others are measured all the same.
    """
    begun, failed = time.perf_counter(), 0
    card = torch.cuda.get_device_name() if device == "cuda" else processor()
    report = Report(path)
    report.add(f"# Measured on {card}\n\n`python -m tests.benchmark gpu`, commit "
               f"{train.code_version()}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
               f"CUDA {torch.version.cuda}, processor {processor()}, {torch.get_num_threads()} "
               f"thread(s). TF32 for convolutions in fp32: {torch.backends.cudnn.allow_tf32}, for "
               f"other products: {torch.backends.cuda.matmul.allow_tf32} (PyTorch's defaults).")
    parts = {"rates": lambda: rates(report, heads, device, updates, begun + seconds / 3),
             "launches": lambda: launches(report, heads, device, updates, begun + seconds / 2),
             "commands": lambda: commands(report, device, begun + seconds)}
    for name, measure in parts.items():
        try:
            measure()
        except Exception as error:     # a GPU is lent for minutes: go on with what is left
            traceback.print_exc()
            report.add(f"**The part `{name}` failed**: {error!r:.200}")
            failed += 1
    report.add(f"All of this took {time.perf_counter() - begun:.0f} s.")
    return failed
