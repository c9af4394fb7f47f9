"The widgets of `explain`: decisions and tables without a widget, and every button clicked as a program can"
import re
import sys
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pyramidreid.core import Role
from pyramidreid.explain import thumbnails
from pyramidreid.explain.interpretation import ReIDInterpretation
from pyramidreid.explain.label_cleaner import *
from pyramidreid.explain.match_explorer import *
from pyramidreid.explain.thumbnails import *

pytest.importorskip('ipywidgets')

def size_of(jpeg): return Image.open(BytesIO(jpeg)).size[::-1]

def texts(widget):
    "All text that a widget and those in it show as HTML"
    own = [widget.value] if type(widget).__name__=='HTML' else []
    return ' '.join(own+[texts(o) for o in getattr(widget, 'children', ())])

def pictures(widget):
    "All pictures in a widget"
    own = [widget.value] if type(widget).__name__=='Image' else []
    return own+[value for o in getattr(widget, 'children', ()) for value in pictures(o)]

@pytest.fixture
def opened(monkeypatch):
    "The files that thumbnails were made of"
    files,open_image = [],thumbnails.open_image
    def spy(image, *args, **kwargs):
        files.append(image)
        return open_image(image, *args, **kwargs)
    monkeypatch.setattr(thumbnails, 'open_image', spy)
    return files

# thumbnails

@pytest.mark.parametrize('shape,expected', [
    ((400,200), (128,64)), ((50,200), (16,64)), ((500,20), (128,5)), ((64,32), (128,64))])
def test_a_thumbnail_fits_into_its_box(shape, expected):
    image = Image.fromarray(np.zeros((*shape,3), np.uint8))
    assert size_of(thumbnail(image))==expected

def test_what_is_no_picture_is_replaced(tmp_path):
    text = tmp_path/'text.jpg'
    text.write_text('no picture')
    for file in (text, tmp_path, tmp_path/'none.jpg', None, 'a\0b.jpg', np.zeros((2,2,5), np.uint8)):
        assert thumbnail(file, (96,48))==thumbnail('none', (96,48)) and size_of(thumbnail(file, (96,48)))==(96,48)

def test_deep_pictures_are_shown(tmp_path):
    file = tmp_path/'thermal.png'
    Image.fromarray((np.arange(1800).reshape(60,30)+7000).astype(np.uint16)).save(file)
    assert np.ptp(np.asarray(Image.open(BytesIO(thumbnail(file)))))>200

def test_size_is_checked():
    with pytest.raises(ValueError, match='at least 8 pixels'): thumbnail('x.jpg', (4,64))

@pytest.mark.parametrize('make', [lambda: LabelCleaner(suspects()), lambda: MatchExplorer(None), load_widgets])
def test_without_ipywidgets(monkeypatch, make):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pyramidreid[widgets]'")): make()

# decisions about labels

def suspects(n=5, fn='{}.jpg', other=9):
    return pd.DataFrame(dict(sign='neighbour', score=.5, fn=[fn.format(i) for i in range(n)], pid=range(1, n+1), cam=1,
                             other_fn='other.jpg', other_pid=other, other_cam=2, why='near <b>another</b>'))

def test_everything_is_kept_at_first():
    choices = LabelChoices(suspects())
    assert len(choices)==5 and choices.changes().empty
    assert list(choices.changes().columns)==['fn','pid','action','new_pid']
    assert repr(choices)=='5 suspects: 5 to keep, 0 to delete, 0 to change'

def test_decisions():
    choices = LabelChoices(suspects(), ids=[1,2,3,4,5,9,77])
    choices.choose(0, 'change')
    choices.choose(1, 'delete')
    choices.choose(2, 'change', ' 77 ')
    choices.choose(3, 'change', '4') # the pid it has
    choices.choose(4, 'delete')
    choices.choose(4, 'keep')
    assert choices.changes().values.tolist()==[
        ['0.jpg',1,'change',9], ['1.jpg',2,'delete',None], ['2.jpg',3,'change',77]]
    for wrong in ((0,'remove'), (5,'keep'), (-1,'keep'), (0,'change','')):
        with pytest.raises(ValueError): choices.choose(*wrong)
    assert len(choices.changes())==3

def test_one_question_for_each_image_and_pid():
    first = suspects(3)
    table = pd.concat([first, first.iloc[[1]].assign(sign='duplicate', why='a copy'), first.iloc[[0]].assign(pid=8)])
    choices = LabelChoices(table)
    assert list(zip(choices.suspects.fn, choices.suspects.pid))==[('0.jpg',1), ('1.jpg',2), ('2.jpg',3), ('0.jpg',8)]
    assert choices.suspects.sign[1]=='neighbour, duplicate' and choices.suspects.why[1].endswith('; a copy')

def test_tables_that_hold_no_suspects():
    with pytest.raises(ValueError, match="no column 'other_fn', 'other_pid'"):
        LabelCleaner(pd.DataFrame(dict(fn=['a'], pid=[1])))
    with pytest.raises(ValueError, match='pictures in memory'):
        LabelChoices(suspects(1).assign(fn=[Image.new('RGB', (4,8))]))
    with pytest.raises(ValueError, match='str: give a learner'): LabelCleaner('people')

@pytest.mark.parametrize('ids,value,expected', [
    ([1,2], '2', 2), ([1,2], 2.0, 2), ([1,2], '-1', -1), ([1,2], '40', 40), (['01','1'], '1', '1'), (['01'], '1', '1'),
    (['ann','bob'], ' bob', 'bob'), ([3,'3'], '3', '3'), ([3,'3'], 3, 3), ([np.int64(5)], '5', 5),
    (['Market/2'], '2', '2')])
def test_ids_are_found_as_they_are_written(ids, value, expected):
    found = find_id(value, ids)
    assert found==expected and isinstance(found, str)==isinstance(expected, str)

@pytest.mark.parametrize('value', ['', '  ', None, float('nan'), 'x', '1.5'])
def test_what_is_no_id(value):
    with pytest.raises(ValueError, match='pid'): find_id(value, [1,2])

# applying changes

def changes(*rows): return pd.DataFrame(rows, columns=['fn','pid','action','new_pid'])

@pytest.fixture
def table():
    res = pd.DataFrame(dict(fn=list('aabcd'), pid=[1,2,2,3,3], cam=[1,1,2,1,2]), index=[10,11,12,13,14])
    res.attrs.update(name='door', counts=dict(train=(5,3)))
    return res

def test_changes_are_applied_to_a_new_table(table):
    before = table.copy()
    wanted = changes(('a',2,'delete',None), ('b',2,'change',3), ('c',3,'change',8), ('d',3,'keep',None))
    res = apply_changes(table, wanted)
    assert res.to_dict('index')=={10:dict(fn='a', pid=1, cam=1), 12:dict(fn='b', pid=3, cam=2),
                                  13:dict(fn='c', pid=8, cam=1), 14:dict(fn='d', pid=3, cam=2)}
    assert res.pid.dtype==np.int64 and table.equals(before) and table.attrs['name']=='door'
    assert res.attrs==dict(name='door, 2 labels changed, 1 images left out', counts={})
    same = apply_changes(table, changes())
    assert same.equals(table) and same.attrs==table.attrs

def test_an_image_listed_twice_is_changed_twice(table):
    "As a query that is in the gallery, too"
    twice = pd.concat([table,table.iloc[[0]]], ignore_index=True)
    assert apply_changes(twice, changes(('a',1,'change',3))).pid.tolist()==[3,2,2,3,3,3]
    assert len(apply_changes(twice, changes(('a',1,'delete',None))))==4

def test_text_ids_survive_a_file(table, tmp_path):
    table['pid'] = ['007','7','7','ann','ann']
    wanted = changes(('a','007','change','7'), ('c','ann','change','bob'), ('b','7','delete',None))
    wanted.to_csv(tmp_path/'x.csv', index=False)
    res = apply_changes(table, pd.read_csv(tmp_path/'x.csv', dtype=str))
    assert res.pid.tolist()==['7','7','bob','ann'] and res.equals(apply_changes(table, wanted))
    with pytest.raises(ValueError, match=r'dtype=str'):
        apply_changes(table, pd.DataFrame(dict(fn=['a'], pid=[70], action='delete', new_pid=None)))

def test_changes_of_a_file_read_as_numbers(table, tmp_path):
    changes(('a',1,'change',3), ('b',2,'delete',None)).to_csv(tmp_path/'x.csv', index=False)
    read = pd.read_csv(tmp_path/'x.csv')
    assert read.new_pid.dtype==float
    assert apply_changes(table, read).pid.tolist()==[3,2,3,3]

@pytest.mark.parametrize('rows,message', [
    ([('e',1,'delete',None)], '1 of 1 changes fit no row .*such as e of pid 1'),
    ([('a',3,'delete',None)], 'fit no row'), ([('a',1,'drop',None)], "action='drop'"),
    ([('a',1,'change',None)], 'There is no pid'), ([('a',1,'change','eve')], "'eve' is not a pid here"),
    ([('a',1,'change',3), ('a',1,'delete',None)], 'a of pid 1 has two different changes'),
    ([('a',1,'change',3), ('a','1','change',2)], 'two different changes')])
def test_changes_that_cannot_be_applied(table, rows, message):
    with pytest.raises(ValueError, match=message): apply_changes(table, changes(*rows))

def test_missing_columns(table):
    with pytest.raises(ValueError, match="df has no column 'pid'"): apply_changes(table[['fn']], changes())
    with pytest.raises(ValueError, match="changes has no column 'action', 'new_pid'"): apply_changes(table, table)

# examples of a person

def test_examples_are_from_several_cameras(table):
    items = pd.DataFrame(dict(fn=list('abcdea'), pid=[1]*6, cam=[1,1,None,2,2,1]))
    assert examples(items, 1, 3).fn.tolist()==['a','c','d']
    assert examples(items, 1, 9, but=['a']).fn.tolist()==['b','c','d','e']
    assert examples(items.drop(columns='cam'), 1, 2).fn.tolist()==['a','b'] and examples(items, 5).empty

# the cleaner

def test_pages_read_only_their_pictures_and_keep_decisions(opened):
    cleaner = LabelCleaner(suspects(5), per_page=2)
    assert opened==['0.jpg','other.jpg','1.jpg','other.jpg'] and cleaner.n_pages==3 and cleaner.previous.disabled
    cleaner.editors[1].action.value = 'delete'
    cleaner.editors[0].pid.value = '4'
    assert cleaner.editors[0].action.value=='change' and 'page 1 of 3' in cleaner.where.value
    cleaner.next.click()
    assert opened[4:]==['2.jpg','other.jpg','3.jpg','other.jpg']
    assert [editor.action.value for editor in cleaner.editors]==['keep','keep']
    cleaner.next.click()
    assert len(cleaner.editors)==1 and cleaner.next.disabled and not cleaner.previous.disabled
    cleaner.editors[0].action.value = 'change'
    cleaner.turn_to(0)
    assert [(editor.action.value,editor.pid.value) for editor in cleaner.editors]==[('change','4'), ('delete','9')]
    assert cleaner.changes().values.tolist()==[
        ['0.jpg',1,'change',4], ['1.jpg',2,'delete',None], ['4.jpg',5,'change',9]]
    assert '2 to keep, 1 to delete, 2 to change' in cleaner.where.value
    with pytest.raises(ValueError, match='page=3'): cleaner.turn_to(3)

def test_a_problem_is_shown_and_the_label_kept():
    cleaner = LabelCleaner(suspects(2))
    editor = cleaner.editors[0]
    editor.action.value = 'change'
    editor.pid.value = '<i>eve</i>'
    assert '&lt;i&gt;eve&lt;/i&gt;' in editor.problem.value and 'is not a pid here' in editor.problem.value
    assert editor.action.value=='keep' and cleaner.changes().empty
    editor.pid.value = '2'
    assert editor.problem.value=='' and editor.action.value=='change'
    editor.pid.value = '1' # the pid it has
    assert editor.action.value=='keep' and cleaner.changes().empty

def test_text_of_tables_is_escaped():
    table = suspects(1).assign(pid='<script>', other_pid='<img src=x>', cam='"><b>')
    shown = texts(LabelCleaner(table).widget)
    assert not re.search('<(script|img|b)\\b', shown) and '&lt;script&gt;' in shown and '&lt;img src=x&gt;' in shown

def test_missing_files_do_not_keep_others_from_being_seen(tmp_path):
    file = tmp_path/'a.png'
    Image.new('RGB', (30,60), 'red').save(file)
    suspected = suspects(1).assign(fn=[file])
    shown = pictures(LabelCleaner(suspected).widget)
    assert shown==[thumbnail(file), thumbnail('other.jpg')] and max(map(len, shown))<10_000

def test_no_suspects():
    cleaner = LabelCleaner(suspects(0))
    assert 'No label is suspected' in texts(cleaner.widget) and cleaner.changes().empty
    assert cleaner.previous.disabled and cleaner.next.disabled

def test_arguments_are_checked():
    for wrong in (dict(per_page=0), dict(k=0)):
        with pytest.raises(ValueError, match='show at least one'): LabelCleaner(suspects(1), **wrong)

def test_labels_of_a_learner(trained):
    cleaner = LabelCleaner(trained, n=3, per_page=2, k=2, size=(48,24))
    suspected = ReIDInterpretation.from_learner(trained).label_errors(3)
    assert set(cleaner.choices.suspects.fn)==set(suspected.fn) and len(cleaner.choices)==suspected.fn.nunique()
    assert len(pictures(cleaner.editors[0].widget))==1+2+2
    cleaner.editors[0].action.value = 'delete'
    items = trained.dls.valid.items
    cleaned = apply_changes(items, cleaner.changes())
    assert len(cleaned)==len(items)-1 and all(fn.exists() for fn in items.fn)
    train = LabelCleaner(trained, dl=trained.dls.train, n=2)
    assert set(train.choices.suspects.fn)<=set(trained.dls.train.items.fn)

# the explorer

@pytest.fixture
def explorer(trained): return MatchExplorer(trained, k=5)

def test_images_are_embedded_once(trained, monkeypatch):
    calls,embed = [],trained.embed
    monkeypatch.setattr(trained, 'embed', lambda *args: calls.append(args) or embed(*args), raising=False)
    explorer = MatchExplorer(trained, k=4)
    explorer.order.value = 'hardest first'
    for button in (explorer.next, explorer.next, explorer.previous): button.click()
    explorer.k.value = 3
    explorer.cams.value = explorer.browser.cams[:1]
    explorer.buttons[0].click()
    assert len(calls)==1 and explorer.explanation.children[0].format=='png'

def test_orders_and_places(explorer):
    ap,n = explorer.interp.card.ap.numpy(),explorer.interp.n_query
    assert explorer.browser.query==0 and explorer.previous.disabled and not explorer.next.disabled
    explorer.next.click()
    assert (explorer.place.value,explorer.browser.query)==(2,1)
    explorer.order.value = 'hardest first'
    assert explorer.place.value==1 and ap[explorer.browser.query]==np.nanmin(ap)
    explorer.order.value = 'easiest first'
    assert ap[explorer.browser.query]==np.nanmax(ap)
    explorer.place.value = n
    assert explorer.next.disabled and (np.isnan(ap).any() or ap[explorer.browser.query]==np.nanmin(ap))
    explorer.next.click() # as a stale page may
    assert explorer.place.value==n
    assert sorted(explorer.browser.positions.tolist())==list(range(n))
    for wrong in (-1,n):
        with pytest.raises(ValueError, match='place='): explorer.browser.go_to(wrong)
    with pytest.raises(ValueError, match="order='worst'"): explorer.browser.sort('worst')

def loop_matches(interp, query, k, cams):
    "Gallery images of the cameras, best first, by a plain loop"
    items,x = interp.items,F.normalize(interp.emb, dim=1)
    row = items.iloc[query]
    allowed = [j for j in range(interp.n_query, len(items)) if items.label[j]>=0 and (not cams or items.cam[j] in cams)
               and not (items.label[j]==row.label and items.camera[j]==row.camera)]
    return sorted(allowed, key=lambda j: -float(x[query]@x[j]))[:k]

@pytest.mark.parametrize('cams', [(),(0,),(1,2)])
def test_matches_are_those_of_a_loop(explorer, cams):
    explorer.cams.value = cams = tuple(explorer.browser.cams[i] for i in cams)
    explorer.place.value,explorer.k.value = 3,7
    expected = loop_matches(explorer.interp, 2, 7, cams)
    assert explorer.matches.row.tolist()==expected and len(explorer.buttons)==len(expected)
    items = explorer.interp.items
    assert explorer.matches.right.tolist()==(items.label[expected]==items.label[2]).tolist()
    shown = texts(explorer.row)
    assert shown.count('✓')==explorer.matches.right.sum() and shown.count('✗')==(~explorer.matches.right).sum()
    assert pictures(explorer.row)==[thumbnail(fn) for fn in [items.fn[2], *explorer.matches.fn]]

def test_unknown_camera(explorer):
    with pytest.raises(ValueError, match="no camera 'roof' in the gallery"): explorer.browser.matches(cams=['roof'])

def test_an_explanation_is_that_of_the_learner(explorer, trained):
    explorer.place.value = 2
    own = explorer.explain(1)
    plain = trained.explain(explorer.interp.queries.fn.iloc[1], explorer.matches.fn[1])
    np.testing.assert_allclose(own.table.similarity, plain.table.similarity, atol=1e-5)
    assert (own.images==plain.images).all() and own.names==('query','match 2')
    explorer.buttons[1].click()
    assert bytes(explorer.explanation.children[0].value).startswith(b'\x89PNG')
    explorer.next.click()
    assert not explorer.explanation.children # it was of another query

def test_a_match_without_explanation_says_why(explorer, trained, monkeypatch):
    monkeypatch.setattr(trained.model, 'norm', 'whole')
    explorer.buttons[0].click()
    assert 'norm=&#x27;whole&#x27;' in texts(explorer.explanation)

def small(label, role, camera=-1):
    "An interpretation of files that are not there"
    n = len(label)
    fns,pids = [f'<{i}>.jpg' for i in range(n)],[f'<b>{o}' for o in label]
    items = pd.DataFrame(dict(fn=fns, pid=pids, cam=None, label=label, camera=camera, role=role))
    return ReIDInterpretation(torch.eye(n), items)

def test_queries_without_match_come_last():
    interp = small([0,1,0], [Role.QUERY]*2+[Role.GALLERY])
    browser = QueryBrowser(interp)
    for order in ('hardest first','easiest first'):
        browser.sort(order)
        assert browser.positions.tolist()==[0,1]
    browser.go_to(1)
    assert browser.about()=='query 2 of 2 · pid <b>1 · no match in the gallery' and browser.cams==[]

def test_no_query_has_a_match():
    explorer = MatchExplorer(None, interp=small([0,1], [Role.QUERY,Role.GALLERY]))
    assert 'no match in the gallery' in explorer.about.value and '<b>0' not in texts(explorer.row)
    assert pictures(explorer.row)==[thumbnail('none')]*2
    junk = MatchExplorer(None, interp=small([0,-1], [Role.QUERY,Role.GALLERY]))
    assert 'There is no image to compare with' in texts(junk.row)

def test_without_queries():
    with pytest.raises(ValueError, match='rankings need both queries and a gallery'):
        MatchExplorer(None, interp=small([0,1], [Role.TRAIN]*2))
    with pytest.raises(ValueError, match='k=0'): MatchExplorer(None, k=0)
