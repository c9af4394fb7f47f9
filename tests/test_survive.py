"Runs that are killed, run out of disk, meet damaged or foreign checkpoints, or a loss that is no number"
import errno
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import EarlyStoppingCallback, SaveModelCallback, set_seed

from pyramidreid.core import atomic_write
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.training.checkpoints import *
from pyramidreid.training.recipes import torch_opt

SCRIPT = '''
import os,random,signal,sys,torch,warnings
warnings.filterwarnings('ignore')
from pathlib import Path
from fastai.callback.core import Callback
from fastai.vision.all import set_seed
from pyramidreid.models.backbone import resnet10
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.training.learner import pyramid_learner
from pyramidreid.training.checkpoints import Checkpoints

class Mark(Callback):
    "Say each step aloud, and pull the plug after a random one of the second or third epoch"
    order,run_valid = 99,False
    def after_batch(self):
        n,kill = self.n_iter,os.environ.get('KILL')
        print('step', self.train_iter, flush=True)
        if kill and self.train_iter==random.Random(float(kill)).randint(n+1, 3*n-1): os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
for path in map(Path, sys.argv[2:]):
    set_seed(0)
    dls = ReIDDataLoaders.from_market(sys.argv[1], p=4, k=2, size=(48,24), num_workers=0)
    learn = pyramid_learner(dls, resnet10, pretrained=False, n_parts=3, emb_sz=8, path=path, cbs=Mark())
    learn.fit_one_cycle(3, 3e-3, cbs=Checkpoints(resume=True))
    card = learn.evaluate()
    torch.save(dict(model=learn.model.state_dict(), values=[list(o) for o in learn.recorder.values], hps={k:[float(o) for o in v] for k,v in learn.recorder.hps.items()},
                    losses=[float(o) for o in learn.recorder.losses], steps=learn.dynamic_loss_weights.history.to_csv(), card=card.words(), mAP=card.mAP), path/'end.pth')
'''

def same_tree(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same_tree, a, b))
    return a==b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL')
def test_killed_at_a_random_step_and_resumed_ends_the_same(people, tmp_path):
    "A real process and a real SIGKILL after a step of the second or third epoch; another process resumes, and runs the whole besides"
    script,killed,whole = tmp_path/'train.py',tmp_path/'killed',tmp_path/'whole'
    script.write_text(SCRIPT)
    for o in (killed,whole): o.mkdir()
    seed = str(time.time())
    victim = subprocess.run([sys.executable,script,people,killed], stdout=subprocess.DEVNULL, env={**os.environ,'KILL':seed}, timeout=120)
    assert victim.returncode==-signal.SIGKILL and not (killed/'end.pth').exists()
    out = subprocess.run([sys.executable,script,people,killed,whole], stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    resumed,undisturbed = out.split('starting from the beginning')
    assert 'Resumed from' in resumed and 'step 1\n' not in resumed and 'step 1\n' in undisturbed, out
    assert same_tree(*(torch.load(o/'end.pth', weights_only=True) for o in (whole,killed))), f'KILL={seed}'
    assert not list((killed/'checkpoints').glob('.partial-*'))

class Plug(Callback):
    order = 95
    def __init__(self, fit=1, epoch=1): self.fit_no,self.at = fit,epoch
    def before_train(self):
        if self.checkpoints.n_fits==self.fit_no and self.epoch==self.at: raise RuntimeError('the plug')

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def figures(learn): return [list(o) for o in learn.recorder.values]
def pull(run, cb, **kwargs):
    with pytest.raises(RuntimeError, match='the plug'): run([cb, Plug(**kwargs)])

class EMA(Callback):
    "A moving average that speaks for itself"
    order,run_valid = 80,False
    def before_fit(self): self.avg = {k:v.clone().float() for k,v in self.model.state_dict().items()}
    def after_batch(self):
        for k,v in self.model.state_dict().items(): self.avg[k].lerp_(v.float(), .1)
    def state_dict(self): return self.avg
    def load_state_dict(self, sd): self.avg = {k:v.clone() for k,v in sd.items()}

def test_everything_comes_back(make_learner):
    "EMA, a half sum of gradients, the best mAP so far, the patience used up, the table"
    def new(path=None):
        learn = make_learner(cbs=[EMA(), GradientAccumulation(40), SaveModelCallback(monitor='mAP'), EarlyStoppingCallback(monitor='mAP', patience=9)], **({'path':path} if path else {}))
        learn.told = []
        learn.logger = lambda o: learn.told.append(list(o)[:-1])
        return learn
    whole = new()
    whole.fit_flat_cos(3, 3e-3, cbs=Checkpoints())
    cut = new()
    pull(lambda cbs: cut.fit_flat_cos(3, 3e-3, cbs=cbs), Checkpoints(), epoch=2)
    again = new(cut.path)
    random.random(); torch.rand(3)
    again.fit_flat_cos(3, 3e-3, cbs=Checkpoints(resume=True))
    assert same_tree(weights(whole), weights(again)) and same_tree(whole.ema.avg, again.ema.avg)
    assert same_tree(whole.told, again.told) and whole.save_model.best==again.save_model.best and whole.early_stopping.wait==again.early_stopping.wait
    assert whole.gradient_accumulation.count==again.gradient_accumulation.count
    assert whole.recorder.hps==again.recorder.hps and whole.recorder.iters==again.recorder.iters
    assert whole.dynamic_loss_weights.history.equals(again.dynamic_loss_weights.history)
    again.recorder.plot_loss(); again.dynamic_loss_weights.plot(); again.validate()

def test_checkpoints_change_nothing(make_learner):
    plain,kept = make_learner(),None
    plain.fit_one_cycle(2, 3e-3)
    kept = make_learner()
    kept.fit_one_cycle(2, 3e-3, cbs=Checkpoints(keep=1))
    assert same_tree(weights(plain), weights(kept))
    assert [o.name for o in (kept.path/'checkpoints').iterdir()]==['1-0002.pth'] and not hasattr(kept, 'finite_loss')

@pytest.mark.parametrize('fit,epoch', [(1,1),(2,0),(2,1)])
def test_fine_tune(make_learner, fit, epoch):
    "Two fits with one callback, pulled in either"
    tune = lambda learn, cbs: learn.fine_tune(2, 3e-3, freeze_epochs=2, cbs=cbs)
    whole = make_learner()
    tune(whole, Checkpoints(keep=9))
    cut = make_learner()
    pull(lambda cbs: tune(cut, cbs), Checkpoints(keep=9), fit=fit, epoch=epoch)
    again = make_learner(path=cut.path)
    tune(again, Checkpoints(keep=9, resume=True))
    assert same_tree(weights(whole), weights(again)) and same_tree(figures(whole), figures(again))

@pytest.mark.parametrize('recipe', ['fit_paper','fit_modern'])
def test_recipes(make_learner, recipe):
    "PyTorch's optimizers, the frozen epoch, the averaged weights: pulled before the last epoch, and resumed by another learner"
    run = lambda learn, cbs: getattr(learn, recipe)(3, lr_body=1e-3, lr_head=3e-3, cbs=cbs)
    whole = make_learner()
    run(whole, Checkpoints())
    cut = make_learner()
    pull(lambda cbs: run(cut, cbs), Checkpoints(), epoch=2)
    again = make_learner(path=cut.path)
    run(again, Checkpoints(resume=True))
    assert same_tree(weights(whole), weights(again)) and same_tree(figures(whole), figures(again)) and whole.recorder.hps==again.recorder.hps
    with pytest.raises(ValueError, match='optimizer: (SGD|AdamW), 3 groups there, Adam, 3'):
        make_learner(path=cut.path).fit_modern(3, lr_body=1e-3, lr_head=3e-3, opt_func=torch_opt(torch.optim.Adam), cbs=Checkpoints(resume=True))

def test_with_workers(make_learner, make_dls):
    "Worker processes take their seeds from states that were kept"
    new = lambda **kwargs: make_learner(make_dls(num_workers=1, k=2, bs=64), **kwargs)
    def run(cbs, **kwargs):
        set_seed(0) # before the loaders are made
        learn = new(**kwargs)
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
    assert same_tree(weights(learn), weights(again)) and same_tree(figures(learn), figures(again))
    assert '2 of 2 epochs are done' in capsys.readouterr().out

@pytest.fixture
def done(make_learner):
    "A learner after two epochs, with both checkpoints"
    learn = make_learner()
    learn.fit(2, cbs=Checkpoints())
    return learn,sorted((learn.path/'checkpoints').iterdir())

@pytest.mark.parametrize('harm', ['cut','empty','bit','foreign'])
def test_a_damaged_newest_is_passed_by(make_learner, done, capsys, harm):
    learn,files = done
    data = bytearray(files[1].read_bytes())
    if harm=='bit': data[len(data)//2] ^= 255
    if harm=='foreign': torch.save({'a':1}, files[1])
    else: files[1].write_bytes({'cut':data[:len(data)//2], 'empty':b'', 'bit':data}[harm])
    again = make_learner(path=learn.path)
    again.fit(2, cbs=Checkpoints(resume=True))
    out = capsys.readouterr().out
    assert str(files[1]) in out and 'older' in out and 'Resumed from checkpoints/1-0001.pth: 1 of 2' in out
    assert same_tree(weights(learn), weights(again))

def test_nothing_whole_is_an_error(make_learner, done):
    learn,files = done
    for f in files: f.write_bytes(b'half')
    with pytest.raises(ValueError, match='None of the 2 checkpoints'): make_learner(path=learn.path).fit(2, cbs=Checkpoints(resume=True))

def test_an_earlier_run_is_not_overwritten(make_learner, done):
    learn,files = done
    with pytest.raises(FileExistsError, match='1-0002.pth'): make_learner(path=learn.path).fit(2, cbs=Checkpoints())
    assert all(f.exists() for f in files)

def test_nothing_there_says_so(make_learner, capsys):
    make_learner().fit(1, cbs=Checkpoints(resume=True))
    assert 'starting from the beginning' in capsys.readouterr().out

@pytest.mark.parametrize('fit,make,why', [
    (dict(n_epoch=3), {}, 'epochs: 2 there, 3 here'), (dict(n_epoch=2, lr=1e-4), {}, r'lr: 0\.003\S* there, 0\.0001'),
    (dict(n_epoch=2), dict(emb_sz=16), 'embedding: '), (dict(n_epoch=2), dict(dynamic=False), 'dynamic training: .* there, off here'), (dict(n_epoch=2), dict(levels=[1]), 'pyramid: ')])
def test_another_configuration_is_refused(make_learner, done, fit, make, why):
    learn,files = done
    before = [f.read_bytes() for f in files]
    with pytest.raises(ValueError, match=why): make_learner(path=learn.path, **make).fit(**fit, cbs=Checkpoints(resume=True))
    assert before==[f.read_bytes() for f in files]

def test_other_people_or_batches_are_refused(make_learner, make_dls, done, people):
    df = market_table(people)
    fewer = ReIDDataLoaders.from_table(df[df.pid!=df.pid[df.split=='train'].iloc[0]].reset_index(drop=True), p=4, k=4, size=(48,24), num_workers=0)
    for dls,why in ((fewer, 'people: 12, .* there, 11, '), (make_dls(k=2), 'batch: p=4, k=4 there, p=4, k=2 here')):
        with pytest.raises(ValueError, match=why): make_learner(dls, path=done[0].path).fit(2, cbs=Checkpoints(resume=True))

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('PytorchStreamWriter failed writing file')])
def test_a_full_disk(make_learner, monkeypatch, error):
    "The second checkpoint stops half-way: an error that says so, the first is kept, nothing half-written stays, and the run can go on"
    whole,save = make_learner(),torch.save
    whole.fit(2)
    learn = make_learner()
    def full(state, f):
        if state['epochs']<2: return save(state, f)
        Path(f).write_bytes(b'half')
        raise error
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='1-0002.pth.*last good checkpoint is .*1-0001.pth') as e: learn.fit(2, cbs=Checkpoints())
    assert ('No space' in str(e.value)) or ('failed writing' in str(e.value))
    assert [o.name for o in (learn.path/'checkpoints').iterdir()]==['1-0001.pth']
    monkeypatch.undo()
    again = make_learner(path=learn.path)
    again.fit(2, cbs=Checkpoints(resume=True))
    assert same_tree(weights(whole), weights(again))

class Poison(Callback):
    "Remember what every batch held; no number from the loss at one step"
    order,run_valid = -8,False
    def __init__(self, at, value=math.nan): self.at,self.value,self.seen = at,value,[]
    def before_batch(self): self.seen.append(self.yb[0][:,:2].clone())
    def after_loss(self):
        if self.train_iter==self.at: self.learn.loss_grad,self.learn.loss = self.loss_grad*self.value,self.loss*self.value

@pytest.mark.parametrize('mode,dynamic', [('pk',False),('random',False),('pk',True)])
@pytest.mark.parametrize('value', [math.nan,math.inf])
def test_no_number(make_dls, make_learner, mode, dynamic, value):
    "The step, the last good checkpoint, and just the files that were in the batch"
    dls = make_dls(mode=mode, batch_tfms=[])
    n = len(dls.train)
    learn = make_learner(dls, dynamic=dynamic, cbs=Poison(2*n-2, value))
    with pytest.raises(FloatingPointError) as e: learn.fit(3, cbs=Checkpoints())
    msg = str(e.value)
    assert f'at step {2*n-2}, epoch 1, batch {n-2}' in msg and '1-0001.pth' in msg
    items = dls.train.dataset.items
    named = [Path(f).name for f in msg.split('this batch: ')[1].split(', ')]
    rows = items.assign(name=[Path(f).name for f in items.fn]).set_index('name').loc[named]
    assert rows[['label','camera']].values.tolist()==learn.poison.seen[-1].tolist()
    assert math.isfinite(sum(v.sum() for v in weights(learn).values()))

def test_files_are_those_of_the_batch(make_dls):
    "Pixels, not labels: every batch of an epoch in which the kind changes"
    dls = make_dls(item_tfms=[o for o in make_dls().train.after_item.fs if type(o).__name__=='Resize'], batch_tfms=[])
    train,valid_like = dls.train,dls.train.new(shuffle=False, bs=1)
    pixels = {str(f):b[0][0] for f,b in zip(train.dataset.items.fn, valid_like)}
    state,modes,rng = train.rng.getstate(),[],random.Random(3)
    train.mode = 'random'
    for b in train:
        modes.append(train.mode)
        files = drawn_files(train, state, modes)
        assert all(torch.equal(pixels[str(f)], x) for f,x in zip(files, b[0], strict=True))
        train.mode = rng.choice(['pk','random'])
    assert len(set(modes))==2

def test_weights_without_a_number_are_not_written(make_learner):
    class Break(Callback):
        def after_validate(self):
            if self.epoch==1: next(self.model.parameters()).data.fill_(math.nan)
    learn = make_learner(cbs=Break())
    with pytest.raises(FloatingPointError, match='last good checkpoint is .*1-0001.pth'): learn.fit(2, cbs=Checkpoints())
    assert [o.name for o in (learn.path/'checkpoints').iterdir()]==['1-0001.pth']

def test_finite_loss_alone(make_learner):
    with pytest.raises(FloatingPointError, match='Last good checkpoint: none'): make_learner(cbs=Poison(0)).fit(1, cbs=FiniteLoss())

def test_stays_out_of_lr_find_and_validate(make_learner):
    learn = make_learner(cbs=Checkpoints())
    learn.lr_find(num_it=6, show_plot=False); learn.validate(); learn.get_preds()
    assert not (learn.path/'checkpoints').exists() and learn.checkpoints.n_fits==0
    learn.fit(1)
    assert learn.checkpoints.newest.name=='1-0001.pth'

def test_keep_at_least_one():
    with pytest.raises(ValueError, match='at least one'): Checkpoints(keep=0)

def test_leftovers_of_a_kill_are_removed(make_learner, done):
    learn,_ = done
    left = learn.path/'checkpoints/.partial-x'
    left.mkdir(); (left/'1-0003.pth').write_bytes(b'half')
    make_learner(path=learn.path).fit(2, cbs=Checkpoints(resume=True))
    assert not left.exists()

def test_whole_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    "Content, name, folder: in this order"
    log,fsync,replace = [],os.fsync,os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (log.append('folder' if os.path.isdir(f'/proc/self/fd/{fd}') else 'file') if os.path.isdir('/proc/self/fd') else None, fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda *a: (log.append('name'), replace(*a)))
    with atomic_write(tmp_path/'a') as f: f.write_text('all of it')
    if os.path.isdir('/proc/self/fd'): assert log==['file','name','folder']
    assert (tmp_path/'a').read_text()=='all of it'
