"Checkpoints of other projects as weights: how each lays out its file, what does not fit, and files of strangers"
import argparse
import os
import warnings
import zipfile
from collections import OrderedDict
from functools import cache

import numpy as np
import pytest
import torch
from fastai.vision.all import resnet18, resnet34, resnet50
from safetensors.torch import save_file
from torchvision.models import swin_t

from pyramidreid.core import NotRegularError, ReIDWarning
from pyramidreid.models import backbone, weight_files
from pyramidreid.models.backbone import create_backbone, resnet10
from pyramidreid.models.pyramid import PyramidNet
from pyramidreid.models.weight_files import *

OPTIMIZER = {'state': {0: {'step':torch.tensor(1.), 'exp_avg':torch.zeros(64,3,7,7)}},
             'param_groups': [{'lr':.1, 'params':[0]}]}

@pytest.fixture(scope='module')
def source():
    "A resnet10 without its classifier, whose running means differ from a new one's"
    torch.manual_seed(5)
    state = resnet10().state_dict()
    return {name: torch.rand_like(value) if value.is_floating_point() else value+7
            for name,value in state.items() if not name.startswith('fc.')}

def behind(prefix, weights): return OrderedDict((prefix+name, value) for name,value in weights.items())
def scaled(weights, factor): return {name: (value*factor).to(value.dtype) for name,value in weights.items()}
def linear(prefix, n=5): return {f'{prefix}.weight':torch.zeros(n,512), f'{prefix}.bias':torch.zeros(n)}

def norm(prefix):
    values = {name: torch.ones(512) for name in ('weight','bias','running_mean','running_var')}
    return behind(f'{prefix}.', {**values, 'num_batches_tracked':torch.tensor(3)})

@cache
def new_model(arch): return arch() # once, since initialisation takes long

def load(content, path):
    "The state of a resnet10 with weights from a checkpoint, without its classifier, and the warnings"
    torch.save(content, path/'w.pth')
    net = new_model(resnet10)
    for value in net.state_dict().values(): value.fill_(-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        load_backbone_weights(net, path/'w.pth')
    state = net.state_dict()
    assert (state.pop('fc.weight')==-1).all() and (state.pop('fc.bias')==-1).all()
    return state, [str(o.message) for o in caught if o.category is ReIDWarning]

def same(loaded, weights):
    return list(loaded)==list(weights) and all(torch.equal(loaded[name], weights[name]) for name in weights)

# Layouts, each with what the warning says is left out, or nothing

def torchreid(w): return {'state_dict':{**w, **linear('classifier')}, 'epoch':60, 'rank1':.9, 'optimizer':OPTIMIZER,
                          'scheduler':{'base_lrs':[.1], 'last_epoch':60}}
def torchreid_parallel(w): return {'state_dict':behind('module.', {**w, **linear('classifier')}), 'epoch':60}
def torchreid_fc512(w): return {**w, **linear('fc.0'), **norm('fc.1'), **linear('classifier')}
def fast_reid(w):
    heads = {**norm('heads.bottleneck.0'), 'heads.weight':torch.zeros(751,512)}
    return {'model':{**behind('backbone.', w), **heads}, 'optimizer':OPTIMIZER, 'iteration':17999}
def strong_baseline(w): return {**behind('base.', w), **norm('bottleneck'), 'classifier.weight':torch.zeros(751,512)}
def layumi(w): return {**behind('model.', w), **linear('model.fc', 1000), **linear('classifier.add_block.0'),
                       **norm('classifier.add_block.1'), **linear('classifier.classifier.0', 751)}
def layumi_parts(w): return {**behind('model.', w), **linear('classifier0.add_block.0'),
                             **linear('classifier1.classifier.0')}
def moco(w):
    queue = {'module.queue':torch.zeros(128,64), 'module.queue_ptr':torch.tensor([5])}
    encoders = {**behind('module.encoder_q.', w), **linear('module.encoder_q.fc', 128),
                **behind('module.encoder_k.', scaled(w, .5)), **linear('module.encoder_k.fc', 128)}
    return {'epoch':200, 'arch':'resnet50', 'state_dict':{**encoders, **queue}, 'optimizer':OPTIMIZER}
def moco_swapped(w):
    state = {**behind('module.encoder_k.', scaled(w, .5)), **behind('module.encoder_q.', w)}
    return {'state_dict':state}
def dino(w):
    head = {'head.mlp.0.weight':torch.zeros(8,8)}
    student = behind('module.', {**behind('backbone.', scaled(w, .5)), **head})
    return {'student':student, 'teacher':{**behind('backbone.', w), **head}, 'optimizer':OPTIMIZER, 'epoch':100,
            'dino_loss':{'center':torch.zeros(1,8)}, 'fp16_scaler':{'scale':1024.}}
def dino_parallel(w): return {'teacher':behind('module.backbone.', w)}
def timm(w): return {'epoch':9, 'arch':'resnet10', 'state_dict':{**scaled(w, .5), **linear('fc')},
                     'optimizer':OPTIMIZER, 'state_dict_ema':{**w, **linear('fc')}, 'metric':71.2}
def lightning(w): return {'pytorch-lightning_version':'2.4', 'global_step':3, 'state_dict':behind('model.backbone.', w)}
def compiled(w): return {'model_state_dict':behind('_orig_mod.module.net.backbone.model.', w)}
def deep(w): return {'checkpoint':{'nets':{'teacher':w}}}
def fastai_save(w): return {'model':w, 'opt':{'state':[{'mom':torch.zeros(2)}], 'hypers':[]}}

LAYOUTS = [
    (torchreid, []), (torchreid_parallel, []), (torchreid_fc512, []),
    (fast_reid, ['model.heads (6)']), (strong_baseline, ['bottleneck (5)']),
    (layumi, []), (layumi_parts, []),
    (moco, ['state_dict.module.encoder_k (', 'state_dict.module.queue (1)', 'state_dict.module.queue_ptr (1)']),
    (moco_swapped, ['state_dict.module.encoder_k (']),
    (dino, ['student (', 'teacher.head (1)', 'dino_loss (1)']), (dino_parallel, []),
    (timm, ['state_dict (']), (lightning, []), (compiled, []), (deep, []), (fastai_save, [])]

@pytest.mark.parametrize('layout,left_out', LAYOUTS, ids=lambda o: getattr(o, '__name__', ''))
def test_layouts_of_other_projects(source, tmp_path, layout, left_out):
    "Exactly the weights of the file, whatever is around them, and one warning that names what is left out"
    loaded,warned = load(layout(source), tmp_path)
    assert same(loaded, source)
    assert len(warned)==bool(left_out)
    assert all(words in ''.join(warned) for words in left_out)
    assert not any(words in ''.join(warned) for words in ('opt', 'scheduler', 'classifier'))

def test_the_warning_names_the_prefix_and_counts_all_tensors(source, tmp_path):
    _,(message,) = load(moco_swapped(source), tmp_path)
    assert "w.pth: only the backbone is used, under 'state_dict.module.encoder_q.'" in message
    assert message.endswith(f'state_dict.module.encoder_k ({len(source)})')

def test_several_things_left_out_are_counted_after_three(source, tmp_path):
    content = {**behind('base.', source), **{f'branch{i}.weight':torch.zeros(2) for i in range(5)}}
    _,(message,) = load(content, tmp_path)
    assert message.endswith('branch0 (1), branch1 (1), branch2 (1), …')

def test_a_safetensors_file_has_prefixes_too(source, tmp_path):
    save_file(strong_baseline(source), tmp_path/'w.safetensors')
    with pytest.warns(ReIDWarning, match=r'bottleneck \(5\)'):
        body = create_backbone(resnet10, weights=str(tmp_path/'w.safetensors'))
    loaded = body.state_dict().values()
    assert all(torch.equal(a, b) for a,b in zip(loaded, source.values(), strict=True))

def test_a_copy_that_only_counts_as_another_object_is_no_other_network(source, tmp_path):
    "The same dict under two keys is read once"
    loaded,warned = load({'model':source, 'state_dict':source}, tmp_path)
    assert same(loaded, source) and not warned

@pytest.mark.parametrize('first,second,used', [
    ('student','teacher','teacher'), ('teacher','student','teacher'), ('model','model_ema','model_ema'),
    ('state_dict','state_dict_ema','state_dict_ema'), ('teacher','ema_model','ema_model'),
    ('encoder_k','encoder_q','encoder_q'), ('net_b','net_a','net_b'), ('schema','net','schema')])
def test_which_of_two_networks_is_used(source, tmp_path, first, second, used):
    "As load_backbone_weights documents it: an ema, a teacher, an encoder_q, the first; only whole words count"
    networks = {first:scaled(source, .5), second:source}
    loaded,(message,) = load(networks, tmp_path)
    assert same(loaded, networks[used])
    assert f"under '{used}.'" in message

def test_a_network_that_fits_goes_before_a_teacher_that_does_not(source, tmp_path):
    loaded,_ = load({'teacher':dict(list(source.items())[1:]), 'student':source}, tmp_path)
    assert same(loaded, source)
    shapes = {name:value.new_zeros(*value.shape,1) for name,value in source.items()}
    loaded,_ = load({'teacher':shapes, 'student':source}, tmp_path)
    assert same(loaded, source)

def test_weights_are_not_mixed_from_two_prefixes(source, tmp_path):
    half = len(source)//2
    names = list(source)
    a,b = {name:source[name] for name in names[:half]}, {name:source[name] for name in names[half:]}
    with pytest.raises(ValueError, match='missing'): load({**a, **behind('module.', b)}, tmp_path)

def test_a_name_that_is_there_with_and_without_prefix(source, tmp_path):
    "Both fit, so the first in the file is used, and the other is named"
    twice = {**source, **behind('module.', scaled(source, .5))}
    loaded,(message,) = load(twice, tmp_path)
    assert same(loaded, source) and 'module (' in message
    loaded,_ = load(dict(reversed(twice.items())), tmp_path)
    assert same(loaded, scaled(source, .5))

def test_two_tensors_of_the_same_joined_name_are_refused(source, tmp_path):
    twice = {'module.conv1.weight':torch.zeros(1), 'module':{'conv1.weight':torch.ones(1)}}
    with pytest.raises(ValueError, match='w.pth has two tensors with the name module.conv1'): load(twice, tmp_path)

# Types

def test_types_are_converted_and_counters_kept(source, tmp_path):
    half = {name: value.half() if value.is_floating_point() else value for name,value in source.items()}
    loaded,_ = load({'model':half}, tmp_path)
    assert same(loaded, {name: value.float() if value.dtype==torch.half else value for name,value in half.items()})
    assert all(value.dtype==source[name].dtype for name,value in loaded.items())
    without = {name:value for name,value in source.items() if 'num_batches' not in name}
    loaded,_ = load(behind('base.', without), tmp_path)
    assert same({name: value for name,value in loaded.items() if name in without}, without)

def test_quantised_and_integer_weights_are_refused(source, tmp_path):
    integers = {**source, 'conv1.weight':torch.zeros(64,3,7,7,dtype=torch.int8)}
    with pytest.raises(ValueError, match=r'1 not floating point \(conv1.weight torch.int8\)'): load(integers, tmp_path)
    sparse = {**source, 'conv1.weight':source['conv1.weight'].to_sparse()}
    with pytest.raises(ValueError, match=r'plain tensors of real numbers \(conv1.weight\)'): load(sparse, tmp_path)
    odd = {**source, 'conv1.weight':source['conv1.weight'].to(torch.complex64)}
    with pytest.raises(ValueError, match='plain tensors'): load(odd, tmp_path)

# Files that do not fit

def refusal(content, path, arch=resnet10):
    torch.save(content, path/'misfit.pth')
    before = {name:value.clone() for name,value in new_model(arch).state_dict().items()}
    with pytest.raises(ValueError, match='misfit.pth does not fit ResNet') as e:
        load_backbone_weights(new_model(arch), path/'misfit.pth')
    assert same(new_model(arch).state_dict(), before) # nothing is loaded by halves
    return str(e.value)

def n_weights(arch):
    return sum(not name.startswith('fc.') and 'num_batches' not in name for name in new_model(arch).state_dict())

@pytest.mark.parametrize('prefix', ['', 'module.base.'])
def test_another_resnet_is_named_and_counted(tmp_path, prefix):
    "A resnet18 has all names of a resnet10, and a second block in each of four layers"
    message = refusal(behind(prefix, new_model(resnet18).state_dict()), tmp_path)
    n = n_weights(resnet10)
    assert f"{n} of the backbone's {n} weights fit" in message
    assert ('under ' in message)==bool(prefix) and repr(prefix) in message+"''"
    assert message.endswith('The file seems to hold resnet18: pass arch=resnet18')
    message = refusal(behind(prefix, resnet10().state_dict()), tmp_path, resnet18)
    missing = n_weights(resnet18)-n
    assert f"{n} of the backbone's {n_weights(resnet18)} weights fit" in message
    assert f'{missing} missing (layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias, …)' in message
    assert message.endswith('pass arch=resnet10')

@pytest.mark.parametrize('arch', [resnet34, resnet50])
def test_basic_and_bottleneck_blocks_are_told_apart(tmp_path, arch):
    "Both have 3, 4, 6 and 3 blocks"
    with torch.device('meta'): names = list(arch().state_dict())
    small = {name:torch.zeros(1) for name in names}
    assert refusal(small, tmp_path).endswith(f'pass arch={arch.__name__}')

def test_a_part_or_another_version_of_the_same_architecture(source, tmp_path):
    part = {name:value for name,value in source.items() if name!='bn1.bias'}
    message = refusal(part, tmp_path)
    assert '1 missing (bn1.bias)' in message and "names are those of resnet10, like the backbone's" in message
    wide = {**source, 'conv1.weight':torch.zeros(64,1,7,7)}
    message = refusal(behind('base.', wide), tmp_path)
    assert '1 of another shape (conv1.weight (64, 1, 7, 7), not (64, 3, 7, 7))' in message
    assert f"{n_weights(resnet10)-1} of the backbone's {n_weights(resnet10)} weights fit, under 'base.'" in message

def test_a_module_beside_the_backbone_s_is_not_left_out(source, tmp_path):
    "fast-reid's non-local blocks are in its backbone, and change what it computes"
    content = {'model':behind('backbone.', {**source, 'NL_2.0.g.weight':torch.zeros(2)})}
    assert '1 unknown (model.backbone.NL_2.0.g.weight)' in refusal(content, tmp_path)

def test_a_head_beside_the_backbone_s_layers_is_left_out(source, tmp_path):
    loaded,(message,) = load({**source, **norm('bottleneck')}, tmp_path)
    assert same(loaded, source) and 'bottleneck (5)' in message and 'under' not in message

OTHERS = [
    (['conv1.conv.weight','conv2.0.conv2c.2.conv1.weight','conv2.0.IN.weight'], 'an OSNet: OSNet is not built in'),
    (['backbone.layer1.0.bn1.IN.weight','backbone.layer1.0.conv1.weight'], 'instance normalisation'),
    (['backbone.stages.0.blocks.0.attn.w_msa.qkv.weight'], 'SOLIDER'),
    (['layers.0.blocks.0.attn.relative_position_bias_table','patch_embed.proj.weight'], 'a Swin transformer: pass'),
    (['cls_token','blocks.0.attn.qkv.weight'], 'a vision transformer: pass'),
    (['conv_stem.weight','blocks.0.0.conv_pw.weight'], 'an EfficientNet or MobileNet of timm'),
    (['features.conv0.weight','features.denseblock1.denselayer1.conv1.weight'], 'a DenseNet'),
    (['features.0.0.weight','features.1.0.block.0.0.weight'], 'MobileNet'),
    (['module.base.0.weight','module.base.4.0.conv1.weight'], 'numbers instead of names'),
    (['something.weight'], 'Pass the arch that the file was written for')]

@pytest.mark.parametrize('names,words', OTHERS, ids=[o[0][-1] for o in OTHERS])
def test_other_architectures_are_named(tmp_path, names, words):
    message = refusal({name:torch.zeros(1) for name in names}, tmp_path)
    assert words in message and f"0 of the backbone's {n_weights(resnet10)} weights fit" in message

def test_a_model_of_pyramidreid_is_named(tmp_path):
    net = PyramidNet(create_backbone(resnet10, False), 3, n_parts=2, emb_sz=4)
    assert 'a model of pyramidreid: load all of it' in refusal(net.state_dict(), tmp_path)

@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'tf_efficientnet_lite0'])
def test_the_telltale_names_are_those_of_timm(name):
    import timm
    with torch.device('meta'): names = list(timm.create_model(name).state_dict())
    kind = {'vit':'a vision transformer', 'swi':'a Swin transformer', 'tf_':'an EfficientNet or MobileNet of timm'}
    assert weight_files._kind(names)[0]==kind[name[:3]]

def test_timm_s_classifier_is_left_out_without_a_warning(tmp_path):
    "It is `head` in one of timm's networks, `fc` in another"
    import timm
    net = timm.create_model('test_vit', num_classes=5)
    torch.save({'state_dict':net.state_dict()}, tmp_path/'w.pth')
    body = timm.create_model('test_vit', num_classes=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_backbone_weights(body, tmp_path/'w.pth')
    assert 'head.weight' in net.state_dict() and 'head.weight' not in body.state_dict()
    assert all(torch.equal(value, net.state_dict()[name]) for name,value in body.state_dict().items())

# Files without weights, and files of strangers

@pytest.mark.parametrize('content,got', [
    ({}, r'\[\]'), ([], 'list'), ('text', 'str'), (torch.zeros(3), 'Tensor'),
    ([{'conv1.weight':torch.zeros(1)}], 'list'),
    ({'optimizer':OPTIMIZER}, "'optimizer'"), (OPTIMIZER, "'state', 'param_groups'"),
    ({'models':[{'conv1.weight':torch.zeros(1)}]}, "'models'"),
    ({'a':{'b':{'c':{'d':{'conv1.weight':torch.zeros(1)}}}}}, "'a'")])
def test_a_file_without_weights_says_what_it_holds(tmp_path, content, got):
    torch.save(content, tmp_path/'odd.pth')
    with pytest.raises(ValueError, match=f'odd.pth does not hold a state dict: expected tensors by name, got .*{got}'):
        read_weights(tmp_path/'odd.pth')

def test_dicts_within_each_other_without_end(tmp_path):
    "A file can hold a dict that contains itself, or very many ways to the same one"
    endless = {'conv1.weight':torch.zeros(1)}
    endless['self'] = endless
    inner = {'x':torch.zeros(1)}
    for _ in range(2): inner = {f'k{i}':inner for i in range(2000)}
    torch.save({'endless':endless, 'many':inner}, tmp_path/'w.pth')
    assert list(read_weights(tmp_path/'w.pth'))==['endless.conv1.weight', 'many.k0.k0.x']

class Attack:
    "Makes a folder when it is unpickled"
    def __init__(self, function, *args): self.call = function,args
    def __reduce__(self): return self.call

def make_folder(path): os.mkdir(path) # as if in a project's own module

@pytest.mark.parametrize('legacy', [False,True])
@pytest.mark.parametrize('function', [os.mkdir, make_folder])
def test_no_code_in_a_file_is_run(tmp_path, source, function, legacy):
    bad = {'state_dict':source, 'extra':Attack(function, str(tmp_path/'made'))}
    torch.save(bad, tmp_path/'bad.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match='bad.pth holds more than tensors.*code: .*(mkdir|make_folder)') as e:
        create_backbone(resnet10, weights=tmp_path/'bad.pth')
    assert ('do not open' in str(e.value))==(function is os.mkdir) # torch blocks all of os; advice would be harmful
    assert not (tmp_path/'made').exists()

REFUSED = {
    'argparse.Namespace': lambda net: {'args':argparse.Namespace(lr=.1), 'state_dict':net.state_dict()},
    'scalar': lambda net: {'rank1':np.float32(.9), 'state_dict':net.state_dict()},
    'ResNet': lambda net: net}

@pytest.mark.parametrize('legacy', [False,True])
@pytest.mark.parametrize('name', REFUSED)
def test_the_advice_for_a_refused_file_works(tmp_path, monkeypatch, name, legacy):
    "The three lines in the error make a file that can be read"
    monkeypatch.chdir(tmp_path)
    net = resnet10()
    torch.save(REFUSED[name](net), tmp_path/"it's.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=name) as e: create_backbone(resnet10, weights="it's.pth")
    lines = [line.strip() for line in str(e.value).splitlines() if line.startswith('    ')]
    assert len(lines)==3 and 'weights_only=True' not in str(e.value)
    code = '\n'.join(lines)
    if name=='ResNet':
        assert 'saved.state_dict() if the file is a whole model' in str(e.value)
        code = code.replace("saved['state_dict']", 'saved.state_dict()')
    exec(code, {})
    body = create_backbone(resnet10, weights="it's-weights.pth")
    assert torch.equal(next(body.parameters()), net.conv1.weight)

@pytest.mark.parametrize('name', ['w.pth','w.safetensors'])
def test_damaged_files_are_not_recommended_for_unsafe_loading(tmp_path, name):
    "torch's message for a file that is not a pickle says to load it without protection"
    (tmp_path/name).write_bytes(b'no weights at all, just words')
    with pytest.raises(ValueError, match=f'{name} contains no') as e: read_weights(tmp_path/name)
    assert 'weights_only' not in str(e.value)

def test_what_is_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='There is no weight file'): read_weights(tmp_path/'none.pth')
    if os.name!='nt':
        (tmp_path/'link.pth').symlink_to(tmp_path/'none.pth')
        with pytest.raises(FileNotFoundError, match='There is no weight file'): read_weights(tmp_path/'link.pth')
    with pytest.raises(NotRegularError, match='a folder: give the path of a weight file'): read_weights(tmp_path)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='Windows has no pipes')
def test_a_pipe_does_not_wait_for_ever(tmp_path):
    os.mkfifo(tmp_path/'pipe.pth')
    with pytest.raises(NotRegularError, match='a pipe'): read_weights(tmp_path/'pipe.pth')

def test_a_tensor_that_claims_to_be_enormous(source, tmp_path):
    "One number, shown as a tensor of 4 TB: only its shape is looked at"
    enormous = torch.zeros(1).expand(10**6,10**6)
    torch.save({**source, 'conv1.weight':enormous}, tmp_path/'misfit.pth')
    with pytest.raises(ValueError, match=r'conv1.weight \(1000000, 1000000\), not'):
        load_backbone_weights(new_model(resnet10), tmp_path/'misfit.pth')

def packed(source, dest, **options):
    "The same archive, with other options for its entries"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, 'w', **options) as new:
        for name in old.namelist(): new.writestr(name, old.read(name))

def test_a_state_dict_is_not_a_file(source):
    with pytest.raises(TypeError, match='The weights are a dict: give the name of a file'):
        create_backbone(resnet10, weights=dict(source))

def test_a_damaged_torch_file(source, tmp_path):
    "torch.load does not look at the checksums in it"
    file = tmp_path/'w.pth'
    torch.save(source, file)
    content = bytearray(file.read_bytes())
    middle = len(content)//2
    content[middle:middle+1000] = bytes(255-o for o in content[middle:middle+1000])
    file.write_bytes(content)
    assert not all(torch.equal(a, b) for a,b in zip(torch.load(file, weights_only=True).values(), source.values()))
    with pytest.raises(ValueError, match='w.pth.*the checksum of w/data/.* is wrong. Download or copy it again'):
        read_weights(file)

def test_a_torch_file_without_checksums(source, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try: torch.save(source, tmp_path/'w.pth')
    finally: torch.serialization.set_crc32_options(before)
    assert same(read_weights(tmp_path/'w.pth'), source)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite(source, tmp_path, value):
    broken = {**source, 'layer1.0.conv1.weight': source['layer1.0.conv1.weight'].clone()}
    broken['layer1.0.conv1.weight'][0,0] = value
    torch.save(broken, tmp_path/'w.pth')
    with pytest.raises(ValueError, match=r'; 1 not finite \(layer1.0.conv1.weight\). The file is damaged'):
        create_backbone(resnet10, weights=tmp_path/'w.pth')

@pytest.mark.parametrize('head', ['none','other'])
def test_a_swin_of_torchvision_without_its_classifier(tmp_path, head):
    weights = swin_t().state_dict()
    if head=='none': weights = {name:value for name,value in weights.items() if not name.startswith('head.')}
    else: weights |= {'head.weight':torch.zeros(751,768), 'head.bias':torch.zeros(751)}
    torch.save(weights, tmp_path/'w.pth')
    body = create_backbone(swin_t, weights=tmp_path/'w.pth', last_stride=2)
    first = next(value for name,value in weights.items() if name.endswith('features.0.0.weight'))
    assert torch.equal(next(body.parameters()), first)

def test_a_small_file_that_unpacks_to_a_large_one(tmp_path):
    "torch would read it: 4 MB from a few thousand bytes, or gigabytes from some millions"
    torch.save({'conv1.weight':torch.zeros(10**6)}, tmp_path/'w.pth')
    packed(tmp_path/'w.pth', tmp_path/'stored.pth')
    assert len(read_weights(tmp_path/'stored.pth')['conv1.weight'])==10**6
    packed(tmp_path/'w.pth', tmp_path/'bomb.pth', compression=zipfile.ZIP_DEFLATED)
    assert len(torch.load(tmp_path/'bomb.pth', weights_only=True)['conv1.weight'])==10**6
    with pytest.raises(ValueError, match=r'bomb.pth.*unpack to 4,00\d,\d{3} bytes'): read_weights(tmp_path/'bomb.pth')

def test_names_of_strangers_cannot_write_to_the_terminal_nor_take_for_ever(source, tmp_path):
    long,bad = '.'.join('a'*100_000),'x\x1b[2Jy'
    message = refusal({long:torch.zeros(1), bad:torch.zeros(1)}, tmp_path)
    assert '\x1b' not in message and len(message)<3000
    _,(message,) = load({**behind('base.', source), f'{bad}.weight':torch.zeros(1)}, tmp_path)
    assert '\x1b' not in message and r'x\x1b[2Jy' in message

# Where they were before

def test_the_functions_are_still_in_the_backbone_s_module():
    assert backbone.read_weights is read_weights and backbone.load_backbone_weights is load_backbone_weights

def test_very_many_networks_of_one_weight_each(tmp_path):
    "Each fits as well as the others, and not one is complete"
    many = {f'p{i}.conv1.weight':torch.zeros(1) for i in range(1000)}
    assert '59 missing (bn1.weight' in refusal(many, tmp_path)
