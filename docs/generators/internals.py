"""Write docs/megatron-internals.md: the places where MaskMoE relies on the internals of Megatron-Core.

python docs/generators/internals.py [--check]

The tables come from the sources of MaskMoE and of the installed Megatron-Core, which are read and not imported. The
text around the tables is in megatron-internals.md.j2.
"""

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pages
from sources import Class, Function, Module, Name, Sources, is_self, is_set

PACKAGE = Path(__file__).resolve().parents[2] / "maskmoe"
OURS = PACKAGE.name
MEGATRON = "megatron"
REPLACE = f"{OURS}.megatron_compat.replace"
REPLACE_SEVERAL = f"{OURS}.megatron_compat.replacing"


@dataclass(frozen=True, order=True)
class Use:
    """One place that relies on Megatron.

    Attributes:
        file: path in the package.
        name: the name in Megatron.
        verb: what the place does with the name.
        place: the class or function.
        summary: what the class or function is for, as Markdown.
    """

    file: str
    name: str
    verb: str
    place: str
    summary: str = ""


class Surroundings:
    """The classes and functions around each node of a module.

    Args:
        module: the module.
    """

    def __init__(self, module: Module) -> None:
        self._parents = {child: node for node in ast.walk(module.tree) for child in ast.iter_child_nodes(node)}

    def parent(self, node: ast.AST) -> ast.AST:
        """Return the node that directly contains a node."""
        return self._parents[node]

    def definitions(self, node: ast.AST) -> list[ast.ClassDef | Function]:
        """Return the classes and functions that contain a node, from the inside to the outside."""
        found = []
        while node in self._parents:
            node = self._parents[node]
            if isinstance(node, ast.ClassDef | Function):
                found.append(node)
        return found

    def place(self, node: ast.AST) -> str:
        """Return the names of the class and the function that contain a node, such as `MaskMoERouter.routing`."""
        return ".".join(reversed([definition.name for definition in self.definitions(node)])) or "the module"

    def function(self, node: ast.AST) -> Function:
        """Return the outermost function that contains a node."""
        return [definition for definition in self.definitions(node) if isinstance(definition, Function)][-1]


class Package:
    """The package, and what it uses of Megatron's internals.

    Args:
        sources: the modules of the package and of Megatron.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._modules = list(sources.modules(OURS))
        self._surroundings = {module: Surroundings(module) for module in self._modules}
        self._classes = [cls for module in self._modules for cls in sources.classes(module)]

    # Classes

    def subclasses(self) -> Iterator[Use]:
        """Yield the classes of Megatron that are bases of the package's classes."""
        for ours in self._classes:
            for base in filter(_is_megatrons, ours.bases):
                yield Use(_file(ours.module), str(base), "subclassed by", ours.name, _summary(ours.node))

    def overridden_methods(self) -> Iterator[Use]:
        """Yield the methods of Megatron that methods of the package override, also those of mixins."""
        for ours, theirs in self._with_ancestors:
            for name, method in ours.methods.items():
                base = next((cls for cls in theirs if name in cls.methods), None)
                if base is not None:
                    summary = _summary(method) or _differing_arguments(method, base.methods[name])
                    yield Use(_file(ours.module), f"{base}.{name}", "overridden by", ours.name, summary)

    def overridden_attributes(self) -> Iterator[Use]:
        """Yield the attributes of Megatron's classes that subclasses of the package set."""
        for ours, theirs in self._with_ancestors:
            inherited = {name for cls in theirs for name in cls.attributes}
            if inherited.isdisjoint(ours.attributes - ours.methods.keys()):
                continue
            surroundings = self._surroundings[ours.module]
            for node in ast.walk(ours.node):
                if isinstance(node, ast.Attribute) and is_set(node) and is_self(node.value):
                    name = node.attr
                elif isinstance(node, ast.Name) and is_set(node) and surroundings.definitions(node)[0] is ours.node:
                    name = node.id
                else:
                    continue
                base = next((cls for cls in theirs if name in cls.attributes), None)
                if base is not None and name in ours.attributes:
                    yield Use(_file(ours.module), f"{base}.{name}", "set in", surroundings.place(node))

    @cached_property
    def _with_ancestors(self) -> list[tuple[Class, list[Class]]]:
        """Each class with the classes of Megatron that Python searches after it, also if the class is a mixin."""
        found = []
        for leaf in self._classes:
            order = (leaf, *leaf.ancestors)
            for position, ours in enumerate(order):
                theirs = [cls for cls in order[position:] if _is_megatrons(cls)]
                if theirs and not _is_megatrons(ours):
                    found.append((ours, theirs))
        return found

    # Replaced names

    def replaced(self) -> Iterator[Use]:
        """Yield the names of Megatron to which the package gives another value."""
        for module in self._modules:
            for node in ast.walk(module.tree):
                for owner, name in self._replaced_by(module, node):
                    function = self._surroundings[module].function(node)
                    place = self._surroundings[module].place(function.body[0])
                    yield Use(_file(module), f"{owner}.{name}", "replaced by", place, _summary(function))

    def _replaced_by(self, module: Module, node: ast.AST) -> Iterator[tuple[Name, str]]:
        """Yield owner and name of everything in Megatron that a call or an assignment replaces."""
        names: list[str] = []
        if isinstance(node, ast.Call):
            function = module.dotted_name(node.func)
            if function == REPLACE_SEVERAL:
                names = [keyword.arg for keyword in node.keywords if keyword.arg]
            elif function == REPLACE:
                names = [value.value for value in node.args[1:2] if isinstance(value, ast.Constant)]
            owners = self._objects(module, node.args[0]) if names else ()
        elif isinstance(node, ast.Attribute) and is_set(node):
            names, owners = [node.attr], self._objects(module, node.value)
        else:
            return
        yield from ((owner, name) for owner in owners for name in names if self._sources.defines(owner, name))

    def _objects(self, module: Module, node: ast.expr) -> list[Name]:
        """Return the modules and classes of Megatron that an expression may stand for."""
        found = self._in_megatron(module, node)
        if found is None and isinstance(node, ast.Name):
            passed = self._passed_as(module, node)
            return [name for name in (self._in_megatron(caller, value) for caller, value in passed) if name]
        return [found] if found else []

    def _passed_as(self, module: Module, parameter: ast.Name) -> Iterator[tuple[Module, ast.expr]]:
        """Yield what callers pass as a parameter of the function around an expression."""
        for function in self._surroundings[module].definitions(parameter):
            if not isinstance(function, Function) or parameter.id not in _parameters(function):
                continue
            position = _parameters(function).index(parameter.id)
            for caller, call in self._calls.get(f"{module.name}.{function.name}", ()):
                by_name = (keyword.value for keyword in call.keywords if keyword.arg == parameter.id)
                yield from ((caller, value) for value in (*call.args[position : position + 1], *by_name))

    @cached_property
    def _calls(self) -> dict[str | None, list[tuple[Module, ast.Call]]]:
        """All calls by the dotted name of what is called, with the module of the call."""
        found: dict[str | None, list[tuple[Module, ast.Call]]] = {}
        for module in self._modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call):
                    found.setdefault(module.dotted_name(node.func), []).append((module, node))
        return found

    # Private names

    def private_names(self) -> Iterator[Use]:
        """Yield the names of Megatron with a leading underscore that the package uses in any way."""
        known = (*self.overridden_methods(), *self.replaced(), *self._private_imports(), *self._private_attributes())
        yield from (use for use in known if _is_private(use.name.rpartition(".")[2]))

    def _private_imports(self) -> Iterator[Use]:
        for module in self._modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Name) and _is_private(module.imports.get(node.id, "").rpartition(".")[2]):
                    name = self._in_megatron(module, node)
                    if name is not None:
                        yield self._use_of(module, node, str(name))

    def _private_attributes(self) -> Iterator[Use]:
        for module in self._modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Attribute) and _is_private(node.attr):
                    owner = self._owner_in_megatron(module, node)
                    # `replaced` yields the attributes of modules that get another value.
                    if owner is not None and not (is_set(node) and isinstance(owner, Name)):
                        yield self._use_of(module, node, f"{owner}.{node.attr}")

    def _owner_in_megatron(self, module: Module, node: ast.Attribute) -> Name | Class | None:
        """Return the module or class of Megatron that has the attribute of an expression such as `layer._event`."""
        owner = self._in_megatron(module, node.value)
        if owner is not None:
            return owner if self._sources.defines(owner, node.attr) else None
        if is_self(node.value):
            candidates = self._ancestors_of_self(module, node)
        elif node.attr in self._own_private_names:
            return None
        else:
            # The object's class is not known. Usually, the module imports the class for an annotation.
            imported = (self._sources.class_named(target) for target in module.imports.values())
            candidates = [ancestor for cls in imported if cls for ancestor in (cls, *cls.ancestors)]
        return next((cls for cls in candidates if _is_megatrons(cls) and node.attr in cls.attributes), None)

    def _ancestors_of_self(self, module: Module, node: ast.AST) -> list[Class]:
        """Return the ancestors in Megatron of the class around a node."""
        definitions = self._surroundings[module].definitions(node)
        around = next((definition for definition in definitions if isinstance(definition, ast.ClassDef)), None)
        return [cls for ours, theirs in self._with_ancestors if ours.node is around for cls in theirs]

    @cached_property
    def _own_private_names(self) -> set[str]:
        """The attributes, functions and variables with a leading underscore that the package defines."""
        attributes = {name for cls in self._classes for name in cls.attributes}
        return attributes | {name for module in self._modules for name in module.definitions}

    def _in_megatron(self, module: Module, node: ast.expr) -> Name | None:
        """Return the name in Megatron that an expression stands for, also through a variable."""
        if isinstance(node, ast.Name) and node.id not in module.imports:
            node = module.variables.get(node.id, node)
        name = self._sources.find(module.dotted_name(node))
        return name if name and name.module.name.startswith(f"{MEGATRON}.") else None

    def _use_of(self, module: Module, node: ast.Name | ast.Attribute, name: str) -> Use:
        """Return what the code around a node does with the node's name."""
        parent = self._surroundings[module].parent(node)
        if isinstance(parent, ast.ClassDef):
            return Use(_file(module), name, "subclassed by", parent.name)
        is_called = isinstance(parent, ast.Call) and parent.func is node
        verb = "set in" if is_set(node) else "called in" if is_called else "read in"
        return Use(_file(module), name, verb, self._surroundings[module].place(node))


def _file(module: Module) -> str:
    return module.name.removeprefix(f"{OURS}.").replace(".", "/") + ".py"


def _is_megatrons(cls: Class) -> bool:
    return cls.module.name.startswith(f"{MEGATRON}.")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _summary(node: ast.ClassDef | Function) -> str:
    """Return the first line of a docstring; nothing if there is none."""
    return pages.cell((ast.get_docstring(node) or "").partition("\n")[0])


def _parameters(function: Function) -> list[str]:
    arguments = function.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _differing_arguments(ours: Function, theirs: Function) -> str:
    """Return how the arguments of a method differ from those of the method that it overrides."""
    added = [name for name in _parameters(ours) if name not in _parameters(theirs)]
    missing = [name for name in _parameters(theirs) if name not in _parameters(ours)]
    parts = [f"Also takes {_listed(added)}."] if added else []
    if missing and ours.args.kwarg is None:
        parts.append(f"Does not take {_listed(missing)}.")
    return " ".join(parts) or "Takes the same arguments."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table_by_name(uses: Iterable[Use], head: str) -> str:
    """Return a table with one row for each use that says which class uses the name, and what for."""
    rows = [(f"`{use.file}`", f"`{use.name}`", f"`{use.place}`: {use.summary}") for use in sorted(set(uses))]
    return pages.table(("file", "in Megatron", head), rows)


def table_by_place(uses: Iterable[Use], head: str) -> str:
    """Return a table with one row for each place, with all names that the place uses."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for use in sorted(set(uses)):
        names.setdefault((use.file, use.place, use.summary), []).append(f"`{use.name}`")
    rows = [
        (f"`{file}`", "<br>".join(used), f"`{place}`: {summary}" if summary else f"`{place}`")
        for (file, place, summary), used in names.items()
    ]
    return pages.table(("file", "in Megatron", head), rows)


def table_of_verbs(uses: Iterable[Use], head: str) -> str:
    """Return a table with one row for each name in a file, with all that the file does with the name."""
    places: dict[tuple[str, str], dict[str, list[str]]] = {}
    for use in sorted(set(uses)):
        places.setdefault((use.file, use.name), {}).setdefault(use.verb, []).append(use.place)
    rows = [
        (f"`{file}`", f"`{name}`", "; ".join(f"{verb} {_listed(used)}" for verb, used in verbs.items()))
        for (file, name), verbs in places.items()
    ]
    return pages.table(("file", "in Megatron", head), rows)


def render() -> str:
    """Return the page for the installed Megatron-Core."""
    megatron = importlib.util.find_spec(MEGATRON)  # a namespace package, whose search imports nothing
    folders = [Path(folder) for folder in (megatron and megatron.submodule_search_locations) or ()]
    package = Package(Sources({OURS: [PACKAGE], MEGATRON: folders}))
    return pages.fill(
        "megatron-internals.md.j2",
        subclasses=table_by_name(package.subclasses(), "subclass"),
        methods=table_by_name(package.overridden_methods(), "overridden by"),
        attributes=table_by_place(package.overridden_attributes(), "set in"),
        replaced=table_by_place(package.replaced(), "replaced by"),
        private=table_of_verbs(package.private_names(), "use"),
    )


if __name__ == "__main__":
    pages.run("megatron-internals.md", render, "Write docs/megatron-internals.md from the sources.")
