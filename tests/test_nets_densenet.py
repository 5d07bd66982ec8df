"""DenseNet: the counts of the paper's network, MONAI's maps with MONAI's weights, and what a dense block must not change."""
import re

import pytest
import torch
from torch import nn

from medssl_nb.nets import create
from medssl_nb.nets.base import from_monai
from medssl_nb.nets.densenet import DenseBlock, DenseNet, densenet121, norm_act_conv, transition


def count(network):
    return sum(p.numel() for p in network.parameters())


def our_name(key):
    "Our name of one of MONAI's weights."
    key = re.sub(r"^features\.", "", key)
    key = re.sub(r"^(conv|norm)0\.", r"stem.\1.", key)
    key = re.sub(r"^norm5\.", "last.norm.", key)
    key = re.sub(r"^transition(\d)\.(conv|norm)\.", lambda m: f"transitions.{int(m[1]) - 1}.0.{m[2]}.", key)
    layer = r"^denseblock(\d)\.denselayer(\d+)\.layers\.(conv|norm)(\d)\."
    return re.sub(layer, lambda m: f"blocks.{int(m[1]) - 1}.{int(m[2]) - 1}.{int(m[4]) - 1}.{m[3]}.", key)


@pytest.mark.parametrize("dims, size", ((2, (70, 65)), (3, (40, 33, 48))))
def test_monai_s_weights_give_monai_s_maps(dims, size):
    from monai.networks.nets import DenseNet121

    torch.manual_seed(0)
    theirs = DenseNet121(spatial_dims=dims, in_channels=2, out_channels=3, init_features=8, growth_rate=4)
    for module in theirs.modules():  # statistics, scales and shifts that are not 0 and 1
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    ours = create("densenet121", dims, 2, width=8, growth=4)
    weights = {our_name(key): w for key, w in theirs.state_dict().items() if key.startswith("features.")}
    ours.load_state_dict(weights)
    wrapped, x = from_monai(theirs), torch.randn(2, 2, *size)
    assert (ours.channels, ours.strides) == (wrapped.channels, wrapped.strides)
    with torch.no_grad():
        maps, expected = ours.eval()(x), wrapped.eval()(x)
    assert len(maps) == len(expected) == 5
    for a, b in zip(maps, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_counts_of_torchvision_without_the_classifier():
    assert count(densenet121(in_channels=3)) == 7_978_856 - (1024 * 1000 + 1000) == 6_953_856
    assert count(DenseNet((6, 12, 32, 32), in_channels=3)) == 14_149_480 - (1664 * 1000 + 1000)
    assert count(DenseNet((6, 12, 48, 32), in_channels=3)) == 20_013_928 - (1920 * 1000 + 1000)


def test_count_in_3d_differs_by_the_kernels_alone():
    layers, width, growth = 6 + 12 + 24 + 16, 8, 4
    more = (343 - 49) * width + layers * (27 - 9) * 4 * growth * growth
    assert count(densenet121(3, width=width, growth=growth)) - count(densenet121(2, width=width, growth=growth)) == more


@pytest.mark.parametrize("dims", (2, 3))
def test_what_comes_in_comes_out_untouched(dims):
    block, x = DenseBlock(3, dims, 5, growth=2).eval(), torch.randn(2, 5, *(6, 7, 4)[:dims])
    out = block(x)
    assert out.shape == (2, 11, *x.shape[2:]) and torch.equal(out[:, :5], x)
    for i, layer in enumerate(block):  # each layer's maps follow from all before it, and from nothing else
        torch.testing.assert_close(out[:, 5 + 2 * i : 7 + 2 * i], layer(out[:, : 5 + 2 * i]))


def test_every_layer_is_reached_by_every_earlier_one():
    "The gradient of a layer's new maps: some at every earlier source, none at a later one."
    block, x = DenseBlock(4, 2, 3, growth=2), torch.randn(1, 3, 6, 6)
    for reader in range(4):
        inputs = torch.randn(1, 3 + 2 * reader, 6, 6, requires_grad=True)
        gradient, = torch.autograd.grad(block[reader](inputs).square().sum(), inputs)
        assert (gradient.abs().amax((0, 2, 3)) > 0).all()
    assert [layer[0].conv.in_channels for layer in block] == [3, 5, 7, 9] and block(x).shape[1] == 11


def test_normalisation_first_and_biases_only_without_it():
    names = [name for name, _ in norm_act_conv(2, 3, 4).named_children()]
    assert names == ["norm", "activation", "conv"]
    assert norm_act_conv(2, 3, 4).conv.bias is None and norm_act_conv(2, 3, 4, norm="none").conv.bias is not None
    assert transition(3, 6)(torch.randn(2, 6, 4, 5, 6)).shape == (2, 3, 2, 2, 3)


def test_the_middle_maps_are_not_activated_and_the_ends_are():
    torch.manual_seed(0)
    maps = DenseNet((2, 2, 2), width=4, growth=4).eval()(torch.randn(2, 1, 40, 40))
    assert [bool((m < 0).any()) for m in maps] == [False, True, True, False]


def test_the_weights_start_counted_by_inputs_and_keep_the_signal_level():
    torch.manual_seed(0)
    network = densenet121(width=32, growth=16, norm="none").eval()
    squeeze = network.blocks[2][20][0].conv
    assert squeeze.weight.std().item() == pytest.approx((2 / squeeze.in_channels) ** 0.5, rel=0.03)
    maps = network(torch.randn(1, 1, 64, 64))
    assert all(0.01 < m.std() < 100 for m in maps)
