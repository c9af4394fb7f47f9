"""What several pictures of a person are worth: Market-1501's single queries, all pictures of a query's person by the
same camera pooled into one query, and tracklets that search for tracklets.
`python benchmarks/multi_query.py --data DIR [--model NAME] [--cache FILE]`
The pictures that join a query are those of the gallery that its protocol leaves out: same person, same camera."""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from common import circumstances, markdown, results, write_table


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, required=True, help='folder of a known dataset')
    add('--model', default='market1501-lite0', help='name of a pretrained model')
    add('--cache', type=Path, help='file for the embeddings of the test images, which is read if it exists')
    add('--most', type=int, help='only the people with the smallest pids: to try the script')
    add('--out', default='multi-query', help='name of the results')
    return parser.parse_args(argv)

# ---- the test images, embedded once

def test_images(args):
    "Table of the images of the test split, without junk, and their embeddings (N, D)"
    from pyramidreid.all import dataset_table, load_pretrained
    table = dataset_table(args.data)
    table = table[table.split.isin(['query','gallery'])].reset_index(drop=True)
    if args.cache and args.cache.exists(): embs = np.load(args.cache)
    else: embs = np.asarray(load_pretrained(args.model).embed(list(table.fn)))
    if args.cache and not args.cache.exists(): np.save(args.cache, embs)
    if len(embs)!=len(table): raise SystemExit(f'{args.cache} has {len(embs):,} embeddings for {len(table):,} images')
    kept = table.pid!=-1
    if args.most: kept &= table.pid.isin(sorted(table.pid[table.pid>0].unique())[:args.most])
    return table[kept].reset_index(drop=True),embs[kept.to_numpy()]

def tracklet_codes(table):
    "Number of each image's tracklet: a person in one sequence of a camera; a distractor is a tracklet of its own"
    from pyramidreid.evaluation.tracklets import group_codes
    sequence = table.fn.astype(str).str.extract(r'_c\d+s(\d+)_', expand=False)
    parts = table[['pid','cam']].assign(sequence=sequence.fillna('')).astype(object)
    parts.loc[table.pid==0, 'pid'] = None # all distractors share this id
    return group_codes(parts)

# ---- queries of several pictures

def pooled_queries(table, embs, how):
    "One embedding for each query: that of all pictures of its person by its camera"
    from pyramidreid.evaluation.tracklets import pool_embeddings
    pooled = pd.Series(range(len(table))).groupby([table.pid, table.cam]).indices
    queries = table[table.split=='query']
    rows = [pooled[key] for key in zip(queries.pid, queries.cam)]
    of_query = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return pool_embeddings(embs[np.concatenate(rows)], of_query, how)

def pooled_tracklets(table, embs, how='mean'):
    "Table with a row for each tracklet, and their embeddings"
    from pyramidreid.evaluation.tracklets import first_rows, pool_embeddings
    codes = tracklet_codes(table)
    return table.iloc[first_rows(codes)].reset_index(drop=True),pool_embeddings(embs, codes, how)

def card(queries, query_embs, gallery, gallery_embs, **kwargs):
    from pyramidreid.all import evaluate
    columns = [table[name].to_numpy() for name in ('pid','cam') for table in (queries,gallery)]
    return evaluate(query_embs, gallery_embs, *columns, progress_bar=False, **kwargs)

def all_cards(table, embs):
    "A protocol card for each kind of search"
    is_query = (table.split=='query').to_numpy()
    queries,gallery = table[is_query],table[~is_query]
    cards = {'one picture searches pictures': card(queries, embs[is_query], gallery, embs[~is_query])}
    for how,text in (('mean','mean'), ('max','largest value')):
        pooled = pooled_queries(table, embs, how)
        cards[f'all pictures by one camera, {text}, search pictures'] = card(queries, pooled, gallery, embs[~is_query])
    tracklets,pooled = pooled_tracklets(gallery, embs[~is_query])
    known = (tracklets.pid>0).to_numpy()
    cards['one picture searches tracklets'] = card(queries, embs[is_query], tracklets, pooled)
    cards['one tracklet searches tracklets'] = card(
        tracklets[known], pooled[known], tracklets, pooled,
        query_images=np.flatnonzero(known), gallery_images=np.arange(len(tracklets)))
    return cards

def main(argv=None):
    args = parse(argv)
    table,embs = test_images(args)
    rows = [{'': name, 'mAP': card.mAP, 'rank-1': card.rank1, 'mINP': card.mINP, 'queries': card.n_query}
            for name,card in all_cards(table, embs).items()]
    pictures = table.groupby(['pid','cam']).fn.transform('size')[table.split=='query'].mean()
    note = dict(circumstances(), data=args.data.name, model=args.model, pictures=pictures, rows=rows)
    (results/f'{args.out}.json').write_text(json.dumps(note, indent=1))
    text = (f'{args.data.name}, {args.model}; {pictures:.1f} pictures to a query of one camera. A tracklet is '
            'the mean of a person in one sequence of a camera.')
    write_table(args.out, 'Several pictures of one person', markdown(pd.DataFrame(rows).set_index('').round(4)), text)

if __name__=='__main__': main()
