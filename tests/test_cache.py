"Images decoded once or every time give the same batches and results; and what can be wrong with a file of images"
import errno
import io
import json
import os
import pickle
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, Flip, PILImage, TensorImage, Transform, load_learner, set_seed, tensor
from PIL import EpsImagePlugin, Image
from safetensors.numpy import load_file

import pyramidreid.data.cache
import pyramidreid.images
from pyramidreid.data.cache import ImageCache, check_items, decode_images, open_image
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import CachedDatasets, ReIDDataLoaders
from pyramidreid.data.sampler import PKDataLoader
from pyramidreid.data.transforms import person_tfms, strong_tfms
from pyramidreid.synth.dataset import synth_persons
from pyramidreid.training.checkpoints import Checkpoints

STORED = (96,48) # height and width of the files

@pytest.fixture(scope='session')
def files(people): return sorted(people.rglob('*.jpg'))

@pytest.fixture(scope='session')
def make_small_dls(tmp_path_factory):
    "`make_small_dls(**kwargs)`: loaders of 6 training and 2 test people, for trainings of a few batches"
    path = synth_persons(tmp_path_factory.mktemp('small')/'people', n_train=6, n_test=2, per_cam=2, size=(48,24))
    return partial(ReIDDataLoaders.from_market, path, p=4, k=2, size=(48,24), num_workers=0)

@pytest.fixture
def own(files, tmp_path):
    "Copies of six images, for tests that change them"
    (tmp_path/'own').mkdir()
    return [Path(shutil.copy2(file, tmp_path/'own')) for file in files[:6]]

def pixels(file, size=STORED):
    "What PIL makes of a file, uint8, (3, H, W)"
    height,width = size
    im = Image.open(file).convert('RGB').resize((width,height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(im)).permute(2,0,1)

def all_pixels(files, size=STORED): return torch.stack([pixels(file, size) for file in files])

def names_in(folder): return sorted(o.name for o in folder.iterdir())

# what a cache holds

@pytest.mark.parametrize('size,kept', [
    (STORED, STORED), ((384,128), STORED), (96, STORED), # all images fit
    ((48,24), (48,24)), ((128,40), (128,40)), (32, (32,32))]) # they are larger in one direction
@pytest.mark.parametrize('on_disk', [False,True])
def test_every_image_as_pil_has_it(files, tmp_path, size, kept, on_disk):
    cache = ImageCache(files, size, tmp_path/'c' if on_disk else None)
    assert len(cache)==len(files) and cache.shape[2:]==list(kept) and cache.resized==(kept!=STORED)
    some = files[::-7]
    x = cache[cache.find(some)]
    assert x.dtype==torch.uint8 and torch.equal(x, all_pixels(some, kept))
    assert cache.serves(size) and cache.serves((384,128))==(kept==STORED) and not cache.serves((16,8))
    assert f'{kept[0]}×{kept[1]}' in repr(cache)

def test_images_of_several_sizes_are_resized(own):
    Image.open(own[3]).resize((20,50)).save(own[3])
    cache = ImageCache(own, (384,128))
    assert cache.shape==[6,3,384,128] and cache.resized
    assert torch.equal(cache[[3,0]], all_pixels([own[3],own[0]], (384,128)))

def test_images_of_any_mode_become_rgb(own):
    for file,mode in zip(own, ('L', 'CMYK')): Image.open(file).convert(mode).save(file)
    assert torch.equal(ImageCache(own)[:2], all_pixels(own[:2]))

def test_rotated_images_are_kept_upright(own):
    "As without a cache; and other images of the size they are stored in are not mistaken for them"
    exif = Image.Exif()
    exif[0x0112] = 6
    upright,rotated = all_pixels(own),[file.with_suffix('.png') for file in own]
    for file,to in zip(own, rotated): Image.open(file).rotate(90, expand=True).save(to, exif=exif)
    for files in (rotated, [*rotated[:3],*own[3:]], [*own[:3],*rotated[3:]]):
        cache = ImageCache(files, STORED)
        assert torch.equal(cache[:6], upright) and cache.resized

def test_a_file_named_twice_is_kept_once(own, monkeypatch):
    monkeypatch.chdir(own[0].parent)
    cache = ImageCache([*own, own[0], own[1].name, str(own[2])])
    assert len(cache)==6 and cache.find([own[1].name,own[0]]).tolist()==[1,0]

def test_other_programs_can_read_the_file(own, tmp_path):
    cache = ImageCache(own, file=tmp_path/'c.safetensors')
    tensors = load_file(tmp_path/'c.safetensors')
    assert list(tensors)==['images'] and np.array_equal(tensors['images'], cache.images)

def test_many_chunks_keep_the_order(files):
    chunks = list(decode_images(files[:23], STORED, n=5))
    assert [len(chunk) for chunk in chunks]==[5,5,5,5,3]
    assert torch.equal(torch.from_numpy(np.concatenate(chunks)), all_pixels(files[:23]))

@pytest.mark.parametrize('on_disk', [False,True])
def test_a_pickle_holds_the_images_or_the_name_of_the_file(own, tmp_path, on_disk):
    cache = ImageCache(own, file=tmp_path/'c' if on_disk else None)
    data = pickle.dumps(cache)
    assert torch.equal(pickle.loads(data)[[2,1]], cache[[2,1]]) and (len(data)<10000)==on_disk

def without_checksum(cache):
    "As it was pickled by earlier versions"
    del cache.checksum
    return cache

@pytest.mark.parametrize('pickled', [lambda cache: cache, without_checksum], ids=['now','earlier'])
def test_a_pickle_of_a_file_that_was_written_again_is_refused(own, tmp_path, pickled):
    "The rows would be those of other people"
    data = pickle.dumps(pickled(ImageCache(own[:4], file=tmp_path/'c')))
    assert len(pickle.loads(data))==4
    (tmp_path/'c').unlink()
    ImageCache(own[:1:-1], file=tmp_path/'c') # four others, of the same size
    with pytest.raises(ValueError, match='c was written again since this cache was pickled'): pickle.loads(data)
    (tmp_path/'c').unlink()
    ImageCache(own[:4], file=tmp_path/'c')
    assert torch.equal(pickle.loads(data)[[3]], all_pixels(own[3:4]))

def test_a_pickle_of_images_that_changed_is_refused(own, tmp_path):
    data = pickle.dumps(ImageCache(own, file=tmp_path/'c'))
    shutil.copy(own[1], own[0])
    ImageCache(own, file=tmp_path/'c')
    with pytest.raises(ValueError, match='written again'): pickle.loads(data)

def changed_header(file, change):
    "Writes the header of a cache again, changed"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8+length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, 'little')+text+data[8+length:])

def setter(name, value):
    "What sets an entry of a header"
    def change(header): (header['images'] if name=='shape' else header['__metadata__'])[name] = value
    return change

WRONG_HEADERS = {
    **{f'shape {shape}':setter('shape', shape) for shape in (
        [6,3,-96,-48], [-6,3,-96,48], 82944, ['6',3,96,48], [6,3,96,48.], [1,1,1,82944], [18,1,96,48], [], None)},
    **{f'made of {text[:9]}':setter('made_of', text) for text in ('', '[]', '5', '{}', '{"a":[1,2]}', '['*50_000)},
    **{f'made of {value}':setter('made_of', value) for value in (None, 3, [])},
    **{f'resized {text}':setter('resized', text) for text in ('5', 'null', '')},
    **{f'range {text}':setter('pixel_range', text) for text in ('[1]', '5', '"x"', '{}', '[2,1]', '[[1],[2]]')},
    'no images':lambda header: header.pop('images'), 'images as text':lambda header: header.update(images='x')}

@pytest.mark.parametrize('name', WRONG_HEADERS)
def test_a_header_that_is_not_one_is_written_again(own, tmp_path, name):
    kept = ImageCache(own, file=tmp_path/'c')[:].clone()
    changed_header(tmp_path/'c', WRONG_HEADERS[name])
    cache = ImageCache(own, file=tmp_path/'c')
    assert torch.equal(cache[:], kept) and torch.equal(ImageCache(own, file=tmp_path/'c')[:], kept)

@pytest.mark.parametrize('length', [0,3,2**40,2**63+5,2**64-1])
def test_a_header_of_another_length_is_written_again(own, tmp_path, length):
    kept = ImageCache(own, file=tmp_path/'c')[:].clone()
    data = (tmp_path/'c').read_bytes()
    (tmp_path/'c').write_bytes(length.to_bytes(8, 'little')+data[8:])
    assert torch.equal(ImageCache(own, file=tmp_path/'c')[:], kept)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_a_cache_that_is_a_pipe_is_not_waited_for(own, tmp_path):
    os.mkfifo(tmp_path/'c')
    with pytest.raises(ValueError, match='c is not a regular file'): ImageCache(own, file=tmp_path/'c')

def test_what_a_killed_run_left_is_removed(own, tmp_path):
    left = tmp_path/'.partial-x'
    left.mkdir()
    (left/'images.safetensors').write_bytes(b'half')
    (left/'.lock').touch() # which nobody holds
    ImageCache(own, file=tmp_path/'c')
    assert names_in(tmp_path)==['c','own']

def test_nothing_and_what_is_not_a_file():
    with pytest.raises(ValueError, match='no images'): ImageCache([])
    with pytest.raises(ValueError, match='Only files.*ndarray'): ImageCache([np.zeros((4,4,3), np.uint8)])

@pytest.mark.parametrize('item,words', [
    (np.zeros((0,4,3), np.uint8), 'has no pixels'), (torch.zeros(4,0,3, dtype=torch.uint8), 'has no pixels'),
    (Image.new('RGB', (0,4)), 'has no pixels'), (None, 'is of type NoneType'), (1., 'is of type float'),
    (np.zeros((4,4)), 'black and white'), (TensorImage(torch.zeros(3,4,4)), 'black and white is unknown')])
def test_check_items_names_the_position(files, item, words):
    check_items([files[0], b'bytes', np.zeros((4,4,4), np.uint8), Image.new('L', (4,4))])
    with pytest.raises(ValueError, match=f'image 2 .*{words}'): check_items([files[0], files[1], item])

def test_a_float_tensor_is_scaled_and_not_cut_to_zero(files):
    "fastai's PILImage.create makes uint8 of it, which is black"
    image = TensorImage(torch.from_numpy(np.array(Image.open(files[0]))).permute(2,0,1)/255)
    with pytest.raises(ValueError, match='black and white'): open_image(image)
    assert np.array_equal(open_image(image, (0,1)), Image.open(files[0]))

# used again, or not

@pytest.fixture
def make(monkeypatch):
    "`make(files, where, size)`: how many files were decoded, and the cache"
    decoded,decode = [],pyramidreid.data.cache._pixels
    def counted(file, size, pixel_range):
        decoded.append(file)
        return decode(file, size, pixel_range)
    monkeypatch.setattr(pyramidreid.data.cache, '_pixels', counted)
    def make(files, where, size=STORED, **kwargs):
        decoded.clear()
        cache = ImageCache(files, size, where, **kwargs)
        return len(decoded),cache
    return make

def test_used_again_for_the_same_and_for_fewer(make, own, tmp_path, capsys):
    where = tmp_path/'deep'/'c'
    n,_ = make(own, where)
    assert n==6 and 'new' in capsys.readouterr().out
    for files,file in ((own,where), ([str(o) for o in own],str(where))):
        n,_ = make(files, file)
        assert n==0
    n,cache = make(own[:1:-1], where)
    assert n==0 and torch.equal(cache[cache.find(own[:3])], all_pixels(own[:3]))
    n,_ = make(own, where, (384,128))
    assert n==0 and not capsys.readouterr().out
    assert names_in(where.parent)==['c']

CHANGES = {
    'content':  lambda own, file: Image.new('RGB', (48,96), 'red').save(own[2]),
    'time':     lambda own, file: os.utime(own[2], ns=(1,1)),
    'one more': lambda own, file: own.append(Path(shutil.copy2(file, own[0].parent))),
}
@pytest.mark.parametrize('change', CHANGES)
def test_made_again_when_an_image_has_changed(make, own, files, tmp_path, capsys, change):
    where = tmp_path/'c'
    make(own, where)
    capsys.readouterr()
    CHANGES[change](own, files[9])
    n,cache = make(own, where)
    out = capsys.readouterr().out
    assert n==len(own) and str(where) in out and f'1 of {len(own)} images are new or changed' in out
    assert torch.equal(cache[cache.find(own)], all_pixels(own))
    n,_ = make(own, where)
    assert n==0

def test_made_again_for_a_smaller_input(make, own, tmp_path, capsys):
    make(own, tmp_path/'c')
    n,cache = make(own, tmp_path/'c', (48,24))
    assert n==6 and 'another input' in capsys.readouterr().out
    assert torch.equal(cache[cache.find(own)], all_pixels(own, (48,24)))
    n,_ = make(own, tmp_path/'c', (48,24))
    assert n==0

@pytest.mark.parametrize('keep', [60, 300, -1, -5000])
def test_made_again_when_cut_off(make, own, tmp_path, capsys, keep):
    where = tmp_path/'c'
    make(own, where)
    where.write_bytes(where.read_bytes()[:keep])
    capsys.readouterr()
    n,_ = make(own, where)
    assert n==6 and 'cut off' in capsys.readouterr().out
    n,_ = make(own, where)
    assert n==0

@pytest.fixture
def thermal(tmp_path):
    "Two pictures of 16 bits"
    counts = np.random.default_rng(0).integers(7600, 8000, (2,32,16), dtype=np.uint16)
    for i in range(2): Image.fromarray(counts[i]).save(tmp_path/f'{i}.png')
    return [tmp_path/'0.png', tmp_path/'1.png'],counts

def test_deep_pictures_are_cached_by_their_range(make, thermal, tmp_path):
    files,counts = thermal
    with pytest.raises(ValueError, match='black and white'): make(files, None)
    where = tmp_path/'c'
    n,cache = make(files, where, pixel_range=(7600,8000))
    assert n==2 and np.array_equal(cache[[1]][0,0], np.rint((counts[1]-7600.)/400*255))
    assert make(files, where, pixel_range=[7600.,8000])[0]==0
    n,other = make(files, where, pixel_range=(7500,8000))
    assert n==2 and not torch.equal(other[[1]], cache[[1]])

def test_an_old_cache_of_deep_pictures_is_made_again(make, files, thermal, tmp_path, capsys):
    "It does not say by which range, and holds their upper 8 bits"
    for fns,n_decoded,kwargs in ((thermal[0], 2, dict(pixel_range=(7600,8000))), (files[:2], 0, {})):
        where = tmp_path/f'{n_decoded}.safetensors'
        make(fns, where, **kwargs)
        data = where.read_bytes()
        length = int.from_bytes(data[:8], 'little')
        header = json.loads(data[8:8+length])
        del header['__metadata__']['pixel_range']
        header = json.dumps(header).encode()
        where.write_bytes(len(header).to_bytes(8, 'little')+header+data[8+length:])
        assert make(fns, where, **kwargs)[0]==n_decoded
    assert 'scaled by the range unknown' in capsys.readouterr().out

def test_made_again_when_too_long(make, own, tmp_path):
    make(own, tmp_path/'c')
    with open(tmp_path/'c', 'ab') as f: f.write(b'more')
    n,_ = make(own, tmp_path/'c')
    assert n==6

OTHER_FILES = dict(
    empty=b'', text=b'dear diary', pickle=pickle.dumps([1,2]), noise=b'\xff'*200,
    safetensors=b'\x10'+b'\0'*7+b'{"a": 1}        ')
@pytest.mark.parametrize('kind', OTHER_FILES)
def test_a_file_of_another_kind_is_left_alone(own, tmp_path, kind):
    where = tmp_path/'c'
    where.write_bytes(OTHER_FILES[kind])
    with pytest.raises(ValueError, match='not an image cache'): ImageCache(own, file=where)
    assert where.read_bytes()==OTHER_FILES[kind]

def test_a_folder_is_an_error(own, tmp_path):
    with pytest.raises(ValueError, match='is a folder'): ImageCache(own, file=tmp_path)

# while it is written

@pytest.fixture(params=[False,True], ids=['new','old'])
def where(request, own, tmp_path):
    "Where a cache goes, without or with an older one of other images there"
    (tmp_path/'cache').mkdir()
    if request.param: ImageCache(own[:2], file=tmp_path/'cache'/'c')
    return tmp_path/'cache'/'c'

def assert_fails_and_changes_nothing(own, where, error, match):
    before,content = names_in(where.parent),where.read_bytes() if where.exists() else None
    with pytest.raises(error, match=match): ImageCache(own, file=where)
    assert names_in(where.parent)==before
    if content is not None: assert where.read_bytes()==content

@pytest.mark.parametrize('kind', ['empty', 'text', 'half', 'missing'])
def test_an_unreadable_image_is_named(own, where, kind):
    half = own[4].read_bytes()[:-800]
    if kind=='missing': own[4].unlink()
    else: own[4].write_bytes(dict(empty=b'', text=b'dear diary', half=half)[kind])
    what = 'No such file.*{}' if kind=='missing' else '{} is not a valid image'
    message = what.format(own[4].name)+".*, or pass on_bad='skip'"
    assert_fails_and_changes_nothing(own, where, OSError, message)
    with pytest.raises(OSError, match=own[4].name): ImageCache(own)

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\n%%EndComments\nshowpage\n'

def test_no_crop_starts_ghostscript(own, where, monkeypatch):
    "As a file, as bytes or as an open file, for training and for a cache"
    started = []
    def record(*args, **kwargs):
        started.append(args)
        return Image.new('RGB', (64,128)).im
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', record)
    own[4].write_bytes(EPS)
    for crop in (own[4], str(own[4]), EPS, io.BytesIO(EPS)):
        with pytest.raises(OSError, match="is not a valid image, or is cut off.*on_bad='skip'"): open_image(crop)
    assert_fails_and_changes_nothing(own, where, OSError, f"{own[4].name} is not a valid image.*on_bad='skip'")
    assert not started

def test_bytes_and_open_files_are_images(files):
    data = files[0].read_bytes()
    for image in (data, io.BytesIO(data)): assert np.array_equal(open_image(image), Image.open(files[0]))

def test_a_picture_that_is_too_large_is_not_decoded(own, where, monkeypatch):
    monkeypatch.setattr(pyramidreid.images, 'MAX_PIXELS', 60*60)
    Image.new('RGB', (70,60)).save(own[4])
    message = f"{own[4].name} has 70×60 pixels, more than the 3,600 allowed.*, or pass on_bad='skip'"
    with pytest.raises(OSError, match=message): open_image(own[4])
    assert_fails_and_changes_nothing([own[4]], where, OSError, message)

def test_a_pipe_is_not_waited_for(own, where):
    if not hasattr(os, 'mkfifo'): pytest.skip('no FIFOs here')
    own[4].unlink()
    os.mkfifo(own[4])
    writer = os.open(own[4], os.O_RDWR)
    timer = threading.Timer(2, os.close, [writer]) # whoever waits reads an empty file then
    timer.start()
    assert_fails_and_changes_nothing(own, where, OSError, f'{own[4].name} is not a regular file but a pipe')
    timer.join()

def test_a_file_that_may_not_be_read_is_not_called_damaged(own, monkeypatch):
    "`on_bad='skip'` is no help: it would leave out what may be a good picture"
    def refused(file, *args, **kwargs): raise PermissionError(13, 'Permission denied', str(file))
    monkeypatch.setattr(Image, 'open', refused)
    for read in (open_image, lambda file: ImageCache([file])):
        with pytest.raises(PermissionError, match=f'{own[0].name} cannot be read') as e: read(own[0])
        assert 'on_bad' not in str(e.value)

def test_names_that_are_not_utf_8(own, where):
    latin = own[0].with_name(os.fsdecode(b'caf\xe9.jpg'))
    try: own[0].rename(latin)
    except OSError: pytest.skip('this file system knows UTF-8 only')
    ImageCache([latin], file=where)
    cache = ImageCache([latin], file=where) # read again
    assert torch.equal(cache[cache.find([latin])], all_pixels([latin]))

def test_a_full_disk(own, where, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell()+memoryview(data).nbytes>20000: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)
    def open_full(file, mode): return Full(file, mode) if 'w' in mode else open(file, mode)
    monkeypatch.setattr(pyramidreid.data.cache, 'open', open_full, raising=False)
    assert_fails_and_changes_nothing(own, where, OSError, 'no space for 0.1 MB')

def test_a_run_that_is_interrupted_while_decoding(own, where, monkeypatch):
    def interrupted(fns, size, **kwargs):
        yield np.zeros((2,3,*size), np.uint8)
        raise KeyboardInterrupt
    monkeypatch.setattr(pyramidreid.data.cache, 'decode_images', interrupted)
    assert_fails_and_changes_nothing(own, where, KeyboardInterrupt, None)

# loaders

@pytest.fixture(params=['memory','disk'])
def cache(request, tmp_path): return True if request.param=='memory' else tmp_path/'people.cache'

def assert_same_batch(a, b):
    (x,y),(x2,y2) = a,b
    assert type(x) is type(x2) and type(y) is type(y2) and y.dtype==y2.dtype
    assert torch.equal(x, x2) and torch.equal(y, y2)

@pytest.mark.parametrize('num_workers', [0,2])
def test_validation_is_the_same_to_the_bit_without_resizing_on_the_device(make_dls, cache, num_workers):
    for size in (STORED, (48,24)):
        cached,plain = make_dls(size=size, cache=cache, num_workers=num_workers),make_dls(size=size)
        for a,b in zip(cached.valid, plain.valid, strict=True):
            assert_same_batch(a, b)
            assert a[0].stride()==b[0].stride()

def test_validation_is_the_same_to_a_level_with_it(make_dls, cache):
    cached,plain = make_dls(size=(128,64), cache=cache),make_dls(size=(128,64))
    for (x,y),(x2,y2) in zip(cached.valid, plain.valid, strict=True):
        difference = (x-x2).abs()
        assert torch.equal(y, y2) and difference.max()<1.01/255 and difference.mean()<.1/255

def batches_of_changing_modes(dls):
    "Two epochs in which the loader changes its mode, as the dynamic loss weights do"
    dls.train.rng = random.Random(3)
    res = []
    for _ in range(2):
        for i,(x,y) in enumerate(dls.train):
            res.append((x,y,dls.train.mode))
            dls.train.mode = 'random' if i%3==1 else 'pk'
    return res

@pytest.mark.parametrize('num_workers', [0,2])
def test_the_same_images_are_drawn_in_any_order_of_modes(make_dls, cache, num_workers):
    item_tfms,_ = person_tfms(STORED, batch=True)
    plain = make_dls(size=STORED, item_tfms=item_tfms, batch_tfms=[])
    cached = make_dls(size=STORED, cache=cache, num_workers=num_workers, batch_tfms=[])
    want,got = batches_of_changing_modes(plain),batches_of_changing_modes(cached)
    assert {mode for _,_,mode in want}=={'pk','random'}
    for (x,y,mode),(x2,y2,mode2) in zip(want, got, strict=True):
        assert mode==mode2 and torch.equal(x, x2) and torch.equal(y, y2)

@pytest.mark.parametrize('tfms', [person_tfms,strong_tfms])
def test_training_batches_have_the_same_mean_and_spread(make_dls, tfms):
    stats = []
    for cache in (None,True):
        set_seed(0)
        dls = make_dls(tfms=tfms, cache=cache)
        dls.train.rng = random.Random(0)
        x = torch.cat([x for _ in range(5) for x,_ in dls.train])
        stats.append((x.mean((0,2,3)), x.std((0,2,3)), x.mean((1,2,3)).std()))
    for a,b in zip(*stats): torch.testing.assert_close(a, b, atol=.02, rtol=0)

def test_every_image_of_a_batch_is_changed_in_its_own_way(make_dls):
    dls = make_dls(tfms=strong_tfms, cache=True)
    dls.train.before_iter()
    x,_ = dls.train.after_batch(dls.train_ds.get_batch([0]*8))
    assert len(x.flatten(1).unique(dim=0))==8

def test_new_loaders_use_the_cache(make_dls):
    cached,plain = make_dls(size=STORED, cache=True),make_dls(size=STORED)
    small = cached.valid.new(bs=5)
    assert isinstance(small, PKDataLoader) and isinstance(small.dataset, CachedDatasets)
    assert small.one_batch()[0].shape==(5,3,*STORED)
    assert len(cached.train)==len(plain.train) and len(cached.train.new(k=2).one_batch()[0])==8

def test_images_outside_the_cache_are_opened_as_ever(make_dls, files, cache):
    cached,plain = make_dls(size=STORED, cache=cache),make_dls(size=STORED)
    odd = [Image.open(files[0]).resize((33,60)), files[1], np.zeros((20,9,3), np.uint8)]
    for items in (files[:3], odd):
        a,b = cached.test_dl(items, num_workers=0),plain.test_dl(items, num_workers=0)
        assert torch.equal(a.one_batch()[0], b.one_batch()[0]) and type(a.dataset) is type(b.dataset)
    df = market_table(files[0].parents[1])
    a,b = (torch.cat([y for _,y in dls.test_dl(df, with_labels=True)]) for dls in (cached,plain))
    assert torch.equal(a, b)

@pytest.mark.parametrize('kind', [
    str, Path, Image.open, lambda file: np.array(Image.open(file)), lambda file: tensor(Image.open(file))],
    ids=['str', 'path', 'pil', 'array', 'tensor'])
def test_open_image_is_a_transform_of_any_type(files, kind):
    "fastai applies a transform only to the types that its hints name"
    im = Transform(open_image)(kind(files[0]))
    assert type(im) is PILImage and np.array_equal(im, Image.open(files[0]))

def test_single_items_are_opened_as_ever(make_dls):
    (im,target),(im2,target2) = (make_dls(size=STORED, cache=cache).train_ds[3] for cache in (True,None))
    assert np.array_equal(np.asarray(im), np.asarray(im2)) and torch.equal(target, target2)

@pytest.mark.parametrize('unique', [False,True])
def test_show_batch(make_dls, unique):
    dls = make_dls(cache=True)
    for dl in (dls, dls.valid):
        dl.show_batch(max_n=3, unique=unique)
        titles = [ax.get_title() for ax in plt.gcf().axes if ax.images]
        assert len(titles)==3 and all(title.startswith('pid ') for title in titles)
        plt.close('all')

def test_sent_to_a_process(make_dls, cache):
    dataset = make_dls(size=STORED, cache=cache).valid.dataset
    sent = pickle.loads(pickle.dumps(dataset))
    assert_same_batch(sent.get_batch([3,1]), dataset.get_batch([3,1]))

@pytest.mark.slow # test_survive does the same without a cache
def test_a_killed_run_resumes_with_identical_results(make_small_dls, make_learner, tmp_path):
    "Killed in its second epoch and resumed: the same weights as undisturbed"
    class Kill(Callback):
        def before_batch(self):
            if self.training and self.epoch==1: raise KeyboardInterrupt
    def run(*cbs):
        set_seed(0) # of the loaders' own random numbers
        learn = make_learner(make_small_dls(cache=True, tfms=strong_tfms), path=tmp_path, metrics=[])
        learn.fit(2, cbs=cbs)
        return learn.model.state_dict()
    want = run(Checkpoints('whole'))
    with pytest.raises(KeyboardInterrupt): run(Checkpoints('cut'), Kill())
    got = run(Checkpoints('cut', resume=True))
    assert got.keys()==want.keys() and all(torch.equal(value, got[name]) for name,value in want.items())

# which files are in it

SMALL_BATCHES = dict(p=4, k=2, size=STORED, num_workers=0)

def test_held_out_people_are_in_the_same_cache(people, tmp_path, capsys):
    args = dict(**SMALL_BATCHES, cache=tmp_path/'c')
    ReIDDataLoaders.from_market(people, **args)
    capsys.readouterr()
    held_out = ReIDDataLoaders.from_market(people, valid_pct=.3, **args)
    assert not capsys.readouterr().out # nothing was decoded
    assert not set(held_out.train.items.pid) & set(held_out.valid.items.pid)
    for x,y in held_out.valid: assert len(x)==len(y)
    x,_ = held_out.valid_ds.get_batch([2])
    assert torch.equal(x[0], pixels(held_out.valid.items.fn[2]))

def test_unreadable_files_are_named_or_skipped(people, tmp_path):
    path = tmp_path/'people'
    shutil.copytree(people, path)
    args = dict(**SMALL_BATCHES, cache=tmp_path/'c')
    bad = sorted((path/'query').glob('*.jpg'))[0]
    bad.write_bytes(b'dear diary')
    with pytest.raises(OSError, match=bad.name): ReIDDataLoaders.from_market(path, **args)
    dls = ReIDDataLoaders.from_market(path, on_bad='skip', **args)
    assert bad not in set(dls.valid.items.fn) and sum(len(x) for x,_ in dls.valid)==len(dls.valid_ds)

def test_one_cache_for_several_loaders(make_dls, files, capsys):
    cache = ImageCache(files, STORED)
    capsys.readouterr()
    one,two = make_dls(cache=cache, size=STORED),make_dls(cache=cache, size=(128,64), tfms=strong_tfms)
    assert one.train_ds.cache is two.valid_ds.cache and not capsys.readouterr().out
    assert two.one_batch()[0].shape==(16,3,128,64)
    with pytest.raises(ValueError, match=r'\(48, 24\)'): make_dls(cache=cache, size=(48,24))
    with pytest.raises(ValueError, match='not in the cache'):
        make_dls(cache=ImageCache(files[:9], STORED), size=STORED)

def names(tfms): return [type(tfm).__name__ for tfm in tfms]

def test_custom_batch_transforms(make_dls):
    dls = make_dls(size=(128,64), cache=True, batch_tfms=[Flip()])
    assert names(dls.train.after_batch.fs)==['ResizeEach', 'IntToFloatTensor', 'Flip']
    assert dls.one_batch()[0].shape==(16,3,128,64)
    dls = make_dls(cache=True, tfms=partial(strong_tfms, colour=0, pad=3))
    assert names(dls.train.after_batch.fs)==['FlipEach', 'ResizeEach', 'PadCropEach', 'IntToFloatTensor', 'EraseEach']

def test_item_transforms_do_not_go_with_a_cache(make_dls):
    item_tfms,_ = person_tfms((48,24))
    with pytest.raises(ValueError, match='item_tfms.*tfms=strong_tfms'): make_dls(cache=True, item_tfms=item_tfms)
    assert not isinstance(make_dls(cache=False).train_ds, CachedDatasets)

# a learner

@pytest.fixture(scope='module')
def learners(make_small_dls, make_learner):
    "A plain and a cached learner after one epoch on the same images, unchanged"
    res = []
    item_tfms,_ = person_tfms((48,24), batch=True)
    for kwargs in (dict(item_tfms=item_tfms), dict(cache=True)):
        set_seed(0)
        learn = make_learner(make_small_dls(batch_tfms=[], **kwargs))
        learn.dls.train.rng = random.Random(0)
        set_seed(1)
        learn.fit(1)
        res.append(learn)
    return res

def test_the_same_training(learners):
    "To the bit: the cache uses no random number that would have gone elsewhere"
    plain,cached = learners
    a,b = plain.model.state_dict(),cached.model.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert plain.dynamic_loss_weights.history.equals(cached.dynamic_loss_weights.history)
    assert plain.recorder.values==cached.recorder.values

def test_the_same_embeddings_and_metrics(learners):
    plain,cached = learners
    assert torch.equal(plain.embed(flip=True), cached.embed(flip=True))
    a,b = plain.evaluate(),cached.evaluate()
    assert (a.mAP,a.rank1)==(b.mAP,b.rank1)

def test_export_leaves_the_images_behind(learners, files):
    plain,cached = learners
    sizes = []
    for learn in learners:
        learn.export('m.pkl')
        sizes.append((learn.path/'m.pkl').stat().st_size)
    assert abs(sizes[0]-sizes[1])<20000<cached.dls.train_ds.cache.images.nbytes
    loaded = load_learner(cached.path/'m.pkl')
    for im in (files[0], Image.open(files[0]).resize((30,70))):
        want = plain.predict(im)
        assert torch.equal(cached.predict(im), want) and torch.equal(loaded.predict(im), want)

@pytest.mark.skipif('PYRAMIDREID_DATA' not in os.environ, reason='PYRAMIDREID_DATA names no folder of real data')
def test_market(tmp_path):
    "128×64 everywhere: kept as they are, and validated as without a cache"
    df = market_table(Path(os.environ['PYRAMIDREID_DATA'])/'Market-1501-v15.09.15')
    df = df[(df.split=='train') | (df.index%40==0)].groupby('pid').head(4)
    args = dict(p=4, k=4, num_workers=0, val_bs=16)
    cached = ReIDDataLoaders.from_table(df, cache=tmp_path/'c', **args)
    plain = ReIDDataLoaders.from_table(df, **args)
    assert cached.train_ds.cache.shape[2:]==[128,64] and cached.one_batch()[0].shape==(16,3,384,128)
    for _,(x,y),(x2,y2) in zip(range(4), cached.valid, plain.valid):
        assert torch.equal(y, y2) and (x-x2).abs().max()<1.01/255
