"Folders of people: whose folder is it, which camera, which split, and what was not read"
import itertools
import os
import re
import unicodedata
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import pyramidreid.export.model_files  # adds save_model # noqa: F401
from pyramidreid.cli.entry import main
from pyramidreid.core import ReIDWarning
from pyramidreid.data.datasets import market_table, seems_published
from pyramidreid.data.doctor_report import doctor
from pyramidreid.data.folders import folder_table, split_word
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.images import find_images, survey_folder


def images(*folders, n=2): return [f'{folder}/{i}.jpg' for folder in folders for i in range(n)]

@pytest.fixture
def tree(tmp_path):
    "`tree(*files)`: a new folder with empty files"
    numbers = itertools.count()
    def make(*files):
        top = tmp_path/f'tree{next(numbers)}'
        for name in files:
            (top/name).parent.mkdir(parents=True, exist_ok=True)
            (top/name).touch()
        return top
    return make

@pytest.fixture
def pictures(tree):
    "`pictures(*files)`: the same with small pictures of noise, all different"
    def make(*files):
        top = tree(*files)
        for seed,fn in enumerate(find_images(top)):
            noise = np.random.default_rng(seed).integers(0, 255, (32,16,3), dtype=np.uint8)
            Image.fromarray(noise).save(fn)
        return top
    return make

def people_of(df, split=None):
    "Images of each person, in a split"
    return dict(Counter(df.pid if split is None else df.pid[df.split==split]))

def refused(top, **kwargs):
    "The message of the error about a folder"
    with pytest.raises(ValueError) as e: folder_table(top, **kwargs)
    return str(e.value)

def suggested(message, name):
    "The patterns that an error suggests for an argument"
    return re.findall(rf"{name}=r'(.*?)'", message)

def read_quietly(top, **kwargs):
    "The table of a folder, and the warnings"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', ReIDWarning)
        df = folder_table(top, **kwargs)
    return df,[str(o.message) for o in caught if issubclass(o.category, ReIDWarning)]

# Whose folder is it?

def test_one_folder_per_person(tree):
    df,warned = read_quietly(tree(*images('ann','bob', n=3)))
    assert people_of(df)==dict(ann=3, bob=3) and not warned
    assert df.cam.tolist()==[None]*6 and df.split.tolist()==[None]*6 and list(df)==['fn','pid','cam','split']
    assert df.attrs['name']=='tree0' and df.attrs['not_read']=={}
    assert df.attrs['read_as']=='person = the folder an image is in (as ann); cameras unknown'

def test_a_folder_is_named_even_if_it_is_the_working_directory(tree, monkeypatch):
    monkeypatch.chdir(tree(*images('ann','bob')))
    assert folder_table('.').attrs['name']=='tree0'

def test_one_depth_may_be_any(tree):
    assert people_of(folder_table(tree(*images('siteA/001','siteB/002'))))=={'001':2, '002':2}

SITES = images('siteA/001','siteB/001','siteB/002')

def test_one_name_in_two_folders_is_a_question(tree):
    message = refused(tree(*SITES))
    assert "'001' is a folder in siteA and siteB" in message
    several,same,above = suggested(message, 'pid_pat')
    answers = {several: {'siteA/001':2, 'siteB/001':2, 'siteB/002':2},
               same: {'001':4, '002':2}, above: dict(siteA=2, siteB=4)}
    for pattern,people in answers.items(): assert people_of(folder_table(tree(*SITES), pid_pat=pattern))==people
    df = folder_table(tree(*SITES), cam_pat=suggested(message, 'cam_pat')[0])
    assert set(zip(df.pid, df.cam))=={('001','siteA'), ('001','siteB'), ('002','siteB')}

@pytest.mark.parametrize('names', [
    ('2024-01-01','2024-01-01'), ('2024-01-01','2024-01-02'), ('20240101','20240102'),
    ('track_1','track_1'), ('track_1','track_2'), ('images','images'), ('visit','visit')])
def test_the_person_is_the_folder_above(tree, names):
    "Dates, tracks and the like, repeated or not"
    top = tree(*images(*[f'{person}/{name}' for person,name in zip(('anna','bob'), names)]))
    message = refused(top)
    assert {'anna':2, 'bob':2} in [people_of(folder_table(top, pid_pat=o)) for o in suggested(message, 'pid_pat')]

def test_the_only_person_has_a_folder_of_images(tree):
    assert suggested(refused(tree(*images('ann/images'))), 'pid_pat')[0]=='^([^/]+)/'

def test_deep_trees_suggest_the_folder_above(tree):
    top = tree(*images('a/ann/mon/images','a/bob/mon/images'))
    assert people_of(folder_table(top, pid_pat=suggested(refused(top), 'pid_pat')[0]))==dict(mon=4)

def test_mixed_depths(tree):
    top = tree('ann/0.jpg', 'bob/mon/0.jpg')
    message = refused(top)
    assert 'ann/0.jpg (folders: 1), bob/mon/0.jpg (folders: 2)' in message
    first,last = suggested(message, 'pid_pat')
    assert people_of(folder_table(top, pid_pat=first))==dict(ann=1, bob=1)
    assert people_of(folder_table(top, pid_pat=last))==dict(ann=1, mon=1)

def test_a_split_of_another_depth(tree):
    message = refused(tree(*images('train/ann','test/cam1/bob')))
    assert 'several depths' in message and suggested(message, 'pid_pat')[0]=='^[^/]+/([^/]+)/'

@pytest.mark.parametrize('pattern, message', [
    ('(', 'not a valid'), ('a', 'no group'), ('x(.)', 'no person in 2 of 2 paths: ann/0')])
def test_wrong_person_patterns(tree, pattern, message):
    assert message in refused(tree('ann/0.jpg','bob/1.jpg'), pid_pat=pattern)

def test_a_pattern_whose_group_is_empty_or_not_taken(tree):
    top = tree('ann/0.jpg','bob/1.jpg')
    for pattern in ('^(a?)', '^(?:(a)|b)'): assert 'no person in 1 of 2 paths: bob/1' in refused(top, pid_pat=pattern)

def test_a_flat_folder(tree):
    top = tree('0001_c1_0.jpg','0001_c2_0.jpg','0002_c1_0.jpg')
    with pytest.raises(FileNotFoundError) as e: folder_table(top)
    df = folder_table(top, pid_pat=suggested(str(e.value), 'pid_pat')[0], cam_pat=r'_c(\d)')
    assert list(zip(df.pid, df.cam))==[('0001','1'), ('0001','2'), ('0002','1')]

def test_names_with_accents_are_one_name(tree):
    "A Mac writes é as two characters"
    one,two = (unicodedata.normalize(form, 'José') for form in ('NFC','NFD'))
    assert one!=two
    df = folder_table(tree(*images(f'query/{one}', f'gallery/{two}')))
    assert df.pid.unique().tolist()==[one] and df.split.tolist()==['query']*2+['gallery']*2

def test_names_that_differ_in_spaces_or_capitals_only(tree):
    df,warned = read_quietly(tree(*images('ann','ann ','Ann','bob')))
    assert people_of(df)==dict(ann=4, Ann=2, bob=2)
    assert any("'ann '" in o for o in warned) and any('Ann and ann' in o and 'capitals' in o for o in warned)

def test_linked_folders_are_people(tree):
    top = tree(*images('ann'))
    elsewhere = tree(*images('x'))
    (top/'bob').symlink_to(elsewhere/'x', target_is_directory=True)
    (top/'ann'/'up').symlink_to('..', target_is_directory=True)
    assert people_of(folder_table(top))==dict(ann=2, bob=2)

# Cameras

CAMERAS = ['cam_a/person_0001/0001.png', 'cam_b/person_0001/0001.png', 'cam_b/person_0002/0001.png']

def test_a_camera_may_be_a_folder_above_the_person(tree):
    message = refused(tree(*CAMERAS))
    pattern = suggested(message, 'cam_pat')[0]
    assert message.index('cam_pat')<message.index('pid_pat') and pattern==r'^cam_(\w+)/'
    for kwargs in (dict(cam_pat=r'^cam_(\w)/'), dict(cam_pat=pattern)):
        df = folder_table(tree(*CAMERAS), **kwargs)
        assert list(zip(df.pid, df.cam))==[('person_0001','a'), ('person_0001','b'), ('person_0002','b')]

def test_a_camera_may_be_a_folder_below_the_person(tree):
    top = tree(*images('ann/cam1','ann/cam2','bob/cam1'))
    message = refused(top)
    assert 'named like cameras' in message
    df = folder_table(top, pid_pat=suggested(message, 'pid_pat')[0], cam_pat=suggested(message, 'cam_pat')[0])
    assert set(zip(df.pid, df.cam))=={('ann','1'), ('ann','2'), ('bob','1')}

VIPER = ['cam_a/000_45.bmp', 'cam_a/001_90.bmp', 'cam_b/000_90.bmp', 'cam_b/001_0.bmp']

def test_cameras_are_not_people(tree):
    top = tree(*VIPER)
    message = refused(top)
    patterns = {name: suggested(message, name)[0] for name in ('pid_pat','cam_pat')}
    df = folder_table(top, **patterns)
    assert list(zip(df.pid, df.cam))==[('000','a'), ('001','a'), ('000','b'), ('001','b')]
    df = folder_table(top, **patterns, splits=dict(cam_a='query', cam_b='gallery'))
    assert df.split.tolist()==['query']*2+['gallery']*2 and df.cam.tolist()==list('aabb')

@pytest.mark.parametrize('cameras', ['cam1 cam2', 'Camera_1 Camera_12', 'c1 c2', 'view-a view-b', 'cam a'])
def test_names_of_cameras(tree, cameras):
    first,second = cameras.split() if cameras!='cam a' else ('cam a','cam b')
    message = refused(tree(f'{first}/0001_0.jpg', f'{second}/0001_1.jpg'))
    pattern = suggested(message, 'cam_pat')[0]
    found = [re.search(pattern, f'{camera}/0001_0.jpg')[1] for camera in (first,second)]
    assert 'named like cameras' in message and found==[re.search(r'(\d+|.)$', camera)[1] for camera in (first,second)]

def test_people_whose_names_begin_like_cameras(tree):
    assert len(folder_table(tree(*images('camel','cameron','c100','views'))).pid.unique())==4

def test_a_camera_explains_only_what_it_is(tree):
    "Not that a person is at two sites, nor a number in the names of the files"
    top = tree(*images('siteA/cam_1/ann','siteB/cam_1/ann'))
    assert "'ann' is a folder in siteA/cam_1 and siteB/cam_1" in refused(top, cam_pat=r'cam_(\d)')
    top = tree('siteA/001/c1_0.jpg', 'siteB/001/c2_0.jpg')
    assert "'001' is a folder in siteA and siteB" in refused(top, cam_pat=r'/c(\d)_')

def test_cameras_and_dates_above_the_person(tree):
    top = tree(*images('mon/cam1/ann','tue/cam2/ann'))
    message = refused(top)
    df = folder_table(top, cam_pat=suggested(message, 'cam_pat')[0], pid_pat=suggested(message, 'pid_pat')[0])
    assert set(zip(df.pid, df.cam))=={('ann','1'), ('ann','2')}

def test_cameras_below_splits(tree):
    top = tree(*images('query/cam1/ann','gallery/cam2/ann'))
    df = folder_table(top, cam_pat=suggested(refused(top), 'cam_pat')[0])
    assert set(zip(df.pid, df.cam, df.split))=={('ann','1','query'), ('ann','2','gallery')}

def test_a_pattern_that_finds_the_folder_of_a_split(tree):
    "Queries would all be of a camera called 'query'"
    top = tree(*images('query/ann','gallery/ann'))
    assert "cam_pat finds the name of a split's folder in 4 of 4" in refused(top, cam_pat='^([^/]+)/')
    assert "pid_pat finds the name of a split's folder in 4 of 4" in refused(top, pid_pat='^([^/]+)/')

def test_a_pattern_that_finds_the_camera_in_the_persons_name(tree):
    "Patterns used to be searched in the name of the file only"
    top = tree('person-01/door-1.jpg','person-02/hall-1.jpg')
    assert "in the name of the person's folder in 2 of 2" in refused(top, cam_pat=r'(\w+)-')
    assert folder_table(top, cam_pat=r'/(\w+)-[^/]*$').cam.tolist()==['door','hall']
    df = folder_table(tree('01_c1/a.jpg','01_c2/a.jpg'), cam_pat=r'_c(\d)/', pid_pat=r'^(\d+)_')
    assert list(zip(df.pid, df.cam))==[('01','1'), ('01','2')]

def test_a_pattern_for_file_names_is_hinted_at(tree):
    assert "'/(\\\\w+)-'" in refused(tree('ann/door-1.jpg'), cam_pat=r'^(\w+)-')

# Splits

@pytest.mark.parametrize('word, names', dict(
    train='train Train TRAINING train_set training-set image_train train_images bounding_box_train trainset',
    valid='val Valid validation val_images', test='test Test testing image_test bounding_box_test test_set',
    query='query Queries Probe image_query probe_images', gallery='gallery Gallery galleries').items())
def test_names_of_splits(word, names):
    assert {split_word(name) for name in names.split()}=={word}

def test_names_of_people():
    names = 'ann 0001 tester trainer Valerie test1 testuser query_7 images data cam_1 gallery-owner'.split()
    assert {split_word(name) for name in names}=={None}

@pytest.mark.parametrize('train, query, gallery', [
    ('Train','Query','Gallery'), ('train','query','test'), ('image_train','image_query','image_test'),
    ('bounding_box_train','query','bounding_box_test')])
def test_train_query_gallery(tree, train, query, gallery):
    df,warned = read_quietly(tree(*images(f'{train}/ann', f'{train}/bob', f'{query}/cyd', f'{gallery}/cyd')))
    assert people_of(df, 'train')==dict(ann=2, bob=2) and not warned
    assert people_of(df, 'query')==people_of(df, 'gallery')==dict(cyd=2)
    assert df.split.tolist()==['train']*4+['query']*2+['gallery']*2

def test_query_and_gallery_are_enough(tree):
    df,warned = read_quietly(tree(*images('Probe/cyd', 'Gallery/cyd')))
    assert df.split.tolist()==['query']*2+['gallery']*2 and people_of(df)==dict(cyd=4) and not warned

@pytest.mark.parametrize('name', ['valid','val','Validation','test','Testing'])
def test_people_of_a_validation_folder_are_searched_for(tree, name):
    df = folder_table(tree(*images('train/ann','train/bob', f'{name}/cyd', f'{name}/dan', n=3)))
    assert people_of(df, 'train')==dict(ann=3, bob=3)
    assert people_of(df, 'query')==dict(cyd=1, dan=1) and people_of(df, 'gallery')==dict(cyd=2, dan=2)
    alone = folder_table(tree(*images(f'{name}/cyd', f'{name}/dan', n=3)))
    assert people_of(alone, 'query')==dict(cyd=1, dan=1) and people_of(alone, 'gallery')==dict(cyd=2, dan=2)

def test_each_camera_of_a_validation_folder_has_a_query(tree):
    files = [f'val/{pid}/c{cam}_{i}.jpg' for pid in '12' for cam in 'ab' for i in '01']
    df = folder_table(tree(*files), cam_pat='/c(.)_')
    assert sorted(zip(df.pid, df.cam, df.split))==sorted(
        (pid, cam, split) for pid in '12' for cam in 'ab' for split in ('query','gallery'))

def test_training_images_alone(tree):
    df = folder_table(tree(*images('train/ann','train/bob')))
    assert df.split.tolist()==[None]*4 and people_of(df)==dict(ann=2, bob=2)

THREE = images('train/ann','train/bob','val/cyd','test/dan')

def test_train_val_test_is_a_question(tree):
    message = refused(tree(*THREE))
    assert "splits={'val': 'valid', 'test': None}" in message and 'splits={}' in message
    df = folder_table(tree(*THREE), splits=dict(val='valid', test=None))
    assert people_of(df)==dict(ann=2, bob=2, cyd=2) and people_of(df, 'query')==dict(cyd=1)
    assert df.attrs['not_read']==dict(left_out=('test/dan/0.jpg','test/dan/1.jpg'))
    df = folder_table(tree(*THREE), splits=dict(val='train', test='valid'))
    assert people_of(df, 'train')==dict(ann=2, bob=2, cyd=2) and people_of(df, 'gallery')==dict(dan=1)

@pytest.mark.parametrize('folders, found', [
    ('train query', 'no gallery'), ('query', 'no gallery'), ('train gallery', 'no queries'), ('gallery', 'no queries'),
    ('query gallery test', 'test or gallery'), ('train query gallery val', 'val or query'),
    ('query val test', 'val or query'),
    ('Train train', 'same split'), ('query probe gallery', 'same split'), ('valid validation', 'same split'),
    ('train ann', 'ann cannot'), ('ann bob test', 'ann and bob cannot'), ('query gallery extra', 'extra cannot')])
def test_folders_that_may_be_splits_are_a_question(tree, folders, found):
    "Never poured into one training set; what the error suggests can be read"
    top = tree(*images(*[f'{folder}/p{i}' for i,folder in enumerate(folders.split()) for i in (i,9)]))
    message = refused(top)
    assert found in message
    example = eval(re.search(r'splits=({.*?})', message)[1])
    if example: read_quietly(top, splits=example)

def test_none_of_the_folders_is_a_split(tree):
    top = tree(*images('ann','test','query'))
    assert people_of(folder_table(top, splits={}))==dict(ann=2, test=2, query=2)
    assert people_of(folder_table(top, splits=dict(test=None, query=None)))==dict(ann=2)

@pytest.mark.parametrize('folders', [('mask_train_v2/ann','mask_test_v2/bob'), ('data/train/ann','data/test/bob'),
                                     ('siteA/train/ann','siteB/query/bob'), ('siteA/train','siteB/test')])
def test_names_of_splits_elsewhere_are_a_question(tree, folders):
    message = refused(tree(*images(*folders)))
    example = eval(re.search(r'splits=({.*?})', message)[1])
    assert 'train' in example.values() and len(example)==2
    assert people_of(folder_table(tree(*images(*folders)), splits={}))

def test_splits_in_deeper_folders(tree):
    top = tree(*images('test/occluded/ann','test/whole/ann','train/bob'))
    df = folder_table(top, splits={'test/occluded':'query', 'Test/Whole/':'gallery'})
    assert sorted(set(zip(df.pid, df.split)))==[('ann','gallery'), ('ann','query'), ('bob','train')]

@pytest.mark.parametrize('splits, message', [
    (dict(val='test'), "'val' is for 'test'"), (dict(dev='valid'), "no folder 'dev'")])
def test_wrong_splits(tree, splits, message): assert message in refused(tree(*THREE), splits=splits)

def test_other_folders_beside_train_query_and_gallery_are_not_read(tree):
    "As before, but said"
    df,warned = read_quietly(tree(*images('train/ann','query/cyd','gallery/cyd','distractors/x', n=1)))
    assert people_of(df)==dict(ann=1, cyd=2) and df.attrs['not_read']['other_folders']==('distractors/x/0.jpg',)
    assert 'distractors/x/0.jpg' in warned[0]

def test_people_in_training_and_test(tree):
    "As in the folders of classification, where each person is on both sides"
    df,warned = read_quietly(tree(*images('train/ann','train/bob','val/ann','val/cyd')))
    assert '1 person is in the training and in the test folders: ann' in warned[0]
    assert 'train_and_test' in doctor(df, files=False).findings.index

VERI = [f'image_{name}_7.jpg' for name in ('train/0001_c001','train/0002_c002','query/0003_c001','test/0003_c002')]
PARTIAL_ILIDS = ['Probe/001.jpg','Probe/002.jpg','Gallery/001.jpg','Gallery/002.jpg']

@pytest.mark.parametrize('files, people', [(VERI, {'0001','0002','0003'}), (PARTIAL_ILIDS, {'001','002'})])
def test_images_without_folders_of_people(tree, files, people):
    "VeRi-776 and Partial-iLIDS"
    message = refused(tree(*files))
    assert 'no folders of people' in message
    df = folder_table(tree(*files), pid_pat=suggested(message, 'pid_pat')[0])
    assert set(df.pid)==people and set(df.pid[df.split=='query'])==set(df.pid[df.split=='gallery'])

# What was not read

JUNK = ['@eaDir/ann/0.jpg', 'ann/@eaDir/0.jpg@SYNO_THUMB.jpg', '__MACOSX/ann/._0.jpg', '.DS_Store', 'bob/Thumbs.db',
        '.git/x.jpg']

def test_what_systems_put_beside_pictures_is_never_a_person(tree):
    df,warned = read_quietly(tree(*images('ann','bob'), *JUNK))
    assert people_of(df)==dict(ann=2, bob=2) and not warned
    hidden = {'@eaDir', 'ann/@eaDir', '__MACOSX', '.DS_Store', 'bob/Thumbs.db', '.git'}
    assert set(df.attrs['not_read']['hidden_files'])==hidden
    assert list(df.attrs['not_read'])==['hidden_files']

def test_find_images_leaves_them_out(tree): assert find_images(tree(*JUNK))==[]

def test_survey_folder(tree):
    found = survey_folder(tree('a/0.jpg','a/1.HEIC','b/c/2.png','b/notes.txt','d/.x', *JUNK))
    assert {kind:[o.name for o in paths] for kind,paths in found.items()}==dict(
        image=['0.jpg','2.png'], unreadable=['1.HEIC'], other=['notes.txt'], folder=['a','ann','b','c','bob','d'],
        hidden=['.DS_Store','.git','@eaDir','__MACOSX','@eaDir','Thumbs.db','.x'], repeated=[])

NOT_READ = dict(loose_images=('cover.jpg',), unknown_formats=('bob/9.heic','cyd/0.HEIC'), empty_folders=('cyd','dan'),
                other_files=('docs/readme.txt',), hidden_files=('.DS_Store',))
MIXED = [*images('ann','bob'), 'cover.jpg', 'bob/9.heic', 'cyd/0.HEIC', 'docs/readme.txt', '.DS_Store']

def test_what_was_not_read_is_counted(tree):
    top = tree(*MIXED)
    (top/'dan'/'empty').mkdir(parents=True)
    df,warned = read_quietly(top)
    assert people_of(df)==dict(ann=2, bob=2) and df.attrs['not_read']==NOT_READ
    assert warned==[f'{top}: not read: 1 image beside the folders of people (cover.jpg); '
                    '2 pictures in formats that cannot be read (bob/9.heic and cyd/0.HEIC); '
                    '2 folders without an image (cyd and dan)']
    assert df.query('pid=="ann"').copy().attrs['not_read']==NOT_READ

def test_only_pictures_that_cannot_be_read(tree):
    with pytest.raises(FileNotFoundError, match='ann/0.heic'): folder_table(tree('ann/0.heic','ann/1.heic'))

def test_a_folder_reached_twice_is_read_once_and_said(pictures):
    top = pictures(*images('ann','bob'))
    os.symlink(top/'ann', top/'bob'/'other', target_is_directory=True)
    df,warned = read_quietly(top)
    assert people_of(df)==dict(ann=2, bob=2)
    assert warned==[f'{top}: not read: 1 link to a folder that is read at another path (bob/other)']
    assert doctor(top)['repeated_folders'].which.tolist()==['bob/other']

def test_people_whose_names_are_not_utf_8(pictures):
    "A folder from a disk in Latin-1"
    top = pictures(*images('ann','bob','cyd','dan'))
    try: os.rename(top/'bob', top/os.fsdecode(b'Andr\xe9'))
    except OSError: pytest.skip('this file system knows UTF-8 only')
    df,_ = read_quietly(top)
    assert people_of(df)=={'ann':2, r'Andr\xe9':2, 'cyd':2, 'dan':2}
    report = doctor(top)
    for text in (repr(report), report._repr_html_(), report.to_json()): assert text.encode()
    dls = ReIDDataLoaders.from_folder(top, p=2, k=2, size=(32,16), num_workers=0)
    assert dls.train.one_batch()[0].shape==(4,3,32,16)

# The doctor

def test_the_doctor_finds_what_was_not_read(pictures):
    top = pictures(*MIXED)
    (top/'dan').mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        report = doctor(top)
    severities = report.findings.severity
    for kind,paths in NOT_READ.items():
        assert report[kind].which.tolist()==list(paths)
        assert severities[kind]==('note' if kind in ('other_files','hidden_files') else 'warning')
    assert report.ok and 'Read as: person = the folder an image is in (as ann)' in repr(report)

@pytest.mark.parametrize('files', [
    SITES, CAMERAS, VIPER, THREE, PARTIAL_ILIDS, images('anna/2024-01-01','bob/2024-01-01')])
def test_the_doctor_refuses_what_can_be_read_in_several_ways(tree, files):
    top = tree(*files)
    for name in (None,'folder'):
        with pytest.raises(ValueError) as e: doctor(top, name)
        assert str(e.value)==refused(top)

def test_the_doctor_takes_patterns_and_splits(pictures, people):
    report = doctor(pictures(*CAMERAS), cam_pat=r'^cam_(\w)/')
    assert report.cameras.columns.tolist()==['a','b'] and 'no_cams' not in report.findings.index
    report = doctor(pictures(*THREE), splits=dict(val='valid', test=None))
    assert report.splits.index.tolist()==['train','query','gallery'] and len(report['left_out'])==2
    with pytest.raises(ValueError, match="name='folder'"): doctor(people, cam_pat='(a)')
    with pytest.raises(ValueError, match='this is a table'): doctor(market_table(people), cam_pat='(a)')

def test_the_doctor_finds_two_spellings_of_a_name(tree):
    df,_ = read_quietly(tree(*images('ann','Ann','bob')))
    assert doctor(df, files=False)['spellings'].which.tolist()==["'Ann' = 'ann'"]
    assert 'spellings' not in doctor(folder_table(tree(*images('ann','bob'))), files=False).findings.index

def test_a_damaged_dataset_is_not_a_folder_of_people(tree):
    assert seems_published(tree('bounding_box_train/0002_c1s1_000451_03.jpg',
                                'bounding_box_test/0003_c1s1_000451_03.jpg'))
    assert seems_published(tree('list_train.txt', *images('train/0000','test/0000')))
    assert not seems_published(tree('query/0002/0002_c1s1_000451_03.jpg', 'gallery/0002/0002_c2s1_000451_03.jpg'))
    assert not seems_published(tree(*images('bounding_box_train/ann','query/bob','bounding_box_test/bob')))

# Loaders and commands

SMALL = dict(p=2, k=2, size=(32,16), num_workers=0)

def test_loaders_of_a_folder(pictures):
    files = [f'{split}/cam_{cam}/{pid}/{i}.jpg' for split,pids in dict(train='ABC', valid='DE').items()
             for pid in pids for cam in 'xy' for i in range(2)]
    dls = ReIDDataLoaders.from_folder(pictures(*files), cam_pat=r'/cam_(\w)/', **SMALL)
    assert set(dls.train.items.pid)==set('ABC') and set(dls.valid.items.pid)==set('DE') and dls.cams==['x','y']
    by_date = pictures(*[f'{pid}/2024-01-0{day}/{i}.jpg' for pid in 'ABCDE' for day in (1,2) for i in range(2)])
    dls = ReIDDataLoaders.from_folder(by_date, pid_pat='^([^/]+)/', **SMALL)
    assert set(dls.train.items.pid)|set(dls.valid.items.pid)==set('ABCDE') and dls.c==3
    three = pictures(*images(*[f'{split}/{split[0]}{i}' for split in ('train','val','test') for i in range(2)]))
    dls = ReIDDataLoaders.from_folder(three, splits=dict(val='valid', test=None), **SMALL)
    assert set(dls.train.items.pid)=={'t0','t1'} and set(dls.valid.items.pid)=={'v0','v1'}

def test_queries_and_gallery_cannot_be_trained_on(pictures):
    top = pictures(*images('query/ann','query/bob','gallery/ann','gallery/bob'))
    with pytest.raises(ValueError, match='0 training identities'): ReIDDataLoaders.from_folder(top, **SMALL)

@pytest.fixture(scope='module')
def model(trained, tmp_path_factory): return trained.save_model(tmp_path_factory.mktemp('run')/'model')

@pytest.fixture
def run(capfd):
    "`run(*args)`: exit code, stdout and stderr of a command"
    def call(*args):
        capfd.readouterr()
        return (main(list(map(str, args))),*capfd.readouterr())
    return call

TEST = images('query/cam_a/ann','query/cam_a/bob','gallery/cam_b/ann','gallery/cam_b/bob')

def test_evaluate_reads_queries_and_gallery(pictures, model, run):
    top = pictures(*TEST)
    code,out,err = run('evaluate', model, top)
    assert code==2 and '--cam-pat' in err and r'^[^/]+/cam_(\w+)/' in err
    code,out,err = run('evaluate', model, top, '--cam-pat', r'/cam_(\w)/')
    assert code==0 and 'Cameras are unknown' not in out and r'camera = /cam_(\w)/ in the path' in out
    code,out,err = run('evaluate', model, top, '--pid-pat', r'([^/]+)/[^/]+$')
    assert code==0 and 'Cameras are unknown' in out and '--cam-pat' in out
    code,out,err = run('evaluate', model, pictures(*THREE, 'test/eve/0.jpg', 'test/eve/1.jpg', 'cover.jpg'),
                       '--split', 'test=valid', '--split', 'val=NONE')
    assert code==0 and '2 queries, 2 images in the gallery' in out and 'cover.jpg' in err

def test_train_says_that_cameras_are_unknown(pictures, run, tmp_path):
    options = '--arch resnet10 --weights none --size 96 48 --workers 0 --p 2 --k 2 --epochs 1 --recipe paper'.split()
    top = pictures(*images(*[f'cam_{cam}/{pid}' for cam in 'ab' for pid in ('ann','bob','cyd','dan')]))
    train = 'train', top, '--out', tmp_path/'run', *options
    assert run(*train)[0]==2
    code,out,err = run(*train, '--pid-pat', r'([^/]+)/[^/]+$')
    assert code==0 and 'person = ([^/]+)/[^/]+$ in the path; cameras unknown' in out and 'Cameras are unknown' in out

def test_doctor_command(pictures, run):
    top = pictures(*CAMERAS)
    code,out,err = run('doctor', top)
    assert code==2 and '--cam-pat for cam_pat' in err
    code,out,err = run('doctor', top, '--cam-pat', r'^cam_(\w)/')
    assert code==0 and 'camera = ^cam_' in out
    assert run('doctor', pictures(*images('ann','test')), '--split', 'none', '--quick')[0]==0
    code,out,err = run('doctor', top, '--split', 'cam_a')
    assert code==2 and 'test=gallery' in err

@pytest.mark.parametrize('option', [('--cam-pat','(a)'), ('--pid-pat','(a)'), ('--split','none')])
def test_options_for_folders_are_refused_elsewhere(people, model, run, tmp_path, option):
    market_table(people).to_csv(tmp_path/'people.csv', index=False)
    for args in (('doctor',), ('evaluate',model), ('train','--out',tmp_path/'run')):
        code,_,err = run(*args, tmp_path/'people.csv', *option)
        assert code==2 and f'{option[0]}: ' in err and 'columns' in err
        code,_,err = run(*args, people, *option)
        assert code==2 and '--dataset folder' in err

def test_gallery_add_reads_cameras_and_people_of_paths(pictures, model, run, tmp_path, monkeypatch):
    top,street = pictures('cam_1/07/0.jpg', 'cam_2/x/0.jpg'),tmp_path/'street'
    add = 'gallery', 'add', street, '--model', model, '--quiet'
    assert run(*add, top, '--cam-pat', r'^cam_(\d)/', '--pid-pat', r'/([^/]+)/')[0]==0
    table = Gallery.load(street).table
    assert sorted(zip(table.cam, table.pid))==[(1,'07'), (2,'x')]
    monkeypatch.chdir(pictures('door/1.jpg', 'cam_3/2.jpg'))
    code,_,err = run(*add, 'door/1.jpg', 'cam_3/2.jpg', '--cam-pat', r'^(\w+)/')
    assert code==2 and '--cam-pat' in err and 'numbers' in err
    assert run(*add, 'cam_3/2.jpg', '--cam-pat', r'^cam_(\d)/')[0]==0
    assert sorted(Gallery.load(street).table.cam)==[1,2,3]
    for more in (('--cam-pat','(.)','--cam',1), ('--pid-pat','(.)','--pid',1)): assert run(*add, 'door', *more)[0]==2
    (tmp_path/'x.csv').write_text('fn\na.jpg\n')
    assert run(*add, '--csv', tmp_path/'x.csv', '--cam-pat', '(.)')[0]==2

def test_evaluate_on_reads_folders_of_people(pictures, trained):
    top = pictures(*images('query/ann','query/bob','gallery/ann','gallery/bob'))
    assert trained.evaluate_on({'own':top}).index.tolist()==['own']
