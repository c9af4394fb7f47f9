"Boxes in frames: formats, colours, edges, and the same embeddings as of the crops themselves"
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pyramidreid.all import ReIDWarning, load_embedder
from pyramidreid.boxes import BoxEmbedder, corner_boxes, crop_boxes
from pyramidreid.gallery.entries import as_embedder

HEIGHT,WIDTH = 40,60

@pytest.fixture(scope='module')
def frame(): return np.random.default_rng(0).integers(0, 256, (HEIGHT,WIDTH,3), np.uint8)

def plain_crop(frame, left, top, right, bottom):
    "Each pixel on its own: it is in the crop if the box covers any of it"
    rows = [[frame[y,x] for x in range(WIDTH) if x+1>left and x<right] for y in range(HEIGHT) if y+1>top and y<bottom]
    return np.array([row for row in rows if row])

def random_boxes(n, seed=1):
    corners = np.sort(np.random.default_rng(seed).uniform(-20, 80, (n,2,2)), axis=1)
    return corners.reshape(n, 4)

def test_crops_equal_a_plain_loop(frame):
    boxes = random_boxes(300)
    crops,kept = crop_boxes(frame, boxes, color='rgb')
    expected = {i: plain_crop(frame, *box) for i,box in enumerate(boxes)}
    assert kept.tolist()==[i for i,crop in expected.items() if crop.size] and 20<len(kept)<290
    for crop,i in zip(crops, kept): assert np.array_equal(crop, expected[i])

@pytest.mark.parametrize('format,values', [
    ('xyxy', lambda a,b,c,d: [a,b,c,d]), ('xywh', lambda a,b,c,d: [a,b,c-a,d-b]),
    ('cxcywh', lambda a,b,c,d: [(a+c)/2,(b+d)/2,c-a,d-b])])
def test_formats(format, values):
    boxes = random_boxes(20)
    assert np.allclose(corner_boxes([values(*box) for box in boxes], format), boxes)

@pytest.mark.parametrize('make', [
    np.asarray, list, torch.tensor, lambda o: torch.tensor(o, requires_grad=True),
    lambda o: SimpleNamespace(xyxy=np.asarray(o)), lambda o: SimpleNamespace(xyxy=torch.tensor(o))])
def test_boxes_of_any_kind(make):
    boxes = [[1.,2,3,4],[5,6,7,8]]
    assert corner_boxes(make(boxes)).tolist()==boxes

def test_what_brings_its_own_corners_has_no_other_format():
    assert corner_boxes(SimpleNamespace(xyxy=[[1,2,3,4]]), 'xywh').tolist()==[[1,2,3,4]]

@pytest.mark.parametrize('boxes', [[], np.empty((0,4)), torch.empty(0,4), np.empty((0,6)), SimpleNamespace(xyxy=[])])
def test_nobody(boxes, frame):
    crops,kept = crop_boxes(frame, boxes)
    assert corner_boxes(boxes).shape==(0,4) and crops==[] and len(kept)==0

@pytest.mark.parametrize('boxes,said', [
    ([1,2,3,4], 'single box into a list'), ([[1,2,3]], 'not \\(N, 4\\)'), ([[[1,2,3,4]]], 'not \\(N, 4\\)'),
    ([[1,2,3,4,.9]], 'boxes\\[:, :4\\]'), ([['a','b','c','d']], 'numbers'), (7, 'not \\(N, 4\\)'),
    (np.array([[1,2,3,None]]), 'numbers')])
def test_wrong_boxes(boxes, said, frame):
    with pytest.raises(ValueError, match=said): crop_boxes(frame, boxes)

def test_an_unknown_format_or_order(frame):
    with pytest.raises(ValueError, match="'cxcywh'"): crop_boxes(frame, [[1,2,3,4]], format='yxyx')
    with pytest.raises(ValueError, match="'bgr' or 'rgb'"): crop_boxes(frame, [[1,2,3,4]], color='BGR')

NAN,INF = float('nan'),float('inf')

@pytest.mark.parametrize('box', [
    [-9,-9,-1,-1], [WIDTH,0,WIDTH+9,9], [0,HEIGHT,9,HEIGHT+9], [9,9,9,20], [9,9,20,9], [20,9,9,20], [NAN,1,9,9],
    [1,1,NAN,9], [NAN]*4, [INF,1,INF,9], [-INF,1,-INF,9], [1e300,1,1e301,9]])
def test_boxes_without_pixels(frame, box):
    crops,kept = crop_boxes(frame, [[1,1,9,9], box, [2,2,9,9]])
    assert kept.tolist()==[0,2] and len(crops)==2

def test_a_box_larger_than_the_frame_is_the_frame(frame):
    crops,_ = crop_boxes(frame, [[-INF,-INF,INF,INF], [-1e30,-5,1e30,1e30]], color='rgb')
    for crop in crops: assert np.array_equal(crop, frame)

@pytest.mark.parametrize('wrong,said', [
    (np.zeros((9,9), np.uint8), 'grey'), (np.zeros((9,9,1), np.uint8), 'give \\(H, W, 3\\)'),
    (np.zeros((9,9,4), np.uint8), 'transparency'), (np.zeros((3,9,9), np.uint8), 'channels come last'),
    (np.zeros((2,9,9,3), np.uint8), 'one frame'), (np.zeros((9,9,3), np.float32), '255\\*frame'),
    (np.zeros((9,9,3), np.uint16), 'uint8'), (np.zeros((0,9,3), np.uint8), 'no pixels'), (None, 'one frame')])
def test_wrong_frames(wrong, said):
    with pytest.raises(ValueError, match=said): crop_boxes(wrong, [[0,0,1,1]])

def test_nothing_of_a_frame_changes(frame):
    before = frame.copy()
    for crop in crop_boxes(frame, random_boxes(5))[0]: np.asarray(crop)
    assert np.array_equal(frame, before)

def test_a_picture_is_rgb_whatever_the_order_of_arrays(frame, tmp_path):
    Image.fromarray(frame).save(tmp_path/'frame.png')
    expected = crop_boxes(frame, [[1,2,30,20]], color='rgb')[0][0]
    for picture in (Image.fromarray(frame), tmp_path/'frame.png', str(tmp_path/'frame.png')):
        for color in ('bgr','rgb'):
            assert np.array_equal(crop_boxes(picture, [[1,2,30,20]], color=color)[0][0], expected)

def test_frames_of_a_thermal_camera():
    frame = np.arange(40*60, dtype=np.uint16).reshape(40,60)
    crops,_ = crop_boxes(frame, [[1,2,3,4]], pixel_range=(0,16383))
    assert np.array_equal(crops[0], frame[2:4, 1:3])
    with pytest.raises(ValueError, match='grey'): crop_boxes(frame, [[1,2,3,4]])

# with models

@pytest.fixture(scope='module')
def embedders(trained, tmp_path_factory):
    "A learner, the model it saved, and the learner as a gallery sees it"
    return dict(learner=trained, saved=load_embedder(trained.save_model(tmp_path_factory.mktemp('boxes')/'model')),
                wrapped=as_embedder(trained))

BOXES = [[2,1,30,38], [-9,-9,-1,-1], [31.5,3,77,99]]

@pytest.mark.parametrize('name', ['learner','saved','wrapped'])
def test_embeddings_are_those_of_the_crops(embedders, frame, name):
    embedder = embedders[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ReIDWarning)
        rows = embedder.embed_boxes(frame[..., ::-1], BOXES)
    crops = [frame[1:38, 2:30], frame[3:40, 31:60]]
    expected = np.asarray(embedder.embed(crops))
    assert rows.dtype==np.float32 and not rows[1].any()
    assert np.allclose(rows[[0,2]], expected, atol=1e-6) and np.allclose(np.linalg.norm(rows[0]), 1, atol=1e-5)
    assert np.allclose(embedder.embed_boxes(frame, BOXES, color='rgb'), rows, atol=1e-6)
    assert embedder.embed_boxes(frame, []).shape==(0, rows.shape[1])

def test_all_embedders_agree(embedders, frame):
    first,*others = (embedder.embed_boxes(frame, [BOXES[0]]) for embedder in embedders.values())
    for other in others: assert np.allclose(first, other, atol=1e-5)

def test_boxes_without_pixels_are_named_once(frame):
    class Sizes(BoxEmbedder):
        pixel_range = None
        def embed(self, crops): return np.array([crop.shape for crop in crops], float).reshape(-1, 3)
    for embedder in (Sizes(), Sizes()): # each of them
        with pytest.warns(ReIDWarning, match=r'1 of 3 boxes.*60×40.*number 1, \[-9.0') as caught:
            for _ in range(3): assert embedder.embed_boxes(frame, BOXES).tolist()==[[37,28,3],[0,0,0],[37,29,3]]
        assert len(caught)==1
    assert Sizes().embed_boxes(frame, [BOXES[1]]).tolist()==[[0,0,0]] # no crop at all
