"""Tables of what was measured, as Markdown, from the JSON files in results/. The README's table and the page of results
(nbs/guides/results.ipynb) are made here, so no number is typed by hand."""
import json
from pathlib import Path

import pandas as pd

results = Path(__file__).parent/'results'

def read(name):
    "The result `name`, a dict"
    return json.loads((results/f'{name}.json').read_text(encoding='utf-8'))

def source(info):
    "Command, hardware, date and versions of a result, as a line"
    known = [name for name in ('torch', 'onnxruntime', 'faiss') if name in info]
    versions = ', '.join(f'{name} {info[name].split("+")[0]}' for name in known)
    hardware,threads = info['hardware'],info.get('threads')
    if isinstance(threads, int): hardware += f', {threads} thread' + 's'*(threads!=1)
    return ' · '.join([f"`{info['command']}`", hardware, info['date'], versions])

def table(rows):
    "Dicts of equal keys as a Markdown table"
    head = list(rows[0])
    lines = [head, ['---']*len(head)] + [[str(value) for value in row.values()] for row in rows]
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)

def percent(x, digits=1): return f'{100*x:.{digits}f} %'

def seconds(x): return f'{x:.3g} s'

def mean_std(values): return f'{values.mean():.3f} ± {values.std():.3f}'

def minutes_and_machine(info):
    "How long a light model was trained, and where"
    return f"{sum(info['minutes']):.0f} minutes on {', '.join(dict.fromkeys(info['trained_on']))}"

# Results of the models that come with the package, by their names
LIGHT_MODELS = {'market1501-lite0': 'light-model', 'market1501-lite0-192x96': 'light-model-192x96',
                'market1501-cuhk03-lite0': 'light-model-two'}

# ---- the README's table

def light_headline(name, peers):
    "A row about a model that comes with the package"
    info = read(LIGHT_MODELS[name])
    height,width = info['stages'][-1][:2]
    card = info['cards']['plain']
    return {'': f'Market-1501, `{name}` at {height}×{width}, trained in {minutes_and_machine(info)}',
            'pyramidreid': f"mAP {percent(card['mAP'])}, rank-1 {percent(card['cmc'][0])}", 'compared with': peers}

def headline():
    "The rows of the table in the README"
    head = read('head-cpu')
    metric = read('evaluation')['parts']['metric']['cases']
    exact = read('gallery')['parts']['exact']
    batch = exact['rows'][0]
    ivf = read('gallery')['parts']['ivf']
    peers = ['OSNet x0.5 at 256×128: 79.8 %, 92.5 %; the paper, ResNet-50 at 384×128: 88.2 %, 95.7 %',
             'OSNet x0.25 at 256×128: 75.0 %, 91.2 %']
    return table([
        *(light_headline(name, other) for name,other in zip(LIGHT_MODELS, peers)),
        {'': 'Pyramid head and losses, forward and backward, 64 images',
         'pyramidreid': f"{seconds(head['seconds']['fused'])}, {head['peak_mb']['fused']:.0f} MB",
         'compared with': f"loop over the branches: {seconds(head['seconds']['plain'])}, "
                          f"{head['peak_mb']['plain']:.0f} MB"},
        {'': 'mAP and CMC of 3,368 × 15,913 distances, first call',
         'pyramidreid': f"{seconds(metric['pyramidreid']['first'])}, {metric['pyramidreid']['peak_mb']:.0f} MB",
         'compared with': f"torchreid, Cython: {seconds(metric['torchreid, Cython']['first'])}, "
                      f"{metric['torchreid, Cython']['peak_mb']:.0f} MB"},
        {'': f"Exact search, {exact['n']:,} entries of {exact['dim']:,} dimensions, time per query in batches of "
             f"{batch['queries at once']}",
         'pyramidreid': f"{batch['gallery']:.2f} ms", 'compared with': f"plain FAISS: {batch['plain FAISS']:.2f} ms"},
        {'': f"IVF index, {ivf['n']:,} entries of {ivf['dim']:,} dimensions, one query",
         'pyramidreid': f"{ivf['ms_single']:.0f} ms at recall@10 {ivf['recall_at_10']:.3f}",
         'compared with': f"exact search: {ivf['exact_single_ms']:,.0f} ms"},
    ])

# ---- the page of results

def market():
    info = read('market1501-modern-cpu')
    card = info['card']
    ours = {'mAP': percent(card['mAP']), 'rank-1': percent(card['cmc'][0]), 'rank-5': percent(card['cmc'][4]),
            'mINP': percent(card['mINP']), 'training': f"{info['minutes_training']:.0f} min"}
    paper = {'mAP': '88.2 %', 'rank-1': '95.7 %', 'rank-5': '', 'mINP': '', 'training': ''}
    rows = [{'': 'pyramidreid, EfficientNet-Lite0, 192×64, 8 epochs', **ours},
            {'': 'the paper, ResNet-50, 384×128', **paper}]
    return f'{table(rows)}\n\n{source(info)}'

# mAP and rank-1 on Market-1501 by the authors' own figures: torchreid's model zoo, boxmot, and the paper
PEERS = [
    ('MobileNetV2, torchreid', '256×128', '2.2 M', '0.2', '67.3 %', '85.6 %', ''),
    ('OSNet x0.25, torchreid', '256×128', '0.2 M', '0.08', '75.0 %', '91.2 %', ''),
    ('OSNet x0.5, torchreid', '256×128', '0.6 M', '0.27', '79.8 %', '92.5 %', ''),
    ('OSNet x1.0, torchreid', '256×128', '2.2 M', '0.98', '82.6 %', '94.2 %', ''),
    ('TinyViT, boxmot, 200 epochs on a GPU', '', '7 M', '', '90.0 %', '95.6 %', ''),
    ('the paper, ResNet-50', '384×128', '', '', '88.2 %', '95.7 %', '')]

def trained(info):
    "Stages, minutes and machine of a light model's training"
    stages = ', then '.join(f'{epochs} epochs at {h}×{w}' for h,w,epochs,_ in info['stages'])
    return f'{stages}: {minutes_and_machine(info)}'

def light_row(info, way, title):
    "A row of the table of light models: an evaluation of one of them"
    height,width = info['stages'][-1][:2]
    card = info['cards'][way]
    return {'': title, 'input': f'{height}×{width}', 'parameters': f"{info['parameters']/1e6:.1f} M",
            'GMACs': f"{info['macs']/1e9:.2f}", 'mAP': percent(card['mAP']), 'rank-1': percent(card['cmc'][0]),
            'mINP': percent(card['mINP'])}

def light_model():
    "The models that come with the package, beside what others publish"
    rows,sources = [],[]
    for name,result in LIGHT_MODELS.items():
        info = read(result)
        ways = {'plain': f'`{name}`', 'flip': 'with mirrored images',
                'flip, re-ranked': 'with mirrored images, re-ranked'}
        rows += [light_row(info, way, title) for way,title in ways.items()]
        sources.append(f'`{name}`: {trained(info)}. {source(info)}')
    rows += [dict(zip(rows[0], peer)) for peer in PEERS]
    return '\n\n'.join([table(rows), *sources])

def both_datasets():
    "The models that come with the package on both datasets: cameras they were trained on, and others"
    def figures(card): return f"{percent(card['mAP'])}, {percent(card['cmc'][0])}"
    rows = []
    for name,result in LIGHT_MODELS.items():
        cards = read(result)['cards']
        sets = 'both' if 'CUHK03' in cards['plain']['about']['trained on'] else 'Market-1501'
        rows.append({'': f'`{name}`', 'trained on': sets, 'Market-1501': figures(cards['plain']),
                     'CUHK03-NP, detected': figures(cards['cuhk03-np'])})
    rows.append({'': 'OSNet x0.25, torchreid', 'trained on': 'all of MSMT17', 'Market-1501': '31.0 %, 59.9 %',
                 'CUHK03-NP, detected': ''})
    return table(rows)

def written(name):
    "A result as its script wrote it, without its title and with smaller headings"
    text = (results/f'{name}.md').read_text(encoding='utf-8')
    return text.split('\n', 1)[1].replace('\n## ', '\n### ').strip()

def embedding(): return written('embedding')

def embedding_288x128(): return written('embedding-288x128')

def drawn_people(): return written('drawn-people')

def multi_query(): return written('multi-query')

def identities(): return written('identities')

def identities_drawn(): return written('identities-drawn')

def trackers(): return written('trackers')

def serve(): return written('serve')

def weighting(): return written('weighting')

def confirmation_market(): return written('weighting-192x64-market')

def confirmation_cuhk(): return written('weighting-192x64-cuhk')

def gpu():
    "The parts of gpu.py that passed on a GPU"
    info = read('gpu')
    parts = {name: part for name,part in info['parts'].items() if part['status']=='passed'}
    rows = [{'part': name.removeprefix('case:').replace('_', ' '), 'result': part['result'].get('text', '')}
            for name,part in parts.items()]
    return f'{table(rows)}\n\n{source(info)}'

def head():
    info = read('head-cpu')
    names = {'plain': 'branch by branch, with a loop over anchors', 'fused': 'pyramidreid'}
    rows = [{'': text, 'seconds': f"{info['seconds'][name]:.3f}", 'peak memory': f"{info['peak_mb'][name]:.0f} MB",
             'loss': f"{info['loss'][name]:.4f}"} for name,text in names.items()]
    return f"{table(rows)}\n\n{info['ratio']:.1f} times faster. {source(info)}"

def step():
    info = read('step-cpu')
    rows = []
    for name,parts in info['seconds'].items():
        extra = parts['head'] + parts['losses'] + parts['backward, head and losses']
        rows.append({'': name, 'whole step, s': f"{parts['step']:.2f}", 'head and losses, s': f'{extra:.2f}',
                     'fraction': percent(extra/parts['step'])})
    return f'{table(rows)}\n\n{source(info)}'

def step_formats():
    info = read('step-formats-cpu')
    rows = [{'': name, 'contiguous, s': f"{row['contiguous']:.2f}", 'channels last, s': f"{row['channels last']:.2f}",
             'ratio': f"{row['ratio']:.2f}"} for name,row in info['seconds'].items()]
    return f"{table(rows)}\n\n{info['batch']} images to a step. {source(info)}"

def loading():
    info = read('loading-cpu')
    names = info['runs'][0]['images_per_second']
    rows = []
    for name in names:
        row = {'images per second, median': name}
        for run in info['runs']:
            h,w = run['size']
            row[f'{h}×{w}'] = f"{pd.Series(run['images_per_second'][name]).median():,.0f}"
        rows.append(row)
    return f'{table(rows)}\n\n{info["images"]}. {source(info)}'

def evaluation():
    rows = []
    for part in read('evaluation')['parts'].values():
        for who,case in part['cases'].items():
            fastest = seconds(case['seconds']) if case['runs']>1 else ''
            rows.append({'what': part['title'], 'who': who, 'first call': seconds(case['first']), 'fastest': fastest,
                         'peak memory': f"{case['peak_mb']:.0f} MB", '': case.get('note', '')})
    return f"{table(rows)}\n\n{source(read('evaluation'))}"

def search():
    info = read('gallery')
    exact,ivf = info['parts']['exact'],info['parts']['ivf']
    times = {'plain FAISS': 'plain FAISS, ms', 'gallery': 'gallery, ms', 'by another camera': 'other cameras only, ms'}
    rows = [{'queries at once': row['queries at once'], **{title: f'{row[key]:.2f}' for key,title in times.items()}}
            for row in exact['rows']]
    by_index = [f"{ivf['ms_single']:.1f}", f"{ivf['ms_batch']:.1f}", f"{ivf['recall_at_10']:.3f}"]
    exactly = [f"{ivf['exact_single_ms']:,.0f}", f"{ivf['exact_ms']:.0f}", '1']
    titles = ['', 'one query, ms', '256 at once, ms each', 'recall@10']
    large = [dict(zip(titles, ['IVF index', *by_index])), dict(zip(titles, ['exact', *exactly]))]
    small_text = f"Among {exact['n']:,} embeddings of {exact['dim']:,} dimensions, per query:"
    large_text = (f"Among {ivf['n']:,}, in half precision, mapped from disk. The index takes "
                  f"{ivf['index_mb']/1000:.1f} GB and {ivf['build_s']:.0f} s to build, with a peak of "
                  f"{ivf['build_peak_mb']/1000:.1f} GB:")
    return '\n\n'.join([small_text, table(rows), source({**info, **exact}),
                        large_text, table(large), source({**info, **ivf})])

def export():
    info = read('export')
    rows = [{'model': run['model'], 'threads': run['threads'], 'engine': run['engine'],
             'embeddings per second': f"{run['per_second']:.1f}", 'times PyTorch': f"{run['times_pytorch']:.2f}",
             'largest difference': f"{run['difference']:.0e}"} for run in info['runs']]
    return f'{table(rows)}\n\n{source({**info, "threads": None})}'

def openset(name='openset'):
    info = read(name)
    runs = pd.DataFrame(info['runs'])
    rows = [{'seed': int(run.seed), 'FAR wanted': run.far,
             '95 % interval of the calibration': f'{run.low:.3f} to {run.high:.3f}',
             'FAR observed': f'{run.rate:.3f}', 'its own interval': f'{run.own_low:.3f} to {run.own_high:.3f}',
             'known people found at rank 1': percent(run.dir, 0)} for run in runs.itertuples()]
    splits = [{k: f'{v:.4g}' for k,v in split.items()} for split in info['splits']]
    splits_text = f"Over {info['settings']['splits']} random splits of the people:"
    return '\n\n'.join([table(rows), splits_text, table(splits), source(info)])

def by_name(name, columns):
    "Mean and standard deviation over seeds for each configuration of a result"
    runs = pd.DataFrame(read(name)['runs'])
    return [{'': label, **{title: mean_std(group[column]) for title,column in columns.items()}}
            for label,group in runs.groupby('name', sort=False)]

def dynamic(): return f"{table(by_name('dynamic', {'mAP': 'mAP', 'rank-1': 'rank1'}))}\n\n{source(read('dynamic'))}"

def ablation():
    info = read('ablation')
    rows = by_name('ablation', {'mAP': 'mAP', 'rank-1': 'rank1'})
    for row in rows:
        if row[''].startswith('shift='): row[''] = 'default, other seeds of training'
    return f"{table(rows)}\n\n{source(info)}"

def misalign():
    runs = pd.DataFrame(read('misalign')['runs'])
    rows = []
    for label,group in runs.groupby('name', sort=False):
        cells = {f'mAP, misalign {strength:g}': mean_std(o.mAP) for strength,o in group.groupby('misalign')}
        rows.append({'': label, **cells})
    return f"{table(rows)}\n\n{source(read('misalign'))}"

def recipes():
    info = read('recipes')
    rows = [{'': run['name'], 'mAP': percent(run['mAP'], 2), 'rank-1': percent(run['rank1'], 2),
             'settings': f"`{run['settings']}`"} for run in info['runs']]
    dates = ', '.join(sorted({run['date'] for run in info['runs']}))
    return f"{table(rows)}\n\n{source({**info['runs'][0], 'command': info['command'], 'date': dates})}"
