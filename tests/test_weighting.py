"The benchmark of loss weighting: its losses, heads and gradients against plain versions, its tables by hand"
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1]/'benchmarks'))
import weighting

from pyramidreid.models.losses import PyramidLoss, plain_triplet_loss
from pyramidreid.models.pyramid import PyramidHead


def test_conflicting_gradients_by_hand():
    "(1, 0) without (-1, 1) is (0.5, 0.5); (-1, 1) without (1, 0) is (0, 1)"
    conflict = [torch.tensor([1.,0.]),torch.tensor([-1.,1.])]
    assert weighting.without_conflict(conflict).tolist()==[.5,1.5]
    agree = [torch.tensor([1.,0.]),torch.tensor([1.,1.])]
    assert weighting.without_conflict(agree).tolist()==[2.,1.]

class Keep(Callback):
    "The first step's images, labels and gradients"
    order = 90
    def before_batch(self):
        if self.train_iter==0 and self.training: self.batch = self.xb[0].clone(),self.yb[0].clone()
    def before_step(self):
        if self.train_iter==0: self.grads = {name:p.grad.clone() for name,p in self.model.named_parameters()}

def first_step(learn):
    keep = Keep()
    learn.fit(1, lr=0., cbs=keep)
    return keep

def test_gradients_of_the_backbone_are_those_without_conflict(make_learner):
    "The body's by a product with the sum of both gradients by the map, the head's those of the plain sum"
    learn = make_learner(dynamic=False, drop=0.)
    weighting.project_gradients(learn)
    keep = first_step(learn)
    assert not learn.model.body._forward_hooks
    model,loss = learn.model.train(),PyramidLoss()
    model.zero_grad()
    images,labels = keep.batch
    fmap = model.body(images)
    loss(model.head(fmap), labels)
    by_map = [torch.autograd.grad(part, fmap, retain_graph=True)[0] for part in loss.parts.values()]
    body = dict(model.body.named_parameters())
    want = torch.autograd.grad(fmap, list(body.values()), weighting.without_conflict(by_map), retain_graph=True)
    for name,grad in zip(body, want): torch.testing.assert_close(keep.grads[f'body.{name}'], grad, rtol=1e-3, atol=1e-6)
    head = dict(model.head.named_parameters())
    want = torch.autograd.grad(sum(loss.parts.values()), list(head.values()))
    for name,grad in zip(head, want): torch.testing.assert_close(keep.grads[f'head.{name}'], grad, rtol=1e-3, atol=1e-6)

def test_a_neck_puts_the_batch_norm_between_the_losses(make_learner):
    learn = make_learner(**weighting.questions(.5)['Where the losses act']['fixed sum, BNNeck'], drop=0.)
    head = learn.model.head.train()
    fmap = torch.randn(8, head.reduce.weight.shape[1], 6, 3)
    without = PyramidHead(*head.classify.weight.shape[1:], n_parts=3, emb_sz=8) # Of which the ReLU is wanted
    for name in ('reduce','bn'): setattr(without, name, getattr(head, name))
    plain = without.features(fmap)
    feats,logits = head(fmap)
    normed = (feats-feats.mean(0))/(feats.var(0, unbiased=False)+head.bn.eps).sqrt()*head.bn.weight.view_as(feats[0])
    torch.testing.assert_close(normed.relu(), plain, rtol=1e-4, atol=1e-5)
    want = torch.einsum('nbe,bei->nbi', normed, head.classify.weight)
    torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-5)
    trained = {name for name,p in head.named_parameters() if p.requires_grad}
    assert not trained & {'bn.bias','classify.bias'}
    learn.fit(1, lr=0.) # in evaluation mode, the embedding is the normed one
    emb = learn.model.eval().head.embed(fmap)
    assert (emb<0).any()

def test_the_triplet_loss_of_the_whole_embedding():
    feats,labels = torch.randn(8, 3, 4, requires_grad=True),torch.arange(8)//2
    loss = weighting.WholeTriplet()
    total = loss((feats, torch.zeros(8, 3, 4)), labels)
    whole = F.normalize(F.normalize(feats, dim=-1).flatten(1), dim=-1)
    torch.testing.assert_close(loss.parts['triplet'], 3*plain_triplet_loss(whole, labels))
    torch.testing.assert_close(total, loss.parts['id']+loss.parts['triplet'])

def test_rules_without_a_part_of_the_paper_s():
    losses = [dict(id=8., triplet=10.), dict(id=4., triplet=10.), dict(id=9., triplet=1.), dict(id=4., triplet=4.)]
    always,measured = weighting.AlwaysPK(),weighting.MeasuredOnAll()
    assert [always.step(o)[1] for o in losses]==['pk']*4 and always.measured==('id','triplet')
    for o in losses: measured.step(o)
    assert measured.k['triplet']==pytest.approx(.25*4 + .75*(.25*1 + .75*10)) # of all four batches

def runs():
    row = dict(rank1=.5, seconds=60., cpu_seconds=60., steps=10, random=float('nan'),
               hardware='A CPU, 2 cores')
    base = [dict(row, name=weighting.BASE, seed=seed, mAP=.5+.1*seed) for seed in (0,1)]
    again = [dict(row, name=name, seed=0, mAP=.5+d) for name,d in zip(weighting.AGAIN, (.03,-.04))]
    gate = [dict(row, name='rule, gate', seed=seed, mAP=.52+.1*seed, random=.6) for seed in (0,1)]
    return pd.DataFrame(base+again+gate)

def test_the_table_by_hand():
    "Chance is the root mean square of .03 and -.04; the rule is .02 ahead with both seeds"
    gains = weighting.against_base(runs())
    assert weighting.chance(gains)==pytest.approx((.0025/2)**.5)
    text = weighting.tables(runs(), weighting.questions(.5))
    row = next(line for line in text.splitlines() if line.startswith('| rule, gate |'))
    assert row=='| rule, gate | 0.570 ± 0.071 | 0.500 ± 0.000 | +0.020 (+0.020 … +0.020) | 60% | 1.0 | 2 |'
    assert len(weighting.plot(runs(), weighting.questions(.5), 'title').axes)==1

def test_minutes_of_a_processor_count_no_run_on_a_gpu():
    "Of 60 and 180 seconds on a CPU and 9 on a GPU, the mean of the first two: 2 minutes"
    group = pd.DataFrame(dict(cpu_seconds=[60.,180.,9.], hardware=['A CPU, 2 cores','A CPU, 4 cores','NVIDIA H200']))
    assert weighting.cpu_minutes(group)=='2.0' and weighting.cpu_minutes(group[2:])==''

def test_old_results_are_of_the_same_settings():
    "Steps and rate identify the runs of one cycle, as they did before there was a choice of recipe"
    words = ['--data','x']
    assert weighting.length_and_rates(weighting.parse([*words, '--steps','636']))==dict(steps=636, lr=1e-3)
    modern = weighting.parse([*words, '--recipe','modern', '--epochs','8'])
    assert weighting.length_and_rates(modern)==dict(epochs=8, recipe='modern')

def test_no_chance_without_a_second_training():
    first = runs()[lambda df: ~df.name.isin(list(weighting.AGAIN))]
    assert weighting.chance(weighting.against_base(first)) is None

def test_every_scheme_has_a_name_of_its_own():
    asked = weighting.questions(.5)
    names = [name for schemes in asked.values() for name in schemes]
    assert len(set(names))==len(names) and names[0]==weighting.BASE

@pytest.mark.slow
def test_every_scheme_trains(tmp_path, people):
    "One step each; then nothing is left to do, and another setting is refused"
    args = ['--data', str(people), '--arch', 'resnet10', '--size', '48', '24', '--n-parts', '3', '--steps', '1']
    args += ['--seeds', '1', '--out', str(tmp_path/'tiny')]
    weighting.main(args)
    note = json.loads((tmp_path/'tiny.json').read_text())
    asked = weighting.questions(.5)
    assert [run['name'] for run in note['runs']]==[name for schemes in asked.values() for name in schemes]
    assert all(0<run['mAP']<1 and run['steps']==1 for run in note['runs'])
    table = (tmp_path/'tiny.md').read_text()
    for question in asked: assert f'## {question}' in table
    assert (tmp_path/'tiny.png').read_bytes().startswith(b'\x89PNG')
    weighting.main(args)
    assert json.loads((tmp_path/'tiny.json').read_text())['runs']==note['runs']
    with pytest.raises(ValueError, match='another configuration'): weighting.main([*args, '--lr', '1'])

def test_runs_of_another_machine_are_named():
    rows = [('a',0,'CPU'), ('b',0,'CPU'), ('c',0,'CPU'), ('a',1,'GPU'), ('a',2,'GPU'), ('b',1,'GPU')]
    runs = pd.DataFrame(rows, columns=['name','seed','hardware'])
    named = 'a (seed 1, 2); b (seed 1)'
    assert weighting.made_elsewhere(runs[:5])==' Computed on GPU, the other runs on CPU: a (seed 1, 2).'
    assert weighting.made_elsewhere(runs[:3])==''
    assert weighting.made_elsewhere(pd.concat([runs, runs[:1]])).endswith(f'CPU: {named}.')

def test_the_time_limit_is_no_part_of_a_command():
    from common import without_minutes
    command = "python benchmarks/weighting.py --jobs 2 --only 'fixed sum 1 : 1' PCGrad"
    assert without_minutes(command)==command
    assert without_minutes(command.replace('--jobs 2', '--jobs 2 --minutes 12.5'))==command
    assert without_minutes(f'{command} --minutes 3')==command
