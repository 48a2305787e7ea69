"""PushT in plain numpy: many environments in one call, no binary dependency.

A circular agent pushes a T-shaped block into a goal pose. Physics, reward, start law and picture
are those of gym-pusht 0.1.8 (pymunk 6, Chipmunk 7), so a policy runs unchanged in either one. The
paper (arXiv 2511.12101) only uses this benchmark: a reader of the paper may skip this file.
In order: geometry, physics, environment, picture, expert, demonstrations and lesson.

    python sim_pusht.py          # lesson: the expert on a few scenes; a picture and a GIF
    python sim_pusht.py --play FILE.npz   # push the block yourself and record demonstrations
"""
import argparse
import os
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Geometry ----------------------------------------------------------------------------------------
# Frame: 512 x 512 px, x right, y DOWN, angles from x to y. A pose (x, y, angle) places the block's
# local origin, the middle of the bar's outer edge.
#
# Inside this file a vector is often one complex number x + iy: arrays lose an axis, and turning by
# an angle is a product with exp(i angle). `xy @ [1, 1j]` makes it, `as_floats` undoes it.
BOARD = 512.0
MIDDLE, FREE = 255.5, 248.5  # walls stop the block, not the agent; their faces: MIDDLE +- FREE
AGENT_RADIUS = 15.0
GOAL = np.array([256.0, 256.0, np.pi / 4])
AWAY = np.array([256.0, 460.0, np.pi])  # another: 204 px off, 135 degrees on, by the lower wall
STEM = [[-15.0, 30.0], [15.0, 120.0]]  # the block's two boxes, from corner to corner
BAR = [[-60.0, 0.0], [60.0, 30.0]]
BLOCK_AREA = 6300.0  # px^2
KEYPOINTS = np.array([[-60.0, 0.0], [60.0, 0.0], [60.0, 30.0], [-60.0, 30.0],
                      [-15.0, 30.0], [15.0, 30.0], [15.0, 120.0], [-15.0, 120.0]])
CENTER_OF_MASS = np.array([0.0, 45.0])  # the mean of the two boxes' centres, not area-weighted

# The same as complex numbers, and relative to the centre of mass.
CENTER = 45j
POINTS = KEYPOINTS @ [1, 1j]
CORNERS = POINTS - CENTER
EDGES = POINTS[[1, 2, 3, 0, 5, 6, 7, 4]] - POINTS  # of each box, from corner to corner
LOW, HIGH = np.stack([STEM, BAR], 1) - CENTER_OF_MASS  # (box, xy) each
REACH = np.abs(CORNERS).max()  # 76.5 px: no part of the block is farther from its centre of mass


def dot(a, b):
    """Scalar product of vectors written as complex numbers."""
    return (a.conj() * b).real


def cross(a, b):
    """z component of the vector product of vectors written as complex numbers."""
    return (a.conj() * b).imag


def as_floats(z):
    """(...) complex -> (..., 2)."""
    return np.asarray(z)[..., None].view(float)


def keypoints(pose):
    """Corners of the block in the world, (..., 3) pose -> (..., 8, 2) px, gym-pusht's order."""
    pose = np.asarray(pose, float)
    origin = pose[..., :2] @ [1, 1j]
    return as_floats(origin[..., None] + POINTS * np.exp(1j * pose[..., 2:]))


def from_legacy(pose):
    """The pose (..., 3) that gym-pusht's `reset_to_state` leads to; it is not the one asked for.

    The position is set first, and then the block is turned about its centre of mass.
    """
    pose = np.array(pose, float)
    pose[..., :2] += CENTER_OF_MASS - as_floats(CENTER * np.exp(1j * pose[..., 2]))
    return pose


def crossing(start, way, low, high):
    """The two times when start + time * way crosses low and high, the earlier first; all real."""
    way = np.where(np.abs(way) < 1e-300, 1e-300, way)
    a, b = (low - start) / way, (high - start) / way
    return np.minimum(a, b), np.maximum(a, b)


def block_coverage(pose, goal=GOAL):
    """Share of the goal's area that the block covers, (..., 3) pose -> (...) in [0, 1]. Exact.

    Green's theorem for each pair (box of the block, box of the goal), in the goal's frame: the
    area is the integral of the clipped height over the clipped width along the box's edges. A
    clipped height is linear on three pieces of an edge, so the midpoint rule is exact.
    """
    pose, goal = np.asarray(pose, float), np.asarray(goal, float)
    turn = np.exp(1j * (pose[..., 2] - goal[2]))[..., None, None]
    shift = (pose[..., :2] - goal[:2]) @ [1, 1j] * np.exp(-1j * goal[2])
    corner = shift[..., None, None] + POINTS * turn - CENTER  # (..., 1, 8)
    edge = EDGES * turn
    (left, top), (right, bottom) = LOW.T[..., None], HIGH.T[..., None]  # the goal's, (2, 1)
    start, end = np.clip(crossing(corner.real, edge.real, left, right), 0, 1)
    enter, leave = np.clip(crossing(corner.imag, edge.imag, top, bottom), start, end)
    area = 0
    for t0, t1 in (start, enter), (enter, leave), (leave, end):
        y = corner.imag + (t0 + t1) / 2 * edge.imag
        area = area + (top - np.clip(y, top, bottom)) * (t1 - t0)
    area = (area * edge.real).sum((-2, -1))
    return np.maximum(area, 0) / BLOCK_AREA


# Physics -----------------------------------------------------------------------------------------
# Chipmunk 7's step (cpSpaceStep.c, cpArbiter.c, cpCollision.c) for this one world: a circle on
# rails, one free block of two boxes and of mass 1, four walls, no friction, no bounce, and a
# damping that stops the block before every substep: it moves only while it is pushed.
# Velocities are px or rad per substep.
DT, SUBSTEPS = 0.01, 10  # s; a control step is 0.1 s
STIFFNESS, DAMPING = 100.0, 20.0  # of the agent's PD control, 1/s^2 and 1/s
INERTIA = 3000.0
SLOP = float(np.float32(0.1))  # px that shapes may overlap unpunished (Chipmunk: 0.1f)
BIAS = 1 - float(np.float32(0.9)) ** (60 * DT)  # share of more overlap pushed out per substep
SWEEPS = 10  # of the solver over all contacts
PERSISTENCE = 3  # substeps that a lost contact is remembered

INWARD = np.array([1, 1j, -1, -1j])  # the walls' normals: left, top, right, bottom
# Each wall may touch each of the block's eight corners: 32 contacts.
WALL_NORMALS = np.repeat(INWARD, 8)[:, None]
WALL_LEVELS = MIDDLE * dot(WALL_NORMALS, 1 + 1j) - FREE  # normal . x at the wall's face
WALL_ARMS = np.tile(CORNERS, 4)[:, None]


def circle_contacts(agent):
    """Where the circle meets the two boxes; agent (n,) in the block's frame.

    Returns three (2, n) arrays: the boxes' points nearest to the circle's centre, the directions
    from the centre to them, and the distances (negative where the centre is inside a box).
    """
    xy = as_floats(agent)
    point = np.minimum(np.maximum(xy, LOW[:, None]), HIGH[:, None]).view(complex)[..., 0]
    normal = point - agent
    distance = np.abs(normal)
    inside = distance == 0
    normal /= distance + inside
    for box, env in zip(*inside.nonzero()):  # the way out is through the nearest face
        gaps = np.concatenate([xy[env] - LOW[box], HIGH[box] - xy[env]])
        face = gaps.argmin()
        normal[box, env], distance[box, env] = INWARD[face], -gaps[face]
        point[box, env] -= INWARD[face] * gaps[face]
    return point, normal, distance


def agent_contacts(offset, velocity, rotation):
    """The agent's contacts with stem and bar, the first four arguments of `solve_contacts`, (2, n).

    offset (n,): from the block's centre of mass to the agent; velocity (n,): the agent's.
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
    """The speed at which overlapping shapes part."""
    return BIAS * np.maximum(overlap - SLOP, 0)


def solve_contacts(normal, lever, overlap, speed, pull):
    """Chipmunk's impulse solver: ten sweeps of projected Gauss-Seidel over K contacts, all (K, n).

    Contacts with overlap >= 0 touch. Along its normal, each must give the block at least `speed`,
    by an impulse of at least -pull; a second system with the same matrix pushes out the overlap.
    Returns the block's velocity (n,), spin (n,) and the impulses (K, n) of the first system.
    """
    solved = np.zeros(overlap.shape)
    touch, every = overlap >= 0, np.arange(overlap.shape[1])
    order = np.argsort(~touch, 0, kind="stable")[:touch.sum(0).max()]  # without the untouched
    touch, normal, lever, overlap, speed, pull = (
        values[order, every] for values in (touch, normal, lever, overlap, speed, pull))
    mass = touch / (1 + lever * lever / INERTIA)  # that a contact feels; 0 where none is
    effects = mass * (dot(normal[:, None], normal) + lever[:, None] * lever / INERTIA)
    missing = np.stack([speed, push_out(overlap)], 1) * mass[:, None]  # impulses of both systems
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

    Chipmunk visits contacts in an order that its history decides; here it is stem, bar, walls. Away
    from walls recorded pushes end where they did to 1e-12 px. But where a block is squeezed between
    agent and wall, ten sweeps do not converge: half of 1,320 random pushes end more than 1 px
    elsewhere. So do 8 % of the pushes that start with the agent's centre inside the block, as 3 %
    of the resets do. Of 206 human episodes 205 replay to 0.002 px; one that starts so, to 9 px.
    """

    def __init__(self, state):
        """Agents and blocks at rest, (B, 5); Chipmunk finds their contacts once."""
        B = len(state)
        self.agent = state[:, :2] @ [1, 1j]
        self.agent_velocity = np.zeros(B, complex)
        self.angle = state[:, 4].copy()
        self.center = state[:, 2:4] @ [1, 1j] + CENTER * np.exp(1j * self.angle)
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
        rotation = np.exp(1j * self.angle)
        contacts = agent_contacts(offset, self.agent_velocity, rotation)
        normal, lever, overlap, speed = contacts
        touch = overlap >= 0
        # A contact that is back after one or two substeps may take back its last impulse: rare, but
        # without it 3 of 33 random pushes end elsewhere than in Chipmunk.
        pull = self.impulse * (touch & (self.age > 1) & (self.age <= PERSISTENCE))
        # A contact alone, in closed form: along the normal the block must not be slower than the
        # agent, and overlap is pushed out on top.
        mass = touch / (1 + lever * lever / INERTIA)
        impulse = np.maximum(speed * mass, -pull)
        total = impulse + push_out(overlap) * mass
        self.velocity = (total * normal).sum(0)
        self.spin = (total * lever).sum(0) / INERTIA
        # Where there may be more than one, solve for all together.
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
    """The benchmark's start law and gym-pusht 0.1.8's very numbers, for any goal: (5,) state."""
    agent, block = rng.integers(50, 450, 2), rng.integers(100, 400, 2)
    return np.concatenate([agent, from_legacy([*block, rng.uniform(-np.pi, np.pi)])])


def start_near(rng, goal):
    """Block within 60 px and 0.75 rad of the goal, agent anywhere free of the block: (5,) state."""
    outside = True
    while outside:  # the block beyond a wall
        radius, direction = 60 * np.sqrt(rng.uniform()), 2 * np.pi * rng.uniform()
        offset = radius * np.exp(1j * direction)
        pose = goal + [offset.real, offset.imag, rng.uniform(-0.75, 0.75)]
        outside = np.abs(keypoints(pose) - MIDDLE).max() > FREE
    agents = rng.uniform(50, 450, (32, 2))  # at least one of 32 is free, but for a chance of 1e-30
    local = (agents - pose[:2]) @ [1, 1j] * np.exp(-1j * pose[2]) - CENTER
    free = (circle_contacts(local)[2] > AGENT_RADIUS).all(0)
    return np.concatenate([agents[free.argmax()], pose])


# A task: the law by which scenes start, and the goal that everything else is told.
TASKS = {"full": (start_full, GOAL), "near": (start_near, GOAL), "away": (start_full, AWAY)}
OBSERVATIONS = "state", "keypoints", "pixels"


def observe(states, observation, goal=GOAL):
    """What a policy of this observation is given of the past, states (B, To, 5), the newest last.

    "keypoints": (B, To, 18), eight corners and the agent. "pixels": a dict of the newest picture,
    pixels (B, 96, 96, 3) uint8, and agent_pos (B, To, 2).
    """
    agent = states[..., :2]
    if observation == "pixels":
        return {"pixels": draw_states(states[:, -1], goal=goal), "agent_pos": agent}
    if observation == "keypoints":
        corners = keypoints(states[..., 2:]).reshape(*states.shape[:-1], 16)
        return np.concatenate([corners, agent], -1)
    return states


class PushT:
    """B environments in one. An environment's results do not depend on its neighbours.

    task: a row of TASKS, "full" is the benchmark; observation: "state" (B, 5), "keypoints" (B, 18)
    or "pixels", gym-pusht's pixels_agent_pos, see `observe`; truncated after max_steps.
    ValueError for other choices, and for states and actions that are not finite or misshapen.
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
        """Start anew: environment i from seed + i, or from seed[i]; returns the observation."""
        seeds = seed + np.arange(self.num_envs) if np.ndim(seed) == 0 else seed
        return self.set_state([self.start(np.random.default_rng(int(seed)), self.goal)
                               for seed in seeds])

    def set_state(self, state):
        """Set exactly this state (B, 5), see `state`, all at rest; returns the observation."""
        self._world = World(self._checked("state", state, 5))
        self.steps = np.zeros(self.num_envs, int)
        self.max_coverage = np.zeros(self.num_envs)
        self._coverage = block_coverage(self.block_pose(), self.goal)
        return self.observe()

    def step(self, actions):
        """One control step of 0.1 s; actions (B, 2): the agents' targets [px].

        Returns observation, reward (B,) = min(coverage / threshold, 1), terminated (B,), truncated
        (B,) and info: coverage, max_coverage since the start, is_success. It never resets anything.
        """
        self._world.drive(self._checked("actions", actions, 2) @ [1, 1j])
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
        """(B, 5): agent x, y, block x, y [px], block angle in [0, 2 pi)."""
        state = np.concatenate([as_floats(self._world.agent), self.block_pose()], 1)
        state[:, 4] %= 2 * np.pi
        return state

    def block_pose(self):
        """(B, 3): x, y [px] and angle [rad] of the block; the angle is not wrapped."""
        center, angle = self._world.center, self._world.angle
        return np.concatenate([as_floats(center - CENTER * np.exp(1j * angle)), angle[:, None]], 1)

    def coverage(self):
        """(B,) share of the goal that the block covers now."""
        return self._coverage.copy()

    def observe(self):
        """The kind of observation chosen at construction."""
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

    act: the last states (B, history, 5), the oldest first -> the next targets (B, K, 2) px, all K
    to be carried out. Plays on from the state that `env` is in; before it, that state is repeated.
    Returns arrays: max_coverage (B,) until the first success, final_coverage (B,) then, length (B,)
    in control steps, and states (longest + 1, B, 5).
    """
    states, coverage = [env.state()], [env.coverage()]
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
# gym-pusht's colours; on a canvas a colour is its number in this table.
BACKGROUND, TARGET, FILL, EDGE, AGENT, RIM, WALL = range(7)
COLORS = np.float32([(255, 255, 255), (144, 238, 144), (143, 163, 184), (119, 136, 153),
                     (78, 126, 255), (65, 105, 225), (211, 211, 211)])


@lru_cache(maxsize=4)  # one for each size and goal
class Painter:
    """Draws states as gym-pusht does: shapes on a 512 px canvas, resampled bilinearly to `size`.

    A row or column of the result depends on two of the canvas only, its "taps": a canvas is
    (2 size, 2 size), the colours of the taps. What no state changes is resampled once.
    """

    def __init__(self, size, goal):
        self.size = size
        place = (np.arange(size) + 0.5) * BOARD / size - 0.5  # of the result's pixels on the canvas
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
        """The part of the taps around a point (2,): a slice, and its places, complex."""
        (left, top), (right, bottom) = np.searchsorted(self.taps, [center - extent, center + extent])
        place = self.taps[left:right] + 1j * self.taps[top:bottom, None]
        return np.s_[top:bottom, left:right], place

    def fill(self, canvas, part, mask, color):
        canvas[part][mask & self.free[part]] = color

    def draw_block(self, canvas, pose, border, inner, edge):
        """Its edge reaches border px out and in; pose (3,); inner, edge: colours."""
        part, place = self.window(keypoints(pose).mean(0), REACH + 2 * border)
        place = (place - pose[:2] @ [1, 1j]) * np.exp(-1j * pose[2])
        across = np.abs(place.real)
        for (_, top), (half, bottom) in BAR, STEM:
            along = np.abs(place.imag - (top + bottom) / 2)
            for color, grown in (edge, border), (inner, -border):
                mask = (across <= half + grown) & (along <= (bottom - top) / 2 + grown)
                self.fill(canvas, part, mask, color)

    def draw_agent(self, canvas, center):
        part, place = self.window(center, AGENT_RADIUS + 1)
        distance = np.abs(place - np.rint(center) @ [1, 1j])
        self.fill(canvas, part, distance <= AGENT_RADIUS, RIM)
        self.fill(canvas, part, distance <= AGENT_RADIUS - 4, AGENT)


def draw_states(states, size=96, goal=GOAL):
    """Pictures of states (..., 5) as gym-pusht draws them: (..., size, size, 3) uint8 RGB."""
    states = np.asarray(states, float)
    painter = Painter(size, tuple(goal))
    images = painter.draw(states.reshape(-1, 5))
    return images.reshape(*states.shape[:-1], size, size, 3)


def draw_rollouts(states, lengths, picture_file, animation_file, goal=GOAL):
    """Save the first eight rollouts: the agents' ways in a picture (.png), and moving (.gif).

    states (steps + 1, B, 5); lengths (B,): the steps of each rollout that count.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    lengths = np.minimum(lengths[:8], len(states) - 1)
    times = np.arange(lengths.max() + 1)[:, None]
    states = states[np.minimum(times, lengths), np.arange(len(lengths))]  # each waits at its end
    coverage = block_coverage(states[-1, :, 2:], goal)
    figure = Figure(figsize=(8, 4.2))
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.94, 0.04, 0.12)
    axes = figure.subplots(2, 4).ravel()
    images = []
    for axis in axes:
        axis.set_axis_off()
    for i, picture in enumerate(draw_states(states[-1], 192, goal)):
        images.append(axes[i].imshow(picture, extent=(0, BOARD, BOARD, 0)))
        x, y = states[:lengths[i] + 1, i, :2].T
        axes[i].plot(x, y, color="tab:orange", linewidth=1)
        axes[i].set_title(f"{lengths[i]} steps, coverage {coverage[i]:.2f}", fontsize=8)
    figure.savefig(picture_file, dpi=120)

    def show(time):
        for image, picture in zip(images, draw_states(states[time], 192, goal)):
            image.set_data(picture)
            image.axes.set_title("")
            image.axes.lines[0].set_visible(False)
    times = [*range(0, len(states), 3), *[-1] * 5]  # the end stays for a while
    FuncAnimation(figure, show, times).save(animation_file, PillowWriter(fps=10), dpi=60)


# Expert ------------------------------------------------------------------------------------------
# Without friction the block moves only while it is pushed. A push at contact point r along the
# inward normal n turns it by torque / (INERTIA + torque^2) rad per px, torque = r x n, about a
# pivot that is fixed in the block, INERTIA / torque px beside the centre of mass. So every pose
# that a push can reach is known in closed form: planning needs no simulation. (Walls are ignored.)

# Costs of a plan, in px of corner distance left at its end. Effort counts in proportion to the
# distance to the goal (fully from FAR px on), or the last corrections would never pay. A high cost
# of travel keeps the expert at the face in contact: fewer decisions for a policy to get wrong.
TRAVEL_COST, LENGTH_COST, PUSH_COST = 0.15, 0.05, 2.0  # per px of way, per px of push, per push
FAR, NEAREST_SHARE, TOLERANCE = 40.0, 0.05, 0.3  # px, share of the effort at the goal, px
# How far ahead the target lies, px: low + slope * distance to the goal, at most high. The agent
# covers half of it in a step. Slow near the goal, for a policy acts 8 steps on one look.
PUSH_AHEAD, TRAVEL_AHEAD = (3.0, 0.3, 16.0), (20.0, 0.2, 30.0)
CLEARANCE = 10.0  # px between agent and block while travelling: small errors must not touch it
FORBIDDEN = 1e4  # px, the cost of a way that cannot be gone
# Demonstrations: the noise (px, standard deviation) is dealt out evenly over the episodes.
NOISE, CLOSE_SHARE, STOP_COVERAGE = (0.0, 0.8, 1.5), 0.3, 0.965
WIDE_SHARE = 0.25  # of the near task's demonstrations, these start anywhere

_SPREAD = KEYPOINTS.var(0).sum()  # px^2: a turn by psi moves the corners sqrt(_SPREAD) psi (RMS)
_FACES = [  # first and last contact, their number, the inward normal
    (-52, 52, 7, 1j),  # the bar's outer edge
    (-8 + 120j, 8 + 120j, 3, -1j),  # the stem's end
    (60 + 15j, 60 + 15j, 1, -1),  # the bar's ends
    (-60 + 15j, -60 + 15j, 1, 1),
    (52 + 30j, 36 + 30j, 2, -1j),  # the bar's inner edge, beside the stem
    (-52 + 30j, -36 + 30j, 2, -1j),
    (15 + 50j, 15 + 112j, 4, -1),  # the stem's sides
    (-15 + 50j, -15 + 112j, 4, 1)]
_BERTH = AGENT_RADIUS + CLEARANCE
_DIAGONALS = np.array([-1 - 1j, 1 - 1j, 1 + 1j, 1 + 1j, -1 + 1j, -1 + 1j])
_NODES = CORNERS[[0, 1, 2, 6, 7, 3]] + _BERTH * _DIAGONALS  # a ring around the convex corners


def _straight(start, end):
    """Lengths of the straight ways from start to end, + FORBIDDEN where too near the block."""
    way, blocked = end - start, False
    reach = _BERTH - 0.01  # sliding along the outline is allowed
    for (left, top), (right, bottom) in zip(LOW - reach, HIGH + reach):
        enter_x, leave_x = crossing(start.real, way.real, left, right)
        enter_y, leave_y = crossing(start.imag, way.imag, top, bottom)
        enter, leave = np.maximum(enter_x, enter_y), np.minimum(leave_x, leave_y)
        blocked |= (enter < leave) & (leave > 0) & (enter < 1)
    return np.abs(way) + FORBIDDEN * blocked


def _outside(points):
    """The nearest points at which the agent keeps CLEARANCE. Block frame, any shape."""
    # By symmetry, the outline of the right half: under the bar (y > notch) only the stem is left.
    side, x, y = np.where(points.real < 0, -1, 1), np.abs(points.real), points.imag
    (narrow, end), (wide, notch) = HIGH + _BERTH
    top = LOW[1, 1] - _BERTH
    inside = (y > top) & (y < end) & (x < np.where(y < notch, wide, narrow))
    exits = np.stack([x + 1j * top,
                      wide + 1j * np.minimum(y, notch),
                      x + 1j * end,
                      np.maximum(x, narrow) + 1j * notch,
                      narrow + 1j * np.maximum(y, notch)])
    nearest = np.abs(exits - (x + 1j * y)).argmin(0)
    exits = np.take_along_axis(exits, nearest[None], 0)[0]
    return np.where(inside, side * exits.real + 1j * exits.imag, points)


def _ways(start, closed=np.zeros(6)):
    """Ways of the agent from start (B,) to the K places _WAIT; closed (B, 6): added cost of nodes.

    Returns the lengths straight and along the ring, (B, K), that of the way along the ring from
    each first node to each last, (B, 6, 6), and the sense in which it goes, +1 or -1.
    """
    edges = np.abs(np.roll(_NODES, -1) - _NODES) + closed + np.roll(closed, -1, -1)
    total = edges.sum(-1)[..., None, None]
    position = edges.cumsum(-1) - edges
    forward = (position[..., None, :] - position[..., None]) % total
    ring = np.minimum(forward, total - forward)
    sense = np.where(forward <= ring, 1, -1)
    first = _straight(start[:, None], _NODES) + closed
    to_node = first[:, :, None] + ring
    by_ring = (to_node.min(1)[:, :, None] + _TAIL).min(1)
    return _straight(start[:, None], _WAIT), by_ring, to_node, sense


_NORMAL = np.concatenate([np.full(number, normal, complex) for _, _, number, normal in _FACES])
_POINT = np.concatenate([np.linspace(*face[:3]) for face in _FACES]) - CENTER
_TORQUE = cross(_POINT, _NORMAL)
_TORQUE[np.abs(_TORQUE) < 0.01] = 0.01  # a push through the centre of mass: a very wide circle
_PIVOT = 1j * _NORMAL * INERTIA / _TORQUE
_RATE = _TORQUE / (INERTIA + _TORQUE ** 2)  # rad per px of push
_CONTACT = _POINT - AGENT_RADIUS * _NORMAL  # where the agent's centre is
_ADVANCE = 1j * _RATE * (_CONTACT - _PIVOT)  # how that place moves per px of push
_WAIT = _outside(_CONTACT - CLEARANCE * _NORMAL)  # from where it is approached
_TAIL = _straight(_NODES[:, None], _WAIT)  # (6, K) px
_CHANGE = 2 * CLEARANCE + np.minimum(*_ways(_WAIT)[:2])  # from contact to contact, (K, K) px


def _distance(error, turn):
    """RMS distance of the corners from the goal's. error: complex px, turn: exp(i angle error)."""
    return np.sqrt(np.abs(error) ** 2 + 2 * _SPREAD * (1 - turn.real))


def _best_turn(error, turn, pivot, rate):
    """How far to turn the block about the pivot so that it comes nearest to the goal, rad.

    The squared distance is const - 2 Re(z exp(i psi)), so psi = -arg z, or 0 where the push turns
    the other way. Goal frame; rate: rad per px of push.
    """
    psi = -np.angle(_SPREAD * turn - np.conj(pivot) * (error - pivot))
    return np.where(psi / rate > 0.01, psi, 0)  # a push below 0.01 px is rounding


def _two_pushes(error, turn, pivot, first):
    """Turn the block about `pivot` by `first`, and then by the best second push with each contact.

    Returns the second pivot and angle, and error and turn at the end.
    """
    middle = pivot + (error - pivot) * np.exp(1j * first)
    middle_turn = turn * np.exp(1j * first)
    pivot2 = middle + middle_turn * _PIVOT
    second = _best_turn(middle, middle_turn, pivot2, _RATE)
    end = pivot2 + (middle - pivot2) * np.exp(1j * second)
    return pivot2, second, end, middle_turn * np.exp(1j * second)


def _plan(error, turn, travel):
    """The first of the one or two pushes that together cost least.

    error (B,) px, turn (B,) in the goal's frame, travel (B, K) px to the contacts -> contact (B,)
    """
    share = np.clip(_distance(error, turn) / FAR, NEAREST_SHARE, 1)[:, None, None]
    error, turn = error[:, None, None], turn[:, None, None]  # (B, first contact, second contact)
    rate, pivot = _RATE[:, None], error + turn * _PIVOT[:, None]
    first = _best_turn(error, turn, pivot, rate)  # as if it were the only push
    pivot2, second, end, end_turn = _two_pushes(error, turn, pivot, first)
    # One Gauss-Newton step for both angles; exact in the limit of short pushes.
    arm, arm2 = end - pivot, end - pivot2
    slope = cross(arm, end) + _SPREAD * end_turn.imag
    slope2 = cross(arm2, end) + _SPREAD * end_turn.imag
    a, b, c = dot(arm, arm) + _SPREAD, dot(arm2, arm2) + _SPREAD, dot(arm, arm2) + _SPREAD
    alone = -slope / a
    both = (c * slope2 - b * slope) / (1.001 * a * b - c * c)  # 1.001: the same pivot twice
    first = first + np.clip(np.where(second != 0, both, alone), -0.5, 0.5)
    first = np.where(first * rate > 0, first, 0)
    _, second, end, end_turn = _two_pushes(error, turn, pivot, first)
    again = second != 0
    way = travel[:, :, None] + again * _CHANGE
    length = first / rate + second / _RATE
    effort = TRAVEL_COST * way + PUSH_COST * (1 + again) + LENGTH_COST * length
    cost = np.hypot(_distance(end, end_turn), TOLERANCE) + share * effort
    cost = cost + FORBIDDEN * (first == 0)  # to wait is no plan
    return cost.min(2).argmin(1)


def _target_on_way(agent, start, k, ways, ahead):
    """The point that lies `ahead` (B,) px along the way to contact k (B,), a line of five points.

    agent, start (B,): where the agent is, and the nearest point outside; ways: see `_ways`.
    """
    rows = np.arange(len(agent))
    direct, by_ring, to_node, sense = ways
    last = (to_node.min(1) + _TAIL.T[k]).argmin(1)
    node = to_node[rows, :, last].argmin(1)
    after = _NODES[(node + sense[rows, node, last]) % 6]
    straight = direct[rows, k] <= by_ring[rows, k]
    arrives = straight | (node == last)
    line = np.stack([agent, start,
                     np.where(straight, _WAIT[k], _NODES[node]),
                     np.where(arrives, _WAIT[k], after),
                     np.where(arrives, _CONTACT[k], after)], 1)
    pieces = np.diff(line, axis=1)
    lengths = np.abs(pieces)
    before = lengths.cumsum(1) - lengths
    done = np.clip((ahead[:, None] - before) / np.maximum(lengths, 1e-9), 0, 1)
    return agent + (done * pieces).sum(1)


def expert_action(state, goal=GOAL):
    """The expert's action, where to move the agent next: (B, 5) state -> (B, 2) px.

    It depends on the state alone, never on a running plan, for a policy sees only the state. Plan
    the pushes afresh; if the agent is in the lane before the best contact, push along the inward
    normal, else travel there around the block.
    """
    state = np.asarray(state, float)
    rotation, goal_rotation = np.exp(1j * state[:, 4]), np.exp(1j * goal[2])
    center = state[:, 2:4] @ [1, 1j] + rotation * CENTER
    agent = (state[:, :2] @ [1, 1j] - center) / rotation  # in the block's frame
    error = (center - complex(*goal[:2])) / goal_rotation - CENTER
    turn = rotation / goal_rotation
    distance = _distance(error, turn)
    # What each contact costs to reach.
    places = center[:, None] + rotation[:, None] * np.concatenate([_NODES, _CONTACT])
    off_board = np.abs(as_floats(places) - BOARD / 2).max(-1) > 253
    closed_nodes, closed = np.split(FORBIDDEN * off_board, [6], 1)
    start = _outside(agent)
    ways = _ways(start, closed_nodes)
    way = np.abs(start - agent)[:, None] + np.minimum(*ways[:2]) + CLEARANCE
    offset = agent[:, None] - _CONTACT
    gap, aside = -dot(_NORMAL, offset), np.abs(cross(_NORMAL, offset))
    in_lane = (gap > -4) & (gap < CLEARANCE + 1) & (aside < 4 + 0.6 * np.maximum(gap, 0))
    travel = np.where(in_lane, np.abs(gap) + aside, way) + closed

    k = _plan(error, turn, travel)
    in_lane, gap, aside, way = (
        values[np.arange(len(k)), k] for values in (in_lane, gap, aside, way))
    push_ahead, travel_ahead = (np.minimum(low + slope * distance, high)
                                for low, slope, high in (PUSH_AHEAD, TRAVEL_AHEAD))
    # In the lane: ahead along the push, less where the agent is not yet in touch or off the line.
    depth = push_ahead - 0.5 * np.maximum(gap, 0) - aside
    push = _CONTACT[k] + depth * np.where(depth > 0, _ADVANCE[k], _NORMAL[k])
    ahead = np.minimum(travel_ahead, push_ahead + 0.5 * way)  # slower on arrival
    target = np.where(in_lane, push, _target_on_way(agent, start, k, ways, ahead))
    return np.clip(as_floats(center + rotation * target), 0, BOARD)


def _starts(rng, number, task):
    """States (number, 5) from which the expert plays; some of them closer to the goal."""
    law, goal = TASKS[task]
    start = np.array([law(rng, goal) for _ in range(number)])
    if law is start_near:  # a policy that loses the block must find the way back
        for i in np.flatnonzero(rng.random(number) < WIDE_SHARE):
            start[i] = start_full(rng, goal)
    for i in np.flatnonzero(rng.random(number) < CLOSE_SHARE):
        start[i] = start_near(rng, goal)
        nearer = np.exp(rng.uniform(np.log(0.08), 0))  # to 5..60 px, the agent with the block
        move = (nearer - 1) * (start[i, 2:] - goal)
        start[i, :2] += move[:2]
        start[i, 2:] += move
    return start


def expert_demonstrations(count, task="full", seed=0):
    """Let the expert play until `count` episodes have reached STOP_COVERAGE.

    The recorded action is the expert's. The executed one carries autocorrelated noise in two
    episodes of three, so that recoveries are shown (DART, arXiv 1703.09327). CLOSE_SHARE of the
    episodes start closer to the goal, where success is decided. Episodes that fail are drawn again.

    Returns a dict of state (N, 5) float32, action (N, 2) float32 px chosen in that state, and
    episode_ends (count,) int64.
    """
    rng = np.random.default_rng([seed, 1])  # a stream that PushT.reset never uses
    episodes = []
    with tqdm(total=count, desc="demonstrations", mininterval=1, disable=count < 20) as bar:
        while len(episodes) < count:
            number = count - len(episodes)
            env = PushT(number, task)
            state, alive = env.set_state(_starts(rng, number, task)), np.arange(number)
            size = rng.permutation(np.resize(NOISE, number))[:, None]  # of the noise, px
            noise = np.zeros((number, 2))
            states = np.zeros((number, env.max_steps, 5), np.float32)
            actions = np.zeros((number, env.max_steps, 2), np.float32)
            lengths = np.zeros(number, int)  # 0: has failed
            for step in range(env.max_steps):
                action = expert_action(state, env.goal)
                states[alive, step] = state
                actions[alive, step] = action
                done = env.max_coverage > STOP_COVERAGE  # so the last recorded state is beyond it
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


# Demonstrations and lesson -----------------------------------------------------------------------

def load_demonstrations(path):
    """Read demonstrations in the layout of the public human data: a dict of arrays.

    state (N, 5) float32: the observation in which action (N, 2) float32, the agent's target, was
    chosen, both in px, all episodes in a row; episode_ends (E,) int64: where each ends. The file
    may hold other real numbers. ValueError, one line with the path, if it is not so.
    """
    try:
        with np.load(path) as file:     # runs no code from it: allow_pickle is off
            data = {name: file[name] for name in ("state", "action", "episode_ends")}
    except Exception as error:     # numpy and zipfile raise many kinds for a damaged file
        raise ValueError(f"{path} is not a readable .npz file of state, action and episode_ends "
                         f"({error!r:.80}); delete it if train.py made it") from None
    for name, width in ("state", 5), ("action", 2):
        values = data[name]
        if values.dtype.kind not in "fiu" or values.shape[1:] != (width,):
            raise ValueError(f"{path}: {name} is {values.dtype} of shape {values.shape}; expected "
                             f"numbers of shape (N, {width})")
        if not (np.abs(values) < 1e4).all():     # NaN is not less, either
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
    return data


def mirror(demonstrations, goal=GOAL):
    """Demonstrations, and behind them their mirror images: twice as many episodes.

    The mirror is the goal's own axis. Each goal in TASKS lies so that this maps the board onto
    itself, too (the walls to 1 px), so what was right stays right.
    """
    ends = demonstrations["episode_ends"]
    state, action = (demonstrations[name][:ends[-1]] for name in ("state", "action"))
    middle, turn = goal[:2] @ [1, 1j], np.exp(2j * goal[2])
    points = np.concatenate([state[:, :4], action], 1).reshape(-1, 3, 2) @ [1, 1j]
    agent, block, target = as_floats(middle - turn * (points - middle).conj()).swapaxes(0, 1)
    images = np.concatenate([agent, block, 2 * goal[2] - state[:, 4:]], 1)
    return {"state": np.concatenate([state, images], dtype=np.float32),
            "action": np.concatenate([action, target], dtype=np.float32),
            "episode_ends": np.concatenate([ends, ends[-1] + ends])}


class Game:
    """A window in which the mouse moves the agent at 10 Hz; adds the episodes to a file."""

    def __init__(self, path, task, seed):
        import matplotlib.pyplot as plt
        if plt.get_backend().lower() == "agg":
            raise ValueError("no window can be opened: install a GUI toolkit for matplotlib "
                             "(tkinter or PyQt) and run where there is a display")
        self.env, self.path, self.seed = PushT(task=task), Path(path), seed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.data = {"state": np.zeros((0, 5), np.float32), "action": np.zeros((0, 2), np.float32),
                     "episode_ends": np.zeros(0, int)}
        if self.path.exists():
            self.data = load_demonstrations(path)
        # No zooming with the mouse; and "k" must not switch to a logarithmic axis.
        plt.rcParams.update({"toolbar": "None", "keymap.xscale": [], "keymap.yscale": []})
        figure, self.axis = plt.subplots(num="PushT", figsize=(6, 6.5))
        figure.subplots_adjust(0.02, 0.02, 0.98, 0.9)
        self.axis.set_axis_off()
        self.image = self.axis.imshow(self.env.render(512)[0], extent=(0, BOARD, BOARD, 0))
        figure.canvas.mpl_connect("motion_notify_event", self.on_move)
        figure.canvas.mpl_connect("key_press_event", self.on_key)
        timer = figure.canvas.new_timer(100)  # ms
        timer.add_callback(self.on_tick)
        self.next_scene()
        timer.start()
        plt.show()

    def save(self):
        """Add the episode to the file; the old file stays whole until the new one is."""
        end = len(self.data["state"]) + len(self.states)
        episode = {"state": np.float32(self.states), "action": np.float32(self.actions),
                   "episode_ends": [end]}
        for name, values in episode.items():
            self.data[name] = np.concatenate([self.data[name], values])
        unfinished = self.path.with_name("unfinished-" + self.path.name)
        np.savez_compressed(unfinished, **self.data)
        unfinished.replace(self.path)

    def next_scene(self):
        self.env.reset(self.seed + len(self.data["episode_ends"]))
        self.states, self.actions, self.target = [], [], None
        self.draw("touch the agent with the mouse to begin")

    def on_move(self, event):
        if event.inaxes:
            mouse = np.array([event.xdata, event.ydata])
            distance = np.linalg.norm(mouse - self.env.state()[0, :2])
            if self.target is not None or distance < 2 * AGENT_RADIUS:
                self.target = mouse

    def on_key(self, event):
        if event.key == "k" and self.states:
            self.save()
        if event.key in ("k", "r"):  # matplotlib itself closes the window on "q"
            self.next_scene()

    def on_tick(self):
        if self.target is None:
            return
        self.states.append(self.env.state()[0])
        self.actions.append(self.target)
        _, _, terminated, _, info = self.env.step(self.target[None])
        self.draw(f"coverage {info['coverage'][0]:.3f}, best {info['max_coverage'][0]:.3f}")
        if terminated[0]:
            self.save()
            self.next_scene()

    def draw(self, text):
        self.image.set_data(self.env.render(512)[0])
        episodes = len(self.data["episode_ends"])
        self.axis.set_title(f"{text}\n{episodes} episodes in {self.path}; "
                            "keys: k keep, r restart, q quit", fontsize=9)
        self.image.figure.canvas.draw_idle()


def lesson(folder, task):
    """Play the expert on eight scenes, print what happens, save a picture and a GIF."""
    env = PushT(8, task)
    state = env.reset(0)
    print("8 scenes; the state", state.shape, "is agent x, y, block x, y and angle. Scene 0:", state[0])
    result = play(env, lambda past: expert_action(past[:, -1], env.goal)[:, None])
    states = result["states"]
    for step in range(0, len(states), 25):
        print("step", step, "coverage", block_coverage(states[step, :, 2:], env.goal).round(2))
    print("steps until coverage is above 0.95, or 300:", result["length"])
    folder.mkdir(parents=True, exist_ok=True)
    draw_rollouts(states, result["length"], folder / "rollouts.png", folder / "rollout.gif",
                  env.goal)
    print("Pictures: rollouts.png and rollout.gif in", folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The PushT lesson, or a game that records.")
    flag = parser.add_argument
    flag("--play", metavar="FILE", help="push the block with the mouse, keep the episodes in FILE")
    flag("--task", choices=TASKS, default="full", help="default full")
    flag("--seed", type=int, default=0, help="of the first scene to play; default 0")
    parser.error = lambda message: parser.exit(2, f"sim_pusht.py: {message}\n")
    options = parser.parse_args()
    try:
        if options.play:
            Game(options.play, options.task, options.seed)
        else:
            os.environ["MPLBACKEND"] = "agg"     # needs no display
            lesson(Path("runs/lessons/sim_pusht"), options.task)
    except (ValueError, OSError, ImportError) as error:
        parser.error(error)
