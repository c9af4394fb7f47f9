"""What worker processes cost dynamic training: images decoded for each image used, and the seconds of short epochs
where workers are started with *spawn*. The loader of before, with workers of their own for each mode and epoch, beside
today's, with new workers for each epoch (`persistent_workers=False`) or those of the epoch before.

`python benchmarks/workers.py`; `--workers 0 2` gives the numbers of workers, `--json FILE` writes what was measured."""
import argparse
import json
import multiprocessing
import random
import sys
import time
import warnings
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from common import circumstances, markdown

P,K,SIZE = 8,8,(256,128)

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--workers', type=int, nargs='+', default=[0,2,4,8], help='numbers of workers to try')
    add('--steps', type=int, default=60, help='steps of an epoch where images are counted')
    add('--step', type=float, default=.1, help='seconds that a training step takes')
    add('--spawned-steps', type=int, default=12, help='steps of an epoch where workers are spawned')
    add('--spawned-workers', type=int, default=2, help='workers that are spawned')
    add('--epochs', type=int, default=3, help='epochs')
    add('--json', type=Path, help='file to write the results to')
    return parser.parse_args()

class Counting:
    "Counts the images that are opened, in all processes"
    def __init__(self): self.n = multiprocessing.Value('q', 0)
    def __call__(self, file):
        from pyramidreid.data.cache import open_image
        with self.n: self.n.value += 1
        return open_image(file)

class Crops:
    "Image files as a dataset, resized and normalised as for training"
    def __init__(self, df, size):
        from torchvision.transforms import v2
        self.items,self.open = df,Counting()
        self.resize = v2.Compose([v2.Resize(size), v2.PILToTensor()])
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.resize(self.open(self.items.fn.iloc[i])),int(self.items.label.iloc[i])

def loader(kind, data, n_workers):
    "A training loader: 'before', 'new workers' for each epoch, or 'kept'"
    from pyramidreid.data.sampler import PKDataLoader
    class Before(PKDataLoader):
        def _from_workers(self): return self._switching()
    cls = Before if kind=='before' else PKDataLoader
    dl = cls(data, p=P, k=K, shuffle=True, num_workers=n_workers, persistent_workers=kind!='new workers')
    dl.rng = random.Random(0)
    return dl

def epochs(dl, n, seconds=0.):
    "Train for `n` epochs without a model: a step takes `seconds`. Modes change as in dynamic training, and at random"
    rng,times = random.Random(1),[]
    for _ in range(n):
        start = time.perf_counter()
        for _ in dl:
            time.sleep(seconds)
            if rng.random()<.3: dl.mode = 'pk' if dl.mode=='random' else 'random'
        times.append(time.perf_counter()-start)
    dl.close_workers()
    return times

def crops(n_steps):
    "A table of synthetic people, with some images more than once so that an epoch has `n_steps` steps"
    from pyramidreid.all import market_table, synth_persons
    from pyramidreid.data.tables import encode_table
    df = market_table(synth_persons(n_train=64, n_test=4, size=(128,64), seed=0))
    df = encode_table(df)[0]
    df = df[df.split=='train'].reset_index(drop=True)
    return pd.concat([df]*(n_steps*P*K//len(df)+1), ignore_index=True).iloc[:n_steps*P*K]

def measure(kind, df, n_workers, args, seconds):
    "A dict: images decoded for each one used, seconds of each epoch"
    data = Crops(df, SIZE)
    dl = loader(kind, data, n_workers)
    times = epochs(dl, args.epochs, seconds)
    n_used = args.epochs*len(dl)*dl.bs
    row = dict(loader=kind, workers=n_workers, decoded=data.open.n.value/n_used, seconds=times)
    print({**row, 'seconds':[round(t, 1) for t in times]}, file=sys.stderr, flush=True)
    return row

def shown(rows):
    table = [{'loader': row['loader'], 'workers': row['workers'], 'decoded/used': f"{row['decoded']:.2f}",
              'seconds of each epoch': ', '.join(f'{t:.1f}' for t in row['seconds'])} for row in rows]
    return markdown(pd.DataFrame(table).set_index('loader'))

def main():
    args = parse()
    warnings.simplefilter('ignore')
    kinds,counted = ('before','new workers','kept'),[]
    df,few = crops(args.steps),crops(args.spawned_steps)
    for n in args.workers: counted += [measure(kind, df, n, args, args.step) for kind in kinds]
    print(f"{args.steps} steps of {P*K} images, {args.step} s each\n\n{shown(counted)}\n", flush=True)
    multiprocessing.set_start_method('spawn', force=True)
    spawned = [measure(kind, few, args.spawned_workers, args, 0.) for kind in kinds]
    print(f"{args.spawned_steps} steps, workers are spawned\n\n{shown(spawned)}")
    if args.json: args.json.write_text(json.dumps(dict(circumstances(), counted=counted, spawned=spawned), indent=1))

if __name__=='__main__': main()
