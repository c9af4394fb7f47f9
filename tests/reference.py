"The same as the library's fast parts, written for reading: what tests compare with and benchmarks race against."
import numpy as np


def plain_scores(dist, query_pids, gallery_pids, query_cams=None, gallery_cams=None, junk_pid=-1):
    "Per query a dict of `ap`, `trapezoid`, `inp` and `first`, or None without a match: sort, walk down, count"
    res = []
    for i,row in enumerate(dist):
        hits = []
        for j in np.argsort(row, kind='stable'):
            if gallery_pids[j]==junk_pid: continue
            same = gallery_pids[j]==query_pids[i]
            if same and query_cams is not None and gallery_cams[j]==query_cams[i]: continue
            hits.append(bool(same))
        if not any(hits): res.append(None); continue
        n_match,found,ap,trapezoid,before = sum(hits),0,0.,0.,1.
        for place,hit in enumerate(hits, 1):
            found += hit
            precision = found/place
            if hit:
                ap += precision/n_match
                trapezoid += (before+precision)/2/n_match
                last = place
            before = precision
        res.append(dict(ap=ap, trapezoid=trapezoid, inp=n_match/last, first=hits.index(True)+1))
    return res

def plain_mAP(*args):
    "Mean of the average precisions of `plain_scores`"
    return np.mean([r['ap'] for r in plain_scores(*args) if r])

def plain_rerank(dist, n_query, k1=20, k2=6, lambda_=.3):
    "k-reciprocal re-ranking of all images (queries first) from their (N, N) distances, step by step as in the paper"
    sq = (np.asarray(dist)**2).astype(np.float32)
    n = len(sq)
    rank = np.stack([np.lexsort((np.arange(n), np.arange(n)!=i, sq[i])) for i in range(n)])
    far = sq.max(1, keepdims=True)
    d = sq/np.where(far==0, 1, far)
    def mutual(i, k):
        names = rank[i,:k]
        return names[[i in rank[j,:k] for j in names]]
    V = np.zeros((n,n))
    for i in range(n):
        mine = mutual(i, k1+1)
        wide = [mine]
        for j in mine:
            other = mutual(j, int(np.around(k1/2))+1)
            if 3*len(np.intersect1d(other, mine)) > 2*len(other): wide.append(other)
        wide = np.unique(np.concatenate(wide))
        V[i,wide] = np.exp(-d[i,wide])
        V[i] /= V[i].sum()
    if k2>1: V = np.stack([V[rank[i,:k2]].mean(0) for i in range(n)])
    shared = np.stack([np.minimum(V[i], V[n_query:]).sum(1) for i in range(n_query)])
    return (1-lambda_)*(1-shared/(2-shared)) + lambda_*d[:n_query,n_query:]
