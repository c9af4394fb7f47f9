"Bodies of timm that are built for one size of image: their maps, weights of another size, and all that a learner does"
import json
import pickle
import sys

import bodies  # noqa: E402
import common  # noqa: E402
import numpy as np
import pytest
import timm
import torch
from fastai.vision.all import Callback, set_seed
from safetensors.torch import save_file
from torch import nn

import pyramidreid.explain.matching_bands  # adds explain  # noqa: E402, F401
from pyramidreid.cli.entry import main  # noqa: E402
from pyramidreid.export.model_files import learner_from, load_embedder  # noqa: E402
from pyramidreid.export.onnx_runtime import Runtime  # noqa: E402
from pyramidreid.models.backbone import *  # noqa: E402
from pyramidreid.models.backbone import DownloadError, TimmFeatures, fitted_weights  # noqa: E402
from pyramidreid.models.fingerprints import fingerprint, inner_model  # noqa: E402
from pyramidreid.models.pyramid import PyramidNet, pyramid_split  # noqa: E402
from pyramidreid.training.checkpoints import Checkpoints  # noqa: E402

SIZE = (96,48)
def slow(*values): return pytest.param(*values, marks=pytest.mark.slow)

# Name, size, last stride, and the map that follows from patch and stages
BODIES = [
    ('test_vit', SIZE, 1, (64,6,3)),
    ('vit_tiny_patch16_224', SIZE, 1, (192,6,3)),
    slow('deit_tiny_patch16_224', SIZE, 1, (192,6,3)),
    slow('deit_tiny_distilled_patch16_224', SIZE, 1, (192,6,3)),
    ('eva02_tiny_patch14_224', (84,42), 1, (192,6,3)),
    ('swin_tiny_patch4_window7_224', SIZE, 1, (768,6,3)),
    slow('swin_tiny_patch4_window7_224', SIZE, 2, (768,3,2)),
    slow('swin_tiny_patch4_window7_224', (384,128), 1, (768,24,8)),
    slow('swinv2_tiny_window8_256', SIZE, 1, (768,6,3)),
    slow('swinv2_tiny_window8_256', (384,128), 1, (768,24,8)),
    ('efficientformerv2_s0', (96,64), 2, (176,3,2)),
    slow('efficientformer_l1', (224,224), 2, (448,7,7)),
    ('test_mambaout', SIZE, 1, (64,6,3))] # takes any size, and has channels last

def body_of(name, size=SIZE, last_stride=1, **kwargs):
    torch.manual_seed(0)
    return create_backbone(name, **{'pretrained':False, 'last_stride':last_stride, 'size':size, **kwargs}).eval()

def run(body, size=SIZE, n=1):
    torch.manual_seed(1)
    with torch.no_grad(): return body(torch.randn(n, 3, *size))

@pytest.mark.parametrize('name,size,last_stride,shape', BODIES)
def test_the_map(name, size, last_stride, shape):
    body = body_of(name, size, last_stride)
    assert tuple(run(body, size).shape[1:])==shape
    channels,height,_ = shape
    assert body_shape(body)==(channels, size[0]//height)
    assert map_height(body, size[0])==height
    assert all(weight.requires_grad for weight in body.parameters())

@pytest.mark.parametrize('name', ['tiny_vit_5m_224','repvit_m0_9','fastvit_t8','convnextv2_atto',
                                  'mobilenetv4_conv_small'])
@pytest.mark.slow
def test_bodies_for_any_size_ignore_it(name):
    a,b = body_of(name),body_of(name, None)
    assert type(a).__name__=='TimmBody' and run(a, (384,128)).shape[2:]==(24,8)
    torch.testing.assert_close(run(a), run(b), rtol=0, atol=0)

def test_without_a_size_it_is_timm_s():
    assert run(body_of('test_vit', None), (160,160)).shape==(1,64,10,10)

def test_the_map_holds_timm_s_tokens_row_by_row():
    "Without the class token"
    body = body_of('vit_tiny_patch16_224')
    torch.manual_seed(1)
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad(): tokens = body.model.forward_features(x)[0,1:]
    fmap = run(body)[0]
    for row in range(6):
        for column in range(3): torch.testing.assert_close(fmap[:,row,column], tokens[3*row+column])

@pytest.mark.slow
def test_the_map_of_a_swin_transformer_is_timm_s():
    body = body_of('swin_tiny_patch4_window7_224', last_stride=2)
    torch.manual_seed(1)
    with torch.no_grad(): fmap = body.model.forward_features(torch.randn(1, 3, *SIZE))
    torch.testing.assert_close(run(body), fmap.permute(0,3,1,2))

@pytest.mark.parametrize('name,last_stride', [('test_vit',1), ('eva02_tiny_patch14_224',1), ('efficientformerv2_s0',2),
                                              ('swin_tiny_patch4_window7_224',1)])
def test_every_weight_is_used(name, last_stride):
    "Else training on several GPUs waits for a gradient that never comes"
    size = {'eva02_tiny_patch14_224':(84,42), 'efficientformerv2_s0':(96,64)}.get(name, SIZE)
    body = body_of(name, size, last_stride).train()
    body(torch.randn(2, 3, *size)).square().sum().backward()
    assert not [name for name,weight in body.named_parameters() if weight.grad is None]

# Merging patches at stride 1

@pytest.mark.parametrize('module', ['swin_transformer','swin_transformer_v2'])
@pytest.mark.parametrize('h,w', [(4,6), (3,5), (1,2)])
def test_patches_merged_at_every_position(module, h, w):
    "The block of each cell, one at a time, by timm's layer; beyond the border the last cell is repeated"
    merging = getattr(timm.models, module).PatchMerging(3)
    nn.init.normal_(merging.norm.weight)
    x = torch.randn(2,h,w,3)
    merged = MergeEverywhere(merging)(x)
    assert merged.shape==(2,h,w,6)
    for i in range(h):
        for j in range(w):
            rows,columns = [i,min(i+1,h-1)],[j,min(j+1,w-1)]
            block = x[:,rows][:,:,columns]
            torch.testing.assert_close(merged[:,i,j], merging(block)[:,0,0])
    if h%2==w%2==0: torch.testing.assert_close(merged[:,::2,::2], merging(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(MergeEverywhere(merging)))(x), merged)

def test_strides_of_a_swin_transformer_have_the_same_weights_and_other_fingerprints():
    fine,coarse = (body_of('swin_tiny_patch4_window7_224', (224,224), stride) for stride in (1,2))
    coarse.load_state_dict(fine.state_dict())
    nets = [PyramidNet(body, 1, n_parts=7, emb_sz=4) for body in (fine,coarse)]
    nets[1].head.load_state_dict(nets[0].head.state_dict())
    assert fingerprint(nets[0], (224,224))!=fingerprint(nets[1], (224,224))

# Weights for another size

def native(name, seed=5):
    "timm's network at its own size with random positions"
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=0)
    with torch.no_grad():
        for key,value in model.named_parameters():
            if 'pos_embed' in key or 'bias_table' in key: value.normal_()
    return model

@pytest.fixture
def hub(monkeypatch):
    "`hub(weights)`: what timm downloads from now on"
    def give(weights):
        monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', lambda *args, **kwargs: dict(weights))
    return give

@pytest.mark.parametrize('name,size', [
    ('test_vit', SIZE), slow('vit_tiny_patch16_224', (384,128)), slow('deit_tiny_patch16_224', SIZE),
    slow('eva02_tiny_patch14_224', (84,42)), ('eva02_tiny_patch14_224', (336,112))])
def test_pretrained_positions_are_those_of_timm(hub, tmp_path, name, size):
    "timm fits what it downloads to `img_size` itself"
    hub(native(name).state_dict())
    body = body_of(name, size, pretrained=True)
    expected = timm.create_model(name, pretrained=True, num_classes=0, img_size=size).state_dict()
    for key,value in body.model.state_dict().items(): assert torch.equal(value, expected[key]), key
    save_file(native(name).state_dict(), tmp_path/'w.safetensors')
    from_file = body_of(name, size, weights=tmp_path/'w.safetensors')
    torch.testing.assert_close(run(from_file, size), run(body, size), rtol=0, atol=0)

@pytest.mark.parametrize('size,last_stride', [((384,128),1), slow((384,128),2)])
def test_pretrained_windows_of_a_swin_transformer(hub, size, last_stride):
    "At stride 1 every stage has room for windows of 7×7, and the weights are untouched; at stride 2 the last has not"
    model = native('swin_tiny_patch4_window7_224')
    hub(model.state_dict())
    body = body_of('swin_tiny_patch4_window7_224', size, last_stride, pretrained=True)
    changed = [key for key,value in model.state_dict().items() if not torch.equal(body.model.state_dict()[key], value)
               ] if last_stride==1 else []
    assert not changed
    if last_stride==1: return
    expected = timm.create_model('swin_tiny_patch4_window7_224', pretrained=True, num_classes=0, img_size=size)
    for key,value in expected.state_dict().items(): assert torch.equal(body.model.state_dict()[key], value), key

def test_as_many_positions_in_another_arrangement_are_interpolated(hub):
    "320×80 pixels are 20×5 patches, as many as the 10×10 of timm's 160×160"
    model = native('test_vit')
    hub(model.state_dict())
    body = body_of('test_vit', (320,80), pretrained=True)
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, new_size=(20,5), old_size=(10,10))
    torch.testing.assert_close(body.model.pos_embed, expected)
    assert not torch.equal(body.model.pos_embed, model.pos_embed)

def test_a_file_for_the_size_itself(tmp_path):
    source = timm.create_model('test_vit', num_classes=0, img_size=SIZE)
    torch.save(source.state_dict(), tmp_path/'w.pth')
    body = body_of('test_vit', weights=tmp_path/'w.pth')
    torch.testing.assert_close(body.model.pos_embed, source.pos_embed)

def test_a_file_with_the_classifier(tmp_path):
    source = timm.create_model('test_vit', num_classes=9)
    torch.save(source.state_dict(), tmp_path/'w.pth')
    body = body_of('test_vit', weights=tmp_path/'w.pth')
    expected = timm.layers.resample_abs_pos_embed(source.pos_embed, new_size=(6,3), old_size=(10,10))
    torch.testing.assert_close(body.model.pos_embed, expected)

def test_a_file_for_a_third_size_is_named(tmp_path):
    torch.save(timm.create_model('test_vit', num_classes=0, img_size=(80,80)).state_dict(), tmp_path/'w.pth')
    words = r'w\.pth does not fit.*pos_embed'
    with pytest.raises(ValueError, match=words): body_of('test_vit', weights=tmp_path/'w.pth')

def test_weights_that_timm_cannot_fit(tmp_path):
    save_file(native('efficientformerv2_s0').state_dict(), tmp_path/'w.safetensors')
    kwargs = dict(last_stride=2, weights=tmp_path/'w.safetensors')
    words = 'for images of 224×224 pixels, and timm cannot fit .* to 96×64.*attention_biases.*pretrained=False'
    with pytest.raises(ValueError, match=words): body_of('efficientformerv2_s0', (96,64), **kwargs)
    body = body_of('efficientformerv2_s0', (224,224), **kwargs)
    torch.testing.assert_close(body.model.stages[3].blocks[0].mlp.fc1.conv.weight,
                               native('efficientformerv2_s0').stages[3].blocks[0].mlp.fc1.conv.weight)

def test_no_network(monkeypatch):
    def fail(*args, **kwargs): raise ConnectionError('no network')
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', fail)
    with pytest.raises(DownloadError, match='pretrained weights of vit_tiny_patch16_224.*no network'):
        create_backbone('vit_tiny_patch16_224', size=SIZE)

# What cannot be built

@pytest.mark.parametrize('name,size,words', [
    ('vit_tiny_patch16_224', (100,48), 'patches of 16×16 pixels.*height 96 or 112 and width 48$'),
    ('eva02_tiny_patch14_224', (384,128), 'fill 384×128.*height 378 or 392 and width 126 or 140'),
    ('test_vit', (8,8), 'height 16 and width 16'),
    ('test_vit', 96, r'size=96: give height and width.*\(384,128\)'),
    ('test_vit', (96,0), r'size=\(96, 0\)'),
    ('test_vit', (96.,48.), r'size=\(96\.0, 48\.0\)'),
    ('nest_tiny', SIZE, 'cannot build nest_tiny for images of 96×48.*square.*224×224'),
    ('efficientformerv2_s0', SIZE, 'no feature map for.*96×48.*height 96 and width 32 or 64$'),
    slow('efficientformer_l1', (96,64), 'no feature map for an image of 96×64.*made for images of 224×224')])
def test_a_size_that_does_not_fit(name, size, words):
    with pytest.raises(ValueError, match=words): body_of(name, size)

@pytest.mark.parametrize('name', ['efficientformerv2_s0', slow('swinv2_cr_tiny_224')])
def test_a_last_stride_that_cannot_be_kept(name):
    with pytest.raises(ValueError, match=f'{name}.*last_stride=2'): body_of(name, (96,64))

def test_images_of_another_size():
    body = body_of('test_vit')
    with pytest.raises(ValueError, match='built for images of 96×48 pixels and was given 48×96'): run(body, (48,96))
    with pytest.raises(ValueError, match='built for images of 96×48'): map_height(body, 128)

# Training

@pytest.mark.parametrize('name', ['test_vit', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_parameter_groups(name):
    "The first group begins with positions and patches, the second ends with the last block or norm"
    model = PyramidNet(body_of(name), 3, n_parts=3, emb_sz=4)
    names = {id(weight): key for key,weight in model.named_parameters()}
    first,second,head = [[names[id(weight)] for weight in group] for group in pyramid_split(model)]
    assert any('patch_embed.proj' in key for key in first) and second[-1].startswith('body.model.norm')
    assert all(key.startswith('head.') for key in head)
    assert {*first,*second,*head}==set(names.values()) and len(names)==len(first)+len(second)+len(head)
    assert len(first)==len(second) or len(first)+1==len(second)

def test_stats_are_timm_s():
    assert backbone_stats('vit_tiny_patch16_224')==([.5]*3,[.5]*3)

def vit_learner(make_learner, make_dls, size=SIZE, arch='test_vit', **kwargs):
    set_seed(0)
    return make_learner(make_dls(size=size), arch, **kwargs)

@pytest.fixture(scope='module')
def learn(make_learner, make_dls):
    learn = vit_learner(make_learner, make_dls, lr=1e-3)
    learn.fit(1)
    return learn

def test_a_learner_tells_its_body_the_size_of_its_loaders(learn):
    body = inner_model(learn.model).body
    assert isinstance(body, TimmFeatures) and body.size==SIZE and inner_model(learn.model).stride==16

def test_the_loss_falls_on_one_batch(make_learner, make_dls):
    learn = vit_learner(make_learner, make_dls, dynamic=False, drop=0.)
    x,y = [o.as_subclass(torch.Tensor) for o in learn.dls.train.one_batch()]
    opt = torch.optim.AdamW(learn.model.parameters(), 3e-3)
    losses = []
    for _ in range(50):
        loss = learn.loss_func(learn.model.train()(x), y)
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert losses[-1]<losses[0]/2

def noise(n, size=SIZE): return [np.random.default_rng(i).integers(0,256,(*size,3),dtype=np.uint8) for i in range(n)]

def embeddings(learn, n=4): return learn.embed(learn.dls.test_dl(noise(n), num_workers=0)).numpy()

def test_saved_and_loaded(learn, tmp_path):
    learn.save_model(tmp_path)
    embedder = load_embedder(tmp_path)
    assert embedder.size==SIZE and embedder.model.body.size==SIZE
    np.testing.assert_allclose(embedder.embed(noise(4)), embeddings(learn), atol=1e-5)

def test_exported(learn, tmp_path):
    learn.to_exported(tmp_path/'m.pt2')
    pixels = torch.from_numpy(np.stack(noise(4)))
    found = torch.export.load(tmp_path/'m.pt2').module()(pixels)
    np.testing.assert_allclose(found.detach().numpy(), embeddings(learn), atol=1e-4)

def test_onnx(learn, tmp_path):
    pytest.importorskip('onnxscript')
    learn.to_onnx(tmp_path/'m.onnx')
    np.testing.assert_allclose(Runtime(tmp_path/'m.onnx').embed(noise(4)), embeddings(learn), atol=1e-4)

def test_pickled(learn, tmp_path):
    from fastai.learner import load_learner
    learn.export(tmp_path/'m.pkl')
    again = load_learner(tmp_path/'m.pkl')
    np.testing.assert_allclose(inner_model(again.model)(torch.ones(1,3,*SIZE)).detach(),
                               inner_model(learn.model).eval()(torch.ones(1,3,*SIZE)).detach(), atol=1e-6)

def test_explained(learn):
    a,b = noise(2)
    explanation = learn.explain(a, b)
    emb = embeddings(learn, 2)
    assert explanation.cosine==pytest.approx(float(emb[0]@emb[1]), abs=1e-4)

def test_summary(learn):
    "Sends one image of the loaders' size through the model"
    assert f'Total params: {sum(p.numel() for p in learn.model.parameters()):,}' in learn.summary()

def test_the_command_line(people, tmp_path, capfd):
    "`--arch` with a size that patches do not fill, one that they do, and another for the trained model"
    def train(*args):
        options = '--workers 0 --p 4 --k 4 --epochs 1 --recipe paper --quiet'.split()
        return main(['train', str(people), *options, *map(str, args)])
    vit = ['--arch','test_vit','--weights','none']
    assert train(*vit, '--size', 100, 48, '--out', tmp_path/'a')==2
    assert 'height 96 or 112 and width 48' in capfd.readouterr().err
    assert train(*vit, '--size', 96, 48, '--out', tmp_path/'a')==0
    embedder = load_embedder(tmp_path/'a/model')
    assert embedder.size==SIZE
    assert train('--weights', tmp_path/'a/model', '--size', 192, 96, '--out', tmp_path/'b')==0
    assert load_embedder(tmp_path/'b/model').size==(192,96)
    assert train(*vit, '--size', 192, 96, '--epochs', 2, '--resume', '--out', tmp_path/'a')==2
    assert 'input: 96×48 in the checkpoint, 192×96 in this run' in capfd.readouterr().err

def test_loaders_of_another_size(learn, make_dls):
    dl = make_dls(size=(48,48)).valid
    with pytest.raises(ValueError, match='built for images of 96×48 pixels and was given 48×48'): learn.embed(dl)

def test_a_learner_from_a_model_of_another_size(learn, make_dls, tmp_path):
    "Positions are interpolated from the grid they are for, which is not a square; all other weights are the same"
    learn.save_model(tmp_path)
    larger = learner_from(tmp_path, make_dls(size=(192,96)))
    old,new = inner_model(learn.model).state_dict(),inner_model(larger.model).state_dict()
    key = 'body.model.pos_embed'
    expected = timm.layers.resample_abs_pos_embed(old.pop(key), new_size=(12,6), old_size=(6,3))
    torch.testing.assert_close(new[key], expected)
    assert all(torch.equal(value, new[name]) for name,value in old.items() if not name.startswith('head.classify'))
    larger.fit(1)
    larger.save_model(tmp_path/'larger')
    assert load_embedder(tmp_path/'larger').size==(192,96)

def test_a_learner_from_a_model_that_cannot_be_fitted(make_learner, make_dls, tmp_path):
    kwargs = dict(arch='efficientformerv2_s0', last_stride=2)
    vit_learner(make_learner, make_dls, (96,64), **kwargs).save_model(tmp_path)
    larger = make_dls(size=(192,128))
    with pytest.raises(ValueError, match='timm cannot fit .* to 192×128'): learner_from(tmp_path, larger)
    learner_from(tmp_path, make_dls(size=(96,64)))

def test_fitted_weights_of_the_same_size_are_the_same():
    a,b = body_of('test_vit'),body_of('test_vit')
    assert all(torch.equal(value, a.state_dict()[name]) for name,value in fitted_weights(a, b).items())

def test_checkpoints(make_learner, make_dls, tmp_path):
    "Interrupted after an epoch and resumed ends as in one go"
    class Interrupt(Callback):
        order = 99
        def after_epoch(self): raise KeyboardInterrupt
    def make(folder): return vit_learner(make_learner, make_dls, path=tmp_path/folder, lr=1e-3)
    whole,first,second = make('whole'),make('split'),make('split')
    for learn,cbs in ((whole,Checkpoints()), (first,[Checkpoints(),Interrupt()]), (second,Checkpoints(resume=True))):
        set_seed(1)
        try: learn.fit(2, cbs=cbs)
        except KeyboardInterrupt: assert learn is first
    for a,b in zip(whole.model.parameters(), second.model.parameters()): assert torch.equal(a, b)

# The larger families do all of it

@pytest.mark.slow
@pytest.mark.parametrize('name,size,last_stride', [
    ('vit_tiny_patch16_224', SIZE, 1), ('deit_tiny_patch16_224', SIZE, 1), ('eva02_tiny_patch14_224', (84,42), 1),
    ('swin_tiny_patch4_window7_224', SIZE, 1), ('swinv2_tiny_window8_256', SIZE, 1),
    ('efficientformerv2_s0', (96,64), 2), ('tiny_vit_5m_224', SIZE, 1), ('repvit_m0_9', SIZE, 1),
    ('fastvit_t8', SIZE, 1), ('convnextv2_atto', SIZE, 1), ('mobilenetv4_conv_small', SIZE, 1)])
def test_from_training_to_onnx(make_learner, make_dls, tmp_path, name, size, last_stride):
    learn = vit_learner(make_learner, make_dls, size, name, last_stride=last_stride, lr=1e-4)
    learn.fit(1)
    learn.save_model(tmp_path)
    expected = learn.embed(learn.dls.test_dl(noise(3, size), num_workers=0)).numpy()
    np.testing.assert_allclose(load_embedder(tmp_path).embed(noise(3, size)), expected, atol=1e-5)
    learn.to_exported(tmp_path/'m.pt2')
    learn.to_onnx(tmp_path/'m.onnx')
    np.testing.assert_allclose(Runtime(tmp_path/'m.onnx').embed(noise(3, size)), expected, atol=1e-4)
    assert np.isfinite(learn.explain(*noise(2, size)).cosine)

# The table of the backbones' page

def test_multiply_adds_by_hand():
    "A convolution to 8×6 cells, two tokens' attention, and a linear layer"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.linear = nn.Conv2d(3,5,4,4),nn.Linear(5,7)
        def forward(self, x):
            tokens = self.conv(x).flatten(2).transpose(1,2)[:,:2]
            return self.linear(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens))
    conv,attention,linear = 8*6*5*3*4*4,2*(2*2*5),2*5*7
    assert bodies.multiply_adds(Net(), (32,24))==conv+attention+linear

def test_rows_of_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(bodies, 'results', tmp_path)
    monkeypatch.setattr(common, 'results', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['bodies.py', 'efficientformerv2_s0', '--seconds', '0'])
    bodies.main()
    run, = json.loads((tmp_path/'bodies.json').read_text())['runs']
    body = timm.create_model('efficientformerv2_s0', num_classes=0, img_size=(384,128))
    head = 21*(176*128 + 128 + 2*128 + 128*751 + 751)
    assert run['parameters']==sum(p.numel() for p in body.parameters())+head
    assert run['map']==[12,4] and run['crops_per_second']>0 and run['macs']>run['small_macs']>1e8
    assert '| efficientformerv2_s0 | 12×4 |' in bodies.page_table()
    monkeypatch.setattr(bodies, 'measure', None) # measured already: nothing is left to do
    bodies.main()
