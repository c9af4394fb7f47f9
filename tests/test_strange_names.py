"Names and texts of strangers on a terminal, in cards and in plots: nothing in them is obeyed"
import json
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pyramidreid.cli.entry import main
from pyramidreid.cli.frame import CommandResult, Console
from pyramidreid.core import ReIDWarning, TextLines
from pyramidreid.data.cache import ImageCache, open_image
from pyramidreid.data.csv_tables import csv_table, read_csv
from pyramidreid.data.datasets import dataset_table
from pyramidreid.data.doctor_report import DataReport, _finding_text
from pyramidreid.data.folders import folder_table
from pyramidreid.data.loaders import ReIDLabel
from pyramidreid.data.registry import read_layout
from pyramidreid.evaluation.openset import Calibration
from pyramidreid.evaluation.plots import _draw_person
from pyramidreid.evaluation.protocol_card import Card
from pyramidreid.evaluation.retrieval import evaluate_distances
from pyramidreid.export.model_files import load_embedder
from pyramidreid.export.onnx_runtime import BaseEmbedder, Runtime
from pyramidreid.gallery.entries import open_picture
from pyramidreid.gallery.plots import _draw_tile
from pyramidreid.gallery.store import Store
from pyramidreid.images import plot_text, read_rgb, shown_text
from pyramidreid.models.backbone import read_weights

CLEAR = '\x1b[2J' # Clears a terminal
EVIL = f'{CLEAR}mine\n9 errors\x9b1m\u202egpj'
SHOWN = r'\x1b[2Jmine\n9 errors\x9b1m\u202egpj'

# the two helpers

@pytest.mark.parametrize('text,shown', [
    ('plain', 'plain'), ('Zoë 李 🚶‍♀️ می‌خواهم', 'Zoë 李 🚶‍♀️ می‌خواهم'),
    (7, '7'), (EVIL, SHOWN), ('a\rb\tc', r'a\rb\tc'),
    ('\x00\x7f\u2028\u2066', r'\x00\x7f\u2028\u2066'), (b'\xff.jpg'.decode('utf-8', 'surrogateescape'), r'\udcff.jpg')])
def test_what_a_terminal_would_obey_is_written_as_an_escape(text, shown):
    assert shown_text(text)==shown
    assert shown.isprintable() or '\u200d' in shown or '\u200c' in shown

def test_lines_of_a_text_of_several_are_kept():
    assert shown_text(f'one\n\ttwo\r{CLEAR}', keep_lines=True)=='one\n\ttwo\\r\\x1b[2J'

@pytest.mark.parametrize('text', [r'$\a$', '$', '$$', r'\$\a$', '$5 $6 $', '$x^2$', r'\alpha_1^', '{'])
def test_matplotlib_draws_the_text_itself(text):
    drawn = plt.figure().text(0, 0, plot_text(text))
    assert drawn._preprocess_math(drawn.get_text())==(text, False) # the text, and whether it is a formula
    drawn.figure.canvas.draw()

# who uses them

def test_titles_of_plots(tmp_path):
    "A formula that is none fails when a figure is drawn, not before"
    name = r'$\a$'
    Image.new('RGB', (16,32)).save(tmp_path/'x.png')
    row = SimpleNamespace(fn=tmp_path/'x.png', pid=name, camera=0, cam=name)
    fig,axs = plt.subplots(1, 3)
    _draw_person(axs[0], row, (32,16), 'query', 'black')
    _draw_tile(axs[1], 'no picture', ['0.50',name,'a'*15+'$$'], 'black')
    ReIDLabel((name,EVIL)).show(ctx=axs[2])
    fig.canvas.draw()
    titles = [ax.title._preprocess_math(ax.get_title()) for ax in axs]
    assert titles==[(f'query\npid {name} · c{name}',False), (f'0.50\n{name}\n{"a"*15}…',False),
                    (f'pid {name} · cam {SHOWN}',False)]

def test_cards():
    "As text; in a notebook they are HTML, which escapes what it obeys"
    card = evaluate_distances(torch.tensor([[.1,.2]]), [1], [1,2], about={'data':EVIL, CLEAR:'<b>'})
    assert CLEAR not in repr(card) and SHOWN in repr(card) and len(repr(card).splitlines())==len(card.card())
    assert '<b>' not in card._repr_html_()

def test_findings_of_the_doctor():
    finding = pd.Series(dict(severity='error', title='Bad', n=1, todo='Do', first=[CLEAR]))
    report = SimpleNamespace(_head=lambda: [f'Folder {CLEAR}'], splits=[], _verdict=lambda: 'None',
                             findings=SimpleNamespace(iterrows=lambda: [('bad',finding)]))
    assert CLEAR in '\n'.join(_finding_text('bad', finding))
    text = DataReport.__repr__(report)
    assert CLEAR not in text and text.count(shown_text(CLEAR))==2

def test_a_shared_model():
    about = dict(format=1, arch=EVIL, size=[8,4], levels=[1], n_parts=1, emb_sz=2, fingerprint='f'*64, mean=None,
                 data=EVIL, n_ids=3)
    text = repr(BaseEmbedder(about))
    assert CLEAR not in text and '\n' not in text and SHOWN in text

def test_messages_of_the_command_line(capfd):
    console = Console()
    console.say(f'Reading {CLEAR}')
    assert main(['embed', f'no {CLEAR} model', 'x.jpg', '--out', 'x.npz'])==2
    out,err = capfd.readouterr()
    assert out==f'Reading {shown_text(CLEAR)}\n' and err and '\x1b' not in err

def test_answers_as_json_mean_the_same():
    "Escapes of JSON for what a terminal obeys"
    for data in ({'name':EVIL}, json.dumps({'name':EVIL}, ensure_ascii=False)):
        text = CommandResult('', data).json()
        assert json.loads(text)=={'name':EVIL} and text.isprintable()

def test_warnings_of_the_command_line(capfd):
    from pyramidreid.cli.frame import _only_own_warnings
    from pyramidreid.core import ReIDWarning
    with _only_own_warnings(quiet=False): warnings.warn(f'Look at {CLEAR}', ReIDWarning, stacklevel=1)
    assert capfd.readouterr().err==f'Warning: Look at {shown_text(CLEAR)}\n'

# A name with a line break and an escape in every message

BAD = 'a\nb\x1b[31m.jpg'
SHOWN_BAD = r'a\nb\x1b[31m'

COMMANDS = {
    'no model': 'embed {bad} x.jpg --out x.npz',
    'no image': 'embed file:x.onnx {bad} --out x.npz',
    'a folder without a model': 'embed dir:{bad} file:x.jpg --out x.npz',
    'not an ONNX file': 'embed file:{bad}.onnx file:x.jpg --out x.npz',
    'a file for a folder': 'train file:{bad}',
    'a folder without people': 'train dir:{bad}',
    'an empty table': 'doctor file:{bad}.csv',
    'a table without columns': 'doctor csv:{bad}.csv',
    'no such layout': 'doctor . --dataset {bad}',
    'not a layout': 'doctor . --dataset file:{bad}.json',
    'no gallery': 'gallery remove {bad} key',
    'no gallery to show': 'gallery info {bad}',
    'a device': 'embed file:x.onnx file:x.jpg --out x.npz --device {bad}',
    'a number': 'gallery search g file:x.jpg --model . --threshold {bad}',
    'an option': 'demo --{bad}',
    'a command': '{bad}',
    'a folder that cannot be': 'draw file:{bad}/below'}

@pytest.mark.parametrize('line', COMMANDS.values(), ids=COMMANDS)
def test_no_command_prints_a_name_as_it_is(tmp_path, monkeypatch, capfd, line):
    monkeypatch.chdir(tmp_path)
    def argument(word):
        kind,_,name = word.replace('{bad}', BAD).rpartition(':')
        first = tmp_path/name.split('/')[0]
        if kind=='dir': first.mkdir()
        elif kind: first.write_text('x,y\n1,2\n' if kind=='csv' else '')
        return name
    code = main([argument(word) for word in line.split()])
    err = capfd.readouterr().err
    assert code==2 and '\x1b' not in err and 'a\nb' not in err
    assert SHOWN_BAD in err.replace('\\\\', '\\') # click shows a name as Python would

def gallery_of(folder, damage):
    "A gallery in a folder of this name, then damaged"
    store = Store('a model')
    store.add(np.eye(2), pd.DataFrame(dict(key=['a','b'])))
    store.save(folder/BAD)
    damage(folder/BAD)
    return Store.load(folder/BAD)

def truncate(path):
    file = next(path.glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-1])

def write(file, content=b''):
    file.write_bytes(content)
    return file

FUNCTIONS = {
    'a missing picture': lambda o: read_rgb(o/BAD),
    'a damaged picture': lambda o: read_rgb(write(o/BAD, b'x')),
    'a picture to cache': lambda o: ImageCache([write(o/BAD, b'x')], (8,4)),
    'a picture for a gallery': lambda o: open_picture(o/BAD),
    'a picture to train on': lambda o: open_image(o/BAD),
    'not in the cache': lambda o: image_cache(o).find([o/BAD]),
    'an empty table': lambda o: read_csv(write(o/BAD)),
    'a workbook': lambda o: read_csv(write(o/BAD, b'PK\x03\x04')),
    'a table without a header': lambda o: read_csv(write(o/BAD, b'sep=;')),
    'a table without rows': lambda o: read_csv(write(o/BAD, b'fn,pid')),
    'a table without pictures': lambda o: read_csv(write(o/BAD, b'x,y\n1,2')),
    'a table with gaps': lambda o: read_csv(write(o/BAD, b'fn,pid\n,2')),
    'a table with two columns': lambda o: read_csv(write(o/BAD, b'fn,fn\n1,2')),
    'a table with long rows': lambda o: read_csv(write(o/BAD, b'fn,pid\n1,2,3')),
    'a table in another encoding': lambda o: read_csv(write(o/BAD, b'fn,pid\n\xe9.jpg,2')),
    'a table without people': lambda o: csv_table(write(o/BAD, b'fn,pid\nx.jpg,')),
    'a dataset that is not there': lambda o: dataset_table(o/BAD),
    'a dataset of another kind': lambda o: dataset_table(o/BAD, 'market1501'),
    'a folder without pictures': lambda o: folder_table(o/BAD),
    'pictures without folders': lambda o: folder_table(people(o, BAD, '2.jpg')),
    'folders like cameras': lambda o: folder_table(people(o, f'cam1/{BAD}', 'cam2/b.jpg')),
    'people at several depths': lambda o: folder_table(people(o, f'x/{BAD}', 'x/y/b.jpg')),
    'people in several folders': lambda o: folder_table(people(o, f'{BAD}/x/1.jpg', 'u/x/b.jpg')),
    'a pattern that finds nothing': lambda o: folder_table(people(o, f'x/{BAD}', 'y/1.jpg'), cam_pat='c([0-9])_'),
    'a layout': lambda o: read_layout(write(o/BAD, b'{')),
    'a card': lambda o: Card.from_json(write(o/BAD, b'{')),
    'a calibration': lambda o: Calibration.from_json(write(o/BAD, b'{')),
    'no model': lambda o: load_embedder(o/BAD),
    'no ONNX model': lambda o: Runtime(o/BAD),
    'no weights': lambda o: read_weights(write(o/BAD)),
    'a gallery that is cut off': lambda o: gallery_of(o, truncate),
    'a gallery without its manifest': lambda o: gallery_of(o, lambda path: (path/'gallery.json').write_text('')),
    'a gallery without a file': lambda o: gallery_of(o, lambda path: next(path.glob('*.parquet')).unlink()),
    'a gallery that is a file': lambda o: Store('a model').save(write(o/BAD))}

def people(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4,8)).save(folder/name)
    return folder

def image_cache(folder):
    Image.new('RGB', (4,8)).save(folder/'x.png')
    return ImageCache([folder/'x.png'], (8,4))

@pytest.mark.parametrize('function', FUNCTIONS.values(), ids=FUNCTIONS)
def test_no_error_or_warning_has_a_name_as_it_is(tmp_path, function):
    messages = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        try: function(tmp_path)
        except Exception as e: messages.append(str(e))
    messages += [str(o.message) for o in found if issubclass(o.category, ReIDWarning)]
    assert messages
    text = '\n'.join(messages)
    assert '\x1b' not in text and 'a\nb' not in text and 'a\\nb' in text, text

def test_a_warning_is_clean_wherever_it_is_shown():
    assert str(ReIDWarning(f'left out: {BAD}'))==f'left out: {SHOWN_BAD}.jpg'
    assert str(ReIDWarning(TextLines('one\ntwo')))=='one\ntwo'
