"""Turn a short name, or an import path, into the class it stands for.

A table maps names to import paths ("dml.losses.triplet:TripletLoss"), so that listing what exists loads
nothing.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
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


def unknown(kind: str, name: str, known: Mapping[str, Any], *, classes: bool = True) -> str:
    """The message for a name that nobody knows, with the nearest one that somebody does.

    Args:
        classes: whether a class of the user's own can be named instead.
    """
    guess = get_close_matches(name, known, n=1)
    hint = f'Did you mean "{guess[0]}"? ' if guess else ""
    own = ' Your own class works too: write it as "my_package.my_module:MyClass".' if classes else ""
    return f'Unknown {kind} "{name}". {hint}Known: {", ".join(sorted(known))}.{own}'


def construct(
    kind: str,
    name: str,
    args: Mapping[str, Any],
    table: Mapping[str, Callable[..., Any] | str],
    context: Mapping[str, Any] | None = None,
) -> Any:
    """Resolve a part of a recipe and call it with the recipe's arguments.

    Args:
        kind, name, table: as in `resolve`.
        args: keyword arguments written in the recipe.
        context: values the system knows (number of classes, dimension, seed, …); each is passed when the
            callable has a parameter of that name which the recipe does not set.

    Raises:
        ConfigError: an argument that the callable does not have (with the nearest one that it has), or values
            that it refuses.
    """
    target = resolve(kind, name, table)
    known = check_arguments(kind, name, target, args)
    given = {key: value for key, value in (context or {}).items() if key in known} | dict(args)
    try:
        return target(**given)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f'The {kind} "{name}" cannot be made with {given}: {error or "it refuses these values"}'
        ) from error


def check_arguments(kind: str, name: str, target: Callable[..., Any], args: Mapping[str, Any]) -> list[str]:
    """Refuse arguments that a callable does not have, with a hint (ConfigError); return those that it has."""
    known, open_ended = parameter_names(target)
    for key in args:
        if key not in known and not open_ended:
            guess = get_close_matches(key, known, n=1)
            hint = f'Did you mean "{guess[0]}"? ' if guess else ""
            takes = ", ".join(sorted(known)) or "none"
            raise ConfigError(f'The {kind} "{name}" has no argument "{key}". {hint}It takes: {takes}.')
    return known


def parameter_names(target: Callable[..., Any]) -> tuple[list[str], bool]:
    """Keyword parameters of a callable, **kwargs followed up its base classes; and whether it takes more."""
    makers = (
        [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
        if isinstance(target, type)
        else [target]
    )
    names: dict[str, None] = {}
    for maker in makers:
        if maker is object.__init__:
            return list(names), False
        kinds = signature(maker).parameters.values()
        names |= {p.name: None for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        names.pop("self", None)
        if not any(p.kind == p.VAR_KEYWORD for p in kinds):
            return list(names), False
    return list(names), True
