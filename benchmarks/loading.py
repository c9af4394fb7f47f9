"""How fast one processor core makes training batches: a plain torchvision `Dataset` in torch's `DataLoader`, pyramidreid's plain path, and its image cache,
all with the paper's transforms (resize, flip, normalise, erase) and in turns. On a GPU also the cache with everything after the fetch done there.
`python benchmarks/loading.py`; `--data` takes a folder in Market-1501's layout in place of drawn people."""
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
        self.tfm = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                               v2.Normalize(*stats), v2.RandomErasing(.2, value='random')])
    def __len__(self): return len(self.fns)
    def __getitem__(self, i):
        from PIL import Image
        with Image.open(self.fns[i]) as im: return self.tfm(im.convert('RGB')),self.labels[i]

def forever(dl):
    while True: yield from dl

def contenders(df, size, args, folder):
    "`{name: (endless batches, images a turn)}`"
    from pyramidreid.all import Normalize, ReIDDataLoaders, imagenet_stats
    def loaders(device='cpu', **kwargs):
        dls = ReIDDataLoaders.from_table(df, size=size, p=args.p, k=args.k, num_workers=0, device=torch.device(device), **kwargs)
        dls.add_tfms([Normalize.from_stats(*imagenet_stats, cuda=device=='cuda')], 'after_batch')
        return dls
    plain,cached = loaders(),loaders(cache=True)
    memory = cached.train_ds.cache
    few,many,bs = args.images,args.images*50,args.p*args.k
    tv = torch.utils.data.DataLoader(Images(plain.train.items, size, imagenet_stats), batch_size=bs, shuffle=True, drop_last=True)
    on_disk = loaders(cache=folder/f'{size[0]}x{size[1]}.safetensors')
    res = {'torchvision Dataset + DataLoader':(tv,few), PLAIN:(plain.train,few), CACHED:(cached.train,few),
           f'{CACHED} in memory, fetch alone':(cached.train.new(after_batch=[]),many), f'{CACHED} in a file, fetch alone':(on_disk.train.new(after_batch=[]),many)}
    if torch.cuda.is_available(): res[f'{CACHED}, transforms on the GPU'] = (loaders('cuda', cache=memory).train,many)
    return {k:(forever(dl),max(1, n//bs),bs) for k,(dl,n) in res.items()},str(memory)

def turn(batches, n, bs):
    "Images per second over `n` batches"
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    sync()
    start = time.perf_counter()
    for _ in range(n): next(batches)
    sync()
    return n*bs/(time.perf_counter()-start)

def measure(df, size, args, folder):
    made,about = contenders(df, size, args, folder)
    for batches,_,_ in made.values():
        for _ in range(2): next(batches)
    rates = {k:[] for k in made}
    for i in range(args.turns):
        for name,how in made.items(): rates[name].append(turn(*how))
        print(f"{size[0]}×{size[1]}, turn {i+1} of {args.turns}:", {k:round(v[-1]) for k,v in rates.items()}, flush=True)
    return dict(size=size, cache=about, images_per_second=rates)

if __name__=='__main__':
    import pandas as pd

    from pyramidreid.all import market_table, synth_persons
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='a folder in the layout of Market-1501; drawn people if it is left out')
    p.add_argument('--sizes', type=int, nargs='+', default=(384,128,256,128), metavar='H W', help='heights and widths of the input, in pairs')
    p.add_argument('-p', type=int, default=8, help='identities in a batch')
    p.add_argument('-k', type=int, default=8, help='images of each')
    p.add_argument('--images', type=int, default=512, help='images a turn; fifty times as many where nothing is decoded or changed')
    p.add_argument('--turns', type=int, default=7)
    args = p.parse_args()
    if len(args.sizes)%2: p.error('--sizes: heights and widths come in pairs')
    torch.set_num_threads(1)
    path = args.data or synth_persons(n_train=64, n_test=4, size=(128,64), seed=0)
    df,device = market_table(path),'cuda' if torch.cuda.is_available() else 'cpu'
    df = df[(df.split=='train') | df.pid.isin(df.pid[df.split=='query'].unique()[:20])] # validation is not timed
    with tempfile.TemporaryDirectory() as folder: runs = [measure(df, s, args, Path(folder)) for s in zip(args.sizes[::2], args.sizes[1::2])]
    results.mkdir(exist_ok=True)
    images = f"{path.name}, {(df.split=='train').sum():,} training images" if args.data else f"drawn people, {(df.split=='train').sum():,} training images of 128×64"
    (results/f'loading-{device}.json').write_text(json.dumps(dict(circumstances(), images=images, batch=[args.p,args.k], runs=runs), indent=1))
    table = pd.DataFrame({f"{r['size'][0]}×{r['size'][1]}":{k:f"{pd.Series(v).median():,.0f} ({max(v):,.0f})" for k,v in r['images_per_second'].items()} for r in runs})
    write_table(f'loading-{device}', 'Images per second and core', markdown(table.rename_axis('')),
        f"{images}; batches of {args.p}×{args.k}. One process, one thread, no workers. Median of {args.turns} turns, the best in brackets. "
        "*Fetch alone* gives bytes at the size they are kept at, which is all that a processor has to do where a GPU does the rest.")
