"A data set and a network small enough to follow by hand"
import random
from functools import partial

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from PIL import Image
from torch import nn

from pyramidreid.data.sampler import PKDataLoader
from pyramidreid.models.losses import PyramidLoss


class Toy:
    "Items that are their own index, and a table of labels"
    def __init__(self, labels): self.items = pd.DataFrame(dict(label=list(labels)))
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return torch.tensor(i),torch.tensor(int(self.items.label.iloc[i]))

class Vectors:
    "`n` vectors around 8 centres"
    def __init__(self, n, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n)%8
        self.x = torch.randn(8,6,generator=g)[self.y] + torch.randn(n,6,generator=g)
        self.items = pd.DataFrame(dict(label=self.y.numpy()))
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i],self.y[i]

class Branches(nn.Module):
    "Two branches of four numbers, and logits"
    def __init__(self):
        super().__init__()
        self.body,self.fc = nn.Linear(6,2*4),nn.Linear(4,8)
    def forward(self, x):
        feats = self.body(x).view(len(x),2,4)
        return (feats,self.fc(feats)) if self.training else feats.flatten(1)

class Spy(Callback):
    "What every training batch held, what it was trained with, and the gradients it left"
    order,run_valid = 100,False
    def __init__(self): self.seen = []
    def before_batch(self):
        state = {name: tensor.clone() for name,tensor in self.model.state_dict().items()}
        self.now = dict(x=self.xb[0].clone(), y=self.yb[0].clone(), state=state)
    def after_backward(self):
        self.now['grads'] = {k:p.grad.clone() for k,p in self.model.named_parameters()}
        self.seen.append(self.now)

class Third(PyramidLoss):
    "A loss of three parts"
    part_names = ('id','triplet','norm')
    def forward(self, pred, target):
        loss = super().forward(pred, target)
        if isinstance(pred, torch.Tensor): return loss
        name = self.part_names[2]
        self.parts[name] = pred[0].square().mean()
        return loss + self.parts[name]

def toy_learner(cbs=None, num_workers=0, train=None, seed=1, loss_func=None, lr=0.1, **kwargs):
    "A learner of two branches on `Vectors`; the same seed gives the same weights and batches"
    torch.manual_seed(seed)
    random.seed(seed)
    if train is None: train = PKDataLoader(Vectors(64), p=4, k=2, shuffle=True, num_workers=num_workers)
    dls = DataLoaders(train, PKDataLoader(Vectors(16), num_workers=0))
    if loss_func is None: loss_func = PyramidLoss()
    learn = Learner(dls, Branches(), loss_func, opt_func=partial(SGD, mom=0.), lr=lr, cbs=cbs, **kwargs)
    return quiet(learn)

def quiet(learn):
    "No progress bar and no table"
    learn.logger = lambda *args: None
    return learn.remove_cbs(ProgressCallback)

THERMAL_RANGE = (7600, 8000)

def thermal_copy(people, folder):
    "A folder of people as a thermal camera counts them: 14 bits in PNG files of 16, white at 65,535"
    for file in sorted(people.rglob('*.jpg')):
        low,high = THERMAL_RANGE
        counts = low + (high-low)*np.asarray(Image.open(file).convert('L'), float)/255
        copy = folder/file.relative_to(people).with_suffix('.png')
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(counts.round().astype(np.uint16)).save(copy)
    return folder

def scaled_to_rgb(file, low, high):
    "A picture of 16 bits as RGB, scaled plainly"
    levels = (np.asarray(Image.open(file), float)-low)/(high-low)*255
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)).convert('RGB')

def random_exclusions(by, dist, query_pids, gallery_pids):
    "Images left out at random, (Q, G) bool, and the arguments that leave them out by 'mask', 'inf', 'images' or 'keys'"
    rng = np.random.default_rng(0)
    query_keys,gallery_keys = rng.integers(0, 3, len(dist)),rng.integers(0, 3, dist.shape[1])
    same_key = query_keys[:,None]==gallery_keys
    left_out = dict(mask=rng.random(dist.shape)<.3, inf=rng.random(dist.shape)<.3, images=same_key,
                    keys=same_key & (query_pids[:,None]==gallery_pids))[by]
    options = dict(mask=dict(mask=left_out), inf={}, images=dict(query_images=query_keys, gallery_images=gallery_keys),
                   keys=dict(query_keys=query_keys, gallery_keys=gallery_keys))[by]
    return left_out,options
