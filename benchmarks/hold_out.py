"""How long it takes to hold people out: `hold_out`, which reads the table once, and the plain version in
tests/reference.py, which filters the whole table for each person. Both choose the same people and queries.

`python benchmarks/hold_out.py`; `--people 500 20000` gives the numbers of people, `--json FILE` writes the times."""
import argparse
import json
import random
import sys
import time
import warnings
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from common import circumstances, markdown

PCT,SEED = .2,42

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--people', type=int, nargs='+', default=[500,2000,20000], help='numbers of people to try')
    parser.add_argument('--turns', type=int, default=3, help='runs of hold_out, of which the fastest counts')
    parser.add_argument('--json', type=Path, help='file to write the times to')
    return parser.parse_args()

def make_table(n_people):
    "Five images of each person, two of each of two cameras and one of any; ids are text, as from folders and CSV files"
    rng,rows = random.Random(0),[]
    for pid in range(n_people):
        for cam in (1,1,2,2,rng.randrange(6)): rows.append((f'{len(rows)}.jpg', f'p{pid}', cam, 'train'))
    rng.shuffle(rows)
    return pd.DataFrame(rows, columns=['fn','pid','cam','split'])

def timed(call):
    "Seconds that a call takes, and what it returns"
    start = time.perf_counter()
    result = call()
    return time.perf_counter()-start,result

def measure(n_people, turns):
    "A dict of times, seconds. The plain version, which takes a minute for 20,000 people, runs once"
    from reference import plain_hold_out

    from pyramidreid.data.tables import hold_out
    df = make_table(n_people)
    plain,expected = timed(lambda: plain_hold_out(df, PCT, SEED))
    runs = [timed(lambda: hold_out(df, PCT, SEED)) for _ in range(turns)]
    assert runs[0][1].split.tolist()==expected.tolist(), 'the two differ'
    best = min(seconds for seconds,_ in runs)
    return dict(people=n_people, images=len(df), plain=plain, hold_out=best, ratio=plain/best)

def main():
    args = parse()
    warnings.simplefilter('ignore')
    rows = [measure(n, args.turns) for n in args.people]
    shown = [{'people': f"{row['people']:,}", 'images': f"{row['images']:,}", 'plain, s': f"{row['plain']:.2f}",
              'hold_out, s': f"{row['hold_out']:.3f}", 'ratio': f"{row['ratio']:.0f}×"} for row in rows]
    print(markdown(pd.DataFrame(shown).set_index('people')))
    if args.json: args.json.write_text(json.dumps(dict(circumstances(), rows=rows), indent=1))

if __name__=='__main__': main()
