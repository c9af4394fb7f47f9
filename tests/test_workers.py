"The workers of a training loader: one set for both modes, kept from epoch to epoch, and nothing made in vain"
import copy
import gc
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
from contextlib import nullcontext
from multiprocessing import Value, active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.load import SkipItemException
from fastai.vision.all import DisplayedTransform, TensorImage, set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy, toy_learner

from pyramidreid.data.sampler import *
from pyramidreid.data.sampler import _BatchMaker, _TaskQueue, _WorkerPool
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.dynamic_losses import DynamicLossWeights

LABELS = [label for label in range(16) for _ in range(12)] # 24 batches of 8
TESTS = Path(__file__).parent

class Noisy(Toy):
    "Items with random numbers of all three generators"
    def __getitem__(self, i):
        return torch.tensor(i),torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])

class Counted(Toy):
    "Counts the items that are read, in all processes together"
    def __init__(self, labels):
        super().__init__(labels)
        self.n_read = Value('q', 0)
    def __getitem__(self, i):
        with self.n_read: self.n_read.value += 1
        return super().__getitem__(i)

def loader(dataset, num_workers=2, seed=7, **kwargs):
    dl = PKDataLoader(dataset, **{**dict(p=2, k=4, shuffle=True, num_workers=num_workers), **kwargs})
    dl.rng = random.Random(seed)
    return dl

def epoch(dl, modes, wait=0):
    "The batches of an epoch as lists; each mode is set before its batch is asked for"
    drawn,batches = [],iter(dl)
    for mode in modes:
        dl.mode = mode
        drawn.append([o.tolist() for o in next(batches)])
        if wait: torch.randn(wait, wait)@torch.randn(wait, wait)
    assert next(batches, None) is None
    return drawn

def pids(): return {process.pid for process in active_children()}

PLAN = ['pk','random','random','pk','pk','pk','random','pk']*3
ALTERNATING = ['pk','random']*12

@pytest.fixture(autouse=True)
def _no_process_is_left():
    gc.collect()
    before = pids()
    yield
    gc.collect()
    assert pids()<=before

# The same batches

def test_batches_do_not_depend_on_the_number_of_workers():
    "Neither their images nor what random transforms do"
    by_number = {}
    for n in (1,2,3):
        dl = loader(Noisy(LABELS), n)
        by_number[n] = [epoch(dl, modes) for modes in (PLAN,ALTERNATING,PLAN)]
        dl.close_workers()
    assert by_number[1]==by_number[2]==by_number[3]
    noise = [tuple(row) for drawn in by_number[1] for _,rows in drawn for row in rows]
    assert len(set(noise))==len(noise)

def test_images_are_those_without_workers():
    plain,dl = loader(Toy(LABELS), 0),loader(Toy(LABELS), 2)
    for modes in (PLAN,ALTERNATING,PLAN): assert epoch(dl, modes)==epoch(plain, modes)
    assert plain.rng.random()==dl.rng.random()
    dl.close_workers()

def test_workers_take_nothing_from_the_global_generators_of_torch():
    "Else a run that is resumed, and starts its workers later, would go another way"
    dl,state = loader(Toy(LABELS)),torch.get_rng_state()
    epoch(dl, PLAN)
    assert torch.equal(torch.get_rng_state(), state)
    dl.close_workers()

def test_ranks_draw_different_random_numbers():
    by_rank = [epoch(loader(Noisy(LABELS), p=1, share=(rank,2), persistent_workers=False), PLAN) for rank in (0,1)]
    noise = [{tuple(row) for _,rows in drawn for row in rows} for drawn in by_rank]
    assert len(noise[0])==len(noise[1])==24*4 and not noise[0]&noise[1]

class Whole(Toy):
    "A dataset with a faster way to a batch"
    def get_batch(self, idxs): return torch.tensor(idxs),torch.tensor(self.items.label[idxs].to_numpy())
    def __getitem__(self, i): raise AssertionError('opened')

def test_whole_batches():
    dl,plain = loader(Whole(LABELS)),loader(Toy(LABELS), 0)
    for o in (dl,plain): o._n_inp,o._types = 1,{}
    assert epoch(dl, PLAN)==epoch(plain, PLAN)
    dl.close_workers()

# No more images than are needed

@pytest.mark.slow
@pytest.mark.parametrize('num_workers', [2,4])
@pytest.mark.parametrize('plan', [['pk']*24, ALTERNATING, ['pk']*12+['random']*12])
def test_images_read_and_used(num_workers, plan):
    """At most two batches for each worker are made in vain in an epoch, and none without a switch. The loader itself
    reads one item, to learn about types"""
    data = Counted(LABELS)
    dl = loader(data, num_workers)
    n_epochs = 3
    for _ in range(n_epochs): epoch(dl, plan, wait=300)
    dl.close_workers()
    n_used,n_switches = n_epochs*len(LABELS),len(set(plan))-1
    assert n_used < data.n_read.value <= n_used+1+n_switches*n_epochs*2*num_workers*8

class InTurn:
    "PyTorch's loader without processes: tasks come back in turn. Some are made at once, some when they are asked for"
    def __init__(self, maker, tasks, n_ahead, at_once):
        self.maker,self.tasks,self.n_ahead,self.at_once = maker,tasks,n_ahead,iter(at_once)
        self.out,self.n_dropped = [],0

    def __iter__(self):
        self.n_dropped += len(self.out)
        self.out = []
        for _ in range(self.n_ahead): self._take_task()
        return self

    def _take_task(self):
        for task in self.tasks:
            self.out.append(self.maker[task] if next(self.at_once) else task)
            return

    def __next__(self):
        if not self.out: raise StopIteration
        res = self.out.pop(0)
        if len(res)==4: res = self.maker[res]
        self._take_task()
        return res

class Steps:
    "Makes batches that are their own number"
    n_made = 0
    def create_batches(self, idxs):
        self.n_made += 1
        return [tuple(idxs)]

class Plain:
    "A stream of batches"
    def __init__(self, turn, n):
        self.turn,self.tasks = turn,[(turn, i, 0, [turn,i]) for i in range(n)]
        self.todo,self.n_asked,self.ready = list(range(n)),0,{}

@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=14), min_size=1, max_size=3), st.integers(1,3), st.data())
def test_any_order_of_modes_and_of_work(epochs, num_workers, data):
    "Each mode's batches come in order, whatever workers had begun when it changed, and few are made in vain"
    lazy = data.draw(st.lists(st.booleans(), min_size=20, max_size=20))
    pool,steps = _WorkerPool.__new__(_WorkerPool),Steps()
    pool.queue,pool.processes,pool.batches = _TaskQueue(2*num_workers),[],None
    pool.loader = InTurn(_BatchMaker(steps, pool.queue.wanted), pool.queue, 2*num_workers, itertools.cycle(lazy))
    turns = itertools.count()
    for modes in epochs:
        made_before = steps.n_made
        streams = {mode:Plain(next(turns), len(modes)) for mode in (False,True)}
        numbers = {mode:itertools.count() for mode in streams}
        pool.start(len(modes))
        for mode in modes: assert pool.batch(streams[mode])==(streams[mode].turn, next(numbers[mode]))
        assert 0 <= steps.n_made-made_before-len(modes) <= 2*num_workers

def test_a_task_that_is_not_wanted_is_given_back_untouched():
    data,wanted = Counted(LABELS),Value('q', 5, lock=False)
    maker = _BatchMaker(loader(data, 0), wanted)
    task = (5, 2, 0, list(range(8)))
    assert maker[task][:2]==(5,2) and data.n_read.value==8
    wanted.value = 6
    assert maker[task]==(5,2,None) and data.n_read.value==8

# The same processes

def test_workers_are_kept_from_epoch_to_epoch():
    dl,seen = loader(Toy(LABELS)),[]
    for _ in range(3):
        epoch(dl, PLAN)
        seen.append(pids())
    assert len(seen[0])==2 and seen[0]==seen[1]==seen[2]
    dl.close_workers()
    assert not pids()&seen[0]
    epoch(dl, PLAN)
    assert len(pids())==2 and not pids()&seen[0]
    dl.close_workers()

def test_workers_of_one_epoch():
    "As fastai's: a new epoch sees what has changed inside the dataset"
    data = Toy(LABELS)
    dl = loader(data, persistent_workers=False)
    seen = set()
    for _ in range(2):
        for _ in dl: seen |= pids()
        assert not pids()
    assert len(seen)==4
    data.items.label = 3-data.items.label%4
    assert {y for _,ys in epoch(dl, ['random']*24) for y in ys}=={0,1,2,3}

class Doubled(DisplayedTransform):
    def encodes(self, x:torch.Tensor): return 2*x

def replace_dataset(dl): dl.dataset = Toy([label+100 for label in LABELS])
def add_transform(dl): dl.after_item.add(Doubled())
def change_batch(dl): dl.p,dl.bs = 4,16
def change_number(dl): dl.fake_l.num_workers = 1

@pytest.mark.slow
@pytest.mark.parametrize('change', [replace_dataset,add_transform,change_batch,change_number])
def test_new_workers_where_something_else_is_to_be_copied(change):
    dl,plain = loader(Toy(LABELS)),loader(Toy(LABELS), 0)
    assert epoch(dl, PLAN)==epoch(plain, PLAN)
    before = pids()
    change(dl)
    if change is not change_number: change(plain)
    modes = PLAN[:len(dl)]
    assert epoch(dl, modes)==epoch(plain, modes)
    assert pids() and not pids()&before
    dl.close_workers()

def test_the_rest_changes_with_the_same_workers():
    "Modes, shares and the seed are not the workers' business"
    dl = loader(Toy(LABELS))
    epoch(dl, PLAN)
    before = pids()
    dl.share,dl.mode,dl.rng = (1,2),'random',random.Random(3)
    assert len(dl)==12
    plain = loader(Toy(LABELS), 0, seed=3, share=(1,2))
    plain.mode = 'random'
    assert [x for x,_ in epoch(dl, ['random']*12)]==[x for x,_ in epoch(plain, ['random']*12)]
    assert pids()==before
    dl.close_workers()

def test_copies_have_no_workers():
    dl = loader(Toy(LABELS))
    epoch(dl, PLAN)
    before = pids()
    for other in (copy.copy(dl), copy.deepcopy(dl), pickle.loads(pickle.dumps(dl)), dl.new()):
        other.rng = random.Random(1)
        other.close_workers()
        assert pids()==before
        assert other.persistent_workers and len(epoch(other, PLAN))==24
        assert len(pids())==4
        other.close_workers()
    dl.close_workers()

def test_new_keeps_and_replaces_what_becomes_of_workers(make_dls):
    dl = loader(Toy(LABELS), persistent_workers=False)
    assert not dl.new().persistent_workers and dl.new(persistent_workers=True).persistent_workers
    dls = make_dls(persistent_workers=False)
    assert not dls.train.persistent_workers and make_dls().train.persistent_workers
    assert type(dl.new(cls=SingleModeDataLoader)) is SingleModeDataLoader

# How it ends

def test_workers_end_with_their_loader():
    dl = loader(Toy(LABELS))
    epoch(dl, PLAN)
    before = pids()
    assert len(before)==2
    del dl
    gc.collect()
    assert not pids()&before

def test_an_epoch_left_early_and_two_at_a_time():
    dl,plain = loader(Toy(LABELS)),loader(Toy(LABELS), 0)
    for one in (dl,plain):
        for _ in one: break
    before = pids()
    assert len(before)==2
    def both(dl): return [[o.tolist() for o in b] for pair in zip(dl, dl) for b in pair]
    assert both(dl)==both(plain)
    gc.collect()
    assert pids()==before
    assert epoch(dl, PLAN)==epoch(plain, PLAN)
    dl.close_workers()

def test_closed_in_the_middle_of_an_epoch():
    dl = loader(Toy(LABELS))
    batches = iter(dl)
    next(batches)
    dl.close_workers()
    assert not pids()
    with pytest.raises(RuntimeError, match='closed in the middle'): next(batches)
    assert len(epoch(dl, PLAN))==24
    dl.close_workers()

class Broken(Toy):
    is_broken = True
    def __getitem__(self, i):
        if i==100 and self.is_broken: raise OSError('0100.jpg is cut off')
        if i==101: raise SkipItemException
        return super().__getitem__(i)

def test_an_exception_in_a_worker():
    data = Broken(LABELS)
    dl = loader(data)
    with pytest.raises(OSError, match='(?s)in DataLoader worker.*Broken|__getitem__.*0100.jpg is cut off'):
        epoch(dl, ['random']*24)
    assert not pids()
    data.is_broken = False
    drawn = epoch(dl, ['random']*24)
    assert sorted(i for x,_ in drawn for i in x)==[i for i in range(192) if i!=101] # Its batch is smaller
    dl.close_workers()

def test_a_batch_of_skipped_items():
    class Skipping(Toy):
        def __getitem__(self, i): raise SkipItemException
    dl = loader(Skipping(LABELS))
    dl._n_inp,dl._types = 1,{}
    with pytest.raises(ValueError, match='All images of a batch were skipped'): next(iter(dl))

@pytest.mark.skipif(sys.platform=='win32', reason='needs signals')
def test_workers_that_ctrl_c_has_ended():
    "It reaches all processes of a terminal, also while the fit is somewhere else"
    dl,plain = loader(Toy(LABELS)),loader(Toy(LABELS), 0)
    assert epoch(dl, PLAN)==epoch(plain, PLAN)
    workers = active_children()
    for worker in workers: os.kill(worker.pid, signal.SIGINT)
    for worker in workers: worker.join(20)
    assert epoch(dl, PLAN)==epoch(plain, PLAN)
    assert len(pids())==2
    dl.close_workers()

class Watch(Callback):
    "Which workers there are in each epoch; may be interrupted"
    order,run_valid = 50,False
    def __init__(self, stop=None):
        self.stop,self.seen = stop,[]
    def after_batch(self):
        if self.training and self.iter==0: self.seen.append(pids())
        if self.stop and self.epoch==1 and self.iter==3: raise self.stop('stopped')

def test_workers_of_a_fit():
    watch = Watch()
    learn = toy_learner(cbs=[DynamicLossWeights(),watch], num_workers=2)
    for n in (1,2):
        learn.fit(3)
        assert len(watch.seen)==3*n and not pids()
        assert len(set.union(*watch.seen[-3:]))==2

@pytest.mark.parametrize('dynamic,stop', [(False,None), (False,KeyboardInterrupt), (True,KeyboardInterrupt)])
def test_workers_of_a_reid_learner(make_learner, make_dls, dynamic, stop):
    watch = Watch(stop)
    learn = make_learner(make_dls(num_workers=2), dynamic=dynamic)
    with pytest.raises(stop) if stop else nullcontext(): learn.fit(2, cbs=watch)
    assert len(watch.seen)==2 and watch.seen[0]==watch.seen[1] and len(watch.seen[0])==2
    assert not pids()
    if stop: return
    learn.export('learner.pkl')
    assert len(learn.dls.train.one_batch())==2 and not pids()

class Noise(DisplayedTransform):
    "A random transform of items"
    split_idx,order = 0,50
    def encodes(self, x:TensorImage): return x+100*(torch.rand(())+np.random.rand()+random.random())

@pytest.mark.slow
def test_resumed_with_random_transforms_and_workers(make_learner, make_dls):
    "It goes on as the run that was not interrupted, also with another number of workers"
    def run(cbs, num_workers=2, **kwargs):
        set_seed(0)
        dls = make_dls(num_workers=num_workers, k=2)
        dls.train.after_item.add(Noise())
        learn = make_learner(dls, **kwargs)
        learn.fit(3, cbs=cbs)
        return learn
    def weights(learn): return [p.detach() for p in learn.model.parameters()]
    whole = run(Checkpoints())
    with pytest.raises(RuntimeError, match='stopped'): run([Checkpoints(), Watch(RuntimeError)], path=whole.path/'cut')
    for other in (run(Checkpoints(resume=True), 3, path=whole.path/'cut'), run(None, 1)):
        assert all(map(torch.equal, weights(whole), weights(other)))

SPAWNED = """
import multiprocessing as mp, random, sys
import torch
sys.path.insert(0, {tests!r})
from toys import Vectors
from pyramidreid.data.sampler import PKDataLoader

if __name__=='__main__':
    mp.set_start_method({method!r})
    dls = [PKDataLoader(Vectors(64), p=4, k=2, shuffle=True, num_workers=n) for n in (0,2)]
    pids,drawn = set(),[]
    for dl in dls:
        dl.rng = random.Random(3)
        for _ in range(3):
            for i,(x,y) in enumerate(dl):
                dl.mode = 'pk' if i%2 else 'random'
                pids |= {{process.pid for process in mp.active_children()}}
                drawn.append(y.tolist())
    assert drawn[:24]==drawn[24:]
    dls[1].close_workers()
    print(len(pids), len(mp.active_children()))
"""

@pytest.mark.slow
@pytest.mark.parametrize('method', ['fork','spawn','forkserver'])
def test_processes_that_are_started(tmp_path, method):
    "Over three epochs: one for each worker"
    if method not in torch.multiprocessing.get_all_start_methods(): pytest.skip(f'no {method} here')
    script = tmp_path/'script.py'
    script.write_text(SPAWNED.format(tests=str(TESTS), method=method))
    res = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ, timeout=600)
    assert res.returncode==0, res.stderr
    assert res.stdout.split()==['2','0']
