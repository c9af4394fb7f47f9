"The runtime alone: what it imports, what it takes, and what it refuses"
import json
import os
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pyramidreid.export.runtime import *

ort = pytest.importorskip('onnxruntime', reason='the onnx extra is not installed')
pytest.importorskip('onnxscript', reason='the onnx extra is not installed')
pytestmark = pytest.mark.filterwarnings('ignore')
SIZE = (48,24)
heavy = ('torch','torchvision','fastai','fastcore','pandas','matplotlib','scipy','onnx','safetensors','IPython')

@pytest.fixture(scope='session')
def learn(make_learner): return make_learner()

@pytest.fixture(scope='session')
def file(learn, tmp_path_factory):
    import pyramidreid.export.files
    return learn.to_onnx(tmp_path_factory.mktemp('runtime')/'m.onnx')

@pytest.fixture(scope='session')
def files(people): return sorted((people/'query').glob('*.jpg'))

def python(code): return subprocess.run([sys.executable,'-c',code], capture_output=True, text=True)

def test_imports_nothing_heavy_and_in_under_a_second():
    code = f"import time; t=time.process_time()\nimport sys,pyramidreid.export.runtime,onnxruntime\nprint(time.process_time()-t, [o for o in {heavy} if o in sys.modules])"
    runs = [python(code).stdout.split(maxsplit=1) for _ in range(3)]
    assert all(o.strip()=='[]' for _,o in runs) and min(float(t) for t,_ in runs)<1

def test_works_where_there_is_nothing_else(file, files):
    "Nothing but onnxruntime, NumPy, Pillow and the standard library can be imported"
    code = f'''
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        top = name.split('.')[0]
        if top not in sys.stdlib_module_names and top not in ('pyramidreid','onnxruntime','numpy','PIL','flatbuffers','google','coloredlogs','humanfriendly','sympy','mpmath','packaging'):
            raise ModuleNotFoundError(f'no {{name}} here')
sys.meta_path.insert(0, Forbid())
from pyramidreid.export.runtime import Runtime
r = Runtime({str(file)!r}, threads=1)
print(r.embed([{str(files[0])!r}]).shape, r.size, r.fingerprint)
try: import torch
except ModuleNotFoundError: print('alone')
'''
    res = python(code)
    assert res.stdout.split()[:2]==['(1,','48)'] and 'alone' in res.stdout, res.stderr

def test_without_onnxruntime_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r'pip install .pyramidreid\[onnx\]'): Runtime(file)

def test_without_onnxruntime_it_is_named_where_there_is_nothing_else(file):
    "Where fastcore, which the rest of the package imports, is not installed either"
    code = f"import sys\nsys.modules['onnxruntime'] = sys.modules['fastcore'] = None\nfrom pyramidreid.export.runtime import Runtime\nRuntime({str(file)!r})"
    assert 'ImportError: onnxruntime is not installed' in python(code).stderr

# what it takes

def test_files_arrays_images_and_generators(file, files, learn):
    r = Runtime(file, threads=1)
    emb = r.embed(files, bs=5)
    assert abs(emb-learn.embed(learn.dls.test_dl(files)).numpy()).max()<=1e-4
    same = dict(strings=map(str, files), images=[Image.open(f) for f in files], arrays=[np.asarray(Image.open(f)) for f in files], batch=np.stack([np.asarray(Image.open(f)) for f in files]),
                mixed=[files[0], *(Image.open(f) for f in files[1:])], generator=(f for f in files), tuple_=tuple(files))
    for name,o in same.items(): assert abs(r.embed(o)-emb).max()<=1e-6, name
    for o in (files[3], str(files[3]), Image.open(files[3]), np.asarray(Image.open(files[3]))): assert abs(r.embed(o)-emb[3:4]).max()<=1e-6
    assert r.embed([]).shape==(0,r.emb_sz)==(0,6*8)

def test_grey_arrays_and_odd_layouts(file):
    r,rng = Runtime(file, threads=1),np.random.default_rng(0)
    grey,colour = rng.integers(0, 256, (70,30), dtype=np.uint8),rng.integers(0, 256, (70,30,3), dtype=np.uint8)
    assert np.array_equal(r.embed(grey), r.embed(np.stack([grey]*3, -1)))
    bgr = np.ascontiguousarray(colour[...,::-1])
    assert np.array_equal(r.embed(bgr[...,::-1]), r.embed(colour)) and not np.array_equal(r.embed(bgr), r.embed(colour))

def test_only_one_batch_of_images_is_in_memory(file):
    "After 100 images have been asked for, at least 92 have been embedded"
    r,done = Runtime(file, threads=1),[0]
    run = r.run
    def counted(x):
        done[0] += len(x)
        return run(x)
    r.run = counted
    def stream():
        for i in range(100):
            assert i-done[0]<=8
            yield np.full((10,5,3), i, np.uint8)
    assert len(r.embed(stream(), bs=8))==100

def test_pixels_of_the_models_size_are_taken_as_they_are():
    x = np.random.default_rng(0).integers(0, 256, (2,*SIZE,3), dtype=np.uint8)
    assert np.array_equal(load_pixels(x, SIZE), x)

def test_threads_share_a_runtime(file, files):
    r = Runtime(file, threads=1)
    emb,res = r.embed(files),{}
    def work(i): res[i] = r.embed(files, bs=i+1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(res)==4 and all(abs(o-emb).max()<=1e-6 for o in res.values())

# pixels as somebody sees them

TURNS = {1:lambda x: x, 2:lambda x: x[:,::-1], 3:lambda x: x[::-1,::-1], 4:lambda x: x[::-1], 5:lambda x: x.swapaxes(0,1), 6:lambda x: np.rot90(x, -1), 7:lambda x: np.rot90(x, 2).swapaxes(0,1), 8:np.rot90}

@pytest.mark.parametrize('suffix', ['png','jpg','webp','tif'])
def test_exif_turns_a_picture_once(tmp_path, suffix):
    "As the standard's table says, for a file and for an image that was opened by others, before and after it was handled"
    stored = np.random.default_rng(0).integers(0, 256, (5,3,3), dtype=np.uint8).repeat(16,0).repeat(16,1)
    for turn,f in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(stored).save(tmp_path/f'o.{suffix}', exif=exif, **(dict(lossless=True) if suffix=='webp' else dict(quality=100, subsampling=0) if suffix=='jpg' else {}))
        want,seen = f(stored).astype(int),read_rgb(tmp_path/f'o.{suffix}')
        assert np.asarray(seen).shape==want.shape and abs(np.asarray(seen)-want).max()<=(4 if suffix=='jpg' else 0)
        im = Image.open(tmp_path/f'o.{suffix}')
        for o in (Image.open(tmp_path/f'o.{suffix}'), im.copy(), im.convert('RGB'), seen, read_rgb(seen)): assert np.array_equal(np.asarray(read_rgb(o)), np.asarray(seen)), turn

def exif_jpeg(data, *entries):
    "A JPEG's bytes with an EXIF block of entries `(tag, type, count, value)`"
    exif = b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + b''.join(struct.pack('<HHII', *o) for o in entries) + bytes(44)
    return data[:2] + b'\xff\xe1' + struct.pack('>H', len(exif)+2) + exif + data[2:]

def test_other_exif_entries_do_not_matter(files, tmp_path):
    "Entries of every type, with values that fit or not, beside the one that turns the picture"
    data,turn = files[0].read_bytes(),(0x0112,3,1,6)
    (tmp_path/'o.jpg').write_bytes(exif_jpeg(data, turn))
    want = np.asarray(read_rgb(tmp_path/'o.jpg'))
    assert want.shape[:2]==Image.open(files[0]).size and not np.array_equal(want, np.asarray(Image.open(files[0])))
    for tag in (0x010f,0x0131,0x02bc,0x8769,0x8825,0x927c,0xa005):
        for kind in range(14):
            for count,value in ((1,7), (2,40), (9,2**31)):
                (tmp_path/'o.jpg').write_bytes(exif_jpeg(data, turn, (tag,kind,count,value)))
                for o in (tmp_path/'o.jpg', Image.open(tmp_path/'o.jpg')): assert np.array_equal(np.asarray(read_rgb(o)), want), (tag,kind,count)

def test_exif_that_cannot_be_read_says_nothing(files, tmp_path):
    data = files[0].read_bytes()
    (tmp_path/'o.jpg').write_bytes(data[:2]+b'\xff\xe1'+(28).to_bytes(2, 'big')+b'Exif\0\0'+b'\xff'*20+data[2:])
    assert np.array_equal(np.asarray(read_rgb(tmp_path/'o.jpg')), np.asarray(Image.open(files[0])))

@pytest.mark.parametrize('suffix', ['png','tif','jp2'])
def test_sixteen_bits_keep_their_upper_eight(tmp_path, suffix):
    deep = np.random.default_rng(0).integers(0, 2**16, (40,20), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path/f'o.{suffix}')
    for o in (tmp_path/f'o.{suffix}', Image.open(tmp_path/f'o.{suffix}')): assert np.array_equal(np.asarray(read_rgb(o)), np.stack([deep//256]*3, -1))
    assert np.array_equal(np.asarray(read_rgb(Image.frombytes('I;16B', (20,40), deep.astype('>u2').tobytes())))[...,0], deep//256)

@pytest.mark.parametrize('kind,mode', [('int32','I'),('float32','F')])
def test_thirty_two_bits_are_refused(tmp_path, kind, mode):
    from pyramidreid.data.loaders import open_image
    from pyramidreid.data.tables import unreadable
    Image.fromarray(np.ones((40,20), kind)).save(tmp_path/'o.tif')
    for f in (read_rgb,open_image):
        with pytest.raises(ValueError, match=rf'o.tif has 32 bits a pixel \(mode {mode}\)'): f(tmp_path/'o.tif')
    with pytest.raises(ValueError, match=rf'image 3 has 32 bits a pixel \(mode {mode}\)'): load_pixels([Image.new('RGB', (3,5))]*3+[Image.open(tmp_path/'o.tif')], SIZE)
    assert '32 bits' in unreadable([tmp_path/'o.tif'])[tmp_path/'o.tif'] # so that on_bad='skip' leaves it out

def test_a_bomb_is_named(files, monkeypatch):
    from pyramidreid.data.cache import kept_size, open_image
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    for f in (read_rgb,open_image,lambda o: kept_size([o], SIZE)):
        with pytest.raises(OSError, match=f'{files[0].name} .*decompression bomb'): f(files[0])

def test_learner_and_runtime_agree_on_odd_pictures(file, learn, files, tmp_path):
    "Turned, of 16 bits, grey, with transparency"
    exif = Image.Exif()
    exif[0x0112] = 8
    im = Image.open(files[0])
    im.save(tmp_path/'turned.jpg', exif=exif)
    Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*257).save(tmp_path/'deep.png')
    im.convert('LA').save(tmp_path/'la.png')
    im.convert('P').save(tmp_path/'p.gif')
    odd = [tmp_path/o for o in ('turned.jpg','deep.png','la.png','p.gif')]
    ours = learn.embed(learn.dls.test_dl(odd)).numpy()
    assert abs(Runtime(file, threads=1).embed(odd)-ours).max()<=1e-4
    assert abs(learn.embed(learn.dls.test_dl([Image.open(o) for o in odd])).numpy()-ours).max()<=1e-6
    assert abs(ours[1]-ours[2]).max()<.02 # the same grey in 16 bits and in 8

def test_images_are_found_by_what_pillow_opens(tmp_path):
    for o in ('b.webp','A.JFIF','c.jpeg','d.txt','e.mpg','f.pdf','.h.jpg','._c.jpeg','.hidden/g.jpg','deep/down/g.png'):
        (tmp_path/'all'/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'all'/o).touch()
    os.symlink(tmp_path/'all'/'deep', tmp_path/'all'/'link', target_is_directory=True)
    assert [o.relative_to(tmp_path/'all').as_posix() for o in find_images(str(tmp_path/'all'))]==['A.JFIF','b.webp','c.jpeg','deep/down/g.png','link/down/g.png']
    assert find_images(tmp_path/'none')==[]

def test_links_in_a_circle_are_followed_once(tmp_path):
    for o in 'ab':
        (tmp_path/o).mkdir()
        (tmp_path/o/f'{o}.jpg').touch()
    for o,to in (('a/up','..'), ('a/self','.'), ('b/other','../a')): os.symlink(to, tmp_path/o, target_is_directory=True)
    assert [o.relative_to(tmp_path).as_posix() for o in find_images(tmp_path)]==['a/a.jpg','b/b.jpg','b/other/a.jpg']

# what it refuses

def test_pictures_that_are_none(file, files, tmp_path):
    r,data = Runtime(file, threads=1),files[0].read_bytes()
    png = tmp_path/'cut.png'
    Image.open(files[0]).save(png)
    png.write_bytes(png.read_bytes()[:-500])
    for name,o in {'text.jpg':b'hello', 'empty.jpg':b'', 'cut.jpg':data[:len(data)//2], 'head.jpg':data[:200]}.items():
        (tmp_path/name).write_bytes(o)
        with pytest.raises(OSError, match=f'{name} is no image or is cut off'): r.embed([files[0],tmp_path/name])
    with pytest.raises(OSError, match='cut.png is no image or is cut off'): r.embed(png)
    with pytest.raises(FileNotFoundError, match='no image file .*nobody.jpg'): r.embed([tmp_path/'nobody.jpg'])
    with pytest.raises(FileNotFoundError, match='no image file'): r.embed(tmp_path)

@pytest.mark.parametrize('item,words', [(None,'NoneType'), (3,'int'), (b'bytes','bytes'), (np.zeros((8,4,3)),'float64'), (np.zeros((8,4,4), np.uint8),r'\(8, 4, 4\)'),
                                        (np.zeros((3,8,4), np.uint8),r'\(3, 8, 4\)'), (np.zeros((0,4,3), np.uint8),r'\(0, 4, 3\)'), (np.zeros(5, np.uint8),r'\(5,\)')])
def test_what_is_no_picture_is_numbered(file, files, item, words):
    "The number counts over batches"
    with pytest.raises(ValueError, match=f'image 5 is (an?|of type) .*{words}'): Runtime(file, threads=1).embed([*files[:5],item], bs=2)

def test_an_image_of_pil_that_is_cut_off_is_numbered(file, files, tmp_path):
    (tmp_path/'cut.jpg').write_bytes(files[0].read_bytes()[:-300])
    (closed := Image.open(files[0])).close()
    for o in (Image.open(tmp_path/'cut.jpg'), closed):
        with pytest.raises(OSError, match='image 1 is no image or is cut off'): Runtime(file, threads=1).embed([files[0],o])
    with pytest.raises(ValueError, match=r'image 0 has no pixels \(0×5\)'): load_pixels([Image.new('RGB', (0,5))], SIZE)

@pytest.mark.parametrize('item,words', [(None,'NoneType'), (3,'int'), (b'bytes','bytes')])
def test_a_single_thing_that_is_no_picture(file, item, words):
    with pytest.raises(ValueError, match=f'image 0 is of type {words}: give the path'): Runtime(file, threads=1).embed(item)

@pytest.mark.parametrize('suffix', ['jpg','png','gif','webp','tif','bmp','jp2','avif'])
def test_a_damaged_picture_is_an_error_that_names_it_or_none(files, tmp_path, suffix):
    "Bytes changed and cut off at random"
    im,f,rng = Image.open(files[0]),tmp_path/f'o.{suffix}',np.random.default_rng(0)
    try: im.save(f)
    except (KeyError,ValueError,OSError) as e: pytest.skip(f'{suffix}: {e}')
    data = f.read_bytes()
    for i in range(60):
        hurt = bytearray(data if i%3 else data[:rng.integers(len(data))])
        for at in rng.integers(0, max(1, min(len(hurt), 300 if i%2 else len(hurt))), 3): hurt[at:at+1] = bytes(rng.integers(0, 256, 1, dtype=np.uint8))
        f.write_bytes(hurt)
        try: assert read_rgb(f).mode=='RGB'
        except (OSError,ValueError) as e: assert str(f) in str(e)

def test_no_batches_of_none(file):
    with pytest.raises(ValueError, match='bs=0'): Runtime(file).embed([], bs=0)

def test_damaged_models(file, tmp_path):
    bad,data = tmp_path/'bad.onnx',file.read_bytes()
    for n in (0, 1, 100, len(data)//2, len(data)-5000, len(data)-200, len(data)-1):
        bad.write_bytes(data[:n])
        with pytest.raises(ValueError, match='bad.onnx is (not an ONNX model or is cut off|damaged)'): Runtime(bad)
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(data), 40):
        flipped = bytearray(data)
        flipped[i] ^= 1<<rng.integers(8)
        bad.write_bytes(flipped)
        with pytest.raises(ValueError, match='bad.onnx is'): Runtime(bad)
    bad.write_bytes(data+b'\0')
    with pytest.raises(ValueError, match='damaged'): Runtime(bad)
    for o in (b'hello world', b'\x80\x04\x95'*50, bytes(1000)):
        bad.write_bytes(o)
        with pytest.raises(ValueError, match='bad.onnx is not an ONNX model|not one of pyramidreid'): Runtime(bad)
    with pytest.raises(FileNotFoundError, match='no model'): Runtime(tmp_path/'none.onnx')
    with pytest.raises(FileNotFoundError, match='no model'): Runtime(tmp_path)

def test_somebody_elses_onnx_file(tmp_path):
    from onnx import TensorProto, helper
    x,y = (helper.make_tensor_value_info(o, TensorProto.FLOAT, [1]) for o in 'xy')
    model = helper.make_model(helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [x], [y]), opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
    (tmp_path/'relu.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match='relu.onnx is an ONNX model, but not one of pyramidreid'): Runtime(tmp_path/'relu.onnx')

def test_a_later_format(file, tmp_path):
    import json

    import onnx
    model = onnx.load(file)
    for o in model.metadata_props:
        if o.key=='pyramidreid': o.value = json.dumps({**json.loads(o.value), 'format':2})
        else: o.value = BLANK_CHECKSUM
    (tmp_path/'later.onnx').write_bytes(add_checksum(model.SerializeToString()))
    with pytest.raises(ValueError, match='later version'): Runtime(tmp_path/'later.onnx')

def changed(file, dest, about=None, model=None):
    "A copy with another description or another network, and a seal on it"
    import onnx
    proto = onnx.load(file)
    if model: model(proto)
    for o in proto.metadata_props: o.value = BLANK_CHECKSUM if o.key=='seal' else o.value if about is None else about(json.loads(o.value))
    dest.write_bytes(add_checksum(proto.SerializeToString()))
    return dest

@pytest.mark.parametrize('about,words', [
    (lambda a: '{', 'not valid JSON'), (lambda a: '['*10**5, 'not valid JSON'), (lambda a: '[1]', 'does not describe'), (lambda a: json.dumps({**a, 'drop':float('nan')}), 'NaN is not valid in JSON'),
    (lambda a: json.dumps({k:v for k,v in a.items() if k!='size'}), "'size' is missing"), (lambda a: json.dumps({**a, 'size':[10**6]*2}), "'size' is"),
    (lambda a: json.dumps({**a, 'size':[96,48]}), 'is not the network that it describes'), (lambda a: json.dumps({**a, 'levels':[1]}), 'is not the network that it describes')])
def test_a_description_is_read_with_care(file, tmp_path, about, words):
    "Anyone can put a seal on a file"
    with pytest.raises(ValueError, match=f'odd.onnx .*{words}'): Runtime(changed(file, tmp_path/'odd.onnx', about))

def test_a_network_with_other_inputs_is_refused(file, tmp_path):
    def rename(m):
        m.graph.input[0].name = 'x'
        for node in m.graph.node: node.input[:] = ['x' if o=='images' else o for o in node.input]
    with pytest.raises(ValueError, match="odd.onnx is not the network that it describes: it has .*'x'"): Runtime(changed(file, tmp_path/'odd.onnx', model=rename))

def test_weights_outside_the_file_are_refused(file, tmp_path, monkeypatch):
    "No seal is over them"
    monkeypatch.chdir(tmp_path)
    def outside(m):
        w = max(m.graph.initializer, key=lambda o: len(o.raw_data))
        (tmp_path/'w.bin').write_bytes(w.raw_data)
        for k,v in dict(location='w.bin', offset='0', length=str(len(w.raw_data))).items(): w.external_data.add(key=k, value=v)
        w.ClearField('raw_data')
        w.data_location = 1
    with pytest.raises(ValueError, match='odd.onnx is intact, but onnxruntime .* cannot run it .*xternal'): Runtime(changed(file, tmp_path/'odd.onnx', model=outside))

def test_an_operation_of_ones_own_is_refused(file, tmp_path):
    def own(m): m.graph.node[3].op_type,m.graph.node[3].domain = 'Evil','evil'
    with pytest.raises(ValueError, match='odd.onnx is intact, but onnxruntime'): Runtime(changed(file, tmp_path/'odd.onnx', model=own))

def test_what_computes_is_what_was_asked_for(file, monkeypatch):
    assert Runtime(file, providers='CPUExecutionProvider').session.get_providers()==['CPUExecutionProvider']
    with pytest.raises(ValueError, match="does not know the provider 'CudaExecutionProvider'. Available here: .*CPUExecutionProvider"): Runtime(file, providers=['CudaExecutionProvider','CPUExecutionProvider'])
    if 'CUDAExecutionProvider' in ort.get_available_providers(): pytest.skip('there may be a GPU')
    with pytest.raises(ValueError, match='has no CUDAExecutionProvider here, only CPUExecutionProvider'): Runtime(file, providers=[('CUDAExecutionProvider', dict(device_id=0))])
    Runtime(file, providers=['CUDAExecutionProvider','CPUExecutionProvider'])

def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    "And not passed over, as if it were empty"
    real = os.scandir
    def closed(path):
        if str(path).endswith('closed'): raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    (tmp_path/'closed').mkdir()
    monkeypatch.setattr(os, 'scandir', closed) # root may read everything
    with pytest.raises(PermissionError, match='closed'): find_images(tmp_path)
