"The metrics in fastai's training loop against a direct evaluation of the same embeddings"
import math
import pickle

import pytest
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from torch import nn
from torch.utils.data import TensorDataset

from pyramidreid.core import Role
from pyramidreid.evaluation.retrieval import evaluate
from pyramidreid.training import metrics
from pyramidreid.training.metrics import mAP, rank1, rank5


class Embed(nn.Module):
    "Returns a pair in training and the embedding in evaluation, as the pyramid does"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6,4)
    def forward(self, x): return (self.lin(x),x) if self.training else self.lin(x)

def mean_square_loss(pred, targ): return (pred[0] if isinstance(pred, tuple) else pred).square().mean()

class Points(TensorDataset):
    def new_empty(self): return Points(*[t[:0] for t in self.tensors])

def point_learner(n=60, bs=16, cams=True, junk=False, metrics=(mAP,rank1,rank5), **kwargs):
    "A learner on points of six people, the first third of them queries; and the points with their targets"
    torch.manual_seed(0)
    label = torch.arange(n)%6
    cam = torch.randint(3, (n,)) if cams else torch.full((n,), -1)
    role = torch.where(torch.arange(n)<n//3, Role.QUERY, Role.GALLERY)
    if junk: label[-5:] = -1
    x,y = torch.randn(6,6)[label]+.8*torch.randn(n,6),torch.stack([label,cam,role], 1)
    dls = DataLoaders(DataLoader(Points(x,y), bs=bs, shuffle=True), DataLoader(Points(x,y), bs=bs))
    return Learner(dls, Embed(), loss_func=mean_square_loss, metrics=list(metrics), **kwargs),x,y

def direct_evaluation(learn, x, y):
    learn.model.eval()
    with torch.no_grad(): emb = learn.model(x)
    q,g = y[:,2]==Role.QUERY,y[:,2]==Role.GALLERY
    cams = (y[q,1],y[g,1]) if (y[:,1]>=0).any() else ()
    return evaluate(emb[q], emb[g], y[q,0], y[g,0], *cams)

def mAP_and_ranks(card): return [card.mAP,card.rank1,card.rank5]

@pytest.mark.parametrize('bs', [16,60,64])
@pytest.mark.parametrize('cams,junk', [(True,False),(False,True)])
def test_metrics(bs, cams, junk, monkeypatch):
    runs = []
    monkeypatch.setattr(metrics, 'evaluate', lambda *args,**kwargs: runs.append(kwargs) or evaluate(*args,**kwargs))
    learn,x,y = point_learner(bs=bs, cams=cams, junk=junk)
    with learn.no_logging():
        for i in range(3):
            assert list(learn.validate()[1:])==mAP_and_ranks(direct_evaluation(learn, x, y))
            assert len(runs)==i+1
            learn.model.lin.weight.data.copy_(torch.randn(4,6))
        learn.fit(2)
    assert len(runs)==5
    assert list(learn.recorder.values[-1][2:])==mAP_and_ranks(direct_evaluation(learn, x, y))
    cosine_pass = metrics._passes[learn]['cosine']
    assert not cosine_pass.emb and cosine_pass.last is None

def test_save_model(tmp_path):
    learn,x,y = point_learner(path=tmp_path)
    with learn.no_logging(): learn.fit(3, .1, cbs=SaveModelCallback(monitor='mAP', fname='best'))
    best = max(values[2] for values in learn.recorder.values)
    assert direct_evaluation(learn.load('best'), x, y).mAP==pytest.approx(best)

def test_partial_validation():
    learn,x,y = point_learner()
    nobody_twice = y.clone()
    nobody_twice[:,0] = torch.arange(len(y))
    with learn.no_logging():
        learn.fit(1, cbs=ShortEpochCallback(pct=.1))
        no_gallery = learn.validate(dl=DataLoader(TensorDataset(x[:10],y[:10]), bs=4))
        assert all(map(math.isnan, no_gallery[1:])) and len(no_gallery)==4
        assert math.isnan(learn.validate(dl=DataLoader(TensorDataset(x,nobody_twice), bs=4))[1])
        assert learn.validate()[1]==direct_evaluation(learn, x, y).mAP
    assert math.isnan(mAP().value)

def test_diverged_model():
    learn,_,_ = point_learner()
    learn.model.lin.weight.data.fill_(torch.nan)
    with learn.no_logging(), pytest.warns(UserWarning, match='NaN'): assert math.isnan(learn.validate()[1])

def test_two_distances_and_train_metrics():
    learn,x,y = point_learner(metrics=[mAP, mAP('euclidean')])
    with learn.no_logging():
        _,cosine,euclidean = learn.validate()
        assert cosine==direct_evaluation(learn, x, y).mAP and cosine!=euclidean
        learn.recorder.train_metrics = True
        learn.fit(1)
        assert math.isnan(learn.recorder.values[-1][1])

def test_export(tmp_path):
    learn,_,_ = point_learner(path=tmp_path)
    with learn.no_logging(): learn.fit(1)
    learn.export('a.pkl')
    back = load_learner(tmp_path/'a.pkl')
    assert [m.name for m in back.metrics]==['mAP','rank1','rank5']
    assert b'targ' not in pickle.dumps(learn.metrics[0])
    assert set(learn.metrics[0].__getstate__())=={'distance'}
