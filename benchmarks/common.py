"""Shared by the benchmarks: one training on synthetic people or a folder, a grid of trainings over seeds, and a table
with the conditions of its measurements."""
import gc
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from pyramidreid.core import atomic_write

results = Path(__file__).parent/'results'
sys.path.append(str(Path(__file__).parents[1]/'tests')) # for the plain versions in reference.py

def code_version():
    "Short hash of the package's source, which changes with any module"
    modules = sorted((Path(__file__).parents[1]/'pyramidreid').rglob('*.py'))
    return hashlib.sha1(b''.join(module.read_bytes() for module in modules)).hexdigest()[:7]

code = code_version()

# ---- circumstances

def hardware():
    "Processor or GPU, and cores"
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else platform.processor()}, {os.cpu_count()} cores'

def circumstances():
    "Command (without folders of this machine), hardware, date and versions, which are recorded with every number"
    import fastai
    import torchvision
    arguments = [Path(arg).name for arg in sys.argv[1:]]
    return dict(
        command=shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *arguments]), hardware=hardware(),
        threads=torch.get_num_threads(), date=str(date.today()), torch=torch.__version__,
        torchvision=torchvision.__version__, fastai=fastai.__version__)

# ---- one training

def train_synthetic(name, seed, misalign=0.5, n_train=80, n_test=40, size=(96,48), **kwargs):
    "Draw people and `train` a small network on them; a dict of results"
    from pyramidreid.all import market_table, synth_persons
    people = synth_persons(n_train=n_train, n_test=n_test, size=size, misalign=misalign, seed=seed)
    return dict(train(name, seed, market_table(people), size=size, **kwargs), misalign=misalign)

def train_folder(name, seed, data, **kwargs):
    "`train` on the dataset in a folder that `dataset_table` knows; a dict of results"
    from pyramidreid.all import dataset_table
    return train(name, seed, dataset_table(data), **kwargs)

def check_losses(only, dynamic, mode):
    "Raise a `ValueError` for a combination of losses and batches that cannot be trained"
    if only and dynamic:
        raise ValueError(f"only={only!r}: with a single loss there is nothing to weight; pass dynamic=False")
    if only=='triplet' and mode!='pk':
        raise ValueError("The triplet loss alone needs P×K batches: a random batch has hardly any positive pairs")

def one_loss(only):
    "A `PyramidLoss` that computes the loss named `only` and no other; None for both"
    from pyramidreid.all import PyramidLoss
    if not only: return None
    class OneLoss(PyramidLoss):
        def forward(self, pred, target):
            self.wanted = (only,)
            return super().forward(pred, target)
    return OneLoss()

def skip_validation():
    "A callback that leaves out fastai's validation, but not `get_preds`"
    from fastai.callback.core import CancelValidException

    from pyramidreid.all import Callback
    class SkipValidation(Callback):
        def before_validate(self):
            if not hasattr(self, 'gather_preds'): raise CancelValidException
    return SkipValidation()

def fit(learn, recipe, epochs, lr, pretrained, fit_args=None):
    "Train by one of the recipes, without output; `fit_args` are passed to it"
    args = fit_args or {}
    with learn.no_bar(), learn.no_logging():
        if recipe=='one_cycle': learn.fit_one_cycle(epochs, slice(lr/4, lr) if pretrained else lr, **args)
        elif recipe=='paper': learn.fit_paper(epochs, **args)
        else: learn.fit_modern(epochs, **{'frozen_epochs':int(pretrained), **args})

def use_device(learn, mixed, channels_last):
    "Set precision, memory format and the choice of kernels for the learner's device; is it a GPU?"
    on_gpu = learn.dls.device.type!='cpu'
    if on_gpu: torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark = False,True
    if on_gpu and mixed: learn.to_channelslast(amp_mode='bf16')
    elif on_gpu or channels_last: learn.to_channelslast(use_amp=False)
    return on_gpu

def train(name, seed, df, size=(96,48), hold_out=None, arch='resnet10', weights=None, recipe='one_cycle', epochs=12,
          steps=None, lr=3e-3, p=8, k=8, workers=0, cache=None, only=None, mode='pk', dynamic=True, neck=False,
          shift=0, loss=None, change=None, channels_last=False, mixed=True, tfms_args=None, fit_args=None,
          **learner_args):
    """Train on the table `df` and evaluate once, at the end, on its queries and gallery or on people held out of its
    training set; a dict of results. Without more arguments it is the paper's method: no BNNeck, dynamic training.
    `loss` and a callable `dynamic` make a loss and a rule; `change` gets the learner before it is trained;
    `channels_last` is faster on a CPU; `mixed` uses bfloat16 on a GPU. `cpu_seconds` do not count what else the machine
    does"""
    check_losses(only, dynamic, mode)
    gc.collect()
    torch.set_num_threads(1)
    import pyramidreid.all as lib
    lib.set_seed(seed+shift, reproducible=True)
    tfms = partial(lib.strong_tfms if recipe=='modern' else lib.person_tfms, **(tfms_args or {}))
    dls = lib.ReIDDataLoaders.from_table(
        df, p=p, k=k, size=size, mode=mode, valid_pct=hold_out, num_workers=workers, cache=cache, tfms=tfms)
    if steps: epochs = math.ceil(steps/len(dls.train))
    if isinstance(dynamic, str): dynamic = lib.DynamicLossWeights(weighting=dynamic)
    elif callable(dynamic): dynamic = dynamic()
    learn = lib.pyramid_learner(
        dls, getattr(lib, arch, arch), pretrained=False, weights=weights, loss_func=loss() if loss else one_loss(only),
        dynamic=dynamic, neck=neck, metrics=[], cbs=skip_validation(), **learner_args)
    if change: change(learn)
    on_gpu = use_device(learn, mixed and recipe!='modern', channels_last)
    start,cpu_start = time.perf_counter(),time.process_time()
    fit(learn, recipe, epochs, lr, bool(weights), fit_args)
    seconds,cpu_seconds = time.perf_counter()-start,time.process_time()-cpu_start
    card = learn.evaluate(device=dls.device if on_gpu else None)
    row = dict(
        name=name, seed=seed, mAP=card.mAP, rank1=card.rank1, seconds=seconds, cpu_seconds=cpu_seconds,
        steps=epochs*len(dls.train), hardware=hardware(), date=str(date.today()), code=code,
        embedding=learn.model.head.bn.num_features, branches=len(learn.model.head.windows))
    if hasattr(learn, 'dynamic_loss_weights'):
        history = learn.dynamic_loss_weights.history
        if 'weight_triplet' in history: row['both'] = float((history.weight_triplet>0).mean())
        row['random'] = float((history['mode']=='random').mean())
    return row

# ---- a grid of trainings

def noted(fname, settings=None):
    "The runs recorded in `results/fname`. Raises `ValueError` if they were made with other `settings`"
    file = results/fname
    if not file.exists(): return []
    note = json.loads(file.read_text())
    if settings is None or note.get('settings')==settings: return note['runs']
    old = note.get('settings') or {}
    changed = [key for key in {**old, **settings} if old.get(key)!=settings.get(key)]
    differ = [f"{key}: {old.get(key)!r} there, {settings.get(key)!r} now" for key in changed]
    raise ValueError(f"{file.name} contains {len(note['runs'])} runs of another configuration ({'; '.join(differ)}). "
                     "Choose another file with --out, or delete this one")

class InProcess(Executor):
    "An executor that works in this process"
    def submit(self, call, **config):
        future = Future()
        try: future.set_result(call(**config))
        except Exception as e: future.set_exception(e)
        return future

def new_pool(jobs): return ProcessPoolExecutor(jobs, mp_context=get_context('spawn')) if jobs>1 else InProcess()

def run_key(run): return run['name'], run['seed'], run.get('misalign', 0.5)

def shortened(run): return {k: round(v, 4) if isinstance(v, float) else v for k,v in run.items()}

class Grid:
    "The runs of a grid: those that are done, and those that failed"
    def __init__(self, fname, settings):
        self.fname,self.settings = fname,settings
        self.done,self.failed,self.count = noted(fname, settings),[],0

    def missing(self, configs):
        known = {run_key(run) for run in self.done}
        return [config for config in configs if run_key(config) not in known]

    def record(self, config, future):
        "Record the result of a run; return what to print"
        self.count += 1
        error = future.exception()
        if isinstance(error, BrokenExecutor): raise error
        if error:
            self.failed.append(f"{config['name']}, seed {config['seed']}: {type(error).__name__}: {error}")
            return self.failed[-1]
        self.done.append(future.result())
        write_runs(self.fname, self.done, self.settings)
        return shortened(self.done[-1])

def run_grid(fname, configs, jobs, call=train_synthetic, settings=None, minutes=None):
    """Run every config that `results/fname` does not hold yet, `jobs` at a time, and record each when it ends; none
    starts after `minutes`. Return all rows"""
    grid,began,running = Grid(fname, settings),time.monotonic(),{}
    todo = grid.missing(configs)
    waiting = iter(todo)
    def late(): return minutes is not None and time.monotonic()-began>=60*minutes
    with new_pool(jobs) as pool:
        while True:
            while len(running)<jobs and not late():
                config = next(waiting, None)
                if config is None: break
                running[pool.submit(call, **config)] = config
            if not running: break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                text = grid.record(running.pop(future), future)
                print(f'{grid.count}/{len(todo)}', text, flush=True)
    if grid.count<len(todo):
        left = len(todo)-grid.count
        print(f'{minutes} minutes are over with {left} runs left: run the same command to resume', flush=True)
    if grid.failed:
        raise RuntimeError(f"{len(grid.failed)} of {grid.count} runs failed; run the same command to retry them. "
                           f"The first: {grid.failed[0]}")
    return pd.DataFrame(grid.done)

def without_minutes(command):
    "A command without its time limit, which changes no result"
    words = shlex.split(command)
    if '--minutes' in words:
        i = words.index('--minutes')
        del words[i:i+2]
    return shlex.join(words)

def write_runs(fname, runs, settings):
    "Write all rows with the conditions of the last, and the commands, machines and dates of all"
    info,file = circumstances(),results/fname
    info['command'] = without_minutes(info['command'])
    for key in ('hardware', 'date'):
        info[key] = ', '.join(dict.fromkeys([*(run[key] for run in runs if key in run), info[key]]))
    if file.exists():
        commands = json.loads(file.read_text())['command'].split(' && ')
        info['command'] = ' && '.join(dict.fromkeys([*commands, info['command']]))
    if settings is not None: info['settings'] = settings
    with atomic_write(file) as partial_file: partial_file.write_text(json.dumps(dict(info, runs=runs), indent=1))

# ---- tables

def write_table(fname, title, table, text=''):
    "Write `table` as Markdown with the conditions of its measurements"
    info = json.loads((results/f'{fname}.json').read_text())
    head = ' · '.join(f'{key}: {info[key]}' for key in ('hardware', 'date', 'torch', 'torchvision', 'fastai'))
    (results/f'{fname}.md').write_text(f"# {title}\n\n`{info['command']}`\n\n{head}\n\n{text}\n\n{table}\n")
    print(table)

def mean_std(values): return f'{values.mean():.3f}' + (f' ± {values.std():.3f}' if len(values)>1 else '')

def markdown(df):
    "A frame as a Markdown table"
    df = df.reset_index()
    head = [str(column) for column in df.columns]
    rows = [head, ['---']*len(head), *([str(v) for v in row] for row in df.itertuples(index=False))]
    return '\n'.join(f"| {' | '.join(row)} |" for row in rows)

class Peak:
    "Peak of this process's anonymous memory within the block, beyond what it had before, MB"
    def now(self):
        with open('/proc/self/status') as status:
            return next(int(line.split()[1]) for line in status if line.startswith('RssAnon'))/1024
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
