"""Swin-Unet and UNETR: windows against loops, masks against the definition, the weights and counts of MONAI and of the official code."""
import itertools
import re

import pytest
import torch
from torch import nn

from medssl_nb.nets.base import create
from medssl_nb.nets.transformer_unets import (
    PatchExpanding, PatchMerging, SwinEncoder, SwinStage, UNETREncoder, WindowAttention, map_of_windows, offsets, window_mask, windows_of,
)


def count(network):
    return sum(p.numel() for p in network.parameters())


# Windows

@pytest.mark.parametrize("grid", ((6, 4), (4, 2, 6)))
def test_windows_by_loops(grid):
    x, side = torch.randn(2, 3, *grid), 2
    by_hand = []
    for image in x:
        for corner in itertools.product(*[range(0, n, side) for n in grid]):
            inside = itertools.product(*[range(c, c + side) for c in corner])
            by_hand.append(torch.stack([image[(slice(None), *place)] for place in inside]))
    assert torch.equal(windows_of(x, side), torch.stack(by_hand))
    assert torch.equal(map_of_windows(windows_of(x, side), side, grid), x)


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_equal_offsets_have_equal_numbers(dims):
    side, found = 3, offsets(dims, 3)
    places, seen = list(itertools.product(range(side), repeat=dims)), {}
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        seen.setdefault(tuple(p - q for p, q in zip(a, b)), set()).add(found[i, j].item())
    assert all(len(numbers) == 1 for numbers in seen.values())
    assert sorted(n for numbers in seen.values() for n in numbers) == list(range(5**dims))


def one_by_one(attention, x, grid):
    "Each token's answer alone: softmax over those whose coordinates lie in the same window, heads and all, with loops."
    side, heads = attention.window, attention.heads
    places = list(itertools.product(*[range(n) for n in grid]))
    shift = [side // 2 if attention.shifted and n > side else 0 for n in grid]
    window = [tuple((p - s) // side for p, s in zip(place, shift)) for place in places]
    queries, keys, values = attention.qkv(x).chunk(3, -1)
    out = torch.zeros_like(x)
    for i, place in enumerate(places):
        friends = [j for j in range(len(places)) if window[j] == window[i]]
        entries = []
        for j in friends:
            entry = 0
            for p, q in zip(place, places[j]):
                entry = entry * (2 * side - 1) + p - q + side - 1
            entries.append(entry)
        for h in range(heads):
            part = slice(h * x.shape[-1] // heads, (h + 1) * x.shape[-1] // heads)
            scores = (queries[:, i, None, part] * keys[:, friends, part]).sum(-1) * (part.stop - part.start) ** -0.5
            weights = (scores + attention.table[entries, h]).softmax(-1)
            out[:, i, part] = (weights[..., None] * values[:, friends, part]).sum(1)
    return attention.out(out)


@pytest.mark.parametrize("shifted", (False, True))
@pytest.mark.parametrize("grid, side", (((8, 8), 4), ((7, 5), 4), ((3, 9), 4), ((6, 5), 3), ((2, 2), 7), ((4, 3, 5), 2)))
def test_window_attention_is_attention_with_the_mask_of_the_definition(grid, side, shifted):
    torch.manual_seed(0)
    attention = WindowAttention(len(grid), 8, 2, side, shifted)
    nn.init.normal_(attention.table)
    x = torch.randn(2, torch.Size(grid).numel(), 8)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, grid), one_by_one(attention, x, grid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid, side", (((9, 9), 4), ((5, 13), 4), ((5, 4, 7), 3)))
def test_no_token_is_without_one_to_see(grid, side):
    "A window of fill only would have nothing but -inf in its rows, and its gradient would be no number."
    attention = WindowAttention(len(grid), 4, 1, side, shifted=True)
    x = torch.randn(1, torch.Size(grid).numel(), 4, requires_grad=True)
    attention(x, grid).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in attention.parameters())
    mask = window_mask(grid, side, [side // 2 if n > side else 0 for n in grid])
    assert (mask == 0).any(-1).all()


def test_no_mask_where_none_is_needed():
    assert window_mask((8, 8), 4, (0, 0)) is None and window_mask((8, 8), 4, (2, 0)) is not None and window_mask((8, 7), 4, (0, 0)) is not None


def test_merging_and_expanding_are_inverse_where_they_can_be():
    "With linear layers that only carry on, and no normalisation, expanding brings back what merging laid side by side."
    merge, expand = PatchMerging(2, 2), PatchExpanding(2, 8, 2)
    merge.norm, expand.norm.forward = nn.Identity(), lambda x: x
    merge.mix = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        for layer in (merge.mix, expand.mix):
            layer.weight.copy_(torch.eye(8))
    x = torch.randn(2, 2, 6, 4)
    assert torch.equal(expand(merge(x)), x)


# Counts and weights of others

def test_swin_unet_has_the_parameters_of_the_official_code():
    "Counted on HuCaoFighting/Swin-Unet's SwinTransformerSys with 3 channels and 9 classes, its default options."
    with torch.device("meta"):
        assert count(create("swin_unet", in_channels=3, out_channels=9)) == 27_168_900


def randomised(network):
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # MONAI keeps PyTorch's 1e-5
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def swin_names(state):
    "MONAI's Swin weights under our names; its table, its blocks and its merging agree with ours, but for the neighbours' order in 2D."
    renamed = {}
    for key, weight in state.items():
        if "relative_position_index" in key or key.startswith("layers4.0.downsample"):
            continue  # the last merging has no place in our encoder
        if key.startswith("layers") and "downsample" in key and "d.weight" not in key and weight.shape[-1] % 4 == 0 and state["patch_embed.proj.weight"].ndim == 4:
            weight = weight.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2)
        key = re.sub(r"^layers(\d)\.0\.", lambda m: f"stages.{int(m[1]) - 1}.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.(\w+)", lambda m: f"merge.{m[1]}.{'mix' if m[2] == 'reduction' else 'norm'}", key)
        key = re.sub(r"^patch_embed\.(\w+)", lambda m: "patch_embedding.conv" if m[1] == "proj" else "patch_norm", key)
        key = key.replace("attn.relative_position_bias_table", "attention.table").replace("attn.qkv", "attention.qkv")
        renamed[key.replace("attn.proj", "attention.out").replace("mlp.linear1", "mlp.0").replace("mlp.linear2", "mlp.2")] = weight
    return renamed


@pytest.mark.parametrize("dims, patch, window, size", ((2, 4, 2, 64), (2, 4, 3, 96), (3, 2, 2, 32)))
def test_swin_encoder_with_monai_s_weights_gives_monai_s_maps(dims, patch, window, size):
    "Grids that the windows divide: elsewhere MONAI lets tokens see the zeros that fill a window up, and we do not."
    from monai.networks.nets.swin_unetr import SwinTransformer

    torch.manual_seed(0)
    theirs = randomised(SwinTransformer(
        2, 12, (window,) * dims, (patch,) * dims, (2, 2, 2, 2), (3, 6, 12, 24), patch_norm=True, spatial_dims=dims, downsample="mergingv2",
    ))
    ours = SwinEncoder(dims, 2, 12, window=window, patch=patch).eval()
    renamed = swin_names(theirs.state_dict())
    assert set(ours.state_dict()) - set(renamed) == {"norm.weight", "norm.bias"} and set(renamed) <= set(ours.state_dict())
    ours.load_state_dict(renamed, strict=False)
    expected = []
    for i in range(1, 5):
        getattr(theirs, f"layers{i}")[0].blocks[-1].register_forward_hook(lambda module, args, out: expected.append(out.movedim(-1, 1)))
    x = torch.randn(1, 2, *[size] * dims)
    with torch.no_grad():
        theirs(x)
        expected[-1] = nn.functional.layer_norm(expected[-1].movedim(1, -1), [96], eps=1e-6).movedim(-1, 1)
        for a, b in zip(ours(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def unetr_names(state, dims):
    "MONAI's UNETR weights under our names; where it joins (enlarged, skip), we join (skip, enlarged)."
    def conv_block(rest):
        number, what = re.match(r"(?:conv|norm)(\d)\.(.*)", rest).groups()
        kind = "conv" if rest.startswith("conv") else "norm"
        what = what.replace("conv.", "")
        return f"shortcut.{kind}.{what}" if number == "3" else f"residual.{int(number) - 1}.{kind}.{what}"

    renamed = {}
    for key, weight in state.items():
        if "norm_cross_attn" in key or "position_embeddings" in key:
            continue  # never used; and fixed in ours
        first, rest = key.split(".", 1)
        if first == "vit":
            rest = rest.replace("patch_embedding.patch_embeddings", "patch_embedding.conv").replace("attn.qkv", "attention.qkv")
            rest = rest.replace("attn.out_proj", "attention.out").replace("mlp.linear1", "mlp.0").replace("mlp.linear2", "mlp.2")
            name = "encoder.vit." + re.sub(r"^(blocks|norm)\.", r"transformer.\1.", rest)
        elif first == "encoder1":
            name = "encoder.image." + conv_block(rest.removeprefix("layer."))
        elif first.startswith("encoder"):
            place = f"encoder.enlarge.{int(first[-1]) - 2}."
            found = re.match(r"blocks\.(\d)\.(\d)\.(.*)", rest)
            if found is None:
                name = place + "0.weight"
            elif found[2] == "0":
                name = f"{place}{int(found[1]) + 1}.0.weight"
            else:
                name = f"{place}{int(found[1]) + 1}.1." + conv_block(found[3])
        elif first.startswith("decoder"):
            place = f"decoder.steps.{5 - int(first[-1])}."
            name = place + ("enlarge.weight" if rest.startswith("transp_conv") else "blocks." + conv_block(rest.removeprefix("conv_block.")))
            if re.search(r"conv_block\.conv[13]", key):
                half = weight.shape[1] // 2
                weight = torch.cat([weight[:, half:], weight[:, :half]], 1)
        else:
            name = "head." + rest.removeprefix("conv.conv.")
        renamed[name] = weight
    return renamed


@pytest.mark.parametrize("dims", (2, 3))
def test_unetr_with_monai_s_weights_gives_monai_s_logits(dims):
    "With the paper's ReLU in place of MONAI's leaky ReLU, our positions in its table, and states from its (other) blocks."
    from monai.networks.nets import UNETR

    torch.manual_seed(0)
    theirs = UNETR(2, 3, (48, 32, 32)[:dims], 4, 24, 96, 2, norm_name="batch", spatial_dims=dims, qkv_bias=True)
    ours = create("unetr", dims, 2, out_channels=3, width=24, heads=2, features=4).eval()
    randomised(theirs)
    for module in theirs.modules():
        if hasattr(module, "lrelu"):
            module.lrelu = nn.ReLU()
    grid = (3, 2, 2)[:dims]
    theirs.vit.patch_embedding.position_embeddings.data = ours.encoder.vit.positions(grid)[None]
    renamed = unetr_names(theirs.state_dict(), dims)
    assert set(renamed) == set(ours.state_dict())
    ours.load_state_dict(renamed)
    ours.encoder.vit.depths = [4, 7, 10, 12]
    x = torch.randn(2, 2, *(48, 32, 32)[:dims])
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    unused = sum(p.numel() for name, p in theirs.named_parameters() if "norm_cross_attn" in name)
    assert count(theirs) == count(ours) + unused + torch.Size(grid).numel() * 24


def test_unetr_takes_the_paper_s_states():
    encoder = UNETREncoder(2, width=12, depth=12, heads=2)
    assert encoder.vit.depths == [3, 6, 9, 12] and encoder.strides == [1, 2, 4, 8, 16]
    with torch.device("meta"):
        assert count(create("unetr", 3, out_channels=14)) == 92_647_854
    with pytest.raises(ValueError, match="at least 4"):
        create("unetr", width=12, depth=3)


def test_a_vit_s_weights_fit_into_a_unetr():
    options = {"width": 12, "depth": 4, "heads": 2}
    vit, network = create("vit", 3, **options), create("unetr", 3, **options)
    network.encoder.vit.load_state_dict(vit.state_dict())


# Sizes and contract

@pytest.mark.parametrize("name, options", (("swin_unet", {"width": 12, "window": 3}), ("unetr", {"width": 12, "depth": 4, "heads": 2})))
@pytest.mark.parametrize("size", ((16, 16, 16), (17, 40, 23)))
@pytest.mark.parametrize("dims", (2, 3))
def test_maps_of_the_decoder(dims, size, name, options):
    network, x = create(name, dims, out_channels=3, **options).eval(), torch.randn(1, 1, *size[:dims])
    found = network.decoder(network.encoder(x), x.shape[2:])
    assert network.decoder.skips and network.decoder.strides[-1] == 1 and found[-1].shape[2:] == x.shape[2:]
    for m, channels, stride in zip(found, network.decoder.channels, network.decoder.strides, strict=True):
        assert m.shape[1] == channels and all(a in (n // stride, -(-n // stride)) for a, n in zip(m.shape[2:], x.shape[2:]))
    assert torch.equal(network.head(found[-1]), network(x))


def test_heads_that_do_not_fit_are_one_clear_error():
    with pytest.raises(ValueError, match="heads"):
        create("swin_unet", width=10)


def test_shifts_let_news_out_of_a_window():
    torch.manual_seed(0)
    stage = SwinStage(2, 8, 2, depth=4, window=4)
    x = torch.randn(1, 8, 12, 12, requires_grad=True)
    stage(x)[0, :, 0, 0].sum().backward()
    reached = x.grad.abs().sum((0, 1)) > 0
    assert reached[:8, :8].all() and reached.sum() == 64  # 2 from the shifted last block, then 4, 6 and 8
    for block in stage.blocks:
        block.attention.shifted = False
    x.grad = None
    stage(x)[0, :, 0, 0].sum().backward()
    reached = x.grad.abs().sum((0, 1)) > 0
    assert reached[:4, :4].all() and reached.sum() == 16
