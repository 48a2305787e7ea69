"""A GPU computes what a CPU computes: the networks, acting, files, both recipes, resuming, bf16.

Each test runs on the CPU as well, so that it is known to work before a GPU is at hand. Without a
GPU its "cuda" half is skipped. The meta device computes shapes alone: it refuses an operation on
tensors of two devices, so it finds a tensor that was made on the CPU by mistake, without a GPU.
"""
import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sim_pusht
import train
from diffusion import DiffusionPolicy
from film import MECHANISMS, make_conditioning
from heads import BACKBONES, SIZES, make_backbone
from tests import benchmark, benchmark_gpu, benchmark_run

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = pytest.param("cuda", marks=NEEDS_GPU)
PAIRS = [(name, mechanism) for name in BACKBONES for mechanism in BACKBONES[name].mechanisms]

on_each_device = pytest.mark.parametrize("device", ["cpu", GPU])


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32: with it a GPU rounds the factors of a product in fp32 to 10 bits."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, allowed in zip(switches, before):
        switch.allow_tf32 = allowed


def make_policy(backbone="mlp", mechanism="film", observation="state", device="cpu"):
    """A policy for PushT, the same one on each device; no weight is at 0, where it starts."""
    torch.manual_seed(0)
    backbone = make_backbone(backbone, conditioning=mechanism)
    _, goal = sim_pusht.TASKS["full"]
    conditioning = make_conditioning(backbone, observation, obs_steps=train.OBS_STEPS,
                                     corners=sim_pusht.KEYPOINTS.tolist(), goal=goal.tolist())
    policy = DiffusionPolicy(conditioning, backbone, train.ACTION_SCALE, (0.0, 512.0))
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return policy.eval().to(device)


def make_observations(observation, count=3):
    """Observations of `count` scenes, on the CPU."""
    env = sim_pusht.PushT(count)
    past = np.repeat(env.state()[:, None], train.OBS_STEPS, axis=1).astype(np.float32)
    _, goal = sim_pusht.TASKS["full"]
    seen = sim_pusht.observe(past, observation, goal)
    if observation == "state":
        return torch.as_tensor(seen)
    return {name: torch.as_tensor(values) for name, values in seen.items()}


def move(values, device):
    """A tensor, or a dict of tensors, on another device."""
    if isinstance(values, dict):
        return {name: tensor.to(device) for name, tensor in values.items()}
    return values.to(device)


def only(values, row):
    """One sample of a batch, as a batch of one."""
    if isinstance(values, dict):
        return {name: tensor[row:row + 1] for name, tensor in values.items()}
    return values[row:row + 1]


def draw(count=3):
    """Noisy actions, timesteps and noise, drawn on the CPU: a GPU draws other numbers."""
    shape = count, train.HORIZON, train.ACTION_DIM
    return torch.randn(shape), torch.randint(100, (count,)), torch.randn(shape)


def loss_and_gradients(policy, observations, noisy_actions, timestep, noise):
    """What `policy.loss` computes after its draws, and the gradient of each weight by its name."""
    perceived = policy.conditioning.encoder.perceive(observations)
    o = policy.conditioning.encode(perceived)
    loss = F.mse_loss(policy.predict_noise(noisy_actions, timestep, o), noise)
    policy.zero_grad()
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in policy.named_parameters()
                           if weight.grad is not None}


def reference(policy, observations, draws):
    """The same on the CPU, one sample at a time: the mean over the samples.

    So the CPU's own half of a test compares two ways to the numbers as well.
    """
    count, each = len(draws[0]), []
    for row in range(count):
        drawn = [only(part, row) for part in draws]
        each.append(loss_and_gradients(policy, only(observations, row), *drawn))
    losses, gradients = zip(*each)
    mean = {name: sum(rows[name] for rows in gradients) / count for name in gradients[0]}
    return sum(losses) / count, mean


def assert_same_to_1e_4(loss, gradients, expected_loss, expected):
    """Relative to the loss, and to the largest number of each gradient.

    A small gradient is compared with a tenth of the largest number of all gradients: some are 0 but
    for rounding, such as that of a bias which a norm behind it takes away again.
    """
    assert abs(loss.cpu() - expected_loss) <= 1e-4 * expected_loss
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        allowed = 1e-4 * max(gradient.abs().max(), 0.1 * largest)
        assert (gradients[name].cpu() - gradient).abs().max() <= allowed, name


# The networks ------------------------------------------------------------------------------------

@on_each_device
@pytest.mark.parametrize("backbone, mechanism", PAIRS)
def test_loss_and_gradients_are_the_cpus(backbone, mechanism, device):
    policy, observations = make_policy(backbone, mechanism), make_observations("state")
    draws = draw()
    expected = reference(policy, observations, draws)
    policy.to(device)
    found = loss_and_gradients(policy, move(observations, device),
                               *(part.to(device) for part in draws))
    assert found[0].device.type == device
    assert_same_to_1e_4(*found, *expected)


@on_each_device
def test_loss_and_gradients_from_pixels_are_the_cpus(device):
    policy, observations = make_policy(observation="pixels"), make_observations("pixels")
    draws = draw()
    expected = reference(policy, observations, draws)
    policy.to(device)
    found = loss_and_gradients(policy, move(observations, device),
                               *(part.to(device) for part in draws))
    assert_same_to_1e_4(*found, *expected)


@pytest.mark.parametrize("backbone, mechanism", PAIRS)
def test_an_update_and_a_sample_make_no_tensor_on_another_device(backbone, mechanism):
    policy = make_policy(backbone, mechanism, device="meta")
    policy.sampling_steps = 2
    observations = torch.empty(3, 2, 5, device="meta")
    actions = torch.empty(3, 16, 2, device="meta")
    assert policy.loss(observations, actions).is_meta
    assert policy.sample(observations).is_meta


@pytest.mark.parametrize("condition", ["joints", "pose", "none"])
def test_an_update_of_stage_1_makes_no_tensor_on_another_device(condition):
    config = train.settings(train.Config(recipe="decoupled", device="cpu"))
    config = dataclasses.replace(config, device="meta")
    backbone = make_backbone("mlp")
    conditioning = make_conditioning(backbone, condition, horizon=train.HORIZON)
    policy = train.make_policy(conditioning, backbone, config)     # 4 of the 16 steps in the loss
    observed = torch.empty(3, 16, 3 if condition == "joints" else 2, device="meta")
    actions, agent = torch.empty(3, 16, 2, device="meta"), torch.empty(3, 2, device="meta")
    assert policy.loss(observed, actions, agent).is_meta


@on_each_device
@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_rounds_the_loss_and_leaves_weights_and_gradients_in_fp32(backbone, device):
    policy, observations = make_policy(backbone, device=device), make_observations("state", 64)
    given = move(observations, device), *(part.to(device) for part in draw(64))
    loss, gradients = loss_and_gradients(policy, *given)
    with torch.autocast(device, torch.bfloat16):
        rounded_loss, rounded = loss_and_gradients(policy, *given)
    assert 0 < abs(rounded_loss / loss - 1) < 0.01
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    exact, near = (torch.cat([gradient.flatten().double() for gradient in parts.values()])
                   for parts in (gradients, rounded))
    assert F.cosine_similarity(exact, near, dim=0) > 0.99


# Acting and files --------------------------------------------------------------------------------

def act(policy, observations, noise):
    """policy.act from the given noise (B,T,A), which DDIM draws once, at the start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, generator, device: noise.to(device))
        return policy.act(observations)


@on_each_device
@pytest.mark.parametrize("observation", ["state", "pixels"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_actions_are_the_cpus(backbone, observation, device):
    policy, observations = make_policy(backbone, observation=observation), \
        make_observations(observation)
    noise, _, _ = draw()
    expected = torch.cat([act(policy, only(observations, row), only(noise, row))
                          for row in range(len(noise))])
    found = act(policy.to(device), observations, noise)     # act itself moves the observations
    assert found.device.type == device
    assert (found.cpu() - expected).abs().max() < 0.1     # px


@on_each_device
def test_a_policy_file_is_loaded_on_either_device(device, tmp_path):
    policy, observations, (noise, _, _) = make_policy(), make_observations("state"), draw()
    policy.to(device).save(tmp_path / "policy.pt")
    for place in {"cpu", device}:
        loaded = DiffusionPolicy.load(tmp_path / "policy.pt", place)
        for name, weight in loaded.state_dict().items():
            assert weight.device.type == place
            assert torch.equal(weight.cpu(), policy.state_dict()[name].cpu()), name
        difference = act(loaded, observations, noise).cpu() - act(policy, observations, noise).cpu()
        assert difference.abs().max() < 0.1     # px


# train.py ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A file of two short demonstrations, written by hand."""
    path = tmp_path_factory.mktemp("demos") / "demos.npz"
    state = np.random.default_rng(0).uniform(100, 400, (60, 5)) * [1, 1, 1, 1, 0.01]
    np.savez(path, state=state, action=state[:, :2] + 5, episode_ends=np.array([25, 60]))
    return path


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing knows no device, and takes longer than all the rest of a short run."""
    for figure in ("draw_rollouts", "draw_curves"):
        monkeypatch.setattr(train, figure, lambda *_: None)


def run(demos, out, device, *more):
    """A run of a few updates, whose folder is `out`; returns its summary."""
    return train.main(["--smoke", "--demos", str(demos), "--steps", "8", "--stage1-steps", "4",
                       "--episodes", "2", "--out", str(out), "--device", device, *more])


def weights_of(path, part=""):
    """The weights in a policy file whose names begin with `part`."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["weights"]
    return {name: weight for name, weight in weights.items() if name.startswith(part)}


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@on_each_device
@pytest.mark.usefixtures("short_episodes", "no_figures")
@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_both_recipes_from_the_first_update_to_the_score(observation, device, demos, tmp_path):
    more = "--observation", observation
    normal = run(demos, tmp_path / "normal", device, *more)
    decoupled = run(demos, tmp_path / "decoupled", device, *more, "--decoupled")
    assert normal["device"] == decoupled["device"] == device
    assert normal["parameters"]["frozen"] == 0
    assert decoupled["parameters"]["frozen"] == decoupled["parameters"]["backbone"]
    head = weights_of(tmp_path / "decoupled/action_head.pt", "backbone.")
    assert_equal_weights(weights_of(tmp_path / "decoupled/policy.pt", "backbone."), head)


@pytest.mark.usefixtures("short_episodes", "no_figures")
@pytest.mark.parametrize("backbone, device", [     # on the CPU, test_robust.py does this for all
    ("mlp", "cpu"), *(pytest.param(name, "cuda", marks=NEEDS_GPU) for name in BACKBONES)])
def test_a_resumed_run_ends_with_the_same_bits(backbone, device, demos, tmp_path, monkeypatch,
                                               set_intervals):
    """As the docstring of train.Run promises. The run ends in stage 2, two updates after a
    checkpoint, and the resumed run does these two again."""
    set_intervals(monkeypatch, log_every=2, checkpoint_every=4, play_every=100)
    arguments = device, "--decoupled", "--backbone", backbone
    run(demos, tmp_path / "whole", *arguments)
    after_update = train.Run.after_update

    def interrupted(self, step, loss):
        if self.stage == "stage2" and step == 5:
            raise KeyboardInterrupt
        after_update(self, step, loss)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        patch.setattr(train.Run, "after_update", interrupted)
        run(demos, tmp_path / "parts", *arguments)
    run(demos, tmp_path / "parts", *arguments, "--resume")
    for name in ("action_head.pt", "policy.pt"):
        assert_equal_weights(weights_of(tmp_path / "parts" / name),
                             weights_of(tmp_path / "whole" / name))


# The benchmarks that wait for a GPU (tests/benchmark_gpu.py, tests/benchmark_run.py) --------------

FAKE_TRAIN = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if "--broken" in sys.argv:
    sys.exit("train.py: out of paper")
folder.mkdir()
folder.joinpath("metrics.csv").write_text(
    "stage,step,seconds,loss,learning_rate,success\\nstage1,100,1.0,1,1,\\nstage1,300,4.0,1,1,\\n")
if "paper" in sys.argv:
    time.sleep(60)
folder.joinpath("summary.json").write_text(json.dumps(dict(
    seconds=dict(stage1=7.0), iterations_per_second=dict(stage1=88.8), success_rate=0.9,
    success_se=0.02, score=0.99)))
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """In the place of train.py: it ends at once, fails with --broken, takes long for the paper."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(benchmark_gpu, "ROOT", folder)
    monkeypatch.setattr(benchmark_gpu, "PAPER_SECONDS", 1)


@pytest.fixture
def quick(monkeypatch):
    """Small networks, one update to warm up, one to be measured, two demonstrations."""
    for scale in SIZES:
        monkeypatch.setitem(SIZES, scale, {"mlp": dict(SIZES["laptop"]["mlp"], depth=1)})
        monkeypatch.setitem(benchmark_gpu.SIZES, scale, 1)
    monkeypatch.setattr(benchmark_run.Stopwatch, "WARMUP", 1)
    few = functools.partial(benchmark_run.few_demonstrations, 2)
    for module in (benchmark_run, benchmark_gpu):
        monkeypatch.setattr(module, "few_demonstrations", few)


def rows_of(text):
    """The rows of the tables in a report, as lists of their cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("| ")]


@on_each_device
@pytest.mark.usefixtures("fake_train", "quick")
def test_the_gpu_benchmark_measures_all_its_parts(device, tmp_path):
    benchmark.main(["gpu", "--device", device, "--heads", "DP-MLP", "--updates", "1", "--seconds",
                    "100", "--out", str(tmp_path / "gpu.md")])
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "failed" not in report and "missing" not in report
    rates = [row for row in rows_of(report) if row[0] == "DP-MLP" and row[1] in ("fp32", "bf16")]
    assert len(rates) == 4 and all(float(row[2]) > 0 for row in rates)
    assert all((row[5] == "-") == (device == "cpu") for row in rates)
    assert rates[-1][-4:] == ["9.11", "9.82", "19.62", "20.18"]     # table V
    launches = [row for row in rows_of(report) if row[0] == "DP-MLP" and row[1] in SIZES]
    assert [row[1:3] for row in launches] == [["laptop", "128"], ["paper", "64"]]
    assert all(int(row[6].replace(",", "")) > 50 and float(row[7]) > 0 for row in launches)
    assert "stage1 7.0" in report and "stage1 88.8" in report and "0.900 +- 0.020" in report
    assert "at update 300 of stage1 (75.0 updates a second" in report


@pytest.mark.usefixtures("fake_train")
def test_a_part_of_the_gpu_benchmark_that_fails_is_named_and_the_rest_is_measured(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_gpu, "few_demonstrations", lambda: 1 / 0)
    monkeypatch.setattr(benchmark_gpu, "PAPER_SECONDS", 0)
    arguments = "gpu", "--device", "cpu", "--seconds", "20", "--out", str(tmp_path / "gpu.md")
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 1
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "`rates` failed" in report and "`launches` failed" in report
    assert "stage1 88.8" in report
    result = benchmark_gpu.run_train(tmp_path, "broken", 20, "--broken")
    assert benchmark_gpu.describe(*result) == "**It failed**: train.py: out of paper"


def test_a_gpu_benchmark_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["gpu"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "tests.benchmark: gpu: this PyTorch sees no CUDA GPU; --device cpu tries it out without "
        "one (--help tells more)"]


@pytest.mark.usefixtures("short_episodes", "quick")
def test_the_whole_command_is_the_sum_of_its_parts(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_run, "PLAYS", (2, 3))
    threads = torch.get_num_threads()
    benchmark.main(["command", "--updates", "1", "--repeats", "1", "--demonstrations", "2",
                    "--threads", "1"])
    torch.set_num_threads(threads)
    rows = {row[0]: row[1:] for row in rows_of(capsys.readouterr().out)}
    total = float(rows.pop("the whole command, s")[1])
    counted = {part: int(row[0].replace(",", "")) for part, row in rows.items() if row[0].isdigit()
               or "," in row[0]}
    seconds = sum(number * float(rows[part][1]) / (1000 if part.endswith(" ms") else 1)
                  for part, number in counted.items())
    assert abs(total - seconds) < 0.01 * total + 1
    assert list(counted.values()) == [1, 1500, 12000, 29, 1, 3, 1]
    assert all(float(rows[part][1]) > 0 for part in counted)
