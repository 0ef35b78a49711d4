"""A page to look at: models side by side on pictures, with a lens, error maps and their scores.

``evaluate --report DIR`` writes ``DIR/index.html`` and PNG files below ``DIR/pictures``. The page
needs no network and no server: opened as a file it works, and so does a copy of the folder. Its
look and its behaviour are in ``assets/report.html``; here is what goes into it. A report replaces
another one by deleting the files that its page shows, and no others.

An error map is |Y(enlarged) - Y(truth)| for every pixel, Y the luma of `metrics` in grey levels of
255. All maps of one picture share one scale, whose end is the 99th percentile of the worst of
them, rounded up to a number that is easy to read; what lies above has the brightest colour.
"""

from __future__ import annotations

import contextlib
import html
import io
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import uniform_filter

from . import __version__, scoring
from .data import Pair, load_pair
from .files import atomic_write
from .images import Picture, read_image, write_image
from .metrics import y_channel

PAGE = "index.html"
PICTURES = "pictures"
# Hidden, and gone when the page is written: what it is made of.
WORK = ".compsrt-unfinished"
ENLARGED = f"{WORK}/enlarged"
# How a page of ours is told from somebody's web site.
MARK = '<meta name="generator" content="compsrt'
TEMPLATE = Path(__file__).parent / "assets" / "report.html"
TRUTH = "ground truth"

# Where error maps can end, in grey levels. 219 is as far apart as two lumas can be.
TOPS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 30, 40, 50, 60, 80, 100, 150, 219)
# From night over violet and orange to cream. Lightness (CIE L*) grows evenly, by 0.27 to 0.54 a
# step, so the order of the colours survives any colour blindness and a grey printer.
_ANCHORS = np.array(
    [
        (0, 4, 16),
        (18, 40, 92),
        (62, 66, 150),
        (136, 82, 150),
        (212, 98, 98),
        (240, 146, 52),
        (250, 202, 84),
        (255, 250, 214),
    ]
)
# Pixels of a side of the window that the lens's first place is chosen for; about what it shows.
LENS = 48

Plane = npt.NDArray[np.float32]
Score = dict[str, Any]


def check_folder(folder: Path, *, force: bool) -> None:
    """Raise ValueError if a report cannot go there: another one is there, or other files are.

    Only what has a page of ours is a report; files that it does not know may lie in its PICTURES.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} - {WORK}
    others = names - {PAGE, PICTURES} if _page(folder) else names
    if others:
        raise ValueError(
            f"{folder}: not empty, holds {min(others)}, no part of a report; name a new folder"
        )
    if names and not force:
        raise ValueError(f"{folder}: holds a report; --force replaces it")


def _page(folder: Path) -> str:
    """The page of the report in a folder; empty if there is none of ours."""
    path = folder / PAGE
    page = path.read_text("utf-8", "replace") if path.exists() else ""
    return page if MARK in page else ""


def _written(folder: Path) -> set[Path]:
    """The pictures that the report in a folder wrote, below PICTURES: all that its page shows."""
    name = r"\d+-[A-Za-z0-9._-]+/[A-Za-z0-9._-]+\.png"  # as `_slug` makes them: never outside
    return {Path(found) for found in re.findall(rf'src="{PICTURES}/({name})"', _page(folder))}


def write(
    folder: Path,
    rows: list[dict[str, Any]],
    scores: list[Score],
    sets: dict[str, list[Pair]],
    scale: int,
    *,
    enlarged: Path,
    count: int = 20,
) -> Path:
    """Write the page and its pictures, replacing those of an earlier report; the page's path.

    rows, scores: what `scoring.score` returned for every model. enlarged: the folder that holds
    MODEL/TEST/NAME.png for all of them (in the report's own ENLARGED they are deleted). count: how
    many pictures are shown, those first whose PSNR differs the most between the models.

    Raises ValueError, and the earlier report stays, where a file that no report wrote is in the way.
    """
    models = [row["model"] for row in rows]
    compared = _compared(rows)
    by_picture: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        by_picture.setdefault((score["test"], score["name"]), {})[score["model"]] = score
    pairs = {(test, pair.name): pair for test, all_ in sets.items() for pair in all_}
    spreads = {
        key: _spread([of_model[model]["psnr"] for model in compared])
        for key, of_model in by_picture.items()
    }
    # Python's sort is stable: without any spread the order is that of the test sets.
    shown = sorted(by_picture, key=lambda key: -spreads[key])[:count]

    new = folder / WORK / PICTURES
    shutil.rmtree(new, ignore_errors=True)
    sections = []
    for number, key in enumerate(shown, 1):
        test, name = key
        place = f"{number:03}-{_slug(name)}"
        (new / place).mkdir(parents=True)
        files = {model: enlarged / model / test / f"{name}.png" for model in models}
        sections.append(
            _section(number, pairs[key], scale, by_picture[key], compared, files, new / place)
        )
    page = _fill(
        TEMPLATE.read_text("utf-8"),
        version=__version__,
        scale=str(scale),
        lens=str(LENS),
        gradient=", ".join("#{:02x}{:02x}{:02x}".format(*color) for color in _ANCHORS),
        models=_models_table(rows),
        choice=html.escape(_choice(len(shown), len(by_picture), compared)),
        pictures=_pictures_table(models, by_picture, shown),
        sections="\n".join(sections),
    )
    pictures, old = folder / PICTURES, _written(folder)
    made = [path.relative_to(new) for path in new.rglob("*.png")]
    for path in made:
        if path not in old and os.path.lexists(pictures / path):
            raise ValueError(f"{pictures / path}: written by no report; move it away")
    # The earlier report is whole until here.
    for path in old:
        (pictures / path).unlink(missing_ok=True)
    for place in {(pictures / path).parent for path in old}:
        with contextlib.suppress(OSError):  # not empty, or gone
            place.rmdir()
    # The page comes before its pictures: whatever interrupts this, a page knows all files of ours.
    # Names of files need not be text at all; what is none becomes visible.
    atomic_write(folder / PAGE, page.encode("utf-8", "backslashreplace"))
    for path in made:
        (pictures / path).parent.mkdir(parents=True, exist_ok=True)
        (new / path).replace(pictures / path)
    shutil.rmtree(folder / WORK)
    return folder / PAGE


# --- which pictures -------------------------------------------------------------------------------


def _compared(rows: list[dict[str, Any]]) -> list[str]:
    """Between whom the spread counts: the models, and bicubic enlargement only beside one."""
    models = [row["model"] for row in rows if "bits_per_weight" in row]
    return models if len(models) > 1 else [row["model"] for row in rows]


def _spread(psnr: list[float]) -> float:
    low, high = min(psnr), max(psnr)
    return 0.0 if low == high else high - low  # two infinities are no further apart


def _choice(shown: int, total: int, compared: list[str]) -> str:
    """What the page says about its choice of pictures."""
    whose = " and ".join(compared) if len(compared) == 2 else "the models"
    order = f"those first where the PSNR of {whose} differs the most"
    if len(compared) == 1:
        order = "in the order of the test sets"
    if shown == total:
        return f"All {total} pictures, {order}." if total > 1 else "The only picture."
    return (
        f"{shown} of {total} pictures, {order}. --report-pictures N shows more. Being chosen so,"
        " they are no sample to judge the average by; the tables above count all pictures."
    )


# --- one picture ----------------------------------------------------------------------------------


def _section(
    number: int,
    pair: Pair,
    scale: int,
    scores: dict[str, Score],
    compared: list[str],
    files: dict[str, Path],
    folder: Path,
) -> str:
    """Write the PNG files of a picture to a folder; its part of the page."""
    _, truth = load_pair(pair, scale)
    write_image(folder / "truth.png", truth)
    errors: dict[str, Plane] = {}
    for model, file in files.items():
        shutil.copyfile(file, folder / f"{_stem(model, files)}.png")
        errors[model] = error(read_image(file), truth)
    top = scale_end(list(errors.values()))
    for model, plane in errors.items():
        path = folder / f"{_stem(model, files)}-error.png"
        atomic_write(path, error_png(plane, top))

    name, test = html.escape(pair.name), html.escape(next(iter(scores.values()))["test"])
    height, width = truth.shape[:2]
    size = f'width="{width}" height="{height}"'
    place = f"{PICTURES}/{folder.name}"
    best = {key: max(score[key] for score in scores.values()) for key in ("psnr", "ssim")}
    tiles = []
    for model in files:
        shown = html.escape(model)
        stem = f"{place}/{_stem(model, files)}"
        images = (
            f'<img class="shot" loading="lazy" decoding="async" {size} src="{stem}.png"'
            f' alt="{name}, {shown}">'
            f'<img class="error" loading="lazy" decoding="async" {size} src="{stem}-error.png"'
            f' alt="error map of {name}, {shown}">'
        )
        values = (
            f'<span class="values">{_value(scores[model]["psnr"], 2, best["psnr"])} dB'
            f" · {_value(scores[model]['ssim'], 4, best['ssim'])}</span>"
        )
        tiles.append(_tile(model, images, values))
    image = (
        f'<img class="shot" loading="lazy" decoding="async" {size} src="{place}/truth.png"'
        f' alt="{name}, {TRUTH}">'
    )
    tiles.append(_tile(TRUTH, image, '<span class="values">reference</span>', pressed=True))
    x, y = most_different([errors[model] for model in compared])
    return _fill(
        _SECTION,
        number=str(number),
        name=name,
        test=test,
        width=str(width),
        height=str(height),
        x=str(x),
        y=str(y),
        truth=f"{place}/truth.png",
        label=TRUTH,
        top=f"{top:g}",
        half=f"{top / 2:g}",
        tiles="\n".join(tiles),
    )


_SECTION = """\
<section class="picture" id="picture-{{number}}" data-x="{{x}}" data-y="{{y}}"
 data-width="{{width}}" data-height="{{height}}"
 style="--w:{{width}};--h:{{height}};--x:{{x}};--y:{{y}}">
<h3>{{name}} <small>{{test}}, {{width}} × {{height}} pixels</small></h3>
<div class="compare">
<div class="overview">
<div class="frame">
<img class="large" loading="lazy" decoding="async" width="{{width}}" height="{{height}}"
 src="{{truth}}" alt="{{name}}, {{label}}" draggable="false">
<div class="lens" tabindex="0" role="application"
 aria-label="lens on {{name}}: arrow keys move it, Shift faster, Home back"></div>
</div>
<p class="where"><b>{{label}}</b> <output></output></p>
<div class="scale"><div class="bar"></div>
<div class="ticks"><span>0</span><span>{{half}}</span><span>≥ {{top}}</span></div>
<small>|difference| of luma, in grey levels of 255</small></div>
</div>
<div class="tiles">
{{tiles}}
</div>
</div>
</section>"""


def _tile(model: str, images: str, values: str, *, pressed: bool = False) -> str:
    name = html.escape(model)
    return (
        f'<figure data-model="{name}"><button type="button" class="crop"'
        f' aria-pressed="{str(pressed).lower()}">{images}</button>'
        f'<figcaption><span class="name">{name}</span> {values}</figcaption></figure>'
    )


def _stem(model: str, files: dict[str, Path]) -> str:
    """The name of a model's files in the report: a number makes it unique."""
    return f"{list(files).index(model) + 1}-{_slug(model)}"


def _slug(name: str) -> str:
    """What of a name can stand in any URL and on any file system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:40] or "picture"


# --- error maps -----------------------------------------------------------------------------------


def error(enlarged: Picture, truth: Picture) -> Plane:
    """|luma - luma| of two pictures (H, W, 3) uint8: (H, W) float32, in grey levels of 255."""
    return np.abs(y_channel(enlarged) - y_channel(truth)).astype(np.float32)


def scale_end(errors: list[Plane]) -> float:
    """Where the colours of these error maps end, one of TOPS, for all of them together."""
    worst = max(float(np.percentile(plane, 99)) for plane in errors)
    return float(next((top for top in TOPS if top >= worst), TOPS[-1]))


def palette() -> npt.NDArray[np.uint8]:
    """The colours of an error map, (256, 3) RGB from no error to the end of the scale."""
    at = np.linspace(0, len(_ANCHORS) - 1, 256)
    channels = [np.interp(at, range(len(_ANCHORS)), channel) for channel in _ANCHORS.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def error_png(plane: Plane, top: float) -> bytes:
    """A PNG file with a palette: the index of a pixel is 255 error / top, rounded, at most 255."""
    index = np.minimum(plane * (255 / top) + 0.5, 255).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=False)
    return file.getvalue()


def most_different(errors: list[Plane]) -> tuple[int, int]:
    """(x, y), the middle of the window where the errors of the models are the furthest apart; of
    a single model, where it errs the most."""
    planes = np.stack(errors)
    apart = planes[0] if len(planes) == 1 else planes.max(axis=0) - planes.min(axis=0)
    mean = uniform_filter(apart, min(LENS, *apart.shape), mode="constant")
    y, x = np.unravel_index(int(mean.argmax()), mean.shape)
    return int(x), int(y)


# --- tables ---------------------------------------------------------------------------------------


def _models_table(rows: list[dict[str, Any]]) -> str:
    lines, headings, decimals = scoring.columns(rows)
    head = "".join(
        f'<th scope="col" class="{"name" if key == "model" else "number"}">'
        f'<button type="button">{html.escape(text)}</button></th>'
        for key, text in headings.items()
    )
    body = []
    for line in lines:
        cells = [f'<th scope="row">{html.escape(line["model"])}</th>']
        for key in list(headings)[1:]:
            value = line.get(key)
            sort = "" if value is None else f' data-value="{value}"'
            text = "–" if value is None else _value(value, decimals.get(key, 0))
            cells.append(f"<td{sort}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"


def _pictures_table(
    models: list[str],
    by_picture: dict[tuple[str, str], dict[str, Score]],
    shown: list[tuple[str, str]],
) -> str:
    """All pictures in the order of the test sets, with a link to those that the page shows."""
    head = "".join(f'<th scope="col" class="number">{html.escape(model)}</th>' for model in models)
    numbers = {key: number for number, key in enumerate(shown, 1)}
    body = []
    for key, scores in by_picture.items():
        name = html.escape("/".join(key))
        if key in numbers:
            name = f'<a href="#picture-{numbers[key]}">{name}</a>'
        best = max(score["psnr"] for score in scores.values())
        cells = "".join(
            f"<td>{_value(scores[model]['psnr'], 2, best)}"
            f" <small>{_value(scores[model]['ssim'], 4)}</small></td>"
            for model in models
        )
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    corner = '<th scope="col" class="name">picture</th>'
    return f"<thead><tr>{corner}{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"


def _value(value: float, decimals: int, best: float | None = None) -> str:
    """A number as text; bold where it is the best one."""
    text = "∞" if math.isinf(value) else f"{value:.{decimals}f}"
    return f"<b>{text}</b>" if best is not None and value == best else text


def _fill(template: str, **values: str) -> str:
    """{{name}} becomes the value, in one pass: what looks like a place in a value stays."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
