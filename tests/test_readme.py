"""README.md against the repository: tables, line counts, commands."""
import json
import re
from pathlib import Path

import pytest

from results import compare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("preset", re.findall(r"<!-- /(\w+) -->", README))
def test_tables_are_those_of_the_result_files(preset):
    cells = json.loads((ROOT / "results" / f"{preset}.json").read_text())["cells"]
    _, shown, _ = compare.split_at_markers(README, preset)
    assert shown == compare.table(preset, cells)


def test_every_result_file_has_its_table_in_the_readme():
    files = {path.stem for path in (ROOT / "results").glob("*.json")}
    assert files and files == set(re.findall(r"<!-- /(\w+) -->", README))


@pytest.mark.parametrize("preset, place", [("main", slice(0, 2)), ("recipes", slice(2, 4))])
def test_what_to_expect_is_the_range_over_the_committed_seeds(preset, place):
    """The quick start names four ranges: score and success of task full, then of task near."""
    text = " ".join(README.split("## Quick start")[1].split("## ")[0].split())
    ranges = [tuple(map(float, found)) for found in re.findall(r"(0\.\d+) to ([01]\.\d+)", text)]
    cells = json.loads((ROOT / "results" / f"{preset}.json").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell"] == "DP-MLP, decoupled"]
    expected = [(round(min(values), 3), round(max(values), 3)) for values in (
        [cell[key] for cell in cells] for key in ("score", "success_rate"))]
    assert len(cells) == 3 and ranges[place] == expected


def test_line_counts_are_within_ten_per_cent():
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in rows:
        actual = len((ROOT / name).read_text().splitlines())
        assert abs(actual - int(lines)) <= 0.1 * actual, f"{name} has {actual} lines"


def test_pictures_and_modules_that_are_named_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_every_flag_that_is_named_exists():
    import train
    for line in re.findall(r"python (train\.py[^`\n]*)", README):
        arguments = line.split("#")[0].split()[1:]
        train.parse([a for a in arguments if a not in ("--resume",)] + ["--device", "cpu"])
