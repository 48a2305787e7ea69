"""Functions found, blanked and transplanted; copies of the code and of its tests.

A target is "diffusion.DDPM.add_noise" or "heads.causal_mask": a module's class and method, or its
function. Of two that have the same name the last one counts, as it does in Python. All changes are
made to lines of text, so what a student wrote stays as it was written.
"""
import ast
import functools
import re
import shutil
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FILES = ("diffusion.py", "film.py", "heads.py", "kinematics.py", "train.py", "sim_pusht.py")
MOST_BYTES = 1_000_000     # of a submitted file
DEFINITION = re.compile(r"\s*(?:async\s+)?(def|class)\s+(\w+)")


def reference():
    """The six files: {name: text}."""
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}


def place(target):
    """"diffusion.DDPM.add_noise" -> "diffusion.py", "DDPM", "add_noise"; the class may be ""."""
    module, *owner, name = target.split(".")
    return f"{module}.py", "".join(owner), name


def submitted(path):
    """The text of a submitted file, of which nothing runs.

    Lines end in "\\n". What is no letter of the file's encoding becomes U+FFFD. Raises ValueError,
    in one line, if it is missing, a link (to the solution?), too large, or cannot be read.
    """
    try:
        if path.is_symlink():
            raise ValueError(f"{path.name}: a link, not a file")
        if not path.is_file():
            raise ValueError(f"{path.name}: no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path.name}: larger than {MOST_BYTES:,} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    try:
        encoding, _ = tokenize.detect_encoding(iter(data.splitlines(True)).__next__)
    except SyntaxError:     # a coding line that names none
        encoding = "utf-8"
    text = data.decode(encoding, errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# A file as a list of statements --------------------------------------------------------------------

class Piece(NamedTuple):
    """A statement at the top level of a file, or a member of a class there.

    start, end: its lines, counted from 0, decorators included. node: None if it is no Python.
    """
    owner: str     # the class, "" at the top level
    name: str      # of a function or class, "" for other statements
    start: int
    end: int
    node: object

    def lines(self, text):
        return text.split("\n")[self.start:self.end]


def first_line(node):
    """Where a statement begins, its decorators included; counts from 1."""
    return min([node.lineno] + [part.lineno for part in getattr(node, "decorator_list", [])])


@functools.lru_cache(maxsize=32)
def pieces(text):
    """All pieces of a file, as a tuple, a class before its members.

    A file that is no Python is cut where a definition begins, so that an error in one function does
    not hide the others.
    """
    try:
        return tuple(pieces_of_tree(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return tuple(pieces_of_lines(text))


def pieces_of_tree(tree):
    found = []
    for node in tree.body:
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = node.name if named else ""
        found.append(Piece("", name, first_line(node) - 1, node.end_lineno, node))
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            name_of_member = getattr(member, "name", "")
            found.append(Piece(name, name_of_member, first_line(member) - 1, member.end_lineno,
                               member))
    return found


def pieces_of_lines(text):
    """The pieces of a file that is no Python, by their indentation; each is parsed alone."""
    lines = text.split("\n")
    found, owner, inner = [], "", None     # inner: the indentation of the present class's members
    starts = []
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        match = DEFINITION.match(line)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if indent == 0:
            owner, inner = "", None
            if match and match[1] == "class":
                owner = match[2]
            starts.append((number, "", match[2] if match else ""))
        elif owner and (match or line.lstrip().startswith("@")) and inner in (None, indent):
            inner = indent
            starts.append((number, owner, match[2] if match else ""))
    starts.append((len(lines), "", ""))
    decorators = None     # the first line of those that stand before the next definition
    for (start, owner, name), (end, *_) in zip(starts, starts[1:]):
        if not name and lines[start].lstrip().startswith("@"):
            decorators = start if decorators is None else decorators
            continue
        start, decorators = start if decorators is None else decorators, None
        found.append(Piece(owner, name, start, end, parsed(lines[start:end])))
    return found


def parsed(lines):
    """The statement in these lines, None if they are no Python. A class may have lost its body."""
    try:
        return ast.parse("\n".join(moved(lines, 0))).body[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError, IndexError):
        return None


def find(text, owner, name):
    """The piece that defines a function or method, or None."""
    found = [piece for piece in pieces(text) if (piece.owner, piece.name) == (owner, name)]
    return found[-1] if found else None


def moved(lines, column):
    """A statement's lines with another indentation. Lines that are not indented so far stay."""
    first = next(line for line in lines if line.strip())
    old = first[:len(first) - len(first.lstrip())]
    new = " " * column
    return [new + line[len(old):] if line.startswith(old) and line.strip() else line
            for line in lines]


def column(lines):
    """How far a statement is indented."""
    return len(lines[0]) - len(lines[0].lstrip())


# Blanks --------------------------------------------------------------------------------------------

def docstring_of(function):
    return ast.get_docstring(function, clean=False)


def is_blank(function):
    """Is there nothing in it but a docstring, `pass`, or the NotImplementedError of a blank?"""
    body = function.body[docstring_of(function) is not None:]
    if len(body) != 1 or not isinstance(body[0], ast.Raise):
        return all(isinstance(node, ast.Pass) or is_ellipsis(node) for node in body)
    raised = body[0].exc
    raised = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def is_ellipsis(node):
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and node.value.value is ...)


def blank(text, owner, name, message):
    """The text of a file in which a function's body is gone, but for its docstring."""
    function = find(text, owner, name).node
    lines = text.split("\n")
    body = function.body[0]
    if docstring_of(function) is not None:
        start = body.end_lineno
    else:
        start = body.lineno - 1
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1
    raises = f'raise NotImplementedError("{message}")'
    lines[start:function.end_lineno] = [" " * body.col_offset + raises]
    return "\n".join(lines)


def blanked(questions):
    """The six files with the bodies of these questions' functions replaced: {name: text}."""
    texts = reference()
    for question in questions:
        file, owner, name = place(question.target)
        texts[file] = blank(texts[file], owner, name, f"{question.number}: {name}")
    return texts


# Transplants ---------------------------------------------------------------------------------------

def transplant(text, owner, name, theirs):
    """The text of a file in which the function of another file takes the place of its own.

    text: of the file. theirs: the text of the other file, which has the function. What the function
    needs of its own file, and this one does not have, is taken along: helper functions and
    constants, imports, helper methods. A name that this file has as well keeps its meaning here.
    """
    mine, other = pieces(text), pieces(theirs)
    home = find(text, owner, name)
    answer = find(theirs, owner, name)
    extra = needed(answer, [piece for piece in other if piece.node is not None], mine, owner)
    lines = text.split("\n")
    indent = column(home.lines(text))
    methods = [moved(piece.lines(theirs), indent) for piece in extra if piece.owner]
    block = moved(answer.lines(theirs), indent)
    for method in methods:
        block += ["", *method]
    lines[home.start:home.end] = block

    top = next(piece for piece in mine if not piece.owner and piece.start <= home.start < piece.end)
    futures = [piece for piece in other if is_future(piece)]
    helpers = [piece for piece in extra if not piece.owner]
    lines[top.start:top.start] = together(helpers, theirs)
    first = mine[0].end if is_docstring(mine[0].node) else mine[0].start
    lines[first:first] = together(futures, theirs)
    return "\n".join(lines)


def together(found, text):
    return [line for piece in found for line in piece.lines(text)]


def is_future(piece):
    return isinstance(piece.node, ast.ImportFrom) and piece.node.module == "__future__"


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def needed(answer, other, mine, owner):
    """The pieces of a submitted file that its answer needs and the original `mine` does not have.

    In the order of the submitted file. A helper may need further helpers.
    """
    known = {name for piece in mine if not piece.owner for name in defines(piece.node)}
    members = {name for piece in mine if piece.owner == owner for name in defines(piece.node)}
    taken, waiting = [], [answer.node]
    while waiting:
        node = waiting.pop()
        names, attributes = used(node)
        for piece in other:
            if piece.node is answer.node or piece in taken or is_future(piece):
                continue
            given = defines(piece.node)
            if piece.owner == owner and owner:
                wanted = given & attributes - members
            elif not piece.owner and not piece.name == owner:
                wanted = (given & names or "*" in given) and given - known
            else:
                wanted = False
            if wanted:
                taken.append(piece)
                waiting.append(piece.node)
    return sorted(taken, key=lambda piece: piece.start)


def used(node):
    """The names and the attributes that a statement mentions; of a name in quotes as well."""
    names, attributes = set(), set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            attributes.add(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            names.add(part.value)     # a type hint may stand in quotes
    return names, attributes


def defines(node):
    """The names that a statement gives a meaning, outside of functions and classes in it."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    found = set()
    for part in ast.walk(node):
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in part.names}
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, (ast.FunctionDef, ast.ClassDef)):
            found.add(part.name)
    return found


# What a person should look at ----------------------------------------------------------------------

# Names that an honest answer has no use for: they reach files, other modules, or the test itself.
REACHING = {"open", "eval", "exec", "compile", "globals", "locals", "vars", "__import__",
            "importlib", "inspect", "sys", "os", "pathlib", "Path", "gc", "ctypes", "subprocess", "socket",
            "pickle", "traceback", "shutil", "glob", "pytest", "multiprocessing", "threading",
            "urllib", "_pytest", "__builtins__", "__loader__", "__file__", "__subclasses__", "__globals__",
            "__code__", "__closure__", "__dict__", "_getframe", "f_back", "f_locals", "tb_frame",
            "load", "fromfile", "loadtxt", "genfromtxt", "memmap", "setattr"}


def reaching(lines):
    """The names of REACHING in a text, also as a part of a string; sorted."""
    text = re.sub(r"\.eval\(\)", "", "\n".join(lines))     # the mode of a module is no such name
    words = set(re.findall(r"\w+", text))
    return sorted(words & REACHING)


def same_code(one, other):
    """Do two functions have the same body, whatever their comments and docstrings?"""
    bodies = []
    for function in (one, other):
        body = function.body[docstring_of(function) is not None:]
        bodies.append("\n".join(ast.dump(node) for node in body))
    return bodies[0] == bodies[1]


# Copies --------------------------------------------------------------------------------------------

def copy(folder):
    """The six files and the tests with their data, in a new folder: nothing that holds an answer."""
    skipped = shutil.ignore_patterns("__pycache__", "assignments", "mutants.py", "benchmark*",
                                     "test_assignments.py", "zoo.py")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=skipped)
    for name in FILES:
        shutil.copy(ROOT / name, folder)


# A test file that holds no more than some tests need -----------------------------------------------

def mentions(statement):
    """The names in a statement: variables, parameters (fixtures), and text that may name one."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def reduced(text, wanted):
    """The text of a test file with the functions `wanted` and what they need, and nothing else.

    The file's docstring and the fixtures that apply by themselves stay as well. Raises ValueError if
    the file lacks one of them.
    """
    statements = ast.parse(text).body
    missing = set(wanted) - {name for statement in statements for name in changes(statement)}
    if missing:
        raise ValueError(f"there is no test {', '.join(sorted(missing))}")
    kept = {statement for statement in statements
            if changes(statement) & set(wanted) or isinstance(statement, ast.Expr)
            or "autouse" in ast.unparse(statement)}
    while True:
        names = {name for statement in kept for name in mentions(statement)}
        grown = kept | {statement for statement in statements if changes(statement) & names}
        if grown == kept:
            break
        kept = grown
    lines = text.split("\n")
    parts = []
    for statement in statements:
        if statement in kept:
            start = first_line(statement) - 1
            while start and lines[start - 1].startswith("#"):
                start -= 1
            gap = "\n\n" if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else ""
            parts.append(gap + "\n".join(lines[start:statement.end_lineno]))
    return "\n".join(parts) + "\n"


def changes(statement):
    """The names that a statement defines, or whose value it changes: `table["x"] = 1` too."""
    found = defines(statement)
    if isinstance(statement, ast.Assign):
        found |= {node.id for target in statement.targets for node in ast.walk(target)
                  if isinstance(node, ast.Name)}
    return found
