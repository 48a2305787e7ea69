"""A planar robot arm and its endless, observation-free motion.

Implements the data of stage 1 in the paper (arXiv 2511.12101, section IV-B): joint angles and the
end-effector positions that forward kinematics gives for them. No image, no object, no task. The
paper takes the angles of a 7-joint Franka from recorded demonstrations; here a 3-link planar arm
wanders over the PushT board, and nothing is recorded. In the plane the paper's chain of modified
Denavit-Hartenberg transforms (Eq. 5-7) is two sums, because the angles of the joints add up.

Run alone, `python kinematics.py` checks the Jacobian, measures windows per second and saves a
picture.
"""
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BOARD = 512.0     # px, the side of the square that the arm wanders over: PushT's board
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
    stand_share: float = 0.1         # of the strokes that stand still
    push_share: float = 0.45         # of the strokes that push; the rest travel
    push_speed: tuple = (1.0, 6.0)   # px a step, drawn log-uniformly: the slow ones need precision
    travel_speed: tuple = (8.0, 18.0)    # px a step, drawn uniformly
    reversal_share: float = 0.15     # of the strokes that begin by turning right around
    turn: float = 0.9                # rad, sd of the turn at which the other strokes begin
    bend: float = 0.1                # rad a step, sd from stroke to stroke: straight or wide arcs


# Does it matter that the statistics are PushT's? Two motions for which they are not.
MOTIONS = {
    "arm": Motion(),
    "fast": Motion(push_speed=(18, 30), travel_speed=(25, 40)),
    "smooth": Motion(stroke_steps=50, stand_share=0, push_share=0, reversal_share=0, turn=0.3,
                     bend=0.03),
}


def unit(heading):
    """Headings (...) in rad -> vectors (...,2) of length 1."""
    return torch.stack([heading.cos(), heading.sin()], -1)


class PlanarArm:
    """N rigid links in a row on a fixed base; joint n turns everything behind it.

    link_lengths: N lengths in px. base (x, y) in px, in PushT's frame: x right, y down. The
    default reaches every point of the board from above its upper edge. motion: the Motion of
    `sample_windows`. joint_limits, N pairs (low, high) in rad: joint 1 sweeps the half plane
    facing the board's centre, the others 150 degrees to either side.

    Raises ValueError if a length is not positive, or part of the board is out of reach.
    """

    def __init__(self, link_lengths=(300.0, 250.0, 120.0), base=(256.0, -60.0), motion=Motion()):
        if min(link_lengths, default=0) <= 0:
            raise ValueError(f"link_lengths must be positive, at least one, got {link_lengths}")
        self.link_lengths = list(link_lengths)
        self.base = base
        self.motion = motion
        x, y = base
        middle = BOARD / 2
        facing = math.atan2(middle - y, middle - x)
        quarter = math.radians(90)
        fold = math.radians(150)
        self.joint_limits = [(-fold, fold)] * len(link_lengths)
        self.joint_limits[0] = (facing - quarter, facing + quarter)

        nearest_point = np.clip(base, 0, BOARD)
        nearest = math.dist(base, nearest_point)
        across = max(x, BOARD - x)
        down = max(y, BOARD - y)
        furthest = math.hypot(across, down)
        reach = sum(link_lengths)
        hole = max(0.0, 2 * max(link_lengths) - reach)    # too near the base to fold back to
        if furthest > reach or nearest < hole:
            raise ValueError(f"the board lies {nearest:.0f} to {furthest:.0f} px from the base, "
                             f"but the arm reaches {hole:.0f} to {reach:.0f} px")

    def joints(self, angles):
        """Angles (...,N) in rad -> positions (...,N+1,2) in px: base, elbows, end effector.

        Raises ValueError if the last dimension is not N.
        """
        like_angles = dict(dtype=angles.dtype, device=angles.device)
        lengths = torch.tensor(self.link_lengths, **like_angles)
        if angles.shape[-1] != len(lengths):
            raise ValueError(f"angles must end in {len(lengths)} joints, "
                             f"got shape {tuple(angles.shape)}")
        heading = angles.cumsum(-1)    # of a link: its own angle plus all before it
        links = unit(heading) * lengths[:, None]
        base = torch.tensor(self.base, **like_angles).expand_as(links[..., :1, :])
        return torch.cat([base, links], -2).cumsum(-2)

    def forward(self, angles):
        """Forward kinematics: angles (...,N) in rad -> end-effector positions (...,2) in px."""
        return self.joints(angles)[..., -1, :]

    def jacobian(self, angles):
        """d position / d angle at angles (...,N): (...,2,N) in px per rad.

        Turning joint n moves the end effector at right angles to the arrow from the joint to it.
        """
        joints = self.joints(angles)
        end_effector = joints[..., -1:, :]
        arrow = end_effector - joints[..., :-1, :]    # (...,N,2)
        x, y = arrow.unbind(-1)
        return torch.stack([-y, x], dim=-2)

    def joint_step(self, angles, displacement):
        """The joint motion (B,N) in rad that moves the end effector by displacement (B,2) in px.

        Of all that do, the smallest: the pseudo-inverse of the Jacobian, here damped,
        J^T (J J^T + damping^2)^-1 (Nakamura & Hanafusa 1986). Without damping joint speeds grow
        without bound where the arm is stretched out and cannot move along itself.
        """
        jacobian = self.jacobian(angles)
        damping = DAMPING ** 2 * torch.eye(2, device=angles.device)
        square = jacobian @ jacobian.mT + damping
        pull = torch.linalg.solve(square, displacement[..., None])
        step = jacobian.mT @ pull
        return step[..., 0]

    def inverse(self, positions, wrist=0.6):
        """Inverse kinematics of three links: positions (...,2) in px -> angles (...,3) in rad.

        Many poses reach a point. This is the one with joint 3 held at `wrist` rad, so that links 2
        and 3 are as one forearm, and with the elbow on the side where the forearm, seen along the
        upper arm, turns by a negative angle (on the board, y down: counter-clockwise). Nearby
        points get nearby poses. The joint limits are not enforced.
        """
        upper, middle, hand = self.link_lengths
        along = middle + hand * math.cos(wrist)
        across = hand * math.sin(wrist)
        forearm = math.hypot(along, across)
        offset = positions - positions.new_tensor(self.base)
        x, y = offset.unbind(-1)
        distance = offset.norm(dim=-1)
        # The law of cosines in the triangle of base, elbow and end effector.
        excess = distance ** 2 - upper ** 2 - forearm ** 2
        cosine = excess / (2 * upper * forearm)
        elbow = -cosine.clamp(-1, 1).acos()    # minus: this side of the two
        ahead = upper + forearm * elbow.cos()
        shift = torch.atan2(forearm * elbow.sin(), ahead)
        shoulder = torch.atan2(y, x) - shift
        bend = elbow - math.atan2(across, along)
        wrist = torch.full_like(bend, wrist)
        return torch.stack([shoulder, bend, wrist], dim=-1)

    def sample_windows(self, batch, horizon, generator=None, device=None):
        """An endless stream of random motion over the board, on the generator's device, or `device`.

        Returns angles (B,T,N) in rad within joint_limits and positions (B,T,2) in px within
        [0, 512], with positions = forward(angles): T steps at 10 Hz.

        Raises ValueError if batch < 1 or horizon < 2.
        """
        if batch < 1 or horizon < 2:
            raise ValueError(f"batch must be >= 1 and horizon >= 2, got {batch} and {horizon}")
        # One window of 16 steps in eight meets a joint limit and is dropped, of longer ones more.
        drawn = batch + batch * horizon // 32 + 64
        device = generator.device if generator else device
        angles = self._start_angles(drawn, generator, device)
        path = self._paths(self.forward(angles), horizon, generator)
        trajectory = [angles]
        for displacement in path.diff(dim=1).unbind(1):
            angles = angles + self.joint_step(angles, displacement)
            trajectory.append(angles)
        angles = torch.stack(trajectory, dim=1)
        positions = self.forward(angles)
        rows = self._valid_rows(angles, positions, batch)
        return angles[rows], positions[rows]

    def _start_angles(self, count, generator, device):
        """Random poses on the board, (count,N) in rad: about a third of all poses are there."""
        low, high = torch.tensor(self.joint_limits, device=device).T
        share = torch.rand(4 * count, len(low), generator=generator, device=device)
        angles = low + (high - low) * share
        rows = self._valid_rows(angles, self.forward(angles), count)
        return angles[rows]

    def _valid_rows(self, angles, positions, count):
        """Indices (count,) of the first windows within the limits and on the board.

        angles (B,...,N), positions (B,...,2). Raises ValueError if there is no such window.
        """
        low, high = angles.new_tensor(self.joint_limits).T
        tests = [angles >= low, angles <= high, positions >= 0, positions <= BOARD]
        passed = torch.cat(tests, dim=-1).flatten(1).all(1)
        rows = passed.nonzero().flatten()
        if len(rows) == 0:
            raise ValueError(f"no sampled motion within {self.joint_limits} rad stays on the board")
        # Were there too few, some would repeat; a loop until there are enough might never end.
        order = torch.arange(count, device=rows.device)
        return rows[order % len(rows)]

    def _paths(self, start, horizon, generator):
        """Where the end effector is to go from start (B,2): (B,horizon,2) in px, on the board."""
        # A joint cannot jump to another velocity: three steps are averaged, hence two more.
        shape = len(start), horizon + 1
        velocity = self._strokes(shape, generator, start.device)
        start = start[:, None]
        moved = start + velocity.cumsum(1)
        path = torch.cat([start, moved], dim=1)
        # The edges are mirrors: fold the unbounded path back onto the board.
        inner = BOARD - 2 * MARGIN
        folded = inner - (path - MARGIN).remainder(2 * inner)
        path = BOARD - MARGIN - folded.abs()
        return path.unfold(1, 3, 1).mean(-1)

    def _strokes(self, shape, generator, device):
        """Velocities (B,steps,2) in px a step, strokes as in self.motion; shape: (B,steps)."""
        motion = self.motion
        options = dict(generator=generator, device=device)
        begins, kind, push, travel, reverses = torch.rand(5, *shape, **options)
        begins = begins < 1 / motion.stroke_steps
        begins[:, 0] = True

        low, high = motion.push_speed
        push = low * (high / low) ** push
        low, high = motion.travel_speed
        travel = low + (high - low) * travel
        speed = torch.where(kind < motion.stand_share + motion.push_share, push, travel)
        speed[kind < motion.stand_share] = 0.0

        turn = motion.turn * torch.randn(shape, **options)
        turn = torch.where(reverses < motion.reversal_share, math.pi, turn)
        bend = motion.bend * torch.randn(shape, **options)
        first_heading = math.tau * torch.rand(shape, **options)[:, :1]

        # At each step, the index of the step at which its stroke began: speed and bend hold since.
        step = torch.arange(shape[1], device=device)
        began = torch.where(begins, step, 0).cummax(1).values
        speed = speed.gather(1, began)
        bend = bend.gather(1, began)
        change = torch.where(begins, turn, bend)
        heading = first_heading + change.cumsum(1)
        return speed[..., None] * unit(heading)


# The lesson ------------------------------------------------------------------------------------

def lesson(out):
    """Print shapes, a check of the Jacobian and the motion's speeds; save out/kinematics.png."""
    import matplotlib.pyplot as plt

    arm = PlanarArm()
    start = time.perf_counter()
    angles, positions = arm.sample_windows(20_000, 16, torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - start
    print("1. Angles in rad:", angles.shape)
    print("   Positions in px:", positions.shape)
    print("   Windows a second:", 20_000 // seconds)

    pose = angles[0, 0]
    print("2. Jacobian in px per rad:", arm.jacobian(pose))
    print("   by automatic differentiation:", torch.func.jacrev(arm.forward)(pose))

    velocity = positions.diff(dim=1)
    speed = velocity.norm(dim=-1).flatten()
    print("3. Median speed in px a step:", speed.median())

    figure = plt.figure(figsize=(12, 5.5), layout="constrained")
    board, speeds = figure.subplots(1, 2)
    board.plot(*positions[:80].numpy().T)
    poses = arm.joints(angles[:5, 0]).numpy()
    board.plot(*poses.T, "o-", lw=3)
    board.set_title("80 windows of 16 steps and five poses, px")
    board.set(xlim=(0, BOARD), ylim=(BOARD, 0), aspect="equal")
    speeds.hist(speed, range(31))
    speeds.set_title("speed, px a step (10 Hz)")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "kinematics.png", dpi=100)
    print("Picture:", out / "kinematics.png")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # needs no display
    lesson(Path("runs/lessons"))
