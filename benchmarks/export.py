"""Embeddings per second: the learner's model in PyTorch, eager and exported, compared with onnxruntime, on pixels of
the model's size; and how far each is from the learner.
`python benchmarks/export.py`; all in one run, alternating, best of several. `--small` leaves the ResNet-50 out,
`--compiled` includes torch.compile."""
import argparse
import json
import time
import warnings
from tempfile import mkdtemp

import numpy as np
import pandas as pd
import torch
from common import circumstances, markdown, results, write_table

from pyramidreid.core import atomic_write

# Backbone, input size, batch size and number of images of each model
MODELS = {
    'resnet10 at 96×48': ('resnet10', (96,48), 64, 512),
    'resnet50 at 384×128': ('resnet50', (384,128), 8, 16)}

def in_torch(net):
    "A function of threads that gives a function from pixels to embeddings by `net`"
    def run(x):
        with torch.no_grad(): return net(torch.from_numpy(x)).numpy()
    return lambda threads: run

def engines(learn, compiled):
    "By name: a function of threads that gives a function from pixels to embeddings. The model is exported once"
    from pyramidreid.export.model_files import load_embedder
    from pyramidreid.export.onnx_runtime import Runtime
    program = torch.export.load(learn.to_exported(learn.path/'m.pt2')).module()
    embedder = load_embedder(learn.save_model(learn.path/'shared'))
    onnx_file = learn.to_onnx(learn.path/'m.onnx')
    makers = {
        'PyTorch': lambda threads: embedder.run,
        'PyTorch, torch.export': in_torch(program),
        'onnxruntime': lambda threads: Runtime(onnx_file, threads=threads).run}
    if compiled: makers['PyTorch, torch.compile'] = in_torch(torch.compile(embedder.net, dynamic=True))
    return makers

def in_batches(run, x, bs): return np.concatenate([run(x[i:i+bs]) for i in range(0, len(x), bs)])

def best_rates(runs, x, bs, repeats):
    "Images per second of each engine, the best of several alternating rounds"
    best = {name: 0 for name in runs}
    for _ in range(repeats):
        for name,run in runs.items():
            start = time.perf_counter()
            in_batches(run, x, bs)
            best[name] = max(best[name], len(x)/(time.perf_counter()-start))
    return best

def new_learner(arch, size):
    "An untrained learner on synthetic people"
    import pyramidreid.all as lib
    people = lib.synth_persons(n_train=8, n_test=6, size=(96,48))
    dls = lib.ReIDDataLoaders.from_market(people, p=4, k=2, size=size, num_workers=0)
    lib.set_seed(0)
    warnings.filterwarnings('ignore', 'This model has not been trained') # which makes no difference to its speed
    return lib.pyramid_learner(dls, getattr(lib, arch), pretrained=False, neck=False, path=mkdtemp())

def measure(name, threads, repeats, compiled):
    "Rows of results of one model"
    from pyramidreid.images import load_pixels
    arch,size,bs,n = MODELS[name]
    learn = new_learner(arch, size)
    files = (learn.dls.valid.items.fn.tolist()*n)[:n]
    start = time.perf_counter()
    x = load_pixels(files, size)
    decoding = n/(time.perf_counter()-start)
    expected = learn.embed(learn.dls.test_dl(files[:bs])).numpy()
    makers,rows = engines(learn, compiled),[]
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        runs = {engine: make(n_threads) for engine,make in makers.items()}
        gaps = {engine: float(abs(run(x[:bs])-expected).max()) for engine,run in runs.items()}
        best = best_rates(runs, x, bs, repeats)
        for engine,rate in best.items():
            rows.append(dict(model=name, threads=n_threads, batch=bs, engine=engine, per_second=rate,
                             times_pytorch=rate/best['PyTorch'], difference=gaps[engine], decoding_per_second=decoding))
            print(rows[-1], flush=True)
    return rows

def make_table(rows):
    return pd.DataFrame([{
        'model': row['model'], 'threads': row['threads'], 'batch': row['batch'], 'engine': row['engine'],
        'embeddings/s': f"{row['per_second']:.1f}", 'times PyTorch': f"{row['times_pytorch']:.2f}",
        'largest difference to the learner': f"{row['difference']:.0e}"} for row in rows]).set_index('model')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--small', action='store_true', help='the small network only')
    parser.add_argument('--compiled', action='store_true', help='torch.compile, too')
    parser.add_argument('--threads', type=int, nargs='+', default=[1,2])
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    import onnx
    import onnxruntime
    names = list(MODELS)[:1] if args.small else list(MODELS)
    rows = [row for name in names for row in measure(name, args.threads, args.repeats, args.compiled)]
    info = dict(circumstances(), threads=args.threads, onnxruntime=onnxruntime.__version__, onnx=onnx.__version__)
    results.mkdir(exist_ok=True)
    with atomic_write(results/'export.json') as file: file.write_text(json.dumps(dict(info, runs=rows), indent=1))
    decoding = {row['model']: f"{row['model']}: {row['decoding_per_second']:.0f} images/s" for row in rows}
    text = (f"onnxruntime {info['onnxruntime']}, onnx {info['onnx']}. From pixels in memory to embeddings in memory, "
            f"untrained weights, full pyramid; best of {args.repeats}, alternating. Decoding and resizing the files "
            f"before that, on one thread: {'; '.join(decoding.values())} (synthetic JPEGs of 96×48).")
    write_table('export', 'Embeddings per second, exported and not', markdown(make_table(rows)), text)

if __name__=='__main__': main()
