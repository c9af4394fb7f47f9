"""Identities of tracklets against the truth: people of a test split, in random order, beside other ways to decide.
`python benchmarks/identities.py --data DIR [--model NAME] [--seeds 3]`
Half of the identities calibrate the thresholds, the others are judged, so that nothing is chosen on who is judged."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from common import circumstances, markdown, results, write_table

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, required=True, help='folder of a known dataset')
    add('--model', default='market1501-lite0', help='name of a pretrained model')
    add('--far', type=float, nargs='+', default=(.01, .05), help='rates of false accepts to ask for')
    add('--seeds', type=int, default=3, help='random orders, and halves of the identities')
    add('--most', type=int, help='at most so many identities: to try the script')
    add('--cache', type=Path, help='file for the embeddings, which all runs share')
    add('--out', default='identities', help='name of the results')
    return parser.parse_args(argv)

def tracklets(table):
    "Numbers of the tracklets of images: of one person, camera and sequence, where the name of a file tells it"
    from pyramidreid.evaluation.tracklets import group_codes
    sequence = table.fn.astype(str).str.extract(r'_c\d+s(\d+)_', expand=False)
    return group_codes(table.assign(sequence=sequence.fillna(''))[['pid','cam','sequence']])

def pooled_tracklets(args, model):
    "Table with a row for each tracklet of known people, and their embeddings"
    from pyramidreid.all import dataset_table
    from pyramidreid.evaluation.tracklets import first_rows, pool_embeddings
    table = dataset_table(args.data)
    table = table[table.split.isin(['query','gallery'])]
    table = table[~table.pid.astype(str).isin(['-1','0','0000','-01'])]
    if args.most: table = table[table.pid.isin(sorted(table.pid.unique())[:args.most])]
    table = table.reset_index(drop=True)
    if args.cache and args.cache.exists(): embs = np.load(args.cache)
    else: embs = model.embed(list(table.fn))
    if args.cache: np.save(args.cache, embs)
    codes = tracklets(table)
    return table.iloc[first_rows(codes)].reset_index(drop=True),pool_embeddings(embs, codes)

def halves(table, seed):
    "Which tracklets are of the identities that calibrate; the others are judged"
    pids = np.random.default_rng(seed).permutation(sorted(table.pid.unique()))
    return table.pid.isin(pids[:len(pids)//2]).to_numpy()

def calibration(table, embs):
    "A `Calibration` by searching each tracklet among the others, its own person's hidden"
    from pyramidreid.all import Calibration
    from pyramidreid.evaluation.distances import Distances
    pids = pd.factorize(table.pid)[0]
    return Calibration.from_distances(Distances(embs, embs), pids, pids, same_set=True)

def one_by_one(embs, threshold, cams=None):
    "Identities of tracklets in their order, each decided when it comes"
    from pyramidreid.gallery.entries import Embeddings
    from pyramidreid.video.identities import Identities
    class Known:
        fingerprint = 'known'
        def embed(self, items): raise NotImplementedError
    ids = Identities(Known(), threshold=threshold)
    return [ids.identify(Embeddings(emb[None], 'known'), cam).pid for emb,cam in zip(embs, cams)]

def by_dbscan(embs, threshold):
    from sklearn.cluster import DBSCAN
    return DBSCAN(eps=1-threshold, min_samples=1, metric='cosine').fit_predict(embs)

def false_accepts(pids, identities):
    "Of the people who came for the first time, the fraction taken for somebody else"
    table = pd.DataFrame(dict(pid=pids, identity=identities))
    first = ~table.pid.duplicated()
    return float((first & table.identity.duplicated()).sum()/first.sum())

def judge(args, table, embs, seed):
    "Scores of each way to decide, a row each"
    from pyramidreid.evaluation.identities import identity_scores
    from pyramidreid.video.identities import cluster_tracklets
    calibrates = halves(table, seed)
    known = calibration(table[calibrates], embs[calibrates])
    order = np.random.default_rng(100+seed).permutation(np.flatnonzero(~calibrates))
    shown,values = table.iloc[order],embs[order]
    ways = {}
    for far in args.far:
        threshold = known.threshold(far)
        ways[f'one by one, far={far:g}'] = one_by_one(values, threshold, shown.cam)
        ways[f'agglomerative, far={far:g}'] = cluster_tracklets(values, threshold)
        ways[f'DBSCAN, far={far:g}'] = by_dbscan(values, threshold)
    ways['one by one, threshold 0.7'] = one_by_one(values, .7, shown.cam)
    rows = []
    for name,identities in ways.items():
        scores = identity_scores(shown.pid, identities)
        rows.append(dict(name=name, seed=seed, tracklets=len(shown), people=shown.pid.nunique(),
                         identities=len(set(identities)), new_taken_for_known=false_accepts(shown.pid, identities),
                         **scores))
    return rows

def main(argv=None):
    import json

    args = parse(argv)
    from pyramidreid.all import load_pretrained
    table,embs = pooled_tracklets(args, load_pretrained(args.model))
    rows = [row for seed in range(args.seeds) for row in judge(args, table, embs, seed)]
    note = dict(circumstances(), model=args.model, runs=rows)
    (results/f'{args.out}.json').write_text(json.dumps(note))
    columns = ['IDF1','bcubed_F1','pair_precision','pair_recall','new_taken_for_known','identities']
    shown = pd.DataFrame(rows).groupby('name', sort=False)[columns].mean().round(3)
    write_table(args.out, 'Identities of tracklets', markdown(shown), f'{args.data.name}, {args.model}')

if __name__=='__main__': main()
