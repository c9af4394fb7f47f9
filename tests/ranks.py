"What `test_distributed.py` runs in each of two processes, and in its own to compare with"
import multiprocessing
import os
import signal
import threading
from functools import partial

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import SaveModelCallback
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, rank_distrib
from fastai.vision.all import PILImage, Resize, ResizeMethod, Transform, model_meta, resnet18, set_seed
from torch import nn
from torchvision.models.resnet import BasicBlock
from toys import quiet

from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.training import distributed  # It adds distrib_ctx to learners
from pyramidreid.training.checkpoints import Checkpoints, FiniteLoss
from pyramidreid.training.dynamic_losses import DynamicLossWeights
from pyramidreid.training.learner import pyramid_learner
from pyramidreid.training.recipes import *

SIZE = (48,24)
N_IMAGES = (78,77,76,14,13,2,1) # Numbers of images to evaluate, by loaders of seven to a batch

def block(n_in, n_out, stride):
    "One block of a ResNet"
    shortcut = None
    if n_in!=n_out: shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
    return nn.Sequential(BasicBlock(n_in, n_out, stride, shortcut))

def tiny(weights=None):
    "A ResNet of four blocks and few channels"
    stem = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [block(8,8,1), block(8,16,2), block(16,32,2), block(32,64,2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Linear(64,1))
model_meta[tiny] = model_meta[resnet18]

class _Sum(torch.autograd.Function):
    "The sum over all ranks, of values and of gradients"
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x
    @staticmethod
    def backward(ctx, grad): return _Sum.forward(ctx, grad)

def norm_over_ranks(bn, x):
    "What batch norm `bn` does in training, but over all ranks' images, which torch's own does on GPUs only"
    if not bn.training: return type(bn).forward(bn, x)
    dims,shape = [0,*range(2, x.ndim)],[1,-1]+[1]*(x.ndim-2)
    n = x.numel()//x.shape[1]*num_distrib()
    mean = _Sum.apply(x.sum(dims))/n
    var = _Sum.apply((x-mean.view(shape)).square().sum(dims))/n
    with torch.no_grad():
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(var*n/(n-1), bn.momentum)
        bn.num_batches_tracked += 1
    mean,var,weight = (o.view(shape) for o in (mean, var, bn.weight))
    res = (x-mean)/(var+bn.eps).sqrt()*weight
    return res if bn.bias is None else res+bn.bias.view(shape) # A BNNeck has no shift

def stand_in(model):
    "Let all batch norms of `model` work over all ranks"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.forward = partial(norm_over_ranks, m)

class Labels(Callback):
    "Labels of every training batch"
    run_valid = False
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append(self.yb[0][:,0].tolist())

class Double(Callback):
    "Double precision: the choice of the hardest images lets rounding errors grow tenfold in a step, slowly from 1e-16"
    def before_fit(self): self.learn.model.double()
    def before_batch(self): self.learn.xb = (self.xb[0].double(),)

def small_learner(people, path, p, bs, plain=False, **kwargs):
    "A small learner; `plain`: nothing is random but the choice of images"
    set_seed(0)
    tfms = dict(item_tfms=[Resize(SIZE, method=ResizeMethod.Squish)], batch_tfms=[]) if plain else {}
    cpu = torch.device('cpu')
    dls = ReIDDataLoaders.from_market(people, p=p, k=4, val_bs=bs, size=SIZE, num_workers=0, device=cpu, **tfms)
    drop = 0. if plain else .2
    learn = pyramid_learner(dls, tiny, pretrained=False, n_parts=3, emb_sz=8, drop=drop, path=path, **kwargs)
    return quiet(learn)

def state(learn): return {name:v.clone() for name,v in learn.model.state_dict().items()}

def same_curve(people, path, together):
    "Train with 4 people × 4 images in a batch, over all ranks"
    ranks = max(num_distrib(), 1)
    learn = small_learner(people, path, 4//ranks, 12//ranks, plain=True, opt_func=partial(SGD, mom=.9))
    if together: stand_in(learn.model)
    labels = Labels()
    set_seed(5+rank_distrib()) # As a user may do: other random numbers on each rank
    learn.dls.train.rng.seed(99 if rank_distrib() else 5)
    with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(3, .02, cbs=[labels,Double()])
    rec = learn.recorder
    return dict(steps=learn.dynamic_loss_weights.steps, labels=labels.seen, weights=state(learn),
                losses=[loss.item() for loss in rec.losses], rows=[list(row) for row in rec.values],
                names=list(rec.metric_names)[1:-1])

def own_rows(x): return x.chunk(num_distrib())[rank_distrib()].clone()

def norm_error(kind, shape):
    "Largest difference between the stand-in and torch's batch norm on the whole batch: outputs, statistics, gradients"
    whole,ours = kind(3).double(),kind(3).double()
    x,target = torch.randn(shape).double()*3+1,torch.randn(shape).double()
    x_whole,x_own = x.clone().requires_grad_(),own_rows(x).requires_grad_()
    out_whole,out_own = whole(x_whole),norm_over_ranks(ours, x_own)
    (out_whole*target).sum().backward()
    (out_own*own_rows(target)).sum().backward()
    for p in ours.parameters(): torch.distributed.all_reduce(p.grad)
    pairs = [(own_rows(out_whole),out_own), (own_rows(x_whole.grad),x_own.grad)]
    pairs += [(a.grad,b.grad) for a,b in zip(whole.parameters(), ours.parameters())]
    pairs += zip(whole.buffers(), ours.buffers())
    return max((a-b).abs().max().item() for a,b in pairs)

def batch_norm():
    torch.manual_seed(0)
    return max(norm_error(nn.BatchNorm2d, (8,3,4,2)), norm_error(nn.BatchNorm1d, (8,3)))

def results(learn, dl):
    card = learn.evaluate(dl)
    return card.mAP,card.rank1,card.mINP,card.cmc.tolist(),str(card)

def evaluate_last(learn, n):
    "Embeddings of the last `n` images, and their card if there are queries among them"
    dl = learn.dls.test_dl(learn.dls.valid.items.iloc[-n:], with_labels=True, bs=7)
    return learn.embed(dl),results(learn, dl) if n>60 else None

def evaluations(people, path):
    "Embeddings and cards by all ranks together, and by each rank alone"
    learn,together = small_learner(people, path, 2, 7),dict(cpu=True, sync_bn=False)
    with learn.distrib_ctx(**together): learn.fit(2, 3e-3)
    res = dict(alone={n:evaluate_last(learn, n) for n in N_IMAGES}, preds_alone=learn.embed(),
               last=list(learn.recorder.values[-1])[4:])
    with learn.distrib_ctx(**together):
        res['together'] = {n:evaluate_last(learn, n) for n in N_IMAGES}
        res['validated'] = list(learn.validate())[3:]
        res['one'] = learn.predict(learn.dls.valid.items.fn.iloc[0])
        res['preds'] = learn.get_preds()
    return res

class Stop(Callback):
    def before_epoch(self):
        if self.epoch==2: raise KeyboardInterrupt

TOGETHER = dict(cpu=True, sync_bn=False)

def is_plain(learn):
    "Is the learner as it is in one process?"
    return type(learn.model).__name__=='PyramidNet' and learn.dls.train.share==(0,1) and learn.loss_func.gather is None

def fit_modern(people, path, stop):
    "A run with checkpoints, which is stopped, or resumed"
    learn = small_learner(people, path, 2, 7)
    cbs = [Checkpoints(resume=True), SaveModelCallback(monitor='mAP', fname='best')] + ([Stop()] if stop else [])
    try:
        with learn.distrib_ctx(**TOGETHER): learn.fit_modern(4, 1e-3, 1e-3, frozen_epochs=1, ema=.9, cbs=cbs)
    except KeyboardInterrupt: pass
    return learn

def message(f):
    "Message of the `ValueError` that `f` raises"
    try: f()
    except ValueError as e: return str(e)
    return 'no error'

def recipes(people, path):
    "Both recipes, checkpoints, saving and loading"
    learn = small_learner(people, path, 2, 7)
    with learn.distrib_ctx(over_ranks=False, **TOGETHER): learn.fit_paper(1, .01, .01)
    res = dict(paper=state(learn))
    for name in ('first','second'):
        learn = fit_modern(people, path, stop=name=='first')
        res[name],res[f'{name} is plain'] = state(learn),is_plain(learn)
    res['steps'] = learn.dynamic_loss_weights.steps
    with learn.distrib_ctx(**TOGETHER):
        learn.save('saved')
        res['loaded'] = state(small_learner(people, path, 2, 7).load('saved'))
        res['lr_find'] = message(learn.lr_find)
        learn.dls.train.p = 9
        res['too many'] = message(lambda: learn.fit(1))
    return res

class BadOnOneRank(Callback):
    "The second rank's loss is not finite at the second step"
    order,run_valid = -8,False
    def after_loss(self):
        if rank_distrib()==1 and self.train_iter==1: self.learn.loss = self.loss*float('nan')

def one_bad(people, path):
    "A loss that is not finite on one rank ends the fit on both; the next fit within the context trains"
    learn = small_learner(people, path, 2, 7)
    with learn.distrib_ctx(**TOGETHER):
        try: learn.fit(1, cbs=[FiniteLoss(), BadOnOneRank()])
        except FloatingPointError as e: res = dict(error=str(e), plain=is_plain(learn))
        learn.dynamic_loss_weights.steps.clear()
        learn.fit(1)
    return res | dict(weights=state(learn), steps=str(learn.dynamic_loss_weights.steps))

WEIGHTINGS = ('gate','normalized','paper','released',False) # False: without dynamic training

def weightings(people, path):
    "Each weighting, some of whose steps give a loss the weight 0"
    res = {}
    for weighting in WEIGHTINGS:
        dynamic = weighting and DynamicLossWeights(weighting=weighting, delta=0.)
        learn = small_learner(people, path, 2, 7, dynamic=dynamic)
        with learn.distrib_ctx(**TOGETHER): learn.fit(3, 3e-2)
        res[weighting] = dict(weights=state(learn), steps=learn.dynamic_loss_weights.steps if dynamic else [],
                              losses=[loss.item() for loss in learn.recorder.losses])
    return res

class StopBoth(Callback):
    order = 95
    def after_epoch(self):
        if self.epoch==1: raise RuntimeError('stopped')

def error_of(f):
    "Message of what `f` raises; None if nothing"
    try: f()
    except Exception as e: return str(e)

def run_with_checkpoints(people, path, stop=False, delta=.16, **kwargs):
    "A run of three epochs, or what ended it"
    learn = small_learner(people, path, 2, 7, dynamic=DynamicLossWeights(delta=delta))
    cb = Checkpoints(**kwargs)
    with learn.distrib_ctx(**TOGETHER):
        res = dict(error=error_of(lambda: learn.fit_one_cycle(3, 3e-3, cbs=[cb, *[StopBoth()]*stop])))
    return res | dict(weights=state(learn), done=getattr(cb, 'done', None), is_plain=is_plain(learn), n_fits=cb.n_fits)

def files(people, path):
    "`load` and `SaveModelCallback` where the first rank alone sees what is saved, and the other can make no folder"
    own,rank = path/f'files{rank_distrib()}',rank_distrib()
    own.mkdir()
    (own/'models').write_text('') if rank else (own/'models').mkdir()
    learn = small_learner(people, own, 2, 7)
    best = SaveModelCallback(monitor='mAP', fname='best', with_opt=True)
    with learn.distrib_ctx(**TOGETHER):
        learn.fit(2, 3e-3, cbs=best)
        res = dict(fitted=state(learn), history=learn.model.history)
        path = learn.save('saved')
        again = small_learner(people, own, 2, 7).load('saved')
        res |= dict(loaded=state(again), opt=again.opt is not None, loaded_history=again.model.history)
        res['no file'] = error_of(lambda: learn.load('nothing'))
        other = small_learner(people, own, 2, 7, dynamic=False)
        if rank: other.model.head.classify = nn.Identity() # Its weights do not fit
        res['does not fit'] = error_of(lambda: other.load('saved'))
    return res | dict(path=path.relative_to(own).as_posix())

def resumed(people, path):
    "Runs whose ranks have folders of their own, so that the first rank alone finds checkpoints"
    own,rank = path/f'own{rank_distrib()}',rank_distrib()
    own.mkdir()
    res = dict(whole=run_with_checkpoints(people, own/'whole'), stopped=run_with_checkpoints(people, own, stop=True))
    res['not asked'] = run_with_checkpoints(people, own)
    res['other settings'] = run_with_checkpoints(people, own, resume=True, delta=.16+.5*rank)
    res['resumed'] = run_with_checkpoints(people, own, resume=True)
    blocked = path/f'blocked{rank}'
    if not rank: blocked.write_text('a file where the folder should be')
    res['not written'] = run_with_checkpoints(people, own, folder=blocked)
    return res

class EndsOn(Callback):
    "Something happens on one rank, at a step of the second epoch"
    order = -20
    def __init__(self, rank, happens, event='after_pred', training=True):
        self.rank,self.happens,self.event,self.in_training = rank,happens,event,training
        self.has_happened = False
    def __call__(self, event):
        is_now = event==self.event and self.epoch==1 and self.training==self.in_training
        if not is_now or self.has_happened or rank_distrib()!=self.rank: return
        self.has_happened = True
        self.happens()

def fails(error):
    def happens(): raise error
    return happens

def interrupt_soon():
    "A real signal, at some time within the next steps"
    threading.Timer(.05, os.kill, [os.getpid(), signal.SIGINT]).start()

def interrupt_twice():
    "Ctrl-C, and again while the ranks agree on what to do"
    threading.Timer(.4, os.kill, [os.getpid(), signal.SIGINT]).start()
    raise KeyboardInterrupt

class BadWorker(Transform):
    "Fails in a worker of one rank after some images"
    def __init__(self): self.n = 0
    def encodes(self, o:PILImage):
        self.n += 1
        if rank_distrib()==1 and self.n>30: raise OSError('a worker cannot read')
        return o

def ended(people, folder, cbs=(), num_workers=0, resume=False, use=None):
    "How a fit of three epochs ended, and what the learner is like after it"
    learn = small_learner(people, folder, 2, 7, plain=True)
    if num_workers:
        learn.dls.train.fake_l.num_workers = num_workers
        learn.dls.train.after_item.add(BadWorker())
    res = dict(error=None)
    try:
        with learn.distrib_ctx(**TOGETHER):
            learn.fit_one_cycle(3, 3e-3, cbs=[Checkpoints(folder/f'checkpoints{num_workers}', resume=resume), *cbs])
            if use: use(learn)
    except BaseException as e: res['error'] = f'{type(e).__name__}: {e}'
    return res | dict(weights=state(learn), is_plain=is_plain(learn), has_group=torch.distributed.is_initialized(),
                      rows=list(getattr(learn.recorder, 'values', ())), steps=learn.dynamic_loss_weights.steps,
                      checkpoints=[file.name for file in sorted(folder.glob('checkpoints0/*.pth'))])

def embeds_on_one_rank(learn):
    "One rank fails between two evaluations"
    learn.embed()
    if rank_distrib()==1: raise ValueError('after the fit')
    learn.evaluate()

def saves_nowhere(learn):
    "The first rank alone writes, and cannot"
    learn.model_dir = 'checkpoints0/1-0003.pth'
    learn.save('weights')
    learn.embed()

ENDS = dict(interrupt=[EndsOn(1, fails(KeyboardInterrupt()))],
            signal=[EndsOn(1, interrupt_soon)],
            twice=[EndsOn(1, interrupt_twice)],
            memory=[EndsOn(0, fails(MemoryError('no memory')))],
            validation=[EndsOn(1, fails(IndexError('in validation')), training=False)],
            cancel=[EndsOn(0, fails(CancelFitException()), event='before_batch')],
            both=[EndsOn(0, fails(ValueError('of both'))), EndsOn(1, fails(ValueError('of both')))])

def all_ends(people, out):
    "Each end in turn, each followed by a run in the same processes that resumes; the last one kills a process"
    distributed.GRACE = distributed.CANCEL_GRACE = 1.
    res = dict(whole=ended(people, out/'whole'))
    for name,cbs in ENDS.items():
        res[name] = ended(people, out/name, cbs)
        if name!='both': res[f'{name} resumed'] = ended(people, out/name, resume=True)
    res['worker'] = ended(people, out/'whole', num_workers=1)
    for use in (embeds_on_one_rank,saves_nowhere): res[use.__name__] = ended(people, out/use.__name__, use=use)
    return res

def ends_main(rank, ranks, port, out, people):
    start(rank, ranks, port)
    res = all_ends(people, out)
    torch.save(res, out/f'rank{rank}.pt')
    res['killed'] = ended(people, out/'killed', [EndsOn(1, lambda: os.kill(os.getpid(), signal.SIGKILL))])
    torch.save(res, out/f'rank{rank}.pt')

def start(rank, ranks, port):
    if 'fork' in multiprocessing.get_all_start_methods(): # Workers then inherit the connections
        multiprocessing.set_start_method('fork', force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)

def main(rank, ranks, port, out, people):
    "Run one rank, and save what it found in `out`"
    start(rank, ranks, port)
    res = dict(curve=same_curve(people, out, together=True), norm=batch_norm(),
               evaluations=evaluations(people, out), recipes=recipes(people, out), one_bad=one_bad(people, out),
               weightings=weightings(people, out), resumed=resumed(people, out), files=files(people, out))
    torch.save(res, out/f'rank{rank}.pt')
    torch.distributed.destroy_process_group()
