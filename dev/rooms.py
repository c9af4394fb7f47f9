"""Draw the rooms of the code, with their modules and the imports between them, into nbs/images/rooms.svg.
`python dev/rooms.py`, or with --check, which fails if the drawing is out of date."""
import re
import sys
import textwrap
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
    'web': 'a page over a gallery',
    'video': 'frames, trackers and tracklets',
    'gallery': 'store people and search for them',
    'export': 'model files to share, ONNX runtime',
    'explain': 'why two people matched, where a model errs',
    'training': 'learner, dynamic loss weights, recipes, checkpoints',
    'evaluation': 'exact metrics, protocols, re-ranking, open sets',
    'models': 'backbone, pyramid, losses',
    'data': 'from folders to batches',
    'synth': 'synthetic people',
    'boxes': 'from a frame and boxes to crops',
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

def module_lines(room): return textwrap.wrap(' · '.join(modules(room)), 103) or ['']

def middles(order):
    "Vertical position of each room's middle, from the top down; a room with more lines of modules is higher"
    result,top = {},.6
    for room in order:
        height = 1.2+.3*(len(module_lines(room))-1)
        result[room] = top-height/2
        top -= height
    return result

def draw_room(ax, room, y, color):
    "Draw the box of a room around the height `y`, with its name and its modules"
    from matplotlib.patches import FancyBboxPatch
    lines = module_lines(room)
    more = .3*(len(lines)-1)
    box = FancyBboxPatch((0, y-.42-more/2), 8, .84+more, boxstyle='round,pad=.02', facecolor=color, edgecolor='#555')
    ax.add_patch(box)
    ax.text(.15, y+.13+more/2, room, fontsize=12, fontweight='bold', va='center')
    ax.text(1.75, y+.13+more/2, ABOUT[room], fontsize=10, va='center')
    for i,line in enumerate(lines): ax.text(.15, y-.2+more/2-.3*i, line, fontsize=8, va='center', color='#333')

def draw(arrows):
    import matplotlib
    matplotlib.use('svg')
    matplotlib.rcParams.update({'svg.hashsalt': 'rooms', 'svg.fonttype': 'none', 'font.family': 'sans-serif'})
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch
    order = [room for row in layers() for room in row]
    height = middles(order)
    fig,ax = plt.subplots(figsize=(10.5, 8.4))
    for i,(room,y) in enumerate(height.items()): draw_room(ax, room, y, plt.cm.Pastel1(i%9))
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
