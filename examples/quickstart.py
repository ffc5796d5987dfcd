"""Train a classifier with exits, learn when it may stop, certify a promise, predict: geep from Python, end to end.

python examples/quickstart.py                                        # Reuters news by topic
python examples/quickstart.py --data mine.jsonl --encoder my-bert/   # rows with "text" and "label"
"""

import argparse
from collections.abc import Sequence

import geep


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
    parts = geep.divide(geep.load_dataset(options.data, max_train=options.max_rows), fraction=0.5)
    settings = geep.TrainSettings(epochs=2, batch_size=16, learning_rate=2e-4, max_length=32)
    trained = geep.train(parts, options.output, encoder=options.encoder, settings=settings)
    print(trained.learned_nothing or f"trained {trained.steps} steps")

    profiled = geep.profile(geep.Engine.from_pretrained(options.output, exits=False), parts.train, parts.profile)
    profiled.save(options.output)
    promise = geep.Promise(max_accuracy_drop=options.max_accuracy_drop)
    try:
        # lexical_exit=None would also try answers by the table alone, at depth 0, and keep them if they pay.
        calibrated = geep.calibrate(profiled.engine, profiled.heldout, parts.calibration, promise, lexical_exit=False)
        calibrated.save(options.output)
    except geep.NothingCertifiedError as refusal:
        geep.save_refusal(profiled.engine, options.output, refusal)
        print(refusal)  # the engine stays at speed 0, which is the full model

    engine = geep.Engine.from_pretrained(options.output)
    print(f"speed {engine.settings.speed:g}")
    texts = parts.calibration.inputs[:8]
    for text, answer in zip(texts, engine.predict(texts), strict=True):
        depth = f"{answer.exit_layer} of {engine.depths[-1]} layers"
        print(f"{answer.label:>12} {answer.score:.2f}  {depth}  {text[:60]}")


if __name__ == "__main__":
    main()
