"""Named tuples of results, as `torch.export.save` writes them."""

from __future__ import annotations

from typing import TypeVar

from .. import _torch_private

Class = TypeVar("Class", bound=type)


def serializable(cls: Class) -> Class:
    """Registers a named tuple, so that exported programs that return it can be saved.

    torch serialises registered types only.
    """
    register = _torch_private.register_named_tuple
    if register is not None:
        register(cls, serialized_type_name=f"inpaint_kernels.{cls.__name__}")
    return cls
