"""Train a classifier with exits, learn when it may stop, certify a promise, predict: geep from Python, end to end.

python examples/quickstart.py                                        # Reuters news by topic
python examples/quickstart.py --data mine.jsonl --encoder my-bert/   # rows with "text" and "label"
"""

import argparse
from collections.abc import Sequence

from transformers import AutoTokenizer

from geep import Engine, GeepForSequenceClassification
from geep.calibration import keep_promise, profile
from geep.data import divide, fetch_encoder, load_dataset
from geep.exits import Promise, TooFewTextsError
from geep.training import TrainSettings, encode, train


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="reuters-r8", help="labelled file, folder or data set name")
    parser.add_argument("--encoder", default="all-minilm-l6-v2", help="encoder name, folder or hub id")
    parser.add_argument("--output", default="quickstart-model", help="folder of the finished model")
    parser.add_argument("--max-rows", type=int, default=800, help="rows used, held-out ones included")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.05, help="the promise: 0.05 is 5 points")
    options = parser.parse_args(arguments)

    # Half of the rows are learned from, a quarter tells how exits behave, a quarter certifies the promise.
    dataset = load_dataset(options.data, max_train=options.max_rows)
    parts = divide(dataset, fraction=0.5)
    encoder = fetch_encoder(options.encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = GeepForSequenceClassification.from_encoder(encoder, label_names=dataset.label_names)
    settings = TrainSettings(epochs=2, batch_size=16, learning_rate=2e-4, max_length=32)
    rows = encode(tokenizer, parts.train.inputs, parts.train.labels, max_length=settings.max_length)
    train(model, tokenizer, rows, settings=settings, checkpoint_dir=f"{options.output}/checkpoints")

    # The length trained at is kept with the tokenizer, so that the promise is about texts cut there.
    tokenizer.model_max_length = settings.max_length
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    engine = profile(Engine.from_pretrained(options.output), parts.train, parts.profile).engine
    try:
        promise = Promise(max_accuracy_drop=options.max_accuracy_drop)
        # lexical_exit=None would also try answers by the table alone, at depth 0, and keep them if they pay.
        engine = keep_promise(engine, parts.profile, parts.calibration, promise, lexical_exit=False).engine
    except TooFewTextsError as error:
        print(error)  # the engine stays at speed 0, which is the full model
    engine.save_exits(options.output)

    engine = Engine.from_pretrained(options.output)
    print(f"speed {engine.settings.speed:g}")
    texts = parts.calibration.inputs[:8]
    for text, answer in zip(texts, engine.predict(texts), strict=True):
        depth = f"{answer.exit_layer} of {engine.depths[-1]} layers"
        print(f"{answer.label:>12} {answer.score:.2f}  {depth}  {text[:60]}")


if __name__ == "__main__":
    main()
