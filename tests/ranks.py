"What `test_distributed.py` runs in each of two processes, and in its own to compare with"
import os
from functools import partial
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, rank_distrib
from fastai.vision.all import Resize, ResizeMethod, model_meta, resnet18, set_seed
from torch import nn
from torchvision.models.resnet import BasicBlock
from toys import quiet

from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.distributed import distrib_ctx
from pyramidreid.training.learner import pyramid_learner
from pyramidreid.training.recipes import *

SIZE = (48,24)

def tiny(weights=None):
    "A ResNet of four blocks and few channels"
    def block(i, o, stride):
        return nn.Sequential(BasicBlock(i, o, stride, None if i==o else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))))
    return nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                         block(8,8,1), block(8,16,2), block(16,32,2), block(32,64,2), nn.AdaptiveAvgPool2d(1), nn.Linear(64,1))
model_meta[tiny] = model_meta[resnet18]

class _Sum(torch.autograd.Function):
    "The sum over all ranks, and of the gradients likewise"
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x
    @staticmethod
    def backward(ctx, grad): return _Sum.forward(ctx, grad)

def norm_over_ranks(bn, x):
    "What batch norm `bn` does in training, with mean and variance over all ranks' images: torch's own does it on GPUs only"
    if not bn.training: return type(bn).forward(bn, x)
    dims,shape = [0,*range(2, x.ndim)],[1,-1]+[1]*(x.ndim-2)
    n = x.numel()//x.shape[1]*num_distrib()
    mean = _Sum.apply(x.sum(dims))/n
    var = _Sum.apply((x-mean.view(shape)).square().sum(dims))/n
    with torch.no_grad():
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(var*n/(n-1), bn.momentum)
        bn.num_batches_tracked += 1
    return (x-mean.view(shape))/(var.view(shape)+bn.eps).sqrt()*bn.weight.view(shape) + bn.bias.view(shape)

def stand_in(model):
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.forward = partial(norm_over_ranks, m)

class Labels(Callback):
    "Labels of every training batch"
    run_valid = False
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append(self.yb[0][:,0].tolist())

class Double(Callback):
    "Double precision: the choice of the hardest images makes differences of rounding grow tenfold in a step, and from 1e-16 that takes long"
    def before_fit(self): self.learn.model.double()
    def before_batch(self): self.learn.xb = (self.xb[0].double(),)

def a_learner(people, path, p, bs, plain=False, **kwargs):
    "A small learner; `plain`: without anything random but the choice of images"
    set_seed(0)
    tfms = dict(item_tfms=[Resize(SIZE, method=ResizeMethod.Squish)], batch_tfms=[]) if plain else {}
    dls = ReIDDataLoaders.from_market(people, p=p, k=4, bs=bs, size=SIZE, num_workers=0, device=torch.device('cpu'), **tfms)
    learn = pyramid_learner(dls, tiny, pretrained=False, n_parts=3, emb_sz=8, drop=0. if plain else .2, path=path, **kwargs)
    return quiet(learn)

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}

def same_curve(people, path, together):
    "Train with 4 people × 4 images in a batch, in all"
    ranks = max(num_distrib(), 1)
    learn = a_learner(people, path, 4//ranks, 12//ranks, plain=True, opt_func=partial(SGD, mom=.9))
    if together: stand_in(learn.model)
    labels = Labels()
    set_seed(5+rank_distrib()) # as a user may have it: each rank with dice of its own
    learn.dls.train.rng.seed(5 if not rank_distrib() else 99)
    with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(3, .02, cbs=[labels,Double()])
    return dict(steps=learn.dynamic_loss_weights.steps, labels=labels.seen, weights=state(learn), losses=[o.item() for o in learn.recorder.losses],
                rows=[list(o) for o in learn.recorder.values], names=list(learn.recorder.metric_names)[1:-1])

def batch_norm():
    "The stand-in against torch's batch norm on the whole batch: outputs, running statistics, gradients"
    torch.manual_seed(0)
    res = []
    for kind,shape in ((nn.BatchNorm2d,(8,3,4,2)), (nn.BatchNorm1d,(8,3))):
        whole,ours = kind(3).double(),kind(3).double()
        x,target = torch.randn(shape).double()*3+1,torch.randn(shape).double()
        mine = lambda o: o.chunk(num_distrib())[rank_distrib()].clone()
        a,b = x.clone().requires_grad_(),mine(x).requires_grad_()
        out_a,out_b = whole(a),norm_over_ranks(ours, b)
        (out_a*target).sum().backward()
        (out_b*mine(target)).sum().backward()
        for p in ours.parameters(): torch.distributed.all_reduce(p.grad)
        pairs = [(mine(out_a),out_b), (mine(a.grad),b.grad), *zip((p.grad for p in whole.parameters()), (p.grad for p in ours.parameters())), *zip(whole.buffers(), ours.buffers())]
        res += [(o-w).abs().max().item() for o,w in pairs]
    return max(res)

def evaluations(people, path):
    "Embeddings and cards by all ranks together, and by each rank alone"
    learn,together = a_learner(people, path, 2, 7),dict(cpu=True, sync_bn=False)
    with learn.distrib_ctx(**together): learn.fit(2, 3e-3)
    items = learn.dls.valid.items
    def figures(dl):
        card = learn.evaluate(dl)
        return card.mAP,card.rank1,card.mINP,card.cmc.tolist(),str(card)
    def all_of(n):
        dl = learn.dls.test_dl(items.iloc[-n:], with_labels=True, bs=7)
        return learn.embed(dl),figures(dl) if n>60 else None
    res = dict(alone={n:all_of(n) for n in (78,77,76,14,13,2,1)}, preds_alone=learn.embed(), last=list(learn.recorder.values[-1])[4:])
    with learn.distrib_ctx(**together):
        res.update(together={n:all_of(n) for n in res['alone']}, validated=list(learn.validate())[3:], one=learn.predict(items.fn.iloc[0]), preds=learn.get_preds())
    return res

class Stop(Callback):
    def before_epoch(self):
        if self.epoch==2: raise KeyboardInterrupt

def recipes(people, path):
    "Both recipes, checkpoints, saving and loading"
    res,ctx = {},dict(cpu=True, sync_bn=False)
    learn = a_learner(people, path, 2, 7)
    with learn.distrib_ctx(over_ranks=False, **ctx): learn.fit_paper(1, .01, .01)
    res['paper'] = state(learn)
    for name in ('first','second'):
        learn = a_learner(people, path, 2, 7)
        cbs = [Checkpoints(resume=True), SaveModelCallback(monitor='mAP', fname='best')] + ([Stop()] if name=='first' else [])
        try:
            with learn.distrib_ctx(**ctx): learn.fit_modern(4, 1e-3, 1e-3, frozen_epochs=1, ema=.9, cbs=cbs)
        except KeyboardInterrupt: pass
        res[name] = state(learn)
        res[f'{name} is plain'] = type(learn.model).__name__=='PyramidNet' and learn.dls.train.share==(0,1) and learn.loss_func.gather is None
    res['steps'] = learn.dynamic_loss_weights.steps
    with learn.distrib_ctx(**ctx):
        learn.save('saved')
        res['loaded'] = state(a_learner(people, path, 2, 7).load('saved'))
        try: learn.lr_find()
        except ValueError as e: res['lr_find'] = str(e)
        learn.dls.train.p = 9
        try: learn.fit(1)
        except ValueError as e: res['too many'] = str(e)
    return res

def main(rank, ranks, port, out, people):
    "One rank; leaves what it found in `out`"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    res = dict(curve=same_curve(people, out, True), norm=batch_norm(), evaluations=evaluations(people, out), recipes=recipes(people, out))
    torch.save(res, out/f'rank{rank}.pt')
    torch.distributed.destroy_process_group()
