"The rule of dynamic training against a second implementation, and a callback that does what the rule says"
import json
import math
import pickle
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback import fp16, schedule  # noqa: F401, for to_fp16 and lr_find
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Branches, Spy, Third, Vectors, quiet, toy_learner

from pyramidreid.models.losses import PyramidLoss
from pyramidreid.training import dynamic_losses
from pyramidreid.training.base_learner import ReIDLearner
from pyramidreid.training.checkpoints import FiniteLoss
from pyramidreid.training.dynamic_losses import *
from pyramidreid.training.progress import LossParts

weightings = ['gate','normalized','paper']

# The rule

class PlainLoss:
    "Running mean k and progress FL of one loss, written out"
    def __init__(self, alpha, gamma): self.alpha,self.gamma,self.k,self.fl = alpha,gamma,None,0.

    def observe(self, loss):
        before = self.k
        self.k = loss if before is None else self.alpha*loss + (1-self.alpha)*before
        p = min(self.k, before)/before if before else 1.
        self.fl = -(1-p)**self.gamma*math.log(p)

def plain_weights(fl_id, fl_triplet, weighting):
    "Weights where both losses are trained"
    total = fl_id+fl_triplet
    if weighting=='paper': return fl_id,fl_triplet
    if weighting=='normalized' and total: return 2*fl_id/total,2*fl_triplet/total
    return 1.,1.

def plain_rule(losses, weighting, alpha=.25, gamma=2., delta=.16):
    "The rule for (id, triplet) losses of each batch. Yields (mode of the batch, w_id, w_triplet, next mode)"
    id_,triplet,mode = PlainLoss(alpha, gamma),PlainLoss(alpha, gamma),'random'
    for id_loss,triplet_loss in losses:
        drawn = mode
        id_.observe(id_loss)
        if drawn=='pk': triplet.observe(triplet_loss)
        gated_off = triplet.fl < delta*id_.fl
        mode = 'random' if gated_off else 'pk'
        both = drawn=='pk' and not gated_off # The triplet loss of a random batch means nothing
        w_id,w_triplet = plain_weights(id_.fl, triplet.fl, weighting) if both else (1.,0.)
        yield drawn,w_id,w_triplet,mode

def released_rule(losses, alpha=.25, gamma=2., delta=.16):
    "What the authors' program computes, in IEEE arithmetic. Yields (w_id, w_triplet)"
    f = np.float64
    def smooth(loss, k): return f(alpha)*f(loss) + f(1-alpha)*k
    def progress(p): return -(1-p)**f(gamma)*np.log(p)
    with np.errstate(all='ignore'):
        ks,first = [f(0),f(0)],True
        for pair in losses:
            last,ks = ks,[smooth(loss, k) for loss,k in zip(pair, ks)]
            ps = [f(.5)]*2 if first else [np.minimum(new, old)/old for new,old in zip(ks, last)]
            fl_id,fl_triplet = map(progress, ps)
            yield (1.,0.) if fl_triplet/fl_id < delta else (1.,1.)
            first = False

def sequence(seed, n=400, kind=0):
    "Noisy (id, triplet) losses that fall (0), walk at random (1), or fall in steps without noise (2)"
    rng = np.random.default_rng(seed)
    falling = np.exp(-np.arange(n)/100)
    walking = np.exp(rng.normal(size=n).cumsum()*.1)
    steps = np.exp(-(np.arange(n)//50)*1.)
    trend,noise = [falling,walking,steps][kind],0 if kind==2 else .2
    losses = [trend*scale*np.exp(noise*rng.normal(size=n)) for scale,trend in ((7,trend), (30,np.roll(trend,n//3)))]
    return list(zip(*(o.tolist() for o in losses)))

def run(rule, losses): return [(rule.mode,*rule.step(dict(id=i, triplet=t))) for i,t in losses]

def modes(steps): return [(step[0],step[-1]) for step in steps]

ARGUMENTS = [{}, dict(alpha=.5), dict(gamma=1., delta=.5), dict(alpha=.9, delta=0.)]

@pytest.mark.parametrize('weighting', weightings)
@pytest.mark.parametrize('kind', range(3))
@pytest.mark.parametrize('seed,kwargs', enumerate(ARGUMENTS))
def test_rule_equals_the_plain_one_on_long_sequences(weighting, kind, seed, kwargs):
    losses = sequence(seed, kind=kind)
    got = run(LossDynamics(weighting=weighting, **kwargs), losses)
    want = list(plain_rule(losses, weighting, **kwargs))
    assert modes(got)==modes(want)
    got_weights,want_weights = [list(weights.values()) for _,weights,_ in got],[step[1:3] for step in want]
    np.testing.assert_allclose(got_weights, want_weights, rtol=1e-12, atol=0)
    if kind<2 and not kwargs: # All that the rule can decide is decided
        decisions = {(mode,weights['triplet']>0) for mode,weights,_ in got}
        assert decisions=={('random',False),('pk',False),('pk',True)}

LOSSES = st.sampled_from([0.,0.,1e-30,.5,1.,1.,2.,7.,1e6])

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(LOSSES, LOSSES), max_size=40), st.sampled_from(weightings))
def test_rule_on_ties_plateaus_and_zeros(losses, weighting):
    got = run(LossDynamics(weighting=weighting), losses)
    want = list(plain_rule(losses, weighting))
    assert modes(got)==modes(want)
    got_weights,want_weights = [list(weights.values()) for _,weights,_ in got],[step[1:3] for step in want]
    np.testing.assert_allclose(got_weights, want_weights, rtol=1e-9, atol=0)

def test_rule_by_hand():
    "First batch random, first triplet loss, both trained, gated off; a random batch leaves the triplet's state alone"
    rule = LossDynamics(alpha=.5)
    assert rule.mode=='random'
    assert rule.step(dict(id=8.))==(dict(id=1.,triplet=0.),'pk') # Nothing has fallen: 0 < 0 is false
    assert rule.step(dict(id=10.,triplet=4.))==(dict(id=1.,triplet=1.),'pk') # The ID loss rises
    assert rule.k==dict(id=9.,triplet=4.)
    assert rule.step(dict(id=1.,triplet=4.))==(dict(id=1.,triplet=0.),'random') # Only the ID loss falls
    state = rule.k['triplet'],rule.p['triplet'],rule.fl['triplet']
    assert rule.step(dict(id=1.,triplet=1e9))==(dict(id=1.,triplet=0.),'random') # A triplet loss that means nothing
    assert (rule.k['triplet'],rule.p['triplet'],rule.fl['triplet'])==state
    assert rule.step(dict(id=50.))==(dict(id=1.,triplet=0.),'pk') # It rises, so P×K is next, but this batch was random

@pytest.mark.parametrize('weighting', weightings)
def test_weights_by_hand(weighting):
    "The ID loss's k goes from 8 to 7, the triplet loss's from 10 to 8"
    fl_id,fl_triplet = -(1/8)**2*math.log(7/8),-.2**2*math.log(.8)
    total = fl_id+fl_triplet
    want = dict(gate=(1,1), paper=(fl_id,fl_triplet), normalized=(2*fl_id/total,2*fl_triplet/total))[weighting]
    rule = LossDynamics(weighting=weighting)
    rule.mode = 'pk'
    rule.k.update(id=8., triplet=10.)
    weights,mode = rule.step(dict(id=4., triplet=2.))
    assert tuple(weights.values())==pytest.approx(want) and mode=='pk'

@pytest.mark.parametrize('kind', range(3))
def test_released_equals_the_literal_rule(kind):
    for seed in range(4):
        losses = sequence(seed, kind=kind)
        got = run(LossDynamics(weighting='released'), losses)
        assert [tuple(w.values()) for _,w,_ in got]==list(released_rule(losses))
        assert {(m,n) for m,_,n in got}=={('pk','pk')}

def test_released_by_hand():
    "The sign trap in step 3, 0/0 in steps 2 and 4, an ordinary ratio in step 5"
    losses = [(8,8),(8,8),(9,1),(40,40),(1,1)]
    # k: (2,2) (3.5,3.5) (4.875,2.875) (13.66,12.16) (10.49,9.37); p at the end: .768, .7706, about equal
    got = [tuple(w.values()) for _,w,_ in run(LossDynamics(weighting='released'), losses)]
    assert got==list(released_rule(losses))==[(1,1),(1,1),(1,0),(1,1),(1,1)]
    got = [tuple(w.values()) for _,w,_ in run(LossDynamics(weighting='released'), [(8,8),(1,8)])]
    assert got==list(released_rule([(8,8),(1,8)]))==[(1,1),(1,0)] # Only the ID loss falls

@pytest.mark.parametrize('losses', [[(8,0),(4,0),(1,0),(1,0)], [(8,0),(1,5),(1,1)], [(0,8),(0,4),(3,1)], [(0,0),(0,0)]])
def test_released_with_a_loss_of_exactly_zero(losses):
    "0/0 is NaN in IEEE arithmetic, and NaN means that both are trained"
    assert [tuple(w.values()) for _,w,_ in run(LossDynamics(weighting='released'), losses)]==list(released_rule(losses))

@pytest.mark.parametrize('weighting', [*weightings,'released'])
@pytest.mark.parametrize('cut', [0,1,2,37])
def test_state_round_trip_in_the_middle(weighting, cut):
    losses = sequence(7, 120)
    first = LossDynamics(weighting=weighting)
    run(first, losses[:cut])
    state = first.state_dict()
    text = json.dumps(state)
    loaded = LossDynamics(weighting=weighting)
    loaded.load_state_dict(json.loads(text))
    unpickled = pickle.loads(pickle.dumps(first))
    rest = run(first, losses[cut:])
    assert json.dumps(state)==text # A snapshot, not a view
    assert run(loaded, losses[cut:])==rest
    assert run(unpickled, losses[cut:])==rest
    assert first.state_dict()==loaded.state_dict() and first.n_steps==len(losses)

@pytest.mark.parametrize('weighting', [*weightings,'released'])
def test_reset(weighting):
    losses,rule = sequence(7, 120),LossDynamics(weighting=weighting)
    first = run(rule, losses)
    rule.reset()
    assert run(rule, losses)==first

@pytest.mark.parametrize('bad', [math.nan,math.inf,-math.inf])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    rule = LossDynamics()
    with pytest.raises(ValueError, match=f'step 0.*id.*{bad}'): rule.step(dict(id=bad))
    rule.step(dict(id=1., triplet=bad)) # Not measured on a random batch
    before = rule.state_dict()
    with pytest.raises(ValueError, match=f'step 1.*triplet.*{bad}'): rule.step(dict(id=1., triplet=bad))
    assert rule.state_dict()==before

@pytest.mark.parametrize('weighting', ['Paper','sum',None])
def test_unknown_weighting(weighting):
    with pytest.raises(ValueError, match="weighting=.*'gate'.*'normalized'.*'paper'.*'released'"):
        DynamicLossWeights(weighting=weighting)

@pytest.mark.parametrize('alpha', [0.,1.,1.5])
def test_impossible_alpha(alpha):
    "Without smoothing p could be 0, which has no logarithm"
    with pytest.raises(ValueError, match=f'alpha={alpha}'): LossDynamics(alpha=alpha)

# The callback

def parts_of(seen):
    "Parts of the loss of a batch that a spy saw, computed again; and the model they belong to"
    model,loss_func = Branches(),PyramidLoss()
    model.load_state_dict(seen['state'])
    loss_func(model(seen['x']), seen['y'])
    return loss_func.parts,model

def grads_by_hand(steps, factor=1.):
    "Gradient of the sum over `steps`, (seen, w_id, w_triplet), of the weighted parts"
    total = None
    for seen,w_id,w_triplet in steps:
        parts,model = parts_of(seen)
        (factor*(w_id*parts['id'] + w_triplet*parts['triplet'])).backward()
        grads = {name:p.grad for name,p in model.named_parameters()}
        total = grads if total is None else {name:total[name]+grad for name,grad in grads.items()}
    return total

def scaled(grads, factor): return {name:grad*factor for name,grad in grads.items()}

def assert_close(a, b, atol=1e-6, rtol=1e-4):
    assert a.keys()==b.keys()
    for name in a: torch.testing.assert_close(a[name], b[name], atol=atol, rtol=rtol)

def is_pk(y): return len(set(y.tolist()))==4 and torch.equal(y[::2], y[1::2]) # Pairs, side by side

@pytest.mark.parametrize('num_workers', [0,2])
def test_decisions_are_those_of_the_rule_and_batches_follow_them(num_workers):
    "Losses computed again from what the spy saw, decisions by the plain rule, batches counted"
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(),spy], num_workers=num_workers)
    learn.fit(4)
    assert len(spy.seen)==4*8
    losses = [tuple(parts_of(seen)[0][name].item() for name in ('id','triplet')) for seen in spy.seen]
    want = pd.DataFrame(plain_rule(losses, 'gate'), columns=['mode','weight_id','weight_triplet','next'])
    history = learn.dynamic_loss_weights.history
    for column in ('mode','weight_id','weight_triplet'): assert history[column].tolist()==want[column].tolist()
    id_losses,triplet_losses = np.array(losses).T
    np.testing.assert_allclose(history.loss_id, id_losses, rtol=1e-4)
    pk = (history['mode']=='pk').to_numpy()
    np.testing.assert_allclose(history.loss_triplet[pk], triplet_losses[pk], rtol=1e-4)
    assert history.loss_triplet[~pk].isna().all()
    assert [is_pk(seen['y']) for seen in spy.seen]==pk.tolist()
    assert set(pk)=={True,False} and (history.weight_triplet>0).any()

@pytest.mark.parametrize('weighting', [*weightings,'released'])
def test_weights_reach_the_gradients(weighting):
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(weighting=weighting),spy], lr=.1)
    learn.fit(2)
    history = learn.dynamic_loss_weights.history
    assert len(history)==len(spy.seen)==16
    for seen,w_id,w_triplet in zip(spy.seen, history.weight_id, history.weight_triplet):
        scale = max(w_id, w_triplet, 1e-9) # The paper's weights are as small as 1e-6
        want = grads_by_hand([(seen,w_id/scale,w_triplet/scale)])
        assert_close(scaled(seen['grads'], 1/scale), want, atol=1e-5)
    assert weighting=='released' or (history.weight_triplet==0).any()

@pytest.mark.parametrize('weighting', [*weightings,'released'])
def test_without_its_weight_a_gradient_is_another(weighting):
    "The comparison above sees whether the triplet loss takes part"
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(weighting=weighting),spy], lr=.1)
    learn.fit(2)
    history = learn.dynamic_loss_weights.history
    i = history.weight_triplet.idxmax()
    scale = history.weight_triplet[i]
    assert scale>0
    without = grads_by_hand([(spy.seen[i],history.weight_id[i]/scale,0.)])
    with pytest.raises(AssertionError): assert_close(scaled(spy.seen[i]['grads'], 1/scale), without)

class Scripted(nn.Module):
    "A loss that takes its values from a list"
    def __init__(self, values):
        super().__init__()
        self.values,self.parts = iter(values),{}

    def forward(self, pred, *target):
        if isinstance(pred, torch.Tensor): return pred.sum()*0
        zero = pred[0].sum() + pred[1].sum()
        zero = zero - zero.detach() # A zero with a graph
        self.parts = {name:value + zero for name,value in zip(('id','triplet'), next(self.values))}
        return sum(self.parts.values())

@pytest.mark.parametrize('weighting', weightings)
def test_nothing_falls_and_nothing_crashes(weighting):
    "Both FL are 0 when the first P×K batch has a higher ID loss: with 'paper' both weights are 0, nothing is trained"
    spy,rising = Spy(),[(1.+i,1.+i) for i in range(8)]
    learn = toy_learner(cbs=[DynamicLossWeights(weighting=weighting),spy], loss_func=Scripted(rising))
    learn.fit(1)
    history,want = learn.dynamic_loss_weights.history,list(plain_rule(rising, weighting))
    assert history['mode'].tolist()==[step[0] for step in want]
    assert history.weight_triplet.tolist()==[step[2] for step in want]
    if weighting=='paper': assert not any(seen['grads']['body.weight'].any() for seen in spy.seen[1:])

class TrainLosses(Callback):
    "The learner's loss, and the plain sum of its parts"
    order,run_valid = 50,False
    def __init__(self): self.seen = []
    def after_batch(self): self.seen.append((self.loss, sum(self.loss_func.parts.values()).item()))

def test_learn_loss_is_the_weighted_sum_without_a_graph():
    cb = TrainLosses()
    learn = toy_learner(cbs=[DynamicLossWeights(),cb])
    learn.fit(2)
    history = learn.dynamic_loss_weights.history
    want = (history.loss_id + history.weight_triplet*history.loss_triplet.fillna(0)).tolist()
    assert [loss.item() for loss,_ in cb.seen]==pytest.approx(want, rel=1e-5)
    assert not any(loss.requires_grad for loss,_ in cb.seen)
    assert any(abs(loss.item()-plain_sum)>.1 for loss,plain_sum in cb.seen)

@pytest.mark.parametrize('n_acc', [8,16,32])
def test_gradient_accumulation_is_not_doubled(n_acc):
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(weighting='normalized'),GradientAccumulation(n_acc),spy])
    learn.fit(2)
    history,group = learn.dynamic_loss_weights.history,n_acc//8
    steps = list(zip(spy.seen, history.weight_id, history.weight_triplet))
    assert len(steps)==16 and (history.weight_triplet>0).any()
    for i in range(0, 16, group):
        for j in range(i+1, i+group+1): assert_close(spy.seen[j-1]['grads'], grads_by_hand(steps[i:j], 8/n_acc))
        if i+group==16: break
        before,after = (spy.seen[o]['state']['body.weight'] for o in (i,i+group)) # One update per group
        grad = spy.seen[i+group-1]['grads']['body.weight']
        torch.testing.assert_close(after, before-.1*grad, atol=1e-6, rtol=1e-4)

def test_validation_and_get_preds_are_not_counted():
    learn = toy_learner(cbs=DynamicLossWeights())
    learn.fit(1)
    cb = learn.dynamic_loss_weights
    before = cb.state_dict(),len(cb.steps),learn.dls.train.mode
    assert len(cb.steps)==8
    learn.validate()
    for kwargs in ({}, dict(ds_idx=0), dict(dl=learn.dls.train.new(shuffle=False))): learn.get_preds(**kwargs)
    assert (cb.state_dict(),len(cb.steps),learn.dls.train.mode)==before
    learn.fit(1)
    assert len(cb.steps)==16 and cb.dynamics.n_steps==16 # A second fit continues

def test_lr_find_leaves_everything_alone(tmp_path):
    learn = toy_learner(cbs=DynamicLossWeights(), path=tmp_path)
    learn.fit(1)
    cb,spy = learn.dynamic_loss_weights,Spy()
    cb.dynamics.mode = 'random'
    weights = {name:v.clone() for name,v in learn.model.state_dict().items()}
    state,n_steps = cb.state_dict(),len(cb.steps)
    learn.add_cb(spy)
    res = learn.lr_find(num_it=20, show_plot=False)
    assert 0<res.valley<10
    assert len(spy.seen)>10 and all(is_pk(seen['y']) for seen in spy.seen) # Batches for both losses
    for seen in spy.seen[:5]: assert_close(seen['grads'], grads_by_hand([(seen,1.,1.)]))
    assert cb.state_dict()==state and len(cb.steps)==n_steps
    for name,v in learn.model.state_dict().items(): assert torch.equal(v, weights[name])
    spy.seen = []
    learn.fit(1)
    assert not is_pk(spy.seen[0]['y']) and cb.steps[n_steps]['mode']=='random' # Continues where it was

@pytest.mark.parametrize('given', ['pk','random'])
def test_training_and_lr_find_leave_the_loader_in_the_mode_it_had(tmp_path, given):
    "Another learner on the same loaders must not inherit this one's last decision"
    learn = toy_learner(cbs=DynamicLossWeights(), path=tmp_path)
    learn.dls.train.mode = given
    learn.fit(1)
    assert learn.dls.train.mode==given
    learn.lr_find(num_it=6, show_plot=False)
    assert learn.dls.train.mode==given

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['to_fp16','to_bf16'])
def test_mixed_precision_callbacks(kind):
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(),spy])
    getattr(learn, kind)()
    learn.fit(2)
    history = learn.dynamic_loss_weights.history
    assert len(history)==16 and (history.weight_triplet>0).any()
    if torch.cuda.is_available(): return # There the gradients are those of half precision
    for step in zip(spy.seen, history.weight_id, history.weight_triplet):
        assert_close(step[0]['grads'], grads_by_hand([step]))

class CPUAutocast(Callback):
    "What fastai's MixedPrecision does on CUDA devices only"
    order = 10
    def before_batch(self):
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)

def test_real_autocast():
    learn = toy_learner(cbs=[DynamicLossWeights(),CPUAutocast()])
    learn.fit(2)
    history = learn.dynamic_loss_weights.history
    assert len(history)==16 and (history.weight_triplet>0).any() and learn.loss_grad.dtype==torch.float32
    assert history.loss_id.iloc[-4:].mean()<history.loss_id.iloc[:4].mean()

class Reseed(Callback):
    "The same batches in the same epoch, whatever came before"
    def before_train(self): self.dls.train.rng = random.Random(self.epoch)

def reid_learner(path, weighting, seed=1):
    "A `ReIDLearner` with the network and the data of `toy_learner`"
    toy = toy_learner(seed=seed, path=path)
    cbs = [DynamicLossWeights(weighting=weighting),Reseed()]
    return quiet(ReIDLearner(toy.dls, toy.model, PyramidLoss(), opt_func=Adam, lr=.02, cbs=cbs, path=path))

@pytest.mark.parametrize('weighting', weightings)
def test_stop_save_load_resume(tmp_path, weighting):
    whole = reid_learner(tmp_path, weighting)
    whole.fit(6)
    history = whole.dynamic_loss_weights.history
    assert len(history)==48 and history['mode'][24:].nunique()==2

    first = reid_learner(tmp_path, weighting)
    first.fit(3)
    file = first.save('half')
    second = reid_learner(tmp_path, weighting, seed=5).load('half')
    assert file.exists() and second.dynamic_loss_weights.state_dict()==first.dynamic_loss_weights.state_dict()
    second.fit(6, start_epoch=3)
    rest = second.dynamic_loss_weights.history
    columns = ['mode','loss_id','weight_id','weight_triplet','k_id','k_triplet','fl_id','fl_triplet']
    assert len(rest)==24
    assert rest[columns].equals(history[columns][24:].reset_index(drop=True))
    for a,b in zip(whole.model.parameters(), second.model.parameters()): assert torch.equal(a, b)

    other = reid_learner(tmp_path, weighting).load('half') # Without the state the first batch is random again
    other.dynamic_loss_weights.dynamics.reset()
    other.fit(6, start_epoch=3)
    assert not other.dynamic_loss_weights.history[columns].equals(rest[columns])

def test_loaders_without_a_mode():
    dls = DataLoaders(DataLoader(Vectors(64), bs=8, shuffle=True), DataLoader(Vectors(16), bs=8))
    learn = Learner(dls, Branches(), PyramidLoss(), lr=.1, cbs=DynamicLossWeights())
    quiet(learn)
    with pytest.raises(ValueError, match='no `mode`.*ReIDDataLoaders.*dynamic=False'): learn.fit(1)
    learn.remove_cbs(DynamicLossWeights)
    learn.fit(1)

def test_a_loss_that_is_not_finite_stops_the_training():
    learn = toy_learner(cbs=DynamicLossWeights(), loss_func=Scripted([(1.,1.),(1.,1.),(math.nan,1.)]*9))
    with pytest.raises(ValueError, match='not finite at step 2.*nan'): learn.fit(1)
    assert len(learn.dynamic_loss_weights.steps)==2

# Other losses

class Eager(Third):
    "The same, but it does not know `wanted`: all parts on all batches"
    def __setattr__(self, name, value):
        if name!='wanted': super().__setattr__(name, value)

@pytest.mark.parametrize('loss_func', [Third,Eager])
@pytest.mark.parametrize('weighting', weightings)
def test_a_part_that_the_rule_does_not_know_is_trained_on_every_batch(loss_func, weighting):
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(weighting=weighting),spy], loss_func=loss_func())
    learn.fit(2)
    history = learn.dynamic_loss_weights.history
    assert set(history['mode'])=={'random','pk'} and (history.loss_norm>0).all()
    for seen,w_id,w_triplet,norm in zip(spy.seen, history.weight_id, history.weight_triplet, history.loss_norm):
        parts,model = parts_of(seen)
        feats,_ = model(seen['x'])
        third = feats.square().mean()
        assert third.item()==pytest.approx(norm, rel=1e-4)
        (w_id*parts['id'] + w_triplet*parts['triplet'] + third).backward()
        assert_close(seen['grads'], {name:p.grad for name,p in model.named_parameters()}, atol=1e-5)

class Scaled(PyramidLoss):
    def forward(self, pred, target): return .5*super().forward(pred, target)

class Hidden(PyramidLoss):
    "A term that is not among the parts"
    def forward(self, pred, target): return super().forward(pred, target) + 1e-2

class Scale(Callback):
    "Scales the loss before the rule sees it"
    def after_loss(self):
        self.learn.loss_grad = self.loss_grad*2
        self.learn.loss = self.loss*2

@pytest.mark.parametrize('loss_func,cbs', [(Scaled,[]), (Hidden,[]), (PyramidLoss,[Scale])])
def test_a_loss_that_is_not_the_sum_of_its_parts_is_refused_at_the_first_batch(loss_func, cbs):
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(),spy,*cbs], loss_func=loss_func())
    message = f"{loss_func.__name__} returned .* parts 'id' sum to .*put it into `parts`.*order.*dynamic=False"
    with pytest.raises(ValueError, match=message): learn.fit(1)
    assert not spy.seen
    learn.remove_cbs(DynamicLossWeights)
    learn.fit(1)
    assert len(spy.seen)==8

def count_readings(monkeypatch):
    "A list that gets an entry whenever losses are read from the device"
    seen = []
    class Counted(dynamic_losses.LossReading):
        def __init__(self, learn):
            super().__init__(learn)
            seen.append(self)
    monkeypatch.setattr(dynamic_losses, 'LossReading', Counted)
    return seen

@pytest.mark.parametrize('dynamic', [True,False])
def test_the_losses_of_a_step_are_read_once_for_all_who_ask(monkeypatch, dynamic):
    seen = count_readings(monkeypatch)
    learn = toy_learner(cbs=[FiniteLoss()] + [DynamicLossWeights()]*dynamic)
    learn.fit(1)
    assert len(seen)==8 and len(learn.recorder.losses)==8
    want = learn.dynamic_loss_weights.history.loss_id.tolist() if dynamic else [reading.returned for reading in seen]
    assert [reading.parts['id'] if dynamic else reading.loss for reading in seen]==want

class ScaleInPlace(Callback):
    "Scales the loss between `FiniteLoss`, which reads it first, and the rule"
    def after_loss(self): self.learn.loss_grad.mul_(2)

@pytest.mark.parametrize('scale', [Scale,ScaleInPlace])
def test_a_loss_that_was_changed_after_it_was_read_is_read_again(scale):
    learn = toy_learner(cbs=[FiniteLoss(), DynamicLossWeights(), scale()])
    with pytest.raises(ValueError, match="PyramidLoss returned .* parts 'id' sum to"): learn.fit(1)

@pytest.mark.parametrize('ranks', [1,2])
def test_a_loss_of_weight_zero_stays_in_the_graph_where_ddp_waits_for_it(monkeypatch, ranks):
    "Its gradient is then zero, and not missing; in a single process it is missing, as ever"
    monkeypatch.setattr(dynamic_losses, 'num_distrib', lambda: ranks)
    model,x,labels = Branches(),torch.randn(8,6),torch.arange(8)//2
    rule,loss = toy_learner(cbs=DynamicLossWeights(weighting='paper')).dynamic_loss_weights,PyramidLoss()
    loss(model(x), labels)
    parts = loss.parts
    rule._weighted_sum({'id':0., 'triplet':.5}, dict.fromkeys(parts, 1.), parts).backward()
    got = {name:p.grad for name,p in model.named_parameters()}
    model.zero_grad()
    loss(model(x), labels)
    (.5*loss.parts['triplet']).backward()
    assert torch.equal(got['body.weight'], model.body.weight.grad) and got['body.weight'].any()
    if ranks==1: assert got['fc.weight'] is None
    else: assert not got['fc.weight'].any()

def test_a_part_that_means_nothing_stays_out_of_the_sum(monkeypatch):
    "A triplet loss of a random batch, which may not be finite"
    monkeypatch.setattr(dynamic_losses, 'num_distrib', lambda: 2)
    rule = toy_learner(cbs=DynamicLossWeights()).dynamic_loss_weights
    parts = dict(id=torch.tensor(2., requires_grad=True), triplet=torch.tensor(math.nan, requires_grad=True))
    assert rule._weighted_sum({'id':1., 'triplet':0.}, {'id':2.}, parts).item()==2.

def test_a_loss_may_be_scaled_after_the_rule():
    class Later(Scale): order = 6
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(),spy,Later()])
    learn.fit(1)
    history = learn.dynamic_loss_weights.history
    for step in zip(spy.seen, history.weight_id, history.weight_triplet):
        assert_close(step[0]['grads'], grads_by_hand([step], factor=2.))

class Half(PyramidLoss):
    "Parts in half precision"
    def forward(self, pred, target):
        loss = super().forward(pred, target)
        self.parts = {name:part.bfloat16() for name,part in self.parts.items()}
        return loss

def test_rounding_in_half_precision_is_no_scale():
    learn = toy_learner(cbs=DynamicLossWeights(), loss_func=Half())
    learn.fit(2)
    assert (learn.dynamic_loss_weights.history.weight_triplet>0).any()

class Renamed(nn.Module):
    "The same losses under other names"
    def __init__(self):
        super().__init__()
        self.loss,self.parts = PyramidLoss(),{}
    def forward(self, pred, target):
        loss = self.loss(pred, target)
        names = dict(id='identity', triplet='metric')
        self.parts = {names[name]:part for name,part in self.loss.parts.items()}
        return loss

def test_losses_of_other_names():
    "An error says which names there are; with them it is the same training"
    learn = toy_learner(cbs=DynamicLossWeights(), loss_func=Renamed())
    with pytest.raises(ValueError, match="weights the losses 'id', 'triplet', but Renamed has the parts "
                                         "'identity', 'metric'.*parts=.*dynamic=False"): learn.fit(1)
    learn = toy_learner(cbs=DynamicLossWeights(parts=('identity','metric')), loss_func=Renamed())
    learn.fit(2)
    usual = toy_learner(cbs=DynamicLossWeights())
    usual.fit(2)
    got,want = (o.dynamic_loss_weights.history for o in (learn, usual))
    assert list(got)==[name.replace('id','identity').replace('triplet','metric') for name in want]
    assert got.weight_metric.tolist()==want.weight_triplet.tolist()
    assert got.loss_identity.tolist()==want.loss_id.tolist()
    learn.dynamic_loss_weights.plot()

def test_a_gated_loss_that_is_missing():
    class OnlyId(PyramidLoss):
        def forward(self, pred, target):
            super().forward(pred, target)
            self.parts = {'id':self.parts['id']} if 'id' in self.parts else {}
            return sum(self.parts.values())
    learn = toy_learner(cbs=DynamicLossWeights(), loss_func=OnlyId())
    with pytest.raises(ValueError, match="OnlyId has the parts 'id' on a batch for 'id', 'triplet'"): learn.fit(1)

@pytest.mark.parametrize('parts', ['id',('id',),('id','triplet','norm'),('id','id')])
def test_two_losses_are_weighted(parts):
    with pytest.raises(ValueError, match='parts=.*two losses'): DynamicLossWeights(parts=parts)

def test_a_part_that_is_not_finite_stops_the_training_also_if_the_rule_does_not_know_it():
    class Bad(Third):
        def forward(self, pred, target):
            loss = super().forward(pred, target)
            if 'norm' not in self.parts: return loss
            self.parts['norm'] = self.parts['norm']*math.nan
            return sum(self.parts.values())
    learn = toy_learner(cbs=DynamicLossWeights(), loss_func=Bad())
    with pytest.raises(ValueError, match="not finite at step 0.*norm.*nan"): learn.fit(1)

def test_the_table_has_a_column_for_each_part(make_learner):
    learn = make_learner(loss_func=Third())
    learn.fit(1)
    names,row = learn.recorder.metric_names[1:],learn.recorder.values[-1]
    assert list(names[2:5])==['id_loss','triplet_loss','norm_loss']
    want = learn.dynamic_loss_weights.history.loss_norm.mean()
    assert row[4]==pytest.approx(want, rel=1e-5)

# What a validation shows

def parts_learner(path):
    toy,parts = toy_learner(),LossParts()
    learn = ReIDLearner(toy.dls, toy.model, PyramidLoss(), opt_func=toy.opt_func, lr=.1, path=path,
                        cbs=[parts,DynamicLossWeights()], metrics=parts.columns)
    return quiet(learn)

@pytest.mark.parametrize('before', ['nothing','fit','lr_find'])
def test_validate_shows_no_losses_of_an_earlier_fit(tmp_path, before):
    learn = parts_learner(tmp_path)
    if before=='fit':
        learn.fit(2)
        history = learn.dynamic_loss_weights.history[8:]
        want = [history.loss_id.mean(), history.loss_triplet.mean()]
        assert list(learn.recorder.values[-1][2:])==pytest.approx(want, rel=1e-5)
    if before=='lr_find': learn.lr_find(num_it=6, show_plot=False)
    valid_loss,*parts = learn.validate()
    assert valid_loss>0 and len(parts)==2 and all(map(math.isnan, parts))

def test_a_cancelled_batch_is_not_counted_twice():
    "fastai tells of the end of a cancelled batch as well; the parts that are there then are those of the batch before"
    class Skip(Callback):
        order,run_valid = 50,False
        def before_batch(self):
            if self.iter%2: raise CancelBatchException
    learn = parts_learner('.')
    learn.add_cb(Skip())
    learn.fit(1)
    losses = learn.dynamic_loss_weights.history.loss_id
    assert len(losses)==4 and learn.recorder.values[-1][2]==pytest.approx(losses.mean(), rel=1e-5)
    assert len(learn.loss_parts.batch_losses['id'])==4

def test_without_the_callback_the_loss_is_the_plain_sum():
    spy = Spy()
    learn = toy_learner(cbs=spy)
    learn.fit(1)
    for s in spy.seen:
        assert is_pk(s['y'])
        assert_close(s['grads'], grads_by_hand([(s,1.,1.)]))

class LossSpy(Callback):
    "Loss, parts and labels of each training batch"
    order,run_valid = 60,False
    def __init__(self): self.seen = []
    def after_batch(self):
        parts = {name:loss.item() for name,loss in self.loss_func.parts.items()}
        self.seen.append((self.loss.item(), parts, self.yb[0][:,0].tolist()))

def counts(labels): return sorted(Counter(labels).values())

def test_dynamic_false_leaves_loss_and_batches_alone(make_learner):
    learn = make_learner(dynamic=False, cbs=LossSpy())
    assert not hasattr(learn, 'dynamic_loss_weights')
    learn.fit(1)
    assert len(learn.loss_spy.seen)==len(learn.dls.train)
    for loss,parts,labels in learn.loss_spy.seen:
        assert loss==pytest.approx(parts['id']+parts['triplet'], rel=1e-5) and parts['triplet']>0
        assert counts(labels)==[4]*4

def test_dynamic_true_does_not(make_learner):
    "With dynamic training there are losses without the triplet part, and random batches"
    learn = make_learner(dynamic=True, cbs=LossSpy())
    learn.fit(1)
    seen,history = learn.loss_spy.seen,learn.dynamic_loss_weights.history
    assert len(history)==len(seen)
    for (loss,parts,labels),step in zip(seen, history.itertuples()):
        assert set(parts)==({'id','triplet'} if step.mode=='pk' else {'id'})
        assert loss==pytest.approx(step.weight_id*parts['id']+step.weight_triplet*parts.get('triplet', 0.), rel=1e-5)
        if step.mode=='pk': assert counts(labels)==[4]*4
    first_loss,first_parts,first_labels = seen[0]
    assert counts(first_labels)!=[4]*4 and first_loss==pytest.approx(first_parts['id'])

def test_history_and_plot():
    learn = toy_learner(cbs=DynamicLossWeights())
    with pytest.raises(ValueError, match='train first'): learn.dynamic_loss_weights.plot()
    assert len(learn.dynamic_loss_weights.history)==0
    learn.fit(1)
    history = learn.dynamic_loss_weights.history
    columns = [f'{what}_{name}' for what in ('loss','k','p','fl','weight') for name in ('id','triplet')]
    assert list(history)==['mode',*columns]
    fig = learn.dynamic_loss_weights.plot()
    assert len(fig.axes)==3
