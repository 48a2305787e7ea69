"""The assignments: every question can be failed and solved, and the grader cannot be fooled cheaply.

    python -m pytest -m zoo tests/test_assignments.py -s     every planted bug, forty submissions
"""
import ast
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

from tests.assignments import __main__ as command
from tests.assignments import bugs, code, grade, handout
from tests.assignments.questions import PARTS, QUESTIONS

NUMBERS = [question.number for question in QUESTIONS]
BY_TARGET = {question.target: question for question in QUESTIONS}
REFERENCE = code.reference()


def changed(texts, question, stop=True):
    """The question's case in files that differ from the reference."""
    files = [(name, text) for name, text in texts.items() if text != REFERENCE[name]]
    return grade.Case(tuple(files), question.tests, stop)


def wrong_answers(question):
    """Planted bugs within the function, those first that one of its own tests is named for."""
    file, names = code.place(question.target)
    inside = [row for row in bugs.BUGS
              if bugs.touched(row, REFERENCE) == {(file, ".".join(names))}]
    named = {handout.function_of(test) for test in question.tests}
    return sorted(inside, key=lambda row: row[4] not in named)


def needed(question):
    """The question and all that its tests need."""
    found = {question.number}
    for other in QUESTIONS:
        if other.number in question.needs:
            found |= needed(other)
    return found


def cases_of(question):
    """What is asked about a question: its blank alone, and two wrong answers."""
    return [changed(code.blanked([question]), question, stop=False),
            *(changed(bugs.plant([row]), question) for row in wrong_answers(question)[:2])]


def alone(question):
    """The question and what it needs are solved, all others are blank."""
    others = [other for other in QUESTIONS if other.number not in needed(question)]
    return changed(code.blanked(others), question)


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
    blank, *wrong = cases_of(question)
    unsolved = asked[blank]
    for test in question.tests:
        reasons = [reason for node, reason in unsolved.items() if grade.is_of(node, test)]
        assert reasons and all(reasons), f"{test} passes, or was not run"
    assert len(wrong) == 2
    for case in wrong:
        assert not re.search("time limit|ended|relies", grade.verdict(case, asked))
        assert grade.verdict(case, asked) != ""


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
    committed, seconds = {}, {}     # flags -> {seed: success}, {seed: seconds}
    for file in (code.ROOT / "results").glob("*.json"):
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            flags = re.sub(r"python train.py|--(?:seed|out) \S+|--resume|--depth 4", "",
                           cell["command"]).split()
            if "near" in flags:
                committed.setdefault(frozenset(flags), {})[cell["seed"]] = cell["success_rate"]
                seconds.setdefault(frozenset(flags), {})[cell["seed"]] = cell["seconds"]["total"]
    rows = re.findall(r"^\| (X\d) \| `(.+)` \| (.+) \| (.+) \| (.+) to (.+) \|$", text, re.M)
    assert [row[0] for row in rows] == ["X1"] * 3 + ["X2"] * 3 + ["X3"] * 3 + ["X4"]
    for _, flags, took, told, low, high in rows:
        kind = frozenset(["--task", "near", *flags.split()])
        success, three = committed[kind], [seconds[kind][seed] for seed in (0, 1, 2)]
        assert took == f"{min(three):.0f} to {max(three):.0f}"
        assert told.split() == [f"{success[seed]:.3f}" for seed in (0, 1, 2)]
        assert float(low) == pytest.approx(max(0, min(success.values()) - 0.05), abs=0.006)
        assert float(high) == pytest.approx(min(1, max(success.values()) + 0.05), abs=0.006)


# What students get -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter")
    handout.starter(folder)
    return folder


def test_a_starter_has_no_answers(starter):
    files = sorted(str(path.relative_to(starter)) for path in starter.rglob("*") if path.is_file())
    tests = {handout.file_of(test) for question in QUESTIONS for test in question.tests}
    data = {f"tests/data/{path.name}" for path in (code.ROOT / "tests/data").iterdir()}
    assert files == sorted({*code.FILES, "README.md", "HANDOUT.md", "LICENSE", "requirements.txt",
                            ".gitignore", "tests/conftest.py", *tests, *data})
    texts = {path: path.read_text(encoding="utf-8") for path in starter.rglob("*.py")}
    bodies = [ast.unparse(node.body) for text in texts.values()
              for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    for question in QUESTIONS:
        file, names = code.place(question.target)
        solution = code.find(ast.parse(REFERENCE[file]), names)
        assert not any(ast.unparse(solution.body[1:]) in body for body in bodies), question.target
        blank = code.find(ast.parse(texts[starter / file]), names)
        assert code.is_blank(blank) and not code.is_blank(solution)
        assert ast.get_docstring(blank) == ast.get_docstring(solution)
        assert ast.dump(blank.args) == ast.dump(solution.args)


def test_a_starter_keeps_all_else_byte_for_byte(starter):
    for name in code.FILES:
        mine, theirs = REFERENCE[name], (starter / name).read_text(encoding="utf-8")
        for question in QUESTIONS:
            file, names = code.place(question.target)
            if file == name:
                solution = code.find(ast.parse(mine), names)
                theirs = code.transplant(theirs, names, solution)
                mine = code.transplant(mine, names, solution)
        assert theirs == mine


def test_the_tests_of_a_starter_pass_when_all_is_solved(starter, tmp_path):
    shutil.copytree(starter, tmp_path / "solved")
    for name, text in REFERENCE.items():
        (tmp_path / "solved" / name).write_text(text, encoding="utf-8")
    shutil.copy(code.ROOT / "tests/assignments/canaries.py", tmp_path / "solved" / grade.CANARIES)
    every = grade.Case((), tuple(test for question in QUESTIONS for test in question.tests))
    process = grade.PROCESSES.Process(target=grade.examine, args=(
        tmp_path / "solved", tmp_path / "result", every.tests, 120))
    process.start()
    process.join()
    assert grade.verdict(every, {every: grade.read(tmp_path / "result")}) == ""
    done = subprocess.run([sys.executable, "-m", *handout.command(NOISE).split()[2:]], text=True,
                          cwd=tmp_path / "solved", capture_output=True)
    assert re.search(rf"\b{len(NOISE.tests)} passed", done.stdout), done.stdout


def test_the_handout_has_every_question_and_a_part_alone(starter, tmp_path):
    text = (starter / "HANDOUT.md").read_text(encoding="utf-8")
    for question in QUESTIONS:
        assert f"### {question.number} {question.title}" in text
        assert handout.command(question) in text
    command.main(["starter", str(tmp_path / "part"), "--part", "2"])
    assert re.findall(r"### (\d)\.", (tmp_path / "part/HANDOUT.md").read_text("utf-8")) == \
        ["2"] * sum(number.startswith("2.") for number in NUMBERS)
    assert (tmp_path / "part/kinematics.py").read_text("utf-8") == REFERENCE["kinematics.py"]


@pytest.mark.parametrize("arguments, message", [
    (["starter", "."], "not empty"), (["bugs", "."], "not empty"), (["grade", "nowhere"], "nowhere"),
    (["starter", "new", "--part", "9"], "1, 2, 3, 4, 5"), (["bugs", "new", "--count", "0"], "count"),
    (["bugs", "new", "--count", "999"], "count"), (["bugs"], "folder"), ([], "command")])
def test_bad_input_is_refused_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").write_text("")
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


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
    for name, old in REFERENCE.items():
        new = (tmp_path / "hunt" / name).read_text(encoding="utf-8")
        compile(new, name, "exec")
        parts = {owner: new.splitlines()[first - 1:last] for first, last, owner in bugs.functions(new)}
        different = [owner for first, last, owner in bugs.functions(old)
                     if "line " not in owner
                     and parts.get(owner) != old.splitlines()[first - 1:last]]
        assert set(different) <= {owner for place in places for file, owner in place if file == name}
    command.main(["bugs", "--key", *arguments[2:]])
    key = capsys.readouterr().out
    assert all(row[0] in key and row[4] in key and row[5] in key for row in drawn)
    files = {path.name for path in (tmp_path / "hunt").iterdir()}
    assert files == {*code.FILES, "requirements.txt", "LICENSE", "BUGS.md"}


def test_every_bug_compiles_and_is_listed(capsys):
    command.main(["bugs", "--list"])
    listed = capsys.readouterr().out
    for row in bugs.BUGS:
        ast.parse(bugs.plant([row])[row[1]])
        assert row[0] in listed and row[5] in listed
    assert len(bugs.BUGS) >= 20


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
            function = f"def add_noise({parameters}):\n{textwrap.indent(body, '    ')}"
            text = code.transplant(text, ["DDPM", "add_noise"], ast.parse(function).body[0])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


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
    "deletes the tests": ("import shutil\nshutil.rmtree('..')\n" + RIGHT, "Error|ended"),
    "patches torch": ("torch.testing.assert_close = lambda *a, **k: None\n"
                      + RIGHT, "changes what the tests rely on"),
    "patches pytest": ("from _pytest.runner import CallInfo\n"
                       "CallInfo.from_call = classmethod(lambda cls, *a, **k: "
                       "cls(None, None, 0, 0, 0, k['when'], _ispytest=True))\n"
                       + RIGHT, "changes what the tests rely on|was not run"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """{name: {number: reason}} of one submission for each trick."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (body, _) in HOSTILE.items():
        submit(folder / name, body)
    submit(folder / "signature", "return 0", "self")
    shutil.rmtree(submit(folder / "half") / "tests", ignore_errors=True)

    def spoil(name, file, change):
        path = submit(folder / name) / file
        path.write_bytes(change(path.read_bytes()))

    spoil("bytes", "diffusion.py", lambda text: text + b"# \xff\xfe\n")
    spoil("syntax", "diffusion.py", lambda text: b"def (\n" + text)
    spoil("import", "diffusion.py", lambda text: b"import sys, os\nos._exit(0)\n" + text)
    spoil("windows", "diffusion.py", lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    spoil("nul", "diffusion.py", lambda text: text + b"\0")
    spoil("large", "diffusion.py", lambda text: text + b"#" * 2_000_000)
    spoil("deep", "diffusion.py", lambda text: text + b"x = " + b"-" * 500_000 + b"1\n")
    spoil("renamed", "diffusion.py", lambda text: text.replace(b"def add_noise", b"def noise"))
    (submit(folder / "missing") / "diffusion.py").unlink()
    (submit(folder / "link") / "diffusion.py").unlink()
    (folder / "link/diffusion.py").symlink_to(code.ROOT / "diffusion.py")
    return {path.name: reasons for path, reasons in grade.grade(sorted(folder.iterdir())).items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_trick_costs_its_own_question_and_no_other(name, hostile):
    reasons, expected = hostile[name], HOSTILE[name][1]
    assert re.search(expected, reasons[NOISE.number]) and "\n" not in reasons[NOISE.number]
    assert (reasons[NOISE.number] == "") == (expected == "")
    assert reasons[CONTROL.number] == reasons[OTHER.number] == ""
    assert list(reasons.values()).count(grade.BLANK) == len(QUESTIONS) - 3


@pytest.mark.parametrize("name, reason", [
    ("bytes", "diffusion.py: not UTF-8"), ("syntax", "diffusion.py: syntax error line 1"),
    ("nul", "diffusion.py: "), ("large", "diffusion.py: larger than 1,000,000 bytes"),
    ("deep", "diffusion.py: "), ("missing", "diffusion.py: no such file"),
    ("link", "diffusion.py: no such file"), ("import", ""), ("windows", ""), ("half", "")])
def test_a_damaged_file_costs_its_own_questions(name, reason, hostile):
    reasons = hostile[name]
    assert reasons[CONTROL.number] == ""
    for number in (NOISE.number, OTHER.number):
        assert reasons[number].startswith(reason) and (reasons[number] == "") == (reason == "")


def test_a_function_with_another_name_or_signature_earns_nothing(hostile):
    assert hostile["renamed"][NOISE.number] == "diffusion.py: no function DDPM.add_noise"
    assert "TypeError" in hostile["signature"][NOISE.number]
    assert hostile["renamed"][OTHER.number] == hostile["signature"][OTHER.number] == ""


def state_of(process):
    """A letter of Linux: Z for a process that has ended and waits for init; "" if there is none."""
    time.sleep(0.5)     # a kill takes its time
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def test_what_never_ends_is_ended_with_all_that_it_started(tmp_path):
    fork = ("import os, time\nif os.fork() == 0:\n"
            "    open({!r}, 'a').write(f'{{os.getpid()}}\\n')\n    while True: time.sleep(1)\n")
    loop = submit(tmp_path / "loop", "while True: pass")
    returns = submit(tmp_path / "returns", fork.format(str(tmp_path / "first")) + RIGHT)
    waits = submit(tmp_path / "waits", fork.format(str(tmp_path / "second")) + "os.wait()")
    start = time.monotonic()
    cases = {folder.name: grade.answers(folder)[NOISE.number] for folder in (loop, returns, waits)}
    found = grade.run_all(cases.values(), seconds=4)
    reasons = {name: grade.verdict(case, found) for name, case in cases.items()}
    assert time.monotonic() - start < 60
    assert reasons == {"loop": "time limit of 4 s", "returns": "", "waits": "time limit of 4 s"}
    for name in ("first", "second"):
        for process in (tmp_path / name).read_text().split():
            assert state_of(process) in ("", "Z")


def test_the_table_and_the_csv_say_the_same(tmp_path, capsys):
    folder = submit(tmp_path / "alice")
    command.main(["grade", str(folder), "--csv", str(tmp_path / "marks.csv"), "--jobs", "1"])
    printed = capsys.readouterr().out
    total = str(NOISE.marks + CONTROL.marks + OTHER.marks)
    row = next(line for line in printed.splitlines() if line.startswith("alice"))
    assert "container" in printed and row.split()[-1] == total
    header, line = (tmp_path / "marks.csv").read_text("utf-8").splitlines()
    assert header == ",".join(["student", *NUMBERS, "total", "reasons"])
    assert line.split(",")[:len(NUMBERS) + 2] == row.split()


# The whole zoo, and a class of forty -------------------------------------------------------------

@pytest.mark.zoo
def test_a_question_is_solved_when_it_and_what_it_needs_are():
    found = grade.run_all([alone(question) for question in QUESTIONS])
    for question in QUESTIONS:
        assert grade.verdict(alone(question), found) == "", question.number


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


@pytest.mark.zoo
def test_a_class_of_forty_gets_its_marks(tmp_path):
    """No two answers are equal, so that none is shared; eleven students try a trick, one a loop."""
    drawn, expected = random.Random(0), {}
    tricks = [*HOSTILE.values(), ("while True: pass", "time limit")]
    for number in range(40):
        folder = tmp_path / f"student-{number:02d}"
        folder.mkdir()
        texts, right = dict(REFERENCE), set(NUMBERS)
        if number == 1:
            texts, right = code.blanked(QUESTIONS), set()
        for question in QUESTIONS if number > 1 else ():
            file, names = code.place(question.target)
            kind = drawn.choice(["right", "right", "blank", "wrong"])
            if kind == "blank":
                texts[file] = code.blank(texts[file], names, f"{question.number}: {names[-1]}")
            if kind == "wrong":
                planted = bugs.plant([drawn.choice(wrong_answers(question)[:2])])[file]
                texts[file] = code.transplant(texts[file], names,
                                              code.find(ast.parse(planted), names))
            if kind != "right":
                right.remove(question.number)
        if number >= 40 - len(tricks):
            body, reason = tricks[number - 40]
            names = ["DDPM", "add_noise"]
            function = code.find(ast.parse(REFERENCE["diffusion.py"]), names)
            function.body = ast.parse(body).body
            texts["diffusion.py"] = code.transplant(texts["diffusion.py"], names, function)
            right = right - {NOISE.number} if reason else right | {NOISE.number}
        for question in QUESTIONS:
            file, names = code.place(question.target)
            function = code.find(ast.parse(texts[file]), names)
            if not code.is_blank(function):
                own = ast.parse(f"student = {number}").body
                function.body[1:1] = own     # behind the docstring
                texts[file] = code.transplant(texts[file], names, function)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        expected[folder] = right
    start = time.monotonic()
    marks = grade.grade(list(expected))
    answered = [answer for folder in expected for answer in grade.answers(folder).values()]
    different = {answer for answer in answered if isinstance(answer, grade.Case)}
    print(f"\nforty submissions, {len(different)} answers: {time.monotonic() - start:.0f} s")
    for folder, reasons in marks.items():
        assert {number for number, reason in reasons.items() if not reason} == expected[folder]
