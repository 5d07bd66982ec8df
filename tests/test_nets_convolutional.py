"""Convolutional networks: counts of the papers, MONAI's block with the same weights, the DCGAN's generator layer by layer."""
import pytest
import torch
from torch import nn

from medssl_nb.nets.base import create, embed
from medssl_nb.nets.convolutional import EFFICIENTNET_V2_S, INCEPTION_MODULES, InceptionModule, MBConv, SqueezeExcite, StochasticDepth
from medssl_nb.nets.generative import Generator, enlarge

both = pytest.mark.parametrize("dims", (2, 3))


def count(network):
    return sum(p.numel() for p in network.parameters())


def randomise(network):
    "Weights and running averages that are not 0 and 1, so that nothing cancels."
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return network.eval()


# Inception

def test_inception_counts_torchvision_s_but_for_its_small_windows():
    ours = count(create("inception", in_channels=3))
    three_for_five = sum((25 - 9) * row[3] * row[4] for row in INCEPTION_MODULES.values())
    assert ours == 5_980_832 and ours - three_for_five + 1024 * 1000 + 1000 == 6_624_904


def test_inception_s_channels_are_the_paper_s_and_scale_with_width():
    network = create("inception")
    assert network.channels == [64, 192, 480, 832, 1024] and network.strides == [2, 4, 8, 16, 32]
    assert [m.out_channels for m in network.modules() if isinstance(m, InceptionModule)] == [256, 480, 512, 512, 512, 528, 832, 832, 1024]
    assert create("inception", width=16).channels == [16, 48, 120, 208, 256]


@both
def test_inception_module_by_hand(dims):
    module = randomise(InceptionModule(dims, 3, (2, 4, 5, 3, 6, 1)))
    x = torch.randn(2, 3, *(7, 6, 5)[:dims])
    one, three, five, pooled = module.branches
    pool = (nn.functional.max_pool2d, nn.functional.max_pool3d)[dims - 2](x, 3, 1, 1)
    expected = torch.cat([one(x), three[1](three[0](x)), five[1](five[0](x)), pooled[1](pool)], 1)
    torch.testing.assert_close(module(x), expected)
    assert [b.shape[1] for b in (one(x), three(x), five(x), pooled(x))] == [2, 5, 6, 1] and module.out_channels == 14
    assert three[1].conv.kernel_size == (3,) * dims and five[1].conv.kernel_size == (5,) * dims


# EfficientNetV2

def test_efficientnet_v2_counts_the_published_network():
    assert count(create("efficientnet_v2", in_channels=3)) == 21_458_488 - (1280 * 1000 + 1000) == 20_177_488


def test_efficientnet_v2_has_table_4():
    network = create("efficientnet_v2", width=24)
    assert network.channels == [24, 48, 64, 160, 1280] and network.strides == [2, 4, 8, 16, 32]
    blocks = [m for m in network.modules() if isinstance(m, MBConv)]
    assert len(blocks) == 40 == sum(row[0] for row in EFFICIENTNET_V2_S)
    assert sum(any(isinstance(layer, SqueezeExcite) for layer in block.residual) for block in blocks) == 6 + 9 + 15
    assert sum(block.adds for block in blocks) == 40 - 5  # each later stage begins with other channels
    assert create("efficientnet_v2", width=12).channels == [12, 24, 32, 80, 640]


def test_stochastic_depth_grows_with_the_block_and_is_off_by_default():
    rates = [m.drop.rate for m in create("efficientnet_v2", width=4, stochastic_depth=0.2).modules() if isinstance(m, MBConv)]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.2 * 39 / 40)
    assert not any(m.rate for m in create("efficientnet_v2", width=4).modules() if isinstance(m, StochasticDepth))


def test_stochastic_depth_drops_whole_images_and_keeps_the_average():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.3), torch.ones(5000, 2, 3, 3)
    found = layer(x)
    assert torch.equal(found.amin((1, 2, 3)), found.amax((1, 2, 3))) and found.mean().item() == pytest.approx(1, abs=0.04)
    assert torch.equal(layer.eval()(x), x)
    with pytest.raises(ValueError, match="rate is 1"):
        StochasticDepth(1)


@both
def test_mbconv_with_monai_s_weights_gives_monai_s_output(dims):
    from monai.networks.nets.efficientnet import MBConvBlock

    torch.manual_seed(0)
    size = [8, 7, 9][:dims]
    theirs = MBConvBlock(dims, 8, 8, 3, 1, size, 4, 0.25, norm=("batch", {"eps": 1e-5}), drop_connect_rate=0)
    theirs.set_swish(memory_efficient=False)
    randomise(theirs)
    ours = MBConv(dims, 8, 8, 4).eval()
    assert count(ours) == count(theirs)
    state = theirs.state_dict()
    names = {"_expand_conv": "0.conv", "_bn0": "0.norm", "_depthwise_conv": "1.conv", "_bn1": "1.norm",
             "_se_reduce": "2.squeeze", "_se_expand": "2.excite", "_project_conv": "3.conv", "_bn2": "3.norm"}
    ours.load_state_dict({f"residual.{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in state.items()})
    x = torch.randn(2, 8, *size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@both
def test_depthwise_channels_do_not_see_each_other(dims):
    look = MBConv(dims, 4, 4).residual[1].conv
    x = torch.randn(1, 16, *(6, 5, 7)[:dims])
    changed = x.clone()
    changed[:, 3] += 1
    moved = (look(x) - look(changed)).abs().flatten(2).amax(2)[0]
    assert (moved > 0).nonzero().tolist() == [[3]]


def test_fused_blocks_have_no_depthwise_convolution():
    fused = MBConv(2, 4, 6, 4, 2, fused=True)
    assert all(m.groups == 1 for m in fused.modules() if isinstance(m, nn.Conv2d)) and not fused.adds
    assert count(MBConv(2, 4, 4, 1, fused=True)) == 9 * 16 + 8
    assert fused(torch.zeros(2, 4, 9, 9)).shape == (2, 6, 5, 5)


@both
@pytest.mark.parametrize("name", ("inception", "efficientnet_v2"))
def test_sizes_are_rounded_up_and_the_embedding_is_the_last_map_s_average(name, dims):
    encoder = create(name, dims, width=4).eval()
    for n in (8, 33):
        x = torch.randn(1, 1, *[n] * dims)
        assert [m.shape[2] for m in encoder(x)] == [-(-n // s) for s in encoder.strides]
    assert embed(encoder, x).shape == (1, encoder.channels[-1])


# The generator

def test_generator_counts_pytorch_s_dcgan_and_equals_it_layer_by_layer():
    torch.manual_seed(0)
    ours = Generator(2, code=100, out_channels=3, width=64, levels=4)
    assert count(ours) == 3_576_704
    theirs, widths = nn.Sequential(), [100, 64, 32, 16, 8, 1]
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        theirs.append(nn.ConvTranspose2d(a, b, 4, 2 if i else 1, 1 if i else 0, bias=False))
        if i < 4:
            theirs.extend([nn.BatchNorm2d(b), nn.ReLU()])
    small = Generator(2, code=100, width=8, levels=4)
    small.layers.load_state_dict(randomise(theirs).state_dict())
    z = torch.randn(3, 100)
    torch.testing.assert_close(small.eval()(z), theirs(z[:, :, None, None]))


@both
@pytest.mark.parametrize("how", ("transposed", "upsample"))
@pytest.mark.parametrize("norm", ("batch", "group", "none"))
def test_generator_makes_images_of_its_size(dims, how, norm):
    torch.manual_seed(0)
    start = (2, 3, 1)[:dims]
    generator = Generator(dims, code=5, out_channels=2, width=4, levels=3, start=start, how=how, norm=norm)
    assert generator.size == tuple(8 * n for n in start)
    generator(torch.randn(3, 5)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in generator.parameters())
    assert generator.eval()(torch.randn(3, 5)).shape == (3, 2, *generator.size)


def test_generator_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"codes \(B, 8\).*\(2, 9\)"):
        Generator(code=8, width=2, levels=1)(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="levels=0"):
        Generator(levels=0)
    with pytest.raises(ValueError, match="start"):
        Generator(3, start=(2, 2))
    with pytest.raises(ValueError, match="'transposed' or 'upsample'"):
        enlarge("bilinear", 2, 1, 1)


def test_upsampling_leaves_an_even_map_even_where_a_transposed_convolution_need_not():
    torch.manual_seed(0)
    unevenness = {}
    for how in ("transposed", "upsample"):
        inner = enlarge(how, 2, 3, 4)(torch.ones(1, 3, 8, 8))[0, :, 2:-2, 2:-2]
        unevenness[how] = (inner.amax((1, 2)) - inner.amin((1, 2))).max().item()
    assert unevenness["upsample"] < 1e-5 < 0.05 < unevenness["transposed"]
