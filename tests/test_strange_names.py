"Names and texts of strangers on a terminal, in cards and in plots: nothing in them is obeyed"
import json
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from PIL import Image

from pyramidreid.cli.entry import main
from pyramidreid.cli.frame import CommandResult, Console
from pyramidreid.data.doctor_report import DataReport, _finding_text
from pyramidreid.data.loaders import ReIDLabel
from pyramidreid.evaluation.plots import _draw_person
from pyramidreid.evaluation.retrieval import evaluate_distances
from pyramidreid.export.onnx_runtime import BaseEmbedder
from pyramidreid.gallery.plots import _draw_tile
from pyramidreid.images import plot_text, shown_text

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
