"What the benchmarks share: one training on synthetic people, a grid of them over seeds, and a table with its circumstances."
import json,os,platform,sys,time
from concurrent.futures import ProcessPoolExecutor,as_completed
from datetime import date
from multiprocessing import get_context
from pathlib import Path
import pandas as pd, torch

results = Path(__file__).parent/'results'

def hardware():
    "Processor or GPU, and cores"
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    name = next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.processor())
    return f'{name}, {os.cpu_count()} cores'

def circumstances():
    "Command (without folders of this machine), hardware, date and versions, as they belong beside every figure"
    import fastai,torchvision
    command = ' '.join(['python',f'benchmarks/{Path(sys.argv[0]).name}',*(Path(a).name for a in sys.argv[1:])])
    return dict(command=command, hardware=hardware(), threads=torch.get_num_threads(), date=str(date.today()), torch=torch.__version__, torchvision=torchvision.__version__, fastai=fastai.__version__)

def train_synthetic(name, seed, misalign=0.5, epochs=12, lr=3e-3, n_train=80, n_test=40, size=(96,48), only=None, mode='pk', **learner_args):
    "Train a small network from scratch on synthetic people and evaluate it once, at the end; a dict of figures"
    torch.set_num_threads(1)
    from fastai.callback.core import CancelValidException
    from pyramidreid.all import Callback,PyramidLoss,ReIDDataLoaders,pyramid_learner,resnet10,set_seed,synth_persons

    class SkipValidation(Callback):
        def before_validate(self):
            if not hasattr(self, 'gather_preds'): raise CancelValidException
    class OneLoss(PyramidLoss):
        def forward(self, pred, target):
            total = super().forward(pred, target)
            return self.parts.get(only, total)

    people = synth_persons(n_train=n_train, n_test=n_test, size=size, misalign=misalign, seed=seed)
    set_seed(seed, reproducible=True)
    dls = ReIDDataLoaders.from_market(people, p=8, k=8, size=size, mode=mode, num_workers=0)
    learn = pyramid_learner(dls, resnet10, pretrained=False, loss_func=OneLoss() if only else None, metrics=[], cbs=SkipValidation(), **learner_args)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    seconds = time.perf_counter()-start
    card = learn.evaluate()
    res = dict(name=name, seed=seed, misalign=misalign, mAP=card.mAP, rank1=card.rank1, seconds=seconds, steps=epochs*len(dls.train))
    if hasattr(learn, 'dynamic_loss_weights'):
        h = learn.dynamic_loss_weights.history
        res.update(both=float((h.weight_triplet>0).mean()), random=float((h['mode']=='random').mean()))
    return res

def run_grid(fname, configs, jobs):
    "Run every config that `results/fname` does not hold yet, `jobs` at a time, noting each as it ends; all rows"
    results.mkdir(exist_ok=True)
    f = results/fname
    done = json.loads(f.read_text())['runs'] if f.exists() else []
    key = lambda o: (o['name'],o['seed'],o.get('misalign',0.5))
    known = {key(o) for o in done}
    todo = [c for c in configs if key(c) not in known]
    with ProcessPoolExecutor(jobs, mp_context=get_context('spawn')) as pool:
        for i,run in enumerate(as_completed([pool.submit(_call, c) for c in todo])):
            res = run.result()
            done.append(res)
            f.write_text(json.dumps(dict(circumstances(), runs=done), indent=1))
            print(f"{i+1}/{len(todo)}", {k:round(v,4) if isinstance(v,float) else v for k,v in res.items()}, flush=True)
    return pd.DataFrame(done)

def _call(config): return train_synthetic(**config)

def write_table(fname, title, table, text=''):
    "Write `table` as Markdown with the circumstances of its figures"
    info = json.loads((results/fname).with_suffix('.json').read_text())
    head = ' · '.join(f'{k}: {info[k]}' for k in ('hardware','date','torch','torchvision','fastai'))
    (results/fname).with_suffix('.md').write_text(f"# {title}\n\n`{info['command']}`\n\n{head}\n\n{text}\n\n{table}\n")
    print(table)

def mean_std(o): return f'{o.mean():.3f} ± {o.std():.3f}'

def markdown(df):
    "A frame as a Markdown table"
    df = df.reset_index()
    rows = [[str(c) for c in df.columns],['---']*len(df.columns)] + [[str(v) for v in r] for r in df.itertuples(index=False)]
    return '\n'.join('| '+' | '.join(r)+' |' for r in rows)
