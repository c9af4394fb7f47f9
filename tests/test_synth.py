"Synthetic people: the same bytes every time, Market-1501's layout, and nothing half-written"
import hashlib
import json
import random
import re
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from pyramidreid.synth import dataset
from pyramidreid.synth.dataset import (
    SCENE_HEIGHT,
    SCENE_WIDTH,
    contact_sheet,
    detector_box,
    draw_scene,
    make_camera,
    synth_persons,
    take_picture,
)
from pyramidreid.synth.people import SHEET_HEIGHT, SHEET_WIDTH, _rng, draw_person, make_identity

FILE_NAME = re.compile(r'(-1|\d{4})_c(\d+)s(\d)_(\d{6})_(\d\d)\.jpg')
FOLDERS = ('bounding_box_train', 'query', 'bounding_box_test')
SMALL = dict(n_train=3, n_test=2, n_cams=2, per_cam=3, size=(64,32))
N_SMALL = (3+2)*2*3

def digests(path):
    "Checksum of each image by its name"
    return {str(file.relative_to(path)): hashlib.sha1(file.read_bytes()).hexdigest()
            for file in sorted(path.glob('*/*.jpg'))}

def pids(path, folder): return [FILE_NAME.fullmatch(file.name)[1] for file in (path/folder).iterdir()]

def global_random_state():
    _,keys,position,*_ = np.random.get_state()
    return random.getstate(),keys.tolist(),position

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder of this test, for the cache"
    monkeypatch.setattr(dataset.Path, 'home', lambda: tmp_path/'home')
    return tmp_path/'home'

# the same pixels, always

def test_same_arguments_same_bytes(tmp_path):
    args = dict(**SMALL, distractors=2, junk=2)
    first = digests(synth_persons(tmp_path/'a', **args))
    make_camera.cache_clear()
    random.seed(2); np.random.seed(2)
    assert digests(synth_persons(tmp_path/'b', **args))==first
    assert len(first)==N_SMALL+4 and len(set(first.values()))==len(first)
    other_seed = digests(synth_persons(tmp_path/'c', **args, seed=1))
    assert not set(other_seed.values()) & set(first.values())

def test_global_random_states_stay_untouched(tmp_path):
    random.seed(1); np.random.seed(1)
    before = global_random_state()
    make_camera.cache_clear()
    synth_persons(tmp_path/'a', **SMALL)
    assert global_random_state()==before

def test_people_do_not_depend_on_how_many_there_are(tmp_path):
    few = digests(synth_persons(tmp_path/'few', **SMALL))
    many = digests(synth_persons(tmp_path/'many', **{**SMALL, 'n_train':5, 'n_test':4}, distractors=3, junk=1))
    assert few.items()<=many.items() and len(many)>len(few)

# Raise `SYNTH_VERSION` if one of the next two must change: sets in the caches of users are then drawn again

def test_the_identities_are_those_of_this_version():
    who = make_identity(7)
    assert (who.top,who.second,who.legs,who.shoes)==((128,132,138), (34,36,42), (96,96,100), (30,28,28))
    assert (who.skin,who.hair,who.hat_rgb,who.bag_rgb)==((244,208,177), (196,156,92), (112,78,54), (172,38,44))
    assert (who.pattern,who.period,who.hem,who.sleeve,who.bottom)==('twotone', .07, .68, 'short', 'trousers')
    assert (who.style,who.beard,who.hat,who.bag,who.bag_side)==('bald', False, 'cap', 'backpack', -1)
    lengths = [who.head, who.crotch, who.shoulder, who.waist, who.hip]
    assert lengths==pytest.approx([.1413071865, .5278098400, .1059206146, .0888549147, .1016048664], abs=1e-9)

PICTURES = { # camera → box in the scene, and the picture averaged over 4 rows and 2 columns
    1: ((159,147,244,455), [[(123,122,103), (167,144,120)], [(131,127,103), (158,126,106)],
                            [(112,104,84), (106,93,78)], [(136,119,95), (131,114,92)]]),
    2: ((148,147,260,450), [[(116,103,120), (106,117,143)], [(119,76,85), (108,102,114)],
                            [(81,82,104), (88,88,110)], [(40,62,123), (41,63,127)]]),
    3: ((139,147,236,451), [[(84,106,82), (93,101,67)], [(115,90,85), (106,101,90)],
                            [(105,90,101), (88,70,82)], [(89,68,80), (108,75,93)]]),
    4: ((147,147,256,453), [[(137,124,136), (126,129,150)], [(116,96,108), (135,116,131)],
                            [(96,90,96), (139,130,134)], [(109,102,106), (139,135,130)]]),
}
@pytest.mark.parametrize('cam_id', PICTURES)
def test_the_pictures_are_those_of_this_version(cam_id):
    "Up to the few pixels that versions of Pillow draw differently"
    want_box,want = PICTURES[cam_id]
    rng,cam = _rng('golden', cam_id),make_camera(cam_id)
    scene,box = draw_scene(make_identity(7), cam, rng, occlude=1.)
    picture = take_picture(scene, detector_box(box, rng, .5), cam, rng)
    assert np.abs(np.subtract(box, want_box)).max()<=1
    assert np.abs(np.asarray(picture.resize((2,4), Image.BOX), int)-want).max()<=3

# layout

def test_layout_and_counts(tmp_path):
    path = synth_persons(tmp_path/'a', n_train=3, n_test=4, n_cams=3, per_cam=2, size=(64,32), distractors=5, junk=4)
    train,query,gallery = (Counter(pids(path, folder)) for folder in FOLDERS)
    assert train=={'0001':6, '0003':6, '0005':6}
    assert query=={'0002':3, '0004':3, '0006':3, '0008':3}
    assert gallery=={**query, '0000':5, '-1':4}
    for pid in query:
        cams = [FILE_NAME.fullmatch(file.name)[2] for file in (path/'query').glob(f'{pid}_*')]
        assert sorted(cams)==['1', '2', '3']
    names = [file.name for file in path.glob('*/*.jpg')]
    assert len(set(names))==len(names)==3*3*2+4*3*2+5+4
    assert {Image.open(file).size for file in path.glob('*/*.jpg')}=={(32,64)}

# boxes

@pytest.mark.parametrize('pid', [*range(1, 30), 'passer-by'])
def test_nobody_is_larger_than_the_sheet(pid):
    who = make_identity(pid, family=0)
    for k,yaw in enumerate(range(0, 360, 30)):
        left,top,right,bottom = draw_person(who, yaw, stride=(-.13,.13)[k%2], pitch=.1).getbbox()
        assert 0<left and 0<top and right<SHEET_WIDTH and bottom<SHEET_HEIGHT

@pytest.mark.parametrize('pid', [1, 2, 9, 17, 'passer-by'])
def test_the_ideal_box_holds_the_whole_person(pid):
    scene,exact = draw_scene(make_identity(pid, family=0), make_camera(1), _rng('t', pid))
    assert scene.size==(SCENE_WIDTH,SCENE_HEIGHT)
    for aspect in (.4, .5, 1.):
        left,top,right,bottom = detector_box(exact, _rng('d', pid), misalign=0., aspect=aspect)
        assert left<exact[0] and top<exact[1] and right>exact[2] and bottom>exact[3]
        assert (right-left)/(bottom-top)==pytest.approx(aspect)

def test_misalign_is_graded_and_bounded():
    _,exact = draw_scene(make_identity(1), make_camera(1), _rng('m'))
    _,exact_top,_,exact_bottom = exact
    height = exact_bottom-exact_top
    lost,size = {},{}
    for misalign in (0, .25, .5, 1):
        boxes = [detector_box(exact, _rng('m', i), misalign) for i in range(300)]
        lost[misalign] = [(max(0, top-exact_top)+max(0, exact_bottom-bottom))/height for _,top,_,bottom in boxes]
        size[misalign] = [height/(bottom-top) for _,top,_,bottom in boxes]
    assert max(lost[0])==0 and 0<np.mean(lost[.25])<np.mean(lost[.5])<np.mean(lost[1])
    assert .25<max(lost[1])<.4 and .5<min(size[1])<.65

# invalid arguments

INVALID = [
    (dict(n_train=1), 'n_train=1'),
    (dict(n_test=0), 'n_test=0'),
    (dict(n_test=5000), '4999'),
    (dict(n_cams=1), 'other cameras'),
    (dict(per_cam=1), 'per_cam=1'),
    (dict(misalign=-.1), 'misalign'),
    (dict(misalign=float('nan')), 'misalign'),
    (dict(occlude=1.1), 'occlude'),
    (dict(distractors=-1), 'distractors'),
    (dict(junk=-1), 'junk'),
    (dict(size=(20,64)), 'size'),
    (dict(size=(64,8)), 'size'),
    (dict(size=128), 'size'),
]
@pytest.mark.parametrize('args,message', INVALID)
def test_invalid_arguments_write_nothing(tmp_path, home, args, message):
    for path in (None, tmp_path/'new'):
        with pytest.raises(ValueError, match=message): synth_persons(path, **{**SMALL, **args})
    assert not any(tmp_path.iterdir())

# nothing half-written, nothing overwritten

def test_cache_is_reused_and_repaired(home, monkeypatch):
    path = synth_persons(**SMALL)
    assert path.parent==home/'.cache'/'pyramidreid' and path!=synth_persons(**SMALL, seed=1)
    want = digests(path)
    with monkeypatch.context() as context:
        context.setattr(dataset, '_draw_shot', lambda *args, **kwargs: pytest.fail('drawn again'))
        assert synth_persons(**SMALL)==path
        assert synth_persons(**{**SMALL, 'size':[64,32]})==path
    next((path/'query').iterdir()).unlink()
    assert digests(synth_persons(**SMALL))==want

@pytest.mark.parametrize('cached', [False,True])
@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_an_interrupted_set_is_not_found(tmp_path, home, monkeypatch, error, cached):
    draw,drawn = dataset._draw_shot,[]
    def interrupted(*args, **kwargs):
        if len(drawn)==7: raise error
        drawn.append(1)
        return draw(*args, **kwargs)
    path = None if cached else tmp_path/'set'
    with monkeypatch.context() as context:
        context.setattr(dataset, '_draw_shot', interrupted)
        with pytest.raises(error): synth_persons(path, **SMALL)
    assert len(drawn)==7 and not [file for file in tmp_path.rglob('*') if file.is_file()]
    assert not (tmp_path/'set').exists()
    assert len(digests(synth_persons(path, **SMALL)))==N_SMALL

def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path):
    "What SIGKILL leaves: a hidden sibling, which is neither taken for the set nor in the way"
    path = synth_persons(tmp_path/'set', **SMALL)
    path.rename(tmp_path/'.set.0badcafe.tmp')
    assert not path.exists() and len(digests(synth_persons(path, **SMALL)))==N_SMALL

def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    "Of another set of the same folder, too"
    left = tmp_path/'.partial-x'/'other'/'query'
    left.mkdir(parents=True)
    (left/'0002_c1s1_000200_01.jpg').write_bytes(b'half')
    (tmp_path/'.partial-x'/'.lock').touch() # which nobody holds
    synth_persons(tmp_path/'set', **SMALL)
    assert [path.name for path in tmp_path.iterdir()]==['set']

def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('mine')
    with pytest.raises(FileExistsError, match='empty or new'): synth_persons(tmp_path/'mine', **SMALL)
    assert [file.name for file in tmp_path.rglob('*')]==['mine', 'thesis.tex']
    (tmp_path/'file').write_text('a file')
    with pytest.raises(FileExistsError): synth_persons(tmp_path/'file', **SMALL)
    assert (tmp_path/'file').read_text()=='a file'

def test_another_set_is_left_alone(tmp_path):
    path = synth_persons(tmp_path/'set', **SMALL)
    want = digests(path)
    with pytest.raises(FileExistsError): synth_persons(path, **SMALL, seed=3)
    (path/'synth.json').write_text('{"n_train":')
    with pytest.raises(FileExistsError): synth_persons(path, **SMALL)
    assert digests(path)==want

def test_two_processes_at_once(tmp_path, monkeypatch):
    "Another process finishes the same set first: this one gives way"
    draw,path,started = dataset._draw_shot,tmp_path/'set',[]
    def slow(*args, **kwargs):
        if not started:
            started.append(1)
            synth_persons(path, **SMALL)
        return draw(*args, **kwargs)
    monkeypatch.setattr(dataset, '_draw_shot', slow)
    assert synth_persons(path, **SMALL)==path
    assert [file.name for file in tmp_path.iterdir()]==['set'] and len(digests(path))==N_SMALL

def test_an_empty_folder_is_used(tmp_path):
    path = synth_persons(str(tmp_path), **SMALL)
    assert path==tmp_path and json.loads((path/'synth.json').read_text())['n_train']==3
    assert synth_persons(tmp_path, **SMALL)==tmp_path

# the contact sheet

@pytest.mark.parametrize('split,n_rows,per_cam', [('bounding_box_train',3,2), ('query',2,1), ('bounding_box_test',2,3)])
def test_contact_sheet(people, split, n_rows, per_cam):
    "One row a person, without distractors and junk; an empty place where there are fewer images"
    fig = contact_sheet(people, n=n_rows, split=split, per_cam=per_cam)
    axs = np.array(fig.axes).reshape(n_rows, 4*per_cam)
    first = 1 if split=='bounding_box_train' else 2
    assert [ax.get_ylabel() for ax in axs[:,0]]==[f'{first+2*i:04d}' for i in range(n_rows)]
    assert [ax.get_title(loc='left') for ax in axs[0,::per_cam]]==[f'camera {i}' for i in range(1, 5)]
    shown = np.array([len(ax.images) for ax in axs.flat]).reshape(axs.shape)
    n_images = dict(bounding_box_train=3, query=1, bounding_box_test=2)[split]
    assert (shown==[int(i<n_images) for i in range(per_cam)]*4).all()
    plt.close(fig)
