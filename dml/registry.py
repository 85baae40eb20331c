"""Turn a short name, or an import path, into the class it stands for.

A table maps names to import paths ("dml.losses.triplet:TripletLoss"), so that listing what exists loads nothing.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from dml.errors import ConfigError


def resolve(kind: str, name: str, table: Mapping[str, Callable[..., Any] | str]) -> Callable[..., Any]:
    """Return the class or function called `name`: a key of `table`, or "package.module:Attribute".

    Args:
        kind: what is looked for ("loss", "trunk"), for the message.
        name: a key of the table, or an import path with a colon.
        table: name -> the thing itself, or its import path.

    Raises:
        ConfigError: for a name that is neither, or an import path that leads nowhere.
    """
    target = table.get(name, name)
    if not isinstance(target, str):
        return target
    if ":" not in target:
        raise ConfigError(unknown(kind, name, table))
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module exists; something that it needs does not
        raise ConfigError(
            f'The {kind} "{target}" cannot be found: there is no module "{module}". '
            f"Is its package installed, and is the current folder on PYTHONPATH?"
        ) from None
    except AttributeError:
        found = [n for n in vars(import_module(module)) if not n.startswith("_")]
        guess = get_close_matches(attribute, found, n=1)
        hint = f' Did you mean "{module}:{guess[0]}"?' if guess else ""
        raise ConfigError(
            f'The {kind} "{target}" cannot be found: "{module}" has no "{attribute}".{hint}'
        ) from None


def unknown(kind: str, name: str, known: Mapping[str, Any]) -> str:
    """The message for a name that nobody knows, with the nearest one that somebody does."""
    guess = get_close_matches(name, known, n=1)
    hint = f'Did you mean "{guess[0]}"? ' if guess else ""
    return (
        f'Unknown {kind} "{name}". {hint}Known: {", ".join(sorted(known))}. '
        f'Your own class works too: write it as "my_package.my_module:MyClass".'
    )
