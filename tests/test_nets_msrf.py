"""MSRF-Net: the fusion block against its formula, edges against loops, who hears whom, deep supervision."""
import itertools

import pytest
import torch

from medssl_nb.nets.base import create
from medssl_nb.nets.msrf import PAIRS, DualScaleDenseFusion, ScaleExchange, channel_weights, edges_of, gradient_magnitude

both = pytest.mark.parametrize("dims", (2, 3))


def small(dims, **options):
    torch.manual_seed(0)
    return create("msrf_net", dims, out_channels=3, width=4, **options)


@both
def test_fusion_by_its_formula(dims):
    torch.manual_seed(0)
    block = DualScaleDenseFusion(dims, 4, 6, growth=3)
    high, low = torch.randn(2, 4, *(8, 6, 4)[:dims]), torch.randn(2, 6, *(4, 3, 2)[:dims])
    m1h, m1l = block.high[0](high), block.low[0](low)
    m2h = block.high[1](torch.cat([high, m1h, block.up[0](m1l)], 1))
    m2l = block.low[1](torch.cat([low, m1l, block.down[0](m1h)], 1))
    m3h = block.high[2](torch.cat([high, m1h, m2h, block.up[1](m2l)], 1))
    m3l = block.low[2](torch.cat([low, m1l, m2l, block.down[1](m2h)], 1))
    m4h = block.high[3](torch.cat([high, m1h, m2h, m3h, block.up[2](m3l)], 1))
    m4l = block.low[3](torch.cat([low, m1l, m2l, m3l, block.down[2](m3h)], 1))
    m5h = block.high[4](torch.cat([high, m1h, m2h, m3h, m4h, block.up[3](m4l)], 1))
    m5l = block.low[4](torch.cat([low, m1l, m2l, m3l, m4l, block.down[3](m4h)], 1))
    found = block(high, low)
    torch.testing.assert_close(found[0], high + 0.4 * m5h)
    torch.testing.assert_close(found[1], low + 0.4 * m5l)


def test_ten_blocks_as_in_the_figure():
    exchange = ScaleExchange(2, [4, 8, 16, 32])
    assert len(exchange.blocks) == 10 and [PAIRS.count(i) for i in range(4)] == [4, 2, 4, 0]
    maps = [torch.randn(1, 4 << i, 16 >> i, 16 >> i) for i in range(4)]
    for block in exchange.blocks:
        block.scale = 0
    for before, after in zip(maps, exchange(maps)):
        torch.testing.assert_close(after, 1.4 * before)  # blocks that add nothing leave x + 0.4 x


@both
def test_edges_by_loops(dims):
    masks = torch.randint(0, 3, (2, *(5, 4, 3)[:dims]), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(masks.shape)
    for place in itertools.product(*[range(n) for n in masks.shape]):
        for axis, step in itertools.product(range(1, masks.ndim), (-1, 1)):
            other = list(place)
            other[axis] += step
            if 0 <= other[axis] < masks.shape[axis] and masks[place] != masks[tuple(other)]:
                expected[place] = 1
    assert torch.equal(edges_of(masks), expected[:, None])
    assert not edges_of(torch.ones(1, *[4] * dims)).any()


@both
def test_gradient_magnitude_of_planes(dims):
    places = torch.stack(torch.meshgrid(*[torch.arange(6.0)] * dims, indexing="ij"))
    x = torch.stack([3 * places[0], 4 * places[1]])[None]  # two channels, slopes 3 and 4
    torch.testing.assert_close(gradient_magnitude(x), torch.full((1, 1, *[6] * dims), 5.0))
    flat = torch.zeros(1, 1, *[4] * dims, requires_grad=True)
    gradient_magnitude(flat).sum().backward()
    assert flat.grad.isfinite().all()


def test_channel_weights_see_means_alone():
    weigh, x = channel_weights(2, 32), torch.randn(2, 32, 4, 4)
    shuffled = x.flatten(2)[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    assert weigh(x).shape == (2, 32, 1, 1)
    torch.testing.assert_close(weigh(x), weigh(shuffled))


@both
def test_deep_supervision(dims):
    network, x = small(dims), torch.randn(2, 1, *(17, 24, 19)[:dims])
    answers, edges = network.answers(x)
    assert [a.shape for a in answers] == 3 * [(2, 3, *x.shape[2:])] and edges.shape == (2, 1, *x.shape[2:])
    (sum(a.square().mean() for a in answers) + edges.square().mean()).backward()
    assert all(p.grad is not None for p in network.parameters())
    network.zero_grad()
    network(x).square().mean().backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None}
    assert silent == {f"heads.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}  # the coarse answers' heads
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(x), network.all_logits(x)[-1]) and torch.equal(network.edges(x), network.answers(x)[1])


def test_the_last_answer_depends_on_the_edges():
    network, x = small(2).eval(), torch.randn(1, 1, 16, 16)
    network.decoder.last.weigh_edges[1].norm.bias.data.fill_(1)  # the ReLU behind is open
    before = network(x)
    network.shape.edge.bias.data += 3
    assert not torch.allclose(before, network(x)) and network.edges(x).mean() > 1


def test_the_untrained_network_does_not_explode():
    torch.manual_seed(0)
    network = create("msrf_net", width=8)
    maps = [torch.randn(2, c, 32 >> i, 32 >> i) for i, c in enumerate(network.encoder.channels)]
    assert all(after.std() < 3 for after in network.exchange(maps))


def test_parameters_of_the_default():
    with torch.device("meta"):
        network = create("msrf_net", in_channels=3)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    stream = lambda c, g: sum(9 * (c + n * g) * g + g for n in (0, 2, 3, 4)) + 9 * (c + 5 * g) * c + c
    block = lambda h: stream(h, h // 2) + stream(2 * h, h // 2) + 4 * (13 * (h // 2) ** 2 + 2 * (h // 2))
    assert parts["exchange"] == 4 * block(32) + 2 * block(64) + 4 * block(128) == 17_129_728
    assert sum(parts.values()) == 19_632_331  # placeholder
