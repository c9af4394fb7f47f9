"The runtime alone: what it imports, what it takes, and what it refuses"
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from pyramidreid.export.onnx_runtime import *
from pyramidreid.images import load_pixels, read_rgb

ort = pytest.importorskip('onnxruntime', reason='the onnx extra is not installed')
pytest.importorskip('onnxscript', reason='the onnx extra is not installed')
pytestmark = pytest.mark.filterwarnings('ignore')
SIZE = (48,24)
heavy = ('torch','torchvision','fastai','fastcore','pandas','matplotlib','scipy','onnx','safetensors','IPython')

@pytest.fixture(scope='session')
def learn(make_learner): return make_learner()

@pytest.fixture(scope='session')
def file(learn, tmp_path_factory):
    import pyramidreid.export.model_files  # noqa: F401  learn.to_onnx
    return learn.to_onnx(tmp_path_factory.mktemp('runtime')/'m.onnx')

@pytest.fixture(scope='session')
def files(people): return sorted((people/'query').glob('*.jpg'))

def run_python(code): return subprocess.run([sys.executable,'-c',code], capture_output=True, text=True)

def test_imports_nothing_heavy():
    code = f"import sys, pyramidreid.export.onnx_runtime, onnxruntime\nprint([o for o in {heavy} if o in sys.modules])"
    assert run_python(code).stdout.strip()=='[]'

def test_works_where_there_is_nothing_else(file, files):
    "Nothing but onnxruntime, NumPy, Pillow and the standard library can be imported"
    code = f'''
import sys
allowed = {{'pyramidreid','onnxruntime','numpy','PIL'}}
# and what onnxruntime needs
allowed |= {{'flatbuffers','google','coloredlogs','humanfriendly','sympy','mpmath','packaging'}}
class Forbid:
    def find_spec(self, name, path=None, target=None):
        top = name.split('.')[0]
        if top not in sys.stdlib_module_names and top not in allowed: raise ModuleNotFoundError(f'no {{name}} here')
sys.meta_path.insert(0, Forbid())
from pyramidreid.export.onnx_runtime import Runtime
r = Runtime({str(file)!r}, threads=1)
print(r.embed([{str(files[0])!r}]).shape, r.size, r.fingerprint)
try: import torch
except ModuleNotFoundError: print('alone')
'''
    res = run_python(code)
    assert res.stdout.split()[:2]==['(1,','48)'] and 'alone' in res.stdout, res.stderr

def test_without_onnxruntime_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r'pip install .pyramidreid\[onnx\]'): Runtime(file)

def test_without_onnxruntime_it_is_named_where_there_is_nothing_else(file):
    "Where fastcore, which the rest of the package imports, is not installed either"
    code = ("import sys\nsys.modules['onnxruntime'] = sys.modules['fastcore'] = None\n"
            f"from pyramidreid.export.onnx_runtime import Runtime\nRuntime({str(file)!r})")
    assert 'ImportError: onnxruntime is not installed' in run_python(code).stderr

# what it takes

def test_files_arrays_images_and_generators(file, files, learn):
    r = Runtime(file, threads=1)
    emb = r.embed(files, bs=5)
    assert abs(emb-learn.embed(learn.dls.test_dl(files)).numpy()).max()<=1e-4
    images = [Image.open(f) for f in files]
    arrays = [np.asarray(im) for im in images]
    same = dict(strings=map(str, files), images=images, arrays=arrays, batch=np.stack(arrays),
                mixed=[files[0], *images[1:]], generator=(f for f in files), tuple_=tuple(files))
    for name,items in same.items(): assert abs(r.embed(items)-emb).max()<=1e-6, name
    for single in (files[3], str(files[3]), images[3], arrays[3]): assert abs(r.embed(single)-emb[3:4]).max()<=1e-6
    assert r.embed([]).shape==(0,r.emb_sz)==(0,6*8)

def test_grey_arrays_and_odd_layouts(file):
    r,rng = Runtime(file, threads=1),np.random.default_rng(0)
    grey = rng.integers(0, 256, (70,30), dtype=np.uint8)
    colour = rng.integers(0, 256, (70,30,3), dtype=np.uint8)
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

def test_learner_and_runtime_agree_on_odd_pictures(file, learn, files, tmp_path):
    "Turned, grey, with transparency; of 16 bits only if scaled"
    exif = Image.Exif()
    exif[0x0112] = 8
    im = Image.open(files[0])
    im.save(tmp_path/'turned.jpg', exif=exif)
    Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*257).save(tmp_path/'deep.png')
    im.convert('LA').save(tmp_path/'la.png')
    im.convert('P').save(tmp_path/'p.gif')
    runtime,deep = Runtime(file, threads=1),tmp_path/'deep.png'
    for embed in (runtime.embed, learn.embed):
        with pytest.raises(ValueError, match='deep.png .*black and white is unknown'): embed([deep])
    odd = [tmp_path/'turned.jpg', read_rgb(deep, pixel_range=(0,65535)), tmp_path/'la.png', tmp_path/'p.gif']
    ours = learn.embed(learn.dls.test_dl(odd)).numpy()
    assert abs(runtime.embed(odd)-ours).max()<=1e-4
    odd = [o if isinstance(o, Image.Image) else Image.open(o) for o in odd]
    assert abs(learn.embed(learn.dls.test_dl(odd)).numpy()-ours).max()<=1e-6
    assert abs(ours[1]-ours[2]).max()<.02 # the same grey in 16 bits and in 8

def test_pictures_that_are_none(file, files, tmp_path):
    r,data = Runtime(file, threads=1),files[0].read_bytes()
    png = tmp_path/'cut.png'
    Image.open(files[0]).save(png)
    png.write_bytes(png.read_bytes()[:-500])
    broken = {'text.jpg': b'hello', 'empty.jpg': b'', 'cut.jpg': data[:len(data)//2], 'head.jpg': data[:200]}
    for name,content in broken.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(OSError, match=f'{name} is not a valid image, or is cut off'):
            r.embed([files[0],tmp_path/name])
    with pytest.raises(OSError, match='cut.png is not a valid image, or is cut off'): r.embed(png)
    with pytest.raises(FileNotFoundError, match='no image file .*nobody.jpg'): r.embed([tmp_path/'nobody.jpg'])
    with pytest.raises(FileNotFoundError, match='no image file'): r.embed(tmp_path)

@pytest.mark.parametrize('item,words', [
    (None, 'NoneType'), (3, 'int'), (b'bytes', 'bytes'), (np.zeros((8,4,3)), 'float64'),
    (np.zeros((8,4,4), np.uint8), r'\(8, 4, 4\)'), (np.zeros((3,8,4), np.uint8), r'\(3, 8, 4\)'),
    (np.zeros((0,4,3), np.uint8), r'\(0, 4, 3\)'), (np.zeros(5, np.uint8), r'\(5,\)')])
def test_what_is_not_an_image_is_numbered(file, files, item, words):
    "The number counts over batches"
    with pytest.raises(ValueError, match=f'image 5 (is|has no pixels) .*{words}'):
        Runtime(file, threads=1).embed([*files[:5],item], bs=2)

def test_a_pil_image_that_is_cut_off_is_numbered(file, files, tmp_path):
    (tmp_path/'cut.jpg').write_bytes(files[0].read_bytes()[:-300])
    closed = Image.open(files[0])
    closed.close()
    for image in (Image.open(tmp_path/'cut.jpg'), closed):
        with pytest.raises(OSError, match='image 1 is not a valid image, or is cut off'):
            Runtime(file, threads=1).embed([files[0],image])
    with pytest.raises(ValueError, match=r'image 0 has no pixels \(0×5\)'): load_pixels([Image.new('RGB', (0,5))], SIZE)

@pytest.mark.parametrize('item,words', [(None,'NoneType'), (3,'int'), (b'bytes','bytes')])
def test_a_single_thing_that_is_not_an_image(file, item, words):
    with pytest.raises(ValueError, match=f'image 0 is of type {words}: give the path'):
        Runtime(file, threads=1).embed(item)

def test_no_batches_of_none(file):
    with pytest.raises(ValueError, match='bs=0'): Runtime(file).embed([], bs=0)

def test_damaged_models(file, tmp_path):
    bad,data = tmp_path/'bad.onnx',file.read_bytes()
    for n in (0, 1, 100, len(data)//2, len(data)-5000, len(data)-200, len(data)-1):
        bad.write_bytes(data[:n])
        words = 'not an ONNX model or is cut off|not as pyramidreid wrote it'
        with pytest.raises(ValueError, match=f'bad.onnx is ({words})'): Runtime(bad)
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
    graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
    (tmp_path/'relu.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match='relu.onnx is an ONNX model, but not one of pyramidreid'):
        Runtime(tmp_path/'relu.onnx')

def test_a_later_format(file, tmp_path):
    import json

    import onnx
    model = onnx.load(file)
    for o in model.metadata_props:
        if o.key=='pyramidreid': o.value = json.dumps({**json.loads(o.value), 'format':FORMAT+1})
        else: o.value = BLANK_CHECKSUM
    (tmp_path/'later.onnx').write_bytes(add_checksum(model.SerializeToString()))
    with pytest.raises(ValueError, match='later version'): Runtime(tmp_path/'later.onnx')

def changed(file, dest, about=None, model=None):
    "A copy with another description or another network, and a fitting checksum"
    import onnx
    proto = onnx.load(file)
    if model: model(proto)
    for entry in proto.metadata_props:
        if entry.key=='checksum': entry.value = BLANK_CHECKSUM
        elif about: entry.value = about(json.loads(entry.value))
    dest.write_bytes(add_checksum(proto.SerializeToString()))
    return dest

def without_size(about): return json.dumps({name: value for name,value in about.items() if name!='size'})

def with_entries(**kwargs): return lambda about: json.dumps({**about, **kwargs})

@pytest.mark.parametrize('about,words', [
    (lambda about: '{', 'not valid JSON'),
    (lambda about: '['*10**5, 'not valid JSON'),
    (lambda about: '[1]', 'does not describe'),
    (without_size, "'size' is missing"),
    (with_entries(drop=float('nan')), 'NaN is not valid in JSON'),
    (with_entries(size=[10**6]*2), "'size' is"),
    (with_entries(size=[96,48]), 'is not the network that it describes'),
    (with_entries(levels=[1]), 'is not the network that it describes')])
def test_a_description_is_checked(file, tmp_path, about, words):
    "Anyone can write a fitting checksum"
    with pytest.raises(ValueError, match=f'odd.onnx .*{words}'): Runtime(changed(file, tmp_path/'odd.onnx', about))

def test_a_network_with_other_inputs_is_refused(file, tmp_path):
    def rename(m):
        m.graph.input[0].name = 'x'
        for node in m.graph.node: node.input[:] = ['x' if o=='images' else o for o in node.input]
    odd = changed(file, tmp_path/'odd.onnx', model=rename)
    with pytest.raises(ValueError, match="odd.onnx is not the network that it describes: it has .*'x'"): Runtime(odd)

def test_weights_outside_the_file_are_refused(file, tmp_path, monkeypatch):
    "No checksum covers them"
    monkeypatch.chdir(tmp_path)
    def outside(m):
        w = max(m.graph.initializer, key=lambda o: len(o.raw_data))
        (tmp_path/'w.bin').write_bytes(w.raw_data)
        where = dict(location='w.bin', offset='0', length=str(len(w.raw_data)))
        for key,value in where.items(): w.external_data.add(key=key, value=value)
        w.ClearField('raw_data')
        w.data_location = 1
    odd = changed(file, tmp_path/'odd.onnx', model=outside)
    monkeypatch.setattr(ort, 'InferenceSession', lambda *args, **kwargs: pytest.fail('onnxruntime got the file'))
    with pytest.raises(ValueError, match='odd.onnx has weights outside the file'): Runtime(odd)

@pytest.mark.parametrize('key', [b'\x0a\x08location', b'\x0a\x88\x00location', b'\x8a\x80\x00\x88\x80\x80\x00location'])
def test_padded_names_of_weights_outside_are_seen(file, tmp_path, key):
    "protobuf reads lengths that are padded with zeros, too"
    from onnx import StringStringEntryProto
    assert StringStringEntryProto.FromString(key).key=='location'
    odd = tmp_path/'odd.onnx'
    odd.write_bytes(file.read_bytes()+key)
    with pytest.raises(ValueError, match='outside the file'): Runtime(odd)

def test_more_bytes_than_onnx_allows(tmp_path):
    odd = tmp_path/'odd.onnx'
    with open(odd, 'wb') as f: f.truncate(2**31+1) # a file with a hole
    with pytest.raises(ValueError, match='odd.onnx is not an ONNX model: it has 2,147,483,649 bytes'): Runtime(odd)

def test_an_operation_of_ones_own_is_refused(file, tmp_path):
    def own(m): m.graph.node[3].op_type,m.graph.node[3].domain = 'Evil','evil'
    odd = changed(file, tmp_path/'odd.onnx', model=own)
    with pytest.raises(ValueError, match='odd.onnx is intact, but onnxruntime'): Runtime(odd)

def test_what_computes_is_what_was_asked_for(file, monkeypatch):
    assert Runtime(file, providers='CPUExecutionProvider').session.get_providers()==['CPUExecutionProvider']
    unknown = "does not know the provider 'CudaExecutionProvider'. Available here: .*CPUExecutionProvider"
    with pytest.raises(ValueError, match=unknown):
        Runtime(file, providers=['CudaExecutionProvider','CPUExecutionProvider'])
    if 'CUDAExecutionProvider' in ort.get_available_providers(): pytest.skip('there may be a GPU')
    with pytest.raises(ValueError, match='has no CUDAExecutionProvider here, only CPUExecutionProvider'):
        Runtime(file, providers=[('CUDAExecutionProvider', dict(device_id=0))])
    Runtime(file, providers=['CUDAExecutionProvider','CPUExecutionProvider'])
