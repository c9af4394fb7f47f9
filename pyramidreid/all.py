"""Everything a notebook needs: `from pyramidreid.all import *` gives all of fastai.vision and the names below.
What is not among them is imported from its room, e.g. `from pyramidreid.data.sampler import pk_idxs`."""
from fastai.vision.all import *

# Imported for the methods that they add to a learner
import pyramidreid.explain.matching_bands
import pyramidreid.export.model_files
import pyramidreid.training.distributed
import pyramidreid.training.recipes
from pyramidreid.core import ReIDWarning, Role
from pyramidreid.data.cache import ImageCache
from pyramidreid.data.csv_tables import csv_table
from pyramidreid.data.cuhk03 import cuhk03_table
from pyramidreid.data.datasets import (
    cuhk03_np_table,
    dataset_table,
    duke_table,
    market_table,
    msmt17_table,
    occluded_duke_table,
)
from pyramidreid.data.doctor_report import doctor
from pyramidreid.data.folders import folder_table
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.data.registry import register_dataset
from pyramidreid.data.sampler import PKDataLoader
from pyramidreid.data.tables import hold_out, join_tables, queries_and_gallery, train_on_all
from pyramidreid.data.transforms import person_tfms, strong_tfms
from pyramidreid.evaluation.distances import Distances
from pyramidreid.evaluation.openset import Calibration
from pyramidreid.evaluation.plots import plot_ranking, rank_gallery
from pyramidreid.evaluation.protocol_card import ReIDResult, bootstrap, compare_cards
from pyramidreid.evaluation.protocols import evaluate_cameras, evaluate_single_shot
from pyramidreid.evaluation.reranking import expand_queries, rerank, rerank_distances
from pyramidreid.evaluation.retrieval import evaluate, evaluate_distances
from pyramidreid.explain.interpretation import ReIDInterpretation
from pyramidreid.explain.label_cleaner import LabelCleaner, apply_changes
from pyramidreid.explain.match_explorer import MatchExplorer
from pyramidreid.explain.matching_bands import plot_explanations
from pyramidreid.export.hub import from_pretrained
from pyramidreid.export.model_files import load_embedder
from pyramidreid.export.onnx_runtime import Runtime
from pyramidreid.export.pretrained_models import load_pretrained
from pyramidreid.export.small_onnx import quantize_onnx, reseal_onnx
from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.models.backbone import resnet10
from pyramidreid.models.losses import PyramidLoss
from pyramidreid.models.pretrained import pretrained_models
from pyramidreid.models.pyramid import PyramidNet
from pyramidreid.models.released import released_state_dict
from pyramidreid.synth.dataset import contact_sheet, synth_persons
from pyramidreid.training.checkpoints import Checkpoints, FiniteLoss
from pyramidreid.training.dynamic_losses import DynamicLossWeights
from pyramidreid.training.example import example_learner
from pyramidreid.training.learner import ReIDLearner, pyramid_learner
from pyramidreid.training.loss_rules import FixedWeights, LossRatioWeights, MixedBatches, UncertaintyWeights
from pyramidreid.training.metrics import ReIDMetric, mAP, rank1, rank5
from pyramidreid.training.recipes import EMA
from pyramidreid.training.threshold_calibration import calibrate_distances
