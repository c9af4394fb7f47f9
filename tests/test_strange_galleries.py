"""Galleries of strangers: each has one thing wrong and the right checksum. Each is a clear `ValueError`, and none
hangs, fills memory or loses an entry without a word"""
import json
import os
import signal
import zlib

import numpy as np
import pandas as pd
import pytest
from gallery_toys import BandModel, calibration_of, embeddings

pytest.importorskip('pyarrow', reason='needs the extra gallery')

import pyarrow as pa
import pyarrow.parquet as pq

from pyramidreid.core import ReIDWarning
from pyramidreid.gallery import store
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.store import file_record

N,DIM = 10,9
KEYS = [f'k{i}' for i in range(N)]

@pytest.fixture
def path(tmp_path):
    table = pd.DataFrame(dict(key=KEYS, cam=np.arange(N)%3, pid=np.arange(N)//2))
    return Gallery(BandModel()).add(table, embs=embeddings(N)).save(tmp_path/'g')

@pytest.fixture(autouse=True)
def in_time():
    "A read that waits for a pipe ends"
    if not hasattr(signal, 'SIGALRM'): yield
    else:
        def stop(*args): raise AssertionError('30 seconds are over')
        old = signal.signal(signal.SIGALRM, stop)
        signal.alarm(30)
        yield
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

def read(path): return json.loads((path/'gallery.json').read_text())

def write(path, manifest):
    "Write a manifest with the right checksum, as a stranger can"
    manifest.pop('checksum', None)
    checksum = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (path/'gallery.json').write_text(json.dumps({**manifest, 'checksum':checksum}))

def segment_file(path, i): return path/read(path)['segments'][0]['files'][i][0]

def note_files(path):
    "Lengths and checksums of the segment's files as they are now"
    manifest = read(path)
    files = manifest['segments'][0]['files']
    manifest['segments'][0]['files'] = [file_record(path/name) for name,_,_ in files]
    write(path, manifest)

def check_refused(path, message):
    "Loading it is a `ValueError` that says so, with checksums and without"
    for check in (True,False):
        with pytest.raises(ValueError, match=message): Gallery.load(path, BandModel(), check=check)

def test_as_it_was_made(path):
    note_files(path)
    assert Gallery.load(path, BandModel()).table.key.tolist()==KEYS

# The manifest

FIELDS = [
    ('generation','x'), ('generation',-1), ('generation',True), ('generation',1.5), ('stamp',7), ('fingerprint',7),
    ('dim','8'), ('dim',0), ('dim',None), ('dtype','object'), ('dtype',['float32']), ('next_id','x'), ('kinds',7),
    ('kinds',{'key':['text']}), ('kinds',{'key':'object'}), ('notes',None), ('notes',['x']), ('index',7), ('index',{}),
    ('index',dict(file=['/dev/zero',0,0], note={})), ('index',dict(file=['000001.faiss',0,0])), ('segments',7),
    ('segments',[7]), ('segments',[{}]), ('stale',7), ('stale',{'x':'y'})]

@pytest.mark.parametrize('name,value', FIELDS)
def test_a_field_of_another_type(path, name, value):
    write(path, {**read(path), name:value})
    check_refused(path, f"gallery.json is damaged: .*'{name}'")

@pytest.mark.parametrize('name', ['generation','stamp','fingerprint','dim','dtype','next_id','kinds','notes','index',
                                  'segments'])
def test_a_missing_field(path, name):
    manifest = read(path)
    del manifest[name]
    write(path, manifest)
    check_refused(path, f"gallery.json is damaged: it has no '{name}'")

@pytest.mark.parametrize('name,value', [
    ('gone',[10]), ('gone',[10**9]), ('gone',[-1]), ('gone','all'), ('gone',[1.]), ('gone',[True]), ('gone',None),
    ('rows',0), ('rows',-10), ('rows',10.5), ('rows','10'), ('rows',True), ('files',7), ('files',[]), ('files',[7,7])])
def test_a_segment_of_another_type(path, name, value):
    manifest = read(path)
    manifest['segments'][0][name] = value
    write(path, manifest)
    check_refused(path, "gallery.json is damaged: its 'segments' should be")

@pytest.mark.parametrize('rows', [9,11,2*10**9,10**13])
def test_another_number_of_rows(path, rows):
    manifest = read(path)
    manifest['segments'][0]['rows'] = rows
    write(path, manifest)
    check_refused(path, 'safetensors is damaged .*should hold')

@pytest.mark.parametrize('name', ['/dev/zero','/etc/passwd','../000001.safetensors','sub/000001.safetensors','.','',
                                  'a\0b','000001.safetensors\n','000001.parquet','C:000001.safetensors',7,None])
def test_a_file_that_is_not_a_bare_name(path, name):
    manifest = read(path)
    manifest['segments'][0]['files'][0][0] = name
    write(path, manifest)
    check_refused(path, "gallery.json is damaged: its 'segments' should be")

@pytest.mark.parametrize('name', ['embeddings','table','gallery.json'])
@pytest.mark.parametrize('kind', ['pipe','folder','device','circle'])
def test_a_file_that_is_not_regular(path, name, kind):
    if not hasattr(os, 'mkfifo'): pytest.skip('needs Unix')
    file = path/name if name=='gallery.json' else segment_file(path, ['embeddings','table'].index(name))
    file.unlink()
    if kind=='pipe': os.mkfifo(file)
    elif kind=='folder': file.mkdir()
    elif kind=='device': file.symlink_to('/dev/zero')
    else: file.symlink_to(file)
    check_refused(path, 'is not a regular file|cannot be opened')

def test_a_link_to_a_file_is_fine(path, tmp_path):
    "People move large files to another disk"
    file = segment_file(path, 0)
    file.rename(tmp_path/'elsewhere')
    file.symlink_to(tmp_path/'elsewhere')
    assert len(Gallery.load(path, BandModel()))==N

@pytest.mark.parametrize('text', ['['*100_000, '{"a":'*100_000, '[1]', '7', '"gallery 1"', '{"format": 1'+'0'*5000+'}'])
def test_a_manifest_that_is_not_a_dict(path, text):
    (path/'gallery.json').write_text(text)
    check_refused(path, 'gallery.json is damaged')

def test_a_manifest_of_a_hundred_gigabytes(path):
    with open(path/'gallery.json', 'r+') as f: f.truncate(100<<30)
    check_refused(path, 'gallery.json is damaged: it has 107,374,182,400 bytes')

# Rows and their ids

@pytest.mark.parametrize('next_id', [0,9])
def test_the_next_row_exists_already(path, next_id):
    "Adding one and removing one would have removed both, and nine of ten with a next row of 0"
    write(path, {**read(path), 'next_id':next_id})
    check_refused(path, f'its next row is {next_id}, and .* has row 9')

def rewrite_embeddings(path, change=None, ids=None, embs=None):
    "Write the segment's embeddings with a changed header or other data"
    file = segment_file(path, 0)
    data = file.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header,body = json.loads(data[8:8+n]),data[8+n:]
    if change: header = change(header) or header
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    if ids is not None: body = np.asarray(ids, np.int64).tobytes()+body[8*N:]
    if embs is not None: body = body[:8*N]+np.asarray(embs, np.float32).tobytes()
    file.write_bytes(len(header).to_bytes(8, 'little')+header+body)
    note_files(path)

@pytest.mark.parametrize('ids', [[0]*N, range(N)[::-1], range(-N, 0), [*range(N-1),N-2]])
def test_ids_that_do_not_ascend(path, ids):
    rewrite_embeddings(path, ids=ids)
    check_refused(path, 'safetensors is damaged .*row ids do not ascend')

def test_segments_in_another_order(path):
    Gallery.load(path, BandModel()).add(pd.DataFrame(dict(key=['x'], cam=[1])), embs=embeddings(1, 1)).save()
    manifest = read(path)
    manifest['segments'].reverse()
    write(path, manifest)
    check_refused(path, 'row 0 comes after row 10')

def test_a_segment_twice(path):
    manifest = read(path)
    manifest['segments'] *= 2
    write(path, manifest)
    check_refused(path, 'row 0 comes after row 9')

# Embeddings

@pytest.mark.parametrize('name,value', [
    ('shape',[N,4]), ('shape',[N]), ('shape',[N,3,3]), ('shape',[-N,-DIM]), ('shape',[N,2**61]), ('shape',[N,0]),
    ('shape',['10',9]), ('shape',7), ('dtype','F16'), ('dtype','I32'), ('dtype','F64'), ('dtype',['F32']),
    ('data_offsets',[-8,352]), ('data_offsets',[0,360]), ('data_offsets',[80.,440]), ('data_offsets',[80]),
    ('data_offsets',[84,444]), ('data_offsets',7)])
@pytest.mark.parametrize('array', ['embeddings','ids'])
def test_a_header_that_does_not_fit(path, array, name, value):
    if array=='ids' and value==[N]: pytest.skip('fits')
    def change(header): header[array][name] = value
    rewrite_embeddings(path, change)
    check_refused(path, 'safetensors is damaged')

def test_another_precision(path):
    "As half precision the same bytes are other numbers, and twice as many: similarities of thousands"
    def change(header): header['embeddings'].update(dtype='F16', shape=[N,2*DIM])
    rewrite_embeddings(path, change)
    write(path, {**read(path), 'dim':2*DIM})
    check_refused(path, r'should hold \(10, 18\) float32, and holds \(10, 18\) float16')

@pytest.mark.parametrize('header', [b'['*100_000, b'[1]', b'{}', b'{"ids":7,"embeddings":7}', b'\xff'])
def test_a_header_that_is_not_one(path, header):
    rewrite_embeddings(path, lambda _: header)
    check_refused(path, 'safetensors is damaged')

@pytest.mark.parametrize('size', [2**63,2**62,20<<30,10**6])
def test_a_header_longer_than_the_file(path, size):
    file = segment_file(path, 0)
    file.write_bytes(size.to_bytes(8, 'little')+file.read_bytes()[8:])
    note_files(path)
    check_refused(path, 'safetensors is damaged .*header should have')

@pytest.mark.parametrize('value', [np.nan,np.inf,100.,0.,1e30])
def test_an_embedding_of_another_length(path, value):
    embs = np.eye(N, DIM)+np.eye(N, DIM, -DIM)
    embs[3,3] = value
    rewrite_embeddings(path, embs=embs)
    with pytest.raises(ValueError, match='safetensors is damaged: the embedding in row 3 has the length'):
        Gallery.load(path, BandModel())

# The table

def rewrite_table(path, **columns):
    pq.write_table(pa.table(columns), segment_file(path, 1))
    note_files(path)

NUMBERS = list(range(N))

@pytest.mark.parametrize('columns', [
    dict(cam=NUMBERS),
    dict(key=NUMBERS),
    dict(key=KEYS[:9]),
    dict(key=pa.array([None]*N, pa.string())),
    dict(key=[*KEYS[:9],None]),
    dict(key=pa.array([k.encode() for k in KEYS])),
    dict(key=pa.DictionaryArray.from_arrays(pa.array([0]*N), pa.array(['x']))),
    dict(key=KEYS, cam=[[1]]*N),
    dict(key=KEYS, cam=[{'a':1}]*N),
    dict(key=KEYS, cam=[str(i) for i in NUMBERS]),
    dict(key=KEYS, similarity=[2.]*N),
    dict(key=KEYS, query=NUMBERS),
    dict(key=KEYS, other=NUMBERS)])
def test_a_table_that_does_not_fit(path, columns):
    rewrite_table(path, **columns)
    check_refused(path, 'parquet is damaged')

def test_a_key_twice(path):
    rewrite_table(path, key=[*KEYS[:9],'k0'], cam=NUMBERS)
    check_refused(path, "1 entries have the key of another, the first is 'k0'")

def test_text_that_is_not_unicode(path):
    raw = pa.array([b'\xff\xfe']+[k.encode() for k in KEYS[1:]])
    rewrite_table(path, key=pa.Array.from_buffers(pa.string(), N, raw.buffers()))
    check_refused(path, 'parquet is damaged')

@pytest.mark.parametrize('index', [['cam'], [dict(kind='range', start=0, stop=10**10, step=1)]])
def test_a_table_with_an_index(path, index):
    about = json.dumps(dict(index_columns=index, column_indexes=[], columns=[]))
    table = pa.table(dict(key=KEYS, cam=NUMBERS)).replace_schema_metadata({'pandas':about})
    pq.write_table(table, segment_file(path, 1))
    note_files(path)
    check_refused(path, 'marked as an index')

def memory_of(f):
    "Bytes that pyarrow allocates at most while `f` runs"
    pool = pa.system_memory_pool()
    old = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        before = pool.bytes_allocated()
        f()
        return pool.max_memory()-before
    finally: pa.set_memory_pool(old)

def repeated(n, text): return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))

def test_a_table_of_a_hundred_million_rows(path):
    "Ten megabytes in parquet, a hundred gigabytes of text. They are counted, not decoded"
    part = pa.table(dict(key=repeated(1_000_000, 'x'*1000)))
    with pq.ParquetWriter(segment_file(path, 1), part.schema, compression='zstd') as f:
        for _ in range(100): f.write_table(part)
    del part
    note_files(path)
    assert segment_file(path, 1).stat().st_size<2*10**7
    assert memory_of(lambda: check_refused(path, 'should have 10 rows and has 100,000,000'))<10**8

def test_long_texts_repeated(path):
    "Ten rows, and one text of 10 MB in parquet's dictionary"
    table = pa.table(dict(key=repeated(N, 'x'*10_000_000)))
    plain = table.schema.set(0, pa.field('key', pa.string())) # As it would be read without a note of the dictionary
    with pq.ParquetWriter(segment_file(path, 1), plain, compression='none') as f: f.write_table(table.cast(plain))
    note_files(path)
    assert memory_of(lambda: check_refused(path, "'key' would grow to 100,000,000 bytes"))<10**8

# The calibration

@pytest.mark.parametrize('value', ['/etc/passwd','/dev/zero','gallery.json',7,['x'],True,'{','{"a":'+'['*100_000,
                                   '{"card": "Calibration"}','{"card": 7}','[]'])
def test_a_calibration_that_is_not_one(path, value):
    write(path, {**read(path), 'notes':dict(calibration=value)})
    check_refused(path, "The gallery's calibration is damaged")

def test_a_calibration_that_is_a_pipe(path):
    if not hasattr(os, 'mkfifo'): pytest.skip('needs Unix')
    os.mkfifo(path/'pipe')
    write(path, {**read(path), 'notes':dict(calibration=str(path/'pipe'))})
    check_refused(path, "The gallery's calibration is damaged")

@pytest.mark.parametrize('name', ['impostor','n_gallery','n_ids','cameras','about','far','distance'])
def test_a_calibration_with_a_field_of_another_type(path, name):
    values = json.loads(calibration_of([.1,.2], N).to_json())
    value = 7 if name=='distance' else 'x'
    write(path, {**read(path), 'notes':dict(calibration=json.dumps({**values, name:value}))})
    check_refused(path, "The gallery's calibration is damaged")

# The lock

@pytest.mark.parametrize('kind', ['pipe','folder','link'])
def test_a_lock_that_is_not_a_file(path, tmp_path, kind):
    "A save says so or works, and creates nothing elsewhere"
    if not hasattr(os, 'mkfifo'): pytest.skip('needs Unix')
    lock = path/'gallery.lock'
    lock.unlink()
    if kind=='pipe': os.mkfifo(lock)
    elif kind=='folder': lock.mkdir()
    else: lock.symlink_to(tmp_path/'elsewhere')
    gallery = Gallery.load(path, BandModel())
    gallery.remove('k3')
    if kind=='pipe': gallery.save()
    else:
        with pytest.raises(OSError, match='gallery.lock'): gallery.save()
    assert not (tmp_path/'elsewhere').exists()

# Files of terabytes, which take no room on the disk

@pytest.mark.parametrize('i', [0,1])
@pytest.mark.parametrize('rows', [N,10**11])
def test_a_file_is_not_read_for_its_checksum_if_it_is_too_long(path, i, rows):
    "Longer than its entries can take; or most of it a hole, if the manifest has as many entries"
    manifest = read(path)
    segment = manifest['segments'][0]
    size = 1<<40
    os.truncate(path/segment['files'][i][0], size)
    segment['files'][i][1],segment['rows'] = size,rows
    write(path, manifest)
    check_refused(path, 'take at most' if rows==N else 'hardly any of its 1,099,511,627,776 bytes are on the disk')

def test_a_file_without_any_byte_on_the_disk(path, monkeypatch):
    "Nor on a disk that does not say how many it holds"
    manifest = read(path)
    segment = manifest['segments'][0]
    file = path/segment['files'][0][0]
    file.write_bytes(b'')
    os.truncate(file, 1<<40)
    segment['files'][0][1],segment['rows'] = 1<<40,10**11
    write(path, manifest)
    check_refused(path, 'hardly any')

def test_the_index_is_not_read_either(path):
    manifest = read(path)
    (path/'000001.faiss').write_bytes(b'')
    os.truncate(path/'000001.faiss', 1<<42)
    manifest['index'] = dict(file=['000001.faiss',1<<42,0], note=dict(kind='ivf', rows=10**12))
    write(path, manifest)
    with pytest.warns(ReIDWarning, match='The index is damaged: .* take at most'):
        gallery = Gallery.load(path, BandModel())
    assert gallery.table.key.tolist()==KEYS

def test_lengths_that_files_may_have(path):
    "A file of 4 GB that is on the disk, and one of an almost empty table, are no holes"
    assert not store._is_hole(segment_file(path, 0))
    n,dim = 300_000,2048
    content = dict(dim=dim, dtype='float32', kinds=dict(key='text', cam='number'))
    most = store._most_bytes(content, n)
    assert n*(8+4*dim)<=most['safetensors']<=n*(8+4*dim)+2**21
    assert most['parquet']>n*4096*2 # two texts of the largest size that is read
    assert most['faiss']>n*(dim+8)+4*round(2*n**.5)*dim # see `_empty_index`
    assert most['faiss']>n*(dim+4*68+8)
