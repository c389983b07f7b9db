"""Every public function and class says what its arguments are and what it raises."""

import importlib
import inspect
import re

import pytest

import fastmoe_rs

pytest.importorskip("transformers", reason="some public modules are about transformers")

MODULES = (
    "checkpoints",
    "distillation",
    "expert_parallel",
    "functional",
    "integrations",
    "integrations.dense",
    "integrations.grok",
    "losses",
    "nn",
    "quantization",
    "reference",
    "routing",
    "sinks",
    "telemetry",
    "upcycling",
)


def public():
    """(exporting module, name, object), each object once."""
    found = {}
    for module in (fastmoe_rs, *(importlib.import_module(f"fastmoe_rs.{name}") for name in MODULES)):
        assert module.__doc__, module
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                found[id(thing)] = (module, name, thing)
    return sorted(found.values(), key=lambda item: (item[0].__name__, item[1]))


def methods(cls):
    """Names of the public methods and properties that a class defines."""
    for name, method in vars(cls).items():
        method = getattr(method, "__func__", getattr(method, "fget", None) or method)
        if inspect.isfunction(method) and not name.startswith("_"):
            yield name


PUBLIC = public()
NAMES = [f"{module.__name__}.{name}" for module, name, _ in PUBLIC]


@pytest.mark.parametrize(("module", "name", "thing"), PUBLIC, ids=NAMES)
def test_arguments_are_described(module, name, thing):
    """By their names, or by those without the letters of their shape; torch's own two need no words."""
    assert thing.__doc__, name
    if module.__name__ == "fastmoe_rs.reference":  # whose functions have the arguments of `functional`
        return
    if inspect.isclass(thing):
        for method in methods(thing):
            assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"
        if "__init__" not in vars(thing) or issubclass(thing, Warning):
            return
    for parameter in inspect.signature(thing).parameters:
        bare = re.sub(r"_[A-Z0-9]+$", "", parameter)
        told = re.search(rf"\b({parameter}|{bare})\b", inspect.getdoc(thing))
        assert told or parameter in ("device", "dtype"), f"{name} has {parameter}"


@pytest.mark.parametrize(("module", "name", "thing"), PUBLIC, ids=NAMES)
def test_errors_are_described(module, name, thing):
    """By the function, or by its module for all that are in it."""
    try:
        source = inspect.getsource(thing)
    except TypeError:
        return  # of the native module
    if re.search(r"\braise \w+Error|_check\.|\bwanted\(", source):
        defined = inspect.getmodule(thing)
        assert any("Error" in text for text in (thing.__doc__, module.__doc__, defined.__doc__)), name
