"""Attention, Transformer, ViT and its cheaper relatives: closed forms, slow references, PyTorch's and MONAI's outputs, published counts."""
import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl_nb.nets.base import create
from medssl_nb.nets.efficient_attention import (
    AxialAttention, AxialViT, PerformerAttention, SwitchMLP, SwitchViT, load_balance, log_features, orthogonal_projection,
    redraw_features, take_seats,
)
from medssl_nb.nets.inspection import multiply_adds
from medssl_nb.nets.transformer import (
    MLP, Attention, PatchEmbedding, Transformer, TransformerBlock, ViT, attention_weights, map_of, sincos_positions, tokens_of,
)

dims_2_3 = pytest.mark.parametrize("dims", (2, 3))
TINY = {"width": 12, "depth": 3, "heads": 2, "patch": 4}
SPACE = (16, 12, 8)


def count(network):
    return sum(p.numel() for p in network.parameters())


def make(name, dims=2, **options):
    torch.manual_seed(0)
    return create(name, dims, **{**TINY, **options})


def images(dims, channels=1, batch=2):
    return torch.randn(batch, channels, *SPACE[:dims], generator=torch.Generator().manual_seed(1))


def tokens(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Attention

@pytest.mark.parametrize("heads", (1, 2, 6))
def test_attention_is_pytorch_s(heads):
    torch.manual_seed(0)
    ours, theirs = Attention(12, heads), nn.MultiheadAttention(12, heads, batch_first=True)
    nn.init.normal_(ours.qkv.bias)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias,
    })
    x, mask = tokens(3, 7, 12), torch.full((7, 7), -torch.inf).triu(1)
    for bias in (None, mask, tokens(7, 7, seed=3)):
        answer, weights = theirs(x, x, x, attn_mask=bias, average_attn_weights=False)
        torch.testing.assert_close(ours(x, bias), answer, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.weights(x, bias), weights, rtol=1e-5, atol=1e-6)


def test_a_bias_for_each_head():
    torch.manual_seed(0)
    attention, x = Attention(12, 2), tokens(2, 5, 12)
    bias = tokens(2, 5, 5, seed=3)  # heads, N, N: Swin's relative positions
    by_weights = (attention.weights(x, bias) @ attention.split(x)[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, bias), attention.out(by_weights))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x, bias).isfinite().all() and attention.weights(x, bias).dtype == torch.float32


def test_heads():
    assert Attention(384).heads == 6 and Attention(32).heads == 1 and count(Attention(12, 2)) == count(Attention(12, 3)) == 4 * 144 + 48
    assert Attention(12, bias=False).qkv.bias is None
    with pytest.raises(ValueError, match="5 heads cannot share 12 channels"):
        Attention(12, 5)


@pytest.mark.parametrize("make_one", (Attention, PerformerAttention))
def test_attention_does_not_know_the_order(make_one):
    torch.manual_seed(0)
    attention, x, order = make_one(12, 2), tokens(2, 9, 12), torch.tensor([4, 2, 8, 0, 1, 3, 7, 5, 6])
    torch.testing.assert_close(attention(x)[:, order], attention(x[:, order]), rtol=1e-5, atol=1e-6)


# Blocks

def test_block_by_hand():
    torch.manual_seed(0)
    block, x = TransformerBlock(12, 2), tokens(2, 5, 12)
    norm = lambda t: (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    x1 = x + block.attention(norm(x))
    hidden = norm(x1) @ block.mlp[0].weight.T
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(block(x), x1 + gelu @ block.mlp[2].weight.T)


def test_block_takes_other_modules_and_hands_on_what_attention_must_know():
    class Told(nn.Module):
        def forward(self, x, secret):
            return secret + 0 * x

    block, x = TransformerBlock(4, attention=Told(), mlp=nn.Identity()), tokens(1, 3, 4)
    torch.testing.assert_close(block(x, secret=5.0), x + 5 + block.norm2(x + 5))
    kinds = Transformer(4, 3, mlp=lambda i: nn.Identity() if i == 1 else None).blocks
    assert [type(b.mlp) for b in kinds] == [MLP, nn.Identity, MLP]


@dims_2_3
def test_tokens_and_maps(dims):
    grid = (2, 3, 4)[:dims]
    x = tokens(2, 5, *grid)
    assert torch.equal(map_of(tokens_of(x), grid), x)
    assert torch.equal(tokens_of(x)[0, 1], x[(0, slice(None), *[0] * (dims - 1), 1)])  # the last axis runs fastest


@dims_2_3
def test_patches_see_their_own_pixels_and_padding_repeats_the_edge(dims):
    torch.manual_seed(0)
    embedding, space = PatchEmbedding(dims, 2, 6, 4), (9, 8, 6)[:dims]
    x = tokens(1, 2, *space)
    found = embedding(x)
    assert found.shape == (1, 6, *[-(-n // 4) for n in space])
    edge = x[:, :, 8:].expand(-1, -1, 4, *space[1:])  # row 8, four times
    torch.testing.assert_close(found[:, :, 2:], embedding(edge))
    first = x[(0, slice(None), *[slice(4)] * dims)]
    torch.testing.assert_close(found[(0, slice(None), *[0] * dims)], embedding.conv.weight.flatten(1) @ first.flatten())


@pytest.mark.parametrize("grid, width", (((5,), 6), ((4, 3), 16), ((2, 3, 4), 14), ((3, 3), 3), ((2, 2, 2), 5)))
def test_positions_by_loops(grid, width):
    found, axes = sincos_positions(grid, width), len(grid)
    waves = width // (2 * axes)
    assert found.shape == (math.prod(grid), width) and found.dtype == torch.float32
    for n, place in enumerate(torch.cartesian_prod(*[torch.arange(g) for g in grid]).view(-1, axes).tolist()):
        expected = [f(p / 10_000 ** (k / waves)) for p in place for f in (math.sin, math.cos) for k in range(waves)]
        expected += [0.0] * (width - len(expected))
        torch.testing.assert_close(found[n], torch.tensor(expected), rtol=1e-4, atol=1e-5)


# ViT

def test_published_counts():
    with torch.device("meta"):
        base, small, huge = ViT(2, 3, 768, class_token=True), create("vit", in_channels=3, class_token=True), ViT(2, 3, 1280, 32, 16, 14, class_token=True)
    assert count(base) + 197 * 768 == 85_798_656  # learned positions of 14 x 14 patches and the class token
    assert count(small) + 197 * 384 == 21_665_664
    assert count(huge) + 257 * 1280 == 630_764_800  # ViT-H/14 without its classifier
    for dims in (2, 3):
        w, d, p = 12, 3, 4
        assert count(make("vit", dims)) == p**dims * w + w + d * (12 * w * w + 13 * w) + 2 * w


def test_vit_maps():
    assert ViT(width=12, depth=12).depths == [3, 6, 9, 12] and ViT(width=12, depth=1).depths == [1] and ViT(width=12, depth=6).depths == [2, 3, 5, 6]
    encoder = make("vit", depth=8, class_token=True)
    assert encoder.channels == [12] * 4 and encoder.strides == [4] * 4 and encoder.smallest == 4
    x = images(2)
    embedded, grid = encoder.patches(x)
    states = encoder.transformer.states(encoder.with_class_token(embedded))
    states[-1] = encoder.transformer.norm(states[-1])
    for m, depth in zip(encoder(x), (2, 4, 6, 8)):
        assert torch.equal(m, map_of(states[depth - 1][:, 1:], grid))


def monai_names(theirs, ours):
    "The weights of MONAI's ViT under our names; its queries, keys and values have no bias: 0 in ours."
    renamed = {k: torch.zeros_like(v) for k, v in ours.state_dict().items() if k.endswith("qkv.bias")}
    for key, weight in theirs.state_dict().items():
        key = key.replace("patch_embedding.patch_embeddings.", "patch_embedding.conv.").replace("cls_token", "class_token")
        key = re.sub(r"^(blocks|norm)\.", r"transformer.\1.", key)
        key = key.replace(".attn.out_proj.", ".attention.out.").replace(".attn.qkv.", ".attention.qkv.")
        renamed[key.replace(".mlp.linear1.", ".mlp.0.").replace(".mlp.linear2.", ".mlp.2.")] = weight
    positions = renamed.pop("patch_embedding.position_embeddings")
    unused = [key for key in renamed if "norm_cross_attn" in key or "classification_head" in key]  # not on the way to the tokens
    for key in unused:
        renamed.pop(key)
    ours.load_state_dict(renamed)
    return positions[0]


@pytest.mark.parametrize("kind", ("learnable", "sincos"))
@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # in MONAI's sines and cosines
@dims_2_3
def test_vit_with_monai_s_weights_gives_monai_s_tokens(dims, kind):
    from monai.networks.nets import ViT as MonaiViT

    torch.manual_seed(0)
    space = SPACE[:dims]
    theirs = MonaiViT(2, space, 4, hidden_size=24, mlp_dim=96, num_layers=4, num_heads=2, pos_embed_type=kind, spatial_dims=dims).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)  # no norm stays 1 and 0
    ours = ViT(dims, 2, 24, 4, heads=2, patch=4)
    positions = monai_names(theirs, ours)
    ours.positions = lambda grid, device=None: positions
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5  # MONAI's; the ViT's own code has 1e-6
    x = images(dims, 2)
    last, states = theirs(x)
    for ours_, theirs_ in zip(ours(x), [*states[:3], last]):
        torch.testing.assert_close(tokens_of(ours_), theirs_, rtol=1e-5, atol=1e-5)
    extra = sum(p.numel() for n, p in theirs.named_parameters() if "norm_cross_attn" in n)
    learned = math.prod(n // 4 for n in space) * 24 if theirs.patch_embedding.position_embeddings.requires_grad else 0
    assert extra == 4 * 2 * 24 and learned == (math.prod(n // 4 for n in space) * 24 if kind == "learnable" else 0)
    stored = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert stored == count(ours) - 4 * 3 * 24 + extra + learned


def test_vit_with_monai_s_class_token():
    from monai.networks.nets import ViT as MonaiViT

    torch.manual_seed(0)
    theirs = MonaiViT(1, (16, 12), 4, hidden_size=24, mlp_dim=96, num_layers=2, num_heads=2, spatial_dims=2, classification=True, num_classes=5, post_activation="none")
    nn.init.normal_(theirs.cls_token)
    ours = ViT(2, 1, 24, 2, heads=2, patch=4, class_token=True)
    positions = monai_names(theirs, ours)
    ours.positions = lambda grid, device=None: positions
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    class_token = ours.encode(ours.patches(images(2))[0])[:, 0]
    torch.testing.assert_close(theirs.classification_head(class_token), theirs(images(2))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("vit", "performer", "switch"))
def test_a_subset_of_patches_is_encoded_as_if_alone(name):
    encoder = make(name, class_token=True).eval()
    embedded, grid = encoder.patches(images(2))
    everything = encoder.encode(embedded)
    assert everything.shape == (2, 13, 12)
    torch.testing.assert_close(map_of(everything[:, 1:], grid), encoder(images(2))[-1])
    visible = encoder.encode(embedded[:, [1, 5, 7]])
    assert visible.shape == (2, 4, 12)
    changed = embedded.clone()
    changed[:, [0, 2, 3]] += 1  # hidden ones do not matter
    torch.testing.assert_close(encoder.encode(changed[:, [1, 5, 7]]), visible)


@pytest.mark.parametrize("name", ("vit", "performer", "axial_attention", "switch"))
@dims_2_3
def test_attention_weights_make_the_map(name, dims):
    "Values mixed with the weights of a one-block encoder give its map: the picture shows what happens."
    encoder, x = make(name, dims, depth=2), images(dims)
    embedded, grid = encoder.patches(x)
    block = encoder.transformer.blocks[0]
    weights = attention_weights(encoder, x, 0)
    assert weights.shape == (2, 2, embedded.shape[1], embedded.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    values = block.attention.split(block.norm1(embedded))[2]
    after = embedded + block.attention.out((weights @ values).transpose(1, 2).flatten(2))
    after = after + block.mlp(block.norm2(after))
    torch.testing.assert_close(after, encoder.transformer.states(embedded, **encoder.known(grid))[0], rtol=1e-4, atol=1e-5)
    last = encoder.transformer.blocks[1]
    expected = last.attention.weights(last.norm1(after), **encoder.known(grid))
    torch.testing.assert_close(attention_weights(encoder, x), expected, rtol=1e-4, atol=1e-5)


def test_positions_tell_the_order_apart():
    encoder, x = make("vit"), images(2)
    shuffled = x.flip(2)
    with_positions = encoder(x)[-1].flatten(2).mean(-1), encoder(shuffled)[-1].flatten(2).mean(-1)
    assert not torch.allclose(*with_positions, atol=1e-3)
    x = x.repeat_interleave(4, 2)[:, :, ::4].roll(0, 2)
    encoder.positions = lambda grid, device=None: torch.zeros(1, 12)
    patches = tokens_of(encoder.patch_embedding(x))
    order = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.encode(patches[:, order]), encoder.encode(patches)[:, order], rtol=1e-4, atol=1e-5)


# Performer

@pytest.mark.parametrize("orthogonal", (True, False))
def test_random_features_are_unbiased(orthogonal):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.tensor([0.5, -0.3, 0.2, 0.4]).double(), torch.tensor([0.1, 0.6, -0.5, 0.3]).double()
    draw = orthogonal_projection if orthogonal else lambda m, d, generator: torch.randn(m, d, generator=generator)
    estimates = torch.stack([
        log_features(q, w).exp() @ log_features(k, w).exp() for w in (draw(6, 4, generator).double() for _ in range(4000))
    ])
    standard_error = estimates.std() / 4000**0.5
    assert (estimates.mean() - (q @ k).exp()).abs() < 4 * standard_error and standard_error < 0.02


def test_orthogonal_features_have_the_smaller_error():
    generator = torch.Generator().manual_seed(0)
    q, k = tokens(8) * 0.3, tokens(8, seed=3) * 0.3
    errors = []
    for draw in (orthogonal_projection, lambda m, d, generator: torch.randn(m, d, generator=generator)):
        found = torch.stack([log_features(q, w).exp() @ log_features(k, w).exp() for w in (draw(8, 8, generator) for _ in range(3000))])
        errors.append((found - (q @ k).exp()).square().mean().item())
    plain = (((q + k).square().sum().exp() - 1) / 8 * (2 * q @ k).exp()).item()
    assert errors[1] == pytest.approx(plain, rel=0.35) and errors[0] < 0.9 * errors[1]


def test_projection_is_orthogonal_and_each_row_normal():
    w = orthogonal_projection(20, 8, torch.Generator().manual_seed(0))
    assert w.shape == (20, 8)
    for block in (w[:8], w[8:16], w[16:]):
        off = block @ block.T
        assert off.fill_diagonal_(0).abs().max() < 1e-4
    rows = torch.stack([orthogonal_projection(4, 4, torch.Generator().manual_seed(s)) for s in range(4000)])
    for row in rows.unbind(1):
        assert row.mean(0).abs().max() < 0.08 and (row.T @ row / 4000 - torch.eye(4)).abs().max() < 0.12
        assert ((row**4).mean(0) - 3).abs().max() < 0.6  # the fourth moment of a normal number


def test_performer_comes_close_to_exact_attention():
    torch.manual_seed(0)
    exact, x = Attention(16, 2), 0.5 * tokens(2, 30, 16)
    errors = []
    for features in (16, 256, 4096):
        cheap = PerformerAttention(16, 2, features)
        cheap.load_state_dict(exact.state_dict(), strict=False)
        errors.append((cheap(x) - exact(x)).abs().mean().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01


def test_performer_survives_what_would_overflow():
    torch.manual_seed(0)
    cheap, x = PerformerAttention(16, 2, 64), 100 * tokens(1, 20, 16)
    x.requires_grad_()
    out = cheap(x)
    out.square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert cheap(x).isfinite().all()
    assert cheap.bfloat16()(0.01 * x.bfloat16()).isfinite().all()


def test_performer_s_features_are_a_seeded_buffer():
    a, b = make("performer", features=16), make("performer", features=16)
    projections = [block.attention.projection for block in a.transformer.blocks]
    assert all(torch.equal(p, block.attention.projection) for p, block in zip(projections, b.transformer.blocks))
    assert projections[0].shape == (16, 6) and not torch.equal(projections[0], projections[1])
    assert count(a) == count(make("vit")) and "transformer.blocks.0.attention.projection" in a.state_dict()
    before = a(images(2))[-1]
    redraw_features(a, torch.Generator().manual_seed(5))
    redraw_features(b, torch.Generator().manual_seed(5))
    assert not torch.allclose(before, a(images(2))[-1]) and torch.equal(a(images(2))[-1], b(images(2))[-1])
    with pytest.raises(ValueError, match="cannot add a bias"):
        PerformerAttention(12, 2)(tokens(1, 3, 12), torch.zeros(3, 3))


def test_cost_grows_with_pairs_with_lines_or_with_tokens():
    def attention_only(n, name):
        with torch.device("meta"):
            networks = [create(name, width=12, depth=d, heads=1, patch=4) for d in (1, 2)]
        costs = [multiply_adds(network, (2 * n, 8)) for network in networks]  # a grid of n / 2 x 2 patches
        return costs[1] - costs[0] - 12 * n * 12**2

    assert attention_only(50, "vit") == 2 * 50**2 * 12
    assert attention_only(50, "axial_attention") == 2 * 50 * 25 * 12  # the second block looks along the first axis
    assert attention_only(50, "performer") == 4 * 50 * 256 * 12 + 50 * 256


# Axial attention

@dims_2_3
@pytest.mark.parametrize("axis", (0, 1, -1))
def test_axial_attention_by_loops(dims, axis):
    torch.manual_seed(0)
    grid = (3, 4, 2)[:dims]
    axial, x = AxialAttention(8, 2, axis), tokens(2, math.prod(grid), 8)
    cube, found = x.view(2, *grid, 8), axial(x, grid).view(2, *grid, 8)
    other = [i for i in range(dims) if i != axis % dims]
    for place in torch.cartesian_prod(*[torch.arange(grid[i]) for i in other]).view(-1, dims - 1).tolist():
        index = [slice(None)] * (dims + 1)
        for i, p in zip(other, place):
            index[i + 1] = p
        torch.testing.assert_close(found[tuple(index)], Attention.forward(axial, cube[tuple(index)]))


@dims_2_3
def test_axial_blocks_see_a_line_a_plane_everything(dims):
    n = 4
    for depth in (1, 2, 3):
        torch.manual_seed(0)
        encoder = AxialViT(dims, width=6, depth=depth, heads=1, patch=1).double()
        x = torch.randn(1, 1, *[n] * dims, dtype=torch.double, requires_grad=True)
        middle = encoder(x)[-1][(0, slice(None), *[1] * dims)]
        seen = torch.autograd.grad(middle @ torch.arange(1.0, 7).double(), x)[0][0, 0] != 0
        line = torch.zeros([n] * dims, dtype=torch.bool)
        line[(*[1] * max(0, dims - depth), ...)] = True
        assert torch.equal(seen, line)


def test_axial_is_a_vit_in_size_and_says_what_it_cannot():
    assert count(make("axial_attention")) == count(make("vit"))
    with pytest.raises(ValueError, match="cannot encode a subset"):
        make("axial_attention").encode(tokens(1, 3, 12))
    with pytest.raises(ValueError, match="no option 'class_token'"):
        make("axial_attention", class_token=True)


# Switch

def test_load_balance_closed_forms():
    assert load_balance(torch.full((2, 6, 3), 1 / 3), torch.arange(12).view(2, 6) % 3).item() == pytest.approx(1)
    assert load_balance(torch.eye(5)[[1] * 7], torch.full((7,), 1)).item() == 5
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]])  # f = 2/3, 1/3; P = 1.4/3, 1.6/3
    assert load_balance(p, p.argmax(1)).item() == pytest.approx(2 * (2 * 1.4 + 1.6) / 9)


def test_seats():
    choice = torch.tensor([[2, 0, 2, 2, 0, 1], [1, 1, 1, 1, 1, 1]])
    assert take_seats(choice, 3, 2).tolist() == [[4, 0, 5, 6, 1, 2], [2, 3, 6, 6, 6, 6]]


@pytest.mark.parametrize("capacity", (0.5, 1.0, 4.0))
def test_switch_by_loops(capacity):
    torch.manual_seed(0)
    layer, x = SwitchMLP(6, 10, 4, capacity), tokens(3, 9, 6)
    nn.init.normal_(layer.experts.first_bias)
    found, probabilities, seats = layer(x), layer.route(x), math.ceil(9 * capacity / 4)
    for image in range(3):
        guests = [0] * 4
        for n in range(9):
            gate, e = probabilities[image, n].max(0)
            guests[e] += 1
            hidden = F.gelu(x[image, n] @ layer.experts.first[e] + layer.experts.first_bias[e, 0])
            expected = gate * (hidden @ layer.experts.second[e] + layer.experts.second_bias[e, 0])
            torch.testing.assert_close(found[image, n], expected if guests[e] <= seats else torch.zeros(6))
    assert (found == 0).all(-1).any() == (capacity < 2)  # someone came late


def test_one_expert_with_room_is_an_mlp():
    torch.manual_seed(0)
    layer, mlp, x = SwitchMLP(6, 10, 1, 1.0), MLP(6, 10), tokens(2, 5, 6)
    with torch.no_grad():
        layer.experts.first[0], layer.experts.second[0] = mlp[0].weight.T, mlp[2].weight.T
    torch.testing.assert_close(layer(x), mlp(x))
    assert layer.balance == 1


def test_router_learns_through_the_gate_and_through_the_balance():
    encoder = make("switch", depth=4, experts=3)
    layers = [m for m in encoder.modules() if isinstance(m, SwitchMLP)]
    assert [isinstance(b.mlp, SwitchMLP) for b in encoder.transformer.blocks] == [False, True, False, True]
    weight = tokens(2, 12, 4, 3)
    (encoder(images(2))[-1] * weight).sum().backward()
    assert all(m.router.weight.grad.abs().max() > 0 for m in layers)
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.zero_grad()
    encoder(images(2))
    assert encoder.balance.item() == pytest.approx(sum(m.balance.item() for m in layers))
    encoder.balance.backward()
    assert all(m.router.weight.grad.abs().max() > 0 for m in layers)


def test_balancing_balances():
    torch.manual_seed(0)
    layer, x = SwitchMLP(6, 10, 4), tokens(4, 50, 6)
    x[..., 0] = 1
    with torch.no_grad():
        layer.router.weight[2, 0] = 3  # all want expert 2
    share = lambda: torch.bincount(layer.route(x).argmax(-1).flatten(), minlength=4).max().item() / 200
    before, optimiser = share(), torch.optim.Adam(layer.router.parameters(), lr=0.05)
    for _ in range(150):
        layer(x)
        optimiser.zero_grad()
        layer.balance.backward()
        optimiser.step()
    assert before > 0.95 and share() < 0.45 and layer.balance < 1.1


def test_switch_can_be_copied_after_a_forward_and_counts():
    encoder = make("switch", experts=3)
    encoder(images(2))
    again = copy.deepcopy(encoder)
    again(images(2))
    assert torch.equal(again.balance, encoder.balance)
    w = 12
    one_mlp = 8 * w * w + 5 * w
    assert count(encoder) == count(make("vit")) + 2 * one_mlp + 3 * w  # depth 3: one Switch block, two more experts and a router without bias
    with pytest.raises(ValueError, match="is none"):
        SwitchViT(width=12, depth=1)
