from .calibration_file import CalibrationFile as CalibrationFile
from .files import (
    RANGES_FILE as RANGES_FILE,
    SETTINGS_FILE as SETTINGS_FILE,
    TABLE_FILE as TABLE_FILE,
    TRAINING_FILE as TRAINING_FILE,
    HubOptions as HubOptions,
    file_of as file_of,
    fingerprint as fingerprint,
    publish as publish,
)
from .provenance import Provenance as Provenance
