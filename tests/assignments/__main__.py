"""Classroom assignments, made from the real code.

    python -m tests.assignments starter DIR [--part N]         a repository with blanks, a handout
    python -m tests.assignments grade DIR... [--csv FILE]      marks for submissions
    python -m tests.assignments bugs DIR [--seed S] [--count K]    a repository with silent bugs
"""
import argparse
import shutil
from pathlib import Path


def empty(folder):
    """The folder, made if need be. Raises ValueError if it holds something."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    return folder


def starter(options):
    from tests.assignments import handout
    handout.chosen(options.part)
    handout.starter(empty(options.folder), options.part)


def grade(options):
    for folder in options.folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
    print("This runs what students wrote: do it in a container, or in an account without rights.")
    from tests.assignments import grade
    marks = grade.grade(options.folders, options.seconds, options.jobs)
    grade.report(marks, options.csv)


def bugs(options):
    from tests.assignments import bugs, code
    if options.list:
        for name, file, _, _, _, story, *_ in bugs.BUGS:
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


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.assignments", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{message} (--help tells more)\n")
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("starter", help="a repository with blanks, and its handout")
    one.add_argument("folder", type=Path, metavar="DIR", help="new or empty")
    one.add_argument("--part", type=int, metavar="N", help="blanks of one part; default: of all")
    one.set_defaults(run=starter)

    one = commands.add_parser("grade", help="marks for submissions, as a table")
    one.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="one for each student")
    one.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a file as well")
    one.add_argument("--seconds", type=float, default=60, metavar="N",
                     help="time limit of one question; default 60")
    one.add_argument("--jobs", type=int, metavar="N", help="at once; default: as many as cores")
    one.set_defaults(run=grade)

    one = commands.add_parser("bugs", help="a repository with silent bugs in it")
    one.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="new or empty")
    one.add_argument("--seed", type=int, default=0, metavar="S", help="which bugs; default 0")
    one.add_argument("--count", type=int, default=5, metavar="K", help="how many; default 5")
    one.add_argument("--key", action="store_true", help="print where they are: for the instructor")
    one.add_argument("--list", action="store_true", help="print all bugs there are, write nothing")
    one.set_defaults(run=bugs)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
