"""results/compare.py and results/report.py: the grid, the runs, the tables, "is my run normal?"."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba

import train
from results import compare, report

ROOT = Path(__file__).parent.parent
SOURCE = compare.PRESETS["source"]


def cell(label="a", success=0.5, seed=0, **more):
    return dict(cell=label, success_rate=success, success_se=0.03, score=0.9, score_se=0.01,
                recipe="normal", scale="laptop", episodes=200, threads=1, seed=seed, commit="abc",
                command=f"python train.py --task near --seed {seed}",
                parameters=dict(backbone=1, conditioning=2, trained=3_000_000, frozen=0),
                seconds=dict(stage2=100.0, total=1200.0), iterations_per_second=dict(stage2=20.0),
                curve=dict(stage2=[[100 * i, 5.0 * i, 1.0 / i, None] for i in range(1, 21)])) | more


def write(path, cells):
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")


def write_run(folder, log, arguments=(), **summary):
    """A finished run's three files, as train.py leaves them. log: lines of metrics.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    config, _ = train.parse([*arguments, "--device", "cpu"])
    (folder / "config.json").write_text(json.dumps(vars(config), default=str), encoding="utf-8")
    lines = ["stage,step,seconds,loss,learning_rate,success", *log]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = cell(**summary)
    del found["cell"], found["curve"]     # a run does not know its label
    (folder / "summary.json").write_text(json.dumps(found), encoding="utf-8")


# The grid ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", compare.PRESETS)
def test_every_row_is_a_command_of_its_own(name):
    """Each command parses, and two rows with one folder are one command (presets share runs)."""
    preset, folders = compare.PRESETS[name], {}
    rows = preset.table()
    assert len({label for label, _, _ in rows}) == len(rows)
    for _, _, folder, command in compare.runs(preset, preset.seeds):
        config, _ = train.parse([*command[1:], "--device", "cpu"])
        assert set(config.task.split(",")) <= set((preset.task or config.task).split(","))
        assert config.out == folder
        assert folders.setdefault(folder, command) == command
    number = sum(3 if "APART" in flags else 1 for _, flags, _ in rows)
    assert len(folders) == number * preset.seeds


def test_recipes_is_four_heads_by_three_or_four_recipes_by_three_seeds():
    found = set()
    for _, _, _, command in compare.runs(compare.PRESETS["recipes"], 3):
        config, _ = train.parse(command[1:])
        found.add((config.backbone, config.conditioning, config.recipe, config.seed))
    assert len(found) == 4 * 4 * 3 - 2 * 3     # no random heads with DP-T


def test_a_row_stands_for_each_of_its_recipes_but_those_marked_x():
    preset = compare.Preset("?", """
        a, b | MLP --width 8 | 1 / 2 | x
        c    | MLP           | -     | 3
        """, ("normal", "decoupled"))
    assert preset.table() == [("a, b, normal", "MLP --width 8 ", "1 / 2"),
                              ("c, normal", "MLP ", "-"),
                              ("c, decoupled", "MLP --decoupled", "3")]
    label, seed, folder, command = next(compare.runs(preset, 1))
    assert (label, seed, str(folder)) == ("a, b, normal", 0, "runs/compare/near-mlp-width-8-seed0")
    assert command == shlex.split("train.py --task near --backbone mlp --width 8 --seed 0 "
                                  "--out runs/compare/near-mlp-width-8-seed0")


# Running -----------------------------------------------------------------------------------------

def call(folder, *arguments):
    return subprocess.run([sys.executable, "-m", "results.compare", *arguments], cwd=folder,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True)


def test_list_prints_only_what_is_missing_and_resumes_what_was_interrupted(tmp_path):
    (_, _, done, _), (_, _, begun, _), *_ = compare.runs(SOURCE, 2)
    (tmp_path / done).mkdir(parents=True)
    (tmp_path / done / "summary.json").write_text("{}")
    (tmp_path / begun).mkdir(parents=True)
    (tmp_path / begun / "config.json").write_text("")
    listed = call(tmp_path, "source", "--list").stdout.splitlines()
    assert len(listed) == 8 * 3 - 1 and all(line.startswith("python train.py ") for line in listed)
    assert not any(str(done) in shlex.split(line) for line in listed)
    assert [str(begun) in line for line in listed if line.endswith(" --resume")] == [True]


def test_a_command_with_spaces_runs_and_a_failure_is_one_line(tmp_path):
    script = tmp_path / "a script.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1] != 'two words'))")
    compare.execute([str(script), "two words"])
    with pytest.raises(SystemExit, match="did not finish") as ended:
        compare.execute([str(script), "three of them"])
    assert shlex.split(str(ended.value).split("python ")[1]) == [str(script), "three of them"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group")
def test_ctrl_c_lets_the_run_save_and_shows_no_traceback(tmp_path):
    """The terminal sends it to both processes; the run takes a second to save its checkpoint."""
    child = tmp_path / "child.py"
    child.write_text("import pathlib, sys, time\n"
                     "try:\n    print('ready', flush=True); time.sleep(30)\n"
                     "except KeyboardInterrupt:\n    time.sleep(1)\n"
                     f"    pathlib.Path({str(tmp_path / 'saved')!r}).write_text('')\n"
                     "    sys.exit('interrupted')\n")
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from results import compare; compare.execute([{str(child)!r}])"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)
    _, said = parent.communicate(timeout=20)
    assert parent.returncode == 1 and (tmp_path / "saved").exists()
    assert "Traceback" not in said and "the same command goes on" in said


# Collecting --------------------------------------------------------------------------------------

def test_collecting_reads_what_train_wrote(tmp_path, monkeypatch, short_episodes):
    """A real, tiny run in a cell's folder becomes a cell with a curve."""
    monkeypatch.chdir(tmp_path)
    label, _, _, command = next(compare.runs(SOURCE, 1))
    train.main([*command[1:], "--smoke", "--steps", "30", "--stage1-steps", "25", "--episodes", "2",
                "--num-demos", "4", "--device", "cpu"])
    (found,) = compare.collect(SOURCE, tmp_path / "none.json")
    assert found["cell"] == label and found["recipe"] == "decoupled" and found["episodes"] == 2
    assert found["settings"]["steps"] == 30
    assert [point[0] for point in found["curve"]["stage2"]] == [25, 30]
    for key in ("command", "seed", "commit", "device", "threads", "torch", "score_se"):
        assert key in found
    report.draw(SOURCE, [found], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_run_is_found_by_label_and_seed_and_replaces_what_was_collected(tmp_path, monkeypatch):
    """What was collected elsewhere stays, whatever its command was; other labels leave the grid."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "source.json"
    (first, _, _, _), (_, _, folder, _), (third, *_) = list(compare.runs(SOURCE, 2))[:3]
    write(file, [cell(third, seed=0), cell(first, seed=1, command="python train.py --gone"),
                 cell(first, seed=0), cell("gone")])
    cells = compare.collect(SOURCE, file)
    assert [(c["cell"], c["seed"]) for c in cells] == [(first, 0), (first, 1), (third, 0)]
    log = ["stage2,1000,50,0.2,0.004,0.25", "stage2,2000,100,0.1,0.0,"]
    write_run(folder, log, success=0.75, seed=1)
    cells = compare.collect(SOURCE, file)
    assert [c["success_rate"] for c in cells] == [0.5, 0.75, 0.5]
    assert report.curve(cells[:1]) == ([2000], [0.5])          # only the last
    assert report.curve(cells[1:2]) == ([1000, 2000], [0.25, 0.75])


def test_policies_for_one_task_each_are_one_row_with_their_mean(tmp_path, monkeypatch, capsys):
    """A row that is shown before all of its runs are finished; a task forgotten; an error of one run
    instead of that of a mean of three. The row's table is by hand."""
    monkeypatch.chdir(tmp_path)
    preset = compare.Preset("?", "three | MLP --steps 60 APART | -", task="full,away,corner")
    grid = list(compare.runs(preset, 1))
    tasks = ["full", "away", "corner"]
    assert [command[2] for *_, command in grid] == tasks
    assert {label for label, *_ in grid} == {"three"} and len({folder for _, _, folder, _ in grid}) == 3
    rates = dict(max_coverage=0.5, final_coverage=0.5)
    for (_, _, folder, command), task, success in zip(grid, tasks, (0.9, 0.6, 0.3)):
        assert compare.collect(preset, tmp_path / "none.json") == []
        write_run(folder, ["stage2,30,5,0.2,0.004,0.5", "stage2,60,10,0.1,0,"], command[1:-2],
                  task=task, success=success, **rates)
    (found,) = compare.collect(preset, tmp_path / "none.json")
    assert found["success_rate"] == pytest.approx(0.6) and found["episodes"] == 600
    assert found["success_se"] == pytest.approx(0.03 / 3 ** 0.5)
    assert [each["success_rate"] for each in found["tasks"]] == [0.9, 0.6, 0.3]
    assert found["curve"]["stage2"] == [[90, 15.0, 0.2, 0.5], [180, 30.0, 0.1, None]]
    assert found["seconds"]["total"] == 3600 and found["parameters"]["trained"] == 9_000_000
    lines = report.table(preset, [found]).splitlines()
    assert "success: full / away / corner" in lines[0]
    assert "| three | 0.600 ± 0.017 | 0.900 / 0.600 / 0.300 |" in lines[2]
    assert lines[-1].startswith("3 runs in fp32, 1.0 core-hours, 200 scenes each.")
    report.draw(preset, [found], tmp_path / "figure.png")
    (grid[1][2] / "summary.json").write_text("{")
    assert compare.collect(preset, tmp_path / "none.json") == []
    assert "away-mlp-steps-60-seed0 is left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.csv"])
@pytest.mark.parametrize("text", ["", "{", "[]", "stage,step\n1"])
def test_a_damaged_file_of_one_run_is_named_and_the_others_are_collected(name, text, tmp_path,
                                                                         monkeypatch, capsys):
    """A power cut leaves an empty file: a traceback at every later call, or all runs lost."""
    monkeypatch.chdir(tmp_path)
    folders = [folder for label, seed, folder, _ in compare.runs(SOURCE, 2)
               if label == "DP-MLP, joint angles"]
    for seed, folder in enumerate(folders):
        write_run(folder, ["stage2,100,1.0,0.5,0.004,"], seed=seed)
    (folders[0] / name).write_text(text, encoding="utf-8")
    found = compare.collect(SOURCE, tmp_path / "none.json")
    said = capsys.readouterr().err
    assert [cell["seed"] for cell in found if cell["cell"] == "DP-MLP, joint angles"][-1] == 1
    assert len(found) == 1 and str(folders[0]) in said and len(said.splitlines()) == 1


def test_publishing_to_another_folder_leaves_the_results_alone(tmp_path):
    before = (ROOT / "results/README.md").read_text(encoding="utf-8")
    label = SOURCE.table()[0][0]
    report.publish("source", SOURCE, [cell(label), cell(label, seed=1)], tmp_path / "my own")
    assert {path.name for path in (tmp_path / "my own").iterdir()} == {
        "source.json", "source.md", "source.png"}
    assert len(report.read(tmp_path / "my own/source.json")["cells"]) == 2
    assert (ROOT / "results/README.md").read_text(encoding="utf-8") == before


def test_the_standard_error_is_that_of_the_mean_over_seeds():
    preset = compare.Preset("?", "x | MLP | -\ny | MLP | -")
    rows = report.table(preset, [cell("x", 0.4), cell("x", 0.6), cell("y", 0.5)]).splitlines()[2:]
    assert rows[0].startswith("| x | 0.500 ± 0.100 | 0.400 0.600 |")     # sqrt(.02) / sqrt(2)
    assert rows[1].startswith("| y | 0.500 ± 0.030 | 0.500 |")           # one seed: of its scenes
    assert rows[3] == "3 runs in fp32, 1.0 core-hours, 200 scenes each. Commits: abc."


def test_each_number_of_a_table_stands_in_its_own_column():
    """Success for score, its error, trained for frozen, seconds of a run on several threads."""
    sizes = dict(trained=3_000_000, frozen=1_000_000)
    cells = [cell("x", success, seed, score=score, success_se=0.03, score_se=0.012, threads=2,
                  parameters=sizes)
             for seed, (success, score) in enumerate([(0.5, 0.7), (0.5, 0.9)])]
    preset = compare.Preset("?", "x | MLP | -\ny | MLP | -")
    row, *_ = report.table(preset, cells).splitlines()[2:]
    assert row == "| x | 0.500 ± 0.021 | 0.500 0.500 | 0.800 ± 0.100 | 3M / 1M |"
    assert "2 runs in fp32, 1.3 core-hours" in report.footnote(cells)
    assert report.spread(cells[:1], "score") == (0.7, pytest.approx(0.012))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure
    saved, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **settings: (
        saved.append(figure), original(figure, *arguments, **settings)))
    return saved


def test_bars_changes_and_curves_show_what_they_say(tmp_path, figures):
    """The mean of the runs that have come so far, where some are longer."""
    curves = [[[100, 5.0, 1, 0.2], [200, 10.0, 1, 0.4], [300, 15.0, 1, None]],
              [[100, 7.0, 1, 0.4], [200, 12.0, 1, None]]]
    cells = [cell("x, normal", success, seed, curve=dict(stage2=curve))
             for seed, (success, curve) in enumerate(zip((0.6, 0.8), curves))]
    cells.append(cell("x, decoupled", 0.4, recipe="decoupled", curve=dict(stage2=curves[0])))
    cells.append(cell("y, decoupled", 0.5, recipe="decoupled", curve=dict(stage2=curves[0])))
    preset = compare.Preset("?", "x | MLP | 60.0 / 50.0 | 55.0 / - \ny | MLP | - | -",
                            ("normal", "decoupled"))
    report.draw(preset, cells, tmp_path / "figure.png")
    bars, changes, curve, _ = figures[0].axes
    colors = [report.COLORS[recipe] for recipe in ("normal", "decoupled", "decoupled")]
    for bar, shown, color in zip(bars.patches, (0.7, 0.4, 0.5), colors):
        assert bar.get_width() == pytest.approx(shown)
        assert bar.get_facecolor() == pytest.approx(to_rgba(color, 0.7))
    assert [label.get_text() for label in bars.get_yticklabels()] == ["x", "y"]
    _, ours, *_, theirs = changes.lines     # the line at 0, the dot and its caps, the diamond
    assert ours.get_xdata() == pytest.approx([-30]) and theirs.get_xdata() == pytest.approx([-5])
    line, _ = curve.lines
    assert list(line.get_xdata()) == [100, 200, 300]
    # Each curve ends with the success in all scenes: 0.6 at update 300, and 0.8 at update 200.
    assert list(line.get_ydata()) == pytest.approx([0.3, 0.6, 0.6])


def test_the_three_bars_are_of_the_three_recipes(tmp_path, figures):
    """A bar that takes in runs of another recipe, whose name begins alike, or of another task."""
    labels = {"full, normal": 0.7, "full, decoupled": 0.6, "full, random frozen": 0.3,
              "full, decoupled, biases kept": 0.1, "full, not normal": 0.2, "near, normal": 0.8}
    report.draw_front([cell(label, success) for label, success in labels.items()],
                      tmp_path / "front.png")
    bars = [bar.get_height() for bar in figures[0].axes[0].patches]
    assert bars == pytest.approx([70, 60, 30])     # %


def test_a_curve_is_thinned_to_its_last_update(tmp_path):
    """And keeps each update at which success was recorded."""
    log = [f"stage2,{i},{i / 10},{1 / i},0.1,{0.5 if i == 42 else ''}" for i in range(1, 101)]
    write_run(tmp_path / "run", log)
    points = report.read_curve(tmp_path / "run")["stage2"]
    assert [step for step, *_ in points] == sorted([*range(4, 101, 4), 42])
    assert points[-1] == [100, 10.0, 0.01, None] and [42, 4.2, 0.02381, 0.5] in points


def test_a_shared_head_is_that_of_the_same_seed():
    """One head for all seeds: their spread would leave out stage 1."""
    shared = [(seed, command) for preset in compare.PRESETS.values()
              for _, seed, _, command in compare.runs(preset, 3) if "--action-head" in command]
    assert len(shared) > 20
    for seed, command in shared:
        head = Path(command[command.index("--action-head") + 1])
        assert head.parent.name.endswith(f"-seed{seed}") and head.name == "action_head.pt"



@pytest.mark.parametrize("text", ["", "<!-- a -->\n", "<!-- /a -->"])
def test_a_text_without_the_markers_is_an_error(text):
    with pytest.raises(ValueError, match="<!-- a -->"):
        report.split_at_markers(text, "a")


# Is my run normal? -------------------------------------------------------------------------------

KIND = ["--task", "near", "--steps", "2000"]


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Two committed runs of a kind and one of none; and a folder for the run to be checked."""
    monkeypatch.setattr(compare, "HERE", tmp_path)
    config = vars(train.parse(KIND)[0])
    settings = {key: config[key] for key in report.KIND}
    write(tmp_path / "source.json", [
        cell(settings=settings), cell(success=0.6, seed=1, settings=settings),
        cell(success=0, settings=settings | {"recipe": "decoupled"}), cell(success=0, seed=2)])
    write(tmp_path / "same.json", [cell(settings=settings)])     # presets share runs

    def run(loss=1.0, arguments=KIND, **summary):
        log = [f"stage2,{100 * i},{5.0 * i},{loss / i},0.1," for i in range(1, 21)]
        write_run(tmp_path / "my run", log, arguments, **summary)
        return tmp_path / "my run"
    return run


def test_a_normal_run_is_ok(committed):
    lines = compare.check(committed(arguments=[*KIND, "--seed", "7", "--backbone", "mlp"]))
    assert lines[0] == "compared with 2 committed runs"     # of the same settings, spelt or default
    assert len(lines) == 1 + 3 + 2 + 1 and all(line.startswith("OK") for line in lines[1:])


@pytest.mark.parametrize("change, what", [
    (dict(loss=1.5), "stage2 loss"), (dict(success=0.2), "success rate"),
    (dict(score=0.6), "score"),
    (dict(iterations_per_second=dict(stage2=2.0)), "updates a second")])
def test_what_is_not_normal_is_named(committed, change, what):
    outside = [line for line in compare.check(committed(**change)) if "OUTSIDE" in line]
    assert outside and all(what in line for line in outside)


DECOUPLED = [*KIND, "--decoupled"]


@pytest.mark.parametrize("mine, theirs", [
    (DECOUPLED, [*DECOUPLED, "--keep-biases"]),
    (DECOUPLED, [*DECOUPLED, "--action-head", "runs/free-seed0/action_head.pt"]),
    ([*DECOUPLED, "--action-head", "runs/free-seed0/action_head.pt"],
     [*DECOUPLED, "--action-head", "runs/paths-seed0/action_head.pt"]),
    (KIND, [*KIND, "--observation", "pixels"]),
    ([*KIND, "--observation", "pixels"], [*KIND, "--observation", "pixels", "--corner-weight", "0"]),
    *[(KIND, [*KIND, *other.split()]) for other in (
        "--scale paper", "--width 64", "--num-demos 10", "--learning-rate 0.001", "--episodes 50",
        "--executed-actions 4", "--demos a.npz --num-demos 5")],
    *[(DECOUPLED, [*DECOUPLED, *other.split()]) for other in (
        "--pretrain-condition none", "--pretrain-data fast", "--stage1-steps 9")]])
def test_a_run_is_compared_with_no_other_kind(mine, theirs, committed, tmp_path):
    """In both directions; with another seed of its own kind it is."""
    for own, other in ((mine, theirs), (theirs, mine)):
        folder = committed(arguments=other)
        there = dict(cell(), **report.read_run(folder))
        write(tmp_path / "source.json", [there])
        write(tmp_path / "same.json", [])
        with pytest.raises(ValueError, match="no committed run is of this kind"):
            compare.check(committed(arguments=own))
        again = [word.replace("-seed0/", "-seed7/") for word in other]
        lines = compare.check(committed(arguments=[*again, "--seed", "7"]))
        assert lines[0] == "compared with 1 committed runs"


@pytest.mark.parametrize("value, inside", [(0.84, False), (0.86, True), (2.1, True), (2.39, True),
                                           (2.41, False)])
def test_a_band_reaches_from_below_the_lowest_to_above_the_highest(value, inside):
    line = compare.judge("loss", value, [1.5, 1.0, 2.0], 0.85, 1.2, "Why.")
    assert line.startswith("OK" if inside else "OUTSIDE")
    assert ("Why." in line) != inside and "committed 1 to 2" in line




def test_a_run_of_another_kind_or_none_is_refused(committed, tmp_path):
    with pytest.raises(ValueError, match="no committed run is of this kind"):
        compare.check(committed(arguments=[*KIND, "--width", "64"]))
    with pytest.raises(ValueError, match="no finished run"):
        compare.check(tmp_path)
    done = call(ROOT, "--check", str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_every_committed_run_knows_its_settings():
    """So --check can find those of its kind."""
    optional = {"keep_biases", "action_head", "observation", "corner_weight"}
    for file in (ROOT / "results").glob("*.json"):
        if file.stem == "swap":     # it measures policies that it has not trained by itself
            continue
        for found in report.read(file)["cells"]:
            assert set(found["settings"]) - optional == set(report.KIND)
            assert ("observation" in found["settings"]) == ("pixels" in found["cell"])
