from .calibration_file import CalibrationFile as CalibrationFile
from .files import (
    RANGES_NAME as RANGES_NAME,
    SETTINGS_FILE as SETTINGS_FILE,
    TABLE_NAME as TABLE_NAME,
    TRAINING_FILE as TRAINING_FILE,
    HubOptions as HubOptions,
    digest_tensors as digest_tensors,
    file_of as file_of,
    fingerprint as fingerprint,
    named_by as named_by,
    publish as publish,
)
from .hub import reachable as reachable
from .provenance import Provenance as Provenance
from .upload import UploadOptions as UploadOptions, upload as upload
