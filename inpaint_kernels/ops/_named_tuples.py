"""Named tuples of results, as `torch.export.save` writes them."""

from __future__ import annotations

from typing import TypeVar

from torch.utils import _pytree

Class = TypeVar("Class", bound=type)


def serializable(cls: Class) -> Class:
    """Registers a named tuple, so that exported programs that return it can be saved.

    torch serialises registered types only, and registers named tuples by a private name alone. Without that name
    such programs still export, and `torch.export.save` refuses them.
    """
    register = getattr(_pytree, "_register_namedtuple", None)
    if register is not None:
        register(cls, serialized_type_name=f"inpaint_kernels.{cls.__name__}")
    return cls
