"Pictures and the browser, beyond what their lessons show."
import base64
import re
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from medssl_nb.data.images import ImageSet
from medssl_nb.show import figures as f
from medssl_nb.show.browse import Browser, ask, browse, frame, to_html


def volume(shape=(20, 24, 28), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ball(shape=(20, 24, 28), centre=(12, 10, 9), radius=5):
    distance = sum((grid - c) ** 2 for grid, c in zip(np.indices(shape), centre)) ** 0.5
    return (distance < radius).astype(np.int64)


def pixels(picture):
    return np.asarray(Image.open(BytesIO(picture.png())).convert("RGB")).astype(int)


def has_colour(picture, colour, atleast=20):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels(picture) - wanted).max(-1) < 30).sum() >= atleast


ROWS = [{"encoder": e, "labels": n, "seed": s, "score": 0.5 + 0.01 * s, "metric": "Dice"}
        for e in ("random initialisation", "byol") for n in (5, 10) for s in range(3)]
EVERY = {
    "slices 3D": lambda: f.slices(volume(), ball(), np.roll(ball(), 2, 1), spacing=(3, 1, 1)),
    "slices 2D": lambda: f.slices(volume()[:, 0], ball()[:, 9], spacing=(1, 2)),
    "grid": lambda: f.grid(torch.rand(5, 1, 8, 9, 10), list("abcde")),
    "views": lambda: f.views(torch.rand(3, 1, 16, 16), torch.rand(3, 1, 8, 8), drawn={"boxes": torch.rand(3, 2, 2)}),
    "curves": lambda: f.curves({"loss": [3, 2, 1], "term": [1, 1, 0.5]}),
    "label_efficiency": lambda: f.label_efficiency(ROWS),
    "embedding": lambda: f.embedding(torch.rand(9, 5), [0, 1, 2] * 3),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_shows_itself_once_and_says_what_it_shows(name):
    import matplotlib._pylab_helpers as listed

    picture = EVERY[name]()
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"image/png", "text/plain"} and bundle["image/png"][:4] == b"\x89PNG"
    assert not listed.Gcf.get_all_fig_managers(), "pyplot's list knows the figure"
    assert any(axis.get_title() or axis.get_ylabel() for axis in picture.axes)
    assert pixels(picture).std() > 5, "an empty picture"


def test_a_notebook_shows_a_picture_once_also_where_pyplot_is_active():
    import nbformat
    from nbclient import NotebookClient

    lines = ["from medssl_nb.show.figures import curves\ncurves({'loss': [2, 1]})",
             "import matplotlib.pyplot as plt\nshown = curves({'loss': [2, 1]})\nshown",
             "plt.get_fignums()"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in lines])
    NotebookClient(nb, timeout=120, kernel_name="python3", extra_arguments=["--log-level=ERROR"]).execute()
    for cell in nb.cells[:2]:
        assert [set(out.data) for out in cell.outputs] == [{"image/png", "text/plain"}]
    assert nb.cells[0].outputs[0].data == nb.cells[1].outputs[0].data  # the same bytes, whoever is active
    assert nb.cells[2].outputs[0].data["text/plain"] == "[]"


def test_slices_are_to_scale():
    extents = [a.images[0].get_extent() for a in f.slices(volume(), spacing=(3, 1, 2)).axes]
    assert [(right, bottom) for _, right, bottom, _ in extents] == [(56, 24), (56, 60), (24, 60)]
    assert f.blend(volume()[0], spacing=(1, 2), longest=280).shape == (120, 280, 3)


def test_slices_show_the_right_slice_and_its_mask():
    values, mask = np.zeros((6, 30, 30), np.float32), np.zeros((6, 30, 30), int)
    values[4], mask[2, 10:20, 10:20] = 1, 1
    shown = f.slices(values, mask, axis=0, positions=[4, 2], window=(0, 1), opacity=1).axes
    white, tinted = (axis.images[0].get_array() for axis in shown)
    assert (white == 255).all()
    inside = tuple(int(f.REGIONS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(tinted[180, 180]) == inside and tuple(tinted[10, 10]) == (0, 0, 0)


def test_volumes_stand_upright():
    values = np.zeros((8, 8, 8), np.float32)
    values[7] = 1  # the top: the first axis leads upwards
    for axis in (1, 2):
        rgb = f.slices(values, axis=axis, positions=[4], window=(0, 1)).axes[0].images[0].get_array()
        assert rgb[0].min() > 200 and rgb[-1].max() == 0


def test_legend_colours_are_those_of_the_picture():
    mask = np.zeros((16, 16), int)
    mask[2:8], mask[8:10] = 1, 3
    picture = f.slices(np.zeros((16, 16)), mask, regions=["background", "oedema", "core", "enhancing"], opacity=1)
    assert [t.get_text() for t in picture.legends[0].get_texts()] == ["oedema", "core", "enhancing"]
    assert all(has_colour(picture, colour) for colour in f.REGIONS[:3])  # the small palette keeps rare colours
    assert not set(f.ERRORS.values()) & set(f.REGIONS)


def test_errors_are_named_and_coloured():
    picture = f.slices(volume(), ball(), np.roll(ball(), 3, 1))
    assert [a.get_ylabel() for a in picture.axes[::3]] == ["mask", "prediction", "errors"]
    assert {"missed", "added", "wrong region"} <= {t.get_text() for t in picture.legends[0].get_texts()}
    assert has_colour(picture, f.ERRORS["missed"]) and has_colour(picture, f.ERRORS["added"])
    perfect = f.error_kinds(ball(), ball())
    assert perfect.sum() == 0


@pytest.mark.parametrize("bad", [np.full((5, 6), np.nan), np.zeros((5, 6)), np.array([[np.inf, 0.0], [1, -np.inf]])])
def test_strange_grey_values_still_give_a_picture(bad):
    assert f.blend(bad).dtype == np.uint8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("z", [np.ones((6, 4)), np.arange(5.0)[:, None]], ids=["collapsed", "one feature"])
def test_embedding_of_a_collapsed_encoder(z):
    points, names = f.flatten(z)
    assert points.shape == (len(z), 2) and np.isfinite(points).all()


def test_embedding_tsne_keeps_neighbours_and_its_seed():
    z = np.concatenate([np.random.default_rng(0).normal(0, 1, (20, 8)), np.random.default_rng(1).normal(30, 1, (20, 8))])
    points, _ = f.flatten(z, "tsne", seed=1)
    assert np.array_equal(points, f.flatten(z, "tsne", seed=1)[0])
    first, second = points[:20], points[20:]
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * max(first.std(), second.std())


def test_label_efficiency_draws_mean_spread_and_every_seed():
    picture = f.label_efficiency(ROWS)
    axis = picture.axes[0]
    means = [line for line in axis.lines if line.get_label() in ("byol", "random initialisation")]
    assert np.allclose(means[0].get_ydata(), 0.51) and axis.get_xscale() == "log"
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert sum(len(line.get_ydata()) for line in dots) == len(ROWS)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.min(), 0.50) and np.isclose(band.max(), 0.52)  # one standard deviation of 0.50, 0.51, 0.52
    assert axis.get_ylabel() == "Dice" and means[0].get_color() == f.RANDOM
    alone = f.label_efficiency([row for row in ROWS if row["encoder"] == "byol"])
    assert "without random initialisation" in alone.axes[0].get_legend().get_title().get_text()


def test_boxes_land_where_they_were_drawn():
    box = torch.tensor([[[2.0, 4.0], [10.0, 8.0]]])
    patch = f.views(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 8, 8), drawn={"boxes": box}).axes[0].patches[0]
    assert (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) == (4, 2, 4, 8)  # left, top, wide, tall
    deep = torch.tensor([[[0.0, 2, 4], [3, 10, 8]]])  # does not reach the middle slice, 8
    patch = f.views(torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 8, 8, 8), drawn={"boxes": deep}).axes[0].patches[0]
    assert patch.get_linestyle() == ":"


@pytest.mark.parametrize("call, words", [
    (lambda: f.slices(volume(), ball()[:-1]), "shape"),
    (lambda: f.slices(np.zeros((2, 2, 2, 2, 2))), "shape"),
    (lambda: f.slices(volume(), axis=3), "axis 3"),
    (lambda: f.curves({}), "at least one term"),
    (lambda: f.label_efficiency([]), "one metric"),
    (lambda: f.label_efficiency([ROWS[0], {**ROWS[1], "metric": "kappa"}]), "one metric"),
    (lambda: f.embedding(np.zeros((9, 4)), [0, 1]), "2 labels for 9"),
    (lambda: f.embedding(np.zeros((9, 4)), method="umap"), "umap"),
    (lambda: browse([]), "no image"),
    (lambda: browse(volume(), ball()[:-1]), "shape"),
])
def test_bad_input_is_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.fixture
def images():
    x = torch.from_numpy(np.stack([volume(seed=s)[None] for s in range(3)]))
    return ImageSet(x, masks=torch.from_numpy(np.stack([ball(radius=r) for r in (3, 5, 7)])), spacing=(2.0, 1.0, 1.0),
                    regions=["background", "lesion"])


def test_browser_moves_from_code(images):
    w = browse(images)
    seen = {w.picture.value}
    for change in ({"slice": 3}, {"axis": 2}, {"image": 2}, {"opacity": 0.9}, {"window": (-0.5, 0.5)}):
        w.state = change
        assert w.picture.value not in seen, change
        seen.add(w.picture.value)
        assert {**w.state, **change} == w.state
    again = browse(images)
    again.state = w.state
    assert again.picture.value == w.picture.value  # the state is all there is


def test_browser_shows_the_frame_of_its_state(images):
    w = browse(images)
    w.slice = 12
    expected = frame(w.volume, w.rows, (0, 12), window=w.window, opacity=w.opacity, spacing=(2.0, 1.0, 1.0))
    assert np.array_equal(np.asarray(Image.open(BytesIO(w.picture.value))), expected)
    assert w.figure().axes[0].get_ylabel() == "axis 0, slice 13 of 20"


def test_browser_keeps_its_relative_place_when_the_axis_changes(images):
    w = browse(images)
    w.slice = 19
    w.axis = 2
    assert w.slice == 27
    w.axis = 0
    assert w.slice == 19


def test_browser_says_what_it_does_not_have(images):
    w = browse(images)
    with pytest.raises(ValueError, match="slice 20 is not between 0 and 19"):
        w.slice = 20
    with pytest.raises(ValueError, match="axis 3"):
        w.axis = 3
    with pytest.raises(ValueError, match="zoom"):
        w.state = {"zoom": 2}


def test_network_is_asked_once_a_volume_and_without_gradient(images):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = torch.nn.Parameter(torch.ones(1)), []

        def forward(self, x):
            self.calls.append((tuple(x.shape), torch.is_grad_enabled(), float(x.mean()), float(x.std())))
            return torch.cat([x * 0, x * self.weight], 1)

    network = Network()
    w = browse(images, predictions=network)
    for position in range(20):
        w.slice = position
    w.image = 1
    w.image = 0
    assert len(network.calls) == 2
    shape, gradient, mean, std = network.calls[0]
    assert shape == (1, 1, 20, 24, 28) and not gradient and abs(mean) < 1e-4 and abs(std - 1) < 1e-3
    assert np.array_equal(w.rows[1][1], (f.array(images[0].image[0]) > w.volume.mean()).astype(int))


def test_ask_takes_labels_and_scores():
    x = torch.randn(1, 6, 6)
    scores = lambda x: torch.cat([x, -x, x * 0 - 9], 1)  # noqa: E731
    assert np.array_equal(ask(scores, x), ask(lambda x: scores(x).argmax(1), x))


def test_a_move_takes_less_than_300_ms():
    w = browse(volume((96, 96, 96)), ball((96,) * 3, (48,) * 3, 30), ball((96,) * 3, (50,) * 3, 30))
    times = []
    for position in range(30, 45):
        begin = time.perf_counter()
        w.slice = position
        times.append(time.perf_counter() - begin)
    assert np.median(times) < 0.3


def test_two_dimensional_images_are_leafed_through():
    images = ImageSet(torch.rand(4, 1, 20, 30))
    w = browse(images)
    first = w.picture.value
    w.image = 3
    assert w.picture.value != first and w.place() == (None, None)
    assert to_html(w).count("data:image/webp") == 4 and w.image == 3


def test_bundle_holds_the_widget_and_the_strip(images):
    bundle = browse(images)._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(bundle)
    assert bundle["text/html"] == browse(images)._repr_mimebundle_()["text/html"]  # no random ids
    assert len(bundle["text/html"]) < 150_000


def test_html_is_one_piece_without_network_or_ids(images, tmp_path):
    page = to_html(browse(images), tmp_path / "page.html").read_text()
    assert "http" not in page and "<script" not in page and not re.search(r'\sid="', page)
    data = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)
    shown = [np.asarray(Image.open(BytesIO(base64.b64decode(d)))) for d in data]
    assert len(shown) == 10 and len({s.tobytes() for s in shown}) == 10 and "lesion" in page


def test_html_takes_any_picture():
    pictures = [np.zeros((8, 9, 3), np.uint8), Image.new("RGB", (9, 8)), f.curves({"loss": [2, 1]}), f.curves({"loss": [2, 1]}).png()]
    strip = to_html(pictures, labels=["<one>", "two|2", "3", "4"], start=0)
    assert strip.count("data:image/webp") == 4 and "<one>" not in strip and "two/2" in strip
    assert isinstance(browse(volume()), Browser)


def test_strip_begins_where_the_browser_stands(images):
    w = browse(images)
    w.slice = 17
    assert re.search(r"<output[^>]*>axis 0, slice 1[678]<", to_html(w))


def test_an_empty_slice_still_shows_that_it_was_reached():
    w = browse(np.zeros((5, 8, 8), np.float32))
    w.slice = 1
    first = w.picture.value
    w.slice = 2
    assert w.picture.value != first
