"""How fast one processor core makes training batches: a plain torchvision `Dataset` in torch's `DataLoader`,
pyramidreid's plain path, and its image cache, all with the paper's transforms (resize, flip, normalise, erase), in
alternation. On a GPU also the cache with everything after the fetch done there.
`python benchmarks/loading.py`; `--data` takes a folder in Market-1501's layout in place of synthetic people."""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import circumstances, markdown, results, write_table

PLAIN,CACHED = 'pyramidreid, plain path','pyramidreid, cached'

class Images(torch.utils.data.Dataset):
    "Files and labels, as most people would write it"
    def __init__(self, df, size, stats):
        from torchvision.transforms import v2
        self.fns,self.labels = df.fn.tolist(),df.label.tolist()
        self.tfm = v2.Compose([
            v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(*stats), v2.RandomErasing(.2, value='random')])
    def __len__(self): return len(self.fns)
    def __getitem__(self, i):
        from PIL import Image
        with Image.open(self.fns[i]) as im: return self.tfm(im.convert('RGB')), self.labels[i]

def forever(dl):
    while True: yield from dl

def make_loaders(df, size, args, device='cpu', **kwargs):
    "pyramidreid's loaders, with the paper's transforms"
    from pyramidreid.all import Normalize, ReIDDataLoaders, imagenet_stats
    dls = ReIDDataLoaders.from_table(
        df, size=size, p=args.p, k=args.k, num_workers=0, device=torch.device(device), **kwargs)
    dls.add_tfms([Normalize.from_stats(*imagenet_stats, cuda=device=='cuda')], 'after_batch')
    return dls

def contenders(df, size, args, folder):
    "`{name: (endless batches, batches per round, images per batch)}`, and a description of the cache"
    from pyramidreid.all import imagenet_stats
    plain,cached = make_loaders(df, size, args),make_loaders(df, size, args, cache=True)
    on_disk = make_loaders(df, size, args, cache=folder/f'{size[0]}x{size[1]}.safetensors')
    memory,bs = cached.train_ds.cache,args.p*args.k
    images = Images(plain.train.items, size, imagenet_stats)
    theirs = torch.utils.data.DataLoader(images, batch_size=bs, shuffle=True, drop_last=True)
    few,many = args.images,args.images*50
    loaders = {
        'torchvision Dataset + DataLoader': (theirs, few),
        PLAIN: (plain.train, few),
        CACHED: (cached.train, few),
        f'{CACHED} in memory, fetch alone': (cached.train.new(after_batch=[]), many),
        f'{CACHED} in a file, fetch alone': (on_disk.train.new(after_batch=[]), many)}
    if torch.cuda.is_available():
        loaders[f'{CACHED}, transforms on the GPU'] = (make_loaders(df, size, args, 'cuda', cache=memory).train, many)
    return {name: (forever(dl), max(1, n//bs), bs) for name,(dl,n) in loaders.items()}, str(memory)

def synchronise():
    if torch.cuda.is_available(): torch.cuda.synchronize()

def one_round(batches, n, bs):
    "Images per second over `n` batches"
    synchronise()
    start = time.perf_counter()
    for _ in range(n): next(batches)
    synchronise()
    return n*bs/(time.perf_counter()-start)

def measure(df, size, args, folder):
    "Images per second of each contender in each round"
    made,about = contenders(df, size, args, folder)
    for batches,_,_ in made.values():
        for _ in range(2): next(batches)
    rates = {name: [] for name in made}
    for i in range(args.turns):
        for name,how in made.items(): rates[name].append(one_round(*how))
        last = {name: round(values[-1]) for name,values in rates.items()}
        print(f"{size[0]}×{size[1]}, round {i+1} of {args.turns}:", last, flush=True)
    return dict(size=size, cache=about, images_per_second=rates)

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, help='a folder in the layout of Market-1501; without it, synthetic people')
    add('--sizes', type=int, nargs='+', default=(384,128,256,128), metavar='H W', help='heights and widths, in pairs')
    add('-p', type=int, default=8, help='identities in a batch')
    add('-k', type=int, default=8, help='images of each')
    add('--images', type=int, default=512, help='images per round; fifty times as many where nothing is decoded')
    add('--turns', type=int, default=7, help='rounds')
    args = parser.parse_args()
    if len(args.sizes)%2: parser.error('--sizes: heights and widths come in pairs')
    return args

def make_table(runs):
    columns = {}
    for run in runs:
        h,w = run['size']
        rates = run['images_per_second'].items()
        columns[f'{h}×{w}'] = {name: f'{sorted(v)[len(v)//2]:,.0f} ({max(v):,.0f})' for name,v in rates}
    return columns

def main():
    import pandas as pd

    from pyramidreid.all import market_table, synth_persons
    args = parse()
    torch.set_num_threads(1)
    path = args.data or synth_persons(n_train=64, n_test=4, size=(128,64), seed=0)
    df,device = market_table(path),'cuda' if torch.cuda.is_available() else 'cpu'
    few_queries = df.pid[df.split=='query'].unique()[:20] # validation is not timed
    df = df[(df.split=='train') | df.pid.isin(few_queries)]
    sizes = list(zip(args.sizes[::2], args.sizes[1::2]))
    with tempfile.TemporaryDirectory() as folder: runs = [measure(df, size, args, Path(folder)) for size in sizes]
    n_train = f"{(df.split=='train').sum():,} training images"
    images = f'{path.name}, {n_train}' if args.data else f'synthetic people, {n_train} of 128×64'
    results.mkdir(exist_ok=True)
    note = dict(circumstances(), images=images, batch=[args.p, args.k], runs=runs)
    (results/f'loading-{device}.json').write_text(json.dumps(note, indent=1))
    text = (f"{images}; batches of {args.p}×{args.k}. One process, one thread, no workers. Median of {args.turns} "
            "rounds, the best in brackets. *Fetch alone* gives uint8 pixels at the size they are kept at, which is all "
            "that a processor has to do where a GPU does the rest.")
    table = markdown(pd.DataFrame(make_table(runs)).rename_axis(''))
    write_table(f'loading-{device}', 'Images per second and core', table, text)

if __name__=='__main__': main()
