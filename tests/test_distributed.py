"Two processes (gloo, on the CPU) against one: the same batches, losses, decisions, weights and figures"
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

from pyramidreid.training.distributed import distrib_ctx

pytest.importorskip('accelerate')
root = Path(__file__).resolve().parent.parent
LIMIT = 240 # Seconds after which what hangs has failed

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def both(people, tmp_path_factory):
    "What each of two ranks found"
    out = tmp_path_factory.mktemp('ranks')
    ctx = multiprocessing.get_context('forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn')
    ctx.set_forkserver_preload(['ranks']) # imports once for both
    port,end = free_port(),time.time()+LIMIT
    procs = [ctx.Process(target=ranks.main, args=(rank, 2, port, out, people), daemon=True) for rank in range(2)]
    for p in procs: p.start()
    for p in procs: p.join(max(0, end-time.time()))
    hung = [p for p in procs if p.is_alive()]
    for p in hung: p.kill()
    assert not hung, f'{len(hung)} of 2 processes did not end within {LIMIT} s'
    assert [p.exitcode for p in procs]==[0,0]
    return [torch.load(out/f'rank{rank}.pt', weights_only=False) for rank in range(2)]

@pytest.fixture(scope='module')
def one(people, tmp_path_factory): return ranks.same_curve(people, tmp_path_factory.mktemp('one'), False)

def equal(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def test_same_images(both, one):
    "A rank has two whole people of four images each in a P×K batch, and the two have what one process has with four people"
    first,second = (o['curve'] for o in both)
    assert one['labels']==[a+b for a,b in zip(first['labels'], second['labels'])]
    for step,*labels in zip(one['steps'], first['labels'], second['labels']):
        if step['mode']=='pk':
            for o in labels: assert len(set(o))==2 and all(len(set(o[i:i+4]))==1 for i in (0,4))
            assert not set(labels[0]) & set(labels[1])

def test_same_loss_curve(both, one):
    "Losses, k, p, FL and weights of every step to float32's rounding, and the same decisions; between both ranks to the last bit"
    steps = both[0]['curve']['steps']
    assert len(steps)==len(one['steps'])==27 and {o['mode'] for o in steps}=={'pk','random'} and {o['weight_triplet'] for o in steps}=={0.,1.}
    for a,b in zip(steps, one['steps']):
        assert a.keys()==b.keys() and a['mode']==b['mode']
        for k in a.keys()-{'mode'}: assert a[k]==pytest.approx(b[k], rel=1e-6, abs=1e-7, nan_ok=True), k
    assert both[0]['curve']['losses']==pytest.approx(one['losses'], rel=1e-6)

def test_same_weights(both, one):
    "The ranks' to the last bit, and one process' to rounding"
    first,second = (o['curve']['weights'] for o in both)
    assert equal(first, second)
    for k,v in first.items(): torch.testing.assert_close(v, one['weights'][k], rtol=1e-9, atol=1e-9)

def test_same_table(both, one):
    "Also what is printed: mAP, rank-1 and the parts of the loss; all but `valid_loss`, which means nothing"
    names = one['names']
    for a,b,c in zip(both[0]['curve']['rows'], both[1]['curve']['rows'], one['rows']):
        a,b,c = ({n:v for n,v in zip(names, o) if n!='valid_loss'} for o in (a,b,c))
        assert a==pytest.approx(b, nan_ok=True) and a==pytest.approx(c, nan_ok=True)

def test_same_decisions_on_both_ranks(both):
    assert str(both[0]['curve']['steps'])==str(both[1]['curve']['steps'])
    assert str(both[0]['recipes']['steps'])==str(both[1]['recipes']['steps'])

def test_the_stand_in_for_synchronised_batch_norm(both): assert max(o['norm'] for o in both)<1e-12

def test_evaluation(both):
    "Of 78 images and fewer, by loaders of seven to a batch: every image once and in order, the card the same to the last digit"
    first,second = (o['evaluations'] for o in both)
    for n in (78,77,76,14,13,2,1):
        (emb,card),(together,card_together),(other,card_other) = first['alone'][n],first['together'][n],second['together'][n]
        assert len(together)==n and torch.equal(together, other)
        torch.testing.assert_close(together, emb, rtol=1e-5, atol=1e-6)
        assert card==card_together==card_other and (card is not None)==(n>60)

def test_validation_and_predictions(both):
    for o in (o['evaluations'] for o in both):
        card = o['together'][78][1]
        assert o['validated'][:2]==pytest.approx(card[:2]) and o['last']==pytest.approx(o['validated'], abs=1e-6)
        torch.testing.assert_close(o['one'], o['preds_alone'][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(o['preds'][0].as_subclass(torch.Tensor), o['preds_alone'], rtol=1e-5, atol=1e-6)
        assert len(o['preds'][1])==78

def test_recipes_checkpoints_and_files(both):
    "`fit_paper`, a `fit_modern` that is stopped and resumed, `save` and `load`: the ranks agree, and the learner is given back as it was"
    first,second = (o['recipes'] for o in both)
    for k in ('paper','second','loaded'):
        assert equal(first[k], second[k]) and all(v.isfinite().all() for v in first[k].values()), k
    assert equal(first['second'], first['loaded']) and not equal(first['first'], first['second'])
    for o in (first,second):
        assert o['first is plain'] and o['second is plain'] and len(o['steps'])==4*9
        assert 'in one process' in o['lr_find'] and 'p=9 identities on each of 2 ranks' in o['too many'] and 'p=6 or less' in o['too many']

def test_the_script_runs(people, tmp_path):
    "Started by `accelerate launch` as on two GPUs, but told to use the CPU"
    args = [str(root/'examples'/'several_gpus.py'), '--data', str(people), '--arch', 'resnet10', '--no-pretrained', '--epochs', '1', '--recipe', 'one_cycle',
            '--size', '48', '24', '--n-parts', '3', '--p', '2', '--k', '4', '--num-workers', '0', '--cpu', '--out', str(tmp_path)]
    launch = [sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--main_process_port', str(free_port())]
    res = subprocess.run(launch+args, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert res.returncode==0, res.stderr[-3000:]
    assert res.stdout.count('mINP')==1 and 'queries counted             24 of 24' in res.stdout # one rank prints
    assert {'card.json','weights.pth','checkpoints'} <= {o.name for o in tmp_path.iterdir()}
