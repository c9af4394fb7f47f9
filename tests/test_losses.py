"Batch-hard triplet loss against a loop over anchors, the ID loss by hand, and what must not become NaN"
import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pyramidreid.models.losses import *


def plain_sum(feats, labels, margin):
    "The reference, branch by branch"
    return sum(plain_triplet_loss(feats[:,b], labels, margin) for b in range(feats.shape[1]))

def value_and_grad(f, feats, *args):
    x = feats.clone().requires_grad_()
    loss = f(x, *args)
    loss.backward()
    return loss.detach(),x.grad

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_triplet_equals_plain(data):
    "Random labels, also with people of one image, with one person alone, and with every margin"
    n,b,e = data.draw(st.integers(1,9)),data.draw(st.integers(1,3)),data.draw(st.integers(1,5))
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, data.draw(st.integers(0,5))), min_size=n, max_size=n)))
    margin = data.draw(st.sampled_from([None,0.,.3,1.4,2.5]))
    torch.manual_seed(data.draw(st.integers(0,10**6)))
    feats = torch.randn(n,b,e)
    if e==1: feats[:] = feats.abs()+.1 # in one dimension a normalised feature is ±1, all ties: here all +1
    (l1,g1),(l2,g2) = (value_and_grad(f, feats, labels, margin) for f in (plain_sum,triplet_loss))
    torch.testing.assert_close(l2, l1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(g2, g1, atol=1e-5, rtol=1e-4)

def test_triplet_by_hand():
    "Unit vectors at right angles: distances 0, √2 and 2"
    east,north,west = [1.,0],[0,1.],[-1.,0]
    feats = torch.tensor([east,north,west,west]).unsqueeze(1)*5 # of any length
    labels = torch.tensor([7,7,9,9])
    r2 = 2**.5
    # anchor 0: positive √2, negatives 2; 1: positive √2, negatives √2; 2 and 3: positive 0, negative √2 (north)
    gaps = [r2-2, 0., -r2, -r2]
    want = lambda f: pytest.approx(sum(map(f, gaps))/4, abs=2e-6)
    assert triplet_loss(feats, labels, 1.4).item()==want(lambda g: max(0, g+1.4))
    assert triplet_loss(feats, labels, None).item()==want(lambda g: math.log1p(math.exp(g)))
    # the last one alone in its class: left out of the mean
    assert triplet_loss(feats, torch.tensor([7,7,9,8]), 1.4).item()==pytest.approx((max(0,r2-2+1.4)+1.4)/2, abs=2e-6)

@pytest.mark.parametrize('labels', [[0,1,2,3], [5,5,5,5], [3]])
@pytest.mark.parametrize('margin', [None,1.4])
def test_no_anchor_gives_zero_with_a_gradient(labels, margin):
    feats = torch.randn(len(labels), 2, 3, requires_grad=True)
    for f in (triplet_loss,plain_sum):
        feats.grad = None
        loss = f(feats, torch.tensor(labels), margin)
        loss.backward()
        assert loss==0 and feats.grad is not None and not feats.grad.any()

@pytest.mark.parametrize('margin', [None,1.4])
def test_duplicates_and_zero_features_stay_finite(margin):
    "The same image twice, everyone alike, a dead branch: no square root at 0, no division by 0"
    torch.manual_seed(0)
    row = torch.randn(1,2,4)
    cases = [row.expand(6,2,4), torch.zeros(6,2,4), torch.cat([row,row,torch.randn(4,2,4)]), torch.cat([row,-row]*3), 1e-20*torch.randn(6,2,4)]
    for feats in cases:
        loss,grad = value_and_grad(triplet_loss, feats.contiguous(), torch.tensor([0,0,1,1,2,2]), margin)
        assert loss.isfinite() and grad.isfinite().all()
    assert value_and_grad(triplet_loss, torch.zeros(6,2,4), torch.tensor([0,0,1,1,2,2]), 1.4)[0].item()==pytest.approx(2*1.4)

def test_hardest_is_the_farthest_of_ones_own_and_the_nearest_of_the_others():
    torch.manual_seed(0)
    unit,labels = F.normalize(torch.randn(3,10,4), dim=-1),torch.tensor([0,0,0,1,1,1,2,2,2,3])
    pos,neg,valid = hardest_pairs(unit, labels)
    dist = torch.cdist(unit, unit)
    for b in range(3):
        for i in range(9):
            own = [j for j in range(10) if labels[j]==labels[i] and j!=i]
            others = [j for j in range(10) if labels[j]!=labels[i]]
            assert pos[b,i]==max(own, key=lambda j: dist[b,i,j]) and neg[b,i]==min(others, key=lambda j: dist[b,i,j])
    assert valid.tolist()==[True]*9+[False]

def test_branches_are_judged_apart_and_summed():
    torch.manual_seed(0)
    feats,labels = torch.randn(8,5,4),torch.arange(8)//2
    torch.testing.assert_close(triplet_loss(feats, labels), sum(triplet_loss(feats[:,[b]], labels) for b in range(5)))

@pytest.mark.parametrize('margin', [None,1.4])
def test_bf16_autocast_on_the_cpu_keeps_distances_in_float32(margin):
    torch.manual_seed(0)
    feats,labels = torch.randn(96,3,16),torch.arange(96)//8 # many near ties for 8 bits
    want = triplet_loss(feats, labels, margin)
    with torch.autocast('cpu', torch.bfloat16):
        assert (feats[:,0]@feats[:,0].T).dtype==torch.bfloat16 # autocast is on
        got = triplet_loss(feats, labels, margin)
        x = feats.bfloat16().requires_grad_()
        low = triplet_loss(x, labels, margin)
    low.backward()
    assert got.dtype==low.dtype==torch.float32 and torch.equal(got, want)
    torch.testing.assert_close(low, triplet_loss(feats.bfloat16().float(), labels, margin))
    assert x.grad.dtype==torch.bfloat16 and x.grad.isfinite().all()

@pytest.mark.parametrize('smoothing', [0.,.1,.5])
def test_id_loss_by_hand(smoothing):
    "-Σ q ln softmax over identities, mean over images, sum over branches"
    torch.manual_seed(0)
    logits,labels = torch.randn(5,3,4,dtype=torch.double),torch.tensor([0,3,1,1,2])
    q = torch.full((5,4), smoothing/4, dtype=torch.double)
    q[torch.arange(5),labels] += 1-smoothing
    want = sum(-(q*(logits[:,b]-logits[:,b].exp().sum(-1, keepdim=True).log())).sum(-1).mean() for b in range(3))
    torch.testing.assert_close(id_loss(logits, labels, smoothing).double(), want, atol=1e-5, rtol=1e-5)
    g1 = value_and_grad(lambda x: sum(F.cross_entropy(x[:,b], labels, label_smoothing=smoothing) for b in range(3)), logits.float())[1]
    torch.testing.assert_close(value_and_grad(id_loss, logits.float(), labels, smoothing)[1], g1)

def test_id_loss_of_half_precision_logits_is_float32():
    logits = (torch.randn(4,2,3)*30).half()
    loss = id_loss(logits, torch.tensor([0,1,2,0]))
    assert loss.dtype==torch.float32 and loss.isfinite()

def test_pyramid_loss_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    feats,logits = torch.randn(8,3,4),torch.randn(8,3,5)
    target = torch.stack([torch.arange(8)//2, torch.zeros(8, dtype=torch.long), torch.zeros(8, dtype=torch.long)], 1)
    for kw in ({}, dict(margin=None), dict(margin=.3, label_smoothing=.1)):
        f = PyramidLoss(**kw)
        assert f.parts=={}
        loss = f((feats,logits), target)
        assert list(f.parts)==['id','triplet']
        torch.testing.assert_close(f.parts['id'], id_loss(logits, target[:,0], kw.get('label_smoothing', 0.)))
        torch.testing.assert_close(f.parts['triplet'], triplet_loss(feats, target[:,0], kw.get('margin', 1.4)))
        torch.testing.assert_close(loss, f.parts['id']+f.parts['triplet'])
        assert torch.equal(loss, f((feats,logits), target[:,0]))

def test_pyramid_loss_on_unseen_people():
    "Validation: an embedding, and labels the classifiers have never seen; no ID loss"
    emb,labels = F.normalize(torch.randn(6,12), dim=-1),torch.tensor([700,700,-1,701,701,5000])
    f = PyramidLoss()
    loss = f(emb, labels)
    assert list(f.parts)==['triplet']
    torch.testing.assert_close(loss, plain_triplet_loss(emb, labels))

def test_pyramid_loss_pickles_and_copies_without_its_graph():
    f = PyramidLoss(margin=.7, label_smoothing=.1)
    f((torch.randn(4,2,3, requires_grad=True),torch.randn(4,2,5, requires_grad=True)), torch.tensor([0,0,1,1]))
    assert f.parts['id'].grad_fn is not None
    buf = io.BytesIO()
    torch.save(f, buf)
    for g in (pickle.loads(pickle.dumps(f)), copy.deepcopy(f), torch.load(io.BytesIO(buf.getvalue()), weights_only=False)):
        assert (g.margin,g.label_smoothing,g.parts)==(.7,.1,{})
        g((torch.randn(4,2,3),torch.randn(4,2,5)), torch.tensor([0,0,1,1]))
    assert f.parts
