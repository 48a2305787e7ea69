"""What students get: the starter, a repository with blanks, and HANDOUT.md with the questions.

Parts: a starter asks the questions of one part, of several, or of all. The parts before the last
asked one are solved, because their weeks are over, and because the written questions and
experiments run on them. The parts behind it are blank as well, so that the first week's starter
does not hold the solutions of the last. No test needs a later part.

Of the tests a starter keeps those that its questions name, with the helpers, fixtures and recorded
numbers that these need. (A failing test prints its own lines, and some compute what is expected.)
The others hold answers: tests/benchmark_heads.py has every head a second
time, tests/mutants.py the lines that it changes. Twins that are no answer stay, such as the denoiser
in closed form in diffusion.py. What its written questions tell to read comes with it.
"""
import json
import re
import shutil
import textwrap
from pathlib import Path

from tests.assignments import code
from tests.assignments.questions import PARTS, QUESTIONS
from tests.assignments.student import squeezed

PYTEST = "python -m pytest"
SCHEDULE = "1.1"     # its buffers are recorded, because other questions need them

README = """# The decoupled action head: your copy, with blanks

Some functions of the six Python files raise NotImplementedError. Fill in those that are asked:
HANDOUT.md has the questions, and a function's docstring says what it takes and gives.

    pip install -r requirements.txt
    {first}

The second line tests question {number} (`{target}` in `{file}`). It fails
until you have solved the question. `{pytest}` tests all questions at once. Most failed
tests list the mistakes that they look for. Yours is often among them.

{parts}

Each function is graded alone, within the original of everything else. Helper functions, helper
methods and imports that it needs are taken along from its file. Changes of other functions are
ignored, and the tests tell you if there are any. Leave the names and parameters of the asked
functions as they are. Where an error is asked for, raise the named exception; its message is free.
The first lines of the handout say what holds for every function.
A test of a question may need other questions solved before: "needs", in the handout. The grader has
these solved. While question 1.1 is a blank, the tests of the others use recorded numbers for it.

Hand in a folder, named as you are, with the six files: {files}.
"""


def file_of(test):
    return test.split("::")[0]


def function_of(test):
    return test.split("::")[1].split("[")[0]


def command(question):
    """What tests a question in a starter."""
    return f"{PYTEST} --question {question.number}"


def part_of(question):
    return int(question.number.split(".")[0])


def chosen(parts=None):
    """The questions of these parts; None: all. Raises ValueError if there is no such part."""
    for part in parts or ():
        if part not in PARTS:
            raise ValueError(f"--part {part}: there are {', '.join(map(str, PARTS))}")
    return [question for question in QUESTIONS if not parts or part_of(question) in parts]


# The starter -------------------------------------------------------------------------------------

def starter(folder, parts=None):
    """Write a starter into a folder, which is there and empty."""
    asked = chosen(parts)
    last = max(map(part_of, asked))
    closed = [question for question in QUESTIONS if part_of(question) > last]
    texts = code.blanked([*asked, *closed])
    for name, text in texts.items():
        write(folder / name, text)
    for name in ("requirements.txt", ".gitignore", "LICENSE"):
        shutil.copy(code.ROOT / name, folder)
    shutil.copytree(code.ROOT / "tests/data", folder / "tests/data")
    # With settings of its own, no pytest.ini or setup.py in a folder above is taken for its.
    write(folder / "pytest.ini", "[pytest]\ntestpaths = tests\n")
    conftest = (code.ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    added = Path(__file__).with_name("student.py").read_text(encoding="utf-8")
    write(folder / "tests/conftest.py", f"{conftest}\n\n{added.split(chr(10), 1)[1]}")
    write(folder / "tests/course.json", json.dumps(course(asked, texts), indent=1))

    text = handout(asked)
    tests = [test for question in asked for test in question.tests] + named_tests(text)
    for file in sorted(set(map(file_of, tests))):
        wanted = {function_of(test) for test in tests if file_of(test) == file}
        write(folder / file, code.reduced((code.ROOT / file).read_text(encoding="utf-8"), wanted))
    for name in named_files(text):
        write(folder / name, (code.ROOT / name).read_text(encoding="utf-8"))
    write(folder / "HANDOUT.md", text)
    first = next(question for question in asked if question.number != SCHEDULE)
    file, *_ = code.place(first.target)
    write(folder / "README.md", README.format(
        first=command(first), number=first.number, target=first.target, pytest=PYTEST,
        file=file, parts=said_of_parts(asked, closed), files=", ".join(code.FILES)))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def course(asked, texts):
    """What tests/conftest.py of a starter reads: course.json, as a dict."""
    from diffusion import DDPM
    ddpm = DDPM()
    buffers = {name: values.tolist() for name, values in ddpm.named_buffers()}
    schedule = dict(question=SCHEDULE, num_timesteps=ddpm.num_timesteps, buffers=buffers)
    targets = [code.place(question.target) for question in QUESTIONS]
    given = {}
    for file, text in texts.items():
        functions = [piece for piece in code.pieces(text)
                     if piece.name and (file, piece.owner, piece.name) not in targets
                     and not hasattr(piece.node, "bases")]     # of a class its methods count
        given[file] = {".".join(filter(None, (piece.owner, piece.name))):
                       squeezed(piece.lines(text)) for piece in functions}
    tests = {question.number: list(question.tests) for question in asked}
    return dict(tests=tests, schedule=schedule, given=given)


def said_of_parts(asked, closed):
    """The README's sentences about parts that are not asked."""
    parts = sorted(set(map(part_of, asked)))
    numbers = ", ".join(map(str, parts))
    if len(parts) == len(PARTS):
        return "All parts are asked."
    text = [f"Asked: part {numbers}. Earlier parts that are not asked are solved."]
    if closed:
        behind = ", ".join(map(str, sorted(set(map(part_of, closed)))))
        text.append(f"The functions of part {behind} raise NotImplementedError too. They come later, "
                    "and nothing here needs them. Until then some lessons, and `train.py`, stop where "
                    "such a function is called.")
    return textwrap.fill(" ".join(text), 99)


# The handout -------------------------------------------------------------------------------------

def handout(questions):
    """The text of HANDOUT.md: the questions; the written ones and experiments of their parts."""
    marks = sum(question.marks for question in questions)
    minutes = sum(question.minutes for question in questions)
    text = [f"# Handout\n\n{len(questions)} functions, {marks} marks, about {minutes / 60:.1f} hours. "
            "Each question is graded alone; the marks are for all of its tests, or none.\n\n" + RULES]
    parts = sorted(set(map(part_of, questions)))
    for part in parts:
        text.append(f"## Part {part}: {PARTS[part]}")
        text += [section(question) for question in questions if part_of(question) == part]
    written = written_questions(parts)
    if written:
        total = sum(int(re.search(r"(\d+) marks", question)[1]) for question in written)
        text.append(WRITTEN.format(count=len(written), marks=total))
        text += written
    if max(PARTS) in parts:     # they train, for which all parts must be solved
        text.append(read("experiments.md"))
    return "\n\n".join(text) + "\n"


RULES = """What holds for every function, unless its question says something else:

- It works for any sizes and settings that its docstring allows, not for the default ones alone.
- It leaves what it is given as it was. It may write into tensors that it has made itself.
- Gradients go through it, to all tensors and weights that it uses: no `detach`, no `torch.no_grad`.
  A function that has the decorator `@torch.no_grad()` in your copy keeps it.
- It works on the device of what it is given."""

WRITTEN = """## Written questions

{count} questions, {marks} marks of their own beside those of the functions. A few sentences each, and
the numbers that you computed or measured. Commands run in your copy once the functions that they use
are solved."""


def read(name):
    return Path(__file__).with_name(name).read_text(encoding="utf-8").strip()


def written_questions(parts):
    """The sections of written.md that belong to these parts, as texts."""
    sections = re.split(r"\n(?=### W)", read("written.md"))[1:]
    return [section.strip() for section in sections
            if int(re.search(r"\(part (\d)", section)[1]) in parts]


def named_files(text):
    """The files in results/ that a handout tells to read."""
    return sorted(set(re.findall(r"`(results/[\w.]+\.(?:md|txt))`", text)))


def named_tests(text):
    """The ids of the tests that a handout tells to read."""
    return [f"{file}::{test}" for test, file in
            re.findall(r"`(test_\w+)`\s+in\s+`(tests/\w+\.py)`", text)]


def section(question):
    file, owner, name = code.place(question.target)
    equation = textwrap.indent(question.equation, "    ")
    needs = ", ".join(question.needs) or "nothing"
    return (f"### {question.number} {question.title}\n\n"
            f"`{'.'.join(filter(None, (owner, name)))}` in `{file}`: {question.marks} marks, about "
            f"{question.minutes} minutes. Needs: {needs}. In the project's README: {question.row}.\n\n"
            f"{equation}\n\n"
            f"{question.hint}\n\n"
            f"```\n{command(question)}\n```")
