"""Marks for submissions: each question is graded alone.

Of a submission nothing but the asked functions is used. Each is put into a copy of the reference,
in which the instructor's tests of that question run, in a forked process with a limit on time and
on what it may write. So no mistake costs marks twice, and what a submission says outside of its
functions never runs. After the tests come the canaries, which have to fail: a function that changes
torch, numpy or pytest earns nothing.

This stops accidents and cheap tricks. It is no prison: a function can read and delete what the
account may, look for the tests' bookkeeping in its own process, and leave processes behind that have
left its group. Hence a container, or an account without rights.
"""
import ast
import contextlib
import csv
import gc
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import mutants     # first: it sets the number of threads and loads what is slow to load

import pytest
import torch._dynamo     # noqa: the optimizers load it, which takes seconds
from tqdm import tqdm

try:
    import resource
except ImportError:     # not on Windows: there are no such limits
    resource = None

from tests.assignments import code
from tests.assignments.questions import QUESTIONS

# Forks of a server that has loaded what is slow to load, and nothing else. (Forks of a process that
# has run tests take twice as long.) On Windows each question starts Python anew, 5 s longer.
FORKS = hasattr(os, "fork")
PROCESSES = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    PROCESSES.set_forkserver_preload(["tests.assignments.grade"])
CANARIES = "tests/canaries.py"
NUMBER_OF_CANARIES = Path(__file__).with_name("canaries.py").read_text().count("\ndef test_")
FILE_BYTES = 16_000_000
MEMORY_BYTES = 4_000_000_000
LONGEST_REASON = 160
BLANK = "blank"


class Case(NamedTuple):
    """A changed copy of the reference, and what is asked about it."""
    files: tuple           # pairs (name, text): what is different
    tests: tuple           # ids
    stop: bool = True      # at the first test that fails


# In the process of a case ------------------------------------------------------------------------

class Outcomes:
    """A plug-in of pytest: why each test failed, in one line; "" for those that passed."""

    def __init__(self, stop):
        self.stop = stop
        self.reasons = {}

    def pytest_sessionstart(self, session):
        self.session = session

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
        # Of an error while a file is imported, the last line that says "E" says what it was.
        errors = [line[1:].strip() for line in lines if line.startswith("E ")]
        return (errors or lines or [report.outcome])[0 if crash else -1]


def limit(seconds):
    """No more than this: processor time, bytes in a file, memory."""
    limits = {"RLIMIT_CPU": int(seconds) + 1, "RLIMIT_FSIZE": FILE_BYTES,
              "RLIMIT_DATA": MEMORY_BYTES}
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):     # not on this system
            resource.setrlimit(getattr(resource, name), (most, most))


def forget_reference():
    """A fork of a process that has imported the reference or its tests must import the copy."""
    folders = code.ROOT, code.ROOT / "tests"
    ours = {"tests"} | {path.stem for folder in folders for path in folder.glob("*.py")}
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in folders]


def examine(folder, result, arguments, seconds, stop=True):
    """Run pytest in `folder` and write {test: reason} to the file `result`; never returns."""
    if FORKS:
        os.setsid()     # a group of its own, which can be killed as a whole
        limit(seconds)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    forget_reference()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.freeze()     # pytest looks for garbage twice, and torch's objects make that take a second
    dump, write, leave = json.dumps, Path(result).write_text, os._exit
    outcomes = Outcomes(stop)
    pytest.main(["-s", "-q", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={folder}",
                 *arguments, CANARIES], plugins=[outcomes])
    write(dump(outcomes.reasons))
    leave(0)


# In the grader's process -------------------------------------------------------------------------

class Run:
    """A case at work."""

    def __init__(self, scratch, case, seconds):
        parent = scratch / secrets.token_hex(8)     # a case may well delete ".."
        folder = parent / "repository"
        shutil.copytree(scratch / "reference", folder)
        for name, text in case.files:
            (folder / name).write_text(text, encoding="utf-8")
            for compiled in folder.glob(f"__pycache__/{Path(name).stem}.*"):
                compiled.unlink()
        self.folder = parent
        self.result = scratch / f"{secrets.token_hex(8)}.json"     # a name that no case can know
        self.seconds = seconds
        self.process = PROCESSES.Process(
            target=examine, args=(folder, self.result, case.tests, seconds, case.stop))
        self.process.start()
        self.end = time.monotonic() + seconds

    def is_over(self):
        return self.process.exitcode is not None or time.monotonic() > self.end

    def kill(self):
        """The process and all that it has started."""
        self.process.kill()
        if FORKS:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def reasons(self):
        """{test: reason}, or for a run that did not come to its end a text."""
        ended = self.process.exitcode
        self.kill()
        if ended is None:
            return f"time limit of {self.seconds:g} s"
        return read(self.result) or f"ended before its tests did, exit code {ended}"


def read(result):
    """What `examine` wrote; None if it did not come so far."""
    try:
        return json.loads(result.read_text())
    except (OSError, ValueError):
        return None


def run_all(cases, seconds=60, jobs=None, done=lambda: None):
    """Cases -> {case: {test: reason}, or a text if there are none}, `jobs` at a time."""
    waiting, running, found = list(dict.fromkeys(cases)), {}, {}
    tests = {test for case in waiting for test in case.tests}
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as scratch:
        scratch = Path(scratch)
        prepare(scratch / "reference", tests)
        try:
            while waiting or running:
                while waiting and len(running) < (jobs or os.cpu_count()):
                    case = waiting.pop()
                    running[case] = Run(scratch, case, seconds)
                for case in [case for case, run in running.items() if run.is_over()]:
                    found[case] = running.pop(case).reasons()
                    done()
                time.sleep(0.01)
        finally:
            for run in running.values():
                run.kill()
    return found


def prepare(folder, tests):
    """The copy that all others are copies of. Its tests are compiled once: a third of the time."""
    code.copy(folder)
    shutil.copy(Path(__file__).with_name("canaries.py"), folder / CANARIES)
    process = PROCESSES.Process(
        target=examine, args=(folder, os.devnull, ["--collect-only", *tests], 300))
    process.start()
    process.join()


def is_of(node, test):
    """Is what ran, "file::name[param]", meant by the id of a test, with or without [param]?"""
    return node == test or node.startswith(f"{test}[")


def verdict(case, found):
    """Why an answer is not solved, in one line; "" if it is. found: what run_all made of cases."""
    reasons = case if isinstance(case, str) else found[case]
    if isinstance(reasons, str):
        return reasons
    for node, reason in reasons.items():
        if reason and not node.startswith(CANARIES):
            return f"{node.split('::')[-1]}: {printable(reason)}"
    for test in case.tests:
        if not any(is_of(node, test) for node in reasons):
            return f"{test.split('::')[-1]}: was not run"
    canaries = [reason for node, reason in reasons.items() if node.startswith(f"{CANARIES}::")]
    if len(canaries) < NUMBER_OF_CANARIES or not all(canaries):
        return "changes what the tests rely on"
    return ""


def printable(text):
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."


def case_of(question, function):
    """The case of a question whose answer is `function`, a syntax tree."""
    file, names = code.place(question.target)
    text = code.transplant(code.reference()[file], names, function)
    return Case(((file, text),), question.tests)


def answers(folder):
    """A submission: {number: the answer's case, or a text: why there is none}."""
    trees, found = {}, {}
    for name in code.FILES:
        try:
            trees[name] = code.parse(folder / name)
        except ValueError as error:
            trees[name] = str(error)
    for question in QUESTIONS:
        file, names = code.place(question.target)
        tree = trees[file]
        answer = tree if isinstance(tree, str) else code.find(tree, names)
        if answer is None:
            answer = f"{file}: no function {'.'.join(names)}"
        elif isinstance(answer, ast.FunctionDef):
            answer = BLANK if code.is_blank(answer) else case_of(question, answer)
        found[question.number] = answer
    return found


def grade(folders, seconds=60, jobs=None):
    """{folder: {number: reason}}, the reason "" where the question is solved.

    Equal answers to a question run once, blanks not at all.
    """
    submitted = {folder: answers(folder) for folder in folders}
    cases = {answer for found in submitted.values() for answer in found.values()
             if isinstance(answer, Case)}
    with tqdm(total=len(cases), desc="answers", leave=False) as bar:
        reasons = run_all(cases, seconds, jobs, bar.update)
    return {folder: {number: verdict(answer, reasons) for number, answer in found.items()}
            for folder, found in submitted.items()}


# The table ---------------------------------------------------------------------------------------

def rows(marks):
    """A table's cells: a header, then for each student the marks of each question, and the total."""
    yield ["student", *(question.number for question in QUESTIONS), "total"]
    for folder, reasons in marks.items():
        earned = [0 if reasons[question.number] else question.marks for question in QUESTIONS]
        yield [folder.resolve().name, *earned, sum(earned)]


def report(marks, csv_file=None):
    """Print the table, and below it what was lost and why; write it to a file as well."""
    table = [[str(cell) for cell in row] for row in rows(marks)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, *row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths[1:])]
        print(name.ljust(widths[0]), *cells)
    print()
    lost = []
    for folder, reasons in marks.items():
        numbers = {}
        for number, reason in reasons.items():
            if reason:
                numbers.setdefault(reason, []).append(number)
        lost.append([f"{', '.join(where)}: {reason}" for reason, where in numbers.items()])
        for line in lost[-1]:
            print(folder.resolve().name.ljust(widths[0]), line)
    if csv_file:
        with open(csv_file, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for row, reasons in zip(table, [["reasons"], *lost]):
                writer.writerow([*row, "; ".join(reasons)])
