"""Other projects' trackers with and without our embeddings, on a drawn clip in which people cross and come back:
`python benchmarks/trackers.py [--model NAME] [--seeds 3]`
Projects that are not installed are left out. The boxes are those of the drawing, of everyone who is a third visible."""
import argparse
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
from common import circumstances, markdown, results, write_table
from scipy.optimize import linear_sum_assignment


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', default='market1501-lite0', help='name of a pretrained model')
    add('--people', type=int, default=8)
    add('--frames', type=int, default=300)
    add('--seeds', type=int, default=3, help='clips')
    add('--only', nargs='+', choices=list(TRACKERS), help='these trackers; what is noted of the others is kept')
    add('--out', default='trackers', help='name of the results')
    return parser.parse_args(argv)

# ---- trackers: a function of the model, None for no embeddings, that returns a function of a frame (BGR) and corners,
# which returns rows of corners and a track's number

def boxmot(model, name='BotSort', **settings):
    import boxmot

    from pyramidreid.video.trackers import ForBoxmot
    settings |= dict(use_embeddings=False) if model is None else dict(reid_model=ForBoxmot(model))
    tracker = getattr(boxmot, name)(**settings)
    def update(frame, corners): return np.asarray(tracker.update(scored(corners), frame)).reshape(-1, 8)[:, :5]
    return update

def ultralytics(model):
    from ultralytics.engine.results import Boxes
    from ultralytics.trackers.bot_sort import BOTSORT

    from pyramidreid.video.trackers import ForUltralytics
    tracker = BOTSORT(SimpleNamespace(
        track_high_thresh=.25, track_low_thresh=.1, new_track_thresh=.25, track_buffer=30, match_thresh=.8,
        fuse_score=True, gmc_method=None, proximity_thresh=.5, appearance_thresh=.8, with_reid=False, model='auto'))
    if model is not None: tracker.args.with_reid,tracker.args.model,tracker.encoder = True,'ours',ForUltralytics(model)
    def update(frame, corners):
        return np.asarray(tracker.update(Boxes(scored(corners), frame.shape[:2]), frame)).reshape(-1, 8)[:, :5]
    return update

def norfair(model):
    import norfair
    def apart(one, other): return float(1-one.last_detection.embedding@other.last_detection.embedding)
    reid = {} if model is None else dict(reid_distance_function=apart, reid_distance_threshold=.4,
                                         reid_hit_counter_max=200)
    tracker = norfair.Tracker(distance_function='iou', distance_threshold=.7, initialization_delay=1, **reid)
    def update(frame, corners):
        rows = [None]*len(corners) if model is None else model.embed_boxes(frame, corners)
        found = [norfair.Detection(points=box.reshape(2, 2), embedding=row) for box,row in zip(corners, rows)]
        tracks = [track for track in tracker.update(found) if track.last_detection in found]
        return np.array([[*track.last_detection.points.ravel(), track.id] for track in tracks]).reshape(-1, 5)
    return update

def libreyolo(model):
    import torch
    from libreyolo.tracking.deepocsort import DeepOCSortTracker
    from libreyolo.tracking.ocsort import OCSortTracker
    from libreyolo.utils.results import Boxes, Results

    from pyramidreid.video.trackers import ForLibreYolo
    tracker = OCSortTracker() if model is None else DeepOCSortTracker(embedder=ForLibreYolo(model))
    def update(frame, corners):
        rows = torch.tensor(scored(corners), dtype=torch.float32)
        results = Results(boxes=Boxes(rows[:, :4], rows[:, 4], rows[:, 5]), orig_shape=frame.shape[:2])
        rgb = np.ascontiguousarray(frame[..., ::-1])
        found = tracker.update(results) if model is None else tracker.update(results, rgb)
        if not len(found.boxes): return np.zeros((0,5))
        return np.c_[np.asarray(found.boxes.xyxy), np.asarray(found.track_id)]
    return update

def deep_sort_realtime(model):
    from deep_sort_realtime.deepsort_tracker import DeepSort
    tracker = DeepSort(embedder=None, n_init=1, max_age=200)
    def update(frame, corners):
        boxes = np.c_[corners[:, :2], corners[:, 2:]-corners[:, :2]]
        embs = np.ones((len(boxes),2)) if model is None else model.embed_boxes(frame, boxes, 'xywh')
        tracks = tracker.update_tracks([(list(box), .9, 0) for box in boxes], embeds=embs)
        seen = [track for track in tracks if track.time_since_update==0]
        return np.array([[*track.to_ltrb(orig=True), int(track.track_id)] for track in seen]).reshape(-1, 5)
    return update

def scored(corners): return np.c_[corners, np.full(len(corners), .9), np.zeros(len(corners))]

TRACKERS = {
    'boxmot BotSort': lambda model: boxmot(model, use_cmc=False),
    'boxmot BoostTrack': lambda model: boxmot(model, 'BoostTrack', use_embeddings=True, use_cmc=False),
    'ultralytics BoT-SORT': ultralytics, 'libreyolo OC-SORT, Deep OC-SORT': libreyolo, 'norfair': norfair,
    'deep-sort-realtime': deep_sort_realtime}

# ---- against the truth

def overlaps(a, b):
    "Intersection over union of all pairs of corners, (A, B)"
    lower,upper = np.maximum(a[:, None, :2], b[None, :, :2]),np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = (upper-lower).clip(0).prod(2)
    areas = [(o[:, 2:]-o[:, :2]).prod(1) for o in (a, b)]
    return inside/(areas[0][:, None]+areas[1][None, :]-inside)

def run(make, model, clip):
    "Pids, identities (None: no track) and frames of all boxes, and the number of boxes of tracks"
    try: update = make(model)
    except ImportError: return None
    pids,identities,times,n_boxes = [],[],[],0
    for t,frame in enumerate(clip.frames):
        seen = clip.table[(clip.table.frame==t) & (clip.table.visible>1/3)]
        corners = seen[['left','top','right','bottom']].to_numpy(float)
        tracks = update(np.ascontiguousarray(frame[..., ::-1]), corners)
        found,near = [None]*len(seen),overlaps(corners, tracks[:, :4])
        for i,j in zip(*linear_sum_assignment(-near)):
            if near[i,j]>=.5: found[i] = int(tracks[j, 4])
        pids += seen.pid.tolist()
        identities += found
        times += [t]*len(seen)
        n_boxes += len(tracks)
    return pids,identities,times,n_boxes

def scores(pids, identities, times, n_boxes):
    "ID switches and IDF1, in which a missing track and one too many are mistakes"
    from pyramidreid.evaluation.identities import identity_switches
    counts = pd.crosstab(pd.Series(pids), pd.Series(identities, dtype=object)).to_numpy()
    rows,columns = linear_sum_assignment(-counts)
    return dict(switches=identity_switches(pids, identities, times), tracks=counts.shape[1],
                IDF1=2*int(counts[rows,columns].sum())/(len(pids)+n_boxes))

ABOUT_SETTINGS = (
    "Camera motion compensation is off in boxmot. deep-sort-realtime keeps lost tracks for 200 frames, and without "
    "embeddings all boxes look alike to it. norfair keeps them for 200 frames with embeddings only, at a distance up "
    "to 0.4. libreyolo's OC-SORT and Deep OC-SORT differ in appearance only. Theirs, ultralytics' and "
    "all other settings are the projects' own, with lost tracks kept for 30 frames.")

def noted_others(args):
    "The commands and rows of trackers that are not run again. Raises `ValueError` if they are of other clips"
    file = results/f'{args.out}.json'
    if not args.only or not file.exists(): return [],[]
    note = json.loads(file.read_text())
    if (note['people'],note['frames'])!=(args.people,args.frames):
        raise ValueError(f"{file.name} is of {note['people']} people and {note['frames']} frames: run all trackers")
    return note['command'].split(' && '),[row for row in note['runs'] if row['name'] not in args.only]

def main(argv=None):
    args = parse(argv)
    from pyramidreid.all import load_pretrained
    from pyramidreid.synth.clip import synth_clip
    model,(commands,rows) = load_pretrained(args.model),noted_others(args)
    for seed in range(args.seeds):
        clip = synth_clip(args.people, args.frames, seed=seed)
        for name in args.only or TRACKERS:
            make = TRACKERS[name]
            for with_reid in (False,True):
                found = run(make, model if with_reid else None, clip)
                if found is None: continue
                rows.append(dict(name=name, embeddings=with_reid, seed=seed, **scores(*found)))
                print(rows[-1], flush=True)
    rows.sort(key=lambda row: list(TRACKERS).index(row['name']))
    note = dict(circumstances(), people=args.people, frames=args.frames, runs=rows)
    note['command'] = ' && '.join(dict.fromkeys([*commands, note['command']]))
    (results/f'{args.out}.json').write_text(json.dumps(note, indent=1))
    means = pd.DataFrame(rows).groupby(['name','embeddings'], sort=False)[['switches','tracks','IDF1']].mean()
    shown = means.unstack().round(3)
    shown.columns = [f"{column} {'with' if with_reid else 'without'}" for column,with_reid in shown.columns]
    text = (f'{args.people} people, {args.frames} frames, means of {args.seeds} clips; embeddings of {args.model}. '
            f'{ABOUT_SETTINGS}')
    write_table(args.out, "Other projects' trackers with and without our embeddings", markdown(shown), text)

if __name__=='__main__': main()
