"The gallery: searches against brute force, filters, models, and what the errors say"
import random
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from gallery_toys import (
    KEYS,
    VALUES,
    BandModel,
    NaiveGallery,
    add_rows,
    calibration_of,
    embeddings,
    pictures,
    random_filters,
    random_rows,
    without_gaps,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip('faiss', reason='needs the extra gallery')
pytest.importorskip('pyarrow', reason='needs the extra gallery')

from pyramidreid import images
from pyramidreid.cli.frame import Console
from pyramidreid.cli.inputs import embed_files
from pyramidreid.core import ReIDWarning
from pyramidreid.data.cache import decode_images
from pyramidreid.evaluation.openset import Calibration
from pyramidreid.gallery import gallery as gallery_module
from pyramidreid.gallery import store
from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.nearest import (
    RowBlocks,
    exact_search,
    nearest_rows,
    normalize_rows,
    read_index,
    train_index,
)


@pytest.fixture
def files(tmp_path):
    "Six pictures of two people from two cameras, one every hour"
    paths = [tmp_path/f'{i}.png' for i in range(6)]
    for path,pixels in zip(paths, pictures(6)): Image.fromarray(pixels).save(path)
    times = pd.date_range('2026-11-23 08:00', periods=6, freq='h')
    return pd.DataFrame(dict(fn=paths, pid=[1,1,1,2,2,2], cam=['door','hall']*3, time=times))

@pytest.fixture
def gallery(files): return Gallery.from_learner(BandModel(), files)

@pytest.fixture
def alive(monkeypatch):
    "Pixels of the RGB pictures that exist at the same time, at most, in a list of one"
    lock,now,most,convert = threading.Lock(),[0],[0],Image.Image.convert
    def count(n):
        with lock:
            now[0] += n
            most[0] = max(most[0], now[0])
    def counted(self, *args, **kwargs):
        res = convert(self, *args, **kwargs)
        n = res.width*res.height
        count(n)
        weakref.finalize(res, count, -n)
        return res
    monkeypatch.setattr(Image.Image, 'convert', counted)
    return most

@pytest.fixture
def large_files(tmp_path):
    "32 pictures of 10,000 pixels"
    files = [tmp_path/f'{i}.png' for i in range(32)]
    for i,file in enumerate(files): Image.new('RGB', (200,50), (i,2*i,255-i)).save(file)
    return files

def test_the_pixels_of_full_size_are_bounded(large_files, alive, monkeypatch):
    monkeypatch.setattr(gallery_module, '_MOST_PIXELS', 50_000, raising=False)
    gallery = Gallery.from_learner(BandModel(), large_files)
    assert 10_000<=alive[0]<=50_000
    assert gallery.keys.keys()==set(map(str, large_files))
    expected = [Gallery(BandModel()).embed([file]).values[0] for file in large_files]
    assert np.array_equal(gallery.embed(large_files).values, expected)

@pytest.mark.parametrize('reader', ['cache','command line'])
def test_a_large_file_is_resized_before_the_next_is_decoded(large_files, alive, monkeypatch, reader):
    monkeypatch.setattr(images, '_LARGE_PIXELS', 10_000)
    if reader=='cache': pixels = np.concatenate(list(decode_images(large_files, (5,4), 16))).transpose(0, 2, 3, 1)
    else:
        model = SimpleNamespace(size=(5,4), run=lambda x: x)
        pixels = embed_files(Console(quiet=True), model, large_files)
    assert alive[0]==10_000
    assert pixels.shape==(32,5,4,3) and pixels[:,0,0,1].tolist()==[2*i for i in range(32)]

def numbered(n, **columns): return pd.DataFrame(dict(key=[str(i) for i in range(n)], **columns))
def keys_of(files): return [str(fn) for fn in files.fn]

# Searching

def test_against_brute_force(gallery, files):
    model = BandModel()
    q = model.embed([Image.fromarray(o) for o in pictures(3, 7)])
    g = model.embed([Image.open(fn) for fn in files.fn])
    sims = normalize_rows(q)@normalize_rows(g).T
    found = gallery.search(pictures(3, 7), k=6)
    for i in range(3):
        rows = found[found['query']==i]
        order = np.argsort(-sims[i], kind='stable')
        assert rows.key.tolist()==[str(files.fn[o]) for o in order]
        assert np.allclose(rows.similarity, sims[i,order], atol=1e-6)
        assert rows.pid.tolist()==files.pid[order].tolist()
        assert rows.time.tolist()==files.time[order].tolist()
    one = gallery.search(pictures(3, 7)[1], k=6)
    assert 'query' not in one
    assert one.key.tolist()==found.key[found['query']==1].tolist()

def test_kinds_of_queries(gallery, files):
    fn = files.fn[2]
    for query in (fn, str(fn), Image.open(fn), np.asarray(Image.open(fn)), gallery.embed([fn])):
        found = gallery.search(query, k=2)
        assert found.key[0]==str(fn)
        assert found.similarity[0]>.999999
        assert 'query' not in found
    assert gallery.search([fn], k=1)['query'].tolist()==[0]
    assert gallery.search(gallery.embed([fn,fn]), k=1)['query'].tolist()==[0,1]

def test_queries_in_a_column(gallery, files):
    pd.testing.assert_frame_equal(gallery.search(files.fn, 2), gallery.search(files.fn.tolist(), 2))
    assert len(gallery.embed(files.fn[2:]))==4

def test_filters(gallery, files):
    def search(**filters): return gallery.search(files.fn[0], 6, **filters)
    assert set(search(exclude_cam='door').cam)=={'hall'}
    assert search(exclude_cam=['door','hall']).empty
    assert set(search(since='2026-11-23 11:00').pid)=={2}
    assert search(since=pd.Timestamp('2026-11-23 12:00'), exclude_cam='hall').key.tolist()==[str(files.fn[4])]
    assert len(search(where='pid==2 and cam!="door"'))==2
    assert len(search(where=lambda t: t.pid==1))==3
    assert search(where='time=="2026-11-23 12:00"').key.tolist()==[str(files.fn[4])]
    assert len(search(threshold=.9999))==1
    assert len(gallery.search([files.fn[0]]*2, 2, where='pid==2'))==4

@pytest.mark.parametrize('args,message', [
    (dict(k=0), 'k must be at least 1'),
    (dict(k=-1), 'k must be at least 1'),
    (dict(where='dor=="x"'), 'dor'),
    (dict(where='pid'), 'True or False'),
    (dict(where='pid=1'), 'compare with =='),
    (dict(where='cam in @x'), 'variables cannot be read'),
    (dict(where='fn.to_csv("stolen.csv")'), 'not allowed'),
    (dict(where='pid==1 and time != "noon or so"'), 'date and time'),
    (dict(where=lambda t: [True]), 'each of the 6'),
    (dict(where=lambda t: t.nobody), 'AttributeError'),
    (dict(exclude_cam=1), 'excludes nothing'),
    (dict(since='noon or so'), "since='noon or so'"),
    (dict(since='2026-11-23 08:00+01:00'), 'time zone'),
    (dict(since=1893456000), 'since='),
    (dict(since='01.02.2026'), 'since='),
    (dict(since=pd.NaT), 'a single date and time is needed'),
    (dict(since=['2026-11-23']), 'a single date and time'),
    (dict(threshold=float('nan')), 'a threshold is a similarity'),
    (dict(threshold='high'), 'a threshold is a similarity'),
    (dict(far=.01), 'needs a calibration')])
def test_search_errors(gallery, files, args, message):
    with pytest.raises(ValueError, match=message): gallery.search(files.fn[0], **{'k':3, **args})

@pytest.mark.parametrize('k', [2.5,'3',None])
def test_k_is_an_integer(gallery, files, k):
    with pytest.raises(TypeError, match='k must be an integer'): gallery.search(files.fn[0], k)

def test_more_entries_than_there_are(gallery, files):
    found = gallery.search(files.fn[0], 1000)
    assert sorted(found.key)==sorted(gallery.table.key)
    pd.testing.assert_frame_equal(gallery.search(files.fn[0], len(gallery)), found)

def test_threshold_and_far_at_once(gallery, files):
    gallery.calibration = calibration_of(np.arange(10)/10, 6)
    with pytest.raises(ValueError, match='both set the threshold'): gallery.search(files.fn[0], 3, threshold=.5, far=.1)

@pytest.mark.parametrize('filters', [dict(exclude_cam='door'),dict(since='2026-11-23')])
def test_columns_that_do_not_exist(files, filters):
    g = Gallery.from_learner(BandModel(), files[['fn']])
    with pytest.raises(ValueError, match="needs a column"): g.search(files.fn[0], k=1, **filters)

@pytest.mark.parametrize('query,error,message', [
    ('text', FileNotFoundError, 'text'),
    (np.zeros((4,3), np.float32), ValueError, 'wrap embeddings'),
    (3, ValueError, 'int'),
    (None, ValueError, 'NoneType'),
    ([embeddings(1)], TypeError, 'one `Embeddings` with a row for each')])
def test_queries_that_are_not_valid(gallery, query, error, message):
    with pytest.raises(error, match=message): gallery.search(query, k=1)

@pytest.mark.parametrize('dtype', ['float32','float16'])
def test_entries_one_by_one_are_found_as_those_added_at_once(tmp_path, dtype):
    "With ties, removals and a replaced entry; before and after a save; in as few arrays"
    n,embs = 120,embeddings(120)
    embs.values[60:] = embs.values[:60] # each is there twice
    table = numbered(n, pid=np.arange(n)%7, cam=np.arange(n)%3)
    at_once = Gallery(BandModel(), dtype=dtype).add(table, embs=embs)
    one_by_one = Gallery(BandModel(), dtype=dtype)
    for i in range(n): one_by_one.add(table.iloc[[i]], embs=embs[i])
    for g in (at_once,one_by_one):
        for key in ('3','64','99'): g.remove(key)
        g.add(table.iloc[[3]], embs=embs[4])
    for filters in ({}, dict(exclude_cam=1), dict(where='pid>2')):
        expected = at_once.search(embs[:20], 9, **filters)
        pd.testing.assert_frame_equal(one_by_one.search(embs[:20], 9, **filters), expected)
    assert len(one_by_one.rows.blocks)==1
    for g,name in ((at_once,'at once'), (one_by_one,'g')): g.save(tmp_path/name) # leaves out the rows that are gone
    expected = at_once.search(embs[:20], 9)
    for g in (one_by_one, Gallery.load(tmp_path/'g', BandModel())):
        pd.testing.assert_frame_equal(g.search(embs[:20], 9), expected)

@pytest.mark.parametrize('crop', [np.zeros((0,4,3), np.uint8), Image.new('RGB', (4,0))], ids=['array','pil'])
def test_an_empty_crop_is_named_by_its_position(gallery, files, crop):
    items = [*pictures(2, 9), crop]
    with pytest.raises(ValueError, match='^image 2 has no pixels'): gallery.add(items, keys=['x','y','z'])
    assert len(gallery)==len(files)
    with pytest.raises(ValueError, match='^image 2 has no pixels'): gallery.search(items, 2)
    with pytest.raises(ValueError, match='^The image has no pixels'): gallery.search(crop, 2)
    with pytest.raises(ValueError, match='^image 129 has no pixels'): gallery.embed([*pictures(129), crop])

def test_embedding_nothing(trained, gallery):
    assert gallery.embed([]).values.shape==(0,9)
    assert Gallery(trained).embed([]).values.shape==(0,48)
    assert trained.embed([]).shape==(0,48)

def test_a_gallery_of_deep_pictures(tmp_path):
    "Scaled by the range of the model, which is asked for"
    counts = np.random.default_rng(0).integers(7600, 8000, (4,6,3), dtype=np.uint16)
    for i in range(4): Image.fromarray(counts[i]).save(tmp_path/f'{i}.png')
    fns,thermal = [tmp_path/f'{i}.png' for i in range(4)],BandModel()
    with pytest.raises(ValueError, match='0.png .*black and white is unknown'): Gallery.from_learner(BandModel(), fns)
    thermal.pixel_range = (7500,8100)
    g = Gallery.from_learner(thermal, fns)
    levels = np.rint((counts-7500.)/600*255).astype(np.uint8)
    expected = normalize_rows(BandModel().embed([Image.fromarray(o).convert('RGB') for o in levels]))
    assert np.allclose(g.store.segments[0].embs, expected, atol=1e-6)
    assert g.search(counts[2], 1).key[0]==str(fns[2])
    assert g.show(fns[2], k=2) is not None

def test_unknown_cameras_and_times(files):
    times = [pd.NaT]+files.time[1:].tolist()
    g = Gallery.from_learner(BandModel(), files.assign(cam=['door']+[None]*5, time=times))
    assert len(g.search(files.fn[0], 6, exclude_cam='door'))==5
    assert len(g.search(files.fn[0], 6, since='2000-01-01'))==5
    picture = pictures(1, 3)[0]
    g.add(picture, keys='x')
    assert g.search(picture, 7, where='pid==1').pid.tolist()==[1,1,1]

@pytest.mark.parametrize('unknown', [None,float('nan'),pd.NA])
def test_unknown_cameras_exclude_nothing(gallery, files, unknown):
    assert len(gallery.search(files.fn[0], 6, exclude_cam=[unknown]))==6
    assert set(gallery.search(files.fn[0], 6, exclude_cam=[unknown,'door']).cam)=={'hall'}

def test_cameras_in_any_collection(gallery, files):
    for cams in (pd.Index(['door']),pd.Series(['door']),{'door':1},np.array(['door']),(o for o in ['door'])):
        assert set(gallery.search(files.fn[0], 6, exclude_cam=cams).cam)=={'hall'}

def test_a_function_cannot_change_the_gallery(gallery, files):
    def greedy(table):
        table['cam'] = 'nowhere'
        return table.pop('pid')==1
    before = gallery.table
    assert len(gallery.search(files.fn[0], 6, where=greedy))==3
    pd.testing.assert_frame_equal(gallery.table, before)

# Calibration

def ten_strangers(n_gallery=6, **kwargs): return calibration_of(np.arange(10)/10, n_gallery, far=.1, **kwargs)

def test_calibration(gallery, files, tmp_path):
    calibration = ten_strangers(about=dict(model=gallery.fingerprint))
    gallery.calibration = calibration
    gallery.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', BandModel())
    assert again.calibration.to_json()==calibration.to_json()
    assert again.threshold(.1)==.9
    assert again.threshold(.2)==.8
    everyone = again.search(files.fn[0], 6)
    for far in (.1,.5):
        expected = everyone[everyone.similarity>=1-far]
        assert again.search(files.fn[0], 6, far=far).key.tolist()==expected.key.tolist()
    with pytest.raises(ValueError, match='10 impostor searches'): again.search(files.fn[0], 6, far=.01)

def test_a_calibration_can_be_removed(gallery, files, tmp_path):
    gallery.calibration = ten_strangers()
    gallery.save(tmp_path/'g')
    gallery.calibration = None
    gallery.save()
    again = Gallery.load(tmp_path/'g', BandModel())
    with pytest.raises(ValueError, match='this gallery has none'): again.search(files.fn[0], 6, far=.1)

def test_calibration_of_something_else(gallery):
    gallery.calibration = before = ten_strangers()
    for bad,error,message in (({.01:.9}, TypeError, 'not a calibration'),
                              ([.1,.2], TypeError, 'not a calibration'),
                              (ten_strangers(about=dict(model='another')), ValueError, "the gallery's own model"),
                              (Calibration(**{**vars(before), 'distance':'euclidean'}), ValueError, 'by cosine')):
        with pytest.raises(error, match=message): gallery.calibration = bad
        assert gallery.calibration is before

def test_gallery_that_outgrew_its_calibration(gallery):
    gallery.calibration = ten_strangers(n_gallery=3)
    assert gallery.threshold(.1)==.9
    gallery.add(pictures(2, 5), keys=['x','y'])
    with pytest.warns(UserWarning, match='searched 3 images, .* more than twice as many'): gallery.threshold(.1)

def test_calibrated_by_the_learner_itself(trained):
    "A search with `far` is the ranking of `evaluate` cut at the threshold: as often wrong as the calibration says"
    import pyramidreid.training.threshold_calibration  # noqa: F401, adds calibrate
    items = trained.dls.valid.items
    entries,queries = items[items.split=='gallery'],items[items.split=='query']
    gallery = Gallery.from_learner(trained, entries[['fn','pid','cam']])
    gallery.calibration = calibration = trained.calibrate(far=.2)
    def finds_a_stranger(query):
        return len(gallery.search(query.fn, len(gallery), where=f'pid!={query.pid}', far=.2))>0
    wrong = [finds_a_stranger(query) for query in queries.itertuples()]
    assert len(wrong)==len(calibration.impostor)
    assert np.mean(wrong)==pytest.approx(calibration.far_at(calibration.threshold())[0])

# Adding and removing

def test_add_and_remove(gallery, files):
    fn = files.fn[1]
    gallery.remove(fn)
    assert len(gallery)==5
    assert str(fn) not in gallery
    assert str(fn) not in gallery.search(fn, 5).key.tolist()
    gallery.add(files.iloc[1:2], note='again')
    assert gallery.search(fn, 1).note[0]=='again'
    assert len(gallery.add(pictures(2, 5), keys=['x','y'], cam='yard', pid=[7,8]))==8
    assert gallery.table.set_index('key').loc[['x','y']].pid.tolist()==[7,8]
    gallery.remove(['x','y','x'])
    assert len(gallery)==6

def test_unreadable_files_add_nothing(gallery, files, tmp_path):
    new,text,truncated = tmp_path/'new.png',tmp_path/'text.png',tmp_path/'truncated.png'
    Image.fromarray(pictures(1, 9)[0]).save(new)
    text.write_text('not a picture')
    truncated.write_bytes(files.fn[0].read_bytes()[:60])
    for bad,error,message in ((text, OSError, 'text.png'), (truncated, OSError, 'truncated.png'),
                              (tmp_path/'missing.png', FileNotFoundError, 'missing.png'),
                              (tmp_path, OSError, str(tmp_path))):
        with pytest.raises(error, match=message): gallery.add([new,bad])
        assert len(gallery)==6
        assert str(new) not in gallery

def test_known_and_repeated_keys_add_nothing(gallery, files, tmp_path):
    new = tmp_path/'new.png'
    Image.fromarray(pictures(1, 9)[0]).save(new)
    with pytest.raises(ValueError, match='first is .*0.png.*: remove it first'): gallery.add([new,files.fn[0]])
    with pytest.raises(ValueError, match='first is .*new.png'): gallery.add([new,new])
    assert len(gallery)==6
    assert str(new) not in gallery

def test_unknown_keys_remove_nothing(gallery, files):
    with pytest.raises(ValueError, match="1 of 2 keys are not in the gallery, the first is 'nobody'"):
        gallery.remove([files.fn[0],'nobody'])
    assert len(gallery)==6

BAD_COLUMNS = [
    (dict(pid='ann'), 'pid'),
    (dict(time='morning'), 'dates and times'),
    (dict(time='01.02.2026'), 'dates and times'),
    (dict(time=1700000000), 'numbers'),
    (dict(time=[17.5]*2), 'numbers'),
    (dict(query='x'), 'Choose another name'),
    (dict(similarity=1.), 'Choose another name')]

def test_columns_are_checked_before_anything_is_embedded(files):
    model = BandModel()
    g = Gallery.from_learner(model, files)
    n_embedded = model.n_embedded
    for columns,message in BAD_COLUMNS:
        with pytest.raises(ValueError, match=message): g.add(pictures(2, 7), keys=['x','y'], **columns)
    with pytest.raises(ValueError, match="no column 'fn'"): g.add(pd.DataFrame(dict(key=['x'])))
    twice_cam = pd.DataFrame([['x','a','b']], columns=['key','cam','cam'])
    with pytest.raises(ValueError, match="called 'cam'"): g.add(twice_cam)
    assert model.n_embedded==n_embedded
    assert len(g)==6

def test_add_errors(gallery, files):
    with pytest.raises(ValueError, match='keys='): gallery.add(pictures(1))
    with pytest.raises(ValueError, match='dates and times'): gallery.add(pictures(1), keys='x', time='soon')
    with pytest.raises(ValueError, match="'pid' held numbers"): gallery.add(pictures(1), keys='x', pid='ann')
    with pytest.raises(ValueError, match='have no key'): gallery.add(pictures(2), keys=['x',None])
    embs = gallery.embed(files.fn[:1].tolist())
    with pytest.raises(ValueError, match='1 embeddings for 2'):
        gallery.add(pd.DataFrame(dict(key=['x','y'])), embs=embs)
    assert len(gallery)==6
    assert 'x' not in gallery
    assert len(gallery.add([]))==6

@pytest.mark.parametrize('args,message', [
    (dict(keys=['x']), 'keys has 1 values for 2 entries'),
    (dict(keys=['x','y'], pid=[1,2,3]), 'pid has 3 values for 2 entries'),
    (dict(keys=['x','a\udcff']), 'not valid Unicode'),
    (dict(keys=['x','y'], pid=[2**70,1]), 'more than 64 bits')])
def test_values_that_do_not_fit(gallery, args, message):
    with pytest.raises(ValueError, match=message): gallery.add(pictures(2, 11), **args)
    assert len(gallery)==6
    assert 'x' not in gallery

def test_keys_become_text(gallery):
    gallery.add(pictures(3, 8), keys=[1,Path('k0'),'z'])
    assert 1 in gallery
    assert '1' in gallery
    assert Path('k0') in gallery
    assert 1 not in gallery.remove(1)
    assert Path('k0') not in gallery.remove(Path('k0'))
    assert 'z' in gallery
    gallery.add(pictures(1, 8)[0], keys=5)
    gallery.add(pictures(1, 9)[0], keys=Path('p'))
    gallery.add(pictures(2, 10), keys=np.array([7,8]))
    assert {'5','p','7','8'}<=set(gallery.table.key)

def test_column_names_that_become_equal_as_text():
    table = pd.DataFrame({'key':['x'], 1:[1], '1':[2]})
    with pytest.raises(ValueError, match="Two columns are called '1'"):
        Gallery(BandModel()).add(table, embs=embeddings(1))

def test_an_emptied_gallery_accepts_new_kinds(gallery, files):
    gallery.remove(files.fn)
    picture = pictures(1, 8)[0]
    gallery.add(picture, keys='x', pid='ann', cam=3)
    assert gallery.table.cam.tolist()==[3]
    assert gallery.search(picture, 1, exclude_cam=4).pid.tolist()==['ann']

def test_embeddings_computed_before(gallery, files):
    embs = gallery.embed(files.fn.tolist())
    g = Gallery(BandModel()).add(files.assign(key=[f'k{i}' for i in range(6)]), embs=embs)
    assert g.search(embs[3], 1).key.tolist()==['k3']
    assert g.embedder.n_embedded==0

@pytest.mark.parametrize('values', [np.zeros(9),np.full(9, np.nan),np.r_[np.inf,np.ones(8)]])
def test_embeddings_without_a_direction(gallery, values):
    with pytest.raises(ValueError, match='zero or not finite'): gallery.search(Embeddings(values, 'a model'), k=1)

def test_embeddings_of_a_wrong_shape(gallery):
    with pytest.raises(ValueError, match="5 dimensions, and this gallery's have 9"):
        gallery.search(embeddings(1, dim=5), k=1)
    with pytest.raises(ValueError, match=r'shape \(2, 3, 9\)'): Embeddings(np.ones((2,3,9)), 'a model')

def test_time_zones(files):
    "The hour that comes twice in autumn; entries and query each in a zone of their own"
    g = Gallery(BandModel()).add(files[:2][['fn']], time=['2026-10-25 02:30+02:00','2026-10-25 02:30+01:00'])
    g.add(files[2:3][['fn']], time=pd.Timestamp('2026-10-25 12:00', tz='Asia/Tokyo'))
    in_utc = ['2026-10-25 00:30:00+00:00','2026-10-25 01:30:00+00:00','2026-10-25 03:00:00+00:00']
    assert [str(o) for o in g.table.time]==in_utc
    def found_since(time): return set(g.search(files.fn[0], 3, since=time).key)
    keys = keys_of(files)
    assert found_since('2026-10-25 02:45+02:00')==set(keys[1:3])
    assert found_since('2026-10-24 20:45-04:00')==set(keys[1:3])

def test_times_with_and_without_a_zone(gallery, files):
    g = Gallery(BandModel()).add(files[:1][['fn']], time='2026-10-25 02:30+02:00')
    text = ['2026-10-25 02:30+02:00','2026-10-25 02:30']
    stamps = [pd.Timestamp('2026-10-25', tz='UTC'),pd.Timestamp('2026-10-25')]
    some = 'some have a time zone and some have none'
    for times in (text,stamps):
        with pytest.raises(ValueError, match=f"'time' is not all dates and times: {some}"):
            g.add(files[3:5][['fn']], time=times)
    with pytest.raises(ValueError, match=f"'seen' is not all .* {some}"):
        g.add(files[3:5][['fn']], seen=pd.Series(stamps, dtype=object))
    assert len(g)==1

@pytest.mark.parametrize('text', [['2026-10-25T02:30Z','2026-10-25'], ['2026-10-25','2026-10-25 02:30+02'],
                                  ['2026-10-25 02:30','2026-10-25 02:30:00.5-0200'],
                                  ['20261025T0230','20261025T0230Z']])
def test_text_with_and_without_a_zone(files, text):
    "pandas 2 takes the zone of the first for both, or returns objects"
    with pytest.raises(ValueError, match='some have a time zone and some have none'):
        Gallery(BandModel()).add(files[:2][['fn']], time=text)

def test_times_of_two_zones_are_in_utc(files):
    text = ['2026-10-25 02:30+02:00','2026-10-25 02:30Z','2026-10-25T02:30:00.500000-0300']
    g = Gallery(BandModel()).add(files[:3][['fn']], time=text)
    want = ['2026-10-25 00:30:00+00:00','2026-10-25 02:30:00+00:00','2026-10-25 05:30:00.500000+00:00']
    assert [str(o) for o in g.table.time]==want

def test_no_warnings(files, tmp_path, recwarn):
    "Not even from pandas about its future"
    warnings.simplefilter('always')
    g = Gallery.from_learner(BandModel(), files.assign(score=[.5,None]*3, ok=[True,None,False]*2))
    g.add(pictures(2, 8), keys=['x','y'], score=1, note=['a',None])
    g.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', BandModel())
    again.search(files.fn[0], 8, exclude_cam='door', since='2026-11-23', where='ok!=True or score>0.1')
    for warning in recwarn:
        assert 'pandas' not in str(warning.category)
        assert not issubclass(warning.category, (FutureWarning,DeprecationWarning))

# The model

def test_another_model(gallery, files, tmp_path):
    gallery.save(tmp_path/'g')
    foreign = Embeddings(np.ones(9), 'b model')
    message = "this gallery uses model a model, and this is b model"
    with pytest.raises(ValueError, match=message): gallery.search(foreign, k=1)
    with pytest.raises(ValueError, match=message): gallery.add(pd.DataFrame(dict(key=['x'])), embs=foreign)
    with pytest.raises(ValueError, match=message): Gallery.load(tmp_path/'g', BandModel('b model'))
    gallery.embedder.fingerprint = 'trained on'
    with pytest.raises(ValueError, match="Another model's embedding"): gallery.search(files.fn[0], k=1)
    with pytest.raises(ValueError, match="Another model's embedding"): gallery.add(pictures(1), keys='x')
    assert len(gallery)==6

def test_without_a_model(gallery, files, tmp_path):
    gallery.save(tmp_path/'g')
    g = Gallery.load(tmp_path/'g')
    assert g.search(gallery.embed([files.fn[4]]), 1).key.tolist()==[str(files.fn[4])]
    with pytest.raises(ValueError, match='loaded without its model'): g.search(files.fn[4], 1)
    with pytest.raises(ValueError, match='needs a model'): Gallery()
    with pytest.raises(TypeError, match='cannot embed'): Gallery('resnet50')

def test_an_array_does_not_say_which_model(gallery):
    with pytest.raises(TypeError, match='do not say which model'):
        gallery.add(pd.DataFrame(dict(key=['x'])), embs=np.ones((1,9)))

def test_a_learner(trained, people, tmp_path):
    "Embeddings are the learner's own, and its fingerprint follows its weights"
    import torch

    from pyramidreid.models.fingerprints import learner_fingerprint
    files = sorted((people/'bounding_box_test').glob('*.jpg'))[:5]
    g = Gallery.from_learner(trained, files)
    expected = normalize_rows(trained.embed(trained.dls.test_dl(files)).numpy())
    assert np.allclose(g.store.segments[0].embs, expected, atol=1e-6)
    assert g.fingerprint==learner_fingerprint(trained)
    assert g.search(files[3], k=1).key.tolist()==[str(files[3])]
    g.save(tmp_path/'g')
    assert len(Gallery.load(tmp_path/'g', trained))==5
    weight = next(trained.model.parameters())
    with torch.no_grad(): weight.add_(1e-3)
    try:
        with pytest.raises(ValueError, match="Another model's"): g.search(files[0], k=1)
    finally:
        with torch.no_grad(): weight.sub_(1e-3)

def test_a_learner_whose_input_changed(trained, files):
    "Other loaders or another norm, without a step of training"
    from pyramidreid.data.loaders import ReIDDataLoaders
    g = Gallery.from_learner(trained, files[['fn']])
    dls,norm = trained.dls,trained.model.norm
    h,w = dls.one_batch()[0].shape[-2:]
    table = dls.train.items[['fn','pid','cam','split']]
    try:
        trained.model.norm = 'whole'
        with pytest.raises(ValueError, match='Another model'): g.search(files.fn[0], 1)
        trained.model.norm = norm
        assert g.search(files.fn[0], 1).similarity[0]>.99
        trained.dls = ReIDDataLoaders.from_table(table, p=4, k=2, size=(2*h,w), valid_pct=.5, num_workers=0)
        with pytest.raises(ValueError, match='Another model'): g.add(pictures(1, 8), keys='x')
    finally: trained.dls,trained.model.norm = dls,norm
    assert len(g)==6

def test_weights_changed_without_pytorch_noticing(make_learner):
    "By `.data`, through NumPy, by a fused optimizer, in the statistics of batch norm, or by a stride"
    import torch
    learn = make_learner()
    g,item,weight = Gallery(learn),pictures(1),next(learn.model.parameters())
    batch_norms = [m for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def scale_data(): weight.data.mul_(1.01)
    def scale_in_numpy(): weight.detach().numpy().__imul__(1.01)
    def scale_one_number(): weight.data.view(-1)[:1].mul_(1+1e-6)
    def fused_step():
        for p in learn.model.parameters(): p.grad = torch.ones_like(p)
        torch.optim.AdamW(learn.model.parameters(), fused=True).step()
    def shift_statistics():
        for m in batch_norms: m.running_mean.data.add_(1)

    for change in (scale_data, scale_in_numpy, scale_one_number, fused_step, shift_statistics):
        original = {k:v.clone() for k,v in learn.model.state_dict().items()}
        before = g.embedder.fingerprint
        change()
        assert g.embedder.fingerprint!=before
        with pytest.raises(ValueError, match="Another model's"): g.embed(item)
        learn.model.load_state_dict(original)
        assert g.embedder.fingerprint==before

    conv = next(m for m in learn.model.modules() if isinstance(m, torch.nn.Conv2d) and m.stride==(2,2))
    conv.stride = (1,1)
    with pytest.raises(ValueError, match="Another model's"): g.embed(item)

def test_a_saved_model_searches_the_learners_gallery(trained, people, tmp_path):
    "Same fingerprint, same ranking"
    from pyramidreid.export.model_files import load_embedder
    files = sorted((people/'bounding_box_test').glob('*.jpg'))[:8]
    Gallery.from_learner(trained, files).save(tmp_path/'g')
    g = Gallery.load(tmp_path/'g', load_embedder(trained.save_model(tmp_path/'m')))
    found = g.search(files[2], k=1)
    assert found.key.tolist()==[str(files[2])]
    assert found.similarity[0]>.9999
    assert len(g.add(files[0], keys='twin'))==9

# Saving and loading

def test_saved_and_loaded(gallery, files, tmp_path):
    gallery.remove(files.fn[5])
    gallery.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', BandModel())
    pd.testing.assert_frame_equal(again.search(pictures(2, 8), k=5), gallery.search(pictures(2, 8), k=5))
    again.add(files.iloc[5:])
    again.save()
    assert len(Gallery.load(tmp_path/'g'))==6

@pytest.mark.parametrize('damage', [lambda b: b[:-5], lambda b: b'', lambda b: b[:-1]+bytes([b[-1]^1])],
                         ids=['truncated','emptied','one bit'])
def test_damage(gallery, tmp_path, damage):
    gallery.save(tmp_path/'g')
    for file in sorted((tmp_path/'g').iterdir()):
        data = file.read_bytes()
        if file.name=='gallery.lock': continue # Empty
        file.write_bytes(damage(data))
        with pytest.raises(ValueError, match=f'{file.name} is damaged'): Gallery.load(tmp_path/'g')
        file.write_bytes(data)
    assert len(Gallery.load(tmp_path/'g'))==6

def test_an_empty_gallery(files, tmp_path):
    g = Gallery(BandModel())
    assert len(g)==0
    assert 'of 0 entries' in repr(g)
    assert len(g.table)==0
    for method in (g.search,g.show):
        with pytest.raises(ValueError, match='gallery is empty'): method(files.fn[0])
    with pytest.raises(ValueError, match='gallery is empty'): g.build_index()
    g.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', BandModel())
    assert len(again)==0
    assert len(again.add(files))==6
    again.remove(list(again.keys))
    with pytest.raises(ValueError, match='gallery is empty'): again.search(files.fn[0])

def test_half_precision_against_full():
    embs = embeddings(500, dim=300)
    def similarities(dtype):
        g = Gallery(BandModel(), dtype=dtype).add(numbered(500), embs=embs)
        return g.search(embs[:50], 500).sort_values(['query','key']).similarity.to_numpy()
    difference = abs(similarities('float32')-similarities('float16')).max()
    assert 0<difference<1e-3

# Showing

def test_show(gallery, files):
    files.fn[1].unlink()
    fig = gallery.show(files.fn[0], k=9, pid=1, exclude_cam='yard')
    titles = [ax.get_title() for ax in fig.axes]
    assert len(titles)==7
    assert titles[0]=='query\npid 1'
    assert 'pid 1 · cam door' in titles[1]
    assert [text.get_text() for ax in fig.axes for text in ax.texts]==['no picture']
    with pytest.raises(FileNotFoundError, match='1.png'): gallery.show(files.fn[1])
    shown = gallery.show(gallery.embed([files.fn[0]]), k=2)
    assert [text.get_text() for text in shown.axes[0].texts]==['no picture']

@pytest.mark.parametrize('k', [1,30])
def test_show_of_one_and_of_many(gallery, files, k):
    "Twelve images in a row at most, and no axes without a tile"
    gallery.add(pictures(24, 9), keys=[f'n{i}' for i in range(24)])
    fig = gallery.show(files.fn[0], k=k)
    assert len(fig.axes)==k+1
    assert 'pid 1' in fig.axes[1].get_title()
    assert {len(ax.images) for ax in fig.axes[:7]}<={0,1}
    assert fig.get_size_inches()[0]<13
    assert fig.axes[0].get_gridspec().ncols==min(12, k+1)

def test_show_of_nobody(gallery, files):
    fig = gallery.show(files.fn[0], threshold=1.1)
    assert len(fig.axes)==2
    assert [text.get_text() for text in fig.axes[1].texts]==['nobody found']

def test_show_with_an_unknown_person(gallery):
    picture = pictures(1, 8)[0]
    gallery.add(picture, keys='x')
    assert len(gallery.show(picture, k=7, pid=1).axes)==8

def test_show_with_long_names(gallery, files):
    "A name wider than a picture gets a line of its own, and is cut"
    g = Gallery(BandModel()).add(files.fn.tolist(), pid=['Ann-Marie van der Meer']*6, cam='the yard behind the house')
    title = g.show(files.fn[0], k=2).axes[1].get_title()
    assert title.split('\n')==['1.00','pid Ann-Marie v…','cam the yard be…']

def test_show_of_several(gallery, files):
    for queries in (files.fn.tolist(),files.fn,gallery.embed(files.fn)):
        with pytest.raises(ValueError, match='6 queries: show draws one'): gallery.show(queries)

# Against the naive gallery

def compare(gallery, naive, rng):
    "Does a random search find the same in both?"
    q = np.random.default_rng(rng.randrange(1<<30)).standard_normal(9).astype(np.float32)
    filters,naive_filters = random_filters(rng)
    filled = {c for row in naive.rows for c in row if row[c] is not None}
    if filters['exclude_cam'] is not None and 'cam' not in set(gallery.table): return
    if filters['since'] is not None and 'time' not in filled: return
    if filters['where'] and not {c for c in VALUES if c in filters['where']}<=filled: return
    k = rng.randint(1, len(naive.rows))
    found = gallery.search(Embeddings(q, 'a model'), k, **filters)
    expected = naive.search(q, k, **{**filters, **naive_filters})
    assert found.key.tolist()==[key for key,_ in expected], filters
    assert np.allclose(found.similarity, [sim for _,sim in expected], atol=1e-5)
    rows = {row['key']:row for row in naive.rows}
    for c in set(VALUES) & set(found): assert without_gaps(found[c])==[rows[key].get(c) for key in found.key], c

@given(st.integers(0, 1<<30))
@settings(max_examples=40, deadline=None)
def test_a_random_life(tmp_path_factory, seed):
    "Add, remove, save and load in any order, with late columns and gaps everywhere: always the naive gallery's answers"
    rng = random.Random(seed)
    gallery,naive,path = Gallery(BandModel()),NaiveGallery(),tmp_path_factory.mktemp('life')/'g'
    for _ in range(rng.randint(2, 9)):
        free,used = [k for k in KEYS if k not in gallery],[row['key'] for row in naive.rows]
        action = rng.choice(['add','add','remove','save','load'])
        if action=='add' and free:
            rows = random_rows(rng, rng.sample(free, min(len(free), rng.randint(1, 8))))
            add_rows(gallery, rows)
            naive.add(rows)
        elif action=='remove' and used:
            removed = rng.sample(used, rng.randint(1, len(used)))
            gallery.remove(removed)
            naive.remove(removed)
        elif action=='save': gallery.save(path)
        elif action=='load' and (path/'gallery.json').exists():
            gallery.save()
            gallery = Gallery.load(path, BandModel())
        keys = [row['key'] for row in naive.rows]
        assert len(gallery)==len(keys)
        assert gallery.table.key.tolist()==keys
        assert all(key in gallery for key in keys)
        if keys:
            for _ in range(3): compare(gallery, naive, rng)

# The index

@pytest.fixture
def large():
    "A gallery just large enough for an index"
    embs = Embeddings(normalize_rows(embeddings(25_000, dim=8).values), 'a model')
    return Gallery(BandModel(dim=8)).add(numbered(25_000, cam=np.arange(25_000)%5), embs=embs),embs

def test_an_index_is_saved_and_loaded(large, tmp_path, monkeypatch):
    "Entries added and removed after it was built are respected"
    g,embs = large
    g.build_index('ivf')
    assert g.index.note['recall']>=.95
    assert 'IVF of 25,000 rows' in repr(g)
    g.add(pd.DataFrame(dict(key=['late'], cam=[9])), embs=embs[7])
    g.remove('7')
    g.save(tmp_path/'g')
    for gallery in (g,Gallery.load(tmp_path/'g')):
        assert '1 entries were added later' in repr(gallery)
        assert gallery.search(embs[7], 3).key[0]=='late'
        assert '7' not in gallery.search(embs[7], 50).key.tolist()
        assert gallery.search(embs[8], 1).key.tolist()==['8']
        assert gallery.search(embs[8], 5, exclude_cam=[0,1,2,3,4]).key.tolist()==['late']
        assert set(gallery.search(embs[8], 20, exclude_cam=3).cam)<={0,1,2,4,9}
    monkeypatch.setattr(store, '_STALE_SECONDS', 0)
    gallery.build_index('exact').save()
    assert not list((tmp_path/'g').glob('*.faiss'))
    assert Gallery.load(tmp_path/'g').index is None

def other_index(file):
    import faiss
    index = faiss.IndexFlatIP(8)
    index.add(np.eye(8, dtype=np.float32))
    faiss.write_index(index, str(file))

def smaller_index(file):
    import faiss
    index = faiss.read_index(str(file))
    index.remove_ids(np.arange(100))
    faiss.write_index(index, str(file))

def flip(file, i):
    data = bytearray(file.read_bytes())
    data[i] ^= 0x55
    file.write_bytes(data)

@pytest.mark.parametrize('check', [True,False])
@pytest.mark.parametrize('damage,message', [
    (Path.unlink, 'is missing'),
    (lambda f: f.write_bytes(b''), 'has 0 bytes'),
    (lambda f: f.write_bytes(f.read_bytes()[:-5]), 'is damaged'),
    (lambda f: flip(f, 1), 'is damaged'),
    (other_index, 'is damaged'),
    (smaller_index, 'is damaged'),
    (lambda f: (f.unlink(), f.mkdir()), 'not a regular file')],
    ids=['lost','empty','cut','flipped','another kind','fewer rows','folder'])
def test_a_lost_or_damaged_index(large, tmp_path, damage, message, check):
    "Everybody is found, exactly, and a new index can be built and saved"
    g,embs = large
    path = g.build_index('ivf').save(tmp_path/'g')
    damage(next(path.glob('*.faiss')))
    with pytest.warns(ReIDWarning, match=rf"index .*{message}.*searched exactly.*gallery\.build_index\(\)"):
        again = Gallery.load(path, BandModel(dim=8), check=check)
    assert again.index is None and 'searched exactly' in repr(again)
    expected = Gallery(BandModel(dim=8)).add(again.table, embs=embs).search(embs[:5], 10)
    pd.testing.assert_frame_equal(again.search(embs[:5], 10), expected)
    again.build_index('hnsw').save()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert Gallery.load(path, BandModel(dim=8)).index.kind=='hnsw'

NOTES = [('kind','lsh'), ('kind',['ivf']), ('kind','hnsw'), ('upto','x'), ('upto',10**15), ('rows',7), ('effort',0),
         ('effort',-1), ('effort',2.5), ('recall','high'), ('ms',float('nan')), ('bytes',None), ('asked',True)]

@pytest.fixture(scope='module')
def small_index(tmp_path_factory):
    "A file with an index, its measurements, and the gallery's next row id"
    import faiss
    rows = RowBlocks([(np.arange(300),normalize_rows(embeddings(300, dim=8).values))])
    index = train_index(rows, few=100)
    file = tmp_path_factory.mktemp('index')/'i.faiss'
    faiss.write_index(index.index, str(file))
    return file,index.note,300

@pytest.mark.parametrize('name,value', NOTES)
def test_measurements_of_an_index_that_do_not_fit(small_index, name, value):
    file,note,next_id = small_index
    assert read_index(file, note, 8, next_id).note==note
    with pytest.raises(ValueError, match='is damaged'): read_index(file, {**note, name:value}, 8, next_id)
    note = {k:v for k,v in note.items() if k!=name}
    with pytest.raises(ValueError, match='is damaged'): read_index(file, note, 8, next_id)

def test_a_damaged_index_is_not_saved_again(large, tmp_path):
    g,_ = large
    path = g.build_index('ivf').save(tmp_path/'g')
    next(path.glob('*.faiss')).unlink()
    with pytest.warns(ReIDWarning, match='is missing'): Gallery.load(path, BandModel(dim=8)).save()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(Gallery.load(path, BandModel(dim=8)))==25_000

def test_an_index_without_faiss(large, tmp_path, monkeypatch):
    "The entries are searched exactly, and saves keep the index, for whoever has FAISS"
    g,embs = large
    path = g.build_index('ivf').save(tmp_path/'g')
    file = next(path.glob('*.faiss'))
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'faiss', None)
        hint = r"cannot be used: faiss is not installed.*pip install 'pyramidreid\[gallery"
        with pytest.warns(ReIDWarning, match=hint): found = Gallery.load(path, BandModel(dim=8))
        assert 'searched exactly (FAISS is not installed)' in repr(found)
        assert found.search(embs[7], 3).key[0]=='7'
        found.add(pd.DataFrame(dict(key=['late'], cam=[9])), embs=Embeddings(-embs[7].values, 'a model'))
        found.save()
        found.save(tmp_path/'copy') # where no file is yet
        found.save(tmp_path/'copy')
    for folder in (path,tmp_path/'copy'):
        assert next(folder.glob('*.faiss')).read_bytes()==file.read_bytes()
        again = Gallery.load(folder, BandModel(dim=8))
        assert again.index.note==g.index.note and '1 entries were added later' in repr(again)
        assert again.search(Embeddings(-embs[7].values, 'a model'), 1).key.tolist()==['late']

def test_an_index_that_was_not_usable_can_be_removed(large, tmp_path, monkeypatch):
    path = large[0].build_index('hnsw').save(tmp_path/'g')
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'faiss', None)
        with pytest.warns(ReIDWarning, match='cannot be used'): found = Gallery.load(path, BandModel(dim=8))
        found.build_index('exact').save()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert Gallery.load(path, BandModel(dim=8)).index is None

def test_a_filter_over_few_of_very_many_ids():
    "Row ids are never reused, so they may be far larger than the number of rows"
    rng = np.random.default_rng(0)
    embs = normalize_rows(rng.standard_normal((300,8)))
    rows = RowBlocks([(np.arange(300)*10**10,embs)])
    index = train_index(rows, few=100)
    allowed = rng.random(300)<.7
    found = nearest_rows(embs[:20], rows, 3, allowed, index, few=100)[1]
    assert allowed[found].all()
    assert np.array_equal(found[:,0], exact_search(embs[:20], rows, 3, allowed)[1][:,0])

def test_an_index_that_cannot_be_built(large, tmp_path):
    "The gallery keeps the index it has, and can be saved"
    g,_ = large
    g.build_index('ivf')
    before = g.index
    with pytest.raises(ValueError, match="kind='lsh'"): g.build_index('lsh')
    assert g.index is before
    assert Gallery.load(g.save(tmp_path/'g')).index.kind=='ivf'

def test_small_galleries_need_no_index(gallery):
    with pytest.raises(ValueError, match='6 entries need no index'): gallery.build_index()

# Packaging

def test_light():
    "Importing the gallery imports neither torch, fastai nor faiss"
    code = """
import sys
import pyramidreid.gallery.gallery, pyramidreid.gallery.milvus
heavy = {'torch','fastai','faiss','pyarrow.parquet','pymilvus'} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable,'-c',code], check=True, capture_output=True)

def test_in_all():
    import pyramidreid.all as lib
    assert lib.Gallery is Gallery
    assert lib.Embeddings is Embeddings

def test_without_the_extra(gallery, files, monkeypatch, tmp_path):
    "An exact search needs only NumPy; an index and a file name the extra to install"
    for module in ('faiss','pyarrow','pyarrow.parquet'): monkeypatch.setitem(sys.modules, module, None)
    assert len(gallery.search(files.fn[0], k=1))==1
    rows = RowBlocks([(np.arange(200),normalize_rows(embeddings(200).values))])
    with pytest.raises(ImportError, match=r'faiss is not installed.*pyramidreid\[gallery\]'): train_index(rows, few=100)
    with pytest.raises(ImportError, match=r'pyarrow.*pyramidreid\[gallery\]'): gallery.save(tmp_path/'g')
