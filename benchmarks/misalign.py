"""The paper's first claim: a pyramid against one global branch and against parts alone, as boxes get worse.
Synthetic people, a small network from scratch, same steps; `python benchmarks/misalign.py [--jobs 2] [--seeds 3]`"""
import argparse

from common import markdown, mean_std, run_grid, write_table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--jobs', type=int, default=2)
parser.add_argument('--seeds', type=int, default=3)
models = {'global, levels=[6]':[6], 'parts, levels=[1]':[1], 'pyramid, all levels':None}

if __name__=='__main__':
    args = parser.parse_args()
    runs = run_grid('misalign.json', [dict(name=n, seed=s, misalign=m, levels=l, epochs=10) for s in range(args.seeds) for m in (0.,0.5,1.) for n,l in models.items()], args.jobs)
    table = runs.groupby(['name','misalign'], sort=False).mAP.agg(mean_std).unstack()
    table.columns = [f'mAP, misalign {c}' for c in table.columns]
    write_table('misalign', 'Pyramid, parts and global branch under misalignment', markdown(table),
        f"Synthetic people; resnet10 from scratch at 96×48, 6 parts, default dynamic training, {runs.steps.iloc[0]} steps of 8×8, Adam one-cycle 3e-3; "
        f"mean ± standard deviation over {runs.seed.nunique()} seeds of data and training.")
