"Our embeddings in other projects' trackers, by their own code; each test is skipped where the project is not installed"
from types import SimpleNamespace

import numpy as np
import pytest

import pyramidreid.export.model_files  # noqa: F401, adds trained.to_onnx
from pyramidreid.boxes import BoxEmbedder
from pyramidreid.synth.clip import synth_clip
from pyramidreid.video.trackers import ForBoxmot, ForLibreYolo, ForUltralytics


class Colours(BoxEmbedder):
    "Mean colour of the upper and the lower half of a crop, RGB"
    fingerprint,pixel_range = 'colours',None
    def __init__(self): self.n_embedded = 0
    def embed(self, crops):
        self.n_embedded += len(crops)
        halves = [np.array_split(np.asarray(crop, float), 2) for crop in crops]
        return np.array([[half.mean((0,1)) for half in pair] for pair in halves]).reshape(-1, 6)-100

@pytest.fixture(scope='module')
def clip(): return synth_clip(n_people=5, n_frames=40, size=(120,200))

@pytest.fixture
def colours(): return Colours()

def frames(clip):
    "Frames as OpenCV reads them, and the corners of their boxes"
    for t,frame in enumerate(clip.frames):
        seen = clip.table[(clip.table.frame==t) & (clip.table.visible>.3)]
        yield np.ascontiguousarray(frame[..., ::-1]),seen[['left','top','right','bottom']].to_numpy(float)

def scored(corners): return np.c_[corners, np.full(len(corners), .9), np.zeros(len(corners))]

@pytest.mark.parametrize('name,settings', [
    ('BotSort', {}), ('StrongSort', {}), ('DeepOcSort', {}), ('BoostTrack', dict(use_embeddings=True)),
    ('HybridSort', {})])
def test_boxmot(clip, colours, name, settings):
    boxmot = pytest.importorskip('boxmot', reason='boxmot is not installed')
    tracker = getattr(boxmot, name)(reid_model=ForBoxmot(colours), **settings)
    found = [tracker.update(scored(corners), frame) for frame,corners in frames(clip)]
    assert sum(map(len, found))>60 and colours.n_embedded>60

def test_boxmots_own_features_have_our_shape(clip, colours):
    pytest.importorskip('boxmot', reason='boxmot is not installed')
    frame,corners = next(frames(clip))
    assert ForBoxmot(colours).get_features(corners, frame).shape==(len(corners),6)

def test_oriented_boxes_are_refused(colours):
    with pytest.raises(ValueError, match='upright'): ForBoxmot(colours).get_features(np.zeros((2,5)), None)

@pytest.mark.filterwarnings('ignore')
def test_boxmot_reads_an_onnx_file(clip, trained, tmp_path):
    "Its own backend resizes crops and normalises them; the file has the inverse inside"
    pytest.importorskip('boxmot', reason='boxmot is not installed')
    pytest.importorskip('onnxscript', reason='the onnx extra is not installed')
    import torch
    from boxmot.reid.backends.onnx_backend import ONNXBackend
    file = trained.to_onnx(tmp_path/'person.onnx', layout='nchw-imagenet')
    backend = ONNXBackend(file, torch.device('cpu'), False)
    frame,corners = next(frames(clip))
    theirs,ours = backend.get_features(corners, frame),trained.embed_boxes(frame, corners)
    assert theirs.shape==ours.shape and (theirs*ours).sum(1).min()>.95 # they resize crops otherwise

def ultralytics_tracker(**more):
    from ultralytics.trackers.bot_sort import BOTSORT
    return BOTSORT(SimpleNamespace(**{**dict(
        track_high_thresh=.25, track_low_thresh=.1, new_track_thresh=.25, track_buffer=30, match_thresh=.8,
        fuse_score=True, gmc_method=None, proximity_thresh=.5, appearance_thresh=.8, with_reid=False, model='auto',
        device='cpu'), **more}))

def ultralytics_tracks(tracker, clip):
    from ultralytics.engine.results import Boxes
    return [tracker.update(Boxes(scored(corners), frame.shape[:2]), frame) for frame,corners in frames(clip)]

def test_ultralytics(clip, colours):
    pytest.importorskip('ultralytics', reason='ultralytics is not installed')
    tracker = ultralytics_tracker()
    tracker.args.with_reid,tracker.args.model,tracker.encoder = True,'ours',ForUltralytics(colours)
    assert sum(map(len, ultralytics_tracks(tracker, clip)))>60 and colours.n_embedded>60

@pytest.mark.filterwarnings('ignore')
def test_ultralytics_reads_an_onnx_file(clip, trained, tmp_path):
    pytest.importorskip('ultralytics', reason='ultralytics is not installed')
    pytest.importorskip('onnxscript', reason='the onnx extra is not installed')
    file = trained.to_onnx(tmp_path/'person.onnx', layout='nchw')
    tracker = ultralytics_tracker(with_reid=True, model=str(file))
    assert tracker.encoder.imgsz==(48,24) # the model's
    assert sum(map(len, ultralytics_tracks(tracker, clip)))>60
    frame,corners = next(frames(clip))
    centres = np.c_[(corners[:, :2]+corners[:, 2:])/2, corners[:, 2:]-corners[:, :2]]
    theirs,ours = np.stack(tracker.encoder(frame, centres)),trained.embed_boxes(frame, corners)
    assert (theirs*ours).sum(1).min()>.9 # they enlarge each box, and resize crops otherwise

def test_libreyolo(clip, colours):
    tracking = pytest.importorskip('libreyolo.tracking.deepocsort', reason='libreyolo is not installed')
    import torch
    from libreyolo.utils.results import Boxes, Results
    tracker,found = tracking.DeepOCSortTracker(embedder=ForLibreYolo(colours)),[]
    for frame,corners in frames(clip):
        rows = torch.tensor(scored(corners), dtype=torch.float32)
        results = Results(boxes=Boxes(rows[:, :4], rows[:, 4], rows[:, 5]), orig_shape=frame.shape[:2])
        found.append(len(tracker.update(results, np.ascontiguousarray(frame[..., ::-1])).boxes))
    assert sum(found)>60 and colours.n_embedded>60

def test_supervision(clip, colours):
    supervision = pytest.importorskip('supervision', reason='supervision is not installed')
    for frame,corners in frames(clip):
        rows = colours.embed_boxes(frame, supervision.Detections(xyxy=corners))
        assert np.array_equal(rows, colours.embed_boxes(frame, corners))
    assert colours.embed_boxes(frame, supervision.Detections.empty()).shape==(0,6)

def test_norfair(clip, colours):
    norfair = pytest.importorskip('norfair', reason='norfair is not installed')
    def apart(track, other): return float(abs(track.last_detection.embedding-other.last_detection.embedding).mean())
    tracker = norfair.Tracker(distance_function='iou', distance_threshold=.7, reid_distance_function=apart,
                              reid_distance_threshold=20, reid_hit_counter_max=50)
    found = []
    for frame,corners in frames(clip):
        rows = colours.embed_boxes(frame, corners)
        found.append(tracker.update([norfair.Detection(points=box.reshape(2, 2), embedding=row)
                                     for box,row in zip(corners, rows)]))
    assert sum(map(len, found))>40

def test_deep_sort_realtime(clip, colours):
    module = pytest.importorskip('deep_sort_realtime.deepsort_tracker', reason='deep-sort-realtime is not installed')
    tracker,found = module.DeepSort(embedder=None, n_init=1),[]
    for frame,corners in frames(clip):
        boxes = np.c_[corners[:, :2], corners[:, 2:]-corners[:, :2]]
        embs = colours.embed_boxes(frame, boxes, 'xywh')
        found.append(tracker.update_tracks([(list(box), .9, 0) for box in boxes], embeds=embs))
    assert sum(map(len, found))>60
