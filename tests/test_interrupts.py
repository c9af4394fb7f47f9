"Any exception at any event of a fit, `lr_find`, `validate` or `get_preds`: the next fit is as a fresh learner's"
import random
import signal
import threading
import warnings
from functools import partial

import pytest
import torch
from fastai.callback import fp16, schedule  # noqa: F401, for to_fp16 and lr_find
from fastai.callback.core import *
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import TerminateOnNaNCallback, TrackerCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from toys import Branches, Vectors, quiet, toy_learner

from pyramidreid.data.sampler import PKDataLoader
from pyramidreid.models.losses import PyramidLoss
from pyramidreid.training.base_learner import ReIDLearner
from pyramidreid.training.checkpoints import FiniteLoss
from pyramidreid.training.dynamic_losses import DynamicLossWeights
from pyramidreid.training.progress import LossParts
from pyramidreid.training.recipes import EMA

ERRORS = [KeyboardInterrupt, RuntimeError, CancelFitException]
EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward',
          'after_backward', 'before_step', 'after_step', 'after_batch', 'after_train', 'before_validate',
          'after_validate', 'after_epoch', 'after_fit']
CANCELLED = {'batch':CancelBatchException, 'backward':CancelBackwardException, 'step':CancelStepException,
             'train':CancelTrainException, 'validate':CancelValidException, 'epoch':CancelEpochException,
             'fit':CancelFitException}
IN_VALIDATION = ['before_batch', 'after_pred', 'after_loss', 'after_batch']

class Raise(Callback):
    "Raise `error` at an event; of those that every batch has, at the second in training, or the first in validation"
    def __init__(self, event, error, order=99, training=True):
        self.order,self.error,self.in_training,self.n_seen = order,error,training,0
        self.of_batch = event in IN_VALIDATION
        self.at = 2 if self.of_batch and training else 1
        setattr(self, event, self._happen)

    def _happen(self):
        if self.of_batch and self.learn.training!=self.in_training: return
        self.n_seen += 1
        if self.n_seen==self.at: raise self.error('on purpose')

def cancelled(kind, error, order):
    "Callbacks that raise at `after_cancel_…`, and the exception before it that fastai knows"
    before = 'before_fit' if kind=='fit' else f'before_{kind}'
    return [Raise(f'after_cancel_{kind}', error, order), Raise(before, CANCELLED[kind], order=98)]

def small_toy():
    "Four batches in an epoch"
    return toy_learner(train=PKDataLoader(Vectors(32), p=4, k=2, shuffle=True, num_workers=0, mode='random'))

def make(cls=ReIDLearner, path=None, more=(), **kwargs):
    "A learner of two branches, with all callbacks of ours that have a state"
    toy,parts = small_toy(),LossParts()
    cbs = [parts, DynamicLossWeights(), EMA(.5), FiniteLoss(), TrackerCallback(monitor='train_loss'), *more]
    learn = cls(toy.dls, toy.model, PyramidLoss(), opt_func=partial(SGD, mom=.9), lr=.1, cbs=cbs,
                metrics=parts.columns, path=path, **kwargs)
    quiet(learn)
    learn.rows = []
    learn.logger = lambda row: learn.rows.append(list(row)[:-1])
    return learn

def start_again(learn, zero_grad=False):
    "Weights, optimizer, random numbers and dynamic training as in a fresh learner"
    learn.model.load_state_dict(small_toy().model.state_dict())
    if zero_grad: learn.model.zero_grad()
    learn.opt,learn.rows = None,[]
    learn.dynamic_loss_weights.dynamics.reset()
    learn.dynamic_loss_weights.steps.clear()
    learn.dls.train.rng = random.Random(3)
    torch.manual_seed(3)
    return learn

def run(learn):
    "What a fit did, as text and tensors"
    learn.fit(2)
    steps = str(learn.dynamic_loss_weights.steps)
    rows = str(learn.rows), str([list(row) for row in learn.recorder.values]), str(learn.recorder.losses)
    return steps,rows,[p.detach().clone() for p in learn.model.parameters()]

@pytest.fixture(scope='module')
def fresh():
    "What a fit of a fresh learner does"
    steps,rows,weights = run(start_again(make()))
    assert steps.count("'mode'")==8 and 'random' in steps and 'pk' in steps and 'nan' in steps
    return steps,rows,weights

def assert_as(fresh, learn):
    steps,rows,weights = run(learn)
    assert steps==fresh[0]
    assert rows==fresh[1]
    assert all(torch.equal(a, b) for a,b in zip(weights, fresh[2], strict=True))

def assert_tidy(learn):
    "Nothing is left of an earlier fit"
    assert learn.dls.train.mode=='random' and 'given_mode' not in vars(learn.dls.train)
    assert 'wanted' not in vars(learn.loss_func)
    assert all(cb.run for cb in learn.cbs) and not learn._grab_cbs(Raise) and not hasattr(learn, 'raise')
    assert not learn.ema.active and not learn.ema.weights and not learn.lock.locked()
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

def interrupt(run, error, cbs):
    "Call `run`; it ends with `error`, or, if fastai expects that, without"
    try: run()
    except error: pass
    assert cbs[0].n_seen>=cbs[0].at # The event came

def order_of(error):
    "Before all other callbacks, or after them"
    return -99 if error is RuntimeError else 99

def cases(error):
    "For each event, in training and in validation: what to add to a fit"
    order = order_of(error)
    for event in EVENTS: yield [Raise(event, error, order)]
    for event in IN_VALIDATION: yield [Raise(event, error, order, training=False)]
    for kind in CANCELLED: yield cancelled(kind, error, order)

@pytest.mark.parametrize('error', ERRORS)
def test_any_exception_at_any_event_of_a_fit(fresh, error):
    learn = make()
    for cbs in cases(error):
        start_again(learn)
        interrupt(partial(learn.fit, 1, cbs=cbs), error, cbs)
        assert_tidy(learn)
        assert_as(fresh, start_again(learn))

@pytest.mark.parametrize('error', ERRORS)
def test_a_plain_learner(fresh, error):
    "The callbacks alone; a gradient that fastai's own learner leaves behind is removed here"
    learn = make(Learner)
    learn.remove_cbs(TrackerCallback) # One of fastai's, which stays switched off
    for cbs in cases(error):
        start_again(learn, zero_grad=True)
        interrupt(partial(learn.fit, 1, cbs=cbs), error, cbs)
        assert_as(fresh, start_again(learn, zero_grad=True))
        assert learn.dls.train.mode=='random'

FIND_EVENTS = [event for event in EVENTS if event not in ('before_validate','after_validate')] # It does not validate

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_any_exception_at_any_event_of_lr_find(fresh, tmp_path, error):
    "The weights are those of before, and no file is left"
    learn = make(path=tmp_path)
    for event in FIND_EVENTS:
        start_again(learn)
        before = [p.detach().clone() for p in learn.model.parameters()]
        with pytest.raises(error), learn.added_cbs(Raise(event, error, order_of(error))):
            learn.lr_find(num_it=6, start_lr=1e-3, end_lr=1, show_plot=False)
        assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters(), strict=True)), event
        assert not list((tmp_path/'models').glob('*')), event
        assert_tidy(learn)
        assert_as(fresh, start_again(learn))

@pytest.mark.parametrize('error', ERRORS)
@pytest.mark.parametrize('call', ['validate','get_preds'])
def test_any_exception_at_any_event_of_a_validation(fresh, call, error):
    learn = make()
    around = ['before_fit','before_epoch','before_validate','after_validate','after_epoch','after_fit']
    for event in around+IN_VALIDATION:
        start_again(learn)
        cb = Raise(event, error, order_of(error), training=False)
        interrupt(partial(getattr(learn, call), cbs=cb), error, [cb])
        assert_tidy(learn)
        assert_as(fresh, start_again(learn))

def test_metrics_after_an_interrupted_validation(make_learner):
    "Embeddings of the validation that was interrupted do not count in the next"
    learn = make_learner()
    dl = learn.dls.valid.new(bs=8)
    want = list(learn.validate(dl=dl))[3:]
    with pytest.raises(KeyboardInterrupt):
        learn.validate(dl=dl, cbs=Raise('after_batch', KeyboardInterrupt, training=False))
    assert list(learn.validate(dl=dl))[3:]==want and 0<want[0]<1

class Unplugged(Vectors):
    "A data set that is interrupted at its 20th item"
    error,n_read = None,0
    def __getitem__(self, i):
        self.n_read += 1
        if self.error and self.n_read==20: raise self.error('unplugged')
        return super().__getitem__(i)

@pytest.mark.parametrize('num_workers,error', [(0,KeyboardInterrupt), (0,OSError), (1,OSError)])
def test_interrupted_in_the_loader(fresh, num_workers, error):
    learn,data = make(),Unplugged(64)
    given = learn.dls
    broken = PKDataLoader(data, p=4, k=2, shuffle=True, num_workers=num_workers, mode='random')
    learn.dls,data.error = DataLoaders(broken, given.valid),error
    with pytest.raises(error, match='unplugged'): learn.fit(1)
    assert_tidy(learn)
    learn.dls = given
    assert_as(fresh, start_again(learn))

@pytest.mark.skipif(not hasattr(signal, 'pthread_kill'), reason='needs signals to threads')
def test_a_real_ctrl_c(fresh):
    "Sent by another thread, wherever the fit happens to be"
    learn,main = make(),threading.main_thread().ident
    for seconds in (.02,.05,.1):
        start_again(learn)
        timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            learn.fit(1000)
        assert_tidy(learn)
        assert_as(fresh, start_again(learn))

def test_another_learner_on_the_same_loader(fresh):
    "It trains without dynamic training, on batches of the mode that was given"
    learn = make()
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Raise('after_step', RuntimeError))
    seen = []
    watch = Callback(after_batch=lambda self: seen.append(self.dls.train.mode))
    quiet(Learner(learn.dls, Branches(), PyramidLoss(), lr=.1, cbs=watch)).fit(1)
    assert set(seen)=={'random'}

# Averaged weights

class LastStep(Callback):
    "The weights after the last step"
    order = 13
    def after_step(self): self.last = [p.detach().clone() for p in self.model.parameters()]

@pytest.mark.parametrize('n_swaps', [1,2,3])
@pytest.mark.parametrize('n_copied', [0,1,2,4])
def test_interrupted_while_the_averages_change_places(monkeypatch, n_swaps, n_copied):
    "However many weights have been copied, the model has its own again"
    learn,watch = make(),LastStep()
    copy,calls = EMA._copy_to_model,[]
    def some(self, weights):
        calls.append(1)
        if len(calls)!=n_swaps: return copy(self, weights)
        params = list(self._params().items())
        with torch.no_grad():
            for name,p in params[:n_copied]: p.copy_(weights[name])
        raise KeyboardInterrupt
    monkeypatch.setattr(EMA, '_copy_to_model', some)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=watch)
    assert len(calls)==n_swaps+1 # And once to give them back
    assert all(torch.equal(a, b) for a,b in zip(watch.last, learn.model.parameters(), strict=True))

def test_validate_in_the_middle_of_a_fit_changes_nothing(fresh):
    "fastai's `validate` tells all callbacks that a fit begins and ends"
    class Nosy(Callback):
        order = 70
        def after_epoch(self):
            if self.learn.lock.locked(): return
            kept = [(cb,vars(cb).copy()) for cb in (self.recorder, self.tracker)]
            epoch,train_iter,pct = self.epoch,self.train_iter,self.pct_train
            self.learn.validate()
            self.learn.epoch,self.learn.train_iter,self.learn.pct_train = epoch,train_iter,pct
            for cb,state in kept: vars(cb).update(state)
    learn = start_again(make(more=[Nosy()]))
    steps,rows,weights = run(learn)
    assert steps==fresh[0]
    assert all(torch.equal(a, b) for a,b in zip(weights, fresh[2], strict=True))
    assert_tidy(learn)

# Bars, callbacks of one fit, mixed precision

def test_bars_and_logger_after_an_interruption():
    learn,lines = make(),[]
    learn.logger = log = lambda row: lines.append(list(row))
    learn.add_cb(ProgressCallback)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Raise('after_step', KeyboardInterrupt))
    assert learn.logger is log and not {'mbar','pbar'} & vars(learn.progress).keys()
    with learn.no_bar(): learn.fit(1)
    assert len(lines)==1 and learn.logger is log
    with learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Raise('after_step', KeyboardInterrupt))
    assert learn.logger is log

def test_callbacks_of_a_fit_are_gone_if_one_cannot_be_added():
    class Refused(Callback):
        def __init__(self): raise ValueError('refused')
    learn = make()
    before = list(learn.cbs)
    with pytest.raises(ValueError, match='refused'): learn.fit(1, cbs=[Raise('after_fit', RuntimeError), Refused])
    assert list(learn.cbs)==before and not hasattr(learn, 'raise')
    ema = learn.ema
    learn.fit(1, cbs=[LastStep, EMA(.9)]) # A class, and one whose name is taken
    assert list(learn.cbs)==before and learn.ema is ema

def autocast_depth():
    depth = torch.autocast_increment_nesting()-1
    torch.autocast_decrement_nesting()
    return depth

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('error', [*ERRORS,CancelBatchException])
@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss'])
def test_autocasting_ends_with_its_batch(event, error):
    "fastai's mixed precision ends it in `after_loss`, which may never come"
    learn = make().to_fp16()
    assert autocast_depth()==0
    cb = Raise(event, error, order=9 if event=='after_loss' else 99)
    interrupt(partial(learn.fit, 1, cbs=cb), error, [cb])
    assert autocast_depth()==0

# A loss that is not finite

class Ended(Callback):
    "Counts how often a fit has ended, and sees how"
    order = 90
    def __init__(self): self.n_fit,self.n_cancelled = 0,0
    def after_fit(self): self.n_fit += 1
    def after_cancel_fit(self): self.n_cancelled += 1

class Poison(Callback):
    "A loss that is not finite at the third step, as if the network had computed it"
    order,run_valid = -99,False
    def __init__(self, value=float('nan')): self.value = value
    def after_loss(self):
        if self.train_iter!=2: return
        parts = self.loss_func.parts
        parts['id'] = parts['id']*self.value
        self.learn.loss_grad = sum(parts.values())
        self.learn.loss = self.loss_grad.clone()

def poisoned(cls=ReIDLearner, cbs=(), value=float('nan'), **kwargs):
    learn = toy_learner(cbs=[DynamicLossWeights(),Poison(value),*cbs], **kwargs)
    if cls is Learner: return learn
    return quiet(ReIDLearner(learn.dls, learn.model, PyramidLoss(), opt_func=learn.opt_func, lr=.1, **kwargs,
                             cbs=[DynamicLossWeights(),EMA(.5),Poison(value),*cbs]))

@pytest.mark.parametrize('value', [float('nan'),float('inf')])
@pytest.mark.parametrize('cls', [Learner,ReIDLearner])
@pytest.mark.parametrize('finite_loss', [False,True])
def test_terminate_on_nan_ends_the_fit_as_fastai_does(cls, value, finite_loss):
    "Without an error, with `after_fit`, before the weights are harmed; and with a warning that says what happened"
    ended = Ended()
    learn = poisoned(cls, [TerminateOnNaNCallback(), ended] + [FiniteLoss()]*finite_loss, value)
    with pytest.warns(UserWarning, match='TerminateOnNaNCallback ends the fit'): learn.fit(2)
    assert (ended.n_fit,ended.n_cancelled)==(1,1)
    assert len(learn.dynamic_loss_weights.steps)==2 and not learn.recorder.values
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert learn.dls.train.mode=='pk' and 'wanted' not in vars(learn.loss_func)
    learn.remove_cbs([Poison,TerminateOnNaNCallback])
    learn.fit(1)
    assert len(learn.dynamic_loss_weights.steps)==2+8

@pytest.mark.parametrize('cls', [Learner,ReIDLearner])
@pytest.mark.parametrize('finite_loss,error', [(False,ValueError), (True,FloatingPointError)])
def test_without_it_the_error_comes_after_the_end_of_the_fit(cls, finite_loss, error):
    ended = Ended()
    learn = poisoned(cls, [ended] + [FiniteLoss()]*finite_loss)
    with pytest.raises(error, match='nan'): learn.fit(2)
    assert (ended.n_fit,ended.n_cancelled)==(1,1)
    assert learn.dls.train.mode=='pk' and 'wanted' not in vars(learn.loss_func)
    if cls is ReIDLearner: assert not learn.ema.active
    learn.remove_cbs(Poison)
    learn.fit(1)
    assert len(learn.dynamic_loss_weights.steps)==2+8

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('cls', [Learner,ReIDLearner])
@pytest.mark.parametrize('more', [(),(TerminateOnNaNCallback,)])
def test_mixed_precision_ends_with_a_loss_that_is_not_finite(cls, more):
    learn = poisoned(cls, more).to_fp16()
    try: learn.fit(1)
    except ValueError: assert not more
    assert autocast_depth()==0
    learn.remove_cbs(Poison)
    learn.fit(1)
    assert len(learn.dynamic_loss_weights.steps)==2+8

def test_a_failing_after_fit_does_not_hide_why():
    class Fail(Callback):
        def after_fit(self): raise OSError('disk full')
    with pytest.raises(ValueError, match='not finite') as raised: poisoned(cbs=[Fail()]).fit(1)
    assert 'disk full' in str(raised.value.__cause__)

def test_lr_find_may_diverge(tmp_path):
    "There a loss that is not finite is no reason to stop"
    learn = make(path=tmp_path, more=[Poison()])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1, cbs=schedule.LRFinder(num_it=6))
    assert_tidy(learn)
