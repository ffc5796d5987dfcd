"""Tiny models, a tokenizer and engines, all made in memory: the tests need no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread gains nothing, and makes two test runs on one machine wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch

# Where there is no GPU, Triton interprets the kernels; it decides at its import, which may be that of transformers.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from geep.backends import TokenBatch
from geep.calibration import ProfileResult, profile
from geep.data import Split, unseen
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.exits import profile_exits
from geep.modeling import FAMILIES, GeepForSequenceClassification
from geep.predictor import ExitPredictor, TextExits, fit_predictor as fit_table
from geep.training import TrainSettings, encode, run_recipe


def no_gpu() -> bool:
    """What a test that is not marked `gpu` or `any_device` hears of whether there is a GPU; so with bfloat16."""
    return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this CPU cannot run."""
    if item.get_closest_marker("bfloat16") and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("bfloat16 needs AVX-512 BF16")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run tests as on a machine without a GPU, their fixtures too: what they promise is said of float32 on a CPU."""
    if any(map(item.get_closest_marker, ("gpu", "any_device"))):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", no_gpu)
        patch.setattr(torch.accelerator, "is_available", no_gpu)
        if item.get_closest_marker("bfloat16") is None:
            # Nor does the default dtype depend on the CPU.
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", no_gpu)
        return (yield)


# RoBERTa's order: padding is not row 0, so nothing can rely on that.
CLS, PAD, SEP, UNK, MASK = range(5)
SPECIAL_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
WORDS = tuple(f"w{i}" for i in range(143))
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
VOCAB = (*SPECIAL_TOKENS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS))  # 200 tokens
MAX_LENGTH = 64
NUM_LAYERS = 4

_USUAL: dict[str, Any] = {
    "vocab_size": len(VOCAB),
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": PAD,
    "bos_token_id": CLS,
    "eos_token_id": SEP,
}
_OWN: dict[str, dict[str, Any]] = {
    "roberta": {"type_vocab_size": 2},
    "xlm-roberta": {"type_vocab_size": 2},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": NUM_LAYERS, "n_heads": 2, "hidden_dim": 64},
    "albert": {"embedding_size": 16, "hidden_dropout_prob": 0.1},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
        "type_vocab_size": 2,
    },
    "modernbert": {"cls_token_id": CLS, "sep_token_id": SEP, "local_attention": 8, "global_attn_every_n_layers": 2},
}
_RENAMED = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}


def tiny_encoder(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build an encoder of a family whose hidden states differ clearly between tokens, texts and layers."""
    usual = {name: value for name, value in _USUAL.items() if family != "distilbert" or name not in _RENAMED}
    config = AutoConfig.for_model(family, **(usual | _OWN.get(family, {}) | changes))
    torch.manual_seed(seed)
    encoder = AutoModel.from_config(config, **(FAMILIES[family].init_kwargs or {}))
    loud(encoder, std=0.25)
    return encoder.eval()


def loud(module: nn.Module, *, std: float) -> None:
    """Draw larger weights than a fresh model has: embeddings of size 1, linear layers of `std`, biases of 0.1."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.weight.normal_(std=1.0)
            elif isinstance(part, nn.Linear):
                part.weight.normal_(std=std)
                if part.bias is not None:
                    part.bias.normal_(std=0.1)
            elif isinstance(part, nn.LayerNorm) and part.bias is not None:
                part.weight.uniform_(0.8, 1.2)
                part.bias.normal_(std=0.1)


def make_model(
    family: str = "bert",
    *,
    head: str = "mean",
    num_labels: int = 3,
    exit_layers: tuple[int, ...] | None = (1, 2, 3),
    problem_type: Any = "single_label_classification",
    seed: int = 0,
    separator_id: int | None = None,
    **changes: Any,
) -> GeepForSequenceClassification:
    """Build a model whose exits are sure of some texts and unsure of others."""
    model = GeepForSequenceClassification.from_encoder(
        tiny_encoder(family, seed=seed, **changes),
        num_labels=num_labels,
        exit_layers=exit_layers,
        exit_head=head,
        separator_id=separator_id,
        problem_type=problem_type,
    )
    torch.manual_seed(seed + 1)
    for classifier in (*model.exits, model.teacher):
        loud(classifier, std=0.1 if head == "attention" else 0.5)
        with torch.no_grad():
            classifier.out.weight.mul_(3.0 if head == "attention" else 1.5)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a WordPiece tokenizer: 143 whole words, all other words by letters."""
    tokens = Tokenizer(WordPiece({token: index for index, token in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokens.normalizer = BertNormalizer()
    tokens.pre_tokenizer = BertPreTokenizer()
    tokens.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{
            f"{name}_token": token
            for name, token in zip(("cls", "pad", "sep", "unk", "mask"), SPECIAL_TOKENS, strict=True)
        },
    )


def random_texts(count: int, *, seed: int = 0, longest: int = 12) -> list[str]:
    """Draw texts of 1 to `longest` words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, longest + 1))) for _ in range(count)]


def toy_task(count: int, *, seed: int = 0, noise: float = 0.0) -> tuple[list[str], NDArray[np.int64]]:
    """Draw texts of which one word tells the label (0, 1 or 2); a share `noise` of the labels is drawn anew."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    texts = []
    for label in labels:
        words = random.choice(WORDS[20:60], random.integers(2, 8)).tolist()
        words.insert(int(random.integers(0, len(words) + 1)), WORDS[3 * int(label) + int(random.integers(0, 3))])
        texts.append(" ".join(words))
    return texts, np.where(random.random(count) < noise, random.integers(0, 3, count), labels)


def random_batch(count: int, *, seed: int = 0, longest: int = 14, pairs: bool = False, shortest: int = 2) -> TokenBatch:
    """Draw token ids of texts of `shortest` to `longest` tokens, special ones at their ends."""
    random = np.random.default_rng(seed)
    lengths = random.integers(shortest, longest + 1, count)
    rows = [[CLS, *random.integers(len(SPECIAL_TOKENS), len(VOCAB), length - 2).tolist(), SEP] for length in lengths]
    types = [np.sort(random.integers(0, 2, length)).tolist() for length in lengths]
    return TokenBatch(
        np.array([token for row in rows for token in row], dtype=np.int64),
        np.array([part for row in types for part in row], dtype=np.int64) if pairs else None,
        lengths.astype(np.int64),
    )


def alone(model: GeepForSequenceClassification, batch: TokenBatch, **arguments: Any) -> Tensor:
    """Exit logits of the model run on each text by itself, (num_exits + 1, num_texts, num_labels)."""
    columns = []
    for row in range(len(batch)):
        text = batch.select(np.array([row]))
        with torch.no_grad():
            output = model(
                torch.from_numpy(text.input_ids)[None],
                token_type_ids=None if text.token_type_ids is None else torch.from_numpy(text.token_type_ids)[None],
                output_exits=True,
                **arguments,
            )
        columns.append(output.exit_logits[:, 0])
    return torch.stack(columns, dim=1)


def fit_predictor(engine: Engine, *, kind: str = "fitted", seed: int = 100) -> ExitPredictor:
    """Fit an exit table, lexical exit included, on what the engine's own exits say of random texts."""
    batches = [engine.tokenize(random_texts(300, seed=seed + part)).batch for part in (0, 1)]
    logits = [engine.exit_logits(batch) for batch in batches]
    speeds = (0.2, 0.5, 0.8)
    exits = []
    for part in logits:
        profile = profile_exits(part, engine.depths, multi_label=engine.multi_label)
        exits.append(torch.from_numpy(np.stack([profile.exit_indices(speed) for speed in speeds], axis=1)))
    answers = (logits[0][-1] > 0).float() if engine.multi_label else logits[0][-1].argmax(-1)
    seen, heldout = (
        TextExits(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths), part)
        for batch, part in zip(batches, exits, strict=True)
    )
    return fit_table(
        kind,
        seen,
        answers,
        heldout,
        depths=engine.depths,
        speeds=speeds,
        num_labels=len(engine.label_names),
        vocab_size=len(VOCAB),
        special_ids=range(len(SPECIAL_TOKENS)),
        multi_label=engine.multi_label,
    )


def make_engine(
    model: GeepForSequenceClassification | None = None,
    *,
    settings: ExitSettings | None = None,
    config: EngineConfig | None = None,
    table: bool = True,
) -> Engine:
    """Build an engine on the CPU; its exits have different temperatures, its table is fitted."""
    base = Engine(
        make_model() if model is None else model,
        make_tokenizer(),
        config=EngineConfig(device="cpu") if config is None else config,
    )
    if settings is None:
        temperatures = {0: 1.1, 1: 1.3, 2: 0.9, 3: 0.7, NUM_LAYERS: 1.2}
        settings = ExitSettings(speed=0.5, temperatures=temperatures)
    return base.replace(predictor=fit_predictor(base) if table else None, settings=settings)


def on_course(engine: Engine, **changes: Any) -> Engine:
    """Return the engine with other parts of its `Course`: another backend, other sizes of batches."""
    other = engine.replace()
    other.course = replace(engine.course, **changes)
    return other


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def tiny_model() -> GeepForSequenceClassification:
    return make_model()


@pytest.fixture(scope="session")
def tiny_engine() -> Engine:
    """An engine with a fitted table; shared, for engines do not change."""
    return make_engine(config=EngineConfig(device="cpu", dtype="float32"))


# --------------------------------------------------------------------------------------------------------------------
# A trained model
# --------------------------------------------------------------------------------------------------------------------


def split(count: int, *, seed: int, labelled: bool = True) -> Split:
    """Draw rows of the toy task, of which a tenth has a label by chance."""
    texts, labels = toy_task(count, seed=seed, noise=0.1)
    return Split(texts, labels=labels if labelled else None)


def unlabelled(part: Split) -> Split:
    """The texts alone."""
    return Split(part.texts)


TRAIN, HELDOUT = split(1500, seed=0), split(500, seed=1)
# Of so few words, some texts are drawn twice.
FRESH = unseen(split(700, seed=2), TRAIN, HELDOUT)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny BERT that learnt the toy task, not to perfection."""
    torch.manual_seed(0)
    encoder = tiny_encoder("bert")
    encoder.apply(encoder._init_weights)
    model = GeepForSequenceClassification.from_encoder(encoder, num_labels=3, exit_layers=[1, 2, 3])
    tokenizer = make_tokenizer()
    assert TRAIN.labels is not None
    run_recipe(
        model,
        tokenizer,
        encode(tokenizer, TRAIN.texts, TRAIN.labels, max_length=32),
        settings=TrainSettings(recipe="geep", epochs=2, batch_size=32, learning_rate=4e-3),
        checkpoint_dir=tmp_path_factory.mktemp("train") / "checkpoints",
        device="cpu",
    )
    return Engine(model, tokenizer, config=EngineConfig(device="cpu", dtype="float32", max_batch_tokens=500))


@pytest.fixture(scope="session")
def profiled(trained: Engine) -> ProfileResult:
    """Its exit table, criterion and temperatures."""
    return profile(trained, TRAIN, HELDOUT)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's threads, which our kernels take too: one, and two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
