"""Encoders and segmentation networks: the contract for every card, counts and outputs of the papers and of MONAI, bad input."""
import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from medssl_nb.nets.base import (
    ConvNormAct, NetCard, cards, check_input, create, create_encoder, embed, fit_to, from_monai, from_timm, he_normal,
    normalisation, register, table,
)
from medssl_nb.nets.inspection import activation_bytes, count_parameters, draw, flow, multiply_adds, step_bytes
from medssl_nb.nets.resnet import resnet18, resnet50
from medssl_nb.nets.unet import Decoder, UNet, UNetEncoder, unet
from medssl_nb.train.fit import small_maps_in_float32

EVERY = [(card.name, dims) for card in cards() for dims in card.dims]
every = pytest.mark.parametrize("name, dims", EVERY)
NAMES = {
    "mlp", "rbm", "dbm", "resnet18", "resnet50", "densenet121", "lstm", "gru", "inception", "efficientnet_v2", "vit",
    "performer", "axial_attention", "switch", "unet", "s3d_unet", "dru_net", "unet_pp", "msrf_net", "attention_unet",
    "swin_unet", "unetr", "nsunet",
}
# Options that make a network tiny; {"width": 4} where nothing is said.
TRANSFORMER = {"width": 12, "depth": 2, "patch": 8, "heads": 2}
SMALL = {
    "densenet121": {"width": 4, "growth": 4}, "vit": TRANSFORMER, "performer": TRANSFORMER, "axial_attention": TRANSFORMER,
    "switch": TRANSFORMER, "unetr": {"width": 12, "depth": 4, "heads": 2}, "swin_unet": {"width": 12},
}
# What only the generative side of a network uses: no gradient comes from its maps.
GENERATIVE = {"rbm": {"visible_bias"}, "dbm": {"visible_bias"}}


def count(network):
    return sum(p.numel() for p in network.parameters())


def small(name, dims, in_channels=1, **options):
    torch.manual_seed(0)
    return create(name, spatial_dims=dims, in_channels=in_channels, **{**SMALL.get(name, {"width": 4}), **options})


def a_norm(network):
    "The option of another normalisation, for a network that takes one."
    return {"norm": "group"} if "norm" in network.recipe else {}


def images(dims, in_channels=1, batch=2):
    return torch.randn(batch, in_channels, *(48, 40, 33)[:dims], generator=torch.Generator().manual_seed(1))


def value(network, x):
    "One number that depends on all that a network returns, the answers of deep supervision included."
    out = network.all_logits(x) if hasattr(network, "all_logits") else network(x)
    return sum(m.float().square().mean() for m in (out if isinstance(out, list) else [out]))


# Every card

@every
def test_encoder_keeps_the_contract(name, dims):
    encoder = small(name, dims, in_channels=2, part="encoder")
    x = images(dims, 2)
    maps = encoder(x)
    assert (encoder.spatial_dims, encoder.in_channels) == (dims, 2)
    assert len(maps) == len(encoder.channels) == len(encoder.strides)
    assert encoder.strides == sorted(encoder.strides) and all(isinstance(n, int) for n in encoder.strides + encoder.channels)
    for m, channels, stride in zip(maps, encoder.channels, encoder.strides):
        assert m.shape[:2] == (2, channels)
        assert all(size in (n // stride, -(-n // stride)) for size, n in zip(m.shape[2:], x.shape[2:]))
    torch.testing.assert_close(embed(encoder, x), maps[-1].mean(tuple(range(2, dims + 2))), rtol=1e-3, atol=1e-5)


@every
def test_one_step_learns_in_float32_and_bfloat16(name, dims):
    for bf16 in (False, True):
        network = small(name, dims)
        before = copy.deepcopy(network.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), small_maps_in_float32(network):
            loss = value(network, images(dims))
        loss.backward()
        assert torch.isfinite(loss)
        silent = {key.split(".")[-1] for key, p in network.named_parameters() if p.grad is None}
        assert silent == GENERATIVE.get(name, set())
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
        torch.optim.SGD(network.parameters(), lr=0.1).step()
        assert any(not torch.equal(before[key], p) for key, p in network.named_parameters())


@every
def test_same_seed_same_network_and_gradient(name, dims):
    results = []
    for _ in range(2):
        network = small(name, dims)
        value(network, images(dims)).backward()
        results.append([p.grad for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.manual_seed(1)
    other = create(**network.recipe)
    assert any(not torch.equal(a, b) for a, b in zip(other.parameters(), small(name, dims).parameters()))


@every
def test_recipe_builds_the_same_again(name, dims):
    network = small(name, dims, in_channels=3)
    network = small(name, dims, in_channels=3, **a_norm(network))
    for made in (network, create_encoder(**network.recipe)):
        recipe = json.loads(json.dumps(made.recipe))
        again = create(**recipe)
        assert type(again) is type(made) and again.recipe == made.recipe
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in made.state_dict().items()}


@every
def test_group_norm_sees_one_image_at_a_time(name, dims):
    network, x = small(name, dims), images(dims).double()  # a convolution may sum in another order for another batch
    network = small(name, dims, **a_norm(network)).double().train()
    torch.manual_seed(0)
    alone = network(x[:1])
    torch.manual_seed(0)
    together = network(x)
    if not isinstance(alone, list):
        alone, together = [alone], [together]
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b[:1], rtol=1e-4, atol=1e-4)


@every
def test_in_evaluation_images_of_a_batch_do_not_see_each_other(name, dims):
    network, x = small(name, dims).eval(), images(dims)
    changed = x.clone()
    changed[1] += 3
    a, b = (out[-1] if isinstance(out, list) else out for out in (network(x), network(changed)))
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1])


@every
def test_bad_input_is_one_clear_error(name, dims):
    encoder = small(name, dims, part="encoder")
    good = images(dims)
    too_small = torch.zeros(1, 1, *[encoder.smallest - 1] * dims)
    for x, says in (
        (good[0], "B, C"), (torch.cat([good, good], 1), "1 channel"), (too_small, f"at least {encoder.smallest} pixels"),
        (good.long(), "float"), (good[:, :, None], f"spatial_dims={dims + 1}"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            encoder(x)
    encoder.eval()(torch.zeros(1, 1, *[encoder.smallest] * dims))


@every
def test_segmentation_gives_logits_of_the_image_s_size(name, dims):
    if next(card for card in cards() if card.name == name).kind == "segmentation":
        network = small(name, dims, in_channels=2, out_channels=3)
        for space in ((48, 40, 33)[:dims], (network.encoder.smallest + 1,) * dims):
            assert network.eval()(torch.zeros(1, 2, *space)).shape == (1, 3, *space)
        if hasattr(network, "all_logits"):
            answers = network.all_logits(torch.zeros(1, 2, *space))
            assert len(answers) > 1 and all(a.shape == (1, 3, *space) for a in answers)


@pytest.mark.parametrize("name, dims", [(card.name, card.dims[0]) for card in cards()])
def test_compiles_in_one_piece(name, dims):
    "torch.compile takes the whole forward pass without a break, and changes nothing (one implementation for 2D and 3D: one suffices)."
    network, x = small(name, dims).eval(), images(dims, batch=1)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected, found = network(x), compiled(x)
    for a, b in zip(*(out if isinstance(out, list) else [out] for out in (expected, found))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# The registry

def test_cards_and_table():
    names = [card.name for card in cards()]
    assert NAMES <= set(names) and len(set(names)) == len(names)
    assert {card.name for card in cards() if card.dims != (2, 3)} == {"s3d_unet"}
    assert all(card.kind in ("encoder", "segmentation") and card.paper and card.idea for card in cards())
    assert all(f"`{name}`" in table() for name in names) and len(table().splitlines()) == len(names) + 2


def test_unknown_names_options_and_dimensions():
    with pytest.raises(ValueError, match="'resnet_18'; there are resnet18"):
        create("resnet_18")
    with pytest.raises(ValueError, match="no option 'widht'.*width"):
        create("resnet18", widht=3)
    with pytest.raises(ValueError, match="2 or 3, not 4"):
        create("unet", spatial_dims=4)
    with pytest.raises(ValueError, match="part is 'head'"):
        create("unet", part="head")
    with pytest.raises(ValueError, match="'full' or 'small'"):
        create("resnet18", stem="tiny")
    with pytest.raises(ValueError, match="batch, group, instance, none"):
        create("unet", norm="layer")


def test_two_networks_cannot_have_one_name():
    with pytest.raises(ValueError, match="already"):
        register(NetCard("resnet18", "encoder", 2000, "another paper", (2,), "another idea"))


def test_create_finds_the_networks_and_stays_light():
    code = (
        "import sys; from medssl_nb.nets import create;"
        "create('resnet18', width=4); slow = {'monai', 'timm', 'matplotlib', 'nilearn'} & set(sys.modules); assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Blocks

@pytest.mark.parametrize("dims", (2, 3))
def test_norms_by_hand(dims):
    x = torch.randn(3, 6, *(5, 4, 7)[:dims]) * 3 + 1
    axes = tuple(range(2, dims + 2))
    by_hand = {
        "batch": (x - x.mean((0, *axes), keepdim=True)) / (x.var((0, *axes), keepdim=True, unbiased=False) + 1e-5).sqrt(),
        "instance": (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt(),
        "none": x,
    }
    pairs = x.reshape(3, 2, -1)  # gcd(8, 6) = 2 groups
    pairs = (pairs - pairs.mean(-1, keepdim=True)) / (pairs.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    by_hand["group"] = pairs.reshape(x.shape)
    for name, expected in by_hand.items():
        torch.testing.assert_close(normalisation(name, dims, 6)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_only_where_nothing_normalises_it_away():
    assert ConvNormAct(2, 1, 4).conv.bias is None and ConvNormAct(2, 1, 4, norm="none").conv.bias is not None
    assert len(ConvNormAct(2, 1, 4, activation=None)) == 2


@pytest.mark.parametrize("dims", (2, 3))
def test_he_normal_has_he_s_deviation(dims):
    torch.manual_seed(0)
    conv = he_normal((nn.Conv2d, nn.Conv3d)[dims - 2](32, 64, 3))
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 3**dims)) ** 0.5, rel=0.03) and not conv.bias.any()
    up = he_normal((nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2](64, 64, 2, 2))
    assert up.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.03)


# ResNet

def test_resnet_counts_of_torchvision_without_the_classifier():
    assert count(resnet18(in_channels=3)) == 11_689_512 - (512 * 1000 + 1000) == 11_176_512
    assert count(resnet50(in_channels=3)) == 25_557_032 - (2048 * 1000 + 1000) == 23_508_032


def test_resnet_maps():
    full, cifar = resnet18(width=4), resnet50(3, width=4, stem="small")
    assert (full.channels, full.strides) == ([4, 4, 8, 16, 32], [2, 4, 8, 16, 32])
    assert (cifar.channels, cifar.strides) == ([4, 16, 32, 64, 128], [1, 1, 2, 4, 8])
    assert [m.shape[-1] for m in full(torch.zeros(2, 1, 33, 33))] == [17, 9, 5, 3, 2]
    assert [m.shape[-1] for m in cifar(torch.zeros(2, 1, 9, 9, 9))] == [9, 9, 5, 3, 2]


def from_monai_names(state, ours):
    "MONAI's ResNet weights under our names: both list them in the order of the forward pass, but for the shortcuts."
    renamed = {}
    for key, weight in state.items():
        key = re.sub(r"^conv1\.", "stem.conv.", key)
        key = re.sub(r"^bn1\.", "stem.norm.", key)
        key = re.sub(r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}", key)
        key = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".residual.{int(m[2]) - 1}.{'conv' if m[1] == 'conv' else 'norm'}.", key)
        key = key.replace("downsample.0", "shortcut.conv").replace("downsample.1", "shortcut.norm")
        renamed[key] = weight
    assert set(renamed) == set(ours.state_dict())
    return renamed


@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_resnet_with_monai_s_weights_gives_monai_s_maps(name, dims):
    import monai.networks.nets as monai_nets

    torch.manual_seed(0)
    block, layers = {"resnet18": ("basic", [2, 2, 2, 2]), "resnet50": ("bottleneck", [3, 4, 6, 3])}[name]
    theirs = monai_nets.ResNet(
        block, layers, [8, 16, 32, 64], spatial_dims=dims, n_input_channels=2, conv1_t_size=7, conv1_t_stride=2,
        shortcut_type="B", feed_forward=False, bias_downsample=False,
    )
    for module in theirs.modules():  # statistics that are not 0 and 1
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    ours = create(name, dims, 2, width=8)
    ours.load_state_dict(from_monai_names(theirs.state_dict(), ours))
    wrapped, x = from_monai(theirs), images(dims, 2)
    assert (wrapped.channels, wrapped.strides) == (ours.channels, ours.strides) and count(ours) == count(theirs)
    for a, b in zip(ours.eval()(x), wrapped.eval()(x)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# U-Net

def test_unet_counts_of_the_papers():
    assert count(unet(3, 3, out_channels=3, norm="none")) == 19_069_955  # stated by Çiçek et al. 2016
    assert count(unet(3, 3, out_channels=3)) == 19_069_955 + 2336  # a scale and a shift instead of a bias
    assert count(unet(2, norm="none")) == 31_029_698
    assert unet(3).decoder.channels == [256, 128, 64] and unet(3).decoder.strides == [4, 2, 1]
    assert UNetEncoder(3).strides == [1, 2, 4, 8]  # Models Genesis, PCRLv2: stride 8, 512 channels
    assert UNetEncoder(3).channels == [64, 128, 256, 512]


def test_unet_and_monai_s_basic_unet_differ_by_what_we_can_name():
    from monai.networks.nets import BasicUNet

    theirs = count(BasicUNet(2, 1, 2, features=(64, 128, 256, 512, 1024, 64)))
    biases = 2 * (64 + 128 + 256 + 512 + 1024) + 2 * (512 + 256 + 128 + 64)  # its convolutions have them before the norm
    biases_up = 512 + 256 + 128 + 128  # its transposed convolutions, too
    last_step = 4 * 128 * 64 + 9 * 64 * 64  # its last enlargement keeps 128 channels, ours halves them
    assert theirs == count(unet(2, norm="instance")) + biases + biases_up + last_step


@pytest.mark.parametrize("skips", (True, False))
@pytest.mark.parametrize("size", ((32, 32, 32), (17, 23, 31), (40, 33, 19)))
@pytest.mark.parametrize("dims", (2, 3))
def test_any_size_on_any_encoder(dims, size, skips):
    size = size[:dims]
    for encoder in (UNetEncoder(dims, 2, width=2, levels=4), resnet18(dims, 2, width=4), resnet18(dims, 2, width=4, stem="small")):
        network = UNet(encoder, 3, skips)
        x = torch.randn(2, 2, *size)
        maps = network.decoder(encoder(x), size)
        assert network(x).shape == (2, 3, *size) and maps[-1].shape[2:] == size
        assert network.decoder.strides[-1] == 1 and network.decoder.strides == sorted(network.decoder.strides, reverse=True)
        for m, channels, stride in zip(maps, network.decoder.channels, network.decoder.strides):
            assert m.shape[1] == channels and all(s in (n // stride, -(-n // stride)) for s, n in zip(m.shape[2:], size))


def test_decoder_without_size_enlarges_by_the_stride():
    encoder = resnet18(width=4)
    assert Decoder(encoder)(encoder(torch.zeros(2, 1, 64, 64)))[-1].shape == (2, 2, 64, 64)


def test_skips_are_what_carries_the_fine_maps():
    torch.manual_seed(0)
    encoder = UNetEncoder(2, width=4, levels=3)
    maps = encoder(torch.randn(2, 1, 16, 16))
    silent = [torch.zeros_like(maps[0]), *maps[1:]]
    with_skips, without = Decoder(encoder).eval(), Decoder(encoder, skips=False).eval()
    assert not torch.allclose(with_skips(maps)[-1], with_skips(silent)[-1])
    assert torch.equal(without(maps)[-1], without(silent)[-1])
    assert count(with_skips) - count(without) == 9 * (4 * 4 + 8 * 8)


def test_decoder_on_a_monai_encoder():
    from monai.networks.nets import DenseNet

    encoder = from_monai(DenseNet(2, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2, 2, 2), bn_size=2))
    assert encoder.strides == [2, 4, 8, 16, 32]
    assert UNet(encoder, 2)(torch.randn(2, 1, 64, 50)).shape == (2, 2, 64, 50)


def test_a_shift_by_the_stride_shifts_the_answer():
    "Convolutions move with the image: far from the edges the logits of a moved image are the moved logits."
    network = small("unet", 2, levels=2).eval()
    x = images(2, batch=1)
    moved = torch.roll(x, 2, -1)
    torch.testing.assert_close(network(x)[..., 20:28, 16:22], network(moved)[..., 20:28, 18:24], rtol=1e-4, atol=1e-4)


def test_fit_to_repeats_and_cuts():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert fit_to(x, (4, 1)).tolist() == [[[[0], [2], [2], [2]]]]
    assert fit_to(x, (2, 2)) is x


# Wrappers

def test_from_monai_says_what_it_cannot_wrap():
    from monai.networks.nets import BasicUNet

    with pytest.raises(ValueError, match="BasicUNet does not return a list of feature maps"):
        from_monai(BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4)))


def test_from_monai_leaves_the_network_as_it_was():
    from monai.networks.nets import ResNetFeatures

    network = ResNetFeatures("resnet18", pretrained=False, spatial_dims=2).train()
    before = copy.deepcopy(network.state_dict())
    wrapped = from_monai(network)
    assert network.training and wrapped.channels == [64, 64, 128, 256, 512] and wrapped.recipe is None
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    check_input(wrapped, torch.zeros(1, 1, 64, 64))


class Info:
    def channels(self):
        return [4, 8]

    def reduction(self):
        return [4, 8]


class LastChannels(nn.Module):
    "As timm's window Transformers: maps (B, H, W, C)."

    def __init__(self):
        super().__init__()
        self.patches, self.merge, self.feature_info = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 8, 2, 2), Info()

    def forward(self, x):
        fine = self.patches(x)
        return [fine.movedim(1, -1), self.merge(fine).movedim(1, -1)]


def test_from_timm_puts_channels_first():
    encoder = from_timm(LastChannels())
    maps = encoder(torch.zeros(2, 3, 32, 24))
    assert [m.shape for m in maps] == [(2, 4, 8, 6), (2, 8, 4, 3)] and encoder.strides == [4, 8]
    assert UNet(encoder, 2)(torch.zeros(2, 3, 30, 25)).shape == (2, 2, 30, 25)


def test_from_timm_by_name(monkeypatch):
    asked = {}
    timm = type(sys)("timm")
    timm.create_model = lambda name, **options: asked.update(name=name, **options) or LastChannels()
    monkeypatch.setitem(sys.modules, "timm", timm)
    from_timm("swin", in_channels=3, pretrained=True)
    assert asked == {"name": "swin", "features_only": True, "in_chans": 3, "pretrained": True}
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        from_timm("resnet18")
    with pytest.raises(ValueError, match="features_only=True"):
        from_timm(nn.Conv2d(1, 1, 1))


# What a network costs, and how it is drawn

def test_multiply_adds_by_hand():
    w = [1, 8, 16, 32]
    down = sum(9 * (w[i] * w[i + 1] + w[i + 1] ** 2) * (32 >> i) ** 2 for i in range(3))
    up = sum(4 * 2 * c * c * (32 >> i + 1) ** 2 + 9 * 3 * c * c * (32 >> i) ** 2 for i, c in ((1, 16), (0, 8)))
    network = small("unet", 2, width=8, levels=3)
    assert multiply_adds(network, (32, 32)) == down + up + 8 * 2 * 32 * 32
    assert multiply_adds(network, (64, 32)) == 2 * multiply_adds(network, (32, 32))
    assert count_parameters(network.requires_grad_(False)) == 0


@pytest.mark.parametrize("dims", (2, 3))
def test_activation_bytes_are_what_autograd_keeps(dims):
    "The count on the device meta against the same count with real values."
    network, space = small("resnet18", dims), (32,) * dims
    weights = {p.data_ptr() for p in network.state_dict().values()}
    kept = {}

    def keep(t):
        kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        network.train()(torch.zeros(2, 1, *space))
    by_hand = sum(s.nbytes() for pointer, s in kept.items() if pointer not in weights)
    assert activation_bytes(network, space, batch=2) == by_hand
    assert step_bytes(network, space, batch=2) == by_hand + 16 * count(network)
    assert network.training and all(p.device.type == "cpu" for p in network.parameters())


@every
def test_every_network_is_drawn_from_its_modules(name, dims):
    network = small(name, dims)
    bars = flow(network)
    assert len(bars) >= len(network.channels if hasattr(network, "channels") else network.encoder.channels) > 0
    assert all(bar["stride"] >= 1 and bar["channels"] >= 1 for bar in bars)
    assert all(bars[i]["column"] < bar["column"] for bar in bars for i in bar["sources"])
    assert sum(not bar["sources"] for bar in bars) <= max(1, len(bars) / 2)  # most take from another block
    fig = draw(network, "a title")
    assert fig.axes[0].get_title() == "a title" and len(fig.axes[0].patches) >= len(bars)


def test_flow_of_a_unet_is_a_unet():
    bars = flow(small("unet", 2, levels=3))
    assert [bar["sources"] for bar in bars] == [[], [0], [1], [1, 2], [0, 3], [4]]
    assert [bar["stride"] for bar in bars] == [1, 2, 4, 2, 1, 1] and [bar["channels"] for bar in bars] == [4, 8, 16, 8, 4, 2]
    bars = flow(small("unet", 3, levels=2, skips=False))
    assert [bar["sources"] for bar in bars] == [[], [0], [1], [2]]
