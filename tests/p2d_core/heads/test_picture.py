import matplotlib
import torch
from matplotlib.image import imread
from rich.console import Console

from p2d_core.heads.head_map import HeadMap
from p2d_core.heads.picture import as_text, draw

SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.4], [0.5, 0.0, 0.8, 0.2]])


def test_the_terminal_picture_worked_by_hand():
    text = as_text(HeadMap.from_scores(SCORES, n_kv_groups=2, fraction=0.25))
    # ranks [[7, 1, 5, 4], [3, 8, 2, 6]] of 8: four shades, two ranks each, from the lowest
    assert text.plain.splitlines() == [
        "layer 0  ·█ ░▒",
        "layer 1  ▒· █░",
        "█ task head (2 of 8)   ·░▒▓ score rank, low to high",
    ]


def test_task_heads_stand_out_by_colour_too():
    text = as_text(HeadMap.from_scores(SCORES, n_kv_groups=2, fraction=0.25))
    red = [span for span in text.spans if span.style == "bold red"]
    assert [text.plain[span.start : span.end] for span in red] == ["█"] * 3  # and in the legend


def test_the_terminal_picture_prints_on_a_narrow_console():
    text = as_text(HeadMap.from_scores(torch.rand(32, 32), n_kv_groups=8))
    console = Console(width=60, record=True, quiet=True)
    console.print(text)
    assert len(text.plain.splitlines()) == 33


def test_the_picture_is_a_png_with_the_task_heads_in_red(tmp_path):
    backend = matplotlib.get_backend()
    path = tmp_path / "heads.png"
    draw(HeadMap.from_scores(torch.rand(4, 8), n_kv_groups=4), path, "spad")
    pixels = imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    red = (pixels[..., 0] > 0.95) & (pixels[..., 1] < 0.05) & (pixels[..., 2] < 0.05)
    assert red.sum() > 100
    assert matplotlib.get_backend() == backend


def test_a_large_model_can_be_drawn(tmp_path):
    path = tmp_path / "heads.png"
    draw(HeadMap.from_scores(torch.rand(80, 64), n_kv_groups=8), path, "frobenius")
    height, width, _ = imread(path).shape
    assert max(height, width) < 4000
