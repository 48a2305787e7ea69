"""Marks for submissions: each question is read, judged and failed alone.

Of a submission only the asked functions are used, with the helpers and imports that they need. Each
answer is put into a fresh copy of the reference, written from this process's memory. There the
instructor's tests of its question run, in a forked process with limits on time, memory and files.
So no mistake costs marks twice, and no submission can change what another one is judged in. After
the tests come the canaries, which have to fail: an answer that changes torch, numpy or pytest earns
nothing. An answer whose process was ended from outside, or whose files changed while it ran, is
judged once more with nothing beside it.

This stops accidents and cheap tricks. It is no prison: Python code can read and delete what its
account may, and can look for the test's expected numbers in its own process. Hence a container, or
an account without rights; and hence the column "look at", which names what a person should read.
"""
import collections
import contextlib
import csv
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tests.assignments import code, examine
from tests.assignments.examine import CANARIES, FORKS
from tests.assignments.questions import QUESTIONS

CANARIES_FILE = Path(__file__).with_name("canaries.py")
NUMBER_OF_CANARIES = CANARIES_FILE.read_text(encoding="utf-8").count("\ndef test_")
PATIENCE = 4     # seconds that may pass for each second of processor time
LONGEST_REASON = 500
BLANK = "blank"
COPIED_LINES = 5     # equal answers shorter than this mean nothing


class Case(NamedTuple):
    """A changed copy of the reference, and what is asked about it."""
    files: tuple           # pairs (name, text): what is different
    tests: tuple           # ids
    stop: bool = True      # at the first test that fails


class Answer(NamedTuple):
    """What a submission says to a question."""
    case: Case             # None if there is nothing to run
    reason: str = ""       # why not
    look: str = ""         # what a person should look at


class Mark(NamedTuple):
    """What an answer earns: all marks of its question if there is no reason against it."""
    reason: str
    look: str


# Processes ---------------------------------------------------------------------------------------

# Where copies are made. The server's socket needs a short path, at most about 100 letters.
SCRATCH = tempfile.gettempdir()
if len(SCRATCH) > 50 and os.access("/tmp", os.W_OK):
    tempfile.tempdir = "/tmp"
CONTROL_GROUPS = Path("/sys/fs/cgroup")     # Linux: what a container may use
# Forks of a server that has loaded what is slow to load, and nothing else. (Forks of a process that
# has run tests take twice as long.) On Windows each question starts Python anew, 5 s longer.
PROCESSES = multiprocessing.get_context(
    "forkserver" if FORKS and len(tempfile.gettempdir()) <= 50 else "spawn")
if PROCESSES.get_start_method() == "forkserver":
    PROCESSES.set_forkserver_preload(["tests.assignments.examine"])


def start(target, *arguments):
    """A process at work. The server is started anew if an answer has ended it."""
    for attempt in range(5):
        process = PROCESSES.Process(target=target, args=arguments)
        try:
            process.start()
            return process
        except (OSError, EOFError):
            time.sleep(0.2 * 2 ** attempt)
    raise OSError("no process can be started")


def kill(process):
    """End a process and all that it has started."""
    process.kill()
    if FORKS:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()


def processors():
    """How many processors may be used: in a container, or under taskset, fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):     # no container, or no limit ("max")
            words = " ".join((CONTROL_GROUPS / file).read_text() for file in files).split()
            quota, period = map(int, words)
            allowed = min(allowed, quota // period) if quota > 0 else allowed
    return max(1, allowed)


def read(result):
    """What a process wrote; None if it did not come so far."""
    try:
        return json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# One submission: what it answers -----------------------------------------------------------------

def answers(folder, questions=QUESTIONS, seconds=60):
    """{number: Answer} of a submission. Another process reads it, as it may end its reader."""
    reason = no_folder(folder)
    if reason:
        return {question.number: Answer(None, reason) for question in questions}
    numbers = [question.number for question in questions]
    with tempfile.TemporaryDirectory(prefix="grade-", dir=SCRATCH) as scratch:
        result = Path(scratch, "answers.json")
        process = start(read_submission, folder, numbers, result, seconds)
        process.join(PATIENCE * seconds)
        kill(process)
        said = read(result) or {}
    lost = f"the submission cannot be read (its reader ended, exit code {process.exitcode})"
    found = {}
    for question in questions:
        text, reason, look = said.get(question.number, (None, lost, ""))
        case = None
        if text is not None:
            file, *_ = code.place(question.target)
            case = Case(((file, text),), question.tests + question.unseen)
        found[question.number] = Answer(case, reason, look)
    return found


def no_folder(folder):
    """Why a submission cannot be looked at, in one line; "" if it can."""
    try:
        os.listdir(folder)
    except OSError as error:
        return f"the submission is no folder that can be read ({error.strerror})"
    return "the submission is a link to a folder" if folder.is_symlink() else ""


def read_submission(folder, numbers, result, seconds):
    """Write {number: (text of the file with the answer in it or None, reason, look)}; no return."""
    examine.be_alone(seconds)
    reference, found = code.reference(), {}
    for question in QUESTIONS:
        if question.number not in numbers:
            continue
        try:
            found[question.number] = read_answer(folder, question, reference)
        except ValueError as error:
            found[question.number] = None, str(error), ""
        except Exception as error:     # such as RecursionError
            found[question.number] = None, f"cannot be read ({type(error).__name__})", ""
    result.write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


def read_answer(folder, question, reference):
    """(text, reason, look) of one answer. Raises ValueError, in one line, where there is none."""
    file, owner, name = code.place(question.target)
    theirs = code.submitted(folder / file)
    answer = code.find(theirs, owner, name)
    if answer is None:
        raise ValueError(f"{file}: no function {'.'.join(filter(None, (owner, name)))}")
    if answer.node is None:
        raise ValueError(f"{file}: syntax error in {name}, lines {answer.start + 1} to {answer.end}")
    if code.is_blank(answer.node):
        raise ValueError(BLANK)
    text = code.transplant(reference[file], owner, name, theirs)
    new = [line for line in text.split("\n") if line not in reference[file]]
    look = [f"uses {', '.join(words)}" for words in [code.reaching(new)] if words]
    original = code.find(reference[file], owner, name)
    lines = answer.lines(theirs)
    if len(lines) >= COPIED_LINES and code.same_code(answer.node, original.node):
        look.append("equal to the original")
    return text, "", "; ".join(look)


# The cases at work -------------------------------------------------------------------------------

def reference_files(tests):
    """What every case gets: {relative path: (bytes, time of change)}.

    Its tests are compiled once, which saves a third of the time.
    """
    with tempfile.TemporaryDirectory(prefix="grade-", dir=SCRATCH) as scratch:
        folder = Path(scratch, "reference")
        code.copy(folder)
        shutil.copy(CANARIES_FILE, folder / CANARIES)
        (folder / examine.SETTINGS).write_text("[pytest]\n")
        start(examine.examine, folder, os.devnull, ["--collect-only", *tests], 300).join()
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
                for path in paths}


class Run:
    """A case at work, in a folder of its own."""

    def __init__(self, scratch, given, case, seconds, seed):
        self.parent = scratch / secrets.token_hex(8)     # a case may well delete ".."
        self.folder = self.parent / "repository"
        changed = {Path(name): text for name, text in case.files}
        stale = {path.stem for path in changed}     # of these no compiled form is of use
        self.given = {path: content for path, content in given.items()
                      if not (path.suffix == ".pyc" and path.name.split(".")[0] in stale)}
        for path, text in changed.items():
            self.given[path] = text.encode("utf-8", "backslashreplace"), time.time_ns()
        for path, (data, changed_at) in self.given.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)
            os.utime(self.folder / path, ns=(changed_at, changed_at))
        self.result = scratch / f"{secrets.token_hex(8)}.json"     # a name that no case can know
        self.seconds = seconds
        self.process = start(examine.examine, self.folder, self.result, case.tests, seconds,
                             case.stop, seed)
        self.end = time.monotonic() + PATIENCE * seconds

    def is_over(self):
        return self.process.exitcode is not None or time.monotonic() > self.end

    def outcome(self):
        """(reasons, disturbed). reasons: {test: reason}, or a text for a run that did not end well.

        disturbed: it may have been somebody else's doing, so it deserves a second run.
        """
        code_of_exit = self.process.exitcode
        is_changed = any(content_of(self.folder / path) != data
                         for path, (data, _) in self.given.items())
        self.close()
        if code_of_exit is None or FORKS and code_of_exit == -signal.SIGXCPU:
            return f"time limit of {self.seconds:g} s", False
        if is_changed:
            return "changes files that it was given", True
        reasons = read(self.result)
        if reasons is None or code_of_exit != 0:
            return f"ended before its tests did, exit code {code_of_exit}", True
        return reasons, False

    def close(self):
        kill(self.process)
        shutil.rmtree(self.parent, ignore_errors=True)


def content_of(path):
    try:
        return path.read_bytes()
    except OSError:
        return None


def run_all(cases, seconds=60, jobs=None, seed=0, done=lambda case, reasons: None):
    """Cases -> {case: {test: reason}, or a text if there are none}, `jobs` at a time, in order.

    done(case, reasons) is called as soon as a case is judged.
    """
    waiting, running, found, again = collections.deque(dict.fromkeys(cases)), {}, {}, set()
    tests = {test for case in waiting for test in case.tests}
    with tempfile.TemporaryDirectory(prefix="grade-", dir=SCRATCH,
                                     ignore_cleanup_errors=True) as scratch:
        given = reference_files(tests)
        try:
            while waiting or running:
                while waiting and has_room(waiting[0], running, again, jobs or processors()):
                    case = waiting.popleft()
                    running[case] = Run(Path(scratch), given, case, seconds, seed)
                for case in [case for case, run in running.items() if run.is_over()]:
                    reasons, disturbed = running.pop(case).outcome()
                    if disturbed and case not in again:
                        again.add(case)
                        waiting.appendleft(case)
                    else:
                        found[case] = reasons
                        done(case, reasons)
                time.sleep(0.01)
        finally:
            for run in running.values():
                run.close()
    return found


def has_room(case, running, again, jobs):
    """May this case begin? One that runs for the second time has nothing beside it."""
    if case in again or again & set(running):
        return not running
    return len(running) < jobs


def is_of(node, test):
    """Is what ran, "file::name[param]", meant by the id of a test, with or without [param]?"""
    return node == test or node.startswith(f"{test}[")


def verdict(case, reasons):
    """Why an answer is not solved, in one line; "" if it is. reasons: what run_all made of it."""
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


# A class -----------------------------------------------------------------------------------------

def grade(folders, questions=QUESTIONS, seconds=60, jobs=None, seed=0,
          finished=lambda folder, marks: None):
    """{folder: {number: Mark}}. finished(folder, marks): called in order, as soon as one is done.

    seed: for the tests that draw their numbers. Equal answers to a question run once, blanks not at
    all. If a file of the instructor's repository changes while an answer runs, `look` says so.
    """
    submitted = {folder: answers(folder, questions, seconds)
                 for folder in tqdm(folders, desc="submissions read", leave=False)}
    cases = [answer.case for found in submitted.values() for answer in found.values()
             if answer.case]
    judged, marks, touched = {}, {}, {}
    before = stamps()

    def tell_finished():
        for folder, found in submitted.items():
            if any(answer.case and answer.case not in judged for answer in found.values()):
                return
            if folder not in marks:
                marks[folder] = {number: mark(answer) for number, answer in found.items()}
                finished(folder, marks[folder])

    def mark(answer):
        if answer.case is None:
            return Mark(answer.reason, answer.look)
        look = "; ".join(filter(None, (answer.look, touched.get(answer.case))))
        return Mark(verdict(answer.case, judged[answer.case]), look)

    def done(case, reasons):
        nonlocal before
        now = stamps()
        changed = sorted({path.name for path, _ in before.items() ^ now.items()})
        if changed:
            before = now
            touched[case] = f"the repository changed while it ran: {', '.join(changed)}"
        judged[case] = reasons
        bar.update()
        tell_finished()

    tell_finished()
    with tqdm(total=len(set(cases)), desc="answers", leave=False) as bar:
        run_all(cases, seconds, jobs, seed, done)
    return marks


def stamps():
    """Size and time of change of each file that grading relies on."""
    found = {}
    for path in [*code.ROOT.glob("*.py"), *(code.ROOT / "tests").rglob("*.py")]:
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_size, path.stat().st_mtime_ns
    return found


# The table ---------------------------------------------------------------------------------------

def printable(text):
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return examine.shortened(text, LONGEST_REASON)


def readable(name):
    """A file's name as text that any file and terminal can take: what is no letter is written \\x1b."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                   for letter in text)


def names(folders):
    """{folder: what it is called in the table}: its own name, or its path where two share one."""
    own = {folder: Path(os.path.abspath(folder)).name for folder in folders}
    count = collections.Counter(own.values())
    return {folder: readable(name if count[name] == 1 else folder) for folder, name in own.items()}


def header(questions):
    of = sum(question.marks for question in questions)
    return ["student", *(question.number for question in questions), f"of {of}"]


def row(name, questions, marks):
    """A student's cells: the name, the marks of each question, and the sum."""
    earned = [0 if marks[question.number].reason else question.marks for question in questions]
    return [name, *map(str, earned), str(sum(earned))]


def grouped(marks, field):
    """["1.1, 1.2: what both have in common", ...] of the reasons, or of what to look at."""
    numbers = {}
    for number, mark in marks.items():
        text = getattr(mark, field)
        if text:
            numbers.setdefault(text, []).append(number)
    return [f"{', '.join(where)}: {text}" for text, where in numbers.items()]


def harmless(cell):
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t")) else cell


class Table:
    """Marks as they come: first into the CSV file, and at the end on the screen."""

    def __init__(self, folders, questions, file=None):
        """file: text file, open for writing; None: no file."""
        self.names, self.questions, self.file = names(folders), questions, file
        self.rows, self.lines = [header(questions)], []
        self.write([*self.rows[0], "reasons", "look at"])

    def write(self, cells):
        if self.file:
            csv.writer(self.file).writerow(map(harmless, cells))
            self.file.flush()

    def add(self, folder, marks):
        name = self.names[folder]
        self.rows.append(row(name, self.questions, marks))
        reasons, look = grouped(marks, "reason"), grouped(marks, "look")
        self.write([*self.rows[-1], "; ".join(reasons), "; ".join(look)])
        self.lines += [(name, line) for line in reasons]
        self.lines += [(name, f"LOOK AT {line}") for line in look]

    def show(self):
        """Print the table, and below it what was lost and why."""
        widths = [max(map(len, column)) for column in zip(*self.rows)]
        for name, *cells in self.rows:
            print(name.ljust(widths[0]), *(cell.rjust(width)
                                           for cell, width in zip(cells, widths[1:])))
        print()
        for name, line in self.lines:
            print(name.ljust(widths[0]), line)
