"""The tables of the page about Megatron's internals list what real classes and a real process have."""

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.documentation import DOCS
from support.paths import ROOT

import maskmoe


@pytest.fixture(scope="module")
def real_package():
    """The package and Megatron as the generator of the page reads them."""
    import megatron

    folders = {"maskmoe": [ROOT / "maskmoe"], "megatron": [Path(folder) for folder in megatron.__path__]}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "generators")
        internals, sources = (importlib.import_module(name) for name in ("internals", "sources"))
        yield internals.Package(sources.Sources(folders))


@pytest.fixture(scope="module")
def real_classes():
    """All classes of the package that inherit from Megatron."""
    names = (module.name for module in pkgutil.walk_packages(maskmoe.__path__, "maskmoe."))
    modules = [importlib.import_module(name) for name in names if not name.endswith(("__main__", "vllm_maskmoe"))]
    classes = [cls for module in modules for cls in vars(module).values() if inspect.isclass(cls)]
    return [cls for cls in dict.fromkeys(classes) if is_ours(cls) and any(map(is_megatrons, cls.__mro__))]


def is_ours(cls):
    return cls.__module__.startswith("maskmoe.")


def is_megatrons(cls):
    return cls.__module__.startswith("megatron.")


def written_methods(cls):
    """Return the names of the methods that stand in the source of a class, and not those that `dataclass` adds."""
    file = sys.modules[cls.__module__].__file__
    functions = {name: inspect.unwrap(member) for name, member in vars(cls).items() if inspect.isfunction(member)}
    return {name for name, function in functions.items() if function.__code__.co_filename == file}


def test_all_subclasses_are_listed(real_package, real_classes):
    bases = {base for cls in real_classes for base in cls.__bases__ if is_megatrons(base)}
    assert {use.name for use in real_package.subclasses()} == {f"{base.__module__}.{base.__name__}" for base in bases}


def test_all_overridden_methods_are_listed(real_package, real_classes):
    """The reference is the order in which Python searches real classes."""
    expected = set()
    for cls in real_classes:
        for position, ours in enumerate(cls.__mro__):
            for name in written_methods(ours) if is_ours(ours) else ():
                bases = [
                    base for base in cls.__mro__[position:] if is_megatrons(base) and name in written_methods(base)
                ]
                expected |= {(f"{base.__module__}.{base.__name__}.{name}", ours.__name__) for base in bases[:1]}
    assert {(use.name, use.place) for use in real_package.overridden_methods()} == expected


RECORD_REPLACEMENTS = """
import argparse, contextlib, json, sys, types
import maskmoe.megatron_compat as compat

stock, names = compat.replace, []

def record(owner, name, replacement):
    path = owner.__name__ if isinstance(owner, types.ModuleType) else f"{owner.__module__}.{owner.__name__}"
    names.append(f"{path}.{name}")
    stock(owner, name, replacement)

compat.replace = record
compat.prepare_process()
from maskmoe.megatron_compat.checkpoint_patches import keep_checkpoints_whole

keep_checkpoints_whole(lambda: None, lambda: None)
from maskmoe.training.loop.megatron_patches import watch_steps

watch_steps(lambda step: None)
json.dump(names, sys.stdout)
"""


def test_all_names_that_a_process_replaces_are_listed(real_package):
    command = [sys.executable, "-c", RECORD_REPLACEMENTS]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    names = json.loads(subprocess.check_output(command, cwd=ROOT, env=environment, text=True, timeout=120))
    expected = {name for name in names if name.startswith("megatron.")}
    assert expected
    assert expected <= {use.name for use in real_package.replaced()}
