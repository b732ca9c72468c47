"""Griffe, which reads the sources, calls this extension: docstrings as Markdown, and the values of defaults.

The docstrings are plain text in Google's sections. Three things in them need a hand, see `markdown`.
"""

import re

import griffe

SECTIONS = {"Args", "Returns", "Yields", "Raises", "Attributes"}
HEADER = re.compile(r"^(\S.*:|Parameters?: .*)\n(?=[ ]+\S)", re.M)
DEFAULTS = re.compile(r"^([A-Z]+(?:, [A-Z]+)*) = (Defaults\(.*)$", re.M)


def markdown(text: str) -> str:
    """The docstring with blank lines and marks where Markdown wants them.

    An indented block right below a line of prose would flow into it. After "Parameters" it becomes a list,
    each of whose items begins at the smallest indentation. After "Example:" it becomes the section of examples,
    and after any other line a block of code.
    """
    out, end = "", 0
    for match in HEADER.finditer(text):
        header = match.group(1)
        if header.removesuffix(":") in SECTIONS:
            continue
        block = re.match(r"(?:[ ]+\S.*\n?|\n(?=[ ]))+", text[match.end() :]).group()
        out += text[end : match.start()]
        if header.endswith("Example:"):
            before = header.removesuffix("Example:").strip()
            out += (before and before + "\n\n") + "Examples:\n" + block
        elif header.startswith("Parameter"):
            indent = re.match("[ ]+", block).group()
            items = re.sub(rf"^{indent}(?=\S)", "- ", block, flags=re.M)
            out += f"{header}\n\n" + re.sub(rf"^{indent}[ ]+", "  ", items, flags=re.M)
        else:
            out += f"{header}\n\n{block}"
        end = match.end() + len(block)
    return out + text[end:]


def written_out(default: str, module: griffe.Module) -> str:
    """The value of a default like KERNEL.init, where some module has KERNEL = Defaults(SomeKernel)."""
    name, option = default.split(".")
    if name in module.imports:
        path, _, name = module.imports[name].rpartition(".")
        module = module.modules_collection[path]
    for names, values in DEFAULTS.findall(module.source):
        classes = dict(
            zip(names.split(", "), re.findall(r"Defaults\((\w+)\)", values), strict=True)
        )
        if name in classes:
            owner = module.modules_collection[module.resolve(classes[name])]
            return owner["__init__"].parameters[option].default
    raise LookupError(f"the default {default} of {module.path} has no value")


class Docstrings(griffe.Extension):
    """Applies `markdown` to every docstring and `written_out` to every default."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self.visit(pkg)

    def visit(self, thing) -> None:
        if thing.is_alias:
            return
        if thing.docstring:
            thing.docstring.value = markdown(thing.docstring.value)
        if thing.is_function:
            for parameter in thing.parameters:
                if re.fullmatch(r"[A-Z]+\.\w+", str(parameter.default)):
                    parameter.default = written_out(str(parameter.default), thing.module)
        for member in thing.members.values():
            self.visit(member)
