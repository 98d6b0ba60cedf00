"""The page of Megatron's internals: what its generator finds in small sources, and its tables against real classes."""

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

MEGATRON = {
    "core/__init__.py": "from .router import Router",
    "core/router.py": """
class Base:
    def __init__(self, config): self._state = config
    def gating(self, input): ...

class Router(Base):
    def __init__(self, config, group=None): self.table = None
    def forward(self, input, mask): ...
    def _choose(self, input): ...
""",
    "core/utils.py": """
try:
    from fast_library import _kernel
except ImportError:
    _kernel = None

def _round(x): ...
def pad(x): ...
""",
}

# A reference to Megatron, the table that must have the row, and the row.
CASES = {
    "imported private name": (
        "from megatron.core.utils import _round as r\ndef f(): return r(1)",
        "private_names",
        ("megatron.core.utils._round", "called in", "f"),
    ),
    "private name of an imported module": (
        "import megatron.core.utils as u\nclass A:\n    def f(self): return [u._kernel]",
        "private_names",
        ("megatron.core.utils._kernel", "read in", "A.f"),
    ),
    "private name of a variable that holds a class": (
        "from megatron.core import router\ndef f():\n    cls = router.Router\n    return cls._choose",
        "private_names",
        ("megatron.core.router.Router._choose", "read in", "f"),
    ),
    "private attribute of an object": (
        "from megatron.core import Router\ndef f(router: Router): return router._state",
        "private_names",
        ("megatron.core.router.Base._state", "read in", "f"),
    ),
    "private method of a subclass": (
        "from megatron.core import Router\nclass Mine(Router):\n    def forward(self, input, mask): self._choose(1)",
        "private_names",
        ("megatron.core.router.Router._choose", "called in", "Mine.forward"),
    ),
    "subclass by a name of the package": (
        'from megatron.core import Router\nclass Mine(Router):\n    """Routes.\n\n    More."""',
        "subclasses",
        ("megatron.core.router.Router", "subclassed by", "Mine", "Routes."),
    ),
    "overridden method": (
        'from megatron.core import Router\nclass Mine(Router):\n    def gating(self, input):\n        """Gate."""',
        "overridden_methods",
        ("megatron.core.router.Base.gating", "overridden by", "Mine", "Gate."),
    ),
    "overridden method with other arguments": (
        "from megatron.core import Router\nclass Mine(Router):\n    def __init__(self, config, table): ...",
        "overridden_methods",
        ("megatron.core.router.Router.__init__", "overridden by", "Mine", "Also takes `table`. Does not take `group`."),
    ),
    "overridden method of a mixin": (
        "from megatron.core import Router\nclass Mixin:\n    def forward(self): ...\nclass Mine(Mixin, Router): ...",
        "overridden_methods",
        ("megatron.core.router.Router.forward", "overridden by", "Mixin", "Does not take `input`, `mask`."),
    ),
    "overridden attribute": (
        "from megatron.core import Router\nclass Mine(Router):\n    def forward(self, input, mask): self.table = input",
        "overridden_attributes",
        ("megatron.core.router.Router.table", "set in", "Mine.forward"),
    ),
    "replaced function": (
        "from maskmoe.megatron_compat.replacing import replace\n"
        'def patch():\n    """Pad less."""\n    from megatron.core import utils\n    replace(utils, "pad", 1)',
        "replaced",
        ("megatron.core.utils.pad", "replaced by", "patch", "Pad less."),
    ),
    "replaced name of a module that the caller chooses": (
        "from maskmoe.megatron_compat.replacing import replacing\nfrom megatron.core import utils\n"
        "def patch(x, module): replacing(module, pad=x)\ndef f(): patch(1, module=utils)",
        "replaced",
        ("megatron.core.utils.pad", "replaced by", "patch"),
    ),
    "assigned name of a module": (
        "from megatron.core import utils\ndef f(): utils.pad = 1",
        "replaced",
        ("megatron.core.utils.pad", "replaced by", "f"),
    ),
}


@pytest.fixture(scope="module")
def generators():
    """Make the modules of the generators importable."""
    sys.path.insert(0, str(DOCS / "generators"))
    yield
    sys.path.remove(str(DOCS / "generators"))


@pytest.fixture(scope="module")
def internals(generators):
    return importlib.import_module("internals")


@pytest.fixture(scope="module")
def sources(generators):
    return importlib.import_module("sources")


def package_of(internals, sources, folder, code, megatron=MEGATRON):
    """Return the uses of Megatron in one file of code, `a/b.py`."""
    files = {f"megatron/{name}": text for name, text in megatron.items()} | {"maskmoe/a/b.py": code}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return internals.Package(sources.Sources({name: [folder / name] for name in ("maskmoe", "megatron")}))


@pytest.mark.parametrize(("code", "table", "row"), CASES.values(), ids=list(CASES))
def test_use_appears_in_its_table(internals, sources, tmp_path, code, table, row):
    package = package_of(internals, sources, tmp_path, code)
    assert internals.Use("a/b.py", *row) in set(getattr(package, table)())


@pytest.mark.parametrize(
    "code",
    [
        "from megatron.core.utils import pad\ndef f(): pad(1)",
        "from elsewhere import _round\ndef f(): _round(1)",
        "from megatron.core import Router\nclass Mine(Router):\n    _own = 1\n    def f(self): self._own",
        "from megatron.core import Router\ndef f(x: Router, y):\n    y._actions",
        "class Router:\n    def forward(self): self._choose(1)\n    def _choose(self, x): ...",
    ],
)
def test_other_names_appear_nowhere_else(internals, sources, tmp_path, code):
    package = package_of(internals, sources, tmp_path, code)
    uses = [*package.overridden_methods(), *package.overridden_attributes(), *package.replaced()]
    assert [*uses, *package.private_names()] == []


def test_rows_vanish_with_the_names_in_megatron(internals, sources, tmp_path):
    """The difference between two pages names what another version of Megatron lacks."""
    code = "\n".join(case[0] for case in CASES.values())
    gone = {**MEGATRON, "core/router.py": "", "core/utils.py": ""}
    package = package_of(internals, sources, tmp_path, code, gone)
    tables = {table for _, table, _ in CASES.values()}
    assert [use for table in tables for use in getattr(package, table)()] == []


def test_a_part_of_megatron_belongs_to_one_folder(sources, tmp_path):
    """Python takes a part of a namespace package from the first folder that has it, and so all modules in the part."""
    for file in ("new/core/a.py", "old/core/a.py", "old/core/b.py", "old/training/c.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x = 1")
    found = sources.Sources({"megatron": [tmp_path / "new", tmp_path / "old"]})
    names = ("core.a", "core.b", "training.c")
    assert [found.module(f"megatron.{name}") is not None for name in names] == [True, False, True]


# The real package


@pytest.fixture(scope="module")
def real_package(internals, sources):
    import megatron

    folders = {"maskmoe": [ROOT / "maskmoe"], "megatron": [Path(folder) for folder in megatron.__path__]}
    return internals.Package(sources.Sources(folders))


@pytest.fixture(scope="module")
def real_classes():
    """All classes of the package that inherit from Megatron."""
    names = (module.name for module in pkgutil.walk_packages(maskmoe.__path__, "maskmoe."))
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
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
import contextlib, json, sys, types
from maskmoe.megatron_compat import replacing

stock, names = replacing.replace, []

def record(owner, name, replacement):
    path = owner.__name__ if isinstance(owner, types.ModuleType) else f"{owner.__module__}.{owner.__name__}"
    names.append(f"{path}.{name}")
    stock(owner, name, replacement)

replacing.replace = record
from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.checkpoint.megatron_patches import keep_checkpoints_whole
from maskmoe.launch.journal import Journal

keep_checkpoints_whole(contextlib.nullcontext, contextlib.nullcontext, Journal(None))
from maskmoe.training.loop.megatron_patches import call_after_each_step, skip_iterations_of_interleaved_pipelines

call_after_each_step(lambda step: None)
skip_iterations_of_interleaved_pipelines()
json.dump(names, sys.stdout)
"""


def test_all_names_that_a_process_replaces_are_listed(real_package):
    command = [sys.executable, "-c", RECORD_REPLACEMENTS]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    names = json.loads(subprocess.check_output(command, cwd=ROOT, env=environment, text=True, timeout=120))
    expected = {name for name in names if name.startswith("megatron.")}
    assert expected
    assert expected <= {use.name for use in real_package.replaced()}
