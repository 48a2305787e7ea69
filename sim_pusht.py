"""PushT in plain numpy: many environments in one call, no binary dependency.

A circular agent pushes a T-shaped block into a goal pose. Physics, reward, start law and picture
are those of gym-pusht 0.1.8 (pymunk 6, Chipmunk 7), so a policy runs unchanged in either one. The
paper (arXiv 2511.12101) only uses this benchmark: a reader of the paper may skip this file.
In order: geometry, physics, environment, picture, expert, demonstrations and lesson.

    python sim_pusht.py          # lesson: the expert on a few scenes; a picture and a GIF
    python sim_pusht.py --play   # push the block yourself and record demonstrations
"""
import argparse
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Geometry ----------------------------------------------------------------------------------------
# Frame: 512 x 512 px, x right, y DOWN, angles from x to y. A pose (x, y, angle) places the block's
# local origin, the middle of the bar's outer edge. Inside this file a vector may be a complex
# number x + iy: turning it is then one product with exp(i angle).
BOARD = 512.0
MIDDLE, FREE = 255.5, 248.5  # walls stop the block, not the agent; their faces: MIDDLE +- FREE
AGENT_RADIUS = 15.0
GOAL = np.array([256.0, 256.0, np.pi / 4])
BOXES = np.array([[[-60.0, 0.0], [60.0, 30.0]], [[-15.0, 30.0], [15.0, 120.0]]])  # bar, stem
KEYPOINTS = np.array([[-60.0, 0.0], [60.0, 0.0], [60.0, 30.0], [-60.0, 30.0],
                      [-15.0, 30.0], [15.0, 30.0], [15.0, 120.0], [-15.0, 120.0]])
CENTER_OF_MASS = np.array([0.0, 45.0])  # the mean of the two boxes' centres, not area-weighted

# The same relative to the centre of mass.
CENTER = complex(*CENTER_OF_MASS)
CORNERS = KEYPOINTS @ [1, 1j] - CENTER
EDGES = CORNERS[[1, 2, 3, 0, 5, 6, 7, 4]] - CORNERS  # of each box, from corner to corner
LOW, HIGH = BOXES[:, 0] - CENTER_OF_MASS, BOXES[:, 1] - CENTER_OF_MASS
REACH = np.abs(CORNERS).max()  # 76.5 px: no part of the block is farther from its centre of mass


def dot(a, b):
    """Scalar product of vectors written as complex numbers."""
    return (a.conj() * b).real


def cross(a, b):
    """z component of the vector product of vectors written as complex numbers."""
    return (a.conj() * b).imag


def as_floats(z):
    """(...) complex -> (..., 2), the inverse of `xy @ [1, 1j]`."""
    return np.asarray(z)[..., None].view(float)


def keypoints(pose):
    """Corners of the block in the world, (..., 3) pose -> (..., 8, 2) px, gym-pusht's order."""
    pose = np.asarray(pose, float)
    origin = (pose[..., :2] @ [1, 1j])[..., None]
    return as_floats(origin + (CORNERS + CENTER) * np.exp(1j * pose[..., 2:]))


def from_legacy(pose):
    """The pose (..., 3) that gym-pusht's `reset_to_state` leads to; it is not the one asked for.

    The position is set first, and then the block is turned about its centre of mass.
    """
    pose = np.array(pose, float)
    pose[..., :2] += CENTER_OF_MASS - as_floats(CENTER * np.exp(1j * pose[..., 2]))
    return pose


def to_legacy(pose):
    """What gym-pusht's `reset_to_state` must be given to lead to a pose; (..., 3)."""
    return 2 * np.asarray(pose, float) - from_legacy(pose)


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
    corner = shift[..., None, None] + (CORNERS + CENTER) * turn - CENTER  # (..., 1, 8)
    edge = EDGES * turn
    (left, top), (right, bottom) = LOW.T[..., None], HIGH.T[..., None]  # the goal's, (2, 1)
    start, end = np.clip(crossing(corner.real, edge.real, left, right), 0, 1)
    enter, leave = np.clip(crossing(corner.imag, edge.imag, top, bottom), start, end)
    area = 0
    for t0, t1 in (start, enter), (enter, leave), (leave, end):
        height = np.clip(corner.imag + (t0 + t1) / 2 * edge.imag, top, bottom) - top
        area = area - height * (t1 - t0)
    return np.maximum((area * edge.real).sum((-2, -1)), 0) / 6300  # of the block's area


# Physics -----------------------------------------------------------------------------------------
# Chipmunk 7's step (cpSpaceStep.c, cpArbiter.c, cpCollision.c, cpBBTree.c) for this one world: a
# circle on rails, one free block of two boxes and of mass 1, four static walls, no friction, no
# bounce, and a damping that stops the block before every substep: it moves only while it is pushed.
# Inside, velocities are px or rad per substep, and contacts are worked out in the block's frame,
# from its centre of mass.
DT, SUBSTEPS = 0.01, 10  # s; a control step is 0.1 s
STIFFNESS, DAMPING = 100.0, 20.0  # of the agent's PD control, 1/s^2 and 1/s
INERTIA = 3000.0
SLOP = float(np.float32(0.1))  # px that shapes may overlap unpunished (Chipmunk: 0.1f)
BIAS = 1 - float(np.float32(0.9)) ** (60 * DT)  # share of more overlap pushed out per substep
ITERATIONS, PERSISTENCE = 10, 3  # sweeps of the solver; substeps that a lost contact is remembered
_pd = np.array([[1 - STIFFNESS * DT**2, 1 - DAMPING * DT], [-STIFFNESS * DT**2, 1 - DAMPING * DT]])
PD_RESPONSE = np.array([np.linalg.matrix_power(_pd, k + 1) for k in range(SUBSTEPS)])[..., None]

# There are 18 places for contacts: the agent with bar and stem; each wall (left, top, right,
# bottom) with bar and stem, at both ends of the edge that faces it.
EDGE_NORMALS = np.array([-1, -1j, 1, 1j])  # of the edge that ends in corner 0, 1, 2, 3 of a box
WALL_NORMALS = np.repeat([1, 1j, -1, -1j], 4)[:, None]  # inward
WALL_LEVELS = MIDDLE * dot(WALL_NORMALS, 1 + 1j) - FREE  # normal . x at the face
WALL_CENTERS, WALL_HALF_LENGTH = MIDDLE * cross(WALL_NORMALS, 1 + 1j), 250.5
_edge = (np.arange(4) - np.arange(4)[:, None]) % 4  # facing wall w after q quarter turns, [q, w]
_ends = ((_edge[..., None, None] - [0, 1]) % 4 + [[0], [4]]).reshape(4, 16).T  # corners, [i, q]
FACING_ENDS = np.concatenate([np.full((2, 4), -1), _ends])  # -1: the agent's two places
PARTNER = np.r_[0, 1, np.arange(2, 18) ^ 1]  # the other end of the edge

# Leaves of the broad phase: bar, stem, agent. Their boxes are (left, top, -right, -bottom), so that
# "contains" is <= and a union is a minimum. The first are those of gym-pusht's world as built.
FIRST_LEAVES = np.array([[184.0, 238, 238], [297, 321, 382], [-328, -274, -274],
                         [-333, -429, -418]])[..., None]
BOX_MIDDLES = np.array([[-30j], [30j]])
HALF_LONG, HALF_WIDE = np.array([[60.0], [15.0]]), np.array([[15.0], [45.0]])


def circle_contacts(agent):
    """Where the circle meets the two boxes; agent (n,) in the block's frame.

    Returns three (2, n) arrays: the boxes' points nearest to the circle's centre, the directions
    from the centre to them, and the distances (negative where the centre is inside a box).
    """
    xy = as_floats(agent)
    point = np.minimum(np.maximum(xy, LOW[:, None]), HIGH[:, None]).view(complex)[..., 0]
    normal = point - agent
    distance = np.abs(normal)
    inside = distance == 0  # the circle's centre is in a box: leave through the nearest face
    if not np.count_nonzero(inside):
        return point, normal / distance, distance
    box, env = inside.nonzero()
    gaps = np.concatenate([xy[env] - LOW[box], HIGH[box] - xy[env]], 1)
    face, gap = gaps.argmin(1), gaps.min(1)
    normal /= np.where(inside, 1, distance)
    normal[inside], distance[inside] = -EDGE_NORMALS[face], -gap
    point[inside] += EDGE_NORMALS[face] * gap
    return point, normal, distance


def wall_contacts(center, angle, rotation):
    """Where the two boxes meet the four walls; center, angle, rotation (n,).

    A wall touches the ends of the edge that faces it, or what is left of the edge where it sticks
    out past the wall's own ends (cpCollision.c ContactPoints). Returns the corners' indices 0..7,
    (18, n), -1 for the agent's, and five (16, n) arrays as `solve_contacts` takes them first.
    """
    ends = FACING_ENDS[:, np.rint(angle / (np.pi / 2)).astype(int) % 4]
    arm = CORNERS[ends[2:]] * rotation
    past = np.abs(cross(WALL_NORMALS, center + arm) - WALL_CENTERS) - WALL_HALF_LENGTH
    if np.count_nonzero(past > 0):
        edge = arm.reshape(8, 2, -1)
        edge = (edge[:, ::-1] - edge).reshape(16, -1)  # from this end to the other
        length = np.maximum(np.abs(cross(WALL_NORMALS, edge)), 1e-9)  # along the wall
        arm = arm + edge * np.clip(past / length, 0, 1)
    depth = WALL_LEVELS - dot(WALL_NORMALS, center + arm)
    normal = WALL_NORMALS * rotation.conj()
    lever = cross(arm * rotation.conj(), normal)
    return ends, (depth >= 0, normal, lever, 0 * depth, BIAS * np.maximum(depth - SLOP, 0))


def solve_contacts(touch, normal, lever, speed, push_speed, start, kept):
    """Chipmunk's impulse solver: ten sweeps of projected Gauss-Seidel over K contacts, all (K, n).

    `speed` is to be stopped and `push_speed` to be reached to push out overlap: two systems with
    one matrix. `start` are the impulses of the last substep, `kept` the part of them that is not
    applied. Returns velocity (2, n), spin (2, n) of the two systems, and the impulses (K, n).
    """
    matrix = dot(normal[:, None], normal) + lever[:, None] * lever / INERTIA
    sweep = range(len(normal))
    scale = touch / matrix[sweep, sweep]
    matrix *= scale[:, None]
    right, least, x = np.zeros((3, len(normal), 2, normal.shape[1]))
    right[:, 0], right[:, 1] = speed * scale, push_speed * scale
    least[:, 0], x[:, 0] = -kept, start - kept
    others = [[(matrix[i, j], x[j]) for j in sweep if j != i] for i in sweep]
    for _ in range(ITERATIONS):
        for i in sweep:
            rest = right[i]
            for weight, value in others[i]:
                rest = rest - weight * value
            np.maximum(rest, least[i], out=x[i])
    velocity = sum(x[i] * normal[i] for i in sweep)
    return velocity, sum(x[i] * lever[i] for i in sweep) / INERTIA, x[:, 0] + kept


class World:
    """B independent worlds of agent, block and walls. B is the last axis of every array."""

    def __init__(self, state):
        """Agents and blocks at rest, (B, 5); Chipmunk finds their contacts once."""
        B, agent = len(state), state[:, :2] @ [1, 1j]
        self.angle, self.spin = state[:, 4].copy(), np.zeros(B)
        self.center = state[:, 2:4] @ [1, 1j] + CENTER * np.exp(1j * self.angle)
        self.velocity = np.zeros(B, complex)
        self.contact_velocity = np.zeros(B, complex)  # without the push out of overlap
        # What is remembered of the 18 places for contacts: impulse, last substep, corner of block.
        self.impulse, self.corner = np.zeros((18, B)), np.full((18, B), -1)
        self.touched = np.full((18, B), -1 - PERSISTENCE)  # too long ago to be remembered
        # Of the broad phase: the leaves' boxes, their order, and the substep of their last change.
        self.boxes, self.rank = np.tile(FIRST_LEAVES, B), np.tile([[0], [1], [2]], B)
        self.moved = np.full((3, B), -1)
        self.clock = np.zeros(B, int)  # substeps gone by
        self._simulate(agent[None], 0 * agent[None])

    def part(self, envs):
        """A copy of the worlds with the indices envs (n,)."""
        part = World.__new__(World)
        vars(part).update({name: values.take(envs, -1) for name, values in vars(self).items()})
        return part

    def drive(self, target):
        """One control step: the agents head for target (B,) complex. Returns which blocks moved."""
        offset = self.agent - target
        path = target + PD_RESPONSE[:, 0, 0] * offset + PD_RESPONSE[:, 0, 1] * self.agent_velocity
        velocity = PD_RESPONSE[:, 1, 0] * offset + PD_RESPONSE[:, 1, 1] * self.agent_velocity
        return self._simulate(path, velocity)

    def _simulate(self, path, velocity):
        """Move the blocks while the agents follow their paths (substeps, B); returns who did."""
        self.agent, self.agent_velocity = path[-1], velocity[-1]
        rotation = np.exp(1j * self.angle)
        # In every substep: the block's centre and rotation, the agent, the velocities of both.
        self.motion = np.zeros((5, *path.shape), complex)
        self.motion[0], self.motion[1], self.motion[2::2] = self.center, rotation, (path, velocity)
        awake = (self.velocity != 0) | (self.spin != 0) | (self.clock == 0)
        near = ~awake & (np.abs(path - self.center).min(0) < REACH + AGENT_RADIUS)
        if np.count_nonzero(near):  # a block at rest sleeps until the agent touches it
            agent = (path[:, near] - self.center[near]) * rotation[near].conj()
            distance = circle_contacts(agent.ravel())[2].reshape(2, *agent.shape)
            awake[near] = (distance <= AGENT_RADIUS).any((0, 1))
        envs = np.flatnonzero(awake)
        if len(envs):
            some = self.part(envs)
            # In a step the block goes no farther than by its own velocity, the agent's way, and
            # the deepest overlap, which is 30 px. Only near a wall need walls be looked for.
            reach = REACH + np.abs(some.velocity) + np.abs(some.motion[4]).sum(0) + 30
            offset = np.abs(as_floats(some.center) - MIDDLE).max(1)
            walled = np.flatnonzero(offset + reach >= FREE)
            for k in range(len(path)):
                some._substep(k, walled)
            for name, values in vars(self).items():
                values[..., envs] = vars(some)[name]
        self._follow(len(path))
        self.clock += len(path)
        return envs

    def _substep(self, k, at_wall):
        clock = self.clock + k
        self.center += self.velocity
        self.angle += self.spin
        center, rotation = self.center, np.exp(1j * self.angle)
        motion = self.motion[:, k]
        motion[0], motion[1], motion[3] = center, rotation, self.contact_velocity
        back = rotation.conj()
        point, normal, distance = circle_contacts((motion[2] - center) * back)
        touch = distance <= AGENT_RADIUS
        if len(at_wall):
            corners = center[at_wall] - MIDDLE * (1 + 1j) + CORNERS[:, None] * rotation[at_wall]
            at_wall = at_wall[np.abs(as_floats(corners)).max((0, 2)) >= FREE]
        if np.count_nonzero(touch) + len(at_wall) == 0:
            self.velocity[:], self.contact_velocity[:], self.spin[:] = 0, 0, 0
            return
        # One contact, in closed form: the block must not be slower than the agent along the normal,
        # and overlap is pushed out on top. Without friction there is nothing else.
        lever = cross(point, normal)
        mass = touch * (INERTIA / (INERTIA + lever * lever))  # that the contact feels
        speed = dot(normal, motion[4] * back)
        push_speed = BIAS * np.maximum(AGENT_RADIUS - SLOP - distance, 0)
        # A contact lost for one or two substeps keeps its impulse, but that is not applied.
        missed = clock - 1 - self.touched[:2]
        start = self.impulse[:2] * ((missed < PERSISTENCE) & touch)
        kept = start * (missed > 0)
        impulse = np.maximum(speed * mass, -kept)
        total = impulse + push_speed * mass
        contact_velocity, velocity, spin = (bar + stem for bar, stem in (
            impulse * normal, total * normal, total * lever))
        spin /= INERTIA
        impulse += kept
        several = touch[0] & touch[1]
        several[at_wall] = True
        if np.count_nonzero(several):
            several, = several.nonzero()
            contacts = touch, normal, lever, speed, push_speed, start, kept
            contacts = [values[:, several] for values in contacts]
            deep = (distance[:, several] < 0).any(0)  # agent within the block: contacts disagree
            if len(at_wall) or np.count_nonzero(deep):
                solution = self._solve_in_order(k, several, contacts, deep)
            else:
                solution = solve_contacts(*contacts)
            (speed, push), (turn, push_turn), impulse[:, several] = solution
            contact_velocity[several], velocity[several] = speed, speed + push
            spin[several] = turn + push_turn
        self.contact_velocity = contact_velocity * rotation
        self.velocity = velocity * rotation
        self.spin = spin
        np.copyto(self.impulse[:2], impulse, where=touch)
        np.copyto(self.touched[:2], clock, where=touch)

    def _solve_in_order(self, k, rows, contacts, deep):
        """`solve_contacts` for the n environments `rows`, with walls and in Chipmunk's order.

        contacts: its arguments for the agent's contacts, (2, n) each. deep (n,): the agent is
        within the block. The impulses returned are the agent's, (2, n).
        """
        clock, every = self.clock[rows] + k, np.arange(len(rows))
        corner, walls = wall_contacts(self.center[rows], self.angle[rows], self.motion[1, k, rows])
        contacts = [np.concatenate(pair) for pair in zip(contacts, walls)]  # without start, kept
        touch = contacts[0]
        missed = clock - 1 - self.touched[:, rows]
        same = (missed < PERSISTENCE) & (corner == self.corner[:, rows])
        start = self.impulse[:, rows] * (same & touch)
        contacts += start, start * (missed > 0)
        order, disputed = np.tile(np.arange(18)[:, None], len(rows)), touch[2:].any(0) | deep
        order[:, disputed] = self._order(k, rows[disputed])
        order = np.where(touch, order, 1000)  # only the first K contacts touch anywhere
        order = np.argsort(order, 0, kind="stable")[:touch.sum(0).max()]
        impulse = np.zeros((18, len(rows)))
        velocity, spin, impulse[order, every] = solve_contacts(
            *(values[order, every] for values in contacts))
        held = touch | touch[PARTNER]
        for memory, value in (self.touched, clock), (self.corner, corner), (self.impulse, impulse):
            memory[:, rows] = np.where(held, value, memory[:, rows])
        return velocity, spin, impulse[:2]

    def _order(self, k, rows):
        """When the solver visits each of the 18 contacts, (18, n): smaller is earlier.

        Squeezed between agent and wall, ten sweeps do not converge, and their order decides where
        the block goes. Chipmunk lists contacts leaf by leaf, in the order of its tree; under a
        leaf, the pairs that it forms with earlier leaves and walls, the newest first. A leaf that
        has just moved makes its pairs anew: with walls first, in the walls' tree order.
        """
        self._follow(k + 1, rows)
        rank, moved = self.rank[:, rows], self.moved[:, rows]
        block, agent = rank[:2], rank[2]
        now = moved[:2] == self.clock[rows] + k
        paired = 4 * np.maximum(moved[:2], moved[2]) + block
        walls_first = now | (moved[:2] == moved[2])
        contacts = np.where(agent > block, 16 * agent + (paired < paired[::-1]),
                            16 * block + np.where(walls_first, 5, -1))
        wall = np.arange(4)[:, None, None]
        walls = (16 * block + np.where(now, 3 - wall, wall)).reshape(8, -1)
        return np.concatenate([contacts, np.repeat(walls, 2, 0)])

    def _follow(self, until, rows=slice(None)):
        """Follow Chipmunk's tree of bounding boxes over the step's first substeps, `until`.

        A leaf's box is fattened; when the shape leaves it, the leaf is taken out, fattened anew
        in the direction of its motion, and put back before the leaf with which the tree grows
        least (cpBBTree.c LeafUpdate, SubtreeInsert). `rank` is the order of the three leaves.
        """
        center, rotation, agent = self.motion[:3, :until, None, rows]
        middle = np.concatenate([center + BOX_MIDDLES * rotation, agent], 1)
        middle = np.stack([middle.real, middle.imag])  # x and y, substep, leaf, environment
        half, cos, sin = np.full_like(middle, AGENT_RADIUS), abs(rotation.real), abs(rotation.imag)
        half[:, :, :2] = HALF_LONG * cos + HALF_WIDE * sin, HALF_LONG * sin + HALF_WIDE * cos
        box = np.concatenate([middle - half, -middle - half])
        envs, time = np.arange(len(self.clock))[rows], np.arange(until)[:, None]
        out = (self.boxes[:, None, :, rows] > box).any(0)
        out &= (self.clock[rows] + time)[:, None] > self.moved[:, rows]  # since it changed
        while np.count_nonzero(out):  # one event of each environment in turn
            column = np.flatnonzero(out.any((0, 1)))
            substep, leaf = np.divmod(out[:, :, column].reshape(3 * until, -1).argmax(0), 3)
            env, new = envs[column], box[:, substep, leaf, column]
            speed = self.motion[np.where(leaf == 2, 4, 3), substep, env]
            ahead, margin = 0.1 / DT * as_floats(speed).T, -0.1 * (new[:2] + new[2:])
            new[:2] -= np.maximum(margin, -ahead)
            new[2:] -= np.maximum(margin, ahead)
            self.boxes[:, leaf, env], self.moved[leaf, env] = new, self.clock[env] + substep
            # Of the other two, in their order, the leaf joins that by which the tree grows less.
            order = self.rank[:, env].argsort(0).T
            others = order[order != leaf[:, None]].reshape(-1, 2).T
            old, new = self.boxes[:, others, env], new[:, None]
            both, other = ((left + right) * (top + bottom)
                           for left, top, right, bottom in (np.minimum(old, new), old))
            grown = both + other[::-1]
            away = np.abs(old[:2] - old[2:] - new[:2] + new[2:]).sum(0)
            less = np.where(grown[0] == grown[1], away[1] < away[0], grown[1] < grown[0])
            self.rank[leaf, env], self.rank[others, env] = less, (1 - less, 2 + 0 * less)
            out[:, leaf, column] = (time > substep) & (new > box[:, :, leaf, column]).any(0)


# Environment -------------------------------------------------------------------------------------

def start_full(rng):
    """The benchmark's start law and gym-pusht 0.1.8's very numbers: (5,) state."""
    agent, block = rng.integers(50, 450, 2), rng.integers(100, 400, 2)
    return np.concatenate([agent, from_legacy([*block, rng.uniform(-np.pi, np.pi)])])


def start_near(rng):
    """Block within 60 px and 0.75 rad of the goal, agent anywhere free of the block: (5,) state."""
    away = 60 * np.sqrt(rng.uniform()) * np.exp(2j * np.pi * rng.uniform())
    pose = GOAL + [away.real, away.imag, rng.uniform(-0.75, 0.75)]
    agents = rng.uniform(50, 450, (32, 2))  # at least one of 32 is free, but for a chance of 1e-30
    local = (agents - pose[:2]) @ [1, 1j] * np.exp(-1j * pose[2]) - CENTER
    free = (circle_contacts(local)[2] > AGENT_RADIUS).all(0)
    return np.concatenate([agents[free.argmax()], pose])


START = {"full": start_full, "near": start_near}
OBSERVATIONS = "state", "keypoints", "pixels"


class PushT:
    """B environments in one. An environment's results do not depend on its neighbours.

    task: "full" (the benchmark's starts) or "near"; observation: "state" (B, 5), "keypoints"
    (B, 18: eight corners, agent) or "pixels" (B, 96, 96, 3) uint8; truncated after max_steps.
    ValueError for other choices, and for states and actions that are not finite or misshapen.
    """

    def __init__(self, num_envs=1, task="full", success_threshold=0.95, max_steps=300,
                 observation="state"):
        for name, value, allowed in (("task", task, START),
                                     ("observation", observation, OBSERVATIONS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
        self.num_envs, self.task, self.observation = num_envs, task, observation
        self.success_threshold, self.max_steps = success_threshold, max_steps
        self.reset(0)

    def reset(self, seed=0):
        """Start anew: environment i from seed + i, or from seed[i]; returns the observation."""
        seeds = seed + np.arange(self.num_envs) if np.ndim(seed) == 0 else seed
        return self.set_state([START[self.task](np.random.default_rng(int(s))) for s in seeds])

    def set_state(self, state):
        """Set exactly this state (B, 5), see `state`, all at rest; returns the observation."""
        self._world = World(self._checked("state", state, 5))
        self.steps, self.max_coverage = np.zeros(self.num_envs, int), np.zeros(self.num_envs)
        self._coverage = block_coverage(self.block_pose())
        return self.observe()

    def step(self, actions):
        """One control step of 0.1 s; actions (B, 2): the agents' targets [px].

        Returns observation, reward (B,) = min(coverage / threshold, 1), terminated (B,), truncated
        (B,) and info: coverage, max_coverage since the start, is_success. It never resets anything.
        """
        moved = self._world.drive(self._checked("actions", actions, 2) @ [1, 1j])
        if len(moved):
            self._coverage[moved] = block_coverage(self.block_pose()[moved])
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
        if self.observation == "pixels":
            return self.render()
        if self.observation == "keypoints":
            corners = keypoints(self.block_pose()).reshape(self.num_envs, 16)
            return np.concatenate([corners, as_floats(self._world.agent)], 1)
        return self.state()

    def render(self, size=96):
        """Pictures of all environments, (B, size, size, 3) uint8."""
        return draw_states(self.state(), size)

    def keep(self, mask):
        """Go on with the environments where mask (B,) is true, drop the others."""
        self._world, self._coverage = self._world.part(np.flatnonzero(mask)), self._coverage[mask]
        self.steps, self.max_coverage = self.steps[mask], self.max_coverage[mask]
        self.num_envs = len(self.steps)


def play(env, act, history=1):
    """Let a policy act in all environments at once, each until success or for env.max_steps.

    act: the last states (B, history, 5) -> the next targets (B, K, 2) px, all K to be carried out.
    Returns arrays: max_coverage and final_coverage (B,), length (B,) in control steps, and states
    (longest + 1, B, 5). Plays on from the state that `env` is in.
    """
    states, coverage = [env.state()], [env.coverage()]
    with tqdm(total=env.max_steps, desc="playing", mininterval=1, leave=False) as bar:
        while len(states) <= env.max_steps and (env.max_coverage <= env.success_threshold).any():
            past = [states[max(0, len(states) - back)] for back in range(history, 0, -1)]
            chunk = act(np.stack(past, 1)).swapaxes(0, 1)[:env.max_steps + 1 - len(states)]
            for targets in chunk:
                env.step(targets)
                states.append(env.state())
                coverage.append(env.coverage())
            success = (env.max_coverage > env.success_threshold).mean()
            bar.set_postfix(success=f"{success:.2f}", refresh=False)
            bar.update(len(chunk))
    coverage, every = np.stack(coverage), np.arange(env.num_envs)
    succeeded = coverage > env.success_threshold
    length = np.where(succeeded.any(0), succeeded.argmax(0), len(coverage) - 1)
    return dict(max_coverage=np.maximum.accumulate(coverage)[length, every],
                final_coverage=coverage[length, every], length=length, states=np.stack(states))


# Picture -----------------------------------------------------------------------------------------
COLORS = {"board": (255, 255, 255), "goal": (144, 238, 144), "fill": (143, 163, 184),
          "edge": (119, 136, 153), "agent": (78, 126, 255), "rim": (65, 105, 225),
          "wall": (211, 211, 211)}  # gym-pusht's


@lru_cache(maxsize=4)  # one for each size
class Painter:
    """Draws states as gym-pusht does: shapes on a 512 px canvas, resampled bilinearly to `size`.

    Only the two canvas rows and columns on which a row or column of the result depends, its
    "taps", are computed, and only in a window around block and agent.
    """

    def __init__(self, size):
        self.size = size
        place = (np.arange(size) + 0.5) * BOARD / size - 0.5  # of the result's pixels on the canvas
        first = np.clip(np.floor(place), 0, BOARD - 2)
        share = np.clip(place - first, 0, 1)
        self.taps = np.stack([first, first + 1], 1).ravel().astype(np.float32)
        self.share = np.stack([1 - share, share], 1).ravel().astype(np.float32)
        out = np.abs(self.taps - MIDDLE) - FREE
        out = np.maximum(out, out[:, None])
        wall = self.shrink((out >= 0) & (out <= 4)).ravel()
        self.walls, self.wall = wall.nonzero()[0], wall[wall > 0, None]
        self.background = np.full((1, size, size, 3), COLORS["board"], np.uint8)
        self.draw_block(self.background, GOAL[None], 0.5, ("goal", "goal"))

    def shrink(self, mask, x=slice(None), y=slice(None)):
        """Bilinear share (..., P, P) of a mask (..., 2P, 2P) on the taps y, x."""
        mask = mask * self.share[x][..., None, :]
        mask = (mask[..., ::2] + mask[..., 1::2]) * self.share[y][..., None]
        return mask[..., ::2, :] + mask[..., 1::2, :]

    def paint(self, images, center, extent, shape, colors):
        """Paint a shape into a window of P x P pixels around center (n, 2) px, in place.

        shape(x, y): the two masks (n, 2P, 2P), one for each color, on the taps x, y (n, 2P) px.
        """
        width = min(int(2 * extent * self.size / BOARD) + 3, self.size)
        first = (center - extent) * self.size / BOARD - 0.5
        first = np.clip(first, 0, self.size - width).astype(int)
        x, y = (2 * first.T[..., None] + np.arange(2 * width))
        shares = [self.shrink(mask, x, y)[:, None] for mask in shape(self.taps[x], self.taps[y])]
        # all windows of all images as one view (n, row, column, 3, P, P): n of them are changed
        windows = np.lib.stride_tricks.sliding_window_view(images, (width, width), (1, 2),
                                                           writeable=True)
        chosen = np.arange(len(images)), first[:, 1], first[:, 0]
        patch = windows[chosen] * (1 - sum(shares)) + np.float32(0.5)
        for share, color in zip(shares, colors):
            patch += share * np.float32(COLORS[color])[:, None, None]
        windows[chosen] = patch.astype(np.uint8)

    def draw_block(self, images, pose, border, colors):
        def shape(x, y):
            turn = np.exp(-1j * pose[:, 2:]).astype(np.complex64)
            x = (x - pose[:, :1].astype(np.float32)) * turn
            y = (y - pose[:, 1:2].astype(np.float32)) * (1j * turn)
            across = np.abs(y.real[..., None] + x.real[:, None])  # the taps in the block's frame
            down = y.imag[..., None] + x.imag[:, None]
            edge = fill = np.zeros(across.shape, bool)
            for (_, top), (half, bottom) in BOXES:
                along = np.abs(down - np.float32((top + bottom) / 2))
                solid = (across <= half + border) & (along <= (bottom - top) / 2 + border)
                inner = (across < half - border) & (along < (bottom - top) / 2 - border)
                fill, edge = inner | (fill & ~solid), (edge | solid) & ~inner
            return fill, edge & ~fill
        corners = keypoints(pose)  # half the block's extent and its edge are 73 px
        self.paint(images, (corners.min(1) + corners.max(1)) / 2, 73, shape, colors)

    def draw_agent(self, images, agent):
        def shape(x, y):
            center = np.rint(agent).astype(np.float32)
            x, y = x - center[:, :1], y - center[:, 1:]
            square = (y * y)[..., None] + (x * x)[:, None]
            inner, disc = square <= (AGENT_RADIUS - 4) ** 2, square <= AGENT_RADIUS ** 2
            return inner, disc & ~inner
        agent = np.clip(agent, -BOARD, 2 * BOARD)
        self.paint(images, agent, AGENT_RADIUS + 1, shape, ("agent", "rim"))

    def draw(self, states):
        images = np.repeat(self.background, len(states), 0)
        self.draw_block(images, states[:, 2:], 2.5, ("fill", "edge"))
        self.draw_agent(images, states[:, :2])
        pixels = images.reshape(len(states), -1, 3)
        wall = self.wall * np.float32(COLORS["wall"])
        walled = pixels.take(self.walls, 1) * (1 - self.wall) + wall + np.float32(0.5)
        pixels[:, self.walls] = walled.astype(np.uint8)
        return images


def draw_states(states, size=96):
    """Pictures of states (..., 5) as gym-pusht draws them: (..., size, size, 3) uint8 RGB."""
    states = np.asarray(states, float)
    chunks = np.split(states.reshape(-1, 5), range(16, states.size // 5, 16))  # fit into the cache
    images = np.concatenate([Painter(size).draw(chunk) for chunk in chunks])
    return images.reshape(*states.shape[:-1], size, size, 3)


def draw_rollouts(states, lengths, folder):
    """Save the first eight rollouts: `rollouts.png`, the agents' ways, and the film `rollout.gif`.

    states (steps + 1, B, 5); lengths (B,): the steps of each rollout that count; folder: a path.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.minimum(lengths[:8], len(states) - 1)
    times = np.arange(lengths.max() + 1)[:, None]
    states = states[np.minimum(times, lengths), np.arange(len(lengths))]  # each waits at its end
    figure = Figure(figsize=(8, 4.2))
    axes = figure.subplots(2, 4).ravel()
    for axis in axes:
        axis.set_axis_off()
    images = [axis.imshow(picture, extent=(0, BOARD, BOARD, 0))
              for axis, picture in zip(axes, draw_states(states[-1], 192))]
    for i, coverage in enumerate(block_coverage(states[-1, :, 2:])):
        axes[i].plot(*states[:lengths[i] + 1, i, :2].T, color="tab:orange", linewidth=1)
        axes[i].set_title(f"{lengths[i]} steps, coverage {coverage:.2f}", fontsize=8)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.94, 0.04, 0.12)
    figure.savefig(folder / "rollouts.png", dpi=120)
    for axis in axes[:len(images)]:
        axis.lines[0].remove()
        axis.set_title("")

    def show(time):
        for image, picture in zip(images, draw_states(states[time], 192)):
            image.set_data(picture)
    times = [*range(0, len(states), 3), *[-1] * 5]  # the end stays for a while
    FuncAnimation(figure, show, times).save(folder / "rollout.gif", PillowWriter(fps=10), dpi=60)


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
_FACES = [(-52, 52, 7, 1j), (-8 + 120j, 8 + 120j, 3, -1j),  # first, last contact, number, normal
          (60 + 15j, 60 + 15j, 1, -1), (-60 + 15j, -60 + 15j, 1, 1),
          (52 + 30j, 36 + 30j, 2, -1j), (-52 + 30j, -36 + 30j, 2, -1j),
          (15 + 50j, 15 + 112j, 4, -1), (-15 + 50j, -15 + 112j, 4, 1)]
_NODES = CORNERS[[0, 1, 2, 6, 7, 3]] + (AGENT_RADIUS + CLEARANCE) * np.array(
    [-1 - 1j, 1 - 1j, 1 + 1j, 1 + 1j, -1 + 1j, -1 + 1j])  # a ring around the convex corners


def _straight(start, end):
    """Lengths of the straight ways from start to end, + FORBIDDEN where too near the block."""
    way, blocked = end - start, False
    reach = AGENT_RADIUS + CLEARANCE - 0.01  # sliding along the outline is allowed
    for low, high in zip(LOW - reach, HIGH + reach):
        x = crossing(start.real, way.real, low[0], high[0])
        y = crossing(start.imag, way.imag, low[1], high[1])
        enter, leave = np.maximum(x[0], y[0]), np.minimum(x[1], y[1])
        blocked |= (enter < leave) & (leave > 0) & (enter < 1)
    return np.abs(way) + FORBIDDEN * blocked


def _outside(points):
    """The nearest points at which the agent keeps CLEARANCE. Block frame, any shape."""
    side, x, y = np.where(points.real < 0, -1, 1), np.abs(points.real), points.imag
    (wide, notch), (narrow, end) = HIGH + AGENT_RADIUS + CLEARANCE  # the outline, by symmetry of
    top = LOW[0, 1] - AGENT_RADIUS - CLEARANCE  # its right half only
    inside = (y > top) & (y < end) & (x < np.where(y < notch, wide, narrow))
    exits = np.stack([x + 1j * top, wide + 1j * np.minimum(y, notch), x + 1j * end,
                      np.maximum(x, narrow) + 1j * notch, narrow + 1j * np.maximum(y, notch)])
    nearest = np.abs(exits - (x + 1j * y)).argmin(0)
    exits = np.take_along_axis(exits, nearest[None], 0)[0]
    return np.where(inside, side * exits.real + 1j * exits.imag, points)


def _ways(start, closed=np.zeros(6)):
    """Ways of the agent from start (B,) to the K places _WAIT; closed (B, 6): added cost of nodes.

    Returns the lengths straight and along the ring, (B, K), that of the way along the ring from
    each first node to each last, (B, 6, 6), and the sense in which it goes, +1 or -1.
    """
    edges = np.abs(np.roll(_NODES, -1) - _NODES) + closed + np.roll(closed, -1, -1)
    position = np.concatenate([np.zeros_like(edges[..., :1]), edges.cumsum(-1)], -1)
    total = position[..., -1:, None]
    forward = (position[..., None, :6] - position[..., :6, None]) % total
    ring = np.minimum(forward, total - forward)
    to_node = (_straight(start[:, None], _NODES) + closed)[:, :, None] + ring
    by_ring = (to_node.min(1)[:, :, None] + _TAIL).min(1)
    return _straight(start[:, None], _WAIT), by_ring, to_node, np.where(forward <= ring, 1, -1)


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


def _plan(error, turn, travel):
    """The first of the one or two pushes that together cost least.

    error (B,) px, turn (B,) in the goal's frame, travel (B, K) px to the contacts -> contact (B,)
    """
    share = np.clip(_distance(error, turn) / FAR, NEAREST_SHARE, 1)[:, None, None]
    error, turn = error[:, None, None], turn[:, None, None]
    rate, pivot = _RATE[:, None], error + turn * _PIVOT[:, None]
    first = _best_turn(error, turn, pivot, rate)  # (B, K, 1): as if it were the only push
    for refine in (True, False):
        middle, turned = pivot + (error - pivot) * np.exp(1j * first), turn * np.exp(1j * first)
        pivot2 = middle + turned * _PIVOT
        second = _best_turn(middle, turned, pivot2, _RATE)  # (B, K, K)
        end, turned = pivot2 + (middle - pivot2) * np.exp(1j * second), turned * np.exp(1j * second)
        if refine:  # one Gauss-Newton step for both angles; exact in the limit of short pushes
            arm, arm2 = end - pivot, end - pivot2
            slope, slope2 = (cross(a, end) + _SPREAD * turned.imag for a in (arm, arm2))
            a, b, c = (dot(*pair) + _SPREAD for pair in ((arm, arm), (arm2, arm2), (arm, arm2)))
            both = (c * slope2 - b * slope) / (1.001 * a * b - c * c)  # 1.001: the same pivot twice
            first = first + np.clip(np.where(second != 0, both, -slope / a), -0.5, 0.5)
            first = np.where(first * rate > 0, first, 0)
    again = second != 0
    effort = (TRAVEL_COST * (travel[:, :, None] + again * _CHANGE) + PUSH_COST * (1 + again)
              + LENGTH_COST * (first / rate + second / _RATE))
    cost = np.hypot(_distance(end, turned), TOLERANCE) + share * effort
    cost = cost + FORBIDDEN * (first == 0)  # to wait is no plan
    return cost.min(2).argmin(1)


def expert_action(state):
    """The expert's action, where to move the agent next: (B, 5) state -> (B, 2) px.

    It depends on the state alone, never on a running plan, for a policy sees only the state. Plan
    the pushes afresh; if the agent is in the lane before the best contact, push along the inward
    normal, else travel there around the block.
    """
    rows, state = np.arange(len(state)), np.asarray(state, float)
    rotation, goal_rotation = np.exp(1j * state[:, 4]), np.exp(1j * GOAL[2])
    center = state[:, 2:4] @ [1, 1j] + rotation * CENTER
    local = (state[:, :2] @ [1, 1j] - center) / rotation  # the agent
    error = (center - complex(*GOAL[:2])) / goal_rotation - CENTER
    turn = rotation / goal_rotation
    places = as_floats(center[:, None] + rotation[:, None] * np.concatenate([_NODES, _CONTACT]))
    off_board = FORBIDDEN * (np.abs(places - BOARD / 2).max(-1) > 253)
    offset = local[:, None] - _CONTACT
    gap, aside = -dot(_NORMAL, offset), np.abs(cross(_NORMAL, offset))
    in_lane = (gap > -4) & (gap < CLEARANCE + 1) & (aside < 4 + 0.6 * np.maximum(gap, 0))
    start = _outside(local)
    direct, by_ring, to_node, sense = _ways(start, off_board[:, :6])
    way = np.abs(start - local)[:, None] + np.minimum(direct, by_ring) + CLEARANCE
    travel = np.where(in_lane, np.abs(gap) + aside, way) + off_board[:, 6:]

    k = _plan(error, turn, travel)
    in_lane, gap, aside, way, direct, by_ring = (
        values[rows, k] for values in (in_lane, gap, aside, way, direct, by_ring))
    push_ahead, travel_ahead = (np.minimum(low + slope * _distance(error, turn), high)
                                for low, slope, high in (PUSH_AHEAD, TRAVEL_AHEAD))
    # In the lane: ahead along the push, less where the agent is not yet in touch or off the line.
    depth = push_ahead - 0.5 * np.maximum(gap, 0) - aside
    push = _CONTACT[k] + depth * np.where(depth > 0, _ADVANCE[k], _NORMAL[k])
    # Else: ahead along the way, a line of five points.
    last = (to_node.min(1) + _TAIL.T[k]).argmin(1)
    node = to_node[rows, :, last].argmin(1)
    after = _NODES[(node + sense[rows, node, last]) % 6]
    straight = direct <= by_ring
    arrives = straight | (node == last)
    line = np.stack([local, start, np.where(straight, _WAIT[k], _NODES[node]),
                     np.where(arrives, _WAIT[k], after), np.where(arrives, _CONTACT[k], after)], 1)
    pieces = np.diff(line, axis=1)
    lengths = np.abs(pieces)
    ahead = np.minimum(travel_ahead, push_ahead + 0.5 * way)[:, None]  # slower on arrival
    done = np.clip((ahead - lengths.cumsum(1) + lengths) / np.maximum(lengths, 1e-9), 0, 1)
    target = center + rotation * np.where(in_lane, push, local + (done * pieces).sum(1))
    return np.clip(as_floats(target), 0, BOARD)


def expert_demonstrations(count, task="full", seed=0):
    """Let the expert play until `count` episodes have reached STOP_COVERAGE.

    The recorded action is the expert's. The executed one carries autocorrelated noise in two
    episodes of three, so that recoveries are shown (DART, arXiv 1703.09327). CLOSE_SHARE of the
    episodes start closer to the goal, where success is decided. Episodes that fail are drawn again.

    Returns a dict of state (N, 5) float32, action (N, 2) float32 px chosen in that state, and
    episode_ends (count,) int64.
    """
    rng, episodes = np.random.default_rng([seed, 1]), []  # a stream that PushT.reset never uses
    with tqdm(total=count, desc="demonstrations", mininterval=1, disable=count < 20) as bar:
        while len(episodes) < count:
            number = count - len(episodes)
            env = PushT(number, task)
            start = np.array([START[task](rng) for _ in range(number)])
            if task == "near":  # a policy that loses the block must find the way back
                for i in np.flatnonzero(rng.random(number) < WIDE_SHARE):
                    start[i] = start_full(rng)
            for i in np.flatnonzero(rng.random(number) < CLOSE_SHARE):
                start[i] = start_near(rng)
                move = (np.exp(rng.uniform(np.log(0.08), 0)) - 1) * (start[i, 2:] - GOAL)
                start[i] += *move[:2], *move  # to 5..60 px
            state, alive = env.set_state(start), np.arange(number)
            size, noise = rng.permutation(np.resize(NOISE, number))[:, None], np.zeros((number, 2))
            states = np.zeros((number, env.max_steps, 5), np.float32)
            actions = np.zeros((number, env.max_steps, 2), np.float32)
            ends = np.zeros(number, int)
            for step in range(env.max_steps):
                action = expert_action(state)
                states[alive, step], actions[alive, step] = state, action
                done = env.max_coverage > STOP_COVERAGE  # so the last recorded state is beyond it
                ends[alive[done]] = step + 1
                bar.update(int(done.sum()))
                noise = 0.8 * noise + 0.6 * size[alive] * rng.standard_normal(noise.shape)
                action = np.clip(action + noise, 0, BOARD)[~done]
                alive, noise = alive[~done], noise[~done]
                env.keep(~done)
                if not len(alive):
                    break
                state = env.step(action)[0]
            episodes += [(states[i, :end], actions[i, :end]) for i, end in enumerate(ends) if end]
    states, actions = (np.concatenate(part) for part in zip(*episodes))
    return {"state": states, "action": actions,
            "episode_ends": np.cumsum([len(episode) for episode, _ in episodes])}


# Demonstrations and lesson -----------------------------------------------------------------------

def load_demonstrations(path):
    """Read demonstrations in the layout of the public human data: a dict of arrays.

    state (N, 5): the observation in which action (N, 2), the agent's target, was chosen, both in
    px, all episodes in a row; episode_ends (E,): where each ends. ValueError if it is not so.
    """
    try:
        with np.load(path) as file:
            data = {name: file[name] for name in ("state", "action", "episode_ends")}
    except KeyError as error:
        raise ValueError(f"{path} lacks an array; needed are state, action and episode_ends: "
                         f"{error.args[0]}") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    for name, width in ("state", 5), ("action", 2):
        values = data[name]
        if values.dtype.kind not in "fiu" or values.shape[1:] != (width,):
            raise ValueError(f"{path}: {name} is {values.dtype} of shape {values.shape}; expected "
                             f"numbers of shape (N, {width})")
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    number, ends = len(data["state"]), data["episode_ends"]
    if number != len(data["action"]):
        raise ValueError(f"{path}: {number} states, but {len(data['action'])} actions")
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or len(ends) == 0:
        raise ValueError(f"{path}: episode_ends is {ends.dtype} of shape {ends.shape}; expected "
                         "integers of shape (E,), at least one")
    if (np.diff(ends.astype(int), prepend=0) <= 0).any() or ends[-1] != number:
        raise ValueError(f"{path}: episode_ends must increase and end at {number}, the "
                         f"number of states; they go from {ends[0]} to {ends[-1]}")
    return data


class Game:
    """A window in which the mouse moves the agent at 10 Hz; adds the kept episodes to a file."""

    def __init__(self, path, task, seed):
        import matplotlib.pyplot as plt
        if plt.get_backend().lower() == "agg":
            raise ValueError("no window can be opened: install a GUI toolkit for matplotlib "
                             "(tkinter or PyQt) and run where there is a display")
        self.env, self.path, self.seed = PushT(task=task), Path(path), seed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.data = load_demonstrations(path) if self.path.exists() else {
            "state": np.zeros((0, 5), np.float32), "action": np.zeros((0, 2), np.float32),
            "episode_ends": np.zeros(0, int)}
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

    def next_scene(self, keep=False):
        if keep and self.states:
            new = {"state": np.float32(self.states), "action": np.float32(self.actions),
                   "episode_ends": [len(self.data["state"]) + len(self.states)]}
            self.data = {name: np.concatenate([self.data[name], new[name]]) for name in new}
            unfinished = self.path.with_name("unfinished-" + self.path.name)
            np.savez_compressed(unfinished, **self.data)
            unfinished.replace(self.path)  # the old file stays whole until the new one is
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
        if event.key in ("k", "r"):  # matplotlib itself closes the window on "q"
            self.next_scene(keep=event.key == "k")

    def on_tick(self):
        if self.target is not None:
            self.states.append(self.env.state()[0])
            self.actions.append(self.target)
            _, _, terminated, _, info = self.env.step(self.target[None])
            self.draw(f"coverage {info['coverage'][0]:.3f}, best {info['max_coverage'][0]:.3f}")
            if terminated[0]:
                self.next_scene(keep=True)

    def draw(self, text):
        self.image.set_data(self.env.render(512)[0])
        self.axis.set_title(f"{text}\n{len(self.data['episode_ends'])} kept in {self.path}; "
                            "keys: k keep, r restart, q quit", fontsize=9)
        self.image.figure.canvas.draw_idle()


def lesson(folder, task):
    """Play the expert on eight scenes, print what happens, save a picture and a GIF."""
    env = PushT(8, task)
    state = env.reset(0)
    print(f"8 scenes of task {task!r}; the state {state.shape} is agent x, y, block x, y and angle.\n"
          f"Scene 0: {np.round(state[0], 2)}, coverage {env.coverage()[0]:.3f}")
    result = play(env, lambda past: expert_action(past[:, -1])[:, None])
    for step, states in list(enumerate(result["states"]))[::25]:
        print(f"step {step:3d}: coverage {np.round(block_coverage(states[:, 2:]), 2)}")
    success = result["max_coverage"] > env.success_threshold
    print(f"coverage above {env.success_threshold} in {success.sum()} of 8 scenes, after "
          f"{result['length'].mean():.0f} steps in the mean")
    draw_rollouts(result["states"], result["length"], folder)
    print(f"saved {folder}/rollouts.png and {folder}/rollout.gif")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The PushT lesson, or a game that records.")
    parser.add_argument("--play", action="store_true", help="push the block with the mouse")
    parser.add_argument("--task", choices=START, default="full")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene to play")
    parser.add_argument("--output", help="the lesson's folder (runs/lessons/sim_pusht), or the "
                        "file that keeps the played episodes (runs/play/demonstrations.npz)")
    options = parser.parse_args()
    try:
        if options.play:
            Game(options.output or "runs/play/demonstrations.npz", options.task, options.seed)
        else:
            lesson(options.output or "runs/lessons/sim_pusht", options.task)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"sim_pusht.py: {error}\n")
