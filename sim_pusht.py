"""PushT in plain numpy: many environments in one call, no binary dependency.

An agent, which is a disc, pushes a T-shaped block until it covers a drawn goal. Physics, reward,
starts and picture are those of gym-pusht 0.1.8 (pymunk 6, Chipmunk 7), so a policy runs unchanged
in both. The paper (arXiv 2511.12101) only uses this benchmark. You may skip this file: for the rest
of the project it is enough to know what PushT.reset, PushT.step and `play` give.
In order: geometry, physics, environment, picture, expert, demonstrations and lesson.

    python sim_pusht.py          # lesson: the expert in eight scenes; a picture and a GIF
"""
import argparse
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Geometry ----------------------------------------------------------------------------------------
# Frame: 512 x 512 px, x right, y DOWN, angles from x to y. A pose is (x, y, angle): x and y say
# where the origin of the block's own frame is. TRAP: this origin is the middle of the bar's outer
# edge, not the centre of mass.
#
# Inside this file a vector is often one complex number x + iy. Arrays then have one axis less, and
# a turn by an angle is a product with `unit(angle)`.
BOARD = 512.0
MIDDLE, FREE = 255.5, 248.5  # the walls are at MIDDLE +- FREE; they stop the block, not the agent
AGENT_RADIUS = 15.0
GOAL = np.array([256.0, 256.0, np.pi / 4])
AWAY = np.array([256.0, 460.0, np.pi])  # a goal 204 px and 135 degrees from GOAL, near a wall
CORNER = np.array([90.0, 90.0, -np.pi / 4])  # in a corner of the board, 235 px and 90 degrees away
STEM = [[-15.0, 30.0], [15.0, 120.0]]  # the block's two boxes: lowest and highest x, y
BAR = [[-60.0, 0.0], [60.0, 30.0]]
BLOCK_AREA = 6300.0  # px^2
KEYPOINTS = np.array([[-60.0, 0.0], [60.0, 0.0], [60.0, 30.0], [-60.0, 30.0],
                      [-15.0, 30.0], [15.0, 30.0], [15.0, 120.0], [-15.0, 120.0]])
CENTER_OF_MASS = np.array([0.0, 45.0])  # TRAP: the mean of the boxes' centres, as if of one area


def dot(a, b):
    """Scalar product of vectors written as complex numbers."""
    return (a.conj() * b).real


def cross(a, b):
    """z component of the vector product of vectors written as complex numbers."""
    return (a.conj() * b).imag


def as_complex(xy):
    """(..., 2) -> (...) complex."""
    return xy @ [1, 1j]


def as_floats(z):
    """(...) complex -> (..., 2)."""
    return np.asarray(z)[..., None].view(float)


def unit(angle):
    """exp(i angle): the vector of length 1 in this direction, complex."""
    return np.cos(angle) + 1j * np.sin(angle)  # faster than np.exp, most of all in float32


# The same as complex numbers; CORNERS, LOW and HIGH are relative to the centre of mass.
CENTER = 45j
POINTS = as_complex(KEYPOINTS)
CORNERS = POINTS - CENTER
EDGES = POINTS[[1, 2, 3, 0, 5, 6, 7, 4]] - POINTS  # of each box, from a corner to the next one
LOW, HIGH = np.stack([STEM, BAR], 1) - CENTER_OF_MASS  # (box, xy) each, the stem first
REACH = np.abs(CORNERS).max()  # 76.5 px: no part of the block is farther from its centre of mass


def keypoints(pose):
    """Corners of the block on the board: pose (..., 3) -> (..., 8, 2) px, in gym-pusht's order."""
    pose = np.asarray(pose, float)
    origin = as_complex(pose[..., :2])
    return as_floats(origin[..., None] + POINTS * unit(pose[..., 2:]))


def from_legacy(pose):
    """The pose (..., 3) that the block has after gym-pusht was told to set this pose.

    TRAP: they differ. gym-pusht sets the position first, and then turns the block about its centre
    of mass, which moves the origin of its frame.
    """
    pose = np.array(pose, float)
    pose[..., :2] += CENTER_OF_MASS - as_floats(CENTER * unit(pose[..., 2]))
    return pose


def crossing(start, way, low, high):
    """The two times at which start + time * way is low or high, the earlier first; real arrays."""
    way = np.where(np.abs(way) < 1e-300, 1e-300, way)
    a, b = (low - start) / way, (high - start) / way
    return np.minimum(a, b), np.maximum(a, b)


def block_coverage(pose, goal=GOAL):
    """Share of the goal's area that the block covers: pose (..., 3) -> (...) in [0, 1]. Exact.

    It is the sum over the four pairs of a box of the block and a box of the goal. By Green's
    theorem, the area that two boxes share is the integral of h dx along the edges of the first,
    over the width of the second. h is the height of an edge's point over the second box's top,
    clipped to that box. Along an edge, h is linear in three pieces: before, inside and behind the
    box. So the midpoint of each piece gives the exact integral. All is done in the goal's frame.
    """
    pose, goal = np.asarray(pose, float), np.asarray(goal, float)
    turn = unit(pose[..., 2] - goal[2])[..., None, None]
    shift = as_complex(pose[..., :2] - goal[:2]) * unit(-goal[2])
    corner = shift[..., None, None] + POINTS * turn - CENTER  # (..., 1, 8)
    edge = EDGES * turn
    (left, top), (right, bottom) = LOW.T[..., None], HIGH.T[..., None]  # goal's boxes, (2, 1)
    start, end = np.clip(crossing(corner.real, edge.real, left, right), 0, 1)
    enter, leave = np.clip(crossing(corner.imag, edge.imag, top, bottom), start, end)
    area = 0
    for t0, t1 in (start, enter), (enter, leave), (leave, end):
        y = corner.imag + (t0 + t1) / 2 * edge.imag
        area = area + (top - np.clip(y, top, bottom)) * (t1 - t0)
    area = (area * edge.real).sum((-2, -1))
    return np.maximum(area, 0) / BLOCK_AREA


# Physics -----------------------------------------------------------------------------------------
# The step of Chipmunk 7 (cpSpaceStep.c, cpArbiter.c, cpCollision.c), for this one world: an agent
# that no contact stops, a block of two boxes and of mass 1, and four walls. There is no friction
# and no bounce, and the block is stopped before every substep: it moves only while it is pushed.
# Velocities are px or rad per substep, impulses the velocity that they give to the mass of 1.
DT, SUBSTEPS = 0.01, 10  # s; a control step is 0.1 s
STIFFNESS, DAMPING = 100.0, 20.0  # of the agent's PD control, 1/s^2 and 1/s
INERTIA = 3000.0
SLOP = float(np.float32(0.1))  # px by which shapes may overlap (Chipmunk has 0.1f)
BIAS = 1 - float(np.float32(0.9)) ** (60 * DT)  # share of further overlap removed in a substep
SWEEPS = 10  # times that the solver goes through all contacts
PERSISTENCE = 3  # substeps for which a lost contact is remembered

INWARD = np.array([1, 1j, -1, -1j])  # the normals of the walls: left, top, right, bottom
# Each of the four walls may touch each of the block's eight corners: 32 contacts.
WALL_NORMALS = np.repeat(INWARD, 8)[:, None]
WALL_LEVELS = MIDDLE * dot(WALL_NORMALS, 1 + 1j) - FREE  # dot(normal, x) for x on the wall
WALL_ARMS = np.tile(CORNERS, 4)[:, None]


def circle_contacts(agent):
    """Where the agent's circle meets the two boxes; agent (n,): its centre, in the block's frame.

    Returns three (2, n) arrays: the point of each box that is nearest to the centre, the direction
    from the centre to it, and the distance (negative where the centre is inside the box).
    """
    xy = as_floats(agent)
    point = np.minimum(np.maximum(xy, LOW[:, None]), HIGH[:, None]).view(complex)[..., 0]
    normal = point - agent
    distance = np.abs(normal)
    inside = distance == 0
    normal /= distance + inside
    for box, env in zip(*inside.nonzero()):  # here the nearest side of the box counts
        gaps = np.concatenate([xy[env] - LOW[box], HIGH[box] - xy[env]])
        face = gaps.argmin()
        normal[box, env], distance[box, env] = INWARD[face], -gaps[face]
        point[box, env] -= INWARD[face] * gaps[face]
    return point, normal, distance


def agent_contacts(offset, velocity, rotation):
    """The agent's contacts with stem and bar: the first four arguments of `solve_contacts`, (2, n).

    offset (n,): from the block's centre of mass to the agent; velocity (n,): of the agent;
    rotation (n,): exp(i angle) of the block.
    """
    point, normal, distance = circle_contacts(offset * rotation.conj())
    lever = cross(point, normal)
    normal *= rotation
    return normal, lever, AGENT_RADIUS - distance, dot(normal, velocity)


def wall_contacts(center, rotation):
    """The walls' contacts, all five arguments of `solve_contacts`, (32, n)."""
    arm = WALL_ARMS * rotation
    overlap = WALL_LEVELS - dot(WALL_NORMALS, center + arm)
    zero = np.zeros_like(overlap)
    return WALL_NORMALS + zero, cross(arm, WALL_NORMALS), overlap, zero, zero


def push_out(overlap):
    """The speed at which overlapping shapes are moved apart."""
    return BIAS * np.maximum(overlap - SLOP, 0)


def solve_contacts(normal, lever, overlap, speed, pull):
    """Chipmunk's impulse solver: projected Gauss-Seidel, ten sweeps over K contacts. All (K, n).

    A contact touches where overlap >= 0. There the block's point must move along `normal` at least
    as fast as `speed`, by an impulse of at least -pull. `lever` is the torque of a unit impulse.
    A second system with the same matrix moves the shapes apart, see `push_out`.
    Returns the block's velocity (n,), spin (n,) and the impulses (K, n) of the first system.
    """
    solved = np.zeros(overlap.shape)
    touch, every = overlap >= 0, np.arange(overlap.shape[1])
    order = np.argsort(~touch, 0, kind="stable")[:touch.sum(0).max()]  # those that touch
    touch, normal, lever, overlap, speed, pull = (
        values[order, every] for values in (touch, normal, lever, overlap, speed, pull))
    mass = touch / (1 + lever * lever / INERTIA)  # that a contact feels; 0 where it does not touch
    effects = mass * (dot(normal[:, None], normal) + lever[:, None] * lever / INERTIA)
    missing = np.stack([speed, push_out(overlap)], 1) * mass[:, None]  # impulses, of both systems
    lowest = np.stack([-pull, 0 * pull], 1)
    impulse = np.zeros_like(missing)
    for _ in range(SWEEPS):
        for i in range(len(order)):
            change = np.maximum(missing[i], lowest[i] - impulse[i])
            impulse[i] += change
            missing -= effects[i, :, None] * change
    total = impulse.sum(1)
    solved[order, every] = impulse[:, 0]
    return sum(total * normal), sum(total * lever) / INERTIA, solved


class World:
    """B independent worlds of agent, block and walls.

    One thing differs from Chipmunk: the order in which the solver visits the contacts. In Chipmunk
    it depends on earlier substeps; here it is always stem, bar, walls. Away from the walls this
    makes no difference: recorded pushes end where they did, to 1e-12 px. It does make one where
    ten sweeps do not converge:
    - where the block is squeezed between agent and wall: half of 1,320 random pushes into a wall
      end more than 1 px from where they end in Chipmunk;
    - where an episode starts with the agent's centre inside the block, as 3 % of the resets do:
      8 % of such pushes end elsewhere.
    Of 206 human episodes, 205 replay to 0.002 px. One starts with the agent inside the block; it
    replays to 9 px.
    """

    def __init__(self, state):
        """Agents and blocks at rest, (B, 5); Chipmunk finds their contacts once."""
        B = len(state)
        self.agent = as_complex(state[:, :2])
        self.agent_velocity = np.zeros(B, complex)
        self.angle = state[:, 4].copy()
        self.center = as_complex(state[:, 2:4]) + CENTER * unit(self.angle)
        # Of the agent's contacts with stem and bar: the last impulse, and substeps since then.
        self.impulse = np.zeros((2, B))
        self.age = np.full((2, B), PERSISTENCE)
        self._collide()

    def keep(self, mask):
        """Go on with the worlds where mask (B,) is true, drop the others."""
        for name, values in vars(self).items():
            setattr(self, name, values[..., mask])

    def drive(self, target):
        """One control step: the agents head for target (B,) complex."""
        for _ in range(SUBSTEPS):
            gain = STIFFNESS * DT ** 2 * (target - self.agent)
            self.agent_velocity = (1 - DAMPING * DT) * self.agent_velocity + gain
            self.agent = self.agent + self.agent_velocity
            self.center = self.center + self.velocity
            self.angle = self.angle + self.spin
            self._collide()

    def _collide(self):
        """Set the blocks' velocity and spin: what their contacts demand, and nothing else."""
        self.age += 1
        offset = self.agent - self.center
        at_wall = np.abs(as_floats(self.center) - MIDDLE).max(1) >= FREE - REACH
        if np.abs(offset).min() > REACH + AGENT_RADIUS and not at_wall.any():
            self.velocity = np.zeros_like(self.center)
            self.spin = np.zeros_like(self.angle)
            return
        rotation = unit(self.angle)
        contacts = agent_contacts(offset, self.agent_velocity, rotation)
        normal, lever, overlap, speed = contacts
        touch = overlap >= 0
        # A contact that was lost and returns after one or two substeps may take back its last
        # impulse. This is rare, but without it 3 of 33 random pushes end elsewhere.
        pull = self.impulse * (touch & (self.age > 1) & (self.age <= PERSISTENCE))
        # One contact alone needs no sweeps: along the normal the block must not be slower than the
        # agent, and it moves out of the overlap in addition.
        mass = touch / (1 + lever * lever / INERTIA)
        impulse = np.maximum(speed * mass, -pull)
        total = impulse + push_out(overlap) * mass
        self.velocity = (total * normal).sum(0)
        self.spin = (total * lever).sum(0) / INERTIA
        # Where there may be several contacts, solve for all of them together.
        coupled = (touch[0] & touch[1] | at_wall).nonzero()[0]
        if len(coupled):
            walls = wall_contacts(self.center[coupled], rotation[coupled])
            contacts = [np.concatenate([ours[:, coupled], theirs])
                        for ours, theirs in zip([*contacts, pull], walls)]
            self.velocity[coupled], self.spin[coupled], solved = solve_contacts(*contacts)
            impulse[:, coupled] = solved[:2]
        np.copyto(self.impulse, impulse + pull, where=touch)
        self.age *= ~touch


# Environment -------------------------------------------------------------------------------------

def start_full(rng, goal):
    """A start of the benchmark, state (5,): from the same seed gym-pusht 0.1.8 draws the same."""
    agent, block = rng.integers(50, 450, 2), rng.integers(100, 400, 2)
    return np.concatenate([agent, from_legacy([*block, rng.uniform(-np.pi, np.pi)])])


def start_near(rng, goal):
    """A start near the goal, state (5,): the block is within 60 px and 0.75 rad of the goal.

    The agent may be anywhere where it does not touch the block.
    """
    outside = True
    while outside:  # a part of the block is behind a wall
        radius, direction = 60 * np.sqrt(rng.uniform()), 2 * np.pi * rng.uniform()
        offset = as_floats(radius * unit(direction))
        pose = goal + [*offset, rng.uniform(-0.75, 0.75)]
        outside = np.abs(keypoints(pose) - MIDDLE).max() > FREE
    agents = rng.uniform(50, 450, (32, 2))  # with probability 1 - 1e-30, one or more are free
    local = as_complex(agents - pose[:2]) * unit(-pose[2]) - CENTER
    free = (circle_contacts(local)[2] > AGENT_RADIUS).all(0)
    return np.concatenate([agents[free.argmax()], pose])


# A task is a function that draws the starts, and a goal.
TASKS = {"full": (start_full, GOAL), "near": (start_near, GOAL), "away": (start_full, AWAY),
         "corner": (start_full, CORNER)}
OBSERVATIONS = "state", "pixels"


def observe(states, observation, goal=GOAL):
    """What a policy sees of the last states (B, To, 5), the newest last.

    "state": these states. "pixels": a dict of the newest picture, pixels (B, 96, 96, 3) uint8, and
    the agent's last positions, agent_pos (B, To, 2) px. "state-and-goal": the states with the
    goal's pose behind each, (B, To, 8), for a policy that knows several goals.
    """
    if observation == "state-and-goal":
        goals = np.broadcast_to(goal, (*states.shape[:-1], 3))
        return np.concatenate([states, goals], -1)
    if observation == "pixels":
        return {"pixels": draw_states(states[:, -1], goal=goal), "agent_pos": states[..., :2]}
    return states


class PushT:
    """B environments in one. The results of one do not depend on the others.

    task: a key of TASKS; "full" is the benchmark. observation: "state" (B, 5), see `state`, or
    "pixels", which is gym-pusht's pixels_agent_pos, see `observe`. max_steps: the step after which
    `step` says truncated. Raises ValueError for other choices, and for states and actions of
    another shape or with NaN or infinity.
    """

    def __init__(self, num_envs=1, task="full", success_threshold=0.95, max_steps=300,
                 observation="state"):
        choices = ("task", task, TASKS), ("observation", observation, OBSERVATIONS)
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
        self.start, self.goal = TASKS[task]
        self.num_envs, self.observation = num_envs, observation
        self.success_threshold, self.max_steps = success_threshold, max_steps
        self.reset(0)

    def reset(self, seed=0):
        """Start environment i with the seed seed + i, or seed[i]; returns the observation."""
        seeds = seed + np.arange(self.num_envs) if np.ndim(seed) == 0 else seed
        return self.set_state([self.start(np.random.default_rng(int(seed)), self.goal)
                               for seed in seeds])

    def set_state(self, state):
        """Set exactly this state (B, 5), see `state`; nothing moves. Returns the observation."""
        self._world = World(self._checked("state", state, 5))
        self.steps = np.zeros(self.num_envs, int)
        self.max_coverage = np.zeros(self.num_envs)
        self._coverage = block_coverage(self.block_pose(), self.goal)
        return self.observe()

    def step(self, actions):
        """One control step of 0.1 s; actions (B, 2): the agents' targets in px.

        Returns observation, reward (B,) = min(coverage / threshold, 1), terminated (B,), which is
        coverage > threshold, truncated (B,), and info: coverage, max_coverage of all steps since
        the start, is_success. No environment is reset: the caller does that.
        """
        self._world.drive(as_complex(self._checked("actions", actions, 2)))
        self._coverage = block_coverage(self.block_pose(), self.goal)
        self.steps += 1
        self.max_coverage = np.maximum(self.max_coverage, self._coverage)
        terminated = self._coverage > self.success_threshold
        reward = np.minimum(self._coverage / self.success_threshold, 1)
        info = {"coverage": self.coverage(), "max_coverage": self.max_coverage,
                "is_success": terminated}
        return self.observe(), reward, terminated, self.steps >= self.max_steps, info

    def _checked(self, name, values, width):
        values, shape = np.array(values, float), (self.num_envs, width)
        if values.shape != shape:
            raise ValueError(f"{name} has shape {values.shape}; expected {shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite numbers of shape {shape}; "
                             "it holds NaN or infinity")
        return values

    def state(self):
        """(B, 5): agent x and y in px, block x and y in px, block angle in rad, in [0, 2 pi)."""
        state = np.concatenate([as_floats(self._world.agent), self.block_pose()], 1)
        state[:, 4] %= 2 * np.pi
        return state

    def block_pose(self):
        """(B, 3): x and y in px and angle in rad of the block; the angle may be any number."""
        center, angle = self._world.center, self._world.angle
        origin = as_floats(center - CENTER * unit(angle))
        return np.concatenate([origin, angle[:, None]], 1)

    def coverage(self):
        """(B,) share of the goal that the block covers now."""
        return self._coverage.copy()

    def observe(self):
        """The present observation, of the kind that was chosen at construction."""
        seen = observe(self.state()[:, None], self.observation, self.goal)
        if self.observation == "pixels":
            return seen | {"agent_pos": seen["agent_pos"][:, 0]}
        return seen[:, 0]

    def render(self, size=96):
        """Pictures of all environments, (B, size, size, 3) uint8."""
        return draw_states(self.state(), size, self.goal)

    def keep(self, mask):
        """Go on with the environments where mask (B,) is true, drop the others."""
        self._world.keep(mask)
        self._coverage = self._coverage[mask]
        self.steps = self.steps[mask]
        self.max_coverage = self.max_coverage[mask]
        self.num_envs = len(self.steps)


def play(env, act, history=1):
    """Let a policy act in all environments at once, each until success or for env.max_steps.

    act: a function from the last states (B, history, 5), the oldest first, to the next targets
    (B, K, 2) in px; all K are carried out. The first state is the one in which `env` is. As there
    are no states before it, it is repeated in their place.

    Success means coverage > env.success_threshold after an action. A block that covers the goal
    before the first action is no success, and this coverage is not counted.

    Returns a dict of arrays: length (B,), control steps until the first success or the end;
    final_coverage (B,) after them; max_coverage (B,), the largest until then, the start included;
    and states (longest + 1, B, 5).
    """
    before = env.coverage()
    states, coverage = [env.state()], [before * (before <= env.success_threshold)]
    with tqdm(total=env.max_steps, desc="playing", mininterval=1, leave=False) as bar:
        success = np.zeros(env.num_envs, bool)
        while len(states) <= env.max_steps and not success.all():
            past = (states[:1] * history + states)[-history:]
            chunk = act(np.stack(past, 1)).swapaxes(0, 1)
            chunk = chunk[:env.max_steps + 1 - len(states)]
            for targets in chunk:
                env.step(targets)
                states.append(env.state())
                coverage.append(env.coverage())
            success = env.max_coverage > env.success_threshold
            bar.set_postfix(success=f"{success.mean():.2f}", refresh=False)
            bar.update(len(chunk))
    coverage, every = np.stack(coverage), np.arange(env.num_envs)
    first_success = (coverage > env.success_threshold).argmax(0)
    length = np.where(success, first_success, len(coverage) - 1)
    return {"max_coverage": np.maximum.accumulate(coverage)[length, every],
            "final_coverage": coverage[length, every], "length": length,
            "states": np.stack(states)}


# Picture -----------------------------------------------------------------------------------------
# gym-pusht's colours. A canvas holds numbers of this table.
BACKGROUND, TARGET, FILL, EDGE, AGENT, RIM, WALL = range(7)
COLORS = np.float32([(255, 255, 255), (144, 238, 144), (143, 163, 184), (119, 136, 153),
                     (78, 126, 255), (65, 105, 225), (211, 211, 211)])


@lru_cache(maxsize=4)  # one for each size and goal
class Painter:
    """Draws states as gym-pusht does: on a canvas of 512 px that is then made smaller, bilinearly.

    Each row of the small picture is a mean of two rows of the large one, called its taps. The same
    holds for columns. So only the taps are drawn: a canvas has 2 size x 2 size pixels. Walls and
    goal are the same in all pictures; only pixels that a state changes are computed anew.
    """

    def __init__(self, size, goal):
        self.size = size
        place = (np.arange(size) + 0.5) * BOARD / size - 0.5  # of each row in the large picture
        first = np.clip(np.floor(place), 0, BOARD - 2)
        share = np.clip(place - first, 0, 1)
        self.taps = np.stack([first, first + 1], 1).ravel()
        self.shares = np.stack([1 - share, share], 1).astype(np.float32)
        depth = np.abs(self.taps - MIDDLE) - FREE
        depth = np.maximum(depth, depth[:, None])
        self.free = (depth < 0) | (depth > 4)
        self.background = np.where(self.free, BACKGROUND, WALL).astype(np.uint8)
        self.draw_block(self.background, np.array(goal), 0.5, TARGET, TARGET)
        self.picture = np.zeros((size, size, 3), np.uint8)
        self.resample(self.background[None], self.picture[None], np.ones((1, size, size), bool))

    def draw(self, states):
        """(B, 5) states -> (B, size, size, 3) uint8."""
        canvas = np.repeat(self.background[None], len(states), 0)
        pictures = np.repeat(self.picture[None], len(states), 0)
        for state, part in zip(states, canvas):
            self.draw_block(part, state[2:], 2.5, FILL, EDGE)
            self.draw_agent(part, state[:2])
        changed = canvas != self.background
        changed = changed[:, ::2] | changed[:, 1::2]
        self.resample(canvas, pictures, changed[:, :, ::2] | changed[:, :, 1::2])
        return pictures

    def resample(self, canvas, pictures, chosen):
        """Set the chosen pixels (B, size, size) to the weighted mean of their four taps."""
        index, row, column = np.unravel_index(np.flatnonzero(chosen), chosen.shape)
        taps = canvas.reshape(-1, self.size, 2, self.size, 2)[index, row, :, column]
        weights = self.shares[row][:, :, None] * self.shares[column][:, None]
        pictures[index, row, column] = np.einsum("pij,pijc->pc", weights, COLORS[taps]) + 0.5

    def window(self, center, extent):
        """The taps up to extent px from a point (2,): a slice, and their places, complex."""
        corners = center - extent, center + extent
        (left, top), (right, bottom) = np.searchsorted(self.taps, corners)
        place = self.taps[left:right] + 1j * self.taps[top:bottom, None]
        return np.s_[top:bottom, left:right], place

    def fill(self, canvas, part, mask, color):
        canvas[part][mask & self.free[part]] = color

    def draw_block(self, canvas, pose, border, inner, edge):
        """Draw the T at pose (3,), its edge 2 border px wide; inner, edge: numbers of colours."""
        part, place = self.window(keypoints(pose).mean(0), REACH + 2 * border)
        place = (place - as_complex(pose[:2])) * unit(-pose[2])
        across = np.abs(place.real)
        for (_, top), (half, bottom) in BAR, STEM:
            along = np.abs(place.imag - (top + bottom) / 2)
            for color, grown in (edge, border), (inner, -border):
                mask = (across <= half + grown) & (along <= (bottom - top) / 2 + grown)
                self.fill(canvas, part, mask, color)

    def draw_agent(self, canvas, center):
        part, place = self.window(center, AGENT_RADIUS + 1)
        distance = np.abs(place - as_complex(np.rint(center)))
        self.fill(canvas, part, distance <= AGENT_RADIUS, RIM)
        self.fill(canvas, part, distance <= AGENT_RADIUS - 4, AGENT)


def draw_states(states, size=96, goal=GOAL):
    """Pictures of states (..., 5) as gym-pusht draws them: (..., size, size, 3) uint8 RGB."""
    states = np.asarray(states, float)
    painter = Painter(size, tuple(goal))
    images = painter.draw(states.reshape(-1, 5))
    return images.reshape(*states.shape[:-1], size, size, 3)


def draw_rollouts(states, lengths, picture_file, animation_file, goal=GOAL):
    """Save the first eight rollouts as a picture (.png) of their ends, and as a film (.gif).

    states (steps + 1, B, 5); lengths (B,): the number of steps of each rollout that count.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    lengths = np.minimum(lengths[:8], len(states) - 1)
    times = np.arange(lengths.max() + 1)[:, None]
    states = states[np.minimum(times, lengths), np.arange(len(lengths))]  # each waits at its end
    coverage = block_coverage(states[-1, :, 2:], goal)
    figure = Figure(figsize=(8, 4.8))
    figure.subplots_adjust(0.01, 0.08, 0.99, 0.87, 0.04, 0.12)
    figure.suptitle("The end of each rollout: the block should cover the goal", fontsize=10)
    axes = figure.subplots(2, 4).ravel()
    images = []
    for axis in axes:
        axis.set_axis_off()
    for i, picture in enumerate(draw_states(states[-1], 192, goal)):
        images.append(axes[i].imshow(picture, extent=(0, BOARD, BOARD, 0)))
        start = keypoints(states[0, i, 2:])[[0, 1, 2, 5, 6, 7, 4, 3, 0]]
        axes[i].plot(*start.T, "k:", linewidth=1, label="block at the start")
        axes[i].plot(*states[:lengths[i] + 1, i, :2].T, "tab:orange", linewidth=1,
                     label="way of the agent")
        axes[i].set_title(f"{lengths[i]} steps, coverage {coverage[i]:.2f}", fontsize=8)
    for color, name in (FILL, "block"), (TARGET, "goal"), (AGENT, "agent"):
        axes[0].plot([], [], "s", color=COLORS[color] / 255, label=name)
    labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(*labels, loc="lower center", ncols=5, fontsize=8)
    figure.savefig(picture_file, dpi=120)

    # The film shows the boards alone.
    figure.suptitle("")
    legend.remove()
    for axis in axes:
        axis.set_title("")
        for line in axis.lines:
            line.set_visible(False)

    def show(time):
        for image, picture in zip(images, draw_states(states[time], 192, goal)):
            image.set_data(picture)
    times = [*range(0, len(states), 3), *[-1] * 5]  # the end stays for a while
    FuncAnimation(figure, show, times).save(animation_file, PillowWriter(fps=10), dpi=60)


# Expert ------------------------------------------------------------------------------------------
# The expert plans one or two pushes and begins with the first. Its words, in the block's own frame:
#   contact   one of K = 24 places from which the agent pushes. There its disc touches the outline
#             at a point, and it pushes along the inward normal of this point.
#   waiting   the place CLEARANCE px outside of a contact, from which the agent comes to it.
#   lane      the strip between the two. An agent that is in it pushes.
#   ring      six places around the block, one at each outward corner. Where the block is in the
#             straight way to a contact, the agent goes along the ring.
#
# Where a push ends is known without simulation. There is no friction, so the block moves only while
# it is pushed. A push at point r along the normal n turns the block about a fixed point of it, the
# pivot. This is INERTIA / torque px from the centre of mass, with torque = r x n, and each px of
# push turns the block by torque / (INERTIA + torque^2) rad. (Plans ignore the walls.)

# The cost of a plan is in px: the RMS distance that the block's corners keep from the goal's, and
# the effort. Effort counts little near the goal, or the expert would not make the last corrections;
# it counts fully from FAR px on. Travel costs much, so that the expert stays at one face of the
# block for long. A policy then has fewer decisions to make.
TRAVEL_COST, LENGTH_COST, PUSH_COST = 0.15, 0.05, 2.0  # per px of way, per px of push, per push
FAR, NEAREST_SHARE, TOLERANCE = 40.0, 0.05, 0.3  # px; share of the effort at the goal; px
# The target lies this many px ahead of the agent: low + slope * distance to the goal, at most high.
# The agent covers half of that in a step. Near the goal it is slow, because a policy sees the block
# only every 8 steps.
PUSH_AHEAD, TRAVEL_AHEAD = (3.0, 0.3, 16.0), (20.0, 0.2, 30.0)
CLEARANCE = 10.0  # px between agent and block while travelling, for small errors must not move it
TRAVEL_RADIUS = AGENT_RADIUS + CLEARANCE
FORBIDDEN = 1e4  # px, the cost of a way that cannot be taken
# For demonstrations. NOISE: standard deviations in px, each for a third of the episodes.
NOISE, STOP_COVERAGE = (0.0, 0.8, 1.5), 0.965
CLOSE_SHARE = 0.3  # share of the episodes that start close to the goal
WIDE_SHARE = 0.25  # share of the near task's episodes that start anywhere


def expert_demonstrations(count, task="full", seed=0):
    """Let the expert play until `count` episodes have reached STOP_COVERAGE.

    The recorded action is the expert's. The executed action is that plus noise in two episodes of
    three, and the noise of one step resembles that of the step before. So the demonstrations show
    how to recover from errors (DART, arXiv 1703.09327). CLOSE_SHARE of the episodes start closer to
    the goal, where success is decided. An episode that fails is replaced by a new one.

    Returns a dict of state (N, 5) float32, action (N, 2) float32, the target in px chosen in that
    state, and episode_ends (count,) int64.
    """
    rng = np.random.default_rng([seed, 1])  # reset has other streams: its scenes are for evaluation
    episodes = []
    with tqdm(total=count, desc="demonstrations", mininterval=1, disable=count < 20) as bar:
        while len(episodes) < count:
            number = count - len(episodes)
            env = PushT(number, task)
            state, alive = env.set_state(_starts(rng, number, task)), np.arange(number)
            size = rng.permutation(np.resize(NOISE, number))[:, None]
            noise = np.zeros((number, 2))
            states = np.zeros((number, env.max_steps, 5), np.float32)
            actions = np.zeros((number, env.max_steps, 2), np.float32)
            lengths = np.zeros(number, int)  # stays 0 where the episode fails
            for step in range(env.max_steps):
                action = expert_action(state, env.goal)
                states[alive, step] = state
                actions[alive, step] = action
                # The state with the success is recorded, too.
                done = env.max_coverage > STOP_COVERAGE
                lengths[alive[done]] = step + 1
                bar.update(int(done.sum()))
                noise = 0.8 * noise + 0.6 * size[alive] * rng.standard_normal(noise.shape)
                action = np.clip(action + noise, 0, BOARD)[~done]
                alive, noise = alive[~done], noise[~done]
                env.keep(~done)
                if not len(alive):
                    break
                state = env.step(action)[0]
            for i in np.flatnonzero(lengths):
                episodes.append((states[i, :lengths[i]], actions[i, :lengths[i]]))
    states, actions = zip(*episodes)
    return {"state": np.concatenate(states), "action": np.concatenate(actions),
            "episode_ends": np.cumsum([len(episode) for episode in states])}


def _starts(rng, number, task):
    """States (number, 5) from which the expert plays, some of them closer to the goal."""
    law, goal = TASKS[task]
    start = np.array([law(rng, goal) for _ in range(number)])
    if law is start_near:  # a policy that pushes the block too far must find the way back
        for i in np.flatnonzero(rng.random(number) < WIDE_SHARE):
            start[i] = start_full(rng, goal)
    for i in np.flatnonzero(rng.random(number) < CLOSE_SHARE):
        start[i] = start_near(rng, goal)
        nearer = np.exp(rng.uniform(np.log(0.08), 0))  # the block, and the agent with it
        move = (nearer - 1) * (start[i, 2:] - goal)
        start[i, :2] += move[:2]
        start[i, 2:] += move
    return start


def expert_action(state, goal=GOAL):
    """The expert's action, a target for the agent: (B, 5) state -> (B, 2) px.

    It depends on nothing but the state, because a policy sees nothing but the state: the pushes are
    planned anew in every step. If the agent is in the lane of the first push, the target lies ahead
    along this push. Otherwise it lies on the way around the block to the waiting place.
    """
    state = np.asarray(state, float)
    rotation, goal_rotation = unit(state[:, 4]), unit(goal[2])
    center = as_complex(state[:, 2:4]) + rotation * CENTER
    agent = (as_complex(state[:, :2]) - center) / rotation  # in the block's frame
    error = (center - complex(*goal[:2])) / goal_rotation - CENTER
    turn = rotation / goal_rotation
    distance = _distance(error, turn)
    # The way to each contact. Contacts and places of the ring beyond the board's edge are closed.
    places = center[:, None] + rotation[:, None] * np.concatenate([RING, CONTACTS])
    off_board = np.abs(as_floats(places) - BOARD / 2).max(-1) > 253
    closed_ring, closed = np.split(FORBIDDEN * off_board, [6], 1)
    start = _outside(agent)
    ways = _ways(start, closed_ring)
    way = np.abs(start - agent)[:, None] + np.minimum(*ways[:2]) + CLEARANCE
    # Is the agent in a lane? gap: px left to the contact; aside: px off the line.
    offset = agent[:, None] - CONTACTS
    gap, aside = -dot(NORMALS, offset), np.abs(cross(NORMALS, offset))
    in_lane = (gap > -4) & (gap < CLEARANCE + 1) & (aside < 4 + 0.6 * np.maximum(gap, 0))
    travel = np.where(in_lane, np.abs(gap) + aside, way) + closed

    # The plan only chooses a contact: single precision is enough. It is made for a few states at a
    # time, whose tables fit into the processor's cache. Together this is 8 times faster.
    plan = error.astype(np.complex64), turn.astype(np.complex64), travel.astype(np.float32)
    k = np.concatenate([_plan(*(values[first:first + 128] for values in plan))
                        for first in range(0, len(state), 128)])
    in_lane, gap, aside, way = (
        values[np.arange(len(k)), k] for values in (in_lane, gap, aside, way))
    push_ahead, travel_ahead = (np.minimum(low + slope * distance, high)
                                for low, slope, high in (PUSH_AHEAD, TRAVEL_AHEAD))
    # Push less far where the agent does not touch the block yet, or is off the line.
    depth = push_ahead - 0.5 * np.maximum(gap, 0) - aside
    push = CONTACTS[k] + depth * np.where(depth > 0, ADVANCES[k], NORMALS[k])
    ahead = np.minimum(travel_ahead, push_ahead + 0.5 * way)  # slower on arrival
    target = np.where(in_lane, push, _target_on_way(agent, start, k, ways, ahead))
    return np.clip(as_floats(center + rotation * target), 0, BOARD)


def _plan(error, turn, travel):
    """The contact (B,) with which the best plan of one or two pushes begins.

    Where the block is, in the goal's frame: error (B,), complex, from the goal's centre of mass to
    the block's in px; turn (B,), exp(i angle). travel (B, K): px from the agent to each contact.
    """
    share = np.clip(_distance(error, turn) / FAR, NEAREST_SHARE, 1)[:, None, None]
    error, turn = error[:, None, None], turn[:, None, None]  # (B, first contact, second contact)
    rate, pivot = PLAN_RATES[:, None], error + turn * PLAN_PIVOTS[:, None]
    first = _best_turn(error, turn, pivot, rate)  # the best if no other push followed
    pivot2, second, end, end_turn = _two_pushes(error, turn, pivot, first)
    # Improve both angles together by one Gauss-Newton step, which is exact for short pushes.
    # slope, slope2: derivatives of half the squared distance; a, b, c: second ones, approximately.
    arm, arm2 = end - pivot, end - pivot2
    slope = cross(arm, end) + SPREAD * end_turn.imag
    slope2 = cross(arm2, end) + SPREAD * end_turn.imag
    a, b, c = dot(arm, arm) + SPREAD, dot(arm2, arm2) + SPREAD, dot(arm, arm2) + SPREAD
    alone = -slope / a
    both = (c * slope2 - b * slope) / (1.001 * a * b - c * c)  # 1.001: no division by zero
    first = first + np.clip(np.where(second != 0, both, alone), -0.5, 0.5)
    first = np.where(first * rate > 0, first, 0)
    _, second, end, end_turn = _two_pushes(error, turn, pivot, first)
    # The cost of each pair.
    again = (second != 0).astype(np.float32)
    way = travel[:, :, None] + again * PLAN_CHANGES
    length = first / rate + second / PLAN_RATES
    effort = TRAVEL_COST * way + PUSH_COST * (1 + again) + LENGTH_COST * length
    cost = np.hypot(_distance(end, end_turn), TOLERANCE) + share * effort
    cost = np.where(first == 0, np.float32(FORBIDDEN), cost)  # a push of length 0 is no plan
    return cost.min(2).argmin(1)


def _two_pushes(error, turn, pivot, first):
    """Turn the block about `pivot` by `first` rad, and then by the best second push.

    All contacts are tried for the second push, along the last axis. Returns the second pivot and
    angle, and error and turn at the end, see `_plan`.
    """
    turned = unit(first)
    middle = pivot + (error - pivot) * turned
    middle_turn = turn * turned
    pivot2 = middle + middle_turn * PLAN_PIVOTS
    second = _best_turn(middle, middle_turn, pivot2, PLAN_RATES)
    turned2 = unit(second)
    end = pivot2 + (middle - pivot2) * turned2
    return pivot2, second, end, middle_turn * turned2


def _best_turn(error, turn, pivot, rate):
    """The angle psi in rad about the pivot that brings the block nearest to the goal.

    The squared distance is constant - 2 Re(z exp(i psi)) with z as below, so psi = -arg z. It is 0
    where the push, which turns by `rate` rad per px, turns the other way.
    """
    z = SPREAD * turn - np.conj(pivot) * (error - pivot)
    psi = -np.angle(z)
    return np.where(psi / rate > 0.01, psi, 0)  # a push of less than 0.01 px is a rounding error


def _distance(error, turn):
    """RMS distance in px of the block's corners from the goal's; error and turn: see `_plan`."""
    turned = np.maximum(1 - turn.real, 0)  # rounding can make the real part a little more than 1
    return np.sqrt(np.abs(error) ** 2 + 2 * SPREAD * turned)


def _target_on_way(agent, start, k, ways, ahead):
    """The point `ahead` (B,) px along the agent's way to contact k (B,), in the block's frame.

    agent, start (B,): where the agent is, and the nearest place that keeps CLEARANCE; ways: see
    `_ways`. The way is agent, start, places of the ring, waiting place, contact. Its next five
    points are enough; a shorter way repeats one of them.
    """
    rows = np.arange(len(agent))
    direct, by_ring, to_ring, sense = ways
    last = (to_ring.min(1) + LAST_PIECES.T[k]).argmin(1)
    first = to_ring[rows, :, last].argmin(1)
    after = RING[(first + sense[rows, first, last]) % 6]
    straight = direct[rows, k] <= by_ring[rows, k]
    arrives = straight | (first == last)
    line = np.stack([agent, start,
                     np.where(straight, WAITING[k], RING[first]),
                     np.where(arrives, WAITING[k], after),
                     np.where(arrives, CONTACTS[k], after)], 1)
    pieces = np.diff(line, axis=1)
    lengths = np.abs(pieces)
    before = lengths.cumsum(1) - lengths
    done = np.clip((ahead[:, None] - before) / np.maximum(lengths, 1e-9), 0, 1)
    return agent + (done * pieces).sum(1)


def _ways(start, closed=np.zeros(6)):
    """Lengths in px of the ways from start (B,) to the K waiting places.

    closed (B, 6): added cost of the ring's places. Returns four arrays: the straight ways (B, K);
    the ways along the ring (B, K); the ways to each last place of the ring (axis 2) by each first
    place (axis 1), (B, 6, 6); and the sense in which these go around, +1 or -1.
    """
    edges = np.abs(np.roll(RING, -1) - RING) + closed + np.roll(closed, -1, -1)
    total = edges.sum(-1)[..., None, None]
    position = edges.cumsum(-1) - edges
    forward = (position[..., None, :] - position[..., None]) % total
    around = np.minimum(forward, total - forward)
    sense = np.where(forward <= around, 1, -1)
    to_first = _straight(start[:, None], RING) + closed
    to_last = to_first[:, :, None] + around
    by_ring = (to_last.min(1)[:, :, None] + LAST_PIECES).min(1)
    return _straight(start[:, None], WAITING), by_ring, to_last, sense


def _straight(start, end):
    """Lengths of the straight ways from start to end, + FORBIDDEN where the block is in the way."""
    way, blocked = end - start, False
    reach = TRAVEL_RADIUS - 0.01  # a way exactly along the ring is free
    for (left, top), (right, bottom) in zip(LOW - reach, HIGH + reach):
        enter_x, leave_x = crossing(start.real, way.real, left, right)
        enter_y, leave_y = crossing(start.imag, way.imag, top, bottom)
        enter, leave = np.maximum(enter_x, enter_y), np.minimum(leave_x, leave_y)
        blocked |= (enter < leave) & (leave > 0) & (enter < 1)
    return np.abs(way) + FORBIDDEN * blocked


def _outside(points):
    """The nearest places where the agent keeps CLEARANCE from the block, any shape."""
    # The block is symmetric, so only its right half is looked at. notch: the y below which there is
    # only the stem.
    side, x, y = np.where(points.real < 0, -1, 1), np.abs(points.real), points.imag
    (narrow, end), (wide, notch) = HIGH + TRAVEL_RADIUS
    top = LOW[1, 1] - TRAVEL_RADIUS
    inside = (y > top) & (y < end) & (x < np.where(y < notch, wide, narrow))
    exits = np.stack([x + 1j * top,
                      wide + 1j * np.minimum(y, notch),
                      x + 1j * end,
                      np.maximum(x, narrow) + 1j * notch,
                      narrow + 1j * np.maximum(y, notch)])
    nearest = np.abs(exits - (x + 1j * y)).argmin(0)
    exits = np.take_along_axis(exits, nearest[None], 0)[0]
    return np.where(inside, side * exits.real + 1j * exits.imag, points)


# The tables of the expert. A turn by a small angle psi moves the corners by sqrt(SPREAD) psi (RMS).
SPREAD = float(KEYPOINTS.var(0).sum())  # px^2
FACES = [  # first and last point of the outline that is pushed, number of points, inward normal
    (-52, 52, 7, 1j),  # the bar's outer edge
    (-8 + 120j, 8 + 120j, 3, -1j),  # the stem's end
    (60 + 15j, 60 + 15j, 1, -1),  # the bar's ends
    (-60 + 15j, -60 + 15j, 1, 1),
    (52 + 30j, 36 + 30j, 2, -1j),  # the bar's inner edge, beside the stem
    (-52 + 30j, -36 + 30j, 2, -1j),
    (15 + 50j, 15 + 112j, 4, -1),  # the stem's sides
    (-15 + 50j, -15 + 112j, 4, 1)]
DIAGONALS = np.array([-1 - 1j, 1 - 1j, 1 + 1j, 1 + 1j, -1 + 1j, -1 + 1j])
RING = CORNERS[[0, 1, 2, 6, 7, 3]] + TRAVEL_RADIUS * DIAGONALS
# One number for each of the K contacts.
NORMALS = np.concatenate([np.full(number, normal, complex) for _, _, number, normal in FACES])
POINTS_PUSHED = np.concatenate([np.linspace(*face[:3]) for face in FACES]) - CENTER
TORQUES = cross(POINTS_PUSHED, NORMALS)
TORQUES[np.abs(TORQUES) < 0.01] = 0.01  # a push through the centre of mass: a very wide circle
PIVOTS = 1j * NORMALS * INERTIA / TORQUES
RATES = TORQUES / (INERTIA + TORQUES ** 2)  # rad by which the block turns per px of push
CONTACTS = POINTS_PUSHED - AGENT_RADIUS * NORMALS
ADVANCES = 1j * RATES * (CONTACTS - PIVOTS)  # how the contact moves per px of push
WAITING = _outside(CONTACTS - CLEARANCE * NORMALS)
LAST_PIECES = _straight(RING[:, None], WAITING)  # (6, K) px from the ring to the waiting places
CHANGES = 2 * CLEARANCE + np.minimum(*_ways(WAITING)[:2])  # (K, K) px from contact to contact
PLAN_PIVOTS, PLAN_RATES = PIVOTS.astype(np.complex64), RATES.astype(np.float32)
PLAN_CHANGES = CHANGES.astype(np.float32)


# Demonstrations and lesson -----------------------------------------------------------------------

def load_demonstrations(path):
    """Read demonstrations from an .npz file in the layout of the public human data.

    Returns a dict of arrays, all episodes one after another:
    state (N, 5) float32: agent x and y, block x and y in px, block angle in rad;
    action (N, 2) float32: the agent's target in px that was chosen in this state;
    episode_ends (E,) int64: for each episode, the index after its last row.
    The file may hold other kinds of real numbers. Raises ValueError, one line with the path, for
    everything else. Prints a line on stderr if the numbers do not look like px and rad.
    """
    try:
        with np.load(path) as file:     # runs no code from it: allow_pickle is off
            data = {name: file[name] for name in ("state", "action", "episode_ends")}
    except Exception as error:     # a damaged file may raise any kind
        raise ValueError(f"{path} is not a readable .npz file of state, action and episode_ends "
                         f"({error!r:.80}); delete it if train.py made it") from None
    for name, width in ("state", 5), ("action", 2):
        values = data[name]
        if values.dtype.kind not in "fiu" or values.shape[1:] != (width,):
            raise ValueError(f"{path}: {name} is {values.dtype} of shape {values.shape}; expected "
                             f"numbers of shape (N, {width})")
        if not (np.abs(values) < 1e4).all():     # also true for NaN
            raise ValueError(f"{path}: {name} holds NaN, or numbers beyond 10,000 px")
        data[name] = values.astype(np.float32)
    number, ends = len(data["state"]), data["episode_ends"]
    if number != len(data["action"]):
        raise ValueError(f"{path}: {number} states, but {len(data['action'])} actions")
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or len(ends) == 0:
        raise ValueError(f"{path}: episode_ends is {ends.dtype} of shape {ends.shape}; expected "
                         "integers of shape (E,), at least one")
    data["episode_ends"] = ends = ends.astype(np.int64)
    if (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != number:
        raise ValueError(f"{path}: episode_ends must increase and end at {number}, the "
                         f"number of states; they go from {ends[0]} to {ends[-1]}")
    agents, largest = data["state"][:, :2], np.abs(data["state"]).max(0)
    positions, angles = largest[:4].max(), largest[4]
    distance = np.median(np.linalg.norm(data["action"] - agents, axis=1))
    doubts = ((positions <= 1, "no position exceeds 1: are they in px?"),
              (angles > 6 * np.pi, f"the largest angle is {angles:.0f}: are they in rad?"),
              (distance > 100, f"half of the actions lie {distance:.0f} px or more from the agent: "
                               "are they positions in px?"))
    for doubtful, question in doubts:
        if doubtful:
            print(f"{path}: {question}", file=sys.stderr)
            break
    return data


def mirror(demonstrations, goal=GOAL):
    """The demonstrations, followed by their mirror images: twice as many episodes.

    The mirror is the goal's own axis, so a mirrored push to the goal still leads to the goal. Each
    goal in TASKS lies so that the mirror also maps the board onto itself, and the walls to 1 px.
    """
    ends = demonstrations["episode_ends"]
    state, action = (demonstrations[name][:ends[-1]] for name in ("state", "action"))
    middle, turn = as_complex(goal[:2]), unit(2 * goal[2])
    points = as_complex(np.concatenate([state[:, :4], action], 1).reshape(-1, 3, 2))
    agent, block, target = as_floats(middle - turn * (points - middle).conj()).swapaxes(0, 1)
    images = np.concatenate([agent, block, 2 * goal[2] - state[:, 4:]], 1)
    return {"state": np.concatenate([state, images], dtype=np.float32),
            "action": np.concatenate([action, target], dtype=np.float32),
            "episode_ends": np.concatenate([ends, ends[-1] + ends])}


def lesson(folder, task):
    """Let the expert play eight scenes, print what happens, save a picture and a GIF."""
    env = PushT(8, task)
    state = env.reset(0)
    print("Eight scenes. A state is agent x, y, block x, y in px, and the block's angle in rad.")
    print("Scene 0 starts with", state[0].round(2))
    result = play(env, lambda past: expert_action(past[:, -1], env.goal)[:, None])
    states, lengths = result["states"], result["length"]
    print("Share of the goal that the block covers, scene by scene:")
    for step in range(0, len(states), 25):
        now = states[np.minimum(step, lengths), np.arange(8), 2:]
        print(f"step {step:3}", *(f"{share:.2f}" for share in block_coverage(now, env.goal)))
    print("Steps until the success, which is coverage above 0.95, at most 300:", *lengths)
    folder.mkdir(parents=True, exist_ok=True)
    draw_rollouts(states, lengths, folder / "rollouts.png", folder / "rollout.gif", env.goal)
    print("Pictures: rollouts.png and rollout.gif in", folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lesson: the scripted expert plays PushT.")
    parser.add_argument("--task", choices=TASKS, default="full",
                        help="where scenes start, and the goal; default full, the benchmark")
    parser.error = lambda message: parser.exit(2, f"sim_pusht.py: {message}\n")
    options = parser.parse_args()
    os.environ["MPLBACKEND"] = "agg"     # needs no display
    try:
        lesson(Path("runs/lessons/sim_pusht"), options.task)
    except OSError as error:
        parser.error(error)
