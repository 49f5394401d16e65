"""A decoder's residual stream, and its rotation inside the weights.

Ashkboos et al. 2024, arXiv 2404.00456, section 4, stage 1 (after Ashkboos et al. 2024, "SliceGPT", arXiv 2401.15024,
theorem 1): an RMS norm without weights commutes with every orthogonal matrix, so what writes to the stream can write it
rotated, and what reads it can undo that. The rotation of the value heads is that of Liu et al. 2025, "SpinQuant", arXiv
2405.16406 (their R2), and so are its names: no layer but the down projection rotates anything at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.rotation import MIN_ROTATION, rotate, rotation_size

__all__ = ["ResidualStream", "Rotations", "by_heads", "hadamard_rotations", "rotate_residual"]

_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class ResidualStream:
    """Who writes to the stream and who reads it, by qualified names of modules.

    Attributes:
        width: of the stream.
        head_dim: of an attention head.
        embedding: whose rows start the stream.
        norms: {RMS norm: linears that read what it returns}; nothing else reads the stream.
        writers: linears whose output is added to the stream.
        values: (value projection, output projection) of each attention.
        head: the linear that makes the logits, one of the readers.
        unit_offset: the norms multiply by 1 + weight (Gemma).
    """

    width: int
    head_dim: int
    embedding: str
    norms: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: tuple[tuple[str, str], ...]
    head: str
    unit_offset: bool = False

    def __post_init__(self) -> None:
        for what, size in (("a residual stream", self.width), ("attention heads", self.head_dim)):
            if rotation_size(size) is None:
                raise ConfigError(
                    f"rotation: {what} of width {size} cannot be cut into rotations of {MIN_ROTATION} or more."
                )

    @property
    def rotated_inputs(self) -> frozenset[str]:
        """Linears whose input arrives rotated."""
        readers = {name for names in self.norms.values() for name in names}
        return frozenset(readers | {output for _, output in self.values})

    def num_parameters(self, model: nn.Module) -> int:
        """How many parameters a rotation changes."""
        readers = {name for names in self.norms.values() for name in names}
        turned = {*self.writers, *(value for value, _ in self.values)}
        biases = sum(isinstance(model.get_submodule(name).bias, nn.Parameter) for name in turned)
        return len({self.embedding, *self.norms, *readers, *turned}) + biases


@dataclass(frozen=True)
class Rotations:
    """Orthogonal matrices that multiply from the right what is rotated.

    Attributes:
        stream: float64 [width, width], of the residual stream (SpinQuant's R1).
        heads: {value projection: float64 [head_dim, head_dim]}, of each attention's heads (R2).
    """

    stream: torch.Tensor
    heads: Mapping[str, torch.Tensor]

    @property
    def matrices(self) -> list[torch.Tensor]:
        """All of them, the stream's first."""
        return [self.stream, *self.heads.values()]

    def of(self, matrices: Sequence[torch.Tensor]) -> Rotations:
        """Others in the places of :attr:`matrices`."""
        return Rotations(matrices[0], dict(zip(self.heads, matrices[1:], strict=True)))

    def to(self, device: torch.device | str) -> Rotations:
        """The same on ``device``."""
        return self.of([matrix.to(device) for matrix in self.matrices])


def hadamard_rotations(stream: ResidualStream, generator: torch.Generator) -> Rotations:
    """The matrices that :func:`rotate_residual` multiplies by if it is given none, from the same generator."""
    signs = torch.randint(0, 2, (stream.width,), generator=generator).double() * 2 - 1
    of_stream, of_heads = (rotation_size(size) for size in (stream.width, stream.head_dim))
    assert of_stream is not None
    assert of_heads is not None
    head = rotate(torch.eye(stream.head_dim, dtype=torch.float64), of_heads)
    return Rotations(
        rotate(torch.eye(stream.width, dtype=torch.float64), of_stream, signs),
        {value: head.clone() for value, _ in stream.values},
    )


def by_heads(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Every run of ``head_dim`` columns of ``rows`` [..., K] times ``matrix`` [head_dim, head_dim]."""
    turned: torch.Tensor = rows.unflatten(-1, (-1, matrix.shape[0])) @ matrix
    return turned.flatten(-2)


def rotate_residual(
    model: nn.Module,
    stream: ResidualStream,
    generator: torch.Generator,
    keep: Callable[[nn.Parameter], Any],
    rotations: Rotations | None = None,
) -> None:
    """Rotate ``stream`` and the value heads of ``model``, in place; its logits stay, hidden states do not.

    Weights are multiplied in float64 and rounded once to their dtype.

    Args:
        model: dense, its output layer not tied to the embedding.
        stream: of the model.
        generator: draws the signs of the stream's rotation.
        keep: called once with each parameter before it is changed.
        rotations: to be used instead of random Hadamard matrices.
    """
    signs = torch.randint(0, 2, (stream.width,), generator=generator).double() * 2 - 1
    _Rotation(model, signs, keep, rotations).run(stream)


class _Rotation:
    def __init__(
        self,
        model: nn.Module,
        signs: torch.Tensor,
        keep: Callable[[nn.Parameter], Any],
        rotations: Rotations | None,
    ) -> None:
        self.model, self.signs, self.keep, self.rotations = model, signs, keep, rotations
        self._kept: set[int] = set()

    def run(self, stream: ResidualStream) -> None:
        self._set(self._parameter(stream.embedding), self._columns)
        for name, readers in stream.norms.items():
            norm = self._parameter(name)
            gain = norm.detach().double() + (1.0 if stream.unit_offset else 0.0)
            for reader in readers:
                self._read(reader, gain)
            self._set(norm, lambda value: torch.full_like(value, 0.0 if stream.unit_offset else 1.0))
        for value, output in stream.values:
            self._rotate_heads(value, output, stream.head_dim)
        for name in stream.writers:
            self._write(name, self._columns)

    def _read(self, name: str, gain: torch.Tensor) -> None:
        """A linear whose input was multiplied by ``gain`` and is rotated now."""
        self._set(self._parameter(name), lambda rows: self._columns(rows * gain.to(rows)))

    def _columns(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows Q`` for rows of the stream's width."""
        if self.rotations is not None:
            return rows @ self.rotations.stream.to(rows)
        size = rotation_size(rows.shape[-1])
        assert size is not None
        return rotate(rows, size, self.signs.to(rows))

    def _rotate_heads(self, value: str, output: str, head_dim: int) -> None:
        """Every head's values are rotated alike, so the heads of grouped queries find theirs."""
        size = rotation_size(head_dim)
        assert size is not None

        def turn(rows: torch.Tensor) -> torch.Tensor:
            if self.rotations is not None:
                return by_heads(rows, self.rotations.heads[value].to(rows))
            return rotate(rows, size)

        self._write(value, turn)
        self._set(self._parameter(output), turn)

    def _write(self, name: str, turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """A linear whose output is to be turned."""
        self._set(self._parameter(name), lambda columns: turn(columns.t()).t(), by_columns=True)
        bias = self.model.get_submodule(name).bias
        if isinstance(bias, nn.Parameter):
            self._set(bias, turn)

    def _parameter(self, name: str) -> nn.Parameter:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _set(
        self, parameter: nn.Parameter, turn: Callable[[torch.Tensor], torch.Tensor], by_columns: bool = False
    ) -> None:
        """Replace a parameter's data by what ``turn`` makes of it in float64, some rows (or columns) at a time."""
        if id(parameter) not in self._kept:
            self._kept.add(id(parameter))
            self.keep(parameter)
        source = parameter.detach()
        wide = torch.float32 if source.device.type == "mps" else torch.float64
        if source.dim() == 1:
            parameter.data = turn(source.to(wide)).to(source.dtype)
            return
        result = torch.empty_like(source)
        dim = 1 if by_columns else 0
        step = max(1, _CHUNK_ELEMENTS * source.shape[dim] // max(1, source.numel()))
        for start in range(0, source.shape[dim], step):
            length = min(step, source.shape[dim] - start)
            part = turn(source.narrow(dim, start, length).to(wide))
            result.narrow(dim, start, length).copy_(part)
        parameter.data = result
