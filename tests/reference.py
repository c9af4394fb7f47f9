"Plain versions of the library's fast functions, written to be read: tests compare with them, benchmarks time them."
import random

import numpy as np


def plain_scores(dist, query_pids, gallery_pids, query_cams=None, gallery_cams=None, junk_pid=-1, *,
                 query_images=None, gallery_images=None, query_keys=None, gallery_keys=None, mask=None):
    "Per query a dict of `ap`, `trapezoid`, `inp` and `first`, or None without a match: sort, walk down, count"
    def is_left_out(i, j):
        if dist[i][j]==np.inf or (mask is not None and mask[i][j]): return True
        if query_images is not None and query_images[i]==gallery_images[j]: return True
        same_key = query_keys is not None and query_keys[i]==gallery_keys[j]
        return same_key and query_pids[i]==gallery_pids[j]
    res = []
    for i,row in enumerate(dist):
        is_match = []
        for j in np.argsort(row, kind='stable'):
            if gallery_pids[j]==junk_pid or is_left_out(i, j): continue
            same_pid = gallery_pids[j]==query_pids[i]
            if same_pid and query_cams is not None and gallery_cams[j]==query_cams[i]: continue
            is_match.append(bool(same_pid))
        res.append(_scores_of_ranking(is_match) if any(is_match) else None)
    return res

def _scores_of_ranking(is_match):
    "The scores of one ranking, given which of its images match, nearest first"
    n_match,n_found,ap,trapezoid,before = sum(is_match),0,0.,0.,1.
    for rank,match in enumerate(is_match, 1):
        n_found += match
        precision = n_found/rank
        if match:
            ap += precision/n_match
            trapezoid += (before+precision)/2/n_match
            last = rank
        before = precision
    return dict(ap=ap, trapezoid=trapezoid, inp=n_match/last, first=is_match.index(True)+1)

def plain_mAP(*args):
    "Mean of the average precisions of `plain_scores`"
    return np.mean([r['ap'] for r in plain_scores(*args) if r])

def plain_rerank(dist, n_query, k1=20, k2=6, lambda_=.3):
    "k-reciprocal re-ranking of all images (queries first) from their (N, N) distances, step by step as in the paper"
    sq = (np.asarray(dist)**2).astype(np.float32)
    n = len(sq)
    # each image ranks itself first, and equal distances by position
    rank = np.stack([np.lexsort((np.arange(n), np.arange(n)!=i, sq[i])) for i in range(n)])
    far = sq.max(1, keepdims=True)
    d = sq/np.where(far==0, 1, far)
    V = np.zeros((n,n))
    for i in range(n):
        members = _expanded_set(rank, i, k1)
        V[i,members] = np.exp(-d[i,members])
        V[i] /= V[i].sum()
    if k2>1: V = np.stack([V[rank[i,:k2]].mean(0) for i in range(n)])
    shared = np.stack([np.minimum(V[i], V[n_query:]).sum(1) for i in range(n_query)])
    return (1-lambda_)*(1-shared/(2-shared)) + lambda_*d[:n_query,n_query:]

def _reciprocal_set(rank, i, k):
    "Those of the `k` nearest images of `i` that have `i` among their own `k` nearest"
    nearest = rank[i,:k]
    return nearest[[i in rank[j,:k] for j in nearest]]

def _expanded_set(rank, i, k1):
    "The reciprocal set of `i`, with the smaller sets of its members of which it holds more than two thirds"
    own = _reciprocal_set(rank, i, k1+1)
    res = [own]
    for j in own:
        other = _reciprocal_set(rank, j, int(np.around(k1/2))+1)
        if 3*len(np.intersect1d(other, own)) > 2*len(other): res.append(other)
    return np.unique(np.concatenate(res))

def plain_queries(df, pids, rng):
    """The row labels of the queries of `pids`, person after person: one image of each camera that has several, or just
    one. The whole table is filtered for each of them"""
    queries = []
    for pid in pids:
        rows = df[df.pid==pid]
        by_cam = [rows.index]
        if rows.cam.notna().any(): by_cam = [rows.index[rows.cam==cam] for cam in rows.cam.dropna().unique()]
        several = [images for images in by_cam if len(images)>1] or [rng.choice(by_cam)]
        queries += [rng.choice(list(images)) for images in several]
    return queries

def plain_hold_out(df, pct, seed):
    "The split of each row of a table in which everyone has a possible match, with `pct` of the people held out"
    rng = random.Random(seed)
    pids = sorted(df.pid.unique())
    held_out = rng.sample(pids, max(2, round(pct*len(pids))))
    split = df.pid.isin(held_out).map({True:'gallery', False:'train'}).astype(object)
    split[plain_queries(df, held_out, rng)] = 'query'
    return split
