"""The page of `evaluate --report`: what is on it, what it never overwrites, its error maps, and,
where there is a Chromium, that its script works."""

import html.parser
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compsrt import evaluate, report
from compsrt.checkpoint import save_float
from compsrt.cli import run
from compsrt.data import Pair, write_image
from compsrt.metrics import y_channel
from compsrt.models.swinir import SwinIR, SwinIRConfig

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# What a file can be called: markup, an attribute's end, a URL's special characters, our own places.
NASTY = "<img src=x onerror=document.title='owned'> & \"b\" #1 100% {{name}}"
NASTY_MODEL = 'a"><script>document.title="owned"<'


class Page(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and the text of every element by its tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("img", "meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [has for name, has in self.tags if name == tag and attributes.items() <= has.items()]


class Made:
    """A scored test set without any model: pictures of one grey, enlarged with a planted error."""

    def __init__(self, folder: Path, errors: dict[str, dict[str, int]], size: int = 64) -> None:
        """errors: picture -> model -> by how much a square of the picture is too bright."""
        self.folder = folder
        self.errors = errors
        self.pairs = []
        models = list(next(iter(errors.values())))
        self.rows: list[dict[str, Any]] = [
            {"model": model, "tests": {"Set": {"psnr": 30.0, "ssim": 0.9}}, "milliseconds": 5.0}
            | ({} if model == "bicubic" else {"bits_per_weight": 4.0})
            for model in models
        ]
        self.scores = []
        truth = np.full((size, size + 6, 3), 100, np.uint8)
        truth[:, :3] = (255, 0, 255)
        (folder / "hr").mkdir(parents=True)
        for number, (name, by_model) in enumerate(errors.items()):
            hr = folder / "hr" / f"{number}.png"
            write_image(hr, truth)
            self.pairs.append(Pair(name, hr, None))
            for model, error in by_model.items():
                enlarged = truth.copy()
                enlarged[40:50, 20:32] += np.uint8(error)
                path = folder / "enlarged" / model / "Set" / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_image(path, enlarged)
                psnr = math.inf if error == 0 else 50.0 - error
                score = {"model": model, "test": "Set", "name": name, "psnr": psnr, "ssim": 0.9}
                self.scores.append({**score, "milliseconds": 5.0})

    def write(self, target: Path, count: int = 20) -> Page:
        enlarged = self.folder / "enlarged"
        sets = {"Set": self.pairs}
        path = report.write(target, self.rows, self.scores, sets, 2, enlarged=enlarged, count=count)
        assert path == target / "index.html"
        return Page(path)


def index_map(path: Path) -> np.ndarray:
    """The palette's indices of an error map."""
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == report.palette().ravel().tolist()
        return np.asarray(image).astype(int)


# --- the page -------------------------------------------------------------------------------------


def test_a_figure_for_every_picture_and_model_and_every_file_is_there(tmp_path):
    errors = {name: {"bicubic": 20, "float": 3, "packed": 6} for name in ("one", "two", "three")}
    page = Made(tmp_path, errors).write(tmp_path / "out")
    figures = [figure["data-model"] for figure in page.all("figure")]
    assert figures == ["bicubic", "float", "packed", "ground truth"] * 3
    assert len(page.all("section")) == 3
    images = page.all("img")
    # Two of each model, the ground truth as a tile, and the large picture.
    assert len(images) == 3 * (2 * 3 + 1 + 1)
    for image in images:
        assert image["loading"] == "lazy"
        assert (image["width"], image["height"]) == ("70", "64")
        assert image["alt"]
        with Image.open(tmp_path / "out" / image["src"]) as file:
            assert file.size == (70, 64)
    used = {tmp_path / "out" / image["src"] for image in images}
    assert used == set((tmp_path / "out" / "pictures").rglob("*.png"))
    assert page.all("div", role="application", tabindex="0")
    assert "http" not in page.source
    assert "30.000" in page.texts["td"]  # the table of models
    assert page.texts["h3"] == ["one", "two", "three"]  # no spread: the order of the test set
    assert page.open == []


def test_names_are_text_and_never_markup(tmp_path):
    page = Made(tmp_path, {NASTY: {"bicubic": 5, NASTY_MODEL: 2}}).write(tmp_path / "out")
    assert page.texts["h3"] == [NASTY]
    assert len(page.all("script")) == 1
    assert not any("onerror" in has for _, has in page.tags)
    assert [figure["data-model"] for figure in page.all("figure")][1] == NASTY_MODEL
    for image in page.all("img"):
        assert (tmp_path / "out" / image["src"]).is_file()
        assert set(image["src"]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                        "0123456789._-/")  # fmt: skip


def test_a_name_that_is_no_text_at_all_still_makes_a_page(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    page = Made(tmp_path, {name: {"bicubic": 5, "float": 2}}).write(tmp_path / "out")
    assert page.texts["h3"] == ["caf\\udce9"]


def test_the_largest_spread_between_models_comes_first(tmp_path):
    errors = {
        "alike": {"bicubic": 40, "float": 3, "packed": 3},
        "apart": {"bicubic": 21, "float": 3, "packed": 20},
        "between": {"bicubic": 20, "float": 3, "packed": 9},
    }
    page = Made(tmp_path, errors).write(tmp_path / "out", count=2)
    assert page.texts["h3"] == ["apart", "between"]
    assert "2 of 3 pictures" in page.source
    assert "where the PSNR of float and packed differs the most" in page.source
    # The table has all of them, and leads to those that are shown.
    assert [link["href"] for link in page.all("a")] == ["#picture-1", "#picture-2"]
    assert "Set/alike" in page.texts["th"]
    folders = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert folders == ["001-apart", "002-between"]


def test_bicubic_counts_only_beside_a_single_model(tmp_path):
    errors = {"first": {"bicubic": 10, "float": 9}, "second": {"bicubic": 30, "float": 9}}
    page = Made(tmp_path, errors).write(tmp_path / "out")
    assert page.texts["h3"] == ["second", "first"]


def test_a_perfect_picture_has_no_number(tmp_path):
    errors = {"flat": {"bicubic": 0, "float": 0}, "other": {"bicubic": 4, "float": 0}}
    page = Made(tmp_path, errors).write(tmp_path / "out")
    assert page.texts["h3"] == ["other", "flat"]  # infinitely far apart, and not at all
    assert page.texts["b"].count("∞") >= 3
    assert "nan" not in page.source.lower()


def test_the_values_of_a_picture_stand_below_it_and_the_best_is_bold(tmp_path):
    page = Made(tmp_path, {"one": {"bicubic": 20, "float": 3}}).write(tmp_path / "out")
    assert "<b>47.00</b> dB · <b>0.9000</b>" in page.source
    assert ">30.00 dB · <b>0.9000</b>" in page.source


# --- error maps -----------------------------------------------------------------------------------


def test_an_error_map_shows_the_planted_difference_on_one_scale(tmp_path):
    made = Made(tmp_path, {"one": {"bicubic": 50, "float": 10, "packed": 25}})
    page = made.write(tmp_path / "out")
    # A grey step is 219/255 steps of luma: 42.9, 8.6 and 21.5 here, so all maps end at 50.
    assert "≥ 50" in page.texts["span"]
    for number, (model, error) in enumerate(made.errors["one"].items(), 1):
        index = index_map(tmp_path / "out" / "pictures" / "001-one" / f"{number}-{model}-error.png")
        inside = np.zeros(index.shape, bool)
        inside[40:50, 20:32] = True
        assert set(index[~inside]) == {0}
        assert set(index[inside]) == {round(255 * error * 219 / 255 / 50)}


def test_errors_are_those_of_the_luma():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    expected = np.abs(y_channel(a) - y_channel(b))
    np.testing.assert_allclose(report.error(a, b), expected, rtol=1e-6)
    black, white = np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)
    assert report.error(black, white)[0, 0] == pytest.approx(219, abs=0.01)


def test_the_scale_is_that_of_the_worst_model_and_outliers_do_not_set_it():
    small, large = np.full((50, 50), 3.0, np.float32), np.full((50, 50), 9.0, np.float32)
    large[0, 0] = 200
    assert report.scale_end([small]) == 4
    assert report.scale_end([small, large]) == 10
    assert report.scale_end([0 * small]) == report.TOPS[0]
    assert report.scale_end([0 * small + 219]) == 219


def test_brighter_always_means_worse():
    linear = (report.palette() / 255) ** 2.2
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


def test_the_lens_begins_where_the_models_differ(tmp_path):
    planes = np.zeros((2, 200, 300), np.float32)
    planes[:, 20:60, 20:60] = 90  # both wrong alike
    planes[1, 150:170, 210:240] = 5
    x, y = report.most_different(list(planes))
    assert abs(x - 225) <= report.LENS // 2
    assert abs(y - 160) <= report.LENS // 2
    x, y = report.most_different([planes[0]])
    assert 20 <= x < 60
    assert 20 <= y < 60
    assert report.most_different([np.zeros((1, 1), np.float32)]) == (0, 0)


# --- never overwritten silently -------------------------------------------------------------------


def test_a_report_is_replaced_only_when_asked_and_other_files_never(tmp_path):
    out = tmp_path / "out"
    report.check_folder(out, force=False)
    out.mkdir()
    report.check_folder(out, force=False)
    (out / report.WORK).mkdir()  # of an interrupted run
    report.check_folder(out, force=False)
    errors = {"one": {"bicubic": 5, "float": 2}, "two": {"bicubic": 5, "float": 3}}
    made = Made(tmp_path, errors)
    made.write(out)
    with pytest.raises(ValueError, match=r"out: holds a report; --force replaces it"):
        report.check_folder(out, force=False)
    report.check_folder(out, force=True)
    made.write(out, count=1)
    assert [path.name for path in (out / "pictures").iterdir()] == ["001-one"]
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "pictures"]
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex, no part of a report"):
        report.check_folder(out, force=True)
    (out / "thesis.tex").unlink()
    (out / "index.html").write_text("<h1>my home page</h1>")
    with pytest.raises(ValueError, match=r"holds index\.html, no part of a report"):
        report.check_folder(out, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("page", [None, "<h1>my home page</h1>"])
def test_a_folder_of_pictures_is_no_report(page, force, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.png").touch()
    if page is not None:
        (tmp_path / "index.html").write_text(page)
    with pytest.raises(ValueError, match=r"not empty, holds .*, no part of a report"):
        report.check_folder(tmp_path, force=force)


def test_a_report_deletes_only_what_a_report_wrote(tmp_path):
    out = tmp_path / "out"
    errors = {"one": {"bicubic": 5, "float": 2}, "two": {"bicubic": 5, "float": 3}}
    made = Made(tmp_path, errors)
    made.write(out)
    shown = {path.relative_to(out) for path in out.rglob("*.png")}
    assert {f"pictures/{path}" for path in report._written(out)} == set(map(str, shown))
    foreign = [out / "pictures" / name for name in ("holiday.png", "002-two/me.png", "own/a.png")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    report.check_folder(out, force=True)
    made.write(out, count=1)
    left = {path.relative_to(out) for path in out.rglob("*.png")} - {
        path.relative_to(out) for path in foreign
    }
    assert left == {path for path in shown if "001-one" in path.parts}
    assert {path.read_bytes() for path in foreign} == {b"mine"}

    in_the_way = out / "pictures" / "002-two" / "truth.png"
    in_the_way.write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=r"truth\.png: written by no report; move it away"):
        made.write(out)
    assert {path: path.read_bytes() for path in before} == before


def test_a_page_names_no_files_outside_its_pictures(tmp_path):
    names = ("../../a.png", "1-a/../b.png", "1-a/b/c.png", "/1-a/b.png", "1-a/b.txt", "1-a/b.png")
    images = "".join(f'<img src="pictures/{name}">' for name in names)
    (tmp_path / "index.html").write_text(report.MARK + '">' + images)
    assert report._written(tmp_path) == {Path("1-a/b.png")}


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """first.safetensors, second.safetensors and bicubic.safetensors x2, and the test set Set."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    (folder / "Set" / "HR").mkdir(parents=True)
    for name in ("stripes", "noise"):
        picture = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        write_image(folder / "Set" / "HR" / f"{name}.png", picture)
    for seed, name in enumerate(("first", "second", "bicubic")):
        torch.manual_seed(seed)
        config = SwinIRConfig(
            scale=2, depths=(2,), embed_dim=12, num_heads=(2,), window_size=4, mlp_hidden=(24,)
        )
        save_float(SwinIR(config), folder / f"{name}.safetensors")
    return folder


def command(folder: Path, *words: str) -> list[str]:
    models = [str(folder / "first.safetensors"), str(folder / "second.safetensors")]
    return [*models, "--test", str(folder / "Set"), "--device", "cpu", *words]


def test_the_command_writes_a_report_once(folder, tmp_path, capsys):
    out = tmp_path / "a" / "out"
    assert run(evaluate.main, command(folder, "--report", str(out))) == 0
    assert f"report: {out / 'index.html'}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "pictures"]
    page = Page(out / "index.html")
    assert sorted(page.texts["h3"]) == ["noise", "stripes"]
    assert len(page.all("figure")) == 2 * 4
    assert run(evaluate.main, command(folder, "--report", str(out)), name="evaluate") == 2
    assert capsys.readouterr().err == (
        f"evaluate: error: {out}: holds a report; --force replaces it\n"
    )
    again = command(folder, "--report", str(out), "--force", "--report-pictures", "1")
    assert run(evaluate.main, again) == 0
    assert len(Page(out / "index.html").all("section")) == 1


def test_saved_pictures_are_shared_with_the_report_and_stay(folder, tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "kept" / "report"
    words = ("--output", str(kept), "--save-images", "--report", str(out), "--no-bicubic")
    assert run(evaluate.main, command(folder, *words)) == 0
    saved = (kept / "second" / "Set" / "noise.png").read_bytes()
    (shown,) = out.glob("pictures/*-noise/2-second.png")
    assert shown.read_bytes() == saved
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "pictures"]
    figures = [figure["data-model"] for figure in Page(out / "index.html").all("figure")]
    assert figures == ["first", "second", "ground truth"] * 2


def test_a_model_may_not_take_the_name_of_bicubic_enlargement(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = [str(folder / "bicubic.safetensors"), "--test", str(folder / "Set"), "--report"]
    assert run(evaluate.main, [*words, str(out)]) == 2
    assert "rename its file or give --no-bicubic" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_is_no_folder_for_a_report(folder, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert run(evaluate.main, command(folder, "--report", str(tmp_path / "out"))) == 2
    assert "not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--force"], "--force replaces a report, it needs --report"),
        (["--report", "a", "--report-pictures", "0"], "at least 1, got 0"),
        (["--report", "a", "--output", "./a"], "another folder than --output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_contradict_each_other(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--test", "Set", "--scale", "2", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_one_page(folder, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    out = tmp_path / "out"
    argv = command(folder, "--report", str(out))
    result = subprocess.run(
        [sys.executable, "-m", *launcher, "compsrt.evaluate", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    page = Page(out / "index.html")
    assert len(page.all("figure")) == 2 * 4
    assert all((out / image["src"]).is_file() for image in page.all("img"))
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "pictures"]


# --- in a browser ---------------------------------------------------------------------------------

# What a reader does, and then what the page says: the lens far to the right and one step back, the
# error maps, the first tile large, the table sorted by PSNR.
READER = """
const lens = document.querySelector(".lens");
function press(key, shiftKey) {
  lens.dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey, bubbles: true }));
}
for (let i = 0; i < 20; i++) press("ArrowRight", true);
const section = document.querySelector(".picture");
root.dataset.right = section.style.getPropertyValue("--x");
root.dataset.half = root.lens / 2;
press("ArrowLeft", false);
root.dataset.left = section.style.getPropertyValue("--x");
document.querySelector("[value=errors]").click();
document.querySelector(".crop").click();
root.dataset.large = document.querySelector(".large").getAttribute("src");
document.querySelectorAll(".sortable thead button")[1].click();
root.dataset.first = document.querySelector(".sortable tbody th").textContent;
"""


def browse(browser: str, profile: Path, page: Path, *words: str) -> str:
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}",
         "--hide-scrollbars", "--virtual-time-budget=3000", *words, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_page_works_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} on the PATH")
    out = tmp_path / "out"
    made = Made(tmp_path, {NASTY: {"bicubic": 50, NASTY_MODEL: 10}}, size=200)
    made.rows[1]["tests"] = {"Set": {"psnr": 31.0, "ssim": 0.9}}
    source = made.write(out).source
    (out / "read.html").write_text(
        source.replace("</body>", f"<script>{READER}</script></body>"), "utf-8"
    )
    (tmp_path / "dom.html").write_text(
        browse(browser, tmp_path / "first", out / "read.html", "--dump-dom"), "utf-8"
    )
    page = Page(tmp_path / "dom.html")
    (root,) = page.all("html")
    assert root["data-ready"] == "1"
    assert root["data-view"] == "errors"
    assert page.texts["title"] == ["Models side by side, ×2"]
    assert float(root["data-right"]) == pytest.approx(206 - float(root["data-half"]), abs=0.5)
    assert float(root["data-left"]) == float(root["data-right"]) - 4
    assert root["data-large"].endswith("1-bicubic-error.png")
    assert root["data-first"] == NASTY_MODEL

    shot = tmp_path / "shot.png"
    words = [f"--screenshot={shot}", "--window-size=500,1600"]
    browse(browser, tmp_path / "second", out / "index.html", *words)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # The ground truth is grey with a margin of magenta, which the page itself never uses.
    for color, least in (((100, 100, 100), 5000), ((255, 0, 255), 100)):
        assert (np.abs(pixels.astype(int) - color).max(axis=1) <= 2).sum() >= least
