"""The paper's questions, one command each: a grid of ordinary train.py runs, a table, a figure.

    python -m results.compare recipes              run what is missing, then collect
    python -m results.compare recipes --list       print the missing runs' commands, one a line, for
                                                   grep, GNU parallel or a job array; then collect
    python -m results.compare recipes --collect    only collect what is finished
    python -m results.compare --check runs/mlp-decoupled-full-laptop-seed0      is my run normal?

A run has a folder of its own, runs/compare/<its flags>-seed<n>: presets share runs, and finished
ones are skipped. Collecting writes results/<preset>.json, .md and .png, and the table between the
preset's markers in results/README.md or earlier.md. What is in the .json and not in runs/ stays in
there.
"""
import argparse
import itertools
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from results.report import average, publish, read, read_run

HERE = Path(__file__).parent
INTERRUPTED = "compare: interrupted; the same command goes on"

RECIPES = {
    "": "",
    "normal": "",
    "decoupled": "--decoupled",
    "random frozen": "--random-backbone",
    "unfrozen after stage 1": "--pretrained",
    "decoupled, biases kept": "--decoupled --keep-biases",
}
# All heads make as many updates, and predict as many noises in each: DP-MLP 128 x 4 x 4
# (observations x draws x horizon steps), the others 128 x 1 x 16.
HEADS = {
    "MLP": "--backbone mlp",
    "UNET": "--backbone unet",
    "DPT": "--backbone transformer --conditioning",
}
# What rows take from other rows' runs, of the same seed, and from elsewhere. (Stage 1 on free arm
# motion knows no task: of one seed, it makes the same head in near, full and away, bit for bit.)
HEAD_OF_RUN = "--decoupled --action-head runs/compare/{}-seed{{seed}}/action_head.pt"
FILES = {
    "ARM": HEAD_OF_RUN.format("near-mlp-decoupled"),
    "NEAR": HEAD_OF_RUN.format("near-mlp-decoupled-pretrain-data-demonstrations"),
    "FULL": HEAD_OF_RUN.format("full-mlp-decoupled-pretrain-data-demonstrations"),
    "HUMAN": "--demos runs/human/demonstrations.npz",     # the README tells where they come from
    "PIXELS": "--observation pixels",
}


@dataclass
class Preset:
    """A question, and its rows: label | flags of train.py | paper, once for each of `recipes`.

    paper: success in % on MimicGen, in the first version / in the second; x: no such run.
    Flags that end in APART: a run for each of the tasks, which together are one row.
    """
    question: str
    rows: str
    recipes: tuple = ("",)
    task: str = "near"
    seeds: int = 3

    def table(self):
        """The rows as [(label, flags, paper), ...], one for each recipe."""
        table = []
        for row in self.rows.strip().split("\n"):
            label, flags, *papers = [part.strip() for part in row.split("|")]
            for recipe, paper in zip(self.recipes, papers):
                if paper != "x":
                    name = f"{label}, {recipe}" if recipe else label
                    table.append((name, f"{flags} {RECIPES[recipe]}", paper))
        return table


PRESETS = {
    "main": Preset("Does freezing cost success?", """
        full                              | --task full MLP | 64.3 / 65.9 | 61.1 / 61.2 | -
        near                              | --task near MLP | -           | -           | -
        """, ("normal", "decoupled", "random frozen"), task=""),
    "recipes": Preset("With every head?", """
        DP-MLP                            | MLP                 | 64.3 / 65.9 | 61.1 / 61.2 | - | -
        DP-C                              | UNET                | 64.0 / 63.6 | 63.4 / 62.2 | - / 0.0 | -
        DP-T, cross-attention             | DPT cross-attention | 59.8 / 60.4 | 38.7 / 19.4 | x | -
        DP-T, FiLM                        | DPT film            | 58.6 / -    | 53.4 / -    | x | -
        """, ("normal", "decoupled", "random frozen", "unfrozen after stage 1")),
    "conditioning": Preset("Which mechanism survives?", """
        film                      | DPT film                 | 59.5 | 51.8 | -
        additive                  | DPT additive             | 57.0 | 45.3 | x
        adaln                     | DPT adaln                | 62.0 | 62.3 | x
        adarms                    | DPT adarms               | 63.8 | 60.0 | x
        adaln-zero                | DPT adaln-zero           | 64.0 | 64.5 | x
        cross-attention           | DPT cross-attention      | 61.3 | 19.8 | -
        prefix, twice the updates | DPT prefix --steps 10000 | 56.3 | 19.5 | x
        film on DP-MLP            | MLP                      | -    | -    | -
        """, ("normal", "decoupled", "decoupled, biases kept")),
    "source": Preset("Does the stage-1 signal matter?", """
        DP-MLP, joint angles           | MLP --decoupled                                | -
        DP-MLP, poses                  | MLP --decoupled --pretrain-condition pose      | -
        DP-MLP, nothing                | MLP --decoupled --pretrain-condition none      | -
        DP-MLP, random frozen          | MLP --random-backbone                          | -
        DP-C, joint angles             | UNET --decoupled                               | 62.2
        DP-C, poses                    | UNET --decoupled --pretrain-condition pose     | 62.2 to 63.8
        DP-C, nothing                  | UNET --decoupled --pretrain-condition none     | 62.2 to 63.8
        DP-C, random frozen            | UNET --random-backbone                         | 0.0
        """),
    "data": Preset("Is free data good enough?", """
        arm motion                     | MLP --decoupled                                | -
        the demonstrations' own paths  | MLP --decoupled --pretrain-data demonstrations | 61.1 / 61.2
        too fast                       | MLP --decoupled --pretrain-data fast           | -
        too smooth                     | MLP --decoupled --pretrain-data smooth         | -
        1,500 demonstrations, normal   | MLP                                            | -
        10 demonstrations, normal      | MLP --num-demos 10                             | -
        10 demonstrations, decoupled   | MLP --num-demos 10 --decoupled                 | -
        30 demonstrations, normal      | MLP --num-demos 30                             | -
        30 demonstrations, decoupled   | MLP --num-demos 30 --decoupled                 | -
        100 demonstrations, normal     | MLP --num-demos 100                            | -
        100 demonstrations, decoupled  | MLP --num-demos 100 --decoupled                | -
        """),
    "size": Preset("How small can it get?", """
        width 8                        | MLP --decoupled --width 8                      | -
        width 32                       | MLP --decoupled --width 32                     | -
        width 64                       | MLP --decoupled --width 64                     | -
        width 128                      | MLP --decoupled                                | -
        """),
    "sharing": Preset("Does one head serve all tasks?", """
        near, normal                   | --task near MLP                                | -
        near, head of free arm motion  | --task near MLP --decoupled                    | -
        near, head of near's paths     | --task near MLP --decoupled --pretrain-data demonstrations | -
        near, head of full's paths     | --task near MLP FULL                           | -
        near, random head              | --task near MLP --random-backbone              | -
        full, normal                   | --task full MLP                                | -
        full, head of free arm motion  | --task full MLP --decoupled                    | -
        full, head of near's paths     | --task full MLP NEAR                           | -
        full, head of full's paths     | --task full MLP --decoupled --pretrain-data demonstrations | -
        full, random head              | --task full MLP --random-backbone              | -
        away, normal                   | --task away MLP                                | -
        away, head of free arm motion  | --task away MLP --decoupled                                  | -
        away, head of near's paths     | --task away MLP NEAR                           | -
        away, head of full's paths     | --task away MLP FULL                           | -
        away, random head              | --task away MLP --random-backbone              | -
        human, normal                  | --task full MLP HUMAN                          | -
        human, head of free arm motion | --task full MLP HUMAN ARM                      | -
        human, head of near's paths    | --task full MLP HUMAN NEAR                     | -
        human, head of full's paths    | --task full MLP HUMAN FULL                     | -
        human, random head             | --task full MLP HUMAN --random-backbone        | -
        """, task=""),
    "human": Preset("What do human demonstrations take?", """
        206 human demonstrations, DP-MLP | MLP HUMAN | - | -
        """, ("normal", "decoupled"), task="full"),
    "pixels": Preset("Can it see?", """
        near, state decoupled                 | --task near MLP --decoupled                   | -
        near, pixels normal                   | --task near MLP PIXELS                        | -
        near, pixels decoupled                | --task near MLP PIXELS ARM                    | -
        near, pixels random head              | --task near MLP PIXELS --random-backbone      | -
        near, pixels decoupled (paper's loss) | --task near MLP PIXELS ARM --corner-weight 0  | -
        full, state decoupled                 | --task full MLP --decoupled                   | -
        full, pixels normal                   | --task full MLP PIXELS                        | -
        full, pixels decoupled                | --task full MLP PIXELS ARM                    | -
        """, task=""),
    "goals": Preset("One policy for three goals?", """
        one policy, 12,000 updates          | MLP                    | 61.3 | 63.1 | -
        three policies, 4,000 updates each  | MLP --steps 4000 APART | -    | -    | -
        one policy, 36,000 updates          | MLP --steps 36000      | 61.3 | 63.1 | x
        three policies, 12,000 updates each | MLP APART              | -    | -    | -
        """, ("normal", "decoupled", "random frozen"), task="full,away,corner"),
}


def runs(preset, seeds):
    """All runs of a preset that can be made: (label, seed, folder, command as a list)."""
    for label, flags, _ in preset.table():
        words = f"--task {preset.task} {flags}" if preset.task else flags
        for word, meaning in (HEADS | FILES).items():
            words = words.replace(word, meaning)
        variants = [words]
        if "APART" in words:     # the task is the word behind --task
            together, words = words.split()[1], words.replace(" APART", "")
            variants = [words.replace(together, task) for task in together.split(",")]
        for seed, words in itertools.product(range(seeds), variants):
            command = ["train.py", *words.format(seed=seed).split(), "--seed", str(seed)]
            names = [Path(word).parent.name if "/" in word else word.removeprefix("--")
                     for word in command[1:-2]]
            slug = "-".join(name for name in names if name not in ("task", "backbone"))
            slug = slug.removesuffix(f"-seed{seed}")     # of a file
            folder = Path("runs/compare") / f"{slug}-seed{seed}"
            yield label, seed, folder, [*command, "--out", str(folder)]


def make(preset, seeds, only_list=False):
    """Make the runs that are missing, or print their commands alone."""
    missing = []
    for _, _, folder, command in runs(preset, seeds):
        if not (folder / "summary.json").exists():
            resume = ["--resume"] if (folder / "config.json").exists() else []
            missing.append(command + resume)
    if only_list:
        for command in missing:
            print("python", shlex.join(command))
    elif missing:
        print(f"{len(missing)} runs to go; each says soon after its start how long it takes. "
              "Interrupt and call again as you like")
        for command in tqdm(missing, desc=preset.question, unit="run"):
            execute(command)


def execute(command):
    """Run one command to its end; if it does not get there, leave the program in one line."""
    with subprocess.Popen([sys.executable, *command]) as child:
        try:
            code = child.wait()
        except KeyboardInterrupt:     # it went to the child as well
            child.wait()
            sys.exit(INTERRUPTED)
        finally:
            child.terminate()         # after SIGTERM; one that has ended takes no notice
    if code:
        sys.exit(f"compare: this run did not finish, see above: python {shlex.join(command)}")


def collect(preset, file):
    """The cells of a preset: those collected in `file`, and all runs that are finished here."""
    cells = {}
    if file.exists():
        cells = {(cell["cell"], cell["seed"]): cell for cell in read(file)["cells"]}
    folders = {}
    for label, seed, folder, _ in runs(preset, seeds=100):     # more than anyone has run
        folders.setdefault((label, seed), []).append(folder)
    for (label, seed), its in folders.items():     # one run, or one for each task
        if all((folder / "summary.json").exists() for folder in its):
            try:
                found = []
                for folder in its:
                    found.append(read_run(folder))
                cells[label, seed] = {"cell": label} | average(found)
            except (OSError, ValueError, LookupError, TypeError) as error:     # damaged, or empty
                print(f"compare: {folder} is left out, a file in it is damaged ({error!r:.80}); "
                      "move the folder away, and the run is made anew", file=sys.stderr)
    wanted = [(label, seed) for label, *_ in preset.table() for seed in range(100)]
    return [cells[place] for place in wanted if place in cells]


# Is my run normal? -------------------------------------------------------------------------------

def check(folder):
    """Compare a run with the committed ones of its kind, whatever their seed: the lines to print.

    Raises ValueError if the folder holds no finished run, or if none of its kind is committed.
    """
    try:
        run = read_run(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no finished run of train.py: {error}") from None
    committed = [cell for file in HERE.glob("*.json") for cell in read(file)["cells"]]
    alike = [cell for cell in committed if cell.get("settings") == run["settings"]]
    known = list({cell["command"]: cell for cell in alike}.values())     # presets share runs
    if not known:
        raise ValueError(f"no committed run is of this kind: {run['command']}")
    lines = [f"compared with {len(known)} committed runs"]
    for stage, curve in run["curve"].items():
        losses = {}     # update -> the committed losses
        for cell in known:
            for step, _, loss, *_ in cell["curve"][stage]:
                losses.setdefault(step, []).append(loss)
        shared = [row for row in curve if len(losses.get(row[0], [])) == len(known)]
        quarter = max(1, len(shared) // 4)
        for step, _, loss, _ in shared[quarter::quarter]:
            lines.append(judge(
                f"{stage} loss at update {step:,}", loss, losses[step], 0.85, 1.15,
                "Higher: learning rate, fewer or other demonstrations, a frozen part that should "
                "learn. Lower: fewer demonstrations than here, learnt by heart"))
    for key in ("score", "success_rate"):
        lines.append(judge(
            key.replace("_", " "), run[key], [cell[key] for cell in known], 0.95, 1.05,
            "If the losses are OK: other evaluation scenes, executed actions or sampler; few "
            "scenes scatter"))
    for stage, rate in run["iterations_per_second"].items():
        rates = [cell["iterations_per_second"][stage] for cell in known]
        lines.append(judge(
            f"{stage} updates a second", rate, rates, 0.5, 20,
            "Slower: another program computes at the same time, or it is a slower machine"))
    return lines


def judge(what, value, committed, low, high, causes):
    """A line: is value within the committed ones, their ends stretched by low and high?

    They are of few seeds, so chance alone leads a little beyond.
    """
    inside = low * min(committed) <= value <= high * max(committed)
    line = f"{what}: {value:.3g}, committed {min(committed):.3g} to {max(committed):.3g}"
    return f"OK      {line}" if inside else f"OUTSIDE {line}. {causes}"


# The command line --------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"compare: {message} (--help tells more)\n")
    flag = parser.add_argument
    flag("preset", nargs="?", choices=PRESETS)
    flag("--seeds", type=int, help="default 3")
    flag("--out", type=Path, default=HERE, help="where table and figure go; default results/")
    flag("--list", action="store_true", help="print the missing runs' commands")
    flag("--collect", action="store_true", help="run nothing")
    flag("--check", type=Path, metavar="RUN", help="compare a run's folder with what is committed")
    options = parser.parse_args()
    if options.check:
        try:
            print("\n".join(check(options.check)))
        except ValueError as error:
            parser.error(error)
        return
    if not options.preset:
        parser.error(f"which question? {', '.join(PRESETS)}")
    if options.seeds is not None and not 1 <= options.seeds <= 100:
        parser.error(f"--seeds {options.seeds} is out of range; allowed: 1 to 100")
    preset = PRESETS[options.preset]
    if not options.collect:
        make(preset, options.seeds or preset.seeds, options.list)
    if options.list:
        return
    cells = collect(preset, options.out / f"{options.preset}.json")
    if not cells:
        parser.error("no finished run to collect")
    try:
        publish(options.preset, preset, cells, options.out)
    except OSError as error:
        parser.error(error)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # pictures go to files
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
