"""Tests that have to fail. Asked after a question's own tests, in the same process: if one of them
passes, the submission has changed what tests rely on, and no test of its can be believed."""
import math

import numpy as np
import pytest
import torch

ZEROS = torch.zeros(3)
ONES = torch.ones(3)


def test_assert():
    assert math.pi == 3


def test_failure_is_reported():
    pytest.fail("as it must")


def test_error_expected():
    with pytest.raises(ValueError):
        pass


def test_approximately():
    assert 1.0 == pytest.approx(1.1)


def test_tensors_close():
    torch.testing.assert_close(ZEROS, ONES)


def test_tensors_equal():
    assert torch.equal(ZEROS, ONES)


def test_tensors_nearly():
    assert torch.allclose(ZEROS, ONES)


def test_tensor_operators():
    assert (ZEROS == ONES).all() or (ZEROS > ONES).any() or (ZEROS - ONES).abs().max() < 0.5


def test_arrays_close():
    np.testing.assert_allclose(np.zeros(3), np.ones(3))


def test_arrays_equal():
    np.testing.assert_array_equal(np.zeros(3), np.ones(3))


def test_arrays_nearly():
    assert np.allclose(np.zeros(3), np.ones(3)) or np.array_equal(np.zeros(3), np.ones(3))
