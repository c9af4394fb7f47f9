"""Models that come with the package: found by name, equal to what was trained, small, with licence and card; on the
command line, fine-tuned, as ONNX, and on the Hub. The shelf of these tests is a temporary folder"""
import copy
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torchvision.models.resnet import BasicBlock, ResNet
from toys import quiet

import pyramidreid.models.pretrained as pretrained
from pyramidreid.cli.entry import main
from pyramidreid.export.hub import download_model, from_pretrained
from pyramidreid.export.model_cards import RESEARCH_ONLY, model_card
from pyramidreid.export.model_files import learner_from, load_embedder, read_description
from pyramidreid.export.onnx_runtime import Runtime
from pyramidreid.export.pretrained_models import load_pretrained
from pyramidreid.models.backbone import resnet10
from pyramidreid.models.fingerprints import learner_fingerprint
from pyramidreid.models.history import is_cross_domain, trained_on
from pyramidreid.models.pretrained import (
    default_pretrained,
    pretrained_by_fingerprint,
    pretrained_models,
    pretrained_names,
)
from pyramidreid.training.example import example_learner
from pyramidreid.training.learner import pyramid_learner

onnx = pytest.mark.skipif(importlib.util.find_spec('onnxscript') is None, reason='the onnx extra is not installed')
NAME = 'people-resnet10'

@pytest.fixture(scope='module')
def learn():
    "Trained, so that its embeddings say something; not changed"
    return quiet(example_learner())

@pytest.fixture(scope='module')
def card(learn): return learn.evaluate()

@pytest.fixture(scope='module')
def made(learn, card, tmp_path_factory):
    "The folder of the model, as it would be committed"
    shelf = tmp_path_factory.mktemp('shelf')
    return learn.save_pretrained(shelf/NAME, card=card, licence=RESEARCH_ONLY)

@pytest.fixture
def shelf(made, tmp_path, monkeypatch):
    "A copy of it in place of the package's own models"
    shutil.copytree(made, tmp_path/'shelf'/NAME)
    monkeypatch.setattr(pretrained, 'PRETRAINED', tmp_path/'shelf')
    return tmp_path/'shelf'

@pytest.fixture(scope='module')
def files(learn):
    items = learn.dls.valid.items
    return items.fn[items.label>=0].tolist()[:48]

@pytest.fixture(scope='module')
def truth(learn, files): return learn.embed(files).numpy()

# the files

def half_rounded(learn, least_dims=2):
    "A copy of the learner's model whose values of at least so many dimensions went through float16, plainly"
    model = copy.deepcopy(learn.model).eval()
    for module in model.modules():
        for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            rounded = value.detach().numpy().astype(np.float16).astype(np.float32)
            if value.dim()>=least_dims and value.is_floating_point(): value.data = torch.from_numpy(rounded)
    return model

def test_half_of_the_bytes_and_the_same_embeddings(learn, made, files, truth):
    """Exactly those of the rounded weights. To the learner's own, a float16 has 11 bits, so a weight is off by up to
    2**-12 of itself. Over some twenty layers that stays below 1e-3 of an embedding's length, measured 2.4e-4"""
    model = load_embedder(made)
    found = model.embed(files)
    images = learn.dls.test_dl(files, bs=64).one_batch()[0]
    with torch.no_grad(): expected,all_half = [half_rounded(learn, n)(images).numpy() for n in (2, 0)]
    assert abs(found-expected).max()<1e-5
    assert 0<abs(found-truth).max()<1e-3 and abs(found@found.T-truth@truth.T).max()<1e-3
    def gap(embs): return abs(embs@embs.T-truth@truth.T).max()
    assert gap(found)<gap(all_half), 'rounding biases and batch norm as well would be worse'
    sizes = [(o.numel(), o.dim()) for name,o in learn.model.state_dict().items() if 'classify' not in name]
    n_bytes = sum(n*(2 if dim>1 else 4) for n,dim in sizes)
    assert (made/'model.safetensors').stat().st_size==pytest.approx(n_bytes, rel=.01)

def test_what_is_in_the_folder(learn, made):
    assert sorted(o.name for o in made.iterdir())==['README.md', 'model.json', 'model.safetensors']
    with safe_open(made/'model.safetensors', 'pt') as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()} # noqa: SIM118
    assert not [name for name in kinds if 'classify' in name]
    assert kinds['head.reduce.weight']=='F16' and kinds['head.bn.running_var']==kinds['head.bn.weight']=='F32'
    about = read_description(made)
    assert about['format']==3 and about['licence']==RESEARCH_ONLY

def test_the_fingerprint_is_that_of_what_is_loaded(learn, made, tmp_path):
    "Whatever is written from it has the same one; the learner, which has not been rounded, another"
    model = load_embedder(made)
    assert model.fingerprint!=learner_fingerprint(learn)
    again = load_embedder(model.save_pretrained(tmp_path/'half'))
    whole = load_embedder(model.save_model(tmp_path/'whole'))
    assert model.fingerprint==again.fingerprint==whole.fingerprint
    assert (tmp_path/'half'/'model.safetensors').read_bytes()==(made/'model.safetensors').read_bytes()
    assert learner_fingerprint(learner_from(made, learn.dls))==model.fingerprint

def test_a_model_without_any_of_this_is_written_as_before(learn, tmp_path):
    "So that earlier versions read it"
    about = read_description(learn.save_model(tmp_path))
    assert about['format']==2 and 'licence' not in about
    assert about['weights']==f"model-{about['fingerprint'][:12]}.safetensors"

def test_save_model_in_half_precision(learn, files, tmp_path):
    about = read_description(learn.save_model(tmp_path, half=True))
    model = load_embedder(tmp_path)
    assert about['format']==3 and about['weights']==f"model-{model.fingerprint[:12]}.safetensors"
    assert (tmp_path/about['weights']).stat().st_size<12e6

def test_weights_too_large_for_half_precision(learn, tmp_path):
    large = copy.copy(learn)
    large.model = copy.deepcopy(learn.model)
    with torch.no_grad(): large.model.head.reduce.weight[0,0,0] = 1e5
    with pytest.raises(ValueError, match='head.reduce.weight has values up to 1e.05, and half precision holds 65,504'):
        large.save_model(tmp_path, half=True)
    assert not list(tmp_path.iterdir())

def own_net(): return ResNet(BasicBlock, [1,1,1,1])

def test_a_backbone_of_ones_own(make_learner, make_dls, tmp_path):
    "Is shared with its card, and needs the function to be loaded"
    learn = make_learner(make_dls(size=(48,24)), arch=own_net)
    folder = learn.save_pretrained(tmp_path/'own')
    assert 'own_net of own' in (folder/'README.md').read_text(encoding='utf-8')
    assert load_embedder(folder, arch=own_net).fingerprint==read_description(folder)['fingerprint']

# by name

@pytest.mark.filterwarnings('ignore')
def test_five_lines(shelf, learn):
    "From `pip install` to the similarity of two pictures: the lines of the page, with another name"
    notebook = Path(__file__).parents[1]/'nbs'/'export'/'04_pretrained_models.ipynb'
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    page = '\n'.join(''.join(o['source']) for o in cells if o['cell_type']=='markdown')
    lines = re.search(r'```python\n(.*?)```', page, re.S)[1]
    assert len(lines.splitlines())==4 # and pip install
    items = learn.dls.valid.items
    ann,who = items.fn[items.label==items.label.max()].tolist()[:2]
    for old,new in {'market1501-lite0': NAME, 'ann.jpg': str(ann), 'who.jpg': str(who)}.items():
        assert old in lines
        lines = lines.replace(old, new)
    space = {}
    exec(lines, space)
    a,b = learn.embed([ann,who]).numpy()
    assert space['a']@space['b']==pytest.approx(a@b, abs=1e-3)

def test_the_table(shelf, made):
    table = pretrained_models()
    assert table.index.tolist()==pretrained_names()==[NAME] and default_pretrained()==NAME
    row = table.loc[NAME]
    assert row.MB==pytest.approx(sum(o.stat().st_size for o in made.iterdir())/1e6, abs=.05)
    assert row.licence==RESEARCH_ONLY and row.input=='96×48' and row.backbone=='resnet10'
    assert re.match(r'synth-40-16-\w+, 40 identities, 6 epochs, from random weights', row['trained on'])
    assert pretrained_by_fingerprint(load_pretrained(NAME).fingerprint)==NAME
    assert pretrained_by_fingerprint(64*'0') is None

@pytest.mark.parametrize('name', ['market', f'../shelf/{NAME}', f'{NAME}/', '', '.', '..', '/etc', None, Path(NAME)])
def test_a_name_that_does_not_exist(shelf, learn, name):
    with pytest.raises(ValueError, match=f'no pretrained model .*This version has: {NAME}'): load_pretrained(name)
    if isinstance(name, str):
        with pytest.raises(ValueError, match=f'This version has: {NAME}'): pyramid_learner(learn.dls, pretrained=name)

def test_the_closest_name_is_suggested(shelf):
    with pytest.raises(ValueError, match=f"Did you mean '{NAME}'"): load_pretrained('People-resnet-10')

def test_no_models(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path/'none'):
        monkeypatch.setattr(pretrained, 'PRETRAINED', folder)
        assert len(pretrained_models())==0
        with pytest.raises(ValueError, match='comes without one. Train your own'): load_pretrained('market1501-lite0')
        with pytest.raises(ValueError, match='comes without one. Train your own'): default_pretrained()

def test_the_default(shelf):
    for name in ('market1501-lite0', 'a', 'market1501-cuhk03-lite0'): shutil.copytree(shelf/NAME, shelf/name)
    assert default_pretrained()=='market1501-lite0'
    shutil.rmtree(shelf/'market1501-lite0')
    assert default_pretrained()=='market1501-cuhk03-lite0'

def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)

def edit_description(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding='utf-8')), **entries}), encoding='utf-8')

DAMAGE = dict(
    bit=lambda folder: flip_a_bit(folder/'model.safetensors'),
    cut=lambda folder: (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:-7]),
    missing=lambda folder: (folder/'model.safetensors').unlink(),
    json=lambda folder: (folder/'model.json').write_text('{"format": 3, '),
    entry=lambda folder: (folder/'model.json').write_text('{"format": 3}'),
    size=lambda folder: edit_description(folder/'model.json', size=[96,64]),
    outside=lambda folder: edit_description(folder/'model.json', weights='../model.safetensors'))

@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_answered_by_installing_again(shelf, learn, damage):
    DAMAGE[damage](shelf/NAME)
    message = f'pretrained model {NAME} is damaged .*pip install --force-reinstall --no-deps pyramidreid'
    with pytest.raises(ValueError, match=message): load_pretrained(NAME)
    if damage!='outside':
        with pytest.raises(ValueError, match=message): pyramid_learner(learn.dls, pretrained=NAME)

@pytest.mark.parametrize('device', ['gpu', 'mps', 'xpu', 'nowhere:3'])
def test_a_device_that_is_not_there_is_no_damage(shelf, device):
    with pytest.raises(ValueError, match=f"^device='{device}' cannot be used.*Use 'cpu'"): load_pretrained(NAME, device)

def test_a_model_moves_to_another_device(shelf, files):
    "To the same one here, which makes its network anew"
    model = load_pretrained(NAME)
    before,net = model.embed(files[:3]),model.net
    assert model.to(torch.device('cpu')) is model and model.net is not net
    assert np.array_equal(model.embed(files[:3]), before)

def test_a_device_without_room_leaves_the_model_where_it_is(shelf, files, monkeypatch):
    model = load_pretrained(NAME)
    before = model.embed(files[:2])
    moved = []
    def to(device):
        moved.append(device)
        if device!='cpu': raise RuntimeError('out of memory')
    monkeypatch.setattr(model.model, 'to', to)
    with pytest.raises(ValueError, match='out of memory.*has room'): model.to('full')
    assert model.device=='cpu' and moved==['full','cpu']
    assert np.array_equal(model.embed(files[:2]), before)

@onnx
def test_the_same_as_onnx(shelf, files, tmp_path):
    model = load_pretrained(NAME)
    runtime = Runtime(model.to_onnx(tmp_path/'m.onnx'))
    assert abs(runtime.embed(files)-model.embed(files)).max()<1e-5
    assert runtime.fingerprint==model.fingerprint and runtime.licence==RESEARCH_ONLY
    assert 'licence: research only' in repr(runtime) and 'licence: research only' in repr(model)

# fine-tuning

def test_fine_tuning_starts_from_the_model(shelf, learn, files):
    "With its embeddings, new classifiers, and its history, which further training continues"
    model = load_pretrained(NAME)
    mine = quiet(pyramid_learner(learn.dls, pretrained=NAME))
    assert abs(mine.embed(files).numpy()-model.embed(files)).max()<1e-5
    assert learner_fingerprint(mine)==model.fingerprint
    old,new = learn.model.head.classify.weight,mine.model.head.classify.weight
    assert old.shape==new.shape and not torch.allclose(old, new, atol=1e-3) and new.std()<.0012
    assert (mine.arch_name,mine.arch_from)==('resnet10','pyramidreid') and mine.licence==RESEARCH_ONLY
    history = mine.model.history
    assert history['stages']==learn.model.history['stages']
    assert history['start']==f'pretrained model {NAME} (random weights)'
    assert not is_cross_domain(history, learn.dls.data_name) and is_cross_domain(history, 'Market-1501')

def test_a_fine_tuned_model_keeps_start_and_licence(shelf, make_dls, tmp_path):
    "Other people, of another number and at another size"
    mine = quiet(pyramid_learner(make_dls(size=(192,48)), pretrained=NAME, path=tmp_path))
    mine.fit(1, 1e-4)
    assert mine.dls.c==12 and len(mine.model.history['stages'])==2
    assert re.match(r'synth-\S+, 40 identities, 6 epochs, then people, 12 identities', trained_on(mine.model.history))
    about = read_description(mine.save_model(tmp_path/'mine'))
    assert about['licence']==RESEARCH_ONLY and about['history']['start'].startswith(f'pretrained model {NAME}')
    again = learner_from(tmp_path/'mine', make_dls(size=(192,48)))
    assert again.licence==RESEARCH_ONLY

def test_the_licence_goes_through_save_and_load(shelf, learn, make_dls, tmp_path):
    "The history knows the model that a learner started from"
    quiet(pyramid_learner(learn.dls, pretrained=NAME, path=tmp_path)).save('mine')
    other = quiet(pyramid_learner(learn.dls, resnet10, pretrained=False, emb_sz=32, neck=False, path=tmp_path))
    assert 'licence' not in read_description(other.save_model(tmp_path/'random'))
    other.load('mine')
    assert read_description(other.save_model(tmp_path/'again'))['licence']==RESEARCH_ONLY
    assert read_description(other.save_model(tmp_path/'told', licence='mit'))['licence']=='mit'

@pytest.mark.parametrize('n_parts,levels,norm,emb_sz,stride', [
    (3, [1,3], 'whole', 4, 2), pytest.param(2, None, None, 5, 1, marks=pytest.mark.slow),
    pytest.param(1, [1], 'branch', 7, 1, marks=pytest.mark.slow)])
def test_the_shape_follows_the_model(make_dls, make_learner, shelf, n_parts, levels, norm, emb_sz, stride):
    small = make_learner(make_dls(size=(96,48)), n_parts=n_parts, levels=levels, norm=norm, emb_sz=emb_sz,
                         last_stride=stride, drop=.35)
    small.save_pretrained(shelf/'small', half=False)
    mine = pyramid_learner(make_dls(size=(96,48)), pretrained='small')
    assert learner_fingerprint(mine)==learner_fingerprint(small)==load_pretrained('small').fingerprint
    assert mine.model.head.drop.p==.35 and mine.model.norm==norm and mine.last_stride==stride
    changed = pyramid_learner(make_dls(size=(96,48)), pretrained='small', drop=.1, n_parts=n_parts, levels=levels)
    assert changed.model.head.drop.p==.1

@pytest.mark.skipif('neck' not in inspect.signature(pyramid_learner).parameters, reason='there is no neck to take over')
def test_a_neck_is_taken_over(make_dls, make_learner, shelf):
    necked = make_learner(make_dls(size=(96,48)), n_parts=3, emb_sz=4, neck=True)
    necked.save_pretrained(shelf/'necked', half=False)
    mine = pyramid_learner(make_dls(size=(96,48)), pretrained='necked', neck=True)
    assert mine.model.head.neck and learner_fingerprint(mine)==learner_fingerprint(necked)
    assert not pyramid_learner(make_dls(size=(96,48)), pretrained=NAME).model.head.neck
    for name,neck in {'necked':False, NAME:True}.items():
        with pytest.raises(ValueError, match=f'has neck={not neck}, which neck={neck} contradicts'):
            pyramid_learner(make_dls(size=(96,48)), pretrained=name, neck=neck)

CONTRADICTIONS = dict(
    n_parts=(dict(n_parts=3), 'has n_parts=6, which n_parts=3 contradicts'),
    default=(dict(emb_sz=128), 'has emb_sz=32, which emb_sz=128 contradicts'),
    levels=(dict(levels=[6]), r'has levels=\[1, 2, 3, 4, 5, 6\], which levels=\[6\] contradicts'),
    norm=(dict(norm=None), "has norm='branch', which norm=None contradicts"),
    stride=(dict(last_stride=2, emb_sz=9), 'has emb_sz=32, last_stride=1, which emb_sz=9, last_stride=2 contradicts|'
                                           'has last_stride=1, emb_sz=32, which last_stride=2, emb_sz=9 contradicts'),
    arch=(dict(arch='resnet18'), 'has arch=resnet10, which arch=resnet18 contradicts'),
    normalize=(dict(normalize=False), 'has normalize=True, which normalize=False contradicts'),
    weights=(dict(weights='w.pth'), "weights='w.pth' and pretrained='people-resnet10' both give the weights"))

@pytest.mark.parametrize('case', CONTRADICTIONS)
def test_contradicting_arguments(shelf, make_dls, case):
    kwargs,message = CONTRADICTIONS[case]
    dls = make_dls(size=(96,48))
    with pytest.raises(ValueError, match=message): pyramid_learner(dls, pretrained=NAME, **kwargs)
    assert not [o for o in dls.after_batch.fs if hasattr(o, 'mean')], 'the loaders are unchanged'

def test_arguments_that_agree(shelf, make_dls):
    "By position and by name"
    learn = pyramid_learner(make_dls(size=(96,48)), resnet10, NAME, None, 6, emb_sz=32, levels=[1,2,3,4,5,6])
    assert learner_fingerprint(learn)==load_pretrained(NAME).fingerprint

def test_other_pixels_are_refused(shelf, make_dls):
    from fastai.vision.all import Normalize
    dls = make_dls(size=(96,48))
    dls.add_tfms([Normalize.from_stats([.5]*3, [.5]*3)], 'after_batch')
    with pytest.raises(ValueError, match='normalise pixels by .*and the pretrained model people-resnet10 needs'):
        pyramid_learner(dls, pretrained=NAME)

def test_without_a_name_nothing_changes():
    "The signature is as documented"
    parameters = inspect.signature(pyramid_learner).parameters
    assert list(parameters)[:3]==['dls','arch','pretrained'] and parameters['n_parts'].default==6
    assert 'kwargs' not in parameters and 'lr' in parameters

# identities

@pytest.mark.parametrize('method', ['predict', 'classify', 'get_preds'])
def test_a_shared_model_does_not_classify(shelf, method):
    message = r'identity classifiers.*pyramid_learner\(dls, pretrained=…\) or learner_from\(folder, dls\), then'
    with pytest.raises(AttributeError, match=message): getattr(load_pretrained(NAME), method)

def test_classifiers_cannot_be_loaded(shelf, make_learner, make_dls):
    learn = make_learner(make_dls(size=(96,48)), n_parts=6, emb_sz=32)
    with pytest.raises(ValueError, match=r'classifier=True: .*pyramid_learner\(dls, pretrained=…\)'):
        learn.load_weights(shelf/NAME, classifier=True)
    assert not hasattr(load_pretrained(NAME), 'other') and load_pretrained(NAME).licence

# the command line

@pytest.fixture
def cli(capfd):
    def run(*args):
        capfd.readouterr()
        code = main([str(o) for o in args])
        out,err = capfd.readouterr()
        return code,out,err
    return run

def test_models_are_listed(shelf, cli, tmp_path, monkeypatch):
    code,out,_ = cli('models')
    assert code==0 and out.startswith(f'{NAME} (default): resnet10 at 96×48, ') and f'Licence: {RESEARCH_ONLY}' in out
    assert json.loads(cli('models', '--json')[1])[NAME]['licence']==RESEARCH_ONLY
    monkeypatch.setattr(pretrained, 'PRETRAINED', tmp_path/'none')
    assert cli('models')[1].strip()=='This version of pyramidreid comes without pretrained models.'

def test_a_gallery_without_a_model(shelf, cli, tmp_path, files, monkeypatch):
    "Filled and searched with the default, which is named with its licence, also when another one is the default later"
    pytest.importorskip('pyarrow', reason='needs the extra gallery')
    street = tmp_path/'street'
    code,out,err = cli('gallery', 'add', street, *files[:6])
    assert code==0, err
    assert out.startswith(f'Model: {NAME}. Licence: {RESEARCH_ONLY}\n') and '6 added' in out
    shutil.copytree(shelf/NAME, shelf/'market1501-lite0')
    edit_description(shelf/'market1501-lite0'/'model.json', fingerprint=64*'0') # another model
    assert default_pretrained()=='market1501-lite0'
    code,out,err = cli('gallery', 'search', street, files[2], '-k', 1, '--json')
    assert code==0 and f'Model: {NAME}.' in err
    match, = json.loads(out)['matches']
    assert match['key']==str(files[2]) and match['similarity']==pytest.approx(1, abs=1e-4)
    assert cli('gallery', 'add', street, *files[6:8], '--model', NAME)[0]==0
    shutil.rmtree(shelf/NAME)
    code,_,err = cli('gallery', 'search', street, files[2])
    assert code==2 and re.search("Missing option '--model': .* was filled with model .{8}, which is not among", err)

def test_a_gallery_of_another_model_and_no_model_at_all(shelf, cli, tmp_path, files, make_learner, monkeypatch):
    pytest.importorskip('pyarrow', reason='needs the extra gallery')
    other = make_learner(emb_sz=4).save_model(tmp_path/'other')
    assert cli('gallery', 'add', tmp_path/'street', files[0], '--model', other)[0]==0
    code,_,err = cli('gallery', 'add', tmp_path/'street', files[1], '--model', NAME)
    assert code==2 and 'model' in err
    monkeypatch.setattr(pretrained, 'PRETRAINED', tmp_path/'none')
    code,_,err = cli('gallery', 'add', tmp_path/'new', files[1])
    assert code==2 and "Missing option '--model': this version of pyramidreid comes without pretrained models" in err

def test_a_name_in_place_of_a_path(shelf, cli, tmp_path, learn, files, make_learner, monkeypatch):
    "A path that exists comes first"
    monkeypatch.chdir(tmp_path)
    out = tmp_path/'e.npz'
    assert cli('embed', NAME, *files[:3], '--out', out)[0]==0
    with np.load(out) as saved: assert abs(saved['embeddings']-load_pretrained(NAME).embed(files[:3])).max()<1e-5
    code,text,_ = cli('evaluate', NAME, learn.dls.path, '--json', '-q')
    assert code==0 and json.loads(text)['mAP']==pytest.approx(learn.evaluate().mAP, abs=2e-3)
    make_learner(emb_sz=4).save_model(tmp_path/NAME)
    assert cli('embed', NAME, files[0], '--out', out)[0]==0
    with np.load(out) as saved: assert saved['embeddings'].shape==(1, 6*4)
    code,_,err = cli('embed', 'people-resnet', files[0], '--out', out)
    assert code==2 and re.search(rf"'people-resnet' does not exist.*Did you mean\s+'{NAME}'", err, re.S)

@pytest.mark.slow
@onnx
def test_a_name_is_exported(shelf, cli, tmp_path):
    assert cli('export', NAME, '--to', 'onnx', '--out', tmp_path/'m.onnx')[0]==0
    assert Runtime(tmp_path/'m.onnx').fingerprint==load_pretrained(NAME).fingerprint

@pytest.mark.slow
def test_training_continues_a_pretrained_model(shelf, cli, people, tmp_path):
    base = ['train', people, '--weights', NAME, '--size', 96, 48, '--epochs', 1, '--p', 4, '--k', 2, '--workers', 0]
    code,_,err = cli(*base, '--out', tmp_path/'run', '-q')
    assert code==0, err
    about = read_description(tmp_path/'run'/'model')
    assert about['history']['start'].startswith(f'pretrained model {NAME}') and about['licence']==RESEARCH_ONLY
    code,_,err = cli(*base, '--out', tmp_path/'other', '--arch', 'resnet18')
    assert code==2 and 'has arch=resnet10, which arch=resnet18 contradicts' in err

# the card

def head_and_page(text):
    yaml = pytest.importorskip('yaml')
    _,head,page = text.split('---\n', 2)
    return yaml.safe_load(head),page

def test_the_card_has_what_is_known(learn, card, made):
    head,page = head_and_page((made/'README.md').read_text(encoding='utf-8'))
    assert (head['license'],head['license_name'])==('other','research-only')
    assert head['library_name']=='pyramidreid' and head['datasets']==[learn.dls.data_name]
    index, = head['model-index']
    assert index['name']==NAME
    result, = index['results']
    metrics = {o['type']:o['value'] for o in result['metrics'] if 'trapezoid' not in o['name']}
    assert metrics['mAP']==round(100*card.mAP, 2) and metrics['rank-1']==round(100*card.rank1, 2)
    assert f'| rank-1 | {100*card.rank1:.2f} |' in page and '| distance | cosine |' in page
    for text in ('must not be used for', 'Research only', '40 identities, 6 epochs', '96×48', '21 branches',
                 f'load_embedder({NAME!r})', load_embedder(made).fingerprint): assert text in page, text

def test_the_hub_reads_the_head(made):
    hub = pytest.importorskip('huggingface_hub')
    data = hub.ModelCard((made/'README.md').read_text(encoding='utf-8')).data
    assert {o.metric_type for o in data.eval_results}>={'mAP','rank-1','mINP'}

def test_cards_cameras_and_texts_of_your_own(learn, card, made):
    from pyramidreid.evaluation.protocols import evaluate_cameras
    about,cameras = read_description(made),evaluate_cameras(**learn.to_rank())
    text = model_card(about, 'ann/people', {'Plain':card, 'With flip':learn.evaluate(flip=True)}, cameras,
                      training='Two hours.', data='Drawn.')
    head,page = head_and_page(text)
    assert len(head['model-index'][0]['results'])==2 and "from_pretrained('ann/people')" in page
    assert '| metric, % | Plain | With flip |' in page and 'Two hours.' in page and 'Drawn.' in page
    assert '| flip | none | mean of both |' in page and page.count('| distance |')==1
    flipped = learn.evaluate(flip=True)
    assert f'| rank-1 | {100*card.rank1:.2f} | {100*flipped.rank1:.2f} |' in page
    first = next(cameras.itertuples())
    assert f'| {first.query_cam} | {first.gallery_cam} | {first.queries} | {first.images} | {first.mAP:.2f} |' in page
    assert page.count('\n| 1 | ')==int((cameras.query_cam.astype(str)=='1').sum())

@pytest.mark.parametrize('licence,entries', [
    (None, dict(license='unknown')), ('apache-2.0', dict(license='apache-2.0')),
    ('Ask ann: first', dict(license='other', license_name='ask-ann'))])
def test_licences_on_a_card(made, licence, entries):
    about = read_description(made) | dict(licence=licence, card=None)
    head,page = head_and_page(model_card(about, 'x'))
    assert {name:value for name,value in head.items() if name.startswith('license')}==entries
    assert ('Not stated' in page)==(licence is None) and 'Evaluate it before you use it' in page

@pytest.mark.parametrize('kwargs', [dict(cards=3), dict(traning='x'), dict(training=5)])
def test_a_card_that_cannot_be_written_leaves_no_model(learn, tmp_path, kwargs):
    with pytest.raises(TypeError): learn.save_pretrained(tmp_path/'model', **kwargs)
    assert not (tmp_path/'model').exists()

def test_cards_by_title_are_a_dict(made, card):
    with pytest.raises(TypeError, match='cards is a .*give a dict of protocol cards by title'):
        model_card(read_description(made), 'x', card)

def test_how_a_card_says_to_load(shelf, made):
    "A model of the package, a repository, a folder"
    def page(name): return model_card(read_description(made), name)
    assert f'load_pretrained({NAME!r})' in page(NAME) and "from_pretrained('ann/x')" in page('ann/x')
    assert "load_embedder('mine') # the folder" in page('mine')

def test_names_without_latin_letters(made):
    about = read_description(made) | dict(licence='仅供研究: 不得商用')
    about['history']['stages'][0]['data'] = '街道'
    head,_ = head_and_page(model_card(about, 'x'))
    assert head['license_name']=='other' and head['datasets']==['other']

def test_choices_that_are_lists(made):
    "A card of your own may say anything that JSON can"
    about = read_description(made)
    about['card'] |= {'cameras used': ['north','south']}
    assert "| cameras used | ['north', 'south'] |" in model_card(about, 'x')

def test_the_head_names_each_dataset(made):
    about = read_description(made)
    about['history']['stages'][0]['data'] = 'Street 1 + Station, 20% of the training identities held out'
    head,_ = head_and_page(model_card(about, 'x'))
    assert head['datasets']==['station','street-1']

def test_a_name_from_a_stranger_stays_text(made):
    "In the YAML and in the tables"
    about = read_description(made)
    about['history']['stages'][0]['data'] = 'x: "|\n---\nlicense: mit\x1b[2J'
    head,page = head_and_page(model_card(about, 'a\n# b'))
    assert head['license']=='other' and '\x1b' not in page and '\n# b' not in page

# the Hub

class StubHub:
    "Repositories as folders. Each call must suit the signature of the real function"
    def __init__(self, root, monkeypatch):
        self.root,self.calls = root,[]
        self.real = pytest.importorskip('huggingface_hub', reason='needs the extra hub')
        stub,api = self,self.real.HfApi
        class Api:
            def __init__(self, token=None): stub.token = token
            def create_repo(self, *args, **kwargs):
                bound = stub.note(api.create_repo, (self, *args), kwargs)
                (root/bound['repo_id']).mkdir(parents=True, exist_ok=bound['exist_ok'])
                return stub.real.RepoUrl(f"https://huggingface.co/{bound['repo_id']}")
            def upload_folder(self, *args, **kwargs):
                bound = stub.note(api.upload_folder, (self, *args), kwargs)
                stub.copy(Path(bound['folder_path']), root/bound['repo_id'], bound['allow_patterns'])
        monkeypatch.setattr(self.real, 'HfApi', Api)
        real_download = self.real.snapshot_download
        def snapshot_download(*args, **kwargs):
            bound = self.note(real_download, args, kwargs)
            if self.error: raise self.error
            dest = Path(bound['cache_dir'] or root.parent/'cache')/bound['repo_id']
            self.copy(root/bound['repo_id'], dest, bound['allow_patterns'])
            return str(dest)
        monkeypatch.setattr(self.real, 'snapshot_download', snapshot_download)
        self.error = None

    def note(self, function, args, kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        self.calls.append((function.__name__, bound))
        return bound

    def copy(self, source, dest, patterns):
        "As the Hub does, by patterns"
        names = [o.name for o in source.iterdir()]
        dest.mkdir(parents=True, exist_ok=True)
        for name in self.real.utils.filter_repo_objects(names, allow_patterns=patterns): shutil.copy(source/name, dest)

    def error_of(self, name):
        import httpx
        kind = getattr(self.real.errors, name)
        if name=='LocalEntryNotFoundError': return kind('no connection')
        answer = httpx.Response(404, request=httpx.Request('GET', 'https://x'))
        return kind('404 Client Error\nsecond line', response=answer)

@pytest.fixture
def hub(tmp_path, monkeypatch): return StubHub(tmp_path/'hub', monkeypatch)

def test_there_and_back(hub, learn, card, files, truth, tmp_path):
    url = learn.push_to_hub('ann/people', card=card, licence='apache-2.0', private=True, token='secret', revision='dev')
    assert url=='https://huggingface.co/ann/people' and hub.token=='secret'
    (_,made),(_,sent) = hub.calls
    assert made['private'] and made['exist_ok'] and sent['revision']=='dev'
    assert not Path(sent['folder_path']).exists(), 'the temporary folder is gone'
    stored = hub.root/'ann'/'people'
    assert sorted(o.name for o in stored.iterdir())==['README.md', 'model.json', 'model.safetensors']
    assert b'secret' not in b''.join(o.read_bytes() for o in stored.iterdir())
    assert "from_pretrained('ann/people')" in (stored/'README.md').read_text(encoding='utf-8')
    (stored/'code.py').write_text('raise SystemExit')
    model = from_pretrained('ann/people', revision='dev', token='secret', cache_dir=tmp_path/'mine')
    _,got = hub.calls[-1]
    assert (got['revision'],got['token'])==('dev','secret')
    assert not (tmp_path/'mine'/'ann'/'people'/'code.py').exists()
    assert abs(model.embed(files)-truth).max()<1e-3 and model.licence=='apache-2.0'
    assert learner_fingerprint(learner_from(download_model('ann/people'), learn.dls))==model.fingerprint

@pytest.mark.parametrize('name,message', [
    (NAME, f"comes with the package: use load_pretrained\\('{NAME}'\\)"), (None, "'None' is not a repository"),
    ('', 'is not a repository'), ('a/b/c', "give the name of a repository, 'user/name'")])
def test_what_is_not_a_repository(hub, shelf, name, message):
    with pytest.raises(ValueError, match=message): from_pretrained(name)
    assert hub.calls==[]

def test_a_folder_is_not_a_repository(hub, made):
    with pytest.raises(ValueError, match='load_embedder opens a model in a folder'): from_pretrained(str(made))

def test_an_embedder_is_uploaded(hub, made, files):
    model = load_embedder(made)
    model.push_to_hub('ann/again', training='By ann.')
    assert 'By ann.' in (hub.root/'ann'/'again'/'README.md').read_text(encoding='utf-8')
    assert from_pretrained('ann/again').fingerprint==model.fingerprint

def test_what_comes_from_the_hub_is_checked(hub, made, learn, tmp_path):
    stored = hub.root/'ann'/'people'
    shutil.copytree(made, stored)
    flip_a_bit(stored/'model.safetensors')
    with pytest.raises(ValueError, match='does not have the fingerprint'): from_pretrained('ann/people')
    edit_description(stored/'model.json', weights='../../model.safetensors')
    with pytest.raises(ValueError, match="'weights' is"): from_pretrained('ann/people')
    shutil.rmtree(stored)
    learn.save_model(stored)
    with pytest.raises(ValueError, match='only model.json.* are downloaded. Upload it again with push_to_hub'):
        from_pretrained('ann/people', cache_dir=tmp_path/'b')
    (stored/'model.json').unlink()
    with pytest.raises(FileNotFoundError, match='ann/people is not a model of pyramidreid'):
        from_pretrained('ann/people', cache_dir=tmp_path/'c')

@pytest.mark.parametrize('name,kind,message', [
    ('RepositoryNotFoundError', FileNotFoundError, 'no model ann/x on the Hub, or it is not open to you'),
    ('RevisionNotFoundError', FileNotFoundError, "ann/x has no revision 'v9'"),
    ('LocalEntryNotFoundError', OSError, 'ann/x: the Hub did not answer.*no connection.*Check the connection'),
    ('HfHubHTTPError', OSError, r'ann/x: the Hub did not answer as expected \(404 Client Error\)')])
def test_errors_of_the_hub(hub, name, kind, message):
    hub.error = hub.error_of(name)
    with pytest.raises(kind, match=message): from_pretrained('ann/x', revision='v9')

def test_an_error_of_the_hub_without_words(hub):
    hub.error = OSError()
    with pytest.raises(OSError, match=r'did not answer as expected \(OSError\)'): from_pretrained('ann/x')

def test_a_model_that_cannot_be_shared_is_not_uploaded(hub, learn):
    broken = copy.copy(learn)
    broken.model = copy.deepcopy(learn.model)
    with torch.no_grad(): broken.model.head.reduce.weight[0] = float('nan')
    with pytest.raises(ValueError, match='training diverged'): broken.push_to_hub('ann/people')
    assert hub.calls==[]

def test_the_extra_is_named(learn, monkeypatch):
    for name in ('huggingface_hub', 'huggingface_hub.errors'): monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: from_pretrained('ann/people'), lambda: learn.push_to_hub('ann/people')):
        with pytest.raises(ImportError, match=r"pip install 'pyramidreid\[hub\]'"): call()

# the package

def test_pretrained_folders_are_package_data():
    "Every file of every model, and those of the page, as setup.py gives the patterns; and nothing else lies there"
    root = Path(__file__).parents[1]
    patterns = re.search(r"package_data=\{'pyramidreid': (\[.*?\])\}", (root/'setup.py').read_text(encoding='utf-8'))[1]
    package,matched = root/'pyramidreid',set()
    for pattern in eval(patterns): matched |= {o for o in package.glob(pattern) if o.is_file()}
    folders = package/'pretrained',package/'web'/'static'
    assert matched=={package/'py.typed', *(o for folder in folders for o in folder.rglob('*') if o.is_file())}
    for folder in filter(Path.is_dir, (package/'pretrained').iterdir()):
        assert sorted(o.name for o in folder.iterdir())==['README.md', 'model.json', 'model.safetensors']
        assert sum(o.stat().st_size for o in folder.iterdir())<15.5e6
        load_pretrained(folder.name)

@pytest.mark.slow
def test_the_wheel_has_the_models_and_the_page(made, tmp_path):
    pytest.importorskip('build')
    root,copied = Path(__file__).parents[1],tmp_path/'copy'
    ignored = shutil.ignore_patterns('.git', '.venv', 'nbs', 'benchmarks', 'tests', '__pycache__', '*.egg-info', 'docs')
    shutil.copytree(root, copied, ignore=ignored)
    shutil.copytree(made, copied/'pyramidreid'/'pretrained'/NAME)
    command = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path/'dist', copied]
    subprocess.run(command, check=True, capture_output=True)
    import tarfile
    import zipfile
    wheel, = (tmp_path/'dist').glob('*.whl')
    sdist, = (tmp_path/'dist').glob('*.tar.gz')
    folder = 'pyramidreid/pretrained'
    expected = {f'{folder}/README.md', *(f'{folder}/{NAME}/{o.name}' for o in made.iterdir())}
    expected |= {f'pyramidreid/web/static/{name}' for name in ('icon.svg', 'page.css', 'page.js')}
    assert expected<=set(zipfile.ZipFile(wheel).namelist())
    assert expected<={o.partition('/')[2] for o in tarfile.open(sdist).getnames()}
