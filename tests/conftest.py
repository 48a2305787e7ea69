"""One thread for every test: the tensors are small, and two threads that wait for each other on a
busy machine take ten times as long. Has to be set before anything imports torch or numpy."""
import dataclasses
import functools
import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    # Started in a shell's background, this process and its children would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "stress: minutes of kills, faults and load; python -m pytest "
                            "-m stress")
    config.addinivalue_line("markers", "zoo: minutes of every planted bug and of forty submissions; "
                            "python -m pytest -m zoo")
    config.option.markexpr = config.option.markexpr or "not stress and not zoo"


@pytest.fixture(scope="module")
def short_episodes():
    """train.evaluate ends after 20 steps: for tests of what is around it."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", functools.partial(train.evaluate, max_steps=20))
        yield


@pytest.fixture(scope="session")
def set_intervals():
    """set_intervals(patch, log_every=5, play_every=10): from then on, runs log and play so often.

    patch: a MonkeyPatch, which takes it back. Intervals: log_every, checkpoint_every, play_every, all
    counted in updates.
    """
    import train

    def set_them(patch, **intervals):
        original = train.settings
        patch.setattr(train, "settings",
                      lambda config: dataclasses.replace(original(config), **intervals))
    return set_them
