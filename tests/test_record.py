"""The game that records: it is played here by the expert, through matplotlib's own events."""
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.backend_bases import KeyEvent, MouseEvent  # noqa: E402

from results import record  # noqa: E402
from sim_pusht import PushT, block_coverage, expert_action, load_demonstrations  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def new_game(tmp_path, monkeypatch):
    """A game that writes to tmp_path, without drawing."""
    canvas = "matplotlib.backends.backend_agg.FigureCanvasAgg"
    monkeypatch.setattr(f"{canvas}.draw_idle", lambda self: None)

    def start(name="pushes.npz", task="near", seed=0):
        return record.Game(tmp_path / name, task, seed)
    with matplotlib.rc_context():
        yield start
    plt.close("all")


def move(game, position):
    """The mouse moves to a place on the board, px. The board's y points down, the window's up."""
    window = game.image.axes.get_window_extent()
    x = window.x0 + window.width * position[0] / 512
    y = window.y1 - window.height * position[1] / 512
    MouseEvent("motion_notify_event", game.figure.canvas, x, y)._process()


def press(game, key):
    KeyEvent("key_press_event", game.figure.canvas, key)._process()


def push(game, steps):
    """The expert moves the mouse; returns the states and targets of the steps."""
    move(game, game.env.state()[0, :2])
    seen, targets = [], []
    for _ in range(steps):
        seen.append(game.env.state()[0])
        targets.append(expert_action(seen[-1][None], game.env.goal)[0])
        move(game, targets[-1])
        game.on_tick()
        if not game.states:      # the next scene
            break
    return np.array(seen), np.array(targets)


def test_a_success_is_recorded_as_it_was_played(new_game, tmp_path):
    """States and actions of the same steps; replayed, the last action is the one that succeeds."""
    game = new_game()
    seen, targets = push(game, 300)
    data = load_demonstrations(tmp_path / "pushes.npz")
    assert data["episode_ends"].tolist() == [len(seen)] and len(seen) > 10
    np.testing.assert_allclose(data["state"], seen, rtol=1e-6)
    np.testing.assert_allclose(data["action"], targets, atol=1e-4)
    env = PushT(1, "near")
    coverage = [block_coverage(env.set_state(data["state"][:1])[0, 2:])]
    for action in data["action"]:
        env.step(action[None])
        coverage.append(env.coverage()[0])
    assert coverage[-1] > 0.95 and max(coverage[:-1]) <= 0.95


def test_nothing_of_a_scene_stays_in_the_next(new_game):
    game = new_game(seed=5)
    np.testing.assert_array_equal(game.env.state(), PushT(1, "near").reset(5))
    push(game, 300)
    assert game.states == game.actions == [] and game.target is None
    assert game.env.steps == 0 and game.env.max_coverage == 0
    np.testing.assert_array_equal(game.env.state(), PushT(1, "near").reset(6))
    for _ in range(3):      # the mouse has not touched the agent again
        game.on_tick()
    assert game.states == [] and game.env.steps == 0
    assert "touch the agent" in game.image.axes.get_title()
    assert "1 episodes in pushes.npz" in game.image.axes.get_title()


def test_the_mouse_has_to_touch_the_agent_first(new_game):
    game = new_game()
    agent = game.env.state()[0, :2]
    away = agent + [40, 0] if agent[0] < 400 else agent - [40, 0]
    move(game, away)
    game.on_tick()
    assert game.states == []
    move(game, agent + [10, -15])
    move(game, away)
    game.on_tick()
    np.testing.assert_allclose(game.actions, [away], atol=1e-6)
    MouseEvent("motion_notify_event", game.figure.canvas, 1, 1)._process()      # beside the board
    game.on_tick()
    np.testing.assert_allclose(game.actions, [away, away], atol=1e-6)


def test_keys_keep_and_restart(new_game, tmp_path):
    game = new_game(task="full")
    scene = game.env.state()
    push(game, 4)
    press(game, "r")
    np.testing.assert_array_equal(game.env.state(), scene)
    assert not (tmp_path / "pushes.npz").exists()
    press(game, "k")      # nothing to keep
    assert not (tmp_path / "pushes.npz").exists()
    push(game, 7)
    press(game, "x")
    assert len(game.states) == 7
    press(game, "k")
    assert load_demonstrations(tmp_path / "pushes.npz")["episode_ends"].tolist() == [7]
    np.testing.assert_array_equal(game.env.state(), PushT(1).reset(1))


def test_a_file_is_continued(new_game, tmp_path):
    game = new_game(task="full")
    push(game, 5)
    press(game, "k")
    plt.close()
    first = load_demonstrations(tmp_path / "pushes.npz")
    game = new_game(task="full")
    np.testing.assert_array_equal(game.env.state(), PushT(1).reset(1))
    push(game, 3)
    press(game, "k")
    both = load_demonstrations(tmp_path / "pushes.npz")
    assert both["episode_ends"].tolist() == [5, 8]
    for name in ("state", "action"):
        np.testing.assert_array_equal(both[name][:5], first[name])


@pytest.mark.parametrize("name", ["pushes", "my.pushes", "new/folder/pushes.npz"])
def test_the_name_of_the_file_is_kept(new_game, tmp_path, name):
    game = new_game(name)
    push(game, 3)
    press(game, "k")
    assert len(load_demonstrations(tmp_path / name)["state"]) == 3
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_a_save_that_fails_harms_nothing(new_game, tmp_path, monkeypatch, capsys):
    game = new_game(task="full")
    push(game, 5)
    press(game, "k")
    before = (tmp_path / "pushes.npz").read_bytes()

    def full(file, **data):
        file.write(b"half")
        raise OSError("disk full")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full)
        push(game, 4)
        press(game, "k")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "disk full" in said
    assert (tmp_path / "pushes.npz").read_bytes() == before
    push(game, 3)
    press(game, "k")
    assert load_demonstrations(tmp_path / "pushes.npz")["episode_ends"].tolist() == [5, 9, 12]


def test_it_plays_ten_steps_a_second(new_game, monkeypatch):
    game = new_game()
    timers = []

    class Timer:
        def __init__(self, milliseconds):
            timers.append(milliseconds)

        def add_callback(self, function):
            timers.append(function)

        def start(self):
            timers.append("started")
    monkeypatch.setattr(game.figure.canvas, "new_timer", Timer)
    monkeypatch.setattr(plt, "show", lambda: timers.append("shown"))
    game.play()
    assert timers == [100, game.on_tick, "started", "shown"]


# The command line ---------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["agg", "svg"])
def test_without_a_window_there_is_one_clear_line(tmp_path, backend):
    command = [sys.executable, "-m", "results.record", tmp_path / "pushes.npz"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"MPLBACKEND": backend})
    assert done.returncode == 2 and done.stdout == ""
    assert f"no window can be opened with matplotlib's backend '{backend}'" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_which_backends_have_a_window():
    names = set(record.backends_with_a_window())
    assert {"tkagg", "qtagg", "macosx", "gtk3agg", "wxagg"} <= names
    assert not {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"} & names


def command(monkeypatch, *arguments):
    monkeypatch.setattr(record, "backends_with_a_window", lambda: ["agg"])
    record.main([str(argument) for argument in arguments])


def test_the_command_says_what_comes_next(new_game, tmp_path, monkeypatch, capsys):
    def play(game):
        np.testing.assert_array_equal(game.env.state(), PushT(1, "away").reset(3))
        push(game, 3)
        press(game, "k")
    monkeypatch.setattr(record.Game, "play", play)
    command(monkeypatch, tmp_path / "pushes", "--task", "away", "--seed", 3)
    assert f"1 episodes in {tmp_path}/pushes" in (said := capsys.readouterr().out)
    assert f"python train.py --demos {tmp_path}/pushes" in said


@pytest.mark.parametrize("arguments, message", [
    (["damaged.npz"], "not a readable .npz file"), (["folder"], "not a readable .npz file"),
    (["damaged.npz/pushes"], "damaged.npz"), (["pushes", "--task", "far"], "'far'"),
    (["pushes", "--seed", "-1"], "--seed -1 is out of range; allowed: 0 to 99,999"),
    (["pushes", "--seed", "100000"], "out of range"), ([], "FILE")])
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.npz").write_bytes(b"PK and no more")
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and message in said, said
    assert (tmp_path / "damaged.npz").read_bytes() == b"PK and no more"
    assert not (tmp_path / "pushes").exists()
