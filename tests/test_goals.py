"""One policy for several goals: it observes the goal, demonstrations are joined, bad input."""
import json

import numpy as np
import pytest
import torch

import film
import sim_pusht
import train
from diffusion import DiffusionPolicy
from heads import make_backbone
from results import evaluate

pytestmark = pytest.mark.usefixtures("short_episodes")
GOALS = {name: goal for name, (_, goal) in sim_pusht.TASKS.items()}
CORNERS = sim_pusht.KEYPOINTS.tolist()


def goal_encoder(*tasks):
    torch.manual_seed(0)
    return film.GoalEncoder(2, CORNERS, [GOALS[task].tolist() for task in tasks])


def write_policy(folder, *tasks):
    """The file of an untrained policy that knows the goals of these tasks."""
    backbone = make_backbone("mlp")
    goals = [GOALS[task].tolist() for task in tasks]
    pathway = film.make_conditioning(backbone, "state-and-goal", obs_steps=2, corners=CORNERS,
                                     goal=goals)
    policy = DiffusionPolicy(pathway, backbone, train.ACTION_SCALE, (0, 512))
    policy.save(folder / "policy.pt")
    return folder / "policy.pt"


def refused(capsys, main, *arguments):
    """Exit code 2 and exactly one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.strip().splitlines()) == 1, said
    return said


# The encoder -------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["full", "away", "corner"])
def test_told_a_goal_it_sees_what_an_encoder_of_this_goal_sees(task):
    """The goal of another sample or of the first task; the goal's pose taken for the block's."""
    encoder = goal_encoder("full", "away", "corner")
    one = film.StateEncoder(2, CORNERS, GOALS[task])
    states = torch.rand(3, 2, 5) * 400
    told = sim_pusht.observe(states.numpy(), "state-and-goal", GOALS[task])
    others = sim_pusht.observe(states.numpy(), "state-and-goal", GOALS["full"])
    seen = encoder.features(encoder.read(np.concatenate([others, told]), "cpu"))
    torch.testing.assert_close(seen[3:], one.features(states), atol=1e-4, rtol=0)
    assert task == "full" or not torch.allclose(seen[:3], seen[3:], atol=0.1)


def test_an_observation_without_the_goal_is_refused():
    with pytest.raises(ValueError, match=r"shape \(B, 2, 8\), got \(3, 2, 5\)"):
        goal_encoder("full", "away").read(np.zeros((3, 2, 5)), "cpu")
    with pytest.raises(ValueError, match=r"shape \(B, 2, 5\), got \(3, 2, 8\)"):
        film.StateEncoder(2, CORNERS, GOALS["full"]).read(np.zeros((3, 2, 8)), "cpu")


@pytest.mark.parametrize("mechanism", ["film", "prefix"])
def test_it_is_saved_and_loaded_with_its_goals(mechanism, tmp_path):
    backbone = make_backbone("transformer", conditioning=mechanism)
    goals = [GOALS["full"].tolist(), GOALS["away"].tolist()]
    pathway = film.make_conditioning(backbone, "state-and-goal", obs_steps=2, corners=CORNERS,
                                     goal=goals)
    policy = DiffusionPolicy(pathway, backbone, train.ACTION_SCALE, (0, 512)).eval()
    policy.save(tmp_path / "policy.pt")
    loaded = DiffusionPolicy.load(tmp_path / "policy.pt")
    assert evaluate.goals_of(loaded) == goals
    seen = sim_pusht.observe(np.full((1, 2, 5), 100.0), "state-and-goal", GOALS["away"])
    actions = [each.act(seen, torch.Generator().manual_seed(0)) for each in (policy, loaded)]
    assert torch.equal(*actions)


def test_the_goals_are_unlike_and_the_mirror_maps_each_to_itself():
    """The third goal shares no area with the others, and no pose is its own image but the goal."""
    for task in ("full", "away"):
        assert sim_pusht.block_coverage(GOALS["corner"], GOALS[task]) < 1e-9
    assert np.abs(sim_pusht.keypoints(GOALS["corner"]) - sim_pusht.MIDDLE).max() < sim_pusht.FREE
    shown = {"state": np.array([[100, 200, *GOALS["corner"]]]),
             "action": np.array([[120.0, 200.0]]), "episode_ends": np.array([1])}
    image = sim_pusht.mirror(shown, GOALS["corner"])["state"][1]
    np.testing.assert_allclose(image, [200, 100, *GOALS["corner"]], atol=1e-4)


# Demonstrations and runs -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run for two tasks; what it made of demonstrations is kept there."""
    folder = tmp_path_factory.mktemp("goals")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        summary = train.main(FLAGS.split() + ["--out", "run"])
    return folder, summary


FLAGS = ("--smoke --task away,corner --decoupled --num-demos 3 --steps 20 --stage1-steps 15 "
         "--episodes 3 --device cpu")


def test_the_demonstrations_of_all_tasks_are_one_set_with_the_goal_in_each_state(home, monkeypatch):
    """Another task's goal; episodes that begin at the ends of another task's."""
    folder, _ = home
    monkeypatch.chdir(folder)
    config, _ = train.parse(FLAGS.split())
    joined = train.get_demonstrations(config)
    alone = []
    for task in ("away", "corner"):
        one, _ = train.parse(FLAGS.replace("away,corner", task).split())
        alone.append(train.get_demonstrations(one))
    ends = np.cumsum([length for part in alone
                      for length in np.diff(part["episode_ends"], prepend=0)])
    assert joined["episode_ends"].tolist() == ends.tolist() and len(ends) == 6
    first = len(alone[0]["state"])
    np.testing.assert_array_equal(joined["state"][:, :5],
                                  np.concatenate([part["state"] for part in alone]))
    np.testing.assert_array_equal(joined["action"],
                                  np.concatenate([part["action"] for part in alone]))
    assert (joined["state"][:first, 5:] == GOALS["away"]).all()
    assert (joined["state"][first:, 5:] == GOALS["corner"]).all()
    states, actions = next(train.demonstration_batches(joined, config))
    assert states.shape == (64, 2, 8) and actions.shape == (64, 16, 2)
    assert states.dtype == torch.float32


def test_a_run_says_how_good_it_is_at_each_task_and_on_the_mean(home, monkeypatch, capsys):
    folder, summary = home
    assert summary["task"] == "away,corner" and summary["episodes"] == 6
    names, its = [each["task"] for each in summary["tasks"]], summary["tasks"]
    assert names == ["away", "corner"] and all(each["episodes"] == 3 for each in its)
    for key in ("score", "success_rate", "max_coverage", "final_coverage"):
        assert summary[key] == pytest.approx(np.mean([each[key] for each in its]))
    assert json.loads((folder / "run/summary.json").read_text())["tasks"] == its
    train.report(summary, folder)
    said = capsys.readouterr().out
    assert f"away: score {its[0]['score']:.3f}" in said and "corner: score" in said
    made = {path.name for path in (folder / "run").iterdir()}
    assert {"rollouts.png", "rollouts-corner.png", "rollout.gif", "rollout-corner.gif"} <= made
    # Each task is played with its own goal.
    policy = DiffusionPolicy.load(folder / "run/policy.pt")
    alone = train.scores(train.evaluate(policy, "corner", 3))
    assert its[1] == {"task": "corner"} | alone


def test_a_run_for_several_goals_resumes_to_the_same_bits(home, monkeypatch):
    folder, summary = home
    monkeypatch.chdir(folder)

    class Stop(BaseException):
        pass

    original = train.Run.checkpoint

    def checkpoint(self, done):
        original(self, done)
        if self.stage == "stage2" and done == 10:
            raise Stop

    monkeypatch.setattr(train.Run, "checkpoint", checkpoint)
    settings = train.settings
    monkeypatch.setattr(train, "settings", lambda config: train.dataclasses.replace(
        settings(config), checkpoint_every=10))
    with pytest.raises(Stop):
        train.main(FLAGS.split() + ["--out", "again"])
    monkeypatch.setattr(train.Run, "checkpoint", original)
    again = train.main(FLAGS.split() + ["--out", "again", "--resume"])
    assert again["tasks"] == summary["tasks"]


def test_with_one_task_nothing_is_appended():
    config, _ = train.parse(["--task", "corner", "--device", "cpu"])
    encoder = train.conditioning_on_observations(train.new_backbone(config), config).encoder
    assert encoder.observation == "state" and encoder.config["goal"] == GOALS["corner"].tolist()
    for task, goals in (("full,corner", ["full", "corner"]), ("away,near", ["away", "near"])):
        config.task = task
        encoder = train.conditioning_on_observations(train.new_backbone(config), config).encoder
        assert encoder.config["goal"] == [GOALS[name].tolist() for name in goals]


@pytest.mark.parametrize("flags, told", [
    ("--task full,moon", "--task 'moon' is unknown; allowed: full, near, away, corner"),
    ("--task full,", "--task '' is unknown"), ("--task away,away", "names one goal twice"),
    ("--task full,near", "names one goal twice"),
    ("--task full,away --demos x.npz", "--demos holds one task"),
    ("--task full,away --observation pixels", "find the goal in the picture")])
def test_tasks_that_no_policy_can_learn_are_refused(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, train.main, *flags.split(), "--smoke", "--device", "cpu")
    assert not [*tmp_path.iterdir()]


# After training ----------------------------------------------------------------------------------

def test_it_is_evaluated_on_all_of_its_goals_or_on_those_asked_for(tmp_path):
    path = write_policy(tmp_path, "away", "full")
    summary = evaluate.main([str(path), "--episodes", "2", "--device", "cpu"])
    assert [each["task"] for each in summary["tasks"]] == ["away", "full"]
    assert (tmp_path / "policy-away,full-executing-8/rollouts-full.png").exists()
    near = evaluate.main([str(path), "--episodes", "2", "--device", "cpu", "--task", "near"])
    assert near["task"] == "near" and "tasks" not in near
    policy = DiffusionPolicy.load(path)
    assert near["max_coverage"] == train.scores(train.evaluate(policy, "near", 2))["max_coverage"]


def test_goals_that_a_policy_does_not_know_are_refused(tmp_path, capsys):
    path = write_policy(tmp_path, "full", "away")
    for task in ("corner", "full,corner", "moon", "", "full,"):
        line = refused(capsys, evaluate.main, path, "--task", task, "--device", "cpu")
        assert "full, near, away have" in line and line.startswith("evaluate: ")
    assert "twice" in refused(capsys, evaluate.main, path, "--task", "full,full", "--device", "cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt"]
