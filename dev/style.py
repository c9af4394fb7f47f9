"""What ruff does not see: the length of exported cells, and the docstrings and docments of public names.
`python dev/style.py`, or with folders of notebooks."""
import ast
import sys
from pathlib import Path

from api import entries, is_exported, read_cells, root, source_of

CELL_LINES = 40

# Exported cells that are longer, by the first name they define, each with its reason
LONG_CELLS = {}

# Called by fastai or torch under these names: the name says what they do
HOOKS = ('before_', 'after_', 'encodes', 'decodes', 'forward', 'setups', 'state_dict', 'load_state_dict', 'new')

def first_name(source):
    "The first function or class that a cell defines"
    names = [o.name for o in ast.parse(source).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
    return names[0] if names else source.splitlines()[1][:40]

def speaks_for_itself(entry):
    "A hook, or a property of one line"
    name = entry.name.split('.')[-1]
    if entry.kind=='property': return len(entry.node.body)==1
    return entry.kind=='method' and name.startswith(HOOKS)

def undocumented(entry):
    "Arguments that need a docment and have none"
    if entry.command or speaks_for_itself(entry): return
    for arg in entry.arguments:
        if not arg.docment and not arg.name.startswith(('_', '*')): yield arg.name

def problems(notebook):
    "What is wrong with a notebook's exported cells"
    where = notebook.relative_to(root)
    for cell in filter(is_exported, read_cells(notebook)):
        source = source_of(cell)
        name,n_lines = first_name(source),len(source.splitlines())
        if n_lines>CELL_LINES and name not in LONG_CELLS:
            yield f'{where}: the cell of {name} has {n_lines} lines: split it, or give a reason in dev/style.py'
        for entry in entries(source):
            if not entry.doc and not speaks_for_itself(entry): yield f'{where}: {entry.name} has no docstring'
            for arg in undocumented(entry): yield f'{where}: {entry.name}: argument {arg} has no docment'

def find_notebooks(paths):
    "The notebooks among `paths` and below them"
    for path in map(Path, paths): yield from sorted(path.rglob('*.ipynb')) if path.is_dir() else [path]

def main():
    notebooks = [o.resolve() for o in find_notebooks(sys.argv[1:] or [root/'nbs'])]
    found = [problem for notebook in notebooks for problem in problems(notebook)]
    if found: sys.exit('\n'.join([*found, f'{len(found)} problems']))
    print('Exported cells are short, and public names are documented.')

if __name__=='__main__': main()
