"""``python -m compsrt.export``: a model as a file for other runtimes, TFLite or ONNX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compsrt.cli import ArgumentParser, run
from compsrt.files import atomic_write

if TYPE_CHECKING:
    from compsrt.exporting import ExportedFile

INPUT_SIDES = 1080, 1920  # of a TFLite file, unless --height and --width say otherwise


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parse(argv)
    from compsrt import checkpoint, exporting

    targets = {kind: getattr(options, kind) for kind in ("tflite", "onnx")}
    targets = {kind: path for kind, path in targets.items() if path is not None}
    _check_targets(options.model, list(targets.values()), options.force)
    model: Any = checkpoint.load(options.model, arithmetic="reference")
    files = {kind: _convert(model, kind, options) for kind in targets}
    for kind, file in files.items():
        atomic_write(targets[kind], file.content)
        ends = (f"{end.name} {end.type} {_sizes(end.shape)}" for end in (file.input, file.output))
        print(f"{targets[kind]}: {len(file.content) / 1e3:.1f} kB, {' -> '.join(ends)}")
    return {
        "model": options.model,
        **exporting.description(model),
        "files": [
            {
                "path": targets[kind],
                "format": kind,
                "bytes": len(file.content),
                "weights": file.weights,
                "inputs": [file.input._asdict()],
                "outputs": [file.output._asdict()],
            }
            for kind, file in files.items()
        ],
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        "compsrt.export",
        description="Write a model for other runtimes. TFLite is for SESR: all int8, with the"
        " learned scales, of a model with 8-bit weights and activations; float32 of a float model."
        " ONNX is for every network and any size of picture: integers (QDQ) of a SESR with 8 bits,"
        " float32 otherwise. SESR takes and gives luma (Y of BT.601), other networks take and give"
        " RGB in [0, 1].\n\n"
        'The packages for it: pip install "compsrt[export]"\n\nExample:\n\n'
        "  python -m compsrt.export --tflite sesr.tflite --onnx sesr.onnx sesr_8bit.safetensors",
    )
    parser.add_argument("model", metavar="MODEL", help="a packed or float model file")
    parser.add_argument("--tflite", type=Path, metavar="FILE", help="the TFLite file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="the ONNX file to write")
    size = parser.add_argument_group("size of the picture that goes in, in pixels (TFLite)")
    size.add_argument("--height", type=int, metavar="N", help="(default: 1080)")
    size.add_argument("--width", type=int, metavar="N", help="(default: 1920)")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    options = parser.parse_args(argv)
    if options.tflite is None and options.onnx is None:
        parser.error("nothing to write: give --tflite FILE, --onnx FILE or both")
    if (options.height is None) != (options.width is None):
        parser.error("--height and --width go together")
    if options.height is not None and options.tflite is None:
        parser.error("--height and --width are of TFLite files; ONNX files take any size")
    if options.height is not None and min(options.height, options.width) < 1:
        parser.error(f"--height {options.height} --width {options.width}: at least 1 pixel each")
    return options


def _check_targets(model: str, targets: list[Path], force: bool) -> None:
    """ValueError for what must not be written, FileNotFoundError for a folder that is not there."""
    if len({target.resolve() for target in targets}) < len(targets):
        raise ValueError(f"{targets[0]}: would be written twice")
    for target in targets:
        if target.resolve() == Path(model).resolve():
            raise ValueError(f"{target}: would overwrite the model")
        if target.is_dir():
            raise ValueError(f"{target}: a folder; name a file")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent}: no such folder, to write {target.name} to")
        if target.exists() and not force:
            raise ValueError(f"{target}: exists; --force overwrites")


def _convert(model: Any, kind: str, options: argparse.Namespace) -> ExportedFile:
    try:
        if kind == "onnx":
            return _onnx_file(model)
        from compsrt.exporting.tflite import tflite_file

        height, width = INPUT_SIDES
        return tflite_file(model, options.height or height, options.width or width)
    except ValueError as error:
        reason = str(error).removeprefix("model: ")
        raise ValueError(f"--{kind} of {options.model}: {reason}") from None


def _onnx_file(model: Any) -> ExportedFile:
    from compsrt.exporting import bits_of, onnx_integer, onnx_traced, sesr_graph
    from compsrt.models.sesr import SESR

    if isinstance(model, SESR) and bits_of(model) == sesr_graph.BITS:
        return onnx_integer.integer_onnx_file(model)
    return onnx_traced.traced_onnx_file(model)


def _sizes(shape: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, shape))


if __name__ == "__main__":
    sys.exit(run(main))
