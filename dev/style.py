"""What ruff cannot see: the length of exported cells, and docstrings and docments of public names.
`python dev/style.py`, or with folders of notebooks."""
import ast
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
CELL_LINES = 40

# Exported cells that are longer, by the first name they define, each with its reason
LONG_CELLS = {}

def exported_cells(notebook):
    "Source of each exported code cell"
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type']=='code' and re.match(r'#\|\s*exports?\b', source): yield source

def first_name(source):
    "The first function or class that a cell defines"
    names = [o.name for o in ast.parse(source).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
    return names[0] if names else source.splitlines()[1][:40]

def is_command(node):
    "Is it a command of the command line? Its options carry their own help"
    return any('command(' in ast.unparse(o) or 'click.' in ast.unparse(o) for o in node.decorator_list)

def undocumented(function, lines):
    "Arguments of a function without a docment"
    if is_command(function): return
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    for arg in arguments:
        if arg.arg in ('self', 'cls') or arg.arg.startswith('_'): continue
        end = max(o.end_lineno for o in ast.walk(arg) if hasattr(o, 'end_lineno'))
        if '#' not in lines[end-1] and '#' not in lines[default_end(function, arg, end)-1]: yield arg.arg

def default_end(function, arg, end):
    "The line on which an argument's default value ends"
    positional = function.args.posonlyargs + function.args.args
    defaults = dict(zip(positional[::-1], function.args.defaults[::-1]))
    defaults |= dict(zip(function.args.kwonlyargs, function.args.kw_defaults))
    return getattr(defaults.get(arg), 'end_lineno', end)

def public_functions(tree):
    "Public functions with the name a reader knows them by; a class stands for its `__init__`"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'): yield node.name,node
        if not isinstance(node, ast.ClassDef) or node.name.startswith('_'): continue
        yield node.name,node
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and (method.name=='__init__' or not method.name.startswith('_')):
                yield f'{node.name}.{method.name}',method

def problems(notebook):
    "What is wrong with a notebook's exported cells"
    where = notebook.relative_to(root)
    for source in exported_cells(notebook):
        lines = source.splitlines()
        name = first_name(source)
        if len(lines)>CELL_LINES and name not in LONG_CELLS:
            yield f'{where}: the cell of {name} has {len(lines)} lines: split it, or give a reason in dev/style.py'
        for name,node in public_functions(ast.parse(source)):
            inherited = name.split('.')[-1]=='__init__' or is_small(node)
            if not ast.get_docstring(node) and not inherited: yield f'{where}: {name} has no docstring'
            if isinstance(node, ast.FunctionDef):
                for arg in undocumented(node, lines): yield f'{where}: {name}: argument {arg} has no docment'

def is_small(node):
    "A method of one statement, or one that fastai calls by its name: the name says it"
    if isinstance(node, ast.ClassDef): return False
    hooks = ('before_', 'after_', 'encodes', 'decodes', 'forward', 'setups', 'state_dict', 'load_state_dict', 'new')
    return node.name.startswith(hooks) or is_property(node) and len(node.body)==1

def is_property(node): return any(getattr(o, 'id', '')=='property' for o in node.decorator_list)

def main():
    paths = [Path(o).resolve() for o in sys.argv[1:]] or [root/'nbs']
    notebooks = [o for path in paths for o in (sorted(path.rglob('*.ipynb')) if path.is_dir() else [path])]
    found = [o for notebook in notebooks for o in problems(notebook)]
    if found: sys.exit('\n'.join([*found, f'{len(found)} problems']))
    print('Exported cells are short and documented.')

if __name__=='__main__': main()
