"""Where residuals wait that have left the device: memory of the host, or a file.

What is put away leaves a ticket, a tensor of one number, which autograd keeps in its place. The bytes live as long as
the ticket does: a graph that is kept may be read again, and one that is dropped gives its room back.

On the way to a file bytes are copied once, into aligned memory, and written by a thread; another one reads them before
they are asked for: what was put away last is read first. The file has no name, so that nothing is left of a killed
process and nobody can remove it. It bypasses the page cache where the file system allows that. From a CUDA device a
stream of its own copies to pinned memory and back. (SSDTrain, Wu et al. 2024, arXiv 2408.10013, moves residuals in full
to NVMe.)
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

HOST = "host"
_PAGE = 4096
_WAITING = 2**26
"""Bytes that wait to be written, and that are read ahead, at most."""


class OffloadError(RuntimeError):
    """Residuals that cannot leave the device, or not come back; the message states rule, value and remedy."""


def put_away(x: Tensor, where: str) -> Tensor:
    """Take a copy of a tensor away; return the ticket to bring it back.

    Args:
        where: ``host``, or the path of a folder.

    Raises:
        OffloadError: the folder is missing or full.
    """
    return _store(where).put(x.contiguous())


def bring_back(
    ticket: Tensor, size: Sequence[int], dtype: torch.dtype, device: torch.device, where: str
) -> Tensor:
    """Return what was put away, in memory of its own; the ticket stays valid.

    Raises:
        OffloadError: it could not be written or read.
    """
    return _store(where).get(int(ticket.item())).view(dtype).view(tuple(size))


def _store(where: str) -> _Files | _Pinned:
    """Return the store of a place; a forked process has its own."""
    key = where, os.getpid()
    with _LOCK:
        if key not in _STORES:
            _STORES[key] = _Pinned() if where == HOST else _Files(where)
        return _STORES[key]


_STORES: dict[tuple[str, int], _Files | _Pinned] = {}
_LOCK = threading.Lock()


def _ticket(number: int, when_dropped: Callable[[int], None]) -> Tensor:
    array = np.array([number])
    weakref.finalize(array, when_dropped, number)  # the tensor's memory holds the array
    return torch.from_numpy(array)


class _Files:
    """Bytes in one file of a folder.

    Attributes:
        entries: by number, in the order in which they were put.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.entries = folder, dict[int, _Entry]()
        self._descriptor = _open(folder)
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._end, self._free = 0, dict[int, list[int]]()
        self._dropped = collections.deque[int]()  # the collector may drop a ticket while the lock is held
        self._writer, self._reader = (ThreadPoolExecutor(1, f"wtacrs-{name}") for name in ("write", "read"))

    def put(self, x: Tensor) -> Tensor:
        self.sweep()
        source = x.detach().view(-1).view(torch.uint8)
        entry = _Entry(source.numel(), self._take(_rounded(source.numel())))
        buffer = mmap.mmap(-1, _rounded(entry.size))
        torch.frombuffer(buffer, dtype=torch.uint8)[: entry.size].copy_(source)
        self._wait_for_room(entry.size)
        entry.write = self._writer.submit(self._write, buffer, entry)
        number = next(self._numbers)
        with self._lock:
            self.entries[number] = entry
        return _ticket(number, self._dropped.append)

    def get(self, number: int) -> Tensor:
        self.sweep()
        with self._lock:
            entry = self.entries[number]
            ahead, entry.read = entry.read, None
        self._finish(entry.write)
        buffer = self._finish(ahead or self._reader.submit(self._read, entry))
        self._read_ahead(number)
        return torch.frombuffer(buffer, dtype=torch.uint8)[: entry.size]

    def _finish(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except OSError as error:
            raise OffloadError(
                f"residuals were to wait in a file in {self.folder!r}, which cannot be written or read "
                f"({error.strerror}); give Policy(offload=...) another folder, or none"
            ) from error

    def _wait_for_room(self, size: int) -> None:
        """Let what was put before be written, until little waits."""
        with self._lock:
            waiting = [entry for entry in self.entries.values() if not entry.write.done()]
        while waiting and size + sum(entry.size for entry in waiting) > _WAITING:
            self._finish(waiting.pop(0).write)

    def _read_ahead(self, number: int) -> None:
        """Read what is likely to be asked for next: what was put before this, the last first."""
        with self._lock:
            room = _WAITING - sum(entry.size for entry in self.entries.values() if entry.read)
            for before in reversed([known for known in self.entries if known < number]):
                entry = self.entries[before]
                room -= 0 if entry.read else entry.size
                if room < 0:
                    break
                if entry.read is None and entry.write.done():
                    entry.read = self._reader.submit(self._read, entry)

    def _write(self, buffer: mmap.mmap, entry: _Entry) -> None:
        view, done = memoryview(buffer), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], entry.place + done)

    def _read(self, entry: _Entry) -> mmap.mmap:
        buffer, done = mmap.mmap(-1, _rounded(entry.size)), 0
        view = memoryview(buffer)
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], entry.place + done)
            if not count:
                raise OSError(0, "the file is shorter than what was written")
            done += count
        return buffer

    def _take(self, size: int) -> int:
        """Return a place in the file for so many bytes, which are there for sure."""
        with self._lock:
            if self._free.get(size):
                return self._free[size].pop()
            place = self._end
            try:
                os.posix_fallocate(self._descriptor, place, size)
            except OSError as error:
                raise OffloadError(
                    f"the folder {self.folder!r} must have room for all that waits there at once, "
                    f"{place + size} bytes by now, but it is full ({error.strerror}); "
                    f"give Policy(offload=...) another folder, or none"
                ) from error
            self._end += size
            return place

    def close(self) -> None:
        """End the threads and remove the file, with all that waits in it."""
        self._writer.shutdown()
        self._reader.shutdown()
        os.close(self._descriptor)

    def sweep(self) -> None:
        """Give back the room of what nobody can ask for any more, once nothing writes to it or reads it."""
        while self._dropped:
            with contextlib.suppress(IndexError):  # another thread was first
                number = self._dropped.popleft()
                with self._lock:
                    entry = self.entries.pop(number)
                (entry.read or entry.write).add_done_callback(functools.partial(self._give_back, entry))

    def _give_back(self, entry: _Entry, done: Future[Any]) -> None:
        with self._lock:
            self._free.setdefault(_rounded(entry.size), []).append(entry.place)


class _Entry:
    """Bytes at a place of the file, with what writes them and what reads them ahead."""

    def __init__(self, size: int, place: int) -> None:
        self.size, self.place = size, place
        self.write: Future[None]
        self.read: Future[mmap.mmap] | None = None


def _rounded(size: int) -> int:
    return max(_PAGE, -(-size // _PAGE) * _PAGE)


def _open(folder: str) -> int:
    """Open a file without a name in a folder."""
    flags = os.O_RDWR | os.O_CLOEXEC
    for more in (getattr(os, "O_DIRECT", 0), 0):
        with contextlib.suppress(OSError, AttributeError):
            return os.open(folder, flags | os.O_TMPFILE | more, 0o600)
    try:
        descriptor, name = tempfile.mkstemp(dir=folder)
    except OSError as error:
        raise OffloadError(
            f"residuals are to wait in a folder that can be written to, got {folder!r} ({error.strerror}); "
            f"make it, or give Policy(offload='disk:<folder>') another one"
        ) from error
    os.unlink(name)
    return descriptor


class _Pinned:
    """Pinned memory of the host, to which and from which a stream of its own copies."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, torch.device, torch.cuda.Event]] = {}
        self._ahead: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._numbers = itertools.count()

    @functools.cache  # noqa: B019  # one stream a device, as long as the process
    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def put(self, x: Tensor) -> Tensor:
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            away = torch.empty(x.numel() * x.element_size(), dtype=torch.uint8, pin_memory=True)
            away.copy_(x.view(-1).view(torch.uint8), non_blocking=True)
            x.record_stream(stream)
        number = next(self._numbers)
        self._kept[number] = away, x.device, stream.record_event()
        return _ticket(number, self._drop)

    def get(self, number: int) -> Tensor:
        back, event = self._ahead.pop(number) if number in self._ahead else self._copy(number)
        current = torch.cuda.current_stream(back.device)
        current.wait_event(event)
        back.record_stream(current)
        waiting = sum(x.numel() for x, _ in self._ahead.values())
        for before in reversed([known for known in list(self._kept) if known < number]):
            waiting += 0 if before in self._ahead else self._kept[before][0].numel()
            if waiting > _WAITING:
                break
            if before not in self._ahead:
                self._ahead[before] = self._copy(before)
        return back

    def _copy(self, number: int) -> tuple[Tensor, torch.cuda.Event]:
        away, device, written = self._kept[number]
        stream = self._stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(written)
            back = torch.empty_like(away, device=device, pin_memory=False)
            back.copy_(away, non_blocking=True)
            return back, stream.record_event()

    def _drop(self, number: int) -> None:
        self._kept.pop(number, None)
        self._ahead.pop(number, None)


def measure_writing(where: str) -> float:
    """Return how many bytes a second a folder takes."""
    store, size = _Files(where), 2**25
    x = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    tickets = [store.put(x) for _ in range(3)]
    for entry in list(store.entries.values()):
        entry.write.result()
    seconds = time.perf_counter() - began
    store.close()
    return len(tickets) * size / seconds
