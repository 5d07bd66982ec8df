"Patch MLP and Boltzmann machines: closed forms, every state counted, contrastive divergence in training, bad input."
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl_nb.data.images import ImageSet
from medssl_nb.nets import create, embed
from medssl_nb.nets.boltzmann import (
    BoltzmannMachine, ContrastiveDivergence, RestrictedBoltzmannMachine, bernoulli, gibbs, mean_field, reconstruct, seen_by_layer, upward,
)
from medssl_nb.nets.mlp import cut_patches, join_patches
from medssl_nb.train import fit


def count(network):
    return sum(p.numel() for p in network.parameters())


def states(n):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)


def machine(visible=4, hidden=3, seed=0, **options):
    "A small machine in float64 with weights and biases far from zero."
    torch.manual_seed(seed)
    made = RestrictedBoltzmannMachine(visible, hidden, **options).double()
    for p in made.parameters():
        nn.init.normal_(p)
    return made


def energies(m, vs, hs):
    "E of each pair of states, written with loops."
    table = torch.zeros(len(vs), len(hs), dtype=torch.float64)
    for a, v in enumerate(vs):
        for b, h in enumerate(hs):
            own = ((v - m.visible_bias) ** 2).sum() / 2 if m.gaussian else -(v * m.visible_bias).sum()
            table[a, b] = own - (h * m.hidden_bias).sum()
            for j, i in itertools.product(range(len(h)), range(len(v))):
                table[a, b] -= h[j] * m.weight[j, i] * v[i]
    return table.detach()


# Patches and the MLP

@pytest.mark.parametrize("channels, size", ((1, (6, 8)), (3, (6, 8)), (2, (4, 6, 2)), (1, (5, 7)), (2, (3, 4, 5))))
def test_patches_are_those_that_loops_cut(channels, size):
    x = torch.arange(2.0 * channels * torch.tensor(size).prod()).reshape(2, channels, *size)
    rows = cut_patches(x, 2)
    padded = F.pad(x, [p for n in reversed(size) for p in (0, n % 2)], mode="replicate")
    grid = [n // 2 for n in padded.shape[2:]]
    assert rows.shape == (2, *grid, channels * 2 ** len(size))
    for place in itertools.product(*map(range, grid)):
        window = (slice(None), slice(None), *(slice(2 * i, 2 * i + 2) for i in place))
        assert torch.equal(rows[(slice(None), *place)], padded[window].flatten(1))
    assert torch.equal(join_patches(rows, channels, 2), padded)


@pytest.mark.parametrize("dims", (2, 3))
def test_mlp_is_convolutions_without_overlap(dims):
    torch.manual_seed(0)
    encoder = create("mlp", dims, 2, width=5, depth=3, patch=4)
    x = torch.randn(2, 2, *(8, 12, 4)[:dims])
    conv = (F.conv2d, F.conv3d)[dims - 2]
    for i, (layer, found) in enumerate(zip(encoder.layers, encoder(x))):
        kernel = layer.weight.reshape(5, 2, *[4] * dims) if i == 0 else layer.weight.reshape(5, 5, *[1] * dims)
        x = conv(x, kernel, layer.bias, stride=4 if i == 0 else 1).relu()
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_mlp_counts_and_start():
    assert count(create("mlp")) == 64 * 64 + 64 + 64 * 64 + 64
    assert count(create("mlp", 3, 2, width=10, depth=1, patch=4)) == 2 * 4**3 * 10 + 10
    torch.manual_seed(0)
    first = create("mlp", width=512).layers[0]
    assert first.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02) and not first.bias.any()


def test_mlp_does_not_know_where_a_patch_was():
    encoder, x = create("mlp", width=8), torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(embed(encoder, x), embed(encoder, x.roll((8, 16), (2, 3))))


def test_options_that_make_no_network():
    for name, options in (("mlp", dict(depth=0)), ("mlp", dict(patch=0)), ("rbm", dict(width=0)), ("dbm", dict(iterations=-1)), ("dbm", dict(depth=0))):
        with pytest.raises(ValueError, match="at least 1"):
            create(name, **options)


# One machine, every state counted

def test_conditionals_and_free_energy_against_all_states():
    m = machine()
    vs, hs = states(4), states(3)
    joint = torch.exp(-energies(m, vs, hs))
    with torch.no_grad():
        torch.testing.assert_close(m.free_energy(vs), -joint.sum(1).log())
        torch.testing.assert_close(m.hidden(vs), joint @ hs / joint.sum(1, keepdim=True))
        torch.testing.assert_close(m.visible(hs), joint.T @ vs / joint.sum(0)[:, None])


def test_gaussian_conditionals_and_free_energy():
    m = machine(visible=3, gaussian=True)
    vs, hs = torch.randn(20, 3, dtype=torch.float64), states(3)
    joint = torch.exp(-energies(m, vs, hs))
    with torch.no_grad():
        torch.testing.assert_close(m.free_energy(vs), -joint.sum(1).log())
        torch.testing.assert_close(m.hidden(vs), joint @ hs / joint.sum(1, keepdim=True))
    one = machine(visible=1, hidden=2, gaussian=True)
    line = torch.arange(-20, 20, 0.01, dtype=torch.float64)[:, None]
    density = torch.exp(-energies(one, line[::10], states(2)))
    torch.testing.assert_close((density.T @ line[::10]) / density.sum(0)[:, None], one.visible(states(2)).detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gaussian", (False, True))
@pytest.mark.parametrize("copies", ((2, 1), (1, 2), (2, 2)))
def test_copies_are_units_with_tied_weights(gaussian, copies):
    "A machine with copies is a larger one whose weights repeat, read where the copies agree."
    m = machine(gaussian=gaussian, visible_copies=copies[0], hidden_copies=copies[1])
    large = machine(4 * copies[0], 3 * copies[1], gaussian=gaussian)
    large.weight.data = m.weight.data.repeat(copies[1], copies[0])
    large.visible_bias.data, large.hidden_bias.data = m.visible_bias.data.repeat(copies[0]), m.hidden_bias.data.repeat(copies[1])
    v, h = bernoulli(torch.full((6, 4), 0.5).double()), bernoulli(torch.full((6, 3), 0.5).double())
    torch.testing.assert_close(m.hidden(v).repeat(1, copies[1]), large.hidden(v.repeat(1, copies[0])))
    torch.testing.assert_close(m.visible(h).repeat(1, copies[0]), large.visible(h.repeat(1, copies[1])))
    torch.testing.assert_close(m.free_energy(v), large.free_energy(v.repeat(1, copies[0])))


def test_gradient_of_the_likelihood_against_all_states():
    m, vs = machine(), states(4)
    data = vs[[3, 9, 9, 14]]
    log_p = (-m.free_energy(data) - torch.logsumexp(-m.free_energy(vs), 0)).mean()
    found = torch.autograd.grad(log_p, (m.weight, m.visible_bias, m.hidden_bias))
    joint = torch.exp(-energies(m, vs, states(3)))
    p = joint.sum(1) / joint.sum()
    h, h_data = m.hidden(vs).detach(), m.hidden(data).detach()
    expected = (
        h_data.T @ data / 4 - (p[:, None] * h).T @ vs, data.mean(0) - p @ vs, h_data.mean(0) - p @ h,
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_gibbs_leaves_the_machine_s_distribution_as_it_is():
    "Started from p(v), a step must end at p(v): exactly, from the table of all states."
    m, vs, hs = machine(), states(4), states(3)
    with torch.no_grad():
        p = torch.softmax(-m.free_energy(vs), 0)
        h_given_v = torch.stack([(m.hidden(vs) * h + (1 - m.hidden(vs)) * (1 - h)).prod(1) for h in hs], 1)
        v_given_h = torch.stack([(m.visible(hs) * v + (1 - m.visible(hs)) * (1 - v)).prod(1) for v in vs], 1)
        torch.testing.assert_close(p @ h_given_v @ v_given_h, p)
        drawn = gibbs(m, vs[torch.multinomial(p, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))], torch.Generator().manual_seed(1))
    places = (drawn @ torch.tensor([8.0, 4, 2, 1]).double()).long()
    assert (torch.bincount(places, minlength=16) / 40_000 - p).abs().max() < 0.01


def test_gaussian_gibbs_has_unit_noise():
    m = machine(gaussian=True)
    nn.init.zeros_(m.weight)
    drawn = gibbs(m, torch.zeros(20_000, 4).double(), torch.Generator().manual_seed(0))
    assert (drawn.mean(0) - m.visible_bias).abs().max() < 0.03 and (drawn.std(0) - 1).abs().max() < 0.03


def test_same_generator_same_dream():
    m, v = machine(), states(4)
    dreams = [gibbs(m, v, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(dreams[0], dreams[1]) and not torch.equal(dreams[0], dreams[2])
    assert set(dreams[0].unique().tolist()) <= {0.0, 1.0}


# The encoders

def loops(encoder, v):
    "Mean field for one patch, unit by unit."
    layers, sigmoid = encoder.layers, torch.sigmoid
    means, below = [], v
    for i, layer in enumerate(layers):
        twice = 2 if i < len(layers) - 1 else 1
        below = torch.stack([sigmoid(layer.hidden_bias[j] + twice * (layer.weight[j] * below).sum()) for j in range(len(layer.hidden_bias))])
        means.append(below)
    for _ in range(encoder.iterations):
        for i, layer in enumerate(layers):
            below = means[i - 1] if i else v
            new = []
            for j in range(len(layer.hidden_bias)):
                total = layer.hidden_bias[j] + (layer.weight[j] * below).sum()
                if i + 1 < len(layers):
                    above = layers[i + 1]
                    total = total + (above.weight[:, j] * means[i + 1]).sum() + (above.visible_bias[j] - layer.hidden_bias[j]) / 2
                new.append(sigmoid(total))
            means[i] = torch.stack(new)
    return means


@pytest.mark.parametrize("depth", (1, 2, 3))
def test_mean_field_against_loops(depth):
    torch.manual_seed(0)
    encoder = BoltzmannMachine(2, 1, width=3, depth=depth, patch=2, iterations=3).double()
    for p in encoder.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, 1, 4, 2).double()
    maps = encoder(x)
    for row in range(2):
        expected = loops(encoder, x[0, 0, 2 * row : 2 * row + 2].flatten())
        for m, mean in zip(maps, expected):
            torch.testing.assert_close(m[0, :, row, 0], mean)


def test_mean_field_lowers_the_divergence_from_the_posterior():
    for seed in range(5):
        torch.manual_seed(seed)
        encoder = BoltzmannMachine(2, 1, width=3, depth=2, patch=1).double()
        for p in encoder.parameters():
            nn.init.normal_(p, std=1.5)
        first, second = encoder.layers
        v, pairs = torch.randn(1, 1).double(), states(6)
        h1, h2 = pairs[:, :3], pairs[:, 3:]
        bias = (first.hidden_bias + second.visible_bias) / 2
        score = h1 @ (first.weight @ v[0] + bias) + ((h2 @ second.weight) * h1).sum(1) + h2 @ second.hidden_bias
        divergences = []
        for iterations in range(6):
            mu = torch.cat(mean_field(encoder.layers, v, iterations), 1)[0]
            log_q = (pairs * mu.log() + (1 - pairs) * (1 - mu).log()).sum(1)
            divergences.append((log_q.exp() * (log_q - torch.log_softmax(score, 0))).sum().item())
        assert all(b <= a + 1e-10 for a, b in zip(divergences, divergences[1:])) and divergences[-1] >= 0


def test_rbm_is_one_layer_and_its_map_the_conditional():
    encoder, x = create("rbm", width=6), torch.randn(2, 1, 16, 24)
    expected = torch.sigmoid(cut_patches(x, 8) @ encoder.layers[0].weight.T).movedim(-1, 1)
    torch.testing.assert_close(encoder(x)[0], expected)
    assert (encoder.layers[0].visible_copies, encoder.layers[0].hidden_copies) == (1, 1)
    assert [(m.visible_copies, m.hidden_copies, m.gaussian) for m in create("dbm", width=4, depth=3).layers] == [
        (2, 1, True), (2, 2, False), (1, 2, False)]


def test_counts():
    assert count(create("rbm")) == 64 * 256 + 64 + 256
    assert count(create("dbm", 3, width=5, patch=2)) == (8 * 5 + 8 + 5) + (5 * 5 + 5 + 5)


@pytest.mark.parametrize("name", ("rbm", "dbm"))
def test_only_the_pixels_bias_has_no_part_in_the_maps(name):
    encoder = create(name, width=4)
    sum(m.sum() for m in encoder(torch.randn(2, 1, 16, 16))).backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None] == ["layers.0.visible_bias"]


@pytest.mark.parametrize("dims", (2, 3))
def test_reconstruction_keeps_size_and_channels(dims):
    encoder = create("dbm", dims, 2, width=4, patch=4)
    x = torch.randn(2, 2, *(9, 13, 6)[:dims])
    assert reconstruct(encoder, x).shape == x.shape
    encoder.layers[0].visible_bias.data = torch.arange(2.0 * 4**dims)
    nn.init.zeros_(encoder.layers[0].weight)
    corner = reconstruct(encoder, x)[(0, slice(None), *[slice(0, 4)] * dims)]
    assert torch.equal(corner.flatten(), torch.arange(2.0 * 4**dims))


# Contrastive divergence

def stripes(n=32):
    "Images of horizontal or vertical stripes, normalised: patches that an untrained machine does not expect."
    draw = torch.Generator().manual_seed(0)
    line = (torch.rand(n, 1, 16, generator=draw) < 0.5).float() * 2 - 1
    flat = torch.arange(n)[:, None, None, None] % 2 == 0
    return torch.where(flat, line[..., None].expand(n, 1, 16, 16), line[:, :, None].expand(n, 1, 16, 16))


@pytest.mark.parametrize("layer", (0, 1, 2))
def test_gradient_is_the_textbook_rule(layer):
    torch.manual_seed(0)
    encoder = create("dbm", width=5, depth=3, patch=4)
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.5)
    model = ContrastiveDivergence(encoder, layer, steps=2)
    v, dream = model.pretext(stripes(4), torch.Generator().manual_seed(0))
    model((v, dream))["loss"].backward()
    m = encoder.layers[layer]
    scale = m.visible_copies * m.hidden_copies / len(v)
    outer = sum(torch.outer(m.hidden(b), b) - torch.outer(m.hidden(a), a) for a, b in zip(v, dream)) * scale
    torch.testing.assert_close(m.weight.grad, outer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.visible_bias.grad, (dream - v).mean(0) * m.visible_copies, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.hidden_bias.grad, (m.hidden(dream) - m.hidden(v)).mean(0) * m.hidden_copies, rtol=1e-4, atol=1e-5)
    assert not v.requires_grad and not dream.requires_grad


def test_an_upper_layer_sees_what_the_lower_ones_say():
    torch.manual_seed(0)
    encoder, x = create("dbm", width=5, depth=3, patch=4), stripes(2)
    seen, _ = ContrastiveDivergence(encoder, 2).pretext(x)
    torch.testing.assert_close(seen, upward(encoder.layers, cut_patches(x, 4))[1].flatten(0, 2))


def test_loss_is_zero_when_the_dream_is_the_data():
    model = ContrastiveDivergence(create("rbm", width=4))
    v = torch.randn(6, 64)
    assert model((v, v))["loss"] == 0


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_fit_trains_one_layer_and_only_that(precision):
    torch.manual_seed(0)
    encoder = create("dbm", width=16, patch=4)
    images = ImageSet(stripes())
    for layer, rate in ((0, 1e-2), (1, 5e-2)):
        before = copy.deepcopy(encoder.state_dict())
        model = ContrastiveDivergence(encoder, layer)
        history = fit(model, images, steps=120, batch_size=16, lr=rate, seed=0, device="cpu", precision=precision, progress=False)
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, before[key]) == (not key.startswith(f"layers.{layer}.")), key
        error = history.terms["reconstruction"]
        assert error[-1] < 0.6 * error[0]
    assert all(p.requires_grad for p in encoder.parameters())


def test_a_trained_machine_prefers_its_data_to_noise():
    torch.manual_seed(0)
    encoder = create("rbm", width=32, patch=4)
    fit(ContrastiveDivergence(encoder), ImageSet(stripes()), steps=200, batch_size=16, lr=1e-2, seed=0, device="cpu", precision="fp32", progress=False)
    data = cut_patches(stripes(), 4).flatten(0, 2)
    noise = data[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]  # the same pixels, out of place
    with torch.no_grad():
        assert encoder.layers[0].free_energy(data).mean() < encoder.layers[0].free_energy(noise).mean() - 1


def test_checkpoint_goes_on_to_the_same_weights(tmp_path):
    found = []
    for stops in ((20,), (10, 20)):
        torch.manual_seed(0)
        encoder = create("rbm", width=4, patch=4)
        for k, steps in enumerate(stops):
            path = tmp_path / f"{len(stops)}.safetensors"
            run = lambda on_step: fit(
                ContrastiveDivergence(encoder), ImageSet(stripes()), steps=20, batch_size=8, seed=0, device="cpu", precision="fp32",
                progress=False, checkpoint=path, checkpoint_every=10, on_step=on_step)
            if steps < 20:
                with pytest.raises(KeyboardInterrupt):
                    run(lambda done, model: interrupt(done, steps))
            else:
                run(None)
        found.append(encoder.layers[0].weight.detach().clone())
    assert torch.equal(*found)


def interrupt(done, at):
    if done == at:
        raise KeyboardInterrupt


def test_refresh_starts_at_the_mean_and_only_once():
    torch.manual_seed(0)
    encoder, images = create("dbm", width=6, patch=4), ImageSet(stripes(8))
    first, second = (ContrastiveDivergence(encoder, layer) for layer in (0, 1))
    normalised = images.stack().x
    first.refresh(images)
    torch.testing.assert_close(encoder.layers[0].visible_bias, cut_patches(normalised, 4).flatten(0, 2).mean(0), rtol=1e-4, atol=1e-5)
    second.refresh(images)
    torch.testing.assert_close(encoder.layers[1].visible(torch.zeros(6)), seen_by_layer(encoder, 1, normalised).mean(0), rtol=1e-4, atol=1e-5)
    encoder.layers[0].visible_bias.data[:] = 7
    first.refresh(images)
    assert (encoder.layers[0].visible_bias == 7).all()


def test_bad_requests_are_one_clear_error():
    with pytest.raises(ValueError, match="rbm and dbm, not a MLP"):
        ContrastiveDivergence(create("mlp", width=4))
    for options, says in ((dict(layer=1), "layers 0 to 0"), (dict(layer=-1), "layer is -1"), (dict(steps=0), "at least 1 step")):
        with pytest.raises(ValueError, match=says):
            ContrastiveDivergence(create("rbm", width=4), **options)
    with pytest.raises(ValueError, match="1 channel"):
        ContrastiveDivergence(create("rbm", width=4)).pretext(torch.zeros(1, 2, 16, 16))
    with pytest.raises(ValueError, match="at least 8 pixels"):
        reconstruct(create("rbm", width=4), torch.zeros(1, 1, 7, 16))


def test_a_patient_from_a_constant_image_is_no_trouble():
    "Constant images are zeros after normalisation: finite loss, finite gradient."
    model = ContrastiveDivergence(create("rbm", width=4))
    loss = model(model.pretext(torch.zeros(2, 1, 16, 16), torch.Generator().manual_seed(0)))["loss"]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
