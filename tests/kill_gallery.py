"""Fifty child processes add to a gallery, remove and save, and each is killed at a random moment.
Run by test_store.py; imports neither torch nor fastai."""
import json
import os
import random
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet  # noqa: F401, imported once here and not by every child

from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.store import Store, read_manifest

DIM = 512

def picture(key): return np.random.default_rng(zlib.crc32(key.encode())).integers(0, 255, (8,4,3), np.uint8)
def pid(key): return zlib.crc32(key.encode())%97
def vector(pixels):
    seed = zlib.crc32(np.ascontiguousarray(pixels).tobytes())
    return np.random.default_rng(seed).standard_normal(DIM)

class Model:
    "The pixels of a picture are the seed of its embedding"
    fingerprint = 'a model'
    def embed(self, images): return np.stack([vector(np.asarray(o)) for o in images])

def work(path, log, seed):
    "Announce a save, save, report it; without end"
    rng,n = random.Random(seed),0
    def report(event, **details): os.write(log, (json.dumps(dict(event=event, **details))+'\n').encode())
    gallery = Gallery.load(path, Model()) if (path/'gallery.json').exists() else Gallery(Model())
    while True:
        new = [f'{seed}-{n}-{i}' for i in range(rng.randint(1, 30))]
        old = rng.sample(sorted(gallery.keys), min(len(gallery), rng.randint(0, 5)))
        report('saving', new=new, old=old)
        gallery.add([picture(k) for k in new], keys=new, pid=[pid(k) for k in new])
        if old: gallery.remove(old)
        gallery.save(path)
        report('saved')
        n += 1

def killed_child(path, seed, seconds):
    "Start a child, kill it after some time; return what it reported"
    out,log = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        work(path, log, seed)
    os.close(log)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(out) as f: return [json.loads(line) for line in f.read().splitlines()]

def replay(events, before):
    "Keys after the last save that was reported, and after the one under way, None if there was none"
    known,pending = before,None
    for o in events:
        if o['event']=='saved': known,pending = pending,None
        else: pending = (known | set(o['new']))-set(o['old'])
    return known,pending

def saved_keys(path):
    "Keys in the folder; asserts that every entry is as it was added"
    if not (path/'gallery.json').exists(): return set()
    store = Store.load(path)
    table,embs = store.table,{i:e for s in store.segments for i,e in zip(s.ids, s.embs)}
    if not len(table): return set()
    for i,key,found in zip(table.index, table.key, table.pid):
        expected = vector(picture(key))
        assert found==pid(key), key
        assert np.allclose(embs[i], expected/np.linalg.norm(expected), atol=1e-6), key
    return set(table.key)

def unlisted_files(path):
    "Files that the manifest does not list"
    if not path.exists(): return set()
    segments = (read_manifest(path) or dict(segments=[]))['segments']
    listed = {name for s in segments for name,_,_ in s['files']} | {'gallery.json','gallery.lock'}
    return {o.name for o in path.iterdir()}-listed

def main(path, kills):
    rng,keys = random.Random(0),set()
    res = dict(kills=0, saves=0, inside=0, left=0, unsure_kept=0)
    for seed in range(kills):
        events = killed_child(path, seed, rng.uniform(.02, .4))
        known,pending = replay(events, keys)
        keys = saved_keys(path)
        assert keys in (known,pending), f'kill {seed}: {len(known)} entries were saved, {len(keys)} are there'
        res['kills'] += 1
        res['saves'] += sum(o['event']=='saved' for o in events)
        res['inside'] += pending is not None
        res['unsure_kept'] += keys!=known
        res['left'] += bool(unlisted_files(path))
    heavy = [m for m in ('torch','fastai') if m in sys.modules]
    print(json.dumps(dict(res, entries=len(keys), heavy=heavy)))

if __name__=='__main__': main(Path(sys.argv[1]), int(sys.argv[2]))
