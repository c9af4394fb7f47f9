"""How to combine the ID loss and the triplet loss: fixed sums, the paper's rule and what of it does the work, learnt
weights, one method on gradients, and where in the network the losses act. On people held out of a training set, never
on its test split; one change at a time, the same steps for all:
`python benchmarks/weighting.py --data DIR --weights FILE [--cache FILE] [--jobs 2] [--minutes M]`
A run that is noted is not repeated: a script that was killed, or stopped by --minutes, resumes where it was."""
import argparse
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from ablation import mean_range
from common import markdown, mean_std, noted, results, run_grid, train_folder, write_table
from fastai.callback.core import Callback

from pyramidreid.models.losses import PyramidLoss, triplet_loss
from pyramidreid.models.pyramid import join_branches
from pyramidreid.training.dynamic_losses import LossDynamics
from pyramidreid.training.loss_rules import FixedWeights, LossRatioWeights, MixedBatches, UncertaintyWeights

BASE = 'fixed sum 1 : 1'
AGAIN = {f'{BASE}, trained again ({i})': dict(dynamic=False, shift=1000*i) for i in (1,2)}

# ---- parts of the paper's rule

class AlwaysPK(LossDynamics):
    "The paper's weights, but every batch is P×K and both losses are measured on it"
    mode = property(lambda self: 'pk', lambda self, value: None)

class MeasuredOnAll(LossDynamics):
    "The paper's rule with the triplet loss measured on random batches too, where it is still not trained"
    @property
    def measured(self): return self.parts

# ---- a method on gradients

def without_conflict(gradients):
    "Sum of two gradients, each without what points against the other (PCGrad: Yu et al., NeurIPS 2020)"
    first,second = gradients
    dot = (first*second).sum()
    if dot>=0: return first+second
    return first - dot/second.square().sum()*second + second - dot/first.square().sum()*first

class ProjectedGradients(Callback):
    "PCGrad on the shared feature map: the backbone gets gradients without conflict, the head those of the plain sum"
    run_valid = False
    def before_fit(self):
        self.n_conflicts = 0
        self.hook = self.model.body.register_forward_hook(self.keep)
    def keep(self, body, inputs, fmap): self.fmap = fmap
    def after_loss(self):
        parts = self.loss_func.parts.values()
        gradients = [torch.autograd.grad(part, self.fmap, retain_graph=True)[0] for part in parts]
        self.n_conflicts += int((gradients[0]*gradients[1]).sum()<0)
        combined = without_conflict(gradients)
        self.fmap.register_hook(lambda gradient: combined)
    def after_fit(self): self.hook.remove()

def project_gradients(learn): learn.add_cb(ProjectedGradients())

# ---- where the losses act

class WholeTriplet(PyramidLoss):
    "The triplet loss on the concatenated embedding, as heavy as those of all branches together"
    def _training_parts(self, feats, logits, labels, wanted):
        super()._training_parts(feats, logits, labels, [name for name in wanted if name!='triplet'])
        if 'triplet' not in wanted: return
        whole = join_branches(feats)[:,None]
        self.parts['triplet'] = feats.shape[1]*triplet_loss(whole, labels, self.margin)

# ---- what is compared

def fixed(triplet): return dict(dynamic=partial(FixedWeights, id=1., triplet=triplet))

def mixed(fraction, seed=None): return dict(dynamic=partial(MixedBatches, fraction, seed=seed))

def questions(share):
    "`{question: {label: arguments of a training}}`; `share`: the fraction of random batches that the rule drew"
    return {
        'Fixed': {
            BASE: dict(dynamic=False), 'fixed sum 1 : 0.3': fixed(.3), 'fixed sum 1 : 3': fixed(3.),
            'ID alone, P×K': dict(dynamic=False, only='id'),
            'ID alone, random batches': dict(dynamic=False, only='id', mode='random'),
            'triplet alone, P×K': dict(dynamic=False, only='triplet')},
        'The rule of the paper': {f'rule, {o}': dict(dynamic=o) for o in ('gate','normalized','paper','released')},
        'What of the rule does the work': {
            'rule, always P×K': dict(dynamic=AlwaysPK), 'rule, triplet measured on all': dict(dynamic=MeasuredOnAll),
            'mix, alternating': mixed(.5), 'mix, by a coin': mixed(.5, seed=1),
            'mix, as many as the rule': mixed(share), 'mix, 1 of 4': mixed(.25), 'mix, 9 of 10': mixed(.9)},
        'Learnt weights': {
            'uncertainty (Kendall)': dict(dynamic=UncertaintyWeights),
            'loss ratios (DWA)': dict(dynamic=partial(LossRatioWeights, period=160)),
            'PCGrad': dict(dynamic=False, change=project_gradients)},
        'Where the losses act': {
            'fixed sum, BNNeck': dict(dynamic=False, neck=True),
            'mix, BNNeck': dict(mixed(.5), neck=True), 'rule, BNNeck': dict(dynamic='gate', neck=True),
            'mix, 1 of 4, BNNeck': dict(mixed(.25), neck=True), 'mix, 9 of 10, BNNeck': dict(mixed(.9), neck=True),
            'ID alone, random batches, BNNeck': dict(dynamic=False, only='id', mode='random', neck=True),
            'fixed sum, whole triplet': dict(dynamic=False, loss=WholeTriplet),
            'mix, whole triplet': dict(mixed(.5), loss=WholeTriplet),
            'rule, whole triplet': dict(dynamic='gate', loss=WholeTriplet)},
        'Chance': AGAIN}

# ---- what was found

def against_base(runs):
    "mAP less that of the fixed sum with the same seed: a row for each seed, a column for each scheme"
    mAP = runs.pivot(index='seed', columns='name', values='mAP')
    return mAP.sub(mAP[BASE], axis=0)

def chance(gains):
    "Root mean square of what the fixed sum moved by when it was trained again with other seeds; None if it was not"
    again = gains.reindex(columns=list(AGAIN)).stack().dropna()
    return (again**2).mean()**.5 if len(again) else None

def percent(values):
    values = values.dropna() if values is not None else []
    return f'{values.mean():.0%}' if len(values) else ''

def cpu_minutes(group):
    "Mean of the processor's minutes over the runs on a CPU, whose hardware names its cores; '' if there are none"
    on_cpu = group[group.hardware.str.contains('cores')]
    return f'{on_cpu.cpu_seconds.mean()/60:.1f}' if len(on_cpu) else ''

def table_row(label, group, gains):
    return {'': f'**{label}**' if label==BASE else label, 'mAP': mean_std(group.mAP), 'rank-1': mean_std(group.rank1),
            'mAP against the fixed sum, same seed: mean (least … most)': '' if label==BASE else mean_range(gains),
            'random batches': percent(group.get('random')), 'CPU minutes': cpu_minutes(group),
            'runs': len(group)}

def tables(runs, asked):
    "Markdown: a table for each question that has runs"
    gains,groups,texts = against_base(runs),dict(list(runs.groupby('name'))),[]
    for question,schemes in asked.items():
        rows = [table_row(label, groups[label], gains[label].dropna()) for label in schemes if label in groups]
        if rows: texts.append(f'## {question}\n\n' + markdown(pd.DataFrame(rows).set_index('')))
    return '\n\n'.join(texts)

def plot(runs, asked, title):
    "A dot for each seed, a bar for their mean; the band is twice what chance alone does"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    gains = against_base(runs)
    labels = [label for schemes in asked.values() for label in schemes if label in gains and label!=BASE]
    fig,ax = plt.subplots(figsize=(7, .9+.24*len(labels)), layout='constrained')
    band = 2*(chance(gains) or 0)
    ax.axvspan(-band, band, color='0.9', lw=0)
    ax.axvline(0, color='black', lw=.8)
    for y,label in enumerate(labels):
        ax.plot(gains[label], [y]*len(gains), 'o', color='tab:blue', ms=4.5, alpha=.55, mew=0)
        ax.plot(gains[label].mean(), y, '|', color='tab:blue', ms=11, mew=1.8)
    ax.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels)-.4, -.6),
           xlabel='mAP against the fixed sum 1 : 1, same seed')
    ax.tick_params(labelsize=8)
    ax.spines[['top', 'right', 'left']].set_visible(False)
    fig.suptitle(title, fontsize=9, x=.01, ha='left')
    return fig

def made_elsewhere(runs):
    "A sentence on the runs of other machines than that of most; '' if there are none"
    usual = runs.hardware.mode()[0]
    texts = []
    for hardware,others in runs[runs.hardware!=usual].groupby('hardware'):
        named = [f"{name} (seed {', '.join(map(str, group.seed))})" for name,group in others.groupby('name')]
        texts.append(f" Computed on {hardware}, the other runs on {usual}: {'; '.join(named)}.")
    return ''.join(texts)

def report(out, asked, about):
    runs = pd.DataFrame(noted(f'{out}.json'))
    if runs.empty or BASE not in set(runs.name): return
    moved = chance(against_base(runs))
    text = f'{about}, {runs.steps.iloc[0]} steps; mean ± standard deviation over the seeds that have a run.'
    if moved is not None: text += (
        f' Trained again with other seeds, the fixed sum moved by {moved:.3f} of mAP (root mean square): a difference '
        'that is not clearly larger is not shown to matter.')
    text += made_elsewhere(runs)
    write_table(out, 'ID loss and triplet loss: how to combine them', tables(runs, asked), text)
    wrapped = about.replace('; ', ';\n').replace(', batches', ',\nbatches')
    band = '' if moved is None else '; grey: twice what chance alone does'
    title = f'{wrapped}.\nA dot for each seed, a bar at their mean{band}'
    plot(runs, asked, title).savefig(results/f'{out}.png', dpi=120)

# ---- the command

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, required=True, help='folder of a known dataset')
    add('--weights', type=Path, help='file of ImageNet weights; without it, from scratch')
    add('--arch', default='tf_efficientnet_lite0')
    add('--cache', type=Path, help='file for the decoded images, which all runs share')
    add('--size', type=int, nargs=2, default=(96,48), metavar=('H','W'))
    add('--recipe', choices=('one_cycle','modern'), default='one_cycle')
    add('--steps', type=int, default=480)
    add('--epochs', type=int, help='train for so many epochs instead')
    add('--lr', type=float, default=1e-3)
    add('--n-parts', type=int, default=6)
    add('--hold-out', type=float, default=.2)
    add('--seeds', type=int, default=3)
    add('--only', nargs='+', help='labels of schemes; without it, all')
    add('--share', type=float, default=.5, help="fraction of random batches for 'mix, as many as the rule'")
    add('--jobs', type=int, default=1, help='processes of one thread each')
    add('--minutes', type=float, help='start no run after so many')
    add('--out', default='weighting', help='name of the results')
    return parser.parse_args(argv)

def length_and_rates(args):
    "The arguments of a training that say how long and by which recipe; as few as needed, for they identify old results"
    length = dict(epochs=args.epochs) if args.epochs else dict(steps=args.steps)
    return length | (dict(lr=args.lr) if args.recipe=='one_cycle' else dict(recipe=args.recipe))

def main(argv=None):
    args = parse(argv)
    asked = questions(args.share)
    schemes = {label: scheme for group in asked.values() for label,scheme in group.items()}
    names = args.only or list(schemes)
    shared = dict(size=tuple(args.size), hold_out=args.hold_out, arch=args.arch, n_parts=args.n_parts,
                  channels_last=True, **length_and_rates(args))
    settings = {**shared, 'size': list(args.size), 'data': args.data.name,
                'weights': args.weights and args.weights.name}
    shared['mixed'] = args.recipe=='modern' # One cycle computes as on a CPU
    files = dict(data=args.data, weights=args.weights, cache=args.cache)
    configs = [dict(name=name, seed=seed, **shared, **files, **schemes[name])
               for seed in range(args.seeds) for name in names]
    about = (f'{args.data.name}, {args.hold_out:.0%} of the training identities held out; {args.arch} at '
             f'{args.size[0]}×{args.size[1]}, {args.n_parts} parts, batches of 64, '
             + (f'one cycle at {args.lr:g}' if args.recipe=='one_cycle' else 'fit_modern, strong_tfms'))
    try: run_grid(f'{args.out}.json', configs, args.jobs, train_folder, settings, args.minutes)
    finally: report(args.out, asked, about)

if __name__=='__main__': main()
