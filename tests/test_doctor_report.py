"`doctor`: each finding on tables and files made for it, the report, and the command line"
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

import pyramidreid.data.doctor_checks
from pyramidreid.data.doctor_report import doctor
from pyramidreid.data.registry import reid_sets

COLUMNS = ['fn','pid','cam','split']

def parse_value(text):
    if text=='-': return None
    return int(text) if re.fullmatch(r'-?\d+', text) else text

def make_table(*rows, **attrs):
    "A table from a text `fn pid cam split` for each image; '-' is a missing value"
    parsed = []
    for row in rows:
        fn,*values = row.split()
        parsed.append([fn, *map(parse_value, values)])
    df = pd.DataFrame(parsed, columns=COLUMNS, dtype=object)
    df.attrs.update(attrs)
    return df

def check_table(*rows, **attrs): return doctor(make_table(*rows, **attrs), files=False)
def findings_of(report): return set(report.findings.index)

TRAIN = ['a1 1 1 train', 'a2 1 2 train', 'b1 2 1 train', 'b2 2 2 train']
TEST = ['q 3 1 query', 'g 3 2 gallery', 'd 0 1 gallery', 'j -1 1 gallery']
CLEAN = TRAIN+TEST

def save_noise(path, seed, size=(16,32), mode='RGB'):
    "A small image of noise at `path`, the same for the same `seed`"
    path.parent.mkdir(parents=True, exist_ok=True)
    width,height = size
    pixels = np.random.default_rng(seed).integers(0, 255, (height,width,3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path

MARKET = dict(
    bounding_box_train=['0001_c1s1_000001_01','0001_c2s1_000002_01','0002_c1s1_000003_01','0002_c2s1_000004_01'],
    query=['0003_c1s1_000005_01'],
    bounding_box_test=['0003_c2s1_000006_01','0000_c1s1_000007_01','-1_c1s1_000008_01'])

@pytest.fixture
def market(tmp_path):
    "Two training people, a query and its match, a distractor and junk, in Market-1501's layout"
    top = tmp_path/'Some-Market'
    files = [top/folder/f'{stem}.jpg' for folder,stems in MARKET.items() for stem in stems]
    for seed,fn in enumerate(files): save_noise(fn, seed)
    return top

# the table

def test_clean_table():
    report = check_table(*CLEAN)
    assert report.ok and report.findings.empty
    assert 'No findings.' in repr(report)

def test_counts_by_hand():
    report = check_table(*CLEAN, 'a3 1 2 train', 'g2 3 1 gallery')
    splits = report.splits
    assert splits.index.tolist()==['train','query','gallery']
    assert splits.images.tolist()==[5,1,3]
    assert splits.identities.tolist()==[2,1,1]
    assert splits.cameras.tolist()==[2,1,2]
    assert splits.distractors.tolist()==[0,0,1]
    assert splits.junk.tolist()==[0,0,1]
    assert splits.loc['train',['min_images','median_images','max_images']].tolist()==[2,2.5,3]
    assert splits.loc['gallery',['min_images','max_images','min_cameras','max_cameras']].tolist()==[2,2,2,2]
    assert report.cameras.loc['train'].to_dict()=={1:2, 2:3}
    assert report.cameras.loc['gallery'].to_dict()=={1:2, 2:1}
    assert report.people.loc[('train',1)].to_dict()=={1:1, 2:2}
    assert report.people.loc[('gallery',3)].to_dict()=={1:1, 2:1}
    assert ('gallery',0) not in report.people.index and ('gallery',-1) not in report.people.index

# Rows that cause each finding, the files found, and the severity
FINDINGS = {
    'no_pid':        (['x - 1 train'], ['x'], 'error'),
    'unknown_split': (['x 1 1 valid', 'y 1 1 -'], ['x','y'], 'error'),
    'listed_twice':  (['a1 1 1 train'], ['a1','a1'], 'warning'),
    'no_cam':        (['x 1 - train'], ['x'], 'warning'),
    'no_match':      (['x 4 1 query', 'y 3 2 query', 'g9 4 1 gallery'], ['x','y'], 'warning'),
    'one_image':     (['x 5 1 train'], ['x'], 'warning'),
    'leak':          (['x 1 1 train', 'x 3 2 gallery'], ['x','x'], 'error'),
    'two_people':    (['x 1 1 train', 'x 2 1 train'], ['x','x'], 'error'),
    'finds_itself':  (['x 3 1 query', 'x 3 2 gallery'], ['x','x'], 'error')}
# Without opening files, a picture that occurs twice is a file that is listed twice
ALSO_FOUND = {name: {'listed_twice'} for name in ('leak','two_people','finds_itself')}

@pytest.mark.parametrize('name', FINDINGS)
def test_finding_of_the_table(name):
    rows,fns,severity = FINDINGS[name]
    report = check_table(*CLEAN, *rows)
    assert report[name].fn.tolist()==fns
    assert report.findings.severity[name]==severity
    assert report.ok==(severity!='error')
    assert findings_of(report)-ALSO_FOUND.get(name, set())=={name}

def test_person_in_training_and_test():
    report = check_table(*CLEAN, 'x 1 1 query', 'y 1 2 gallery', 'z 1 2 gallery')
    assert findings_of(report)=={'train_and_test'}
    assert report['train_and_test'][['pid','train','test']].values.tolist()==[[1,2,3]]
    assert '1 (images: 2 in training, 3 in the test)' in repr(report)

def test_person_0_is_not_a_distractor_if_a_query_has_it():
    "MSMT17 numbers people from 0"
    report = check_table('a 7 1 train', 'b 7 2 train', 'c 8 1 train', 'd 8 2 train', 'q 0 1 query', 'g 0 2 gallery')
    assert report.findings.empty
    assert report.splits.distractors.sum()==0 and report.splits.identities.gallery==1

def test_one_camera_in_training():
    report = check_table(*CLEAN, 'x 4 1 train', 'y 4 1 train')
    assert findings_of(report)=={'one_camera'}
    assert report['one_camera'].pid.tolist()==[4]
    assert report.findings.severity.one_camera=='note'

def test_a_copy_from_the_same_camera_in_the_gallery_is_left_out_by_the_protocol():
    "As in VeRi-776 and MARS, whose queries are part of the gallery"
    assert check_table(*CLEAN, 'x 3 1 query', 'x 3 1 gallery').findings.empty
    assert 'listed_twice' in findings_of(check_table(*CLEAN, 'x 3 1 query', 'x 3 1 query', 'x 3 1 gallery'))
    assert 'listed_twice' in findings_of(check_table(*CLEAN, 'x 3 - query', 'x 3 - gallery'))

def test_a_junk_copy_is_neither_a_leak_nor_a_wrong_label():
    def with_copies(pid): return check_table(*CLEAN, f'a1 {pid} 1 gallery', f'g {pid} 2 gallery')
    assert {'leak','two_people'} <= findings_of(with_copies(pid=4))
    report = with_copies(pid=-1)
    assert findings_of(report)=={'listed_twice'}
    assert report['listed_twice'].fn.tolist()==['a1','a1','g','g']

def test_why_queries_have_no_match():
    report = check_table(*CLEAN, 'x 4 1 query', 'y 5 1 query', 'g4 4 1 gallery', 'z -1 1 query',
                         'u 6 - query', 'gu 6 - gallery')
    assert dict(zip(report['no_match'].fn, report['no_match'].why))=={
        'x': "in the gallery only from the query's own camera", 'y': 'person not in the gallery', 'z': 'is junk'}

def has_match(query, gallery):
    "The protocol's definition"
    return any(image.pid==query.pid and query.pid!=-1 and image.cam!=query.cam for image in gallery.itertuples())

def test_matches_against_plain_loops():
    rng = random.Random(0)
    def random_rows(split, n):
        return [(f'{split}{i}', rng.choice([-1,0,1,2,3,4]), rng.choice([1,2,3]), split) for i in range(n)]
    n_found = 0
    for _ in range(12):
        df = pd.DataFrame(random_rows('query', 8)+random_rows('gallery', 10), columns=COLUMNS)
        queries,gallery = df[df.split=='query'],df[df.split=='gallery']
        expected = [query.fn for query in queries.itertuples() if not has_match(query, gallery)]
        report = doctor(df, files=False)
        found = report['no_match'].fn.tolist() if 'no_match' in findings_of(report) else []
        assert found==expected
        n_found += len(found)
    assert n_found>12

@pytest.mark.parametrize('rows,why', [
    (['q 3 1 query'], 'queries: 1, gallery images: 0'),
    (['g 3 1 gallery'], 'queries: 0, gallery images: 1'),
    (['q 3 1 query', 'g 3 1 gallery'], 'no query has a possible match')])
def test_nothing_can_be_measured(rows, why):
    report = check_table(*TRAIN, *rows)
    assert not report.ok
    assert why in report['no_test'].which[0]

def test_only_training_images():
    report = check_table(*TRAIN)
    assert findings_of(report)=={'only_train'} and report.ok

def test_no_splits():
    report = check_table('a 1 1 -', 'b 1 2 -', 'c 2 1 -', 'd 2 2 -')
    assert findings_of(report)=={'no_splits'} and report.ok
    assert report.splits.index.tolist()==['train']

def test_no_cameras():
    report = check_table(*[re.sub(r' \d (\w+)$', r' - \1', row) for row in CLEAN])
    assert findings_of(report)=={'no_cams'} and report.ok
    assert report.splits.cameras.tolist()==[0]*3
    assert '–' in str(report)
    assert report.cameras.columns.tolist()==['unknown']

def test_columns_cam_and_split_may_be_absent():
    report = doctor(pd.DataFrame(dict(fn=list('abcd'), pid=[1,1,2,2])), files=False)
    assert findings_of(report)=={'no_cams','no_splits'}

def test_ids_as_text_and_mixed():
    report = check_table(
        'a ann door train', 'b ann hall train', 'c bob 1 train', 'd bob hall train', 'e 7 hall train', 'f 7 1 train',
        'q eve door query', 'g eve hall gallery', 'o 0000 hall gallery')
    assert report.findings.empty
    assert report.splits.distractors.gallery==1 and report.splits.identities.tolist()==[3,1,1]
    assert 'door' in report._repr_html_()
    assert json.loads(report.to_json())['cameras'][0]['door']==1

@pytest.mark.parametrize('df', [pd.DataFrame(columns=COLUMNS), pd.DataFrame(dict(fn=[], pid=[]))])
@pytest.mark.parametrize('files', [True,False])
def test_empty_table(df, files):
    report = doctor(df, files=files)
    assert findings_of(report)=={'empty'} and not report.ok
    assert 'the table is empty' in repr(report) and 'the table is empty' in report._repr_html_()
    assert json.loads(report.to_json())['splits']==[]
    report.plot().canvas.draw()

def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column 'pid'.*'id'"): doctor(pd.DataFrame(dict(fn=['a'], id=[1])))

def test_few_people_to_train_on():
    report = check_table('a 1 1 train', 'b 1 2 train', *TEST)
    assert findings_of(report)=={'no_train'} and not report.ok

def test_spellings_of_missing_values_and_splits():
    "NaN, pd.NA, text columns of pandas, and splits in capitals"
    df = pd.DataFrame(dict(fn=list('abcdef'), pid=pd.array(['1','1','2','2','3','3'], dtype='string'),
                           cam=[1.,2.,1.,math.nan,1.,2.], split=['TRAIN']*4+['Query','gallery']))
    df.loc[1,'pid'] = pd.NA
    report = doctor(df, files=False)
    assert report['no_pid'].fn.tolist()==['b']
    assert report['no_cam'].fn.tolist()==['d']
    assert report.splits.index.tolist()==['train','query','gallery']

def test_all_at_once():
    rows = ['z 1 1 query']
    for name,(more,_,_) in FINDINGS.items():
        rows += [row.replace('x ', f'x{name} ').replace('y ', f'y{name} ') for row in more]
    report = check_table(*CLEAN, *rows)
    assert set(FINDINGS)|{'train_and_test'} <= findings_of(report)
    severity = report.findings.severity.tolist()
    assert severity==sorted(severity, key=['error','warning','note'].index)

def test_an_unknown_finding_names_those_there_are():
    with pytest.raises(KeyError, match='no_pid'): check_table(*CLEAN, 'x - 1 train')['leak']

# counts

PUBLISHED = dict(train=(4,2), query=(1,1), gallery=(2,2))

def test_published_counts():
    report = check_table(*CLEAN, counts=PUBLISHED)
    assert report.findings.empty and 'as published' in repr(report)

def test_counts_that_differ_from_the_published_ones():
    report = check_table(*CLEAN[1:], counts=PUBLISHED)
    columns = ['split','images','identities','published_images','published_identities']
    assert report['not_as_published'][columns].values.tolist()==[['train',3,2,4,2]]
    assert not report.ok
    assert 'differ from the published counts' in repr(report)
    assert 'train: 3 images of 2 people, published 4 of 2' in repr(report)
    assert 'gallery: 0 images of 0 people' in repr(check_table(*CLEAN[:5], counts=PUBLISHED))

def test_counts_of_another_variant():
    detected,labeled = reid_sets['cuhk03_np_detected'],reid_sets['cuhk03_np_labeled']
    rows = []
    for split,(n_images,n_people) in labeled.counts.items():
        first_pid = 0 if split=='train' else 1000
        rows += [(f'{split}{i}', first_pid+i%n_people, i%3, split) for i in range(n_images)]
    df = pd.DataFrame(rows, columns=COLUMNS)
    df.attrs.update(name=detected.name, counts=detected.counts)
    report = doctor(df, files=False)
    assert report['another_set'].which.tolist()==['CUHK03-NP labeled, in 3 of 3 splits']
    assert 'not_as_published' in findings_of(report)
    fewer = doctor(df.iloc[1:], files=False)
    assert fewer['another_set'].which.tolist()==['CUHK03-NP labeled, in 2 of 3 splits']
    df.attrs.update(name=labeled.name, counts=labeled.counts)
    assert not {'another_set','not_as_published'} & findings_of(doctor(df, files=False))

# the files

def test_clean_folder(market):
    report = doctor(market)
    assert report.findings.empty
    images = report.images
    assert images.digest.nunique()==8 and images.reason.isna().all()
    assert (images.width==16).all() and (images.bytes==[fn.stat().st_size for fn in images.fn]).all()

def test_files_that_cannot_be_read(market):
    cut,empty,text,_ = sorted((market/'bounding_box_train').iterdir())
    cut.write_bytes(cut.read_bytes()[:300])
    empty.write_bytes(b'')
    text.write_text('not an image')
    report = doctor(market)
    assert findings_of(report)=={'unreadable'} and not report.ok
    why = dict(zip(report['unreadable'].fn, report['unreadable'].why))
    assert 'truncated' in why[cut].lower()
    assert why[empty]=='empty file'
    assert why[text]=='not a known image format'
    assert not [reason for reason in why.values() if str(market) in reason]

def test_missing_files(market):
    df = doctor(market).images[COLUMNS]
    gone = df.fn[3]
    gone.unlink()
    report = doctor(df)
    assert findings_of(report)=={'missing'} and report['missing'].fn.tolist()==[gone]
    assert doctor(df, files=False).findings.empty

def test_sizes(market):
    folder = market/'bounding_box_train'
    sizes = dict(low=(16,31), narrow=(15,32), wide=(33,32), square=(32,32))
    fns = {name: folder/f'0001_c1s1_0001{i}0_01.jpg' for i,name in enumerate(sizes)}
    for seed,(name,size) in enumerate(sizes.items(), 20): save_noise(fns[name], seed, size)
    report = doctor(market)
    assert findings_of(report)=={'tiny','wide'} and report.ok
    assert report['tiny'].fn.tolist()==[fns['low'],fns['narrow']]
    assert report['wide'].fn.tolist()==[fns['wide']] and report['wide'].why.tolist()==['33×32']

def test_modes(market):
    folder = market/'bounding_box_train'
    extensions = dict(L='jpg', CMYK='jpg', RGBA='png', P='png')
    modes = {}
    for i,(mode,extension) in enumerate(extensions.items()):
        modes[save_noise(folder/f'0001_c1s1_00020{i}_01.{extension}', 24+i, mode=mode)] = mode
    report = doctor(market)
    assert findings_of(report)=={'mode'} and report.ok
    assert dict(zip(report['mode'].fn, report['mode'].why))==modes

def test_pictures_with_more_than_8_bits(market):
    "A warning with the values of each, and the range of all; not again as a mode"
    counts = np.random.default_rng(0).integers(7000, 9000, (3,32,16)).astype(np.uint16)
    fns = [market/'bounding_box_train'/f'0001_c1s1_00030{i}_01.png' for i in range(3)]
    for fn,values in zip(fns, counts): Image.fromarray(values).save(fn)
    report = doctor(market)
    assert findings_of(report)=={'deep'} and report.ok
    assert report.findings.severity['deep']=='warning' and 'pixel_range' in report.findings.todo['deep']
    assert report['deep'].fn.tolist()==fns
    assert report['deep'].low.tolist()==counts.min((1,2)).tolist()
    low,high = np.percentile(counts, (.1,99.9))
    spans = [f'{values.min()} to {values.max()}' for values in counts]
    spans[0] += f'; measured over all of them: {math.floor(low)} to {math.ceil(high)}'
    assert report['deep'].why.tolist()==spans
    assert 'measured over all of them' in repr(report)

def test_copies_are_found_by_their_pixels(market):
    train,query = (sorted((market/folder).iterdir()) for folder in ('bounding_box_train','query'))
    Image.open(train[0]).save(market/'bounding_box_test'/'0003_c1s1_000100_01.png')  # a leak, in another file format
    shutil.copy(train[1], market/'bounding_box_train'/'0002_c2s1_000101_01.jpg')     # two people
    shutil.copy(train[2], market/'bounding_box_train'/'0002_c1s1_000102_01.jpg')     # harmless
    shutil.copy(query[0], market/'bounding_box_test'/'0003_c2s1_000103_01.jpg')      # finds itself
    shutil.copy(train[3], market/'bounding_box_test'/'-1_c2s1_000104_01.jpg')        # junk
    report = doctor(market)
    assert {name: [fn.stem for fn in report[name].fn] for name in findings_of(report)}=={
        'leak': [train[0].stem,'0003_c1s1_000100_01'],
        'two_people': [train[1].stem,'0002_c2s1_000101_01'],
        'copy': ['0002_c1s1_000003_01','0002_c1s1_000102_01'],
        'finds_itself': [query[0].stem,'0003_c2s1_000103_01']}
    assert (report.findings.n==1).all()
    assert f'bounding_box_train/{train[0].name} = bounding_box_test/0003_c1s1_000100_01.png' in repr(report)

def test_same_pixels_in_another_shape_are_not_a_copy(market):
    folder = market/'bounding_box_train'
    Image.new('RGB', (16,32), 'red').save(folder/'0001_c1s1_000300_01.png')
    Image.new('RGB', (32,16), 'red').save(folder/'0001_c2s1_000300_01.png')
    assert findings_of(doctor(market))=={'wide','tiny'}

def test_strange_files_do_not_stop_it(market, monkeypatch):
    folder = market/'query'/'0003_c1s1_000400_01.jpg'
    folder.mkdir()
    strange = pd.DataFrame([(folder, 3, 1, 'query'), (None, 3, 1, 'query')], columns=COLUMNS)
    df = pd.concat([doctor(market, files=False).images[COLUMNS], strange])
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    unreadable = doctor(df)['unreadable']
    assert len(unreadable)==10
    assert unreadable.why.str.contains('directory').sum()==1
    assert unreadable.why.str.contains('bomb').sum()==8

# folders whose reader raises an error

def test_bad_names(market):
    holiday = save_noise(market/'query'/'holiday.jpg', 30)
    report = doctor(market)
    assert {'refused','no_pid'} <= findings_of(report)
    assert report['no_pid'].fn.tolist()==[holiday]
    assert report.splits.images.to_dict()==dict(train=4, query=2, gallery=2)
    assert report.splits.identities.to_dict()==dict(train=2, query=1, gallery=1)

def test_a_split_is_missing(market):
    shutil.rmtree(market/'query')
    report = doctor(market)
    assert {'refused','no_test'} <= findings_of(report)
    assert report.splits.images.to_dict()==dict(train=4, gallery=2)

def append(path, line):
    with path.open('a') as f: f.write(line+'\n')

@pytest.fixture
def msmt17(tmp_path):
    "Two training people, a query and its match, each from two cameras, in MSMT17's layout"
    images = (('train','train',0), ('train','train',1), ('val','train',1), ('query','test',0), ('gallery','test',0))
    for i,(list_name,folder,pid) in enumerate(images):
        for cam in (1,2):
            name = f'{pid:04}/{pid:04}_{i:03}_0{cam}_0303morning_0008_0.jpg'
            save_noise(tmp_path/folder/name, 10*i+cam)
            append(tmp_path/f'list_{list_name}.txt', f'{name} {pid}')
    return tmp_path

def test_lists_that_name_missing_files(msmt17):
    "And a line that has no person id"
    assert not {'refused','missing','train_and_test','no_pid','no_match'} & findings_of(doctor(msmt17))
    gone = msmt17/'train'/'0000'/'0000_000_01_0303morning_0008_0.jpg'
    gone.unlink()
    append(msmt17/'list_query.txt', '0000/nothing')
    report = doctor(msmt17)
    assert {'refused','missing','no_pid'} <= findings_of(report)
    assert gone in report['missing'].fn.tolist() and len(report['no_pid'])==1
    assert report.splits.loc['train','images']==6

def test_one_folder_per_person(tmp_path):
    for seed,name in enumerate(('ann/0','ann/1','bob/0','bob/1')): save_noise(tmp_path/f'{name}.jpg', seed)
    for report in (doctor(tmp_path, 'folder'), doctor(tmp_path)): assert findings_of(report)=={'no_cams','no_splits'}

def test_no_folder_no_images_unknown_name(tmp_path, market):
    with pytest.raises(FileNotFoundError, match='does not exist'): doctor(tmp_path/'none')
    for name in ('no_such_set','market'):
        with pytest.raises(ValueError, match='not a known dataset'): doctor(market, name)

# the report

def test_json(market, tmp_path):
    holiday = market/'query'/'holiday.jpg'
    holiday.write_bytes(b'')
    file = tmp_path/'sub'/'r.json'
    text = doctor(market).to_json(file)
    content = json.loads(file.read_text(encoding='utf-8'), parse_constant=pytest.fail) # neither NaN nor Infinity
    assert json.loads(text)==content
    assert content['ok'] is False and content['splits'][0]['images']==4
    rows = {finding['finding']: finding['rows'] for finding in content['findings']}
    assert rows['unreadable'][0]['fn']==str(holiday) and rows['unreadable'][0]['width'] is None

def test_html_is_escaped():
    html = check_table(*CLEAN, '<b>x</b> - 1 train')._repr_html_()
    assert '&lt;b&gt;x&lt;' in html and '<b>x</b>' not in html

def test_three_examples_and_where_the_others_are():
    text = repr(check_table(*CLEAN, *[f'x{i} - 1 train' for i in range(5)]))
    assert 'x2\n' in text and 'x3' not in text
    assert "… all 5: report['no_pid']" in text

@pytest.mark.parametrize('files', [True,False])
def test_plot(market, files):
    figure = doctor(market, files=files).plot()
    assert len(figure.axes)==(9 if files else 6)
    figure.canvas.draw()

def test_plot_of_unknown_cameras():
    figure = check_table('a 1 - train', 'x - - train', 'b 2 - what').plot()
    figure.canvas.draw()
    assert [ax.get_title(loc='left') for ax in figure.axes]==['train','','what','']

# the command line

def test_command(market, tmp_path):
    "In a process of its own, its output in a pipe"
    save_noise(market/'query'/'holiday.jpg', 30)
    png = tmp_path/'out'/'r.png'
    command = [sys.executable, '-W', 'ignore', '-m', 'pyramidreid', 'doctor', market, '--plot', png]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode==1 and 'Traceback' not in result.stderr
    assert 'rejected the folder' in result.stdout and 'query/holiday.jpg' in result.stdout
    assert not {'\r','\x1b'} & set(result.stdout+result.stderr)
    assert Image.open(png).size[0]>500
    assert [path.name for path in png.parent.iterdir()]==['r.png']

def test_exit_codes(market, tmp_path, capsys):
    from pyramidreid.cli.entry import main
    empty = tmp_path/'empty'
    empty.mkdir()
    assert main(['doctor',str(market)])==0 and 'No findings.' in capsys.readouterr().out
    assert main(['doctor',str(market),'--quick'])==0 and 'not opened' in capsys.readouterr().out
    assert main(['doctor',str(tmp_path/'none')])==2 and str(tmp_path/'none') in capsys.readouterr().err
    assert main(['doctor',str(empty)])==2 and 'No images' in capsys.readouterr().err

def test_bad_usage(market, capsys):
    from pyramidreid.cli.entry import main
    for args in ([], [str(market),'--plot','x.doc'], [str(market),'--fast']): assert main(['doctor',*args])==2
    assert main(['doctor',str(market),'--quick','--dataset','nothing'])==2
    assert 'not a known dataset' in capsys.readouterr().err
    below_a_file = market/'query'/'0003_c1s1_000005_01.jpg'/'r.png'
    assert main(['doctor',str(market),'--quick','--plot',str(below_a_file)])==2

def test_an_interrupt_stops_reading(market, monkeypatch):
    number = itertools.count()
    n_read = 0
    def slow_read(fn):
        nonlocal n_read
        n_read += 1
        time.sleep(.01)
        if next(number)==50: os.kill(os.getpid(), signal.SIGINT)
        return [None]*6
    monkeypatch.setattr('pyramidreid.data.doctor_checks._read_facts', slow_read)
    fns = [market/'query'/'0003_c1s1_000005_01.jpg']*3000
    with pytest.raises(KeyboardInterrupt): pyramidreid.data.doctor_checks._read_all_facts(fns)
    assert 50<n_read<1000

def test_an_interrupted_command(market, monkeypatch, capsys):
    from pyramidreid.cli.entry import main
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr('pyramidreid.data.doctor_report.inspect_table', interrupted)
    assert main(['doctor',str(market)])==130
    assert 'Interrupted' in capsys.readouterr().err

# the published datasets

DATA = os.environ.get('PYRAMIDREID_DATA')

@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason='PYRAMIDREID_DATA is not set')
@pytest.mark.parametrize('folder,name,images,identities,junk', [
    ('Market-1501-v15.09.15', 'Market-1501', [12936,3368,15913], [751,750,750], 3819),
    ('cuhk03-np', 'CUHK03-NP detected', [7365,1400,5332], [767,700,700], 0)])
def test_published_datasets(folder, name, images, identities, junk):
    path = Path(DATA)/folder
    if not path.exists(): pytest.skip(f'no {folder}')
    report = doctor(path)
    assert report.name==name
    assert report.splits.images.tolist()==images
    assert report.splits.identities.tolist()==identities
    assert report.splits.junk.gallery==junk
    assert report.findings.empty and report.images.reason.isna().all()

# files from strangers

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\n%%EndComments\nshowpage\n'

def test_files_from_strangers(market, monkeypatch):
    "A program in PostScript, a pipe and a picture that would fill the memory are findings, and are not read"
    started,decoded = [],[]
    train = market/'bounding_box_train'
    eps,pipe,large = (train/f'000{i}_c3s1_00000{i}_01.jpg' for i in (1,2,1))
    large = large.with_suffix('.png')
    eps.write_bytes(EPS)
    Image.new('1', (13000,13000)).save(large)
    os.mkfifo(pipe)
    timer = threading.Timer(3, os.close, [os.open(pipe, os.O_RDWR)]) # whoever waits reads an empty file then
    timer.start()
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kwargs: started.append(args))
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', lambda self: decoded.append(self.size) or load(self))
    report = doctor(market, 'folder', pid_pat='(....)_', cam_pat='_c(.)', splits=dict(
        bounding_box_train='train', query='query', bounding_box_test='gallery'))
    timer.join()
    why = dict(zip(report['unreadable'].fn.map(os.fspath), report['unreadable'].reason))
    assert why.pop(str(eps))=='not a known image format'
    assert 'is not a regular file but a pipe (FIFO): remove it' in why.pop(str(pipe))
    assert 'has 13,000×13,000 pixels, more than' in why.pop(str(large))
    assert not why and not started and not decoded

def test_large_pictures_do_not_fill_the_memory(tmp_path, monkeypatch):
    "Eight threads decode one at a time"
    now,most,load = [],[],PngImagePlugin.PngImageFile.load
    def slow_load(self):
        now.append(1)
        most.append(len(now))
        time.sleep(.05)
        now.pop()
        return load(self)
    files = [tmp_path/f'{i}.png' for i in range(6)]
    for i,file in enumerate(files): Image.new('1', (2048,2049), i%2).save(file)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', slow_load)
    monkeypatch.setattr(os, 'cpu_count', lambda: 4)
    report = doctor(pd.DataFrame(dict(fn=files, pid=list('aabbcc'))))
    assert max(most)==1 and (report.images.width==2048).all()

LATIN = os.fsdecode(b'caf\xe9.jpg')

def test_names_that_are_not_utf_8_or_would_move_the_cursor(tmp_path):
    "In the report they are escapes; JSON gives them back"
    names = [LATIN, 'a\x1b[2J\n.jpg', 'c.jpg', 'd.jpg']
    files = [tmp_path/'of'/name for name in names]
    (tmp_path/'of').mkdir()
    try:
        for file in files: file.write_bytes(b'hello')
    except OSError: pytest.skip('this file system does not take these names')
    report = doctor(pd.DataFrame(dict(fn=files, pid=['ann','ann','bob','bob'])))
    for text in (repr(report), report._repr_html_()):
        assert r'of/caf\udce9.jpg (not a known' in text and r'of/a\x1b[2J\n.jpg (not a known' in text
        assert text.encode() and '\x1b' not in text
    content = json.loads(report.to_json(tmp_path/'report.json'))
    assert content==json.loads((tmp_path/'report.json').read_text(encoding='utf-8'))
    rows = next(finding['rows'] for finding in content['findings'] if finding['finding']=='unreadable')
    assert [row['fn'] for row in rows]==[str(file) for file in files]
