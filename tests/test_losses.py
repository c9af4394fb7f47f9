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
    return sum(plain_triplet_loss(feats[:,branch], labels, margin) for branch in range(feats.shape[1]))

def value_and_grad(loss_func, feats, *args):
    x = feats.clone().requires_grad_()
    loss = loss_func(x, *args)
    loss.backward()
    return loss.detach(),x.grad

# Triplet loss

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_triplet_equals_plain(data):
    "Random labels, also with people of one image, with one person alone, and with every margin"
    n,n_branches,n_dims = data.draw(st.integers(1,9)),data.draw(st.integers(1,3)),data.draw(st.integers(1,5))
    largest = data.draw(st.integers(0,5))
    labels = torch.tensor(data.draw(st.lists(st.integers(-1,largest), min_size=n, max_size=n)))
    margin = data.draw(st.sampled_from([None,0.,.3,1.4,2.5]))
    torch.manual_seed(data.draw(st.integers(0,10**6)))
    feats = torch.randn(n, n_branches, n_dims)
    if n_dims==1: feats = feats.abs()+.1 # in one dimension a normalised feature is ±1, all ties: here all +1
    want,want_grad = value_and_grad(plain_sum, feats, labels, margin)
    loss,grad = value_and_grad(triplet_loss, feats, labels, margin)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, want_grad, atol=1e-5, rtol=1e-4)

east,north,west = [1.,0],[0,1.],[-1.,0]
compass = torch.tensor([east,north,west,west]).unsqueeze(1)*5 # of any length
root2 = 2**.5

def test_triplet_by_hand():
    "Vectors at right angles: distances 0, √2 and 2"
    labels = torch.tensor([7,7,9,9])
    # anchor 0: positive √2, negatives 2; anchor 1: both √2; anchors 2 and 3: positive 0, hardest negative √2 (north)
    gaps = [root2-2, 0., -root2, -root2]
    with_margin = sum(max(0, gap+1.4) for gap in gaps)/4
    soft = sum(math.log1p(math.exp(gap)) for gap in gaps)/4
    assert triplet_loss(compass, labels, 1.4).item()==pytest.approx(with_margin, abs=2e-6)
    assert triplet_loss(compass, labels, None).item()==pytest.approx(soft, abs=2e-6)

def test_an_anchor_without_a_positive_is_left_out_of_the_mean():
    loss = triplet_loss(compass, torch.tensor([7,7,9,8]), 1.4)
    assert loss.item()==pytest.approx((max(0,root2-2+1.4)+1.4)/2, abs=2e-6)

@pytest.mark.parametrize('labels', [[0,1,2,3], [5,5,5,5], [3]])
@pytest.mark.parametrize('margin', [None,1.4])
@pytest.mark.parametrize('loss_func', [triplet_loss,plain_sum])
def test_no_valid_anchor_gives_zero_with_a_gradient(labels, margin, loss_func):
    loss,grad = value_and_grad(loss_func, torch.randn(len(labels), 2, 3), torch.tensor(labels), margin)
    assert loss==0 and grad is not None and not grad.any()

@pytest.mark.parametrize('margin', [None,1.4])
def test_duplicates_and_zero_features_stay_finite(margin):
    "The same image twice, everyone identical, a dead branch: no square root at 0, no division by 0"
    torch.manual_seed(0)
    row,others = torch.randn(1,2,4),torch.randn(4,2,4)
    identical,dead,tiny = row.repeat(6,1,1),torch.zeros(6,2,4),1e-20*torch.randn(6,2,4)
    labels = torch.tensor([0,0,1,1,2,2])
    for feats in (identical, dead, torch.cat([row,row,others]), torch.cat([row,-row]*3), tiny):
        loss,grad = value_and_grad(triplet_loss, feats, labels, margin)
        assert loss.isfinite() and grad.isfinite().all()

def test_zero_features_of_two_branches_give_twice_the_margin():
    loss = triplet_loss(torch.zeros(6,2,4), torch.tensor([0,0,1,1,2,2]), 1.4)
    assert loss.item()==pytest.approx(2*1.4)

def test_hardest_pairs_are_the_farthest_of_the_same_person_and_the_nearest_of_the_others():
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(3,10,4), dim=-1)
    labels = torch.tensor([0,0,0,1,1,1,2,2,2,3])
    pos,neg,valid = hardest_pairs(unit, labels)
    dist = torch.cdist(unit, unit)
    for branch in range(3):
        for i in range(9):
            same = [j for j in range(10) if labels[j]==labels[i] and j!=i]
            others = [j for j in range(10) if labels[j]!=labels[i]]
            row = dist[branch,i].tolist()
            assert pos[branch,i]==max(same, key=row.__getitem__)
            assert neg[branch,i]==min(others, key=row.__getitem__)
    assert valid.tolist()==[True]*9+[False]

def test_branches_are_separate_and_summed():
    torch.manual_seed(0)
    feats,labels = torch.randn(8,5,4),torch.arange(8)//2
    by_branch = [triplet_loss(feats[:,[branch]], labels) for branch in range(5)]
    torch.testing.assert_close(triplet_loss(feats, labels), sum(by_branch))

@pytest.mark.parametrize('margin', [None,1.4])
def test_bf16_autocast_keeps_distances_in_float32(margin):
    torch.manual_seed(0)
    feats,labels = torch.randn(96,3,16),torch.arange(96)//8 # many near ties in 8 bits
    want = triplet_loss(feats, labels, margin)
    with torch.autocast('cpu', torch.bfloat16):
        assert (feats[:,0]@feats[:,0].T).dtype==torch.bfloat16 # autocast is on
        loss = triplet_loss(feats, labels, margin)
    assert loss.dtype==torch.float32 and torch.equal(loss, want)

@pytest.mark.parametrize('margin', [None,1.4])
def test_bf16_features_get_bf16_gradients(margin):
    torch.manual_seed(0)
    feats,labels = torch.randn(96,3,16).bfloat16(),torch.arange(96)//8
    with torch.autocast('cpu', torch.bfloat16): loss,grad = value_and_grad(triplet_loss, feats, labels, margin)
    assert loss.dtype==torch.float32
    torch.testing.assert_close(loss, triplet_loss(feats.float(), labels, margin))
    assert grad.dtype==torch.bfloat16 and grad.isfinite().all()

# ID loss

@pytest.mark.parametrize('smoothing', [0.,.1,.5])
def test_id_loss_by_hand(smoothing):
    "-Σ q log softmax over identities, mean over images, sum over branches"
    torch.manual_seed(0)
    logits,labels = torch.randn(5,3,4,dtype=torch.double),torch.tensor([0,3,1,1,2])
    q = torch.full((5,4), smoothing/4, dtype=torch.double)
    q[torch.arange(5),labels] += 1-smoothing
    log_softmax = logits - logits.exp().sum(-1, keepdim=True).log()
    want = -(q[:,None]*log_softmax).sum(-1).mean(0).sum()
    torch.testing.assert_close(id_loss(logits, labels, smoothing).double(), want, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('smoothing', [0.,.1,.5])
def test_gradient_of_the_id_loss(smoothing):
    torch.manual_seed(0)
    logits,labels = torch.randn(5,3,4),torch.tensor([0,3,1,1,2])
    def by_branch(x): return sum(F.cross_entropy(x[:,branch], labels, label_smoothing=smoothing) for branch in range(3))
    _,want = value_and_grad(by_branch, logits)
    _,grad = value_and_grad(id_loss, logits, labels, smoothing)
    torch.testing.assert_close(grad, want)

def test_id_loss_of_half_precision_logits_is_float32():
    logits = (torch.randn(4,2,3)*30).half()
    loss = id_loss(logits, torch.tensor([0,1,2,0]))
    assert loss.dtype==torch.float32 and loss.isfinite()

# Both

@pytest.mark.parametrize('margin,smoothing', [(1.4,0.), (None,0.), (.3,.1)])
def test_pyramid_loss_is_the_sum_of_its_parts(margin, smoothing):
    torch.manual_seed(0)
    feats,logits,labels = torch.randn(8,3,4),torch.randn(8,3,5),torch.arange(8)//2
    target = torch.stack([labels, torch.zeros_like(labels), torch.zeros_like(labels)], 1)
    loss_func = PyramidLoss(margin, smoothing)
    assert loss_func.parts=={}
    loss = loss_func((feats,logits), target)
    assert list(loss_func.parts)==['id','triplet']
    torch.testing.assert_close(loss_func.parts['id'], id_loss(logits, labels, smoothing))
    torch.testing.assert_close(loss_func.parts['triplet'], triplet_loss(feats, labels, margin))
    torch.testing.assert_close(loss, loss_func.parts['id']+loss_func.parts['triplet'])
    assert torch.equal(loss, loss_func((feats,logits), labels))

def test_pyramid_loss_has_the_paper_s_margin_by_default():
    loss_func = PyramidLoss()
    assert (loss_func.margin,loss_func.label_smoothing)==(1.4,0.)

def test_pyramid_loss_on_unseen_people():
    "Validation: an embedding, and labels that the classifiers have never seen; no ID loss"
    emb,labels = F.normalize(torch.randn(6,12), dim=-1),torch.tensor([700,700,-1,701,701,5000])
    loss_func = PyramidLoss()
    loss = loss_func(emb, labels)
    assert list(loss_func.parts)==['triplet']
    torch.testing.assert_close(loss, plain_triplet_loss(emb, labels))

def saved_and_loaded(o):
    buffer = io.BytesIO()
    torch.save(o, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)

def pickled(o): return pickle.loads(pickle.dumps(o))

@pytest.mark.parametrize('duplicate', [pickled, copy.deepcopy, saved_and_loaded])
def test_pyramid_loss_is_copied_without_its_graph(duplicate):
    loss_func = PyramidLoss(margin=.7, label_smoothing=.1)
    labels = torch.tensor([0,0,1,1])
    loss_func((torch.randn(4,2,3, requires_grad=True),torch.randn(4,2,5, requires_grad=True)), labels)
    assert loss_func.parts['id'].grad_fn is not None
    other = duplicate(loss_func)
    assert (other.margin,other.label_smoothing,other.parts)==(.7,.1,{})
    other((torch.randn(4,2,3),torch.randn(4,2,5)), labels)
    assert loss_func.parts['id'].grad_fn is not None
