"""A network on a CUDA device without the cost of its launches: recorded once a shape, then replayed.

A CUDA graph holds the launches of one call, with the addresses they work on: a replay copies the
input to its place, sends all launches at once, and copies the output out. A shape is recorded when it
comes the second time, so that a folder of pictures that all differ records nothing, and the graphs
of the shapes that came last are kept. All share one pool of memory. What the first call of a shape
takes, compilation and all, and what recording takes, is said (`said`) on stderr by the logger
"compsrt". A shape that cannot be recorded, for want of memory or because an operation waits for the
device, goes on without, and a warning says so. Threads take turns; they share one stream.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.reference.windows import is_recording
from ..quantizers import observing

SHAPES = 4  # whose graphs are kept
SEEN = 64  # shapes that are remembered
SAID = 1.0  # seconds above which a first call is worth a line

_log = logging.getLogger("compsrt")


class Recording(NamedTuple):
    graph: Any
    input: Tensor
    output: Tensor


class Replay(nn.Module):
    """Calls a function of one tensor, on a CUDA device through a graph a shape.

    It has no state of its own that would be saved, copied or moved: a model that is copied, moved or
    converted records anew.
    """

    def __init__(self, shapes: int = SHAPES):
        super().__init__()
        self.shapes = shapes
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether it may be recorded
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo) -> Replay:
        return Replay(self.shapes)

    def __reduce__(self):
        return Replay, (self.shapes,)

    def forward(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x), which may depend on nothing else that changes."""
        gradients = torch.is_grad_enabled() and x.requires_grad
        # An observer would see nothing of what is replayed.
        direct = gradients or observing() or torch.compiler.is_compiling()
        if direct or not x.is_cuda or is_recording():
            return function(x)
        with self._lock:
            return self._called(function, x)

    def _called(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        key = x.shape, x.dtype, x.device
        if key in self._recordings:
            self._recordings.move_to_end(key)
            return self._replayed(self._recordings[key], x)
        size = "x".join(map(str, x.shape))
        if key not in self._seen:
            self._seen[key] = True
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            return said(f"first picture of {size}", x.device, self._direct, function, x)
        if not self._seen[key]:
            return self._direct(function, x)
        while len(self._recordings) >= self.shapes:
            # As if it had not come yet: more shapes in turn than are kept are not recorded each time.
            oldest, _ = self._recordings.popitem(last=False)
            self._seen.pop(oldest, None)
        try:
            made = said(f"launches recorded for {size}", x.device, self._record, function, x)
        except RuntimeError as error:
            self._seen[key] = False
            why = str(error).partition("\n")[0]
            warnings.warn(f"launches for {size} are not recorded: {why}", stacklevel=2)
        else:
            self._recordings[key] = made
            return self._replayed(made, x)
        return self._direct(function, x)  # here the error holds on to no memory

    def _direct(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        try:
            return function(x)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        self._forget()  # nothing else can use the memory of recordings
        torch.cuda.empty_cache()
        return function(x)

    @staticmethod
    def _replayed(recording: Recording, x: Tensor) -> Tensor:
        recording.input.copy_(x)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # Outside of inference mode, so that a call outside of it may write to what is recorded.
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            # A stream for each device; the default of torch.cuda.graph is on the first that it saw.
            self._stream = self._stream or torch.cuda.Stream()
            place = x.clone(memory_format=torch.contiguous_format)
            function(place)  # what is compiled for these strides cannot be compiled while recording
            # The outer stream is put back even where the end of a recording fails.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ),
            ):
                output = function(place)
        self._pool = graph.pool()
        return Recording(graph, place, output)


def said(what: str, device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), and a line on stderr if it took the device more than a second."""
    began = time.perf_counter()
    result = function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    if seconds > SAID:
        _log.warning("%s on %s: %.1f s, once", what, device, seconds)
    return result
