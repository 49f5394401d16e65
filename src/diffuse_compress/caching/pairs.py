"""Two predictions of a denoiser that a pipeline handles as one tensor.

What a pipeline does with a prediction before its scheduler steps (guidance in all its kinds, rescaling, leaving out the
variance) is code of its own. A :class:`Pair` holds the teacher's prediction and the student's, and whatever is done to
it is done to both, with gradients to the student's. So a loss can compare what the scheduler would be given by either,
in a stock pipeline that runs without gradients and knows of one prediction only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

__all__ = ["Pair", "paired", "pairs_in", "students_of"]


class Pair(torch.Tensor):
    """A student's and a teacher's tensor; it shows the student's shape and values.

    Attributes:
        student: may require gradients.
        teacher: does not.
    """

    student: torch.Tensor
    teacher: torch.Tensor

    @staticmethod
    def __new__(cls, student: torch.Tensor, teacher: torch.Tensor) -> Pair:
        made: Pair = torch.Tensor._make_subclass(cls, student.detach())  # type: ignore[attr-defined]
        made.student, made.teacher = student, teacher
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The same of both."""
        given = (args, dict(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            one, other = (tree_map_only(Pair, side, given) for side in (_student, _teacher))
            with torch.enable_grad():
                left = func(*one[0], **one[1])
            with torch.no_grad():
                right = func(*other[0], **other[1])
            return paired(left, right)


def paired(student: Any, teacher: Any) -> Any:
    """The tensors in two like trees (a model's outputs) as pairs; the student's where there are no tensors."""
    return tree_map(_pair, student, teacher)


def pairs_in(tree: Any) -> list[Pair]:
    """All pairs in a tree."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Pair)]


def students_of(tree: Any) -> Any:
    """The tree with the students' tensors in the place of pairs, without gradients."""
    return tree_map_only(Pair, lambda pair: pair.student.detach(), tree)


def _pair(student: Any, teacher: Any) -> Any:
    both = isinstance(student, torch.Tensor) and isinstance(teacher, torch.Tensor)
    return Pair(student, teacher) if both else student


def _student(pair: Pair) -> torch.Tensor:
    return pair.student


def _teacher(pair: Pair) -> torch.Tensor:
    return pair.teacher
