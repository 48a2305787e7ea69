"""The bug hunt: a copy of the six files with some of the silent mistakes of tests/mutants.py."""
import ast
import functools
import random

from tests.assignments import code
from tests.mutants import MUTANTS

# The names of those that suit a hunt: `python train.py --smoke --decoupled` ends as it does without
# them, and reaches other numbers (checked by -m zoo, for each). So none of them is in code that this
# command leaves out, such as the other heads. To add one, name it here.
NAMES = (
    "act-always-ddpm", "act-denormalise-other-agent", "act-first-is-0", "act-first-is-To",
    "act-generator-dropped", "act-no-clamp", "act-one-more", "act-until-Ta",
    "arm-absolute-angles", "arm-edge-clamp", "arm-half-turns", "arm-jacobian-next-joint",
    "arm-jacobian-sign", "arm-limits-at-one-time", "arm-limits-fold", "arm-never-stands",
    "arm-no-base", "arm-not-smoothed", "arm-pairs-mixed", "arm-plan-for-position",
    "arm-speed-changes-each-step", "arm-speed-uniform", "arm-transpose-for-inverse",
    "arm-turns-each-step", "arm-undamped", "arm-upper-limit-only", "ddim-clean-is-timestep-99",
    "ddim-last-not-clean", "ddim-noise-derived-again", "ddim-previous-is-next", "ddim-stays",
    "ddim-timesteps-from-99", "ddpm-clean-clipped-too-early", "ddpm-clean-not-clipped",
    "ddpm-clean-not-divided", "ddpm-cosine-not-squared", "ddpm-no-offset",
    "ddpm-noise-not-scaled", "ddpm-scale-not-rooted", "ddpm-scales-swapped",
    "ddpm-signal-is-alpha", "ddpm-starts-at-zero", "film-draws-tiled", "film-no-mish-on-o",
    "film-no-mish-on-tau", "film-no-time", "film-one-plus-gamma", "film-sample-axis",
    "film-split-axis", "film-starts-at-zero", "film-swapped", "film-vectors-interleaved",
    "fit-adam", "fit-clip-too-early", "fit-clip-values", "fit-default-betas", "fit-default-decay",
    "fit-ema-before-step", "fit-ema-by-reference", "fit-ema-constant", "fit-ema-not-copied",
    "fit-ema-one-early", "fit-ema-other-module", "fit-ema-plain-mean", "fit-ema-swapped",
    "fit-half-cosine", "fit-no-clip", "fit-no-cosine", "fit-no-schedule", "fit-no-warmup",
    "fit-no-zero-grad", "fit-schedule-per-log", "fit-stage-1-steps", "fit-warmup-from-0",
    "fit-zero-grad-too-late", "joints-cos-twice", "loss-absolute-error", "loss-block-for-agent",
    "loss-clean-for-noisy", "loss-clean-not-gathered", "loss-first-agent", "loss-no-clip",
    "loss-noise-same-for-steps", "loss-noise-uniform", "loss-one-noise-a-sample",
    "loss-one-timestep", "loss-one-timestep-a-sample", "loss-predicts-clean",
    "loss-steps-other-order", "loss-subset-shared", "loss-subset-with-repeats",
    "loss-target-not-gathered", "loss-tiled", "loss-timestep-0-never", "loss-timestep-99-never",
    "mlp-film-before-gelu", "mlp-mixes", "mlp-no-final-norm", "mlp-no-residual",
    "mlp-one-input-matrix", "mlp-pre-norm", "mlp-subset-in-order", "recipe-biases-kept",
    "recipe-freeze-by-name", "recipe-freeze-by-name-and-shape", "recipe-fresh-backbone",
    "recipe-generator-kept", "recipe-not-frozen", "recipe-raw-backbone",
    "recipe-stage-1-trains-conditioning", "recipe-time-encoder-not-frozen",
    "recipe-weights-alone-frozen", "run-last-loss", "run-losses-kept", "state-fine-is-coarse",
    "state-fine-px", "state-from-goal-is-from-agent", "state-goal-unturned",
    "state-rotation-backwards", "time-base-1000", "time-no-mish", "time-one-rate-less")

TASK = """# Bug hunt

This code runs, learns, and says nothing; but {count} bugs were planted in it, each a line or a few,
no two in one function. Find them. Each makes the code compute something else than the comments, the
docstrings and the paper (arXiv 2511.12101) say. None is a matter of style.

For each bug hand in:

1. file and line, and what the line should be;
2. what the bug does to the policy, in one sentence;
3. a test, or a few lines that print a number, which tells the wrong code from the right one.

Hints: read a function next to its docstring. Ask what its output should be in a case that you can
compute by hand: no noise, one step, one joint, an identity. Check shapes, signs, indices, seeds,
`train` and `eval`. `python train.py --smoke --decoupled` takes a minute, and each bug changes what it
computes. So what it does not use, such as pixels, the heads other than DP-MLP and the mechanisms
other than FiLM, is as it should be.
"""


@functools.cache
def functions(text):
    """[(first line, last line, name)] of all functions, methods and other statements of a module."""
    found = []
    for node in ast.parse(text).body:
        members = node.body if isinstance(node, ast.ClassDef) else []
        for part in [node, *members]:
            if not isinstance(part, ast.ClassDef):
                owner = f"{node.name}." if part is not node else ""
                name = getattr(part, "name", None) or f"line {part.lineno}"
                found.append((code.first_line(part), part.end_lineno, owner + name))
    return found


def bugs():
    """The rows of MUTANTS that suit a hunt."""
    rows = {row[0]: row for row in MUTANTS}
    return [rows[name] for name in NAMES]


def places(row, texts):
    """Where a bug is: (file, start, end, new text), start and end counted in letters."""
    _, file, old, new, _, _, *more = row
    for before, after in [(old, new), *more]:
        start = texts[file].index(before)
        yield file, start, start + len(before), after


def touched(row, texts):
    """The functions that a bug changes: {(file, name)}."""
    found = set()
    for file, start, end, _ in places(row, texts):
        first, last = (texts[file].count("\n", 0, where) + 1 for where in (start, end - 1))
        found |= {(file, name) for low, high, name in functions(texts[file])
                  if low <= last and first <= high}
    return found


def draw(seed, count):
    """`count` bugs, at most one in any function. Raises ValueError if there are not so many."""
    texts, drawn, taken = code.reference(), [], set()
    for row in random.Random(seed).sample(bugs(), len(NAMES)):
        where = touched(row, texts)
        if len(drawn) < count and not where & taken:
            drawn.append(row)
            taken |= where
    if not 1 <= len(drawn) == count:
        raise ValueError(f"--count {count}: there is room for 1 to {len(drawn)} bugs")
    return drawn


def changes(rows, texts):
    """All places of these bugs, in the order of the files' letters: (file, start, end, new text)."""
    return sorted(place for row in rows for place in places(row, texts))


def plant(rows):
    """The six files with these bugs: {name: text}."""
    texts = code.reference()
    for file, start, end, new in reversed(changes(rows, texts)):     # from the back: none moves
        texts[file] = texts[file][:start] + new + texts[file][end:]
    return texts


def key(rows):
    """For the instructor: the lines that say where each bug is, what it does, what catches it.

    A line's number is that in the files with the bugs.
    """
    texts = code.reference()
    all_changes = changes(rows, texts)
    for row in rows:
        name, _, _, _, test, story, *_ = row
        yield f"{name}: {story}"
        for file, start, end, new in places(row, texts):
            old = texts[file][start:end]
            # Where they differ: a row may begin with lines that only say where it belongs.
            same = shared_start(old, new)
            before = [change for change in all_changes if change[0] == file and change[1] < start]
            moved = sum(after.count("\n") - texts[file].count("\n", first, last)
                        for _, first, last, after in before)
            line = texts[file].count("\n", 0, start + same) + 1 + moved
            yield f"  {file}, line {line}, in {' and '.join(names_of(row, texts))}; {test} catches it"
            yield from (f"  - {text}" for text in old.split("\n"))
            yield from (f"  + {text}" for text in new.split("\n"))


def names_of(row, texts):
    return sorted(name for _, name in touched(row, texts))


def shared_start(one, other):
    """How many letters two texts have in common at their beginning."""
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)
