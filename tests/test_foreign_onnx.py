"ONNX files with channels first, and those of other projects"
import numpy as np
import pytest
from PIL import Image

from pyramidreid.export.model_files import load_embedder
from pyramidreid.export.onnx_runtime import Runtime
from pyramidreid.export.small_onnx import quantize_onnx

ort = pytest.importorskip('onnxruntime', reason='the onnx extra is not installed')
onnx = pytest.importorskip('onnx', reason='the onnx extra is not installed')
pytest.importorskip('onnxscript', reason='the onnx extra is not installed')

pytestmark = pytest.mark.filterwarnings('ignore')
SIZE = (48,24)
STATS = dict(mean=(.485,.456,.406), std=(.229,.224,.225))

@pytest.fixture(scope='module')
def crops(people): return sorted((people/'query').glob('*.jpg'))[:8]

@pytest.fixture(scope='module')
def planar(trained, tmp_path_factory):
    return trained.to_onnx(tmp_path_factory.mktemp('planar')/'planar.onnx', layout='nchw')

def test_channels_first_gives_the_same_embeddings(trained, planar, crops, tmp_path):
    whole,first = Runtime(trained.to_onnx(tmp_path/'whole.onnx')),Runtime(planar)
    assert first.layout=='nchw' and whole.layout=='nhwc' and first.fingerprint==whole.fingerprint
    assert np.allclose(first.embed(crops), whole.embed(crops), atol=1e-5)
    assert first.embed([]).shape==(0,first.emb_sz)

def test_its_input_is_that_of_trackers(planar, crops):
    session = ort.InferenceSession(planar)
    assert session.get_inputs()[0].type=='tensor(float)' and session.get_inputs()[0].shape[1:]==[3,*SIZE]
    images = [np.asarray(Image.open(o).convert('RGB').resize(SIZE[::-1], Image.BICUBIC)) for o in crops]
    x = np.stack(images).astype(np.float32).transpose(0,3,1,2)/255
    assert np.allclose(session.run(None, {'images': x})[0], Runtime(planar).embed(crops), atol=1e-6)

def test_half_precision_int8_and_saved_models_have_it_too(trained, planar, crops, tmp_path):
    half = Runtime(trained.to_onnx(tmp_path/'half.onnx', half=True, layout='nchw'))
    saved = Runtime(load_embedder(trained.save_model(tmp_path/'m')).to_onnx(tmp_path/'s.onnx', layout='nchw'))
    small = Runtime(quantize_onnx(planar, tmp_path/'small.onnx', crops))
    expected = Runtime(planar).embed(crops)
    assert np.allclose(saved.embed(crops), expected, atol=1e-5) and np.allclose(half.embed(crops), expected, atol=1e-2)
    assert (small.embed(crops)*expected).sum(1).mean()>.95 and small.layout=='nchw'

def test_an_unknown_layout(trained, tmp_path):
    with pytest.raises(ValueError, match="choose from 'nhwc'"): trained.to_onnx(tmp_path/'a.onnx', layout='chwn')
    assert not list(tmp_path.iterdir())

# files of other projects

def network(file, input_shape=('n',3,*SIZE), kind=onnx.TensorProto.FLOAT, channels_last=False):
    "A model that returns twice the mean of each channel, and a constant 1"
    axes = [1,2] if channels_last else [2,3]
    from onnx import helper
    nodes = [helper.make_node('ReduceMean', ['x','axes'], ['mean'], keepdims=0),
             helper.make_node('Mul', ['mean','two'], ['y'])]
    numpy_kind = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}[kind]
    weights = [onnx.numpy_helper.from_array(np.array(axes), 'axes'),
               onnx.numpy_helper.from_array(np.array(2, numpy_kind), 'two')]
    graph = helper.make_graph(nodes, 'g', [helper.make_tensor_value_info('x', kind, input_shape)],
                              [helper.make_tensor_value_info('y', kind, (input_shape[0],3))], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9), file)
    return file

def plain_embedding(crops, color='rgb', mean=STATS['mean'], std=STATS['std']):
    rows = []
    for crop in crops:
        pixels = np.asarray(Image.open(crop).convert('RGB').resize(SIZE[::-1], Image.BICUBIC)).astype(float)/255
        row = [2*((pixels[..., c]-mean[c])/std[c]).mean() for c in range(3)]
        row = row[::-1] if color=='bgr' else row
        rows.append(np.array(row)/np.linalg.norm(row))
    return np.array(rows)

@pytest.mark.parametrize('color', ['rgb','bgr'])
@pytest.mark.parametrize('layout', ['nchw','nhwc'])
@pytest.mark.parametrize('batch', ['n',1,3])
def test_another_projects_file(crops, tmp_path, color, layout, batch):
    shape = (batch,3,*SIZE) if layout=='nchw' else (batch,*SIZE,3)
    file = network(tmp_path/'f.onnx', shape, channels_last=layout=='nhwc')
    runtime = Runtime(file, size=SIZE, **STATS, color=color, layout=layout)
    assert runtime.emb_sz==3 and 'f at 48×24' in repr(runtime)
    assert np.allclose(runtime.embed(crops), plain_embedding(crops, color), atol=1e-5)
    assert np.allclose(runtime.embed_boxes(crops[0], [[0,0,999,999]]), plain_embedding(crops[:1], color), atol=1e-5)

def test_half_precision_and_pixels_up_to_255(crops, tmp_path):
    file = network(tmp_path/'f.onnx', kind=onnx.TensorProto.FLOAT16)
    told = dict(mean=(0,0,0), std=[1/255]*3)
    found = Runtime(file, **told, color='rgb', layout='nchw').embed(crops)
    assert np.allclose(found, plain_embedding(crops, **told), atol=2e-3) and found.dtype==np.float32

def test_our_own_network_without_its_description(planar, crops, tmp_path):
    proto = onnx.load(planar)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path/'bare.onnx')
    bare = Runtime(tmp_path/'bare.onnx', mean=(0,0,0), std=(1,1,1), color='rgb', layout='nchw')
    assert np.allclose(bare.embed(crops), Runtime(planar).embed(crops), atol=1e-5)

def test_the_fingerprint_is_of_the_file_and_of_what_was_told(tmp_path):
    told = dict(size=SIZE, **STATS, color='rgb', layout='nchw')
    one,two = network(tmp_path/'one.onnx'),network(tmp_path/'two.onnx', (4,3,*SIZE))
    first = Runtime(one, **told).fingerprint
    assert Runtime(one, **told).fingerprint==first!=Runtime(two, **told).fingerprint
    assert Runtime(one, **(told | dict(color='bgr'))).fingerprint!=first

TOLD = dict(size=SIZE, **STATS, color='rgb', layout='nchw')

@pytest.mark.parametrize('shape,change,said', [
    (('n',3,*SIZE), dict(size=(64,32)), 'takes pictures of \\(48, 24\\)'),
    (('n',3,'h','w'), dict(size=None), 'any size'), (('n',3,*SIZE), dict(layout='nhwc'), 'try the other layout'),
    (('n',3,*SIZE), dict(layout=None), "'nchw' or 'nhwc'"),
    (('n',3,*SIZE), dict(color=None), "'rgb' or 'bgr'"), (('n',3,*SIZE), dict(mean=None), 'three numbers'),
    (('n',3,*SIZE), dict(std=(1,1)), 'three numbers'), (('n',3,*SIZE), dict(std=(1,0,1)), 'above 0'),
    (('n',3,*SIZE), dict(mean=(123.7,116.3,103.5)), 'from 0 to 255. Divide them by 255'),
    (('n',3,'h','w'), dict(size=(0,5)), 'height and width')])
def test_what_was_told_wrongly(tmp_path, shape, change, said):
    file = network(tmp_path/'f.onnx', shape)
    with pytest.raises(ValueError, match=said): Runtime(file, **(TOLD | change))

def test_files_that_are_no_such_models(tmp_path, planar):
    with pytest.raises(ValueError, match='says itself how'): Runtime(planar, **TOLD)
    with pytest.raises(ValueError, match="or say how to feed it"): Runtime(network(tmp_path/'f.onnx'))
    from onnx import helper
    graph = helper.make_graph([helper.make_node('Identity', ['x'], ['y'])], 'g',
                              [helper.make_tensor_value_info('x', 1, ('n',5))],
                              [helper.make_tensor_value_info('y', 1, ('n',5))])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9), tmp_path/'t.onnx')
    with pytest.raises(ValueError, match='does not turn pictures'): Runtime(tmp_path/'t.onnx', **TOLD)

def test_it_is_evaluated_calibrated_and_behind_a_gallery(people, tmp_path):
    "As our own models: the card from its embeddings, a threshold, a gallery that is saved, and identities"
    pytest.importorskip('pyarrow', reason='needs the extra gallery')
    from pyramidreid.data.datasets import market_table
    from pyramidreid.evaluation.distances import Distances
    from pyramidreid.evaluation.retrieval import evaluate
    from pyramidreid.gallery.gallery import Gallery
    from pyramidreid.training.threshold_calibration import calibrate_distances
    from pyramidreid.video.identities import Identities
    runtime = Runtime(network(tmp_path/'f.onnx'), **TOLD)
    table = market_table(people)
    table = table[(table.split!='train') & (table.pid>0)].reset_index(drop=True)
    embs,pids = runtime.embed(table.fn.tolist()),table.pid.to_numpy()
    assert np.allclose(embs, plain_embedding(table.fn), atol=1e-5)
    query = (table.split=='query').to_numpy()
    card = evaluate(embs[query], embs[~query], pids[query], pids[~query], table.cam[query], table.cam[~query])
    assert card.n_query==query.sum() and 0<card.mAP<1
    calibration = calibrate_distances(Distances(embs, embs), pids, pids, same_set=True, progress_bar=False,
                                      about=dict(model=runtime.fingerprint))
    gallery = Gallery(runtime).add(table.drop(columns='split'))
    gallery.calibration = calibration
    again = Gallery.load(gallery.save(tmp_path/'g'), runtime)
    found = again.search(table.fn[0], k=len(table), far=.5)
    assert found.key[0]==str(table.fn[0]) and (found.similarity>=calibration.threshold(.5)).all()
    people = Identities(runtime, threshold=.99)
    first = people.identify(table.fn[pids==pids[0]].tolist())
    assert first.is_new and people.identify(table.fn[pids==pids[0]].tolist()).pid==first.pid
