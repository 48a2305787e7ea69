"""What becomes of the runs that results/compare.py makes: cells, a table in Markdown, a figure.

A cell is one finished run: its summary.json, the label of its row (`cell`), its settings and its
learning curve.
"""
import csv
import json
import re
import textwrap
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# What makes two runs comparable, but for the seed; the losses do not depend on the precision.
KIND = ("backbone", "conditioning", "recipe", "task", "scale", "width", "pretrain_condition",
        "pretrain_data", "demos", "num_demos", "stage1_steps", "steps", "learning_rate", "episodes",
        "executed_actions")
# What summary.json says about each of several tasks.
TASK = ("task", "episodes", "score", "score_se", "success_rate", "success_se", "max_coverage",
        "final_coverage")


# Reading -----------------------------------------------------------------------------------------

def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_run(folder):
    """A run's cell, but for the label. OSError, ValueError, KeyError if the folder holds none."""
    config = read(folder / "config.json")
    settings = {key: config[key] for key in KIND}
    if config.get("keep_biases"):     # runs of older code do not have it
        settings["keep_biases"] = True
    if config.get("observation", "state") != "state":
        settings |= {key: config[key] for key in ("observation", "corner_weight")}
    if config.get("action_head"):     # made by which run, whatever its seed
        settings["action_head"] = re.sub(r"-seed\d+", "", Path(config["action_head"]).parent.name)
    return read(folder / "summary.json") | {"settings": settings, "curve": read_curve(folder)}


def read_curve(folder, points=25):
    """Some updates of each stage: stage -> [[update, seconds, loss, success or None], ...].

    About so many points, counted back from the last, and all at which success was recorded.
    """
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    if not logged:
        raise ValueError("metrics.csv holds no row")
    curve = {}
    for stage in dict.fromkeys(row["stage"] for row in logged):
        rows = [row for row in logged if row["stage"] == stage]
        every = -(-len(rows) // points)
        curve[stage] = []
        for index, row in enumerate(rows, start=1):
            success = float(row["success"]) if row["success"] else None
            if (len(rows) - index) % every == 0 or success is not None:
                step, seconds = int(row["step"]), float(row["seconds"])
                loss = round(float(row["loss"]), 5)
                curve[stage].append([step, seconds, loss, success])
    return curve


def average(runs):
    """One cell of the runs of one row and seed. Of several runs, each for a task, it is their mean.

    All tasks count alike. Parameters, seconds and updates of the curve are those of all runs
    together.
    """
    if len(runs) == 1:
        return runs[0]
    cell = dict(runs[0])
    for key in ("score", "success_rate", "max_coverage", "final_coverage"):
        cell[key] = float(np.mean([run[key] for run in runs]))
    for key in ("score_se", "success_se"):
        cell[key] = float(np.linalg.norm([run[key] for run in runs]) / len(runs))
    for key in ("parameters", "seconds"):
        cell[key] = {name: sum(run[key][name] for run in runs) for name in runs[0][key]}
    cell["task"] = ",".join(run["task"] for run in runs)
    cell["tasks"] = [{key: run[key] for key in TASK} for run in runs]
    cell["episodes"] = sum(run["episodes"] for run in runs)
    cell["command"] = " && ".join(run["command"] for run in runs)
    cell["runs"] = len(runs)
    # "+": no run has such a task, so `compare --check` takes none for one of this kind.
    cell["settings"] = runs[0]["settings"] | {"task": cell["task"].replace(",", "+")}
    cell["curve"] = {stage: [average_row(rows) for rows in zip(*(run["curve"][stage]
                                                                 for run in runs))]
                     for stage in runs[0]["curve"]}
    return cell


def average_row(rows):
    """One row of a learning curve: updates and seconds of all runs, their mean loss and success."""
    steps, seconds, losses, successes = zip(*rows)
    success = None if None in successes else float(np.mean(successes))
    return [sum(steps), round(sum(seconds), 2), round(float(np.mean(losses)), 5), success]


# Table -------------------------------------------------------------------------------------------

def groups(cells):
    """label -> the cells of all its seeds."""
    by_label = {}
    for cell in cells:
        by_label.setdefault(cell["cell"], []).append(cell)
    return by_label


def spread(cells, key):
    """Mean of "success_rate" or "score" over the seeds, and its standard error.

    The error is that of the seeds or, where it is more, that of their scenes: two or three seeds
    may agree by chance.
    """
    values = [cell[key] for cell in cells]
    of_seeds = np.std(values, ddof=1) if len(values) > 1 else 0
    error = "score_se" if key == "score" else "success_se"
    of_scenes = np.mean([cell[error] ** 2 for cell in cells]) ** 0.5
    return np.mean(values), max(of_seeds, of_scenes) / len(values) ** 0.5


def table(preset, cells):
    """Markdown: a row for each label. The paper has a column if it has a number for any of them."""
    paper = {label: value for label, _, value in preset.table()}
    columns = ["", "success, mean ± s.e.", "each seed", "score, mean ± s.e.",
               "trained / frozen parameters", "paper, other tasks"]
    tasks = [each["task"] for each in cells[0].get("tasks", [])]     # where there are several
    if tasks:
        columns.insert(2, f"success: {' / '.join(tasks)}")
    rows = [columns]
    for label, group in groups(cells).items():
        success = "{:.3f} ± {:.3f}".format(*spread(group, "success_rate"))
        score = "{:.3f} ± {:.3f}".format(*spread(group, "score"))
        seeds = [f"{cell['success_rate']:.3f}" for cell in group]
        parameters = group[0]["parameters"]
        sizes = [f"{parameters[part] / 1e6:.3g}M" for part in ("trained", "frozen")]
        row = [label, success, " ".join(seeds), score, " / ".join(sizes), paper[label]]
        if tasks:
            rates = [[each["success_rate"] for each in cell["tasks"]] for cell in group]
            of_each = np.mean(rates, axis=0)
            row.insert(2, " / ".join(f"{rate:.3f}" for rate in of_each))
        rows.append(row)
    if set(paper.values()) == {"-"}:
        rows = [row[:-1] for row in rows]
    return markdown(rows) + f"\n{footnote(cells)}\n"


def markdown(rows):
    """A table in Markdown; the first row is its head."""
    head, *others = rows
    lines = [head, ["---"] * len(head), *others]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def footnote(cells):
    """How many runs, in which precision, what they took, and by which code."""
    precision = sorted({cell.get("precision", "fp32") for cell in cells})
    seconds = sum(cell["seconds"]["total"] * cell["threads"] for cell in cells)
    commits = sorted({cell["commit"] for cell in cells})
    scenes = cells[0]["episodes"]
    if "tasks" in cells[0]:     # several: scenes of each
        scenes = cells[0]["tasks"][0]["episodes"]
    number = sum(cell.get("runs", 1) for cell in cells)
    return (f"{number} runs in {' and '.join(precision)}, {seconds / 3600:.1f} core-hours, "
            f"{scenes} scenes each. Commits: {', '.join(commits)}.")


def split_at_markers(text, name):
    """What stands before, between and after <!-- name --> and <!-- /name -->.

    Raises ValueError if the text lacks one of the two.
    """
    before, opened, rest = text.partition(f"<!-- {name} -->\n")
    shown, closed, after = rest.partition(f"<!-- /{name} -->")
    if not closed:
        raise ValueError(f"there is no <!-- {name} --> and <!-- /{name} --> for the table")
    return before + opened, shown, closed + after


def insert(text, name):
    """Put a table between its markers, which are in results/earlier.md or in results/README.md."""
    path = HERE / "earlier.md"
    if f"<!-- {name} -->" not in path.read_text(encoding="utf-8"):
        path = HERE / "README.md"
    before, _, after = split_at_markers(path.read_text(encoding="utf-8"), name)
    path.write_text(before + text + after, encoding="utf-8")


def publish(name, preset, cells, out):
    """Write what is made of the cells to the folder `out`; for results/ also to its README.md."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    (out / f"{name}.json").write_text('{"cells": [\n' + lines + "\n]}\n", encoding="utf-8")
    text = table(preset, cells)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    draw(preset, cells, out / f"{name}.png")
    if name == "main":
        draw_front(cells, out / "front.png")
    if out.resolve() == HERE:
        insert(text, name)
    print(text)


# Figures -----------------------------------------------------------------------------------------

# One color for a recipe, in all figures.
COLORS = {"normal": "C0", "decoupled": "C1", "random frozen": "0.6",
          "unfrozen after stage 1": "C2", "decoupled, biases kept": "C4"}


def name_of_recipe(cell):
    """The recipe of a cell as the tables call it."""
    if cell.get("settings", {}).get("keep_biases"):
        return "decoupled, biases kept"
    return {"random-frozen": "random frozen",
            "pretrained": "unfrozen after stage 1"}.get(cell["recipe"], cell["recipe"])


def draw(preset, cells, path):
    """What is compared as groups of bars, a bar for each recipe; what freezing changes; below,
    success on the way of up to four groups."""
    from matplotlib.figure import Figure
    by_group = {}     # group -> recipe -> the cells of its seeds
    for label, group in groups(cells).items():
        recipe = name_of_recipe(group[0])
        by_group.setdefault(label.removesuffix(f", {recipe}"), {})[recipe] = group
    recipes = [recipe for recipe in COLORS if any(recipe in each for each in by_group.values())]
    has_changes = any({"normal", "decoupled"} <= set(each) for each in by_group.values())
    has_curves = len(by_group) <= 4 and len(recipes) > 1
    height = 0.25 * len(groups(cells)) + 0.2 * len(by_group) + 1.2
    with style():
        figure = Figure(figsize=(8, height + 3 * has_curves), layout="constrained")
        upper, lower = figure, None
        if has_curves:
            upper, lower = figure.subfigures(2, height_ratios=(height, 3))
        ratios = (3, 2) if has_changes else (1,)
        axes = upper.subplots(1, len(ratios), squeeze=False, sharey=True, width_ratios=ratios)[0]
        draw_bars(axes[0], by_group)
        legend = {recipe: axes[0].barh(0, 0, color=COLORS[recipe], alpha=0.7)
                  for recipe in recipes if len(recipes) > 1}
        if has_changes:
            legend |= draw_changes(axes[1], by_group, preset)
        if legend:
            upper.legend(legend.values(), legend, ncols=3, loc="outside lower center")
        if has_curves:
            panels = lower.subplots(1, len(by_group), sharey=True, squeeze=False)[0]
            width = 80 // len(by_group)     # letters of a panel's title
            for axis, (name, each) in zip(panels, by_group.items()):
                for recipe, group in each.items():
                    axis.plot(*curve(group), ".-", color=COLORS[recipe])
                title = textwrap.fill(name, width, break_on_hyphens=False)
                axis.set(title=title, xlabel="updates with\ndemonstrations",
                         xlim=(0, None), ylim=(0, 1))
            panels[0].set_ylabel("success in training")
        figure.savefig(path, dpi=100)


def style():
    """Letters that can be read when the figure is shown at half its size."""
    import matplotlib
    return matplotlib.rc_context({"font.size": 12, "axes.titlesize": 12})


def draw_bars(axis, by_group):
    """Success: a bar with its standard error for each recipe, a dot for each seed."""
    y, centers = 0, []
    for each in by_group.values():
        first = y
        for recipe, cells in each.items():
            mean, error = spread(cells, "success_rate")
            axis.barh(y, mean, 0.9, xerr=error, color=COLORS[recipe], alpha=0.7, capsize=3)
            seeds = [cell["success_rate"] for cell in cells]
            axis.plot(seeds, [y] * len(seeds), "k.", ms=5)
            y += 1
        centers.append((first + y - 1) / 2)
        y += 0.8
    axis.set_yticks(centers, [textwrap.fill(name, 24) for name in by_group])
    axis.set(xlim=(0, 1), ylim=(y - 1.2, -0.6), title="success (dots: seeds)")
    axis.grid(axis="x", alpha=0.3)


def draw_changes(axis, by_group, preset):
    """Decoupled minus normal, here with two standard errors, and in the paper. Returns the legend."""
    paper = {label: value for label, _, value in preset.table()}
    legend, y = {}, 0
    axis.axvline(0, color="0.5", lw=1)
    for name, each in by_group.items():
        center = y + (len(each) - 1) / 2
        y += len(each) + 0.8
        if not {"normal", "decoupled"} <= set(each):
            continue
        (normal, of_normal), (decoupled, of_decoupled) = (
            spread(each[recipe], "success_rate") for recipe in ("normal", "decoupled"))
        legend["change, here ± 2 s.e."] = axis.errorbar(
            100 * (decoupled - normal), center, color="C1", fmt="o", capsize=3,
            xerr=200 * np.hypot(of_normal, of_decoupled))
        theirs = change_in_paper(*(paper.get(f"{name}, {recipe}", "-")
                                   for recipe in ("normal", "decoupled")))
        if theirs is not None:
            legend["change, paper"], = axis.plot(theirs, center, "kD", fillstyle="none")
    axis.set(title="change by freezing", xlabel="percentage points")
    axis.grid(axis="x", alpha=0.3)
    return legend


def change_in_paper(normal, decoupled):
    """In the last version of the paper that has both, from texts such as "64.3 / 65.9"; or None."""
    for before, after in list(zip(normal.split(" / "), decoupled.split(" / ")))[::-1]:
        if "-" not in (before, after):
            return float(after) - float(before)
    return None


def curve(cells):
    """Mean success of the seeds over the updates: (updates, success).

    The counterpart of the paper's Figure 3, which shows its running maximum.
    """
    by_step = {}     # update -> success of each seed
    for cell in cells:
        points = [(step, success) for step, _, _, success in cell["curve"]["stage2"]
                  if success is not None]
        for step, success in [*points, (cell["curve"]["stage2"][-1][0], cell["success_rate"])]:
            by_step.setdefault(step, []).append(success)
    return sorted(by_step), [np.mean(by_step[step]) for step in sorted(by_step)]


FRONT = {"normal": "normal:\nall weights learn\nfrom demonstrations",
         "decoupled": "decoupled:\nhead from free motion,\nthen frozen",
         "random frozen": "control:\nhead of random weights,\nfrozen"}


def draw_front(cells, path):
    """The three bars of README.md: success with its standard error, a dot for each seed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for place, (recipe, name) in enumerate(FRONT.items()):
        group = [cell for cell in cells if cell["cell"] == f"full, {recipe}"]
        mean, error = spread(group, "success_rate")
        axis.bar(place, 100 * mean, 0.6, yerr=100 * error, capsize=6, color=COLORS[recipe])
        axis.plot([place] * len(group), [100 * cell["success_rate"] for cell in group], "k.")
        axis.text(place, 3, f"{100 * mean:.0f} %", ha="center", fontsize=15, color="white")
    axis.set_xticks(range(len(FRONT)), FRONT.values())
    axis.set(ylim=(0, 100), ylabel="success in %",
             title="DP-MLP in 200 scenes that no demonstration shows")
    figure.savefig(path, dpi=100)
