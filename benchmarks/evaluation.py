"""Evaluation and re-ranking: time, and peak of anonymous memory beyond the input, each case in a process of its own.

Compared with the plain versions in tests/reference.py, and with torchreid where it is installed (its Cython evaluation
too, where that was built). `--only metric large` runs some of the parts; 500,000 images take 2.7 GB of disk in
`--tmp`."""
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
IDS = ('qp', 'gp', 'qc', 'gc') # files of person ids and cameras, of queries and gallery

def timed(call, n):
    "Result of `call`, and a dict: first and fastest of `n` runs in seconds, peak memory of the first in MB"
    with Peak() as peak:
        start = time.perf_counter()
        result = call()
        times = [time.perf_counter()-start]
    for _ in range(n-1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter()-start)
    return result, dict(first=times[0], seconds=min(times), runs=n, peak_mb=peak.mb)

# ---- the input

def people(n_query, n_gallery, dim, seed=0, dtype=np.float32, n_pids=750, n_cams=6, spread=2.3, out=None):
    """Normalised embeddings of people around centres of their own, shifted by camera, a sixth of the gallery
    distractors; ids laid out like Market-1501's"""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((n_pids+200, dim), dtype=np.float32)
    cast = .8*rng.standard_normal((n_cams, dim), dtype=np.float32)
    def fill(pid, cam, target):
        for i in range(0, len(pid), 10000):
            part = slice(i, i+10000)
            strangers = rng.integers(n_pids+1, n_pids+200, len(pid[part]))
            who = np.where(pid[part]==0, strangers, pid[part])
            noise = rng.standard_normal((len(who), dim), dtype=np.float32)
            embs = centre[who] + cast[cam[part]] + spread*noise
            target[part] = embs/np.linalg.norm(embs, axis=1, keepdims=True)
        return target
    query_pids,gallery_pids = rng.integers(1, n_pids+1, n_query),rng.integers(1, n_pids+1, n_gallery)
    gallery_pids[rng.random(n_gallery)<1/6] = 0
    query_cams,gallery_cams = rng.integers(0, n_cams, n_query),rng.integers(0, n_cams, n_gallery)
    queries = fill(query_pids, query_cams, np.empty((n_query, dim), np.float32))
    gallery = fill(gallery_pids, gallery_cams, np.empty((n_gallery, dim), dtype) if out is None else out)
    return queries, gallery, query_pids, gallery_pids, query_cams, gallery_cams

def euclidean(a, b): return np.sqrt(np.maximum(2-2*a@b.T, 0))

def save(folder, **arrays):
    for name,array in arrays.items(): np.save(folder/f'{name}.npy', array)

def load(folder, *names): return [np.load(Path(folder)/f'{name}.npy') for name in names]

def load_ids(folder): return load(folder, *IDS)

def make_market(folder): save(folder, **dict(zip(('q', 'g', *IDS), people(3368, 15913, DIM))))

def make_metric(folder):
    make_market(folder)
    save(folder, dist=euclidean(*load(folder, 'q', 'g')))

def make_rerank(folder):
    q,g,*_ = people(1000, 6000, DIM, n_pids=300)
    save(folder, qg=euclidean(q, g), qq=euclidean(q, q), gg=euclidean(g, g))

def make_large(folder):
    g = np.lib.format.open_memmap(folder/'g.npy', 'w+', np.float16, (500_000, DIM))
    q,_,*ids = people(200, len(g), DIM, out=g)
    g.flush()
    save(folder, q=q, **dict(zip(IDS, ids)))

# ---- the cases. Each gets the folder of its part's input and returns what it measured

def metric_ours(folder):
    from pyramidreid.evaluation.retrieval import evaluate_distances
    dist,(qp,gp,qc,gc) = torch.from_numpy(load(folder, 'dist')[0]),load_ids(folder)
    evaluate_distances(dist[:20], qp[:20], gp, qc[:20], gc)
    card,measured = timed(lambda: evaluate_distances(dist, qp, gp, qc, gc), 7)
    return dict(measured, mAP=card.mAP)

def metric_plain(folder):
    from reference import plain_mAP

    from pyramidreid.evaluation.retrieval import evaluate_distances
    n,dist,(qp,gp,qc,gc) = 100,load(folder, 'dist')[0],load_ids(folder)
    mAP,measured = timed(lambda: plain_mAP(dist[:n], qp[:n], gp, qc[:n], gc), 1)
    ours = evaluate_distances(dist[:n], qp[:n], gp, qc[:n], gc).mAP
    scale = len(qp)/n
    return dict(measured, first=measured['first']*scale, seconds=measured['seconds']*scale,
                note=f'timed on {n} queries and scaled', mAP_difference_there=abs(mAP-ours))

def metric_torchreid(folder, cython):
    from torchreid.metrics.rank import IS_CYTHON_AVAI, evaluate_rank
    if cython and not IS_CYTHON_AVAI: raise ImportError('torchreid without its Cython evaluation')
    dist,ids = load(folder, 'dist')[0],load_ids(folder)
    (_,mAP),measured = timed(lambda: evaluate_rank(dist, *ids, use_cython=cython), 3 if cython else 1)
    return dict(measured, mAP=float(mAP))

def whole_ours(folder):
    from pyramidreid.evaluation.retrieval import evaluate
    (q,g),ids = load(folder, 'q', 'g'),load_ids(folder)
    evaluate(q[:20], g[:200], ids[0][:20], ids[1][:200])
    card,measured = timed(lambda: evaluate(q, g, *ids), 3)
    return dict(measured, mAP=card.mAP)

def exact_distances(q, g):
    "Cosine distances in float64, a block of the gallery at a time"
    blocks = []
    for i in range(0, len(g), 20000):
        block = g[i:i+20000].astype(np.float64)
        blocks.append(1 - q.astype(np.float64) @ (block/np.linalg.norm(block, axis=1, keepdims=True)).T)
    return np.concatenate(blocks, axis=1)

def large_ours(folder):
    from reference import plain_scores

    from pyramidreid.evaluation.retrieval import evaluate
    q,(qp,gp,qc,gc) = load(folder, 'q')[0],load_ids(folder)
    g = np.load(Path(folder)/'g.npy', mmap_mode='r')
    evaluate(q[:20], g[:200], qp[:20], gp[:200])
    card,measured = timed(lambda: evaluate(q, g, qp, gp, qc, gc), 1)
    few = np.arange(0, len(q), 20)
    plain = plain_scores(exact_distances(q[few], g), qp[few], gp, qc[few], gc)
    gaps = [abs(p['ap']-ap) for p,ap in zip(plain, card.ap[few].tolist())]
    return dict(measured, mAP=card.mAP, images=len(g), largest_AP_difference_on_10_queries=max(gaps))

def rerank_ours(folder):
    from pyramidreid.evaluation.reranking import rerank_distances
    qg,qq,gg = (torch.from_numpy(array) for array in load(folder, 'qg', 'qq', 'gg'))
    rerank_distances(qg[:30,:200], qq[:30,:30], gg[:200,:200]).dense()
    dense,measured = timed(lambda: rerank_distances(qg, qq, gg).dense(), 3)
    np.save(Path(folder)/'ours.npy', dense.numpy())
    return measured

def rerank_torchreid(folder):
    from torchreid.utils import re_ranking
    dense,measured = timed(lambda: re_ranking(*load(folder, 'qg', 'qq', 'gg')), 1)
    return dict(measured, largest_difference=float(np.abs(dense-load(folder, 'ours')[0]).max()))

def rerank_market_ours(folder):
    from pyramidreid.evaluation.reranking import rerank
    q,g = load(folder, 'q', 'g')
    rerank(q[:50], g[:500]).dense()
    _,measured = timed(lambda: rerank(q, g).dense(), 1)
    return measured

# Of each part: what makes its input, its title, and its cases
PARTS = {
    'metric': (make_metric, 'Metrics of given distances, 3,368 × 15,913', {
        'pyramidreid': metric_ours, 'plain Python': metric_plain,
        'torchreid, Cython': lambda folder: metric_torchreid(folder, True),
        'torchreid, Python': lambda folder: metric_torchreid(folder, False)}),
    'whole': (make_market, 'Evaluation of embeddings, 3,368 × 15,913, 2,688-d float32', {'pyramidreid': whole_ours}),
    'large': (make_large, 'Evaluation of 200 queries among 500,000 images, 2,688-d float16, memory-mapped',
              {'pyramidreid': large_ours}),
    'rerank': (make_rerank, 'Re-ranking of given distances, 1,000 + 6,000',
               {'pyramidreid': rerank_ours, 'torchreid': rerank_torchreid}),
    'rerank-market': (make_market, 'Re-ranking of embeddings, 3,368 + 15,913, 2,688-d float32',
                      {'pyramidreid': rerank_market_ours})}

# ---- the command

def run_case(part, name, folder):
    "One case in a fresh process; None where a package is missing"
    command = [sys.executable, '-W', 'ignore', __file__, '--case', part, name, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode==3:
        print(f'{part}: {name} left out, {process.stdout.strip()}')
        return None
    if process.returncode: sys.exit(process.stderr)
    return json.loads(process.stdout.strip().splitlines()[-1])

def print_case(part, name, folder):
    "Measure one case and print it as JSON; exit code 3 where a package is missing"
    cases = PARTS[part][2]
    try: print(json.dumps(cases[name](folder)))
    except ImportError as e:
        print(e)
        sys.exit(3)

def run_part(part, tmp):
    "Measure all cases of a part"
    make,title,cases = PARTS[part]
    with tempfile.TemporaryDirectory(dir=tmp) as folder:
        make(Path(folder))
        rows = {name: run_case(part, name, folder) for name in cases}
    return dict(title=title, cases={name: row for name,row in rows.items() if row}, **circumstances())

def with_ratio(value, ours, is_ours):
    "A number, and in brackets how many times pyramidreid's it is"
    return f'{value:.3g}' if is_ours else f'{value:.3g} ({value/max(ours, 1e-9):.3g}×)'

def make_table(parts):
    "Every case as a row, with its ratios to pyramidreid"
    import pandas as pd
    rows = []
    for part in parts.values():
        ours = part['cases']['pyramidreid']
        for name,case in part['cases'].items():
            texts = {key: with_ratio(case[key], ours[key], case is ours) for key in ('first', 'seconds')}
            memory = f"{case['peak_mb']:.0f}"
            if case is not ours: memory += f" ({case['peak_mb']/max(ours['peak_mb'], 1e-9):.3g}×)"
            rows.append({
                'what': part['title'], 'who': name, 'first call, s': texts['first'],
                'fastest, s': texts['seconds'] if case['runs']>1 else '', 'runs': case['runs'],
                'peak memory, MB': memory if name!='plain Python' else '', 'date': part['date']})
    return pd.DataFrame(rows).set_index('what')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', choices=PARTS, default=list(PARTS), help='parts to run')
    parser.add_argument('--tmp', help='folder for the input of the cases; default: the system\'s')
    parser.add_argument('--case', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case: return print_case(*args.case)
    file = results/'evaluation.json'
    parts = json.loads(file.read_text())['parts'] if file.exists() else {}
    for part in args.only:
        parts[part] = run_part(part, args.tmp)
        file.write_text(json.dumps(dict(circumstances(), parts=parts), indent=1))
        print(parts[part]['title'], json.dumps(parts[part]['cases'], indent=1), flush=True)
    text = ("Each case in a fresh process. First call: the first on this input, after a call on a small one. Peak: of "
            "anonymous memory, beyond the input and the libraries. In brackets: how many times pyramidreid's.")
    write_table('evaluation', 'Evaluation and re-ranking', markdown(make_table(parts)), text)

if __name__=='__main__': main()
