"A drawn clip, and adapters for trackers"
import numpy as np
import pytest

from pyramidreid.boxes import BoxEmbedder
from pyramidreid.synth.clip import synth_clip
from pyramidreid.video.trackers import ForBoxmot, ForLibreYolo, ForUltralytics


class Colours(BoxEmbedder):
    "Mean colour of a crop, RGB"
    fingerprint,pixel_range = 'colours',None
    def embed(self, crops): return np.array([np.asarray(crop).mean((0,1))+1 for crop in crops]).reshape(-1, 3)

@pytest.fixture(scope='module')
def clip(): return synth_clip(n_people=5, n_frames=60, size=(96,160))

def corners_of(clip, t): return clip.table[clip.table.frame==t][['left','top','right','bottom']].to_numpy(float)

def test_boxes_are_in_the_frame_and_tight(clip):
    table = clip.table
    assert len(clip.frames)==60 and clip.frames[0].shape==(96,160,3) and clip.frames[0].dtype==np.uint8
    assert (table.left>=0).all() and (table.right<=160).all() and (table.left<table.right).all()
    assert (table.top>=0).all() and (table.bottom<=96).all() and table.visible.between(0, 1).all()
    assert not table.duplicated(['frame','pid']).any()

def test_people_move_meet_and_come_back():
    table = synth_clip(n_frames=200, size=(96,160)).table
    middles = table.assign(x=(table.left+table.right)/2)
    steps = middles.groupby('pid').apply(lambda rows: rows.x.diff().abs()[rows.frame.diff()==1].median())
    assert (steps>1).all() and (steps<6).all()
    assert (table.visible<.5).sum()>20
    gaps = table.groupby('pid').frame.apply(lambda frames: (frames.diff()>1).sum())
    assert (gaps>=1).sum()>=4

def test_a_clip_is_the_same_again(clip):
    again = synth_clip(n_people=5, n_frames=60, size=(96,160))
    assert again.table.equals(clip.table) and all(map(np.array_equal, again.frames, clip.frames))
    assert not np.array_equal(synth_clip(5, 1, (96,160), seed=1).frames[0], clip.frames[0])

def test_nobody_is_seen_where_nobody_is(clip):
    empty = synth_clip(n_people=1, n_frames=60, size=(96,160))
    some = [t for t in range(60) if t not in set(empty.table.frame)]
    assert all(np.array_equal(empty.frames[some[0]], empty.frames[t]) for t in some)

@pytest.mark.parametrize('kwargs', [dict(n_people=0), dict(n_people=100), dict(n_frames=-1), dict(size=(10,99))])
def test_what_cannot_be_drawn(kwargs):
    with pytest.raises(ValueError, match='give 1 to 99 people'): synth_clip(**kwargs)

# adapters

def test_adapters_take_their_projects_boxes_and_colours(clip):
    rgb,corners = clip.frames[0],corners_of(clip, 0)
    centres = np.c_[(corners[:, :2]+corners[:, 2:])/2, corners[:, 2:]-corners[:, :2], np.ones(len(corners))]
    expected = [rgb[int(t):int(b), int(l):int(r)].mean((0,1))+1 for l,t,r,b in corners]
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    assert np.allclose(ForBoxmot(Colours()).get_features(np.c_[corners, corners], bgr), expected)
    assert np.allclose(ForUltralytics(Colours())(bgr, centres), expected)
    assert np.allclose(ForLibreYolo(Colours())(rgb, np.c_[corners, corners[:, :1]]), expected)

@pytest.mark.filterwarnings('ignore:.*have no pixels')
def test_boxes_without_pixels(clip):
    outside = np.array([[-50.,-50,-10,-10]])
    assert ForBoxmot(Colours()).get_features(outside, clip.frames[0]).tolist()==[[1,1,1]]
    assert ForLibreYolo(Colours())(clip.frames[0], outside).tolist()==[[1,1,1]]
    assert ForUltralytics(Colours())(clip.frames[0], outside)==[None]

@pytest.mark.parametrize('boxes', [[], np.empty((0,4)), np.empty((0,6))])
def test_no_boxes(clip, boxes):
    assert ForBoxmot(Colours()).get_features(boxes, clip.frames[0]).shape==(0,3)
    assert ForLibreYolo(Colours())(clip.frames[0], boxes).shape==(0,3)
    assert ForUltralytics(Colours())(clip.frames[0], boxes)==[]
