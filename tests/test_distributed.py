"Two processes (gloo, on the CPU) against one: the same batches, losses, decisions, weights and metrics"
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

pytest.importorskip('accelerate')
pytestmark = pytest.mark.slow # Starts processes that import everything, several times
root = Path(__file__).resolve().parent.parent
LIMIT = 480 # Seconds after which a process counts as hung

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def both(people, tmp_path_factory):
    "What each of two ranks found"
    return run_both(ranks.main, people, tmp_path_factory.mktemp('ranks'), exitcodes=[0,0])

def run_both(main, people, out, exitcodes):
    "Run `main` in two processes; what they saved"
    has_forkserver = 'forkserver' in multiprocessing.get_all_start_methods()
    ctx = multiprocessing.get_context('forkserver' if has_forkserver else 'spawn')
    ctx.set_forkserver_preload(['ranks']) # Imports once for both
    port,end = free_port(),time.time()+LIMIT
    processes = [ctx.Process(target=main, args=(rank, 2, port, out, people)) for rank in range(2)]
    for process in processes: process.start()
    for process in processes: process.join(max(0, end-time.time()))
    hung = [process for process in processes if process.is_alive()]
    for process in hung: process.kill()
    assert not hung, f'{len(hung)} of 2 processes did not end within {LIMIT} s'
    assert [process.exitcode for process in processes]==exitcodes
    return [torch.load(out/f'rank{rank}.pt', weights_only=False) for rank in range(2)]

@pytest.fixture(scope='module')
def one(people, tmp_path_factory):
    "What one process found"
    return ranks.same_curve(people, tmp_path_factory.mktemp('one'), together=False)

def equal(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def test_same_images(both, one):
    "In a P×K batch a rank has four images each of two people; both ranks together have what one process has with four"
    first,second = (o['curve'] for o in both)
    assert one['labels']==[a+b for a,b in zip(first['labels'], second['labels'])]
    for step,*labels in zip(one['steps'], first['labels'], second['labels']):
        if step['mode']!='pk': continue
        for own in labels: assert own==[own[0]]*4+[own[4]]*4 and own[0]!=own[4]
        assert not set(labels[0]) & set(labels[1])

def test_same_loss_curve(both, one):
    "The same decisions, and losses, k, p, FL and weights of every step to float32's rounding"
    steps = both[0]['curve']['steps']
    assert len(steps)==len(one['steps'])==27
    assert {step['mode'] for step in steps}=={'pk','random'} and {step['weight_triplet'] for step in steps}=={0.,1.}
    for step,want in zip(steps, one['steps']):
        assert step.keys()==want.keys() and step['mode']==want['mode']
        for name in step.keys()-{'mode'}:
            assert step[name]==pytest.approx(want[name], rel=1e-6, abs=1e-7, nan_ok=True), name
    assert both[0]['curve']['losses']==pytest.approx(one['losses'], rel=1e-6)

def test_same_weights(both, one):
    "The same on both ranks to the last bit, and as in one process to rounding"
    first,second = (o['curve']['weights'] for o in both)
    assert equal(first, second)
    for name,v in first.items(): torch.testing.assert_close(v, one['weights'][name], rtol=1e-9, atol=1e-9)

def test_same_table(both, one):
    "mAP, rank-1 and the parts of the loss; all but `valid_loss`, which says little"
    def named(row): return {name:v for name,v in zip(one['names'], row) if name!='valid_loss'}
    curves = [both[0]['curve'], both[1]['curve'], one]
    for rows in zip(*(curve['rows'] for curve in curves), strict=True):
        first,second,alone = map(named, rows)
        assert first==pytest.approx(second, nan_ok=True) and first==pytest.approx(alone, nan_ok=True)

def test_same_decisions_on_both_ranks(both):
    assert str(both[0]['curve']['steps'])==str(both[1]['curve']['steps'])
    assert str(both[0]['recipes']['steps'])==str(both[1]['recipes']['steps'])

def test_the_stand_in_for_synchronised_batch_norm(both):
    for o in both: assert o['norm']<1e-12

@pytest.mark.parametrize('n', ranks.N_IMAGES)
def test_evaluation(both, n):
    "By loaders of seven to a batch: each image once and in order, the card the same to the last digit"
    first,second = (o['evaluations'] for o in both)
    emb,card = first['alone'][n]
    together,card_together = first['together'][n]
    other,card_other = second['together'][n]
    assert len(together)==n and torch.equal(together, other)
    torch.testing.assert_close(together, emb, rtol=1e-5, atol=1e-6)
    assert card==card_together==card_other and (card is not None)==(n>60)

@pytest.mark.parametrize('rank', [0,1])
def test_validation_and_predictions(both, rank):
    res = both[rank]['evaluations']
    card,alone = res['together'][78][1],res['preds_alone']
    assert res['validated'][:2]==pytest.approx(card[:2]) and res['last']==pytest.approx(res['validated'], abs=1e-6)
    torch.testing.assert_close(res['one'], alone[0], rtol=1e-5, atol=1e-6)
    preds,targets = res['preds']
    torch.testing.assert_close(preds.as_subclass(torch.Tensor), alone, rtol=1e-5, atol=1e-6)
    assert len(targets)==78

def test_recipes_and_files_agree_on_both_ranks(both):
    "`fit_paper`, a `fit_modern` that is stopped and resumed, `save` and `load`"
    first,second = (o['recipes'] for o in both)
    for name in ('paper','second','loaded'):
        assert equal(first[name], second[name]), name
        assert all(v.isfinite().all() for v in first[name].values()), name
    assert equal(first['second'], first['loaded']) and not equal(first['first'], first['second'])

@pytest.mark.parametrize('rank', [0,1])
def test_the_learner_is_restored_and_errors_say_what_to_do(both, rank):
    res = both[rank]['recipes']
    assert res['first is plain'] and res['second is plain'] and len(res['steps'])==4*9
    assert 'in one process' in res['lr_find']
    assert 'p=9 identities on each of 2 ranks' in res['too many'] and 'p=6 or less' in res['too many']

def test_a_loss_that_is_not_finite_on_one_rank_ends_the_fit_on_both(both):
    "And both train on together, in the same context"
    first,second = (o['one_bad'] for o in both)
    assert 'but that of another rank is not finite' in first['error'] and 'The loss is nan' in second['error']
    assert first['plain'] and second['plain']
    assert equal(first['weights'], second['weights']) and first['steps']==second['steps']!='[]'

@pytest.mark.parametrize('weighting', ranks.WEIGHTINGS)
def test_every_weighting_trains(both, weighting):
    "Also the steps that give a measured loss the weight 0; both ranks end with the same weights"
    first,second = (o['weightings'][weighting] for o in both)
    assert equal(first['weights'], second['weights']) and all(v.isfinite().all() for v in first['weights'].values())
    assert str(first['steps'])==str(second['steps']) and len(first['steps'])==(27 if weighting else 0)
    assert len(first['losses'])==27
    zeros = {name for step in first['steps'] for name in ('id','triplet') if not step[f'weight_{name}']}
    if weighting=='paper': assert 'id' in zeros

def test_a_run_is_resumed_whose_checkpoints_only_the_first_rank_sees(both):
    first,second = (o['resumed'] for o in both)
    for o in (first,second):
        assert o['stopped']['error'].endswith('stopped') and o['resumed']['error'] is None and o['resumed']['done']==2
        assert o['resumed']['is_plain'] and o['resumed']['n_fits']==1
    assert equal(first['resumed']['weights'], second['resumed']['weights'])
    assert equal(first['whole']['weights'], second['whole']['weights'])
    assert not equal(first['stopped']['weights'], first['resumed']['weights'])

def test_what_stops_one_rank_stops_both(both):
    "Checkpoints of an earlier run, other settings on one rank, and a checkpoint that cannot be written"
    first,second = (o['resumed'] for o in both)
    for o in (first,second):
        assert 'holds checkpoints of an earlier run' in o['not asked']['error']
        assert 'could not be written' in o['not written']['error']
        for name in ('not asked','other settings','not written'): assert o[name]['is_plain'] and not o[name]['n_fits']
    own,others = second['other settings']['error'],first['other settings']['error']
    assert 'checkpoint of another run' in own and 'delta=0.66 in this run' in own
    assert 'Another process cannot follow' in others and f"rank 1: ValueError: {own.split(chr(9))[-1]}" in others

def test_files_that_only_the_first_rank_sees(both):
    "`load`, also at the end of `SaveModelCallback`, gives all ranks what the first one reads; all raise errors"
    first,second = (o['files'] for o in both)
    assert equal(first['fitted'], second['fitted']) and first['path']==second['path']=='models/saved.pth'
    for o in (first,second):
        assert equal(o['fitted'], o['loaded']) and o['opt'] and o['loaded_history']==first['history']!={}
        assert 'There is no saved learner at' in o['no file'] and 'files0' in o['no file']
    assert 'Another process cannot follow' in first['does not fit'] and 'head.classify' in second['does not fit']

@pytest.fixture(scope='module')
def ended(people, tmp_path_factory):
    "How fits ended on each of two ranks; the second is killed at last"
    return run_both(ranks.ends_main, people, tmp_path_factory.mktemp('ended'), exitcodes=[0,-signal.SIGKILL])

ENDS = [('interrupt', 1, 'KeyboardInterrupt'), ('signal', 1, 'KeyboardInterrupt'),
        ('twice', 1, 'KeyboardInterrupt'), ('memory', 0, 'MemoryError: no memory'),
        ('validation', 1, 'IndexError: in validation'), ('embeds_on_one_rank', 1, 'ValueError: after the fit'),
        ('worker', 1, 'OSError: Caught OSError in DataLoader worker process 0. … OSError: a worker cannot read')]

@pytest.mark.parametrize('name,rank,reason', ENDS)
def test_an_end_on_one_rank_ends_both(ended, name, rank, reason):
    "The rank that ends raises its own error, the other one says who ended and why; both are as in one process"
    own,other = ended[rank][name],ended[1-rank][name]
    assert own['error'].startswith(reason.split(' … ')[0])
    message = f'Rank {rank} of 2 ended with {reason}. So rank {1-rank}, which waited for it, ends too'
    assert other['error']==f'RuntimeError: {message}'
    for o in (own,other): assert o['is_plain'] and not o['has_group']

@pytest.mark.parametrize('name', ['interrupt','signal','twice','memory','validation','cancel'])
def test_a_run_that_one_rank_ended_is_resumed(ended, name):
    "In the same processes, which meet again: both have the same weights, and the decisions those of an undisturbed run"
    first,second = (o[f'{name} resumed'] for o in ended)
    for o in (first,second): assert o['error'] is None and o['is_plain'] and o['has_group'] and len(o['rows'])==3
    assert equal(first['weights'], second['weights'])
    assert first['checkpoints'][0]=='1-0002.pth' and ended[0][name]['checkpoints'][-1]=='1-0001.pth'
    assert str(first['steps'])==str(ended[0]['whole']['steps'])
    assert equal(first['weights'], ended[0]['whole']['weights'])

def test_a_fit_that_one_rank_cancels(ended):
    first,second = (o['cancel'] for o in ended)
    assert 'CancelFitException on rank 0 of 2 alone' in first['error']
    assert 'let the callback cancel on all ranks' in first['error']
    assert 'Rank 0 of 2 ended with CancelFitException' in second['error']

def test_an_error_of_both_ranks_stays_as_it_is(ended):
    for o in (o['both'] for o in ended):
        assert o['error']=='ValueError: of both' and o['has_group'] and o['is_plain']

def test_a_file_that_the_first_rank_cannot_write(ended):
    first,second = (o['saves_nowhere']['error'] for o in ended)
    assert 'Rank 0 of 2 ended with' in second and first.split(':')[0] in second

def test_a_rank_that_is_killed(ended):
    assert 'Rank 1 of 2 ended without saying why: it was killed' in ended[0]['killed']['error']

def test_the_script_runs(people, tmp_path):
    "Started by `accelerate launch` as on two GPUs, but with --cpu"
    launch = [sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
              '--main_process_port', str(free_port())]
    network = ['--arch', 'resnet10', '--no-pretrained', '--size', '48', '24', '--n-parts', '3', '--p', '2', '--k', '4']
    run = ['--data', people, '--out', tmp_path, '--epochs', '1', '--recipe', 'one_cycle', '--num-workers', '0', '--cpu']
    command = [*launch, root/'examples'/'several_gpus.py', *network, *run]
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    res = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT, env=env)
    assert res.returncode==0, res.stderr[-3000:]
    assert res.stdout.count('mINP')==1 and 'queries counted             24 of 24' in res.stdout # One rank prints
    assert {'card.json','weights.pth','checkpoints'} <= {file.name for file in tmp_path.iterdir()}
