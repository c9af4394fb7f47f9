"""What a model was trained on: written by training, true after interrupts and `lr_find`, and kept by every file, copy
and state dict"""
import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from fastai.vision.all import (
    Callback,
    CancelStepException,
    CancelTrainException,
    GradientAccumulation,
    SaveModelCallback,
    load_learner,
    resnet18,
)
from torch import nn
from toys import quiet

from pyramidreid.cli.inputs import _describe_model
from pyramidreid.core import ReIDWarning
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import EncodeTarget, ReIDDataLoaders
from pyramidreid.data.tables import join_tables, rows_to_evaluate
from pyramidreid.evaluation.protocol_card import Card
from pyramidreid.explain.interpretation import ReIDInterpretation
from pyramidreid.explain.matching_bands import explain  # noqa: F401 adds learn.explain
from pyramidreid.export import model_files
from pyramidreid.export.model_files import learner_from, load_embedder, read_description
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.models.backbone import create_backbone, resnet10
from pyramidreid.models.history import *
from pyramidreid.models.pyramid import PyramidNet
from pyramidreid.synth.dataset import synth_persons
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.recipes import EMA
from pyramidreid.training.threshold_calibration import calibrate_distances  # noqa: F401 adds calibrate

UNTRAINED = 'This model has not been trained'
N_BATCHES = 6 # of the training loader below, see `test_number_of_batches`

def drawn(folder, n_train, seed):
    return synth_persons(path=folder, n_train=n_train, n_test=3, n_cams=2, per_cam=2, size=(48,24), seed=seed)

def loaders(folder): return ReIDDataLoaders.from_market(folder, p=2, k=2, size=(48,24), num_workers=0)

@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Six people to train on, 24 images, and three to search for"
    return drawn(tmp_path_factory.mktemp('data')/'people', 6, seed=1)

@pytest.fixture(scope='module')
def others(tmp_path_factory):
    "Other people, in a folder with another name"
    return drawn(tmp_path_factory.mktemp('data')/'others', 5, seed=5)

@pytest.fixture(scope='module')
def dls(few): return loaders(few)

@pytest.fixture(scope='module')
def other_dls(others): return loaders(others)

@pytest.fixture
def learn(make_learner, dls): return make_learner(dls)

def stages(learn): return [tuple(stage.values()) for stage in learn.model.history['stages']]
def on(learn): return learn.about(learn.dls.valid)['trained on']

def test_number_of_batches(dls): assert len(dls.train)==N_BATCHES

# Training writes it

def test_an_untrained_model_says_so(learn):
    assert stages(learn)==[] and not learn.model.trained
    assert on(learn)=='nothing: untrained (random weights)'
    assert learn.evaluate().about['trained on']==on(learn)

def test_training_counts_epochs_and_steps(learn):
    learn.fit(2)
    assert stages(learn)==[('people', 6, 2, 2*N_BATCHES)]
    learn.fine_tune(1)
    assert stages(learn)==[('people', 6, 4, 4*N_BATCHES)], 'frozen epochs count too'
    assert on(learn)=='people, 6 identities, 4 epochs, from random weights'

def test_an_interrupted_fit_counts_as_far_as_it_came(learn):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch==1 and self.iter==3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Stop())
    assert stages(learn)==[('people', 6, pytest.approx(1+3/N_BATCHES), N_BATCHES+3)]
    learn.fit(1)
    assert stages(learn)==[('people', 6, pytest.approx(2+3/N_BATCHES), 2*N_BATCHES+3)]

def test_a_fit_interrupted_before_its_first_step_leaves_no_stage(learn):
    class Stop(Callback):
        def after_loss(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    assert stages(learn)==[]

def test_an_epoch_that_is_cancelled_counts_in_part(learn):
    class Cancel(Callback):
        def after_batch(self):
            if self.training and self.iter==4: raise CancelTrainException
    learn.fit(1, cbs=Cancel())
    assert stages(learn)==[('people', 6, pytest.approx(5/N_BATCHES), 5)]

def test_steps_that_change_nothing_do_not_count(learn):
    class Skip(Callback):
        "Cancels every second step, as mixed precision does with gradients that are not finite"
        def before_step(self):
            if self.iter%2: raise CancelStepException
    learn.fit(1, lr=0)
    assert stages(learn)==[]
    learn.fit(1, cbs=Skip())
    assert stages(learn)==[('people', 6, 1, (N_BATCHES+1)//2)]

def test_accumulated_gradients_are_one_step(learn):
    learn.fit(1, cbs=GradientAccumulation(8)) # two batches of 4
    assert stages(learn)==[('people', 6, 1, N_BATCHES//2)]

def test_lr_find_leaves_no_trace(learn):
    learn.lr_find(num_it=4, show_plot=False)
    assert learn.model.history==new_history('random weights')
    learn.fit(1)
    before = copy.deepcopy(learn.model.history)
    learn.lr_find(num_it=4, show_plot=False)
    assert learn.model.history==before

def test_validating_is_not_training(learn):
    learn.validate()
    learn.embed()
    assert learn.model.history==new_history('random weights')

def test_a_loop_of_ones_own_is_not_recorded_and_says_so(learn):
    "Batch norm has counted its batches; a fit that follows is recorded"
    learn.create_opt()
    learn.model.train()
    features,logits = learn.model(learn.dls.one_batch()[0])
    (features.sum() + logits.sum()).backward()
    learn._step()
    assert learn.model.trained and on(learn)=='not recorded (random weights)'
    learn.fit(1)
    assert stages(learn)==[('people', 6, 1, N_BATCHES)]

def test_other_data_is_another_stage(learn, other_dls):
    learn.fit(1)
    moved = quiet(learner_from(learn.save_model(learn.path/'m'), other_dls, path=learn.path, lr=1e-3))
    assert stages(moved)==stages(learn), 'its loaders are not what it was trained on'
    assert moved.about(moved.dls.valid)['trained on']==on(learn)
    moved.fit(1)
    assert stages(moved)==[('people', 6, 1, N_BATCHES), ('others', 5, 1, len(other_dls.train))]
    assert on(moved)=='people, 6 identities, 1 epoch, then others, 5 identities, 1 epoch, from random weights'

def test_the_best_weights_come_with_their_history(make_learner, dls):
    "SaveModelCallback loads the weights of an earlier epoch at the end of the fit"
    class Falling(Callback):
        "Makes the first epoch the best"
        order = 55
        def after_epoch(self): self.learn.recorder.values[-1][0] = self.epoch
    best = SaveModelCallback(monitor='train_loss', fname='best')
    learn = make_learner(dls, cbs=[Falling(), best])
    learn.fit(3)
    assert stages(learn)==[('people', 6, 1, N_BATCHES)]

def test_averaged_weights_have_the_history_too(make_learner, dls):
    learn = make_learner(dls, cbs=EMA(.9))
    learn.fit(1)
    assert stages(learn)==[('people', 6, 1, N_BATCHES)]

# Where the weights come from

def test_the_start_is_named(make_learner, dls, tmp_path, monkeypatch):
    from pyramidreid.models import backbone
    torch.save(resnet10().state_dict(), tmp_path/'body.pth')
    learn = make_learner(dls, weights=tmp_path/'body.pth')
    assert on(learn)=='nothing: untrained (weights file body.pth)'
    monkeypatch.setattr(backbone, '_new_model', lambda arch, pretrained: resnet18(weights=None))
    assert on(make_learner(dls, arch=resnet18, pretrained=True))=='nothing: untrained (ImageNet weights)'

def test_released_weights_are_named():
    from test_released import branch_weights

    from pyramidreid.models.released import released_state_dict
    model = PyramidNet(create_backbone(resnet18, pretrained=False), n_ids=3, n_parts=1, emb_sz=2)
    names = ['conv1','bn1','relu','maxpool','layer1','layer2','layer3','layer4']
    def released_name(name):
        child,rest = name.split('.', 1)
        return f'base.{names[int(child)]}.{rest}'
    body = {released_name(name):value for name,value in model.body.state_dict().items()}
    model.load_state_dict(released_state_dict({**body, **branch_weights(0, nf=512)}))
    assert trained_on(model.history)=="the authors' released checkpoint, 3 identities, epochs not recorded"

# It goes where the weights go

@pytest.fixture(scope='module')
def made(make_learner, dls):
    "A trained learner, which the tests do not change"
    learn = make_learner(dls)
    learn.fit(1)
    return learn

@pytest.mark.parametrize('copied', [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: nn.DataParallel(model).module])
def test_copies(made, copied): assert copied(made.model).history==made.model.history

def test_a_state_dict(made, make_learner, dls, tmp_path):
    torch.save(made.model.state_dict(), tmp_path/'w.pth')
    other = make_learner(dls)
    other.model.load_state_dict(torch.load(tmp_path/'w.pth', weights_only=True))
    assert other.model.history==made.model.history
    wrapped = make_learner(dls)
    nn.DataParallel(wrapped.model).load_state_dict(nn.DataParallel(made.model).state_dict())
    assert wrapped.model.history==made.model.history

def test_the_tensors_of_a_state_dict_are_as_before(made):
    tensors = made.model.state_dict()
    assert set(tensors)=={name for name,_ in [*made.model.named_parameters(), *made.model.named_buffers()]}
    made.model.load_state_dict(tensors, strict=True)

def test_tensors_alone_do_not_say(made, learn):
    untouched = dict(learn.model.state_dict())
    learn.model.load_state_dict(untouched)
    assert on(learn)=='nothing: untrained (weights from a state dict)'
    learn.model.load_state_dict(dict(made.model.state_dict()))
    assert learn.model.trained and on(learn)=='not recorded (weights from a state dict)'
    learn.fit(1)
    assert on(learn)=='people, 6 identities, 1 epoch, from weights from a state dict whose training is not recorded'

def test_save_and_load(made, make_learner, dls):
    made.save('there')
    assert make_learner(dls, path=made.path).load('there').model.history==made.model.history

def test_a_pth_file_of_an_earlier_version(made, make_learner, dls):
    made.save('old')
    file = made.path/'models'/'old.pth'
    state = torch.load(file, weights_only=True)
    for notes in state['model']._metadata.values(): notes.pop('history', None)
    torch.save(state, file)
    learn = make_learner(dls, path=made.path).load('old')
    assert learn.model.trained and on(learn)=='not recorded (weights of old.pth)'

def test_a_learner_that_was_pickled_by_an_earlier_version(made):
    old = PyramidNet.__new__(PyramidNet)
    old.__setstate__({name:value for name,value in vars(made.model).items() if name!='history'})
    assert old.trained and trained_on(old.full_history())=='not recorded'

def test_export_and_load_learner(made, test_images, tmp_path):
    before,made.path = made.path,tmp_path
    try: made.export()
    finally: made.path = before
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    assert loaded.model.history==made.model.history
    dl = loaded.dls.test_dl(test_images, with_labels=True)
    assert loaded.evaluate(dl).about['trained on']==on(made)

@pytest.fixture
def test_images(few):
    table = market_table(few)
    return table[table.split!='train'].reset_index(drop=True)

def test_resuming(make_learner, dls, tmp_path):
    "Into a fresh learner, in the second of two fits"
    def run(resume, fits):
        learn = make_learner(dls, path=tmp_path, cbs=Checkpoints(resume=resume))
        for epochs in fits: learn.fit(epochs)
        return learn
    assert stages(run(False, [1,2]))==[('people', 6, 3, 3*N_BATCHES)]
    assert stages(run(True, [1,2]))==[('people', 6, 3, 3*N_BATCHES)]
    for file in (tmp_path/'checkpoints').glob('2-0002*'): file.unlink()
    resumed = run(True, [1,2])
    assert stages(resumed)==[('people', 6, 3, 3*N_BATCHES)]

def test_model_files(made, other_dls, tmp_path):
    folder = made.save_model(tmp_path/'m')
    about = read_description(folder)
    assert about['history']==made.model.history and (about['data'],about['n_ids'])==('people',6)
    model = load_embedder(folder)
    assert trained_on(described_history(model.about))==on(made) and on(made) in repr(model)
    again = quiet(learner_from(folder, other_dls, path=tmp_path))
    passed_on = read_description(again.save_model(tmp_path/'again'))
    assert passed_on['history']==made.model.history and (passed_on['data'],passed_on['n_ids'])==('people',6)
    assert json.loads((tmp_path/'m'/'model.json').read_text())['format']==2

def test_files_of_format_1_stay_readable(made, tmp_path):
    folder = made.save_model(tmp_path/'m')
    about = json.loads((folder/'model.json').read_text())
    del about['history']
    (folder/'model.json').write_text(json.dumps({**about, 'format':1, 'data':'Market-1501', 'n_ids':751}))
    model = load_embedder(folder)
    assert _describe_model(model, 'people', False)['trained on']=='Market-1501, 751 identities, epochs not recorded'
    assert _describe_model(model, 'people', False)['domain']=='cross-domain: not trained on people'

def test_an_untrained_model_has_no_origin_to_pass_on(learn, tmp_path):
    about = read_description(learn.save_model(tmp_path/'m'))
    assert (about['data'],about['n_ids'],about['history'])==('nothing', 0, new_history('random weights'))

# Cards

def test_a_card_says_cross_domain(made, others, other_dls, few):
    assert 'domain' not in made.evaluate().about
    made.evaluate_on({'theirs':others, 'ours':few}, path=made.path/'cards')
    cards = {name:Card.from_json(made.path/'cards'/f'{name}.json').about for name in ('theirs','ours')}
    assert cards['theirs']['domain']=='cross-domain: not trained on others' and 'domain' not in cards['ours']
    moved = quiet(learner_from(made.save_model(made.path/'m'), other_dls, path=made.path))
    assert moved.evaluate().about['domain']=='cross-domain: not trained on others'

def test_a_card_of_joined_datasets_names_the_one_that_validates(make_learner, few, others):
    "And the history names both, whichever validates"
    joined = join_tables(market_table(few), market_table(others), valid=1)
    dls = ReIDDataLoaders.from_table(joined, p=4, k=2, size=(48,24), num_workers=0)
    learn = make_learner(dls)
    learn.fit(1)
    about = learn.evaluate().about
    on_table = learn.evaluate(dls.test_dl(rows_to_evaluate(joined), with_labels=True)).about
    assert about['data']==on_table['data']==joined.attrs['valid_name'] and 'domain' not in about
    assert stages(learn)[0][0]==' + '.join(table.attrs['name'] for table in (market_table(few),market_table(others)))
    held_out = ReIDDataLoaders.from_table(joined, valid_pct=.3, p=4, k=2, size=(48,24), num_workers=0)
    assert make_learner(held_out).about(held_out.valid)['data']==held_out.data_name

def test_loaders_of_an_earlier_version_have_one_name(make_learner, dls, monkeypatch):
    learn = make_learner(dls)
    encode = next(o for o in dls.valid.dataset.tls[1].tfms if isinstance(o, EncodeTarget))
    monkeypatch.delattr(encode, 'valid_name')
    assert learn.about(dls.valid)['data']==dls.data_name

CROSS = [('Market-1501', 'Market-1501', False), ('Market-1501', 'market-1501', False), ('Market-1501', 'MSMT17', True),
         ('crops, 20% of the training identities held out', 'crops', False),
         ('crops', 'crops, 5% of the training identities held out', False),
         ('crops', 'crops, 20% of the 15 training identities with a possible match held out', False),
         ('A + B, validated on B', 'B', False), ('A + B', 'C', True), ('A', 'A + 500,000 distractors', False),
         ('A, all images', 'A', False), ('A', None, False), ('A', '', False)]

@pytest.mark.parametrize('trained,evaluated,cross', CROSS)
def test_cross_domain_by_names(trained, evaluated, cross):
    assert is_cross_domain(add_stage(new_history(), trained, 5), evaluated)==cross

def test_what_is_not_known_is_not_called_cross_domain():
    for history in (new_history(), unrecorded_history(), add_stage(unrecorded_history('x'), 'A', 5)):
        assert not is_cross_domain(history, 'B')

# Warnings

def test_what_an_untrained_model_warns_about(learn, test_images, tmp_path, monkeypatch):
    def write_nothing(net, about, file, *rest): return file
    for write in ('write_onnx','write_exported'): monkeypatch.setattr(model_files, write, write_nothing)
    file = test_images.fn[0]
    calls = [learn.evaluate, lambda: learn.predict(file), lambda: learn.predict(file, gallery=list(test_images.fn[:3])),
             lambda: learn.explain(file, file), lambda: ReIDInterpretation.from_learner(learn),
             learn.calibrate, lambda: Gallery(learn), lambda: learn.save_model(tmp_path/'m'),
             lambda: learn.to_exported('m.pt2'), lambda: learn.to_onnx('m.onnx'),
             lambda: Gallery(load_embedder(tmp_path/'m'))]
    for call in calls:
        with pytest.warns(ReIDWarning, match=UNTRAINED) as found: call()
        ours = [o for o in found if UNTRAINED in str(o.message)]
        assert len(ours)==1 and ours[0].filename==__file__

def test_a_trained_model_does_not_warn(made, test_images, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings('error', UNTRAINED)
        made.evaluate()
        made.predict(test_images.fn[0])
        made.calibrate()
        Gallery(made)
        Gallery(load_embedder(made.save_model(tmp_path/'m')))

def test_training_an_untrained_model_does_not_warn(make_learner, dls, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings('error', UNTRAINED)
        make_learner(dls, path=tmp_path, cbs=Checkpoints()).fit_paper(1)

def test_it_needs_no_torch():
    "The runtime reads it where there is nothing but NumPy and Pillow"
    code = "import sys, pyramidreid.models.history\nprint([o for o in ('torch','fastcore') if o in sys.modules])"
    assert subprocess.run([sys.executable,'-c',code], capture_output=True, text=True).stdout.strip()=='[]'
