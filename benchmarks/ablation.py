"""The paper's questions, one change at a time from the default: which levels of the pyramid, how many basic parts, how
wide a branch, which loss, and how the losses are combined. Synthetic people and a small network from scratch, or any
dataset in a folder:
`python benchmarks/ablation.py`
`python benchmarks/ablation.py --data DIR --arch resnet50 --weights FILE --size 384 128 --epochs 60 --out market1501`
A run that is noted is not repeated: a script that was killed, or stopped by --minutes, resumes where it was."""
import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from common import markdown, mean_std, noted, results, run_grid, train_folder, train_synthetic, write_table

titles = dict(
    levels='Levels of the pyramid', parts='Basic parts', width="Width of a branch's feature", loss='Which loss',
    dynamic='How both losses are combined')

# With other training seeds on the same people: what chance alone does
AGAIN = {f'default, trained again ({i})': dict(shift=1000*i) for i in (1,2)}

# ---- what is asked

def level_sets(n):
    "Sets of levels to compare, by label; the first is the default"
    every,half = list(range(1, n+1)),n//2
    without = {f'without {level}': [o for o in every if o!=level] for level in every}
    return {
        f'all, 1–{n}': every, **without,
        f'fine only, 1–{half}': every[:half], f'coarse only, {half+1}–{n}': every[half:],
        'single parts, 1': [1], f'the whole, {n}': [n]}

def part_change(parts, n):
    "What differs from a pyramid of `n` parts with `parts` instead; one part is the whole"
    if parts==n: return {}
    return dict(levels=[n]) if parts==1 else dict(n_parts=parts)

def questions(n, rows, emb_sz=128):
    "`{question: {label: what differs from the default}}` for a pyramid of `n` parts on a map of `rows` rows"
    every = list(range(1, n+1))
    parts = sorted({o for o in (1,2,3,4,6,8) if rows%o==0} | {n})
    widths = sorted({32, 64, 128, 256, emb_sz})
    fixed = dict(dynamic=False)
    return dict(
        levels={label: {} if levels==every else dict(levels=levels) for label,levels in level_sets(n).items()},
        parts={str(o): part_change(o, n) for o in parts},
        width={str(o): {} if o==emb_sz else dict(emb_sz=o) for o in widths},
        loss={
            'both, dynamic': {}, 'both, fixed sum': fixed,
            'ID alone, P×K': dict(fixed, only='id'), 'ID alone, random': dict(fixed, only='id', mode='random'),
            'triplet alone, P×K': dict(fixed, only='triplet')},
        dynamic={
            'dynamic, gate': {}, 'dynamic, normalized': dict(dynamic='normalized'),
            'dynamic, paper': dict(dynamic='paper'), 'fixed sum': fixed})

def name(differs): # What differs from the default
    "A configuration's name in the file of runs; the same for every question that asks for it"
    return ', '.join(f'{k}={v}' for k,v in sorted(differs.items())) or 'default'

def grid(asked, seeds, base):
    "A config for each run, every seed's default first; what several questions share is there once"
    changes = [{}, *AGAIN.values(), *(change for cells in asked.values() for change in cells.values())]
    cells = {name(change): change for change in changes}
    return [{**base, **change, 'name': label, 'seed': seed} for seed in range(seeds) for label,change in cells.items()]

# ---- what was found

def against_default(runs):
    "mAP less that of the default with the same seed: a row for each seed, a column for each configuration"
    mAP = runs.pivot(index='seed', columns='name', values='mAP')
    return mAP.sub(mAP['default'], axis=0)

def by_chance(runs):
    "What the default moved by when it was trained again"
    again = [name(change) for change in AGAIN.values()]
    return against_default(runs).reindex(columns=again).stack().dropna()

def root_mean_square(values): return (values**2).mean()**.5

def mean_range(values): return f'{values.mean():+.3f} ({values.min():+.3f} … {values.max():+.3f})'

def table_row(label, group, gains):
    "A row of a table: the runs of one configuration"
    return {
        '': label, 'branches': group.branches.iloc[0], 'embedding': group.embedding.iloc[0],
        'mAP': mean_std(group.mAP), 'rank-1': mean_std(group.rank1),
        'mAP against the default, same seed: mean (least … most)':
            '' if group.name.iloc[0]=='default' else mean_range(gains.dropna()),
        'runs': len(group)}

def tables(runs, asked):
    "Markdown: a table for each question"
    gains,groups = against_default(runs),dict(list(runs.groupby('name')))
    chance = {'**default**': 'default', **{label: name(change) for label,change in AGAIN.items()}}
    sections = [('Chance', chance)]
    for question,cells in asked.items():
        labels = {label if change else f'**{label}** (default)': name(change) for label,change in cells.items()}
        sections.append((titles[question], labels))
    texts = []
    for title,cells in sections:
        rows = [table_row(label, groups[n], gains[n]) for label,n in cells.items() if n in groups]
        texts.append(f'## {title}\n\n' + markdown(pd.DataFrame(rows).set_index('')))
    return '\n\n'.join(texts)

def draw_panel(ax, cells, gains, title, band, limits):
    "One question: a dot for each seed, a bar for their mean"
    ax.axvspan(-band, band, color='0.9', lw=0)
    ax.axvline(0, color='black', lw=.8)
    for y,label in enumerate(map(name, cells.values())):
        if label=='default': ax.plot(0, y, 'D', color='black', ms=5)
        elif label in gains:
            ax.plot(gains[label], [y]*len(gains), 'o', color='tab:blue', ms=4.5, alpha=.55, mew=0)
            ax.plot(gains[label].mean(), y, '|', color='tab:blue', ms=11, mew=1.8)
    margin = .05*(limits[1]-limits[0])
    ax.set(yticks=range(len(cells)), yticklabels=cells, ylim=(len(cells)-.4, -.6),
           xlim=(limits[0]-margin, limits[1]+margin))
    ax.set_title(title, loc='left', fontsize=9.5)
    ax.tick_params(labelsize=8)
    ax.locator_params(axis='x', nbins=5)
    ax.tick_params(axis='y', length=0)
    ax.spines[['top', 'right', 'left']].set_visible(False)
    for text,change in zip(ax.get_yticklabels(), cells.values()): text.set_fontweight('normal' if change else 'bold')

def panel_columns(asked):
    "The questions in columns of the plot"
    columns = [[q for q in column if q in asked] for column in (('levels',), ('parts', 'width'), ('loss', 'dynamic'))]
    return [column for column in columns if column]

def plot(runs, asked, title):
    "A panel for each question. The default is the line; the band is twice what chance alone does (root mean square)"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    gains,again = against_default(runs),by_chance(runs)
    band = 2*root_mean_square(again) if len(again)>1 else 0
    names = {name(change) for cells in asked.values() for change in cells.values()}
    shown = gains[[label for label in names if label in gains]]
    limits = min(-band, shown.min().min()),max(band, shown.max().max())
    columns = panel_columns(asked)
    n_rows = max(sum(len(asked[q])+2 for q in column) for column in columns)
    fig = plt.figure(figsize=(3.9*len(columns), .8+.27*n_rows), layout='constrained')
    for part,column in zip(fig.subfigures(1, len(columns), squeeze=False)[0], columns):
        axes = part.subplots(len(column), 1, squeeze=False, height_ratios=[len(asked[q]) for q in column])[:,0]
        for ax,q in zip(axes, column): draw_panel(ax, asked[q], gains, titles[q], band, limits)
        axes[-1].set_xlabel('mAP against the default, same seed', fontsize=8)
    fig.suptitle(title, fontsize=9, x=.01, ha='left')
    return fig

def chance_text(runs):
    "What chance alone does, and whether the package changed between runs"
    again,text = by_chance(runs),''
    if not again.empty:
        moves = ', '.join(f'{v:+.3f}' for v in again)
        text = (f"Trained again with other seeds on the same people, the default moved by {moves}, a root mean square "
                f"of {root_mean_square(again):.3f}: a change that is not clearly larger is not shown to matter.")
    versions = runs.groupby('code', sort=False).size() if 'code' in runs else []
    if len(versions)>1:
        counts = ', '.join(f'{n} with {version}' for version,n in versions.items())
        text += f" The package was changed between runs: {counts}."
    return text

def report(out, asked, people, how):
    "Write table and plot of the runs noted so far"
    runs = pd.DataFrame(noted(f'{out}.json'))
    have = set() if runs.empty else set(runs.name)
    if 'default' not in have:
        print('No run of the default is done: there is nothing to compare with yet')
        return
    def has_runs(cells): return any(change and name(change) in have for change in cells.values())
    asked = {q: cells for q,cells in asked.items() if has_runs(cells)}
    default = runs[runs.name=='default']
    text = (f"{people}; {how}, {default.steps.iloc[0]} steps; mean ± standard deviation over the seeds that have "
            f"a run. One thing is changed at a time. {chance_text(runs)}")
    write_table(out, 'Ablations', tables(runs, asked), text)
    title = (f'{people}. Default: mAP {mean_std(default.mAP)}.\nA dot for each seed, a bar at their mean; grey: twice '
             'what the default moves by when trained again (root mean square)')
    plot(runs, asked, title).savefig(results/f'{out}.png', dpi=120)

# ---- the command

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--questions', nargs='+', choices=titles, default=list(titles))
    add('--data', type=Path, help='folder of a known dataset; without it, synthetic people')
    add('--hold-out', type=float, help='evaluate on this fraction of the training identities (with --data: 0.2)')
    add('--test', action='store_true', help='evaluate on the official test split: for a final result, not to choose by')
    add('--people', type=int, nargs=2, default=(80,80), metavar=('TRAIN','TEST'), help='synthetic identities')
    add('--misalign', type=float, default=.5, help='how badly synthetic people are cropped')
    add('--size', type=int, nargs=2, default=(96,48), metavar=('H','W'))
    add('--arch', default='resnet10', help='a ResNet, or the name of a timm model')
    add('--weights', type=Path, help='file of its weights; without it, from scratch')
    add('--recipe', choices=('one_cycle','paper','modern'), default='one_cycle')
    add('--epochs', type=int, default=12)
    add('--steps', type=int, help='instead of epochs: as many whole ones as this takes')
    add('--lr', type=float, help='highest of one_cycle (3e-3; with weights 1e-3 for the head, a quarter for the body)')
    add('--batch', type=int, nargs=2, default=(8,8), metavar=('P','K'))
    add('--n-parts', type=int, default=6, help='of the default')
    add('--seeds', type=int, default=3)
    add('--jobs', type=int, default=1, help='processes of one thread each; with a GPU always 1')
    add('--workers', type=int, default=0, help='of a loader')
    add('--cache', type=Path, help='file for the decoded images of --data, which all runs share')
    add('--minutes', type=float, help='start no run after so many')
    add('--out', default='ablation', help='name of the results')
    args = parser.parse_args(argv)
    if args.test and (args.hold_out or not args.data):
        parser.error('--test is the official test split of --data, without --hold-out')
    if args.cache and not args.data: parser.error('--cache is for the images of --data')
    if args.lr and args.recipe!='one_cycle':
        parser.error(f'the recipe {args.recipe} has learning rates of its own: leave out --lr')
    if args.n_parts<2: parser.error('a pyramid to take levels from has at least --n-parts 2')
    if args.data and not args.test and args.hold_out is None: args.hold_out = .2
    if not args.lr: args.lr = 1e-3 if args.weights else 3e-3
    return args

def describe_people(args, df):
    if df is not None:
        split = 'official test split' if args.test else f'{args.hold_out:.0%} of the training identities held out'
        return f"{df.attrs['name']}, {split}"
    test = f'{args.hold_out:.0%} of them held out' if args.hold_out else f'{args.people[1]} to search for'
    return f"Synthetic people, {args.people[0]} to train on, {test}, misalign {args.misalign:g}"

def describe_training(args, device):
    start = f'from {args.weights.name}' if args.weights else 'from scratch'
    rate = f' at {args.lr:g}' if args.recipe=='one_cycle' else ''
    h,w = args.size
    p,k = args.batch
    return (f'{args.arch} {start} at {h}×{w}, {args.n_parts} parts, recipe {args.recipe}{rate}, batches of {p}×{k}, '
            f'{device}')

def map_rows(args):
    "Rows of the backbone's feature map. Raises `ValueError` if they cannot be divided into the parts"
    import pyramidreid.all as lib
    from pyramidreid.models.backbone import create_backbone, map_height
    from pyramidreid.models.pyramid import part_height
    arch = getattr(lib, args.arch, args.arch)
    rows = map_height(create_backbone(arch, pretrained=False, size=tuple(args.size)), args.size[0])
    part_height(rows, args.n_parts)
    return rows

def configuration(args, df, device):
    "Arguments of every run, and the settings that a file of results must share"
    shared = {key: getattr(args, key) for key in ('size','hold_out','arch','recipe','steps','lr','n_parts')}
    shared.update(epochs=None if args.steps else args.epochs, p=args.batch[0], k=args.batch[1])
    if df is None: people = noted_people = dict(n_train=args.people[0], n_test=args.people[1], misalign=args.misalign)
    else:
        people = dict(data=str(args.data), cache=str(args.cache) if args.cache else None)
        images = df.split.value_counts().to_dict()
        noted_people = dict(data=df.attrs['name'], images=images, cache=bool(args.cache))
    weights = str(args.weights) if args.weights else None
    base = dict(shared, workers=args.workers, weights=weights, **people)
    settings = dict(shared, weights=args.weights and args.weights.name, device=device, **noted_people)
    return base, json.loads(json.dumps(settings))

def main(argv=None):
    args = parse(argv)
    import torch

    from pyramidreid.all import dataset_table
    cuda = torch.cuda.is_available()
    device = 'GPU, bf16' if cuda else 'CPU'
    asked = {q: cells for q,cells in questions(args.n_parts, map_rows(args)).items() if q in args.questions}
    df = dataset_table(args.data) if args.data else None
    base,settings = configuration(args, df, device)
    call,jobs,fname = train_folder if args.data else train_synthetic,1 if cuda else args.jobs,f'{args.out}.json'
    try: noted(fname, settings)
    except ValueError as e: sys.exit(str(e))
    try: run_grid(fname, grid(asked, args.seeds, base), jobs, call, settings, args.minutes)
    except RuntimeError as e: sys.exit(str(e))
    finally: report(args.out, asked, describe_people(args, df), describe_training(args, device))

if __name__=='__main__': main()
