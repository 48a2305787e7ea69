"""A saved policy in the benchmark itself, gym-pusht, beside our simulator on the same scenes.

    pip install gym-pusht
    python -m tests.test_gym runs/mlp-decoupled-full-laptop-seed0/policy.pt --episodes 50
"""
import argparse

import numpy as np
import pytest
import torch

import sim_pusht
import train
from diffusion import DiffusionPolicy


def play_in_gym(policy, episodes, max_steps=300):
    """The twin of train.evaluate with gym-pusht's environments: max coverage (episodes,)."""
    import gymnasium
    import gym_pusht  # noqa: F401  (registers the environment)
    pixels = policy.conditioning.encoder.observation == "pixels"
    kind = "pixels_agent_pos" if pixels else "state"
    envs = [gymnasium.make("gym_pusht/PushT-v0", obs_type=kind, max_episode_steps=max_steps + 1)
            for _ in range(episodes)]
    seen = [[env.reset(seed=train.EVALUATION_SEED + i)[0] for i, env in enumerate(envs)]]
    generator = torch.Generator().manual_seed(train.EVALUATION_SEED)
    best = np.zeros(episodes)
    while len(seen) <= max_steps and (best <= 0.95).any():
        before, now = seen[max(0, len(seen) - 2)], seen[-1]
        if pixels:
            past = {"pixels": np.stack([one["pixels"] for one in now]),
                    "agent_pos": np.stack([[one["agent_pos"] for one in pair]
                                           for pair in zip(before, now)])}
        else:
            past = sim_pusht.observe(np.stack([before, now], axis=1),
                                     policy.conditioning.encoder.observation)
        chunk = policy.act(past, generator).numpy()
        for targets in chunk.swapaxes(0, 1)[:max_steps + 1 - len(seen)]:
            steps = [env.step(target) for env, target in zip(envs, targets)]
            seen.append([step[0] for step in steps])
            best = np.maximum(best, [step[4]["coverage"] for step in steps])
    return best


@pytest.mark.parametrize("observation, tolerance", [("state", 1e-3), ("pixels", 0.1)])
def test_an_untrained_policy_does_the_same_in_both(observation, tolerance, tmp_path):
    """Same scenes, same noise: the same coverage, until a contact amplifies the last digits, or the
    pixels at the shapes' edges, of which some are a little different."""
    pytest.importorskip("gym_pusht")
    torch.manual_seed(0)
    config, _ = train.parse(["--observation", observation, "--device", "cpu"])
    demonstrations = dict(state=np.zeros((4, 5)), action=np.zeros((4, 2)),
                          episode_ends=np.array([4]))
    config.steps = 1
    config.out = tmp_path / "run"
    policy = train.train_policy(config, train.Run(config), demonstrations)
    policy.save(tmp_path / "policy.pt")
    policy = DiffusionPolicy.load(tmp_path / "policy.pt")
    ours = train.evaluate(policy, "full", 4, max_steps=48)["max_coverage"]
    np.testing.assert_allclose(play_in_gym(policy, 4, max_steps=48), ours, atol=tolerance)


def test_pixels_are_what_the_benchmark_shows():
    pytest.importorskip("gym_pusht")
    import gymnasium
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos")
    ours = sim_pusht.PushT(20, observation="pixels").reset(0)
    for seed in range(20):
        theirs = env.reset(seed=seed)[0]
        assert theirs.keys() == ours.keys()
        assert theirs["pixels"].shape == ours["pixels"][seed].shape
        assert theirs["pixels"].dtype == ours["pixels"].dtype
        off = np.abs(theirs["pixels"].astype(int) - ours["pixels"][seed]).max(-1) > 16
        assert off.mean() <= 0.02
        np.testing.assert_allclose(theirs["agent_pos"], ours["agent_pos"][seed], atol=1e-9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy")
    parser.add_argument("--episodes", type=int, default=50)
    arguments = parser.parse_args()
    policy = DiffusionPolicy.load(arguments.policy)
    for name, best in {"gym-pusht": play_in_gym(policy, arguments.episodes),
                       "ours": train.evaluate(policy, "full", arguments.episodes)["max_coverage"]
                       }.items():
        result = train.scores(dict(max_coverage=best, final_coverage=best))
        print(f"{name:9s}  max reward {result['score']:.3f} +- {result['score_se']:.3f}   "
              f"success {result['success_rate']:.3f} +- {result['success_se']:.3f}")
