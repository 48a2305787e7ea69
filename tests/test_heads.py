"""heads.py: sizes against the paper's, the same functions as the libraries' modules, structure,
gradients, and that every backbone learns with every mechanism.
"""
import math
import re

import pytest
import torch
import torch.nn.functional as F

import film
import heads
from diffusion import DiffusionPolicy
from heads import (BACKBONES, MLP, SIZES, TimeEncoder, Transformer, UNet, UNetBlock, count,
                   make_backbone)
from tests import benchmark_heads


PAIRS = [(name, mechanism) for name, kind in BACKBONES.items() for mechanism in kind.mechanisms]
TINY = {"mlp": dict(width=32, hidden=64, depth=2, dropout=0.0),
        "unet": dict(time_dim=16, widths=(16, 32), kernel=3),
        "transformer": dict(width=32, hidden=64, heads=2, depth=2, dropout=0.0)}


def tiny(name, mechanism, horizon=16, **size):
    """A small backbone and a pathway on joint angles (B, horizon, 3)."""
    torch.manual_seed(0)
    backbone = BACKBONES[name](2, horizon, mechanism, **{**TINY[name], **size})
    return backbone, film.make_conditioning(backbone, "joints", horizon=horizon, num_joints=3)


def predict(backbone, pathway, noisy_actions, timestep, observations, **steps):
    """The whole network in the paper's order (eq. 10)."""
    o = pathway.encode(observations)
    tau = backbone.time_encoder(timestep)
    return backbone(noisy_actions, pathway(o, tau), **steps)


def shaken(*modules, by=0.1):
    """Move every weight, so that no mechanism is at its start."""
    for module in modules:
        for parameter in module.parameters():
            parameter.data += by * torch.randn_like(parameter)


@pytest.mark.parametrize("name, mechanism, backbone_millions, conditioning_millions", [
    ("unet", "film", 244.06, 11.56), ("mlp", "film", 4.78, 8.70),
    ("transformer", "cross-attention", 8.43, 0.56), ("transformer", "film", 6.85, 4.35),
    ("transformer", "adaln-zero", 6.84, 6.53), ("transformer", "additive", 6.85, 2.18),
    ("transformer", "adaln", 6.84, 4.35), ("transformer", "adarms", 6.84, 4.35),
    ("transformer", "prefix", 6.32, 0.56)])
def test_paper_size_has_the_paper_s_parameter_counts(name, mechanism, backbone_millions,
                                                     conditioning_millions):
    """The official modules' counts: A = 10, T = 16 (Transformer 10), two observations of 137."""
    with torch.device("meta"):
        backbone = make_backbone(name, "paper", 10, 10 if name == "transformer" else 16, mechanism)
        pathway = film.make_conditioning(backbone, "none", horizon=2, size=137)
    assert count(backbone) / 1e6 == pytest.approx(backbone_millions, rel=0.005)
    assert count(pathway) / 1e6 == pytest.approx(conditioning_millions, rel=0.005)
    exact = {("unet", "film"): (244_057_226, 11_554_816), ("mlp", "film"): (4_782_346, 8_699_904)}
    if (name, mechanism) in exact:
        assert (count(backbone), count(pathway)) == exact[name, mechanism]


def test_time_encoder_matches_a_double_precision_sinusoid():
    encoder = TimeEncoder(8)
    encoder.mlp = torch.nn.Identity()
    given = encoder(torch.tensor([0, 7, 99]))
    for row, k in zip(given, (0, 7, 99)):
        rates = [10_000 ** (-i / 3) for i in range(4)]
        expected = [math.sin(k * r) for r in rates] + [math.cos(k * r) for r in rates]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_timestep_embedding_is_two_layers_on_the_sinusoid_or_the_sinusoid_alone():
    encoder, timestep = TimeEncoder(8), torch.tensor([0, 7, 99])
    plain = TimeEncoder(8, learned=False)
    assert not list(plain.parameters())
    first, _, second = encoder.mlp
    expected = second(F.mish(first(plain(timestep))))
    torch.testing.assert_close(encoder(timestep), expected)


def laptop_mlp():
    torch.manual_seed(0)
    backbone = make_backbone("mlp")
    return backbone, film.make_conditioning(backbone, "joints", horizon=16, num_joints=3)


def test_mlp_never_mixes_time_steps():
    size = dependence(*laptop_mlp(), 16)
    assert torch.equal(size, size.diag().diag())                 # exactly zero off the diagonal
    assert (size.diag() > 0).all()


def test_every_horizon_step_of_the_mlp_has_its_own_input_matrix_and_bias():
    """Drawn with deviation 1, as in the official code, where 1/sqrt(fan-in) is usual."""
    backbone, _ = laptop_mlp()
    for weight in (backbone.input_weight, backbone.input_bias):
        assert abs(weight.std() - 1) < 0.05
        assert len(weight.unique(dim=0)) == 16


def test_mlp_on_a_subset_of_steps_equals_those_steps_of_the_whole():
    (backbone, pathway), angles = laptop_mlp(), torch.randn(5, 16, 3)
    actions, timestep = torch.randn(5, 16, 2), torch.randint(100, (5,))
    steps = torch.stack([torch.randperm(16)[:4] for _ in range(5)])
    index = steps[..., None].expand(-1, -1, 2)
    whole = predict(backbone, pathway, actions, timestep, angles)
    part = predict(backbone, pathway, actions.gather(1, index), timestep, angles, steps=steps)
    torch.testing.assert_close(part, whole.gather(1, index), atol=1e-5, rtol=1e-5)


# The same functions as modules built from the libraries' parts (tests/benchmark_heads.py) ---------

REFERENCE_SIZES = {"DP-MLP": dict(width=16, hidden=32, depth=2),
                   "DP-C": dict(time_dim=12, widths=(8, 16, 32)),
                   "DP-T": dict(width=16, hidden=32, heads=2, depth=2)}
REFERENCE_SIZES["DP-T-FiLM"] = REFERENCE_SIZES["DP-T"]


def unet_tensors(backbone):
    levels = [*backbone.down, backbone.middle, *backbone.up]
    for module in [module for level in levels for module in level]:
        parts = ([module.conv1, module.norm1, module.conv2, module.norm2, module.shortcut]
                 if isinstance(module, UNetBlock) else [module])
        yield from (p for part in parts for p in part.parameters())
    yield from backbone.output.parameters()


def attention_tensors(attention):
    query, key_value = attention.query, attention.key_value
    return [torch.cat([query.weight, key_value.weight]), torch.cat([query.bias, key_value.bias]),
            attention.output.weight, attention.output.bias]


def transformer_tensors(backbone):
    """In the order of nn.TransformerDecoderLayer's own parameters."""
    yield from [backbone.position, backbone.input.weight, backbone.input.bias]
    for block in backbone.blocks:
        cross = hasattr(block, "cross_attention")
        yield from attention_tensors(block.attention)
        yield from attention_tensors(block.cross_attention) if cross else []
        yield from block.mlp.parameters()
        yield from block.norm1.parameters()
        yield from block.cross_norm.parameters() if cross else []
        yield from block.norm2.parameters()
    yield from [*backbone.norm.parameters(), *backbone.output.parameters()]


def copy_weights(ours, reference):
    backbone, pathway = ours.backbone, ours.conditioning
    if isinstance(backbone, MLP):
        mine = [backbone.input_weight, backbone.input_bias]
        mine += [p for block in backbone.blocks for part in (block.up, block.down, block.norm)
                 for p in part.parameters()]
        mine += [*backbone.norm.parameters(), *backbone.output.parameters()]
    else:
        mine = [*(unet_tensors if isinstance(backbone, UNet) else transformer_tensors)(backbone)]
    theirs = dict(reference.named_parameters())
    if hasattr(reference, "film"):     # one projection for each block, on [tau, o]
        weight = torch.cat([pathway.time_part.weight, pathway.observation_part.weight], dim=1)
        for i, (w, b) in enumerate(zip(weight.split(pathway.sizes),
                                       pathway.observation_part.bias.split(pathway.sizes))):
            theirs.pop(f"film.{i}.1.weight").data.copy_(w)
            theirs.pop(f"film.{i}.1.bias").data.copy_(b)
        for name, p in backbone.time_encoder.named_parameters():
            theirs.pop(f"time.{name}").data.copy_(p)
    else:
        for part, other in (("embed", "embed"), ("mlp", "token_mlp")):
            for name, p in getattr(pathway, part).named_parameters():
                theirs.pop(f"{other}.{name}").data.copy_(p)
        theirs.pop("token_position").data.copy_(pathway.position)
    assert len(mine) == len(theirs)
    for p, other in zip(mine, theirs.values()):
        assert p.shape == other.shape
        other.data.copy_(p)


@pytest.mark.parametrize("head", benchmark_heads.HEADS)
def test_same_function_as_the_libraries_modules(head):
    """Convolutions, GroupNorm, LayerNorm, attention and its masks: same weights, same numbers."""
    torch.manual_seed(0)
    ours = benchmark_heads.Head(head, **REFERENCE_SIZES[head]).eval()
    reference = benchmark_heads.make_reference(head, **REFERENCE_SIZES[head]).eval()
    shaken(ours)
    copy_weights(ours, reference)
    noisy_actions, timestep, observations, _ = benchmark_heads.batch_of(head, 5)
    given = ours(noisy_actions, timestep, observations)
    torch.testing.assert_close(given, reference(noisy_actions, timestep, observations),
                               atol=2e-5, rtol=2e-5)


# Dropout ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_dropout_stays_on_in_a_frozen_backbone_until_eval(name, frozen):
    backbone, pathway = tiny(name, "film", dropout=0.5)
    backbone.requires_grad_(not frozen)
    actions, angles = torch.randn(4, 16, 2), torch.randn(4, 16, 3)
    run = lambda: predict(backbone, pathway, actions, torch.full((4,), 7), angles)
    assert not torch.equal(run(), run())
    backbone.eval()
    assert torch.equal(run(), run())
    without, _ = tiny(name, "film", dropout=0.0)
    without.load_state_dict(backbone.state_dict())
    expected = predict(without, pathway, actions, torch.full((4,), 7), angles)
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("name, share", [("mlp", 0.1), ("transformer", 0.3)])
def test_the_paper_s_dropout(name, share):
    """The laptop sizes have none."""
    for scale, expected in (("paper", share), ("laptop", 0)):
        with torch.device("meta"):
            backbone = make_backbone(name, scale)
        dropouts = [module.p for module in backbone.modules()
                    if isinstance(module, torch.nn.Dropout)]
        assert dropouts and set(dropouts) == {expected}


def test_dropout_acts_on_the_attention_weights_too():
    backbone, pathway = tiny("transformer", "film", dropout=0.5)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    actions, angles = torch.randn(4, 16, 2), torch.randn(4, 16, 3)
    run = lambda: predict(backbone, pathway, actions, torch.full((4,), 7), angles)
    assert not torch.equal(run(), run())
    backbone.eval()
    assert torch.equal(run(), run())


# Structure ----------------------------------------------------------------------------------------

SQUARE = {"mlp": dict(width=16, hidden=16), "unet": dict(widths=(16, 16)),
          "transformer": dict(width=16, hidden=16)}


@pytest.mark.parametrize("name, mechanism", PAIRS)
def test_each_sample_is_modulated_by_its_own_condition(name, mechanism):
    """With B == T == D a modulation without its singleton axis, or one on the wrong axis, would
    broadcast silently: over the batch, the horizon or the channels of the U-Net."""
    backbone, pathway = tiny(name, mechanism, **SQUARE[name])
    shaken(backbone, pathway)
    actions, angles, timestep = torch.randn(16, 16, 2), torch.randn(16, 16, 3), torch.arange(16)
    together = predict(backbone, pathway, actions, timestep, angles)
    alone = [predict(backbone, pathway, *(x[b:b + 1] for x in (actions, timestep, angles)))
             for b in range(16)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)
    same = predict(backbone, pathway, actions, timestep, angles.roll(1, dims=0))
    assert (together - same).abs().amax((1, 2)).min() > 1e-3


def dependence(backbone, pathway, T):
    """(T out, T in): how much each predicted action depends on each noisy action."""
    angles = torch.randn(1, T, 3)
    run = lambda actions: predict(backbone, pathway, actions, torch.tensor([40]), angles)
    jacobian = torch.autograd.functional.jacobian(run, torch.randn(1, T, 2))[0, :, :, 0]
    return jacobian.abs().sum(dim=(1, 3))


@pytest.mark.parametrize("mechanism", Transformer.mechanisms)
def test_transformer_is_causal_and_sees_all_that_came_before(mechanism):
    backbone, pathway = tiny("transformer", mechanism, horizon=10)
    shaken(backbone, pathway)
    size = dependence(backbone, pathway, 10)
    assert torch.equal(size, size.tril())                        # exactly zero above
    assert (size[torch.ones(10, 10).tril().bool()] > 0).all()


@pytest.mark.parametrize("mechanism", UNet.mechanisms)
def test_unet_mixes_all_time_steps(mechanism):
    backbone, pathway = tiny("unet", mechanism, widths=(16, 24, 32), kernel=5)
    shaken(backbone, pathway)
    assert (dependence(backbone, pathway, 16) > 0).all()
    assert backbone.mixes_time and Transformer.mixes_time


def test_tokens_in_front_see_each_other_and_nothing_of_the_actions():
    mask = heads.causal_mask(5, 2, "cpu")
    assert mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0],
                                   [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("mechanism", ["cross-attention", "prefix"])
def test_which_tokens_an_action_sees(mechanism):
    """Cross-attention: action t sees the timestep and observations 0..t. Prefix: all of them."""
    backbone, _ = tiny("transformer", mechanism, horizon=6)
    shaken(backbone)
    run = lambda tokens: backbone(torch.randn(1, 6, 2), tokens)[0].abs().sum(-1)
    jacobian = torch.autograd.functional.jacobian(run, torch.randn(1, 7, 32))
    seen = jacobian.abs().sum(dim=(1, 3)) > 0                    # (T, 1 + steps)
    expected = [[mechanism == "prefix" or s - 1 <= t for s in range(7)] for t in range(6)]
    assert seen.tolist() == expected


@pytest.mark.parametrize("name, mechanism", [
    pair for pair in PAIRS if pair[1] in ("film", "additive", "adaln", "adarms")])
def test_modulations_at_the_identity_leave_the_unconditioned_backbone(name, mechanism):
    """A fresh pathway starts around these values (tests/test_film.py)."""
    backbone, _ = tiny(name, mechanism)
    actions = torch.randn(20, 16, 2)
    identity = torch.tensor(backbone.mechanism.identity).float()[None, :, None, None]
    modulations = [identity.expand(20, -1, 1, width) for width in backbone.modulation_widths]
    given = backbone(actions, modulations)
    for module in backbone.modules():
        if hasattr(module, "mechanism") and module is not backbone:
            module.mechanism = film.Mechanism()     # the base class does nothing anywhere
    torch.testing.assert_close(given, backbone(actions, modulations), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(given, backbone(actions + 1, modulations))


@pytest.mark.parametrize("name", ["mlp", "unet", "transformer"])
def test_fresh_adaln_zero_closes_every_branch(name):
    """No weight of a branch has any influence, until the pathway's first update."""
    backbone, pathway = tiny(name, "adaln-zero")
    actions, angles = torch.randn(3, 16, 2), torch.randn(3, 16, 3)
    timestep = torch.tensor([1, 50, 99])
    before = predict(backbone, pathway, actions, timestep, angles)
    shaken(*[module for parent in backbone.modules() for child, module in parent.named_children()
             if child in ("conv1", "conv2", "up", "down", "attention", "mlp")
             and parent is not backbone and parent is not backbone.time_encoder
             and not isinstance(parent, UNet)])
    assert torch.equal(before, predict(backbone, pathway, actions, timestep, angles))
    shaken(pathway)
    after = predict(backbone, pathway, actions, timestep, angles)
    assert not torch.allclose(before, after, atol=1e-3)


def test_fresh_tokens_make_cross_attention_add_next_to_nothing():
    backbone, pathway = tiny("transformer", "cross-attention")
    actions, timestep = torch.randn(20, 16, 2), torch.randint(100, (20,))
    given = predict(backbone, pathway, actions, timestep, torch.randn(20, 16, 3))
    expected = backbone(actions, torch.zeros(20, 17, 32))
    assert 0 < (given - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name, mechanism", PAIRS)
def test_gradients_reach_every_trainable_tensor_and_no_frozen_one(name, mechanism, frozen):
    backbone, pathway = tiny(name, mechanism)
    if backbone.mechanism.starts_at_identity:     # lets nothing through, until the first update
        shaken(pathway)
    backbone.requires_grad_(not frozen)
    predicted = predict(backbone, pathway, torch.randn(4, 16, 2), torch.randint(100, (4,)),
                        torch.randn(4, 16, 3))
    predicted.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pathway.parameters())
    for parameter in backbone.parameters():
        assert (parameter.grad is None) if frozen else (parameter.grad.abs().sum() > 0)


# Learning and acting ------------------------------------------------------------------------------

@pytest.mark.parametrize("name, mechanism", PAIRS)
def test_overfits_one_batch(name, mechanism):
    """The loss on one batch, noise included, falls below 5 % of its start in 250 steps."""
    backbone, pathway = tiny(name, mechanism, horizon=8)
    angles, noisy_actions, noise = torch.randn(8, 8, 3), torch.randn(8, 8, 2), torch.randn(8, 8, 2)
    timestep = torch.randint(100, (8,))
    parameters = [*backbone.parameters(), *pathway.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    losses = []
    for _ in range(250):
        loss = F.mse_loss(predict(backbone, pathway, noisy_actions, timestep, angles), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("name, mechanism", PAIRS)
def test_bf16_autocast_stays_near_fp32(name, mechanism):
    backbone, pathway = tiny(name, mechanism)
    if not backbone.mechanism.tokens:
        shaken(pathway, by=0.03)
    actions, timestep, angles = torch.randn(9, 16, 2), torch.arange(9), torch.randn(9, 16, 3)
    exact = predict(backbone, pathway, actions, timestep, angles)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict(backbone, pathway, actions, timestep, angles)
    rounded.float().square().sum().backward()
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()     # bf16 keeps 8 bits


CORNERS = [(-60, 0), (60, 0), (60, 30), (-60, 30), (-15, 30), (15, 30), (15, 120), (-15, 120)]


@pytest.mark.parametrize("name, mechanism, sampling_steps", [
    *[(*pair, 10) for pair in PAIRS], *[(name, "film", None) for name in BACKBONES]])
def test_acting_is_the_official_manner_to_sample_with_the_whole_network(name, mechanism,
                                                                        sampling_steps, tmp_path):
    """Driven by diffusers' scheduler where that is installed; then once more after the policy
    went through its file."""
    torch.manual_seed(0)
    backbone = make_backbone(name, conditioning=mechanism)
    pathway = film.make_conditioning(backbone, "state", obs_steps=2, corners=CORNERS,
                                     goal=(256.0, 256.0, math.pi / 4), width=32)
    shaken(pathway, by=0.01)     # more, and the untrained network multiplies rounding errors
    policy = DiffusionPolicy(pathway, backbone, [100.0] * 16, (0, 512),
                             sampling_steps=sampling_steps).eval()
    observations = torch.rand(3, 2, 5) * 200 + 150
    given = policy.act(observations, torch.Generator().manual_seed(3))
    expected = benchmark_heads.reference_act(policy, observations, torch.Generator().manual_seed(3))
    assert given.shape == (3, 8, 2) and given.std() > 1
    torch.testing.assert_close(given / 100, expected / 100, atol=1e-4, rtol=0)
    policy.save(tmp_path / "policy.pt")
    loaded = DiffusionPolicy.load(tmp_path / "policy.pt")
    assert torch.equal(loaded.act(observations, torch.Generator().manual_seed(3)), given)


# Bad input ----------------------------------------------------------------------------------------

def test_unknown_backbone_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="'vae'.*mlp, unet, transformer.*paper or laptop"):
        make_backbone("vae")


@pytest.mark.parametrize("name, kind", BACKBONES.items())
def test_impossible_pairs_are_refused_with_what_is_possible(name, kind):
    impossible = {*film.MECHANISMS, "smell"} - {*kind.mechanisms}
    for mechanism in impossible:
        with pytest.raises(ValueError, match=f"'{mechanism}'; possible: film, .*"):
            make_backbone(name, conditioning=mechanism)
    for mechanism in kind.mechanisms:
        make_backbone(name, conditioning=mechanism)


def test_a_horizon_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="horizon is 10.*multiple of 4"):
        make_backbone("unet", horizon=10)
    assert make_backbone("transformer", horizon=10).position.shape[0] == 10
    assert len(SIZES["laptop"]["unet"]["widths"]) == 3     # the levels that the message counts


# The lesson ---------------------------------------------------------------------------------------

def test_the_lesson_prints_the_paper_s_counts_beside_ours(tmp_path, capsys):
    heads.lesson(tmp_path)
    rows = re.findall(r"([\d.]+) +([\d.]+) +\(([\d.]+), ([\d.]+)\)", capsys.readouterr().out)
    assert len(rows) == 9
    for row in rows:
        backbone, conditioning, *papers = map(float, row)
        assert [backbone, conditioning] == pytest.approx(papers, rel=0.005)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.png"]
