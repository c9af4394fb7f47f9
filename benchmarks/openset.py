"""Expected and observed false-accept rates: a threshold is calibrated on some people, and used in a deployment in which
a third of the queries show people who are not in the gallery. Synthetic people and a small network from scratch;
`python benchmarks/openset.py [--seeds 3]`. `--people 90 --epochs 1 --splits 5` is a quick try.
`--model FOLDER --data DIR` takes a trained model and the test people of a known dataset instead."""
import argparse
import json
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from common import circumstances, markdown, results, write_table

from pyramidreid.all import (
    ReIDDataLoaders,
    calibrate_distances,
    market_table,
    pyramid_learner,
    resnet10,
    set_seed,
    synth_persons,
)
from pyramidreid.core import atomic_write


class Searches(NamedTuple):
    "Distances (Q, G) with the ids and cameras of queries and gallery"
    dist: np.ndarray
    query_pids: np.ndarray
    gallery_pids: np.ndarray
    query_cams: np.ndarray
    gallery_cams: np.ndarray

def searches_of(distances):
    "`Searches` from what `learn.to_rank` returns"
    ids = (np.asarray(distances[name]) for name in ('query_pids', 'gallery_pids', 'query_cams', 'gallery_cams'))
    return Searches(distances['dist'][:], *ids)

def real_people(args):
    "mAP and searches of a trained model on the test people of a dataset, distractors left out; and a description"
    from pyramidreid.cli.frame import Console
    from pyramidreid.cli.inputs import held_out, open_model, query_gallery_distances, read_data
    from pyramidreid.evaluation.retrieval import evaluate_distances
    torch.set_num_threads(args.threads)
    found = query_gallery_distances(Console(), open_model(args.model), *held_out(read_data(args.data)))
    about = found['dist'].about
    what = f"{Path(args.data).name}: {about['backbone']} at {about['input']}, trained on {about['trained on']}"
    return evaluate_distances(**found).mAP, searches_of(found), what

def synthetic_people(args, seed):
    "mAP and searches of a small network, trained for it, on people it has never seen; and a description"
    torch.set_num_threads(args.threads)
    set_seed(seed, reproducible=True)
    table = market_table(synth_persons(n_train=args.train, n_test=args.people, size=(96,48), seed=seed))
    dls = ReIDDataLoaders.from_table(table, p=8, k=4, size=(96,48), num_workers=0, cache=True)
    learn = pyramid_learner(dls, resnet10, pretrained=False, neck=False, dynamic=True, path=mkdtemp())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, 3e-3)
    what = f'Synthetic people at 96×48, resnet10 from scratch, {args.train} people trained on for {args.epochs} epochs'
    return learn.evaluate().mAP, searches_of(learn.to_rank()), what

def calibrate(s, asking, there, n=4, **kwargs):
    "Calibration on `n` queries of each person in `asking`, from different cameras, in a gallery of the people `there`"
    queries = np.flatnonzero(np.isin(s.query_pids, asking))
    images = np.flatnonzero(np.isin(s.gallery_pids, there))
    nth = pd.Series(s.query_pids[queries]).groupby(s.query_pids[queries]).cumcount()
    queries = queries[(nth<n).to_numpy()]
    return calibrate_distances(
        s.dist[queries][:,images], s.query_pids[queries], s.gallery_pids[images], s.query_cams[queries],
        s.gallery_cams[images], **kwargs)

def deploy(s, seed, wanted):
    "Calibrate on a third of the people; another third is in the gallery of the deployment, the last third is not"
    people = np.random.default_rng(seed).permutation(np.unique(s.query_pids))
    some,known,unknown = np.array_split(people, 3)
    first = calibrate(s, some, some)
    strangers = calibrate(s, unknown, known, n=2, unknown='absent')
    friends = calibrate(s, known, known)
    rows = []
    for far in wanted:
        threshold,(low,high) = first.threshold(far),first.interval(far)
        rate,own_low,own_high = strangers.far_at(threshold)
        rows.append(dict(
            far=far, threshold=threshold, low=low, high=high, rate=rate, own_low=own_low, own_high=own_high,
            dir=friends.dir_at(threshold), strangers=len(strangers.impostor), known=len(friends.genuine),
            rank1=friends.dir_at(-2)))
    return rows

def with_verdicts(rows):
    "The rows as a frame, with columns that say which rates are inside which intervals"
    runs = pd.DataFrame(rows)
    runs['expected'] = runs.rate.between(runs.low, runs.high)
    runs['wanted'] = (runs.own_low<=runs.far) & (runs.far<=runs.own_high)
    runs['overlap'] = (runs.own_low<=runs.high) & (runs.low<=runs.own_high)
    return runs

def between(low, high): return [f'{a:.3f} to {b:.3f}' for a,b in zip(low, high)]

def table_of_first(first):
    "The first split of each seed"
    table = pd.DataFrame({
        'FAR wanted': first.far, 'threshold': first.threshold.map('{:.3f}'.format),
        'expected': between(first.low, first.high), 'FAR observed': first.rate.map('{:.3f}'.format),
        'its interval': between(first.own_low, first.own_high), 'DIR, rank 1': first.dir.map('{:.3f}'.format)})
    return table.set_index(first.seed.rename('seed'))

def table_of_splits(runs):
    "Means over all splits"
    columns = {
        'mean FAR observed': ('rate', 'mean'), 'standard deviation': ('rate', 'std'),
        "observed inside the calibration's interval": ('expected', 'mean'),
        "wanted inside the observation's interval": ('wanted', 'mean'),
        'intervals overlap': ('overlap', 'mean'), 'known people found at rank 1': ('dir', 'mean')}
    return runs.groupby('far').agg(**columns).round(4).rename_axis('FAR wanted')

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--people', type=int, default=900, help='people who are not trained on, in three equal parts')
    parser.add_argument('--train', type=int, default=200, help='people to train on')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--splits', type=int, default=100, help='random splits of the people into three parts')
    parser.add_argument('--far', type=float, nargs='+', default=[.01,.05,.1])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--model', help='folder of a trained model, as learn.save_model writes it')
    parser.add_argument('--data', help='folder of a known dataset')
    parser.add_argument('--out', default='openset', help='name of the result')
    args = parser.parse_args()
    if args.people%3: parser.error('--people must be a multiple of 3')
    if bool(args.model)!=bool(args.data): parser.error('--model and --data go together')
    if args.model: args.seeds = 1
    return args

def settings_of(args):
    "Arguments as they are recorded, without folders of this machine"
    paths = {name: Path(value).name for name,value in vars(args).items() if name in ('model', 'data') and value}
    return {**vars(args), **paths}

def main():
    args,rows = parse(),[]
    for seed in range(args.seeds):
        mAP,s,what = real_people(args) if args.model else synthetic_people(args, seed)
        args.people = len(np.unique(s.query_pids))
        for split in range(args.splits):
            rows += [dict(row, seed=seed, split=split, mAP=mAP) for row in deploy(s, split, args.far)]
        print(f'seed {seed}: mAP {mAP:.3f}', flush=True)
    runs = with_verdicts(rows)
    first,splits = runs[runs.split==0],table_of_splits(runs)
    note = dict(circumstances(), settings=settings_of(args), runs=first.drop(columns='split').to_dict('records'),
                splits=splits.reset_index().to_dict('records'))
    with atomic_write(results/f'{args.out}.json') as file: file.write_text(json.dumps(note, indent=1, default=bool))
    third,one = args.people//3,first.iloc[0]
    ranges = [f'{first[name].min():.3f} to {first[name].max():.3f}' for name in ('mAP', 'rank1')]
    text = (
        f"{what} (mAP on the others {ranges[0]}, rank-1 in the deployment {ranges[1]}). {third} people calibrate, each "
        f"hidden from the others' gallery in turn; {third} others are the gallery of the deployment, and "
        f"{one.known:.0f} queries there show them, {one.strangers:.0f} show {third} people who are not in it. "
        "“Expected” is the 95 % interval of the calibration, “its interval” that of the searches in the deployment "
        "alone. Both are samples: over many splits the observed rate is inside the expected interval in fewer than "
        "95 % of cases, but the two intervals overlap.")
    over = f'Over {args.splits} random splits of the same people, and {args.seeds} seeds:'
    tables = f'{markdown(table_of_first(first))}\n\n{over}\n\n{markdown(splits)}'
    write_table(args.out, 'Knowing when nobody matches', tables, text)

if __name__=='__main__': main()
