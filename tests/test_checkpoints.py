"Runs that are killed or run out of disk space, damaged or foreign checkpoints, and a loss that is not finite"
import errno
import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import EarlyStoppingCallback, SaveModelCallback, set_seed
from ranks import tiny

from pyramidreid.core import atomic_write
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.training.checkpoints import *
from pyramidreid.training.recipes import torch_opt


@pytest.fixture(scope='module')
def make_learner(make_learner):
    "`make_learner` with a network of few channels"
    def make(dls=None, **kwargs): return make_learner(dls, **{'arch':tiny, **kwargs})
    return make

SCRIPT = '''
import os, random, signal, sys, torch, warnings
warnings.filterwarnings('ignore')
from pathlib import Path
from fastai.callback.core import Callback
from fastai.vision.all import set_seed
from pyramidreid.models.backbone import resnet10
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.training.learner import pyramid_learner
from pyramidreid.training.checkpoints import Checkpoints

class Mark(Callback):
    "Print each step, and kill this process after a random one of the second or third epoch"
    order,run_valid = 99,False
    def after_batch(self):
        n,seed = self.n_iter,os.environ.get('KILL')
        print('step', self.train_iter, flush=True)
        if not seed: return
        last = random.Random(float(seed)).randint(n+1, 3*n-1)
        if self.train_iter==last: os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
for path in map(Path, sys.argv[2:]):
    set_seed(0)
    dls = ReIDDataLoaders.from_market(sys.argv[1], p=4, k=2, size=(48,24), num_workers=0)
    learn = pyramid_learner(dls, resnet10, pretrained=False, n_parts=3, emb_sz=8, path=path, cbs=Mark())
    learn.fit_one_cycle(3, 3e-3, cbs=Checkpoints(resume=True))
    card = learn.evaluate()
    rec = learn.recorder
    end = dict(
        model=learn.model.state_dict(), values=[list(row) for row in rec.values],
        hps={name:[float(v) for v in values] for name,values in rec.hps.items()},
        losses=[float(loss) for loss in rec.losses], steps=learn.dynamic_loss_weights.history.to_csv(),
        card=card.words(), mAP=card.mAP)
    torch.save(end, path/'end.pth')
'''

def same_tree(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same_tree, a, b))
    return a==b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))

@pytest.mark.slow # Starts two processes that train
@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL')
def test_killed_at_a_random_step_and_resumed_ends_the_same(people, tmp_path):
    "A real process and a real SIGKILL; another process resumes the run, and trains the whole as well"
    script,killed,whole = tmp_path/'train.py',tmp_path/'killed',tmp_path/'whole'
    script.write_text(SCRIPT)
    for folder in (killed,whole): folder.mkdir()
    seed,command = str(time.time()),[sys.executable,script,people]
    victim = subprocess.run([*command,killed], stdout=subprocess.DEVNULL, env={**os.environ,'KILL':seed}, timeout=600)
    assert victim.returncode==-signal.SIGKILL and not (killed/'end.pth').exists()
    out = subprocess.run([*command,killed,whole], stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout
    resumed,undisturbed = out.split('starting from the beginning')
    assert 'Resumed from' in resumed and 'step 1\n' not in resumed and 'step 1\n' in undisturbed, out
    ends = [torch.load(folder/'end.pth', weights_only=True) for folder in (whole,killed)]
    assert same_tree(*ends), f'KILL={seed}'
    assert not list((killed/'checkpoints').glob('.partial-*'))

class Plug(Callback):
    "Interrupt a fit before an epoch"
    order = 95
    def __init__(self, fit=1, epoch=1): self.fit_no,self.at = fit,epoch
    def before_train(self):
        if self.checkpoints.n_fits==self.fit_no and self.epoch==self.at: raise RuntimeError('the plug')

def names(folder): return sorted(file.name for file in folder.iterdir())
def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def table(learn): return [list(row) for row in learn.recorder.values]
def pull(run, cb, **kwargs):
    "Interrupt a fit"
    with pytest.raises(RuntimeError, match='the plug'): run([cb, Plug(**kwargs)])

class EMA(Callback):
    "A moving average with a `state_dict`"
    order,run_valid = 80,False
    def before_fit(self): self.avg = {k:v.clone().float() for k,v in self.model.state_dict().items()}
    def after_batch(self):
        for k,v in self.model.state_dict().items(): self.avg[k].lerp_(v.float(), .1)
    def state_dict(self): return self.avg
    def load_state_dict(self, sd): self.avg = {k:v.clone() for k,v in sd.items()}

def busy_learner(make_learner, **kwargs):
    "A learner with callbacks that have all kinds of state, and a log of its table"
    cbs = [EMA(), GradientAccumulation(40), SaveModelCallback(monitor='mAP'),
           EarlyStoppingCallback(monitor='mAP', patience=9)]
    learn = make_learner(cbs=cbs, **kwargs)
    learn.logged = []
    learn.logger = lambda row: learn.logged.append(list(row)[:-1])
    return learn

def test_everything_comes_back(make_learner):
    "EMA, a half sum of gradients, the best mAP so far, the patience used up, the table"
    whole = busy_learner(make_learner)
    whole.fit_flat_cos(3, 3e-3, cbs=Checkpoints())
    cut = busy_learner(make_learner)
    pull(lambda cbs: cut.fit_flat_cos(3, 3e-3, cbs=cbs), Checkpoints(), epoch=2)
    again = busy_learner(make_learner, path=cut.path)
    random.random()
    torch.rand(3)
    again.fit_flat_cos(3, 3e-3, cbs=Checkpoints(resume=True))
    assert same_tree(weights(whole), weights(again)) and same_tree(whole.ema.avg, again.ema.avg)
    assert same_tree(whole.logged, again.logged)
    assert whole.save_model.best==again.save_model.best and whole.early_stopping.wait==again.early_stopping.wait
    assert whole.gradient_accumulation.count==again.gradient_accumulation.count
    assert whole.recorder.hps==again.recorder.hps and whole.recorder.iters==again.recorder.iters
    assert whole.dynamic_loss_weights.history.equals(again.dynamic_loss_weights.history)
    again.recorder.plot_loss() # What was restored has the types that fastai expects
    again.dynamic_loss_weights.plot()
    again.validate()

def test_checkpoints_change_nothing(make_learner):
    plain = make_learner()
    plain.fit_one_cycle(2, 3e-3)
    kept = make_learner()
    kept.fit_one_cycle(2, 3e-3, cbs=Checkpoints(keep=1))
    assert same_tree(weights(plain), weights(kept))
    assert names(kept.path/'checkpoints')==['1-0002.pth'] and not hasattr(kept, 'finite_loss')

slow = pytest.mark.slow

@pytest.mark.parametrize('fit,epoch', [pytest.param(1, 1, marks=slow), (2,0), pytest.param(2, 1, marks=slow)])
def test_fine_tune(make_learner, fit, epoch):
    "Two fits with one callback, interrupted in either"
    tune = lambda learn, cbs: learn.fine_tune(2, 3e-3, freeze_epochs=2, cbs=cbs)
    whole = make_learner()
    tune(whole, Checkpoints(keep=9))
    cut = make_learner()
    pull(lambda cbs: tune(cut, cbs), Checkpoints(keep=9), fit=fit, epoch=epoch)
    again = make_learner(path=cut.path)
    tune(again, Checkpoints(keep=9, resume=True))
    assert same_tree(weights(whole), weights(again)) and same_tree(table(whole), table(again))

@pytest.mark.parametrize('recipe', ['fit_paper','fit_modern'])
def test_recipes(make_learner, recipe):
    "PyTorch's optimizers, the frozen epoch, the averaged weights: interrupted, and resumed by another learner"
    run = lambda learn, cbs: getattr(learn, recipe)(3, lr_body=1e-3, lr_head=3e-3, cbs=cbs)
    whole = make_learner()
    run(whole, Checkpoints())
    cut = make_learner()
    pull(lambda cbs: run(cut, cbs), Checkpoints(), epoch=2)
    again = make_learner(path=cut.path)
    run(again, Checkpoints(resume=True))
    assert same_tree(weights(whole), weights(again)) and same_tree(table(whole), table(again))
    assert whole.recorder.hps==again.recorder.hps
    other,adam = make_learner(path=cut.path),torch_opt(torch.optim.Adam)
    with pytest.raises(ValueError, match='optimizer: SGD, 3 groups in the checkpoint, Adam, 3'):
        other.fit_modern(3, lr_body=1e-3, lr_head=3e-3, opt_func=adam, cbs=Checkpoints(resume=True))

def test_with_workers(make_learner, make_dls):
    "Worker processes take their seeds from states that were kept"
    def run(cbs, **kwargs):
        set_seed(0) # Before the loaders are made
        learn = make_learner(make_dls(num_workers=1, k=2), **kwargs)
        learn.fit(2, cbs=cbs)
        return learn
    whole = run(Checkpoints())
    with pytest.raises(RuntimeError, match='the plug'): run([Checkpoints(), Plug()], path=whole.path/'cut')
    again = run(Checkpoints(resume=True), path=whole.path/'cut')
    assert same_tree(weights(whole), weights(again))

def test_a_finished_run_is_not_trained_again(make_learner, capsys):
    learn = make_learner()
    learn.fit(2, cbs=Checkpoints())
    again = make_learner(path=learn.path)
    again.fit(2, cbs=Checkpoints(resume=True))
    assert same_tree(weights(learn), weights(again)) and same_tree(table(learn), table(again))
    assert '2 of 2 epochs are done' in capsys.readouterr().out

@pytest.fixture
def done(make_learner):
    "A learner after two epochs, with both checkpoints"
    learn = make_learner()
    learn.fit(2, cbs=Checkpoints())
    return learn,sorted((learn.path/'checkpoints').iterdir())

@pytest.mark.parametrize('harm', ['cut','empty','bit','foreign'])
def test_a_damaged_newest_checkpoint_is_skipped(make_learner, done, capsys, harm):
    learn,files = done
    data = bytearray(files[1].read_bytes())
    if harm=='bit': data[len(data)//2] ^= 255
    if harm=='foreign': torch.save({'a':1}, files[1])
    else: files[1].write_bytes({'cut':data[:len(data)//2], 'empty':b'', 'bit':data}[harm])
    again = make_learner(path=learn.path)
    again.fit(2, cbs=Checkpoints(resume=True))
    out = capsys.readouterr().out
    assert f'{files[1]} ' in out and 'trying an older one' in out
    assert 'Resumed from checkpoints/1-0001.pth: 1 of 2' in out
    assert same_tree(weights(learn), weights(again))

def test_nothing_whole_is_an_error(make_learner, done):
    learn,files = done
    for f in files: f.write_bytes(b'half')
    again = make_learner(path=learn.path)
    with pytest.raises(ValueError, match='None of the 2 checkpoints'): again.fit(2, cbs=Checkpoints(resume=True))

def test_an_earlier_run_is_not_overwritten(make_learner, done):
    learn,files = done
    again = make_learner(path=learn.path)
    with pytest.raises(FileExistsError, match='1-0002.pth'): again.fit(2, cbs=Checkpoints())
    assert all(f.exists() for f in files)

def test_nothing_there_says_so(make_learner, capsys):
    make_learner().fit(1, cbs=Checkpoints(resume=True))
    assert 'starting from the beginning' in capsys.readouterr().out

OTHER_RUNS = [
    (dict(n_epoch=3), {}, 'epochs: 2 in the checkpoint, 3 in this run'),
    (dict(n_epoch=2, lr=1e-4), {}, r'lr: 0\.003\S* in the checkpoint, 0\.0001'),
    (dict(n_epoch=2), dict(emb_sz=16), 'embedding: '),
    (dict(n_epoch=2), dict(dynamic=False), 'dynamic training: .* in the checkpoint, off in this run'),
    (dict(n_epoch=2), dict(levels=[1]), 'pyramid: ')]

@pytest.mark.parametrize('fit,make,message', OTHER_RUNS)
def test_another_configuration_is_refused(make_learner, done, fit, make, message):
    learn,files = done
    before = [file.read_bytes() for file in files]
    other = make_learner(path=learn.path, **make)
    with pytest.raises(ValueError, match=message): other.fit(**fit, cbs=Checkpoints(resume=True))
    assert before==[file.read_bytes() for file in files]

def test_other_people_are_refused(make_learner, done, people):
    df = market_table(people)
    first = df.pid[df.split=='train'].iloc[0]
    fewer = df[df.pid!=first].reset_index(drop=True)
    dls = ReIDDataLoaders.from_table(fewer, p=4, k=4, size=(48,24), num_workers=0)
    other = make_learner(dls, path=done[0].path)
    with pytest.raises(ValueError, match='people: 12, .* in the checkpoint, 11, '):
        other.fit(2, cbs=Checkpoints(resume=True))

def test_other_batches_are_refused(make_learner, make_dls, done):
    other = make_learner(make_dls(k=2), path=done[0].path)
    with pytest.raises(ValueError, match='batch: p=4, k=4 in the checkpoint, p=4, k=2 in this run'):
        other.fit(2, cbs=Checkpoints(resume=True))

FULL_DISK = [OSError(errno.ENOSPC, 'No space left on device'),
             pytest.param(RuntimeError('PytorchStreamWriter failed writing file'), marks=slow)]

@pytest.mark.parametrize('error', FULL_DISK)
def test_a_full_disk(make_learner, monkeypatch, error):
    "The second checkpoint fails half-way: the error says so, the first is kept, and the run can be resumed from it"
    whole,save = make_learner(),torch.save
    whole.fit(2)
    learn = make_learner()
    def full(state, f):
        if state['epochs']<2: return save(state, f)
        Path(f).write_bytes(b'half')
        raise error
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='1-0002.pth.*last good checkpoint is .*1-0001.pth') as raised:
        learn.fit(2, cbs=Checkpoints())
    assert str(error) in str(raised.value)
    assert names(learn.path/'checkpoints')==['1-0001.pth']
    monkeypatch.undo()
    again = make_learner(path=learn.path)
    again.fit(2, cbs=Checkpoints(resume=True))
    assert same_tree(weights(whole), weights(again))

class Poison(Callback):
    "Multiply the loss of one step by a value that is not finite; remember labels and cameras of each batch"
    order,run_valid = -8,False
    def __init__(self, at, value=math.nan): self.at,self.value,self.seen = at,value,[]
    def before_batch(self): self.seen.append(self.yb[0][:,:2].clone())
    def after_loss(self):
        if self.train_iter!=self.at: return
        self.learn.loss_grad = self.loss_grad*self.value
        self.learn.loss = self.loss*self.value

@pytest.mark.parametrize('mode,dynamic', [('pk',False),('random',False),('pk',True)])
@pytest.mark.parametrize('value', [math.nan,math.inf])
def test_a_loss_that_is_not_finite(make_dls, make_learner, mode, dynamic, value):
    "The error names the step, the last good checkpoint, and exactly the files of the batch"
    dls = make_dls(mode=mode, batch_tfms=[])
    n = len(dls.train)
    learn = make_learner(dls, dynamic=dynamic, cbs=Poison(2*n-2, value))
    with pytest.raises(FloatingPointError) as raised: learn.fit(3, cbs=Checkpoints())
    message = str(raised.value)
    assert f'at step {2*n-2}, epoch 1, batch {n-2}' in message and '1-0001.pth' in message
    named = [Path(file).name for file in message.split('this batch: ')[1].split(', ')]
    items = dls.train.dataset.items
    items = items.assign(name=[Path(file).name for file in items.fn]).set_index('name')
    assert items.loc[named, ['label','camera']].values.tolist()==learn.poison.seen[-1].tolist()
    assert math.isfinite(sum(v.sum() for v in weights(learn).values()))

def test_drawn_files_are_those_of_the_batch(make_dls):
    "Compared by pixels, in an epoch in which the mode changes"
    resize = [tfm for tfm in make_dls().train.after_item.fs if type(tfm).__name__=='Resize']
    train = make_dls(item_tfms=resize, batch_tfms=[]).train
    pixels = {str(file):batch[0][0] for file,batch in zip(train.dataset.items.fn, train.new(shuffle=False, bs=1))}
    state,modes,rng = train.rng.getstate(),[],random.Random(3)
    train.mode = 'random'
    for images,_ in train:
        modes.append(train.mode)
        files = drawn_files(train, state, modes)
        assert all(torch.equal(pixels[str(file)], image) for file,image in zip(files, images, strict=True))
        train.mode = rng.choice(['pk','random'])
    assert set(modes)=={'pk','random'}

def test_weights_that_are_not_finite_are_not_written(make_learner):
    class Break(Callback):
        def after_validate(self):
            if self.epoch==1: next(self.model.parameters()).data.fill_(math.nan)
    learn = make_learner(cbs=Break())
    with pytest.raises(FloatingPointError, match='last good checkpoint is .*1-0001.pth'):
        learn.fit(2, cbs=Checkpoints())
    assert names(learn.path/'checkpoints')==['1-0001.pth']

def test_finite_loss_alone(make_learner):
    learn = make_learner(cbs=Poison(0))
    with pytest.raises(FloatingPointError, match='Last good checkpoint: none'): learn.fit(1, cbs=FiniteLoss())

def test_stays_out_of_lr_find_and_validate(make_learner):
    learn = make_learner(cbs=Checkpoints())
    learn.lr_find(num_it=6, show_plot=False)
    learn.validate()
    learn.get_preds()
    assert not (learn.path/'checkpoints').exists() and learn.checkpoints.n_fits==0
    learn.fit(1)
    assert learn.checkpoints.newest.name=='1-0001.pth'

@pytest.mark.parametrize('resume', [True,False])
def test_checkpoints_of_an_interrupted_fit(make_learner, resume):
    "Calling the fit again is as starting the script again: it is resumed, or the old checkpoints are in the way"
    whole = make_learner()
    whole.fit(2)
    learn = make_learner(cbs=Checkpoints(resume=resume))
    def plug(self):
        if self.epoch==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Callback(before_train=plug))
    assert learn.checkpoints.n_fits==0 and not hasattr(learn, 'finite_loss') and all(cb.run for cb in learn.cbs)
    files = sorted(file.name for file in learn.checkpoints.files)
    assert files==['1-0001.pth']
    if not resume:
        with pytest.raises(FileExistsError, match='1-0001.pth'): learn.fit(2)
        return
    learn.fit(2)
    for name,v in whole.model.state_dict().items(): assert torch.equal(v, learn.model.state_dict()[name]), name
    assert learn.checkpoints.n_fits==1 and learn.checkpoints.newest.name=='1-0002.pth'

def test_interrupted_while_finished_epochs_are_skipped(make_learner, done, monkeypatch):
    "Other callbacks are switched off then; afterwards they are on again"
    learn = make_learner(path=done[0].path, cbs=Checkpoints(resume=True))
    def interrupted(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Checkpoints, '_resume', interrupted)
        learn.fit(2)
    assert all(cb.run for cb in learn.cbs)
    learn.fit(2)
    assert learn.checkpoints.n_fits==1 and len(learn.recorder.values)==2

def test_a_fit_that_ended_with_an_error_is_not_a_finished_one(make_learner):
    "For checkpoints it does not count, though its `after_fit` has come"
    learn = make_learner(cbs=[Checkpoints(), Poison(0)])
    with pytest.raises(FloatingPointError): learn.fit(1)
    assert learn.checkpoints.n_fits==0 and not hasattr(learn, 'finite_loss')

def test_keep_at_least_one():
    with pytest.raises(ValueError, match='at least one'): Checkpoints(keep=0)

@pytest.mark.slow # Compiling takes longer than the training
def test_a_run_of_a_compiled_model_is_resumed_by_a_plain_one(make_learner, capsys):
    "The checkpoint has the names, and the description of the run, of the model inside"
    compiled = make_learner()
    compiled.model = torch.compile(compiled.model, backend='eager')
    pull(lambda cbs: compiled.fit(2, cbs=cbs), Checkpoints())
    plain = make_learner(path=compiled.path)
    plain.fit(2, cbs=Checkpoints(resume=True))
    out = capsys.readouterr().out
    assert 'Resumed from checkpoints/1-0001.pth: 1 of 2 epochs are done' in out

def test_a_checkpoint_of_a_compiled_model_by_an_earlier_version_is_resumed(make_learner, capsys):
    "Its names of weights, also in a callback's state, and their description have a prefix"
    whole = make_learner(cbs=EMA())
    whole.fit(2, cbs=Checkpoints())
    cut = make_learner(cbs=EMA())
    pull(lambda cbs: cut.fit(2, cbs=cbs), Checkpoints())
    file = cut.path/'checkpoints'/'1-0001.pth'
    state = torch.load(file, weights_only=True)
    def prefixed(weights): return {f'_orig_mod.{k}':v for k,v in weights.items()}
    def digest(weights):
        lines = sorted(f'{k} {tuple(v.shape)}' for k,v in weights.items())
        return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:10]
    text = state['config']['weights']
    assert digest(state['model']) in text
    state['config']['weights'] = text.replace(digest(state['model']), digest(prefixed(state['model'])))
    state['model'] = prefixed(state['model'])
    ema = state['cbs']['ema']
    ema['state'],ema['values']['avg'] = prefixed(ema['state']),prefixed(ema['values']['avg'])
    torch.save(state, file)
    again = make_learner(path=cut.path, cbs=EMA())
    again.fit(2, cbs=Checkpoints(resume=True))
    assert 'Resumed from checkpoints/1-0001.pth' in capsys.readouterr().out
    assert same_tree(weights(whole), weights(again)) and same_tree(whole.ema.avg, again.ema.avg)

def test_leftovers_of_a_kill_are_removed(make_learner, done):
    learn,_ = done
    left = learn.path/'checkpoints/.partial-x'
    left.mkdir()
    (left/'1-0003.pth').write_bytes(b'half')
    (left/'.lock').touch() # which nobody holds
    make_learner(path=learn.path).fit(2, cbs=Checkpoints(resume=True))
    assert not left.exists()

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc to tell files from folders')
def test_atomic_write_flushes_the_file_before_it_is_renamed(tmp_path, monkeypatch):
    "First the content, then the name, then the folder"
    log,fsync,replace = [],os.fsync,os.replace
    def logged_fsync(fd):
        log.append('folder' if os.path.isdir(f'/proc/self/fd/{fd}') else 'file')
        fsync(fd)
    def logged_replace(*args):
        log.append('name')
        replace(*args)
    monkeypatch.setattr(os, 'fsync', logged_fsync)
    monkeypatch.setattr(os, 'replace', logged_replace)
    with atomic_write(tmp_path/'a') as file: file.write_text('all of it')
    assert log==['file','name','folder'] and (tmp_path/'a').read_text()=='all of it'

def test_random_states_of_earlier_files_are_read():
    "They have a key for CUDA, and none for other accelerators"
    state = get_rng_state()
    want = [random.random(), np.random.rand(), torch.rand(1).item()]
    kind,states = state.pop('accelerator')
    set_rng_state({**state, 'cuda':states if kind=='cuda' else []})
    assert [random.random(), np.random.rand(), torch.rand(1).item()]==want
