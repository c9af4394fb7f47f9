"""The paper's second claim: dynamic training of the two losses compared with each loss alone and with a fixed sum.
Synthetic people, a small network from scratch, equal steps; `python benchmarks/dynamic.py [--jobs 2] [--seeds 3]`"""
import argparse

from common import markdown, mean_std, run_grid, write_table

FIXED = 'fixed sum, P×K'

def schemes():
    "Arguments of a training by the name of its scheme"
    from pyramidreid.training.dynamic_losses import DynamicLossWeights
    dynamic = {f'dynamic, {w}': dict(dynamic=DynamicLossWeights(weighting=w)) for w in ('gate', 'normalized', 'paper')}
    return {
        'ID only, random batches': dict(dynamic=False, only='id', mode='random'),
        'triplet only, P×K': dict(dynamic=False, only='triplet'),
        FIXED: dict(dynamic=False),
        **dynamic}

def against_fixed(runs):
    "mAP less that of the fixed sum with the same seed: a row for each seed, a column for each scheme"
    mAP = runs.pivot(index='seed', columns='name', values='mAP')
    return mAP.sub(mAP[FIXED], axis=0)

def mean_range(values): return f'{values.mean():+.3f} ({values.min():+.3f} … {values.max():+.3f})'

def make_table(runs):
    groups = runs.groupby('name', sort=False)
    table = groups.agg(mAP=('mAP', mean_std), rank1=('rank1', mean_std)).rename(columns={'rank1': 'rank-1'})
    gains = against_fixed(runs)
    title = 'mAP against fixed sum, same seed: mean (least … most)'
    table[title] = [mean_range(gains[name]) for name in table.index]
    for column,title in (('both', 'steps with both losses'), ('random', 'random batches')):
        shares = groups[column].mean()
        table[title] = [f'{v:.0%}' if v==v else '' for v in shares]
    return table

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    configs = [dict(name=name, seed=seed, **kwargs) for seed in range(args.seeds) for name,kwargs in schemes().items()]
    runs = run_grid('dynamic.json', configs, args.jobs)
    text = ("Synthetic people, misalign 0.5; resnet10 from scratch at 96×48, pyramid of 6 parts, "
            f"{runs.steps.iloc[0]} steps of 8×8, Adam one-cycle 3e-3; mean ± standard deviation over "
            f"{runs.seed.nunique()} seeds of data and training.")
    write_table('dynamic', 'ID loss, triplet loss, and how they are combined', markdown(make_table(runs)), text)

if __name__=='__main__': main()
