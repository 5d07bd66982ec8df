"""S3D-UNet, DRU-Net, nsUNet, U-Net++ and Attention U-Net: counts of papers and peers, MONAI's weights, loops, and bad input."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl_nb.nets import create, create_encoder
from medssl_nb.nets.base import Encoder
from medssl_nb.nets.inspection import multiply_adds
from medssl_nb.nets.resnet import resnet18
from medssl_nb.nets.unet import Decoder, UNet, UNetEncoder, Up, two_blocks, unet
from medssl_nb.nets.unet_skips import AttentionGate, GatedUp, NestedUNet, PyramidEncoder, pruned
from medssl_nb.nets.unet_variants import DRUBlock, S3DBlock, separable
from medssl_nb.tasks.segmentation import Segmenter, focal_tversky, soft_dice, tversky


def count(network):
    return sum(p.numel() for p in network.parameters())


def small(name, dims=2, **options):
    torch.manual_seed(0)
    return create(name, spatial_dims=dims, **{"width": 4, **options})


def images(dims, channels=1, batch=2):
    return torch.randn(batch, channels, *(24, 21, 17)[:dims], generator=torch.Generator().manual_seed(1))


# The step of the decoder

@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("upsample", ("nearest", "linear"))
def test_interpolating_step_keeps_channels_and_weighs_only_its_block(upsample, dims):
    step = Up(dims, 6, 3, 4, 5, 2, "batch", upsample=upsample)
    space = (9, 8, 7)[:dims]
    assert step(torch.zeros(2, 6, *(4, 4, 3)[:dims]), space, torch.zeros(2, 4, *space)).shape == (2, 5, *space)
    assert count(step) == count(two_blocks(dims, 6 + 4, 5, 5, "batch"))
    constant = step.enlarge(torch.full((1, 6, *(4, 4, 3)[:dims]), 2.5))
    assert torch.equal(constant, torch.full_like(constant, 2.5))


def test_decoder_with_channels_of_its_own():
    encoder = UNetEncoder(2, 1, width=4, levels=3)
    decoder = Decoder(encoder, channels=[5, 3])
    assert decoder.channels == [5, 3]
    assert [m.shape[1] for m in decoder(encoder(images(2)))] == [5, 3]


# S3D-UNet

def test_s3d_counts_by_hand():
    assert sum(p.numel() for p in separable(5, 7, "batch").parameters() if p.ndim > 1) == 9 * 5 * 7 + 3 * 7 * 7
    n, out, q = 6, 16, 4
    by_hand = 4 * n * q + 3 * (9 + 3) * q * q + out * out + n * out  # four narrowings, three pairs, joining, shortcut
    assert sum(p.numel() for p in S3DBlock(3, n, 8, out, "batch").parameters() if p.ndim > 1) == by_hand


def test_s3d_separates_its_axes():
    "The first half of a pair never mixes slices, the second never mixes places within one."
    within, across = separable(1, 2, "none")
    x = torch.zeros(1, 1, 5, 5, 5)
    x[..., 2, 2, 2] = 1
    silence = lambda conv: nn.init.ones_(conv.weight) is None or nn.init.zeros_(conv.bias)
    silence(within.conv), silence(across.conv)
    one, two = within(x), across(within(x))
    assert one[0, 0, 2].sum() == 9 and one.sum() == 2 * 9 and (two[0, 0] > 0).sum() == 27 and (two[0, 0, :, 0] == 0).all()


def test_s3d_is_smaller_than_the_3d_unet_and_says_what_it_takes():
    assert count(create("s3d_unet", spatial_dims=3)) * 3 < count(unet(3))
    for arguments in ({"spatial_dims": 2}, {"width": 5}):
        with pytest.raises(ValueError, match="s3d_unet has three dimensions and an even width|s3d_unet has spatial_dims 3"):
            create("s3d_unet", **{"spatial_dims": 3, **arguments})


# DRU-Net

def test_dru_block_against_its_formula():
    torch.manual_seed(0)
    block, x = DRUBlock(2, 3, 3, 6, "none"), torch.randn(2, 3, 7, 8)
    first = F.conv2d(x, block.first.conv.weight, block.first.conv.bias, padding=1)
    second = F.conv2d(first.relu(), block.second.conv.weight, block.second.conv.bias, padding=1)
    torch.testing.assert_close(block(x), torch.cat([(second + first + x).relu(), x], 1))
    up = DRUBlock(2, 5, 3, 3, "none")
    assert up(torch.randn(2, 5, 7, 8)).shape == (2, 3, 7, 8) and up.shortcut.conv.weight.shape == (3, 5, 1, 1)


@pytest.mark.parametrize("dims", (2, 3))
def test_dru_counts_of_the_authors_layers(dims):
    k, w = 3**dims, 4
    f = [w * 2**i for i in range(5)]
    coarser = [f[1], f[2], f[3], 2 * f[4]]
    down = 7**dims * w + w + sum(2 * k * c * c + 4 * c for c in f)  # the stem has a bias
    up = sum(2**dims * n * c + 3 * k * c * c + k * c * c + 3 * c * c + 6 * c for n, c in zip(coarser, f))
    network = small("dru_net", dims)
    assert count(network) == down + up + 2 * w + 2
    assert network.encoder.channels == [2 * c for c in f] and network.decoder.channels == f[3::-1]


# nsUNet

def test_nsunet_has_the_scales_of_the_paper():
    flat, deep = create("nsunet"), create("nsunet", spatial_dims=3)
    assert (flat.decoder.channels, flat.decoder.strides) == ([256, 128, 64, 32, 16], [16, 8, 4, 2, 1])
    assert (deep.decoder.channels, deep.decoder.strides) == ([256, 128, 64], [4, 2, 1])
    assert flat.encoder.channels == resnet18().channels and deep.encoder.strides == [1, 2, 4, 8]
    assert small("nsunet", 3, levels=6).decoder.strides == [16, 8, 4, 2, 1]
    with pytest.raises(ValueError, match="levels=4"):
        create("nsunet", levels=4)


@pytest.mark.parametrize("dims", (2, 3))
def test_nsunet_hears_of_the_image_through_the_coarsest_map_alone(dims):
    network, x = small("nsunet", dims).eval(), images(dims)
    maps = network.encoder(x)
    silent = [torch.zeros_like(m) for m in maps[:-1]] + [maps[-1]]
    found = network.decoder(maps, x.shape[2:])
    assert [m.shape[1] for m in found] == network.decoder.channels and found[-1].shape[2:] == x.shape[2:]
    assert all(torch.equal(a, b) for a, b in zip(found, network.decoder(silent, x.shape[2:])))
    assert count(network) == count(network.encoder) + count(network.decoder) + network.decoder.channels[-1] * 2 + 2


def test_nsunet_s_encoder_is_the_resnet():
    torch.manual_seed(0)
    ours = create_encoder("nsunet", width=8)
    theirs = resnet18(width=8)
    theirs.load_state_dict(ours.state_dict())
    x = images(2)
    assert all(torch.equal(a, b) for a, b in zip(ours.eval()(x), theirs.eval()(x)))


# U-Net++

def test_unet_pp_counts_of_the_authors_code():
    c = [32, 64, 128, 256]
    nested = create("unet_pp", out_channels=1, deep_supervision=False, norm="none")
    assert count(nested) + sum((4 - i) * n for i, n in enumerate(c)) == 9_041_601  # they have biases where maps are enlarged
    assert count(unet(2, 1, 1, width=32, norm="none")) + sum(c) == 7_759_521


class AsMonai(Encoder):
    "A U-Net's way down with MONAI's channels: the second level is no wider than the first."

    def __init__(self, dims, w):
        super().__init__(dims, 2, [w, w, 2 * w, 4 * w, 8 * w], [1, 2, 4, 8, 16])
        before = [2, *self.channels]
        self.levels = nn.ModuleList(two_blocks(dims, n, c, c, "batch") for n, c in zip(before, self.channels))

    def forward(self, x):
        maps = [self.levels[0](x)]
        for level in self.levels[1:]:
            maps.append(level((F.max_pool2d if self.spatial_dims == 2 else F.max_pool3d)(maps[-1], 2)))
        return maps


def from_monai_plus_plus(state):
    "MONAI's U-Net++ under our names; its biases in the enlarging convolutions must be zero."
    renamed = {}
    for key, weight in state.items():
        if re.fullmatch(r"upcat.*upsample\.deconv\.bias", key):
            assert not weight.any()
            continue
        key = re.sub(r"^conv_(\d)_0\.(convs\.)?", r"encoder.levels.\1.", key)
        key = re.sub(r"^upcat_(\d)_(\d)\.upsample\.deconv", r"nodes.\1\2.enlarge", key)
        key = re.sub(r"^upcat_(\d)_(\d)\.convs\.", r"nodes.\1\2.blocks.", key)
        key = re.sub(r"conv_(\d)\.", lambda m: f"{m[1]}.", key)
        key = key.replace(".adn.N.", ".norm.")
        renamed[re.sub(r"^final_conv_0_(\d)", r"heads.\1", key)] = weight
    return renamed


@pytest.mark.parametrize("dims", (2, 3))
def test_unet_pp_with_monai_s_weights_gives_monai_s_logits(dims):
    from monai.networks.nets import BasicUNetPlusPlus

    torch.manual_seed(0)
    w = 4
    theirs = BasicUNetPlusPlus(dims, 2, 3, (w, w, 2 * w, 4 * w, 8 * w, w), True, act="relu", norm="batch", bias=False).eval()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("deconv.bias"):
            tensor.zero_()
        elif name.endswith(("running_mean", "N.bias")):
            nn.init.uniform_(tensor, -0.1, 0.1)
        elif name.endswith(("running_var", "N.weight")):
            nn.init.uniform_(tensor, 0.5, 1.5)
    ours = NestedUNet(AsMonai(dims, w), 3).eval()
    found = from_monai_plus_plus(theirs.state_dict())
    assert set(found) == set(ours.state_dict())
    ours.load_state_dict(found)
    x = torch.randn(2, 2, *(32, 16, 48)[:dims])
    with torch.no_grad():
        for a, b in zip(ours.all_logits(x), theirs(x)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x), sum(theirs(x)) / 4, rtol=1e-5, atol=1e-5)


def test_unet_pp_and_monai_s_differ_by_what_we_can_name():
    from monai.networks.nets import BasicUNetPlusPlus

    c = [8, 16, 32, 64, 128]
    theirs = count(BasicUNetPlusPlus(2, 1, 2, (*c, 8), True))
    nodes = [(i, j) for j in range(1, 5) for i in range(5 - j)]
    biases = sum(2 * n for n in c) + sum(2 * c[i] for i, _ in nodes)  # in convolutions, before the norm
    biases_up = sum(c[i + 1] if i == 0 else c[i] for i, _ in nodes)
    wider = 4 * (4 * 16 * 8 + 9 * 8 * 8)  # its four steps to the top keep 16 channels, ours have 8
    assert theirs == count(create("unet_pp", width=8, norm="instance")) + biases + biases_up + wider


@pytest.mark.parametrize("dims", (2, 3))
def test_unet_pp_nodes_by_the_formula(dims):
    "Each node by recursion, as the paper defines it."
    network, x = small("unet_pp", dims, levels=4).eval(), images(dims)
    maps = network.encoder(x)

    def node(i, j):
        if j == 0:
            return maps[i]
        row = torch.cat([node(i, k) for k in range(j)], 1)
        return network.nodes[f"{i}{j}"](node(i + 1, j - 1), maps[i].shape[2:], row)

    for j, found in enumerate(network.top_row(x), start=1):
        torch.testing.assert_close(found, node(0, j))
    assert len(network.nodes) == 6 and len(network.all_logits(x)) == 3


@pytest.mark.parametrize("dims", (2, 3))
def test_pruned_unet_pp_answers_as_its_head_and_costs_less(dims):
    network, x = small("unet_pp", dims, levels=4).eval(), images(dims)
    before = torch.random.get_rng_state()
    costs = []
    for depth in (1, 2, 3):
        fast = pruned(network, depth)
        torch.testing.assert_close(fast(x), network.all_logits(x)[depth - 1])
        assert not fast.training and fast.encoder.strides[-1] == 2**depth and fast.recipe["levels"] == depth + 1
        costs.append(multiply_adds(fast, (16,) * dims))
    assert costs == sorted(costs) and costs[-1] < multiply_adds(network, (16,) * dims)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="depth is 4"):
        pruned(network, 4)
    with pytest.raises(ValueError, match="depth is 1"):
        pruned(small("unet_pp", dims, deep_supervision=False), 1)


def test_shallow_nodes_do_not_hear_of_deep_ones():
    network, x = small("unet_pp", levels=4), images(2)
    network.all_logits(x)[0].sum().backward()
    heard = {name for name, p in network.named_parameters() if p.grad is not None}
    needed = ("encoder.levels.0", "encoder.levels.1", "nodes.01", "heads.1")
    assert heard == {name for name, _ in network.named_parameters() if name.startswith(needed)}


# Attention U-Net

@pytest.mark.parametrize("dims", (2, 3))
def test_gate_against_a_loop(dims):
    torch.manual_seed(0)
    gate = AttentionGate(dims, 3, 2)
    skip, signal = torch.randn(2, 3, *[6, 4, 4][:dims]), torch.randn(2, 2, *[3, 2, 2][:dims])
    coarse = torch.zeros(2, 1, *signal.shape[2:])
    for b in range(2):
        for place in torch.cartesian_prod(*[torch.arange(n) for n in signal.shape[2:]]).tolist():
            window = (b, slice(None), *[slice(2 * p, 2 * p + 2) for p in place])
            g = signal[(b, slice(None), *place)]
            total = 0.0
            for f in range(3):
                seen = (gate.of_skip.weight[f] * skip[window]).sum() + (gate.of_signal.weight[f].flatten() * g).sum() + gate.of_signal.bias[f]
                total += gate.weigh.weight[0, f].item() * max(0.0, seen.item())
            coarse[(b, 0, *place)] = 1 / (1 + math.exp(-(total + gate.weigh.bias.item())))
    alpha = F.interpolate(coarse, skip.shape[2:], mode=("bilinear", "trilinear")[dims - 2])
    torch.testing.assert_close(gate.weights(skip, signal), alpha, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gate(skip, signal), skip * alpha, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", (2, 3))
def test_open_gates_make_it_a_unet_and_shut_ones_silence_the_skips(dims):
    network, x = small("attention_unet", dims, levels=4).eval(), images(dims)
    ungated = UNet(UNetEncoder(dims, 1, 4, 4, False), 2, step=lambda *a, **k: GatedUp(*a, **k, upsample="linear")).eval()
    ungated.load_state_dict({k: v for k, v in network.state_dict().items() if ".gate." not in k})
    gates = [step.gate for step in network.decoder.steps]
    assert gates[-1] is None and None not in gates[:-1]
    assert not torch.allclose(network(x), ungated(x))
    for gate in gates[:-1]:
        nn.init.zeros_(gate.weigh.weight)
        nn.init.constant_(gate.weigh.bias, 50.0)
    torch.testing.assert_close(network(x), ungated(x))
    for gate in gates[:-1]:
        nn.init.constant_(gate.weigh.bias, -200.0)
    maps = network.encoder(x)
    silent = [maps[0], *[torch.zeros_like(m) for m in maps[1:-1]], maps[-1]]
    torch.testing.assert_close(network.decoder(maps)[-1], ungated.decoder(silent)[-1])


def test_gates_start_half_open():
    torch.manual_seed(0)
    gate = AttentionGate(2, 32, 64)
    alpha = gate.weights(torch.randn(4, 32, 16, 16), torch.randn(4, 64, 8, 8))
    assert 0.02 < alpha.mean() < 0.98 and alpha.std() > 0.05


@pytest.mark.parametrize("dims", (2, 3))
def test_attention_unet_and_monai_s_differ_by_what_we_can_name(dims):
    from monai.networks.nets import AttentionUnet

    c, k = [4, 8, 16, 32], 3**dims
    theirs = count(AttentionUnet(dims, 1, 2, c, (2, 2, 2)))
    steps = list(zip(c, c[1:]))
    same = sum(k * (n * m + m * m) + 4 * m for n, m in zip([1, *c], c)) + c[0] * 2 + 2  # two convolutions a level, normalised; the head
    monai = same + sum(2 * n for n in c)  # biases before the norms
    monai += sum(k * g * n + 3 * n for n, g in steps)  # a 3x3 transposed convolution with bias, normalised
    monai += sum(2 * (n * n // 2 + n // 2 + n) + (n // 2 + 1 + 2) for n in c[:-1])  # gates at one size, of half the channels, normalised
    monai += sum(2 * k * n * n + n + 1 for n in c[:-1])  # one convolution to join, with a PReLU
    ours = same + sum(k * ((n + g) * n + n * n) + 4 * n for n, g in steps)  # enlarging weighs nothing; two convolutions to join
    ours += sum(2**dims * n * n + g * n + n + n + 1 for n, g in steps[1:])  # gates over two sizes, none on the finest skip
    assert theirs == monai and count(create("attention_unet", spatial_dims=dims, width=4, levels=4)) == ours


def test_attention_unet_counts_of_the_paper():
    base = UNet(UNetEncoder(3, 1, 16, 5, False), 2, step=lambda *a, **k: Up(*a, **k, upsample="linear"))
    assert round(count(base) / 1e6, 1) == 5.9  # the paper: 5.88 million
    assert count(create("attention_unet", spatial_dims=3)) > count(base)


@pytest.mark.parametrize("dims", (2, 3))
def test_deep_supervision_and_pyramid(dims):
    network, x = small("attention_unet", dims, levels=4, pyramid=True, deep_supervision=True, out_channels=3).eval(), images(dims)
    answers = network.all_logits(x)
    assert len(answers) == 3 and all(a.shape == (2, 3, *x.shape[2:]) for a in answers)
    torch.testing.assert_close(network(x), sum(answers) / 3)
    network.train()(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    encoder = PyramidEncoder(dims, 1, 4, 3).eval()
    plain = UNetEncoder(dims, 1, 4, 3, False)
    assert (encoder.channels, encoder.strides) == (plain.channels, plain.strides)
    assert [m.shape for m in encoder(x)] == [m.shape for m in plain(x)]
    shrunk = (F.avg_pool2d if dims == 2 else F.avg_pool3d)(x, 2)
    maps = encoder(x)
    torch.testing.assert_close(maps[1], encoder.levels[1](torch.cat([encoder.looks[0](shrunk), encoder.pool(maps[0])], 1)))


@pytest.mark.parametrize("name", ("unet_pp", "attention_unet"))
def test_segmenter_learns_from_every_head(name):
    network = small(name, levels=3, deep_supervision=True)
    masks = (images(2)[:, 0] > 0).long()
    terms = Segmenter(network, 2)(type("Batch", (), {"x": images(2), "masks": masks}))
    terms["loss"].backward()
    assert all(p.grad is not None for p in network.heads.parameters())


# Focal Tversky

def logits_and_masks(classes=3, dims=2):
    g = torch.Generator().manual_seed(3)
    space = (9, 8, 7)[:dims]
    return torch.randn(2, classes, *space, generator=g), torch.randint(0, classes, (2, *space), generator=g)


def test_tversky_at_one_half_is_dice():
    logits, masks = logits_and_masks()
    p = logits.softmax(1)
    hits = torch.stack([(p[:, k] * (masks == k)).sum() for k in (1, 2)])
    sizes = torch.stack([p[:, k].sum() + (masks == k).sum() for k in (1, 2)])
    torch.testing.assert_close(tversky(p, masks, 0.5, 0.5), (2 * hits + 2) / (sizes + 2))
    assert (tversky(p, masks, 0.5, 0.5) - soft_dice(p, masks)).abs().max() < 0.02  # they differ by the epsilon


@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("alpha, beta", ((0.7, 0.3), (0.2, 0.8)))
def test_tversky_equals_monai_s(alpha, beta, dims):
    from monai.losses import TverskyLoss

    logits, masks = logits_and_masks(dims=dims)
    theirs = TverskyLoss(include_background=False, to_onehot_y=True, softmax=True, alpha=beta, beta=alpha, reduction="sum",
                         smooth_nr=1.0, smooth_dr=1.0, batch=True)(logits, masks[:, None])  # its alpha is the price of a false one
    torch.testing.assert_close(focal_tversky(logits, masks, alpha, beta, gamma=1), theirs)


def test_focal_tversky_by_hand():
    masks = torch.tensor([[[1, 1], [0, 0]]])
    logits = torch.full((1, 2, 2, 2), -30.0)
    logits[0, 1, 0, 0] = logits[0, 1, 1, 0] = logits[0, 0, 0, 1] = logits[0, 0, 1, 1] = 30.0  # one hit, one miss, one false
    assert focal_tversky(logits, masks).item() == pytest.approx((1 - 2 / (2 + 0.7 + 0.3)) ** 0.75, rel=1e-5)
    assert focal_tversky(logits, masks, 0.3, 0.7, gamma=1).item() == pytest.approx(1 - 2 / 3, rel=1e-5)
    assert focal_tversky(logits, masks, 0.9, 0.0, gamma=1).item() == pytest.approx(1 - 2 / 2.9, rel=1e-5)


def test_focal_tversky_has_a_finite_gradient_when_all_is_right():
    masks = torch.tensor([[[1, 1], [0, 0]]])
    for truth in (masks, torch.zeros_like(masks)):
        logits = (200.0 * (F.one_hot(truth, 2).movedim(-1, 1) - 0.5)).requires_grad_()
        loss = focal_tversky(logits, truth)
        loss.backward()
        assert loss < 1e-4 and torch.isfinite(logits.grad).all()
    half = logits.detach().bfloat16()
    assert focal_tversky(half, masks).dtype == torch.float32
