"""A game that records: push the block with the mouse, and keep the episodes as demonstrations.

    python -m results.record FILE [--task near] [--seed 0]
    python train.py --demos FILE      learns from them

A window shows PushT. Touch the blue agent with the mouse: from then on it follows the mouse, ten
steps a second. Push the grey block until it covers the green goal. With coverage above 0.95 the
episode ends, it is added to FILE, and the next scene starts. Keys: k keeps the episode as it is and
starts the next scene, r starts the same scene again, q quits. FILE has the layout of an .npz file,
see sim_pusht.load_demonstrations. If it exists, its episodes stay and the new ones follow.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

from sim_pusht import AGENT_RADIUS, BOARD, TASKS, PushT, load_demonstrations

SEEDS = 100_000  # the scenes of larger seeds are for evaluation; no demonstration may show them


class Game:
    """The window, the scene in it, and the episodes of the file.

    path: the file; task: a key of TASKS; seed: of the first scene of an empty file. Each kept
    episode makes the seed larger by 1. Raises ValueError if the file exists but holds something
    else, OSError if it cannot be written.
    """

    def __init__(self, path, task="full", seed=0):
        import matplotlib.pyplot as plt
        self.env, self.path, self.seed = PushT(task=task), Path(path), seed
        self.unfinished = self.path.with_name("unfinished-" + self.path.name)
        self.data = {"state": np.zeros((0, 5), np.float32), "action": np.zeros((0, 2), np.float32),
                     "episode_ends": np.zeros(0, int)}
        if self.path.exists():
            self.data = load_demonstrations(self.path)
        # Find out before the game whether a file can be written there.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished.touch()
        self.unfinished.unlink()
        # No zooming with the mouse; and "k" and "r" must not change the axes.
        plt.rcParams.update({"toolbar": "None", "keymap.xscale": [], "keymap.home": []})
        self.figure, axis = plt.subplots(num="PushT", figsize=(6, 6.5))
        self.figure.subplots_adjust(0.02, 0.02, 0.98, 0.9)
        axis.set_axis_off()
        self.image = axis.imshow(self.env.render(512)[0], extent=(0, BOARD, BOARD, 0))
        self.figure.canvas.mpl_connect("motion_notify_event", self.on_move)
        self.figure.canvas.mpl_connect("key_press_event", self.on_key)
        self.next_scene()

    def next_scene(self):
        """Start the scene that belongs to the number of episodes; nothing of the last one stays."""
        self.env.reset(self.seed + len(self.data["episode_ends"]))
        self.states, self.actions, self.target = [], [], None
        self.draw("touch the agent with the mouse to begin")

    def on_move(self, event):
        """The mouse has moved: it is the agent's target, if it has touched the agent before."""
        if event.inaxes:
            mouse = np.array([event.xdata, event.ydata])
            distance = np.linalg.norm(mouse - self.env.state()[0, :2])
            if self.target is not None or distance < 2 * AGENT_RADIUS:
                self.target = mouse

    def on_key(self, event):
        """k keeps the episode, k and r start a scene; matplotlib itself closes the window on q."""
        if event.key == "k" and self.states:
            self.save()
        if event.key in ("k", "r"):
            self.next_scene()

    def on_tick(self):
        """One control step. TRAP: an action belongs to the state before the step."""
        if self.target is None:
            return
        self.states.append(self.env.state()[0])
        self.actions.append(self.target)
        _, _, terminated, _, info = self.env.step(self.target[None])
        self.draw(f"coverage {info['coverage'][0]:.3f}, best {info['max_coverage'][0]:.3f}")
        if terminated[0]:
            self.save()
            self.next_scene()

    def save(self):
        """Add the episode to the file. The old file stays whole until the new one is."""
        end = len(self.data["state"]) + len(self.states)
        episode = {"state": np.float32(self.states), "action": np.float32(self.actions),
                   "episode_ends": [end]}
        for name, values in episode.items():
            self.data[name] = np.concatenate([self.data[name], values])
        try:
            # An open file, because numpy adds .npz to a name that does not end so.
            with self.unfinished.open("wb") as file:
                np.savez_compressed(file, **self.data)
            self.unfinished.replace(self.path)
        except OSError as error:
            print(f"record: not saved, but the next save tries again: {error}", file=sys.stderr)

    def draw(self, text):
        """Show the scene, and above it `text` and what the keys do."""
        self.image.set_data(self.env.render(512)[0])
        episodes = len(self.data["episode_ends"])
        self.image.axes.set_title(f"{text}\n{episodes} episodes in {self.path.name}; keys: k keep, "
                                  "r restart, q quit", fontsize=9, parse_math=False)
        self.figure.canvas.draw_idle()

    def play(self):
        """Ten steps a second until the window is closed."""
        import matplotlib.pyplot as plt
        timer = self.figure.canvas.new_timer(100)  # ms
        timer.add_callback(self.on_tick)
        timer.start()
        plt.show()


def backends_with_a_window():
    """The names, in lower case, of matplotlib's backends that open a window."""
    try:
        from matplotlib.backends import BackendFilter, backend_registry
    except ImportError:  # matplotlib 3.8
        from matplotlib.rcsetup import interactive_bk
        return [name.lower() for name in interactive_bk]
    return backend_registry.list_builtin(BackendFilter.INTERACTIVE)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m results.record", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"record: {message}\n")
    flag = parser.add_argument
    flag("file", metavar="FILE", type=Path, help="where the episodes go; .npz is not added")
    flag("--task", choices=TASKS, default="full",
         help="where scenes start, and the goal; default full, the benchmark")
    flag("--seed", type=int, default=0, help="of the first scene; default 0")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < SEEDS:
        parser.error(f"--seed {options.seed} is out of range; allowed: 0 to {SEEDS - 1:,}")
    try:
        import matplotlib.pyplot as plt
        backend = plt.get_backend()
        if backend.lower() not in backends_with_a_window():
            parser.error(f"no window can be opened with matplotlib's backend {backend!r}: install "
                         "tkinter or PyQt6, run where there is a display, leave MPLBACKEND unset")
        game = Game(options.file, options.task, options.seed)
        game.play()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.error(error)
    episodes = len(game.data["episode_ends"])
    print(f"{episodes} episodes in {options.file}; next: python train.py --demos {options.file}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold any letter
    main()
