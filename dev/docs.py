"""Build the documentation site from the notebooks and their stored outputs; nothing is executed.
`python dev/docs.py` writes HTML to docs/. For each exported cell the site shows an entry for every public name
(signature, docstring, a table of arguments) and, folded, the source."""
import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from api import entries, is_exported, module_of, read_cells, root, source_of

ROOMS = {
    'synth': 'Synthetic people', 'data': 'Data', 'models': 'Model and losses', 'evaluation': 'Evaluation',
    'training': 'Training', 'explain': 'Explanations', 'gallery': 'Galleries', 'export': 'Export', 'video': 'Video',
    'web': 'A page over a gallery', 'cli': 'Command line'}
GUIDES = ['overview', 'tutorial', 'own_folder', 'research_sets', 'reranking_variants', 'several_gpus', 'gallery',
          'video_to_identities', 'command_line', 'results']
GROUND = ['00_core', '01_images', '02_boxes'] # pages outside the rooms
COPIED = ('benchmarks', 'examples') # folders outside nbs/ that pages link to
PRETRAINED = Path('pyramidreid')/'pretrained' # models that come with the package, each with its card

# ---- entries of the API

def escape(text): return text.replace('|', '\\|')

def code(text): return f'`{escape(text)}`' if text else ''

def argument_table(entry):
    "Lines of a Markdown table of the arguments; columns that would be empty are left out"
    described = [a for a in entry.arguments if a.name!='*' and (a.docment or a.type)]
    if not described: return []
    columns = {'argument': [code(a.name) for a in described], 'type': [code(a.type) for a in described],
               'default': [code(a.default) for a in described], '': [escape(a.docment) for a in described]}
    columns = {title: cells for title,cells in columns.items() if any(cells)}
    rows = [list(columns), ['---']*len(columns), *zip(*columns.values())]
    return [f'| {" | ".join(row)} |' for row in rows]

def api_markdown(entry, module):
    "An entry as a directive of Sphinx's Python domain, which puts it into the index and the search"
    directive = 'method' if entry.kind=='property' else entry.kind
    lines = [f'`````{{py:{directive}}} {entry.name}{entry.signature}', f':module: pyramidreid.{module}']
    if entry.kind=='property': lines.append(':no-typesetting:')
    lines += ['', entry.doc, '']
    lines += [*argument_table(entry), '']
    if entry.returns: lines += [f'Returns `{entry.returns}`.', '']
    return '\n'.join([*lines, '`````'])

def public_names():
    "Where each public name is documented: name -> full name. Names that two modules have are left out"
    found = {}
    for notebook in sorted((root/'nbs').rglob('*.ipynb')):
        module = module_of(notebook)
        for cell in filter(is_exported, read_cells(notebook)):
            for entry in entries(source_of(cell)):
                if entry.command: continue
                found.setdefault(entry.name, set()).add(f'pyramidreid.{module}.{entry.name}')
    return {name: full.pop() for name,full in found.items() if len(full)==1}

# ---- cells of a page

def markdown_cell(source, cell_id):
    return dict(cell_type='markdown', id=cell_id, metadata={}, source=source)

def is_hidden(source): return bool(re.search(r'^#\|\s*(hide\b|default_exp)', source, re.M))

def is_imports(source):
    "Does an exported cell hold imports alone?"
    lines = [o for o in source.splitlines() if o.strip() and not o.startswith(('#', ' ', ')'))]
    return all(o.startswith(('import ', 'from ')) for o in lines)

def without_directives(source): return re.sub(r'^#\|.*\n?', '', source, flags=re.M)

def link_names(text, names):
    "Turn `name` into a link to its entry, except in headings, code blocks and links"
    def link(found):
        name = found[1].split('(')[0]
        if name.startswith('learn.'): name = name.replace('learn.', 'ReIDLearner.', 1)
        return f'{{py:obj}}`{found[1]} <{names[name]}>`' if name in names else found[0]
    lines,fenced = [],False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith('```'): fenced = not fenced
        skip = fenced or line.startswith(('#', '    '))
        lines.append(line if skip else re.sub(r'(?<![\[`}])`([A-Za-z_][\w.]*(?:\([^`]*\))?)`(?![\]`])', link, line))
    return ''.join(lines)

def site_link(label, target, page):
    "A link to a file outside nbs/: tables of results are pages of the site, other files are downloads"
    path = (page.parent/target.split('#')[0]).resolve()
    if not path.is_relative_to(root): return None
    name = path.relative_to(root)
    if path.suffix=='.md': return f'[{label}](/{name})'
    if name.parts[0] not in COPIED: return None
    return f'{{download}}`{label} </{name}>`'

def fix_links(text, page):
    "Links out of nbs/ as the site needs them"
    def fix(found): return site_link(found[1], found[2], page) or found[0]
    return re.sub(r'\[([^\]]*)\]\((\.\.[^)]*)\)', fix, text)

def markdown_source(source, page, names):
    "A markdown cell for the site: the summary in italics, links resolved"
    source = re.sub(r'\A(# [^\n]*\n\n)> ([^\n]*)', r'\1*\2*', source)
    return link_names(fix_links(source, page), names)

def is_noise(output):
    "Style sheets that fastai's progress bars leave behind"
    html = ''.join(output.get('data', {}).get('text/html', ''))
    return '<style>' in html and 'progress' in html

def exported_cells(cell, module):
    "The entries of an exported cell, then its source, folded"
    source = source_of(cell)
    for i,entry in enumerate(entries(source)): yield markdown_cell(api_markdown(entry, module), f'{cell["id"]}-{i}')
    if not is_imports(source):
        yield dict(cell, source=without_directives(source), outputs=[], metadata=dict(tags=['hide-input']))

def page_cells(notebook, names):
    "The cells of a notebook as the site shows them"
    module = module_of(notebook)
    for cell in read_cells(notebook):
        source = source_of(cell)
        if cell['cell_type']=='markdown': yield dict(cell, source=markdown_source(source, notebook, names), metadata={})
        elif is_exported(cell): yield from exported_cells(cell, module)
        elif not is_hidden(source):
            outputs = [o for o in cell.get('outputs', []) if not is_noise(o)]
            tags = dict(tags=['remove-input']) if re.search(r'^#\|\s*echo:\s*false', source, re.M) else {}
            yield dict(cell, source=without_directives(source), outputs=outputs, metadata=tags)

def stage_page(notebook, staged, names):
    page = json.loads(notebook.read_text(encoding='utf-8'))
    page['cells'] = list(page_cells(notebook, names))
    page['metadata']['kernelspec'] = dict(name='python3', display_name='Python 3', language='python')
    target = staged/notebook.relative_to(root/'nbs')
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(page), encoding='utf-8')

# ---- the site

def toctree(pages, depth=1): return f'```{{toctree}}\n:maxdepth: {depth}\n' + '\n'.join(pages) + '\n```\n'

def room_page(title, pages, intro=''): return f'# {title}\n\n{intro}\n\n{toctree(pages)}'

CONF = '''
project = html_title = 'pyramidreid'
extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_code_prompt_show = 'Show source'
nb_code_prompt_hide = 'Hide source'
html_theme = 'furo'
root_doc = 'contents'
myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_heading_anchors = 3
add_module_names = False
toc_object_entries = False
html_static_path = ['_static']
html_css_files = ['site.css']
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header', 'ref.python', 'ref.obj', 'misc.highlighting_failure']
'''

CSS = '''
.content { width: 60em; }
.cell_output img, article img { background: white; }
pre { font-size: .78em; }
dl.py { margin-bottom: .5rem; }
dl.py > dd { margin-left: 1.2rem; }
dl.py table.docutils { font-size: .82em; margin-left: 0; margin-right: auto; }
.sig { font-size: .88em; }
div.cell.tag_hide-input details.hide > summary {
  background: var(--color-background-secondary); font-size: .85em;
  border-left: 2px solid var(--color-foreground-border); }
div.cell.tag_hide-input details.hide > summary p { background: none !important; }
'''

def stage(staged):
    "Write what Sphinx reads"
    shutil.rmtree(staged, ignore_errors=True)
    names = public_names()
    for notebook in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' not in notebook.parts: stage_page(notebook, staged, names)
    shutil.copytree(root/'nbs'/'images', staged/'images')
    for folder in COPIED: shutil.copytree(root/folder, staged/folder, dirs_exist_ok=True)
    write_results_index(staged)
    write_model_cards(staged)
    for page in ('CONTRIBUTING', 'CHANGELOG', 'SECURITY'): # their links are relative to the top folder
        text = (root/f'{page}.md').read_text(encoding='utf-8').replace('](nbs/', '](')
        (staged/f'{page}.md').write_text(text, encoding='utf-8')
    for room,title in ROOMS.items():
        pages = sorted(o.stem for o in (staged/room).glob('*.ipynb'))
        (staged/room/'index.md').write_text(room_page(title, pages))
    guides = [o for o in GUIDES if (staged/'guides'/f'{o}.ipynb').exists()]
    (staged/'guides'/'index.md').write_text(room_page('Guides', guides))
    ground = '## Basics\n\n' + toctree(GROUND) + '\n## Project\n\n' + toctree(['CONTRIBUTING', 'CHANGELOG', 'SECURITY'])
    rooms = [f'{room}/index' for room in ('guides', *ROOMS, PRETRAINED.as_posix(), 'benchmarks')]
    (staged/'contents.md').write_text(f'# Contents\n\n{toctree(["index", *rooms], depth=2)}\n{ground}')
    (staged/'_static').mkdir()
    (staged/'_static'/'site.css').write_text(CSS)
    (staged/'conf.py').write_text(CONF)

def write_results_index(staged):
    pages = sorted(f'results/{o.stem}' for o in (staged/'benchmarks'/'results').glob('*.md'))
    intro = 'Tables written by the scripts in `benchmarks/`, each with its command, hardware and date.'
    (staged/'benchmarks'/'index.md').write_text(room_page('Measurements', pages, intro))

def write_model_cards(staged):
    names = sorted(card.parent.name for card in (root/PRETRAINED).glob('*/README.md'))
    for name in names:
        text = (root/PRETRAINED/name/'README.md').read_text(encoding='utf-8')
        without_head = re.sub(r'\A---\n.*?\n---\n', '', text, flags=re.S) # YAML for the Hub
        (staged/PRETRAINED/name).mkdir(parents=True)
        (staged/PRETRAINED/name/'README.md').write_text(without_head, encoding='utf-8')
    intro = 'Models that come with the package. Each has a licence of its own.'
    (staged/PRETRAINED/'index.md').write_text(room_page('Models', [f'{name}/README' for name in names], intro))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=root/'docs', help='folder for the HTML')
    out = parser.parse_args().out.resolve()
    staged = out.with_name(f'{out.name}-source')
    stage(staged)
    shutil.rmtree(out, ignore_errors=True)
    problems = out.with_name(f'{out.name}-warnings.txt')
    sphinx = [sys.executable, '-m', 'sphinx', '-q', '-j', 'auto', '-w', problems, staged, out]
    subprocess.run(list(map(str, sphinx)), check=True)
    warnings = problems.read_text(encoding='utf-8')
    shutil.rmtree(staged)
    problems.unlink()
    if warnings: sys.exit(f'Sphinx warns:\n{warnings}')
    print(f'The site is in {out}: open {out/"index.html"}')

if __name__=='__main__': main()
