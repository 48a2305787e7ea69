"""What becomes of the measurements of results/swap.py: tables in Markdown, a figure, a GIF."""
import json

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

from results import report

LEGS = "first leg", "second leg", "third leg"
GOALS = "first goal", "second goal"
COLORS = "C9", "C3"     # of the goals; no recipe has them (report.COLORS)


def publish(cells, blocks, frames, out):
    """Write swap.json and swap.md to the folder `out`; swap.png and swap.gif where there are
    modulations to show. Arguments: see `draw` and `animate`."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    (out / "swap.json").write_text('{"cells": [\n' + lines + "\n]}\n", encoding="utf-8")
    (out / "swap.md").write_text(tables(cells), encoding="utf-8")
    if blocks:
        draw(cells, blocks, out / "swap.png")
        animate(frames, out / "swap.gif")


def mean_of(entries, key):
    """Mean ± standard error over the seeds, see report.spread."""
    return "{:.3f} ± {:.3f}".format(*report.spread(entries, key))


def split(cells):
    """The cells of each table: {"legs": {label: [a cell a seed]}, "goals": ..., "shares": ...}."""
    found = report.groups(cells)
    return {kind: {label: group for label, group in found.items() if kind in group[0]}
            for kind in ("legs", "goals", "shares")}


def tables(cells):
    """All tables in Markdown: legs, parts, shares; each mean is over the seeds in `cells`."""
    kinds = split(cells)
    rows = [["success", *LEGS]]
    for label, group in kinds["legs"].items():
        legs = zip(*(cell["legs"] for cell in group))
        rows.append([label, *(mean_of(leg, "success_rate") for leg in legs)])
    text = report.markdown(rows)
    if kinds["goals"]:
        rows = [["from the second conditioning, 200 steps", "success, first goal",
                 "score, first goal", "success, second goal", "score, second goal"]]
        for label, group in kinds["goals"].items():
            goals = zip(*(cell["goals"] for cell in group))
            rows.append([label, *(mean_of(goal, key) for goal in goals
                                  for key in ("success_rate", "score"))])
        text += "\n" + report.markdown(rows)
    if kinds["shares"]:
        rows = [["share of the variance", *cells[-1]["shares"]]]
        for label, group in kinds["shares"].items():
            means = [np.mean([cell["shares"][name] for cell in group]) for name in rows[0][1:]]
            rows.append([label, *(f"{mean:.2f}" for mean in means)])
        text += "\n" + report.markdown(rows)
    seeds = len({cell["seed"] for cell in cells})
    text += f"\n{seeds} seed(s), {cells[0]['scenes']} scenes each."
    if "commit" in cells[0]:     # of policies that were trained for this table
        text += f" Commits: {cells[0]['commit']}."
    return text + "\n"


def draw(cells, blocks, path):
    """Bars of the legs; the score by block and by denoising step; a heat map for each block.

    blocks: for each block, how far gamma is from doing nothing, (task, scene, D).
    """
    kinds = split(cells)
    with report.style():
        figure = Figure(figsize=(8, 13), layout="constrained")
        legs, parts, heat = figure.subfigures(3, 1, height_ratios=(5, 3.5, 4.5))
        draw_legs(legs, kinds["legs"])
        draw_parts(parts, kinds["goals"])
        draw_modulations(heat, blocks)
        figure.savefig(path, dpi=100)


def draw_legs(figure, by_label):
    axis = figure.subplots()
    for leg, name in enumerate(LEGS):
        means = [report.spread([cell["legs"][leg] for cell in group], "success_rate")
                 for group in by_label.values()]
        mean, error = np.array(means).T
        heights = np.arange(len(means)) + 0.27 * (leg - 1)
        goal, opacity = leg % 2, (1, 1, 0.5)[leg]     # there, elsewhere, back
        axis.barh(heights, mean, 0.25, xerr=error, label=f"{name}, {GOALS[goal]}",
                  color=COLORS[goal], alpha=opacity)
        for height, value in zip(heights, mean):
            axis.text(1.02, height, f"{value:.2f}", va="center", fontsize=10)
    axis.set_yticks(range(len(by_label)), [label.replace(": ", ":\n") for label in by_label])
    axis.set(xlim=(0, 1), title="success in three legs: there, elsewhere, back")
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), ncols=2, loc="outside lower center")


def draw_parts(figure, by_label):
    """The score at both goals, not success: with a part of the modulations few scenes succeed."""
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    for axis, word, title in zip(axes, ("block ", "last"), ("block", "last denoising steps")):
        labels = [label for label in by_label if label.startswith(("nothing", word, "all"))]
        for goal, name in enumerate(GOALS):
            means = [report.spread([cell["goals"][goal] for cell in by_label[label]], "score")
                     for label in labels]
            axis.errorbar(range(len(labels)), *np.array(means).T, label=name, capsize=3,
                          color=COLORS[goal], fmt="o-" if word == "last" else "o")
        numbers = [label.split(" ", 1)[1].split(" denoising")[0] for label in labels[1:-1]]
        axis.set_xticks(range(len(labels)), ["none", *numbers, "all"])
        axis.set(ylim=(0, 1), xlabel=title)
    axes[0].set_ylabel("score, 200 steps")
    figure.suptitle("which part takes its modulations from the second conditioning", fontsize=12)
    figure.legend(*axes[1].get_legend_handles_labels(), ncols=2, loc="outside lower center")


def draw_modulations(figure, blocks):
    figure.suptitle("What modulates each block at the last denoising step (FiLM: gamma - 1).\n"
                    "Above the line: scenes with the first conditioning.\n"
                    "Below: the same scenes with the second.", fontsize=12)
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    limit = np.percentile(np.abs(np.concatenate([block.ravel() for block in blocks])), 95)
    for number, (axis, block) in enumerate(zip(axes, blocks)):
        order = np.argsort(block[1].mean(0) - block[0].mean(0))
        image = axis.imshow(np.concatenate(block)[:, order], cmap="coolwarm", aspect="auto",
                            vmin=-limit, vmax=limit)
        axis.axhline(len(block[0]) - 0.5, color="k")
        axis.set(title=f"block {number + 1}", xlabel="features, by the difference", yticks=[])
    figure.colorbar(image, ax=axes)


def animate(frames, path):
    """A GIF: the board, and beside it gamma and beta; frames: see swap.frames_of."""
    picture, strip, _ = frames[0]
    figure = Figure(figsize=(7, 3.6))
    figure.subplots_adjust(0.01, 0.15, 0.98, 0.9, 0.15)
    board, beside = figure.subplots(1, 2)
    board.set_axis_off()
    beside.set(xlabel="gamma - 1, then beta, of every fourth feature", ylabel="block")
    beside.set_yticks(range(len(strip)), range(1, len(strip) + 1))
    shown = board.imshow(picture)
    limit = np.percentile(np.abs([strip for _, strip, _ in frames]), 95)
    image = beside.imshow(strip, cmap="coolwarm", aspect="auto", vmin=-limit, vmax=limit,
                          interpolation="nearest")
    title = figure.suptitle(" ")

    def show(frame):
        picture, strip, words = frame
        shown.set_data(picture)
        image.set_data(strip)
        title.set_text(words)

    animation = FuncAnimation(figure, show, frames, cache_frame_data=False)
    animation.save(path, PillowWriter(fps=10), dpi=60)
