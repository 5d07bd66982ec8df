"""Recurrent cells against PyTorch's, the encoders made of them, and the maps that organise themselves."""
import pytest
import torch
from torch import nn

from medssl_nb.nets import create
from medssl_nb.nets.recurrent import BothWays, GRUCell, LSTMCell, RecurrentEncoder, RNNCell, Sweep, read
from medssl_nb.nets.self_organising import (
    GrowingGraph, GrowingNeuralGas, SelfOrganisingMap, connected_parts, follow, topographic_error,
)

PAIRS = ((RNNCell, nn.RNNCell, nn.RNN), (LSTMCell, nn.LSTMCell, nn.LSTM), (GRUCell, nn.GRUCell, nn.GRU))
pairs = pytest.mark.parametrize("ours, cell, network", PAIRS)


# Cells

@pairs
def test_one_step_is_pytorch_s_with_its_gradient(ours, cell, network):
    torch.manual_seed(0)
    theirs, mine = cell(5, 7), ours(5, 7)
    mine.load_state_dict(theirs.state_dict())
    x, state = torch.randn(3, 5), [torch.randn(3, 7) for _ in mine.start(3)]
    found, expected = mine(x, tuple(state)), theirs(x, tuple(state) if len(state) == 2 else state[0])
    for a, b in zip(found, expected if isinstance(expected, tuple) else (expected,)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    found[0].square().sum().backward()
    (expected[0] if isinstance(expected, tuple) else expected).square().sum().backward()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)


@pairs
@pytest.mark.parametrize("layers", (1, 2))
def test_sequences_are_pytorch_s_both_ways(ours, cell, network, layers):
    torch.manual_seed(0)
    theirs = network(5, 6, num_layers=layers, bidirectional=True, batch_first=True)
    stack = nn.Sequential(*[BothWays(ours, 12 if i else 5, 6) for i in range(layers)])
    for i, layer in enumerate(stack):
        for part, ending in ((layer.onwards, f"_l{i}"), (layer.backwards, f"_l{i}_reverse")):
            part.load_state_dict({name: getattr(theirs, name + ending) for name in part.state_dict()})
    x = torch.randn(3, 11, 5)
    torch.testing.assert_close(stack(x), theirs(x)[0], rtol=0, atol=1e-6)


@pairs
def test_cells_start_as_pytorch_s_but_for_the_forget_gate(ours, cell, network):
    torch.manual_seed(0)
    theirs = cell(5, 9)
    torch.manual_seed(0)
    mine = ours(5, 9)
    kept = [i for i in range(len(mine.bias_ih)) if ours is not LSTMCell or not 9 <= i < 18]
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        assert p.shape == q.shape and torch.equal(p[kept] if "bias" in name else p, q[kept] if "bias" in name else q)


def test_the_forget_bias_is_where_it_says():
    cell = LSTMCell(3, 4, forget_bias=2.5)
    assert (cell.bias_ih + cell.bias_hh)[4:8].eq(2.5).all()
    assert not (cell.bias_ih + cell.bias_hh)[[0, 3, 8, 15]].eq(2.5).any()


def test_gates_by_hand():
    "One unit whose sums are given: the LSTM's and the GRU's equations in plain numbers."
    sigmoid = lambda v: 1 / (1 + 2.718281828459045 ** -v)
    tanh = lambda v: 2 * sigmoid(2 * v) - 1
    lstm = LSTMCell(1, 1)
    h, c = lstm.step(torch.tensor([[1.0, 2.0, 0.5, -1.0]]) - lstm.recall(torch.zeros(1, 1)), (torch.zeros(1, 1), torch.tensor([[3.0]])))
    expected = sigmoid(2.0) * 3 + sigmoid(1.0) * tanh(0.5)
    assert c.item() == pytest.approx(expected, rel=1e-5) and h.item() == pytest.approx(sigmoid(-1.0) * tanh(expected), rel=1e-5)
    gru = GRUCell(1, 1)
    for p in gru.parameters():
        nn.init.constant_(p, 0.5)
    h = gru(torch.tensor([[2.0]]), (torch.tensor([[-1.0]]),))[0]
    gate, old = sigmoid(0.5 * 2 + 0.5 - 0.5 + 0.5), -0.5 + 0.5
    assert h.item() == pytest.approx(gate * -1 + (1 - gate) * tanh(0.5 * 2 + 0.5 + gate * old), rel=1e-5)


def test_reading_backwards_is_reading_the_turned_sequence():
    torch.manual_seed(0)
    cell, x = GRUCell(3, 4), torch.randn(2, 7, 3)
    torch.testing.assert_close(read(cell, x, backwards=True), read(cell, x.flip(1)).flip(1))
    later = x.clone()
    later[:, 4] += 1
    assert torch.equal(read(cell, later)[:, :4], read(cell, x)[:, :4])
    assert torch.equal(read(cell, later, backwards=True)[:, 5:], read(cell, x, backwards=True)[:, 5:])


def test_states_stay_in_float32_under_bfloat16_and_in_double_for_double():
    for cell in (LSTMCell(3, 4), GRUCell(3, 4)):
        with torch.autocast("cpu", torch.bfloat16):
            assert all(s.dtype == torch.float32 for s in cell(torch.randn(2, 3)))
        assert read(cell.double(), torch.randn(2, 5, 3).double()).dtype == torch.float64


def test_an_open_forget_gate_lets_the_gradient_through():
    "Thirty steps back, five seeds: nothing with the bias 0, a good part with the bias 3."
    reached = {}
    for bias in (0.0, 3.0):
        for seed in range(5):
            torch.manual_seed(seed)
            cell, x = LSTMCell(8, 32, forget_bias=bias), torch.randn(4, 31, 8, requires_grad=True)
            last = read(cell, x)[:, -1]
            gradient, = torch.autograd.grad((last * torch.randn_like(last)).sum(), x)
            reached.setdefault(bias, []).append((gradient[:, 0].norm() / gradient[:, -1].norm()).item())
    assert max(reached[0.0]) < 1e-5 and min(reached[3.0]) > 0.02


# Encoders

@pytest.mark.parametrize("name, cell", (("lstm", LSTMCell), ("gru", GRUCell)))
@pytest.mark.parametrize("dims", (2, 3))
def test_a_sweep_is_a_reading_of_every_line(name, cell, dims):
    torch.manual_seed(0)
    sweep, x = Sweep(cell, 3, 4), torch.randn(2, 3, *(5, 4, 3)[:dims])
    out = sweep(x)
    assert out.shape == (2, 8, *x.shape[2:])
    flat_x, flat_out = x.flatten(3), out.flatten(3)
    for position in range(flat_x.shape[3]):
        line = BothWays.forward(sweep, flat_x[:, :, :, position].transpose(1, 2))
        torch.testing.assert_close(flat_out[:, :, :, position].transpose(1, 2), line)
    assert isinstance(create(name, dims, width=4).sweeps[0].onwards, cell)


@pytest.mark.parametrize("patch", (1, 4, 5, 8))
@pytest.mark.parametrize("dims", (2, 3))
def test_encoder_maps_of_any_size_and_patch(dims, patch):
    encoder = create("gru", dims, 2, width=4, layers=2, patch=patch)
    x = torch.randn(2, 2, *(19, 16, 9)[:dims])
    stem, swept = encoder(x)
    assert (encoder.channels, encoder.strides, encoder.smallest) == ([4, 8], [patch, patch], patch)
    assert stem.shape == (2, 4, *[-(-n // patch) for n in x.shape[2:]]) and swept.shape == (2, 8, *stem.shape[2:])


@pytest.mark.parametrize("patch", (1, 4, 5, 8))
def test_the_stem_sees_every_pixel_in_one_patch(patch):
    torch.manual_seed(0)
    encoder = create("lstm", width=3, patch=patch, norm="none")
    encoder.stem.activation = nn.Identity()
    x = torch.randn(1, 1, 2 * patch + patch // 2, 3 * patch, requires_grad=True)
    stem = encoder(x)[0]
    assert torch.autograd.grad(stem.square().sum(), x, retain_graph=True)[0].ne(0).all()
    one, = torch.autograd.grad(stem[:, :, 1, 2].square().sum(), x)
    inside = torch.zeros_like(one, dtype=torch.bool)
    inside[:, :, patch : 2 * patch, 2 * patch : 3 * patch] = True
    assert torch.equal(one.ne(0), inside)


def test_encoder_counts():
    w, patch = 6, 4
    stem = patch * patch * w + 2 * w  # and a scale and a shift
    cell = lambda gates, inputs: gates * w * (inputs + w + 2)
    for name, gates in (("lstm", 4), ("gru", 3)):
        one, two = (sum(p.numel() for p in create(name, width=w, patch=patch, layers=n).parameters()) for n in (1, 2))
        assert one == stem + 2 * cell(gates, w) and two - one == 2 * cell(gates, 2 * w)


def test_bad_layers_and_patch():
    for wrong in ({"layers": 0}, {"patch": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            RecurrentEncoder(GRUCell, **wrong)


# Self-organisation

def test_a_step_of_the_map_by_hand():
    som = SelfOrganisingMap(2, 2, 1)
    som.weights = torch.tensor([[[0.0], [4.0]], [[8.0], [12.0]]])
    som.step(torch.tensor([5.0]), rate=0.5, radius=1.0)  # the winner stands at 4; two units are one step away, one is sqrt(2)
    near, far = 0.5 * 2.718281828**-0.5, 0.5 * 2.718281828**-1
    expected = [[0 + near * 5], [4 + 0.5 * 1], [8 + far * -3], [12 + near * -7]]
    torch.testing.assert_close(som.weights.flatten(0, 1), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_map_keeps_the_order_of_a_square_and_a_radius_of_nothing_does_not():
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        square = torch.rand(1000, 2, generator=generator)
        som = SelfOrganisingMap(8, 8, 2, generator)
        assert topographic_error(som, square) > 0.6
        som.fit(square, 2000, generator=generator)
        assert topographic_error(som, square) < 0.1
        assert torch.cdist(square, som.weights.flatten(0, 1)).amin(1).mean() < 0.08  # 64 units an eighth apart: 0.048 at best
        alone = SelfOrganisingMap(8, 8, 2, generator).fit(square, 2000, radius=(0.1, 0.1), generator=generator)
        assert topographic_error(alone, square) > 0.5


def test_topographic_error_by_hand():
    som = SelfOrganisingMap(1, 3, 1)
    som.weights = torch.tensor([[[0.0], [9.0], [1.0]]])  # 0 and 1 are close in the data, and two apart on the grid
    assert topographic_error(som, torch.tensor([[0.4], [0.6], [6.0], [8.0]])) == 0.5
    assert som.nearest(torch.tensor([[0.4]]), 3).tolist() == [[0, 2, 1]]


def test_the_same_generator_makes_the_same_map_and_graph():
    samples = torch.rand(100, 3, generator=torch.Generator().manual_seed(5))
    for make in (lambda g: SelfOrganisingMap(3, 4, 3, g), lambda g: GrowingNeuralGas(3, interval=20, generator=g)):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        first, second = (make(g).fit(samples, 200, generator=g) for g in generators)
        assert torch.equal(first.weights, second.weights) and first.weights.shape[-1] == 3


def test_the_graph_follows_a_sample():
    graph = GrowingGraph(torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]]))
    graph.ages[0, 2] = graph.ages[2, 0] = 4
    follow(graph, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(graph.weights, torch.tensor([[0.0, 0.2], [1.0, 0.0], [4.97, 4.976]]))
    assert graph.errors.tolist() == [1, 0, 0]
    assert graph.ages.tolist() == [[-1, 0, 5], [0, -1, -1], [5, -1, -1]]
    graph.prune(oldest=4)
    assert len(graph.weights) == 2 and graph.ages.tolist() == [[-1, 0], [0, -1]]


def test_the_graph_grows_at_its_largest_error():
    graph = GrowingGraph(torch.tensor([[0.0], [2.0], [6.0], [9.0]]))
    for a, b in ((0, 1), (1, 2), (2, 3)):
        graph.ages[a, b] = graph.ages[b, a] = 3
    graph.errors = torch.tensor([1.0, 3.0, 8.0, 2.0])
    graph.grow(split=0.5)
    assert graph.weights.flatten().tolist() == [0, 2, 6, 9, 4] and graph.errors.tolist() == [1, 1.5, 4, 2, 4]
    assert (graph.ages >= 0).nonzero().tolist() == [[0, 1], [1, 0], [1, 4], [2, 3], [2, 4], [3, 2], [4, 1], [4, 2]]
    assert graph.ages[1, 4] == graph.ages[4, 2] == 0


def test_the_graph_finds_the_parts_of_the_data():
    generator = torch.Generator().manual_seed(0)
    left = torch.rand(600, 2, generator=generator) * 0.25
    samples = torch.cat([left, 1 - left])
    gas = GrowingNeuralGas(2, most=30, generator=generator).fit(samples, 4000, generator)
    part = connected_parts(gas)
    assert part.max() == 1 and len(gas.weights) == len(part) == 30
    assert ((gas.weights.sum(1) > 1).long() == part).all() or ((gas.weights.sum(1) < 1).long() == part).all()
    assert torch.equal(gas.ages, gas.ages.T) and (gas.ages >= 0).any(1).all() and gas.ages.max() <= gas.oldest
