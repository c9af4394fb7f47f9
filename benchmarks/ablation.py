"""The paper's questions, one change at a time against the default: which levels of the pyramid, how many basic parts, how wide a branch,
which loss, and how the two are joined. Synthetic people and a small network from scratch, or any data set in a folder:
`python benchmarks/ablation.py`; `python benchmarks/ablation.py --data DIR --arch resnet50 --weights FILE --size 384 128 --epochs 60 --out market1501-ablation`
A run that is noted is not repeated: a script that was killed, or stopped by --minutes, goes on where it was."""
import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from common import markdown, mean_std, noted, results, run_grid, train_folder, train_synthetic, write_table

titles = dict(levels='Levels of the pyramid', parts='Basic parts', width="Width of a branch's feature", loss='Which loss', dynamic='How both losses are joined')
AGAIN = {f'default, trained again ({i})':dict(shift=1000*i) for i in (1,2)} # with other training seeds on the same people: what chance alone does

def questions(n, rows, emb_sz=128):
    "`{question: {label: what differs from the default}}` for a pyramid of `n` parts on a map of `rows` rows"
    every,half = list(range(1,n+1)),n//2
    levels = {f'all, 1–{n}':every, **{f'without {l}':[o for o in every if o!=l] for l in every},
              f'fine only, 1–{half}':every[:half], f'coarse only, {half+1}–{n}':every[half:], 'single parts, 1':[1], f'the whole, {n}':[n]}
    parts = sorted({o for o in (1,2,3,4,6,8) if rows%o==0} | {n})
    fixed = dict(dynamic=False)
    return dict(levels={k:{} if v==every else dict(levels=v) for k,v in levels.items()},
        parts={str(o):{} if o==n else dict(levels=[n]) if o==1 else dict(n_parts=o) for o in parts}, # one part is the whole
        width={str(o):{} if o==emb_sz else dict(emb_sz=o) for o in sorted({32,64,128,256,emb_sz})},
        loss={'both, dynamic':{}, 'both, fixed sum':fixed, 'ID alone, P×K':dict(fixed, only='id'), 'ID alone, random':dict(fixed, only='id', mode='random'),
              'triplet alone, P×K':dict(fixed, only='triplet')},
        dynamic={'dynamic, gate':{}, 'dynamic, normalized':dict(dynamic='normalized'), 'dynamic, paper':dict(dynamic='paper'), 'fixed sum':fixed})

def name(differs): # What differs from the default
    "A configuration's name in the file of runs; the same for every question that asks for it"
    return ', '.join(f'{k}={v}' for k,v in sorted(differs.items())) or 'default'

def grid(asked, seeds, base):
    "A config for each run, every seed's default first; what several questions share is there once"
    cells = {name(d):d for d in [{}, *AGAIN.values(), *(d for q in asked.values() for d in q.values())]}
    return [{**base, **d, 'name':n, 'seed':s} for s in range(seeds) for n,d in cells.items()]

def against_default(runs):
    "mAP less that of the default with the same seed: a row for each seed, a column for each configuration"
    mAP = runs.pivot(index='seed', columns='name', values='mAP')
    return mAP.sub(mAP['default'], axis=0)

def by_chance(runs):
    "What the default moved by when it was trained again"
    return against_default(runs).reindex(columns=list(map(name, AGAIN.values()))).stack().dropna()

def tables(runs, asked):
    "Markdown: a table for each question"
    diff,by = against_default(runs),dict(list(runs.groupby('name')))
    def row(label, n):
        r,d = by[n],diff[n].dropna()
        return {'':label, 'branches':r.branches.iloc[0], 'embedding':r.embedding.iloc[0], 'mAP':mean_std(r.mAP), 'rank-1':mean_std(r.rank1),
                'mAP against the default, same seed: mean (least … most)':'' if n=='default' else f'{d.mean():+.3f} ({d.min():+.3f} … {d.max():+.3f})',
                'runs':len(r)}
    again = {'**default**':'default', **{l:name(d) for l,d in AGAIN.items()}}
    return '\n\n'.join(f'## {title}\n\n' + markdown(pd.DataFrame([row(l,n) for l,n in cells.items() if n in by]).set_index('')) for title,cells in
        [('Chance', again), *((titles[q], {f'**{l}** (default)' if not d else l:name(d) for l,d in o.items()}) for q,o in asked.items())])

def plot(runs, asked, title):
    "A panel for each question: a dot for each seed, a bar for their mean; the default is the line, twice what chance alone does (root mean square) the band"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    diff,again = against_default(runs),by_chance(runs)
    band = 2*(again**2).mean()**.5 if len(again)>1 else 0
    shown = diff[[c for c in {name(d) for o in asked.values() for d in o.values()} if c in diff]]
    lim = min(-band, shown.min().min()),max(band, shown.max().max())
    columns = [c for c in ([q for q in col if q in asked] for col in (('levels',),('parts','width'),('loss','dynamic'))) if c]
    fig = plt.figure(figsize=(3.9*len(columns), .8+.27*max(sum(len(asked[q])+2 for q in c) for c in columns)), layout='constrained')
    for sub,col in zip(fig.subfigures(1, len(columns), squeeze=False)[0], columns):
        for ax,q in zip(sub.subplots(len(col), 1, squeeze=False, height_ratios=[len(asked[q]) for q in col])[:,0], col):
            ax.axvspan(-band, band, color='0.9', lw=0)
            ax.axvline(0, color='black', lw=.8)
            for y,d in enumerate(map(name, asked[q].values())):
                if d=='default': ax.plot(0, y, 'D', color='black', ms=5)
                elif d in diff:
                    ax.plot(diff[d], [y]*len(diff), 'o', color='tab:blue', ms=4.5, alpha=.55, mew=0)
                    ax.plot(diff[d].mean(), y, '|', color='tab:blue', ms=11, mew=1.8)
            ax.set(yticks=range(len(asked[q])), yticklabels=asked[q], ylim=(len(asked[q])-.4,-.6), xlim=(lim[0]-.05*(lim[1]-lim[0]), lim[1]+.05*(lim[1]-lim[0])))
            ax.set_title(titles[q], loc='left', fontsize=9.5)
            ax.tick_params(labelsize=8)
            ax.locator_params(axis='x', nbins=5)
            ax.tick_params(axis='y', length=0)
            ax.spines[['top','right','left']].set_visible(False)
            for label,d in zip(ax.get_yticklabels(), asked[q].values()): label.set_fontweight('normal' if d else 'bold')
        ax.set_xlabel('mAP against the default, same seed', fontsize=8)
    fig.suptitle(title, fontsize=9, x=.01, ha='left')
    return fig

def report(out, asked, people, how):
    "Write table and plot of the runs noted so far"
    runs = pd.DataFrame(noted(out+'.json'))
    have = set() if runs.empty else set(runs.name)
    if 'default' not in have: return print('No run of the default is done: there is nothing to compare with yet')
    asked = {q:o for q,o in asked.items() if any(d and name(d) in have for d in o.values())}
    default,again = runs[runs.name=='default'],by_chance(runs)
    chance = '' if again.empty else (f"Trained again with other seeds on the same people, the default moved by {', '.join(f'{v:+.3f}' for v in again)}, "
        f"a root mean square of {(again**2).mean()**.5:.3f}: a change that is not clearly larger is not shown to matter.")
    states = runs.groupby('code', sort=False).size() if 'code' in runs else []
    if len(states)>1: chance += f" The package was changed between runs: {', '.join(f'{n} with {c}' for c,n in states.items())}."
    write_table(out, 'Ablations', tables(runs, asked), f"{people}; {how}, {default.steps.iloc[0]} steps; mean ± standard deviation over the seeds that have a run. One thing is changed at a time. {chance}")
    fig = plot(runs, asked, f'{people}. Default: mAP {mean_std(default.mAP)}.\nA dot for each seed, a bar at their mean; grey: twice what the default moves by when trained again (root mean square)')
    fig.savefig(results/f'{out}.png', dpi=120)

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--questions', nargs='+', choices=titles, default=list(titles))
    p.add_argument('--data', type=Path, help='folder of a known data set; without it people are drawn')
    p.add_argument('--hold-out', type=float, help='evaluate on this part of the training identities (default with --data: 0.2)')
    p.add_argument('--test', action='store_true', help='evaluate on the official test split: for a final figure, not to choose by')
    p.add_argument('--people', type=int, nargs=2, default=(80,80), metavar=('TRAIN','TEST'), help='identities drawn')
    p.add_argument('--misalign', type=float, default=.5, help='how badly drawn people are cut')
    p.add_argument('--size', type=int, nargs=2, default=(96,48), metavar=('H','W'))
    p.add_argument('--arch', default='resnet10', help='a ResNet, or the name of a timm model')
    p.add_argument('--weights', type=Path, help='file of its weights; without it, from scratch')
    p.add_argument('--recipe', choices=('one_cycle','paper','modern'), default='one_cycle')
    p.add_argument('--epochs', type=int, default=12)
    p.add_argument('--steps', type=int, help='instead of epochs: as many whole ones as this takes')
    p.add_argument('--lr', type=float, help='highest of one_cycle (default: 3e-3; with weights 1e-3 for the head, a quarter for the body)')
    p.add_argument('--batch', type=int, nargs=2, default=(8,8), metavar=('P','K'))
    p.add_argument('--n-parts', type=int, default=6, help='of the default')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--jobs', type=int, default=1, help='processes of one thread each; with a GPU always 1')
    p.add_argument('--workers', type=int, default=0, help='of a loader')
    p.add_argument('--cache', type=Path, help='file for the decoded images of --data, which all runs share')
    p.add_argument('--minutes', type=float, help='begin no run after so many')
    p.add_argument('--out', default='ablation', help='name of the results')
    args = p.parse_args(argv)
    if args.test and (args.hold_out or not args.data): p.error('--test is the official test split of --data, without --hold-out')
    if args.cache and not args.data: p.error('--cache is for the images of --data')
    if args.lr and args.recipe!='one_cycle': p.error(f'the recipe {args.recipe} has learning rates of its own: leave out --lr')
    if args.n_parts<2: p.error('a pyramid to take levels from has at least --n-parts 2')
    if args.data and not args.test and args.hold_out is None: args.hold_out = .2
    args.lr = args.lr or (1e-3 if args.weights else 3e-3)
    return args

def describe(args, df, device):
    "The people and the training, in words"
    if df is not None: people = f"{df.attrs['name']}, {'official test split' if args.test else f'{args.hold_out:.0%} of the training identities held out'}"
    else: people = f"Synthetic people, {args.people[0]} to train on, {f'{args.hold_out:.0%} of them held out' if args.hold_out else f'{args.people[1]} to search for'}, misalign {args.misalign:g}"
    return people, (f"{args.arch} {'from ' + args.weights.name if args.weights else 'from scratch'} at {args.size[0]}×{args.size[1]}, {args.n_parts} parts, recipe {args.recipe}"
        f"{f' at {args.lr:g}' if args.recipe=='one_cycle' else ''}, batches of {args.batch[0]}×{args.batch[1]}, {device}")

def main(argv=None):
    args = parse(argv)
    import torch

    import pyramidreid.all as lib
    cuda = torch.cuda.is_available()
    device = 'GPU, bf16' if cuda else 'CPU'
    rows = lib.map_height(lib.create_backbone(getattr(lib, args.arch, args.arch), pretrained=False), args.size[0])
    lib.part_height(rows, args.n_parts)
    asked = {q:o for q,o in questions(args.n_parts, rows).items() if q in args.questions}
    df = lib.dataset_table(args.data) if args.data else None
    shared = {k:getattr(args, k) for k in ('size','hold_out','arch','recipe','steps','lr','n_parts')}
    shared.update(epochs=None if args.steps else args.epochs, p=args.batch[0], k=args.batch[1])
    drawn = dict(n_train=args.people[0], n_test=args.people[1], misalign=args.misalign)
    base = dict(shared, workers=args.workers, weights=args.weights and str(args.weights), **(dict(data=str(args.data), cache=args.cache and str(args.cache)) if args.data else drawn))
    settings = dict(shared, weights=args.weights and args.weights.name, device=device, **(dict(data=df.attrs['name'], images=df.split.value_counts().to_dict(), cache=bool(args.cache)) if args.data else drawn))
    settings,fname = json.loads(json.dumps(settings)),args.out+'.json'
    try: noted(fname, settings)
    except ValueError as e: sys.exit(str(e))
    try: run_grid(fname, grid(asked, args.seeds, base), 1 if cuda else args.jobs, train_folder if args.data else train_synthetic, settings, args.minutes)
    except RuntimeError as e: sys.exit(str(e))
    finally: report(args.out, asked, *describe(args, df, device))

if __name__=='__main__': main()
