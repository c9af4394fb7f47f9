"""What a threshold promises and what comes of it: calibrated on some people, used at a door where a third of the queries show people who are not in the gallery.
Synthetic people and a small network from scratch; `python benchmarks/openset.py [--seeds 3]`. `--people 90 --epochs 1 --splits 5` is a quick try.
`--model FOLDER --data DIR` takes a trained model and the test people of a known data set instead."""
import argparse
import json
from pathlib import Path
from tempfile import mkdtemp

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


def of_data(args):
    "What a model that is there makes of the test people of a data set, distractors left out"
    from pyramidreid.cli.frame import Console
    from pyramidreid.cli.inputs import held_out, open_model, ranked, read_data
    from pyramidreid.evaluation.retrieval import evaluate_distances
    torch.set_num_threads(args.threads)
    model = open_model(args.model)
    found = ranked(Console(), model, *held_out(read_data(args.data)))
    about = found['dist'].about
    args.what = f"{Path(args.data).name}: {about['backbone']} at {about['input']}, trained on {about['trained on']}"
    return evaluate_distances(**found).mAP, found['dist'][:], *(found[k] for k in ('query_pids','gallery_pids','query_cams','gallery_cams'))

def embedded(args, seed):
    "What a trained network makes of people it has never seen, as `calibrate_distances` takes it"
    torch.set_num_threads(args.threads)
    set_seed(seed, reproducible=True)
    table = market_table(synth_persons(n_train=args.train, n_test=args.people, size=(96,48), seed=seed))
    dls = ReIDDataLoaders.from_table(table, p=8, k=4, size=(96,48), num_workers=0, cache=True)
    learn = pyramid_learner(dls, resnet10, pretrained=False, path=mkdtemp())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, 3e-3)
    ranked = learn.to_rank()
    return learn.evaluate().mAP, ranked['dist'][:], *(np.asarray(ranked[k]) for k in ('query_pids','gallery_pids','query_cams','gallery_cams'))

def searches(dist, q, g, qc, gc, asking, there, n=4, **kwargs):
    "The calibration of `n` queries of each person of `asking`, one by a camera, in a gallery of the people `there`"
    i,j = np.flatnonzero(np.isin(q, asking)),np.flatnonzero(np.isin(g, there))
    nth = pd.Series(q[i]).groupby(q[i]).cumcount()
    i = i[(nth<n).to_numpy()]
    return calibrate_distances(dist[i][:,j], q[i], g[j], qc[i], gc[j], **kwargs)

def door(o, seed, far):
    "One third of the people calibrate, one is in the gallery of the door, one is not; these come half as often"
    some,known,unknown = np.array_split(np.random.default_rng(seed).permutation(np.unique(o[1])), 3)
    first,strangers,friends = searches(*o, some, some),searches(*o, unknown, known, n=2, unknown='absent'),searches(*o, known, known)
    rows = []
    for f in far:
        t,(low,high) = first.threshold(f),first.interval(f)
        rate,own_low,own_high = strangers.far_at(t)
        rows.append(dict(far=f, threshold=t, low=low, high=high, rate=rate, own_low=own_low, own_high=own_high, dir=friends.dir_at(t), strangers=len(strangers.impostor), known=len(friends.genuine), rank1=friends.dir_at(-2)))
    return rows

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--people', type=int, default=900, help='not trained on; in three equal parts')
    parser.add_argument('--train', type=int, default=200, help='trained on')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--splits', type=int, default=100, help='ways to deal the people into three parts')
    parser.add_argument('--far', type=float, nargs='+', default=[.01,.05,.1])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--model', help='folder of a trained model, as learn.save_model writes it')
    parser.add_argument('--data', help='folder of a known data set')
    parser.add_argument('--out', default='openset', help='name of the result')
    args = parser.parse_args()
    if args.people%3: parser.error('--people: a multiple of 3')
    if bool(args.model)!=bool(args.data): parser.error('--model and --data go together')
    args.what,rows = f'Synthetic people at 96×48, resnet10 from scratch, {args.train} people trained on for {args.epochs} epochs',[]
    if args.model: args.seeds = 1
    for seed in range(args.seeds):
        mAP,*o = of_data(args) if args.model else embedded(args, seed)
        args.people = len(np.unique(o[1]))
        rows += [dict(r, seed=seed, split=s, mAP=mAP) for s in range(args.splits) for r in door(o, s, args.far)]
        print(f'seed {seed}: mAP {mAP:.3f}', flush=True)
    d = pd.DataFrame(rows)
    d['promised'],d['asked'] = d.rate.between(d.low, d.high),(d.own_low<=d.far) & (d.far<=d.own_high)
    d['overlap'] = (d.own_low<=d.high) & (d.low<=d.own_high)
    first = d[d.split==0]
    one = pd.DataFrame({'FAR wanted':first.far, 'threshold':first.threshold.map('{:.3f}'.format), 'promised':[f'{a:.3f} to {b:.3f}' for a,b in zip(first.low, first.high)],
        'FAR at the door':first.rate.map('{:.3f}'.format), 'its interval':[f'{a:.3f} to {b:.3f}' for a,b in zip(first.own_low, first.own_high)], 'DIR, rank 1':first.dir.map('{:.3f}'.format)}).set_index(first.seed.rename('seed'))
    all_ = d.groupby('far').agg(**{'mean FAR at the door':('rate','mean'), 'its standard deviation':('rate','std'), 'within what was promised':('promised','mean'), 'wanted in the door\'s interval':('asked','mean'),
                                   'intervals overlap':('overlap','mean'), 'DIR, rank 1':('dir','mean')}).round(4).rename_axis('FAR wanted')
    with atomic_write(results/f'{args.out}.json') as f: f.write_text(json.dumps(dict(circumstances(), settings={k:Path(v).name if k in ('model','data') and v else v for k,v in vars(args).items()}, runs=first.drop(columns='split').to_dict('records'), splits=all_.reset_index().to_dict('records')), indent=1, default=bool))
    n,r = args.people//3,first.iloc[0]
    write_table(args.out, 'Knowing when nobody matches', markdown(one)+f'\n\nOver {args.splits} ways to deal the same people into three parts, and {args.seeds} seeds:\n\n'+markdown(all_),
        f"{args.what} (mAP on the others {first.mAP.min():.3f} to {first.mAP.max():.3f}, rank-1 at the door {first['rank1'].min():.3f} to {first['rank1'].max():.3f}). "
        f"{n} people calibrate, each hidden from the others' gallery in turn; {n} others are the gallery of the door, and {r.known:.0f} queries there show them, {r.strangers:.0f} show {n} people who are not in it. "
        "“Promised” is the 95 % interval of the calibration, “its interval” that of the searches at the door alone. Both are samples: over many deals the rate observed lies within what was promised less often than in 95 % of cases, but the two intervals overlap.")
