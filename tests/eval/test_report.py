"""The report as a page: what it says, that it needs nothing else, and that a browser draws its curves."""

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from eval.report import main, write_report
from tests.eval.recorded import record_run, training_row, write_metrics

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian's package chromium)")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
CHARTS = ["loss", "loss-log", "bits-per-byte", "position", "learning-rate", "gradient-norm", "throughput", "z-loss"]

COLORS = {"light": [(0x2B, 0x5F, 0xD9), (0xD4, 0x58, 0x1C)], "dark": [(0x7E, 0xA6, 0xFF), (0xFF, 0x9A, 0x5F)]}

MEASURE = """
<script>
  const box = element => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const charts = {};
  for (const figure of document.querySelectorAll("figure")) {
    const svg = [...figure.querySelectorAll("svg")].find(svg => svg.getBoundingClientRect().width > 0);
    const curves = {};
    for (const path of svg.querySelectorAll("g[id] > path")) {
      const name = path.parentNode.id;
      const points = (path.getAttribute("d").match(/[ML]/g) || []).length;
      curves[name] = {points, box: box(path), color: getComputedStyle(path).stroke, length: path.getTotalLength()};
    }
    charts[figure.id] = {box: box(svg), text: svg.querySelectorAll("text").length, curves};
  }
  const measured = document.createElement("pre");
  measured.id = "measured";
  measured.textContent = JSON.stringify({charts, width: document.documentElement.scrollWidth, title: document.title});
  document.body.append(measured);
</script>
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_run(tmp_path_factory.mktemp("runs") / "recorded")


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    assert main([str(run)]) == 0
    return run / "report.html"


def browse(page: Path, directory: Path, *flags: str, size: str) -> str:
    """Lets Chromium lay the page out, and returns the document it ends up with."""
    arguments = [*FLAGS, f"--user-data-dir={directory / 'profile'}", f"--window-size={size}", *flags, page.as_uri()]
    done = subprocess.run([str(CHROMIUM), *arguments], capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


def measure(page: Path, directory: Path, size: str) -> dict[str, Any]:
    copy = directory / "measured.html"
    copy.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    document = browse(copy, directory, "--dump-dom", size=size)
    found = re.search(r'<pre id="measured">(.*?)</pre>', document, re.DOTALL)
    assert found, document[-500:]
    return json.loads(html.unescape(found.group(1)))


@pytest.fixture(scope="module")
def laptop(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(page, tmp_path_factory.mktemp("laptop"), "1280,1000")


@pytest.fixture(scope="module")
def phone(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(page, tmp_path_factory.mktemp("phone"), "500,1000")  # as narrow as a headless window gets


@NEEDS_BROWSER
@pytest.mark.parametrize("device", ["laptop", "phone"])
def test_a_browser_draws_every_curve(request: pytest.FixtureRequest, device: str) -> None:
    measured = request.getfixturevalue(device)
    assert measured["width"] == {"laptop": 1280, "phone": 500}[device], "the page scrolls sideways"
    assert list(measured["charts"]) == [f"chart-{name}" for name in CHARTS]
    for name, chart in measured["charts"].items():
        left, top, right, bottom = chart["box"]
        assert right - left >= 300, name
        assert bottom - top >= 150, name
        assert chart["text"] >= 6, f"{name} lacks its tick labels"
        curves = [c for key, c in chart["curves"].items() if re.search(r"-(training|validation|position)$", key)]
        assert len(curves) == (2 if "loss" in name and "z" not in name else 1), name
        for curve in curves:
            x0, y0, x1, y1 = curve["box"]
            assert curve["points"] >= 8, name
            assert left <= x0 < x1 <= right + 1, name
            assert top <= y0 < y1 <= bottom + 1, name
            assert x1 - x0 >= 0.25 * (right - left), f"{name} covers too little of its axis"
    training = next(c for key, c in measured["charts"]["chart-loss"]["curves"].items() if key.endswith("-training"))
    assert training["points"] > 200


@NEEDS_BROWSER
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_curves_are_visible(page: Path, laptop: dict[str, Any], tmp_path: Path, theme: str) -> None:
    """The chart holds pixels in the colours of its two curves."""
    counts = count_curve_pixels(page, laptop["charts"]["chart-loss"]["box"], tmp_path, theme)
    assert min(counts) > 200, counts


@NEEDS_BROWSER
def test_without_curves_their_pixels_are_gone(page: Path, laptop: dict[str, Any], tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.html"
    style = '<style>g[id$="-training"], g[id$="-training-raw"], g[id$="-validation"] { display: none }</style>'
    hidden.write_text(page.read_text().replace("</head>", style + "</head>"))
    assert count_curve_pixels(hidden, laptop["charts"]["chart-loss"]["box"], tmp_path, "light") == [0, 0]


def count_curve_pixels(page: Path, box: list[float], directory: Path, theme: str) -> list[int]:
    """Pixels of the training curve's colour and of the validation curve's, inside `box` but beside the legend."""
    flags = ["--force-dark-mode"] if theme == "dark" else []
    browse(page, directory, f"--screenshot={directory / 'shot.png'}", *flags, size="1280,1000")
    left, top, right, bottom = (round(value) for value in box)
    image = matplotlib.image.imread(directory / "shot.png")[top:bottom, left:right, :3] * 255
    plot = image[:, : int(0.8 * (right - left))]
    return [int((np.abs(plot - np.array(color)).max(axis=-1) <= 12).sum()) for color in COLORS[theme]]


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags(page: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page.read_text())
    return parser.seen


def attributes(tags: list[tuple[str, dict[str, str | None]]], *names: str) -> Iterator[str]:
    for _, found in tags:
        yield from (value for name, value in found.items() if name in names and value is not None)


def test_the_page_needs_nothing_beside_itself(tags: list, page: Path) -> None:
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "img", "iframe"})
    links = list(attributes(tags, "href", "src", "xlink:href"))
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in page.read_text()
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.read_text()))


def test_ids_are_unique_and_every_reference_is_met(tags: list) -> None:
    ids = list(attributes(tags, "id"))
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in attributes(tags, "href", "xlink:href")} <= set(ids)


def test_the_page_says_what_the_run_was(page: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", "", page.read_text())))
    text = re.sub(r"\s+", " ", text)
    for part in (
        *("recorded finished", "2 blocks of rglru, local_attention", "resumed at step 150", "from step_00000150"),
        *("80 logged steps were computed again", "Bits per byte 1.405", "Tokens trained 819k", "2,005,000"),
        *("Training time 2 min 40 s", "blocks.1 local_attention chunked 904 900,000", "git_diff", "-a < b"),
        *(
            "After step 400",
            "sample of step 400: if a < b & c:",
            "in <1> hour",
            "topology.world_size 2",
            "train: {steps: 400}",
        ),
    ):
        assert part in text, part


def test_equal_runs_give_equal_pages(run: Path, page: Path, tmp_path: Path) -> None:
    assert write_report(run, tmp_path / "again.html").read_text() == page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"]


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ([], "unfinished"),
        ([{"step": 2, "event": "finished"}], "finished"),
        ([{"step": 2, "event": "interrupted"}, {"step": 2, "event": "saved"}], "interrupted"),
        ([{"step": 2, "event": "interrupted"}, {"step": 2, "event": "resumed"}], "unfinished"),
        ([{"step": 2, "event": "failed"}], "failed"),
        ([{"step": 2, "event": "hang"}], "failed"),
    ],
)
def test_status(tmp_path: Path, last: list, status: str) -> None:
    write_metrics(tmp_path, [training_row(1), training_row(2), *last])
    assert f'<span class="status {status}">' in write_report(tmp_path).read_text()


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    """One training step, no validation, nothing else in the directory."""
    write_metrics(tmp_path, [training_row(1)])
    text = write_report(tmp_path).read_text()
    assert "No validation yet." in text
    assert 'id="chart-position"' not in text
    assert "layers.json: not in the run directory." in text


def test_losses_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    rows = [training_row(step) for step in range(1, 300)]
    rows[100]["loss"], rows[150]["grad_norm"] = math.nan, math.inf
    write_metrics(tmp_path, rows, torn='{"step": 300')
    text = write_report(tmp_path).read_text()
    assert 'id="chart-loss"' in text
    assert "the last line is cut off" in text
    assert not re.search(r'\bd="[^"]*(nan|inf)', text)


def test_bad_input_is_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (None, ""):
        if content is not None:
            (tmp_path / "metrics.jsonl").write_text(content)
        assert main([str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"eval.report: {tmp_path}")
        assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "example: python -m eval.report" in capsys.readouterr().out
