"The page of `pyramidreid serve`: answers, hostile requests, changes by several at once, and a real browser"
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from chromium import PROGRAM, chromium, wait_for
from gallery_toys import BandModel, calibration_of
from PIL import Image
from starlette.testclient import TestClient

from pyramidreid.cli.entry import main
from pyramidreid.core import shown_text
from pyramidreid.explain.matching_bands import branch_similarities
from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.web.answers import MAX_K, search_answer
from pyramidreid.web.answers import SearchRequest as Asked
from pyramidreid.web.guard import HEADERS
from pyramidreid.web.pictures import MAX_UPLOAD
from pyramidreid.web.server import Desk, make_app, open_socket
from pyramidreid.web.shared_gallery import PageError, SharedGallery, entry_address, pid_text

HERE = 'http://127.0.0.1:8000'
ORIGIN = dict(origin=HERE)

# ---- a small gallery with real files

class PyramidModel:
    "Mean colours of a pyramid over three parts, each of the same length"
    about,fingerprint = dict(norm='branch', n_parts=3, levels=[1,2,3]),'a pyramid'
    windows = [(0,1),(1,2),(2,3),(0,2),(1,3),(0,3)]
    def embed(self, images):
        rows = np.stack([np.asarray(o.resize((1,3)), np.float32)[:, 0]/255+.01 for o in images])
        branches = np.stack([rows[:, a:b].mean(1) for a,b in self.windows], 1)
        branches /= np.linalg.norm(branches, axis=2, keepdims=True)
        return branches.reshape(len(rows), -1)/len(self.windows)**.5

def jpeg(seed, size=(32,64)):
    "A picture of three stripes, as a file"
    stripes = np.random.default_rng(seed).integers(0, 255, (3,1,3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(stripes).resize(size, Image.Resampling.NEAREST).save(file, 'JPEG')
    return file.getvalue()

def new_gallery(folder, n=24, model=None, **columns):
    "A saved gallery of `n` entries with pictures"
    files = []
    for i in range(n):
        files.append(folder/f'{i:02d}.jpg')
        files[-1].write_bytes(jpeg(i))
    start = pd.Timestamp('2026-11-23 08:00')
    table = pd.DataFrame(dict(fn=list(map(str, files)), pid=[i//4 for i in range(n)], cam=[i%3 for i in range(n)],
                              track=[f't{i//2}' for i in range(n)],
                              time=[start+pd.Timedelta(minutes=i) for i in range(n)]))
    gallery = Gallery(model or PyramidModel()).add(table.assign(**columns))
    gallery.save(folder/'street')
    return gallery

def new_browser(desk, base_url=HERE, **kwargs):
    return TestClient(make_app(desk, **kwargs), base_url=base_url, follow_redirects=False)

@pytest.fixture
def site(tmp_path, monkeypatch):
    "A gallery, its page, and a browser on it"
    monkeypatch.chdir(tmp_path)
    gallery = new_gallery(tmp_path)
    desk = Desk(tmp_path/'street', gallery.embedder)
    return SimpleNamespace(folder=tmp_path/'street', files=tmp_path, gallery=gallery, desk=desk,
                           browser=new_browser(desk), keys=gallery.table.key.tolist())

def contents(folder): return {o.name: o.read_bytes() for o in folder.iterdir() if o.name!='gallery.lock'}
def addresses(html): return re.findall(r'<li id="e-([0-9a-f]{32})"', html)
def similarities(html): return [float(o) for o in re.findall(r'aria-label="Rank \d+, similarity (-?[\d.]+)"', html)]
def said(html): return ' '.join(map(unescape, re.findall(r'role="(?:alert|status)"[^>]*>([^<]+)<', html)))

def upload(browser, data, name='someone.jpg', back='', kind='image/jpeg', **head):
    return browser.post('/query', files=dict(picture=(name, data, kind)), data=dict(back=back), headers=ORIGIN | head)

def label(browser, what, address, pid='', shown='', back='', **head):
    form = {what:address, 'pid':pid, f'shown-{address}':shown, 'back':back}
    return browser.post('/label', data=form, headers=ORIGIN | head)

def pids(folder): return Gallery.load(folder).table.set_index('key').pid.to_dict()

# ---- answers

FILTERS = [
    ({}, {}), (dict(k='5'), dict(k=5)), (dict(exclude_cam='1'), dict(exclude_cam=1)),
    (dict(cam='2'), dict(where='cam==2')), (dict(since='2026-11-23 08:10'), dict(since='2026-11-23 08:10')),
    (dict(where='pid in [1,3] and cam!=0'), dict(where='pid in [1,3] and cam!=0')),
    (dict(cam='2', where='pid<3', exclude_cam='0'), dict(where='pid<3 and cam==2')),
    (dict(per='pid', k='4'), dict(per='pid', k=4)), (dict(per='track', k='60'), dict(per='track', k=24))]

@pytest.mark.parametrize('values,options', FILTERS, ids=lambda o: '&'.join(o) if isinstance(o, dict) else None)
def test_results_are_those_of_the_gallery(site, values, options):
    data = jpeg(99)
    sent = upload(site.browser, data)
    assert sent.status_code==303
    url = urlsplit(sent.headers['location'])
    html = site.browser.get('/search', params={**parse_qs(url.query), **values}).text
    query = site.gallery.embed([Image.open(io.BytesIO(data))])
    found = site.gallery.search(query, **{'k':12, **options})
    assert addresses(html)==[entry_address(key) for key in found.key]
    assert similarities(html)==pytest.approx(found.similarity.tolist(), abs=6e-4)

def test_more_like_an_entry_leaves_it_out(site):
    key = site.keys[5]
    html = site.browser.get('/search', params=dict(entry=entry_address(key), k='7')).text
    found = site.gallery.search(key, 7, where=lambda t: t.key!=key)
    assert addresses(html)==[entry_address(key) for key in found.key]
    assert f'value="{site.gallery.table.pid[5]}"' in html # the id that confirming gives

def test_bands_are_those_of_the_explanation(site):
    key,other = site.keys[:2]
    row = search_answer(site.desk.shared, site.desk.shared.embeddings_of([key]), Asked(k=24))['rows']
    row = next(o for o in row if o['key']==other)
    naive = branch_similarities(*site.gallery.embed([key, other]).values, 3, [1,2,3])
    for name in ('level','top','bottom','similarity'):
        assert [o[name] for o in row['bands']]==pytest.approx(naive[name].tolist(), abs=1e-5)
    html = site.browser.get('/search', params=dict(entry=entry_address(key), k='24')).text
    card = re.search(rf'<li id="e-{entry_address(other)}".*?</li>', html, re.S)[0]
    best = naive[naive.level==1].similarity.idxmax()
    assert f'data-top="{naive.top[best]:.4f}" data-bottom="{naive.bottom[best]:.4f}"' in card
    assert len(re.findall(r'<svg[^>]*class="chart"', card))==1 and card.count('<title>level')==6+3

def test_a_model_without_bands_is_searched_as_well(tmp_path):
    gallery = new_gallery(tmp_path, 6, BandModel())
    entry = entry_address(gallery.table.key[0])
    html = new_browser(Desk(tmp_path/'street', gallery.embedder)).get(f'/search?entry={entry}').text
    assert len(addresses(html))==5 and 'no bands are shown' in html and 'class="chart"' not in html

def calibrate(site, scores):
    site.gallery.calibration = calibration_of(scores, len(site.gallery))
    site.gallery.save()

def test_nobody_is_near_enough(site):
    query = dict(entry=entry_address(site.keys[0]))
    assert 'has no calibration' in said(site.browser.get('/search', params=query).text)
    calibrate(site, np.linspace(.2, .9999, 200))
    html = site.browser.get('/search', params=query).text
    assert said(html).startswith('Nobody is near enough. The most similar entry has 0.9') and '1 in 100' in said(html)
    assert html.count('card far')==12 and html.count('class="card"')==0

@pytest.mark.parametrize('far', [.01,.05,.2,.37])
def test_the_line_is_the_gallerys(site, far):
    calibrate(site, np.linspace(.7, .999, 200))
    key = site.keys[3]
    html = site.browser.get('/search', params=dict(entry=entry_address(key), far=f'{far}', k='24')).text
    found = site.gallery.search(key, 23, far=far, where=lambda t: t.key!=key)
    assert re.findall(r'<li id="e-([0-9a-f]+)" class="card"', html)==[entry_address(key) for key in found.key]
    assert len(addresses(html))==23

def test_a_similarity_as_the_line(site):
    key = site.keys[3]
    html = site.browser.get('/search', params=dict(entry=entry_address(key), threshold='0.9', k='24')).text
    found = site.gallery.search(key, 23, threshold=.9, where=lambda t: t.key!=key)
    assert len(re.findall('class="card"', html))==len(found)>0

def test_a_rate_out_of_reach_is_an_error_of_its_field(site):
    calibrate(site, np.linspace(.2, .9, 20))
    entry = entry_address(site.keys[0])
    assert '1 in 20' in said(site.browser.get('/search', params=dict(entry=entry)).text)
    done = site.browser.get('/search', params=dict(entry=entry, far='0.001'))
    assert done.status_code==400 and 'out of reach' in done.text and 'id="far-error"' in done.text

def test_an_empty_gallery_and_one_of_embeddings_only(tmp_path):
    model = PyramidModel()
    gallery = Gallery(model).add(pd.DataFrame(dict(key=['a','b'])), embs=Embeddings(np.eye(18)[:2], model.fingerprint))
    gallery.save(tmp_path/'bare')
    browser = new_browser(Desk(tmp_path/'bare', model))
    assert browser.get('/').status_code==200
    done = browser.get(f"/picture/{entry_address('a')}")
    assert done.status_code==404 and 'none is stored' in done.text and done.headers['content-type']=='image/svg+xml'
    gallery.remove(['a','b']).save()
    sent = upload(browser, jpeg(1))
    assert 'gallery is empty' in said(browser.get(sent.headers['location']).text)

# ---- text of others

def tags_of(html):
    "Names and attributes of all tags, as a browser finds them"
    found,parser = [],HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(html)
    return found

HOSTILE = '"><script>alert(1)</script>\'&\u202e'

def test_text_of_the_gallery_is_escaped(tmp_path):
    keys = [f'{HOSTILE}{i}' for i in range(6)]
    gallery = new_gallery(tmp_path, 6, pid=HOSTILE, cam=HOSTILE, note=HOSTILE, key=keys, **{'a<b>':1})
    browser = new_browser(Desk(tmp_path/'street', gallery.embedder))
    sent = upload(browser, jpeg(50), name='<img src=x onerror=alert(1)>.jpg')
    pages = [browser.get('/').text, browser.get(sent.headers['location']).text,
             browser.get('/search', params=dict(entry=entry_address(keys[0]), where=HOSTILE)).text,
             browser.get('/search', params=dict(entry=HOSTILE, query=HOSTILE, k=HOSTILE)).text]
    for html in pages:
        tags = tags_of(html)
        assert [o for o in tags if o[0]=='script']==[('script', dict(src='/static/page.js', defer=None))]
        names = {name for _,attributes in tags for name in attributes}
        assert 'style' not in names and not [o for o in names if o.startswith('on')]
        assert all(attributes['src'].startswith(('/picture/','/asked/')) for tag,attributes in tags if tag=='img')
    assert pages[1].count('&lt;script&gt;')>=6*4 and '\u202e' not in ''.join(pages[:2])
    done = label(browser, 'confirm', entry_address(keys[0]), 'anna', shown_text(HOSTILE))
    assert done.status_code==303 and pids(tmp_path/'street')[keys[0]]=='anna'

# ---- hostile requests

def png(width, height):
    "A PNG of that size in a few bytes"
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+chunk(b'IDAT', zlib.compress(b''))+chunk(b'IEND', b'')

def get(path, status, **kwargs): return pytest.param('GET', path, status, kwargs, id=f'GET {path}'[:60])
def post(path, status, name, **kwargs): return pytest.param('POST', path, status, kwargs, id=f'POST {path} {name}')
def file(data, name='a.jpg', kind='image/jpeg'): return dict(files=dict(picture=(name, data, kind)), headers=ORIGIN)

FORM = {**ORIGIN, 'content-type':'application/x-www-form-urlencoded'}
REQUESTS = [
    get('/picture/../../../../etc/passwd', 404), get('/picture/%2e%2e%2f%2e%2e%2fetc%2fpasswd', 404),
    get('/picture/..%5c..%5cwindows', 404), get('/picture/%00', 404), get('/picture/' + 'a'*32, 404),
    get('/static/../server.py', 404), get('/static/%2e%2e%2fserver.py', 404), get('/static//etc/passwd', 404),
    get('/asked/../../etc/passwd', 404), get('/asked/%2e%2e%2fpasswd', 404),
    get('/search?entry=../../etc/passwd', 404), get('/search?query=../../etc/passwd', 404),
    get('/search?entry=ENTRY&k=1000000', 400), get('/search?entry=ENTRY&k=-1', 400),
    get('/search?entry=ENTRY&k=1e1', 400), get('/search?entry=ENTRY&k=%C2%B2', 400),
    get('/search?entry=ENTRY&threshold=nan', 400), get('/search?entry=ENTRY&threshold=inf', 400),
    get('/search?entry=ENTRY&threshold=1e999', 400), get('/search?entry=ENTRY&far=nan', 400),
    get('/search?entry=ENTRY&far=0.01', 400), get('/search?entry=ENTRY&per=fn', 400),
    get('/search?entry=ENTRY&cam=../../etc', 400), get('/search?entry=ENTRY&since=yesterday', 400),
    get('/search?entry=ENTRY&where=__import__(%22os%22).system(%22id%22)', 400),
    get('/search?entry=ENTRY&where=@os', 400), get('/search?entry=ENTRY&where=pid.__class__', 400),
    get('/search?entry=ENTRY&where=9**9**9**9', 400), get('/search?entry=ENTRY&where=' + '('*3000, 400),
    get('/search?entry=ENTRY&where=' + 'pid%2B'*4000 + '1', 400), get('/search?entry=ENTRY&where=pid', 400),
    get('/search?entry=ENTRY&where=%00', 400), get('/query', 405), get('/label', 405), get('/nothing', 404),
    get('/', 400, headers={'host':'evil.com'}), get('/', 400, headers={'host':'127.0.0.1.evil.com'}),
    get('/', 400, headers={'host':'a@127.0.0.1'}), get('/', 413, content=b'a body'),
    get('/picture/ENTRY', 403, headers={'sec-fetch-site':'cross-site', 'sec-fetch-mode':'no-cors'}),
    *(pytest.param(o, '/label', 405, {}, id=o) for o in ('TRACE','PUT','DELETE','PATCH','OPTIONS','CONNECT')),
    post('/query', 403, 'of another site', **file(jpeg(0)) | dict(headers=dict(origin='http://evil.com'))),
    post('/query', 403, 'of another port', **file(jpeg(0)) | dict(headers=dict(origin='http://127.0.0.1:9000'))),
    post('/query', 403, 'of a file', **file(jpeg(0)) | dict(headers=dict(origin='null'))),
    post('/query', 403, 'without origin', **file(jpeg(0)) | dict(headers={})),
    post('/query', 403, 'cross-site', **file(jpeg(0)) | dict(headers=ORIGIN | {'sec-fetch-site':'cross-site'})),
    post('/label', 403, 'cross-site form', data={'reject':'ENTRY'}, headers={'origin':'https://evil.com'}),
    post('/label', 415, 'as text', content=b'reject=ENTRY', headers=ORIGIN | {'content-type':'text/plain'}),
    post('/label', 415, 'as JSON', content=b'{"reject":"ENTRY"}', headers=ORIGIN | {'content-type':'application/json'}),
    post('/label', 415, 'without type', content=b'reject=ENTRY', headers=ORIGIN),
    post('/query', 415, 'as a form', content=b'picture=1', headers=FORM),
    post('/query', 413, 'giant', **file(bytes(MAX_UPLOAD+2**17))),
    post('/query', 413, 'giant, announced', content=b'x', headers=ORIGIN | {
        'content-length':str(10**12), 'content-type':'multipart/form-data; boundary=x'}),
    post('/query', 400, 'of odd length', content=b'x', headers=ORIGIN | {
        'content-length':'1e3', 'content-type':'multipart/form-data; boundary=x'}),
    post('/query', 413, 'bomb', **file(png(60_000, 60_000), 'a.png')),
    post('/query', 413, 'many pixels', **file(png(9_000, 9_000), 'a.png')),
    post('/query', 415, 'cut off', **file(jpeg(0)[:-200])),
    post('/query', 415, 'text', **file(b'not a picture')),
    post('/query', 415, 'SVG', **file(b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'a.svg', 'image/svg+xml')),
    post('/query', 415, 'HTML', **file(b'<!doctype html><script>alert(1)</script>', 'a.jpg')),
    post('/query', 400, 'empty', **file(b'')),
    post('/query', 400, 'without file', files=dict(other=('a.jpg', jpeg(0), 'image/jpeg')), headers=ORIGIN),
    post('/query', 400, 'text for file', files=dict(picture=(None, 'text')), headers=ORIGIN),
    post('/query', 400, 'no boundary', content=b'--x', headers=ORIGIN | {'content-type':'multipart/form-data'}),
    post('/query', 400, 'broken', content=b'--x\r\nContent-Disposition: nothing' + b'-'*50, headers=ORIGIN | {
        'content-type':'multipart/form-data; boundary=x'}),
    post('/label', 400, 'nothing', content=b'', headers=FORM),
    post('/label', 400, 'noise', content=b'\xff\xfe%ff%00&&&==', headers=FORM),
    post('/label', 400, 'both', data={'confirm':'ENTRY', 'reject':'ENTRY', 'pid':'1'}, headers=ORIGIN),
    post('/label', 404, 'unknown', data={'confirm':'a'*32, 'pid':'1'}, headers=ORIGIN),
    post('/label', 404, 'a path', data={'reject':'../../etc/passwd'}, headers=ORIGIN),
    post('/label', 400, 'no id', data={'confirm':'ENTRY', 'pid':'  '}, headers=ORIGIN),
    post('/label', 400, 'text for a number', data={'confirm':'ENTRY', 'pid':'anna'}, headers=ORIGIN),
    post('/label', 400, 'two signs', data={'confirm':'ENTRY', 'pid':'--5'}, headers=ORIGIN),
    post('/label', 400, 'long', data={'confirm':'ENTRY', 'pid':'9'*300}, headers=ORIGIN),
    post('/label', 400, 'control', data={'confirm':'ENTRY', 'pid':'a\x1b[2J'}, headers=ORIGIN),
    post('/label', 413, 'giant', data={'confirm':'ENTRY', 'pid':'9'*2**19}, headers=ORIGIN),
    post('/search', 405, 'here', data={'entry':'ENTRY'}, headers=ORIGIN)]

@pytest.mark.parametrize('method,path,status,kwargs', REQUESTS)
def test_hostile_requests_are_refused_and_write_nothing(site, method, path, status, kwargs):
    entry = entry_address(site.keys[0])
    kwargs = dict(kwargs)
    if 'data' in kwargs: kwargs['data'] = {k: v.replace('ENTRY', entry) for k,v in kwargs['data'].items()}
    if 'content' in kwargs: kwargs['content'] = kwargs['content'].replace(b'ENTRY', entry.encode())
    before,around = contents(site.folder),sorted(os.listdir(site.files))
    done = site.browser.request(method, path.replace('ENTRY', entry), **kwargs)
    assert done.status_code==status, done.text
    assert contents(site.folder)==before and sorted(os.listdir(site.files))==around
    assert 'Traceback' not in done.text and 'root:' not in done.text
    for name,value in HEADERS.items(): assert done.headers[name]==value
    assert site.browser.get('/').status_code==200

def test_two_hosts(site):
    done = site.browser.get('/', headers=[('host','127.0.0.1:8000'), ('host','evil.com')])
    assert done.status_code==400

def test_a_body_without_length_is_read_and_bounded(site):
    boundary = b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a.jpg"\r\n\r\n'
    head = ORIGIN | {'content-type':'multipart/form-data; boundary=x'}
    def parts(n):
        yield boundary+jpeg(0)
        for _ in range(n): yield bytes(2**20)
        yield b'\r\n--x--\r\n'
    assert site.browser.post('/query', content=parts(0), headers=head).status_code==303
    assert site.browser.post('/query', content=parts(25), headers=head).status_code==413
    assert site.browser.post('/query', content=parts(130), headers=head).status_code==413

def test_nothing_comes_from_elsewhere(site):
    for path in ('/','/static/page.css','/static/page.js','/static/icon.svg'):
        done = site.browser.get(path)
        assert done.status_code==200
        found = set(re.findall(r'https?://[^\s"\')]+', done.text))-{'http://www.w3.org/2000/svg'}
        assert not found and '@import' not in done.text
    policy = site.browser.get('/').headers['content-security-policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy

def test_no_file_is_left_in_the_working_directory(site):
    before = sorted(os.listdir(site.files))
    upload(site.browser, jpeg(1))
    assert sorted(os.listdir('.'))==before # FastHTML's sessions would write a key

# ---- the token

def test_other_machines_need_the_token(site):
    browser = new_browser(site.desk, 'http://192.168.0.7:8000', host='0.0.0.0', token='secret')
    here = dict(origin='http://192.168.0.7:8000')
    entry = entry_address(site.keys[0])
    for path in ('/','/search','/static/page.css',f'/picture/{entry}','/?token=','/?token=Secret','/?token=%C3%A9'):
        assert browser.get(path).status_code==401
    before = contents(site.folder)
    for wrong in ({}, dict(cookie='pyramidreid=wrong'), dict(cookie='pyramidreid="')):
        assert label(browser, 'reject', entry, shown='0', **here, **wrong).status_code==401
    assert browser.post('/?token=secret', headers=here).status_code==401 and contents(site.folder)==before
    opened = browser.get('/?token=secret')
    assert opened.status_code==303 and opened.headers['location']=='/'
    assert 'HttpOnly' in opened.headers['set-cookie'] and 'SameSite=Strict' in opened.headers['set-cookie']
    assert browser.get('/').status_code==200
    assert label(browser, 'reject', entry, shown='0', **here).status_code==303

# ---- pictures

def test_pictures_of_entries(site):
    done = site.browser.get(f'/picture/{entry_address(site.keys[0])}')
    assert done.headers['content-type']=='image/jpeg'
    assert Image.open(io.BytesIO(done.content)).size==(32,64)
    assert site.browser.head(f'/picture/{entry_address(site.keys[0])}').status_code==200

def test_a_picture_that_is_none_gives_a_card(site):
    missing,text,folder,large = map(Path, site.keys[:4])
    missing.unlink()
    text.write_text('<html>')
    folder.unlink()
    folder.mkdir()
    large.write_bytes(png(60_000, 60_000))
    odd = [missing, text, folder, large]
    if hasattr(os, 'mkfifo'):
        odd.append(Path(site.keys[4]))
        odd[-1].unlink()
        os.mkfifo(odd[-1])
    for path in odd:
        done = site.browser.get(f'/picture/{entry_address(str(path))}')
        assert done.status_code==404 and done.headers['content-type']=='image/svg+xml' and 'No picture' in done.text
    assert site.browser.get(f'/search?entry={entry_address(site.keys[6])}').status_code==200

# ---- confirm and reject

def test_confirm_and_reject_are_saved(site):
    address,back = entry_address(site.keys[0]),f'entry={entry_address(site.keys[9])}&k=3&where=cam%3E0'
    done = label(site.browser, 'confirm', address, '77', '0', back)
    assert done.status_code==303
    target = urlsplit(done.headers['location'])
    assert target.netloc=='' and target.path=='/search' and parse_qs(target.query)['where']==['cam>0']
    assert pids(site.folder)[site.keys[0]]==77
    assert 'is person 77' in said(site.browser.get(done.headers['location']).text)
    assert label(site.browser, 'reject', address, '', '77').status_code==303
    assert pd.isna(pids(site.folder)[site.keys[0]])
    def others(gallery): return gallery.table.set_index('key').drop(site.keys[0]).sort_index()
    pd.testing.assert_frame_equal(others(Gallery.load(site.folder)), others(site.gallery))

def test_a_form_leads_nowhere_else(site):
    for back in ('//evil.com','https://evil.com/?entry=1','entry=1%0d%0aSet-Cookie:a=b','next=//evil.com','&'*200):
        done = label(site.browser, 'confirm', entry_address(site.keys[0]), '5', '0', back)
        assert done.status_code==303 and done.headers['location'].startswith('/search?')
        assert 'set-cookie' not in done.headers

def test_what_another_tab_has_changed_is_not_replaced(site):
    address = entry_address(site.keys[0])
    tabs = [new_browser(site.desk) for _ in range(2)]
    assert label(tabs[0], 'confirm', address, '5', '0').status_code==303
    done = label(tabs[1], 'confirm', address, '6', '0')
    assert done.status_code==409 and 'person is now 5' in said(done.text) and pids(site.folder)[site.keys[0]]==5
    assert label(tabs[1], 'confirm', address, '5', '0').status_code==303 # what both want

def test_what_another_program_saves_is_seen_and_kept(site):
    other = Gallery.load(site.folder, site.gallery.embedder)
    other.add(str(site.files/'07.jpg'), keys='new', pid=3).save()
    entry = entry_address('new')
    assert len(addresses(site.browser.get(f'/search?entry={entry}&k=60').text))==24
    assert label(site.browser, 'confirm', entry, '9', '3').status_code==303
    assert pids(site.folder)['new']==9
    other = Gallery.load(site.folder)
    other.remove('new').save()
    assert label(site.browser, 'confirm', entry, '8', '9').status_code==404
    assert len(pids(site.folder))==24

def test_a_program_that_saves_at_the_very_moment(site, monkeypatch):
    "Between reading and saving: the change is made again upon what the other has saved"
    update,others = Gallery.update,[]
    def slow_update(self, keys, **columns):
        if len(others)<2:
            others.append(Gallery.load(site.folder))
            update(others[-1], site.keys[len(others)], pid=40+len(others)).save()
        return update(self, keys, **columns)
    monkeypatch.setattr(Gallery, 'update', slow_update)
    assert label(site.browser, 'confirm', entry_address(site.keys[0]), '5', '0').status_code==303
    found = pids(site.folder)
    assert [found[key] for key in site.keys[:3]]==[5,41,42]

def test_a_program_that_never_stops_saving(site, monkeypatch):
    update = Gallery.update
    def slow_update(self, keys, **columns):
        Gallery.load(site.folder).save()
        return update(self, keys, **columns)
    monkeypatch.setattr(Gallery, 'update', slow_update)
    done = label(site.browser, 'confirm', entry_address(site.keys[0]), '5', '0')
    assert done.status_code==503 and 'keeps saving' in said(done.text) and pids(site.folder)[site.keys[0]]==0

def test_many_writers_lose_nothing(site):
    "Threads of the server, and processes that add entries"
    code = ("import sys, numpy as np\nfrom pyramidreid.gallery.gallery import Gallery\n"
            "from pyramidreid.gallery.entries import Embeddings\nfolder,name = sys.argv[1:]\n"
            "for i in range(6):\n    while True:\n        g = Gallery.load(folder)\n"
            "        g.add([f'{name}{i}'], keys=[f'{name}{i}'], embs=Embeddings(np.ones(18), g.fingerprint))\n"
            "        try: g.save()\n        except RuntimeError: continue\n        break\n")
    programs = [subprocess.Popen([sys.executable,'-c',code,site.folder,name]) for name in 'ab']
    def confirm(key, shown):
        while label(site.browser, 'confirm', entry_address(key), '50', shown).status_code==503: pass
    tabs = [threading.Thread(target=confirm, args=(key, str(i//4))) for i,key in enumerate(site.keys)]
    for tab in tabs: tab.start()
    for tab in tabs: tab.join()
    assert [o.wait(120) for o in programs]==[0,0]
    found = pids(site.folder)
    assert all(found[key]==50 for key in site.keys) and len(found)==24+12

def test_a_gallery_that_is_gone_or_cannot_be_written(site, monkeypatch):
    address = entry_address(site.keys[0])
    def no_space(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr('pyramidreid.gallery.store._write_manifest', no_space)
        done = label(site.browser, 'confirm', address, '5', '0')
        assert done.status_code==507 and 'Nothing was changed' in said(done.text)
    assert pids(site.folder)[site.keys[0]]==0
    site.folder.rename(site.files/'away')
    for path in ('/', f'/search?entry={address}', f'/picture/{address}'): assert site.browser.get(path).status_code==503
    assert label(site.browser, 'confirm', address, '5', '0').status_code==503
    assert upload(site.browser, jpeg(1)).status_code==503 and not site.folder.exists()
    (site.files/'away').rename(site.folder)
    assert site.browser.get('/').status_code==200

def test_another_models_gallery_takes_its_place(site):
    other = new_gallery(site.files, 4, BandModel()) if site.folder.rename(site.files/'away') else None
    done = site.browser.get('/')
    assert done.status_code==503 and 'can no longer be read' in said(done.text) and len(other)==4

@pytest.mark.parametrize('pid,stored', [('anna','anna'), (' 7 ','7'), ('日本','日本')])
def test_ids_as_text(tmp_path, pid, stored):
    gallery = new_gallery(tmp_path, 6, pid='nobody')
    browser = new_browser(Desk(tmp_path/'street', gallery.embedder))
    key = gallery.table.key[0]
    assert label(browser, 'confirm', entry_address(key), pid, 'nobody').status_code==303
    assert pids(tmp_path/'street')[key]==stored

def test_ids_in_a_gallery_without_any(tmp_path):
    model,keys = PyramidModel(),['a','b']
    embs = Embeddings(np.eye(18)[:2], model.fingerprint)
    Gallery(model).add(pd.DataFrame(dict(key=keys)), embs=embs).save(tmp_path/'bare')
    shared = SharedGallery(tmp_path/'bare', model)
    shared.set_pid(entry_address('a'), None, '')
    assert 'pid' not in Gallery.load(tmp_path/'bare').table
    shared.set_pid(entry_address('a'), 'anna', '')
    with pytest.raises(PageError, match='is now anna'): shared.set_pid(entry_address('a'), 'bob', '')
    assert pids(tmp_path/'bare')['a']=='anna' and pd.isna(pids(tmp_path/'bare')['b'])

def test_a_first_id_with_zeros_stays_text(tmp_path):
    model = PyramidModel()
    embs = Embeddings(np.eye(18)[:2], model.fingerprint)
    Gallery(model).add(pd.DataFrame(dict(key=['a','b'])), embs=embs).save(tmp_path/'bare')
    shared = SharedGallery(tmp_path/'bare', model)
    for key,pid in dict(a='007', b='anna').items(): shared.set_pid(entry_address(key), pid, '')
    assert dict(pids(tmp_path/'bare'))==dict(a='007', b='anna')

@pytest.mark.parametrize('pid', ['Anna\xa0Smith', 'a\u3000b', ' bob', 300*'x'])
def test_ids_that_exist_are_confirmed_as_they_are(tmp_path, pid):
    model = PyramidModel()
    embs = Embeddings(np.eye(18)[:2], model.fingerprint)
    Gallery(model).add(pd.DataFrame(dict(key=['a','b'], pid=[pid,'other'])), embs=embs).save(tmp_path/'named')
    shared = SharedGallery(tmp_path/'named', model)
    shared.set_pid(entry_address('b'), pid_text(pid), 'other')
    assert set(pids(tmp_path/'named').values())=={pid}

def test_a_picture_in_which_the_model_sees_nothing(site, monkeypatch):
    monkeypatch.setattr(PyramidModel, 'embed', lambda self, items: np.zeros((len(items),18)))
    done = upload(site.browser, jpeg(1))
    assert done.status_code==400 and 'cannot compare this picture' in said(done.text)

def test_the_latest_entries_by_their_times(tmp_path):
    model = PyramidModel()
    times = pd.to_datetime(['2026-11-03','2026-11-01','2026-11-02'])
    embs = Embeddings(np.eye(18)[:3], model.fingerprint)
    gallery = Gallery(model).add(pd.DataFrame(dict(key=list('abc'), time=times)), embs=embs)
    gallery.update('b', pid='x').save(tmp_path/'g')
    page = new_browser(Desk(tmp_path/'g', model)).get('/').text
    assert re.findall(r'href="[^"]*entry=([0-9a-f]{32})', page)==[entry_address(key) for key in 'acb']

@pytest.mark.parametrize('others', ['theme={"a": 1}; ','a=b c d; ','x; =; '])
def test_the_token_beside_cookies_of_other_ports(site, others):
    browser = new_browser(site.desk, 'http://192.168.0.7:8000', host='0.0.0.0', token='secret', cookie='reid')
    assert browser.get('/', headers=dict(cookie=f'{others}reid=secret')).status_code==200
    assert browser.get('/', headers=dict(cookie=f'{others}reid=wrong')).status_code==401

def test_a_number_of_entries_that_the_page_can_show(site):
    done = site.browser.get('/search', params=dict(entry=entry_address(site.keys[0]), k=str(MAX_K)))
    assert len(addresses(done.text))==23

# ---- the command

ENV = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}

@contextmanager
def served(folder, *args):
    "The command in a process of its own; yield the process and the address it has printed"
    code = "import sys\nfrom pyramidreid.cli.entry import main\nsys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable,'-c',code,'serve',folder,'--port','0','--json',*args], text=True,
                               env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process,json.loads(line)['url']
    finally:
        process.kill()
        process.communicate()

@pytest.fixture(scope='module')
def street(people, tmp_path_factory):
    "A gallery of synthetic people, filled with the model that comes with the package"
    folder = tmp_path_factory.mktemp('desk')/'street'
    assert main(['gallery','add', folder, people/'bounding_box_test', '--pid-pat', r'(?:^|/)(-?\d+)_', '--cam-pat',
                 r'_c(\d)', '-q'])==0
    return folder

def test_port_in_use_and_other_mistakes(street, capfd):
    with open_socket('127.0.0.1', 0) as taken:
        assert main(['serve', street, '--port', taken.getsockname()[1], '-q'])==2
    assert '--port 0' in capfd.readouterr().err
    assert main(['serve', street, '--host', 'no.such.host.invalid', '-q'])==2
    assert 'no such address' in capfd.readouterr().err
    assert main(['serve', street.parent/'nowhere'])==2 and main(['serve', street, '--port', '70000'])==2

def test_fasthtml_is_asked_for(street, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fasthtml.core', None)
    assert main(['serve', street])==2
    assert "pip install 'pyramidreid[serve]'" in capfd.readouterr().err

@pytest.fixture(scope='module')
def local(street):
    "The address of a server for this machine"
    with served(street) as (_,url): yield url

@pytest.fixture(scope='module')
def everywhere(street):
    "The address of a server for all networks"
    with served(street, '--host', '0.0.0.0') as (_,url): yield url

@pytest.mark.skipif(os.name=='nt', reason='signals of Unix')
@pytest.mark.parametrize('number,code', [
    (signal.SIGINT,130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_it_ends_quietly(street, number, code):
    with served(street) as (process,url):
        assert url.startswith('http://127.0.0.1:') and 'token' not in url
        with socket.create_connection(('127.0.0.1', urlsplit(url).port)): process.send_signal(number)
        out,err = process.communicate(timeout=60)
        assert process.returncode==code and 'Traceback' not in err and not out, err

def test_every_network_has_a_token(everywhere):
    token = parse_qs(urlsplit(everywhere).query)['token'][0]
    assert len(token)>=32 and urlsplit(everywhere).hostname==socket.gethostname().lower()

# ---- a real browser

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason='there is no Chromium')

@needs_chromium
def test_in_a_browser(street, people, local):
    "Drop, paste and choose a picture, confirm and reject; nothing comes from elsewhere, and the policy holds"
    import base64
    queries = sorted((people/'query').glob('*.jpg'))
    give = """(name, data, event) => {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), files = new DataTransfer()
        files.items.add(new File([bytes], name, {type: 'image/jpeg'}))
        const kind = event=='paste' ? ClipboardEvent : DragEvent
        const field = event=='paste' ? 'clipboardData' : 'dataTransfer'
        document.body.dispatchEvent(new kind(event, {[field]: files, bubbles: true, cancelable: true})) }"""
    with chromium() as tab:
        tab.goto(local)
        for i,event in enumerate(['drop','paste']):
            tab.js(f'({give})("{i}.jpg", "{base64.b64encode(queries[i].read_bytes()).decode()}", "{event}")')
            tab.loaded('query=')
            wait_for(lambda i=i: f'{i}.jpg' in tab.text)
        node = tab.call('DOM.querySelector', nodeId=tab.call('DOM.getDocument')['root']['nodeId'], selector='#picture')
        tab.call('DOM.setFileInputFiles', nodeId=node['nodeId'], files=[str(queries[2])])
        wait_for(lambda: queries[2].name in tab.text)
        tab.loaded('query=')
        assert tab.js('document.querySelectorAll(".card").length')==12
        seen = wait_for(lambda: tab.js('[...document.querySelectorAll(".card .portrait img")].slice(0, 4)'
                                       '.map(o => o.complete && o.naturalHeight)'))
        assert seen and tab.js('document.querySelectorAll(".card svg.column rect").length')>=12*6
        address = tab.js('document.querySelector(".card").id').removeprefix('e-')
        key = {entry_address(k): k for k in pids(street)}[address]
        tab.js('document.getElementById("pid").value = "4711"')
        tab.js('document.querySelector(".card .confirm").click()')
        tab.loaded('saved=')
        assert pids(street)[key]==4711 and 'is person 4711' in tab.text
        tab.js(f'document.querySelector("button[name=reject][value=\\"{address}\\"]").click()')
        wait_for(lambda: pd.isna(pids(street)[key]))
        tab.loaded('saved=')
        assert all(urlsplit(o).netloc==urlsplit(local).netloc for o in tab.requests) and len(tab.requests)>20
        assert tab.complaints==[]

@needs_chromium
def test_on_a_phone_and_in_the_dark(street, local):
    with chromium() as tab:
        entry = entry_address(next(iter(pids(street))))
        for width,dark in ((390,False), (1400,True)):
            tab.look(width, dark=dark)
            tab.goto(f'{local}search?entry={entry}')
            assert tab.js('document.documentElement.scrollWidth')<=width
            wait_for(lambda: tab.js('document.querySelector(".card img").naturalHeight'))
            box = json.loads(tab.js('JSON.stringify(document.querySelector(".card img").getBoundingClientRect())'))
            assert box['height']==pytest.approx(192) and box['width']==pytest.approx(96, abs=1) # people are tall
        colours = tab.js('[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]')
        text,paper = (np.mean([int(o) for o in re.findall(r'\d+', colour)[:3]]) for colour in colours)
        assert text>180 and paper<50

@needs_chromium
def test_the_cookie_in_a_browser(everywhere):
    here = f'http://127.0.0.1:{urlsplit(everywhere).port}/'
    with chromium() as tab:
        tab.goto(here)
        assert 'token is needed' in tab.text
        tab.goto(f'{here}?{urlsplit(everywhere).query}')
        wait_for(lambda: 'entries' in tab.text)
        assert 'token' not in tab.js('location.href') and tab.js('document.cookie')==''
