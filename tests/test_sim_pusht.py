"""The simulator against gym-pusht 0.1.8: recordings in tests/data, and live where installed."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sim_pusht
from sim_pusht import PushT

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
PUSHES = dict(np.load(DATA / "gym_pusht_pushes.npz"))  # recorded from gym-pusht
RANDOM = dict(np.load(DATA / "gym_pusht_random.npz"))  # the same; targets anywhere on the board
PICTURES = dict(np.load(DATA / "gym_pusht_frames.npz"))
AT_WALL = PUSHES["wall"].any(1)
OUTLINE = np.array([[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30],
                    [-60, 30]], float)  # of the T, from the benchmark's drawing


def turned(points, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def play(env, actions):
    """Block poses (steps + 1, B, 3) under actions (steps, B, 2)."""
    poses = [env.block_pose()]
    for action in actions:
        env.step(action)
        poses.append(env.block_pose())
    return np.array(poses)


def contact_rich(rng, state, spread=40):
    """Targets around the blocks' centres of mass."""
    center = state[:, 2:4] + 45 * np.stack([-np.sin(state[:, 4]), np.cos(state[:, 4])], 1)
    return center + rng.normal(0, spread, center.shape)


# Physics ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def replayed():
    env = PushT(100)
    env.set_state(PUSHES["init"])
    return play(env, PUSHES["actions"].swapaxes(0, 1)), env


def test_pushes_end_where_chipmunk_ends_them(replayed):
    """To rounding, each push until its block touches a wall: 89 of the 100 never do."""
    poses = replayed[0].swapaxes(0, 1)
    before = np.cumsum(PUSHES["wall"], 1) == 0  # steps
    assert before[~AT_WALL].all() and before[AT_WALL].sum() > 200
    error = np.abs(poses - PUSHES["states"][:, :, 2:])[:, 1:][before]
    # The recorded angle starts in [0, 2 pi) or not; the simulator keeps it as it was set.
    assert error.max() < 1e-9


def test_pushes_against_a_wall_stay_in_the_board(replayed):
    """Squeezed between agent and wall a block goes elsewhere than in Chipmunk, but not out."""
    poses = replayed[0][:, AT_WALL]
    corners = sim_pusht.keypoints(poses)
    recorded = sim_pusht.keypoints(PUSHES["states"][AT_WALL, :, 2:])
    assert np.isfinite(poses).all()
    assert min((corners - 7).min(), (504 - corners).min()) > -6  # px: the agent never gives way
    assert min((recorded - 7).min(), (504 - recorded).min()) < -5
    # The same until the squeeze; most do not end far from where they did.
    away = np.linalg.norm(poses[-1, :, :2] - PUSHES["states"][AT_WALL, -1, 2:4], axis=-1)
    assert np.median(away) < 2


def test_jerky_pushes_end_where_chipmunk_ends_them():
    """In three of the eight, a contact is lost and found again within three substeps."""
    env = PushT(8)
    env.reset(RANDOM["seed"])
    poses = play(env, RANDOM["actions"])[1:]
    np.testing.assert_allclose(poses, RANDOM["poses"], atol=1e-9)


def test_agents_move_as_recorded(replayed):
    np.testing.assert_allclose(replayed[1].state()[:, :2], PUSHES["states"][:, -1, :2], atol=1e-9)


def test_pushes_do_touch_blocks_and_walls():
    assert AT_WALL.sum() == 11
    assert (np.abs(np.diff(PUSHES["states"][:, :, 2:], axis=1)).max((1, 2)) > 1).sum() > 90


@pytest.mark.parametrize("lever", [-50.0, -20.0, 0.0, 35.0])
def test_a_short_push_moves_and_turns_the_block_as_the_closed_form_says(lever):
    """An impulse j at a lever about the centre of mass gives speed j and spin j lever / I."""
    env = PushT()
    env.set_state([[256 + lever, 185.05, 256, 200, 0]])  # overlap 0.05: within the slop
    before, after = play(env, np.repeat([[[256 + lever, 186.0]]], 20, 0))[[0, -1], 0]
    turn = after[2]
    moved = after[:2] - before[:2] + 45 * np.array([-np.sin(turn), np.cos(turn) - 1])
    assert moved[1] == pytest.approx(0.95 / (1 + lever ** 2 / 3000), rel=0.02)
    assert turn == pytest.approx(moved[1] * lever / 3000, rel=0.02, abs=1e-12)
    assert abs(moved[0]) < 0.02


def test_overlap_is_pushed_out_at_chipmunks_rate():
    """Of what exceeds 0.1 px, 0.9^60 is left after a second."""
    env = PushT()
    env.set_state([[256, 190, 256, 200, 0]])  # 5 px deep
    for step in range(1, 16):
        env.step([[256, 190]])
        overlap = 190 + 15 - env.block_pose()[0, 1]
        assert overlap == pytest.approx(0.1 + 4.9 * 0.9 ** (6 * step), abs=1e-5)


def test_mirrored_pushes_end_mirrored():
    start, actions = PUSHES["init"][~AT_WALL], PUSHES["actions"][~AT_WALL].swapaxes(0, 1)
    flip = np.array([-1, 1, -1, 1, -1])
    env, mirrored = PushT(len(start)), PushT(len(start))
    env.set_state(start)
    mirrored.set_state(start * flip + [511, 0, 511, 0, 0])
    ends = play(env, actions)[-1], play(mirrored, actions * [-1, 1] + [511, 0])[-1]
    np.testing.assert_allclose(ends[1], ends[0] * flip[2:] + [511, 0, 0], atol=1e-6)


def test_block_at_rest_stays_where_it_is_until_touched():
    env = PushT()
    env.set_state([[60, 60, 300, 300, 1.0]])
    poses = play(env, np.random.default_rng(0).uniform(20, 120, (50, 1, 2)))
    assert (poses == poses[0]).all()


# Geometry -----------------------------------------------------------------------------------------

def test_coverage_equals_the_recorded():
    np.testing.assert_allclose(sim_pusht.block_coverage(PUSHES["states"][:, 1:, 2:]),
                               PUSHES["coverage"], atol=1e-6)


def test_coverage_equals_counted_points():
    """Monte Carlo: the share of random points of the block that lie in the goal."""
    rng = np.random.default_rng(0)
    points = rng.uniform([-60, 0], [60, 120], (40000, 2))
    points = points[(points[:, 1] <= 30) | (np.abs(points[:, 0]) <= 15)]
    for _ in range(20):
        pose = np.array([256, 256, np.pi / 4]) + rng.normal(0, 1, 3) * [25, 25, 0.5]
        local = turned(turned(points, pose[2]) + pose[:2] - 256, -np.pi / 4)
        inside = ((np.abs(local[:, 0]) <= 60) & (local[:, 1] >= 0) & (local[:, 1] <= 30)
                  | (np.abs(local[:, 0]) <= 15) & (local[:, 1] >= 30) & (local[:, 1] <= 120))
        assert sim_pusht.block_coverage(pose) == pytest.approx(inside.mean(), abs=0.02)


def test_coverage_of_known_poses():
    goal = np.array([256, 256, np.pi / 4])
    assert sim_pusht.block_coverage(goal) == pytest.approx(1, abs=1e-12)
    assert sim_pusht.block_coverage(np.zeros(3)) == 0
    level = np.array([256, 256, 0.0])  # edges parallel to the goal's: nothing may divide by zero
    for shift, share in ((0, 1), (15, 4500 / 6300), (30, 2700 / 6300)):
        moved = level + [shift, 0, 0]
        assert sim_pusht.block_coverage(moved, level) == pytest.approx(share, abs=1e-12)


def test_keypoints_are_the_corners():
    pose = np.array([100, 200, 0.7])
    corners = sim_pusht.keypoints(np.tile(pose, (3, 2, 1)))
    assert corners.shape == (3, 2, 8, 2)
    expected = turned(OUTLINE[[0, 1, 2, 7, 6, 3, 4, 5]], 0.7) + [100, 200]
    np.testing.assert_allclose(corners[2, 1], expected, atol=1e-12)


def test_legacy_poses():
    pose = np.random.default_rng(0).uniform(0, 400, (20, 3))
    x, y, angle = pose.T
    expected = np.stack([x + 45 * np.sin(angle), y + 45 - 45 * np.cos(angle), angle], 1)
    np.testing.assert_allclose(sim_pusht.from_legacy(pose), expected, atol=1e-12)


# Environment --------------------------------------------------------------------------------------

def test_reset_gives_the_benchmarks_scenes():
    np.testing.assert_allclose(PushT(20).reset(0), PICTURES["reset_states"], atol=1e-9)
    np.testing.assert_array_equal(PushT(3).reset([7, 2, 7])[[0, 2]], PushT(1).reset(7)[[0, 0]])


def test_near_starts_are_near_and_free():
    states = PushT(400, task="near").reset(0)
    offset = states[:, 2:4] - 256
    turn = (states[:, 4] - np.pi / 4 + np.pi) % (2 * np.pi) - np.pi
    distance = np.linalg.norm(offset, axis=1)
    assert distance.max() <= 60 and np.abs(turn).max() <= 0.75
    # Uniform on the disc and on the angles: a third of the area lies within 60 / sqrt(3).
    assert np.mean(distance < 60 / 3 ** 0.5) == pytest.approx(1 / 3, abs=0.08)
    assert np.abs(turn).mean() == pytest.approx(0.375, abs=0.04)
    steps = np.linspace(0, 1, 60)[:, None]
    border = np.concatenate([a + steps * (b - a) for a, b in zip(OUTLINE, np.roll(OUTLINE, -1, 0))])
    agent = np.array([turned(s[:2] - s[2:4], -s[4]) for s in states])
    away = np.linalg.norm(agent[:, None] - border, axis=-1).min(1)
    inside = ((np.abs(agent[:, 0]) < 60) & (agent[:, 1] > 0) & (agent[:, 1] < 30)
              | (np.abs(agent[:, 0]) < 15) & (agent[:, 1] > 0) & (agent[:, 1] < 120))
    assert away.min() > 15 - 0.1 and not inside.any()


def test_set_state_sets_exactly_the_state():
    state = np.random.default_rng(0).uniform(50, 450, (50, 5))
    state[:, 4] %= 2 * np.pi
    env = PushT(50)
    np.testing.assert_allclose(env.set_state(state), state, atol=1e-12)
    np.testing.assert_allclose(env.state(), state, atol=1e-12)


def test_reward_threshold_and_time_limit():
    goal = [100, 100, 256, 256, np.pi / 4]
    env = PushT(2, success_threshold=0.5, max_steps=3)
    env.set_state([goal, [100, 100, 296, 256, np.pi / 4]])
    share = env.coverage()[1]
    for step in range(5):  # stepping on after success and after the limit goes on simulating
        _, reward, terminated, truncated, info = env.step([[100, 100]] * 2)
        assert terminated.tolist() == [True, False] == info["is_success"].tolist()
        assert truncated.tolist() == [step >= 2] * 2
        np.testing.assert_allclose(reward, [1, share / 0.5])
    assert 0 < share < 0.5
    env.set_state([goal, goal])
    env.step([[100, 100], [400, 400]])
    for _ in range(10):
        info = env.step([[100, 100], [200, 200]])[-1]
    assert info["coverage"][1] < info["max_coverage"][1]
    np.testing.assert_array_equal(info["coverage"], sim_pusht.block_coverage(env.block_pose()))


def test_coverage_of_exactly_the_threshold_is_no_success():
    env = PushT(2)
    env.set_state([[100, 100, 256, 256, np.pi / 4], [100, 100, 258, 257, np.pi / 4]])
    env.success_threshold = env.coverage()[1]  # both blocks rest
    _, reward, terminated, _, info = env.step([[100, 100]] * 2)
    assert info["coverage"][1] == env.success_threshold and reward[1] == 1
    assert terminated.tolist() == info["is_success"].tolist() == [True, False]


def test_observations():
    state = PushT(3).reset(5)
    env = PushT(3, observation="pixels")
    first = env.reset(5)
    assert first["pixels"].shape == (3, 96, 96, 3) and first["pixels"].dtype == np.uint8
    np.testing.assert_array_equal(first["pixels"], sim_pusht.draw_states(state))
    np.testing.assert_array_equal(first["agent_pos"], state[:, :2])
    second = env.step(state[:, :2] + 100)[0]
    assert (first["pixels"] != second["pixels"]).any((1, 2, 3)).all()


def test_same_seed_same_bits_and_neighbours_do_not_matter():
    rng, env = np.random.default_rng(1), PushT(60)
    states, actions = [env.reset(100)], []
    for _ in range(60):
        actions.append(contact_rich(rng, states[-1]))
        states.append(env.step(actions[-1])[0])
    states, actions = np.array(states), np.array(actions)
    assert (np.abs(states[-1, :, 2:4] - 255.5).max(1) > 150).any()  # some are at walls
    again = PushT(60)
    again.reset(100)
    for step, action in enumerate(actions):
        np.testing.assert_array_equal(again.step(action)[0], states[step + 1])
    for part in ([3], [59, 0, 17], range(30, 50)):
        few = PushT(len(part))
        few.reset([100 + i for i in part])
        for step, action in enumerate(actions):
            np.testing.assert_array_equal(few.step(action[part])[0], states[step + 1, part])


def test_keep_goes_on_with_the_chosen():
    rng, env = np.random.default_rng(2), PushT(12)
    env.reset(0)
    actions = rng.uniform(50, 450, (30, 12, 2))
    other = PushT(12)
    other.reset(0)
    mask = np.arange(12) % 3 == 0
    for step, action in enumerate(actions):
        expected = env.step(action)[0][mask]
        if step == 10:
            other.keep(mask)
        got = other.step(action[mask] if step >= 10 else action)[0]
        np.testing.assert_array_equal(got if step >= 10 else got[mask], expected)


def test_a_new_start_resets_every_counter_and_the_agent_s_speed():
    """After a reset, and after set_state, everything is as in a new environment. What `step` has
    returned stays as it was, and it leaves its arguments alone."""
    fresh, used = PushT(2, "near", max_steps=12), PushT(2, "near", max_steps=12)
    targets = sim_pusht.expert_action(used.reset(3))
    given = targets.copy()
    first = used.step(targets)
    kept = [np.copy(values) for values in (*first[:4], *first[4].values())]
    for _ in range(30):
        used.step(sim_pusht.expert_action(used.state()))
    assert (used.max_coverage > first[4]["coverage"]).all()
    for before, after in zip(kept, (*first[:4], *first[4].values())):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(targets, given)
    start = fresh.reset(3)
    for again in (lambda: used.reset(3), lambda: used.set_state(start)):
        fresh.reset(3)
        np.testing.assert_array_equal(again(), start)
        assert used.steps.tolist() == [0, 0] and used.max_coverage.tolist() == [0, 0]
        np.testing.assert_array_equal(used.coverage(), fresh.coverage())
        for step in range(1, 13):
            expected, got = (env.step(start[:, 2:4]) for env in (fresh, used))
            for ours, theirs in zip((*got[:4], *got[4].values()),
                                    (*expected[:4], *expected[4].values())):
                np.testing.assert_array_equal(ours, theirs)
            assert got[3].tolist() == [step == 12] * 2


def test_the_reward_is_of_the_present_and_max_coverage_of_the_best_step():
    """The block is pushed out of the goal. What `coverage` has returned may be changed."""
    env, coverage = PushT(1), []
    env.set_state([[60, 300, *sim_pusht.GOAL]])
    for _ in range(15):
        _, reward, terminated, _, info = env.step([[400, 300]])
        coverage.append(sim_pusht.block_coverage(env.block_pose())[0])
        assert reward[0] == pytest.approx(min(coverage[-1] / 0.95, 1))
        assert terminated[0] == info["is_success"][0] == (coverage[-1] > 0.95)
        assert info["coverage"][0] == pytest.approx(coverage[-1])
        assert info["max_coverage"][0] == pytest.approx(max(coverage))
        env.coverage()[:] = 9
        assert env.coverage()[0] == pytest.approx(coverage[-1])
    assert coverage[0] > 0.95 and coverage[-1] < 0.5


def test_hostile_actions_break_nothing():
    rng, B = np.random.default_rng(0), 250
    env = PushT(B)
    state = env.reset(0)
    state[:50, :2] = sim_pusht.keypoints(state[:50, 2:]).mean(1)  # agent inside the block
    env.set_state(state)
    board_corner = rng.choice([0.0, 512.0], (B, 2))
    with np.errstate(all="raise", under="ignore"):
        for step in range(100):
            state = env.state()
            actions = contact_rich(rng, state)
            actions[50:100] = rng.uniform(0, 512, (50, 2))
            actions[100:150] = rng.uniform(-2000, 2500, (50, 2))
            if step % 40 < 30:  # pin the block into a corner of the board, then let go
                actions[150:200] = (0.7 * board_corner + 0.3 * actions)[150:200]
            actions[200:] = 256 + 3 * (actions[200:] - 256)
            env.step(actions)
            assert np.isfinite(env.block_pose()).all() and np.isfinite(env.coverage()).all()
        for _ in range(60):  # settle, the agents far from the blocks
            env.step(np.where(env.state()[:, 2:4] < 256, 1500.0, -1000.0))
    corners = sim_pusht.keypoints(env.block_pose())
    assert corners.min() > 7 - 1 and corners.max() < 504 + 1


@pytest.mark.parametrize("actions, message", [
    (np.zeros(2), r"\(2,\); expected \(3, 2\)"), (np.zeros((1, 2)), r"expected \(3, 2\)"),
    (np.zeros((3, 3)), r"expected \(3, 2\)"), (np.full((3, 2), np.nan), r"finite.*\(3, 2\).*NaN"),
    ([[0, 0], [np.inf, 0], [0, 0]], "infinity")])
def test_bad_actions_are_refused(actions, message):
    env = PushT(3)
    before = env.state()
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    np.testing.assert_array_equal(env.state(), before)


@pytest.mark.parametrize("arguments, message", [
    ({"task": "far"}, "'far'; allowed: full, near"), ({"num_envs": 0}, "at least 1"),
    ({"observation": "touch"}, "'touch'; allowed: state, pixels")])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PushT(**arguments)


def test_bad_states_and_seeds_are_refused():
    with pytest.raises(ValueError, match=r"state has shape \(5,\); expected \(2, 5\)"):
        PushT(2).set_state(np.zeros(5))
    with pytest.raises(ValueError, match="state has shape"):
        PushT(2).reset([1, 2, 3])


# Playing ------------------------------------------------------------------------------------------

class Script:
    """An environment with coverage by script (steps + 1, B); its states count the steps from 1."""

    success_threshold = 0.95

    def __init__(self, coverage, max_steps=300):
        self.script, self.max_steps, self.time = np.array(coverage), max_steps, 0
        self.num_envs, self.targets = self.script.shape[1], []

    def state(self):
        return np.full((self.num_envs, 5), self.time + 1.0)

    def coverage(self):
        return self.script[min(self.time, len(self.script) - 1)]

    @property
    def max_coverage(self):
        return self.script[1:self.time + 1].max(0, initial=0)

    def step(self, targets):
        self.time += 1
        self.targets.append(targets[:, 0])


def counting(seen, chunk):
    """A policy of `chunk` actions that notes what it sees; its actions are numbered 0, 1, 2..."""
    def act(past):
        seen.append(past[:, :, 0].copy())
        numbers = (len(seen) - 1) * chunk + np.arange(float(chunk))
        return np.broadcast_to(numbers[:, None], (len(past), chunk, 2))
    return act


def test_play_hands_over_the_oldest_state_first_and_repeats_the_first():
    seen = []
    sim_pusht.play(Script(np.zeros((1, 2)), max_steps=6), counting(seen, 2), history=3)
    assert [past[0].tolist() for past in seen] == [[1, 1, 1], [1, 2, 3], [3, 4, 5]]
    assert (np.array(seen)[:, 0] == np.array(seen)[:, 1]).all()


@pytest.mark.parametrize("chunk, looks", [(1, 7), (3, 3), (10, 1)])
def test_play_carries_out_each_action_once_in_order(chunk, looks):
    seen, env = [], Script(np.zeros((1, 2)), max_steps=7)
    result = sim_pusht.play(env, counting(seen, chunk))
    assert [targets.tolist() for targets in env.targets] == [[i, i] for i in range(7)]
    assert len(seen) == looks and result["length"].tolist() == [7, 7]
    assert result["states"][:, 0, 0].tolist() == list(range(1, 9))


def test_play_reports_the_largest_coverage_and_that_at_the_end():
    coverage = [[0.1, 0.2], [0.6, 0.3], [0.9, 0.95], [0.4, 0.1], [0.5, 0.2]]  # 0.95 is no success
    result = sim_pusht.play(Script(coverage, max_steps=4), counting([], 2))
    assert result["max_coverage"].tolist() == [0.9, 0.95]
    assert result["final_coverage"].tolist() == [0.5, 0.2]
    assert result["length"].tolist() == [4, 4]


def test_play_counts_until_the_first_success():
    coverage = [[0.1, 0.0, 0.0], [0.96, 0.2, 0.95], [0.99, 0.1, 0.98], [0.3, 0.97, 0.5],
                [0.2, 1.0, 1.0], [0.1, 0.1, 0.1]]
    env = Script(coverage)
    result = sim_pusht.play(env, counting([], 2))
    assert env.time == 4  # the chunk in which the last one succeeds is the last
    assert result["length"].tolist() == [1, 3, 2]
    assert result["max_coverage"].tolist() == [0.96, 0.97, 0.98]
    assert result["final_coverage"].tolist() == [0.96, 0.97, 0.98]


def test_play_does_not_count_a_success_before_the_first_action():
    """A block may lie in the goal from the start: waiting is then a success, pushing it away none."""
    coverage = [[0.97, 0.99, 0.5], [0.96, 0.3, 0.2], [0.1, 0.96, 0.4], [0.1, 0.1, 0.1]]
    result = sim_pusht.play(Script(coverage, max_steps=3), counting([], 1))
    assert result["length"].tolist() == [1, 2, 3]
    assert result["max_coverage"].tolist() == [0.96, 0.96, 0.5]     # the start counts if no success
    assert result["final_coverage"].tolist() == [0.96, 0.96, 0.1]
    away = sim_pusht.play(Script([[0.99], [0.6], [0.2]], max_steps=2), counting([], 1))
    assert away["max_coverage"].tolist() == [0.6] and away["length"].tolist() == [2]


def test_play_in_the_simulator():
    env = PushT(3, max_steps=12)
    states = [env.reset(0)]
    result = sim_pusht.play(env, lambda past: past[:, -1:, 2:4])
    env.reset(0)
    for _ in range(12):
        states.append(env.step(states[-1][:, 2:4])[0])
    np.testing.assert_array_equal(result["states"], states)
    np.testing.assert_array_equal(result["final_coverage"], env.coverage())


# Expert -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["full", "near"])
def test_demonstrations_end_beyond_the_goal_and_repeat(task):
    data = sim_pusht.expert_demonstrations(6, task, seed=3)
    again = sim_pusht.expert_demonstrations(6, task, seed=3)
    for name in data:
        np.testing.assert_array_equal(data[name], again[name])
    ends = data["episode_ends"]
    assert len(ends) == 6 and ends[-1] == len(data["state"]) == len(data["action"])
    assert (sim_pusht.block_coverage(data["state"][ends - 1, 2:]) > 0.96).all()
    assert data["state"].dtype == data["action"].dtype == np.float32


@pytest.mark.parametrize("task", ["full", "near", "away"])
@pytest.mark.parametrize("seed", [0, 100_000])
def test_demonstrations_start_in_no_scene_of_reset(task, seed):
    """The scenes of evaluation are PushT.reset(100_000 + i): no demonstration may show one."""
    data = sim_pusht.expert_demonstrations(8, task, seed)
    first = data["state"][np.concatenate([[0], data["episode_ends"][:-1]])]
    for start in sim_pusht.TASKS:
        for base in (0, 100_000):
            scenes = PushT(500, start).reset(base)
            agents = np.abs(first[:, None, :2] - scenes[:, :2]).max(-1)
            blocks = np.abs(first[:, None, 2:4] - scenes[:, 2:4]).max(-1)
            assert np.maximum(agents, blocks).min() > 0.01


def test_demonstrations_do_not_draw_from_resets_stream(monkeypatch):
    """Were the generator seeded like a scene's, the first start would be that scene."""
    drawn = []
    monkeypatch.setitem(sim_pusht.TASKS, "full", (
        lambda rng, goal: drawn.append(rng.random()) or np.array([50.0, 50, 256, 256, 0.8]),
        sim_pusht.GOAL))
    sim_pusht.expert_demonstrations(1, seed=7)
    first = drawn[1]  # the environment resets itself once when it is made
    assert first not in [np.random.default_rng(seed).random() for seed in range(20)]


@pytest.fixture(scope="module")
def recorded():
    """Demonstrations of the near task, their episodes as slices, and for each episode the noise:
    the target that was executed, computed from how the agent moved, less the recorded action.

    The agent is driven by its target alone, so position and velocity after a control step are
    linear in position, velocity and target before it."""
    data = sim_pusht.expert_demonstrations(90, "near", seed=1)
    ends = data["episode_ends"]
    substep = np.array([[0.99, 0.8, 0.01], [-0.01, 0.8, 0.01], [0, 0, 1]])
    (pp, pv, pt), (vp, vv, vt), _ = np.linalg.matrix_power(substep, 10)
    episodes = [slice(first, end) for first, end in zip([0, *ends], ends)]
    noise = []
    for episode in episodes:
        agent, action = (data[name][episode].astype(float) for name in ("state", "action"))
        agent, velocity, executed = agent[:, :2], np.zeros(2), []
        for now, then in zip(agent, agent[1:]):
            target = (then - pp * now - pv * velocity) / pt
            velocity = vp * now + vv * velocity + vt * target
            executed.append(target)
        noise.append(np.array(executed).reshape(-1, 2) - action[:-1])
    return data, episodes, noise


def test_the_recorded_action_is_the_expert_s_in_the_recorded_state(recorded):
    """The executed action recorded, or that of another step; the expert of another goal."""
    data, _, _ = recorded
    asked = sim_pusht.expert_action(data["state"])
    off = np.abs(asked - data["action"]).max(1)
    assert (off < 0.01).mean() > 0.999     # the state is rounded, so a plan may be another one
    away = sim_pusht.expert_demonstrations(2, "away", seed=0)
    off = np.abs(sim_pusht.expert_action(away["state"], sim_pusht.AWAY) - away["action"]).max(1)
    assert (off < 0.01).mean() > 0.99


def test_the_executed_action_has_the_noise_of_its_own_episode(recorded):
    """No noise; one size for all; the noise of another episode after some have ended; noise that
    does not resemble that of the step before, or that grows; the same noise in x and y."""
    _, _, noise = recorded
    size = np.array([values.std() for values in noise])
    assert np.sum(size < 0.01) == 30 and np.sum(size[:30] < 0.01) < 20     # in no order
    for values in noise:     # none where none is asked for, from the first step to the last
        still = np.abs(values).max(1) < 0.01
        assert still.all() or still.mean() < 0.2
    noisy = np.sort(size)[30:]
    assert noisy[:30].mean() == pytest.approx(0.8, rel=0.15)
    assert noisy[30:].mean() == pytest.approx(1.5, rel=0.15)
    noisy = [values for values in noise if values.std() > 0.3]
    before, after = (np.concatenate([values[part] for values in noisy])
                     for part in (slice(-1), slice(1, None)))
    assert (before * after).sum() / (before ** 2).sum() == pytest.approx(0.8, abs=0.05)
    assert abs(np.corrcoef(np.concatenate(noisy).T)[0, 1]) < 0.15


def test_only_successful_episodes_are_recorded(recorded, monkeypatch):
    """An episode in which the expert fails is replaced by a new one."""
    data, _, _ = recorded
    ends = data["episode_ends"]
    assert (sim_pusht.block_coverage(data["state"][ends - 1, 2:]) > 0.96).all()
    original, calls = sim_pusht.expert_action, []

    def lazy_at_first(state, goal):
        calls.append(len(state))
        action = original(state, goal)
        if len(calls) <= 300:     # as long as an episode may be: the first one of two stands still
            action[0] = state[0, :2]
        return action

    monkeypatch.setattr(sim_pusht, "expert_action", lazy_at_first)
    data = sim_pusht.expert_demonstrations(2, "near", seed=0)
    ends = data["episode_ends"]
    assert len(calls) > 300 and len(ends) == 2
    assert (sim_pusht.block_coverage(data["state"][ends - 1, 2:]) > 0.96).all()


@pytest.mark.parametrize("task, wide", [("full", 0), ("near", 0.25), ("away", 0)])
def test_some_demonstrations_start_close_to_the_goal_and_some_anywhere(task, wide, monkeypatch):
    """The shares; how close, which is log-uniform; the agent and the angle, which come along; the
    goal of another task."""
    goal = sim_pusht.TASKS[task][1]
    offset = np.array([40, -30, 0.5])
    close_start = np.concatenate([goal[:2] + offset[:2] + [70, 20], goal + offset])
    anywhere = np.full(5, 50.0)

    def near(rng, asked):
        assert asked is goal
        return close_start.copy()

    law = near if task == "near" else lambda rng, asked: anywhere
    monkeypatch.setattr(sim_pusht, "start_near", near)
    monkeypatch.setattr(sim_pusht, "start_full", lambda rng, asked: anywhere)
    monkeypatch.setitem(sim_pusht.TASKS, task, (law, goal))
    starts = sim_pusht._starts(np.random.default_rng(0), 4000, task)
    is_wide = (starts == anywhere).all(1)
    left = starts[~is_wide]
    share = (left[:, 2:] - goal) / offset     # of the way from the goal to where it started
    np.testing.assert_allclose(share, share[:, :1].repeat(3, 1), atol=1e-9)
    np.testing.assert_allclose(left[:, :2] - left[:, 2:4], [[70, 20]] * len(left), atol=1e-9)
    moved = share[:, 0] < 1
    assert moved.sum() / 4000 == pytest.approx(0.3, abs=0.03)
    expected = 0.7 * (wide if task == "near" else 1)
    assert is_wide.mean() == pytest.approx(expected, abs=0.03)
    level = np.sort(np.log(share[moved, 0]) / np.log(0.08))     # uniform from 0 to 1
    np.testing.assert_allclose(level, np.linspace(0, 1, len(level)), atol=0.06)


def test_near_starts_lie_and_turn_to_all_sides():
    starts = np.array([sim_pusht.start_near(np.random.default_rng(seed), sim_pusht.GOAL)
                       for seed in range(1600)])
    offset = starts[:, 2:] - sim_pusht.GOAL
    octant, _ = np.histogram(np.arctan2(offset[:, 1], offset[:, 0]), 8, (-np.pi, np.pi))
    turn, _ = np.histogram(offset[:, 2], 8, (-0.75, 0.75))
    area, _ = np.histogram((offset[:, :2] ** 2).sum(1), 8, (0, 60 ** 2))
    for counts in (octant, turn, area):
        assert counts.sum() == 1600 and 150 < counts.min() and counts.max() < 250


def test_the_expert_succeeds():
    for task in sim_pusht.TASKS:
        env = PushT(20, task)
        env.reset(0)
        result = sim_pusht.play(
            env, lambda past: sim_pusht.expert_action(past[:, -1], env.goal)[:, None])
        assert (result["max_coverage"] > 0.95).mean() >= (0.95 if task == "away" else 1)


@pytest.mark.parametrize("task", sim_pusht.TASKS)
def test_a_mirror_image_is_as_right_as_its_original(task):
    """Both are played, from start and actions: one ends in the mirror image of the other's end."""
    goal = sim_pusht.TASKS[task][1]
    data = sim_pusht.expert_demonstrations(6, task, seed=0)
    both = sim_pusht.mirror(data, goal)
    number, ends = len(data["state"]), data["episode_ends"]
    assert both["episode_ends"].tolist() == [*ends, *(ends + number)]
    assert all(both[name].dtype == np.float32 and np.array_equal(both[name][:number], data[name])
               for name in ("state", "action"))
    coverage = sim_pusht.block_coverage(both["state"][:, 2:], goal).reshape(2, -1)
    np.testing.assert_allclose(coverage[0], coverage[1], atol=1e-4)
    last = both["episode_ends"] - 1
    first = np.concatenate([[0], last[:-1] + 1])
    env = PushT(12, task)
    env.set_state(both["state"][first])
    for step in range(40):
        state = env.step(both["action"][np.minimum(first + step, last)])[0]
    again = sim_pusht.mirror(dict(state=state[:6], action=state[:6, :2], episode_ends=np.array([6])), goal)
    np.testing.assert_allclose(again["state"][6:, :4], state[6:, :4], atol=0.6)     # at a wall
    turn = np.exp(1j * again["state"][6:, 4]) / np.exp(1j * state[6:, 4])
    np.testing.assert_allclose(turn, 1, atol=0.02)


@pytest.mark.parametrize("task", sim_pusht.TASKS)
def test_everything_that_knows_the_goal_is_told_the_tasks(task):
    """Reward, picture and expert; and starts close to it are within the walls."""
    goal = sim_pusht.TASKS[task][1]
    env = PushT(1, task)
    env.set_state([[50, 50, *goal]])
    assert env.coverage() == pytest.approx(1)
    assert env.step([[50, 50]])[1] == 1
    env.set_state([[50, 50, 60, 256, 0]])
    x, y = sim_pusht.keypoints(goal)[4:].mean(0)          # the middle of the stem
    color = sim_pusht.COLORS[sim_pusht.TARGET]
    np.testing.assert_array_equal(env.render(512)[0, int(y), int(x)], color)
    near = np.array([sim_pusht.start_near(np.random.default_rng(seed), goal) for seed in range(200)])
    assert np.abs(sim_pusht.keypoints(near[:, 2:]) - 255.5).max() <= 248.5
    assert np.linalg.norm(near[:, 2:4] - goal[:2], axis=1).max() <= 60


def test_the_task_away_is_far_turned_and_at_a_wall():
    goal, other = sim_pusht.GOAL, sim_pusht.AWAY
    assert np.linalg.norm(goal[:2] - other[:2]) > 200 and np.pi / 2 < other[2] - goal[2] < np.pi
    assert 30 < 504 - sim_pusht.keypoints(other)[:, 1].max() < 60      # the agent's disc fits in


# Picture ------------------------------------------------------------------------------------------

def test_pictures_are_gym_pushts():
    ours = sim_pusht.draw_states(PICTURES["states"])
    off = np.abs(ours.astype(int) - PICTURES["frames"]).max(-1) > 16
    assert len(off) == 20
    assert off.mean((1, 2)).max() <= 0.02
    np.testing.assert_array_equal(PICTURES["frames"][0, 48, 48], ours[0, 48, 48])


@pytest.mark.parametrize("size", [32, 96, 300, 512, 680])
def test_pictures_of_any_size(size):
    state = np.array([[100, 120, 256, 256, np.pi / 4], [-900, 5000, 500, 3, 1.0]])
    images = sim_pusht.draw_states(state, size)
    assert images.shape == (2, size, size, 3) and images.dtype == np.uint8

    def color(x, y):
        return images[0, int(y * size / 512), int(x * size / 512)].tolist()
    assert color(100, 120) == [78, 126, 255] and color(400, 400) == [255, 255, 255]
    assert color(256 - 10.6, 256 + 10.6) == [143, 163, 184]
    # The share of blue is that of the agent's disc, less its darker rim.
    blue = (np.abs(images[0].astype(int) - [78, 126, 255]).max(-1) < 40).mean()
    assert blue == pytest.approx(np.pi * 13 ** 2 / 512 ** 2, rel=0.35)


def test_rollouts_are_saved(tmp_path):
    env = PushT(3)
    states = [env.reset(0)]
    for _ in range(7):
        states.append(env.step(states[-1][:, 2:4])[0])
    files = tmp_path / "still.png", tmp_path / "moving.gif"
    sim_pusht.draw_rollouts(np.stack(states), np.array([7, 3, 5]), *files)
    assert files[0].read_bytes()[:4] == b"\x89PNG" and files[1].read_bytes()[:3] == b"GIF"


def test_the_lesson_runs_and_saves_its_pictures(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sim_pusht.py", "--task", "near"], cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 0 and "Steps until the success" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "runs/lessons/sim_pusht").iterdir()} == {
        "rollouts.png", "rollout.gif"}


# Demonstration files ------------------------------------------------------------------------------

GOOD = {"state": np.ones((6, 5), np.float32), "action": np.ones((6, 2), np.float32),
        "episode_ends": np.array([2, 6])}


def test_demonstrations_load(tmp_path):
    np.savez(tmp_path / "good.npz", **GOOD)
    data = sim_pusht.load_demonstrations(tmp_path / "good.npz")
    assert set(data) == set(GOOD)
    for name, value in GOOD.items():
        np.testing.assert_array_equal(data[name], value)


def test_demonstrations_of_other_numbers_load_as_the_usual_ones(tmp_path):
    numbers = np.arange(30).reshape(6, 5)
    for kind in (">f8", "<f4", "<f2", ">u2", ">i4", "u1", "i8"):
        for ends in ("<u8", ">u4", ">i8", "u1", "i4"):
            np.savez(tmp_path / "other.npz", state=numbers.astype(kind),
                     action=numbers[:, :2].astype(kind), episode_ends=np.array([2, 6], ends))
            data = sim_pusht.load_demonstrations(tmp_path / "other.npz")
            assert data["state"].dtype == data["action"].dtype == np.dtype("float32")
            assert data["episode_ends"].dtype == np.dtype("int64")
            np.testing.assert_array_equal(data["state"], numbers)
            np.testing.assert_array_equal(data["action"], numbers[:, :2])
            np.testing.assert_array_equal(data["episode_ends"], [2, 6])


@pytest.mark.parametrize("change, message", [
    ({"state": np.full((6, 5), 1e300)}, "state holds NaN, or numbers beyond"),
    ({"state": np.ones((6, 5), complex)}, "state is complex128"),
    ({"episode_ends": np.array([2, 2**64 - 1], np.uint64)}, "must increase"),
    ({"episode_ends": np.array([4, 2, 6], np.uint8)}, "must increase"),
    ({"state": None}, "state is not a file in the archive"),
    ({"state": np.ones((6, 4))}, r"state is float64 of shape \(6, 4\); expected .*\(N, 5\)"),
    ({"action": np.ones((6, 1, 2))}, r"expected .*\(N, 2\)"),
    ({"action": np.full((6, 2), np.nan)}, "action holds NaN"),
    ({"action": np.ones((5, 2))}, "6 states, but 5 actions"),
    ({"state": np.array([["a"] * 5] * 6)}, "state is <U1"),
    ({"episode_ends": np.array([4, 2, 6])}, "must increase"),
    ({"episode_ends": np.array([2, 5])}, "end at 6"),
    ({"episode_ends": np.array([2.0, 6.0])}, "integers"),
    ({"episode_ends": np.array([], int)}, "at least one")])
def test_bad_demonstrations_are_refused(tmp_path, change, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: value for name, value in (GOOD | change).items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        sim_pusht.load_demonstrations(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_unreadable_demonstrations_are_refused(tmp_path):
    for name, content in ("cut.npz", b"PK\x03\x04 but no more"), ("text.npz", b"no numpy file"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a readable .npz"):
            sim_pusht.load_demonstrations(tmp_path / name)
    with pytest.raises(ValueError, match="not a readable .npz"):
        sim_pusht.load_demonstrations(tmp_path / "none.npz")


@pytest.mark.parametrize("change, question", [
    (lambda state, action: (state / [512, 512, 512, 512, 1], action / 512), "no position exceeds"),
    (lambda state, action: (state / [256, 256, 256, 256, 1] - [1, 1, 1, 1, 0], action / 256 - 1),
     "no position exceeds 1"),
    (lambda state, action: (state * [1, 1, 1, 1, 180 / np.pi], action), "largest angle is .* rad"),
    (lambda state, action: (state, action - state[:, :2]), "half of the actions lie .* from the"),
    (lambda state, action: (state, action / 512), "half of the actions lie .* from the agent"),
    (lambda state, action: (state, action), ""),
    (lambda state, action: (state - [0, 0, 0, 0, 4 * np.pi], action), "")])
def test_other_units_are_doubted_in_one_line_but_loaded(tmp_path, capsys, change, question):
    data = sim_pusht.expert_demonstrations(3, seed=1)
    state, action = change(data["state"], data["action"])
    np.savez(tmp_path / "units.npz", **data | {"state": state, "action": action})
    loaded = sim_pusht.load_demonstrations(tmp_path / "units.npz")
    np.testing.assert_array_equal(loaded["state"], np.float32(state))
    said = capsys.readouterr().err
    assert said.count("\n") == bool(question) and re.search(question, said), said
    assert not question or said.startswith(str(tmp_path / "units.npz"))


# Other sources ------------------------------------------------------------------------------------

def test_human_demonstrations_replay():
    """Whole episodes, open-loop; PUSHT_HUMAN names the file (it is not part of the repository)."""
    path = os.environ.get("PUSHT_HUMAN", "")
    if not Path(path).is_file():
        pytest.skip("set PUSHT_HUMAN to an .npz of the human demonstrations")
    data = sim_pusht.load_demonstrations(path)
    ends = data["episode_ends"]
    starts = np.concatenate([[0], ends[:-1]])
    env = PushT(len(ends))
    state = env.set_state(data["state"][starts])
    error, best = np.zeros(len(ends)), env.coverage()
    for step in range((ends - starts).max()):
        row, live = np.minimum(starts + step, ends - 1), starts + step < ends
        now = np.linalg.norm(state[:, 2:4] - data["state"][row, 2:4], axis=1)
        error = np.where(live, now, error)
        best = np.where(live, np.maximum(best, env.coverage()), best)
        state = env.step(data["action"][row])[0]
    recorded = sim_pusht.block_coverage(data["state"][:, 2:])
    recorded = np.array([recorded[a:b].max() for a, b in zip(starts, ends)])
    # One starts with the agent in the block, where the order of contacts decides.
    assert np.median(error) <= 1e-4 and np.sort(error)[-2] <= 0.01 and error.max() <= 10
    assert np.mean(np.abs(best - recorded) <= 0.002) >= 0.99


def test_gym_pusht_live():
    pytest.importorskip("gym_pusht")
    gymnasium = pytest.importorskip("gymnasium")
    gym = gymnasium.make("gym_pusht/PushT-v0", disable_env_checker=True).unwrapped
    rng, env, poses = np.random.default_rng(4), PushT(8), []
    state = env.reset(500)
    for i in range(8):
        np.testing.assert_allclose(gym.reset(seed=500 + i)[0], state[i], atol=1e-9)
    actions = rng.uniform(0, 512, (60, 8, 2))
    rewards = []
    for action in actions:
        rewards.append(env.step(action)[1])
        poses.append(env.block_pose())
    compared = 0
    for i in range(8):
        gym.reset(seed=500 + i)
        for step in range(60):
            _, reward, _, _, info = gym.step(actions[step, i])
            corners = sim_pusht.keypoints(info["block_pose"])
            if corners.min() < 7.5 or corners.max() > 503.5:
                break  # a wall: from here on the order of contacts may decide
            np.testing.assert_allclose(poses[step][i], info["block_pose"], atol=1e-6)
            assert rewards[step][i] == pytest.approx(reward, abs=1e-6)
            compared += 1
    assert compared > 300
