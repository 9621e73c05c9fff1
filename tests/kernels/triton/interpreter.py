"""Makes Triton's interpreter run here: to be imported before the kernels, in a process with TRITON_INTERPRET=1."""

import inspect
import os
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Triton is imported"

from triton.language import core  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_tensor = interpreter._patch_lang_tensor
_builtins: dict[Any, list[tuple[str, Any]]] = {}


def _patch_tensor_for_new_numpy(tensor: Any, scope: Any) -> None:
    """Scalars are arrays of one element, and NumPy 2.4 no longer makes an int of those: Triton 3.6 stumbles over it."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _patch_builtin_once(module: Any, builder: Any, scope: Any) -> None:
    """Triton searches its modules at every call of a function, which takes most of its time; once is enough."""
    if module not in _builtins:
        _builtins[module] = [(n, x) for n, x in inspect.getmembers(module) if core.is_builtin(x)]
    members = _builtins[module]
    if getattr(module, members[0][0]) is members[0][1]:  # not patched by a caller
        for name, member in members:
            interpreter._patch_attr(module, name, member, builder, scope)


interpreter._patch_lang_tensor = _patch_tensor_for_new_numpy
interpreter._patch_builtin = _patch_builtin_once
