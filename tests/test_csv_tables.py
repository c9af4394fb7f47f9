"CSV files as people have them: separators, encodings, headers, paths of Windows, and what is refused"
import json
import os
import warnings
from pathlib import Path

import pandas as pd
import pytest

import pyramidreid.export.model_files  # noqa: F401, for save_model
from pyramidreid.cli.entry import main
from pyramidreid.cli.inputs import held_out, read_data
from pyramidreid.core import ReIDWarning
from pyramidreid.data.csv_tables import csv_table, is_csv, read_csv
from pyramidreid.data.datasets import dataset_table, market_table
from pyramidreid.data.doctor_report import doctor
from pyramidreid.data.loaders import ReIDDataLoaders

ROWS = [('ann/0.jpg','007','door','query'), ('ann/1.jpg','007','hall','gallery'), ('bob/0.jpg','-1',None,'gallery')]
PLAIN = 'fn,pid,cam,split\nann/0.jpg,007,door,query\nann/1.jpg,007,hall,gallery\nbob/0.jpg,-1,,gallery\n'
posix = pytest.mark.skipif(os.name=='nt', reason='drives and backslashes are at home there')

@pytest.fixture
def write(tmp_path):
    "`write(content)`: the file people.csv"
    def write_file(content, encoding='utf-8'):
        file = tmp_path/'people.csv'
        file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return file
    return write_file

def rows_of(df, folder): return [(o.fn.relative_to(folder).as_posix(), o.pid, o.cam, o.split) for o in df.itertuples()]

@pytest.fixture
def people_csv(people, tmp_path):
    "The synthetic people as a CSV file of Excel, with splits as people write them"
    df = market_table(people)
    names = dict(train='Train', query='Query ', gallery='GALLERY')
    table = pd.DataFrame({'File Name': df.fn, 'Person ID': df.pid, 'Cam': df.cam, 'Split': df.split.map(names)})
    file = tmp_path/'own.csv'
    table.to_csv(file, sep=';', index=False, encoding='utf-16')
    return file

# What is read

WAYS = {
    'as it should be': PLAIN,
    'semicolons': PLAIN.replace(',', ';'),
    'tabs': PLAIN.replace(',', '\t'),
    'bars': PLAIN.replace(',', '|'),
    "Excel's separator line": 'sep=;\n'+PLAIN.replace(',', ';'),
    "Excel's separator line, quoted, a tab": '"sep=\t"\r\n'+PLAIN.replace(',', '\t').replace('\n', '\r\n'),
    'Windows lines': PLAIN.replace('\n', '\r\n'),
    'old Mac lines': PLAIN.replace('\n', '\r'),
    'capitals and spaces': PLAIN.replace('fn,pid,cam,split', ' Fn , PID,Cam ,SPLIT'),
    'spaces around values': PLAIN.replace(',', ' , '),
    'quotes': '\n'.join(','.join(f'"{field}"' for field in line.split(',')) for line in PLAIN.split('\n')[:-1]),
    'synonyms': PLAIN.replace('fn,pid,cam,split', 'image_path,Person ID,camera-id,Subset'),
    'a synonym beside the name': PLAIN.replace('fn,', 'fn,path,').replace('.jpg,', '.jpg,elsewhere,'),
    'an index': '\n'.join(f'{i or ""},{line}' for i,line in enumerate(PLAIN.split('\n')[:-1])),
    'empty rows and columns': PLAIN.replace('\n', ',,\n')+',,,,,\n\n',
    'lines before the header': '\n \n'+PLAIN,
    'a column more': PLAIN.replace('\n', ',"x, y; z"\n'),
    'nan for no camera': PLAIN.replace('-1,,', '-1,nan,'),
    'no newline at the end': PLAIN.rstrip()}

@pytest.mark.parametrize('content', WAYS.values(), ids=WAYS)
def test_the_same_table(write, tmp_path, content):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        df = csv_table(write(content))
    assert list(df.columns)==['fn','pid','cam','split'] and df.attrs['name']=='people'
    assert rows_of(df, tmp_path)==ROWS

@pytest.mark.parametrize('encoding', ['utf-8','utf-8-sig','utf-16','utf-32'])
def test_encodings(write, encoding):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        df = csv_table(write('fn,pid\njürgen.jpg,Jürgen 行\n', encoding))
    assert df.pid.tolist()==['Jürgen 行'] and df.fn[0].name=='jürgen.jpg'

def test_big_endian_utf_16(write):
    assert csv_table(write(b'\xfe\xff'+'fn,pid\na.jpg,é\n'.encode('utf-16-be'))).pid.tolist()==['é']

def test_windows_1252_is_read_with_a_warning(write):
    file = write('fn,pid\na.jpg,Jürgen\nb.jpg,€uro\n', 'cp1252')
    with pytest.warns(ReIDWarning, match="people.csv is not UTF-8 .line 2.*Windows-1252.*'Jürgen'") as caught:
        df = csv_table(file)
    assert len(caught)==1 and df.pid.tolist()==['Jürgen','€uro']

def test_columns_that_are_missing_are_unknown(write):
    df = csv_table(write('fn,pid\na.jpg,1\n'))
    assert df.cam.tolist()==df.split.tolist()==[None]

def test_a_missing_value_is_none(write):
    df = csv_table(write('fn,pid,cam,split\na.jpg,1\nb.jpg,,NA,\n'))
    assert df[['pid','cam','split']].values.tolist()==[['1',None,None],[None]*3]

@posix
def test_separators_of_windows(write, tmp_path):
    odd = tmp_path/'odd\\name.jpg'
    odd.touch()
    df = csv_table(write('fn;pid\nann\\0.jpg;1\n.\\bob\\0.jpg;2\nodd\\name.jpg;3\n'))
    assert df.fn.tolist()==[tmp_path/'ann'/'0.jpg', tmp_path/'bob'/'0.jpg', odd] # which is there with this name

def test_absolute_files(write, tmp_path):
    file = tmp_path/'else'/'0.jpg'
    assert csv_table(write(f'fn,pid\n{file},1\n')).fn.tolist()==[file]

def test_a_table_without_people(write, tmp_path):
    df = read_csv(write('FN ;Time;Note\na.jpg;2024;"b;c"\nb.jpg; 2025;\n'), text=False)
    assert df.columns.tolist()==['fn','time','Note'] and df.time.tolist()==[2024,2025]
    assert df.fn.tolist()==[tmp_path/'a.jpg', tmp_path/'b.jpg'] and df.Note[0]=='b;c' and pd.isna(df.Note[1])
    df = read_csv(write('fn,key,person,role\n1,002,003,guest\n'), text=False) # columns of one's own keep their names
    assert df.key.tolist()==['002'] and df.person.tolist()==[3] and df.fn[0].name=='1' and df.role.tolist()==['guest']

def test_which_paths_are_tables(tmp_path):
    (tmp_path/'folder.csv').mkdir()
    assert is_csv('a.csv') and is_csv(Path('A.CSV')) and is_csv('a.tsv')
    assert not any(map(is_csv, ['a.xlsx','csv',tmp_path/'folder.csv']))

# What is refused

REFUSED = {
    b'': 'people.csv is empty',
    b'\xef\xbb\xbf \r\n': 'is empty',
    'fn,pid\n'.encode('utf-16')[:2]: 'is empty',
    b'PK\x03\x04\x14\0\x06\0': 'an Excel workbook',
    b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1': 'an old Excel workbook',
    b'\xff\xd8\xff\xe0\0\x10JFIF': 'a JPEG image',
    b'fn,pid\na.jpg,\x01\n': "not a text file.*line 2",
    'fn,pid\n'.encode('utf-16-le'): 'not a text file, or its encoding is unknown',
    b'\x93\x00\x81\xfe': 'neither UTF-8 .line 1. nor Windows-1252',
    'fn,pid\n'.encode('utf-16')[:-1]: 'begins like utf-16',
    b'sep=,\n': 'no header',
    b'fn,pid\n': "has a header, 'fn', 'pid', but no rows",
    b'fn;pid\n;\n': 'no rows',
    b'a,b\n1,2\n': "no column 'fn'.*'a', 'b'. Rename",
    b'fn,id\na.jpg,1\n': "no column 'pid' with the person ids. Its columns are 'fn', 'id'. Rename",
    b'File,label\na.jpg,1\n': "no column 'pid'.*'File', 'label'",
    b'ann/0.jpg,ann\n': 'is the header missing',
    b'file,img,pid\na,b,c\n': "'file' and 'img' may be meant",
    b'fn,pid,PID\na,b,c\n': "2 columns 'pid'",
    b'fn,pid,x, x\na,b,c,d\n': "2 columns 'x'",
    b'fn,pid\na.jpg,1\n,3\n ,4\n': "2 of 3 rows have no file name in the column 'fn', the first on line 3",
    b'\nfn,pid\na.jpg,1\n\n,3\n': "1 of 2 rows.*the first on line 5",
    b'fn,pid\na,b.jpg,3\n': "line 2.*quotes around values that contain ','",
    b'fn,pid\nc.jpg,1\na,b,c,d.jpg,3\n': "not a valid CSV table.*line 3.*quotes around",
    b'fn,pid\na,b,c,d.jpg,3\n': "not a valid CSV table.*quotes around",
    b'fn,pid\n"a.jpg,3\n': 'not a valid CSV table.*inside string',
    b'fn,pid\na.jpg;3\n': "no row has a value in the column 'pid'.*a.jpg;3"}

@pytest.mark.parametrize('content', REFUSED, ids=map(repr, REFUSED.values()))
def test_an_error_names_the_cause(write, content):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=REFUSED[content]) as e:
        warnings.simplefilter('error')
        csv_table(write(content))
    assert 'people.csv' in str(e.value)

@posix
@pytest.mark.parametrize('fn', ['C:\\crops\\0.jpg','d:/crops/0.jpg','\\\\server\\crops\\0.jpg'])
def test_a_drive_of_windows(write, fn):
    with pytest.raises(ValueError, match=r'on line 3 is on a Windows drive.*relative to the folder of the CSV'):
        csv_table(write(f'fn,pid\na.jpg,1\n{fn},1\n'))

def test_a_file_that_is_not_there(tmp_path):
    for read in (csv_table, dataset_table, doctor):
        with pytest.raises(FileNotFoundError, match='nowhere.csv'): read(tmp_path/'nowhere.csv')

# Everywhere

def test_every_reader_takes_a_csv_file(people, people_csv):
    expected = market_table(people)
    for df in (dataset_table(people_csv), read_data(people_csv), csv_table(people_csv)):
        assert df.fn.tolist()==expected.fn.tolist() and df.pid.tolist()==expected.pid.map(str).tolist()
    with pytest.raises(ValueError, match='own.csv is a CSV table.*leave out the name'):
        dataset_table(people_csv, 'market1501')
    dls = ReIDDataLoaders.from_csv(people_csv, p=4, k=4, size=(48,24), num_workers=0)
    assert dls.c==12 and dls.data_name=='own' and dls.path==people_csv.parent
    assert dls.valid.items.fn.tolist()==expected.fn[expected.split!='train'].tolist()

def test_evaluation_on_a_csv_file(trained, people, people_csv):
    table = trained.evaluate_on({'folder':people, 'file':people_csv})
    assert table['mAP (mean of precisions)'].nunique()==1

def test_doctor_of_a_csv_file(people, people_csv, capfd):
    report,expected = doctor(people_csv, files=False),doctor(people, files=False)
    assert report.name=='own' and report.splits.equals(expected.splits) and report.ok
    with pytest.raises(ValueError, match='leave out the name'): doctor(people_csv, 'folder')
    capfd.readouterr()
    assert main(['doctor', people_csv, '--quick', '--json'])==0
    assert json.loads(capfd.readouterr().out)['splits']==json.loads(report.to_json())['splits']

def test_doctor_finds_a_file_listed_as_two_people(people, tmp_path):
    fn = market_table(people).fn[0]
    file = tmp_path/'own.csv'
    file.write_text(f'fn,pid\n{fn},1\n{fn},2\n')
    report = doctor(file)
    assert {'listed_twice','two_people'} <= set(report.findings.index) and not report.ok
    assert sorted(report['two_people'].pid)==['1','2']

def test_the_command_evaluates_all_rows(people, people_csv, trained, tmp_path, capfd):
    "Rows with the split 'Gallery' were dropped"
    model = trained.save_model(tmp_path/'model')
    maps = []
    for data in (people, people_csv):
        capfd.readouterr()
        assert main(['evaluate', model, data, '--json', '-q'])==0
        maps.append(json.loads(capfd.readouterr().out)['mAP'])
    assert maps[0]==maps[1]<1

@pytest.mark.parametrize('split,cause', [('test',"neither which images are queries"), ('street',"'street' (")])
def test_the_command_refuses_unknown_splits(people, trained, tmp_path, capfd, split, cause):
    file = tmp_path/'own.csv'
    df = market_table(people)
    df.assign(split=df.split.replace('gallery', split)).to_csv(file, index=False)
    for args in (['evaluate', trained.save_model(tmp_path/'model'), file], ['train', file, '--out', tmp_path/'run']):
        capfd.readouterr()
        assert main(args)==2
        err = capfd.readouterr().err
        assert cause in err and f"'{split}' is not a valid role" in err and "'query' (" in err

def test_held_out_people_of_the_command(people, people_csv):
    df = read_data(people_csv)
    held,name = held_out(df, .5)
    assert set(held.split)=={'query','gallery'} and set(held.fn) <= set(df.fn[df.split=='Train'])
    assert name=='own, 50% of the training identities held out'
    chosen,name = held_out(df)
    assert name=='own' and len(chosen)==(df.split!='Train').sum()
    with pytest.raises(ValueError, match='--hold-out'): held_out(df[df.split=='Train'])

# Files from strangers

def strange_file(file, kind):
    if kind=='pipe': os.mkfifo(file)
    elif kind=='device': file.symlink_to('/dev/zero')
    else:
        with open(file, 'wb') as f: f.truncate(2**40) # it has no blocks on the disk

@posix
@pytest.mark.parametrize('kind,message', [('pipe','is not a regular file but .*: give the path of a CSV file'),
    ('device','is not a regular file'), ('terabyte','1,099,511,627,776 bytes, more than the 536,870,912 allowed')])
def test_only_regular_files_of_some_length_are_read(tmp_path, kind, message):
    strange_file(tmp_path/'people.csv', kind)
    for reader in (read_csv, csv_table):
        with pytest.raises(ValueError, match=message): reader(tmp_path/'people.csv')

BOMBS = {
    'a field longer than the csv module reads':('fn,"'+'x'*200_000+'"\na.jpg,b\n', 'a header of 200,005 characters'),
    'a hundred thousand columns':('fn,'+','.join(f'c{i}' for i in range(100_000))+'\na.jpg\n', 'a header of 688,892'),
    'columns without a name, rows without fields':('fn'+','*90_000+'\n'+'a.jpg\n'*30_000, '90,001 names in its header')}

@pytest.mark.parametrize('name', BOMBS)
def test_a_short_file_does_not_fill_the_memory(write, name):
    text,message = BOMBS[name]
    with pytest.raises(ValueError, match=message): read_csv(write(text))

def test_a_table_may_have_many_columns_and_gaps(write):
    "Three fields in four may be empty, as long as their separators are there"
    text = 'fn'+''.join(f',c{i}' for i in range(2000))+'\n'+('a.jpg,1'+','*1999+'\n')*2100
    table = read_csv(write(text))
    assert table.shape==(2100,2001) and table.c0.eq('1').all() and table.c1.isna().all()
