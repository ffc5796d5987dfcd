"""The model: any BERT-class encoder of Hugging Face, with an exit classifier at inner layers and a teacher at the end.

The room refuses to know texts, thresholds, tables and batches. Read `families.py` (encoders, taken apart into layers),
`inputs.py` (what they can be given), `spans.py` (where packed texts lie), `heads.py` (classifiers), `labels.py`,
`gradients.py`, `model.py`, which tells Hugging Face's auto classes the model's name, and `classifiers.py` (classifiers
of others, taken over).
"""

from geep.modeling.classifiers import CLASSIFIERS, classifier_config, from_classifier
from geep.modeling.families import (
    FAMILIES,
    Family,
    LayerCall,
    LayerCalls,
    ProblemType,
    family_of,
    layer_calls,
)
from geep.modeling.heads import (
    HEADS,
    AttentionHead,
    ClsHead,
    ConvHead,
    Features,
    MeanHead,
    MeanMaxHead,
    PooledHead,
    compared,
    first_linear,
    standardise_input,
)
from geep.modeling.inputs import (
    check_tokenizer,
    first_lengths,
    first_lengths_packed,
    longest_input,
    made_up_inputs,
)
from geep.modeling.labels import label_names_of
from geep.modeling.model import ExitOutput, GeepConfig, GeepForSequenceClassification, label_loss
from geep.modeling.spans import Spans

__all__ = [
    "AttentionHead",
    "CLASSIFIERS",
    "ClsHead",
    "ConvHead",
    "ExitOutput",
    "FAMILIES",
    "Family",
    "Features",
    "GeepConfig",
    "GeepForSequenceClassification",
    "HEADS",
    "LayerCall",
    "LayerCalls",
    "MeanHead",
    "MeanMaxHead",
    "PooledHead",
    "ProblemType",
    "Spans",
    "check_tokenizer",
    "classifier_config",
    "compared",
    "family_of",
    "first_lengths",
    "first_lengths_packed",
    "first_linear",
    "from_classifier",
    "label_loss",
    "label_names_of",
    "layer_calls",
    "longest_input",
    "made_up_inputs",
    "standardise_input",
]
