"""Objects from `target` / `params` configuration, the schema of the published model YAML files."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

ALLOWED_PACKAGES = ("ldm", "cldm")
ALLOWED_TARGETS = ("torch.nn.Identity",)


def instantiate_from_config(config: Mapping[str, Any]) -> Any:
    """Build `config["target"]` with `config["params"]`.

    Only classes of this project and `torch.nn.Identity` can be named, so a YAML file from elsewhere cannot
    run foreign code. A class may declare `unused_params` (in published files, without effect here),
    `fixed_params` (supported at one value only) and `arch_class` (a dataclass of further keywords).

    Raises
        KeyError    the configuration has no `target`
        ValueError  the target is not allowed or does not exist, or a parameter is unknown or unsupported
    """
    if "target" not in config:
        raise KeyError(f"expected a configuration with 'target', found the keys {sorted(config)}")
    cls = resolve_target(config["target"])
    if config["target"] in ALLOWED_TARGETS:
        return cls()
    return cls(**supported_params(cls, config.get("params") or {}))


def resolve_target(target: str) -> type:
    """Return the class that a dotted name stands for, from the allow-list only."""
    module_name, _, class_name = target.rpartition(".")
    if module_name.partition(".")[0] not in ALLOWED_PACKAGES and target not in ALLOWED_TARGETS:
        allowed = ", ".join([*(f"{package}.*" for package in ALLOWED_PACKAGES), *ALLOWED_TARGETS])
        raise ValueError(f"target {target!r} is not allowed in a model file; expected one of {allowed}")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"target {target!r} does not exist: {error}") from error


def supported_params(cls: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that `cls` takes; drop unused ones, refuse unknown and unsupported ones."""
    unused: frozenset[str] = getattr(cls, "unused_params", frozenset())
    fixed: Mapping[str, Any] = getattr(cls, "fixed_params", {})
    known = parameter_names(cls)
    for name, value in params.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{cls.__name__}: {name}={value!r} is not supported; only {fixed[name]!r} is")
        if name not in known | unused | set(fixed):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{cls.__name__} has no parameter {name!r}{hint}")
    return {name: value for name, value in params.items() if name in known}


def parameter_names(cls: type) -> set[str]:
    """Names that the constructor takes: its own, those it passes to a base class, those of `arch_class`."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
        if hasattr(owner, "arch_class"):
            return names | {field.name for field in dataclasses.fields(owner.arch_class)}
    return names
