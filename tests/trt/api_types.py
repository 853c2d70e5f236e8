# SPDX-License-Identifier: Apache-2.0
"""What the expressions in ``starkv/trt_compat`` are, as far as it matters for names of TensorRT.

The package is what is called ``module`` there (of type ``Any``, for mypy runs without TensorRT). What is
annotated ``trt.X`` is an object of that class. Results follow from the signatures in the bindings.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from api_description import Description, Member

PACKAGE_NAMES = ("module", "_module")
ALIAS = "trt"
"""Name of the package in annotations."""


@dataclass(frozen=True)
class Type:
    """What an expression is."""

    kind: str
    """``package``, ``class``, ``object`` or ``function`` of TensorRT; ``own class``, ``own object`` or ``own
    function`` of the sources."""
    name: str = ""
    member: Member | None = None
    """Of a function of TensorRT."""
    definition: ast.FunctionDef | None = None
    """Of a function of the sources."""
    file: str = ""
    """Where that stands."""


PACKAGE = Type("package")
Names = dict[str, Type | None]


@dataclass
class OwnClass:
    """A class of the sources."""

    file: str
    definition: ast.ClassDef
    attributes: Names = field(default_factory=dict)


class Sources:
    """Modules that know each other, and one version of TensorRT.

    Args:
        trees: module by file name.
        api: of the version.
    """

    def __init__(self, trees: Mapping[str, ast.Module], api: Description) -> None:
        self.trees, self.api = trees, api
        self.classes: dict[str, OwnClass] = {}
        self._top: dict[str, Names] = {file: {} for file in trees}
        for file, tree in trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.classes[node.name] = OwnClass(file, node)
            for statement in tree.body:
                if isinstance(statement, ast.ClassDef):
                    self._top[file][statement.name] = Type("own class", statement.name)
                elif isinstance(statement, ast.FunctionDef):
                    name = statement.name
                    self._top[file][name] = Type("own function", name, definition=statement, file=file)
        self._import()
        # Attributes follow from each other.
        for _ in range(3):
            for own in self.classes.values():
                self._find_attributes(own)

    def top(self, file: str) -> Names:
        """What is known everywhere in a file."""
        return dict(self._top[file])

    def _import(self) -> None:
        public = {name: kind for names in self._top.values() for name, kind in names.items()}
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        self._top[file].setdefault(alias.asname or alias.name, public.get(alias.name))

    def _find_attributes(self, own: OwnClass) -> None:
        for statement in own.definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
                own.attributes[name] = self.annotated(name, statement.annotation, own.file)
            elif isinstance(statement, ast.FunctionDef):
                name = statement.name
                if any(
                    isinstance(mark, ast.Name) and mark.id == "property" for mark in statement.decorator_list
                ):
                    own.attributes[name] = self.annotated(name, statement.returns, own.file)
                else:
                    own.attributes[name] = Type("own function", name, definition=statement, file=own.file)
                names = self.parameters(statement, self.top(own.file), own.definition.name, own.file)
                for target, kind in self._assignments(statement, names, own.file):
                    own.attributes.setdefault(target, None)
                    own.attributes[target] = own.attributes[target] or kind

    def _assignments(
        self, method: ast.FunctionDef, names: Names, file: str
    ) -> Iterator[tuple[str, Type | None]]:
        """Attributes of ``self`` that a method sets."""
        for node in ast.walk(method):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                yield node.target.attr, self.annotated(node.target.attr, node.annotation, file)
            elif isinstance(node, ast.Assign):
                for target, value in pairs(node):
                    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                        yield target.attr, self.infer(value, names)

    def parameters(self, function: ast.FunctionDef, names: Names, owner: str | None, file: str) -> Names:
        """What is known within a function of a class, if it has one."""
        names = dict(names)
        arguments = function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            names[argument.arg] = self.annotated(argument.arg, argument.annotation, file)
        if owner and arguments.args:
            names[arguments.args[0].arg] = Type("own object", owner)
        return names

    def annotated(self, name: str, annotation: ast.expr | None, file: str) -> Type | None:
        """What something of that name and annotation is."""
        match annotation:
            case ast.Constant(value=str(text)):
                return self.annotated(name, ast.parse(text, mode="eval").body, file)
            case ast.BinOp(left=left, right=right):
                return self.annotated(name, left, file) or self.annotated(name, right, file)
            case ast.Name(id="Any") if name in PACKAGE_NAMES:
                return PACKAGE
            case ast.Name(id=own):
                kind = self._top[file].get(own)
                return Type("own object", own) if kind and kind.kind == "own class" else None
            case ast.Attribute():
                dotted = ast.unparse(annotation).removeprefix(f"{ALIAS}.")
                return Type("object", dotted) if self.api.is_class(dotted) else None
            case ast.Subscript(value=ast.Name(id="Iterator"), slice=item):
                # What a context manager hands out.
                return self.annotated(name, item, file)
        return None

    def infer(self, value: ast.expr, names: Names) -> Type | None:
        """What an expression is; None where unknown."""
        match value:
            case ast.Name(id=name):
                return names.get(name)
            case ast.Attribute(value=owner, attr=name):
                return self._attribute(self.infer(owner, names), name)
            case ast.Call(func=ast.Name(id="cast"), args=[annotation, _]):
                return self.annotated("", annotation, next(iter(self.trees)))
            case ast.Call(func=function):
                return self._result(self.infer(function, names))
            case ast.NamedExpr(value=inner):
                return self.infer(inner, names)
            case ast.IfExp(body=one, orelse=other):
                return self.infer(one, names) or self.infer(other, names)
        return None

    def _attribute(self, owner: Type | None, name: str) -> Type | None:
        if owner is None:
            return None
        if owner.kind == "own object" and owner.name in self.classes:
            return self.classes[owner.name].attributes.get(name)
        member = self.member(owner, name)
        if member is None:
            return None
        if member.kind == "function":
            return Type("function", f"{owner.name}.{name}".lstrip("."), member)
        if not self.api.is_class(member.type):
            return None
        return Type("class" if member.kind == "class" else "object", member.type)

    def member(self, owner: Type, name: str) -> Member | None:
        """An attribute of something of TensorRT."""
        if owner.kind == "package":
            return self.api.names.get(name)
        return self.api.member(owner.name, name) if owner.kind in ("class", "object") else None

    def _result(self, called: Type | None) -> Type | None:
        if called is None:
            return None
        if called.kind in ("class", "own class"):
            return Type("object" if called.kind == "class" else "own object", called.name)
        if called.definition is not None:
            return self.annotated("", called.definition.returns, called.file)
        returned = {signature.returns for signature in called.member.signatures} if called.member else set()
        known = [name for name in returned if self.api.is_class(name)]
        return Type("object", known[0]) if len(known) == 1 else None


def pairs(assignment: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets and their values, also of ``a, b = c, d``."""
    for target in assignment.targets:
        if isinstance(target, ast.Tuple) and isinstance(assignment.value, ast.Tuple):
            yield from zip(target.elts, assignment.value.elts, strict=False)
        else:
            yield target, assignment.value
