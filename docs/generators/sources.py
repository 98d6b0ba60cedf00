"""Reads Python sources without importing them: the meaning of names, and the classes that a class inherits from."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """One module: its syntax tree, and the names that it defines and imports.

    Args:
        name: dotted name.
        path: the module's file; for a package its `__init__.py`.

    Attributes:
        name: dotted name.
        tree: the syntax tree.
        definitions: the statements that define names at the top level, also inside `if` and `try`.
        imports: the dotted names that imports bind, by local name. An import at the top level wins over an import in a
            function.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self._package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.definitions: dict[str, ast.stmt] = {}
        for statement in _statements(self.tree.body):
            for defined in names_defined_by(statement):
                self.definitions.setdefault(defined, statement)
        self.imports: dict[str, str] = {}
        for node in ast.walk(self.tree):  # breadth first
            for local, target in self._names_imported_by(node):
                self.imports.setdefault(local, target)

    def _names_imported_by(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        """Yield the local name and the dotted name of everything that a node imports."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds `a`, and `import a.b as c` binds `a.b`.
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, whole
        elif isinstance(node, ast.ImportFrom):
            base = self._package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield alias.asname or alias.name, f"{source}.{alias.name}"

    @cached_property
    def variables(self) -> dict[str, ast.expr]:
        """The value assigned to each variable of the module and its functions, such as an imported class."""
        return {
            node.targets[0].id: node.value
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }

    def dotted_name(self, node: ast.AST) -> str | None:
        """Return the dotted name that an expression such as `utils.get_pg_size` stands for; None for any other."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id) or f"{self.name}.{node.id}"
        if isinstance(node, ast.Attribute):
            owner = self.dotted_name(node.value)
            return f"{owner}.{node.attr}" if owner else None
        return None


class Class:
    """A class of a module.

    Args:
        sources: finds the base classes.
        module: the module.
        node: the definition.

    Attributes:
        name: the class's own name.
        module: the module.
        node: the definition.
        methods: the methods that the class itself defines.
        attributes: the names of all attributes of the class itself: methods, class attributes, and attributes of `self`
            that its methods set.
    """

    def __init__(self, sources: "Sources", module: Module, node: ast.ClassDef) -> None:
        self._sources = sources
        self.name = node.name
        self.module = module
        self.node = node
        self.methods = {statement.name: statement for statement in node.body if isinstance(statement, Function)}
        parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
        on_self = (part.attr for part in parts if is_set(part) and is_self(part.value))
        self.attributes = {*on_self, *(name for statement in node.body for name in names_defined_by(statement))}

    def __str__(self) -> str:
        return f"{self.module.name}.{self.name}"

    @cached_property
    def bases(self) -> tuple["Class", ...]:
        """The base classes whose sources are known."""
        written = (base.value if isinstance(base, ast.Subscript) else base for base in self.node.bases)
        found = (self._sources.class_named(self.module.dotted_name(base)) for base in written)
        return tuple(base for base in found if base)

    @cached_property
    def ancestors(self) -> tuple["Class", ...]:
        """The base classes and all theirs, in the order in which Python searches them."""
        found = [ancestor for base in self.bases for ancestor in (base, *base.ancestors)]
        # Keep the last of several places of a class, so that a class comes before its own bases.
        return tuple(reversed(dict.fromkeys(reversed(found))))

    def has(self, attribute: str) -> bool:
        """Whether the class or an ancestor sets an attribute."""
        return any(attribute in cls.attributes for cls in (self, *self.ancestors))


@dataclass(frozen=True)
class Name:
    """A name and the module that defines it.

    Attributes:
        module: the defining module.
        path: names inside the module, such as `("TopKRouter", "forward")`; empty for the module itself.
    """

    module: Module
    path: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((self.module.name, *self.path))


class Sources:
    """The modules of some packages.

    Args:
        folders: for each package the folders that may hold its modules, in the order in which Python searches them.
    """

    def __init__(self, folders: Mapping[str, Sequence[Path]]) -> None:
        self._folders = folders
        self.module = cache(self._read_module)
        self._class = cache(lambda module, node: Class(self, module, node))

    def modules(self, package: str) -> Iterator[Module]:
        """Yield all modules of a package."""
        for folder in self._folders[package]:
            for path in sorted(folder.rglob("*.py")):
                parts = (package, *path.relative_to(folder).with_suffix("").parts)
                module = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
                if module is not None:
                    yield module

    def _read_module(self, name: str) -> Module | None:
        """Return the module of a dotted name; None if the name has no file."""
        package, *parts = name.split(".")
        for folder in self._folders.get(package, ()):
            # Several folders of a namespace package may hold the same part, which the first folder then owns.
            if parts and not (folder / parts[0]).is_dir():
                continue
            path = folder.joinpath(*parts)
            files = (path / "__init__.py", path.with_suffix(".py"))
            return next((Module(name, file) for file in files if file.is_file()), None)
        return None

    def find(self, dotted: str | None) -> Name | None:
        """Return the definition of a dotted name, following imports; None if the sources do not define the name."""
        parts = dotted.split(".") if dotted else []
        for length in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:length]))
            if module is not None:
                return self._find_in(module, parts[length:])
        return None

    def _find_in(self, module: Module, path: list[str]) -> Name | None:
        if not path:
            return Name(module, ())
        first, *rest = path
        definition, imported = module.definitions.get(first), module.imports.get(first)
        # Follow the import of a name that is also assigned: the assignment is for the case that the import fails.
        if imported and imported != f"{module.name}.{first}" and not isinstance(definition, ast.ClassDef | Function):
            found = self.find(".".join((imported, *rest)))
            if found:
                return found
        if definition is None:
            return None
        if rest and isinstance(definition, ast.ClassDef) and not self._class(module, definition).has(rest[0]):
            return None
        return Name(module, tuple(path))

    def defines(self, owner: Name, name: str) -> bool:
        """Whether a module or a class has a name, also one that a module imports from elsewhere."""
        if not owner.path:
            return name in owner.module.definitions or name in owner.module.imports
        return self.find(f"{owner}.{name}") is not None

    def class_named(self, dotted: str | None) -> Class | None:
        """Return the class that a dotted name stands for; None for everything else."""
        found = self.find(dotted)
        if found is None or len(found.path) != 1:
            return None
        definition = found.module.definitions[found.path[0]]
        return self._class(found.module, definition) if isinstance(definition, ast.ClassDef) else None

    def classes(self, module: Module) -> Iterator[Class]:
        """Yield all classes of a module, also those in functions."""
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                yield self._class(module, node)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, also those inside `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.ClassDef | Function):
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def names_defined_by(statement: ast.stmt) -> list[str]:
    """Return the names to which a statement gives a value; a bare annotation gives none."""
    if isinstance(statement, ast.ClassDef | Function):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value:
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name) and is_set(node)]


def is_set(node: ast.AST) -> bool:
    """Whether a node is a name or an attribute that gets a value."""
    return isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store)


def is_self(node: ast.AST | None) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
