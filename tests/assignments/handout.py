"""What students get: the starter, a repository with blanks, and HANDOUT.md with the questions.

A starter keeps, of the six files, everything but the bodies of the questions' functions: docstrings
say what is asked. Of the tests it keeps those that the questions name, with the helpers, fixtures and
recorded numbers that these need, because the others hold answers: tests/benchmark_heads.py has every
head a second time, tests/mutants.py the lines that it changes. Twins that are no answer stay, such
as the denoiser in closed form in diffusion.py.
"""
import pprint
import shutil
import textwrap
from pathlib import Path

from tests.assignments import code
from tests.assignments.questions import PARTS, QUESTIONS

PYTEST = "python -m pytest"

README = """# The decoupled action head: your copy, with blanks

Some functions of the six Python files raise NotImplementedError: fill them in. HANDOUT.md has the
questions, a function's docstring says what it takes and gives.

    pip install -r requirements.txt
    {first}

The second line tests question {number} (`{target}` in `{file}`): red now, green when you
are done. `{pytest}` tests all questions at once.

Each function is graded alone, within the original of everything else. So write what it needs inside
of it: no new helpers or imports at the top of the file. Leave its name and parameters as they are.
A test of a question may need other questions solved before: "needs", in the handout; the grader
has these solved.

Hand in a folder, named as you are, with the six files: {files}.
"""


# What a starter adds to tests/conftest.py.
CHOOSING = """

TESTS = {tests}


def pytest_addoption(parser):
    parser.addoption("--question", choices=TESTS, help="only the tests of this question")


def pytest_collection_modifyitems(config, items):
    ids = TESTS.get(config.getoption("--question"))
    if ids:
        items[:] = [item for item in items if {{item.nodeid, item.nodeid.split("[")[0]}} & {{*ids}}]
"""


def file_of(test):
    return test.split("::")[0]


def function_of(test):
    return test.split("::")[1].split("[")[0]


def command(question):
    """What tests a question in a starter."""
    return f"{PYTEST} --question {question.number}"


def chosen(part):
    """The questions of a part; None: all. Raises ValueError if there is no such part."""
    if part not in (None, *PARTS):
        raise ValueError(f"--part {part}: there are {', '.join(map(str, PARTS))}")
    return [question for question in QUESTIONS
            if part is None or question.number.split(".")[0] == str(part)]


def starter(folder, part=None):
    """Write a starter into a folder, which is there and empty."""
    questions = chosen(part)
    for name, text in code.blanked(questions).items():
        write(folder / name, text)
    for name in ("requirements.txt", ".gitignore", "LICENSE"):
        shutil.copy(code.ROOT / name, folder)
    shutil.copytree(code.ROOT / "tests/data", folder / "tests/data")
    conftest = (code.ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    by_number = {question.number: list(question.tests) for question in questions}
    listed = pprint.pformat(by_number, width=100)
    write(folder / "tests/conftest.py", conftest + CHOOSING.format(tests=listed))
    tests = [test for question in questions for test in question.tests]
    for file in sorted(set(map(file_of, tests))):
        wanted = {function_of(test) for test in tests if file_of(test) == file}
        text = (code.ROOT / file).read_text(encoding="utf-8")
        write(folder / file, code.reduced(text, wanted))
    write(folder / "HANDOUT.md", handout(questions))
    first = questions[0]
    write(folder / "README.md", README.format(
        first=command(first), number=first.number, target=first.target, pytest=PYTEST,
        file=code.place(first.target)[0], files=", ".join(code.FILES)))


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")


def handout(questions):
    """The text of HANDOUT.md: the questions, the written ones, the experiments."""
    marks = sum(question.marks for question in questions)
    minutes = sum(question.minutes for question in questions)
    text = [f"# Handout\n\n{len(questions)} functions, {marks} marks, about {minutes / 60:.0f} hours. "
            "Each question is graded alone; the marks are for all of its tests, or none."]
    for part, title in PARTS.items():
        asked = [question for question in chosen(part) if question in questions]
        if asked:
            text.append(f"## Part {part}: {title}")
            text += map(section, asked)
    for name in ("written.md", "experiments.md"):
        path = Path(__file__).with_name(name)
        if path.exists():
            text.append(path.read_text(encoding="utf-8").strip())
    return "\n\n".join(text) + "\n"


def section(question):
    file, names = code.place(question.target)
    equation = textwrap.indent(question.equation, "    ")
    needs = ", ".join(question.needs) or "nothing"
    return (f"### {question.number} {question.title}\n\n"
            f"`{'.'.join(names)}` in `{file}`: {question.marks} marks, about {question.minutes} "
            f"minutes. Needs: {needs}. In the paper: {question.row}.\n\n"
            f"{equation}\n\n"
            f"{question.hint}\n\n"
            f"```\n{command(question)}\n```")
