"""Identities of tracklets against the truth: people of a test split, who come in random order, and who they are taken
for by `Identities`, by clustering, and by thresholds that are not calibrated.
`python benchmarks/identities.py --data DIR [--model NAME] [--seeds 3] [--cache FILE]`
`python benchmarks/identities.py --drawn 400 --out identities-drawn`
Half of the people set all thresholds, the other half are judged; `--seeds` draws halves and orders."""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from common import circumstances, markdown, mean_std, results, write_table
from multi_query import pooled_tracklets, test_images

from pyramidreid.synth.dataset import synth_persons

# deep-sort-realtime's default: cosine distances up to 0.2
USUAL = .8

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    people = parser.add_mutually_exclusive_group(required=True)
    people.add_argument('--data', type=Path, help='folder of a known dataset')
    people.add_argument('--drawn', type=int, metavar='N', help='so many drawn people, before six cameras')
    add('--model', default='market1501-lite0', help='name of a pretrained model')
    add('--far', type=float, nargs='+', default=(.01, .05, .2), help='rates of false accepts to ask for')
    add('--seeds', type=int, default=3, help='random halves and orders')
    add('--cache', type=Path, help='file for the embeddings of the test images, which is read if it exists')
    add('--most', type=int, help='only the people with the smallest pids: to try the script')
    add('--out', default='identities', help='name of the results')
    return parser.parse_args(argv)

# ---- ways to give identities: functions of embeddings (N, D), cameras and a threshold

class NoModel:
    "In place of a model, where all embeddings are known"
    fingerprint = 'known embeddings'
    def embed(self, items): raise NotImplementedError

def one_by_one(embs, cams, threshold):
    from pyramidreid.gallery.entries import Embeddings
    from pyramidreid.video.identities import Identities
    ids = Identities(NoModel(), threshold=threshold)
    return [ids.identify(Embeddings(emb[None], NoModel.fingerprint), cam).pid for emb,cam in zip(embs, cams)]

def plain_one_by_one(embs, cams, threshold):
    "The same, if nothing is impossible, without a gallery around it: to try many thresholds"
    identities = np.arange(len(embs))
    for i in range(1, len(embs)):
        similarity = embs[:i]@embs[i]
        nearest = similarity.argmax()
        if similarity[nearest]>=threshold: identities[i] = identities[nearest]
    return identities

def agglomerative(embs, cams, threshold):
    from pyramidreid.video.identities import cluster_tracklets
    return cluster_tracklets(embs, threshold)

def dbscan(embs, cams, threshold):
    from sklearn.cluster import DBSCAN
    return DBSCAN(eps=1-threshold, min_samples=1, metric='cosine').fit_predict(embs)

# Each as it is judged, and as it is tried with several thresholds
WAYS = {'one by one': (one_by_one,plain_one_by_one), 'agglomerative': (agglomerative,agglomerative),
        'DBSCAN': (dbscan,dbscan)}

# ---- thresholds from the other half of the people

def calibration(tracklets, embs):
    "A `Calibration` by searching for each tracklet among the others, its own person's hidden"
    from pyramidreid.evaluation.distances import Distances
    from pyramidreid.training.threshold_calibration import calibrate_distances
    pids = tracklets.pid.to_numpy()
    return calibrate_distances(Distances(embs, embs), pids, pids, same_set=True, progress_bar=False)

def best_threshold(way, tracklets, embs):
    "The threshold, of a few, with which the identities of known people have the best B-cubed F1"
    from pyramidreid.evaluation.identities import identity_scores
    found = {threshold: identity_scores(tracklets.pid, way(embs, tracklets.cam, threshold))['bcubed_F1']
             for threshold in np.arange(.45, .86, .05).round(2).tolist()}
    return max(found, key=found.get)

# ---- what is judged

def new_taken_for_known(pids, identities):
    "Of the people who come for the first time, the fraction given an identity that exists"
    table = pd.DataFrame(dict(pid=pids, identity=identities))
    first = ~table.pid.duplicated()
    return float(table.identity.duplicated()[first].mean())

def judge(args, tracklets, embs, seed):
    "A row of scores for each way and threshold"
    from pyramidreid.evaluation.identities import identity_scores
    draw = np.random.default_rng(seed)
    known_people = draw.permutation(tracklets.pid.unique())[:tracklets.pid.nunique()//2]
    order = draw.permutation(len(tracklets))
    tracklets,embs = tracklets.iloc[order],embs[order]
    known = tracklets.pid.isin(known_people).to_numpy()
    calibrated = calibration(tracklets[known], embs[known])
    thresholds = {f'FAR {far:g}': calibrated.threshold(far) for far in args.far} | {f'always {USUAL:g}': USUAL}
    shown,rows = tracklets[~known],[]
    for name,(way,tried) in WAYS.items():
        best = best_threshold(tried, tracklets[known], embs[known])
        for asked,threshold in {**thresholds, 'best for others': best}.items():
            identities = way(embs[~known], shown.cam, threshold)
            rows.append(dict(
                way=name, asked=asked, seed=seed, threshold=threshold, tracklets=len(shown), people=shown.pid.nunique(),
                identities=len(set(identities)), new_taken=new_taken_for_known(shown.pid, identities),
                **identity_scores(shown.pid, identities)))
            print({key: round(value, 3) if isinstance(value, float) else value for key,value in rows[-1].items()},
                  flush=True)
    return rows

COLUMNS = dict(threshold='threshold', IDF1='IDF1', bcubed_F1='B-cubed F1', pair_precision='pairs: precision',
               pair_recall='pairs: recall', new_taken='new people taken for known', identities='identities')

def summary(rows):
    "Means over the seeds, with standard deviations"
    groups = pd.DataFrame(rows).groupby(['way','asked'], sort=False)
    texts = {title: groups[column].agg(mean_std) for column,title in COLUMNS.items() if column!='identities'}
    return pd.DataFrame({**texts, 'identities': groups.identities.mean().round().astype(int)})

def main(argv=None):
    args = parse(argv)
    shown = args.data.name if args.data else f'{args.drawn} drawn people'
    if args.drawn: args.data = synth_persons(n_train=2, n_test=args.drawn, n_cams=6)
    table,embs = test_images(args)
    tracklets,embs = pooled_tracklets(table, embs)
    of_people = (tracklets.pid>0).to_numpy()
    rows = [row for seed in range(args.seeds) for row in judge(args, tracklets[of_people], embs[of_people], seed)]
    note = dict(circumstances(), data=shown, model=args.model, runs=rows)
    (results/f'{args.out}.json').write_text(json.dumps(note, indent=1))
    text = (f'{shown}, {args.model}; per seed {rows[0]["people"]} people with {rows[0]["tracklets"]:,} '
            'tracklets in random order; the other half of the people set the thresholds. Mean ± standard deviation of '
            f'{args.seeds} halves.')
    write_table(args.out, 'Identities of tracklets', markdown(summary(rows)), text)

if __name__=='__main__': main()
