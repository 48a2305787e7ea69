"""results/swap.py: what is exchanged, where a leg begins, the shares of the variance, bad input."""
import json
import shlex

import numpy as np
import pytest
import torch

import film
import sim_pusht
import train
from diffusion import DiffusionPolicy
from heads import make_backbone
from results import compare, swap, swap_report

CORNERS = sim_pusht.KEYPOINTS.tolist()


@pytest.fixture(autouse=True)
def short_legs(monkeypatch):
    monkeypatch.setattr(swap, "LEG", 16)
    monkeypatch.setattr(swap, "WHERE", 16)


def policy_for(tasks="full", backbone=None, observation="state", **settings):
    """An untrained policy whose conditioning is nobody else's and not near the identity."""
    backbone = backbone or make_backbone("mlp")
    goals = [sim_pusht.TASKS[task][1].tolist() for task in tasks.split(",")]
    kind = dict(goal=goals[0])
    if len(goals) > 1:
        observation, kind = "state-and-goal", dict(goal=goals)
    pathway = film.make_conditioning(backbone, observation, obs_steps=2, corners=CORNERS, **kind)
    if not backbone.mechanism.tokens:
        torch.nn.init.normal_(pathway.time_part.weight, std=0.1)
    return DiffusionPolicy(pathway, backbone, train.ACTION_SCALE, (0, 512), **settings).eval()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    backbone = make_backbone("mlp")
    return policy_for("full", backbone), policy_for("away", backbone)


def acted(policy):
    observations = np.random.default_rng(0).uniform(100, 400, (5, 2, 5))
    return policy.act(observations, torch.Generator().manual_seed(0))


# What is exchanged -------------------------------------------------------------------------------

def test_a_swap_exchanges_the_conditioning_and_nothing_else(pair):
    first, second = pair
    swapped = swap.with_conditioning(first, second)
    assert swapped.backbone is first.backbone and swapped.conditioning is second.conditioning
    assert torch.equal(acted(swapped), acted(second)) and not torch.equal(acted(swapped), acted(first))
    assert swapped.config == first.config and not swapped.training


def test_all_blocks_in_all_steps_is_the_swap_and_none_is_the_policy(pair):
    """Blocks or steps counted from 1; one conditioning reads what the other's encoder made."""
    first, second = pair
    number, steps = len(first.backbone.blocks), list(first.ddpm.timesteps(10))
    everything = swap.Mixture(first, second, range(number), steps)
    assert torch.equal(acted(everything), acted(second))
    for blocks, timesteps in (([], steps), (range(number), [])):
        assert torch.equal(acted(swap.Mixture(first, second, blocks, timesteps)), acted(first))


def test_a_block_and_a_step_are_those_that_are_named(pair):
    """The modulations that reach the backbone, by hand."""
    first, second = pair
    used = []
    mixture = swap.Mixture(first, second, [1], [0, 10])
    mixture.backbone.register_forward_pre_hook(lambda _, given: used.append(given[1]))
    states = torch.full((1, 2, 5), 200.0)
    mixture.act(states)
    assert len(used) == 10
    for timestep, modulations in zip(range(90, -1, -10), used):
        tau = first.backbone.time_encoder(torch.tensor([timestep]))
        own, theirs = (each.conditioning(each.conditioning.encode(states), tau) for each in pair)
        for block, modulation in enumerate(modulations):
            expected = theirs if block == 1 and timestep in (0, 10) else own
            assert torch.allclose(modulation, expected[block]), (timestep, block)
            assert not torch.allclose(own[block], theirs[block])


def test_parts_are_each_block_its_neighbours_and_the_last_steps(pair):
    parts = {name: (list(blocks), list(steps)) for name, blocks, steps in swap.parts_of(pair[0])}
    every = list(range(90, -1, -10))
    assert parts["nothing"] == ([], []) and parts["block 2"] == ([1], every)
    assert parts["last 2 denoising steps"] == ([0, 1], [10, 0])
    assert parts[swap.EVERYTHING] == ([0, 1], every) and "blocks 1 2" not in parts
    assert len(parts) == 1 + 2 + 10
    ddpm = policy_for(sampling_steps=None)
    assert len(list(swap.parts_of(ddpm))) == 1 + 2 + 10
    ddpm.backbone.modulation_widths = [256] * 4
    parts = {name: list(blocks) for name, blocks, _ in swap.parts_of(ddpm)}
    assert parts["blocks 2 3 4"] == [1, 2, 3] and "blocks 1 3" not in parts
    assert len(parts) == 1 + 9 + 10


# Legs --------------------------------------------------------------------------------------------

class Standing:
    """Stands for a policy: the agent's targets are where it is, and what it sees is kept."""
    obs_steps, action_scale = 2, torch.zeros(1)

    def __init__(self, observation="state"):
        self.seen = []
        self.conditioning = type("", (), {"encoder": type("", (), {"observation": observation})})

    def act(self, seen, generator):
        self.seen.append(np.array(seen))
        torch.rand(1, generator=generator)
        return torch.tensor(seen[:, -1:, :2] + np.array([5.0, 0.0])).repeat(1, 8, 1)


def test_a_leg_begins_where_each_scene_ended_the_last_one(monkeypatch):
    """A solved scene goes on from where it was solved, another from its end; two states are seen;
    the goal is that of the leg."""
    played = []

    def play(env, act, history):
        played.append((env.goal, env.state(), env.success_threshold, env.max_steps))
        act(np.zeros((2, history, 5)))
        states = np.arange(10.0)[:, None, None] + np.zeros((10, 2, 5)) + len(played) * 100
        return dict(states=states, length=np.array([0, 7]), max_coverage=np.array([0.96, 0.2]),
                    final_coverage=np.zeros(2))

    monkeypatch.setattr(sim_pusht, "play", play)
    policy = Standing("state-and-goal")
    cell, _ = swap.legs_of("x", [policy] * 3, ["full", "away", "full"], 2)
    assert [leg["success_rate"] for leg in cell["legs"]] == [0.5] * 3
    assert cell["legs"][0]["success_se"] == pytest.approx(0.5 / 2 ** 0.5)
    start = sim_pusht.PushT(2).reset(100_000)
    np.testing.assert_array_equal(policy.seen[0][:, 0, :5], start)
    np.testing.assert_array_equal(policy.seen[0][:, 1, :5], start)
    np.testing.assert_array_equal(policy.seen[1][:, :, 0], [[100, 100], [106, 107]])
    np.testing.assert_array_equal(policy.seen[2][:, :, 0], [[200, 200], [206, 207]])
    for seen, task, (goal, *_) in zip(policy.seen, ["full", "away", "full"], played):
        assert (seen[..., 5:] == sim_pusht.TASKS[task][1]).all()
        assert (goal == sim_pusht.TASKS[task][1]).all()
    assert played[1][1][:, 0].tolist() == [100, 107]
    assert {entry[2:] for entry in played} == {(0.95, 16)}


def test_where_plays_on_although_the_goal_is_covered(pair, monkeypatch):
    """So that both goals can be counted, whatever came first; the scenes are those of the legs."""
    near = sim_pusht.TASKS["full"][1]
    monkeypatch.setattr(swap, "new_scenes", lambda policy, task, scenes: (
        np.tile([30.0, 30.0, *near], (scenes, 2, 1)), torch.Generator().manual_seed(0)))
    monkeypatch.setattr(swap, "parts_of", lambda policy: [("nothing", [], [])])
    policy = Standing()
    monkeypatch.setattr(swap, "Mixture", lambda *_: policy)
    (cell,) = swap.where(*pair, ["full", "away"], 3)
    assert len(policy.seen) == 2     # chunks of 8 in 16 steps
    first, second = cell["goals"]
    assert (first["task"], first["success_rate"], first["score"]) == ("full", 1, 1)
    assert second["success_rate"] == 0 and second["score"] == pytest.approx(
        sim_pusht.block_coverage(near, sim_pusht.AWAY) / 0.95, abs=1e-6)


# The modulations ---------------------------------------------------------------------------------

def test_shares_of_the_variance_by_hand():
    """Values made of one part each: that part has the whole share, or its own."""
    task = np.array([-1.0, 1.0])[:, None, None, None]
    timestep = np.array([-1.0, 0.0, 1.0])[None, :, None, None] * 2
    observation = np.array([-1.0, -1.0, 1.0, 1.0])[None, None, :, None]
    shape = np.zeros((2, 3, 4, 1))
    for name, values in {"task": task, "timestep": timestep, "observation": observation,
                         "task x observation": task * observation,
                         "rest": task * timestep * observation}.items():
        found = swap.shares(values + shape)
        assert found[name] == pytest.approx(1) and sum(found.values()) == pytest.approx(1), name
    found = swap.shares(3 * task + observation + shape)
    assert found["task"] == pytest.approx(0.9) and found["observation"] == pytest.approx(0.1)


def test_the_modulations_are_those_that_the_policy_uses(pair):
    first, _ = pair
    states = np.random.default_rng(0).uniform(100, 400, (3, 2, 5))
    found = swap.modulations_of(first, states, [90, 0])
    seen = torch.tensor(states).float()
    with torch.no_grad():
        expected = first.conditioning(first.conditioning.encode(seen),
                                      first.backbone.time_encoder(torch.zeros(3)))
    assert [block.shape for block in found] == [(2, 3, 2, 256)] * 2
    for block, m in zip(found, expected):
        np.testing.assert_allclose(block[1], m[:, :, 0].numpy(), atol=1e-5)
        assert not np.allclose(block[0], block[1], atol=1e-3)


# The command -------------------------------------------------------------------------------------

def save(folder, **policies):
    for name, policy in policies.items():
        policy.save(folder / f"{name}.pt")
    return [folder / f"{name}.pt" for name in policies]


@pytest.mark.parametrize("head", ["mlp", "unet", "transformer"])
def test_a_pair_is_played_printed_and_drawn_on_request(head, tmp_path, capsys, monkeypatch):
    backbone = make_backbone(head)
    monkeypatch.setattr(swap, "WHERE", 8)
    files = save(tmp_path, a=policy_for("full", backbone, sampling_steps=2),
                 b=policy_for("away", backbone, sampling_steps=2))
    swap.main([*map(str, files), "--scenes", "2"])
    printed = capsys.readouterr().out
    for row in (swap.SWAP, "nothing", "block 1", "last 1 denoising step", "block 1, gamma"):
        assert f"| {row} |" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    if head != "transformer":     # the blocks of the U-Net are of several widths
        swap.main([*map(str, files), "--scenes", "2", "--out", str(tmp_path / "new/out")])
        assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == [
            "swap.gif", "swap.json", "swap.md", "swap.png"]
        assert (tmp_path / "new/out/swap.md").read_text() == printed[:-1]
        cells = json.loads((tmp_path / "new/out/swap.json").read_text())["cells"]
        assert swap_report.tables(cells) == printed[:-1]


def test_a_head_of_tokens_is_swapped_but_has_no_modulations(tmp_path, capsys):
    backbone = make_backbone("transformer", conditioning="prefix")
    files = save(tmp_path, a=policy_for("full", backbone), b=policy_for("away", backbone))
    swap.main([*map(str, files), "--scenes", "2"])
    printed = capsys.readouterr()
    assert f"| {swap.SWAP} |" in printed.out and "| block" not in printed.out
    assert "takes tokens" in printed.err


def test_a_policy_for_several_goals_follows_its_goal(tmp_path, capsys):
    files = save(tmp_path, g=policy_for("away,corner"))
    swap.main([str(files[0]), "--scenes", "2", "--out", str(tmp_path / "out")])
    assert f"| {swap.MOVES} |" in capsys.readouterr().out
    (cell,) = json.loads((tmp_path / "out/swap.json").read_text())["cells"]
    assert cell["tasks"] == ["away", "corner", "away"] and len(cell["legs"]) == 3


def test_only_on_request_may_heads_differ(tmp_path, capsys):
    files = save(tmp_path, a=policy_for("full"), b=policy_for("away"))
    swap.main([*map(str, files), "--scenes", "2", "--different-heads"])
    assert f"| {swap.DIFFER} |" in capsys.readouterr().out


@pytest.mark.parametrize("words, told", [
    ("full.pt --different-heads", "means nothing without two policies"),
    ("full.pt other.pt", "different heads; make the second with --decoupled --action-head"),
    ("full.pt full.pt", "both policies pursue one goal, that of task full"),
    ("full.pt wide.pt", "heads of different kinds: width 128 and 64"),
    ("full.pt unet.pt", "heads of different kinds"), ("full.pt pixels.pt", "observe differently"),
    ("full.pt several.pt", "a policy for several goals is given alone"),
    ("full.pt", "pursues one goal, full: give a second policy"),
    ("full.pt stage1.pt", "the policy observes joints"), ("full.pt none.pt", "none.pt"),
    ("full.pt away.pt other.pt", "3 policies are given; allowed: 0 to 2"),
    ("full.pt away.pt --list", "mean nothing beside a policy"),
    ("full.pt away.pt --seeds 3", "mean nothing beside a policy"),
    ("full.pt away.pt --scenes 0", "0 is out of range"), ("--seeds 1", "allowed: 2 to 100")])
def test_what_cannot_be_exchanged_is_one_line(words, told, tmp_path, monkeypatch, capsys):
    backbone = make_backbone("mlp")
    stage1 = film.make_conditioning(backbone, "joints", horizon=16)
    save(tmp_path, full=policy_for("full", backbone), away=policy_for("away", backbone),
         other=policy_for("away"), wide=policy_for("away", make_backbone("mlp", width=64)),
         unet=policy_for("away", make_backbone("unet")), several=policy_for("full,away", backbone),
         pixels=policy_for("away", backbone, "pixels"),
         stage1=DiffusionPolicy(stage1, backbone, train.ACTION_SCALE, (0, 512)))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        swap.main([*words.split(), *["--out", "out"] * (words != "--seeds 1")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("swap: ") and told in said, said
    assert len(said.strip().splitlines()) == 1 and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("out, told", [("", "no name of its own"), ("a.pt", "no name of its own")])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_played(out, told, tmp_path,
                                                                         monkeypatch, capsys):
    backbone = make_backbone("mlp")
    save(tmp_path, a=policy_for("full", backbone), b=policy_for("away", backbone))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sim_pusht, "play", None)
    with pytest.raises(SystemExit) as stop:
        swap.main(["a.pt", "b.pt", "--out", out])
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_actions_that_are_no_numbers_are_one_line(tmp_path, capsys):
    backbone = make_backbone("mlp")
    torch.nn.init.constant_(backbone.output.weight, torch.nan)
    files = save(tmp_path, a=policy_for("full", backbone), b=policy_for("away", backbone))
    with pytest.raises(SystemExit) as stop:
        swap.main([*map(str, files), "--scenes", "1", "--different-heads"])
    assert stop.value.code == 2 and "the policy's actions are NaN" in capsys.readouterr().err


# All runs ----------------------------------------------------------------------------------------

def test_the_runs_are_two_tasks_and_their_controls():
    by_label = {}
    for label, seed, _, command in compare.runs(swap.RUNS, 2):
        config, _ = train.parse([*command[1:], "--device", "cpu"])
        by_label[label, seed] = config
    for seed in (0, 1):
        full, away = by_label["full, decoupled", seed], by_label["away, decoupled", seed]
        assert full.recipe == away.recipe == "decoupled" and away.task == "away"
        assert by_label["full, random", seed].recipe == "random-frozen"
        assert by_label["away, normal", seed].recipe == "normal"
        assert by_label["several goals", seed].task == "full,away,corner"
    assert len({config.out for config in by_label.values()}) == len(by_label) == 14


def test_heads_of_random_weights_are_those_of_the_seed_whatever_the_task():
    """So their conditionings may be exchanged as well: the table's control."""
    heads = []
    for task, seed in (("full", 3), ("away", 3), ("full", 4)):
        config, _ = train.parse(["--task", task, "--random-backbone", "--seed", str(seed)])
        torch.manual_seed(config.seed)     # as train.prepare does
        heads.append(train.new_backbone(config).state_dict())
    one, other, another = heads
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], another[name]) for name in one)


def test_without_a_policy_all_seeds_are_measured_and_written(tmp_path, monkeypatch, capsys):
    """What is missing is run first; the other seed's conditionings are in this seed's head."""
    monkeypatch.chdir(tmp_path)
    goal = dict(success_rate=0.5, success_se=0.1, score=0.6, score_se=0.1)
    monkeypatch.setattr(swap, "where", lambda *_: [
        {"cell": name, "goals": [goal, goal]} for name in ("nothing", "block 1", "last 1")])
    ran, heads = [], {}

    def execute(command):
        config, _ = train.parse([*command[1:], "--device", "cpu"])
        ran.append(config.out)
        # One head for a recipe and seed; that of normal training differs for each task.
        key = config.recipe, config.seed, config.task if config.recipe == "normal" else ""
        head = heads.setdefault(key, make_backbone("mlp"))
        config.out.mkdir(parents=True)
        policy_for(config.task, head).save(config.out / "policy.pt")
        (config.out / "summary.json").write_text('{"commit": "abc"}')

    monkeypatch.setattr(compare, "execute", execute)
    monkeypatch.setattr(swap_report, "animate", lambda *_: None)
    swap.main(["--list", "--seeds", "2"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 14 and all(shlex.split(line)[1] == "train.py" for line in listed)
    swap.main(["--seeds", "2", "--scenes", "2", "--out", "out"])
    assert len(ran) == 14
    cells = json.loads((tmp_path / "out/swap.json").read_text())["cells"]
    legs = [(cell["cell"], cell["seed"]) for cell in cells if "legs" in cell]
    assert legs == [(label, seed) for seed in (0, 1) for label in (
        swap.SWAP, swap.STAYS, swap.OTHER_SEED, swap.RANDOM, swap.NORMAL, swap.MOVES)]
    assert "2 seed(s), 2 scenes each. Commits: abc." in (tmp_path / "out/swap.md").read_text()
    swap.main(["--seeds", "2", "--scenes", "2", "--out", "out"])
    assert len(ran) == 14     # nothing is run twice


def test_the_controls_are_played_with_what_their_names_say(monkeypatch):
    heads = [make_backbone("mlp") for _ in range(4)]
    here = {"full, decoupled": policy_for("full", heads[0]),
            "away, decoupled": policy_for("away", heads[0]),
            "full, random": policy_for("full", heads[1]), "away, random": policy_for("away", heads[1]),
            "full, normal": policy_for("full", heads[2]), "away, normal": policy_for("away", heads[3]),
            "several goals": policy_for("full,away,corner", heads[0])}
    there = {f"{task}, decoupled": policy_for(task) for task in ("full", "away")}
    played = {}

    def legs_of(label, policies, tasks, scenes):
        played[label] = [(each.backbone, each.conditioning) for each in policies]
        return {"cell": label}, None

    monkeypatch.setattr(swap, "legs_of", legs_of)
    monkeypatch.setattr(swap, "measure_pair", lambda first, second, label, scenes: ([{}], None, None))
    swap.measure_seed(here, there, 2)
    parts = {name: (policy.backbone, policy.conditioning) for name, policy in here.items()}
    own = parts["full, decoupled"]
    strange = [(heads[0], there[f"{task}, decoupled"].conditioning)
               for task in ("full", "away", "full")]
    assert played == {
        swap.STAYS: [own] * 3, swap.OTHER_SEED: strange,
        swap.RANDOM: [parts["full, random"], parts["away, random"], parts["full, random"]],
        swap.NORMAL: [parts["full, normal"], (heads[2], here["away, normal"].conditioning),
                      parts["full, normal"]],
        swap.MOVES: [parts["several goals"]] * 3}
