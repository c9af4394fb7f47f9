"""Embeddings per second: the learner's model in PyTorch, eager and exported, beside onnxruntime, on pixels of the model's size; and how far each is from the learner.
`python benchmarks/export.py`; all in one run, alternating, best of several. `--small` leaves the ResNet-50 out, `--compiled` takes torch.compile in."""
import argparse
import json
import time
from tempfile import mkdtemp

import numpy as np
import pandas as pd
import torch
from common import circumstances, markdown, results, write_table

from pyramidreid.core import atomic_write

models = {'resnet10 at 96×48':('resnet10', (96,48), 64, 512), 'resnet50 at 384×128':('resnet50', (384,128), 8, 16)}

def engines(learn, compiled):
    "By name: a function of the threads that gives a function from pixels to embeddings. The model is exported once"
    from pyramidreid.export.files import load_embedder
    from pyramidreid.export.runtime import Runtime
    program,embedder,onnx_file = torch.export.load(learn.to_exported(learn.path/'m.pt2')).module(),load_embedder(learn.save_model(learn.path/'shared')),learn.to_onnx(learn.path/'m.onnx')
    def in_torch(net):
        def run(x):
            with torch.no_grad(): return net(torch.from_numpy(x)).numpy()
        return lambda threads: run
    res = {'PyTorch':lambda threads: embedder.run, 'PyTorch, torch.export':in_torch(program), 'onnxruntime':lambda threads: Runtime(onnx_file, threads=threads).run}
    if compiled: res['PyTorch, torch.compile'] = in_torch(torch.compile(embedder.net, dynamic=True))
    return res

def batches(x, run, bs): return np.concatenate([run(x[i:i+bs]) for i in range(0, len(x), bs)])

def measure(name, threads, repeats, compiled):
    "Rows of figures of one model"
    import pyramidreid.all as lib
    arch,size,bs,n = models[name]
    from pyramidreid.images import load_pixels
    people = lib.synth_persons(n_train=8, n_test=6, size=(96,48))
    dls = lib.ReIDDataLoaders.from_market(people, p=4, k=2, size=size, num_workers=0)
    lib.set_seed(0)
    learn = lib.pyramid_learner(dls, getattr(lib, arch), pretrained=False, path=mkdtemp())
    files = (dls.valid.items.fn.tolist()*n)[:n]
    start = time.perf_counter()
    x = load_pixels(files, size)
    decoding = n/(time.perf_counter()-start)
    truth,rows,makers = learn.embed(dls.test_dl(files[:bs])).numpy(),[],engines(learn, compiled)
    for t in threads:
        torch.set_num_threads(t)
        runs,best = {k:make(t) for k,make in makers.items()},{}
        gaps = {k:float(abs(run(x[:bs])-truth).max()) for k,run in runs.items()}
        for _ in range(repeats):
            for k,run in runs.items():
                start = time.perf_counter()
                batches(x, run, bs)
                best[k] = max(best.get(k, 0), n/(time.perf_counter()-start))
        rows += [dict(model=name, threads=t, batch=bs, engine=k, per_second=v, times_pytorch=v/best['PyTorch'], difference=gaps[k], decoding_per_second=decoding) for k,v in best.items()]
        for o in rows[-len(runs):]: print(o, flush=True)
    return rows

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--small', action='store_true', help='only the small network')
    parser.add_argument('--compiled', action='store_true', help='torch.compile, too')
    parser.add_argument('--threads', type=int, nargs='+', default=[1,2])
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    import onnx
    import onnxruntime
    rows = [r for name in list(models)[:1 if args.small else None] for r in measure(name, args.threads, args.repeats, args.compiled)]
    info = dict(circumstances(), threads=args.threads, onnxruntime=onnxruntime.__version__, onnx=onnx.__version__)
    results.mkdir(exist_ok=True)
    with atomic_write(results/'export.json') as f: f.write_text(json.dumps(dict(info, runs=rows), indent=1))
    table = pd.DataFrame([{'model':r['model'], 'threads':r['threads'], 'batch':r['batch'], 'engine':r['engine'], 'embeddings/s':f"{r['per_second']:.1f}",
                           'times PyTorch':f"{r['times_pytorch']:.2f}", 'largest difference to the learner':f"{r['difference']:.0e}"} for r in rows])
    decoding = {r['model']:f"{r['model']}: {r['decoding_per_second']:.0f} images/s" for r in rows}
    write_table('export', 'Embeddings per second, exported and not', markdown(table.set_index('model')),
                f"onnxruntime {info['onnxruntime']}, onnx {info['onnx']}. From pixels in memory to embeddings in memory, weights untrained, full pyramid; best of {args.repeats}, alternating. "
                f"Decoding and resizing the files before that, on one thread: {'; '.join(decoding.values())} (drawn JPEGs of 96×48).")
