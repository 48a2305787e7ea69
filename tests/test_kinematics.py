"""The planar arm against geometry, autograd and finite differences; its motion by statistics.

The oracles are written in numpy with complex numbers (a link is length * exp(i heading)), a form
that kinematics.py does not use. The statistical bounds leave wide margins around what 4,096
windows give; they fail when a kind of motion is missing, not when a number drifts.
"""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kinematics import BOARD, MOTIONS, Motion, PlanarArm

ROOT = Path(__file__).parent.parent

QUARTER = math.pi / 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def complex_forward(angles, lengths, base):
    """Angles (...,N) -> end effector (...,2), link by link, in float64."""
    end, heading = complex(*base), 0.0
    for n, length in enumerate(lengths):
        heading = heading + angles[..., n]
        end = end + length * np.exp(1j * heading)
    return np.stack([end.real, end.imag], -1)


@pytest.fixture(scope="module")
def arm():
    return PlanarArm()


@pytest.fixture(scope="module")
def windows(arm):
    return arm.sample_windows(4096, 16, seeded())


# Forward kinematics and Jacobian -----------------------------------------------------------------

@pytest.mark.parametrize("angles, expected", [
    ([0, 0, 0], (256 + 670, -60)),                      # stretched out to the right
    ([QUARTER, 0, 0], (256, -60 + 670)),                # stretched out downwards (y points down)
    ([0, QUARTER, 0], (256 + 300, -60 + 250 + 120)),    # one right angle, at the first elbow
    ([0, QUARTER, QUARTER], (256 + 300 - 120, -60 + 250)),
    ([QUARTER, math.pi, 0], (256, -60 + 300 - 370)),    # folded back on itself
    ([math.pi, -QUARTER, -QUARTER], (256 - 300 + 120, -60 + 250)),
])
def test_forward_at_known_poses(arm, angles, expected):
    position = arm.forward(torch.tensor(angles, dtype=torch.float64))
    assert position.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("lengths, base", [((400.0, 400.0), (0.0, 0.0)),
                                           ((300.0, 250.0, 120.0), (256.0, -60.0)),
                                           ((200.0, 50.0, 300.0, 100.0, 150.0), (600.0, 256.0))])
def test_forward_and_jacobian_for_any_number_of_links(lengths, base):
    arm, N = PlanarArm(lengths, base), len(lengths)
    angles = 6 * torch.rand(7, 5, N, dtype=torch.float64, generator=seeded()) - 3
    expected = complex_forward(angles.numpy(), lengths, base)
    assert np.abs(arm.forward(angles).numpy() - expected).max() < 1e-9

    jacobian = arm.jacobian(angles)
    assert jacobian.shape == (7, 5, 2, N)
    automatic = torch.func.vmap(torch.func.jacrev(arm.forward))(angles.reshape(35, N))
    assert (jacobian.reshape(35, 2, N) - automatic).abs().max() < 1e-9
    for n in range(N):
        step = 1e-6 * np.eye(N)[n]
        slope = (complex_forward(angles.numpy() + step, lengths, base)
                 - complex_forward(angles.numpy() - step, lengths, base)) / 2e-6
        assert np.abs(jacobian[..., n].numpy() - slope).max() < 1e-5


def test_links_keep_their_lengths(arm):
    joints = arm.joints(6 * torch.rand(50, 3, dtype=torch.float64, generator=seeded()) - 3)
    assert joints.shape == (50, 4, 2)
    assert torch.equal(joints[:, 0], torch.tensor([[256.0, -60.0]]).double().expand(50, 2))
    lengths = joints.diff(dim=1).norm(dim=-1)
    assert (lengths - torch.tensor([300.0, 250.0, 120.0])).abs().max() < 1e-9


def test_forward_takes_a_single_pose_and_keeps_dtype(arm):
    for dtype in (torch.float32, torch.float64):
        pose = torch.tensor([1.0, 0.5, -0.5], dtype=dtype)
        assert arm.forward(pose).shape == (2,) and arm.forward(pose).dtype == dtype
        assert arm.jacobian(pose).shape == (2, 3)


# Windows -----------------------------------------------------------------------------------------

def test_inverse_reaches_every_point_of_the_board_without_jumps(arm):
    across = torch.linspace(0, BOARD, 80, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(across, across, indexing="ij"), -1)
    angles = arm.inverse(points)
    reached = complex_forward(angles.numpy(), arm.link_lengths, arm.base)
    np.testing.assert_allclose(reached, points, atol=1e-6)
    spacing = BOARD / 79
    steps = torch.cat([angles.diff(dim=axis).abs().flatten() for axis in (0, 1)])
    assert steps.max() < 0.05 * spacing        # rad: at most 0.05 a px, for the nearest joint is near


def test_inverse_bends_the_elbow_to_the_side_that_it_promises(arm):
    """The mirrored pose reaches the same points: stage 1 would learn another arm, unnoticed.

    With y down, a cross product below 0 means that the forearm turns counter-clockwise.
    """
    points = BOARD * torch.rand(500, 2, dtype=torch.float64, generator=seeded())
    for wrist in (0.0, 0.6):
        angles = arm.inverse(points, wrist)
        assert (angles[:, 2] == wrist).all()
        joints = arm.joints(angles)
        upper, forearm = joints[:, 1] - joints[:, 0], joints[:, 3] - joints[:, 1]
        assert (upper[:, 0] * forearm[:, 1] - upper[:, 1] * forearm[:, 0] < 0).all()


@pytest.mark.parametrize("lengths, base", [((300.0, 250.0, 120.0), (256.0, -60.0)),
                                           ((320.0, 308.0), (256.0, -60.0))])
def test_joint_step_is_the_smallest_motion_that_moves_the_hand(lengths, base):
    """Where the Jacobian is far from singular, the damping of 30 px per rad costs a few per cent."""
    arm = PlanarArm(lengths, base)
    angles, _ = arm.sample_windows(50, 2, seeded())
    pose, displacement = angles[:, 0].double(), torch.tensor([1.0, -2.0]).double().expand(50, 2)
    step = arm.joint_step(pose, displacement)
    exact = torch.linalg.pinv(arm.jacobian(pose)) @ displacement[..., None]
    assert (step - exact[..., 0]).norm(dim=-1).median() < 0.05 * exact.norm(dim=1).median()
    moved = arm.forward(pose + step) - arm.forward(pose)
    assert (moved - displacement).norm(dim=-1).median() < 0.2


@pytest.mark.parametrize("batch, horizon", [(1, 2), (5, 18), (300, 64)])
def test_windows_have_the_shape_asked_for(arm, batch, horizon):
    angles, positions = arm.sample_windows(batch, horizon, seeded())
    assert angles.shape == (batch, horizon, 3) and positions.shape == (batch, horizon, 2)
    assert angles.dtype == positions.dtype == torch.float32
    assert len(positions[:, 0].unique(dim=0)) == batch    # no window appears twice


def test_positions_are_the_forward_kinematics_of_the_angles(windows):
    angles, positions = windows
    expected = complex_forward(angles.double().numpy(), (300, 250, 120), (256, -60))
    assert np.abs(positions.numpy() - expected).max() < 1e-3    # px, float32 rounding


def test_windows_stay_on_the_board_and_within_the_limits(arm):
    for horizon in (2, 18, 64):
        angles, positions = arm.sample_windows(2048, horizon, seeded(horizon))
        assert positions.min() >= 0 and positions.max() <= 512
        for n, (low, high) in enumerate(arm.joint_limits):
            assert angles[..., n].min() >= low and angles[..., n].max() <= high
    assert np.allclose(np.degrees(arm.joint_limits), [(0, 180), (-150, 150), (-150, 150)])


def test_the_same_seed_gives_the_same_windows(arm, windows):
    again, other = arm.sample_windows(4096, 16, seeded()), arm.sample_windows(4096, 16, seeded(1))
    assert torch.equal(windows[0], again[0]) and torch.equal(windows[1], again[1])
    assert not torch.equal(windows[0], other[0])
    generator = seeded()    # a stream: the next call goes on, it does not begin again
    first, second = (arm.sample_windows(8, 16, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)
    arm.sample_windows(2, 4)    # without a generator, torch's global one


@pytest.mark.parametrize("lengths", [(300.0, 250.0, 120.0), (320.0, 308.0)])
def test_motion_is_smooth(lengths):
    """No step is longer than the fastest stroke allows, and no joint or velocity jumps.

    A turn is spread over three steps, so a change of velocity is at most a third of the largest
    difference between two velocities (right around at 18 px a step): 12 px, plus the arm's error.
    The second arm is stretched out in the board's corners, where only the damping slows it down.
    """
    angles, positions = PlanarArm(lengths).sample_windows(12_000, 16, seeded())
    step = positions.diff(dim=1)
    assert step.norm(dim=-1).max() < Motion().travel_speed[1] + 2
    assert step.diff(dim=1).norm(dim=-1).max() < 2 * Motion().travel_speed[1] / 3 + 2
    assert angles.diff(dim=1).abs().max() < 0.25


def test_motion_has_pauses_fine_motion_travel_reversals_and_straight_strokes(windows):
    step = windows[1].diff(dim=1).double().numpy()
    speed = np.linalg.norm(step, axis=-1)
    assert 0.03 < (speed < 0.2).mean() < 0.2                     # stands still
    assert 0.2 < ((speed > 1) & (speed < 4)).mean() < 0.5        # pushes with care
    assert 0.2 < ((speed > 8) & (speed < 18)).mean() < 0.6       # travels
    # Windows that turn right around: the heading flips within three steps.
    before, after = speed[:, :-3], speed[:, 3:]
    cosine = (step[:, :-3] * step[:, 3:]).sum(-1) / (before * after).clip(1e-9)
    flips = (cosine < -0.9) & (before > 1) & (after > 1)
    assert 0.12 < flips.any(1).mean() < 0.4    # 0.2; 0.055 without reversals
    # Windows that go nearly straight: end-to-end distance close to the length of the path.
    direct = np.linalg.norm(windows[1][:, -1] - windows[1][:, 0], axis=-1)
    straight = direct > 0.97 * speed.sum(1)
    assert 0.1 < straight[speed.sum(1) > 15].mean() < 0.7
    # Slow and fast within one window, as when an agent arrives at the block.
    assert ((speed.max(1) > 8) & (speed.min(1) < 4)).mean() > 0.2


def test_windows_cover_the_whole_board_in_every_direction(windows):
    _, positions = windows
    cells, _, _ = np.histogram2d(*positions.reshape(-1, 2).T.numpy(), bins=6,
                                 range=[[0, BOARD], [0, BOARD]])
    share = cells / cells.sum() * cells.size
    assert share.min() > 0.2 and share.max() < 3    # 1 is a uniform visit
    whole = (positions[:, -1] - positions[:, 0]).numpy()
    octant, _ = np.histogram(np.arctan2(whole[:, 1], whole[:, 0]), bins=8, range=(-np.pi, np.pi))
    assert octant.min() > 0.6 * octant.mean() and octant.max() < 1.5 * octant.mean()


def test_motion_settings_reach_the_windows():
    still = PlanarArm(motion=Motion(stand_share=1.0)).sample_windows(64, 16, seeded())[1]
    assert still.diff(dim=1).abs().max() < 1e-3
    only_travel = Motion(stand_share=0.0, push_share=0.0, travel_speed=(10.0, 10.0),
                         stroke_steps=1e9, bend=0.0)
    step = PlanarArm(motion=only_travel).sample_windows(512, 16, seeded())[1].diff(dim=1)
    assert step.norm(dim=-1).median().item() == pytest.approx(10, abs=0.3)


def test_the_other_motions_are_too_fast_and_without_pauses():
    speed = {}
    for name, motion in MOTIONS.items():
        _, positions = PlanarArm(motion=motion).sample_windows(2000, 16, seeded())
        speed[name] = np.linalg.norm(np.diff(positions.numpy(), axis=1), axis=-1)
    assert np.median(speed["fast"]) > 3 * np.median(speed["arm"])
    assert np.mean(speed["arm"] < 1) > 0.08 and np.mean(speed["smooth"] < 1) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_windows_live_on_the_generators_device(arm):
    angles, positions = arm.sample_windows(64, 16, torch.Generator("cuda").manual_seed(0))
    assert angles.is_cuda and positions.is_cuda
    assert (arm.forward(angles.cpu()) - positions.cpu()).abs().max() < 1e-3


# The lesson ---------------------------------------------------------------------------------------

def test_the_lesson_runs_and_saves_its_picture(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "kinematics.py"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "Jacobian" in done.stdout, done.stderr
    assert (tmp_path / "runs" / "lessons" / "kinematics.png").stat().st_size > 10_000


# Wrong input -------------------------------------------------------------------------------------

@pytest.mark.parametrize("lengths", [(), (300.0, -1.0), (300.0, 0.0, 400.0)])
def test_bad_link_lengths_are_an_error(lengths):
    with pytest.raises(ValueError, match="link_lengths must be positive"):
        PlanarArm(lengths)


@pytest.mark.parametrize("lengths, base", [
    ((100.0, 100.0), (256.0, -60.0)),           # too short for the far corners
    ((300.0, 250.0, 120.0), (256.0, -400.0)),   # too far away
    ((900.0, 100.0), (256.0, 256.0)),           # cannot fold back to its own base
])
def test_a_board_out_of_reach_is_an_error(lengths, base):
    with pytest.raises(ValueError, match="but the arm reaches"):
        PlanarArm(lengths, base)


def test_limits_that_keep_the_arm_off_the_board_are_an_error():
    arm = PlanarArm()
    arm.joint_limits = [(-2.0, -1.0), (-0.1, 0.1), (-0.1, 0.1)]    # points away
    with pytest.raises(ValueError, match="stays on the board"):
        arm.sample_windows(16, 16, seeded())


@pytest.mark.parametrize("shape", [(2,), (5, 4), (3, 1)])
def test_wrong_number_of_angles_is_an_error(arm, shape):
    for method in (arm.forward, arm.jacobian):
        with pytest.raises(ValueError, match="must end in 3 joints"):
            method(torch.zeros(shape))


@pytest.mark.parametrize("batch, horizon", [(0, 16), (4, 1), (-1, 16)])
def test_empty_windows_are_an_error(arm, batch, horizon):
    with pytest.raises(ValueError, match="batch must be >= 1 and horizon >= 2"):
        arm.sample_windows(batch, horizon, seeded())
