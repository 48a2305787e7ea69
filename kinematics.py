"""A robot arm in a plane and its endless random motion: the training data of stage 1.

Implements section IV-A of the paper (arXiv 2511.12101): pairs of joint angles and the positions of
the end effector, the tip of the arm, that forward kinematics computes from these angles. Nothing is
observed: there is no camera and no block. The paper takes the angles of a 7-joint Franka arm from
recorded demonstrations. Here an arm of three links moves at random over the PushT board.

The speeds and turns of this motion imitate how targets move in PushT. But it does not matter much
which motion it is: two quite different ones were as good (MOTIONS, and in results/ the answer to
"Is free data good enough?").

The paper's chain of modified Denavit-Hartenberg transforms (Eq. 5-7) becomes two sums in a plane.
The direction of a link is the sum of all joint angles up to it, and the position of the tip is the
sum of all links.

`python kinematics.py` checks the Jacobian, measures windows per second and saves a picture.
"""
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BOARD = 512.0     # px, the side of the square over which the arm moves: PushT's board
MARGIN = 8.0      # px, planned paths keep this far from the edges: the arm follows them inexactly
DAMPING = 30.0    # px per rad, see `joint_step`; 99 % of the Jacobian's singular values exceed 100


@dataclass(frozen=True)
class Motion:
    """How the end effector moves: a row of strokes, at 10 steps a second.

    A stroke is a piece of the path at one speed, on a straight line or a wide arc. There are three
    kinds, as in PushT: the agent waits, pushes the block slowly, or travels fast around it.
    """
    stroke_steps: float = 8.0        # mean number of steps until a new stroke begins
    stand_share: float = 0.1         # share of the strokes that stand still
    push_share: float = 0.45         # share of the strokes that push; the rest travel
    push_speed: tuple = (1.0, 6.0)   # px a step, log-uniform: slow pushes, the precise ones, often
    travel_speed: tuple = (8.0, 18.0)    # px a step, uniform
    reversal_share: float = 0.15     # share of the strokes that begin with a turn of 180 degrees
    turn: float = 0.9                # rad, standard deviation of the turn before the other strokes
    bend: float = 0.1                # rad a step, standard deviation of a stroke's turn per step


# "fast" and "smooth" do not imitate PushT. Stage 1 with them was as good.
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
    """N rigid links in a row on a fixed base; joint n turns link n and all links after it.

    link_lengths: N lengths in px.
    base: position (x, y) of joint 1 in px, in PushT's frame: x right, y down. The default base is
        above the board's upper edge, and the arm reaches every point of the board.
    motion: the Motion of `sample_windows`.
    joint_limits (attribute): N pairs (low, high) in rad. Joint 1 turns 90 degrees to both sides of
        the direction to the board's centre, the other joints 150 degrees to both sides.

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
        hole = max(0.0, 2 * max(link_lengths) - reach)    # the folded arm cannot come nearer
        if furthest > reach or nearest < hole:
            raise ValueError(f"the board lies {nearest:.0f} to {furthest:.0f} px from the base, "
                             f"but the arm reaches {hole:.0f} to {reach:.0f} px")

    def joints(self, angles):
        """Angles (...,N) in rad -> positions (...,N+1,2) in px: of all joints and the end effector.

        The first is the base. Raises ValueError if the last dimension is not N.
        """
        like_angles = dict(dtype=angles.dtype, device=angles.device)
        lengths = torch.tensor(self.link_lengths, **like_angles)
        if angles.shape[-1] != len(lengths):
            raise ValueError(f"angles must end in {len(lengths)} joints, "
                             f"got shape {tuple(angles.shape)}")
        heading = angles.cumsum(-1)    # TRAP: a joint angle counts from the link before it
        links = unit(heading) * lengths[:, None]
        base = torch.tensor(self.base, **like_angles).expand_as(links[..., :1, :])
        return torch.cat([base, links], -2).cumsum(-2)

    def forward(self, angles):
        """Forward kinematics: angles (...,N) in rad -> end-effector positions (...,2) in px."""
        return self.joints(angles)[..., -1, :]

    def jacobian(self, angles):
        """d position / d angle at angles (...,N): (...,2,N) in px per rad.

        When joint n turns, the end effector moves on a circle around it: at right angles to the
        arrow from joint n to the end effector, and as many px per rad as the arrow is long.
        """
        joints = self.joints(angles)
        end_effector = joints[..., -1:, :]
        arrow = end_effector - joints[..., :-1, :]    # (...,N,2)
        x, y = arrow.unbind(-1)
        return torch.stack([-y, x], dim=-2)

    def joint_step(self, angles, displacement):
        """The joint motion (B,N) in rad that moves the end effector by displacement (B,2) in px.

        Many joint motions do so. The smallest is J^+ displacement with the pseudo-inverse
        J^+ = J^T (J J^T)^-1 of the Jacobian J. But a stretched arm cannot move along itself: there
        J J^T has no inverse, and near there the joints would move too fast. Damping prevents this:
        J^T (J J^T + DAMPING^2 I)^-1 (Nakamura & Hanafusa 1986). The price is that the end effector
        moves a little less far than asked.
        """
        jacobian = self.jacobian(angles)
        damping = DAMPING ** 2 * torch.eye(2, device=angles.device)
        square = jacobian @ jacobian.mT + damping
        pull = torch.linalg.solve(square, displacement[..., None])
        step = jacobian.mT @ pull
        return step[..., 0]

    def inverse(self, positions, wrist=0.6):
        """Inverse kinematics of three links: positions (...,2) in px -> angles (...,3) in rad.

        Joints 1, 2 and 3 are called shoulder, elbow and wrist, as in a human arm. Many poses reach
        a point; two choices select one of them:
        - The wrist stays at the angle `wrist` in rad. Links 2 and 3 are then one rigid forearm.
        - The forearm turns away from the upper arm (link 1) by a negative angle. On the board,
          where y points down, this is counter-clockwise. The other sign gives a mirrored pose.
        Nearby points get nearby poses. The joint limits are not checked.
        """
        upper, middle, hand = self.link_lengths
        along = middle + hand * math.cos(wrist)    # the forearm, seen from link 2
        across = hand * math.sin(wrist)
        forearm = math.hypot(along, across)
        offset = positions - positions.new_tensor(self.base)
        x, y = offset.unbind(-1)
        distance = offset.norm(dim=-1)
        # The law of cosines in the triangle of base, elbow and end effector.
        excess = distance ** 2 - upper ** 2 - forearm ** 2
        cosine = excess / (2 * upper * forearm)
        elbow = -cosine.clamp(-1, 1).acos()    # TRAP: plus is right, too, but it is the other pose
        ahead = upper + forearm * elbow.cos()
        shift = torch.atan2(forearm * elbow.sin(), ahead)
        shoulder = torch.atan2(y, x) - shift
        bend = elbow - math.atan2(across, along)    # of link 2, not of the whole forearm
        wrist = torch.full_like(bend, wrist)
        return torch.stack([shoulder, bend, wrist], dim=-1)

    def sample_windows(self, batch, horizon, generator=None, device=None):
        """`batch` new windows of random motion over the board; each call draws other ones.

        Returns angles (B,T,N) in rad within joint_limits and positions (B,T,2) in px within
        [0, 512], with positions = forward(angles): T = horizon steps at 10 Hz. Both are made on
        the generator's device, or without a generator on `device`.

        Raises ValueError if batch < 1 or horizon < 2.
        """
        if batch < 1 or horizon < 2:
            raise ValueError(f"batch must be >= 1 and horizon >= 2, got {batch} and {horizon}")
        # About one window of 16 steps in eight meets a joint limit and is dropped. More of the
        # longer ones are, so more windows are drawn than asked for.
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
        """Random poses (count,N) in rad with the end effector on the board: a third of all."""
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
        # If there are too few, some repeat. A loop until there are enough might never end.
        order = torch.arange(count, device=rows.device)
        return rows[order % len(rows)]

    def _paths(self, start, horizon, generator):
        """Planned path of the end effector from start (B,2): (B,horizon,2) in px, on the board."""
        # A joint cannot jump to another velocity. So the path is an average over three steps, which
        # needs two steps more.
        shape = len(start), horizon + 1
        velocity = self._strokes(shape, generator, start.device)
        start = start[:, None]
        moved = start + velocity.cumsum(1)
        path = torch.cat([start, moved], dim=1)
        # The edges act as mirrors: a path that leaves the board is folded back onto it.
        inner = BOARD - 2 * MARGIN
        folded = inner - (path - MARGIN).remainder(2 * inner)
        path = BOARD - MARGIN - folded.abs()
        return path.unfold(1, 3, 1).mean(-1)

    def _strokes(self, shape, generator, device):
        """Velocities (B,steps,2) in px a step of random strokes, see Motion; shape: (B,steps)."""
        motion = self.motion
        options = dict(generator=generator, device=device)
        begins, kind, u_push, u_travel, reverses = torch.rand(5, *shape, **options)
        begins = begins < 1 / motion.stroke_steps
        begins[:, 0] = True

        low, high = motion.push_speed
        push = low * (high / low) ** u_push
        low, high = motion.travel_speed
        travel = low + (high - low) * u_travel
        speed = torch.where(kind < motion.stand_share + motion.push_share, push, travel)
        speed[kind < motion.stand_share] = 0.0

        turn = motion.turn * torch.randn(shape, **options)
        turn = torch.where(reverses < motion.reversal_share, math.pi, turn)
        bend = motion.bend * torch.randn(shape, **options)
        first_heading = math.tau * torch.rand(shape, **options)[:, :1]

        # `began` is at each step the index of the step at which its stroke began. A stroke keeps
        # the speed and the bend that were drawn for that step.
        step = torch.arange(shape[1], device=device)
        began = torch.where(begins, step, 0).cummax(1).values
        speed = speed.gather(1, began)
        bend = bend.gather(1, began)
        change = torch.where(begins, turn, bend)
        heading = first_heading + change.cumsum(1)
        return speed[..., None] * unit(heading)


# The lesson ------------------------------------------------------------------------------------

def lesson(out):
    """Check the Jacobian, compare the motions with PushT's expert; save out/kinematics.png."""
    import matplotlib.pyplot as plt

    arm = PlanarArm()
    start = time.perf_counter()
    angles, positions = arm.sample_windows(20_000, 16, torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - start
    print("1. Free data. Angles in rad:", tuple(angles.shape))
    print("   Positions of the end effector in px:", tuple(positions.shape))
    print(f"   Windows a second: {20_000 / seconds:,.0f}")

    pose = angles[0, 0]
    print("2. Jacobian in px per rad:", arm.jacobian(pose))
    print("   by automatic differentiation:", torch.func.jacrev(arm.forward)(pose))

    figure = plt.figure(figsize=(12, 6.5), layout="constrained")
    board, speeds = figure.subplots(1, 2)
    board.set_title("Free data: the tip of the arm moves over the whole board")
    board.plot(*positions[:100].numpy().T, color="0.6", lw=1)
    board.lines[0].set_label("paths of the tip, 1.6 s each")
    for number, joints in enumerate(arm.joints(angles[:3, 0]).numpy(), start=1):
        board.plot(*joints.T, "o-", lw=3, label=f"the arm, pose {number}")
    board.plot([0, BOARD, BOARD, 0, 0], [0, 0, BOARD, BOARD, 0], "k", lw=1, label="PushT's board")
    board.set(xlabel="x in px", ylabel="y in px, downwards", aspect="equal")
    board.invert_yaxis()
    board.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)

    print("3. Median speed in px a step:")
    for name, motion in MOTIONS.items():
        arm = PlanarArm(motion=motion)
        _, positions = arm.sample_windows(5_000, 16, torch.Generator().manual_seed(0))
        speed = positions.diff(dim=1).norm(dim=-1).flatten().numpy()
        print(f"   {np.median(speed):.1f}  motion {name!r}")
        speeds.hist(speed, range(41), density=True, histtype="step", label=f"motion {name!r}")
    speed = expert_speed()
    print(f"   {np.median(speed):.1f}  targets of PushT's expert")
    speeds.hist(speed, range(41), density=True, color="0.8", label="targets of PushT's expert")
    speeds.set_title("Speed: motion 'arm' imitates PushT's expert,\n"
                     "but stage 1 on the other two was as good")
    speeds.set(xlabel="speed in px a step of 0.1 s", ylabel="share of the steps in each px")
    speeds.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "kinematics.png", dpi=100)
    print("Picture:", out / "kinematics.png")


def expert_speed():
    """How far the target of PushT's scripted expert moves in each step, (steps,) in px."""
    from sim_pusht import expert_demonstrations
    demonstrations = expert_demonstrations(15)
    episodes = np.split(demonstrations["action"], demonstrations["episode_ends"][:-1])
    moves = np.concatenate([np.diff(targets, axis=0) for targets in episodes])
    return np.linalg.norm(moves, axis=1)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"     # needs no display
    lesson(Path("runs/lessons"))
