"The public names of a notebook's exported cells, with signature, docstring and docments, read from the source alone."
import ast
import json
import re
import tokenize
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

root = Path(__file__).resolve().parent.parent

@dataclass
class Argument:
    name: str
    default: str = ''  # as it is written in the source
    type: str = ''
    docment: str = ''

@dataclass
class Entry:
    "One public function, class or method"
    kind: str          # 'function', 'class', 'method' or 'property'
    name: str          # with its class before it, as in `Gallery.search`
    source: str
    doc: str = ''
    arguments: list = field(default_factory=list)
    returns: str = ''
    node: ast.AST = None
    command: bool = False # of the command line: click holds its help

    @property
    def signature(self):
        if self.kind=='property': return ''
        names = [a.name + (f'={a.default}' if a.default else '') for a in self.arguments]
        return f"({', '.join(names)})"

def read_cells(notebook): return json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']

def source_of(cell): return ''.join(cell['source'])

def is_exported(cell): return cell['cell_type']=='code' and bool(re.match(r'#\|\s*exports?\b', source_of(cell)))

def module_of(notebook):
    "The module a notebook exports to, as `data.tables`; None for a guide"
    for cell in read_cells(notebook):
        found = re.search(r'^#\|\s*default_exp\s+(\S+)', source_of(cell), re.M)
        if found: return found[1]

def comments_of(source):
    "The comment on each line of `source`, by line number"
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ').rstrip() for t in tokens if t.type==tokenize.COMMENT}

def arguments_of(function, comments):
    "The arguments of a function, but for `self` and `cls`"
    spec = function.args
    positional = spec.posonlyargs + spec.args
    defaults = dict(zip(positional[::-1], spec.defaults[::-1]))
    defaults |= {arg: value for arg,value in zip(spec.kwonlyargs, spec.kw_defaults) if value is not None}
    starred = [(f'*{spec.vararg.arg}', spec.vararg)] if spec.vararg else [('*', None)] if spec.kwonlyargs else []
    double = [(f'**{spec.kwarg.arg}', spec.kwarg)] if spec.kwarg else []
    named = lambda args: [(arg.arg, arg) for arg in args]
    for name,arg in [*named(positional), *starred, *named(spec.kwonlyargs), *double]:
        if name in ('self', 'cls'): continue
        default = defaults.get(arg)
        last = arg if default is None else default
        yield Argument(
            name=name,
            default='' if default is None else ast.unparse(default),
            type=ast.unparse(arg.annotation) if arg is not None and arg.annotation else '',
            docment=comments.get(last.end_lineno, '') if last is not None else '')

def is_setter(node): return any(ast.unparse(d).endswith('.setter') for d in node.decorator_list)

def is_property(node): return any('property' in ast.unparse(d) for d in node.decorator_list)

def is_command(node):
    "Is a function a command of the command line?"
    decorators = [ast.unparse(d) for d in node.decorator_list]
    return any('click.' in d or 'command(' in d for d in decorators)

def patched_class(function):
    "The class that `@patch` adds a function to, or ''"
    if not any('patch' in ast.unparse(d) for d in function.decorator_list): return ''
    first = (function.args.posonlyargs + function.args.args)[0]
    return ast.unparse(first.annotation) if first.annotation else ''

def function_entry(node, source, comments, owner=''):
    owner = owner or patched_class(node)
    arguments = list(arguments_of(node, comments))
    if patched_class(node): arguments = [a for a in arguments if a.name not in ('self', 'cls')]
    kind = 'property' if is_property(node) else 'method' if owner else 'function'
    return Entry(
        kind=kind, name=f'{owner}.{node.name}' if owner else node.name, source=ast.get_source_segment(source, node),
        doc=ast.get_docstring(node) or '', arguments=arguments,
        returns=ast.unparse(node.returns) if node.returns else '', node=node, command=is_command(node))

def class_entries(node, source, comments):
    "A class, with the arguments of its `__init__`, and its public methods"
    methods = [o for o in node.body if isinstance(o, ast.FunctionDef)]
    init = next((o for o in methods if o.name=='__init__'), None)
    fields = [o for o in node.body if isinstance(o, ast.AnnAssign)] # of a dataclass
    arguments = list(arguments_of(init, comments)) if init else [
        Argument(o.target.id, ast.unparse(o.value) if o.value else '', ast.unparse(o.annotation),
                 comments.get(o.end_lineno, '')) for o in fields]
    yield Entry(kind='class', name=node.name, source=ast.get_source_segment(source, node),
                doc=ast.get_docstring(node) or '', arguments=arguments, node=node)
    for method in methods:
        if not method.name.startswith('_') and not is_setter(method):
            yield function_entry(method, source, comments, owner=node.name)

def entries(source):
    "The public entries of one exported cell"
    comments = comments_of(source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_') and not is_setter(node):
            yield function_entry(node, source, comments)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            yield from class_entries(node, source, comments)
