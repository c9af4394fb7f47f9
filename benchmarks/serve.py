"""How long the page of `pyramidreid serve` takes to answer, after the embedding and in all:
`python benchmarks/serve.py [--entries 20000] [--repeats 30]`
The gallery has random embeddings of the size of the shipped model's, and a real picture behind every entry."""
import argparse
import io
import itertools
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from common import circumstances, markdown, results, write_table

HERE = 'http://127.0.0.1:8000'

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--entries', type=int, default=20_000)
    add('--repeats', type=int, default=30, help='searches of each kind')
    add('--model', default='market1501-lite0', help='name of a pretrained model')
    add('--out', default='serve', help='name of the results')
    return parser.parse_args(argv)

def drawn_pictures(folder, n=200):
    "Small pictures of synthetic people, and a query of 2 megapixels"
    from PIL import Image

    from pyramidreid.synth.dataset import synth_persons
    files = sorted(synth_persons(folder/'people', n_train=2, n_test=max(4, n//12), size=(192,96)).rglob('*.jpg'))[:n]
    query = io.BytesIO()
    Image.open(files[0]).resize((1000,2000)).save(query, 'JPEG')
    return files,query.getvalue()

def filled_gallery(model, files, n):
    "A gallery of `n` entries; each picture stands for many of them"
    import torch

    from pyramidreid.gallery.entries import Embeddings
    from pyramidreid.gallery.gallery import Gallery
    from pyramidreid.models.pyramid import join_branches
    rng = np.random.default_rng(0)
    branches = torch.from_numpy(rng.random((n, model.n_branches, model.about['emb_sz']), np.float32))
    embs = join_branches(branches).numpy()
    names = [str(files[i%len(files)]) for i in range(n)]
    table = pd.DataFrame(dict(key=[f'{name}#{i}' for i,name in enumerate(names)], fn=names,
                              pid=rng.integers(0, n//10, n), cam=rng.integers(0, 6, n),
                              time=pd.Timestamp('2026-11-23')+pd.to_timedelta(rng.integers(0, 86400, n), unit='s')))
    return Gallery(model).add(table, embs=Embeddings(embs, model.fingerprint))

def milliseconds(call, repeats):
    "Times of `repeats` calls, after one that is not counted"
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000*(time.perf_counter()-start))
    return times

def timed_calls(desk, browser, query):
    "What is measured, by name"
    sent = browser.post('/query', files=dict(picture=('someone.jpg', query)), headers=dict(origin=HERE))
    name = sent.headers['location'].partition('query=')[2].partition('&')[0]
    values = dict(query=name, k='12', far='none')
    filters = dict(where='cam!=3', since='2026-11-23 06:00', per='pid')
    address = next(iter(desk.shared.addresses))
    count = itertools.count(10**6)
    def whole():
        sent = browser.post('/query', files=dict(picture=('someone.jpg', query)), headers=dict(origin=HERE))
        assert browser.get(sent.headers['location']).status_code==200
    def confirm():
        shown = desk.shared.row_of(desk.shared.key_of(address)).pid
        form = {'confirm':address, 'pid':str(next(count)), f'shown-{address}':str(shown)}
        assert browser.post('/label', data=form, headers=dict(origin=HERE)).status_code==303
    return {'search, bands and page, after the embedding, k=12': lambda: desk.search(values),
            'the same with k=60, the most that a page shows': lambda: desk.search(values | dict(k='60')),
            'the same with filters, one per person': lambda: desk.search(values | filters),
            'upload of 2 megapixels, embedding and page': whole,
            'picture of an entry': lambda: browser.get(f'/picture/{address}'),
            'confirm': confirm}

def main(argv=None):
    args = parse(argv)
    from starlette.testclient import TestClient

    from pyramidreid.export.pretrained_models import load_pretrained
    from pyramidreid.web.server import Desk, make_app
    model,rows = load_pretrained(args.model),[]
    with TemporaryDirectory() as folder:
        files,query = drawn_pictures(Path(folder))
        filled_gallery(model, files, args.entries).save(Path(folder)/'gallery')
        desk = Desk(Path(folder)/'gallery', model)
        browser = TestClient(make_app(desk), base_url=HERE, follow_redirects=False)
        for name,call in timed_calls(desk, browser, query).items():
            times = milliseconds(call, args.repeats)
            rows.append(dict(name=name, median=statistics.median(times), worst=max(times)))
            print(rows[-1], flush=True)
    note = dict(circumstances(), entries=args.entries, repeats=args.repeats, runs=rows)
    (results/f'{args.out}.json').write_text(json.dumps(note, indent=1))
    shown = pd.DataFrame(rows).set_index('name').round(1)
    shown.columns = [f'{column}, ms' for column in shown]
    text = (f'{args.entries:,} entries of {model.emb_sz} dimensions, {args.repeats} searches of each kind, in one '
            'process with the client.')
    write_table(args.out, 'The page of pyramidreid serve', markdown(shown), text)

if __name__=='__main__': main()
