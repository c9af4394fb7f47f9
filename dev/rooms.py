"""Draw the rooms of the code, with their modules and the imports between them, into nbs/images/rooms.svg.
`python dev/rooms.py`, or with --check, which fails if the drawing is out of date."""
import re
import sys
from pathlib import Path

import grimp

try:
    import tomllib
except ImportError: # Python 3.10; import-linter brings it
    import tomli as tomllib

root = Path(__file__).resolve().parent.parent
picture = root/'nbs'/'images'/'rooms.svg'

ABOUT = {
    'cli': 'the command pyramidreid',
    'gallery': 'store people and search for them',
    'export': 'model files to share, ONNX runtime',
    'explain': 'why two people matched, where a model errs',
    'training': 'learner, dynamic loss weights, recipes, checkpoints',
    'evaluation': 'exact metrics, protocols, re-ranking, open sets',
    'models': 'backbone, pyramid, losses',
    'data': 'from folders to batches',
    'synth': 'synthetic people',
    'images': 'finding and reading image files',
    'core': 'roles, extras, atomic writes'}

def layers():
    "Rooms from the top down, as the contract in pyproject.toml orders them; rooms of one layer stand side by side"
    config = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
    contract = next(o for o in config['tool']['importlinter']['contracts'] if o['type']=='layers')
    rows = [[name.strip() for name in layer.split('|')] for layer in contract['layers']]
    return [row for row in rows if row[0] in ABOUT]

def room_of(module): return module.split('.')[1] if '.' in module else ''

def imports():
    "Pairs of rooms of which the first imports the second"
    graph = grimp.build_graph('pyramidreid')
    pairs = {(room_of(a), room_of(b)) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}
    return sorted((a, b) for a,b in pairs if a!=b and a in ABOUT and b in ABOUT)

def modules(room):
    "Names of a room's modules in the order of its notebooks"
    return [o.stem[3:] for o in sorted((root/'nbs'/room).glob('[0-9]*.ipynb'))]

def describe(arrows): return 'Imports: ' + ', '.join(f'{a} → {b}' for a,b in arrows)

def draw(arrows):
    import matplotlib
    matplotlib.use('svg')
    matplotlib.rcParams.update({'svg.hashsalt': 'rooms', 'svg.fonttype': 'none', 'font.family': 'sans-serif'})
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    order = [room for row in layers() for room in row]
    height = {room: -1.2*i for i,room in enumerate(order)}
    fig,ax = plt.subplots(figsize=(10.5, 8.2))
    for i,(room,y) in enumerate(height.items()):
        color = plt.cm.Pastel1(i%9)
        ax.add_patch(FancyBboxPatch((0, y-.42), 8, .84, boxstyle='round,pad=.02', facecolor=color, edgecolor='#555'))
        ax.text(.15, y+.13, room, fontsize=12, fontweight='bold', va='center')
        ax.text(1.75, y+.13, ABOUT[room], fontsize=10, va='center')
        ax.text(.15, y-.2, ' · '.join(modules(room)), fontsize=8, va='center', color='#333')
    for a,b in arrows:
        distance = abs(order.index(a)-order.index(b))
        arrow = FancyArrowPatch((8.05, height[a]), (8.05, height[b]), connectionstyle=f'arc3,rad={-.18-.022*distance}',
                                arrowstyle='-|>', mutation_scale=9, color=plt.cm.tab10(order.index(a)%10), linewidth=1)
        ax.add_patch(arrow)
    text = 'A room imports from the rooms below it, never from those above. Arrows show the actual imports.'
    ax.text(0, .75, text, fontsize=9.5)
    ax.set(xlim=(-.1, 11.4), ylim=(min(height.values())-.6, 1))
    ax.axis('off')
    picture.parent.mkdir(exist_ok=True)
    fig.savefig(picture, bbox_inches='tight', metadata={'Date': None, 'Description': describe(arrows)})

def main():
    arrows = imports()
    if '--check' not in sys.argv: return draw(arrows)
    text = picture.read_text(encoding='utf-8') if picture.exists() else ''
    shown = re.search('Imports: [^<]*', text)
    names = [name for room in ABOUT for name in modules(room) if name not in text]
    if not shown or shown[0]!=describe(arrows) or names:
        sys.exit('nbs/images/rooms.svg is out of date: run python dev/rooms.py')
    print('The picture of the rooms is up to date.')

if __name__=='__main__': main()
