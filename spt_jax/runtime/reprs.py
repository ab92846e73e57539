"""Short representations of dataclasses: only fields that differ from their defaults, and arrays by type and shape."""

import dataclasses
from collections.abc import Mapping


def short_repr(self: object) -> str:
    """Returns the class of a dataclass and its fields that differ from their defaults. Serves as its `__repr__`."""
    shown = [
        f"{field.name}={_shown(getattr(self, field.name))}"
        for field in dataclasses.fields(self)  # type: ignore[arg-type]
        if field.repr and not _is_default(field, getattr(self, field.name))
    ]
    return f"{type(self).__name__}({', '.join(shown)})"


def _is_default(field: dataclasses.Field[object], value: object) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if type(value) is not type(default) or hasattr(value, "shape"):
        return False
    return bool(value == default)


def _shown(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{dtype}[{','.join(map(str, shape))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_shown(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_shown, value[:8])) + (", ..." if len(value) > 8 else "")
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return short_repr(value)
    return repr(value)
