"""Objects from `target` / `params` configuration, the schema of the published model YAML files."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ALLOWED_PACKAGES = ("ldm", "cldm")
DRAWS = (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_)
IDENTITY = "torch.nn.Identity"  # `lossconfig` of published files


def instantiate_from_config(config: Mapping[str, Any]) -> Any:
    """Build `config["target"]` with `config["params"]`.

    Only classes of this project and `torch.nn.Identity` can be named, so a YAML file from elsewhere cannot
    run foreign code. A class may declare `unused_params` (in published files, without effect here),
    `fixed_params` (supported at one value only) and `arch_class` (a dataclass of further keywords).

    Raises
        ValueError  no target or one that is not allowed; a parameter that is unknown, unsupported or missing
    """
    target = config.get("target")
    if target == IDENTITY:
        return nn.Identity()
    cls = resolve_target(target)
    return cls(**supported_params(cls, config.get("params") or {}))


def instantiate_empty(config: Mapping[str, Any]) -> Any:
    """As `instantiate_from_config`, without memory: on the meta device, to be filled from a file."""
    with torch.device("meta"), NothingToInitialise():
        return instantiate_from_config(config)


class NothingToInitialise(TorchFunctionMode):
    """Skips what draws weights; on the meta device it fills nothing, after a second of imports."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` unless it would initialise a tensor."""
        kwargs = kwargs or {}
        if func in DRAWS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def resolve_target(target: str | None) -> type:
    """Return the class that a dotted name stands for, from the allow-list only."""
    module_name, _, class_name = str(target).rpartition(".")
    if module_name.partition(".")[0] not in ALLOWED_PACKAGES:
        allowed = ", ".join([*(f"{package}.*" for package in ALLOWED_PACKAGES), IDENTITY])
        raise ValueError(f"target {target!r} is not allowed in a model file; expected one of {allowed}")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"target {target!r} does not exist: {error}") from error
    if not isinstance(found, type) or found.__module__.partition(".")[0] not in ALLOWED_PACKAGES:
        raise ValueError(f"target {target!r} is not allowed in a model file; it is no class of the project")
    return found


def supported_params(cls: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that `cls` takes; drop unused, refuse unknown, unsupported and missing ones."""
    unused: frozenset[str] = getattr(cls, "unused_params", frozenset())
    fixed: Mapping[str, Any] = getattr(cls, "fixed_params", {})
    known = parameter_names(cls)
    for name, value in params.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{cls.__name__}: {name}={value!r} is not supported; only {fixed[name]!r} is")
        if name not in {*known, *unused, *fixed}:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{cls.__name__} has no parameter {name!r}{hint}")
    if lacking := [name for name, is_required in known.items() if is_required and name not in params]:
        raise ValueError(
            f"{cls.__name__} needs the parameter {lacking[0]!r} in its params, found {sorted(params)}"
        )
    return {name: value for name, value in params.items() if name in known}


def parameter_names(cls: type) -> dict[str, bool]:
    """What the constructor takes, and whether it must be given.

    Its own parameters, those that it passes to a base class, and those of `arch_class`.
    """
    names: dict[str, bool] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        names |= {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
        if hasattr(owner, "arch_class"):
            return names | {field.name: False for field in dataclasses.fields(owner.arch_class)}
    return names
