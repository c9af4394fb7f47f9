"Decoded once or every time: the same pixels, the same batches, the same figures; and what can be wrong with a file of images"
import errno
import io
import os
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, Flip, load_learner, set_seed
from PIL import Image
from safetensors.numpy import load_file

import pyramidreid.data.cache
from pyramidreid.data.cache import *
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import CachedDatasets, ReIDDataLoaders
from pyramidreid.data.sampler import PKDataLoader
from pyramidreid.data.transforms import *
from pyramidreid.training.checkpoints import Checkpoints


@pytest.fixture(scope='session')
def files(people): return sorted(people.rglob('*.jpg'))

@pytest.fixture
def own(files, tmp_path):
    "Six images of one's own, to spoil"
    (tmp_path/'own').mkdir()
    return [Path(shutil.copy2(f, tmp_path/'own')) for f in files[:6]]

def pixels(fn, size=None):
    im = Image.open(fn).convert('RGB')
    return torch.from_numpy(np.array(im if size is None else im.resize(size[::-1], Image.Resampling.BICUBIC))).permute(2,0,1)

def left(path): return sorted(o.name for o in path.iterdir())

# what is in it

@pytest.mark.parametrize('size,kept', [((96,48),(96,48)), ((384,128),(96,48)), (96,(96,48)), ((48,24),(48,24)), ((128,40),(128,40)), (32,(32,32))])
@pytest.mark.parametrize('on_disk', [False,True])
def test_every_image_as_pil_has_it(files, tmp_path, size, kept, on_disk):
    cache = ImageCache(files, size, tmp_path/'c' if on_disk else None)
    assert len(cache)==len(files) and cache.shape[2:]==list(kept) and cache.resized==(kept!=(96,48))
    x = cache[cache.find(files[::-7])]
    assert x.dtype==torch.uint8 and torch.equal(x, torch.stack([pixels(f, kept) for f in files[::-7]]))
    assert cache.serves(size) and cache.serves((384,128))==(kept==(96,48)) and not cache.serves((16,8))
    assert f'{kept[0]}×{kept[1]}' in repr(cache)

def test_images_of_several_sizes_are_resized(own):
    Image.open(own[3]).resize((20,50)).save(own[3])
    cache = ImageCache(own, (384,128))
    assert cache.shape==[6,3,384,128] and cache.resized
    assert torch.equal(cache[[3,0]], torch.stack([pixels(own[i], (384,128)) for i in (3,0)]))

def test_images_of_any_mode_become_rgb(own):
    for f,mode in zip(own, ('L','CMYK')): Image.open(f).convert(mode).save(f)
    cache = ImageCache(own)
    assert torch.equal(cache[:2], torch.stack([pixels(f) for f in own[:2]]))

def test_turned_images_are_kept_upright(own, make_dls):
    "The same as without a cache, and other images of the size they are stored in are not mistaken for them"
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = [pixels(f) for f in own]
    for f in own: Image.open(f).rotate(90, expand=True).save(f.with_suffix('.png'), exif=exif)
    turned = [f.with_suffix('.png') for f in own]
    for fns in (turned, [*turned[:3],*own[3:]], [*own[:3],*turned[3:]]):
        cache = ImageCache(fns, (96,48))
        assert torch.equal(cache[:6], torch.stack(upright)) and cache.resized

def test_a_file_named_twice_is_kept_once(own, monkeypatch):
    monkeypatch.chdir(own[0].parent)
    cache = ImageCache([*own, own[0], own[1].name, str(own[2])])
    assert len(cache)==6 and cache.find([own[1].name,own[0]]).tolist()==[1,0]

def test_others_can_read_the_file(own, tmp_path):
    cache = ImageCache(own, file=tmp_path/'c.safetensors')
    held = load_file(tmp_path/'c.safetensors')
    assert list(held)==['images'] and np.array_equal(held['images'], cache.images)

def test_many_chunks_keep_the_order(files):
    assert torch.equal(torch.from_numpy(np.concatenate(list(decoded(files[:23], (96,48), n=5)))), torch.stack([pixels(f) for f in files[:23]]))

@pytest.mark.parametrize('on_disk', [False,True])
def test_pickled(own, tmp_path, on_disk):
    cache = ImageCache(own, file=tmp_path/'c' if on_disk else None)
    data = pickle.dumps(cache)
    assert torch.equal(pickle.loads(data)[[2,1]], cache[[2,1]]) and (len(data)<10000)==on_disk

# used again, or not

def made(own, where, size=(96,48)):
    "How often a file was decoded"
    n = []
    real = pyramidreid.data.cache._pixels
    pyramidreid.data.cache._pixels = lambda *a, **kw: (n.append(1), real(*a, **kw))[1]
    try: cache = ImageCache(own, size, where)
    finally: pyramidreid.data.cache._pixels = real
    return len(n),cache

def test_used_again_for_the_same_and_for_fewer(own, tmp_path, capsys):
    where = tmp_path/'deep'/'c'
    assert made(own, where)[0]==6 and 'new' in capsys.readouterr().out
    assert made(own, where)[0]==0 and made([str(f) for f in own], str(where))[0]==0
    n,cache = made(own[:1:-1], where)
    assert n==0 and torch.equal(cache[cache.find(own[:3])], torch.stack([pixels(f) for f in own[:3]]))
    assert made(own, where, (384,128))[0]==0 and not capsys.readouterr().out
    assert left(where.parent)==['c']

@pytest.mark.parametrize('change', ['content','time','one more','size'])
def test_made_anew_when_something_changed(own, files, tmp_path, capsys, change):
    where = tmp_path/'c'
    made(own, where)
    capsys.readouterr()
    size = (96,48)
    if change=='content': Image.new('RGB', (48,96), 'red').save(own[2])
    if change=='time': os.utime(own[2], ns=(1,1))
    if change=='one more': own.append(Path(shutil.copy2(files[9], own[0].parent)))
    if change=='size': size = (48,24)
    n,cache = made(own, where, size)
    out = capsys.readouterr().out
    assert n==len(own) and str(where) in out and ('another input' if change=='size' else f'1 of {len(own)} images are new or changed') in out
    assert torch.equal(cache[cache.find(own)], torch.stack([pixels(f, size) for f in own])) and made(own, where, size)[0]==0

@pytest.mark.parametrize('keep', [60,300,-1,-5000])
def test_cut_off(own, tmp_path, capsys, keep):
    where = tmp_path/'c'
    made(own, where)
    where.write_bytes(where.read_bytes()[:keep])
    assert made(own, where)[0]==6 and 'cut off' in capsys.readouterr().out and made(own, where)[0]==0

def test_longer_than_it_should_be(own, tmp_path):
    made(own, tmp_path/'c')
    with open(tmp_path/'c', 'ab') as f: f.write(b'more')
    assert made(own, tmp_path/'c')[0]==6

@pytest.mark.parametrize('content', [b'', b'dear diary', pickle.dumps([1,2]), b'\x10'+b'\0'*7+b'{"a": 1}        ', b'\xff'*200])
def test_a_file_of_another_kind_is_left_alone(own, tmp_path, content):
    where = tmp_path/'c'
    where.write_bytes(content)
    with pytest.raises(ValueError, match='no image cache'): ImageCache(own, file=where)
    assert where.read_bytes()==content
    with pytest.raises(ValueError, match='is a folder'): ImageCache(own, file=tmp_path)

# while it is written

@pytest.fixture(params=[False,True], ids=['new','old'])
def where(request, own, tmp_path):
    "Where a cache goes, with or without an older one of other images there"
    (tmp_path/'cache').mkdir()
    if request.param: ImageCache(own[:2], file=tmp_path/'cache'/'c')
    return tmp_path/'cache'/'c'

def spoiled(own, where, error, match):
    "What was there is there still, and nothing else"
    before,was = left(where.parent),where.read_bytes() if where.exists() else None
    with pytest.raises(error, match=match): ImageCache(own, file=where)
    assert left(where.parent)==before and (was is None or where.read_bytes()==was)

@pytest.mark.parametrize('data', [b'', b'dear diary', 'half', None], ids=['empty','text','half','missing'])
def test_an_unreadable_image_is_named(own, where, data):
    if data is None: own[4].unlink()
    else: own[4].write_bytes(own[4].read_bytes()[:-800] if data=='half' else data)
    spoiled(own, where, OSError, f"{own[4].name} is no image.*on_bad='skip'")
    with pytest.raises(OSError, match=own[4].name): ImageCache(own)

def test_a_full_disk(own, where, monkeypatch):
    class Full(io.FileIO):
        def write(self, b):
            if self.tell()+memoryview(b).nbytes>20000: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(b)
    monkeypatch.setattr(pyramidreid.data.cache, 'open', lambda f, mode: Full(f, mode) if 'w' in mode else open(f, mode), raising=False)
    spoiled(own, where, OSError, 'no room for 0.1 MB')

def test_a_run_that_is_killed_while_decoding(own, where, monkeypatch):
    def pull_the_plug(fns, size):
        yield np.zeros((2,3,*size), np.uint8)
        raise KeyboardInterrupt
    monkeypatch.setattr(pyramidreid.data.cache, 'decoded', pull_the_plug)
    spoiled(own, where, KeyboardInterrupt, None)

def test_nothing_and_no_files():
    with pytest.raises(ValueError, match='no images'): ImageCache([])
    with pytest.raises(ValueError, match='Only files.*ndarray'): ImageCache([np.zeros((4,4,3), np.uint8)])

# loaders

@pytest.fixture(params=['memory','disk'])
def cache(request, tmp_path): return True if request.param=='memory' else tmp_path/'people.cache'

def batches(dl): return [(x.clone(),y.clone()) for x,y in dl]

@pytest.mark.parametrize('num_workers', [0,2])
def test_validation_is_the_same_to_the_bit_without_resizing_on_the_device(make_dls, cache, num_workers):
    for size in ((96,48),(48,24)):
        quick,plain = make_dls(size=size, cache=cache, num_workers=num_workers),make_dls(size=size)
        for (a,ya),(b,yb) in zip(batches(quick.valid), batches(plain.valid), strict=True):
            assert type(a) is type(b) and type(ya) is type(yb) and ya.dtype==yb.dtype and torch.equal(a, b) and torch.equal(ya, yb)
            assert a.stride()==b.stride()

def test_validation_is_the_same_to_a_level_with_it(make_dls, cache):
    quick,plain = (make_dls(size=(128,64), cache=o) for o in (cache,None))
    for (a,ya),(b,yb) in zip(batches(quick.valid), batches(plain.valid), strict=True):
        assert torch.equal(ya, yb) and (a-b).abs().max()<1.01/255 and (a-b).abs().mean()<.1/255

@pytest.mark.parametrize('num_workers', [0,2])
def test_the_same_images_are_drawn_in_any_order_of_modes(make_dls, cache, num_workers):
    plain,quick = (make_dls(size=(96,48), cache=c, num_workers=n, item_tfms=i, batch_tfms=[]) for c,n,i in ((None,0,person_tfms((96,48), batch=True)[0]),(cache,num_workers,None)))
    res = []
    for dls in (plain,quick):
        dls.train.rng = random.Random(3)
        got = []
        for _ in range(2):
            for i,(x,y) in enumerate(dls.train):
                got.append((x,y,dls.train.mode))
                dls.train.mode = 'random' if i%3==1 else 'pk'
        res.append(got)
    assert {m for *_,m in res[0]}=={'pk','random'}
    for (a,ya,ma),(b,yb,mb) in zip(*res, strict=True): assert ma==mb and torch.equal(a, b) and torch.equal(ya, yb)

@pytest.mark.parametrize('tfms', [person_tfms,strong_tfms])
def test_training_batches_have_the_same_mean_and_spread(make_dls, tfms):
    stats = []
    for cache in (None,True):
        set_seed(0)
        dls = make_dls(tfms=tfms, cache=cache)
        dls.train.rng = random.Random(0)
        x = torch.cat([x for _ in range(5) for x,_ in dls.train])
        stats.append((x.mean((0,2,3)),x.std((0,2,3)),x.mean((1,2,3)).std()))
    for a,b in zip(*stats): torch.testing.assert_close(a, b, atol=.02, rtol=0)

def test_every_image_of_a_batch_is_changed_in_its_own_way(make_dls):
    dls = make_dls(tfms=strong_tfms, cache=True)
    dls.train.before_iter()
    x,_ = dls.train.after_batch(dls.train_ds.get_batch([0]*8))
    assert len(x.flatten(1).unique(dim=0))==8

def test_new_test_dl_and_items(make_dls, files, cache):
    quick,plain = make_dls(size=(96,48), cache=cache),make_dls(size=(96,48))
    small = quick.valid.new(bs=5)
    assert isinstance(small, PKDataLoader) and isinstance(small.dataset, CachedDatasets) and small.one_batch()[0].shape==(5,3,96,48)
    assert len(quick.train)==len(plain.train) and len(quick.train.new(k=2).one_batch()[0])==8
    odd = [Image.open(files[0]).resize((33,60)), files[1], np.zeros((20,9,3), np.uint8)]
    for items in (files[:3], odd):
        a,b = (dls.test_dl(items, num_workers=0) for dls in (quick,plain))
        assert torch.equal(a.one_batch()[0], b.one_batch()[0]) and type(a.dataset) is type(b.dataset)
    df = market_table(files[0].parents[1])
    a,b = (torch.cat([y for _,y in dls.test_dl(df, with_labels=True)]) for dls in (quick,plain))
    assert torch.equal(a, b)
    assert quick.train_ds[3][0].size==plain.train_ds[3][0].size and torch.equal(quick.train_ds[3][1], plain.train_ds[3][1])

def test_show_batch(make_dls):
    import matplotlib.pyplot as plt
    dls = make_dls(cache=True)
    for kw in ({},dict(unique=True)):
        for dl in (dls, dls.valid):
            dl.show_batch(max_n=3, **kw)
            assert all(t.startswith('pid ') for t in [ax.get_title() for ax in plt.gcf().axes])

def test_sent_to_a_process(make_dls, cache):
    dl = make_dls(size=(96,48), cache=cache).valid
    sent = pickle.loads(pickle.dumps(dl.dataset))
    for a,b in zip(sent.get_batch([3,1]), dl.dataset.get_batch([3,1])): assert torch.equal(a, b) and type(a) is type(b)

def test_a_run_is_taken_up_again(make_dls, make_learner):
    "Killed in its second epoch and resumed: the same weights as undisturbed"
    class Kill(Callback):
        def before_batch(self):
            if self.training and self.epoch==1: raise KeyboardInterrupt
    def run(path, *cbs):
        set_seed(0) # of the loaders' own dice
        learn = make_learner(make_dls(cache=True, tfms=strong_tfms), path=path, metrics=[])
        learn.fit(2, cbs=cbs)
        return learn.model.state_dict()
    path = make_learner().path
    want = run(path, Checkpoints('whole'))
    with pytest.raises(KeyboardInterrupt): run(path, Checkpoints('cut'), Kill())
    got = run(path, Checkpoints('cut', resume=True))
    assert all(torch.equal(v, got[k]) for k,v in want.items())

def test_held_out_people_and_skipped_files(people, tmp_path, capsys):
    where,path = tmp_path/'c',tmp_path/'people'
    shutil.copytree(people, path)
    kw = dict(p=4, k=2, size=(96,48), cache=where)
    ReIDDataLoaders.from_market(path, **kw)
    capsys.readouterr()
    held = ReIDDataLoaders.from_market(path, valid_pct=.3, **kw)
    assert not capsys.readouterr().out # a part of the same files
    assert not set(held.train.items.pid) & set(held.valid.items.pid)
    for x,y in held.valid: assert len(x)==len(y)
    assert torch.equal((held.valid_ds.get_batch([2])[0])[0], pixels(held.valid.items.fn[2]))
    bad = sorted((path/'query').glob('*.jpg'))[0]
    bad.write_bytes(b'dear diary')
    with pytest.raises(OSError, match=bad.name): ReIDDataLoaders.from_market(path, **kw)
    dls = ReIDDataLoaders.from_market(path, on_bad='skip', **kw)
    assert bad not in set(dls.valid.items.fn) and sum(len(x) for x,_ in dls.valid)==len(dls.valid_ds)

def test_one_cache_for_several_loaders(make_dls, files, capsys):
    cache = ImageCache(files, (96,48))
    capsys.readouterr()
    one,two = make_dls(cache=cache, size=(96,48)),make_dls(cache=cache, size=(128,64), tfms=strong_tfms)
    assert one.train_ds.cache is two.valid_ds.cache and not capsys.readouterr().out
    assert two.one_batch()[0].shape==(16,3,128,64)
    with pytest.raises(ValueError, match='another input'): make_dls(cache=cache, size=(48,24))
    with pytest.raises(ValueError, match='not in the cache'): make_dls(cache=ImageCache(files[:9], (96,48)), size=(96,48))

def test_transforms_of_ones_own(make_dls):
    dls = make_dls(size=(128,64), cache=True, batch_tfms=[Flip()])
    assert [type(o).__name__ for o in dls.train.after_batch.fs]==['ResizeEach','IntToFloatTensor','Flip'] and dls.one_batch()[0].shape==(16,3,128,64)
    dls = make_dls(cache=True, tfms=partial(strong_tfms, colour=0, pad=3))
    assert [type(o).__name__ for o in dls.train.after_batch.fs]==['FlipEach','ResizeEach','PadCropEach','IntToFloatTensor','EraseEach']
    with pytest.raises(ValueError, match='item_tfms.*tfms=strong_tfms'): make_dls(cache=True, item_tfms=person_tfms((48,24))[0])
    assert not isinstance(make_dls(cache=False).train_ds, CachedDatasets)

# a learner

@pytest.fixture(scope='module')
def both(make_dls, make_learner):
    "A plain and a cached learner after one epoch on the same images, unchanged"
    res = []
    for kw in (dict(item_tfms=person_tfms((48,24), batch=True)[0]),dict(cache=True)):
        set_seed(0)
        learn = make_learner(make_dls(batch_tfms=[], **kw))
        learn.dls.train.rng = random.Random(0)
        set_seed(1)
        learn.fit(1)
        res.append(learn)
    return res

def test_the_same_training(both):
    "To the bit: the cache takes no random number that would have gone elsewhere"
    a,b = (o.model.state_dict() for o in both)
    assert all(torch.equal(a[k], b[k]) for k in a)
    a,b = (o.dynamic_loss_weights.history for o in both)
    assert a.equals(b) and both[0].recorder.values==both[1].recorder.values

def test_the_same_embeddings_and_figures(both):
    plain,quick = both
    assert torch.equal(plain.embed(flip=True), quick.embed(flip=True))
    a,b = (o.evaluate() for o in both)
    assert (a.mAP,a.rank1)==(b.mAP,b.rank1)

def test_export_leaves_the_images_behind(both, files):
    plain,quick = both
    for o in both: o.export('m.pkl')
    a,b = ((o.path/'m.pkl').stat().st_size for o in both)
    assert abs(a-b)<20000 < quick.dls.train_ds.cache.images.nbytes
    loaded = load_learner(quick.path/'m.pkl')
    for im in (files[0], Image.open(files[0]).resize((30,70))):
        want = plain.predict(im)
        assert torch.equal(quick.predict(im), want) and torch.equal(loaded.predict(im), want)

@pytest.mark.skipif('PYRAMIDREID_DATA' not in os.environ, reason='PYRAMIDREID_DATA names no folder of real data')
def test_market(tmp_path):
    "64 by 128 everywhere: kept as they are, and validated as ever"
    path = Path(os.environ['PYRAMIDREID_DATA'])/'Market-1501-v15.09.15'
    df = market_table(path)
    df = df[(df.split=='train') | (df.index%40==0)].groupby('pid').head(4)
    quick,plain = (ReIDDataLoaders.from_table(df, p=4, k=4, cache=o, num_workers=0, val_bs=16) for o in (tmp_path/'c',None))
    assert quick.train_ds.cache.shape[2:]==[128,64] and quick.one_batch()[0].shape==(16,3,384,128)
    for _,(a,ya),(b,yb) in zip(range(4), quick.valid, plain.valid): assert torch.equal(ya, yb) and (a-b).abs().max()<1.01/255
