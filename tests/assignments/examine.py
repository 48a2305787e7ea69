"""The process in which one answer is examined: pytest in a folder of its own, within limits.

This module is loaded once, in a server whose forks examine the answers. So it loads what is slow to
load, and nothing that holds an answer: not the six files, not the planted mistakes.
"""
import contextlib
import gc
import inspect
import json
import os
import sys
from pathlib import Path

# One thread: the tensors are small. Before torch is loaded, and before numpy.
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot     # noqa: slow to load, as are the next ones
import numpy                 # noqa
import pytest
import torch._dynamo         # noqa: the optimizers load it, which takes seconds
import torch.optim.swa_utils     # noqa
import tqdm                  # noqa

try:
    import resource
except ImportError:     # not on Windows: there are no such limits
    resource = None

ROOT = Path(__file__).resolve().parents[2]
FORKS = hasattr(os, "fork")
CANARIES = "tests/canaries.py"
SETTINGS = "pytest.ini"
FILE_BYTES = 32_000_000
MEMORY_BYTES = 4_000_000_000


class Outcomes:
    """A plug-in of pytest that keeps {test: reason}: "" if it passed, else what went wrong."""

    def __init__(self, stop):
        self.stop = stop
        self.reasons = {}
        self.about = {}     # {test: its docstring}

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_itemcollected(self, item):
        self.about[item.nodeid] = inspect.getdoc(getattr(item, "function", None)) or ""

    def pytest_runtest_logreport(self, report):
        reason = self.reasons.get(report.nodeid) or self.why(report)
        self.reasons[report.nodeid] = reason
        if reason and self.stop and not report.nodeid.startswith(CANARIES):
            self.session.shouldstop = "one is enough"

    def pytest_collectreport(self, report):
        if not report.passed:
            self.reasons[report.nodeid] = self.why(report)

    def why(self, report):
        if report.passed:
            return ""
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = str(crash.message if crash else report.longrepr).strip().splitlines()
        # Of an error while a file is imported, the lines that begin with "E" say what it was.
        errors = [line[1:] for line in lines if line.startswith("E ")]
        said = " ".join(" ".join(errors or lines).split()) or report.outcome
        about = " ".join(self.about.get(report.nodeid, "").split())
        return shortened(said, 200) + (f" | The test is about: {shortened(about, 240)}" if about else "")


def shortened(text, most):
    return text if len(text) <= most else text[:most] + " ..."


def limit(seconds):
    """No more than this: processor time, bytes in a file, memory."""
    processor = int(seconds) + 1
    limits = {"RLIMIT_CPU": (processor, processor + 2),     # SIGXCPU, then SIGKILL
              "RLIMIT_FSIZE": (FILE_BYTES, FILE_BYTES), "RLIMIT_DATA": (MEMORY_BYTES, MEMORY_BYTES)}
    for name, soft_and_hard in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):     # not on this system
            resource.setrlimit(getattr(resource, name), soft_and_hard)


def forget_repository():
    """What an answer imports is the copy in its folder, and nothing of the instructor's files."""
    folders = ROOT, ROOT / "tests"
    ours = {"tests"} | {path.stem for folder in folders for path in folder.glob("*.py")}
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in folders]


def be_alone(seconds):
    """A process group of its own, which can be killed as a whole; limits; nothing to read or say."""
    if FORKS:
        os.setsid()
        limit(seconds)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def examine(folder, result, arguments, seconds, stop=True, seed=0):
    """Run pytest in `folder` and write {test: reason} to the file `result`; never returns.

    Nothing of the surroundings counts: no pytest.ini of a folder above, no PYTEST_ variable.
    """
    be_alone(seconds)
    forget_repository()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ.update(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", QUESTION_SEED=str(seed))
    gc.freeze()     # pytest looks for garbage twice, and torch's objects make that take a second
    dump, write, leave = json.dumps, Path(result).write_text, os._exit
    outcomes = Outcomes(stop)
    pytest.main(["-s", "-q", "--tb=line", "-p", "no:cacheprovider", "-c", SETTINGS,
                 f"--rootdir={folder}", f"--confcutdir={folder}", f"--basetemp={folder}-tmp",
                 *arguments, CANARIES], plugins=[outcomes])
    write(dump(outcomes.reasons))
    leave(0)
