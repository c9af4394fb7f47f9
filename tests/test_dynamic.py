"The rule of dynamic training against a plain second one, and a callback that really does what the rule says"
import json
import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from fastai.callback import fp16, schedule  # noqa: to_fp16, lr_find
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Branches, Spy, Vectors, quiet, toy_learner

from pyramidreid.models.losses import PyramidLoss
from pyramidreid.training.dynamic import *
from pyramidreid.training.learner import ReIDLearner

weightings = ['gate','normalized','paper']

# the rule

def plain_rule(losses, weighting, alpha=.25, gamma=2., delta=.16):
    "Design §4 step by step. `losses`: (id, triplet) of every batch. Yields (mode of the batch, w_id, w_tp, mode of the next)"
    k_id,k_tp,FL_id,FL_tp,mode = None,None,0.,0.,'random' # a loss that was never seen is not falling
    for L_id,L_tp in losses:
        before = k_id
        if before is None: k_id,p = L_id,1.
        else:
            k_id = alpha*L_id + (1-alpha)*before
            p = min(k_id,before)/before if before>0 else 1.
        FL_id = -(1-p)**gamma*math.log(p)
        if mode=='pk':
            before = k_tp
            if before is None: k_tp,p = L_tp,1.
            else:
                k_tp = alpha*L_tp + (1-alpha)*before
                p = min(k_tp,before)/before if before>0 else 1.
            FL_tp = -(1-p)**gamma*math.log(p)
        drawn = mode
        if FL_tp < delta*FL_id: w_id,w_tp,mode = 1.,0.,'random'
        elif drawn=='random': w_id,w_tp,mode = 1.,0.,'pk' # no honest triplet loss on this one
        else:
            mode = 'pk'
            if weighting=='gate' or (weighting=='normalized' and FL_id+FL_tp==0): w_id,w_tp = 1.,1.
            elif weighting=='normalized': w_id,w_tp = 2*FL_id/(FL_id+FL_tp), 2*FL_tp/(FL_id+FL_tp)
            else: w_id,w_tp = FL_id,FL_tp
        yield drawn,w_id,w_tp,mode

def released_rule(losses, alpha=.25, gamma=2., delta=.16):
    "What the authors' program computes, in IEEE arithmetic. Yields (w_id, w_tp)"
    f = np.float64
    with np.errstate(all='ignore'):
        k,first = [f(0),f(0)],True
        for pair in losses:
            last,k = k,[f(alpha)*f(L)+f(1-alpha)*o for L,o in zip(pair, k)]
            p = [f(.5)]*2 if first else [np.minimum(a,b)/b for a,b in zip(k, last)]
            FL_id,FL_tp = [-(1-o)**f(gamma)*np.log(o) for o in p]
            yield (1.,0.) if FL_tp/FL_id < delta else (1.,1.)
            first = False

def sequence(seed, n=400, kind=0):
    "Noisy losses: falling, walking, falling in steps with plateaus"
    r = np.random.default_rng(seed)
    trend = [np.exp(-np.arange(n)/100), np.exp(r.normal(size=n).cumsum()*.1), np.exp(-(np.arange(n)//50)*1.)][kind%3]
    noise = 0 if kind==2 else .2
    return [tuple(o) for o in np.stack([t*s*np.exp(noise*r.normal(size=n)) for s,t in ((7,trend),(30,np.roll(trend,n//3)))], 1).tolist()]

def run(rule, losses): return [(rule.mode,*rule.step(dict(id=i, triplet=t))) for i,t in losses]

@pytest.mark.parametrize('weighting', weightings)
@pytest.mark.parametrize('kind', range(3))
def test_rule_equals_the_plain_one_on_long_sequences(weighting, kind):
    for seed in range(4):
        losses,kw = sequence(seed, kind=kind),[{}, dict(alpha=.5), dict(gamma=1.,delta=.5), dict(alpha=.9,delta=0.)][seed]
        got = run(LossDynamics(weighting=weighting, **kw), losses)
        want = list(plain_rule(losses, weighting, **kw))
        assert [(m,n) for m,_,n in got]==[(m,n) for m,_,_,n in want]
        np.testing.assert_allclose([list(w.values()) for _,w,_ in got], [o[1:3] for o in want], rtol=1e-12, atol=0)
        if kind<2 and not kw: assert {(m,w['triplet']>0) for m,w,_ in got} >= {('random',False),('pk',False),('pk',True)}

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0.,0.,1e-30,.5,1.,1.,2.,7.,1e6])]*2), max_size=40), st.sampled_from(weightings))
def test_rule_on_ties_plateaus_and_zeros(losses, weighting):
    got = run(LossDynamics(weighting=weighting), losses)
    want = list(plain_rule(losses, weighting))
    assert [(m,n) for m,_,n in got]==[(m,n) for m,_,_,n in want]
    np.testing.assert_allclose([list(w.values()) for _,w,_ in got], [o[1:3] for o in want], rtol=1e-9, atol=0)

def test_rule_by_hand():
    "First batch random, first triplet value, both, gated off, a random batch leaves the triplet's state alone"
    rule = LossDynamics(alpha=.5)
    assert rule.mode=='random'
    assert rule.step(dict(id=8.))==(dict(id=1.,triplet=0.),'pk') # nothing has fallen: 0 < 0 is not so
    assert rule.step(dict(id=10.,triplet=4.))==(dict(id=1.,triplet=1.),'pk') # the ID loss rises
    assert rule.k==dict(id=9.,triplet=4.)
    assert rule.step(dict(id=1.,triplet=4.))==(dict(id=1.,triplet=0.),'random') # the ID loss falls alone
    state = rule.k['triplet'],rule.p['triplet'],rule.fl['triplet']
    assert rule.step(dict(id=1.,triplet=1e9))==(dict(id=1.,triplet=0.),'random') # not a value to learn from
    assert (rule.k['triplet'],rule.p['triplet'],rule.fl['triplet'])==state
    assert rule.step(dict(id=50.))==(dict(id=1.,triplet=0.),'pk') # rises: back, but this batch was random

def test_weights_by_hand():
    "id 8 → k 7, triplet 10 → k 8"
    fl = lambda p: -(1-p)**2*math.log(p)
    for weighting,want in dict(gate=(1,1), paper=(fl(7/8),fl(.8)), normalized=(2*fl(7/8)/(fl(7/8)+fl(.8)),2*fl(.8)/(fl(7/8)+fl(.8)))).items():
        rule = LossDynamics(weighting=weighting)
        rule.mode = 'pk'
        rule.k.update(id=8.,triplet=10.)
        weights,mode = rule.step(dict(id=4.,triplet=2.))
        assert tuple(weights.values())==pytest.approx(want) and mode=='pk'

@pytest.mark.parametrize('kind', range(3))
def test_released_equals_the_literal_rule(kind):
    for seed in range(4):
        losses = sequence(seed, kind=kind)
        got = run(LossDynamics(weighting='released'), losses)
        assert [tuple(w.values()) for _,w,_ in got]==list(released_rule(losses))
        assert {(m,n) for m,_,n in got}=={('pk','pk')}

def test_released_by_hand():
    "The sign trap in step 3, 0/0 in steps 2 and 4, an honest ratio in step 5"
    losses = [(8,8),(8,8),(9,1),(40,40),(1,1)]
    # k: (2,2) (3.5,3.5) (4.875,2.875) (13.66,12.16) (10.49,9.37); p at the end: .768, .7706: both fall alike
    got = [tuple(w.values()) for _,w,_ in run(LossDynamics(weighting='released'), losses)]
    assert got==list(released_rule(losses))==[(1,1),(1,1),(1,0),(1,1),(1,1)]
    got = [tuple(w.values()) for _,w,_ in run(LossDynamics(weighting='released'), [(8,8),(1,8)])]
    assert got==list(released_rule([(8,8),(1,8)]))==[(1,1),(1,0)] # the ID loss falls alone

@pytest.mark.parametrize('losses', [[(8,0),(4,0),(1,0),(1,0)], [(8,0),(1,5),(1,1)], [(0,8),(0,4),(3,1)], [(0,0),(0,0)]])
def test_released_with_a_loss_of_exactly_zero(losses):
    "0/0 is NaN in IEEE arithmetic, and NaN means both"
    assert [tuple(w.values()) for _,w,_ in run(LossDynamics(weighting='released'), losses)]==list(released_rule(losses))

@pytest.mark.parametrize('weighting', weightings+['released'])
def test_state_round_trip_in_the_middle(weighting):
    losses = sequence(7, 120)
    for cut in (0,1,2,37):
        a = LossDynamics(weighting=weighting)
        run(a, losses[:cut])
        sd = a.state_dict()
        text = json.dumps(sd)
        b = LossDynamics(weighting=weighting)
        b.load_state_dict(json.loads(text))
        c = pickle.loads(pickle.dumps(a))
        rest = run(a, losses[cut:])
        assert json.dumps(sd)==text # a snapshot, not a window
        assert run(b, losses[cut:])==rest and run(c, losses[cut:])==rest
        assert a.state_dict()==b.state_dict() and a.n_steps==len(losses)
        a.reset()
        assert run(a, losses)==run(LossDynamics(weighting=weighting), losses)

@pytest.mark.parametrize('bad', [math.nan,math.inf,-math.inf])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    rule = LossDynamics()
    with pytest.raises(ValueError, match=f'step 0.*id.*{bad}'): rule.step(dict(id=bad))
    rule.step(dict(id=1., triplet=bad)) # not measured on a random batch
    before = rule.state_dict()
    with pytest.raises(ValueError, match=f'step 1.*triplet.*{bad}'): rule.step(dict(id=1., triplet=bad))
    assert rule.state_dict()==before

def test_wrong_arguments():
    for o in ('Paper','sum',None):
        with pytest.raises(ValueError, match="weighting=.*'gate'.*'normalized'.*'paper'.*'released'"): DynamicLossWeights(weighting=o)

@pytest.mark.parametrize('weighting', weightings)
def test_alpha_of_one_and_a_loss_that_reaches_zero(weighting):
    "Without smoothing p may be 0, whose logarithm is not a number: either say that alpha must be below 1, or give finite weights"
    try: rule = LossDynamics(alpha=1., weighting=weighting)
    except ValueError as e: assert 'alpha' in str(e); return
    for losses in (dict(id=2.), dict(id=3.,triplet=2.), dict(id=2.,triplet=0.), dict(id=2.,triplet=0.)):
        weights,_ = rule.step(losses)
        assert all(math.isfinite(w) for w in weights.values())

# the callback

def parts_of(seen, loss_func=None):
    "Loss parts of a batch that a spy saw, by hand; and the model they hang on"
    model = Branches()
    model.load_state_dict(seen['state'])
    f = PyramidLoss() if loss_func is None else loss_func
    f(model(seen['x']), seen['y'])
    return f.parts,model

def grads_by_hand(steps, factor=1.):
    "Gradient of the sum over `steps`, (seen, w_id, w_tp), of the weighted parts"
    total = None
    for seen,w_id,w_tp in steps:
        parts,model = parts_of(seen)
        (factor*(w_id*parts['id'] + w_tp*parts['triplet'])).backward()
        grads = {k:p.grad for k,p in model.named_parameters()}
        total = grads if total is None else {k:total[k]+g for k,g in grads.items()}
    return total

def close(a, b, **kw):
    assert a.keys()==b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], **{**dict(atol=1e-6, rtol=1e-4), **kw})

def is_pk(y): return len(set(y.tolist()))==4 and torch.equal(y[::2], y[1::2]) # pairs, side by side

@pytest.mark.parametrize('num_workers', [0,2])
def test_decisions_are_those_of_the_rule_and_batches_follow_them(num_workers):
    "Losses recomputed from what the spy saw, decisions by the plain rule, batches counted: a callback that does nothing fails all three"
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(),spy], num_workers=num_workers)
    learn.fit(4)
    assert len(spy.seen)==4*8
    losses = [tuple(parts_of(s)[0][o].item() for o in ('id','triplet')) for s in spy.seen]
    want = list(plain_rule(losses, 'gate'))
    h = learn.dynamic_loss_weights.history
    assert h['mode'].tolist()==[o[0] for o in want]
    assert h.weight_id.tolist()==[o[1] for o in want] and h.weight_triplet.tolist()==[o[2] for o in want]
    np.testing.assert_allclose(h.loss_id, [o[0] for o in losses], rtol=1e-4)
    pk = h['mode']=='pk'
    np.testing.assert_allclose(h.loss_triplet[pk], [o[1] for o,m in zip(losses,pk) if m], rtol=1e-4)
    assert h.loss_triplet[~pk].isna().all()
    modes = ['pk' if is_pk(s['y']) else 'random' for s in spy.seen]
    assert modes==h['mode'].tolist() and set(modes)=={'pk','random'} and (h.weight_triplet>0).any()

@pytest.mark.parametrize('weighting', weightings+['released'])
def test_weights_reach_the_gradients(weighting):
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(weighting=weighting),spy], lr=.1)
    learn.fit(2)
    h = learn.dynamic_loss_weights.history
    assert len(h)==len(spy.seen)==16
    for s,w_id,w_tp in zip(spy.seen, h.weight_id, h.weight_triplet):
        scale = max(w_id, w_tp, 1e-9) # the paper's weights are as small as 1e-6
        close({k:g/scale for k,g in s['grads'].items()}, grads_by_hand([(s,w_id/scale,w_tp/scale)]), atol=1e-5)
    assert weighting=='released' or (h.weight_triplet==0).any()
    i = h.weight_triplet.idxmax() # and the weights make a difference that this comparison sees
    assert h.weight_triplet[i]>0
    scale = h.weight_triplet[i]
    with pytest.raises(AssertionError): close({k:g/scale for k,g in spy.seen[i]['grads'].items()}, grads_by_hand([(spy.seen[i],h.weight_id[i]/scale,0.)]))

class Scripted(nn.Module):
    "A loss that takes its values from a list"
    def __init__(self, values): super().__init__(); self.values,self.parts = iter(values),{}
    def forward(self, pred, *target):
        if isinstance(pred, torch.Tensor): return pred.sum()*0
        hang_on = pred[0].sum() + pred[1].sum()
        self.parts = {o:v + hang_on - hang_on.detach() for o,v in zip(('id','triplet'), next(self.values))}
        return sum(self.parts.values())

@pytest.mark.parametrize('weighting', weightings)
def test_nothing_falls_and_nothing_crashes(weighting):
    "Both FL are 0 when the first P×K batch has a higher ID loss: under 'paper' both weights are 0, a step of nothing"
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(weighting=weighting),spy], loss_func=Scripted([(1.+i,1.+i) for i in range(8)]))
    learn.fit(1)
    h = learn.dynamic_loss_weights.history
    want = list(plain_rule([(1.+i,1.+i) for i in range(8)], weighting))
    assert h['mode'].tolist()==[o[0] for o in want] and h.weight_triplet.tolist()==[o[2] for o in want]
    if weighting=='paper': assert not any(s['grads']['body.weight'].any() for s in spy.seen[1:])

def test_learn_loss_is_the_weighted_sum_without_a_graph():
    class Losses(Callback):
        order,run_valid = 50,False
        def __init__(self): self.seen = []
        def after_batch(self): self.seen.append((self.loss, sum(self.loss_func.parts.values()).item()))
    cb = Losses()
    learn = toy_learner(cbs=[DynamicLossWeights(),cb])
    learn.fit(2)
    h = learn.dynamic_loss_weights.history
    want = (h.loss_id + h.weight_triplet*h.loss_triplet.fillna(0)).tolist()
    assert [l.item() for l,_ in cb.seen]==pytest.approx(want, rel=1e-5) and not any(l.requires_grad for l,_ in cb.seen)
    assert any(abs(l.item()-s)>.1 for l,s in cb.seen)

@pytest.mark.parametrize('n_acc', [8,16,32])
def test_gradient_accumulation_is_not_doubled(n_acc):
    spy = Spy()
    learn = toy_learner(cbs=[DynamicLossWeights(weighting='normalized'),GradientAccumulation(n_acc),spy])
    learn.fit(2)
    h,group = learn.dynamic_loss_weights.history,n_acc//8
    steps = list(zip(spy.seen, h.weight_id, h.weight_triplet))
    assert len(steps)==16 and (h.weight_triplet>0).any()
    for i in range(0,16,group):
        for j in range(1,group+1): close(steps[i+j-1][0]['grads'], grads_by_hand(steps[i:i+j], 8/n_acc))
        if i+group<16: # one update for each group, by the accumulated gradient
            a,b = (steps[o][0]['state']['body.weight'] for o in (i,i+group))
            torch.testing.assert_close(b, a-.1*steps[i+group-1][0]['grads']['body.weight'], atol=1e-6, rtol=1e-4)

def test_validation_and_get_preds_are_not_counted():
    learn = toy_learner(cbs=DynamicLossWeights())
    learn.fit(1)
    cb = learn.dynamic_loss_weights
    state,n,mode = cb.state_dict(),len(cb.steps),learn.dls.train.mode
    assert n==8
    learn.validate(); learn.get_preds(); learn.get_preds(ds_idx=0); learn.get_preds(with_loss=False, dl=learn.dls.train.new(shuffle=False))
    assert (cb.state_dict(),len(cb.steps),learn.dls.train.mode)==(state,n,mode)
    learn.fit(1)
    assert len(cb.steps)==16 and cb.dynamics.n_steps==16 # a second fit goes on

def test_lr_find_leaves_everything_alone(tmp_path):
    spy = Spy()
    learn = toy_learner(cbs=DynamicLossWeights(), path=tmp_path)
    learn.fit(1)
    cb = learn.dynamic_loss_weights
    cb.dynamics.mode = 'random'
    weights,state,n,mode = {k:v.clone() for k,v in learn.model.state_dict().items()},cb.state_dict(),len(cb.steps),learn.dls.train.mode
    learn.add_cb(spy)
    res = learn.lr_find(num_it=20, show_plot=False)
    assert 0<res.valley<10
    assert len(spy.seen)>10 and all(is_pk(s['y']) for s in spy.seen) # on batches for both losses
    for s in spy.seen[:5]: close(s['grads'], grads_by_hand([(s,1.,1.)]))
    assert cb.state_dict()==state and len(cb.steps)==n
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, weights[k])
    spy.seen = []
    learn.fit(1)
    assert not is_pk(spy.seen[0]['y']) and cb.steps[n]['mode']=='random' # takes up where it stood

@pytest.mark.parametrize('given', ['pk','random'])
def test_training_and_lr_find_leave_the_loader_in_the_mode_it_had(tmp_path, given):
    # another learner on the same loaders must not inherit this one's last decision
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
    h = learn.dynamic_loss_weights.history
    assert len(h)==16 and (h.weight_triplet>0).any()
    if not torch.cuda.is_available():
        for s,w_id,w_tp in zip(spy.seen, h.weight_id, h.weight_triplet): close(s['grads'], grads_by_hand([(s,w_id,w_tp)]))

class CPUAutocast(Callback):
    "As fastai's MixedPrecision, which knows CUDA only"
    order = 10
    def before_batch(self): self.autocast = torch.autocast('cpu', torch.bfloat16); self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)

def test_real_autocast():
    learn = toy_learner(cbs=[DynamicLossWeights(),CPUAutocast()])
    learn.fit(2)
    h = learn.dynamic_loss_weights.history
    assert len(h)==16 and (h.weight_triplet>0).any() and learn.loss_grad.dtype==torch.float32
    assert h.loss_id.iloc[-4:].mean()<h.loss_id.iloc[:4].mean()

class Reseed(Callback):
    "The same batches in the same epoch, whatever came before"
    def before_train(self): self.dls.train.rng = random.Random(self.epoch)

@pytest.mark.parametrize('weighting', weightings)
def test_stop_save_load_resume(tmp_path, weighting):
    def new(seed=1):
        learn = toy_learner(cbs=[DynamicLossWeights(weighting=weighting),Reseed()], seed=seed, path=tmp_path)
        res = ReIDLearner(learn.dls, learn.model, PyramidLoss(), opt_func=Adam, lr=.02, cbs=[DynamicLossWeights(weighting=weighting),Reseed()], path=tmp_path)
        return quiet(res)
    whole = new()
    whole.fit(6)
    h = whole.dynamic_loss_weights.history
    assert len(h)==48 and h['mode'][24:].nunique()==2
    first = new()
    first.fit(3)
    f = first.save('half')
    second = new(seed=5).load('half')
    assert f.exists() and second.dynamic_loss_weights.state_dict()==first.dynamic_loss_weights.state_dict()
    second.fit(6, start_epoch=3)
    rest = second.dynamic_loss_weights.history
    cols = ['mode','loss_id','weight_id','weight_triplet','k_id','k_triplet','fl_id','fl_triplet']
    assert len(rest)==24
    assert rest[cols].equals(h[cols][24:].reset_index(drop=True))
    for a,b in zip(whole.model.parameters(), second.model.parameters()): assert torch.equal(a, b)
    other = new() # and it is the state that does it: without, the first batch would be drawn at random again
    other.load('half')
    other.dynamic_loss_weights.dynamics.reset()
    other.fit(6, start_epoch=3)
    assert not other.dynamic_loss_weights.history[cols].equals(rest[cols])

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

def test_without_the_callback_the_loss_is_the_plain_sum():
    spy = Spy()
    learn = toy_learner(cbs=spy)
    learn.fit(1)
    for s in spy.seen:
        assert is_pk(s['y'])
        close(s['grads'], grads_by_hand([(s,1.,1.)]))

class LossSpy(Callback):
    order,run_valid = 60,False
    def __init__(self): self.seen = []
    def after_batch(self): self.seen.append((self.loss.item(), {o:v.item() for o,v in self.loss_func.parts.items()}, self.yb[0][:,0].tolist()))

def test_dynamic_false_leaves_loss_and_batches_alone(make_learner):
    learn = make_learner(dynamic=False, cbs=LossSpy())
    assert not hasattr(learn, 'dynamic_loss_weights')
    learn.fit(1)
    assert len(learn.loss_spy.seen)==len(learn.dls.train)
    for loss,parts,y in learn.loss_spy.seen:
        assert loss==pytest.approx(parts['id']+parts['triplet'], rel=1e-5) and parts['triplet']>0
        assert sorted(Counter(y).values())==[4]*4

def test_dynamic_true_does_not(make_learner):
    "The same with dynamic training: losses without the triplet part, random batches among them"
    learn = make_learner(cbs=LossSpy())
    learn.fit(1)
    seen,h = learn.loss_spy.seen,learn.dynamic_loss_weights.history
    assert len(h)==len(seen)
    for (loss,parts,y),w_id,w_tp,mode in zip(seen, h.weight_id, h.weight_triplet, h['mode']):
        assert set(parts)=={'id','triplet'} if mode=='pk' else set(parts)=={'id'}
        assert loss==pytest.approx(w_id*parts['id']+w_tp*parts.get('triplet', 0.), rel=1e-5)
        if mode=='pk': assert sorted(Counter(y).values())==[4]*4
    assert sorted(Counter(seen[0][2]).values())!=[4]*4 and seen[0][0]==pytest.approx(seen[0][1]['id'])

def test_history_and_plot():
    learn = toy_learner(cbs=DynamicLossWeights())
    with pytest.raises(ValueError, match='train first'): learn.dynamic_loss_weights.plot()
    assert len(learn.dynamic_loss_weights.history)==0
    learn.fit(1)
    h = learn.dynamic_loss_weights.history
    assert list(h)==['mode']+[f'{a}_{b}' for a in ('loss','k','p','fl','weight') for b in ('id','triplet')]
    fig = learn.dynamic_loss_weights.plot()
    assert len(fig.axes)==3
