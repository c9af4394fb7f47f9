"Bodies of many makers: the last stride, misfit and broken weights, models without a map, and parameter groups"
import importlib.util
import re

import pytest
import torch
from fastai.vision.all import (
    SGD,
    DataLoader,
    DataLoaders,
    Learner,
    densenet121,
    resnet18,
    resnet50,
    vgg11_bn,
    vgg16_bn,
    xresnet18,
)
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from pyramidreid import core
from pyramidreid.models import backbone
from pyramidreid.models.backbone import *
from pyramidreid.models.pyramid import PyramidNet, pyramid_split

timm = pytest.mark.skipif(importlib.util.find_spec('timm') is None, reason='timm is an extra')
T = lambda name: pytest.param(name, marks=timm)
archs = [resnet10, resnet18, densenet121, vgg11_bn, xresnet18, models.mobilenet_v3_small, T('tf_efficientnet_lite0'), T('test_resnet')]

def fmap(body, h=192, w=96):
    with torch.no_grad(): return body.eval()(torch.zeros(1,3,h,w)).shape

@pytest.mark.parametrize('arch', archs)
def test_last_stride(arch):
    "Twice the height and width of what the makers intended, and the same weights"
    bodies = {s:create_backbone(arch, pretrained=False, last_stride=s) for s in (1,2)}
    (n1,c1,*hw1),(n2,c2,*hw2) = fmap(bodies[1]),fmap(bodies[2])
    assert hw2==[6,3] and hw1==[12,6] and c1==c2
    assert body_shape(bodies[1])==(c1,16) and body_shape(bodies[2])==(c2,32)
    shapes = [{k:v.shape for k,v in b.state_dict().items()} for b in bodies.values()]
    assert shapes[0]==shapes[1]

@pytest.mark.parametrize('arch', [T('test_convnext'), models.convnext_tiny])
def test_last_stride_of_a_kernel_of_two(arch):
    "ConvNeXt downsamples with 2×2 kernels and no padding; with stride 1 they must not eat a row"
    body = create_backbone(arch, pretrained=False)
    assert fmap(body)[2:]==(12,6)
    assert body_shape(body)[1]==16

def test_last_stride_of_resnet50_at_the_paper_s_size():
    assert fmap(create_backbone(resnet50, pretrained=False), 384, 128)==(1,2048,24,8)

def test_looking_at_a_body_leaves_it_as_it_was():
    "No hook stays, no statistic moves, the mode is kept"
    body = create_backbone(resnet10, pretrained=False)
    before = {k:v.clone() for k,v in body.state_dict().items()}
    for mode in (True,False):
        body.train(mode)
        body_shape(body)
        assert all(m.training==mode for m in body.modules())
    assert not any(m._forward_hooks for m in body.modules())
    assert all(torch.equal(v, before[k]) for k,v in body.state_dict().items())

@pytest.mark.parametrize('arch', [models.vit_b_16, T('test_vit'), T('vit_tiny_patch16_224'), T('swin_tiny_patch4_window7_224')])
def test_a_transformer_is_refused(arch):
    name = arch if isinstance(arch, str) else arch.__name__
    with pytest.raises(ValueError, match=f'{name}.*CNN'): create_backbone(arch, pretrained=False)

@pytest.mark.parametrize('arch', [models.swin_t, T('resnetblur18'), T('hrnet_w18_small')])
def test_a_last_stride_that_cannot_be_undone_is_an_error(arch):
    "Merging patches, blurring before a stride, several resolutions at once: never another stride than the last, never a crash inside the body"
    name = arch if isinstance(arch, str) else arch.__name__
    with pytest.raises(ValueError, match=f'{name}.*last_stride=2'): create_backbone(arch, pretrained=False)

def test_wrong_arguments():
    with pytest.raises(ValueError, match='last_stride=3'): create_backbone(resnet10, False, last_stride=3)
    with pytest.raises(ValueError, match='pretrained=False'): create_backbone(resnet10, True)

def test_a_missing_timm_names_the_extra(monkeypatch):
    real = importlib.import_module
    def fake(name, *args):
        if name=='timm': raise ModuleNotFoundError("No module named 'timm'")
        return real(name, *args)
    monkeypatch.setattr(core.importlib, 'import_module', fake)
    for f in (lambda: create_backbone('tf_efficientnet_lite0', False), lambda: backbone_stats('tf_efficientnet_lite0')):
        with pytest.raises(ImportError, match=re.escape("pip install 'pyramidreid[timm]'")): f()

@timm
def test_an_unknown_timm_name_is_named():
    with pytest.raises(Exception, match='resnet_of_nobody'): create_backbone('resnet_of_nobody', False)

# weights

@pytest.fixture
def sd():
    torch.manual_seed(3)
    return resnet10().state_dict()

def save(sd, path):
    save_file(sd, path) if path.suffix=='.safetensors' else torch.save(sd, path)
    return path

@pytest.mark.parametrize('name', ['w.pth','w.pt','w.safetensors'])
def test_weights_from_a_file(sd, tmp_path, name):
    "With the classifier, without it, or with one of another width"
    own = {k:v for k,v in sd.items() if not k.startswith('fc.')}
    for part in (sd, own, {**own, 'fc.weight':torch.zeros(5,512), 'fc.bias':torch.zeros(5)},
                 {k:v for k,v in sd.items() if 'num_batches' not in k}):
        body = create_backbone(resnet10, weights=save(part, tmp_path/name))
        got = list(body.state_dict().values())
        assert len(got)==len(own) and all(torch.equal(a, b) for a,b in zip(got, own.values()))

def test_half_precision_weights_become_float32(sd, tmp_path):
    body = create_backbone(resnet10, weights=save({k:v.half() if v.is_floating_point() else v for k,v in sd.items()}, tmp_path/'h.safetensors'))
    assert all(p.dtype==torch.float32 for p in body.parameters())

def test_misfit_weights_say_what_does_not_fit(sd, tmp_path):
    def message(sd):
        with pytest.raises(ValueError) as e: create_backbone(resnet10, weights=save(sd, tmp_path/'misfit.pth'))
        assert 'misfit.pth' in str(e.value)
        return str(e.value)
    less = {k:v for k,v in sd.items() if not k.startswith('layer2')}
    msg = message(less)
    assert 'missing' in msg and 'layer2' in msg and str(sum(k.startswith('layer2') and 'num_batches' not in k for k in sd)) in msg
    msg = message({**sd, 'neck.weight':torch.zeros(2)})
    assert '1 unknown (neck.weight)' in msg
    msg = message({**sd, 'conv1.weight':torch.zeros(64,1,7,7)})
    assert 'conv1.weight' in msg and '(64, 1, 7, 7)' in msg and '(64, 3, 7, 7)' in msg
    msg = message(resnet18().state_dict())
    assert 'unknown' in msg and 'layer1.1' in msg

def test_missing_and_broken_files(sd, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): create_backbone(resnet10, weights=tmp_path/'nowhere.pth')
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): create_backbone(resnet10, weights=str(tmp_path/'nowhere.pth'))
    for name in ('cut.pth','cut.safetensors'):
        f = save(sd, tmp_path/name)
        data = f.read_bytes()
        for part in (data[:len(data)//2], data[:5], b'', b'no weights at all, just words'):
            f.write_bytes(part)
            with pytest.raises(ValueError, match=name): create_backbone(resnet10, weights=f)

def test_a_file_that_is_no_state_dict_is_named(tmp_path):
    for i,o in enumerate((torch.zeros(3), [1,2], {'model':{'conv1.weight':torch.zeros(1)}})):
        f = tmp_path/f'odd{i}.pth'
        torch.save(o, f)
        with pytest.raises(ValueError, match=f.name): create_backbone(resnet10, weights=f)

def test_a_failed_download_says_what_to_do(monkeypatch):
    from urllib.error import URLError
    def fail(*args): raise URLError('no network')
    monkeypatch.setattr(backbone, '_new_model', fail)
    with pytest.raises(OSError, match='no network.*weights=.*pretrained=False'): create_backbone(resnet18)

def test_stats():
    mean,std = backbone_stats(resnet18)
    assert len(mean)==len(std)==3
    if importlib.util.find_spec('timm'):
        assert backbone_stats('tf_efficientnet_lite0')==([.5]*3,[.5]*3)
        assert [round(o,3) for o in backbone_stats('resnet18')[0]]==[.485,.456,.406]

# parameter groups

def net(arch): return PyramidNet(create_backbone(arch, pretrained=False), 3, n_parts=2, emb_sz=4)

@pytest.mark.parametrize('arch', archs+[vgg16_bn])
def test_parameter_groups_cover_every_weight_once(arch):
    m = net(arch)
    groups = pyramid_split(m)
    ids = [id(p) for g in groups for p in g]
    assert len(groups)==3 and len(ids)==len(set(ids)) and set(ids)=={id(p) for p in m.parameters()}
    assert [id(p) for p in groups[2]]==[id(p) for p in m.head.parameters()]

@pytest.mark.parametrize('arch', archs+[vgg16_bn])
def test_no_parameter_group_is_empty(arch):
    "The body has a first and a second half, or discriminative learning rates and freeze_to(-2) do nothing"
    groups = pyramid_split(net(arch))
    assert [len(g)>0 for g in groups]==[True]*3

def test_learning_rate_slices_reach_the_groups():
    m = net(resnet18)
    learn = Learner(DataLoaders(DataLoader([1]),DataLoader([1])), m, loss_func=lambda *a: None, splitter=pyramid_split, opt_func=SGD)
    learn.create_opt()
    learn.opt.set_hyper('lr', slice(1e-5,1e-3))
    assert [h['lr'] for h in learn.opt.hypers]==pytest.approx([1e-5,1e-4,1e-3])
    lr_of = {id(p):h['lr'] for p,_,_,h in learn.opt.all_params()}
    assert lr_of[id(m.head.reduce.weight)]==pytest.approx(1e-3) and lr_of[id(m.body[0].weight)]==pytest.approx(1e-5)
    assert lr_of[id(m.body[-1][-1].conv2.weight)]==pytest.approx(1e-4)
    learn.freeze()
    assert m.head.reduce.weight.requires_grad and not any(p.requires_grad for mod in m.body.modules() if isinstance(mod, nn.Conv2d) for p in mod.parameters())
    learn.freeze_to(-2)
    assert m.body[-1][-1].conv2.weight.requires_grad and not m.body[0].weight.requires_grad
    learn.unfreeze()
    assert all(p.requires_grad for p in m.parameters())
