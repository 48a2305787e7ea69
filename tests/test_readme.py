"""README.md and the reports in results/ against the repository: numbers, names, commands, code.

After new runs a test here names the number that the text has to be given.
"""
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import sim_pusht
import train
from results import compare, evaluate, report, swap, swap_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS, EARLIER, APPENDIX = [     # the second: questions whose runs are to be made again
    (ROOT / f"results/{name}.md").read_text(encoding="utf-8")
    for name in ("README", "earlier", "appendix")]
REPORTS = RESULTS + "\n" + EARLIER
# A question may be asked before its runs are made.
ANSWERED = [name for name in compare.PRESETS if (ROOT / f"results/{name}.json").exists()]
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
FLAGS = {flag for parser in (train.make_parser(), evaluate.make_parser())
         for action in parser._actions for flag in action.option_strings}


def cells(preset):
    return report.read(ROOT / "results" / f"{preset}.json")["cells"]


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def rows(markdown):
    """The rows of the tables in a text, each a list of its columns, headers left out."""
    table = [[column.strip() for column in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in markdown.splitlines() if line.startswith("|")]
    separators = [i for i, row in enumerate(table) if not "".join(row).strip("-")]
    return [row for i, row in enumerate(table) if i not in separators and i + 1 not in separators]


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Numbers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ANSWERED)
def test_tables_are_those_of_the_result_files(preset):
    _, shown, _ = report.split_at_markers(REPORTS, preset)
    assert shown == report.table(compare.PRESETS[preset], cells(preset))
    assert shown == (ROOT / "results" / f"{preset}.md").read_text(encoding="utf-8")


def test_every_question_has_its_section_with_table_and_figure():
    files = {path.stem for path in (ROOT / "results").glob("*.json")} - {"swap"}
    sections = set(re.findall(r"<!-- /(\w+) -->", REPORTS)) - {"swap"}
    assert files == set(ANSWERED) <= sections <= set(compare.PRESETS)
    for name in ANSWERED:
        text = section(REPORTS, compare.PRESETS[name].question)
        assert f"<!-- {name} -->" in text and f"]({name}.png)" in text


@pytest.mark.skipif(not (ROOT / "results/swap.json").exists(), reason="its runs are not made yet")
def test_the_table_of_the_swap_is_that_of_its_file():
    _, shown, _ = report.split_at_markers(RESULTS, "swap")
    assert shown == swap_report.tables(cells("swap"))
    assert shown == (ROOT / "results/swap.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", ANSWERED)
def test_every_error_in_a_verdict_is_that_of_a_row_or_of_a_difference_of_two(preset):
    """So a verdict cannot outlive its runs. Differences of rows that share no run."""
    by_label = report.groups(cells(preset))
    known = []
    for key in ("success_rate", "score"):
        spreads = [report.spread(group, key) for group in by_label.values()]
        known += spreads + [(a - b, np.hypot(e, f)) for a, e in spreads for b, f in spreads]
    text = section(REPORTS, compare.PRESETS[preset].question)
    _, _, verdict = report.split_at_markers(text, preset)
    found = re.findall(r"([+-]?\d\.\d+)\s±\s(\d\.\d+)", verdict)
    for mean, error in found:
        # The halves of the last digit: 0.0325 may be written 0.032 or 0.033.
        slack = 0.51 * 10.0 ** -len(error.split(".")[1])
        assert any(abs(float(mean) - m) < slack and abs(float(error) - e) < slack
                   for m, e in known), f"{mean} ± {error}"


def test_the_lead_in_training_is_that_of_the_curves():
    """After how many updates decoupled training solves how many scenes, and normal training."""
    text = " ".join(section(RESULTS, "Does freezing cost success?").split())
    updates, *shown = re.search(r"after ([\d,]+) updates with demonstrations of `full` it solves "
                                r"(0\.\d+) of 50 scenes and normal training (0\.\d+)", text).groups()
    by_label = report.groups(cells("main"))
    for recipe, told in zip(("decoupled", "normal"), shown):
        steps, success = report.curve(by_label[f"full, {recipe}"])
        reached = success[steps.index(int(updates.replace(",", "")))]
        assert reached == pytest.approx(float(told), abs=0.0051)


@pytest.mark.parametrize("task, place", [("full", slice(0, 2)), ("near", slice(2, 4))])
def test_what_to_expect_is_the_range_over_the_committed_seeds(task, place):
    """The quick start names four ranges: score and success of task full, then of task near."""
    text = " ".join(section(README, "Quick start").split())
    ranges = [tuple(map(float, found)) for found in re.findall(r"(0\.\d+) to ([01]\.\d+)", text)]
    group = report.groups(cells("main"))[f"{task}, decoupled"]
    expected = []
    for key in ("score", "success_rate"):
        values = [cell[key] for cell in group]
        expected.append((round(min(values), 3), round(max(values), 3)))
    assert len(group) >= 3 and ranges[place] == expected


def test_the_answers_are_those_of_the_result_files():
    """Here: "label mean ± error; ..." in %, at most two, the label shortened at its start."""
    presets = set()
    for question, answer, here, _, preset in rows(section(README, "Answers")):
        presets.add(preset)
        entries = report.groups(cells(preset))
        if preset == "swap":     # a row has three legs
            entries = {f"{label}, {leg} leg": [cell["legs"][place] for cell in group]
                       for label, group in entries.items() if "legs" in group[0]
                       for place, leg in enumerate(("first", "second", "third"))}
        spreads = {label: report.spread(group, "success_rate") for label, group in entries.items()}
        numbers = here.split("; ")
        assert len(numbers) <= 2 and answer.endswith(".") and len(answer.split()) <= 25, question
        for number in numbers:
            label, *shown = re.fullmatch(r"(.+) (\d+\.\d) ± (\d+\.\d)", number).groups()
            (full,) = [name for name in spreads if name == label] or \
                [name for name in spreads if name.endswith(label)]
            for text, value in zip(shown, spreads[full]):     # 0.9425 may be 94.2 or 94.3
                assert abs(float(text) - 100 * value) < 0.051, f"{preset}: {full} is {spreads[full]}"
        heading = anchor((compare.PRESETS | {"swap": swap.RUNS})[preset].question)
        file = "earlier" if f"<!-- {preset} -->" in EARLIER else "README"
        assert f"(results/{file}.md#{heading})" in question
    measured = {"swap"} if (ROOT / "results/swap.json").exists() else set()
    assert presets == set(ANSWERED) | measured


def test_rows_are_by_one_commit_with_three_seeds_and_a_command_each():
    """All that the report shows; what is to be made again stands in earlier.md."""
    (commit,) = re.findall(r"runs are by\s+commit\s+`(\w{7})`", RESULTS)
    shown = re.findall(r"<!-- /(\w+) -->", RESULTS)
    assert "main" in shown
    for preset in shown:
        found = report.groups(cells(preset))
        if preset in compare.PRESETS:
            assert set(found) <= {label for label, *_ in compare.PRESETS[preset].table()}
        for label, group in found.items():
            assert {cell["commit"] for cell in group} == {commit}, (preset, label)
            assert len({cell["seed"] for cell in group}) == len(group) >= 3, (preset, label)
            assert all(cell["command"] for cell in group)


# Names and commands ------------------------------------------------------------------------------

def test_the_map_names_every_file():
    named = [row[0].strip("`") for row in rows(README.split("## ")[0])]
    assert sorted(named) == [f"{name}.py" for name in MODULES]


@pytest.mark.parametrize("command", [train, evaluate])
def test_the_command_line_says_every_default(command):
    for action in command.make_parser()._actions:
        if action.option_strings and action.dest != "help":
            assert "default" in action.help, action.option_strings



@pytest.mark.parametrize("text", [README, RESULTS, EARLIER, APPENDIX])
def test_files_and_anchors_that_are_linked_exist(text):
    folder = ROOT if text == README else ROOT / "results"
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        assert (folder / path).exists(), link
        if heading:
            target = (folder / path).read_text("utf-8") if path else text
            headings = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
            assert heading in map(anchor, headings), link


@pytest.mark.parametrize("text", [README, RESULTS, EARLIER, APPENDIX])
def test_modules_files_and_names_in_the_code_that_are_named_exist(text):
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert module == "pytest" or path.is_dir() or path.with_suffix(".py").exists(), module
    for file in re.findall(r"[` ](\w+\.py)\b", text):
        assert (ROOT / file).exists() or (ROOT / "results" / file).exists(), file
    for name in re.findall(rf"`((?:{'|'.join(MODULES)})\.(?!py\b)[\w.]+)`", text):
        module, *attributes = name.split(".")
        found = importlib.import_module(module)
        for attribute in attributes:
            assert hasattr(found, attribute), name
            found = getattr(found, attribute)


def test_the_paper_line_by_line_names_something_in_every_row():
    lines = rows(section(README, "The paper, line by line"))
    assert 20 <= len(lines) <= 30
    for paper, here in lines:
        assert "`" in here or here.startswith("not here"), paper


def test_every_flag_that_is_named_exists():
    others = {"--check",                      # of results.compare
              "--part", "--csv", "--key"}     # of the assignments
    assert set(re.findall(r"(--[a-z][\w-]+)", README)) <= FLAGS | others
    for line in re.findall(r"python train\.py([^`\n]*)", README):
        train.parse([word for word in shlex.split(line, comments=True)] + ["--device", "cpu"])
    for line in re.findall(r"python -m results\.evaluate([^`\n]*)", README):
        evaluate.make_parser().parse_args(shlex.split(line, comments=True))


def test_the_recipe_by_hand_runs_as_it_is_printed(monkeypatch, capsys):
    """With fewer updates, demonstrations and scenes: this looks at what it computes, not how well."""
    (code,) = re.findall(r"```python\n(.*?)```", section(README, "The whole recipe by hand"), re.S)
    for most in ("updates=1000", "updates=1500"):
        assert code.count(most) == 1
        code = code.replace(most, "updates=20")
    shown, evaluated = sim_pusht.expert_demonstrations, train.evaluate
    monkeypatch.setattr(sim_pusht, "expert_demonstrations", lambda count, task: shown(5, task))
    monkeypatch.setattr(train, "evaluate", lambda policy, task, episodes: evaluated(
        policy, task, 2, max_steps=20))
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "success" in capsys.readouterr().out
    policy = names["policy"]
    trained = {part: {weight.requires_grad for weight in getattr(policy, part).parameters()}
               for part in ("conditioning", "backbone")}
    assert trained == {"conditioning": {True}, "backbone": {False}}
    assert policy.conditioning.encoder.observation == "state" and not policy.training
    angles, positions, present = names["motion"]()
    np.testing.assert_allclose(names["arm"].forward(angles), positions, atol=0.05)     # px
    states, actions = names["pushing"]()
    assert states.shape == (128, 2, 5) and actions.shape == (128, 16, 2)


def test_the_questions_that_are_named_exist():
    for name in re.findall(r"results\.compare (\w+)", README + REPORTS):
        assert name in compare.PRESETS or name == "NAME", name
