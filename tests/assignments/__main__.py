"""Classroom assignments, made from the real code.

    python -m tests.assignments starter DIR [--part N]...      a repository with blanks, a handout
    python -m tests.assignments grade DIR... [--part N]... [--csv FILE]      marks for submissions
    python -m tests.assignments bugs DIR [--seed S] [--count K]    a repository with silent bugs

How to add a question, or to change its marks, is said in tests/assignments/questions.py. What a
public repository cannot hide, and what helps, is said at the top of tests/assignments/answers.md.
"""
import argparse
import contextlib
import math
import os
import secrets
import shutil
import sys
from pathlib import Path


def empty(folder):
    """The folder, made if need be. Raises ValueError if it holds something."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    return folder


def starter(options):
    from tests.assignments import handout
    handout.chosen(options.part)     # before a folder is made
    handout.starter(empty(options.folder), options.part)
    parts = "".join(f" --part {part}" for part in options.part or ())
    print(f"{options.folder} is ready. Grade with: python -m tests.assignments grade DIR...{parts}")


def grade(options):
    """Marks are written as they come; what is done before Ctrl-C is kept and shown."""
    from tests.assignments import handout
    questions = handout.chosen(options.part)
    for folder in options.folders:
        if not os.path.lexists(folder):
            raise ValueError(f"{folder}: no such folder")
    folders = list({os.path.abspath(folder): folder for folder in options.folders}.values())
    print("This runs what students wrote: do it in a container, or in an account without rights.")
    from tests.assignments import grade
    seed = secrets.randbelow(10 ** 6) if options.seed is None else options.seed
    try:
        with contextlib.ExitStack() as stack:
            file = None
            if options.csv:
                file = stack.enter_context(open(options.csv, "x", newline="", encoding="utf-8"))
            table = grade.Table(folders, questions, file)
            marks = grade.grade(folders, questions, options.seconds, options.jobs, seed, table.add)
    except FileExistsError:
        raise ValueError(f"{options.csv} is there already: choose another name") from None
    except KeyboardInterrupt:
        table.show()
        kept = f"; they are in {options.csv}" if options.csv else ""
        sys.exit(f"interrupted: {len(table.rows) - 1} of {len(folders)} have their marks{kept}")
    table.show()
    print(f"{len(marks)} submissions; --seed {seed} draws the same numbers again")


def bugs(options):
    from tests.assignments import bugs, code
    if options.list:
        for name, file, _, _, _, story, *_ in bugs.bugs():
            print(f"{name:32} {file:14} {story}")
        return
    if not options.folder and not options.key:
        raise ValueError("bugs needs a folder, or --key, or --list")
    drawn = bugs.draw(options.seed, options.count)
    if options.folder:
        folder = empty(options.folder)
        for name, text in bugs.plant(drawn).items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        for name in ("requirements.txt", "LICENSE"):
            shutil.copy(code.ROOT / name, folder)
        (folder / "BUGS.md").write_text(bugs.TASK.format(count=options.count), encoding="utf-8")
    if options.key:
        print("\n".join(bugs.key(drawn)))


def whole_number(text):
    """For argparse: a whole number from 1 on."""
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: 1 to 10,000")
    return number


def seconds(text):
    """For argparse: a time that is neither nothing nor endless."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 <= number <= 3600:     # False for NaN
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: 1 to 3600 seconds")
    return number


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m tests.assignments", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = dict(type=int, action="append", metavar="N")

    one = commands.add_parser("starter", help="a repository with blanks, and its handout")
    one.add_argument("folder", type=Path, metavar="DIR", help="new or empty")
    one.add_argument("--part", **part, help="ask this part; may be given again; default: all parts")
    one.set_defaults(run=starter)

    one = commands.add_parser("grade", help="marks for submissions, as a table")
    one.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="one for each student")
    one.add_argument("--part", **part,
                     help="mark this part; may be given again; default: all. Name the parts of the "
                          "starter again: it holds earlier parts solved, and they would earn marks")
    one.add_argument("--csv", type=Path, metavar="FILE",
                     help="a new file; each student's row is written to it as soon as it is known")
    one.add_argument("--seconds", type=seconds, default=30, metavar="N",
                     help="processor time that a question may take; default 30")
    one.add_argument("--jobs", type=whole_number, metavar="N",
                     help="questions at once; default: as many as processors may be used")
    one.add_argument("--seed", type=int, metavar="S",
                     help="of the numbers that some tests draw; default: a new one each time")
    one.set_defaults(run=grade)

    one = commands.add_parser("bugs", help="a repository with silent bugs in it")
    one.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="new or empty")
    one.add_argument("--seed", type=int, default=0, metavar="S", help="which bugs; default 0")
    one.add_argument("--count", type=int, default=5, metavar="K", help="how many; default 5")
    one.add_argument("--key", action="store_true", help="print where they are: for the instructor")
    one.add_argument("--list", action="store_true", help="print all bugs there are, write nothing")
    one.set_defaults(run=bugs)
    for parser_of_command in (parser, *commands.choices.values()):     # one line, not the usage
        parser_of_command.error = lambda message: parser.exit(2, f"{message} (--help tells more)\n")
    return parser


def main(arguments=None):
    parser = make_parser()
    given = sys.argv[1:] if arguments is None else arguments
    # A folder's name may begin with "-".
    given = [f"./{word}" if word.startswith("-") and os.path.lexists(word) else word
             for word in given]
    for stream in (sys.stdout, sys.stderr):     # a name may hold any letter, a terminal may not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parser.parse_args(given)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
