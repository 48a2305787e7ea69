"""The bug hunt: a copy of the six files with some of the silent bugs of tests/mutants.py."""
import ast
import functools
import random

from tests.assignments import code
from tests.mutants import MUTANTS

BUGS = [row for row in MUTANTS if not row[5].startswith("INNOCENT")]

TASK = """# Bug hunt

This code runs, learns, and says nothing; but {count} bugs were planted in it, each a line or a few,
no two in one function. Find them. Each makes the code compute something else than the comments, the
docstrings and the paper (arXiv 2511.12101) say. None is a matter of style.

For each bug hand in:

1. file and line, and what the line should be;
2. what the bug does to the policy, in one sentence;
3. a test, or a few lines that print a number, which tells the wrong code from the right one.

Hints: read a function next to its docstring; ask what its output should be in a case that you can
compute by hand (no noise, one step, one joint, an identity); check shapes, signs, indices, seeds,
`train` and `eval`. `python train.py --smoke` runs all of it in a minute.
"""


@functools.cache
def functions(text):
    """[(first line, last line, name)] of all functions, methods and other statements of a module."""
    found = []
    for node in ast.parse(text).body:
        members = node.body if isinstance(node, ast.ClassDef) else []
        for part in [node, *members]:
            if not isinstance(part, ast.ClassDef):
                owner = f"{node.name}." if part is not node else ""
                name = getattr(part, "name", None) or f"line {part.lineno}"
                found.append((code.first_line(part), part.end_lineno, owner + name))
    return found


def places(row, texts):
    """Where a bug is: (file, start, end, new text), start and end counted in letters."""
    _, file, old, new, _, _, *more = row
    for before, after in [(old, new), *more]:
        start = texts[file].index(before)
        yield file, start, start + len(before), after


def touched(row, texts):
    """The functions that a bug changes: {(file, name)}."""
    found = set()
    for file, start, end, _ in places(row, texts):
        first, last = (texts[file].count("\n", 0, where) + 1 for where in (start, end - 1))
        found |= {(file, name) for low, high, name in functions(texts[file])
                  if low <= last and first <= high}
    return found


def draw(seed, count):
    """`count` bugs, at most one in any function. Raises ValueError if there are not so many."""
    texts, drawn, taken = code.reference(), [], set()
    for row in random.Random(seed).sample(BUGS, len(BUGS)):
        where = touched(row, texts)
        if len(drawn) < count and not where & taken:
            drawn.append(row)
            taken |= where
    if not 1 <= len(drawn) == count:
        raise ValueError(f"--count {count}: there is room for 1 to {len(drawn)} bugs")
    return drawn


def plant(bugs):
    """The six files with these bugs: {name: text}."""
    texts = code.reference()
    changes = [place for row in bugs for place in places(row, texts)]
    for file, start, end, new in sorted(changes, reverse=True):     # from the back: none moves
        texts[file] = texts[file][:start] + new + texts[file][end:]
    return texts


def key(bugs):
    """For the instructor: the lines that say where each bug is, what it does, what catches it."""
    texts = code.reference()
    for row in bugs:
        name, file, _, _, test, story, *_ = row
        where = sorted(function for _, function in touched(row, texts))
        yield f"{name}: {file}, {' and '.join(where)}; caught by {test}"
        yield f"  {story}"
        for _, start, end, new in places(row, texts):
            yield from (f"  - {line}" for line in texts[file][start:end].split("\n"))
            yield from (f"  + {line}" for line in new.split("\n"))
