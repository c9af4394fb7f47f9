"The command `identify` against `Identities` in Python, and what it refuses without writing anything"
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip('pyarrow', reason='needs the extra gallery')

from pyramidreid.cli.entry import main
from pyramidreid.data.datasets import market_table
from pyramidreid.evaluation.distances import Distances
from pyramidreid.export.model_files import load_embedder
from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.training.threshold_calibration import calibrate_distances
from pyramidreid.video.identities import Identities, cluster_tracklets, impossible_pairs

Outcome = namedtuple('Outcome', 'code out err')

@pytest.fixture
def identify(capfd):
    "`identify(*args)`: run the command in this process"
    def run(*args):
        capfd.readouterr()
        code = main(['identify', *map(str, args)])
        return Outcome(code, *capfd.readouterr())
    return run

@pytest.fixture(scope='module')
def model(trained, tmp_path_factory): return trained.save_model(tmp_path_factory.mktemp('model')/'model')

@pytest.fixture(scope='module')
def other_model(make_learner, tmp_path_factory):
    return make_learner(emb_sz=4).save_model(tmp_path_factory.mktemp('other')/'model')

@pytest.fixture(scope='module')
def table(people):
    "Crops of people with tracks, cameras and times; two tracks to a person and camera"
    df = market_table(people)
    df = df[(df.split=='gallery') & (df.pid>0)].reset_index(drop=True)
    df['track'] = df.pid*2+df.groupby(['pid','cam']).cumcount()%2
    df['time'] = 100.*df.cam+np.arange(len(df))
    return df

@pytest.fixture
def csv(table, tmp_path):
    table.to_csv(tmp_path/'tracks.csv', index=False)
    return tmp_path/'tracks.csv'

def files_in(folder):
    return {o.name: o.read_bytes() for o in Path(folder).rglob('*') if o.is_file() and '.lock' not in o.name}

def by_hand(table, model, threshold, travel=None):
    "The pid of each track, by `Identities`, in the order in which tracks end"
    embedder = load_embedder(model)
    ids,pids = Identities(embedder, threshold=threshold, travel=travel),{}
    groups = sorted(table.groupby(['cam','track']), key=lambda group: group[1].time.max())
    for (cam,track),rows in groups:
        embs = Embeddings(np.asarray(embedder.embed(list(rows.fn))), embedder.fingerprint)
        pids[f'{cam}/{track}'] = ids.identify(embs, cam, rows.time.min(), rows.time.max()).pid
    return pids

@pytest.mark.parametrize('travel', [None, 500])
def test_answers_are_those_of_identities(identify, table, csv, model, tmp_path, travel):
    more = [] if travel is None else ['--travel', travel]
    done = identify(tmp_path/'home', '--csv', csv, '--model', model, '--threshold', .9, *more, '--json')
    assert done.code==0
    answer = json.loads(done.out)
    expected = by_hand(table, model, .9, travel)
    assert {row['track']: row['pid'] for row in answer['tracklets']}==expected
    assert answer['identities']==len(set(expected.values()))
    stored = Identities.load(tmp_path/'home', load_embedder(model))
    assert dict(zip(stored.table.key, stored.table.pid))==expected
    middle = {f'{cam}/{track}': rows.fn.iloc[len(rows)//2] for (cam,track),rows in table.groupby(['cam','track'])}
    assert {key: Path(fn) for key,fn in zip(stored.table.key, stored.table.fn)}=={
        key: Path(fn).absolute() for key,fn in middle.items()}

def test_folders_are_tracks_and_out_has_every_crop(identify, table, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fn,track,cam in zip(table.fn, table.track, table.cam):
        folder = tmp_path/'crops'/f'c{cam}'/str(track)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(fn, folder)
    done = identify('home', 'crops', '--model', model, '--threshold', .9, '--out', 'who.csv', '--json')
    assert done.code==0
    tracks = {row['track'] for row in json.loads(done.out)['tracklets']}
    assert tracks=={f'crops/c{cam}/{track}' for cam,track in zip(table.cam, table.track)}
    who,pids = pd.read_csv('who.csv'),Gallery.load('home').table.set_index('key').pid
    assert len(who)==len(table) and all(pids[row.track]==row.pid for row in who.itertuples())
    patterns = '--cam-pat', r'^c(\d)', '--track-pat', r'/(\d+)/'
    named = identify('other', 'crops', '--model', model, '--threshold', .9, *patterns, '--json')
    assert {row['track'] for row in json.loads(named.out)['tracklets']}=={
        f'{cam}/{track}' for cam,track in zip(table.cam, table.track)}

def test_what_is_known_is_skipped_when_asked(identify, csv, model, tmp_path):
    first = identify(tmp_path/'home', '--csv', csv, '--model', model, '--threshold', .9)
    before = files_in(tmp_path/'home')
    again = identify(tmp_path/'home', '--csv', csv, '--model', model)
    assert first.code==0 and again.code==2 and '--skip-known' in again.err
    assert files_in(tmp_path/'home')==before
    skipped = identify(tmp_path/'home', '--csv', csv, '--model', model, '--skip-known', '--json')
    assert skipped.code==0 and json.loads(skipped.out)['tracklets']==[]

def test_known_people_are_enrolled_once(identify, table, csv, model, tmp_path):
    anna = tmp_path/'photos'/'anna'
    anna.mkdir(parents=True)
    for fn in table.fn[table.pid==table.pid[0]][:3]: shutil.copy(fn, anna)
    options = '--csv', csv, '--model', model, '--known', tmp_path/'photos'
    done = identify(tmp_path/'home', *options, '--threshold', .5, '--json')
    own = {f'{cam}/{track}' for pid,cam,track in zip(table.pid, table.cam, table.track) if pid==table.pid[0]}
    assert any(row['pid']=='anna' for row in json.loads(done.out)['tracklets'] if row['track'] in own)
    identify(tmp_path/'home', *options, '--skip-known')
    known = Gallery.load(tmp_path/'home').table.query('enrolled')
    assert len(known)==3 and sorted(known.fn)==sorted(map(str, anna.iterdir()))

def test_calibration_is_that_of_tracklets(identify, table, csv, model, tmp_path):
    embedder = load_embedder(model)
    done = identify(tmp_path/'home', '--csv', csv, '--model', model, '--calibrate-on', csv, '--far', .2, '--json')
    pooled,pids = [],[]
    for (pid,_,_),rows in table.groupby(['pid','cam','track'], sort=False):
        unit = np.asarray(embedder.embed(list(rows.fn)))
        pooled.append(unit.sum(0)/np.linalg.norm(unit.sum(0)))
        pids.append(pid)
    pooled = np.array(pooled)
    expected = calibrate_distances(Distances(pooled, pooled), pids, pids, same_set=True, far=.2, progress_bar=False)
    assert json.loads(done.out)['threshold']==pytest.approx(expected.threshold(.2), abs=1e-5)
    stored = Identities.load(tmp_path/'home', embedder)
    assert stored.far==.2 and stored.fixed_threshold is None
    stricter = identify(tmp_path/'home', '--csv', csv, '--model', model, '--far', .1, '--skip-known', '--json')
    assert json.loads(stricter.out)['threshold']==pytest.approx(expected.threshold(.1), abs=1e-5)

@pytest.mark.parametrize('change,message', [
    (lambda df: df.drop(columns='track'), 'track'),
    (lambda df: df.assign(track=[None, *df.track[1:]]), 'has no track'),
    (lambda df: df.assign(fn=['nowhere.jpg', *df.fn[1:]]), 'do not exist'),
    (lambda df: df.assign(time=['yesterday', *df.time[1:]]), 'yesterday')])
def test_a_faulty_table_writes_nothing(identify, table, model, tmp_path, change, message):
    change(table).to_csv(tmp_path/'faulty.csv', index=False)
    done = identify(tmp_path/'home', '--csv', tmp_path/'faulty.csv', '--model', model, '--threshold', .9)
    assert done.code==2 and message in done.err and 'bug' not in done.err
    assert not (tmp_path/'home').exists()

@pytest.mark.parametrize('options,message', [
    ([], '--calibrate-on'), (['--threshold', .9, '--far', .1], 'use only one'), (['--far', .1], '--calibrate-on'),
    (['--threshold', .9, '--cam-pat', 'c(.)'], 'for FILES')])
def test_options_that_do_not_fit(identify, csv, model, tmp_path, options, message):
    done = identify(tmp_path/'home', '--csv', csv, '--model', model, *options)
    assert done.code==2 and message in done.err and not (tmp_path/'home').exists()

def test_what_does_not_belong_is_refused(identify, table, csv, model, other_model, tmp_path):
    "Another model, a rate without a calibration, and a gallery without identities"
    identify(tmp_path/'home', '--csv', csv, '--model', model, '--threshold', .9)
    before = files_in(tmp_path/'home')
    other = identify(tmp_path/'home', '--csv', csv, '--model', other_model, '--skip-known')
    assert other.code==2 and 'model' in other.err
    rate = identify(tmp_path/'home', '--csv', csv, '--model', model, '--skip-known', '--far', .1)
    assert rate.code==2 and 'calibration' in rate.err
    assert files_in(tmp_path/'home')==before
    plain = Gallery(load_embedder(model)).add(list(table.fn[:2])).save(tmp_path/'plain')
    refused = identify(plain, '--csv', csv, '--model', model)
    assert refused.code==2 and 'without identities' in refused.err

def test_a_folder_has_one_name_from_everywhere(identify, table, model, tmp_path, monkeypatch):
    "The same crops are known in another working directory, and two folders of one name are not one track"
    for name in ('crops/a', 'other/crops/a'):
        (tmp_path/name).mkdir(parents=True)
        shutil.copy(table.fn[0], tmp_path/name)
    monkeypatch.chdir(tmp_path)
    assert identify('home', 'crops', '--model', model, '--threshold', .9).code==0
    monkeypatch.chdir(tmp_path/'other')
    known = identify(tmp_path/'home', tmp_path/'crops', '--model', model)
    assert known.code==2 and 'known already, the first is crops/a' in known.err
    both = identify('new', tmp_path/'crops', tmp_path/'other'/'crops', '--model', model, '--threshold', .9)
    assert both.code==2 and '--track-pat' in both.err and not Path('new').exists()

def test_another_command_saves_meanwhile(identify, csv, model, tmp_path, monkeypatch):
    "Nothing is lost: the second one says to run it again"
    home = identify(tmp_path/'home', '--csv', csv, '--model', model, '--threshold', .9) and tmp_path/'home'
    save = Identities.save
    def late(self, path=None):
        monkeypatch.setattr(Identities, 'save', save)
        other = Identities.load(home, load_embedder(model))
        other.rename('person 1', 'anna').save()
        return save(self, path)
    monkeypatch.setattr(Identities, 'save', late)
    done = identify(home, '--csv', csv, '--model', model, '--skip-known')
    assert done.code==2 and 'run the command again' in done.err
    assert 'anna' in set(Identities.load(home).table.pid)

def test_together(identify, csv, table, model, tmp_path):
    "As in Python: clusters of the mean embeddings, what is impossible apart"
    tracks = '--csv', csv, '--model', model
    done = identify(tmp_path/'crowd', *tracks, '--threshold', '.7', '--together', '--travel', '9',
                    '--out', tmp_path/'out.csv', '--json')
    assert done.code==0
    answers = json.loads(done.out)['tracklets']
    rows = table.assign(name=[f'{cam}/{track}' for cam,track in zip(table.cam, table.track)])
    embs = pd.Series(list(load_embedder(model).embed(rows.fn.tolist())))
    means = embs.groupby(rows["name"]).apply(lambda part: np.stack(list(part)).mean(0))
    mean = means[[o['track'] for o in answers]]
    times = rows.groupby('name').agg(cam=('cam','first'), start=('time','min'), end=('time','max'))
    apart = impossible_pairs(times.loc[mean.index].assign(cam=lambda df: df.cam.astype(str)), 9)
    codes = cluster_tracklets(np.stack(list(mean)), .7, apart)
    assert [o['pid'] for o in answers]==[f'person {code+1}' for code in codes]
    assert sum(o['is_new'] for o in answers)==codes.max()+1
    assert set(pd.read_csv(tmp_path/'out.csv').pid)=={o['pid'] for o in answers}
    again = identify(tmp_path/'crowd', *tracks, '--together')
    assert again.code==2 and 'new PEOPLE' in again.err

@pytest.mark.parametrize('change,said', [
    (lambda df: df.assign(time=df.time.astype(object).where(df.index>0, '2026-11-01 08:00')), 'Some times are seconds'),
    (lambda df: df.assign(cam=df.cam.where(df.index>0), track=df.track.astype(object).where(
        df.index>0, f'{df.cam[1]}/{df.track[1]}')), 'could be one of two cameras'),
    (lambda df: df.drop(columns='time'), '--travel needs times')], ids=['times','names','travel'])
def test_tables_that_could_be_misread(identify, table, model, tmp_path, change, said):
    change(table).to_csv(tmp_path/'wrong.csv', index=False)
    wrong = '--csv', tmp_path/'wrong.csv', '--model', model, '--threshold', '.7', '--travel', '3'
    done = identify(tmp_path/'crowd', *wrong)
    assert done.code and said in done.err and not (tmp_path/'crowd').exists()

def test_no_tracklets_together(identify, model, tmp_path):
    (tmp_path/'none.csv').write_text('fn,track\n')
    done = identify(tmp_path/'crowd', '--csv', tmp_path/'none.csv', '--model', model, '--threshold', '.7', '--together')
    assert done.code==2 and 'no rows' in done.err and not (tmp_path/'crowd').exists()
