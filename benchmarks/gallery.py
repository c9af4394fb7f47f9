"""The gallery: time of a search compared with plain FAISS, and recall, time and memory of the approximate indexes.

`--only exact adds ivf hnsw` runs some of the parts. `exact` has 20,000 embeddings of the full pyramid, two threads;
`adds` has 3,000 that come one by one; the others have `--n` embeddings of `--dim` dimensions in half precision, saved
in `--tmp` and mapped from there (2 bytes a value). Every part is a process of its own. Embeddings are random: for
`exact` and `adds` people around centres of their own, shifted by camera; for the others, whose recall depends on it,
with the spectrum of real ones (`Crowd`)."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from common import circumstances, markdown, results, write_table
from evaluation import Peak, people

THREADS = 2
EXACT_SIZE = (20000, 2688)
ADDS_SIZE = (3000, 2688)

class RandomModel:
    "Stands for the model: all embeddings are random"
    fingerprint = 'drawn'
    def embed(self, images): raise NotImplementedError

class Crowd:
    """Random embeddings with the spectrum of those of Market-1501's test people by the network of
    results/market1501-modern-cpu.json (2,688-d): 27 % of the energy is their mean, 55 % lies between people and falls
    with the k-th direction as k^-1.7, 18 % lies between images of one person and falls as k^-1.1"""
    def __init__(self, dim, n_pids, seed=0):
        rng,k = np.random.default_rng(seed),np.arange(1, dim+1)
        def spectrum(energy, slope): return np.sqrt(energy*k**-slope/(k**-slope).sum()).astype(np.float32)
        self.dim,self.n_pids = dim,n_pids
        self.basis = np.linalg.qr(rng.standard_normal((dim,dim), dtype=np.float32))[0]
        self.within = spectrum(.18, 1.1)
        self.between = rng.permutation(spectrum(.55, 1.7))
        self.mean = np.sqrt(.27/dim).astype(np.float32)*rng.choice([-1,1], dim).astype(np.float32)

    def centres(self, pids):
        "Of each person, made when asked for: 50,000 of them would fill half a gigabyte"
        rows = [np.random.default_rng([7,pid]).standard_normal(self.dim, dtype=np.float32) for pid in pids]
        return np.stack(rows)*self.between

    def draw(self, n, seed):
        "Normalised embeddings (n, dim), and their person ids"
        rng = np.random.default_rng([1,seed])
        pids,inverse = np.unique(rng.integers(0, self.n_pids, n), return_inverse=True)
        noise = rng.standard_normal((n,self.dim), dtype=np.float32)*self.within
        embs = (self.mean + self.centres(pids)[inverse] + noise) @ self.basis
        return embs/np.linalg.norm(embs, axis=1, keepdims=True), pids[inverse]

def best_of(calls, n):
    "The fastest of `n` runs of each, seconds; they alternate, so that a busy machine is busy for all"
    best = dict.fromkeys(calls, np.inf)
    for _ in range(n):
        for name,call in calls.items():
            time.sleep(.2) # threads of the one before spin for a while
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter()-start)
    return best

def seconds(call, n=1):
    "Mean seconds of `n` runs"
    start = time.perf_counter()
    for _ in range(n): call()
    return (time.perf_counter()-start)/n

def size_mb(folder): return sum(file.stat().st_size for file in folder.iterdir())/1e6

def found_rows(gallery, query, k=10):
    "Positions of the nearest entries, (Q, k); entries are named by their position"
    return gallery.search(query, k).key.astype(int).to_numpy().reshape(-1, k)

# ---- exact search

def exact_row(gallery, flat, q):
    "Milliseconds a query with all of `q` at once"
    from pyramidreid.gallery.entries import Embeddings
    n,query = len(q),Embeddings(q, RandomModel.fingerprint)
    best = best_of({
        'plain FAISS': lambda: flat.search(q, 10),
        'gallery': lambda: gallery.search(query, 10),
        'by another camera': lambda: gallery.search(query, 10, exclude_cam=0),
        'of one person': lambda: gallery.search(query, 10, where='pid==7')}, 15 if n>1 else 40)
    times = {name: 1e3*s/n for name,s in best.items()}
    return {'queries at once': n, **times, 'over plain': best['gallery']/best['plain FAISS']-1}

def exact(args):
    "Search among 20,000, compared with plain FAISS"
    import faiss

    from pyramidreid.gallery.entries import Embeddings
    from pyramidreid.gallery.gallery import Gallery
    faiss.omp_set_num_threads(THREADS)
    n,dim = EXACT_SIZE
    q,g,_,pids,_,cams = people(256, n, dim)
    flat = faiss.IndexFlatIP(dim)
    flat.add(g)
    table = pd.DataFrame(dict(key=np.arange(n).astype(str), pid=pids, cam=cams))
    gallery = Gallery(RandomModel()).add(table, embs=Embeddings(g, RandomModel.fingerprint))
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        path = Path(folder)/'g'
        saving = seconds(lambda: gallery.save(path))
        start = time.perf_counter()
        gallery = Gallery.load(path, RandomModel())
        loading = time.perf_counter()-start
        found,expected = found_rows(gallery, Embeddings(q, RandomModel.fingerprint)),flat.search(q, 10)[1]
        agree = np.mean([set(a)==set(b) for a,b in zip(found, expected)])
        rows = [exact_row(gallery, flat, q[:at_once]) for at_once in (256,32,1)]
        disk_mb = size_mb(path)
    return dict(part='exact', n=n, dim=dim, threads=THREADS, agree=float(agree), save_s=saving, load_s=loading,
                disk_mb=disk_mb, rows=rows)

# ---- entries one by one

def add_singly(g, pids, cams):
    "A gallery to which entries were added one by one, and the seconds it took"
    from pyramidreid.gallery.entries import Embeddings
    from pyramidreid.gallery.gallery import Gallery
    tables = [pd.DataFrame(dict(key=[str(i)], pid=[pids[i]], cam=[cams[i]])) for i in range(len(g))]
    gallery,start = Gallery(RandomModel()),time.perf_counter()
    for table,emb in zip(tables, g): gallery.add(table, embs=Embeddings(emb, RandomModel.fingerprint))
    return gallery,time.perf_counter()-start

def adds(args):
    "3,000 entries added, removed and replaced one by one, and searches before and after they are saved"
    from pyramidreid.gallery.entries import Embeddings
    n,dim = ADDS_SIZE
    q,g,_,pids,_,cams = people(40, n, dim)
    gallery,adding = add_singly(g, pids, cams)
    saved,_ = add_singly(g, pids, cams)
    query = Embeddings(q[0], RandomModel.fingerprint)
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        saving = seconds(lambda: saved.save(Path(folder)/'g'))
        searches = {'before save': lambda: gallery.search(query, 10), 'after save': lambda: saved.search(query, 10)}
        first = {when: 1e3*seconds(search) for when,search in searches.items()}
        later = {when: 1e3*s for when,s in best_of(searches, 40).items()}
    start = time.perf_counter()
    for i in range(n):
        gallery.remove('7')
        gallery.add(pd.DataFrame(dict(key=['7'], pid=[7], cam=[i%6])), embs=Embeddings(g[7], RandomModel.fingerprint))
    replacing = time.perf_counter()-start
    start = time.perf_counter()
    for i in range(n): gallery.remove(str(i))
    removing = time.perf_counter()-start
    return dict(part='adds', n=n, dim=dim, threads=THREADS, add_s=adding, replace_s=replacing, remove_s=removing,
                save_s=saving, first_search_ms=first, search_ms=later)

# ---- approximate search

def large_gallery(args, crowd):
    "A gallery of `args.n` entries in half precision, mapped from disk; made on the first call"
    from pyramidreid.gallery.entries import Embeddings
    from pyramidreid.gallery.gallery import Gallery
    path = Path(args.tmp)/f'gallery-{args.n}x{args.dim}'
    if not (path/'gallery.json').exists():
        gallery = Gallery(RandomModel(), dtype='float16')
        for first in range(0, args.n, 50000):
            embs,pids = crowd.draw(min(50000, args.n-first), first)
            keys = (first+np.arange(len(embs))).astype(str)
            table = pd.DataFrame(dict(key=keys, pid=pids, cam=pids%6))
            gallery.add(table, embs=Embeddings(embs, RandomModel.fingerprint))
        gallery.save(path)
        del gallery,embs
    return Gallery.load(path, RandomModel(), check=False), path

def index_size_mb(gallery, tmp):
    "Megabytes of the index as a file"
    file = Path(tmp)/'index.faiss'
    gallery._write_index(file)
    size = file.stat().st_size/1e6
    file.unlink()
    return size

def recall_at_10(found, expected): return float(np.mean([len(set(a)&set(b))/10 for a,b in zip(found, expected)]))

def approximate(args, kind):
    "Recall, time and memory of an index"
    import faiss

    from pyramidreid.gallery.entries import Embeddings
    from pyramidreid.gallery.nearest import exact_search
    faiss.omp_set_num_threads(THREADS)
    crowd = Crowd(args.dim, args.n//20)
    gallery,path = large_gallery(args, crowd)
    q = crowd.draw(256, args.n)[0]
    start = time.perf_counter()
    with Peak() as peak: gallery.build_index(kind)
    built = time.perf_counter()-start
    query = Embeddings(q, RandomModel.fingerprint)
    start = time.perf_counter()
    expected = exact_search(q, gallery.rows, 10)[1]
    exactly = time.perf_counter()-start
    one_exactly = np.mean([seconds(lambda i=i: exact_search(q[i:i+1], gallery.rows, 10)) for i in range(4)])
    best = best_of({
        'one at a time': lambda: [gallery.search(query[i], 10) for i in range(32)],
        '256 at once': lambda: gallery.search(query, 10),
        'by another camera, 256 at once': lambda: gallery.search(query, 10, exclude_cam=0)}, 3)
    return dict(
        part=kind, n=args.n, dim=args.dim, threads=THREADS, recall_own=gallery.index.note['recall'],
        effort=gallery.index.note['effort'], recall_at_10=recall_at_10(found_rows(gallery, query), expected),
        build_s=built, build_peak_mb=peak.mb, index_mb=index_size_mb(gallery, args.tmp), disk_mb=size_mb(path),
        exact_ms=1e3*exactly/256, exact_single_ms=float(1e3*one_exactly), ms_single=1e3*best['one at a time']/32,
        ms_batch=1e3*best['256 at once']/256, ms_filtered=1e3*best['by another camera, 256 at once']/256)

# ---- tables

def exact_table(part):
    table = pd.DataFrame(part['rows'])
    table['over plain'] = table['over plain'].map('{:+.1%}'.format)
    text = (f"Exact, {part['n']:,} × {part['dim']}, {part['threads']} threads, milliseconds a query ({part['date']}). "
            f"The same ten as plain FAISS for {part['agree']:.1%} of the queries; {part['disk_mb']:.0f} MB on disk, "
            f"saved in {part['save_s']:.1f} s, loaded and checked in {part['load_s']:.1f} s.")
    return f"{text}\n\n{markdown(table.round(2).set_index('queries at once'))}"

def adds_table(part):
    n,names = part['n'],dict(add_s='added', replace_s='replaced', remove_s='removed')
    single = [{'one by one': name, 'seconds': part[s], 'ms each': 1e3*part[s]/n} for s,name in names.items()]
    search = [{'search': when, 'first, ms': part['first_search_ms'][when], 'later, ms': ms}
              for when,ms in part['search_ms'].items()]
    ratio = part['search_ms']['before save']/part['search_ms']['after save']
    text = (f"{n:,} × {part['dim']}, entries one by one, {part['threads']} threads ({part['date']}). A search before "
            f"they are saved takes {ratio:.2f} times as long as one after; the save takes {part['save_s']:.2f} s.")
    tables = [markdown(pd.DataFrame(rows).round(2).set_index(list(rows[0])[0])) for rows in (single,search)]
    return '\n\n'.join([text, *tables])

def approximate_row(kind, part):
    return {
        'index': kind, 'vectors': f"{part['n']:,} × {part['dim']}", 'recall@10': f"{part['recall_at_10']:.3f}",
        'on its own rows': f"{part['recall_own']:.3f}", 'effort': part['effort'],
        'ms, one at a time': f"{part['ms_single']:.1f}", 'exactly': f"{part['exact_single_ms']:,.0f}",
        'ms, 256 at once': f"{part['ms_batch']:.1f}", 'filtered': f"{part['ms_filtered']:.1f}",
        'exactly ': f"{part['exact_ms']:.0f}", 'build, s': f"{part['build_s']:.0f}",
        'peak of the build, MB': f"{part['build_peak_mb']:,.0f}", 'index, MB': f"{part['index_mb']:,.0f}",
        'on disk, MB': f"{part['disk_mb']:,.0f}", 'date': part['date']}

def tables(parts):
    "What was measured, as Markdown"
    texts = [exact_table(parts['exact'])] if 'exact' in parts else []
    if 'adds' in parts: texts.append(adds_table(parts['adds']))
    rows = [approximate_row(kind, part) for kind,part in parts.items() if kind not in ('exact','adds')]
    if rows:
        texts.append(f"Approximate, {THREADS} threads; peak beyond what the process had before, embeddings mapped from "
                     f"disk:\n\n{markdown(pd.DataFrame(rows).set_index('index'))}")
    return '\n\n'.join(texts)

# ---- the command

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ['exact','adds','ivf','hnsw']
    parser.add_argument('--only', nargs='*', choices=parts, default=parts)
    parser.add_argument('--n', type=int, default=1000000)
    parser.add_argument('--dim', type=int, default=2688)
    parser.add_argument('--tmp', default=tempfile.gettempdir())
    parser.add_argument('--part', help=argparse.SUPPRESS)
    return parser.parse_args()

def run_part(part, args):
    "Measure one part in a process of its own"
    sizes = ['--n', str(args.n), '--dim', str(args.dim), '--tmp', args.tmp]
    environment = {**os.environ, 'OMP_NUM_THREADS': str(THREADS)}
    process = subprocess.run([sys.executable, __file__, '--part', part, *sizes], stdout=subprocess.PIPE, text=True,
                             env=environment)
    if process.returncode: raise SystemExit(f'{part} failed')
    return json.loads(process.stdout.split('RESULT ')[1])

def note_part(part, result):
    "Add a part's result to the file of results; returns all parts"
    import faiss
    file,info = results/'gallery.json',circumstances()
    parts = json.loads(file.read_text())['parts'] if file.exists() else {}
    parts[part] = dict(result, date=info['date'], command=info['command'])
    file.write_text(json.dumps(dict(info, faiss=faiss.__version__, parts=parts), indent=1))
    return parts

def main():
    args = parse()
    if args.part:
        measure = dict(exact=exact, adds=adds).get(args.part)
        result = measure(args) if measure else approximate(args, args.part)
        print('RESULT ' + json.dumps(result))
        return
    text = ('Embeddings are random, see the head of `benchmarks/gallery.py`; recall of an index depends on the data, '
            'so `build_index` measures and prints it for yours.')
    for part in args.only:
        parts = note_part(part, run_part(part, args))
        write_table('gallery', 'Searching a gallery', tables(parts), text)

if __name__=='__main__': main()
