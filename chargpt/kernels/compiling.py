"""What torch.compile is told, without its import, which costs more than a second; most programs never compile."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def assume_constant_result(function: F) -> F:
    """As `torch.compiler.assume_constant_result`: a compiled program takes what it returns as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
