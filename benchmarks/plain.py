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
