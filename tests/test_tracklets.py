"Pooled embeddings against plain loops, and the evaluation of tracklets"
import numpy as np
import pandas as pd
import pytest
import torch

from pyramidreid.all import ReIDDataLoaders, ReIDResult, Role
from pyramidreid.evaluation.retrieval import evaluate
from pyramidreid.evaluation.tracklets import first_rows, group_codes, pool_embeddings, pool_table

RNG = np.random.default_rng(0)

def plain_groups(values):
    "Rows of equal values, in the order of their first row"
    groups = {}
    for i,value in enumerate(values): groups.setdefault(value, []).append(i)
    return list(groups.values())

def plain_pooled(embs, values, how, weights=None):
    result = []
    for rows in plain_groups(values):
        if how=='max': row = [max(embs[i][d] for i in rows) for d in range(embs.shape[1])]
        else: row = [sum(embs[i][d]*(1 if weights is None else weights[i]) for i in rows) for d in range(embs.shape[1])]
        length = sum(value**2 for value in row)**.5
        result.append([value/length for value in row])
    return np.array(result)

@pytest.mark.parametrize('how', ['mean','max','weighted'])
@pytest.mark.parametrize('as_tensor', [False,True])
def test_pooling_equals_plain_loops(how, as_tensor):
    embs,by = RNG.normal(size=(60,7)).astype(np.float32),RNG.integers(0, 9, 60)
    weights = RNG.uniform(.1, 1, 60) if how=='weighted' else None
    given = torch.tensor(embs) if as_tensor else embs
    pooled = pool_embeddings(given, by, how, weights)
    assert isinstance(pooled, torch.Tensor)==as_tensor and pooled.dtype==given.dtype
    assert np.allclose(np.asarray(pooled), plain_pooled(embs, by.tolist(), how, weights), atol=1e-6)

@pytest.mark.parametrize('values', [list('abcabc'), [3,1,3,2], [1.5,1.5], ['a'], [], pd.Series([2,2,1], index=[9,8,7])])
def test_groups_are_numbered_in_the_order_of_their_first_rows(values):
    codes = group_codes(values)
    assert [np.flatnonzero(codes==code).tolist() for code in range(len(set(codes)))]==plain_groups(list(values))
    assert first_rows(codes).tolist()==[rows[0] for rows in plain_groups(list(values))]

def test_missing_values_are_groups_of_their_own():
    for values in ([1,None,1,None], [1.,np.nan,1.,np.nan], ['a',None,'a',pd.NA]):
        assert group_codes(values).tolist()==[0,1,0,2]
    table = pd.DataFrame(dict(pid=[1,1,1,1], track=[5,None,5,None]))
    assert group_codes(table).tolist()==[0,1,0,2]

@pytest.mark.parametrize('kwargs,said', [
    (dict(how='median'), "'weighted'"), (dict(by=[1]), '1 entries for 3'), (dict(weights=[1,1,1]), 'go together'),
    (dict(how='weighted'), 'go together'), (dict(how='weighted', weights=[1,-1,1]), 'not negative'),
    (dict(how='weighted', weights=[1,1]), '3 finite'), (dict(how='weighted', weights=[0,0,1]), 'each group'),
    (dict(how='weighted', weights=[1,np.nan,1]), 'finite')])
def test_wrong_arguments(kwargs, said):
    with pytest.raises(ValueError, match=said): pool_embeddings(np.eye(3), **{'by':[0,0,1], **kwargs})

def test_a_track_of_two_people_or_cameras_is_refused():
    items = pd.DataFrame(dict(pid=['ann','ann','ben'], cam=[1,1,2], track=[1,1,2]))
    assert pool_table(items, 'track')[1].pid.tolist()==['ann','ben']
    for change in (dict(track=[1,2,2]), dict(cam=[1,2,2])):
        with pytest.raises(ValueError, match='have more than one'): pool_table(items.assign(**change), 'track')
    with pytest.raises(ValueError, match="no such column; there are 'pid', 'cam', 'track'"): pool_table(items, 'tracks')

# by a learner

@pytest.fixture(scope='module')
def tracked(trained):
    "The table of queries and gallery with tracks, of up to three pictures of a person by a camera"
    items = trained.dls.valid.dataset.items.reset_index(drop=True)
    place = items.groupby(['pid','cam','role'], sort=False).cumcount()//3
    items['track'] = [f'{pid}/{cam}/{role}/{n}' for pid,cam,role,n in zip(items.pid, items.cam, items.role, place)]
    return items

def plain_evaluation(learn, items, groups_of_queries, groups_of_gallery):
    emb = learn.embed(list(items.fn)).numpy()
    is_query = (items.role==Role.QUERY).to_numpy()
    sides = []
    for rows,groups in ((np.flatnonzero(is_query), groups_of_queries), (np.flatnonzero(~is_query), groups_of_gallery)):
        members = [rows[np.array(o)] for o in plain_groups(groups(items.iloc[rows]))]
        mean = np.array([emb[o].sum(0) for o in members])
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        firsts = items.iloc[[o[0] for o in members]]
        sides.append((torch.tensor(mean), firsts.label.to_numpy(), firsts.camera.to_numpy()))
    (q,qp,qc),(g,gp,gc) = sides
    return evaluate(q, g, qp, gp, qc, gc)

def tracks(rows): return rows.track.tolist()
def people_and_cameras(rows): return list(zip(rows.pid, rows.cam))
def each(rows): return list(range(len(rows)))

@pytest.mark.parametrize('by,of_queries,of_gallery', [
    ('track', tracks, tracks), (dict(query=['pid','cam']), people_and_cameras, each),
    (dict(gallery='track'), each, tracks)])
def test_evaluation_of_tracklets_equals_a_plain_one(trained, tracked, by, of_queries, of_gallery):
    dl = trained.dls.test_dl(tracked, with_labels=True)
    card = trained.evaluate(dl, by=by)
    expected = plain_evaluation(trained, tracked, of_queries, of_gallery)
    assert card.mAP==pytest.approx(expected.mAP, abs=1e-6) and card.mINP==pytest.approx(expected.mINP, abs=1e-6)
    assert torch.equal(card.cmc, expected.cmc)
    assert 'mean: ' in card.about['pooling'] and 'pooling' not in trained.evaluate(dl).about

def test_pictures_one_by_one_are_as_without_tracks(trained, tracked):
    dl = trained.dls.test_dl(tracked, with_labels=True)
    assert trained.evaluate(dl, by='fn').mAP==pytest.approx(trained.evaluate(dl).mAP, abs=1e-6)

def test_a_calibration_of_tracklets(trained, tracked):
    "As of a matrix of the distances between their mean embeddings"
    dl = trained.dls.test_dl(tracked, with_labels=True)
    found = trained.calibrate(dl, by='track', far=.1)
    sides = []
    for role in (Role.QUERY, Role.GALLERY):
        rows = tracked[tracked.role==role]
        embs = pool_embeddings(trained.embed(list(rows.fn)), rows.track)
        firsts = rows.drop_duplicates('track')
        sides.append((embs, firsts.label.to_numpy(), firsts.camera.to_numpy()))
    (q,q_pids,q_cams),(g,g_pids,g_cams) = sides
    best = []
    for i in range(len(q)):
        others = (g_pids!=q_pids[i]) & (g_pids>=0)
        best.append(float((g[torch.from_numpy(others)]@q[i]).max()))
    assert np.allclose(sorted(found.impostor), sorted(best), atol=1e-5)

@pytest.mark.parametrize('by,said', [
    ('nope', 'no such column'), ({}, "'query' or 'gallery'"), (dict(queries='track'), "'query' or 'gallery'")])
def test_a_wrong_by(trained, tracked, by, said):
    dl = trained.dls.test_dl(tracked, with_labels=True)
    with pytest.raises(ValueError, match=said): trained.evaluate(dl, by=by)

def test_evaluate_on_passes_it_on(trained, tracked, tmp_path):
    trained.evaluate_on({'again': tracked}, path=tmp_path, by='track')
    dl = trained.dls.test_dl(tracked, with_labels=True)
    found = ReIDResult.from_json(tmp_path/'again.json')
    assert found.mAP==pytest.approx(trained.evaluate(dl, by='track').mAP, abs=1e-6) and 'pooling' in found.about

def test_tracks_come_from_a_csv_file(people, tmp_path):
    table = pd.DataFrame(dict(fn=sorted(map(str, (people/'query').glob('*.jpg')))))
    table['pid'] = [name.split('/')[-1][:4] for name in table.fn]
    table['track'] = table.pid
    table.to_csv(tmp_path/'t.csv', index=False)
    dls = ReIDDataLoaders.from_csv(tmp_path/'t.csv', p=2, k=2, size=(48,24), num_workers=0)
    assert 'track' in dls.train.dataset.items

def test_weights_are_for_pool_embeddings_only(trained, tracked):
    dl = trained.dls.test_dl(tracked, with_labels=True)
    with pytest.raises(ValueError, match="choose 'mean' or 'max'"): trained.evaluate(dl, by='track', how='weighted')

@pytest.mark.parametrize('embs,said', [
    (np.array([[1,2],[3,4]]), 'floating-point'), (np.array([[1.,np.nan],[3,4]]), 'finite'), (np.ones(2), 'N, D'),
    (np.array([[1.,2],[-1,-2]]), 'cancel')])
def test_what_has_no_mean_is_refused(embs, said):
    with pytest.raises(ValueError, match=said): pool_embeddings(embs, [0,0])
