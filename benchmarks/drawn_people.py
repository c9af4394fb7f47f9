"""The models that come with the package on drawn people, whom none of them has seen: which to use for other cameras.
`python benchmarks/drawn_people.py`
A drawn person is no real one; but here that is the only thing that is new to a model trained on both datasets."""
import argparse
import json

import numpy as np
import pandas as pd
from common import circumstances, markdown, results, write_table
from multi_query import card

from pyramidreid.all import load_pretrained, market_table, synth_persons
from pyramidreid.models.pretrained import pretrained_names


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--people', type=int, default=100, help='people to tell apart')
    parser.add_argument('--seed', type=int, default=7)
    parser.add_argument('--out', default='drawn-people', help='name of the results')
    return parser.parse_args(argv)

def model_card(model, table):
    "The protocol card of a model on the queries and gallery of a table"
    queries,gallery = (table[table.split==split] for split in ('query','gallery'))
    query_embs,gallery_embs = (np.asarray(model.embed(part.fn.tolist())) for part in (queries,gallery))
    return card(queries, query_embs, gallery, gallery_embs)

def main(argv=None):
    args,rows = parse(argv),[]
    for boxes,misalign in (('exact', 0.), ('misaligned', .5)):
        path = synth_persons(n_train=4, n_test=args.people, size=(256,128), misalign=misalign, seed=args.seed)
        table = market_table(path)
        for name in pretrained_names():
            model = load_pretrained(name)
            found = model_card(model, table)
            rows.append({'model': name, 'input': '{}×{}'.format(*model.size), 'boxes': boxes, 'mAP': found.mAP,
                         'rank-1': found.rank1, 'mINP': found.mINP, 'queries': found.n_query})
    (results/f'{args.out}.json').write_text(json.dumps(dict(circumstances(), people=args.people, rows=rows), indent=1))
    table = markdown(pd.DataFrame(rows).set_index('model').round(3))
    write_table(args.out, 'Drawn people', table, f'{args.people} people of `synth_persons`, drawn at 256×128.')

if __name__=='__main__': main()
