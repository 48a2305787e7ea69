"""The assignments: every question can be failed and solved, and no submission costs another one marks.

    python -m pytest -m zoo tests/test_assignments.py -s     every planted bug, the answers of
                                                             tests/zoo.py, forty submissions
"""
import ast
import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests import zoo
from tests.assignments import __main__ as command
from tests.assignments import bugs, code, examine, grade, handout
from tests.assignments.questions import PARTS, QUESTIONS
from tests.mutants import MUTANTS

NUMBERS = [question.number for question in QUESTIONS]
BY_TARGET = {question.target: question for question in QUESTIONS}
BY_NUMBER = {question.number: question for question in QUESTIONS}
REFERENCE = code.reference()


def changed(texts, question, stop=True):
    """The question's case in files that differ from the reference."""
    files = [(name, text) for name, text in texts.items() if text != REFERENCE[name]]
    return grade.Case(tuple(files), question.tests + question.unseen, stop)


def wrong_answers(question):
    """Planted bugs within the function, those first that one of its own tests is named for."""
    file, owner, name = code.place(question.target)
    rows = [row for row in MUTANTS if not row[5].startswith("INNOCENT") and row[1] == file]
    inside = [row for row in rows if bugs.touched(row, REFERENCE)
              == {(file, ".".join(filter(None, (owner, name))))}]
    named = {handout.function_of(test) for test in question.tests}
    return sorted(inside, key=lambda row: row[4] not in named)


def cases_of(question):
    """What is asked about a question: its blank alone, and a wrong answer. (The zoo has more.)"""
    return [changed(code.blanked([question]), question, stop=False),
            changed(bugs.plant(wrong_answers(question)[:1]), question)]


def verdict(case, found):
    return grade.verdict(case, found[case])


def own_tests(folder, *arguments):
    """What a student's `python -m pytest` prints in a starter."""
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], text=True, cwd=folder,
                          capture_output=True)
    return done.stdout + done.stderr


# The table ---------------------------------------------------------------------------------------

def test_there_are_five_parts_and_a_hundred_marks():
    assert sum(question.marks for question in QUESTIONS) == 100
    assert len(QUESTIONS) >= 14 and len(set(NUMBERS)) == len(BY_TARGET) == len(QUESTIONS)
    assert [int(number.split(".")[0]) for number in NUMBERS] == \
        sorted(int(number.split(".")[0]) for number in NUMBERS)
    assert {int(number.split(".")[0]) for number in NUMBERS} == set(PARTS) == {1, 2, 3, 4, 5}


@pytest.fixture(scope="module")
def asked():
    """All runs of `cases_of`, made at once: {case: reasons}."""
    return grade.run_all([case for question in QUESTIONS for case in cases_of(question)])


@pytest.mark.parametrize("question", QUESTIONS, ids=NUMBERS)
def test_a_question_can_be_failed(question, asked):
    blank, wrong = cases_of(question)
    unsolved = asked[blank]
    for test in blank.tests:
        reasons = [reason for node, reason in unsolved.items() if grade.is_of(node, test)]
        assert reasons and all(reasons), f"{test} passes, or was not run"
    assert len(wrong_answers(question)) >= 2
    assert not re.search("time limit|ended|relies", verdict(wrong, asked))
    assert verdict(wrong, asked) != ""


def test_a_reason_names_the_test_what_was_found_and_what_it_looks_for(asked):
    """As "was not run" alone, "assert False" alone, or an empty text would not."""
    for question in QUESTIONS:
        _, wrong = cases_of(question)
        test, _, said = verdict(wrong, asked).partition(": ")
        assert test.startswith("test_") and said.strip(), question.number
    _, swapped = cases_of(BY_NUMBER["2.1"])
    assert re.search("features: at .* expected .*, got .* The test is about: gamma and beta swapped",
                     verdict(swapped, asked))


def test_a_question_s_test_names_its_mistakes_where_a_reason_shows_them():
    """A reason of the grader holds the first 240 letters of the test's docstring."""
    text = (code.ROOT / "tests/test_questions.py").read_text(encoding="utf-8")
    for test in ast.parse(text).body:
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
            mistakes = (ast.get_docstring(test) or "").split("\n\n")[0]
            assert 20 < len(mistakes) <= 240, f"{test.name}: {len(mistakes)} letters"


def test_readme_and_questions_name_each_other():
    """The rows of "The paper, line by line" end in (Q 1.2) or (Q 1.2, 1.3)."""
    readme = (code.ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## The paper, line by line")[1].split("\n## ")[0]
    named = set()
    for line in re.findall(r"^\| (.+) \|$", table, re.M):
        first, *cells = line.split(" | ")
        for numbers in re.findall(r"\(Q (\d\.\d(?:, \d\.\d)*)\)", " ".join(cells)):
            named |= {(first, number) for number in re.findall(r"\d\.\d", numbers)}
    assert named == {(question.row, question.number) for question in QUESTIONS}


def test_the_experiments_bands_are_what_three_committed_runs_reached():
    text = (code.ROOT / "tests/assignments/experiments.md").read_text(encoding="utf-8")
    committed, seconds, commits = {}, {}, {}     # flags -> {seed: success}, {seed: seconds}, commits
    cells = [cell for file in (code.ROOT / "results").glob("*.json")
             for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    cells.sort(key=lambda cell: cell["commit"] == "8558567")     # the present defaults count
    for cell in cells:
        flags = re.sub(r"python train.py|--(?:seed|out) \S+|--resume", "",
                       cell["command"]).split()
        if "near" in flags:
            committed.setdefault(frozenset(flags), {})[cell["seed"]] = cell["success_rate"]
            seconds.setdefault(frozenset(flags), {})[cell["seed"]] = cell["seconds"]["total"]
            commits.setdefault(frozenset(flags), set()).add(cell["commit"])
    rows = re.findall(r"^\| (X\d) \| `(.+)` \| (.+) \| (.+) \| (?:(.+) to (.+)|-) \|$", text, re.M)
    assert [row[0] for row in rows] == ["X1"] * 3 + ["X2"] * 3 + ["X3"] * 3 + ["X4"]
    for _, flags, took, told, low, high in rows:
        kind = frozenset(["--task", "near", *flags.split()])
        success, three = committed[kind], [seconds[kind][seed] for seed in (0, 1, 2)]
        assert took == f"{min(three):.0f} to {max(three):.0f}"
        assert told.split() == [f"{success[seed]:.3f}" for seed in (0, 1, 2)]
        if not low:     # made with earlier defaults
            assert commits[kind] != {"8558567"}
            continue
        assert float(low) == pytest.approx(max(0, min(success.values()) - 0.05), abs=0.006)
        assert float(high) == pytest.approx(min(1, max(success.values()) + 0.05), abs=0.006)


# Right answers that look different -------------------------------------------------------------------

# Number: the function, with what it needs of its file, as a student may write it.
RIGHT_ANSWERS = {
    "other words": ("4.1", """
class PlanarArm:
    def joints(self, angles):
        if angles.shape[-1] != len(self.link_lengths):
            raise ValueError("wrong number of angles")
        points = [angles.new_tensor(self.base).expand(*angles.shape[:-1], 2)]
        for n, length in enumerate(self.link_lengths):
            total = angles[..., :n + 1].sum(-1)
            points.append(points[-1] + length * torch.stack([total.cos(), total.sin()], -1))
        return torch.stack(points, -2)
"""),
    "least squares": ("4.3", """
class PlanarArm:
    def joint_step(self, angles, displacement):
        jacobian = self.jacobian(angles)
        N = jacobian.shape[-1]
        like_angles = dict(dtype=angles.dtype, device=angles.device)
        damping = (DAMPING * torch.eye(N, **like_angles)).expand(*angles.shape[:-1], N, N)
        rows = torch.cat([jacobian, damping], -2)
        asked = torch.cat([displacement, torch.zeros_like(angles)], -1)[..., None]
        return torch.linalg.lstsq(rows, asked).solution[..., 0]
"""),
    "in place": ("2.1", """
class FiLM(Mechanism):
    def modulate(self, h, m):
        h *= m[:, 0]
        h += m[:, 1]
        return h
"""),
    "rounded buffers": ("1.4", """
class DDPM:
    def step(self, predicted_noise, timestep, noisy_actions, noise):
        clean = self.predict_clean(predicted_noise, timestep, noisy_actions)
        timestep = torch.as_tensor(timestep)
        abar = self.alphas_cumprod[timestep][..., None, None]
        before = self.alphas_cumprod[(timestep - 1).clamp(min=0)][..., None, None]
        before = torch.where(timestep[..., None, None] > 0, before, torch.ones_like(before))
        beta = 1 - abar / before
        mean = (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * noisy_actions)
        deviation = ((1 - before) / (1 - abar) * beta).clamp(min=0).sqrt()
        return mean / (1 - abar) + deviation * noise
"""),
    "a helper function, a constant and an import": ("1.2", """
from __future__ import annotations
import numpy as np
from typing import Optional as Maybe
AXES = (None, None)

def spread(values: np.ndarray) -> Maybe[Later]:
    return widened(values)

def widened(values):
    return values[(..., *AXES)]

def at_timestep(buffer, timestep):
    raise AssertionError("the grader has its own")

class DDPM:
    def add_noise(self, actions: Maybe[torch.Tensor], noise, timesteps):
        signal, noisy = spread(self.signal_scale[timesteps]), self.spread_noise(timesteps)
        return signal * actions + noisy * noise

    def spread_noise(self, timesteps):
        return spread(self.noise_scale[timesteps])
"""),
    "two spaces, tabs and a comment further left": ("2.2", """
class AdaLNZero(AdaLN):
  def gate(self, h, m):
  # the third vector
  \talpha = m[:, 2]
  \treturn alpha * h
"""),
    "a sum of 400 terms": ("2.2", f"""
class AdaLNZero(AdaLN):
    def gate(self, h, m):
        nothing = {"+".join(["0"] * 400)}
        return m[:, 2] * h + nothing
"""),
    "a number of 5,000 digits": ("2.2", f"""
class AdaLNZero(AdaLN):
    def gate(self, h, m):
        large = 0x{"f" * 5000}
        return m[:, 2] * h
"""),
}


def answer_of(number, theirs):
    """The case of an answer, as the grader makes it of a file with this text."""
    question = BY_NUMBER[number]
    file, owner, name = code.place(question.target)
    text = code.transplant(REFERENCE[file], owner, name, theirs)
    return grade.Case(((file, text),), question.tests + question.unseen)


@pytest.fixture(scope="module")
def right():
    return grade.run_all([answer_of(*answer) for answer in RIGHT_ANSWERS.values()])


@pytest.mark.parametrize("name", RIGHT_ANSWERS)
def test_a_right_answer_in_other_words_is_right(name, right):
    assert verdict(answer_of(*RIGHT_ANSWERS[name]), right) == ""


def test_the_missing_axes_of_1_2_are_told_without_160_GB():
    case = answer_of("1.2", """
class DDPM:
    def add_noise(self, actions, noise, timesteps):
        return self.signal_scale[timesteps] * actions + self.noise_scale[timesteps] * noise
""")
    assert re.search("noisy actions: at .* without the two axes",
                     verdict(case, grade.run_all([case])))


# What students get -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter")
    handout.starter(folder)
    return folder


def test_a_starter_has_no_answers(starter):
    files = sorted(str(path.relative_to(starter)) for path in starter.rglob("*") if path.is_file())
    text = (starter / "HANDOUT.md").read_text(encoding="utf-8")
    ids = [test for question in QUESTIONS for test in question.tests] + handout.named_tests(text)
    data = {f"tests/data/{path.name}" for path in (code.ROOT / "tests/data").iterdir()}
    assert files == sorted({*code.FILES, "README.md", "HANDOUT.md", "LICENSE", "requirements.txt",
                            ".gitignore", "pytest.ini", "tests/conftest.py", "tests/course.json",
                            *map(handout.file_of, ids), *data, *handout.named_files(text)})
    texts = {path: path.read_text(encoding="utf-8") for path in starter.rglob("*.py")}
    bodies = [ast.unparse(node.body) for text in texts.values()
              for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    for question in QUESTIONS:
        file, owner, name = code.place(question.target)
        solution = code.find(REFERENCE[file], owner, name).node
        assert not any(ast.unparse(solution.body[1:]) in body for body in bodies), question.target
        blank = code.find(texts[starter / file], owner, name).node
        assert code.is_blank(blank) and not code.is_blank(solution)
        assert ast.get_docstring(blank) == ast.get_docstring(solution)
        assert ast.dump(blank.args) == ast.dump(solution.args)


def test_a_starter_keeps_all_else_byte_for_byte(starter):
    for name in code.FILES:
        text = (starter / name).read_text(encoding="utf-8")
        for question in QUESTIONS:
            file, owner, function = code.place(question.target)
            if file == name:
                text = code.transplant(text, owner, function, REFERENCE[name])
        assert text == REFERENCE[name]


def solve(folder, *numbers):
    """Put the original functions of these questions into a starter."""
    for number in numbers:
        file, owner, name = code.place(BY_NUMBER[number].target)
        text = (folder / file).read_text(encoding="utf-8")
        solved = code.transplant(text, owner, name, REFERENCE[file])
        (folder / file).write_text(solved, encoding="utf-8")


def test_a_starter_s_own_tests_whatever_lies_in_the_folders_above(starter, tmp_path):
    """A setup.py, a pytest.ini or a conftest.py above it must not decide which tests are found."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-flag\n")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "conftest.py").write_text("raise RuntimeError")
    solved = shutil.copytree(starter, tmp_path / "solved")
    solve(solved, *NUMBERS)
    ids = {test for question in QUESTIONS for test in question.tests}
    told = own_tests(solved, "-q")
    passed = int(re.search(r"(\d+) passed", told)[1])
    assert passed >= len(ids) and "failed" not in told and "NOTE" not in told, told
    assert f"{len(NOISE.tests)} passed" in own_tests(solved, "--question", NOISE.number)


def test_a_starter_s_tests_say_what_they_look_for_and_what_was_changed(starter, tmp_path):
    """1.1 stays a blank: the numbers of its schedule are recorded."""
    begun = shutil.copytree(starter, tmp_path / "begun")
    solve(begun, NOISE.number)
    told = own_tests(begun, "-q", "--question", NOISE.number)
    assert f"{len(NOISE.tests)} passed" in told and "NOTE" not in told, told
    text = (begun / "diffusion.py").read_text(encoding="utf-8")
    given = "return buffer[timestep][..., None, None]"
    (begun / "diffusion.py").write_text(text.replace(given, "return buffer[timestep]"))
    told = " ".join(own_tests(begun, "-q", "--question", NOISE.number).split())
    assert "What this test looks for" in told and "without the two axes that (B,T,A) needs" in told
    assert "NOTE: you have changed at_timestep in diffusion.py." in told
    told = own_tests(begun, "-q", "--question", "1.1")
    assert "NotImplementedError" in told and "passed" not in told


def test_a_starter_of_some_parts_shows_no_later_solution(tmp_path, capsys):
    command.main(["starter", str(tmp_path / "some"), "--part", "1", "--part", "3"])
    assert "--part 1 --part 3" in capsys.readouterr().out     # how to grade it
    text = (tmp_path / "some/HANDOUT.md").read_text("utf-8")
    assert re.findall(r"### (\d\.\d)", text) == [number for number in NUMBERS if number[0] in "13"]
    assert re.findall(r"### (W\d+)", text) == ["W1", "W2", "W3", "W5", "W6", "W7"]
    assert "X1" not in text
    for question in QUESTIONS:
        file, owner, name = code.place(question.target)
        node = code.find((tmp_path / "some" / file).read_text("utf-8"), owner, name).node
        assert code.is_blank(node) == (question.number[0] != "2")     # an earlier part, not asked
    readme = (tmp_path / "some/README.md").read_text("utf-8")
    assert "Asked: part 1, 3." in readme and "part 4, 5 raise NotImplementedError" in \
        " ".join(readme.split())


def test_what_a_written_question_tells_to_read_is_in_the_starter(starter):
    text = (starter / "HANDOUT.md").read_text(encoding="utf-8")
    assert handout.named_files(text) == [
        "results/README.md", "results/appendix.md", "results/benchmark.txt", "results/earlier.md"]
    assert re.findall(r"results/[\w.]+\.(?:md|txt)", text)
    assert all((starter / name).is_file() for name in re.findall(r"results/[\w.]+\.\w+", text))
    for test in handout.named_tests(text):
        path = starter / handout.file_of(test)
        assert f"def {handout.function_of(test)}(" in path.read_text(encoding="utf-8")
    assert len(handout.named_tests(text)) >= 1
    assert "repository" not in " ".join(handout.written_questions(set(PARTS)))


def test_the_handout_has_every_question(starter):
    text = (starter / "HANDOUT.md").read_text(encoding="utf-8")
    for question in QUESTIONS:
        assert f"### {question.number} {question.title}" in text
        assert handout.command(question) in text
    assert re.findall(r"### (W\d+)", text) == [
        f"W{number}" for part in PARTS for number in range(1, 12)
        if f"### W{number}." in "\n".join(handout.written_questions([part]))] or \
        set(re.findall(r"### W(\d+)", text)) == set(map(str, range(1, 12)))
    assert "44 marks of their own" in text and "X4" in text


@pytest.mark.parametrize("arguments, message", [
    (["starter", "."], "not empty"), (["bugs", "."], "not empty"), (["grade", "nowhere"], "nowhere"),
    (["starter", "new", "--part", "9"], "1, 2, 3, 4, 5"), (["bugs", "new", "--count", "0"], "count"),
    (["grade", ".", "--part", "9"], "1, 2, 3, 4, 5"), (["bugs", "new", "--count", "999"], "count"),
    (["bugs"], "folder"), ([], "command"), (["grade", ".", "--csv", "full"], "another name"),
    *((["grade", ".", "--jobs", bad], "allowed: 1 to 10,000") for bad in ("-1", "0", "2.5", "x")),
    *((["grade", ".", "--seconds", bad], "allowed: 1 to 3600") for bad in
      ("inf", "nan", "0", "-5", "soon"))])
def test_bad_input_is_refused_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").write_text("kept")
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full").read_text() == "kept"


# The bug hunt ------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed, count", [(0, 5), (1, 1), (2, 12), (3, 12)])
def test_a_bug_hunt_has_so_many_bugs_in_different_functions(seed, count, tmp_path, capsys):
    arguments = ["bugs", str(tmp_path / "hunt"), "--seed", str(seed), "--count", str(count)]
    command.main(arguments)
    assert capsys.readouterr().out == ""
    drawn = bugs.draw(seed, count)
    assert drawn == bugs.draw(seed, count) and len(drawn) == count
    assert drawn != bugs.draw(seed + 1, count)
    places = [bugs.touched(row, REFERENCE) for row in drawn]
    assert len(set.union(*places)) == sum(map(len, places)) and all(places)
    hunted = {name: (tmp_path / "hunt" / name).read_text(encoding="utf-8") for name in REFERENCE}
    for name, old in REFERENCE.items():
        new = hunted[name]
        compile(new, name, "exec")
        parts = {owner: new.splitlines()[first - 1:last] for first, last, owner in bugs.functions(new)}
        different = [owner for first, last, owner in bugs.functions(old)
                     if "line " not in owner
                     and parts.get(owner) != old.splitlines()[first - 1:last]]
        assert set(different) <= {owner for place in places for file, owner in place if file == name}
    command.main(["bugs", "--key", *arguments[2:]])
    key = capsys.readouterr().out
    assert all(row[0] in key and row[4] in key and row[5] in key for row in drawn)
    for file, line in re.findall(r"^  (\S+), line (\d+), in ", key, re.M):     # it is wrong there
        wrong = hunted[file].split("\n")[int(line) - 1]
        assert REFERENCE[file].split("\n").count(wrong) < hunted[file].split("\n").count(wrong) \
            or "\n".join(hunted[file].split("\n")[int(line) - 2:int(line) + 1]) not in REFERENCE[file]
    files = {path.name for path in (tmp_path / "hunt").iterdir()}
    assert files == {*code.FILES, "requirements.txt", "LICENSE", "BUGS.md"}


def test_every_bug_compiles_and_is_listed(capsys):
    command.main(["bugs", "--list"])
    listed = capsys.readouterr().out
    for row in bugs.bugs():
        ast.parse(bugs.plant([row])[row[1]])
        assert row[0] in listed and row[5] in listed
    assert len(set(bugs.NAMES)) == len(bugs.NAMES) >= 40


# Submissions that mean no good -------------------------------------------------------------------

NOISE = BY_TARGET["diffusion.DDPM.add_noise"]
RIGHT = "return at_timestep(self.signal_scale, timesteps) * actions + " \
        "at_timestep(self.noise_scale, timesteps) * noise"
CONTROL = BY_TARGET["film.FiLM.modulate"]     # solved in all of them, and in another file
OTHER = BY_TARGET["diffusion.DDPM.step"]      # solved as well, and in the same file


def submit(folder, body=RIGHT, parameters="self, actions, noise, timesteps"):
    """A submission with three answers, one of which has the given body."""
    solved = NOISE, CONTROL, OTHER
    for name, text in code.blanked([other for other in QUESTIONS if other not in solved]).items():
        if name == "diffusion.py":
            function = f"    def add_noise({parameters}):\n{textwrap.indent(body, ' ' * 8)}"
            text = code.transplant(text, "DDPM", "add_noise", f"class DDPM:\n{function}\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# Finds what lies in the folders above, and spoils the six files wherever they are: those of the
# reference, if they are there, and those of the answers that run at the same time.
SPOILER = """
import pathlib
here = pathlib.Path.cwd()
for path in [*here.glob('../../*/diffusion.py'), *here.glob('../../*/*/film.py')]:
    if here not in path.parents:
        path.write_text('raise SystemExit')
"""

# Name: the body of add_noise, and the reason to be given for its marks, "" if it earns them.
HOSTILE = {
    "right": (RIGHT, ""),
    "leaves": ("import os\nos._exit(0)", "ended before its tests did"),
    "exits": ("import sys\nsys.exit()", "SystemExit"),
    "skips": ("import pytest\npytest.skip()", "Skipped"),
    "stops": ("import pytest\npytest.exit('done', 0)", "was not run"),
    "talks": ("print('x' * 100_000_000)\n" + RIGHT, ""),
    "fills the disk": ("open('big', 'wb').write(bytes(100_000_000))\n" + RIGHT, "OSError|ended"),
    "eats memory": ("[bytes(10 ** 9) for _ in range(100)]\n" + RIGHT, "MemoryError|ended"),
    "deletes the tests": ("import shutil\nshutil.rmtree('..')\n" + RIGHT, "Error|ended|changes files"),
    "rewrites its tests": ("open('tests/test_net.py', 'w').write('')\n" + RIGHT, "changes files"),
    "patches torch": ("torch.testing.assert_close = lambda *a, **k: None\n"
                      + RIGHT, "changes what the tests rely on"),
    "patches pytest": ("from _pytest.runner import CallInfo\n"
                       "CallInfo.from_call = classmethod(lambda cls, *a, **k: "
                       "cls(None, None, 0, 0, 0, k['when'], _ispytest=True))\n"
                       + RIGHT, "changes what the tests rely on|was not run"),
    "spoils the others": (SPOILER + RIGHT, ""),
    "kills the server": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + RIGHT,
                         "ended before its tests did"),
    "says an emoji": ("raise ValueError('\N{CROCODILE}\\x1b[2J')", "ValueError"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """{name: {number: Mark}} of one submission for each trick."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (body, _) in HOSTILE.items():
        submit(folder / name, body)
    submit(folder / "signature", "return 0", "self")
    shutil.rmtree(submit(folder / "half") / "tests", ignore_errors=True)

    def spoil(name, file, change):
        path = submit(folder / name) / file
        path.write_bytes(change(path.read_bytes()))

    spoil("bytes", "diffusion.py", lambda text: text + b"# \xff\xfe\n")
    spoil("latin", "diffusion.py", lambda text: b"# coding: latin-1\n# \xe9\n" + text.replace(
        "α".encode(), b"a").decode("utf-8").encode("latin-1", "replace"))
    spoil("coding", "diffusion.py", lambda text: b"# coding: no-such-thing\n" + text)
    spoil("syntax", "diffusion.py", lambda text: b"def (\n" + text)
    spoil("syntax inside", "diffusion.py", lambda text: text.replace(
        b"        return at_timestep(self.signal_scale", b"        return (at_timestep(", 1))
    spoil("import", "diffusion.py", lambda text: b"import sys, os\nos._exit(0)\n" + text)
    spoil("windows", "diffusion.py", lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    spoil("nul", "diffusion.py", lambda text: text + b"\0")
    spoil("large", "diffusion.py", lambda text: text + b"#" * 2_000_000)
    spoil("deep", "diffusion.py", lambda text: text + b"x = " + b"-" * 500_000 + b"1\n")
    spoil("renamed", "diffusion.py", lambda text: text.replace(b"def add_noise", b"def noise"))
    (submit(folder / "missing") / "diffusion.py").unlink()
    (submit(folder / "link") / "diffusion.py").unlink()
    (folder / "link/diffusion.py").symlink_to(code.ROOT / "diffusion.py")
    return {path.name: marks for path, marks in grade.grade(sorted(folder.iterdir())).items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_trick_costs_its_own_question_and_no_other(name, hostile):
    marks, expected = hostile[name], HOSTILE[name][1]
    reason = marks[NOISE.number].reason
    assert re.search(expected, reason) and "\n" not in reason
    assert (reason == "") == (expected == "")
    assert marks[CONTROL.number].reason == marks[OTHER.number].reason == ""
    assert [mark.reason for mark in marks.values()].count(grade.BLANK) == len(QUESTIONS) - 3


@pytest.mark.parametrize("name, words", [
    ("leaves", "os"), ("exits", "sys"), ("fills the disk", "open"), ("spoils the others", "pathlib"),
    ("deletes the tests", "shutil"), ("patches pytest", "_pytest"), ("right", "")])
def test_what_reaches_for_files_or_modules_is_named_for_a_person_to_read(name, words, hostile):
    look = hostile[name][NOISE.number].look
    assert words in look and (look == "") == (words == "")
    assert hostile[name][CONTROL.number].look == ""


@pytest.mark.parametrize("name, reason", [
    ("bytes", ""), ("latin", ""), ("coding", ""), ("syntax", ""), ("nul", ""), ("deep", ""),
    ("import", ""), ("windows", ""), ("half", ""),
    ("large", "diffusion.py: larger than 1,000,000 bytes"), ("missing", "diffusion.py: no such file"),
    ("link", "diffusion.py: a link, not a file")])
def test_a_damaged_file_costs_no_more_than_its_own_questions(name, reason, hostile):
    marks = hostile[name]
    assert marks[CONTROL.number].reason == ""
    for number in (NOISE.number, OTHER.number):
        assert marks[number].reason == reason


def test_a_syntax_error_costs_the_function_that_it_is_in(hostile):
    marks = hostile["syntax inside"]
    assert re.fullmatch(r"diffusion.py: syntax error in add_noise, lines \d+ to \d+",
                        marks[NOISE.number].reason)
    assert marks[OTHER.number].reason == marks[CONTROL.number].reason == ""


def test_a_function_with_another_name_or_signature_earns_nothing(hostile):
    assert hostile["renamed"][NOISE.number].reason == "diffusion.py: no function DDPM.add_noise"
    assert "TypeError" in hostile["signature"][NOISE.number].reason
    for name in ("renamed", "signature"):
        assert hostile[name][OTHER.number].reason == ""


def test_a_file_that_ends_its_reader_costs_that_submission_alone(tmp_path, monkeypatch):
    """As the parser of an older Python may."""
    monkeypatch.setattr(grade, "read_submission", end_reader)
    lost = grade.answers(submit(tmp_path / "bad"))
    assert all(answer.case is None and "cannot be read" in answer.reason for answer in lost.values())


def end_reader(*arguments):
    os._exit(3)


def test_a_change_of_the_repository_is_reported_with_the_answer_s_name(tmp_path, monkeypatch):
    def run(cases, seconds, jobs, seed, done):
        for number, case in enumerate(dict.fromkeys(cases)):
            stamps["diffusion.py"] = number == 0     # changed by the first answer alone
            done(case, "not run")

    stamps = {"diffusion.py": None}
    monkeypatch.setattr(grade, "stamps", lambda: {Path(name): v for name, v in stamps.items()})
    monkeypatch.setattr(grade, "run_all", run)
    marks = grade.grade([submit(tmp_path / "bad")], [NOISE, CONTROL])[tmp_path / "bad"]
    assert "the repository changed while it ran: diffusion.py" in marks[NOISE.number].look


def state_of(process):
    """A letter of Linux: Z for a process that has ended and waits for init; "" if there is none."""
    time.sleep(0.5)     # a kill takes its time
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def test_what_never_ends_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    fork = ("import os, time\nif os.fork() == 0:\n"
            "    open({!r}, 'a').write(f'{{os.getpid()}}\\n')\n    while True: time.sleep(1)\n")
    loop = submit(tmp_path / "loop", "while True: pass")
    returns = submit(tmp_path / "returns", fork.format(str(tmp_path / "first")) + RIGHT)
    waits = submit(tmp_path / "waits", fork.format(str(tmp_path / "second")) + "os.wait()")
    monkeypatch.setattr(grade, "PATIENCE", 2)
    start = time.monotonic()
    cases = {folder.name: grade.answers(folder)[NOISE.number].case
             for folder in (loop, returns, waits)}
    found = grade.run_all(cases.values(), seconds=4)
    reasons = {name: verdict(case, found) for name, case in cases.items()}
    assert time.monotonic() - start < 60
    assert reasons == {"loop": "time limit of 4 s", "returns": "", "waits": "time limit of 4 s"}
    for name in ("first", "second"):
        for process in (tmp_path / name).read_text().split():
            assert state_of(process) in ("", "Z")


# Folders and surroundings of any kind ----------------------------------------------------------------

@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One grading of odd folders, in odd surroundings: (what it printed, the rows of its CSV file).

    Around it: a terminal of few letters, a pytest.ini above the temporary folder, whose name has 90
    letters, and settings for pytest in the environment.
    """
    base = tmp_path_factory.mktemp("odd")
    class_folder = base / "class"
    for name in ("honest", "a/hw1", "b/hw1", "=cmd|calc", "-x", "\x1b[2J", "Łukasz"):
        submit(class_folder / name)
    submit(class_folder / "emoji", HOSTILE["says an emoji"][0])
    shutil.copytree(class_folder / "honest", os.fsdecode(os.fsencode(class_folder) + b"/\xff"))
    (class_folder / "hw.zip").write_bytes(b"PK")
    (class_folder / "linked").symlink_to(class_folder / "honest")
    temporary = base / ("t" * 90)
    temporary.mkdir()
    (base / "pytest.ini").write_text("[pytest]\naddopts = --no-such-flag\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.assignments", "grade", "a/hw1", "b/hw1",
         *sorted(path for path in os.listdir(class_folder) if path not in ("a", "b")),
         "--csv", "marks.csv", "--part", "1", "--part", "2", "--seed", "5"],
        cwd=class_folder, capture_output=True, env=os.environ | dict(
            PYTHONPATH=str(code.ROOT), TMPDIR=str(temporary), PYTHONIOENCODING="cp1252:strict",
            PYTEST_ADDOPTS="--no-such-flag", PYTEST_PLUGINS="no_such_plugin"))
    assert done.returncode == 0, done.stderr.decode("cp1252")
    with open(class_folder / "marks.csv", newline="", encoding="utf-8") as file:
        return done.stdout.decode("cp1252"), list(csv.DictReader(file))


ALL_THREE = str(NOISE.marks + CONTROL.marks + OTHER.marks)
OF = f"of {sum(question.marks for question in QUESTIONS if question.number[0] in '12')}"


def test_right_answers_earn_their_marks_in_any_surroundings(odd):
    """A pytest.ini above, PYTEST_ variables, a long TMPDIR, a terminal of few letters."""
    printed, rows = odd
    assert rows[0].keys() == {"student", *(number for number in NUMBERS if number[0] in "12"), OF,
                              "reasons", "look at"}
    assert "container" in printed and "--seed 5" in printed
    marks = {row["student"]: row[OF] for row in rows}
    assert marks["honest"] == marks["Łukasz"] == ALL_THREE
    assert marks["emoji"] == str(CONTROL.marks + OTHER.marks)


def test_two_submissions_of_one_name_are_told_apart_by_their_paths(odd):
    assert [row["student"] for row in odd[1]][:2] == ["a/hw1", "b/hw1"]


@pytest.mark.parametrize("name, reason", [
    ("hw.zip", "the submission is no folder that can be read"),
    ("linked", "the submission is a link to a folder")])
def test_what_is_no_folder_is_an_outcome_of_its_row(name, reason, odd):
    row = next(row for row in odd[1] if row["student"] == name)
    assert row[OF] == "0" and reason in row["reasons"]


@pytest.mark.parametrize("name", ["'=cmd|calc", "'-x", r"\x1b[2J", r"\xff"])
def test_a_name_is_harmless_in_a_terminal_and_in_a_spreadsheet(name, odd):
    printed, rows = odd
    assert next(row[OF] for row in rows if row["student"] == name) == ALL_THREE
    assert name.lstrip("'") in printed and "\x1b" not in printed


def test_a_folder_that_cannot_be_read_is_an_outcome_of_its_row(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    submit(tmp_path / "alice")
    monkeypatch.setattr(os, "listdir", refuse)     # root may read all
    reason = grade.answers(tmp_path / "alice")[NOISE.number].reason
    assert reason == "the submission is no folder that can be read (Permission denied)"


def test_the_processors_that_may_be_used_are_counted(tmp_path, monkeypatch):
    """Not those that there are: a container, or taskset, may allow less."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(grade, "CONTROL_GROUPS", tmp_path)
    assert grade.processors() == 8
    for text, allowed in (("max 100000", 8), ("150000 100000", 1), ("400000 100000", 4)):
        (tmp_path / "cpu.max").write_text(text)
        assert grade.processors() == allowed
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert grade.processors() == 2
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1")
    assert grade.processors() == 8


def test_marks_are_written_as_they_come_and_kept_at_ctrl_c(tmp_path, monkeypatch, capsys):
    def run(cases, seconds, jobs, seed, done):
        for case in dict.fromkeys(cases):     # three of a, one of b: its others are equal
            with open(tmp_path / "marks.csv", encoding="utf-8") as file:
                seen.append(file.read().count("\n"))
            if len(seen) == 4:
                raise KeyboardInterrupt
            done(case, "not run")

    seen, folders = [], [submit(tmp_path / name, RIGHT + f"  # {name}") for name in "ab"]
    monkeypatch.setattr(grade, "run_all", run)
    with pytest.raises(SystemExit) as exit:
        command.main(["grade", *map(str, folders), "--csv", str(tmp_path / "marks.csv")])
    assert seen == [1, 1, 1, 2]     # lines of the file before each answer
    assert "1 of 2" in str(exit.value.code) and "marks.csv" in str(exit.value.code)
    rows = (tmp_path / "marks.csv").read_text("utf-8").splitlines()
    assert len(rows) == 2 and rows[1].startswith("a,")
    assert re.search("^a .* 0$", capsys.readouterr().out, re.M)


def test_the_table_and_the_csv_say_the_same(tmp_path, capsys):
    folder = submit(tmp_path / "alice")
    command.main(["grade", str(folder), "--csv", str(tmp_path / "marks.csv"), "--jobs", "1"])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("alice"))
    assert row.split()[-1] == ALL_THREE
    header, line = (tmp_path / "marks.csv").read_text("utf-8").splitlines()
    assert header == ",".join(["student", *NUMBERS, "of 100", "reasons", "look at"])
    assert line.split(",")[:len(NUMBERS) + 2] == row.split()


@pytest.mark.parametrize("parts", [[], [1], [2, 4]])
def test_an_untouched_starter_earns_nothing(parts, tmp_path):
    handout.starter(tmp_path, parts)
    for asked in (parts, []) if parts != [2, 4] else (parts,):     # its parts 1 and 3 are solved
        found = grade.answers(tmp_path, handout.chosen(asked))
        assert {answer.reason for answer in found.values()} == {grade.BLANK}


def test_a_copied_function_is_named_for_a_person_to_read(tmp_path):
    for name, text in REFERENCE.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = grade.answers(tmp_path)
    assert all(answer.case for answer in found.values())
    assert "equal to the original" in found["5.4"].look
    assert found["2.2"].look == ""     # one can hardly write it otherwise


# The whole zoo, and a class of forty -------------------------------------------------------------

def graded(folder, table):
    """{(number, name): reason} of all answers in a table {number: {name: text}}, by the grader.

    A submission holds one answer to each question; a question that has no more of them is a blank.
    """
    turns, given = max(map(len, table.values())), {}
    for turn in range(turns):
        texts = code.blanked([question for question in QUESTIONS
                              if turn >= len(table[question.number])])
        for question in QUESTIONS:
            for name in list(table[question.number])[turn:turn + 1]:
                texts = zoo.placed(table[question.number][name], question, texts)
                given[question.number, name] = folder / f"{turn}"
        (folder / f"{turn}").mkdir()
        for file, text in texts.items():
            (folder / f"{turn}" / file).write_text(text, encoding="utf-8")
    marks = grade.grade(sorted(folder.iterdir()), seconds=30, seed=random.randrange(10 ** 6))
    return {key: marks[path][key[0]].reason for key, path in given.items()}


@pytest.mark.zoo
def test_every_right_answer_of_the_zoo_earns_its_marks(tmp_path):
    assert zoo.RIGHT.keys() == set(NUMBERS) and min(map(len, zoo.RIGHT.values())) >= 3
    found = graded(tmp_path, zoo.RIGHT)
    assert len(found) >= 63 and {key: reason for key, reason in found.items() if reason} == {}


@pytest.mark.zoo
def test_every_wrong_answer_of_the_zoo_is_refused_for_its_mistake(tmp_path):
    assert zoo.WRONG.keys() == set(NUMBERS) and min(map(len, zoo.WRONG.values())) >= 4
    texts = {number: {name: text for name, (text, _) in answers.items()}
             for number, answers in zoo.WRONG.items()}
    found = graded(tmp_path, texts)
    assert len(found) >= 84
    assert {key: reason for key, reason in found.items()
            if not reason or not re.search(zoo.WRONG[key[0]][key[1]][1], reason)} == {}


@pytest.mark.zoo
def test_a_question_is_solved_in_a_starter_when_it_and_what_it_needs_are(starter, tmp_path):
    for question in QUESTIONS:
        begun = shutil.copytree(starter, tmp_path / question.number)
        solve(begun, question.number, *question.needs)
        told = own_tests(begun, "-q", "--question", question.number)
        assert "passed" in told and "failed" not in told, f"{question.number}\n{told}"


@pytest.mark.zoo
@pytest.mark.parametrize("part", PARTS)
def test_the_tests_of_a_part_need_no_later_part(part, tmp_path):
    handout.starter(tmp_path, [part])
    solve(tmp_path, *(question.number for question in handout.chosen([part])))
    told = own_tests(tmp_path, "-q")
    assert "passed" in told and "failed" not in told, told


@pytest.mark.zoo
def test_the_code_in_the_answers_runs():
    answers = (code.ROOT / "tests/assignments/answers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", answers, re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        done = subprocess.run([sys.executable, "-"], input=block, cwd=code.ROOT, text=True,
                              capture_output=True)
        assert done.returncode == 0, block + done.stderr


@pytest.mark.zoo
def test_every_planted_bug_is_caught_by_the_test_that_is_named_for_it():
    done = subprocess.run([sys.executable, "-m", "tests.mutants", "--trust"], cwd=code.ROOT,
                          text=True, capture_output=True)
    assert "left: none" in done.stdout, done.stdout + done.stderr
    assert "not by" not in done.stdout, done.stdout


def smoke(folder, texts):
    """The command of BUGS.md on these files, without its pictures: its exit code, what it reached."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    drawn = ("import train; train.draw_rollouts = train.draw_curves = lambda *arguments: None; "
             "train.main(['--smoke', '--decoupled', '--out', 'run'])")
    done = subprocess.run([sys.executable, "-c", drawn], cwd=folder, text=True, capture_output=True)
    if done.returncode:
        return done.returncode, done.stderr[-500:]
    with open(folder / "run/metrics.csv", newline="") as file:
        rows = [[row["loss"], row["learning_rate"], row["success"]] for row in csv.DictReader(file)]
    summary = json.loads((folder / "run/summary.json").read_text())
    return 0, [rows, *(summary[name] for name in ("score", "score_se", "success_rate", "success_se",
                                                  "max_coverage", "final_coverage", "parameters"))]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return smoke(tmp_path_factory.mktemp("sound") / "run", REFERENCE)


@pytest.mark.zoo
@pytest.mark.parametrize("name", bugs.NAMES)
def test_a_bug_of_the_hunt_is_silent_and_can_be_seen(name, sound, tmp_path):
    """A crash, an error, or a bug in code that the command of BUGS.md never comes to."""
    row = next(row for row in bugs.bugs() if row[0] == name)
    status, reached = smoke(tmp_path / "run", bugs.plant([row]))
    assert status == sound[0] == 0, reached
    assert reached != sound[1]


@pytest.mark.zoo
def test_a_class_of_forty_gets_its_marks(tmp_path):
    """No two answers are equal, so that none is shared; some students try a trick, one a loop."""
    drawn, expected = random.Random(0), {}
    tricks = [*HOSTILE.values(), ("while True: pass", "time limit")]
    for number in range(40):
        folder = tmp_path / f"student-{number:02d}"
        folder.mkdir()
        texts, right = dict(REFERENCE), set(NUMBERS)
        if number == 1:
            texts, right = code.blanked(QUESTIONS), set()
        for question in QUESTIONS if number > 1 else ():
            file, owner, name = code.place(question.target)
            kind = drawn.choice(["right", "right", "blank", "wrong"])
            if kind == "blank":
                texts[file] = code.blank(texts[file], owner, name, f"{question.number}: {name}")
            if kind == "wrong":
                planted = bugs.plant([drawn.choice(wrong_answers(question)[:2])])[file]
                texts[file] = code.transplant(texts[file], owner, name, planted)
            if kind != "right":
                right.remove(question.number)
        if number >= 40 - len(tricks):
            body, reason = tricks[number - 40]
            trick = submit(tmp_path / "trick", body) / "diffusion.py"
            texts["diffusion.py"] = code.transplant(texts["diffusion.py"], "DDPM", "add_noise",
                                                    trick.read_text(encoding="utf-8"))
            right = right - {NOISE.number} if reason else right | {NOISE.number}
        for question in QUESTIONS:
            file, owner, name = code.place(question.target)
            function = code.find(texts[file], owner, name)
            if not code.is_blank(function.node):     # a comment that nobody else has
                lines = texts[file].split("\n")
                lines[function.end - 1] += f"  # student {number}"
                texts[file] = "\n".join(lines)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        expected[folder] = right
    start = time.monotonic()
    marks = grade.grade(list(expected), seconds=30)
    seconds = time.monotonic() - start
    judged = sum(mark.reason != grade.BLANK for found in marks.values() for mark in found.values())
    print(f"\nforty submissions, {judged} answers: {seconds:.0f} s")
    wrong = {f"{folder.name} {number}: {mark.reason or 'earned'}" for folder, found in marks.items()
             for number, mark in found.items() if (mark.reason == "") != (number in expected[folder])}
    assert not wrong
    assert seconds < 600
