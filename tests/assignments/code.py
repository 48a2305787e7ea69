"""Functions found, blanked and transplanted with `ast`; copies of the code and of its tests.

A target is "diffusion.DDPM.add_noise" or "heads.causal_mask": a module's class and method, or its
function. Of two that have the same name the last one counts, as it does in Python.
"""
import ast
import shutil
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("diffusion.py", "film.py", "heads.py", "kinematics.py", "train.py", "sim_pusht.py")
MOST_BYTES = 1_000_000     # of a submitted file


def reference():
    """The six files: {name: text}."""
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}


def place(target):
    """"diffusion.DDPM.add_noise" -> "diffusion.py", ["DDPM", "add_noise"]."""
    module, *names = target.split(".")
    return f"{module}.py", names


def parse(path):
    """The syntax tree of a submitted file, of which nothing runs.

    Raises ValueError, in one line, if it is missing, a link (to the solution?), or no Python.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name}: larger than {MOST_BYTES:,} bytes")
    try:
        return ast.parse(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: not UTF-8") from None
    except SyntaxError as error:
        raise ValueError(f"{path.name}: syntax error line {error.lineno}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path.name}: cannot be read ({type(error).__name__})") from None


def find(tree, names):
    """The node of a function, or None."""
    for name in names:
        kind = ast.FunctionDef if name == names[-1] else ast.ClassDef
        found = [node for node in tree.body if isinstance(node, kind) and node.name == name]
        if not found:
            return None
        tree = found[-1]
    return tree


def is_blank(function):
    """Is there nothing in it but a docstring and the NotImplementedError of a blank?"""
    body = function.body[ast.get_docstring(function) is not None:]
    return ast.unparse(body).startswith("raise NotImplementedError(") and len(body) == 1


def first_line(node):
    """Where a statement begins, its decorators included; counts from 1."""
    return min([node.lineno] + [part.lineno for part in getattr(node, "decorator_list", [])])


def blank(text, names, message):
    """The text of a file in which a function's body is gone, but for its docstring."""
    function = find(ast.parse(text), names)
    lines = text.split("\n")
    body = function.body[0]
    if ast.get_docstring(function) is not None:
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
        file, names = place(question.target)
        texts[file] = blank(texts[file], names, f"{question.number}: {names[-1]}")
    return texts


def transplant(text, names, function):
    """The text of a file in which another syntax tree takes the place of a function."""
    old = find(ast.parse(text), names)
    lines = text.split("\n")
    new = textwrap.indent(ast.unparse(function), " " * old.col_offset)
    lines[first_line(old) - 1:old.end_lineno] = new.split("\n")
    return "\n".join(lines)


def copy(folder):
    """The six files and all that their tests need, in a new folder."""
    skipped = shutil.ignore_patterns("__pycache__", "assignments", "mutants.py")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=skipped)
    for name in FILES:
        shutil.copy(ROOT / name, folder)


# A test file that holds no more than some tests need -----------------------------------------------

def defines(statement):
    """The names that a statement at a file's top level gives a meaning."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    assigns = isinstance(statement, ast.Assign)     # to a name, or to an item of what it names
    targets = statement.targets if assigns else [statement]
    return {node.id for target in targets for node in ast.walk(target)
            if isinstance(node, ast.Name) and (assigns or isinstance(node.ctx, ast.Store))}


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

    The file's docstring and the fixtures that apply by themselves stay as well.
    """
    statements = ast.parse(text).body
    kept = {statement for statement in statements
            if defines(statement) & set(wanted) or isinstance(statement, ast.Expr)
            or "autouse" in ast.unparse(statement)}
    while True:
        names = {name for statement in kept for name in mentions(statement)}
        grown = kept | {statement for statement in statements if defines(statement) & names}
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
