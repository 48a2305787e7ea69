"""results/compare.py: its grid, its tables, and the answer to "is my run normal?"."""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from results import compare

ROOT = Path(__file__).parent.parent


def cell(label="a", success=0.5, **more):
    return dict(cell=label, success_rate=success, success_se=0.03, score=0.9, score_se=0.01,
                scale="laptop", episodes=200, threads=1,
                command="python train.py --task near --seed 0",
                parameters=dict(backbone=1, conditioning=2, trained=3_000_000, frozen=0),
                seconds=dict(stage2=100.0, total=1200.0), iterations_per_second=dict(stage2=20.0),
                curve=dict(stage2=[[100 * i, 5.0 * i, 1.0 / i] for i in range(1, 21)])) | more


@pytest.mark.parametrize("name", compare.PRESETS)
def test_every_cell_is_a_command_of_its_own(name):
    """Each command parses, and two labels with one folder are one command (presets share cells)."""
    preset, folders = compare.PRESETS[name], {}
    for label, folder, command in compare.runs(preset, preset.seeds):
        config, _ = train.parse(shlex.split(command)[1:] + ["--device", "cpu"])
        assert config.task == preset.task and config.out == folder
        assert folders.setdefault(folder, command) == command
    assert len(folders) == len(preset.cells) * preset.seeds
    assert set(preset.paper) <= set(preset.cells)


def test_recipes_is_four_heads_by_four_recipes_by_three_seeds():
    found = {(config.backbone, config.conditioning, config.recipe, config.seed)
             for _, _, command in compare.runs(compare.PRESETS["recipes"], 3)
             for config, _ in [train.parse(shlex.split(command)[1:])]}
    assert len(found) == 4 * 4 * 3


def test_list_prints_only_what_is_missing(tmp_path):
    done = next(folder for _, folder, _ in compare.runs(compare.PRESETS["source"], 2))
    (tmp_path / done).mkdir(parents=True)
    (tmp_path / done / "summary.json").write_text("{}")
    listed = subprocess.run([sys.executable, "-m", "results.compare", "source", "--list"],
                            cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True,
                            capture_output=True, check=True).stdout.splitlines()
    assert len(listed) == 8 * 2 - 1 and all(line.startswith("python train.py ") for line in listed)
    assert not any(str(done) + " " in line + " " for line in listed)


def test_the_standard_error_is_that_of_the_mean_over_seeds():
    table = compare.table("size", [cell("x", 0.4), cell("x", 0.6), cell("y", 0.5)])
    rows = table.splitlines()[2:]
    assert rows[0].startswith("| x | 0.500 ± 0.100 | 0.400 0.600 |")     # sd sqrt(.02), over sqrt(2)
    assert rows[1].startswith("| y | 0.500 ± 0.030 | 0.500 |")           # one seed: of its scenes
    assert rows[3].startswith("3 runs, 1.0 core-hours.")


def test_collecting_reads_what_train_wrote(tmp_path, monkeypatch):
    """A real, tiny run in a cell's folder becomes a cell with a curve."""
    monkeypatch.chdir(tmp_path)
    label, folder, command = next(compare.runs(compare.PRESETS["source"], 1))
    train.main(shlex.split(command)[1:] + ["--smoke", "--steps", "30", "--stage1-steps", "25",
                                           "--episodes", "2", "--num-demos", "4",
                                           "--device", "cpu"])
    (found,) = compare.collect(compare.PRESETS["source"], tmp_path / "none.json")
    assert found["cell"] == label and found["recipe"] == "decoupled" and found["episodes"] == 2
    assert [point[0] for point in found["curve"]["stage2"]] == [25, 30]
    for key in ("command", "seed", "commit", "device", "threads", "torch", "score_se"):
        assert key in found
    compare.draw("source", [found], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_collecting_keeps_what_was_collected_elsewhere(tmp_path, monkeypatch):
    """Without its folder a run stays in the results, under its cell's present label."""
    monkeypatch.chdir(tmp_path)
    file, (first, second, *_) = tmp_path / "source.json", compare.runs(compare.PRESETS["source"], 1)
    file.write_text(json.dumps({"cells": [
        cell("an older label", command=f"python {first[2]} --resume"),
        cell("gone", command="python train.py --task near --backbone mlp --width 2")]}))
    (kept,) = compare.collect(compare.PRESETS["source"], file)
    assert kept["cell"] == first[0] and kept["success_rate"] == 0.5
    second[1].mkdir(parents=True)
    summary = cell(success=0.75)
    del summary["cell"]                            # a run does not know its label
    (second[1] / "summary.json").write_text(json.dumps(summary))
    (second[1] / "metrics.csv").write_text(
        "stage,step,seconds,loss,learning_rate,success\n"
        "stage2,1000,50,0.2,0.004,0.25\nstage2,2000,100,0.1,0.0,\n")
    cells = compare.collect(compare.PRESETS["source"], file)
    assert [found["cell"] for found in cells] == [first[0], second[0]]
    assert compare.played(cells[0]) == []          # from before success was recorded
    assert compare.played(cells[1]) == [[1000, 50.0, 0.25], [2000, 100.0, 0.75]]
    compare.publish("source", cells, tmp_path / "mine")
    assert {path.suffix for path in (tmp_path / "mine").iterdir()} == {".json", ".md", ".png"}


def test_one_backbone_or_mechanism_of_a_grid():
    def found(**only):
        return {label for label, _, _ in compare.runs(compare.PRESETS["conditioning"], 1, **only)}
    assert found(backbone=["mlp"]) == set()
    assert found(conditioning=["film"]) == {"film, normal", "film, decoupled"}
    assert len(found(conditioning=["cross-attention"])) == 4


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Two committed runs, and a folder for the run to be checked."""
    monkeypatch.setattr(compare, "HERE", tmp_path)
    (tmp_path / "source.json").write_text(json.dumps({"cells": [
        cell(), cell(success=0.6, command="python train.py --task near --seed 1"),
        cell(success=0, command="python train.py --task near --features keypoints")]}))
    folder = tmp_path / "run"
    folder.mkdir()

    def write(loss=1.0, **summary):
        (folder / "summary.json").write_text(json.dumps(cell(**summary)))
        lines = [f"stage2,{100 * i},{5.0 * i},{loss / i}" for i in range(1, 21)]
        (folder / "metrics.csv").write_text("\n".join(["stage,step,seconds,loss", *lines]) + "\n")
        return folder
    return write


def test_a_normal_run_is_ok(committed):
    report = compare.check(committed(command="python train.py --seed 7 --task near --backbone mlp"))
    assert report[0] == "compared with 2 committed runs"     # of the same settings, spelt or default
    assert not [line for line in report if "OUTSIDE" in line]


@pytest.mark.parametrize("change, what", [
    (dict(loss=1.5), "stage2 loss"), (dict(success=0.2), "success rate"), (dict(score=0.6), "score"),
    (dict(iterations_per_second=dict(stage2=2.0)), "updates a second")])
def test_what_is_not_normal_is_named(committed, change, what):
    outside = [line for line in compare.check(committed(**change)) if "OUTSIDE" in line]
    assert outside and all(what in line for line in outside)


def test_a_run_of_another_kind_or_none_is_refused(committed, tmp_path):
    with pytest.raises(ValueError, match="no committed run.*--decoupled"):
        compare.check(committed(command="python train.py --task near --decoupled"))
    with pytest.raises(ValueError, match="no finished run"):
        compare.check(tmp_path)
