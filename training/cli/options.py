"""The configuration dataclasses of training as options of a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

from cyclopts import Group, Parameter

from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.methods.registry import METHODS

T = TypeVar("T")

PARAMETERS = Group.create_default_parameters()
ADAPTER = Group("Adapter", help=f"Methods: {', '.join(METHODS)}.", sort_key=1)
LOOP = Group("Loop", sort_key=2)
RATES = Group("Learning rates", sort_key=3)

RATE_FLAGS = {
    each.name: f"{each.name.removesuffix('s').replace('_', '-')}-rate"
    for each in fields(LearningRates)
}
"""--expert-rate and its like: `experts` is the option of the adapter."""


def options(
    config: type[T],
    defaults: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    group: Group = PARAMETERS,
) -> type[T]:
    """A subclass of a configuration whose fields are options without a prefix.

    `defaults` take the place of the fields' own: a value, None where the command decides, or for a
    nested configuration a class that this function made. `names` renames options.
    """
    hints = get_type_hints(config, include_extras=True)
    members = []
    for each in fields(config):  # type: ignore[arg-type]  # a dataclass
        hint, default = hints[each.name], defaults.get(each.name, MISSING)
        if isinstance(default, type):
            hint, each_field = default, field(default_factory=default)
        elif default is not MISSING:
            hint, each_field = (hint | None if default is None else hint), field(default=default)
        else:
            each_field = field(default=each.default, default_factory=each.default_factory)
        if names and each.name in names:
            hint = Annotated[hint, Parameter(name=names[each.name])]
        members.append((each.name, hint, each_field))
    made = make_dataclass(config.__name__, members, bases=(config,), frozen=True)
    made.__module__ = config.__module__  # cyclopts looks into no class of Python's own
    return Parameter(name="*", group=group)(made)


def reads(**classes: type) -> Callable[[T], T]:
    """Has a command's parameters built from these classes, which `options` made."""

    def decorate(command: T) -> T:
        command.__annotations__.update(classes)
        return command

    return decorate
