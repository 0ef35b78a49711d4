"""``python -m compsrt.upscale``: pictures in, larger pictures out."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compsrt.cli import ArgumentParser, open_device, progress, run
from compsrt.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
WITH_ALPHA = ("PNG", "WEBP", "TIFF")


class Job(NamedTuple):
    """A picture to read and the file to write."""

    source: Path
    target: Path


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parse(argv)
    from compsrt import checkpoint
    from compsrt.inference import OVERLAP, super_resolve

    if options.tile is not None and options.tile < 2 * OVERLAP:
        raise ValueError(f"--tile {options.tile}: at least {2 * OVERLAP} pixels are needed")
    model: Any = checkpoint.load(options.model, open_device(options.device))
    suffix = f"_x{model.scale}" if options.suffix is None else options.suffix
    jobs = _plan([Path(name) for name in options.inputs], options.output, suffix)
    _check_targets(jobs, options.force)
    broken, pixels, start = [], 0, time.perf_counter()
    for source, target in progress(jobs, description="upscale", unit="image"):
        try:
            picture = super_resolve(model, _read(source), options.tile)
            content = _encoded(picture, target)
        except (ValueError, OSError) as error:
            text = str(error)
            broken.append(text if str(source) in text else f"{source}: {text}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, content)
        pixels += picture.width * picture.height
    seconds = time.perf_counter() - start
    done = len(jobs) - len(broken)
    if broken:
        rest = f" (the other {done} of {len(jobs)} pictures are done)" if done else ""
        raise ValueError("; ".join(broken) + rest)
    print(f"{done} pictures, {pixels / 1e6:.1f} megapixels in {seconds:.1f} s")
    return {
        "pictures": [str(job.target) for job in jobs],
        "megapixels": pixels / 1e6,
        "seconds": seconds,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        "compsrt.upscale",
        description="Enlarge pictures by the scale of a model. Grey stays grey, transparency stays"
        " transparent, and nothing is overwritten without --force.",
    )
    what = parser.add_argument_group("pictures")
    what.add_argument("model", metavar="MODEL", help="a packed or float model file")
    what.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="pictures, or folders of them (searched recursively)",
    )
    what.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR_OR_FILE",
        help="a folder for PNG files, or for one picture a file (.png, .jpg, .webp, .bmp, .tif)",
    )
    what.add_argument(
        "--suffix",
        metavar="TEXT",
        help="added to the names in a folder (default: _x and the scale)",
    )
    what.add_argument("--force", action="store_true", help="overwrite files that exist")
    machine = parser.add_argument_group("memory and device")
    machine.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="work in tiles of N x N pixels of the input, for pictures too large for the memory",
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def _plan(inputs: list[Path], output: Path, suffix: str) -> list[Job]:
    """What is read and what is written; ValueError where that is not clear."""
    from compsrt.data import IMAGE_SUFFIXES, find_images

    single = len(inputs) == 1 and not inputs[0].is_dir()
    if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        if not single:
            raise ValueError(f"--output {output}: one file for several pictures; name a folder")
        return [Job(find_images(inputs[0])[0], output)]
    if not output.is_dir() and (output.exists() or (single and output.suffix)):
        known = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"--output {output}: neither a folder nor a picture file ({known})")
    jobs = []
    for root in inputs:
        found = find_images(root)
        if root.is_dir() and output.resolve() != root.resolve():
            # An output folder below the input folder holds the results of the last time.
            found = [path for path in found if output.resolve() not in path.resolve().parents]
        below = [path.relative_to(root) if root.is_dir() else Path(path.name) for path in found]
        times = Counter(path.with_suffix("") for path in below)
        for source, path in zip(found, below, strict=True):
            # a.png and a.jpg become a.png.png and a.jpg.png, others a.png.
            stem = path.stem if times[path.with_suffix("")] == 1 else path.name
            jobs.append(Job(source, output / path.parent / f"{stem}{suffix}.png"))
    return jobs


def _check_targets(jobs: list[Job], force: bool) -> None:
    sources = {job.source.resolve() for job in jobs}
    seen: dict[Path, Path] = {}
    for source, target in jobs:
        if target in seen:
            raise ValueError(f"{target}: would be written for {seen[target]} and for {source}")
        seen[target] = source
        if target.resolve() in sources:
            raise ValueError(f"{target}: would overwrite a picture that is read; use a --suffix")
    existing = [job.target for job in jobs if job.target.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise ValueError(f"{existing[0]}{more}: exists; --force overwrites")


def _read(path: Path) -> Image.Image:
    """A picture as it is, upright; damage is reported as `read_image` reports it."""
    from PIL import Image, ImageOps

    from compsrt.data import read_image

    pixels = read_image(path)
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # grey of 16 bits, reduced to 8 with a warning
            return Image.fromarray(pixels[:, :, 0])
        return ImageOps.exif_transpose(image)


def _encoded(image: Image.Image, target: Path) -> bytes:
    """A picture as a file of the format that the target's name asks for."""
    import io

    from compsrt.data import IMAGE_SUFFIXES

    kind = IMAGE_SUFFIXES[target.suffix.lower()]
    if image.mode.endswith("A") and kind not in WITH_ALPHA:
        raise ValueError(f"{kind} holds no transparency: write a PNG file instead")
    file = io.BytesIO()
    image.save(file, kind, **SAVE_OPTIONS.get(kind, {}))
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(run(main))
