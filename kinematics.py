"""A planar robot arm and its endless, observation-free motion.

Implements the data of stage 1 in the paper (arXiv 2511.12101, section IV-B): joint angles and the
end-effector positions that forward kinematics gives for them. No image, no object, no task. The
paper takes the angles of a 7-joint Franka from recorded demonstrations; here a 3-link planar arm
wanders over the PushT board, and nothing is recorded. In the plane the paper's chain of modified
Denavit-Hartenberg transforms (Eq. 5-7) is two sums, because the angles of the joints add up.

Run alone, `python kinematics.py` checks the Jacobian, measures windows per second and saves a
picture; `--demos FILE.npz` adds a demonstration file's statistics to it.
"""
import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

BOARD = 512.0     # px, the side of the PushT board
MARGIN = 8.0      # px, planned paths keep this far from the edges, for the arm follows inexactly
DAMPING = 30.0    # px per rad, small beside the singular values of the Jacobian (99 % exceed 100)


@dataclass(frozen=True)
class Motion:
    """How the end effector moves: strokes of nearly constant velocity, at 10 Hz.

    Stage 2 freezes what stage 1 learned from these numbers, so they imitate how an agent's
    targets move in PushT: fine pushing, fast travel around the block, waiting. Random splines
    would have no pauses, reversals or straight strokes.
    """
    stroke_steps: float = 8.0        # mean number of steps until a new stroke begins
    stand: float = 0.1               # fraction of the strokes that stand still
    push: float = 0.45               # fraction that push; the rest travel
    push_speed: tuple = (1.0, 6.0)   # px a step, drawn log-uniformly: the slow ones need precision
    travel_speed: tuple = (8.0, 18.0)    # px a step, drawn uniformly
    reversal: float = 0.15           # fraction of the strokes that begin by turning right around
    turn: float = 0.9                # rad, sd of the turn at which the other strokes begin
    bend: float = 0.1                # rad a step, sd from stroke to stroke: straight or wide arcs


# Does it matter that the statistics are PushT's? Two motions for which they are not.
MOTIONS = {"arm": Motion(),
           "fast": Motion(push_speed=(18, 30), travel_speed=(25, 40)),
           "smooth": Motion(stroke_steps=50, stand=0, push=0, reversal=0, turn=0.3, bend=0.03)}


class PlanarArm:
    """N rigid links in a row on a fixed base; joint n turns everything behind it.

    link_lengths: N lengths in px. base (x, y) in px, in PushT's frame: x right, y down. The
    default reaches every point of the board from above its upper edge. joint_limits: N pairs
    (low, high) in rad; None lets joint 1 sweep the half plane facing the board's centre and the
    others 150 degrees to either side.

    Raises ValueError if a length is not positive, the limits do not fit, or part of the board is
    out of reach.
    """

    def __init__(self, link_lengths=(300.0, 250.0, 120.0), base=(256.0, -60.0), joint_limits=None,
                 motion: Motion = Motion()):
        self.link_lengths, self.base, self.motion = list(link_lengths), list(base), motion
        if not self.link_lengths or min(self.link_lengths) <= 0:
            raise ValueError(f"link_lengths must be positive, at least one, got {link_lengths}")
        x, y = self.base
        if joint_limits is None:
            facing, fold = math.atan2(BOARD / 2 - y, BOARD / 2 - x), math.radians(150)
            joint_limits = [(facing - math.pi / 2, facing + math.pi / 2)]
            joint_limits += [(-fold, fold)] * (len(self.link_lengths) - 1)
        self.joint_limits = [tuple(pair) for pair in joint_limits]
        if len(self.joint_limits) != len(self.link_lengths) or \
                any(low >= high for low, high in self.joint_limits):
            raise ValueError(f"joint_limits must be {len(self.link_lengths)} pairs low < high, "
                             f"got {joint_limits}")
        furthest = math.hypot(max(x, BOARD - x), max(y, BOARD - y))
        nearest = math.hypot(max(-x, 0, x - BOARD), max(-y, 0, y - BOARD))
        reach = sum(self.link_lengths)
        hole = max(0.0, 2 * max(self.link_lengths) - reach)    # too near the base to fold back to
        if furthest > reach or nearest < hole:
            raise ValueError(f"the board lies {nearest:.0f} to {furthest:.0f} px from the base, "
                             f"but the arm reaches {hole:.0f} to {reach:.0f} px")

    def joints(self, angles):
        """Angles (...,N) in rad -> positions (...,N+1,2) in px: base, elbows, end effector.

        Raises ValueError if the last dimension is not N.
        """
        if angles.shape[-1] != len(self.link_lengths):
            raise ValueError(f"angles must end in {len(self.link_lengths)} joints, "
                             f"got shape {tuple(angles.shape)}")
        heading = angles.cumsum(-1)[..., None]    # of a link: its own angle plus all before it
        links = torch.cat([heading.cos(), heading.sin()], -1) \
            * angles.new_tensor(self.link_lengths)[:, None]
        base = angles.new_tensor(self.base).expand(*angles.shape[:-1], 1, 2)
        return torch.cat([base, links], -2).cumsum(-2)

    def forward(self, angles):
        """Forward kinematics: angles (...,N) in rad -> end-effector positions (...,2) in px."""
        return self.joints(angles)[..., -1, :]

    def jacobian(self, angles):
        """d position / d angle at angles (...,N): (...,2,N) in px per rad.

        Turning joint n moves the end effector at right angles to the arrow from the joint to it.
        """
        joints = self.joints(angles)
        arrow = joints[..., -1:, :] - joints[..., :-1, :]                        # (...,N,2)
        return torch.stack([-arrow[..., 1], arrow[..., 0]], dim=-2)

    def inverse(self, positions, wrist=0.6):
        """Inverse kinematics of three links: positions (...,2) in px -> angles (...,3) in rad.

        Many poses reach a point. This is the one with joint 3 held at `wrist` rad, so that links 2
        and 3 are as one, and the elbow on one side; nearby points get nearby poses. The joint
        limits are not enforced.
        """
        upper, middle, hand = self.link_lengths
        forearm = complex(middle + hand * math.cos(wrist), hand * math.sin(wrist))
        x, y = (positions - positions.new_tensor(self.base)).unbind(-1)
        cosine = (x ** 2 + y ** 2 - upper ** 2 - abs(forearm) ** 2) / (2 * upper * abs(forearm))
        elbow = -cosine.clamp(-1, 1).acos()      # between upper arm and forearm: law of cosines
        shoulder = torch.atan2(y, x) - torch.atan2(abs(forearm) * elbow.sin(),
                                                   upper + abs(forearm) * elbow.cos())
        bend = elbow - math.atan2(forearm.imag, forearm.real)
        return torch.stack([shoulder, bend, torch.full_like(bend, wrist)], dim=-1)

    def sample_windows(self, batch: int, horizon: int, generator=None):
        """An endless stream of random motion over the board, on the generator's device.

        Returns angles (B,T,N) in rad within joint_limits and positions (B,T,2) in px within
        [0, 512], with positions = forward(angles): T steps at 10 Hz.

        Raises ValueError if batch < 1, horizon < 2, or the limits keep the arm off the board.
        """
        if batch < 1 or horizon < 2:
            raise ValueError(f"batch must be >= 1 and horizon >= 2, got {batch} and {horizon}")
        # One window of 16 steps in eight meets a joint limit and is dropped, of longer ones more.
        drawn = batch + batch * horizon // 32 + 64
        angles = self._start_angles(drawn, generator)
        path = self._paths(self.forward(angles), horizon, generator)
        trajectory, damping = [angles], DAMPING ** 2 * torch.eye(2, device=angles.device)
        for velocity in path.diff(dim=1)[..., None].unbind(1):
            # The smallest joint motion that gives this velocity: the damped pseudo-inverse
            # J^T (J J^T + damping^2)^-1 (Nakamura & Hanafusa 1986). Without damping joint speeds
            # grow without bound where the arm is stretched out and cannot move along itself.
            jacobian = self.jacobian(angles)
            square = jacobian @ jacobian.mT + damping
            angles = angles + (jacobian.mT @ torch.linalg.solve(square, velocity))[..., 0]
            trajectory.append(angles)
        angles = torch.stack(trajectory, dim=1)
        positions = self.forward(angles)
        rows = self._first_valid(angles, positions, batch)
        return angles[rows], positions[rows]

    def _start_angles(self, count, generator):
        """Random poses on the board, (count,N) in rad: about a third of all poses are there."""
        device = generator.device if generator is not None else "cpu"
        low, high = torch.tensor(self.joint_limits, device=device).T
        share = torch.rand(4 * count, len(low), generator=generator, device=device)
        angles = low + (high - low) * share
        return angles[self._first_valid(angles[:, None], self.forward(angles)[:, None], count)]

    def _first_valid(self, angles, positions, count):
        """Indices (count,) of the first windows (B,T,...) inside the limits and on the board."""
        low, high = angles.new_tensor(self.joint_limits).T
        valid = ((angles >= low) & (angles <= high)).all(-1).all(-1)
        valid &= ((positions >= 0) & (positions <= BOARD)).all(-1).all(-1)
        rows = valid.nonzero()[:, 0]
        if len(rows) == 0:
            raise ValueError(f"no sampled motion within joint_limits {self.joint_limits} stays on "
                             "the board")
        # Were there too few, some would repeat; a loop until there are enough might never end.
        return rows[torch.arange(count, device=rows.device) % len(rows)]

    def _paths(self, start, horizon, generator):
        """Where the end effector is to go from start (B,2): (B,horizon,2) in px, on the board."""
        m = self.motion
        shape, device = (len(start), horizon + 1), start.device    # + 1: smoothing takes it again

        def uniform():
            return torch.rand(shape, generator=generator, device=device)

        def normal():
            return torch.randn(shape, generator=generator, device=device)

        starts = uniform() < 1 / m.stroke_steps
        starts[:, 0] = True
        kind = uniform()
        (low, high), (travel_low, travel_high) = m.push_speed, m.travel_speed
        speed = torch.where(kind < m.stand + m.push, low * (high / low) ** uniform(),
                            travel_low + (travel_high - travel_low) * uniform())
        speed = torch.where(kind < m.stand, 0.0, speed)
        change = torch.where(uniform() < m.reversal, math.pi, m.turn * normal())
        # At each step, the index of the step at which its stroke began: speed and bend hold since.
        began = torch.where(starts, torch.arange(shape[1], device=device), 0).cummax(1).values
        speed, bend = speed.gather(1, began), (m.bend * normal()).gather(1, began)
        heading = 2 * math.pi * uniform()[:, :1] + torch.where(starts, change, bend).cumsum(1)
        velocity = speed[..., None] * torch.stack([heading.cos(), heading.sin()], -1)
        path = torch.cat([start[:, None], start[:, None] + velocity.cumsum(1)], dim=1)
        # The edges are mirrors: fold the unbounded path back onto the board.
        inner = BOARD - 2 * MARGIN
        path = BOARD - MARGIN - (inner - (path - MARGIN).remainder(2 * inner)).abs()
        # A joint cannot jump to another velocity: average three steps.
        return (path[:, :-2] + path[:, 1:-1] + path[:, 2:]) / 3


# The lesson ------------------------------------------------------------------------------------

def load_demonstrations(path, horizon=16):
    """Agent targets of a demonstration file (`action`, `episode_ends`), cut to (B,T,2) in px."""
    with np.load(path) as file:
        episodes = np.split(file["action"].astype(np.float32), file["episode_ends"][:-1])
    windows = [np.lib.stride_tricks.sliding_window_view(episode, horizon, axis=0)[::4]
               for episode in episodes if len(episode) >= horizon]
    return torch.from_numpy(np.concatenate(windows)).mT


def motion_statistics(positions):
    """positions (B,T,2) -> speeds in px a step, turning angles in degrees, spread (T,) in px.

    A turn counts only between two steps of more than 1 px: a pause has no heading. The spread is
    the standard deviation of the displacement from the window's first position.
    """
    step = positions.diff(dim=1)
    speed, heading = step.norm(dim=-1), torch.atan2(step[..., 1], step[..., 0])
    turn = heading.diff(dim=1).rad2deg().add(180).remainder(360).sub(180).abs()
    moving = (speed[:, 1:] > 1) & (speed[:, :-1] > 1)
    return speed.flatten(), turn[moving], (positions - positions[:, :1]).std((0, 2))


def lesson(out: Path, demos: Path | None):
    """Print the arm's shapes, a Jacobian check and the motion's statistics; save a picture."""
    arm, generator = PlanarArm(), torch.Generator().manual_seed(0)
    sources = {} if demos is None else {"demonstrations": load_demonstrations(demos)}
    angles, positions = arm.sample_windows(4096, 16, generator)
    print(f"1. sample_windows(4096, 16): angles {tuple(angles.shape)} rad, positions"
          f" {tuple(positions.shape)} px,\n   largest |forward(angles) - positions|"
          f" {(arm.forward(angles) - positions).abs().max():.1e} px")

    pose, small = angles[0, 0].double(), 1e-6 * torch.eye(3, dtype=torch.float64)
    slopes = (arm.forward(pose + small) - arm.forward(pose - small)) / 2e-6      # (N,2)
    print(f"2. Jacobian {tuple(arm.jacobian(pose).shape)} in px per rad at angles"
          f" {pose.numpy().round(2)}:\n{arm.jacobian(pose).numpy().round(2)}\n   largest difference"
          f" from finite differences {(arm.jacobian(pose) - slopes.T).abs().max():.1e}")

    start = time.perf_counter()
    for _ in range(5):
        arm.sample_windows(4096, 18, generator)
    rate = 5 * 4096 / (time.perf_counter() - start)
    print(f"3. {rate:,.0f} windows of 18 steps a second on {torch.get_num_threads()} thread(s)")

    figure, axes = plt.subplots(2, 2, figsize=(11, 10))
    axes = axes.flatten()
    print("4. Motion              px a step: 10%    50%    90%     degrees turned: 50%    90%"
          "     spread after 15 steps")
    for name, windows in {"arm": positions, **sources}.items():
        speed, turn, spread = motion_statistics(windows)
        slow, middle, fast = np.quantile(speed, [0.1, 0.5, 0.9])
        print(f"   {name:19s} {slow:14.1f} {middle:6.1f} {fast:6.1f} {turn.median():23.1f}"
              f" {np.quantile(turn, 0.9):6.1f} {spread[-1]:22.1f} px")
        axes[2].hist(speed, np.arange(0, 31), density=True, alpha=0.5, label=name)
        axes[3].hist(turn, np.arange(0, 181, 5), density=True, alpha=0.5, label=name)
    axes[2].set(title="displacement, px a step (10 Hz)", ylabel="density")
    axes[3].set(title="turning angle between steps, degrees", yscale="log")
    axes[2].legend()

    axes[0].scatter(*positions[:3000, 0].T, s=1, color="lightgray")
    for pose in angles[:5, 0]:
        axes[0].plot(*arm.joints(pose).T, "o-", lw=2, ms=4)
    axes[0].set_title("five poses; grey: where windows begin")
    for path in positions[:80]:
        axes[1].plot(*path.T, ".-", ms=2, lw=0.7)
    axes[1].set_title("80 windows of 16 steps")
    for axis in axes[:2]:
        axis.add_patch(plt.Rectangle((0, 0), BOARD, BOARD, fill=False))
        axis.set(aspect="equal", xlabel="x, px", ylabel="y, px (down)")
        axis.invert_yaxis()
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "kinematics.png", dpi=100)
    print(f"Picture: {out / 'kinematics.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The lesson on the arm and its motion.")
    parser.add_argument("--out", type=Path, default=Path("runs/lessons"), help="picture folder")
    parser.add_argument("--demos", type=Path, help="demonstrations to compare with (.npz)")
    arguments = parser.parse_args()
    try:
        lesson(arguments.out, arguments.demos)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))
