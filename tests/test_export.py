"""One model as safetensors, ONNX and exported program: the same embeddings as the learner's on 500 crops, and files
that are intact or refused"""
import copy
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.vision.all import Normalize, load_learner, resnet18, set_seed
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from toys import THERMAL_RANGE, quiet, scaled_to_rgb, thermal_copy

from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.evaluation.retrieval import evaluate
from pyramidreid.export.model_files import *
from pyramidreid.export.onnx_runtime import *
from pyramidreid.images import load_pixels
from pyramidreid.models.backbone import arch_source, resnet10
from pyramidreid.models.fingerprints import fingerprint, input_stats, learner_fingerprint
from pyramidreid.synth.dataset import synth_persons
from pyramidreid.training.learner import pyramid_learner


def installed(*modules): return all(importlib.util.find_spec(module) is not None for module in modules)

HAS_ONNX = installed('onnx', 'onnxscript', 'onnxruntime')
onnx = pytest.mark.skipif(not HAS_ONNX, reason='the onnx extra is not installed')
pytestmark = pytest.mark.filterwarnings('ignore')
SIZE = (96, 48)
KINDS = ['safetensors', pytest.param('onnx', marks=onnx), 'pt2']

def random_crop(file, rng):
    "An image cut at its edges and resized, by chance"
    left,top = rng.randint(0, 5),rng.randint(0, 9)
    box = (left, top, 48-rng.randint(0, 5), 96-rng.randint(0, 9))
    size = (rng.randint(20, 150), rng.randint(40, 300))
    return Image.open(file).crop(box).resize(size, Image.Resampling.BILINEAR)

@pytest.fixture(scope='session')
def crops(tmp_path_factory):
    "500 crops of 500 sizes: 128 images of 16 people, each cropped four times. Files and person ids"
    folder,rng = tmp_path_factory.mktemp('crops'),random.Random(0)
    people = synth_persons(path=folder/'drawn', n_train=2, n_test=16, size=SIZE)
    drawn = [file for split in ('query', 'bounding_box_test') for file in sorted((people/split).glob('*.jpg'))]
    files,pids = [],[]
    for i in range(500):
        source = drawn[i%len(drawn)]
        files.append(folder/f'{i:03d}.{"png" if i%3 else "jpg"}')
        random_crop(source, rng).save(files[-1])
        pids.append(int(source.name[:4]))
    return files,np.array(pids)

@pytest.fixture(scope='session')
def learn(make_dls, make_learner):
    "A network with all 21 branches, trained a little"
    set_seed(0)
    learn = make_learner(make_dls(size=SIZE), n_parts=6, emb_sz=16)
    learn.fit(2)
    return learn

def program(file):
    "Of an exported program: a function of files and batch size"
    net = torch.export.load(file).module()
    def embed_batch(files): return net(torch.from_numpy(load_pixels(files, SIZE))).numpy()
    def run(files, bs=32): return np.concatenate([embed_batch(files[i:i+bs]) for i in range(0, len(files), bs)])
    return run

@pytest.fixture(scope='session')
def exported(learn, tmp_path_factory):
    "By kind: the file or folder, and a function of files and batch size"
    folder = tmp_path_factory.mktemp('exported')
    shared,pt2 = learn.save_model(folder/'shared'),learn.to_exported(folder/'m.pt2')
    made = dict(safetensors=(shared, load_embedder(shared).embed), pt2=(pt2, program(pt2)))
    if HAS_ONNX:
        file = learn.to_onnx(folder/'m.onnx')
        made['onnx'] = (file, Runtime(file, threads=1).embed)
    return made

@pytest.fixture(scope='session')
def truth(learn, crops): return learn.embed(learn.dls.test_dl(crops[0], bs=50)).numpy()

# the same embeddings

def rank_alike(ours, theirs, n_query=100):
    """Do two sets of embeddings rank alike? The order that the second gives must be a descending order of the first's
    similarities too. Images whose similarities are closer than rounding (2e-6) may come in either order. Also returns
    the fraction of queries whose order is identical"""
    sims = [embs[:n_query].astype(float) @ embs.astype(float).T for embs in (ours, theirs)]
    orders = [np.argsort(-s, axis=1, kind='stable') for s in sims]
    steps = np.diff(np.take_along_axis(sims[0], orders[1], 1), axis=1)
    return steps.max()<=2e-6, (orders[0]==orders[1]).all(1).mean()

@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_agrees_with_the_learner_on_500_crops(exported, truth, crops, kind):
    files,pids = crops
    emb = exported[kind][1](files)
    assert emb.shape==truth.shape==(500,21*16) and emb.dtype==np.float32
    assert abs(emb-truth).max()<=1e-4
    assert np.allclose(np.linalg.norm(emb, axis=1), 1, atol=1e-5)
    ok,same = rank_alike(truth, emb)
    assert ok and same>.1
    def card(embs): return evaluate(torch.tensor(embs[:100]), torch.tensor(embs[100:]), pids[:100], pids[100:])
    expected,found = card(truth),card(emb)
    assert expected.mAP==pytest.approx(found.mAP, abs=1e-4)
    assert torch.allclose(expected.cmc, found.cmc, atol=.011)
    assert .1<expected.mAP<.99, 'these embeddings must say something'

def test_rank_alike_sees_a_difference(truth):
    noisy = truth+1e-3*np.random.default_rng(0).standard_normal(truth.shape)
    assert not rank_alike(truth, noisy)[0]
    assert rank_alike(truth, truth)==(True, 1)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bs', [1,7,500])
def test_any_batch_size(exported, truth, crops, kind, bs):
    n = 500 if bs==500 else 15
    assert abs(exported[kind][1](crops[0][:n], bs=bs)-truth[:n]).max()<=1e-4

@pytest.mark.parametrize('kind', KINDS)
def test_agrees_on_real_crops(exported, learn, kind):
    "500 of Market-1501, evenly from the queries"
    data = os.environ.get('PYRAMIDREID_DATA')
    folder = Path(data or '')/'Market-1501-v15.09.15'/'query'
    if not data or not folder.exists(): pytest.skip('no Market-1501 in PYRAMIDREID_DATA')
    files = sorted(folder.glob('*.jpg'))
    files = files[::len(files)//500][:500]
    truth = learn.embed(learn.dls.test_dl(files, bs=50)).numpy()
    emb = exported[kind][1](files)
    ok,same = rank_alike(truth, emb)
    print(f'{kind}: largest difference {abs(truth-emb).max():.1e}, identical order for {same:.0%} of 100 queries')
    assert abs(truth-emb).max()<=1e-4
    assert ok

@pytest.mark.slow
@onnx
@pytest.mark.parametrize('kwargs', [
    dict(norm='whole', levels=[1], n_parts=2), dict(norm=None, arch=resnet18, n_parts=1, emb_sz=7),
    dict(last_stride=2, levels=[1,3])])
def test_every_kind_of_model(make_dls, make_learner, crops, tmp_path, kwargs):
    learn,files = make_learner(make_dls(size=SIZE), **kwargs),crops[0][:9]
    truth = learn.embed(learn.dls.test_dl(files)).numpy()
    for model in (load_embedder(learn.save_model(tmp_path/'m')), Runtime(learn.to_onnx(tmp_path/'m.onnx'))):
        assert model.fingerprint==learner_fingerprint(learn)
        assert model.emb_sz==truth.shape[1]
        assert abs(model.embed(files)-truth).max()<=1e-4*max(1, abs(truth).max())

def test_without_normalisation(make_dls, make_learner, crops, tmp_path):
    learn = make_learner(make_dls(size=SIZE), normalize=False)
    model = load_embedder(learn.save_model(tmp_path))
    truth = learn.embed(learn.dls.test_dl(crops[0][:9])).numpy()
    assert model.about['mean'] is None
    assert abs(model.embed(crops[0][:9])-truth).max()<=1e-4

@onnx
def test_timm_models(make_dls, make_learner, crops, tmp_path):
    learn = make_learner(make_dls(size=SIZE), arch='resnet10t')
    truth = learn.embed(learn.dls.test_dl(crops[0][:9])).numpy()
    model = load_embedder(learn.save_model(tmp_path/'m'))
    assert model.about['arch_from']=='timm'
    assert abs(model.embed(crops[0][:9])-truth).max()<=1e-4
    assert abs(Runtime(learn.to_onnx(tmp_path/'m.onnx')).embed(crops[0][:9])-truth).max()<=1e-4

def test_where_a_backbone_is_found():
    assert [arch_source(o) for o in ('resnet50', 'resnet50.a1_in1k', 'hf-hub:ann/net', resnet10)]==[
        'timm', 'timm', 'own', 'pyramidreid']

def test_a_timm_name_that_would_download_is_refused(exported, tmp_path):
    for name in ('hf_hub:someone/resnet', 'hf-hub:someone/resnet', f'local-dir:{tmp_path}', '../resnet50'):
        folder = copied(exported, tmp_path/name.replace('/', '_'), arch=name, arch_from='timm')
        with pytest.raises((ValueError, ImportError), match='not known here|timm'): load_embedder(folder)

@pytest.mark.parametrize('mode', ['L','RGBA','P','CMYK','1','LA'])
def test_pixels_are_the_learners_for_all_modes(learn, crops, tmp_path, mode):
    file = tmp_path/('a.jpg' if mode=='CMYK' else 'a.png')
    Image.open(crops[0][1]).convert(mode).save(file)
    theirs = learn.dls.test_dl([file], num_workers=0).one_batch()[0]
    ours = PixelNet(learn.model, input_stats(learn)).normalise(torch.from_numpy(load_pixels([file], SIZE)))
    for p in learn.model.parameters(): p.requires_grad_(True)
    assert (ours-theirs).abs().max()<1e-5

# one fingerprint

def test_all_files_of_a_model_have_its_fingerprint(exported, learn):
    own,extra = learner_fingerprint(learn),{'pyramidreid.json': ''}
    torch.export.load(exported['pt2'][0], extra_files=extra)
    assert own==load_embedder(exported['safetensors'][0]).fingerprint
    assert own==json.loads(extra['pyramidreid.json'])['fingerprint']
    if 'onnx' in exported: assert own==Runtime(exported['onnx'][0]).fingerprint

def test_another_model_has_another(make_learner, make_dls, learn, tmp_path):
    other = make_learner(make_dls(size=SIZE), n_parts=6, emb_sz=16)
    assert load_embedder(other.save_model(tmp_path)).fingerprint!=learner_fingerprint(learn)

@onnx
def test_a_gallery_takes_every_file_of_one_model_and_no_other(exported, make_learner, make_dls, learn, crops, tmp_path):
    "Filled by the learner, asked by the others"
    pytest.importorskip('pyarrow', reason='the gallery extra is not installed')
    from pyramidreid.gallery.gallery import Gallery
    files,folder = crops[0][:20],tmp_path/'gallery'
    Gallery.from_learner(learn, files).save(folder)
    models = (learn, load_embedder(exported['safetensors'][0]), Runtime(exported['onnx'][0]))
    keys = [Gallery.load(folder, model).search(files[3], k=5).key.tolist() for model in models]
    assert keys[0]==keys[1]==keys[2]
    assert str(files[3]) in str(keys[0][0])
    other = make_learner(make_dls(size=SIZE), n_parts=6, emb_sz=16)
    for model in (load_embedder(other.save_model(tmp_path/'other')), Runtime(other.to_onnx(tmp_path/'other.onnx'))):
        with pytest.raises(ValueError, match="[Aa]nother model"): Gallery.load(folder, model)

class Wrapped(torch.nn.Module):
    "As `DistributedDataParallel` holds a model"
    def __init__(self, module):
        super().__init__()
        self.module = module
    def forward(self, x): return self.module(x)

WRAPPERS = {
    'DataParallel': torch.nn.DataParallel, 'DDP': Wrapped, 'average': torch.optim.swa_utils.AveragedModel,
    'compiled': lambda model: torch.compile(Wrapped(model), backend='eager'),
    'SyncBatchNorm': torch.nn.SyncBatchNorm.convert_sync_batchnorm}

@pytest.mark.slow
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_the_same_model(make_learner, make_dls, crops, tmp_path, wrap):
    learn = make_learner(make_dls(size=SIZE))
    own = learner_fingerprint(learn)
    truth = learn.embed(learn.dls.test_dl(crops[0][:5])).numpy()
    learn.save_model(tmp_path/'plain')
    learn.model = wrap(copy.deepcopy(learn.model))
    shared = load_embedder(learn.save_model(tmp_path/'m'))
    learn.to_exported(tmp_path/'m.pt2')
    assert own==learner_fingerprint(learn)==shared.fingerprint
    assert abs(shared.embed(crops[0][:5])-truth).max()<=1e-5
    assert learner_fingerprint(learn.load_weights(tmp_path/'plain'))==own

def test_the_fingerprint_is_of_every_weight_and_of_nothing_else(make_learner, make_dls):
    "Each tensor of the state changed at its end, one after another"
    model = make_learner(make_dls(size=SIZE)).model.eval()
    mean,std = stats = ([.485,.456,.406], [.229,.224,.225])
    own = fingerprint(model, SIZE, stats)
    for name,tensor in model.state_dict().items():
        last = tensor.reshape(-1)[-1:] if tensor.dim() else tensor
        old = last.clone()
        last += 1
        assert (fingerprint(model, SIZE, stats)==own)==('classify' in name or 'num_batches' in name), name
        last.copy_(old)
    assert fingerprint(model.train(), SIZE, stats)==own
    assert fingerprint(model, list(SIZE), torch.tensor(stats, dtype=torch.float64))==own
    for p in model.parameters(): p.requires_grad_(False)
    model.head.drop.p = .9
    assert fingerprint(model.double(), torch.Size(SIZE), stats)==own
    others = [((48,96), stats), (SIZE, None), (SIZE, ([.485,.456,.407], std)), (SIZE, ([0.]*3, [1.]*3))]
    for size,other in others: assert fingerprint(model, size, other)!=own

def test_the_fingerprint_is_of_what_has_no_weights(make_learner, make_dls):
    model = make_learner(make_dls(size=SIZE)).model
    conv,bn,pool = model.body[0],model.body[1],model.body[3]
    own = fingerprint(model, SIZE)
    changes = [
        (conv, 'padding_mode', 'reflect'), (conv, 'stride', (1,1)),
        (bn, 'eps', 1e-3), (bn, 'track_running_stats', False),
        (pool, 'ceil_mode', True), (model, 'norm', None), (model.head, 'windows', [(0,1)]*6)]
    for module,name,value in changes:
        old = getattr(module, name)
        setattr(module, name, value)
        assert fingerprint(model, SIZE)!=own, name
        setattr(module, name, old)
    model.body[2] = torch.nn.LeakyReLU()
    assert fingerprint(model, SIZE)!=own

def test_the_fingerprint_is_of_timms_batch_norms(make_learner, make_dls):
    "They have parts, and weights of their own"
    model = make_learner(make_dls(size=SIZE), arch='tf_efficientnet_lite0').model
    own = fingerprint(model, SIZE)
    next(m for m in model.modules() if type(m).__name__=='BatchNormAct2d').eps = .1
    assert fingerprint(model, SIZE)!=own

@pytest.mark.slow
def test_another_process_finds_the_same_fingerprint(exported):
    folder = exported['safetensors'][0]
    code = f"""
from pyramidreid.export.model_files import load_embedder
from pyramidreid.models.fingerprints import fingerprint
model = load_embedder({str(folder)!r})
print(fingerprint(model.model, model.size, model.stats))
"""
    env = {**os.environ, 'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': '1'}
    res = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True, env=env)
    assert res.stdout.strip()==load_embedder(folder).fingerprint, res.stderr

@pytest.mark.slow
def test_an_exported_program_needs_pytorch_alone(exported, truth, crops, tmp_path):
    "In a process that can import neither this library nor fastai, torchvision or timm"
    np.save(tmp_path/'x.npy', load_pixels(crops[0][:3], SIZE))
    code = f"""
import sys
class Forbid:
    names = ('pyramidreid','fastai','fastcore','torchvision','timm')
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in self.names: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Forbid())
import numpy as np, torch
net = torch.export.load({str(exported['pt2'][0])!r}).module()
np.save({str(tmp_path/'y.npy')!r}, net(torch.from_numpy(np.load({str(tmp_path/'x.npy')!r}))).numpy())
"""
    res = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    assert abs(np.load(tmp_path/'y.npy')-truth[:3]).max()<=1e-5

def test_a_batch_of_none(exported, learn):
    nobody = load_pixels([], SIZE)
    assert nobody.shape==(0,*SIZE,3) and nobody.dtype==np.uint8
    models = [load_embedder(exported['safetensors'][0])]
    if 'onnx' in exported: models.append(Runtime(exported['onnx'][0]))
    for model in models: assert model.run(nobody).shape==model.embed([]).shape==(0,21*16)

# what is and is not in the files

@onnx
def test_no_person_and_no_path_is_in_the_files(exported, learn):
    files = [exported['onnx'][0],exported['pt2'][0],*exported['safetensors'][0].iterdir()]
    private = ['site-packages', str(Path.cwd()), str(Path(__file__).parents[1]), str(learn.path)]
    for file in files:
        data = file.read_bytes()
        assert [text for text in private if text.encode() in data]==[], file
    about = read_description(exported['safetensors'][0])
    assert about['n_ids']==12
    assert not {'pids', 'cams'} & set(about)
    from safetensors import safe_open
    with safe_open(exported['safetensors'][0]/about['weights'], 'pt') as file: names = list(file.keys())
    assert names and not [name for name in names if 'classify' in name]

def test_the_history_is_in_every_file(exported, learn):
    history = learn.model.history
    assert [stage['data'] for stage in history['stages']]==['people'] and history['stages'][0]['epochs']==2
    extra = {'pyramidreid.json':''}
    torch.export.load(exported['pt2'][0], extra_files=extra)
    assert json.loads(extra['pyramidreid.json'])['history']==history
    assert read_description(exported['safetensors'][0])['history']==history
    if 'onnx' in exported: assert Runtime(exported['onnx'][0]).about['history']==history

def test_the_card_goes_along(learn, tmp_path):
    card = learn.evaluate()
    about = load_embedder(learn.save_model(tmp_path, card=card)).about
    assert about['card']['mAP (mean of precisions)']==card.mAP and about['card']['distance']=='cosine'

def random_states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

def test_exporting_leaves_the_learner_and_random_numbers_alone(make_learner, make_dls, tmp_path):
    learn = make_learner(make_dls(size=SIZE))
    learn.model.train()
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    states = random_states()
    learn.save_model(tmp_path/'m')
    learn.to_exported(tmp_path/'m.pt2')
    assert learn.model.training and all(p.requires_grad for p in learn.model.parameters())
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert random_states()==states

# pictures with more than 8 bits

@pytest.fixture(scope='module')
def thermal(people, make_learner, tmp_path_factory):
    "A learner of thermal pictures, and its files"
    folder = thermal_copy(people, tmp_path_factory.mktemp('thermal'))
    dls = ReIDDataLoaders.from_market(folder, p=4, k=4, size=(48,24), num_workers=0, pixel_range=THERMAL_RANGE)
    learn = make_learner(dls)
    learn.fit(1)
    return learn,dls.valid.items.fn.tolist()[:12]

@pytest.mark.parametrize('kind', KINDS[:2])
def test_every_file_keeps_the_range(thermal, tmp_path, kind):
    "The embeddings are those of plainly scaled pictures, whoever computes them"
    pytest.importorskip('pyarrow', reason='needs the extra gallery')
    from pyramidreid.gallery.gallery import Gallery
    learn,files = thermal
    if kind=='onnx': model = Runtime(learn.to_onnx(tmp_path/'m.onnx'))
    else: model = load_embedder(learn.save_model(tmp_path/'m'))
    assert model.pixel_range==learn.dls.pixel_range==THERMAL_RANGE
    assert model.fingerprint==learner_fingerprint(learn)
    expected = learn.embed([scaled_to_rgb(file, *THERMAL_RANGE) for file in files]).numpy()
    assert len(np.unique(expected.round(4), axis=0))>6
    for found in (learn.embed(files), model.embed(files), model.embed([np.asarray(Image.open(o)) for o in files])):
        assert np.allclose(found, expected, atol=1e-5)
    gallery = Gallery.from_learner(learn, files[4:])
    gallery.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', model)
    assert again.search(files[5], 1).key[0]==str(files[5])

def test_another_range_is_another_model(thermal, tmp_path):
    pytest.importorskip('pyarrow', reason='needs the extra gallery')
    from pyramidreid.gallery.gallery import Gallery
    learn,files = thermal
    own = learner_fingerprint(learn)
    gallery,dls = Gallery.from_learner(learn, files),learn.dls
    learn.dls = ReIDDataLoaders.from_market(dls.path, p=4, k=4, size=(48,24), num_workers=0, pixel_range=(0,16383))
    try:
        assert learner_fingerprint(learn)!=own
        with pytest.raises(ValueError, match="Another model's embedding"): gallery.search(files[0], 1)
    finally: learn.dls = dls
    assert learner_fingerprint(learn)==own

@pytest.mark.parametrize('pixel_range', [None, (0,16383)])
def test_weights_for_another_range_are_refused(thermal, make_dls, make_learner, tmp_path, pixel_range):
    "And those that fit are taken"
    learn,_ = thermal
    folder = learn.save_model(tmp_path/'m')
    def loaders(pixel_range): return ReIDDataLoaders.from_market(
        learn.dls.path, p=4, k=4, size=(48,24), num_workers=0, pixel_range=pixel_range)
    dls = make_dls(size=(48,24)) if pixel_range is None else loaders(pixel_range)
    for load in (lambda: make_learner(dls).load_weights(folder), lambda: learner_from(folder, dls)):
        with pytest.raises(ValueError, match='pixel_range=.*make them with the model.s pixel_range'): load()
    assert learner_from(folder, loaders(THERMAL_RANGE)).dls.pixel_range==THERMAL_RANGE

def test_the_range_goes_with_an_exported_learner(thermal, tmp_path):
    learn,files = thermal
    expected = learn.embed(files)
    learn.export(tmp_path/'learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    assert again.dls.pixel_range==THERMAL_RANGE
    torch.testing.assert_close(again.embed(files), expected)
    with pytest.raises(ValueError, match='image 1 has no pixels'): again.predict([files[0], np.zeros((0,9), np.uint16)])

def test_a_file_of_8_bit_pictures_is_as_it_was(exported):
    "An older library reads it, and the fingerprint is the old one"
    about = json.loads((exported['safetensors'][0]/'model.json').read_text())
    assert 'pixel_range' not in about and load_embedder(exported['safetensors'][0]).pixel_range is None

@pytest.mark.parametrize('pixel_range', [[5,2], [1], ['0','1'], [True,2], 7])
def test_a_wrong_range_in_a_file_is_refused(exported, tmp_path, pixel_range):
    with pytest.raises(ValueError, match="'pixel_range' is"):
        load_embedder(copied(exported, tmp_path/'m', pixel_range=pixel_range))

def test_a_changed_range_in_a_file_is_noticed(exported, tmp_path):
    with pytest.raises(ValueError, match='changed or damaged'):
        load_embedder(copied(exported, tmp_path/'m', pixel_range=[0,16383]))

# faults

def copied(exported, folder, **kwargs):
    "A copy of the saved model with entries of model.json changed, or removed where they are `...`"
    shutil.copytree(exported['safetensors'][0], folder)
    about = {**json.loads((folder/'model.json').read_text()), **kwargs}
    (folder/'model.json').write_text(json.dumps({k:v for k,v in about.items() if v is not ...}))
    return folder

CHANGED = [
    (dict(code='import os'), "'code' is not known"),
    (dict(norm=...), "'norm' is missing"),
    (dict(n_parts='6'), "'n_parts' is '6'"),
    (dict(n_parts=True), "'n_parts' is True"),
    (dict(n_parts=10**9), "'n_parts' is"),
    (dict(n_parts='9'*10**6), "'n_parts' is '9"),
    (dict(size=[96]), "'size' is"),
    (dict(size=[10**6,10**6]), "'size' is"),
    (dict(size=[8192,8192]), "'size' is"),
    (dict(n_parts=96, levels=list(range(1,97)), emb_sz=16384), "'emb_sz' is 16384"),
    (dict(std=[1,1,1e-300]), "'std' is"),
    (dict(std=[1,1,0]), "'std' is"),
    (dict(std=[1,1,10**400]), "'std' is"),
    (dict(mean=None), "'std' is"),
    (dict(resize='nearest'), "'resize' is"),
    (dict(arch='__builtins__', arch_from='torchvision'), 'not known here'),
    (dict(arch='fasterrcnn_resnet50_fpn', arch_from='torchvision'), 'not known here'),
    (dict(arch='system', arch_from='os'), 'not known here'),
    (dict(arch='resnet18', arch_from='torchvision'), 'is missing'),
    (dict(format=FORMAT+1), 'later version'),
    (dict(format=1), "'history' is not known"),
    (dict(history=...), "'history' is missing"),
    (dict(history={}), "'history' is {}"),
    (dict(history=dict(start=None, recorded=True, stages=[dict(data='x', identities=-1, epochs=1, steps=1)])),
     "'history' is"),
    (dict(format=...), 'does not describe a model'),
    (dict(format=0), 'does not describe'),
    (dict(format=True), 'does not describe'),
    (dict(levels=[1,9]), "'levels' is"),
    (dict(levels=[2,1]), "'levels' is"),
    (dict(levels=[]), "'levels' is"),
    (dict(levels=[1]), 'does not fit'),
    (dict(emb_sz=8), 'does not fit'),
    (dict(last_stride=2), 'changed or damaged'),
    (dict(norm='whole'), 'changed or damaged'),
    (dict(mean=[0,0,0]), 'changed or damaged'),
    (dict(size=[192,96]), 'changed or damaged'),
    (dict(mean=[float('nan')]*3), 'NaN is not valid in JSON'),
    (dict(card=dict(mAP=float('inf'))), 'Infinity is not valid in JSON'),
    (dict(fingerprint='abc'), "'fingerprint' is"),
    (dict(data=7), "'data' is 7"),
    (dict(weights='/etc/passwd'), "'weights' is"),
    (dict(weights=None), "'weights' is None"),
    (dict(weights='model-000000000000.safetensors'), 'no weight file')]

@pytest.mark.parametrize('change,words', CHANGED)
def test_a_changed_description_is_refused(exported, tmp_path, change, words):
    folder = copied(exported, tmp_path/'m', **change)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e: load_embedder(folder)
    assert len(str(e.value))<1000

def test_a_description_cannot_fill_the_memory(exported, tmp_path, monkeypatch):
    "A head of 600 GB is refused before it is built, and text that is nested without end when it is read"
    from pyramidreid.export import model_files as export
    folder = copied(exported, tmp_path/'m', n_parts=96, levels=list(range(1,97)), emb_sz=225)
    monkeypatch.setattr(export, '_build_model', lambda about: pytest.fail('it was built'))
    words = r'head.reduce.weight is \(21, 512, 16\), not \(4656, channels of the backbone, 225\)'
    with pytest.raises(ValueError, match=words): load_embedder(folder)
    (folder/'model.json').write_text('['*100_000)
    with pytest.raises(ValueError, match='not valid JSON'): load_embedder(folder)
    with open(folder/'model.json', 'ab') as f: f.truncate(10**12) # a file with a hole
    with pytest.raises(ValueError, match='1,000,000,000,000 bytes'): load_embedder(folder)

def devices_of_models(monkeypatch):
    "A list to which the devices of each model are added that a description leads to"
    from pyramidreid.export import model_files as export
    devices,build = [],export._build_model
    def watched(*args):
        model = build(*args)
        devices.append({tensor.device.type for tensor in model.state_dict().values()})
        return model
    monkeypatch.setattr(export, '_build_model', watched)
    return devices

def test_another_backbone_is_refused_without_memory_for_it(exported, tmp_path, monkeypatch):
    "Names and shapes in the header are enough to see that the weights are of another model"
    devices = devices_of_models(monkeypatch)
    folder = copied(exported, tmp_path/'m', arch='wide_resnet101_2', arch_from='torchvision')
    with pytest.raises(ValueError, match='does not fit the model that model.json describes, in [0-9]+ weights'):
        load_embedder(folder)
    assert devices==[{'meta'}]

def test_a_header_without_channels_is_refused_without_memory(exported, tmp_path, monkeypatch):
    "The head of this file has the right number of branches and dimensions, and no channels: 0 bytes"
    from safetensors.torch import load_file, save_file
    devices = devices_of_models(monkeypatch)
    folder = copied(exported, tmp_path/'m', n_parts=96, levels=list(range(1,97)), emb_sz=225)
    file, = folder.glob('*.safetensors')
    save_file({**load_file(file), 'head.reduce.weight':torch.zeros(4656, 0, 225)}, file)
    with pytest.raises(ValueError, match=r'head.reduce.weight is .*\(4656, 0, 225\), not'): load_embedder(folder)
    assert devices==[{'meta'}]

def test_models_of_other_threads_have_memory():
    "While one thread makes a model without memory, another makes a usual one"
    from concurrent.futures import ThreadPoolExecutor

    from pyramidreid.export.model_files import _without_memory
    with ThreadPoolExecutor(1) as pool, _without_memory():
        assert nn.BatchNorm2d(2).running_mean.device.type=='meta'
        assert pool.submit(nn.BatchNorm2d, 2).result().running_mean.tolist()==[0,0]
    assert nn.BatchNorm2d(2).weight.tolist()==[1,1]

def test_weights_that_are_no_numbers_are_refused(exported, make_learner, make_dls, tmp_path):
    "In a file whose fingerprint is right, and from a learner; one that diverged may load a shared model's again"
    from safetensors.torch import load_file, save_file

    from pyramidreid.export.model_files import _build_model
    folder = copied(exported, tmp_path/'m')
    file,about = next(folder.glob('*.safetensors')),json.loads((folder/'model.json').read_text())
    sd = load_file(file)
    sd['body.1.running_var'][3] = float('nan')
    save_file(sd, file)
    (model := _build_model(about)).load_state_dict(sd, strict=False)
    about['fingerprint'] = fingerprint(model, about['size'], [about['mean'],about['std']])
    (folder/'model.json').write_text(json.dumps(about))
    with pytest.raises(ValueError, match='not numbers, in body.1.running_var'): load_embedder(folder)
    learn = make_learner(make_dls(size=SIZE), n_parts=6, emb_sz=16)
    with torch.no_grad(): learn.model.head.bn.weight[0] = float('inf')
    for call,o in ((learn.save_model,'n'), (learn.to_exported,'n.pt2'), (learn.to_onnx,'n.onnx')):
        with pytest.raises(ValueError, match='in head.bn.weight: its training diverged'): call(tmp_path/'new'/o)
    assert not (tmp_path/'new').exists()
    learn.load_weights(exported['safetensors'][0]).save_model(tmp_path/'new')

def test_a_card_that_is_no_json_leaves_nothing(learn, tmp_path):
    card = SimpleNamespace(metrics=lambda: dict(mAP=float('nan')), words=lambda: {})
    for call,o in ((learn.save_model,'m'), (learn.to_exported,'m.pt2'), (learn.to_onnx,'m.onnx')):
        with pytest.raises(ValueError, match='a metric of its card is not a number'): call(tmp_path/'new'/o, card=card)
        with pytest.raises(TypeError, match='card is a str: give the protocol card'):
            call(tmp_path/'new'/o, card='good')
    assert not [o for o in tmp_path.rglob('*') if o.is_file()]

def test_names_that_cannot_be_written(learn, tmp_path):
    with pytest.raises(ValueError, match='ends in .pt2'): learn.to_exported(tmp_path/'m')
    (tmp_path/'file').touch()
    with pytest.raises(NotADirectoryError, match='file is a file: give a folder'): learn.save_model(tmp_path/'file')
    assert [o.name for o in tmp_path.iterdir()]==['file']

def test_damaged_files_are_refused(exported, tmp_path):
    folder = copied(exported, tmp_path/'m')
    weights,about = next(folder.glob('*.safetensors')),folder/'model.json'
    data,text = weights.read_bytes(),about.read_bytes()
    flipped = bytearray(data)
    flipped[len(data)//2] ^= 1
    for damaged in (data[:len(data)//2], data[:-1], b'', b'\x80\x04.'*100):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match='cut off'): load_embedder(folder)
    weights.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match='changed or damaged'): load_embedder(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=weights.name): load_embedder(folder)
    weights.write_bytes(data)
    cases = {text[:100]: 'cut off', b'': 'cut off', b'[1]': 'does not describe', b'\xff\xfe': 'not valid JSON'}
    for damaged,words in cases.items():
        about.write_bytes(damaged)
        with pytest.raises(ValueError, match=words): load_embedder(folder)
    with pytest.raises(FileNotFoundError, match='no model.json'): load_embedder(tmp_path)

def test_loading_runs_no_code(exported, tmp_path):
    "Weights that are a pickle in disguise are not unpickled"
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    folder = copied(exported, tmp_path/'m')
    torch.save({'a':Evil()}, next(folder.glob('*.safetensors')))
    with pytest.raises(ValueError, match='no safetensors'): load_embedder(folder)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('at', range(4))
def test_a_crash_leaves_the_old_model_whole(make_learner, make_dls, crops, tmp_path, monkeypatch, at):
    "The process dies at the n-th file operation of the second save"
    from pyramidreid import core
    from pyramidreid.export import model_files as export
    old,new = make_learner(make_dls(size=SIZE)),make_learner(make_dls(size=SIZE), emb_sz=4)
    old.save_model(tmp_path)
    was,n = load_embedder(tmp_path).embed(crops[0][:3]),[0]
    def dies(call):
        def f(*args, **kwargs):
            n[0] += 1
            if n[0]==at+1: raise KeyboardInterrupt
            return call(*args, **kwargs)
        return f
    with monkeypatch.context() as m:
        m.setattr(core.os, 'replace', dies(os.replace))
        m.setattr(export, 'save_file', dies(export.save_file))
        m.setattr(Path, 'unlink', dies(Path.unlink))
        try: new.save_model(tmp_path)
        except KeyboardInterrupt: pass
    now = load_embedder(tmp_path).embed(crops[0][:3])
    assert now.shape[1] in (6*8,6*4) and (now.shape!=was.shape or np.array_equal(now, was))
    new.save_model(tmp_path)
    assert load_embedder(tmp_path).emb_sz==6*4 and len(list(tmp_path.glob('*.safetensors')))==1

@pytest.mark.parametrize('kind', ['save_model','to_exported',pytest.param('to_onnx', marks=onnx)])
def test_what_does_not_agree_is_not_written(learn, tmp_path, monkeypatch, kind):
    from pyramidreid.export import model_files as export
    def off(call): return lambda *args: call(*args)+1e-3
    monkeypatch.setattr(export.Embedder, 'run', off(export.Embedder.run))
    monkeypatch.setattr(export.Runtime, 'run', off(export.Runtime.run))
    load = torch.export.load
    def load_off(file):
        program = load(file)
        return SimpleNamespace(module=lambda: off(program.module()))
    monkeypatch.setattr(torch.export, 'load', load_off)
    write = getattr(learn, kind)
    with pytest.raises(RuntimeError, match="embeddings that differ from the learner's"): write(tmp_path/'sub'/'m.pt2')
    assert not [o for o in tmp_path.rglob('*') if o.is_file()]

def test_transforms_that_no_file_would_do_are_refused(people, tmp_path):
    from fastai.vision.all import Resize, ResizeMethod
    for item in (Resize(SIZE), Resize(SIZE, method=ResizeMethod.Squish)): # a crop, and PIL's bilinear filter
        dls = ReIDDataLoaders.from_market(people, p=4, k=4, size=SIZE, num_workers=0, item_tfms=item)
        learn = quiet(pyramid_learner(dls, resnet10, pretrained=False, n_parts=3, emb_sz=8, path=tmp_path))
        with pytest.raises(ValueError, match='does more to an image'): learn.save_model(tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_from_a_cache_it_is_the_same_model(people, tmp_path, crops):
    dls = ReIDDataLoaders.from_market(people, p=4, k=4, size=SIZE, cache=True)
    learn = quiet(pyramid_learner(dls, resnet10, pretrained=False, n_parts=3, emb_sz=8, path=tmp_path))
    found = load_embedder(learn.save_model(tmp_path/'m')).embed(crops[0][:5])
    assert abs(found-learn.embed(dls.test_dl(crops[0][:5])).numpy()).max()<=1e-4

def test_a_backbone_that_is_not_what_its_name_says_cannot_be_shared(make_dls, make_learner, tmp_path):
    learn = make_learner(make_dls(size=SIZE))
    learn.arch_name,learn.arch_from = 'resnet_mine','torchvision'
    with pytest.raises(ValueError, match="'resnet_mine' of 'torchvision' is not known here"):
        learn.save_model(tmp_path/'m')
    learn = make_learner(make_dls(size=SIZE))
    learn.model.body[4][0].conv1.dilation,learn.model.body[4][0].conv1.padding = (2,2),(2,2)
    with pytest.raises(ValueError, match='changed by hand'): learn.save_model(tmp_path/'m')
    assert not list((tmp_path/'m').iterdir())

# a backbone of one's own

def instance_net(pretrained=False):
    "A ResNet with another normalisation, as in ResNet-IBN"
    return ResNet(BasicBlock, [1,2,1,1], norm_layer=nn.InstanceNorm2d)

def plain_net(): return ResNet(BasicBlock, [1,1,1,1])

@pytest.fixture(scope='session')
def own(make_dls, make_learner, tmp_path_factory):
    "A learner with a backbone of its own, and its folder"
    learn = make_learner(make_dls(size=SIZE), arch=instance_net)
    learn.fit(1)
    return learn,learn.save_model(tmp_path_factory.mktemp('own')/'shared')

@pytest.mark.parametrize('kind', KINDS)
def test_a_backbone_of_ones_own(own, crops, tmp_path, kind):
    learn,folder = own
    files = crops[0][:6]
    truth = learn.embed(learn.dls.test_dl(files)).numpy()
    if kind=='safetensors': embed = load_embedder(folder, arch=instance_net).embed
    elif kind=='onnx': embed = Runtime(learn.to_onnx(tmp_path/'m.onnx'), threads=1).embed
    else: embed = program(learn.to_exported(tmp_path/'m.pt2'))
    assert abs(embed(files)-truth).max()<=1e-4

def test_a_backbone_of_ones_own_is_asked_for(own, make_dls):
    about = read_description(own[1])
    assert (about['arch'],about['arch_from'])==('instance_net','own')
    words = "'instance_net' is in no library.*load_embedder\(folder, arch=…\)"
    for call in (load_embedder, lambda folder: learner_from(folder, make_dls(size=SIZE))):
        with pytest.raises(ValueError, match=words): call(own[1])

def test_the_weights_of_a_backbone_of_ones_own_are_checked(own, exported):
    "Other layers, and layers of the same shapes that compute something else"
    with pytest.raises(ValueError, match='does not fit the model'): load_embedder(own[1], arch=plain_net)
    def shifted():
        net = instance_net()
        net.layer3[0].conv2.dilation = net.layer3[0].conv2.padding = (2,2)
        return net
    with pytest.raises(ValueError, match='does not have the fingerprint'): load_embedder(own[1], arch=shifted)
    with pytest.raises(ValueError, match='resnet10 of pyramidreid, which is known here: leave out arch'):
        load_embedder(exported['safetensors'][0], arch=resnet10)

def test_training_goes_on_from_a_backbone_of_ones_own(own, make_dls, make_learner, tmp_path):
    learn,folder = own
    more = quiet(learner_from(folder, make_dls(size=SIZE), arch=instance_net, path=tmp_path))
    assert learner_fingerprint(more)==learner_fingerprint(learn) and more.model.history==learn.model.history
    again = load_embedder(more.save_model(tmp_path/'again'), arch=instance_net)
    assert again.fingerprint==learner_fingerprint(learn)
    other = make_learner(make_dls(size=SIZE), arch=instance_net).load_weights(folder, arch=instance_net)
    assert learner_fingerprint(other)==learner_fingerprint(learn)

def test_a_function_without_arguments_is_a_backbone_too(make_dls, make_learner, tmp_path):
    "Of last stride 2, whose images must be higher"
    learn = make_learner(make_dls(size=SIZE), arch=plain_net, last_stride=2)
    assert load_embedder(learn.save_model(tmp_path/'m'), arch=plain_net).about['last_stride']==2
    with pytest.raises(ValueError, match='plain_net takes neither weights nor pretrained'):
        make_learner(make_dls(size=SIZE), arch=plain_net, pretrained=True)

def test_the_command_line_says_what_a_backbone_of_ones_own_needs(own):
    from pyramidreid.cli.inputs import open_model
    with pytest.raises(ValueError, match='in Python: load_embedder'): open_model(own[1], 'cpu')

def test_a_missing_extra_is_named(learn, tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'pyramidreid\[onnx\]'): learn.to_onnx(tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())

# to train on

def test_training_goes_on_from_a_shared_model(exported, learn, make_dls, crops, tmp_path):
    other = quiet(learner_from(exported['safetensors'][0], make_dls(size=SIZE, p=3, k=2), path=tmp_path, lr=1e-3))
    files = crops[0][:20]
    assert abs(other.embed(other.dls.test_dl(files))-learn.embed(learn.dls.test_dl(files))).max()<=1e-5
    other.fit(1)
    assert learner_fingerprint(other)!=learner_fingerprint(learn)

def test_weights_for_another_normalisation_are_refused(exported, make_dls, make_learner):
    own = make_learner(make_dls(size=SIZE, batch_tfms=[Normalize.from_stats([.5]*3, [.5]*3)]), n_parts=6, emb_sz=16)
    plain = make_learner(make_dls(size=SIZE), n_parts=6, emb_sz=16, normalize=False)
    for o in (own, plain):
        with pytest.raises(ValueError, match='normalised by'): o.load_weights(exported['safetensors'][0])

@pytest.mark.parametrize('kind', ['none', 'own'])
def test_a_learner_from_a_shared_model_normalises_as_it_did(make_dls, make_learner, crops, tmp_path, kind):
    own = [Normalize.from_stats([.5]*3, [.25]*3)]
    if kind=='none': old = make_learner(make_dls(size=SIZE), normalize=False)
    else: old = make_learner(make_dls(size=SIZE, batch_tfms=own))
    new = quiet(learner_from(old.save_model(tmp_path/'m'), make_dls(size=SIZE), path=tmp_path))
    assert learner_fingerprint(new)==learner_fingerprint(old)
    assert torch.allclose(*(o.embed(o.dls.test_dl(crops[0][:4])) for o in (old,new)), atol=1e-5)

def test_weights_for_other_branches_are_refused(make_dls, make_learner, tmp_path):
    "Three parts, or two parts and the whole: weights of the same shapes"
    folder = make_learner(make_dls(size=SIZE), n_parts=3, levels=[1]).save_model(tmp_path)
    other = make_learner(make_dls(size=SIZE), n_parts=2)
    words = r'n_parts=3, levels=\[1\], and this learner n_parts=2, levels=\[1, 2\]'
    with pytest.raises(ValueError, match=words): other.load_weights(folder)
