"What the benchmarks share: one training on synthetic people or a folder, a grid of them over seeds, and a table with its circumstances."
import gc
import hashlib
import json
import math
import os
import platform
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from pyramidreid.core import atomic_write

results = Path(__file__).parent/'results'
sys.path.append(str(Path(__file__).parents[1]/'tests')) # for the plain versions in reference.py
code = hashlib.sha1(b''.join(f.read_bytes() for f in sorted((Path(__file__).parents[1]/'pyramidreid').rglob('*.py')))).hexdigest()[:7] # changes with any module

def hardware():
    "Processor or GPU, and cores"
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    name = next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.processor())
    return f'{name}, {os.cpu_count()} cores'

def circumstances():
    "Command (without folders of this machine), hardware, date and versions, as they belong beside every figure"
    import fastai
    import torchvision
    command = ' '.join(['python',f'benchmarks/{Path(sys.argv[0]).name}',*(Path(a).name for a in sys.argv[1:])])
    return dict(command=command, hardware=hardware(), threads=torch.get_num_threads(), date=str(date.today()), torch=torch.__version__, torchvision=torchvision.__version__, fastai=fastai.__version__)

def train_synthetic(name, seed, misalign=0.5, n_train=80, n_test=40, size=(96,48), **kwargs):
    "Draw people and `train` a small network on them; a dict of figures"
    from pyramidreid.all import market_table, synth_persons
    people = synth_persons(n_train=n_train, n_test=n_test, size=size, misalign=misalign, seed=seed)
    return dict(train(name, seed, market_table(people), size=size, **kwargs), misalign=misalign)

def train_folder(name, seed, data, **kwargs):
    "`train` on the data set in a folder that `dataset_table` knows; a dict of figures"
    from pyramidreid.all import dataset_table
    return train(name, seed, dataset_table(data), **kwargs)

def train(name, seed, df, size=(96,48), hold_out=None, arch='resnet10', weights=None, recipe='one_cycle', epochs=12, steps=None, lr=3e-3,
          p=8, k=8, workers=0, cache=None, only=None, mode='pk', dynamic=True, shift=0, **learner_args):
    "Train on the table `df` and evaluate once, at the end, on its queries and gallery or on people held out of its training set; a dict of figures"
    if only and dynamic: raise ValueError(f"only={only!r}: one loss alone leaves nothing to weigh; pass dynamic=False")
    if only=='triplet' and mode!='pk': raise ValueError("The triplet loss alone needs P×K batches: a random batch has hardly a positive pair")
    gc.collect()
    torch.set_num_threads(1)
    from fastai.callback.core import CancelValidException

    import pyramidreid.all as lib
    from pyramidreid.all import Callback, DynamicLossWeights, PyramidLoss, ReIDDataLoaders, pyramid_learner, set_seed

    class SkipValidation(Callback):
        def before_validate(self):
            if not hasattr(self, 'gather_preds'): raise CancelValidException
    class OneLoss(PyramidLoss):
        def forward(self, pred, target):
            self.wanted = (only,)
            return super().forward(pred, target)

    set_seed(seed+shift, reproducible=True)
    dls = ReIDDataLoaders.from_table(df, p=p, k=k, size=size, mode=mode, valid_pct=hold_out, num_workers=workers, cache=cache,
                                     tfms=lib.strong_tfms if recipe=='modern' else lib.person_tfms)
    if steps: epochs = math.ceil(steps/len(dls.train))
    if isinstance(dynamic, str): dynamic = DynamicLossWeights(weighting=dynamic)
    learn = pyramid_learner(dls, getattr(lib, arch, arch), pretrained=False, weights=weights, loss_func=OneLoss() if only else None, dynamic=dynamic,
                            metrics=[], cbs=SkipValidation(), **learner_args)
    cuda = dls.device.type=='cuda'
    if cuda: learn.to_channelslast(amp_mode='bf16')
    fit = {'one_cycle':lambda: learn.fit_one_cycle(epochs, slice(lr/4, lr) if weights else lr), 'paper':lambda: learn.fit_paper(epochs),
           'modern':lambda: learn.fit_modern(epochs, frozen_epochs=int(bool(weights)))}[recipe]
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): fit()
    seconds = time.perf_counter()-start
    card = learn.evaluate(device=dls.device if cuda else None)
    res = dict(name=name, seed=seed, mAP=card.mAP, rank1=card.rank1, seconds=seconds, steps=epochs*len(dls.train), hardware=hardware(), date=str(date.today()), code=code,
               embedding=learn.model.head.bn.num_features, branches=len(learn.model.head.windows))
    if hasattr(learn, 'dynamic_loss_weights'):
        h = learn.dynamic_loss_weights.history
        res.update(both=float((h.weight_triplet>0).mean()), random=float((h['mode']=='random').mean()))
    return res

def noted(fname, settings=None):
    "The runs that `results/fname` holds; a `ValueError` if they were made with other `settings`"
    f = results/fname
    if not f.exists(): return []
    note = json.loads(f.read_text())
    if settings is not None and note.get('settings')!=settings:
        old = note.get('settings') or {}
        differ = '; '.join(f"{k}: {old.get(k)!r} there, {settings.get(k)!r} now" for k in {**old,**settings} if old.get(k)!=settings.get(k))
        raise ValueError(f"{f.name} holds {len(note['runs'])} runs of another configuration ({differ}). Name another file with --out, or delete this one")
    return note['runs']

class Here(Executor):
    "An executor that works in this process"
    def submit(self, call, **config):
        res = Future()
        try: res.set_result(call(**config))
        except Exception as e: res.set_exception(e)
        return res

def run_grid(fname, configs, jobs, call=train_synthetic, settings=None, minutes=None):
    "Run every config that `results/fname` does not hold yet, `jobs` at a time, noting each as it ends; none is begun after `minutes`. All rows"
    late = lambda: minutes is not None and time.monotonic()-begin>=60*minutes
    done,begin,failed,running = noted(fname, settings),time.monotonic(),[],{}
    key = lambda o: (o['name'],o['seed'],o.get('misalign',0.5))
    known = {key(o) for o in done}
    todo = [c for c in configs if key(c) not in known]
    waiting,n = iter(todo),0
    with ProcessPoolExecutor(jobs, mp_context=get_context('spawn')) if jobs>1 else Here() as pool:
        while True:
            while len(running)<jobs and not late() and (c:=next(waiting, None)): running[pool.submit(call, **c)] = c
            if not running: break
            for run in wait(running, return_when=FIRST_COMPLETED).done:
                n,c = n+1,running.pop(run)
                if isinstance(e:=run.exception(), BrokenExecutor): raise e
                if e: failed.append(f"{c['name']}, seed {c['seed']}: {type(e).__name__}: {e}")
                else:
                    done.append(run.result())
                    _note(fname, done, settings)
                print(f'{n}/{len(todo)}', failed[-1] if e else {k:round(v,4) if isinstance(v,float) else v for k,v in done[-1].items()}, flush=True)
    if n<len(todo): print(f'{minutes} minutes are over, {len(todo)-n} runs are left: the same command goes on with them', flush=True)
    if failed: raise RuntimeError(f"{len(failed)} of {n} runs failed; the same command tries them again. The first: {failed[0]}")
    return pd.DataFrame(done)

def _note(fname, done, settings):
    "Write all rows with the circumstances of the last, and the commands, machines and days of all"
    info,f = circumstances(),results/fname
    for k in ('hardware','date'): info[k] = ', '.join(dict.fromkeys([*(o[k] for o in done if k in o), info[k]]))
    if f.exists(): info['command'] = ' && '.join(dict.fromkeys([*json.loads(f.read_text())['command'].split(' && '), info['command']]))
    with atomic_write(f) as tmp: tmp.write_text(json.dumps(dict(info, **({} if settings is None else dict(settings=settings)), runs=done), indent=1))

def write_table(fname, title, table, text=''):
    "Write `table` as Markdown with the circumstances of its figures"
    info = json.loads((results/f'{fname}.json').read_text())
    head = ' · '.join(f'{k}: {info[k]}' for k in ('hardware','date','torch','torchvision','fastai'))
    (results/f'{fname}.md').write_text(f"# {title}\n\n`{info['command']}`\n\n{head}\n\n{text}\n\n{table}\n")
    print(table)

class Peak:
    "Peak of this process's anonymous memory within the block, beyond what it had before, MB"
    def now(self): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))/1024
    def __enter__(self):
        self.start = self.mb = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.stop.wait(.003): self.mb = max(self.mb, self.now())
    def __exit__(self, *args):
        self.stop.set()
        self.thread.join()
        self.mb -= self.start

def mean_std(o): return f'{o.mean():.3f}' + (f' ± {o.std():.3f}' if len(o)>1 else '')

def markdown(df):
    "A frame as a Markdown table"
    df = df.reset_index()
    rows = [[str(c) for c in df.columns],['---']*len(df.columns)] + [[str(v) for v in r] for r in df.itertuples(index=False)]
    return '\n'.join('| '+' | '.join(r)+' |' for r in rows)
