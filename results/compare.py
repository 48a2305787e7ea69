"""The paper's questions, one command each: a grid of ordinary train.py runs, a table, a figure.

    python -m results.compare recipes           run what is missing, then collect
    python -m results.compare recipes --list    print the missing runs' commands, one a line, for
                                                GNU parallel or a job array; then collect
    python -m results.compare recipes --collect      only collect what is finished
    python -m results.compare recipes --backbone mlp    only what concerns one backbone
    python -m results.compare --check runs/mlp-decoupled-full-laptop-seed0      is my run normal?

A cell is one run in a folder of its own, runs/compare/<its flags>-seed<n>: presets share cells, and
finished ones are skipped. Written: results/<preset>.json, .md and .png, and the table between the
preset's markers in README.md; cells that are in the .json already, but not in runs/, stay there.
"""
import argparse
import csv
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import train
from film import MECHANISMS
from heads import SIZES

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass
class Preset:
    """A question: its cells are label -> flags of train.py; paper: label -> the paper's success."""
    question: str
    cells: dict
    paper: dict
    task: str = "near"
    seeds: int = 2


RECIPES = {"normal": "", "decoupled": "--decoupled", "random frozen": "--random-backbone",
           "unfrozen after stage 1": "--pretrained"}
# An update of DP-MLP predicts 128 x 2 x 4 noises (observations x draws x horizon steps), one of the
# others 128 x 1 x 16: with half the updates, all heads learn from as many, in about the same time.
HALF = "--stage1-steps 1250 --steps 4000"
HEADS = {"DP-MLP": "--backbone mlp", "DP-C": f"--backbone unet {HALF}",
         "DP-T, cross-attention": f"--backbone transformer --conditioning cross-attention {HALF}",
         "DP-T, FiLM": f"--backbone transformer --conditioning film {HALF}"}


def both(label, flags):
    """The pair that most questions are about."""
    return {f"{label}, normal": flags, f"{label}, decoupled": f"{flags} --decoupled"}


PRESETS = {
    "main": Preset(
        "Does freezing cost success, on the whole benchmark?",
        {f"DP-MLP, {name}": f"--backbone mlp {RECIPES[name]}"
         for name in ("normal", "decoupled", "random frozen")},
        {"DP-MLP, normal": "64.3 / 65.9", "DP-MLP, decoupled": "61.1 / 61.2"}, "full", 3),
    "recipes": Preset(
        "Does freezing cost success?",
        {f"{head}, {name}": f"{flags} {recipe}" for head, flags in HEADS.items()
         for name, recipe in RECIPES.items()},
        {"DP-MLP, normal": "64.3 / 65.9", "DP-MLP, decoupled": "61.1 / 61.2",
         "DP-C, normal": "64.0 / 63.6", "DP-C, decoupled": "63.4 / 62.2",
         "DP-C, random frozen": "- / 0.0", "DP-T, cross-attention, normal": "59.8 / 60.4",
         "DP-T, cross-attention, decoupled": "38.7 / 19.4", "DP-T, FiLM, normal": "58.6 / -",
         "DP-T, FiLM, decoupled": "53.4 / -"}, seeds=3),
    "conditioning": Preset(
        "Which mechanism survives freezing?",
        {label: flags for name in MECHANISMS
         for label, flags in both(
             name, f"--backbone transformer --conditioning {name} {HALF}").items()} |
        both("prefix, twice the updates",
             "--backbone transformer --conditioning prefix --stage1-steps 2500 --steps 8000") |
        {f"cross-attention, {name}, decoupled":
         f"--backbone transformer --conditioning cross-attention {HALF} --decoupled {flags}"
         for name, flags in {"two tokens in stage 1": "--pretrain-tokens 2",
                             "keys and values trained": "--train-key-values"}.items()},
        {f"{name}, {recipe}": value for name, *values in (
            ("film", "59.5", "51.8"), ("adaln", "62.0", "62.3"), ("adaln-zero", "64.0", "64.5"),
            ("adarms", "63.8", "60.0"), ("additive", "57.0", "45.3"),
            ("cross-attention", "61.3", "19.8"), ("prefix", "56.3", "19.5"))
         for recipe, value in zip(("normal", "decoupled"), values)}),
    "source": Preset(
        "Does the stage-1 signal matter?",
        {f"{head}, {source}": f"{HEADS[head]} {flags}" for head in ("DP-MLP", "DP-C")
         for source, flags in {
             "joint angles": "--decoupled", "poses": "--decoupled --pretrain-condition pose",
             "nothing": "--decoupled --pretrain-condition none",
             "random frozen": "--random-backbone"}.items()},
        {"DP-C, joint angles": "62.2", "DP-C, poses": "62.2 to 63.8",
         "DP-C, nothing": "62.2 to 63.8", "DP-C, random frozen": "0.0"}),
    "data": Preset(
        "Is free data good enough?",
        {"arm motion": "--backbone mlp --decoupled",
         "the demonstrations' own paths": "--backbone mlp --decoupled --pretrain-data demonstrations",
         "too fast": "--backbone mlp --decoupled --pretrain-data fast",
         "too smooth": "--backbone mlp --decoupled --pretrain-data smooth",
         "1,500 demonstrations, normal": "--backbone mlp"} |
        {label: flags for number in (10, 30, 100) for label, flags in both(
            f"{number} demonstrations", f"--backbone mlp --num-demos {number}").items()},
        {"the demonstrations' own paths": "61.1 / 61.2"}),
    "size": Preset(
        "How small can the backbone get?",
        {f"width {width}, {depth} block{'s' * (depth > 1)}":
         f"--backbone mlp --decoupled --width {width} --depth {depth}"
         for width, depth in ((8, 4), (32, 4), (64, 4), (128, 1), (128, 2))} |
        {"width 128, 4 blocks": "--backbone mlp --decoupled"}, {}),
    "observation": Preset(
        "What must the policy see?",
        {"relative corners, two scales": "--backbone mlp --decoupled",
         "gym-pusht's keypoints": "--backbone mlp --decoupled --features keypoints",
         "relative corners, absolute actions": "--backbone mlp --decoupled --absolute-actions"},
        {}, "full"),
}


def runs(preset, seeds, backbone=None, conditioning=None):
    """All runs of a preset, or those of one backbone or mechanism: (label, folder, command)."""
    for label, flags in preset.cells.items():
        flags = " ".join(f"--task {preset.task} {flags}".split())
        slug = flags.replace("--backbone ", "").replace("--task ", "").replace("--", "")
        config, _ = train.parse(shlex.split(flags))
        if config.backbone in (backbone or config.backbone) and (
                config.conditioning in (conditioning or config.conditioning)):
            for seed in range(seeds):
                folder = Path("runs/compare") / f"{slug.replace(' ', '-')}-seed{seed}"
                yield label, folder, f"train.py {flags} --seed {seed} --out {folder}"


def curve(folder, points=25):
    """Some fixed updates of each stage: stage -> [[update, seconds, loss, success or None], ...]."""
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    stages = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(
            [int(row["step"]), float(row["seconds"]), round(float(row["loss"]), 5),
             float(row["success"]) if row.get("success") else None])
    # Some `points` of them, counted back from the last, and all at which success was recorded.
    return {stage: [row for left, row in zip(range(len(line) - 1, -1, -1), line)
                    if left % -(-len(line) // points) == 0 or row[3] is not None]
            for stage, line in stages.items()}


def collect(preset, file, seeds=100):
    """All finished runs of a preset: each one's summary, the label of its cell, and its curve.

    A run that is not here, but in an earlier `file`, is taken from there: nothing collected is lost.
    seeds: more than anyone has run, for what is there is shown, whoever asked for it.
    """
    earlier = json.loads(file.read_text())["cells"] if file.exists() else []
    earlier = {cell["command"].removesuffix(" --resume"): cell for cell in earlier}
    cells = []
    for label, folder, command in runs(preset, seeds):
        if (folder / "summary.json").exists():
            summary = json.loads((folder / "summary.json").read_text())
            cells.append({"cell": label} | summary | {"curve": curve(folder)})
        elif f"python {command}" in earlier:
            cells.append(earlier[f"python {command}"] | {"cell": label})
    return cells


def spread(cells, key):
    """Mean over seeds and its standard error: of the seeds, or of their scenes where that is more,
    for two or three seeds may agree by chance."""
    values = [cell[key] for cell in cells]
    scenes = [cell["score_se" if key == "score" else "success_se"] for cell in cells]
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0
    return np.mean(values), max(deviation, np.mean(np.square(scenes)) ** 0.5) / len(cells) ** 0.5


def groups(cells):
    """label -> the cells of all its seeds."""
    return {label: [cell for cell in cells if cell["cell"] == label]
            for label in dict.fromkeys(cell["cell"] for cell in cells)}


def table(name, cells):
    """Markdown: a row for each label. The paper's column is of other tasks (MimicGen, %)."""
    paper = PRESETS[name].paper
    lines = ["| | success, mean ± s.e. | each seed | score, mean ± s.e. | trained / frozen "
             "parameters |" + (" paper, other tasks |" if paper else ""),
             "|---|---|---|---|---|" + ("---|" if paper else "")]
    for label, group in groups(cells).items():
        success, score = (f"{mean:.3f} ± {error:.3f}" for mean, error in
                          (spread(group, key) for key in ("success_rate", "score")))
        trained, frozen = (group[0]["parameters"][key] / 1e6 for key in ("trained", "frozen"))
        columns = [label, success, " ".join(f"{cell['success_rate']:.3f}" for cell in group), score,
                   f"{trained:.3g}M / {frozen:.3g}M"]
        lines.append("| " + " | ".join(columns + ([paper.get(label, "-")] if paper else [])) + " |")
    hours = sum(cell["seconds"]["total"] * cell["threads"] for cell in cells) / 3600
    lines += ["", f"{len(cells)} runs, {hours:.1f} core-hours. ± is the standard error over the "
              f"seeds, or that of their {cells[0]['episodes']} scenes each where it is larger."]
    return "\n".join(lines) + "\n"


def split_at_markers(text, name):
    """What stands before, between and after <!-- name --> and <!-- /name --> in the README."""
    before, found, rest = text.partition(f"<!-- {name} -->\n")
    shown, end, after = rest.partition(f"<!-- /{name} -->")
    return before + found, shown, end + after


def draw(name, cells, path):
    """Bars of success and score with their standard errors; below, learning curves in stage 2.

    The labels of one head or mechanism share a panel of curves, and each has its color there.
    """
    import matplotlib.pyplot as plt
    labels, panels = groups(cells), {}
    for label in labels:
        head, _, variant = label.rpartition(", ")
        head = head if head in HEADS else head.split(", ")[0] if variant in RECIPES else ""
        panels.setdefault(head, []).append(label)
    color = {label: f"C{i}" for group in panels.values() for i, label in enumerate(group)}
    columns, bars = max(len(panels), 2), 0.3 * len(labels) + 1
    figure = plt.figure(figsize=(min(3 * columns + 2, 16), bars + 5.5), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=(bars, 5.5))
    for axis, key in zip(upper.subplots(1, 2, sharey=True), ("success_rate", "score")):
        for row, (label, group) in enumerate(labels.items()):
            mean, error = spread(group, key)
            axis.barh(row, mean, xerr=error, color=color[label], alpha=0.5, capsize=3)
            axis.plot([cell[key] for cell in group], [row] * len(group), "k.", ms=5)
        axis.set(xlabel=f"{key.replace('_', ' ')} (dots: seeds)", xlim=(0, 1))
        axis.set_yticks(range(len(labels)), labels)
        axis.grid(axis="x", alpha=0.3)
    axis.invert_yaxis()
    draw_curves(lower, labels, panels, color)
    figure.suptitle(f"{PRESETS[name].question} (task {PRESETS[name].task})")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_curves(figure, labels, panels, color):
    """Success in 50 scenes on the way, per update and per second, stage 1 included; or the loss, if
    no run has recorded success. The paper's Figure 3, but for its running maximum.

    labels: label -> cells; panels: head -> labels; color: label -> matplotlib color.
    """
    recorded = any(played(cell) for cells in labels.values() for cell in cells)
    what = dict(ylim=(0, 1)) if recorded else dict(yscale="log")
    axes = figure.subplots(2, len(panels), sharex="row", sharey=True, squeeze=False)
    for column, (head, group) in enumerate(panels.items()):
        for label in group:
            lines = [played(cell) if recorded else [row[:3] for row in cell["curve"]["stage2"]]
                     for cell in labels[label]]
            if any(lines):
                step, seconds, y = np.mean([line for line in lines if line], axis=0).T
                before = np.mean([cell["seconds"].get("stage1", 0) for cell in labels[label]])
                for axis, x in zip(axes[:, column], (step, seconds + before)):
                    axis.plot(x, y, ".-", color=color[label], label=label.removeprefix(f"{head}, "))
        for axis, x in zip(axes[:, column], ("update of stage 2", "second, stage 1 included")):
            axis.set(xlabel=x, **what)
            axis.grid(alpha=0.3)
        axes[0, column].set(title=head)
        if axes[0, column].lines:
            axes[0, column].legend(fontsize="x-small", handlelength=1)
    for axis in axes[:, 0]:
        axis.set(ylabel="success on the way" if recorded else "loss", xlim=(0, None))


def played(cell):
    """Success over stage 2: [[update, seconds, success], ...], the last in all evaluation scenes."""
    line = cell["curve"]["stage2"]
    way = [[*row[:2], row[3]] for row in line if row[3:] not in ([], [None])]
    return way and way + [[*line[-1][:2], cell["success_rate"]]]


def publish(name, cells, out):
    """Write all that is made of the cells to the folder `out`, if that is results/ to README.md too."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(
        '{"cells": [\n' + ",\n".join(json.dumps(cell) for cell in cells) + "\n]}\n")
    (out / f"{name}.md").write_text(table(name, cells))
    draw(name, cells, out / f"{name}.png")
    readme = ROOT / "README.md"
    before, _, after = split_at_markers(readme.read_text(), name)
    if after and out.resolve() == HERE:
        readme.write_text(before + table(name, cells) + after)
    print(table(name, cells))


def settings(run):
    """All that a run's command sets or leaves at its default, but for the seed and where it ran."""
    config, _ = train.parse(shlex.split(run["command"])[2:]
                            + ["--scale", run["scale"], "--device", "cpu"])
    return {key: value for key, value in vars(config).items()
            if key not in (*train.Run.MAY_DIFFER, "seed")}


def check(folder):
    """Compare a run with the committed ones of the same kind; returns the lines to print."""
    try:
        run = json.loads((folder / "summary.json").read_text())
        lines = curve(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no finished run of train.py: {error}") from None
    committed = {cell["command"]: cell for file in HERE.glob("*.json")     # presets share cells
                 for cell in json.loads(file.read_text())["cells"]}
    known = [cell for cell in committed.values() if settings(cell) == settings(run)]
    if not known:
        raise ValueError(f"no committed run is of this kind: {run['command']}")
    report = [f"compared with {len(known)} committed runs"]

    def judge(what, value, band, low, high, cause):
        """low, high: how much of the band's edges is still normal, for chance has few seeds here."""
        inside = low * min(band) <= value <= high * max(band)
        report.append(f"{'OK     ' if inside else 'OUTSIDE'} {what}: {value:.3g}, committed "
                      f"{min(band):.3g} to {max(band):.3g}" + ("" if inside else f". {cause}"))

    for stage, line in lines.items():
        bands = [{step: loss for step, _, loss, *_ in cell["curve"].get(stage, [])} for cell in known]
        shared = [(step, loss, band) for step, _, loss, *_ in line
                  if len(band := [b[step] for b in bands if step in b]) == len(known)]
        for step, loss, band in (shared[len(shared) // 4::len(shared) // 4] if shared else []):
            judge(f"{stage} loss at update {step:,}", loss, band, 0.85, 1.15,
                  "Higher: learning rate, fewer or other demonstrations, a frozen part that should "
                  "learn. Lower: fewer demonstrations than here, learnt by heart")
    for key in ("score", "success_rate"):
        judge(key.replace("_", " "), run[key], [cell[key] for cell in known], 0.95, 1.05,
              "If the losses are OK: other evaluation scenes, executed actions or sampler; few "
              "scenes scatter")
    for stage, rate in run["iterations_per_second"].items():
        judge(f"{stage} updates a second", rate,
              [cell["iterations_per_second"][stage] for cell in known], 0.5, 20,
              "Slower: another program computes at the same time, or it is a slower machine")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"compare: {message} (--help tells more)\n")
    parser.add_argument("preset", nargs="?", choices=PRESETS)
    parser.add_argument("--seeds", type=int, help="default 3 for main and recipes, 2 for the others")
    parser.add_argument("--backbone", nargs="+", choices=sorted({name for name, _ in SIZES}),
                        help="run only cells of these; what is finished is collected all the same")
    parser.add_argument("--conditioning", nargs="+", choices=MECHANISMS, help="the same")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for table, figure and "
                        ".json; default results/, whose tables are also those of the README")
    parser.add_argument("--list", action="store_true", help="print the missing runs' commands")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    parser.add_argument("--check", type=Path, metavar="RUN", help="compare a run's folder with the "
                        "committed results")
    options = parser.parse_args()
    if options.check:
        try:
            print("\n".join(check(options.check)))
        except ValueError as error:
            parser.error(error)
        return
    if not options.preset:
        parser.error(f"which question? {', '.join(PRESETS)}")
    preset = PRESETS[options.preset]
    seeds = options.seeds or preset.seeds
    missing = [(folder, command) for _, folder, command in runs(
        preset, seeds, options.backbone, options.conditioning)
               if not (folder / "summary.json").exists()]
    if options.list:
        print("\n".join(f"python {command}" for _, command in missing))
        return
    if not options.collect:
        print(f"{len(missing)} runs to go, about {train.SETTINGS['laptop']['minutes'][preset.task]} "
              "each for DP-MLP, longer for the others; interrupt and call again as you like")
        for folder, command in tqdm(missing, desc=options.preset, unit="run"):
            resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
            done = subprocess.run([sys.executable, *shlex.split(command), *resume])
            if done.returncode:
                sys.exit(f"compare: this run failed, see above: python {command}")
    cells = collect(preset, options.out / f"{options.preset}.json")
    if not cells:
        parser.error("no finished run to collect")
    publish(options.preset, cells, options.out)


if __name__ == "__main__":
    main()
