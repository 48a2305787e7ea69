"""One thread for every test: the tensors are small, and two threads that wait for each other on a
busy machine take ten times as long. Has to be set before anything imports torch or numpy."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "stress: minutes of kills, faults and load; python -m pytest "
                            "-m stress")
    config.option.markexpr = config.option.markexpr or "not stress"
