"""results/evaluate.py: a saved policy is scored once more, and bad input is one line."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import film
import sim_pusht
import train
from diffusion import DiffusionPolicy
from heads import make_backbone
from results import evaluate

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("short_episodes")


def write_policy(folder, task="full", observation="state", **settings):
    """The file of an untrained policy for this task."""
    torch.manual_seed(0)
    backbone, (_, goal) = make_backbone("mlp"), sim_pusht.TASKS[task]
    pathway = film.make_conditioning(backbone, observation, obs_steps=2, goal=goal.tolist(),
                                     corners=sim_pusht.KEYPOINTS.tolist())
    policy = DiffusionPolicy(pathway, backbone, train.ACTION_SCALE, (0, 512), **settings)
    policy.save(folder / "policy.pt")
    return folder / "policy.pt"


def run_main(*arguments):
    return evaluate.main([str(word) for word in (*arguments, "--device", "cpu")])


def refused(capsys, *arguments):
    """Exit code 2 and exactly one line."""
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.strip().splitlines()) == 1, said
    return said


def test_a_policy_is_scored_and_drawn_into_a_folder_beside_it(tmp_path, capsys):
    """--task, --episodes and --executed-actions have their effect; the policy's file stays."""
    path = write_policy(tmp_path)
    before = path.read_bytes()
    summary = run_main(path, "--task", "near", "--episodes", 3, "--executed-actions", 4)
    assert "success" in capsys.readouterr().out
    assert path.read_bytes() == before
    four = DiffusionPolicy.load(path)
    four.executed_actions = 4
    expected = train.evaluate(four, "near", 3)
    assert summary["max_coverage"] == train.scores(expected)["max_coverage"]
    assert (summary["task"], summary["episodes"], summary["executed_actions"]) == ("near", 3, 4)
    folder = tmp_path / "policy-near-executing-4"
    assert sorted(file.name for file in folder.iterdir()) == ["rollout.gif", "rollouts.png",
                                                              "summary.json"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    # The command that is kept does the same once more.
    again = evaluate.main(shlex.split(summary["command"])[3:])
    assert again["max_coverage"] == summary["max_coverage"]


def test_without_flags_it_plays_as_the_policy_was_trained(tmp_path):
    """The first task with the policy's goal; the policy's own number of actions; 200 scenes."""
    for task, played in (("full", "full"), ("near", "full"), ("away", "away")):
        summary = run_main(write_policy(tmp_path, task, executed_actions=15), "--episodes", 1)
        assert (summary["task"], summary["executed_actions"]) == (played, 15)
    assert evaluate.make_parser().parse_args(["policy.pt"]).episodes == 200
    assert (tmp_path / "policy-away-executing-15/summary.json").exists()


def test_a_policy_from_pixels_plays_its_task_with_pictures(tmp_path):
    summary = run_main(write_policy(tmp_path, "away", "pixels"), "--episodes", 1, "--out",
                       tmp_path / "my own folder")
    assert summary["task"] == "away" and (tmp_path / "my own folder/summary.json").exists()


def test_the_goal_of_another_task_is_refused(tmp_path, capsys):
    line = refused(capsys, write_policy(tmp_path), "--task", "away")
    assert "pursues the goal [256.0, 256.0" in line and "full, near" in line and "away" in line
    assert not [*tmp_path.glob("policy-*")]
    path = write_policy(tmp_path)
    saved = torch.load(path, weights_only=True)
    saved["conditioning"]["goal"] = [1.0, 2.0, 3.0]
    torch.save(saved, path)
    assert "[1.0, 2.0, 3.0]" in refused(capsys, path)
    assert "[1.0, 2.0, 3.0]" in refused(capsys, path, "--task", "full")


def test_bad_policy_files(tmp_path, capsys):
    assert "nowhere.pt" in refused(capsys, tmp_path / "nowhere.pt")
    path = write_policy(tmp_path)
    good, whole = torch.load(path, weights_only=True), path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:5000])
    assert "cut.pt" in refused(capsys, tmp_path / "cut.pt")
    torch.save(dict(good, format=99), tmp_path / "future.pt")
    assert "99" in refused(capsys, tmp_path / "future.pt")
    del good["weights"]["backbone.output.weight"]
    torch.save(good, tmp_path / "hole.pt")
    assert "hole.pt" in refused(capsys, tmp_path / "hole.pt")


def test_the_policy_of_stage_1_has_no_scenes_to_play(tmp_path, capsys):
    """action_head.pt is a policy file as well, of a policy that observes joint angles."""
    backbone = make_backbone("mlp")
    pathway = film.make_conditioning(backbone, "joints", horizon=16)
    policy = DiffusionPolicy(pathway, backbone, train.ACTION_SCALE, (0, 512))
    policy.save(tmp_path / "action_head.pt")
    line = refused(capsys, tmp_path / "action_head.pt")
    assert "the policy observes joints" in line


@pytest.mark.parametrize("flags, told", [
    ([], "POLICY"), (["policy.pt", "--episodes", "0"], "0 is out of range; allowed: 1 to 10000"),
    (["policy.pt", "--episodes", "ten"], "ten"), (["policy.pt", "--episodes", "9" * 5000], "999"),
    (["policy.pt", "--episodes", "nan"], "nan"), (["policy.pt", "--episodes="], "--episodes"),
    (["policy.pt", "--executed-actions", "16"], "16 is out of range; allowed: 1 to 15"),
    (["policy.pt", "--executed-actions", "-1"], "-1"), (["policy.pt", "--task", "moon"], "moon"),
    (["policy.pt", "--steps", "3"], "--steps"), ([""], "policy"),
    (["policy.pt", "--out", ""], "--out"), (["policy.pt", "--out", "policy.pt"], "policy.pt")])
def test_bad_flags_are_one_line(flags, told, tmp_path, monkeypatch, capsys):
    write_policy(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *flags)
    assert told in line and line.startswith("evaluate: ")
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt"]


def test_actions_that_are_no_numbers_are_one_line(tmp_path):
    path = write_policy(tmp_path)
    saved = torch.load(path, weights_only=True)
    saved["weights"]["backbone.output.weight"].fill_(torch.nan)
    torch.save(saved, path)
    with pytest.raises(SystemExit, match="^evaluate: the policy's actions are NaN"):
        run_main(path, "--episodes", "1")


def test_it_is_a_command(tmp_path):
    """Where no display is, and the folder's name has letters that the terminal cannot show."""
    folder = tmp_path / "größer 日本"
    folder.mkdir()
    write_policy(folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii",
                                "MPLBACKEND": "module://nowhere"}
    for arguments, code in (("policy.pt --episodes 1 --device cpu", 0), ("no.pt", 2)):
        command = [sys.executable, "-m", "results.evaluate", *arguments.split()]
        done = subprocess.run(command, cwd=folder,
                              env=environment, text=True, capture_output=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert (folder / "policy-full-executing-8/rollouts.png").stat().st_size > 1000
