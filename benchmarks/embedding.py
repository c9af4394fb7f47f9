"""Crops per second on one core: one model in PyTorch, with its batch norms folded, and as ONNX in float32, in half
precision and in int8; how far the embeddings are from PyTorch's, and how large the files are:
`python benchmarks/embedding.py [--sizes 192x64 256x128] [--arch tf_efficientnet_lite0]`
`python benchmarks/embedding.py --model DIR [--images DIR] [--evaluate DATASET]`
From pixels in memory to embeddings in memory, on one thread, all kinds in turn; the best round of each, and the median
of the ratios to PyTorch in the same round. Without --model, the weights are random, which makes no difference to speed;
with it, a folder of save_model at its own size. Without --images, synthetic people. About a minute for each size.
--evaluate also embeds the queries and the gallery of a known dataset with each kind, for mAP and rank-1, in minutes."""
import argparse
import json
import re
import time
import warnings
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import numpy as np
import pandas as pd
import torch
from common import circumstances, markdown, results, write_table

from pyramidreid.core import atomic_write

PYTORCH,FOLDED = 'PyTorch','PyTorch, batch norms folded'

def parse_size(text):
    "'192x64' as (192, 64)"
    found = re.fullmatch(r'(\d+)[x×](\d+)', text)
    if found: return int(found[1]),int(found[2])
    raise argparse.ArgumentTypeError(f'{text!r}: give height and width, such as 192x64')

def n_parts_for(height):
    "Six parts where the feature map has a height of a multiple of six, else four"
    return 6 if height//16%6==0 else 4

def new_embedder(arch, size, people, folder):
    "An `Embedder` of an untrained model with the statistics of a few batches"
    import pyramidreid.all as lib
    lib.set_seed(0)
    dls = lib.ReIDDataLoaders.from_market(people, p=4, k=4, size=size, num_workers=0)
    arch = getattr(lib, arch, arch)
    learn = lib.pyramid_learner(dls, arch, pretrained=False, n_parts=n_parts_for(size[0]), path=folder)
    learn.model.train()
    with torch.no_grad():
        for _ in range(8): learn.model(dls.one_batch()[0])
    return lib.load_embedder(learn.save_model(folder/'model'))

def kinds(embedder, crops, folder):
    "By name: a function from pixels to embeddings, and the size of the file in MB"
    from pyramidreid.export.onnx_runtime import Runtime
    from pyramidreid.export.small_onnx import quantize_onnx
    def plain(x):
        with torch.no_grad(): return embedder.net(torch.from_numpy(x)).numpy()
    def in_mb(file): return file.stat().st_size/1e6
    n_bytes = sum(value.nbytes for name,value in embedder.model.state_dict().items() if 'classify' not in name)
    onnx,half = embedder.to_onnx(folder/'float32.onnx'),embedder.to_onnx(folder/'half.onnx', half=True)
    files = {'ONNX, float32': onnx, 'ONNX, weights in half': half,
             'ONNX, int8': quantize_onnx(onnx, folder/'int8.onnx', crops)}
    made = {name: (Runtime(file, threads=1).run, in_mb(file)) for name,file in files.items()}
    return {PYTORCH: (plain, n_bytes/1e6), FOLDED: (embedder.run, n_bytes/1e6), **made}

def timed(run, x, bs):
    "CPU seconds for all batches: what else the machine does is not counted"
    start = time.process_time()
    for first in range(0, len(x), bs): run(x[first:first+bs])
    return time.process_time()-start

def mean_cosine(a, b):
    return float(((a*b).sum(1)/np.linalg.norm(a, axis=1)/np.linalg.norm(b, axis=1)).mean())

def embed_all(run, files, size, bs):
    "Embed image files, (N, D)"
    from pyramidreid.images import load_pixels
    return np.concatenate([run(load_pixels(files[first:first+bs], size)) for first in range(0, len(files), bs)])

def accuracy(run, data, size, bs):
    "mAP and rank-1 of a dataset's queries among its gallery"
    import pyramidreid.all as lib
    df = lib.dataset_table(data)
    query,gallery = df[df.split=='query'],df[df.split=='gallery']
    gallery = gallery[gallery.pid.astype(str)!='-1'] # the junk, which is not evaluated
    def rows(of): return embed_all(run, of.fn.tolist(), size, bs)
    card = lib.evaluate(rows(query), rows(gallery), query.pid, gallery.pid, query.cam, gallery.cam, progress_bar=False)
    return dict(mAP=card.mAP, rank1=card.rank1)

def measure(embedder, files, n, bs, rounds, seconds, data=None):
    "Rows of results of one model"
    from pyramidreid.images import load_pixels
    size = tuple(embedder.size)
    made = kinds(embedder, files[:200], Path(mkdtemp()))
    start = time.process_time()
    x = load_pixels((files*(n//len(files)+1))[:n], size)
    decoding = n/(time.process_time()-start)
    found = {name: run(x[:bs]) for name,(run,_) in made.items()} # which also warms up
    times,began = {name: [] for name in made},time.perf_counter()
    for _ in range(rounds):
        for name,(run,_) in made.items(): times[name].append(timed(run, x, bs))
        if time.perf_counter()-began>seconds: break
    base,expected = times[PYTORCH],found[PYTORCH]
    judged = {name: accuracy(run, data, size, bs) if data and name!=PYTORCH else {} for name,(run,_) in made.items()}
    return [dict(
        size=f'{size[0]}×{size[1]}', kind=name, per_second=n/min(times[name]), rounds=len(base),
        ratio=median(a/b for a,b in zip(base, times[name])), mb=mb, similarity=mean_cosine(expected, found[name]),
        largest=float(abs(found[name]-expected).max()), decoding=decoding, **judged[name])
        for name,(_,mb) in made.items()]

def judged_columns(row):
    return {'mAP': f"{row['mAP']:.4f}", 'rank-1': f"{row['rank1']:.4f}"} if 'mAP' in row else {}

def make_table(rows):
    return pd.DataFrame([{
        'size': row['size'], 'kind': row['kind'], 'crops/s': f"{row['per_second']:.0f}",
        'times PyTorch': f"{row['ratio']:.2f}", 'MB': f"{row['mb']:.1f}",
        'largest difference to PyTorch': f"{row['largest']:.0e}", 'mean cosine': f"{row['similarity']:.4f}",
        **judged_columns(row)} for row in rows]).fillna('').set_index('size')

def report(rows, args, name):
    import onnx
    import onnxruntime
    info = dict(circumstances(), onnxruntime=onnxruntime.__version__, onnx=onnx.__version__)
    results.mkdir(exist_ok=True)
    with atomic_write(results/f'{args.out}.json') as file: file.write_text(json.dumps(dict(info, runs=rows), indent=1))
    decoding = {row['size']: f"{row['decoding']:.0f}/s at {row['size']}" for row in rows}
    text = (f"{name}, on one thread, batches of {args.bs}; onnxruntime {info['onnxruntime']}, onnx {info['onnx']}. "
            f"Decoding and resizing the files before that: {', '.join(decoding.values())}.")
    write_table(args.out, 'Crops per second on one core', markdown(make_table(rows)), text)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--sizes', type=parse_size, nargs='+', default=[(192,64), (256,128)], metavar='HxW')
    add('--arch', default='tf_efficientnet_lite0')
    add('--model', type=Path, help='folder of save_model, instead of random weights')
    add('--images', type=Path, help='folder of crops, to calibrate with and to embed')
    add('--evaluate', type=Path, metavar='DATASET', help='folder of a known dataset, for mAP and rank-1')
    add('--n', type=int, default=64, help='crops of a round')
    add('--bs', type=int, default=32)
    add('--rounds', type=int, default=7)
    add('--seconds', type=float, default=40, help='no round of a size starts later')
    add('--out', default='embedding', help='name of the results')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', 'This model has not been trained') # which makes no difference to its speed
    import pyramidreid.all as lib
    from pyramidreid.images import find_images
    folder = Path(mkdtemp())
    people = lib.synth_persons(n_train=20, n_test=6, size=(128,64), path=folder/'people')
    files = find_images(args.images or people/'bounding_box_train')
    if args.images: files = files[::max(1, len(files)//max(200, args.n))]
    embedders = [lib.load_embedder(args.model)] if args.model else (
        new_embedder(args.arch, size, people, folder/f'{size[0]}x{size[1]}') for size in args.sizes)
    rows = []
    for embedder in embedders:
        rows += measure(embedder, files, args.n, args.bs, args.rounds, args.seconds, args.evaluate)
    report(rows, args, f'The model {args.model.name}' if args.model else f'{args.arch}, random weights, full pyramid')

if __name__=='__main__': main()
