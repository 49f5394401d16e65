"""All or nothing: originals go to a spill file while layers are converted, and come back if anything fails."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ModelStateError
from diffuse_compress.quantization.convert import replace_module

__all__ = ["Transaction"]

_MARGIN = 64 << 20


@dataclass
class _Spilled:
    model: nn.Module
    names: list[str]
    module: nn.Module
    parameter: nn.Parameter
    offset: int
    size: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Transaction:
    """``with Transaction(bytes_needed, work_dir) as spill:`` replaces layers through :meth:`replace`.

    Leaving the block normally commits and deletes the file. Leaving it by any exception, KeyboardInterrupt
    included, puts every original module back with its original bytes, dtype, device and Parameter object. Only one
    layer's dense and packed weights stand in memory together.

    Args:
        bytes_needed: size of the dense weights that will be spilled.
        work_dir: folder for the spill file; the system's temporary folder by default.

    Raises:
        ModelStateError: the folder cannot be made, or has less free space than needed.
    """

    def __init__(self, bytes_needed: int, work_dir: str | Path | None = None) -> None:
        folder = Path(work_dir) if work_dir is not None else Path(tempfile.gettempdir())
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelStateError(
                f"compress: work_dir must be a folder that can be written, {folder}: {error}."
            ) from error
        free = shutil.disk_usage(folder).free
        if free < bytes_needed + _MARGIN:
            raise ModelStateError(
                f"compress needs {(bytes_needed + _MARGIN) >> 20} MiB of free disk to be able to restore the model, "
                f"{folder} has {free >> 20} MiB. Pass work_dir= on a larger disk."
            )
        self._folder = folder
        self._spilled: list[_Spilled] = []
        self._undo: list[Callable[[], Any]] = []
        self._undo_last: list[Callable[[], Any]] = []

    def __enter__(self) -> Transaction:
        self._file = tempfile.TemporaryFile(dir=self._folder, prefix="diffuse_compress-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                with _interrupts_held():
                    self._restore()
        finally:
            self._file.close()

    def replace(self, model: nn.Module, names: list[str], convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Convert the layer found under ``names`` (all names of one shared module) and put the result in place.

        The original's weight is written out and freed once the new layer exists.
        """
        module = model.get_submodule(names[0])
        parameter = module.weight
        assert isinstance(parameter, nn.Parameter)
        converted = convert(module)
        record = self._spill(model, names, module, parameter)
        # From here the record restores both the bytes and the place in the tree.
        self._spilled.append(record)
        for name in names:
            replace_module(model, name, converted)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        return converted

    def keep(self, parameter: nn.Parameter) -> None:
        """Write the data of ``parameter`` out before it is changed in its place; a rollback puts it back."""
        self._spilled.append(self._spill(nn.Module(), [], nn.Module(), parameter))

    def on_rollback(self, undo: Callable[[], Any]) -> None:
        """Call ``undo`` first if the transaction fails (last registered, first called)."""
        self._undo.append(undo)

    def after_rollback(self, undo: Callable[[], Any]) -> None:
        """Call ``undo`` if the transaction fails, once every layer is in its place again."""
        self._undo_last.append(undo)

    def _spill(self, model: nn.Module, names: list[str], module: nn.Module, parameter: nn.Parameter) -> _Spilled:
        data = parameter.detach()
        offset = self._file.seek(0, 2)
        flat = data.cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)
        size = flat.numel() * flat.element_size()
        return _Spilled(model, names, module, parameter, offset, size, data.shape, data.dtype, data.device)

    def _read(self, record: _Spilled) -> torch.Tensor:
        self._file.seek(record.offset)
        buffer = bytearray(record.size)
        read = self._file.readinto(buffer)  # type: ignore[attr-defined]
        if read != record.size:
            raise OSError(f"spill file: {record.size} bytes expected at {record.offset}, got {read}")
        if not record.size:
            return torch.empty(record.shape, dtype=record.dtype)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(record.dtype).reshape(record.shape)

    def _restore(self) -> None:
        for undo in reversed(self._undo):
            undo()
        for record in reversed(self._spilled):
            record.parameter.data = self._read(record).to(record.device)
            for name in record.names:
                replace_module(record.model, name, record.module)
        for undo in self._undo_last:
            undo()


class _interrupts_held:
    """Holds Ctrl-C back during the restore, which must not be interrupted half-way."""

    def __enter__(self) -> None:
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
