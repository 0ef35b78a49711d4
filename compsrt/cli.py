"""What all entry points (``python -m compsrt.NAME``) share: arguments, errors, tables, progress.

An entry point is a module with a ``main(argv) -> dict`` that does the work and returns what it
measured, and these last lines::

    if __name__ == "__main__":
        sys.exit(run(main))

The contract of every command, kept here and nowhere else:

* stdout is for people, except its last line: the returned dictionary as one JSON object. Numbers
  that are not finite become null.
* what the user can mend (a wrong value, a missing file, a full disk, too little memory) is one line
  on stderr, ``compsrt.NAME: error: ...``, and exit code 2 (a line each where `SeveralErrors` are
  raised). A traceback means a fault of ours and
  exit code 1. ``COMPSRT_DEBUG=1`` shows the traceback of the former too.
* warnings are one line each on stderr, ``compsrt.NAME: warning: ...``.
* an interrupt (Ctrl-C) is exit code 130, a reader that went away (``| head``) 141.

torch is imported only where it is used, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import numbers
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

DTYPES = ("float32", "float16", "bfloat16")  # what --dtype offers

# --- arguments ------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, keeps a description's paragraphs and indented lines, and names in the usage
    line what is required instead of repeating every option."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, "width": 100, **options})

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        if usage is None:
            # Those of a required group stay too: one of them has to be chosen.
            either = [group for group in groups if group.required]
            chosen = [action for group in either for action in group._group_actions]
            actions = list(actions)
            shown = [a for a in actions if a.required or not a.option_strings or a in chosen]
            if len(shown) < len(actions):
                options = argparse.Action(["[options]"], dest="options", nargs=0, required=True)
                shown.insert(0, options)
            actions, groups = shown, either
        # Of subcommands argparse asks for the name alone, with an empty prefix.
        prefix = "usage: python -m " if prefix is None else prefix
        super().add_usage(usage, actions, groups, prefix)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" and the False of a switch tell nobody anything.
        default = action.default
        if default is None or isinstance(default, bool) or default in ("", [], ()):
            return action.help
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            lines = paragraph.splitlines()
            if any(line[:1].isspace() for line in lines):
                paragraphs.append("\n".join(indent + line for line in lines))
            else:
                paragraphs.append(super()._fill_text(paragraph, width, indent))
        return "\n\n".join(paragraphs)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors of one line and exit code 2 that name the nearest known word.

    ``prog`` is the name of the module, ``"compsrt.train"``. Options are never abbreviated: what a
    script says today must not become ambiguous with tomorrow's option.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(prog=prog, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args=None, namespace=None):
        # Before argparse looks: it would complain first about a required option that is missing
        # only because its name is mistyped.
        args = list(sys.argv[1:] if args is None else args)
        if all(a.nargs not in (argparse.REMAINDER, argparse.PARSER) for a in self._actions):
            for word in args:
                if word == "--":
                    break
                if word.startswith("--") and " " not in word.partition("=")[0]:
                    self._check_option(word)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if word == "--":  # some versions of Python leave it here
                continue
            if word.startswith("-"):
                self._check_option(word)
            self.error(f"unexpected argument {word!r}")
        return parsed

    def error(self, message: str) -> NoReturn:
        name = self.prog.partition(" ")[0]  # without a subcommand
        self.exit(2, f"{name}: error: {_one_line(message)}\n")

    def _check_option(self, word: str) -> None:
        name = word.partition("=")[0]
        if name not in self._option_string_actions:
            known = [
                option
                for option, action in self._option_string_actions.items()
                if action.help is not argparse.SUPPRESS
            ]
            self.error(f"unknown option {name}{nearest(name, known, listed=False)}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            hint = nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"unknown choice {str(value)!r}{hint}")


def nearest(name: object, known: Iterable[object], *, listed: bool = True) -> str:
    """The end of an error message about an unknown name.

    ``"; did you mean X?"`` if a known name is close, else (unless ``listed`` is false) all known
    ones: ``"; known: A, B, C"``. To be appended directly.
    """
    names = [str(entry) for entry in known]
    folded = {entry.casefold(): entry for entry in reversed(names)}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    if close:
        return f"; did you mean {folded[close[0]]}?"
    return f"; known: {', '.join(names)}" if listed and names else ""


def open_device(name: str) -> torch.device:
    """The device that ``name`` asks for: ``auto`` (CUDA if there is any, else the CPU), ``cpu``,
    ``cuda``, ``cuda:N`` or ``mps`` (Apple's).

    Raises:
        ValueError: no such kind of device, or there is none here.
    """
    import torch

    kind, colon, index = name.partition(":")
    known = kind in ("auto", "cpu", "cuda", "mps")
    if not known or (colon and (kind != "cuda" or not index.isdecimal())):
        hint = nearest(name, ["auto", "cpu", "cuda", "cuda:0", "mps"])
        raise ValueError(f"unknown device {name!r}{hint}")
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("mps asked for but torch sees none here; use cpu or auto")
    if kind == "cuda":
        if not torch.cuda.is_available():
            if torch.version.cuda is None and torch.version.hip is None:
                why = f"torch {torch.__version__} is built without CUDA"
            else:
                why = "torch sees no CUDA device (see: python -m compsrt.env)"
            raise ValueError(f"{name} asked for but there is none: {why}; use cpu or auto")
        count = torch.cuda.device_count()
        if colon and int(index) >= count:
            last = "" if count == 1 else f" to cuda:{count - 1}"
            raise ValueError(f"{name} asked for but there is only cuda:0{last}")
    return torch.device(name)


# --- running an entry point -----------------------------------------------------------------------


def run(
    main: Callable[[Sequence[str] | None], Mapping[str, Any] | None],
    argv: Sequence[str] | None = None,
    *,
    name: str | None = None,
) -> int:
    """Run an entry point by the contract at the top of this file and return its exit code.

    Args:
        main: parses ``argv``, works, returns what the last line of stdout reports. None reports
            nothing (the ranks of a distributed run other than the first).
        argv: the arguments without the program's name; None means ``sys.argv[1:]``.
        name: the command's name in messages; None means the module that runs, ``compsrt.train``.
    """
    name = name or _running_module()
    with _warnings_in_one_line(name):
        try:
            report = main(argv)
            if report is not None:
                print(json.dumps(_jsonable(report), allow_nan=False))
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        except KeyboardInterrupt:
            _say(f"{name}: interrupted")
            return 130
        except BrokenPipeError:
            _abandon_stdout()
            return 141
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            message = explain(error)
            if message is None:
                raise
            if _debugging():
                traceback.print_exc()
            for line in error.messages if isinstance(error, SeveralErrors) else [message]:
                _say(f"{name}: error: {_one_line(line)}")
            _abandon_stdout()
            return 2
    return 0


class SeveralErrors(ValueError):
    """What went wrong with parts of the work while the rest was done: one line each."""

    def __init__(self, messages: Sequence[str]):
        super().__init__("; ".join(messages))
        self.messages = tuple(messages)


def explain(error: Exception) -> str | None:
    """What to tell the user about an error that is his to mend; None if it is ours."""
    if is_out_of_memory(error):
        size = re.search(r"to allocate (\d[\d.]* \w+)", str(error))
        wanted = f" ({size[1]} more were asked for)" if size else ""
        return f"out of memory{wanted}; smaller tiles, pictures or batches need less"
    if isinstance(error, OSError) and error.strerror is not None:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        if error.filename is None:
            return reason
        # Of a rename or copy that failed the second name is the one that was to be written.
        place = error.filename if error.filename2 is None else error.filename2
        return f"{place if isinstance(place, int) else os.fsdecode(place)}: {reason}"
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was asked for in vain, on the host or on a device."""
    if isinstance(error, MemoryError):
        return True
    # No error of torch without torch, so there is no need to import it for this.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError that names its allocator; so do CUDA's libraries.
    signs = (
        "DefaultCPUAllocator",
        "CUDA error: out of memory",
        "_STATUS_ALLOC_FAILED",
        "MPS backend out of memory",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _running_module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name.startswith("compsrt."):
        return spec.name
    return Path(sys.argv[0]).stem or "compsrt"


def _debugging() -> bool:
    return os.environ.get("COMPSRT_DEBUG", "") not in ("", "0")


@contextlib.contextmanager
def _warnings_in_one_line(name: str) -> Iterator[None]:
    def show(message, category, filename, lineno, file=None, line=None) -> None:
        place = f" ({category.__name__}, {filename}:{lineno})" if _debugging() else ""
        _say(f"{name}: warning: {_one_line(str(message))}{place}", file)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _say(line: str, file: Any = None) -> None:
    """One line on stderr, above a progress bar if one is being drawn."""
    stream = file or sys.stderr
    if stream is not None:
        tqdm.write(line, file=stream)


def _abandon_stdout() -> None:
    """Drop what stdout still holds if it cannot be written: the interpreter would try again on its
    way out and complain a second time."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def _one_line(text: str) -> str:
    """Line breaks become spaces, and control characters (of a file's name, say) become visible."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line
    )


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and scalars
        return _jsonable(value.tolist())
    return str(value)  # torch.device, torch.dtype


# --- what people read -----------------------------------------------------------------------------


def format_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str] | Mapping[str, str],
    *,
    decimals: int | Mapping[str, int] | None = None,
    markdown: bool = False,
) -> str:
    """Rows as an aligned table of plain text, or as a Markdown table that is aligned too.

    Args:
        rows: one mapping a row; what a row lacks or holds as None is shown as ``-``.
        columns: the keys to show, in order, or a mapping from key to heading.
        decimals: digits after the point, for all columns or by key. Without it floats are shown
            with six significant digits and integers as they are.
        markdown: pipes and a line of dashes instead of two spaces between columns.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    digits = decimals if isinstance(decimals, Mapping) else dict.fromkeys(headings, decimals)
    table = [[_cell(text, None, markdown) for text in headings.values()]]
    table += [[_cell(row.get(key), digits.get(key), markdown) for key in headings] for row in rows]
    layout = [
        (max(3 if markdown else 1, *(len(line[i]) for line in table)), _is_numeric(rows, key))
        for i, key in enumerate(headings)
    ]
    rule = ["-" * (width - 1) + (":" if markdown and right else "-") for width, right in layout]
    lines = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, (width, right) in pairs]
        for pairs in (zip(cells, layout, strict=True) for cells in [table[0], rule, *table[1:]])
    ]
    if markdown:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _is_numeric(rows: Iterable[Mapping[str, object]], key: str) -> bool:
    present = [row[key] for row in rows if row.get(key) is not None]
    numbers_only = all(hasattr(v, "__float__") and not isinstance(v, bool) for v in present)
    return bool(present) and numbers_only


def _cell(value: Any, digits: int | None, markdown: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "__float__"):
        if digits is not None:
            return f"{float(value):.{digits}f}"
        return str(value) if isinstance(value, numbers.Integral) else f"{float(value):.6g}"
    text = _one_line(str(value))
    return text.replace("|", "\\|") if markdown else text


def progress(
    iterable: Iterable[T] | None = None,
    *,
    total: float | None = None,
    description: str = "",
    unit: str = "it",
    initial: int = 0,
    unit_scale: bool = False,
) -> tqdm:
    """A progress bar on stderr that leaves nothing behind; silent where stderr is no terminal.

    unit_scale: large numbers as thousands and millions of the unit.

    With an iterable: iterate over the result. Without one: use it as a context manager and call its
    ``update(n)`` and ``set_postfix_str(text)``.
    """
    return tqdm(
        iterable,
        total=total,
        desc=description or None,
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        leave=False,
        disable=None,
        dynamic_ncols=True,
        file=sys.stderr,
    )
