"What the gallery's tests share: a small model, pictures, random entries, and a naive gallery to compare with"
import numpy as np
import pandas as pd

from pyramidreid.evaluation.openset import Calibration
from pyramidreid.gallery.entries import Embeddings


class BandModel:
    "Mean colour of three horizontal bands: not much of a model, but quick"
    def __init__(self, fingerprint='a model', dim=9): self.fingerprint,self.dim,self.n_embedded = fingerprint,dim,0
    def embed(self, images):
        self.n_embedded += len(images)
        bands = [np.asarray(o.resize((1,3)), np.float32) for o in images]
        return np.stack([o.ravel()[:self.dim]+1 for o in bands])

def pictures(n, seed=0):
    "`n` small random pictures"
    return list(np.random.default_rng(seed).integers(0, 255, (n,6,3,3), np.uint8))

def embeddings(n, seed=0, dim=9):
    "`n` random `Embeddings` of the `BandModel`"
    return Embeddings(np.random.default_rng(seed).standard_normal((n,dim)), 'a model')

def calibration_of(scores, n_gallery, **kwargs):
    "A calibration from the best similarities of strangers, one search each"
    about = dict(impostor=scores, person=range(len(scores)), genuine=[], place=[], pairs=[], n_gallery=n_gallery,
                 n_ids=5, unknown='absent', cameras=False, distance='cosine')
    return Calibration(**{**about, **kwargs})

def without_gaps(values): return [None if pd.isna(o) else o for o in values]

# A naive gallery, as one would write it without a library

class NaiveGallery:
    "A list of dicts; a missing value is None"
    def __init__(self): self.rows = []
    def add(self, rows): self.rows += rows
    def remove(self, keys): self.rows = [r for r in self.rows if r['key'] not in keys]

    def search(self, q, k, threshold=None, **filters):
        "Pairs of key and similarity, most similar first"
        q,res = q/np.linalg.norm(q),[]
        for row in self.rows:
            if not naive_filter(row, **filters): continue
            sim = float(row['emb']@q/np.linalg.norm(row['emb']))
            if threshold is None or sim>=threshold: res.append((-sim,len(res),row['key']))
        res.sort(key=lambda o: (round(o[0], 5),o[1]))
        return [(key,-negative) for negative,_,key in res[:k]]

def naive_filter(row, exclude_cam=None, since=None, where=None):
    "Does a row pass the filters?"
    if exclude_cam is not None and row.get('cam') is not None:
        excluded = exclude_cam if isinstance(exclude_cam, list) else [exclude_cam]
        if row['cam'] in excluded: return False
    if since is not None and (row.get('time') is None or row['time']<since): return False
    return where is None or where(row)

# Random entries and filters

START = pd.Timestamp('2026-11-23 08:00')
VALUES = dict(
    pid=[0,1,2,None],
    cam=['door','hall','Hof','日本',None],
    score=[0.,.25,.5,1.,None],
    ok=[True,False,None],
    time=[START+pd.Timedelta(minutes=15*i) for i in range(5)]+[None])
KEYS = ['a','b','ü','日本','O\'Brien "x"','k%20','a\nb',' ']+[f'k{i}' for i in range(40)]

def known(row, name): return row.get(name) is not None

# Expressions with their meaning for a dict
WHERES = [
    (None, None),
    ('pid==1', lambda r: r.get('pid')==1),
    ('pid!=1', lambda r: known(r, 'pid') and r['pid']!=1),
    ('not (pid>1)', lambda r: known(r, 'pid') and r['pid']<=1),
    ('score<0.5', lambda r: known(r, 'score') and r['score']<.5),
    ('score!=0.25', lambda r: known(r, 'score') and r['score']!=.25),
    ('cam!="hall"', lambda r: r.get('cam')!='hall'),
    ('ok==True', lambda r: r.get('ok') is True),
    ('ok!=True', lambda r: r.get('ok') is False),
    ('time<"2026-11-23 08:30"', lambda r: known(r, 'time') and r['time']<pd.Timestamp('2026-11-23 08:30')),
    ('pid in [0,2] or score>0.6', lambda r: r.get('pid') in (0,2) or known(r, 'score') and r['score']>.6),
    ('pid==1 and not (cam=="door")', lambda r: r.get('pid')==1 and r.get('cam')!='door')]

def random_rows(rng, keys):
    "Rows with some of the columns, any of which may be empty"
    columns = rng.sample(sorted(VALUES), rng.randint(0, 5))
    numpy_rng = np.random.default_rng(rng.randrange(1<<30))
    def row(key):
        emb = numpy_rng.standard_normal(9).astype(np.float32)
        return dict(key=key, emb=emb, **{c:rng.choice(VALUES[c]) for c in columns})
    return [row(key) for key in keys]

def add_rows(gallery, rows):
    "Add rows as `random_rows` makes them to a `Gallery`"
    table = pd.DataFrame([{c:v for c,v in row.items() if c!='emb'} for row in rows])
    gallery.add(table, embs=Embeddings(np.stack([row['emb'] for row in rows]), 'a model'))

def random_filters(rng):
    "Arguments of `Gallery.search`, and those that differ for `NaiveGallery.search`"
    text,function = rng.choice(WHERES)
    filters = dict(exclude_cam=rng.choice([None,'door',['hall','日本'],[],[None,'door']]),
                   since=rng.choice([None,VALUES['time'][2]]), where=text, threshold=rng.choice([None,0.,.3]))
    return filters,dict(where=function)
