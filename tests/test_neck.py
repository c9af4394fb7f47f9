"BNNeck: heads with `neck=True` against a second version, and everything that describes, keeps or exports their models"
import hashlib
import importlib.util
import json
import pickle
import re
import shutil

import pytest
import torch
from fastai.vision.all import set_seed
from ranks import tiny
from torch import nn

from pyramidreid.cli.inputs import _describe_model
from pyramidreid.explain.interpretation import ReIDInterpretation
from pyramidreid.explain.matching_bands import *
from pyramidreid.export.model_files import describe_model, learner_from, load_embedder
from pyramidreid.export.onnx_runtime import Runtime
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.images import load_pixels
from pyramidreid.models.fingerprints import fingerprint, layer_settings, learner_fingerprint
from pyramidreid.models.pyramid import PyramidHead, PyramidNet, pool_windows
from pyramidreid.models.released import released_state_dict
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.distributed import restore_batchnorm, sync_batchnorm

HAS_ONNX = all(importlib.util.find_spec(module) for module in ('onnx','onnxscript','onnxruntime'))

# ---- the head

class NeckOfTheBenchmark(PyramidHead):
    "The first version, which `benchmarks/weighting.py` measured: a head with biases that are not trained"
    def reduced(self, fmap): return self.reduce(pool_windows(fmap, self.n_parts, self.levels)).transpose(0,1)
    def normed(self, x): return self.bn(x.flatten(1)).view_as(x)
    def features(self, fmap): return self.normed(self.reduced(fmap))
    def forward(self, fmap):
        x = self.reduced(fmap)
        return x,self.classify(self.drop(self.normed(x)).transpose(0,1)).transpose(0,1)

def add_neck(learn):
    head = learn.model.head
    head.__class__ = NeckOfTheBenchmark
    head.bn.bias.requires_grad_(False)
    head.classify.bias.requires_grad_(False)

@pytest.mark.parametrize('dynamic', [False,True])
def test_training_gives_the_weights_of_the_benchmark_s_neck(make_learner, dynamic):
    first,neck = make_learner(dynamic=dynamic, neck=False),make_learner(dynamic=dynamic, neck=True)
    add_neck(first)
    for learn in (first,neck):
        set_seed(1)
        learn.fit_one_cycle(1)
    weights = first.model.state_dict()
    for name in ('head.bn.bias','head.classify.bias'): assert not weights.pop(name).any()
    found = neck.model.state_dict()
    assert list(found)==list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
    assert torch.equal(neck.embed(), first.embed())

def tiny_net(neck, n_ids=7):
    body = nn.Sequential(nn.Conv2d(3, 5, 3, stride=4, padding=1))
    return PyramidNet(body, n_ids, n_parts=2, emb_sz=4, neck=neck)

def trained_net(neck):
    "A small net with statistics of its own"
    torch.manual_seed(0)
    net = tiny_net(neck)
    net(torch.randn(8,3,16,8))
    return net.eval()

def test_a_tiny_head_by_hand():
    "Two images with reduced features 2 and 4 and 1 and 1: normed -1 and 1 and 0 and 0, times 2 and 3"
    head = PyramidHead(nf=1, n_ids=3, n_parts=1, emb_sz=2, drop=0., neck=True)
    with torch.no_grad():
        head.reduce.weight.copy_(torch.tensor([[[1.,0.]]]))
        head.reduce.bias.copy_(torch.tensor([[0.,1.]]))
        head.bn.weight.copy_(torch.tensor([2.,3.]))
        head.classify.weight.copy_(torch.tensor([[[1.,-2.,.5],[9.,9.,9.]]]))
    cells = torch.tensor([1.,2.]).view(2,1,1,1) # average plus maximum: 2 and 4
    feats,logits = head(cells)
    assert feats.tolist()==[[[2.,1.]],[[4.,1.]]]
    torch.testing.assert_close(logits[:,0], torch.tensor([[-2.,4.,-1.],[2.,-4.,1.]]), rtol=1e-4, atol=1e-4)
    embedded = head.eval().features(cells)[:,0] # running means .3 and .1, variances .9 + .1*2 and .9
    want = torch.tensor([[2*1.7/1.1**.5, 3*.9/.9**.5], [2*3.7/1.1**.5, 3*.9/.9**.5]])
    torch.testing.assert_close(embedded, want, rtol=1e-4, atol=1e-4)
    unit = want/want.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head.embed(cells), unit, rtol=1e-4, atol=1e-4)

def test_heads_without_a_neck_have_the_weights_they_had():
    names = ['reduce.weight', 'reduce.bias', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var',
             'bn.num_batches_tracked', 'classify.weight', 'classify.bias']
    assert list(PyramidHead(3, 2).state_dict())==names
    biases = ('bn.bias','classify.bias')
    assert list(PyramidHead(3, 2, neck=True).state_dict())==[name for name in names if name not in biases]

def test_models_pickled_before_there_was_a_neck():
    net = trained_net(False)
    del vars(net.head)['neck']
    again = pickle.loads(pickle.dumps(net))
    assert again.head.neck is False
    x = torch.randn(2,3,16,8)
    assert torch.equal(again(x), net(x)) and fingerprint(again, (16,8))==fingerprint(trained_net(False), (16,8))

def test_a_pickled_neck_is_still_one():
    net = trained_net(True)
    again,x = pickle.loads(pickle.dumps(net)),torch.randn(2,3,16,8)
    assert again.head.neck and torch.equal(again(x), net(x)) and (net(x)<0).any()

def test_bf16_autocast_trains():
    torch.manual_seed(0)
    net,x = tiny_net(True),torch.randn(8,3,16,8)
    full = net(x)[1]
    with torch.autocast('cpu', torch.bfloat16): feats,logits = net(x)
    (feats.float().sum() + logits.float().square().sum()).backward()
    assert all(weight.grad.isfinite().all() and weight.grad.dtype==torch.float32 for weight in net.parameters())
    assert (logits.float()-full).abs().max()<.01

def test_synchronised_batch_norm_has_no_bias_either():
    net = trained_net(True)
    own,x = fingerprint(net, (16,8)),torch.randn(2,3,16,8)
    want,names = net(x),list(net.state_dict())
    replaced = sync_batchnorm(net)
    assert type(net.head.bn) is nn.SyncBatchNorm and net.head.bn.bias is None
    assert list(net.state_dict())==names and fingerprint(net, (16,8))==own
    restore_batchnorm(net, replaced)
    assert torch.equal(net(x), want)

# ---- loading weights

def test_weights_of_another_head_say_what_to_pass():
    with_neck,without = tiny_net(True),tiny_net(False)
    message = 'model of these weights has a BNNeck, and this one has none: pass neck=True to pyramid_learner'
    with pytest.raises(RuntimeError, match=message): without.load_state_dict(with_neck.state_dict())
    message = 'model of these weights has no BNNeck, and this one has one: pass neck=False to pyramid_learner'
    with pytest.raises(RuntimeError, match=message): with_neck.load_state_dict(without.state_dict())
    found = without.load_state_dict(with_neck.state_dict(), strict=False)
    assert found.missing_keys==['head.bn.bias','head.classify.bias']

def test_released_weights_have_no_neck():
    statistics = {f'1.{name}':(4,) for name in ('weight','bias','running_mean','running_var')}
    names = {'0.weight':(4,5,1,1), '0.bias':(4,), **statistics}
    released = {'base.conv1.weight':torch.rand(5,3,3,3)}
    for i in range(3):
        released |= {f'pyramid_conv_list0.{i}.{name}':torch.rand(shape) for name,shape in names.items()}
        released |= {f'pyramid_fc_list0.{i}.weight':torch.rand(7,4), f'pyramid_fc_list0.{i}.bias':torch.rand(7)}
    sd = released_state_dict(released)
    without = tiny_net(False)
    without.load_state_dict(sd, strict=False)
    assert torch.equal(without.head.bn.bias, sd['head.bn.bias'])
    with pytest.raises(RuntimeError, match='pass neck=False'): tiny_net(True).load_state_dict(sd)

@pytest.fixture(scope='module')
def pair(make_learner):
    "A learner with a neck and one without, saved with their optimizers"
    learners = [make_learner(arch=tiny, neck=neck) for neck in (True,False)]
    for learn in learners:
        learn.fit(1)
        learn.save('saved')
    return learners

def test_save_and_load(pair, make_learner):
    learn = pair[0]
    again = make_learner(arch=tiny, neck=True, path=learn.path).load('saved')
    weights = learn.model.state_dict()
    assert all(torch.equal(v, weights[name]) for name,v in again.model.state_dict().items())
    again.fit(1)

@pytest.mark.parametrize('classifier', [True,False])
@pytest.mark.parametrize('saved,own', [(0,1),(1,0)])
def test_load_refuses_another_head(pair, saved, own, classifier):
    file,learn = pair[saved].path/'models'/'saved.pth',pair[own]
    before = learn_weights(learn)
    with pytest.raises(ValueError, match=f'saved.pth has .*BNNeck.*: pass neck={not saved} to pyramid_learner'):
        learn.load(file, classifier=classifier)
    assert all(torch.equal(v, before[name]) for name,v in learn.model.state_dict().items())

def learn_weights(learn): return {name:v.clone() for name,v in learn.model.state_dict().items()}

def test_load_for_other_people(pair, make_learner, tmp_path):
    "Refused with the number of identities; without classifiers, the rest is loaded"
    state = torch.load(pair[0].path/'models'/'saved.pth', weights_only=True)
    name = 'head.classify.weight'
    state['model'][name] = state['model'][name][...,:5]
    torch.save(state, tmp_path/'others.pth')
    learn = make_learner(arch=tiny, neck=True)
    own = learn.model.head.classify.weight.clone()
    with pytest.raises(ValueError, match='trained on 5 identities, .* have 12'): learn.load(tmp_path/'others.pth')
    learn.load(tmp_path/'others.pth', classifier=False)
    assert torch.equal(learn.model.head.classify.weight, own)
    assert torch.equal(learn.model.head.bn.weight, state['model']['head.bn.weight'])

@pytest.mark.parametrize('first', [True,False])
def test_a_run_is_not_resumed_with_another_head(make_learner, first):
    learn = make_learner(arch=tiny, neck=first)
    learn.fit(1, cbs=Checkpoints())
    other = make_learner(arch=tiny, neck=not first, path=learn.path)
    words = ['6 branches, neck=True','6 branches'] if first else ['6 branches','6 branches, neck=True']
    entries = [re.escape(f'n_parts=3, levels=[1, 2, 3], {text} in ') for text in words]
    with pytest.raises(ValueError, match='pyramid: {}the checkpoint, {}this run'.format(*entries)):
        other.fit(1, cbs=Checkpoints(resume=True))

def test_a_run_is_resumed(make_learner, capsys):
    whole = make_learner(arch=tiny, neck=True)
    set_seed(1)
    whole.fit(2, cbs=Checkpoints())
    again = make_learner(arch=tiny, neck=True, path=whole.path)
    again.fit(2, cbs=Checkpoints(resume=True))
    assert 'Resumed from' in capsys.readouterr().out
    weights = whole.model.state_dict()
    assert all(torch.equal(v, weights[name]) for name,v in again.model.state_dict().items())

# ---- describing, sharing, exporting

@pytest.fixture(scope='module')
def neck(make_learner):
    learn = make_learner(neck=True)
    learn.fit(1)
    return learn

@pytest.fixture(scope='module')
def files(neck): return neck.dls.valid.items.fn[:6].tolist()

@pytest.fixture(scope='module')
def truth(neck, files): return neck.embed(neck.dls.test_dl(files)).numpy()

@pytest.fixture(scope='module')
def shared(neck, tmp_path_factory): return neck.save_model(tmp_path_factory.mktemp('shared')/'neck')

def plain_fingerprint(model, size):
    "As it was before there was a neck"
    about = dict(size=size, stats=None, windows=model.head.windows, norm=model.norm, work=list(layer_settings(model)))
    checksum = hashlib.sha256(json.dumps(about).encode())
    for name,value in sorted(model.state_dict().items()):
        if name.startswith('head.classify.') or name.endswith('num_batches_tracked'): continue
        checksum.update(f'{name} {list(value.shape)}'.encode())
        checksum.update(value.numpy())
    return checksum.hexdigest()

def test_fingerprints():
    "Those of models without a neck stay; the same weights with a neck have another"
    with_neck,without = trained_net(True),trained_net(False)
    assert fingerprint(without, (16,8))==plain_fingerprint(without, [16,8])
    without.load_state_dict(with_neck.state_dict(), strict=False)
    assert not without.head.bn.bias.any()
    assert fingerprint(with_neck, (16,8))!=fingerprint(without, (16,8))
    own = fingerprint(with_neck, (16,8))
    with_neck.head.neck = False # by hand: a ReLU more
    assert fingerprint(with_neck, (16,8))!=own

def test_what_describes_the_model_says_so(neck, pair):
    assert describe_model(neck)['neck'] is True and 'neck' not in describe_model(pair[1])
    entry = 'n_parts=3, levels=[1, 2, 3], 6 branches'
    assert neck.about(neck.dls.valid)['pyramid']==f'{entry}, neck=True'
    assert pair[1].about(pair[1].dls.valid)['pyramid']==entry
    assert neck.gather_args()['pyramid']==f'{entry}, neck=True'
    assert f'{entry}, neck=True' in str(neck.evaluate())
    assert neck.summary().startswith('PyramidNet with a BNNeck (Input') and 'BNNeck' not in pair[1].summary()
    assert 'neck=True' in repr(neck.model) and 'neck' not in repr(pair[1].model)

def test_a_shared_model(neck, shared, files, truth):
    model = load_embedder(shared)
    assert model.about['neck'] is True and model.model.head.neck
    assert abs(model.embed(files)-truth).max()<=1e-4 and truth.min()<0
    assert repr(model).startswith('Embedder: resnet10 with a BNNeck at 48×24, 48 dimensions, trained on ')
    assert model.fingerprint==learner_fingerprint(neck)
    assert _describe_model(model, 'these', flip=False)['pyramid']==neck.about(neck.dls.valid)['pyramid']

def test_an_exported_program(neck, files, truth, tmp_path):
    program = torch.export.load(neck.to_exported(tmp_path/'m.pt2')).module()
    found = program(torch.from_numpy(load_pixels(files, (48,24)))).numpy()
    assert abs(found-truth).max()<=1e-4

@pytest.mark.skipif(not HAS_ONNX, reason='the onnx extra is not installed')
def test_onnx(neck, files, truth, tmp_path):
    model = Runtime(neck.to_onnx(tmp_path/'m.onnx'), threads=1)
    assert abs(model.embed(files)-truth).max()<=1e-4
    assert model.about['neck'] is True and model.fingerprint==learner_fingerprint(neck)

def changed(folder, other, **kwargs):
    "A copy of a shared model with other entries in model.json, without those that are `...`"
    shutil.copytree(folder, other)
    about = {**json.loads((other/'model.json').read_text()), **kwargs}
    (other/'model.json').write_text(json.dumps({k:v for k,v in about.items() if v is not ...}))
    return other

@pytest.mark.parametrize('value', [1,'yes',None,[True]])
def test_a_wrong_type_in_a_file_is_named(shared, tmp_path, value):
    with pytest.raises(ValueError, match="'neck' is "+re.escape(repr(value))):
        load_embedder(changed(shared, tmp_path/'m', neck=value))

def test_files_without_the_entry_have_no_neck(neck, shared, make_learner, tmp_path):
    plain = make_learner(neck=False)
    plain.fit(1)
    folder = plain.save_model(tmp_path/'plain')
    assert 'neck' not in json.loads((folder/'model.json').read_text())
    assert load_embedder(folder).model.head.neck is False
    assert load_embedder(changed(folder, tmp_path/'said', neck=False)).model.head.neck is False
    with pytest.raises(ValueError, match='head.bn.bias is not known'):
        load_embedder(changed(folder, tmp_path/'wrong', neck=True))
    with pytest.raises(ValueError, match='head.bn.bias is missing'):
        load_embedder(changed(shared, tmp_path/'lost', neck=...))
    with pytest.raises(ValueError, match='in .*plain has no BNNeck.*: pass neck=False .*learner_from'):
        neck.load_weights(folder)
    with pytest.raises(ValueError, match='in .*neck has a BNNeck.*: pass neck=True .*learner_from'):
        plain.load_weights(shared)

def test_training_continues_a_shared_model(neck, shared, make_dls, make_learner):
    for learn in (learner_from(shared, make_dls()),make_learner(neck=True).load_weights(shared)):
        assert learn.model.head.neck and learner_fingerprint(learn)==learner_fingerprint(neck)
    with pytest.raises(ValueError, match='pass neck=True'): learner_from(shared, make_dls(), neck=False)

def test_explanations(neck, files):
    "The cosine is still the mean over branches, whose similarities may be negative"
    a,b = neck.embed(neck.dls.test_dl(files[::5]))
    explanation = neck.explain(*files[::5])
    assert explanation.cosine==pytest.approx((a@b).item(), abs=1e-6)
    assert explanation.plot().axes
    interp = ReIDInterpretation.from_learner(neck)
    assert interp.emb.shape[1]==48

def test_a_gallery(neck, shared, pair, files):
    gallery = Gallery.from_learner(neck, files)
    found = gallery.search(files[2], 1)
    assert found.similarity.iloc[0]==pytest.approx(1, abs=1e-5) and found.key.iloc[0]==str(files[2])
    assert gallery.fingerprint==load_embedder(shared).fingerprint
    embs = Gallery(load_embedder(shared)).embed(files[:1])
    assert gallery.search(embs, 1).similarity.iloc[0]==pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match='nother model'): gallery.search(Gallery(pair[1]).embed(files[:1]), 1)

def test_fine_tuning_leaves_no_bias_to_train(make_learner):
    "`freeze` and `unfreeze` set which weights are trained"
    learn = make_learner(arch=tiny, neck=True)
    learn.fine_tune(1)
    trained = {name for name,p in learn.model.head.named_parameters() if p.requires_grad}
    assert trained=={'reduce.weight','reduce.bias','bn.weight','classify.weight'}
