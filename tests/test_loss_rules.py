"Rules beside the paper's: against autograd, plain versions and by hand; rules of one's own in a fit"
import math
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from toys import Third, quiet, toy_learner

from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.dynamic_losses import DynamicLossWeights
from pyramidreid.training.loss_rules import *


class Three(Third):
    part_names = ('id','triplet','center')

def history_of(rule, loss_func=None, epochs=1, **kwargs):
    learn = toy_learner(loss_func=loss_func, cbs=DynamicLossWeights(rule=rule), **kwargs)
    learn.fit(epochs)
    return learn.dynamic_loss_weights.history

# ---- the rules

def losses_of(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    falls = torch.linspace(1, .2, n)[:,None]*torch.tensor([140.,20.])
    return [dict(id=a, triplet=b) for a,b in (falls*(.8+.4*torch.rand(n, 2, generator=g))).tolist()]

def test_uncertainty_weights_are_those_of_gradient_descent():
    "Plain SGD on s of the sum of exp(-s) L + s"
    s = torch.zeros(2, dtype=torch.double, requires_grad=True)
    opt,rule = torch.optim.SGD([s], lr=.01),UncertaintyWeights(lr=.01)
    for losses in losses_of(200):
        want = (-s.detach()).exp()
        weights,mode = rule.step(losses)
        assert mode=='pk' and list(weights.values())==pytest.approx((want/want.mean()).tolist(), rel=1e-9)
        opt.zero_grad()
        ((-s).exp()*torch.tensor([*losses.values()], dtype=torch.double) + s).sum().backward()
        opt.step()
    assert list(rule.columns['log_variance'].values())==pytest.approx(s.tolist(), rel=1e-9)

def plain_dwa(losses, period, temperature):
    "Weights of each step, from all losses at once"
    rows = torch.tensor([[*o.values()] for o in losses], dtype=torch.double)
    means = [rows[i:i+period].mean(0) for i in range(0, len(rows), period)]
    res = []
    for step in range(len(rows)):
        t = step//period
        if t<2: res.append([1.,1.])
        else: res.append((2*torch.softmax(means[t-1]/means[t-2]/temperature, 0)).tolist())
    return res

@pytest.mark.parametrize('period,temperature', [(1,2.), (7,2.), (10,.5)])
def test_loss_ratio_weights_are_those_of_the_formula(period, temperature):
    losses,rule = losses_of(40),LossRatioWeights(period, temperature)
    got = [list(rule.step(o)[0].values()) for o in losses]
    assert got==[pytest.approx(want) for want in plain_dwa(losses, period, temperature)]

@pytest.mark.parametrize('fraction', [0, .1, .25, 1/3, .5, .9, 1])
def test_mixed_batches_keep_their_fraction(fraction):
    rule,n = MixedBatches(fraction),600
    seen = [rule.mode]
    for _ in range(n-1): seen.append(rule.step(dict(id=1., triplet=1.))[1])
    for stop in (10,101,n): assert abs(seen[:stop].count('random')-fraction*stop)<=1

def test_mixed_batches_train_both_losses_on_pk_batches_alone():
    history = history_of(MixedBatches(.25), epochs=2)
    random = history['mode']=='random'
    assert random.sum()==4 and random.tolist()[3::4]==[True]*4
    assert (history.weight_triplet>0).equals(~random) and (history.weight_id==1).all()
    assert history.loss_triplet.isna().equals(random)

def test_a_coin_is_the_same_for_the_same_seed():
    first,again,other = (history_of(MixedBatches(.5, seed=seed), epochs=3)['mode'].tolist() for seed in (1,1,2))
    assert first==again!=other

@pytest.mark.parametrize('fraction', [-.1, 1.1, math.nan])
def test_impossible_fractions(fraction):
    with pytest.raises(ValueError, match='0 to 1'): MixedBatches(fraction)

@pytest.mark.parametrize('weights', [dict(id=-1.), dict(id=math.inf), dict(id=0.), dict(id=math.nan, triplet=1.), {}])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match='above 0'): FixedWeights(**weights)

def gradients(cbs, loss_func=None):
    "Gradients of the first step"
    class Keep(Callback):
        order = 90
        def before_step(self):
            if hasattr(self, 'grads'): return
            self.grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.model.parameters()]
    keep = Keep()
    toy_learner(loss_func=loss_func, cbs=[*cbs, keep]).fit(1)
    return keep.grads

def test_fixed_weights_reach_the_gradients():
    "Those of 1 and 3 are those of 1 and 1 and twice those of the triplet loss alone; 1 and 1 are the plain sum"
    def of(**weights): return gradients([DynamicLossWeights(rule=FixedWeights(**weights))])
    both,triplet,more = of(id=1, triplet=1),of(id=0, triplet=1),of(id=1, triplet=3)
    for a,b,c,plain in zip(both, triplet, more, gradients([])):
        torch.testing.assert_close(a, plain)
        torch.testing.assert_close(c, a+2*b, rtol=1e-4, atol=1e-6)

# ---- rules of one's own

class Constant:
    "A rule that always returns the same"
    def __init__(self, decision): self.decision = decision
    def step(self, losses): return self.decision

@pytest.mark.parametrize('decision,message', [
    (dict(id=1.), 'return a dict of weights'), ((dict(id=1.),'pk',1), 'return a dict of weights'),
    ((1.,'pk'), 'return a dict of weights'), (None, 'return a dict of weights'),
    ((dict(id=1.),'PK'), "mode 'PK'"), ((dict(id=1.),None), 'mode None'),
    ((dict(id=math.nan),'pk'), 'not finite'), ((dict(id=1., centre=1.),'pk'), "weights 'centre'"),
    ((dict(id='1'),'pk'), 'not numbers')])
def test_a_decision_that_cannot_be_carried_out(decision, message):
    learn = toy_learner(cbs=DynamicLossWeights(rule=Constant(decision)))
    with pytest.raises(ValueError, match=message): learn.fit(1)

@pytest.mark.parametrize('rule', [MixedBatches, 'gate', 1, object(), True])
def test_what_is_not_a_rule(rule):
    with pytest.raises(ValueError, match='a rule is an object with a method'): DynamicLossWeights(rule=rule)

@pytest.mark.parametrize('name,value', dict(alpha=.5, gamma=1., delta=.2, weighting='paper', parts=('a','b')).items())
def test_settings_of_the_papers_rule_beside_another(name, value):
    with pytest.raises(ValueError, match=name): DynamicLossWeights(rule=MixedBatches(), **{name:value})

def test_any_number_of_parts_is_weighted_and_logged():
    history = history_of(FixedWeights(id=1, triplet=2, center=3), Three())
    assert list(history)==['mode',*(f'{what}_{name}' for what in ('loss','weight') for name in Three.part_names)]
    assert history.notna().all(axis=None) and (history.weight_center==3).all()

def test_a_part_without_a_weight_is_trained_as_it_is():
    history = history_of(Constant((dict(id=2.),'pk')), Three())
    assert (history.weight_id==2).all() and (history.weight_triplet==1).all() and (history.weight_center==1).all()
    want = gradients([DynamicLossWeights(rule=Constant((dict(id=2., triplet=1., center=1.),'pk')))], Three())
    got = gradients([DynamicLossWeights(rule=Constant((dict(id=2.),'pk')))], Three())
    assert all(map(torch.equal, got, want))

def test_a_rule_cannot_change_the_losses_it_was_given():
    class Greedy:
        def step(self, losses):
            losses.clear()
            return dict(id=1.),'pk'
    assert history_of(Greedy()).loss_id.notna().all()

@pytest.mark.parametrize('rule', [partial(MixedBatches, .5, seed=3), UncertaintyWeights, partial(LossRatioWeights, 4),
                                  partial(FixedWeights, id=1, triplet=.5), partial(Constant, (dict(id=1.),'random'))])
def test_a_rule_has_a_plot(rule):
    learn = toy_learner(cbs=DynamicLossWeights(rule=rule()))
    learn.fit(1)
    fig = learn.dynamic_loss_weights.plot()
    shares = [text.get_text() for text in fig.axes[-1].get_yticklabels()]
    assert len(fig.axes)==3 and sum(int(text.split()[-1][:-1]) for text in shares)==pytest.approx(100, abs=2)

# ---- in a learner

@pytest.mark.parametrize('rule', [partial(MixedBatches, .5, seed=3), UncertaintyWeights, partial(LossRatioWeights, 2)])
def test_a_stopped_run_is_resumed(make_learner, tmp_path, rule):
    "State by `state_dict` and by attributes: the resumed run ends as the whole one"
    class Stop(Callback):
        order = 95
        def after_epoch(self):
            if self.epoch==1: raise KeyboardInterrupt
    def learner(folder): return quiet(make_learner(path=tmp_path/folder, dynamic=rule()))
    whole,again = learner('whole'),learner('again')
    whole.fit_one_cycle(3, 1e-3)
    with pytest.raises(KeyboardInterrupt): learner('again').fit_one_cycle(3, 1e-3, cbs=[Checkpoints(), Stop()])
    again.fit_one_cycle(3, 1e-3, cbs=Checkpoints(resume=True))
    for a,b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    assert whole.dynamic_loss_weights.history.equals(again.dynamic_loss_weights.history)

def test_another_rule_is_another_run(make_learner, tmp_path):
    learn = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.5)))
    learn.fit(1, cbs=Checkpoints())
    other = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.25)))
    with pytest.raises(ValueError, match='fraction=0.25'): other.fit(1, cbs=Checkpoints(resume=True))

def test_saved_and_loaded(make_learner, tmp_path):
    learn,other = (quiet(make_learner(path=tmp_path, dynamic=LossRatioWeights(2))) for _ in range(2))
    learn.fit(2)
    other.load(learn.save('ratios'))
    assert other.dynamic_loss_weights.state_dict()==learn.dynamic_loss_weights.state_dict()
    assert other.dynamic_loss_weights.dynamics.n_steps==len(learn.dynamic_loss_weights.steps)
