"""``python -m compsrt.upscale``: pictures in, larger pictures out.

What becomes of a picture's greys, transparency, bits, profile and EXIF stands in `photos`; how it is
cut into tiles, in `tiling`.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compsrt.cli import (
    DTYPES,
    ArgumentParser,
    SeveralErrors,
    explain,
    open_device,
    progress,
    run,
)
from compsrt.files import atomic_write


class Job(NamedTuple):
    """A picture to read and the file to write."""

    source: Path
    target: Path


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parse(argv)
    enlarger = _Enlarger(options)
    suffix = f"_x{enlarger.scale}" if options.suffix is None else options.suffix
    jobs = _plan(options.inputs, options.output, suffix)
    _check_targets(jobs, options.force)
    broken: list[str] = []
    tried = pixels = 0
    start = time.perf_counter()
    total = sum(_pixels(job.source) for job in jobs) * enlarger.scale**2
    with progress(total=total, description="upscale", unit="pixel", unit_scale=True) as bar:
        for source, target in jobs:
            tried += 1
            bar.set_postfix_str(source.name)
            try:
                content, size = enlarger(source, target, bar.update)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                text = explain(error)
                if text is None:
                    raise
                broken.append(text if str(source) in text else f"{source}: {text}")
                continue
            try:
                if target.exists() and not options.force:
                    broken.append(f"{target}: exists by now; --force overwrites")
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(target, content)
            except (ValueError, OSError) as error:
                broken.append(explain(error) or str(error))
                if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
                    continue  # something appeared where this one was to go
                break  # no room or no right to write: the next one would fail too
            pixels += size
    seconds = time.perf_counter() - start
    done = tried - len(broken)
    if broken:
        left = f", {len(jobs) - tried} were not tried" if tried < len(jobs) else ""
        summary = f"{len(broken)} of {len(jobs)} pictures failed, {done} are done{left}"
        raise SeveralErrors([*broken, *[summary] * (len(jobs) > 1)])
    speed = pixels / 1e6 / seconds
    print(
        f"{done} {'picture' if done == 1 else 'pictures'}, {pixels / 1e6:.1f} megapixels in"
        f" {seconds:.1f} s ({speed:.2f} megapixels/s)"
    )
    return {
        "pictures": [str(job.target) for job in jobs],
        "megapixels": pixels / 1e6,
        "seconds": seconds,
        "megapixels_per_second": speed,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        "compsrt.upscale",
        description="Enlarge pictures by the scale of a model. Grey stays grey, transparency stays"
        " transparent, 16 bits a channel stay 16 (PNG and TIFF), colour profile and EXIF come along,"
        " pictures are turned upright; a palette becomes the colours it stands for. Nothing is"
        " overwritten without --force, and a broken picture does not stop the others.\n\n"
        "  python -m compsrt.upscale model.safetensors photo.jpg --output large.png\n"
        "  python -m compsrt.upscale model.safetensors holiday --output large\n"
        "  python -m compsrt.upscale model.safetensors 'holiday/**/*.jpg' --output large",
    )
    what = parser.add_argument_group("pictures")
    what.add_argument("model", metavar="MODEL", help="a packed or float model file")
    what.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="pictures, folders of them (searched recursively), or patterns in quotes (*, ?, [a-z],"
        " ** for any folders)",
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
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--self-ensemble",
        action="store_true",
        help="the mean of the eight flips and rotations: a little better, eight times the work",
    )
    quality.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="what the model computes in; where float16 overflows the picture is computed again in"
        " float32, with a line that says so",
    )
    machine = parser.add_argument_group("memory and device")
    machine.add_argument(
        "--tile",
        type=_tile,
        default="auto",
        metavar="auto|N|none",
        help="work in overlapping tiles of at most N x N pixels of the input, which bounds the"
        " memory. auto: whole pictures where half of the free memory is enough, else the largest"
        " tiles it is enough for. Where memory runs out the tile is halved",
    )
    machine.add_argument(
        "--batch",
        type=int,
        default=4,
        metavar="N",
        help="tiles at a time; more of them fill a GPU when tiles are small",
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    machine.add_argument(
        "--arithmetic",
        default="auto",
        metavar="WAY",
        help="how a packed SwinIR computes: auto, fold, integer or reference",
    )
    return parser.parse_args(argv)


def _tile(word: str) -> int | str | None:
    if word == "none":
        return None
    if word == "auto":
        return word
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r} is neither auto nor none nor a number of pixels"
        ) from None


# --- one picture ----------------------------------------------------------------------------------


class _Enlarger:
    """Reads, enlarges and encodes one picture after another by the options of the command."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = open_device(options.device)
        self._load(options.dtype)
        self.scale = self.run.scale

    def _load(self, dtype: str) -> None:
        import torch

        from compsrt import checkpoint
        from compsrt.tiling import Tiled

        options = self.options
        self.dtype = dtype
        model = checkpoint.load(
            options.model, self.device, getattr(torch, dtype), options.arithmetic
        )
        try:
            self.run = Tiled(
                model, options.tile, batch=options.batch, self_ensemble=options.self_ensemble
            )
        except ValueError as error:
            raise ValueError(f"--{error}") from None  # --tile: ..., --batch: ...

    def __call__(self, source: Path, target: Path, advance: Any) -> tuple[bytes, int]:
        """The content of the target, and how many pixels it has."""
        from compsrt import photos
        from compsrt.images import IMAGE_SUFFIXES
        from compsrt.inference import enlarge_photo
        from compsrt.tiling import NotFiniteError

        file_format = IMAGE_SUFFIXES[target.suffix.lower()]
        with _warnings_about(source):
            photo = photos.check(photos.read_photo(source), self.scale, file_format)
        try:
            large = enlarge_photo(self.run, photo, advance)
        except NotFiniteError:
            if self.dtype == "float32":
                raise
            warnings.warn(
                f"{source}: {self.dtype} overflows in this model; going on in float32", stacklevel=2
            )
            self._load("float32")
            large = enlarge_photo(self.run, photo, advance)
        with _warnings_about(source):
            content = photos.encode(large, file_format)
        return content, large.size[0] * large.size[1]


@contextlib.contextmanager
def _warnings_about(source: Path) -> Iterator[None]:
    """Warnings inside name the picture."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = str(warning.message)
        text = text if str(source) in text else f"{source}: {text}"
        warnings.warn(text, warning.category, stacklevel=3)


def _pixels(source: Path) -> int:
    """Of a picture by its header; 0 if it is broken, which is reported when its turn comes."""
    from compsrt.data import header_size

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, with its name, when its turn comes
            height, width = header_size(source)
    except (ValueError, OSError):
        return 0
    return height * width


# --- which pictures -------------------------------------------------------------------------------


def _plan(inputs: list[str], output: Path, suffix: str) -> list[Job]:
    """What is read and what is written; ValueError where that is not clear."""
    from compsrt.data import IMAGE_SUFFIXES

    if os.sep in suffix:
        raise ValueError(f"--suffix {suffix}: a part of a name, without {os.sep}")
    found = [_find(word) for word in inputs]
    single = len(inputs) == 1 and Path(inputs[0]).is_file()
    if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        if not single:
            raise ValueError(f"--output {output}: one file for several pictures; name a folder")
        return [Job(found[0][1][0], output)]
    if not output.is_dir() and (output.exists() or (single and output.suffix)):
        known = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"--output {output}: neither a folder nor a picture file ({known})")
    jobs = []
    for word, (root, pictures) in zip(inputs, found, strict=True):
        if output.resolve() != root.resolve() and not Path(word).is_file():
            # An output folder below the input folder holds the results of the last time.
            pictures = [path for path in pictures if output.resolve() not in path.resolve().parents]
        below = [path.relative_to(root) for path in pictures]
        times = Counter(path.with_suffix("") for path in below)
        for source, path in zip(pictures, below, strict=True):
            # a.png and a.jpg become a.png.png and a.jpg.png, others a.png.
            stem = path.stem if times[path.with_suffix("")] == 1 else path.name
            jobs.append(Job(source, output / path.parent / f"{stem}{suffix}.png"))
    if not jobs:
        raise ValueError(f"{', '.join(inputs)}: no pictures but those in --output {output}")
    return jobs


def _find(word: str) -> tuple[Path, list[Path]]:
    """The folder that an input begins at, and the pictures that it names below it."""
    from compsrt.data import IMAGE_SUFFIXES, find_images

    if not word:
        raise ValueError("INPUT: an empty name")
    path = Path(word)
    if os.path.lexists(path) or not glob.has_magic(word):
        pictures = find_images(path)
        if path.is_dir():
            _warn_of_others(path)
        return (path if path.is_dir() else path.parent), pictures
    matches = [Path(name) for name in glob.glob(word, recursive=True)]
    pictures = [p for p in matches if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not pictures:
        what = "no picture among what it matches" if matches else "matches nothing"
        raise ValueError(f"{word}: {what}")
    plain = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return Path(*plain), sorted(pictures)


def _warn_of_others(folder: Path) -> None:
    """One line about the files of a folder that are not read."""
    from compsrt.data import IMAGE_SUFFIXES, files_below

    suffixes = [path.suffix.lower() for path in files_below(folder)]
    others = [suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES]
    if others:
        one = len(others) == 1
        what = (
            "1 file is no picture that is"
            if one
            else f"{len(others)} files are no pictures that are"
        )
        kinds = ", ".join(suffix or "no suffix" for suffix in sorted(set(others)))
        warnings.warn(f"{folder}: {what} read here: {kinds}", stacklevel=2)


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
    for folder in {job.target.parent for job in jobs}:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not there.is_dir():
            raise ValueError(f"{there}: not a folder, {folder} cannot be made there")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{there}: no permission to write there")


if __name__ == "__main__":
    sys.exit(run(main))
