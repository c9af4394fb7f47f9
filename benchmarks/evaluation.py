"""Evaluation and re-ranking: time, and peak of anonymous memory beyond the input, each case in a process of its own.

Against the plain versions of `plain.py`, and against torchreid where it is installed (its Cython evaluation too, where that was built).
`--only metric large` runs some of the parts; 500,000 images take 2.7 GB of disk in `--tmp`."""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import Peak, circumstances, markdown, results, write_table

DIM = 2688

def measured(f, n):
    "Result of `f`, the first and the quickest of `n` runs in seconds, and the peak of memory of the first"
    with Peak() as peak:
        start = time.perf_counter()
        res = f()
        times = [time.perf_counter()-start]
    for _ in range(n-1):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter()-start)
    return res,dict(first=times[0], seconds=min(times), runs=n, peak_mb=peak.mb)

def people(n_query, n_gallery, dim, seed=0, dtype=np.float32, n_pids=750, n_cams=6, spread=2.3, out=None):
    "Unit embeddings of people around centres of their own, shifted by camera, a sixth of the gallery distractors; ids laid out like Market-1501's"
    rng = np.random.default_rng(seed)
    centre,cast = rng.standard_normal((n_pids+200,dim), dtype=np.float32),.8*rng.standard_normal((n_cams,dim), dtype=np.float32)
    def make(pid, cam, res):
        for i in range(0, len(pid), 10000):
            s = slice(i,i+10000)
            who = np.where(pid[s]==0, rng.integers(n_pids+1, n_pids+200, len(pid[s])), pid[s])
            e = centre[who] + cast[cam[s]] + spread*rng.standard_normal((len(who),dim), dtype=np.float32)
            res[s] = e/np.linalg.norm(e, axis=1, keepdims=True)
        return res
    qp,gp = rng.integers(1, n_pids+1, n_query),rng.integers(1, n_pids+1, n_gallery)
    gp[rng.random(n_gallery)<1/6] = 0
    qc,gc = rng.integers(0, n_cams, n_query),rng.integers(0, n_cams, n_gallery)
    q = make(qp, qc, np.empty((n_query,dim), np.float32))
    return q,make(gp, gc, np.empty((n_gallery,dim), dtype) if out is None else out),qp,gp,qc,gc

def euclidean(a, b): return np.sqrt(np.maximum(2-2*a@b.T, 0))

# The cases. Each gets the folder of its part's input and returns what it measured

def load(d, *names): return [np.load(Path(d)/f'{o}.npy') for o in names]
def ids(d): return load(d, 'qp', 'gp', 'qc', 'gc')

def metric_ours(d):
    from pyramidreid.evaluation.retrieval import evaluate_distances
    dist,*who = torch.from_numpy(load(d, 'dist')[0]),*ids(d)
    evaluate_distances(dist[:20], who[0][:20], who[1], who[2][:20], who[3])
    res,m = measured(lambda: evaluate_distances(dist, *who), 7)
    return dict(m, mAP=res.mAP)

def metric_plain(d):
    from reference import plain_mAP
    dist,(qp,gp,qc,gc) = load(d, 'dist')[0],ids(d)
    n = 100
    res,m = measured(lambda: plain_mAP(dist[:n], qp[:n], gp, qc[:n], gc), 1)
    from pyramidreid.evaluation.retrieval import evaluate_distances
    ours = evaluate_distances(dist[:n], qp[:n], gp, qc[:n], gc).mAP
    return dict(m, first=m['first']*len(qp)/n, seconds=m['seconds']*len(qp)/n, note=f'timed on {n} queries and scaled', mAP_difference_there=abs(res-ours))

def metric_torchreid(d, cython):
    from torchreid.metrics.rank import IS_CYTHON_AVAI, evaluate_rank
    if cython and not IS_CYTHON_AVAI: raise ImportError('torchreid without its Cython evaluation')
    dist,who = load(d, 'dist')[0],ids(d)
    (_,mAP),m = measured(lambda: evaluate_rank(dist, *who, use_cython=cython), 3 if cython else 1)
    return dict(m, mAP=float(mAP))

def whole_ours(d):
    from pyramidreid.evaluation.retrieval import evaluate
    q,g,*who = load(d, 'q', 'g', 'qp', 'gp', 'qc', 'gc')
    evaluate(q[:20], g[:200], who[0][:20], who[0][:200])
    res,m = measured(lambda: evaluate(q, g, *who), 3)
    return dict(m, mAP=res.mAP)

def large_ours(d):
    from pyramidreid.evaluation.retrieval import evaluate
    q,*who = load(d, 'q', 'qp', 'gp', 'qc', 'gc')
    g = np.load(Path(d)/'g.npy', mmap_mode='r')
    evaluate(q[:20], g[:200], who[0][:20], who[0][:200])
    res,m = measured(lambda: evaluate(q, g, *who), 1)
    few = np.arange(0, len(q), 20)
    dist = np.concatenate([1-q[few].astype(np.float64) @ (b/np.linalg.norm(b, axis=1, keepdims=True)).T
                           for b in (g[i:i+20000].astype(np.float64) for i in range(0, len(g), 20000))], axis=1)
    from reference import plain_scores
    plain = plain_scores(dist, who[0][few], who[1], who[2][few], who[3])
    return dict(m, mAP=res.mAP, images=len(g), largest_AP_difference_on_10_queries=max(abs(p['ap']-a) for p,a in zip(plain, res.ap[few].tolist())))

def rerank_ours(d):
    from pyramidreid.evaluation.reranking import rerank_distances
    dist = [torch.from_numpy(o) for o in load(d, 'qg', 'qq', 'gg')]
    rerank_distances(dist[0][:30,:200], dist[1][:30,:30], dist[2][:200,:200]).dense()
    res,m = measured(lambda: rerank_distances(*dist).dense(), 3)
    np.save(Path(d)/'ours.npy', res.numpy())
    return m

def rerank_torchreid(d):
    from torchreid.utils import re_ranking
    res,m = measured(lambda: re_ranking(*load(d, 'qg', 'qq', 'gg')), 1)
    return dict(m, largest_difference=float(np.abs(res-np.load(Path(d)/'ours.npy')).max()))

def rerank_market_ours(d):
    from pyramidreid.evaluation.reranking import rerank
    q,g = load(d, 'q', 'g')
    rerank(q[:50], g[:500]).dense()
    _,m = measured(lambda: rerank(q, g).dense(), 1)
    return m

def make_market(d):
    for k,v in zip(('q','g','qp','gp','qc','gc'), people(3368, 15913, DIM)): np.save(d/f'{k}.npy', v)
def make_metric(d):
    make_market(d)
    np.save(d/'dist.npy', euclidean(*load(d, 'q', 'g')))
def make_rerank(d):
    q,g,*_ = people(1000, 6000, DIM, n_pids=300)
    for k,v in dict(qg=euclidean(q,g), qq=euclidean(q,q), gg=euclidean(g,g)).items(): np.save(d/f'{k}.npy', v)
def make_large(d):
    g = np.lib.format.open_memmap(d/'g.npy', 'w+', np.float16, (500_000,DIM))
    q,_,*who = people(200, len(g), DIM, out=g)
    g.flush()
    for k,v in zip(('q','qp','gp','qc','gc'), (q,*who)): np.save(d/f'{k}.npy', v)

PARTS = {
    'metric': (make_metric, 'Metrics of given distances, 3,368 × 15,913',
        {'pyramidreid':metric_ours, 'plain Python':metric_plain, 'torchreid, Cython':lambda d: metric_torchreid(d, True), 'torchreid, Python':lambda d: metric_torchreid(d, False)}),
    'whole': (make_market, 'Evaluation of embeddings, 3,368 × 15,913, 2,688-d float32', {'pyramidreid':whole_ours}),
    'large': (make_large, 'Evaluation of 200 queries among 500,000 images, 2,688-d float16, memory-mapped', {'pyramidreid':large_ours}),
    'rerank': (make_rerank, 'Re-ranking of given distances, 1,000 + 6,000', {'pyramidreid':rerank_ours, 'torchreid':rerank_torchreid}),
    'rerank-market': (make_market, 'Re-ranking of embeddings, 3,368 + 15,913, 2,688-d float32', {'pyramidreid':rerank_market_ours})}

def run_case(part, name, d):
    "One case in a fresh process; None where a package is missing"
    out = subprocess.run([sys.executable,'-W','ignore',__file__,'--case',part,name,str(d)], capture_output=True, text=True)
    if out.returncode==3: print(f'{part}: {name} left out, {out.stdout.strip()}')
    elif out.returncode: sys.exit(out.stderr)
    else: return json.loads(out.stdout.strip().splitlines()[-1])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', choices=PARTS, default=list(PARTS), help='parts to run')
    p.add_argument('--tmp', help='folder for the input of the cases; default: the system\'s')
    p.add_argument('--case', nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.case:
        part,name,d = args.case
        try: print(json.dumps(PARTS[part][2][name](d)))
        except ImportError as e: print(e); sys.exit(3)
        return
    f = results/'evaluation.json'
    done = json.loads(f.read_text())['parts'] if f.exists() else {}
    for part in args.only:
        make,title,cases = PARTS[part]
        with tempfile.TemporaryDirectory(dir=args.tmp) as d:
            make(Path(d))
            rows = {name:run_case(part, name, d) for name in cases}
        done[part] = dict(title=title, cases={k:v for k,v in rows.items() if v}, **circumstances())
        f.write_text(json.dumps(dict(circumstances(), parts=done), indent=1))
        print(title, json.dumps(done[part]['cases'], indent=1), flush=True)
    table(done)

def table(done):
    "Every part as a row of Markdown, with its ratios to pyramidreid"
    import pandas as pd
    rows = []
    for part in done.values():
        ours = part['cases']['pyramidreid']
        for name,m in part['cases'].items():
            times = lambda k: '' if m is ours else f" ({m[k]/max(ours[k],1e-9):.3g}×)"
            rows.append({'what':part['title'], 'who':name, 'first call, s':f"{m['first']:.3g}{times('first')}",
                'quickest, s':f"{m['seconds']:.3g}{times('seconds')}" if m['runs']>1 else '', 'runs':m['runs'],
                'peak memory, MB':f"{m['peak_mb']:.0f}{times('peak_mb')}" if name!='plain Python' else '', 'date':part['date']})
    write_table('evaluation.json', 'Evaluation and re-ranking', markdown(pd.DataFrame(rows).set_index('what')),
        'Each case in a fresh process. First call: the first on this input, after a call on a small one. Peak: of anonymous memory, beyond the input and the libraries. In brackets: how many times pyramidreid\'s.')

if __name__=='__main__': main()
