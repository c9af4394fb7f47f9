"""Settings for a light model: what to change in a short training of EfficientNet-Lite0 with a BNNeck, judged on people
held out of a training set, never on its test split; one change at a time, the same epochs for all:
`python benchmarks/light_settings.py --data DIR --weights FILE [--cache FILE] [--jobs 2] [--minutes M]`
A run that is noted is not repeated."""
import argparse
from functools import partial
from pathlib import Path

import pandas as pd
from common import markdown, mean_std, noted, run_grid, train_folder, write_table

from pyramidreid.training.loss_rules import MixedBatches

BASE = 'base'

def random(share, **more):
    "The change to `share` of random batches, with what else to change"
    return dict(dynamic=partial(MixedBatches, share), **more)

SMOOTH = dict(fit_args=dict(label_smoothing=.1))

# What differs from the base: the modern recipe (SGD, one cycle, averaged weights) with the paper's transforms
CHANGES = {
    BASE: {},
    '0.5 random': random(.5),
    '0.8 random': random(.8),
    '0.9 random': random(.9),
    'all random, ID loss alone': random(1.),
    '0.8 random, label smoothing 0.1': random(.8, **SMOOTH),
    '0.8 random, rates × 2': random(.8, fit_args=dict(lr_body=.02, lr_head=.2)),
    '0.8 random, rates ÷ 2': random(.8, fit_args=dict(lr_body=.005, lr_head=.05)),
    '0.8 random, label smoothing 0.1, crops, erasing 0.4':
        random(.8, **SMOOTH, tfms_args=dict(pad=5, colour=0, erase=.4)),
    '0.5 random, label smoothing 0.1, crops, erasing 0.4':
        random(.5, **SMOOTH, tfms_args=dict(pad=5, colour=0, erase=.4)),
    'rates × 2': dict(fit_args=dict(lr_body=.02, lr_head=.2)),
    'rates ÷ 2': dict(fit_args=dict(lr_body=.005, lr_head=.05)),
    'body × 3': dict(fit_args=dict(lr_body=.03)),
    'AdamW, 0.001': dict(recipe='one_cycle', lr=1e-3, tfms_args=None),
    'label smoothing 0.1': SMOOTH,
    'average over 1,000 steps': dict(fit_args=dict(ema=.999)),
    'erasing 0.5': dict(tfms_args=dict(pad=0, colour=0, erase=.5)),
    'crops': dict(tfms_args=dict(pad=5, colour=0, erase=.2)),
    'colours': dict(tfms_args=dict(pad=0, colour=.2, erase=.2)),
    'no dropout': dict(drop=0.),
    '3 parts': dict(n_parts=3),
    '2 parts': dict(n_parts=2),
    'levels 1 and 6': dict(levels=(1,6)),
    'features of 64': dict(emb_sz=64),
    'features of 256': dict(emb_sz=256),
}

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, required=True, help='folder of a known dataset')
    add('--weights', type=Path, required=True, help='file of ImageNet weights')
    add('--arch', default='tf_efficientnet_lite0')
    add('--cache', type=Path, help='file for the decoded images, which all runs share')
    add('--size', type=int, nargs=2, default=(96,48), metavar=('H','W'))
    add('--epochs', type=int, default=8)
    add('--hold-out', type=float, default=.2)
    add('--seeds', type=int, default=1)
    add('--only', nargs='+', choices=list(CHANGES), help='labels; without it, all')
    add('--jobs', type=int, default=1, help='processes of one thread each')
    add('--minutes', type=float, help='start no run after so many')
    add('--out', default='light-settings', help='name of the results')
    return parser.parse_args(argv)

def table(runs):
    "Markdown: a row for each setting, best mAP first"
    base = runs[runs.name==BASE].set_index('seed').mAP
    def row(name, group):
        gain = (group.set_index('seed').mAP-base).mean()
        return {'': f'**{name}**' if name==BASE else name, 'mAP': mean_std(group.mAP), 'rank-1': mean_std(group.rank1),
                'against the base': '' if name==BASE else f'{gain:+.3f}',
                'CPU minutes': f'{group.cpu_seconds.mean()/60:.1f}', 'embedding': group.embedding.iloc[0],
                'runs': len(group)}
    rows = [row(name, group) for name,group in runs.groupby('name')]
    result = pd.DataFrame(rows).sort_values('mAP', ascending=False).set_index('')
    return markdown(result.drop(columns=[] if len(base) else 'against the base'))

def main(argv=None):
    args = parse(argv)
    settings = dict(size=list(args.size), hold_out=args.hold_out, arch=args.arch, epochs=args.epochs,
                    data=args.data.name, weights=args.weights.name)
    shared = dict(
        size=tuple(args.size), hold_out=args.hold_out, arch=args.arch, epochs=args.epochs, data=args.data,
        weights=args.weights, cache=args.cache, recipe='modern', tfms_args=dict(pad=0, colour=0, erase=.2),
        channels_last=True, dynamic=False, neck=True)
    names = args.only or list(CHANGES)
    configs = [shared | CHANGES[name] | dict(name=name, seed=seed) for seed in range(args.seeds) for name in names]
    try: run_grid(f'{args.out}.json', configs, args.jobs, train_folder, settings, args.minutes)
    finally:
        runs = pd.DataFrame(noted(f'{args.out}.json'))
        about = (f'{args.data.name}, {args.hold_out:.0%} of the training identities held out; {args.arch} at '
                 f'{args.size[0]}×{args.size[1]}, {args.epochs} epochs with BNNeck, SGD, one cycle')
        if len(runs): write_table(args.out, 'Settings of a light model', table(runs), about)

if __name__=='__main__': main()
