"""Folded batch norms: the arithmetic by hand, what may not be folded, and the same embeddings"""
import copy

import numpy as np
import pytest
import torch
from fastai.vision.all import resnet18
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from pyramidreid.export.model_files import load_embedder
from pyramidreid.models.backbone import create_backbone, resnet10
from pyramidreid.models.folding import _fold, _pairs, fold_batch_norms
from pyramidreid.models.pyramid import PyramidNet

SIZE = (96, 48)

def with_statistics(model):
    "Give the batch norms of a model statistics, as training does"
    torch.manual_seed(0)
    for m in model.modules():
        if not isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): continue
        m.running_mean.normal_()
        m.running_var.uniform_(.5, 2)
        nn.init.uniform_(m.weight, .5, 1.5)
        if m.bias is not None: nn.init.normal_(m.bias)
    return model.eval()

def pyramid(body): return with_statistics(PyramidNet(body, n_ids=2, n_parts=3, emb_sz=8))

def embeddings(model):
    x = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(): return model(x)

def n_norms(model): return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())

def test_by_hand():
    "2x+1, less the mean 3, over the deviation 2, times 6, plus 5: 6x-1"
    conv,norm = nn.Conv2d(1, 1, 1),nn.BatchNorm2d(1, eps=0)
    for tensor,value in ((conv.weight, 2), (conv.bias, 1), (norm.running_mean, 3), (norm.running_var, 4),
                         (norm.weight, 6), (norm.bias, 5)): tensor.data.fill_(value)
    _fold(conv, norm)
    assert (conv.weight.item(),conv.bias.item())==(6,-1)

def test_by_hand_without_bias_and_affine():
    "2x, less the mean 3, over the deviation 2: x-1.5"
    conv,norm = nn.Conv2d(1, 1, 1, bias=False),nn.BatchNorm2d(1, eps=0, affine=False)
    for tensor,value in ((conv.weight, 2), (norm.running_mean, 3), (norm.running_var, 4)): tensor.data.fill_(value)
    _fold(conv, norm)
    assert (conv.weight.item(),conv.bias.item())==(1,-1.5)

@pytest.mark.parametrize('arch', [resnet10, resnet18])
def test_the_same_embeddings(arch):
    model = pyramid(create_backbone(arch, pretrained=False))
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norms(model, SIZE)
    assert n_norms(folded)==0<n_norms(model)
    assert (embeddings(folded)-embeddings(model)).abs().max()<=1e-5
    assert all(torch.equal(value, before[name]) for name,value in model.state_dict().items())

@pytest.mark.parametrize('arch', ['tf_efficientnet_lite0','mobilenetv2_050'])
def test_timm_models_keep_their_activations(arch):
    model = pyramid(create_backbone(arch, pretrained=False))
    folded = fold_batch_norms(model, SIZE)
    assert n_norms(folded)==0<n_norms(model)
    assert sum(isinstance(m, nn.ReLU6) for m in folded.modules())==sum(isinstance(m, nn.ReLU6) for m in model.modules())
    assert (embeddings(folded)-embeddings(model)).abs().max()<=1e-5

class Two(nn.Module):
    "A convolution and a batch norm; subclasses use them in some way"
    def __init__(self):
        super().__init__()
        self.conv,self.norm = nn.Conv2d(3, 3, 1),nn.BatchNorm2d(3)

class Plain(Two):
    def forward(self, x): return self.norm(self.conv(x))

class OutputTwice(Two):
    def forward(self, x):
        x = self.conv(x)
        return x+self.norm(x)

class ConvTwice(Two):
    def forward(self, x): return self.norm(self.conv(x)) + self.conv(x)

class NormTwice(Two):
    def forward(self, x): return self.norm(self.norm(self.conv(x)))

class Between(Two):
    def forward(self, x): return self.norm(self.conv(x).relu())

class NormFirst(Two):
    def forward(self, x): return self.conv(self.norm(x))

@pytest.mark.parametrize('kind', [OutputTwice, ConvTwice, NormTwice, Between, NormFirst])
def test_what_cannot_be_folded(kind): assert _pairs(kind())==[] and _pairs(Plain())==[('conv','norm')]

@pytest.mark.parametrize('change', [
    lambda m: m.conv.register_forward_hook(lambda module, inputs, output: 2*output),
    lambda m: m.norm.register_forward_pre_hook(lambda module, inputs: None),
    lambda m: weight_norm(m.conv),
    lambda m: setattr(m, 'norm', nn.BatchNorm2d(3, track_running_stats=False)),
    lambda m: setattr(m, 'conv', nn.ConvTranspose2d(3, 3, 1))])
def test_layers_that_do_more_are_left_alone(change):
    m = Plain()
    change(m)
    assert _pairs(m)==[]

class Weighing(Two):
    "Uses the weights of its convolution for something else, too"
    def forward(self, x): return self.norm(self.conv(x))[:,:,::8,::8] + self.conv.weight.sum()

class Looking(Two):
    "Decides by values, which `torch.fx` cannot record"
    def forward(self, x):
        x = self.norm(self.conv(x))[:,:,::8,::8]
        return -x if x.mean()>0 else x

@pytest.mark.parametrize('body', [Weighing, Looking])
def test_a_backbone_that_would_change_stays_as_it_is(body):
    model = pyramid(body())
    same = fold_batch_norms(model, SIZE)
    assert n_norms(same)==1 and torch.equal(embeddings(same), embeddings(model))

def test_an_embedder_folds_and_keeps_its_model(trained, people, tmp_path):
    from pyramidreid.models.fingerprints import fingerprint
    model = load_embedder(trained.save_model(tmp_path/'m'))
    files = sorted((people/'query').glob('*.jpg'))
    emb = model.embed(files)
    assert n_norms(model._fast_net)==0<n_norms(model.net)
    assert abs(emb-trained.embed(trained.dls.test_dl(files)).numpy()).max()<=1e-5
    assert fingerprint(model.model, model.size, model.stats)==model.fingerprint
    x = np.random.default_rng(0).integers(0, 256, (3, *model.size, 3), dtype=np.uint8)
    with torch.no_grad(): assert abs(model.net(torch.from_numpy(x)).numpy()-model.run(x)).max()<=1e-5
