"The leaderboard's bookkeeping: all rows, a fair random row for each, cells that survive a kill, one setting a file."
import json
from pathlib import Path

import pytest

from medssl_nb import ssl

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def leaderboard(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import leaderboard

    return leaderboard


@pytest.mark.parametrize("dims", [2, 3])
def test_every_method_has_a_row_and_random_weights_of_its_own_kind(leaderboard, dims):
    board = f"cohort_{dims}d"
    rows, starts = leaderboard.rows_of(board), leaderboard.random_rows(dims)
    assert rows[0] == "random" and rows[-1] == "supervised" and len(set(rows)) == len(rows)
    methods = {card.name for card in ssl.cards() if dims in card.dims}
    assert set(rows) == methods | set(starts) | {"supervised"}
    for name in methods:
        model, encoder, start = leaderboard.model_of(board, name, 0)
        none, bare, same = leaderboard.model_of(board, "random" if start == "resnet18" else f"random, {start}", 0)
        assert model is not None and none is None and start == same
        shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (encoder, bare)]
        assert shapes[0] == shapes[1], name


def test_hippocampi_begin_at_random_and_end_with_full_supervision(leaderboard):
    import hippocampus

    rows = hippocampus.rows_of()
    assert list(rows)[0] == "random" and list(rows)[-1] == "supervised"
    shapes = lambda network: {k: v.shape for k, v in network.state_dict().items()}
    start = hippocampus.encoder_of(0)
    for row in ("simclr", "pcrl_v2, skips", "supervised"):
        encoder = hippocampus.model_of(*rows[row], seed=0).encoder
        assert shapes(encoder) == shapes(start), row
        assert all((a == b).all() for a, b in zip(encoder.state_dict().values(), start.state_dict().values())), row


def test_finished_cells_survive_a_kill(leaderboard, tmp_path, monkeypatch):
    made, path = [], tmp_path / "board.json"

    def cell(board, row, seed, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((row, seed))
        return {"steps": 1, "linear_probe": 0.5, "knn": 0.5, "finetune": {f"{s:g}": {"score": seed / 2} for s in leaderboard.BOARDS[board].shares}}

    monkeypatch.setattr(leaderboard, "cell", cell)
    monkeypatch.setattr(leaderboard, "board_file", lambda path, board, budget: leaderboard.opened(path, {"shares": [0.05, 0.25, 1.0], "metric": "kappa"}, steps={}, cells={}))
    measure = lambda: leaderboard.measure("cohort_2d", ["random", "simclr"], 2, None, path, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert {row: list(cells) for row, cells in json.loads(path.read_text())["cells"].items()} == {"random": ["0", "1"], "simclr": ["0"]}
    made[:] = made[:2]
    measure()
    assert made[2:] == [("simclr", 1)]


def test_one_file_one_setting(leaderboard, tmp_path):
    path = tmp_path / "found.json"
    found = leaderboard.opened(path, {"steps": 5, "shares": (0.1, 1.0)}, cells={})
    assert found["cells"] == {} and {"torch", "medssl_nb", "machine", "threads"} < set(found["setting"])
    leaderboard.save(found, path)
    assert leaderboard.opened(path, {"steps": 5, "shares": (0.1, 1.0)}) == found
    with pytest.raises(SystemExit, match="another steps: give another --out"):
        leaderboard.opened(path, {"steps": 6, "shares": (0.1, 1.0)})


@pytest.mark.parametrize("path", sorted(RESULTS.glob("leaderboard_*.json")), ids=lambda p: p.stem)
def test_boards_were_scored_on_the_truth_they_name(path):
    "Each score can be had again from the decisions that are kept beside it."
    from medssl_nb.evaluate.metrics import balanced_accuracy, kappa

    found = json.loads(path.read_text())
    metric = {"quadratic weighted kappa": kappa, "balanced accuracy": balanced_accuracy}[found["setting"]["metric"]]
    truth = list(map(int, found["truth"]))
    for row, cells in found["cells"].items():
        for cell in cells.values():
            for share in cell["finetune"].values():
                assert metric(truth, list(map(int, share["decided"]))) == pytest.approx(share["score"], abs=1e-6), row
