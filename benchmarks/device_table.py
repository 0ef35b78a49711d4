"""`python benchmarks/device_table.py RESULT.json`: the table of whole pictures in the README, from a run of
bench_packed_model.py.

"of the limit": the time that the operations or, if these take longer, the bytes that have to move
would take at the rates of CEILINGS, over the time measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Measured on such a device, not in the same run: bf16 products of 8192^3 on random data, and large copies.
CEILINGS = {"NVIDIA H200": (788e12, 4.3e12)}  # operations, bytes a second
FLOAT = "float, compiled bf16"


def read(path: Path) -> tuple[str, dict[str, dict[str, dict]]]:
    """The device, and the figures of every form by size and batch."""
    run = json.loads(path.read_text())
    found: dict[str, dict[str, dict]] = {}
    for benchmark in run["benchmarks"]:
        size, batch, form = benchmark["param"].split("-", 2)
        found.setdefault(f"{size}, batch {batch}", {})[form] = benchmark["extra_info"]
    return run["machine_info"]["device"], found


def table(device: str, found: dict[str, dict[str, dict]]) -> str:
    operations, bytes_ = CEILINGS[device]
    titles = ["", "ms a picture", f"{FLOAT} / it", "launches", "token grids beyond", "of the limit"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for size, forms in found.items():
        lines.append([f"**{size}**", *[""] * (len(titles) - 1)])
        for form, info in forms.items():
            limit = max(info["operations"] / operations, info["bytes_moved"] / bytes_)
            times = f"{forms[FLOAT]['device_seconds'] / info['device_seconds']:.2f}x"
            lines.append([
                form,
                f"{info['milliseconds_a_picture']:.2f}",
                times,
                str(info["launches"]),
                f"{info['token_grids_beyond']:.1f}",
                f"{100 * limit / info['device_seconds']:.0f} %",
            ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(*read(Path(sys.argv[1]))))
