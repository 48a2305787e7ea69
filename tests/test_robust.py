"""What a classroom does to software: kills, full disks, damaged files, odd flags, two windows.

Each fault is made for real, most in a process of its own. The default run takes a few of each kind;
`python -m pytest -m stress` takes them all (about 20 minutes on 2 cores).
"""
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

import diffusion
import sim_pusht
import train
from diffusion import DiffusionPolicy
from results import compare, evaluate

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and limits of POSIX")
stress = pytest.mark.stress


def few_or_all(few, everything):
    """Parametrise over `few` in the default run, over the rest of `everything` with -m stress."""
    few = list(few)
    rest = [value for value in everything if value not in few]
    return few + [pytest.param(value, marks=stress) for value in rest]


# Runs small enough to be done hundreds of times --------------------------------------------------
# `tiny` is one in this process, with `quick` settings; `SMALL` one in a process of its own.

@pytest.fixture(scope="module", autouse=True)
def quick(short_episodes, set_intervals):
    """Both stages are logged, saved and played in the middle, after a few updates."""
    with pytest.MonkeyPatch.context() as patch:
        set_intervals(patch, log_every=5, checkpoint_every=10, play_every=20)
        yield


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The scripted expert's demonstrations of six scenes."""
    path = tmp_path_factory.mktemp("demos") / "six demonstrations, größer.npz"
    np.savez(path, **sim_pusht.expert_demonstrations(6, "near", seed=0))
    return path


def tiny(demos, out, *more):
    return [str(word) for word in (
        "--decoupled", "--smoke", "--demos", demos, "--task", "near", "--stage1-steps", 12,
        "--steps", 25, "--episodes", 2, "--out", out, "--device", "cpu", *more)]


# It makes demonstrations, too, and plays after update 50.
SMALL = ["--decoupled", "--smoke", "--num-demos", "8", "--task", "near", "--stage1-steps", "30",
         "--steps", "60", "--episodes", "1", "--device", "cpu"]


def start(arguments, cwd, script=ROOT / "train.py", **more):
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=cwd, text=True,
                            encoding="utf-8", errors="replace", stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def finish(arguments, cwd, **more):
    """Run it to its end: exit code and what it said, output first."""
    child = start(arguments, cwd, **more)
    printed, said = child.communicate(timeout=300)
    return child.returncode, printed, said


def last_line(said):
    return said.strip().splitlines()[-1]


def outcome(folder):
    """What has to be the same, bit for bit: weights, and metrics but for the seconds."""
    weights = torch.load(folder / "policy.pt", weights_only=True)["weights"]
    rows = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    metrics = [line.split(",")[:2] + line.split(",")[3:] for line in rows]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return weights, metrics, [summary[key] for key in ("score", "max_coverage", "final_coverage")]


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    assert one[1:] == other[1:]


@pytest.fixture(scope="module")
def undisturbed(demos, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train.main(tiny(demos, folder))
    return folder


@pytest.fixture(scope="module")
def expected(undisturbed):
    return outcome(undisturbed)


# Kill it anywhere --------------------------------------------------------------------------------

class Killed(BaseException):
    """Passes every `except` of the program, as a kill does."""


def killed_at_file(number, after, monkeypatch):
    """The program ends just before, or just after, its file number `number` appears."""
    seen, original = [], Path.replace

    def replace(self, target):
        seen.append(target)
        if len(seen) == number and not after:
            raise Killed
        original(self, target)
        if len(seen) == number:
            raise Killed

    monkeypatch.setattr(Path, "replace", replace)
    return seen


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", few_or_all([3, 9, 19], range(1, 25)))
def test_killed_at_any_file_a_run_goes_on_to_the_same_bits(number, after, demos, expected, tmp_path,
                                                           monkeypatch):
    """At every moment at which something is saved, what is there is loaded and goes on."""
    with monkeypatch.context() as patch:
        seen = killed_at_file(number, after, patch)
        try:
            train.main(tiny(demos, tmp_path / "run"))
        except Killed:
            pass
    if number > len(seen):
        assert number > 19, "so many must exist, or this test shows nothing"
        pytest.skip("the run writes fewer files")
    for file in (tmp_path / "run").iterdir():     # whatever has appeared is whole
        if file.suffix == ".pt" and not file.name.startswith("unfinished"):
            diffusion.load_file(file, "saved")
    train.main(tiny(demos, tmp_path / "run", "--resume"))
    assert_same(outcome(tmp_path / "run"), expected)


@stress
@posix
@pytest.mark.parametrize("number", range(20))
def test_kill_9_at_a_random_moment_loses_nothing(number, tmp_path, small):
    """Demonstrations, stages, playing, evaluation, figures: the same command with --resume ends.

    The moment is drawn between the folder's first file and the end: earlier there is nothing to
    resume, later nothing to kill.
    """
    seconds, expected = small
    child = start(SMALL, tmp_path)
    wait_for(lambda: [*tmp_path.glob("runs/mlp*/config.json")], child)
    try:
        child.communicate(timeout=random.Random(number).uniform(0, 0.95) * seconds)
        pytest.skip("it ended before it was killed")
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
    code, _, said = finish([*SMALL, "--resume"], tmp_path)
    assert code == 0, said
    (folder,) = tmp_path.glob("runs/mlp*")
    assert_same(outcome(folder), expected)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """How long the command SMALL takes from its folder's first file on, and what comes out."""
    folder = tmp_path_factory.mktemp("small")
    code, _, said = finish(SMALL, folder)
    assert code == 0, said
    (run,) = folder.glob("runs/mlp*")
    begun, ended = ((run / name).stat().st_mtime for name in ("config.json", "curves.png"))
    return ended - begun, outcome(run)


@posix
@pytest.mark.parametrize("number", few_or_all([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]))
@pytest.mark.parametrize("when", few_or_all(["stage2"], ["demonstrations", "stage1", "stage2",
                                                         "evaluation"]))
def test_asked_to_stop_it_says_in_one_line_how_to_go_on(when, number, tmp_path, small):
    """SIGTERM, a cluster's way of saying stop, does what Ctrl-C does, in every phase."""
    child = start(SMALL, tmp_path)
    if when == "evaluation":
        wait_for(lambda: [*tmp_path.glob("runs/mlp*/policy.pt")], child)
    elif when == "demonstrations":
        wait_for(lambda: [*tmp_path.glob("runs/mlp*/config.json")], child)
    else:
        wait_for(lambda: any(when in file.read_text(encoding="utf-8") for file in
                             tmp_path.glob("runs/mlp*/metrics.csv")), child)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1 and "Traceback" not in said
    command = re.fullmatch("interrupted; go on with: (.*)", last_line(said))[1]
    assert shlex.split(command)[:2] == ["python", "train.py"]
    code, _, said = finish(shlex.split(command)[2:], tmp_path)
    assert code == 0, said
    (folder,) = tmp_path.glob("runs/mlp*")
    assert_same(outcome(folder), small[1])


def wait_for(condition, child, seconds=120):
    end = time.perf_counter() + seconds
    while not condition():
        assert child.poll() is None and time.perf_counter() < end, "it ended, or it hangs"
        time.sleep(0.002)


def test_a_folder_that_holds_no_checkpoint_says_so(demos, expected, tmp_path, capsys):
    nothing = refused(capsys, *tiny(demos, tmp_path / "none", "--resume"))
    assert "nothing to resume" in nothing and "leave out --resume" in nothing
    assert not (tmp_path / "none").exists()
    train.main(tiny(demos, tmp_path / "run"))
    for file in (tmp_path / "run").iterdir():
        if file.name != "config.json":
            file.unlink()
    capsys.readouterr()
    train.main(tiny(demos, tmp_path / "run", "--resume"))
    assert "has no checkpoint yet" in capsys.readouterr().out
    assert_same(outcome(tmp_path / "run"), expected)


def test_a_refused_demonstration_file_leaves_the_folder_free(demos, tmp_path, capsys):
    refused(capsys, *tiny(tmp_path / "nowhere.npz", tmp_path / "run"))
    train.main(tiny(demos, tmp_path / "run", "--steps", 1, "--stage1-steps", 1))


# Two windows, two processes, a thread ------------------------------------------------------------

def test_two_runs_started_at_once_in_one_folder_one_is_refused(demos, tmp_path):
    flags = tiny(demos, "run")
    children = [start(flags, tmp_path) for _ in range(2)]
    said = [child.communicate(timeout=120)[1] for child in children]
    assert sorted(child.returncode for child in children) == [0, 2]
    (line,) = [last_line(text) for text, child in zip(said, children) if child.returncode]
    assert "holds a run" in line and "--out" in line
    DiffusionPolicy.load(tmp_path / "run/policy.pt")


@stress
def test_two_processes_that_make_the_same_demonstrations_do_not_harm_each_other(tmp_path):
    flags = ["--smoke", "--num-demos", 4, "--steps", 1, "--episodes", 1, "--device", "cpu"]
    children = [start([*flags, "--seed", seed], tmp_path) for seed in (0, 1)]
    assert [child.communicate(timeout=120) and child.returncode for child in children] == [0, 0]
    (file,) = tmp_path.glob("runs/demonstrations/*")
    assert len(sim_pusht.load_demonstrations(file)["episode_ends"]) == 4


def test_the_kept_demonstrations_depend_on_task_number_and_simulator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task, number in (("near", 2), ("near", 3), ("full", 2)):
        config, _ = train.parse(["--task", task, "--num-demos", str(number), "--device", "cpu"])
        made = train.get_demonstrations(config)
        kept = train.get_demonstrations(config)
        assert all(np.array_equal(made[name], kept[name]) for name in made)
    files = {file.name: file.read_bytes() for file in Path("runs/demonstrations").iterdir()}
    assert len(files) == len(set(files.values())) == 3
    changed = tmp_path / "sim_pusht.py"
    changed.write_bytes(Path(sim_pusht.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(sim_pusht, "__file__", str(changed))
    train.get_demonstrations(config)
    assert len([*Path("runs/demonstrations").iterdir()]) == 4


def test_a_run_in_another_thread_of_a_notebook(demos, expected, tmp_path):
    summaries = []
    thread = threading.Thread(
        target=lambda: summaries.append(train.main(tiny(demos, tmp_path / "run"))))
    thread.start()
    thread.join()
    assert summaries[0]["episodes"] == 2
    assert_same(outcome(tmp_path / "run"), expected)


# Full disk, read-only folder, no memory ----------------------------------------------------------

@posix
@pytest.mark.parametrize("room", few_or_all([100_000], [0, 300, 20_000, 100_000, 2_000_000]))
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_good(room, small, tmp_path):
    """No file may grow beyond `room` bytes from the first checkpoint on: to a program, a full disk."""
    resource = pytest.importorskip("resource")
    child = start([*SMALL, "--out", "run"], tmp_path)
    wait_for((tmp_path / "run/checkpoint.pt").exists, child)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (room, room))
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1 and "Traceback" not in said, said
    assert re.match("train.py: .*(too large|cannot be written)", last_line(said)), said
    assert not [*(tmp_path / "run").glob("unfinished-*")]
    diffusion.load_file(tmp_path / "run/checkpoint.pt", "checkpoint")
    code, _, said = finish([*SMALL, "--out", "run", "--resume"], tmp_path)
    assert code == 0, said
    assert_same(outcome(tmp_path / "run"), small[1])


def test_a_folder_that_cannot_be_written(demos, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, *tiny(demos, tmp_path / "file" / "run"))
    assert "too long" in refused(capsys, *tiny(demos, tmp_path / ("long" * 100)))
    if os.name == "posix" and os.geteuid() > 0:     # root may write anywhere
        tmp_path.chmod(0o555)
        assert "Permission denied" in refused(capsys, *tiny(demos, tmp_path / "run"))
        tmp_path.chmod(0o755)


@posix
def test_too_little_memory_is_one_line(demos, tmp_path):
    resource = pytest.importorskip("resource")
    limit = 4 * 2 ** 30
    arguments = tiny(demos, tmp_path / "run", "--width", 10_000)
    code, _, said = finish(arguments, tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_AS, (limit, limit)))
    assert code == 1 and "Traceback" not in said, said
    assert re.match("train.py: out of memory .*--width", last_line(said)), said


# Damaged files -----------------------------------------------------------------------------------

class Evil:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("evil was here"),)


def damage(good, kind, seed):
    """The bytes `good` after one mutation."""
    chance = random.Random(seed)
    if kind == "truncated":
        return good[:chance.randrange(len(good))]
    if kind == "flipped":
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        return bytes(bad)
    if kind == "zeroed":
        start = chance.randrange(len(good))
        return good[:start] + bytes(len(good[start:start + 512])) + good[start + 512:]
    if kind == "extended":
        return good + chance.randbytes(chance.choice([1, 100, 70_000]))
    if kind == "code":
        return pickle.dumps(Evil())
    return b""


KINDS = ["empty", "code", "truncated", "flipped", "zeroed", "extended"]
MUTATIONS = [("empty", 0), ("code", 0)] + [(kind, seed) for kind in KINDS[2:] for seed in range(12)]
FILES = ["policy.pt", "action_head.pt", "checkpoint.pt", "config.json", "demos.npz"]


@pytest.fixture(scope="module")
def finished(demos, tmp_path_factory):
    """A folder with demonstrations and the finished run that they were for."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(demos, folder / "demos.npz")
    train.main(tiny(folder / "demos.npz", folder / "run"))
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("seed, kind", [
    pytest.param(seed, kind, marks=[] if seed < 1 else [stress]) for kind, seed in MUTATIONS])
def test_a_damaged_file_is_one_line_that_names_it_or_does_no_harm(
        file, kind, seed, finished, tmp_path, monkeypatch, capsys):
    """What is read from it is right, or it is refused: exit code 2, one line with its name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "copy")
    target, = (tmp_path / "copy").rglob(file)
    target.write_bytes(damage(target.read_bytes(), kind, f"{file}{seed}"))
    main = evaluate.main if file == "policy.pt" else train.main
    if file == "policy.pt":
        arguments = [str(target), "--task", "near", "--episodes", "2", "--device", "cpu"]
    elif file == "action_head.pt":
        arguments = tiny(finished / "demos.npz", tmp_path / "new", "--action-head", target)
    elif file == "demos.npz":
        arguments = tiny(target, tmp_path / "new", "--steps", 1, "--stage1-steps", 1)
    else:
        arguments = tiny(finished / "demos.npz", tmp_path / "copy" / "run", "--resume")
    try:
        summary = main(arguments)
    except SystemExit as stop:
        text = capsys.readouterr().err.strip()
        assert stop.code == 2 and file in text.splitlines()[-1], text
        assert "Traceback" not in text and len(text.splitlines()[-1]) < 800
        assert not re.search(r"\n(?!(train.py|evaluate): )", text), text
    else:
        if file in ("policy.pt", "checkpoint.pt", "config.json"):
            assert summary["max_coverage"] == \
                json.loads((finished / "run/summary.json").read_text())["max_coverage"]
        elif file == "action_head.pt":
            good, bad = (torch.load(path, weights_only=True)["weights"]
                         for path in (finished / "run" / file, target))
            assert all(torch.equal(good[name], bad[name]) for name in good)
        else:
            good, bad = map(sim_pusht.load_demonstrations, (finished / "demos.npz", target))
            assert all(np.array_equal(good[name], bad[name]) for name in good)
    assert not (tmp_path / "evil was here").exists()


def rewritten(path, **entries):
    """A torch file with valid checksums and other entries."""
    torch.save(torch.load(path, weights_only=True) | entries, path)


@pytest.mark.parametrize("file, entries", [
    ("policy.pt", dict(format=99)), ("policy.pt", dict(format=[1])), ("policy.pt", dict(backbone=[])),
    ("policy.pt", dict(backbone={"name": "vae"})), ("policy.pt", dict(weights={})),
    ("policy.pt", dict(conditioning=dict(observation="smell"))), ("policy.pt", dict(policy=3)),
    ("checkpoint.pt", dict(stage="stage2", policy={})), ("checkpoint.pt", dict(average=3)),
    ("checkpoint.pt", dict(cpu_random=torch.zeros(3)))],
    ids=str)
def test_a_file_of_another_version_is_one_line_that_names_it(file, entries, finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    rewritten(tmp_path / "run" / file, **entries)
    with pytest.raises(SystemExit) as stop:
        if file == "policy.pt":
            evaluate.main([str(tmp_path / "run" / file), "--device", "cpu"])
        else:
            train.main(tiny(finished / "demos.npz", tmp_path / "run", "--resume"))
    line = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert file in line and len(line.strip().splitlines()) == 1


@pytest.mark.parametrize("text", [
    "", "{", "[1, 2]", "3", '"text"', "null", '{"task": "full"}', "\ud800",
    pytest.param("[" * 100_000, id="deep")])
def test_a_config_of_another_kind_is_one_line(text, finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run/config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refused(capsys, *tiny(finished / "demos.npz", tmp_path / "run", "--resume"))


def test_a_damaged_file_of_kept_demonstrations_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--smoke", "--num-demos", "2", "--steps", "1", "--episodes", "1", "--device", "cpu"]
    train.main(flags)
    (file,) = Path("runs/demonstrations").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    line = refused(capsys, *flags)
    assert file.name in line and "delete it" in line


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", "<u2", ">i8", "<i4", "|u1"])
def test_demonstrations_in_any_number_type(dtype, demos, tmp_path):
    arrays = sim_pusht.load_demonstrations(demos)
    of_ends = dtype if np.dtype(dtype).kind in "iu" and dtype != "|u1" else ">u8"
    np.savez(tmp_path / "typed.npz", state=arrays["state"].clip(0, 250).astype(dtype),
             action=arrays["action"].clip(0, 250).astype(dtype),
             episode_ends=arrays["episode_ends"].astype(of_ends))
    train.main(tiny(tmp_path / "typed.npz", tmp_path / "run", "--steps", 2, "--stage1-steps", 2))


# Odd flags ---------------------------------------------------------------------------------------

def refused(capsys, *arguments):
    """Exit code 2 and exactly one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(word) for word in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.strip().splitlines()) == 1, said
    return said


FLAGS = {option: action for action in train.make_parser()._actions
         for option in action.option_strings if option.startswith("--") and option != "--help"}
VALUED = [option for option, action in FLAGS.items() if action.nargs is None]


@pytest.mark.parametrize("flag", VALUED)
def test_every_flag_with_every_kind_of_bad_value(flag, capsys):
    """Empty, wrong type, out of range, huge, no number: the line names flag and value."""
    values = ["", "nonsense", "-1", "1e999", "nan", "inf", "9" * 400, "9" * 5000, "1.5.5", "0x10"]
    if FLAGS[flag].type not in (int, float):
        values = ["", "nonsense", "Ünsinn\n"]
    if FLAGS[flag].type is Path:
        values = [""]
    if FLAGS[flag].type is int:
        values.append("0.5")
    for value in values:
        line = refused(capsys, f"{flag}={value}", "--smoke", "--device=cpu")
        assert flag in line, (value, line)
        if value == "":
            value = "." if FLAGS[flag].type is Path else value     # Path("")
        named = value[:20].strip() if FLAGS[flag].type is not float else ""     # 1e999 reads "inf"
        assert named in line, (value, line)


@pytest.mark.parametrize("flags, told", [
    ("--decoupled --random-backbone", "--random-backbone"), ("--pretrained --decoupled", "--decoupled"),
    ("--pretrain-data fast", "--pretrain-data"), ("--random-backbone --pretrain-condition none",
                                                  "--pretrain-condition"),
    ("--decoupled --action-head x.pt --keep-biases", "--keep-biases"),
    ("--action-head x.pt", "--action-head"), ("--evaluate x.pt", "--evaluate"),
    ("--corner-weight 1", "--observation"), ("--backbone unet --conditioning prefix", "prefix"),
    ("--backbone unet --width 64", "unet"), ("--width 3", "multiple"),
    ("--seed 4294967296", "--seed"),
    ("--learning-rate 1e-300", "--learning-rate"), ("--episodes 0", "--episodes"), ("stray", "stray"),
    ("--executed-actions 16", "--executed-actions"), ("--num-demos 7 --demos DEMOS", "7"),
    ("--smok --nonsense", "--nonsense"), ("--se 1 --st 3", "ambiguous")])
def test_contradictory_flags(flags, told, demos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(demos) if word == "DEMOS" else word for word in flags.split()]
    assert told in refused(capsys, "--smoke", "--device", "cpu", *words)
    assert not [*tmp_path.rglob("config.json")]


@pytest.mark.parametrize("flags", few_or_all(
    ["", "main --seeds 0", "main --collect --out file/x"],
    ["", "main --seeds 0", "main --collect --out file/x", "nonsense", "main --seeds x",
     "main --seeds -3", "--check nowhere", "main --collect --out nowhere"]))
def test_bad_flags_of_compare(flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run([sys.executable, "-m", "results.compare", *flags.split()], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


# Numerical faults --------------------------------------------------------------------------------

def write_demos(path, lengths):
    number = sum(lengths)
    state = np.random.default_rng(0).uniform(100, 400, (number, 5)) * [1, 1, 1, 1, 0.01]
    np.savez(path, state=state, action=state[:, :2] + 5, episode_ends=np.cumsum(lengths))
    return path


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 3], [200]], ids=str)
@pytest.mark.parametrize("recipe", ["--decoupled --pretrain-data demonstrations", ""])
def test_few_and_short_demonstrations(lengths, recipe, tmp_path):
    """One step, one episode, shorter than the horizon, fewer than a batch."""
    demos = write_demos(tmp_path / "few.npz", lengths)
    summary = train.main(["--smoke", "--demos", str(demos), *recipe.split(), "--steps", "1",
                          "--stage1-steps", "1", "--episodes", "1", "--device", "cpu",
                          "--out", str(tmp_path / "run")])
    assert 0 <= summary["score"] <= 1


@pytest.mark.parametrize("backbone", few_or_all(["mlp"], ["mlp", "unet", "transformer"]))
@pytest.mark.parametrize("rate", ["1e3", "1e4", "1e-9"])
def test_absurd_learning_rates_end_or_say_so(rate, backbone, demos, tmp_path):
    try:
        train.main(tiny(demos, tmp_path / "run", "--learning-rate", rate, "--backbone", backbone))
    except SystemExit as stop:
        assert "--learning-rate" in stop.code or "actions are NaN" in stop.code
    saved = diffusion.load_file(tmp_path / "run/checkpoint.pt", "checkpoint")
    assert all(value.isfinite().all() for value in saved["average"].values())


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(demos, tmp_path, monkeypatch):
    """The last update of a stage is checked by no later loss."""
    original = torch.optim.AdamW.step

    def step(self, *more):
        original(self, *more)
        if len(self.state) and max(int(state["step"]) for state in self.state.values()) == 12:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(SystemExit, match="nan in stage1, update 12"):
        train.main(tiny(demos, tmp_path / "run"))
    saved = diffusion.load_file(tmp_path / "run/checkpoint.pt", "checkpoint")
    assert saved["step"] == 10 and all(v.isfinite().all() for v in saved["average"].values())


def test_actions_that_are_no_numbers_are_one_line(demos, tmp_path, monkeypatch):
    """A policy whose weights overflow only when it acts."""
    monkeypatch.setattr(DiffusionPolicy, "sample",
                        lambda policy, seen, generator: torch.full((len(seen), 16, 2), torch.nan))
    with pytest.raises(SystemExit, match="^train.py: the policy's actions are NaN"):
        train.main(tiny(demos, tmp_path / "run"))
    diffusion.load_file(tmp_path / "run/checkpoint.pt", "checkpoint")


def test_a_figure_that_cannot_be_drawn_costs_no_number(demos, tmp_path, monkeypatch, capsys):
    """As with a broken matplotlib: what was measured is printed and kept before it is drawn."""
    def draw_rollouts(*_):
        raise OSError("LaTeX was not found")

    monkeypatch.setattr(sim_pusht, "draw_rollouts", draw_rollouts)
    with pytest.raises(SystemExit, match="^train.py: LaTeX was not found"):
        train.main(tiny(demos, tmp_path / "run"))
    assert "\nsuccess " in capsys.readouterr().out
    kept = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit, match="^evaluate: LaTeX was not found"):
        evaluate.main([str(tmp_path / "run/policy.pt"), "--task", "near", "--episodes", "2",
                       "--device", "cpu", "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again/summary.json").read_text(encoding="utf-8"))
    assert again["max_coverage"] == kept["max_coverage"]


# The same numbers twice --------------------------------------------------------------------------

@stress
@pytest.mark.parametrize("recipe", ["--decoupled", "--random-backbone", "--pretrained", "--smoke"])
@pytest.mark.parametrize("backbone", ["mlp", "unet", "transformer",     # the last with FiLM
                                      "transformer --conditioning cross-attention"])
def test_same_seed_same_numbers_and_resumed_as_well(backbone, recipe, demos, tmp_path, monkeypatch):
    def arguments(name, *more):
        words = tiny(demos, tmp_path / name, "--backbone", *backbone.split(), recipe, *more)
        return words[1:]     # without --decoupled: with --smoke again, normal training

    for name in ("once", "again"):
        train.main(arguments(name))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at_file(7, False, patch)
        train.main(arguments("killed"))
    train.main(arguments("killed", "--resume"))
    for name in ("again", "killed"):
        assert_same(outcome(tmp_path / name), outcome(tmp_path / "once"))


# Places and languages ----------------------------------------------------------------------------

POOR = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii", "PYTHONHASHSEED": "77", "MPLBACKEND": "nonsense",
        "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("environment", few_or_all(
    [dict()], [dict(), dict(MPLBACKEND="module://nowhere"), dict(PYTHONIOENCODING="cp1252"),
               dict(PYTHONUTF8="1", PYTHONIOENCODING="utf-8")]), ids=str)
def test_a_poor_environment_and_an_odd_folder_change_nothing(environment, small, tmp_path):
    """No display, another locale and output encoding, spaces and foreign letters in the path."""
    folder = tmp_path / "größer und 日本 'quoted'"
    folder.mkdir()
    arguments = [*SMALL, "--out", "ein größerer run"]
    code, printed, said = finish(arguments, folder, env=POOR | environment)
    assert code == 0, said
    assert_same(outcome(folder / "ein größerer run"), small[1])
    (hint,) = [line for line in printed.splitlines() if line.startswith("next ")]
    if "utf-8" in environment.values():     # the only one here that can print the name
        words = shlex.split(hint.removeprefix("next "))
        assert words[:3] == ["python", "-m", "results.evaluate"]
        code, _, said = finish([*words[2:], "--episodes", 1, "--device", "cpu"], folder,
                               script="-m", env=POOR | {"PYTHONPATH": str(ROOT)})
        assert code == 0, said


@pytest.mark.parametrize("module", few_or_all(["heads"], ["diffusion", "film", "heads",
                                                          "kinematics", "sim_pusht", "train"]))
def test_every_module_starts_where_a_backend_is_named_that_does_not_exist(module, tmp_path):
    arguments = ["--help"] if module == "train" else []
    code, printed, said = finish(arguments, tmp_path, script=ROOT / f"{module}.py", env=POOR)
    assert code == 0 and printed and "Traceback" not in said, said


def test_names_that_windows_can_hold(tmp_path):
    """Folders and files that the program names itself."""
    names = [folder for preset in compare.PRESETS.values()
             for _, _, folder, _ in compare.runs(preset, 2)]
    for backbone in train.BACKBONES:
        config, _ = train.parse(["--backbone", backbone, "--smoke", "--device", "cpu"])
        names.append(train.default_folder(config))
    reserved = {"con", "prn", "aux", "nul"} | {f"{n}{i}" for n in ("com", "lpt") for i in range(10)}
    for name in names:
        for part in PurePosixPath(name.as_posix()).parts:
            assert re.fullmatch(r"[\w.,-]{1,120}", part, re.ASCII) and not part.endswith("."), part
            assert part.split(".")[0].lower() not in reserved


def test_an_old_python_gets_one_line(tmp_path, monkeypatch):
    """What stands before the version is checked must run on it: no import but the library's."""
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    head = source[:source.index("import numpy")]
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit, match="needs Python 3.10 or newer"):
        exec(compile(head, "train.py", "exec", dont_inherit=True), {"__name__": "old"})


# Load --------------------------------------------------------------------------------------------

@stress
@posix
@pytest.mark.parametrize("observation, gib", [("state", 2), ("pixels", 3)])
def test_the_default_run_needs_little_memory(observation, gib, tmp_path):
    """All its demonstrations and scenes; fewer updates, which keep nothing."""
    resource = pytest.importorskip("resource")
    code, _, said = finish(["--decoupled", "--observation", observation, "--steps", 300,
                            "--stage1-steps", 100, "--device", "cpu"], tmp_path)
    assert code == 0, said
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < gib * 2 ** 20     # KiB on Linux


def growth(job, times):
    """What doing it `times` more times, after the first two, leaves: MiB, open files, threads."""
    def now():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages / 256, len(os.listdir("/proc/self/fd")), threading.active_count()

    for number in range(2):
        job(number)
    before = now()
    for number in range(2, 2 + times):
        job(number)
    return [after - start for after, start in zip(now(), before)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@stress
def test_many_runs_in_one_process_leave_nothing_behind(demos, tmp_path):
    memory, files, threads = growth(
        lambda number: train.main(tiny(demos, tmp_path / str(number))), 20)
    assert memory < 50 and files <= 0 and threads <= 0


@stress
@posix
def test_twenty_cells_of_compare_leave_nothing_behind(tmp_path, monkeypatch):
    """Two jobs of five cells each, then ten more: parent process and tables."""
    flags = " ".join(SMALL[1:]).replace("--task near ", "")
    preset = compare.Preset("Does it leak?", f"cell | MLP {flags} | -", ("decoupled",))
    monkeypatch.setitem(compare.PRESETS, "leak", preset)
    for module in ROOT.glob("*.py"):
        shutil.copy(module, tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("tables").mkdir()

    def job(number):
        monkeypatch.setattr(sys, "argv", ["compare", "leak", "--seeds", str([5, 10, 20][number]),
                                          "--out", "tables"])
        compare.main()

    memory, files, threads = growth(job, 1)
    assert memory < 60 and files <= 0 and threads <= 0
    assert len(json.loads(Path("tables/leak.json").read_text("utf-8"))["cells"]) == 20
    with pytest.raises(ChildProcessError):     # no process is left either
        os.waitpid(-1, os.WNOHANG)
