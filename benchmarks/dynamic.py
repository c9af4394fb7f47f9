"""The paper's second claim: dynamic training of the two losses against each alone and a fixed sum.
Synthetic people, a small network from scratch, same steps; `python benchmarks/dynamic.py [--jobs 2] [--seeds 3]`"""
import argparse

from common import markdown, mean_std, run_grid, write_table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--jobs', type=int, default=2)
parser.add_argument('--seeds', type=int, default=3)

def schemes():
    from pyramidreid.training.dynamic import DynamicLossWeights
    fixed = dict(dynamic=False)
    return {'ID only, random batches': dict(fixed, only='id', mode='random'),
            'triplet only, P×K': dict(fixed, only='triplet'),
            'fixed sum, P×K': fixed,
            **{f'dynamic, {w}': dict(dynamic=DynamicLossWeights(weighting=w)) for w in ('gate','normalized','paper')}}

if __name__=='__main__':
    args = parser.parse_args()
    runs = run_grid('dynamic.json', [dict(name=n, seed=s, **o) for s in range(args.seeds) for n,o in schemes().items()], args.jobs)
    by = runs.groupby('name', sort=False)
    table = by.agg(mAP=('mAP',mean_std), rank1=('rank1',mean_std)).rename(columns={'rank1':'rank-1'})
    paired = runs.pivot(index='seed', columns='name', values='mAP')
    paired = paired.sub(paired['fixed sum, P×K'], axis=0)
    table['mAP against fixed sum, same seed: mean (least … most)'] = [f'{d.mean():+.3f} ({d.min():+.3f} … {d.max():+.3f})' for d in (paired[n] for n in table.index)]
    for c,title in (('both','steps with both losses'),('random','random batches')): table[title] = [f'{v:.0%}' if v==v else '' for v in by[c].mean()]
    write_table('dynamic', 'ID loss, triplet loss, and how they are joined', markdown(table),
        f"Synthetic people, misalign 0.5; resnet10 from scratch at 96×48, pyramid of 6 parts, {runs.steps.iloc[0]} steps of 8×8, Adam one-cycle 3e-3; "
        f"mean ± standard deviation over {runs.seed.nunique()} seeds of data and training.")
