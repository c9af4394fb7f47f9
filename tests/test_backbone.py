"Bodies of many families: the last stride, weights that do not fit or are damaged, models without a feature map"
import pickle
from pathlib import Path
from urllib.error import URLError

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
    xresnet18,
)
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from pyramidreid.models import backbone
from pyramidreid.models.backbone import *
from pyramidreid.models.pyramid import PyramidNet, pyramid_split

# VGG's classifier, which is cut off, takes seconds to initialise
vgg = pytest.param(vgg11_bn, marks=pytest.mark.slow)
archs = [resnet10, resnet18, densenet121, vgg, xresnet18, models.mobilenet_v3_small,
         'tf_efficientnet_lite0', 'test_resnet']

def map_shape(body, height=192, width=96):
    with torch.no_grad(): return tuple(body.eval()(torch.zeros(1,3,height,width)).shape)

def weight_shapes(body): return {name:weight.shape for name,weight in body.state_dict().items()}

# The last stride

@pytest.mark.parametrize('arch', archs)
def test_last_stride(arch):
    "Stride 1 doubles height and width of the feature map, with the same weights"
    fine,coarse = (create_backbone(arch, pretrained=False, last_stride=stride) for stride in (1,2))
    _,channels,height,width = map_shape(coarse)
    assert (height,width)==(6,3)
    assert map_shape(fine)==(1,channels,12,6)
    assert body_shape(fine)==(channels,16) and body_shape(coarse)==(channels,32)
    assert weight_shapes(fine)==weight_shapes(coarse)

@pytest.mark.parametrize('arch', ['test_convnext', models.convnext_tiny])
def test_last_stride_of_a_kernel_of_two(arch):
    "ConvNeXt downsamples with 2×2 kernels without padding; with stride 1 they must not lose a row"
    body = create_backbone(arch, pretrained=False)
    assert map_shape(body)[2:]==(12,6)
    assert body_shape(body)[1]==16

def test_last_stride_of_resnet50_at_the_paper_s_size():
    assert map_shape(create_backbone(resnet50, pretrained=False), 384, 128)==(1,2048,24,8)

@pytest.mark.parametrize('training', [True,False])
def test_body_shape_leaves_the_body_unchanged(training):
    "No hook stays, no statistic changes, the mode is kept"
    body = create_backbone(resnet10, pretrained=False).train(training)
    before = {name:value.clone() for name,value in body.state_dict().items()}
    body_shape(body)
    assert all(m.training==training for m in body.modules())
    assert not any(m._forward_hooks for m in body.modules())
    assert all(torch.equal(value, before[name]) for name,value in body.state_dict().items())

# Transformers of timm are built for the size of the images: tests/test_bodies.py
@pytest.mark.parametrize('arch', [models.vit_b_16])
def test_a_transformer_is_refused(arch):
    with pytest.raises(ValueError, match=f'{arch_name(arch)}.*CNN'): create_backbone(arch, pretrained=False)

@pytest.mark.parametrize('arch', [models.swin_t, 'resnetblur18', 'hrnet_w18_small'])
def test_a_last_stride_that_cannot_be_undone_is_an_error(arch):
    "Merged patches, blur before a stride, several resolutions: no other stride is changed, and the body does not crash"
    with pytest.raises(ValueError, match=f'{arch_name(arch)}.*last_stride=2'): create_backbone(arch, pretrained=False)

# Where a body is cut

def count(module): return sum(p.numel() for p in module.parameters())

def without_pooling_layers():
    "Three convolutions and a mean without a layer for it; a pooling layer at the beginning, as ShuffleNet has it"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1,self.pool,self.stage = nn.Conv2d(3,4,3,2,1),nn.MaxPool2d(2),nn.Conv2d(4,8,3,2,1)
            self.conv2,self.fc = nn.Conv2d(8,16,1),nn.Linear(16,10)
        def forward(self, x): return self.fc(self.conv2(self.stage(self.pool(self.conv1(x)))).mean([2,3]))
    return Net()

def changed_in_between():
    "The same, but with something between its modules that no module does"
    net = without_pooling_layers()
    net.forward = lambda x: net.fc(net.conv2(net.stage(net.pool(net.conv1(x))).relu()).mean([2,3]))
    return net

def test_a_body_keeps_what_is_before_the_mean():
    "The input of the classifier is the mean of the body's feature map"
    torch.manual_seed(0)
    net,body = without_pooling_layers(),None
    body = create_backbone(lambda: net, pretrained=False, last_stride=2)
    assert count(body)==count(net)-count(net.fc)
    seen = []
    net.fc.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    x = torch.randn(2,3,64,32)
    with torch.no_grad():
        net.eval()(x)
        torch.testing.assert_close(body.eval()(x).mean([2,3]), seen[0])

def test_a_body_that_would_lose_its_weights_is_refused():
    words = r'is done to the feature map.*after the 3 first \(Conv2d\).*let a module do it'
    with pytest.raises(ValueError, match=words): create_backbone(changed_in_between, pretrained=False)
    def mostly_vectors(): # a convolution, and a network of linear layers behind a mean
        vectors = nn.Linear(4,99),nn.Linear(99,9)
        return nn.Sequential(nn.Conv2d(3,4,3,4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *vectors)
    with pytest.raises(ValueError, match=r'hold 18% of its weights'): create_backbone(mostly_vectors, pretrained=False)

def test_what_is_done_between_modules_is_not_lost_where_a_pooling_layer_follows():
    "fastai's cut alone would return a body without the ReLU"
    net = nn.Sequential(nn.Conv2d(3,4,3,4), nn.Conv2d(4,8,3,4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,5))
    assert len(create_backbone(lambda: net, pretrained=False, last_stride=2))==2
    class WithReLU(nn.Sequential):
        def forward(self, x): return self[4](self[3](self[2](self[1](self[0](x).relu()))))
    def changed(): return WithReLU(*net)
    with pytest.raises(ValueError, match=r'after the 1 first \(Conv2d\)'): create_backbone(changed, pretrained=False)

def slow(arch): return pytest.param(arch, marks=pytest.mark.slow)

@pytest.mark.parametrize('arch', [models.shufflenet_v2_x0_5, slow(models.shufflenet_v2_x1_0), models.mnasnet0_5,
                                  slow(models.mobilenet_v2)])
def test_torchvision_s_networks_without_a_pooling_layer(arch):
    net,body = arch(weights=None),create_backbone(arch, pretrained=False)
    classifier = list(net.children())[-1]
    assert count(body)==count(net)-count(classifier)
    assert body_shape(body)[1]==16

@pytest.mark.slow
def test_auxiliary_classifiers_fall_away():
    body = create_backbone(models.googlenet, pretrained=False)
    net = models.googlenet(weights=None, init_weights=False)
    assert count(body)==count(net)-sum(map(count, (net.aux1,net.aux2,net.fc)))
    def rescales(): return models.googlenet(weights=None, init_weights=False, transform_input=True) # as if pretrained
    with pytest.raises(ValueError, match='before the first'): create_backbone(rescales, pretrained=False)

def test_wrong_arguments():
    with pytest.raises(ValueError, match='last_stride=3'): create_backbone(resnet10, False, last_stride=3)
    with pytest.raises(ValueError, match='pretrained=False'): create_backbone(resnet10, True)

# timm

def test_an_unknown_timm_model_is_named():
    with pytest.raises(Exception, match='resnet_of_nobody'): create_backbone('resnet_of_nobody', False)

def test_stats_of_torchvision_are_those_of_imagenet():
    assert backbone_stats(resnet18)==([.485,.456,.406],[.229,.224,.225])

def test_stats_of_timm_models():
    assert backbone_stats('tf_efficientnet_lite0')==([.5]*3,[.5]*3)
    assert [round(mean, 3) for mean in backbone_stats('resnet18')[0]]==[.485,.456,.406]

# Weights

@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(3)
    return resnet10().state_dict()

def body_only(weights): return {name:value for name,value in weights.items() if not name.startswith('fc.')}

def save(weights, path):
    if path.suffix=='.safetensors': save_file(weights, path)
    else: torch.save(weights, path)
    return path

def other_classifier(weights): return {**body_only(weights), 'fc.weight':torch.zeros(5,512), 'fc.bias':torch.zeros(5)}
def without_counters(weights): return {name:value for name,value in weights.items() if 'num_batches' not in name}

@pytest.mark.parametrize('name', ['w.pth','w.pt','w.safetensors'])
@pytest.mark.parametrize('change', [dict, body_only, other_classifier, without_counters])
def test_weights_from_a_file(weights, tmp_path, name, change):
    "With the classifier, without it, with one of another width, or without batch counters"
    body = create_backbone(resnet10, weights=save(change(weights), tmp_path/name))
    want = list(body_only(weights).values())
    loaded = list(body.state_dict().values())
    assert len(loaded)==len(want)
    assert all(torch.equal(a, b) for a,b in zip(loaded, want))

def test_half_precision_weights_become_float32(weights, tmp_path):
    half = {name:value.half() if value.is_floating_point() else value for name,value in weights.items()}
    body = create_backbone(resnet10, weights=save(half, tmp_path/'h.safetensors'))
    assert all(weight.dtype==torch.float32 for weight in body.parameters())

@pytest.fixture
def misfit_message(tmp_path):
    "`misfit_message(weights)`: what the error says about weights that do not fit"
    def message(weights):
        with pytest.raises(ValueError, match='misfit.pth') as e:
            create_backbone(resnet10, weights=save(weights, tmp_path/'misfit.pth'))
        return str(e.value)
    return message

def test_missing_weights_are_counted(weights, misfit_message):
    less = {name:value for name,value in weights.items() if not name.startswith('layer2')}
    n_missing = sum(name.startswith('layer2') and 'num_batches' not in name for name in weights)
    assert f'{n_missing} missing (layer2' in misfit_message(less)

def test_unknown_weights_are_named(weights, misfit_message):
    assert '1 unknown (neck.weight)' in misfit_message({**weights, 'neck.weight':torch.zeros(2)})
    message = misfit_message(resnet18().state_dict())
    assert 'unknown' in message and 'layer1.1' in message

def test_weights_of_another_shape_are_named_with_both_shapes(weights, misfit_message):
    message = misfit_message({**weights, 'conv1.weight':torch.zeros(64,1,7,7)})
    assert '1 of another shape (conv1.weight (64, 1, 7, 7), not (64, 3, 7, 7))' in message

@pytest.mark.parametrize('kind', [Path,str])
def test_missing_files_are_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        create_backbone(resnet10, weights=kind(tmp_path/'nowhere.pth'))

@pytest.mark.parametrize('name', ['cut.pth','cut.safetensors'])
def test_damaged_files_are_named(weights, tmp_path, name):
    file = save(weights, tmp_path/name)
    data = file.read_bytes()
    for damaged in (data[:len(data)//2], data[:5], b'', b'no weights at all, just words'):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=name): create_backbone(resnet10, weights=file)

@pytest.mark.parametrize('content', [torch.zeros(3), [1,2], {'model':{'epoch':3}}])
def test_a_file_without_a_state_dict_is_named(tmp_path, content):
    torch.save(content, tmp_path/'odd.pth')
    with pytest.raises(ValueError, match='odd.pth does not hold a state dict'):
        create_backbone(resnet10, weights=tmp_path/'odd.pth')

def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(*args): raise URLError('no network')
    monkeypatch.setattr(backbone, '_new_model', fail)
    with pytest.raises(OSError, match='no network.*weights=.*pretrained=False'): create_backbone(resnet18)

class LocalEntryNotFoundError(FileNotFoundError):
    "As in huggingface_hub, whose message begins with advice and whose cause is the connection"
    __module__ = 'huggingface_hub.errors'

def raised_from(outer, inner):
    try: raise outer from inner
    except type(outer) as e: return e

NO_HOST = OSError('[Errno -2] Name or service not known')
class ConnectError(Exception): __module__ = 'httpx'
class ProxyError(OSError): __module__ = 'requests.exceptions'
class OfflineModeIsEnabled(ConnectionError): __module__ = 'huggingface_hub.errors'

FAILED = [
    (URLError('no network'), 'no network'),
    (ConnectionResetError(104, 'Connection reset by peer'), 'Connection reset by peer'),
    (TimeoutError('timed out'), 'timed out'),
    (ProxyError('proxy refused'), 'proxy refused'),
    (OfflineModeIsEnabled('Cannot reach the hub: offline mode is enabled\nmore text'), 'offline mode is enabled'),
    (raised_from(LocalEntryNotFoundError('An error happened'), raised_from(ConnectError('no such host'), NO_HOST)),
     'no such host')]

@pytest.mark.parametrize('error,reason', FAILED, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('arch', [resnet18, 'test_resnet'], ids=['torchvision', 'timm'])
def test_every_failed_download_is_the_same_error(monkeypatch, arch, error, reason):
    def fail(*args, **kwargs): raise error
    if isinstance(arch, str):
        import timm
        monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', fail)
    else: monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: '/nowhere')
    words = f'The pretrained weights of {arch_name(arch)} could not be'
    with pytest.raises(OSError, match=words) as e: create_backbone(arch)
    message = str(e.value)
    assert isinstance(e.value, DownloadError) and reason in e.value.reason and '\n' not in message
    assert message.endswith('Pass a file as weights=, or pretrained=False')
    assert str(pickle.loads(pickle.dumps(e.value)))==message

def test_other_errors_are_not_called_failed_downloads(monkeypatch):
    def fail(*args): raise RuntimeError('invalid hash value')
    monkeypatch.setattr(backbone, '_new_model', fail)
    with pytest.raises(RuntimeError, match='invalid hash'): create_backbone(resnet18)

# Parameter groups

def pyramid_net(arch): return PyramidNet(create_backbone(arch, pretrained=False), 3, n_parts=2, emb_sz=4)

@pytest.mark.parametrize('arch', archs)
def test_parameter_groups_cover_every_weight_once(arch):
    "None of the three may be empty, or discriminative learning rates and freeze_to(-2) do nothing"
    model = pyramid_net(arch)
    groups = [[id(weight) for weight in group] for group in pyramid_split(model)]
    ids = sum(groups, [])
    assert len(groups)==3 and all(groups)
    assert len(ids)==len(set(ids)) and set(ids)=={id(weight) for weight in model.parameters()}
    assert groups[2]==[id(weight) for weight in model.head.parameters()]

@pytest.fixture
def learner():
    empty = DataLoaders(DataLoader([1]), DataLoader([1]))
    return Learner(empty, pyramid_net(resnet18), loss_func=lambda *args: None, splitter=pyramid_split, opt_func=SGD)

def test_learning_rate_slices_reach_the_groups(learner):
    learner.create_opt()
    learner.opt.set_hyper('lr', slice(1e-5,1e-3))
    assert [hyper['lr'] for hyper in learner.opt.hypers]==pytest.approx([1e-5,1e-4,1e-3])
    lr_of = {id(weight):hyper['lr'] for weight,_,_,hyper in learner.opt.all_params()}
    body,head = learner.model.body,learner.model.head
    assert lr_of[id(body[0].weight)]==pytest.approx(1e-5)
    assert lr_of[id(body[-1][-1].conv2.weight)]==pytest.approx(1e-4)
    assert lr_of[id(head.reduce.weight)]==pytest.approx(1e-3)

def test_freezing_acts_on_the_groups(learner):
    body,head = learner.model.body,learner.model.head
    learner.freeze()
    convs = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    assert head.reduce.weight.requires_grad and not any(conv.weight.requires_grad for conv in convs)
    learner.freeze_to(-2)
    assert body[-1][-1].conv2.weight.requires_grad and not body[0].weight.requires_grad
    learner.unfreeze()
    assert all(weight.requires_grad for weight in learner.model.parameters())
