"""The parts of `gpu.py`, which starts this file in processes of its own: `gpu_parts.py PART... --folder DIR`.
A part is a function of a `Setting` that returns a dict of results; `text` is its line in the table, `rows` a table."""
import argparse
import json
import os
import shutil
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent/'tests'/'fakegpu')]

from pyramidreid.core import atomic_write  # noqa: E402


class Skip(Exception):
    "Why a part cannot be run"

class Unfinished(Exception):
    "What is left of a part that the next run goes on with; its results are the second argument"

class Setting:
    "Device, form and files of a run, and the results of the part that is running"
    def __init__(self, args):
        self.device,self.reduced,self.folder = args.device,args.reduced,args.folder
        self.data,self.weights,self.deadline = args.data,args.weights,time.monotonic()+args.seconds
        self.is_gpu = self.device!='cpu'

    def begin(self, name):
        self.name,self.began,self.result = name,time.monotonic(),{}
        self.write('running')

    def write(self, status, **more):
        entry = dict(status=status, seconds=round(time.monotonic()-self.began, 1), result=self.result, **more)
        with atomic_write(self.folder/f'{self.name.replace(":", "-")}.json') as partial_file:
            partial_file.write_text(json.dumps(entry, ensure_ascii=False), encoding='utf-8')

    def note(self, **results):
        "Keep results of a part that is not finished"
        self.result.update(results)
        self.write('running')

    def seconds_left(self): return self.deadline-time.monotonic()

# ---- the device

def prepare(device):
    "Let fastai use the device. The pretend one must be known before the library is imported"
    os.environ['CASES_DEVICE'] = device
    if device=='cpu': os.environ['CUDA_VISIBLE_DEVICES'] = ''
    if device=='fakegpu':
        import fakegpu
        fakegpu.make_default()
    import common  # noqa: F401, finds the folder of tests
    import matplotlib
    matplotlib.use('Agg')

def about():
    "Hardware and versions, for the head of `gpu.json`"
    import common
    import torch
    return dict(hardware=common.hardware(), torch=torch.__version__, cores=os.cpu_count())

def synchronise(s):
    import torch
    if s.is_gpu: torch.get_device_module(s.device).synchronize()

def reset_peak(s):
    import torch
    if s.device=='cuda': torch.cuda.reset_peak_memory_stats()
    if s.device=='fakegpu': sys.modules['fakegpu'].C.reset_peak()

def peak_mb(s):
    "Peak of the memory that tensors took on the device since `reset_peak`, MB; None on a CPU"
    import torch
    if s.device=='cuda': return round(torch.cuda.max_memory_allocated()/2**20)
    return round(sys.modules['fakegpu'].memory()[1]/2**20, 1) if s.device=='fakegpu' else None

# ---- smoke

def people(s, n_train=12, n_test=6, size=(96,48), **kwargs):
    "A folder of synthetic people for the part that is running, drawn once"
    from pyramidreid.all import synth_persons
    path = s.folder/f'people-{s.name.replace(":", "-")}'/f'{n_train}-{n_test}-{size[0]}x{size[1]}'
    if path.exists(): return path
    drawing = path.with_name(f'{path.name}-unfinished')
    shutil.rmtree(drawing, ignore_errors=True)
    drawing.parent.mkdir(exist_ok=True)
    return synth_persons(path=drawing, n_train=n_train, n_test=n_test, size=size, **kwargs).rename(path)

def run_case(name, s):
    "A case of tests/fakegpu"
    import cases
    folder = s.folder/f'files-case-{name}'
    shutil.rmtree(folder, ignore_errors=True) # of an earlier run
    folder.mkdir()
    reset_peak(s)
    cases.run(name, people(s, distractors=4, junk=2), folder)
    return dict(text=f'peak {peak_mb(s)} MB' if s.is_gpu else '', peak_mb=peak_mb(s))

def small_learner(s, size=(96,48), **kwargs):
    "An untrained learner of synthetic people, quiet, with equal weights and batches each time"
    from fastai.callback.progress import ProgressCallback

    import pyramidreid.all as lib
    lib.set_seed(0, reproducible=True)
    dls = lib.ReIDDataLoaders.from_market(people(s), p=4, k=4, size=size, num_workers=0)
    learn = lib.pyramid_learner(dls, lib.resnet10, pretrained=False, emb_sz=32, lr=3e-3, path=s.folder, **kwargs)
    assert learn.dls.device.type==s.device, f'the loaders are on {learn.dls.device}, not on {s.device}'
    learn.logger = lambda *args: None
    return learn.remove_cbs(ProgressCallback)

def losses_of(learn): return [round(float(loss), 4) for loss in learn.recorder.losses]

def check_finite(learn):
    "Raise an error if a weight or a loss is not a number"
    bad = [name for name,value in learn.model.state_dict().items() if not value.isfinite().all()]
    assert not bad, f'not finite: {", ".join(bad[:5])}'
    assert all(map(bool, learn.recorder.losses)) and all(loss==loss for loss in losses_of(learn)), losses_of(learn)

def output_types(learn):
    "The types of numbers that the body returns in training, filled while it trains"
    types = set()
    def look(module, inputs, output):
        if module.training: types.add(str(output.dtype).removeprefix('torch.'))
    learn.model.body.register_forward_hook(look)
    return types

def stop_after(n):
    "A callback that ends a fit after `n` steps"
    from pyramidreid.all import Callback, CancelFitException
    class Stop(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.train_iter>=n: raise CancelFitException
    return Stop()

def train_mixed(mode, s):
    "Two epochs in mixed precision: it is used, weights and losses are finite, and the evaluation works after it"
    from pyramidreid.all import Callback
    class Scale(Callback):
        "Scale of the losses after each step"
        order,values = 89,()
        def after_batch(self):
            if self.training: self.values = (*self.values, self.learn.scaler.get_scale())
    learn,scale = small_learner(s),Scale()
    types = output_types(learn)
    getattr(learn, f'to_{mode}')()
    reset_peak(s)
    learn.fit_one_cycle(2, 3e-3, cbs=[scale, stop_after(2)] if s.reduced else scale)
    check_finite(learn)
    wanted = dict(fp16='float16', bf16='bfloat16')[mode]
    assert types=={wanted}, f'the body returns {types}, not {wanted}'
    card = learn.evaluate()
    text = f'loss {losses_of(learn)[-1]:.2f}, mAP {card.mAP:.3f}'
    if mode=='fp16': text += f', scale {scale.values[0]:.0f} to {scale.values[-1]:.0f}'
    return dict(text=text, mAP=card.mAP, losses=losses_of(learn), scales=scale.values, peak_mb=peak_mb(s))

def first_losses(s, change, n=2):
    "The losses of the first `n` steps of a learner that `change` has changed, and the learner"
    learn = small_learner(s)
    change(learn)
    learn.fit(1, 1e-4, cbs=stop_after(n))
    return losses_of(learn),learn

def largest_difference(got, want): return max(abs(a-b)/abs(b) for a,b in zip(got, want, strict=True))

def exact_products():
    "No TF32"
    import torch
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

def channels_last(s):
    "The first losses are those with contiguous images"
    exact_products()
    want,_ = first_losses(s, lambda learn: None)
    got,learn = first_losses(s, lambda learn: learn.to_channelslast(use_amp=False))
    import torch
    conv = next(m for m in learn.model.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.shape[2]>1)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    off = largest_difference(got, want)
    assert off<1e-3, (got, want)
    return dict(text=f'losses differ by {off:.0e}', losses=got, contiguous=want)

def compiled(s):
    "The first losses are those without `torch.compile`"
    exact_products()
    want,_ = first_losses(s, lambda learn: None)
    def compile_parts(learn):
        for part in (learn.model.body, learn.model.head): part.compile()
    start = time.monotonic()
    got,_ = first_losses(s, compile_parts)
    seconds,off = time.monotonic()-start,largest_difference(got, want)
    assert off<1e-3, (got, want)
    return dict(text=f'losses differ by {off:.0e}, {seconds:.0f} s to compile', losses=got, plain=want, compile=seconds)

def paper_loaders(s, lib):
    "Loaders as the paper's: 384×128, 8×8; small ones for the reduced form"
    if s.reduced: return lib.ReIDDataLoaders.from_market(people(s), p=4, k=4, size=(96,48), num_workers=0)
    path = s.data or people(s, n_train=24, n_test=4, size=(128,64))
    return lib.ReIDDataLoaders.from_market(path, p=8, k=8, size=(384,128), num_workers=0)

def paper(s):
    "Two steps of `fit_paper`, in single precision and in bfloat16"
    import torch

    import pyramidreid.all as lib
    peaks = {}
    dls = paper_loaders(s, lib)
    arch,weights = (lib.resnet10,None) if s.reduced else (lib.resnet50,s.weights)
    for mode in ('fp32','bf16') if s.is_gpu else ('fp32',):
        lib.set_seed(0)
        learn = lib.pyramid_learner(
            dls, arch, pretrained=False, weights=weights, neck=False, dynamic=True, path=s.folder)
        if mode=='bf16': learn.to_bf16()
        reset_peak(s)
        with learn.no_bar(), learn.no_logging(): learn.fit_paper(1, cbs=stop_after(2))
        check_finite(learn)
        assert len(learn.recorder.losses)==2
        peaks[mode] = dict(losses=losses_of(learn), peak_mb=peak_mb(s))
        images = learn.dls.valid.items.iloc[:8]
        lengths = learn.embed(learn.dls.test_dl(images)).norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(len(images)), atol=1e-3, rtol=0)
        s.note(peaks=peaks)
    def text(mode, about): return f'{mode}: ' + (f"peak {about['peak_mb']} MB" if s.is_gpu else 'finite')
    return dict(text=', '.join(text(*o) for o in peaks.items()))

# ---- ranking

def embeddings(s, n_query=None):
    "Random embeddings of as many queries and gallery images as Market-1501 has, ids and cameras"
    import torch
    sizes = (60,300,40,64) if s.reduced else (n_query or 3368, 19732 if not n_query else 8000, 750, 2688)
    (queries,gallery,ids,width),g = sizes,torch.Generator().manual_seed(0)
    centres,noise = torch.randn(ids, width, generator=g),1.5 if s.reduced else 3.7 # mAP is far from 0 and from 1
    def of(n):
        pids = torch.arange(n)%ids
        return centres[pids]+noise*torch.randn(n, width, generator=g),pids,torch.randint(0, 6, (n,), generator=g)
    (q,q_pids,q_cams),(x,pids,cams) = of(queries),of(gallery)
    pids[::5] = 0     # distractors, which no query shows
    q_pids[q_pids==0] = 1
    pids[1::7] = -1   # junk
    return q,x,q_pids,pids,q_cams,cams

def timed(s, call):
    "Result and seconds of a call, with all work on the device done"
    synchronise(s)
    start = time.perf_counter()
    res = call()
    synchronise(s)
    return res,time.perf_counter()-start

def ranks_differ(got, want):
    "Is any rank of the first match, average precision or mINP of two cards not exactly equal?"
    import torch
    pairs = [(getattr(got, name), getattr(want, name)) for name in ('ap','inp','first_rank','cmc')]
    return not all(torch.equal(a.nan_to_num(-1.), b.nan_to_num(-1.)) for a,b in pairs)

TOLERANCE = 1e-4 # In mAP, between embeddings multiplied on the GPU and on the CPU

def ranking(s):
    "The same ranks as the CPU's for the same distances, and its mAP within 1e-4 for the same embeddings"
    import torch

    from pyramidreid.all import evaluate, evaluate_distances
    from pyramidreid.evaluation.distances import Distances
    exact_products()
    q,g,*ids = embeddings(s)
    on_device = q.to(s.device),g.to(s.device)
    dist = torch.cat([Distances(*on_device)[i].cpu() for i in torch.arange(len(q)).split(512)])
    reset_peak(s)
    want = evaluate_distances(dist, *ids, progress_bar=False)
    got = evaluate_distances(dist.to(s.device), *ids, progress_bar=False)
    assert not ranks_differ(got, want), 'the same distances are ranked in another way than on the CPU'
    evaluate(*on_device, *ids, progress_bar=False)
    card,seconds = timed(s, partial(evaluate, *on_device, *ids, progress_bar=False))
    s.note(seconds=seconds, mAP=card.mAP, peak_mb=peak_mb(s))
    on_cpu,cpu_seconds = timed(s, partial(evaluate, q, g, *ids, device='cpu', progress_bar=False))
    off = abs(card.mAP-on_cpu.mAP)
    assert off<TOLERANCE, f'mAP {card.mAP} of the embeddings, {on_cpu.mAP} on the CPU'
    text = (f'{len(q):,} × {len(g):,}: the same ranks; {seconds:.3f} s, the CPU {cpu_seconds:.2f} s; '
            f'mAP of embeddings differs by {off:.0e}')
    return dict(text=text, cpu_seconds=cpu_seconds, difference=off)

def reranking(s):
    "Market-1501's size on the device; a part of it against the CPU, all distances within 1e-4 but for a few"
    from pyramidreid.all import evaluate_distances, rerank
    exact_products()
    q,g,*ids = embeddings(s)
    on_device = q.to(s.device),g.to(s.device)
    reset_peak(s)
    def whole(): return evaluate_distances(rerank(*on_device), *ids, progress_bar=False)
    card,seconds = timed(s, whole)
    s.note(seconds=seconds, mAP=card.mAP, peak_mb=peak_mb(s))
    q,g,*ids = embeddings(s, n_query=800)
    got = rerank(q.to(s.device), g.to(s.device)).dense().cpu()
    want,cpu_seconds = timed(s, lambda: rerank(q, g).dense())
    far = ((got-want).abs()>TOLERANCE).double().mean().item()
    got_card,want_card = (evaluate_distances(o, *ids, progress_bar=False) for o in (got,want))
    off = abs(got_card.mAP-want_card.mAP)
    text = (f'{seconds:.2f} s; {len(q):,} × {len(g):,}: the CPU {cpu_seconds:.1f} s, {1-far:.4%} of distances within '
            f'{TOLERANCE:.0e}, mAP differs by {off:.0e}')
    s.note(text=text, cpu_seconds=cpu_seconds, far=far, difference=off)
    # Two neighbours at almost equal distances may change places, and with them the sets of both
    assert far<1e-3 and off<1e-3, text
    return {}

# ---- speed

def head(s):
    "Head and losses against a loop, in each precision"
    import head as bench
    import step as steps
    sizes = dict(device=s.device, **(dict(batch=16, channels=64) if s.reduced else {}))
    rows = []
    for precision in precisions(s):
        steps.set_precision(precision)
        amp = precision=='bf16'
        _,seconds,_ = bench.compare(amp, 1e-3 if precision=='fp32' else .02, **sizes)
        row = dict(precision=precision, **{f'{kind}, ms': f'{1e3*value:.2f}' for kind,value in seconds.items()},
                   ratio=f"{seconds['plain']/seconds['fused']:.1f}")
        if s.device=='cuda':
            for kind in seconds: row[f'{kind}, MB'] = f'{bench.peak_mb(kind, amp, **sizes):.0f}'
        rows.append(row)
        s.note(rows=rows)
    return dict(text=', '.join(f"{row['precision']}: {row['ratio']} times" for row in rows))

def precisions(s): return dict(cuda=('fp32','tf32','bf16'), fakegpu=('fp32','bf16'), cpu=('fp32',))[s.device]

def step_args(s):
    "Arguments of benchmarks/step.py"
    import torchvision

    from pyramidreid.all import resnet10
    if s.reduced: return SimpleNamespace(arch=resnet10, size=(96,48), batch=16, k=4, ids=12, steps=2, warmup=1)
    return SimpleNamespace(arch=torchvision.models.resnet50, size=(384,128), batch=64, k=8, ids=751, steps=20, warmup=5)

def step_cases(s):
    "Kind, precision and memory format of each measurement"
    for precision in reversed(precisions(s)):
        yield 'pyramidreid',precision,'channels last'
        yield 'pyramidreid',precision,'contiguous'
        if s.reduced: continue
        yield 'backbone alone',precision,'channels last'
        yield 'plain',precision,'channels last'

def step(s):
    "Median milliseconds of each piece of a training step"
    import step as steps
    args,rows = step_args(s),[]
    for kind,precision,memory_format in step_cases(s):
        laps = steps.measure(kind, args, s.device, precision, memory_format)
        peak = laps.pop('peak_mb', None)
        row = dict(head=kind, precision=precision, images=memory_format)
        row |= {f'{name}, ms': f'{1e3*value:.2f}' for name,value in laps.items()}
        row['images/s'] = f"{args.batch/laps['step']:,.0f}"
        rows.append(row | ({} if peak is None else {'peak, MB': f'{peak:.0f}'}))
        s.note(rows=rows)
    first = rows[0]
    return dict(text=f"{first['precision']}, {first['images']}: {first['step, ms']} ms, {first['images/s']} images/s")

def one_step(pieces, amp, x, y):
    "A training step, nothing waited for"
    import torch
    body,head_,loss,opt = pieces
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp): value = loss(*head_(body(x)), y)
    value.backward()
    opt.step()
    opt.zero_grad(set_to_none=True)

def rate(s, batches, n, batch_size, train=None):
    "Images per second over `n` batches, each given to `train`"
    import torch
    def go():
        for _ in range(n):
            x,y = next(batches)
            if train: train(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)[:,0])
    return n*batch_size/timed(s, go)[1]

def loader_cases(s):
    "Number of workers, and whether images are cached"
    workers = (0,2) if s.reduced else (0,4,8,16)
    return [(n,cached) for cached in (False,True) for n in workers]

def training_loader(s, workers, cache, args):
    "The training loader with the paper's transforms, normalised on the device, and its cache"
    import torch

    import pyramidreid.all as lib
    path = s.data or people(s, n_train=12 if s.reduced else 64, n_test=4, size=(128,64))
    df = lib.market_table(path)
    few = df.pid[df.split=='query'].unique()[:20] # validation is not timed
    df = df[(df.split=='train') | df.pid.isin(few)]
    dls = lib.ReIDDataLoaders.from_table(
        df, size=args.size, p=args.batch//args.k, k=args.k, num_workers=workers, cache=cache,
        device=torch.device(s.device))
    dls.add_tfms([lib.Normalize.from_stats(*lib.imagenet_stats)], 'after_batch')
    return dls.train,dls.train_ds.cache if cache else None

def forever(dl):
    while True: yield from dl

def loader(s):
    "The loader alone, the step on one batch in memory, and the step fed by the loader: the rest is idle time"
    import step as steps
    import torch
    args,amp,n = step_args(s),s.is_gpu,3 if s.reduced else 40
    args.ids = 751 if s.data else 64
    *pieces,x,_ = steps.prepare('pyramidreid', args, s.device)
    labels = torch.arange(args.batch, device=s.device)//args.k
    train = partial(one_step, pieces, amp)
    same = iter(lambda: (x, labels[:,None]), None)
    rate(s, same, 3, args.batch, train)
    need = rate(s, same, n, args.batch, train)
    s.note(need=need, rows=[])
    memory = True # All cached loaders have the cache of the first
    for workers,cached in loader_cases(s):
        dl,found = training_loader(s, workers, memory if cached else None, args)
        memory,batches = found or memory,forever(dl)
        rate(s, batches, 2, args.batch)
        n_batches = n if workers or cached else max(2, n//4)
        alone = rate(s, batches, n_batches, args.batch)
        rate(s, batches, 1, args.batch, train)
        fed = rate(s, batches, n_batches, args.batch, train)
        dl.close_workers()
        row = {'workers': workers, 'cache': 'memory' if cached else '', 'loader, images/s': f'{alone:,.0f}',
               'step needs': f'{need:,.0f}', 'fed step, images/s': f'{fed:,.0f}',
               'GPU idle': f'{max(0, 1-fed/need):.0%}'}
        s.note(rows=[*s.result['rows'], row])
    best = max(s.result['rows'], key=lambda row: float(row['fed step, images/s'].replace(',', '')))
    where = f"{best['workers']} workers" + (', cached' if best['cache'] else '')
    return dict(text=f"step needs {need:,.0f} images/s; best with {where}: {best['fed step, images/s']}, "
                     f"idle {best['GPU idle']}")

def market_words(s):
    "Arguments of benchmarks/market1501.py"
    path = s.data or people(s, n_train=12, n_test=4)
    words = ['--data', path.parent, '--set', path.name, '--recipe', 'modern', '--cache', 'memory',
             '--checkpoints', s.folder/'market-checkpoints', '--out', s.folder/'market1501-modern']
    if s.weights: words += ['--weights', s.weights]
    if s.reduced: words += ['--arch', 'resnet10', '--from-scratch', '--size', 96, 48, '--epochs', 2]
    # The start, an epoch more and the evaluation come on top
    return list(map(str, [*words, '--minutes', max(.6, s.seconds_left()-(5 if s.reduced else 45))/60]))

def market(s):
    "Market-1501, or synthetic people in the reduced form"
    import market1501
    if not (s.data or s.reduced): raise Skip('needs --data')
    name = s.folder/'market1501-modern'
    try: market1501.main(market_words(s))
    except SystemExit as e:
        if not str(e).startswith('Stopped'): raise RuntimeError(f'market1501.py ended: {e}') from e
        note = json.loads(name.with_name(f'{name.name}-unfinished.json').read_text())
        text = f"{note['epochs']} of {note['of']} epochs, {note['seconds'][-1]/60:.1f} minutes of training"
        raise Unfinished(text, note) from e
    note = json.loads(name.with_name(f'{name.name}.json').read_text())
    card = note['card']
    text = f"mAP {card['mAP']:.3f}, rank-1 {card['cmc'][0]:.3f}, {note['minutes_training']} minutes of training"
    return dict(note, text=text)

PARTS = dict(fp16=partial(train_mixed, 'fp16'), bf16=partial(train_mixed, 'bf16'), channels_last=channels_last,
             compile=compiled, paper=paper, ranking=ranking, reranking=reranking, head=head, step=step, loader=loader,
             market=market)

# ---- the process

def run(name, s):
    "Run a part and write how it ended"
    s.begin(name)
    kind,_,case = name.partition(':')
    try:
        s.result.update(run_case(case, s) if kind=='case' else PARTS[name](s))
        s.write('passed', about=about())
    except Skip as e: s.write('skipped', error=str(e))
    except Unfinished as e:
        s.result.update(e.args[1], text=e.args[0])
        s.write('unfinished', about=about())
    except Exception as e:
        traceback.print_exc()
        s.write('failed', error=in_a_line(e), about=about())

def in_a_line(error):
    "Type and last line of an error; of an assertion that says nothing, the assertion"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines: return f'{type(error).__name__}: {lines[-1]}'[:500]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{type(error).__name__}: {frame.line} ({Path(frame.filename).name}:{frame.lineno})'[:500]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('parts', nargs='+')
    add('--device', default='cuda')
    add('--reduced', action='store_true')
    add('--folder', type=Path, required=True)
    add('--seconds', type=float, default=480, help='until the end of the whole run')
    add('--data', type=Path)
    add('--weights', type=Path)
    args = parser.parse_args()
    s = Setting(args)
    prepare(args.device)
    for name in args.parts: run(name, s)

if __name__=='__main__': main()
