"""One question, one command: a grid of ordinary train.py runs, collected into a table and a figure.

    python -m results.compare main              run what is missing, then collect
    python -m results.compare main --list       print the missing runs' commands, one a line, for
                                                GNU parallel or a job array; then call it again
    python -m results.compare main --collect    only collect what is finished

A cell is one run in its own folder, runs/<preset>/<cell>-seed<n>; finished cells are skipped.
Written: results/<preset>.json and .png, and the table between the preset's markers in README.md.
"""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).parent
RECIPES = {"normal": "", "decoupled": "--decoupled", "random frozen": "--random-backbone"}

# preset -> cell -> the flags of train.py
PRESETS = {
    "main": {f"{task}, {name}": f"--backbone mlp --task {task} {flags}"
             for task in ("full", "near") for name, flags in RECIPES.items()},
}


def runs(preset, seeds):
    """All runs of a preset: (cell, folder, command)."""
    for cell, flags in PRESETS[preset].items():
        for seed in range(seeds):
            folder = Path("runs") / preset / f"{cell.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            yield cell, folder, f"train.py {flags} --seed {seed} --out {folder}"


def collect(preset, seeds):
    """The finished runs' summaries, each with its cell's name."""
    cells = []
    for cell, folder, _ in runs(preset, seeds):
        if (folder / "summary.json").exists():
            cells.append({"cell": cell} | json.loads((folder / "summary.json").read_text()))
    return cells


def spread(values):
    """Mean and standard error over seeds."""
    return np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def table(cells):
    """Markdown: one row a cell, success and score of each seed and their mean."""
    lines = ["| task, recipe | success, mean ± s.e. over seeds | each seed | score, mean ± s.e. "
             "| each seed | trained / frozen parameters |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(cell["cell"] for cell in cells):
        group = [cell for cell in cells if cell["cell"] == name]
        columns = [name]
        for key in ("success_rate", "score"):
            values = [cell[key] for cell in group]
            mean, error = spread(values)
            columns += [f"{mean:.3f} ± {error:.3f}", " ".join(f"{value:.3f}" for value in values)]
        parameters = group[0]["parameters"]
        columns += [f"{parameters['trained'] / 1e6:.2f}M / {parameters['frozen'] / 1e6:.2f}M"]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def split_at_markers(text, preset):
    """What stands before, between and after <!-- preset --> and <!-- /preset --> in the README."""
    before, found, rest = text.partition(f"<!-- {preset} -->\n")
    shown, end, after = rest.partition(f"<!-- /{preset} -->")
    return before + found, shown, end + after


def draw(cells, path):
    import matplotlib.pyplot as plt
    names = list(dict.fromkeys(cell["cell"] for cell in cells))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(names) + 1.2), sharey=True,
                                layout="constrained")
    for axis, key in zip(axes, ("success_rate", "score")):
        for row, name in enumerate(names):
            values = [cell[key] for cell in cells if cell["cell"] == name]
            mean, error = spread(values)
            axis.barh(row, mean, xerr=error, color="C0", alpha=0.5, capsize=3)
            axis.plot(values, [row] * len(values), "k.", ms=5)
        axis.set(xlabel=key.replace("_", " "), xlim=(0, 1))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="print the missing runs' commands")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    missing = [command for _, folder, command in runs(arguments.preset, arguments.seeds)
               if not (folder / "summary.json").exists()]
    if arguments.list:
        print("\n".join(f"python {command}" for command in missing))
        return
    for command in [] if arguments.collect else tqdm(missing, desc=arguments.preset, unit="run"):
        subprocess.run([sys.executable, *shlex.split(command)], check=True)
    cells = collect(arguments.preset, arguments.seeds)
    if not cells:
        parser.exit(2, "no finished run to collect\n")
    stem = HERE / arguments.preset
    stem.with_suffix(".json").write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    draw(cells, stem.with_suffix(".png"))
    readme = HERE.parent / "README.md"
    before, shown, after = split_at_markers(readme.read_text(), arguments.preset)
    readme.write_text(before + table(cells) + after)
    print(table(cells))


if __name__ == "__main__":
    main()
