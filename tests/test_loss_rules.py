"Rules beside the paper's: against autograd, plain versions and by hand; rules of one's own in a fit"
import math
from collections import Counter, OrderedDict, deque
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from toys import Third, quiet, toy_learner

from pyramidreid.core import ReIDWarning
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.dynamic_losses import DynamicLossWeights, LossDynamics
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

class WithNumPy:
    "A rule that keeps what NumPy returns"
    def __init__(self): self.mean = 0.
    def step(self, losses):
        self.mean = np.mean([self.mean, losses['id']])
        return dict(id=1., triplet=1.),'pk'

class WithDeque(WithNumPy):
    "A rule that keeps what cannot be saved"
    def __init__(self): self.mean,self.last = 0.,deque([1.])

class WithSlots:
    __slots__ = ('mode',)
    def step(self, losses): return dict(id=1., triplet=1.),'pk'

class WithFixedMode(WithNumPy):
    mode = property(lambda self: 'pk')

RULES = [partial(FixedWeights, id=1, triplet=1), partial(FixedWeights, id=1, triplet=5), UncertaintyWeights,
         partial(LossRatioWeights, 1), partial(LossRatioWeights, 2), partial(MixedBatches, .5),
         partial(MixedBatches, .25), WithNumPy]

@pytest.mark.parametrize('first', [*RULES, lambda: True], ids=range(len(RULES)+1))
def test_the_state_of_another_rule_is_left_out(make_learner, tmp_path, first):
    "The rule begins anew, as if there were no state, whatever was saved"
    file = tmp_path/'saved'
    learn = quiet(make_learner(path=tmp_path, dynamic=first()))
    learn.fit(1)
    learn.save(file)
    for rule in RULES:
        if rule is first: continue
        other = quiet(make_learner(path=tmp_path, dynamic=rule()))
        before = other.dynamic_loss_weights.state_dict()
        with pytest.warns(ReIDWarning, match='begins anew: the saved state belongs to'): other.load(file)
        assert other.dynamic_loss_weights.state_dict()==before
        assert torch.equal(next(other.model.parameters()), next(learn.model.parameters()))

def test_a_state_without_its_rule(make_learner, tmp_path):
    "As an earlier version wrote it"
    learn = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.25)))
    learn.fit(1)
    file = learn.save('old')
    content = torch.load(file, weights_only=True)
    torch.save({**content, 'dynamic':content['dynamic']['state']}, file)
    same = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.25))).load('old')
    assert same.dynamic_loss_weights.state_dict()==learn.dynamic_loss_weights.state_dict()
    other = quiet(make_learner(path=tmp_path, dynamic=UncertaintyWeights()))
    with pytest.warns(ReIDWarning, match='belongs to another one'): other.load('old')

def test_a_checkpoint_of_another_rule(make_learner, tmp_path):
    learn = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.5)))
    learn.fit(1, cbs=Checkpoints())
    file = next((tmp_path/'checkpoints').rglob('*.pth'))
    same = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.5))).load(file)
    assert same.dynamic_loss_weights.state_dict()==learn.dynamic_loss_weights.state_dict()
    other = quiet(make_learner(path=tmp_path, dynamic=FixedWeights(id=1, triplet=1)))
    with pytest.warns(ReIDWarning, match='MixedBatches, fraction=0.5'): other.load(file)
    assert other.dynamic_loss_weights.mode=='pk'

def test_a_checkpoint_that_does_not_name_its_rule(make_learner, tmp_path):
    learn = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.5)))
    learn.fit(1, cbs=Checkpoints())
    file = next((tmp_path/'checkpoints').rglob('*.pth'))
    content = torch.load(file, weights_only=True)
    del content['config']['dynamic training']
    torch.save(content, tmp_path/'early.pth')
    same = quiet(make_learner(path=tmp_path, dynamic=MixedBatches(.5))).load(tmp_path/'early.pth')
    assert same.dynamic_loss_weights.dynamics.n_steps==len(learn.dynamic_loss_weights.steps)

def test_numbers_of_numpy_are_saved(make_learner, tmp_path):
    learn,other = (quiet(make_learner(path=tmp_path, dynamic=WithNumPy())) for _ in range(2))
    learn.fit(1, cbs=Checkpoints())
    other.load(learn.save('numpy'))
    assert other.dynamic_loss_weights.dynamics.mean==learn.dynamic_loss_weights.dynamics.mean>0

def test_a_state_that_cannot_be_saved(make_learner, tmp_path):
    learn = quiet(make_learner(path=tmp_path, dynamic=WithDeque()))
    with pytest.raises(TypeError, match='WithDeque.last is or has a deque.*state_dict'): learn.fit(1, cbs=Checkpoints())
    assert not learn.dynamic_loss_weights.steps
    learn.fit(1)
    with pytest.raises(TypeError, match='WithDeque.last is or has a deque'): learn.save('deque')
    assert not list(tmp_path.rglob('*deque*'))

def test_a_rule_without_attributes(make_learner, tmp_path):
    learn = quiet(make_learner(path=tmp_path, dynamic=WithSlots()))
    learn.fit(1)
    with pytest.raises(TypeError, match='A WithSlots has no attributes that could be saved'): learn.save('slots')

class Network(torch.nn.Module):
    "A rule with weights, whose `state_dict` is an `OrderedDict`"
    def __init__(self, weigh=max):
        super().__init__()
        self.weigh,self.weight = weigh,torch.nn.Parameter(torch.zeros(2))
        self.register_buffer('n', torch.zeros(()))
    def step(self, losses):
        self.n += 1
        return dict(id=1., triplet=1.),'pk'

class WithContainers(WithNumPy):
    "What torch reads without running code"
    def __init__(self):
        super().__init__()
        self.seen,self.names,self.order,self.shape = Counter(a=1),{'x'},OrderedDict(b=2),torch.Size([3])

@pytest.mark.parametrize('rule', [Network, WithContainers])
def test_states_of_other_types(make_learner, tmp_path, rule):
    learn,other = (quiet(make_learner(path=tmp_path, dynamic=rule())) for _ in range(2))
    learn.fit(1)
    other.load(learn.save('state'))
    was,now = (o.dynamic_loss_weights.state_dict() for o in (learn, other))
    assert was.keys()==now.keys() and was
    for name,value in was.items():
        same = torch.equal(now[name], value) if isinstance(value, torch.Tensor) else now[name]==value
        assert same and type(now[name]) is type(value), name

def test_a_learner_pickled_by_an_earlier_version(make_learner, tmp_path):
    learn = quiet(make_learner(path=tmp_path))
    learn.fit(1)
    del learn.dynamic_loss_weights.rule_text
    saved = learn.save('old')
    state = learn.dynamic_loss_weights.state_dict()
    again = quiet(make_learner(path=tmp_path)).load(saved)
    assert again.dynamic_loss_weights.state_dict()==state
    del again.dynamic_loss_weights.rule_text
    assert again.load(saved).dynamic_loss_weights.state_dict()==state

def test_a_function_as_a_setting_is_named():
    text = DynamicLossWeights(rule=Network()).rule_text
    assert text=='Network, weigh=max' and '0x' not in DynamicLossWeights(rule=Network(quiet)).rule_text
    assert DynamicLossWeights(gamma=2).rule_text==DynamicLossWeights(gamma=2.).rule_text

def test_a_mode_that_cannot_be_set(make_learner):
    with pytest.raises(ValueError, match='WithFixedMode.mode cannot be set'):
        quiet(make_learner(dynamic=WithFixedMode())).fit(1)

@pytest.mark.parametrize('wrong', [1,.25,{'id':1.},[DynamicLossWeights(),3],UncertaintyWeights])
def test_what_a_learner_does_not_take_as_a_rule(make_learner, wrong):
    with pytest.raises(ValueError, match='a rule'): make_learner(dynamic=wrong)

@pytest.mark.parametrize('off', [0,None,[],np.bool_(False)])
def test_what_switches_dynamic_training_off(make_learner, off):
    assert not hasattr(make_learner(dynamic=off), 'dynamic_loss_weights')

def test_callbacks_as_dynamic(make_learner):
    rule = DynamicLossWeights(rule=MixedBatches(.25))
    assert make_learner(dynamic=[rule]).dynamic_loss_weights is rule
    assert make_learner(dynamic=DynamicLossWeights).dynamic_loss_weights.dynamics.weighting=='gate'

# ---- numbers at their limits

def steps(rule, losses, n):
    for _ in range(n): weights,_ = rule.step(losses)
    assert all(math.isfinite(weight) and weight>=0 for weight in weights.values())
    assert sum(weights.values())==pytest.approx(len(weights))
    return weights

@pytest.mark.parametrize('losses', [dict(id=1e3, triplet=1e3), dict(id=9e4, triplet=1.), dict(id=0., triplet=0.),
                                    dict(id=1., triplet=0.), dict(id=1e-300, triplet=1e300)])
@pytest.mark.parametrize('lr', [.01,1.,100.])
def test_uncertainty_of_extreme_losses(losses, lr): steps(UncertaintyWeights(lr), losses, 5_000)

@pytest.mark.parametrize('first,second', [(.001,1.5), (1e-150,1e150), (0.,1.), (1.,0.), (0.,0.)])
@pytest.mark.parametrize('temperature', [1e-3,2.,1e9])
def test_ratios_of_extreme_losses(first, second, temperature):
    rule = LossRatioWeights(10, temperature)
    steps(rule, dict(id=100., triplet=first), 10)
    steps(rule, dict(id=100., triplet=second), 11)

@pytest.mark.parametrize('make', [
    lambda: UncertaintyWeights(0), lambda: UncertaintyWeights(math.nan), lambda: UncertaintyWeights('1'),
    lambda: LossRatioWeights(temperature=0), lambda: LossRatioWeights(temperature=-1), lambda: LossRatioWeights(2.5),
    lambda: LossRatioWeights(math.nan), lambda: FixedWeights(id='1'), lambda: MixedBatches('0.5'),
    lambda: MixedBatches(math.nan), lambda: MixedBatches(parts='id'), lambda: MixedBatches(parts=('id','a','b'))])
def test_settings_that_mean_nothing(make):
    with pytest.raises(ValueError, match='give |choose |a weight is|a whole number'): make()

def test_the_papers_rule_refuses_losses_below_zero():
    rule = LossDynamics()
    rule.step(dict(id=1.))
    with pytest.raises(ValueError, match='below 0.*triplet.*-1.0'): rule.step(dict(id=1., triplet=-1.))

# ---- in files

def test_saved_and_loaded(make_learner, tmp_path):
    learn,other = (quiet(make_learner(path=tmp_path, dynamic=LossRatioWeights(2))) for _ in range(2))
    learn.fit(2)
    other.load(learn.save('ratios'))
    assert other.dynamic_loss_weights.state_dict()==learn.dynamic_loss_weights.state_dict()
    assert other.dynamic_loss_weights.dynamics.n_steps==len(learn.dynamic_loss_weights.steps)
