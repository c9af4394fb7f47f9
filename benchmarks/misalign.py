"""The paper's first claim: a pyramid compared with one global branch and with parts alone, as boxes get worse.
Synthetic people, a small network from scratch, equal steps; `python benchmarks/misalign.py [--jobs 2] [--seeds 3]`"""
import argparse

from common import markdown, mean_std, run_grid, write_table

LEVELS = {'global, levels=[6]': [6], 'parts, levels=[1]': [1], 'pyramid, all levels': None}
STRENGTHS = (0., .5, 1.)

def configs(seeds):
    return [dict(name=name, seed=seed, misalign=misalign, levels=levels, epochs=10)
            for seed in range(seeds) for misalign in STRENGTHS for name,levels in LEVELS.items()]

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    runs = run_grid('misalign.json', configs(args.seeds), args.jobs)
    table = runs.groupby(['name', 'misalign'], sort=False).mAP.agg(mean_std).unstack()
    table.columns = [f'mAP, misalign {strength}' for strength in table.columns]
    text = ("Synthetic people; resnet10 from scratch at 96×48, 6 parts, no BNNeck, the paper's dynamic training, "
            f"{runs.steps.iloc[0]} steps of 8×8, Adam one-cycle 3e-3; mean ± standard deviation over "
            f"{runs.seed.nunique()} seeds of data and training.")
    write_table('misalign', 'Pyramid, parts and global branch under misalignment', markdown(table), text)

if __name__=='__main__': main()
