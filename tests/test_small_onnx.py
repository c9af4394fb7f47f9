"""ONNX files in half precision and in int8, and files that onnxruntime's converters changed"""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

onnx = pytest.importorskip('onnx', reason='the onnx extra is not installed')
ort = pytest.importorskip('onnxruntime', reason='the onnx extra is not installed')
pytest.importorskip('onnxscript', reason='the onnx extra is not installed')

from onnx import TensorProto, numpy_helper  # noqa: E402
from test_folding import with_statistics  # noqa: E402

from pyramidreid.core import ReIDWarning  # noqa: E402
from pyramidreid.export.model_files import _as_half, _row_factors, load_embedder  # noqa: E402
from pyramidreid.export.onnx_runtime import Runtime  # noqa: E402
from pyramidreid.export.small_onnx import quantize_onnx, reseal_onnx  # noqa: E402
from pyramidreid.synth.dataset import synth_persons  # noqa: E402

pytestmark = [pytest.mark.filterwarnings('ignore:The ranges of int8'),
              pytest.mark.filterwarnings('ignore:.*was not compared with its original')]

@pytest.fixture(scope='module')
def made(make_learner, people, tmp_path_factory):
    "A learner whose batch norms do something, its files, and images"
    folder,learn = tmp_path_factory.mktemp('small'),make_learner()
    with_statistics(learn.model)
    images = sorted(people.rglob('*.jpg'))
    plain,half = learn.to_onnx(folder/'plain.onnx'),learn.to_onnx(folder/'half.onnx', half=True)
    return SimpleNamespace(learn=learn, plain=plain, half=half, images=images,
                           folder=learn.save_model(folder/'half', half=True),
                           int8=quantize_onnx(plain, folder/'int8.onnx', images))

def cosines(a, b): return (a*b).sum(1)/np.linalg.norm(a, axis=1)/np.linalg.norm(b, axis=1)

# half precision

def test_row_factors_by_hand():
    weight = np.array([[1,2],[3,0],[0,0]], np.float32)
    assert _row_factors(np.array([[2,4],[-3,0],[0,0]], np.float32), weight).tolist()==[[2],[-1],[1]]
    assert _row_factors(np.array([[2,5],[-3,0],[0,0]], np.float32), weight) is None
    assert _row_factors(np.array([[2,4],[-3,0],[0,1]], np.float32), weight) is None
    assert _row_factors(weight.T, weight) is None

def test_what_half_precision_holds_needs_no_factors():
    values = np.array([[.5,65504],[0,-3]], np.float32)
    half,factors = _as_half(values, None)
    assert half.dtype==np.float16 and np.array_equal(half, values) and factors is None
    assert _as_half(np.array([[.1,1]], np.float32), None) is None

def test_half_is_the_model_that_save_model_writes(made):
    embedder,runtime = load_embedder(made.folder),Runtime(made.half, threads=1)
    assert runtime.fingerprint==embedder.fingerprint!=Runtime(made.plain).fingerprint
    assert abs(runtime.embed(made.images)-embedder.embed(made.images)).max()<=1e-5

def test_half_is_close_to_the_model(made):
    emb,expected = (Runtime(file, threads=1).embed(made.images) for file in (made.half, made.plain))
    assert emb.dtype==np.float32 and 0<abs(emb-expected).max()<1e-2
    assert cosines(emb, expected).min()>.9999

def test_half_has_half_the_size_and_the_rounded_weights(made):
    assert made.half.stat().st_size<.52*made.plain.stat().st_size
    stored = {o.name.removesuffix('_half'): numpy_helper.to_array(o) for o in onnx.load(made.half).graph.initializer
              if o.data_type==TensorProto.FLOAT16}
    state = {f'model.{name}': value for name,value in made.learn.model.state_dict().items()
             if value.ndim>1 and not name.startswith(('head.classify', 'head.reduce.bias'))}
    assert len(state)>5 and state.keys()<=stored.keys()
    for name,value in state.items(): assert np.array_equal(stored[name], value.half().numpy()), name

@pytest.mark.slow
def test_half_of_an_embedder(made, tmp_path):
    "Of one already in half precision it is the same model"
    file = load_embedder(made.folder).to_onnx(tmp_path/'again.onnx', half=True)
    assert Runtime(file).fingerprint==Runtime(made.half).fingerprint
    assert file.stat().st_size<.52*made.plain.stat().st_size

def test_weights_beyond_half_precision(make_learner, tmp_path):
    learn = make_learner()
    with torch.no_grad(): learn.model.body[0].weight[0,0,0,0] = 1e5
    with pytest.raises(ValueError, match='values up to 1e.05, and half precision holds 65,504'):
        learn.to_onnx(tmp_path/'m.onnx', half=True)
    assert not list(tmp_path.iterdir())

# int8

def test_int8_is_a_model_of_its_own(made):
    source,int8 = Runtime(made.plain, threads=1),Runtime(made.int8, threads=1)
    assert int8.fingerprint!=source.fingerprint
    cos = cosines(int8.embed(made.images), source.embed(made.images))
    assert .97<cos.mean()<1
    assert int8.about['made_from']==dict(
        fingerprint=source.fingerprint, how=f'int8 calibrated with {len(made.images)} images',
        similarity=pytest.approx(cos.mean(), abs=1e-3))
    assert f'calibrated with {len(made.images)} images, made from {source.fingerprint}' in repr(int8)
    assert {**source.about, 'format': 0, 'fingerprint': '', 'made_from': 0}=={
        **int8.about, 'format': 0, 'fingerprint': '', 'made_from': 0}

def test_int8_weights_have_the_scale_of_their_channel(made):
    "The largest weight of each becomes 127; the first convolution stays as it is"
    plain,int8 = onnx.load(made.plain).graph,onnx.load(made.int8).graph
    values = {o.name: numpy_helper.to_array(o) for o in int8.initializer}
    makers = {node.output[0]: node for node in int8.node}
    weights = {o.name: numpy_helper.to_array(o) for o in plain.initializer}
    convs = [node for node in int8.node if node.op_type=='Conv']
    assert len(convs)==sum(node.op_type=='Conv' for node in plain.node)>5
    assert makers[convs[0].input[1]].op_type=='Cast'
    for conv in convs[1:]:
        quantized,scale,_ = makers[conv.input[1]].input
        weight = weights[quantized.removesuffix('_quantized')]
        largest = abs(weight).reshape(len(weight), -1).max(1)
        assert np.allclose(values[scale], largest/127, rtol=1e-5)
        back = values[quantized]*values[scale].reshape(-1, 1, 1, 1)
        assert values[quantized].dtype==np.int8
        assert (abs(back-weight).reshape(len(weight), -1).max(1)<=largest/250).all()

def test_int8_is_small(made): assert made.int8.stat().st_size<.35*made.plain.stat().st_size

@pytest.mark.slow
def test_int8_again_is_the_same_file(made, tmp_path):
    again = quantize_onnx(made.plain, tmp_path/'again.onnx', made.images)
    assert again.read_bytes()==made.int8.read_bytes()

@pytest.mark.slow
def test_int8_of_half(made, tmp_path):
    file = quantize_onnx(made.half, tmp_path/'int8.onnx', made.images)
    runtime = Runtime(file, threads=1)
    assert runtime.about['made_from']['fingerprint']==Runtime(made.half).fingerprint
    assert cosines(runtime.embed(made.images), Runtime(made.int8, threads=1).embed(made.images)).mean()>.97

def test_a_gallery_does_not_mix(made, tmp_path):
    pytest.importorskip('pyarrow', reason='the gallery extra is not installed')
    from pyramidreid.gallery.gallery import Gallery
    Gallery.from_learner(made.learn, made.images[:8]).save(tmp_path/'gallery')
    assert len(Gallery.load(tmp_path/'gallery', Runtime(made.plain)))==8
    for file in (made.int8, made.half):
        with pytest.raises(ValueError, match='[Aa]nother model'): Gallery.load(tmp_path/'gallery', Runtime(file))

def test_few_images_warn_and_none_are_an_error(made, tmp_path):
    with pytest.warns(ReIDWarning, match='measured on 5 images only: give 100'):
        quantize_onnx(made.plain, tmp_path/'m.onnx', made.images[:5])
    with pytest.raises(ValueError, match='no images to calibrate with'):
        quantize_onnx(made.plain, tmp_path/'n.onnx', [])
    assert not (tmp_path/'n.onnx').exists()

def test_a_network_without_convolutions(make_dls, make_learner, tmp_path):
    "Nothing in a transformer is quantised, so the file would be one in half precision that says int8"
    with pytest.warns(ReIDWarning, match='has not been trained'):
        file = make_learner(make_dls(size=(64,32)), 'vit_tiny_patch16_224', n_parts=2).to_onnx(tmp_path/'vit.onnx')
    images = [np.zeros((64,32,3), np.uint8)]*2
    with pytest.raises(ValueError, match='vit.onnx has no convolutions that can compute in int8.*half=True'):
        quantize_onnx(file, tmp_path/'int8.onnx', images)
    assert not (tmp_path/'int8.onnx').exists()

def test_a_single_image_to_calibrate_with(made, tmp_path):
    one = Runtime(quantize_onnx(made.plain, tmp_path/'one.onnx', str(made.images[0])))
    assert one.about['made_from']['how'].endswith('with 1 images')
    with pytest.raises(OSError, match=f'{tmp_path}.*folder'): quantize_onnx(made.plain, tmp_path/'two.onnx', tmp_path)

def test_what_cannot_be_quantised(made, tmp_path):
    out = tmp_path/'m.onnx'
    with pytest.raises(ValueError, match='int8.onnx was converted already .int8 calibrated'):
        quantize_onnx(made.int8, out, made.images)
    with pytest.raises(FileNotFoundError, match='no model'): quantize_onnx(tmp_path/'none.onnx', out, made.images)
    with pytest.raises(FileNotFoundError, match='no image file .*nobody.jpg'):
        quantize_onnx(made.plain, out, [tmp_path/'nobody.jpg'])
    assert not out.exists()

# changed by other tools

def optimised(file, dest):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(dest)
    ort.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])

def quantised(file, dest):
    from onnxruntime.quantization import quantize_dynamic
    quantize_dynamic(str(file), str(dest), op_types_to_quantize=['MatMul'])

def in_float16(file, dest):
    from onnxruntime.transformers.float16 import convert_float_to_float16
    onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True), str(dest))

def saved_again(file, dest):
    model = onnx.load(file)
    model.doc_string = 'changed'
    onnx.save(model, str(dest))

@pytest.mark.parametrize('convert,marks', [
    (optimised, r'it \(it has the marks of onnxruntime.s optimiser\)'),
    (quantised, r'it \(it has the marks of onnxruntime.s quantiser\)'),
    (in_float16, "it, such as onnxruntime's"), (saved_again, "it, such as onnxruntime's")])
def test_a_converted_file_is_refused_until_it_is_resealed(made, tmp_path, convert, marks):
    changed = tmp_path/'changed.onnx'
    convert(made.plain, changed)
    with pytest.raises(ValueError, match=f'changed.onnx is not as pyramidreid wrote it.*converter changed {marks}.*'
                                         'small_onnx.reseal_onnx.*damaged'): Runtime(changed)
    source = Runtime(made.plain, threads=1)
    runtime = Runtime(reseal_onnx(changed, tmp_path/'sealed.onnx', made.plain, made.images), threads=1)
    found = cosines(runtime.embed(made.images), source.embed(made.images)).mean()
    assert found>.99 and runtime.fingerprint!=source.fingerprint
    assert runtime.about['made_from']==dict(fingerprint=source.fingerprint, how='converted by another tool',
                                            similarity=pytest.approx(found, abs=1e-3))

def test_the_same_file_can_be_written_over(made, tmp_path):
    changed = tmp_path/'changed.onnx'
    saved_again(made.plain, changed)
    assert Runtime(reseal_onnx(changed, changed, made.plain, made.images[:4])).size==Runtime(made.plain).size

def test_without_the_original_it_warns(made, tmp_path):
    saved_again(made.plain, tmp_path/'changed.onnx')
    with pytest.warns(ReIDWarning, match='changed.onnx was not compared with its original: pass original= and images='):
        sealed = reseal_onnx(tmp_path/'changed.onnx', tmp_path/'sealed.onnx')
    assert Runtime(sealed).about['made_from']['similarity'] is None
    for kwargs in (dict(original=made.plain), dict(images=made.images)):
        with pytest.raises(ValueError, match='both original= and images='):
            reseal_onnx(tmp_path/'changed.onnx', tmp_path/'x.onnx', **kwargs)

def test_a_description_that_was_lost_comes_from_the_original(made, tmp_path):
    model = onnx.load(made.plain)
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path/'bare.onnx'))
    with pytest.raises(ValueError, match='bare.onnx has lost the description'):
        reseal_onnx(tmp_path/'bare.onnx', tmp_path/'x.onnx')
    sealed = reseal_onnx(tmp_path/'bare.onnx', tmp_path/'sealed.onnx', made.plain, made.images[:9])
    assert Runtime(sealed).about['arch']==Runtime(made.plain).about['arch']

def edited(file, dest, edit):
    model = onnx.load(file)
    edit(model)
    dest.write_bytes(model.SerializeToString())
    return dest

def renamed_input(model):
    model.graph.input[0].name = 'x'
    for node in model.graph.node: node.input[:] = ['x' if o=='images' else o for o in node.input]

def other_operation(model): model.graph.node[3].op_type,model.graph.node[3].domain = 'Evil','evil'

def noise_for_weights(model):
    entry = max(model.graph.initializer, key=lambda o: len(o.raw_data))
    noise = np.random.default_rng(0).normal(0, 10, len(entry.raw_data)//4)
    entry.raw_data = noise.astype(np.float32).tobytes()

def nan_for_weights(model):
    entry = max(model.graph.initializer, key=lambda o: len(o.raw_data))
    entry.raw_data = np.full(len(entry.raw_data)//4, np.nan, np.float32).tobytes()

def outside_weights(model):
    entry = max(model.graph.initializer, key=lambda o: len(o.raw_data))
    entry.ClearField('raw_data')
    entry.data_location = 1
    entry.external_data.add(key='location', value='/etc/passwd')

@pytest.mark.parametrize('edit,words', [
    (renamed_input, "is not the network that it describes: it has .*'x'"),
    (other_operation, 'onnxruntime .* cannot run it'),
    (noise_for_weights, 'less than 0.9, so it would find the wrong people'),
    (nan_for_weights, 'original.s is nan, less than 0.9'),
    (outside_weights, 'has weights outside the file')])
def test_what_is_not_resealed(made, tmp_path, edit, words):
    odd,out = edited(made.plain, tmp_path/'odd.onnx', edit),tmp_path/'out.onnx'
    with pytest.raises(ValueError, match=f'{odd}.*{words}'): reseal_onnx(odd, out, made.plain, made.images[:20])
    assert not out.exists()

def test_files_that_are_no_models(made, tmp_path):
    odd,out = tmp_path/'odd.onnx',tmp_path/'out.onnx'
    for content in (b'hello world', made.plain.read_bytes()[:-1000], b'\x80\x04\x95'*50):
        odd.write_bytes(content)
        with pytest.raises(ValueError, match='odd.onnx is not an ONNX model or is cut off'): reseal_onnx(odd, out)
    with pytest.raises(FileNotFoundError, match='no model'): reseal_onnx(tmp_path/'none.onnx', out)
    with pytest.raises(ValueError, match='no images to compare'): reseal_onnx(made.plain, out, made.plain, [])
    assert not out.exists()

@pytest.mark.parametrize('made_from', [
    {}, dict(fingerprint='0', how='', similarity=1.), dict(fingerprint=64*'0', how=3, similarity=1.),
    dict(fingerprint=64*'0', how='', similarity=2), dict(fingerprint=64*'0', how='', similarity=True)])
def test_a_description_of_the_source_is_checked(made, made_from):
    from pyramidreid.export.onnx_runtime import parse_description
    about = Runtime(made.int8).about
    assert parse_description(json.dumps(about), 'it')==about
    with pytest.raises(ValueError, match="'made_from' is"):
        parse_description(json.dumps({**about, 'made_from': made_from}), 'it')

# the benchmark

@pytest.mark.slow
def test_the_benchmark(tmp_path, monkeypatch):
    import common
    import embedding
    for module in (common, embedding): monkeypatch.setattr(module, 'results', tmp_path)
    people = synth_persons(n_train=2, n_test=5, size=(96,48), path=tmp_path/'people')
    threads = torch.get_num_threads()
    try: embedding.main([*'--sizes 96x48 --arch resnet10 --n 4 --bs 4 --rounds 1 --evaluate'.split(), str(people)])
    finally: torch.set_num_threads(threads)
    rows = json.loads((tmp_path/'embedding.json').read_text())['runs']
    assert [row['kind'] for row in rows]==[
        'PyTorch', 'PyTorch, batch norms folded', 'ONNX, float32', 'ONNX, weights in half', 'ONNX, int8']
    assert rows[0]['ratio']==1 and min(row['similarity'] for row in rows)>.9
    assert all(row['per_second']>0 and row['size']=='96×48' for row in rows)
    assert abs(rows[1]['mAP']-rows[2]['mAP'])<1e-3 and all(0<row['rank1']<=1 for row in rows[1:])
    assert '| 96×48 | ONNX, int8 |' in (tmp_path/'embedding.md').read_text()
