"""train.py: the freeze contract, the whole job once, resuming, bad input."""
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import film
import sim_pusht
import train
from diffusion import DiffusionPolicy
from heads import make_backbone

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("short_episodes")
CORNERS = sim_pusht.KEYPOINTS.tolist()


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A demonstration file of two short episodes, written by hand: no expert, no simulator."""
    path = tmp_path_factory.mktemp("demos") / "demos.npz"
    generator = np.random.default_rng(0)
    state = generator.uniform(100, 400, (60, 5)) * [1, 1, 1, 1, 0.01]
    np.savez(path, state=state, action=state[:, :2] + 5, episode_ends=np.array([25, 60]))
    return path


def run_main(*arguments):
    return train.main([str(a) for a in arguments])


def tiny(demos, out, *more):
    return ("--smoke", "--demos", demos, "--steps", 30, "--stage1-steps", 20, "--episodes", 2,
            "--out", out, "--device", "cpu", *more)


# The freeze contract -----------------------------------------------------------------------------

class NoRun:
    """Stands in for train.Run, with the file system out of the way."""

    def begin(self, *parts):
        return 0

    def after_update(self, step, loss):
        pass


def fitted(policy, batch, steps=4):
    """Run train.fit for a few updates on one batch: the names of what changed, what was optimized."""
    config, _ = train.parse(["--steps", str(steps), "--device", "cpu"])
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimized = []
    original = torch.optim.AdamW
    torch.optim.AdamW = lambda params, **kw: optimized.extend(params) or original(optimized, **kw)
    try:
        average = train.fit("stage2", policy, itertools.repeat(batch), config, NoRun())
    finally:
        torch.optim.AdamW = original
    changed, in_average = ({name for name, value in module.state_dict().items()
                            if not torch.equal(before[name], value)}
                           for module in (policy, average))
    assert changed == in_average     # the average of a frozen weight is that weight, bit for bit
    return changed, {id(p) for p in optimized}


def stage2_policy(**settings):
    torch.manual_seed(0)
    backbone = make_backbone("mlp")
    conditioning = film.make_conditioning(backbone, **settings)
    return DiffusionPolicy(conditioning, backbone, train.ACTION_SCALE, (0, 512), loss_steps=4)


def test_stage2_changes_every_conditioning_tensor_and_no_bit_of_the_backbone():
    policy = stage2_policy(observation="state", obs_steps=2, corners=CORNERS, goal=(256, 256, 0.8))
    train.freeze(policy.backbone)
    batch = torch.rand(8, 2, 5) * 400, torch.rand(8, 16, 2) * 400
    changed, optimized = fitted(policy, batch)
    parameters = dict(policy.named_parameters())
    conditioning = {name for name in parameters if name.startswith("conditioning.")}
    backbone = {name for name in parameters if name.startswith("backbone.")}
    assert conditioning | backbone == set(parameters) and not conditioning & backbone
    assert changed == conditioning           # all of them, and no buffer
    assert optimized == {id(parameters[name]) for name in conditioning}
    assert {name for name, p in parameters.items() if p.requires_grad} == conditioning


def test_equal_widths_in_both_stages_freeze_nothing_more():
    """paper.md 5.2: by name and shape, 16 steps x 3 angles x 2 = 96 stage-1 inputs would freeze a
    stage-2 pathway of 96 inputs. By module they cannot: here both pathways have equal shapes."""
    stage1 = stage2_policy(observation="joints", horizon=16, num_joints=3)
    stage2 = film.make_conditioning(stage1.backbone, "joints", horizon=2, num_joints=24)
    assert [p.shape for p in stage2.parameters()] == \
        [p.shape for p in stage1.conditioning.parameters()]
    policy = DiffusionPolicy(stage2, stage1.backbone, train.ACTION_SCALE, (0, 512), loss_steps=4)
    train.freeze(policy.backbone)
    batch = torch.randn(8, 2, 24), torch.rand(8, 16, 2) * 400, torch.rand(8, 2) * 400
    changed, _ = fitted(policy, batch)
    assert changed == {f"conditioning.{name}" for name, _ in stage2.named_parameters()}


@pytest.mark.parametrize("flags, frozen, moved", [
    (["--decoupled"], {"backbone"}, {"conditioning"}),
    (["--random-backbone"], {"backbone"}, {"conditioning"}),
    (["--pretrained"], set(), {"backbone", "conditioning"})])
def test_each_recipe_trains_in_stage_2_what_it_says(flags, frozen, moved, demos, tmp_path, monkeypatch):
    """Weights when stage 2 begins against weights at the end, by the part that they belong to."""
    begun, original = {}, train.fit

    def fit(stage, policy, *rest):
        begun[stage] = {name: value.clone() for name, value in policy.state_dict().items()}
        return original(stage, policy, *rest)

    monkeypatch.setattr(train, "fit", fit)
    summary = run_main(*tiny(demos, tmp_path / "run", *flags))
    after = DiffusionPolicy.load(tmp_path / "run" / "policy.pt").state_dict()
    changed = {name for name, value in begun["stage2"].items() if not torch.equal(value, after[name])}
    parameters = {name for name, _ in DiffusionPolicy.load(
        tmp_path / "run" / "policy.pt").named_parameters()}
    assert {name.split(".")[0] for name in changed} == moved
    assert {name.split(".")[0] for name in parameters - changed} == frozen
    sizes = {name: after[name].numel() for name in parameters}
    assert summary["parameters"]["frozen"] == sum(sizes[name] for name in parameters - changed)
    assert ("stage1" in begun) == ("--random-backbone" not in flags)
    if "stage1" in begun:     # stage 2 goes on from what stage 1 left, not from a fresh backbone
        assert any(not torch.equal(value, begun["stage1"][name]) for name, value in
                   begun["stage2"].items() if name.startswith("backbone."))


@pytest.mark.parametrize("flags", [
    ["--pretrain-data", "demonstrations"], ["--pretrain-data", "fast"],
    ["--pretrain-condition", "pose"], ["--pretrain-condition", "none"], ["--width", "32"],
    ["--precision", "bf16"], ["--conditioning", "prefix", "--backbone", "transformer"]], ids=" ".join)
def test_variants_of_stage_1_and_of_the_size_run_and_load(flags, demos, tmp_path):
    run_main(*tiny(demos, tmp_path / "run", "--decoupled", *flags))
    policy = DiffusionPolicy.load(tmp_path / "run" / "policy.pt")
    assert policy.act(torch.full((1, 2, 5), 200.0)).isfinite().all()
    assert policy.backbone.config["width"] == (32 if "--width" in flags else
                                               96 if "prefix" in flags else 128)


def test_the_demonstrations_own_motion_is_the_agents_path(demos):
    """Stage 1 from demonstrations: positions are the agent's, two steps ahead, within an episode."""
    demonstrations = sim_pusht.load_demonstrations(demos)
    config, _ = train.parse(["--decoupled", "--pretrain-data", "demonstrations", "--device", "cpu"])
    angles, positions, present = next(train.stage1_batches(demonstrations, config))
    agents = torch.as_tensor(demonstrations["state"][:, :2], dtype=torch.float32)
    torch.testing.assert_close(train.PlanarArm().forward(angles), positions, atol=1e-2, rtol=0)
    frame = (agents[:, None] == present).all(-1).int().argmax(0)      # the frame that is present
    for window, now in zip(positions, frame.tolist()):
        last = 24 if now < 25 else 59
        expected = [min(now + 1 + step, last) for step in range(16)]
        assert torch.equal(window, agents[expected])


# One action head ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def head(demos, tmp_path_factory):
    """The file that stage 1 of a run leaves."""
    folder = tmp_path_factory.mktemp("head") / "run"
    run_main(*tiny(demos, folder, "--decoupled"))
    return folder / "action_head.pt"


def backbone_of(path):
    """The backbone's weights in a policy file."""
    return DiffusionPolicy.load(path).backbone.state_dict()


def test_policies_made_from_one_file_hold_its_backbone(head, demos, tmp_path):
    """Bit for bit: that of the run that made it, and those of two other tasks."""
    weights = backbone_of(head)
    backbones = [backbone_of(head.with_name("policy.pt"))]
    for task in ("near", "away"):
        summary = run_main(*tiny(demos, tmp_path / task, "--decoupled", "--task", task,
                                 "--action-head", head, "--seed", 3))
        assert "stage1" not in summary["seconds"] and summary["parameters"]["frozen"] > 0
        assert not (tmp_path / task / "action_head.pt").exists()
        backbones.append(backbone_of(tmp_path / task / "policy.pt"))
    assert all(torch.equal(value, backbone[name])
               for backbone in backbones for name, value in weights.items())
    run_main(*tiny(demos, tmp_path / "pretrained", "--pretrained", "--action-head", head))
    learned = backbone_of(tmp_path / "pretrained/policy.pt")
    assert not any(torch.equal(value, learned[name]) for name, value in weights.items())
    # Any policy file will do: here that of a run which has trained its backbone further.
    run_main(*tiny(demos, tmp_path / "again", "--decoupled", "--action-head",
                   tmp_path / "pretrained/policy.pt"))
    assert all(torch.equal(value, learned[name])
               for name, value in backbone_of(tmp_path / "again/policy.pt").items())


def test_the_file_of_stage_1_holds_the_policy_of_stage_1(head):
    """Its whole policy, as fit returned it: it denoises a hand's path from joint angles."""
    policy = DiffusionPolicy.load(head)
    assert type(policy.conditioning.encoder) is film.JointEncoder
    config, _ = train.parse(["--decoupled", "--device", "cpu"])
    torch.manual_seed(0)
    assert policy.loss(*next(train.stage1_batches(None, config))) < 0.99     # untrained: 1


def test_stage_1_may_end_just_before_its_file_is_written(head, demos, tmp_path, monkeypatch):
    def save(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        patch.setattr(DiffusionPolicy, "save", save)
        run_main(*tiny(demos, tmp_path / "run", "--decoupled"))
    run_main(*tiny(demos, tmp_path / "run", "--decoupled", "--resume"))
    for name in ("action_head.pt", "policy.pt"):
        weights, again = (torch.load(folder / name, weights_only=True)["weights"]
                          for folder in (head.parent, tmp_path / "run"))
        assert all(torch.equal(value, again[key]) for key, value in weights.items())


def test_an_action_head_that_cannot_be_used_is_refused(head, capsys, demos, tmp_path):
    """Missing, damaged, foreign, too new, of another backbone or horizon; a recipe without use."""
    good = torch.load(head, weights_only=True)
    (tmp_path / "cut.pt").write_bytes(head.read_bytes()[:5000])
    others = {"hole": dict(weights={}), "list": dict(backbone=[]), "future": dict(format=99)}
    for name, entries in others.items():
        torch.save(good | entries, tmp_path / f"{name}.pt")
    # What an older version of this code kept as action_head.pt.
    torch.save(dict(action_head=good["backbone"] | {"format": 2}, weights={}), tmp_path / "old.pt")
    short = make_backbone("mlp", horizon=10)
    pathway = film.make_conditioning(short, "joints", horizon=10)
    DiffusionPolicy(pathway, short, train.ACTION_SCALE[:10], (0, 512)).save(tmp_path / "short.pt")
    out = tmp_path / "run"

    def line(file, *flags):
        return refused(capsys, *tiny(demos, out, "--action-head", file, *flags))

    assert "no policy file at" in line(tmp_path / "nowhere.pt", "--decoupled")
    assert "cut.pt is not a readable" in line(tmp_path / "cut.pt", "--decoupled")
    assert "format 99, this code reads 3" in line(tmp_path / "future.pt", "--decoupled")
    assert "format None, this code reads 3" in line(tmp_path / "old.pt", "--decoupled")
    for name in ("hole", "list"):
        assert f"{name}.pt does not fit this code" in line(tmp_path / f"{name}.pt", "--decoupled")
    assert "horizon 10, not 16" in line(tmp_path / "short.pt", "--decoupled")
    assert "width 128, not 64" in line(head, "--decoupled", "--width", 64)
    assert "name mlp, not unet" in line(head, "--pretrained", "--backbone", "unet")
    assert "width 128, not 256" in line(head, "--decoupled", "--scale", "paper")
    assert "conditioning film, not adaln" in line(head, "--decoupled", "--conditioning", "adaln")
    for flags in ((), ("--random-backbone",)):
        assert "means nothing without --decoupled" in line(head, *flags)
    for flags in (("--keep-biases",), ("--pretrain-data", "fast")):
        assert "means nothing with --action-head" in line(head, "--decoupled", *flags)
    assert not out.exists()


# The windows -------------------------------------------------------------------------------------

def test_windows_stay_in_their_episode_and_start_one_step_before_the_present():
    frames = np.arange(12, dtype=np.float32)
    demonstrations = dict(state=np.repeat(frames[:, None], 5, 1), episode_ends=np.array([5, 12]),
                          action=np.repeat(frames[:, None] + 100, 2, 1))
    config, _ = train.parse(["--device", "cpu"])
    config.batch_size = 500
    states, actions = next(train.demonstration_batches(demonstrations, config))
    assert states.shape == (500, 2, 5) and actions.shape == (500, 16, 2)
    assert set(states[:, 1, 0].tolist()) == set(range(12))          # every frame is a present
    for present, previous, chunk in zip(states[:, 1, 0].tolist(), states[:, 0, 0].tolist(),
                                        actions[:, :, 0].numpy() - 100):
        first, last = (0, 4) if present < 5 else (5, 11)
        assert previous == max(present - 1, first)
        expected = np.clip(np.arange(present - 1, present + 15), first, last)
        np.testing.assert_array_equal(chunk, expected)


# The whole job -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The README's command with --smoke, in an empty folder: scripted demonstrations and all."""
    folder = tmp_path_factory.mktemp("smoke")
    done = subprocess.run([sys.executable, ROOT / "train.py", "--backbone", "mlp", "--decoupled",
                           "--smoke", "--device", "cpu"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "mlp-decoupled-full-laptop-seed0-smoke", done.stdout


def test_smoke_writes_every_output(smoke):
    folder, printed = smoke
    for name in ("config.json", "metrics.csv", "checkpoint.pt", "policy.pt", "curves.png",
                 "rollouts.png", "rollout.gif", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    assert not list(folder.glob("unfinished-*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["recipe"] == "decoupled" and summary["episodes"] == 16
    assert summary["parameters"]["frozen"] == summary["parameters"]["backbone"] > 0
    assert summary["parameters"]["trained"] == summary["parameters"]["conditioning"] > 0
    assert set(summary["seconds"]) >= {"demonstrations", "stage1", "stage2", "evaluation", "total"}
    assert 0 <= summary["final_coverage"] <= summary["max_coverage"] <= 1
    stages = [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert set(stages) == {"stage1", "stage2"}
    assert "score" in printed and "rollouts.png" in printed


def test_smoke_learns(smoke):
    rows = np.genfromtxt(smoke[0] / "metrics.csv", delimiter=",", names=True, dtype=None,
                         encoding=None)
    for stage in ("stage1", "stage2"):
        losses = rows["loss"][rows["stage"] == stage]
        assert losses[-1] < 0.8 * losses[0], stage


def test_playing_on_the_way_is_recorded_and_changes_nothing(smoke, demos, tmp_path, monkeypatch,
                                                            set_intervals):
    rows = np.genfromtxt(smoke[0] / "metrics.csv", delimiter=",", names=True, dtype=None,
                         encoding=None)
    played = rows[~np.isnan(rows["success"])]
    assert list(zip(played["stage"], played["step"])) == [("stage2", 50), ("stage2", 100)]
    weights = []
    for name, every in (("played", 10), ("not-played", 1000)):
        set_intervals(monkeypatch, log_every=10, play_every=every)
        run_main(*tiny(demos, tmp_path / name))
        weights.append(torch.load(tmp_path / name / "policy.pt", weights_only=True)["weights"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    lines = (tmp_path / "played" / "metrics.csv").read_text().splitlines()[1:]
    assert [line.endswith(",") for line in lines] == [False, False, True]      # not at the last


def rows_of(folder):
    """The lines of metrics.csv, without the seconds."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line.split(",")[:2] + line.split(",")[3:] for line in lines]


def test_same_seed_same_numbers_and_resuming_changes_none(demos, tmp_path, monkeypatch):
    """Going on also makes no update again, but for those since the last checkpoint."""
    whole = run_main(*tiny(demos, tmp_path / "whole", "--decoupled"))
    again = run_main(*tiny(demos, tmp_path / "again", "--decoupled"))
    load = lambda name: torch.load(tmp_path / name / "policy.pt", weights_only=True)["weights"]
    assert all(torch.equal(value, load("again")[key]) for key, value in load("whole").items())
    assert whole["max_coverage"] == again["max_coverage"]
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "again")
    for stage, stop_at, left in (("stage1", 7, 20 + 30), ("stage2", 11, 30)):
        calls = []
        original = DiffusionPolicy.loss

        def loss(self, *batch):      # Ctrl-C in the middle of an update
            calls.append(1)
            if len(calls) == stop_at + (20 if stage == "stage2" else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *batch)

        monkeypatch.setattr(DiffusionPolicy, "loss", loss)
        with pytest.raises(SystemExit, match="--resume"):
            run_main(*tiny(demos, tmp_path / stage, "--decoupled"))
        calls.clear()
        stop_at = -100
        run_main(*tiny(demos, tmp_path / stage, "--decoupled", "--resume"))
        monkeypatch.setattr(DiffusionPolicy, "loss", original)
        assert len(calls) == left
        assert all(torch.equal(value, load(stage)[key]) for key, value in load("whole").items())
        assert rows_of(tmp_path / stage) == rows_of(tmp_path / "whole")


def test_help_states_the_defaults_that_the_settings_hold(capsys):
    """A number typed in twice drifts: --help names what `settings` gives, at both scales."""
    with pytest.raises(SystemExit):
        run_main("--help")
    told = " ".join(capsys.readouterr().out.split())

    def chosen(**flags):
        return train.settings(train.Config(device="cpu", **flags))

    full, near, paper = chosen(), chosen(task="near"), chosen(scale="paper")
    file, pixels = chosen(demos=Path("demos.npz")), chosen(observation="pixels")
    near_pixels = chosen(task="near", observation="pixels")
    assert (f"default {full.steps}, near {near.steps}, of a file {file.steps}, from pixels "
            f"{pixels.steps}, near {near_pixels.steps}; paper {paper.steps}") in told
    assert f"default {full.stage1_steps}, paper {paper.stage1_steps}" in told
    assert f"default {full.learning_rate}, paper {paper.learning_rate}" in told
    near_paper = chosen(scale="paper", task="near")
    assert (full.num_demos, near.num_demos) == (paper.num_demos, near_paper.num_demos)
    assert f"default {full.num_demos}, near {near.num_demos}, of a file all" in told
    assert file.num_demos is None
    assert f"evaluation scenes of each task; default {full.episodes}" in told
    mlp, transformer, large = (make_backbone(name, scale).config["width"] for name, scale in (
        ("mlp", "laptop"), ("transformer", "laptop"), ("mlp", "paper")))
    assert f"default {mlp} and {transformer}, paper {large}" in told
    for action in train.make_parser()._actions:     # the other numbers
        if action.type and isinstance(action.default, (int, float)):
            assert f"default {action.default}" in action.help, action.option_strings


@pytest.mark.parametrize("flags, expected", [
    ("", dict(steps=12000, batch_size=128, noise_samples=4, mirror=False, temperature=1,
              num_demos=2000, loss_steps=4, sampling_steps=10, learning_rate=4e-3, warmup=100,
              betas=(0.9, 0.98), clip_norm=0.2, ema_decay=0.999, stage1_steps=1500)),
    ("--task near", dict(steps=5000, batch_size=128, num_demos=1500)),
    ("--task away", dict(steps=12000, num_demos=2000)),
    ("--demos FILE", dict(steps=12000, batch_size=256, noise_samples=2, mirror=True,
                          temperature=0.5, num_demos=None)),
    ("--demos FILE --task near", dict(steps=12000, batch_size=256, num_demos=None)),
    ("--observation pixels", dict(steps=16000, batch_size=64, noise_samples=4, num_demos=2000)),
    ("--observation pixels --task near", dict(steps=7000, batch_size=64, noise_samples=4)),
    ("--observation pixels --demos FILE", dict(steps=16000, batch_size=64, noise_samples=4,
                                               mirror=True, temperature=0.5)),
    ("--scale paper --demos FILE --observation pixels --task near", dict(
        steps=83000, stage1_steps=45000, batch_size=64, noise_samples=1, loss_steps=None,
        sampling_steps=None, mirror=False, temperature=1, num_demos=None, learning_rate=1e-4,
        warmup=500, ema_decay=0.9999, betas=(0.95, 0.999), clip_norm=float("inf"))),
    ("--scale paper --task near", dict(steps=83000, num_demos=1500)),
    ("--smoke --observation pixels", dict(steps=150, stage1_steps=100, batch_size=64, num_demos=40,
                                          noise_samples=4, episodes=16)),
    ("--smoke --steps 7 --num-demos 3 --learning-rate .5 --episodes 9 --stage1-steps 8", dict(
        steps=7, num_demos=3, learning_rate=0.5, episodes=9, stage1_steps=8)),
    ("--demos FILE --num-demos 5 --precision fp32", dict(num_demos=5, precision="fp32"))])
def test_the_settings_that_fit_what_is_asked_for(flags, expected):
    """A setting of another task, source, observation or scale; a flag without effect."""
    config, _ = train.parse([*flags.split(), "--device", "cpu"])
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("flags", ["", "--demos FILE", "--scale paper", "--observation pixels",
                                   "--demos FILE --observation pixels --executed-actions 15",
                                   "--scale paper --task away --executed-actions 3"])
@pytest.mark.parametrize("backbone", ["mlp", "transformer"])
def test_a_policy_and_its_file_have_what_the_settings_say(flags, backbone, tmp_path):
    """A setting that is chosen, and then dropped on the way to the policy or to its file."""
    config, _ = train.parse([*flags.split(), "--backbone", backbone, "--device", "cpu"])
    network = train.new_backbone(config)
    conditioning = train.conditioning_on_observations(network, config)
    policy = train.make_policy(conditioning, network, config)
    policy.save(tmp_path / "policy.pt")
    asked = dict(temperature=config.temperature, sampling_steps=config.sampling_steps,
                 executed_actions=config.executed_actions, noise_samples=1, loss_steps=None)
    if backbone == "mlp":
        asked.update(noise_samples=config.noise_samples, loss_steps=config.loss_steps)
    for made in (policy, DiffusionPolicy.load(tmp_path / "policy.pt")):
        assert {name: getattr(made, name) for name in asked} == asked
        size = made.backbone.config
        assert size["width"] * (4 if config.scale == "paper" else 2) == size["hidden"]
        encoder = made.conditioning.encoder
        assert encoder.observation == config.observation
        assert encoder.config["goal"] == sim_pusht.TASKS[config.task][1].tolist()
    seen = np.full((1, 2, 5), 200.0)
    if config.scale == "laptop":     # the paper's 100 steps of sampling take long
        chunk = policy.act(sim_pusht.observe(seen, config.observation))
        assert chunk.shape == (1, config.executed_actions, 2)


def test_a_smaller_width_makes_the_hidden_layers_smaller():
    for flags, hidden in (("--width 32", 64), ("--width 32 --scale paper", 128)):
        for backbone in ("mlp", "transformer"):
            config, _ = train.parse([*flags.split(), "--backbone", backbone])
            assert train.new_backbone(config).config["hidden"] == hidden


def test_kept_demonstrations_depend_on_nothing_but_what_is_asked_for(tmp_path, monkeypatch):
    """Made once for each task and number, whatever the seed of the run that needs them first, and
    made anew for another simulator; mirrored about the goal of the task."""
    made, simulator = [], tmp_path / "simulator.py"

    def expert_demonstrations(count, task="full", seed=None):
        made.append((count, task, seed))
        return dict(state=np.full((count, 5), len(made), np.float32),
                    action=np.zeros((count, 2), np.float32), episode_ends=np.arange(1, count + 1))

    simulator.write_text("one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sim_pusht, "__file__", str(simulator))
    monkeypatch.setattr(sim_pusht, "expert_demonstrations", expert_demonstrations)

    def demonstrations(**flags):
        config = train.settings(train.Config(device="cpu", **flags))
        return train.get_demonstrations(config)

    asked = [dict(task="full", num_demos=3), dict(task="near", num_demos=3),
             dict(task="near", num_demos=4), dict(task="away", num_demos=3)]
    for number, flags in enumerate(asked, start=1):
        for seed in (number, 0):
            for recipe in ("normal", "decoupled"):
                found = demonstrations(**flags, seed=seed, recipe=recipe)
                assert len(found["state"]) == flags["num_demos"]
                assert (found["state"] == number).all()
    assert made == [(3, "full", 0), (3, "near", 0), (4, "near", 0), (3, "away", 0)]
    simulator.write_text("another")
    assert (demonstrations(**asked[0])["state"] == 5).all()
    state = np.array([[1, 2, 3, 4, 0.5]], np.float32)
    file = dict(state=state, action=state[:, :2], episode_ends=np.array([1]))
    np.savez(tmp_path / "own.npz", **file)
    for task, (_, goal) in sim_pusht.TASKS.items():
        both = demonstrations(task=task, demos=tmp_path / "own.npz")
        np.testing.assert_array_equal(both["state"], sim_pusht.mirror(file, goal)["state"])


# What is reported --------------------------------------------------------------------------------

def test_each_rate_and_each_sum_of_the_summary_is_of_its_own_seconds():
    """An evaluation or another stage in the seconds of a stage; the updates of another stage."""
    config, _ = train.parse(["--decoupled", "--steps", "900", "--stage1-steps", "200"])
    policy = stage2_policy(observation="none", horizon=2)
    result = dict(max_coverage=np.array([0.5, 0.96]), final_coverage=np.array([0.4, 0.1]))
    results = {"full": result}
    for seconds in (dict(demonstrations=7.0, stage1=4.0, stage2=30.0, evaluation=50.0),
                    dict(demonstrations=7.0, stage2=30.0, evaluation=50.0)):
        summary = train.summarise(policy, results, config, SimpleNamespace(seconds=seconds))
        rates = {stage: rate for stage, rate in (("stage1", 200 / 4), ("stage2", 900 / 30))
                 if stage in seconds}
        assert summary["iterations_per_second"] == rates
        assert summary["seconds"] == dict(seconds, total=sum(seconds.values()))


def test_what_is_printed_at_the_end_is_what_was_measured(capsys, tmp_path):
    summary = dict(score=0.111, score_se=0.222, success_rate=0.333, success_se=0.444, episodes=5,
                   task="near", executed_actions=6, seconds=dict(stage2=77.0))
    train.report(summary, tmp_path)
    score, success, seconds, _ = capsys.readouterr().out.strip().splitlines()
    assert score.startswith("score    0.111 +- 0.222") and "(5 unseen scenes, task near)" in score
    assert success.startswith("success  0.333 +- 0.444") and " 6 actions executed" in success
    assert seconds.split() == ["seconds", "stage2", "77"]


def test_a_run_plays_its_task_and_reports_success(demos, tmp_path, monkeypatch, set_intervals):
    """On the way and at the end: another task, all scenes on the way, score in place of success,
    the seconds of the figures left out or seconds counted twice."""
    played, drawn = [], []

    def evaluate(policy, task, episodes, **_):
        played.append((task, episodes))
        coverage = np.array([0.5, 0.96, 0.2, 0.2])
        states = np.zeros((2, 4, 5))
        return dict(max_coverage=coverage, final_coverage=coverage, states=states,
                    length=np.ones(4, int))

    def draw_curves(rows, path):
        drawn.extend([*row] for row in rows)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "draw_rollouts", lambda *_: None)
    monkeypatch.setattr(train, "draw_curves", draw_curves)
    set_intervals(monkeypatch, log_every=10, play_every=20)
    summary = run_main(*tiny(demos, tmp_path / "run", "--task", "away", "--episodes", 60))
    assert played == [("away", 50), ("away", 60)]
    assert [row[-1] for row in drawn] == ["", 0.25, 0.25] and summary["success_rate"] == 0.25
    assert summary["task"] == "away"
    seconds = summary["seconds"]
    parts = [number for name, number in seconds.items() if name != "total"]
    assert seconds["total"] == pytest.approx(sum(parts)) and "figures" in seconds
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary


def test_the_curves_are_loss_and_success(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    saved = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig",
                        lambda figure, *a, **k: saved.append(figure) or original(figure, *a, **k))
    rows = [["stage1", 10, 1.0, 0.5, 0.1, ""], ["stage1", 20, 2.0, 0.4, 0.2, ""],
            ["stage2", 10, 3.0, 0.3, 0.3, ""], ["stage2", 20, 4.0, 0.2, 0.4, 0.7],
            ["stage2", 30, 5.0, 0.1, 0.5, 0.8]]
    train.draw_curves(rows, tmp_path / "curves.png")
    loss, success = ([line.get_xydata().tolist() for line in axis.lines] for axis in saved[0].axes)
    assert loss == [[[10, 0.5], [20, 0.4]], [[10, 0.3], [20, 0.2], [30, 0.1]]]
    assert success == [[], [[20, 0.7], [30, 0.8]]]


@pytest.mark.parametrize("task", ["full", "away"])
def test_a_picture_s_titles_are_those_of_its_task(task, tmp_path, monkeypatch):
    """Coverage of another goal above the picture: 0.00 above a block that lies in its goal."""
    from matplotlib.figure import Figure
    titles, original = [], Figure.savefig

    def savefig(figure, *arguments, **settings):
        titles.append([axis.get_title() for axis in figure.axes])
        return original(figure, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    goal = sim_pusht.TASKS[task][1]
    states = np.stack([[[50, 50, *goal], [50, 50, 100, 100, 0]]] * 3)
    result = dict(states=states, length=np.array([2, 1]))
    train.draw_rollouts({task: result}, tmp_path)
    assert titles[0][:2] == ["2 steps, coverage 1.00", "1 steps, coverage 0.00"]




# Bad input ---------------------------------------------------------------------------------------

def refused(capsys, *arguments):
    """Exit code 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return lines[-1]


def test_bad_flags(capsys, demos, tmp_path):
    assert "'vae'" in refused(capsys, "--backbone", "vae")
    assert "-3" in refused(capsys, "--steps=-3")
    assert "nan" in refused(capsys, "--learning-rate", "nan")
    assert "multiple of" in refused(capsys, *tiny(demos, tmp_path / "run", "--width", 33))
    assert "'unet'" in refused(capsys, *tiny(demos, tmp_path / "run", "--backbone", "unet",
                                             "--width", 32))
    line = refused(capsys, *tiny(demos, tmp_path / "run", "--executed-actions", 16))
    assert "16" in line and "15" in line
    if not torch.cuda.is_available():
        assert "CUDA" in refused(capsys, "--device", "cuda")


def test_a_notebook_makes_its_own_configuration(demos, tmp_path, capsys):
    """The same run as on the command line, and the same errors, as ValueError of one line."""
    flags = dict(recipe="decoupled", smoke=True, demos=demos, steps=30, stage1_steps=20, episodes=2,
                 device="cpu")
    torch.manual_seed(99)     # whatever was done before in the notebook
    config = train.settings(train.Config(**flags, out=tmp_path / "notebook"))
    summary = train.experiment(config)
    expected = run_main(*tiny(demos, tmp_path / "line", "--decoupled"))
    assert summary["max_coverage"] == expected["max_coverage"]
    assert rows_of(tmp_path / "notebook") == rows_of(tmp_path / "line")
    for bad, told in ((dict(task="moon"), "--task 'moon' is unknown; allowed: full, near"),
                      (dict(steps=0), "--steps 0 is out of range; allowed: 1 to"),
                      (dict(recipe="thawed"), "unknown; allowed: normal, decoupled"),
                      (dict(keep_biases=True), "means nothing without --decoupled")):
        with pytest.raises(ValueError, match=told):
            train.settings(train.Config(**bad))


def test_bad_demonstration_files(capsys, tmp_path):
    state, action, ends = np.zeros((9, 5)), np.zeros((9, 2)), np.array([4, 9])
    broken = np.full((9, 5), np.nan)
    for name, arrays in {"shape": dict(state=state[:, :4], action=action, episode_ends=ends),
                         "nan": dict(state=broken, action=action, episode_ends=ends),
                         "missing": dict(state=state, episode_ends=ends),
                         "order": dict(state=state, action=action, episode_ends=ends[::-1])}.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        assert path.name in refused(capsys, *tiny(path, tmp_path / "run")), name
    (tmp_path / "text.npz").write_text("hello")
    assert "text.npz" in refused(capsys, *tiny(tmp_path / "text.npz", tmp_path / "run"))
    assert "none.npz" in refused(capsys, *tiny(tmp_path / "none.npz", tmp_path / "run"))


def test_resume_refuses_another_configuration_and_keeps_the_old_run(capsys, demos, tmp_path):
    out = tmp_path / "run"
    assert "nothing to resume" in refused(capsys, *tiny(demos, out, "--resume"))
    run_main(*tiny(demos, out))
    before = {p: p.read_bytes() for p in out.iterdir()}
    line = refused(capsys, *tiny(demos, out, "--resume", "--learning-rate", 1e-3))
    assert "learning_rate" in line and "0.004" in line and "0.001" in line
    assert str(out) in refused(capsys, *tiny(demos, out))       # a run is never written over
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    (out / "checkpoint.pt").write_bytes(b"damaged")
    assert "damaged" in refused(capsys, *tiny(demos, out, "--resume"))


def test_a_run_of_an_older_version_is_one_line(capsys, demos, tmp_path):
    """Its checkpoint would not fit: config.json says first of which version it is."""
    out = tmp_path / "run"
    run_main(*tiny(demos, out))
    config = json.loads((out / "config.json").read_text())
    assert config["format"] == 4
    checkpoint = (out / "checkpoint.pt").read_bytes()
    for older in (3, None):
        (out / "config.json").write_text(json.dumps(config | {"format": older, "evaluate": "None"}))
        line = refused(capsys, *tiny(demos, out, "--resume"))
        assert f"config.json is of another version of this code (format {older}, here 4)" in line
    assert (out / "checkpoint.pt").read_bytes() == checkpoint


def test_a_folder_that_cannot_be_written(capsys, demos, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, *tiny(demos, tmp_path / "file" / "run"))


def test_a_loss_that_becomes_nan_fails_the_run_and_keeps_the_checkpoint(
        demos, tmp_path, monkeypatch, set_intervals):
    original, calls = DiffusionPolicy.loss, []

    def loss(self, *batch):
        calls.append(1)
        return original(self, *batch) * (float("nan") if len(calls) > 12 else 1)

    monkeypatch.setattr(DiffusionPolicy, "loss", loss)
    set_intervals(monkeypatch, log_every=5, checkpoint_every=5)
    with pytest.raises(SystemExit, match="nan.*learning-rate") as stop:
        run_main(*tiny(demos, tmp_path / "run"))
    assert isinstance(stop.value.code, str)      # Python prints it and exits with code 1
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 10
    assert all(value.isfinite().all() for value in saved["policy"].values())
    assert not (tmp_path / "run" / "policy.pt").exists()
