"""An open model file: its checked header, and its tensors as views of the one copy the host has."""

from __future__ import annotations

import bisect
import mmap
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..raylight.config import READERS, ModelSpec
from ..raylight.errors import LoadError
from .files import changed, fill, open_file, read_into
from .header import Entry, Header, prefixed, read_header, reshaped
from .parts import joined

PAGE = 4096
"""Every file begins at a multiple of it, so that what is aligned in one is so in all."""
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Linux refuses a map with more pages that could be written than there is memory, unless it is told that few will be.
Python has its name from 3.13 on."""


@dataclass(frozen=True)
class FileRef:
    """One tensor of a file, by place: equal refs are equal bytes as long as the file is what it was."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def file(self) -> tuple[str, int, int, int]:
        """Identity of the file alone."""
        return (self.path, self.size, self.mtime_ns, self.inode)


class OpenFile:
    """One file of a model.

    Args:
        start: where its bytes begin among those of all the model's files.
        shapes: see Source.
        prefix: of the names of its tensors among those of all files.

    Attributes:
        identity: path, size, mtime_ns and inode, as it was opened.
        header: its own, checked.
    """

    def __init__(self, path: str, start: int, shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> None:
        self.path, self.start, self._prefix = path, start, prefix
        fd = self.fd = open_file(path)
        self._close = weakref.finalize(self, os.close, fd)
        stat = os.fstat(fd)
        self.identity = (path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        self.header: Header = prefixed(reshaped(read_header(path, fd), shapes), prefix)

    def own(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those that are this file's, by their names in it."""
        return {name.removeprefix(self._prefix): tensors[name] for name in self.header.entries}

    def check(self) -> None:
        """See Source.check."""
        stat, (_, size, mtime_ns, _) = os.fstat(self.fd), self.identity
        if (stat.st_size, stat.st_mtime_ns) != (size, mtime_ns):
            raise changed(self.path, f"size {size} -> {stat.st_size}")

    def mapped(self) -> torch.Tensor:
        """Its bytes: the page cache's, until they are written into."""
        try:
            mapped = mmap.mmap(
                self.fd, self.header.size, mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:  # a kernel that counts every page that could be written (vm.overcommit_memory 2)
            raise LoadError(
                f"{os.path.basename(self.path)} cannot be mapped",
                str(error),
                "Let the system promise more memory than it has (vm.overcommit_memory 0 or 1), or add swap",
            ) from error
        with torch.inference_mode(False):
            return torch.frombuffer(mapped, dtype=torch.uint8)

    def read(self) -> torch.Tensor:
        """Its bytes, in memory of this process alone."""
        with torch.inference_mode(False):
            whole = torch.empty(self.header.size, dtype=torch.uint8)
        read_into(self.fd, self.path, 0, whole)
        return whole


class Source:
    """A model of one file, or of several, of which nothing is copied: `tensors` are views of maps.

    The page cache is the host's only copy, whatever the number of processes that open the same file. Who writes into
    a tensor gets pages of his own, of which the file and other processes see nothing; `writing` says so here, since
    such a tensor is not the file's bytes any more.

    Args:
        paths: a safetensors or GGUF file, or all parts of a model in order.
        reader: "map"; "private" reads it into this process's own memory, for filesystems that map badly.
        shapes: of tensors that are to have other ones than in the file.
        apart: the files are no parts of one model, and may have tensors of the same name: all names begin with the
            number of their file.

    Attributes:
        path: of the first file.
        header: the checked headers as one: offsets are those in all files, one after another.
        tensors: by name, in file order. Quantised GGUF blocks are flat uint8, everything else has its shape.

    Raises:
        LoadError: the file is missing, damaged, of another kind, or changed while it was read.
    """

    def __init__(
        self,
        *paths: str,
        reader: str = "map",
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        apart: bool = False,
    ) -> None:
        assert reader in READERS and paths
        self.path = paths[0]
        self.files: list[OpenFile] = []
        start = 0
        for number, path in enumerate(paths):
            self.files.append(OpenFile(path, start, shapes or {}, f"{number}:" if apart else ""))
            start += -(-self.files[-1].header.size // PAGE) * PAGE
        self.header: Header = joined([file.header for file in self.files], [file.start for file in self.files])
        self._ranges: list[tuple[int, int, int]] = []  # address, end, offset in the files; sorted
        self._written: list[tuple[int, int]] = []  # address, end
        self._names: dict[tuple[int, torch.dtype, tuple[int, ...]], str] = {}  # by place, once one is asked for
        self.tensors: Mapping[str, torch.Tensor] = {}
        for file in self.files:
            whole = file.mapped() if reader == "map" else file.read()
            self._ranges.append((whole.data_ptr(), whole.data_ptr() + whole.numel(), file.start))
            self.tensors |= {name: _view(whole, entry) for name, entry in file.header.entries.items()}
        self._ranges.sort()
        self.check()

    @classmethod
    def of(cls, spec: ModelSpec) -> Source:
        """The files that a spec names.

        Raises:
            LoadError: as above, or another file is there by now.
        """
        if spec.now() != spec:
            raise changed(spec.path, "it is not the file that was chosen any more")
        return cls(*spec.paths, reader=spec.reader, shapes=dict(spec.shapes), apart=bool(spec.encoder))

    def fill(self, start: int, target: memoryview) -> None:
        """Fill a buffer with bytes of one tensor, by where they are as `offset` has it; for readers of their own.

        Raises:
            LoadError: the file ends before the buffer does: it was truncated.
        """
        file = self._file_at(start)
        fill(file.fd, file.path, start - file.start, target)

    def check(self) -> None:
        """Refuse to go on with files of which one was truncated or overwritten since it was opened.

        Costs a microsecond. Reading a page that a truncation took away would end the process.

        Raises:
            LoadError: it changed.
        """
        for file in self.files:
            file.check()

    def offset(self, tensor: torch.Tensor) -> int | None:
        """Where in the file a tensor's bytes are; None where they are not this file's, or not any more."""
        place = self._place(tensor)
        if place is None or not self._written:
            return place
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        return None if any(start < stop and begin < end for begin, stop in self._written) else place

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is the map, or what was read in its place, whatever was written there."""
        return self._place(tensor) is not None

    def writing(self, tensor: torch.Tensor) -> None:
        """Note that something writes into a tensor; does nothing where it is not in this file's memory."""
        if tensor.device.type != "cpu" or tensor.is_meta or not tensor.numel():
            return
        start = tensor.data_ptr()
        # from the first to the last element, where they do not follow each other
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = start + (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
        if (start, end) not in self._written and any(start < stop and begin < end for begin, stop, _ in self._ranges):
            self._written.append((start, end))

    def _place(self, tensor: torch.Tensor) -> int | None:
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._ranges, (address, float("inf"), 0)) - 1
        if index < 0:
            return None
        start, end, at = self._ranges[index]
        return at + address - start if address + tensor.nbytes <= end and tensor.is_contiguous() else None

    def ref(self, name: str) -> FileRef:
        """Names a tensor for another process of this host."""
        entry = self.header.entries[name]
        file = self._file_at(entry.start)
        return FileRef(*file.identity, entry.start - file.start, entry.dtype, entry.shape)

    def resolve(self, ref: FileRef) -> torch.Tensor:
        """The tensor another process named.

        Raises:
            LoadError: the file is not the one that was meant.
        """
        (file,) = self.files
        if ref.file != file.identity:
            raise changed(self.path, "it was replaced")
        if not self._names:
            entries = self.header.entries.items()
            self._names = {(entry.start, entry.dtype, entry.shape): name for name, entry in entries}
        name = self._names.get((ref.start, ref.dtype, ref.shape))
        if name is None:
            raise changed(self.path, f"no tensor at {ref.start}")
        return self.tensors[name]

    def _file_at(self, start: int) -> OpenFile:
        return self.files[bisect.bisect_right([file.start for file in self.files], start) - 1]


class OpenFiles:
    """The files other processes name tensors of; the last few stay open, since the next patch names them again."""

    LIMIT = 16

    def __init__(self) -> None:
        self._sources: OrderedDict[tuple[str, int, int, int], Source] = OrderedDict()

    def tensor(self, ref: FileRef) -> torch.Tensor:
        """The tensor of a ref, a view of the map.

        Raises:
            LoadError: the file is missing here, or not the one that was meant.
        """
        source = self._sources.get(ref.file)
        if source is None:
            source = self._sources[ref.file] = Source(ref.path)
        self._sources.move_to_end(ref.file)
        while len(self._sources) > self.LIMIT:
            self._sources.popitem(last=False)
        source.check()
        return source.resolve(ref)


@torch.inference_mode(False)
def _view(whole: torch.Tensor, entry: Entry) -> torch.Tensor:
    # torch counts what is written into normal tensors
    raw = whole[entry.start : entry.stop]
    if entry.quant:
        return raw
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    # a view of another dtype must start at a multiple of its size; files need not keep to that
    raw = raw if entry.aligned else raw.clone()
    return raw.view(entry.dtype).view(entry.shape)
