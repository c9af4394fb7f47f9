"The two recipes against the paper's table, optimizers and a moving average by hand, and what they leave behind"
import copy

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelStepException, CancelValidException
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.vision.all import SaveModelCallback, set_seed, trainable_params
from ranks import tiny

from pyramidreid.data.transforms import *
from pyramidreid.training.recipes import *
from pyramidreid.training.recipes import _unlike_method, _unlike_paper

pytestmark = pytest.mark.filterwarnings('ignore:.*CUDA', 'ignore:.*GradScaler', 'ignore:.*cuda')

@pytest.fixture(scope='module')
def make_learner(make_learner):
    "`make_learner` with a network of few channels"
    def make(dls=None, **kwargs): return make_learner(dls, **{'arch':tiny, **kwargs})
    return make

def copied(model): return {k:v.clone() for k,v in model.state_dict().items()}
def weights(model): return {k:v.detach().clone() for k,v in model.named_parameters()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Watch(Callback):
    "Hyper-parameters at each step, which weights were trainable, and with `keep` gradients and weights"
    order = 80
    def __init__(self, keep=True):
        self.keep = keep
        for name in ('lrs','moms','grads','after','free','epochs','smooth'): setattr(self, name, [])

    def before_fit(self): self.start = weights(self.learn.model)

    def before_step(self):
        params = dict(self.learn.model.named_parameters())
        self.lrs.append([h['lr'] for h in self.opt.hypers])
        self.moms.append(self.opt.hypers[-1]['mom'])
        self.epochs.append(self.epoch)
        self.free.append({name:p.requires_grad for name,p in params.items()})
        self.smooth.append(self.loss_func.label_smoothing)
        if self.keep: self.grads.append({name:None if p.grad is None else p.grad.clone() for name,p in params.items()})

    def after_step(self):
        if self.keep: self.after.append(weights(self.learn.model))

class NoValid(Callback):
    "Skips validation, after all other callbacks have run"
    order = 99
    def before_validate(self): raise CancelValidException()

class Break(Callback):
    "An interruption in the second batch of training, or in the first of validation, of the second epoch"
    order = 90
    def __init__(self, when): self.training_only = when=='train'
    def before_batch(self):
        if self.epoch!=1 or self.training!=self.training_only: return
        if self.iter==(1 if self.training_only else 0): raise KeyboardInterrupt

# Learning rates

# "0.01 for the backbone, 0.1 for new layers, halved at epochs 60, 70, 80, 90 and 100 of 120"
PAPER = [(range(0,60), .01, .1), (range(60,70), .005, .05), (range(70,80), .0025, .025), (range(80,90), .00125, .0125),
         (range(90,100), .000625, .00625), (range(100,120), .0003125, .003125)]

def test_paper_rates_at_every_epoch_and_batch():
    sched = paper_sched([.01,.01,.1])
    for epochs,body,head in PAPER:
        for e in epochs:
            pct = e/120
            for _ in range(7):
                assert sched(pct)==pytest.approx([body,body,head], rel=1e-12), e
                pct += 1/(7*120)

def test_milestones_are_stretched(make_learner):
    "In a fit of a tenth of the epochs they come after a tenth of the epochs"
    learn,watch = make_learner(),Watch(keep=False)
    learn.metrics = []
    learn.fit_paper(12, cbs=[watch,ShortEpochCallback(.2),NoValid()])
    want = {epoch//10:(body,body,head) for epochs,body,head in PAPER for epoch in epochs}
    assert set(watch.epochs)==want.keys()
    for epoch,lrs in zip(watch.epochs, watch.lrs): assert lrs==pytest.approx(want[epoch], rel=1e-6)
    assert set(watch.moms)=={.9}

def test_milestones_within_an_epoch_and_of_ones_own():
    sched = paper_sched([1.])
    assert [sched(o)[0] for o in (.5, 69.9/120, 70/120)]==[.5,.5,.25]
    own = paper_sched([1.], milestones=(2,), of=4, gamma=.1)
    assert [own(o)[0] for o in (0,.49,.5,1)]==pytest.approx([1,1,.1,.1])

def test_modern_rates():
    sched = modern_sched([1.,4.], frozen=.2, pct_start=.25, div=10, div_final=100)
    for pct,lrs,mom in ((0,[.1,.4],.95), (.2,[.1,.4],.95), (.4,[1,4],.85), (1,[.01,.04],.95)):
        assert sched['lr'](pct)==pytest.approx(lrs) and sched['mom'](pct)==pytest.approx(mom)
    assert sched['lr'](.2-1e-5)==pytest.approx([1,4], rel=1e-3)
    assert modern_sched([1.])['lr'](.25)==pytest.approx([1.])
    assert modern_sched([1.], frozen=1.)['lr'](.5)==pytest.approx([(1+.04)/2])

# The optimizer

def assert_replayed(learn, watch, step):
    "Assert that each weight after each step of the fit is what `step(w, grad, lr, mom, t, state)` makes of it"
    names = {id(p):name for name,p in learn.model.named_parameters()}
    group = {names[id(p)]:i for i,params in enumerate(learn.splitter(learn.model)) for p in params}
    weights,states = {name:w.double() for name,w in watch.start.items()},{name:{} for name in watch.start}
    assert len(watch.after)>4
    for t,(lrs,mom,grads,after) in enumerate(zip(watch.lrs, watch.moms, watch.grads, watch.after, strict=True)):
        assert grads.keys()==weights.keys()
        for name,w in weights.items():
            weights[name] = step(w, grads[name].double(), lrs[group[name]], mom, t+1, states[name])
            torch.testing.assert_close(weights[name].float(), after[name], rtol=1e-5, atol=2e-6)

def test_sgd_by_hand(make_learner):
    "Coupled L2, momentum and rates: v = 0.9 v + (g + wd w), w = w - lr v"
    learn,watch = make_learner(),Watch()
    learn.metrics = []
    learn.fit_paper(2, wd=5e-2, cbs=[watch,NoValid()])
    def step(w, g, lr, mom, t, state):
        state['v'] = mom*state.get('v', 0) + g + 5e-2*w
        return w - lr*state['v']
    assert_replayed(learn, watch, step)

def test_adamw_by_hand(make_learner):
    "Decoupled decay, a momentum that follows the schedule, bias corrections"
    learn,watch = make_learner(),Watch()
    learn.metrics = []
    adamw = torch_opt(torch.optim.AdamW, betas=(.9,.99), eps=1e-5)
    learn.fit_modern(2, 1e-4, 1e-3, wd=.1, moms=(.9,.9,.9), ema=None, opt_func=adamw, cbs=[watch,NoValid()])
    def step(w, g, lr, mom, t, state):
        state['m'] = mom*state.get('m', 0) + (1-mom)*g
        state['s'] = .99*state.get('s', 0) + .01*g*g
        mean,square = state['m']/(1-mom**t),state['s']/(1-.99**t)
        return w*(1-lr*.1) - lr*mean/(square.sqrt()+1e-5)
    assert_replayed(learn, watch, step)

def test_torchs_optimizer_is_saved_and_loaded(make_learner, tmp_path):
    learns = [make_learner(opt_func=torch_opt(torch.optim.AdamW, eps=1e-5), path=tmp_path) for _ in range(2)]
    learns[0].fit_one_cycle(1)
    learns[0].save('adamw')
    learns[1].load('adamw')
    a,b = (o.opt.state_dict() for o in learns)
    assert a['state'] and a['param_groups']==b['param_groups'] and learns[1].opt.hypers==learns[0].opt.hypers
    torch.testing.assert_close(a['state'], b['state'], rtol=0, atol=0)

def test_says_what_is_not_the_papers(make_learner, make_dls, capsys):
    learn = make_learner(neck=True, dynamic='mix')
    learn.metrics = []
    learn.fit_paper(1, cbs=ShortEpochCallback(.2))
    out = [line for line in capsys.readouterr().out.splitlines() if 'paper' in line]
    assert out==["Not the paper's loaders: images of 48×24, not 384×128; batches of 4×4, not 8×8",
                 "Not the paper's method: a BNNeck, not neck=False; "
                 "losses and batches by another rule, not dynamic=True"]
    learn = make_learner(make_dls(p=8, k=8, size=(384,128)), neck=False, dynamic=True)
    assert _unlike_paper(learn)==_unlike_method(learn)==[]
    fixed = make_learner(neck=False, dynamic=False)
    assert _unlike_method(fixed)==['losses and batches by another rule, not dynamic=True']

def test_one_group_of_weights_is_refused(make_learner):
    with pytest.raises(ValueError, match='pyramid_split'): make_learner(splitter=trainable_params).fit_paper(1)

# EMA

def plain_average(watch, decay):
    "The average over the steps that a `Watch` saw, by a plain loop"
    average = watch.start
    for t,w in enumerate(watch.after):
        d = min(decay, (1+t)/(10+t))
        average = {name:d*v+(1-d)*w[name] for name,v in average.items()}
    return average

def close(a, b): return all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-6) for name in b)

class Cancel(Callback):
    "Cancels every third step, after the gradients are computed"
    order = 11
    def before_step(self):
        if self.iter%3==2: raise CancelStepException()

class WatchSteps(Watch):
    "A `Watch` that keeps only the steps that were made"
    name,cancelled = 'watch',False
    def after_cancel_step(self): self.cancelled = True
    def after_step(self):
        if not self.cancelled: super().after_step()
        self.cancelled = False

@pytest.mark.parametrize('cb', [None, GradientAccumulation(32), Cancel()], ids=['plain','accumulated','cancelled'])
def test_average_is_the_plain_one(make_learner, cb):
    learn,watch,ema = make_learner(),WatchSteps(),EMA(.2)
    learn.metrics = []
    learn.fit(1, cbs=[*([cb] if cb else []),watch,ema,NoValid()])
    n_batches = len(learn.dls.train)
    assert 0<len(watch.after)<n_batches if cb else len(watch.after)==n_batches
    assert close(weights(learn.model), plain_average(watch, .2))
    assert not close(weights(learn.model), watch.after[-1])

class AtValidation(Callback):
    "State of the model after validation, at the end of an epoch, and before training"
    order = 95
    def __init__(self): self.valid,self.end,self.train = [],[],[]
    def after_validate(self): self.valid.append(copied(self.learn.model))
    def after_epoch(self): self.end.append(copied(self.learn.model))
    def before_train(self): self.train.append(weights(self.learn.model))

def test_validates_with_the_average_and_trains_with_its_own(make_learner):
    learn,watch,at = make_learner(),Watch(),AtValidation()
    learn.fit(3, cbs=[watch,at,EMA(.9)])
    n = len(learn.dls.train)
    for epoch in range(3):
        so_far = copy.copy(watch)
        so_far.after = watch.after[:(epoch+1)*n]
        validated = {name:at.valid[epoch][name] for name in watch.start}
        assert close(validated, plain_average(so_far, .9)) and same(at.valid[epoch], at.end[epoch])
        if epoch: assert same(at.train[epoch], watch.after[epoch*n-1])
    assert same(copied(learn.model), at.valid[-1])
    mAP = learn.recorder.values[-1][list(learn.recorder.metric_names).index('mAP')-1]
    assert learn.evaluate().mAP==pytest.approx(mAP, abs=1e-6)

def test_training_is_the_same_with_and_without_average(make_learner):
    res = []
    for cbs in ([], [EMA()]):
        learn,watch = make_learner(),Watch()
        learn.metrics = []
        set_seed(3)
        learn.dls.train.rng.seed(3)
        learn.fit(2, cbs=[watch,*cbs,ShortEpochCallback(.4),NoValid()])
        res.append(watch.after)
    assert all(same(a, b) for a,b in zip(*res))

def test_buffers_are_the_models(make_learner):
    learn,at = make_learner(),AtValidation()
    own = []
    at.after_train = lambda: own.append({k:v.clone() for k,v in learn.model.named_buffers()})
    learn.fit(1, cbs=[at,EMA()])
    assert same(own[-1], {k:v for k,v in learn.model.named_buffers()})

def test_saved_model_is_the_measured_one(make_learner):
    learn,at = make_learner(),AtValidation()
    learn.fit(3, cbs=[at,EMA(.9),SaveModelCallback(monitor='mAP')])
    rows = [v[list(learn.recorder.metric_names).index('mAP')-1] for v in learn.recorder.values]
    assert same(copied(learn.model), at.valid[rows.index(max(rows))])

def test_a_fit_cancelled_in_training_ends_with_the_average(make_learner):
    learn,watch = make_learner(),Watch()
    class Stop(Callback):
        order = 99
        def after_batch(self):
            if self.training and self.epoch==1: raise CancelFitException()
    learn.metrics = []
    learn.fit(3, cbs=[watch,Stop(),NoValid(),EMA(.9)])
    assert close(weights(learn.model), plain_average(watch, .9))

def test_not_in_lr_find(make_learner):
    ema = EMA()
    learn = make_learner(cbs=ema)
    learn.metrics,before = [],copied(learn.model)
    learn.lr_find(num_it=8, show_plot=False)
    assert same(copied(learn.model), before) and ema.n_steps==0
    learn.validate()
    assert same(copied(learn.model), before)

def test_frozen_weights_stay_to_the_bit(make_learner):
    "Also after an epoch of training, from which fastai leaves gradients of zero"
    learn,watch = make_learner(),Watch()
    learn.metrics = []
    learn.fit(1, cbs=[ShortEpochCallback(.2),NoValid()])
    learn.fit_modern(2, 1e-4, 1e-3, frozen_epochs=1, wd=.5, label_smoothing=.1, cbs=[watch,NoValid()])
    n = len(learn.dls.train)
    conv = [k for k,f in watch.free[0].items() if not f]
    assert conv and all(k.startswith('body') for k in conv) and all(all(f.values()) for f in watch.free[n:])
    assert all(torch.equal(watch.start[k], w[k]) for w in watch.after[:n] for k in conv)
    assert not any(torch.equal(watch.start[k], watch.after[-1][k]) for k in conv)
    assert set(watch.smooth)=={.1}

@pytest.mark.parametrize('when', ['after_epoch','after_batch'])
def test_state_is_taken_up(make_learner, when):
    "Model and state of the same moment, loaded into new objects, give the same average from there on"
    class Keep(Callback):
        order = 97
        def keep(self):
            if not hasattr(self, 'kept') and len(watch.after)>=3:
                self.kept = copied(self.learn.model),copy.deepcopy(self.learn.ema.state_dict()),len(watch.after)
    setattr(Keep, when, Keep.keep)
    learn,watch,keep = make_learner(),Watch(),Keep()
    learn.metrics = []
    learn.fit(2, cbs=[watch,keep,ShortEpochCallback(.4),EMA(.9),NoValid()])
    model,state,n = keep.kept
    assert state['averaged']==(when=='after_epoch') and state['n_steps']==n
    values = [*state['weights'].values(), state['averaged'], state['n_steps']]
    assert all(isinstance(v, (torch.Tensor,bool,int)) for v in values)
    later,ema = make_learner(),EMA(.9)
    later.model.load_state_dict(model)
    ema.load_state_dict(state)
    ema.learn = later
    ema.before_fit()
    ema.before_train()
    assert same(weights(later.model), watch.after[n-1])
    for w in watch.after[n:]:
        later.model.load_state_dict(w, strict=False)
        ema.after_step()
    ema.after_fit()
    assert same(weights(later.model), weights(learn.model))

def test_state_of_another_model_is_refused(make_learner):
    ema = EMA()
    ema.load_state_dict(dict(weights=dict(a=torch.zeros(1)), averaged=False, n_steps=1))
    with pytest.raises(ValueError, match='another model'): make_learner(cbs=ema).fit(1)

@pytest.mark.parametrize('decay', [1.,-.1])
def test_impossible_decay(decay):
    with pytest.raises(ValueError, match='decay'): EMA(decay)

# What is left behind

def settings(learn):
    "What a recipe must restore"
    return dict(opt_func=learn.opt_func, opt=learn.opt, cbs=list(learn.cbs), smooth=learn.loss_func.label_smoothing,
                mode=learn.dls.train.mode, grad=[p.requires_grad for p in learn.model.parameters()],
                frozen=getattr(learn.opt, 'frozen_idx', None))

@pytest.mark.parametrize('dynamic,frozen', [(True,False),(False,True)])
@pytest.mark.parametrize('fit', ['fit_paper','fit_modern'])
def test_learner_is_as_before(make_learner, fit, dynamic, frozen):
    learn = make_learner(dynamic=dynamic)
    learn.loss_func.label_smoothing = .03
    if frozen: learn.freeze()
    before,was = settings(learn),copied(learn.model)
    learn.metrics = []
    getattr(learn, fit)(2, cbs=[ShortEpochCallback(.2),NoValid()])
    assert settings(learn)==before
    assert len(learn.recorder.values)==2 and not same(copied(learn.model), was)
    learn.fit(1, cbs=ShortEpochCallback(.2))

@pytest.mark.parametrize('when', ['train','valid'])
@pytest.mark.parametrize('fit', ['fit_paper','fit_modern'])
def test_also_after_an_interruption(make_learner, fit, when):
    learn,watch = make_learner(),Watch()
    learn.freeze()
    learn.metrics,before = [],settings(learn)
    with pytest.raises(KeyboardInterrupt): getattr(learn, fit)(3, cbs=[watch,EMA(.9),Break(when)])
    assert settings(learn)==before
    assert same(weights(learn.model), watch.after[-1])
    learn.fit(1, cbs=ShortEpochCallback(.2))

def test_smoothing_needs_a_loss_that_has_it(make_learner):
    class Bare(torch.nn.Module):
        def forward(self, pred, target): return 0
    learn = make_learner(loss_func=Bare(), dynamic=False)
    with pytest.raises(ValueError, match='label_smoothing'): learn.fit_modern(1, label_smoothing=.1)

def test_impossible_epochs(make_learner):
    with pytest.raises(ValueError, match='frozen_epochs=3'): make_learner().fit_modern(2, frozen_epochs=3)

def test_one_average_is_enough(make_learner):
    learn,ema,watch = make_learner(),EMA(.5),Watch()
    learn.metrics = []
    learn.fit_modern(1, cbs=[ema,watch,NoValid()])
    assert ema.n_steps==len(watch.after) and close(weights(learn.model), plain_average(watch, .5))

# Images

def test_validation_images_are_only_resized(make_dls):
    item,batch = strong_tfms((48,24), pad=8, erase=1., colour=.5)
    strong,usual = make_dls(item_tfms=item, batch_tfms=batch),make_dls()
    for (a,_),(b,_) in zip(strong.valid, usual.valid): assert torch.equal(a, b)
    item,batch = strong_tfms((48,24))
    other = make_dls(item_tfms=item, batch_tfms=batch).test_dl(list(usual.valid.items.fn[:3]))
    assert torch.equal(other.one_batch()[0], usual.valid.one_batch()[0][:3])

def test_every_training_image_has_its_own_draw(make_dls):
    item,batch = strong_tfms((48,24), erase=0)
    dls = make_dls(item_tfms=item, batch_tfms=batch)
    dls.train.before_iter()
    images = torch.stack([dls.train.after_item(dls.train_ds[0])[0] for _ in range(8)])
    assert images.shape==(8,3,48,24) and len(images.flatten(1).unique(dim=0))==8

def test_crop_moves_by_up_to_the_padding():
    from fastai.vision.all import PILImage
    from PIL import Image
    im = PILImage.create(Image.new('RGB', (24,48), 'white'))
    seen,crop = set(),PadCrop(3)
    for _ in range(400):
        out = crop(im, split_idx=0)
        assert type(out) is PILImage and out.size==(24,48)
        seen.add(out.getbbox())
    assert seen=={(max(0,-x), max(0,-y), 24-max(0,x), 48-max(0,y)) for x in range(-3,4) for y in range(-3,4)}
    assert crop(im, split_idx=1).getbbox()==(0,0,24,48)

def test_parts_of_the_transforms_can_be_left_out():
    item,batch = strong_tfms(pad=0, erase=0, colour=0)
    assert not batch and not any(isinstance(o, (PadCrop,ColourJitter)) for o in item)
    assert isinstance(strong_tfms()[1][0], EraseEach)

def test_fit_modern_with_a_device_by_its_name(make_dls, make_learner):
    "As `pyramidreid train … --device cpu` passes it"
    dls = make_dls(device='cpu')
    assert dls.device==dls.train.device==dls.valid.device==torch.device('cpu')
    learn = make_learner(dls)
    learn.fit_modern(1)
    assert learn.model.trained
    assert dls.to('meta').device==torch.device('meta') and dls.new_empty().device==torch.device('meta')

def test_averages_of_a_compiled_model_have_the_names_of_a_plain_one(make_learner):
    "So that checkpoints of a compiled model resume a plain one"
    learn = make_learner()
    learn.model = torch.compile(learn.model, backend='eager')
    ema = EMA()
    ema.learn = learn
    assert ema._copies().keys()==dict(make_learner().model.named_parameters()).keys()
